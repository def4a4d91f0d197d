"""Reading an object with the places of its members, and changing some."""

import json
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocol.json_spans import (
    DuplicateKeyError,
    JsonSpanError,
    add_members,
    read_object,
    scan_object,
    set_members,
)

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
_space = st.text(alphabet=" \t\n\r", max_size=2)


@st.composite
def _texts(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """An object as text, with white space anywhere that it may stand."""
    fields = draw(st.dictionaries(st.text(max_size=5), _values, max_size=5))
    ascii_only = draw(st.booleans())
    members = [
        f"{draw(_space)}{json.dumps(key, ensure_ascii=ascii_only)}{draw(_space)}:{draw(_space)}"
        f"{json.dumps(value, ensure_ascii=ascii_only)}{draw(_space)}"
        for key, value in fields.items()
    ]
    return draw(_space) + "{" + (",".join(members) or draw(_space)) + "}" + draw(_space), fields


@given(_texts())
def test_values_and_places(made: tuple[str, dict[str, Any]]) -> None:
    text, fields = made
    members = scan_object(text)
    assert {member.key: member.value for member in members} == fields == read_object(text)
    for member in members:
        assert json.loads(text[member.value_start : member.value_end]) == member.value
        assert json.loads("{" + text[member.start : member.end] + "}") == {member.key: member.value}


@given(_texts(), st.data())
def test_changes_are_made_and_nothing_else(made: tuple[str, dict[str, Any]], data: st.DataObject) -> None:
    text, fields = made
    keys = st.sampled_from([*fields, "new", "newer"])
    values = data.draw(st.dictionaries(keys, st.none() | _values, max_size=5))
    members = scan_object(text)
    changed = set_members(
        text, members, {key: None if v is None else json.dumps(v) for key, v in values.items()}
    )
    expected = {
        key: value for key, value in {**fields, **values}.items() if key not in values or value is not None
    }
    assert json.loads(changed) == expected
    for member in members:
        if member.key not in values:
            assert text[member.start : member.end] in changed
    assert changed.startswith(text[: text.index("{")])
    assert changed.endswith(text[text.rindex("}") :])


@given(_texts())
def test_no_change_is_no_change(made: tuple[str, dict[str, Any]]) -> None:
    text, _ = made
    assert set_members(text, scan_object(text), {}) == text
    assert set_members(text, scan_object(text), {"absent, surely": None}) == text


@given(st.text(alphabet='{}[]":,\\ 1ae.-+ntu\n', max_size=20))
def test_accepts_what_json_accepts_and_no_more(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        expected = None
    try:
        found = {member.key: member.value for member in scan_object(text)}
    except DuplicateKeyError as error:
        with pytest.raises(DuplicateKeyError) as again:
            read_object(text)
        assert again.value.key == error.key
        return
    except JsonSpanError:
        assert not isinstance(expected, dict)
        with pytest.raises(JsonSpanError):
            read_object(text)
        return
    assert found == expected == read_object(text)


@given(_texts())
def test_members_are_added_as_they_are_set(made: tuple[str, dict[str, Any]]) -> None:
    text, fields = made
    if fields:
        changes = {"new, surely": "[1]", "newer": '"x"'}
        assert add_members(text, changes) == set_members(text, scan_object(text), changes)


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("{}", {"a": "1"}, '{"a":1}'),
        ("{ }", {"a": "1", "b": "[2]"}, '{"a":1,"b":[2] }'),
        ('{"x":1.50}', {"a": "1"}, '{"a":1,"x":1.50}'),
        ('{"x":1}', {"x": None}, "{}"),
        ('{ "x":1 , "y":2 }', {"x": None}, '{ "y":2 }'),
        ('{ "x":1 , "y":2 }', {"y": None}, '{ "x":1 }'),
        ('{ "x":1 , "y":2 }', {"x": None, "y": None}, "{  }"),
        ('{"x":1,"y":2,"z":3}', {"x": None, "z": None}, '{"y":2}'),
        ('{"x":1,"y":2,"z":3}', {"y": None, "z": None, "a": "0"}, '{"a":0,"x":1}'),
        ('{"x":1,"y":2,"z":3}', {"x": None, "y": None, "z": None, "a": "0"}, '{"a":0}'),
        ('{"x":1,"y":2}', {"x": "[]", "y": None}, '{"x":[]}'),
        ('{"\\u0078":1}', {"x": "2"}, '{"\\u0078":2}'),
    ],
)
def test_set_members(text: str, changes: dict[str, str | None], expected: str) -> None:
    assert set_members(text, scan_object(text), changes) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "null",
        "[]",
        '"{}"',
        "{",
        '{"a"',
        '{"a":',
        '{"a":1',
        '{"a":1,',
        '{"a":1,}',
        '{"a" 1}',
        "{a:1}",
        "{1:1}",
        '{"a":1}}',
        '{"a":1} x',
        '{"a":"\n"}',
        '{"a":01}',
        '\ufeff{"a":1}',
        '\xa0{"a":1}',
        '{"a":' + "[" * 100_000,
        '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a":' + "9" * 5_000 + "}",
    ],
)
def test_refuses(text: str) -> None:
    for lenient in (False, True):
        with pytest.raises(JsonSpanError):
            scan_object(text, lenient=lenient)
        with pytest.raises(JsonSpanError):
            read_object(text, lenient=lenient)


