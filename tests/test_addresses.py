"""Addresses: what is one, what two of them have in common, and what nobody can make them cost."""

from __future__ import annotations

import stringprep
import sys
import tracemalloc
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

import xmppd
from xmppd import JID, StanzaError

# Text as attackers write it: every plane, with the interesting characters much more often than by chance.
CURIOUS = "aZß@/.:' \\20\t\u00ad\u0130\u0149\u01f0\u0345\u0390\u03c2\u03a3\u05d0\u0627\u0661\u10a0\u13a0\u1e9e\u1fb7\u200b"
CURIOUS += "\u200d\u200e\u2024\u2066\u2100\u2163\u212a\u265a\u3000\u3002\ufb4f\ufdfa\ufe0f\ufe12\uff0e\uff20\uff41\uff61"
CURIOUS += "\U0001f600\U0001d538\U0002f868\U000e0041\ud800\uffff\x00-[]"
texts = st.text(st.one_of(st.sampled_from(CURIOUS), st.characters(codec=None)), max_size=12)


def malformed(text: str) -> str:
    """Return why `text` is no address."""
    with pytest.raises(StanzaError) as refusal:
        JID.parse(text)
    assert refusal.value.condition == "jid-malformed"
    return refusal.value.text


# -- what is an address


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("juliet@example.com", ("juliet", "example.com", "")),
        ("juliet@example.com/foo", ("juliet", "example.com", "foo")),
        ("juliet@example.com/foo bar", ("juliet", "example.com", "foo bar")),
        ("juliet@example.com/foo@bar", ("juliet", "example.com", "foo@bar")),
        ("foo\\20bar@example.com", ("foo\\20bar", "example.com", "")),
        ("fussball@example.com", ("fussball", "example.com", "")),
        ("fu\u00dfball@example.com", ("fussball", "example.com", "")),  # Nodeprep, not PRECIS: one account for both
        ("\u03c0@example.com", ("\u03c0", "example.com", "")),
        ("\u03a3@example.com/foo", ("\u03c3", "example.com", "foo")),
        ("\u03c3@example.com/foo", ("\u03c3", "example.com", "foo")),
        ("\u03c2@example.com/foo", ("\u03c3", "example.com", "foo")),  # Nodeprep again
        ("king@example.com/\u265a", ("king", "example.com", "\u265a")),
        ("example.com", ("", "example.com", "")),
        ("example.com/foobar", ("", "example.com", "foobar")),
        ("a.example.com/b@example.net", ("", "a.example.com", "b@example.net")),
    ],
)
def test_the_legal_jids_of_rfc_7622(text: str, parts: tuple[str, str, str]) -> None:
    """RFC7622-3.1-1, table 1 of §3.5."""
    assert JID.parse(text) == parts


@pytest.mark.parametrize(
    "text",
    [
        '"juliet"@example.com',
        "foo bar@example.com",
        "juliet@example.com/ foo",
        "@example.com/",
        "juliet@",
        "/foobar",
    ],
)
def test_the_strings_of_rfc_7622_that_are_not_jids(text: str) -> None:
    """RFC7622-4-1, table 2 of §3.5 (examples 16 to 19, 22, 23)."""
    malformed(text)


@pytest.mark.parametrize(("text", "local"), [("henry\u2163@example.com", "henryiv"), ("\u265a@example.com", "\u265a")])
def test_what_only_the_older_rfc_allows_is_an_address_elsewhere(text: str, local: str) -> None:
    """RFC6122-2-1: examples 20 and 21, which Nodeprep accepts."""
    assert JID.parse(text).local == local


def test_new_accounts_follow_both_rfcs() -> None:
    """RFC6122-2-1: strict for local accounts."""
    for name in ("juliet", "J\u00fcliet", "\u05e9\u05dc\u05d5\u05dd", "\u7f85\u5bc6\u6b50", "a.b-c_d+e\\20f"):
        assert xmppd.prepare_account_name(name) == xmppd.prepare_local(name)
    for name in ("\u265a", "a\u2026b\u2190", "\u20ac", "\u00abx\u00bb", "a b", ""):
        with pytest.raises(ValueError, match=r"."):
            xmppd.prepare_account_name(name)


@pytest.mark.parametrize(
    "text",
    ["", "@", "/", "@/", "a@/b", "@b", "a@b/", "b/", "a@b@c", "a@@b", "a@\u00ad", "\u200d@b", "b/\ufe0f", ".", "..", "a@."],
)
def test_no_part_is_empty(text: str) -> None:
    """RFC7622-3.1-2; also when it only seems to be something."""
    malformed(text)


