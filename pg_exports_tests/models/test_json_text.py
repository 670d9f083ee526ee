"""Members of a JSON object as they are written: every byte of every value, whatever the parsers think of it."""

import json
import random
import re
from collections.abc import Iterable

import pytest

from pg_exports.models.json_text import members, reader, unescaped


def plain(keys: Iterable[str]) -> list[str]:
    """Those of the keys that a reader can be made for."""
    return [key for key in keys if not re.search(r'[\\"\x00-\x1f]', key)]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("{}", {}),
        (' \t\r\n{ "a" : 1 } \n', {"a": "1"}),
        (
            '{"a":1.50,"b":1e400,"c":-0,"d":12345678901234567890123}',
            {"a": "1.50", "b": "1e400", "c": "-0", "d": "12345678901234567890123"},
        ),
        ('{"a": true ,"b":false,\n"c":null}', {"a": "true", "b": "false", "c": "null"}),
        ('{"a":{"b":[1, {"c":"}"}]} ,"d":[ ]}', {"a": '{"b":[1, {"c":"}"}]}', "d": "[ ]"}),
        (r'{"a":"\\","b":"\"","c":"\\\""}', {"a": r'"\\"', "b": r'"\""', "c": r'"\\\""'}),
        (r'{"a":{"path":"C:\\"},"b":1}', {"a": r'{"path":"C:\\"}', "b": "1"}),
        ('{"a":1,"a":2,"\\u0061":3}', {"a": "3"}),
        (r'{"\u0024set":1,"\ud83d\ude80":2,"a\/b":3,"\"":4}', {"$set": "1", "🚀": "2", "a/b": "3", '"': "4"}),
        (r'{"a":"\ud800","b":1}', {"a": r'"\ud800"', "b": "1"}),
        ('{"a":"line\nbreak","b":1}', {"a": '"line\nbreak"', "b": "1"}),
        ('{"":1}', {"": "1"}),
    ],
)
def test_each_members_value_is_given_as_it_is_written(document: str, expected: dict[str, str]) -> None:
    assert members(document) == expected
    keys = plain(expected)
    assert reader(keys)(document) == [expected[key] for key in keys]


@pytest.mark.parametrize(
    "document", ["", " ", "[]", '[{"a":1}]', '"a"', "1", "null", "{", '{"a', '{"a"', '{"a":', "{a:1}"]
)
def test_what_is_no_object_has_no_members(document: str) -> None:
    assert members(document) == {}
    assert reader(["a"])(document) == [None]


@pytest.mark.parametrize(
    "document",
    [
        '{"a":1,"b',
        '{"a":1,"b":',
        '{"a":1,"b":"',
        '{"a":1,"b":{"c":[}',
        '{"a":1,,"b":2}',
        '{"a":1 "b":2}',
        '{"a":1,"b" 2}',
        '{"a":1]',
    ],
)
def test_members_before_the_place_where_the_text_breaks_off_are_given(document: str) -> None:
    assert members(document) == {"a": "1"}
    assert reader(["a", "b"])(document) == ["1", None]


def test_depth_and_length_are_no_limit() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    long = '"' + r"\\\"" * 100_000 + '"'
    assert members(f'{{"a":{deep},"b":{long},"c":1}}') == {"a": deep, "b": long, "c": "1"}


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ('""', ""),
        (r'"a\"\\\/\b\f\n\r\t"', 'a"\\/\b\f\n\r\t'),
        (r'"Caf\u00E9 \ud83d\ude80"', "Café 🚀"),
        (r'"\\u0041"', "\\u0041"),
        (r'"\ud83d"', "\ud83d"),
        ('"a\tb"', "a\tb"),
        (r'"\x"', r'"\x"'),
    ],
)
def test_a_string_token_is_read_with_its_escapes(token: str, text: str) -> None:
    assert unescaped(token) == text


def test_random_documents_are_cut_where_a_json_parser_cuts_them() -> None:
    dice = random.Random(7)
    for _ in range(2_000):
        document = {f"{dice.choice(PIECES)}{number}": random_value(dice, 0) for number in range(dice.randrange(5))}
        separators = (dice.choice((",", " , ", ",\n")), dice.choice((":", " : ")))
        text = json.dumps(document, separators=separators, ensure_ascii=dice.random() < 0.5)
        cut = members(text)
        assert list(cut) == list(document)
        keys = plain(cut)
        assert reader([*keys, "no member"])(text) == [*(cut[key] for key in keys), None]
        assert all(json.dumps(json.loads(raw)) == json.dumps(document[key]) for key, raw in cut.items())
        assert all(raw == raw.strip() and raw in text for raw in cut.values())


PIECES = ("a", "$set", '"', "\\", "{", "}", "[", "]", ",", ":", "ü", "🚀", "\n", "\t", " ", "\x7f", "null")


def random_value(dice: random.Random, depth: int) -> object:
    kind = dice.random()
    if depth < 4 and kind < 0.3:
        return {dice.choice(PIECES): random_value(dice, depth + 1) for _ in range(dice.randrange(3))}
    if depth < 4 and kind < 0.5:
        return [random_value(dice, depth + 1) for _ in range(dice.randrange(3))]
    return dice.choice((None, True, False, 0, -1.5, 10**30, "".join(dice.choices(PIECES, k=dice.randrange(6)))))
