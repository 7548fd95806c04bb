"""Multi-user chat: messages, nicknames, invitations, registration, leaving (XEP-0045 §7.4 to §7.14, §17, §18)."""

from __future__ import annotations

import pytest

import xmppd
from tests.dialogue import Client
from tests.muc import (
    ADDRESSES,
    CONFIG,
    COVEN,
    FORM,
    HOST,
    MUC,
    NO_SUBJECT,
    OCCUPANT,
    SERVICE,
    STANZA_ID,
    USER,
    administering,
    configures,
    coven,
    enter,
    enters,
    forget,
    form,
    gone,
    listed,
    listing,
    person,
    refused,
    result,
    said,
    saying,
    shown,
    status,
    witch,
)
from tests.servers import MemoryServer

pytestmark = pytest.mark.config(**CONFIG)
PING = "<ping xmlns='urn:xmpp:ping'/>"
REGISTER = "jabber:iq:register"


# ---- speaking (§7.4, §17.2) ----------------------------------------------------------------


def test_what_is_said_reaches_everybody(server: MemoryServer) -> None:
    """XEP0045-7.4-1, XEP0045-7.4-2, XEP0045-17.2-3, XEP0045-4.1-1: unknown extensions pass unchanged"""
    witches = coven(server)
    more = "<html xmlns='http://jabber.org/protocol/xhtml-im'><b>O</b></html><origin-id xmlns='urn:xmpp:sid:0' id='o'/>"
    witches.hag.sends(saying("Harpier cries: 'tis time, 'tis time.", more, id="hysf1v37"))
    for client in witches:
        came = client.receives(said("thirdwitch", "Harpier cries: 'tis time, 'tis time.", id="hysf1v37", more=more))
        assert came.get("to") == client.jid


def test_visitors_are_not_heard(server: MemoryServer) -> None:
    """XEP0045-7.4-3"""
    crone, _, hag = coven(server, moderatedroom=True)
    hag.sends(saying("Hear me!", id="m"))
    hag.receives(refused("forbidden", "m", "message"))
    crone.receives_nothing()


@pytest.mark.parametrize("message", [
    f"<message type='groupchat' id='m' to='{COVEN}'><body>O</body></message>",
    f"<message type='chat' id='m' to='{COVEN}/thirdwitch'><body>O</body></message>",
    f"<message id='m' to='{COVEN}'><x xmlns='{USER}'><invite to='romeo@example.org'/></x></message>",
    f"<message id='m' to='{COVEN}'><body>O</body></message>",
])  # fmt: skip
def test_nobody_speaks_from_outside(server: MemoryServer, message: str) -> None:
    """XEP0045-7.4-4, XEP0045-7.5-4, XEP0045-7.8.2-5, XEP0045-17.2-1, S56"""
    _, _, hag = coven(server)
    hecate = witch(server, "hecate")
    hecate.sends(message)
    hecate.receives(refused("not-acceptable", "m", "message"))
    hag.receives_nothing()


def test_a_room_takes_no_other_messages(server: MemoryServer) -> None:
    """XEP0045-17.2-1"""
    hag = coven(server).hag
    hag.sends(f"<message type='chat' id='m' to='{COVEN}'><body>O</body></message>")
    hag.receives(refused("bad-request", "m", "message"))
    hag.sends(f"<message type='chat' id='m' to='{SERVICE}'><body>O</body></message>")
    hag.receives(refused("service-unavailable", "m", "message"))


def test_only_the_room_says_who_and_when(server: MemoryServer) -> None:
    """XEP0045-17.3-3, S56: no delay, no status, no other id, no other occupant's id"""
    crone, wicca, hag = coven(server)
    forged = (f"<delay xmlns='urn:xmpp:delay' from='{COVEN}' stamp='1990-01-01T00:00:00Z'/>"
              f"<x xmlns='{USER}'><status code='301'/></x><occupant-id xmlns='urn:xmpp:occupant-id:0' id='mine'/>"
              f"<stanza-id xmlns='urn:xmpp:sid:0' by='{COVEN.upper()}' id='mine'/>")  # fmt: skip
    foreign = "<stanza-id xmlns='urn:xmpp:sid:0' by='elsewhere.lit' id='theirs'/>"  # XEP-0359 §3: not ours to strip
    hag.sends(saying("O", forged + foreign))
    for client in (crone, wicca, hag):
        message = client.receives(said("thirdwitch", "O", more="").replace(STANZA_ID, foreign + STANZA_ID))
        assert "mine" not in xmppd.serialize(message)
    hag.sends(f"<presence to='{COVEN}/thirdwitch'>{forged}</presence>")
    presence = crone.receives("<presence ...>...</presence>")
    assert [child.tag.rpartition("}")[2] for child in presence] == ["occupant-id", "x"]
    assert "301" not in xmppd.serialize(presence) and "mine" not in xmppd.serialize(presence)
    forget(crone, wicca, hag)


