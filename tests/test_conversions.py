"""One thing, two ways: avatars (XEP-0398: XEP-0084 and XEP-0153) and bookmarks (XEP-0411, XEP-0402: XEP-0048, 0049)."""

from __future__ import annotations

import base64
import hashlib

import pytest

import xmppd
from tests.dialogue import DISCO_INFO, Client, local_name
from tests.eventing import (
    BOOKMARKS,
    FROM_BALCONY,
    JULIET,
    OWNER,
    ROMEO,
    ask_items,
    comes_online,
    configure,
    done,
    error,
    event,
    item,
    items_of,
    publish,
    request,
    retract,
)
from tests.servers import MemoryServer, ProcessServer

DATA, METADATA = "urn:xmpp:avatar:data", "urn:xmpp:avatar:metadata"
PICTURE, OTHER = b"\x89PNG a face", b"\x89PNG another face"
UPDATE = "vcard-temp:x:update"


def sha1(picture: bytes) -> str:
    return hashlib.sha1(picture).hexdigest()


def base64_of(picture: bytes) -> str:
    return base64.b64encode(picture).decode()


def data(picture: bytes) -> str:
    """The item with a picture (XEP-0084 §3.1)."""
    return item(sha1(picture), f"<data xmlns='{DATA}'>{base64_of(picture)}</data>")


def info(picture: bytes, more: str = "") -> str:
    return f"<info id='{sha1(picture)}' type='image/png' bytes='{len(picture)}'{more}/>"


def metadata(picture: bytes, before: str = "") -> str:
    """The item that announces it (XEP-0084 §3.2)."""
    return item(sha1(picture), f"<metadata xmlns='{METADATA}'>{before}{info(picture)}</metadata>")


def shows(client: Client, picture: bytes, **options: str) -> None:
    """Publish an avatar; what it brings to the client itself is forgotten."""
    for node, what in ((DATA, data(picture)), (METADATA, metadata(picture))):
        client.sends(publish(node, what, **options))
        client.receives("<iq type='result' id='p' ...>...</iq>")
    client.receives_anything()


def photo(picture: bytes) -> str:
    return f"<PHOTO><TYPE>image/png</TYPE><BINVAL>{base64_of(picture)}</BINVAL></PHOTO>"


def keeps(client: Client, *inside: str, shown: str | None = None) -> None:
    """Store a vCard; the client's own presence says so first where the picture is another (`shown`: its hash)."""
    client.sends(f"<iq type='set' id='v'><vCard xmlns='vcard-temp'>{''.join(inside)}</vCard></iq>")
    client.receives(*([] if shown is None else [hash_in(shown)]), "<iq type='result' id='v'/>")
    client.receives_anything()


def card_is(client: Client, *inside: str, to: str = JULIET) -> None:
    """Check juliet's vCard, as somebody sees it."""
    client.sends(f"<iq type='get' id='v' to='{to}'><vCard xmlns='vcard-temp'/></iq>")
    client.receives(f"<iq type='result' id='v'><vCard xmlns='vcard-temp'>{''.join(inside)}</vCard></iq>")


def hash_in(presence: str = "*", content: str = "") -> str:
    """A presence of juliet's with the hash of a picture."""
    return f"<presence from='{FROM_BALCONY}'><x xmlns='{UPDATE}'><photo>{presence}</photo></x>{content}</presence>"


# ---- from PEP to the vCard --------------------------------------------------------------


def test_a_public_avatar_is_in_the_vcard_for_everybody(juliet: Client, romeo: Client) -> None:
    """XEP-0398 §3.1: the rest of the card stays"""
    keeps(juliet, "<FN>Juliet</FN>", photo(OTHER))
    shows(juliet, PICTURE, access_model="open")
    card_is(romeo, "<FN>Juliet</FN>", photo(PICTURE))
    card_is(juliet, "<FN>Juliet</FN>", photo(PICTURE))


