"""Chapter 6: what the configuration means, and how a mistake in it is told."""

from __future__ import annotations

import ast
import re
import socket
import tomllib
from dataclasses import FrozenInstanceError, fields
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import xmppd
from xmppd import JID, Address, ConfigError, Limits, Listen, TLSFiles, load_config, parse_listen_address

EXAMPLE = Path(__file__).resolve().parent.parent / "example.toml"

# One key after the other: what stands in the file, and what the server works with.
KEYS = [
    ('hosts = ["Example.ORG", "example.net", "example.org"]', "hosts", ("example.org", "example.net")),
    ('hosts = ["example.org."]', "hosts", ("example.org",)),
    ('hosts = ["bücher.example"]', "hosts", ("bücher.example",)),
    ('hosts = ["192.0.2.1"]', "hosts", ("192.0.2.1",)),
    ('hosts = ["example.org"]\nadmins = ["Alice@Example.org"]', "admins", {JID("alice", "example.org", "")}),
    ('data = "/var/lib/xmppd"', "data", Path("/var/lib/xmppd")),
    ('data = "~/chat"', "data", Path.home() / "chat"),
    ('[listen]\nclient = ["[::]:5222"]', "listen.client", (Address(socket.AF_INET6, "::", 5222),)),
    ('[listen]\nclient = ["127.0.0.1:0"]', "listen.client", (Address(socket.AF_INET, "127.0.0.1", 0),)),
    ("[listen]\nclient = []", "listen.client", ()),
    ('[listen]\nclient_tls = ["0.0.0.0:443"]', "listen.client_tls", (Address(socket.AF_INET, "0.0.0.0", 443),)),
    ('[listen]\nserver = ["127.0.0.1:1"]', "listen.server", (Address(socket.AF_INET, "127.0.0.1", 1),)),
    ('[listen]\ncomponent = ["127.0.0.1:2"]', "listen.component", (Address(socket.AF_INET, "127.0.0.1", 2),)),
    ('[listen]\nweb = ["127.0.0.1:3"]', "listen.web", (Address(socket.AF_INET, "127.0.0.1", 3),)),
    ('[listen]\nlab = ["127.0.0.7:4"]', "listen.lab", (Address(socket.AF_INET, "127.0.0.7", 4),)),
    ('[listen]\nlab = ["[::1]:4"]', "listen.lab", (Address(socket.AF_INET6, "::1", 4),)),
    ('[tls]\ncertificate = "/a.pem"\nkey = "/b.pem"', "tls", TLSFiles(Path("/a.pem"), Path("/b.pem"))),
    ('[tls]\ncertificate = "/both.pem"', "tls", TLSFiles(Path("/both.pem"), Path("/both.pem"))),
    ('[tls]\nclient_ca = "/ca.pem"', "client_ca", Path("/ca.pem")),
    ('[tls]\nclient_ca = "/ca.pem"', "tls", None),
    ("[registration]\nopen = true", "registration_open", True),
    ("[archive]\nenabled = false", "archive_enabled", False),
    ('[archive]\nkeep = "forever"', "archive_keep", None),
    ('[archive]\nkeep = "1 year"', "archive_keep", timedelta(days=365)),
    ('[archive]\nkeep = "30 days"', "archive_keep", timedelta(days=30)),
    ('[archive]\nkeep = "2 weeks"', "archive_keep", timedelta(days=14)),
    ("[storage]\nsync = false", "storage_sync", False),
    ("[compat]\niq_auth = false", "compat.iq_auth", False),
    ("[compat]\ncompression = true", "compat.compression", True),
    ("[compat]\ndigest_md5 = true", "compat.digest_md5", True),
    ('[listen]\nstun = ["127.0.0.1:3478"]', "listen.stun", (Address(socket.AF_INET, "127.0.0.1", 3478),)),
    ('[registration]\ninvite = "everyone"', "registration_invite", "everyone"),
    ('[calls]\nsecret = "s"', "calls_secret", "s"),
    ('[calls]\nservices = ["stun:a.org"]', "calls_services", (xmppd.CallService("stun", "a.org", 3478, "udp"),)),
    ('[calls]\nsecret = "s"\nservices = ["turns:[::1]:443?transport=udp", "turns:b.org"]', "calls_services",
     (xmppd.CallService("turns", "::1", 443, "udp"), xmppd.CallService("turns", "b.org", 5349, "tcp"))),
    *((f'[contact]\n{entry.name} = ["mailto:a@b.org"]', f"contact.{entry.name}", ("mailto:a@b.org",))
      for entry in fields(xmppd.Contact)),
    ("[federation]\nenabled = true", "federation_enabled", True),
    ("[federation]\nenabled = false", "federation_enabled", False),
    ('[federation]\nnameservers = ["127.0.0.1:53"]', "federation_nameservers", (Address(socket.AF_INET, "127.0.0.1", 53),)),
    ('[federation.routes]\n"Example.net" = "127.0.0.3:5269"', "federation_routes", {"example.net": ("127.0.0.3", 5269)}),
    ('[federation]\nroutes = { "example.net" = "Xmpp.Example.com:1" }', "federation_routes", {"example.net": ("xmpp.example.com", 1)}),
    ('[federation.routes]\n"example.net" = "[::1]:65535"', "federation_routes", {"example.net": ("[::1]", 65535)}),
    ('[web]\nurl = "https://chat.example.org/"', "web_url", "https://chat.example.org"),
    ('[web]\norigins = ["https://chat.example.org:8443", "*"]', "web_origins", {"https://chat.example.org:8443", "*"}),
    ('[push]\ncontent = "sender"', "push_content", "sender"),
    ('[federation]\nsecurity = "verified"', "federation_security", "verified"),
    ('[federation.domains]\n"Example.net" = "plain"', "federation_domains", {"example.net": "plain"}),
    ('[federation]\nca = "/etc/ca.pem"', "federation_ca", Path("/etc/ca.pem")),
    ('[upload]\nhost = "Files"', "upload_host", "files"),
    ('[upload]\nkeep = "30 days"', "upload_keep", timedelta(days=30)),
    ("[upload]\ncheck = false", "upload_check", False),
    ('[muc]\nhost = "Rooms"', "muc_host", "rooms"),
    ('[muc]\nhost = ""', "muc_host", ""),
    ('[muc]\ncreate = "admins"', "muc_create", "admins"),
    ('[components."Gateway.example.org"]\nsecret = "s"', "components", {"gateway.example.org": "s"}),
    ("[limits]\nbytes_per_second = 0", "limits.bytes_per_second", 0),
    ("[limits]\nstanza = 10000", "limits.stanza", 10000),
    ("[limits]\nanswer_timeout = 2.5", "limits.answer_timeout", 2.5),
    ("[limits]\nanswer_timeout = 2", "limits.answer_timeout", 2.0),
]

