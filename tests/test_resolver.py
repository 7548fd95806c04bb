"""Chapter 23: where the server of a domain is (RFC 6120 §3.2, RFC 2782, XEP-0368)."""

from __future__ import annotations

import logging
import socket
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xmppd
from tests.names import NameServer
from tests.servers import Clock
from xmppd import Config, Lookup, Loop, Resolver, ServiceRecord, Target, srv_order

PATIENCE = 30.0  # seconds

ZONE = """
_xmpp-server._tcp.example.net.    300 IN SRV 20 0 5269 spare.example.net.
_xmpp-server._tcp.example.net.    300 IN SRV 10 5 5270 xmpp.example.net.
_xmpps-server._tcp.example.net.   300 IN SRV 15 0 443  xmpp.example.net.
_xmpp-client._tcp.example.net.    300 IN SRV 10 5 5222 xmpp.example.net.
xmpp.example.net.                 300 IN A    127.0.0.3
xmpp.example.net.                 300 IN A    127.0.0.4
xmpp.example.net.                 300 IN AAAA ::1
spare.example.net.                300 IN A    127.0.0.5

_xmpp-server._tcp.closed.example. 300 IN SRV 0 0 0 .
closed.example.                   300 IN A 127.0.0.6

_xmpps-server._tcp.plain.example. 300 IN SRV 0 0 0 .
_xmpp-server._tcp.plain.example.  300 IN SRV 0 0 5269 plain.example.
plain.example.                    300 IN A 127.0.0.7

_xmpp-server._tcp.lost.example.   300 IN SRV 0 0 5269 nowhere.lost.example.
lost.example.                     300 IN A 127.0.0.8

bare.example.                     300 IN A 127.0.0.9
xn--bcher-kva.example.            300 IN A 127.0.0.10
"""


@pytest.fixture
def names():
    with NameServer(ZONE) as names:
        yield names


class Asker:
    """A loop with a resolver that asks the tests' name server."""

    def __init__(self, names: NameServer, **settings: object) -> None:
        self.clock = Clock()
        self.loop = Loop(self.clock)
        address = xmppd.parse_listen_address(names.address)
        self.resolver = Resolver(Config(federation_nameservers=(address,), **settings), self.loop)
        self.came: list[tuple[str, list[Target]]] = []

    def asks(self, *domains: str) -> list[list[Target]]:
        """Return what is found for the domains, asked for all at once."""
        self.came.clear()
        for domain in domains:
            self.resolver.look_up(domain, lambda targets, domain=domain: self.came.append((domain, targets)))
        assert not self.came, "answers come in a later turn"
        until = xmppd.time.monotonic() + PATIENCE
        while len(self.came) < len(domains) and xmppd.time.monotonic() < until:
            self.loop.turn(0.1)
        return [targets for domain in domains for found, targets in self.came if found == domain]


@pytest.fixture
def asker(names):
    asker = Asker(names)
    yield asker
    asker.loop.close()


def test_servers_come_by_priority_with_all_their_addresses(asker, names):
    """RFC6120-3.2.1-1, XEP-0368 §3: both kinds of records are one set"""
    [targets] = asker.asks("example.net")
    # addresses of one kind come in any order: name servers shuffle them
    assert [target._replace(addresses=(target.addresses[0], *sorted(target.addresses[1:]))) for target in targets] == [
        Target("xmpp.example.net", 5270, False, ("::1", "127.0.0.3", "127.0.0.4")),
        Target("xmpp.example.net", 443, True, ("::1", "127.0.0.3", "127.0.0.4")),
        Target("spare.example.net", 5269, False, ("127.0.0.5",)),
    ]
    assert ("_xmpp-server._tcp.example.net", "SRV") in names.asked
    assert names.asked.count(("xmpp.example.net", "A")) == 1


def test_a_dot_means_no_service_whatever_address_the_domain_has(asker, names):
    """RFC6120-3.2.1-2"""
    assert asker.asks("closed.example") == [[]]
    assert ("closed.example", "A") not in names.asked


def test_a_dot_for_direct_tls_leaves_starttls(asker):
    """XEP-0368 §5"""
    assert asker.asks("plain.example") == [[Target("plain.example", 5269, False, ("127.0.0.7",))]]


def test_records_that_lead_nowhere_are_no_reason_to_guess(asker, names):
    """RFC6120-3.2.1-3"""
    assert asker.asks("lost.example") == [[]]
    assert ("lost.example", "A") not in names.asked


def test_without_records_it_is_the_domain_itself(asker):
    """RFC6120-3.2.2-1"""
    assert asker.asks("bare.example") == [[Target("bare.example", 5269, False, ("127.0.0.9",))]]


def test_a_domain_in_other_letters_is_asked_for_in_ascii(asker):
    assert asker.asks("bücher.example") == [[Target("xn--bcher-kva.example", 5269, False, ("127.0.0.10",))]]


def test_a_domain_that_does_not_exist_has_no_servers(asker):
    assert asker.asks("nobody.example") == [[]]


@pytest.mark.parametrize("domain, address", [("127.0.0.11", "127.0.0.11"), ("[::1]", "::1")])
def test_an_address_needs_no_questions(asker, names, domain, address):
    [[target]] = asker.asks(domain)
    assert (target.port, target.addresses) == (5269, (address,))
    assert not names.asked


