"""A small internet on this machine: four servers, their certificates, a name server, and wires that can be cut.

    verona      xmppd      127.0.0.2        two domains each: NAME.example has a certificate of the
    mantua      xmppd      127.0.0.3        tests' authority, which all of them trust, and
    prosody     Prosody    127.0.0.4        NAME-self.example one that it has signed itself
    ejabberd    ejabberd   127.0.0.5

The servers find each other by SRV records, those of a domain and of its rooms, and come by a
`Relay` that the test may stop or cut. Prosody and ejabberd are Debian's.
"""

from __future__ import annotations

import base64
import hashlib
import os
import pwd
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import xmppd
from tests.dialogue import CLIENT, Cast, Client, Event, SocketWire, local_name
from tests.gateway import SECRET
from tests.names import NameServer
from tests.servers import ServerProcess, credentials_of, password_of, write_configuration
from tests.test_certificates import certify, dns, write_pair, write_pem

START_TIMEOUT = 60.0  # seconds; ejabberd on a busy machine
STOP_TIMEOUT = 15.0
PATIENCE = 30.0  # seconds for something to arrive from another server
PEOPLE = ("romeo", "juliet")  # with an account in every domain
DISCO_INFO = "http://jabber.org/protocol/disco#info"
FEATURES = ("http://jabber.org/protocol/caps", "urn:xmpp:avatar:metadata+notify")  # of everybody's client
NODE = "https://client.example"
VER = base64.b64encode(hashlib.sha1(("client/pc//Client<" + "".join(f"{name}<" for name in FEATURES)).encode()).digest())
CAPS = f"<c xmlns='http://jabber.org/protocol/caps' hash='sha-1' node='{NODE}' ver='{VER.decode()}'/>"


# ---- wires ----------------------------------------------------------------------------


class Relay:
    """A port at which connections are passed on to a server; it can hold back, or cut them all."""

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self.target = ("", 0)
        self.passed = 0  # connections so far
        self._flows = threading.Event()
        self._flows.set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """Take what comes and pass nothing on."""
        self._flows.clear()

    def cut(self) -> None:
        """Reset all connections, with what was held back; new ones are passed on."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                shut(end)
        self._flows.set()

    def close(self) -> None:
        """Listen no more, and cut what there is."""
        shut(self._listener)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _address = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self.target, 5)
                far.settimeout(None)
            except OSError:
                near.close()
                continue
            self.passed += 1
            self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self._flows.wait()
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def shut(sock: socket.socket) -> None:
    """Close a socket in which a thread may be waiting."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()


# ---- servers --------------------------------------------------------------------------


