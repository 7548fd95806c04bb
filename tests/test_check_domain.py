"""Chapter 27: `xmppd check DOMAIN` explains what others see of a domain, each failure with its remedy."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import xmppd
from tests.names import NameServer
from tests.servers import ProcessServer

CLIENTS = """
_xmpp-client._tcp.{domain}. 300 IN SRV 5 1 {port} xmpp.{domain}.
_xmpps-client._tcp.{domain}. 300 IN SRV 6 1 {tls} xmpp.{domain}.
xmpp.{domain}. 300 IN A 127.0.0.1
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessServer]:
    server = ProcessServer(tmp_path_factory.mktemp("checked"), {})
    server.start()
    yield server
    server.stop()


class Look:
    """Looks at a domain by a name server of its own, and keeps what was found."""

    def __init__(self, names: NameServer, folder: Path) -> None:
        self.names = names
        self.config = folder / "check.toml"
        self.config.write_text(f'hosts = ["example.org"]\n[federation]\nnameservers = ["{names.address}"]\n')
        self.data = folder

    def at(self, domain: str, service: str = "xmpp-client") -> list[str]:
        """Return the findings about one service, without its name; problems with `!` in front."""
        options = Namespace(config=self.config, data=self.data, domain=domain)
        found = [(text.partition(": "), remedy) for text, remedy in xmppd.check_domain(options)]
        return [f"! {text} -> {remedy}" if remedy else text for (name, _, text), remedy in found if name == service]


@pytest.fixture
def look(tmp_path: Path) -> Iterator[Look]:
    with NameServer("") as names:
        yield Look(names, tmp_path)


