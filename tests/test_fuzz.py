"""What fuzzing promises, as far as twenty seconds go; by hand for longer: tests/fuzz."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import xmppd
from tests.dialogue import Client
from tests.fuzz.stanzas import MARK, Grammar, a_play
from tests.servers import MemoryServer

HEADER = b"<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>"


@pytest.mark.parametrize("seed", range(3))
def test_whatever_several_people_say_the_server_stays_a_server(tmp_path: Path, seed: int) -> None:
    """Requests are answered once, `from` is never forged, streams end only with a reason, nothing is left behind."""
    with a_play(tmp_path, seed) as play:
        while play.counts["steps"] < 600:
            play.step()
        assert play.counts["stanzas"] > 500 and play.counts["break_"] > 5


def test_the_fuzzer_knows_all_vocabularies_and_all_requests(server: MemoryServer) -> None:
    """A grammar that misses a feature would prove nothing about it."""
    grammar = Grammar(random.Random(0), server.server)
    assert {key.payload for key in grammar.requests} <= set(grammar.names)
    text = "".join(grammar.stanza("romeo@example.org/a").text for _ in range(4000))
    for name in grammar.names:
        own = xmppd.namespace_of(name)
        assert own in text or own.endswith("streams"), f"{name} is never said"
    assert MARK in text


@pytest.mark.parametrize("last_words", ["x<", "x<message", "x&", "x]", "<message/>x<", "<message><body>x<"])
@pytest.mark.parametrize("how", ["hangs up", "is replaced", "is removed"])
def test_a_stream_that_ends_in_the_middle_of_text_ends_wholly(
    server: MemoryServer, romeo: Client, juliet: Client, last_words: str, how: str
) -> None:
    """Found by atheris: expat hands out what it has buffered when its parser is closed, and that was an error."""
    romeo.befriends(juliet)
    juliet.comes_online()
    romeo.sends("<presence/>")
    romeo.receives_anything()
    juliet.receives_anything()
    romeo.sends_raw(last_words)
    if how == "hangs up":
        romeo.disconnects()
    elif how == "is replaced":
        server.client().login("romeo", resource="orchard")
    else:
        server.server.remove_account(xmppd.JID.parse("romeo@example.org"))
    came = [(stanza.get("from"), stanza.get("type")) for stanza in juliet.receives_anything()]
    assert ("romeo@example.org/orchard", "unavailable") in came
    assert len(server.server.streams) == (2 if how == "is replaced" else 1)
    server.cast.clients.remove(romeo)  # its end is not in the dialogue


@pytest.mark.parametrize("text", ["x<", " x", "x", "<a>x<", "<message><body>x</bo", "<message><![CDATA[x"])
def test_closing_a_parser_is_never_an_error(text: str) -> None:
    """See above."""
    parser = xmppd.StreamParser()
    parser.feed(HEADER + text.encode())
    parser.close()
    events = [parser.next(), parser.next()]
    assert isinstance(events[0], xmppd.Opened)
    assert events[1] is None or isinstance(events[1], xmppd.StreamError)


@pytest.mark.parametrize("text", ["\x0b", "\x0c", "\x1c", "\x85", "\u00a0", "\u2003", "\u2028"])
@pytest.mark.parametrize("behind", ["", "<presence/>"])
def test_only_xml_white_space_may_stand_between_stanzas(text: str, behind: str) -> None:
    """Found by atheris: Python's `isspace` knows more white space than XML 1.0 §2.3 does."""
    parser = xmppd.StreamParser()
    parser.feed(HEADER)
    parser.feed(b" \t\r\n")
    parser.feed(text.encode())
    parser.feed(behind.encode() or b"<")
    events = [parser.next(), parser.next()]
    assert isinstance(events[1], xmppd.StreamError), events