def test_the_borders_are_found_before_characters_are_mapped() -> None:
    """RFC7622-3.1-1: U+FF20 and U+FE6B become "@", U+FF0F becomes "/"."""
    assert "U+0040" in malformed("a\uff20b@example.com")
    malformed("a\ufe6bexample.com")
    malformed("example.com\uff0fx")
    assert JID.parse("example.com/a\uff0fb\uff20c") == ("", "example.com", "a/b@c")


# -- localparts


@pytest.mark.parametrize("character", "\"&'/:<>@ \t\n\r\x00\x1f\x7f\x80\x9f\u00a0\u2028\u3000\ue000\ufdd0\uffff\U0010ffff\ud800")
def test_characters_no_localpart_contains(character: str) -> None:
    """RFC7622-3.3-2"""
    for text in (character + "a", f"a{character}b", "a" + character):
        with pytest.raises(ValueError, match=r"."):
            xmppd.prepare_local(text)


FORBIDDEN_AFTER_DECOMPOSITION = "\u2100\u2101\u2105\u2106\u2a74\ufe13\ufe60\ufe64\ufe65\ufe6b"
FORBIDDEN_AFTER_DECOMPOSITION += "\uff02\uff06\uff07\uff0f\uff1a\uff1c\uff1e\uff20"


@pytest.mark.parametrize("character", FORBIDDEN_AFTER_DECOMPOSITION)
def test_characters_that_become_forbidden_ones(character: str) -> None:
    """RFC 6122 §A.7, but for U+226E and U+226F, whose decomposition NFKC puts together again."""
    with pytest.raises(ValueError, match=r"."):
        xmppd.prepare_local(f"a{character}b")


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("ALICE", "alice"),
        ("\uff41lice", "alice"),
        ("\uff21LICE", "alice"),
        ("a\u00adli\u200bce", "alice"),
        ("\U0001d4b6lice", "alice"),
        ("\u212aelvin", "kelvin"),
        ("e\u0301", "\u00e9"),
        ("E\u0301", "\u00e9"),
        ("\u00c9", "\u00e9"),
        ("STRASSE", "strasse"),
        ("stra\u00dfe", "strasse"),
        ("\ufb01sh", "fish"),
        ("\u0130", "i\u0307"),
        ("alice\\20", "alice\\20"),
    ],
)
def test_one_canonical_account_for_names_that_look_alike(text: str, local: str) -> None:
    """RFC7622-3.3-1, threat S49"""
    assert JID.parse(f"{text}@h") == JID.parse(f"{local}@h") == (local, "h", "")


@pytest.mark.parametrize(
    "text",
    ["alice @h", " alice@h", "alice\u00a0@h", "al\u202eice@h", "al\u2066ice@h", "\u0627a@h", "\u05d01@h", "a\u0221@h",
     "\U0001f600@h", "\u1e9e@h", "a\ufffd@h"],
)  # fmt: skip
def test_names_that_deceive_are_no_addresses(text: str) -> None:
    """Threat S49: spaces, changes of direction, code points younger than Unicode 3.2."""
    malformed(text)


def test_scripts_written_from_the_right() -> None:
    """RFC 3454 §6, its own example: aleph 1 beh."""
    assert xmppd.prepare_local("\u0627\u0031\u0628") == "\u0627\u0031\u0628"
    for text in ("\u0627\u0031", "\u0031\u0627", "\u0627a\u0628"):
        for prepare in (xmppd.prepare_local, xmppd.prepare_resource, xmppd.saslprep):
            with pytest.raises(ValueError, match="directions"):
                prepare(text)


def test_capitals_without_a_small_letter_in_unicode_3_2_stay() -> None:
    """Python knows small Georgian and Cherokee letters today; table B.2 never will."""
    assert xmppd.prepare_local("\u10a0\u13a0") == "\u10a0\u13a0"


# -- resourceparts


@pytest.mark.parametrize(
    ("text", "resource"),
    [
        ("Balcony", "Balcony"),
        ("\U0001f600 Juliet", "\U0001f600 Juliet"),
        ("\u2764\ufe0f", "\u2764"),
        ("\u05e9\u05dc\u05d5\u05dd\U0001f600", "\u05e9\u05dc\u05d5\u05dd\U0001f600"),
        ("a\u3000b", "a b"),
        ("\uff21", "A"),
        ("<&'\">", "<&'\">"),
        ("a ", "a "),
    ],
)
def test_resourceparts_keep_case_and_take_emoji(text: str, resource: str) -> None:
    """RFC7622-3.4-1"""
    assert JID.parse("juliet@example.com").with_resource(text) == JID.parse(f"juliet@example.com/{text}")
    assert xmppd.prepare_resource(text) == resource