@pytest.fixture
def trusted(running: ProcessServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine knows the server's authority."""
    monkeypatch.setenv("SSL_CERT_FILE", str(running.authority))


def clients_of(domain: str, running: ProcessServer) -> str:
    return CLIENTS.format(domain=domain, port=running.ports["client"], tls=running.ports["client_tls"])


def test_a_healthy_service_is_told_step_by_step(look, running, trusted):
    look.names.add(clients_of("example.org", running))
    port, tls = running.ports["client"], running.ports["client_tls"]
    found = look.at("example.org")
    assert found[:2] == [
        f"xmpp.example.org port {port}, STARTTLS: 127.0.0.1",
        f"xmpp.example.org port {tls}, TLS from the first byte: 127.0.0.1",
    ]
    for each in (port, tls):
        about = [line.removeprefix(f"127.0.0.1 port {each}: ") for line in found if f"port {each}: " in line]
        names, valid, offers, issuer = about
        assert names.startswith("its certificate is for ") and "example.org" in names and "not for" not in names
        assert valid.startswith("it is valid until 20")
        assert offers.startswith("it offers SCRAM-SHA-256") and "PLAIN" in offers
        assert issuer == "its certificate is from an authority that this machine knows"
    assert not [line for line in found if line.startswith("!")]


def test_an_unknown_authority_is_told_with_what_others_will_do(look, running):
    look.names.add(clients_of("example.org", running))
    [problem, _direct] = [line for line in look.at("example.org") if line.startswith("!")]
    assert "its certificate doesn't verify: " in problem
    assert "clients have to import its authority, and servers must do with dialback" in problem


def test_a_domain_that_the_server_does_not_know(look, running, trusted):
    """Its certificate, seen by direct TLS, is another's; and it says host-unknown."""
    look.names.add(clients_of("example.com", running))
    found = look.at("example.com")
    port, tls = running.ports["client"], running.ports["client_tls"]
    assert f"! 127.0.0.1 port {port}: it does not serve example.com (host-unknown) -> add it to that server's hosts" in found
    [wrong] = [line for line in found if line.startswith(f"! 127.0.0.1 port {tls}: its certificate is for ")]
    assert "and not for example.com -> get a certificate for example.com" in wrong


def test_an_expired_certificate(look, running, trusted, monkeypatch):
    class NextCentury(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=36500)

    look.names.add(clients_of("example.org", running))
    monkeypatch.setattr(xmppd, "datetime", NextCentury)
    found = look.at("example.org")
    assert [line for line in found if "it has expired on 20" in line and line.endswith("have that server read it again")]
    assert NextCentury.now(UTC) > datetime.now(UTC)


def test_without_records_it_is_the_domain_and_the_port_of_the_standard(look):
    """RFC6120-3.2.2-1"""
    assert look.at("example.net", "xmpp-server") == [
        "no SRV records _xmpp-server._tcp.example.net, so its own address and port 5269",
        "! example.net port 5269, STARTTLS: has no address -> add an A or AAAA record for example.net",
    ]


def test_a_service_that_dns_denies(look):
    """RFC6120-3.2.1-2"""
    look.names.add("_xmpp-server._tcp.example.net. 300 IN SRV 0 0 0 .")
    assert look.at("example.net", "xmpp-server") == [
        "! DNS says: no such service -> remove the record _xmpp-server._tcp.example.net whose target is '.'"
    ]


def test_a_name_server_that_does_not_know(look):
    look.names.broken = {"_xmpp-client._tcp.example.net"}
    assert [line for line in look.at("example.net") if line.endswith("does the name server answer, and know this domain?")]


def test_a_port_where_nobody_listens(look):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    look.names.add(f"_xmpp-client._tcp.example.net. 300 IN SRV 0 0 {port} example.net.\nexample.net. 300 IN A 127.0.0.1")
    [_record, problem] = look.at("example.net")
    assert problem == (
        f"! 127.0.0.1 port {port}: can't be reached (Connection refused) -> is the server running, "
        f"does the firewall let port {port} in, does the router forward it?"
    )


HEADER = "<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>"


@pytest.mark.parametrize(
    "says, finding",
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it does not speak XMPP -> is another program listening on this port?"),
        (b"", "it hangs up without a word -> look into that server's log"),
        (f"{HEADER}<stream:features/>".encode(), "it offers no STARTTLS -> give that server a certificate, and switch TLS on"),
        (
            f"{HEADER}<stream:error><policy-violation xmlns='urn:ietf:params:xml:ns:xmpp-streams'/></stream:error>".encode(),
            "it ends the stream with policy-violation -> look into that server's log",
        ),
        (f"{HEADER}<message/>".encode(), "it does not follow RFC 6120 -> is it an XMPP server of this century?"),
    ],
)
def test_something_else_at_that_port(look, says, finding):
    with listening(says) as port:
        look.names.add(f"_xmpp-client._tcp.example.net. 300 IN SRV 0 0 {port} example.net.\nexample.net. 300 IN A 127.0.0.1")
        assert look.at("example.net")[1:] == [f"! 127.0.0.1 port {port}: {finding}"]


class listening:  # used like a function
    """A program that says something to one connection, whatever it hears, and hangs up."""

    def __init__(self, says: bytes) -> None:
        self.says = says
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self._serve)

    def __enter__(self) -> int:
        self.thread.start()
        port: int = self.socket.getsockname()[1]
        return port

    def __exit__(self, *_error: object) -> None:
        self.thread.join()
        self.socket.close()

    def _serve(self) -> None:
        peer, _address = self.socket.accept()
        with peer:
            peer.recv(4096)
            peer.sendall(self.says)


def test_without_dnspython_it_says_so(look, monkeypatch):
    monkeypatch.setitem(sys.modules, "dns", None)
    options = Namespace(config=look.config, data=look.data, domain="no-such-name.invalid")
    first, *_more = xmppd.check_domain(options)
    assert first == ("SRV records can't be looked up", "python3 -m pip install dnspython")


def test_the_exit_status_is_0_only_if_all_is_well(look, running, trusted):
    """The outer interface (DESIGN §9), by the command itself."""
    look.names.add(clients_of("example.org", running))

    def status(domain: str) -> tuple[int, str]:
        command = [sys.executable, str(xmppd.__file__), "--config", str(look.config), "--data", str(look.data), "check", domain]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = status("example.org")
    assert code == 1 and "problem: xmpp-server: " in said and said.endswith("1 problem\n"), said
    code, said = status("a b")
    assert (code, said) == (1, """xmppd: expected a domain such as "example.org", found 'a b'\n""")