def test_an_avatar_for_friends_is_in_the_vcard_for_friends(juliet: Client, romeo: Client, nurse: Client) -> None:
    """XEP-0398 §7, S29: and a card that holds nothing else is none for strangers"""
    juliet.comes_online()
    romeo.comes_online()
    juliet.befriends(romeo)
    shows(juliet, PICTURE)
    romeo.receives_anything()
    card_is(romeo, photo(PICTURE))
    nurse.sends(f"<iq type='get' id='v' to='{JULIET}'><vCard xmlns='vcard-temp'/></iq>")
    nurse.receives("<iq type='error' id='v'><error type='cancel'><service-unavailable .../></error></iq>")
    keeps(juliet, "<FN>Juliet</FN>", photo(PICTURE))  # a client that edits the card sends all of it back
    card_is(nurse, "<FN>Juliet</FN>")
    card_is(romeo, "<FN>Juliet</FN>", photo(PICTURE))
    keeps(juliet, photo(OTHER), shown=sha1(OTHER))  # a picture of the card's own is for everybody, like the card
    romeo.receives_anything()
    card_is(nurse, photo(OTHER))


def test_an_avatar_for_few_is_not_in_the_vcard(juliet: Client, romeo: Client) -> None:
    """XEP-0398 §7"""
    keeps(juliet, "<FN>Juliet</FN>")
    shows(juliet, PICTURE, access_model="whitelist")
    card_is(juliet, "<FN>Juliet</FN>")
    juliet.sends("<presence/>")
    juliet.receives(f"<presence from='{FROM_BALCONY}'/>")


def test_the_picture_in_pubsub_counts_not_the_one_on_the_web(juliet: Client, romeo: Client) -> None:
    """XEP-0398 §3.1: the info element that does not point to an external URL"""
    elsewhere = info(OTHER, " url='http://avatars.example.org/happy.gif'")
    for node, what in ((DATA, data(PICTURE)), (METADATA, metadata(PICTURE, elsewhere))):
        juliet.sends(publish(node, what, access_model="open"))
        juliet.receives("<iq type='result' id='p' ...>...</iq>")
    card_is(romeo, photo(PICTURE))


def test_a_picture_that_is_not_what_its_id_says_is_not_converted(juliet: Client) -> None:
    """XEP-0398 §3.1"""
    lie = data(OTHER).replace(sha1(OTHER), sha1(PICTURE))
    for node, what in ((DATA, lie), (METADATA, metadata(PICTURE))):
        juliet.sends(publish(node, what, access_model="open"))
        juliet.receives("<iq type='result' id='p' ...>...</iq>")
    card_is(juliet)
    juliet.sends(publish(METADATA, metadata(OTHER), access_model="open"))  # of which there are no data
    juliet.receives("<iq type='result' id='p' ...>...</iq>")
    card_is(juliet)


def test_an_avatar_that_is_switched_off_leaves_the_vcard(juliet: Client, romeo: Client) -> None:
    """XEP-0084 §3.5"""
    juliet.comes_online()
    shows(juliet, PICTURE, access_model="open")
    keeps(juliet, "<FN>Juliet</FN>", photo(PICTURE))
    juliet.sends(publish(METADATA, item("off", f"<metadata xmlns='{METADATA}'/>")))
    juliet.receives("<iq type='result' id='p' ...>...</iq>", hash_in(""))
    card_is(romeo, "<FN>Juliet</FN>")
    juliet.sends("<presence/>")
    juliet.receives(f"<presence from='{FROM_BALCONY}'/>")
    shows(juliet, PICTURE)
    card_is(romeo, "<FN>Juliet</FN>", photo(PICTURE))


# ---- from the vCard to PEP --------------------------------------------------------------


