"""Which hosts may be asked: none with a private address, unless the user named it; and URLs as messages show them.

Data come with URLs that their author wrote. Without this check a row could read what only this machine can reach: a
router's page, a cloud's metadata server, a database of the local network.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

from gemma_mlx.errors import InputError

_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCAL_NAMES = (".localhost", ".local", ".internal", ".home.arpa")
_HOST = re.compile(r"[\w.-]+|[0-9A-Fa-f:.]+(%[\w.-]+)?")


def scheme_of(url: str) -> str:
    """``https`` of ``HTTPS://…``; "" if there is none."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
    return found.group(1).lower() if found else ""


def redacted(url: str) -> str:
    """A URL for messages: without user, password and fragment, with ``?…`` in the place of its query, and not endless.

    A ``gs://`` URL has none of these: it is shown whole.
    """
    scheme = scheme_of(url)
    if scheme == "gs":
        return _printable(url)
    if scheme == "data":
        return "data:…"
    head, mark, _ = url.partition("?")
    head = head.partition("#")[0]
    # By hand, since what cannot be parsed must not show its password either (nor one with a slash in it).
    start, user, odd_user = r"^(\w[\w+.-]*:[/\\]*|[/\\]{2,})", r"[^/\\]*", r"(?!\[)[^/\\]*:[^0-9/\\][^@]*"
    head = re.sub(rf"{start}(?:{user}|{odd_user})@", r"\1", head)
    return _printable(head) + ("?…" if mark else "")


def _printable(url: str) -> str:
    text = url if url.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in url)
    return text if len(text) <= 1100 else text[:300] + "…"


def split_url(url: str) -> SplitResult:
    """The parts of an ``http(s)`` URL.

    Raises:
        InputError: it cannot be parsed.
    """
    try:
        parts = urlsplit(url)
        fine = parts.scheme in _PORTS and _HOST.fullmatch(parts.hostname or "") and parts.port != 0
    except ValueError:
        fine = False
    if not fine or "\\" in parts.netloc or re.search(r"[\x00-\x1f\x7f]", url):
        raise InputError(f"{redacted(url)!r} is not a proper URL; expected one such as https://host/folder/file.flac")
    return parts


def host_of(url: str) -> str:
    """``host:port`` of an ``http(s)`` URL as `HostGate` takes it: what the user allows by naming this URL."""
    parts = split_url(url)
    return _with_port(parts.hostname or "", port_of(parts))


def port_of(parts: SplitResult) -> int:
    """The port of a URL's parts, by its scheme if it has none."""
    return parts.port or _PORTS[parts.scheme]


def plain_host(host: str) -> str:
    """A host without brackets or a dot at its end, in the letters that a name server is asked with."""
    host = host.strip("[]").lower()
    with suppress(UnicodeError):
        host = host.encode("idna").decode()
    return host.rstrip(".")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet: not private, loopback, link-local, multicast, reserved, …

    An IPv6 address that stands for an IPv4 address (mapped, NAT64, 6to4) is judged by that one.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback)


class RefusedAddress(InputError):
    """A host has an address that it must not have; the message lacks the URL, which the caller adds."""


@dataclass(frozen=True)
class HostGate:
    """Decides which addresses may be connected to.

    Args:
        allowed: ``host`` (any port) or ``host:port`` that the user named: these may have any address.
    """

    allowed: frozenset[str]

    @classmethod
    def of(cls, hosts: Iterable[str]) -> HostGate:
        """A gate for hosts as users write them: ``HOST``, ``host:8000``, ``[::1]:8000``, ``::1``."""
        return cls(frozenset(_normal(host) for host in hosts))

    def names(self, host: str, port: int) -> bool:
        """Whether the user named this host."""
        return plain_host(host) in self.allowed or _with_port(host, port) in self.allowed

    def addresses(self, host: str, port: int) -> list[str]:
        """The IP addresses of a host, all of them checked; the caller connects to these and asks no name server again.

        Raises:
            RefusedAddress: one of them is not public and the user did not name the host.
            socket.gaierror: the name is not known.
        """
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)]
        found = list(dict.fromkeys(found))
        if not self.names(host, port):
            private = next((address for address in found if not is_public(address)), None)
            if private:
                raise self._refusal(host, port, private)
        return found

    def check_unresolved(self, host: str, port: int) -> None:
        """Refuses what is private by its spelling alone, where a proxy and not this machine looks names up.

        Raises:
            RefusedAddress: an address, in any notation, that is not public, or a name of a local network.
        """
        if self.names(host, port):
            return
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        except (socket.gaierror, UnicodeError):
            name = plain_host(host)
            if "." not in name or name.endswith(_LOCAL_NAMES):
                raise self._refusal(host, port, "a name of a local network") from None
            return
        private = next((str(entry[4][0]) for entry in found if not is_public(str(entry[4][0]))), None)
        if private:
            raise self._refusal(host, port, private)

    def _refusal(self, host: str, port: int, address: str) -> RefusedAddress:
        plain = plain_host(host)
        what = f"{plain} is a private address" if plain == address else f"{plain} is in a private network ({address})"
        return RefusedAddress(f"{what}; if it shall be read, allow it with --allow-host {_with_port(host, port)}")


def _with_port(host: str, port: int) -> str:
    plain = plain_host(host)
    return f"[{plain}]:{port}" if ":" in plain else f"{plain}:{port}"


def _normal(host: str) -> str:
    if "://" in host:
        raise InputError(f"--allow-host {redacted(host)}: give a host, such as data.example or 10.0.0.7:8000")
    bracketed = re.fullmatch(r"\[([^]]*)\](?::(\d+))?", host)
    if bracketed:
        name, port = bracketed.groups()
    elif host.count(":") == 1:
        name, port = host.split(":")
    else:
        name, port = host, None
    if not name or re.search(r"[\s/@?#\\]", name) or (port is not None and not port.isdigit()):
        raise InputError(f"--allow-host {host!r}: give a host, such as data.example or 10.0.0.7:8000")
    return _with_port(name, int(port)) if port else plain_host(name)
