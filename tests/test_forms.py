"""Forms and pages: what is asked, what may be answered, and how a long list is walked."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd import DATA_FORMS, JID, MAX_FORM_TEXT, Field, Form, FormTemplate, PageRequest, StanzaError, page, page_answer

ROOM = FormTemplate(
    "http://jabber.org/protocol/muc#roomconfig",
    [
        Field(type="fixed", value="About the room"),
        Field("name", label="Name", value="Verona"),
        Field("about", "text-multi", value=["A fair city", "in Italy"]),
        Field("persistent", "boolean", "Keep the room?", False, desc="Also when nobody is in it"),
        Field("whois", "list-single", value="moderators", options={"moderators": "Moderators", "anyone": "Anyone"}),
        Field("features", "list-multi", value=["news"], options={"news": "News", "polls": "Polls", "search": "Search"}),
        Field("maxusers", "list-single", value=30, options={"10": "Ten", "none": "Any"}, numbers=range(1, 1001)),
        Field("history", value=20, numbers=range(0, 101)),
        Field("contact", "jid-single"),
        Field("owners", "jid-multi", value=[JID("romeo", "example.org", "")]),
        Field("password", "text-private", value=""),
        Field("node", "hidden", value="n1"),
    ],
    title="The room",
    instructions="Answer what you like.\nThe rest stays.",
)


def element(xml: str) -> ET.Element:
    return ET.fromstring(xml.replace("<x ", "<x xmlns='jabber:x:data' ", 1))


def submitted(fields: str) -> dict[str, Any] | None:
    return ROOM.read(Form.parse(element(f"<x type='submit'>{fields}</x>")))


def one(var: str, *values: str) -> dict[str, Any] | None:
    """Submit one field."""
    answer = Form("submit", [Field(var, "", value=list(values))])
    return ROOM.read(Form.parse(answer.to_element()))


def refusal(call: Any, *arguments: Any) -> StanzaError:
    with pytest.raises(StanzaError) as caught:
        call(*arguments)
    return caught.value


# -- asking


def test_a_filled_form_asks_everything_in_order() -> None:
    """XEP-0004 §3.2; XEP-0068 §3.1: the hidden FORM_TYPE says what it is about."""
    form = ROOM.fill({"persistent": True, "maxusers": 42, "contact": JID.parse("juliet@example.org")}).to_element()
    assert form.get("type") == "form"
    assert [child.text for child in form.iterfind(DATA_FORMS("instructions"))] == ["Answer what you like.", "The rest stays."]
    fields = form.findall(DATA_FORMS("field"))
    assert [(field.get("var"), field.get("type")) for field in fields] == [
        ("FORM_TYPE", "hidden"), (None, "fixed"), *((field.var, field.type) for field in ROOM.fields[1:]),
    ]  # fmt: skip
    values = {field.get("var"): [value.text for value in field.findall(DATA_FORMS("value"))] for field in fields}
    assert values == {
        "FORM_TYPE": ["http://jabber.org/protocol/muc#roomconfig"], None: ["About the room"], "name": ["Verona"],
        "about": ["A fair city", "in Italy"], "persistent": ["1"], "whois": ["moderators"], "features": ["news"],
        "maxusers": ["42"], "history": ["20"], "contact": ["juliet@example.org"], "owners": ["romeo@example.org"],
        "password": [""], "node": ["n1"],
    }  # fmt: skip


def test_a_question_as_it_stands_on_the_wire() -> None:
    field = Field("v", "list-single", "Which?", 3, {"a": "A", "b": ""}, True, "Choose", range(1, 10))
    assert ET.tostring(Form("form", [field]).to_element()) == ET.tostring(
        element(
            "<x type='form'><field var='v' type='list-single' label='Which?'><desc>Choose</desc><required/>"
            "<v:validate xmlns:v='http://jabber.org/protocol/xdata-validate' datatype='xs:integer'>"
            "<v:range min='1' max='9'/></v:validate><value>3</value>"
            "<option label='A'><value>a</value></option><option><value>b</value></option>"
            "<option label='3'><value>3</value></option></field></x>"
        )
    )


def test_a_result_asks_nothing() -> None:
    """XEP-0128: the same fields as data."""
    result = ROOM.fill(kind="result").to_element()
    assert result.get("type") == "result"
    assert {child.tag for child in result.iter()} == {DATA_FORMS(name) for name in ("x", "field", "value")}
    assert ROOM.fill(kind="result").form_type == ROOM.form_type


def test_defaults_are_by_name() -> None:
    assert ROOM.defaults["maxusers"] == 30 and ROOM.defaults["contact"] is None
    assert len(ROOM.defaults) == len(ROOM.fields) - 1


def test_a_text_of_several_lines_becomes_several_values() -> None:
    """XEP-0004 §3.3"""
    assert Field("v", "text-multi", value="one\ntwo\r\nthree").texts == ["one", "two", "three"]
    assert Field("v", value="one\ntwo").texts == ["one\ntwo"]


# -- reading


def test_every_type_is_read_into_its_python_value() -> None:
    """XEP0004-3-1"""
    assert submitted(
        "<field var='FORM_TYPE' type='hidden'><value>http://jabber.org/protocol/muc#roomconfig</value></field>"
        "<field type='fixed'><value>About the room</value></field>"
        "<field var='name'><value>Mantua</value></field>"
        "<field var='about'><value>An exile</value><value>for Romeo</value></field>"
        "<field var='persistent'><value>true</value></field>"
        "<field var='whois'><value>anyone</value></field>"
        "<field var='features'><value>search</value><value>news</value><value>news</value></field>"
        "<field var='maxusers'><value>none</value></field>"
        "<field var='history'><value> 0 </value></field>"
        "<field var='contact'><value>Juliet@Example.org</value></field>"
        "<field var='owners'><value>a@b</value><value/><value>A@B.</value><value>c@d/e</value></field>"
        "<field var='password'><value>v3r0na</value></field>"
        "<field var='node'><value>n2</value></field>"
    ) == {
        "name": "Mantua",
        "about": ["An exile", "for Romeo"],
        "persistent": True,
        "whois": "anyone",
        "features": ["search", "news"],
        "maxusers": "none",
        "history": 0,
        "contact": JID("juliet", "example.org", ""),
        "owners": [JID("a", "b", ""), JID("c", "d", "e")],
        "password": "v3r0na",
        "node": "n2",
    }


@pytest.mark.parametrize(("text", "value"), [("0", False), ("1", True), ("false", False), ("true", True)])
def test_both_spellings_of_truth(text: str, value: bool) -> None:
    """XEP0004-3-1"""
    assert one("persistent", text) == {"persistent": value}


def test_what_is_not_sent_keeps_its_value_and_what_is_unknown_is_ignored() -> None:
    """XEP0004-3-1"""
    assert submitted("<field var='name'><value>x</value></field><field var='colour'><value>red</value></field>") == {"name": "x"}
    assert submitted("") == {}


@pytest.mark.parametrize(
    ("var", "value"),
    [("name", ""), ("about", []), ("features", []), ("contact", None), ("owners", []), ("password", "")],
)
def test_an_empty_field_unsets(var: str, value: object) -> None:
    """XEP-0004 §3.6: written either way."""
    assert one(var) == one(var, "") == {var: value}


@pytest.mark.parametrize("var", ["persistent", "whois", "maxusers", "history"])
def test_an_empty_field_keeps_what_cannot_be_empty(var: str) -> None:
    """XEP-0004 §3.5: a question that was left alone."""
    assert one(var) == one(var, "") == {}


def test_the_empty_text_may_be_an_option() -> None:
    template = FormTemplate("", [Field("v", "list-single", options={"": "Nothing", "a": "A"})])
    assert template.read(Form("submit", [Field("v", value=[""])])) == {"v": ""}
    assert template.read(Form("submit", [Field("v", value=[])])) == {}


@pytest.mark.parametrize(
    ("var", "values", "expected"),
    [
        ("persistent", ["yes"], "0, 1, true or false"),
        ("persistent", ["True"], "0, 1, true or false"),
        ("persistent", ["1", "0"], "one value"),
        ("whois", ["nobody"], "one of moderators, anyone"),
        ("whois", ["anyone", "moderators"], "one value"),
        ("features", ["news", "games"], "one of news, polls, search"),
        ("maxusers", ["0"], "a whole number from 1 to 1000"),
        ("maxusers", ["1001"], "a whole number from 1 to 1000"),
        ("history", ["101"], "a whole number from 0 to 100"),
        ("history", ["-1"], "a whole number from 0 to 100"),
        ("history", ["1.5"], "a whole number from 0 to 100"),
        ("history", ["\u0661"], "a whole number from 0 to 100"),
        ("history", ["1" * 5000], "a whole number from 0 to 100"),
        ("name", ["a", "b"], "one value"),
        ("name", ["x" * (MAX_FORM_TEXT + 1)], f"at most {MAX_FORM_TEXT} characters"),
        ("contact", ["a@b", "c@d"], "one value"),
    ],
)
def test_wrong_values_are_refused_by_name(var: str, values: list[str], expected: str) -> None:
    """XEP-0004 §4"""
    error = refusal(one, var, *values)
    assert (error.condition, error.text) == ("not-acceptable", f"{var}: expected {expected}")


@pytest.mark.parametrize("texts", [[], [""]])
def test_a_field_alone_says_what_it_misses(texts: list[str]) -> None:
    assert refusal(Field("v", "boolean").read, texts).text == "v: expected a value"


@pytest.mark.parametrize("var", ["contact", "owners"])
def test_a_wrong_address_is_refused_by_name(var: str) -> None:
    error = refusal(one, var, "a b@c")
    assert error.condition == "jid-malformed" and error.text.startswith(f"{var}: ")


@pytest.mark.parametrize("values", [None, [], [""]])
@pytest.mark.parametrize("kind", ["text-single", "boolean", "jid-multi", "list-single", "text-private"])
def test_what_is_required_must_be_sent(kind: str, values: list[str] | None) -> None:
    """XEP-0004 §3.1: only what is not `<required/>` may be omitted."""
    template = FormTemplate("", [Field("v", kind, required=True, options={"a": "A"})])
    form = Form("submit", [] if values is None else [Field("v", value=values)])
    error = refusal(template.read, form)
    assert (error.condition, error.text) == ("not-acceptable", "v: expected a value")


def test_a_wrong_form_type_is_refused_and_a_missing_one_is_not() -> None:
    """XEP0068-3-1, §4.1"""
    wrong = "<field var='FORM_TYPE' type='hidden'><value>http://jabber.org/protocol/muc#register</value></field>"
    assert refusal(submitted, wrong).condition == "bad-request"
    assert refusal(submitted, wrong.replace(" type='hidden'", "")).condition == "bad-request"
    two = wrong.replace("<value>", f"<value>{ROOM.form_type}</value><value>")
    assert refusal(submitted, two).condition == "bad-request"
    assert submitted("<field var='name'><value>x</value></field>") == {"name": "x"}


def test_only_a_hidden_form_type_counts_in_questions_and_results() -> None:
    """XEP-0068 §4.3"""
    for kind, counts in (("form", False), ("result", False), ("submit", True)):
        xml = f"<x type='{kind}'><field var='FORM_TYPE' type='text-single'><value>v</value></field></x>"
        assert Form.parse(element(xml)).form_type == ("v" if counts else "")
        assert Form.parse(element(xml.replace("text-single", "hidden"))).form_type == "v"


def test_a_cancelled_form_sets_nothing() -> None:
    """XEP0004-3-1"""
    assert ROOM.read(Form.parse(element("<x type='cancel'/>"))) is None


@pytest.mark.parametrize("kind", ["form", "result"])
def test_only_a_submission_is_an_answer(kind: str) -> None:
    assert refusal(ROOM.read, Form(kind)).condition == "bad-request"


# -- the wire


@pytest.mark.parametrize(
    "xml",
    [
        "<x xmlns='jabber:x:data'/>",
        "<x xmlns='jabber:x:data' type='error'/>",
        "<x xmlns='jabber:x:other' type='submit'/>",
        "<y xmlns='jabber:x:data' type='submit'/>",
        "<x xmlns='jabber:x:data' type='submit'><field type='boolean'><value>1</value></field></x>",
        "<x xmlns='jabber:x:data' type='submit'><field var='a'/><field var='a'/></x>",
        "<x xmlns='jabber:x:data' type='form'><field var='a'><option/></field></x>",
        "<x xmlns='jabber:x:data' type='form'><field var='a'><option><value/><value/></option></field></x>",
        "<x xmlns='jabber:x:data' type='result'><item><field var='a'/><field var='a'/></item></x>",
    ],
)
def test_what_is_no_form(xml: str) -> None:
    """XEP-0004 §3.1, §3.2"""
    assert refusal(Form.parse, ET.fromstring(xml)).condition == "bad-request"


def test_a_form_within_a_payload() -> None:
    assert Form.within(ET.fromstring("<query xmlns='jabber:iq:register'/>")) is None
    form = Form.within(ET.fromstring("<query xmlns='jabber:iq:register'><x xmlns='jabber:x:data' type='cancel'/></query>"))
    assert form == Form("cancel")


def test_types_that_are_missing_or_unknown() -> None:
    """XEP-0004 §3.2: in a question text-single; in an answer it follows from the question. §3.3"""
    xml = "<x type='{}'><field var='a'/><field var='b' type='colour-single'/></x>"
    assert [field.type for field in Form.parse(element(xml.format("form"))).fields] == ["text-single", "text-single"]
    assert [field.type for field in Form.parse(element(xml.format("submit"))).fields] == ["", "text-single"]


def test_a_table_of_results() -> None:
    """XEP-0004 §3.4: every column in every row."""
    form = Form(
        "result",
        title="Who",
        reported=[Field("jid", "jid-single", "Address", options={"never": "shown"}), Field("name")],
        items=[{"jid": JID("romeo", "example.org", ""), "name": "Romeo"}, {"jid": JID("a", "b", ""), "age": 3}],
    )
    assert ET.tostring(form.to_element()) == ET.tostring(
        element(
            "<x type='result'><title>Who</title>"
            "<reported><field var='jid' type='jid-single' label='Address'/><field var='name' type='text-single'/></reported>"
            "<item><field var='jid'><value>romeo@example.org</value></field>"
            "<field var='name'><value>Romeo</value></field></item>"
            "<item><field var='jid'><value>a@b</value></field><field var='name'><value></value></field></item></x>"
        )
    )
    assert Form.parse(form.to_element()).items == [{"jid": ["romeo@example.org"], "name": ["Romeo"]}, {"jid": ["a@b"], "name": [""]}]


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=5)
names = st.text(st.sampled_from("abc#_"), min_size=1, max_size=4)
fields = st.lists(
    st.builds(
        Field, names, st.sampled_from(["boolean", "hidden", "list-multi", "text-multi", "text-single"]), words,
        st.lists(words), st.dictionaries(words, words), st.booleans(), words,
    ),
    unique_by=lambda field: field.var,
)  # fmt: skip


@given(st.sampled_from(["form", "submit", "result"]), fields, words, st.lists(names), fields)
def test_a_form_survives_the_wire(kind: str, fields: list[Field], title: str, lines: list[str], table: list[Field]) -> None:
    items = [{field.var: ["v"] for field in table}] if table else []
    form = Form(kind, fields, title, "\n".join(lines), table, items)
    parsed = Form.parse(ET.fromstring(ET.tostring(form.to_element())))
    assert ET.tostring(parsed.to_element()) == ET.tostring(form.to_element())
    assert (parsed.title, parsed.instructions, parsed.items) == (form.title, form.instructions, form.items)
    if kind == "form":
        assert parsed.fields == fields


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "name": words,
        "about": st.lists(names),
        "persistent": st.booleans(),
        "whois": st.sampled_from(["moderators", "anyone"]),
        "features": st.lists(st.sampled_from(["news", "polls", "search"]), unique=True),
        "maxusers": st.one_of(st.sampled_from(["none", "10"]), st.integers(11, 1000)),
        "history": st.integers(0, 100),
        "contact": st.sampled_from([None, JID("a", "b", "c")]),
        "owners": st.lists(st.builds(JID, st.sampled_from("abc"), st.just("d"), st.just("")), unique=True),
    },
)


@given(VALUES)
def test_a_form_sent_back_as_it_came_changes_nothing(values: dict[str, Any]) -> None:
    """A client that shows the form and submits it untouched."""
    shown = Form.parse(ROOM.fill(values).to_element())
    answer = Form.parse(Form("submit", shown.fields).to_element())
    expected = ROOM.defaults | values
    assert ROOM.read(answer) == expected


# -- pages

LETTERS = [(letter, letter.upper()) for letter in "abcdefghij"]


def payload(xml: str) -> ET.Element:
    return ET.fromstring(f"<query xmlns='q'>{xml.replace('<set', '<set xmlns=' + repr(str(RSM)))}</query>")


RSM = "http://jabber.org/protocol/rsm"


def turn(xml: str, limit: int = 4) -> tuple[str, int | None, str, str]:
    """Return the ids of the page, and what its answer says: position, first and last, count."""
    items, answer = page(payload(xml), LETTERS, limit)
    said = {child.tag.rpartition("}")[2]: child for child in answer}
    assert list(said) in (["first", "last", "count"], ["count"])
    first = said.get("first")
    ends = "" if first is None else f"{first.text}{said['last'].text}"
    return "".join(key for key, item in items), None if first is None else int(first.get("index", "")), ends, said["count"].text or ""


@pytest.mark.parametrize(
    ("xml", "ids", "index"),
    [
        ("", "abcd", 0),
        ("<set/>", "abcd", 0),
        ("<set><max>3</max></set>", "abc", 0),
        ("<set><max> 3\n</max></set>", "abc", 0),
        ("<set><max>99</max></set>", "abcd", 0),
        ("<set><max>99999999999</max></set>", "abcd", 0),
        ("<set><max>3</max><after>c</after></set>", "def", 3),
        ("<set><max>3</max><after>i</after></set>", "j", 9),
        ("<set><max>3</max><after>j</after></set>", "", None),
        ("<set><max>3</max><after/></set>", "abc", 0),
        ("<set><max>3</max><before>f</before></set>", "cde", 2),
        ("<set><max>3</max><before>b</before></set>", "a", 0),
        ("<set><max>3</max><before>a</before></set>", "", None),
        ("<set><max>3</max><before/></set>", "hij", 7),
        ("<set><before/></set>", "ghij", 6),
        ("<set><max>3</max><after>b</after><before/></set>", "hij", 7),
        ("<set><max>3</max><after>b</after><before>e</before></set>", "cd", 2),
        ("<set><max>3</max><after>e</after><before>b</before></set>", "", None),
        ("<set><max>3</max><index>0</index></set>", "abc", 0),
        ("<set><max>3</max><index>8</index></set>", "ij", 8),
        ("<set><max>3</max><index>10</index></set>", "", None),
        ("<set><max>0</max></set>", "", None),
        ("<set><max>0</max><after>gone</after></set>", "", None),
    ],
)
def test_pages(xml: str, ids: str, index: int | None) -> None:
    """XEP0059-2-1"""
    assert turn(xml) == (ids, index, ids[:1] + ids[-1:], "10")


@pytest.mark.parametrize("neighbour", ["after", "before"])
def test_a_neighbour_that_is_gone(neighbour: str) -> None:
    """XEP0059-2-1, §2.4"""
    assert refusal(turn, f"<set><max>3</max><{neighbour}>gone</{neighbour}></set>").condition == "item-not-found"


@pytest.mark.parametrize(
    "xml",
    ["<max>-1</max>", "<max>ten</max>", "<max/>", "<max>1.0</max>", "<max>\u0661</max>", "<index>-1</index>", "<index>x</index>",
     "<max>" + "9" * 5000 + "</max>", "<index>1</index><after>a</after>", "<index>1</index><before/>"],
)  # fmt: skip
def test_what_is_no_page(xml: str) -> None:
    assert refusal(turn, f"<set>{xml}</set>").condition == "bad-request"


def test_nothing_has_one_empty_page() -> None:
    items, answer = page(payload("<set><before/></set>"), [])
    assert not items and ET.tostring(answer) == ET.tostring(page_answer("", "", None, 0))


def test_a_long_list_may_leave_out_what_it_cannot_know() -> None:
    """XEP-0059 §2.2: for lists that are not in memory, the request and the answer apart."""
    assert PageRequest.parse(payload("<set><max>7</max><before/></set>"), 50) == PageRequest(7, "", "", None)
    assert [(child.tag, child.attrib) for child in page_answer("a", "b", None, None)] == [
        (f"{{{RSM}}}first", {}), (f"{{{RSM}}}last", {}),
    ]  # fmt: skip


@given(st.integers(0, 30), st.integers(1, 7), st.booleans())
def test_walking_by_pages_sees_everything_once(length: int, size: int, backward: bool) -> None:
    """XEP0059-2-1, §2.2, §2.3"""
    everything = [(f"id{number}", number) for number in range(length)]
    seen: list[int] = []
    where = "<before/>" if backward else ""
    for _ in range(length + 1):
        items, answer = page(payload(f"<set><max>{size}</max>{where}</set>"), everything)
        if not items:
            break
        chunk = [number for _, number in items]
        seen = chunk + seen if backward else seen + chunk
        first, last = answer[0], answer[1]
        assert first.get("index") == str(chunk[0])
        where = f"<before>{first.text}</before>" if backward else f"<after>{last.text}</after>"
    assert seen == list(range(length))