def test_a_picture_in_the_vcard_is_published(juliet: Client, romeo: Client, nurse: Client) -> None:
    """XEP-0398 §3.2: first the data, then the metadata; for everybody, as the card is"""
    comes_online(romeo, METADATA, DATA)
    juliet.comes_online()
    juliet.befriends(romeo)
    romeo.receives_anything()
    juliet.sends(f"<iq type='set' id='v'><vCard xmlns='vcard-temp'>{photo(PICTURE)}</vCard></iq>")
    juliet.receives_anything()
    romeo.receives(event(DATA, data(PICTURE)), event(METADATA, metadata(PICTURE)), hash_in(sha1(PICTURE)))
    nurse.sends(ask_items(METADATA))
    nurse.receives(items_of(METADATA, metadata(PICTURE)))
    keeps(juliet, "<FN>Juliet</FN>", photo(PICTURE))
    romeo.receives_nothing()  # it is the same picture
    keeps(juliet, "<FN>Juliet</FN>", shown="")
    romeo.receives(event(METADATA, item("*", f"<metadata xmlns='{METADATA}'/>")), hash_in(""))
    keeps(juliet, photo(PICTURE), shown=sha1(PICTURE))
    romeo.receives(event(DATA, data(PICTURE)), event(METADATA, metadata(PICTURE)), hash_in(sha1(PICTURE)))


# ---- the hash in presence (XEP-0398 §4, XEP-0153) ----------------------------------------

X = f"<x xmlns='{UPDATE}'>{{}}</x>"
TRUE = X.format(f"<photo>{sha1(PICTURE)}</photo>")


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        ("", TRUE),
        (X.format(""), TRUE),
        (X.format("<photo/>"), X.format("<photo/>")),
        (X.format("<photo>0123</photo>"), TRUE),
        (TRUE, TRUE),
    ],
)
def test_the_hash_is_in_every_available_presence(juliet: Client, romeo: Client, sent: str, seen: str) -> None:
    """XEP-0398 §4: directed ones too; the client may say that it wants none"""
    for client in (juliet, romeo):
        client.comes_online()
    juliet.befriends(romeo)
    shows(juliet, PICTURE, access_model="open")
    for client in (juliet, romeo):
        client.receives_anything()
    juliet.sends(f"<presence>{sent}<show>away</show></presence>")
    for client in (juliet, romeo):
        client.receives(f"<presence from='{FROM_BALCONY}'>{seen}<show>away</show></presence>")
    juliet.sends(f"<presence to='nurse@example.org'/><presence to='{ROMEO}/orchard'>{sent}</presence>")
    romeo.receives(f"<presence from='{FROM_BALCONY}' to='{ROMEO}/orchard'>{seen}</presence>")
    juliet.sends("<presence type='unavailable'/>")
    for client in (juliet, romeo):
        client.receives(f"<presence from='{FROM_BALCONY}' type='unavailable'/>")
    juliet.receives_anything()
    romeo.receives_anything()


def test_contacts_see_a_new_picture_at_once(juliet: Client, romeo: Client) -> None:
    """XEP-0153 §4.1: unless the client wants none"""
    for client in (juliet, romeo):
        client.comes_online()
    juliet.befriends(romeo)
    shows(juliet, PICTURE)
    romeo.receives(hash_in(sha1(PICTURE)))
    shows(juliet, OTHER)
    romeo.receives(hash_in(sha1(OTHER)))
    juliet.sends(f"<presence>{X.format('<photo/>')}</presence>")
    juliet.receives_anything()
    romeo.receives(hash_in(""))
    shows(juliet, PICTURE)
    romeo.receives_nothing()


# ---- bookmarks --------------------------------------------------------------------------

OPTIONS = {"persist_items": "true", "max_items": "max", "send_last_published_item": "never", "access_model": "whitelist"}
OLD = "storage:bookmarks"
PLAY, ORCHARD = "theplay@conference.shakespeare.lit", "orchard@conference.shakespeare.lit"
NEW_PLAY = f"<conference xmlns='{BOOKMARKS}' name='The Play&apos;s the Thing' autojoin='true'><nick>JC</nick></conference>"
OLD_PLAY = f"<conference jid='{PLAY}' name='The Play&apos;s the Thing' autojoin='true'><nick>JC</nick></conference>"
EXTENSIONS = "<extensions><state xmlns='http://myclient.example/bookmark/state' minimized='true'/></extensions>"
NEW_ORCHARD = f"<conference xmlns='{BOOKMARKS}' name='The Orcard' autojoin='1'><nick>JC</nick>{EXTENSIONS}</conference>"
OLD_ORCHARD = f"<conference jid='{ORCHARD}' name='The Orcard' autojoin='true'><nick>JC</nick></conference>"
URL = "<url name='Complete Works of Shakespeare' url='http://the-tech.mit.edu/Shakespeare/'/>"


