#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["defusedxml", "cryptography", "platformdirs", "tomli-w"]
# ///
"""xmppd: a complete XMPP server in one file, and a book about one.

XMPP is two long XML documents, called streams, between a client and its server: one in
each direction, opened at login and closed at logout. The children of such a document are
the messages, presences and queries ("stanzas") that people exchange. This server reads
them, decides by the rules of RFC 6120 and RFC 6121 where each one goes, and remembers
what has to be remembered in JSON files.

    bytes ─> Connection ─> Stream ──────> Session ─> Server.receive ── sending filters ──> route
    socket   TLS, limits   XML, negotiate stamps from                                      │
                                                     ┌─────────────────────────────────────┤ RFC 6121 §8, one table
                                 IQ to self/account/ │                    to an account    │ to another domain
                                 server/room         ▼                                     ▼
          Documents <─ commit ─ Feature handler (returns a payload,     arriving filters, once per account
          Journal: one line,    or raises StanzaError)                  delivering filters, per session ─> Session.send
          one fsync per turn                                            └─> Domain: other servers, components, rooms

The thread rule: one thread, the loop's, owns every socket, session, document and timer,
so nothing in the protocol's code takes a lock. Worker threads only wait in C (password
hashing, name lookups), one disk thread writes. Any thread may call `Loop.post`; that is
the only method which may be called from outside the loop's thread.

Contents
     1. Words
     2. Errors (RFC 6120 §4.9, §6.5, §8.3)
     3. Elements
     4. Addresses (RFC 7622, RFC 6122)
     5. Forms and pages (XEP-0004, XEP-0059)
     6. Configuration
     7. The loop
     8. Storage: JSON files that lose nothing
     9. Certificates and TLS (RFC 6120 §5, §13.7; RFC 7590)
    10. Credentials and SASL (RFC 6120 §6, RFC 5802, RFC 7677, RFC 4616)
    11. Streams (RFC 6120 §4 to §6)
    12. Connections
    13. The contract of a feature
    14. Sessions and routing (RFC 6120 §8, §10; RFC 6121 §8)
    15. Roster, subscriptions, presence (RFC 6121 §2 to §4)
    16. Messages at rest, and their copies (XEP-0160, XEP-0313, XEP-0280)
    17. Service discovery (XEP-0030)
    18. Small features
    19. Privacy (XEP-0016, XEP-0191)
    20. Publish-subscribe and personal eventing (XEP-0060, XEP-0163)
    21. Multi-user chat (XEP-0045)
    22. Staying connected (XEP-0198, XEP-0352, XEP-0357; XEP-0388, XEP-0386, XEP-0484)
    23. Federation and components (RFC 6120 §10.4; XEP-0220, XEP-0178, XEP-0288, XEP-0114)
    24. The web (RFC 7395, XEP-0124, XEP-0206, XEP-0156, XEP-0363)
    25. Administration: the control channel
    26. Learning: the trace
    27. The whole

Reading paths. For the whole idea in an hour: 3 (what a stanza is), 11 (how a stream is
negotiated), 14 (where a stanza goes), 18 (what a small extension looks like), 15 (rosters
and presence). To add an extension: 13 and 18. A chapter uses only names that stand above
it, so nothing on the page is ever unknown to a reader who reads from the top.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import errno
import functools
import hashlib
import heapq
import hmac
import json
import logging
import os
import queue
import re
import secrets
import selectors
import signal
import socket
import ssl
import stringprep
import sys
import threading
import time
import tomllib
import unicodedata
import xml.etree.ElementTree as ET
import zlib
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Generic, NamedTuple, NoReturn, Protocol, TypeVar
from urllib.parse import unquote
from weakref import WeakValueDictionary
from xml.parsers import expat

if TYPE_CHECKING:
    import zipfile
    from concurrent.futures import Future, ThreadPoolExecutor
    from importlib.resources.abc import Traversable

    import h11
    import wsproto.events
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

__version__ = "0.1.0"


# ==== 1. Words ====
#
# XMPP is XML, and XML tells one vocabulary from another by namespaces: strings that look
# like URIs and are only ever compared. Every extension (XEP) brings one or more, and
# nearly every decision in this server starts with "which namespace is this payload in?".
# They all stand here, with the specification that defines each, so that a name found in
# a trace can be looked up in one place.
#
# The second half holds the limits: how large, how many, how long. Each says its unit, its
# reason and its precedent, because a limit without a reason is the first thing that gets
# in somebody's way. Those an owner may want to change are keys of `[limits]` (chapter 6)
# and stand here only as defaults.


class Namespace(str):
    """An XML namespace; calling it qualifies a name, as `ElementTree` writes it.

    `VCARD("vCard")` is `"{vcard-temp}vCard"`.
    """

    __slots__ = ()

    def __call__(self, name: str) -> str:
        """Return `{namespace}name`, the tag of an element of this vocabulary."""
        return f"{{{self}}}{name}"


# -- streams (RFC 6120)
STREAMS = Namespace("http://etherx.jabber.org/streams")
STREAM_ERRORS = Namespace("urn:ietf:params:xml:ns:xmpp-streams")
STANZA_ERRORS = Namespace("urn:ietf:params:xml:ns:xmpp-stanzas")
CLIENT = Namespace("jabber:client")  # the content of client streams; inside this server, of all streams
SERVER = Namespace("jabber:server")  # the content of server-to-server streams
COMPONENT = Namespace("jabber:component:accept")  # XEP-0114
TLS = Namespace("urn:ietf:params:xml:ns:xmpp-tls")
SASL = Namespace("urn:ietf:params:xml:ns:xmpp-sasl")
SASL_BINDINGS = Namespace("urn:xmpp:sasl-cb:0")  # XEP-0440
SASL2 = Namespace("urn:xmpp:sasl:2")  # XEP-0388
BIND2 = Namespace("urn:xmpp:bind:0")  # XEP-0386
FAST = Namespace("urn:xmpp:fast:0")  # XEP-0484
BIND = Namespace("urn:ietf:params:xml:ns:xmpp-bind")
SESSION = Namespace("urn:ietf:params:xml:ns:xmpp-session")  # RFC 3921 §3, a formality since RFC 6121
XML = Namespace("http://www.w3.org/XML/1998/namespace")
XML_LANG = XML("lang")
STREAM_LIMITS = Namespace("urn:xmpp:stream-limits:0")  # XEP-0478
DIALBACK = Namespace("jabber:server:dialback")  # XEP-0220
FRAMING = Namespace("urn:ietf:params:xml:ns:xmpp-framing")  # RFC 7395
HTTP_BIND = Namespace("http://jabber.org/protocol/httpbind")  # XEP-0124; what names no namespace in a body (XEP-0206)
XBOSH = Namespace("urn:xmpp:xbosh")  # XEP-0206
XRD = Namespace("http://docs.oasis-open.org/ns/xri/xrd-1.0")  # RFC 6415, for XEP-0156

# -- instant messaging (RFC 6121)
ROSTER = Namespace("jabber:iq:roster")
ROSTER_VERSIONING = Namespace("urn:xmpp:features:rosterver")
PRE_APPROVAL = Namespace("urn:xmpp:features:pre-approval")

# -- extensions
DISCO_INFO = Namespace("http://jabber.org/protocol/disco#info")  # XEP-0030
DISCO_ITEMS = Namespace("http://jabber.org/protocol/disco#items")
DATA_FORMS = Namespace("jabber:x:data")  # XEP-0004
DATA_VALIDATE = Namespace("http://jabber.org/protocol/xdata-validate")  # XEP-0122
RSM = Namespace("http://jabber.org/protocol/rsm")  # XEP-0059
LAST_ACTIVITY = Namespace("jabber:iq:last")  # XEP-0012
PRIVACY = Namespace("jabber:iq:privacy")  # XEP-0016
BLOCKING = Namespace("urn:xmpp:blocking")  # XEP-0191
BLOCKING_ERRORS = Namespace("urn:xmpp:blocking:errors")
PRIVATE = Namespace("jabber:iq:private")  # XEP-0049
REGISTER = Namespace("jabber:iq:register")  # XEP-0077
REGISTER_FEATURE = Namespace("http://jabber.org/features/iq-register")
IQ_AUTH = Namespace("jabber:iq:auth")  # XEP-0078
IQ_AUTH_FEATURE = Namespace("http://jabber.org/features/iq-auth")
COMPRESS = Namespace("http://jabber.org/protocol/compress")  # XEP-0138
COMPRESS_FEATURE = Namespace("http://jabber.org/features/compress")
PUBSUB = Namespace("http://jabber.org/protocol/pubsub")  # XEP-0060
PUBSUB_OWNER = Namespace("http://jabber.org/protocol/pubsub#owner")
PUBSUB_EVENT = Namespace("http://jabber.org/protocol/pubsub#event")
PUBSUB_ERRORS = Namespace("http://jabber.org/protocol/pubsub#errors")
AVATAR_DATA = Namespace("urn:xmpp:avatar:data")  # XEP-0084
AVATAR_METADATA = Namespace("urn:xmpp:avatar:metadata")
VCARD_UPDATE = Namespace("vcard-temp:x:update")  # XEP-0153
BOOKMARKS = Namespace("urn:xmpp:bookmarks:1")  # XEP-0402
OLD_BOOKMARKS = Namespace("storage:bookmarks")  # XEP-0048
CAPS = Namespace("http://jabber.org/protocol/caps")  # XEP-0115
ADDRESS = Namespace("http://jabber.org/protocol/address")  # XEP-0033
VCARD = Namespace("vcard-temp")  # XEP-0054
VERSION = Namespace("jabber:iq:version")  # XEP-0092
PING = Namespace("urn:xmpp:ping")  # XEP-0199
TIME = Namespace("urn:xmpp:time")  # XEP-0202
DELAY = Namespace("urn:xmpp:delay")  # XEP-0203
HINTS = Namespace("urn:xmpp:hints")  # XEP-0334
MAM = Namespace("urn:xmpp:mam:2")  # XEP-0313, XEP-0441
RETRACT = Namespace("urn:xmpp:message-retract:1")  # XEP-0424
MODERATE = Namespace("urn:xmpp:message-moderate:1")  # XEP-0425
REACTIONS = Namespace("urn:xmpp:reactions:0")  # XEP-0444
ENCRYPTED = (Namespace("eu.siacs.conversations.axolotl"), Namespace("urn:xmpp:omemo:2"))  # XEP-0384, old and new
OPENPGP = Namespace("urn:xmpp:openpgp:0")  # XEP-0373
CALLS = Namespace("urn:xmpp:jingle-message:0")  # XEP-0353
CHAT_STATES = Namespace("http://jabber.org/protocol/chatstates")  # XEP-0085
RECEIPTS = Namespace("urn:xmpp:receipts")  # XEP-0184
CHAT_MARKERS = Namespace("urn:xmpp:chat-markers:0")  # XEP-0333
CARBONS = Namespace("urn:xmpp:carbons:2")  # XEP-0280
CARBONS_RULES = Namespace("urn:xmpp:carbons:rules:0")  # a feature for service discovery only
FORWARD = Namespace("urn:xmpp:forward:0")  # XEP-0297
SM = Namespace("urn:xmpp:sm:3")  # XEP-0198
CSI = Namespace("urn:xmpp:csi:0")  # XEP-0352
PUSH = Namespace("urn:xmpp:push:0")  # XEP-0357
PUSH_SUMMARY = Namespace("urn:xmpp:push:summary")  # the type of a form
PUBSUB_OPTIONS = Namespace("http://jabber.org/protocol/pubsub#publish-options")  # likewise (XEP-0060 §16.4.3)
OMEMO = Namespace("eu.siacs.conversations.axolotl")  # XEP-0384 as clients speak it
OMEMO_2 = Namespace("urn:omemo:2")  # XEP-0384 since version 0.4
JINGLE_MESSAGES = Namespace("urn:xmpp:jingle-message:0")  # XEP-0353: a call comes in
MUC = Namespace("http://jabber.org/protocol/muc")  # XEP-0045
MUC_USER = Namespace("http://jabber.org/protocol/muc#user")
MUC_ADMIN = Namespace("http://jabber.org/protocol/muc#admin")
MUC_OWNER = Namespace("http://jabber.org/protocol/muc#owner")
DIRECT_INVITE = Namespace("jabber:x:conference")  # XEP-0249
OCCUPANT_ID = Namespace("urn:xmpp:occupant-id:0")  # XEP-0421
STANZA_ID = Namespace("urn:xmpp:sid:0")  # XEP-0359

# -- limits of streams: checked where bytes enter, before anything is built of them
MAX_STANZA = 256 * 1024  # bytes; as Prosody's and ejabberd's client streams
MAX_STANZA_BEFORE_LOGIN = 8192  # bytes; ejabberd 26.04: strangers have nothing long to say
MAX_ELEMENTS = 10_000  # elements in one stanza: each costs some 200 bytes of memory here
MAX_ELEMENTS_BEFORE_LOGIN = 32  # ejabberd 26.04
MAX_DEPTH = 64  # nested elements; deeper than any extension goes, far from Python's recursion limit
MAX_ATTRIBUTES = 64  # of one element
READ_SIZE = 16 * 1024  # bytes read from one connection per turn: a full TLS record, and fair to the others
MAX_UNREAD = 4 * 1024 * 1024  # bytes waiting for a peer that doesn't read: then its stream ends
MAX_UNACKNOWLEDGED = 5000  # stanzas kept for a client until it says that it has them; as ejabberd
MAX_HELD = 256  # stanzas held back from a client that nobody looks at; as Prosody's csi_simple
MAX_SASL_FAILURES = 5  # per stream; RFC 6120 §6.4.5 asks for 2 to 5
MAX_BIND_FAILURES = 10  # per stream; RFC 6120 §7.7.3 asks for 5 to 10

MAX_COMPONENT_QUEUE = 1000  # stanzas that wait for a component which is away

# -- limits of accounts
MAX_RESOURCES = 25  # sessions per account; ejabberd has 10, but a family shares tablets
MAX_TOKENS = 25  # clients per account that may log in by a token (XEP-0484); as many as may be connected
MAX_ROSTER_ITEMS = 2000  # contacts per roster; every login reads them all
MAX_ROSTER_NAME = 1023  # characters in a contact's name or a group's; RFC 6121 §2.3.3 wants some limit
MAX_ROSTER_GROUPS = 64  # groups per contact
MAX_OFFLINE = 1000  # messages waiting per account; ejabberd has 100, too few for a holiday
MAX_REQUESTS = 500  # subscription requests waiting per account: strangers send these
MAX_REQUEST_BYTES = 2048  # of the content of one; all must fit into MAX_UNREAD, as they are sent at each login
MAX_PRIVACY_LISTS = 50  # privacy lists per account; people who use them have three
MAX_PRIVACY_RULES = 2000  # rules in all lists of an account, blocks included: each may be 3 KB; one for each contact
MAX_COPIED = 100  # ids that a session remembers of messages copied by XEP-0280, for errors about them
MAX_DIRECTED = 2000  # addresses that a session may have sent directed presence to
MAX_VCARD = 200 * 1024  # bytes of a vCard, photo included; XEP-0153 §4.6 thinks of 8 KB
MAX_PEP_NODES = 256  # nodes per account; Prosody has no limit, and people had 20 GB of strangers' data
MAX_PEP_ITEMS = 1000  # items per node, what `max_items=max` stands for; OMEMO and bookmarks need some hundred
MAX_PEP_BYTES = 4 * 1024 * 1024  # of all items of an account
MAX_PEP_SUBSCRIBERS = 500  # explicit ones per node, and as many people on its list: strangers make the former
MAX_ROOMS = 1000  # chat rooms on one server: all that are in use are in memory
MAX_ROOMS_PER_ACCOUNT = 50  # that one account has created and that still exist; Prosody and ejabberd know no limit
MAX_ROOM_OCCUPANTS = 1000  # people in one room, whatever its owner says: everything is said to each of them
ROOM_STANZAS_PER_MINUTE = 600  # that one person sends to rooms; each may go to a thousand people
MAX_ARCHIVE_BYTES = 512 * 1024 * 1024  # of an account's archive, or a room's: a million messages; the oldest go
MAX_ARCHIVE_PREFERENCES = 1000  # addresses in the lists of whose messages are archived, or not
MAX_PUSHES = 16  # app servers that wake an account's clients: one for each phone and tablet, and some old ones
MAX_PRIVATE = 100  # private XML elements per account (XEP-0049)
MAX_PRIVATE_BYTES = 1024 * 1024  # of private XML per account

# -- times, in seconds
UNAUTHENTICATED_TIMEOUT = 60.0  # to log in; Prosody gives five minutes, which invites squatters
CLOSE_TIMEOUT = 5.0  # for the peer's closing tag after ours (RFC 6120 §4.4)
SILENCE_TIMEOUT = 300.0  # without a byte from a client before it is asked (RFC 6120 §4.6.4: not more often)
ANSWER_TIMEOUT = 60.0  # for the answer to that question
RESUMPTION_TIMEOUT = 3600.0  # to come back after a cut (XEP-0198); Monal asks for an hour, Prosody gives 10 minutes
COMPONENT_PATIENCE = 30.0  # for a component that is away to come back: about as long as its restart takes
SLICE_SECONDS = 0.005  # of a turn of the loop that long work may take: nobody notices 5 ms
SHUTDOWN_TIMEOUT = 4.0  # to say goodbye to everybody: service managers get impatient after five


# ==== 2. Errors (RFC 6120 §4.9, §6.5, §8.3) ====
#
# An XMPP error is part of the conversation, not an accident. There are three kinds on the
# wire, each an exception here, raised wherever the fault is found and answered in exactly
# one place:
#
#   StanzaError   one stanza is refused, the stream goes on      answered by the dispatcher
#   SASLError     a login attempt fails, another may follow      answered by the stream
#   StreamError   the stream cannot go on: said, then closed     answered by the stream
#
# A fourth, ConfigError, is for the owner at the terminal. Any other exception is a bug of
# ours and is allowed to rise to the loop, which logs it with its traceback.


class StreamError(Exception):
    """The stream cannot go on (RFC 6120 §4.9); `condition` is one of §4.9.3.

    `application` is an element of another namespace that says more (§4.9.4).
    """

    def __init__(self, condition: str, text: str = "", application: ET.Element | None = None) -> None:
        super().__init__(condition, text)
        assert condition in STREAM_CONDITIONS, condition
        self.condition = condition
        self.text = text
        self.application = application


class SASLError(Exception):
    """A login attempt fails (RFC 6120 §6.5); `condition` is one of those listed there."""

    def __init__(self, condition: str, text: str = "") -> None:
        super().__init__(condition, text)
        assert condition in SASL_CONDITIONS, condition
        self.condition = condition
        self.text = text


class StanzaError(Exception):
    """A stanza is refused (RFC 6120 §8.3); `condition` is a key of `STANZA_CONDITIONS`.

    `kind` overrides the usual error type, `application` is an element of another
    namespace that says more (RFC 6120 §8.3.4).
    """

    def __init__(self, condition: str, text: str = "", *, kind: str = "",
                 application: ET.Element | None = None) -> None:  # fmt: skip
        super().__init__(condition, text)
        self.condition = condition
        self.text = text
        self.kind = kind or STANZA_CONDITIONS[condition].kind
        self.code = STANZA_CONDITIONS[condition].code
        self.application = application


class ConfigError(Exception):
    """The owner asked for something impossible: one line that says what and how to mend it."""


class ErrorKind(NamedTuple):
    """The usual `type` of a stanza error (RFC 6120 §8.3.3) and its old number (XEP-0086 §2)."""

    kind: str
    code: int


STANZA_CONDITIONS = {
    "bad-request": ErrorKind("modify", 400),
    "conflict": ErrorKind("cancel", 409),
    "feature-not-implemented": ErrorKind("cancel", 501),
    "forbidden": ErrorKind("auth", 403),
    "gone": ErrorKind("cancel", 302),
    "internal-server-error": ErrorKind("cancel", 500),
    "item-not-found": ErrorKind("cancel", 404),
    "jid-malformed": ErrorKind("modify", 400),
    "not-acceptable": ErrorKind("modify", 406),
    "not-allowed": ErrorKind("cancel", 405),
    "not-authorized": ErrorKind("auth", 401),
    "payment-required": ErrorKind("auth", 402),  # RFC 3920 only: understood, never sent
    "policy-violation": ErrorKind("modify", 405),  # younger than XEP-0086: its nearest number
    "recipient-unavailable": ErrorKind("wait", 404),
    "redirect": ErrorKind("modify", 302),
    "registration-required": ErrorKind("auth", 407),
    "remote-server-not-found": ErrorKind("cancel", 404),
    "remote-server-timeout": ErrorKind("wait", 504),
    "resource-constraint": ErrorKind("wait", 500),
    "service-unavailable": ErrorKind("cancel", 503),
    "subscription-required": ErrorKind("auth", 407),
    "undefined-condition": ErrorKind("cancel", 500),
    "unexpected-request": ErrorKind("wait", 400),
}

NUMBERED_CONDITIONS: Mapping[str, str] = {  # what an error means that has only a number (XEP-0086 §3)
    "302": "gone", "400": "bad-request", "401": "not-authorized", "402": "payment-required", "403": "forbidden",
    "404": "item-not-found", "405": "not-allowed", "406": "not-acceptable", "407": "registration-required",
    "408": "remote-server-timeout", "409": "conflict", "500": "internal-server-error",
    "501": "feature-not-implemented", "502": "service-unavailable", "503": "service-unavailable",
    "504": "remote-server-timeout", "510": "service-unavailable",
}  # fmt: skip

STREAM_CONDITIONS = frozenset({
    "bad-format", "bad-namespace-prefix", "conflict", "connection-timeout", "host-gone", "host-unknown",
    "improper-addressing", "internal-server-error", "invalid-from", "invalid-namespace", "invalid-xml",
    "not-authorized", "not-well-formed", "policy-violation", "remote-connection-failed", "reset",
    "resource-constraint", "restricted-xml", "see-other-host", "system-shutdown", "undefined-condition",
    "unsupported-encoding", "unsupported-feature", "unsupported-stanza-type", "unsupported-version",
})  # fmt: skip

SASL_CONDITIONS = frozenset({
    "aborted", "account-disabled", "credentials-expired", "encryption-required", "incorrect-encoding",
    "invalid-authzid", "invalid-mechanism", "malformed-request", "mechanism-too-weak", "not-authorized",
    "temporary-auth-failure",
})  # fmt: skip


# ==== 3. Elements ====
#
# A stream is one endless XML document; its children are the stanzas:
#
#     <stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams' …>
#       <message to='juliet@example.org'><body>Art thou not Romeo?</body></message>
#       <presence/>                                  … and so on, until </stream:stream>
#
# This chapter turns bytes into elements (`StreamParser`) and elements into bytes
# (`serialize`, `Stanza.wire`). XMPP forbids most of what makes XML dangerous: comments,
# processing instructions, DTDs and entities (RFC 6120 §11.1). expat is told to report all
# of these, and each of them ends the stream.
#
# Most stanzas are only passed on. A `Stanza` therefore keeps, beside its tree, the bytes
# that stood between its start and its end tag; passing it on writes a fresh start tag and
# copies the rest [measured: 8 µs saved of 43]. That is safe only under the conditions that
# `StreamParser._original` checks; otherwise the tree is written anew.

Element = ET.Element
SubElement = ET.SubElement  # builds and appends in one call
MESSAGE, PRESENCE, IQ = CLIENT("message"), CLIENT("presence"), CLIENT("iq")
STANZA_TAGS = {MESSAGE: b"<message", PRESENCE: b"<presence", IQ: b"<iq"}  # and how each begins when it has no prefix
STANZA_MARKS = {MESSAGE: ("<message", b"</message>"), PRESENCE: ("<presence", b"</presence>"), IQ: ("<iq", b"</iq>")}


def E(tag: str, attributes: Mapping[str, str] | None = None, *children: Element | str | None, **more: str) -> Element:
    """Build an element: `E(BIND("jid"), None, "romeo@example.org")`, `E(PING("ping"))`.

    A child that is a str becomes text, None is left out. `more` are attributes whose
    names are Python names; a trailing underscore is dropped, for `from_`.
    """
    element = Element(tag, dict(attributes or {}))
    for key, value in more.items():
        element.set(key.rstrip("_"), value)
    for child in children:
        if isinstance(child, str):
            if len(element):
                element[-1].tail = (element[-1].tail or "") + child
            else:
                element.text = (element.text or "") + child
        elif child is not None:
            element.append(child)
    return element


def namespace_of(tag: str) -> str:
    """Return the namespace of a qualified name: `namespace_of("{vcard-temp}vCard")` is `"vcard-temp"`."""
    return tag[1 : tag.index("}")] if tag.startswith("{") else ""


def local_name(tag: str) -> str:
    """Return the part of a qualified name behind its namespace."""
    return tag[tag.rfind("}") + 1 :]


def child_text(element: Element, tag: str) -> str:
    """Return the text of the first child called `tag`, or `""`."""
    child = element.find(tag)
    return "" if child is None else child.text or ""


# -- writing

TO_ESCAPE = re.compile("[&<>'\n\t\r]")  # in attribute values; most have nothing of it
XML_ATTRIBUTE = XML("")  # how the qualified names of xml:lang, xml:space, … begin


def escape_text(text: str) -> str:
    """Escape character data; CR too, which a parser would otherwise read as LF (XML 1.0 §2.11)."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\r", "&#13;")


def escape_attribute(value: str) -> str:
    """Escape an attribute value for single quotes; white space survives normalisation (XML 1.0 §3.3.3)."""
    value = value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("'", "&apos;")
    return value.replace("\n", "&#10;").replace("\t", "&#9;").replace("\r", "&#13;")


def serialize(element: Element, namespace: str = "") -> str:
    """Write an element, its children and their text; `namespace` is the default one around it.

    Namespaces are declared as defaults where they change, never by prefix: the dialect
    that every client understands. Only the prefix `xml` stays, whose namespace must not be
    declared (XML Names §3). Recursion is bounded by the parser's `MAX_DEPTH`.
    """
    tag = element.tag
    own = tag[1 : tag.index("}")] if tag[0] == "{" else ""
    name = tag[len(own) + 2 :] if own else tag
    if own == XML:
        own, name = namespace, f"xml:{name}"
    declaration = "" if own == namespace else f" xmlns='{escape_attribute(own)}'"
    start = f"<{name}{declaration}{_attributes(element)}"
    inside = _inside(element, own)
    return f"{start}>{inside}</{name}>" if inside else f"{start}/>"


def _inside(element: Element, namespace: str) -> str:
    parts = [escape_text(element.text)] if element.text else []
    for child in element:
        parts.append(serialize(child, namespace))
        if child.tail:
            parts.append(escape_text(child.tail))
    return "".join(parts)


def _attributes(element: Element) -> str:
    written = ""
    for key, value in element.attrib.items():
        if not value.isalnum() and TO_ESCAPE.search(value):  # asked here: a call for each would double the time
            value = escape_attribute(value)
        if key[0] != "{":
            written += f" {key}='{value}'"
        elif key.startswith(XML_ATTRIBUTE):
            written += f" xml:{local_name(key)}='{value}'"
        else:
            prefix, uri = f"ns{len(written)}", escape_attribute(namespace_of(key))
            written += f" xmlns:{prefix}='{uri}' {prefix}:{local_name(key)}='{value}'"
    return written


class Stanza(ET.Element):
    """A message, presence or iq: an element that can be addressed and passed on cheaply.

    Its tag is one of `STANZA_TAGS`, whatever content namespace it came in. Attributes may
    be set freely. Children are changed by `add` and `discard` only, which keep the copied
    bytes true.
    """

    __slots__ = ("_content", "sent_id")

    def __init__(self, tag: str, attributes: dict[str, str] | None = None, content: bytes | None = None) -> None:
        Element.__init__(self, tag, attributes or {})  # which copies them; without super(), that takes half the time
        self._content = content
        self.sent_id = ""  # under which the sender's archive has it: for its own devices only (XEP-0313 §3.5)

    @property
    def name(self) -> str:
        """`"message"`, `"presence"` or `"iq"`."""
        return self.tag[15:]  # behind "{jabber:client}"

    @property
    def content(self) -> bytes:
        """What stands between the tags, as UTF-8: the sender's own bytes, or written once from the tree."""
        if self._content is None:
            self._content = _inside(self, CLIENT).encode()
        return self._content

    def add(self, child: Element | str, written: str = "") -> None:
        """Append a child; one that is written already (a str) goes out, but is not in the tree.

        `written` may be given for an element whose XML is known, which saves working it out.
        """
        if isinstance(child, str):
            self._content = self.content + child.encode()
            return
        self.append(child)
        if self._content is not None:
            self._content += (written or serialize(child, CLIENT)).encode()

    def discard(self, unwanted: Callable[[Element], bool]) -> None:
        """Remove every child for which `unwanted(child)` is true."""
        doomed = [child for child in self if unwanted(child)]
        for child in doomed:
            self.remove(child)
        if doomed:
            self._content = None

    def addressed(self, to: str = "", sender: str = "") -> Stanza:
        """Return a copy with another `to` or `from`; the children and the bytes are shared."""
        copy = Stanza(self.tag, self.attrib, self.content)
        copy.text = self.text
        copy.extend(self)
        if to:
            copy.set("to", to)
        if sender:
            copy.set("from", sender)
        return copy

    def wire(self) -> bytes:
        """Return the stanza as it leaves on a stream whose header declares the content namespace."""
        start, end = STANZA_MARKS[self.tag]
        start += _attributes(self)
        content = self.content
        return f"{start}>".encode() + content + end if content else f"{start}/>".encode()


# -- reading

START_TAG = re.compile(rb"""<[^"'>]*(?:"[^"]*"[^"'>]*|'[^']*'[^"'>]*)*>""")  # expat doesn't report where one ends
MAX_NAME = 1024  # characters of a qualified name: expat and Python remember every name that they meet
MAX_NAMES = 10_000  # different names in one stream, for the same reason; real clients use a few hundred
MAX_PREFIXES = 1000  # different namespace prefixes in one stream; likewise
STUBBORN_READS = 64  # reads that bring no end to a tag, before parsing it anew waits for more (CVE-2023-52425)

CONTENT_NAMESPACES = frozenset({CLIENT, SERVER, COMPONENT, HTTP_BIND})

EXPAT_CONDITIONS = {
    expat.errors.codes[expat.errors.XML_ERROR_UNDEFINED_ENTITY]: "restricted-xml",
    expat.errors.codes[expat.errors.XML_ERROR_MISPLACED_XML_PI]: "restricted-xml",
    expat.errors.codes[expat.errors.XML_ERROR_UNKNOWN_ENCODING]: "unsupported-encoding",
    expat.errors.codes[expat.errors.XML_ERROR_INCORRECT_ENCODING]: "unsupported-encoding",
}  # every other error of expat's means not-well-formed


class QualifiedNames(dict[str, str]):
    """Turns expat's `uri}local` into ElementTree's `{uri}local` by `names[name]`; bounded, and shared by all streams.

    One content namespace is used inside; each stream restores its own. A dict with
    `__missing__` answers in C what it knows [measured: 1 µs per message less than a call].
    """

    MOST: ClassVar[int] = 4096  # names, of at most MAX_NAME characters

    def __init__(self, content_namespace: str) -> None:
        super().__init__()
        self.content_namespace = content_namespace

    def __missing__(self, name: str) -> str:
        """Work a name out, and remember it; raises StreamError for one that is too long."""
        if len(name) > MAX_NAME:
            raise StreamError("policy-violation", "name too long")
        if len(self) >= self.MOST:
            self.clear()
        uri, brace, local = name.rpartition("}")
        self[name] = tag = CLIENT(local) if uri == self.content_namespace else f"{{{uri}}}{local}" if brace else name
        return tag


QUALIFIED: Mapping[str, QualifiedNames] = {name: QualifiedNames(name) for name in CONTENT_NAMESPACES}
EXPAT_HANDLERS = tuple(name for name in dir(expat.ParserCreate()) if "Handler" in name)


@dataclass(slots=True, frozen=True)
class Opened:
    """The peer's stream header (RFC 6120 §4.7): its tag, attributes, and declared prefixes (`None`: the default)."""

    tag: str
    attributes: dict[str, str]
    prefixes: dict[str | None, str]


@dataclass(slots=True, frozen=True)
class Closed:
    """The peer's closing tag, `</stream:stream>` (RFC 6120 §4.4)."""


Event = Opened | Element | Closed | StreamError


class StreamParser:
    """Bytes in, events out: the header, each complete first-level element, the closing tag, or what is wrong.

        parser.feed(b"<stream:stream …><presence/>")
        parser.next()  ->  Opened(…);  then the Stanza;  then None

    Events wait until `next` takes them, so an error never swallows the stanzas before it,
    and a stream that restarts (RFC 6120 §4.3.3) takes over what it has not read by `rest`.
    `max_stanza` and `max_elements` may be raised while the stream goes on. `generous` is for
    what has passed these limits before, and has grown a little since.
    """

    def __init__(self, content_namespace: str = CLIENT, *, max_stanza: int = MAX_STANZA,
                 max_elements: int = MAX_ELEMENTS, generous: bool = False) -> None:  # fmt: skip
        self.max_stanza = max_stanza
        self.max_elements = max_elements
        times = 2 if generous else 1
        self._max_attributes, self._max_names, self._max_prefixes = (
            times * limit for limit in (MAX_ATTRIBUTES, MAX_NAMES, MAX_PREFIXES))  # fmt: skip
        self._names = QUALIFIED[content_namespace]
        self._stack: list[Element] = []
        self._last: Element | None = None  # the element that ended last: text belongs behind it
        self._elements = 0
        self._prefixes: dict[str | None, str] = {}
        self._plain = True  # the header declares no prefixes that a stanza's bytes might rely on
        self._portable = True  # nor does the current stanza's start tag; no child names a content namespace
        self._events: list[tuple[Event, int]] = []  # with the offset where each one ends; an empty deque takes 760
        self._failed = False
        self._kept: bytes | bytearray = b""  # the input from `_kept_at` on: unfinished, or not yet taken
        self._kept_at = 0
        self._total = 0  # bytes given to expat so far; all offsets count from the stream's first byte
        self._mark = 0  # where the last complete event ended
        self._began = 0  # where the current first-level element began
        self._taken = 0  # where the last event that `next` gave ended
        self._held = bytearray()  # input that waits, see STUBBORN_READS
        self._stuck_at, self._stuck_reads = -1, 0
        self._parser: expat.XMLParserType | None = None  # made for the first byte: see `_make_parser`
        self._header = b""  # the stream's start tag, for a parser that has to be made anew: see `doze`

    def _make_parser(self) -> expat.XMLParserType:
        # Not before there is something to parse: it takes 5 KB, which are not for strangers who say nothing (threat
        # S10). defusedxml's parser rather than a bare one, for whatever it learns to defend against; but all handlers
        # are ours [measured: its own would keep the whole stream as one tree].
        from defusedxml.ElementTree import DefusedXMLParser

        parser: expat.XMLParserType = DefusedXMLParser(forbid_dtd=True, encoding="utf-8").parser
        for handler in EXPAT_HANDLERS:
            setattr(parser, handler, None)
        parser.Parse(self._header, False)  # after a doze; nobody hears it
        parser.buffer_size = 256  # bytes of text gathered before they are reported; the default keeps 8192 per stream
        parser.buffer_text = True
        parser.ordered_attributes = False
        if hasattr(parser, "SetReparseDeferralEnabled"):  # expat ≥ 2.6 would hold a complete stanza back
            parser.SetReparseDeferralEnabled(False)
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        parser.StartNamespaceDeclHandler = self._declare
        parser.XmlDeclHandler = self._xml_declaration
        restricted = self._restricted  # one for all: each mention would make another
        for handler in ("CommentHandler", "ProcessingInstructionHandler", "StartDoctypeDeclHandler",
                        "EntityDeclHandler", "ExternalEntityRefHandler", "UnparsedEntityDeclHandler",
                        "SkippedEntityHandler"):  # fmt: skip
            setattr(parser, handler, restricted)
        return parser

    def feed(self, data: bytes) -> None:
        """Take the next bytes from the peer, cut anywhere."""
        if self._failed and self._events:
            self._keep(data)  # the stream may restart before it comes to the error
        if self._failed or not data:
            return
        if not self._total:
            data = data.lstrip(b" \t\r\n")  # the old stream's last white space must not spoil the new header
            if not data:
                return
        if self._total < 4 and self._fails_by_its_first_bytes(data):
            return
        if self._total == self._mark and self._stack and not data.strip(b" \t\r\n"):
            return  # white space between stanzas only says "I am here" (RFC 6120 §4.6.1)
        if self._stuck_reads > STUBBORN_READS and self._should_wait(data):
            self._held += data
            return
        if self._held:
            data, self._held = bytes(self._held) + data, bytearray()
        self._keep(data)
        self._parse(data)

    def feed_whole(self, data: bytes) -> None:
        """Take exactly one first-level element: what a message of a framed stream has to be (RFC 7395 §3.3.3)."""
        before = len(self._events)
        self.feed(data)
        is_whole = len(self._stack) == 1 and not self._held and not self._kept[self._mark - self._kept_at :].strip()
        if len(self._events) == before + 1 and is_whole and not self._failed:
            return
        error = StreamError("not-well-formed", "a message holds one element, and all of it")
        while len(self._events) > before:
            event, _ = self._events.pop()
            error = event if isinstance(event, StreamError) else error
        self._fail(error)

    def _fails_by_its_first_bytes(self, data: bytes) -> bool:
        """Refuse what expat would silently take: UTF-16, and U+FEFF as a byte order mark (RFC 6120 §11.6)."""
        if 0 in data[: 4 - self._total] or (not self._total and data[0] in b"\xfe\xff"):
            self._fail(StreamError("unsupported-encoding"))
        elif not self._total and data[0] == 0xEF:
            self._fail(StreamError("not-well-formed"))
        return self._failed

    def _should_wait(self, data: bytes) -> bool:
        """Tell whether a tag that comes in crumbs is to be parsed again only later.

        It can't end without a `>`; and when there are suspiciously many of these, only each
        doubling of what is there is worth a look, so that the work stays linear.
        """
        if b">" in data and self._stuck_reads < 8 * STUBBORN_READS:
            return False
        return len(self._held) + len(data) < self._total - self._stuck_at

    def _keep(self, data: bytes) -> None:
        if self._events:  # the stream has stopped to wait for something: nothing may go
            self._kept = bytearray(self._kept) + data
        elif self._mark == self._total:
            self._kept, self._kept_at = data, self._total
        else:
            if not isinstance(self._kept, bytearray):
                self._kept = bytearray(self._kept)
            del self._kept[: self._mark - self._kept_at]
            self._kept_at = self._mark
            self._kept += data

    def _parse(self, data: bytes) -> None:
        self._total += len(data)
        parser = self._parser = self._parser or self._make_parser()
        try:
            parser.Parse(data, False)
        except StreamError as error:
            return self._fail(error.with_traceback(None))  # which would refer to this very object
        except expat.ExpatError as error:
            return self._fail(StreamError(EXPAT_CONDITIONS.get(error.code, "not-well-formed")))
        if self._total - self._mark > self.max_stanza:
            if self._kept[self._mark - self._kept_at :].strip():
                return self._fail(StreamError("policy-violation", "stanza too big"))
            self._mark = self._total  # a long run of white space is reported where it begins
        position = parser.CurrentByteIndex
        is_stuck = self._total != self._mark and position == self._stuck_at
        self._stuck_reads = self._stuck_reads + 1 if is_stuck else 0
        self._stuck_at = position
        if len(parser.intern) > self._max_names or len(self._prefixes) > self._max_prefixes:
            self._fail(StreamError("policy-violation", "too many different names"))

    def _fail(self, error: StreamError) -> None:
        self._failed = True
        if not (self._events and isinstance(self._events[-1][0], Closed)):  # junk behind the end is just junk
            self._events.append((error, self._total))

    def next(self) -> Event | None:
        """Return the next event, or None when more bytes are needed first."""
        if not self._events:
            return None
        event, self._taken = self._events.pop(0)
        return event

    def rest(self) -> bytes:
        """Return the bytes behind the last event taken: the first ones of a restarted stream."""
        return bytes(self._kept[max(0, self._taken - self._kept_at) :]) + self._held

    def doze(self) -> bool:
        """Let go of expat between two stanzas, until there is something to parse; tell whether it could be done.

        A stream that is silent saves 13 KB by that, a third of a session; waking up takes as long as parsing
        three messages [both measured].
        """
        if self._parser is None or self._failed or self._events or self._held or len(self._stack) != 1:
            return False
        if self._kept[self._mark - self._kept_at :].strip():
            return False  # in the middle of something
        self._parser, self._kept = None, b""
        self._total = self._mark = self._kept_at = self._taken = len(self._header)
        self._stuck_at, self._stuck_reads = -1, 0
        return True

    def close(self) -> None:
        """Let go of expat, whose handlers would otherwise keep this object alive until a garbage collection."""
        self._failed = True
        for handler in EXPAT_HANDLERS if self._parser is not None else ():
            setattr(self._parser, handler, None)

    # -- expat's handlers: they only collect, since stopping expat half-way is for errors

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        stack = self._stack
        self._elements += 1
        if len(stack) > MAX_DEPTH or self._elements > self.max_elements:
            raise StreamError("policy-violation", "too many elements, levels or attributes")
        if attributes:
            attributes = self._checked(attributes)
        if len(stack) > 1:
            element = SubElement(stack[-1], self._names[name], attributes)
        else:
            element = self._start_of_stream(self._names[name], attributes)
        stack.append(element)
        self._last = None

    def _checked(self, attributes: dict[str, str]) -> dict[str, str]:
        if len(attributes) > self._max_attributes:
            raise StreamError("policy-violation", "too many elements, levels or attributes")
        for name in attributes:
            if "}" in name or len(name) > MAX_NAME:
                return {self._names[name]: value for name, value in attributes.items()}
        return attributes

    def _start_of_stream(self, tag: str, attributes: dict[str, str]) -> Element:
        """The stream's header, or a first-level element."""
        if not self._stack:
            return self._open(tag, attributes)
        self._began = self._position()
        return Stanza(tag, attributes) if tag in STANZA_TAGS else Element(tag, attributes)

    def _position(self) -> int:
        assert self._parser is not None
        return self._parser.CurrentByteIndex

    def _open(self, tag: str, attributes: dict[str, str]) -> Element:
        prefixes = dict(self._prefixes)
        self._plain = not (prefixes.keys() - {None, "stream", "db"})
        header = START_TAG.match(self._kept, self._position() - self._kept_at)
        assert header is not None
        self._header = header.group()
        self._finish(Opened(tag, attributes, prefixes), self._total)
        self._mark = self._position()
        return Element(tag, attributes)

    def _end(self, name: str) -> None:
        self._last = element = self._stack.pop()
        if len(self._stack) == 1:
            self._complete(element)
        elif not self._stack:
            self._finish(Closed(), self._total)

    def _text(self, data: str) -> None:
        if len(self._stack) < 2:
            if data.strip(" \t\r\n") and not self._failed:  # `close` makes expat hand out what it has buffered
                raise StreamError("bad-format", "text between stanzas")
            self._mark = self._position()  # text is reported at the next event: here it ends
        elif self._last is not None:
            self._last.tail = (self._last.tail or "") + data
        else:
            top = self._stack[-1]
            top.text = (top.text or "") + data

    def _declare(self, prefix: str | None, uri: str) -> None:
        depth = len(self._stack)  # of what encloses the element whose start tag declares this
        if (depth == 1 and prefix is not None) or (depth > 1 and uri in CONTENT_NAMESPACES):
            self._portable = False
        if prefix not in self._prefixes and len(self._prefixes) <= self._max_prefixes:
            self._prefixes[prefix] = uri

    def _xml_declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.lower() != "utf-8":
            raise StreamError("unsupported-encoding")

    def _restricted(self, *found: object) -> None:
        raise StreamError("restricted-xml")

    def _complete(self, element: Element) -> None:
        """File a finished first-level element, with the bytes between its tags if they can be passed on."""
        index, kept = self._position() - self._kept_at, self._kept
        start = START_TAG.match(kept, self._began - self._kept_at)
        assert start is not None
        empty = kept[start.end() - 2] == ord("/")
        end = start.end() if empty else kept.index(b">", index) + 1
        if self._kept_at + end - self._began > self.max_stanza:
            raise StreamError("policy-violation", "stanza too big")
        if isinstance(element, Stanza):
            content = b"" if empty else bytes(kept[start.end() : index])
            if self._original(element, start.group(), content):
                element._content = content
        self._elements, self._portable = 0, True
        self._finish(element, self._kept_at + end)

    def _original(self, stanza: Stanza, start: bytes, content: bytes) -> bool:
        """Tell whether `content` means the same on any other stream, and is harmless there (threats: smuggling).

        It must not rely on a prefix or a namespace that is declared outside of it, must
        not name a content namespace, and must not hide anything in CDATA.
        """
        if not (self._plain and self._portable and start.startswith(STANZA_TAGS[stanza.tag])):
            return False
        if b"stream:" in content or b"db:" in content or b"<!" in content:
            return False
        return content.isascii() or _is_utf8(content)

    def _finish(self, event: Event, end: int) -> None:
        self._mark = end
        self._events.append((event, end))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def parse_elements(documents: Iterable[str]) -> list[Element]:
    """Read elements that this server wrote (or an owner edited), under the same rules as the wire.

    Each document is one for itself: what strangers have sent must not add up to a limit.
    Unqualified names are in `jabber:client`. Raises `StreamError`.
    """
    elements: list[Element] = []
    for document in documents:
        parser = StreamParser(max_stanza=sys.maxsize, max_elements=sys.maxsize, generous=True)
        parser.feed(f"<stream xmlns='{CLIENT}'>".encode())
        parser.feed(document.encode())
        while (event := parser.next()) is not None:
            if isinstance(event, StreamError):
                raise event
            if isinstance(event, Element):
                elements.append(event)
        parser.close()
    return elements


def parse_element(document: str) -> Element:
    """Read one element; raises `StreamError` when it is not exactly one."""
    elements = parse_elements([document])
    if len(elements) != 1:
        raise StreamError("bad-format", "expected one element")
    return elements[0]


# -- answers


def error_element(error: StanzaError, by: str = "") -> Element:
    """Build `<error/>` with the condition, its old number (XEP-0086) and its text (RFC 6120 §8.3.2)."""
    element = E(CLIENT("error"), {"code": str(error.code), "type": error.kind}, E(STANZA_ERRORS(error.condition)))
    if by:
        element.set("by", by)
    if error.text:
        element.append(E(STANZA_ERRORS("text"), {XML_LANG: "en"}, error.text))
    if error.application is not None:
        element.append(error.application)
    return element


def error_reply(stanza: Stanza, error: StanzaError, by: str = "") -> Stanza:
    """Return the error that answers `stanza` (RFC 6120 §8.3.1): addresses swapped, id kept, payload not echoed.

    The payload stays out because it may hold a password (XEP-0078 §3.1) or be the very
    thing that was too large.
    """
    reply = Stanza(stanza.tag, {"type": "error"})
    for ours, theirs in (("to", "from"), ("from", "to"), ("id", "id")):
        if (value := stanza.get(theirs)) is not None:
            reply.set(ours, value)
    reply.add(error_element(error, by))
    return reply


def error_condition(stanza: Stanza) -> str:
    """Return the condition of an error stanza (RFC 6120 §8.3.2), from its old number if need be; "" for none."""
    error = stanza.find(CLIENT("error"))
    if error is None:
        return ""
    found = (child.tag for child in error if namespace_of(child.tag) == STANZA_ERRORS)
    condition = next((tag for tag in found if tag != STANZA_ERRORS("text")), "")
    return local_name(condition) if condition else NUMBERED_CONDITIONS.get(error.get("code", ""), "")


def stamp(moment: datetime | float | None = None) -> str:
    """Write a moment (aware datetime, or seconds since 1970; default now) as XEP-0082 wants: UTC with `Z`."""
    if moment is None:
        moment = time.time()
    if not isinstance(moment, datetime):
        moment = datetime.fromtimestamp(moment, UTC)
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_stamp(text: str) -> datetime:
    """Read an XEP-0082 DateTime, with any offset and fraction, as an aware UTC datetime; raises `ValueError`."""
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    if moment.tzinfo is None:
        raise ValueError(f"no time zone in {text!r}")
    return moment.astimezone(UTC)


# ==== 4. Addresses (RFC 7622, RFC 6122) ====
#
# An XMPP address, a JID, names an account, one of its sessions, or a service:
#
#     juliet@example.com/balcony      localpart @ domainpart / resourcepart
#
# Only the domainpart must be there. Split first, at the first "/" and then at the first
# "@" before it; prepare afterwards: another order lets characters which decompose to "@"
# or "/" move the borders (RFC 7622 §3.1).
#
# Two addresses are equal when their prepared forms are equal, byte for byte. A JID object
# is always prepared, so everything else here compares and stores JIDs without a thought.
# Preparation is stringprep (RFC 3454) as in RFC 6122: characters are mapped, normalised,
# then some are refused. RFC 7622 replaced it by PRECIS; the two agree on nearly all that
# is used, and where they don't (`ß` is `ss` here) the old one is what the other servers of
# the network do, and it gives one account to names that look alike. Its tables stop at
# Unicode 3.2 and never change, so an address that is stored today is the same address
# after an upgrade of Python. Younger characters pass in resourceparts, for nicknames
# (emoji); in localparts and domains nobody could say what their canonical form is.
#
# Left out: U-labels of IDNA2008 that IDNA2003 cannot write (`straße.de`) stay A-labels.

MAX_PART = 1023  # bytes of UTF-8 in each part of a JID (RFC 7622 §3.1); characters before preparation
MAX_DOMAIN = 253  # bytes of a domain name in its ASCII form (RFC 1034 §3.1, as text)
MAX_LABEL = 63  # bytes of a label in its ASCII form
ADDRESS_CACHE = 4 * 1024 * 1024  # bytes of parsed addresses: some ten thousand, whoever sends them

# RFC 3454 table B.1: soft hyphens, joiners, variation selectors: invisible, so mapped to nothing.
MAPPED_TO_NOTHING: Mapping[int, str | None] = dict.fromkeys([
    0xAD, 0x34F, 0x1806, *range(0x180B, 0x180E), *range(0x200B, 0x200E), 0x2060, *range(0xFE00, 0xFE10), 0xFEFF,
])  # fmt: skip

# RFC 4013 §2.1 maps the spaces of table C.1.2 to U+0020. U+200B is in both tables: a space here, as in libidn.
MAPPED_BY_SASLPREP: Mapping[int, str | None] = {
    **MAPPED_TO_NOTHING,
    **dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200C), 0x202F, 0x205F, 0x3000], " "),
}

# RFC 3454 §5, as the inside of a regular expression's [...]: one search instead of nine look-ups per character.
PROHIBITED = (
    r"\u00a0\u1680\u2000-\u200b\u202f\u205f\u3000"  # C.1.2 spaces other than U+0020
    r"\u0000-\u001f\u007f"  # C.2.1 ASCII controls
    r"\u0080-\u009f\u06dd\u070f\u180e\u200c\u200d\u2028\u2029\u2060-\u2063\ufeff\U0001d173-\U0001d17a"  # C.2.2 others
    r"\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd"  # C.3 private use
    r"\ufdd0-\ufdef" + "".join(rf"\U{plane:04x}fffe\U{plane:04x}ffff" for plane in range(17)) +  # C.4 noncharacters
    r"\ud800-\udfff"  # C.5 surrogates: no UTF-8 carries them
    r"\ufff9-\ufffd"  # C.6 not plain text
    r"\u2ff0-\u2ffb"  # C.7 ideographic description
    r"\u0340\u0341\u200e\u200f\u202a-\u202e\u206a-\u206f"  # C.8 change the display
    r"\U000e0001\U000e0020-\U000e007f"  # C.9 tags
    # Younger than the tables and of the same kinds, which RFC 8264 §9.13 calls ignorable: they hide in a nickname.
    r"\u061c\u180f\u2064-\u2069\ufff0-\ufff8\U0001bca0-\U0001bca3\U000e0000-\U000e0fff"
)  # fmt: skip


@functools.lru_cache(4096)  # characters; all alphabets in daily use, some 400 kB
def fold_character(character: str) -> str:
    """Return the lower case of one character (RFC 3454 table B.2), of one or more characters.

    A capital whose small letter is younger than Unicode 3.2 (Georgian, Cherokee) has none
    in that table, though Python knows one today.
    """
    folded = stringprep.map_table_b2(character)
    return character if any(map(stringprep.in_table_a1, folded)) else folded


class Profile:
    """A profile of stringprep (RFC 3454): how one kind of text is brought into its only form.

    `plain` matches the ASCII text for which all the tables come to nothing more than
    lower case, which is the usual case and costs a microsecond.
    """

    def __init__(
        self,
        what: str,
        *,
        plain: str,
        prohibited: str = "",
        mapping: Mapping[int, str | None] = MAPPED_TO_NOTHING,
        fold: bool = False,
        younger: bool = False,
    ) -> None:
        self.what = what  # what the text is, for error messages
        self.plain = re.compile(plain)
        self.prohibited = re.compile(f"[{PROHIBITED}{prohibited}]")
        self.mapping = mapping
        self.fold = fold  # capitals and small letters are the same
        self.younger = younger  # code points unassigned in Unicode 3.2 pass

    def prepare(self, text: str) -> str:
        """Return the prepared form of `text`, 1 to 1023 bytes of UTF-8; raise ValueError if it has none.

        Stricter than the RFCs in one point: a text of more than 1023 characters is refused
        before it costs time, even if it would shrink. Nothing is ever cut.
        """
        if not text:
            raise ValueError(f"the {self.what} is empty")
        if len(text) > MAX_PART:
            raise ValueError(f"the {self.what} is longer than {MAX_PART} bytes")
        if self.plain.fullmatch(text):
            return text.lower() if self.fold else text
        prepared = self.prepare_unicode(text)
        # A prepared address is parsed again wherever it goes; it must not become another one there.
        if prepared != text and self.prepare_unicode(prepared) != prepared:
            raise ValueError(f"the {self.what} has no stable form")
        return prepared

    def prepare_unicode(self, text: str) -> str:
        """Map, normalise, prohibit, check directions: the steps of RFC 3454 §2, in its order."""
        mapped = text.translate(self.mapping)
        if not self.younger and any(map(stringprep.in_table_a1, mapped)):
            raise ValueError(f"the {self.what} contains a character younger than Unicode 3.2")
        if self.fold:
            mapped = "".join(map(fold_character, mapped))
        prepared = unicodedata.ucd_3_2_0.normalize("NFKC", mapped)
        if not prepared:
            raise ValueError(f"the {self.what} is empty once invisible characters are removed")
        if found := self.prohibited.search(prepared):
            raise ValueError(f"the {self.what} contains U+{ord(found.group()):04X}, which is not allowed there")
        if len(prepared.encode()) > MAX_PART:
            raise ValueError(f"the {self.what} is longer than {MAX_PART} bytes")
        self.check_directions(prepared)
        return prepared

    def check_directions(self, text: str) -> None:
        """RFC 3454 §6: text with letters of a right-to-left script has no others, and begins and ends with one.

        Younger characters have no direction in Unicode 3.2: they may stand anywhere.
        """
        directions = [direction for direction in map(unicodedata.ucd_3_2_0.bidirectional, text) if direction]
        if not {"R", "AL"}.intersection(directions):
            return
        if "L" in directions or not {directions[0], directions[-1]} <= {"R", "AL"}:
            raise ValueError(f"the {self.what} mixes directions of writing")


# RFC 6122 Appendix A. ASCII space is table C.1.1; the eight others would be taken for XML, a URI or separators.
NODEPREP = Profile("localpart", plain=r"[!#-%(-.0-9;=?A-~]+", prohibited=r" \"&'/:<>@", fold=True)
# RFC 3491, with the ASCII that RFC 3490's UseSTD3ASCIIRules forbids, and the ideographic full stop, a separator.
NAMEPREP = Profile("domain label", plain=r"[a-zA-Z0-9-]+", prohibited=r"\u0000-,./:-@\[-`{-\u007f\u3002", fold=True)
# RFC 6122 Appendix B.
RESOURCEPREP = Profile("resourcepart", plain=r"[!-~][ -~]*", younger=True)
# RFC 4013, for passwords and the user names of SASL.
SASLPREP = Profile("text", plain=r"[ -~]+", mapping=MAPPED_BY_SASLPREP)

IDENTIFIER_CATEGORIES = frozenset({"Ll", "Lu", "Lo", "Lm", "Mn", "Mc", "Nd"})  # RFC 8264 §9.1


def prepare_local(text: str) -> str:
    """Return a localpart prepared by Nodeprep (RFC 6122 §2.3); raise ValueError if it is none."""
    return NODEPREP.prepare(text)


def prepare_account_name(text: str) -> str:
    """Return a localpart that may become a new account here; raise ValueError otherwise.

    Stricter than `prepare_local`: other servers may name their accounts by chess pieces,
    but RFC 7622 §3.3 wants letters, marks and digits beyond ASCII (RFC 8264 §4.2).
    """
    prepared = prepare_local(text)
    for character in prepared:
        if not character.isascii() and unicodedata.ucd_3_2_0.category(character) not in IDENTIFIER_CATEGORIES:
            raise ValueError(f"U+{ord(character):04X} cannot be part of a new account's name")
    return prepared


def prepare_resource(text: str) -> str:
    """Return a resourcepart prepared by Resourceprep (RFC 6122 §2.4); raise ValueError if it is none.

    A leading space, which Resourceprep allows, is refused (RFC 7622 §3.5, example 18).
    """
    prepared = RESOURCEPREP.prepare(text)
    if prepared.startswith(" "):
        raise ValueError("the resourcepart begins with a space")
    return prepared


def saslprep(text: str) -> str:
    """Return a password or a user name of SASL prepared by RFC 4013, never empty; raise ValueError if it has no form.

    Stored strings: code points unassigned in Unicode 3.2 are refused (§2.5).
    """
    return SASLPREP.prepare(text)


# -- domains (RFC 7622 §3.2, RFC 6122 §2.2, RFC 3490 §4)
SEPARATORS = re.compile("[.\u3002\uff0e\uff61]")  # RFC 3490 §3.1
ACE_PREFIX = "xn--"  # begins an A-label, the ASCII form of a label (RFC 3490 §5)
PLAIN_DOMAIN = re.compile(r"(?!.*xn--)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*")


def prepare_domain(text: str) -> str:
    """Return a domainpart prepared: small letters, U-labels, no dot at the end; raise ValueError if it is none.

    IP addresses are domainparts too, those of version 6 in brackets and here in the form
    of RFC 5952. A zone ("%25eth0", RFC 6874) is refused: it means nothing on another
    machine. So is an underscore, by RFC 6122 §2.2 and RFC 7622 §3.2.1 alike.
    """
    if text.startswith("["):
        return prepare_address_literal(text)
    if len(text) > MAX_PART:
        raise ValueError(f"the domainpart is longer than {MAX_PART} bytes")
    name = SEPARATORS.sub(".", text).removesuffix(".")
    if len(name) <= MAX_DOMAIN and PLAIN_DOMAIN.fullmatch(plain := name.lower()):
        return plain
    labels = [prepare_label(label) for label in name.split(".")]
    if len(".".join(map(to_ascii, labels))) > MAX_DOMAIN:
        raise ValueError(f"the domainpart is longer than {MAX_DOMAIN} bytes in DNS")
    return ".".join(labels)


def prepare_address_literal(text: str) -> str:
    """Return "[::1]" for "[0:0::1]" (RFC 3986 §3.2.2, RFC 5952)."""
    if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\]", text):
        raise ValueError("the domainpart is not an IPv6 address in brackets")
    try:
        packed = socket.inet_pton(socket.AF_INET6, text[1:-1])
    except OSError:
        raise ValueError("the domainpart is not an IPv6 address in brackets") from None
    return f"[{socket.inet_ntop(socket.AF_INET6, packed)}]"


def prepare_label(text: str) -> str:
    """Return one label of a domain as a U-label where it has one; raise ValueError if it is no label."""
    label = NAMEPREP.prepare(text)
    to_ascii(label)
    return to_unicode(label) if label.startswith(ACE_PREFIX) else label


def to_ascii(label: str) -> str:
    """Return the ASCII form of a prepared label, as DNS has it (RFC 3490 §4.1, steps 3 to 8); raise ValueError."""
    if label.startswith("-") or label.endswith("-"):
        raise ValueError("a label of the domainpart begins or ends with a hyphen")
    if not label.isascii():
        if label.startswith(ACE_PREFIX):
            raise ValueError("a label of the domainpart begins like an A-label but is none")
        if len(label) <= MAX_LABEL:  # Punycode takes time by the square of the length
            label = ACE_PREFIX + label.encode("punycode").decode("ascii")
    if len(label) > MAX_LABEL:
        raise ValueError(f"a label of the domainpart is longer than {MAX_LABEL} bytes")
    return label


def to_unicode(label: str) -> str:
    """Return the U-label of an A-label, or `label` itself where IDNA2003 knows none (RFC 3490 §4.2: never fails)."""
    try:
        decoded = label.removeprefix(ACE_PREFIX).encode("ascii").decode("punycode")
        is_equivalent = NAMEPREP.prepare(decoded) == decoded and to_ascii(decoded) == label
    except ValueError:
        return label
    return decoded if is_equivalent else label


# -- the address
class AddressCache:
    """The addresses parsed lately, by the text they came as; bounded in bytes, since anybody may invent addresses.

    Two generations: what is new or used again goes to `young`. When that is half of the
    bytes, it becomes the old one and the old one is forgotten. So a hit is one look-up,
    and nothing is written to keep an order.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self.bytes = 0  # of the young generation
        self.young: dict[str, JID] = {}
        self.old: dict[str, JID] = {}

    def add(self, text: str, jid: JID) -> None:
        """Remember that `text` means `jid`."""
        self.bytes += 250 + sum(map(sys.getsizeof, (text, *jid)))  # 250: the tuple and its place in the dict
        self.young[text] = jid
        if self.bytes > self.limit // 2:
            self.old, self.young, self.bytes = self.young, {}, 0


ADDRESSES = AddressCache(ADDRESS_CACHE)


class JID(NamedTuple):
    """An address, all parts prepared; an absent part is "".

    Make one from text by `parse`; by its parts only if they are prepared already.
    """

    local: str
    domain: str
    resource: str

    @staticmethod
    def parse(text: str) -> JID:
        """Return the address that `text` means; raise StanzaError("jid-malformed") if none (RFC 7622 §3)."""
        try:
            return ADDRESSES.young[text]
        except KeyError:
            jid = ADDRESSES.old.get(text) or parse_address(text)
        ADDRESSES.add(text, jid)
        return jid

    def __str__(self) -> str:
        local, domain, resource = self
        if local:
            return f"{local}@{domain}/{resource}" if resource else f"{local}@{domain}"
        return f"{domain}/{resource}" if resource else domain

    @property
    def bare(self) -> JID:
        """The address without its resourcepart."""
        return JID(self.local, self.domain, "") if self.resource else self

    @property
    def is_bare(self) -> bool:
        """Whether there is no resourcepart."""
        return not self.resource

    def with_resource(self, resource: str) -> JID:
        """Return this address with another resourcepart, which is prepared; raise StanzaError("jid-malformed")."""
        try:
            return JID(self.local, self.domain, prepare_resource(resource))
        except ValueError as problem:
            raise StanzaError("jid-malformed", str(problem)) from None


def parse_address(text: str) -> JID:
    """Return what `JID.parse` returns, without looking into the cache."""
    address, slash, resource = text.partition("/")
    local, at, domain = address.partition("@") if "@" in address else ("", "", address)
    try:
        return JID(
            prepare_local(local) if at else "",
            prepare_domain(domain),
            prepare_resource(resource) if slash else "",
        )
    except ValueError as problem:
        raise StanzaError("jid-malformed", str(problem)) from None


# -- what a localpart cannot contain, as text that it can (XEP-0106)
ESCAPED = re.compile(r"""[ "&'/:<>@]|\\(?=2[0267f]|3[ace]|40|5c)""")
ESCAPES = re.compile(r"\\(?:(?<!^\\)20(?!\Z)|2[267f]|3[ace]|40|5c)")


def escape_local(text: str) -> str:
    """Return `text`, such as a mail address, with what no localpart may contain escaped ("@" is `\\40`; §3.2).

    A backslash is escaped only where it would be taken for an escape (§4.2). Raises
    ValueError for a space at either end (§4.1 rule 6).
    """
    if text.startswith(" ") or text.endswith(" "):
        raise ValueError("a localpart cannot begin or end with a space, even escaped")
    return ESCAPED.sub(lambda found: f"\\{ord(found.group()):02x}", text)


def unescape_local(local: str) -> str:
    """Return the text that an escaped localpart stands for (§3.3); to be shown, never to be compared (§4.1)."""
    return ESCAPES.sub(lambda found: chr(int(found.group()[1:], 16)), local)


# ==== 5. Forms and pages (XEP-0004, XEP-0059) ====
#
# Two small vocabularies that many extensions speak.
#
# A form asks a person for settings; the same element carries the questions, the answers
# and tables of results. Rooms, nodes, registration and commands are configured by it:
#
#     S: <x xmlns='jabber:x:data' type='form'>
#          <field var='FORM_TYPE' type='hidden'><value>http://…/muc#roomconfig</value></field>
#          <field var='muc#roomconfig_persistentroom' type='boolean' label='Keep the room?'><value>0</value></field>
#        </x>
#     C: <x xmlns='jabber:x:data' type='submit'>
#          <field var='muc#roomconfig_persistentroom'><value>1</value></field>
#        </x>
#
# A feature describes its questions once, as a `FormTemplate`: `fill` makes the form to be
# sent, `read` turns what came back into checked Python values. What was not sent keeps its
# value (§3.5), what nobody asked for is ignored (§3.1), so a new client and an old server
# understand each other. What is wrong is refused as a whole, with the name of the field.
#
# A page is a part of a long list, asked for by `<set/>` beside the question proper. It is
# named by the item before or after it, not by a number, so that the list may grow meanwhile.
#
# Left out: XEP-0122 but for whole numbers; the other validations are written in code.

FORM_TYPE = "FORM_TYPE"  # the hidden field that says what a form is about (XEP-0068)
FORM_TYPES = frozenset({"form", "submit", "cancel", "result"})
MAX_FORM_TEXT = 16 * 1024  # characters in one submitted field: a long description, and a bound for what is stored
MAX_PAGE = 100  # items in one page unless the caller says otherwise; asking for more gives this many


@dataclass(frozen=True, slots=True)
class Field:
    """One question of a form, one answer to it, or one column of a table (XEP-0004 §3.2, §3.3).

    In a template, `value` is the default. Its Python type follows from the field's:

        boolean                            bool
        text-single, text-private, hidden  str; int if the field has `numbers`
        text-multi                         list[str], its lines (a str is taken apart)
        list-single                        str, one of `options`; or an int within `numbers`
        list-multi                         list[str], some of `options`
        jid-single                         JID, or None for nobody
        jid-multi                          list[JID], without repetitions
        fixed                              str, a heading; needs no `var`

    In a form from the wire it is always the list[str] of what stood in its `<value/>`s,
    and `type` is "" if the sender left it out.
    """

    var: str = ""
    type: str = "text-single"
    label: str = ""
    value: Any = None
    options: Mapping[str, str] = field(default_factory=dict)  # value: label, in the order to be shown
    required: bool = False
    desc: str = ""
    numbers: range | None = None  # whole numbers allowed, written as XEP-0122 says

    @property
    def texts(self) -> list[str]:
        """What stands in the `<value/>`s of this field."""
        if self.value is None:
            return []
        if isinstance(self.value, bool):
            return ["1" if self.value else "0"]
        if isinstance(self.value, (int, JID)):
            return [str(self.value)]
        if isinstance(self.value, str):
            return self.value.splitlines() if self.type == "text-multi" else [self.value]
        return [str(value) for value in self.value]

    def read(self, texts: Sequence[str]) -> Any:
        """Return the Python value of submitted `texts`; raise StanzaError("not-acceptable") naming this field (§4)."""
        if sum(map(len, texts)) > MAX_FORM_TEXT:
            raise self.refused(f"at most {MAX_FORM_TEXT} characters")
        if self.type not in MULTIPLE and len(texts) > 1:
            raise self.refused("one value")
        if self.is_empty(texts) or (self.required and not any(texts)):
            raise self.refused("a value")
        return READERS[self.type](self, texts)

    def is_empty(self, texts: Sequence[str]) -> bool:
        """Whether `texts` say nothing: no truth value, choice or number is the empty text, if not an option (§3.6).

        Clients send such a field when its question was left alone, so it keeps its value.
        """
        has_to_say = self.type in CHOOSING or self.numbers is not None
        return has_to_say and not any(text or text in self.options for text in texts)

    def refused(self, expected: str) -> StanzaError:
        """The error that tells the user what `expected` would have been."""
        return StanzaError("not-acceptable", f"{self.var}: expected {expected}")

    def read_boolean(self, texts: Sequence[str]) -> bool:
        """§3.3, note 5: both spellings of XML Schema."""
        if texts[0] not in BOOLEANS:
            raise self.refused("0, 1, true or false")
        return BOOLEANS[texts[0]]

    def read_text(self, texts: Sequence[str]) -> str | int:
        """A text as it is; no `<value/>` and an empty one are the same (§3.6)."""
        return self.read_number(texts[0]) if self.numbers else "".join(texts)

    def read_number(self, text: str) -> int:
        """XEP-0122 §3.2.3: a whole number in a range."""
        assert self.numbers
        if not re.fullmatch("-?[0-9]{1,18}", text.strip()) or int(text) not in self.numbers:
            raise self.refused(f"a whole number from {self.numbers[0]} to {self.numbers[-1]}")
        return int(text)

    def read_lines(self, texts: Sequence[str]) -> list[str]:
        """§3.3: one line to a value; some clients send all of them in one."""
        return "\n".join(texts).splitlines()

    def read_choice(self, texts: Sequence[str]) -> str | int:
        """An option stands before a number, so that "none" and 30 may both be answers."""
        if self.numbers and texts[0] not in self.options:
            return self.read_number(texts[0])
        return self.read_choices(texts)[0]

    def read_choices(self, texts: Sequence[str]) -> list[str]:
        """§3.3: nobody may add an option; an empty `<value/>` chooses nothing."""
        chosen = dict.fromkeys(text for text in texts if text or text in self.options)
        if not self.options.keys() >= chosen.keys():
            raise self.refused("one of " + ", ".join(self.options))
        return list(chosen)

    def read_jids(self, texts: Sequence[str]) -> list[JID]:
        """§3.3: duplicates are ignored, compared as addresses are; so are empty lines."""
        try:
            return list(dict.fromkeys(JID.parse(text.strip()) for text in texts if text.strip()))
        except StanzaError as error:
            raise StanzaError(error.condition, f"{self.var}: {error.text}") from None

    def read_jid(self, texts: Sequence[str]) -> JID | None:
        """An address, or nobody."""
        return next(iter(self.read_jids(texts)), None)

    @classmethod
    def parse(cls, element: Element) -> Field:
        """Read a `<field/>`; raise StanzaError("bad-request") if it is none (§3.2)."""
        var, kind = element.get("var", ""), element.get("type", "")
        if not var and kind not in {"", "fixed"}:  # answers repeat headings, and may leave out every type
            raise StanzaError("bad-request", "a field of the form has no 'var'")
        options = {}
        for option in element.iterfind(DATA_FORMS("option")):
            values = form_texts(option, "value")
            if len(values) != 1:
                raise StanzaError("bad-request", f"{var}: an option needs exactly one value")
            options[values[0]] = option.get("label", "")
        return cls(
            var,
            kind if kind in READERS or not kind else "text-single",  # §3.3: the type for what is not understood
            element.get("label", ""),
            form_texts(element, "value"),
            options,
            element.find(DATA_FORMS("required")) is not None,
            "\n".join(form_texts(element, "desc")),
        )

    def to_element(self, *, ask: bool) -> Element:
        """Write the `<field/>`; what helps to answer (options, `<required/>`, …) only if we `ask`."""
        element = E(DATA_FORMS("field"))
        for name, attribute in (("var", self.var), ("type", self.type), ("label", self.label)):
            if attribute:
                element.set(name, attribute)
        if ask and self.desc:
            element.append(E(DATA_FORMS("desc"), None, self.desc))
        if ask and self.required:
            element.append(E(DATA_FORMS("required")))
        if ask and self.numbers:
            limits = {"min": str(self.numbers[0]), "max": str(self.numbers[-1])}
            datatype = {"datatype": "xs:integer"}
            element.append(E(DATA_VALIDATE("validate"), datatype, E(DATA_VALIDATE("range"), limits)))
        element.extend(E(DATA_FORMS("value"), None, text) for text in self.texts)
        if ask:
            element.extend(self.option_elements())
        return element

    def option_elements(self) -> Iterator[Element]:
        """The `<option/>`s; the present number is one of them, or clients could not show it."""
        options = dict(self.options)
        if self.type == "list-single" and self.numbers:
            options |= {text: text for text in self.texts if text not in options}
        for value, label in options.items():
            yield E(DATA_FORMS("option"), {"label": label} if label else None, E(DATA_FORMS("value"), None, value))


BOOLEANS = {"0": False, "false": False, "1": True, "true": True}  # §3.3, note 5
MULTIPLE = frozenset({"list-multi", "jid-multi", "text-multi"})  # types with any number of values
CHOOSING = frozenset({"boolean", "list-single"})
READERS: Mapping[str, Callable[[Field, Sequence[str]], Any]] = {
    "boolean": Field.read_boolean,
    "fixed": Field.read_lines,
    "hidden": Field.read_text,
    "jid-multi": Field.read_jids,
    "jid-single": Field.read_jid,
    "list-multi": Field.read_choices,
    "list-single": Field.read_choice,
    "text-multi": Field.read_lines,
    "text-private": Field.read_text,
    "text-single": Field.read_text,
}


def form_texts(parent: Element, name: str) -> list[str]:
    """Return the texts of all children of a form's element called `name`."""
    return [child.text or "" for child in parent.iterfind(DATA_FORMS(name))]


@dataclass(slots=True)
class Form:
    """A form as it travels (XEP-0004 §3): questions, answers, or a result.

    A result may be a table: `reported` are its columns, `items` its rows, each by the
    column's `var` (§3.4).
    """

    type: str  # "form", "submit", "cancel" or "result"
    fields: Sequence[Field] = field(default_factory=list)
    title: str = ""
    instructions: str = ""  # lines
    reported: Sequence[Field] = field(default_factory=list)
    items: Sequence[Mapping[str, Any]] = field(default_factory=list)

    @classmethod
    def parse(cls, element: Element) -> Form:
        """Read an `<x/>`; raise StanzaError("bad-request") if it is no form."""
        kind = element.get("type", "")
        if element.tag != DATA_FORMS("x") or kind not in FORM_TYPES:
            raise StanzaError("bad-request", "expected a form of type form, submit, cancel or result")
        fields = parse_fields(element)
        if kind == "form":
            fields = [replace(one, type=one.type or "text-single") for one in fields]  # §3.2
        table = element.find(DATA_FORMS("reported"))
        rows = element.iterfind(DATA_FORMS("item"))
        return cls(
            kind,
            fields,
            "\n".join(form_texts(element, "title")),
            "\n".join(form_texts(element, "instructions")),
            [] if table is None else parse_fields(table),
            [{one.var: one.value for one in parse_fields(row)} for row in rows],
        )

    @classmethod
    def within(cls, parent: Element) -> Form | None:
        """Read the form that is a child of `parent`, or return None if there is none; raise as `parse` does."""
        element = parent.find(DATA_FORMS("x"))
        return None if element is None else cls.parse(element)

    def to_element(self) -> Element:
        """Write the `<x/>`."""
        element = E(DATA_FORMS("x"), {"type": self.type})
        if self.title:
            element.append(E(DATA_FORMS("title"), None, self.title))
        element.extend(E(DATA_FORMS("instructions"), None, line) for line in self.instructions.splitlines())
        element.extend(one.to_element(ask=self.type == "form") for one in self.fields)
        if self.reported:
            element.append(E(DATA_FORMS("reported"), None, *(one.to_element(ask=False) for one in self.reported)))
        element.extend(self.row(item) for item in self.items)
        return element

    def row(self, item: Mapping[str, Any]) -> Element:
        """One `<item/>`, with every column, if need be with an empty value (§3.4)."""
        row = E(DATA_FORMS("item"))
        for column in self.reported:
            cell = replace(column, type="", label="", value=item.get(column.var))
            row.append((cell if cell.texts else replace(cell, value="")).to_element(ask=False))
        return row

    def texts(self, var: str) -> list[str] | None:
        """Return the values of the field `var` as they stand in the form, None if it has no such field."""
        return next((one.texts for one in self.fields if one.var == var), None)

    @property
    def form_type(self) -> str:
        """What the form is about, or "" (XEP-0068): a hidden field; in a submission any (§4.1, §4.3)."""
        for one in self.fields:
            if one.var == FORM_TYPE and (one.type == "hidden" or self.type == "submit"):
                return "".join(one.texts)
        return ""


def parse_fields(parent: Element) -> list[Field]:
    """Return the fields among the children; raise StanzaError("bad-request") if two share a `var` (§3.2)."""
    fields = [Field.parse(child) for child in parent.iterfind(DATA_FORMS("field"))]
    names = [one.var for one in fields if one.var]
    if len(names) != len(set(names)):
        raise StanzaError("bad-request", "two fields of the form have the same 'var'")
    return fields


class FormTemplate:
    """What we ask, and how we understand the answer: made once, as a constant of a chapter.

        ROOM_FORM = FormTemplate("http://jabber.org/protocol/muc#roomconfig", [
            Field("muc#roomconfig_roomname", label="Name"),
            Field("muc#roomconfig_persistentroom", "boolean", "Keep the room when it is empty?", False),
            Field("muc#roomconfig_whois", "list-single", "Who sees real addresses?", "moderators",
                  {"moderators": "Moderators", "anyone": "Anyone"}),
        ])
        ROOM_FORM.fill(room.config).to_element()
        changes = ROOM_FORM.read(form)
    """

    def __init__(self, form_type: str, fields: Sequence[Field], *, title: str = "", instructions: str = "") -> None:
        self.form_type = form_type  # XEP-0068; "" for a form without one
        self.fields = tuple(fields)
        self.title = title
        self.instructions = instructions

    @property
    def defaults(self) -> dict[str, Any]:
        """The value of every field in the template, by `var`."""
        return {one.var: one.value for one in self.fields if one.type != "fixed"}

    def fill(self, values: Mapping[str, Any] | None = None, kind: str = "form") -> Form:
        """Return the form to be sent, with `values` by `var`, else the defaults.

        As a "result" (XEP-0128, the metadata of a node) it has no title and no headings.
        """
        values = values or {}
        fields = [Field(FORM_TYPE, "hidden", value=self.form_type)] if self.form_type else []
        fields += [replace(one, value=values.get(one.var, one.value)) for one in self.fields]
        if kind == "form":
            return Form(kind, fields, self.title, self.instructions)
        return Form(kind, [one for one in fields if one.type != "fixed"])

    def read(self, form: Form) -> dict[str, Any] | None:
        """Return the checked values that a submitted form sets, by `var`; None if it was cancelled.

        Raises StanzaError: "bad-request" if it is not a submission or one of another kind
        (XEP-0068), "not-acceptable" or "jid-malformed" with the field's name in the text
        for a value that cannot be, or for a required one which is missing (§3.1, §4).
        """
        if form.type == "cancel":
            return None
        if form.type != "submit":
            raise StanzaError("bad-request", "expected a form of type submit or cancel")
        if form.form_type not in {"", self.form_type}:
            raise StanzaError("bad-request", f"{FORM_TYPE}: expected {self.form_type or 'none'}")
        values = {}
        for one in self.fields:
            texts = None if one.type == "fixed" else form.texts(one.var)
            if texts is None or one.is_empty(texts):
                if one.required:
                    raise one.refused("a value")
            else:
                values[one.var] = one.read(texts)
        return values


# -- pages (XEP-0059)
@dataclass(frozen=True, slots=True)
class PageRequest:
    """Which part of a list is wanted (XEP-0059 §2): at most `maximum` items of those between `after` and `before`.

    They are the last of these if there is a `before`, which is "" for the end of the
    list; otherwise the first, or those from the position `index`, counted from 0.
    """

    maximum: int
    after: str = ""  # "" is the beginning of the list
    before: str | None = None
    index: int | None = None

    @classmethod
    def parse(cls, parent: Element, limit: int = MAX_PAGE) -> PageRequest:
        """Read the `<set/>` in `parent`; without one, the first `limit` items are wanted.

        Raises StanzaError("bad-request") for a number that is none, or a position
        together with a neighbour.
        """
        request = parent.find(RSM("set"))
        if request is None:
            return cls(limit)
        maximum, index = page_number(request, "max"), page_number(request, "index")
        before = request.find(RSM("before"))
        after = child_text(request, RSM("after"))
        if index is not None and (after or before is not None):
            raise StanzaError("bad-request", "a page is asked for by index, or by after and before")
        wanted = limit if maximum is None else min(maximum, limit)
        return cls(wanted, after, None if before is None else before.text or "", index)


def page_number(request: Element, name: str) -> int | None:
    """Return the whole number in the child `name`, None if there is no such child; raise StanzaError("bad-request")."""
    child = request.find(RSM(name))
    if child is None:
        return None
    if not re.fullmatch(r"\s*[0-9]{1,18}\s*", child.text or ""):
        raise StanzaError("bad-request", f"{name}: expected a whole number, 0 or more")
    return int(child.text or "")


def page_answer(first: str, last: str, index: int | None, total: int | None) -> Element:
    """Return the `<set/>` of an answer (§2.2); `first` and `last` are the page's, "" if it is empty.

    `index`, the position of `first`, and `total`, the length of the whole list, may be
    None where they are too expensive to know.
    """
    answer = E(RSM("set"))
    if first:
        answer.append(E(RSM("first"), None if index is None else {"index": str(index)}, first))
        answer.append(E(RSM("last"), None, last))
    if total is not None:
        answer.append(E(RSM("count"), None, str(total)))
    return answer


def page(
    parent: Element, items: Sequence[tuple[str, Any]], limit: int = MAX_PAGE
) -> tuple[Sequence[tuple[str, Any]], Element]:
    """Return the part of `items` that the `<set/>` in `parent` asks for, and the `<set/>` of the answer.

    An item is a pair: its id, not empty and unique in the list, and anything. No page is
    longer than `limit`, also when `parent` has no `<set/>`.

    Raises StanzaError: "bad-request" as `PageRequest.parse`; "item-not-found" for an id
    which is not among the items, except when only their number is wanted (§2.4, §2.7).
    """
    request = PageRequest.parse(parent, limit)
    if not request.maximum:
        return [], page_answer("", "", None, len(items))
    places = {identifier: place for place, (identifier, item) in enumerate(items)}
    try:
        start = places[request.after] + 1 if request.after else request.index or 0
        end = places[request.before] if request.before else len(items)
    except KeyError:
        raise StanzaError("item-not-found", "the item before or after this page is gone") from None
    if request.before is None:
        chosen = items[start : start + request.maximum]
    else:
        start = max(start, end - request.maximum)
        chosen = items[start:end]
    if not chosen:
        return chosen, page_answer("", "", None, len(items))
    return chosen, page_answer(chosen[0][0], chosen[-1][0], start, len(items))


# ==== 6. Configuration ====
#
# A server for a household must run without being configured, and a server that is
# configured must never guess. So every key has a default, and a file that says anything
# this chapter doesn't understand is refused as a whole, with one line:
#
#     xmppd.toml: [limits] stanza: expected a whole number of bytes, at least 10000, found 'big'
#
# The file is TOML. `CONFIG_KEYS` names every key by its dotted path and the function that reads
# its value: it returns what the server works with (a prepared domain, a parsed address) or
# raises `Unexpected`. `load_config` walks the file along this table and makes a `Config`,
# which is a value: reloading (SIGHUP) makes another one and hands it to the server.
#
# Two habits follow from what owners struggle with elsewhere. Data belongs to the domains
# named here, never to the machine, so that renaming a machine loses nothing. And paths in
# the file are relative to the file, so that a folder with both can be moved.
#
# Left out: including other files, variables, conditions. A program that wants them can
# write this file.


class Unexpected(Exception):
    """A value in the file is not what its key wants; `load_config` makes a ConfigError of it."""

    def __init__(self, expected: str, found: object) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found


class Address(NamedTuple):
    """An IP address and port to listen on; port 0 lets the system choose a free one."""

    family: socket.AddressFamily
    host: str
    port: int

    def __str__(self) -> str:
        """Return it as the file has it: `127.0.0.1:5222`, `[::1]:5222`."""
        return f"[{self.host}]:{self.port}" if self.family == socket.AF_INET6 else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it (RFC 1122 §3.2.1.3, RFC 4291 §2.5.3)."""
        return self.host == "::1" if self.family == socket.AF_INET6 else self.host.startswith("127.")


def parse_listen_address(text: str) -> Address:
    """Return the address that `text` names, e.g. `"[::]:5222"`; raises ValueError.

    Names such as `localhost` are not looked up: what they mean differs between machines
    and, while a network comes up, between one minute and the next.
    """
    host, colon, port = text.rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") and host.endswith("]") else socket.AF_INET
    if not (colon and port.isascii() and port.isdigit() and int(port[:6]) <= 65535):
        raise ValueError(text)
    try:
        packed = socket.inet_pton(family, host[1:-1] if family == socket.AF_INET6 else host)
    except OSError as error:
        raise ValueError(text) from error
    return Address(family, socket.inet_ntop(family, packed), int(port))


# -- readers: from a TOML value to what the server works with


ConfigReader = Callable[[Any], Any]


def read_boolean(value: Any) -> bool:
    """`true` or `false`; TOML has no other spellings."""
    if not isinstance(value, bool):
        raise Unexpected("true or false", value)
    return value


def read_path(value: Any) -> Path:
    """A path; `~` is the owner's home. `load_config` makes it relative to the file."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise Unexpected('a path in quotes, for example "/var/lib/xmppd"', value)
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise Unexpected("a path whose ~ names somebody who has a home folder", value) from error


def read_secret(value: Any) -> str:
    """A password shared with a component; what was found instead is not repeated in the log."""
    if not isinstance(value, str) or not value:
        raise Unexpected("a text in quotes that is not empty", None)
    return value


def read_list(value: Any, what: str) -> list[str]:
    """A list of texts; `what` says of what, with an example."""
    if not isinstance(value, list):
        raise Unexpected(what, value)
    for entry in value:
        if not isinstance(entry, str):
            raise Unexpected(what, entry)
    return value


def read_domain(value: str) -> str:
    """A domain, prepared as all addresses are (chapter 4), so that comparisons are exact."""
    try:
        if "@" in value or "/" in value:
            raise ValueError(value)
        return prepare_domain(value)
    except ValueError as error:
        raise Unexpected('a domain such as "example.org"', value) from error


def read_hosts(value: Any) -> tuple[str, ...]:
    """The domains served, the first being the one that examples in messages use."""
    domains = [read_domain(entry) for entry in read_list(value, 'a list of domains such as ["example.org"]')]
    if not domains:
        raise Unexpected('at least one domain, for example ["example.org"]', value)
    return tuple(dict.fromkeys(domains))


def read_admins(value: Any) -> frozenset[JID]:
    """Bare JIDs: an admin is the whole address, never only its local part (CVE-2020-8086)."""
    what = 'a list of addresses such as ["alice@example.org"]'
    admins = set()
    for entry in read_list(value, what):
        try:
            jid = JID.parse(entry)
        except StanzaError as error:
            raise Unexpected(what, entry) from error
        if not jid.local or jid.resource:
            raise Unexpected(what, entry)
        admins.add(jid)
    return frozenset(admins)


def read_addresses(value: Any, example: str = '["0.0.0.0:5222", "[::]:5222"]') -> tuple[Address, ...]:
    """Where to listen; an empty list switches a listener off."""
    what = f'a list of "address:port" such as {example}'
    addresses = []
    for entry in read_list(value, what):
        try:
            addresses.append(parse_listen_address(entry))
        except ValueError as error:
            raise Unexpected(what, entry) from error
    return tuple(addresses)


def read_loopback_addresses(value: Any) -> tuple[Address, ...]:
    """Where to listen without TLS: passwords pass in the clear, so nobody else may listen in."""
    addresses = read_addresses(value)
    for address in addresses:
        if not address.is_loopback:
            raise Unexpected('loopback addresses only (127.0.0.1 or [::1]), for there is no TLS', str(address))
    return addresses


def read_nameservers(value: Any) -> tuple[Address, ...]:
    """Which servers to ask for names; none: those of the system."""
    return read_addresses(value, '["127.0.0.1:53"]')


def read_routes(value: Any) -> dict[str, tuple[str, int]]:
    """Where the servers of some domains are, by domain: a name or an IP address, and a port (RFC 6120 §3.2.3)."""
    what = 'domains with their servers, such as { "example.net" = "192.0.2.7:5269" }'
    if not isinstance(value, dict):
        raise Unexpected(what, value)
    routes = {}
    for domain, server in value.items():
        host, colon, port = server.rpartition(":") if isinstance(server, str) else ("", "", "")
        if not (colon and port.isascii() and port.isdigit() and 0 < int(port[:6]) <= 65535):
            raise Unexpected(what, server)
        routes[read_domain(domain)] = (read_domain(host), int(port))
    return routes


DAYS_IN = {"day": 1, "week": 7, "month": 30, "year": 365}


def read_duration(value: Any) -> timedelta | None:
    """`"30 days"`, `"1 year"` or `"forever"` (None)."""
    what = 'a time such as "30 days", "1 year" or "forever"'
    if value == "forever":
        return None
    amount, _, unit = value.partition(" ") if isinstance(value, str) else ("", "", "")
    days = DAYS_IN.get(unit.removesuffix("s"))
    if days is None or not (amount.isascii() and amount.isdigit()) or not 0 < int(amount[:6]) < 100_000:
        raise Unexpected(what, value)
    return timedelta(days=int(amount) * days)


def read_url(value: Any) -> str:
    """An https URL; without the slash at its end."""
    if not isinstance(value, str) or not re.fullmatch(r"https://[^\s/?#@]+(/[^\s?#]*)?", value):
        raise Unexpected('a URL such as "https://chat.example.org"', value)
    return value.rstrip("/")


def read_origins(value: Any) -> frozenset[str]:
    """Origins of web pages (RFC 6454): scheme, host and port; or `"*"`."""
    what = 'a list of origins such as ["https://chat.example.org"], or ["*"]'
    for entry in read_list(value, what):
        if entry != "*" and not re.fullmatch(r"https?://[^\s/?#@]+", entry):
            raise Unexpected(what, entry)
    return frozenset(value)


def read_label(value: Any) -> str:
    """One label of a domain, or nothing."""
    what = 'one word such as "conference", or "" to switch it off'
    if not isinstance(value, str):
        raise Unexpected(what, value)
    try:
        return prepare_label(value) if value else ""
    except ValueError as error:
        raise Unexpected(what, value) from error


def read_creators(value: Any) -> str:
    """Who may open rooms."""
    if value not in ("everyone", "admins"):
        raise Unexpected('"everyone" or "admins"', value)
    return str(value)


def read_push_content(value: Any) -> str:
    """How much app servers may know."""
    if value not in ("nothing", "sender", "body"):
        raise Unexpected('"nothing", "sender" or "body"', value)
    return str(value)


def whole_number(unit: str, least: int, most: int | None = None) -> ConfigReader:
    """Return a reader of whole numbers of `unit` between `least` and `most`, both included."""
    expected = f"a whole number of {unit}" + (f" from {least} to {most}" if most else f", at least {least}")

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most and value > most):
            raise Unexpected(expected, value)
        return value

    return read


def seconds_from(least: int) -> ConfigReader:
    """Return a reader of times in seconds, fractions allowed, up to a day."""
    expected = f"a number of seconds from {least} to 86400"

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 86_400:
            raise Unexpected(expected, value)
        return float(value)

    return read


# -- what the server works with


@dataclass(frozen=True, slots=True)
class Listen:
    """`[listen]`: where, in order of the ports that IANA knows them by (5347 and 5443 by custom)."""

    client: tuple[Address, ...] = (parse_listen_address("[::]:5222"), parse_listen_address("0.0.0.0:5222"))
    # RFC 6120 has no such port; XEP-0368 found one in use
    client_tls: tuple[Address, ...] = (parse_listen_address("[::]:5223"), parse_listen_address("0.0.0.0:5223"))
    server: tuple[Address, ...] = (parse_listen_address("[::]:5269"), parse_listen_address("0.0.0.0:5269"))
    component: tuple[Address, ...] = (parse_listen_address("127.0.0.1:5347"),)  # XEP-0114 has no TLS
    web: tuple[Address, ...] = (parse_listen_address("[::]:5443"), parse_listen_address("0.0.0.0:5443"))
    lab: tuple[Address, ...] = ()  # client streams without TLS, to learn by hand; loopback only


def bounded(default: int, unit: str, least: int = 1, most: int | None = None) -> int:
    """Declare a limit that counts `unit`."""
    return field(default=default, metadata={"read": whole_number(unit, least, most)})


def timed(default: float, least: int = 1) -> float:
    """Declare a limit in seconds."""
    return field(default=default, metadata={"read": seconds_from(least)})


@dataclass(frozen=True, slots=True)
class Limits:
    """`[limits]`: how much of everything. Chapter 1 gives the reasons; the bounds stand here.

    Rates are per network address or per stream, and 0 switches one off (RFC 6120 §13.12
    wants all of them to be the owner's choice). Other limits count something kept for an
    account or a stream, and 0, where it is allowed, means none.
    """

    connections_per_address: int = bounded(100, "connections", 0)  # open at once; a school shares one address
    connections_per_minute: int = bounded(300, "connections", 0)  # from one address; phones reconnect a lot
    logins_per_minute: int = bounded(30, "failed logins", 0)  # from one address
    bytes_per_second: int = bounded(50_000, "bytes", 0)  # from one client, after a burst; Prosody has 10,000
    recipients_per_minute: int = bounded(600, "addresses", 0)  # different ones that one client writes to

    room_stanzas_per_minute: int = bounded(ROOM_STANZAS_PER_MINUTE, "stanzas", 0)  # from one person, to all rooms

    stanza: int = bounded(MAX_STANZA, "bytes", 10_000)  # RFC 6120 §13.12: not smaller
    stanza_before_login: int = bounded(MAX_STANZA_BEFORE_LOGIN, "bytes", 2048)  # the longest step of SASL fits
    elements: int = bounded(MAX_ELEMENTS, "elements", 100)
    elements_before_login: int = bounded(MAX_ELEMENTS_BEFORE_LOGIN, "elements", 8)
    unread: int = bounded(MAX_UNREAD, "bytes", 65_536)  # waiting for a client that doesn't read
    unacknowledged: int = bounded(MAX_UNACKNOWLEDGED, "stanzas", 100)  # and of bytes, as many as `unread`
    held: int = bounded(MAX_HELD, "stanzas", 0)  # while a client is inactive
    sasl_failures: int = bounded(MAX_SASL_FAILURES, "attempts", 2, 5)  # RFC 6120 §6.4.5
    bind_failures: int = bounded(MAX_BIND_FAILURES, "attempts", 5, 10)  # RFC 6120 §7.7.3
    component_queue: int = bounded(MAX_COMPONENT_QUEUE, "stanzas", 0)  # that wait for one that is away

    resources: int = bounded(MAX_RESOURCES, "sessions")
    tokens: int = bounded(MAX_TOKENS, "clients")
    roster_items: int = bounded(MAX_ROSTER_ITEMS, "contacts")
    roster_groups: int = bounded(MAX_ROSTER_GROUPS, "groups", 0)
    requests: int = bounded(MAX_REQUESTS, "subscription requests", 0)
    privacy_lists: int = bounded(MAX_PRIVACY_LISTS, "lists")
    privacy_rules: int = bounded(MAX_PRIVACY_RULES, "rules")
    directed: int = bounded(MAX_DIRECTED, "addresses", 0)
    offline: int = bounded(MAX_OFFLINE, "messages", 0)
    archive_bytes: int = bounded(MAX_ARCHIVE_BYTES, "bytes", 1024 * 1024)
    rooms: int = bounded(MAX_ROOMS, "rooms", 0)
    rooms_per_account: int = bounded(MAX_ROOMS_PER_ACCOUNT, "rooms", 0)
    room_occupants: int = bounded(MAX_ROOM_OCCUPANTS, "people")
    vcard: int = bounded(MAX_VCARD, "bytes", 0)
    pep_nodes: int = bounded(MAX_PEP_NODES, "nodes", 0)
    pep_items: int = bounded(MAX_PEP_ITEMS, "items")
    pep_bytes: int = bounded(MAX_PEP_BYTES, "bytes", 0)
    pep_subscribers: int = bounded(MAX_PEP_SUBSCRIBERS, "subscribers", 0)
    pushes: int = bounded(MAX_PUSHES, "registrations", 0)
    private: int = bounded(MAX_PRIVATE, "elements", 0)
    private_bytes: int = bounded(MAX_PRIVATE_BYTES, "bytes", 0)

    unauthenticated_timeout: float = timed(UNAUTHENTICATED_TIMEOUT)
    silence_timeout: float = timed(SILENCE_TIMEOUT, 10)
    answer_timeout: float = timed(ANSWER_TIMEOUT)
    resumption_timeout: float = timed(RESUMPTION_TIMEOUT, 0)  # 0: no session can be resumed
    component_patience: float = timed(COMPONENT_PATIENCE, 0)


@dataclass(frozen=True, slots=True)
class Compat:
    """`[compat]`: for clients from before RFC 6120."""

    iq_auth: bool = True  # XEP-0078, inside TLS only
    compression: bool = False  # XEP-0138, after authentication only
    digest_md5: bool = False  # keeps a hash that is as good as the password: off unless asked for


class TLSFiles(NamedTuple):
    """A certificate with its chain, and its key, in PEM; or, as both, a folder of pairs (chapter 9).

    Without `key`, it is looked for where the certificate is.
    """

    certificate: Path
    key: Path


def default_host() -> str:
    """Return `NAME.local`, by which this machine's neighbours find it (RFC 6762 §3), or `localhost`."""
    label = socket.gethostname().partition(".")[0].lower()
    try:
        return prepare_domain(f"{label}.local") if label not in ("", "localhost") else "localhost"
    except ValueError:
        return "localhost"


def default_data() -> Path:
    """Return the platform's folder for the data of programs, e.g. `~/.local/share/xmppd`."""
    import platformdirs

    return Path(platformdirs.user_data_dir("xmppd", appauthor=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """What the owner wants. A field is named as its key, with `_` where the file has a section."""

    hosts: tuple[str, ...] = field(default_factory=lambda: (default_host(),))
    admins: frozenset[JID] = frozenset()
    data: Path = field(default_factory=default_data)
    listen: Listen = field(default_factory=Listen)
    tls: TLSFiles | None = None  # None: our own authority issues a certificate (chapter 9)
    client_ca: Path | None = None  # issuers of the certificates that people may log in with
    registration_open: bool = False
    archive_enabled: bool = True
    archive_keep: timedelta | None = timedelta(days=365)  # None: for ever
    limits: Limits = field(default_factory=Limits)
    components: Mapping[str, str] = field(default_factory=dict)  # domain to secret
    storage_sync: bool = True
    compat: Compat = field(default_factory=Compat)
    federation_enabled: bool | None = None  # None: by the look of the domain
    federation_nameservers: tuple[Address, ...] = ()  # none: those of the system
    federation_routes: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # domain to (host, port)
    web_url: str = ""  # "": https://HOST and our own port
    web_origins: frozenset[str] = frozenset()  # of web pages that may log people in, beside the hosts' own
    push_content: str = "nothing"
    muc_host: str = "conference"
    muc_create: str = "everyone"
    file: Path | None = None  # where it was read from; None: only defaults


# -- the file


CONFIG_KEYS: dict[str, ConfigReader] = {
    "hosts": read_hosts,
    "admins": read_admins,
    "data": read_path,
    **{f"listen.{entry.name}": read_addresses for entry in fields(Listen)},
    "listen.lab": read_loopback_addresses,
    "tls.certificate": read_path,
    "tls.key": read_path,
    "tls.client_ca": read_path,
    "registration.open": read_boolean,
    "archive.enabled": read_boolean,
    "archive.keep": read_duration,
    **{f"limits.{entry.name}": entry.metadata["read"] for entry in fields(Limits)},
    "storage.sync": read_boolean,
    **{f"compat.{entry.name}": read_boolean for entry in fields(Compat)},
    "federation.enabled": read_boolean,
    "federation.nameservers": read_nameservers,
    "federation.routes": read_routes,
    "web.url": read_url,
    "web.origins": read_origins,
    "muc.host": read_label,
    "push.content": read_push_content,
    "muc.create": read_creators,
}
CONFIG_SECTIONS = frozenset(path.partition(".")[0] for path in CONFIG_KEYS if "." in path) | {"components"}


def own_config_path() -> Path:
    """Return where the owner's own configuration is kept by the platform's custom, e.g. in `~/.config/xmppd`."""
    import platformdirs

    return Path(platformdirs.user_config_dir("xmppd", appauthor=False)) / "xmppd.toml"


def find_config() -> Path | None:
    """Return the configuration that is meant when none is named, or None if there is none.

    `$XMPPD_CONFIG` first (then it must exist: who names a file wants that one), the owner's
    own, the machine's. The current folder is not searched: a server should not depend on
    where somebody stood when starting it.
    """
    if named := os.environ.get("XMPPD_CONFIG"):
        return Path(named)
    return next((path for path in (own_config_path(), Path("/etc/xmppd/xmppd.toml")) if path.is_file()), None)


def load_config(path: Path | None, *, data: Path | None = None) -> Config:
    """Return the configuration in the file at `path`; None means the defaults alone.

    `data` overrides the file's data folder. Raises ConfigError: one line that names the
    file, the key, what was expected and what was found.
    """
    values = read_config(path) if path else {}
    if data is not None:
        values["data"] = data.absolute()
    config = build_config(values, path)
    for key, problem in config_contradictions(config):
        raise ConfigError(f"{path or 'configuration'}: {shown_config_key(key)}: {problem}")
    return config


def read_config(path: Path) -> dict[str, Any]:
    """Return the file's keys by their dotted paths, with their values read; raises ConfigError."""
    folder = path.absolute().parent
    values: dict[str, Any] = {}
    for key, value in flatten_config(parse_config(path), str(path)):
        reader = read_secret if key.startswith("components.") else CONFIG_KEYS.get(key)
        if reader is None:
            raise ConfigError(f"{path}: {shown_config_key(key)}: unknown key; {config_suggestion(key)}")
        try:
            read = reader(value)
        except Unexpected as error:
            raise ConfigError(
                f"{path}: {shown_config_key(key)}: expected {error.expected}, found {shown_config_value(error.found)}"
            ) from error
        values[key] = folder / read if isinstance(read, Path) else read
    return values


def parse_config(path: Path) -> dict[str, Any]:
    """Return the TOML document at `path`; raises ConfigError."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        remedy = "; write one with: xmppd init" if isinstance(error, FileNotFoundError) else ""
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{remedy}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, found another encoding; save it as UTF-8") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f'{path}: expected TOML (name = "text" or name = 12), found a mistake: {error}') from error


def flatten_config(document: dict[str, Any], file: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, value) of every key; of a component, `components.DOMAIN` and its secret."""
    for name, value in document.items():
        if name not in CONFIG_SECTIONS:
            yield name, value
        elif not isinstance(value, dict):
            raise ConfigError(f"{file}: {name}: expected a section [{name}], found {shown_config_value(value)}")
        elif name == "components":
            yield from flatten_components(value, file)
        else:
            for key, inner in value.items():
                yield f"{name}.{key}", inner


def flatten_components(table: dict[str, Any], file: str) -> Iterator[tuple[str, Any]]:
    """Yield (`components.DOMAIN`, secret) of every `[components."DOMAIN"]`; raises ConfigError."""
    for domain, settings in table.items():
        where = f'{file}: [components."{domain}"]'
        try:
            prepared = read_domain(domain)
        except Unexpected as error:
            raise ConfigError(f"{where}: expected {error.expected}, found {shown_config_value(domain)}") from error
        if not isinstance(settings, dict) or set(settings) != {"secret"}:
            raise ConfigError(f'{where}: expected one key, secret = "...", and no other')
        yield f"components.{prepared}", settings["secret"]


def build_config(values: dict[str, Any], path: Path | None) -> Config:
    """Return the Config that `values`, by dotted path, make; what is absent keeps its default."""

    def section(name: str) -> dict[str, Any]:
        return {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}

    tls = section("tls")
    if "key" in tls and "certificate" not in tls:
        raise ConfigError(f"{path}: [tls] certificate: expected the certificate of the key, found only a key")
    direct = {key.replace(".", "_"): value for key, value in values.items()}
    return Config(
        **{entry.name: direct[entry.name] for entry in fields(Config) if entry.name in direct},
        listen=Listen(**section("listen")),
        limits=Limits(**section("limits")),
        compat=Compat(**section("compat")),
        components=section("components"),
        tls=TLSFiles(tls["certificate"], tls.get("key", tls["certificate"])) if "certificate" in tls else None,
        client_ca=tls.get("client_ca"),
        file=path,
    )


def config_contradictions(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (dotted path, problem) for what is right by itself and wrong together."""
    for admin in sorted(config.admins):
        if admin.domain not in config.hosts:
            yield "admins", f"expected addresses of the hosts ({', '.join(config.hosts)}), found '{admin}'"
    for domain in config.components:
        if domain in config.hosts:
            yield f"components.{domain}", "expected a domain of its own, found one of the hosts"
    seen: dict[Address, str] = {}
    for entry in fields(Listen):
        for address in getattr(config.listen, entry.name):
            if address.port and address in seen:
                yield f"listen.{entry.name}", f"expected an address of its own, found {address}, as in {seen[address]}"
            seen[address] = entry.name


# -- how a mistake is told


def shown_config_key(path: str) -> str:
    """Return a dotted path as the file has it: `[limits] stanza`, `[components."x.org"] secret`."""
    section, _, name = path.partition(".")
    if section == "components" and name:
        return f'[components."{name}"] secret'
    return f"[{section}] {name}" if name else section


def shown_config_value(value: object) -> str:
    """Return, in TOML's words and on one short line, what was found; None stands for a secret."""
    if value is None:
        return "something else"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)[:40]
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "…")
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "a section" if isinstance(value, dict) else "a date or time"


def config_suggestion(path: str) -> str:
    """Return what the owner may have meant by an unknown key, or what there is.

    In TOML a key written below a `[section]` belongs to it, which is the mistake that
    everybody makes once: so the same name in another place is a likely meaning.
    """
    import difflib

    section, _, name = path.rpartition(".")
    places = [tuple(known.rpartition(".")[::2]) for known in CONFIG_KEYS]
    siblings = [known for place, known in places if place == section]
    elsewhere = [place for place, known in places if known == name]
    if near := difflib.get_close_matches(name, siblings, 1, 0.7):
        return f"did you mean {near[0]}?"
    if not elsewhere and not section and (near := difflib.get_close_matches(name, CONFIG_SECTIONS, 1, 0.7)):
        return f"did you mean [{near[0]}]?"
    if "" in elsewhere:
        return f"{name} belongs above the first [section]"
    if elsewhere:
        return f"did you mean [{elsewhere[0]}] {name}?"
    return f"{f'[{section}] has' if section else 'there are'} {', '.join(siblings)}"


# ==== 7. The loop ====
#
# A server waits for many things at once: thousands of sockets, timers, the disk, a password
# hash. One thread does all the waiting in `selectors.select` and then calls whoever has
# something to do, one after the other; so the protocol's code is plain sequential code
# that nothing interrupts. One pass is called a turn:
#
#     wait ─> sockets that are ready ─> timers that are due ─> callables posted by threads
#          ─> `at_turn_end`: the journal's line for this turn, then everybody's output
#
# What must wait in C anyway (hashing a password, resolving a name) goes to a few worker
# threads by `offload`; its result comes back as one more posted callable. A callback that
# raises costs a log line with a traceback, never the loop.

log = logging.getLogger("xmppd")

MAX_WAITING_THREADS = 8  # that wait for the network at once: look-ups of names, some of which take seconds
MAX_TIMERS_PER_TURN = 64  # a crowd that came together times out together; ending one takes 0.2 ms


class Timer:
    """A callback that is due at `when` (the loop's seconds), unless it is cancelled before."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Forget the callback; may be called at any time, also twice."""
        self.callback = None


class Loop:
    """The one thread that owns all sockets, timers and protocol state.

    Only `post` may be called from other threads. `clock` gives seconds that never go back;
    tests put their own in its place.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self.at_turn_end: list[Callable[[], None]] = []
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = count()  # timers due at the same moment run in the order they were made
        self._posted: deque[Callable[[], None]] = deque()
        self._last_in_turn: list[Callable[[], None]] = []
        self._running = False
        self._workers: ThreadPoolExecutor | None = None
        self._waiting_threads = 0
        self._to_wait_for: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._woken)

    # -- sockets

    def register(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` in each turn in which `sock` is ready for one of `events` (selectors.EVENT_*)."""
        self._selector.register(sock, events, callback)

    def modify(self, sock: socket.socket, events: int, callback: Callable[[int], None]) -> None:
        """Change what `sock` waits for; it must be registered."""
        self._selector.modify(sock, events, callback)

    def unregister(self, sock: socket.socket) -> None:
        """Stop waiting for `sock`. Close it by `run_last`: the same turn may still hold its number."""
        self._selector.unregister(sock)

    # -- time, turns and threads

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call `callback` in `seconds` from now."""
        timer = Timer(self.now() + seconds, callback)
        heapq.heappush(self._timers, (timer.when, next(self._order), timer))
        return timer

    def run_last(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, at the end of this turn, behind `at_turn_end`."""
        self._last_in_turn.append(callback)

    def post(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the loop's next turn. Any thread may call this, and only this."""
        self._posted.append(callback)
        try:
            self._wake_writer.send(b"\0")
        except (BlockingIOError, OSError):
            pass  # the pipe is full, so the loop will wake up anyway; or it is closed for good

    def in_slices(self, steps: Iterator[None]) -> None:
        """Take one step of a generator now and in each of the following turns, until it ends."""
        for _step in steps:
            return self.post(functools.partial(self.in_slices, steps))

    def offload(self, function: Callable[..., Any], *args: Any, then: Callable[[Any], None],
                failed: Callable[[BaseException], None] | None = None) -> None:  # fmt: skip
        """Run `function(*args)` in a worker thread, then `then(result)` here.

        Only for what waits in C: Python code in a worker takes turns with the loop
        [measured: it cut the loop's work to a sixth]. An exception goes to `failed`, or to
        the log.
        """
        if self._workers is None:
            from concurrent.futures import ThreadPoolExecutor

            self._workers = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 1), "worker")
        future = self._workers.submit(function, *args)
        future.add_done_callback(lambda done: self.post(functools.partial(self._finish, done, then, failed)))

    def wait_apart(self, function: Callable[..., Any], *args: Any, then: Callable[[Any], None],
                   failed: Callable[[BaseException], None] | None = None) -> None:  # fmt: skip
        """Do the same as `offload` for what waits for the network.

        Its threads are others, or a name server that doesn't answer would hold up all
        logins; and they are daemons, so that they don't hold up the end of the program.
        """
        from concurrent.futures import Future

        future: Future[Any] = Future()
        future.add_done_callback(lambda done: self.post(functools.partial(self._finish, done, then, failed)))
        self._to_wait_for.put(functools.partial(self._wait_for, future, function, args))
        if self._waiting_threads < MAX_WAITING_THREADS:
            self._waiting_threads += 1
            threading.Thread(target=self._keep_waiting, name="waiting", daemon=True).start()

    def _keep_waiting(self) -> None:
        while (job := self._to_wait_for.get()) is not None:
            job()

    @staticmethod
    def _wait_for(future: Future[Any], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            future.set_result(function(*args))
        except Exception as error:  # whatever it is, it is the caller's, in the loop's thread
            future.set_exception(error)

    def _finish(self, future: Future[Any], then: Callable[[Any], None],
                failed: Callable[[BaseException], None] | None) -> None:  # fmt: skip
        error = future.exception()
        if error is None:
            then(future.result())
        elif failed is not None:
            failed(error)
        else:
            raise error

    def turn(self, timeout: float | None = None) -> None:
        """Run one turn, waiting at most `timeout` seconds for something to happen (None: as long as it takes)."""
        for key, events in self._selector.select(self._patience(timeout)):
            self.call(key.data, events)
        now = self.now()
        for _ in range(MAX_TIMERS_PER_TURN):
            if not self._timers or self._timers[0][0] > now:
                break
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                self.call(timer.callback)
        for _ in range(len(self._posted)):  # what these post in turn waits for the next turn
            self.call(self._posted.popleft())
        for callback in self.at_turn_end:
            self.call(callback)
        while self._last_in_turn:
            callbacks, self._last_in_turn = self._last_in_turn, []
            for callback in callbacks:
                self.call(callback)
            for callback in self.at_turn_end:  # what those changed must not wait until something else happens
                self.call(callback)

    def _patience(self, timeout: float | None) -> float | None:
        if self._posted or self._last_in_turn:
            return 0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if self._timers:
            due = max(0.0, self._timers[0][0] - self.now())
            return due if timeout is None else min(due, timeout)
        return timeout

    def call(self, callback: Callable[..., None], *args: int) -> None:
        """Call `callback` now; a bug in it is logged, and is not its caller's."""
        try:
            callback(*args)
        except Exception:  # the loop calls out: a bug in one callback must not end the others
            log.exception("unexpected error in %s", getattr(callback, "__qualname__", callback))

    def _woken(self, events: int) -> None:
        try:
            self._wake_reader.recv(4096)
        except BlockingIOError:
            pass

    def run(self) -> None:
        """Run turns until `stop`."""
        self._running = True
        while self._running:
            self.turn()

    def stop(self) -> None:
        """Let `run` return at the end of this turn."""
        self._running = False

    def close(self) -> None:
        """Release the selector, the wake-up pipe and the workers; nothing may be registered any more."""
        if self._workers is not None:
            self._workers.shutdown(wait=True, cancel_futures=True)
        for _ in range(self._waiting_threads):
            self._to_wait_for.put(None)
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()


# ==== 8. Storage: JSON files that lose nothing ====
#
# What must survive a power cut is kept in two shapes. A *document* is one JSON value per
# account (a roster, a vCard); a *log* is a list of records that grows at its end (messages
# waiting for somebody). Both are files that any editor can read, named by address:
#
#     DATA/journal-000042.jsonl                 what changed lately, one line per turn of the loop
#     DATA/example.org/roster/alice.json        a document of alice@example.org
#     DATA/example.org/offline/alice.jsonl      a log of hers
#     DATA/example.org/archive/alice/2026-11.jsonl   a part of a log that is kept in parts, here by month
#     DATA/example.org/secret.json              a document of the domain itself
#
# Rewriting a roster for each change would be slow, and a crash in the middle would tear it.
# So a change is first a few bytes at the end of the *journal*, and files follow later:
#
#     handlers change      commit()             disk thread            checkpoint, every few MB
#     documents and logs ─> one line with   ──> write, fsync,     ──>  a new journal begins, changed files
#     in memory             number and CRC      "synced up to n"       are written, the old journal goes
#
# *Half a turn never survives*: a line is read back whole or not at all. *Nothing overtakes
# its record*: `position` is the number of the newest line, `synced` of the newest on disk;
# what a connection wants to say at position n it says once `synced` has reached n. *Reading
# a journal twice does no harm*: a line says what a thing is afterwards, not by how much it
# changed. All runs on the loop's thread but `DiskThread.run` and the tasks it is given.
# Left out: transactions over several turns, queries, indexes.

Json = Any  # what JSON can say: None, bool, int, float, str, and lists and dicts of these
Attempt = TypeVar("Attempt")
Outcome = TypeVar("Outcome")

JOURNAL_BYTES = 4 * 1024 * 1024  # bytes until the next checkpoint; read back in about 0.2 s at start [measured]
CACHE_BYTES = 16 * 1024 * 1024  # bytes of memory for documents at rest; some 10,000 small ones
ENTRY_BYTES = 400  # bytes of memory that an empty entry of the cache costs
BYTES_PER_JSON_BYTE = 6  # bytes of memory per byte of JSON, once it is dicts and strings [measured: 5.6 to 6.2]
RESERVE_BYTES = 4 * 1024 * 1024  # bytes kept back, so that a full disk still takes what is under way
SAVES_UNDER_WAY = 8  # files handed to the disk thread at once: more would only sit in memory
SPACE_INTERVAL = 10.0  # seconds between two looks whether a full disk has room again
CLOSE_DISK_TIMEOUT = 10.0  # seconds; a file not written by then is still in the journal
LONGEST_FILE_NAME = 128  # bytes; file systems take 255, encrypted ones 143, and suffixes come on top
DISK_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encode_json(value: Json) -> bytes:
    """Return compact JSON in UTF-8, without a line break; raises TypeError or ValueError for what JSON cannot say."""
    return _encoder.encode(value).encode()


# -- Names of files
#
# Addresses come from strangers: `..`, `con`, names that differ only where a file system
# sees no difference. What is outside of a small alphabet is therefore percent-encoded,
# capitals and dots included, which also keeps every name inside its folder.

PLAIN_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-")
HASHED = "%sha256-"  # never the start of an encoded name: there two hexadecimal digits follow a percent sign
WINDOWS_DEVICES = frozenset(
    {"con", "prn", "aux", "nul"} | {f"{port}{digit}" for port in ("com", "lpt") for digit in range(10)}
)


def file_name(name: str) -> str:
    """Return the one file name, without suffix, for `name`: different names, different files, on any file system."""
    text = "".join(chr(byte) if byte in PLAIN_BYTES else f"%{byte:02x}" for byte in name.encode())
    if len(text) > LONGEST_FILE_NAME:
        return HASHED + hashlib.sha256(name.encode()).hexdigest()
    return _escape_first(text) if text in WINDOWS_DEVICES else text


def folder_name(domain: str) -> str:
    """Return the folder of a domain: like `file_name`, but single dots inside stay, for the reader's sake."""
    labels = domain.split(".")
    if not all(labels):
        return file_name(domain)  # leading, trailing or doubled dots mean something to file systems
    text = ".".join(file_name(label) for label in labels)
    if len(text) > LONGEST_FILE_NAME:
        return HASHED + hashlib.sha256(domain.encode()).hexdigest()
    return _escape_first(text) if text.startswith("journal-") else text  # our journals lie beside it


def _escape_first(text: str) -> str:
    return f"%{ord(text[0]):02x}{text[1:]}"


# -- The disk
#
# All that touches the operating system, in one place: for reading about what differs
# between systems, and for tests to break. `touched` collects the folders whose list of
# names changed: that list has to be synced too before a journal may go.


class Disk:
    """Files as the operating system has them; every method may raise OSError."""

    def __init__(self) -> None:
        self.touched: set[Path] = set()  # used by the disk thread only, once that runs

    def open(self, path: Path) -> BinaryIO:
        """Open a file for reading; any thread may."""
        return path.open("rb")

    def create(self, path: Path) -> int:
        """Open a file for appending, made with mode 0600 if it is not there, and return its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600)

    def write(self, file: int, data: bytes) -> None:
        """Write all of `data`; after an error some of it may be there."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]

    def truncate(self, file: int, length: int) -> None:
        """Cut a file off after `length` bytes."""
        os.ftruncate(file, length)

    def fsync(self, file: int) -> None:
        """Return when the file is on the medium; macOS has a separate word for "really"."""
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
        else:
            os.fsync(file)

    def sync(self, file: int) -> None:
        """`fsync`, whose failure is never mistaken for a full disk.

        After a failed fsync the system may have dropped the data and forgotten about it: the next
        one succeeds and means nothing (the PostgreSQL project found out in 2018). So it is final.
        """
        try:
            self.fsync(file)
        except OSError as error:
            raise OSError(errno.EIO, f"fsync failed: {error.strerror}") from error

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable; Windows has no such call and does without."""
        if os.name == "nt" or not folder.exists():
            return
        file = os.open(folder, os.O_RDONLY)
        try:
            self.sync(file)
        finally:
            os.close(file)

    def sync_folders(self) -> None:
        """Make all names durable that were made or removed since the last call."""
        for folder in sorted(self.touched):
            self.sync_folder(folder)
        self.touched.clear()

    def replace(self, source: Path, target: Path) -> None:
        """Let `source` take the place and name of `target` in one step."""
        self._insist(lambda: os.replace(source, target))

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there, and what a crash has left of an attempt to write it."""
        self.touched.add(path.parent)
        self._insist(lambda: path.unlink(missing_ok=True))
        self._insist(lambda: path.with_name(path.name + ".new").unlink(missing_ok=True))

    def remove_folder(self, folder: Path) -> None:
        """Remove a folder if nothing is in it any more."""
        try:
            folder.rmdir()
            self.touched.discard(folder)
            self.touched.add(folder.parent)
        except OSError:
            pass  # not empty: something came meanwhile

    def save(self, path: Path, data: bytes) -> None:
        """Write a whole file so that a crash leaves the old one or the new one, never something between."""
        for folder in reversed(path.parents[:3]):
            if not folder.is_dir():
                folder.mkdir(mode=0o700, exist_ok=True)
                self.touched.add(folder.parent)
        self.touched |= {path.parent.parent, path.parent}
        fresh = path.with_name(path.name + ".new")
        file = self.create(fresh)
        try:
            self.truncate(file, 0)  # what a crash left behind
            self.write(file, data)
            self.sync(file)
        finally:
            os.close(file)
        self.replace(fresh, path)

    def patch(self, path: Path, offset: int, data: bytes, amended: Mapping[int, bytes]) -> None:
        """Let a file end with `data` from `offset` on; before that, only what is `amended` (by offset) is touched."""
        file = os.open(path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        try:
            for place, piece in {**amended, offset: data}.items():
                os.lseek(file, place, os.SEEK_SET)
                self.write(file, piece)
            self.truncate(file, offset + len(data))
            self.sync(file)
        finally:
            os.close(file)

    def reserve(self, path: Path, size: int) -> None:
        """Make a file of `size` bytes that really takes this room: noise, as zeros may be compressed away."""
        if path.exists() and path.stat().st_size == size:
            return
        file = self.create(path)
        try:
            self.truncate(file, 0)
            self.write(file, os.urandom(size))
        except OSError:
            self.truncate(file, 0)  # half a reserve would only take the last room from others
            raise
        finally:
            os.close(file)

    def aside(self, path: Path) -> Path:
        """Return NAME.broken-DATE, a name that no file has yet."""
        stem = f"{path.name}.broken-{time.strftime('%Y-%m-%dT%H%M%SZ', time.gmtime())}"
        names = (f"{stem}-{number}" if number else stem for number in count())
        return next(path.with_name(name) for name in names if not path.with_name(name).exists())

    def set_aside(self, path: Path) -> str:
        """Rename a damaged file to NAME.broken-DATE and return its new name."""
        aside = self.aside(path)
        self.replace(path, aside)
        return aside.name

    def copy_aside(self, path: Path) -> str:
        """Copy a file that is damaged in part to NAME.broken-DATE and return the name of the copy."""
        aside = self.aside(path)
        with self.open(path) as file:
            self.keep(aside, file.read())
        return aside.name

    def keep(self, path: Path, data: bytes) -> None:
        """Write a new file beside others, synced."""
        file = self.create(path)
        try:
            self.write(file, data)
            self.sync(file)
        finally:
            os.close(file)

    def _insist(self, action: Callable[[], None]) -> None:
        """Windows refuses to replace or remove what a virus scanner, or our own reader, has open just now."""
        for attempts_left in reversed(range(40)):
            try:
                return action()
            except PermissionError:
                if os.name != "nt" or not attempts_left:
                    raise
                time.sleep(0.05)


def lock_folder(folder: Path) -> int:
    """Keep other servers out of the data folder; the lock ends with the descriptor returned, or the process.

    Two servers in one folder would each overwrite what the other promised. Raises ConfigError.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise ConfigError(f"{folder}: in use by another xmppd: stop it, or give this one its own folder") from error
    return file


# -- The journal
#
# One turn is one line:
#
#     {"crc":"5d1e0f7a","seq":17,"changes":[["put","roster","alice@example.org","bob@example.org",{…}],…]}
#
# The checksum covers all that follows it, the line's end included; numbers follow each
# other without a gap, over the borders of files too. What a change says:
#
#     set      kind owner value                        a document is this now (null: it is gone)
#     put      kind owner key item                     an item of a document is this now (null: it is gone)
#     append   kind owner generation offset record     a log has this record at this offset
#     amend    kind owner generation offset length record   the record there is this now, and as long as before
#     rewrite  kind owner generation records           a log has just these records, in a new generation
#     drop     kind owner generation offset            the records before this offset are gone


class Replayed(NamedTuple):
    """What a journal says: all changes in order, the number of its last good line, and that line's end in bytes."""

    changes: list[Json]
    sequence: int
    good_length: int


def journal_line(sequence: int, changes: Iterable[bytes]) -> bytes:
    """Return the line for one turn, made of changes that are JSON already."""
    body = b'"seq":%d,"changes":[%s]}\n' % (sequence, b",".join(changes))
    return b"%s%s" % (_journal_seal(body), body)


def _journal_seal(body: bytes) -> bytes:
    return b'{"crc":"%08x",' % zlib.crc32(body)


def replay(data: bytes, after: int = 0) -> Replayed:
    """Read a journal up to its first bad line; its first line must be number `after` + 1, or any if `after` is 0."""
    changes: list[Json] = []
    position = 0
    for line in data.splitlines(keepends=True):
        seal, body = line[:18], line[18:]
        if not body.endswith(b"\n") or seal != _journal_seal(body):
            break
        turn = json.loads(line)
        if after and turn["seq"] != after + 1:
            break
        after = turn["seq"]
        changes += turn["changes"]
        position += len(line)
    return Replayed(changes, after, position)


def journal_path(folder: Path, number: int) -> Path:
    """Return where the journal of a number lies."""
    return folder / f"journal-{number:06d}.jsonl"


def journals(folder: Path) -> list[tuple[int, Path]]:
    """Return the journals in the data folder, oldest first, each with its number."""
    names = (re.fullmatch(r"journal-(\d{6,})\.jsonl", path.name) for path in folder.iterdir())
    return sorted((int(name[1]), folder / name[0]) for name in names if name)


# -- The disk thread
#
# An fsync takes 0.1 ms on a good disk and a second on a bad card, so the loop never waits
# for one. Lines come first: all that wait are written together and share one fsync. After
# them comes at most one task (a file of a checkpoint), so that neither starves.


class Line(NamedTuple):
    """A line for the journal; with `journal` not 0 it is the first line of the journal of that number."""

    sequence: int
    data: bytes
    journal: int = 0


class Task(NamedTuple):
    """Work for the disk thread; `then` is told on the loop whether it was done (False: no room on the disk)."""

    work: Callable[[], None]
    then: Callable[[bool], None]


class DiskThread:
    """Writes what it is given, in order, and reports; it decides nothing and knows no document.

    `report` is called in this thread with a callable that is to run on the loop. When the disk fails
    for good, everything given to it from then on is dropped: better than a journal with a hole.
    """

    def __init__(self, storage: Storage, report: Callable[[Callable[[], None]], None]) -> None:
        self._storage = storage  # only for what it is told, on the loop, and for what never changes
        self._disk = storage.disk
        self._report = report
        self._inbox: queue.SimpleQueue[Line | Task | None] = queue.SimpleQueue()  # None: stop
        self._lines: list[Line] = []
        self._tasks: deque[Task] = deque()
        self._file = -1  # the journal
        self._length = 0  # bytes of it that are good
        self._unsynced = False  # with sync = false: lines are written that no fsync covers
        self._reserve = storage.folder / ".reserve"
        self._has_reserve = False
        self._stopping = False
        self._thread = threading.Thread(target=self.run, name="disk", daemon=True)

    def start(self, first: Line) -> None:
        """Begin a journal, in the caller's thread so that its errors are the caller's, then the thread."""
        self._has_reserve = self._reserve.exists()
        self._spending_the_reserve(lambda: self._begin(first))
        self._renew_reserve()
        self._thread.start()

    def put(self, work: Line | Task) -> None:
        """Hand over work; returns at once."""
        self._inbox.put(work)

    def stop(self, timeout: float) -> bool:
        """Let the thread finish the lines it has, and return whether it did within `timeout` seconds."""
        self._inbox.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def run(self) -> None:
        """The thread: collect, write lines, do one task, again."""
        why = "the disk thread met a bug, see its traceback"
        try:
            while not self._stopping:
                self._collect()
                self._write_lines()
                self._do_task()
            self._sync_journal()
            why = ""
        except OSError as error:
            why = str(error)
        finally:  # whatever it was: an answer that waits for a dead thread must not wait in silence
            os.close(self._file)
            if why:
                self._report(functools.partial(self._storage.disk_failed, why))

    def renew_reserve(self) -> None:
        """Task: put room aside for the next time that the disk is full."""
        self._has_reserve = False
        self._disk.reserve(self._reserve, RESERVE_BYTES)
        self._has_reserve = True

    def _collect(self) -> None:
        """Sort all that has come into lines and tasks; wait only if there is nothing to do."""
        wait = not self._tasks
        while True:
            try:
                work = self._inbox.get(wait)
            except queue.Empty:
                return
            wait = False
            if work is None:
                self._stopping = True
            elif isinstance(work, Line):
                self._lines.append(work)
            else:
                self._tasks.append(work)

    def _write_lines(self) -> None:
        """Group commit: what waits is written together, up to where a new journal begins."""
        while self._lines:
            line = self._lines[0]
            if line.journal:
                self._sync_journal()
                self._spending_the_reserve(functools.partial(self._begin, self._lines.pop(0)))
            else:
                border = next((at for at, line in enumerate(self._lines) if line.journal), len(self._lines))
                group, self._lines = self._lines[:border], self._lines[border:]
                line = group[-1]
                self._spending_the_reserve(functools.partial(self._append, b"".join(line.data for line in group)))
                if self._storage.sync:
                    self._sync_journal()
            self._report(functools.partial(self._storage.line_synced, line.sequence))

    def _do_task(self) -> None:
        if not self._tasks or self._stopping:
            return
        task = self._tasks.popleft()
        self._sync_journal()  # a file must not be newer than the journal, or half a turn could survive in it
        try:
            task.work()
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            self._report(functools.partial(task.then, False))
        else:
            self._report(functools.partial(task.then, True))

    def _begin(self, line: Line) -> None:
        folder = self._storage.folder
        file = self._disk.create(journal_path(folder, line.journal))
        try:
            self._disk.truncate(file, 0)
            self._disk.write(file, line.data)
            self._disk.sync(file)
            self._disk.sync_folder(folder)
        except OSError:
            os.close(file)
            raise
        if self._file >= 0:
            os.close(self._file)
        self._file, self._length = file, len(line.data)

    def _append(self, data: bytes) -> None:
        try:
            self._disk.write(self._file, data)
        except OSError:
            self._disk.truncate(self._file, self._length)  # the last good offset: half a line would end the replay
            raise
        self._length += len(data)
        self._unsynced = True

    def _sync_journal(self) -> None:
        if self._unsynced:
            self._disk.sync(self._file)
            self._unsynced = False

    def _spending_the_reserve(self, action: Callable[[], None]) -> None:
        """Do something; if the disk is full, give it the room that was put aside and do it again."""
        try:
            action()
        except OSError as error:
            if error.errno not in DISK_IS_FULL or not self._has_reserve:
                raise
            self._disk.remove(self._reserve)
            self._has_reserve = False
            action()
            self._renew_reserve()

    def _renew_reserve(self) -> None:
        try:
            self.renew_reserve()
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            self._report(self._storage.disk_filled)


# -- What is in memory
#
# An entry stands for one document or log of one owner. At rest it lives in a cache that is
# bounded in bytes; the least recently used goes first. Absence is an entry too, or each
# message to somebody without a privacy list would ask the disk for one.
#
# An entry that changed is *pinned*: its file is behind, the cache must not lose it. It
# stays pinned until no journal speaks of it any more, not merely until its file is written.
# So a log in memory always knows the offsets that a journal may still refer to.


@dataclass(slots=True, eq=False)
class Entry:
    """One document or log in memory."""

    shelf: Shelf[Any]
    owner: JID
    cost: int = ENTRY_BYTES  # bytes of memory, estimated
    journal: int = 0  # number of the newest journal that speaks of it, which pins it; 0: it is at rest


Kept = TypeVar("Kept", bound=Entry)


class Cache:
    """The entries that may be dropped, in the order of their last use."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # bytes
        self.size = 0  # bytes
        self._entries: OrderedDict[Entry, None] = OrderedDict()
        self.use = self._entries.move_to_end  # bound once: it is called for every look at a document

    def add(self, entry: Entry) -> None:
        """Take an entry in and drop others until the rest fits; the newest always stays."""
        while self._entries and self.size + entry.cost > self.limit:
            oldest, _ = self._entries.popitem(last=False)
            self.size -= oldest.cost
            oldest.shelf.let_go(oldest.owner)
        self._entries[entry] = None
        self.size += entry.cost

    def release(self, entry: Entry) -> None:
        """Let go of an entry that is pinned from now on."""
        del self._entries[entry]
        self.size -= entry.cost


class Shelf(ABC, Generic[Kept]):
    """What `Documents` and `Log` have in common: a kind, its place on disk, its entries in memory."""

    suffix: ClassVar[str]
    in_parts: ClassVar[bool] = False  # whether an owner may have several, named by what stands for its resource

    def __init__(self, storage: Storage, kind: str) -> None:
        assert re.fullmatch(r"[a-z0-9_-]+", kind), kind
        self.storage = storage
        self.kind = kind
        self.entries: dict[JID, Kept] = {}

    def find(self, owner: JID) -> Kept:
        """Return the entry of an owner, from the disk if need be.

        Raises StanzaError("internal-server-error") when the disk cannot be read: to go on as if there
        were nothing would let the next change overwrite what is there.
        """
        entry = self.entries.get(owner)
        if entry is not None:
            if not entry.journal:
                self.storage.cache.use(entry)
            return entry
        assert self.in_parts or not owner.resource, owner
        try:
            entry = self._load(owner)
        except OSError as error:
            log.error("%s cannot be read: %s", self.path(owner), error)
            raise StanzaError("internal-server-error", "stored data cannot be read") from error
        self.storage.cache.add(entry)
        self.entries[owner] = entry
        return entry

    def let_go(self, owner: JID) -> None:
        """Forget an entry that is at rest."""
        del self.entries[owner]

    def path(self, owner: JID) -> Path:
        """Return the file of an owner; a domain's own lies beside the folder of its accounts."""
        folder = self.storage.folder / folder_name(owner.domain)
        if not owner.local:
            return folder / (self.kind + self.suffix)
        if owner.resource:
            return folder / self.kind / file_name(owner.local) / (file_name(owner.resource) + self.suffix)
        return folder / self.kind / (file_name(owner.local) + self.suffix)

    def owners(self, domain: str) -> Iterator[JID]:
        """Yield everybody of a domain who has something here, on disk or pending; not the domain itself."""
        found = {owner for owner in self._owners_on_disk(domain) if owner not in self.entries}
        for owner, entry in self.entries.items():
            if owner.domain == domain and owner.local and self.holds(entry):
                found.add(owner)
        yield from sorted(found)

    def change(self, entry: Entry, verb: str, *values: bytes) -> None:
        """Enter a change in the line of this turn; `values` are JSON already."""
        head = encode_json([verb, self.kind, str(entry.owner)])
        self.storage.record(entry, b",".join((head[:-1], *values)) + b"]")

    def _owners_on_disk(self, domain: str) -> Iterator[JID]:
        folder = self.storage.folder / folder_name(domain) / self.kind
        if not folder.is_dir():
            return
        for name in os.listdir(folder):
            owner = self._owner_of(folder / name, domain) if name.endswith(self.suffix) else None
            if owner is not None:
                yield owner

    def _owner_of(self, path: Path, domain: str) -> JID | None:
        """Whose file this is; None for files of that suffix that are not ours."""
        local, *part = path.relative_to(self.storage.folder / folder_name(domain) / self.kind).parts
        stem = path.name.removesuffix(self.suffix)
        plain = f"{local}@{domain}/{stem}" if part else f"{stem}@{domain}"
        try:
            is_hashed = HASHED in (local[: len(HASHED)], stem[: len(HASHED)])
            owner = JID.parse(self._name_inside(path) if is_hashed else unquote(plain, errors="strict"))
        except (StanzaError, OSError, ValueError, KeyError, TypeError):
            return None
        return owner if self.path(owner) == path else None

    @abstractmethod
    def holds(self, entry: Kept) -> bool:
        """Whether there is something: an entry may also stand for an absence."""

    @abstractmethod
    def saving(self, entry: Kept) -> Task:
        """Return the task that brings the file of an entry up to date, with what to do when it is done."""

    @abstractmethod
    def _load(self, owner: JID) -> Kept:
        """Read the file of an owner; raises OSError, but not for a file that is absent or damaged."""

    @abstractmethod
    def _name_inside(self, path: Path) -> str:
        """Return the owner that a file names itself; raises ValueError, KeyError or TypeError if it doesn't."""


# -- Documents


@dataclass(slots=True, eq=False)
class Document(Entry):
    """A document in memory; None stands for its absence."""

    value: Json = None
    lent: bool = False  # somebody may hold `value`: copy it before the next change


class Documents(Shelf[Document]):
    """All documents of one kind, by owner: an account's bare JID, or a domain.

    Documents are values: read, copy, assign; the assignment is the change. A value that was handed
    out is never edited in place, neither by its reader nor here. Changes raise
    StanzaError("resource-constraint") while nothing can be stored, before anything is changed.
    """

    suffix = ".json"
    shape: type = object  # what each file must hold

    def get(self, owner: JID, default: Json = None) -> Json:
        """Return the document of an owner, or `default`."""
        document = self.find(owner)
        if document.value is None:
            return default
        document.lent = True
        return frozen(document.value) if self.storage.freeze else document.value

    def __getitem__(self, owner: JID) -> Json:
        value = self.get(owner)
        if value is None:
            raise KeyError(owner)
        return value

    def __contains__(self, owner: JID) -> bool:
        return self.find(owner).value is not None

    def __setitem__(self, owner: JID, value: Json) -> None:
        """Let this be the document from now on; None removes it."""
        self.storage.check()
        data = encode_json(value)
        document = self.find(owner)
        self.change(document, "set", data)
        if self.storage.way_back is not None:
            self.storage.way_back.append(functools.partial(setattr, document, "value", document.value))
        document.value = self._own(value, data)
        document.lent = True  # by whoever gave it

    def __delitem__(self, owner: JID) -> None:
        """Remove a document; it is no error if there is none."""
        if owner in self:
            self[owner] = None

    def items(self, owner: JID) -> Mapping[str, Json]:
        """Return the items of a keyed document, which is a dict; empty if there is none. Not to be edited."""
        items: Mapping[str, Json] = self.get(owner, {})
        return items

    def item(self, owner: JID, key: str) -> Json:
        """Return one item of a keyed document, or None. Not to be edited."""
        value = self.find(owner).value
        item = None if value is None else value.get(key)
        return frozen(item) if self.storage.freeze else item

    def put(self, owner: JID, key: str, item: Json) -> None:
        """Change one item of a keyed document (None removes it): only the item is journalled, not the whole."""
        self.storage.check()
        data = encode_json(item)
        document = self.find(owner)
        if item is None and key not in (document.value or ()):
            return
        self.change(document, "put", encode_json(key), data)
        if self.storage.way_back is not None:
            self.storage.way_back.append(self._undoing_put(document, key))
        self._put(document, key, self._own(item, data))

    def replay_set(self, owner: JID, value: Json) -> None:
        """Journal: `set`."""
        document = self.find(owner)
        document.value = value
        self.storage.pin(document)

    def replay_put(self, owner: JID, key: str, item: Json) -> None:
        """Journal: `put`."""
        self.shape = dict  # or there would be nothing to put it into
        document = self.find(owner)
        self._put(document, key, item)
        self.storage.pin(document)

    def holds(self, entry: Document) -> bool:
        """Whether there is a document."""
        return entry.value is not None

    def saving(self, entry: Document) -> Task:
        """Return the task that writes the whole document, as it is now."""
        path, disk, owner = self.path(entry.owner), self.storage.disk, entry.owner
        if entry.value is None:
            return Task(lambda: disk.remove(path), lambda done: self.storage.saved(entry, done))
        named = path.name.startswith(HASHED)
        data = encode_json({"owner": str(owner), "document": entry.value} if named else entry.value)
        entry.cost = ENTRY_BYTES + BYTES_PER_JSON_BYTE * len(data)
        return Task(lambda: disk.save(path, data + b"\n"), lambda done: self.storage.saved(entry, done))

    @staticmethod
    def _put(document: Document, key: str, item: Json) -> None:
        if document.lent or document.value is None:
            document.value = dict(document.value or {})
            document.lent = False
        if item is None:
            document.value.pop(key, None)
        else:
            document.value[key] = item

    def _undoing_put(self, document: Document, key: str) -> Callable[[], None]:
        if document.value is None:
            return functools.partial(setattr, document, "value", None)
        return functools.partial(self._put, document, key, document.value.get(key))

    def _own(self, value: Json, data: bytes) -> Json:
        """Return what the cache keeps: the value itself, or in tests a copy that nobody else can edit."""
        if not self.storage.freeze:
            return value
        copy = json.loads(data)
        assert copy == value, f"{value!r} is not the same after a restart"
        return copy

    def _load(self, owner: JID) -> Document:
        path = self.path(owner)
        try:
            with self.storage.disk.open(path) as file:
                data = file.read()
        except FileNotFoundError:
            return Document(self, owner)
        try:
            value = json.loads(data)
            value = value["document"] if path.name.startswith(HASHED) else value
            if value is None or not isinstance(value, self.shape):
                raise TypeError(f"expected {self.shape.__name__}, found {type(value).__name__}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            log.error("%s is damaged (%s): set aside as %s", path, error, self.storage.disk.set_aside(path))
            return Document(self, owner)
        return Document(self, owner, ENTRY_BYTES + BYTES_PER_JSON_BYTE * len(data), value=value)

    def _name_inside(self, path: Path) -> str:
        with self.storage.disk.open(path) as file:
            return str(json.loads(file.read())["owner"])


def _refuse(self: Json, *args: Json, **more: Json) -> NoReturn:
    raise TypeError("a document is a value: copy it, edit the copy, assign that")


def _thaw(self: Json, memo: Json = None) -> Json:
    return json.loads(encode_json(self))


_CHANGES_OF_BOTH = ("__setitem__", "__delitem__", "clear", "pop")
FrozenDict = type(
    "FrozenDict",
    (dict,),
    dict.fromkeys((*_CHANGES_OF_BOTH, "popitem", "setdefault", "update", "__ior__"), _refuse)
    | {"__copy__": lambda self: dict(self), "__deepcopy__": _thaw},
)
FrozenList = type(
    "FrozenList",
    (list,),
    dict.fromkeys(
        (*_CHANGES_OF_BOTH, "append", "extend", "insert", "remove", "reverse", "sort", "__iadd__", "__imul__"), _refuse
    )
    | {"__copy__": lambda self: list(self), "__deepcopy__": _thaw},
)


def frozen(value: Json) -> Json:
    """Return a copy that raises TypeError when it is edited, all the way down: tests find in-place edits by it."""
    if isinstance(value, dict):
        return FrozenDict({key: frozen(item) for key, item in value.items()})
    if isinstance(value, list):
        return FrozenList([frozen(item) for item in value])
    return value


# -- Logs
#
# A log's file is a head line and then one record per line:
#
#     {"log":"alice@example.org","generation":1,"start":0}
#     {"stanza":"<message …","at":"2026-11-22T14:00:00Z"}
#
# A record's *offset* counts the bytes of all records before it in this generation, dropped
# ones too; `start` is the offset of the first that is still in the file. New records wait
# in memory, and in the journal, until the checkpoint:
#
#            file, up to `base`        pending
#     ├╌╌╌╌╌╌┼──────────────────┼──────────────────┤
#     0      start            base               end
#
# Appending reads at most the head of the file. Dropping only moves `start`; the checkpoint
# then writes the file anew. A record may be *amended* by one that is not longer, padded with
# spaces to its length: all offsets stay, and the checkpoint writes just that place.
#
# An owner may have a log in *parts*, for which `alice@example.org/2026-11` stands: small
# enough to be rewritten, and dropped as a whole when their time has come. `LogReader` reads
# at any offset, so that who knows an order of the records can bisect.


@dataclass(slots=True, eq=False)
class Tail(Entry):
    """What memory knows of a log: where it starts, where its file ends, what comes after that."""

    generation: int = 1
    start: int = 0
    base: int = 0
    end: int = 0
    pending: deque[bytes] = field(default_factory=deque)  # lines
    count: int | None = None  # of records; None: not counted yet
    amended: dict[int, bytes] = field(default_factory=dict)  # lines that stand otherwise in the file, by offset

    def append(self, line: bytes) -> None:
        """Add a record's line at the end."""
        self.pending.append(line)
        self.end += len(line)
        if self.count is not None:
            self.count += 1

    def take_back(self) -> None:
        """Forget the newest record, which is still pending."""
        self.end -= len(self.pending.pop())
        if self.count is not None:
            self.count -= 1

    def returning(self) -> Callable[[], None]:
        """Return what brings the log back to how it is now."""
        names = ("generation", "start", "base", "end", "count")
        before = {name: getattr(self, name) for name in names}
        pending, amended = deque(self.pending), dict(self.amended)

        def go_back() -> None:
            self.pending, self.amended = pending, amended
            for name, value in before.items():
                setattr(self, name, value)

        return go_back

    def restart(self, generation: int, offset: int = 0) -> None:
        """Be empty, at this place."""
        self.generation = generation
        self.start = self.base = self.end = offset
        self.pending.clear()
        self.amended.clear()
        self.count = 0

    def cut(self, offset: int) -> None:
        """Forget what lies at `offset` and later: the journal is about to say it again."""
        self.start = min(self.start, offset)
        self.base = self.end = offset
        self.pending.clear()
        self.amended = {place: line for place, line in self.amended.items() if place < offset}
        self.count = None

    def amend(self, offset: int, line: bytes) -> None:
        """Let the record at `offset` be another of the same length."""
        self.amended[offset] = line  # also of a pending one, which may be on its way to the file as it was
        place = self.base
        for index, pending in enumerate(self.pending):
            if place == offset:
                assert len(line) == len(pending)
                self.pending[index] = line
                return
            place += len(pending)

    def advance(self, offset: int) -> None:
        """Pending records before `offset` need no place in memory any more."""
        while self.base < offset:
            self.base = offset if not self.pending else self.base + len(self.pending.popleft())

    def drop(self, offset: int) -> None:
        """Let the log start at `offset`."""
        self.advance(offset)
        self.start = offset
        self.amended = {place: line for place, line in self.amended.items() if place >= offset}
        self.count = None


class LogHead(NamedTuple):
    """The first line of a log's file, and its length in bytes."""

    owner: str
    generation: int
    start: int
    length: int


def log_head(owner: str, generation: int, start: int) -> bytes:
    """Return the first line of a log's file."""
    return encode_json({"log": owner, "generation": generation, "start": start}) + b"\n"


def read_log_head(file: BinaryIO) -> LogHead:
    """Read the first line of a log's file; raises ValueError, KeyError or TypeError if it is none."""
    line = file.readline()
    fields = json.loads(line)
    return LogHead(str(fields["log"]), int(fields["generation"]), int(fields["start"]), len(line))


class LogReader:
    """The lines of a log from `start` to `end`, by offset; made for one turn of the loop, and closed in it.

    Raises StanzaError("internal-server-error") when the file does not have what it should.
    """

    BLOCK = 64 * 1024  # bytes read at once

    def __init__(self, tail: Tail, disk: Disk, path: Path) -> None:
        self.start, self.end = tail.start, tail.end
        self._tail = tail
        self._file: BinaryIO | None = None
        self._shift = 0  # from an offset to a place in the file
        self._pending = b"".join(tail.pending)
        if tail.base > tail.start:
            self._open(disk, path)

    def _open(self, disk: Disk, path: Path) -> None:
        try:
            self._file = disk.open(path)
            head = read_log_head(self._file)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("%s cannot be read: %s", path, error)
            self.close()
            raise StanzaError("internal-server-error", "stored data cannot be read") from error
        self._shift = head.length - head.start

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Return the bytes from `offset` on, `size` of them if there are as many in this part of memory or disk."""
        base = self._tail.base
        if offset >= base:
            return self._pending[offset - base : offset - base + size]
        assert self._file is not None
        self._file.seek(offset + self._shift)
        data = self._file.read(min(size, base - offset))
        if not data:
            raise StanzaError("internal-server-error", "stored data cannot be read")
        return self._amended(offset, data) if self._tail.amended else data

    def _amended(self, offset: int, data: bytes) -> bytes:
        for place, line in self._tail.amended.items():
            first, last = max(place, offset), min(place + len(line), offset + len(data))
            if first < last:
                data = data[: first - offset] + line[first - place : last - place] + data[last - offset :]
        return data

    def next_line(self, offset: int) -> int:
        """Return where the first line begins that begins at `offset` or later; `end` if there is none."""
        if offset <= self.start:
            return self.start
        place = offset - 1
        while place < self.end:
            data = self.read(place, 1024)
            if (found := data.find(b"\n")) >= 0:
                return place + found + 1
            place += len(data)
        return self.end

    def line(self, offset: int) -> bytes:
        """Return the line that begins at `offset`."""
        data = b""
        while not data.endswith(b"\n"):
            more = self.read(offset + len(data), 4096)
            data += more[: more.find(b"\n") + 1] or more
        return data

    def blocks(self, low: int, high: int, *, backward: bool = False) -> Iterator[tuple[int, bytes]]:
        """Yield what stands between two places where lines begin, in pieces of whole lines, each with its offset."""
        while low < high:
            if backward:
                border = self.next_line(max(low, high - self.BLOCK))
                first = border if border < high else self._line_before(low, high)
                last, high = high, first
            else:
                border = self.next_line(min(high, low + self.BLOCK))
                first, last, low = low, border, border
            yield first, self._between(first, last)

    def _line_before(self, low: int, high: int) -> int:
        """Where the line begins that ends at `high`: one that is longer than a block."""
        step = self.BLOCK
        while (found := self.next_line(max(low, high - step))) >= high:
            step *= 2
        return found

    def _between(self, first: int, last: int) -> bytes:
        data = self.read(first, last - first)
        while len(data) < last - first:
            data += self.read(first + len(data), last - first - len(data))
        return data


class Log(Shelf[Tail]):
    """All logs of one kind, by owner: lists of JSON records that grow at their end.

    Changes raise StanzaError("resource-constraint") while nothing can be stored, before anything is changed.
    """

    suffix = ".jsonl"
    in_parts = True

    def __init__(self, storage: Storage, kind: str) -> None:
        super().__init__(storage, kind)
        self._parts: dict[JID, set[str]] = {}  # those in memory, some of which may not be on disk yet

    def find(self, owner: JID) -> Tail:
        """See `Shelf.find`."""
        if owner.resource and owner not in self.entries:
            self._parts.setdefault(owner.bare, set()).add(owner.resource)
        return super().find(owner)

    def let_go(self, owner: JID) -> None:
        """See `Shelf.let_go`."""
        super().let_go(owner)
        if owner.resource:
            parts = self._parts[owner.bare]
            parts.discard(owner.resource)
            if not parts:
                del self._parts[owner.bare]

    def append(self, owner: JID, record: Json) -> None:
        """Add a record at the end; reads no records, however many there are."""
        self.append_line(owner, encode_json(record))

    def append_line(self, owner: JID, line: bytes) -> None:
        """Add a record that is compact JSON already."""
        self.storage.check()
        tail = self.find(owner)
        self.change(tail, "append", b"%d,%d" % (tail.generation, tail.end), line)
        if self.storage.way_back is not None:
            self.storage.way_back.append(tail.take_back)
        tail.append(line + b"\n")

    def amend(self, owner: JID, offset: int, length: int, record: Json) -> None:
        """Let the record at `offset`, whose line has `length` bytes, be this one; raises ValueError if it is longer."""
        self.storage.check()
        line = encode_json(record)
        if len(line) >= length:
            raise ValueError("an amended record must not be longer")
        tail = self.find(owner)
        self.change(tail, "amend", b"%d,%d,%d" % (tail.generation, offset, length), line)
        if self.storage.way_back is not None:
            self.storage.way_back.append(tail.returning())
        tail.amend(offset, line.ljust(length - 1) + b"\n")

    def reader(self, owner: JID) -> LogReader:
        """Return a reader of the log as it is now; close it in this turn."""
        return LogReader(self.find(owner), self.storage.disk, self.path(owner))

    def parts(self, owner: JID) -> list[str]:
        """Return the names of the parts that the owner's log has, on disk or pending, in their order as texts."""
        if not owner.local:
            return []
        folder = self.path(owner).with_suffix("")
        names = os.listdir(folder) if folder.is_dir() else ()
        found = {unquote(name.removesuffix(self.suffix)) for name in names if name.endswith(self.suffix)}
        found |= self._parts.get(owner, set())
        return sorted(part for part in found if self.holds(self.find(owner.with_resource(part))))

    def owners_in_parts(self, domain: str) -> Iterator[JID]:
        """Yield everybody of a domain who has a log in parts."""
        folder = self.storage.folder / folder_name(domain) / self.kind
        on_disk = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
        found = {owner for owner in self._parts if owner.domain == domain}
        files = (path for place in on_disk for path in sorted(place.glob("*" + self.suffix))[:1])
        owners = (self._owner_of(path, domain) for path in files)
        yield from sorted(found | {owner.bare for owner in owners if owner is not None})

    def read(self, owner: JID) -> list[Json]:
        """Return all records, oldest first, those included that only the journal has so far.

        Damage in the file costs the damaged records: the file is kept aside, the rest goes on.
        """
        tail = self.find(owner)
        records: list[Json] = []
        size = 0
        whole = True
        for line in self._lines(tail):
            size += len(line)
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                whole = False
        if not whole or size != tail.end - tail.start:
            self._mend(owner, records)
        return records

    def count(self, owner: JID) -> int:
        """Return how many records there are; reads the file at most once."""
        tail = self.find(owner)
        if tail.count is None:
            tail.count = sum(1 for _ in self._lines(tail))
        return tail.count

    def size(self, owner: JID) -> int:
        """Return how many bytes the records take."""
        tail = self.find(owner)
        return tail.end - tail.start

    def rewrite(self, owner: JID, records: Iterable[Json]) -> None:
        """Let these be all records from now on, in a new generation; none at all removes the log."""
        self.storage.check()
        lines = [encode_json(record) for record in records]
        tail = self.find(owner)
        self.change(tail, "rewrite", b"%d,[%s]" % (tail.generation + 1, b",".join(lines)))
        if self.storage.way_back is not None:
            self.storage.way_back.append(tail.returning())
        tail.restart(tail.generation + 1)
        for line in lines:
            tail.append(line + b"\n")

    def drop_before(self, owner: JID, offset: int) -> None:
        """Remove the records before `offset`, where one begins or the log ends."""
        self.storage.check()
        tail = self.find(owner)
        if offset > tail.start:
            self.change(tail, "drop", b"%d,%d" % (tail.generation, offset))
            if self.storage.way_back is not None:
                self.storage.way_back.append(tail.returning())
            tail.drop(offset)

    def drop(self, owner: JID, n: int) -> None:
        """Remove the first `n` records, or all if there are fewer; reads those, writes next to nothing."""
        self.storage.check()
        tail = self.find(owner)
        left = max(self.count(owner) - n, 0)
        dropped = sum(len(line) for _, line in zip(range(n), self._lines(tail), strict=False))
        if not dropped:
            return
        start = tail.start + dropped if left else tail.end
        self.change(tail, "drop", b"%d,%d" % (tail.generation, start))
        if self.storage.way_back is not None:
            self.storage.way_back.append(tail.returning())
        tail.drop(start)
        tail.count = left

    def replay_append(self, owner: JID, generation: int, offset: int, record: Json) -> None:
        """Journal: `append`. The file may have the record already, whole or torn: then it is written again."""
        tail = self.find(owner)
        if generation < tail.generation:
            return  # it was rewritten later, and the file has that already
        if generation > tail.generation or offset > tail.end:
            self._lost_file(tail, generation, offset)
        elif offset < tail.end:
            tail.cut(offset)
        tail.append(encode_json(record) + b"\n")
        self.storage.pin(tail)

    def replay_amend(self, owner: JID, generation: int, offset: int, length: int, record: Json) -> None:
        """Journal: `amend`."""
        tail = self.find(owner)
        if generation == tail.generation and tail.start <= offset < tail.end:
            tail.amend(offset, encode_json(record).ljust(length - 1) + b"\n")
            self.storage.pin(tail)

    def replay_rewrite(self, owner: JID, generation: int, records: list[Json]) -> None:
        """Journal: `rewrite`."""
        tail = self.find(owner)
        if generation <= tail.generation:
            return  # the file has it already, and perhaps more: a file is replaced whole or not at all
        tail.restart(generation)
        for record in records:
            tail.append(encode_json(record) + b"\n")
        self.storage.pin(tail)

    def replay_drop(self, owner: JID, generation: int, start: int) -> None:
        """Journal: `drop`."""
        tail = self.find(owner)
        if generation < tail.generation or (generation == tail.generation and start <= tail.start):
            return
        if generation > tail.generation or start > tail.end:
            self._lost_file(tail, generation, start)
        else:
            tail.drop(start)
        self.storage.pin(tail)

    def holds(self, entry: Tail) -> bool:
        """Whether there is a record."""
        return entry.end > entry.start

    def saving(self, entry: Tail) -> Task:
        """Return the task that appends what is pending now, or writes the file anew after a drop or a rewrite."""
        generation, start, base, end = entry.generation, entry.start, entry.base, entry.end
        data, amended = b"".join(entry.pending), dict(entry.amended)
        path, owner = self.path(entry.owner), str(entry.owner)

        def save() -> None:
            if start == end:
                self.storage.disk.remove(path)
                if entry.owner.resource:
                    self.storage.disk.remove_folder(path.parent)
            else:
                self._save(path, owner, generation, start, base, data, amended)

        def saved(done: bool) -> None:
            if done and entry.generation == generation:
                entry.advance(end)
                for offset, line in amended.items():
                    if entry.amended.get(offset) is line:
                        del entry.amended[offset]
            self.storage.saved(entry, done)

        return Task(save, saved)

    def _save(self, path: Path, owner: str, generation: int, start: int, base: int, data: bytes,
              amended: Mapping[int, bytes]) -> None:  # fmt: skip
        """In the disk thread: let the file hold what it has of [start, base), but for what is amended, then `data`."""
        disk = self.storage.disk
        kept = b""
        if start < base or path.exists():
            try:
                with disk.open(path) as file:
                    head = read_log_head(file)
                    shift = head.length - head.start
                    if (head.generation, head.start) == (generation, start):
                        places = {offset + shift: line for offset, line in amended.items()}
                        return disk.patch(path, base + shift, data, places)
                    if start < base:
                        file.seek(start + shift)
                        kept = file.read(base - start)
                        for offset, line in amended.items():
                            if offset >= base:
                                continue
                            kept = kept[: offset - start] + line + kept[offset - start + len(line) :]
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                log.error("%s was damaged while this server ran", path)
                if path.exists():
                    disk.set_aside(path)
        disk.save(path, log_head(owner, generation, start) + kept + data)

    def _lines(self, tail: Tail) -> Iterator[bytes]:
        """Yield the lines of all records; ends early if the file does not have what it should."""
        left = tail.base - tail.start
        if left:
            try:
                with self.storage.disk.open(self.path(tail.owner)) as file:
                    head = read_log_head(file)
                    file.seek(head.length + tail.start - head.start)
                    while left > 0 and (line := file.readline(left)):
                        yield tail.amended.get(tail.base - left, line)
                        left -= len(line)
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                pass  # the reader misses its bytes, and mends
        yield from tuple(tail.pending)

    def _load(self, owner: JID) -> Tail:
        path = self.path(owner)
        try:
            with self.storage.disk.open(path) as file:
                head = read_log_head(file)
                size = file.seek(0, os.SEEK_END)
                file.seek(size - 1)
                whole = file.read(1) == b"\n"
        except FileNotFoundError:
            return Tail(self, owner)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            log.error("%s is damaged (%s): set aside as %s", path, error, self.storage.disk.set_aside(path))
            return Tail(self, owner)
        end = head.start + (size if whole else self._last_whole_line(path)) - head.length
        return Tail(self, owner, generation=head.generation, start=head.start, base=end, end=end)

    def _last_whole_line(self, path: Path) -> int:
        """Where the last line ends that ends; after a crash, the journal has what was torn."""
        if not self.storage.recovering:
            log.error("%s ends within a record: kept aside as %s", path, self.storage.disk.copy_aside(path))
        with self.storage.disk.open(path) as file:
            return file.read().rindex(b"\n") + 1

    def _lost_file(self, tail: Tail, generation: int, offset: int) -> None:
        """The journal goes on where no file ends: right if there is none, as all before that was dropped."""
        path = self.path(tail.owner)
        if path.exists():
            log.error("%s is not what the journal goes on from: kept aside", path)
            self.storage.disk.set_aside(path)
        tail.restart(generation, offset)

    def _mend(self, owner: JID, records: list[Json]) -> None:
        path = self.path(owner)
        aside = self.storage.disk.copy_aside(path) if path.exists() else "nothing, as the file is gone"
        log.error("%s is damaged: kept aside as %s; %d records are good", path, aside, len(records))
        if not self.storage.failed:
            self.rewrite(owner, records)

    def _name_inside(self, path: Path) -> str:
        with self.storage.disk.open(path) as file:
            return read_log_head(file).owner


# -- The whole

REPLAYS: dict[str, Callable[[Storage, str], Callable[..., None]]] = {
    "set": lambda storage, kind: storage.documents(kind).replay_set,
    "put": lambda storage, kind: storage.documents(kind).replay_put,
    "append": lambda storage, kind: storage.log(kind).replay_append,
    "amend": lambda storage, kind: storage.log(kind).replay_amend,
    "rewrite": lambda storage, kind: storage.log(kind).replay_rewrite,
    "drop": lambda storage, kind: storage.log(kind).replay_drop,
}


class Storage:
    """The data folder, opened: recovered from its journals when it is made, closed by `close`.

    Raises ConfigError, one line, when the folder is in use or cannot be read or written. `sync=False`
    gives up the fsync per turn: a position counts as synced as soon as the operating system has the
    line, which survives a crash of this program but not of the machine. `freeze` is for tests.
    """

    def __init__(
        self,
        folder: Path,
        loop: Loop,
        *,
        sync: bool = True,
        cache_bytes: int = CACHE_BYTES,
        freeze: bool = False,
        disk: Disk | None = None,
    ) -> None:
        self.folder = folder
        self.sync = sync
        self.freeze = freeze
        self.disk = disk or Disk()
        self.cache = Cache(cache_bytes)
        self.position = 0  # number of the newest line, that of this turn included if it changed something
        self.synced = 0  # number of the newest line that is on disk
        self.when_synced: Callable[[], None] | None = None  # called on the loop when `synced` has grown
        self.failed = ""  # or why nothing can be changed
        self.recovering = True  # the journals are being read back
        self._loop = loop
        self._documents: dict[str, Documents] = {}
        self._logs: dict[str, Log] = {}
        self._changes: list[bytes] = []  # of this turn
        self.way_back: list[Callable[[], None]] | None = None  # what undoes the changes of an attempt; None: no attempt
        self._has_work = False  # for the end of this turn
        self._reports: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = DiskThread(self, self._report)
        self._lock = -1
        self.failed_for_good = False
        self._closing = False
        # The current journal:
        self._journal = 0  # its number
        self._journal_bytes = 0
        self._changed: dict[Entry, None] = {}  # what it speaks of, in order
        self._pinned_bytes = 0  # of memory, by what it speaks of
        # The checkpoint:
        self._checkpointing = False
        self._overdue = False  # the last one met a full disk
        self._old_journals: list[Path] = []
        self._in_old_journals: list[Entry] = []  # what those speak of, and therefore pinned
        self._unsaved: deque[Entry] = deque()  # still to be handed to the disk thread
        self._tasks = 0  # handed to it, not reported yet
        self._all_saved = True
        self._open()

    def documents(self, kind: str, shape: type = object) -> Documents:
        """Return all documents of a kind, e.g. `"roster"`; the same object each time.

        `shape` is the type of each of them, e.g. `dict`: a file that holds something else is damaged.
        """
        if kind not in self._documents:
            self._documents[kind] = Documents(self, kind)
        if shape is not object:
            self._documents[kind].shape = shape
        return self._documents[kind]

    def log(self, kind: str) -> Log:
        """Return all logs of a kind, e.g. `"offline"`; the same object each time."""
        if kind not in self._logs:
            self._logs[kind] = Log(self, kind)
        return self._logs[kind]

    def remove_owner(self, owner: JID) -> None:
        """Remove every document and log of an account, of kinds that nobody asked for in this run too."""
        self.check()
        folder = self.folder / folder_name(owner.domain)
        on_disk = {name.partition(".")[0] for name in os.listdir(folder)} if folder.is_dir() else set()
        for kind in sorted(on_disk | self._documents.keys() | self._logs.keys()):
            if not re.fullmatch(r"[a-z0-9_-]+", kind):
                continue
            del self.documents(kind)[owner]
            logs = self.log(kind)
            for one in (owner, *map(owner.with_resource, logs.parts(owner))):
                if logs.holds(logs.find(one)):
                    logs.rewrite(one, ())

    def check(self) -> None:
        """Raise StanzaError("resource-constraint") if nothing can be changed; `failed` says why."""
        if self.failed:
            raise StanzaError("resource-constraint", "this server cannot store anything at the moment")

    def attempt(self, function: Callable[[Attempt], Outcome], argument: Attempt) -> Outcome:
        """Return `function(argument)`; if it raises, no document and no log knows of it afterwards.

        A refused request must leave nothing half done, whatever went wrong and however late. What
        was said to others meanwhile stays said. Outside of attempts nothing is kept for a way back.
        """
        outer, self.way_back = self.way_back, []
        begin = len(self._changes)
        try:
            return function(argument)
        except BaseException:  # whatever ends the attempt ends all of it
            self._go_back(begin)
            raise
        finally:
            if outer is not None:
                outer.extend(self.way_back)
            self.way_back = outer

    def _go_back(self, begin: int) -> None:
        way_back, self.way_back = self.way_back or [], []
        for undo in reversed(way_back):
            undo()
        if len(self._changes) > begin == 0:
            self.position -= 1  # there is no line of this turn: who waited for it would wait for ever
        del self._changes[begin:]

    def commit(self) -> None:
        """At the end of a turn: hand its changes to the disk thread as one line, and let a checkpoint go on."""
        if self._has_work:
            self._end_turn()

    def close(self) -> None:
        """Sync everything, write the documents, remove the old journal, release the folder.

        Takes CLOSE_DISK_TIMEOUT at most; what is not written by then, or because the disk failed, is
        read back from the journal by the next start.
        """
        if self._closing:
            return
        self._closing = self._has_work = True
        deadline = time.monotonic() + CLOSE_DISK_TIMEOUT
        self.commit()
        while not self._is_at_rest() and self._take_report(deadline - time.monotonic()):
            self.commit()
        if self.commit in self._loop.at_turn_end:
            self._loop.at_turn_end.remove(self.commit)
        self.failed = self.failed or "closed"
        if self._thread.stop(max(deadline - time.monotonic(), 0.1)):
            self._take_reports()
            os.close(self._lock)
        else:  # the lock stays with the process: a successor must not meet a write that is still under way
            log.error("%s: the disk does not answer; what it has not confirmed was not acknowledged", self.folder)

    # For documents and logs

    def record(self, entry: Entry, change: bytes) -> None:
        """Enter a change in the line of this turn."""
        if not self._changes:
            self.position += 1
            self._has_work = True
        self._changes.append(change)
        self.pin(entry)

    def pin(self, entry: Entry) -> None:
        """Note that an entry is newer than its file."""
        if entry.journal == self._journal:
            return
        if not entry.journal:
            self.cache.release(entry)
        entry.journal = self._journal
        self._changed[entry] = None
        self._pinned_bytes += entry.cost

    # What the disk thread reports; all on the loop

    def line_synced(self, sequence: int) -> None:
        """The journal is on disk up to this line."""
        self.synced = sequence
        if self.when_synced is not None:
            self.when_synced()

    def saved(self, entry: Entry, done: bool) -> None:
        """The file of an entry is written; or it is not, because the disk is full."""
        self._tasks -= 1
        self._has_work = True
        if not done:
            self._all_saved = False
            self.pin(entry)

    def disk_filled(self) -> None:
        """The reserve is spent: what is under way was written, later changes are refused until there is room."""
        if not self.failed:
            self.failed = f"{self.folder}: no space left on the disk"
            log.error("%s: changes are refused until there is", self.failed)
        self._loop.call_later(SPACE_INTERVAL, self._look_for_space)

    def disk_failed(self, why: str) -> None:
        """The disk cannot be trusted any more: nothing is changed until a new start has read what is there."""
        self.failed_for_good = True
        self.failed = f"{self.folder}: {why}"
        log.critical("%s: changes are refused; mend the disk, then start again", self.failed)
        if self.when_synced is not None:
            self.when_synced()  # who waits for more than is on disk waits in vain
        self._changes.clear()
        self.position = self.synced  # what is said from now on must not

    # Inside

    def _report(self, report: Callable[[], None]) -> None:
        """In the disk thread: have something run on the loop."""
        self._reports.put(report)
        self._loop.post(self._take_reports)

    def _take_reports(self) -> None:
        while self._take_report(0):
            pass

    def _take_report(self, timeout: float) -> bool:
        """Run one report, waiting for it if need be; False if there is none."""
        try:
            report = self._reports.get(timeout > 0, max(timeout, 0))
        except queue.Empty:
            return False
        report()
        return True

    def _open(self) -> None:
        try:
            if not self.folder.exists():
                self.folder.mkdir(mode=0o700, parents=True)
                self.disk.sync_folder(self.folder.parent)
            self._lock = lock_folder(self.folder)
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be used as data folder: {error.strerror}") from error
        try:
            self._recover()
        except (OSError, StanzaError, ConfigError) as error:
            os.close(self._lock)
            raise ConfigError(f"{self.folder}: cannot be read and written: {error}") from error
        self._loop.at_turn_end.append(self.commit)

    def _recover(self) -> None:
        """Read the journals back, begin a new one, and let a checkpoint bring the files up to date."""
        for number, path in journals(self.folder):
            self._journal = number
            self._replay(path)
            self._old_journals.append(path)
        self.recovering = False
        self.position += 1
        self._journal += 1
        self._thread.start(Line(self.position, journal_line(self.position, ()), self._journal))
        self.synced = self.position
        if self._old_journals:
            self._begin_saving()

    def _replay(self, path: Path) -> None:
        with self.disk.open(path) as file:
            data = file.read()
        replayed = replay(data, self.position)
        for change in replayed.changes:
            self._apply(path, change)
        self.position = replayed.sequence
        if replayed.good_length < len(data):
            self._keep_bad_end(path, data, replayed.good_length)
        self._make_durable(path, replayed.good_length)

    def _keep_bad_end(self, path: Path, data: bytes, good_length: int) -> None:
        """Keep what follows the last good line beside the journal, before it is cut off."""
        aside = self.disk.aside(path)
        self.disk.keep(aside, data[good_length:])
        log.error("%s is bad from byte %d on: the rest is kept aside as %s", path, good_length, aside.name)

    def _make_durable(self, path: Path, length: int) -> None:
        """Sync a journal that was read back: the last lines of a killed process are perhaps only in the system's cache.

        All that is said from now on builds on them; were they lost in a power cut, the next
        journal would not go on where this one ends, and could not be read back.
        """
        file = self.disk.create(path)
        try:
            self.disk.truncate(file, length)
            self.disk.sync(file)
        finally:
            os.close(file)

    def _apply(self, path: Path, change: list[Json]) -> None:
        verb, kind, owner, *values = change
        if verb not in REPLAYS:
            raise ConfigError(f"{path.name} was written by a newer xmppd, which knows what {verb!r} means")
        REPLAYS[verb](self, kind)(JID.parse(owner), *values)

    def _end_turn(self) -> None:
        self._has_work = False
        if self._changes:
            line = journal_line(self.position, self._changes)
            self._changes = []
            self._journal_bytes += len(line)
            self._thread.put(Line(self.position, line))
        if self._checkpointing:
            self._save_some()
        elif self._checkpoint_is_due():
            self._begin_checkpoint()

    def _checkpoint_is_due(self) -> bool:
        if self.failed or not self._changed:
            return False
        if self._closing:
            return self._all_saved
        return self._overdue or self._journal_bytes > JOURNAL_BYTES or self._pinned_bytes > self.cache.limit

    def _begin_checkpoint(self) -> None:
        """Begin a new journal: the old one is needed only until what it speaks of is in files."""
        self._old_journals.append(journal_path(self.folder, self._journal))
        self._journal += 1
        self.position += 1
        self._thread.put(Line(self.position, journal_line(self.position, ()), self._journal))
        self._begin_saving()

    def _begin_saving(self) -> None:
        self._checkpointing = self._all_saved = self._has_work = True
        self._overdue = False
        self._unsaved.extend(self._changed)
        self._in_old_journals.extend(self._changed)
        self._changed = {}
        self._journal_bytes = self._pinned_bytes = 0

    def _save_some(self) -> None:
        """A slice of the checkpoint. After the turn's line: a file must not know more than the journal."""
        until = time.monotonic() + SLICE_SECONDS
        while self._unsaved and self._tasks < SAVES_UNDER_WAY:
            entry = self._unsaved.popleft()
            self._tasks += 1
            self._thread.put(entry.shelf.saving(entry))
            if time.monotonic() > until:
                break
        if not self._unsaved and not self._tasks:
            self._end_checkpoint()

    def _end_checkpoint(self) -> None:
        """All is reported: remove the old journals, unless a file could not be written."""
        if not self._all_saved:
            self._checkpointing = False
            self._loop.call_later(SPACE_INTERVAL, self._retry_checkpoint)
            return
        self._tasks += 1
        old = tuple(self._old_journals)
        self._thread.put(Task(lambda: self._remove_journals(old), self._journals_removed))

    def _remove_journals(self, old: Iterable[Path]) -> None:
        """In the disk thread. First the names of the files written, or a power cut could lose both."""
        self.disk.touched.add(self.folder)
        self.disk.sync_folders()
        for path in old:
            self.disk.remove(path)
        self.disk.sync_folders()

    def _journals_removed(self, done: bool) -> None:
        self._tasks -= 1
        self._has_work = True
        self._all_saved = done
        if not done:
            return  # even removing may need room; the end of this turn arranges for another attempt
        self._checkpointing = False
        self._old_journals.clear()
        for entry in self._in_old_journals:
            if 0 < entry.journal < self._journal:
                entry.journal = 0
                self.cache.add(entry)
        self._in_old_journals.clear()

    def _retry_checkpoint(self) -> None:
        self._overdue = self._has_work = True

    def _look_for_space(self) -> None:
        self._thread.put(Task(self._thread.renew_reserve, self._looked_for_space))

    def _looked_for_space(self, found: bool) -> None:
        if not found:
            self._loop.call_later(SPACE_INTERVAL, self._look_for_space)
        elif not self.failed_for_good and not self._closing:
            self.failed = ""
            self._has_work = True
            log.warning("%s: there is room on the disk again", self.folder)

    def _is_at_rest(self) -> bool:
        """Whether closing has nothing to wait for any more."""
        if self.failed_for_good:
            return True
        if self._checkpointing or self.synced < self.position:
            return False
        return not self._checkpoint_is_due()


# ==== 9. Certificates and TLS (RFC 6120 §5, §13.7; RFC 7590) ====
#
# A client that opens a TLS channel wants to know one thing: is this the server of the
# domain in my address? The answer is a certificate, and this chapter has three jobs with
# certificates.
#
#   Ours.    Without `[tls]` in the configuration, the first start makes a certification
#            authority (CA) of its own, kept for ten years, and a leaf signed by it for all
#            names served. People trust the CA once; leaves come and go unnoticed. With
#            `[tls]`, the owner's files are used, checked, and read anew when they change.
#   Theirs.  Which domain or which account does a peer's certificate speak for? Only the
#            subjectAltName counts; the Common Name is decoration, and servers that read
#            names out of it were fooled (CVE-2025-59154).
#   Both.    Channel bindings: numbers that both ends of one TLS channel know and that a
#            man in the middle, who has two channels, cannot make equal. SCRAM's -PLUS
#            mechanisms (chapter 10) mix them into the proof of the password.
#
#     DATA/tls/ca.pem    the CA, for clients to trust       DATA/tls/ca.key     mode 0600
#     DATA/tls/leaf.pem  what we present: leaf, then CA      DATA/tls/leaf.key   mode 0600
#
# The package `cryptography` is needed only to *make* certificates, costs 9 MB, and is
# therefore imported by a short-lived process of its own. To *read* one takes a page of
# DER, below. Left out: OCSP and CRLs. The `ssl` module can neither fetch nor staple them,
# and short-lived certificates do the same work.

AUTHORITY_DAYS = 3650  # ten years: trusting a CA on every device is work that nobody wants to do twice
LEAF_DAYS = 397  # days; browsers and phones accept no more than 398
BACKDATE_DAYS = 1  # a new leaf is valid from yesterday, for clients whose clocks are slow
MAKER_TIMEOUT = 120.0  # seconds to make two keys; 0.5 on a desktop, some on an old single-board computer
TICKET_KEYS_TIMEOUT = 7 * 86400.0  # seconds; RFC 9325 §3.4: change the keys of session tickets about weekly
TLS_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # for TLS 1.2: forward secrecy and AEAD only (RFC 9325 §4.2)

# -- reading certificates. DER (X.690) is nested items of tag, length, content.

DER_OCTET_STRING = 0x04
DER_OID = 0x06
DER_UTF8_STRING = 0x0C
DER_IA5_STRING = 0x16
DER_UTC_TIME = 0x17
DER_GENERALIZED_TIME = 0x18
DER_SEQUENCE = 0x30
DER_EXTENSIONS = 0xA3  # [3] in a TBSCertificate (RFC 5280 §4.1)
DER_VERSION = 0xA0  # [0] there
SAN_OTHER_NAME = 0xA0  # [0] in a GeneralName (RFC 5280 §4.2.1.6)
SAN_DNS_NAME = 0x82  # [2]
SAN_IP_ADDRESS = 0x87  # [7]

OID_SUBJECT_ALT_NAME = "2.5.29.17"
OID_XMPP_ADDR = "1.3.6.1.5.5.7.8.5"  # RFC 6120 §13.7.1.4
OID_SRV_NAME = "1.3.6.1.5.5.7.8.7"  # RFC 4985
OID_RSASSA_PSS = "1.2.840.113549.1.1.10"  # names its hash in its parameters

# The hash function inside each signature algorithm. Ed25519 and Ed448 have none that could
# be named, so that tls-server-end-point is undefined for them (RFC 5929 §4.1).
SIGNATURE_HASHES = {
    "1.2.840.113549.1.1.4": "md5",
    "1.2.840.113549.1.1.5": "sha1",
    "1.2.840.113549.1.1.14": "sha224",
    "1.2.840.113549.1.1.11": "sha256",
    "1.2.840.113549.1.1.12": "sha384",
    "1.2.840.113549.1.1.13": "sha512",
    "1.2.840.10045.4.1": "sha1",
    "1.2.840.10045.4.3.1": "sha224",
    "1.2.840.10045.4.3.2": "sha256",
    "1.2.840.10045.4.3.3": "sha384",
    "1.2.840.10045.4.3.4": "sha512",
    "1.3.14.3.2.26": "sha1",  # from here on: as RSASSA-PSS names them
    "2.16.840.1.101.3.4.2.4": "sha224",
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}


class DERItem(NamedTuple):
    """One item of DER: its tag octet, and the octets of its content."""

    tag: int
    content: bytes


def der_bounds(data: bytes, at: int) -> tuple[int, int]:
    """Return where the content of the item at `at` starts and ends; raises ValueError.

    Strict: one octet of tag, and each length written in the shortest way, because a
    certificate that two programs can read in two ways is an attack.
    """
    if len(data) - at < 2 or data[at] & 0x1F == 0x1F:
        raise ValueError("DER: no tag and length")
    length, start = data[at + 1], at + 2
    if length >= 0x80:
        octets = length - 0x80
        length, start = int.from_bytes(data[start : start + octets], "big"), start + octets
        if not 1 <= octets <= 3 or length < (0x80 if octets == 1 else 1 << 8 * (octets - 1)):
            raise ValueError("DER: a length that is not in its shortest form")
    if start + length > len(data):
        raise ValueError("DER: an item longer than what holds it")
    return start, start + length


def der_items(data: bytes) -> list[DERItem]:
    """Return the items that `data` consists of, without gap or rest; raises ValueError."""
    items, at = [], 0
    while at < len(data):
        start, end = der_bounds(data, at)
        items.append(DERItem(data[at], data[start:end]))
        at = end
    return items


def der_inside(item: DERItem, tag: int) -> list[DERItem]:
    """Return the items inside `item`, which must have this tag; raises ValueError."""
    if item.tag != tag:
        raise ValueError(f"DER: expected tag {tag:#x}, found {item.tag:#x}")
    return der_items(item.content)


def der_oid(item: DERItem) -> str:
    """Return an object identifier in dotted form; raises ValueError."""
    if item.tag != DER_OID or not item.content or item.content[-1] & 0x80:
        raise ValueError("DER: no object identifier")
    arcs, value = [], 0
    for octet in item.content:
        value = value << 7 | octet & 0x7F
        if not octet & 0x80:
            arcs.append(value)
            value = 0
    first = min(arcs[0] // 40, 2)  # the first two arcs share one number
    return ".".join(map(str, (first, arcs[0] - 40 * first, *arcs[1:])))


def der_time(item: DERItem) -> datetime:
    """Return a moment of a certificate's validity (RFC 5280 §4.1.2.5), aware UTC; raises ValueError."""
    text = item.content.decode("ascii")
    if item.tag == DER_UTC_TIME:
        text = ("19" if text >= "50" else "20") + text
    elif item.tag != DER_GENERALIZED_TIME:
        raise ValueError("DER: no time")
    if not re.fullmatch(r"[0-9]{14}Z", text):
        raise ValueError("DER: a time that is not YYYYMMDDHHMMSSZ")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)


# -- comparing names


def ascii_domain(domain: str) -> str:
    """Return a domain as certificates and DNS write it (`xn--…`, lower case), or "" if that is impossible."""
    try:
        return ".".join(map(to_ascii, prepare_domain(domain).split(".")))
    except ValueError:
        return ""


def ip_octets(domain: str) -> bytes:
    """Return the octets of an address literal (`192.0.2.1`, `[::1]` or `::1`), b"" for a name."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return socket.inet_pton(family, domain.strip("[]"))
        except (OSError, ValueError):  # ValueError: a NUL, or a letter that is not ASCII
            continue
    return b""


def name_matches(presented: str, name: str) -> bool:
    """Whether a presented DNS name covers `name`, which is in ASCII and lower case (RFC 9525 §6.3).

    `*` counts only as the complete left-most label and stands for exactly one label.
    """
    presented = presented.lower()
    if not presented.startswith("*."):
        return presented == name
    label, _, parent = name.partition(".")
    return bool(label) and parent == presented[2:]


# -- what stands in a certificate


@dataclass(frozen=True, slots=True)
class Certificate:
    """What this server wants to know of an X.509 certificate (RFC 5280).

    The identifiers are kept apart by type, since each is compared in its own way.
    """

    der: bytes
    not_before: datetime
    not_after: datetime
    signature_hash: str  # of `hashlib`; "" where the signature algorithm has none
    dns_names: tuple[str, ...]
    srv_names: tuple[str, ...]  # such as "_xmpp-client.example.org"
    xmpp_addresses: tuple[str, ...]  # as written, not yet prepared
    ip_addresses: tuple[bytes, ...]  # 4 or 16 octets

    def covers(self, domain: str, service: str = "xmpp-client") -> bool:
        """Whether it may speak for `service` at `domain` (RFC 6120 §13.7.1.2.1, RFC 9525 §6).

        Accepted are DNS-ID, SRV-ID, and XmppAddr for old certificates; IP-ID where the
        domain is an address. Never the Common Name.
        """
        if address := ip_octets(domain):
            return address in self.ip_addresses
        name = ascii_domain(domain)
        if not name:
            return False
        prefix = f"_{service}."
        services = (srv[len(prefix) :] for srv in self.srv_names if srv.lower().startswith(prefix))
        return any(name_matches(presented, name) for presented in (*self.dns_names, *services)) or any(
            not jid.local and not jid.resource and ascii_domain(jid.domain) == name for jid in self.addresses()
        )

    def addresses(self) -> list[JID]:
        """Return the well-formed XmppAddr identifiers, each once (RFC 6120 §13.7.1.4)."""
        found: dict[JID, None] = {}
        for text in self.xmpp_addresses:
            try:
                found[JID.parse(text)] = None
            except StanzaError:
                continue  # an identifier that cannot be an address identifies nobody
        return list(found)

    def end_point(self) -> bytes | None:
        """Return the channel binding tls-server-end-point (RFC 5929 §4.1), or None where it is undefined."""
        if not self.signature_hash:
            return None
        name = "sha256" if self.signature_hash in ("md5", "sha1") else self.signature_hash
        return hashlib.new(name, self.der).digest()


def subject_alt_names(fields: Sequence[DERItem]) -> list[DERItem]:
    """Return the GeneralNames among the last fields of a TBSCertificate (RFC 5280 §4.2.1.6); raises ValueError."""
    found: list[list[DERItem]] = []
    for field_ in fields:
        if field_.tag != DER_EXTENSIONS:
            continue
        [extensions] = der_items(field_.content)
        for extension in der_inside(extensions, DER_SEQUENCE):
            identifier, *_critical, value = der_inside(extension, DER_SEQUENCE)
            if der_oid(identifier) == OID_SUBJECT_ALT_NAME:
                [inner] = der_inside(value, DER_OCTET_STRING)
                found.append(der_inside(inner, DER_SEQUENCE))
    if len(found) > 1:
        raise ValueError("two subjectAltName extensions")  # RFC 5280 §4.2: at most one of a kind
    return found[0] if found else []


def other_names(names: Sequence[Sequence[DERItem]], oid: str, tag: int) -> tuple[str, ...]:
    """Return the strings of the otherNames of type `oid`; raises ValueError."""
    texts = []
    for identifier, *value in names:
        if der_oid(identifier) == oid:
            [explicit] = value
            [string] = der_inside(explicit, 0xA0)
            if string.tag != tag:
                raise ValueError(f"an otherName {oid} of the wrong type")
            texts.append(string.content.decode("ascii" if tag == DER_IA5_STRING else "utf-8"))
    return tuple(texts)


def signature_hash(algorithm: DERItem) -> str:
    """Return the hash function of an AlgorithmIdentifier, "" if it has none that we know; raises ValueError."""
    identifier, *parameters = der_inside(algorithm, DER_SEQUENCE)
    oid = der_oid(identifier)
    if oid != OID_RSASSA_PSS:
        return SIGNATURE_HASHES.get(oid, "")
    for parameter in der_inside(parameters[0], DER_SEQUENCE) if parameters else ():
        if parameter.tag == 0xA0:  # [0] hashAlgorithm, and SHA-1 where it is left out (RFC 4055 §3.1)
            [inner] = der_items(parameter.content)
            return SIGNATURE_HASHES.get(der_oid(der_inside(inner, DER_SEQUENCE)[0]), "")
    return "sha1"


def read_certificate(der: bytes) -> Certificate:
    """Return what stands in a certificate; raises ValueError when it is not one, in strict DER."""
    [whole] = der_items(der)
    body, algorithm, _signature = der_inside(whole, DER_SEQUENCE)
    fields = der_inside(body, DER_SEQUENCE)
    if fields and fields[0].tag == DER_VERSION:
        del fields[0]
    _serial, _algorithm, _issuer, validity, _subject, _key, *rest = fields
    not_before, not_after = der_inside(validity, DER_SEQUENCE)
    names = subject_alt_names(rest)
    others = [der_inside(name, SAN_OTHER_NAME) for name in names if name.tag == SAN_OTHER_NAME]
    return Certificate(
        der=der,
        not_before=der_time(not_before),
        not_after=der_time(not_after),
        signature_hash=signature_hash(algorithm),
        dns_names=tuple(name.content.decode("ascii") for name in names if name.tag == SAN_DNS_NAME),
        srv_names=other_names(others, OID_SRV_NAME, DER_IA5_STRING),
        xmpp_addresses=other_names(others, OID_XMPP_ADDR, DER_UTF8_STRING),
        ip_addresses=tuple(name.content for name in names if name.tag == SAN_IP_ADDRESS),
    )


def peer_addresses(der: bytes) -> list[JID]:
    """Return the addresses (XmppAddr) in a peer's certificate; none if it cannot be read.

    Only for a certificate that TLS has verified: anybody can write an address into one.
    """
    try:
        return read_certificate(der).addresses()
    except ValueError:
        return []


# -- certificates and keys in files


def load_certificate(path: Path) -> Certificate:
    """Return the first certificate of a PEM file: the one that is presented; raises ConfigError."""
    try:
        text = path.read_text("ascii", "replace")
    except OSError as problem:
        raise ConfigError(f"{path}: cannot read the certificate: {problem.strerror}; check [tls]") from problem
    start, end = text.find("-----BEGIN CERTIFICATE-----"), text.find("-----END CERTIFICATE-----")
    try:
        return read_certificate(ssl.PEM_cert_to_DER_cert(text[max(start, 0) : end + 25]))
    except ValueError as problem:
        raise ConfigError(f"{path}: expected a certificate in PEM form ({problem}); convert or replace it") from problem


def load_key(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Load certificate chain and private key; raises ConfigError."""
    try:
        # An empty passphrase makes an encrypted key fail, where none would ask at the terminal.
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as problem:
        if problem.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"{key}: is not the key of {certificate}; name a pair that belongs together") from problem
        raise ConfigError(
            f"{key}: expected a private key in PEM form without a passphrase, for {certificate} ({problem.reason})"
        ) from problem
    except OSError as problem:
        raise ConfigError(f"{key}: cannot read the private key: {problem.strerror}; check [tls]") from problem


# -- packages out of the archive. A zipapp (`xmppd pack`) runs from inside its file, but compiled
# code cannot: the dynamic linker wants real files. So the archive holds `cryptography` as a ZIP
# file of its own, which is unpacked when certificates are to be made and the machine has no
# such package. This too happens in the process of its own.

PACKED = "packed"  # the folder in the archive, with one ZIP file for each platform that it serves


def own_archive() -> Path | None:
    """Return the zipapp that this program runs from, None if it doesn't run from one."""
    here = Path(__file__).parent  # in a zipapp, what looks like our folder is a file
    return here if here.is_file() else None


def platform_tag() -> str:
    """Return what compiled code must be made for in order to run here: the platform and Python's ABI."""
    import sysconfig
    from importlib.machinery import EXTENSION_SUFFIXES

    return sysconfig.get_platform() + EXTENSION_SUFFIXES[0].rpartition(".")[0]


def packed_name() -> str:
    """Return the name inside an archive of the ZIP file with the packages for this platform."""
    return f"{PACKED}/{platform_tag()}.zip"


def packages_path() -> list[str]:
    """Return what `sys.path` lacks for `cryptography` to be found, unpacked if need be; raises ConfigError."""
    packages = packed_packages()
    return [] if packages is None else [str(unpacked(packages))]


def packed_packages() -> bytes | None:
    """Return the ZIP file that has to be unpacked, None if Python finds `cryptography` without; raises ConfigError."""
    import zipfile
    from importlib.util import find_spec

    archive = own_archive()
    if archive is None or find_spec("cryptography") is not None:
        return None
    try:
        with zipfile.ZipFile(archive) as whole:
            return whole.read(packed_name())
    except KeyError as problem:
        raise ConfigError(f"{archive} brings no `cryptography` for {platform_tag()}") from problem
    except (OSError, zipfile.BadZipFile, zlib.error) as problem:
        raise ConfigError(f"{archive} is damaged ({problem})") from problem


def unpacked(packages: bytes) -> Path:
    """Return the folder in the user's cache with the contents of this ZIP file; raises ConfigError.

    Its name is the hash of the contents, so that every version has its own, made once.
    """
    import io
    import zipfile

    import platformdirs

    cache = Path(platformdirs.user_cache_dir("xmppd", appauthor=False))
    folder = cache / hashlib.sha256(packages).hexdigest()[:32]
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(cache)
        with zipfile.ZipFile(io.BytesIO(packages)) as files:
            if not is_unpacked(files, folder):
                unpack(files, folder)
    except OSError as problem:
        raise ConfigError(f"cannot unpack `cryptography` to {folder}: {problem.strerror}") from problem
    except (ValueError, zipfile.BadZipFile, zlib.error) as problem:
        raise ConfigError(f"the packed `cryptography` is damaged ({problem})") from problem
    return folder


def check_private(folder: Path) -> None:
    """Raise ConfigError if others could put code into this folder, for we are about to run what lies there."""
    found = folder.lstat()  # a symbolic link has all permissions, so it is refused
    if os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & 0o022):
        raise ConfigError(f"cannot unpack `cryptography` to {folder}: not a folder that only this user writes to")


def is_unpacked(files: zipfile.ZipFile, folder: Path) -> bool:
    """Whether all files are there with their contents; after a power cut some may be empty."""
    try:
        return all(zlib.crc32((folder / info.filename).read_bytes()) == info.CRC for info in files.infolist())
    except OSError:
        return False


def unpack(files: zipfile.ZipFile, folder: Path) -> None:
    """Unpack all files into a new folder, wholly or not at all; raises ValueError, OSError, BadZipFile, zlib.error."""
    import shutil
    import tempfile

    for name in files.namelist():
        if not re.fullmatch(r"(\w[\w.+-]*/)*\w[\w.+-]*", name, re.ASCII):  # so neither absolute nor with ".."
            raise ValueError(f"the name {name!r}")
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir(mode=0o700)
        files.extractall(new)
        shutil.rmtree(folder, ignore_errors=True)  # what is not whole
        try:
            os.rename(new, folder)
        except OSError:
            if not is_unpacked(files, folder):  # else another process was faster
                raise


# -- making certificates. The functions down to `make_certificates` run in a process of their own.


def key_usage(*, authority: bool) -> x509.KeyUsage:
    """Return what a key may do: sign handshakes, and for a CA also certificates and their revocation."""
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=True,  # RFC 6120 §13.7.1.1 demands it of a CA too
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def leaf_names(hosts: Sequence[str], addresses: Sequence[str]) -> list[x509.GeneralName]:
    """Return DNS-IDs, SRV-IDs of both services, and IP-IDs.

    No XmppAddr: RFC 6120 §13.7.1.2.1 no longer wants it in new server certificates.
    """
    from ipaddress import ip_address

    from cryptography import x509

    names: list[x509.GeneralName] = [x509.DNSName(host) for host in hosts]
    for host in hosts:
        for service in ("_xmpp-client", "_xmpp-server"):
            srv = f"{service}.{host}".encode("ascii")
            length = bytes([len(srv)]) if len(srv) < 0x80 else bytes([0x81, len(srv)])  # a domain is at most 253
            string = bytes([DER_IA5_STRING]) + length + srv
            names.append(x509.OtherName(x509.ObjectIdentifier(OID_SRV_NAME), string))
    return names + [x509.IPAddress(ip_address(address)) for address in addresses]


def make_authority(machine: str, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """Return a new CA, signed by itself (RFC 6120 §13.7.1.1)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    # 64 characters are all that X.520 grants a Common Name. A serial number tells two CAs
    # of one machine apart, which clients would otherwise confuse.
    subject = x509.Name([
        x509.NameAttribute(x509.NameOID.COMMON_NAME, f"xmppd CA of {machine}"[:64]),
        x509.NameAttribute(x509.NameOID.SERIAL_NUMBER, secrets.token_hex(8)),
    ])  # fmt: skip
    now = datetime.now(UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder(issuer_name=subject, subject_name=subject, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=BACKDATE_DAYS))
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )


def authority_identifier(
    authority: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> x509.AuthorityKeyIdentifier:
    """Return how a leaf points to the key that signed it (RFC 5280 §4.2.1.1), whoever made that CA."""
    from cryptography import x509

    try:
        issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer)


def make_leaf(
    request: dict[str, Any],
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """Return a certificate for all hosts and addresses of the request (RFC 6120 §13.7.1.2.1).

    It serves as client certificate too: so does a server that calls another one.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509 import oid

    now = datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"xmppd of {request['machine']}"[:64])])
    usage = x509.ExtendedKeyUsage([oid.ExtendedKeyUsageOID.SERVER_AUTH, oid.ExtendedKeyUsageOID.CLIENT_AUTH])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    names = x509.SubjectAlternativeName(leaf_names(request["hosts"], request["addresses"]))
    return (
        x509.CertificateBuilder(issuer_name=authority.subject, subject_name=subject, public_key=key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=BACKDATE_DAYS))
        .not_valid_after(min(now + timedelta(days=LEAF_DAYS - BACKDATE_DAYS), authority.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(authority=False), critical=True)
        .add_extension(usage, critical=False)
        .add_extension(identifier, critical=False)
        .add_extension(authority_identifier(authority, authority_key), critical=False)
        .add_extension(names, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def pem_text(thing: x509.Certificate | ec.EllipticCurvePrivateKey) -> str:
    """Return a certificate or a private key as PEM (RFC 7468)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(serialization.Encoding.PEM).decode("ascii")
    form, secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return thing.private_bytes(serialization.Encoding.PEM, form, secret).decode("ascii")


def make_certificates(request: dict[str, Any]) -> dict[str, str]:
    """Return PEM texts: `authority`, `authority_key`, `certificate` (leaf, then CA), `key`.

    `request` holds `machine` (a name for people), `hosts`, `addresses`, and the PEM texts
    `authority` and `authority_key`, both empty if a new CA is wanted. Slow: it makes keys.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if request["authority"]:
        authority = x509.load_pem_x509_certificate(request["authority"].encode())
        authority_key = load_pem_private_key(request["authority_key"].encode(), None)
    else:
        authority_key = ec.generate_private_key(ec.SECP256R1())
        authority = make_authority(request["machine"], authority_key)
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise ValueError("ca.key: expected a key on an elliptic curve")
    # An RSA leaf would cost a small board several times more per handshake.
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = make_leaf(request, key, authority, authority_key)
    return {
        "authority": pem_text(authority),
        "authority_key": pem_text(authority_key),
        "certificate": pem_text(leaf) + (request["authority"] or pem_text(authority)),
        "key": pem_text(key),
    }


# What the process of its own does: import this very file, wherever it lies, and call the
# functions above. Keys travel through pipes and are never on a command line.
MAKER_PROGRAM = """\
import importlib, json, sys
request = json.load(sys.stdin)
sys.path[:] = request.pop("path")
module = importlib.import_module(request.pop("module"))
try:
    sys.path += module.packages_path()
except module.ConfigError as problem:
    sys.exit(str(problem))
json.dump(module.make_certificates(request), sys.stdout)
"""


def make_certificates_apart(request: dict[str, Any]) -> dict[str, str]:
    """Call `make_certificates` in another process; slow, any thread; raises ConfigError."""
    import subprocess

    here = Path(__file__)
    whole = request | {"path": [str(here.parent), *sys.path], "module": here.stem}
    command = [sys.executable, "-c", MAKER_PROGRAM]
    try:
        done = subprocess.run(
            command, input=json.dumps(whole), capture_output=True, text=True, timeout=MAKER_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        raise ConfigError(f"cannot make certificates: {problem}; set [tls] certificate and key instead") from problem
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ConfigError(
            f"cannot make certificates: {lines[-1]}; "
            "install the package `cryptography`, or set [tls] certificate and key"
        )
    made: dict[str, str] = json.loads(done.stdout)
    return made


class CertificateFiles(NamedTuple):
    """The files of our own certificates; `certificate` and `key` are what a TLS server loads."""

    authority: Path
    authority_key: Path
    certificate: Path
    key: Path


def address_text(octets: bytes) -> str:
    """Return the 4 or 16 octets of an IP address as text."""
    return socket.inet_ntop(socket.AF_INET if len(octets) == 4 else socket.AF_INET6, octets)


def own_addresses() -> set[str]:
    """Return the loopback addresses and the IPv4 address that this machine would call others from.

    Connecting a datagram socket only chooses a route: nothing is sent. IPv6 addresses of
    hosts change daily for privacy and would only fill the certificate.
    """
    found = {"127.0.0.1", "::1"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation (RFC 5737)
            found.add(probe.getsockname()[0])
        except OSError:
            pass  # no network, no address: clients on this machine don't need one
    return found


def leaf_will_do(files: CertificateFiles, names: set[str], addresses: set[bytes]) -> bool:
    """Whether the stored leaf has these names, at least these addresses, its key, our CA, and time left."""
    try:
        leaf = load_certificate(files.certificate)
        load_key(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), files.certificate, files.key)
        ours = files.certificate.read_text("ascii").endswith(files.authority.read_text("ascii"))
    except (OSError, ConfigError, ValueError):
        return False
    left = leaf.not_after - datetime.now(UTC)
    # An address too many (yesterday's network) is no reason to show clients another leaf.
    same_names = set(leaf.dns_names) == names and addresses <= set(leaf.ip_addresses)
    return ours and same_names and left > (leaf.not_after - leaf.not_before) / 3


def stored_authority(files: CertificateFiles) -> tuple[str, str]:
    """Return the PEM texts of our CA and its key, both "" if one must be made; raises ConfigError.

    A lost key is a ConfigError, not a reason for a new CA: every device would have to
    trust that one, and the owner may have the key in a backup.
    """
    if not files.authority.exists():
        return "", ""
    authority = load_certificate(files.authority)
    if authority.not_after - datetime.now(UTC) < timedelta(days=LEAF_DAYS):
        log.warning("our certification authority expires soon: making a new one, which clients must trust anew")
        return "", ""
    try:
        load_key(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), files.authority, files.authority_key)
        return files.authority.read_text("ascii"), files.authority_key.read_text("ascii")
    except (OSError, ValueError, ConfigError) as problem:
        raise ConfigError(
            f"{files.authority_key}: not the readable key of ca.pem: restore it from a backup, or remove the folder "
            f"{files.authority.parent} to make a new certification authority, which clients must trust anew"
        ) from problem


def write_file(path: Path, text: str, mode: int) -> None:
    """Replace a file by `text`, wholly or not at all, with these permissions from the first byte on."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def store_certificates(files: CertificateFiles, made: Mapping[str, str], *, new_authority: bool) -> None:
    """Write what was made; raises ConfigError when the disk refuses.

    Keys go first: after a crash between the two, the certificate is missing or does not
    fit, is not used, and is made anew at the next start.
    """
    try:
        files.authority.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if new_authority:
            write_file(files.authority_key, made["authority_key"], 0o600)
            write_file(files.authority, made["authority"], 0o644)
        write_file(files.key, made["key"], 0o600)
        write_file(files.certificate, made["certificate"], 0o644)
    except OSError as problem:
        raise ConfigError(f"{files.authority.parent}: cannot store certificates: {problem.strerror}") from problem
    log.info("made a certificate, signed by %s", files.authority)


def ensure_certificates(data: Path, hosts: Sequence[str], addresses: Sequence[str] = ()) -> CertificateFiles:
    """Return the files of a leaf for these hosts and addresses, made anew if there is none that will do.

    `localhost`, the loopback addresses and the machine's own address are always added. A
    leaf will do if its names are these, and a third of its life is left. Makes a CA if
    there is none; never replaces one that is still good, because people have trusted it.
    Slow when something is made; any thread. Raises ConfigError.
    """
    files = CertificateFiles(*(data / "tls" / name for name in ("ca.pem", "ca.key", "leaf.pem", "leaf.key")))
    names = {ascii_domain(host) for host in hosts if not ip_octets(host)} | {"localhost"}
    literals = {ip_octets(text) for text in (*hosts, *addresses, *own_addresses())}
    wanted = {octets for octets in literals if any(octets)}  # neither names nor wildcards such as "::"
    if leaf_will_do(files, names, wanted):
        return files
    authority, authority_key = stored_authority(files)
    made = make_certificates_apart({
        "machine": socket.gethostname(),
        "hosts": sorted(names),
        "addresses": sorted(map(address_text, wanted)),
        "authority": authority,
        "authority_key": authority_key,
    })  # fmt: skip
    store_certificates(files, made, new_authority=not authority)
    return files


# -- contexts: what a listener needs to speak TLS


SHARED_PORT = ("xmpp-client", "http/1.1")  # ALPN names of what clients may ask for on either port


class HostContext(ssl.SSLContext):
    """A server's `SSLContext` that knows which certificate it presents."""

    certificate: Certificate


def request_client_certificates(context: ssl.SSLContext, client_ca: Path) -> None:
    """Ask clients for a certificate of this CA and no other (RFC 6120 §5.4.3.1, §13.6); raises ConfigError.

    It stays optional. But a certificate that does not verify ends the handshake: the `ssl`
    module has no way to go on without it.
    """
    try:
        context.load_verify_locations(client_ca)
    except OSError as problem:  # SSLError too
        raise ConfigError(f"{client_ca}: expected a CA for clients in PEM form ({problem.strerror})") from problem
    context.verify_mode = ssl.CERT_OPTIONAL


def server_context(
    certificate: Path, key: Path, protocol: str = "xmpp-client", client_ca: Path | None = None
) -> HostContext:
    """Return a context that presents these files; raises ConfigError.

    `protocol` is the ALPN name (XEP-0368 §3). It is answered where a client proposes it, as is
    the other of XMPP and HTTP, which may share a port; a client that proposes others is not
    turned away.
    """
    context = HostContext(ssl.PROTOCOL_TLS_SERVER)
    context.certificate = load_certificate(certificate)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 9325 §3.1.1; RFC 6120 §13.9.5 in today's words
    context.set_ciphers(TLS_CIPHERS)
    # Renegotiation let one client burn a server's processor (GHSA-7jvv-jg88-r4h8), TLS
    # compression leaks secrets by their lengths (RFC 7590 §3.2 leaves it to RFC 7525: no).
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    # Tickets make reconnecting cheap (RFC 6120 §3.3) and keep nothing here. [Measured: no
    # memory per ticket, 255 bytes on the wire each; without tickets, OpenSSL stores up to
    # 20,000 sessions.] One is enough: each connection brings a new one.
    context.num_tickets = 1
    shared = SHARED_PORT if protocol in SHARED_PORT else ()
    context.set_alpn_protocols([protocol, *(other for other in shared if other != protocol)])
    load_key(context, certificate, key)
    if client_ca is not None and protocol == "xmpp-client":
        request_client_certificates(context, client_ca)
    return context


def file_stamp(path: Path) -> tuple[int, ...]:
    """Return numbers that differ when a file was replaced or rewritten; () if there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino


def find_pair(folder: Path, host: str) -> tuple[Path, Path]:
    """Return certificate and key of a host in a folder, named as certbot or Prosody do; raises ConfigError.

    `HOST/fullchain.pem` with `HOST/privkey.pem`, or `HOST.crt` with `HOST.key`; then the
    same for the domain above, whose certificate may have a wildcard.
    """
    name = ascii_domain(host)
    for domain in (name, name.partition(".")[2]):
        pairs = (
            (folder / domain / "fullchain.pem", folder / domain / "privkey.pem"),
            (folder / f"{domain}.crt", folder / f"{domain}.key"),
        )
        for certificate, key in pairs:
            if domain and certificate.exists():
                return certificate, key
    raise ConfigError(f"{folder}: no certificate for {host}: expected {name}/fullchain.pem or {name}.crt there")


def check_certificate(certificate: Certificate, path: Path, host: str) -> None:
    """Raise ConfigError if no client would accept this certificate for `host`.

    One that is not valid *yet* passes with a warning: then mostly our own clock is wrong,
    as on a small board without a battery, and it will be set once the network is there.
    """
    now = datetime.now(UTC)
    if not certificate.covers(host):
        named = ", ".join((*certificate.dns_names, *certificate.srv_names)) or "nothing"
        raise ConfigError(f"{path}: does not name {host} but {named}; get a certificate for {host}, or leave out [tls]")
    if certificate.not_after < now:
        raise ConfigError(f"{path}: expired on {certificate.not_after:%Y-%m-%d}; renew it, or leave out [tls]")
    if certificate.not_before > now:
        log.warning("%s: not valid before %s; is this machine's clock right?", path, certificate.not_before)


class Certificates:
    """All contexts of this server: one for each certificate and protocol.

    Which one a connection gets: the `to` of its stream header chooses (RFC 6120 §5.4.3.1);
    a name in the TLS handshake (SNI, RFC 6066 §3), if we serve it, overrides. Ask for a
    context anew for each connection, so that a renewed certificate is used at once.

    `protocols` are the ALPN names of the listeners: "xmpp-client", "xmpp-server",
    "http/1.1". `addresses` go into our own leaf. Raises ConfigError, and is slow when
    certificates must be made.
    """

    def __init__(
        self, config: Config, protocols: Sequence[str] = SHARED_PORT, addresses: Sequence[str] = ()
    ) -> None:
        self.config = config
        self.protocols = tuple(protocols)
        self.addresses = tuple(addresses)
        self.authority: Path | None = None  # our own CA, to show to people
        if config.tls is None:
            self.authority = ensure_certificates(config.data, config.hosts, self.addresses).authority
        self._files = self._find_files()
        self._stamps = self._read_stamps()
        self._contexts = self._load()
        self._loaded_at = time.monotonic()

    def context(self, host: str = "", protocol: str = "xmpp-client") -> HostContext:
        """Return the context for a stream to `host`; for a name we don't serve, that of the first host."""
        return self._contexts[self._host_for(host) or self.config.hosts[0], protocol]

    def direct_context(self, protocol: str = "xmpp-client") -> HostContext:
        """Return the context for direct TLS (XEP-0368), where only SNI can say which host is meant."""
        return self.context("", protocol)

    def end_point(self, host: str) -> bytes | None:
        """Return the channel binding tls-server-end-point of a host's certificate (see `channel_bindings`)."""
        return self.context(host, self.protocols[0]).certificate.end_point()

    def expires_at(self) -> datetime:
        """Return when the first of the certificates in use expires, aware UTC."""
        return min(context.certificate.not_after for context in self._contexts.values())

    def changed(self) -> bool:
        """Whether `reload` is due: a file has changed, or the keys of session tickets are a week old."""
        return self._read_stamps() != self._stamps or time.monotonic() - self._loaded_at > TICKET_KEYS_TIMEOUT

    def reload(self, config: Config | None = None) -> bool:
        """Read the files again; False, and one line in the log, if what was read cannot be used.

        Then everything stays as it was. Connections keep the context they began with.
        """
        before = self.config, self._files
        self.config = config or self.config
        try:
            self._files = self._find_files()
            self._stamps = self._read_stamps()  # before reading: a change while we read is seen next time
            self._contexts = self._load()
        except ConfigError as problem:
            self.config, self._files = before
            self._stamps = self._read_stamps()  # say it once, and try again when something has changed
            log.error("%s; the certificates in use stay", problem)
            return False
        self._loaded_at = time.monotonic()
        return True

    def renew(self, config: Config | None = None) -> None:
        """Renew our own leaf if it is time, for `reload` to read; slow, in a worker; raises ConfigError.

        With `config`, for the hosts it names. The owner's certificates are renewed by
        whoever issued them.
        """
        config = config or self.config
        if config.tls is None:
            ensure_certificates(config.data, config.hosts, self.addresses)

    def _host_for(self, name: str) -> str:
        """Return the served host that a name means: it, the one above it (rooms), or whose certificate covers it."""
        wanted = ascii_domain(name)
        if not wanted:
            return ""
        hosts = {ascii_domain(host): host for host in self.config.hosts}
        above = wanted
        while above:
            if above in hosts:
                return hosts[above]
            above = above.partition(".")[2]
        owners = (host for host in hosts.values() if self._contexts[host, self.protocols[0]].certificate.covers(wanted))
        return next(owners, "")

    def _find_files(self) -> dict[str, tuple[Path, Path]]:
        """Return certificate and key of each host; raises ConfigError."""
        tls = self.config.tls
        if tls is None:
            folder = self.config.data / "tls"
            return dict.fromkeys(self.config.hosts, (folder / "leaf.pem", folder / "leaf.key"))
        if tls.certificate.is_dir():
            return {host: find_pair(tls.certificate, host) for host in self.config.hosts}
        return dict.fromkeys(self.config.hosts, (tls.certificate, tls.key))

    def _read_stamps(self) -> dict[Path, tuple[int, ...]]:
        """Return what tells one state of each file from the next; () for a file that is gone."""
        paths = {path for pair in self._files.values() for path in pair}
        if self.config.client_ca is not None:
            paths.add(self.config.client_ca)
        return {path: file_stamp(path) for path in paths}

    def _load(self) -> dict[tuple[str, str], HostContext]:
        """Return new contexts for all hosts; raises ConfigError."""
        loaded: dict[tuple[tuple[Path, Path], str], HostContext] = {}
        contexts = {}
        for protocol in self.protocols:
            for host, pair in self._files.items():
                if (pair, protocol) not in loaded:  # hosts in one certificate share a context: each takes 54 kB
                    loaded[pair, protocol] = server_context(*pair, protocol, self.config.client_ca)
                    loaded[pair, protocol].sni_callback = self._chooser(protocol)
                check_certificate(loaded[pair, protocol].certificate, pair[0], host)
                contexts[host, protocol] = loaded[pair, protocol]
        return contexts

    def _chooser(self, protocol: str) -> Callable[[ssl.SSLSocket | ssl.SSLObject, str | None, ssl.SSLContext], None]:
        """Return what is called in a handshake with the name that the client sent, to change the context."""

        def choose(sock: ssl.SSLSocket | ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
            if name and (host := self._host_for(name)):
                sock.context = self._contexts[host, protocol]

        return choose


# -- what a channel knows of itself


def channel_bindings(sock: ssl.SSLSocket) -> dict[str, bytes]:
    """Return the channel bindings of an established TLS connection by name, strongest first.

    tls-exporter (RFC 9266) exists where Python can export keying material, tls-unique
    (RFC 5929 §3) only up to TLS 1.2, tls-server-end-point with nearly every certificate.
    """
    bindings: dict[str, bytes] = {}
    recent = sock.version() == "TLSv1.3"
    if not recent and sock.session_reused:
        # RFC 7677 §4: a resumed session binds nothing unless the handshake had the
        # extension of RFC 7627, and OpenSSL tells nobody whether it had.
        return bindings
    name = "tls-exporter" if recent else "tls-unique"
    if name in ssl.CHANNEL_BINDING_TYPES and (data := sock.get_channel_binding(name)):
        bindings[name] = data
    # The context that SNI has chosen is the one whose certificate was really presented.
    if isinstance(sock.context, HostContext) and (end_point := sock.context.certificate.end_point()):
        bindings["tls-server-end-point"] = end_point
    return bindings


def client_addresses(sock: ssl.SSLSocket) -> list[JID]:
    """Return the addresses in the client's verified certificate; none without one (RFC 6120 §13.7.2.2)."""
    if sock.context.verify_mode == ssl.CERT_NONE:
        return []
    return peer_addresses(sock.getpeercert(binary_form=True) or b"")


# ==== 10. Credentials and SASL (RFC 6120 §6, RFC 5802, RFC 7677, RFC 4616) ====
#
# How does somebody prove to be alice? SASL (RFC 4422) is the frame: the server lists
# mechanisms, the client picks one, they exchange messages that only the mechanism
# understands, and the server says success or failure.
#
#     C: <auth mechanism='SCRAM-SHA-256'>n,,n=alice,r=…</auth>        who, and a random number
#     S: <challenge>r=…,s=…,i=10000</challenge>                       another, salt, iterations
#     C: <response>c=biws,r=…,p=…</response>                          the proof
#     S: <success>v=…</success>                                       the server's own proof
#
# (In base64 on the wire, which chapter 11 takes off and puts on.) With SCRAM, the password
# never travels and is not stored: we keep keys derived from it that can check a proof but
# not make one. The -PLUS forms also prove that both see the same TLS channel.
#
# Everything here is sans-I/O: a mechanism takes bytes and returns the next step. PBKDF2,
# slow by design, comes back as `Work` for a worker thread.
#
# Nobody can find out which accounts exist (RFC 6120 §6.5.10): an unknown name gets a salt
# and keys that look as real as any, always the same for the same name, and fails where a
# wrong password fails. The one trace left: once that account is created, its salt changes.

SCRAM_ITERATIONS = 10_000  # RFC 7677 §4 asks for 4,096 at least; this is what old phones do in half a second
SALT_SIZE = 16  # bytes
NONCE_SIZE = 18  # random bytes in ours: 24 characters
MAX_DIGEST_RESPONSE = 4096  # bytes; RFC 2831 §2.1.2: it must be shorter
SCRAM_HASHES = {"scram-sha-256": "sha256", "scram-sha-1": "sha1"}  # kept for each account, strongest first


class ScramKeys(NamedTuple):
    """What is kept of a password (RFC 5802 §3): enough to check a proof, not to make one."""

    salt: bytes
    iterations: int
    stored: bytes  # StoredKey: H(ClientKey)
    server: bytes  # ServerKey


def encode_base64(data: bytes) -> str:
    """Return the text for `data` on the wire; no data at all is "=" (RFC 6120 §6.4.2)."""
    return base64.b64encode(data).decode("ascii") or "="


def decode_base64(text: str) -> bytes:
    """Return what `text` stands for; raises SASLError("incorrect-encoding") (RFC 6120 §6.5.5, §13.9.1)."""
    if text == "=":
        return b""
    try:
        return binascii.a2b_base64(text.encode("ascii"), strict_mode=True)
    except ValueError:  # a character beyond ASCII or the alphabet, or padding in the wrong place
        raise SASLError("incorrect-encoding") from None


# -- credentials


def derive_keys(password: str, hash_name: str, salt: bytes, iterations: int) -> ScramKeys:
    """Return the keys of a prepared password (RFC 5802 §3); slow: PBKDF2."""
    salted = hashlib.pbkdf2_hmac(hash_name, password.encode("utf-8"), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", hash_name)
    stored = hashlib.new(hash_name, client_key).digest()
    return ScramKeys(salt, iterations, stored, hmac.digest(salted, b"Server Key", hash_name))


def latin1_or_utf8(text: str) -> bytes:
    """Return `text` in the character set that RFC 2831 hashes it in."""
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        return text.encode("utf-8")


def digest_md5_secret(name: str, realm: str, password: str) -> bytes:
    """Return H(username:realm:password), in ISO 8859-1 where that can write a part (RFC 2831 §2.1.2.1)."""
    return hashlib.md5(b":".join(map(latin1_or_utf8, (name, realm, password))), usedforsecurity=False).digest()


def make_credentials(password: str, *, digest_md5: JID | None = None) -> dict[str, Any]:
    """Return what an account document keeps of a password: one entry for each kind of mechanism.

        {"scram-sha-256": {"salt": …, "iterations": 10000, "stored": …, "server": …}, "scram-sha-1": …}

    All keys are base64. With `digest_md5`, the account's bare JID, there is also
    `"digest-md5": {domain: hash}`; RFC 2831 puts name and domain into the hash, and who
    steals it can log in with it. Slow: call it in a worker. Raises ValueError for a
    password that is empty or cannot be prepared (RFC 4013).
    """
    prepared = saslprep(password)
    credentials: dict[str, Any] = {}
    for kind, hash_name in SCRAM_HASHES.items():
        keys = derive_keys(prepared, hash_name, secrets.token_bytes(SALT_SIZE), SCRAM_ITERATIONS)
        credentials[kind] = {
            "salt": encode_base64(keys.salt),
            "iterations": keys.iterations,
            "stored": encode_base64(keys.stored),
            "server": encode_base64(keys.server),
        }
    if digest_md5 is not None:
        secret = digest_md5_secret(digest_md5.local, digest_md5.domain, prepared)
        credentials["digest-md5"] = {digest_md5.domain: encode_base64(secret)}
    return credentials


def scram_keys(credentials: Mapping[str, Any] | None, kind: str) -> ScramKeys | None:
    """Return the keys of one kind; None if there are none; raises ValueError if the document is damaged."""
    if not credentials or kind not in credentials:
        return None
    entry = credentials[kind]
    try:
        salt, stored, server = (base64.b64decode(entry[key], validate=True) for key in ("salt", "stored", "server"))
        iterations = int(entry["iterations"])
    except (KeyError, TypeError) as problem:
        raise ValueError(f"damaged credentials: {kind}") from problem
    if not salt or iterations < 1 or {len(stored), len(server)} != {hashlib.new(SCRAM_HASHES[kind]).digest_size}:
        raise ValueError(f"damaged credentials: {kind}")
    return ScramKeys(salt, iterations, stored, server)


# Keys that no password has: what is checked when there is no account, at the usual price.
NO_KEYS = ScramKeys(bytes(SALT_SIZE), SCRAM_ITERATIONS, bytes(32), bytes(32))


def check_password(credentials: Mapping[str, Any] | None, password: str) -> bool:
    """Whether this is the password; None for credentials means no account, and takes as long.

    Pure and slow: call it in a worker. Raises ValueError if the document is damaged.
    """
    kinds = ((hash_name, scram_keys(credentials, kind)) for kind, hash_name in SCRAM_HASHES.items())
    hash_name, keys = next(((name, keys) for name, keys in kinds if keys), ("sha256", NO_KEYS))
    try:
        prepared = saslprep(password)
    except ValueError:
        return False  # for every account alike: nothing can be learned from the time
    derived = derive_keys(prepared, hash_name, keys.salt, keys.iterations)
    return hmac.compare_digest(derived.stored, keys.stored)


def made_up_keys(secret: bytes, kind: str, name: str) -> ScramKeys:
    """Return keys for a name without an account: random to everybody, and the same each time (RFC 5802 §9).

    Nobody can know a client key that hashes to the stored one, so every proof fails.
    """
    size = hashlib.new(SCRAM_HASHES[kind]).digest_size
    salt, stored, server = (
        hmac.digest(secret, f"{kind}\0{purpose}\0{name}".encode(), "sha256") for purpose in ("salt", "stored", "server")
    )
    return ScramKeys(salt[:SALT_SIZE], SCRAM_ITERATIONS, stored[:size], server[:size])


# -- what a mechanism gets to know, and what it returns


@dataclass(slots=True)
class LoginContext:
    """What a mechanism may know of the server and of this connection."""

    host: str  # the domain of the stream
    secure: bool  # inside TLS
    bindings: dict[str, bytes]  # channel bindings by type
    credentials: Callable[[str], Mapping[str, Any] | None]  # of a prepared localpart; None: no such account
    secret: bytes  # the server's own, for what is made up
    certificate_addresses: list[JID] = field(default_factory=list)  # in the client's verified certificate
    offered: list[str] = field(default_factory=list)  # the mechanisms' names on this stream
    disabled: Callable[[str], bool] = lambda local: False  # whether the owner has suspended an account
    sender: JID | None = None  # `from` of the stream header, sent inside TLS


@dataclass(frozen=True, slots=True)
class Challenge:
    """Send these bytes and go on with the client's response."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Success:
    """The client is `username`, a bare JID; `data`, unless None, goes with the success (RFC 6120 §6.3.10)."""

    data: bytes | None
    username: JID


@dataclass(frozen=True, slots=True)
class Work:
    """Call `function(*args)` in a worker; `then(result)` on the loop gives the next step or raises SASLError."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    then: Callable[[Any], Step]


Step = Challenge | Success | Work


def login_account(name: str, host: str) -> JID:
    """Return the account a SASL user name means: a localpart (RFC 6120 §6.3.7) or, laxly, the whole bare JID.

    Raises SASLError("not-authorized") for what is no account's name.
    """
    local, at, domain = name.partition("@")
    try:
        account = JID(prepare_local(saslprep(local)), prepare_domain(domain) if at else host, "")
    except ValueError:
        raise SASLError("not-authorized") from None
    if not account.local or account.domain != host:
        raise SASLError("not-authorized")
    return account


def parse_authzid(text: str) -> JID:
    """Return an authorization identity as address; raises SASLError("invalid-authzid")."""
    try:
        return JID.parse(text)
    except StanzaError:
        raise SASLError("invalid-authzid") from None


def decode_message(data: bytes) -> str:
    """Return a mechanism's message as text; raises SASLError unless it is UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise SASLError("malformed-request", "not UTF-8") from None


class Mechanism(ABC):
    """One exchange, from the first message to success or SASLError.

    `client_first`: the first data are the client's; a client that sends none with
    `<auth/>` is asked by an empty challenge (RFC 6120 §6.3.10). Else `step(b"")` gives the
    server's first challenge. After SASLError the object is thrown away.
    """

    client_first = True

    def __init__(self, name: str, context: LoginContext) -> None:
        self.name = name
        self.context = context
        self.account = JID("", context.host, "")  # whom the client says to be, once it has said so
        # What takes the client's next message; not a bound method, by which this would refer to itself.
        self.expect: Callable[[Any, bytes], Step] = type(self).begin

    @abstractmethod
    def begin(self, data: bytes) -> Step:
        """Take the client's first message; raises SASLError."""

    def step(self, data: bytes) -> Step:
        """Take one message of the client, without its base64; raises SASLError."""
        return self.expect(self, data)

    def identify(self, name: str, authzid: str) -> None:
        """Set `account` from a user name and an authorization identity, "" for none; raises SASLError.

        Says nothing about whether the account exists.
        """
        self.account = login_account(name, self.context.host)
        if authzid:
            self.check_authzid(authzid)

    def check_authzid(self, authzid: str) -> None:
        """Refuse to act for anybody else (RFC 6120 §6.3.8): it must be the account's bare JID."""
        if parse_authzid(authzid) != self.account:
            raise SASLError("invalid-authzid")

    def credentials(self) -> Mapping[str, Any] | None:
        """Return the account's credentials, None for no account."""
        return self.context.credentials(self.account.local)

    def succeed(self, data: bytes | None = None) -> Success:
        """End well, unless the account is suspended; only who has proved to own it learns that (§6.5.2)."""
        if self.context.disabled(self.account.local):
            raise SASLError("account-disabled")
        return Success(data, self.account)


# -- PLAIN (RFC 4616)


def readable(credentials: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return credentials whose SCRAM keys can be read; raises SASLError("temporary-auth-failure").

    A damaged account document is the server's fault, which the owner can mend.
    """
    try:
        for kind in SCRAM_HASHES:
            scram_keys(credentials, kind)
    except ValueError as problem:
        raise SASLError("temporary-auth-failure", str(problem)) from None
    return credentials


class Plain(Mechanism):
    """PLAIN: authorization identity, NUL, user name, NUL, password, in one message.

    Only inside TLS: the password travels as it is.
    """

    def begin(self, data: bytes) -> Step:
        """§2. Each part may be long; the limit on elements before login bounds them."""
        parts = decode_message(data).split("\0")
        if len(parts) != 3:
            raise SASLError("malformed-request")
        authzid, name, password = parts
        self.identify(name, authzid)
        return Work(check_password, (readable(self.credentials()), password), self.checked)

    def checked(self, is_right: bool) -> Step:
        """Go on when the worker has compared."""
        if not is_right:
            raise SASLError("not-authorized")
        return self.succeed()


# -- SCRAM (RFC 5802, RFC 7677)


def split_gs2_header(message: str) -> tuple[str, str, str]:
    """Return flag, `a=…` or "", and the rest of a client-first-message (RFC 5802 §7); raises SASLError."""
    parts = message.split(",", 2)
    if len(parts) < 3:
        raise SASLError("malformed-request")
    flag, authzid, bare = parts
    if not re.fullmatch(r"n|y|p=[A-Za-z0-9.-]+", flag) or (authzid and not re.fullmatch(r"a=[^,]+", authzid)):
        raise SASLError("malformed-request")
    return flag, authzid, bare


def scram_attributes(message: str) -> list[tuple[str, str]]:
    """Return letters and values of a message in their order; raises SASLError (RFC 5802 §5.1, §7)."""
    attributes = []
    for part in message.split(","):
        letter, equals, value = part.partition("=")
        if not re.fullmatch(r"[A-Za-z]", letter) or not equals or not value or "\0" in value:
            raise SASLError("malformed-request")
        if letter == "m":  # a *mandatory* extension, of which there are none yet
            raise SASLError("malformed-request", "extensions not supported")
        attributes.append((letter, value))
    return attributes


def check_attributes(attributes: Sequence[tuple[str, str]], first: str, last: str) -> None:
    """Raise SASLError unless `first` and `last` frame the letters; between them, only extensions, which are ignored."""
    letters = "".join(letter for letter, _ in attributes)
    known = "anrcsipve"
    middle = letters[len(first) : len(letters) - len(last)]
    if letters != first + middle + last or any(letter in known for letter in middle):
        raise SASLError("malformed-request")


def decode_saslname(text: str) -> str:
    """Return a name with `=2C` and `=3D` as what they stand for; raises SASLError for any other `=`."""
    if re.search("=(?!2C|3D)", text):
        raise SASLError("malformed-request", "invalid username encoding")
    return text.replace("=2C", ",").replace("=3D", "=")


class Scram(Mechanism):
    """SCRAM-SHA-1, SCRAM-SHA-256 and their -PLUS forms.

    The messages are lists of `letter=value`, and both sides hash them as they were sent:
    what an attacker changes on the way spoils the proof.
    """

    def __init__(self, name: str, context: LoginContext) -> None:
        super().__init__(name, context)
        self.plus = name.endswith("-PLUS")
        self.kind = name.removesuffix("-PLUS").lower()
        self.hash_name = SCRAM_HASHES[self.kind]
        self.nonce = secrets.token_urlsafe(NONCE_SIZE)  # ours; the client's goes in front of it
        self.binding = ""  # what `c=` must be
        self.messages = ""  # the part of the AuthMessage that is known (§3)
        self.keys = NO_KEYS

    def begin(self, data: bytes) -> Step:
        """§5, client-first-message: `n,a=authzid,n=name,r=nonce`."""
        flag, authzid, bare = split_gs2_header(decode_message(data))
        self.binding = encode_base64(f"{flag},{authzid},".encode() + self.binding_data(flag))
        attributes = scram_attributes(bare)
        check_attributes(attributes, "nr", "")
        (_, name), (_, client_nonce), *_ = attributes
        self.identify(decode_saslname(name), decode_saslname(authzid[2:]))
        if not all("!" <= character <= "~" for character in client_nonce):
            raise SASLError("malformed-request", "a nonce that is not printable ASCII")
        self.nonce = client_nonce + self.nonce
        keys = scram_keys(readable(self.credentials()), self.kind)
        self.keys = keys or made_up_keys(self.context.secret, self.kind, self.account.local)
        first = f"r={self.nonce},s={encode_base64(self.keys.salt)},i={self.keys.iterations}{self.extensions()}"
        self.messages = f"{bare},{first}"
        self.expect = Scram.finish
        return Challenge(first.encode())

    def extensions(self) -> str:
        """XEP-0474 §6.1. Return `,h=` and a hash of what was offered, so that the proof also covers it.

        Who takes a mechanism or a channel binding out of our list on the way is found out by
        the client. FAST's mechanisms are not in that list (Monal and others refuse such a hash).
        """
        lists = [self.context.offered]
        if self.context.secure and self.context.bindings:  # then they were advertised (XEP-0440)
            lists.append(list(self.context.bindings))
        text = "\x1f".join("\x1e".join(sorted(names)) for names in lists)
        return ",h=" + encode_base64(hashlib.new(self.hash_name, text.encode("ascii")).digest())

    def binding_data(self, flag: str) -> bytes:
        """§6. Return the channel binding that the client's flag asks for; raises SASLError."""
        if self.plus != flag.startswith("p="):
            raise SASLError("malformed-request", "channel binding goes with the -PLUS mechanisms, and only with them")
        if flag == "y" and any(name.endswith("-PLUS") for name in self.context.offered):
            # The client supports it and saw no -PLUS: somebody took it out of our list.
            raise SASLError("not-authorized", "this server does support channel binding")
        if not self.plus:
            return b""
        if flag[2:] not in self.context.bindings:
            raise SASLError("not-authorized", "unsupported channel binding type")
        return self.context.bindings[flag[2:]]

    def finish(self, data: bytes) -> Step:
        """§5, client-final-message: `c=binding,r=nonce,p=proof`."""
        message = decode_message(data)
        attributes = scram_attributes(message)
        check_attributes(attributes, "cr", "p")
        (_, binding), (_, nonce), *_, (_, proof) = attributes
        if not hmac.compare_digest(binding.encode(), self.binding.encode()):
            raise SASLError("not-authorized", "channel bindings don't match")
        if not hmac.compare_digest(nonce.encode(), self.nonce.encode()):
            raise SASLError("not-authorized")
        auth_message = f"{self.messages},{message.removesuffix(f',p={proof}')}".encode()
        if not self.proves(proof, auth_message):
            raise SASLError("not-authorized")
        return self.succeed(b"v=" + base64.b64encode(hmac.digest(self.keys.server, auth_message, self.hash_name)))

    def proves(self, proof: str, auth_message: bytes) -> bool:
        """§3. Whether the proof, unmasked by our signature, is the key whose hash we keep; raises SASLError."""
        try:
            masked = base64.b64decode(proof, validate=True)
        except ValueError:
            raise SASLError("malformed-request", "the proof is not base64") from None
        signature = hmac.digest(self.keys.stored, auth_message, self.hash_name)
        if len(masked) != len(signature):
            return False
        client_key = bytes(left ^ right for left, right in zip(masked, signature, strict=True))
        return hmac.compare_digest(hashlib.new(self.hash_name, client_key).digest(), self.keys.stored)


# -- EXTERNAL (RFC 4422 Appendix A, XEP-0178 §2)


def external_accounts(context: LoginContext) -> list[JID]:
    """Return the addresses of the client's certificate that could be accounts of this host, each once."""
    here = (jid.bare for jid in context.certificate_addresses if jid.local and jid.domain == context.host)
    return list(dict.fromkeys(here))


class External(Mechanism):
    """EXTERNAL: TLS has already proved who the client is, by a certificate with its address in it."""

    def begin(self, data: bytes) -> Step:
        """XEP-0178 §2 step 11: the message is the authorization identity, empty for "as my certificate says"."""
        authzid = decode_message(data)
        candidates = external_accounts(self.context)
        if authzid:
            candidates = [account for account in candidates if account == parse_authzid(authzid)]
            if not candidates:
                raise SASLError("invalid-authzid")
        accounts = [account for account in candidates if self.context.credentials(account.local) is not None]
        if not accounts:
            raise SASLError("not-authorized")
        sender = self.context.sender.bare if self.context.sender else None
        if len(accounts) > 1 and sender not in accounts:
            raise SASLError("invalid-authzid", "the certificate has several addresses: name one")
        # RFC 6120 §13.7.2.2.1: among several, the stream header may choose.
        self.account = sender if sender in accounts else accounts[0]
        return self.succeed()


# -- DIGEST-MD5 (RFC 2831), which RFC 6331 calls historic: only for clients of the RFC 3920 age


def digest_md5_response(secret: bytes, directives: Mapping[str, str], method: str) -> str:
    """Return the response-value of RFC 2831 §2.1.2.1; `method` is "" for the server's (§2.1.3)."""

    def digest(*parts: bytes) -> bytes:
        return hashlib.md5(b":".join(parts), usedforsecurity=False).hexdigest().encode()

    nonce, nonce_count, cnonce, qop, uri = (
        directives.get(name, default).encode()
        for name, default in (("nonce", ""), ("nc", ""), ("cnonce", ""), ("qop", "auth"), ("digest-uri", ""))
    )
    identity = (directives["authzid"].encode(),) if "authzid" in directives else ()
    first = digest(secret, nonce, cnonce, *identity)
    return digest(first, nonce, nonce_count, cnonce, qop, digest(method.encode(), uri)).decode("ascii")


# A directive (RFC 2831 §7.1): a token, then a token or a quoted string.
DIGEST_DIRECTIVE = re.compile(
    r"""([!#$%&'*+.^_`|~0-9A-Za-z-]+)[ \t\r\n]*=[ \t\r\n]*(?:"((?:[^"\\]|\\.)*)"|([^" \t\r\n,=]+))[ \t\r\n]*""",
    re.DOTALL,
)


def skip_separators(text: str, at: int) -> int:
    """Return the index after commas and white space, of which a list may have too many (RFC 2831 §7.1)."""
    while at < len(text) and text[at] in ", \t\r\n":
        at += 1
    return at


def digest_directives(data: bytes) -> dict[str, str]:
    """Return the directives of a response, by name in lower case; raises SASLError.

    Any directive given twice is refused, where RFC 2831 does so for those it knows: which
    of the two a program believes is a matter of taste.
    """
    if len(data) >= MAX_DIGEST_RESPONSE:
        raise SASLError("malformed-request", "the response is too long")
    text = data.decode("latin-1")  # never fails, and leaves every octet what it is
    directives: dict[str, str] = {}
    at = skip_separators(text, 0)
    while at < len(text):
        found = DIGEST_DIRECTIVE.match(text, at)
        if not found or (found.end() < len(text) and text[found.end()] != ","):
            raise SASLError("malformed-request")
        name, quoted, token = found.groups()
        if name.lower() in directives:
            raise SASLError("malformed-request", f"{name} is given twice")
        directives[name.lower()] = re.sub(r"\\(.)", r"\1", quoted, flags=re.DOTALL) if token is None else token
        at = skip_separators(text, found.end())
    if "charset" not in directives:
        return directives  # §2.1.2: then it was ISO 8859-1 indeed
    return {name: decode_message(value.encode("latin-1")) for name, value in directives.items()}


class DigestMD5(Mechanism):
    """DIGEST-MD5, without its own encryption: the client hashes the password with both sides' random numbers.

        S: realm="example.org",nonce="…",qop="auth",charset=utf-8,algorithm=md5-sess
        C: username="alice",realm="example.org",nonce="…",cnonce="…",nc=00000001,qop=auth,
           digest-uri="xmpp/example.org",response=…,charset=utf-8
        S: rspauth=…                                     (then an empty response, and success)
    """

    client_first = False

    def __init__(self, name: str, context: LoginContext) -> None:
        super().__init__(name, context)
        self.nonce = secrets.token_urlsafe(NONCE_SIZE)

    def begin(self, data: bytes) -> Step:
        """§2.1.1. An initial response would be "subsequent authentication" (§2.2), which we don't offer."""
        if data:
            raise SASLError("malformed-request")
        self.expect = DigestMD5.check
        challenge = f'realm="{self.context.host}",nonce="{self.nonce}",qop="auth",charset=utf-8,algorithm=md5-sess'
        return Challenge(challenge.encode())

    def check(self, data: bytes) -> Step:
        """§2.1.2. Check every directive, then the digest; §2.1.3: answer with a digest of ours."""
        directives = digest_directives(data)
        self.check_directives(directives)
        self.identify(directives["username"], directives.get("authzid", ""))
        secret = self.secret_for(directives["username"])
        expected = digest_md5_response(secret, directives, "AUTHENTICATE")
        if not hmac.compare_digest(expected, directives["response"]):
            raise SASLError("not-authorized")
        self.succeed()  # before the client learns that its digest was right and its account is suspended
        self.expect = DigestMD5.acknowledged
        return Challenge(b"rspauth=" + digest_md5_response(secret, directives, "").encode())

    def check_directives(self, directives: Mapping[str, str]) -> None:
        """§2.1.2. Raise SASLError unless all that must be there is, and says what it must."""
        if not {"username", "nonce", "cnonce", "response"} <= directives.keys():
            raise SASLError("malformed-request", "a directive is missing")
        if directives.get("charset", "utf-8") != "utf-8" or not re.fullmatch("[0-9a-f]{32}", directives["response"]):
            raise SASLError("malformed-request")
        expected = {
            "nonce": self.nonce,  # a nonce is good for one try
            "nc": "00000001",
            "realm": self.context.host,
            "digest-uri": f"xmpp/{self.context.host}",
        }
        if any(directives.get(name) != value for name, value in expected.items()):
            raise SASLError("not-authorized")
        if directives.get("qop", "auth") != "auth":
            raise SASLError("not-authorized", "only qop=auth is offered")

    def secret_for(self, username: str) -> bytes:
        """Return H(username:realm:password) as kept, or what nobody can know if there is none."""
        realms = (self.credentials() or {}).get("digest-md5", {})
        # The hash was made of the prepared name: another spelling of it would need another hash.
        if self.context.host not in realms or username != self.account.local:
            return secrets.token_bytes(16)
        try:
            return base64.b64decode(realms[self.context.host], validate=True)
        except (TypeError, ValueError):
            raise SASLError("temporary-auth-failure", "damaged credentials: digest-md5") from None

    def acknowledged(self, data: bytes) -> Step:
        """Take the empty response to our digest: RFC 3920's clients want it as a challenge, not with success."""
        if data:
            raise SASLError("malformed-request")
        return self.succeed()


# -- which mechanisms

MECHANISMS: dict[str, type[Mechanism]] = {  # strongest first (RFC 6120 §6.3.3)
    "EXTERNAL": External,
    "SCRAM-SHA-256-PLUS": Scram,
    "SCRAM-SHA-1-PLUS": Scram,  # before SCRAM-SHA-256: no attack on SHA-1 here is as good as a man in the middle
    "SCRAM-SHA-256": Scram,
    "SCRAM-SHA-1": Scram,
    "DIGEST-MD5": DigestMD5,
    "PLAIN": Plain,
}


def mechanisms(context: LoginContext, config: Config) -> list[str]:
    """Return the names to offer on a stream, strongest first (RFC 6120 §6.3.3, §6.3.4)."""
    hidden = set()
    if not external_accounts(context):
        hidden.add("EXTERNAL")
    if not context.bindings:
        hidden |= {"SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS"}
    if not config.compat.digest_md5:
        hidden.add("DIGEST-MD5")
    if not context.secure:
        hidden.add("PLAIN")  # RFC 6120 §13.8.3
    return [name for name in MECHANISMS if name not in hidden]


def start_mechanism(name: str, context: LoginContext) -> Mechanism:
    """Return the beginning of an exchange; raises SASLError for what was not offered (RFC 6120 §6.5.4, §6.5.7)."""
    if name == "PLAIN" and not context.secure:
        raise SASLError("encryption-required")
    if name not in context.offered:
        raise SASLError("invalid-mechanism")
    return MECHANISMS[name](name, context)


# ==== 11. Streams (RFC 6120 §4 to §6) ====
#
# How a client gets in. Each line from the client is answered before the next one matters:
#
#     C: <stream:stream to='example.org' version='1.0' …>
#     S: <stream:stream from='example.org' id='…' version='1.0' …>
#        <stream:features><starttls …><required/></starttls></stream:features>
#     C: <starttls …/>                      S: <proceed …/>          … TLS handshake, new stream
#     C: <stream:stream …>                  S: <stream:stream …> features: mechanisms
#     C: <auth mechanism='SCRAM-SHA-256'>   S: <challenge/> … <success/>           … new stream
#     C: <stream:stream …>                  S: <stream:stream …> features: bind
#     C: <iq type='set'><bind …/></iq>      S: <iq type='result'>… full JID …</iq>
#
# After TLS and after the login both sides throw their stream away and open a new one on
# the same connection, so nothing learnt before is trusted after. The states:
#
#     OPENING ──header──> OPEN ──SASL, restart──> AUTHENTICATED ──bind──> BOUND
#        ▲                 │                                        (any) ──────> CLOSED
#        └─STARTTLS, restart┘
#
# A stream is sans-I/O: it takes bytes by `receive` and writes to a `Transport`, which may
# be a socket (chapter 12) or a list in a test. The steps of the negotiation are rows of
# `NEGOTIATION`; features add theirs by `@element`, `@iq(to="stream")` and `offers`.


STREAM_SLICE = 0.01  # seconds of a turn in which one stream's stanzas are handled; then the others have theirs
VERSION_NUMBER = re.compile(r"[0-9]{1,9}\.[0-9]{1,9}")
LANGUAGE_TAG = re.compile(r"(?=.{1,35}$)[A-Za-z]{1,8}(-[A-Za-z0-9]{1,8})*")  # RFC 5646 §2.1, as long as §4.4.1 asks


class StreamState(Enum):
    """How far a stream has come (RFC 6120 §4.3); the values are the words of `@element(state=…)`."""

    OPENING = "opening"  # waits for the peer's header
    OPEN = "open"  # headers exchanged, the peer is nobody yet
    AUTHENTICATED = "authenticated"
    BOUND = "bound"
    CLOSED = "closed"


CLOSED = StreamState.CLOSED  # asked several times per stanza; a member of an Enum takes 0.1 µs to be found


class Transport(Protocol):
    """What carries a stream: TCP with or without TLS (chapter 12), or a test's memory."""

    secure: bool  # TLS is up
    peer: str  # the peer's IP address, for limits and logs; never shown to other users (RFC 6120 §13.10.1)
    lab: bool  # a loopback listener on which the owner allows logins without TLS
    compressed: bool  # by XEP-0138

    def write(self, data: bytes) -> None:
        """Queue bytes for the peer, behind what the journal has to hold first."""

    def write_ahead(self, data: bytes) -> None:
        """Queue bytes that depend on nothing in the journal, ahead of what waits for it."""

    def start_tls(self, host: str) -> None:
        """Begin TLS once everything written is out; then call the stream's `tls_established`."""

    def compress(self) -> None:
        """Compress what is written from now on, and inflate what comes in (XEP-0138)."""

    def close(self) -> None:
        """Close politely once everything written is out."""

    def pause(self) -> None:
        """Read no more, until `resume`."""

    def resume(self) -> None:
        """Read again."""

    def when_sent(self, callback: Callable[[], None]) -> None:
        """Call `callback` once all that was written so far is out of our hands; never, if that fails."""

    def channel_bindings(self) -> dict[str, bytes]:
        """Return the channel bindings of this connection by type (RFC 5929, RFC 9266); empty without TLS."""

    def peer_certificate(self) -> bytes | None:
        """Return the verified client certificate as DER, if there is one."""


class Stream(ABC):
    """One XML stream in both directions: headers, errors, restarts, the end (RFC 6120 §4).

    What happens with first-level elements and with the peer's header is decided by the
    kind of stream, by overriding `opened` and `element`.
    """

    content_namespace: ClassVar[Namespace] = CLIENT
    stream_prefix: ClassVar[str] = ""  # how `stream:` is declared where no header does (chapter 24)

    def __init__(self, server: Server, transport: Transport) -> None:
        self.server = server
        self.transport = transport
        self.state = StreamState.OPENING
        self.host = server.config.hosts[0]  # the served domain that the peer asked for
        self.version = "1.0"  # "": a pre-1.0 peer (RFC 6120 §4.7.5)
        self.lang = ""  # the peer's default language (RFC 6120 §4.7.4)
        self.claimed: JID | None = None  # who the header says the peer is; never believed
        self.id = ""
        self.paused = False  # an answer is on its way from a worker: what came behind must wait (RFC 6120 §10.1)
        self.heard_at = server.loop.now()
        self._header_sent = False
        self.parser = self._make_parser()
        self._deadline = server.loop.call_later(server.config.limits.unauthenticated_timeout, self._too_slow)

    def _make_parser(self) -> StreamParser:
        limits = self.server.config.limits
        return StreamParser(self.content_namespace, max_stanza=limits.stanza_before_login,
                            max_elements=limits.elements_before_login)  # fmt: skip

    @property
    @abstractmethod
    def name(self) -> str:
        """Who is at the other end, for logs and traces."""

    # -- input

    def receive(self, data: bytes) -> None:
        """Take bytes from the transport."""
        self.heard_at = self.server.loop.now()
        if self.state is not CLOSED:
            self.parser.feed(data)
            self.process()

    def process(self) -> None:
        """Handle the events that are ready, in order, unless one of them has to be waited for.

        One read may hold a hundred requests that cost 30 ms each; after a while it's the others' turn.
        """
        now, until = self.server.loop.now, 0.0
        while not self.paused and self.state is not CLOSED:
            event = self.next_event()
            if event is None:
                return
            if not until:
                until = now() + STREAM_SLICE
            elif now() > until:
                self._stand_still()
                return self.server.loop.post(functools.partial(self._go_on, functools.partial(self._handle, event)))
            self.attempt(self._handle, event)

    def next_event(self) -> Event | None:
        """Return what is to be handled next, or None when more bytes are needed first."""
        return self.parser.next()

    def _stand_still(self) -> None:
        self.paused = True
        self.transport.pause()

    def _go_on(self, step: Callable[[], None]) -> None:
        if self.state is not CLOSED:
            self.paused = False
            self.transport.resume()
            self.attempt(step)
            self.process()

    def attempt(self, step: Callable[..., None], *args: Any) -> None:
        """Run a step of the protocol; a StreamError ends the stream, a bug of ours ends it and is logged."""
        try:
            step(*args)
        except StreamError as error:
            self.fail(error)
        except Exception:  # one stream's bug must not take the others down
            log.exception("%s: unexpected error", self)
            self.fail(StreamError("internal-server-error"))

    def _handle(self, event: Event) -> None:
        if self.server.trace is not None:
            self.server.trace.heard(self, event)
        if isinstance(event, Element):
            self.element(event)
        elif isinstance(event, Opened):
            self._check_header(event)
            self.opened(event)
        elif isinstance(event, Closed):
            self.close()
        else:
            self.fail(event)  # raised, it would refer to this frame, and the frame to it

    @abstractmethod
    def element(self, element: Element) -> None:
        """Handle one first-level element."""

    @abstractmethod
    def opened(self, header: Opened) -> None:
        """Answer the peer's header, which is known to be sound."""

    # -- headers (RFC 6120 §4.7, §4.8)

    def _check_header(self, header: Opened) -> None:
        if header.tag != STREAMS("stream"):
            raise StreamError("bad-format" if namespace_of(header.tag) == STREAMS else "invalid-namespace")
        if header.prefixes.get("stream") != STREAMS:
            raise StreamError("bad-namespace-prefix")  # §4.8.5
        if header.prefixes.get(None) != self.content_namespace:
            raise StreamError("invalid-namespace")  # §4.8.3
        self.version = self._negotiate_version(header.attributes.get("version"))
        lang = header.attributes.get(XML_LANG, "")
        self.lang = lang if LANGUAGE_TAG.fullmatch(lang) else ""
        self._check_addresses(header)

    def _negotiate_version(self, theirs: str | None) -> str:
        """§4.7.5: the lower of both versions; none, or 0.x, is a peer from before RFC 3920."""
        if theirs is None:
            return ""
        if not VERSION_NUMBER.fullmatch(theirs):
            raise StreamError("unsupported-version")
        return "1.0" if int(theirs.partition(".")[0]) >= 1 else ""

    def _check_addresses(self, header: Opened) -> None:
        to, sender = header.attributes.get("to"), header.attributes.get("from")
        try:
            if sender:
                self.claimed = JID.parse(sender)
            host = JID.parse(to).domain if to else self._default_host()
        except StanzaError:
            raise StreamError("improper-addressing") from None
        if host not in self.server.config.hosts:
            raise StreamError("host-unknown")  # §4.9.3.6
        self.host = host

    def _default_host(self) -> str:
        """§4.7.2: a missing `to` can only mean the one domain there is."""
        hosts = self.server.config.hosts
        if len(hosts) > 1:
            raise StreamError("host-unknown", "several domains are served here: the stream header must say which")
        return hosts[0]

    def send_header(self) -> None:
        """Open the stream in our direction (§4.7); a new id each time, so that no two streams are alike."""
        self._header_sent = True
        self.id = secrets.token_urlsafe(16)
        attributes = {"from": self.host, "id": self.id, XML_LANG: "en"}
        if self.claimed is not None:
            attributes["to"] = str(self.claimed.bare)
        if self.version:
            attributes["version"] = self.version
        self._write_header(Element("stream:stream", attributes))

    def _write_header(self, header: Element) -> None:
        namespaces = f"xmlns='{self.content_namespace}' xmlns:stream='{STREAMS}'"
        self._write(f"<?xml version='1.0'?><stream:stream {namespaces}{_attributes(header)}>")

    def _write_footer(self) -> None:
        self._write("</stream:stream>")

    # -- output

    def send(self, stanza: Stanza) -> None:
        """Send a stanza."""
        if self.server.trace is not None:
            self.server.trace.said(self, stanza)
        self.transport.write(stanza.wire())

    def send_written(self, data: bytes) -> None:
        """Send a stanza that is written already, by `Stanza.wire`."""
        if self.server.trace is not None:
            self.server.trace.said(self, data.decode())
        self.transport.write(data)

    def send_element(self, element: Element) -> None:
        """Send any other first-level element."""
        if self.server.trace is not None:
            self.server.trace.said(self, element)
        self.transport.write(serialize(element, CLIENT).encode())

    def send_features(self, features: Iterable[Element]) -> None:
        """Say what can be negotiated now (RFC 6120 §4.3.2)."""
        inside = "".join(serialize(feature, CLIENT) for feature in features)
        self._write(f"<stream:features{self.stream_prefix}>{inside}</stream:features>")

    def _write(self, text: str) -> None:
        if self.server.trace is not None:
            self.server.trace.said(self, text)
        self.transport.write(text.encode())

    # -- restarts and the end

    def restart(self, rest: bytes) -> None:
        """Forget this stream and wait for a new header (RFC 6120 §4.3.3); `rest` are its first bytes."""
        self.parser.close()
        self.parser = self._make_parser()
        self.state = StreamState.OPENING
        self._header_sent = False
        self.claimed, self.lang = None, ""
        self.parser.feed(rest)

    def fail(self, error: StreamError) -> None:
        """Say what is wrong and end the stream (RFC 6120 §4.9.1); a header comes first if there was none."""
        if self.state is CLOSED:
            return
        log.info("%s: closed with %s%s", self, error.condition, f" ({error.text})" if error.text else "")
        if not self._header_sent:
            self.send_header()
        self._write_error(error)
        self.close()

    def _write_error(self, error: StreamError) -> None:
        condition = serialize(E(STREAM_ERRORS(error.condition)))
        if error.text:
            condition += serialize(E(STREAM_ERRORS("text"), {XML_LANG: "en"}, error.text))
        if error.application is not None:
            condition += serialize(error.application)
        self._write(f"<stream:error{self.stream_prefix}>{condition}</stream:error>")

    def close(self) -> None:
        """End the stream in our direction, and with it the connection (RFC 6120 §4.4)."""
        if self.state is CLOSED:
            return
        if not self._header_sent:
            self.send_header()
        self._write_footer()
        self.transport.close()
        self.ended()

    def connection_lost(self) -> None:
        """The transport is gone: no word can be said any more."""
        if self.state is not CLOSED:
            self.ended()

    def ended(self) -> None:
        """Clean up; nothing comes in or goes out from here on."""
        self.state = StreamState.CLOSED
        self._deadline.cancel()
        self.parser.close()

    def _too_slow(self) -> None:
        self.fail(StreamError("connection-timeout"))


class SaslProfile:
    """How the messages of mechanisms are written on a stream, and what follows a success: here, as RFC 6120 §6.4 says.

    SASL2 (chapter 22) is the other one.
    """

    def admits(self, tag: str) -> bool:
        """Whether this element may come while an exchange is under way."""
        return True

    def challenge(self, stream: ClientStream, data: bytes) -> None:
        """Pass a challenge on."""
        stream.send_element(E(SASL("challenge"), None, encode_base64(data)))

    def succeed(self, stream: ClientStream, step: Success) -> None:
        """§6.4.6: the client is who it says; both sides open a new stream."""
        data = None if step.data is None else encode_base64(step.data)
        stream.send_element(E(SASL("success"), None, data))
        stream.owner = step.username
        stream.restart(stream.parser.rest())

    def fail(self, stream: ClientStream, error: SASLError) -> None:
        """§6.5: exactly one condition, and perhaps a text."""
        text = E(SASL("text"), {XML_LANG: "en"}, error.text) if error.text else None
        stream.send_element(E(SASL("failure"), None, E(SASL(error.condition)), text))


RFC_6120_SASL = SaslProfile()


class ClientStream(Stream):
    """The stream of a client (RFC 6120 §4 to §7): STARTTLS, SASL, binding, then the session's stanzas."""

    def __init__(self, server: Server, transport: Transport) -> None:
        super().__init__(server, transport)
        server.streams.add(self)
        self.owner: JID | None = None  # the account, once it is authenticated
        self.session: Session | None = None  # once a resource is bound
        self.is_unfinished = False  # ended without a word of the client's (XEP-0198 §7): its session may go on
        self.failed_logins = 0
        self.sasl_has_failed = False  # then XEP-0078 is no way around it
        self.has_registered = False
        self.failed_binds = 0
        self.profile = RFC_6120_SASL  # of the exchange that is under way, or was the last one
        self._mechanism: Mechanism | None = None

    def __str__(self) -> str:
        return f"{self.name} at {self.transport.peer}"

    @property
    def name(self) -> str:
        """Who is at the other end, as far as that is known."""
        return self.session.full if self.session else str(self.owner or "somebody")

    def _make_parser(self) -> StreamParser:
        if getattr(self, "owner", None) is None:  # also asked by the base class, before there is an owner
            return super()._make_parser()
        limits = self.server.config.limits
        return StreamParser(max_stanza=limits.stanza, max_elements=limits.elements)

    @property
    def is_stranger(self) -> bool:
        """Whether nobody has logged in yet."""
        return self.owner is None

    @property
    def account(self) -> JID | None:
        """The account that the stream is logged in to, or logging in to."""
        return self.owner or (self._mechanism.account if self._mechanism else None)

    @property
    def may_log_in(self) -> bool:
        """Whether a login is possible now: inside TLS, or in the owner's lab (RFC 6120 §13.3)."""
        return self.transport.secure or self.transport.lab

    # -- headers and features

    def opened(self, header: Opened) -> None:
        """Answer the header and offer what is possible in this state (RFC 6120 §4.3.2)."""
        if self.owner is not None:
            if self.host != self.owner.domain:
                raise StreamError("not-authorized", "this login was for another domain")
            self.claimed = self.owner  # §6.4.6: whatever the header says, the login counts
        self.send_header()
        self.state = StreamState.AUTHENTICATED if self.owner else StreamState.OPEN
        if self.version:
            self.send_features(self.features())

    def features(self) -> Iterator[Element]:
        """In XEP-0170's order: STARTTLS, SASL, what features offer; before TLS nothing but STARTTLS (§5.3.1)."""
        if not self.transport.secure:
            yield E(TLS("starttls"), None, None if self.transport.lab else E(TLS("required")))
        if not self.may_log_in:
            return
        if self.state is StreamState.OPEN:
            context = self.login_context()
            yield E(SASL("mechanisms"), None, *(E(SASL("mechanism"), None, name) for name in context.offered))
            if context.secure and context.bindings:
                types = (E(SASL_BINDINGS("channel-binding"), {"type": kind}) for kind in context.bindings)
                yield E(SASL_BINDINGS("sasl-channel-binding"), None, *types)  # XEP-0440
        for offer in self.server.registry.offers:
            feature = offer(self)
            if feature is not None:
                yield feature

    # -- first-level elements

    def element(self, element: Element) -> None:
        """Pass a bound session's stanza on; anything else is a step of the negotiation."""
        session = self.session
        if session is not None and isinstance(element, Stanza):
            self.server.receive(session, element)
            if session.management is not None:
                session.management.count()
        elif self._mechanism is not None and not self.profile.admits(element.tag):
            raise StreamError("policy-violation", "a login is under way")
        elif isinstance(element, Stanza):
            self._stanza_before_binding(element)
        else:
            self._negotiate(element)

    def _negotiate(self, element: Element) -> None:
        row = NEGOTIATION.get(element.tag) or self.server.registry.elements.get(element.tag)
        if row is None or row[0] not in (None, self.state):
            logged_in = self.owner is not None
            raise StreamError("unsupported-stanza-type" if logged_in else "not-authorized")  # §4.9.3.24, §4.9.3.12
        row[1](self, element)

    def _stanza_before_binding(self, stanza: Stanza) -> None:
        """Only requests of the place `stream` are heard (bind, iq:auth, register); RFC 6120 §4.3.5, §7.1."""
        if stanza.tag != IQ or not self._is_for_server(stanza) or not self.server.answer_before_binding(self, stanza):
            raise StreamError("not-authorized")

    def _is_for_server(self, stanza: Stanza) -> bool:
        """Whether a stanza is addressed to the server or the client's own account; no `to` means just that."""
        to = stanza.get("to")
        try:
            return not to or JID.parse(to) in (JID("", self.host, ""), self.owner)
        except StanzaError:
            return False

    # -- STARTTLS (RFC 6120 §5)

    def start_tls(self, element: Element) -> None:
        """§5.4.2: proceed, or a failure and the end.

        Plain text that came in behind the request is an attempt to have it read as if it
        had come through TLS: the stream ends (CVE-2011-0411 and its kin).
        """
        if self.transport.secure or self.owner is not None:
            self.send_element(E(TLS("failure")))
            return self.close()
        if self.parser.rest().strip():
            raise StreamError("policy-violation", "data behind <starttls/>")
        self.send_element(E(TLS("proceed")))
        self.paused = True
        self.transport.start_tls(self.host)

    def tls_established(self) -> None:
        """TLS is up: everything said before counts for nothing (§5.4.3.3)."""
        self.paused = False
        self.restart(b"")

    # -- SASL (RFC 6120 §6)

    def login_context(self) -> LoginContext:
        """Gather what the mechanisms need to know of this connection and this server."""
        server, host = self.server, self.host  # the context must not refer to this stream, which has its mechanism
        certificate = self.transport.peer_certificate()
        context = LoginContext(
            host=self.host,
            secure=self.transport.secure,
            bindings=self.transport.channel_bindings(),
            credentials=lambda local: server.credentials(JID(local, host, "")),
            secret=self.server.secret,
            disabled=lambda local: bool((server.account(JID(local, host, "")) or {}).get("disabled")),
            certificate_addresses=peer_addresses(certificate) if certificate else [],
            sender=self.claimed,
        )
        context.offered.extend(mechanisms(context, self.server.config))
        return context

    def authenticate(self, element: Element) -> None:
        """`<auth/>`: begin an exchange."""
        name = element.get("mechanism", "")
        self.begin_exchange(RFC_6120_SASL, element.text, lambda: start_mechanism(name, self.login_context()))

    def begin_exchange(self, profile: SaslProfile, initial: str | None, start: Callable[[], Mechanism]) -> None:
        """Begin an exchange, in base64 or None its first data; one that was under way is forgotten (§6.4.2)."""
        self._mechanism, self.profile = None, profile
        self._login(functools.partial(self._begin_exchange, initial, start))

    def _begin_exchange(self, initial: str | None, start: Callable[[], Mechanism]) -> None:
        if not self.may_log_in:
            raise SASLError("encryption-required")
        self.server.guard.check(self.transport.peer)
        self._mechanism = mechanism = start()
        if initial:
            self._take(mechanism.step(decode_base64(initial)))
        elif mechanism.client_first:
            self._take(Challenge(b""))  # §6.4.2: the client chose to send its first data later
        else:
            self._take(mechanism.step(b""))

    def respond(self, element: Element) -> None:
        """`<response/>`: the next step of the exchange."""
        self._login(functools.partial(self._continue_exchange, element))

    def _continue_exchange(self, element: Element) -> None:
        if self._mechanism is None:
            raise SASLError("malformed-request", "no exchange is under way")
        self._take(self._mechanism.step(decode_base64(element.text or "")))

    def abort(self, element: Element) -> None:
        """`<abort/>`: the client gives this exchange up and may begin another (§6.4.4)."""
        self._mechanism = None
        self.profile.fail(self, SASLError("aborted"))

    def _login(self, step: Callable[[], None]) -> None:
        try:
            step()
        except SASLError as error:
            account = str(self._mechanism.account) if self._mechanism is not None else ""
            self._mechanism = None
            self.sasl_has_failed = True
            self.login_failed(account)
            self._wait(self.server.guard.delay(account), functools.partial(self._refuse_login, error))

    def _refuse_login(self, error: SASLError) -> None:
        self.profile.fail(self, error)
        if error.condition == "encryption-required":
            raise StreamError("policy-violation", "STARTTLS comes first")
        if self.failed_logins >= self.server.config.limits.sasl_failures:
            raise StreamError("policy-violation", "too many failed logins")  # §6.4.5

    def login_failed(self, account: str) -> None:
        """Count a failed attempt, for this stream, the peer's address, and the account that was meant."""
        self.failed_logins += 1
        self.server.guard.count(self.transport.peer, account)

    def _take(self, step: Step) -> None:
        if isinstance(step, Challenge):
            self.profile.challenge(self, step.data)
        elif isinstance(step, Success):
            self._wait(self.server.guard.delay(str(step.username)), functools.partial(self._succeed, step))
        else:
            self.wait_for(step.function, *step.args, then=lambda result: self._login(
                lambda: self._take(step.then(result))))  # fmt: skip

    def wait_for(self, function: Callable[..., Any], *args: Any, then: Callable[[Any], None]) -> None:
        """Run `function(*args)` in a worker, then `then(result)`; the stream stands still meanwhile."""
        session = self.session
        self._stand_still()

        def give_up(error: BaseException) -> None:
            log.error("%s: unexpected error in a worker", self, exc_info=error)
            self._go_on(lambda: self.fail(StreamError("internal-server-error")))

        def finish(result: Any) -> None:
            if session is not None and not session.is_attached and self.server.session(session.jid) is session:
                self.attempt(then, result)  # it waits for another stream, and its request was taken (XEP-0198 §4)
            else:
                self._go_on(lambda: then(result))

        self.server.loop.offload(function, *args, then=finish, failed=give_up)

    def wait_in_slices(self, take: Callable[[], bool]) -> None:
        """Call `take` in each turn of the loop until it returns True; the stream stands still meanwhile."""
        session = self.session
        self._stand_still()

        def again() -> None:
            if session is None or self.server.session(session.jid) is not session:
                return  # it has ended; one that waits for another stream has not (XEP-0198 §4)
            if take():
                self._go_on(lambda: None)
            else:
                self.server.loop.post(again)

        self.server.loop.post(again)

    def _wait(self, seconds: float, step: Callable[[], None]) -> None:
        """Take a step of the protocol later; the stream stands still meanwhile."""
        if not seconds:
            return step()
        self._stand_still()
        self.server.loop.call_later(seconds, lambda: self._go_on(step))

    def _succeed(self, step: Success) -> None:
        profile, self.profile, self._mechanism = self.profile, RFC_6120_SASL, None
        profile.succeed(self, step)

    def authenticated(self, owner: JID) -> None:
        """From here on the stream is `owner`'s: its stanzas may be longer than those of strangers."""
        self.owner = self.claimed = owner
        self.state = StreamState.AUTHENTICATED
        self.parser.max_stanza = self.server.config.limits.stanza
        self.parser.max_elements = self.server.config.limits.elements

    # -- the life of the session

    def peer_failed(self, element: Element) -> None:
        """`<stream:error/>`: the peer ends the stream, and so do we (§4.9.1.1); its names may be RFC 3920's."""
        log.info("%s: ended by the client with %s", self, ", ".join(local_name(child.tag) for child in element))
        self.close()

    def bound(self, session: Session) -> None:
        """A resource is bound: from here on stanzas belong to `session` (RFC 6120 §7)."""
        self.session = session
        self.authenticated(session.bare)
        self.state = StreamState.BOUND
        self._deadline.cancel()
        self._deadline = self.server.loop.call_later(self.server.config.limits.silence_timeout, self._check_silence)

    def _check_silence(self) -> None:
        """RFC 6120 §4.6: ask a client that has been silent for long; one that stays silent is gone."""
        limits = self.server.config.limits
        silent = self.server.loop.now() - self.heard_at
        if silent < limits.silence_timeout:
            self._deadline = self.server.loop.call_later(limits.silence_timeout - silent, self._check_silence)
            return
        asked_at = self.server.loop.now()
        self.ask_for_life()
        self._deadline = self.server.loop.call_later(limits.answer_timeout, lambda: self._check_answer(asked_at))

    def ask_for_life(self) -> None:
        """Have the client say something, whatever it is."""
        assert self.session is not None
        self.server.ping(self.session)

    def _check_answer(self, asked_at: float) -> None:
        if self.heard_at < asked_at:
            self.break_off()
        else:
            self._check_silence()

    def break_off(self) -> None:
        """The client does not answer: to it, this is a connection that broke."""
        self.is_unfinished = True
        self.fail(StreamError("connection-timeout"))  # §4.9.3.4

    def connection_lost(self) -> None:
        """Not the client's wish, so far as we know (XEP-0198 §7)."""
        self.is_unfinished = True
        super().connection_lost()

    def ended(self) -> None:
        """The session ends with its stream, or waits for another one (XEP-0198 §5)."""
        super().ended()
        self.server.streams.discard(self)
        session, self.session = self.session, None
        if session is None:
            return
        if self.is_unfinished and session.management is not None and session.management.may_be_resumed:
            self.server.session_detached(session)
        else:
            self.server.session_ended(session)


NEGOTIATION: Mapping[str, tuple[StreamState | None, Callable[[ClientStream, Element], None]]] = {
    TLS("starttls"): (None, ClientStream.start_tls),  # refused by its own failure when it comes too late (§5.3.4)
    STREAMS("error"): (None, ClientStream.peer_failed),
    SASL("auth"): (StreamState.OPEN, ClientStream.authenticate),
    SASL("response"): (StreamState.OPEN, ClientStream.respond),
    SASL("abort"): (StreamState.OPEN, ClientStream.abort),
}


# ==== 12. Connections ====
#
# Between a stream and the operating system stands a `Connection`: a non-blocking socket
# that may turn to TLS. Four things are its business, and nobody else's:
#
#   output commit   What is written while the journal has unsynced changes waits until those
#                   are on disk: nobody ever hears of what a crash could undo. Each piece
#                   carries the journal's position at the end of its turn (chapter 8).
#   back-pressure   A peer that doesn't read gets a bounded queue, then its connection ends.
#                   A peer that sends too fast is read more slowly; nobody else notices.
#   fairness        One read of at most READ_SIZE per connection and turn; few handshakes
#                   per turn, since each costs as much as thirty messages.
#   the end         Closing tag, close_notify, FIN, and a bounded wait for the peer's own.
#
# Output is collected during a turn and written once at its end: one TLS record instead of
# many. The `Network` owns all connections and listeners; `LoginGuard` slows guessers down.

MAX_HANDSHAKES_PER_TURN = 16  # steps of TLS handshakes: some 10 ms of work, what a chat can wait unnoticed
MAX_ACCEPTS_PER_TURN = 32  # new connections per listener; the kernel's queue keeps the others
MAX_STRANGERS_PER_TURN = 32  # who may be heard before their login; whoever has logged in needn't queue with a crowd
SILENCE = 4.0  # seconds without a word, after which a stream lets go of its parser: waking it takes 10 µs
MAX_DOZING_PER_TURN = 1000  # of these streams; 3 ms of work
CROWD = 500  # connections: when so many have gone, their memory is worth a search
BURST_SECONDS = 10  # of the permitted rate may come at once: a login with a long roster, a photograph


class Carried(Protocol):
    """What a connection gives its bytes to: a stream, or HTTP (chapter 24)."""

    @property
    def is_stranger(self) -> bool:
        """Whether it is nobody's yet: those share a few places in each turn."""

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer."""

    def fail(self, error: StreamError) -> None:
        """End, and say why."""

    def tls_established(self) -> None:
        """TLS is up."""

    def connection_lost(self) -> None:
        """The connection is over."""


class TokenBucket:
    """A rate limit with a burst: `take(n)` tells how many seconds one must wait. Rate 0 means no limit."""

    __slots__ = ("_at", "_level", "_now", "burst", "rate")

    def __init__(self, rate: float, burst: float, now: Callable[[], float]) -> None:
        self.rate = rate
        self.burst = burst
        self._now = now
        self._level = burst
        self._at = now()

    def take(self, amount: float) -> float:
        """Take `amount` tokens, also when there are fewer; return the seconds until the level is back at zero."""
        if not self.rate:
            return 0.0
        now = self._now()
        self._level = min(self.burst, self._level + (now - self._at) * self.rate) - amount
        self._at = now
        return max(0.0, -self._level / self.rate)

    def wait(self) -> float:
        """Return the seconds until one token is there to be taken."""
        if not self.rate:
            return 0.0
        return max(0.0, (1 - self._level) / self.rate - (self._now() - self._at))


class Allowances:
    """So much per minute for each of many: addresses, accounts. Those not heard of for longest are forgotten."""

    MAX_KEYS: ClassVar[int] = 10_000  # each takes some 300 bytes

    def __init__(self, per_minute: float, now: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self._now = now
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def wait(self, key: str) -> float:
        """Return the seconds that `key` has to wait for its next one."""
        bucket = self._buckets.get(key)
        return 0.0 if bucket is None else bucket.wait()

    def take(self, key: str) -> None:
        """Count one for `key`, also when its allowance is used up."""
        if not self.per_minute:
            return
        if key not in self._buckets:
            self._buckets[key] = TokenBucket(self.per_minute / 60, self.per_minute, self._now)
        self._buckets.move_to_end(key)
        self._buckets[key].take(1)
        if len(self._buckets) > self.MAX_KEYS:
            self._buckets.popitem(last=False)


def limited_address(peer: str) -> str:
    """Return what limits per address go by: of IPv6 the network of 64 bits, since nobody gets less (RFC 6177 §2)."""
    if ":" not in peer:
        return peer
    packed = socket.inet_pton(socket.AF_INET6, peer.partition("%")[0])
    return socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8))


class Deflation:
    """zlib in both directions of one stream (XEP-0138 §3, RFC 1950).

    Each write ends with a full flush: it leaves at once, and shares no history with the
    next, so that nobody learns another one's secret by guessing it (threat S24). What
    comes in is inflated in pieces, and a bomb is seen by how much it grows (threat S23).
    """

    PIECE: ClassVar[int] = 64 * 1024  # bytes inflated at once
    MAX_RATIO: ClassVar[int] = 100  # chatty XML shrinks to a tenth, a bomb to a thousandth
    HEAD_START: ClassVar[int] = 64 * 1024  # bytes that may come out before the ratio counts

    def __init__(self) -> None:
        # a window of 4 KB takes 32 KB of memory instead of 256 (zlib's zconf.h), and stanzas are short
        self._deflate = zlib.compressobj(wbits=12, memLevel=5)
        self._inflate = zlib.decompressobj()
        self._came = 0
        self._grown = 0

    def deflate(self, data: bytes) -> bytes:
        """Return `data` compressed, complete in itself."""
        return self._deflate.compress(data) + self._deflate.flush(zlib.Z_FULL_FLUSH)

    def inflate(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` holds, in pieces; raises StreamError for damage, an end, or a bomb."""
        self._came += len(data)
        while data:
            try:
                piece = self._inflate.decompress(data, self.PIECE)
            except zlib.error:
                raise processing_failed() from None
            data = self._inflate.unconsumed_tail
            self._grown += len(piece)
            if self._grown > self.HEAD_START + self.MAX_RATIO * self._came:
                raise StreamError("policy-violation", "compressed too well to be true")
            if piece:
                yield piece
            if self._inflate.eof:
                raise processing_failed()  # what follows would not be compressed any more


def processing_failed() -> StreamError:
    """Return the error for input that cannot be inflated (XEP-0138 §4)."""
    failure = E(COMPRESS("failure"), None, E(COMPRESS("processing-failed")))
    return StreamError("undefined-condition", application=failure)


class LoginGuard:
    """Slows down password guessing: so many failed logins per minute, from one address and for one account.

    An address that has used them up is refused for a while. An account is not, or
    anybody could lock its owner out: answers just come later, the good news like the bad,
    since else a guesser would know by the silence. Only failures count, so a household of
    phones behind one address may all reconnect at once (strict limits on logins are known
    to lock out iOS clients).
    """

    MAX_DELAY: ClassVar[float] = 10.0  # seconds; clients give a login up after 20 to 30

    def __init__(self, per_minute: float, now: Callable[[], float]) -> None:
        self._addresses = Allowances(per_minute, now)
        self._accounts = Allowances(per_minute, now)

    def check(self, peer: str) -> None:
        """Raise `SASLError("temporary-auth-failure")` when `peer` has failed too often of late."""
        if self._addresses.wait(limited_address(peer)):
            raise SASLError("temporary-auth-failure", "too many failed logins from your address: wait a minute")

    def count(self, peer: str, account: str = "") -> None:
        """Count a failed login from `peer`, as `account` if it came that far.

        Who is being refused or delayed already gets no deeper into debt: a client that
        tries again and again with an old password must not shut out its household for hours.
        """
        address = limited_address(peer)
        if not self._addresses.wait(address):
            self._addresses.take(address)
        if account and self.delay(account) < self.MAX_DELAY:
            self._accounts.take(account)

    def delay(self, account: str) -> float:
        """Return by how many seconds the answer to a login as `account` has to be delayed."""
        return min(self.MAX_DELAY, self._accounts.wait(account))


class Connection:
    """One TCP connection, with or without TLS, that carries a stream (a `Transport`, chapter 11)."""

    def __init__(self, network: Network, sock: socket.socket, peer: str, *, lab: bool = False) -> None:
        limits = network.config.limits
        self.network = network
        self.peer = peer
        self.lab = lab
        self.secure = False
        self.compressed = False
        self._deflation: Deflation | None = None
        self.connected_at = time.time()
        self._socket = sock
        self._stream: Carried | None = None
        self._protocol = "xmpp-client"  # what it carries, by the name that ALPN has for it
        self._fresh: list[bytes] = []  # written in this turn
        self._ready: list[bytes] = []  # may go out at the end of this turn
        self._waiting: list[tuple[int, bytes]] = []  # (journal position, bytes): goes out when that is synced
        self._unsent: bytes | memoryview = b""  # what the kernel has not taken yet
        self._size = 0  # bytes in the four above
        self._flush_planned = False
        self._bucket = TokenBucket(limits.bytes_per_second, limits.bytes_per_second * BURST_SECONDS, network.loop.now)
        self._paused = 0  # reasons not to read: the stream waits, or the peer sends too fast
        # What to do when the socket is ready. Not a bound method: a connection that refers to itself outlives its
        # end until a full garbage collection, for which everybody would have to wait.
        self._step: Callable[[Connection], None] = Connection._read
        self._tls_host = ""  # set while TLS is to begin, then the host whose certificate was asked for
        self._closing = False
        self._closed = False
        self._timer: Timer | None = None
        self._after_flush: list[tuple[int, Callable[[], None]]] = []
        self._written = 0  # bytes ever given to `write`, and
        self._sent = 0  # bytes that the kernel took of them
        self._events = selectors.EVENT_READ
        network.loop.register(sock, self._events, self._on_ready)

    def carry(self, stream: Carried) -> None:
        """Give everything that comes in to `stream` from now on."""
        self._stream = stream

    def speak(self, protocol: str) -> None:
        """Carry what speaks `protocol`, named as in ALPN (RFC 7301); what was carried so far has said nothing yet."""
        if self._stream is not None:
            self._stream.connection_lost()
        self._protocol = protocol
        self._stream = self.network.protocols[protocol](self)

    def doze(self, since: float) -> bool:
        """Let the stream doze if it has heard nothing since then, by the loop's clock; tell whether it just did so."""
        stream = self._stream
        return isinstance(stream, Stream) and stream.heard_at < since and stream.parser.doze()

    # -- output

    def write(self, data: bytes) -> None:
        """Queue bytes; they leave at the end of the turn, or when the journal has caught up."""
        if self._closed or self._closing:
            return
        if self._deflation is not None:
            data = self._deflation.deflate(data)
        self._written += len(data)
        self._size += len(data)
        self._fresh.append(data)
        if not self._flush_planned:
            self._flush_planned = True
            self.network.loop.run_last(self.flush)
        if self._size > self.network.config.limits.unread:
            log.info("%s: ended, %d bytes unread", self._stream, self._size)
            self._closing = True  # nothing can be said any more, not even why (threat S11)
            self.network.loop.run_last(self.abort)  # not here: whoever writes may be in the middle of something
            self.network.memory_is_free()

    def write_ahead(self, data: bytes) -> None:
        """Queue bytes that are true already; whole elements only, since they overtake others."""
        if self._closed or self._closing or self._deflation is not None:
            return
        self._written += len(data)
        self._size += len(data)
        self._ready.append(data)
        self.network.loop.run_last(self.flush)

    def compress(self) -> None:
        """Compress from here on, in both directions."""
        self.compressed = True
        self._deflation = Deflation()

    def when_sent(self, callback: Callable[[], None]) -> None:
        """Call `callback` once all that was written so far is in the kernel's hands; never, if that fails."""
        if self._closed or self._closing:
            return  # what was just said was perhaps dropped
        self._after_flush.append((self._written, callback))
        if not self._flush_planned:
            self._flush_planned = True
            self.network.loop.run_last(self.flush)

    def flush(self) -> None:
        """Send what may be sent, as far as the kernel takes it."""
        self._flush_planned = False
        if self._closed:
            return
        self._release()
        if self._step is Connection._handshake:
            return
        try:
            self._send()
        except OSError as error:
            return self._lost(error)
        if self._after_flush:
            self._report_sent()
        if self._unsent or self._closing or self._events & selectors.EVENT_WRITE:
            self._watch()
        if not self._size:
            self._drained()

    def _release(self) -> None:
        """Let go what the journal has caught up with.

        What was written since the last flush gets its position only here, when all handlers are
        done: one of them may have spoken first and changed something then.
        """
        waiting, storage = self._waiting, self.network.storage
        if not waiting and storage.position <= storage.synced:  # nearly always
            self._ready += self._fresh
            self._fresh.clear()
            return
        if self._fresh:
            waiting.append((storage.position, b"".join(self._fresh)))
            self._fresh.clear()
        while waiting and waiting[0][0] <= storage.synced:
            self._ready.append(waiting.pop(0)[1])
        if waiting:
            self.network.waiting.add(self)
        else:
            self.network.waiting.discard(self)

    def _send(self) -> None:
        while self._unsent or self._ready:
            if not self._unsent:
                self._unsent = b"".join(self._ready)
                self._ready.clear()
            try:
                sent = self._socket.send(self._unsent)
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                return
            self._unsent = memoryview(self._unsent)[sent:] if sent < len(self._unsent) else b""
            self._size -= sent
            self._sent += sent

    def _report_sent(self) -> None:
        while self._after_flush and self._after_flush[0][0] <= self._sent:
            self._after_flush.pop(0)[1]()

    def _drained(self) -> None:
        if self._tls_host and not self.secure:
            self._begin_handshake()
        elif self._closing:
            self._say_goodbye()

    # -- input

    def _on_ready(self, events: int) -> None:
        stream = self._stream
        if self._closed or (stream is not None and stream.is_stranger and not self.network.may_hear_stranger()):
            return  # still ready in the next turn
        if events & selectors.EVENT_WRITE and self._step is Connection._read:
            self.flush()
        if not self._closed and (events & selectors.EVENT_READ or self._step is not Connection._read):
            self._step(self)

    def _read(self) -> None:
        try:
            data = self._socket.recv(READ_SIZE)
            if self.secure and len(data) >= READ_SIZE:
                assert isinstance(self._socket, ssl.SSLSocket)
                while self._socket.pending():  # decrypted already: the selector would not tell
                    more = self._socket.recv(READ_SIZE)
                    if not more:
                        break
                    data += more
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError as error:
            return self._lost(error)
        if not data:
            return self._hung_up()
        delay = self._bucket.take(len(data))
        if delay > 0:
            self.pause()
            self.network.loop.call_later(delay, self.resume)
        if self._deflation is not None:
            self._receive_deflated(data, self._deflation)
        elif self._stream is not None and not self._closing:
            self._stream.receive(data)

    def _receive_deflated(self, data: bytes, deflation: Deflation) -> None:
        try:
            for piece in deflation.inflate(data):
                if self._stream is None or self._closing:
                    return
                self._stream.receive(piece)
        except StreamError as error:
            if self._stream is not None:
                self._stream.fail(error)

    def pause(self) -> None:
        """Read no more; every `pause` needs its own `resume`."""
        self._paused += 1
        self._watch()

    def resume(self) -> None:
        """Undo one `pause`."""
        self._paused -= 1
        self._watch()

    def _watch(self) -> None:
        if self._closed or self._step is Connection._handshake:
            return
        events = 0 if self._paused and not self._closing else selectors.EVENT_READ
        if self._unsent:
            events |= selectors.EVENT_WRITE
        self._wait_for(events)

    def _wait_for(self, events: int) -> None:
        if events == self._events:
            return
        loop, old, self._events = self.network.loop, self._events, events
        if not events:
            loop.unregister(self._socket)
        elif not old:
            loop.register(self._socket, events, self._on_ready)
        else:
            loop.modify(self._socket, events, self._on_ready)

    # -- TLS

    def start_tls(self, host: str) -> None:
        """Begin TLS with the certificate of `host` once everything written is out."""
        self._tls_host = host
        self.pause()  # what comes now is no text any more
        if not self._size:
            self._begin_handshake()

    def start_direct_tls(self) -> None:
        """Begin TLS at once, as XEP-0368 has it; which host is meant comes with the client's SNI."""
        self._begin_handshake()

    def _begin_handshake(self) -> None:
        self._wait_for(0)
        context = self.network.certificates.context(self._tls_host, self._protocol)
        try:
            self._socket = context.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
        except OSError as error:  # the peer has gone meanwhile
            return self._lost(error)
        self._step = Connection._handshake
        self._events = selectors.EVENT_READ
        self.network.loop.register(self._socket, self._events, self._on_ready)

    def _handshake(self) -> None:
        assert isinstance(self._socket, ssl.SSLSocket)
        if not self.network.may_shake_hands():
            return  # still readable in the next turn
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            return self._wait_for(selectors.EVENT_READ)
        except ssl.SSLWantWriteError:
            return self._wait_for(selectors.EVENT_WRITE)
        except OSError as error:
            return self._lost(error)  # no closing tag may follow a failed handshake (RFC 6120 §5.4.3.2)
        self.secure = True
        self._step = Connection._read
        if self._tls_host:
            self._paused -= 1  # by `start_tls`
        else:
            self._choose_protocol(self._socket.selected_alpn_protocol() or "")
        self._watch()
        assert self._stream is not None
        self._stream.tls_established()
        if self._socket.pending():
            self._read()

    def _choose_protocol(self, wanted: str) -> None:
        """XMPP and HTTPS may share a port: the client's ALPN says which is meant (XEP-0368 §3, RFC 7301)."""
        if wanted != self._protocol and wanted in self.network.protocols:
            self.speak(wanted)

    def channel_bindings(self) -> dict[str, bytes]:
        """Return what SCRAM-PLUS may bind to on this connection."""
        if not isinstance(self._socket, ssl.SSLSocket) or not self.secure:
            return {}
        return channel_bindings(self._socket)

    def peer_certificate(self) -> bytes | None:
        """Return the verified client certificate as DER."""
        if not isinstance(self._socket, ssl.SSLSocket) or not self.secure:
            return None
        return self._socket.getpeercert(binary_form=True)

    # -- the end

    def close(self) -> None:
        """Send what is written, then end the connection politely; at once if TLS is just being negotiated."""
        if self._closed or self._closing:
            return
        self._closing = True
        if self._step is Connection._handshake or (self._tls_host and not self.secure):
            return self.network.loop.run_last(self.abort)  # no closing tag could be read (RFC 6120 §5.4.3.2)
        self._timer = self.network.loop.call_later(CLOSE_TIMEOUT, self.abort)
        if not self._flush_planned:
            self._flush_planned = True
            self.network.loop.run_last(self.flush)

    def _say_goodbye(self) -> None:
        """close_notify, FIN, and then wait for the peer to do the same; what it still says is not heard.

        But it is read: else the kernel would answer it with a reset, which may overtake our
        last words.
        """
        self._step = Connection._await_goodbye
        self._wait_for(selectors.EVENT_READ)
        self._notify_of_close()
        try:
            # not SSLSocket.shutdown, which would forget TLS and with it the peer's close_notify
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
        except OSError as error:
            self._lost(error)

    def _notify_of_close(self) -> None:
        """Send TLS's own goodbye; the peer's is not waited for here."""
        if isinstance(self._socket, ssl.SSLSocket):
            try:
                self._socket.unwrap()
            except (OSError, ValueError):  # there is none yet, or never will be
                pass

    def _await_goodbye(self) -> None:
        try:
            # the bytes as they are: OpenSSL would stumble over data between our close_notify and the peer's
            if not socket.socket.recv(self._socket, READ_SIZE):
                self._lost(None)
        except BlockingIOError:
            return
        except OSError:
            self._lost(None)

    def _hung_up(self) -> None:
        """The peer has ended the connection, by close_notify or FIN, without closing its stream."""
        self._notify_of_close()
        self._lost(None)

    def abort(self) -> None:
        """End the connection at once."""
        self._lost(None)

    def _lost(self, error: OSError | None) -> None:
        """The connection is over, for whatever reason."""
        if self._closed:
            return
        self._closed = True
        if error is not None:
            log.debug("%s: connection lost: %s", self._stream or self.peer, error)
        if self._timer is not None:
            self._timer.cancel()
        self._wait_for(0)
        self._after_flush.clear()
        self.network.loop.run_last(self._socket.close)
        self.network.forget(self)
        if self._stream is not None:
            self._stream.connection_lost()
            self._stream = None


class Listener:
    """A listening socket; `accepted(connection)` puts a stream on each new connection."""

    def __init__(self, network: Network, address: Address, accepted: Callable[[Connection], None], *,
                 lab: bool = False) -> None:  # fmt: skip
        self.network = network
        self.accepted = accepted
        self.lab = lab
        self._socket = socket.socket(address.family, socket.SOCK_STREAM)
        try:
            # on Windows SO_REUSEADDR would let any other program listen on our port beside us, and get our clients
            alone = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
            self._socket.setsockopt(socket.SOL_SOCKET, alone, 1)
            if address.family == socket.AF_INET6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a listener of its own
            self._socket.bind((address.host, address.port))
            self._socket.listen(1024)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        network.loop.register(self._socket, selectors.EVENT_READ, self._accept)

    @property
    def port(self) -> int:
        """The port that is listened on, also when the configuration left the choice to the system (0)."""
        port: int = self._socket.getsockname()[1]
        return port

    def _accept(self, events: int) -> None:
        for _ in range(MAX_ACCEPTS_PER_TURN):
            try:
                sock, address = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors, or the peer has gone already
                log.warning("cannot accept a connection: %s", error)
                return self._rest()
            self.network.admit(self, sock, address[0])

    def _rest(self) -> None:
        """Without free descriptors `accept` would fail in every turn: try again in a second."""
        self.network.loop.unregister(self._socket)
        self.network.loop.call_later(1.0, self._wake)

    def _wake(self) -> None:
        if self._socket.fileno() >= 0:
            self.network.loop.register(self._socket, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Listen no more."""
        try:
            self.network.loop.unregister(self._socket)
        except KeyError:
            pass  # it is resting
        self.network.loop.run_last(self._socket.close)


class Network:
    """All connections and listeners, and what they share: limits per address, the wait for the journal."""

    def __init__(self, config: Config, loop: Loop, storage: Storage, certificates: Certificates) -> None:
        self.config = config
        self.loop = loop
        self.storage = storage
        self.certificates = certificates
        self.connections: set[Connection] = set()
        self.listeners: dict[tuple[str, Address], Listener] = {}  # by purpose and configured address
        self.waiting: set[Connection] = set()  # those whose output waits for the journal
        self.protocols: Mapping[str, Callable[[Connection], Carried]] = {}  # see `Server.protocols`
        self._per_address: Counter[str] = Counter()
        self._attempts = Allowances(config.limits.connections_per_minute, loop.now)
        self._handshakes = 0
        self._strangers = 0
        self._crowd = 0  # the most connections since memory was last given back
        self._giving_back: Timer | None = None
        self._sweeping: Timer | None = None
        self._when_idle: Callable[[], None] | None = None
        storage.when_synced = self._synced
        loop.at_turn_end.append(self._turn_ended)

    def listen(self, purpose: str, address: Address, accepted: Callable[[Connection], None], *,
               lab: bool = False) -> None:  # fmt: skip
        """Open a listener; raises `ConfigError` when the address can't be had."""
        try:
            self.listeners[purpose, address] = Listener(self, address, accepted, lab=lab)
        except OSError as error:
            raise ConfigError(f"cannot listen on {address}: {error.strerror}; {_listen_remedy(error)}") from None

    def reconfigure(self, config: Config) -> None:
        """Work with other limits from now on; connections that exist keep their rate."""
        self.config = config
        self._attempts = Allowances(config.limits.connections_per_minute, self.loop.now)

    def admit(self, listener: Listener, sock: socket.socket, peer: str) -> None:
        """Take a new connection, unless its address has too many already, or makes too many (RFC 6120 §13.12)."""
        address, limits = limited_address(peer), self.config.limits
        if limits.connections_per_address and self._per_address[address] >= limits.connections_per_address:
            log.info("refused a connection from %s: it has %d already", peer, limits.connections_per_address)
            return sock.close()
        if self._attempts.wait(address):
            log.info("refused a connection from %s: more than %d per minute", peer, limits.connections_per_minute)
            return sock.close()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # we write once per turn: nothing to wait for
        except OSError:  # macOS says so when the peer has gone already
            return sock.close()
        self._attempts.take(address)
        self._per_address[address] += 1
        log.debug("a connection from %s", peer)
        connection = Connection(self, sock, peer, lab=listener.lab)
        self.connections.add(connection)
        self._sweeping = self._sweeping or self.loop.call_later(SILENCE, self._sweep)
        self._crowd = max(self._crowd, len(self.connections))
        listener.accepted(connection)

    def forget(self, connection: Connection) -> None:
        """A connection is over."""
        self.connections.discard(connection)
        self.waiting.discard(connection)
        address = limited_address(connection.peer)
        self._per_address[address] -= 1
        if self._per_address[address] <= 0:
            del self._per_address[address]
        if self._crowd >= CROWD and len(self.connections) < self._crowd // 4:
            self._crowd = 0
            self.memory_is_free()
        if self._when_idle is not None:
            self.loop.post(self._when_idle)

    def _sweep(self) -> None:
        """Let silent streams doze. Round after round, as one timer each would cost every stanza something."""
        since, dozing = self.loop.now() - SILENCE, 0
        for connection in self.connections:
            dozing += connection.doze(since)
            if dozing >= MAX_DOZING_PER_TURN:
                break  # the others in the next round
        self._sweeping = self.loop.call_later(SILENCE, self._sweep) if self.connections else None

    def memory_is_free(self) -> None:
        """Much memory is about to be free: have it given back soon, when the timers of the dead are over, too."""
        if self._giving_back is not None:
            self._giving_back.cancel()
        self._giving_back = self.loop.call_later(2 * CLOSE_TIMEOUT, self._give_back)

    def _give_back(self) -> None:
        self._crowd = len(self.connections)
        give_memory_back()

    def may_hear_stranger(self) -> bool:
        """Tell whether one more connection without a login fits into this turn."""
        self._strangers += 1
        return self._strangers <= MAX_STRANGERS_PER_TURN

    def may_shake_hands(self) -> bool:
        """Tell whether one more step of a TLS handshake fits into this turn."""
        self._handshakes += 1
        return self._handshakes <= MAX_HANDSHAKES_PER_TURN

    def _turn_ended(self) -> None:
        self._handshakes = self._strangers = 0

    def _synced(self) -> None:
        failed = self.storage.failed_for_good
        for connection in list(self.connections if failed else self.waiting):
            connection.flush()
            if failed and connection in self.waiting:
                connection.abort()  # its answer would tell of what the disk didn't take

    def close_listeners(self, unwanted: Callable[[tuple[str, Address]], bool] = lambda key: True) -> None:
        """Accept nobody any more on the listeners whose (purpose, address) is `unwanted`."""
        for key in [key for key in self.listeners if unwanted(key)]:
            self.listeners.pop(key).close()

    def when_idle(self, done: Callable[[], None], timeout: float) -> None:
        """Call `done` once all connections are closed, or after `timeout` seconds, which ends those that are left."""
        finished = False

        def check() -> None:
            nonlocal finished
            if not finished and not self.connections:
                finished = True
                timer.cancel()
                done()

        def give_up() -> None:
            for connection in list(self.connections):
                connection.abort()
            check()

        timer = self.loop.call_later(timeout, give_up)
        self._when_idle = check
        self.loop.post(check)


def give_memory_back() -> None:
    """Return to the system what is free; else both Python and the C library would keep it (threat S10).

    A full collection empties Python's own lists of free objects, `malloc_trim` those of
    glibc [measured: of 72 MB for 18,000 connections, all but 8 MB come back, not none].
    """
    import ctypes
    import gc

    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none, and keeps nothing back
        if trim is not None:
            trim(0)


def _listen_remedy(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program has it: stop that one, or choose another port in [listen]"
    if error.errno == errno.EACCES:
        return "ports below 1024 need special rights: choose a higher one in [listen]"
    return "see [listen] in the configuration"


# ==== 13. The contract of a feature ====
#
# Nearly everything an XMPP server does is an extension: a few requests that it answers, a
# few moments at which it wants to be asked. Each is one class derived from `Feature`:
#
#     class Ping(Feature):
#         """XMPP Ping (XEP-0199): …"""
#         namespace = PING
#
#         @iq("get", PING("ping"), to="self server")
#         def ping(self, request: Iq) -> None: …
#
# A marked method is a *handler*: the key says which requests reach it, so a missing key
# *is* service-unavailable and service discovery can be derived from the keys. A method
# with one of the names in `EVENTS` is a *filter* or an *event*; one that nobody overrides
# costs nothing. The `Registry` collects both once, at start, and refuses two handlers for
# one key. There are no other ways in: no string bus, no priorities.
#
# A handler returns the payload of the result (None: an empty result), raises
# `StanzaError`, or returns `Later` when a worker has to be asked first. What takes long in
# Python (looking through an archive) is a generator: it yields when SLICE_SECONDS of a
# turn are used up, goes on in the next, and returns the payload at its end.

Payload = Element | str | None  # a str is an element already written, for what is asked often
FeatureType = TypeVar("FeatureType", bound="Feature")


@dataclass(slots=True)
class Iq:
    """A request that reached its handler (RFC 6120 §8.2.3); it will be answered exactly once.

    `owner` is the account that the request is about: the asker's own for the place `self`,
    the addressee for `account`. `session` is None when the asker isn't a client of this
    server, `stream` is set at the place `stream` only.
    """

    stanza: Stanza
    payload: Element
    server: Server
    sender: JID
    owner: JID
    session: Session | None = None
    stream: ClientStream | None = None
    later: list[Callable[[], None]] = field(default_factory=list)

    @property
    def from_session(self) -> Session:
        """The asker's session; only for handlers whose `who` admits nobody but the owner."""
        assert self.session is not None
        return self.session

    @property
    def from_stream(self) -> ClientStream:
        """The asker's stream; only for handlers at the place `stream`."""
        assert self.stream is not None
        return self.stream

    def afterwards(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the answer is on its way; not at all if the answer is an error."""
        self.later.append(callback)


@dataclass(slots=True, frozen=True)
class Later:
    """"Ask a worker first": `function(*args)` runs there; `then(result)` gives the payload or raises `StanzaError`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    then: Callable[[Any], Payload]


Slices = Generator[None, None, Payload]
Answer = Element | str | Later | Slices | None
IqHandler = Callable[[Any, Iq], Answer]
PresenceHandler = Callable[[Any, "Session", Stanza], None]
SubscriptionHandler = Callable[[Any, JID, Stanza], None]
ElementHandler = Callable[[Any, "ClientStream", Element], None]
InlineHandler = TypeVar("InlineHandler", bound=Callable[..., Element | None])  # of (session, request)
Filter = TypeVar("Filter", bound=Callable[..., Any])

PLACES = ("stream", "self", "account", "server", "rooms", "room")
ASKERS = {
    "stream": "anybody",  # there is no account yet
    "self": "owner",
    "account": "local remote",
    "rooms": "local remote",  # the rooms' domain itself
    "room": "local remote",
    "server": "local",  # so that no other server reaches registration or commands by accident
}


class IqKey(NamedTuple):
    """What a request must look like to reach a handler; `inner` is the tag or `node=…` below the payload, or ""."""

    type: str
    payload: str
    place: str
    inner: str


@dataclass(slots=True, frozen=True)
class Mark:
    """What a decorator notes on a method: what kind of handler it is, for which keys, who may ask."""

    kind: str  # the name of the decorator
    keys: tuple[Any, ...]
    who: str = ""


def _mark(function: Callable[..., Any], mark: Mark) -> None:
    vars(function).setdefault("marks", []).append(mark)


def iq(type: str, payload: str, inner: str = "", *, to: str, who: str = "") -> Callable[[IqHandler], IqHandler]:
    """Mark the handler of an IQ: its type (`"get set"` for both), its payload's tag, and the places it is sent to.

    Places (`to`): `stream` (before a resource is bound), `self` (one's own bare JID or no
    `to`), `account` (somebody else's bare JID), `server` (the domain). `who` may ask:
    `owner`, `local`, `remote`, `admin`; the default depends on the place (`ASKERS`). Where
    the payload is only a wrapper, `inner` is the tag of its child, or `"node=NAME"`.
    """

    def decorate(function: IqHandler) -> IqHandler:
        keys = tuple(IqKey(kind, payload, place, inner) for kind in type.split() for place in to.split())
        _mark(function, Mark("iq", keys, who))
        return function

    return decorate


def presence(types: str) -> Callable[[PresenceHandler], PresenceHandler]:
    """Mark the handler of what a local user's session sends: presence of these types.

    `"available"` stands for no type, `"unavailable"` for that; both without `to`. With
    `to` they are `"directed"`. The others are the types of RFC 6121 §4.7.1.
    """

    def decorate(function: PresenceHandler) -> PresenceHandler:
        _mark(function, Mark("presence", tuple(types.split())))
        return function

    return decorate


def subscription(types: str) -> Callable[[SubscriptionHandler], SubscriptionHandler]:
    """Mark the handler of what arrives for an account: probes and the types of RFC 6121 §3, as `(to, stanza)`."""

    def decorate(function: SubscriptionHandler) -> SubscriptionHandler:
        _mark(function, Mark("subscription", tuple(types.split())))
        return function

    return decorate


def element(tag: str, *, state: str = "") -> Callable[[ElementHandler], ElementHandler]:
    """Mark the handler of another first-level element, in the given state of the stream (`StreamState`), or in any."""

    def decorate(function: ElementHandler) -> ElementHandler:
        _mark(function, Mark("element", ((tag, StreamState(state) if state else None),)))
        return function

    return decorate


def inline(tag: str) -> Callable[[InlineHandler], InlineHandler]:
    """Mark the handler of what a client may ask for while it binds by Bind 2 (XEP-0386 §3.2).

    It gets the new session and the request, and returns its answer for `<bound/>`, if any;
    nothing may be sent to the session before that. The tag's namespace is advertised.
    """

    def decorate(function: InlineHandler) -> InlineHandler:
        _mark(function, Mark("inline", (tag,)))
        return function

    return decorate


def only(tag: str) -> Callable[[Filter], Filter]:
    """Mark a filter that has nothing to say about stanzas of another kind: it is not asked then.

    [Measured: a filter that only looks at the tag costs each stanza 0.15 µs, and there are many.]
    """

    def decorate(function: Filter) -> Filter:
        vars(function)["concerns"] = (tag,)
        return function

    return decorate


class Feature:
    """One extension of the server. Override what you need; what stays as it is here is never called.

    A filter returns the stanza to go on with, or None when it ends here. Filters and
    events run in the order of `FEATURES` (chapter 27); those of an ending in reverse.
    """

    namespace: ClassVar[str] = ""
    server_features: ClassVar[tuple[str, ...]] = ()  # told by disco#info of the domain, beyond the handlers' own
    account_features: ClassVar[tuple[str, ...]] = ()  # likewise of one's account

    def __init__(self, server: Server) -> None:
        self.server = server

    @classmethod
    def is_wanted(cls, config: Config) -> bool:
        """Whether the configuration wants this extension; asked when the server starts."""
        return True

    def offer(self, stream: ClientStream) -> Element | None:
        """Return the stream feature to advertise in this state of the stream (RFC 6120 §4.3.2), if any."""

    def sending(self, session: Session, stanza: Stanza) -> Stanza | None:
        """Filter: `session` hands a stanza in."""
        return stanza

    def arriving(self, owner: JID, stanza: Stanza) -> Stanza | None:
        """Filter: a stanza reaches the account `owner`, before its resources are chosen."""
        return stanza

    def delivering(self, session: Session, stanza: Stanza) -> Stanza | None:
        """Filter: a stanza is about to be sent to `session`."""
        return stanza

    def hides(self, owner: JID, contact: JID, session: Session | None, kind: str) -> bool:
        """Filter: must the presence of `owner`'s session, or of the whole account (None), be hidden from `contact`?

        Asked about contacts who might see it otherwise, through `Server.hides`. `kind` is
        `presence-out` for presence and what is like it (PEP), "" for other stanzas that
        the server makes in the session's name.
        """
        return False

    def undelivered(self, owner: JID, stanza: Stanza) -> Stanza | None:
        """Filter: nobody took the message; whoever keeps it returns None, else it bounces."""
        return stanza

    def refused(self, session: Session, error: Stanza) -> None:
        """Event: a stanza of the session's was answered by this server with an error."""

    def session_bound(self, session: Session) -> None:
        """Event: a resource is bound."""

    def session_detached(self, session: Session) -> None:
        """Event: the session's stream broke; it stays, and may be resumed on another one (XEP-0198)."""

    def session_stalled(self, session: Session) -> None:
        """Event: the client does not answer, but its stream has not broken yet (XEP-0198)."""

    def session_resumed(self, session: Session) -> None:
        """Event: a detached session has a stream again, and what was sent meanwhile is on its way."""

    def acknowledged(self, session: Session, archived: str) -> None:
        """Event: the client has all messages up to the one with this `stanza-id` of its account's (XEP-0359)."""

    def session_ended(self, session: Session) -> None:
        """Event: a resource is gone, politely or not."""

    def presence_changed(self, session: Session, old: Stanza | None, new: Stanza | None) -> None:
        """Event: the session's own presence was broadcast; None means unavailable."""

    def roster_changing(self, owner: JID, contact: JID) -> None:
        """Event: the item of `contact` in `owner`'s roster is about to change."""

    def roster_changed(self, owner: JID, contact: JID) -> None:
        """Event: the item of `contact` in `owner`'s roster changed or went."""

    def wants_changed(self, receiver: Receiver, new: frozenset[str]) -> None:
        """Event: it is known of which pubsub nodes a client wants to hear; `new` are those that were added."""

    def published(self, owner: JID, node: str, item: PublishedItem) -> None:
        """Event: `owner` has published an item."""

    def retracted(self, owner: JID, node: str, ids: Sequence[str]) -> None:
        """Event: items of `owner`'s were removed."""

    def vcard_changed(self, owner: JID) -> None:
        """Event: `owner` has set its vCard."""

    def private_stored(self, owner: JID, tag: str) -> None:
        """Event: `owner` has stored private XML (XEP-0049) under this name."""

    def account_created(self, owner: JID) -> None:
        """Event: there is a new account."""

    def account_removed(self, owner: JID) -> None:
        """Event: the account is about to go; its documents are still there, and go by themselves afterwards."""

    def credentials_changed(self, owner: JID) -> None:
        """Event: the account has a new password."""

    def listening(self, opened: Sequence[tuple[str, Address]]) -> None:
        """Event: the listeners are open, each with its purpose and real port; again after each reload."""

    def shutting_down(self) -> None:
        """Event: the server is about to end all streams."""

    def reloaded(self) -> None:
        """Event: the configuration has changed."""

    def disco_info(self, request: Iq, info: Element) -> None:
        """Event: add to a disco#info answer what can't be derived: identities, forms."""

    def disco_items(self, request: Iq, items: Element) -> None:
        """Event: add to a disco#items answer; also to one for strangers, who may not know of the account's presence."""

    def disco_node(self, request: Iq, node: str) -> Element | None:
        """Event: answer disco#info or disco#items about a node of the server or an account; None: it is not mine.

        Raises StanzaError for a node that the asker may not know.
        """
        return None


EVENTS = tuple(name for name, value in vars(Feature).items() if callable(value) and not name.startswith("_"))


class Handler(NamedTuple):
    """A bound IQ handler and who may ask it."""

    function: Callable[[Iq], Answer]
    who: frozenset[str]
    feature: Feature

    @property
    def rule(self) -> str:
        """What it obeys, for the trace: the extension's title, and the first line of its own docstring."""
        title = (self.feature.__doc__ or "").partition(":")[0]
        first, *_more = (self.function.__doc__ or "").strip().splitlines() or [""]
        return f"{title}: {first}"


class Registry:
    """All features of a server, and who of them answers to what."""

    def __init__(self, features: Iterable[type[Feature]], server: Server) -> None:
        self.features = [feature(server) for feature in features if feature.is_wanted(server.config)]
        self.iqs: dict[tuple[str, str, str, str], Handler] = {}  # by `IqKey`, or any tuple that is equal to it
        self.wrappers: set[tuple[str, str]] = set()  # (payload, place) whose key goes one level deeper
        self.presences: dict[str, Callable[[Session, Stanza], None]] = {}
        self.subscriptions: dict[str, Callable[[JID, Stanza], None]] = {}
        self.elements: dict[str, tuple[StreamState | None, Callable[[ClientStream, Element], None]]] = {}
        self.inlines: dict[str, Callable[[Session, Element], Element | None]] = {}
        for feature in self.features:
            for name in dir(type(feature)):
                for mark in getattr(getattr(type(feature), name), "marks", ()):
                    self._register(feature, getattr(feature, name), mark)
        self.offers: list[Callable[[ClientStream], Element | None]] = self.listeners("offer")
        self.sending: Mapping[str, list[Callable[[Session, Stanza], Stanza | None]]] = self.filters("sending")
        self.arriving: Mapping[str, list[Callable[[JID, Stanza], Stanza | None]]] = self.filters("arriving")
        self.delivering: Mapping[str, list[Callable[[Session, Stanza], Stanza | None]]] = self.filters("delivering")
        self.hides: list[Callable[[JID, JID, Session | None, str], bool]] = self.listeners("hides")
        self.undelivered: list[Callable[[JID, Stanza], Stanza | None]] = self.listeners("undelivered")

    def _register(self, feature: Feature, method: Callable[..., Any], mark: Mark) -> None:
        for key in mark.keys:
            if mark.kind == "iq":
                assert key not in self.iqs and key.place in PLACES, f"two handlers for {key}"
                self.iqs[key] = Handler(method, frozenset((mark.who or ASKERS[key.place]).split()), feature)
                if key.inner:
                    self.wrappers.add((key.payload, key.place))
            elif mark.kind == "presence":
                assert key not in self.presences, f"two handlers for presence {key}"
                self.presences[key] = method
            elif mark.kind == "subscription":
                assert key not in self.subscriptions, f"two handlers for arriving presence {key}"
                self.subscriptions[key] = method
            elif mark.kind == "inline":
                assert key not in self.inlines, f"two handlers for {key} in Bind 2"
                self.inlines[key] = method
            else:
                tag, state = key
                assert tag not in self.elements, f"two handlers for {tag}"
                self.elements[tag] = (state, method)

    def listeners(self, event: str) -> list[Any]:
        """Return the bound methods of the features that override `event`, in order."""
        assert event in EVENTS, event
        return [getattr(feature, event) for feature in self.features
                if getattr(type(feature), event) is not getattr(Feature, event)]  # fmt: skip

    def filters(self, event: str) -> Mapping[str, list[Any]]:
        """Return the `listeners` to a filter by the tag of the stanza; see `only`."""
        return {tag: [each for each in self.listeners(event) if tag in getattr(each, "concerns", STANZA_TAGS)]
                for tag in STANZA_TAGS}  # fmt: skip

    def find(self, type: str, payload: Element, place: str) -> Handler | None:
        """Return the handler of a request, or None: service-unavailable."""
        tag = payload.tag
        if (tag, place) in self.wrappers:
            for inner in self._inner_keys(payload):
                handler = self.iqs.get((type, tag, place, inner))
                if handler is not None:
                    return handler
        return self.iqs.get((type, tag, place, ""))

    @staticmethod
    def _inner_keys(payload: Element) -> Iterator[str]:
        node = payload.get("node")
        if node is not None:
            yield f"node={node}"
        for child in payload:
            yield child.tag

    def feature(self, kind: type[FeatureType]) -> FeatureType:
        """Return the one feature of this class; for the few that need another one's help."""
        for feature in self.features:
            if isinstance(feature, kind):
                return feature
        raise LookupError(kind.__name__)


# ==== 14. Sessions and routing (RFC 6120 §8, §10; RFC 6121 §8) ====
#
# Who is there, and where does a stanza go? A `Session` is one client that has bound a
# resource: romeo@example.org/orchard. An account may have several, and messages to the
# bare JID romeo@example.org find the one that is most available.
#
#     Server.receive   a local client hands a stanza in: check it, stamp `from`, filter it
#     Server.route     find the domain of `to`; the domain takes it from there
#     Host.receive     a served domain: requests are answered, accounts get what is theirs
#     FATES            RFC 6121 §8 as one table: kind of stanza × situation of the address
#     Server.answer    the one place where requests meet handlers, and where errors become
#                      error stanzas (RFC 6120 §8.3)
#
# What strangers may learn is decided here too: an address that doesn't exist, one that is
# away and one that won't talk to you must look the same (RFC 6120 §13.10.2).


NOTHING: frozenset[str] = frozenset()  # one for all: each call makes another, of 216 bytes


class Session:
    """A client with a bound resource (RFC 6120 §7), from binding until its stream ends.

    With stream management (XEP-0198) it may outlive its stream and wait for another one:
    then `is_attached` is false, and what is sent to it waits, too.
    """

    def __init__(self, server: Server, stream: ClientStream, jid: JID) -> None:
        self.server = server
        self.stream = stream  # the last one that it had
        self.jid = jid
        self.full = str(jid)
        self.bare = jid.bare
        self.connected_at = time.time()
        self.client_id = ""  # which installation of a client it is (XEP-0388 §2.3); never told to anybody
        self.presence: Stanza | None = None  # the last one broadcast; None while unavailable
        self.priority = 0
        self.ranked: tuple[float, int] = (0.0, -129)  # since when it is available with which priority; kept at its end
        self.interested: set[str] = set()  # namespaces whose pushes it has asked for: the roster's, and others
        self.caps: tuple[str, str, str] | None = None  # hash, ver and node of its capabilities (XEP-0115), once known
        self.caps_asked = False  # it has been asked what it wants, or need not be
        self.wants = NOTHING  # pubsub nodes it wants to be notified of
        self.directed: dict[str, None] = {}  # who got directed presence (RFC 6121 §4.6), in order
        self.carbons_since = 0.0  # Unix time since when it gets copies of messages (XEP-0280), 0 while it doesn't
        self.copied: deque[str] | None = None  # ids of its last messages that the account's other sessions got, too
        self.active_list = ""  # the name of its active privacy list (XEP-0016 §2.4)
        self.rules: Rules | None = None  # the privacy list that counts for it, active or default (chapter 19)
        self.sending = server.registry.sending  # its filters: everybody's, and where there are rules, theirs in front
        self.delivering = server.registry.delivering
        self.management: SessionManagement | None = None  # once it has enabled stream management (chapter 22)
        self.idle: IdleQueue | None = None  # while nobody looks at the client (XEP-0352), or it is not there
        self.transmit: Callable[[Stanza], None] = stream.send  # where stanzas go to behind the filters
        self.pushes: frozenset[str] = frozenset()  # the keys of the push registrations that this client has made
        self.recipients: set[JID] = set()  # whom it has written to in this minute, as bare JIDs
        self.recipients_until = 0.0  # when that minute ends, by the loop's clock

    def send(self, stanza: Stanza) -> None:
        """Send a stanza to the client, unless a filter has another idea."""
        for delivering in self.delivering[stanza.tag]:
            filtered = delivering(self, stanza)
            if filtered is None:
                return
            stanza = filtered
        self.transmit(stanza)

    @property
    def is_attached(self) -> bool:
        """Whether it has a stream at present."""
        return self.stream.session is self

    @property
    def outlet(self) -> Callable[[Stanza], None]:
        """Where stanzas go in the end: to the stream, or to stream management."""
        return self.stream.send if self.management is None else self.management.transmit

    def when_delivered(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the client has what was sent so far, as far as that can be known.

        That is when it has acknowledged it (XEP-0198), or else when it is out of our hands.
        Stanzas whose acknowledgement the end of the session prevents find another way, so
        then `callback` is called, too, and right before.
        """
        if self.management is not None:
            self.management.when_acknowledged(callback)
        else:
            self.stream.transport.when_sent(callback)

    def push(self, payload: Element) -> None:
        """Send a set of the server's own (RFC 6121 §2.1.6); the answer tells nothing."""
        push = Stanza(IQ, {"type": "set", "id": secrets.token_urlsafe(9), "to": self.full})
        push.add(payload)
        self.send(push)


def best_of(sessions: Iterable[Session]) -> Sequence[Session]:
    """Return the available ones with the highest priority, if that isn't negative (RFC 6121 §8.5.2.1.1)."""
    willing = [session for session in sessions if session.presence is not None and session.priority >= 0]
    best = max((session.priority for session in willing), default=0)
    return [session for session in willing if session.priority == best]


def has_directed(session: Session | None, other: JID) -> bool:
    """Whether the session has sent directed presence to `other`'s account or any resource of it (RFC 6121 §4.6).

    So the people in a chat room may ask who has entered it, by the nickname of each.
    """
    bare = str(other.bare)
    return session is not None and any(sent == bare or sent.startswith(f"{bare}/") for sent in session.directed)


class Domain(Protocol):
    """Everything that can be addressed by a domain: a served host; later rooms, components, other servers."""

    def receive(self, stanza: Stanza, to: JID) -> None:
        """Take a stanza for an address of this domain; raises StanzaError to have it refused."""


# -- RFC 6121 §8: what becomes of a stanza for an account


class Case(Enum):
    """The situation of the address (RFC 6121 §8.5.1 to §8.5.3)."""

    NOBODY = "bare JID, there is no such account"
    BARE = "bare JID, somebody available"
    BARE_AWAY = "bare JID, nobody available (for messages: nobody whose priority is not negative)"
    FULL = "full JID of a connected resource"
    FULL_GONE = "full JID of no connected resource, whether there is such an account or not"

    __hash__ = object.__hash__  # Enum's is a Python function: 0.1 µs for each look-up in a table


class Fate(Enum):
    """What becomes of the stanza; each is a method of `Host`."""

    DELIVER = "to the resource addressed"
    PASS = "to the resource addressed, if the asker may know of it, else refused"
    BEST = "to the resources with the highest priority"
    EVERY = "to all available resources whose priority is not negative"
    AVAILABLE = "to all available resources"
    AS_BARE = "as if it were sent to the bare JID"
    KEEP = "to whoever keeps messages for later, else service-unavailable to those in the roster, silence to strangers"
    ANSWER = "answered by the server on behalf of the account"
    TAKE = "taken by the server if it has asked on behalf of the account"
    NOTE = "noted on behalf of the account, and delivered to nobody"
    SUBSCRIBE = "to the rules of subscriptions (RFC 6121 §3)"
    REFUSE = "service-unavailable"
    DECLINE = "service-unavailable to those who may see the account's presence, silence to strangers"
    IGNORE = "silence"

    __hash__ = object.__hash__  # as above


NOBODY, BARE, BARE_AWAY, FULL, FULL_GONE = Case
FATES: Mapping[str, Mapping[Case, Fate]] = {
    # Silence for messages to nobody: an error would tell strangers which accounts there
    # are, since for one that is only away the message is kept without a word (§8.5.1). For
    # the same reason nobody's full JID has no column of its own: it is that of a resource
    # which is gone, and in that column nothing depends on the account but for its contacts.
    "message normal": {NOBODY: Fate.IGNORE, BARE: Fate.BEST, BARE_AWAY: Fate.KEEP, FULL: Fate.DELIVER,
                       FULL_GONE: Fate.DECLINE},
    "message chat": {NOBODY: Fate.IGNORE, BARE: Fate.BEST, BARE_AWAY: Fate.KEEP, FULL: Fate.DELIVER,
                     FULL_GONE: Fate.AS_BARE},
    "message groupchat": {NOBODY: Fate.REFUSE, BARE: Fate.REFUSE, BARE_AWAY: Fate.REFUSE, FULL: Fate.DELIVER,
                          FULL_GONE: Fate.DECLINE},
    "message headline": {NOBODY: Fate.IGNORE, BARE: Fate.EVERY, BARE_AWAY: Fate.IGNORE, FULL: Fate.DELIVER,
                         FULL_GONE: Fate.IGNORE},
    "message error": {NOBODY: Fate.IGNORE, BARE: Fate.NOTE, BARE_AWAY: Fate.NOTE, FULL: Fate.DELIVER,
                      FULL_GONE: Fate.IGNORE},
    "presence available": {NOBODY: Fate.IGNORE, BARE: Fate.AVAILABLE, BARE_AWAY: Fate.NOTE, FULL: Fate.DELIVER,
                           FULL_GONE: Fate.IGNORE},
    "presence subscribe": {NOBODY: Fate.IGNORE, BARE: Fate.SUBSCRIBE, BARE_AWAY: Fate.SUBSCRIBE,
                           FULL: Fate.SUBSCRIBE, FULL_GONE: Fate.SUBSCRIBE},
    "presence subscribed": {NOBODY: Fate.IGNORE, BARE: Fate.SUBSCRIBE, BARE_AWAY: Fate.SUBSCRIBE,
                            FULL: Fate.SUBSCRIBE, FULL_GONE: Fate.IGNORE},
    "presence probe": {NOBODY: Fate.SUBSCRIBE, BARE: Fate.SUBSCRIBE, BARE_AWAY: Fate.SUBSCRIBE,
                       FULL: Fate.SUBSCRIBE, FULL_GONE: Fate.SUBSCRIBE},
    "presence error": {NOBODY: Fate.IGNORE, BARE: Fate.SUBSCRIBE, BARE_AWAY: Fate.SUBSCRIBE, FULL: Fate.DELIVER,
                       FULL_GONE: Fate.IGNORE},
    "iq request": {NOBODY: Fate.ANSWER, BARE: Fate.ANSWER, BARE_AWAY: Fate.ANSWER, FULL: Fate.PASS,
                   FULL_GONE: Fate.PASS},
    "iq reply": {NOBODY: Fate.IGNORE, BARE: Fate.TAKE, BARE_AWAY: Fate.TAKE, FULL: Fate.DELIVER,
                 FULL_GONE: Fate.IGNORE},
}  # fmt: skip

SECTIONS: Mapping[str, Mapping[Case, str]] = {  # of RFC 6121: where each column of FATES is written, for the trace
    "message": {NOBODY: "8.5.1", BARE: "8.5.2.1.1", BARE_AWAY: "8.5.2.2.1", FULL: "8.5.3.1", FULL_GONE: "8.5.3.2.1"},
    "presence": {NOBODY: "8.5.1", BARE: "8.5.2.1.2", BARE_AWAY: "8.5.2.2.2", FULL: "8.5.3.1", FULL_GONE: "8.5.3.2.2"},
    "iq": {NOBODY: "8.5.1", BARE: "8.5.2.1.3", BARE_AWAY: "8.5.2.2.3", FULL: "8.5.3.1", FULL_GONE: "8.5.3.2.3"},
}

ROSTER_PUSH = ("set", ROSTER("query"))  # forbidden to others by RFC 6121 §2.3.3
LAST_QUESTION = ("get", LAST_ACTIVITY("query"))  # by XEP-0012 §4, to those who don't see the presence

KINDS: Mapping[tuple[str, str | None], str] = {  # tag and type of a stanza: its row of FATES
    (MESSAGE, None): "message normal",
    (MESSAGE, "normal"): "message normal",
    (MESSAGE, "chat"): "message chat",
    (MESSAGE, "groupchat"): "message groupchat",
    (MESSAGE, "headline"): "message headline",
    (MESSAGE, "error"): "message error",
    (PRESENCE, None): "presence available",
    (PRESENCE, "unavailable"): "presence available",
    (PRESENCE, "subscribe"): "presence subscribe",
    (PRESENCE, "subscribed"): "presence subscribed",
    (PRESENCE, "unsubscribe"): "presence subscribed",
    (PRESENCE, "unsubscribed"): "presence subscribed",
    (PRESENCE, "probe"): "presence probe",
    (PRESENCE, "error"): "presence error",
    (IQ, "get"): "iq request",
    (IQ, "set"): "iq request",
    (IQ, "result"): "iq reply",
    (IQ, "error"): "iq reply",
}


def kind_of(stanza: Stanza) -> str:
    """Return the row of `FATES` for a stanza, "" for none; a message of unknown type counts as normal (§5.2.2)."""
    return KINDS.get((stanza.tag, stanza.get("type")), "message normal" if stanza.tag == MESSAGE else "")


class Host:
    """A domain that is served here, with its accounts."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self._methods: dict[Fate, Callable[[Stanza, JID], None]] = {
            Fate.DELIVER: self._deliver,
            Fate.PASS: self._pass,
            Fate.BEST: self._deliver_to_best,
            Fate.EVERY: self._deliver_to_every,
            Fate.AVAILABLE: self._deliver_to_available,
            Fate.AS_BARE: self._deliver_as_bare,
            Fate.KEEP: self._keep,
            Fate.ANSWER: self._answer,
            Fate.TAKE: lambda stanza, to: self.server.answered(stanza),
            Fate.NOTE: lambda stanza, to: None,  # by the features that it arrives at
            Fate.SUBSCRIBE: self._subscribe,
            Fate.REFUSE: self._refuse,
            Fate.DECLINE: self._decline,
            Fate.IGNORE: lambda stanza, to: None,
        }

    def receive(self, stanza: Stanza, to: JID) -> None:
        """Take a stanza for this domain or one of its accounts (RFC 6120 §10.5)."""
        if not to.local:
            return self._receive_for_server(stanza, to)
        kind = kind_of(stanza)
        if not kind:
            raise StanzaError("bad-request", "unknown type")
        session = self.server.session(to)
        owner, case = (to.bare, self._case(kind, to)) if session is None else (session.bare, FULL)
        fate = FATES[kind][case]
        if self.server.trace is not None:
            section = SECTIONS[kind.split()[0]][case]
            self.server.trace.decided(f"RFC 6121 §{section}: {case.value}: {fate.value}")
        if fate is not Fate.IGNORE and (session is not None or self._exists(owner)):
            for arriving in self.server.registry.arriving[stanza.tag]:
                filtered = arriving(owner, stanza)
                if filtered is None:
                    return
                stanza = filtered
        self._methods[fate](stanza, to)

    def _case(self, kind: str, to: JID) -> Case:
        if to.resource:
            return FULL_GONE if self.server.session(to) is None else FULL
        sessions = self.server.sessions(to)
        if not sessions and not self._exists(to):
            return NOBODY
        lowest = 0 if kind.startswith("message") else -128
        for session in sessions:
            if session.presence is not None and session.priority >= lowest:
                return BARE
        return BARE_AWAY

    def _exists(self, owner: JID) -> bool:
        return owner in self.server.accounts

    # -- fates

    def _deliver(self, stanza: Stanza, to: JID) -> None:
        session = self.server.session(to)
        assert session is not None
        session.send(stanza)

    def _pass(self, stanza: Stanza, to: JID) -> None:
        """§8.5.3.1: a stranger gets the very error that the bare JID would give (RFC 6120 §13.10.2)."""
        asker, question = JID.parse(stanza.get("from", "")), (stanza.get("type"), stanza[0].tag)
        session = self.server.session(to)
        if question == ROSTER_PUSH:
            raise StanzaError("forbidden")  # only one's own server sends those (CVE-2015-8688)
        is_known = self.server.sees(asker, to.bare) or has_directed(session, asker)
        if not is_known and str(asker) not in self.server.config.hosts:
            raise StanzaError("forbidden" if question == LAST_QUESTION else "service-unavailable")
        if session is None or self.server.hides(to.bare, asker, session):
            raise StanzaError("service-unavailable")
        session.send(stanza)

    def _deliver_to_best(self, stanza: Stanza, to: JID) -> None:
        for session in best_of(self.server.sessions(to)):
            session.send(stanza)

    def _deliver_to_every(self, stanza: Stanza, to: JID) -> None:
        for session in self.server.sessions(to):
            if session.presence is not None and session.priority >= 0:
                session.send(stanza)

    def _deliver_to_available(self, stanza: Stanza, to: JID) -> None:
        for session in self.server.sessions(to):
            if session.presence is not None:
                session.send(stanza)

    def _deliver_as_bare(self, stanza: Stanza, to: JID) -> None:
        kind = kind_of(stanza)
        self._methods[FATES[kind][self._case(kind, to.bare)]](stanza, to.bare)

    def _keep(self, stanza: Stanza, to: JID) -> None:
        for undelivered in self.server.registry.undelivered:
            left = undelivered(to.bare, stanza)
            if left is None:
                return
            stanza = left
        if self.server.knows(JID.parse(stanza.get("from", "")), to.bare):
            raise StanzaError("service-unavailable")

    def redeliver(self, stanza: Stanza, to: JID) -> None:
        """Find another way for a message that has arrived before and did not reach its resource; raises StanzaError."""
        self._deliver_as_bare(stanza, to)

    def _answer(self, stanza: Stanza, to: JID) -> None:
        sender = JID.parse(stanza.get("from", ""))
        if sender.bare == to.bare:
            self.server.answer(stanza, sender, "self", to.bare)
        elif to.bare in self.server.accounts:
            self.server.answer(stanza, sender, "account", to.bare)
        else:
            self.server.answer(stanza, sender, "nobody", to.bare)

    def _subscribe(self, stanza: Stanza, to: JID) -> None:
        self.server.registry.subscriptions[stanza.get("type", "")](to, stanza)

    def _refuse(self, stanza: Stanza, to: JID) -> None:
        raise StanzaError("service-unavailable")

    def _decline(self, stanza: Stanza, to: JID) -> None:
        if self.server.sees(JID.parse(stanza.get("from", "")), to.bare):
            raise StanzaError("service-unavailable")

    def _receive_for_server(self, stanza: Stanza, to: JID) -> None:
        """§10.5.1, §10.5.2: requests are answered; a message or presence to the server itself means nothing to it."""
        kind = kind_of(stanza)
        if kind == "iq request":
            if to.resource:
                raise StanzaError("service-unavailable")
            self.server.answer(stanza, JID.parse(stanza.get("from", "")), "server", to)
        elif kind == "iq reply":
            self.server.answered(stanza)
        elif kind in ("message normal", "message chat", "message groupchat"):
            raise StanzaError("service-unavailable")
        elif not kind:
            raise StanzaError("bad-request", "unknown type")


class Question(NamedTuple):
    """A request of the server's own that waits for its answer."""

    then: Callable[[Stanza | None], None]
    timer: Timer


class Listening(NamedTuple):
    """What is spoken on a listener: by the name that ALPN has for it, and whether TLS comes first (XEP-0368)."""

    protocol: str
    direct: bool


LISTENERS: Mapping[str, Listening] = {  # by the names in `[listen]`
    "client": Listening("xmpp-client", False),
    "client_tls": Listening("xmpp-client", True),
    "lab": Listening("xmpp-client", False),
    "component": Listening("component", False),  # chapter 23; ALPN knows no such protocol, there is no TLS
    "web": Listening("http/1.1", True),  # chapter 24
}
MAX_SLICED = 8  # long questions of other servers' users at the same time


def machine_has_ipv6() -> bool:
    """Whether a socket can be bound to the IPv6 loopback address here; containers often have no IPv6."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def check_iq(stanza: Stanza) -> None:
    """Raise StanzaError("bad-request") for an IQ that RFC 6120 §8.2.3 doesn't allow."""
    type = stanza.get("type")
    if type not in ("get", "set", "result", "error"):
        raise StanzaError("bad-request", "an iq is of type get, set, result or error")
    if not stanza.get("id"):
        raise StanzaError("bad-request", "an iq needs an id")
    if type in ("get", "set") and len(stanza) != 1:
        raise StanzaError("bad-request", "a request has exactly one payload")


class Server:
    """The server: its accounts, sessions, domains and features, and the way between them.

    `certificates` may be None where no stream will ever come in: for the command line,
    which manages accounts while nothing is served.
    """

    def __init__(self, config: Config, loop: Loop, storage: Storage, features: Iterable[type[Feature]],
                 certificates: Certificates | None = None) -> None:  # fmt: skip
        self.config = config
        self.loop = loop
        self.storage = storage
        self.started_at = datetime.now(UTC)
        self.accounts = storage.documents("accounts", dict)
        self.rosters = storage.documents("roster", dict)
        self.secret = self._load_secret()
        self.trace: Trace | None = None  # chapter 26
        self.guard = LoginGuard(config.limits.logins_per_minute, loop.now)
        self.domains: dict[str, Domain] = {name: Host(self, name) for name in config.hosts}
        self.streams: set[ClientStream] = set()
        self._sessions: dict[JID, tuple[Session, ...]] = {}  # by account, in the order in which they were bound
        self._bound: dict[JID, Session] = {}  # by full JID
        self._questions: dict[tuple[str, str], Question] = {}
        # What new connections carry, by protocol; a feature may add its own.
        self.protocols: dict[str, Callable[[Connection], Carried]] = {"xmpp-client": self._client_stream}
        self._sliced = 0  # requests of other servers' users that are being answered in slices
        self.network = None if certificates is None else Network(config, loop, storage, certificates)
        if self.network is not None:
            self.network.protocols = self.protocols
        self.registry = Registry(features, self)

    def _load_secret(self) -> bytes:
        """Return the server's own random secret, made at first start; salts for nobody are derived from it."""
        documents, owner = self.storage.documents("secret", dict), JID("", self.config.hosts[0], "")
        if documents.get(owner) is None:
            documents[owner] = {"secret": secrets.token_hex(32)}
        return bytes.fromhex(documents[owner]["secret"])

    # -- accounts

    def credentials(self, owner: JID) -> Mapping[str, Any] | None:
        """Return what proves a password of this account (chapter 10), or None for no account."""
        account = self.accounts.get(owner)
        return None if account is None else account["credentials"]

    def account(self, owner: JID) -> Mapping[str, Any] | None:
        """Return the account's document, or None."""
        found: Mapping[str, Any] | None = self.accounts.get(owner)
        return found

    def create_account(self, owner: JID, credentials: Mapping[str, Any]) -> None:
        """Create an account; raises StanzaError("conflict") when the name is taken."""
        if owner in self.accounts:
            raise StanzaError("conflict")
        self.accounts[owner] = {"created": stamp(), "credentials": dict(credentials)}
        for event in self.registry.listeners("account_created"):
            event(owner)

    def set_credentials(self, owner: JID, credentials: Mapping[str, Any], changer: Session | None = None) -> None:
        """Give the account a new password; all its sessions but the changer's have to log in anew (threat S33)."""
        self.accounts[owner] = {**self.accounts[owner], "credentials": dict(credentials)}
        for event in self.registry.listeners("credentials_changed"):
            event(owner)
        self._end_streams(owner, changer, StreamError("reset", "the password has changed"))  # §4.9.3.16

    def remove_account(self, owner: JID, changer: Session | None = None) -> None:
        """Remove an account and everything of it; its sessions end with not-authorized (XEP-0077 §3.2).

        The session of the `changer` stays, to hear that it is done; its stream is the caller's to end.
        """
        self.storage.check()
        self._end_streams(owner, changer, StreamError("not-authorized", "the account is gone"))
        for event in reversed(self.registry.listeners("account_removed")):
            event(owner)
        self.storage.remove_owner(owner)

    def _end_streams(self, owner: JID, changer: Session | None, error: StreamError) -> None:
        """End all streams of an account but the changer's, those too that are only logging in (threat S33)."""
        for stream in list(self.streams):
            if stream.account == owner and (changer is None or stream is not changer.stream):
                stream.fail(error)
        self._end_detached(lambda session: session.bare == owner and session is not changer)

    def _end_detached(self, doomed: Callable[[Session], bool]) -> None:
        """End the sessions that wait for a stream and are `doomed`."""
        for session in list(self.all_sessions()):
            if not session.is_attached and doomed(session):
                self.session_ended(session)

    def sees(self, viewer: JID, owner: JID) -> bool:
        """Whether `viewer` may know about `owner`'s presence: it is the owner, or subscribed (RFC 6121 §8.1)."""
        if viewer.bare == owner:
            return True
        item = self.rosters.item(owner, str(viewer.bare))
        return item is not None and item.get("subscription") in ("from", "both")

    def hides(self, owner: JID, contact: JID, session: Session | None = None, kind: str = "presence-out") -> bool:
        """Whether `owner` hides that session, or without one the whole account, from `contact` (`Feature.hides`)."""
        hidden = False
        for hides in self.registry.hides:  # not any(…), which costs more than the question: presence asks a lot
            hidden = hidden or hides(owner, contact, session, kind)
        return hidden

    def knows(self, other: JID, owner: JID) -> bool:
        """Whether `other` may learn that the account `owner` exists: it is in its roster (RFC 6121 §8.1)."""
        item = self.rosters.item(owner, str(other.bare))
        return other.bare == owner or (item is not None and item["subscription"] != "remove")

    # -- sessions

    def sessions(self, owner: JID) -> Sequence[Session]:
        """Return the sessions of an account, in the order in which they were bound."""
        return self._sessions.get(owner, ())

    def session(self, jid: JID) -> Session | None:
        """Return the session with this full JID."""
        return self._bound.get(jid)

    def all_sessions(self) -> Iterator[Session]:
        """Yield every session."""
        yield from self._bound.values()

    def bind(self, stream: ClientStream, jid: JID) -> Session:
        """Bind a resource to an authenticated stream (RFC 6120 §7.7).

        A resource in use is taken over, and its old stream ends with `conflict`: mostly
        it is the same client, back before the server noticed that its connection broke.
        """
        old = self.session(jid)
        if old is not None:
            self.end(old, StreamError("conflict", "the resource was bound anew"))
        self._make_room(jid.bare)
        session = Session(self, stream, jid)
        self._sessions[session.bare] = (*self.sessions(session.bare), session)
        self._bound[jid] = session
        stream.bound(session)
        log.info("%s: session begins", stream)
        for event in self.registry.listeners("session_bound"):
            event(session)
        return session

    def _make_room(self, owner: JID) -> None:
        """Let a session that only waits to be resumed go rather than refuse a new one; raises StanzaError."""
        sessions = self.sessions(owner)
        if len(sessions) < self.config.limits.resources:
            return
        waiting = next((session for session in sessions if not session.is_attached), None)
        if waiting is None:
            raise StanzaError("resource-constraint", "too many resources are connected")  # RFC 6120 §7.6.2.1
        self.session_ended(waiting)

    def end(self, session: Session, error: StreamError) -> None:
        """End a session: by ending its stream with `error`, if it has one."""
        if session.is_attached:
            session.stream.fail(error)
        else:
            self.session_ended(session)

    def session_detached(self, session: Session) -> None:
        """The session's stream broke, but the client may come back (XEP-0198 §5): nobody hears of it."""
        log.info("%s: session waits for its client", session.full)
        for event in self.registry.listeners("session_detached"):
            event(session)

    def session_ended(self, session: Session) -> None:
        """The session's stream is gone: everybody who knew of it has to hear (RFC 6121 §4.5)."""
        log.info("%s: session ends", session.full)
        del self._bound[session.jid]  # first: what is said in consequence must not be sent there
        left = tuple(other for other in self._sessions.pop(session.bare) if other is not session)
        if left:
            self._sessions[session.bare] = left
        for event in reversed(self.registry.listeners("session_ended")):
            event(session)

    # -- from a client

    def receive(self, session: Session, stanza: Stanza) -> None:
        """Take a stanza that a client hands in; errors go back to it. Raises StreamError."""
        self._stamp(session, stanza)
        try:
            if self.config.limits.recipients_per_minute:
                self._check_recipient(session, stanza.get("to"))
            for sending in session.sending[stanza.tag]:
                filtered = sending(session, stanza)
                if filtered is None:
                    return
                stanza = filtered
            if stanza.tag == MESSAGE:
                to = stanza.get("to")
                self.route(stanza, session.bare if to is None else JID.parse(to))  # RFC 6120 §10.3.1
            elif stanza.tag == PRESENCE:
                self._receive_presence(session, stanza)
            else:
                self._receive_iq(session, stanza)
        except StanzaError as error:
            self.refuse(stanza, error)
        except StreamError:
            raise
        except Exception:  # a bug in one handler costs one stanza
            log.exception("%s: unexpected error", session.full)
            self.refuse(stanza, StanzaError("internal-server-error"))

    def _stamp(self, session: Session, stanza: Stanza) -> None:
        """RFC 6120 §8.1.2.1: `from` is what the server knows, never what the client says."""
        claimed = stanza.get("from")
        if claimed is not None and claimed != session.full:
            try:
                honest = JID.parse(claimed) in (session.jid, session.bare)
            except StanzaError:
                honest = False
            if not honest:
                raise StreamError("invalid-from")
        stanza.set("from", session.full)
        if session.stream.lang and XML_LANG not in stanza.attrib:
            stanza.set(XML_LANG, session.stream.lang)  # §4.7.4

    def _check_recipient(self, session: Session, to: str | None) -> None:
        """RFC 6120 §13.12: refuse a client that writes to too many different addresses; they count as bare JIDs."""
        recipient = JID.parse(to).bare if to else session.bare
        if recipient in session.recipients:
            return
        if self.loop.now() >= session.recipients_until:
            session.recipients.clear()
            session.recipients_until = self.loop.now() + 60
        if len(session.recipients) >= self.config.limits.recipients_per_minute:
            raise StanzaError("policy-violation", "too many recipients: wait a minute", kind="wait")
        session.recipients.add(recipient)

    def _receive_presence(self, session: Session, stanza: Stanza) -> None:
        kind, type = kind_of(stanza), stanza.get("type", "available")
        if not kind:
            raise StanzaError("bad-request", "unknown type of presence")  # RFC 6121 §4.7.1
        if kind == "presence available" and stanza.get("to") is not None:
            type = "directed"
        self.registry.presences[type](session, stanza)

    def _receive_iq(self, session: Session, stanza: Stanza) -> None:
        check_iq(stanza)
        to = stanza.get("to")
        if to is not None:
            self.route(stanza, JID.parse(to))
        elif stanza.get("type") in ("get", "set"):
            self.answer(stanza, session.jid, "self", session.bare)  # RFC 6120 §10.3.3
        else:
            self.answered(stanza)

    def receive_foreign(self, stanza: Stanza) -> None:
        """Take a stanza of another domain, which is allowed to speak for its `from`; errors go back there."""
        try:
            if stanza.tag == IQ:
                check_iq(stanza)
            self.route(stanza, JID.parse(stanza.get("to", "")))
        except StanzaError as error:
            self.refuse(stanza, error)
        except Exception:  # a bug in one handler costs one stanza
            log.exception("%s: unexpected error", stanza.get("from"))
            self.refuse(stanza, StanzaError("internal-server-error"))

    # -- on its way

    def route(self, stanza: Stanza, to: JID) -> None:
        """Hand a stanza to the domain of its address (RFC 6120 §10); raises StanzaError."""
        domain = self.domains.get(to.domain)
        if domain is None:
            raise StanzaError("remote-server-not-found")
        domain.receive(stanza, to)

    def emit(self, stanza: Stanza) -> None:
        """Route a stanza of the server's own making; if that fails, nobody hears of it."""
        try:
            self.route(stanza, JID.parse(stanza.get("to", "")))
        except StanzaError as error:
            log.debug("not delivered: %s", error.condition)

    def refuse(self, stanza: Stanza, error: StanzaError) -> None:
        """Answer a stanza with an error, unless it is itself an answer (RFC 6120 §8.3.1)."""
        if self.trace is not None:
            self.trace.decided(f"RFC 6120 §8.3: refused with {error.condition} {error.text}".rstrip())
        if stanza.get("type") in ("error", "result"):
            return
        reply = error_reply(stanza, error)
        self.reply(reply)
        session = self.session(JID.parse(reply.get("to", "")))
        if session is not None:
            for event in self.registry.listeners("refused"):
                event(session, reply)

    def reply(self, stanza: Stanza) -> None:
        """Send an answer to whoever asked: a session here directly, so that nothing stands in its way."""
        to = JID.parse(stanza.get("to", ""))
        session = self.session(to)
        if session is not None:
            session.send(stanza)
        elif to.domain not in self.config.hosts:
            self.emit(stanza)

    # -- requests (RFC 6120 §8.2.3)

    def answer(self, stanza: Stanza, sender: JID, place: str, owner: JID) -> None:
        """Find the handler of a request at `place` and answer it, exactly once. Raises StanzaError.

        At the place `nobody` (an account that doesn't exist) a request finds the handlers of
        `account`, whose answer must be the same as for somebody who has nothing.
        """
        payload = stanza[0]
        place = "account" if place == "nobody" else place
        handler = self.registry.find(stanza.get("type", ""), payload, place)
        if handler is None:
            raise StanzaError("service-unavailable")
        self._check_asker(handler, sender, owner)
        if self.trace is not None:
            self.trace.decided(handler.rule)
        request = Iq(stanza, payload, self, sender, owner, session=self.session(sender))
        answer = self.storage.attempt(handler.function, request)
        if isinstance(answer, Later):
            self._answer_later(request, answer)
        elif isinstance(answer, Generator):
            self._answer_in_slices(request, answer)
        else:
            self._finish(request, answer)

    def _check_asker(self, handler: Handler, sender: JID, owner: JID) -> None:
        who, is_local = handler.who, sender.domain in self.config.hosts
        if ("local" if is_local else "remote") in who:
            return
        if "owner" in who and is_local and sender.bare == owner:
            return
        if "admin" not in who:
            raise StanzaError("service-unavailable")
        if sender.bare not in self.config.admins:  # the whole address: CVE-2020-8086 compared the local part
            raise StanzaError("forbidden")

    def _answer_later(self, request: Iq, later: Later) -> None:
        """Ask a worker; the client's next stanza waits, so that they are handled in order (RFC 6120 §10.1)."""

        def then(result: Any) -> None:
            try:
                payload = self.storage.attempt(later.then, result)
            except StanzaError as error:
                return self.refuse(request.stanza, error)
            except Exception:  # as in `receive`
                log.exception("%s: unexpected error", request.sender)
                return self.refuse(request.stanza, StanzaError("internal-server-error"))
            self._finish(request, payload)

        if request.session is not None:
            request.session.stream.wait_for(later.function, *later.args, then=then)
        else:
            self.loop.offload(later.function, *later.args, then=then)

    def _answer_in_slices(self, request: Iq, steps: Slices) -> None:
        """Answer at once, or after some turns in which the client's next stanza waits. Raises StanzaError.

        So nobody has more than one of these under way; other servers' users have MAX_SLICED between them.
        """
        if self._take_slice(request, steps):
            return

        def take() -> bool:
            try:
                return self._take_slice(request, steps)
            except StanzaError as error:
                self.refuse(request.stanza, error)
            except Exception:  # a bug in one handler costs one answer
                log.exception("%s: unexpected error", request.sender)
                self.refuse(request.stanza, StanzaError("internal-server-error"))
            return True

        if request.session is not None:
            return request.session.stream.wait_in_slices(take)
        if self._sliced >= MAX_SLICED:
            raise StanzaError("resource-constraint", "too many long questions at once", kind="wait")
        self._sliced += 1
        self._take_slices(take)

    def _take_slice(self, request: Iq, steps: Slices) -> bool:
        try:
            next(steps)
        except StopIteration as end:
            self._finish(request, end.value)
            return True
        return False

    def _take_slices(self, take: Callable[[], bool]) -> None:
        if take():
            self._sliced -= 1
        else:
            self.loop.post(functools.partial(self._take_slices, take))

    def _finish(self, request: Iq, payload: Payload) -> None:
        result = Stanza(IQ, {"type": "result", "id": request.stanza.get("id", "")})
        for ours, theirs in (("from", "to"), ("to", "from")):
            if (value := request.stanza.get(theirs)) is not None:
                result.set(ours, value)
        if payload is not None:
            result.add(payload)
        self.reply(result)
        for callback in request.later:
            self.loop.call(callback)  # the request is answered: what goes wrong now is nobody's but ours

    def answer_before_binding(self, stream: ClientStream, stanza: Stanza) -> bool:
        """Answer a request of the place `stream`; False when it is none. Raises StreamError."""
        if stanza.get("type") not in ("get", "set") or len(stanza) != 1 or not stanza.get("id"):
            return False
        handler = self.registry.find(stanza.get("type", ""), stanza[0], "stream")
        if handler is None:
            return False
        host = JID("", stream.host, "")
        request = Iq(stanza, stanza[0], self, host, host, stream=stream)
        self._answer_stream(request, lambda: self.storage.attempt(handler.function, request))
        return True

    def _answer_stream(self, request: Iq, ask: Callable[[], Answer]) -> None:
        stream, stanza = request.from_stream, request.stanza
        try:
            answer = ask()
        except StanzaError as error:
            reply = error_reply(stanza, error)
            reply.attrib.pop("to", None)  # nobody has an address yet
            reply.set("from", stream.host)
            return stream.send(reply)
        if isinstance(answer, Later):
            then = answer.then
            return stream.wait_for(answer.function, *answer.args, then=lambda result: self._answer_stream(
                request, lambda: self.storage.attempt(then, result)))  # fmt: skip
        assert not isinstance(answer, Generator), "nothing takes long before there is a session"
        result = Stanza(IQ, {"type": "result", "id": stanza.get("id", ""), "from": stream.host})
        if answer is not None:
            result.add(answer)
        stream.send(result)
        for callback in request.later:
            self.loop.call(callback)

    # -- the server's own requests

    def ask(self, sender: str, to: JID, payload: Element, then: Callable[[Stanza | None], None], *,
            type: str = "get", timeout: float = ANSWER_TIMEOUT) -> None:  # fmt: skip
        """Send a request from `sender` (a domain or an account here); `then` gets the answer, or None if none came."""
        id = secrets.token_urlsafe(9)
        key = (str(to), id)
        timer = self.loop.call_later(timeout, lambda: self._questions.pop(key).then(None))
        self._questions[key] = Question(then, timer)
        request = Stanza(IQ, {"type": type, "id": id, "from": sender, "to": str(to)})
        request.add(payload)
        self.emit(request)

    def answered(self, stanza: Stanza) -> None:
        """Take the answer to a question of ours; any other unasked-for answer is ignored (RFC 6120 §10.3.3)."""
        question = self._questions.pop((stanza.get("from", ""), stanza.get("id", "")), None)
        if question is not None:
            question.timer.cancel()
            question.then(stanza)

    def ping(self, session: Session) -> None:
        """Ask a silent client whether it is still there (XEP-0198 §4, XEP-0199 §4.2); whatever it says proves it."""
        if session.management is not None:
            return session.management.ask()
        self.ask(session.jid.domain, session.jid, E(PING("ping")), lambda answer: None)

    def push(self, owner: JID, namespace: str, payload: Element) -> None:
        """Send a set with `payload` to every session of `owner` that is interested in `namespace` (RFC 6121 §2.1.6)."""
        for session in self.sessions(owner):
            if namespace in session.interested:
                session.push(payload)

    # -- the life of the server

    def listen(self) -> list[tuple[str, Address]]:
        """Open the configured listeners; returns what each is for and where it is. Raises ConfigError."""
        assert self.network is not None
        opened = []
        for purpose, address in self._wanted_listeners():
            if (purpose, address) not in self.network.listeners:
                self._open_listener(purpose, address)
            if listener := self.network.listeners.get((purpose, address)):
                opened.append((purpose, address._replace(port=listener.port)))
        for event in self.registry.listeners("listening"):
            event(opened)
        return opened

    def _wanted_listeners(self) -> Iterator[tuple[str, Address]]:
        """Yield purpose and address of what the configuration wants and somebody here can speak."""
        for purpose in LISTENERS:
            if LISTENERS[purpose].protocol in self.protocols:
                yield from ((purpose, address) for address in getattr(self.config.listen, purpose))

    def _open_listener(self, purpose: str, address: Address) -> None:
        assert self.network is not None
        try:
            self.network.listen(purpose, address, functools.partial(self._accept, LISTENERS[purpose]),
                                lab=purpose == "lab")  # fmt: skip
        except ConfigError:
            if address.family == socket.AF_INET6 and not machine_has_ipv6():
                log.info("not listening on %s: this machine has no IPv6", address)
                return
            raise

    @staticmethod
    def _accept(listening: Listening, connection: Connection) -> None:
        connection.speak(listening.protocol)
        if listening.direct:
            connection.start_direct_tls()

    def _client_stream(self, connection: Connection) -> Carried:
        return ClientStream(self, connection)

    def reload(self, config: Config) -> None:
        """Work with another configuration from now on; nobody is disconnected, except from domains that are gone.

        Listeners that are not wanted any more let go of their ports at the end of this turn:
        `listen` again in the next one.
        """
        assert self.network is not None
        self.config = config
        self.network.reconfigure(config)
        self.guard = LoginGuard(config.limits.logins_per_minute, self.loop.now)
        for name in config.hosts:
            self.domains.setdefault(name, Host(self, name))
        for stream in list(self.streams):
            if stream.host not in config.hosts:
                stream.fail(StreamError("host-gone"))  # RFC 6120 §4.9.3.5
        self._end_detached(lambda session: session.jid.domain not in config.hosts)
        for name in [name for name, domain in self.domains.items()
                     if isinstance(domain, Host) and name not in config.hosts]:  # fmt: skip
            del self.domains[name]
        for event in self.registry.listeners("reloaded"):
            event()
        wanted = set(self._wanted_listeners())
        self.network.close_listeners(lambda key: key not in wanted)

    def shutdown(self, done: Callable[[], None]) -> None:
        """End all streams with system-shutdown, then call `done`; at the latest after SHUTDOWN_TIMEOUT."""
        assert self.network is not None
        network = self.network
        network.close_listeners()
        network.when_idle(done, SHUTDOWN_TIMEOUT)  # first: whatever goes wrong below, there is an end
        for event in self.registry.listeners("shutting_down"):
            event()
        for stream in list(self.streams):
            stream.fail(StreamError("system-shutdown"))  # RFC 6120 §4.9.3.20
        self._end_detached(lambda session: True)  # last: what nobody acknowledged is kept for them


# ==== 15. Roster, subscriptions, presence (RFC 6121 §2 to §4) ====
#
# Whom do I know, who may see whether I am there, and am I? Three things that are one:
#
#   roster         the list of one's contacts, kept by the server, the same on all devices:
#                  a change by one of them is pushed to all that have asked for the roster
#   subscription   each contact's item says who sees whose presence: none, to (I see them),
#                  from (they see me), both. It changes only by asking and allowing:
#
#     romeo: <presence type='subscribe'   to='juliet@…'/>     juliet's client asks her
#     juliet: <presence type='subscribed' to='romeo@…'/>      he now has "to", she "from"
#
#   presence       <presence/> goes from a session to its server, and from there to all who
#                  are subscribed; when it disappears, they are told so
#
# The subscription rules of RFC 6121 Appendix A are two tables, `OUTBOUND` and `INBOUND`.
# One half of each relation is kept at each end; the two servers only exchange stanzas, also
# when both accounts live here, so that a contact on another server is no special case.

# -- the roster

FORGETFUL_AFTER = 50  # removed contacts remembered per roster, so that returning clients hear of their removal
VERSION_STEP = 1_000_000  # microseconds: versions are ahead of the clock by a random part of it


class Roster(Feature):
    """Roster management (RFC 6121 §2) with versioning (XEP-0237).

        C: <iq type='set' id='r1'><query xmlns='jabber:iq:roster'><item jid='juliet@example.org'/></query></iq>
        S: <iq type='result' id='r1'/>
        S: <iq type='set' id='…'><query xmlns='jabber:iq:roster' ver='…'>
             <item jid='juliet@example.org' subscription='none'/></query></iq>    to each interested resource

    Documents: "roster", by account, items keyed by the contact's address:
    `{"subscription": "both", "ver": 17…, "name": "Juliet", "groups": ["Capulets"], "ask": true,
    "approved": true}`, the last four only when there is something to say. A removed contact
    leaves `{"subscription": "remove", "ver": …}` for a while; the key "" holds the version
    from which on removals are still known.
    """

    namespace = ROSTER
    account_features = (ROSTER,)

    def offer(self, stream: ClientStream) -> Element | None:
        """§2.6.1: versioning is supported."""
        return E(ROSTER_VERSIONING("ver")) if stream.state is StreamState.AUTHENTICATED else None

    @iq("get", ROSTER("query"), to="self")
    def get(self, request: Iq) -> Payload:
        """§2.1.3, §2.6.3: the whole roster, or only what has changed since the version that the client has."""
        if len(request.payload):
            raise StanzaError("bad-request", "a roster get has no items")
        session, owner = request.from_session, request.owner
        session.interested.add(ROSTER)
        known = request.payload.get("ver")
        changes = None if known is None else self._changes_since(owner, known)
        if changes is None:
            items = [roster_item(contact, item) for contact, item in self.contacts(owner)]
            return roster_query(self.version(owner), *items)
        for contact, item in changes:
            request.afterwards(functools.partial(session.push, roster_query(item["ver"], roster_item(contact, item))))
        return None

    def _changes_since(self, owner: JID, known: str) -> list[tuple[str, Mapping[str, Any]]] | None:
        """Return the changed items, oldest first, or None when `known` is no version that we remember."""
        items = self.server.rosters.items(owner)
        horizon = items.get("", {}).get("ver", 0)
        versions = {str(item["ver"]): item["ver"] for item in items.values()}
        since = versions.get(known)  # never compared by size: a version is just a name (§2.6.2)
        if since is None or since < horizon:
            return None
        changed = [(contact, item) for contact, item in items.items() if contact and item["ver"] > since]
        return sorted(changed, key=lambda pair: pair[1]["ver"])

    @iq("set", ROSTER("query"), to="self")
    def set(self, request: Iq) -> Payload:
        """§2.3 to §2.5: add, update or remove one contact."""
        if len(request.payload) != 1 or request.payload[0].tag != ROSTER("item"):
            raise StanzaError("bad-request", "a roster set has exactly one item")
        item = request.payload[0]
        contact = JID.parse(item.get("jid") or _missing("jid"))
        if contact.bare == request.owner:
            raise StanzaError("not-allowed", "nobody is their own contact")
        if item.get("subscription") == "remove":
            self._remove(request, contact)
        else:
            self._update(request.owner, contact, item)
        return None

    @iq("set", ROSTER("query"), to="account")
    def refuse(self, request: Iq) -> Payload:
        """§2.3.3. Asking for somebody else's roster finds no handler: it looks as if there were nobody (§8.5.1)."""
        raise StanzaError("forbidden")

    def _update(self, owner: JID, contact: JID, item: Element) -> None:
        """§2.4: name and groups are replaced; subscription, ask and approved are not the client's to say."""
        groups = [group.text or "" for group in item.findall(ROSTER("group"))]
        name = item.get("name", "")
        limits = self.server.config.limits
        if len(set(groups)) != len(groups):
            raise StanzaError("bad-request", "a group is named twice")
        if not all(groups) or max(map(len, [name, *groups])) > MAX_ROSTER_NAME:
            raise StanzaError("not-acceptable", "a name is empty or too long")  # §2.3.3
        if len(groups) > limits.roster_groups:
            raise StanzaError("not-acceptable", f"a contact may be in {limits.roster_groups} groups")
        self.change(owner, contact, name=name, groups=groups)

    def _remove(self, request: Iq, contact: JID) -> None:
        """§2.5: the contact goes; whatever subscriptions there are end, as they would one by one."""
        owner = request.owner
        item = self.item(owner, contact)
        if item is None:
            raise StanzaError("item-not-found")
        self.change(owner, contact, subscription="remove")
        request.afterwards(lambda: self.server.registry.feature(Subscriptions).end_relation(owner, contact, item))

    # -- for the other features of this chapter

    def item(self, owner: JID, contact: JID) -> Mapping[str, Any] | None:
        """Return the contact's item in the owner's roster, or None."""
        item: Mapping[str, Any] | None = self.server.rosters.item(owner, str(contact))
        return None if item is None or item["subscription"] == "remove" else item

    def contacts(self, owner: JID, *subscriptions: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield (address, item) of the contacts with one of these subscriptions, or of all."""
        wanted = subscriptions or ("none", "to", "from", "both")
        for contact, item in self.server.rosters.items(owner).items():
            if contact and item["subscription"] in wanted:
                yield contact, item

    def version(self, owner: JID) -> int:
        """Return the version of the roster: microseconds since 1970 of its last change, mostly."""
        return max((item["ver"] for item in self.server.rosters.items(owner).values()), default=0)

    def change(self, owner: JID, contact: JID, **changes: Any) -> None:
        """Change fields of an item, commit, and push it to interested resources (§2.1.6).

        `name=""`, `groups=[]`, `ask=False` and `approved=False` take the field away;
        `subscription="remove"` the item. A new item begins with the subscription none.
        """
        item = {**(self.item(owner, contact) or self._new_item(owner)), **changes}
        item = {key: value for key, value in item.items() if value}
        if item["subscription"] == "remove":
            item = {"subscription": "remove"}
        item["ver"] = self._next_version(owner)
        for event in self.server.registry.listeners("roster_changing"):
            event(owner, contact)
        self.server.rosters.put(owner, str(contact), item)
        self._forget_removals(owner)
        self.server.push(owner, ROSTER, roster_query(item["ver"], roster_item(str(contact), item)))
        for event in self.server.registry.listeners("roster_changed"):
            event(owner, contact)

    def _new_item(self, owner: JID) -> Mapping[str, Any]:
        limit = self.server.config.limits.roster_items
        if sum(1 for _contact in self.contacts(owner)) >= limit:
            raise StanzaError("resource-constraint", f"a roster has room for {limit} contacts")
        return {"subscription": "none"}

    def _next_version(self, owner: JID) -> int:
        """Return a version that there has never been, whatever a crash has taken and wherever the clock was set to.

        A version that a client knows and we have lost must not come back for other content.
        The clock sees to that; where it stands or was set back (XEP-0237 §4.3), chance does.
        """
        return max(time.time_ns() // 1000, self.version(owner)) + 1 + secrets.randbelow(VERSION_STEP)

    def _forget_removals(self, owner: JID) -> None:
        items = self.server.rosters.items(owner)
        removed = [(item["ver"], contact) for contact, item in items.items() if item["subscription"] == "remove"]
        if len(removed) > FORGETFUL_AFTER:
            version, contact = min(removed)
            self.server.rosters.put(owner, contact, None)
            self.server.rosters.put(owner, "", {"subscription": "horizon", "ver": version})


def roster_query(version: int, *items: Element) -> Element:
    """Build the `<query/>` of a roster result or push (RFC 6121 §2.1.4, §2.1.6)."""
    return E(ROSTER("query"), {"ver": str(version)}, *items)


def roster_item(contact: str, item: Mapping[str, Any]) -> Element:
    """Build the `<item/>` that clients see (RFC 6121 §2.1.2)."""
    element = E(ROSTER("item"), {"jid": contact, "subscription": item["subscription"]})
    if item.get("name"):
        element.set("name", item["name"])
    if item.get("ask"):
        element.set("ask", "subscribe")
    if item.get("approved"):
        element.set("approved", "true")
    for group in item.get("groups", ()):
        element.append(E(ROSTER("group"), None, group))
    return element


def _missing(what: str) -> str:
    raise StanzaError("bad-request", f"{what} is missing")


# -- subscriptions


class Relation(Enum):
    """A subscription state of RFC 6121 Appendix A.1: (subscription, we have asked, the contact has asked)."""

    NONE = ("none", False, False)
    NONE_OUT = ("none", True, False)
    NONE_IN = ("none", False, True)
    NONE_OUT_IN = ("none", True, True)
    TO = ("to", False, False)
    TO_IN = ("to", False, True)
    FROM = ("from", False, False)
    FROM_OUT = ("from", True, False)
    BOTH = ("both", False, False)


NONE, NONE_OUT, NONE_IN, NONE_OUT_IN, TO, TO_IN, FROM, FROM_OUT, BOTH = Relation

# What our user's stanza does (Appendix A.2). A state that is not named stays as it is; then
# subscribe and unsubscribe are routed all the same, subscribed and unsubscribed are not.
OUTBOUND: Mapping[str, Mapping[Relation, Relation]] = {
    "subscribe": {NONE: NONE_OUT, NONE_IN: NONE_OUT_IN, FROM: FROM_OUT},
    "unsubscribe": {NONE_OUT: NONE, NONE_OUT_IN: NONE_IN, TO: NONE, TO_IN: NONE_IN, FROM_OUT: FROM, BOTH: FROM},
    "subscribed": {NONE_IN: FROM, NONE_OUT_IN: FROM_OUT, TO_IN: BOTH},
    "unsubscribed": {NONE_IN: NONE, NONE_OUT_IN: NONE_OUT, TO_IN: TO, FROM: NONE, FROM_OUT: NONE_OUT, BOTH: TO},
}
# What the contact's stanza does (Appendix A.3). A state that is not named stays as it is,
# and the stanza is not delivered.
INBOUND: Mapping[str, Mapping[Relation, Relation]] = {
    "subscribe": {NONE: NONE_IN, NONE_OUT: NONE_OUT_IN, TO: TO_IN},
    "unsubscribe": {NONE_IN: NONE, NONE_OUT_IN: NONE_OUT, TO_IN: TO, FROM: NONE, FROM_OUT: NONE_OUT, BOTH: TO},
    "subscribed": {NONE_OUT: TO, NONE_OUT_IN: TO_IN, FROM_OUT: BOTH},
    "unsubscribed": {NONE_OUT: NONE, NONE_OUT_IN: NONE_IN, TO: NONE, TO_IN: NONE_IN, FROM_OUT: FROM, BOTH: FROM},
}
SEEING_US = frozenset({FROM, FROM_OUT, BOTH})  # the contact sees our presence


class Subscriptions(Feature):
    """Presence subscriptions (RFC 6121 §3, Appendix A), with pre-approval (§3.4).

        C: <presence type='subscribe' to='juliet@example.org'/>
        S: <iq type='set' …><query …><item jid='juliet@example.org' subscription='none' ask='subscribe'/></query></iq>

    Documents: "requests", by account, keyed by who asks: the whole stanza as XML, until it
    is answered. What the account itself has asked for stands in its roster.
    """

    namespace = PRE_APPROVAL

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.requests = server.storage.documents("requests", dict)
        self._tellers: Mapping[str, Callable[[JID, JID, Relation, Relation, Stanza], None]] = {
            "subscribe": self._seek,
            "unsubscribe": self._seek,
            "subscribed": self._allow,
            "unsubscribed": self._deny,
        }

    @property
    def roster(self) -> Roster:
        """The rosters, whose items these rules change."""
        return self.server.registry.feature(Roster)

    @property
    def broadcast(self) -> PresenceBroadcast:
        """Whoever shows presence to new subscribers and hides it from former ones."""
        return self.server.registry.feature(PresenceBroadcast)

    def offer(self, stream: ClientStream) -> Element | None:
        """§3.4.1: pre-approval is supported."""
        return E(PRE_APPROVAL("sub")) if stream.state is StreamState.AUTHENTICATED else None

    def relation(self, owner: JID, contact: JID) -> Relation:
        """Return the state between an account and a contact, as the account's side sees it."""
        item = self.roster.item(owner, contact) or {"subscription": "none"}
        asked = self.requests.item(owner, str(contact)) is not None
        return Relation((item["subscription"], bool(item.get("ask")), asked))

    def is_approved(self, owner: JID, contact: JID) -> bool:
        """Return whether the owner has approved of the contact's next request in advance (§3.4)."""
        return bool((self.roster.item(owner, contact) or {}).get("approved"))

    def _move(self, owner: JID, contact: JID, new: Relation, **changes: Any) -> None:
        """Make `new` the state: change and push the item where it shows (A.1), and drop a request that is answered."""
        subscription, ask, asked = new.value
        if changes or self.relation(owner, contact).value[:2] != (subscription, ask):
            self.roster.change(owner, contact, subscription=subscription, ask=ask, **changes)
        if not asked:
            self.requests.put(owner, str(contact), None)

    # -- what our user says

    @presence("subscribe unsubscribe subscribed unsubscribed")
    def tell(self, session: Session, stanza: Stanza) -> None:
        """§3.1.2, §3.1.5, §3.2.2, §3.3.2: between bare JIDs, whatever the client has written."""
        owner, contact = session.bare, JID.parse(stanza.get("to") or _missing("to")).bare
        if contact == owner:
            raise StanzaError("not-allowed", "nobody subscribes to themselves")
        type = stanza.attrib["type"]
        if type == "subscribe" and contact.domain not in self.server.domains:
            raise StanzaError("remote-server-not-found")  # §3.1.2: before anything is changed
        old = self.relation(owner, contact)
        new = OUTBOUND[type].get(old, old)
        self._tellers[type](owner, contact, old, new, stanza.addressed(to=str(contact), sender=str(owner)))

    def _seek(self, owner: JID, contact: JID, old: Relation, new: Relation, stanza: Stanza) -> None:
        """§3.1.2, §3.3.2. The state changes first: a contact here answers within this very call."""
        self._move(owner, contact, new)
        self.server.route(stanza, contact)

    def _allow(self, owner: JID, contact: JID, old: Relation, new: Relation, stanza: Stanza) -> None:
        """§3.1.5, or §3.4.2: what nobody has asked for is allowed in advance."""
        if new is not old:
            self._move(owner, contact, new)
            self.server.emit(stanza)
            self.broadcast.show(owner, contact)
        elif old not in SEEING_US and not self.is_approved(owner, contact):
            self.roster.change(owner, contact, approved=True)

    def _deny(self, owner: JID, contact: JID, old: Relation, new: Relation, stanza: Stanza) -> None:
        """§3.2.2: who could see us sees us go first; an approval in advance is withdrawn in any state."""
        if old in SEEING_US:
            self.broadcast.hide(owner, contact)
        if new is not old:
            self.server.emit(stanza)
        withdrawn = {"approved": False} if self.is_approved(owner, contact) else {}
        self._move(owner, contact, new, **withdrawn)

    def end_relation(self, owner: JID, contact: JID, item: Mapping[str, Any]) -> None:
        """§2.5.2: the item of a contact is gone; tell the contact what this ends."""
        if item["subscription"] in ("from", "both"):
            self.broadcast.hide(owner, contact)
            self._emit("unsubscribed", owner, contact)
        if item["subscription"] in ("to", "both") or item.get("ask"):
            self._emit("unsubscribe", owner, contact)

    def _emit(self, type: str, owner: JID, contact: JID, id: str | None = None) -> None:
        stanza = Stanza(PRESENCE, {"type": type, "from": str(owner), "to": str(contact)})
        if id is not None:
            stanza.set("id", id)
        self.server.emit(stanza)

    # -- what a contact says

    @subscription("subscribe unsubscribe subscribed unsubscribed")
    def hear(self, to: JID, stanza: Stanza) -> None:
        """§3.1.3, §3.1.6, §3.2.3, §3.3.3: change the state and deliver, or ignore. Nobody's account ignores all."""
        owner, contact = to.bare, JID.parse(stanza.get("from", "")).bare
        if owner not in self.server.accounts:
            return
        stanza = stanza.addressed(to=str(owner), sender=str(contact))
        type = stanza.attrib["type"]
        old = self.relation(owner, contact)
        new = INBOUND[type].get(old, old)
        if type == "subscribe":
            self._hear_request(owner, contact, old, new, stanza)
        elif new is not old:
            self._hear_answer(owner, contact, old, new, stanza)

    def _hear_request(self, owner: JID, contact: JID, old: Relation, new: Relation, stanza: Stanza) -> None:
        """§3.1.3: answered by the server if it is allowed already, else kept and put before the user."""
        if old in SEEING_US or self.is_approved(owner, contact):
            self._move(owner, contact, OUTBOUND["subscribed"].get(new, new))
            self._emit("subscribed", owner, contact, stanza.get("id"))
            return self.broadcast.show(owner, contact)  # also to who asks again: it has lost what it knew
        if new is old or len(self.requests.items(owner)) >= self.server.config.limits.requests:
            return
        if len(stanza.content) > MAX_REQUEST_BYTES:
            stanza = Stanza(PRESENCE, stanza.attrib)  # laxer than §3.1.3: the request counts, not a letter with it
        self.requests.put(owner, str(contact), stanza.wire().decode())
        for session in self.server.sessions(owner):
            if session.presence is not None:
                session.send(stanza)

    def _hear_answer(self, owner: JID, contact: JID, old: Relation, new: Relation, stanza: Stanza) -> None:
        """§3.1.6, §3.2.3, §3.3.3: delivered before the push, so that clients know what the push is about."""
        if self.roster.item(owner, contact) is None:
            return self._move(owner, contact, new)  # §3.3.3: a stranger takes a request back; nobody hears of it
        self._deliver(owner, stanza)
        self._move(owner, contact, new)
        if stanza.get("type") == "unsubscribe":
            if old in SEEING_US:
                self.broadcast.hide(owner, contact)
            self._emit("unsubscribed", owner, contact)  # A.3.2

    def _deliver(self, owner: JID, stanza: Stanza) -> None:
        for session in self.server.sessions(owner):
            if ROSTER in session.interested:
                session.send(stanza)

    @subscription("error")
    def hear_error(self, to: JID, stanza: Stanza) -> None:
        """Errors for a bare JID answer a request or a probe; nothing else that can fail leaves from there.

        §3.1.2: the user hears why a request has not arrived. RFC 3921 §5.1.3: a server of that
        time that refuses a probe means `unsubscribed`. Clients don't speak for bare JIDs.
        """
        contact, condition = JID.parse(stanza.get("from", "")), error_condition(stanza)
        if contact.resource or stanza.find(CLIENT("error")) is None:
            return
        if self.relation(to, contact).value[1]:
            self._deliver(to, stanza)
        elif condition in ("forbidden", "not-authorized"):
            self.hear(to, Stanza(PRESENCE, {"type": "unsubscribed", "from": str(contact), "to": str(to)}))

    # -- events

    def presence_changed(self, session: Session, old: Stanza | None, new: Stanza | None) -> None:
        """§3.1.3: requests are put before each resource that becomes available, until one answers.

        §3.1.2: ours that nobody has answered leave again; the first may have been lost.
        """
        if old is not None or new is None:
            return
        for request in parse_elements(self.requests.items(session.bare).values()):
            assert isinstance(request, Stanza)
            session.send(request)
        for contact, item in list(self.roster.contacts(session.bare)):
            if item.get("ask") and not self.server.hides(session.bare, JID.parse(contact), session, ""):
                self._emit("subscribe", session.bare, JID.parse(contact), secrets.token_urlsafe(9))

    def account_removed(self, owner: JID) -> None:
        """End every relation, or the next owner of the name would inherit them all."""
        contacts = dict(self.roster.contacts(owner))
        del self.server.rosters[owner]  # first, so that nothing below finds anything to answer for
        for contact, item in contacts.items():
            self.end_relation(owner, JID.parse(contact), item)
        for contact in list(self.requests.items(owner)):
            self._emit("unsubscribed", owner, JID.parse(contact))
        for host in self.server.config.hosts:
            for other in list(self.server.rosters.owners(host)):
                self._forget(other, owner)

    def _forget(self, owner: JID, gone: JID) -> None:
        """Take back what `owner` has allowed to an account that is no more, even if the two halves disagreed."""
        item = self.roster.item(owner, gone)
        if item is not None and (item["subscription"] != "none" or item.get("ask") or item.get("approved")):
            self.roster.change(owner, gone, subscription="none", ask=False, approved=False)


# -- presence

MAX_LAST_STATUS = 1000  # characters kept of the last goodbye; people write a line


class PresenceBroadcast(Feature):
    """Exchanging presence (RFC 6121 §4): broadcasts, probes, directed presence.

        C: <presence><show>away</show></presence>
        S: <presence from='romeo@example.org/orchard' to='juliet@example.org'><show>away</show></presence>

    Documents: "last", by account: `{"at": stamp, "status": text}` of when the last resource
    became unavailable (also for XEP-0012). Who is available now is known by the sessions.
    """

    namespace = CLIENT

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.last = server.storage.documents("last", dict)

    @property
    def roster(self) -> Roster:
        """The rosters, which say who sees whom."""
        return self.server.registry.feature(Roster)

    # -- what our user says

    @presence("available")
    def available(self, session: Session, stanza: Stanza) -> None:
        """§4.2, §4.4: tell everybody who may know; the first time also ask and deliver what has waited."""
        priority = presence_priority(stanza)
        old, session.presence, session.priority = session.presence, stanza, priority
        if old is None or session.ranked[1] != priority:
            session.ranked = (time.time(), priority)
        self._broadcast(session, stanza)
        if old is None:
            self._introduce(session)
        for event in self.server.registry.listeners("presence_changed"):
            event(session, old, stanza)

    @presence("unavailable")
    def unavailable(self, session: Session, stanza: Stanza) -> None:
        """§4.5: the same audience, and all who got directed presence."""
        self._leave(session, stanza)
        session.send(stanza.addressed(to=session.full))

    def session_ended(self, session: Session) -> None:
        """§4.5.2: what the client had no time to say, its server says."""
        self._leave(session, Stanza(PRESENCE, {"type": "unavailable", "from": session.full}))

    def _leave(self, session: Session, stanza: Stanza) -> None:
        old, session.presence, session.priority = session.presence, None, 0
        directed, session.directed = session.directed, {}
        told = set() if old is None else self._broadcast(session, stanza)
        for address in directed:
            if str(JID.parse(address).bare) not in told:
                self.server.emit(stanza.addressed(to=address))
        if old is None:
            return
        if not any(other.presence is not None for other in self.server.sessions(session.bare)):
            self._note_last(session.bare, child_text(stanza, CLIENT("status")))
        for event in self.server.registry.listeners("presence_changed"):
            event(session, old, None)

    def _note_last(self, owner: JID, status: str) -> None:
        # Not while the account is being removed; and who leaves a server that can store nothing leaves all the same.
        if owner in self.server.accounts and not self.server.storage.failed:
            self.last[owner] = {"at": stamp(), "status": status[:MAX_LAST_STATUS]}

    def _broadcast(self, session: Session, stanza: Stanza) -> set[str]:
        """Send to subscribed contacts, then to one's own available resources (§4.2.2); return who was told."""
        told = {contact for contact, _item in self.roster.contacts(session.bare, "from", "both")}
        for contact in told:
            if not self.server.hides(session.bare, JID.parse(contact), session):
                self.server.emit(stanza.addressed(to=contact))
        for own in self.server.sessions(session.bare):
            if own.presence is not None:
                own.send(stanza.addressed(to=own.full))
        return told | {str(session.bare)}

    def _introduce(self, session: Session) -> None:
        """§4.2.2, §4.3.1: show a new resource its siblings, and probe the contacts that we see."""
        for sibling in self.server.sessions(session.bare):
            if sibling is not session and sibling.presence is not None:
                session.send(sibling.presence.addressed(to=session.full))
        for contact, _item in list(self.roster.contacts(session.bare, "to", "both")):
            jid = JID.parse(contact)
            probe = {"type": "probe", "from": session.full, "to": contact}
            if not isinstance(self.server.domains.get(jid.domain), Host):
                probe["from"] = str(session.bare)  # §4.3; here at home only the newcomer needs the answer
            if not self.server.hides(session.bare, jid, session, ""):
                self.server.emit(Stanza(PRESENCE, probe))

    @presence("directed")
    def direct(self, session: Session, stanza: Stanza) -> None:
        """§4.6: to one address only; remembered, so that it is told when the resource goes."""
        to = JID.parse(stanza.attrib["to"])
        if stanza.get("type") == "unavailable":
            session.directed.pop(str(to), None)
        elif str(to) not in session.directed and len(session.directed) >= self.server.config.limits.directed:
            raise StanzaError("policy-violation", "directed presence to too many addresses")
        else:
            presence_priority(stanza)
            session.directed[str(to)] = None
        self.server.route(stanza, to)

    @presence("probe error")
    def pass_on(self, session: Session, stanza: Stanza) -> None:
        """§4.3: a client's own probe never causes it an error."""
        if stanza.get("to"):
            self.server.emit(stanza)

    # -- what others ask

    @subscription("probe")
    def probed(self, to: JID, stanza: Stanza) -> None:
        """§4.3.2: answered for subscribers; `unsubscribed` for all others, whether there is an account or not."""
        owner, prober = to.bare, JID.parse(stanza.get("from", ""))
        id = stanza.get("id")
        asked_for = [session for session in self.server.sessions(owner) if to in (owner, session.jid)]
        if self.server.sees(prober, owner):
            visible = [session for session in asked_for if not self.server.hides(owner, prober, session)]
            if visible or not self.server.hides(owner, prober):  # also "unavailable" would tell (XEP-0016 §2.11)
                self._answer_subscriber(visible, to, prober, id)
        elif holding := [session for session in asked_for if session.directed.keys() & {str(prober), str(prober.bare)}]:
            for session in holding:  # §4.6.6: who holds it, not who shares a room with it; only whether it is there
                self._reply(Stanza(PRESENCE, {"from": session.full}), prober, id)
        else:
            self._reply(Stanza(PRESENCE, {"type": "unsubscribed", "from": str(owner)}), prober.bare, id)

    def _answer_subscriber(self, asked_for: Sequence[Session], to: JID, prober: JID, id: str | None) -> None:
        """§4.3.2: the last presence of each resource, with its own id; of one that was asked for, only that it is."""
        available = [(session, session.presence) for session in asked_for if session.presence is not None]
        for session, presence in available:
            if to.resource:
                self._reply(Stanza(PRESENCE, {"from": session.full}), prober, id)
            elif session.jid != prober:
                self._reply(presence.addressed(), prober, None)
        if not available:
            self._reply(self._absence(to), prober, id)

    def _absence(self, of: JID) -> Stanza:
        """§4.3.2: unavailable; of an account with the moment and the status of its last goodbye."""
        absence = Stanza(PRESENCE, {"type": "unavailable", "from": str(of)})
        last = None if of.resource else self.last.get(of)
        if last is not None:
            if last["status"]:
                absence.add(E(CLIENT("status"), None, last["status"]))
            absence.add(E(DELAY("delay"), {"from": str(of), "stamp": last["at"]}))
        return absence

    def _reply(self, stanza: Stanza, prober: JID, id: str | None) -> None:
        stanza.set("to", str(prober))
        if id is not None:
            stanza.set("id", id)
        self.server.emit(stanza)

    # -- changes of who may see whom

    def show(self, owner: JID, contact: JID) -> None:
        """§3.1.5: a new subscriber learns who of the owner's resources is there."""
        for session in self.server.sessions(owner):
            if session.presence is not None and not self.server.hides(owner, contact, session):
                self.server.emit(session.presence.addressed(to=str(contact)))

    def hide(self, owner: JID, contact: JID) -> None:
        """§3.2.2, §3.3.3: to a former subscriber all resources go, directed presence or not (§4.6.1)."""
        for session in self.server.sessions(owner):
            if session.presence is not None:
                gone = {"type": "unavailable", "from": session.full, "to": str(contact)}
                self.server.emit(Stanza(PRESENCE, gone))
                for address in [address for address in session.directed if JID.parse(address).bare == contact]:
                    del session.directed[address]

    # -- filters

    @only(PRESENCE)
    def delivering(self, session: Session, stanza: Stanza) -> Stanza | None:
        """§4.6.1: who tells us that it has gone need not hear that we go."""
        if session.directed and stanza.get("type") == "unavailable":
            session.directed.pop(stanza.get("from", ""), None)
        return stanza


def presence_priority(stanza: Stanza) -> int:
    """Return the priority, -128 to 127, 0 if none is given; raises StanzaError("bad-request") (§4.7.2.3)."""
    text = child_text(stanza, CLIENT("priority")).strip() or "0"
    if not re.fullmatch("[+-]?[0-9]{1,3}", text) or not -128 <= int(text) <= 127:
        raise StanzaError("bad-request", "a priority is a whole number from -128 to 127")
    return int(text)


# ==== 16. Messages at rest, and their copies (XEP-0160, XEP-0313, XEP-0280) ====
#
# What happens to a message when nobody is there to read it? It waits in a log, one per
# account, and is delivered when a resource with a priority that isn't negative becomes
# available, stamped with the moment at which it had arrived:
#
#     <message from='romeo@example.org/orchard' to='juliet@example.org' type='chat'>
#       <body>Art thou not Romeo?</body>
#       <delay xmlns='urn:xmpp:delay' from='example.org' stamp='2026-11-22T14:00:00Z'/>
#     </message>
#
# A message leaves the log only when the client has acknowledged it (XEP-0198), or, of a
# client that doesn't do so, when the connection has handed it to the operating system; a
# crash in between delivers it twice, which is better than never.

PASSING = frozenset({HINTS, CHAT_STATES})  # payloads that are worth nothing later
CLAIMS = {DELAY("delay"): "from", STANZA_ID("stanza-id"): "by"}  # who says so, in what `speaks_for` is about


def is_worth_keeping(message: Stanza) -> bool:
    """Tell whether a message should wait for its reader (XEP-0160 §3, XEP-0334)."""
    hints = {local_name(child.tag) for child in message if namespace_of(child.tag) == HINTS}
    if hints & {"no-store", "no-storage"}:
        return False
    if "store" in hints or message.find(CLIENT("body")) is not None:
        return True
    content = [child for child in message if child.tag != CLIENT("thread") and namespace_of(child.tag) not in PASSING]
    return bool(content)


def speaks_for(owner: JID, child: Element) -> bool:
    """Whether an element claims to come from the account or its server, which add theirs themselves.

    Such are the moment at which a message reached us (XEP-0203 §5) and the id that it has
    here (XEP-0359 §6). A client that believes ours must not meet a forged one.
    """
    claimed = CLAIMS.get(child.tag)
    if claimed is None:
        return False
    try:
        return JID.parse(child.get(claimed, "")) in (owner, JID("", owner.domain, ""))
    except StanzaError:
        return False


def add_delay(message: Stanza, domain: str, at: str) -> None:
    """Note when a message reached us (XEP-0203), unless we have noted it before."""
    if not any(child.tag == DELAY("delay") and child.get("from") == domain for child in message):
        message.add(E(DELAY("delay"), {"from": domain, "stamp": at}))


class OfflineMessages(Feature):
    """Offline messages (XEP-0160), stamped by XEP-0203, with the hints of XEP-0334.

        C: <presence/>
        S: <message …><body>…</body><delay xmlns='urn:xmpp:delay' from='example.org' stamp='…'/></message>

    Log: "offline", by account: `{"at": stamp, "stanza": XML}`.
    """

    namespace = "msgoffline"  # not a URI: XEP-0160 §4
    server_features = ("msgoffline",)

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.waiting = server.storage.log("offline")
        # Whose messages are on their way to which session. Weak: a connection that breaks forgets its
        # `when_sent`, and then nothing but this would keep the session alive.
        self._flushing: WeakValueDictionary[JID, Session] = WeakValueDictionary()

    def arriving(self, owner: JID, stanza: Stanza) -> Stanza | None:
        """XEP-0203 §5: only we say when something came to us (threats S43, S44)."""
        if not CLAIMS.keys().isdisjoint([child.tag for child in stanza]):  # in C, for most have none
            stanza.discard(functools.partial(speaks_for, owner))
        return stanza

    def undelivered(self, owner: JID, stanza: Stanza) -> Stanza | None:
        """§3: keep it, drop it silently when it is worth nothing later, or give it back when there is no room."""
        if not is_worth_keeping(stanza):
            return None
        if not self._has_room(owner, stanza):
            return stanza
        self.waiting.append(owner, {"at": stamp(), "stanza": stanza.wire().decode()})
        return None

    def _has_room(self, owner: JID, stanza: Stanza) -> bool:
        """Whether the number and the bytes stay in their limits: all must fit into the queue of one client."""
        limits = self.server.config.limits
        size = self.waiting.size(owner) + len(stanza.content)
        return self.waiting.count(owner) < limits.offline and size < limits.unread // 2

    def presence_changed(self, session: Session, old: Stanza | None, new: Stanza | None) -> None:
        """§2: deliver everything, in order, to the first resource that wants messages."""
        owner = session.bare
        if new is None or session.priority < 0 or self._flushing.get(owner) in self.server.sessions(owner):
            return
        records = self.waiting.read(owner)
        if not records:
            return
        for record in records:
            self._deliver(session, record)
        self._flushing[owner] = session
        session.when_delivered(functools.partial(self._sent, session, len(records)))

    def _deliver(self, session: Session, record: Mapping[str, str]) -> None:
        try:
            message = parse_element(record["stanza"])
        except StreamError as error:  # edited by hand, or older than a stricter rule
            return log.error("a message waiting for %s cannot be read (%s): dropped", session.bare, error.condition)
        assert isinstance(message, Stanza)
        add_delay(message, session.jid.domain, record["at"])
        session.send(message)

    def _sent(self, session: Session, amount: int) -> None:
        """The messages are there, so far as we can know; unless another session got them meanwhile, that was all."""
        if self._flushing.get(session.bare) is session:
            del self._flushing[session.bare]
            if not self.server.storage.failed:  # then they come once more, which is better than never
                self.waiting.drop(session.bare, amount)

    def account_removed(self, owner: JID) -> None:
        """What was on its way is no longer in the log; the next owner of the name has a log of their own."""
        self._flushing.pop(owner, None)


# -- the archive
#
# What was said is also kept for good, or as long as `[archive] keep` says: then a new phone
# can fetch what the old one has shown, and two devices agree. An account's archive has what
# it sent and what reached it, each message once, however many devices took part:
#
#     C: <iq type='set' id='q1'><query xmlns='urn:xmpp:mam:2' queryid='f27'/></iq>
#     S: <message …><result xmlns='urn:xmpp:mam:2' queryid='f27' id='06429…'><forwarded …>…</result></message>
#     S: <iq type='result' id='q1'><fin xmlns='urn:xmpp:mam:2' complete='true'><set …>…</set></fin></iq>
#
# The id of a message is made of the microsecond of its arrival and 64 random bits, in
# hexadecimal. So ids increase, even when the clock is set back; they tell nothing but the
# time; and a page is found by bisecting the file of a month, with no index to keep:
#
#     archive/alice/2026-11.jsonl
#     {"id":"06429c0b1f2a3c…","at":"2026-11-22T14:00:00Z","with":"bob@example.org/car","stanza":"<message …"}
#
# The same id is told to everybody who gets the message, as `<stanza-id/>`: live, later from
# the offline messages, or as a carbon copy. Looking for one person's messages goes through
# the files for that address [measured: 80 MB in 60 ms], in slices of the loop's turns.
#
# A message that its author takes back (XEP-0424) leaves a *tombstone*: the record is
# amended, its words are gone from the disk, and `"gone"` is the id of the retraction.

ARCHIVE_ID = re.compile("[0-9a-f]{30}")  # 14 digits are microseconds since 1970, the others random
LAST_ID = b"~"  # behind every id
ARCHIVE_PAGE, MAX_ARCHIVE_PAGE = 50, 250  # messages; as ejabberd
MAX_ARCHIVE_PAGE_BYTES = 512 * 1024  # of one page: it must fit into the queue of a client
MAX_LEDGERS = 20_000  # archives whose newest id is in memory, 400 bytes each
RETRACTION_SLICES = 10  # of a turn's work that are spent on finding a message which its author takes back
MAX_RETRACTIONS = 1000  # waiting to be carried out: the messages of more remain, as do their retractions
PURGE_INTERVAL = 24 * 3600.0  # seconds between two looks for what is older than the archive keeps

UNARCHIVED_TYPES = frozenset({"groupchat", "headline", "error"})  # rooms have archives of their own (§6.1.1)
UNARCHIVED = frozenset({HINTS("no-store"), HINTS("no-storage"), HINTS("no-permanent-store"),
                        HINTS("no-permanent-storage")})  # XEP-0334 §4.1, §4.2, and two of its old names  # fmt: skip
ARCHIVED = frozenset({  # a message with one of these says something that other devices must not miss
    CLIENT("body"), CLIENT("subject"), HINTS("store"), RECEIPTS("received"), CHAT_MARKERS("received"),
    CHAT_MARKERS("displayed"), CHAT_MARKERS("acknowledged"), REACTIONS("reactions"), RETRACT("retract"),
    *(namespace("encrypted") for namespace in ENCRYPTED), OPENPGP("openpgp"),
    *map(CALLS, ("propose", "accept", "proceed", "reject", "retract", "finish")),
})  # fmt: skip


def is_invitation(message: Element) -> bool:
    """Whether it asks somebody into a room: directly (XEP-0249) or through it (XEP-0045 §7.8.2)."""
    mediated = f"{MUC_USER('x')}/{MUC_USER('invite')}"
    return message.find(DIRECT_INVITE("x")) is not None or message.find(mediated) is not None


def is_worth_archiving(message: Stanza) -> bool:
    """Whether a message says something, and wants to be remembered (XEP-0313 §6.1.1, XEP-0334).

    Typing notices, requests for receipts and the like are worth nothing afterwards.
    """
    tags = {child.tag for child in message}
    if not tags.isdisjoint(UNARCHIVED):
        return False
    if not tags.isdisjoint(ARCHIVED):
        return True
    return is_invitation(message)


def add_stanza_id(message: Stanza, by: str, id: str) -> None:
    """Tell under which id the archive of `by` has a message (XEP-0359)."""
    message.add(Element(STANZA_ID("stanza-id"), {"by": by, "id": id}),
                f"<stanza-id xmlns='{STANZA_ID}' by='{escape_attribute(by)}' id='{id}'/>")  # fmt: skip


@functools.lru_cache(64)
def month_of(moment: int) -> str:
    """Return the month of a moment, in seconds since 1970: a part of an archive."""
    return time.strftime("%Y-%m", time.gmtime(moment))


def _part(owner: JID, month: str) -> JID:
    return JID(owner.local, owner.domain, month)


@functools.lru_cache(16)
def stamp_of(second: int) -> str:
    """Return `stamp(second)`; in busy times many messages share one."""
    return stamp(second)


def moment_of(id: str) -> int:
    """Return the moment that an archive id names, in microseconds since 1970."""
    return int(id[:14], 16)


def first_id_at(moment: datetime) -> bytes:
    """Return what no id of a message is smaller than whose stamp, in whole seconds, is `moment` or later (§4.1.2)."""
    seconds = -(-moment.timestamp() // 1)
    return b"%014x" % (min(max(int(seconds), 0), 2**33) * 1_000_000)


def lower_bound(reader: LogReader, key: bytes) -> int:
    """Return the offset of the first record whose id is not smaller than `key`: bisection of a file."""
    if key == LAST_ID:
        return reader.end
    low, high, found = reader.start, reader.end if key else reader.start, reader.end if key else reader.start
    while low < high:  # what is looked for begins between these two, or is `found`
        middle = (low + high) // 2
        place = reader.next_line(middle)
        if place < found and reader.read(place, 64)[7:37] < key:
            low = reader.next_line(place + 1)
        else:
            high, found = middle, min(place, found)
    return found


def lines_with(block: bytes, needle: bytes, *, backward: bool) -> Iterable[bytes]:
    """Return the lines of a block that contain `needle`, or all."""
    lines = block.split(b"\n")[:-1] if not needle else list(_lines_around(block, needle))
    return reversed(lines) if backward else lines


def _lines_around(block: bytes, needle: bytes) -> Iterator[bytes]:
    place = block.find(needle)
    while place >= 0:
        end = block.index(b"\n", place)
        yield block[block.rfind(b"\n", 0, place) + 1 : end]
        place = block.find(needle, end)


@dataclass(slots=True)
class Ledger:
    """What memory knows of one archive: its months, the newest of them, its newest id, its size in bytes."""

    months: list[str]
    part: JID
    latest: int  # the moment of the newest id, in microseconds since 1970
    bytes: int


@dataclass(slots=True, frozen=True)
class Selection:
    """Which messages of an archive are wanted: `low` <= id < `high`, with `contact` if there is one."""

    low: bytes = b""
    high: bytes = LAST_ID
    contact: JID | None = None
    ids: tuple[str, ...] = ()
    maximum: int = ARCHIVE_PAGE  # 0: only their number
    backward: bool = False  # the last ones of these

    def holds(self, record: Mapping[str, str], owner: JID) -> bool:
        """§4.1.1: a bare address stands for all its resources; one's own bare address for messages to oneself."""
        contact = self.contact
        if contact is None:
            return True
        if contact.bare == owner and contact.resource:
            return f"'{escape_attribute(str(contact))}'" in record["stanza"].partition(">")[0]
        other = record.get("with", "")
        return other == str(contact) or (not contact.resource and other.startswith(f"{contact}/"))

    def needle(self, owner: JID) -> bytes:
        """What stands in the line of every record that fits, as JSON."""
        if self.contact is None:
            return b""
        if self.contact.bare == owner and self.contact.resource:
            return encode_json(escape_attribute(str(self.contact)))[1:-1]
        return b'"with":' + encode_json(str(self.contact))[:-1]


class ArchivePage(NamedTuple):
    """Records in the order of time, whether there are no more in this direction, and their number if it is known."""

    records: Sequence[Mapping[str, str]]
    is_complete: bool
    total: int | None = None


class Archives:
    """The archives of one kind, accounts' or rooms', by owner: what is in the files, with no rules of any protocol.

    A record is `{"id": …, "at": stamp, "with": the other's address, "stanza": XML}`; that of a
    tombstone has no `at`, and the id of the retraction as `gone`.
    """

    def __init__(self, storage: Storage, kind: str) -> None:
        self.log = storage.log(kind)
        self._ledgers: dict[JID, Ledger] = {}
        self._quoted: tuple[Stanza, bytes, bytes] | None = None  # a stanza, its content, and both as JSON

    def append(self, owner: JID, other: str, stanza: Stanza, most: int) -> str:
        """Add a message and return its id; the oldest go when there are more than `most` bytes."""
        ledger = self._ledger(owner)
        moment = max(time.time_ns() // 1000, ledger.latest + 1)
        id = f"{moment:014x}{secrets.token_hex(8)}"
        if (month := month_of(moment // 1_000_000)) != ledger.part.resource:
            ledger.part = _part(owner, month)
            ledger.months.append(month)
        line = b'{"id":"%b","at":"%b","with":%b,"stanza":%b}' % (
            id.encode(), stamp_of(moment // 1_000_000).encode(), encode_json(other), self._quote(stanza))  # fmt: skip
        self.log.append_line(ledger.part, line)
        ledger.latest = moment
        ledger.bytes += len(line) + 1
        if ledger.bytes > most:
            self._shrink(owner, ledger)
        return id

    def _quote(self, stanza: Stanza) -> bytes:
        """Return a stanza as JSON: mostly two archives in turn want the same."""
        last = self._quoted
        if last is not None and last[0] is stanza and last[1] is stanza.content:
            return last[2]
        quoted = encode_json(stanza.wire().decode())
        self._quoted = (stanza, stanza.content, quoted)
        return quoted

    def _ledger(self, owner: JID) -> Ledger:
        ledger = self._ledgers.get(owner)
        if ledger is None:
            if len(self._ledgers) >= MAX_LEDGERS:
                self._ledgers.clear()
            months = self.log.parts(owner)
            size = sum(self.log.size(_part(owner, month)) for month in months)
            part = _part(owner, months[-1] if months else "-")
            self._ledgers[owner] = ledger = Ledger(months, part, 0, size)
            if newest := self.edge(owner, last=True):
                ledger.latest = moment_of(newest["id"])
        return ledger

    def forget(self, owner: JID) -> None:
        """The owner is gone, or its files have changed."""
        self._ledgers.pop(owner, None)

    def edge(self, owner: JID, *, last: bool) -> Mapping[str, str] | None:
        """Return the oldest record, or the last; None if there is none."""
        for line in self.scan(owner, Selection(backward=last), b""):
            if line is not None:
                record: Mapping[str, str] = json.loads(line)
                return record
        return None

    def find(self, owner: JID, id: str) -> tuple[JID, int, bytes] | None:
        """Return the part, the offset and the line of a record, or None if there is none of that id."""
        if not ARCHIVE_ID.fullmatch(id) or (month := month_of(moment_of(id) // 1_000_000)) not in self._months(owner):
            return None
        part = _part(owner, month)
        with contextlib.closing(self.log.reader(part)) as reader:
            place = lower_bound(reader, id.encode())
            line = reader.line(place) if place < reader.end else b""
        return (part, place, line) if line[7:37] == id.encode() else None

    def get(self, owner: JID, id: str) -> Mapping[str, str] | None:
        """Return a record by its id."""
        found = self.find(owner, id)
        return None if found is None else json.loads(found[2])

    def _months(self, owner: JID) -> list[str]:
        return self._ledger(owner).months

    def select(self, owner: JID, wanted: Selection) -> Generator[None, None, ArchivePage]:
        """Return a page; yields when a slice is used up."""
        found = self._chosen(owner, wanted) if wanted.ids else self.scan(owner, wanted, wanted.needle(owner))
        records: list[Mapping[str, str]] = []
        size = total = 0
        is_complete = True
        with contextlib.closing(found):
            for line in found:
                if line is None:
                    yield
                    continue
                if not wanted.maximum and wanted.contact is None:
                    total += 1
                    continue
                record = json.loads(line)
                if not wanted.holds(record, owner):
                    continue
                total, size = total + 1, size + len(line)
                if wanted.maximum and (len(records) == wanted.maximum or (records and size > MAX_ARCHIVE_PAGE_BYTES)):
                    is_complete = False
                    break
                if wanted.maximum:
                    records.append(record)
        if wanted.backward:
            records.reverse()
        return ArchivePage(records, is_complete, total if is_complete else None)

    def _chosen(self, owner: JID, wanted: Selection) -> Generator[bytes | None, None, None]:
        """Yield the records of single ids, in the order of time; raises StanzaError("item-not-found")."""
        for number, id in enumerate(sorted(set(wanted.ids), reverse=wanted.backward)):
            if number % 20 == 19:
                yield None
            found = self.find(owner, id)
            if found is None:
                raise StanzaError("item-not-found", "one of the messages is not in this archive")
            if wanted.low <= id.encode() < wanted.high:
                yield found[2]

    def scan(self, owner: JID, wanted: Selection, needle: bytes) -> Generator[bytes | None, None, None]:
        """Yield the lines that contain `needle`, in order; None when a slice is used up: then what follows may wait."""
        months = self._months(owner)
        for month in reversed(months) if wanted.backward else list(months):
            low, high = wanted.low, wanted.high
            while low < high:
                until = time.monotonic() + SLICE_SECONDS
                with contextlib.closing(self.log.reader(_part(owner, month))) as reader:
                    first, last = lower_bound(reader, low), lower_bound(reader, high)
                    for _offset, block in reader.blocks(first, last, backward=wanted.backward):
                        yield from lines_with(block, needle, backward=wanted.backward)
                        if time.monotonic() > until:  # go on by the id, as files may change meanwhile
                            newest = block[block.rfind(b"\n", 0, -1) + 8 :][:30]
                            low, high = (low, block[7:37]) if wanted.backward else (newest + LAST_ID, high)
                            break
                    else:
                        break
                yield None

    def _shrink(self, owner: JID, ledger: Ledger) -> None:
        """Drop the oldest month, or the older half of the only one (§3.2: never one from the middle)."""
        part = _part(owner, ledger.months[0])
        with contextlib.closing(self.log.reader(part)) as reader:
            is_only = len(ledger.months) == 1
            offset = reader.next_line((reader.start + reader.end) // 2) if is_only else reader.end
        self.log.drop_before(part, offset)
        self.forget(owner)

    def purge(self, owner: JID, before: bytes) -> None:
        """Drop the records whose id is smaller than `before`."""
        for month in list(self._months(owner)):
            if month > month_of(int(before[:14], 16) // 1_000_000):
                return
            part = _part(owner, month)
            with contextlib.closing(self.log.reader(part)) as reader:
                offset = lower_bound(reader, before)
            self.log.drop_before(part, offset)
            self.forget(owner)

    def bury(self, owner: JID, id: str, retraction: str, keep: Callable[[Element], bool] = lambda child: False) -> bool:
        """Leave a tombstone where the message `id` was, with those children that `keep` wants (XEP-0424 §4).

        It is never longer than the message: what names the retraction takes less room than
        the moment, which the id tells too, and the shortest body.
        """
        found = self.find(owner, id)
        if found is None or "gone" in (record := json.loads(found[2])):
            return found is not None
        part, offset, line = found
        message = parse_element(record.pop("stanza"))
        record.pop("at", None)
        shell = Stanza(MESSAGE, {key: value for key, value in message.attrib.items() if key != XML_LANG})
        shell.extend(child for child in message if keep(child))
        for tombstone in (shell, Stanza(MESSAGE, shell.attrib)):  # the shortest will do in any case
            buried = {**record, "gone": retraction, "stanza": tombstone.wire().decode()}
            if len(encode_json(buried)) < len(line):
                self.log.amend(part, offset, len(line), buried)
                break
        return True

    def moment(self, record: Mapping[str, str]) -> str:
        """Return when a message came, as XEP-0082 writes it."""
        return record.get("at") or stamp_of(moment_of(record["id"]) // 1_000_000)

    def message(self, owner: JID, record: Mapping[str, str]) -> str:
        """Return the XML of a message, or of its tombstone (XEP-0424 §4, XEP-0425 §4), to stand in a foreign parent."""
        xml = self._tombstone(owner, record) if "gone" in record else record["stanza"]
        return f"<message xmlns='{CLIENT}'{xml[8:]}"

    def _tombstone(self, owner: JID, record: Mapping[str, str]) -> str:
        found = self.get(owner, record["gone"])
        tombstone = parse_element(record["stanza"])
        retracted = E(RETRACT("retracted"))
        if found is not None:
            retraction = parse_element(found["stanza"])
            retracted.set("id", retraction.get("id", ""))
            retracted.set("stamp", self.moment(found))
            details = retraction.find(RETRACT("retract"))
            retracted.extend(details if details is not None else ())
        tombstone.append(retracted)
        return serialize(tombstone, CLIENT)


# -- asking an archive (XEP-0313 §4)

ARCHIVE_FORM = FormTemplate(MAM, [
    Field("with", "jid-single"), Field("start"), Field("end"), Field("before-id"), Field("after-id"),
    Field("ids", "text-multi"), Field("include-groupchat", "boolean"),
])  # fmt: skip
ARCHIVE_FIELDS = frozenset({FORM_TYPE, *ARCHIVE_FORM.defaults})


def archive_form() -> Element:
    """Return the fields that a query may have (§4.1.5); the list of ids is open, as nobody wants to see all."""
    form = ARCHIVE_FORM.fill().to_element()
    for one in form:
        if one.get("var") == "ids":
            one.set("type", "list-multi")
            one.append(E(DATA_VALIDATE("validate"), {"datatype": "xs:string"}, E(DATA_VALIDATE("open"))))
    return E(MAM("query"), None, form)


def read_archive_form(query: Element) -> Mapping[str, Any]:
    """Return the filters of a query; raises StanzaError (§4.1)."""
    if query.get("node"):
        raise StanzaError("item-not-found", "no nodes are archived")  # §6.1.3
    form = Form.within(query)
    if form is None:
        return {}
    if form.form_type != MAM:
        raise StanzaError("bad-request", f"{FORM_TYPE}: expected {MAM}")
    if unknown := {one.var for one in form.fields} - ARCHIVE_FIELDS:
        raise StanzaError("feature-not-implemented", f"unknown fields: {' '.join(sorted(unknown))}")  # §4.1.5
    return ARCHIVE_FORM.read(form) or {}


def read_moment(values: Mapping[str, Any], name: str) -> datetime | None:
    """Return a moment from the filters; raises StanzaError("bad-request")."""
    if not values.get(name):
        return None
    try:
        return parse_stamp(values[name])
    except (ValueError, OverflowError):
        raise StanzaError("bad-request", f"{name} is a date and time (XEP-0082)") from None


def read_selection(archives: Archives, owner: JID, query: Element) -> Selection:
    """Return what a query wants; raises StanzaError, "item-not-found" for an id that is not there (§4.1.3, §4.3.2)."""
    values, page = read_archive_form(query), PageRequest.parse(query, MAX_ARCHIVE_PAGE)
    if page.index is not None:
        raise StanzaError("feature-not-implemented", "pages are found by ids")  # XEP-0059 §2.6
    lows, highs = [b""], [LAST_ID]
    if (start := read_moment(values, "start")) is not None:
        lows.append(first_id_at(start))
    if (end := read_moment(values, "end")) is not None:
        highs.append(first_id_at(end.replace(microsecond=0) + timedelta(seconds=1)))
    edges = {page.after: lows, values.get("after-id") or "": lows}, {page.before or "": highs,
                                                                      values.get("before-id") or "": highs}  # fmt: skip
    for id, bounds in [item for side in edges for item in side.items() if item[0]]:
        if archives.find(owner, id) is None:
            raise StanzaError("item-not-found", "this message is not in the archive")
        bounds.append(id.encode() + (LAST_ID if bounds is lows else b""))
    maximum = page.maximum if query.find(f"{RSM('set')}/{RSM('max')}") is not None else ARCHIVE_PAGE
    return Selection(max(lows), min(highs), values.get("with"), tuple(values.get("ids") or ()), maximum,
                     page.before is not None)  # fmt: skip


def archive_results(archives: Archives, owner: JID, page: ArchivePage, query: Element) -> Iterator[str]:
    """Yield the `<result/>`s of a page, in the order in which they are to be sent (§4.2, §4.3.4)."""
    queryid = query.get("queryid")
    named = "" if queryid is None else f" queryid='{escape_attribute(queryid)}'"
    is_flipped = query.find(MAM("flip-page")) is not None
    for record in reversed(page.records) if is_flipped else page.records:
        yield (f"<result xmlns='{MAM}'{named} id='{record['id']}'><forwarded xmlns='{FORWARD}'>"
               f"<delay xmlns='{DELAY}' stamp='{archives.moment(record)}'/>{archives.message(owner, record)}"
               f"</forwarded></result>")  # fmt: skip


def archive_end(wanted: Selection, page: ArchivePage) -> Element:
    """Return the `<fin/>` behind the results (§4.3)."""
    ids = [record["id"] for record in page.records] or [""]
    is_all = wanted.low == b"" and wanted.high == LAST_ID
    total = page.total if is_all or not wanted.maximum else None
    fin = E(MAM("fin"), None, page_answer(ids[0], ids[-1], None, total))
    if page.is_complete and wanted.maximum:
        fin.set("complete", "true")
    return fin


def archive_metadata(archives: Archives, owner: JID) -> Element:
    """Return the ids and stamps of the oldest and the newest message (§5)."""
    metadata = E(MAM("metadata"))
    for name, last in (("start", False), ("end", True)):
        if (record := archives.edge(owner, last=last)) is not None:
            metadata.append(E(MAM(name), id=record["id"], timestamp=archives.moment(record)))
    return metadata


def may_retract(message: Element, retraction: Element) -> bool:
    """Whether a retraction is about this message, and by the same person (XEP-0424 §5).

    The bare address tells persons apart, but for private messages of a room its nicknames do.
    A retraction cannot be taken back.
    """
    wanted, sender, other = (retraction.find(RETRACT("retract")), message.get("from", ""), retraction.get("from", ""))
    if wanted is None or message.get("id") != wanted.get("id") or message.find(RETRACT("retract")) is not None:
        return False
    if message.find(MUC_USER("x")) is not None or retraction.find(MUC_USER("x")) is not None:
        return sender == other
    return JID.parse(sender).bare == JID.parse(other).bare


class Archive(Feature):
    """Message Archive Management (XEP-0313) for accounts, with its preferences (XEP-0441) and tombstones (XEP-0424).

        C: <iq type='set' id='q1'><query xmlns='urn:xmpp:mam:2'><set xmlns='…/rsm'><before/></set></query></iq>
        S: <message to='…'><result xmlns='urn:xmpp:mam:2' id='…'><forwarded …>…</forwarded></result></message>
        S: <iq type='result' id='q1'><fin xmlns='urn:xmpp:mam:2' complete='true'><set …>…</set></fin></iq>

    Log: "archive", by account and month (see `Archives`). Documents: "archive-preferences", by
    account: `{"default": "always", "always": [addresses], "never": [addresses]}`.
    """

    namespace = MAM
    account_features = (f"{MAM}#extended", f"{MAM}#groupchat-field", STANZA_ID, RETRACT, f"{RETRACT}#tombstone")
    server_features = (RETRACT,)

    @classmethod
    def is_wanted(cls, config: Config) -> bool:
        """`[archive] enabled`."""
        return config.archive_enabled

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.archives = Archives(server.storage, "archive")
        self.preferences = server.storage.documents("archive-preferences", dict)
        self._retractions: deque[tuple[JID, str]] = deque()  # account and id of those to be carried out
        server.loop.call_later(PURGE_INTERVAL, self._purge)

    # -- keeping

    def sending(self, session: Session, stanza: Stanza) -> Stanza | None:
        """§3.5, XEP-0359 §3: what the account sends; its id is for its own devices, never for the addressee."""
        if stanza.tag != MESSAGE:
            return stanza
        owner = session.bare
        stanza.discard(lambda child: child.tag == STANZA_ID("stanza-id") and speaks_for(owner, child))
        to = stanza.get("to")
        other = owner if to is None else JID.parse(to)
        if other.bare != owner:  # else it arrives, too, and is archived then: once
            stanza.sent_id = self._keep(owner, other, stanza)
        return stanza

    def arriving(self, owner: JID, stanza: Stanza) -> Stanza | None:
        """§3.5: what reaches the account, under an id that everybody is told who gets it."""
        if stanza.tag != MESSAGE or (stanza.get("type") != "chat" and self._is_declined(stanza)):
            return stanza
        id = self._keep(owner, JID.parse(stanza.get("from", "")), stanza)
        if id:
            add_stanza_id(stanza, str(owner), id)
        return stanza

    def _is_declined(self, stanza: Stanza) -> bool:
        """§6.1: what is refused never arrived: a normal message to a resource that is gone (RFC 6121 §8.5.3.2.1)."""
        to = JID.parse(stanza.get("to", ""))
        return bool(to.resource) and self.server.session(to) is None

    def _keep(self, owner: JID, other: JID, stanza: Stanza) -> str:
        """Archive a message, if it should be and the disk takes it, and return its id."""
        if stanza.get("type") in UNARCHIVED_TYPES or not is_worth_archiving(stanza):
            return ""
        if self.server.storage.failed or not self._wants(owner, other):
            return ""
        id = self.archives.append(owner, str(other), stanza, self.server.config.limits.archive_bytes)
        if stanza.find(RETRACT("retract")) is not None and len(self._retractions) < MAX_RETRACTIONS:
            self._retractions.append((owner, id))
            if len(self._retractions) == 1:
                self.server.loop.in_slices(self._retract())
        return id

    def _wants(self, owner: JID, other: JID) -> bool:
        """XEP-0441 §2.3."""
        preferences = self.preferences.get(owner)
        if preferences is None:
            return True
        names = {str(other), str(other.bare)}
        if not names.isdisjoint(preferences["never"]):
            return False
        if not names.isdisjoint(preferences["always"]):
            return True
        default = preferences["default"]
        return bool(default == "always" or (default == "roster" and self.server.knows(other, owner)))

    # -- asking

    @iq("set", MAM("query"), to="self")
    def query(self, request: Iq) -> Slices:
        """§4: the results, then the end."""
        owner, session = request.owner, request.from_session
        wanted = read_selection(self.archives, owner, request.payload)
        page = yield from self.archives.select(owner, wanted)
        for result in archive_results(self.archives, owner, page, request.payload):
            session.send(Stanza(MESSAGE, {"from": str(owner), "to": session.full}, result.encode()))
        return archive_end(wanted, page)

    @iq("get", MAM("query"), to="self")
    def form(self, request: Iq) -> Payload:
        """§4.1.5: what a query may say."""
        return archive_form()

    @iq("get", MAM("metadata"), to="self")
    def metadata(self, request: Iq) -> Payload:
        """§5: the first and the last message."""
        return archive_metadata(self.archives, request.owner)

    @iq("get set", MAM("query"), to="account")
    @iq("get", MAM("metadata"), to="account")
    @iq("get set", MAM("prefs"), to="account")
    def refuse(self, request: Iq) -> Payload:
        """§8.1: nobody else's; the same answer for accounts that don't exist."""
        raise StanzaError("forbidden")

    # -- preferences (XEP-0441)

    @iq("get", MAM("prefs"), to="self")
    def show_preferences(self, request: Iq) -> Element:
        """§2.1."""
        return self._preferences_of(request.owner)

    def _preferences_of(self, owner: JID) -> Element:
        found = self.preferences.get(owner, {"default": "always", "always": [], "never": []})
        lists = (E(MAM(name), None, *(E(MAM("jid"), None, jid) for jid in found[name])) for name in ("always", "never"))
        return E(MAM("prefs"), {"default": found["default"]}, *lists)

    @iq("set", MAM("prefs"), to="self")
    def set_preferences(self, request: Iq) -> Element:
        """§2.1: the whole, which replaces what was."""
        default = request.payload.get("default")
        if default not in ("always", "never", "roster"):
            raise StanzaError("bad-request", "default is always, never or roster")
        lists = {name: self._read_list(request.payload, name) for name in ("always", "never")}
        if sum(map(len, lists.values())) > MAX_ARCHIVE_PREFERENCES:
            raise StanzaError("resource-constraint", f"at most {MAX_ARCHIVE_PREFERENCES} addresses")
        self.preferences[request.owner] = {"default": default, **lists}
        return self._preferences_of(request.owner)

    @staticmethod
    def _read_list(preferences: Element, name: str) -> list[str]:
        found = preferences.iterfind(f"{MAM(name)}/{MAM('jid')}")
        return list(dict.fromkeys(str(JID.parse((jid.text or "").strip())) for jid in found))

    # -- taking back (XEP-0424) and forgetting

    def _retract(self) -> Iterator[None]:
        """Carry out the retractions that wait, in slices: who takes something back doesn't know where it lies here."""
        while self._retractions:
            owner, id = self._retractions[0]
            yield from self._retract_one(owner, id)
            self._retractions.popleft()

    def _retract_one(self, owner: JID, id: str) -> Iterator[None]:
        record = self.archives.get(owner, id)
        if record is None:
            return
        retraction = parse_element(record["stanza"])
        named = retraction.find(RETRACT("retract"))
        wanted = Selection(high=id.encode(), contact=JID.parse(record["with"]).bare, maximum=1, backward=True)
        target = f" id='{escape_attribute('' if named is None else named.get('id', ''))}'"
        slices_left = RETRACTION_SLICES
        with contextlib.closing(self.archives.scan(owner, wanted, encode_json(target)[1:-1])) as found:
            for line in found:
                if line is None:
                    slices_left -= 1
                    yield
                elif wanted.holds(earlier := json.loads(line), owner) and (
                    may_retract(parse_element(earlier["stanza"]), retraction)):  # fmt: skip
                    self.archives.bury(owner, earlier["id"], id)
                    return
                if not slices_left:
                    return

    def _purge(self) -> None:
        self.server.loop.call_later(PURGE_INTERVAL, self._purge)
        self.server.loop.in_slices(self.purge())

    def purge(self) -> Iterator[None]:
        """Drop what is older than `[archive] keep`, one account per turn."""
        keep = self.server.config.archive_keep
        if keep is None:
            return
        before = first_id_at(datetime.now(UTC) - keep)
        for host in self.server.config.hosts:
            for owner in self.archives.log.owners_in_parts(host):
                self.archives.purge(owner, before)
                yield

    def account_removed(self, owner: JID) -> None:
        """The next owner of the name begins with nothing."""
        self.archives.forget(owner)


# -- copies for the other devices

CARBONS_WRAPPERS = frozenset({CARBONS("received"), CARBONS("sent")})
IM_PAYLOADS = frozenset({RECEIPTS, CHAT_STATES, CHAT_MARKERS})  # what XEP-0280 §6.1 takes for a conversation's


def is_carbon(message: Stanza) -> bool:
    """Whether it holds a copy, or pretends to."""
    return any(child.tag in CARBONS_WRAPPERS for child in message)


def is_to_be_copied(message: Stanza, *, is_received: bool) -> bool:
    """Tell whether the account's other devices get copies of a message that is no error (XEP-0280 §6.1, §9).

    A private message from somebody in a room comes to each of the account's clients in the
    room anyway. What looks like a copy is not copied, so that nobody's forgery ever stands
    in a wrapper of ours (threat S42).
    """
    type = message.get("type")
    if type == "groupchat" or message.find(CARBONS("private")) is not None or is_carbon(message):
        return False
    if message.find(HINTS("no-copy")) is not None:
        return False
    if is_invitation(message):
        return True
    if is_received and message.find(MUC_USER("x")) is not None:
        return False
    has_body = message.find(CLIENT("body")) is not None
    return (type == "chat" or (has_body and type in (None, "normal"))
            or any(namespace_of(child.tag) in IM_PAYLOADS for child in message))  # fmt: skip


class Carbons(Feature):
    """Message Carbons (XEP-0280): every device of an account sees all of its conversations.

        C: <iq type='set' id='c1'><enable xmlns='urn:xmpp:carbons:2'/></iq>
        S: <iq type='result' id='c1'/>
        S: <message from='romeo@example.org' to='romeo@example.org/phone' type='chat'>
             <sent xmlns='urn:xmpp:carbons:2'><forwarded xmlns='urn:xmpp:forward:0'><message …/></forwarded></sent>
           </message>

    `<private/>` stays in the message, as §9 has it since version 1.0: a server that takes it
    out hides from the receiver that copies were prevented.
    """

    namespace = CARBONS
    server_features = (CARBONS, CARBONS_RULES)
    account_features = (CARBONS, CARBONS_RULES)

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._copying: Counter[JID] = Counter()  # accounts with sessions that want copies: all that most messages ask

    @iq("set", CARBONS("enable"), to="self")
    def enable_for_asker(self, request: Iq) -> None:
        """§4, §10.1: as often as the client likes."""
        self.enable(request.from_session)

    def enable(self, session: Session) -> None:
        """Copy to this session from now on; also inline at binding (XEP-0386)."""
        if not session.carbons_since:
            session.carbons_since = time.time()
            self._copying[session.bare] += 1

    @inline(CARBONS("enable"))
    def enable_while_binding(self, session: Session, request: Element) -> None:
        """XEP-0386 §3.2: this never fails, so there is nothing to answer."""
        self.enable(session)

    @iq("set", CARBONS("disable"), to="self")
    def disable(self, request: Iq) -> None:
        """§5, §10.1."""
        self.session_ended(request.from_session)

    @iq("set", CARBONS("enable"), to="account server", who="local remote")
    @iq("set", CARBONS("disable"), to="account server", who="local remote")
    def refuse(self, request: Iq) -> None:
        """§4.1, §5.1: only for oneself."""
        raise StanzaError("not-allowed")

    def session_ended(self, session: Session) -> None:
        """No copies any more."""
        if session.carbons_since:
            session.carbons_since = 0.0
            self._copying[session.bare] -= 1
            if not self._copying[session.bare]:
                del self._copying[session.bare]

    # -- copying

    @only(MESSAGE)
    def sending(self, session: Session, stanza: Stanza) -> Stanza | None:
        """§8: what one device says, the others see. What goes to the account itself comes to them anyway."""
        if session.bare not in self._copying:
            return stanza
        to = stanza.get("to")
        if to is None or stanza.get("type") == "error" or JID.parse(to).bare == session.bare:
            return stanza
        others = [other for other in self.server.sessions(session.bare) if other.carbons_since and other is not session]
        if others and is_to_be_copied(stanza, is_received=False):
            self._remember(session, stanza.get("id"))
            copied = stanza.addressed()
            if stanza.sent_id:
                add_stanza_id(copied, str(session.bare), stanza.sent_id)  # XEP-0313 §3.5
            self._copy(session.bare, copied, "sent", others)
        return stanza

    @only(MESSAGE)
    def arriving(self, owner: JID, stanza: Stanza) -> Stanza | None:
        """§7: those who don't get the message itself get a copy; but not who has sent it."""
        if owner not in self._copying or stanza.get("type") == "headline":
            return stanza
        sessions = self.server.sessions(owner)
        to = JID.parse(stanza.get("to", str(owner)))
        addressed = [session for session in sessions if session.jid == to] or best_of(sessions)
        others = [session for session in sessions if session.carbons_since and session not in addressed
                  and session.full != stanza.get("from")]  # fmt: skip
        if others and self._is_eligible(addressed, stanza):
            self._copy(owner, stanza, "received", others)
        return stanza

    @staticmethod
    def _is_eligible(addressed: Sequence[Session], stanza: Stanza) -> bool:
        """§6.1: an error is copied if the message was that it is about; one from another session is about nothing."""
        if stanza.get("type") == "error":
            return any(session.copied is not None and stanza.get("id") in session.copied for session in addressed)
        return is_to_be_copied(stanza, is_received=True)

    @staticmethod
    def _remember(session: Session, id: str | None) -> None:
        if id:
            session.copied = session.copied or deque(maxlen=MAX_COPIED)
            session.copied.append(id)

    def refused(self, session: Session, error: Stanza) -> None:
        """§6.1: an error of the server's own is as good as any other."""
        if error.tag == MESSAGE and session.bare in self._copying and self._is_eligible([session], error):
            others = [other for other in self.server.sessions(session.bare) if other is not session]
            self._copy(session.bare, error, "received", [other for other in others if other.carbons_since])

    def _copy(self, owner: JID, message: Stanza, direction: str, receivers: Iterable[Session]) -> None:
        """Wrap a message (XEP-0297), written once for all; the tree shares the message's own elements."""
        original = b"<message xmlns='jabber:client'" + message.wire().removeprefix(b"<message")
        content = b"<%b xmlns='urn:xmpp:carbons:2'><forwarded xmlns='urn:xmpp:forward:0'>%b</forwarded></%b>"
        name = direction.encode()
        copy = Stanza(MESSAGE, {"from": str(owner)}, content % (name, original, name))
        if type := message.get("type"):
            copy.set("type", type)
        copy.append(E(CARBONS(direction), None, E(FORWARD("forwarded"), None, message)))
        for receiver in receivers:
            receiver.send(copy.addressed(to=receiver.full))


# ==== 17. Service discovery (XEP-0030) ====
#
# "What can you do?" asks every client after login, of the server and of its own account:
#
#     C: <iq type='get' to='example.org' …><query xmlns='http://jabber.org/protocol/disco#info'/></iq>
#     S: … <identity category='server' type='im' name='xmppd'/><feature var='urn:xmpp:ping'/> …
#
# The answer is not a list that somebody has to keep: it is derived from the handlers that
# the features have declared for the place that is asked (chapter 13), so that nothing is
# ever promised that isn't done. What can't be derived a feature adds by `disco_info`.


class Disco(Feature):
    """Service Discovery (XEP-0030) for the server and for accounts.

        C: <iq type='get' id='d1' to='example.org'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>
        S: <iq type='result' id='d1' …><query …><identity …/><feature var='…'/></query></iq>
    """

    namespace = DISCO_INFO

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._derived: dict[str, list[Element]] = {}  # `<feature/>`s, by what they are derived for
        self._server_answers: dict[str, str] = {}  # by host: every client asks, and is told the same

    def reloaded(self) -> None:
        """What the server says of itself may depend on the configuration."""
        self._server_answers.clear()

    @iq("get", DISCO_INFO("query"), to="server", who="local remote")
    def server_info(self, request: Iq) -> Payload:
        """§3.1: who we are and what we do; written once [measured: 30 µs of 60 less]."""
        if request.payload.get("node"):
            return self._about_node(request, "item-not-found")
        host = request.owner.domain
        if host not in self._server_answers:
            identity = E(DISCO_INFO("identity"), {"category": "server", "type": "im", "name": "xmppd"})
            info = self._info(request, identity, ("server",), "server_features")
            self._server_answers[host] = serialize(info, CLIENT)
        return self._server_answers[host]

    @iq("get", DISCO_INFO("query"), to="self account")
    def account_info(self, request: Iq) -> Payload:
        """§8: for those who may see the account's presence; to others it looks as if it didn't exist."""
        sees = self.server.sees(request.sender, request.owner)
        if request.payload.get("node"):
            return self._about_node(request, "item-not-found" if sees else "service-unavailable")
        if not sees:
            raise StanzaError("service-unavailable")
        identity = E(DISCO_INFO("identity"), {"category": "account", "type": "registered"})
        return self._info(request, identity, ("self", "account"), "account_features")

    def _info(self, request: Iq, identity: Element, places: Sequence[str], declared: str) -> Element:
        info = E(DISCO_INFO("query"), None, identity, *self._features(places, declared))
        for event in self.server.registry.listeners("disco_info"):
            event(request, info)
        return info

    def _features(self, places: Sequence[str], declared: str) -> list[Element]:
        if declared not in self._derived:
            names = {DISCO_INFO, DISCO_ITEMS}
            for _type, payload, place, _inner in self.server.registry.iqs:
                if place in places:
                    names.add(Namespace(namespace_of(payload)))
            for feature in self.server.registry.features:
                names.update(Namespace(name) for name in getattr(feature, declared))
            self._derived[declared] = [E(DISCO_INFO("feature"), var=name) for name in sorted(names)]
        return self._derived[declared]

    @iq("get", DISCO_ITEMS("query"), to="server", who="local remote")
    def server_items(self, request: Iq) -> Payload:
        """§4.1: the services of this domain, each added by the feature that owns it."""
        if request.payload.get("node"):
            return self._about_node(request, "item-not-found")
        return self._items(request)

    @iq("get", DISCO_ITEMS("query"), to="self account")
    def account_items(self, request: Iq) -> Payload:
        """§8: the available resources, for those who may know; for others, and for nobody's account, none."""
        sees = self.server.sees(request.sender, request.owner)
        if request.payload.get("node"):
            return self._about_node(request, "item-not-found" if sees else "")
        resources = [session for session in self.server.sessions(request.owner) if sees and session.presence is not None
                     and not self.server.hides(request.owner, request.sender, session)]  # fmt: skip
        return self._items(request, *(E(DISCO_ITEMS("item"), jid=session.full) for session in resources))

    def _items(self, request: Iq, *known: Element) -> Element:
        items = E(DISCO_ITEMS("query"), None, *known)
        for event in self.server.registry.listeners("disco_items"):
            event(request, items)
        return items

    def _about_node(self, request: Iq, unknown: str) -> Element:
        """§3.2, §4.2: nodes are answered by the feature that has them; `unknown` is the error for others, "" none."""
        for answer in self.server.registry.listeners("disco_node"):
            found: Element | None = answer(request, request.payload.get("node"))
            if found is not None:
                return found
        if unknown:
            raise StanzaError(unknown)
        return E(request.payload.tag, _node_of(request.payload))


def _node_of(element: Element) -> dict[str, str]:
    node = element.get("node")
    return {"node": node} if node else {}


# ==== 18. Small features ====
#
# What most extensions look like: a namespace, one or two requests, an answer. They are the
# place to begin reading, and the pattern for writing one.
#
# The first four are how a client without an account, or without a session, gets one:
# registration (XEP-0077), the login of 2002 (XEP-0078), binding a resource (RFC 6120 §7) and
# the session of RFC 3921, which has become a formality.


class ResourceBinding(Feature):
    """Resource binding (RFC 6120 §7): a login becomes a session with an address of its own.

        C: <iq type='set' id='b1'><bind xmlns='…'><resource>orchard</resource></bind></iq>
        S: <iq type='result' id='b1'><bind xmlns='…'><jid>romeo@example.org/orchard</jid></bind></iq>
    """

    namespace = BIND

    def offer(self, stream: ClientStream) -> Element | None:
        """§7.4: only after the login."""
        return E(BIND("bind")) if stream.state is StreamState.AUTHENTICATED else None

    @iq("set", BIND("bind"), to="stream")
    def bind(self, request: Iq) -> Payload:
        """§7.6, §7.7: the resource that the client wants, or one that nobody can guess."""
        stream = request.from_stream
        if stream.owner is None:
            raise StreamError("not-authorized")
        wanted = child_text(request.payload, BIND("resource"))
        try:
            session = self.server.bind(stream, stream.owner.with_resource(wanted or secrets.token_urlsafe(9)))
        except StanzaError as error:
            stream.failed_binds += 1
            if stream.failed_binds >= self.server.config.limits.bind_failures:
                raise StreamError("policy-violation", "too many attempts to bind") from None  # §7.7.3
            if error.condition == "jid-malformed":
                raise StanzaError("bad-request", "no possible resource") from None  # §7.7.2.1
            raise
        return E(BIND("bind"), None, E(BIND("jid"), None, session.full))

    @iq("set", BIND("bind"), to="self")
    def refuse(self, request: Iq) -> Payload:
        """§7.1: one resource per stream."""
        raise StanzaError("not-allowed")


class SessionEstablishment(Feature):
    """Session establishment (RFC 3921 §3): asked for by clients from before RFC 6121, and granted without effect.

        C: <iq type='set' id='s1'><session xmlns='urn:ietf:params:xml:ns:xmpp-session'/></iq>
        S: <iq type='result' id='s1'/>
    """

    namespace = SESSION

    def offer(self, stream: ClientStream) -> Element | None:
        """RFC 6121 Appendix E: advertised, and marked so that new clients skip it."""
        if stream.state is not StreamState.AUTHENTICATED:
            return None
        return E(SESSION("session"), None, E(SESSION("optional")))

    @iq("set", SESSION("session"), to="self server")
    def establish(self, request: Iq) -> None:
        """Binding has done all that there is to do."""


class IqAuth(Feature):
    """Non-SASL Authentication (XEP-0078): login and binding in one request, for clients from before 2004.

        C: <iq type='set' id='a1'><query xmlns='jabber:iq:auth'>
             <username>romeo</username><password>…</password><resource>orchard</resource></query></iq>
        S: <iq type='result' id='a1'/>

    Only inside TLS, and never by digest, which would need the password itself to be stored.
    """

    namespace = IQ_AUTH

    def offer(self, stream: ClientStream) -> Element | None:
        """§4: where it is allowed."""
        allowed = self.server.config.compat.iq_auth and stream.state is StreamState.OPEN
        return E(IQ_AUTH_FEATURE("auth")) if allowed else None

    def _check(self, stream: ClientStream) -> None:
        if not (self.server.config.compat.iq_auth and stream.may_log_in):
            raise StanzaError("service-unavailable")  # §3.1: not supported
        if stream.sasl_has_failed:
            raise StreamError("policy-violation", "SASL has failed on this stream")  # §3.1
        if stream.owner is not None:
            raise StanzaError("not-allowed", "logged in already")

    @iq("get", IQ_AUTH("query"), to="stream")
    def fields(self, request: Iq) -> Payload:
        """§3.1: the same fields for every name, whether it exists or not."""
        self._check(request.from_stream)
        return E(IQ_AUTH("query"), None, *(E(IQ_AUTH(name)) for name in ("username", "password", "resource")))

    @iq("set", IQ_AUTH("query"), to="stream")
    def log_in(self, request: Iq) -> Answer:
        """§3.1: check the password in a worker, then bind the resource."""
        stream, payload = request.from_stream, request.payload
        self._check(stream)
        username, password, resource = (
            child_text(payload, IQ_AUTH(name)) for name in ("username", "password", "resource"))  # fmt: skip
        if not (username and password and resource):
            raise StanzaError("not-acceptable")
        try:
            self.server.guard.check(stream.transport.peer)
            account = login_account(username, stream.host)
            credentials = readable(self.server.credentials(account))
        except SASLError as error:
            known = {"temporary-auth-failure": "resource-constraint"}
            raise StanzaError(known.get(error.condition, "not-authorized"), error.text) from None
        if self.server.guard.delay(str(account)):  # here it isn't worth its own way to wait
            raise StanzaError("resource-constraint", "too many failed logins of late: wait a minute")
        jid = account.with_resource(resource)
        stored = self.server.credentials(account)
        return Later(check_password, (credentials, password), lambda right: self._checked(
            stream, jid, right and self.server.credentials(account) == stored))  # fmt: skip

    def _checked(self, stream: ClientStream, jid: JID, right: bool) -> Payload:
        """`right`: the password was, and has not been changed while it was checked (threat S33)."""
        account = self.server.account(jid.bare)
        if not right or account is None or account.get("disabled"):
            stream.login_failed(str(jid.bare))
            if stream.failed_logins >= self.server.config.limits.sasl_failures:
                raise StreamError("policy-violation", "too many failed logins")
            raise StanzaError("not-authorized")
        self.server.bind(stream, jid)
        return None


class Registration(Feature):
    """In-Band Registration (XEP-0077): a new account, another password, or no account any more.

        C: <iq type='set' id='r1'><query xmlns='jabber:iq:register'>
             <username>romeo</username><password>…</password></query></iq>
        S: <iq type='result' id='r1'/>

    New accounts only where the owner has opened registration, and only inside TLS. An
    address may try a few times a minute, a stream succeeds once.
    """

    namespace = REGISTER
    ATTEMPTS_PER_MINUTE: ClassVar[int] = 5  # per address: a family is registered in two minutes, a botnet never

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.guard = LoginGuard(self.ATTEMPTS_PER_MINUTE, server.loop.now)

    def offer(self, stream: ClientStream) -> Element | None:
        """§8: while there is nobody on the stream yet."""
        is_open = self.server.config.registration_open and stream.state is StreamState.OPEN
        return E(REGISTER_FEATURE("register")) if is_open else None

    # -- a new account

    def _check(self, stream: ClientStream) -> None:
        if not (self.server.config.registration_open and stream.may_log_in):
            raise StanzaError("service-unavailable")  # §3.1; §11: not without TLS
        if stream.owner is not None or stream.has_registered:
            raise StanzaError("not-acceptable", "one account per stream")  # §3.1.1

    @iq("get", REGISTER("query"), to="stream")
    def fields(self, request: Iq) -> Payload:
        """§3.1: what we want to know."""
        self._check(request.from_stream)
        instructions = E(REGISTER("instructions"), None, "Choose a name and a password for this server.")
        return E(REGISTER("query"), None, instructions, E(REGISTER("username")), E(REGISTER("password")))

    @iq("set", REGISTER("query"), to="stream")
    def register(self, request: Iq) -> Answer:
        """§3.1: create the account, once the password's keys are computed."""
        stream = request.from_stream
        if request.payload.find(REGISTER("remove")) is not None:
            raise StanzaError("unexpected-request")  # §3.2, table 1
        self._check(stream)
        try:
            self.guard.check(stream.transport.peer)
        except SASLError:
            raise StanzaError("not-acceptable", "too many registrations from your address: wait a minute") from None
        self.guard.count(stream.transport.peer)
        username, password = self._username_and_password(request.payload, "not-acceptable")
        try:
            owner = JID(prepare_account_name(username), stream.host, "")
        except ValueError:
            raise StanzaError("not-acceptable", "such a name is not possible") from None
        if owner in self.server.accounts or owner in self.server.config.admins:
            raise StanzaError("conflict")  # an administrator's name is the owner's to give
        return Later(new_credentials, (password, owner, self.server.config.compat.digest_md5),
                     lambda credentials: self._create(stream, owner, credentials))  # fmt: skip

    def _create(self, stream: ClientStream, owner: JID, credentials: Mapping[str, Any]) -> Payload:
        self.server.create_account(owner, credentials)
        stream.has_registered = True
        log.info("%s: registered %s", stream, owner)
        return None

    @staticmethod
    def _username_and_password(payload: Element, missing: str) -> tuple[str, str]:
        username, password = (child_text(payload, REGISTER(name)) for name in ("username", "password"))
        if not (username and password):
            raise StanzaError(missing, "a name and a password are needed")
        try:
            saslprep(password)
        except ValueError:
            raise StanzaError("not-acceptable", "the password holds characters that not everybody can type") from None
        return username, password

    # -- an account that exists

    @iq("get", REGISTER("query"), to="self server")
    def registered(self, request: Iq) -> Payload:
        """§3.1: who asks is registered; the password is not told."""
        self._check_home(request, "service-unavailable")
        instructions = E(REGISTER("instructions"), None, "Send your name and a new password to change your password.")
        username = E(REGISTER("username"), None, request.sender.local)
        return E(REGISTER("query"), None, E(REGISTER("registered")), instructions, username, E(REGISTER("password")))

    @iq("set", REGISTER("query"), to="self server")
    def change(self, request: Iq) -> Answer:
        """§3.2 and §3.3: remove the account, or change its password."""
        payload, owner = request.payload, request.sender.bare
        self._check_home(request, "registration-required")
        if payload.find(REGISTER("remove")) is not None:
            return self._remove(request)
        session = request.from_session
        if not session.stream.may_log_in:
            raise StanzaError("not-authorized", "not without TLS")
        username, password = self._username_and_password(payload, "bad-request")
        try:
            same = prepare_local(username) == owner.local
        except ValueError:
            same = False
        if not same:
            raise StanzaError("not-allowed", "you can change your own password only")
        return Later(new_credentials, (password, owner, self.server.config.compat.digest_md5),
                     lambda credentials: self.server.set_credentials(owner, credentials, changer=session))  # fmt: skip

    @staticmethod
    def _check_home(request: Iq, condition: str) -> None:
        """§3.2, table 1: on another domain served here the asker has no account to change."""
        if request.owner.domain != request.sender.domain:
            raise StanzaError(condition)

    def _remove(self, request: Iq) -> Payload:
        """§3.2: first the account goes, then the answer, then the stream."""
        if len(request.payload) != 1:
            raise StanzaError("bad-request", "<remove/> stands alone")
        stream = request.from_session.stream
        self.server.remove_account(request.sender.bare, changer=request.from_session)
        request.afterwards(lambda: stream.fail(StreamError("not-authorized", "the account is gone")))
        return None


def new_credentials(password: str, owner: JID, digest_md5: bool) -> Mapping[str, Any]:
    """Compute what is stored instead of a password (slow, for a worker); with DIGEST-MD5 only where it is on."""
    return make_credentials(password, digest_md5=owner if digest_md5 else None)


class StreamLimits(Feature):
    """Stream Limits Advertisement (XEP-0478): how large a stanza may be, how long a client may be silent.

        S: <limits xmlns='urn:xmpp:stream-limits:0'><max-bytes>262144</max-bytes></limits>
    """

    namespace = STREAM_LIMITS

    def offer(self, stream: ClientStream) -> Element | None:
        """§3.1: what holds for the stanzas that come next."""
        limits = self.server.config.limits
        bound_next = stream.state is StreamState.AUTHENTICATED
        size = E(STREAM_LIMITS("max-bytes"), None, str(limits.stanza if bound_next else limits.stanza_before_login))
        idle = E(STREAM_LIMITS("idle-seconds"), None, str(int(limits.silence_timeout))) if bound_next else None
        return E(STREAM_LIMITS("limits"), None, size, idle)


class Compression(Feature):
    """Stream Compression (XEP-0138), where the owner has switched it on, and only after the login.

        C: <compress xmlns='http://jabber.org/protocol/compress'><method>zlib</method></compress>
        S: <compressed xmlns='http://jabber.org/protocol/compress'/>        … and a new stream

    Off by default: compression and encryption together can betray secrets by lengths (the
    XSF's advice of 2014; RFC 7590 §3.3).
    """

    namespace = COMPRESS

    def _possible(self, stream: ClientStream) -> bool:
        authenticated = stream.state is StreamState.AUTHENTICATED  # §7; CVE-2014-8760 was compression before TLS
        return self.server.config.compat.compression and authenticated and not stream.transport.compressed

    def offer(self, stream: ClientStream) -> Element | None:
        """§2: the methods, best first; there is one."""
        if not self._possible(stream):
            return None
        return E(COMPRESS_FEATURE("compression"), None, E(COMPRESS_FEATURE("method"), None, "zlib"))

    @element(COMPRESS("compress"))
    def compress(self, stream: ClientStream, request: Element) -> None:
        """§2: switch and restart, or say why not and go on uncompressed."""
        if not self._possible(stream):
            return stream.send_element(E(COMPRESS("failure"), None, E(COMPRESS("setup-failed"))))
        if child_text(request, COMPRESS("method")) != "zlib":
            return stream.send_element(E(COMPRESS("failure"), None, E(COMPRESS("unsupported-method"))))
        stream.send_element(E(COMPRESS("compressed")))
        stream.transport.compress()
        stream.restart(b"")  # what came behind the request was not compressed, and is not read


class Ping(Feature):
    """XMPP Ping (XEP-0199): "are you there?", answered by an empty result.

        C: <iq type='get' id='p1' to='example.org'><ping xmlns='urn:xmpp:ping'/></iq>
        S: <iq type='result' id='p1' from='example.org'/>
    """

    namespace = PING

    @iq("get", PING("ping"), to="self server", who="local remote owner")
    def ping(self, request: Iq) -> None:
        """§4.2. Not for the bare JID of others: an answer would betray which accounts exist."""


class SoftwareVersion(Feature):
    """Software Version (XEP-0092): name and version; the operating system is nobody's business.

        C: <iq type='get' id='v1' to='example.org'><query xmlns='jabber:iq:version'/></iq>
        S: <iq type='result' id='v1' …><query …><name>xmppd</name><version>0.1.0</version></query></iq>
    """

    namespace = VERSION

    @iq("get", VERSION("query"), to="server", who="local remote")
    def version(self, request: Iq) -> Payload:
        """§3."""
        return E(VERSION("query"), None, E(VERSION("name"), None, "xmppd"), E(VERSION("version"), None, __version__))


class EntityTime(Feature):
    """Entity Time (XEP-0202): the server's clock, and how far its wall clock is from UTC.

        C: <iq type='get' id='t1' to='example.org'><time xmlns='urn:xmpp:time'/></iq>
        S: <iq type='result' id='t1' …><time …><tzo>+01:00</tzo><utc>2026-11-22T14:00:00Z</utc></time></iq>
    """

    namespace = TIME

    @iq("get", TIME("time"), to="server", who="local remote")
    def time(self, request: Iq) -> Payload:
        """§3."""
        now = datetime.now().astimezone()
        offset = now.strftime("%z")
        tzo = E(TIME("tzo"), None, f"{offset[:3]}:{offset[3:5]}")
        return E(TIME("time"), None, tzo, E(TIME("utc"), None, stamp(now)))


class LastActivity(Feature):
    """Last Activity (XEP-0012): how long somebody has been away, or the server been up.

        C: <iq type='get' id='l1' to='juliet@example.org'><query xmlns='jabber:iq:last'/></iq>
        S: <iq type='result' id='l1' …><query xmlns='jabber:iq:last' seconds='903'>Heading home</query></iq>
    """

    namespace = LAST_ACTIVITY

    @iq("get", LAST_ACTIVITY("query"), to="server", who="local remote")
    def uptime(self, request: Iq) -> Payload:
        """§5: seconds since the server was started."""
        running = datetime.now(UTC) - self.server.started_at
        return E(LAST_ACTIVITY("query"), seconds=str(max(0, int(running.total_seconds()))))

    @iq("get", LAST_ACTIVITY("query"), to="self account")
    def last(self, request: Iq) -> Payload:
        """§3: only for those who may see the presence; 0 while somebody is connected."""
        if not self.server.sees(request.sender, request.owner) or self.server.hides(request.owner, request.sender):
            raise StanzaError("forbidden")
        if self.server.sessions(request.owner):
            return E(LAST_ACTIVITY("query"), seconds="0")
        account = self.server.account(request.owner) or {}
        last = self.server.registry.feature(PresenceBroadcast).last.get(request.owner)
        known = last or {"at": account.get("created", stamp()), "status": ""}
        away = datetime.now(UTC) - parse_stamp(known["at"])
        seconds = str(max(0, int(away.total_seconds())))
        return E(LAST_ACTIVITY("query"), {"seconds": seconds}, known["status"] or None)


class PrivateStorage(Feature):
    """Private XML Storage (XEP-0049): a client's own settings and bookmarks, kept as they came.

        C: <iq type='set' id='p1'><query xmlns='jabber:iq:private'><storage xmlns='storage:bookmarks'/></query></iq>
        S: <iq type='result' id='p1'/>

    Documents: "private", by account, keyed by the qualified name of the element: its XML,
    several elements of one name one behind the other.
    """

    namespace = PRIVATE
    server_features = (PRIVATE,)  # where clients look for it, although each asks its own account (Poezio)

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.stored = server.storage.documents("private", dict)

    @iq("get", PRIVATE("query"), to="self")
    def get(self, request: Iq) -> Payload:
        """§2.3: one element is asked for; what was never stored comes back empty.

        There is no handler for the place `account`: to others it looks as if there were nothing (§2.3 allows it).
        """
        if len(request.payload) != 1:
            raise StanzaError("not-acceptable", "one element at a time")
        wanted = self._checked(request.payload[0])
        known = self.stored.item(request.owner, wanted.tag)
        found = parse_elements([known]) if known else [Element(wanted.tag)]
        return E(PRIVATE("query"), None, *found)

    @iq("set", PRIVATE("query"), to="self")
    def set(self, request: Iq) -> Payload:
        """§2.3: each element replaces those of its name; within the owner's limits."""
        if not len(request.payload):
            raise StanzaError("not-acceptable", "nothing to store")
        stored: dict[str, str] = {}
        for child in request.payload:
            self._checked(child)
            stored[child.tag] = stored.get(child.tag, "") + serialize(child, CLIENT)
        self._check_room(request.owner, stored)
        for tag, text in stored.items():
            self.stored.put(request.owner, tag, text)
            for event in self.server.registry.listeners("private_stored"):
                event(request.owner, tag)
        return None

    @staticmethod
    def _checked(child: Element) -> Element:
        if namespace_of(child.tag) in ("", CLIENT, PRIVATE):
            raise StanzaError("not-acceptable", "an element with a namespace of its own is needed")
        return child

    def _check_room(self, owner: JID, new: Mapping[str, str]) -> None:
        limits = self.server.config.limits
        after = {**self.stored.items(owner), **new}
        if len(after) > limits.private or sum(len(text.encode()) for text in after.values()) > limits.private_bytes:
            raise StanzaError("resource-constraint", "the private storage is full")


class VCard(Feature):
    """vcard-temp (XEP-0054): one public card per account, kept as the XML that came in.

        C: <iq type='get' id='v1'><vCard xmlns='vcard-temp'/></iq>
        S: <iq type='result' id='v1'><vCard xmlns='vcard-temp'><FN>Juliet</FN></vCard></iq>

    Documents: "vcard", by account: `{"xml": the card, "photo": SHA-1 of its picture in hexadecimal or "",
    "public": whether the picture is for everybody}`; if not, it is for those who see the presence.
    """

    namespace = VCARD

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.cards = server.storage.documents("vcard", dict)

    @iq("get", VCARD("vCard"), to="self")
    def own(self, request: Iq) -> Payload:
        """§3.1: an empty card when there is none yet, so that clients can begin to fill it in."""
        return self.card(request.owner) if request.owner in self.cards else E(VCARD("vCard"))

    @iq("get", VCARD("vCard"), to="account")
    def other(self, request: Iq) -> Payload:
        """§3.3. No card and no account must look the same, or the answer betrays who has an account."""
        if request.owner not in self.cards:
            raise StanzaError("service-unavailable")
        card = self.card(request.owner)
        if not self.cards.item(request.owner, "public") and not self.server.sees(request.sender, request.owner):
            for photo in card.findall(VCARD("PHOTO")):
                card.remove(photo)
            if not len(card):
                raise StanzaError("service-unavailable")
        return card

    @iq("get", VCARD("vCard"), to="server", who="local remote")
    def of_the_server(self, request: Iq) -> Payload:
        """The server's own card."""
        name = E(VCARD("FN"), None, request.owner.domain)
        return E(VCARD("vCard"), None, name, E(VCARD("DESC"), None, "An XMPP server, by xmppd"))

    @iq("set", VCARD("vCard"), to="self")
    def set(self, request: Iq) -> Payload:
        """§3.2: the new card replaces the old one as a whole; the same picture is for the same people."""
        before, was_public = self.photo(request.owner), self.cards.item(request.owner, "public")
        self.keep(request.owner, request.payload)
        if not was_public and before and self.photo(request.owner) == before:
            self.keep(request.owner, request.payload, is_public=False)
        for event in self.server.registry.listeners("vcard_changed"):
            event(request.owner)
        return None

    @iq("set", VCARD("vCard"), to="account")
    def refuse(self, request: Iq) -> Payload:
        """§3.2: nobody writes on another one's card."""
        raise StanzaError("forbidden")

    def card(self, owner: JID) -> Element:
        """Return an account's card."""
        return parse_element(self.cards[owner]["xml"])

    def photo(self, owner: JID) -> str:
        """Return the SHA-1 of an account's picture in hexadecimal, or ""."""
        photo: str = self.cards.item(owner, "photo") or ""
        return photo

    def keep(self, owner: JID, card: Element, *, is_public: bool = True) -> None:
        """Keep a card; raises StanzaError for one that is too big or whose picture is no base64."""
        xml, most = serialize(card, CLIENT), self.server.config.limits.vcard
        if len(xml.encode()) > most:
            raise StanzaError("not-acceptable", f"a vCard has at most {most} bytes")
        picture = vcard_picture(card)
        photo = hashlib.sha1(picture).hexdigest() if picture else ""
        self.cards[owner] = {"xml": xml, "photo": photo, "public": is_public}


def vcard_picture(card: Element) -> bytes:
    """Return the picture of a vCard, or b""; raises StanzaError("bad-request") when it is no base64 (XEP-0153 §4.6)."""
    text = "".join((card.findtext(f"{VCARD('PHOTO')}/{VCARD('BINVAL')}") or "").split())
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise StanzaError("bad-request", "the picture is not base64") from None


# ==== 19. Privacy (XEP-0016, XEP-0191) ====
#
# Who may reach me, and who may see me? A privacy list is a list of rules, tried in their
# order until one fits:
#
#     <list name='public'>
#       <item type='jid' value='tybalt@example.com' action='deny' order='1'/>
#       <item type='group' value='Enemies' action='deny' order='2'><presence-out/></item>
#       <item action='allow' order='3'/>
#     </list>
#
# An account may have many lists. One of them may be its default; each session may make
# another one active for itself, which then counts instead of the default. The blocklist of
# XEP-0191, which is what today's clients use, is not kept anywhere: it is what the default
# list denies altogether by address, and a block is a rule put in front (XEP-0191 §5).
#
# Lists come before every other rule of delivery (§2.2), so `Privacy` is the first feature
# that filters. `decide` is the whole of the decision; all else here finds out which list
# counts, and tells people who disappear from each other's sight that they do.
#
# Presence is broadcast to bare JIDs: a rule about one resource of a contact holds back
# only what is sent to that resource itself.

# -- rules

RULE_KINDS = ("message", "iq", "presence-in", "presence-out")  # the children of an <item/>
ANYTHING = ""  # the kind of a stanza that only a rule without children covers: subscriptions, most of what one sends
MAX_ORDER = 2**32 - 1  # xs:unsignedInt, in the schema of §8
BLOCKED_CONTACTS = "Blocked contacts"  # the list that a first block makes, called as ejabberd calls it


class Rule(NamedTuple):
    """An `<item/>` (§2.1). Rules compare by `order`, which is unique in a list.

    `type` is `jid`, `group`, `subscription`, or `""`: the rule fits everybody. `kinds` are
    some of `RULE_KINDS`, or none: the rule is about everything, in both directions.
    """

    order: int
    action: str  # "allow" or "deny"
    type: str = ""
    value: str = ""
    kinds: Sequence[str] = ()

    @property
    def blocks(self) -> bool:
        """Whether it is what XEP-0191 calls a blocked JID."""
        return self.type == "jid" and self.action == "deny" and not self.kinds


Rules = Mapping[tuple[str, str, str], Rule]  # (kind or ANYTHING, type, value) -> the first rule of a list about that


def rules_by_key(rules: Iterable[Rule]) -> Rules:
    """Make a list ready for `decide`, so that rules are looked up and not searched: blocklists grow."""
    found: dict[tuple[str, str, str], Rule] = {}
    for rule in sorted(rules):
        for kind in rule.kinds or (ANYTHING,):
            found.setdefault((kind, rule.type, rule.value), rule)
    return found


def deciding_rule(rules: Rules, kind: str, contact: JID, relation: str, groups: Iterable[str]) -> Rule | None:
    """Return the first rule in order that fits (§2.2), or None.

    `kind` is one of `RULE_KINDS` or `ANYTHING`; `relation` and `groups` are what the roster
    says of the contact. An address stands for itself and all below it: juliet@example.com/balcony
    is also meant by juliet@example.com and by example.com (§2.1).
    """
    names = {str(contact), str(contact.bare), contact.domain}
    keys = [("", ""), ("subscription", relation), *(("jid", name) for name in names), *(("group", g) for g in groups)]
    asked = ((about, type, value) for about in {kind, ANYTHING} for type, value in keys)
    fitting = [rule for key in asked if (rule := rules.get(key)) is not None]
    return min(fitting, default=None)


def decide(rules: Rules, kind: str, contact: JID, relation: str, groups: Iterable[str]) -> bool:
    """Return whether a list lets a stanza of this kind through; what no rule fits it does (§2.2)."""
    rule = deciding_rule(rules, kind, contact, relation, groups)
    return rule is None or rule.action == "allow"


def incoming_kind(stanza: Stanza) -> str:
    """Return what an arriving stanza is to a rule; subscriptions and probes are no notifications (§2.1, §2.10)."""
    if stanza.tag == PRESENCE:
        return "presence-in" if stanza.get("type") in (None, "unavailable") else ANYTHING
    return stanza.name


def outgoing_kind(stanza: Stanza) -> str:
    """Return what a leaving stanza is to a rule: `message` and `iq` are about what arrives (§2.1)."""
    is_notification = stanza.tag == PRESENCE and stanza.get("type") in (None, "unavailable")
    return "presence-out" if is_notification else ANYTHING


# -- rules in XML and JSON


def _check_jid(value: str) -> str:
    try:
        return str(JID.parse(value))
    except StanzaError:
        raise StanzaError("bad-request", "no address") from None


def _check_group(value: str) -> str:
    return value or _missing("value")


def _check_subscription(value: str) -> str:
    if value not in ("none", "to", "from", "both"):
        raise StanzaError("bad-request", "a subscription is none, to, from or both")
    return value


RULE_VALUES: Mapping[str, Callable[[str], str]] = {  # by type: check the value, and return it as it is compared
    "jid": _check_jid,
    "group": _check_group,
    "subscription": _check_subscription,
    "": lambda value: "",
}
KIND_OF_CHILD = {PRIVACY(kind): kind for kind in RULE_KINDS}


def read_rule(item: Element) -> Rule:
    """Read an `<item/>`; raises StanzaError("bad-request").

    An unknown child is refused: ignored, it would turn a narrow rule into one about everything.
    """
    action, order, type = item.get("action", ""), item.get("order", ""), item.get("type", "")
    if item.tag != PRIVACY("item") or action not in ("allow", "deny") or type not in RULE_VALUES:
        raise StanzaError("bad-request", "an item allows or denies a jid, a group, a subscription or everybody")
    if not re.fullmatch("[0-9]{1,10}", order) or int(order) > MAX_ORDER:
        raise StanzaError("bad-request", f"an order is a whole number from 0 to {MAX_ORDER}")
    if any(child.tag not in KIND_OF_CHILD for child in item):
        raise StanzaError("bad-request", "unknown kind of stanza")
    named = {KIND_OF_CHILD[child.tag] for child in item}
    kinds = tuple(kind for kind in RULE_KINDS if kind in named)
    return Rule(int(order), action, type, RULE_VALUES[type](item.get("value", "")), kinds)


def read_rules(items: Iterable[Element]) -> list[Rule]:
    """Read the items of a `<list/>`, in order; raises StanzaError("bad-request"), also for an order used twice."""
    rules = sorted(map(read_rule, items))
    if len({rule.order for rule in rules}) != len(rules):
        raise StanzaError("bad-request", "an order is used twice")
    return rules


def rule_item(rule: Rule) -> Element:
    """Build the `<item/>` of a rule."""
    about = {"type": rule.type, "value": rule.value} if rule.type else {}
    kinds = (E(PRIVACY(kind)) for kind in rule.kinds)
    return E(PRIVACY("item"), {**about, "action": rule.action, "order": str(rule.order)}, *kinds)


def rule_record(rule: Rule) -> dict[str, Any]:
    """Return the rule as JSON: `{"order": 1, "action": "deny", "type": "jid", "value": "…", "kinds": ["iq"]}`."""
    return {**rule._asdict(), "kinds": list(rule.kinds)}


def rule_from(record: Mapping[str, Any]) -> Rule:
    """Return the rule that `rule_record` has written."""
    return Rule(**{**record, "kinds": tuple(record["kinds"])})


def senders_of(stanza: Stanza) -> Iterator[JID]:
    """Yield who is behind a stanza that arrives: its sender, and whoever uses that one as a messenger.

    That is the inviter of an invitation to a room (XEP-0045 §7.8.2), which the room
    brings, and the sender of what one's own account passes on as a carbon (XEP-0280). Other
    words of an occupant are the room's, even where we know whose they are: if they were
    missing for some addresses, blocking would unmask who hides behind a nickname.
    """
    sender = stanza.get("from")
    if not sender:
        return
    yield JID.parse(sender)
    if stanza.tag == MESSAGE:
        invitations = stanza.iterfind(f"{MUC_USER('x')}/{MUC_USER('invite')}")
        carbons = (copy for received in stanza.iterfind(CARBONS("received")) for copy in received.iter(MESSAGE))
        for behind in (*invitations, *carbons):
            try:
                yield JID.parse(behind.get("from", ""))
            except StanzaError:
                continue


# -- lists


class Sight(NamedTuple):
    """What a list does to a session's presence: by address, whether it is visible there, and theirs here."""

    outward: Mapping[str, bool]
    inward: Mapping[str, bool]


class Privacy(Feature):
    """Privacy Lists (XEP-0016): rules about who may reach whom, kept and obeyed by the server.

        C: <iq type='set' id='p1'><query xmlns='jabber:iq:privacy'><list name='public'>
             <item type='jid' value='tybalt@example.com' action='deny' order='3'/></list></query></iq>
        S: <iq type='result' id='p1'/>
        S: <iq type='set' id='…'><query xmlns='jabber:iq:privacy'><list name='public'/></query></iq>   to every resource
        C: <iq type='set' id='p2'><query xmlns='jabber:iq:privacy'><default name='public'/></query></iq>
        S: <iq type='result' id='p2'/>

    Documents: "privacy", by account: under "list NAME" the rules (`rule_record`) in their
    order, under "default" the name of the default list. A session knows the name of its
    active list, and as `rules` the list that counts for it. For most people there is none,
    and they shall not pay for it: the filters of a session are in its way only while it has
    rules, and what arrives for an account without lists costs one look into a set.
    """

    namespace = PRIVACY
    server_features = (PRIVACY,)
    MAX_LISTLESS: ClassVar[int] = 10_000  # accounts of which is remembered that they have no lists: 2 MB
    MAX_READY: ClassVar[int] = 500  # lists ready for use; the longest have half a megabyte, most next to nothing

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.lists = server.storage.documents("privacy", dict)
        self._listless: set[JID] = set()  # accounts of which is known that they have no lists
        self._ready: dict[tuple[JID, str], Rules] = {}  # lists made ready, by account and name
        self._sights: list[tuple[Session, Sight]] = []  # from before a change of the roster
        self._setters: Mapping[str, Callable[[Iq, Element], None]] = {
            PRIVACY("active"): self._set_active,
            PRIVACY("default"): self._set_default,
            PRIVACY("list"): self._set_list,
        }

    # -- what is stored

    def names(self, owner: JID) -> list[str]:
        """Return the names of an account's lists."""
        return [key[len("list ") :] for key in self.lists.items(owner) if key.startswith("list ")]

    def default(self, owner: JID) -> str:
        """Return the name of the default list, or ""."""
        return self.lists.item(owner, "default") or ""

    def rules(self, owner: JID, name: str) -> list[Rule]:
        """Return the rules of a list in their order; none if there is no such list."""
        return [rule_from(record) for record in self.lists.item(owner, f"list {name}") or ()]

    def blocked(self, owner: JID) -> list[str]:
        """Return the blocklist of XEP-0191 §5: whom the default list denies altogether, by address."""
        return [rule.value for rule in self.rules(owner, self.default(owner)) if rule.blocks]

    def _ready_rules(self, owner: JID, name: str) -> Rules | None:
        if not name:
            return None
        if (owner, name) not in self._ready:
            if len(self._ready) >= self.MAX_READY:
                self._ready.clear()
            self._ready[owner, name] = rules_by_key(self.rules(owner, name))
        return self._ready[owner, name]

    def _is_listless(self, owner: JID) -> bool:
        if self.lists.items(owner):
            return False
        if len(self._listless) >= self.MAX_LISTLESS:
            self._listless.clear()
        self._listless.add(owner)
        return True

    def change(self, owner: JID, changes: Mapping[str, Any]) -> None:
        """Change items of the document (None removes one), and let the lists have their effect at once (§2.2)."""
        for key, value in changes.items():
            self.lists.put(owner, key, value)
        if not self.lists.items(owner):
            del self.lists[owner]
        self._listless.discard(owner)
        self._forget(owner)
        self._apply(owner)

    def _forget(self, owner: JID) -> None:
        for key in [key for key in self._ready if key[0] == owner]:
            del self._ready[key]

    def account_removed(self, owner: JID) -> None:
        """The next owner of the name begins without lists."""
        self._forget(owner)

    # -- requests

    @iq("get", PRIVACY("query"), to="self")
    def get(self, request: Iq) -> Payload:
        """§2.3: the names of all lists, or the rules of one.

        A get that asks for `<active/>` or `<default/>` alone, as slixmpp's does, gets all the names.
        """
        owner, session = request.owner, request.from_session
        session.interested.add(PRIVACY)
        wanted = list(request.payload)
        if len(wanted) > 1 or any(child.tag not in self._setters for child in wanted):
            raise StanzaError("bad-request", "one list at a time")
        if wanted and wanted[0].tag == PRIVACY("list"):
            name = self._existing(owner, wanted[0].get("name") or _missing("name"))
            items = map(rule_item, self.rules(owner, name))
            return E(PRIVACY("query"), None, E(PRIVACY("list"), {"name": name}, *items))
        active = E(PRIVACY("active"), name=session.active_list) if session.active_list else None
        default = E(PRIVACY("default"), name=self.default(owner)) if self.default(owner) else None
        lists = (E(PRIVACY("list"), name=name) for name in self.names(owner))
        return E(PRIVACY("query"), None, active, default, *lists)

    @iq("set", PRIVACY("query"), to="self")
    def set(self, request: Iq) -> Payload:
        """§2.4 to §2.8: choose the active list or the default list; create, replace or remove one."""
        request.from_session.interested.add(PRIVACY)
        if len(request.payload) != 1 or request.payload[0].tag not in self._setters:
            raise StanzaError("bad-request", "exactly one of active, default and list")
        before = self.blocked(request.owner)
        self._setters[request.payload[0].tag](request, request.payload[0])
        request.afterwards(functools.partial(self._push_blocklist, request.owner, before))
        return None

    def _existing(self, owner: JID, name: str) -> str:
        if self.lists.item(owner, f"list {name}") is None:
            raise StanzaError("item-not-found", "there is no such list")
        return name

    def _refuse_if_used(self, request: Iq, name: str) -> None:
        """§2.2: a list that counts for another resource stays as it is."""
        others = [session for session in self.server.sessions(request.owner) if session is not request.session]
        if name and any((session.active_list or self.default(request.owner)) == name for session in others):
            raise StanzaError("conflict", "another resource uses the list")

    def _set_active(self, request: Iq, active: Element) -> None:
        """§2.4: for this session only; without a name, the default list counts again."""
        name = active.get("name")
        request.from_session.active_list = "" if name is None else self._existing(request.owner, name)
        self._apply(request.owner)

    def _set_default(self, request: Iq, default: Element) -> None:
        """§2.5: for everybody without an active list, now and later; without a name, there is none any more."""
        owner, name, old = request.owner, default.get("name"), self.default(request.owner)
        if name is not None:
            self._existing(owner, name)
        if name == old:
            return
        others = [session for session in self.server.sessions(owner) if session is not request.session]
        if old and any(not session.active_list for session in others):
            raise StanzaError("conflict", "another resource uses the default list")
        self.change(owner, {"default": name})

    def _set_list(self, request: Iq, element: Element) -> None:
        """§2.6, §2.7: the items become the list. §2.8: without items the list goes."""
        owner, name = request.owner, element.get("name") or _missing("name")
        rules = read_rules(element)
        if not rules:
            self._existing(owner, name)
            self._refuse_if_used(request, name)
            gone: dict[str, Any] = {"default": None} if name == self.default(owner) else {}
            return self.change(owner, {f"list {name}": None, **gone})
        groups = {group for _contact, item in self._contacts(owner) for group in item.get("groups", ())}
        if not groups.issuperset(rule.value for rule in rules if rule.type == "group"):
            raise StanzaError("item-not-found", "there is no such group in the roster")  # §2.1
        self.check_room(owner, name, rules)
        self.change(owner, {f"list {name}": [rule_record(rule) for rule in rules]})
        request.afterwards(functools.partial(self._push_name, owner, name))

    def check_room(self, owner: JID, name: str, rules: Sequence[Rule]) -> None:
        """Raise StanzaError when the list would be one too many, too long, or have too long a name."""
        limits, others = self.server.config.limits, [other for other in self.names(owner) if other != name]
        if len(name) > MAX_ROSTER_NAME:
            raise StanzaError("not-acceptable", "the name is too long")
        if len(others) >= limits.privacy_lists:
            raise StanzaError("resource-constraint", f"an account may have {limits.privacy_lists} lists")
        if len(rules) + sum(len(self.lists.item(owner, f"list {other}")) for other in others) > limits.privacy_rules:
            raise StanzaError("resource-constraint", f"an account may have {limits.privacy_rules} rules and blocks")

    # -- pushes

    def _push_name(self, owner: JID, name: str) -> None:
        """§2.2, §2.6: every connected resource hears which list has changed, not how."""
        for session in self.server.sessions(owner):
            session.push(E(PRIVACY("query"), None, E(PRIVACY("list"), name=name)))

    def _push_blocklist(self, owner: JID, before: Sequence[str]) -> None:
        """XEP-0191 §5: what a change of lists means to the blocklist is told to those who look at it that way."""
        after = self.blocked(owner)
        for name, jids in (("block", [jid for jid in after if jid not in before]),
                           ("unblock", [jid for jid in before if jid not in after])):  # fmt: skip
            if jids:
                self.server.push(owner, BLOCKING, blocking(name, jids))

    # -- the blocklist

    def set_blocked(self, owner: JID, jids: Sequence[str]) -> None:
        """Let exactly these be blocked (XEP-0191 §5): rules in front of the default list, made if there is none.

        Those who look at lists hear that the list has changed. A list of which nothing is left goes.
        """
        name = self.default(owner) or self._free_name(owner)
        old = self.rules(owner, name)
        front = [Rule(0, "deny", "jid", jid) for jid in jids]
        rest = [rule for rule in old if not rule.blocks]
        rules = [rule._replace(order=order) for order, rule in enumerate([*front, *rest], 1)]
        if rules == old:
            return
        if not rules:
            return self.change(owner, {f"list {name}": None, "default": None})
        self.check_room(owner, name, rules)
        self.change(owner, {f"list {name}": [rule_record(rule) for rule in rules], "default": name})
        self.server.push(owner, PRIVACY, E(PRIVACY("query"), None, E(PRIVACY("list"), name=name)))

    def _free_name(self, owner: JID) -> str:
        """Return a name that is not taken: the rules of a list that was set aside must not come back by a block."""
        taken = self.names(owner)
        names = (f"{BLOCKED_CONTACTS} {number}" for number in count(2))
        return next(name for name in (BLOCKED_CONTACTS, *(next(names) for _ in taken)) if name not in taken)

    # -- who may

    def _deciding(self, owner: JID, rules: Rules, kind: str, contact: JID) -> Rule | None:
        """Return the rule that decides; None also for one's own resources and server, who are never blocked (§2.1)."""
        if contact.domain == owner.domain and contact.local in ("", owner.local):
            return None
        item = self.server.rosters.item(owner, str(contact.bare)) or {}
        relation = item.get("subscription", "none")
        return deciding_rule(rules, kind, contact, "none" if relation == "remove" else relation, item.get("groups", ()))

    def _allows(self, owner: JID, rules: Rules | None, kind: str, contact: JID) -> bool:
        if rules is None:
            return True
        rule = self._deciding(owner, rules, kind, contact)
        return rule is None or rule.action == "allow"

    def _admits(self, owner: JID, rules: Rules | None, stanza: Stanza) -> bool:
        kind = incoming_kind(stanza)
        return all(self._allows(owner, rules, kind, sender) for sender in senders_of(stanza))

    def _obey(self, session: Session, rules: Rules | None) -> None:
        """Let a list count for a session: its filters come before those of all features, or not at all."""
        registry, session.rules = self.server.registry, rules
        session.sending, session.delivering = registry.sending, registry.delivering
        if rules is not None:
            session.sending = {tag: [self._keep_in, *others] for tag, others in registry.sending.items()}
            session.delivering = {tag: [self._keep_out, *others] for tag, others in registry.delivering.items()}

    def _keep_in(self, session: Session, stanza: Stanza) -> Stanza | None:
        """Filter `sending`. §2.13, §2.14: what the list denies doesn't leave; XEP-0191 §3.3: a block is named."""
        if session.rules is None or not (to := stanza.get("to")):
            return stanza
        rule = self._deciding(session.bare, session.rules, outgoing_kind(stanza), JID.parse(to))
        if rule is None or rule.action == "allow":
            return stanza
        blocked = E(BLOCKING_ERRORS("blocked")) if rule.blocks and not session.active_list else None
        raise StanzaError("not-acceptable", "you have blocked the recipient", kind="cancel", application=blocked)

    def arriving(self, owner: JID, stanza: Stanza) -> Stanza | None:
        """§2.14: what every list that counts denies goes no further.

        Presence, answers and headlines go silently, and so does what a room sends to all,
        since a room takes an error as a sign that its occupant is gone.
        """
        if owner in self._listless or self._is_listless(owner):  # the first test is what most messages cost
            return stanza
        takers = self._takers(owner, stanza)
        counting = [session.rules for session in takers] or [self._ready_rules(owner, self.default(owner))]
        if any(self._admits(owner, rules, stanza) for rules in counting):
            return stanza
        if kind_of(stanza) in ("message normal", "message chat", "iq request"):
            raise StanzaError("service-unavailable")
        if self.server.trace is not None:
            self.server.trace.decided("XEP-0016 §2.14: blocked, silently")
        return None

    def _takers(self, owner: JID, stanza: Stanza) -> Sequence[Session]:
        """Return the sessions whose lists count (§2.2): the one addressed, or for a bare JID those that may get it.

        None: the default list counts, also for messages that will wait for their reader.
        """
        to = JID.parse(stanza.get("to", ""))
        sessions = self.server.sessions(owner)
        addressed = [session for session in sessions if session.jid == to]
        return addressed or (best_of(sessions) if stanza.tag == MESSAGE else sessions)

    def _keep_out(self, session: Session, stanza: Stanza) -> Stanza | None:
        """Filter `delivering`. §2.2: each session's own list, for what goes to several or has waited meanwhile.

        Not for answers: `arriving` has decided about a contact's, and the server's are never blocked.
        """
        if stanza.get("type") in ("error", "result"):
            return stanza
        return stanza if self._admits(session.bare, session.rules, stanza) else None

    def hides(self, owner: JID, contact: JID, session: Session | None, kind: str) -> bool:
        """§2.11: by the session's list; for the account as a whole when every list that counts says so."""
        if session is not None:
            return session.rules is not None and not self._allows(owner, session.rules, kind, contact)
        if self._is_listless(owner):
            return False
        counting = [other.rules for other in self.server.sessions(owner)]
        counting = counting or [self._ready_rules(owner, self.default(owner))]
        return not any(self._allows(owner, rules, kind, contact) for rules in counting)

    # -- who disappears from whose sight

    def session_bound(self, session: Session) -> None:
        """§2.2: the default list counts, until the session makes another one active."""
        self._obey(session, self._ready_rules(session.bare, self.default(session.bare)))

    def _apply(self, owner: JID) -> None:
        """Let the lists as they are now count for all sessions (§2.2), then tell who can't be seen any more."""
        changed = []
        for session in self.server.sessions(owner):
            if session.active_list not in self.names(owner):
                session.active_list = ""
            rules = self._ready_rules(owner, session.active_list or self.default(owner))
            if rules is not session.rules:
                contacts = [*self._contacts(owner), *self._named_resources(owner, session.rules, rules)]
                changed.append((session, self._sight(session, session.rules, contacts), contacts))
                self._obey(session, rules)
        for session, before, contacts in changed:
            self._tell(session, before, self._sight(session, session.rules, contacts))

    def roster_changing(self, owner: JID, contact: JID) -> None:
        """§2.2: a contact's group or subscription may decide; keep what it does so far."""
        listening = [session for session in self.server.sessions(owner) if session.rules is not None]
        self._sights = [(session, self._sight(session, session.rules, self._contact(owner, contact)))
                        for session in listening]  # fmt: skip

    def roster_changed(self, owner: JID, contact: JID) -> None:
        """§2.2: what the change does to who sees whom, beyond the subscription itself."""
        sights, self._sights = self._sights, []
        for session, before in sights:
            self._tell(session, before, self._sight(session, session.rules, self._contact(owner, contact)))

    def _contacts(self, owner: JID) -> list[tuple[str, Mapping[str, Any]]]:
        return list(self.server.registry.feature(Roster).contacts(owner))

    def _contact(self, owner: JID, contact: JID) -> list[tuple[str, Mapping[str, Any]]]:
        item = self.server.registry.feature(Roster).item(owner, contact)
        return [] if item is None else [(str(contact), item)]

    def _named_resources(self, owner: JID, *lists: Rules | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield the full JIDs that rules name, with the contact's item: also these are told (XEP-0191 §3.3)."""
        named = {value for rules in lists if rules for _kind, type, value in rules if type == "jid" and "/" in value}
        for value in sorted(named):
            for _contact, item in self._contact(owner, JID.parse(value).bare):
                yield value, item

    def _sight(self, session: Session, rules: Rules | None, contacts: Iterable[tuple[str, Mapping[str, Any]]]) -> Sight:
        outward = list(session.directed)
        inward = [address for address in outward if not self._is_local(address)]  # rooms, mostly
        if session.presence is not None:
            outward += [contact for contact, item in contacts if item["subscription"] in ("from", "both")]
            for contact, item in contacts:
                if item["subscription"] in ("to", "both"):
                    inward += self._seen_resources(session, contact)
        return Sight(self._verdicts(session, rules, "presence-out", outward),
                     self._verdicts(session, rules, "presence-in", inward))  # fmt: skip

    def _verdicts(self, session: Session, rules: Rules | None, kind: str, addresses: Iterable[str]) -> dict[str, bool]:
        return {address: self._allows(session.bare, rules, kind, JID.parse(address)) for address in addresses}

    def _seen_resources(self, session: Session, contact: str) -> list[str]:
        """Return the full JIDs under which a contact can be seen; of one elsewhere we know only the bare one."""
        jid = JID.parse(contact)
        if not self._is_local(contact):
            return [contact]
        if not self.server.sees(session.jid, jid.bare):
            return []
        others = [other for other in self.server.sessions(jid.bare) if jid in (other.jid, other.bare)]
        return [other.full for other in others
                if other.presence is not None and not self.server.hides(jid.bare, session.jid, other)]  # fmt: skip

    def _is_local(self, address: str) -> bool:
        return isinstance(self.server.domains.get(JID.parse(address).domain), Host)

    def _tell(self, session: Session, before: Sight, after: Sight) -> None:
        """§2.10, §2.11, XEP-0191 §3.3, §3.4: who can't be seen any more seems to go; who can be seen again is shown.

        An address that is only in one of the two sights has come or gone by a change of the
        subscription, which is told elsewhere (RFC 6121 §3).
        """
        for address, visible in after.inward.items():
            if visible != before.inward.get(address, visible):
                self._show_to_user(session, address) if visible else self._take_from_user(session, address)
        told = set()
        for address, visible in sorted(after.outward.items()):  # a bare JID stands before its resources
            if visible == before.outward.get(address, visible) or str(JID.parse(address).bare) in told:
                continue
            told.add(address)
            if not visible:
                self._take_from_contact(session, address)
            elif session.presence is not None:
                self.server.emit(session.presence.addressed(to=address))

    def _take_from_contact(self, session: Session, address: str) -> None:
        self.server.emit(Stanza(PRESENCE, {"type": "unavailable", "from": session.full, "to": address}))
        for directed in [directed for directed in session.directed
                         if address in (directed, str(JID.parse(directed).bare))]:  # fmt: skip
            del session.directed[directed]

    def _take_from_user(self, session: Session, address: str) -> None:
        """§2.10: the word is the server's, so it passes the list that keeps the contact's words out."""
        rules = session.rules
        self._obey(session, None)
        session.send(Stanza(PRESENCE, {"type": "unavailable", "from": address, "to": session.full}))
        self._obey(session, rules)

    def _show_to_user(self, session: Session, address: str) -> None:
        jid = JID.parse(address)
        contact = self.server.session(jid)
        if contact is not None and contact.presence is not None:
            session.send(contact.presence.addressed(to=session.full))
        elif jid.is_bare:
            self.server.emit(Stanza(PRESENCE, {"type": "probe", "from": str(session.bare), "to": address}))


# -- blocking


def blocking(name: str, jids: Iterable[str]) -> Element:
    """Build `<blocklist/>`, `<block/>` or `<unblock/>` with these items (XEP-0191 §10.1)."""
    return E(BLOCKING(name), None, *(E(BLOCKING("item"), jid=jid) for jid in jids))


class Blocking(Feature):
    """Blocking Command (XEP-0191): "I never want to hear from them again", without a thought of lists.

        C: <iq type='set' id='b1'><block xmlns='urn:xmpp:blocking'><item jid='romeo@montague.net'/></block></iq>
        S: <iq type='result' id='b1'/>
        S: <iq type='set' id='…'><block xmlns='urn:xmpp:blocking'><item jid='romeo@montague.net'/></block></iq>

    Keeps nothing: blocks are rules of the default privacy list, obeyed by `Privacy`.
    Subscriptions stay as they are ("polite blocking", §4).
    """

    namespace = BLOCKING
    server_features = (BLOCKING,)

    @property
    def privacy(self) -> Privacy:
        """The lists that blocks are rules of."""
        return self.server.registry.feature(Privacy)

    @iq("get", BLOCKING("blocklist"), to="self")
    def get(self, request: Iq) -> Payload:
        """§3.2: all blocked addresses; from now on the session hears of changes."""
        request.from_session.interested.add(BLOCKING)
        return blocking("blocklist", self.privacy.blocked(request.owner))

    @iq("set", BLOCKING("block"), to="self")
    def block(self, request: Iq) -> Payload:
        """§3.3: one or several."""
        jids = self._jids(request.payload)
        if not jids:
            raise StanzaError("bad-request", "nobody to block")
        self.privacy.set_blocked(request.owner, list(dict.fromkeys([*self.privacy.blocked(request.owner), *jids])))
        request.afterwards(lambda: self.server.push(request.owner, BLOCKING, blocking("block", jids)))
        return None

    @iq("set", BLOCKING("unblock"), to="self")
    def unblock(self, request: Iq) -> Payload:
        """§3.4: one or several; §3.5: without items, everybody."""
        jids = self._jids(request.payload)
        left = [jid for jid in self.privacy.blocked(request.owner) if jids and jid not in jids]
        self.privacy.set_blocked(request.owner, left)
        request.afterwards(lambda: self.server.push(request.owner, BLOCKING, blocking("unblock", jids)))
        return None

    @staticmethod
    def _jids(payload: Element) -> list[str]:
        """Return the addresses of the items, prepared; raises StanzaError("bad-request" or "jid-malformed")."""
        if any(item.tag != BLOCKING("item") for item in payload):
            raise StanzaError("bad-request", "only items")  # or they'd look like the wish to unblock everybody
        return [str(JID.parse(item.get("jid") or _missing("jid"))) for item in payload]


# ==== 20. Publish-subscribe and personal eventing (XEP-0060, XEP-0163) ====
#
# What somebody wants others to know (an avatar, a mood, the keys of OMEMO) or only their own
# other devices (bookmarks, what has been read) is published once and pushed to all who are
# interested. Each account is a pubsub service of its own (PEP), its *nodes* are the topics:
#
#     C: <iq type='set' id='p1'><pubsub xmlns='http://jabber.org/protocol/pubsub'>
#          <publish node='http://jabber.org/protocol/mood'><item><mood …/></item></publish></pubsub></iq>
#     S: <message from='juliet@example.org' to='romeo@example.org/orchard' type='headline'>
#          <event xmlns='http://jabber.org/protocol/pubsub#event'><items node='…'><item …/></items></event></message>
#
# A node has a configuration, of which the access model matters most: who may read it. Whoever
# may read and shows by entity capabilities (XEP-0115) that it wants to know, gets it: clients
# list `NODE+notify` among their features. Nobody has to subscribe, but everybody may.
#
# The engine comes first: `Node` and its rules, values in and values out, and `PubsubStore`.
# `Capabilities` finds out what clients want. `PersonalEventing` publishes and tells,
# `NodeSubscriptions` and `NodeOwnership` answer the other requests of XEP-0060. Conversions
# of avatars and bookmarks, which are known in two ways each, end the chapter.
#
# Left out: collections, subscription options and identifiers, a service beside the accounts.

MAX_NODE_ID = 512  # characters of a node's or an item's id
MAX_ITEM_BYTES = 200 * 1024  # of one payload: a stanza has to carry it, an avatar has some 60 KB
ITEM_OVERHEAD = 200  # bytes that an item takes beside its payload; also empty ones fill an account
MAX_ANSWER_BYTES = 1024 * 1024  # of items in one answer; far below what may wait for a client (MAX_UNREAD)
MAX_INDEXED = 1000  # accounts of which the order of the items is in memory: some kilobytes each
MAX_CAPS = 2000  # verified capabilities remembered; all clients of the world in all versions are fewer
MAX_WANTED = 8192  # characters of all nodes that one client wants and we remember; the chattiest has 1,000
MAX_GUESTS = 100  # strangers' resources that have shown themselves to one account
CAPS_NODE = "urn:x-xmppd"  # names this program in its own capabilities (XEP-0115 §4)

# The items of well-known nodes lie in documents of their own, so that a read marker rewrites no avatar.
ITEM_KINDS: Mapping[str, str] = {
    "urn:xmpp:avatar:data": "pep-avatar",
    "urn:xmpp:bookmarks:1": "pep-bookmarks",
    "urn:xmpp:mds:displayed:0": "pep-displayed",
    "eu.siacs.conversations.axolotl.devicelist": "pep-omemo",
    "urn:xmpp:omemo:2:devices": "pep-omemo",
    "urn:xmpp:omemo:2:bundles": "pep-omemo",
}
OLD_BUNDLES = "eu.siacs.conversations.axolotl.bundles:"  # one node for each device of the old OMEMO
OTHER_ITEMS = "pep-items"

ACCESS_MODELS = {
    "open": "Everybody", "presence": "Those who see my presence", "roster": "Contacts in certain groups",
    "authorize": "Whom I have allowed", "whitelist": "Nobody but listed people",
}  # fmt: skip
NODE_FORM = FormTemplate(
    f"{PUBSUB}#node_config",
    [
        Field("pubsub#title", label="Title", value=""),
        Field("pubsub#description", label="Description", value=""),
        Field("pubsub#type", label="Namespace of the payload", value=""),
        Field("pubsub#node_type", "list-single", "Kind of node", "leaf", {"leaf": "Items"}),
        Field("pubsub#access_model", "list-single", "Who may read?", "presence", ACCESS_MODELS),
        Field("pubsub#roster_groups_allowed", "text-multi", "Groups that may read", []),
        Field("pubsub#publish_model", "list-single", "Who may publish?", "publishers",
              {"publishers": "Publishers", "subscribers": "Subscribers", "open": "Everybody"}),
        Field("pubsub#subscribe", "boolean", "May anybody subscribe?", True),
        Field("pubsub#persist_items", "boolean", "Keep items?", True),
        Field("pubsub#max_items", "list-single", "How many items are kept?", 1, {"max": "As many as possible"},
              numbers=range(1, 1_000_001)),
        Field("pubsub#item_expire", "list-single", "How long are items kept?", "max", {"max": "As long as possible"}),
        Field("pubsub#publish_node_full", "list-single", "When the node is full, what happens to the oldest item?",
              "retract-oldest", {"retract-oldest": "It goes, and subscribers are told",
                                 "discard-oldest": "It goes silently", "reject": "It stays, the new one is refused"}),
        Field("pubsub#deliver_notifications", "boolean", "Send notifications?", True),
        Field("pubsub#deliver_payloads", "boolean", "With the payload?", True),
        Field("pubsub#notification_type", "list-single", "As what kind of message?", "headline",
              {"headline": "Headline", "normal": "Normal"}),
        Field("pubsub#notify_retract", "boolean", "Tell when items are removed?", True),
        Field("pubsub#notify_delete", "boolean", "Tell when the node is deleted?", True),
        Field("pubsub#notify_config", "boolean", "Tell when the configuration changes?", False),
        Field("pubsub#send_last_published_item", "list-single", "When is the latest item sent?", "on_sub_and_presence",
              {"never": "Never", "on_sub": "To new subscribers", "on_sub_and_presence": "To whoever comes online"}),
    ],
    title="Configuration of the node",
)  # fmt: skip
PUBLISH_OPTIONS = FormTemplate(f"{PUBSUB}#publish-options", NODE_FORM.fields)
METADATA_FORM = FormTemplate(
    f"{PUBSUB}#meta-data",
    [
        *(replace(one, type="text-single", options={}) for one in NODE_FORM.fields
          if one.var in ("pubsub#title", "pubsub#description", "pubsub#type", "pubsub#access_model",
                         "pubsub#publish_model", "pubsub#max_items")),
        Field("pubsub#creation_date", label="When it was created"),
        Field("pubsub#owner", "jid-multi", "Owner"),
        Field("pubsub#num_subscribers", label="Explicit subscribers"),
    ],
)  # fmt: skip
APPROVAL_FORM = FormTemplate(
    f"{PUBSUB}#subscribe_authorization",
    [
        Field("pubsub#node", label="Node", value=""),
        Field("pubsub#subscriber_jid", "jid-single", "Subscriber"),
        Field("pubsub#allow", "boolean", "Allow this person to read it?", False),
    ],
    title="Somebody wants to subscribe",
)

PRIVATE_CONFIG: Mapping[str, Any] = {  # XEP-0402 §3.3, XEP-0490 §4.2
    "pubsub#access_model": "whitelist", "pubsub#max_items": "max", "pubsub#send_last_published_item": "never",
}  # fmt: skip
NODE_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # Whatever a client forgets to say: these are nobody else's business (threat S57).
    BOOKMARKS: PRIVATE_CONFIG,
    "urn:xmpp:mds:displayed:0": PRIVATE_CONFIG,
    OLD_BOOKMARKS: {"pubsub#access_model": "whitelist"},
    "storage:rosternotes": {"pubsub#access_model": "whitelist"},  # XEP-0145
    "storage:metacontacts": {"pubsub#access_model": "whitelist"},  # XEP-0209
    "urn:xmpp:openpgp:0:secret-key": {"pubsub#access_model": "whitelist"},  # XEP-0373 §5.2
}
DEFAULT_CONFIGS = {name: {**NODE_FORM.defaults, **special} for name, special in {**NODE_DEFAULTS, "": {}}.items()}

PUBSUB_FEATURES = (  # XEP-0060 §10
    "access-authorize", "access-open", "access-presence", "access-roster", "access-whitelist", "auto-create",
    "auto-subscribe", "config-node", "config-node-max", "create-and-configure", "create-nodes", "delete-items",
    "delete-nodes", "filtered-notifications", "instant-nodes", "item-ids", "last-published", "manage-subscriptions",
    "member-affiliation", "meta-data", "modify-affiliations", "multi-items", "outcast-affiliation",
    "persistent-items", "presence-notifications", "presence-subscribe", "publish", "publish-node-full",
    "publish-options", "publisher-affiliation", "pubsub-on-a-jid", "purge-nodes", "retract-items",
    "retrieve-affiliations", "retrieve-default", "retrieve-items", "retrieve-subscriptions", "rsm", "subscribe",
    "subscription-notifications",
)  # fmt: skip
NODE_AFFILIATIONS = ("outcast", "none", "member", "publisher")  # an account is the only owner of its nodes


def pubsub_error(condition: str, detail: str, text: str = "", **attributes: str) -> StanzaError:
    """Return an error with one of XEP-0060's own conditions beside the general one (§11)."""
    return StanzaError(condition, text, application=E(PUBSUB_ERRORS(detail), attributes))


def unsupported(feature: str) -> StanzaError:
    """Return the error for what isn't done here (§11)."""
    return pubsub_error("feature-not-implemented", "unsupported", feature=feature)


# -- the engine: nodes


@dataclass(slots=True, frozen=True)
class Viewer:
    """Who wants something of an account's node: the address, and what the account's roster says of it."""

    jid: JID
    is_owner: bool
    sees: bool  # is subscribed to the account's presence
    groups: frozenset[str] = frozenset()


@dataclass(slots=True, frozen=True)
class Node:
    """A node as it is stored: what differs from the default configuration, and its people. A value."""

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    affiliations: Mapping[str, str] = field(default_factory=dict)  # bare JID: affiliation, but for the owner's
    subscriptions: Mapping[str, str] = field(default_factory=dict)  # JID: "subscribed" or "pending"
    created: str = ""  # stamp

    def __getitem__(self, name: str) -> Any:
        """Return a field of the configuration by its short name: `node["access_model"]`."""
        full = f"pubsub#{name}"
        return self.config[full] if full in self.config else default_config(self.name)[full]

    def to_json(self) -> Json:
        """Return what is stored."""
        return {"config": dict(self.config), "affiliations": dict(self.affiliations),
                "subscriptions": dict(self.subscriptions), "created": self.created}  # fmt: skip

    @classmethod
    def from_json(cls, name: str, stored: Json) -> Node:
        """Return the node that was stored."""
        return cls(name, stored["config"], stored["affiliations"], stored["subscriptions"], stored["created"])

    @property
    def whole_config(self) -> dict[str, Any]:
        """Every field of the configuration, by its `var`."""
        return {**default_config(self.name), **self.config}

    @property
    def is_private(self) -> bool:
        """Whether nobody but the account itself can read it (XEP-0223 §2)."""
        return self["access_model"] == "whitelist" and not set(self.affiliations.values()) & {"member", "publisher"}

    def affiliation_of(self, viewer: Viewer) -> str:
        """Return somebody's affiliation with this node (§4.1)."""
        return "owner" if viewer.is_owner else self.affiliations.get(str(viewer.jid.bare), "none")

    def subscription_of(self, viewer: Viewer) -> str:
        """Return the best subscription of any of somebody's addresses, or "none"."""
        bare = str(viewer.jid.bare)
        found = {state for jid, state in self.subscriptions.items() if jid.partition("/")[0] == bare}
        return "subscribed" if "subscribed" in found else "pending" if found else "none"

    def refusal(self, viewer: Viewer) -> StanzaError | None:
        """Return why `viewer` may not read this node (§4.5, §6.1.3, §6.5.9), or None if that is allowed."""
        affiliation = self.affiliation_of(viewer)
        if affiliation == "outcast":
            return StanzaError("forbidden")
        admits, condition, detail = READERS_BY_MODEL[self["access_model"]]
        is_trusted = affiliation != "none"  # §6.5.1, §12.12: whatever the model
        return None if is_trusted or admits(self, viewer) else pubsub_error(condition, detail)

    def check_read(self, viewer: Viewer) -> None:
        """Raise StanzaError unless `viewer` may read this node."""
        refusal = self.refusal(viewer)
        if refusal is not None:
            raise refusal

    def may_read(self, viewer: Viewer) -> bool:
        """Tell whether `viewer` may read this node."""
        return self.refusal(viewer) is None

    def check_publish(self, viewer: Viewer) -> None:
        """§7.1.3.1: raise StanzaError unless `viewer` may publish here."""
        affiliation, model = self.affiliation_of(viewer), self["publish_model"]
        allowed = affiliation in ("owner", "publisher") or (model == "open" and affiliation != "outcast")
        if not allowed and not (model == "subscribers" and self.subscription_of(viewer) == "subscribed"):
            raise StanzaError("forbidden")

    def may_change(self, viewer: Viewer, item: PublishedItem) -> bool:
        """Tell whether `viewer` may replace or remove an item (§4.1): who isn't named a publisher only their own."""
        return self.affiliation_of(viewer) in ("owner", "publisher") or item.publisher == viewer.jid.bare


READERS_BY_MODEL: Mapping[str, tuple[Callable[[Node, Viewer], bool], str, str]] = {  # else: the two conditions
    "open": (lambda node, viewer: True, "", ""),
    "presence": (lambda node, viewer: viewer.sees, "not-authorized", "presence-subscription-required"),
    "roster": (lambda node, viewer: viewer.sees and bool(viewer.groups & set(node["roster_groups_allowed"])),
               "not-authorized", "not-in-roster-group"),
    "authorize": (lambda node, viewer: node.subscription_of(viewer) == "subscribed",
                  "not-authorized", "not-subscribed"),
    "whitelist": (lambda node, viewer: False, "not-allowed", "closed-node"),
}  # fmt: skip


def default_config(name: str) -> Mapping[str, Any]:
    """Return the configuration of a node about which nothing was said (XEP-0163 §5, XEP-0223 §2)."""
    return DEFAULT_CONFIGS.get(name) or DEFAULT_CONFIGS[""]


def unmet_precondition(node: Node, options: Mapping[str, Any]) -> str:
    """Return the first publish option that the node doesn't meet, or "" (§7.1.5)."""
    for name, wanted in options.items():
        found = node[name.removeprefix("pubsub#")]
        if (set(found) != set(wanted)) if isinstance(wanted, list) else found != wanted:
            return name
    return ""


def check_event_type(node: Node, items: Sequence[Element]) -> None:
    """Raise StanzaError unless the items are what the node is configured for (§4.3, §7.1.3.6, §7.1.3.7).

    A payload of another namespace than `pubsub#type` is laxly taken: XEP-0472 §5 puts the name of a
    profile there.
    """
    if not node["persist_items"] and not node["deliver_payloads"]:
        if items:
            raise pubsub_error("bad-request", "item-forbidden")
        return
    if not items:
        raise pubsub_error("bad-request", "item-required")
    for item in items:
        if len(item) > 1 or any(not namespace_of(payload.tag) for payload in item):
            raise pubsub_error("bad-request", "invalid-payload")
        if not len(item) and node["deliver_payloads"]:
            raise pubsub_error("bad-request", "payload-required")


# -- the engine: items


@dataclass(slots=True, frozen=True)
class PublishedItem:
    """An item: its id, the payload as XML, the full JID of who published it, when, and its place in the order."""

    id: str
    xml: str  # stands for itself: its namespace is declared, whatever is around it
    by: str
    at: str
    order: int = 0  # given by the store

    @property
    def publisher(self) -> JID:
        """The account that has published it."""
        return JID.parse(self.by).bare

    @property
    def size(self) -> int:
        """How much it counts in what an account may publish."""
        return len(self.xml.encode()) + len(self.id) + ITEM_OVERHEAD

    def text(self, *, payload: bool = True) -> str:
        """Return `<item/>` as XML, for an answer or an event."""
        start = f"<item id='{escape_attribute(self.id)}'"
        return f"{start}>{self.xml}</item>" if payload and self.xml else f"{start}/>"


def fitting_items(items: Sequence[PublishedItem], *, newest: bool) -> Sequence[PublishedItem]:
    """Return as many items as one answer can hold, from the beginning or, `newest`, from the end; at least one."""
    room, taken = MAX_ANSWER_BYTES, 0
    for item in reversed(items) if newest else items:
        room -= item.size
        if room < 0 and taken:
            break
        taken += 1
    return items[len(items) - taken :] if newest else items[:taken]


class ItemIndex:
    """The ids of an account's items by node, oldest first, with their sizes: so that nobody has to sort them."""

    def __init__(self, items: Iterable[tuple[str, PublishedItem]]) -> None:
        self.nodes: dict[str, dict[str, int]] = {}
        self.cached: dict[str, PublishedItem] = {}  # the latest item of nodes that keep none (§12.10)
        self.size = self.order = 0
        for node, item in sorted(items, key=lambda pair: pair[1].order):
            self.add(node, item)

    def add(self, node: str, item: PublishedItem) -> None:
        """Note an item as the newest of its node."""
        self.drop(node, item.id)
        self.nodes.setdefault(node, {})[item.id] = item.size
        self.size += item.size
        self.order = item.order

    def drop(self, node: str, id: str) -> None:
        """Forget an item, if there is one."""
        self.size -= self.nodes.get(node, {}).pop(id, 0)


class PubsubStore:
    """Where nodes and items lie; the engine's only way to documents.

    Documents: "pep", by account, keyed by node: see `Node.to_json`. Items are in the kinds of
    `ITEM_KINDS`, keyed by node and item id with a line break between, which no node's name
    contains: `{"xml", "by", "at", "order"}`.
    """

    def __init__(self, storage: Storage) -> None:
        self._nodes = storage.documents("pep", dict)
        self._items = {kind: storage.documents(kind, dict) for kind in {*ITEM_KINDS.values(), OTHER_ITEMS}}
        self._indexes: dict[JID, ItemIndex] = {}

    # -- nodes

    def owners(self, domain: str) -> Iterator[JID]:
        """Yield the accounts that have nodes."""
        return self._nodes.owners(domain)

    def has_nodes(self, owner: JID) -> bool:
        """Tell whether an account has any node."""
        return owner in self._nodes

    def nodes(self, owner: JID) -> Iterator[Node]:
        """Yield an account's nodes."""
        for name, stored in self._nodes.items(owner).items():
            yield Node.from_json(name, stored)

    def node(self, owner: JID, name: str) -> Node | None:
        """Return a node, or None."""
        stored = self._nodes.item(owner, name)
        return None if stored is None else Node.from_json(name, stored)

    def count(self, owner: JID) -> int:
        """Return how many nodes an account has."""
        return len(self._nodes.items(owner))

    def save(self, owner: JID, node: Node) -> None:
        """Create a node, or keep its new state."""
        self._nodes.put(owner, node.name, (node if node.created else replace(node, created=stamp())).to_json())

    def delete(self, owner: JID, name: str) -> None:
        """Remove a node with its items."""
        for id in self.ids(owner, name):
            self.retract(owner, name, id)
        self._index(owner).cached.pop(name, None)
        self._nodes.put(owner, name, None)

    def forget(self, owner: JID) -> None:
        """The account is about to go, with its documents."""
        self._indexes.pop(owner, None)

    # -- items

    def ids(self, owner: JID, name: str) -> list[str]:
        """Return the ids of a node's items, oldest first."""
        return list(self._index(owner).nodes.get(name, ()))

    def size(self, owner: JID) -> int:
        """Return how much an account has published."""
        return self._index(owner).size

    def items(self, owner: JID, name: str, ids: Iterable[str] | None = None) -> list[PublishedItem]:
        """Return those of a node's items that there are of `ids`, or all of them, oldest first."""
        wanted = self.ids(owner, name) if ids is None else ids
        return [item for id in wanted if (item := self.item(owner, name, id)) is not None]

    def item(self, owner: JID, name: str, id: str) -> PublishedItem | None:
        """Return one item, or None."""
        stored = self._kind(name).item(owner, f"{name}\n{id}")
        return None if stored is None else PublishedItem(id, **stored)

    def last(self, owner: JID, name: str) -> PublishedItem | None:
        """Return the item that was published last, or None; of a node that keeps none too, while we remember it."""
        index = self._index(owner)
        id = next(reversed(index.nodes.get(name, {})), None)
        return index.cached.get(name) if id is None else self.item(owner, name, id)

    def publish(self, owner: JID, name: str, item: PublishedItem) -> None:
        """Keep an item, in place of one with the same id; it is the newest (§12.1)."""
        index = self._index(owner)
        item = replace(item, order=index.order + 1)
        stored = {"xml": item.xml, "by": item.by, "at": item.at, "order": item.order}
        self._kind(name).put(owner, f"{name}\n{item.id}", stored)
        index.add(name, item)

    def cache(self, owner: JID, name: str, item: PublishedItem) -> None:
        """Remember the latest item of a node that keeps none, as long as there is memory for it."""
        self._index(owner).cached[name] = item

    def retract(self, owner: JID, name: str, id: str) -> None:
        """Remove one item."""
        self._kind(name).put(owner, f"{name}\n{id}", None)
        self._index(owner).drop(name, id)

    def _index(self, owner: JID) -> ItemIndex:
        """Return the order of an account's items; the account asked about last is forgotten last."""
        index = self._indexes.pop(owner, None) or ItemIndex(self._stored(owner))
        if len(self._indexes) >= MAX_INDEXED:
            del self._indexes[next(iter(self._indexes))]
        self._indexes[owner] = index
        return index

    def _stored(self, owner: JID) -> Iterator[tuple[str, PublishedItem]]:
        for documents in self._items.values():
            for key, stored in documents.items(owner).items():
                name, _break, id = key.partition("\n")
                yield name, PublishedItem(id, **stored)

    def _kind(self, name: str) -> Documents:
        kind = "pep-omemo" if name.startswith(OLD_BUNDLES) else ITEM_KINDS.get(name, OTHER_ITEMS)
        return self._items[kind]


# -- what clients want to hear (XEP-0115)

CAPS_HASHES = {"sha-1": "sha1", "sha-256": "sha256", "sha-512": "sha512"}  # §9.1: sha-1 is a must
PLUS_NOTIFY = "+notify"


class Caps(NamedTuple):
    """What presence says of a client's capabilities; all empty if nothing."""

    hash: str = ""
    ver: str = ""
    node: str = ""


class Receiver(Protocol):
    """Somebody's client that notifications can go to: a `Session` or a `Guest`."""

    jid: JID
    caps: tuple[str, str, str] | None
    caps_asked: bool
    wants: frozenset[str]


@dataclass(slots=True)
class Guest:
    """A resource that has shown its presence to an account, and is no session of a contact here.

    Contacts on other servers are guests, and so is who sends directed presence (XEP-0060 §9.1.3).
    """

    jid: JID
    owner: JID  # the account
    caps: tuple[str, str, str] | None = None
    caps_asked: bool = False
    wants: frozenset[str] = frozenset()


def caps_parts(info: Element) -> list[str]:
    """Return the parts of the string that is hashed, in order (XEP-0115 §5.1).

    Raises ValueError for an answer that is ill-formed (§5.4), or could be read in another way:
    an identity needs a category and a type (XEP-0030 §3.1), without the slash that ends them.
    """
    identities = [caps_identity(identity) for identity in info.iterfind(DISCO_INFO("identity"))]
    features = [feature.get("var", "") for feature in info.iterfind(DISCO_INFO("feature"))]
    forms = {}
    for form in info.iterfind(DATA_FORMS("x")):
        if kind := caps_form_type(form):
            if kind in forms:
                raise ValueError("two forms of one kind")
            forms[kind] = form
    if len(set(identities)) != len(identities) or len(set(features)) != len(features):
        raise ValueError("something is said twice")
    parts = sorted(identities, key=str.encode) + sorted(features, key=str.encode)
    for kind in sorted(forms, key=str.encode):
        parts += [kind, *caps_form_parts(forms[kind])]
    return [part.replace("<", "&lt;") for part in parts]  # §5.1: "<" is nothing but the end of a part


def caps_identity(identity: Element) -> str:
    """Return `category/type/lang/name`; raises ValueError."""
    category, kind, lang = identity.get("category", ""), identity.get("type", ""), identity.get(XML_LANG, "")
    if not category or not kind or "/" in category + kind + lang:
        raise ValueError("no identity")
    return "/".join((category, kind, lang, identity.get("name", "")))


def caps_form_type(form: Element) -> str:
    """Return a form's hidden FORM_TYPE, or "" (then the form doesn't count); raises ValueError for several."""
    for one in form.iterfind(DATA_FORMS("field")):
        if one.get("var") == FORM_TYPE and one.get("type") == "hidden":
            values = set(form_texts(one, "value"))
            if len(values) != 1:
                raise ValueError("several values of FORM_TYPE")
            return values.pop()
    return ""


def caps_form_parts(form: Element) -> list[str]:
    """Return the names and values of a form's fields, in order."""
    fields = [(one.get("var", ""), form_texts(one, "value")) for one in form.iterfind(DATA_FORMS("field"))]
    parts = []
    for var, values in sorted(fields, key=lambda pair: pair[0].encode()):
        if var != FORM_TYPE:
            parts += [var, *sorted(values, key=str.encode)]
    return parts


def caps_hash(parts: Iterable[str], algorithm: str) -> str:
    """Return the verification string (XEP-0115 §5.1); `algorithm` is one of `CAPS_HASHES`."""
    text = "".join(f"{part}<" for part in parts)
    return base64.b64encode(hashlib.new(CAPS_HASHES[algorithm], text.encode()).digest()).decode()


def wanted_nodes(parts: Iterable[str]) -> list[str]:
    """Return the nodes that a client wants to be notified of.

    They are read from the very string that was hashed, not from the features: there are other
    answers with the same string (§9.3), but what all of them want is the same.
    """
    return sorted({part.removesuffix(PLUS_NOTIFY) for part in parts if part.endswith(PLUS_NOTIFY)})


class Capabilities(Feature):
    """Entity Capabilities (XEP-0115): what a client wants to hear, known by a hash in its presence.

        C: <presence><c xmlns='http://jabber.org/protocol/caps' hash='sha-1' node='…' ver='Qgay…='/></presence>
        S: <iq type='get' …><query xmlns='http://jabber.org/protocol/disco#info' node='…#Qgay…='/></iq>

    Documents: "caps", by the first host, keyed by `HASH VER`: the nodes wanted, once the hash is
    verified. A client without capabilities is asked directly, when there is something that it
    could be notified of, and the answer holds for its session only.
    """

    namespace = CAPS
    server_features = (CAPS,)

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._known = server.storage.documents("caps", dict)
        self._keeper = JID("", server.config.hosts[0], "")
        self._guests: dict[JID, dict[JID, Guest]] = {}
        self._own: dict[str, str] = {}  # the server's own hash, by host

    # -- who is there

    def presence_changed(self, session: Session, old: Stanza | None, new: Stanza | None) -> None:
        """§6.2: look the hash up, or ask; nothing to do while it stays the same."""
        if new is None:
            session.caps, session.wants = None, NOTHING
        else:
            self._hear(session, new)

    @only(PRESENCE)
    def arriving(self, owner: JID, stanza: Stanza) -> Stanza | None:
        """XEP-0060 §9.1, §9.2: presence from other servers, and from strangers."""
        if stanza.get("type") in (None, "unavailable"):
            sender = JID.parse(stanza.get("from", ""))
            if not (sender.domain in self.server.config.hosts and self.server.sees(sender, owner)):
                self._meet(owner, sender, stanza)
        return stanza

    def _meet(self, owner: JID, sender: JID, presence: Stanza) -> None:
        guests = self._guests.get(owner, {})
        if presence.get("type") is not None:
            guests.pop(sender, None)
            if not guests:
                self._guests.pop(owner, None)
        elif sender in guests:
            self._hear(guests[sender], presence)
        elif presence.find(MUC_USER("x")) is None and self._has_room(owner, sender, guests):
            guest = self._guests.setdefault(owner, {})[sender] = Guest(sender, owner)
            self._hear(guest, presence)

    def _has_room(self, owner: JID, sender: JID, guests: Mapping[JID, Guest]) -> bool:
        """Whether one more guest is remembered; contacts are never crowded out by strangers."""
        if sender.is_bare:
            return False
        if self.server.sees(sender, owner):
            return sum(1 for jid in guests if jid.bare == sender.bare) < self.server.config.limits.resources
        return sum(1 for jid in guests if not self.server.sees(jid, owner)) < MAX_GUESTS

    def guests(self, owner: JID) -> Sequence[Guest]:
        """Return the resources that have shown their presence to an account, beside its contacts' sessions here."""
        return tuple(self._guests.get(owner, {}).values())

    def account_removed(self, owner: JID) -> None:
        """Nobody is a guest of the next owner of the name."""
        self._guests.pop(owner, None)

    # -- what they want

    def _hear(self, receiver: Receiver, presence: Stanza) -> None:
        element = presence.find(CAPS("c"))
        if element is None and receiver.caps is not None:
            return  # §8.4: said once is enough
        caps = Caps(*(element.get(name, "") for name in Caps._fields)) if element is not None else Caps()
        if receiver.caps == caps:
            return
        receiver.caps, receiver.caps_asked = caps, False
        known = self._known.item(self._keeper, f"{caps.hash} {caps.ver}") if caps.hash in CAPS_HASHES else None
        if known is not None:
            receiver.caps_asked = True
            self._learn(receiver, known)
        elif element is not None:
            self.ask(receiver)

    def ask(self, receiver: Receiver) -> None:
        """Ask a client what it wants, unless that was done or it is unavailable."""
        if receiver.caps is None or receiver.caps_asked:
            return
        receiver.caps_asked = True
        caps = Caps(*receiver.caps)
        about = {"node": f"{caps.node}#{caps.ver}"} if caps.hash else {}  # §5.4: a `ver` without hash is ignored
        asker = receiver.owner if isinstance(receiver, Guest) else receiver.jid.bare
        then = functools.partial(self._answered, receiver, caps)
        self.server.ask(str(asker), receiver.jid, E(DISCO_INFO("query"), about), then)

    def _answered(self, receiver: Receiver, caps: Caps, answer: Stanza | None) -> None:
        """§5.4: only what has the hash is believed and remembered, or it would poison the cache (threat S47)."""
        if answer is None or answer.get("type") != "result" or receiver.caps != caps or not len(answer):
            return
        try:
            parts = caps_parts(answer[0])
        except ValueError:
            return
        if caps.hash in CAPS_HASHES:
            if caps_hash(parts, caps.hash) != caps.ver:
                return
            self._remember(f"{caps.hash} {caps.ver}", wanted_nodes(parts))
        self._learn(receiver, wanted_nodes(parts))

    def _remember(self, key: str, nodes: Sequence[str]) -> None:
        if self.server.storage.failed or sum(map(len, nodes)) > MAX_WANTED:
            return  # it holds for this session all the same
        known = self._known.items(self._keeper)
        if key not in known and len(known) >= MAX_CAPS:
            self._known.put(self._keeper, next(iter(known)), None)
        self._known.put(self._keeper, key, list(nodes))

    def _learn(self, receiver: Receiver, nodes: Sequence[str]) -> None:
        old, receiver.wants = receiver.wants, frozenset(nodes)
        if receiver.wants - old:
            for event in self.server.registry.listeners("wants_changed"):
                event(receiver, receiver.wants - old)

    # -- our own (§6.3)

    def offer(self, stream: ClientStream) -> Element | None:
        """§6.3: a client that knows us already need not ask."""
        if stream.state is not StreamState.AUTHENTICATED:
            return None
        return E(CAPS("c"), {"hash": "sha-1", "node": CAPS_NODE, "ver": self._own_hash(stream.host)})

    def _own_hash(self, host: str) -> str:
        if host not in self._own:
            self._own[host] = caps_hash(caps_parts(self._own_info(host)), "sha-1")
        return self._own[host]

    def _own_info(self, host: str) -> Element:
        us = JID("", host, "")
        request = Iq(Stanza(IQ), E(DISCO_INFO("query")), self.server, us, us)
        info = self.server.registry.feature(Disco).server_info(request)
        assert isinstance(info, str)
        return parse_element(info)

    def disco_node(self, request: Iq, node: str) -> Element | None:
        """§6.3: what the hash stands for."""
        host = request.owner.domain
        is_ours = not request.owner.local and request.payload.tag == DISCO_INFO("query")
        if not is_ours or node != f"{CAPS_NODE}#{self._own_hash(host)}":
            return None
        info = self._own_info(host)
        info.set("node", node)
        return info

    def reloaded(self) -> None:
        """Another configuration may bring other features."""
        self._own.clear()


# -- publishing and telling


class PersonalEventing(Feature):
    """Personal Eventing Protocol (XEP-0163): publish-subscribe for each account, told to whoever wants to know.

        C: <iq type='set' id='p1'><pubsub xmlns='http://jabber.org/protocol/pubsub'>
             <publish node='http://jabber.org/protocol/mood'><item><mood …/></item></publish></pubsub></iq>
        S: <iq type='result' id='p1'><pubsub …><publish node='…'><item id='…'/></publish></pubsub></iq>
        S: <message from='juliet@example.org' to='…' type='headline'><event …><items node='…'>…</items></event>…
    """

    namespace = PUBSUB
    account_features = (*(f"{PUBSUB}#{name}" for name in PUBSUB_FEATURES),)

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.store = PubsubStore(server.storage)
        self._before: dict[tuple[JID, JID], Viewer] = {}  # what a contact was before a change of the roster

    # -- who asks for what

    def viewer(self, owner: JID, jid: JID) -> Viewer:
        """Return what the account knows of who asks."""
        if jid.bare == owner:
            return Viewer(jid, is_owner=True, sees=True)
        item = self.server.rosters.item(owner, str(jid.bare)) or {}
        sees = item.get("subscription") in ("from", "both")
        return Viewer(jid, is_owner=False, sees=sees, groups=frozenset(item.get("groups", ())))

    def asker(self, request: Iq) -> Viewer:
        """Return what the account that is asked knows of who asks."""
        return self.viewer(request.owner, request.sender)

    def existing_node(self, request: Iq, element: Element) -> Node:
        """Return the node that a request is about; raises StanzaError.

        To a stranger a node that isn't there looks like an account that isn't there (threat S58).
        """
        name = element.get("node")
        if not name:
            raise pubsub_error("bad-request", "nodeid-required")
        node = self.store.node(request.owner, name)
        if node is None:
            raise StanzaError("item-not-found" if self.asker(request).sees else "service-unavailable")
        return node

    # -- publishing (§7.1)

    @iq("set", PUBSUB("pubsub"), PUBSUB("publish"), to="self account")
    def publish(self, request: Iq) -> Payload:
        """§7.1: check all, create the node if need be, keep, answer with the ids of the items, tell."""
        owner, element = request.owner, inner_element(request, PUBSUB("publish"))
        options = self._publish_options(request.payload)
        node, is_new = self._node_to_publish(request, element, options)
        found = element.findall(PUBSUB("item"))
        check_event_type(node, found)
        items = [self._read_item(request, item) for item in found]
        if not is_new and (unmet := unmet_precondition(node, options)):
            raise pubsub_error("conflict", "precondition-not-met", f"{unmet} is not as you want it")
        self._check_items(request, node, items)
        if is_new:
            self.store.save(owner, node)
        lost = self._keep(owner, node, items)
        request.afterwards(lambda: self._published(owner, node, items, lost))
        ids = (E(PUBSUB("item"), id=item.id) for item in items)
        return E(PUBSUB("pubsub"), None, E(PUBSUB("publish"), {"node": node.name}, *ids))

    def _publish_options(self, payload: Element) -> Mapping[str, Any]:
        element = payload.find(PUBSUB("publish-options"))
        form = Form.within(element) if element is not None else None
        if form is None:
            return {}
        known = {one.var for one in PUBLISH_OPTIONS.fields}
        unknown = [one.var for one in form.fields if one.var not in known and one.var != FORM_TYPE]
        if unknown:
            raise pubsub_error("conflict", "precondition-not-met", f"{unknown[0]} is not known here")
        return PUBLISH_OPTIONS.read(form) or {}

    def _node_to_publish(self, request: Iq, element: Element, options: Mapping[str, Any]) -> tuple[Node, bool]:
        """Return the node, and whether it is still to be created (XEP-0163 §3)."""
        name, viewer = element.get("node"), self.asker(request)
        if not name:
            raise pubsub_error("bad-request", "nodeid-required")
        node = self.store.node(request.owner, name)
        if node is not None:
            node.check_publish(viewer)
            return node, False
        if not viewer.is_owner:
            raise StanzaError("forbidden" if viewer.sees else "service-unavailable")
        self.check_new(request.owner, name, options)
        return Node(name, options), True

    def check_new(self, owner: JID, name: str, config: Mapping[str, Any]) -> None:
        """Raise StanzaError unless an account may have a node of this name and configuration."""
        most = self.server.config.limits.pep_nodes
        if self.store.count(owner) >= most:
            raise StanzaError("resource-constraint", f"an account has room for {most} nodes")
        if len(name) > MAX_NODE_ID or "\n" in name:
            raise StanzaError("not-acceptable", f"a node's name is one line of at most {MAX_NODE_ID} characters")
        self.check_config(config)

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise StanzaError for more than this server keeps."""
        most, wanted = self.server.config.limits.pep_items, config.get("pubsub#max_items", 1)
        if wanted != "max" and wanted > most:
            raise StanzaError("not-acceptable", f"pubsub#max_items: expected at most {most}, or max")

    def _read_item(self, request: Iq, item: Element) -> PublishedItem:
        id = item.get("id") or secrets.token_urlsafe(12)
        xml = serialize(item[0]) if len(item) else ""
        if len(xml.encode()) > MAX_ITEM_BYTES:
            raise pubsub_error("not-acceptable", "payload-too-big")
        if len(id) > MAX_NODE_ID:
            raise StanzaError("not-acceptable", "the item's id is too long")
        return PublishedItem(id, xml, str(request.sender), stamp())

    def _check_items(self, request: Iq, node: Node, items: Sequence[PublishedItem]) -> None:
        """§7.1.3, §12.11: all of the items, or none of them."""
        capacity = self._capacity(node)
        if len(items) > capacity:
            raise pubsub_error("not-allowed", "max-items-exceeded")
        if not node["persist_items"]:
            return
        known = self.store.items(request.owner, node.name, [item.id for item in items])
        viewer = self.asker(request)
        if not all(node.may_change(viewer, item) for item in known):
            raise StanzaError("forbidden", "the item is somebody else's")
        new = {item.id for item in items} - {item.id for item in known}
        after = len(self.store.ids(request.owner, node.name)) + len(new)
        if node["publish_node_full"] == "reject" and after > capacity:
            raise pubsub_error("conflict", "node-full")
        self._check_room(request.owner, sum(item.size for item in items) - sum(item.size for item in known))

    def _check_room(self, owner: JID, more: int) -> None:
        if self.store.size(owner) + more > self.server.config.limits.pep_bytes:
            raise StanzaError("resource-constraint", "the account has published too much")

    def _capacity(self, node: Node) -> int:
        most, wanted = self.server.config.limits.pep_items, node["max_items"]
        return most if wanted == "max" else min(wanted, most)

    def _keep(self, owner: JID, node: Node, items: Sequence[PublishedItem]) -> list[str]:
        """Keep items as the node wants it; return the ids of those that have lost their place (§7.1.2.5)."""
        if not node["persist_items"]:
            for item in items:
                self.store.cache(owner, node.name, item)
            return []
        for item in items:
            self.store.publish(owner, node.name, item)
        return self._trim(owner, node)

    def _trim(self, owner: JID, node: Node) -> list[str]:
        ids, capacity = self.store.ids(owner, node.name), self._capacity(node) if node["persist_items"] else 0
        lost = ids[: max(0, len(ids) - capacity)]
        for id in lost:
            self.store.retract(owner, node.name, id)
        return lost

    def _published(self, owner: JID, node: Node, items: Sequence[PublishedItem], lost: Sequence[str]) -> None:
        """Tell, once it is answered. Where there is one item only, everybody knows that the old one is gone."""
        if lost and self._capacity(node) > 1 and node["publish_node_full"] == "retract-oldest":
            self.tell_retracted(owner, node, lost)
        self.tell_items(owner, node, items)
        self._announce("retracted", owner, node.name, lost)
        for item in items:
            self._announce("published", owner, node.name, item)

    def _announce(self, event: str, owner: JID, node: str, what: PublishedItem | Sequence[str]) -> None:
        for listener in self.server.registry.listeners(event) if what else ():
            listener(owner, node, what)

    def publish_for(self, owner: JID, name: str, items: Mapping[str, Element], config: Mapping[str, Any]) -> None:
        """Publish in the name of an account, as the conversions do; a new node gets this configuration.

        Raises StanzaError when there is no room.
        """
        node = self.store.node(owner, name)
        made = [PublishedItem(id, serialize(payload), str(owner), stamp()) for id, payload in items.items()]
        if node is None:
            self.check_new(owner, name, config)
        self._check_room(owner, sum(item.size for item in made))
        if node is None:
            node = Node(name, config)
            self.store.save(owner, node)
        lost = self._keep(owner, node, made)
        if lost and self._capacity(node) > 1:
            self.tell_retracted(owner, node, lost)
        self.tell_items(owner, node, made)

    # -- removing (§7.2)

    @iq("set", PUBSUB("pubsub"), PUBSUB("retract"), to="self account")
    def retract(self, request: Iq) -> Payload:
        """§7.2: remove items, and say so when the node or the client wants it; all, or none of them."""
        owner, element = request.owner, inner_element(request, PUBSUB("retract"))
        node, viewer = self.existing_node(request, element), self.asker(request)
        ids = [item.get("id", "") for item in element.iterfind(PUBSUB("item"))]
        if not ids or not all(ids):
            raise pubsub_error("bad-request", "item-required")
        if not viewer.is_owner:
            node.check_publish(viewer)  # first: whether there is such an item is not for everybody
        if not node["persist_items"]:
            raise unsupported("persistent-items")
        found = [self.store.item(owner, node.name, id) for id in ids]
        for item in found:
            if item is None:
                raise StanzaError("item-not-found")
            if not node.may_change(viewer, item):
                raise StanzaError("forbidden")
        self.remove(owner, node, ids)
        is_told = node["notify_retract"] or element.get("notify") in ("1", "true")
        request.afterwards(lambda: self._removed(owner, node, ids, is_told=is_told))
        return None

    def remove(self, owner: JID, node: Node, ids: Iterable[str]) -> None:
        """Remove items (checked)."""
        for id in ids:
            self.store.retract(owner, node.name, id)

    def _removed(self, owner: JID, node: Node, ids: Sequence[str], *, is_told: bool) -> None:
        if is_told:
            self.tell_retracted(owner, node, ids)
        self._announce("retracted", owner, node.name, ids)

    def empty(self, owner: JID, node: Node) -> None:
        """Remove all items of a node; only the conversions hear of it here."""
        ids = self.store.ids(owner, node.name)
        self.remove(owner, node, ids)
        self._announce("retracted", owner, node.name, ids)

    # -- reading (§6.5)

    @iq("get", PUBSUB("pubsub"), PUBSUB("items"), to="self account")
    def items(self, request: Iq) -> Payload:
        """§6.5: all items, the latest few, some by id, or a page."""
        owner, element = request.owner, inner_element(request, PUBSUB("items"))
        node = self.existing_node(request, element)
        node.check_read(self.asker(request))
        wanted = [item.get("id", "") for item in element.iterfind(PUBSUB("item"))]
        if wanted:
            return self._items_answer(node, self._by_id(owner, node, wanted))
        ids, most = self.store.ids(owner, node.name), element.get("max_items")
        if most is not None:
            if not re.fullmatch("[0-9]{1,9}", most):
                raise StanzaError("bad-request", "max_items is a whole number")
            ids = ids[max(0, len(ids) - int(most)) :]
        if not ids and not node["persist_items"]:
            cached = self.store.last(owner, node.name)
            return self._items_answer(node, [cached] if cached is not None else [])  # §6.5.5
        return self._items_answer(node, *self._some(owner, node, request.payload, ids))

    def _by_id(self, owner: JID, node: Node, wanted: Iterable[str]) -> Sequence[PublishedItem]:
        found = self.store.items(owner, node.name, dict.fromkeys(wanted))  # nobody gets one a thousand times
        if len(fitting_items(found, newest=False)) < len(found):
            raise StanzaError("policy-violation", "ask for fewer items at a time")
        return found

    def _some(self, owner: JID, node: Node, payload: Element,
              ids: Sequence[str]) -> tuple[Sequence[PublishedItem], Element | None]:  # fmt: skip
        """§6.5.4: a page if one is asked for, else all; if they are too many, the newest."""
        asked = payload.find(RSM("set"))
        newest, pages = True, None
        if asked is not None:
            shown, pages = page(payload, [(id, id) for id in ids])
            found = self.store.items(owner, node.name, (id for id, _item in shown))
            newest = asked.find(RSM("before")) is not None
        else:
            found = self.store.items(owner, node.name, ids)
        fitting = fitting_items(found, newest=newest)
        if len(fitting) < len(found):
            pages = page_answer(fitting[0].id, fitting[-1].id, ids.index(fitting[0].id), len(ids))
        return fitting, pages

    @staticmethod
    def _items_answer(node: Node, items: Iterable[PublishedItem], pages: Element | None = None) -> str:
        """What lies in documents as XML needn't be parsed to be sent."""
        listed = items_text(node, "".join(item.text() for item in items))
        return f"<pubsub xmlns='{PUBSUB}'>{listed}{'' if pages is None else serialize(pages)}</pubsub>"

    # -- telling (XEP-0163 §4.3)

    def tell_items(self, owner: JID, node: Node, items: Sequence[PublishedItem]) -> None:
        """Tell all who want to know of new items; of a node without items, that something has happened (§4.3)."""
        if node["deliver_notifications"]:
            text = "".join(item.text(payload=node["deliver_payloads"]) for item in items)
            publisher = JID.parse(items[-1].by) if items else owner
            self.tell(owner, node, items_text(node, text), publisher)

    def tell_retracted(self, owner: JID, node: Node, ids: Iterable[str]) -> None:
        """Tell all who want to know that items are gone (§7.2.2.1)."""
        if node["deliver_notifications"]:
            gone = (E(PUBSUB_EVENT("retract"), id=id) for id in ids)
            self.tell(owner, node, E(PUBSUB_EVENT("items"), {"node": node.name}, *gone))

    def tell(self, owner: JID, node: Node, what: Element | str, publisher: JID | None = None) -> None:
        """Send one event to everybody entitled, once each; it is written twice at most, however many they are."""
        event = notification(owner, node, what)
        for_friends = with_reply_to(event, owner, publisher or owner)
        for address, sees in self.audience(owner, node).items():
            self._send(for_friends if sees else event, address)

    def _send(self, event: Stanza, to: str) -> None:
        """Sessions here get it at once, past the filters of what arrives from others; their own lists still count."""
        session = self.server.session(JID.parse(to))
        if session is not None:
            session.send(event.addressed(to=to))
        else:
            self.server.emit(event.addressed(to=to))

    def audience(self, owner: JID, node: Node) -> dict[str, bool]:
        """Return who is to be told, by address, and whether each sees the owner's presence (§4.3.2).

        Nobody from whom the owner hides (§4.3.3). What the receivers' lists say is obeyed on the way.
        """
        audience = dict.fromkeys(self._wanting(self.server.sessions(owner), node), True)
        for contact, item in self.server.registry.feature(Roster).contacts(owner, "from", "both"):
            jid = JID.parse(contact)
            wanting = self._wanting(self.server.sessions(jid), node)
            viewer = Viewer(jid, is_owner=False, sees=True, groups=frozenset(item.get("groups", ())))
            if wanting and node.may_read(viewer) and not self.server.hides(owner, jid):
                audience.update(dict.fromkeys(wanting, True))
        guests = self.server.registry.feature(Capabilities).guests(owner)
        for guest in [guest for guest in guests if self._wanting([guest], node)]:
            viewer = self.viewer(owner, guest.jid)
            if self._hears(owner, node, viewer) and not self.server.hides(owner, guest.jid):
                audience[str(guest.jid)] = viewer.sees
        if node.subscriptions:
            self._add_subscribers(owner, node, audience)
        return audience

    def _wanting(self, receivers: Iterable[Receiver], node: Node) -> list[str]:
        """Return the addresses of those who want to hear of a node; who has not said so is asked, and gets it then."""
        capabilities = self.server.registry.feature(Capabilities)
        for receiver in receivers:
            if not receiver.caps_asked:
                capabilities.ask(receiver)
        return [str(receiver.jid) for receiver in receivers if node.name in receiver.wants]

    @staticmethod
    def _hears(owner: JID, node: Node, viewer: Viewer) -> bool:
        """XEP-0060 §9.1: subscribers to the presence hear what they may read; other visitors what everybody may."""
        return (viewer.sees or node["access_model"] == "open") and node.may_read(viewer)

    def _add_subscribers(self, owner: JID, node: Node, audience: dict[str, bool]) -> None:
        """§4.3.2: full JIDs get one notification; bare ones too, unless a resource has got it."""
        told = {address.partition("/")[0] for address in audience}
        for address, state in node.subscriptions.items():
            if state != "subscribed" or address in told:
                continue
            jid = JID.parse(address)
            viewer = self.viewer(owner, jid)
            if node.may_read(viewer) and not (jid.bare != owner and self.server.hides(owner, jid)):
                audience[address] = viewer.sees

    def send_last(self, owner: JID, node: Node, to: JID) -> None:
        """§4.3.4: send the latest item, stamped with when it was published."""
        item = self.store.last(owner, node.name)
        if item is None or not node["deliver_notifications"] or (to.bare != owner and self.server.hides(owner, to)):
            return
        text = item.text(payload=node["deliver_payloads"])
        event = notification(owner, node, items_text(node, text))
        event.add(serialize(E(DELAY("delay"), {"from": str(owner), "stamp": item.at})))
        if self.viewer(owner, to).sees:
            event = with_reply_to(event, owner, JID.parse(item.by))
        self._send(event, str(to))

    def _send_last_of(self, owner: JID, receiver: Receiver, wanted: Iterable[str]) -> None:
        if not self.store.has_nodes(owner):
            return
        viewer = self.viewer(owner, receiver.jid)
        for name in wanted:
            node = self.store.node(owner, name)
            if node is not None and node["send_last_published_item"] == "on_sub_and_presence" \
                    and self._hears(owner, node, viewer):  # fmt: skip
                self.send_last(owner, node, receiver.jid)

    # -- events

    def presence_changed(self, session: Session, old: Stanza | None, new: Stanza | None) -> None:
        """XEP-0163 §4.3.3, for clients without capabilities: worth a question only if there is something to tell."""
        if old is not None or new is None or session.caps_asked:
            return
        if any(map(self.store.has_nodes, [session.bare, *self._seen_accounts(session)])):
            self.server.registry.feature(Capabilities).ask(session)

    def _seen_accounts(self, session: Session) -> list[JID]:
        """Return the contacts here whose presence the session's account sees."""
        contacts = self.server.registry.feature(Roster).contacts(session.bare, "to", "both")
        jids = (JID.parse(contact) for contact, _item in contacts)
        return [jid for jid in jids if jid.domain in self.server.config.hosts]

    def wants_changed(self, receiver: Receiver, new: frozenset[str]) -> None:
        """§4.3.3: who has come online, or wants more, gets the latest of its own account and of its contacts."""
        if isinstance(receiver, Guest):
            return self._send_last_of(receiver.owner, receiver, sorted(new))
        assert isinstance(receiver, Session)
        for owner in [receiver.bare, *self._seen_accounts(receiver)]:
            self._send_last_of(owner, receiver, sorted(new))

    def roster_changing(self, owner: JID, contact: JID) -> None:
        """§7.1: keep what the contact was."""
        self._before[owner, contact] = self.viewer(owner, contact)

    def roster_changed(self, owner: JID, contact: JID) -> None:
        """§4.3.4, §7.1: who may read more gets the latest of it; who has lost access loses subscriptions."""
        before, after = self._before.pop((owner, contact)), self.viewer(owner, contact)
        if before == after:
            return
        for node in list(self.store.nodes(owner)):
            self.without_unentitled(owner, node)
            gained = self._hears(owner, node, after) and not (before.sees and node.may_read(before))
            for session in self.server.sessions(contact) if gained else ():
                if node.name in session.wants and node["send_last_published_item"] != "never":
                    self.send_last(owner, node, session.jid)

    def account_removed(self, owner: JID) -> None:
        """The next owner of the name inherits nothing: no subscription, no place on a list."""
        self.store.forget(owner)
        for host in self.server.config.hosts:
            for other in list(self.store.owners(host)):
                for node in list(self.store.nodes(other)) if other != owner else ():
                    self._forget(other, node, owner)

    def _forget(self, other: JID, node: Node, gone: JID) -> None:
        affiliations = {jid: what for jid, what in node.affiliations.items() if jid != str(gone)}
        subscriptions = {jid: state for jid, state in node.subscriptions.items() if JID.parse(jid).bare != gone}
        changed = replace(node, affiliations=affiliations, subscriptions=subscriptions)
        if changed != node:
            self.store.save(other, changed)

    # -- changes of a node

    def change(self, owner: JID, old: Node, new: Node) -> None:
        """Keep a node's new state: who has lost access loses subscriptions (§14.3), who gains it gets the latest."""
        before = self.audience(owner, old)
        self.store.save(owner, new)
        self._trim(owner, new)
        new = self.without_unentitled(owner, new)
        if new["send_last_published_item"] == "never":
            return
        for address in self.audience(owner, new):
            if address not in before:  # §12.2
                self.send_last(owner, new, JID.parse(address))

    def without_unentitled(self, owner: JID, node: Node) -> Node:
        """XEP-0163 §7.1: lost access ends the subscription, and the subscriber hears of it; return what is left."""
        lost = [jid for jid, state in node.subscriptions.items()
                if state == "subscribed" and not node.may_read(self.viewer(owner, JID.parse(jid)))]  # fmt: skip
        for jid in lost:
            node = self.set_subscription(owner, node, jid, "none")
        return node

    def set_subscription(self, owner: JID, node: Node, jid: str, state: str) -> Node:
        """Change a subscription from the account's side, and tell the subscriber (§8.8.4, §12.14)."""
        if node.subscriptions.get(jid, "none") == state:
            return node
        left = {other: known for other, known in node.subscriptions.items() if other != jid}
        node = replace(node, subscriptions=left if state == "none" else {**left, jid: state})
        self.store.save(owner, node)
        if not self.server.hides(owner, JID.parse(jid)):
            told = Stanza(MESSAGE, {"from": str(owner), "to": jid, "id": secrets.token_urlsafe(9)})
            told.add(E(PUBSUB_EVENT("event"), None, subscription_element(PUBSUB_EVENT, node.name, jid, state)))
            self.server.emit(told)
        if state == "subscribed" and node["send_last_published_item"] != "never":
            self.send_last(owner, node, JID.parse(jid))  # §12.10
        return node

    # -- service discovery

    def disco_info(self, request: Iq, info: Element) -> None:
        """XEP-0163 §6.1: the account is a pubsub service."""
        if request.owner.local:
            info.insert(0, E(DISCO_INFO("identity"), category="pubsub", type="pep"))

    def disco_items(self, request: Iq, items: Element) -> None:
        """XEP-0163 §6.2: the nodes that who asks may read."""
        if request.owner.local:
            viewer = self.asker(request)
            names = [node.name for node in self.store.nodes(request.owner) if node.may_read(viewer)]
            items.extend(E(DISCO_ITEMS("item"), jid=str(request.owner), node=name) for name in names)

    def disco_node(self, request: Iq, node: str) -> Element | None:
        """§5.3 to §5.5: what a node is, and the ids of its items."""
        found = self.store.node(request.owner, node) if request.owner.local else None
        if found is None:
            return None
        found.check_read(self.asker(request))
        if request.payload.tag == DISCO_ITEMS("query"):
            ids = self.store.ids(request.owner, node)
            return E(DISCO_ITEMS("query"), {"node": node}, *(
                E(DISCO_ITEMS("item"), jid=str(request.owner), name=id) for id in ids))  # fmt: skip
        identity = E(DISCO_INFO("identity"), category="pubsub", type="leaf")
        subscribers = sum(1 for state in found.subscriptions.values() if state == "subscribed")
        about = {**found.whole_config, "pubsub#creation_date": found.created, "pubsub#owner": [request.owner],
                 "pubsub#num_subscribers": str(subscribers)}  # fmt: skip
        form = METADATA_FORM.fill(about, "result").to_element()
        features = (E(DISCO_INFO("feature"), var=name) for name in (PUBSUB, DISCO_INFO, DISCO_ITEMS))
        return E(DISCO_INFO("query"), {"node": node}, identity, *features, form)


def inner_element(request: Iq, tag: str) -> Element:
    """Return what stands in the wrapper of a request; there is such an element, or the request had not come here."""
    element = request.payload.find(tag)
    assert element is not None
    return element


def items_text(node: Node, items: str) -> str:
    """Return `<items/>` around what is written already, for an answer or an event."""
    return f"<items node='{escape_attribute(node.name)}'>{items}</items>"


def notification(owner: JID, node: Node, what: Element | str) -> Stanza:
    """Return an event, not yet addressed (XEP-0163 §4.3.1); its id names no item and no node (§12.4).

    All that is in it is written already: the filters have nothing to look for.
    """
    event = Stanza(MESSAGE, {"from": str(owner), "id": secrets.token_urlsafe(9)})
    if node["notification_type"] != "normal":
        event.set("type", node["notification_type"])
    text = what if isinstance(what, str) else serialize(what, PUBSUB_EVENT)
    event.add(f"<event xmlns='{PUBSUB_EVENT}'>{text}</event>")
    return event


def with_reply_to(event: Stanza, owner: JID, publisher: JID) -> Stanza:
    """XEP-0163 §4.3.1: add which of the owner's resources has published; for those who see its presence only."""
    if publisher.bare != owner or not publisher.resource:
        return event
    event = event.addressed()
    address = E(ADDRESS("address"), type="replyto", jid=str(publisher))
    event.add(serialize(E(ADDRESS("addresses"), None, address)))
    return event


def subscription_element(namespace: Namespace, node: str, jid: str, state: str) -> Element:
    """Build `<subscription/>` (§5.6, §6.1.2, §12.14)."""
    return E(namespace("subscription"), node=node, jid=jid, subscription=state)


# -- subscribing


class NodeSubscriptions(Feature):
    """Publish-Subscribe (XEP-0060), for subscribers: to hear of a node whatever one's client says that it wants.

        C: <iq type='set' to='juliet@example.org' id='s1'><pubsub xmlns='http://jabber.org/protocol/pubsub'>
             <subscribe node='urn:xmpp:microblog:0' jid='romeo@example.org'/></pubsub></iq>
        S: <iq type='result' …><pubsub …><subscription node='…' jid='…' subscription='subscribed'/></pubsub></iq>
    """

    namespace = PUBSUB

    @property
    def eventing(self) -> PersonalEventing:
        """The nodes."""
        return self.server.registry.feature(PersonalEventing)

    @iq("set", PUBSUB("pubsub"), PUBSUB("subscribe"), to="self account")
    def subscribe(self, request: Iq) -> Payload:
        """§6.1: for those who may read; with the model `authorize` the owner is asked first."""
        owner, element = request.owner, inner_element(request, PUBSUB("subscribe"))
        node = self.eventing.existing_node(request, element)
        jid = subscriber(request, element)
        if jid is None:
            raise pubsub_error("bad-request", "invalid-jid")
        state = self._state_for(request, node, str(jid))
        if str(jid) not in node.subscriptions:
            if len(node.subscriptions) >= self.server.config.limits.pep_subscribers:
                raise pubsub_error("policy-violation", "too-many-subscriptions")
            node = replace(node, subscriptions={**node.subscriptions, str(jid): state})
            self.eventing.store.save(owner, node)
            if state == "pending":
                request.afterwards(lambda: self._ask_owner(owner, node, jid))
        if state == "subscribed" and node["send_last_published_item"] != "never":
            request.afterwards(lambda: self.eventing.send_last(owner, node, jid))  # §6.1.7
        return E(PUBSUB("pubsub"), None, subscription_element(PUBSUB, node.name, str(jid), state))

    def _state_for(self, request: Iq, node: Node, jid: str) -> str:
        """Return what a subscription is or becomes (§6.1.3, §6.1.4, §6.1.6); raises StanzaError."""
        viewer, known = self.eventing.asker(request), node.subscriptions.get(jid)
        if known == "pending":
            raise pubsub_error("not-authorized", "pending-subscription")
        if not node["subscribe"]:
            raise unsupported("subscribe")
        if node["access_model"] == "authorize" and node.affiliation_of(viewer) == "none":
            return node.subscription_of(viewer).replace("none", "pending")  # one answer is enough for all resources
        node.check_read(viewer)
        return "subscribed"

    @iq("set", PUBSUB("pubsub"), PUBSUB("unsubscribe"), to="self account")
    def unsubscribe(self, request: Iq) -> Payload:
        """§6.2. There are no subscription identifiers; one that comes along is ignored (§6.2.3.5)."""
        element = inner_element(request, PUBSUB("unsubscribe"))
        node = self.eventing.existing_node(request, element)
        jid = subscriber(request, element)
        if jid is None:
            raise StanzaError("forbidden")
        if str(jid) not in node.subscriptions:
            raise pubsub_error("unexpected-request", "not-subscribed")
        left = {other: state for other, state in node.subscriptions.items() if other != str(jid)}
        self.eventing.store.save(request.owner, replace(node, subscriptions=left))
        return None

    @iq("get", PUBSUB("pubsub"), PUBSUB("subscriptions"), to="self account")
    def own_subscriptions(self, request: Iq) -> Payload:
        """§5.6: those of who asks, at this account or at one of its nodes."""
        element, bare = inner_element(request, PUBSUB("subscriptions")), str(request.sender.bare)
        found = [subscription_element(PUBSUB, node.name, jid, state)
                 for node in self._asked_nodes(request, element) for jid, state in node.subscriptions.items()
                 if jid.partition("/")[0] == bare]  # fmt: skip
        return E(PUBSUB("pubsub"), None, E(PUBSUB("subscriptions"), _node_of(element), *found))

    @iq("get", PUBSUB("pubsub"), PUBSUB("affiliations"), to="self account")
    def own_affiliations(self, request: Iq) -> Payload:
        """§5.7: likewise."""
        element, viewer = inner_element(request, PUBSUB("affiliations")), self.eventing.asker(request)
        known = [(node.name, node.affiliation_of(viewer)) for node in self._asked_nodes(request, element)]
        found = (E(PUBSUB("affiliation"), node=name, affiliation=what) for name, what in known if what != "none")
        return E(PUBSUB("pubsub"), None, E(PUBSUB("affiliations"), _node_of(element), *found))

    def _asked_nodes(self, request: Iq, element: Element) -> Iterable[Node]:
        if element.get("node"):
            return [self.eventing.existing_node(request, element)]
        return self.eventing.store.nodes(request.owner)

    @iq("get set", PUBSUB("pubsub"), PUBSUB("options"), to="self account")
    def options(self, request: Iq) -> Payload:
        """§6.3.4.6: there are none."""
        raise unsupported("subscription-options")

    @iq("get", PUBSUB("pubsub"), PUBSUB("default"), to="self account")
    def default_options(self, request: Iq) -> Payload:
        """§6.4.3.1: likewise."""
        raise unsupported("subscription-options")

    # -- asking the owner (§8.6)

    def _ask_owner(self, owner: JID, node: Node, jid: JID) -> None:
        question = Stanza(MESSAGE, {"from": str(owner), "id": secrets.token_urlsafe(9), "to": str(owner)})
        question.add(APPROVAL_FORM.fill({"pubsub#node": node.name, "pubsub#subscriber_jid": jid}).to_element())
        self.server.emit(question)

    @only(MESSAGE)
    def sending(self, session: Session, stanza: Stanza) -> Stanza | None:
        """§8.6: the owner's answer comes as a message to the own account."""
        to = stanza.get("to")
        if to is not None and ("/" in to or to != str(session.bare)):
            return stanza
        form = Form.within(stanza)
        if form is None or form.form_type != APPROVAL_FORM.form_type:
            return stanza
        values = APPROVAL_FORM.read(form)
        if values is not None:  # cancelled: the question stays open
            self._decide(session.bare, values)
        return None

    def _decide(self, owner: JID, values: Mapping[str, Any]) -> None:
        node = self.eventing.store.node(owner, values.get("pubsub#node", ""))
        jid, allow = str(values.get("pubsub#subscriber_jid", "")), values.get("pubsub#allow")
        if allow is None:
            raise StanzaError("bad-request", "the form doesn't say whether to allow it")
        if node is None or node.subscriptions.get(jid) != "pending":
            raise StanzaError("item-not-found")
        self.eventing.set_subscription(owner, node, jid, "subscribed" if allow else "none")

    @only(MESSAGE)
    def arriving(self, owner: JID, stanza: Stanza) -> Stanza | None:
        """§12.4: an address that is no more ends its subscriptions; other errors will pass by themselves."""
        if stanza.get("type") == "error" and stanza.get("to") == str(owner):
            error, sender = stanza.find(CLIENT("error")), stanza.get("from", "")
            if error is not None and (error.get("type") == "cancel" or error.find(STANZA_ERRORS("gone")) is not None):
                for node in list(self.eventing.store.nodes(owner)):
                    left = {jid: state for jid, state in node.subscriptions.items() if jid != sender}
                    if left != node.subscriptions:
                        self.eventing.store.save(owner, replace(node, subscriptions=left))
        return stanza


def subscriber(request: Iq, element: Element) -> JID | None:
    """Return who is to be subscribed; None for anybody else than who asks, by whatever resource (§6.1.3.1)."""
    try:
        jid = JID.parse(element.get("jid", ""))
    except StanzaError:
        return None
    return jid if jid.bare == request.sender.bare else None


# -- the owner's requests


class NodeOwnership(Feature):
    """Nodes from their owner's side (XEP-0060 §8): create, configure, empty, delete them, and say who may what.

        C: <iq type='get' id='c1'><pubsub xmlns='http://jabber.org/protocol/pubsub#owner'>
             <configure node='http://jabber.org/protocol/mood'/></pubsub></iq>
        S: <iq type='result' id='c1'><pubsub …><configure node='…'><x …/></configure></pubsub></iq>
    """

    namespace = PUBSUB_OWNER

    @property
    def eventing(self) -> PersonalEventing:
        """The nodes."""
        return self.server.registry.feature(PersonalEventing)

    def _owned(self, request: Iq, name: str) -> tuple[Node, Element]:
        """Return the node of a request, and its element called `name`; raises StanzaError (§14.2)."""
        if request.sender.bare != request.owner:
            raise StanzaError("forbidden")
        element = inner_element(request, PUBSUB_OWNER(name))
        return self.eventing.existing_node(request, element), element

    @iq("set", PUBSUB("pubsub"), PUBSUB("create"), to="self account")
    def create(self, request: Iq) -> Payload:
        """§8.1: with a configuration, if one comes along; without a name it gets one."""
        owner, element = request.owner, inner_element(request, PUBSUB("create"))
        if request.sender.bare != owner:
            raise StanzaError("forbidden")
        name = element.get("node") or secrets.token_urlsafe(12)
        if self.eventing.store.node(owner, name) is not None:
            raise StanzaError("conflict")
        config = self._config_beside(request.payload)
        self.eventing.check_new(owner, name, config)
        self.eventing.store.save(owner, Node(name, config))
        return None if element.get("node") else E(PUBSUB("pubsub"), None, E(PUBSUB("create"), node=name))

    def _config_beside(self, payload: Element) -> Mapping[str, Any]:
        """Return what `<configure/>` says, which stands behind `<create/>` and names no node (§8.1.3)."""
        configure = payload.find(PUBSUB("configure"))
        if configure is None:
            return {}
        if payload[0] is configure or configure.get("node"):
            raise StanzaError("bad-request", "configure follows create, and names no node")
        form = Form.within(configure)
        return {} if form is None else self._read_config(form) or {}

    @staticmethod
    def _read_config(form: Form) -> dict[str, Any] | None:
        """Return what a form sets, None if it is cancelled; raises StanzaError (§8.1.2, §8.2.5.2)."""
        models = form.texts("pubsub#access_model") or []
        if form.type == "submit" and any(model and model not in ACCESS_MODELS for model in models):
            raise pubsub_error("not-acceptable", "unsupported-access-model")
        return NODE_FORM.read(form)

    @iq("get", PUBSUB_OWNER("pubsub"), PUBSUB_OWNER("default"), to="self")
    def default_configuration(self, request: Iq) -> Payload:
        """§8.3."""
        return E(PUBSUB_OWNER("pubsub"), None, E(PUBSUB_OWNER("default"), None, NODE_FORM.fill().to_element()))

    @iq("get", PUBSUB_OWNER("pubsub"), PUBSUB_OWNER("configure"), to="self account")
    def configuration(self, request: Iq) -> Payload:
        """§8.2: the form, with what is set."""
        node, _element = self._owned(request, "configure")
        form = NODE_FORM.fill(node.whole_config).to_element()
        return E(PUBSUB_OWNER("pubsub"), None, E(PUBSUB_OWNER("configure"), {"node": node.name}, form))

    @iq("set", PUBSUB_OWNER("pubsub"), PUBSUB_OWNER("configure"), to="self account")
    def configure(self, request: Iq) -> Payload:
        """§8.2.4: take what was sent, keep the rest."""
        node, element = self._owned(request, "configure")
        form = Form.within(element)
        if form is None:
            raise StanzaError("bad-request", "no form")
        changes = self._read_config(form)
        if changes is None:
            return None
        self.eventing.check_config(changes)
        new = replace(node, config={**node.config, **changes})
        self.eventing.change(request.owner, node, new)
        if new["notify_config"]:
            request.afterwards(lambda: self._tell_configuration(request.owner, new))
        return None

    def _tell_configuration(self, owner: JID, node: Node) -> None:
        form = NODE_FORM.fill(node.whole_config, "result").to_element() if node["deliver_payloads"] else None
        self.eventing.tell(owner, node, E(PUBSUB_EVENT("configuration"), {"node": node.name}, form))  # §8.2.5.3

    @iq("set", PUBSUB_OWNER("pubsub"), PUBSUB_OWNER("delete"), to="self account")
    def delete(self, request: Iq) -> Payload:
        """§8.4."""
        (node, _element), owner = self._owned(request, "delete"), request.owner
        self.eventing.empty(owner, node)
        self.eventing.store.delete(owner, node.name)
        if node["notify_delete"]:
            told = replace(node, subscriptions=dict.fromkeys(node.subscriptions, "subscribed"))  # pending ones too
            request.afterwards(lambda: self.eventing.tell(owner, told, E(PUBSUB_EVENT("delete"), node=node.name)))
        return None

    @iq("set", PUBSUB_OWNER("pubsub"), PUBSUB_OWNER("purge"), to="self account")
    def purge(self, request: Iq) -> Payload:
        """§8.5: one notification, however many items there were."""
        (node, _element), owner = self._owned(request, "purge"), request.owner
        if not node["persist_items"]:
            raise unsupported("persistent-items")
        self.eventing.empty(owner, node)
        if node["notify_retract"] and node["deliver_notifications"]:
            request.afterwards(lambda: self.eventing.tell(owner, node, E(PUBSUB_EVENT("purge"), node=node.name)))
        return None

    # -- subscribers (§8.8)

    @iq("get", PUBSUB_OWNER("pubsub"), PUBSUB_OWNER("subscriptions"), to="self account")
    def subscribers(self, request: Iq) -> Payload:
        """§8.8.1: who is subscribed; who is pending has been put before the owner (§8.6)."""
        node, _element = self._owned(request, "subscriptions")
        found = (E(PUBSUB_OWNER("subscription"), jid=jid, subscription=state)
                 for jid, state in node.subscriptions.items() if state == "subscribed")  # fmt: skip
        return E(PUBSUB_OWNER("pubsub"), None, E(PUBSUB_OWNER("subscriptions"), {"node": node.name}, *found))

    @iq("set", PUBSUB_OWNER("pubsub"), PUBSUB_OWNER("subscriptions"), to="self account")
    def set_subscribers(self, request: Iq) -> Payload:
        """§8.8.2: only what is named changes; all of it, or nothing."""
        node, element = self._owned(request, "subscriptions")
        changes = changes_by_jid(element, "subscription", ("none", "pending", "subscribed"))
        for jid in changes:
            self._check_subscriber(request.owner, node, jid)
        if len(node.subscriptions.keys() | changes.keys()) > self.server.config.limits.pep_subscribers:
            raise pubsub_error("policy-violation", "too-many-subscriptions")
        for jid, state in changes.items():
            node = self.eventing.set_subscription(request.owner, node, jid, state)
        return None

    def _check_subscriber(self, owner: JID, node: Node, jid: str) -> None:
        """Nobody is subscribed who neither knows the owner nor has asked for it: it would be a way to flood them."""
        viewer = self.eventing.viewer(owner, JID.parse(jid))
        if not viewer.sees and node.subscription_of(viewer) == "none":
            raise StanzaError("not-acceptable", f"{jid} has not asked for it")

    # -- affiliations (§8.9)

    @iq("get", PUBSUB_OWNER("pubsub"), PUBSUB_OWNER("affiliations"), to="self account")
    def affiliates(self, request: Iq) -> Payload:
        """§8.9.1."""
        node, _element = self._owned(request, "affiliations")
        known = {str(request.owner): "owner", **node.affiliations}
        found = (E(PUBSUB_OWNER("affiliation"), jid=jid, affiliation=what) for jid, what in known.items())
        return E(PUBSUB_OWNER("pubsub"), None, E(PUBSUB_OWNER("affiliations"), {"node": node.name}, *found))

    @iq("set", PUBSUB_OWNER("pubsub"), PUBSUB_OWNER("affiliations"), to="self account")
    def set_affiliates(self, request: Iq) -> Payload:
        """§8.9.2: only what is named changes, all of it or nothing; the account stays the owner of its nodes."""
        (node, element), owner = self._owned(request, "affiliations"), request.owner
        changes = changes_by_jid(element, "affiliation", (*NODE_AFFILIATIONS, "owner", "publish-only"))
        if "publish-only" in changes.values():
            raise unsupported("publish-only-affiliation")
        if any(JID.parse(jid).bare == owner or what == "owner" for jid, what in changes.items()):
            raise StanzaError("not-acceptable", "an account's nodes are the account's own")
        new = {str(JID.parse(jid).bare): what for jid, what in changes.items()}
        if len(new) != len(changes):
            raise StanzaError("bad-request", "somebody is named twice")
        after = {jid: what for jid, what in {**node.affiliations, **new}.items() if what != "none"}
        if len(after) > self.server.config.limits.pep_subscribers:
            raise StanzaError("resource-constraint")
        self.eventing.change(owner, node, replace(node, affiliations=after))
        self._settle_pending(owner, node.name, new)
        return None

    def _settle_pending(self, owner: JID, name: str, changes: Mapping[str, str]) -> None:
        """§8.7.4: who gets a place on the list needs no approval any more, who is banned gets none."""
        decisions = {"publisher": "subscribed", "member": "subscribed", "outcast": "none"}
        node = self.eventing.store.node(owner, name)
        assert node is not None
        for jid, state in node.subscriptions.items():
            decision = decisions.get(changes.get(jid.partition("/")[0], ""))
            if state == "pending" and decision is not None:
                node = self.eventing.set_subscription(owner, node, jid, decision)


def changes_by_jid(parent: Element, what: str, allowed: Container[str]) -> dict[str, str]:
    """Return what the owner wants to change, by address: entries without that attribute stay as they are (§8.8.2).

    Raises StanzaError for an unknown state, for an address that is named twice, and for nothing at all.
    """
    changes: dict[str, str] = {}
    entries = parent.findall(PUBSUB_OWNER(what))
    for entry in entries:
        jid, state = str(JID.parse(entry.get("jid", ""))), entry.get(what)
        if jid in changes or (state is not None and state not in allowed):
            raise StanzaError("bad-request", f"{jid}: no such {what}, or named twice")
        if state is not None:
            changes[jid] = state
    if not entries:
        raise StanzaError("bad-request", "nothing to change")
    return changes


# -- one thing, two ways: avatars and bookmarks


class AvatarConversion(Feature):
    """User Avatar to vCard-Based Avatars Conversion (XEP-0398): one picture, seen in both ways (XEP-0084, XEP-0153).

        C: <presence/>
        S: <presence …><x xmlns='vcard-temp:x:update'><photo>sha1-hash-of-image</photo></x></presence>

    A picture of a node that is not open is in the vCard for contacts only.
    """

    namespace = "urn:xmpp:pep-vcard-conversion:0"
    account_features = ("urn:xmpp:pep-vcard-conversion:0",)

    @property
    def vcards(self) -> VCard:
        """The cards."""
        return self.server.registry.feature(VCard)

    @property
    def eventing(self) -> PersonalEventing:
        """The nodes."""
        return self.server.registry.feature(PersonalEventing)

    @only(PRESENCE)
    def sending(self, session: Session, stanza: Stanza) -> Stanza | None:
        """§4: the hash goes into every available presence, directed ones too, unless the client wants none."""
        if stanza.get("type") is None:
            photo = self.vcards.photo(session.bare)
            if photo and not hides_photo(stanza):
                set_photo_hash(stanza, photo)
        return stanza

    # -- from PEP to the vCard (§3.1)

    def published(self, owner: JID, node: str, item: PublishedItem) -> None:
        """§3.1: new metadata; the picture itself was published before."""
        if node != AVATAR_METADATA:
            return
        metadata, data = parse_element(item.xml), self.eventing.store.node(owner, AVATAR_DATA)
        infos = [info for info in metadata.iterfind(AVATAR_METADATA("info")) if not info.get("url")]
        model = "" if data is None else data["access_model"]
        picture = self._picture(owner, infos[0].get("id", "")) if infos else ""
        if picture and model in ("open", "presence"):
            self._show(owner, infos[0].get("type", ""), picture, is_public=model == "open")
        elif picture or not len(metadata):  # §7: a vCard is for everybody, or for all contacts; XEP-0084 §3.5
            self._show(owner, "", "", is_public=True)

    def _picture(self, owner: JID, id: str) -> str:
        """Return the published picture in base64; "" if there is none, or if it isn't what its id says (§3.1)."""
        item = self.eventing.store.item(owner, AVATAR_DATA, id)
        text = "" if item is None else "".join((parse_element(item.xml).text or "").split())
        try:
            is_true = hashlib.sha1(base64.b64decode(text, validate=True)).hexdigest() == id.lower()
        except (binascii.Error, ValueError):
            return ""
        return text if is_true else ""

    def _show(self, owner: JID, kind: str, picture: str, *, is_public: bool) -> None:
        """Put a picture ("" for none) into the vCard; the rest of the card stays. Too big a one is left out."""
        before = self.vcards.photo(owner)
        card = self.vcards.card(owner) if owner in self.vcards.cards else E(VCARD("vCard"))
        for photo in card.findall(VCARD("PHOTO")):
            card.remove(photo)
        if picture:
            type, data = E(VCARD("TYPE"), None, kind or "image/png"), E(VCARD("BINVAL"), None, picture)
            card.append(E(VCARD("PHOTO"), None, type, data))
        elif not before:
            return
        try:
            self.vcards.keep(owner, card, is_public=is_public)
        except StanzaError as error:
            return log.info("the avatar of %s is not in the vCard: %s", owner, error.text)
        self._show_again(owner, before)

    # -- from the vCard to PEP (§3.2)

    def vcard_changed(self, owner: JID) -> None:
        """§3.2: first the data, then the metadata."""
        photo, store = self.vcards.photo(owner), self.eventing.store
        known = store.last(owner, AVATAR_METADATA)
        is_shown = known is not None and "<info" in known.xml
        try:
            if photo and not (is_shown and known is not None and known.id == photo):
                self._publish(owner, photo)
            elif not photo and is_shown:
                nothing = {"none": E(AVATAR_METADATA("metadata"))}
                self.eventing.publish_for(owner, AVATAR_METADATA, nothing, {})  # XEP-0084 §3.5
        except StanzaError as error:
            log.info("the picture in the vCard of %s is not published: %s", owner, error.text)
        self._show_again(owner, known.id if is_shown and known is not None else "")

    def _publish(self, owner: JID, photo: str) -> None:
        card = self.vcards.card(owner)
        picture = vcard_picture(card)
        data = E(AVATAR_DATA("data"), None, base64.b64encode(picture).decode())
        public = {"pubsub#access_model": "open"}  # as the vCard is
        self.eventing.publish_for(owner, AVATAR_DATA, {photo: data}, public)
        kind = card.findtext(f"{VCARD('PHOTO')}/{VCARD('TYPE')}") or "image/png"
        info = E(AVATAR_METADATA("info"), {"id": photo, "type": kind, "bytes": str(len(picture))})
        self.eventing.publish_for(owner, AVATAR_METADATA, {photo: E(AVATAR_METADATA("metadata"), None, info)}, public)

    def _show_again(self, owner: JID, before: str) -> None:
        """XEP-0153 §4.1: contacts learn of another picture by presence; §5.1: rooms don't."""
        photo = self.vcards.photo(owner)
        broadcast = self.server.registry.feature(PresenceBroadcast)
        for session in self.server.sessions(owner) if photo != before else ():
            if session.presence is None or hides_photo(session.presence):
                continue
            again = session.presence.addressed()
            set_photo_hash(again, photo)
            broadcast.available(session, again)
            if not photo:  # said once; an empty hash that stays there would be the client's own wish
                session.presence = again.addressed()
                session.presence.discard(lambda child: child.tag == VCARD_UPDATE("x"))


def hides_photo(presence: Stanza) -> bool:
    """Whether a client says that there is no picture to be shown: `<photo/>` is there, and empty (XEP-0153 §4.1)."""
    photo = presence.find(f"{VCARD_UPDATE('x')}/{VCARD_UPDATE('photo')}")
    return photo is not None and not photo.text


def set_photo_hash(presence: Stanza, photo: str) -> None:
    """Put the hash of a picture ("" for none) into a presence, in place of another one (XEP-0153 §4.1)."""
    presence.discard(lambda child: child.tag == VCARD_UPDATE("x"))
    presence.add(E(VCARD_UPDATE("x"), None, E(VCARD_UPDATE("photo"), None, photo or None)))


class Bookmark(NamedTuple):
    """What the old and the new way both know of a room (XEP-0048 §2.1, XEP-0402 §2)."""

    name: str
    autojoin: bool
    nick: str
    password: str

    @classmethod
    def read(cls, conference: Element, namespace: Namespace) -> Bookmark:
        """Read a `<conference/>` of either namespace."""
        autojoin = conference.get("autojoin", "") in ("1", "true")
        nick, password = (child_text(conference, namespace(name)) for name in ("nick", "password"))
        return cls(conference.get("name", ""), autojoin, nick, password)

    def write(self, conference: Element, namespace: Namespace) -> Element:
        """Make a `<conference/>` of either namespace say this; what else it says stays."""
        for name, value in (("name", self.name), ("autojoin", "true" if self.autojoin else "")):
            conference.attrib.pop(name, None)
            if value:
                conference.set(name, value)
        for name, value in (("nick", self.nick), ("password", self.password)):
            for child in conference.findall(namespace(name)):
                conference.remove(child)
            if value:
                conference.append(E(namespace(name), None, value))
        return conference


class BookmarkConversion(Feature):
    """Bookmarks Conversion (XEP-0411): old bookmarks (XEP-0048, 0049) and new ones (XEP-0402) are the same.

        C: <iq type='set' …><query xmlns='jabber:iq:private'><storage xmlns='storage:bookmarks'>…</storage></query></iq>
        S: <message …><event …><items node='urn:xmpp:bookmarks:1'>…</items></event></message>

    There are three places: the node urn:xmpp:bookmarks:1 with an item for each room, and two that
    hold one old list each, private XML and the node storage:bookmarks. A change of one changes
    the others; what only one of them knows (web addresses, extensions) stays there.
    """

    namespace = "urn:xmpp:bookmarks-conversion:0"
    account_features = ("urn:xmpp:bookmarks-conversion:0", f"{BOOKMARKS}#compat", f"{BOOKMARKS}#compat-pep")

    @property
    def eventing(self) -> PersonalEventing:
        """The nodes."""
        return self.server.registry.feature(PersonalEventing)

    @property
    def private(self) -> PrivateStorage:
        """The private XML."""
        return self.server.registry.feature(PrivateStorage)

    # -- events

    def published(self, owner: JID, node: str, item: PublishedItem) -> None:
        """Somebody has changed bookmarks by PEP, in the new way or the old one."""
        if node == BOOKMARKS:
            self._convert(owner, self._write_old)
        elif node == OLD_BOOKMARKS:
            self._convert(owner, lambda owner: self._take_old(owner, parse_element(item.xml)))

    def retracted(self, owner: JID, node: str, ids: Sequence[str]) -> None:
        """Somebody has removed bookmarks."""
        if node == BOOKMARKS:
            self._convert(owner, self._write_old)

    def private_stored(self, owner: JID, tag: str) -> None:
        """Somebody has changed bookmarks in private XML."""
        if tag == OLD_BOOKMARKS("storage"):
            self._convert(owner, lambda owner: self._take_old(owner, self._old_list(owner)))

    def session_bound(self, session: Session) -> None:
        """XEP-0411 §4: what was in private XML before there was a conversion, as in an account that was imported."""
        is_old = self.private.stored.item(session.bare, OLD_BOOKMARKS("storage")) is not None
        if is_old and self.eventing.store.node(session.bare, BOOKMARKS) is None:
            self._convert(session.bare, lambda owner: self._take_old(owner, self._old_list(owner)))

    def _convert(self, owner: JID, conversion: Callable[[JID], None]) -> None:
        """Convert, but never into a node that somebody else can read (XEP-0411 §5)."""
        nodes = [self.eventing.store.node(owner, name) for name in (BOOKMARKS, OLD_BOOKMARKS)]
        if not all(node is None or node.is_private for node in nodes):
            return
        try:
            conversion(owner)
        except StanzaError as error:
            log.info("the bookmarks of %s are not converted: %s", owner, error.text)

    # -- from the old way to the new one

    def _old_list(self, owner: JID) -> Element:
        """Return the list in private XML, the last of several; an empty one if there is none."""
        stored = self.private.stored.item(owner, OLD_BOOKMARKS("storage"))
        return parse_elements([stored])[-1] if stored else E(OLD_BOOKMARKS("storage"))

    def _take_old(self, owner: JID, storage: Element) -> None:
        """XEP-0402 §5.3.2: remove the rooms that are missing in an old list, publish those that are new or differ."""
        if storage.tag != OLD_BOOKMARKS("storage"):
            return
        wanted = old_bookmarks(storage)
        known = {item.id: item for item in self.eventing.store.items(owner, BOOKMARKS)}
        gone = [id for id in known if id not in wanted]
        node = self.eventing.store.node(owner, BOOKMARKS)
        if node is not None and gone:
            self.eventing.remove(owner, node, gone)
            self.eventing.tell_retracted(owner, node, gone)
        changed: dict[str, Element] = {}
        for id, conference in wanted.items():
            bookmark = Bookmark.read(conference, OLD_BOOKMARKS)
            new = parse_element(known[id].xml) if id in known else E(BOOKMARKS("conference"))
            if id not in known or bookmark != Bookmark.read(new, BOOKMARKS):
                changed[id] = bookmark.write(new, BOOKMARKS)
        for id, new in changed.items():
            self.eventing.publish_for(owner, BOOKMARKS, {id: new}, PRIVATE_CONFIG)
        self._keep_old(owner, storage)

    # -- from the new way to the old one

    def _write_old(self, owner: JID) -> None:
        """XEP-0402 §5.3.1: bring the old lists up to date."""
        storage = self._old_list(owner)
        items = {item.id: parse_element(item.xml) for item in self.eventing.store.items(owner, BOOKMARKS)}
        known = old_bookmarks(storage)
        for jid, conference in known.items():
            if jid not in items:
                storage.remove(conference)
        for jid, new in items.items():
            if jid in known:
                conference = known[jid]
            else:
                conference = E(OLD_BOOKMARKS("conference"), jid=jid)
                storage.append(conference)
            Bookmark.read(new, BOOKMARKS).write(conference, OLD_BOOKMARKS)
        self._keep_old(owner, storage)

    def _keep_old(self, owner: JID, storage: Element) -> None:
        storage.tail = None
        text = serialize(storage, CLIENT)
        if self.private.stored.item(owner, OLD_BOOKMARKS("storage")) != text:
            self.private.stored.put(owner, OLD_BOOKMARKS("storage"), text)
        last = self.eventing.store.last(owner, OLD_BOOKMARKS)
        if last is None or last.xml != serialize(storage):
            self.eventing.publish_for(owner, OLD_BOOKMARKS, {"current": storage}, NODE_DEFAULTS[OLD_BOOKMARKS])


def old_bookmarks(storage: Element) -> dict[str, Element]:
    """Return the rooms of an old list by address; what has none can't be bookmarked in the new way."""
    found = {}
    for conference in storage.findall(OLD_BOOKMARKS("conference")):
        try:
            found[str(JID.parse(conference.get("jid", "")).bare)] = conference
        except StanzaError:
            continue
    return found


# ==== 21. Multi-user chat (XEP-0045) ====
#
# A room is an address, kitchen@conference.example.org, that passes every message on to all
# who are in it. Who is in it is an *occupant*, known by a nickname: the resource of the
# room's address. One joins by sending presence there, and leaves by becoming unavailable:
#
#     romeo:  <presence to='kitchen@conference…/Romeo'><x xmlns='http://jabber.org/protocol/muc'/></presence>
#     room:   the presence of each occupant, then one's own (status 110), then the latest
#             messages, then the subject; and from then on everything that is said
#
# Two things decide what somebody may do. The *affiliation* belongs to a person and lasts:
# owner, admin, member, none, outcast. The *role* belongs to a visit: moderator, participant,
# visitor. The tables of §5 are `DEFAULT_ROLES` and the two `plan_…` functions, which know
# nothing of stanzas. A person may be in a room with several clients under one nickname.
#
# A `Room` holds the state of one room and says what to send by its `emit`; the feature
# `MultiUserChat` owns the rooms' domains, answers requests and keeps what must last: the
# persistent rooms' configuration, affiliations, subject and latest messages. What is said
# is serialised once, however many are in the room. Left out: archives (XEP-0313), locked
# nicknames (§18.1), and the approval of registrations (§9.9): who may register is a member.

AFFILIATIONS = ("outcast", "none", "member", "admin", "owner")  # in this order of power (§5.2)
ROLES = ("none", "visitor", "participant", "moderator")  # likewise (§5.1)
RANK: Mapping[str, int] = {name: rank for names in (AFFILIATIONS, ROLES) for rank, name in enumerate(names)}

MAX_ROOMS_JOINED = 200  # by one session: bookmarks of very sociable people
MAX_SESSIONS_IN_ROOM = 25  # of one person: each gets a copy of everything
MAX_AFFILIATIONS = 5000  # people with an affiliation, per room
MAX_ROOM_PRESENCE = 16 * 1024  # bytes that come with an occupant's presence: every newcomer gets all of them
MAX_SUBJECT = 4096  # bytes
MAX_NICK = 256  # characters; longer ones only spoil everybody's screen
MAX_REASON = 1000  # characters that are kept of a ban's reason: there may be thousands
MAX_CONFIG_TEXT: Mapping[str, int] = {  # characters: these are shown in lists of rooms, or compared at each entry
    "muc#roomconfig_roomname": 256, "muc#roomconfig_lang": 64, "muc#roomconfig_roomsecret": 1024,
}  # fmt: skip
MAX_INVITED = 10  # people invited by one message
INVITATION_COST = 10  # as many stanzas of the rate each invitation counts: it reaches people who are not in the room
MAX_INVITATIONS = 1000  # not yet declined, per room: who was not invited declines nothing
MAX_RELAYED = 10_000  # requests between occupants that wait for their answer
RELAY_TIMEOUT = 120.0  # seconds until an unanswered request between occupants is forgotten
EXTRA_PLACES = 20  # in a full room, for its admins and owners (§7.2.9)
HISTORY_DEFAULT, HISTORY_MOST = 25, 200  # messages that newcomers get
MAX_HISTORY_BYTES = 512 * 1024  # of them, per room, in memory
LOGGED_HISTORY = 1000  # messages kept on disk for a room whose owner has switched logging on
MAX_LOG_BYTES = 8 * 1024 * 1024  # of one room's messages on disk

GONE_CONDITIONS = frozenset({
    "gone", "item-not-found", "recipient-unavailable", "redirect", "remote-server-not-found", "remote-server-timeout",
})  # §18.1.2: who answers with one of these isn't there any more  # fmt: skip

EVERYBODY = {"moderator": "Moderators", "participant": "Participants", "visitor": "Visitors"}
ROOM_FORM = FormTemplate(
    f"{MUC}#roomconfig",
    [
        Field("muc#roomconfig_roomname", label="Name", value=""),
        Field("muc#roomconfig_roomdesc", label="Description", value=""),
        Field("muc#roomconfig_lang", label="Language", value=""),
        Field("muc#roomconfig_persistentroom", "boolean", "Keep the room when the last one leaves?", False),
        Field("muc#roomconfig_publicroom", "boolean", "Show the room in lists?", True),
        Field("muc#roomconfig_maxusers", "list-single", "How many people may be in the room?", 200,
              {"none": "As many as the server allows"}, numbers=range(1, 1001)),
        Field("muc#roomconfig_whois", "list-single", "Who sees people's real addresses?", "moderators",
              {"moderators": "Moderators", "anyone": "Everybody"}),
        Field("muc#roomconfig_membersonly", "boolean", "Only for members?", False),
        Field("muc#roomconfig_moderatedroom", "boolean", "Only those with a voice may speak?", False),
        Field("muc#roomconfig_passwordprotectedroom", "boolean", "Is a password needed to enter?", False),
        Field("muc#roomconfig_roomsecret", "text-private", "The password", ""),
        Field("muc#roomconfig_changesubject", "boolean", "May participants change the subject?", False),
        Field("muc#roomconfig_allowinvites", "boolean", "May participants invite others?", True),
        Field("muc#roomconfig_allowpm", "list-single", "Who may send private messages?", "anyone",
              {"anyone": "Everybody", "participants": "Participants", "moderators": "Moderators", "none": "Nobody"}),
        Field("muc#roomconfig_presencebroadcast", "list-multi", "Whose presence is shown?", list(EVERYBODY), EVERYBODY),
        Field("muc#roomconfig_getmemberlist", "list-multi", "Which members may see the list of members?",
              ["moderator", "participant"], EVERYBODY),
        Field("muc#roomconfig_enablelogging", "boolean", "Keep a long record of what is said?", False),
        Field("muc#maxhistoryfetch", label="How many earlier messages do newcomers get?", value=HISTORY_DEFAULT,
              numbers=range(0, HISTORY_MOST + 1)),
        Field("muc#roomconfig_roomadmins", "jid-multi", "Admins", []),
        Field("muc#roomconfig_roomowners", "jid-multi", "Owners", []),
    ],
    title="Configuration of the room",
)  # fmt: skip
PEOPLE_FIELDS = {"muc#roomconfig_roomadmins": "admin", "muc#roomconfig_roomowners": "owner"}

REGISTER_FORM = FormTemplate(f"{MUC}#register", [Field("muc#register_roomnick", label="Your nickname", required=True)],
                             title="Become a member of the room")  # fmt: skip
VOICE_FORM = FormTemplate(
    f"{MUC}#request",
    [
        Field("muc#role", "list-single", "Requested role", "participant", {"participant": "Participant"}),
        Field("muc#jid", "jid-single", "Address"),
        Field("muc#roomnick", label="Nickname", value=""),
        Field("muc#request_allow", "boolean", "Grant voice to this person?", False),
    ],
    title="Voice request",
)


# -- who may do what: values in, values out


@dataclass(slots=True, frozen=True)
class Standing:
    """What somebody is in a room: the lasting affiliation and, while there, the role."""

    affiliation: str
    role: str


NOBODY_THERE = JID("", "", "")


@dataclass(slots=True, frozen=True)
class RoomChange:
    """One item of an admin's request, checked: a new role for a nickname, or a new affiliation for an address."""

    role: str = ""
    nick: str = ""
    affiliation: str = ""
    jid: JID = NOBODY_THERE
    reserved: str | None = None  # the nickname to be reserved for the person, "" for none; None: as before (§9.5)
    reason: str = ""


DEFAULT_ROLES: Mapping[str, str] = {  # §5.1.2; "none" depends on the room
    "owner": "moderator", "admin": "moderator", "member": "participant", "outcast": "none",
}  # fmt: skip


def default_role(affiliation: str, moderated: bool) -> str:
    """Return the role with which somebody enters (§5.1.2)."""
    return DEFAULT_ROLES.get(affiliation) or ("visitor" if moderated else "participant")


def role_after(old: str, new: str, role: str, moderated: bool) -> str:
    """Return what becomes of a role when its owner's affiliation changes from `old` to `new` (§5.1.3).

    Who rises gets at least the role that comes with it. Who falls loses the power to
    moderate, but not their voice: that is a moderator's decision.
    """
    usual = default_role(new, moderated)
    if RANK[new] >= RANK[old]:
        return max(role, usual, key=RANK.__getitem__)
    return min(role, max(usual, "participant", key=RANK.__getitem__), key=RANK.__getitem__)


def plan_role(actor: Standing, target: Standing, role: str) -> None:
    """Raise StanzaError unless `actor` may give `target` this role (§5.1, tables 3 and 5; §8.2 to §8.4; §9.6, §9.7).

    Nobody revokes the voice of their equals (§8.4); people without an affiliation are nobody's equals.
    """
    is_admin = RANK[actor.affiliation] >= RANK["admin"]
    if actor.role != "moderator" and not is_admin:
        raise StanzaError("forbidden")
    if role == "moderator" and not is_admin:
        raise StanzaError("forbidden", "only admins make moderators")
    if role == "none" and RANK[target.affiliation] > RANK[actor.affiliation]:
        raise StanzaError("not-allowed", "this person's affiliation is higher than yours")
    if role in ("visitor", "participant") and RANK[target.affiliation] >= RANK["admin"]:
        raise StanzaError("not-allowed", "admins and owners are moderators")
    if role == "visitor" and RANK[target.affiliation] >= max(RANK[actor.affiliation], RANK["member"]):
        raise StanzaError("not-allowed", "this person's affiliation is not lower than yours")
    if target.role == "moderator" and role != "moderator" and not is_admin:
        raise StanzaError("not-allowed", "only admins decide about moderators")


def plan_affiliation(actor: str, target: str, new: str) -> None:
    """Raise StanzaError unless the affiliation `actor` may turn `target` into `new` (§5.2, tables 6 and 7)."""
    if RANK[actor] < RANK["admin"]:
        raise StanzaError("forbidden")
    if actor == "owner":
        return
    if RANK[target] >= RANK["admin"] and new == "outcast":
        raise StanzaError("not-allowed", "only owners ban admins and owners")  # §9.1
    if max(RANK[target], RANK[new]) >= RANK["admin"]:
        raise StanzaError("forbidden", "only owners decide about admins and owners")  # §10.5, §10.8


INVISIBLE = frozenset("\u034f\u115f\u1160\u2800\u3164\uffa0") | frozenset(map(chr, range(0xFE00, 0xFE10)))


@functools.lru_cache(1000)
def canonical_nick(nick: str) -> str:
    """Return what two nicknames have in common that look the same: case, spaces and invisible characters aside.

    The width of characters is already gone by preparation (Resourceprep, §17.1). An empty
    result is a nickname that nobody can see. Threat S50.
    """
    visible = "".join(one for one in nick if unicodedata.category(one)[0] != "C" and one not in INVISIBLE)
    return " ".join(visible.split()).casefold()


def is_subject_change(message: Stanza) -> bool:
    """§8.1: a subject and neither body nor thread; with one of these it is an ordinary message."""
    return message.find(CLIENT("subject")) is not None and not any(
        child.tag in (CLIENT("body"), CLIENT("thread")) for child in message)  # fmt: skip


def belongs_to_history(message: Stanza) -> bool:
    """Whether newcomers should see a message: somebody has said something, and it is meant to last (XEP-0334)."""
    hints = {local_name(child.tag) for child in message if namespace_of(child.tag) == HINTS}
    if hints & {"no-store", "no-storage"}:
        return False
    return "store" in hints or message.find(CLIENT("body")) is not None


# -- what was said


class Said(NamedTuple):
    """A message of the history, ready to be sent to a newcomer: without `to`, with the moment when it was said."""

    at: str  # XEP-0082
    message: Stanza

    @classmethod
    def now(cls, message: Stanza, room: str) -> Said:
        """Stamp a message; one that brings its own moment keeps it (§7.9)."""
        at, kept = stamp(), message.addressed()
        if kept.find(DELAY("delay")) is None:
            kept.add(E(DELAY("delay"), {"from": room, "stamp": at}))
        return cls(at, kept)

    @classmethod
    def load(cls, record: Mapping[str, str]) -> Said:
        """Read what `record` has written; raises StreamError."""
        message = parse_element(record["stanza"])
        if not isinstance(message, Stanza):
            raise StreamError("bad-format", "expected a message")
        return cls(record["at"], message)

    def record(self) -> dict[str, str]:
        """Return it as JSON."""
        return {"at": self.at, "stanza": self.message.wire().decode()}


class RoomHistory:
    """The latest messages of a room, bounded by number and by bytes."""

    def __init__(self) -> None:
        self.messages: deque[Said] = deque()
        self.bytes = 0

    def add(self, said: Said, most: int) -> None:
        """Add a message; the oldest go when there are more than `most`, or too large ones."""
        self.messages.append(said)
        self.bytes += len(said.message.content)
        while self.messages and (len(self.messages) > most or self.bytes > MAX_HISTORY_BYTES):
            self.bytes -= len(self.messages.popleft().message.content)


@dataclass(slots=True, frozen=True)
class HistoryWish:
    """How much of what was said a newcomer wants to hear (§7.2.14)."""

    maxstanzas: int = HISTORY_MOST
    maxchars: int = sys.maxsize  # of whole stanzas
    since: str = ""  # XEP-0082; "" is the beginning of time

    @classmethod
    def parse(cls, element: Element | None) -> HistoryWish:
        """Read `<history/>`; raises StanzaError("bad-request")."""
        if element is None:
            return cls()
        start = 0.0
        if "since" in element.attrib:
            try:
                start = max(start, parse_stamp(element.attrib["since"]).timestamp())
            except (ValueError, OverflowError):
                raise StanzaError("bad-request", "history: since is a date and time") from None
        if "seconds" in element.attrib:
            start = max(start, time.time() - history_number(element, "seconds", 0))
        maxstanzas = history_number(element, "maxstanzas", HISTORY_MOST)
        maxchars = history_number(element, "maxchars", sys.maxsize)
        return cls(maxstanzas, maxchars, stamp(min(start, time.time())) if start else "")


def history_number(element: Element, name: str, otherwise: int) -> int:
    """Return a number from an attribute; raises StanzaError("bad-request")."""
    text = element.get(name, str(otherwise))
    if not re.fullmatch("[0-9]{1,19}", text):
        raise StanzaError("bad-request", f"{name} is a whole number")
    return int(text)


def select_history(history: Sequence[Said], wish: HistoryWish, full: str) -> list[Stanza]:
    """Return the latest messages that satisfy all the wishes of the newcomer `full`, addressed to it (§7.2.14)."""
    chosen: list[Stanza] = []
    characters = wish.maxchars
    for said in reversed(history):
        if len(chosen) >= wish.maxstanzas or said.at < wish.since:
            break
        message = said.message.addressed(to=full)
        characters -= len(message.wire().decode()) if wish.maxchars != sys.maxsize else 0
        if characters < 0:
            break
        chosen.append(message)
    return chosen[::-1]


# -- the state of a room

CONFIG_CODES: Mapping[str, tuple[int, int]] = {  # §10.2.1: what is told when these fields are off, and on
    "muc#roomconfig_enablelogging": (171, 170),
    "muc#roomconfig_whois": (173, 172),
}
RESERVED = frozenset({MUC, MUC_USER, OCCUPANT_ID,  # namespaces in which only the room speaks (§17.3, XEP-0421 §4)
                      CARBONS})  # and one in which only a client's own server does (threat S42)  # fmt: skip


class RoomKeeper(Protocol):
    """What keeps rooms: the feature, or nobody in a test."""

    def store(self, room: Room, key: str, item: Json) -> None:
        """Keep one part of the room's document (None: forget it), if the room is persistent."""

    def remember(self, room: Room, said: Said) -> None:
        """Keep a message of the history."""

    def configured(self, room: Room) -> None:
        """Keep the configuration; the room may have become persistent, or temporary."""


@dataclass(slots=True)
class RoomPresence:
    """An occupant's presence as the room sends it, before it is known to whom; each variant is serialised once."""

    stanza: Stanza  # all but the `<x/>`
    item: Mapping[str, str]
    address: str  # the occupant's full JID
    codes: tuple[int, ...] = ()
    because: Sequence[Element] = ()  # who did it, and why: stands inside the item
    destroy: Element | None = None
    made: dict[tuple[bool, tuple[int, ...]], Stanza] = field(default_factory=dict)

    def to(self, full: str, *, with_address: bool, own: tuple[int, ...] = ()) -> Stanza:
        """Return it for one recipient, with or without the real address; `own` are codes for the occupant itself."""
        key = with_address, own
        if key not in self.made:
            self.made[key] = self._make(with_address, own)
        return self.made[key].addressed(to=full)

    def _make(self, with_address: bool, own: tuple[int, ...]) -> Stanza:
        """§5.1.3, §7.2.2: exactly one `<x/>`."""
        item = E(MUC_USER("item"), {**self.item, "jid": self.address} if with_address else self.item, *self.because)
        status = (E(MUC_USER("status"), code=str(code)) for code in sorted((*own, *self.codes)))
        variant = self.stanza.addressed()
        variant.add(E(MUC_USER("x"), None, item, self.destroy, *status))
        return variant


@dataclass(slots=True, eq=False)
class Occupant:
    """Somebody in a room: a nickname, and the sessions with which one person is there under it."""

    nick: str
    jid: JID  # bare
    affiliation: str
    role: str
    id: str  # XEP-0421
    sessions: dict[str, Stanza] = field(default_factory=dict)  # full JID: its latest presence, as it came
    is_shown: bool = False  # whether the others know of it (muc#roomconfig_presencebroadcast)
    presence: RoomPresence | None = None  # the one that newcomers get, until something changes

    @property
    def standing(self) -> Standing:
        """Affiliation and role."""
        return Standing(self.affiliation, self.role)

    @property
    def latest(self) -> str:
        """The full JID of the session that spoke last by presence: it stands for the person."""
        return next(reversed(self.sessions))

    def note(self, full: str, stanza: Stanza) -> None:
        """A session has sent presence; it is the latest now."""
        self.sessions.pop(full, None)
        self.sessions[full] = stanza
        self.presence = None


class Room:
    """One room: its configuration, its people, and what happens when one of them does something.

    `emit` sends a stanza, `keep` keeps what must last. A method that raises StanzaError has
    changed nothing and said nothing.
    """

    def __init__(self, jid: JID, secret: bytes, emit: Callable[[Stanza], None], keep: RoomKeeper,
                 most_occupants: int = MAX_ROOM_OCCUPANTS) -> None:  # fmt: skip
        self.jid = jid
        self.address = str(jid)
        self.config: dict[str, Any] = ROOM_FORM.defaults
        self.affiliations: dict[str, dict[str, str]] = {}  # bare JID: affiliation, nick (reserved), reason
        self.subject: Said | None = None  # None: never set
        self.occupants: dict[str, Occupant] = {}  # by nickname
        self.present: dict[str, Occupant] = {}  # by full JID
        self.history = RoomHistory()
        self.invitations: OrderedDict[tuple[JID, JID], None] = OrderedDict()  # (inviter, invitee)
        self.has_loaded_history = True  # False: it is on disk, and nobody has entered since the start
        self.locked = False  # created, but not yet configured (§10.1)
        self.creator = ""
        self._secret = secret
        self._emit = emit
        self._keep = keep
        self._most_occupants = most_occupants

    def __getitem__(self, name: str) -> Any:
        """Return a field of the configuration by the short name: `room["membersonly"]`."""
        return self.config["muc#maxhistoryfetch" if name == "maxhistoryfetch" else f"muc#roomconfig_{name}"]

    # -- people

    def affiliation_of(self, jid: JID) -> str:
        """Return the affiliation of an address; a ban may name a whole domain, but the person comes first (§9.2)."""
        found = self.affiliations.get(str(jid.bare)) or self.affiliations.get(jid.domain)
        return found["affiliation"] if found else "none"

    def standing_of(self, sender: JID) -> Standing:
        """Return what a person is here, whether in the room or not, and with whichever client (§8)."""
        occupant = self.present.get(str(sender))
        if occupant is None:
            occupant = next((other for other in self.occupants.values() if other.jid == sender.bare), None)
        return occupant.standing if occupant else Standing(self.affiliation_of(sender), "none")

    def people(self, affiliation: str) -> list[str]:
        """Return the addresses with an affiliation."""
        return [jid for jid, entry in self.affiliations.items() if entry["affiliation"] == affiliation]

    def owner_of_nick(self, nick: str) -> str:
        """Return for whom a nickname is reserved, or ""."""
        return self._owners_of_nicks().get(canonical_nick(nick), "")

    def _owners_of_nicks(self) -> Mapping[str, str]:
        return {canonical_nick(entry["nick"]): jid for jid, entry in self.affiliations.items() if entry.get("nick")}

    def occupant_id(self, jid: JID) -> str:
        """XEP-0421 §4.1: the same for one person in one room, and nothing can be learnt from it."""
        return hmac.new(self._secret, f"{self.address}\0{jid.bare}".encode(), "sha256").hexdigest()[:32]

    def is_open_to(self, asker: JID) -> bool:
        """Whether somebody may look in (§14.4): anybody if anybody may come in, else those who belong here."""
        if self["publicroom"] and not self["membersonly"] and not self["passwordprotectedroom"]:
            return self.affiliation_of(asker) != "outcast"
        return str(asker) in self.present or RANK[self.affiliation_of(asker)] >= RANK["member"]

    # -- entering (§7.2)

    def join(self, stanza: Stanza, nick: str, entry: Element) -> None:
        """§7.2: check, then the presences, the history and the subject, in this order (§7.1).

        For who is in the room already it is a full synchronisation (§17.3), and a change of
        nickname if it is another one.
        """
        sender = JID.parse(stanza.get("from", ""))
        full = str(sender)
        wish = HistoryWish.parse(entry.find(MUC("history")))
        occupant = self.present.get(full)
        if occupant is None:
            self._check_entry(sender, nick, entry)
            occupant = self._seat(sender, nick)
        elif occupant.nick != nick:
            occupant = self.change_nick(stanza, nick)
        is_news = full not in occupant.sessions or self._differs(occupant, occupant.sessions[full], stanza)
        self.present[full] = occupant
        occupant.note(full, stanza)
        self._show_others_to(full, occupant)
        if is_news:
            self._announce(occupant, but=full)
        self._answer(occupant, stanza, *self._entry_codes(stanza, nick))
        for message in select_history(self.history.messages, wish, full):
            self._emit(message)
        self._show_subject_to(full)

    def _differs(self, occupant: Occupant, old: Stanza, new: Stanza) -> bool:
        return self._shell(occupant, "", old).content != self._shell(occupant, "", new).content

    def _check_entry(self, sender: JID, nick: str, entry: Element) -> None:
        affiliation = self.affiliation_of(sender)
        if self.locked and affiliation != "owner":
            raise StanzaError("item-not-found")  # §7.2.10
        if affiliation == "outcast":
            raise StanzaError("forbidden")  # §7.2.7
        if self["membersonly"] and affiliation == "none":
            raise StanzaError("registration-required")  # §7.2.6
        given = child_text(entry, MUC("password"))
        if self["passwordprotectedroom"] and not hmac.compare_digest(given.encode(), self["roomsecret"].encode()):
            raise StanzaError("not-authorized")  # §7.2.5
        self._check_nick(nick, sender.bare)
        self._check_places(sender, nick, affiliation)

    def _check_places(self, sender: JID, nick: str, affiliation: str) -> None:
        """§7.2.9, threat S54: neither too many people nor too many clients of one."""
        wanted = self._most_occupants if self["maxusers"] == "none" else min(self["maxusers"], self._most_occupants)
        places = wanted + (EXTRA_PLACES if RANK[affiliation] >= RANK["admin"] else 0)
        if len(self.occupants) >= places and nick not in self.occupants:
            raise StanzaError("service-unavailable", "the room is full", kind="wait")
        own = sum(len(occupant.sessions) for occupant in self.occupants.values() if occupant.jid == sender.bare)
        if own >= MAX_SESSIONS_IN_ROOM:
            raise StanzaError("service-unavailable", "you are in this room with too many clients", kind="wait")

    def _check_nick(self, nick: str, person: JID, but: Occupant | None = None) -> None:
        """§7.2.8, §17.1: neither somebody else's, nor reserved, nor invisible, nor just like one (threat S50)."""
        wanted = canonical_nick(nick)
        if not wanted or len(nick) > MAX_NICK:
            raise StanzaError("not-acceptable", "such a nickname is not possible")
        for other in self.occupants.values():
            is_taken = canonical_nick(other.nick) == wanted and (other.jid != person or other.nick != nick)
            if is_taken and other is not but:
                raise StanzaError("conflict", "somebody has this nickname")
        if self.owner_of_nick(nick) not in ("", str(person)):
            raise StanzaError("conflict", "this nickname is reserved")

    def _seat(self, sender: JID, nick: str) -> Occupant:
        occupant = self.occupants.get(nick)
        if occupant is None:
            affiliation = self.affiliation_of(sender)
            role = default_role(affiliation, self["moderatedroom"])
            occupant = Occupant(nick, sender.bare, affiliation, role, self.occupant_id(sender))
            self.occupants[nick] = occupant
        return occupant

    def _entry_codes(self, stanza: Stanza, nick: str) -> Iterator[int]:
        if self["whois"] == "anyone":
            yield 100  # §7.2.3
        if self["enablelogging"]:
            yield 170  # §7.2.12
        if self.locked:
            yield 201  # §10.1.1
        if _nick_as_sent(stanza) != nick:
            yield 210  # §7.2.2: preparation has changed it

    def _show_others_to(self, full: str, newcomer: Occupant) -> None:
        with_address = self._sees_addresses(newcomer)
        for occupant in self.occupants.values():
            if occupant is not newcomer and occupant.is_shown:
                self._emit(self._presence_of(occupant).to(full, with_address=with_address))

    def _show_subject_to(self, full: str) -> None:
        """§7.2.15: exactly one, even if it is empty."""
        if self.subject is not None:
            return self._emit(self.subject.message.addressed(to=full))
        message = Stanza(MESSAGE, {"type": "groupchat", "from": self.address, "to": full})
        message.add(E(CLIENT("subject")))
        self._emit(message)

    # -- presence in the room

    def _sees_addresses(self, occupant: Occupant) -> bool:
        """§7.2.3, §7.2.4: everybody in a non-anonymous room, else moderators."""
        return occupant.role == "moderator" or self["whois"] == "anyone"

    def _shell(self, occupant: Occupant, type: str, source: Stanza | None) -> Stanza:
        """Begin an occupant's presence: what the client sent, but for what is not the client's to say (§17.3)."""
        presence = Stanza(PRESENCE, {"from": f"{self.address}/{occupant.nick}"})
        if type:
            presence.set("type", type)
        if source is not None:
            if XML_LANG in source.attrib:
                presence.set(XML_LANG, source.attrib[XML_LANG])
            for child in source:
                if not self._is_forged(child):
                    presence.add(child)
        presence.add(E(OCCUPANT_ID("occupant-id"), id=occupant.id))
        return presence

    def _is_forged(self, child: Element) -> bool:
        """Whether this is the room's to say (§17.3; XEP-0359 §3; XEP-0421 §4)."""
        return namespace_of(child.tag) in RESERVED or speaks_for(self.jid, child)

    def _presence_of(self, occupant: Occupant, because: Sequence[Element] = ()) -> RoomPresence:
        """Return how an occupant is seen now (§5.1.3), and why; without a reason it is made once and kept."""
        if occupant.presence is None:
            shell = self._shell(occupant, "", occupant.sessions[occupant.latest])
            item = {"affiliation": occupant.affiliation, "role": occupant.role}
            occupant.presence = RoomPresence(shell, item, occupant.latest)
        return replace(occupant.presence, because=because, made={}) if because else occupant.presence

    def _farewell(self, occupant: Occupant, *codes: int, source: Stanza | None = None, full: str = "",
                  because: Sequence[Element] = (), destroy: Element | None = None) -> RoomPresence:  # fmt: skip
        """Return how an occupant goes (§7.14): it has no role any more."""
        item = {"affiliation": "none" if destroy is not None else occupant.affiliation, "role": "none"}
        shell = self._shell(occupant, "unavailable", source)
        return RoomPresence(shell, item, full or occupant.latest, codes, because, destroy)

    def _tell_others(self, occupant: Occupant, presence: RoomPresence) -> None:
        """Send it to everybody but the occupant."""
        everybody_sees = self["whois"] == "anyone"
        for other in self.occupants.values():
            if other is not occupant:
                with_address = everybody_sees or other.role == "moderator"
                for full in other.sessions:
                    self._emit(presence.to(full, with_address=with_address))

    def _announce(self, occupant: Occupant, because: Sequence[Element] = (), but: str = "") -> None:
        """Show how an occupant is now: to the others, then to its own clients (§7.2.2), except one."""
        presence = self._presence_of(occupant, because)
        self._show_or_hide(occupant, presence)
        for full in occupant.sessions:
            if full != but:
                self._emit(presence.to(full, with_address=True, own=(110,)))

    def _show_or_hide(self, occupant: Occupant, presence: RoomPresence) -> None:
        """§5.1: whose role's presence isn't shown (any more) looks to the others as if not there."""
        if occupant.role in self["presencebroadcast"]:
            self._tell_others(occupant, presence)
            occupant.is_shown = True
        elif occupant.is_shown:
            self._tell_others(occupant, self._farewell(occupant))
            occupant.is_shown = False

    def _answer(self, occupant: Occupant, stanza: Stanza, *codes: int) -> None:
        """Return a session its own presence, with the id that it has sent (§7.2.2)."""
        answer = self._presence_of(occupant).to(stanza.get("from", ""), with_address=True, own=(110, *codes))
        if id := stanza.get("id"):
            answer.set("id", id)
        self._emit(answer)

    def update_presence(self, stanza: Stanza, nick: str) -> None:
        """§7.7, or §7.6 when it is addressed to another nickname."""
        sender = stanza.get("from", "")
        occupant = self.present[sender]
        if nick != occupant.nick:
            occupant = self.change_nick(stanza, nick)
        else:
            occupant.note(sender, stanza)
            self._announce(occupant, but=sender)
        self._answer(occupant, stanza, *([210] if _nick_as_sent(stanza) != nick else []))

    def change_nick(self, stanza: Stanza, nick: str) -> Occupant:
        """§7.6: the old one goes with 303, the new one comes; return it. The answer to the session is the caller's.

        All clients of the occupant change together. When the person is here with other
        clients under the new nickname already, they are one occupant from now on.
        """
        sender = stanza.get("from", "")
        occupant = self.present[sender]
        self._check_nick(nick, occupant.jid, but=occupant)
        item = {"affiliation": occupant.affiliation, "role": occupant.role, "nick": nick}
        farewell = RoomPresence(self._shell(occupant, "unavailable", None), item, occupant.latest, (303,))
        if occupant.is_shown:
            self._tell_others(occupant, farewell)
        for full in occupant.sessions:
            self._emit(farewell.to(full, with_address=True, own=(110,)))
        del self.occupants[occupant.nick]
        renamed = self.occupants.setdefault(nick, occupant)
        renamed.nick = nick
        renamed.sessions.update(occupant.sessions)
        self.present.update(dict.fromkeys(occupant.sessions, renamed))
        renamed.note(sender, stanza)
        self._announce(renamed, but=sender)
        return renamed

    def leave(self, stanza: Stanza) -> None:
        """§7.14: one session goes; the others hear of it when it was the person's last."""
        self._remove_session(stanza.get("from", ""), stanza)

    def remove_unreachable(self, full: str) -> None:
        """§18.1.2, §11.1: what was sent there came back: the occupant is not there any more."""
        if full in self.present:
            self._remove_session(full, None, 333)

    def _remove_session(self, full: str, source: Stanza | None, *codes: int) -> None:
        occupant = self.present.pop(full)
        farewell = self._farewell(occupant, *codes, source=source, full=full)
        self._emit(farewell.to(full, with_address=True, own=(110,)))
        was_latest = full == occupant.latest
        del occupant.sessions[full]
        occupant.presence = None
        if not occupant.sessions:
            del self.occupants[occupant.nick]
            if occupant.is_shown:
                self._tell_others(occupant, farewell)
        elif was_latest:
            self._announce(occupant)

    def expel(self, occupant: Occupant, code: int, because: Sequence[Element] = ()) -> None:
        """Make an occupant leave, with all its clients; the affiliation is what it has just become (§8.2, §9.1)."""
        farewell = self._farewell(occupant, code, because=because)
        del self.occupants[occupant.nick]
        for full in occupant.sessions:
            del self.present[full]
            self._emit(farewell.to(full, with_address=True, own=(110,)))
        if occupant.is_shown:
            self._tell_others(occupant, farewell)

    def close(self, *codes: int, destroy: Element | None = None) -> None:
        """§10.9, §11.2: everybody hears of their own leaving, and not of all the others'."""
        leaving = list(self.occupants.values())
        self.occupants.clear()
        self.present.clear()
        for occupant in leaving:
            farewell = self._farewell(occupant, *codes, destroy=destroy)
            for full in occupant.sessions:
                self._emit(farewell.to(full, with_address=True, own=(110,)))

    # -- messages

    def speak(self, stanza: Stanza) -> None:
        """§7.4: reflect to everybody, the speaker included; §8.1: or change the subject."""
        occupant = self.speaker(stanza)
        changes_subject = is_subject_change(stanza)
        if changes_subject:
            self._check_subject(occupant, stanza)
        elif RANK[occupant.role] < RANK["participant"]:
            raise StanzaError("forbidden", "you have no voice in this room")  # §7.4
        message = self._cleaned(stanza, occupant)
        message.add(E(STANZA_ID("stanza-id"), by=self.address, id=secrets.token_urlsafe(12)))
        if changes_subject or belongs_to_history(stanza):
            self._keep_said(Said.now(message, self.address), changes_subject)
        self._fan_out(message)

    def _keep_said(self, said: Said, is_subject: bool) -> None:
        """On disk first: a full one refuses, and then nothing was said."""
        if is_subject:
            self._keep.store(self, "subject", said.record())
            self.subject = said
        else:
            self._keep.remember(self, said)
            self.history.add(said, self["maxhistoryfetch"])

    def speaker(self, stanza: Stanza) -> Occupant:
        """Return who has sent this; raises StanzaError("not-acceptable") if nobody here has (§7.4, §7.5)."""
        occupant = self.present.get(stanza.get("from", ""))
        if occupant is None:
            raise StanzaError("not-acceptable", "you are not in this room")
        return occupant

    def _cleaned(self, stanza: Stanza, occupant: Occupant) -> Stanza:
        """Return the message as the room says it: without what only the room may say (§17.3, XEP-0359 §3; threat S56).

        Nobody can pretend that something was said earlier; but an owner may bring the history
        of another conversation into the room (§7.9).
        """
        may_stamp = occupant.affiliation == "owner"
        message = stanza.addressed(sender=f"{self.address}/{occupant.nick}")
        message.attrib.pop("to", None)
        message.discard(lambda child: self._is_forged(child) or (child.tag == DELAY("delay") and not may_stamp))
        message.add(E(OCCUPANT_ID("occupant-id"), id=occupant.id))
        return message

    def _fan_out(self, message: Stanza) -> None:
        for full in list(self.present):
            self._emit(message.addressed(to=full))

    def _check_subject(self, occupant: Occupant, stanza: Stanza) -> None:
        if occupant.role != "moderator" and not (self["changesubject"] and occupant.role == "participant"):
            raise StanzaError("forbidden", "you may not change the subject")  # §8.1
        if len(stanza.content) > MAX_SUBJECT:
            raise StanzaError("policy-violation", f"a subject has at most {MAX_SUBJECT} bytes")

    def whisper(self, stanza: Stanza, nick: str) -> None:
        """§7.5: a private message, to all sessions of one occupant."""
        if stanza.get("type") == "groupchat":
            raise StanzaError("bad-request", "groupchat goes to the room")
        sender = self.speaker(stanza)
        target = self.occupants.get(nick)
        if target is None:
            raise StanzaError("item-not-found", "nobody has this nickname")
        needed = {"anyone": "visitor", "participants": "participant", "moderators": "moderator"}.get(self["allowpm"])
        if needed is None or RANK[sender.role] < RANK[needed]:
            raise StanzaError("forbidden", "no private messages in this room")
        message = self._cleaned(stanza, sender)
        message.add(E(MUC_USER("x")))  # §7.5: so that clients know it for what it is
        for full in target.sessions:
            self._emit(message.addressed(to=full))

    def notify(self, *codes: int) -> None:
        """§10.2.1: tell everybody that the configuration has changed, and how."""
        message = Stanza(MESSAGE, {"type": "groupchat", "from": self.address, "id": secrets.token_urlsafe(9)})
        message.add(E(MUC_USER("x"), None, *(E(MUC_USER("status"), code=str(code)) for code in codes)))
        self._fan_out(message)

    # -- invitations (§7.8) and voice (§7.13, §8.6)

    def plan_invitation(self, stanza: Stanza, details: Element) -> Stanza:
        """§7.8.2: return an occupant's invitation in the room's name; raises StanzaError. Nothing is sent yet."""
        inviter = self.speaker(stanza)
        invitee = JID.parse(details.get("to") or _missing("to"))
        if RANK[inviter.role] < RANK["moderator"] and (not self["allowinvites"] or inviter.role == "visitor"):
            raise StanzaError("forbidden", "you may not invite to this room")
        affiliation = self.affiliation_of(invitee)
        if affiliation == "outcast":
            raise StanzaError("not-allowed", "this person is banned")
        if self["membersonly"] and affiliation == "none":
            plan_affiliation(inviter.affiliation, "none", "member")  # §9.5
            self.check_together([RoomChange(affiliation="member", jid=invitee.bare)])
        return self.invitation(inviter.jid, invitee, details, stanza.get("id", ""))

    def invitation(self, inviter: JID, invitee: JID, details: Element, id: str) -> Stanza:
        """Build an invitation (§7.8.2, §7.9, §9.5)."""
        reason, goes_on = child_text(details, MUC_USER("reason")), details.find(MUC_USER("continue"))
        invite = E(MUC_USER("invite"), {"from": str(inviter)})
        if reason:
            invite.append(E(MUC_USER("reason"), None, reason))
        if goes_on is not None:
            thread = goes_on.get("thread")
            invite.append(E(MUC_USER("continue"), {"thread": thread} if thread else None))
        password = E(MUC_USER("password"), None, self["roomsecret"]) if self["passwordprotectedroom"] else None
        message = Stanza(MESSAGE, {"from": self.address, "to": str(invitee), "id": id or secrets.token_urlsafe(9)})
        message.add(E(MUC_USER("x"), None, invite, password))
        return message

    def note_invitation(self, inviter: JID, invitee: JID) -> None:
        """The invitation is on its way: it can be declined, and into a members-only room it makes a member (§9.5)."""
        self.invitations[inviter, invitee.bare] = None
        if len(self.invitations) > MAX_INVITATIONS:
            self.invitations.popitem(last=False)
        if self["membersonly"] and self.affiliation_of(invitee) == "none":
            self._write_affiliation(RoomChange(affiliation="member", jid=invitee.bare))

    def decline(self, stanza: Stanza, refusal: Element) -> None:
        """§7.8.2: tell the inviter; only who was invited by that person can decline."""
        inviter, invitee = JID.parse(refusal.get("to") or _missing("to")).bare, JID.parse(stanza.get("from", "")).bare
        if (inviter, invitee) not in self.invitations:
            return
        del self.invitations[inviter, invitee]
        reason = child_text(refusal, MUC_USER("reason"))
        answer = E(MUC_USER("decline"), {"from": str(invitee)}, E(MUC_USER("reason"), None, reason) if reason else None)
        message = Stanza(MESSAGE, {"from": self.address, "id": stanza.get("id") or secrets.token_urlsafe(9)})
        message.add(E(MUC_USER("x"), None, answer))
        here = [full for full, occupant in self.present.items() if occupant.jid == inviter]
        for full in here or [str(inviter)]:
            self._emit(message.addressed(to=full))

    def take_voice_form(self, stanza: Stanza, form: Form) -> None:
        """§7.13: a visitor asks, the moderators are asked; §8.6: a moderator has answered."""
        sender = self.speaker(stanza)
        values = VOICE_FORM.read(form)
        if values is None:
            return
        if sender.role == "moderator":
            return self._answer_voice_request(sender, values)
        if sender.role != "visitor":
            raise StanzaError("not-allowed", "you have a voice")
        asked = {"muc#role": "participant", "muc#jid": JID.parse(sender.latest), "muc#roomnick": sender.nick}
        message = Stanza(MESSAGE, {"from": self.address, "id": secrets.token_urlsafe(9)})
        message.add(VOICE_FORM.fill(asked).to_element())
        for full, occupant in self.present.items():
            if occupant.role == "moderator":
                self._emit(message.addressed(to=full))

    def _answer_voice_request(self, moderator: Occupant, values: Mapping[str, Any]) -> None:
        target = self.occupants.get(values.get("muc#roomnick", ""))
        if target is None:
            raise StanzaError("item-not-found", "nobody has this nickname")
        if values.get("muc#request_allow") and target.role == "visitor":
            self._set_role(moderator, RoomChange(role="participant", nick=target.nick))

    # -- changes of roles and affiliations (§8, §9, §10)

    def plan(self, sender: JID, items: Sequence[Element]) -> list[RoomChange]:
        """Check all `<item/>`s of an admin's request; raises StanzaError. Nothing is changed yet (§9.2)."""
        actor = self.standing_of(sender)
        changes = [self._plan_item(sender, actor, item) for item in items]
        self.check_together(changes)
        return changes

    def _plan_item(self, sender: JID, actor: Standing, item: Element) -> RoomChange:
        role, affiliation = item.get("role"), item.get("affiliation")
        reason = child_text(item, MUC_ADMIN("reason"))[:MAX_REASON]
        if role is None and affiliation in AFFILIATIONS:
            return self._plan_affiliation(sender, actor, item, affiliation, reason)
        if affiliation is None and role in ROLES:
            return self._plan_role(actor, item, role, reason)
        raise StanzaError("bad-request", "an item has either a role or an affiliation")  # §17.4

    def _plan_role(self, actor: Standing, item: Element, role: str, reason: str) -> RoomChange:
        if actor.role != "moderator" and RANK[actor.affiliation] < RANK["admin"]:
            raise StanzaError("forbidden")  # §8; before anything about the nickname is said
        nick = item.get("nick") or _missing("nick")
        target = self.occupants.get(nick)
        if target is None:
            raise StanzaError("item-not-found", "nobody has this nickname")
        plan_role(actor, target.standing, role)
        return RoomChange(role=role, nick=nick, reason=reason)

    def _plan_affiliation(self, sender: JID, actor: Standing, item: Element, new: str, reason: str) -> RoomChange:
        if RANK[actor.affiliation] < RANK["admin"]:
            raise StanzaError("forbidden")  # §9
        jid = self._person(item)
        if jid == sender.bare and new == "outcast":
            raise StanzaError("conflict", "nobody bans themselves")  # §9.1
        if not jid.local and new not in ("outcast", "none"):
            raise StanzaError("not-allowed", "a whole domain can only be banned")  # §9.2
        old = self.affiliations.get(str(jid), {"affiliation": "none"})["affiliation"]
        plan_affiliation(actor.affiliation, old, new)
        return RoomChange(affiliation=new, jid=jid, reserved=self._reservation(item, new), reason=reason)

    def _person(self, item: Element) -> JID:
        if item.get("jid"):
            return JID.parse(item.attrib["jid"]).bare  # §10.3: full JIDs are cut
        occupant = self.occupants.get(item.get("nick") or _missing("jid"))
        if occupant is None:
            raise StanzaError("item-not-found", "nobody has this nickname")
        return occupant.jid

    def _reservation(self, item: Element, affiliation: str) -> str | None:
        """§9.3, §9.5: a nickname beside the address is to be reserved, an empty one to be given up."""
        nick = item.get("nick") if item.get("jid") and RANK[affiliation] >= RANK["member"] else None
        return self.prepared_nick(nick) if nick else nick

    def prepared_nick(self, nick: str) -> str:
        """Return a nickname that can be reserved; raises StanzaError("jid-malformed") or ("not-acceptable")."""
        prepared = self.jid.with_resource(nick).resource
        if not canonical_nick(prepared) or len(prepared) > MAX_NICK:
            raise StanzaError("not-acceptable", "such a nickname is not possible")
        return prepared

    def check_together(self, changes: Sequence[RoomChange]) -> None:
        """Raise StanzaError unless, after all of them, there is an owner, space for all, and no nickname for two."""
        new = {str(change.jid): change.affiliation for change in changes if change.affiliation}
        after = {**{jid: entry["affiliation"] for jid, entry in self.affiliations.items()}, **new}
        if "owner" not in after.values():
            raise StanzaError("conflict", "a room has at least one owner")  # §10.4
        if len(after) > max(MAX_AFFILIATIONS, len(self.affiliations)):
            raise StanzaError("resource-constraint", "the room knows too many people")
        wishes = [(canonical_nick(change.reserved), str(change.jid)) for change in changes if change.reserved]
        owners = self._owners_of_nicks() if wishes else {}
        if len(dict(wishes)) < len(wishes) or any(owners.get(nick, jid) != jid for nick, jid in wishes):
            raise StanzaError("conflict", "this nickname is reserved")

    def apply(self, sender: JID, changes: Sequence[RoomChange]) -> None:
        """Make changes that have all been planned."""
        actor = self.present.get(str(sender))
        for change in changes:
            if change.role:
                self._set_role(actor, change)
            else:
                self.set_affiliation(change, actor)

    def _set_role(self, actor: Occupant | None, change: RoomChange) -> None:
        """§8.2: a role of none is a kick (307); any other is announced (§8.3, §8.4, §9.6, §9.7)."""
        target = self.occupants.get(change.nick)
        if target is None:  # an item before this one has removed the person
            return
        because = self._because(actor, change.reason)
        if change.role == "none":
            return self.expel(target, 307, because)
        target.role = change.role
        target.presence = None
        self._announce(target, because)

    def set_affiliation(self, change: RoomChange, actor: Occupant | None = None) -> None:
        """§9.1 to §9.4, §10.3 to §10.8: keep it, and let those in the room see what follows from it."""
        old = self.affiliation_of(change.jid)
        self._write_affiliation(change)
        because = self._because(actor, change.reason)
        here = [occupant for occupant in self.occupants.values() if change.jid in (occupant.jid, _domain(occupant.jid))]
        for occupant in here:
            self._follow_affiliation(occupant, because)
        if not here and old != change.affiliation:
            self._tell_absent(change, old)

    def _write_affiliation(self, change: RoomChange) -> None:
        jid = str(change.jid)
        if change.affiliation == "none":
            self.affiliations.pop(jid, None)
        else:
            nick = self.affiliations.get(jid, {}).get("nick", "") if change.reserved is None else change.reserved
            entry = {"affiliation": change.affiliation, "reason": change.reason}
            if change.affiliation != "outcast":  # §9.1: a ban loses the nickname
                entry["nick"] = nick
            self.affiliations[jid] = {key: value for key, value in entry.items() if value}
        self._keep.store(self, f"@{jid}", self.affiliations.get(jid))

    def _follow_affiliation(self, occupant: Occupant, because: Sequence[Element]) -> None:
        old, occupant.affiliation = occupant.affiliation, self.affiliation_of(occupant.jid)
        occupant.presence = None
        if occupant.affiliation == "outcast":
            self.expel(occupant, 301, because)  # §9.1
        elif occupant.affiliation == "none" and self["membersonly"]:
            self.expel(occupant, 321, because)  # §9.4
        elif occupant.affiliation != old:
            occupant.role = role_after(old, occupant.affiliation, occupant.role, self["moderatedroom"])
            self._announce(occupant, because)

    def _tell_absent(self, change: RoomChange, old: str) -> None:
        """§9.5: a new member of a members-only room gets an invitation; §18.1: admins and owners the news (101)."""
        new = change.affiliation
        if self["membersonly"] and new == "member" and old == "none":
            id = secrets.token_urlsafe(9)
            return self._emit(self.invitation(self.jid, change.jid, E(MUC_USER("invite")), id))
        if new != "outcast" and max(RANK[old], RANK[new]) >= RANK["admin"]:
            message = Stanza(MESSAGE, {"from": self.address, "to": str(change.jid), "id": secrets.token_urlsafe(9)})
            item = E(MUC_USER("item"), affiliation=new, role="none")
            message.add(E(MUC_USER("x"), None, item, E(MUC_USER("status"), code="101")))
            self._emit(message)

    @staticmethod
    def _because(actor: Occupant | None, reason: str) -> list[Element]:
        """Return what stands inside the item: who did it, and why."""
        who = [E(MUC_USER("actor"), nick=actor.nick)] if actor is not None else []
        return [*who, E(MUC_USER("reason"), None, reason)] if reason else who

    # -- configuration (§10.2)

    def plan_configuration(self, changes: Mapping[str, Any]) -> list[RoomChange]:
        """Check the values of a form; raises StanzaError. Return what becomes of admins and owners."""
        new = {**self.config, **changes}
        if new["muc#roomconfig_passwordprotectedroom"] and not new["muc#roomconfig_roomsecret"]:
            raise StanzaError("not-acceptable", "a password is needed to protect the room by one")
        for name, most in MAX_CONFIG_TEXT.items():
            if len(new[name]) > most:
                raise StanzaError("not-acceptable", f"{name}: at most {most} characters")
        people = self._planned_people(changes)
        self.check_together(people)
        return people

    def _planned_people(self, changes: Mapping[str, Any]) -> list[RoomChange]:
        """The form lists all admins and all owners (§10.5, note): who isn't in it any more is none."""
        planned: dict[str, str] = {}
        for name, affiliation in PEOPLE_FIELDS.items():
            if name in changes:
                wanted = [jid.bare for jid in changes[name]]
                if not all(jid.local for jid in wanted):
                    raise StanzaError("not-acceptable", f"{name}: expected addresses of people")
                missing = [jid for jid in self.people(affiliation) if jid not in planned]
                planned |= {**dict.fromkeys(missing, "none"), **dict.fromkeys(map(str, wanted), affiliation)}
        old = {jid: entry["affiliation"] for jid, entry in self.affiliations.items()}
        return [RoomChange(affiliation=affiliation, jid=JID.parse(jid)) for jid, affiliation in planned.items()
                if old.get(jid, "none") != affiliation]  # fmt: skip

    def configure(self, changes: Mapping[str, Any], people: Sequence[RoomChange]) -> None:
        """Take values that have been planned, and let everybody see what follows from them (§10.2)."""
        old, self.config = self.config, {**self.config, **changes, **{name: [] for name in PEOPLE_FIELDS}}
        self.locked = False
        self._keep.configured(self)
        for change in people:
            self.set_affiliation(change)
        self._follow_configuration(old)

    def _follow_configuration(self, old: Mapping[str, Any]) -> None:
        """§10.2: who may not stay leaves (322), whose role or visibility changes is shown anew, and all are told."""
        for occupant in list(self.occupants.values()):
            if occupant.affiliation == "none" and self["membersonly"]:
                self.expel(occupant, 322)
                continue
            if occupant.affiliation == "none" and self["moderatedroom"] != old["muc#roomconfig_moderatedroom"]:
                self._set_voice(occupant)
            if (occupant.role in self["presencebroadcast"]) != occupant.is_shown:
                self._show_or_hide(occupant, self._presence_of(occupant))
        codes = [code for name, (off, on) in CONFIG_CODES.items() if self.config[name] != old[name]
                 for code in [on if self.config[name] in (True, "anyone") else off]]  # fmt: skip
        if any(value != old[name] for name, value in self.config.items() if name not in CONFIG_CODES):
            codes.append(104)
        if codes:
            self.notify(*codes)

    def _set_voice(self, occupant: Occupant) -> None:
        """The room has become moderated, or isn't any more: people without an affiliation lose or gain their voice."""
        role = default_role("none", self["moderatedroom"])
        if occupant.role not in ("moderator", role):
            occupant.role, occupant.presence = role, None
            self._announce(occupant)

    # -- lists (§8.5, §9.2, §9.5, §9.8, §10.5, §10.8)

    def list_items(self, sender: JID, wanted: Element) -> list[Element]:
        """Return the items with the role or the affiliation that `wanted` names; raises StanzaError."""
        actor = self.standing_of(sender)
        role, affiliation = wanted.get("role"), wanted.get("affiliation")
        if affiliation is None and role in ("moderator", "participant", "visitor"):
            if actor.role != "moderator" and RANK[actor.affiliation] < RANK["admin"]:
                raise StanzaError("forbidden")
            return [self._role_item(occupant) for occupant in self.occupants.values() if occupant.role == role]
        if role is not None or affiliation not in ("outcast", "member", "admin", "owner"):
            raise StanzaError("bad-request", "an item has either a role or an affiliation")
        if not self._may_list(actor, affiliation):
            raise StanzaError("forbidden")
        return [self._affiliation_item(jid, self.affiliations[jid]) for jid in self.people(affiliation)]

    def _may_list(self, actor: Standing, affiliation: str) -> bool:
        """§9.5, §10.5: owners all lists; admins bans and members; where addresses are no secret, more people more."""
        if actor.affiliation == "owner" or (actor.affiliation == "admin" and affiliation in ("outcast", "member")):
            return True
        if self["whois"] != "anyone" or affiliation == "outcast" or RANK[actor.affiliation] < RANK["member"]:
            return False
        role = "participant" if actor.role == "none" else actor.role  # a member may ask from outside
        may_see_members = actor.affiliation == "admin" or role in self["getmemberlist"]
        return may_see_members and (affiliation == "member" or self["membersonly"] or actor.affiliation == "admin")

    def _role_item(self, occupant: Occupant) -> Element:
        return E(MUC_ADMIN("item"), affiliation=occupant.affiliation, role=occupant.role, nick=occupant.nick,
                 jid=occupant.latest)  # fmt: skip

    def _affiliation_item(self, jid: str, entry: Mapping[str, str]) -> Element:
        reason = E(MUC_ADMIN("reason"), None, entry["reason"]) if entry.get("reason") else None
        item = E(MUC_ADMIN("item"), {"affiliation": entry["affiliation"], "jid": jid}, reason)
        if entry.get("nick"):
            item.set("nick", entry["nick"])
        return item


def _nick_as_sent(stanza: Stanza) -> str:
    return stanza.get("to", "").partition("/")[2]


def _domain(jid: JID) -> JID:
    return JID("", jid.domain, "")


# -- what others may know of a room (§6)

SERVICE_FEATURES = (DISCO_INFO, DISCO_ITEMS, MUC, f"{MUC}#stable_id", OCCUPANT_ID, PING, RSM)
EVERY_ROOM = (DISCO_INFO, DISCO_ITEMS, MUC, f"{MUC}#stable_id", f"{MUC}#self-ping-optimization", f"{MUC}#register",
              f"{MUC}#roomconfig", f"{MUC}#roominfo", OCCUPANT_ID, STANZA_ID, VCARD, REGISTER)  # fmt: skip
ROOM_FEATURES: Mapping[str, tuple[str, str]] = {  # §6.4: the field, what is said when it is off, and when it is on
    "passwordprotectedroom": ("muc_unsecured", "muc_passwordprotected"),
    "publicroom": ("muc_hidden", "muc_public"),
    "membersonly": ("muc_open", "muc_membersonly"),
    "moderatedroom": ("muc_unmoderated", "muc_moderated"),
    "persistentroom": ("muc_temporary", "muc_persistent"),
}


def room_features(room: Room) -> list[str]:
    """Return the features that tell how a room is configured (§6.4)."""
    found = [names[bool(room[name])] for name, names in ROOM_FEATURES.items()]
    return [*EVERY_ROOM, *found, "muc_nonanonymous" if room["whois"] == "anyone" else "muc_semianonymous"]


def room_info(name: str, features: Iterable[str]) -> Element:
    """Build the disco#info of a room, or of the service."""
    identity = E(DISCO_INFO("identity"), category="conference", type="text", name=name)
    return E(DISCO_INFO("query"), None, identity, *(E(DISCO_INFO("feature"), var=name) for name in features))


def room_details(room: Room, asker: JID, avatars: Sequence[str]) -> Form:
    """Return the muc#roominfo form of a room (§6.4); what goes on inside only for those who may look in (§14.4)."""
    fields = [
        Field("FORM_TYPE", "hidden", value=f"{MUC}#roominfo"),
        Field("muc#roominfo_description", label="Description", value=room["roomdesc"]),
        Field("muc#roominfo_lang", label="Language", value=room["lang"]),
        Field("muc#roominfo_subjectmod", "boolean", "May participants change the subject?", room["changesubject"]),
        Field("muc#maxhistoryfetch", label="Earlier messages for newcomers", value=str(room["maxhistoryfetch"])),
    ]
    if avatars:
        fields.append(Field("muc#roominfo_avatarhash", "text-multi", "Avatar", list(avatars)))  # XEP-0486 §3.3
    if room.is_open_to(asker):
        subject = child_text(room.subject.message, CLIENT("subject")) if room.subject is not None else ""
        fields += [
            Field("muc#roominfo_occupants", label="Number of occupants", value=str(len(room.occupants))),
            Field("muc#roominfo_subject", label="Subject", value=subject),
        ]
    return Form("result", fields)


def avatar_hashes(card: Element) -> list[str]:
    """Return the SHA-1 of each photo in a vCard (XEP-0153 §3.1, XEP-0486 §5.1); broken ones count for nothing."""
    hashes = []
    for photo in card.iterfind(VCARD("PHOTO")):
        try:
            image = base64.b64decode("".join(child_text(photo, VCARD("BINVAL")).split()), validate=True)
        except binascii.Error:
            continue
        if image:
            hashes.append(hashlib.sha1(image, usedforsecurity=False).hexdigest())
    return hashes


def without_error_source(answer: Stanza) -> Stanza:
    """Take out of an error who has made it: a real address, perhaps (§17.4; RFC 6120 §8.3.2)."""
    error = answer.find(CLIENT("error"))
    if error is not None and "by" in error.attrib:
        anonymous = E(CLIENT("error"), {key: value for key, value in error.attrib.items() if key != "by"}, *error)
        answer.discard(lambda child: child is error)
        answer.add(anonymous)
    return answer


# -- the feature that owns the rooms


class Relayed(NamedTuple):
    """A request that was passed on to an occupant, and waits for its answer."""

    asker: str  # full JID
    asked: str  # occupant JID, as the asker knows it
    id: str  # of the asker's request
    person: JID  # bare: whose answer it must be
    at: float  # on the loop's clock


class RoomsDomain:
    """The domain of the rooms of one host; a `Domain` (chapter 14)."""

    def __init__(self, rooms: MultiUserChat, name: str) -> None:
        self.rooms = rooms
        self.name = name

    def receive(self, stanza: Stanza, to: JID) -> None:
        """Take a stanza for the service, a room, or an occupant; raises StanzaError."""
        if stanza.tag == IQ:
            self._receive_iq(stanza, to)
        elif not to.local:
            if stanza.tag == MESSAGE and stanza.get("type") != "error":
                raise StanzaError("service-unavailable")
        elif stanza.tag == PRESENCE:
            self.rooms.take_presence(stanza, to)
        else:
            self.rooms.take_message(stanza, to)

    def _receive_iq(self, stanza: Stanza, to: JID) -> None:
        sender = JID.parse(stanza.get("from", ""))
        if stanza.get("type") in ("result", "error"):
            return self.rooms.relay_answer(stanza)
        if to.resource:
            return self.rooms.relay_request(stanza, to)
        if to.local:
            self.rooms.find(to, sender)
        self.rooms.server.answer(stanza, sender, "room" if to.local else "rooms", to)


class MultiUserChat(Feature):
    """Multi-User Chat (XEP-0045) on a domain of its own beside each host; with XEP-0249, 0359, 0410, 0421 and 0486.

        C: <presence to='kitchen@conference.example.org/Romeo'><x xmlns='http://jabber.org/protocol/muc'/></presence>
        S: <presence from='kitchen@conference.example.org/Romeo'><x xmlns='http://jabber.org/protocol/muc#user'>
             <item affiliation='owner' role='moderator'/><status code='110'/><status code='201'/></x></presence>

    Documents: "room", by room, for persistent rooms only: "config" (the form's fields),
    "subject" (as in the log), "creator", "vcard" (XML), "avatars" (hashes), and "@ADDRESS"
    for each affiliation: `{"affiliation": "member", "nick": "Romeo", "reason": "…"}`.
    Log: "room-history", by room: `{"at": stamp, "stanza": XML}`.
    """

    namespace = MUC

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.documents = server.storage.documents("room", dict)
        self.log = server.storage.log("room-history")
        self.rooms: dict[JID, Room] = {}
        self._relayed: OrderedDict[str, Relayed] = OrderedDict()
        self._spent: Counter[JID] = Counter()  # stanzas of each person in this minute
        self._minute_ends = 0.0  # on the loop's clock
        self._held: list[Stanza] | None = None  # what is to be said when the request at hand is answered
        self.reloaded()

    def reloaded(self) -> None:
        """Serve rooms beside each host, as the configuration has it now."""
        label = self.server.config.muc_host
        names = {f"{label}.{host}" for host in self.server.config.hosts} if label else set()
        names -= set(self.server.config.components)  # one of them may be a room service in place of this
        self._close([jid for jid in self.rooms if jid.domain not in names])
        for name, domain in list(self.server.domains.items()):
            if isinstance(domain, RoomsDomain) and name not in names:
                del self.server.domains[name]
        for name in names - set(self.server.domains):
            self.server.domains[name] = RoomsDomain(self, name)
            for jid in self.documents.owners(name):
                self._load(jid)

    def _close(self, rooms: Iterable[JID]) -> None:
        for jid in rooms:
            self.rooms.pop(jid).close(332)

    def shutting_down(self) -> None:
        """§11.2: the rooms close for a while (332)."""
        self._close(list(self.rooms))

    def find(self, jid: JID, asker: JID) -> Room:
        """Return a room; raises StanzaError("item-not-found"), also while only its owner may know of it (§17.2)."""
        room = self.rooms.get(jid.bare)
        if room is None or (room.locked and room.affiliation_of(asker) != "owner"):
            raise StanzaError("item-not-found", "there is no such room")
        return room

    # -- speaking: at once, or behind the result of the request at hand

    def emit(self, stanza: Stanza) -> None:
        """Send what a room says."""
        if self._held is None:
            self.server.emit(stanza)
        else:
            self._held.append(stanza)

    def _change(self, request: Iq, change: Callable[[], None]) -> None:
        """Make a change now, so that it is kept before it is confirmed; all others hear of it behind the result.

        §8.2 to §10.4 want this order: the one who asked must know that it was the own request.
        """
        self.server.storage.check()
        held = self._held = []
        try:
            change()
        finally:
            self._held = None
        request.afterwards(functools.partial(self._emit_all, held))

    def _emit_all(self, stanzas: Iterable[Stanza]) -> None:
        for stanza in stanzas:
            self.server.emit(stanza)

    def spend(self, sender: JID, stanzas: int = 1) -> None:
        """Count what somebody makes rooms say in this minute; raises StanzaError("policy-violation") (S54)."""
        limit = self.server.config.limits.room_stanzas_per_minute
        if not limit:
            return
        if self.server.loop.now() >= self._minute_ends:
            self._spent.clear()
            self._minute_ends = self.server.loop.now() + 60
        if self._spent[sender.bare] + stanzas > limit:
            raise StanzaError("policy-violation", "too much at once: wait a minute", kind="wait")
        self._spent[sender.bare] += stanzas

    # -- what lasts

    def _new_room(self, jid: JID) -> Room:
        room = Room(jid, self.server.secret, self.emit, self, self.server.config.limits.room_occupants)
        self.rooms[jid] = room
        return room

    def _load(self, jid: JID) -> None:
        room, stored = self._new_room(jid), self.documents.items(jid)
        known = {name: value for name, value in stored.get("config", {}).items() if name in room.config}
        room.config = {**room.config, **known}
        room.creator = stored.get("creator", "")
        room.affiliations = {key[1:]: dict(entry) for key, entry in stored.items() if key.startswith("@")}
        room.has_loaded_history = False

    def _load_history(self, room: Room) -> None:
        """Read what was said, and the subject, when the first one enters: not all rooms of a server are in use."""
        if room.has_loaded_history:
            return
        room.has_loaded_history = True
        subject = self.documents.item(room.jid, "subject")
        for said in self._readable(room, [subject] if subject else []):
            room.subject = said
        for said in self._readable(room, self.log.read(room.jid)[-HISTORY_MOST:]):
            room.history.add(said, room["maxhistoryfetch"])

    def _readable(self, room: Room, records: Iterable[Mapping[str, str]]) -> Iterator[Said]:
        for record in records:
            try:
                yield Said.load(record)
            except (StreamError, KeyError) as error:  # edited by hand, or older than a stricter rule
                log.error("a message of %s cannot be read (%r): left out", room.address, error)

    def store(self, room: Room, key: str, item: Json) -> None:
        """Keep one part of a persistent room."""
        if room["persistentroom"] and not room.locked:
            self.documents.put(room.jid, key, item)

    def remember(self, room: Room, said: Said) -> None:
        """Keep a message of a persistent room, and drop the older half now and then."""
        if not room["persistentroom"] or room.locked:
            return
        self.log.append(room.jid, said.record())
        amount = self.log.count(room.jid)
        most = LOGGED_HISTORY if room["enablelogging"] else HISTORY_MOST
        if amount > 2 * most or self.log.size(room.jid) > MAX_LOG_BYTES:
            self.log.drop(room.jid, amount // 2)

    def configured(self, room: Room) -> None:
        """Keep the whole room if it has become persistent, the configuration if it is, nothing if it isn't."""
        is_stored = room.jid in self.documents
        if not room["persistentroom"]:
            if is_stored:
                self.server.storage.remove_owner(room.jid)
            return
        self.documents.put(room.jid, "config", dict(room.config))
        if not is_stored:
            self.documents.put(room.jid, "creator", room.creator)
            if room.subject is not None:
                self.documents.put(room.jid, "subject", room.subject.record())
            for jid, entry in room.affiliations.items():
                self.documents.put(room.jid, f"@{jid}", dict(entry))
            self.log.rewrite(room.jid, [said.record() for said in room.history.messages])

    def forget(self, room: Room) -> None:
        """The room is gone, from memory and from disk."""
        if room.jid in self.documents:
            self.server.storage.remove_owner(room.jid)  # first: a full disk refuses it
        self.rooms.pop(room.jid, None)

    def _tidy(self, room: Room) -> None:
        """§7.14: an empty room stays only if it is persistent and was ever configured."""
        if not room.occupants and (room.locked or not room["persistentroom"]):
            self.forget(room)

    # -- presence

    def take_presence(self, stanza: Stanza, to: JID) -> None:
        """§7.2, §7.6, §7.7, §7.14. Only `unavailable` leaves and only no type at all enters (§17.3)."""
        room, sender, type = self.rooms.get(to.bare), stanza.get("from", ""), stanza.get("type")
        if type is None:
            try:
                return self._enter(room, stanza, to)
            except StanzaError as error:
                return self._refuse_presence(stanza, error)
        if room is None or sender not in room.present:
            return
        if type == "error" and error_condition(stanza) in GONE_CONDITIONS:
            room.remove_unreachable(sender)
        elif type == "unavailable" and room.locked:
            return self._destroy(room, E(MUC_OWNER("destroy")))  # §10.1.3: who never configures it wants no room
        elif type == "unavailable":
            room.leave(stanza)
        self._tidy(room)

    def _enter(self, room: Room | None, stanza: Stanza, to: JID) -> None:
        sender = JID.parse(stanza.get("from", ""))
        entry, is_present = stanza.find(MUC("x")), room is not None and str(sender) in room.present
        if not to.resource:
            raise StanzaError("jid-malformed", "a nickname is needed to enter a room")  # §7.2.1
        if entry is None and not is_present:
            return self._answer_ghost(stanza, to)
        if len(stanza.content) > MAX_ROOM_PRESENCE:
            raise StanzaError("policy-violation", f"presence in a room has at most {MAX_ROOM_PRESENCE} bytes")
        self.spend(sender)
        if not is_present:
            self._check_joined(str(sender))
        room = room or self._create(sender, to.bare)
        self._load_history(room)
        try:
            if entry is None:
                room.update_presence(stanza, to.resource)
            else:
                room.join(stanza, to.resource, entry)
            self._follow_nick(room.present[str(sender)], str(to))
        finally:
            self._tidy(room)

    def _refuse_presence(self, stanza: Stanza, error: StanzaError) -> None:
        """§7.2.17, §7.6: like any other refusal, but clients know it by an `<x/>`, empty: no password goes back."""
        if self.server.trace is not None:
            self.server.trace.decided(f"XEP-0045 §7.2.17: refused with {error.condition} {error.text}".rstrip())
        refusal = error_reply(stanza, error)
        refusal.add(E(MUC("x")))
        self.server.reply(refusal)

    def _follow_nick(self, occupant: Occupant, address: str) -> None:
        """A new nickname is that of all the person's clients: each must tell the room when it goes (chapter 15)."""
        for full in occupant.sessions:
            session = self.server.session(JID.parse(full))
            if session is not None:
                session.directed[address] = None

    def _answer_ghost(self, stanza: Stanza, to: JID) -> None:
        """§7.2.18: a client that believes to be in the room learns that it isn't, and can join anew."""
        gone = Stanza(PRESENCE, {"type": "unavailable", "from": str(to), "to": stanza.get("from", "")})
        reason = E(MUC_USER("reason"), None, "You are not in the room.")
        item = E(MUC_USER("item"), {"affiliation": "none", "role": "none"}, reason)
        gone.add(E(MUC_USER("x"), None, item, *(E(MUC_USER("status"), code=code) for code in ("110", "307", "333"))))
        self.emit(gone)

    def _create(self, creator: JID, jid: JID) -> Room:
        """§10.1: for those who may; other servers' users join rooms, but don't make them here."""
        config, limits = self.server.config, self.server.config.limits
        is_admin = creator.bare in config.admins
        if creator.domain not in config.hosts or (config.muc_create == "admins" and not is_admin):
            raise StanzaError("not-allowed", "you may not create rooms here")
        own = sum(room.creator == str(creator.bare) for room in self.rooms.values())
        if len(self.rooms) >= limits.rooms or (own >= limits.rooms_per_account and not is_admin):
            raise StanzaError("resource-constraint", "too many rooms")
        room = self._new_room(jid)
        room.locked = True
        room.creator = str(creator.bare)
        room.affiliations[room.creator] = {"affiliation": "owner"}
        return room

    def _check_joined(self, full: str) -> None:
        if sum(full in room.present for room in self.rooms.values()) >= MAX_ROOMS_JOINED:
            raise StanzaError("resource-constraint", "you are in too many rooms")

    # -- messages

    def take_message(self, stanza: Stanza, to: JID) -> None:
        """§7.4, §7.5, §7.8, §7.13; an error tells that an occupant is gone (§18.1.2)."""
        room, sender, type = self.rooms.get(to.bare), JID.parse(stanza.get("from", "")), stanza.get("type")
        if type == "error":
            if room is not None and error_condition(stanza) in GONE_CONDITIONS:
                room.remove_unreachable(str(sender))
                self._tidy(room)
            return
        room = self.find(to, sender)  # §17.2
        self.spend(sender)
        if to.resource:
            room.whisper(stanza, to.resource)
        elif type == "groupchat":
            room.speak(stanza)
        else:
            self._take_request(room, stanza, sender)

    def _take_request(self, room: Room, stanza: Stanza, sender: JID) -> None:
        extension = stanza.find(MUC_USER("x"))
        refusal = None if extension is None else extension.find(MUC_USER("decline"))
        if refusal is not None:
            return room.decline(stanza, refusal)
        room.speaker(stanza)
        invitations = [] if extension is None else extension.findall(MUC_USER("invite"))
        if invitations:
            self._invite(room, stanza, invitations)
        elif (form := Form.within(stanza)) is not None:
            room.take_voice_form(stanza, form)
        else:
            raise StanzaError("bad-request", "a message to the room is of type groupchat")

    def _invite(self, room: Room, stanza: Stanza, invitations: Sequence[Element]) -> None:
        """§7.8.2: all or none. A server that isn't there is item-not-found; about an account here nothing is said."""
        inviter = JID.parse(stanza.get("from", ""))
        if len(invitations) > MAX_INVITED:
            raise StanzaError("policy-violation", f"at most {MAX_INVITED} invitations at once")
        self.spend(inviter, INVITATION_COST * len(invitations))
        for message in [room.plan_invitation(stanza, invitation) for invitation in invitations]:
            invitee = JID.parse(message.attrib["to"])
            try:
                self.server.route(message, invitee)
            except StanzaError as error:
                if error.condition.startswith("remote-server"):
                    raise StanzaError("item-not-found", f"there is no {invitee.domain}") from None
            room.note_invitation(inviter.bare, invitee)

    # -- requests between occupants (§17.4)

    def relay_request(self, stanza: Stanza, to: JID) -> None:
        """Pass a request on to an occupant, or answer it here: a ping to oneself (XEP-0410)."""
        room = self.rooms.get(to.bare)
        asker = room.present.get(stanza.get("from", "")) if room is not None else None
        payload = stanza[0].tag
        if room is None or asker is None:
            is_disco = namespace_of(payload) in (DISCO_INFO, DISCO_ITEMS)
            raise StanzaError("bad-request" if is_disco else "not-acceptable")  # §6.6; XEP-0410 §3.3
        asked = room.occupants.get(to.resource)
        if asked is None:
            raise StanzaError("item-not-found", "nobody has this nickname")
        if asked is asker and payload == PING("ping"):
            answer = {"type": "result", "id": stanza.get("id", ""), "from": str(to), "to": stanza.get("from", "")}
            return self.emit(Stanza(IQ, answer))
        relayed = Relayed(stanza.get("from", ""), str(to), stanza.get("id", ""), asked.jid, self.server.loop.now())
        target = str(asked.jid) if payload == VCARD("vCard") else asked.latest  # §17.4
        request = stanza.addressed(to=target, sender=f"{room.address}/{asker.nick}")
        request.set("id", self._note_relayed(relayed))
        self.server.route(request, JID.parse(target))

    def _note_relayed(self, relayed: Relayed) -> str:
        while self._relayed:
            oldest = next(iter(self._relayed.values()))
            if len(self._relayed) < MAX_RELAYED and oldest.at + RELAY_TIMEOUT > relayed.at:
                break
            self._relayed.popitem(last=False)
        id = secrets.token_urlsafe(12)
        self._relayed[id] = relayed
        return id

    def relay_answer(self, stanza: Stanza) -> None:
        """Bring an occupant's answer to who asked, under the names that both know; any other is ignored."""
        relayed = self._relayed.get(stanza.get("id", ""))
        if relayed is None or JID.parse(stanza.get("from", "")).bare != relayed.person:
            return
        del self._relayed[stanza.get("id", "")]
        answer = stanza.addressed(to=relayed.asker, sender=relayed.asked)
        answer.set("id", relayed.id)
        self.emit(without_error_source(answer))

    # -- service discovery (§6)

    def disco_items(self, request: Iq, items: Element) -> None:
        """§6.1: the rooms are a service of the host."""
        name = f"{self.server.config.muc_host}.{request.owner.domain}"
        if not request.owner.local and isinstance(self.server.domains.get(name), RoomsDomain):
            items.append(E(DISCO_ITEMS("item"), jid=name, name="Chat rooms"))

    @iq("get", DISCO_INFO("query"), to="rooms")
    def service_info(self, request: Iq) -> Payload:
        """§6.2."""
        if request.payload.get("node"):
            raise StanzaError("item-not-found")
        return room_info("Chat rooms", SERVICE_FEATURES)

    @iq("get", DISCO_ITEMS("query"), to="rooms")
    def service_items(self, request: Iq) -> Payload:
        """§6.3: the rooms of this domain that want to be found, in pages if they are many or it is asked for."""
        public = [(str(jid), room) for jid, room in sorted(self.rooms.items())
                  if jid.domain == request.owner.domain and room["publicroom"] and not room.locked]  # fmt: skip
        shown, pages = page(request.payload, public)
        items = (E(DISCO_ITEMS("item"), jid=jid, name=room["roomname"] or room.jid.local) for jid, room in shown)
        is_whole = len(shown) == len(public) and request.payload.find(RSM("set")) is None
        return E(DISCO_ITEMS("query"), None, *items, None if is_whole else pages)

    @iq("get", DISCO_INFO("query"), to="room")
    def info(self, request: Iq) -> Payload:
        """§6.4; the node x-roomuser-item tells the nickname that is reserved for who asks (§7.12)."""
        room = self.find(request.owner, request.sender)
        node = request.payload.get("node")
        if node == "x-roomuser-item":
            return self._reserved_nick(room, request.sender)
        if node == f"{MUC}#traffic":
            raise StanzaError("service-unavailable")  # §18.1.1: nothing is filtered
        if node:
            raise StanzaError("item-not-found")
        self._load_history(room)  # with the subject
        info = room_info(room["roomname"] or room.jid.local, room_features(room))
        avatars = self.documents.item(room.jid, "avatars") or []
        info.append(room_details(room, request.sender, avatars).to_element())
        return info

    def _reserved_nick(self, room: Room, asker: JID) -> Element:
        nick = room.affiliations.get(str(asker.bare), {}).get("nick")
        identity = E(DISCO_INFO("identity"), category="conference", type="text", name=nick) if nick else None
        return E(DISCO_INFO("query"), {"node": "x-roomuser-item"}, identity)

    @iq("get", DISCO_ITEMS("query"), to="room")
    def items(self, request: Iq) -> Payload:
        """§6.5: who is there, for those who may look in (threat S51)."""
        room = self.find(request.owner, request.sender)
        if not room.is_open_to(request.sender):
            return E(DISCO_ITEMS("query"))
        shown = (nick for nick, occupant in room.occupants.items() if occupant.is_shown)
        return E(DISCO_ITEMS("query"), None, *(E(DISCO_ITEMS("item"), jid=f"{room.address}/{nick}") for nick in shown))

    @iq("get", PING("ping"), to="rooms")
    def ping(self, request: Iq) -> None:
        """XEP-0199 §4.2, for the service itself."""

    # -- administration (§8 to §10)

    @iq("get", MUC_ADMIN("query"), to="room")
    def lists(self, request: Iq) -> Payload:
        """§8.5, §9.2, §9.5, §9.8, §10.5, §10.8."""
        if len(request.payload) != 1 or request.payload[0].tag != MUC_ADMIN("item"):
            raise StanzaError("bad-request", "one item says which list is wanted")
        items = self.find(request.owner, request.sender).list_items(request.sender, request.payload[0])
        return E(MUC_ADMIN("query"), None, *items)

    @iq("set", MUC_ADMIN("query"), to="room")
    def administer(self, request: Iq) -> Payload:
        """§8.2 to §8.5, §9, §10.3 to §10.8: all items, or none of them (§9.2)."""
        room, sender = self.find(request.owner, request.sender), request.sender
        items = request.payload.findall(MUC_ADMIN("item"))
        if not items or len(items) != len(request.payload):
            raise StanzaError("bad-request", "expected items")
        self.spend(sender, len(items))
        changes = room.plan(sender, items)
        self._change(request, lambda: room.apply(sender, changes))
        self._tidy(room)
        return None

    @iq("get", MUC_OWNER("query"), to="room")
    def configuration(self, request: Iq) -> Payload:
        """§10.1.3, §10.2."""
        room = self._owned(request)
        people = {name: [JID.parse(jid) for jid in room.people(what)] for name, what in PEOPLE_FIELDS.items()}
        return E(MUC_OWNER("query"), None, ROOM_FORM.fill({**room.config, **people}).to_element())

    @iq("set", MUC_OWNER("query"), to="room")
    def configure(self, request: Iq) -> Payload:
        """§10.1.2, §10.1.3, §10.2, §10.9: configure, accept the defaults, give up, or destroy."""
        room = self._owned(request)
        destroy = request.payload.find(MUC_OWNER("destroy"))
        form = Form.within(request.payload)
        if destroy is not None:
            self._destroy(room, destroy)
            return None
        if form is None:
            raise StanzaError("bad-request", "expected a form")
        values = ROOM_FORM.read(form)
        if values is None:
            if room.locked:
                self._destroy(room, E(MUC_OWNER("destroy")))  # §10.1.3: who cancels the first form wants no room
            return None
        people = room.plan_configuration(values)
        self.spend(request.sender, 1 + len(people))
        self._change(request, lambda: room.configure(values, people))
        self._tidy(room)
        return None

    def _owned(self, request: Iq) -> Room:
        room = self.find(request.owner, request.sender)
        if room.affiliation_of(request.sender) != "owner":
            raise StanzaError("forbidden")
        return room

    def _destroy(self, room: Room, wish: Element) -> None:
        """§10.9: from disk first, then everybody hears of it, with the other place to meet."""
        self.forget(room)
        told = E(MUC_USER("destroy"), {key: wish.attrib[key] for key in ("jid",) if key in wish.attrib})
        for name in ("password", "reason"):
            if text := child_text(wish, MUC_OWNER(name)):
                told.append(E(MUC_USER(name), None, text))
        room.close(destroy=told)

    # -- registration (§7.10) and the room's card (XEP-0054, XEP-0486)

    @iq("get", REGISTER("query"), to="room")
    def registration(self, request: Iq) -> Payload:
        """§7.10: whether one is known to the room, or the form to become so."""
        room = self.find(request.owner, request.sender)
        entry = self._registrable(room, request.sender)
        if entry is not None:
            known = E(REGISTER("username"), None, entry.get("nick") or None)
            return E(REGISTER("query"), None, E(REGISTER("registered")), known)
        return E(REGISTER("query"), None, REGISTER_FORM.fill().to_element())

    @iq("set", REGISTER("query"), to="room")
    def register(self, request: Iq) -> Payload:
        """§7.10: become a member with a nickname of one's own, or stop being one."""
        room, person = self.find(request.owner, request.sender), request.sender.bare
        entry = self._registrable(room, request.sender)
        old = entry["affiliation"] if entry is not None else "none"
        if request.payload.find(REGISTER("remove")) is not None:
            change = RoomChange(affiliation="none" if old == "member" else old, jid=person, reserved="")
        else:
            nick = self._wanted_nick(room, request)
            change = RoomChange(affiliation="member" if old == "none" else old, jid=person, reserved=nick)
            room.check_together([change])
        self._change(request, lambda: room.set_affiliation(change))
        self._tidy(room)
        return None

    def _wanted_nick(self, room: Room, request: Iq) -> str:
        """Return the nickname in a form of registration; raises StanzaError, also if somebody uses it just now."""
        form = Form.within(request.payload)
        values = None if form is None else REGISTER_FORM.read(form)
        if values is None:
            raise StanzaError("bad-request", "expected the form of registration")
        nick = room.prepared_nick(values["muc#register_roomnick"])
        users = [other.jid for other in room.occupants.values() if canonical_nick(other.nick) == canonical_nick(nick)]
        if any(user != request.sender.bare for user in users):
            raise StanzaError("conflict", "somebody has this nickname")
        return nick

    def _registrable(self, room: Room, sender: JID) -> Mapping[str, str] | None:
        affiliation = room.affiliation_of(sender)
        if affiliation == "outcast" or (affiliation == "none" and room["membersonly"]):
            raise StanzaError("not-allowed", "members are made by the admins of this room")
        return room.affiliations.get(str(sender.bare))

    @iq("get", VCARD("vCard"), to="room")
    def card(self, request: Iq) -> Payload:
        """The room's vCard, with its picture (XEP-0486 §3.4)."""
        stored = self.documents.item(self.find(request.owner, request.sender).jid, "vcard")
        if stored is None:
            raise StanzaError("item-not-found")
        return parse_element(stored)

    @iq("set", VCARD("vCard"), to="room")
    def set_card(self, request: Iq) -> Payload:
        """XEP-0486 §3.2: owners only, and persistent rooms only: nothing else lasts. An empty card removes it."""
        room = self._owned(request)
        if not room["persistentroom"] or room.locked:
            raise StanzaError("not-allowed", "make the room persistent first")
        self.documents.put(room.jid, "vcard", serialize(request.payload, CLIENT) if len(request.payload) else None)
        self.documents.put(room.jid, "avatars", avatar_hashes(request.payload) or None)
        request.afterwards(lambda: room.notify(104))
        return None

    # -- events

    def account_removed(self, owner: JID) -> None:
        """Who gets the name next must not inherit what it was in rooms; without an owner a room goes to its admins."""
        address = str(owner)
        for room in list(self.rooms.values()):
            if address not in room.affiliations:
                continue
            heirs = [jid for what in ("owner", "admin", "member") for jid in room.people(what) if jid != address]
            if not heirs:
                self._destroy(room, E(MUC_OWNER("destroy")))
                continue
            if room.people("owner") == [address]:
                room.set_affiliation(RoomChange(affiliation="owner", jid=JID.parse(heirs[0])))
            room.set_affiliation(RoomChange(affiliation="none", jid=owner))


# ==== 22. Staying connected (XEP-0198, XEP-0352, XEP-0357; XEP-0388, XEP-0386, XEP-0484) ====
#
# Phones lose their network in every tunnel and sleep most of the day. This chapter is what
# makes a connection outlive that: stream management counts what arrived and resumes a
# session on a new stream, client state says when nobody looks at the screen, push wakes an
# app that is not connected at all, and SASL2 with Bind 2 and FAST makes the way back in
# one round trip instead of six.
#
# The counting of stream management is `Acknowledgements`, which knows streams of no kind;
# `SessionManagement` adds what a client's session needs; `StreamManagement` is the protocol.
#
#     C: <message …/>  <r xmlns='urn:xmpp:sm:3'/>                 have you got it?
#     S: <a xmlns='urn:xmpp:sm:3' h='1'/>                         the first one, and it is on the disk
#     S: <message …/>  <r xmlns='urn:xmpp:sm:3'/>                 and you?
#     … the train enters a tunnel, the connection breaks, the session waits …
#     C: <resume xmlns='urn:xmpp:sm:3' previd='…' h='0'/>         on a new stream, after the login
#     S: <resumed xmlns='urn:xmpp:sm:3' previd='…' h='1'/>  <message …/>
#
# An ending is one of three. A session that its client closes is over at once. One whose
# stream breaks is detached: to others it is as present as before, what is sent to it is
# kept. One that nobody resumes in time is over then, and what its client has not
# acknowledged goes the way of messages for a resource that is gone. All of this is in
# memory: a restart ends all sessions, but no message, since shutdown ends them properly
# and a crash finds what was not acknowledged in the archive or in the offline log.

HANDLED_MODULUS = 2**32  # `h` is an unsignedInt and starts again at zero (XEP-0198 §4)
ACK_DELAY = 1.0  # seconds from a stanza to our <r/>: one question for a burst, and still before a radio sleeps
ACK_EVERY = 100  # unacknowledged stanzas after which we ask at once
ACK_STALL = 20.0  # seconds without a word after our question: then push tries to wake the client
ACK_PATIENCE = 1.0  # seconds that our answer may wait for the disk
MAX_EXPIRED = 4096  # sessions whose last `h` is remembered when they are over; each some 200 bytes


class Unacknowledged(NamedTuple):
    """A stanza that was sent: as it was written, when (Unix time), and its archive id if it is an archived message."""

    data: bytes
    at: float
    archived: str

    def stanza(self) -> Stanza | None:
        """Read it back; None when it is beyond a limit that was no limit when it came."""
        try:
            stanza = parse_element(self.data.decode())
        except StreamError as error:
            log.error("a stanza that was sent cannot be read (%s): dropped", error.condition)
            return None
        return stanza if isinstance(stanza, Stanza) else None


class Acknowledgements:
    """What both ends of a stream know of each other's stanzas (XEP-0198 §4): two counters and a queue.

    It serves streams of any kind. Counters only grow here, and are cut to 32 bits on the wire.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.handled = 0  # stanzas of the peer's that we have taken responsibility for
        self.sent = 0  # stanzas that we have sent
        self.queue: deque[Unacknowledged] = deque()  # the last of them, which the peer has not acknowledged
        self.size = 0  # bytes in the queue
        self._unsynced: deque[tuple[int, int]] = deque()  # (journal position, `handled` before it)

    def count(self) -> None:
        """One more stanza of the peer's is handled; what that changed is perhaps not on the disk yet."""
        position = self.storage.position
        if position > self.storage.synced and (not self._unsynced or self._unsynced[-1][0] != position):
            self._forget_synced()
            self._unsynced.append((position, self.handled))
        self.handled += 1

    @property
    def durable(self) -> int:
        """How many of the handled stanzas would survive a crash."""
        self._forget_synced()
        return self._unsynced[0][1] if self._unsynced else self.handled

    def _forget_synced(self) -> None:
        while self._unsynced and self._unsynced[0][0] <= self.storage.synced:
            self._unsynced.popleft()

    def keep(self, data: bytes, archived: str = "") -> None:
        """Note a stanza that is sent now, or that has to wait for a stream."""
        self.sent += 1
        self.size += len(data)
        self.queue.append(Unacknowledged(data, time.time(), archived))

    def acknowledge(self, h: int) -> list[Unacknowledged]:
        """Take the peer's `h`; return what it confirms. Raises StreamError for more than was sent (§6)."""
        amount = (h - (self.sent - len(self.queue))) % HANDLED_MODULUS
        if amount > len(self.queue):
            counts = {"h": str(h), "send-count": str(self.sent % HANDLED_MODULUS)}
            raise StreamError("undefined-condition", f"{h} stanzas acknowledged of {counts['send-count']} sent",
                              application=E(SM("handled-count-too-high"), counts))  # fmt: skip
        confirmed = [self.queue.popleft() for _ in range(amount)]
        self.size -= sum(len(stanza.data) for stanza in confirmed)
        return confirmed


def handled_count(element: Element) -> int:
    """Return the `h` of an element; raises StanzaError when it is no unsignedInt."""
    h = element.get("h", "")
    if not re.fullmatch("[0-9]{1,10}", h) or int(h) >= HANDLED_MODULUS:
        raise StanzaError("bad-request", "h is a number of 32 bits")
    return int(h)


class SessionManagement(Acknowledgements):
    """Stream management of one client's session (XEP-0198): what is sent, what is asked, who waits for it.

    The server asks, too: so a dead peer is noticed within a minute of the next stanza, and
    queues stay short. A client is asked at most once per second and `ACK_EVERY` stanzas.
    """

    def __init__(self, session: Session, id: str, timeout: float) -> None:
        super().__init__(session.server.storage)
        self.session = session
        self.id = id  # the SM-ID, a secret between the account's clients and us
        self.timeout = timeout  # seconds that it may be detached; 0: not at all
        self.may_be_resumed = timeout > 0
        self.expiry: Timer | None = None  # while it is detached
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()  # (`sent` then, whom to call)
        self._asked_at: float | None = None  # by the loop's clock, while an <r/> of ours is unanswered
        self._timer: Timer | None = None  # until we ask, or have waited long enough for the answer
        self._answering: Timer | None = None  # see `answer`

    # -- out

    def transmit(self, stanza: Stanza) -> None:
        """Keep a stanza until it is acknowledged; send it, if there is a stream."""
        session, data = self.session, stanza.wire()
        self.keep(data, self._archived(stanza) if stanza.tag == MESSAGE else "")
        if session.is_attached:
            session.stream.send_written(data)
            if self._asked_at is None and len(self.queue) >= ACK_EVERY:
                self.ask()
            elif self._timer is None:
                self._timer = session.server.loop.call_later(ACK_DELAY, self.ask)
        limits = session.server.config.limits
        if len(self.queue) > limits.unacknowledged or self.size > limits.unread:
            session.server.loop.post(self._overflow)  # not here: whoever sends may be in the middle of something

    def _archived(self, message: Stanza) -> str:
        """XEP-0359: the id by which the account's archive knows the message, "" if it doesn't."""
        by = str(self.session.bare)
        return next((child.get("id", "") for child in message.iterfind(STANZA_ID("stanza-id"))
                     if child.get("by") == by), "")  # fmt: skip

    def _overflow(self) -> None:
        """Neither here nor in the queue of a session that may never come back does a client's share have no end."""
        if self.session.management is self:
            self.session.server.end(self.session, StreamError("resource-constraint", "too much is unacknowledged"))

    def when_acknowledged(self, callback: Callable[[], None]) -> None:
        """See `Session.when_delivered`."""
        if self.queue:
            self._waiting.append((self.sent, callback))
        else:
            self.session.server.loop.run_last(callback)

    def ask(self) -> None:
        """§4: request an acknowledgement; a client that doesn't say a word within the answer's time is gone."""
        if not self.session.is_attached:
            return
        loop = self.session.server.loop
        self.stop()
        self._asked_at = loop.now()
        self.session.stream.send_element(E(SM("r")))
        self._timer = loop.call_later(min(ACK_STALL, self._longest), self._look)

    @property
    def _longest(self) -> float:
        return self.session.server.config.limits.answer_timeout

    def _look(self) -> None:
        """Nothing heard for a while: somebody may want to know; for long: the client is gone."""
        self._timer, asked_at, loop = None, self._asked_at, self.session.server.loop
        if asked_at is None or self.session.stream.heard_at >= asked_at:
            self._asked_at = None
        elif loop.now() >= asked_at + self._longest:
            self.session.stream.break_off()
        else:
            self._timer = loop.call_later(asked_at + self._longest - loop.now(), self._look)
            for event in self.session.server.registry.listeners("session_stalled"):
                event(self.session)

    def take(self, h: int) -> None:
        """The client has acknowledged the first `h` stanzas; raises StreamError (§6)."""
        confirmed = self.acknowledge(h)
        arrived = self.sent - len(self.queue)
        while self._waiting and self._waiting[0][0] <= arrived:
            self._waiting.popleft()[1]()
        archived = next((stanza.archived for stanza in reversed(confirmed) if stanza.archived), "")
        if archived:
            for event in self.session.server.registry.listeners("acknowledged"):
                event(self.session, archived)

    def acknowledged(self, h: int) -> None:
        """`<a/>`: take it, and plan the next question if something is still on its way."""
        self.take(h)
        self.stop()
        if self.queue:
            self._timer = self.session.server.loop.call_later(ACK_DELAY, self.ask)

    # -- in

    def answer(self) -> None:
        """`<r/>` (§4): the answer leaves when all it speaks of is on the disk, which takes milliseconds (chapter 8).

        "MUST NOT be withheld for any condition other than a timeout": when the disk takes
        longer than `ACK_PATIENCE`, an answer about what it has got so far goes ahead.
        """
        self.session.stream.send_element(E(SM("a"), h=str(self.handled % HANDLED_MODULUS)))
        if self._answering is None and self.durable < self.handled:
            self._answering = self.session.server.loop.call_later(ACK_PATIENCE, self._answer_ahead)

    def _answer_ahead(self) -> None:
        self._answering = None
        durable = self.durable
        if self.session.is_attached and durable < self.handled:
            answer = serialize(E(SM("a"), h=str(durable % HANDLED_MODULUS)), CLIENT)
            self.session.stream.transport.write_ahead(answer.encode())

    # -- other streams, and the end

    def stop(self) -> None:
        """Ask nothing and wait for no answer."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._asked_at = None

    def retransmit(self) -> None:
        """§5: on the new stream, send again what the client has not got."""
        for stanza in self.queue:
            self.session.stream.send_written(stanza.data)
        if self.queue:
            self.ask()

    def last_urgent(self) -> Stanza | None:
        """Return the last message in the queue that is worth a push."""
        for unacknowledged in reversed(self.queue):
            message = unacknowledged.stanza() if unacknowledged.data.startswith(b"<message") else None
            if message is not None and is_urgent(message):
                return message
        return None

    def release(self) -> Sequence[Unacknowledged]:
        """The session is over: tell those who waited, then return what has to find another way."""
        self.stop()
        if self.expiry is not None:
            self.expiry.cancel()
        while self._waiting:
            self._waiting.popleft()[1]()
        return self.queue


class StreamManagement(Feature):
    """Stream Management (XEP-0198): acknowledgements, and sessions that outlive their connection.

        C: <enable xmlns='urn:xmpp:sm:3' resume='true'/>
        S: <enabled xmlns='urn:xmpp:sm:3' id='…' resume='true' max='3600'/>

    `location` is not sent: there is one server, and it is where the client found it. An
    SM-ID is 144 random bits, and good for the account's own logins only (threat S34).
    """

    namespace = SM

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._sessions: dict[str, Session] = {}  # those that may be resumed, by SM-ID
        self._expired: OrderedDict[str, tuple[JID, int]] = OrderedDict()  # whose it was, and how much was handled

    def offer(self, stream: ClientStream) -> Element | None:
        """§2, §5: when stanzas may follow, that is, after the login."""
        return E(SM("sm")) if stream.state is StreamState.AUTHENTICATED else None

    # -- enabling (§3)

    @element(SM("enable"))
    def enable_on_stream(self, stream: ClientStream, element: Element) -> None:
        """§3: once, when a resource is bound; a second attempt ends the stream."""
        if stream.session is None:
            return stream.send_element(self._failed("unexpected-request"))
        is_enabled = stream.session.management is not None
        stream.send_element(self.enable(stream.session, element))
        if is_enabled:
            raise StreamError("policy-violation", "stream management is enabled already")

    @inline(SM("enable"))
    def enable(self, session: Session, element: Element) -> Element:
        """Enable it for a bound session; return `<enabled/>` or `<failed/>`. What is sent behind that counts.

        For `<enable/>` of its own, and inline (§9.1): the caller sends the answer.
        """
        if session.management is not None:
            return self._failed("unexpected-request")
        longest = self.server.config.limits.resumption_timeout
        wanted = element.get("max", "")
        timeout = min(longest, int(wanted)) if re.fullmatch("[0-9]{1,9}", wanted) and int(wanted) else longest
        if element.get("resume") not in ("true", "1"):
            timeout = 0.0
        management = SessionManagement(session, secrets.token_urlsafe(18), timeout)
        session.management = management
        if session.idle is None:
            session.transmit = session.outlet
        enabled = E(SM("enabled"))
        if management.may_be_resumed:
            self._sessions[management.id] = session
            enabled.attrib.update({"id": management.id, "resume": "true", "max": str(int(timeout))})
        return enabled

    def _failed(self, condition: str, h: int | None = None) -> Element:
        """§6: recoverable, so the stream goes on."""
        attributes = None if h is None else {"h": str(h % HANDLED_MODULUS)}
        return E(SM("failed"), attributes, E(STANZA_ERRORS(condition)))

    # -- acknowledging (§4)

    @element(SM("r"), state="bound")
    def requested(self, stream: ClientStream, element: Element) -> None:
        """§4: answered at once."""
        management = self._management(stream)
        if management is not None:
            management.answer()

    @element(SM("a"), state="bound")
    def acknowledged_by_client(self, stream: ClientStream, element: Element) -> None:
        """§4: the client has handled so many of our stanzas."""
        management = self._management(stream)
        try:
            h = handled_count(element)
        except StanzaError as error:
            raise StreamError("policy-violation", error.text) from None
        if management is not None:
            management.acknowledged(h)

    def _management(self, stream: ClientStream) -> SessionManagement | None:
        """Return the stream's, if it has been enabled; else say that it has not."""
        if stream.session is not None and stream.session.management is not None:
            return stream.session.management
        stream.send_element(self._failed("unexpected-request"))
        return None

    # -- resuming (§5)

    @element(SM("resume"))
    def resume_on_stream(self, stream: ClientStream, element: Element) -> None:
        """§5: instead of binding; when it fails, the client may still bind."""
        answer = self.resume(stream, element)
        stream.send_element(answer)
        if answer.tag == SM("resumed"):
            self.resumed(stream)

    def resume(self, stream: ClientStream, element: Element) -> Element:
        """Give a session this authenticated stream; return `<resumed/>` or `<failed/>`. Raises StreamError (§6).

        For `<resume/>` of its own, and inline (§9.2): the caller sends the answer, and if it is
        `<resumed/>`, calls `resumed` then.
        """
        if stream.owner is None or stream.session is not None:
            return self._failed("unexpected-request")
        id = element.get("previd", "")
        try:
            h = handled_count(element)
        except StanzaError as error:
            return self._failed(error.condition)
        session = self._sessions.get(id)
        if session is None or session.bare != stream.owner or session.management is None:
            owner, handled = self._expired.get(id, (None, None))
            return self._failed("item-not-found", handled if owner == stream.owner else None)
        session.management.take(h)
        self._take_over(session, session.management, stream)
        return E(SM("resumed"), {"previd": id, "h": str(session.management.handled % HANDLED_MODULUS)})

    def _take_over(self, session: Session, management: SessionManagement, stream: ClientStream) -> None:
        """§5: an old stream that is still open ends with `conflict`, and nobody hears of that."""
        management.stop()
        if management.expiry is not None:
            management.expiry.cancel()
            management.expiry = None
        old, session.stream = session.stream, stream
        old.session = None
        old.fail(StreamError("conflict", "the session goes on elsewhere"))
        stream.bound(session)

    def resumed(self, stream: ClientStream) -> None:
        """The client has been told that its session goes on here: send what it has not got."""
        session = stream.session
        assert session is not None and session.management is not None
        log.info("%s: session resumed", stream)
        session.management.retransmit()
        for event in self.server.registry.listeners("session_resumed"):
            event(session)

    # -- endings (§4, §7)

    def session_detached(self, session: Session) -> None:
        """§4: kept as long as we have said in `<enabled/>`."""
        management = session.management
        assert management is not None
        management.stop()
        management.expiry = self.server.loop.call_later(
            management.timeout, functools.partial(self.server.session_ended, session))  # fmt: skip

    def session_ended(self, session: Session) -> None:
        """§4: what the client has not got is treated as if it were sent to a resource that is gone."""
        management, session.management = session.management, None
        if management is None:
            return
        session.transmit = session.stream.send
        if self._sessions.pop(management.id, None) is not None:
            self._expired[management.id] = (session.bare, management.handled)
            if len(self._expired) > MAX_EXPIRED:
                self._expired.popitem(last=False)
        for unacknowledged in management.release():
            if session.bare in self.server.accounts and not unacknowledged.data.startswith(b"<presence"):
                self._reroute(session, unacknowledged)

    def _reroute(self, session: Session, unacknowledged: Unacknowledged) -> None:
        """§4: a request gets an error, a message goes elsewhere; all else is worth nothing to others."""
        stanza = unacknowledged.stanza()
        if stanza is None:
            return
        try:
            if stanza.tag == MESSAGE:
                self._redeliver(session, stanza, unacknowledged.at)
            elif stanza.get("type") in ("get", "set") and stanza.get("from"):
                raise StanzaError("service-unavailable")
        except StanzaError as error:
            self.server.refuse(stanza, error)

    def _redeliver(self, session: Session, message: Stanza, at: float) -> None:
        """Deliver a message to those of the account's other resources that have not got it, or keep it.

        RFC 6121 §8.5.3.2.1 leaves open what becomes of a message of type normal for a resource
        that is gone. Its sender was told that it is handled, so here it is as good as chat.
        """
        if kind_of(message) not in ("message chat", "message normal") or not is_worth_keeping(message):
            return
        if message.get("from") == str(session.bare) and is_carbon(message):
            return  # a copy: the message itself has its own way
        others = self.server.sessions(session.bare)
        if any(self._has_got(other, session, message, at) for other in others):
            return
        add_delay(message, session.jid.domain, stamp(at))
        host = self.server.domains.get(session.jid.domain)
        assert isinstance(host, Host)
        host.redeliver(message, session.bare)

    @staticmethod
    def _has_got(other: Session, session: Session, message: Stanza, at: float) -> bool:
        """Whether the other session was sent a copy (XEP-0280), or the message: both had the highest priority then."""
        if 0 < other.carbons_since <= at and is_to_be_copied(message, is_received=True):
            return True
        if message.get("to", str(session.bare)) != str(session.bare) or other.presence is None:
            return False
        (since, rank), (own_since, own_rank) = other.ranked, session.ranked
        return rank == own_rank and max(since, own_since) <= at


# -- client state: nobody looks at the screen

ORNAMENTS = frozenset({HINTS, STANZA_ID, DELAY, OCCUPANT_ID, MUC_USER})  # payloads that say nothing by themselves
MAX_HELD_BYTES = 256 * 1024  # of the content of what is held: one large stanza


def holding_key(stanza: Stanza) -> str | None:
    """Say what an inactive client may hear of later: None: hear it now; "": never; else the key under which to hold it.

    Of presence only the last from each address is held; it may not concern one's own place
    in a room (110), or a subscription. Of messages, headlines (such as news of PEP nodes),
    receipts, and copies of what another device has said can wait; who was typing is over by then.
    """
    if stanza.tag == PRESENCE:
        is_own = stanza.find(f"{MUC_USER('x')}/{MUC_USER('status')}[@code='110']") is not None
        return None if stanza.get("type") not in (None, "unavailable") or is_own else f"presence {stanza.get('from')}"
    type = stanza.get("type")
    if stanza.tag == IQ or type == "error":
        return None
    if type == "headline" or stanza.find(CARBONS("sent")) is not None:
        return "message"
    original: Element = stanza
    if (wrapper := stanza.find(CARBONS("received"))) is not None:
        original = next(wrapper.iter(MESSAGE), stanza)
    payloads = {namespace_of(child.tag) for child in original if child.tag != CLIENT("thread")} - ORNAMENTS
    if is_invitation(original) or not payloads <= IM_PAYLOADS:
        return None
    return "" if payloads == {CHAT_STATES} else "message"


class IdleQueue:
    """What can wait until somebody looks at the client again; in order, but for presence that is out of date.

    It stands before stream management, so that nothing in it has been counted, and a
    client in a tunnel finds one presence of each contact and not all of an hour.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._held: dict[str, Stanza] = {}
        self._size = 0
        self._numbers = count()

    def transmit(self, stanza: Stanza) -> None:
        """Hold a stanza, drop it, or send it behind all that is held."""
        key = holding_key(stanza)
        if key == "":
            return
        if key is not None:
            if key == "message":
                key = str(next(self._numbers))
            elif (old := self._held.pop(key, None)) is not None:
                self._size -= len(old.content)
            self._held[key] = stanza
            self._size += len(stanza.content)
            if len(self._held) <= self.session.server.config.limits.held and self._size <= MAX_HELD_BYTES:
                return
        self.flush()
        if key is None:
            self.session.outlet(stanza)

    def flush(self) -> None:
        """Send all that is held."""
        held, self._held, self._size = self._held, {}, 0
        for stanza in held.values():
            self.session.outlet(stanza)


class ClientState(Feature):
    """Client State Indication (XEP-0352): a client that nobody looks at is told less, and later.

        C: <inactive xmlns='urn:xmpp:csi:0'/>
        C: <active xmlns='urn:xmpp:csi:0'/>
        S: <presence from='juliet@example.org/balcony' …/> … all that had to wait

    Anything important takes all that waits along: the radio is on then anyway. A session
    whose stream broke is treated alike until it is resumed. `[limits] held = 0` holds nothing.
    """

    namespace = CSI

    def offer(self, stream: ClientStream) -> Element | None:
        """§4.1."""
        return E(CSI("csi")) if stream.state is StreamState.AUTHENTICATED else None

    @element(CSI("inactive"), state="bound")
    def inactive(self, stream: ClientStream, element: Element) -> None:
        """§4.2."""
        if stream.session is not None:
            self.deactivate(stream.session)

    @element(CSI("active"), state="bound")
    def active(self, stream: ClientStream, element: Element) -> None:
        """§4.2, §5.1: everything is on the wire before the next request is handled."""
        if stream.session is not None:
            self.activate(stream.session)

    def deactivate(self, session: Session) -> None:
        """Hold back from now on; also inline at binding (XEP-0386)."""
        if session.idle is None:
            session.idle = IdleQueue(session)
            session.transmit = session.idle.transmit

    def activate(self, session: Session) -> None:
        """Send what was held, and hold nothing any more."""
        if session.idle is not None:
            session.idle.flush()
            session.idle = None
            session.transmit = session.outlet

    def session_detached(self, session: Session) -> None:
        """There is nobody to look."""
        self.deactivate(session)

    def session_resumed(self, session: Session) -> None:
        """§5.2: a stream always begins active."""
        self.activate(session)

    def session_ended(self, session: Session) -> None:
        """With stream management what was held has not been sent, and finds another way (XEP-0198 §4)."""
        if session.management is not None:
            self.activate(session)
        session.idle = None


# -- push: waking an app that is not connected

URGENT = frozenset({CLIENT("body"), OMEMO("encrypted"), OMEMO_2("encrypted"), JINGLE_MESSAGES("propose")})
MAX_PUSH_OPTIONS = 4096  # bytes of what an app server wants to have repeated to it: a token
MAX_PUSHED_BODY = 500  # characters; Apple's and Google's notifications hold 4 KB in all
MAX_PUSH_FAILURES = 10  # times in a row that an app server may not be reached before it is given up
UNTOLD = "New message!"  # in place of the body: app servers take its presence for "show something"; as Prosody


def is_urgent(message: Stanza) -> bool:
    """Whether it is worth waking a sleeping telephone: somebody says something, calls, or invites."""
    if message.get("type") in ("error", "headline"):
        return False
    return any(child.tag in URGENT for child in message) or is_invitation(message)


@dataclass(slots=True)
class Notice:
    """What an app server has to be told of one registration; one publish request is under way at a time."""

    count: int = 0  # messages since the client was there
    sender: str = ""  # of the last
    body: str = ""
    is_new: bool = False  # there is something that no request has told
    is_under_way: bool = False
    failures: int = 0  # in a row


class Push(Feature):
    """Push Notifications (XEP-0357): an app that is not connected is woken by the server of its maker.

        C: <iq type='set' id='x42'><enable xmlns='urn:xmpp:push:0' jid='push-5.client.example' node='yxs32'/></iq>
        S: <iq type='set' from='example.org' to='push-5.client.example' …><pubsub …><publish node='yxs32'><item>
             <notification xmlns='urn:xmpp:push:0'><x …>message-count, last-message-sender, …</x></notification> …

    A registration belongs to the client that has made it. It is used for urgent messages
    to the account while that client has no session, or one that waits, or one that doesn't
    answer. App servers learn that there is a message, and only if `[push] content` says so,
    from whom it is, or what it says.

    Documents: "push", by account: `{"JID node": {"jid", "node", "options": XML or ""}}`.
    """

    namespace = PUSH
    server_features = (PUSH,)  # XEP-0357 asks for it at the account only, but some clients look here

    MAX_UNREGISTERED: ClassVar[int] = 10_000  # accounts of which is remembered that they have no registrations

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.registrations = server.storage.documents("push", dict)
        self._unregistered: set[JID] = set()  # accounts without registrations: all that most messages ask
        self._notices: dict[tuple[JID, str], Notice] = {}

    # -- registrations (§5, §6)

    @iq("set", PUSH("enable"), to="self")
    def enable(self, request: Iq) -> None:
        """§5: the last request counts; the oldest registration makes room."""
        owner, key = request.owner, self._key(request.payload)
        jid, _space, node = key.partition(" ")
        if not jid:
            raise StanzaError("bad-request", "which app server?")
        registered = dict.fromkeys(self.registrations.items(owner))
        registered.pop(key, None)
        limit = self.server.config.limits.pushes
        if not limit:
            raise StanzaError("not-allowed", "no push notifications here")
        for old in list(registered)[: len(registered) - limit + 1]:
            self._forget(owner, old)
        value = {"jid": jid, "node": node, "options": self._options(request.payload)}
        if self.registrations.item(owner, key) != value:
            self.registrations.put(owner, key, value)
        self._unregistered.discard(owner)
        self._notices.pop((owner, key), None)
        request.from_session.pushes |= {key}

    @staticmethod
    def _key(payload: Element) -> str:
        """Return `JID node`; raises StanzaError("jid-malformed")."""
        jid = payload.get("jid", "")
        return f"{JID.parse(jid)} {payload.get('node', '')[:MAX_PUSH_OPTIONS]}" if jid else " "

    @staticmethod
    def _options(payload: Element) -> str:
        """§5 example 9: the form to be repeated with each publish request, "" for none."""
        form = Form.within(payload)
        if form is None:
            return ""
        written = serialize(replace(form, type="submit").to_element(), CLIENT)
        if form.form_type != PUBSUB_OPTIONS or len(written) > MAX_PUSH_OPTIONS:
            raise StanzaError("bad-request", "expected a short form of publish-options")
        return written

    @iq("set", PUSH("disable"), to="self")
    def disable(self, request: Iq) -> None:
        """§6: one node of the app server's, or all."""
        key = self._key(request.payload)
        if key == " ":
            raise StanzaError("bad-request", "which app server?")
        names_node = "node" in request.payload.attrib
        for registered in list(self.registrations.items(request.owner)):
            if registered == key or (not names_node and registered.startswith(key)):
                self._forget(request.owner, registered)

    def _forget(self, owner: JID, key: str) -> None:
        self._notices.pop((owner, key), None)
        if self.registrations.item(owner, key) is not None:
            self.registrations.put(owner, key, None)
        for session in self.server.sessions(owner):
            session.pushes -= {key}

    def account_removed(self, owner: JID) -> None:
        """Nobody is woken for somebody else."""
        for key in self.registrations.items(owner):
            self._notices.pop((owner, key), None)

    # -- when (§7)

    @only(MESSAGE)
    def arriving(self, owner: JID, stanza: Stanza) -> Stanza | None:
        """A message may be news for clients that are not there."""
        if owner in self._unregistered or not self._is_registered(owner):
            return stanza
        self._obey_app_server(owner, stanza)
        if is_urgent(stanza) and stanza.get("from", "").partition("/")[0] != str(owner):
            for key in list(self.registrations.items(owner)):
                if self._is_away(owner, key, stanza):
                    self._notify(owner, key, stanza)
        return stanza

    def _is_registered(self, owner: JID) -> bool:
        if self.registrations.items(owner):
            return True
        if len(self._unregistered) >= self.MAX_UNREGISTERED:
            self._unregistered.clear()
        self._unregistered.add(owner)
        return False

    def _is_away(self, owner: JID, key: str, stanza: Stanza) -> bool:
        """Whether the client does not hear of the message by itself; what a room says is for one session only."""
        sessions = [session for session in self.server.sessions(owner) if key in session.pushes]
        if any(session.is_attached for session in sessions):
            return False
        return stanza.get("type") != "groupchat" or any(session.full == stanza.get("to") for session in sessions)

    def session_detached(self, session: Session) -> None:
        """What it was sent last may not have arrived."""
        self.session_stalled(session)

    def session_stalled(self, session: Session) -> None:
        """Likewise, when it does not answer; once for one message, since then there is a `Notice` of it."""
        if not session.pushes or session.management is None:
            return
        message = session.management.last_urgent()
        for key in session.pushes:
            if message is not None and (session.bare, key) not in self._notices:
                self._notify(session.bare, key, message)

    def session_resumed(self, session: Session) -> None:
        """The client is there: it has read, or is going to read everything."""
        for key in session.pushes:
            self._notices.pop((session.bare, key), None)

    def _obey_app_server(self, owner: JID, message: Stanza) -> None:
        """§8: it has taken back the right to publish."""
        told = message.find(PUBSUB("pubsub"))
        if told is not None and any(child.get("affiliation") == "none" for child in told):
            self._forget(owner, f"{message.get('from')} {told.get('node', '')}")

    # -- publishing (§7)

    def _notify(self, owner: JID, key: str, message: Stanza) -> None:
        """Note what there is to tell, and tell it now, or when the request before is answered: never two at once."""
        notice = self._notices.setdefault((owner, key), Notice())
        notice.count += 1
        notice.sender = message.get("from", "")
        notice.body = child_text(message, CLIENT("body"))
        notice.is_new = True
        if not notice.is_under_way:
            self._publish(owner, key, notice)

    def _publish(self, owner: JID, key: str, notice: Notice) -> None:
        registration = self.registrations.item(owner, key)
        notice.is_new, notice.is_under_way = False, True
        summary = Form("submit", [Field(FORM_TYPE, "hidden", value=PUSH_SUMMARY), *self._summary(notice)])
        item = E(PUBSUB("item"), None, E(PUSH("notification"), None, summary.to_element()))
        node = {"node": registration["node"]} if registration["node"] else {}
        pubsub = E(PUBSUB("pubsub"), None, E(PUBSUB("publish"), node, item))
        if registration["options"]:
            pubsub.append(E(PUBSUB("publish-options"), None, parse_element(registration["options"])))
        self.server.ask(owner.domain, JID.parse(registration["jid"]), pubsub, type="set",
                        then=functools.partial(self._published, owner, key, notice))  # fmt: skip

    def _summary(self, notice: Notice) -> Iterator[Field]:
        """§7: as much as the owner of this server allows (`[push] content`)."""
        content = self.server.config.push_content
        yield Field("message-count", value=str(notice.count))
        if content != "nothing":
            yield Field("last-message-sender", value=notice.sender)
        tells = content == "body" and notice.body
        yield Field("last-message-body", value=notice.body[:MAX_PUSHED_BODY] if tells else UNTOLD)

    def _published(self, owner: JID, key: str, notice: Notice, answer: Stanza | None) -> None:
        """§7.1: an error means that the registration is void, unless it is about the way there."""
        notice.is_under_way = False
        if self._notices.get((owner, key)) is not notice or owner not in self.server.accounts:
            return  # disabled, or the client was there, meanwhile
        if answer is not None and answer.get("type") == "result":
            notice.failures = 0
        else:
            notice.failures += 1
            if (answer is not None and self._is_final(answer)) or notice.failures >= MAX_PUSH_FAILURES:
                log.info("%s: push to %s is disabled: it failed", owner, key)
                return self._forget(owner, key)
        if notice.is_new:
            self._publish(owner, key, notice)

    @staticmethod
    def _is_final(answer: Stanza) -> bool:
        error = answer.find(CLIENT("error"))
        if error is None or error.get("type") == "wait":
            return False
        return not any(local_name(child.tag).startswith("remote-server-") for child in error)


# -- logging in fast (XEP-0388, XEP-0386, XEP-0484)
#
# By RFC 6120 a login is a conversation of six round trips and three streams: a phone in a
# train pays for each of them. Here it is one round trip, once TLS is up:
#
#     C: <authenticate xmlns='urn:xmpp:sasl:2' mechanism='HT-SHA-256-ENDP'>
#          <initial-response>…</initial-response>
#          <user-agent id='d4565fa7-4d72-4749-b3d3-740edbf87770'/>
#          <fast xmlns='urn:xmpp:fast:0'/>
#          <bind xmlns='urn:xmpp:bind:0'><tag>Dino</tag><enable xmlns='urn:xmpp:carbons:2'/></bind></authenticate>
#     S: <success xmlns='urn:xmpp:sasl:2'><additional-data>…</additional-data>
#          <authorization-identifier>romeo@example.org/Dino/4WcYxqbN</authorization-identifier>
#          <bound xmlns='urn:xmpp:bind:0'/></success>
#        <stream:features>…</stream:features>                 the same stream goes on
#
# The mechanisms are those of chapter 10; one more checks tokens. A token is given to one
# client of one account, for one mechanism. It is as good as the password to whoever steals
# it, so it dies after three weeks, with the password, and when its client says so. On disk
# there is only a random number, of which the server's own secret makes the token.
#
# Left out: SASL2's tasks (second factors, XEP-0480), and TLS early data, which Python can't
# accept; `count`, which protects that against replay, is obeyed all the same. White space
# during the exchange, which XEP-0388 §2.4 forbids, is ignored: the parser drops it.

FAST_MECHANISMS = {  # with the channel binding that each needs, strongest first
    "HT-SHA-256-EXPR": "tls-exporter",
    "HT-SHA-256-UNIQ": "tls-unique",
    "HT-SHA-256-ENDP": "tls-server-end-point",
    "HT-SHA-256-NONE": "",
}
TOKEN_LIFETIME = 21 * 86400  # seconds without a login until the password is asked for again; as Prosody
TOKEN_ROTATION = 86400  # seconds after which a login with a token brings a new one; as Prosody
UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


class HashedToken(Mechanism):
    """HT-SHA-256-…: name, NUL, HMAC(token, "Initiator" and channel binding); from draft-schmaus-kitten-sasl-ht-09.

    `tokens` gives those that are good for an account; `use` is told which of them it was, and may still refuse it.
    """

    def __init__(self, name: str, context: LoginContext, tokens: Callable[[JID], Sequence[str]],
                 use: Callable[[JID, int], None]) -> None:  # fmt: skip
        super().__init__(name, context)
        self.tokens = tokens
        self.use = use

    def begin(self, data: bytes) -> Step:
        """§3.1 to §3.3: the only message; the answer proves that the server knows the token too."""
        name, _, proof = data.partition(b"\0")
        self.identify(decode_message(name), "")
        tokens = [token.encode() for token in self.tokens(self.account)]
        binding = self.context.bindings.get(FAST_MECHANISMS[self.name], b"")
        fits = [hmac.compare_digest(hmac.digest(token, b"Initiator" + binding, "sha256"), proof) for token in tokens]
        if True not in fits:
            raise SASLError("not-authorized")
        number = fits.index(True)
        success = self.succeed(hmac.digest(tokens[number], b"Responder" + binding, "sha256"))
        self.use(self.account, number)
        return success


class FastLogin(Feature):
    """Fast Authentication Streamlining Tokens (XEP-0484): who has once given the password gets a token for next time.

        C: <authenticate …> … <request-token xmlns='urn:xmpp:fast:0' mechanism='HT-SHA-256-ENDP'/></authenticate>
        S: <success …> … <token xmlns='urn:xmpp:fast:0' token='…' expiry='2026-12-13T14:00:00Z'/></success>

    Documents: "fast", by account, keyed by a hash of the client's id: `{"new": slot, "current": slot}`, both
    optional (§5.1), where a slot is `{"seed": …, "mechanism": …, "issued": seconds, "count": number}`.
    """

    namespace = FAST

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.clients = server.storage.documents("fast", dict)

    def mechanisms(self, context: LoginContext) -> list[str]:
        """Return what a token may be used with on this connection."""
        return [name for name, binding in FAST_MECHANISMS.items() if not binding or binding in context.bindings]

    def advertisement(self, context: LoginContext) -> Element:
        """§3.1: an inline feature of SASL2; the mechanisms are not among its own."""
        return E(FAST("fast"), None, *(E(FAST("mechanism"), None, name) for name in self.mechanisms(context)))

    def start(self, name: str, context: LoginContext, client: str, request: Element) -> HashedToken:
        """§3.4: begin to check a token; raises SASLError."""
        if name not in self.mechanisms(context):
            raise SASLError("invalid-mechanism")
        if not client:
            raise SASLError("malformed-request", "a token belongs to the client with a user-agent's id")  # §4.1
        return HashedToken(name, context, lambda owner: self._good_for(name, owner, client),
                           lambda owner, number: self._use(owner, client, number, request.get("count")))  # fmt: skip

    def _good_for(self, mechanism: str, owner: JID, client: str) -> list[str]:
        """§5.1: the newest token first; always two, so that nobody learns from the time whether there is one."""
        slots = self._slots(owner, client)
        found = [slots.get(name, {}) for name in ("new", "current")]
        return [self._text(owner, slot["seed"]) if slot.get("mechanism") == mechanism else secrets.token_urlsafe(32)
                for slot in found]  # fmt: skip

    def _slots(self, owner: JID, client: str) -> Mapping[str, Any]:
        return self.clients.item(owner, client) or {}

    def _text(self, owner: JID, seed: str) -> str:
        token = hmac.digest(self.server.secret, f"fast\0{owner}\0{seed}".encode(), "sha256")
        return base64.urlsafe_b64encode(token).decode("ascii").rstrip("=")

    def _use(self, owner: JID, client: str, number: int, count: str | None) -> None:
        """§3.4, §5.1: a token that has expired, or whose count doesn't grow, fails; a new one replaces the current."""
        slot = self._slots(owner, client)[("new", "current")[number]]
        if slot["issued"] + TOKEN_LIFETIME < time.time():
            raise SASLError("credentials-expired")  # §4.2
        if count is not None or slot["count"]:  # who has begun to count must go on
            if not re.fullmatch("[0-9]{1,9}", count or "") or int(count or 0) <= slot["count"]:
                raise SASLError("not-authorized", "this has been said before")
            slot = {**slot, "count": int(count or 0)}
        after = {"current": slot} if number == 0 else {**self._slots(owner, client), "current": slot}
        if after != self._slots(owner, client):
            self.clients.put(owner, client, after)

    def settle(self, owner: JID, client: str, context: LoginContext, request: Element) -> Element | None:
        """§3.3, §3.5, §3.6: after a login, forget the token that was used, or give out a new one."""
        used, wish = request.find(FAST("fast")), request.find(FAST("request-token"))
        if used is not None and used.get("invalidate") in ("1", "true"):
            self.clients.put(owner, client, None)
            used = None
        mechanism = wish.get("mechanism", "") if wish is not None else ""
        if wish is None and used is not None:
            current = self._slots(owner, client)["current"]
            mechanism = current["mechanism"] if current["issued"] + TOKEN_ROTATION < time.time() else ""
        if not client or mechanism not in self.mechanisms(context):
            return None
        return self._issue(owner, client, mechanism)

    def _issue(self, owner: JID, client: str, mechanism: str) -> Element:
        self._make_room(owner, client)
        now = int(time.time())
        seed = secrets.token_urlsafe(18)
        slot = {"seed": seed, "mechanism": mechanism, "issued": now, "count": 0}
        self.clients.put(owner, client, {**self._slots(owner, client), "new": slot})
        return E(FAST("token"), token=self._text(owner, seed), expiry=stamp(now + TOKEN_LIFETIME))

    def _make_room(self, owner: JID, client: str) -> None:
        """Who has got no token for the longest time goes, whether it is still good or not."""
        others = {name: max(slot["issued"] for slot in slots.values())
                  for name, slots in self.clients.items(owner).items() if name != client}  # fmt: skip
        too_many = max(0, len(others) + 1 - self.server.config.limits.tokens)
        for name in sorted(others, key=others.__getitem__)[:too_many]:
            self.clients.put(owner, name, None)

    def revoke(self, owner: JID, client: str = "") -> None:
        """Let no token of the account be good any more, or none of one client (threat S33)."""
        for name in [client] if client else list(self.clients.items(owner)):
            self.clients.put(owner, name, None)

    def credentials_changed(self, owner: JID) -> None:
        """Who has stolen a device must not outlive the change of the password (threat S33)."""
        self.revoke(owner)


class Bind2(Feature):
    """Bind 2 (XEP-0386): the login also binds a resource, and switches on what the session needs.

        C: <authenticate …> … <bind xmlns='urn:xmpp:bind:0'><tag>Dino</tag>
             <enable xmlns='urn:xmpp:carbons:2'/></bind></authenticate>
        S: <success …><authorization-identifier>romeo@example.org/Dino/4WcYxqbN</authorization-identifier>
             <bound xmlns='urn:xmpp:bind:0'/></success>
    """

    namespace = BIND2

    def advertisement(self) -> Element:
        """§3.1: an inline feature of SASL2, with inline features of its own."""
        names = dict.fromkeys(namespace_of(tag) for tag in self.server.registry.inlines)
        return E(BIND2("bind"), None, E(BIND2("inline"), None, *(E(BIND2("feature"), var=name) for name in names)))

    def bind(self, stream: ClientStream, owner: JID, client: str, request: Element) -> Element | None:
        """§3.2. Return `<bound/>`; None if there is no room: the client may still hear why from RFC 6120's binding."""
        try:
            session = self.server.bind(stream, self._address(owner, child_text(request, BIND2("tag")), client))
        except StanzaError:
            return None
        session.client_id = client
        for other in self.server.sessions(owner):
            if client and other is not session and other.client_id == client:
                self.server.end(other, StreamError("conflict", "the same client has logged in anew"))
        answers = [handler(session, child) for child in request
                   if (handler := self.server.registry.inlines.get(child.tag))]  # fmt: skip
        return E(BIND2("bound"), None, *answers)

    def _address(self, owner: JID, tag: str, client: str) -> JID:
        """§3.2.1: the same for the same client each time, so that contacts see one device; its id stays secret."""
        known = hmac.digest(self.server.secret, f"bind\0{owner}\0{tag}\0{client}".encode(), "sha256")
        own = base64.urlsafe_b64encode(known[:9]).decode("ascii") if client else secrets.token_urlsafe(9)
        try:
            return owner.with_resource(f"{tag}/{own}" if tag else own)
        except StanzaError:  # a tag that no resource can have
            return owner.with_resource(own)


class Authentication(SaslProfile):
    """One `<authenticate/>` (XEP-0388 §2.3): how its exchange is written, and what the client wants done behind it."""

    def __init__(self, feature: ExtensibleSasl, request: Element, context: LoginContext) -> None:
        self.feature = feature
        self.request = request
        self.context = context
        agent = request.find(SASL2("user-agent"))
        id = "" if agent is None else agent.get("id", "")
        self.client = hashlib.sha256(id.lower().encode()).hexdigest()[:32] if UUID.fullmatch(id) else ""

    def admits(self, tag: str) -> bool:
        """§2.4: nothing else."""
        return tag in (SASL2("response"), SASL2("abort"))

    def challenge(self, stream: ClientStream, data: bytes) -> None:
        """§2.5."""
        stream.send_element(E(SASL2("challenge"), None, base64.b64encode(data).decode("ascii")))

    def fail(self, stream: ClientStream, error: SASLError) -> None:
        """§2.6.2: the conditions are RFC 6120's."""
        text = E(SASL2("text"), {XML_LANG: "en"}, error.text) if error.text else None
        stream.send_element(E(SASL2("failure"), None, E(SASL(error.condition)), text))

    def succeed(self, stream: ClientStream, step: Success) -> None:
        """§2.6.1: do what was asked for, say so in one element, go on with the features of the same stream."""
        owner = step.username
        if stream.claimed is not None and stream.claimed.bare != owner:
            return self.fail(stream, SASLError("invalid-authzid", "the stream header names somebody else"))  # §2.3
        stream.authenticated(owner)
        features = list(stream.features())
        done = list(self.feature.process(stream, owner, self))
        resumed = any(answer.tag == SM("resumed") for answer in done)
        if stream.session is not None:
            useless = BEFORE_BINDING if stream.session.management is None else (*BEFORE_BINDING, SM("sm"))
            features = [feature for feature in features if feature.tag not in useless]
        data = None if step.data is None else base64.b64encode(step.data).decode("ascii")
        stream.send_element(E(
            SASL2("success"), None,
            E(SASL2("additional-data"), None, data) if data is not None else None,
            E(SASL2("authorization-identifier"), None, stream.session.full if stream.session else str(owner)),
            *done))  # fmt: skip
        if resumed:
            return self.feature.server.registry.feature(StreamManagement).resumed(stream)  # XEP-0198 §9.2: no features
        stream.send_features(features)


BEFORE_BINDING = (BIND("bind"), SESSION("session"), COMPRESS_FEATURE("compression"))  # features with no use later


class ExtensibleSasl(Feature):
    """Extensible SASL Profile (XEP-0388): a login that says at once what is to come after it, without a new stream.

        S: <authentication xmlns='urn:xmpp:sasl:2'><mechanism>SCRAM-SHA-256</mechanism>
             <inline><bind xmlns='urn:xmpp:bind:0'/><fast xmlns='urn:xmpp:fast:0'>…</fast></inline></authentication>
        C: <authenticate xmlns='urn:xmpp:sasl:2' mechanism='SCRAM-SHA-256'><initial-response>…</initial-response>
             <user-agent id='d4565fa7-4d72-4749-b3d3-740edbf87770'><device>Phone</device></user-agent></authenticate>

    Of the user agent only its id is looked at, and its hash kept.
    """

    namespace = SASL2

    def offer(self, stream: ClientStream) -> Element | None:
        """§2.1; §3: only inside TLS."""
        if stream.state is not StreamState.OPEN or not stream.transport.secure:
            return None
        context, find = self._context(stream), self.server.registry.feature
        inline = E(SASL2("inline"), None, E(SM("sm")), find(Bind2).advertisement(),
                   find(FastLogin).advertisement(context))  # fmt: skip
        mechanisms = (E(SASL2("mechanism"), None, name) for name in context.offered)
        return E(SASL2("authentication"), None, *mechanisms, inline)

    def _context(self, stream: ClientStream) -> LoginContext:
        context = stream.login_context()
        context.offered[:] = [name for name in context.offered if name != "DIGEST-MD5"]  # its clients are older
        return context

    @element(SASL2("authenticate"), state="open")
    def authenticate(self, stream: ClientStream, request: Element) -> None:
        """§2.3: begin an exchange; in base64, nothing is written as nothing."""
        if stream.claimed is not None and stream.claimed.domain != stream.host:
            raise StreamError("invalid-from")  # §2.1
        initial = request.find(SASL2("initial-response"))
        profile = Authentication(self, request, self._context(stream))
        stream.begin_exchange(profile, None if initial is None else initial.text or "=", lambda: self._start(profile))

    def _start(self, profile: Authentication) -> Mechanism:
        if not profile.context.secure:
            raise SASLError("encryption-required")  # §3
        name, fast = profile.request.get("mechanism", ""), profile.request.find(FAST("fast"))
        if fast is not None:
            return self.server.registry.feature(FastLogin).start(name, profile.context, profile.client, fast)
        return start_mechanism(name, profile.context)

    @element(SASL2("response"), state="open")
    def respond(self, stream: ClientStream, response: Element) -> None:
        """§2.5: the next step of the exchange."""
        self._check(stream)
        stream.respond(response)

    @element(SASL2("abort"), state="open")
    def abort(self, stream: ClientStream, request: Element) -> None:
        """§4.5: the client gives up; it may begin another exchange."""
        self._check(stream)
        stream.abort(request)

    @staticmethod
    def _check(stream: ClientStream) -> None:
        if not isinstance(stream.profile, Authentication):
            raise StreamError("not-authorized", "no exchange is under way")

    def process(self, stream: ClientStream, owner: JID, profile: Authentication) -> Iterator[Element]:
        """§2.6.1: yield what becomes of the inline features that the client has asked for."""
        find, request = self.server.registry.feature, profile.request
        before, wish, bound = request.find(SM("resume")), request.find(BIND2("bind")), None
        if before is not None:
            yield find(StreamManagement).resume(stream, before)
        if wish is not None and stream.session is None:  # XEP-0198 §9.2: a resumed session has its resource
            bound = find(Bind2).bind(stream, owner, profile.client, wish)
        token = find(FastLogin).settle(owner, profile.client, profile.context, request)
        yield from (answer for answer in (bound, token) if answer is not None)


# ==== 23. Federation and components (RFC 6120 §10.4; XEP-0220, XEP-0178, XEP-0288, XEP-0114) ====
#
# A server is one of many. A stanza for a domain that is not ours waits in a queue while a
# stream to that domain's server is found (SRV), opened, secured (TLS) and vouched for: by
# a certificate or by dialback, which asks the server that DNS names. The other way round,
# nothing that comes in is believed before its domain is proven. A component is a program
# of this network's own that speaks for one domain and shows a shared secret.


# -- where the server of a domain is (RFC 6120 §3.2)
#
# DNS answers with SRV records (RFC 2782): name and port of each server, by priority, those of
# one priority in a random order that their weights decide. `_xmpps-server` stands beside
# `_xmpp-server` for servers that speak TLS from the first byte (XEP-0368 §3); the records
# of both are one set. Without such records the domain itself is the server, on the port of
# the standard. A record whose target is "." says: decidedly no such service.

SERVICE_PORTS = {"xmpp-server": 5269, "xmpp-client": 5222}  # RFC 6120 §14.7
MAX_TARGETS = 8  # of a domain, whose addresses are looked up; large services have four
MAX_LOOKUPS = 1000  # domains that are remembered, some 1 KB each
LOOKUP_TIMEOUT = 15.0  # seconds for all questions about one domain
LOOKUP_LIFE = (60.0, 3600.0)  # seconds an answer is believed at least (strangers ask) and at most (servers move)
FAILED_LOOKUP_LIFE = 10.0  # seconds; name servers that don't answer are mended by others


class ServiceRecord(NamedTuple):
    """One server of a domain by an SRV record (RFC 2782); which name it stands under tells `direct_tls` (XEP-0368)."""

    priority: int
    weight: int
    host: str
    port: int
    direct_tls: bool = False


class Target(NamedTuple):
    """A server to try, by each of its addresses in turn."""

    host: str
    port: int
    direct_tls: bool
    addresses: tuple[str, ...]


def srv_order(records: Iterable[ServiceRecord], draw: Callable[[int], int] = secrets.randbelow) -> list[ServiceRecord]:
    """Return the records in the order in which they are to be tried (RFC 2782, "Weight"); `draw(n)` is one of 0 … n-1.

    By priority; among equals, each next one is drawn with a chance in proportion to its
    weight, where those of weight 0 stand in front and have a very small one.
    """
    left = sorted(records, key=lambda record: (record.priority, record.weight > 0))
    ordered = []
    while left:
        peers = [record for record in left if record.priority == left[0].priority]
        mark = draw(sum(record.weight for record in peers) + 1)
        for chosen in peers:
            mark -= chosen.weight
            if mark <= 0:
                break
        left.remove(chosen)
        ordered.append(chosen)
    return ordered


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What is known of where the servers of a domain are."""

    records: tuple[ServiceRecord, ...]
    addresses: Mapping[str, tuple[str, ...]]  # by host
    is_guess: bool  # there are no SRV records, so this is the domain itself
    seconds: float  # how long it may be believed
    problems: tuple[str, ...]  # questions that nobody answered

    def targets(self) -> list[Target]:
        """Return what to try, in an order drawn anew each time."""
        return [Target(record.host, record.port, record.direct_tls, found)
                for record in srv_order(self.records) if (found := self.addresses.get(record.host))]  # fmt: skip


class Lookup:
    """All questions about one domain. They block for as long as DNS takes, so they belong into a thread that waits."""

    def __init__(self, domain: str, service: str = "xmpp-server", *, nameservers: Sequence[Address] = (),
                 route: tuple[str, int] | None = None) -> None:  # fmt: skip
        self.domain = ascii_domain(domain)
        self.service = service
        self.nameservers = nameservers
        self.route = route
        self.problems: list[str] = []
        self._life = LOOKUP_LIFE[1]
        self._until = 0.0

    def find(self) -> Whereabouts:
        """Return what DNS says."""
        self._until = time.monotonic() + LOOKUP_TIMEOUT
        records = self._services()
        is_guess = records is None
        if records is None:
            records = [ServiceRecord(0, 0, self.domain, SERVICE_PORTS[self.service])]  # RFC 6120 §3.2.2
        records = sorted(records)[:MAX_TARGETS]
        addresses = {host: self._addresses(host) for host in {record.host for record in records}}
        is_whole = not is_guess and all(addresses.values())
        life = FAILED_LOOKUP_LIFE if self.problems else max(LOOKUP_LIFE[0], self._life if is_whole else 0)
        return Whereabouts(tuple(records), addresses, is_guess, life, tuple(self.problems))

    def _services(self) -> list[ServiceRecord] | None:
        """Return the servers that somebody has written down; None: nobody has."""
        if self.route is not None:  # §3.2.3: instead of all questions
            host, port = self.route
            return [ServiceRecord(0, 0, ascii_domain(host), port)]
        if ip_octets(self.domain) or not has_dnspython():
            return None
        found = []
        for service, direct_tls in ((self.service, False), (self.service.replace("xmpp", "xmpps", 1), True)):
            for record in self._ask(f"_{service}._tcp.{self.domain}", "SRV"):
                host = record.target.to_text(omit_final_dot=True).lower()
                found.append(ServiceRecord(record.priority, record.weight, host, record.port, direct_tls))
        return [record for record in found if record.host != "."] if found else None

    def _addresses(self, host: str) -> tuple[str, ...]:
        """Return the addresses of a host; the system knows some that DNS doesn't, but not our name servers."""
        if octets := ip_octets(host):
            return (socket.inet_ntop(socket.AF_INET if len(octets) == 4 else socket.AF_INET6, octets),)
        if self.nameservers and has_dnspython():
            return tuple(record.address for kind in ("AAAA", "A") for record in self._ask(host, kind))
        try:  # bytes, for Python would prepare a str in its own way
            found = socket.getaddrinfo(host.encode("ascii"), None, type=socket.SOCK_STREAM)
        except OSError as error:
            log.debug("%s: %s", host, error)
            return ()
        return tuple(dict.fromkeys(str(address[0]) for *_kind, address in found))

    def _ask(self, name: str, kind: str) -> list[Any]:
        """Return the records of this kind; none also if nobody answers."""
        import dns.exception
        import dns.resolver

        try:
            resolver = dns.resolver.Resolver(configure=not self.nameservers)
            if self.nameservers:
                resolver.nameservers = [server.host for server in self.nameservers]
                resolver.nameserver_ports = {server.host: server.port for server in self.nameservers}
            patience = max(0.1, self._until - time.monotonic())
            answer = resolver.resolve(f"{name}.", kind, lifetime=patience, search=False)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return []
        except dns.exception.DNSException as error:
            self.problems.append(f"{kind} {name}: {error}")
            return []
        self._life = min(self._life, answer.rrset.ttl if answer.rrset else 0)
        return list(answer)


def has_dnspython() -> bool:
    """Whether the optional package is installed; without it there are no SRV records, only addresses."""
    import importlib.util

    return importlib.util.find_spec("dns") is not None


class Resolver:
    """Finds the servers of other domains, and remembers for as long as DNS allows."""

    def __init__(self, config: Config, loop: Loop) -> None:
        self.config = config
        self.loop = loop
        self._known: OrderedDict[str, tuple[float, Whereabouts]] = OrderedDict()  # until when, in the loop's seconds
        self._asking: dict[str, list[Callable[[list[Target]], None]]] = {}  # who waits for an answer, by domain
        self._has_complained = False

    def look_up(self, domain: str, then: Callable[[list[Target]], None]) -> None:
        """Call `then(targets)` in a later turn, with the servers to try in this order; none: there is no such service.

        All of `targets` may be tried, each by all its addresses (RFC 6120 §3.2.1); beyond
        them nothing is left to try.
        """
        known = self._known.get(domain)
        if known is not None and known[0] > self.loop.now():
            return self.loop.post(lambda: then(known[1].targets()))
        if domain in self._asking:
            return self._asking[domain].append(then)
        self._asking[domain] = [then]
        self._complain()
        lookup = Lookup(domain, nameservers=self.config.federation_nameservers,
                        route=self.config.federation_routes.get(domain))  # fmt: skip
        self.loop.wait_apart(lookup.find, then=functools.partial(self._found, domain),
                             failed=functools.partial(self._failed, domain))  # fmt: skip

    def _failed(self, domain: str, error: BaseException) -> None:
        log.error("%s: unexpected error in a look-up", domain, exc_info=error)
        self._found(domain, Whereabouts((), {}, False, FAILED_LOOKUP_LIFE, ()))

    def _found(self, domain: str, found: Whereabouts) -> None:
        for problem in found.problems:
            log.info("%s: %s", domain, problem)
        self._known[domain] = (self.loop.now() + found.seconds, found)
        self._known.move_to_end(domain)
        if len(self._known) > MAX_LOOKUPS:
            self._known.popitem(last=False)
        for then in self._asking.pop(domain):
            self.loop.post(functools.partial(then, found.targets()))

    def _complain(self) -> None:
        if not self._has_complained and not has_dnspython():
            self._has_complained = True
            log.warning("other servers are looked for only at their domain's own address, port 5269, since the Python "
                        "package dnspython is missing; get it with: python3 -m pip install dnspython")  # fmt: skip


# -- components (XEP-0114)
#
#     romeo ──> Server.route ──> ComponentDomain ──> ComponentStream ──> gateway
#                                  while it is away, stanzas wait here for half a minute
#
# A component is believed for all addresses of its domain, and for nothing else. Towards
# accounts here it is a stranger like any other server: it sees what they let it see.


class ComponentDomain:
    """The domain of a component, with all its addresses (a `Domain`, chapter 14)."""

    def __init__(self, server: Server, name: str) -> None:
        self.server = server
        self.name = name
        self.stream: ComponentStream | None = None
        self._waiting: deque[Stanza] = deque()
        self._size = 0  # bytes of these
        self._timer: Timer | None = None  # set while there is hope
        self._hope()

    def receive(self, stanza: Stanza, to: JID) -> None:
        """Pass a stanza on, or have it wait; raises StanzaError("remote-server-timeout")."""
        if self.stream is not None:
            return self.stream.send(stanza)
        limits = self.server.config.limits
        size = len(stanza.wire())
        if self._timer is None or len(self._waiting) >= limits.component_queue or self._size + size > limits.unread:
            raise StanzaError("remote-server-timeout", "the service is away")
        self._waiting.append(stanza)
        self._size += size

    def connect(self, stream: ComponentStream) -> None:
        """The component is there: it gets what waits."""
        self.stream = stream
        for stanza in self._stop_waiting():
            stream.send(stanza)

    def disconnect(self) -> None:
        """The component is gone, perhaps for a moment only."""
        self.stream = None
        self._hope()

    def remove(self) -> None:
        """The component is not wanted any more."""
        if self.stream is not None:
            self.stream.fail(StreamError("host-gone"))  # RFC 6120 §4.9.3.5
        self._give_up()

    def _hope(self) -> None:
        self._timer = self.server.loop.call_later(self.server.config.limits.component_patience, self._give_up)

    def _give_up(self) -> None:
        for stanza in self._stop_waiting():
            self.server.refuse(stanza, StanzaError("remote-server-timeout", "the service is away"))

    def _stop_waiting(self) -> Iterable[Stanza]:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        waiting, self._waiting, self._size = self._waiting, deque(), 0
        return waiting


class ComponentStream(Stream):
    """The stream of a component (XEP-0114 §3): a header, a proof that it knows the secret, then stanzas."""

    content_namespace = COMPONENT

    def __init__(self, server: Server, transport: Transport, domains: Mapping[str, ComponentDomain]) -> None:
        super().__init__(server, transport)
        self._domains = domains

    def __str__(self) -> str:
        return f"component {self.name} at {self.transport.peer}"

    @property
    def name(self) -> str:
        """The domain that it speaks for, or wants to."""
        return "somebody" if self.state is StreamState.OPENING else self.host

    @property
    def is_stranger(self) -> bool:
        """Whether it has yet to show that it knows the secret."""
        return self.state is not StreamState.AUTHENTICATED

    def _check_addresses(self, header: Opened) -> None:
        """§3: `to` is the component's own domain, not the server's."""
        try:
            name = JID.parse(header.attributes.get("to", "")).domain
        except StanzaError:
            raise StreamError("improper-addressing") from None
        if name not in self._domains:
            raise StreamError("host-unknown")
        self.host = name
        self._check_conflict()

    def _check_conflict(self) -> None:
        if self._domains[self.host].stream is not None:
            raise StreamError("conflict", "this component is connected already")

    def opened(self, header: Opened) -> None:
        """§3, example 2: a header without version, and no features."""
        self.version = ""
        self.send_header()
        self.state = StreamState.OPEN

    def tls_established(self) -> None:
        """There is no TLS here: a component is on this machine, or the owner has said that the way is safe."""

    def element(self, element: Element) -> None:
        """The handshake first, then stanzas."""
        if element.tag == STREAMS("error"):
            log.info("%s: ended with %s", self, ", ".join(local_name(child.tag) for child in element))
            self.close()
        elif self.state is StreamState.OPEN:
            self._shake_hands(element)
        elif isinstance(element, Stanza):
            self._receive(element)
        else:
            raise StreamError("unsupported-stanza-type")

    def _shake_hands(self, element: Element) -> None:
        """§3: SHA-1 of stream id and secret, in hexadecimal."""
        secret = self.server.config.components.get(self.host)
        if secret is None:
            raise StreamError("host-gone")  # a reload was faster
        expected = hashlib.sha1((self.id + secret).encode()).hexdigest()
        given = (element.text or "").strip()
        if element.tag != CLIENT("handshake") or not hmac.compare_digest(given.encode(), expected.encode()):
            log.warning("%s: refused, it does not know the secret", self)
            raise StreamError("not-authorized")
        self._check_conflict()  # somebody may have been faster
        self.state = StreamState.AUTHENTICATED
        self._deadline.cancel()
        limits = self.server.config.limits
        self.parser.max_stanza, self.parser.max_elements = limits.stanza, limits.elements
        self.send_element(E(CLIENT("handshake")))
        log.info("%s: connected", self)
        self._domains[self.host].connect(self)
        self._keep_alive()

    def _keep_alive(self) -> None:
        """RFC 6120 §4.6.1: white space now and then, by which TCP notices a component that is cut off."""
        self._deadline = self.server.loop.call_later(self.server.config.limits.silence_timeout, self._keep_alive)
        self.transport.write(b" ")

    def _receive(self, stanza: Stanza) -> None:
        """§3: `from` and `to` are required, and the domain of the former is the component's."""
        sender = stanza.get("from", "")
        try:
            jid = JID.parse(sender)
        except StanzaError:
            raise StreamError("improper-addressing") from None
        if "to" not in stanza.attrib:
            raise StreamError("improper-addressing")
        if jid.domain != self.host:
            raise StreamError("invalid-from")
        if str(jid) != sender:
            stanza.set("from", str(jid))  # as everything here compares addresses
        if self.lang and XML_LANG not in stanza.attrib:
            stanza.set(XML_LANG, self.lang)
        self.server.receive_foreign(stanza)

    def ended(self) -> None:
        """Stanzas for the component wait from now on."""
        super().ended()
        domain = self._domains.get(self.host)
        if domain is not None and domain.stream is self:
            log.info("%s: disconnected", self)
            domain.disconnect()


class Components(Feature):
    """Jabber Component Protocol (XEP-0114): programs that speak for a domain of their own, such as gateways.

        C: <stream:stream xmlns='jabber:component:accept' to='gateway.example.org' …>
        S: <stream:stream xmlns='jabber:component:accept' from='gateway.example.org' id='3BF96D32' …>
        C: <handshake>aaee83c26aeeafcbabeabfcbcd50df997e0a2a1e</handshake>
        S: <handshake/>
    """

    namespace = COMPONENT

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.domains: dict[str, ComponentDomain] = {}
        self.reloaded()

    def reloaded(self) -> None:
        """Serve the components that the configuration names now."""
        wanted = self.server.config.components
        for name in [name for name in self.domains if name not in wanted]:
            self.domains[name].remove()
            del self.domains[name], self.server.domains[name]
        for name in wanted:
            if name not in self.domains:
                self.server.domains[name] = self.domains[name] = ComponentDomain(self.server, name)
        self.server.protocols.pop("component", None)
        if wanted:
            self.server.protocols["component"] = self.accept

    def accept(self, transport: Transport) -> ComponentStream:
        """Return the stream for a new connection."""
        return ComponentStream(self.server, transport, self.domains)

    def disco_items(self, request: Iq, items: Element) -> None:
        """XEP-0030 §4.1: those that are connected are services of the host above them, or of all hosts."""
        for name, domain in self.domains.items():
            host = name.partition(".")[2]
            if not request.owner.local and domain.stream is not None and (
                    host == request.owner.domain or host not in self.server.config.hosts):  # fmt: skip
                items.append(E(DISCO_ITEMS("item"), jid=name))

    def shutting_down(self) -> None:
        """RFC 6120 §4.9.3.20."""
        for domain in self.domains.values():
            if domain.stream is not None:
                domain.stream.fail(StreamError("system-shutdown"))


# ==== 24. The web (RFC 7395, XEP-0124, XEP-0206, XEP-0156, XEP-0363) ====
#
# Browsers speak HTTP, so one port serves it: WebSocket and BOSH carry the same streams as
# TCP does, files are uploaded and fetched, host-meta tells where all of this is, and an
# invitation has a page of its own. HTTP itself is h11's work, WebSocket framing wsproto's;
# both are optional packages, and without them this chapter stays closed and says so: one
# line in the log, and a server that speaks everything else.
#
#     Connection ─> HttpConnection ─> Exchange ─> HttpServer.handle ─> the feature's @route
#               └─> WebSocket (after 101) ─> WebSocketStream, a ClientStream
#
# A path is decoded once and looked up in a table; what isn't in it is not there (threat
# S77). No file is ever found by a name that came from outside. Which web pages of others may
# use a route is said with it (`origins`): there are no cookies here, so nobody's rights can
# be borrowed, and still only the owner's own pages may log people in (threat S79).

MAX_HEAD = 16 * 1024  # bytes of a request line with its headers; Apache takes 8 KB for each line
MAX_AHEAD = 64 * 1024  # bytes of further requests that may wait while one is answered (pipelining)
REQUEST_TIMEOUT = 30.0  # seconds for a request to come in, or for the next piece of its body; nginx waits 60
KEEP_ALIVE_TIMEOUT = 75.0  # seconds between two requests on one connection; as nginx
MAX_MESSAGE_FRAMES = 1000  # fragments of one WebSocket message: each costs as much as a short message
XML_DECLARATION = re.compile(rb"<\?xml[ \t\r\n]([^<>?]*)\?>")
ENCODING = re.compile(rb"encoding[ \t\r\n]*=[ \t\r\n]*[\"'](?!(?i:utf-8)[\"'])")
WRITTEN_NAME = re.compile(rb"<[a-z]+")  # how `Stanza.wire` begins
ORIGIN = re.compile(r"https?://([^/@\\?#]+?)(:[0-9]{1,5})?")  # RFC 6454 §6.1
STATUS_TEXTS = {
    400: "This is no request that HTTP knows.", 403: "Not from there.", 404: "There is nothing here.",
    405: "Not like this.", 408: "Too slow.", 411: "How long is it?", 413: "Too large.", 426: "WebSocket only.",
    431: "Too many headers.", 500: "An error of this server's; its owner's log has it.",
}  # fmt: skip
PAGE_POLICY = "default-src 'none'; style-src 'self'; img-src 'self' data:; form-action 'self'; frame-ancestors 'none'"


class HttpError(Exception):
    """A request is refused; raised anywhere in a handler, answered in one place."""

    def __init__(self, status: int, text: str = "", **headers: str) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text or STATUS_TEXTS[status]
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Sink(Protocol):
    """What takes the body of a request."""

    def take(self, data: bytes) -> None:
        """Take the next piece; may `stop` the exchange until it can take more."""

    def finish(self) -> None:
        """That was all."""

    def lost(self) -> None:
        """The rest will never come."""


class Collector:
    """A body that is kept in memory, for those who expect a short one."""

    def __init__(self, most: int, then: Callable[[bytes], None]) -> None:
        self._most = most
        self._then = then
        self._data = bytearray()

    def take(self, data: bytes) -> None:
        """See `Sink`; raises HttpError."""
        self._data += data
        if len(self._data) > self._most:
            raise HttpError(413)

    def finish(self) -> None:
        """See `Sink`."""
        self._then(bytes(self._data))

    def lost(self) -> None:
        """See `Sink`."""


class Exchange:
    """One HTTP request on its way to its answer.

    `path` is decoded, `headers` have names in lower case. A handler answers by `answer`, at once
    or later, or raises HttpError; for the request's body it asks by `collect` or `stream`.
    """

    def __init__(self, carrier: HttpConnection, method: str, path: str, headers: Mapping[str, str]) -> None:
        self.carrier = carrier
        self.method = method
        self.path = path
        self.headers = headers
        self.always: dict[str, str] = {}  # headers of whatever the answer will be
        self.sink: Sink | None = None
        self.answered = False

    @property
    def has_body(self) -> bool:
        """Whether a body comes with the request."""
        return self.headers.get("content-length", "0") != "0" or "transfer-encoding" in self.headers

    @property
    def host(self) -> str:
        """The host that the client means, without its port; "" for none. Nothing to rely on."""
        return self.headers.get("host", "").rpartition("@")[2].partition(":")[0].lower()

    def collect(self, most: int, then: Callable[[bytes], None]) -> None:
        """Call `then` with the body, once it is all here; one of more than `most` bytes is refused."""
        if self.headers.get("content-length", "0").isdigit() and int(self.headers.get("content-length", "0")) > most:
            raise HttpError(413)
        self.stream(Collector(most, then))

    def stream(self, sink: Sink) -> None:
        """Give the body to `sink` as it comes in."""
        self.sink = sink
        if self.has_body:
            self.carrier.ask_for_body()
        else:
            sink.finish()

    def answer(self, status: int, body: bytes = b"", kind: str = "text/plain; charset=utf-8", **headers: str) -> bool:
        """Answer, in one piece; names of headers have `_` for `-`. False if nobody waits for it any more."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if status not in (204, 304):  # which have no body, not even an empty one (RFC 9110 §8.6)
            named = {"Content-Type": kind, "Content-Length": str(len(body)), **named}
        is_awaited = self.begin_answer(status, named)
        if is_awaited:
            self.end_answer(body)
        return is_awaited

    def begin_answer(self, status: int, headers: Mapping[str, str]) -> bool:
        """Answer with these headers; `end_answer` has to follow. False if nobody waits for it any more."""
        if self.answered or self.carrier.exchange is not self:
            return False
        self.answered = True
        self.carrier.send_head(status, {"X-Content-Type-Options": "nosniff", **self.always, **headers})
        return True

    def end_answer(self, body: bytes = b"") -> None:
        """Send the last piece of the answer."""
        self.carrier.send_body(body if self.method != "HEAD" else b"")
        self.carrier.send_end()


class HttpConnection:
    """HTTP/1.1 on one connection (RFC 9112): parsed by h11, one exchange after the other."""

    def __init__(self, http: HttpServer, connection: Connection) -> None:
        self.http = http
        self.connection = connection
        self.exchange: Exchange | None = None
        self._parser: h11.Connection | None = None  # made for the first byte: it takes 10 KB
        self._begun = False  # a request has begun to come in
        self._ahead = 0  # bytes that came while an answer was awaited
        self._stopped = False  # a sink can't take more
        self._busy = False  # `_go_on` is under way
        self._lost = False
        self._timer = http.server.loop.call_later(KEEP_ALIVE_TIMEOUT, connection.abort)

    def __str__(self) -> str:
        return f"HTTP from {self.connection.peer}"

    # -- what a connection carries

    @property
    def is_stranger(self) -> bool:
        """Whether no request is under way."""
        return self.exchange is None

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer."""
        import h11

        if self._parser is None:
            self._parser = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        if self.exchange is None and not self._begun:
            self._begun = True
            self.wait(REQUEST_TIMEOUT)
        if self.exchange is not None and self.exchange.sink is None:
            self._ahead += len(data)
            if self._ahead > MAX_AHEAD:
                return self.connection.abort()
        self._parser.receive_data(data)
        self._go_on()

    def fail(self, error: StreamError) -> None:
        """End without a word: XMPP's errors mean nothing here."""
        self.connection.abort()

    def tls_established(self) -> None:
        """TLS is up; the client speaks first."""

    def connection_lost(self) -> None:
        """Nobody waits for an answer any more."""
        self._lost = True
        self._timer.cancel()
        exchange, self.exchange = self.exchange, None
        if exchange is not None and exchange.sink is not None:
            exchange.sink.lost()

    def wait(self, seconds: float) -> None:
        """Give the peer so much time for what it has to do next; 0: it has nothing to do."""
        self._timer.cancel()
        if seconds:
            self._timer = self.http.server.loop.call_later(seconds, self.connection.abort)

    # -- input

    @property
    def parser(self) -> h11.Connection:
        """h11's half of the work."""
        assert self._parser is not None
        return self._parser

    def _go_on(self) -> None:
        import h11

        if self._busy:
            return
        self._busy = True
        try:
            while not self._stopped and not self._lost:
                event = self.parser.next_event()
                if event is h11.NEED_DATA or event is h11.PAUSED:
                    break
                self.attempt(functools.partial(self._take, event))
        except h11.RemoteProtocolError as error:
            self._malformed(error.error_status_hint)
        finally:
            self._busy = False

    def _take(self, event: object) -> None:
        import h11

        if isinstance(event, h11.Request):
            self._begin(event)
        elif isinstance(event, h11.ConnectionClosed):
            self.connection.close()
        elif self.exchange is not None and self.exchange.sink is not None and not self.exchange.answered:
            if isinstance(event, h11.Data):
                self.exchange.sink.take(bytes(event.data))
            else:
                sink, self.exchange.sink = self.exchange.sink, None
                self.wait(0)
                sink.finish()

    def _begin(self, request: h11.Request) -> None:
        headers: dict[str, str] = {}
        for name, value in request.headers:  # names in lower case, no line breaks: h11 has seen to that
            key, text = name.decode("ascii"), value.decode("latin-1")
            headers[key] = f"{headers[key]}, {text}" if key in headers else text
        exchange = Exchange(self, request.method.decode("ascii"), "", headers)
        self.exchange = exchange
        if not exchange.has_body:
            self.parser.next_event()  # its end
            self.wait(0)
        exchange.path = decoded_path(request.target.decode("ascii"))
        self.http.handle(exchange)

    def attempt(self, step: Callable[[], None]) -> None:
        """Take a step; an HttpError becomes the answer, a bug of ours costs one request."""
        try:
            step()
        except HttpError as refusal:
            self._refuse(refusal)
        except Exception:  # one request's bug must not take the server down
            log.exception("%s: unexpected error", self)
            self._refuse(HttpError(500))

    def _refuse(self, refusal: HttpError) -> None:
        if self.exchange is not None:
            self.exchange.sink = None
            self.exchange.answer(refusal.status, f"{refusal.text}\n".encode(), **refusal.headers)

    def _malformed(self, status: int) -> None:
        """What follows can't be understood, so nothing may follow (RFC 9112 §11.2, threat S82)."""
        import h11

        log.info("%s: ended: no HTTP that we understand", self)
        self.exchange = None
        if self.parser.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status = status if status in STATUS_TEXTS else 400
            self.send_head(status, {"Content-Length": "0", "Connection": "close"})
        self.connection.close()

    def ask_for_body(self) -> None:
        """A client may wait for our word before it sends a long body (RFC 9110 §10.1.1)."""
        import h11

        if self.parser.they_are_waiting_for_100_continue:
            self._send(h11.InformationalResponse(status_code=100, headers=[]))

    def stop(self) -> None:
        """Read no more of the body until `go_on`."""
        self._stopped = True
        self.wait(0)
        self.connection.pause()

    def go_on(self) -> None:
        """Read on."""
        self._stopped = False
        self.wait(REQUEST_TIMEOUT)
        self.connection.resume()
        self._go_on()

    # -- output

    def _send(self, event: h11.Event) -> None:
        data = self.parser.send(event)
        if data:
            self.connection.write(data)

    def send_head(self, status: int, headers: Mapping[str, str]) -> None:
        """Send status and headers."""
        import h11

        unread = self.parser.their_state is h11.SEND_BODY  # the rest of its request is not worth reading
        closing = {"Connection": "close"} if unread else {}
        pairs = list({**headers, **closing}.items())
        self._send(h11.Response(status_code=status, headers=pairs, reason=b""))

    def send_body(self, data: bytes) -> None:
        """Send a piece of the body."""
        import h11

        if data:
            self._send(h11.Data(data=data))

    def send_end(self) -> None:
        """That was the answer: the next request, or the end."""
        import h11

        self._send(h11.EndOfMessage())
        self.exchange = None
        if self.parser.our_state is h11.DONE and self.parser.their_state is h11.DONE:
            self._begun, self._ahead = False, 0
            self.parser.start_next_cycle()
            self.wait(KEEP_ALIVE_TIMEOUT)
            self._go_on()
        else:
            self._timer.cancel()
            self.connection.close()

    def switch(self, headers: Mapping[str, str]) -> bytes:
        """Agree to another protocol (RFC 9110 §7.8); returns what of it came already."""
        import h11

        self._send(h11.InformationalResponse(status_code=101, headers=list(headers.items()), reason=b""))
        self._timer.cancel()
        self.exchange, self._lost = None, True
        return bytes(self.parser.trailing_data[0])


def decoded_path(target: str) -> str:
    """Return the path of a request, decoded once; raises HttpError for what is no path (threat S77)."""
    path = target.partition("?")[0]
    try:
        decoded = unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise HttpError(404) from None
    if not path.startswith("/") or not decoded.isprintable():
        raise HttpError(404)
    return decoded


RouteHandler = Callable[[Any, Exchange], None]


def route(method: str, path: str, *, origins: str = "") -> Callable[[RouteHandler], RouteHandler]:
    """Mark the method of a feature that answers HTTP requests for `path`; a path that ends in `/` has more behind it.

    `origins`: which web pages may use it, by CORS (Fetch §3.2): "" those of the same origin,
    "own" those of the hosts and of `[web] origins`, "*" all.
    """

    def decorate(function: RouteHandler) -> RouteHandler:
        vars(function).setdefault("routes", []).append((path, method, origins))
        return function

    return decorate


@dataclass(slots=True)
class Route:
    """What answers requests for one path, by method."""

    origins: str
    methods: dict[str, Callable[[Exchange], None]] = field(default_factory=dict)


class HttpServer(Feature):
    """HTTP/1.1 (RFC 9112, RFC 9110) inside TLS: the port that browsers come in by.

        C: GET /.well-known/host-meta HTTP/1.1          S: HTTP/1.1 200
    """

    namespace = ""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.port = 0  # of our own listener, once there is one
        if not self.missing_packages():
            server.protocols["http/1.1"] = lambda connection: HttpConnection(self, connection)

    @staticmethod
    def missing_packages() -> list[str]:
        """Return what has to be installed before this chapter opens."""
        from importlib.util import find_spec

        return [name for name in ("h11", "wsproto") if find_spec(name) is None]

    def listening(self, opened: Sequence[tuple[str, Address]]) -> None:
        """Note our port; without the packages, say once what is missing."""
        if self.server.config.listen.web and (missing := self.missing_packages()):
            log.warning("no web port: install %s, with: python3 -m pip install 'xmppd[web]'", " and ".join(missing))
        self.port = next((address.port for purpose, address in opened if purpose == "web"), 0)

    def url(self, host: str) -> str:
        """Return the URL, without a slash at its end, by which the world reaches our port."""
        port = "" if self.port in (0, 443) else f":{self.port}"
        return self.server.config.web_url or f"https://{ascii_domain(host)}{port}"

    @functools.cached_property
    def routes(self) -> Mapping[str, Route]:
        """All routes of all features, by path."""
        routes: dict[str, Route] = {}
        for feature in self.server.registry.features:
            for name in dir(type(feature)):
                for path, method, origins in getattr(getattr(type(feature), name), "routes", ()):
                    found = routes.setdefault(path, Route(origins))
                    assert method not in found.methods and found.origins == origins, path
                    found.methods[method] = getattr(feature, name)
        return routes

    def handle(self, exchange: Exchange) -> None:
        """Find who answers; raises HttpError."""
        path, method = exchange.path, exchange.method
        found = self.routes.get(path) or self.routes.get(path[: path.find("/", 1) + 1])
        if found is None:
            raise HttpError(404)
        self._check_origin(exchange, found)
        if method == "OPTIONS":
            exchange.always |= self._permissions(found)
            exchange.answer(204)
            return
        handler = found.methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            raise HttpError(405, Allow=", ".join(found.methods))
        handler(exchange)

    def _check_origin(self, exchange: Exchange, found: Route) -> None:
        """Let a browser know whether the page that asks may hear the answer; if not, do nothing for it (S79)."""
        origin = exchange.headers.get("origin", "")
        if not origin:
            return
        if found.origins == "*":
            exchange.always["Access-Control-Allow-Origin"] = "*"
        elif self.is_own(origin, exchange) or (found.origins == "own" and self._is_listed(origin)):
            exchange.always |= {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        else:
            raise HttpError(403, "Pages from there may not use this server; see [web] origins in its configuration.")

    @staticmethod
    def is_own(origin: str, exchange: Exchange) -> bool:
        """Whether a page came from this very port; TLS has proven that the client knows us by that name."""
        return origin == f"https://{exchange.headers.get('host', '')}"

    def _is_listed(self, origin: str) -> bool:
        config, match = self.server.config, ORIGIN.fullmatch(origin)
        hosts = {ascii_domain(host) for host in config.hosts}
        return "*" in config.web_origins or origin in config.web_origins or (
            match is not None and origin.startswith("https://") and match[1] in hosts)  # fmt: skip

    @staticmethod
    def _permissions(found: Route) -> dict[str, str]:
        """Answer a browser that asks before it does something unusual (Fetch §3.2.2)."""
        return {
            "Access-Control-Allow-Methods": ", ".join((*found.methods, "HEAD", "OPTIONS")),
            "Access-Control-Allow-Headers": "Content-Type, Range, If-None-Match",
            "Access-Control-Max-Age": "86400",
        }


class ConnectionDiscovery(Feature):
    """Discovering Alternative XMPP Connection Methods (XEP-0156): where the WebSocket and BOSH endpoints are.

        C: GET /.well-known/host-meta
        S: <XRD xmlns='http://docs.oasis-open.org/ns/xri/xrd-1.0'>
             <Link rel='urn:xmpp:alt-connections:websocket' href='wss://example.org:5443/xmpp-websocket'/>…</XRD>
    """

    namespace = XRD

    def _links(self, exchange: Exchange) -> dict[str, str]:
        hosts = self.server.config.hosts
        url = self.server.registry.feature(HttpServer).url(exchange.host if exchange.host in hosts else hosts[0])
        return {
            "urn:xmpp:alt-connections:websocket": f"wss{url.removeprefix('https')}/xmpp-websocket",
            "urn:xmpp:alt-connections:xbosh": f"{url}/http-bind",
        }

    @route("GET", "/.well-known/host-meta", origins="*")
    def host_meta(self, exchange: Exchange) -> None:
        """§2.3, as XML (RFC 6415 §2)."""
        links = (E(XRD("Link"), {"rel": rel, "href": href}) for rel, href in self._links(exchange).items())
        exchange.answer(200, serialize(E(XRD("XRD"), None, *links)).encode(), "application/xrd+xml; charset=utf-8")

    @route("GET", "/.well-known/host-meta.json", origins="*")
    def host_meta_json(self, exchange: Exchange) -> None:
        """§2.3, as JSON (RFC 6415 §3)."""
        links = [{"rel": rel, "href": href} for rel, href in self._links(exchange).items()]
        exchange.answer(200, json.dumps({"links": links}).encode(), "application/json")


# -- streams whose transport keeps elements apart


class FramedStream(ClientStream):
    """A client's stream where each element is a document of its own: it declares all its namespaces itself."""

    stream_prefix: ClassVar[str] = f" xmlns:stream='{STREAMS}'"

    def send(self, stanza: Stanza) -> None:
        """Send a stanza."""
        if self.server.trace is not None:
            self.server.trace.said(self, stanza)
        self.transport.write(self._declared(stanza.wire()))

    def send_written(self, data: bytes) -> None:
        """Send a stanza that is written already, by `Stanza.wire`."""
        if self.server.trace is not None:
            self.server.trace.said(self, data.decode())
        self.transport.write(self._declared(data))

    @staticmethod
    def _declared(wire: bytes) -> bytes:
        """Declare what on TCP the stream's header does."""
        name_ends = WRITTEN_NAME.match(wire)
        assert name_ends is not None
        return b"%b xmlns='jabber:client'%b" % (name_ends.group(), wire[name_ends.end() :])

    def send_element(self, element: Element) -> None:
        """Send any other first-level element."""
        if self.server.trace is not None:
            self.server.trace.said(self, element)
        self.transport.write(serialize(element).encode())

    @staticmethod
    def opening(attributes: Mapping[str, str]) -> Opened:
        """Return the stream header that a transport's own way of opening a stream stands for."""
        return Opened(STREAMS("stream"), dict(attributes), {None: CLIENT, "stream": STREAMS})


# -- WebSocket (RFC 7395)
#
#     C: GET /xmpp-websocket, Upgrade: websocket, Sec-WebSocket-Protocol: xmpp      S: 101
#     C: <open xmlns='urn:ietf:params:xml:ns:xmpp-framing' to='example.org' version='1.0'/>
#     S: <open xmlns='urn:ietf:params:xml:ns:xmpp-framing' from='example.org' id='…' …/>
#     S: <stream:features xmlns:stream='http://etherx.jabber.org/streams'>…</stream:features>
#
# From there on everything is as in chapter 11, one element in each message. TLS is the
# web's, so there is no STARTTLS, and compression is left out as a whole (threats S81, S23).


class WebSocketStream(FramedStream):
    """A stream whose elements come one per message; the parser is the one of TCP (threat S04)."""

    def __init__(self, server: Server, transport: WebSocket) -> None:
        self._messages: deque[bytes] = deque()  # that came and wait for their turn
        self._websocket = transport
        super().__init__(server, transport)

    def _make_parser(self) -> StreamParser:
        """A message is parsed as a child of a header that nobody sent: so all of a stream share one parser."""
        parser = super()._make_parser()
        parser.feed(f"<stream:stream xmlns='{CLIENT}' xmlns:stream='{STREAMS}'>".encode())
        parser.next()
        return parser

    def receive(self, data: bytes) -> None:
        """Take one message."""
        self.heard_at = self.server.loop.now()
        if self.state is not CLOSED:
            self._messages.append(data)
            self.process()

    def next_event(self) -> Event | None:
        """Parse the next message; `<open/>` and `<close/>` stand for the header and its end (RFC 7395 §3.3.1)."""
        if not self._messages:
            return None
        message = self._messages.popleft()
        if declaration := XML_DECLARATION.match(message):  # §3.3.3: not recommended, so not refused
            if ENCODING.search(declaration[1]):
                return StreamError("unsupported-encoding")
            message = message[declaration.end() :].lstrip(b" \t\r\n")
        if not message.startswith(b"<"):
            return StreamError("not-well-formed", "a message begins with <")
        self.parser.feed_whole(message)
        event = self.parser.next()
        return self._framed(event) if type(event) is Element else event

    def _framed(self, element: Element) -> Event:
        is_opening = self.state is StreamState.OPENING
        if element.tag == FRAMING("open") and is_opening:
            return self.opening(element.attrib)
        if element.tag == FRAMING("close"):
            return Closed()
        if local_name(element.tag) in ("open", "close"):  # §3.3.2, or a second <open/>
            return StreamError("bad-format" if element.tag == FRAMING("open") else "invalid-namespace")
        return StreamError("not-authorized", "<open/> comes first") if is_opening else element

    def _write_header(self, header: Element) -> None:
        self._write(serialize(E(FRAMING("open"), header.attrib)))

    def _write_footer(self) -> None:
        self._write(serialize(E(FRAMING("close"))))

    def ask_for_life(self) -> None:
        """RFC 7395 §3.8: by a ping of WebSocket's, which a browser answers even while its page sleeps."""
        self._websocket.ping()


class WebSocket:
    """One WebSocket connection (RFC 6455): a `Transport` (chapter 11) with a connection below it."""

    def __init__(self, server: Server, connection: Connection, early: bytes) -> None:
        from wsproto.connection import Connection as Framing
        from wsproto.connection import ConnectionType

        self.connection = connection
        self.peer = connection.peer
        self.secure = connection.secure
        self.lab = False
        self.compressed = True  # XEP-0138 is not for here: it must not be offered
        self.close_code = 1000  # RFC 6455 §7.4.1: what we say at the end; this one is "all well"
        self._framing = Framing(ConnectionType.SERVER, trailing_data=early)
        self._parts: list[str] = []  # of the message that is coming in
        self._size = 0
        self._closing = False
        self.stream = WebSocketStream(server, self)

    # -- what a connection carries

    @property
    def is_stranger(self) -> bool:
        """Whether nobody has logged in yet."""
        return self.stream.is_stranger

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer."""
        if self._closing:
            return
        self._framing.receive_data(data)
        for event in self._framing.events():
            if self._closing:
                return
            WEBSOCKET_EVENTS[type(event).__name__](self, event)

    def tls_established(self) -> None:
        """It was, before the handshake of HTTP."""

    def fail(self, error: StreamError) -> None:
        """End the stream, and say why."""
        self.stream.fail(error)

    def connection_lost(self) -> None:
        """The connection is over."""
        self._closing = True
        self.stream.connection_lost()

    # -- events of wsproto

    def _take_text(self, event: wsproto.events.TextMessage) -> None:
        """A piece of a message, or all of it; its size is checked before it is put together."""
        self._size += len(event.data)
        self._parts.append(event.data)
        if self._size > self.stream.parser.max_stanza or len(self._parts) > MAX_MESSAGE_FRAMES:
            self.close_code = 1009
            return self.stream.fail(StreamError("policy-violation", "message too big"))
        if event.message_finished:
            message, self._parts, self._size = "".join(self._parts).encode(), [], 0
            self.stream.receive(message)

    def _refuse_bytes(self, event: wsproto.events.BytesMessage) -> None:
        """RFC 7395 §3.2: only text."""
        self.close_code = 1003
        self.stream.fail(StreamError("bad-format", "messages are text"))

    def _take_ping(self, event: wsproto.events.Ping) -> None:
        self.stream.heard_at = self.stream.server.loop.now()
        self.connection.write(self._framing.send(event.response()))

    def _take_pong(self, event: wsproto.events.Pong) -> None:
        self.stream.heard_at = self.stream.server.loop.now()

    def _take_close(self, event: wsproto.events.CloseConnection) -> None:
        """The peer closes, or has broken the rules of framing: either way the stream ends as if cut (§3.6)."""
        self._closing = True
        self.connection.write(self._framing.send(event))
        self.connection.close()
        self.stream.connection_lost()

    # -- what a stream writes to

    def write(self, data: bytes) -> None:
        """Send one message."""
        from wsproto.events import TextMessage

        if not self._closing:
            self.connection.write(self._framing.send(TextMessage(data=data.decode())))

    def write_ahead(self, data: bytes) -> None:
        """Send one message ahead of what waits for the journal."""
        from wsproto.events import TextMessage

        if not self._closing:
            self.connection.write_ahead(self._framing.send(TextMessage(data=data.decode())))

    def ping(self) -> None:
        """Ask for a sign of life."""
        from wsproto.events import Ping as PingFrame

        if not self._closing:
            self.connection.write(self._framing.send(PingFrame()))

    def close(self) -> None:
        """Say goodbye, also in WebSocket's way (RFC 7395 §3.6)."""
        from wsproto.events import CloseConnection

        if not self._closing:
            self._closing = True
            self.connection.write(self._framing.send(CloseConnection(code=self.close_code)))
            self.connection.close()

    def start_tls(self, host: str) -> None:
        """Never: RFC 7395 §3.9."""
        raise AssertionError("WebSocket has TLS below it")

    def compress(self) -> None:
        """Never: it is not offered."""
        raise AssertionError("WebSocket is not compressed")

    def pause(self) -> None:
        """Read no more, until `resume`."""
        self.connection.pause()

    def resume(self) -> None:
        """Read again."""
        self.connection.resume()

    def when_sent(self, callback: Callable[[], None]) -> None:
        """Call `callback` once all that was written so far is out of our hands."""
        self.connection.when_sent(callback)

    def channel_bindings(self) -> dict[str, bytes]:
        """Return those of the TLS connection below."""
        return self.connection.channel_bindings()

    def peer_certificate(self) -> bytes | None:
        """Return none: on this port nobody is asked for one."""
        return None


WEBSOCKET_EVENTS: Mapping[str, Callable[[WebSocket, Any], None]] = {  # by the names of wsproto's
    "TextMessage": WebSocket._take_text,
    "BytesMessage": WebSocket._refuse_bytes,
    "Ping": WebSocket._take_ping,
    "Pong": WebSocket._take_pong,
    "CloseConnection": WebSocket._take_close,
}


class WebSocketBinding(Feature):
    """XMPP over WebSocket (RFC 7395): the handshake (RFC 6455 §4.2).

        C: GET /xmpp-websocket … Upgrade: websocket … Sec-WebSocket-Protocol: xmpp
        S: HTTP/1.1 101 … Upgrade: websocket … Sec-WebSocket-Protocol: xmpp
    """

    namespace = FRAMING

    @route("GET", "/xmpp-websocket", origins="own")
    def upgrade(self, exchange: Exchange) -> None:
        """RFC 6455 §4.2.1: the headers that make it one; §3.1 of RFC 7395: and that it is for XMPP."""
        headers = {name: value.lower() for name, value in exchange.headers.items()}
        if headers.get("upgrade") != "websocket" or "upgrade" not in headers.get("connection", ""):
            raise HttpError(426, Upgrade="websocket", Connection="Upgrade")
        if headers.get("sec-websocket-version") != "13":
            raise HttpError(426, Upgrade="websocket", Connection="Upgrade", Sec_WebSocket_Version="13")
        key = exchange.headers.get("sec-websocket-key", "")
        offered = [name.strip() for name in headers.get("sec-websocket-protocol", "").split(",")]
        if len(key) != 24 or "xmpp" not in offered or exchange.has_body or exchange.method != "GET":
            raise HttpError(400)
        from wsproto.utilities import generate_accept_token

        carrier = exchange.carrier
        early = carrier.switch({
            "Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Protocol": "xmpp",
            "Sec-WebSocket-Accept": generate_accept_token(key.encode("latin-1")).decode(),
        })  # fmt: skip
        websocket = WebSocket(self.server, carrier.connection, early)
        carrier.connection.carry(websocket)
        websocket.receive(b"")


# -- BOSH (XEP-0124, XEP-0206)
#
# A stream cut into HTTP requests, for what can do nothing better. The client always has a
# request open that waits for what there is to say; when it has something to say itself, it
# sends another, and the first is answered:
#
#     C: <body xmlns='http://jabber.org/protocol/httpbind' to='example.org' rid='1573741820' hold='1' wait='60'/>
#     S: <body sid='…' requests='2' wait='60' …><stream:features>…</stream:features></body>
#     C: <body sid='…' rid='1573741821'><auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' …/></body>
#     S: <body><success …/></body>        …  C: <body sid='…' rid='1573741822' xmpp:restart='true'/>
#
# Requests count up from a number that nobody can guess (`rid`), so they are put in order,
# and one whose answer got lost is asked again and gets the same answer. Who knows `sid` and
# `rid` is the client: both stay inside TLS (threat S80).
#
# Left out: acknowledgements (§9) and several streams in one session (§16), which are optional
# and which no client uses; a least interval between polls (§12: then none holds), since
# rates are limited for every connection anyway; and HTML as a response's type (§7.1).

BOSH_WAIT = 60  # seconds that a request waits at most for something to say; XEP-0124's examples have 60
BOSH_HOLD = 2  # requests that wait at the same time; clients want 1
BOSH_INACTIVITY = 60  # seconds without any request, then the session is over; as Prosody
BOSH_MAX_PAUSE = 120  # seconds that a client may announce to be away (§10); as in the examples
BOSH_VERSION = (1, 11)  # of XEP-0124
BOSH_START = re.compile(rb"\s*(?:<\?xml[^<>]*\?>\s*)?" + START_TAG.pattern)
BOSH_CONTENT = re.compile(r"(text|application)/xml(; ?charset=utf-8)?", re.IGNORECASE)
LEGACY_STATUS = {"bad-request": 400, "policy-violation": 403, "item-not-found": 404}  # §17.1: without `ver`
# Stream errors that BOSH has a condition for (§17.2); all others are told as what they are, within remote-stream-error.
BOSH_CONDITIONS = ("host-gone", "host-unknown", "improper-addressing", "internal-server-error", "system-shutdown")


def bosh_body(attributes: Mapping[str, str], payload: bytes = b"") -> bytes:
    """Write a `<body/>` around what is to be sent."""
    prefix = f" xmlns:stream='{STREAMS}'" if b"<stream:" in payload else ""
    start = f"<body xmlns='{HTTP_BIND}'{prefix}{_attributes(Element('body', dict(attributes)))}"
    return b"%b>%b</body>" % (start.encode(), payload) if payload else f"{start}/>".encode()


def bosh_number(attributes: Mapping[str, str], name: str, otherwise: int) -> int:
    """Return an attribute's number; raises ValueError."""
    text = attributes.get(name, str(otherwise))
    if not (text.isascii() and text.isdigit() and len(text) <= 16):
        raise ValueError(name)
    return int(text)


class BoshStream(FramedStream):
    """A stream whose elements come in the bodies of HTTP requests, parsed there."""

    def __init__(self, server: Server, transport: BoshSession) -> None:
        self._bosh = transport
        self._came: deque[Event] = deque()
        super().__init__(server, transport)

    def take(self, events: Iterable[Event]) -> None:
        """Take what came in one request."""
        self.heard_at = self.server.loop.now()
        if self.state is not StreamState.CLOSED:
            self._came.extend(events)
            self.process()

    def next_event(self) -> Event | None:
        """Return the next element; none is heard before the stream is opened, also anew after the login."""
        event = self._came.popleft() if self._came else None
        if self.state is StreamState.OPENING and isinstance(event, Element):
            return StreamError("not-authorized", "xmpp:restart comes first")
        return event

    def _write_header(self, header: Element) -> None:
        self._bosh.tell_header(header.attrib)

    def _write_footer(self) -> None:
        """The session's end says it."""

    def _write_error(self, error: StreamError) -> None:
        if error.condition in BOSH_CONDITIONS:
            self._bosh.condition = error.condition
        else:
            self._bosh.condition = "remote-stream-error"
            super()._write_error(error)


@dataclass(slots=True, eq=False)
class BoshRequest:
    """A request that waits: for those before it, then for an answer."""

    rid: int
    exchange: Exchange
    attributes: Mapping[str, str]
    events: list[Event]
    came_at: float


class BoshSession:
    """What holds a client's requests together (XEP-0124): a `Transport` (chapter 11) without a connection below."""

    def __init__(self, bosh: Bosh, exchange: Exchange, attributes: Mapping[str, str]) -> None:
        """Open one, as the first request wants it (§7.1); raises ValueError."""
        self.server = bosh.server
        self.peer = exchange.carrier.connection.peer
        self.secure = exchange.carrier.connection.secure
        self.lab = False
        self.compressed = True  # XEP-0138 is not for here: it must not be offered
        self.sid = secrets.token_urlsafe(24)
        self.wait = min(bosh_number(attributes, "wait", BOSH_WAIT), BOSH_WAIT)
        self.hold = min(bosh_number(attributes, "hold", 1), BOSH_HOLD)
        self.content = attributes.get("content", "text/xml; charset=utf-8")
        if not BOSH_CONTENT.fullmatch(self.content):
            raise ValueError("content")
        self.version = attributes.get("ver", "")
        self.condition = ""  # why the session ends, if not because it is over
        self._bosh = bosh
        self._rid = bosh_number(attributes, "rid", 0) - 1  # of the newest request that was its turn
        self._key = ""  # what the next request's key must be hashed to; "": the client uses none
        self._early: dict[int, BoshRequest] = {}  # requests whose turn has not come
        self._held: deque[BoshRequest] = deque()  # that were heard, and not answered
        self._answers: OrderedDict[int, bytes] = OrderedDict()  # the last ones, should they be asked for again
        self._output: list[bytes] = []
        self._size = 0
        self._header: dict[str, str] | None = None  # attributes of the first answer, until it is sent
        self._callbacks: list[Callable[[], None]] = []  # to call when the output is sent
        self._pauses = 0
        self._returning = False  # all that is held has to be answered
        self._closing = False
        self._flush_planned = False
        self._timer: Timer | None = None  # of the oldest request held, or of the client's inactivity
        self._patience = float(BOSH_INACTIVITY)
        self.stream = BoshStream(self.server, self)

    @property
    def requests(self) -> int:
        """How many requests a client may have open (§7.2)."""
        return self.hold + 1

    # -- requests

    def take(self, request: BoshRequest) -> None:
        """Take a request; it may be early, or one that is repeated since its connection broke (§14)."""
        rid = request.rid
        if rid in self._answers:
            self._send(request, self._answers[rid])
        elif waiting := self._early.get(rid) or next((held for held in self._held if held.rid == rid), None):
            self._send(waiting, bosh_body({"type": "error"}))  # §14.3
            waiting.exchange = request.exchange
        elif self._closing or not self._rid < rid <= self._rid + self.requests:
            self.refuse(request, "item-not-found")
        else:
            self._early[rid] = request
            self._go_on()

    def _go_on(self) -> None:
        while not self._pauses and not self._closing and (request := self._early.pop(self._rid + 1, None)):
            self._rid += 1
            self._held.append(request)
            self._process(request)
        self._plan_flush()

    def _process(self, request: BoshRequest) -> None:
        attributes = request.attributes
        is_last = attributes.get("type") == "terminate"
        if not self._key_fits(attributes):
            return self.break_off("item-not-found")
        if len(self._held) > self.requests + (is_last or "pause" in attributes):
            return self.break_off("policy-violation")  # §11
        self._patience = float(BOSH_INACTIVITY)
        if "pause" in attributes:
            return self._pause_session(attributes)
        if attributes.get(XBOSH("restart")) in ("true", "1"):
            return self.stream.take([self.opening(attributes)])
        self.stream.take([*request.events, Closed()] if is_last else request.events)

    def opening(self, attributes: Mapping[str, str]) -> Opened:
        """Return the stream header that a request stands for (XEP-0206 §3, §5)."""
        known = {name: attributes[name] for name in ("to", "from", XML_LANG) if name in attributes}
        return BoshStream.opening({**known, "version": attributes.get(XBOSH("version"), "1.0")})

    def _key_fits(self, attributes: Mapping[str, str]) -> bool:
        """§15.4: each key's hash is the key before; a new chain may begin with any request."""
        key = attributes.get("key", "")
        expected, self._key = self._key, attributes.get("newkey", key if self._key else "").lower()
        return not expected or hmac.compare_digest(hashlib.sha1(key.encode()).hexdigest(), expected)

    def _pause_session(self, attributes: Mapping[str, str]) -> None:
        """§10: the client goes away for a while; all its requests come back at once."""
        try:
            seconds = bosh_number(attributes, "pause", 0)
        except ValueError:
            return self.break_off("bad-request")
        if seconds > BOSH_MAX_PAUSE:
            return self.break_off("policy-violation")
        self._patience, self._returning = float(seconds), True

    # -- answers

    def tell_header(self, attributes: Mapping[str, str]) -> None:
        """The stream is open: the first answer tells all about the session too (§7.2, XEP-0206 §4)."""
        if self._answers:
            return
        self._header = {
            "sid": self.sid, "wait": str(self.wait), "requests": str(self.requests), "hold": str(self.hold),
            "inactivity": str(BOSH_INACTIVITY), "maxpause": str(BOSH_MAX_PAUSE), "ver": self._agreed_version(),
            "from": attributes["from"], "authid": attributes["id"],
            XBOSH("restartlogic"): "true", XBOSH("version"): "1.0",
        }  # fmt: skip

    def _agreed_version(self) -> str:
        major, _, minor = self.version.partition(".")
        known = major.isdigit() and minor.isdigit() and len(self.version) < 10
        return "{}.{}".format(*min(BOSH_VERSION, (int(major), int(minor)) if known else BOSH_VERSION))

    def _plan_flush(self) -> None:
        if not self._flush_planned:
            self._flush_planned = True
            self.server.loop.run_last(self._flush)

    def _flush(self) -> None:
        """Answer what need not wait, oldest first (§8); then wait, for something to say or for a request."""
        self._flush_planned = False
        if self._closing:
            return self._finish()
        while self._held and (self._output or self._header or self._returning or len(self._held) > self.hold):
            self._answer(self._held.popleft())
        self._returning = False
        if self._timer is not None:
            self._timer.cancel()
        left = self._held[0].came_at + self.wait - self.server.loop.now() if self._held else self._patience
        self._timer = self.server.loop.call_later(max(0.0, left), self._wait_over if self._held else self._expire)

    def _answer(self, request: BoshRequest) -> None:
        is_paused = self._returning and "pause" in request.attributes  # §10: that answer has no payload
        output = b"" if is_paused else b"".join(self._output)
        if not is_paused:
            self._output.clear()
            self._size = 0
        body = bosh_body(self._header or {}, output)
        self._header = None
        self._answers[request.rid] = body
        if len(self._answers) > self.requests:
            self._answers.popitem(last=False)
        self._send(request, body)

    def _send(self, request: BoshRequest, body: bytes, status: int = 200) -> None:
        if not request.exchange.answer(status, body, self.content):
            return  # its connection broke: the client will ask again
        callbacks, self._callbacks = (self._callbacks, []) if not self._output else ([], self._callbacks)
        for callback in callbacks:
            request.exchange.carrier.connection.when_sent(callback)

    def _wait_over(self) -> None:
        if self._held:
            self._answer(self._held.popleft())
        self._plan_flush()

    # -- the end

    def refuse(self, request: BoshRequest, condition: str) -> None:
        """Answer a request that ends the session."""
        self._held.append(request)
        self.break_off(condition)

    def break_off(self, condition: str) -> None:
        """The client has broken the rules of BOSH (§17.2), or can't be heard any more: to XMPP, a connection broke."""
        self.condition = self.condition or condition
        self._closing = True
        self._plan_flush()
        self.stream.connection_lost()

    def _expire(self) -> None:
        """§10: no request for too long."""
        self._bosh.sessions.pop(self.sid, None)
        self._closing = True
        self.stream.connection_lost()

    def _finish(self) -> None:
        """§13: the oldest request hears of the end, the others nothing; with none open, the next one does."""
        requests = sorted([*self._held, *self._early.values()], key=lambda request: request.rid)
        if requests:
            attributes = {"type": "terminate", **({"condition": self.condition} if self.condition else {})}
            status = 200 if self.version else LEGACY_STATUS.get(self.condition, 200)
            output, self._output = b"".join(self._output), []
            self._send(requests[0], bosh_body(attributes, output), status)
            for request in requests[1:]:
                self._send(request, bosh_body({}))
            self._bosh.sessions.pop(self.sid, None)
        self._held.clear()
        self._early.clear()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.server.loop.call_later(BOSH_INACTIVITY, self._expire)

    # -- what a stream writes to

    def write(self, data: bytes) -> None:
        """Send something with the next answer; the connection that takes it has it wait for the journal."""
        self._size += len(data)
        if self._size > self.server.config.limits.unread and not self._closing:
            self._output.clear()
            self.server.loop.run_last(lambda: self.break_off("policy-violation"))
        self._output.append(data)
        self._plan_flush()

    write_ahead = write

    def close(self) -> None:
        """Answer everything, and end."""
        self._closing = True
        self._plan_flush()

    def pause(self) -> None:
        """Hear no more requests, until `resume`."""
        self._pauses += 1

    def resume(self) -> None:
        """Hear what came meanwhile, in the next turn: first the stream finishes what it is at."""
        self._pauses -= 1
        self.server.loop.post(self._go_on)

    def when_sent(self, callback: Callable[[], None]) -> None:
        """Call `callback` once all that was written so far is out of our hands."""
        if self._output:
            self._callbacks.append(callback)
        else:
            self.server.loop.run_last(callback)

    def start_tls(self, host: str) -> None:
        """Never: XEP-0206 §2."""
        raise AssertionError("BOSH has TLS below it")

    def compress(self) -> None:
        """Never: it is not offered."""
        raise AssertionError("BOSH is not compressed")

    def channel_bindings(self) -> dict[str, bytes]:
        """Return none: there is no one connection to bind to."""
        return {}

    def peer_certificate(self) -> bytes | None:
        """Return none: on this port nobody is asked for one."""
        return None


class Bosh(Feature):
    """XMPP over BOSH (XEP-0206), by Bidirectional-streams Over Synchronous HTTP (XEP-0124): its endpoint.

        C: POST /http-bind   <body rid='…' sid='…' xmlns='http://jabber.org/protocol/httpbind'>…</body>
    """

    namespace = HTTP_BIND

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.sessions: dict[str, BoshSession] = {}

    @route("GET", "/http-bind", origins="own")
    def explain(self, exchange: Exchange) -> None:
        """For people who try whether it works."""
        exchange.answer(200, b"This is for XMPP clients: XEP-0124, by POST.\n")

    @route("POST", "/http-bind", origins="own")
    def post(self, exchange: Exchange) -> None:
        """§5: all that is said is in the request's body."""
        exchange.collect(2 * self.server.config.limits.stanza, functools.partial(self._take, exchange))

    def _take(self, exchange: Exchange, data: bytes) -> None:
        """Parse only the start tag before it is known whose request this is: then that session's limits hold."""
        limits = self.server.config.limits
        parser = StreamParser(HTTP_BIND, max_elements=limits.elements_before_login)
        start = BOSH_START.match(data)
        end = start.end() if start else 0
        parser.feed(data[: min(end, MAX_HEAD)])
        opened = parser.next()
        if not isinstance(opened, Opened) or opened.tag != CLIENT("body") or HTTP_BIND not in opened.prefixes.values():
            return self._refuse(exchange, "bad-request")
        try:
            rid = bosh_number(opened.attributes, "rid", -1)
            session = self._session(exchange, opened.attributes)
        except ValueError:
            return self._refuse(exchange, "bad-request")
        if session is None:
            return self._refuse(exchange, "item-not-found")
        request = BoshRequest(rid, exchange, opened.attributes, [], self.server.loop.now())
        if session.stream.is_stranger and len(data) > 2 * limits.stanza_before_login:
            return session.refuse(request, "policy-violation")
        request.events = self._rest(session, parser, data[end:])
        if "sid" not in opened.attributes:
            request.events.insert(0, session.opening(opened.attributes))
        session.take(request)

    @staticmethod
    def _rest(session: BoshSession, parser: StreamParser, data: bytes) -> list[Event]:
        """Return what is in the body, up to its end or to what is wrong (threat S04)."""
        limits = session.stream.parser
        parser.max_stanza, parser.max_elements = limits.max_stanza, limits.max_elements
        parser.feed(data)
        events: list[Event] = []
        while (event := parser.next()) is not None:
            events.append(event)
        parser.close()
        last = events.pop() if events else None
        if not isinstance(last, Closed):
            events.append(last if isinstance(last, StreamError) else StreamError("not-well-formed"))
        return events

    def _session(self, exchange: Exchange, attributes: Mapping[str, str]) -> BoshSession | None:
        """Return the session of a request, which may be a new one (§7.1); raises ValueError."""
        if "sid" in attributes:
            return self.sessions.get(attributes["sid"])
        peer = limited_address(exchange.carrier.connection.peer)
        most = self.server.config.limits.connections_per_address
        if most and sum(limited_address(other.peer) == peer for other in self.sessions.values()) >= most:
            return None
        session = BoshSession(self, exchange, attributes)
        self.sessions[session.sid] = session
        return session

    @staticmethod
    def _refuse(exchange: Exchange, condition: str) -> None:
        exchange.answer(200, bosh_body({"type": "terminate", "condition": condition}), "text/xml; charset=utf-8")


# ==== 25. Administration: the control channel ====
#
# While the server runs, its files belong to it: what it has in memory would overwrite what
# another program writes. So `xmppd user add` asks the running server to do it, over a TCP
# connection on the loopback (Windows has no Unix sockets, and macOS gives their paths 104
# bytes). Where, and what to say to be believed, is in DATA/control.json, which only the
# owner of the data can read:
#
#     {"port": 41873, "token": "43 characters", "pid": 1234}
#
# One JSON object per line, one answer per line, and the connection ends:
#
#     C: {"command": "hello", "arguments": {"nonce": "…"}}
#     S: {"ok": {"proof": "HMAC-SHA-256(token, nonce)"}}
#     C: {"token": "…", "command": "user add", "arguments": {"jid": "…", "credentials": {…}}}
#     S: {"ok": {}}     or     {"error": "one line for the person at the terminal"}
#
# The first pair is there because a server that was killed leaves its file behind, and
# anybody's program may be given that port next: before the token and somebody's
# credentials are sent, the other side shows that it knows the token too. Passwords
# themselves never travel here; the command line makes credentials of them (chapter 10).
#
# A command is a plain function of the server and its arguments, so that the same function
# also works on the files alone when no server runs (chapter 27). A command's answer waits
# until what it changed is on disk, like every other answer of this server.
#
# State: the listener, its open connections, and the token, which lives as long as the run.

CONTROL_FILE = "control.json"  # in the data folder
MAX_CONTROL_LINE = 64 * 1024  # bytes; credentials are some 600
MAX_CONTROL_CONNECTIONS = 8  # one person types; more are strangers, and the oldest goes
CONTROL_TIMEOUT = 10.0  # seconds for a request to arrive, for the disk to take it, for the answer to be read
CONTROL_PATIENCE = 30.0  # seconds that the command line waits for its answer


# -- what an owner can ask for


def account_in(arguments: Mapping[str, Any], server: Server) -> JID:
    """Return the account that `arguments` name, of a host that is served; raises ConfigError."""
    return parse_account(str(arguments.get("jid", "")), server.config)


def parse_account(text: str, config: Config) -> JID:
    """Return the bare JID of an account of one of our hosts; raises ConfigError."""
    wanted = f"expected an address such as alice@{config.hosts[0]}, found '{text}'"
    try:
        jid = JID.parse(text)
    except StanzaError as error:
        raise ConfigError(f"{wanted}; {error.text}") from error
    if not jid.local or jid.resource:
        raise ConfigError(wanted)
    if jid.domain not in config.hosts:
        raise ConfigError(f"{jid.domain} is not served here; the hosts are: {', '.join(config.hosts)}")
    return jid


def existing_account(arguments: Mapping[str, Any], server: Server) -> tuple[JID, Mapping[str, Any]]:
    """Return the account that `arguments` name and its document; raises ConfigError if there is none."""
    jid = account_in(arguments, server)
    account = server.account(jid)
    if account is None:
        raise ConfigError(f"there is no account {jid}; see: xmppd user list")
    return jid, account


def credentials_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the credentials that `arguments` carry; raises ConfigError."""
    credentials = arguments.get("credentials")
    if not isinstance(credentials, dict) or not credentials:
        raise ConfigError("the request carries no credentials; is this xmppd as new as the running one?")
    return credentials


def add_user(server: Server, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Create an account; its name must be one that new accounts may have (RFC 7622 §3.3)."""
    jid = account_in(arguments, server)
    try:
        prepare_account_name(jid.local)
    except ValueError as error:
        raise ConfigError(f"{jid} cannot be an account: {error}") from error
    if server.account(jid) is not None:
        raise ConfigError(f"{jid} exists already; for another password: xmppd user passwd {jid}")
    server.create_account(jid, credentials_in(arguments))
    return {}


def set_user_password(server: Server, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Replace an account's credentials."""
    jid, _ = existing_account(arguments, server)
    server.set_credentials(jid, credentials_in(arguments))
    return {}


def remove_user(server: Server, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Remove an account with everything that it kept."""
    jid, _ = existing_account(arguments, server)
    server.remove_account(jid)
    return {}


def list_users(server: Server, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the accounts of one host, or of all, in alphabetical order."""
    domain = arguments.get("domain")
    if domain is not None and domain not in server.config.hosts:
        raise ConfigError(f"{domain} is not served here; the hosts are: {', '.join(server.config.hosts)}")
    hosts = server.config.hosts if domain is None else (domain,)
    return {"users": [str(jid) for host in hosts for jid in sorted(server.accounts.owners(host))]}


def show_user(server: Server, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what there is to know about an account without reading anybody's mail."""
    jid, account = existing_account(arguments, server)
    last = server.storage.documents("last").get(jid)
    return {
        "jid": str(jid),
        "created": account.get("created"),
        "sessions": [describe_session(session) for session in server.sessions(jid)],
        "last_seen": last.get("at") if isinstance(last, dict) else None,
        "contacts": len(server.storage.documents("roster").items(jid)),
        "offline": server.storage.log("offline").count(jid),
    }


def describe_session(session: Session) -> dict[str, Any]:
    """Return a session for `user show`."""
    return {
        "resource": session.jid.resource,
        "since": stamp(session.connected_at),
        "peer": session.stream.transport.peer,
        "available": session.presence is not None,
        "connected": session.is_attached,
    }


def server_status(server: Server, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what runs, since when, for whom, and with how much memory (bytes, None where unknown)."""
    listeners = server.network.listeners if server.network else {}
    return {
        "version": __version__,
        "pid": os.getpid(),
        "started": stamp(server.started_at),
        "hosts": list(server.config.hosts),
        "data": str(server.config.data),
        "listeners": [f"{purpose} {at._replace(port=found.port)}" for (purpose, at), found in listeners.items()],
        "sessions": sum(1 for _ in server.all_sessions()),
        "memory": resident_memory(),
    }


def resident_memory() -> int | None:
    """Return the bytes of memory this process occupies now, or None where only its peak is known."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


ControlCommand = Callable[["Server", Mapping[str, Any]], dict[str, Any]]

CONTROL_COMMANDS: dict[str, ControlCommand] = {
    "status": server_status,
    "user add": add_user,
    "user passwd": set_user_password,
    "user remove": remove_user,
    "user list": list_users,
    "user show": show_user,
}


# -- the server's side


def control_proof(token: str, nonce: str) -> str:
    """Return what only somebody who knows the token can answer to `nonce` (RFC 2104)."""
    return hmac.new(token.encode(), f"xmppd control {nonce}".encode(), hashlib.sha256).hexdigest()


class ControlChannel:
    """The listener on the loopback, and the file that tells the owner's programs about it."""

    def __init__(self, server: Server, commands: Mapping[str, ControlCommand] = CONTROL_COMMANDS) -> None:
        self.server = server
        self.commands = commands
        self.token = secrets.token_urlsafe(32)
        self.connections: dict[ControlConnection, None] = {}  # in order of arrival
        self._file = server.config.data / CONTROL_FILE
        self._listener: socket.socket | None = None

    def open(self) -> None:
        """Listen, and write the file; raises ConfigError where either is impossible."""
        try:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self._listener.setblocking(False)
            port = self._listener.getsockname()[1]
            write_file(self._file, json.dumps({"port": port, "token": self.token, "pid": os.getpid()}), 0o600)
        except OSError as error:
            raise ConfigError(f"{self._file}: the control channel cannot be opened: {error.strerror}") from error
        self.server.loop.register(self._listener, selectors.EVENT_READ, self._accept)
        self.server.loop.at_turn_end.append(self._answer_what_is_synced)

    def close(self) -> None:
        """Stop listening; the file goes first, so that nobody looks for us any more."""
        if self._listener is None:
            return
        self._file.unlink(missing_ok=True)
        for connection in list(self.connections):
            connection.close()
        self.server.loop.at_turn_end.remove(self._answer_what_is_synced)
        self.server.loop.unregister(self._listener)
        self._listener.close()
        self._listener = None

    def _accept(self, events: int) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it went away again, or there is no descriptor left: the next turn tries again
            return
        if len(self.connections) >= MAX_CONTROL_CONNECTIONS:
            next(iter(self.connections)).close()
        self.connections[ControlConnection(self, sock)] = None

    def _answer_what_is_synced(self) -> None:
        for connection in list(self.connections):
            connection.answer_if_synced()

    def answer(self, line: bytes) -> tuple[dict[str, Any], bool]:
        """Return the answer to one line, and whether another may follow on this connection."""
        try:
            request = json.loads(line)
            command, arguments = str(request["command"]), dict(request.get("arguments", {}))
            token = str(request.get("token", ""))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return {"error": "expected a JSON object with command, arguments and token on one line"}, False
        if command == "hello":
            return {"ok": {"proof": control_proof(self.token, str(arguments.get("nonce", "")))}}, True
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self.token.encode()):
            return {"error": "the token is wrong: the server was started again meanwhile"}, False
        return self._perform(command, arguments), False

    def _perform(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        function = self.commands.get(command)
        if function is None:
            return {"error": f"the running server (version {__version__}) has no command {command!r}"}
        try:
            return {"ok": function(self.server, arguments)}
        except ConfigError as error:
            return {"error": str(error)}
        except StanzaError as error:  # what a feature refuses, e.g. resource-constraint: the disk is full
            return {"error": f"refused: {error.text or error.condition}"}
        except Exception:  # a dispatcher: a bug in one command must not leave its caller without an answer
            log.exception("unexpected error in the command %s", command)
            return {"error": "an unexpected error in the server; its log has the details"}


class ControlConnection:
    """One connection of the command line: lines in, lines out, never more than `MAX_CONTROL_LINE` in."""

    def __init__(self, channel: ControlChannel, sock: socket.socket) -> None:
        self.channel = channel
        self.loop = channel.server.loop
        self.storage = channel.server.storage
        self._socket = sock
        self._socket.setblocking(False)
        self._input = b""
        self._output = b""
        self._position = 0  # the journal must be synced so far before the output may leave
        self._is_last = False  # the output ends the conversation
        self._deadline = self.loop.call_later(CONTROL_TIMEOUT, self.close)
        self.loop.register(sock, selectors.EVENT_READ, self._read)

    def close(self) -> None:
        """End the conversation; may be called twice."""
        if self.channel.connections.pop(self, self) is self:
            return
        self._deadline.cancel()
        self.loop.unregister(self._socket)
        self.loop.run_last(self._socket.close)

    def _read(self, events: int) -> None:
        try:
            data = self._socket.recv(MAX_CONTROL_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._input += data
        if not data or len(self._input) > MAX_CONTROL_LINE or self._output:  # one question at a time
            self.close()
            return
        line, newline, rest = self._input.partition(b"\n")
        if newline:
            self._input = rest
            self._take(line)

    def _take(self, line: bytes) -> None:
        answer, may_go_on = self.channel.answer(line)
        self._output = json.dumps(answer).encode() + b"\n"
        self._position = 0 if may_go_on else self.storage.position  # who goes on was promised nothing yet
        self._is_last = not may_go_on
        self._deadline.cancel()
        self._deadline = self.loop.call_later(CONTROL_TIMEOUT, self._give_up)

    def answer_if_synced(self) -> None:
        """Send the answer once what it promises is on disk, or will never be."""
        if self._output and self._position > self.storage.synced and self.storage.failed_for_good:
            self._give_up()
        if self._output and self._position <= self.storage.synced:
            self.loop.modify(self._socket, selectors.EVENT_WRITE, self._write)

    def _give_up(self) -> None:
        """The disk does not take what was asked for, so that the answer would not be true."""
        if self._position <= self.storage.synced:  # the answer is on its way, and nobody reads it
            self.close()
            return
        why = self.storage.failed or f"the disk has not answered for {CONTROL_TIMEOUT:.0f} seconds"
        self._output = json.dumps({"error": f"not saved: {why}"}).encode() + b"\n"
        self._position = 0
        self._deadline.cancel()
        self._deadline = self.loop.call_later(CONTROL_TIMEOUT, self.close)

    def _write(self, events: int) -> None:
        try:
            sent = self._socket.send(self._output)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._output = self._output[sent:]
        if not self._output and self._is_last:
            self.close()
        elif not self._output:
            self.loop.modify(self._socket, selectors.EVENT_READ, self._read)


# -- the command line's side


class ServerAbsent(Exception):
    """No server runs on this data folder; a file that one left behind doesn't count."""


class ControlClient:
    """One conversation with the server that runs on the data folder `data`, as a context manager.

    Opening it raises ServerAbsent if there is none, ConfigError if it is somebody else's.
    """

    def __init__(self, data: Path) -> None:
        self._token, port = read_control_file(data / CONTROL_FILE)
        try:
            self._socket = socket.create_connection(("127.0.0.1", port), CONTROL_TIMEOUT)
        except (OSError, OverflowError) as error:
            raise ServerAbsent(data) from error
        self._file = self._socket.makefile("rwb")

    def __enter__(self) -> ControlClient:
        """Make sure that the other side is the server; raises ServerAbsent."""
        nonce = secrets.token_urlsafe(16)
        try:
            answer = self._exchange({"command": "hello", "arguments": {"nonce": nonce}})
            proof = str(answer["ok"]["proof"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            self.__exit__()
            raise ServerAbsent(self._socket) from error
        if not hmac.compare_digest(proof.encode("utf-8", "replace"), control_proof(self._token, nonce).encode()):
            self.__exit__()
            raise ServerAbsent(self._socket)
        return self

    def __exit__(self, *exception: object) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()

    def request(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the server answers to `command`; raises ConfigError with its refusal."""
        self._socket.settimeout(CONTROL_PATIENCE)
        try:
            answer = self._exchange({"token": self._token, "command": command, "arguments": arguments})
        except (OSError, ValueError) as error:
            raise ConfigError("the server gives no answer; whether it did what was asked, its log tells") from error
        if "error" in answer:
            raise ConfigError(str(answer["error"]))
        return dict(answer["ok"])

    def _exchange(self, request: Mapping[str, Any]) -> Any:
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()
        return json.loads(self._file.readline())


def read_control_file(path: Path) -> tuple[str, int]:
    """Return the token and port that a running server wrote; raises ServerAbsent, or ConfigError if it isn't ours."""
    try:
        document = json.loads(path.read_bytes())
        return str(document["token"]), int(document["port"])
    except PermissionError as error:
        raise ConfigError(f"{path}: cannot be read by this user; do this as the owner of that folder") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ServerAbsent(path) from error


# ==== 26. Learning: the trace ====
#
# `xmppd run --trace` prints what is said, as the specifications print it: C: for what the
# client says, S: for what the server says, one line per stanza, with the stream it belongs
# to; and between them, after an arrow, the rule by which the server decided:
#
#     romeo@example.org/orchard  C: <message to='juliet@example.org' type='chat'><body>O</body></message>
#                                → RFC 6121 §8.5.2.1.1: to the resources with the highest priority
#     juliet@example.org/balcony S: <message from='romeo@example.org/orchard' …><body>O</body></message>
#
# Passwords, their proofs and tokens are masked; what people write is not, since that is what
# one wants to see. So a trace is for a lab or for one's own server, and is never switched on
# by itself. When it is off, it costs one test per stanza.

SECRET_TAGS = frozenset({
    SASL("auth"), SASL("response"), SASL("challenge"), SASL("success"),
    IQ_AUTH("password"), IQ_AUTH("digest"), REGISTER("password"), CLIENT("handshake"),
    SASL2("initial-response"), SASL2("response"), SASL2("challenge"), SASL2("additional-data"),
})  # fmt: skip
SECRET_ATTRIBUTES = {FAST("token"): "token"}
MASK = "***"
TRACE_COLOURS = {"C:": "\x1b[36m", "S:": "\x1b[32m", "→": "\x1b[33m"}  # cyan, green, yellow
PLAIN_COLOUR = "\x1b[0m"


def printable(text: str) -> str:
    """Return `text` with everything that could move a cursor or begin a line made visible.

    What peers send ends up in logs, and a log is read on terminals (threat S86).
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def masked(element: Element) -> Element:
    """Return a copy of an element whose secrets are replaced by `***`; their presence and place stay visible."""
    copy = Element(element.tag, dict(element.attrib))
    copy.text, copy.tail = element.text, element.tail
    if element.tag in SECRET_TAGS and element.text:
        copy.text = MASK
    if element.tag in SECRET_ATTRIBUTES:
        copy.set(SECRET_ATTRIBUTES[element.tag], MASK)
    copy.extend(masked(child) for child in element)
    return copy


class Trace:
    """Prints a conversation as it happens. `write` takes lines; `colour` is for terminals."""

    def __init__(self, write: Callable[[str], None], *, colour: bool) -> None:
        self._write = write
        self._colour = colour

    def heard(self, stream: Stream, event: Event) -> None:
        """Print what the peer said: an element, or how it opened or closed its stream."""
        if isinstance(event, Element):
            text = serialize(masked(event), CLIENT)
        elif isinstance(event, Opened):
            text = f"<stream:stream{_attributes(Element('stream', event.attributes))}>"
        elif isinstance(event, Closed):
            text = "</stream:stream>"
        else:
            text = f"(input that ends the stream: {event.condition})"
        self._line(stream, "C:", text)

    def said(self, stream: Stream, what: Element | str) -> None:
        """Print what the server says to the peer."""
        self._line(stream, "S:", what if isinstance(what, str) else serialize(masked(what), CLIENT))

    def decided(self, rule: str) -> None:
        """Print the rule by which the stanza that was heard last is handled."""
        self._line(None, "→", rule)

    def _line(self, stream: Stream | None, mark: str, text: str) -> None:
        who = "" if stream is None else stream.name
        line = f"{who:<32} {mark} {printable(text)}"
        if self._colour:
            line = f"{TRACE_COLOURS[mark]}{line}{PLAIN_COLOUR}"
        self._write(line)


# ==== 27. The whole ====
#
# All chapters come together here: the features in their order, the command line, the start
# of the server, its signals and its end.
#
#     xmppd                               serve this machine's name; says what to do next
#     xmppd init example.org              write a configuration
#     xmppd user add alice@example.org    an account, whether the server runs or not
#     xmppd check                         is everything as it should be, and if not, what to do
#     xmppd check example.org             and as others see it: names, addresses, certificates
#     xmppd specs [--compliance]          what it speaks, and which suites that makes (XEP-0479)
#     xmppd pack                          one file with all packages, for other machines
#
# A command is a function from its options to an exit status: 0 is success, 1 a failure, 2 a
# command line that makes no sense, 130 an interruption by ^C. Failures are one line on
# stderr that says how to mend them. Results go to stdout, and with --json they are JSON.
#
# The end comes in the reverse order of the start: nobody is let in any more, sessions hear
# system-shutdown, features and the journal bring everything to disk, the lock is released.

FEATURES: tuple[type[Feature], ...] = (
    # The order is the order of filters and events, and of the stream features on the wire.
    Compression,  # before binding: nobody wants to compress later (XEP-0170 §2)
    ResourceBinding,
    SessionEstablishment,
    IqAuth,
    Registration,
    StreamLimits,
    StreamManagement,  # endings run in reverse: what a dead session had not got goes on when all know that it's gone
    ClientState,  # at the end it gives what it holds to stream management
    Privacy,  # the first that filters: its rules come before all others (XEP-0016 §2.2)
    Blocking,
    Roster,
    Subscriptions,  # hears of a session's presence before the offline messages: first who asks, then what was said
    PresenceBroadcast,
    OfflineMessages,
    Archive,  # behind the offline messages, which take away forged ids; in front of all that makes copies
    Push,
    Carbons,  # behind what takes forged elements out of a message, and what notes its id in the archive
    Disco,
    Ping,
    SoftwareVersion,
    EntityTime,
    LastActivity,
    PrivateStorage,
    VCard,
    Capabilities,  # behind the offline messages: first what was said, then what is new
    PersonalEventing,
    NodeSubscriptions,
    NodeOwnership,
    AvatarConversion,  # behind the eventing, which changes what it converts
    BookmarkConversion,
    Components,  # before the rooms: on a reload, one may give up a domain to them
    MultiUserChat,
    HttpServer,
    ConnectionDiscovery,
    WebSocketBinding,
    Bind2,
    FastLogin,
    ExtensibleSasl,
    Bosh,
)

FOUNDATIONS = (  # what is built into a chapter rather than into a feature
    ("RFC 6120", "XMPP: Core (client to server)", "3, 11, 14"),
    ("RFC 6121", "XMPP: Instant Messaging and Presence", "14 to 16"),
    ("RFC 3920, RFC 3921", "XMPP of 2004, for its clients", "11, 18"),
    ("RFC 7622, RFC 6122", "XMPP: Address Format", "4"),
    ("RFC 7590", "Use of TLS in XMPP", "9"),
    ("RFC 5802, RFC 7677", "SCRAM-SHA-1 and SCRAM-SHA-256, with -PLUS", "10"),
    ("RFC 5929, RFC 9266", "Channel bindings", "9"),
    ("RFC 4616", "SASL PLAIN, inside TLS", "10"),
    ("RFC 2831", "SASL DIGEST-MD5, where it is switched on", "10"),
    ("RFC 7395", "XMPP over WebSocket", "24"),
    ("XEP-0004", "Data Forms", "5"),
    ("XEP-0048", "Bookmarks", "20"),
    ("XEP-0059", "Result Set Management", "5"),
    ("XEP-0060", "Publish-Subscribe, as far as personal eventing needs it", "20"),
    ("XEP-0068", "Field Standardization for Data Forms", "5"),
    ("XEP-0082", "Date and Time Profiles", "3"),
    ("XEP-0084", "User Avatar", "20"),
    ("XEP-0086", "Error Condition Mappings", "2"),
    ("XEP-0106", "JID Escaping", "4"),
    ("XEP-0124", "Bidirectional-streams Over Synchronous HTTP (BOSH)", "24"),
    ("XEP-0128", "Service Discovery Extensions (of nodes)", "20"),
    ("XEP-0153", "vCard-Based Avatars", "18, 20"),
    ("XEP-0178", "SASL EXTERNAL with Certificates (client to server)", "9, 10"),
    ("XEP-0203", "Delayed Delivery", "15, 16"),
    ("XEP-0223", "Persistent Storage of Private Data via PubSub", "20"),
    ("XEP-0237", "Roster Versioning", "15"),
    ("XEP-0249", "Direct MUC Invitations", "21"),
    ("XEP-0334", "Message Processing Hints", "16"),
    ("XEP-0359", "Unique and Stable Stanza IDs (in rooms)", "21"),
    ("XEP-0368", "Direct TLS", "12"),
    ("XEP-0410", "MUC Self-Ping", "21"),
    ("XEP-0421", "Occupant Identifiers for Semi-Anonymous MUCs", "21"),
    ("XEP-0402", "PEP Native Bookmarks", "20"),
    ("XEP-0440", "SASL Channel-Binding Type Capability", "11"),
    ("XEP-0474", "SASL SCRAM Downgrade Protection", "10"),
    ("XEP-0486", "MUC Avatars", "21"),
)


def supported_specs() -> list[tuple[str, str, str]]:
    """Return (specification, title, where in the code) of all that is supported: README's table.

    A feature's row comes from the first line of its docstring: `Title (XEP-nnnn…)`.
    """
    rows = list(FOUNDATIONS)
    for feature in FEATURES:
        cited = re.match(r"([^(]+?) \(((?:XEP-|RFC )\d+)", feature.__doc__ or "")
        if cited and cited[2].startswith("XEP"):
            rows.append((cited[2], cited[1], f"`{feature.__name__}`"))
    return sorted(rows, key=lambda row: (row[0].startswith("XEP"), row[0]))


class Requirement(NamedTuple):
    """A server's row of the XMPP Compliance Suites 2023 (XEP-0479 §2)."""

    category: str
    feature: str
    level: str  # "Server", or "Advanced Server" for what only that level asks
    providers: tuple[str, ...]  # the specifications that have to be supported, all of them


SUITES = tuple(
    Requirement(category, feature, level, tuple(providers.split(", ")))
    for category, feature, level, providers in (
        ("Core", "Core features", "Server", "RFC 6120"),
        ("Core", "TLS", "Server", "RFC 7590"),
        ("Core", "Direct TLS", "Advanced Server", "XEP-0368"),
        ("Core", "Feature discovery", "Server", "XEP-0030"),
        ("Core", "Feature broadcasts", "Advanced Server", "XEP-0115"),
        ("Core", "Server extensibility", "Server", "XEP-0114"),
        ("Core", "Event publishing", "Advanced Server", "XEP-0163"),
        ("Web", "Web connection mechanisms", "Server", "RFC 7395, XEP-0206, XEP-0124"),
        ("IM", "Core features", "Server", "RFC 6121"),
        ("IM", "User avatar compatibility", "Advanced Server", "XEP-0398, XEP-0153"),
        ("IM", "vcard-temp", "Server", "XEP-0054"),
        ("IM", "Outbound message synchronization", "Server", "XEP-0280"),
        ("IM", "User blocking", "Advanced Server", "XEP-0191"),
        ("IM", "Group chat", "Server", "XEP-0045, XEP-0249"),
        ("IM", "Advanced group chat", "Advanced Server", "XEP-0048, XEP-0313, XEP-0402, XEP-0410"),
        ("IM", "Persistent storage of private data via PubSub", "Advanced Server", "XEP-0223"),
        ("IM", "Private XML storage", "Advanced Server", "XEP-0049"),
        ("IM", "Stream management", "Advanced Server", "XEP-0198"),
        ("IM", "History storage and retrieval", "Advanced Server", "XEP-0313"),
        ("IM", "File upload", "Server", "XEP-0363"),
        ("Mobile", "Stream management", "Server", "XEP-0198"),
        ("Mobile", "Client state indication", "Server", "XEP-0352"),
        ("Mobile", "Third party push notifications", "Advanced Server", "XEP-0357"),
        ("A/V Calling", "STUN/TURN server discovery", "Server", "XEP-0215"),
    )
)


def compliance() -> list[tuple[Requirement, list[str]]]:
    """Return every requirement of the suites with those of its specifications that are missing here."""
    supported = {spec for row in supported_specs() for spec in row[0].split(", ")}
    return [(row, [spec for spec in row.providers if spec not in supported]) for row in SUITES]


def levels_reached() -> dict[str, str]:
    """Return for each category what may be claimed: "Advanced Server", "Server", or "" for nothing (XEP-0479 §2)."""
    missing = {(row.category, row.level) for row, specs in compliance() if specs}
    reached = {}
    for category in dict.fromkeys(row.category for row in SUITES):
        needed = {"Core", category}  # every other suite stands on the core's
        short = {level for name, level in missing if name in needed}
        reached[category] = "" if "Server" in short else "Server" if short else "Advanced Server"
    return reached


PACKAGES = {"defusedxml": "defusedxml", "cryptography": "cryptography", "platformdirs": "platformdirs",
            "tomli_w": "tomli-w"}  # module: what the package is called  # fmt: skip
MIN_PASSWORD = 8  # characters, for a person at a terminal (NIST SP 800-63B §5.1.1.2); a script may know better
PASSWORD_ATTEMPTS = 3  # at the terminal
MAX_PASSWORD_LINE = 4096  # bytes that --password-stdin reads; SASLprep allows 1023
LOW_DISK = 100 * 1024 * 1024  # bytes free: below, `check` complains; a busy day of a household is a tenth
CERTIFICATE_WARNING = 14  # days left: whoever renews certificates for the owner should have done it by then
CERTIFICATE_INTERVAL = 3600.0  # seconds between two looks; ACME clients renew weeks before the end
CLOCK_START = datetime(2026, 1, 1, tzinfo=UTC)  # no clock that is right is earlier than this program


# -- logging


def on_one_line(error: BaseException) -> str:
    """Return an exception and where it came from, innermost first: `KeyError: 'x' (xmppd.py:12 in f < :7 in g)`."""
    import traceback

    frames = reversed(traceback.extract_tb(error.__traceback__))
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames)
    text = f"{type(error).__name__}: {error} ({where})"
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return f"{text}, after {on_one_line(cause)}" if cause else text


class LineFormatter(logging.Formatter):
    """One record, one readable line, whatever is in it.

    For journald, which keeps the time itself, a line begins with the syslog priority
    (sd-daemon(3)); for people, with the time and the level.
    """

    PRIORITIES: ClassVar[Mapping[int, int]] = {
        logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2,
    }  # fmt: skip

    def __init__(self, *, journald: bool) -> None:
        super().__init__()
        self.journald = journald

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            text += f": {on_one_line(record.exc_info[1])}"
        text = printable(text)
        if self.journald:
            return f"<{self.PRIORITIES.get(record.levelno, 6)}>{text}"
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        return f"{moment} {record.levelname.lower()}: {text}"


def stderr_is_journald() -> bool:
    """Whether what we write to stderr goes to journald (systemd.exec(5), JOURNAL_STREAM).

    The variable is inherited by programs whose stderr has been redirected since, so it
    names the device and inode that it is about.
    """
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


def set_up_logging(level: int) -> None:
    """Send what is worth saying, from `level` on, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(journald=stderr_is_journald()))
    log.handlers[:] = [handler]
    log.setLevel(level)
    log.propagate = False


def complain(text: str) -> None:
    """Say on stderr, on one line, what went wrong."""
    print(f"xmppd: {printable(text)}", file=sys.stderr)


# -- what all commands need


def missing_packages() -> list[str]:
    """Return the names of packages that are needed and cannot be found."""
    # A zipapp may bring `cryptography` along, or do without it where [tls] names certificates.
    optional = ["cryptography"] if own_archive() else []
    return [name for name in PACKAGES.values() if name not in (*found_packages(), *optional)]


def found_packages() -> list[str]:
    """Return the names of the packages that Python finds."""
    import importlib.util

    return [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is not None]


def configured(options: argparse.Namespace) -> Config:
    """Return the configuration that the command line asks for; raises ConfigError."""
    return load_config(options.config or find_config(), data=options.data)


def this_command(options: argparse.Namespace) -> str:
    """Return how this program was called, for advice that can be typed as it stands."""
    import shlex

    program = Path(sys.argv[0])
    if program.suffix in (".py", ".pyz"):
        words = ["python3", sys.argv[0]]
    else:  # `.venv/bin/xmppd`, as README has it, isn't found by its name alone
        words = ["xmppd" if program.stem != "xmppd" or str(program.parent) in os.get_exec_path() else sys.argv[0]]
    for name in ("config", "data"):
        if value := getattr(options, name):
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def perform(config: Config, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Let the running server do `command`, or do it on its files if none runs; raises ConfigError."""
    try:
        with ControlClient(config.data) as server:
            return server.request(command, arguments)
    except ServerAbsent:
        return perform_offline(config, command, arguments)


def perform_offline(config: Config, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Do `command` with a server that has no listeners, and return when everything is on disk."""
    loop = Loop()
    storage = open_storage(config, loop)
    try:
        answer = CONTROL_COMMANDS[command](Server(config, loop, storage, FEATURES), arguments)
        loop.turn(0)  # what features have put off
    except StanzaError as error:
        raise ConfigError(f"refused: {error.text or error.condition}") from error
    finally:
        storage.close()
        loop.close()
    if storage.failed_for_good or storage.synced < storage.position:
        raise ConfigError(f"not saved: {storage.failed}")
    return answer


def open_storage(config: Config, loop: Loop) -> Storage:
    """Open the data folder; raises ConfigError.

    Only its owner may: what root writes into the folder of a service, by a command typed
    while the service was down, the service could not read afterwards.
    """
    data = config.data
    if os.name == "posix" and data.exists() and data.stat().st_uid != os.geteuid():
        try:
            owner = data.owner()
        except KeyError:  # an account that is gone
            owner = f"#{data.stat().st_uid}"
        raise ConfigError(f"{data} belongs to {owner}; do this as that user, with: sudo -u {owner}")
    return Storage(data, loop, sync=config.storage_sync)


# -- run


class Signals:
    """Signals as events of the loop.

    A signal may interrupt Python anywhere, so a handler should do nothing. The interpreter
    writes the signal's number to a socket (`signal.set_wakeup_fd`), which the loop reads
    like any other.
    """

    def __init__(self, loop: Loop, callbacks: Mapping[int, Callable[[int], None]]) -> None:
        self.loop = loop
        self._callbacks = callbacks
        self._reader, self._writer = socket.socketpair()
        for end in (self._reader, self._writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._heard) for number in callbacks}
        loop.register(self._reader, selectors.EVENT_READ, self._read)

    def _heard(self, number: int, frame: object) -> None:
        """Do nothing: the number is in the socket already."""

    def _read(self, events: int) -> None:
        for number in self._reader.recv(64):
            if callback := self._callbacks.get(number):  # whoever runs us may have handlers for others
                callback(number)

    def close(self) -> None:
        """Give all signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self.loop.unregister(self._reader)
        self._reader.close()
        self._writer.close()


def print_trace_line(line: str) -> None:
    """Print a line of the trace at once: whoever reads along wants to see it while it happens."""
    print(line, flush=True)


class Run:
    """One run of the server, from opening its files to releasing them."""

    def __init__(self, config: Config, options: argparse.Namespace) -> None:
        """Open the data folder, and make certificates if there are none; raises ConfigError."""
        self.options = options
        self.loop = Loop()
        self.storage = open_storage(config, self.loop)
        self.ended_by = 0  # the signal
        try:
            self.certificates = Certificates(config)
            self.server = Server(config, self.loop, self.storage, FEATURES, self.certificates)
        except ConfigError:
            self.storage.close()
            raise
        self.control = ControlChannel(self.server)
        if options.trace:
            self.server.trace = Trace(print_trace_line, colour=sys.stdout.isatty())

    def serve(self) -> int:
        """Serve until a signal ends it; return the exit status; raises ConfigError if it cannot begin."""
        handlers: dict[int, Callable[[int], None]] = {signal.SIGTERM: self._end, signal.SIGINT: self._end}
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._reload
        signals = Signals(self.loop, handlers)
        try:
            opened = self.server.listen()
            self.control.open()
            self.loop.call_later(CERTIFICATE_INTERVAL, self._look_after_certificates)
            for line in greeting(self.server, self.certificates.authority, this_command(self.options)):
                log.info("%s", line)
            log.info("ready: %s", ", ".join(f"{purpose} {address}" for purpose, address in opened))
            self._rarely_collect()
            self.loop.run()
        finally:
            self.control.close()
            self.storage.close()
            signals.close()
        log.info("ended")
        return 128 + self.ended_by if self.ended_by == signal.SIGINT else 0

    @staticmethod
    def _rarely_collect() -> None:
        """Have what is loaded by now left out of collections, and full ones be rare: all would have to wait for them.

        Nothing here leaves garbage that needs them (tests/test_abuse.py) [measured: with
        8000 connections they took 400 ms, several times a minute].
        """
        import gc

        gc.collect()
        gc.freeze()
        gc.set_threshold(700, 10, 1000)

    def _end(self, number: int) -> None:
        """The first signal ends politely, the second at once; what is acknowledged is on disk either way."""
        name = signal.Signals(number).name
        if self.ended_by:
            log.warning("%s again: ending at once", name)
            self.loop.stop()
            return
        self.ended_by = number
        log.info("%s: saying goodbye", name)
        self.control.close()
        self.server.shutdown(self.loop.stop)

    def _reload(self, number: int) -> None:
        """Read the configuration and certificates again; what cannot be used changes nothing."""
        try:
            config = configured(self.options)
            for name in ("data", "storage_sync"):
                if getattr(config, name) != getattr(self.server.config, name):
                    raise ConfigError(f"{name.replace('_', '.')} cannot change while the server runs; restart it")
        except ConfigError as error:
            self._not_reloaded(error)
            return
        # A new host needs a new certificate, and making one takes a while.
        self.loop.offload(
            prepare_certificates, config, then=lambda _: self._work_with(config), failed=self._not_reloaded
        )

    def _work_with(self, config: Config) -> None:
        if self.certificates.reload(config):
            self.server.reload(config)
            self.loop.post(self._listen_again)

    def _listen_again(self) -> None:
        """A turn later: 127.0.0.1:5222 can be had only when 0.0.0.0:5222 has been given up."""
        if self.ended_by:
            return
        file = self.server.config.file or "the defaults"
        try:
            self.server.listen()
            log.info("reloaded %s and the certificates", file)
        except ConfigError as error:
            log.error("reloaded %s, but %s", file, error)

    def _not_reloaded(self, error: BaseException) -> None:
        """Tell the owner; a bug is told with where it is."""
        is_bug = not isinstance(error, ConfigError)
        log.error("not reloaded, everything stays as it was: %s", error, exc_info=error if is_bug else None)

    def _look_after_certificates(self) -> None:
        """Renew our own when it is time, and notice when the owner's have been renewed."""
        self.loop.call_later(CERTIFICATE_INTERVAL, self._look_after_certificates)
        self.loop.offload(self.certificates.renew, then=lambda _: self._use_changed_certificates())

    def _use_changed_certificates(self) -> None:
        if self.certificates.changed() and self.certificates.reload():
            log.info("the certificates have changed; new connections get the new ones")


def prepare_certificates(config: Config) -> None:
    """Make a certificate for the hosts of `config` if it is for us to make; slow, any thread; raises ConfigError."""
    if config.tls is None:
        ensure_certificates(config.data, config.hosts)


def run(options: argparse.Namespace) -> int:
    """Serve."""
    set_up_logging(logging.DEBUG if options.verbose else logging.INFO)
    try:
        return Run(configured(options), options).serve()
    except ConfigError as error:
        log.error("%s", error)
        return 1


def greeting(server: Server, authority: Path | None, command: str) -> Iterator[str]:
    """Yield what an owner wants to know when the server has started; `command` begins what can be typed next."""
    config = server.config
    yield f"xmppd {__version__}, configured by {config.file or 'nothing: every setting has its default'}"
    yield f"serving {', '.join(config.hosts)}; everything is kept in {config.data}"
    if authority is not None:
        yield (
            f"clients must trust our certification authority once: {authority}, "
            f"SHA-256 fingerprint {fingerprint(authority)}"
        )
    if not any(True for host in config.hosts for _ in server.accounts.owners(host)):
        yield f"there are no accounts yet; add the first with: {command} user add alice@{config.hosts[0]}"
    for name in unserved_domains(config):
        yield f"there are accounts of {name}, which is not served; to serve it, add it to hosts"


def unserved_domains(config: Config) -> list[str]:
    """Return the domains that have accounts in the data folder and aren't served.

    With the default host that happens when the machine gets another name, and people then
    think that their accounts are lost.
    """
    served = {folder_name(host) for host in config.hosts}
    return sorted(path.parent.name for path in config.data.glob("*/accounts") if path.parent.name not in served)


def fingerprint(certificate: Path) -> str:
    """Return the SHA-256 fingerprint of a certificate as people compare it, in pairs of hexadecimal digits."""
    return hashlib.sha256(load_certificate(certificate).der).digest().hex(":").upper()


# -- init


def init(options: argparse.Namespace) -> int:
    """Write a configuration; never over one that is there."""
    import tomli_w

    path = options.config or own_config_path()
    settings = initial_settings(options)
    text = INIT_HEADING + tomli_w.dumps(settings)
    if path.exists():
        raise ConfigError(f"{path} exists already; edit it, or move it out of the way")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # 0600, since secrets of components will be in it.
        with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; name another place with --config") from error
    load_config(path)
    host = settings["hosts"][0]
    options.data = None  # it is in the file now
    print(f"wrote {path}")
    print(f"next: {this_command(options)} user add alice@{host}")
    print(f"then: {this_command(options)} run")
    return 0


INIT_HEADING = """\
# The configuration of xmppd. Every key has a default, so what is not here is not missing;
# example.toml, which comes with xmppd, has them all. After a change: xmppd check, then
# restart, or send SIGHUP.

"""


def initial_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a new configuration: what differs from machine to machine; raises ConfigError."""
    config = Config()
    hosts = list(options.hosts) or list(config.hosts)
    for host in hosts:
        try:
            prepare_domain(host)
        except ValueError as error:
            raise ConfigError(f"expected a domain such as example.org, found '{host}'; {error}") from error
    return {
        "hosts": hosts,
        "data": str((options.data or config.data).absolute()),
        "listen": {name: list(map(str, getattr(config.listen, name))) for name in ("client", "client_tls")},
        "registration": {"open": config.registration_open},
    }


# -- user


def new_password(options: argparse.Namespace, jid: JID) -> str:
    """Return the password to set: from a terminal, twice, or the first line of stdin; raises ConfigError."""
    if options.password_stdin:
        return usable_password(read_password_line())
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask for a password; give it on stdin with --password-stdin")
    for _ in range(PASSWORD_ATTEMPTS):
        if password := ask_password(jid):
            return password
    raise ConfigError(f"no usable password after {PASSWORD_ATTEMPTS} attempts; nothing has changed")


def read_password_line() -> str:
    """Return the first line of stdin without its end; raises ConfigError."""
    line = sys.stdin.buffer.readline(MAX_PASSWORD_LINE)
    try:
        return line.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ConfigError("the password on stdin is not UTF-8; convert it") from error


def usable_password(password: str) -> str:
    """Return `password` if people can log in with it (RFC 4013); raises ConfigError.

    What is prepared here is prepared again at every login; that it has a form is the point.
    """
    if not password:
        raise ConfigError("the password is empty; nothing has changed")
    try:
        saslprep(password)
    except ValueError as error:
        raise ConfigError(f"this password cannot be used: {error}") from error
    return password


def ask_password(jid: JID) -> str:
    """Ask for a password twice; return "" and say why if it cannot be taken.

    A person is held to a minimum length. A script isn't: it may have the password from
    another server, where people know it already.
    """
    import getpass

    password = getpass.getpass(f"New password for {jid}: ")
    try:
        usable_password(password)
    except ConfigError as error:
        complain(str(error))
        return ""
    if len(password) < MIN_PASSWORD:
        complain(f"that is shorter than {MIN_PASSWORD} characters; three or four words make a good password")
        return ""
    if getpass.getpass("The same again: ") != password:
        complain("the two differ")
        return ""
    return password


def user_add(options: argparse.Namespace) -> int:
    """Create an account."""
    return set_password(options, "user add", "added")


def user_passwd(options: argparse.Namespace) -> int:
    """Set another password."""
    return set_password(options, "user passwd", "new password set for")


def set_password(options: argparse.Namespace, command: str, done: str) -> int:
    """Ask for a password and let `command` have the credentials made of it: passwords go nowhere."""
    config = configured(options)
    jid = parse_account(options.jid, config)
    credentials = make_credentials(new_password(options, jid), digest_md5=jid if config.compat.digest_md5 else None)
    perform(config, command, {"jid": str(jid), "credentials": credentials})
    print(f"{done} {jid}")
    return 0


def user_remove(options: argparse.Namespace) -> int:
    """Remove an account, with a question at a terminal."""
    config = configured(options)
    jid = parse_account(options.jid, config)
    if not options.yes:
        if not sys.stdin.isatty():
            raise ConfigError(f"removing {jid} cannot be undone; if you are sure: --yes")
        if input(f"Remove {jid} with contacts and messages? This cannot be undone. [y/N] ").strip().lower() != "y":
            raise ConfigError("nothing has changed")
    perform(config, "user remove", {"jid": str(jid)})
    print(f"removed {jid}")
    return 0


def user_list(options: argparse.Namespace) -> int:
    """Print all accounts, one per line."""
    config = configured(options)
    try:
        arguments = {"domain": prepare_domain(options.domain)} if options.domain else {}
    except ValueError as error:
        raise ConfigError(f"expected a domain such as {config.hosts[0]}, found '{options.domain}'; {error}") from error
    users = perform(config, "user list", arguments)["users"]
    if options.json:
        print(json.dumps(users, ensure_ascii=False))
    else:
        for user in users:
            print(user)
    return 0


def user_show(options: argparse.Namespace) -> int:
    """Print what is known about one account."""
    config = configured(options)
    user = perform(config, "user show", {"jid": str(parse_account(options.jid, config))})
    if options.json:
        print(json.dumps(user, ensure_ascii=False))
        return 0
    print(user["jid"])
    print(f"  created           {user['created'] or 'unknown'}")
    print(f"  last seen         {'now' if user['sessions'] else user['last_seen'] or 'never'}")
    print(f"  contacts          {user['contacts']}")
    print(f"  offline messages  {user['offline']}")
    print(f"  sessions          {len(user['sessions'])}")
    for session in user["sessions"]:
        presence = "available" if session["available"] else "unavailable"
        print(printable(f"    {session['resource']}, {presence}, since {session['since']}, from {session['peer']}"))
    return 0


# -- status


def status(options: argparse.Namespace) -> int:
    """Print what runs; exit status 1 if nothing does."""
    config = configured(options)
    found = running_status(config)
    if options.json:
        print(json.dumps({"running": True, **found} if found else {"running": False, "data": str(config.data)}))
    elif not found:
        print(f"no server runs on {config.data}; start one with: {this_command(options)} run")
    else:
        memory = f"{found['memory'] / 1e6:.0f} MB" if found["memory"] else "unknown"
        print(f"xmppd {found['version']} runs since {found['started']}, process {found['pid']}")
        print(f"  hosts     {', '.join(found['hosts'])}")
        print(f"  data      {found['data']}")
        print(f"  listens   {', '.join(found['listeners'])}")
        print(f"  sessions  {found['sessions']}")
        print(f"  memory    {memory}")
    return 0 if found else 1


def running_status(config: Config) -> dict[str, Any] | None:
    """Return the status of the server that runs on this data folder, None without one; raises ConfigError."""
    try:
        with ControlClient(config.data) as server:
            return server.request("status", {})
    except ServerAbsent:
        return None


# -- pack: the zipapp, one file that Python runs (PEP 441). Python imports from inside it, bytecode
# before source. The source is there too: it is what tracebacks quote, what people read, and what
# another version of Python runs.
#
#     __main__.py                      xmppd.py, xmppd.pyc
#     defusedxml/…  platformdirs/…     packed/linux-x86_64.cpython-311-x86_64-linux-gnu.zip
#     tomli_w/…     *.dist-info/…      (`cryptography`, which chapter 9 unpacks when it is needed)

COMPILED_PACKAGES = {"cryptography": "cryptography", "_cffi_backend": "cffi"}  # the second is a part of what it needs
EXTRAS = {"dns": "dnspython", "h11": "h11", "ifaddr": "ifaddr", "segno": "segno", "wsproto": "wsproto",
          "zeroconf": "zeroconf"}  # taken along if they are installed, and pure Python  # fmt: skip
ZIPAPP_SHEBANG = b"#!/usr/bin/env python3\n"
ZIPAPP_MAIN = """\
import sys

if sys.version_info < (3, 11):
    sys.exit("xmppd: needs Python 3.11 or newer; this is " + sys.version.split()[0])

import xmppd

sys.exit(xmppd.main())
"""
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the first there is; one date for all, so that equal contents make equal archives
COMPILE_TIMEOUT = 300.0  # seconds; 1.5 on a desktop


def pack(options: argparse.Namespace) -> int:
    """Write a zipapp with this program and its packages."""
    import inspect
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "__main__.py").write_bytes(ZIPAPP_MAIN.encode())
        (folder / "xmppd.py").write_bytes(inspect.getsource(sys.modules[__name__]).encode())
        pure = {module: package for module, package in PACKAGES.items() if module not in COMPILED_PACKAGES}
        for module, package in (pure | EXTRAS).items():
            copy_package(module, package, folder)
        for module, package in EXTRAS.items():
            leave_out_compiled(folder, module, package)
        add_bytecode(folder)
        if not options.pure:
            add_compiled_packages(folder)
        content = zip_of(folder, ZIPAPP_SHEBANG)
    write_program(options.output, content)
    inside = "without `cryptography`" if options.pure else f"with `cryptography` for {platform_tag()}"
    print(f"wrote {options.output}, {len(content) / 1e6:.1f} MB, {inside}")
    print(f"next: python3 {options.output}")
    return 0


def copy_package(module: str, package: str, folder: Path) -> None:
    """Copy a package, without bytecode and with its licence, from where Python finds it, another zipapp included."""
    from importlib import metadata, resources, util

    spec = util.find_spec(module)
    if spec is None or spec.origin is None:
        return
    if spec.submodule_search_locations is not None:
        copy_resources(resources.files(module), folder / module)
    elif os.path.isfile(spec.origin):  # else it is a part of the interpreter
        (folder / Path(spec.origin).name).write_bytes(Path(spec.origin).read_bytes())
    try:
        about = metadata.distribution(package).files or ()
    except metadata.PackageNotFoundError:
        return
    for path in about:
        if re.search(r"\.dist-info/(METADATA|RECORD|.*(LICEN[CS]E|COPYING|NOTICE).*)$", str(path)):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(path.read_binary())


def copy_resources(source: Traversable, folder: Path) -> None:
    """Copy a folder of a package, which may lie inside an archive."""
    folder.mkdir()
    for entry in source.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            copy_resources(entry, folder / entry.name)
        elif entry.is_file() and not entry.name.endswith(".pyc"):
            (folder / entry.name).write_bytes(entry.read_bytes())


def leave_out_compiled(folder: Path, module: str, package: str) -> None:
    """Remove a package again, and what is said about it, if a part of it is compiled."""
    import shutil

    if any(path.suffix in (".so", ".pyd") for path in (folder / module).rglob("*")):
        for path in (folder / module, *folder.glob(f"{package}-*.dist-info")):
            shutil.rmtree(path)


def add_bytecode(folder: Path) -> None:
    """Compile all files of a folder; raises ConfigError.

    In a process of its own: bytecode differs by what else the interpreter has in memory.
    """
    import subprocess

    # Unchecked, since the files' dates say nothing. The path is for tracebacks.
    options = ["-q", "-b", "--invalidation-mode", "unchecked-hash", "-s", str(folder), "-p", "xmppd.pyz", str(folder)]
    command = [sys.executable, "-I", "-S", "-m", "compileall", *options]
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=COMPILE_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"cannot compile the program: {error}; is this Python whole?") from error


def add_compiled_packages(folder: Path) -> None:
    """Add `cryptography` for this platform; raises ConfigError if this is a zipapp that brings none."""
    import tempfile

    try:
        sys.path += packages_path()
    except ConfigError as error:
        raise ConfigError(f"{error}; install it, or pack without: --pure") from error
    with tempfile.TemporaryDirectory() as name:
        for module, package in COMPILED_PACKAGES.items():
            copy_package(module, package, Path(name))
        (folder / PACKED).mkdir()
        (folder / packed_name()).write_bytes(zip_of(Path(name)))


def zip_of(folder: Path, heading: bytes = b"") -> bytes:
    """Return a ZIP file with all files of a folder, which depends on nothing but their names and contents."""
    import io
    import zipfile

    buffer = io.BytesIO()
    buffer.write(heading)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, path in sorted(files.items()):
            info = zipfile.ZipInfo(name, ZIP_DATE)
            info.create_system, info.external_attr = 3, 0o644 << 16  # Unix, wherever this runs
            archive.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def write_program(path: Path, content: bytes) -> None:
    """Replace a file by one that can be executed, wholly or not at all; raises ConfigError."""
    import contextlib

    new = path.with_name(f"{path.name}.new")
    try:
        with open(new, "wb", opener=lambda name, flags: os.open(name, flags, 0o777)) as file:  # umask takes from that
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where there is no such folder, there is no such file
            new.unlink()
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; name another place") from error


# -- check


class Finding(NamedTuple):
    """What `check` found: a statement, and if it is a problem, what to do about it."""

    text: str
    remedy: str = ""


def check(options: argparse.Namespace) -> int:
    """Print every item with "ok" or "problem"; exit status 0 only if all is well.

    With a domain: what other servers and clients see of it. Without: what the owner's machine has.
    """
    problems = 0
    for finding in check_domain(options) if options.domain else find_everything(options):
        line = f"problem: {finding.text}; remedy: {finding.remedy}" if finding.remedy else f"ok: {finding.text}"
        print(printable(line), flush=True)
        problems += bool(finding.remedy)
    print(f"{problems} {'problem' if problems == 1 else 'problems'}" if problems else "all is well")
    return 1 if problems else 0


def find_everything(options: argparse.Namespace) -> Iterator[Finding]:
    """Yield all findings; without a configuration there is little to look at."""
    yield Finding(f"Python {sys.version.split()[0]} has all packages: {', '.join(found_packages())}")
    yield check_clock(datetime.now(UTC))
    try:
        config = configured(options)
    except ConfigError as error:
        yield Finding(f"configuration: {error}", "correct that, then check again")
        return
    yield Finding(f"configuration: {config.file or 'none, so every setting has its default'}")
    yield Finding(f"hosts: {', '.join(config.hosts)}")
    try:
        running = running_status(config)
    except ConfigError as error:
        yield Finding(f"data: {error}", "check again as that user")
        return
    yield Finding(f"server: runs, process {running['pid']}" if running else "server: does not run")
    yield from check_data(config.data)
    for name in unserved_domains(config):
        yield Finding(f"data: {name} has accounts and is not served", "add it to hosts, or remove its folder")
    yield from check_certificates(config)
    yield from check_ports(config, running)


def check_clock(now: datetime) -> Finding:
    """A small computer without a battery wakes up decades ago: then no certificate is valid yet."""
    if now < CLOCK_START:
        return Finding(f"clock: it says {now:%Y-%m-%d}", "set it, or have it set: timedatectl set-ntp true")
    return Finding(f"clock: {now:%Y-%m-%d %H:%M} UTC")


def check_data(data: Path) -> Iterator[Finding]:
    """Yield findings about the data folder: there, ours, private, with room."""
    import shutil

    there = next(folder for folder in (data, *data.parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding(f"data: {there} cannot be written by this user", f"sudo chown -R {user_name()} {there}")
    elif there != data:
        yield Finding(f"data: {data} will be made at the first start")
    elif os.name == "posix" and (mode := data.stat().st_mode & 0o077):
        yield Finding(f"data: others may look into {data} (mode {mode:03o})", f"chmod 700 {data}")
    else:
        yield Finding(f"data: {data}")
    free = shutil.disk_usage(there).free
    remedy = "make room, or set data to a larger disk" if free < LOW_DISK else ""
    yield Finding(f"disk: {free // 1_000_000} MB free", remedy)


def user_name() -> str:
    """Return the name of who runs this, for advice."""
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container without /etc/passwd
        return str(os.getuid())


def check_certificates(config: Config) -> Iterator[Finding]:
    """Yield findings about certificates: readable, for all hosts, with their keys, and valid for a while."""
    try:
        if config.tls is None:
            packed_packages()
    except ConfigError as error:
        yield Finding(f"certificate: {error}", "python3 -m pip install cryptography, or set [tls] certificate and key")
    own = config.data / "tls" / "leaf.pem"
    if config.tls is None and not own.exists():
        yield Finding("certificate: our own authority will make one at the first start")
        return
    try:
        expires = certificates_expire(config, own)
    except ConfigError as error:
        yield Finding(f"certificate: {error}", "see [tls] in the configuration")
        return
    days = (expires - datetime.now(UTC)).days
    # Our own is renewed by the running server long before.
    late = config.tls is not None and days < CERTIFICATE_WARNING
    yield Finding(f"certificate: expires in {days} days", "renew it, then send the server SIGHUP" if late else "")
    if config.tls is None:
        authority = config.data / "tls" / "ca.pem"
        yield Finding(f"authority: {authority}, SHA-256 fingerprint {fingerprint(authority)}")


def certificates_expire(config: Config, own: Path) -> datetime:
    """Return when the first certificate expires, having looked at all of them; raises ConfigError."""
    if config.tls is not None:
        return Certificates(config).expires_at()
    certificate = server_context(own, own.with_suffix(".key")).certificate
    for host in config.hosts:
        check_certificate(certificate, own, host)
    return certificate.not_after


def check_ports(config: Config, running: Mapping[str, Any] | None) -> Iterator[Finding]:
    """Yield a finding for each address that the server listens on, or would."""
    held = set(running["listeners"]) if running else set()
    for name in LISTENERS:
        for address in getattr(config.listen, name) if name != "component" or config.components else ():
            if address.family == socket.AF_INET6 and not machine_has_ipv6():
                yield Finding(f"port: {name} {address} is left out, for this machine has no IPv6")
                continue
            label = f"{name} {address}"
            remedy = "" if label in held else port_remedy(address)
            state = "is ours" if label in held else "cannot be had" if remedy else "is free"
            yield Finding(f"port: {label} {state}", remedy)


def port_remedy(address: Address) -> str:
    """Return what to do so that this address can be listened on, "" if it can be."""
    try:
        with socket.socket(address.family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if address.family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind((address.host, address.port))
    except OSError as error:
        return _listen_remedy(error)
    return ""


# -- specs


def specs(options: argparse.Namespace) -> int:
    """Print which specifications are supported, or how far the compliance suites are met (XEP-0479)."""
    rows = compliance_table() if options.compliance else supported_specs()
    if options.json:
        print(json.dumps({"rows": rows, "levels": levels_reached()} if options.compliance else rows))
        return 0
    print_columns(rows)
    if options.compliance:
        print("\nXMPP Compliance Suites 2023 (XEP-0479):")
        print_columns([(category, level or "not reached") for category, level in levels_reached().items()])
    return 0


def compliance_table() -> list[tuple[str, str, str, str, str]]:
    """Return (category, level, feature, specifications, "yes" or what is missing): README's table."""
    return [
        (row.category, row.level, row.feature, ", ".join(row.providers), f"no: {', '.join(lack)}" if lack else "yes")
        for row, lack in compliance()
    ]


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose columns are as wide as they have to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip())


# -- check DOMAIN: as others see it
#
# The same steps that another server or a client takes: names, addresses, TCP, the stream, TLS, the
# certificate, what is offered. The first that fails ends the way, and is told with its remedy.

PROBE_TIMEOUT = 8.0  # seconds for one answer; people wait for this command
REMEDY_REACH = "is the server running, does the firewall let port {} in, does the router forward it?"
REMEDY_CERTIFICATE = "get a certificate for {} (Let's Encrypt gives them away) and name it in [tls]"


class Unhealthy(Exception):
    """A step failed; its finding is the only argument."""


class Probe:
    """A connection to one address of a service, which goes as far as one can go without logging in."""

    def __init__(self, domain: str, service: str, target: Target, address: str, sender: str) -> None:
        self.domain = domain
        self.direct = target.direct_tls
        self.namespace = SERVER if service == "xmpp-server" else CLIENT
        self.service = service
        self.sender = sender
        self._parser = StreamParser(self.namespace)
        self._socket = socket.create_connection((address, target.port), PROBE_TIMEOUT)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def open_stream(self) -> Element:
        """Open a stream and return its features (RFC 6120 §4.2, §4.3.2); raises Unhealthy."""
        self._parser.close()
        self._parser = StreamParser(self.namespace)
        attributes = {"to": self.domain, "version": "1.0", **({"from": self.sender} if self.sender else {})}
        header = f"<stream:stream xmlns='{self.namespace}' xmlns:stream='{STREAMS}'"
        self._socket.sendall(f"<?xml version='1.0'?>{header}{_attributes(Element('stream', attributes))}>".encode())
        opened = self._next()
        if not isinstance(opened, Opened) or opened.tag != STREAMS("stream"):
            raise Unhealthy(Finding("it does not speak XMPP", "is another program listening on this port?"))
        return self._expect(STREAMS("features"))

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Negotiate TLS, after STARTTLS where that comes first; raises Unhealthy, OSError."""
        if not self.direct:
            if self.open_stream().find(TLS("starttls")) is None:
                raise Unhealthy(Finding("it offers no STARTTLS", "give that server a certificate, and switch TLS on"))
            self._socket.sendall(serialize(E(TLS("starttls"))).encode())
            self._expect(TLS("proceed"))
        self._socket = context.wrap_socket(self._socket, server_hostname=ascii_domain(self.domain).strip("[]"))

    def certificate(self) -> Certificate:
        """Return the server's certificate, verified or not; raises ValueError when it can't be read."""
        assert isinstance(self._socket, ssl.SSLSocket)
        return read_certificate(self._socket.getpeercert(binary_form=True) or b"")

    def _expect(self, tag: str) -> Element:
        event = self._next()
        if not isinstance(event, Element) or event.tag != tag:
            raise Unhealthy(self._surprise(event))
        return event

    def _surprise(self, event: Event) -> Finding:
        if isinstance(event, Element) and event.tag == STREAMS("error"):
            condition = local_name(event[0].tag) if len(event) else "an error"
            if condition in ("host-unknown", "host-gone"):
                return Finding(f"it does not serve {self.domain} ({condition})", "add it to that server's hosts")
            return Finding(f"it ends the stream with {condition}", "look into that server's log")
        return Finding("it does not follow RFC 6120", "is it an XMPP server of this century?")

    def _next(self) -> Event:
        while (event := self._parser.next()) is None:
            data = self._socket.recv(READ_SIZE)
            if not data:
                raise Unhealthy(Finding("it hangs up without a word", "look into that server's log"))
            self._parser.feed(data)
        return event


def check_domain(options: argparse.Namespace) -> Iterator[Finding]:
    """Yield what clients and other servers find on their way to a domain."""
    config = configured(options)
    try:
        domain = read_domain(options.domain)
    except Unexpected as error:
        raise ConfigError(f"expected {error.expected}, found '{options.domain}'") from error
    if not has_dnspython():
        yield Finding("SRV records can't be looked up", "python3 -m pip install dnspython")
    for service in SERVICE_PORTS:
        yield from (Finding(f"{service}: {text}", remedy) for text, remedy in check_service(config, domain, service))


def check_service(config: Config, domain: str, service: str) -> Iterator[Finding]:
    """Yield what is found on the way to one service of a domain (RFC 6120 §3.2)."""
    found = Lookup(domain, service, nameservers=config.federation_nameservers).find()
    for problem in found.problems:
        yield Finding(problem, "does the name server answer, and know this domain?")
    if found.is_guess:
        yield Finding(f"no SRV records _{service}._tcp.{domain}, so its own address and port {SERVICE_PORTS[service]}")
    elif not found.records:
        yield Finding("DNS says: no such service", f"remove the record _{service}._tcp.{domain} whose target is '.'")
    for record in sorted(found.records):
        way = "TLS from the first byte" if record.direct_tls else "STARTTLS"
        addresses = ", ".join(found.addresses[record.host])
        remedy = "" if addresses else f"add an A or AAAA record for {record.host}"
        yield Finding(f"{record.host} port {record.port}, {way}: {addresses or 'has no address'}", remedy)
    sender = "" if domain in config.hosts or service == "xmpp-client" else config.hosts[0]
    for target in found.targets():
        for address in target.addresses:
            prefix = f"{address} port {target.port}: "
            for text, remedy in check_address(domain, service, target, address, sender):
                yield Finding(prefix + text, remedy)


def check_address(domain: str, service: str, target: Target, address: str, sender: str) -> Iterator[Finding]:
    """Yield what one address of a service is like."""
    if ":" in address and not machine_has_ipv6():
        yield Finding("left out, for this machine has no IPv6")
        return
    try:
        probe = Probe(domain, service, target, address, sender)
    except OSError as error:
        yield Finding(f"can't be reached ({error.strerror or error})", REMEDY_REACH.format(target.port))
        return
    try:
        yield from check_stream(probe)
        yield check_issuer(Probe(domain, service, target, address, sender))
    except Unhealthy as problem:
        yield problem.args[0]
    except (OSError, ValueError) as error:
        yield Finding(f"the connection fails ({error})", "look into that server's log")
    finally:
        probe.close()


def probe_context(probe: Probe, *, verify: bool) -> ssl.SSLContext:
    """Return a context for looking at a server."""
    context = ssl.create_default_context()
    context.check_hostname = False  # by our own rules, which know SRV-ID and XmppAddr
    context.verify_mode = ssl.CERT_REQUIRED if verify else ssl.CERT_NONE
    if probe.direct:
        context.set_alpn_protocols([probe.service])
    return context


def check_stream(probe: Probe) -> Iterator[Finding]:
    """Yield what a stream has to offer; raises Unhealthy, OSError, and ValueError for a broken certificate."""
    probe.start_tls(probe_context(probe, verify=False))
    certificate, domain = probe.certificate(), probe.domain
    names = ", ".join(certificate.dns_names[:4]) or "nobody"
    covers = certificate.covers(domain, probe.service)
    remedy = "" if covers else REMEDY_CERTIFICATE.format(domain)
    yield Finding(f"its certificate is for {names}{'' if covers else f' and not for {domain}'}", remedy)
    late = certificate.not_after <= datetime.now(UTC)
    yield Finding(f"it {'has expired on' if late else 'is valid until'} {certificate.not_after:%Y-%m-%d}",
                  "renew it, and have that server read it again" if late else "")  # fmt: skip
    features = probe.open_stream()
    mechanisms = [child.text or "" for child in features.iter(SASL("mechanism"))]
    others = [local_name(child.tag) for child in features if child.tag != SASL("mechanisms")]
    lost = not mechanisms and probe.service == "xmpp-client"
    yield Finding(f"it offers {', '.join(mechanisms) or 'no SASL mechanism'}; {', '.join(others) or 'nothing else'}",
                  "let people log in by SASL" if lost else "")  # fmt: skip


def check_issuer(probe: Probe) -> Finding:
    """Return whether this machine knows the certificate's authority, as other servers and clients might."""
    try:
        probe.start_tls(probe_context(probe, verify=True))
    except ssl.SSLCertVerificationError as error:
        known = "clients have to import its authority, and servers must do with dialback; or "
        return Finding(f"its certificate doesn't verify: {error.verify_message}",
                       known + REMEDY_CERTIFICATE.format(probe.domain))  # fmt: skip
    finally:
        probe.close()
    return Finding("its certificate is from an authority that this machine knows")


# -- the command line


DESCRIPTION = """\
A complete XMPP server: chat for a household, a school, a club, in one file.

Without a command it serves this machine's name, keeps everything in your data folder,
and says what to do next. Nothing has to be configured.
"""

EXAMPLES = """\
first steps:
  xmppd                                    serve; leave it running, use another terminal
  xmppd user add alice@myhost.local        add an account; the server may be running
  xmppd status                             see who is there

with a domain of your own:
  xmppd --config xmppd.toml init example.org
  xmppd --config xmppd.toml check          ports, certificate, disk: is all well?
  xmppd check example.org                  what do others find there: DNS, ports, certificate?
  xmppd --config xmppd.toml run

without --config, the configuration is $XMPPD_CONFIG, or xmppd.toml in your folder for
configurations, or /etc/xmppd/xmppd.toml, or none. Send SIGHUP to read it again, SIGTERM to end.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; each command names its function as `function`."""
    parser = argparse.ArgumentParser(
        "xmppd", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=version_line())
    add_common_options(parser, None)
    parser.set_defaults(function=run, verbose=False, trace=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    serving = add_command(commands, "run", run, "serve until SIGTERM; this is what xmppd does without a command")
    serving.add_argument("--trace", action="store_true", help="print every stanza, and the rule that decided its fate; "
                         "passwords are masked, what people write is not")  # fmt: skip
    serving.add_argument("-v", "--verbose", action="store_true", help="log more, such as lost connections")
    writing = add_command(commands, "init", init, "write a configuration to begin with")
    writing.add_argument("hosts", nargs="*", metavar="HOST", help="domains to serve; default: this machine's name")
    add_user_commands(commands)
    shown = add_command(commands, "status", status, "what runs, since when, sessions, memory; exit status 1 if nothing")
    shown.add_argument("--json", action="store_true", help="print JSON")
    text = "look at configuration, certificate, ports, disk, or at a domain; say what to mend"
    checking = add_command(commands, "check", check, text)
    text = "a domain, to be looked at as others see it: DNS, ports, certificate, login"
    checking.add_argument("domain", nargs="?", metavar="DOMAIN", help=text)
    known = add_command(commands, "specs", specs, "print the specifications that are supported")
    known.add_argument("--compliance", action="store_true", help="print what the compliance suites ask (XEP-0479)")
    known.add_argument("--json", action="store_true", help="print JSON")
    packing = add_command(commands, "pack", pack, "write xmppd.pyz: the program with its packages, for other machines")
    packing.add_argument("output", nargs="?", type=Path, default=Path("xmppd.pyz"), metavar="FILE", help="its name")
    packing.add_argument("--pure", action="store_true", help="leave out what is compiled: `cryptography`")
    return parser


def add_user_commands(commands: Any) -> None:
    """Add `user` and the commands below it."""
    user = add_command(commands, "user", None, "add and remove accounts, set passwords; the server may be running")
    below = user.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, function, text in (
        ("add", user_add, "add an account"),
        ("passwd", user_passwd, "set another password"),
    ):
        changing = add_command(below, name, function, f"{text}; asks for the password")
        changing.add_argument("jid", metavar="JID", help="the address, such as alice@example.org")
        changing.add_argument("--password-stdin", action="store_true", help="take the first line of stdin as password")
    removing = add_command(below, "remove", user_remove, "remove an account with contacts and messages; asks first")
    removing.add_argument("jid", metavar="JID")
    removing.add_argument("--yes", action="store_true", help="don't ask")
    listing = add_command(below, "list", user_list, "print all accounts")
    listing.add_argument("domain", nargs="?", metavar="DOMAIN", help="only those of this host")
    listing.add_argument("--json", action="store_true", help="print JSON")
    showing = add_command(below, "show", user_show, "print what is known about an account")
    showing.add_argument("jid", metavar="JID")
    showing.add_argument("--json", action="store_true", help="print JSON")


def add_command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int] | None, text: str
) -> argparse.ArgumentParser:
    """Add a command that calls `function`; the common options may stand before or behind its name."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    add_common_options(parser, argparse.SUPPRESS)
    if function is not None:
        parser.set_defaults(function=function)
    return parser


def add_common_options(parser: argparse.ArgumentParser, default: str | None) -> None:
    """Add the options that every command has."""
    parser.add_argument("--config", type=Path, metavar="FILE", default=default, help="the configuration")
    parser.add_argument("--data", type=Path, metavar="DIR", default=default, help="the data folder, whatever FILE says")


def version_line() -> str:
    """Return the versions that a report of a mistake should name."""
    return f"xmppd {__version__} (Python {sys.version.split()[0]}, {ssl.OPENSSL_VERSION}, {expat.EXPAT_VERSION})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says and return the exit status."""
    options = build_parser().parse_args(arguments)
    set_up_logging(logging.WARNING)
    if missing := missing_packages():
        names = f'package "{missing[0]}" is' if len(missing) == 1 else f'packages "{", ".join(missing)}" are'
        complain(f"the Python {names} missing; get it with: python3 -m pip install {' '.join(PACKAGES.values())}")
        return 1
    try:
        status: int = options.function(options)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 128 + signal.SIGINT
    except EOFError:  # ^D instead of an answer
        print(file=sys.stderr)
        complain("no answer was given; nothing has changed")
        return 1
    except BrokenPipeError:
        # Who read our output has seen enough. What is left would fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


# What a fresh interpreter runs instead of the script: the same file, imported.
BYTECODE_PROGRAM = "import sys; sys.path[0] = sys.argv[1]; del sys.argv[:2]; import xmppd; sys.exit(xmppd.main())"
# Options of the interpreter that somebody gave for a reason, and that would have to be handed over too.
ODD_FLAGS = ("debug", "dev_mode", "ignore_environment", "inspect", "interactive", "isolated", "no_site", "optimize",
             "safe_path", "verbose")  # fmt: skip


def hand_over_to_bytecode() -> None:
    """Replace this process by one that runs the same from bytecode; return if that is impossible or odd.

    Python compiles a script at every start, and the memory that took is never given back:
    [measured] 47 MB for this server instead of 26. An imported module is compiled once and
    kept in __pycache__. That costs a tenth of a second, so only a server does it; other
    commands end before it would have paid.
    """
    from importlib.machinery import SourceFileLoader
    from importlib.util import cache_from_source

    here = Path(__file__).resolve()
    is_script = __spec__ is None and here.name == "xmppd.py" and os.name == "posix"  # -m runs from bytecode already
    is_odd = sys.warnoptions or sys._xoptions or any(getattr(sys.flags, name) for name in ODD_FLAGS)
    is_watched = sys.gettrace() or sys.getprofile()
    if not is_script or is_odd or is_watched or sys.dont_write_bytecode or not sys.executable:
        return
    SourceFileLoader("xmppd", str(here)).get_code("xmppd")  # compiles and keeps it, unless that was done before
    if not os.path.exists(cache_from_source(str(here))):
        return
    try:
        os.execv(sys.executable, [sys.executable, "-c", BYTECODE_PROGRAM, str(here.parent), *sys.argv])
    except OSError:
        return


if __name__ == "__main__":
    if build_parser().parse_args().function is run and not missing_packages():
        hand_over_to_bytecode()
    sys.exit(main())
