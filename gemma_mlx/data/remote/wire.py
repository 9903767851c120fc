"""One HTTP request: only to addresses that may be asked, redirects looked at one by one, errors in our words."""

from __future__ import annotations

import base64
import os
import socket
import ssl
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import unquote, urljoin

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    InvalidHeader,
    LocationParseError,
    LocationValueError,
    NameResolutionError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
    SSLError,
)
from urllib3.util import Retry, Timeout, make_headers
from urllib3.util.connection import create_connection

from gemma_mlx.data.remote.addresses import (
    HostGate,
    RefusedAddress,
    plain_host,
    port_of,
    redacted,
    scheme_of,
    split_url,
)
from gemma_mlx.data.remote.retry import RetryPolicy, TransientError
from gemma_mlx.errors import InputError

REDIRECTS = 5
_REDIRECTED = (301, 302, 303, 307, 308)
_CONNECTIONS = 64
"""Open connections kept for each host."""


class _Gated:
    """A connection to one of the addresses that the gate has checked: a second look-up could give others."""

    gate: HostGate

    def _new_conn(self: Any) -> socket.socket:
        try:
            found = self.gate.addresses(self.host, self.port)
        except socket.gaierror as e:
            raise NameResolutionError(self.host, self, e) from e
        except UnicodeError:
            raise LocationParseError(self.host) from None
        last: OSError = OSError("no address")
        for address in found:
            try:
                return create_connection((address, self.port), self.timeout, self.source_address, self.socket_options)
            except OSError as e:
                last = e
        if isinstance(last, TimeoutError):
            raise ConnectTimeoutError(self, "no connection") from last
        raise NewConnectionError(self, "no connection") from last


