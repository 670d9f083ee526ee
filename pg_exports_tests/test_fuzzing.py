"""Random values on the whole way, against a model of it: what lands is equal, or repaired, or set aside with a reason.

`HYPOTHESIS_PROFILE=thorough` tries hundreds of examples, others every time.
"""

import itertools
import json
import os
import uuid
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pg_exports.interval import OnBadRows
from pg_exports.postgres.bad_rows import KEY_BYTES
from pg_exports_tests.conftest import Run, RunExport, Source, Target, partition_key
from pg_exports_tests.models.comparison import exact
from pg_exports_tests.source_rows import HOUR, event, export_of, mapping, person

settings.register_profile(
    "quick",
    deadline=None,
    derandomize=True,
    max_examples=12,
    database=None,
    # No shrinking: an example takes most of a second, and the message names the row.
    phases=[Phase.generate],
    suppress_health_check=[
        # Each example has hours of its own in the test's tables.
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)
settings.register_profile(
    "thorough", settings.get_profile("quick"), derandomize=False, max_examples=300, print_blob=True
)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


# Strategies. A byte that is no UTF-8 is its surrogate (`surrogateescape`) until it is inserted.

WRONG_BYTES = st.sampled_from(
    ["\udcff", "\udcc3", "\udcf0\udc9f\udc9a", "\udce2\udc82", "\udced\udca0\udc80", "\udc80"]
)
ODD_CHARACTERS = ["\0", "\x7f", "\u2028", "\ufeff", "\ufffd", "\uffff", "🦔"]
CONTROL_CHARACTERS = ["\x01", "\x1f", "\n", "\t"]
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
TEXTS = st.lists(
    st.one_of(CHARACTERS, CHARACTERS, st.sampled_from(ODD_CHARACTERS + CONTROL_CHARACTERS), WRONG_BYTES), max_size=4
).map("".join)
LONG_TEXTS = st.builds(
    lambda unit, times: unit * times, st.sampled_from(["x", "é", "\udcff", "🦔"]), st.integers(198, 202)
)


def mostly(common: st.SearchStrategy[str], *rare: st.SearchStrategy[str], of: int = 12) -> st.SearchStrategy[str]:
    """The common one but for one of `of` times. A row with a value that no repair mends tells nothing of its others."""
    return st.integers(1, of).flatmap(lambda n: st.one_of(*rare) if n == of // 2 else common)


NAMES = mostly(TEXTS, LONG_TEXTS)

ESCAPES = st.sampled_from(
    [r"\n", r"\"", r"\\", r"\/", r"\u0000", r"\\u0000", r"\u00e9", r"\uD83D\uDE80", r"\ud83d", r"\uDE80", r"\u0041"]
)
PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters='"\\'), max_size=5)
WRITTEN = st.lists(st.one_of(PLAIN, PLAIN, ESCAPES, WRONG_BYTES, st.sampled_from(ODD_CHARACTERS)), max_size=3)
STRINGS = WRITTEN.map(lambda parts: f'"{"".join(parts)}"')
SPECIAL_KEYS = st.sampled_from(['"$set"', '"$set_once"', '"$ip"', r'"\u0024set"', r'"$\u0069p"'])
KEYS = st.one_of(SPECIAL_KEYS, st.sampled_from(['"a"', '"b"']), STRINGS)
NUMBERS = st.one_of(
    st.integers().map(str),
    st.builds("{}.{}".format, st.integers(-(10**20), 10**20), st.integers(0, 10**12).map(lambda n: f"{n:013d}")),
    st.builds(
        "{}{}{}".format, st.integers(-99, 99), st.sampled_from("eE"), st.sampled_from(["0", "+7", "-7", "308", "-400"])
    ),
    st.sampled_from(["-0", "0.0", "1.50", "1e400", "1e131071", "1e-16383"]),
)
SCALARS = st.one_of(STRINGS, STRINGS, NUMBERS, st.sampled_from(["true", "false", "null"]))
SPACES = st.sampled_from(["", "", "", " ", "\n\t\r "])


