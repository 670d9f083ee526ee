"""Which events and persons pass a filter on their properties, whatever a value is and however its document is written."""

import json
import uuid
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

import pytest
from pydantic import ValidationError

from pg_exports.models import MODELS, PropertyFilter, Query, Selection
from pg_exports_tests.conftest import TEAM, Source
from pg_exports_tests.models.test_model import ODD_NAMES, creating, in_a_console
from pg_exports_tests.source_rows import HOUR, event, mapping, person

EVENTS = MODELS["events"]

DOCUMENTS = {
    "text": '{"p": "Pro plan", "q": 1}',
    "tight": '{"p":"Pro plan"}',
    "upper": '{"p": "PRO PLAN"}',
    "empty text": '{"p": ""}',
    "ten": '{"p": 10}',
    "ten as text": '{"p": "10"}',
    "ten and a half": '{"p": 10.50}',
    "minus one": '{"p": -1}',
    "past 64 bits": '{"p": 123456789012345678901234567890}',
    "true": '{"p": true}',
    "false": '{"p": false}',
    "object": '{"p": {"a": "b/c"}}',
    "list": '{"p": ["a", 1]}',
    "words of numbers": '{"p": "inf"}',
    "null": '{"p": null}',
    "absent": '{"q": "Pro plan"}',
    "nested": '{"$set": {"p": "Pro plan"}}',
    "empty object": "{}",
    "no document": "",
    "unicode": '{"p": "Ärger im Büro, ИВАН, 東京, 😀"}',
    "escaped": r'{"p": "\u00c4rger im B\u00fcro, \u0418\u0412\u0410\u041d, \u6771\u4eac, \ud83d\ude00"}',
    "escaped key": r'{"\u0070": "Pro plan"}',
    "quotes": r'{"p": "it\u0027s \"50%\" of_a C:\\new, or\n1 = 1"}',
    "twice": '{"p": "first", "p": "Pro plan"}',
    "twice, at last null": '{"p": "Pro plan", "p": null}',
    "in an object, too": '{"p": "Pro plan", "$set": {"p": "other"}}',
    "refused": '{"p": "Pro plan", "n": 1e400}',
    "refused, a number": '{"n": 1e400, "p": 10 }',
    "refused, true": '{"n": 1e400, "p": true}',
    "refused, null": '{"n": 1e400, "p": null}',
    "refused, absent": '{"n": 1e400}',
    "refused itself": r'{"p": "Pro \ud800"}',
}
NOT_SET = {
    "null", "absent", "nested", "empty object", "no document", "twice, at last null", "refused, null", "refused, absent"
}  # fmt: skip
PRO = {"text", "tight", "escaped key", "twice", "in an object, too", "refused"}


def passing(source: Source, *filters: Mapping[str, Any], hour: datetime) -> set[str]:
    """The names of the events that pass; the fingerprint has as many rows."""
    return _events(source, Selection(TEAM, hour, hour + HOUR, filters=tuple(PropertyFilter(**one) for one in filters)))


def _events(source: Source, selection: Selection) -> set[str]:
    query = EVENTS.query(selection)
    rows = source.rows(f"SELECT event FROM ({query.sql})", query.parameters)
    counted = EVENTS.fingerprints(selection)
    assert sum(row[1] for row in source.rows(counted.sql, counted.parameters)) == len(rows)
    return {name for (name,) in rows}


@pytest.fixture(scope="module")
def documents(sample: Source, sample_end: datetime) -> Iterator[tuple[Source, datetime]]:
    """A database with an event for each document, and its hour. Shared: tests only read it."""
    database = f"filters_{uuid.uuid4().hex[:12]}"
    sample.sandbox.execute(f"CREATE DATABASE {database}")
    sample.sandbox.execute(f"CREATE TABLE {database}.events AS {sample.database}.events")
    source = Source(sample.sandbox, database)
    rows = [
        event(sample_end, event=name, properties=document, person_properties='{"p": "of the person"}')
        for name, document in DOCUMENTS.items()
    ]
    source.insert("events", *rows)
    yield source, sample_end
    sample.sandbox.execute(f"DROP DATABASE {database} SYNC")