def _gated_pools(gate: HostGate) -> dict[str, type]:
    """urllib3's pools, whose connections pass the gate."""
    plain = type("GatedConnection", (_Gated, HTTPConnection), {"gate": gate})
    tls = type("GatedTlsConnection", (_Gated, HTTPSConnection), {"gate": gate})
    return {
        "http": type("GatedPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("GatedTlsPool", (HTTPSConnectionPool,), {"ConnectionCls": tls}),
    }


def _certificates() -> ssl.SSLContext:
    """The system's authorities, and certifi's where it is installed: Python on a Mac may have none of its own."""
    context = ssl.create_default_context()
    with suppress(ImportError):
        import certifi

        context.load_verify_locations(certifi.where())
    return context


class Wire:
    """Sends requests for one `HostGate`; safe to use from several threads and after a fork.

    Proxies are taken from the environment (``HTTPS_PROXY``, ``HTTP_PROXY``, ``NO_PROXY``). A proxy looks names up by
    itself, so that behind one a host is refused by its spelling only: a private address, or a name such as
    ``localhost``; what other names lead to is the proxy's affair.
    """

    def __init__(self, gate: HostGate, policy: RetryPolicy):
        self._gate, self._policy = gate, policy
        self._timeout = Timeout(connect=policy.connect_timeout, read=policy.read_timeout)
        self._proxies = urllib.request.getproxies()
        self._managers: dict[tuple[int, str], urllib3.PoolManager] = {}
        self._answered: set[str] = set()

    @contextmanager
    def answer(self, method: str, url: str, headers: dict[str, str]) -> Iterator[urllib3.BaseHTTPResponse]:
        """The first answer that is not a redirect, its body not read yet.

        Raises:
            InputError: a URL, address or redirect that is refused; a host that nobody knows; a bad certificate.
            TransientError: no answer.
        """
        told, here = redacted(url), url
        for _ in range(REDIRECTS + 1):
            response = self._once(method, here, headers | _login(url, here), told)
            if response.status not in _REDIRECTED:
                try:
                    yield response
                    _leave(response)
                finally:
                    response.close()
                return
            _leave(response)
            here = _next_url(here, response.headers.get("Location", ""), told)
            if redacted(here) != redacted(url):
                told = f"{redacted(url)} (redirected to {redacted(here)})"
        raise InputError(f"{redacted(url)}: more than {REDIRECTS} redirects; give the URL that they lead to")

    def _once(self, method: str, url: str, headers: dict[str, str], told: str) -> urllib3.BaseHTTPResponse:
        parts = split_url(url)
        host, port = plain_host(parts.hostname or ""), port_of(parts)
        at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        target = parts._replace(netloc=at, path=parts.path or "/", fragment="").geturl()
        # Bytes as they lie there: a compressed answer has another size, and no ranges.
        headers = {"Accept-Encoding": "identity", "User-Agent": "gemma_mlx"} | headers
        try:
            response = self._manager(parts.scheme, host, port).request(
                method,
                target,
                headers=headers,
                timeout=self._timeout,
                preload_content=False,
                decode_content=False,
                redirect=False,
                retries=False,
            )
        except RefusedAddress as e:
            raise InputError(f"{told}: {e}") from None
        except HTTPError as e:
            raise self._told_error(e, told, known=at in self._answered) from None
        self._answered.add(at)
        return response

    def _manager(self, scheme: str, host: str, port: int) -> urllib3.PoolManager:
        proxy = self._proxies.get(scheme) or self._proxies.get("all") or ""
        if proxy and urllib.request.proxy_bypass(f"{host}:{port}"):
            proxy = ""
        if proxy:
            self._gate.check_unresolved(host, port)
        key = (os.getpid(), proxy)  # a forked process must not share its parent's connections
        if key not in self._managers:
            self._managers.setdefault(key, self._new_manager(proxy))
        return self._managers[key]

    def _new_manager(self, proxy: str) -> urllib3.PoolManager:
        options = {"num_pools": 32, "maxsize": _CONNECTIONS, "ssl_context": _certificates()}
        if not proxy:
            manager = urllib3.PoolManager(**options)
            manager.pool_classes_by_scheme = _gated_pools(self._gate)
            return manager
        proxy = proxy if "://" in proxy else f"http://{proxy}"
        if scheme_of(proxy) not in ("http", "https"):
            raise InputError(f"proxy {redacted(proxy)}: only http and https proxies can be used; change HTTPS_PROXY")
        parts = split_url(proxy)
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
        return urllib3.ProxyManager(proxy, proxy_headers=make_headers(proxy_basic_auth=login), **options)

    def _told_error(self, error: HTTPError, told: str, known: bool) -> Exception:
        """What a failed request is to the reader: `InputError` where trying again cannot help."""
        cause = error.__cause__
        if isinstance(error, LocationValueError):
            return InputError(f"{told}: not a proper host name; correct the URL")
        if isinstance(error, NameResolutionError) and not known and not _try_again(cause):
            return InputError(f"{told}: no host of this name is known; check the name and the network")
        if isinstance(error, SSLError) and error.args and isinstance(error.args[0], ssl.SSLCertVerificationError):
            why = error.args[0].verify_message
            return InputError(f"{told}: the server's certificate is not accepted ({why}); give a URL whose is")
        return TransientError(reason_of(error, self._policy), known=known)


def _leave(response: urllib3.BaseHTTPResponse) -> None:
    """Closes an answer; its connection can be used again if little was left to read."""
    if response.length_remaining is not None and response.length_remaining <= 1 << 16:
        response.drain_conn()
    response.close()


def _try_again(error: BaseException | None) -> bool:
    return isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN


def _login(url: str, here: str) -> dict[str, str]:
    """Basic authentication by the user and password of `url`, for `here` if that is the same server."""
    parts, other = split_url(url), split_url(here)
    if parts.username is None or (parts.scheme, parts.hostname, port_of(parts)) != (
        other.scheme,
        other.hostname,
        port_of(other),
    ):
        return {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


def _next_url(here: str, location: str, told: str) -> str:
    """Where a redirect leads.

    Raises:
        InputError: nowhere, to another scheme, or from https to http.
    """
    with suppress(UnicodeError):  # bytes of a header come as Latin-1, those of a path are mostly UTF-8
        location = location.encode("latin-1").decode()
    try:
        there = urljoin(here, location)
    except ValueError:
        there = location
    if not location or scheme_of(there) not in ("http", "https"):
        raise InputError(
            f"{told}: redirected to {redacted(there) if location else 'nowhere'}; only https:// is followed"
        )
    if scheme_of(here) == "https" and scheme_of(there) == "http":
        raise InputError(f"{told}: redirected from https to {redacted(there)}, which is not encrypted; refused")
    try:
        split_url(there)
    except InputError as e:
        raise InputError(f"{told}: redirected to {e}") from None
    return there


def reason_of(error: Exception, policy: RetryPolicy) -> str:
    """urllib3's exception without addresses, tokens and Python names."""
    cause = error.__cause__
    if isinstance(error, ProxyError):
        return "the proxy failed"
    if isinstance(error, NameResolutionError):
        return "the host's name is not known"
    if isinstance(error, NewConnectionError):
        return f"no connection: {cause.strerror}" if isinstance(cause, OSError) and cause.strerror else "no connection"
    if isinstance(error, ConnectTimeoutError):
        return f"no connection within {policy.connect_timeout:g} s"
    if isinstance(error, ReadTimeoutError):
        return f"nothing arrived within {policy.read_timeout:g} s"
    if isinstance(error, SSLError):
        return "encryption failed"
    return "the connection broke"


def retry_after(response: urllib3.BaseHTTPResponse) -> float | None:
    """Seconds that a server asks to wait."""
    with suppress(InvalidHeader):
        return Retry().parse_retry_after(response.headers["Retry-After"]) if "Retry-After" in response.headers else None
    return None
