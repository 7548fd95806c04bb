"""Who the benchmark's users are, and how each server gets to know them."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
from collections.abc import Iterator
from typing import NamedTuple

HOST = "bench.example"
PASSWORD = "correct horse battery staple"
RESOURCE = "bench"
ITERATIONS = 10_000
SALT = b"sixteen bytes of"

TALKERS = range(0, 200)  # they talk in pairs; the first 100 also have rosters
PRESENT = range(0, 100)
AWAY = range(200, 250)  # to whom messages are sent while they are away
EVERYBODY = range(0, 2200)
CONTACTS = 30  # in each roster


def name_of(number: int) -> str:
    """Return the local part of a user's address."""
    return f"u{number:04d}"


def bare_jid(number: int) -> str:
    """Return a user's bare JID."""
    return f"{name_of(number)}@{HOST}"


def full_jid(number: int, resource: str = RESOURCE) -> str:
    """Return the full JID of a user's session; most have only one."""
    return f"{bare_jid(number)}/{resource}"


def contacts_of(number: int) -> Iterator[int]:
    """Yield whom a user of `PRESENT` has in the roster: the neighbours on both sides, in a circle."""
    for distance in range(1, CONTACTS // 2 + 1):
        yield (number + distance) % len(PRESENT)
        yield (number - distance) % len(PRESENT)


class Keys(NamedTuple):
    """The keys of SCRAM-SHA-1 (RFC 5802 §3)."""

    client: bytes
    stored: bytes
    server: bytes


@functools.cache
def scram_keys(salt: bytes, iterations: int) -> Keys:
    """Return the keys of everybody's password; made once per salt, for they are made to be slow."""
    salted = hashlib.pbkdf2_hmac("sha1", PASSWORD.encode(), salt, iterations)
    client = hmac.digest(salted, b"Client Key", "sha1")
    return Keys(client, hashlib.sha1(client).digest(), hmac.digest(salted, b"Server Key", "sha1"))


class ScramLogin:
    """The client's side of SCRAM-SHA-1 (RFC 5802 §3); texts are as in the XML, in base64."""

    def __init__(self, name: str, nonce: str) -> None:
        self._nonce = nonce
        self._bare = f"n={name},r={nonce}"
        self._expected = b""

    def first(self) -> str:
        """Return what goes into `<auth/>`."""
        return base64.b64encode(f"n,,{self._bare}".encode()).decode()

    def answer(self, challenge: str) -> str:
        """Return what goes into `<response/>`."""
        server_first = base64.b64decode(challenge).decode()
        said = dict(part.split("=", 1) for part in server_first.split(","))
        assert said["r"].startswith(self._nonce), "the server has another nonce"
        keys = scram_keys(base64.b64decode(said["s"]), int(said["i"]))
        final = f"c=biws,r={said['r']}"
        message = f"{self._bare},{server_first},{final}".encode()
        signature = hmac.digest(keys.stored, message, "sha1")
        proof = bytes(a ^ b for a, b in zip(keys.client, signature, strict=True))
        self._expected = b"v=" + base64.b64encode(hmac.digest(keys.server, message, "sha1"))
        return base64.b64encode(f"{final},p={base64.b64encode(proof).decode()}".encode()).decode()

    def check(self, success: str) -> None:
        """Check that the server knows the password too."""
        assert base64.b64decode(success) == self._expected, "the server's signature is wrong"