def test_an_owner_brings_the_history_of_another_conversation(server: MemoryServer) -> None:
    """XEP0045-7.2.13-1: §7.9, the room adds no stamp of its own to it"""
    crone, _, _ = coven(server)
    delay = f"<delay xmlns='urn:xmpp:delay' from='{crone.jid}' stamp='2004-09-29T01:54:37Z'/>"
    thread = "<thread>e0ffe42b</thread>"
    crone.sends(saying("Thrice the brinded cat hath mew'd.", thread + delay))
    crone.receives(said("firstwitch", "Thrice *", more=thread + delay))
    forget(*server.cast.clients)
    hecate = witch(server, "hecate")
    hecate.sends(enter("hecate"))
    history = hecate.receives_anything()[4]
    assert [child.get("stamp") for child in history.iter("{urn:xmpp:delay}delay")] == ["2004-09-29T01:54:37Z"]
    forget(*server.cast.clients)


def test_an_occupant_is_the_same_person_under_every_name(server: MemoryServer) -> None:
    """XEP-0421: stable over names and visits, another one in another room, and not to be guessed"""
    crone, _, hag = coven(server)

    def identity() -> str:
        hag.sends(saying("O"))
        found = [stanza.find("{urn:xmpp:occupant-id:0}occupant-id") for stanza in crone.receives_anything()]
        ids = {element.get("id", "") for element in found if element is not None}
        forget(*server.cast.clients)
        assert len(ids) == 1
        return ids.pop()

    first = identity()
    hag.sends(f"<presence to='{COVEN}/oldhag'/>")
    forget(*server.cast.clients)
    assert identity() == first and len(first) <= 128
    hag.sends(f"<presence type='unavailable' to='{COVEN}/oldhag'/>")
    forget(*server.cast.clients)
    enters(hag, "another")
    forget(*server.cast.clients)
    assert identity() == first
    own = enters(hag, "thirdwitch", room=f"heath@{SERVICE}")[0]
    assert own.find("{urn:xmpp:occupant-id:0}occupant-id").get("id") != first  # type: ignore[union-attr]


# ---- private messages (§7.5) -----------------------------------------------------------------


@pytest.mark.parametrize("type", [" type='chat'", ""])
def test_private_messages(server: MemoryServer, type: str) -> None:
    """XEP0045-7.5-1, XEP0045-7.5-5"""
    crone, wicca, hag = coven(server)
    wicca.sends(f"<message{type} id='hgn27af1' to='{COVEN}/firstwitch'><body>I'll give thee a wind.</body></message>")
    crone.receives(f"<message{type} id='hgn27af1' from='{COVEN}/secondwitch'><body>I'll give thee a wind.</body>"
                   f"<x xmlns='{USER}'/>{OCCUPANT}</message>")  # fmt: skip
    hag.receives_nothing()


def test_private_messages_that_cannot_be(server: MemoryServer) -> None:
    """XEP0045-7.5-2, XEP0045-7.5-3"""
    _, wicca, hag = coven(server)
    wicca.sends(f"<message type='groupchat' id='m' to='{COVEN}/thirdwitch'><body>O</body></message>")
    wicca.receives(refused("bad-request", "m", "message"))
    wicca.sends(f"<message type='chat' id='m' to='{COVEN}/nobody'><body>O</body></message>")
    wicca.receives(refused("item-not-found", "m", "message"))
    hag.receives_nothing()


@pytest.mark.parametrize(("who", "allowed"), [("anyone", "vpm"), ("participants", "pm"), ("moderators", "m"), ("none", "")])
def test_who_may_send_private_messages(server: MemoryServer, who: str, allowed: str) -> None:
    """XEP0045-7.5-6, XEP0045-10.2-5"""
    crone, wicca, hag = coven(server, moderatedroom=True, allowpm=who)
    hecate = witch(server, "hecate")
    crone.sends(administering(f"affiliation='member' jid='hecate@{HOST}'"))
    enters(hecate, "hecate")
    forget(*server.cast.clients)
    for role, sender in (("v", hag), ("p", hecate), ("m", wicca)):
        sender.sends(f"<message type='chat' id='m' to='{COVEN}/firstwitch'><body>O</body></message>")
        if role in allowed:
            crone.receives("<message type='chat' ...>...</message>")
        else:
            sender.receives(refused("forbidden", "m", "message"))


# ---- nicknames and availability (§7.6, §7.7) ---------------------------------------------------


def test_changing_the_nickname(server: MemoryServer) -> None:
    """XEP0045-7.6-1, XEP0045-7.6-3: nicknames are not locked here, so a free one is always taken"""
    crone, wicca, hag = coven(server)
    hag.sends(f"<presence id='ifd1c35' to='{COVEN}/oldhag'/>")
    address = ADDRESSES["thirdwitch"]
    for client in (crone, wicca):
        client.receives(shown("thirdwitch", "none", "participant", 303, jid=True, type="unavailable", new="oldhag"),
                        shown("oldhag", jid=address))  # fmt: skip
    hag.receives(shown("thirdwitch", "none", "participant", 110, 303, jid=True, type="unavailable", new="oldhag"),
                 shown("oldhag", "none", "participant", 110, jid=address, id="ifd1c35"))  # fmt: skip
    hag.sends(f"<presence id='case' to='{COVEN}/OldHag'/>")  # one's own may be spelled anew
    assert len(hag.receives_anything()) == 2
    forget(crone, wicca)


