"""What may not be asked: private addresses in any spelling, by redirect, by name, behind a proxy; what is not shown."""

import datetime
import ipaddress
import logging
import socket
import ssl
import time

import pytest
from servers import FaultProxy, FileServer

from gemma_mlx.data.remote import wire
from gemma_mlx.data.remote.addresses import HostGate, host_of, is_public, redacted, split_url
from gemma_mlx.data.remote.http import HttpStore
from gemma_mlx.errors import InputError, SourceError

PUBLIC = "93.184.216.34"
ALLOW = "allow it with --allow-host"


def refusal(call):
    with pytest.raises(InputError) as caught:
        call()
    assert not issubclass(caught.type, SourceError), caught.value
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.fixture
def names(monkeypatch, web):
    """A name server of our own, and a network in which `PUBLIC` is the machine of `web`.

    Returns a dict: name -> addresses, or a list of such lists, one for each time that the name is asked for.
    """
    known, asked, connected = {"public.example": [PUBLIC]}, [], []
    real, connect = socket.getaddrinfo, wire.create_connection

    def getaddrinfo(host, port, *args, **kwargs):
        host = host.decode() if isinstance(host, bytes) else host
        asked.append(host)
        if host not in known:
            return real(host, port, *args, **{**kwargs, "flags": socket.AI_NUMERICHOST})
        found = known[host]
        if isinstance(found[0], list):
            found = found.pop(0) if len(found) > 1 else found[0]
        return [entry for address in found for entry in real(address, port, *args, **kwargs)]

    def create_connection(address, *args, **kwargs):
        connected.append(address)
        return connect(("127.0.0.1", web.port) if address[0] == PUBLIC else address, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(wire, "create_connection", create_connection)
    known["asked"], known["connected"] = asked, connected
    return known


@pytest.fixture
def data(folder):
    (folder / "a.bin").write_bytes(b"some bytes")
    return b"some bytes"


PRIVATE = [
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "0.0.0.0", "localhost", "LOCALHOST.",
    "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
    "１２７.0.0.1",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_this_machine_is_not_asked_in_any_spelling(host, web, data, quick):
    store = HttpStore([], quick)
    for url in (f"http://{host}:{web.port}/a.bin", f"http://user:secret@{host}:{web.port}/a.bin?token=secret"):
        message = refusal(lambda url=url: store.stat(url))
        assert "private" in message and ALLOW in message and "secret" not in message
        refusal(lambda url=url: next(store.read(url)))
    assert not web.asked


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest/meta-data", "https://10.0.0.1/", "http://192.168.1.1/"])
def test_other_private_addresses_are_refused_at_once(url, quick):
    start = time.monotonic()
    assert ALLOW in refusal(lambda: HttpStore(["127.0.0.1", "localhost"], quick).stat(url))
    assert time.monotonic() - start < quick.connect_timeout


def test_which_addresses_are_public():
    for address in ("8.8.8.8", PUBLIC, "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"):
        assert is_public(address)
    private = "10.1.2.3 172.16.0.1 172.31.255.255 192.168.0.9 127.8.8.8 169.254.169.254 100.64.0.1 0.0.0.0 0.1.2.3 " \
        "192.0.0.1 192.0.2.1 198.18.0.1 203.0.113.1 224.0.0.251 239.1.1.1 240.0.0.1 255.255.255.255 ::1 :: fe80::1 " \
        "fe80::1%eth0 fc00::1 fd12::1 fec0::1 ff02::1 2001:db8::1 ::ffff:10.0.0.1 ::10.0.0.1 64:ff9b::a00:1 " \
        "64:ff9b:1::808:808 2002:a00:1:: 2001::1 100::1"  # fmt: skip
    assert [address for address in private.split() if is_public(address)] == []


def test_named_hosts_are_allowed_and_no_others(web, data, quick):
    url = web.url + "/a.bin"
    for allowed in ("127.0.0.1", web.address, host_of(url), f"127.0.0.1:{web.port:05d}"):
        assert b"".join(HttpStore([allowed], quick).read(url)) == data
    for allowed in (f"127.0.0.1:{web.port + 1}", "localhost", "127.0.0.2", "[::1]"):
        refusal(lambda allowed=allowed: HttpStore([allowed], quick).stat(url))
    assert HostGate.of(["::1", "[::1]:80", "Müller.example:8"]).allowed == {
        "::1",
        "[::1]:80",
        "xn--mller-kva.example:8",
    }
    for allowed in ("http://127.0.0.1", "a/b", "host:port", "user@host", "", "host:"):
        assert "--allow-host" in refusal(lambda allowed=allowed: HostGate.of([allowed]))


def test_a_public_host_may_not_lead_to_a_private_one(names, web, data, quick):
    url = f"http://public.example:{web.port}/moved"
    store = HttpStore([], quick)
    names["inside.example"] = ["10.0.0.5"]
    for there in (web.url + "/a.bin", "http://inside.example/a", "//[::1]/", "http://169.254.169.254/?key=secret"):
        web.redirects["/moved"] = there
        message = refusal(lambda: b"".join(store.read(url)))
        assert message.startswith(f"{url} (redirected to http://") and ALLOW in message and "secret" not in message
    assert [asked.path for asked in web.asked] == ["/moved"] * 4
    assert {address for address, _ in names["connected"]} == {PUBLIC}
    web.redirects["/moved"] = web.url + "/a.bin"
    assert b"".join(HttpStore([web.address], quick).read(url)) == data
    web.redirects["/moved"] = "/a.bin"
    assert b"".join(store.read(url)) == data


def test_the_address_that_was_checked_is_connected_to(names, web, data, quick):
    """A name server that answers differently the second time gains nothing."""
    names["turning.example"] = [[PUBLIC], ["127.0.0.1"]]
    url = f"http://turning.example:{web.port}/a.bin"
    assert HttpStore([], quick).stat(url).size == len(data)
    assert names["connected"] == [(PUBLIC, web.port)] and names["asked"].count("turning.example") == 1
    assert ALLOW in refusal(lambda: HttpStore([], quick).stat(url))
    names["both.example"] = [PUBLIC, "127.0.0.1"]
    assert "(127.0.0.1)" in refusal(lambda: HttpStore([], quick).stat(f"http://both.example:{web.port}/a.bin"))


def test_an_unknown_name_is_told_at_once(names, quick):
    message = refusal(lambda: HttpStore([], quick).stat("https://no-such-host.example/a?key=secret"))
    assert message == (
        "https://no-such-host.example/a?…: no host of this name is known; check the name and the network"
    )


def test_passwords_and_tokens_are_never_shown(web, quick, caplog, folder, data):
    caplog.set_level(logging.DEBUG, "gemma_mlx")
    store = HttpStore([web.address], quick)
    web.statuses |= {"/403": 403, "/503": 503}
    web.redirects |= {
        "/loop": "/loop?sig=secret",
        "/ftp": "ftp://u:secret@h/",
        "/out": "http://u:secret@10.0.0.1/?secret",
    }
    messages = []
    for path in ("nothing", "403", "503", "loop", "ftp", "out"):
        with pytest.raises(InputError) as caught:
            store.stat(f"http://me:secret@{web.address}/{path}?X-Signature=secret#secret")
        messages.append(str(caught.value))
    message = str(messages) + caplog.text
    assert "secret" not in message and "me:" not in message and message.count(f"http://{web.address}/403?…") == 1
    assert "503: HTTP 503" not in message and "trying again" in caplog.text


def test_urls_as_messages_show_them():
    for url, shown in {
        "https://user:secret@host/a@b?secret#secret": "https://host/a@b?…",
        "https://host/a#secret": "https://host/a",
        "https://user:sec/ret@host/a": "https://host/a",
        "https:user:secret@host": "https:host",
        "//user:secret@host/a": "//host/a",
        "data:text/plain,secret": "data:…",
        "gs://bucket/a@b?c#d": "gs://bucket/a@b?c#d",
    }.items():
        assert redacted(url) == shown
    for url in (
        "https://",
        "https:///a",
        "http://host:x/",
        "http://ho st/",
        "http://h/\n",
        "http://[::1",
        "https://a\\@b/",
    ):
        assert "not a proper URL" in refusal(lambda url=url: split_url(url))


def test_a_login_goes_to_its_own_host_only(folder, web, data, quick):
    with FileServer(folder) as other:
        web.redirects["/away"] = f"http://other:pass@{other.address}/a.bin"
        store = HttpStore([web.address, other.address], quick)
        assert b"".join(store.read(f"http://me:p%40ss@{web.address}/away")) == data
        assert web.asked[-1].headers["authorization"] == "Basic bWU6cEBzcw=="
        assert "authorization" not in other.asked[-1].headers
        web.redirects["/near"] = "/a.bin"
        store.stat(f"http://me:p%40ss@{web.address}/near")
        assert [asked.headers["authorization"] for asked in web.asked[-2:]] == ["Basic bWU6cEBzcw=="] * 2


def test_proxies_of_the_environment(web, data, quick, monkeypatch):
    with FaultProxy(web.address) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:secret@{proxy.address}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        store = HttpStore([web.address], quick)
        assert b"".join(store.read("http://public.example/a.bin")) == data
        assert proxy.asked[-1].headers["proxy-authorization"] == "Basic bWU6c2VjcmV0"
        count = len(proxy.asked)
        assert b"".join(store.read(web.url + "/a.bin")) == data  # not by the proxy
        monkeypatch.setenv("no_proxy", "")
        for host in ("10.0.0.1", "127.1", "[::1]", "localhost", "printer", "nas.local", "metadata.google.internal"):
            message = refusal(lambda host=host: store.stat(f"http://{host}/a.bin"))
            assert ALLOW in message and "secret" not in message
        assert len(proxy.asked) == count
    with pytest.raises(SourceError) as caught:
        store.stat("http://public.example/a.bin")
    assert "the proxy failed" in str(caught.value) and "secret" not in str(caught.value)
    monkeypatch.setenv("http_proxy", "socks5://me:secret@host:1080")
    message = refusal(lambda: HttpStore([], quick).stat("http://public.example/a.bin"))
    assert message.startswith("proxy socks5://host:1080: only http and https proxies")


@pytest.fixture
def certificate(tmp_path):
    """Files of a certificate for 127.0.0.1 that signs itself."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    files = tmp_path / "certificate.pem", tmp_path / "key.pem"
    files[0].write_bytes(built.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return files


def test_encrypted_connections(certificate, folder, web, data, quick, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with FileServer(folder, tls=context) as server:
        url, hosts = server.url + "/a.bin", [server.address, web.address, f"localhost:{server.port}"]
        assert "certificate is not accepted" in refusal(lambda: HttpStore(hosts, quick).stat(url))
        assert ALLOW in refusal(lambda: HttpStore([], quick).stat(url))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        store = HttpStore(hosts, quick)
        assert b"".join(store.read(url, store.stat(url))) == data
        other_name = f"https://localhost:{server.port}/a.bin"
        assert "certificate is not accepted" in refusal(lambda: store.stat(other_name))
        server.redirects["/down"] = web.url + "/a.bin"
        web.redirects["/up"] = url
        message = refusal(lambda: store.stat(server.url + "/down"))
        assert "redirected from https to http://" in message and "not encrypted" in message
        assert not web.asked
        assert b"".join(store.read(web.url + "/up")) == data
