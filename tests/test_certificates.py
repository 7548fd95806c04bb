"""Chapter 9: whose certificate it is, whom it speaks for, and what both ends of a channel know."""

from __future__ import annotations

import dataclasses
import hashlib
import ipaddress
import os
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from hypothesis import given
from hypothesis import strategies as st

import xmppd
from xmppd import JID, Certificates, ConfigError, TLSFiles, read_certificate

HOSTS = ("example.org", "bücher.example", "chat.local")
NOW = datetime.now(UTC)
TIMEOUT = 20  # seconds


# -- certificates made here, as others might make them


def other_name(oid: str, text: str, tag: int = 0x0C) -> x509.OtherName:
    data = text.encode()
    return x509.OtherName(x509.ObjectIdentifier(oid), bytes([tag, len(data)]) + data)


def xmpp_addr(text: str) -> x509.OtherName:
    return other_name("1.3.6.1.5.5.7.8.5", text)


def srv_name(text: str) -> x509.OtherName:
    return other_name("1.3.6.1.5.5.7.8.7", text, 0x16)


def dns(*names: str) -> list[x509.GeneralName]:
    return [x509.DNSName(name) for name in names]


def certify(
    names: list[x509.GeneralName],
    *,
    key: Any = None,
    issuer: tuple[x509.Certificate, Any] | None = None,
    common_name: str = "somebody",
    days: tuple[int, int] = (-1, 90),
    algorithm: Any = hashes.SHA256(),  # noqa: B008
    pss: bool = False,
    ca: bool = False,
) -> tuple[x509.Certificate, Any]:
    """Return a certificate and its key; signed by itself unless there is an `issuer`."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    issuer_name, signer = (issuer[0].subject, issuer[1]) if issuer else (subject, key)
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer_name, public_key=key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).add_extension(x509.BasicConstraints(ca, None), True)
    builder = builder.not_valid_before(NOW + timedelta(days[0])).not_valid_after(NOW + timedelta(days[1]))
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
    if ca:  # what Python 3.13 and newer insist on (RFC 5280 §4.2.1.1 to §4.2.1.3)
        may_sign = x509.KeyUsage(*(right == 5 for right in range(9)))  # keyCertSign
        builder = builder.add_extension(may_sign, True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
    if issuer:
        of_issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer[0].public_key())
        builder = builder.add_extension(of_issuer, False)
    options = {"rsa_padding": padding.PSS(padding.MGF1(algorithm), algorithm.digest_size)} if pss else {}
    return builder.sign(signer, algorithm, **options), key


def der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def write_pem(path: Path, thing: Any, passphrase: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(thing, x509.Certificate):
        path.write_bytes(thing.public_bytes(serialization.Encoding.PEM))
    else:
        secret = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        form = serialization.PrivateFormat.PKCS8
        path.write_bytes(thing.private_bytes(serialization.Encoding.PEM, form, secret))
    return path


def write_pair(folder: Path, pair: tuple[x509.Certificate, Any], name: str = "site") -> TLSFiles:
    return TLSFiles(write_pem(folder / f"{name}.crt", pair[0]), write_pem(folder / f"{name}.key", pair[1]))


def configured(folder: Path, tls: TLSFiles | None, hosts: tuple[str, ...] = ("example.org",), **more: Any) -> Any:
    return xmppd.Config(hosts=hosts, data=folder, tls=tls, **more)


# -- TLS between a server context and a client


@contextmanager
def connected(context: ssl.SSLContext, client: ssl.SSLContext, name: str | None, **options: Any) -> Iterator[Any]:
    """Shake hands over a socket pair; yield (server's end, client's end)."""
    left, right = socket.socketpair()
    left.settimeout(TIMEOUT)
    right.settimeout(TIMEOUT)
    server = context.wrap_socket(left, server_side=True, do_handshake_on_connect=False)
    with ThreadPoolExecutor(1) as pool, server:
        shaken = pool.submit(server.do_handshake)
        try:
            with client.wrap_socket(right, server_hostname=name, **options) as ours:
                shaken.result(TIMEOUT)
                yield server, ours
        finally:
            right.close()


def trusting(authority: Path | None) -> ssl.SSLContext:
    """Return a client that trusts this CA, or anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority:
        context.load_verify_locations(authority)
    else:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose certificates are made."""
    folder = tmp_path_factory.mktemp("data")
    xmppd.ensure_certificates(folder, HOSTS, ["192.0.2.7", "::", "0.0.0.0"])
    return folder


@pytest.fixture(scope="module")
def own(data: Path) -> Certificates:
    """Certificates of our own CA, for three hosts and two protocols."""
    return Certificates(configured(data, None, HOSTS), ("xmpp-client", "http/1.1"), ["192.0.2.7"])


# -- our own CA and leaf


@pytest.mark.parametrize("name", [*HOSTS, "localhost", "127.0.0.1", "::1", "192.0.2.7"])
def test_a_client_that_trusts_our_authority_accepts_every_name(own: Certificates, name: str) -> None:
    """RFC6120-5.4.3.1-1"""
    with connected(own.context("", "xmpp-client"), trusting(own.authority), name) as (server, ours):
        assert ours.version() == "TLSv1.3"
        server.sendall(b"hello")
        assert ours.recv(5) == b"hello"


def test_a_name_that_we_do_not_serve_is_not_in_the_leaf(own: Certificates) -> None:
    with pytest.raises(ssl.SSLCertVerificationError), connected(own.context(), trusting(own.authority), "evil.example"):
        pass


def test_the_leaf_and_the_authority_are_what_rfc_6120_asks_for(data: Path) -> None:
    """RFC6120-13.7.1.2.1-1"""
    leaf = x509.load_pem_x509_certificate((data / "tls/leaf.pem").read_bytes())
    authority = x509.load_pem_x509_certificate((data / "tls/ca.pem").read_bytes())
    leaf.verify_directly_issued_by(authority)
    assert leaf.subject != x509.Name([]) != authority.subject
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert authority.extensions.get_extension_for_class(x509.KeyUsage).value.digital_signature
    usage = list(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert usage == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH, x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    assert authority.not_valid_after_utc - NOW > timedelta(days=3600)
    assert timedelta(days=90) < leaf.not_valid_after_utc - leaf.not_valid_before_utc <= timedelta(days=398)
    read = read_certificate(der(leaf))
    assert set(read.dns_names) == {"example.org", "xn--bcher-kva.example", "chat.local", "localhost"}
    assert {"_xmpp-client.example.org", "_xmpp-server.example.org"} <= set(read.srv_names)
    assert bytes(4) not in read.ip_addresses and bytes(16) not in read.ip_addresses


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_keys_are_readable_by_their_owner_only(data: Path) -> None:
    for name in ("ca.key", "leaf.key"):
        assert stat.S_IMODE((data / "tls" / name).stat().st_mode) == 0o600
    assert stat.S_IMODE((data / "tls").stat().st_mode) == 0o700
    assert sorted(path.name for path in (data / "tls").iterdir()) == ["ca.key", "ca.pem", "leaf.key", "leaf.pem"]


def test_a_second_start_makes_nothing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xmppd, "make_certificates_apart", lambda request: pytest.fail("made again"))
    xmppd.ensure_certificates(data, HOSTS, ["192.0.2.7"])


def test_an_address_of_yesterday_does_not_change_the_leaf(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xmppd, "make_certificates_apart", lambda request: pytest.fail("made again"))
    xmppd.ensure_certificates(data, HOSTS)


def test_reading_certificates_does_not_import_cryptography(data: Path) -> None:
    """A running server leaves 9 MB to others."""
    program = (
        "import sys, pathlib, xmppd\n"
        f"config = xmppd.Config(hosts={HOSTS!r}, data=pathlib.Path({str(data)!r}))\n"
        "xmppd.Certificates(config).context('example.org')\n"
        "print([name for name in sys.modules if name.startswith('cryptography')])"
    )
    folder = str(Path(xmppd.__file__).parent)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=folder)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.fixture
def made_here(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Make certificates in this process, which is faster; the requests are collected."""
    requests: list[dict[str, Any]] = []

    def make(request: dict[str, Any]) -> dict[str, str]:
        requests.append(request)
        return xmppd.make_certificates(request)

    monkeypatch.setattr(xmppd, "make_certificates_apart", make)
    return requests