def test_a_reserved_nickname_is_kept_for_its_owner(server: MemoryServer) -> None:
    """XEP0045-7.6-2, XEP0045-7.2.8-1, XEP0045-9.3-1, S50"""
    crone, _, hag = coven(server)
    crone.sends(administering(f"affiliation='member' jid='hecate@{HOST}' nick='Hecate'"))
    crone.receives(result())
    for nick in ("Hecate", "hecate", "HECATE\u200b"):
        hag.sends(f"<presence id='ifd1c35' to='{COVEN}/{nick}'/>")
        hag.receives(refused("conflict", "ifd1c35", "presence"))
    crone.receives_nothing()
    hecate = witch(server, "hecate")
    hecate.sends(enter("Hecate"))
    hag.receives(shown("Hecate", "member"))
    forget(*server.cast.clients)


def test_availability_is_shown(server: MemoryServer) -> None:
    """XEP0045-7.7-1, XEP0045-17.3-5, XEP0045-17.2-3"""
    crone, wicca, hag = coven(server)
    content = "<show>xa</show><status>gone where the goblins go</status><c xmlns='urn:x' v='1'/>"
    wicca.sends(f"<presence id='kr7v143h' to='{COVEN}/secondwitch' xml:lang='en'>{content}</presence>")
    lang = {"xml:lang": "en"}
    crone.receives(shown("secondwitch", "admin", "moderator", jid=True, content=content, **lang))
    hag.receives(shown("secondwitch", "admin", "moderator", content=content, **lang))
    wicca.receives(shown("secondwitch", "admin", "moderator", 110, jid=True, content=content, id="kr7v143h", **lang))


def test_presence_has_its_bounds(server: MemoryServer) -> None:
    """S54"""
    crone, _, hag = coven(server)
    hag.sends(f"<presence id='p' to='{COVEN}/thirdwitch'><status>{'x' * 20_000}</status></presence>")
    hag.receives(refused("policy-violation", "p", "presence"))
    crone.receives_nothing()


@pytest.mark.config(**{**CONFIG, "limits": {"room_stanzas_per_minute": 20}})
def test_nobody_floods_rooms(server: MemoryServer) -> None:
    """S54, S55: messages, presence, invitations, changes: all count, for the person, not for the client"""
    crone, wicca, hag = coven(server)
    for number in range(19):  # entering was the first
        hag.sends(saying(str(number)))
    forget(crone, wicca, hag)
    hag.sends(saying("too much", id="m"))
    hag.receives(refused("policy-violation", "m", "message", type="wait"))
    broom = person(server, f"hag66@{HOST}/broom")
    broom.sends(enter("broom"))
    broom.receives(refused("policy-violation", "n13mt3l", "presence", type="wait"))
    wicca.sends(f"<message id='i' to='{COVEN}'><x xmlns='{USER}'><invite to='a@{HOST}'/><invite to='b@{HOST}'/></x></message>")
    wicca.receives(refused("policy-violation", "i", "message", type="wait"))
    crone.sends(administering(*(f"affiliation='outcast' jid='a{number}@{HOST}'" for number in range(30))))
    crone.receives(refused("policy-violation", type="wait"))
    hag.sends(f"<presence type='unavailable' to='{COVEN}/thirdwitch'/>")  # leaving is always possible
    crone.receives(gone("thirdwitch", jid=True))
    server.clock.skip(61)
    enters(hag, "thirdwitch")
    forget(*server.cast.clients)


# ---- invitations (§7.8) ------------------------------------------------------------------------


def invite(to: str, inner: str = "") -> str:
    """Write a mediated invitation."""
    return f"<message id='nzd143v8' to='{COVEN}'><x xmlns='{USER}'><invite to='{to}'>{inner}</invite></x></message>"


def test_invitations_and_declines(server: MemoryServer) -> None:
    """XEP0045-7.8.2-1, XEP0045-7.8.2-4"""
    crone, _, _ = coven(server, passwordprotectedroom=True, roomsecret="cauldronburn")
    hecate = witch(server, "hecate")
    hecate.sends("<presence/>")
    forget(hecate)
    reason = "<reason>Hey Hecate, this is the place for all good witches!</reason>"
    crone.sends(invite(f"hecate@{HOST}", reason + "<continue thread='e0ffe42b'/>"))
    hecate.receives(f"<message id='nzd143v8' from='{COVEN}'><x xmlns='{USER}'><invite from='crone1@{HOST}'>{reason}"
                    "<continue thread='e0ffe42b'/></invite><password>cauldronburn</password></x></message>")  # fmt: skip
    decline = f"<decline to='crone1@{HOST}'><reason>Sorry, I'm too busy right now.</reason></decline>"
    for _ in range(2):  # the second one is of no invitation any more
        hecate.sends(f"<message id='jk2vs61v' to='{COVEN}'><x xmlns='{USER}'>{decline}</x></message>")
    crone.receives(f"<message id='jk2vs61v' from='{COVEN}'><x xmlns='{USER}'><decline from='hecate@{HOST}'>"
                   "<reason>Sorry, I'm too busy right now.</reason></decline></x></message>")  # fmt: skip
    crone.receives_nothing()