# One mistake after the other: what stands in the file, and the line that the owner reads.
MISTAKES = [
    ("hosts = []", 'hosts: expected at least one domain, for example ["example.org"], found an empty list'),
    ('hosts = "example.org"', """hosts: expected a list of domains such as ["example.org"], found 'example.org'"""),
    ("hosts = [12]", 'hosts: expected a list of domains such as ["example.org"], found 12'),
    *(
        (f"[web]\nurl = {value!r}", f"""[web] url: expected a URL such as "https://chat.example.org", found {value!r}""")
        for value in ("http://chat.example.org", "chat.example.org", "https://", "https://a b")
    ),
    (
        '[web]\norigins = ["https://a/b"]',
        """[web] origins: expected a list of origins such as ["https://chat.example.org"], or ["*"], found 'https://a/b'""",
    ),
    ('hosts = ["a b"]', """hosts: expected a domain such as "example.org", found 'a b'"""),
    ('hosts = ["me@example.org"]', """hosts: expected a domain such as "example.org", found 'me@example.org'"""),
    (
        'hosts = ["example.org"]\nadmins = ["alice@example.net"]',
        "admins: expected addresses of the hosts (example.org), found 'alice@example.net'",
    ),
    ("admins = [true]", 'admins: expected a list of addresses such as ["alice@example.org"], found true'),
    *(
        (f'admins = ["{text}"]', f"""admins: expected a list of addresses such as ["alice@example.org"], found '{text}'""")
        for text in ("example.org", "alice@example.org/phone", "a@b@c", "")
    ),
    ("data = 5", 'data: expected a path in quotes, for example "/var/lib/xmppd", found 5'),
    ('data = ""', """data: expected a path in quotes, for example "/var/lib/xmppd", found ''"""),
    (
        'data = "~nobody-of-this-name/x"',
        "data: expected a path whose ~ names somebody who has a home folder, found '~nobody-of-this-name/x'",
    ),
    *(
        (
            f"[listen]\nclient = {value}",
            '[listen] client: expected a list of "address:port" such as ["0.0.0.0:5222", "[::]:5222"], ' + found,
        )
        for value, found in (
            ('"127.0.0.1:5222"', "found '127.0.0.1:5222'"),
            ("5222", "found 5222"),
            ("[5222]", "found 5222"),
            ('["5222"]', "found '5222'"),
            ('[":5222"]', "found ':5222'"),
            ('["localhost:5222"]', "found 'localhost:5222'"),
            ('["::1:5222"]', "found '::1:5222'"),
            ('["[127.0.0.1]:5222"]', "found '[127.0.0.1]:5222'"),
            ('["127.0.0.1:65536"]', "found '127.0.0.1:65536'"),
            ('["127.0.0.1:-1"]', "found '127.0.0.1:-1'"),
            ('["127.0.0.1:٣"]', "found '127.0.0.1:٣'"),
        )
    ),
    (
        '[listen]\nclient = ["127.0.0.1:5222"]\nclient_tls = ["127.0.0.1:5222"]',
        "[listen] client_tls: expected an address of its own, found 127.0.0.1:5222, as in client",
    ),
    (
        '[listen]\nclient = ["[::1]:5222", "[0::1]:5222"]',
        "[listen] client: expected an address of its own, found [::1]:5222, as in client",
    ),
    ("[tls]\ncertificate = 1", '[tls] certificate: expected a path in quotes, for example "/var/lib/xmppd", found 1'),
    ('[tls]\nkey = "k.pem"', "[tls] certificate: expected the certificate of the key, found only a key"),
    ("[registration]\nopen = 1", "[registration] open: expected true or false, found 1"),
    ('[registration]\nopen = "yes"', "[registration] open: expected true or false, found 'yes'"),
    ("[archive]\nenabled = 1979-05-27", "[archive] enabled: expected true or false, found a date or time"),
    *(
        (
            f"[archive]\nkeep = {value}",
            f'[archive] keep: expected a time such as "30 days", "1 year" or "forever", found {found}',
        )
        for value, found in (
            ("30", "30"),
            ('"30"', "'30'"),
            ('"0 days"', "'0 days'"),
            ('"2 moons"', "'2 moons'"),
            ('"-1 days"', "'-1 days'"),
            ('"99999999999999999999 years"', "'99999999999999999999 years'"),
            ("[]", "an empty list"),
        )
    ),
    ("[limits]\nstanza = 'big'", "[limits] stanza: expected a whole number of bytes, at least 10000, found 'big'"),
    ("[limits]\nstanza = 9999", "[limits] stanza: expected a whole number of bytes, at least 10000, found 9999"),
    ("[limits]\nstanza = true", "[limits] stanza: expected a whole number of bytes, at least 10000, found true"),
    ("[limits]\nstanza = 1e5", "[limits] stanza: expected a whole number of bytes, at least 10000, found 100000.0"),
    ("[limits]\nstanza = {}", "[limits] stanza: expected a whole number of bytes, at least 10000, found a section"),
    ("[limits]\nsasl_failures = 6", "[limits] sasl_failures: expected a whole number of attempts from 2 to 5, found 6"),
    ("[limits]\nsasl_failures = 1", "[limits] sasl_failures: expected a whole number of attempts from 2 to 5, found 1"),
    ("[limits]\nresources = 0", "[limits] resources: expected a whole number of sessions, at least 1, found 0"),
    *(
        (f"[limits]\nanswer_timeout = {value}", f"[limits] answer_timeout: expected a number of seconds from 1 to 86400, found {value}")
        for value in ("0", "nan", "inf", "86401", "true")
    ),
    ('[calls]\nservices = ["turn:a.org"]',
     "[calls] secret: expected what the TURN servers have as static-auth-secret, found none"),
    ('[calls]\nservices = ["http://a.org"]', "[calls] services: expected a list of URIs such as "
     """["stun:stun.example.org", "turn:turn.example.org:3478?transport=udp"], found 'http://a.org'"""),
    ("[contact]\nabuse = ['me']", "[contact] abuse: expected a list of URIs such as "
     """["mailto:abuse@example.org", "xmpp:alice@example.org"], found 'me'"""),
    ("[compat]\niq_auth = 'no'", "[compat] iq_auth: expected true or false, found 'no'"),
    ("[storage]\nsync = 0", "[storage] sync: expected true or false, found 0"),
    *(
        (
            f'[federation.routes]\n"example.net" = {value}',
            '[federation] routes: expected domains with their servers, such as { "example.net" = "192.0.2.7:5269" }, '
            f"found {value}",
        )
        for value in ("'127.0.0.3'", "'127.0.0.3:0'", "'127.0.0.3:65536'", "'127.0.0.3:x'", "5269")
    ),
    ("[federation]\nroutes = 'x'", "[federation] routes: expected domains with their servers, such as "
     """{ "example.net" = "192.0.2.7:5269" }, found 'x'"""),
    ("[federation.routes]\n'a b' = '127.0.0.3:5269'", "[federation] routes: expected a domain such as \"example.org\", found 'a b'"),
    ("[federation]\nnameservers = ['127.0.0.1']", "[federation] nameservers: expected a list of \"address:port\" such as "
     "[\"127.0.0.1:53\"], found '127.0.0.1'"),
    ('[push]\ncontent = true', """[push] content: expected "nothing", "sender" or "body", found true"""),
    ("[federation]\nsecurity = 'plain'", '[federation] security: expected "verified" (a valid certificate) or '
     """"encrypted" (or else dialback, inside TLS), found 'plain'"""),
    ("[federation]\ndomains = { 'example.net' = 'x' }", '[federation] domains: expected domains, each "verified", '
     """"encrypted" or "plain", such as { "example.net" = "verified" }, found 'x'"""),
    ('[muc]\nhost = "a.b"', """[muc] host: expected one word such as "conference", or "" to switch it off, found 'a.b'"""),
    ("[muc]\nhost = false", '[muc] host: expected one word such as "conference", or "" to switch it off, found false'),
    ('[muc]\ncreate = "nobody"', """[muc] create: expected "everyone" or "admins", found 'nobody'"""),
    ("[components.gw]\n", '[components."gw"]: expected one key, secret = "...", and no other'),
    ("components.gw = 'secret'", '[components."gw"]: expected one key, secret = "...", and no other'),
    ('[components."a b"]\nsecret = "s"', """[components."a b"]: expected a domain such as "example.org", found 'a b'"""),
    (
        'hosts = ["example.org"]\n[components."Example.org"]\nsecret = "s"',
        '[components."example.org"] secret: expected a domain of its own, found one of the hosts',
    ),
    ("limits = 5", "limits: expected a section [limits], found 5"),
    # unknown keys, and what may have been meant
    ("host = []", "host: unknown key; did you mean hosts?"),
    ("[limits]\nstanzas = 5", "[limits] stanzas: unknown key; did you mean stanza?"),
    ("[limit]\nstanza = 5", "limit: unknown key; did you mean [limits]?"),
    ("[registration]\nstanza = 5", "[registration] stanza: unknown key; did you mean [limits] stanza?"),
    ('[listen]\ndata = "/x"', "[listen] data: unknown key; data belongs above the first [section]"),
    ("frobnicate = 1", "frobnicate: unknown key; there are hosts, admins, data"),
    ("[storage]\nfrobnicate = 1", "[storage] frobnicate: unknown key; [storage] has sync"),
]