@pytest.mark.parametrize("text", ['{"a":NaN}', '{"a":[Infinity]}', '{"a":{"b":-Infinity}}'])
def test_what_no_json_has_is_refused_from_callers_and_read_from_providers(text: str) -> None:
    with pytest.raises(JsonSpanError):
        scan_object(text)
    with pytest.raises(JsonSpanError):
        read_object(text)
    assert list(read_object(text, lenient=True)) == ["a"]
    (member,) = scan_object(text, lenient=True, inexact=frozenset("a"))
    assert text[member.value_start : member.value_end] == text[5:-1]


def test_a_key_named_twice_is_refused_at_the_top_only() -> None:
    with pytest.raises(DuplicateKeyError) as caught:
        scan_object('{"model":"a","\\u006dodel":"b"}')
    assert caught.value.key == "model"
    with pytest.raises(DuplicateKeyError) as caught:
        read_object('{"model":"a","\\u006dodel":"b"}')
    assert caught.value.key == "model"
    assert read_object('{"a":{"b":1,"b":2}}') == {"a": {"b": 2}}
    assert scan_object('{"a":{"b":1,"b":2}}')[0].value == {"b": 2}


def test_a_key_named_twice_is_read_where_that_is_allowed() -> None:
    members = scan_object('{"a":1,"b":2,"a":3}', unique_keys=False)
    assert [(member.key, member.value) for member in members] == [("a", 1), ("b", 2), ("a", 3)]


def test_white_space_costs_next_to_nothing() -> None:
    space = " \n" * 2_000_000
    text = f'{space}{{{space}"a"{space}:{space}1{space},{space}"b":2{space}}}{space}'
    started_s = time.process_time()
    assert [member.key for member in scan_object(text)] == ["a", "b"]
    assert time.process_time() - started_s < 1.0


def test_exact_numbers() -> None:
    text = '{"cost":0.1000000000000000055511151231257827,"e":1E-7,"n":12345678901234567890123}'
    exact = {member.key: member.value for member in scan_object(text, lenient=True)}
    assert exact == read_object(text, lenient=True)
    assert exact == {
        "cost": Decimal("0.1000000000000000055511151231257827"),
        "e": Decimal("1E-7"),
        "n": 12345678901234567890123,
    }
    assert isinstance(scan_object(text)[0].value, float)


@pytest.mark.parametrize("number", ["1e999999999", "1e-999999999", "1e99999999999999999999", "0e999999"])
def test_exact_numbers_have_a_bound(number: str) -> None:
    """Beyond it they are floats: a ``Decimal`` made an int would fill the memory."""
    (member,) = scan_object(f'{{"a":{number}}}', lenient=True)
    assert isinstance(member.value, float)
    assert member.value == read_object(f'{{"a":{number}}}', lenient=True)["a"] == float(number)