def test_direct_invitations_pass_untouched(server: MemoryServer) -> None:
    """XEP-0249 §2"""
    hag, hecate = witch(server, "thirdwitch"), witch(server, "hecate")
    hecate.sends("<presence/>")
    forget(hecate)
    invitation = (f"<x xmlns='jabber:x:conference' continue='true' jid='{COVEN}' password='cauldronburn' "
                  "reason='Hey Hecate!' thread='e0ffe42b'/>")  # fmt: skip
    hag.sends(f"<message to='hecate@{HOST}'>{invitation}</message>")
    hecate.receives(f"<message from='{hag.jid}' to='hecate@{HOST}'>{invitation}</message>")


def test_several_people_are_invited_at_once(server: MemoryServer) -> None:
    """XEP0045-7.8.2-1, S55"""
    crone, _, _ = coven(server)
    hecate, romeo = witch(server, "hecate"), person(server, "romeo@example.org/orchard")
    for client in (hecate, romeo):
        client.sends("<presence/>")
    forget(hecate, romeo)
    people = "".join(f"<invite to='{jid}'/>" for jid in (f"hecate@{HOST}", "romeo@example.org"))
    crone.sends(f"<message to='{COVEN}'><x xmlns='{USER}'>{people}</x></message>")
    for client in (hecate, romeo):
        client.receives(f"<message id='*' from='{COVEN}'><x xmlns='{USER}'><invite from='crone1@{HOST}'/></x></message>")
    many = "".join(f"<invite to='a{number}@{HOST}'/>" for number in range(11))
    crone.sends(f"<message id='m' to='{COVEN}'><x xmlns='{USER}'>{many}</x></message>")
    crone.receives(refused("policy-violation", "m", "message"))


@pytest.mark.parametrize(("jid", "condition"), [
    ("hecate@nowhere.lit", "item-not-found"), ("hecate @x", "jid-malformed"), ("", "bad-request")])  # fmt: skip
def test_invitations_to_nowhere(server: MemoryServer, jid: str, condition: str) -> None:
    """XEP0045-7.8.2-3"""
    crone = coven(server).crone
    crone.sends(invite(jid))
    crone.receives(refused(condition, "nzd143v8", "message"))


def test_an_invitation_does_not_tell_who_has_an_account(server: MemoryServer) -> None:
    """XEP0045-7.8.2-3: of our own accounts nobody learns which exist (RFC 6120 §13.10.2)"""
    crone = coven(server).crone
    crone.sends(invite(f"hecate@{HOST}") + invite(f"nobody-at-all@{HOST}"))
    crone.receives_nothing()


@pytest.mark.parametrize(("fields", "who", "allowed"), [
    ({}, "hag", True), ({"allowinvites": False}, "hag", False), ({"allowinvites": False}, "wicca", True),
    ({"moderatedroom": True}, "hag", False)])  # fmt: skip
def test_who_may_invite(server: MemoryServer, fields: dict[str, object], who: str, allowed: bool) -> None:
    """XEP0045-10.2-5, XEP0045-9.5-3: into an open room it makes nobody a member"""
    witches = coven(server, **fields)
    hecate = witch(server, "hecate")
    hecate.sends("<presence/>")
    forget(hecate)
    inviter: Client = getattr(witches, who)
    inviter.sends(invite(f"hecate@{HOST}"))
    if allowed:
        hecate.receives(f"<message id='nzd143v8' from='{COVEN}'><x xmlns='{USER}'><invite from='*'/></x></message>")
    else:
        inviter.receives(refused("forbidden", "nzd143v8", "message"))
    witches.crone.sends(listing("affiliation='member'"))
    witches.crone.receives(listed())


def test_invitations_into_a_members_only_room(server: MemoryServer) -> None:
    """XEP0045-7.8.2-2, XEP0045-9.5-1"""
    crone, wicca, hag = coven(server, membersonly=True)
    crone.sends(administering(f"affiliation='member' jid='hag66@{HOST}'"))
    hag.sends("<presence/>")
    enters(hag, "thirdwitch")
    forget(crone, wicca, hag)
    hag.sends(invite(f"hecate@{HOST}"))
    hag.receives(refused("forbidden", "nzd143v8", "message"))
    wicca.sends(invite(f"hecate@{HOST}/broom"))
    wicca.sends(listing("affiliation='member'"))
    wicca.receives(listed(f"affiliation='member' jid='hag66@{HOST}'", f"affiliation='member' jid='hecate@{HOST}'"))
    hecate = witch(server, "hecate")
    hecate.sends(enter("hecate"))
    hag.receives(shown("hecate", "member"))
    forget(*server.cast.clients)


