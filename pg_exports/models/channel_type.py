"""The channel that brought a session, after PostHog's public rules ("Channel type" in its docs): one expression."""

DICTIONARY = "channel_definition_dict"
"""The source's dictionary of known sources and mediums, keyed (name, kind)."""

_SHOPPING = "'^(.*(([^a-df-z]|^)shop|shopping).*)$'"

_CAMPAIGN = "lower(sessions.entry_utm_campaign)"
_MEDIUM = "lower(sessions.entry_utm_medium)"
_SOURCE = "lower(sessions.entry_utm_source)"


def _kind_of(name: str, kind: str, attribute: str) -> str:
    return f"dictGetOrNull('{DICTIONARY}', '{attribute}', (ifNull({name}, ''), '{kind}'))"


def _source_type(name: str, attribute: str) -> str:
    """m.facebook.com is looked up as itself, as facebook.com (PostHog's own second look-up), and as facebook."""
    names = (name, f"cutToFirstSignificantSubdomain({name})", f"firstSignificantSubdomain({name})")
    return f"coalesce({', '.join(_kind_of(each, 'source', attribute) for each in names)})"


def _known_type(paid_or_organic: str, attribute: str) -> str:
    """The first of source, shopping campaign, medium and referring domain that tells the type; NULL where none does."""
    return f"""{_source_type(_SOURCE, attribute)},
            if(match({_CAMPAIGN}, {_SHOPPING}), '{paid_or_organic} Shopping', NULL),
            {_kind_of(_MEDIUM, "medium", attribute)},
            {_source_type("sessions.entry_referring_domain", attribute)}"""


SQL = f"""multiIf(
        position({_CAMPAIGN}, 'cross-network') > 0,
        'Cross Network',

        {_MEDIUM} IN ('cpc', 'cpm', 'cpv', 'cpa', 'ppc', 'retargeting')
            OR startsWith({_MEDIUM}, 'paid')
            OR sessions.entry_gclid IS NOT NULL
            OR sessions.entry_gad_source IS NOT NULL,
        coalesce(
            {_known_type("Paid", "type_if_paid")},
            multiIf(
                sessions.entry_gad_source = '1', 'Paid Search',
                position({_CAMPAIGN}, 'video') > 0, 'Paid Video',
                sessions.entry_fbclid IS NOT NULL, 'Paid Social',
                'Paid Unknown'
            )
        ),

        sessions.entry_referring_domain = '$direct'
            AND {_MEDIUM} IS NULL
            AND ({_SOURCE} IS NULL OR {_SOURCE} IN ('(direct)', 'direct', '$direct'))
            AND sessions.entry_fbclid IS NULL,
        'Direct',

        coalesce(
            {_known_type("Organic", "type_if_organic")},
            multiIf(
                position({_CAMPAIGN}, 'video') > 0, 'Organic Video',
                endsWith({_MEDIUM}, 'push'), 'Push',
                sessions.entry_fbclid IS NOT NULL, 'Organic Social',
                sessions.entry_referring_domain = '$direct', 'Direct',
                sessions.entry_referring_domain IS NOT NULL, 'Referral',
                'Unknown'
            )
        )
    )"""
"""The ClickHouse expression. Its names are those of the sessions query's inner select, where '' and 'null' are NULL."""