def test_new_hosts_get_a_new_leaf_of_the_same_authority(tmp_path: Path, made_here: list[Any]) -> None:
    certificates = Certificates(configured(tmp_path, None))
    authority = (tmp_path / "tls/ca.pem").read_text()
    config = configured(tmp_path, None, ("example.org", "new.example"))
    certificates.renew(config)
    assert certificates.changed()
    assert certificates.reload(config) and not certificates.changed()
    assert (tmp_path / "tls/ca.pem").read_text() == authority
    assert len(made_here) == 2 and made_here[1]["authority"] == authority
    with connected(certificates.context("new.example"), trusting(tmp_path / "tls/ca.pem"), "new.example") as (_, ours):
        assert "_xmpp-client.new.example" in read_certificate(ours.getpeercert(True)).srv_names


def test_a_new_address_gets_a_new_leaf(tmp_path: Path, made_here: list[Any]) -> None:
    xmppd.ensure_certificates(tmp_path, ["example.org"])
    files = xmppd.ensure_certificates(tmp_path, ["example.org"], ["192.0.2.9"])
    assert len(made_here) == 2
    assert ipaddress.ip_address("192.0.2.9").packed in xmppd.load_certificate(files.certificate).ip_addresses


def test_a_host_that_is_an_address_is_named_as_address(tmp_path: Path, made_here: list[Any]) -> None:
    certificates = Certificates(configured(tmp_path, None, ("[2001:db8::1]", "192.0.2.1")))
    assert certificates.context("192.0.2.1").certificate.dns_names == ("localhost",)


