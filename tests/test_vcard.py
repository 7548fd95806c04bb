"""vcard-temp (XEP-0054): one card per account, for everybody to read."""

from __future__ import annotations

import base64
import xml.etree.ElementTree as ET

import pytest

from tests.dialogue import DISCO_INFO, Client
from tests.servers import MemoryServer, ProcessServer

JULIET = "juliet@example.org"
CARD = """<vCard xmlns='vcard-temp'>
    <FN>Peter Saint-Andre</FN>
    <N><FAMILY>Saint-Andre</FAMILY><GIVEN>Peter</GIVEN><MIDDLE/></N>
    <NICKNAME>stpeter</NICKNAME>
    <URL>http://www.xmpp.org/xsf/people/stpeter.shtml</URL>
    <BDAY>1966-08-06</BDAY>
    <ORG><ORGNAME>XMPP Standards Foundation</ORGNAME><ORGUNIT/></ORG>
    <TEL><WORK/><VOICE/><NUMBER>303-308-3282</NUMBER></TEL>
    <TEL><WORK/><FAX/><NUMBER/></TEL>
    <ADR><WORK/><EXTADD>Suite 600</EXTADD><STREET>1899 Wynkoop Street</STREET><CTRY>USA</CTRY></ADR>
    <EMAIL><INTERNET/><PREF/><USERID>stpeter@jabber.org</USERID></EMAIL>
    <DESC>
      More information about me is located on my
      personal website: http://www.saint-andre.com/
    </DESC>
  </vCard>"""
NONE = "<iq type='error' id='v'><error type='cancel'><service-unavailable .../></error></iq>"


def get(to: str = "") -> str:
    address = f" to='{to}'" if to else ""
    return f"<iq type='get' id='v'{address}><vCard xmlns='vcard-temp'/></iq>"


def keeps(client: Client, card: str = CARD, to: str = "") -> None:
    """Store a card."""
    address = f" to='{to}'" if to else ""
    client.sends_raw(f"<iq type='set' id='s'{address}>{card}</iq>")
    client.receives("<iq type='result' id='s' ...></iq>")


@pytest.mark.parametrize("to", ["", JULIET])
def test_ones_own_card(juliet: Client, to: str) -> None:
    """XEP0054-3.1-1, XEP0054-3.2-1: without a `to`, or to oneself"""
    keeps(juliet, to=to)
    juliet.sends(get(to))
    juliet.receives(f"<iq type='result' id='v'>{CARD}</iq>")


def test_no_card_is_an_empty_one(juliet: Client) -> None:
    """XEP0054-3.1-2"""
    juliet.sends(get())
    juliet.receives("<iq type='result' id='v'><vCard xmlns='vcard-temp'/></iq>")


def test_the_new_card_replaces_the_old_one(juliet: Client) -> None:
    """XEP0054-3.2-1"""
    keeps(juliet)
    keeps(juliet, "<vCard xmlns='vcard-temp'><FN>Juliet</FN></vCard>")
    juliet.sends(get())
    juliet.receives("<iq type='result' id='v'><vCard xmlns='vcard-temp'><FN>Juliet</FN></vCard></iq>")


@pytest.mark.parametrize("to", [JULIET, "ghost@example.org"])
def test_nobody_writes_on_somebody_elses_card(juliet: Client, romeo: Client, to: str) -> None:
    """XEP0054-3.2-2, S29"""
    keeps(juliet)
    romeo.sends(f"<iq type='set' id='v' to='{to}'><vCard xmlns='vcard-temp'><FN>Fool</FN></vCard></iq>")
    romeo.receives("<iq type='error' id='v'><error type='auth'><forbidden .../></error></iq>")
    juliet.sends(get())
    juliet.receives(f"<iq type='result' id='v'>{CARD}</iq>")


@pytest.mark.parametrize("online", [True, False])
def test_the_server_answers_for_everybody(juliet: Client, romeo: Client, online: bool) -> None:
    """XEP0054-3.3-1, XEP0054-3.3-3: a stranger, whether she is there or not"""
    keeps(juliet)
    if online:
        juliet.comes_online()
    else:
        juliet.closes()
    romeo.sends(get(JULIET))
    romeo.receives(f"<iq type='result' id='v' from='{JULIET}'>{CARD}</iq>")


def test_no_card_and_no_account_look_the_same(juliet: Client, romeo: Client) -> None:
    """XEP0054-3.3-2, S29"""
    answers = []
    for who in (JULIET, "ghost@example.org"):
        romeo.sends(get(who))
        answers.append(ET.tostring(romeo.receives(NONE)).decode().replace(who, "somebody"))
    assert answers[0] == answers[1]