def test_outcasts_are_not_invited(server: MemoryServer) -> None:
    """XEP0045-9.1-1"""
    crone, _, hag = coven(server)
    crone.sends(administering(f"affiliation='outcast' jid='hecate@{HOST}'"))
    crone.receives(result())
    hag.sends(invite(f"hecate@{HOST}"))
    hag.receives(refused("not-allowed", "nzd143v8", "message"))


# ---- registration (§7.10, §7.12) ------------------------------------------------------------------


def registering(inner: str = "", type: str = "set", id: str = "nv71va54", room: str = COVEN) -> str:
    """Write a request about one's registration."""
    return f"<iq type='{type}' id='{id}' to='{room}'><query xmlns='{REGISTER}'>{inner}</query></iq>"


def test_registration_makes_a_member_with_a_nickname(server: MemoryServer) -> None:
    """XEP0045-7.10-3, XEP0045-7.10-4, XEP0045-7.12-1, XEP0045-9.9-1: nobody needs to approve it"""
    crone, wicca, hag = coven(server)
    hag.sends(registering(type="get", id="jw81b36f"))
    asked = hag.receives(f"<iq type='result' id='jw81b36f'><query xmlns='{REGISTER}'><x xmlns='{FORM}' type='form'>...</x>"
                         "</query></iq>")  # fmt: skip
    assert asked.find(f".//{{{FORM}}}field[@var='muc#register_roomnick']/{{{FORM}}}required") is not None
    hag.sends(reserved := f"<iq type='get' id='getnick1' to='{COVEN}'>"
              "<query xmlns='http://jabber.org/protocol/disco#info' node='x-roomuser-item'/></iq>")  # fmt: skip
    info = "<iq type='result' id='getnick1'><query xmlns='http://jabber.org/protocol/disco#info' node='x-roomuser-item'>{}</query></iq>"
    hag.receives(info.format(""))
    hag.sends(registering(form("register", roomnick="Hag 66")))
    hag.receives(result("nv71va54"), shown("thirdwitch", "member", "participant", 110, jid=True))
    for client in (crone, wicca):
        client.receives(shown("thirdwitch", "member", jid=True))
    hag.sends(registering(type="get"))
    hag.receives(f"<iq type='result' id='nv71va54'><query xmlns='{REGISTER}'><registered/><username>Hag 66</username>"
                 "</query></iq>")  # fmt: skip
    hag.sends(reserved)
    hag.receives(info.format("<identity category='conference' type='text' name='Hag 66'/>"))
    hag.sends(registering("<remove/>"))
    hag.receives(result("nv71va54"), shown("thirdwitch", "none", "participant", 110, jid=True))
    forget(crone, wicca)


@pytest.mark.parametrize(("inner", "condition"), [
    ("", "bad-request"), ("<username>x</username>", "bad-request"), (f"<x xmlns='{FORM}' type='cancel'/>", "bad-request"),
    (form("register", first="Brunhilde"), "not-acceptable"), (form("register", roomnick="FIRSTWITCH"), "conflict"),
    (form("register", roomnick="Hecate"), "conflict"), (form("register", roomnick="\u200b\u2800"), "not-acceptable"),
])  # fmt: skip
def test_registrations_that_fail(server: MemoryServer, inner: str, condition: str) -> None:
    """XEP0045-7.10-4, S50"""
    crone, _, hag = coven(server)
    crone.sends(administering(f"affiliation='member' jid='hecate@{HOST}' nick='hecate'"))
    crone.receives(result())
    hag.sends(registering(inner))
    hag.receives(refused(condition, "nv71va54"))
    hag.sends(registering(inner, room=f"heath@{SERVICE}"))
    hag.receives(refused("item-not-found", "nv71va54"))


def test_who_may_not_register(server: MemoryServer) -> None:
    """XEP0045-7.10-1, XEP0045-7.10-2"""
    crone, _, _ = coven(server, membersonly=True)
    hag = server.cast.clients[2]
    for type in ("get", "set"):
        hag.sends(registering(form("register", roomnick="x"), type))
        hag.receives(refused("not-allowed", "nv71va54"))
    hag.sends(registering(type="get", room=f"heath@{SERVICE}"))
    hag.receives(refused("item-not-found", "nv71va54"))
    configures(crone, membersonly=False)
    crone.sends(administering(f"affiliation='outcast' jid='hag66@{HOST}'"))
    hag.sends(registering(type="get"))
    hag.receives(refused("not-allowed", "nv71va54"))
    forget(*server.cast.clients)