@pytest.mark.parametrize(("days_left", "made"), [(140, 1), (120, 2)])
def test_the_leaf_is_renewed_when_less_than_a_third_of_its_life_is_left(
    tmp_path: Path, made_here: list[Any], monkeypatch: pytest.MonkeyPatch, days_left: int, made: int
) -> None:
    files = xmppd.ensure_certificates(tmp_path, ["example.org"])
    leaf = xmppd.load_certificate(files.certificate)
    real = xmppd.load_certificate

    def aged(path: Path) -> xmppd.Certificate:
        shift = timedelta(days=days_left) - (leaf.not_after - NOW)
        found = real(path)
        return dataclasses.replace(found, not_before=found.not_before + shift, not_after=found.not_after + shift)

    monkeypatch.setattr(xmppd, "load_certificate", aged)
    xmppd.ensure_certificates(tmp_path, ["example.org"])
    assert len(made_here) == made


def test_an_authority_at_its_end_is_replaced(tmp_path: Path, made_here: list[Any], caplog: Any) -> None:
    old = certify([], ca=True, days=(-3000, 30))
    folder = tmp_path / "tls"
    write_pem(folder / "ca.pem", old[0])
    write_pem(folder / "ca.key", old[1])
    files = xmppd.ensure_certificates(tmp_path, ["example.org"])
    assert xmppd.load_certificate(files.authority).not_after > NOW + timedelta(days=3000)
    assert "trust anew" in caplog.text


@pytest.mark.parametrize("damage", ["leaf.pem", "leaf.key"])
def test_a_damaged_leaf_is_made_anew(tmp_path: Path, made_here: list[Any], damage: str) -> None:
    files = xmppd.ensure_certificates(tmp_path, ["example.org"])
    (tmp_path / "tls" / damage).write_text("garbage")
    xmppd.ensure_certificates(tmp_path, ["example.org"])
    assert len(made_here) == 2
    Certificates(configured(tmp_path, TLSFiles(files.certificate, files.key)))


def test_another_authority_gets_another_leaf(tmp_path: Path, made_here: list[Any]) -> None:
    files = xmppd.ensure_certificates(tmp_path, ["example.org"])
    other = certify([], ca=True, common_name="of the owner's own making", days=(-1, 3000))
    write_pem(files.authority, other[0])
    write_pem(files.authority_key, other[1])
    certificates = Certificates(configured(tmp_path, None))
    assert len(made_here) == 2
    with connected(certificates.context(), trusting(files.authority), "example.org") as (_, ours):
        assert ours.getpeercert()["issuer"] == ((("commonName", "of the owner's own making"),),)


def test_a_crash_before_the_first_authority_is_complete_does_no_harm(tmp_path: Path, made_here: list[Any]) -> None:
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls/ca.key").write_text("half a k")
    (tmp_path / "tls/leaf.key.new").write_text("")
    xmppd.ensure_certificates(tmp_path, ["example.org"])
    assert Certificates(configured(tmp_path, None)).authority == tmp_path / "tls/ca.pem"


def test_a_lost_authority_key_is_told_and_never_replaced(tmp_path: Path, made_here: list[Any]) -> None:
    files = xmppd.ensure_certificates(tmp_path, ["example.org"])
    files.authority_key.unlink()
    xmppd.ensure_certificates(tmp_path, ["example.org"])  # the leaf will do: no need for the key yet
    before = files.authority.read_text()
    with pytest.raises(ConfigError, match=r"ca\.key: not the readable key .* restore it"):
        xmppd.ensure_certificates(tmp_path, ["other.example"])
    assert files.authority.read_text() == before


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions bind everybody but root")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, made_here: list[Any]) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot store certificates: Permission denied"):
        xmppd.ensure_certificates(tmp_path, ["example.org"])


def test_a_file_where_the_folder_should_be_is_one_line(tmp_path: Path, made_here: list[Any]) -> None:
    (tmp_path / "tls").write_text("")
    with pytest.raises(ConfigError, match="cannot store certificates"):
        xmppd.ensure_certificates(tmp_path, ["example.org"])


def test_without_the_package_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cryptography.py").write_text("raise ModuleNotFoundError(\"No module named 'cryptography'\")")
    here = str(Path(xmppd.__file__).parent)
    monkeypatch.setattr(sys, "path", [here, str(tmp_path), *sys.path])
    monkeypatch.setattr(xmppd, "__file__", str(tmp_path / "xmppd.py"))
    with pytest.raises(
        ConfigError, match=r"No module named 'cryptography'; install the package `cryptography`, or set"
    ):
        xmppd.ensure_certificates(tmp_path, ["example.org"])
    assert not (tmp_path / "tls").exists()


def test_a_maker_that_cannot_be_started_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"cannot make certificates: .*set \[tls\] certificate and key"):
        xmppd.ensure_certificates(tmp_path, ["example.org"])


# -- files of the owner


def test_configured_files_are_presented(tmp_path: Path) -> None:
    pair = certify(dns("example.org"))
    certificates = Certificates(configured(tmp_path, write_pair(tmp_path, pair)))
    with connected(certificates.context("example.org"), trusting(None), "example.org") as (_, ours):
        assert ours.getpeercert(True) == der(pair[0])
    assert certificates.expires_at() == pair[0].not_valid_after_utc
    assert certificates.authority is None and not (tmp_path / "tls").exists()