def storage(*inside: str) -> str:
    return f"<storage xmlns='{OLD}'>{''.join(inside)}</storage>"


def keeps_privately(client: Client, *inside: str) -> None:
    """Store bookmarks in private XML (XEP-0049)."""
    client.sends(f"<iq type='set' id='q'><query xmlns='jabber:iq:private'>{storage(*inside)}</query></iq>")
    client.receives_in_any_order("<iq type='result' id='q'/>")


def private_is(client: Client, *inside: str) -> None:
    client.sends(f"<iq type='get' id='q'><query xmlns='jabber:iq:private'><storage xmlns='{OLD}'/></query></iq>")
    client.receives(f"<iq type='result' id='q'><query xmlns='jabber:iq:private'>{storage(*inside)}</query></iq>")


def node_is(client: Client, node: str, *items: str) -> None:
    client.sends(ask_items(node, to=""))
    client.receives(items_of(node, *items))


def adds(client: Client, id: str, payload: str) -> None:
    client.sends(publish(BOOKMARKS, item(id, payload), **OPTIONS))
    client.receives("<iq type='result' id='p' ...>...</iq>")


def test_all_of_it_is_promised(juliet: Client) -> None:
    """XEP-0398 §2, XEP-0411 §2, XEP-0402 §5.3"""
    juliet.sends(f"<iq type='get' id='d' to='{JULIET}'><query xmlns='{DISCO_INFO}'/></iq>")
    told = {one.get("var") for one in juliet.receives("<iq type='result' id='d' ...>...</iq>")[0]}
    assert told >= {"urn:xmpp:pep-vcard-conversion:0", "urn:xmpp:bookmarks-conversion:0", f"{BOOKMARKS}#compat",
                    f"{BOOKMARKS}#compat-pep"}  # fmt: skip


def test_a_new_bookmark_is_in_the_old_places(juliet: Client) -> None:
    """XEP-0402 §5.3.1, XEP-0411 §3: what only the old way knows stays there"""
    keeps_privately(juliet, URL)
    adds(juliet, PLAY, NEW_PLAY)
    adds(juliet, ORCHARD, NEW_ORCHARD)
    private_is(juliet, URL, OLD_PLAY, OLD_ORCHARD)
    node_is(juliet, OLD, item("current", storage(URL, OLD_PLAY, OLD_ORCHARD)))
    juliet.sends(retract(BOOKMARKS, PLAY, notify="true"))
    juliet.receives(done())
    private_is(juliet, URL, OLD_ORCHARD)
    juliet.sends(request(f"<purge node='{BOOKMARKS}'/>", namespace=OWNER))
    juliet.receives(done())
    private_is(juliet, URL)


@pytest.mark.parametrize("by", ["private XML", "PEP"])
def test_an_old_list_changes_the_new_bookmarks(server: MemoryServer, juliet: Client, by: str) -> None:
    """XEP-0402 §5.3.2, XEP-0411 §3: and the other devices hear of what has changed, and of nothing else"""
    adds(juliet, PLAY, NEW_PLAY)
    adds(juliet, ORCHARD, NEW_ORCHARD)
    chamber = server.client().login("juliet", resource="chamber")
    comes_online(chamber, BOOKMARKS)
    chamber.receives_anything()
    room = "<conference jid='new@conference.shakespeare.lit' autojoin='0' name='New'><password>x</password></conference>"
    changed = OLD_ORCHARD.replace("Orcard", "Orchard")
    if by == "PEP":
        juliet.sends(publish(OLD, item("current", storage(changed, URL, room, OLD_PLAY.replace(PLAY, "@")))))
        juliet.receives("<iq type='result' id='p' ...>...</iq>")
    else:
        keeps_privately(juliet, changed, URL, room, OLD_PLAY.replace(PLAY, "@"))
    new = f"<conference xmlns='{BOOKMARKS}' name='New'><password>x</password></conference>"
    after = f"<conference xmlns='{BOOKMARKS}' name='The Orchard' autojoin='true'><nick>JC</nick>{EXTENSIONS}</conference>"
    chamber.receives_in_any_order(
        event(BOOKMARKS, f"<retract id='{PLAY}'/>"),
        event(BOOKMARKS, item(ORCHARD, after)),
        event(BOOKMARKS, item("new@conference.shakespeare.lit", new)),
    )
    chamber.receives_nothing()
    whole = storage(changed, URL, room, OLD_PLAY.replace(PLAY, "@"))
    private_is(juliet, *[whole.partition(">")[2].rpartition("<")[0]])
    node_is(juliet, OLD, item("current", whole))
    keeps_privately(juliet, changed, URL, room, OLD_PLAY.replace(PLAY, "@"))
    chamber.receives_nothing()