@pytest.mark.parametrize("character", "\x00\x07\n\x7f\x85\u061c\u1680\u200e\u2028\u202e\u2069\ufffc\ufffe\ue000\ud800\U000e0100")
def test_what_hides_or_cannot_be_carried_is_no_resourcepart(character: str) -> None:
    """RFC 6122 §B.5, and the younger characters of the same kinds."""
    assert f"U+{ord(character):04X}" in malformed(f"juliet@example.com/a{character}b")
    with pytest.raises(StanzaError) as refusal:
        JID.parse("juliet@example.com").with_resource(f"a{character}b")
    assert refusal.value.condition == "jid-malformed"


def test_different_case_is_another_resource() -> None:
    """RFC7622-3.4-1"""
    assert JID.parse("a@b/Home") != JID.parse("a@b/home")


# -- domains


@pytest.mark.parametrize(
    ("text", "domain"),
    [
        ("Example.COM", "example.com"),
        ("example.com.", "example.com"),
        ("localhost", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]", "[::1]"),
        ("[0:0:0:0:0:0:0:1]", "[::1]"),
        ("[2001:DB8::0:1]", "[2001:db8::1]"),
        ("[::FFFF:127.0.0.1]", "[::ffff:127.0.0.1]"),
        ("xn--bcher-kva.example", "b\u00fccher.example"),
        ("XN--BCHER-KVA.example", "b\u00fccher.example"),
        ("b\u00fccher.example", "b\u00fccher.example"),
        ("B\u00dcCHER.example.", "b\u00fccher.example"),
        ("bu\u0308cher.example", "b\u00fccher.example"),
        ("\uff45xample\u3002com\uff61", "example.com"),
        ("stra\u00dfe.example", "strasse.example"),
        ("xn--strae-oqa.example", "xn--strae-oqa.example"),  # another domain, which IDNA2003 cannot write
        ("xn--e28h.example", "xn--e28h.example"),  # an emoji: likewise
        ("\u05d0\u05d1.example", "\u05d0\u05d1.example"),
        ("a--b.example", "a--b.example"),
        ("1.2", "1.2"),
        ("\u226e.x", "\u226e.x"),  # RFC 6122 §A.7 names it for users, not for servers
    ],
)
def test_domains_have_one_form(text: str, domain: str) -> None:
    """RFC7622-3.2-1"""
    assert xmppd.prepare_domain(text) == domain
    assert JID.parse(f"a@{text}/b") == ("a", domain, "b")


@pytest.mark.parametrize(
    "text",
    ["a..b", ".a", "a..", "-a.b", "a-.b", "a_b.c", "a b", "a,b", "a:5222", "a*b", "[::1", "::1", "[::1]x", "[1.2.3.4]",
     "[fe80::1%25eth0]", "[v1.x]", "[]", "[:::]", "a\u2024b", "a\u2488b", "xn--\u00fc.x", "\u05d0a.x", "\U0001f600.x",
     "a\x00b", "a\ud800b", "-\u00fc.x", "\u00fc-.x", "xn--foo-.x", "a\ufe12b"],
)  # fmt: skip
def test_what_is_no_domain(text: str) -> None:
    """RFC 6122 §2.2: UseSTD3ASCIIRules; RFC 3490 §4.1; IPv6 addresses only in brackets."""
    malformed(text)


def test_labels_and_names_have_the_lengths_of_dns() -> None:
    """RFC7622-3.1-2: what RFC 1034 demands remains."""
    assert xmppd.prepare_domain("a" * 63 + ".x")
    malformed("a" * 64 + ".x")
    label = "\u00fc" * 30
    while len(xmppd.to_ascii(label + "\u00fc")) < 63:
        label += "\u00fc"
    assert len(xmppd.to_ascii(xmppd.prepare_domain(label))) <= 63
    malformed(label + "\u00fc" * 2)
    name = ".".join(["a" * 63] * 3 + ["b" * 61])
    assert len(name) == 253 and xmppd.prepare_domain(name + ".") == name
    malformed(name + "b")


# -- lengths


@pytest.mark.parametrize("end", ["a", "\u00e9", "\u20ac"])
def test_a_part_of_1023_bytes_is_whole_and_one_of_1024_is_refused(end: str) -> None:
    """RFC7622-3.1-2, threat S06: nothing is cut, in or beside a character."""
    size = len(end.encode())
    for template in ("{}@example.com", "example.com/{}"):
        fits = "x" * (1023 - size) + end
        assert fits in JID.parse(template.format(fits))
        assert "1023 bytes" in malformed(template.format("x" + fits))
        assert "1023 bytes" in malformed(template.format("x" * 1023 + end))