def broken_files(folder: Path, kind: str) -> TLSFiles:
    """Return files with one fault."""
    pair, other = certify(dns("example.org")), certify(dns("example.org"))
    files = write_pair(folder, pair)
    if kind == "no certificate":
        files.certificate.unlink()
    elif kind == "no key":
        files.key.unlink()
    elif kind == "other key":
        write_pem(files.key, other[1])
    elif kind == "encrypted key":
        write_pem(files.key, pair[1], b"secret")
    elif kind == "not PEM":
        files.certificate.write_bytes(der(pair[0]))
    elif kind == "no key inside":
        files.key.write_text("nothing")
    elif kind == "other name":
        write_pair(folder, certify(dns("www.example.org", "example.com")))
    elif kind == "common name only":
        write_pair(folder, certify([], common_name="example.org"))
    elif kind == "expired":
        write_pair(folder, certify(dns("example.org"), days=(-90, -1)))
    return files


BROKEN = {
    "no certificate": r"site\.crt: cannot read the certificate: No such file",
    "no key": r"site\.key: cannot read the private key: No such file",
    "other key": r"site\.key: is not the key of .*site\.crt",
    "encrypted key": r"site\.key: expected a private key in PEM form without a passphrase",
    "not PEM": r"site\.crt: expected a certificate in PEM form",
    "no key inside": r"site\.key: expected a private key in PEM form",
    "other name": r"site\.crt: does not name example\.org but www\.example\.org, example\.com; get",
    "common name only": r"site\.crt: does not name example\.org but nothing",
    "expired": r"site\.crt: expired on \d{4}-\d\d-\d\d; renew it",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_wrong_with_a_file_is_said_in_one_line(tmp_path: Path, kind: str) -> None:
    """S72: the Common Name counts for nothing."""
    with pytest.raises(ConfigError, match=BROKEN[kind]) as found:
        Certificates(configured(tmp_path, broken_files(tmp_path, kind)))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_new_file_leaves_the_old_one_in_use(tmp_path: Path, kind: str, caplog: Any) -> None:
    pair = certify(dns("example.org"))
    certificates = Certificates(configured(tmp_path, write_pair(tmp_path, pair)))
    broken_files(tmp_path, kind)
    assert certificates.changed()
    assert not certificates.reload()
    assert not certificates.changed()  # said once, not with every tick of the timer
    assert len(caplog.records) == 1 and "the certificates in use stay" in caplog.text
    with connected(certificates.context("example.org"), trusting(None), "example.org") as (_, ours):
        assert ours.getpeercert(True) == der(pair[0])


def test_a_renewed_file_is_presented_after_reload(tmp_path: Path) -> None:
    certificates = Certificates(configured(tmp_path, write_pair(tmp_path, certify(dns("example.org")))))
    begun = certificates.context("example.org")
    assert not certificates.changed()
    new = certify(dns("example.org"))
    write_pair(tmp_path, new)
    assert certificates.changed() and certificates.reload() and not certificates.changed()
    with connected(certificates.context("example.org"), trusting(None), None) as (server, ours):
        assert ours.getpeercert(True) == der(new[0])
        assert xmppd.channel_bindings(server)["tls-server-end-point"] == hashlib.sha256(der(new[0])).digest()
    assert begun.certificate.der != der(new[0])  # handshakes under way keep what they began with


def test_keys_of_session_tickets_do_not_live_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = Certificates(configured(tmp_path, write_pair(tmp_path, certify(dns("example.org")))))
    now = xmppd.time.monotonic()
    monkeypatch.setattr(xmppd.time, "monotonic", lambda: now + 8 * 86400)
    assert certificates.changed()
    old = certificates.context()
    assert certificates.reload() and not certificates.changed()
    assert certificates.context() is not old


def test_a_certificate_of_tomorrow_is_a_warning_about_the_clock(tmp_path: Path, caplog: Any) -> None:
    Certificates(configured(tmp_path, write_pair(tmp_path, certify(dns("example.org"), days=(1, 90)))))
    assert "clock" in caplog.text


def test_a_folder_holds_a_pair_for_each_host(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    one, two, wild = (certify(dns(name)) for name in ("example.org", "example.com", "*.wild.example"))
    write_pem(folder / "example.org/fullchain.pem", one[0])
    write_pem(folder / "example.org/privkey.pem", one[1])
    write_pair(folder, two, "example.com")
    write_pair(folder, wild, "wild.example")
    hosts = ("example.org", "example.com", "chat.wild.example")
    certificates = Certificates(configured(tmp_path, TLSFiles(folder, folder), hosts))
    for host, pair in zip(hosts, (one, two, wild), strict=True):
        with connected(certificates.context("", "xmpp-client"), trusting(None), host) as (server, ours):
            assert ours.getpeercert(True) == der(pair[0])
            assert xmppd.channel_bindings(server)["tls-server-end-point"] == hashlib.sha256(der(pair[0])).digest()
        assert certificates.end_point(host) == hashlib.sha256(der(pair[0])).digest()
    with pytest.raises(
        ConfigError, match=r"no certificate for missing\.example: expected missing\.example/fullchain\.pem"
    ):
        Certificates(configured(tmp_path, TLSFiles(folder, folder), ("missing.example",)))


def test_a_pair_that_went_away_is_said_once(tmp_path: Path, caplog: Any) -> None:
    files = write_pair(tmp_path, certify(dns("example.org")), "example.org")
    certificates = Certificates(configured(tmp_path, TLSFiles(tmp_path, tmp_path)))
    files.certificate.unlink()
    assert certificates.changed() and not certificates.reload() and not certificates.changed()
    assert len(caplog.records) == 1
    assert certificates.context("example.org").certificate.dns_names == ("example.org",)


# -- which certificate a connection gets


@pytest.fixture
def two_hosts(tmp_path: Path) -> Certificates:
    """`example.org` and `example.com`, each with a certificate of its own."""
    write_pair(tmp_path, certify(dns("example.org", "extra.example")), "example.org")
    write_pair(tmp_path, certify(dns("example.com")), "example.com")
    tls = TLSFiles(tmp_path, tmp_path)
    return Certificates(configured(tmp_path, tls, ("example.org", "example.com")), ("xmpp-client", "http/1.1"))


@pytest.mark.parametrize(
    ("to", "sni", "presented"),
    [
        ("example.com", None, "example.com"),  # the stream header alone
        ("example.com", "unknown.example", "example.com"),  # such as the target of an SRV record
        ("example.org", "example.com", "example.com"),  # SNI overrides
        ("example.com", "EXAMPLE.ORG", "example.org"),
        ("", "conference.example.com", "example.com"),  # rooms need no certificate of their own
        ("", "extra.example", "example.org"),
        ("nowhere.example", None, "example.org"),
        ("conference.example.com", None, "example.com"),
        ("not a domain!", None, "example.org"),
    ],
)
def test_the_stream_header_chooses_and_sni_overrides(
    two_hosts: Certificates, to: str, sni: str | None, presented: str
) -> None:
    """RFC6120-5.4.3.1-1"""
    for protocol in ("xmpp-client", "http/1.1"):
        with connected(two_hosts.context(to, protocol), trusting(None), sni) as (_, ours):
            assert read_certificate(ours.getpeercert(True)).dns_names[0] == presented


@pytest.mark.parametrize(
    ("proposed", "chosen"),
    [(["xmpp-client"], "xmpp-client"), (["h2", "xmpp-client"], "xmpp-client"), (["h2"], None), ([], None)],
)
def test_direct_tls_answers_alpn_and_goes_on_without(
    two_hosts: Certificates, proposed: list[str], chosen: str | None
) -> None:
    """XEP-0368 §3; the answer is the same after SNI has changed the certificate."""
    client = trusting(None)
    if proposed:
        client.set_alpn_protocols(proposed)
    with connected(two_hosts.context("", "xmpp-client"), client, "example.com") as (_, ours):
        assert ours.selected_alpn_protocol() == chosen


# -- the protocol's versions and options


def test_tls_before_1_2_is_refused(own: Certificates) -> None:
    """RFC6120-13.9.5-1"""
    assert own.context().minimum_version == ssl.TLSVersion.TLSv1_2
    client = trusting(None)
    client.set_ciphers("ALL:@SECLEVEL=0")
    client.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning):
        client.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)), connected(own.context(), client, "example.org"):
        pass