def test_devices_with_the_old_way_hear_of_new_bookmarks(server: MemoryServer, juliet: Client) -> None:
    """XEP-0411 §3"""
    chamber = server.client().login("juliet", resource="chamber")
    comes_online(chamber, OLD)
    adds(juliet, PLAY, NEW_PLAY)
    chamber.receives(event(OLD, item("current", storage(OLD_PLAY))))
    keeps_privately(juliet, OLD_PLAY, URL)
    chamber.receives(event(OLD, item("current", storage(OLD_PLAY, URL))))


def test_nothing_is_copied_to_where_others_could_read_it(juliet: Client, romeo: Client) -> None:
    """XEP-0411 §5"""
    adds(juliet, PLAY, NEW_PLAY)
    juliet.sends(configure(OLD, access_model="open"))
    juliet.receives(done())
    keeps_privately(juliet, OLD_PLAY, OLD_ORCHARD)
    romeo.sends(ask_items(OLD))
    romeo.receives(items_of(OLD, item("current", storage(OLD_PLAY))))  # what she has opened herself
    node_is(juliet, BOOKMARKS, item(PLAY, NEW_PLAY))


def test_what_was_there_before_is_converted_at_the_login(server: MemoryServer, juliet: Client) -> None:
    """XEP-0411 §4: as in an account that was imported"""
    juliet.closes()
    private = server.storage.documents("private")
    private.put(xmppd.JID.parse(JULIET), xmppd.OLD_BOOKMARKS("storage"), storage(OLD_PLAY))
    again = server.client().login("juliet", resource="balcony")
    node_is(again, BOOKMARKS, item(PLAY, NEW_PLAY))


@pytest.mark.config(limits={"pep_nodes": 0})
def test_no_room_for_a_conversion_refuses_nothing(juliet: Client) -> None:
    """RFC 6120 §8.2.3: an error must not follow what has happened."""
    keeps_privately(juliet, OLD_PLAY)
    private_is(juliet, OLD_PLAY)
    keeps(juliet, photo(PICTURE))
    card_is(juliet, photo(PICTURE))
    juliet.sends(ask_items(BOOKMARKS))
    juliet.receives(error("item-not-found"))


def test_other_things_in_the_old_node_are_left_alone(juliet: Client) -> None:
    adds(juliet, PLAY, NEW_PLAY)
    juliet.sends(publish(OLD, item("x", "<x xmlns='urn:x'/>")))
    juliet.receives("<iq type='result' id='p' ...>...</iq>")
    node_is(juliet, BOOKMARKS, item(PLAY, NEW_PLAY))


def test_both_ways_survive_a_crash(process_server: ProcessServer) -> None:
    """Over the wire: what was acknowledged is there, in all places."""
    juliet = process_server.client().login("juliet", resource="balcony")
    adds(juliet, PLAY, NEW_PLAY)
    shows(juliet, PICTURE)
    process_server.kill()
    juliet.disconnects()
    process_server.start()
    again = process_server.client().login("juliet", resource="balcony")
    private_is(again, OLD_PLAY)
    card_is(again, photo(PICTURE))
    again.sends("<presence/>")
    assert local_name(again.receives(hash_in(sha1(PICTURE)))[0].tag) == "x"