@pytest.fixture
def written(tmp_path):
    """Return a function that writes a configuration and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "xmppd.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def look_up(config, name):
    for part in name.split("."):
        config = getattr(config, part)
    return config


def mistake(path: Path) -> str:
    """Return what the owner reads, with the path shortened to the file's name."""
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize(("text", "name", "value"), KEYS)
def test_each_key_reaches_the_server(written, text, name, value):
    assert look_up(load_config(written(text)), name) == value


@pytest.mark.parametrize("limit", [entry.name for entry in fields(Limits)])
def test_each_limit_is_a_key(written, limit):
    """RFC6120-13.12-1"""
    value = getattr(Limits(), limit) if limit in ("sasl_failures", "bind_failures") else getattr(Limits(), limit) + 1
    assert getattr(load_config(written(f"[limits]\n{limit} = {value}")).limits, limit) == value


@pytest.mark.parametrize(("text", "line"), MISTAKES)
def test_each_mistake_is_one_line_that_says_how_to_mend_it(written, text, line):
    assert mistake(written(text)) == line


def test_the_keys_of_the_table_are_all_tested():
    tested = {f"limits.{entry.name}" for entry in fields(Limits)}
    for text, _, _ in KEYS:
        for name, value in tomllib.loads(text).items():
            tested |= {f"{name}.{key}" for key in value} if isinstance(value, dict) else {name}
    assert set(xmppd.CONFIG_KEYS) <= tested