# ---- voice (§7.13, §8.6) ---------------------------------------------------------------------------


ASK = (f"<message id='yd53c486' to='{COVEN}'><x xmlns='{FORM}' type='submit'><field var='FORM_TYPE'><value>{MUC}#request"
       "</value></field><field var='muc#role'><value>participant</value></field></x></message>")  # fmt: skip


def approval(nick: str = "thirdwitch", allow: str = "true") -> str:
    """A moderator's answer to a request for voice."""
    fields = {"muc#role": "participant", "muc#jid": f"hag66@{HOST}/pda", "muc#roomnick": nick, "muc#request_allow": allow}
    written = "".join(f"<field var='{var}'><value>{value}</value></field>" for var, value in fields.items())
    return (f"<message id='approve' to='{COVEN}'><x xmlns='{FORM}' type='submit'><field var='FORM_TYPE'><value>{MUC}#request"
            f"</value></field>{written}</x></message>")  # fmt: skip


def test_visitors_ask_for_a_voice(server: MemoryServer) -> None:
    """XEP0045-7.13-1, XEP0045-8.3-1"""
    crone, wicca, hag = coven(server, moderatedroom=True)
    hag.sends(ASK)
    for client in (crone, wicca):
        asked = client.receives(f"<message id='*' from='{COVEN}'><x xmlns='{FORM}' type='form'>...</x></message>")
        fields = {field.get("var"): field.findtext(f"{{{FORM}}}value") for field in asked.iter(f"{{{FORM}}}field")}
        assert fields == {"FORM_TYPE": f"{MUC}#request", "muc#role": "participant", "muc#jid": hag.jid,
                          "muc#roomnick": "thirdwitch", "muc#request_allow": "0"}  # fmt: skip
    wicca.sends(approval(allow="false"))
    hag.receives_nothing()
    wicca.sends(approval())
    hag.receives(shown("thirdwitch", "none", "participant", 110, jid=True, because="<actor nick='secondwitch'/>"))
    hag.sends(saying("I have a voice."))
    for client in (crone, wicca):
        client.receives(shown("thirdwitch", jid=True, because="<actor nick='secondwitch'/>"), said("thirdwitch", "*"))
    hag.receives(said("thirdwitch", "*"))
    hag.sends(ASK)
    hag.receives(refused("not-allowed", "yd53c486", "message"))


def test_only_moderators_approve(server: MemoryServer) -> None:
    """XEP0045-7.13-1"""
    crone, wicca, hag = coven(server, moderatedroom=True)
    hag.sends(approval())  # understood as a request of her own
    assert len(crone.receives_anything()) == len(wicca.receives_anything()) == 1
    hag.receives_nothing()
    wicca.sends(approval("nobody"))
    wicca.receives(refused("item-not-found", "approve", "message"))


# ---- leaving (§7.14, §17.3, §18.1.2) -------------------------------------------------------------------


def test_leaving(server: MemoryServer) -> None:
    """XEP0045-7.14-1"""
    crone, wicca, hag = coven(server)
    goodbye = "<status>gone where the goblins go</status>"
    hag.sends(f"<presence type='unavailable' to='{COVEN}/thirdwitch'>{goodbye}</presence>")
    hag.receives(gone("thirdwitch", "none", 110, jid=True, content=goodbye))
    for client in (crone, wicca):
        client.receives(gone("thirdwitch", jid=True, content=goodbye))
    hag.sends(f"<presence type='unavailable' to='{COVEN}/thirdwitch'/>")
    hag.receives_nothing()


def test_who_goes_offline_leaves(server: MemoryServer) -> None:
    """XEP0045-17.3-6"""
    crone, wicca, hag = coven(server)
    hag.sends("<presence/>")
    hag.sends("<presence type='unavailable'><status>bye</status></presence>")
    crone.receives(gone("thirdwitch", jid=True, content="<status>bye</status>"))
    wicca.disconnects()
    crone.receives(gone("secondwitch", "admin", jid=True))
    forget(*server.cast.clients)


def test_a_temporary_room_goes_with_its_last_occupant(server: MemoryServer) -> None:
    """XEP0045-7.14-2, XEP0045-10.1.3-4"""
    crone = witch(server, "firstwitch")
    enters(crone, "firstwitch")
    configures(crone, roomname="Temporary")
    forget(crone)
    crone.sends(f"<presence type='unavailable' to='{COVEN}/firstwitch'/>")
    crone.receives(gone("firstwitch", "owner", 110, jid=True))
    hag = witch(server, "thirdwitch")
    hag.sends(enter("thirdwitch"))
    hag.receives(shown("thirdwitch", "owner", "moderator", 110, 201, jid=True, id="n13mt3l"), NO_SUBJECT)
    hag.sends(f"<presence type='unavailable' to='{COVEN}/thirdwitch'/>")  # never configured
    hag.receives(gone("thirdwitch", "none", 110, jid=True, after="<destroy/>"))
    hag.sends(listing("affiliation='owner'"))
    hag.receives(refused("item-not-found", "list1"))