REST = set(DOCUMENTS) - NOT_SET
EVERY_OPERATOR = [
    ("exact", "Pro plan", PRO),
    ("exact", "pro plan", set()),
    ("exact", "", {"empty text"}),
    ("exact", "10", {"ten", "ten as text", "refused, a number"}),
    ("exact", 10, {"ten", "ten as text", "refused, a number"}),
    ("exact", 10.0, {"ten", "ten as text", "refused, a number"}),
    ("exact", 10.5, {"ten and a half"}),
    ("exact", "123456789012345678901234567890", {"past 64 bits"}),
    ("exact", True, {"true", "refused, true"}),
    ("exact", "true", {"true", "refused, true"}),
    ("exact", False, {"false"}),
    ("exact", '{"a":"b/c"}', {"object"}),
    ("exact", '["a",1]', {"list"}),
    ("exact", "null", set()),
    ("exact", ["PRO PLAN", 10.5, True], {"upper", "ten and a half", "true", "refused, true"}),
    ("exact", "it's \"50%\" of_a C:\\new, or\n1 = 1", {"quotes"}),
    ("exact", "') OR 1 = 1 --", set()),
    ("exact", r"Pro \ud800", {"refused itself"}),
    ("is_not", "Pro plan", set(DOCUMENTS) - PRO),
    ("is_not", ["Pro plan", "PRO PLAN"], set(DOCUMENTS) - PRO - {"upper"}),
    ("icontains", "PLAN", {*PRO, "upper"}),
    ("icontains", "ärger", {"unicode", "escaped"}),
    ("icontains", "иван", {"unicode", "escaped"}),
    ("icontains", "東", {"unicode", "escaped"}),
    ("icontains", "😀", {"unicode", "escaped"}),
    ("icontains", "50%", {"quotes"}),
    ("icontains", "%", {"quotes"}),
    ("icontains", "f_a c", {"quotes"}),
    ("icontains", "it's", {"quotes"}),
    ("icontains", "\\NEW", {"quotes"}),
    ("icontains", 10, {"ten", "ten as text", "ten and a half", "refused, a number"}),
    ("icontains", ["%", "ÄRGER"], {"quotes", "unicode", "escaped"}),
    ("icontains", "", REST),
    ("not_icontains", "plan", set(DOCUMENTS) - PRO - {"upper"}),
    ("not_icontains", ["PLAN", "10"], set(DOCUMENTS) - PRO - {"upper", "ten", "ten as text", "ten and a half"}
        - {"refused, a number"}),
    ("regex", "^Pro .*n$", PRO),
    ("regex", "(?i)pro plan", {*PRO, "upper"}),
    ("regex", r"\d+\.\d", {"ten and a half"}),
    ("regex", [r"^\d\d$", "^fal"], {"ten", "ten as text", "refused, a number", "false"}),
    ("not_regex", "(?i)PRO", set(DOCUMENTS) - PRO - {"upper", "refused itself"}),
    ("not_regex", ["Pro", "PRO"], set(DOCUMENTS) - PRO - {"upper", "refused itself"}),
    ("gt", 10, {"ten and a half", "past 64 bits"}),
    ("gte", "10", {"ten", "ten as text", "ten and a half", "past 64 bits", "refused, a number"}),
    ("lt", 10, {"minus one"}),
    ("lte", 10.0, {"minus one", "ten", "ten as text", "refused, a number"}),
    ("lt", -1.5e300, set()),
    ("is_set", None, REST),
    ("is_not_set", None, NOT_SET),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "value", "expected"), EVERY_OPERATOR)