def test_a_route_is_taken_instead_of_questions(names):
    """RFC 6120 §3.2.3"""
    routes = {"example.net": ("127.0.0.20", 5299), "other.example": ("bare.example", 5298)}
    asker = Asker(names, federation_routes=routes)
    assert asker.asks("example.net", "other.example") == [
        [Target("127.0.0.20", 5299, False, ("127.0.0.20",))],
        [Target("bare.example", 5298, False, ("127.0.0.9",))],
    ]
    assert {name for name, _kind in names.asked} == {"bare.example"}
    asker.loop.close()


def test_who_asks_at_the_same_time_shares_the_questions(asker, names):
    assert asker.asks(*["bare.example"] * 3)[:3] == [[Target("bare.example", 5269, False, ("127.0.0.9",))]] * 3
    assert len(names.asked) == 4  # two services, two kinds of addresses


def test_answers_are_remembered_as_long_as_dns_allows(asker, names):
    asker.asks("example.net")
    names.asked.clear()
    asker.clock.skip(299)
    assert len(asker.asks("example.net")[0]) == 3
    assert not names.asked
    asker.clock.skip(2)
    asker.asks("example.net")
    assert names.asked


def test_the_memory_is_bounded(asker, names, monkeypatch):
    monkeypatch.setattr(xmppd, "MAX_LOOKUPS", 2)
    asker.asks("example.net")
    asker.asks("bare.example")
    asker.asks("plain.example")
    names.asked.clear()
    asker.asks("bare.example", "plain.example")
    assert not names.asked
    asker.asks("example.net")
    assert names.asked


def test_a_name_server_that_fails_leaves_the_fallback_for_a_short_while(asker, names):
    """RFC 6120 §3.2.1, step 9"""
    names.broken = {"_xmpp-server._tcp.bare.example", "_xmpps-server._tcp.bare.example"}
    assert asker.asks("bare.example") == [[Target("bare.example", 5269, False, ("127.0.0.9",))]]
    names.asked.clear()
    asker.clock.skip(xmppd.FAILED_LOOKUP_LIFE + 1)
    asker.asks("bare.example")
    assert names.asked


def test_a_name_server_that_is_silent_is_not_waited_for_for_ever(asker, names, monkeypatch):
    monkeypatch.setattr(xmppd, "LOOKUP_TIMEOUT", 0.5)
    names.silent = {"_xmpp-server._tcp.bare.example", "_xmpps-server._tcp.bare.example", "bare.example"}
    done: list[str] = []
    asker.loop.offload(lambda: "a login", then=done.append)  # look-ups hold up no other work
    assert asker.asks("bare.example") == [[]]
    assert done == ["a login"]


def test_a_bug_in_a_look_up_answers_all_the_same(asker, monkeypatch, caplog):
    monkeypatch.setattr(Lookup, "find", lambda self: 1 / 0)
    assert asker.asks("example.net") == [[]]
    assert "unexpected error in a look-up" in caplog.text


def test_without_dnspython_there_is_the_fallback_said_once(names, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "dns", None)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_words, **_more: [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),
    ])  # fmt: skip
    caplog.set_level(logging.WARNING)
    asker = Asker(names)
    assert asker.asks("example.net") == [[Target("example.net", 5269, False, ("192.0.2.1",))]]
    asker.asks("example.com")
    assert [record.message for record in caplog.records if "dnspython" in record.message] == [
        "other servers are looked for only at their domain's own address, port 5269, since the Python package "
        "dnspython is missing; get it with: python3 -m pip install dnspython"
    ]
    asker.loop.close()


def test_without_name_servers_of_our_own_the_system_knows_addresses(monkeypatch):
    """Names of /etc/hosts, of mDNS: what DNS doesn't have."""
    monkeypatch.setattr(Lookup, "_ask", lambda self, name, kind: [])
    found = Lookup("localhost").find()
    assert found.is_guess and "127.0.0.1" in found.addresses["localhost"]


@pytest.mark.parametrize("label", ["a" * 63 + ".example", ".".join(["a" * 60] * 4)])
def test_names_that_are_too_long_for_srv_are_no_problem(names, label):
    lookup = Lookup(label, nameservers=[xmppd.parse_listen_address(names.address)])
    assert lookup.find().targets() == []


def test_clients_have_records_of_their_own(names):
    lookup = Lookup("example.net", "xmpp-client", nameservers=[xmppd.parse_listen_address(names.address)])
    assert [(target.host, target.port) for target in lookup.find().targets()] == [("xmpp.example.net", 5222)]


# -- RFC 2782


def record(priority: int, weight: int, host: str) -> ServiceRecord:
    return ServiceRecord(priority, weight, host, 5269)


@given(st.lists(st.builds(record, st.integers(0, 3), st.integers(0, 65535), st.text("abc", min_size=1)), max_size=8))
def test_every_record_comes_once_in_the_order_of_priorities(records):
    ordered = srv_order(records)
    assert sorted(ordered) == sorted(records)
    assert [each.priority for each in ordered] == sorted(each.priority for each in records)


def test_the_first_is_drawn_in_proportion_to_the_weights():
    """RFC 2782: running sums, the first that is greater than or equal to the number drawn; 0 in front"""
    records = [record(0, 30, "c"), record(0, 0, "a"), record(0, 10, "b")]
    firsts = Counter(srv_order(records, lambda n, mark=mark: min(mark, n - 1))[0].host for mark in range(41))
    assert firsts == {"a": 1, "b": 10, "c": 30}


