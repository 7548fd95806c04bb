"""Calls: external services (XEP-0215) and the built-in STUN responder (RFC 5389)."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xmppd
from tests.elsewhere import Elsewhere
from tests.servers import MemoryServer

EXTDISCO = "urn:xmpp:extdisco:2"
CALLS = {"services": ["stun:stun.example.org", "turn:turn.example.org:3479?transport=udp", "turns:turn.example.org"],
         "secret": "north"}  # fmt: skip
COOKIE = bytes.fromhex("2112A442")
with_services = pytest.mark.config(calls=CALLS)


def credentials_of(service) -> tuple[str, str]:
    """Return name and password, having checked what coturn would check."""
    name, password = service.get("username"), service.get("password")
    assert base64.b64encode(hmac.digest(b"north", name.encode(), "sha1")).decode() == password
    assert abs(int(name.partition(":")[0]) - time.time() - 86400) < 60
    assert xmppd.parse_stamp(service.get("expires")).timestamp() == int(name.partition(":")[0])
    assert "romeo" not in name
    return name, password


@with_services
@pytest.mark.wire
def test_a_client_is_told_where_to_call(server, romeo, juliet) -> None:
    """XEP-0215 §3.1: with credentials for one account and one day."""
    names = set()
    for who in (romeo, juliet):
        who.sends(f"<iq type='get' id='1' to='example.org'><services xmlns='{EXTDISCO}'/></iq>")
        turn = "restricted='1' username='*' password='*' expires='*'"
        services = who.receives(
            f"<iq type='result' id='1'><services xmlns='{EXTDISCO}'>"
            "<service type='stun' host='stun.example.org' port='3478' transport='udp'/>"
            f"<service type='turn' host='turn.example.org' port='3479' transport='udp' {turn}/>"
            f"<service type='turns' host='turn.example.org' port='5349' transport='tcp' {turn}/></services></iq>")[0]
        names.add(credentials_of(services[1])[0].partition(":")[2])
    assert len(names) == 2


@with_services
def test_services_of_one_type(romeo) -> None:
    """XEP-0215 §3.2"""
    romeo.sends(f"<iq type='get' id='1' to='example.org'><services xmlns='{EXTDISCO}' type='stun'/></iq>")
    romeo.receives(f"<iq type='result' id='1'><services xmlns='{EXTDISCO}' type='stun'>"
                   "<service type='stun' host='stun.example.org' port='3478' transport='udp'/></services></iq>")  # fmt: skip


@with_services
def test_credentials_for_a_known_service(romeo) -> None:
    """XEP-0215 §3.3"""
    for wish, answer in (("host='turn.example.org' type='turn'", "<service type='turn' port='3479' ...>"),
                         ("host='turn.example.org' type='turns' port='5349'", "<service type='turns' ...>")):  # fmt: skip
        romeo.sends(f"<iq type='get' id='1' to='example.org'><credentials xmlns='{EXTDISCO}'><service {wish}/></credentials></iq>")
        found = romeo.receives(f"<iq type='result' id='1'><credentials xmlns='{EXTDISCO}'>{answer}</service></credentials></iq>")
        credentials_of(found[0][0])


@with_services
@pytest.mark.parametrize(("wish", "condition"), [
    ("<service host='turn.example.org' type='turn' port='1'/>", "item-not-found"),
    ("<service host='stun.example.org' type='stun'/>", "item-not-found"),
    ("<service host='elsewhere.example' type='turn'/>", "item-not-found"),
    ("<service host='turn.example.org'/>", "bad-request"),
    ("", "bad-request"),
])  # fmt: skip
def test_no_credentials_for_anything_else(romeo, wish: str, condition: str) -> None:
    """XEP-0215 §3.3"""
    romeo.sends(f"<iq type='get' id='1' to='example.org'><credentials xmlns='{EXTDISCO}'>{wish}</credentials></iq>")
    error = romeo.receives("<iq type='error' id='1'>...</iq>").find("{jabber:client}error")
    assert condition in [child.tag.rpartition("}")[2] for child in error]


@with_services
def test_strangers_get_no_credentials(server: MemoryServer, elsewhere: Elsewhere) -> None:
    """XEP-0215 §7: relaying costs bandwidth."""
    elsewhere.says(f"<iq xmlns='jabber:client' type='get' id='1' from='a@example.com/x' to='example.org'>"
                   f"<services xmlns='{EXTDISCO}'/></iq>")  # fmt: skip
    assert "password" not in "".join(map(str, elsewhere.came))


def test_who_has_no_services_advertises_none(romeo) -> None:
    """XEP-0215 §5"""
    romeo.sends(f"<iq type='get' id='1' to='example.org'><services xmlns='{EXTDISCO}'/></iq>")
    romeo.receives("<iq type='error' id='1'><error type='cancel'><service-unavailable .../></error></iq>")


# -- STUN


def request(*attributes: bytes, kind: bytes = b"\x00\x01", cookie: bytes = COOKIE) -> bytes:
    body = b"".join(attributes)
    return kind + len(body).to_bytes(2, "big") + cookie + bytes(range(12)) + body


def mapped(answer: bytes, question: bytes) -> tuple[str, int]:
    """Return the address in a Binding success response (RFC 5389 §15.2)."""
    assert answer[:2] == b"\x01\x01" and answer[4:20] == question[4:20] and len(answer) == 20 + answer[3]
    assert answer[20:22] == b"\x00\x20"
    port = int.from_bytes(answer[26:28], "big") ^ 0x2112
    packed = bytes(a ^ b for a, b in zip(answer[28:], question[4:20], strict=False))
    assert answer[25] == (1 if len(packed) == 4 else 2)
    return str(ipaddress.ip_address(packed)), port


@pytest.mark.parametrize(("host", "size"), [("192.0.2.1", 32), ("2001:db8:1234:5678:11:2233:4455:6677", 44)])
def test_who_asks_learns_their_address(host: str, size: int) -> None:
    """RFC 5389 §7.3.1, §15.2; and the answer is hardly longer than the question."""
    question = request()
    answer = xmppd.stun_answer(question, host, 32853)
    assert mapped(answer, question) == (host, 32853)
    assert len(answer) == size


def test_the_example_of_rfc_5769() -> None:
    """RFC 5769 §2.2, without the attributes that we leave out: the address is masked as there."""
    question = bytes.fromhex("000100002112a442b7e7a701bc34d686fa87dfae")
    answer = xmppd.stun_answer(question, "192.0.2.1", 32853)
    assert answer.endswith(bytes.fromhex("002000080001a147e112a643"))


def test_what_must_be_understood_and_is_not_is_named() -> None:
    """RFC 5389 §7.3.1: 420 with UNKNOWN-ATTRIBUTES; optional ones and those of authentication don't matter."""
    question = request(b"\x7f\x00\x00\x01x\0\0\0")
    answer = xmppd.stun_answer(question, "192.0.2.1", 1)
    assert answer[:2] == b"\x01\x11" and b"\x00\x09\x00\x04\x00\x00\x04\x14" in answer and b"\x7f\x00" in answer[28:]
    for fine in (b"\x80\x22\x00\x02ab\0\0", b"\x00\x06\x00\x04abcd"):
        question = request(fine)
        assert mapped(xmppd.stun_answer(question, "192.0.2.1", 1), question)


