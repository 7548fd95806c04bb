"""Two people with @xmpp/client, a JavaScript library of other people (chat.mjs), over TLS with verification."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.servers import ProcessServer

HERE = Path(__file__).parent
LIBRARY = Path(__file__).parent.parent / "node_modules" / "@xmpp" / "client"


@pytest.fixture
def node() -> str:
    """The path of node; without it or its library these tests are skipped, but never in continuous integration."""
    program = shutil.which("node")
    if program is not None and LIBRARY.is_dir():
        return program
    missing = "node is not installed" if program is None else "@xmpp/client is not installed: npm ci --prefix tests"
    if "CI" in os.environ:
        pytest.fail(missing)
    pytest.skip(missing)


def chat(
    node: str, port: int, environment: dict[str, str], script: str = "chat.mjs"
) -> subprocess.CompletedProcess[str]:
    """Run a script against a server."""
    command = [node, str(HERE / script), f"xmpp://127.0.0.1:{port}"]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=50, check=False
    )


def test_two_people_become_friends_talk_and_miss_nothing(node: str, process_server: ProcessServer) -> None:
    done = chat(node, process_server.port, {"NODE_EXTRA_CA_CERTS": str(process_server.authority)})
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr


def test_the_certificate_is_verified(node: str, process_server: ProcessServer) -> None:
    """The test above proves little if the client would trust anybody."""
    done = chat(node, process_server.port, {"NODE_EXTRA_CA_CERTS": ""})
    assert done.returncode == 1
    assert "certificate" in done.stderr


def test_a_client_comes_back_with_a_token(node: str, process_server: ProcessServer) -> None:
    """XEP-0388, XEP-0386, XEP-0484; a token that isn't good costs one attempt, then the password counts."""
    environment = {"NODE_EXTRA_CA_CERTS": str(process_server.authority)}
    done = chat(node, process_server.port, environment, "fast.mjs")
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr


def test_a_client_comes_back_after_a_cut(node: str, process_server: ProcessServer) -> None:
    """XEP-0198 §5, as the library resumes: inside SASL2 (§9.2)"""
    environment = {"NODE_EXTRA_CA_CERTS": str(process_server.authority)}
    done = chat(node, process_server.port, environment, "resume.mjs")
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr


WEB = pytest.mark.config(listen={"web": ["127.0.0.1:0"]})


@WEB
@pytest.mark.parametrize("script", ["chat.mjs", "fast.mjs"])
def test_all_of_it_works_over_websocket(node: str, process_server: ProcessServer, script: str) -> None:
    """RFC 7395, with SASL2, Bind 2 and FAST inside; the certificate is verified here too."""
    environment = {**os.environ, "NODE_EXTRA_CA_CERTS": str(process_server.authority)}
    service = f"wss://localhost:{process_server.ports['web']}/xmpp-websocket"
    command = [node, str(HERE / script), service]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stdout) == (0, "all well\n"), done.stderr