def test_only_forward_secret_ciphers_and_no_renegotiation(own: Certificates) -> None:
    """RFC6120-5.3.5-1, XEP0138-3-2, S12"""
    context = own.context()
    assert context.options & ssl.OP_NO_RENEGOTIATION and context.options & ssl.OP_NO_COMPRESSION
    old = [cipher["name"] for cipher in context.get_ciphers() if cipher["protocol"] == "TLSv1.2"]
    assert old and all(name.startswith("ECDHE-") and ("GCM" in name or "CHACHA20" in name) for name in old)
    client = trusting(None)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    with connected(context, client, "example.org") as (_, ours):
        assert ours.version() == "TLSv1.2" and ours.compression() is None


def test_a_session_can_be_resumed(own: Certificates) -> None:
    """RFC6120-3.3-2"""
    client = trusting(own.authority)
    with connected(own.context(), client, "example.org") as (server, ours):
        server.sendall(b"x")  # the ticket comes before the first data
        ours.recv(1)
        session = ours.session
    with connected(own.context(), client, "example.org", session=session) as (server, ours):
        assert ours.session_reused
        assert "tls-server-end-point" in xmppd.channel_bindings(server)  # always safe in TLS 1.3
    assert own.context().session_stats()["number"] == 0  # and nothing is kept here


# -- channel bindings


