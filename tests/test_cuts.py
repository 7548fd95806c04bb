"""Connections that are cut at random lose nothing that was acknowledged (XEP-0198); a small run of `tests.cuts`."""

from __future__ import annotations

import random

import pytest

from tests.cuts import Conversation
from tests.servers import ProcessServer


@pytest.mark.parametrize("forgetful", [False, True])
def test_thirty_cuts_lose_nothing(process_server: ProcessServer, forgetful: bool) -> None:
    """Issue 6: no acknowledged message is lost, nothing comes twice, and in order where nobody forgets a session"""
    seed = random.SystemRandom().randrange(10**6)
    conversation = Conversation(process_server, seed, forgetful=forgetful)
    conversation.run(30)
    assert not conversation.problems(), f"seed {seed}: {conversation.problems()}"
    assert conversation.cuts.total() >= 30
    assert sum(map(len, conversation.confirmed.values())) > 10, conversation.report()
    conversation.goes()