def test_an_empty_file_and_no_file_mean_the_defaults(written):
    path = written("")
    config = load_config(path)
    assert config.file == path
    for entry in fields(config):
        if entry.name != "file":
            assert getattr(config, entry.name) == getattr(load_config(None), entry.name)


def test_the_defaults_need_no_configuration():
    """RFC6120-3.1-1"""
    config = load_config(None)
    assert config.hosts
    assert config.data.is_absolute()
    assert config.file is None
    assert [address.port for address in config.listen.client] == [5222, 5222]
    assert [address.port for address in config.listen.server] == [5269, 5269]
    assert config.listen.lab == ()
    assert not config.registration_open
    assert not config.compat.digest_md5
    assert config.limits.stanza == 262144
    assert config.limits.logins_per_minute == 30
    assert config.limits.connections_per_address == 100
    assert config.limits.bytes_per_second == 50000


@pytest.mark.parametrize(
    ("machine", "host"),
    [
        ("Kitchen", "kitchen.local"),
        ("kitchen.example.org", "kitchen.local"),
        ("localhost", "localhost"),
        ("localhost.localdomain", "localhost"),
        ("", "localhost"),
        ("no_domain", "localhost"),
    ],
)
def test_the_default_host_is_the_machines_name_on_the_local_network(monkeypatch, machine, host):
    monkeypatch.setattr(socket, "gethostname", lambda: machine)
    assert load_config(None).hosts == (host,)