class Internet:
    """The name server, the certificates and the servers that take part."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="internet-"))
        self.folder.chmod(0o755)
        self.names = NameServer("")
        self.names.__enter__()
        # ejabberd asks DNS for SRV records only; for addresses it asks the system, which doesn't know our name server
        # but knows what an address in the place of a name means.
        self.names_of_ejabberd = NameServer("")
        self.names_of_ejabberd.__enter__()
        self.cast = Cast()
        self._authority = certify([], ca=True, common_name="authority of the tests")
        self.authority = write_pem(self.folder / "authority.pem", self._authority[0])
        self.relays: dict[str, Relay] = {}  # by domain
        self.nodes: list[Node] = []

    def certificates(self, folder: Path, good: str, own: str) -> None:
        """Write a certificate of the authority for `good`, and one of its own for `own`."""
        for domain, issuer in ((good, self._authority), (own, None)):
            names = dns(domain, f"conference.{domain}")
            write_pair(folder, certify(names, issuer=issuer, common_name=domain), domain)

    def publish(self, domain: str, host: str) -> Relay:
        """Let a domain and its rooms be found at a relay on `host`."""
        relay = self.relays[domain] = Relay(host)
        for name in (domain, f"conference.{domain}"):
            self.names.add(f"_xmpp-server._tcp.{name}. 300 IN SRV 5 0 {relay.port} xmpp.{domain}.")
            self.names_of_ejabberd.add(f"_xmpp-server._tcp.{name}. 300 IN SRV 5 0 {relay.port} {host}.")
        self.names.add(f"xmpp.{domain}. 300 IN A {host}")
        return relay

    def close(self) -> None:
        """End everything."""
        self.cast.hang_up()
        for node in self.nodes:
            node.stop()
        for relay in self.relays.values():
            relay.close()
        self.names.__exit__()
        self.names_of_ejabberd.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)


class Node:
    """A server with its two domains; `good` has a certificate that all trust, `own` one that nobody does."""

    user: ClassVar[str] = ""  # whom it insists on being, when root starts it

    def __init__(self, internet: Internet, name: str, host: str) -> None:
        self.internet = internet
        self.name = name
        self.host = host
        self.good, self.own = self.domains = (f"{name}.example", f"{name}-self.example")
        self.folder = internet.folder / name
        self.tls = self.folder / "tls"
        self.tls.mkdir(parents=True)
        internet.certificates(self.tls, self.good, self.own)
        self.relays = [internet.publish(domain, host) for domain in self.domains]
        self.client_port = 0
        self.server_port = 0
        internet.nodes.append(self)

    def start(self) -> None:
        """Start it and wait until it serves."""
        self.run()
        for relay in self.relays:
            relay.target = (self.host, self.server_port)

    def run(self) -> None:
        """Start it; the ports are known then."""
        raise AssertionError("each server has its own way")

    def stop(self) -> None:
        """End it."""

    def person(self, name: str, domain: str) -> Person:
        """Return somebody with an account here, logged in and available."""
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        person = Person(lambda: SocketWire((self.host, self.client_port), context), self.internet.cast, host=domain)
        person.login(name, resource=self.name, mechanism="SCRAM-SHA-1")
        person.sends("<iq type='get' id='roster'><query xmlns='jabber:iq:roster'/></iq>")
        person.awaits("iq", id="roster", type="result")
        person.sends(f"<presence>{CAPS}</presence>")
        person.awaits("presence", from_=person.jid)
        return person


class Xmppd(Node):
    """This repository's server."""

    component_port = 0

    @property
    def gateway(self) -> str:
        """The domain of a component; no certificate is for it."""
        return f"gateway.{self.own}"

    def run(self) -> None:
        """See `Node.run`."""
        self.internet.publish(self.gateway, self.host).target = (self.host, 0)
        config = write_configuration(self.folder, {
            "hosts": list(self.domains),
            "listen": {"client": [f"{self.host}:0"], "server": [f"{self.host}:0"], "client_tls": [], "web": [],
                       "component": [f"{self.host}:0"]},
            "components": {self.gateway: {"secret": SECRET}},
            "tls": {"certificate": str(self.tls)},
            "limits": {"connections_per_address": 0, "connections_per_minute": 0, "logins_per_minute": 0,
                       "bytes_per_second": 0, "remote_bytes_per_second": 0},
            "federation": {
                "enabled": True,
                "nameservers": [self.internet.names.address],
                "ca": str(self.internet.authority),
                "domains": dict.fromkeys(good_domains(), "verified"),
            },
        })  # fmt: skip
        data = self.folder / "data"
        self.process = ServerProcess(config, data)
        ready = self.process.wait_for("ready: ", START_TIMEOUT)
        ports = {kind: int(port) for kind, port in re.findall(r"(\w+) 127\.0\.0\.\d+:(\d+)", ready)}
        self.client_port, self.server_port, self.component_port = ports["client"], ports["server"], ports["component"]
        self.internet.relays[self.gateway].target = (self.host, self.server_port)
        for domain in self.domains:
            for name in PEOPLE:
                with xmppd.ControlClient(data) as control:
                    control.request("user add", {"jid": f"{name}@{domain}", "credentials": credentials_of(name)})

    def stop(self) -> None:
        """See `Node.stop`; its log must tell of no bug."""
        self.process.stop()