def test_the_length_counts_after_preparation() -> None:
    """RFC 6122 §2.3: U+FDFA is 3 bytes and becomes 33."""
    assert JID.parse("a@b/" + "\uff41" * 1023).resource == "a" * 1023
    assert "1023 bytes" in malformed("a@b/" + "\ufdfa" * 32)


# -- properties


@given(texts)
def test_any_text_is_an_address_or_malformed(text: str) -> None:
    """RFC7622-4-1; and an address is the same address wherever it goes."""
    try:
        jid = JID.parse(text)
    except StanzaError as refusal:
        assert refusal.condition == "jid-malformed" and refusal.text
    else:
        assert JID.parse(str(jid)) == jid
        assert xmppd.parse_address(str(jid)) == jid
        assert all(len(part.encode()) <= 1023 for part in jid)


@given(texts, st.sampled_from([xmppd.prepare_local, xmppd.prepare_resource, xmppd.prepare_domain, xmppd.saslprep]))
def test_preparation_is_idempotent(text: str, prepare: object) -> None:
    assert callable(prepare)
    try:
        prepared = prepare(text)
    except ValueError:
        return
    assert prepare(prepared) == prepared


@given(texts, texts, texts)
def test_addresses_from_valid_parts_survive_the_wire(local: str, domain: str, resource: str) -> None:
    try:
        jid = JID(xmppd.prepare_local(local), xmppd.prepare_domain(domain), xmppd.prepare_resource(resource))
    except ValueError:
        return
    assert JID.parse(str(jid)) == jid
    assert JID.parse(str(jid.bare)) == jid.bare


@given(st.text(st.characters(codec="ascii"), min_size=1, max_size=8))
def test_the_short_way_for_ascii_says_what_the_tables_say(text: str) -> None:
    for profile in (xmppd.NODEPREP, xmppd.RESOURCEPREP, xmppd.SASLPREP):
        if profile.plain.fullmatch(text):
            assert profile.prepare(text) == profile.prepare_unicode(text)
        elif not text.startswith(" "):  # which only resourceparts refuse, for another reason
            with pytest.raises(ValueError, match=r"."):
                profile.prepare(text)


def test_the_prohibited_characters_are_those_of_the_tables() -> None:
    """RFC 3454 §5: the regular expression against the standard library's tables, all code points."""
    tables = [getattr(stringprep, f"in_table_{name}") for name in "c12 c21 c22 c3 c4 c5 c6 c7 c8 c9".split()]
    for character in map(chr, range(sys.maxunicode + 1)):
        listed = any(table(character) for table in tables)
        refused = bool(xmppd.RESOURCEPREP.prohibited.match(character))
        assert refused or not listed, hex(ord(character))
        assert listed or not refused or stringprep.in_table_a1(character), hex(ord(character))
        assert stringprep.in_table_b1(character) == (ord(character) in xmppd.MAPPED_TO_NOTHING)


def test_every_character_alone_has_a_stable_form_or_none() -> None:
    for character in map(chr, range(0x3000)):
        if unicodedata.ucd_3_2_0.category(character) != "Cn":
            for profile in (xmppd.NODEPREP, xmppd.NAMEPREP, xmppd.RESOURCEPREP, xmppd.SASLPREP):
                try:
                    profile.prepare(character)
                except ValueError as refusal:
                    assert "stable" not in str(refusal)


def test_what_changes_again_on_the_second_look_is_refused() -> None:
    """No character of Unicode 3.2 is known to do so; a future table might."""
    restless = xmppd.Profile("text", plain="a", mapping={ord("\u00e9"): "\u00ea", ord("\u00ea"): "\u00eb"})
    assert restless.prepare("\u00ea") == "\u00eb"
    with pytest.raises(ValueError, match="stable"):
        restless.prepare("\u00e9")


def test_an_a_label_cannot_hide_a_separator() -> None:
    """U+3002 inside a label would make two labels of it at the next server."""
    hiding = "xn--" + "\u00fc\u3002b".encode("punycode").decode()
    assert xmppd.prepare_domain(hiding) == hiding


# -- SASLprep