CONDITIONS = ["gone", "item-not-found", "recipient-unavailable", "redirect", "remote-server-not-found",
              "remote-server-timeout"]  # fmt: skip


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("kind", ["message", "presence"])
def test_whoever_cannot_be_reached_is_removed(server: MemoryServer, kind: str, condition: str) -> None:
    """XEP0045-18.1.2-1, XEP0045-11.1-1"""
    crone, wicca, hag = coven(server)
    error = f"<error type='cancel'><{condition} xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
    to = COVEN if kind == "message" else f"{COVEN}/firstwitch"
    hag.sends(f"<{kind} type='error' to='{to}'>{error}</{kind}>")
    hag.receives(gone("thirdwitch", "none", 110, 333, jid=True))
    for client in (crone, wicca):
        client.receives(gone("thirdwitch", "none", 333, jid=True))


def test_other_errors_mean_nothing(server: MemoryServer) -> None:
    """XEP0045-18.1.2-1, S55: and nobody answers errors with errors"""
    crone, _, hag = coven(server)
    error = "<error type='cancel'><service-unavailable xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error>"
    hag.sends(f"<message type='error' to='{COVEN}'>{error}</message><presence type='error' to='{COVEN}/x'>{error}</presence>")
    hag.sends(f"<message type='error' to='heath@{SERVICE}'>{error}</message><message type='error' to='{SERVICE}'/>")
    hag.sends(f"<iq type='result' id='x' to='{COVEN}/firstwitch'/><iq type='error' id='x' to='{COVEN}'>{error}</iq>")
    hag.receives_nothing()
    crone.receives_nothing()


# ---- requests to a room and between occupants (§17.4, XEP-0410) -------------------------------------------


@pytest.mark.parametrize("namespace", ["urn:example:nothing", "jabber:iq:roster", "jabber:iq:version"])
def test_the_room_answers_what_it_is_asked_itself(server: MemoryServer, namespace: str) -> None:
    """XEP0045-17.4-1"""
    crone, _, hag = coven(server)
    hag.sends(f"<iq type='get' id='q' to='{COVEN}'><query xmlns='{namespace}'/></iq>")
    hag.receives(refused("service-unavailable", "q"))
    crone.receives_nothing()


def test_a_question_reaches_an_occupant_under_the_name_in_the_room(server: MemoryServer) -> None:
    """XEP0045-17.4-2: and nobody's address is told"""
    _, wicca, hag = coven(server)
    question = "<query xmlns='jabber:iq:version'/>"
    hag.sends(f"<iq type='get' id='q1' to='{COVEN}/secondwitch'>{question}</iq>")
    asked = wicca.receives(f"<iq type='get' id='*' from='{COVEN}/thirdwitch'>{question}</iq>")
    assert asked.get("id") != "q1"
    hecate = witch(server, "hecate")
    hecate.sends(f"<iq type='result' id='{asked.get('id')}' to='{COVEN}/thirdwitch'/>")  # not hers to answer
    hag.receives_nothing()
    error = "<feature-not-implemented xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/>"
    wicca.sends(f"<iq type='error' id='{asked.get('id')}' to='{COVEN}/thirdwitch'><error type='cancel' by='{wicca.jid}'>{error}"
                "</error></iq>")  # fmt: skip
    answer = hag.receives(f"<iq type='error' id='q1' from='{COVEN}/secondwitch'><error type='cancel'>{error}</error></iq>")
    assert "wiccarocks" not in xmppd.serialize(answer)
    hag.sends(f"<iq type='get' id='q2' to='{COVEN}/nobody'>{question}</iq>")
    hag.receives(refused("item-not-found", "q2"))


def test_a_person_asked_for_the_card_is_the_person_not_the_client(server: MemoryServer) -> None:
    """XEP0045-17.4-2"""
    _, wicca, hag = coven(server)
    hag.sends(f"<iq type='get' id='v1' to='{COVEN}/secondwitch'><vCard xmlns='vcard-temp'/></iq>")
    answer = hag.receives("<iq id='v1' ...>...</iq>")
    assert answer.get("from") == f"{COVEN}/secondwitch" and "wiccarocks" not in xmppd.serialize(answer)
    wicca.receives_nothing()


def test_self_ping(server: MemoryServer) -> None:
    """XEP0045-17.4-2: XEP-0410 §3.2, §3.3; also when the room is not there any more"""
    _, wicca, hag = coven(server)
    hag.sends(f"<iq type='get' id='s2c1' to='{COVEN}/thirdwitch'>{PING}</iq>")
    hag.receives(f"<iq type='result' id='s2c1' from='{COVEN}/thirdwitch'/>")
    hecate = witch(server, "hecate")
    for room in (COVEN, f"heath@{SERVICE}"):
        hecate.sends(f"<iq type='get' id='s2c1' to='{room}/hecate'>{PING}</iq>")
        hecate.receives(refused("not-acceptable", "s2c1"))
    hag.sends(f"<iq type='get' id='p' to='{COVEN}/secondwitch'>{PING}</iq>")
    wicca.receives(f"<iq type='get' id='*' from='{COVEN}/thirdwitch'>{PING}</iq>")