def good_domains() -> list[str]:
    """Return the domains with certificates that all trust, and those of their rooms."""
    names = [f"{name}.example" for name in ("verona", "mantua", "prosody", "ejabberd")]
    return names + [f"conference.{name}" for name in names]


class Debian(Node):
    """A server from a Debian package, in the foreground, as the user who it insists on being."""

    ready: ClassVar[str] = ""  # what its output says when it serves

    def __init__(self, internet: Internet, name: str, host: str) -> None:
        super().__init__(internet, name, host)
        self.client_port, self.server_port = free_port(host), free_port(host)
        self.output = self.folder / "output.txt"

    def prepare(self) -> None:
        """Write what it needs."""

    def command(self) -> list[str]:
        """Return how it is started."""
        raise AssertionError("each has its own")

    def run(self) -> None:
        """See `Node.run`."""
        self.prepare()
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            entry = pwd.getpwnam(self.user)
            identity = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
            for path in (self.folder, *self.folder.rglob("*")):
                shutil.chown(path, self.user, self.user)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.command(), cwd=self.folder, env={**environment, **self.environment()}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, **identity,
            )  # fmt: skip
        wait_until(self._serves, lambda: f"{self.name} does not start:\n{self.output.read_text()[-4000:]}", START_TIMEOUT)

    def environment(self) -> dict[str, str]:
        """Return what it wants in its environment."""
        return {"HOME": str(self.folder)}

    def _serves(self) -> bool:
        assert self.process.poll() is None, f"{self.name} has ended:\n{self.output.read_text()[-4000:]}"
        if self.ready not in self.output.read_text():
            return False
        for port in (self.client_port, self.server_port):
            with socket.socket() as probe:
                if probe.connect_ex((self.host, port)):
                    return False
        return True

    def stop(self) -> None:
        """See `Node.stop`."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# Prosody asks the name servers of /etc/resolv.conf at port 53, whatever its configuration says, unless
# Debian's lua-unbound is there; this has either ask ours.
PROSODY_NAMES = """
local udp = require "socket".udp();
local methods = getmetatable(udp).__index;
local setpeername = methods.setpeername;
methods.setpeername = function (self, host, port)
    if port == 53 then host, port = "127.0.0.1", {port}; end
    return setpeername(self, host, port);
end
udp:close();
"""


class Prosody(Debian):
    """Debian's Prosody."""

    user = "prosody"

    def command(self) -> list[str]:
        """See `Debian.command`."""
        return ["/usr/bin/prosody", "-F", "--config", str(self.folder / "prosody.cfg.lua")]

    def prepare(self) -> None:
        """See `Debian.prepare`."""
        (self.folder / "mod_names_of_tests.lua").write_text(PROSODY_NAMES.format(port=self.internet.names.port))
        hosts = "".join(f"""
            VirtualHost "{domain}"
                ssl = {{ certificate = "{self.tls}/{domain}.crt", key = "{self.tls}/{domain}.key" }}
            Component "conference.{domain}" "muc"
                ssl = {{ certificate = "{self.tls}/{domain}.crt", key = "{self.tls}/{domain}.key" }}
                muc_room_locking = false
        """ for domain in self.domains)  # fmt: skip
        (self.folder / "prosody.cfg.lua").write_text(f"""
            data_path = "{self.folder}/data"
            pidfile = "{self.folder}/prosody.pid"
            plugin_paths = {{ "{self.folder}" }}
            interfaces = {{ "{self.host}" }}
            c2s_ports = {{ {self.client_port} }}
            c2s_direct_tls_ports = {{}}
            s2s_ports = {{ {self.server_port} }}
            s2s_direct_tls_ports = {{}}
            network_backend = "epoll"
            use_ipv6 = false
            unbound = {{ resolvconf = false, hoststxt = false, forward = {{ "127.0.0.1@{self.internet.names.port}" }} }}
            modules_enabled = {{ "names_of_tests", "roster", "saslauth", "tls", "dialback", "disco", "pep", "ping",
                                 "presence", "message", "iq", "blocklist", "smacks", "s2s_bidi", "s2s_auth_certs" }}
            s2s_require_encryption = true
            s2s_secure_domains = {{ {", ".join(f'"{name}"' for name in good_domains())} }}
            authentication = "internal_plain"
            storage = "internal"
            log = {{ debug = "{self.folder}/prosody.log" }}
            ssl = {{ cafile = "{self.internet.authority}" }}
            {hosts}
        """)
        for domain in self.domains:
            accounts = self.folder / "data" / domain.replace(".", "%2e").replace("-", "%2d") / "accounts"
            accounts.mkdir(parents=True)
            for name in PEOPLE:
                (accounts / f"{name}.dat").write_text(f'return {{ ["password"] = "{password_of(name)}"; }};\n')