@pytest.mark.parametrize(
    ("text", "prepared"),
    [
        ("I\u00adX", "IX"),
        ("user", "user"),
        ("USER", "USER"),
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        ("a\u00a0b\u200bc", "a b c"),
        (" leading and trailing ", " leading and trailing "),
    ],
)
def test_the_examples_of_rfc_4013(text: str, prepared: str) -> None:
    """RFC 4013 §3, examples 1 to 5, and §2.1"""
    assert xmppd.saslprep(text) == prepared


@pytest.mark.parametrize("text", ["\u0007", "\u0627\u0031", "", "\u00ad", "a\ue000", "\U0001f600", "\ud800", "p" * 1024])
def test_passwords_without_a_form(text: str) -> None:
    """RFC 4013 §3, examples 6 and 7, §2.5 and an empty result"""
    with pytest.raises(ValueError, match=r"."):
        xmppd.saslprep(text)


# -- the object


def test_a_jid_knows_its_forms() -> None:
    full, bare, domain = (JID.parse(text) for text in ("Juliet@Example.com/Balcony", "juliet@example.com", "example.com"))
    assert (str(full), f"{bare}", str(domain)) == ("juliet@example.com/Balcony", "juliet@example.com", "example.com")
    assert str(JID.parse("example.com/x")) == "example.com/x"
    assert full.bare == bare == bare.bare and bare.is_bare and not full.is_bare
    assert bare.with_resource("Balcony") == full and full.with_resource("x").bare == bare
    assert {full: 1}[JID.parse("JULIET@example.com/Balcony")] == 1


def test_a_cached_address_is_the_same_object() -> None:
    first = JID.parse("cached@example.com/one")
    assert JID.parse("".join(["cached@example.com", "/one"])) is first


def test_endless_new_addresses_cost_a_bounded_number_of_bytes() -> None:
    """The cache is bounded in bytes, whether addresses are short or long."""
    cache = xmppd.ADDRESSES
    tracemalloc.start()
    try:
        for number in range(100_000):
            JID.parse(f"{number}@flood.example")
            JID.parse(f"flood.example/{number}{'x' * 1000}") if number % 10 == 0 else None
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 1000 < len(cache.young) + len(cache.old) < 20_000
    assert used < xmppd.ADDRESS_CACHE * 1.1


def test_what_is_in_use_survives_a_flood() -> None:
    mine = JID.parse("regular@example.com/desk")
    for number in range(30_000):
        JID.parse(f"{number}@another.example")
        if number % 1000 == 0:
            assert JID.parse("regular@example.com/desk") is mine


# -- JID escaping


ESCAPES = [
    ("space cadet", "space\\20cadet"),
    ('call me "ishmael"', "call\\20me\\20\\22ishmael\\22"),
    ("at&t guy", "at\\26t\\20guy"),
    ("d'artagnan", "d\\27artagnan"),
    ("/.fanboy", "\\2f.fanboy"),
    ("::foo::", "\\3a\\3afoo\\3a\\3a"),
    ("<foo>", "\\3cfoo\\3e"),
    ("user@host", "user\\40host"),
    ("c:\\net", "c\\3a\\net"),
    ("c:\\\\net", "c\\3a\\\\net"),
    ("c:\\cool stuff", "c\\3a\\cool\\20stuff"),
    ("c:\\5commas", "c\\3a\\5c5commas"),
    ("\\3and\\2is\\5cool", "\\5c3and\\2is\\5c5cool"),
    ("\\2plus\\2is\\4", "\\2plus\\2is\\4"),
    ("foo\\bar", "foo\\bar"),
    ("foob\\41r", "foob\\41r"),
]


@pytest.mark.parametrize(("text", "local"), ESCAPES)
def test_the_examples_of_jid_escaping(text: str, local: str) -> None:
    """XEP-0106 table 3, §4.2, §4.3"""
    assert xmppd.escape_local(text) == local
    assert xmppd.unescape_local(local) == text
    assert xmppd.prepare_local(local) == local


@given(st.text(st.sampled_from("ab \\2057cf3e@/\"&':<>"), max_size=12))
def test_escaping_loses_nothing(text: str) -> None:
    """XEP-0106 §4.1: whatever does not begin or end with a space"""
    if text != text.strip(" "):
        with pytest.raises(ValueError, match="space"):
            xmppd.escape_local(text)
    else:
        assert xmppd.unescape_local(xmppd.escape_local(text)) == text
        assert not set(xmppd.escape_local(text)) & set(" \"&'/:<>@")


def test_only_the_specified_sequences_are_unescaped() -> None:
    """XEP-0106 §4.1 rules 3 and 6, §3.1: case is significant"""
    for local in ("\\20a", "a\\20", "\\2F", "\\41", "\\2"):
        assert xmppd.unescape_local(local) == local