def test_paths_are_relative_to_the_file_not_to_the_folder_one_stands_in(written, tmp_path, monkeypatch):
    path = written('data = "d"\n[tls]\ncertificate = "c/full.pem"\nkey = "k.pem"\nclient_ca = "ca.pem"')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load_config(path)
    assert config.data == tmp_path / "d"
    assert config.tls == TLSFiles(tmp_path / "c/full.pem", tmp_path / "k.pem")
    assert config.client_ca == tmp_path / "ca.pem"
    assert load_config(Path("../xmppd.toml")).data.resolve() == tmp_path / "d"


def test_the_command_lines_data_folder_wins_and_is_relative_to_where_one_stands(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(written('data = "d"'), data=Path("e")).data == tmp_path / "e"
    assert load_config(None, data=Path("e")).data == tmp_path / "e"


def test_a_component_secret_is_never_repeated(written):
    """S86"""
    for value in ("12345", '["hush"]', '""', "{ hush = 1 }"):
        line = mistake(written(f"[components.gw]\nsecret = {value}"))
        assert line == '[components."gw"] secret: expected a text in quotes that is not empty, found something else'


@pytest.mark.parametrize("address", ["0.0.0.0:5280", "[::]:5280", "192.0.2.1:5280", "[::ffff:127.0.0.1]:5280", "128.0.0.1:1"])
def test_the_lab_listener_is_for_this_machine_only(written, address):
    """S88"""
    assert mistake(written(f'[listen]\nlab = ["127.0.0.1:5279", "{address}"]')) == (
        "[listen] lab: expected loopback addresses only (127.0.0.1 or [::1]), for there is no TLS, "
        f"found '{parse_listen_address(address)}'"
    )


def test_a_missing_file_says_how_to_get_one(tmp_path):
    assert mistake(tmp_path / "no.toml") == "cannot be read: No such file or directory; write one with: xmppd init"


def test_a_folder_is_no_configuration(tmp_path):
    assert mistake(tmp_path) == "cannot be read: Is a directory"


def test_what_is_not_toml_says_where(written):
    assert mistake(written("hosts = example.org")) == (
        'expected TOML (name = "text" or name = 12), found a mistake: Invalid value (at line 1, column 9)'
    )


def test_what_is_not_utf_8_is_said(written):
    assert mistake(written(b'data = "/\xfc"')) == "expected UTF-8 text, found another encoding; save it as UTF-8"


def test_a_key_may_not_come_twice(written):
    assert "Cannot overwrite a value" in mistake(written("data = '/a'\ndata = '/b'"))


def test_long_and_strange_values_stay_on_one_short_line(written):
    line = mistake(written('hosts = ["\\n\\u001b[2J' + "x" * 500 + '"]'))
    assert line.isprintable()
    assert len(line) < 200


@given(st.binary(max_size=200))
def test_no_file_breaks_anything_but_itself(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(content)
    try:
        load_config(path)
    except ConfigError as error:
        assert str(error).startswith(f"{path}: ")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60)
@given(st.sampled_from(sorted(xmppd.CONFIG_KEYS)), VALUES)
def test_no_value_breaks_a_reader(key, value):
    try:
        xmppd.CONFIG_KEYS[key](value)
    except xmppd.Unexpected as error:
        assert error.expected


@given(st.ip_addresses(v=4) | st.ip_addresses(v=6), st.integers(0, 65535))
def test_an_address_reads_as_it_is_written(address, port):
    text = f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"
    parsed = parse_listen_address(text)
    assert parsed.port == port
    assert parse_listen_address(str(parsed)) == parsed
    if getattr(address, "ipv4_mapped", None) is None:
        assert parsed.is_loopback == address.is_loopback


def test_a_configuration_never_changes():
    config = load_config(None)
    for value in (config, config.limits, config.listen, config.compat):
        with pytest.raises((FrozenInstanceError, TypeError)):
            setattr(value, fields(value)[0].name, None)


# -- which file


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.delenv("XMPPD_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_owners_configuration_is_found(folders):
    (folders / "config" / "xmppd").mkdir(parents=True)
    own = folders / "config" / "xmppd" / "xmppd.toml"
    own.write_text("")
    assert xmppd.find_config() == own


def test_the_variable_wins_even_when_its_file_is_missing(folders, monkeypatch):
    monkeypatch.setenv("XMPPD_CONFIG", str(folders / "no.toml"))
    assert xmppd.find_config() == folders / "no.toml"


def test_the_folder_one_stands_in_is_not_searched(folders):
    (folders / "xmppd.toml").write_text("")
    assert xmppd.find_config() in (None, Path("/etc/xmppd/xmppd.toml"))


# -- example.toml


def uncommented(text: str) -> str:
    """Return the example with its commented keys and sections in force."""
    return re.sub(r"^# (?=\[\w+\]$|\w+ = )", "", text, flags=re.MULTILINE)


def test_the_example_is_a_configuration():
    assert load_config(EXAMPLE).hosts == ("example.org",)


def test_what_the_example_shows_are_the_defaults():
    config, default = load_config(EXAMPLE), load_config(None)
    for entry in fields(config):
        if entry.name not in ("hosts", "data", "file"):
            assert getattr(config, entry.name) == getattr(default, entry.name), entry.name


def used_keys() -> set[str]:
    """Return the keys that the server does something with: those that are read outside of chapter 6."""
    source = Path(xmppd.__file__).read_text()
    start = source.index("# ==== 6. Configuration ====\n")
    end = re.compile(r"^# ==== 7\. ", re.MULTILINE).search(source, start)
    assert end
    read = {f"listen.{purpose}" for purpose in xmppd.LISTENERS}
    for node in ast.walk(ast.parse(source[:start] + source[end.start() :])):
        if isinstance(node, ast.Attribute):
            read |= {node.attr, f"{getattr(node.value, 'attr', getattr(node.value, 'id', ''))}.{node.attr}"}
    fields_of = {key: key.replace(".", "_") for key in xmppd.CONFIG_KEYS}
    fields_of |= {"tls.client_ca": "client_ca", "tls.certificate": "tls", "tls.key": "tls"}
    fields_of |= {key: key for key in fields_of if key.startswith(("listen.", "limits.", "compat."))}
    fields_of |= {key: "contact" for key in fields_of if key.startswith("contact.")}  # all by one loop
    return {key for key, name in fields_of.items() if name in read}


def test_the_example_has_every_key_that_does_something_and_no_other():
    shown = set()
    for name, value in tomllib.loads(uncommented(EXAMPLE.read_text())).items():
        shown |= {f"{name}.{key}" for key in value} if isinstance(value, dict) else {name}
    assert shown == used_keys()


def test_listeners_have_the_ports_that_the_standards_name():
    ports = {entry.name: {address.port for address in getattr(Listen(), entry.name)} for entry in fields(Listen)}
    assert ports == {
        "client": {5222}, "client_tls": {5223}, "server": {5269}, "component": {5347}, "web": {5443}, "lab": set(), "stun": set(),
    }  # fmt: skip