def _array(items: list[str], space: str) -> str:
    return f"[{space}{f',{space}'.join(items)}{space}]"


def _object(members: list[tuple[str, str]], space: str) -> str:
    return f"{{{space}{f'{space},'.join(f'{key}{space}:{space}{value}' for key, value in members)}}}"


def _objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = st.one_of(st.tuples(KEYS, values), st.tuples(SPECIAL_KEYS, SCALARS))
    return st.builds(_object, st.lists(members, min_size=1, max_size=4), SPACES)


VALUES = st.recursive(
    SCALARS,
    lambda values: st.one_of(_objects(values), st.builds(_array, st.lists(values, max_size=3), SPACES)),
    max_leaves=5,
)
DEEP = st.integers(2, 200).map(lambda depth: '{"a":[' * depth + "1" + "]}" * depth)


def _broken(document: str, begin: int, length: int, patch: str) -> str:
    place = begin % (len(document) + 1)
    return document[:place] + patch + document[place + length :]


PATCHES = st.sampled_from(
    [
        *'{}[]",:\\',
        r"\x",
        r"\u12",
        *CONTROL_CHARACTERS,
        *("01", "1.", ".5", "+1", "0x1", "NaN", "-Infinity", "1_000", "\ufeff"),
    ]
)
# JSONB's numbers end before these, which ClickHouse takes.
PAST_NUMERIC = ["1e131072", "1e200000", "1e-20000", "0e200000"]

WHOLE = st.one_of(_objects(VALUES), _objects(VALUES), _objects(VALUES), VALUES, DEEP)
BROKEN = st.builds(_broken, WHOLE, st.integers(0, 200), st.integers(0, 2), st.one_of(TEXTS, PATCHES))
TOO_GREAT = st.builds('{{"a":{},"$set":{}}}'.format, st.sampled_from(PAST_NUMERIC), VALUES)
DOCUMENTS = mostly(WHOLE, BROKEN, BROKEN, TEXTS, TOO_GREAT, of=6)


# The model


@dataclass(frozen=True)
class Value:
    """What becomes of a value: what lands (in one of these ways), whether that is a repair, whether it may be refused."""

    lands: Hashable
    repaired: bool = False
    refused: bool = False
    either: bool = False


def text_value(text: str, longest: int | None = None) -> Value:
    new = repaired(read(text))
    return Value(new, new != text, refused=longest is not None and len(new) > longest)


def read(text: str) -> str:
    """A text of ClickHouse's as Python reads its bytes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def repaired(text: str) -> str:
    return "".join(
        "\ufffd" if character == "\0" or "\ud800" <= character <= "\udfff" else character for character in text
    )


class Number(str):
    """A number's digits."""


class Members(list[tuple[str, Any]]):
    """An object's members."""


def parsed(document: str) -> Any:
    """A document as a strict parser reads it; a raw NUL is one that was repaired.

    Raises:
        ValueError: it is no JSON.
    """

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(
        read(document).replace("\0", "\ufffd"),
        parse_int=Number,
        parse_float=Number,
        parse_constant=refuse,
        object_pairs_hook=Members,
    )


def written(value: Any) -> str:
    """A parsed value as JSON, repaired."""
    if isinstance(value, Members):
        return "{" + ",".join(f"{json.dumps(repaired(key))}:{written(member)}" for key, member in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(item) for item in value) + "]"
    if isinstance(value, Number):
        return str(value)
    return json.dumps(repaired(value) if isinstance(value, str) else value)


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, Members):
        yield from itertools.chain.from_iterable((key, *strings(member)) for key, member in value)
    elif isinstance(value, list):
        yield from itertools.chain.from_iterable(strings(item) for item in value)
    elif isinstance(value, str):
        yield value


def numbers_that_postgres_refuses(text: str) -> bool:
    """Whether a number is (perhaps) past what NUMERIC holds."""
    return any(number in text for number in PAST_NUMERIC)


