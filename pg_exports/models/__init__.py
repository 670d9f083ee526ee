"""What can be exported: one module a model, with its columns and its ClickHouse query. No I/O and no driver here.

`model` has the words; `events`, `persons` and `sessions` are PostHog's three, `own` a user's; `columns` changes what a model
has, `filters` selects among its rows; `json_text` and `channel_type` serve them.
"""

from pg_exports.models.columns import AddedColumn, ColumnChange, with_columns
from pg_exports.models.events import EVENTS, MERGED_EVENTS
from pg_exports.models.filters import PropertyFilter
from pg_exports.models.model import (
    AS_READ,
    FRAME_TYPES,
    IDENTITY,
    INTERVAL,
    STATE,
    Column,
    Kind,
    Merge,
    Model,
    Part,
    Query,
    Selection,
)
from pg_exports.models.own import OwnModel
from pg_exports.models.persons import PERSONS
from pg_exports.models.sessions import SESSIONS

MODELS = {model.name: model for model in (EVENTS, PERSONS, SESSIONS)}
"""The built-in models by name."""

__all__ = [
    "AS_READ",
    "FRAME_TYPES",
    "IDENTITY",
    "INTERVAL",
    "MERGED_EVENTS",
    "MODELS",
    "STATE",
    "AddedColumn",
    "Column",
    "ColumnChange",
    "Kind",
    "Merge",
    "Model",
    "OwnModel",
    "Part",
    "PropertyFilter",
    "Query",
    "Selection",
    "with_columns",
]