class Ejabberd(Debian):
    """Debian's ejabberd, without Erlang's distribution."""

    user = "ejabberd"
    ready = "accounts are made"

    def command(self) -> list[str]:
        """See `Debian.command`; the options are those of Debian's ejabberdctl."""
        accounts = ", ".join(
            f'ok = ejabberd_auth:try_register(<<"{name}">>, <<"{domain}">>, <<"{password_of(name)}">>)'
            for domain in self.domains for name in PEOPLE
        )  # fmt: skip
        return ["/usr/bin/erl", "+K", "true", "-env", "ERL_CRASH_DUMP_BYTES", "0",
                "-mnesia", "dir", f'"{self.folder}/spool"', "-s", "ejabberd", "-noinput",
                "-eval", f'{accounts}, io:format("{self.ready}~n").']  # fmt: skip

    def environment(self) -> dict[str, str]:
        """See `Debian.environment`."""
        libraries = Path("/usr/lib/x86_64-linux-gnu")
        return {
            **super().environment(),
            "ERL_LIBS": str(libraries if libraries.is_dir() else "/usr/lib"),
            "ERL_INETRC": str(self.folder / "inetrc"),
            "EJABBERD_CONFIG_PATH": str(self.folder / "ejabberd.yml"),
            "EJABBERD_LOG_PATH": str(self.folder / "ejabberd.log"),
        }

    def prepare(self) -> None:
        """See `Debian.prepare`."""
        (self.folder / "spool").mkdir()
        (self.folder / "inetrc").write_text(
            f'{{resolv_conf, ""}}.\n{{nameserver, {{127,0,0,1}}, {self.internet.names_of_ejabberd.port}}}.\n{{lookup, [dns]}}.\n'
        )
        for domain in self.domains:
            (self.tls / f"{domain}.pem").write_text((self.tls / f"{domain}.crt").read_text() + (self.tls / f"{domain}.key").read_text())
        files = ", ".join(f'"{self.tls}/{domain}.pem"' for domain in self.domains)
        (self.folder / "ejabberd.yml").write_text(f"""
hosts: [{", ".join(f'"{domain}"' for domain in self.domains)}]
loglevel: debug
log_rotate_count: 0
certfiles: [{files}]
ca_file: "{self.internet.authority}"
s2s_use_starttls: required
listen:
  - {{port: {self.client_port}, ip: "{self.host}", module: ejabberd_c2s, starttls_required: true, max_stanza_size: 262144}}
  - {{port: {self.server_port}, ip: "{self.host}", module: ejabberd_s2s_in, max_stanza_size: 524288}}
auth_method: internal
auth_password_format: plain
modules:
  mod_blocking: {{}}
  mod_caps: {{}}
  mod_disco: {{}}
  mod_muc: {{host: "conference.@HOST@"}}
  mod_ping: {{}}
  mod_privacy: {{}}
  mod_pubsub: {{plugins: [flat, pep]}}
  mod_roster: {{versioning: true}}
  mod_s2s_dialback: {{}}
  mod_stream_mgmt: {{}}
""")