@pytest.mark.parametrize("data", [
    b"", b"GET / HTTP/1.1\r\n\r\n", request()[:-1], request() + b"xxxx", request(kind=b"\x01\x01"),
    request(kind=b"\x00\x03"), request(cookie=b"1234"), request(b"\x00\x06\x00\xff"), request(b"\x00\x06"),
])  # fmt: skip
def test_nothing_else_is_answered(data: bytes) -> None:
    """RFC 5389 §7.3: an answer to an answer would make two servers talk for ever."""
    assert xmppd.stun_answer(data, "192.0.2.1", 1) is None


@given(st.binary(max_size=80))
def test_whatever_comes_is_survived(data: bytes) -> None:
    assert xmppd.stun_answer(data, "192.0.2.1", 1) is None or data[4:8] == COOKIE
    answer = xmppd.stun_answer(request(data), "192.0.2.1", 1)
    assert answer is None or len(answer) <= 20 + len(data) + 16


@pytest.mark.wire
@pytest.mark.config(listen={"client": ["127.0.0.1:0"], "client_tls": ["127.0.0.1:0"], "stun": ["127.0.0.1:0"]})
def test_a_telephone_asks_and_asks(server, romeo) -> None:
    """RFC 5389 §7.3; an address gets so many answers a minute, and the server is still there afterwards."""
    port = server.ports["stun"]
    romeo.sends(f"<iq type='get' id='1' to='example.org'><services xmlns='{EXTDISCO}'/></iq>")
    romeo.receives(f"<iq type='result' id='1'><services xmlns='{EXTDISCO}'>"
                   f"<service type='stun' host='example.org' port='{port}' transport='udp'/></services></iq>")  # fmt: skip
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as telephone:
        telephone.settimeout(15)
        telephone.sendto(b"nonsense", ("127.0.0.1", port))
        question = request()
        telephone.sendto(question, ("127.0.0.1", port))
        assert mapped(telephone.recv(100), question) == ("127.0.0.1", telephone.getsockname()[1])
        for _ in range(100):
            telephone.sendto(question, ("127.0.0.1", port))
        romeo.passes_barrier()
        romeo.passes_barrier()
        telephone.setblocking(False)
        answers = 0
        while True:
            try:
                telephone.recv(100)
            except BlockingIOError:
                break
            answers += 1
        assert 1 <= answers <= 62