def document_value(document: str) -> tuple[Value, Value, Value, Value]:
    """What becomes of a document, and of `$set`, `$set_once` and `$ip` in it."""
    nothing = Value(None)
    if document == "":
        return nothing, nothing, nothing, nothing
    try:
        value = parsed(document)
    except ValueError:
        # A repair does not make it JSON.
        return Value(None, refused=True), nothing, nothing, nothing
    is_repaired = (
        read(document) != document or "\0" in document or any(repaired(text) != text for text in strings(value))
    )
    text = written(value)
    whole = Value(exact(text), is_repaired, either=numbers_that_postgres_refuses(document))
    members = dict(value) if isinstance(value, Members) else {}
    ip = repaired(members["$ip"]) if type(members.get("$ip")) is str else ""
    return (
        whole,
        *(Value(None if members.get(key) is None else exact(written(members[key]))) for key in ("$set", "$set_once")),
        Value(ip or None, refused=len(ip) > 200),
    )  # type: ignore[return-value]


# Rows


@dataclass(frozen=True)
class Row:
    event: str
    distinct_id: str
    properties: str
    elements_chain: str

    @property
    def values(self) -> tuple[Value, ...]:
        chain = text_value(self.elements_chain.replace("\0", ""))
        return (
            text_value(self.event, longest=200),
            text_value(self.distinct_id, longest=200),
            *document_value(self.properties),
            Value(elements(self.elements_chain), chain.repaired),
        )

    @property
    def landed(self) -> tuple[Hashable, ...]:
        return tuple(value.lands for value in self.values)

    @property
    def is_repaired(self) -> bool:
        return any(value.repaired for value in self.values)

    @property
    def may_land(self) -> bool:
        return not any(value.refused for value in self.values)

    @property
    def may_be_refused(self) -> bool:
        return any(value.refused or value.either for value in self.values)


def elements(chain: str) -> str:
    """The text of `elements`' JSON string: the chain as JSON, in which ClickHouse escapes what JSON must."""
    return str(json.loads(json.dumps(read(chain))))


def wrong_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def as_bytes_read(text: str) -> str:
    """The text, in which wrong bytes that make a character with those beside them are that character."""
    return wrong_bytes(text).decode("utf-8", "surrogateescape")


ROWS = st.lists(
    st.builds(lambda *texts: Row(*map(as_bytes_read, texts)), NAMES, NAMES, DOCUMENTS, TEXTS), min_size=50, max_size=100
)

NUMBERED = itertools.count(1)
"""Each row of a session has a uuid of its own, each example an hour."""


@settings(PROFILE)
@given(ROWS, st.sampled_from(["repair", "repair", "reject"]))
def test_every_event_lands_as_the_model_says_or_is_set_aside_with_a_reason(
    source: Source, target: Target, run: RunExport, hour: datetime, rows: list[Row], on_bad_rows: OnBadRows
) -> None:
    by_uuid = {uuid.UUID(int=next(NUMBERED)): row for row in rows}
    begin = hour - next(NUMBERED) * HOUR
    source.insert(
        "events",
        *(
            event(
                begin,
                uuid=key,
                event=wrong_bytes(row.event),
                distinct_id=wrong_bytes(row.distinct_id),
                properties=wrong_bytes(row.properties),
                elements_chain=wrong_bytes(row.elements_chain),
                person_properties=b"",
            )
            for key, row in by_uuid.items()
        ),
    )
    export = export_of("events", target, hour, start=hour - timedelta(days=10_000), on_bad_rows=on_bad_rows)
    metadata = metadata_of(run(export, partition_key(begin)))
    uuids = ", ".join(f"'{key}'" for key in by_uuid)
    landed = {
        uuid.UUID(key): (name, distinct_id, exact(document), exact(set_), exact(set_once), ip, json.loads(chain))
        for key, name, distinct_id, document, set_, set_once, ip, chain in target.rows(
            "SELECT uuid, event, distinct_id, properties::text, set::text, set_once::text, ip, elements #>> '{}'"
            f" FROM events WHERE uuid IN ({uuids})"
        )
    }
    aside = rejected_rows(target, begin)
    by_key = {uuid.UUID(row["uuid"]): row for row in aside}
    assert len(by_key) == len(aside)
    assert landed.keys() | by_key.keys() == by_uuid.keys()
    assert not landed.keys() & by_key.keys()
    for key, row in by_uuid.items():
        must_be_refused = not row.may_land or (on_bad_rows == "reject" and row.is_repaired)
        if key in landed:
            assert not must_be_refused, row
            assert landed[key] == row.landed, row
        else:
            assert must_be_refused or row.may_be_refused, row
            was = {name: by_key[key][name] for name in ("event", "distinct_id", "properties")}
            properties = row.properties or None
            assert was == {"event": row.event, "distinct_id": row.distinct_id, "properties": properties}
    assert metadata["rows_repaired"] == sum(by_uuid[key].is_repaired for key in landed)
    assert metadata["rows_rejected"] == len(aside)
    assert metadata["rows_inserted"] == len(landed)


