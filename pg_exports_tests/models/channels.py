"""The channel of a session after MODELS.md's rules, in Python: what the ClickHouse expression is held against."""

import re
from collections.abc import Mapping

from pg_exports_tests.conftest import Source

Definitions = Mapping[tuple[str, str], tuple[str | None, str | None]]
"""(name, kind) to the types if paid and if organic."""

PAID_MEDIUMS = ("cpc", "cpm", "cpv", "cpa", "ppc", "retargeting")
SHOPPING = re.compile(r"^(.*(([^a-df-z]|^)shop|shopping).*)$")


def definitions(source: Source) -> Definitions:
    """The rows that the dictionary is made of."""
    rows = source.rows("SELECT domain, kind, type_if_paid, type_if_organic FROM channel_definition")
    return {(name, kind): (paid, organic) for name, kind, paid, organic in rows}


def channel_type(known: Definitions, initial: Mapping[str, str | None]) -> str:
    """Args: `initial` are the states initial_*, with '' and 'null' as None."""
    campaign = (initial["utm_campaign"] or "").lower()
    medium, source = ((initial[name] or "").lower() or None for name in ("utm_medium", "utm_source"))
    referring, gad_source, fbclid = (initial[name] for name in ("referring_domain", "gad_source", "fbclid"))

    def first_known(paid: bool) -> str | None:
        return (
            _source_type(known, source, paid)
            or (f"{'Paid' if paid else 'Organic'} Shopping" if SHOPPING.match(campaign) else None)
            or _type(known, medium, "medium", paid)
            or _source_type(known, referring, paid)
        )

    if "cross-network" in campaign:
        return "Cross Network"
    if medium in PAID_MEDIUMS or (medium or "").startswith("paid") or initial["gclid"] or gad_source:
        return (
            first_known(paid=True)
            or (gad_source == "1" and "Paid Search")
            or ("video" in campaign and "Paid Video")
            or (fbclid and "Paid Social")
            or "Paid Unknown"
        )
    if referring == "$direct" and not medium and source in (None, "(direct)", "direct", "$direct") and not fbclid:
        return "Direct"
    return (
        first_known(paid=False)
        or ("video" in campaign and "Organic Video")
        or ((medium or "").endswith("push") and "Push")
        or (fbclid and "Organic Social")
        or (referring == "$direct" and "Direct")
        or (referring and "Referral")
        or "Unknown"
    )


def _source_type(known: Definitions, name: str | None, paid: bool) -> str | None:
    labels = name.split(".") if name else []
    above = ".".join(labels[-2:]) or None
    alone = labels[-2] if len(labels) > 1 else None
    return next(filter(None, (_type(known, each, "source", paid) for each in (name, above, alone))), None)


def _type(known: Definitions, name: str | None, kind: str, paid: bool) -> str | None:
    if_paid, if_organic = known.get((name or "", kind), (None, None))
    return if_paid if paid else if_organic