def test_the_end_point_binding_is_what_the_client_computes(own: Certificates) -> None:
    """RFC5802-6.1-1"""
    with connected(own.context(), trusting(own.authority), "example.org") as (server, ours):
        bindings = xmppd.channel_bindings(server)
        assert bindings["tls-server-end-point"] == hashlib.sha256(ours.getpeercert(True)).digest()
        assert "tls-unique" not in bindings  # not defined for TLS 1.3 (RFC 9266 §3)
        assert ("tls-exporter" in bindings) == ("tls-exporter" in ssl.CHANNEL_BINDING_TYPES)


def test_tls_1_2_has_tls_unique_too(own: Certificates) -> None:
    """RFC5802-6.1-1"""
    client = trusting(None)
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    with connected(own.context(), client, "example.org") as (server, ours):
        bindings = xmppd.channel_bindings(server)
        assert list(bindings) == ["tls-unique", "tls-server-end-point"]
        assert bindings["tls-unique"] == ours.get_channel_binding("tls-unique")
        session = ours.session
    with connected(own.context(), client, "example.org", session=session) as (server, ours):
        assert ours.session_reused
        assert xmppd.channel_bindings(server) == {}  # RFC 7677 §4


RSA_KEY = rsa.generate_private_key(65537, 2048)


@pytest.mark.parametrize(
    ("key", "algorithm", "pss", "expected"),
    [
        (None, hashes.SHA256(), False, "sha256"),
        (None, hashes.SHA384(), False, "sha384"),
        (None, hashes.SHA512(), False, "sha512"),
        (RSA_KEY, hashes.SHA256(), False, "sha256"),
        (RSA_KEY, hashes.SHA384(), False, "sha384"),
        (RSA_KEY, hashes.SHA256(), True, "sha256"),
        (RSA_KEY, hashes.SHA512(), True, "sha512"),
        (ed25519.Ed25519PrivateKey.generate(), None, False, ""),
    ],
)
def test_the_hash_of_the_end_point_is_that_of_the_signature(key: Any, algorithm: Any, pss: bool, expected: str) -> None:
    """RFC 5929 §4.1; what has no hash function has no binding."""
    made = der(certify(dns("example.org"), key=key, algorithm=algorithm, pss=pss)[0])
    read = read_certificate(made)
    assert read.signature_hash == expected
    assert read.end_point() == (hashlib.new(expected, made).digest() if expected else None)


@pytest.mark.parametrize("weak", ["md5", "sha1"])
def test_weak_hashes_are_replaced_by_sha_256(weak: str) -> None:
    read = dataclasses.replace(read_certificate(der(certify([])[0])), signature_hash=weak)
    assert read.end_point() == hashlib.sha256(read.der).digest()


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("300d06092a864886f70d0101040500", "md5"),
        ("300d06092a864886f70d0101050500", "sha1"),
        ("300b06092a864886f70d01010a", "sha1"),  # RSASSA-PSS without parameters (RFC 4055 §3.1)
        ("300d06092a864886f70d01010a3000", "sha1"),
        ("300906072a8648ce3d0401", "sha1"),
    ],
)
def test_old_signature_algorithms_are_known(algorithm: str, expected: str) -> None:
    [item] = xmppd.der_items(bytes.fromhex(algorithm))
    assert xmppd.signature_hash(item) == expected


# -- client certificates


@pytest.fixture
def people(tmp_path: Path) -> tuple[Certificates, Any]:
    """A server that knows a CA of client certificates, and that CA."""
    authority = certify([], ca=True, common_name="people")
    own = write_pair(tmp_path, certify(dns("example.org")))
    client_ca = write_pem(tmp_path / "people.pem", authority[0])
    config = configured(tmp_path, own, client_ca=client_ca)
    return Certificates(config, ("xmpp-client", "http/1.1")), authority


def bearing(folder: Path, pair: tuple[x509.Certificate, Any]) -> ssl.SSLContext:
    client = trusting(None)
    client.load_cert_chain(*write_pair(folder, pair, "client"))
    return client


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_certificate_says_who_it_is(people: Any, tmp_path: Path, version: ssl.TLSVersion) -> None:
    """RFC6120-5.4.3.1-2, RFC6120-13.7.2.2-1"""
    certificates, authority = people
    alice = certify([xmpp_addr("alice@example.org")], issuer=authority)
    client = bearing(tmp_path, alice)
    client.maximum_version = version
    with connected(certificates.context("example.org"), client, "example.org") as (server, _):
        assert xmppd.peer_addresses(server.getpeercert(True) or b"") == [JID("alice", "example.org", "")]


def test_a_client_may_come_without_a_certificate(people: Any) -> None:
    with connected(people[0].context("example.org"), trusting(None), "example.org") as (server, _):
        assert xmppd.peer_addresses(server.getpeercert(True) or b"") == []


def test_only_the_configured_authority_counts(people: Any, tmp_path: Path) -> None:
    """RFC6120-5.4.3.1-3, RFC6120-13.6-1"""
    forged = certify([xmpp_addr("alice@example.org")], common_name="people")
    client = bearing(tmp_path, forged)
    with (
        pytest.raises((ssl.SSLError, ConnectionError)),
        connected(people[0].context("example.org"), client, "example.org") as (_, ours),
    ):
        ours.recv(1)  # in TLS 1.3 the client hears of it after its own handshake