@settings(PROFILE, max_examples=PROFILE.max_examples // 3)
@given(
    st.lists(
        st.tuples(
            st.one_of(TEXTS, st.builds(lambda end: "x" * (KEY_BYTES - 8) + end, TEXTS)).map(as_bytes_read),
            st.one_of(
                st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.sampled_from([2**31 - 1, 2**31, 2**63 - 1, 2**63])
            ),
            st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-(2**31), 2**31)),
        ),
        min_size=30,
        max_size=80,
        unique_by=lambda row: row[0],
    )
)
def test_every_person_lands_as_the_model_says_or_is_set_aside_with_a_reason(
    source: Source, target: Target, run: RunExport, hour: datetime, rows: list[tuple[str, int, int]]
) -> None:
    begin = hour - next(NUMBERED) * HOUR
    # A key of the example's own.
    mine = f"{next(NUMBERED)}-"
    keys = [uuid.UUID(int=next(NUMBERED)) for _ in rows]
    known = list(zip(keys, rows, strict=True))
    source.insert("person", *(person(begin, key, version, properties=b"") for key, (_, version, _) in known))
    mappings = [
        mapping(begin, "", key, mapped) | {"distinct_id": wrong_bytes(mine + name)} for key, (name, _, mapped) in known
    ]
    source.insert("person_distinct_id2", *mappings)
    export = export_of("persons", target, hour, start=hour - timedelta(days=10_000))
    metadata = metadata_of(run(export, partition_key(begin)))
    landed = {
        (distinct_id, version, mapped)
        for distinct_id, version, mapped in target.rows(
            "SELECT distinct_id, person_version, person_distinct_id_version FROM persons"
            f" WHERE distinct_id LIKE '{mine}%'"
        )
    }
    aside = {
        (row["distinct_id"], row["person_version"], row["person_distinct_id_version"])
        for row in rejected_rows(target, begin)
    }
    sent = {(mine + distinct_id, version, mapped) for distinct_id, version, mapped in rows}
    good = {row for row in sent if person_fits(*row)}
    assert (landed, aside) == (good, sent - good)
    assert (metadata["rows_inserted"], metadata["rows_repaired"], metadata["rows_rejected"]) == (
        len(good),
        0,
        len(sent - good),
    )


def person_fits(distinct_id: str, version: int, mapped: int) -> bool:
    is_text = not text_value(distinct_id).repaired and len(distinct_id.encode("utf-8", "surrogateescape")) <= KEY_BYTES
    return is_text and all(-(2**31) <= number < 2**31 for number in (version, mapped))


def metadata_of(run: Run) -> dict[str, Any]:
    assert run.error is None
    [metadata] = run.metadata.values()
    return metadata


def rejected_rows(target: Target, begin: datetime) -> list[dict[str, Any]]:
    """The interval's rejected rows as they were. Each has a reason."""
    kept = target.rows(f"SELECT row_as_it_was, reason FROM pg_exports_rejected WHERE interval_start = '{begin}'")
    assert all(reason for _, reason in kept)
    return [json.loads(row) for row, _ in kept]