def test_a_filter_lets_these_documents_pass(
    documents: tuple[Source, datetime], operator: str, value: object, expected: set[str]
) -> None:
    source, hour = documents
    assert passing(source, {"key": "p", "operator": operator, "value": value}, hour=hour) == expected


def test_every_operator_is_tried() -> None:
    assert {operator for operator, _, _ in EVERY_OPERATOR} == set(
        PropertyFilter.model_json_schema()["properties"]["operator"]["enum"]
    )


def test_an_event_must_pass_every_filter_on_its_own_and_its_persons_properties(
    documents: tuple[Source, datetime],
) -> None:
    source, hour = documents
    of_person = {"key": "p", "type": "person", "value": "of the person"}
    assert passing(source, of_person, hour=hour) == set(DOCUMENTS)
    assert passing(source, of_person | {"operator": "is_not"}, hour=hour) == set()
    assert passing(source, of_person, {"key": "p", "operator": "gt", "value": 10}, hour=hour) == {
        "ten and a half",
        "past 64 bits",
    }
    both: list[dict[str, Any]] = [
        {"key": "p", "type": "event", "value": "Pro plan"},
        {"key": "q", "operator": "lt", "value": 2},
    ]
    assert passing(source, *both, hour=hour) == {"text"}


def test_filters_and_event_names_select_together(documents: tuple[Source, datetime]) -> None:
    source, hour = documents
    filters = (PropertyFilter(key="p", value="Pro plan"),)
    names = Selection(TEAM, hour, hour + HOUR, ("text", "tight", "ten"), ("tight",), filters=filters)
    assert _events(source, names) == {"text"}


ODD_KEYS = (*ODD_NAMES, "a.b", "$p", "a/b", "ключ", "%", "p'] OR 1", "x\u0001y")


def test_a_key_is_taken_as_it_is(source: Source, hour: datetime) -> None:
    for n, key in enumerate(ODD_KEYS):
        written = [
            json.dumps({key: "v"}, ensure_ascii=False),
            json.dumps({key: "v"}),
            json.dumps({key: "v"}).replace("/", "\\/"),
            json.dumps({key: "v"}, ensure_ascii=False, separators=(",", ":"))[:-1] + ',"n":1e400}',
        ]
        rows = [event(hour, event=f"{n}", distinct_id=f"{m}", properties=text) for m, text in enumerate(written)]
        source.insert("events", *rows)
    source.insert("events", event(hour, event="other", properties='{"a": {"b": "v"}, "p": "v"}'))
    for n, key in enumerate(ODD_KEYS):
        query = EVENTS.query(Selection(TEAM, hour, hour + HOUR, filters=(PropertyFilter(key=key, value="v"),)))
        rows_ = source.rows(f"SELECT event, distinct_id FROM ({query.sql})", query.parameters)
        assert sorted(rows_) == [(f"{n}", f"{m}") for m in range(4)], key


def test_persons_are_filtered_by_their_latest_properties(source: Source, hour: datetime) -> None:
    one, two, three = (uuid.uuid4() for _ in range(3))
    source.insert(
        "person",
        person(hour, one, 1, properties='{"plan": "free"}'),
        person(hour, one, 2, properties='{"plan": "pro"}'),
        person(hour, two, 1, properties='{"plan": "pro"}'),
        person(hour, two, 2, properties='{"plan": "free"}'),
        person(hour, three, 1, properties=""),
    )
    source.insert("person_distinct_id2", *(mapping(hour, f"{n}", who) for n, who in enumerate((one, two, three))))

    def found(**settings: Any) -> set[str]:
        selection = Selection(TEAM, hour, hour + HOUR, filters=(PropertyFilter(key="plan", **settings),))
        query = MODELS["persons"].query(selection)
        return {name for (name,) in source.rows(f"SELECT distinct_id FROM ({query.sql})", query.parameters)}

    assert found(value="pro") == {"0"}
    assert found(value="pro", type="person") == {"0"}
    assert found(value="pro", operator="is_not") == {"1", "2"}
    assert found(operator="is_not_set") == {"2"}
    assert found(operator="is_set") == {"0", "1"}