@pytest.mark.parametrize("protocol", ["xmpp-client", "http/1.1"])
def test_nobody_is_asked_for_a_certificate_without_need(people: Any, own: Certificates, protocol: str) -> None:
    assert own.context("example.org", protocol).verify_mode == ssl.CERT_NONE
    expected = ssl.CERT_OPTIONAL if protocol == "xmpp-client" else ssl.CERT_NONE
    assert people[0].context("example.org", protocol).verify_mode == expected


def test_an_unreadable_client_ca_is_one_line(tmp_path: Path) -> None:
    own = write_pair(tmp_path, certify(dns("example.org")))
    for content in (None, "nothing"):
        path = tmp_path / "people.pem"
        if content:
            path.write_text(content)
        with pytest.raises(ConfigError, match=r"people\.pem: expected a CA for clients"):
            Certificates(configured(tmp_path, own, client_ca=path))


# -- whom a certificate speaks for


def covering(*names: x509.GeneralName, common_name: str = "somebody") -> xmppd.Certificate:
    return read_certificate(der(certify(list(names), common_name=common_name)[0]))


@pytest.mark.parametrize(
    ("presented", "domain", "covers"),
    [
        ("example.org", "example.org", True),
        ("EXAMPLE.org", "example.ORG", True),
        ("example.org", "www.example.org", False),
        ("*.example.org", "chat.example.org", True),
        ("*.example.org", "example.org", False),
        ("*.example.org", "a.b.example.org", False),
        ("c*.example.org", "chat.example.org", False),
        ("*at.example.org", "chat.example.org", False),
        ("chat.*.org", "chat.example.org", False),
        ("*.*.org", "chat.example.org", False),
        ("*", "localhost", False),
        ("*.0.0.1", "127.0.0.1", False),
        ("xn--bcher-kva.example", "bücher.example", True),
        ("*.xn--bcher-kva.example", "chat.bücher.example", True),
        ("example.org", "", False),
        ("example.org", "not a name", False),
    ],
)
def test_names_match_label_by_label(presented: str, domain: str, covers: bool) -> None:
    """RFC6120-13.7.1.2.1-1"""
    assert covering(x509.DNSName(presented)).covers(domain) is covers


def test_service_names_count_for_their_service_only() -> None:
    """RFC6120-13.7.1.2.1-1"""
    certificate = covering(srv_name("_xmpp-server.example.org"), srv_name("_XMPP-client.chat.example.org"))
    assert certificate.covers("example.org", "xmpp-server") and not certificate.covers("example.org", "xmpp-client")
    assert certificate.covers("chat.example.org", "xmpp-client")
    assert not certificate.covers("chat.example.org", "xmpp-server")


def test_old_xmpp_addresses_of_domains_count() -> None:
    """RFC6120-13.7.1.2.1-1"""
    certificate = covering(xmpp_addr("Example.org"), xmpp_addr("alice@example.com"), xmpp_addr("example.net/x"))
    assert certificate.covers("example.org")
    assert not certificate.covers("example.com") and not certificate.covers("example.net")


def test_addresses_match_by_their_octets() -> None:
    certificate = covering(
        x509.IPAddress(ipaddress.ip_address("192.0.2.1")), x509.IPAddress(ipaddress.ip_address("2001:db8::1"))
    )
    assert certificate.covers("192.0.2.1") and certificate.covers("[2001:DB8:0::1]")
    assert not certificate.covers("192.0.2.2")
    assert not covering(x509.DNSName("192.0.2.1")).covers("192.0.2.1")


def test_the_common_name_is_never_looked_at() -> None:
    """S72"""
    for common_name in ("example.org", "CN=example.org,", "x\nexample.org", 'OU="CN=example.org,"'):
        assert not covering(common_name=common_name).covers("example.org")
        assert not covering(x509.DNSName("other.example"), common_name=common_name).covers("example.org")


def test_a_nul_in_a_name_hides_nothing() -> None:
    certificate = covering(x509.DNSName("example.org\0.evil.example"))
    assert not certificate.covers("example.org")


def test_addresses_of_people_are_prepared_and_listed_once() -> None:
    """RFC6120-13.7.2.2-1"""
    texts = ("Alice@EXAMPLE.org", "alice@example.org", "bob@example.org", "@", "a@b@c", "ü@bücher.example")
    certificate = certify([*dns("example.org"), srv_name("_xmpp-client.example.org"), *map(xmpp_addr, texts)])[0]
    assert xmppd.peer_addresses(der(certificate)) == [
        JID("alice", "example.org", ""),
        JID("bob", "example.org", ""),
        JID("ü", "bücher.example", ""),
    ]


def test_an_address_of_another_type_is_no_address() -> None:
    wrong = other_name("1.3.6.1.5.5.7.8.5", "alice@example.org", 0x16)
    assert xmppd.peer_addresses(der(certify([wrong])[0])) == []
    other = other_name("1.3.6.1.4.1.311.20.2.3", "alice@example.org")  # Microsoft's user principal name
    assert xmppd.peer_addresses(der(certify([other])[0])) == []