# ---- the room's card (XEP-0486) ---------------------------------------------------------------------------


def test_the_room_has_a_picture(server: MemoryServer) -> None:
    """XEP-0486 §3: set by owners, seen by everybody, announced by 104 and its hash"""
    crone, wicca, hag = coven(server, persistentroom=True)
    photo = "<PHOTO><TYPE>image/png</TYPE><BINVAL>\n aGFn\n</BINVAL></PHOTO>"
    card = f"<vCard xmlns='vcard-temp'>{photo}</vCard>"
    wicca.sends(f"<iq type='set' id='7fP13' to='{COVEN}'>{card}</iq>")
    wicca.receives(refused("forbidden", "7fP13"))
    hag.sends(f"<iq type='get' id='uD10h' to='{COVEN}'><vCard xmlns='vcard-temp'/></iq>")
    hag.receives(refused("item-not-found", "uD10h"))
    crone.sends(f"<iq type='set' id='7fP13' to='{COVEN}'>{card}</iq>")
    told = f"<message type='groupchat' id='*' from='{COVEN}'><x xmlns='{USER}'>{status(104)}</x></message>"
    crone.receives(result("7fP13"), told)
    wicca.receives(told)
    hag.receives(told)
    hag.sends(f"<iq type='get' id='uD10h' to='{COVEN}'><vCard xmlns='vcard-temp'/></iq>")
    hag.receives(f"<iq type='result' id='uD10h'>{card}</iq>")
    assert avatar(hag) == ["c70b9fe31c3ab8a927a77d12741b8419dda5f55e"]  # of "hag"
    crone.sends(f"<iq type='set' id='7fP13' to='{COVEN}'><vCard xmlns='vcard-temp'/></iq>")
    forget(crone, wicca, hag)
    assert avatar(hag) == []


def avatar(client: Client) -> list[str]:
    """The hashes of the room's picture."""
    client.sends(f"<iq type='get' id='K92am' to='{COVEN}'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>")
    info = client.receives("<iq type='result' id='K92am' ...>...</iq>")
    fields = [field for field in info.iter(f"{{{FORM}}}field") if field.get("var") == "muc#roominfo_avatarhash"]
    return [value.text or "" for field in fields for value in field]


# ---- the subject (§8.1) --------------------------------------------------------------------------------------


def test_the_subject_is_changed_and_taken_away(server: MemoryServer) -> None:
    """XEP0045-8.1-1"""
    witches = coven(server)
    for subject in ("<subject>Fire Burn and Cauldron Bubble!</subject>", "<subject/>"):
        witches.wicca.sends(f"<message type='groupchat' id='lh2bs617' to='{COVEN}'>{subject}</message>")
        for client in witches:
            client.receives(f"<message type='groupchat' id='lh2bs617' from='{COVEN}/secondwitch'>{subject}{OCCUPANT}"
                            f"{STANZA_ID}</message>")  # fmt: skip


def test_a_subject_with_a_body_is_a_message(server: MemoryServer) -> None:
    """XEP0045-8.1-2"""
    crone, wicca, hag = coven(server)
    hag.sends(saying("O", "<subject>S</subject>"))
    hag.sends(f"<message type='groupchat' to='{COVEN}'><subject>S</subject><thread>t</thread></message>")
    for client in (crone, wicca, hag):
        assert len(client.receives_anything()) == 2
    hecate = witch(server, "hecate")
    assert enters(hecate, "hecate")[-1].findtext("{jabber:client}subject") == ""
    forget(crone, wicca, hag)


@pytest.mark.parametrize(("fields", "allowed"), [({}, False), ({"changesubject": True}, True),
                                                 ({"changesubject": True, "moderatedroom": True}, False)])  # fmt: skip
def test_who_may_change_the_subject(server: MemoryServer, fields: dict[str, object], allowed: bool) -> None:
    """XEP0045-8.1-3, XEP0045-10.2-5, S56"""
    crone, _, hag = coven(server, **fields)
    hag.sends(f"<message type='groupchat' id='lh2bs617' to='{COVEN}'><subject>S</subject></message>")
    if allowed:
        crone.receives("<message ...>...</message>")
        forget(*server.cast.clients)
    else:
        hag.receives(refused("forbidden", "lh2bs617", "message"))
        crone.receives_nothing()


def test_a_subject_has_its_bounds(server: MemoryServer) -> None:
    """S54"""
    crone, _, hag = coven(server)
    crone.sends(f"<message type='groupchat' id='m' to='{COVEN}'><subject>{'x' * 5000}</subject></message>")
    crone.receives(refused("policy-violation", "m", "message"))
    hag.receives_nothing()