def test_a_filtered_query_can_be_pasted_into_a_console(hour: datetime) -> None:
    filters = tuple(PropertyFilter(key=name, value=[name, "x"]) for name in ODD_NAMES)
    numbers = (PropertyFilter(key="n", operator="gt", value=1), PropertyFilter(key="n", operator="regex", value="\\d"))
    document = json.dumps(dict.fromkeys(ODD_NAMES, "x") | {name: name for name in ODD_NAMES[::2]} | {"n": 2})
    insert = Query(
        "INSERT INTO events (event, team_id, properties, inserted_at) VALUES ('a', 1, {document:String}, {at:DateTime})",
        {"document": document, "at": f"{hour:%Y-%m-%d %H:%M:%S}"},
    )
    queries = [EVENTS.query(Selection(TEAM, hour, hour + HOUR, filters=(*filters, *numbers)))]
    queries += [MODELS["persons"].query(Selection(TEAM, hour, hour + HOUR, filters=filters))]
    lines = in_a_console(
        *creating("events", "person", "person_distinct_id2"),
        insert.for_console(),
        *(query.for_console() for query in queries),
    )
    assert len(lines) == 1


def test_keys_and_values_are_bound_and_never_pasted(hour: datetime) -> None:
    filters = [PropertyFilter(key="x-key", operator="exact", value=["x-value"])]
    filters += [PropertyFilter(key="x-key", operator="regex", value="x-value", type="person")]
    for model in (EVENTS, MODELS["persons"]):
        allowed = tuple(one for one in filters if (one.type or model.filter_types[0]) in model.filter_types)
        assert "x-" not in model.query(Selection(TEAM, hour, hour + HOUR, filters=allowed)).sql


def test_a_model_refuses_filters_on_properties_that_it_lacks() -> None:
    on_event, on_person = (PropertyFilter(key="plan", value="pro", type=type_) for type_ in ("event", "person"))
    EVENTS.check_filters([on_event, on_person])
    MODELS["persons"].check_filters([on_person, PropertyFilter(key="plan", value="pro")])
    with pytest.raises(ValueError, match="persons have no properties of `type: event`"):
        MODELS["persons"].check_filters([on_event])
    with pytest.raises(ValueError, match="sessions have no properties to filter by"):
        MODELS["sessions"].check_filters([on_person])
    MODELS["sessions"].check_filters([])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"key": "", "value": 1}, "`key` must be the name"),
        ({"key": "a"}, "`value` is missing"),
        ({"key": "a", "value": []}, "`value` is missing"),
        ({"key": "a", "value": None, "operator": "gt"}, "`value` is missing"),
        ({"key": "a", "value": 1, "operator": "is_set"}, "`operator: is_set` has no `value`"),
        ({"key": "a", "value": [], "operator": "is_not_set"}, "`operator: is_not_set` has no `value`"),
        ({"key": "a", "value": [1, 2], "operator": "gt"}, "needs one number"),
        ({"key": "a", "value": "much", "operator": "lte"}, "needs one number"),
        ({"key": "a", "value": True, "operator": "lt"}, "needs one number"),
        ({"key": "a", "value": "1_0", "operator": "lt"}, "needs one number"),
        ({"key": "a", "value": {"b": 1}}, "must be a text, a number or a boolean"),
        ({"key": "a", "value": [None]}, "must be a text, a number or a boolean"),
        ({"key": "a", "value": float("nan")}, "a finite number"),
        ({"key": "a", "value": 1, "operator": "contains"}, "'exact', 'is_not'"),
        ({"key": "a", "value": 1, "type": "group"}, "'event' or 'person'"),
        ({"key": "a", "value": 1, "negate": True}, "Extra inputs"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        PropertyFilter(**settings)