# -- DER


def test_every_field_is_read() -> None:
    certificate, _ = certify([*dns("a.example", "b.example"), xmpp_addr("alice@a.example"), srv_name("_x.a.example")])
    read = read_certificate(der(certificate))
    assert read.dns_names == ("a.example", "b.example")
    assert read.xmpp_addresses == ("alice@a.example",) and read.srv_names == ("_x.a.example",)
    assert read.not_before == certificate.not_valid_before_utc
    assert read.not_after == certificate.not_valid_after_utc


def test_dates_beyond_2049_are_read() -> None:
    certificate, _ = certify([], days=(-1, 20000))
    assert read_certificate(der(certificate)).not_after == certificate.not_valid_after_utc


@pytest.mark.parametrize(
    "data",
    [
        "30",
        "3080",  # indefinite length is BER
        "30800000",
        "308101",  # cut
        "30810100",  # a short length in long form
        "30817f" + "00" * 0x7F,
        "3082000100",
        "308200ff" + "00" * 0xFF,
        "308400000080" + "00" * 0x80,
        "308401000000" + "00" * 0x80,  # longer than any certificate
        "1f0100",  # a tag of several octets
        "3003020100ff",
        "30030201",
    ],
)
def test_what_is_not_strict_der_is_refused(data: str) -> None:
    with pytest.raises(ValueError):
        xmppd.der_items(bytes.fromhex(data))


@pytest.mark.parametrize("length", [0, 1, 0x7F, 0x80, 0xFF, 0x100, 0x10000])
def test_lengths_in_their_shortest_form_are_read(length: int) -> None:
    assert xmppd.der_items(tlv(4, bytes(length)) * 2) == [xmppd.DERItem(4, bytes(length))] * 2


def tlv(tag: int, content: bytes) -> bytes:
    """Return an item of DER."""
    size = len(content)
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag]) + (bytes([size]) if size < 0x80 else bytes([0x80 + len(octets)]) + octets) + content


def test_a_second_subject_alt_name_is_refused() -> None:
    """RFC 5280 §4.2: which of them would be meant?"""
    value = tlv(0x04, tlv(0x30, tlv(0x82, b"example.org")))
    extension = tlv(0x30, tlv(0x06, bytes.fromhex("551d11")) + value)
    critical = tlv(0x30, tlv(0x06, bytes.fromhex("551d11")) + tlv(0x01, b"\xff") + value)
    names = [xmppd.DERItem(0x82, b"example.org")]
    for one in (extension, critical):
        assert xmppd.find_extension(xmppd.der_items(tlv(0xA3, tlv(0x30, one))), xmppd.OID_SUBJECT_ALT_NAME) == names
    with pytest.raises(ValueError, match="two extensions"):
        xmppd.find_extension(xmppd.der_items(tlv(0xA3, tlv(0x30, extension + critical))), xmppd.OID_SUBJECT_ALT_NAME)


@pytest.mark.parametrize(
    ("content", "text"), [("550411", "2.5.4.17"), ("883703", "2.999.3"), ("2b06", "1.3.6"), ("27", "0.39")]
)
def test_object_identifiers_are_read(content: str, text: str) -> None:
    assert xmppd.der_oid(xmppd.DERItem(0x06, bytes.fromhex(content))) == text


@pytest.mark.parametrize("content", ["", "80", "2b86"])
def test_unfinished_object_identifiers_are_refused(content: str) -> None:
    with pytest.raises(ValueError):
        xmppd.der_oid(xmppd.DERItem(0x06, bytes.fromhex(content)))


SAMPLE = der(certify([*dns("example.org"), xmpp_addr("alice@example.org"), srv_name("_xmpp-client.example.org")])[0])


@given(st.binary(max_size=300))
def test_any_bytes_are_a_certificate_or_a_value_error(data: bytes) -> None:
    assert xmppd.peer_addresses(data) == []


@given(st.integers(0, len(SAMPLE) - 1), st.binary(min_size=1, max_size=4))
def test_a_damaged_certificate_is_read_or_a_value_error(at: int, patch: bytes) -> None:
    damaged = SAMPLE[:at] + patch + SAMPLE[at + len(patch) :]
    try:
        read = read_certificate(damaged)
    except ValueError:
        return
    assert read.der == damaged and isinstance(read.addresses(), list)
    read.covers("example.org")


@given(st.integers(0, len(SAMPLE) - 1))
def test_a_cut_certificate_is_refused(length: int) -> None:
    with pytest.raises(ValueError):
        read_certificate(SAMPLE[:length])


@given(st.text(max_size=40), st.text(max_size=40))
def test_names_of_any_text_are_compared_without_an_accident(presented: str, domain: str) -> None:
    read = dataclasses.replace(
        read_certificate(SAMPLE), dns_names=(presented,), srv_names=(f"_xmpp-client.{presented}",)
    )
    assert read.covers(domain) in (True, False)