def test_a_request_to_a_client_goes_to_that_client(juliet: Client, romeo: Client) -> None:
    """XEP0054-3.3-4"""
    for client in (juliet, romeo):
        client.comes_online()
    juliet.befriends(romeo)
    romeo.sends(get(f"{JULIET}/balcony"))
    juliet.receives("<iq type='get' id='v' from='romeo@example.org/orchard'><vCard xmlns='vcard-temp'/></iq>")
    juliet.sends("<iq type='result' id='v' to='romeo@example.org/orchard'><vCard xmlns='vcard-temp'/></iq>")
    romeo.receives(f"<iq type='result' id='v' from='{JULIET}/balcony'><vCard xmlns='vcard-temp'/></iq>")


@pytest.mark.parametrize("to", ["example.org", JULIET])
def test_it_is_told_by_service_discovery(juliet: Client, to: str) -> None:
    """XEP0054-4-1: of the server and of the account"""
    juliet.sends(f"<iq type='get' id='d' to='{to}'><query xmlns='{DISCO_INFO}'/></iq>")
    info = juliet.receives("<iq type='result' id='d' ...>...</iq>")[0]
    assert "vcard-temp" in {child.get("var") for child in info}


def test_the_server_has_a_card(romeo: Client) -> None:
    """XEP0054-3.3-5"""
    romeo.sends(get("example.org"))
    romeo.receives("<iq type='result' id='v'><vCard xmlns='vcard-temp'><FN>example.org</FN><DESC>*</DESC></vCard></iq>")
    romeo.sends("<iq type='set' id='v' to='example.org'><vCard xmlns='vcard-temp'/></iq>")
    romeo.receives(NONE)


def test_what_nobody_knows_and_pictures_come_back_as_they_were(juliet: Client, romeo: Client) -> None:
    """XEP0054-8-1"""
    lines = base64.encodebytes(bytes(range(256)) * 400).decode()
    photo = f"<PHOTO><TYPE>image/png</TYPE><BINVAL>\n{lines}</BINVAL></PHOTO>"
    card = (
        f"<vCard xmlns='vcard-temp' version='3.0'><FN> O &amp; O </FN><X-MOOD a='1'>x</X-MOOD>{photo}<FN>2</FN>"
        "<sign xmlns='urn:x'><k xmlns:p='urn:p' p:q='1'/></sign></vCard>"
    )
    keeps(juliet, card)
    romeo.sends(get(JULIET))
    romeo.receives(f"<iq type='result' id='v'>{card}</iq>")


@pytest.mark.config(limits={"vcard": 20_000})
def test_too_large_a_card_is_refused_and_the_stream_goes_on(juliet: Client) -> None:
    """XEP0054-3.2-3, S59"""
    keeps(juliet)
    juliet.sends_raw(f"<iq type='set' id='v'><vCard xmlns='vcard-temp'><DESC>{'x' * 20_000}</DESC></vCard></iq>")
    juliet.receives("<iq type='error' id='v'><error type='modify'><not-acceptable .../></error></iq>")
    juliet.sends(get())
    juliet.receives(f"<iq type='result' id='v'>{CARD}</iq>")


def test_a_picture_that_is_none_is_refused(juliet: Client) -> None:
    """XEP-0153 §4.6"""
    juliet.sends("<iq type='set' id='v'><vCard xmlns='vcard-temp'><PHOTO><BINVAL>?</BINVAL></PHOTO></vCard></iq>")
    juliet.receives("<iq type='error' id='v'><error type='modify'><bad-request .../></error></iq>")


def test_the_blocked_see_no_card(juliet: Client, romeo: Client) -> None:
    """S48, XEP-0191 §3"""
    keeps(juliet)
    juliet.sends("<iq type='set' id='b'><block xmlns='urn:xmpp:blocking'><item jid='romeo@example.org'/></block></iq>")
    juliet.receives_anything()
    romeo.sends(get(JULIET))
    romeo.receives(NONE)


def test_the_card_goes_with_the_account(server: MemoryServer, juliet: Client, romeo: Client) -> None:
    keeps(juliet)
    juliet.sends("<iq type='set' id='r'><query xmlns='jabber:iq:register'><remove/></query></iq>")
    juliet.receives("<iq type='result' id='r'/>")
    juliet.receives_stream_error("not-authorized")
    assert juliet.is_closed()
    server.add_account(JULIET)
    romeo.sends(get(JULIET))
    romeo.receives(NONE)


def test_the_card_survives_a_crash(process_server: ProcessServer) -> None:
    """XEP0054-3.1-1: over the wire"""
    juliet = process_server.client().login("juliet")
    keeps(juliet)
    process_server.kill()
    juliet.disconnects()
    process_server.start()
    romeo = process_server.client().login("romeo")
    romeo.sends(get(JULIET))
    romeo.receives(f"<iq type='result' id='v' from='{JULIET}'>{CARD}</iq>")