def free_port(host: str) -> int:
    """Return a port of `host` that nobody listens on now."""
    with socket.create_server((host, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def wait_until(is_so: Callable[[], bool], why: Callable[[], str], timeout: float = PATIENCE) -> None:
    """Look now and then, until it is so."""
    give_up = time.monotonic() + timeout
    nothing = threading.Event()
    while not is_so():
        assert time.monotonic() < give_up, why()
        nothing.wait(0.05)


# ---- people ---------------------------------------------------------------------------


class Person(Client):
    """Somebody whose server may be any: what else comes, and in what order, is its own affair.

    Questions what the client can do are answered by themselves.
    """

    def awaits(self, name: str, *, from_: str = "", type: str = "", id: str = "", timeout: float = PATIENCE,
               **children: str) -> ET.Element:  # fmt: skip
        """Wait for a stanza with these attributes and with descendants of these names and texts (`*`: any).

        `from_` without a resource means any resource; `type` "" means no such attribute. What came
        before stays unread.
        """
        wanted = {"from": from_, "type": type, "id": id}
        found = self._find(name, wanted, children, timeout)
        self._check(found is not None, f"no {name} with {wanted}, {children} came")
        assert found is not None
        return found

    def hears(self, name: str, *, from_: str = "", type: str = "", id: str = "", **children: str) -> bool:
        """Whether such a stanza comes within a second."""
        return self._find(name, {"from": from_, "type": type, "id": id}, children, 1.0) is not None

    def _find(self, name: str, wanted: dict[str, str], children: dict[str, str], timeout: float) -> ET.Element | None:
        give_up = time.monotonic() + timeout
        looked = 0
        while True:
            inbox = list(self._inbox)
            for event in inbox[looked:]:
                if self._is_it(event.element, name, wanted, children):
                    self._inbox.remove(event)
                    return event.element
            looked = len(inbox)
            data = self._connected().read(max(0.0, give_up - time.monotonic()))
            if not data:
                return None
            self._take(data)

    @staticmethod
    def _is_it(element: ET.Element, name: str, wanted: dict[str, str], children: dict[str, str]) -> bool:
        sender = element.get("from", "")
        if element.tag != f"{{{CLIENT}}}{name}" or element.get("type", "") != wanted["type"]:
            return False
        if wanted["id"] not in ("", element.get("id")) or wanted["from"] not in ("", sender, sender.partition("/")[0]):
            return False
        texts = [(local_name(each.tag).replace("-", "_"), (each.text or "").strip()) for each in element.iter()]
        return all((child, text) in texts if text != "*" else child in dict(texts) for child, text in children.items())

    def asks(self, text: str, id: str) -> ET.Element:
        """Send a request and return its result."""
        self.sends(text)
        return self.awaits("iq", id=id, type="result")

    def _take(self, data: bytes) -> None:
        if not data:
            super()._take(data)
            return
        self.transcript.append("S: " + data[:2000].decode(errors="replace"))
        for event in self._reader.feed(data):
            if not self._answers_question(event):
                self._inbox.append(event)

    def _answers_question(self, event: Event) -> bool:
        element = event.element
        if element.tag != f"{{{CLIENT}}}iq" or element.get("type") not in ("get", "set"):
            return False
        head = f"id='{element.get('id')}'" + (f" to='{element.get('from')}'" if element.get("from") else "")
        question = element[0]
        if question.tag == f"{{{DISCO_INFO}}}query":
            node = f" node='{question.get('node')}'" if question.get("node") else ""
            features = "".join(f"<feature var='{name}'/>" for name in FEATURES)
            identity = "<identity category='client' type='pc' name='Client'/>"
            self.sends(f"<iq type='result' {head}><query xmlns='{DISCO_INFO}'{node}>{identity}{features}</query></iq>")
        elif element.get("type") == "set":
            self.sends(f"<iq type='result' {head}/>")
        else:
            self.sends(f"<iq type='error' {head}><error type='cancel'><service-unavailable xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></iq>")
        return True
