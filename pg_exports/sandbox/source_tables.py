"""PostHog's tables in the sandbox's ClickHouse: the DDL of the four sources and of the channel dictionary.

The tables are PostHog's own, trimmed to the columns that the exports read. What fills them lives in
`sample_data`; the server that holds them in `clickhouse_server`.
"""

from collections.abc import Callable, Mapping

from pg_exports.sandbox.clickhouse_config import NAMED_COLLECTION

Execute = Callable[[str, Mapping[str, object]], object]
"""Runs one ClickHouse statement with its `{name:Type}` parameters bound; what it returns is ignored."""

EVENTS = """
CREATE TABLE IF NOT EXISTS {database:Identifier}.events (
    uuid UUID,
    event String,
    properties String,
    timestamp DateTime64(6, 'UTC'),
    team_id Int64,
    distinct_id String,
    elements_chain String,
    created_at DateTime64(6, 'UTC'),
    person_id UUID,
    person_properties String,
    _timestamp DateTime,
    _offset UInt64,
    inserted_at Nullable(DateTime64(6, 'UTC')) DEFAULT now64(),
    INDEX minmax_inserted_at coalesce(inserted_at, _timestamp) TYPE minmax GRANULARITY 1
)
ENGINE = ReplacingMergeTree(_timestamp)
PARTITION BY toYYYYMM(timestamp)
ORDER BY (team_id, toDate(timestamp), event, cityHash64(distinct_id), cityHash64(uuid))
"""

PERSON = """
CREATE TABLE IF NOT EXISTS {database:Identifier}.person (
    id UUID,
    created_at DateTime64(3),
    team_id Int64,
    properties String,
    is_identified Int8,
    is_deleted Int8,
    version UInt64,
    _timestamp DateTime,
    _offset UInt64
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (team_id, id)
"""

PERSON_DISTINCT_ID2 = """
CREATE TABLE IF NOT EXISTS {database:Identifier}.person_distinct_id2 (
    team_id Int64,
    distinct_id String,
    person_id UUID,
    is_deleted Int8,
    version Int64,
    _timestamp DateTime,
    _offset UInt64,
    _partition UInt64
)
ENGINE = ReplacingMergeTree(version)
ORDER BY (team_id, distinct_id)
"""

RAW_SESSIONS = """
CREATE TABLE IF NOT EXISTS {database:Identifier}.raw_sessions (
    team_id Int64,
    session_id_v7 UInt128,
    distinct_id AggregateFunction(argMax, String, DateTime64(6, 'UTC')),
    min_timestamp SimpleAggregateFunction(min, DateTime64(6, 'UTC')),
    max_timestamp SimpleAggregateFunction(max, DateTime64(6, 'UTC')),
    max_inserted_at SimpleAggregateFunction(max, DateTime64(6, 'UTC')),
    urls SimpleAggregateFunction(groupUniqArrayArray, Array(String)),
    entry_url AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    end_url AggregateFunction(argMax, String, DateTime64(6, 'UTC')),
    last_external_click_url AggregateFunction(argMax, String, DateTime64(6, 'UTC')),
    initial_referring_domain AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_utm_source AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_utm_campaign AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_utm_medium AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_utm_term AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_utm_content AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_gclid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_gad_source AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_gclsrc AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_dclid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_gbraid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_wbraid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_fbclid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_msclkid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_twclid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_li_fat_id AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_mc_cid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_igshid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_ttclid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial__kx AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    initial_irclid AggregateFunction(argMin, String, DateTime64(6, 'UTC')),
    pageview_uniq AggregateFunction(uniq, Nullable(UUID)),
    autocapture_uniq AggregateFunction(uniq, Nullable(UUID)),
    screen_uniq AggregateFunction(uniq, Nullable(UUID)),
    page_screen_autocapture_uniq_up_to AggregateFunction(uniqUpTo(1), Nullable(UUID)),
    vitals_lcp AggregateFunction(argMin, Nullable(Float64), DateTime64(6, 'UTC'))
)
ENGINE = AggregatingMergeTree
ORDER BY (
    team_id,
    toStartOfHour(fromUnixTimestamp(intDiv(toUInt64(bitShiftRight(session_id_v7, 80)), 1000))),
    cityHash64(session_id_v7),
    session_id_v7
)
"""

CHANNEL_DEFINITION = """
CREATE TABLE IF NOT EXISTS {database:Identifier}.channel_definition (
    domain String,
    kind String,
    domain_type Nullable(String),
    type_if_paid Nullable(String),
    type_if_organic Nullable(String)
)
ENGINE = MergeTree
ORDER BY (domain, kind)
"""

# Emptied first: this table belongs to the sandbox alone, and creating the tables twice must not double it.
CHANNEL_DEFINITION_EMPTIED = "TRUNCATE TABLE {database:Identifier}.channel_definition"

CHANNEL_DEFINITION_ROWS = """
INSERT INTO {database:Identifier}.channel_definition (domain, kind, domain_type, type_if_paid, type_if_organic)
SELECT domain, kind, domain_type, type_if_paid, type_if_organic
FROM values(
    'domain String, kind String,
     domain_type Nullable(String), type_if_paid Nullable(String), type_if_organic Nullable(String)',
    ('google', 'source', 'Search', 'Paid Search', 'Organic Search'),
    ('bing', 'source', 'Search', 'Paid Search', 'Organic Search'),
    ('duckduckgo', 'source', 'Search', 'Paid Search', 'Organic Search'),
    ('yahoo', 'source', 'Search', 'Paid Search', 'Organic Search'),
    ('baidu', 'source', 'Search', 'Paid Search', 'Organic Search'),
    ('yandex', 'source', 'Search', 'Paid Search', 'Organic Search'),
    ('ecosia', 'source', 'Search', 'Paid Search', 'Organic Search'),
    ('adwords', 'source', 'Search', 'Paid Search', NULL),
    ('facebook', 'source', 'Social', 'Paid Social', 'Organic Social'),
    ('fb', 'source', 'Social', 'Paid Social', 'Organic Social'),
    ('instagram', 'source', 'Social', 'Paid Social', 'Organic Social'),
    ('twitter', 'source', 'Social', 'Paid Social', 'Organic Social'),
    ('t.co', 'source', 'Social', 'Paid Social', 'Organic Social'),
    ('linkedin', 'source', 'Social', 'Paid Social', 'Organic Social'),
    ('reddit', 'source', 'Social', 'Paid Social', 'Organic Social'),
    ('pinterest', 'source', 'Social', 'Paid Social', 'Organic Social'),
    ('tiktok', 'source', 'Social', 'Paid Social', 'Organic Social'),
    ('news.ycombinator.com', 'source', 'Social', NULL, 'Organic Social'),
    ('youtube', 'source', 'Video', 'Paid Video', 'Organic Video'),
    ('vimeo', 'source', 'Video', 'Paid Video', 'Organic Video'),
    ('twitch', 'source', 'Video', 'Paid Video', 'Organic Video'),
    ('amazon', 'source', 'Shopping', 'Paid Shopping', 'Organic Shopping'),
    ('ebay', 'source', 'Shopping', 'Paid Shopping', 'Organic Shopping'),
    ('etsy', 'source', 'Shopping', 'Paid Shopping', 'Organic Shopping'),
    ('gmail', 'source', 'Email', NULL, 'Email'),
    ('mail.google.com', 'source', 'Email', NULL, 'Email'),
    ('newsletter', 'source', 'Email', NULL, 'Email'),
    ('email', 'source', 'Email', NULL, 'Email'),
    ('sms', 'source', 'SMS', NULL, 'SMS'),
    ('push', 'source', 'Push', NULL, 'Push'),
    ('search', 'medium', 'Search', 'Paid Search', 'Organic Search'),
    ('organic', 'medium', 'Search', NULL, 'Organic Search'),
    ('social', 'medium', 'Social', 'Paid Social', 'Organic Social'),
    ('paid_social', 'medium', 'Social', 'Paid Social', NULL),
    ('video', 'medium', 'Video', 'Paid Video', 'Organic Video'),
    ('shopping', 'medium', 'Shopping', 'Paid Shopping', 'Organic Shopping'),
    ('cpc', 'medium', 'Search', 'Paid Search', NULL),
    ('ppc', 'medium', 'Search', 'Paid Search', NULL),
    ('cpv', 'medium', 'Video', 'Paid Video', NULL),
    ('display', 'medium', 'Display', 'Display', 'Display'),
    ('banner', 'medium', 'Display', 'Display', 'Display'),
    ('cpm', 'medium', 'Display', 'Display', NULL),
    ('retargeting', 'medium', 'Display', 'Display', NULL),
    ('email', 'medium', 'Email', NULL, 'Email'),
    ('e-mail', 'medium', 'Email', NULL, 'Email'),
    ('newsletter', 'medium', 'Email', NULL, 'Email'),
    ('affiliate', 'medium', 'Affiliate', 'Affiliate', 'Affiliate'),
    ('referral', 'medium', 'Referral', NULL, 'Referral'),
    ('audio', 'medium', 'Audio', 'Audio', 'Audio'),
    ('sms', 'medium', 'SMS', NULL, 'SMS'),
    ('push', 'medium', 'Push', NULL, 'Push'),
    ('mobile', 'medium', 'Push', NULL, 'Push')
)
"""

# Without HOST and PORT the server reads its own table, and without DB one in the dictionary's own database. The credentials
# are in a named collection of the server's configuration.
CHANNEL_DEFINITION_DICT = """
CREATE OR REPLACE DICTIONARY {database:Identifier}.channel_definition_dict (
    domain String,
    kind String,
    domain_type Nullable(String),
    type_if_paid Nullable(String),
    type_if_organic Nullable(String)
)
PRIMARY KEY domain, kind
SOURCE(CLICKHOUSE(NAME __COLLECTION__ TABLE 'channel_definition'))
LIFETIME(MIN 3000 MAX 3600)
LAYOUT(COMPLEX_KEY_HASHED())
""".replace("__COLLECTION__", NAMED_COLLECTION)

TABLES: Mapping[str, str] = {
    "events": EVENTS,
    "person": PERSON,
    "person_distinct_id2": PERSON_DISTINCT_ID2,
    "raw_sessions": RAW_SESSIONS,
    "channel_definition": CHANNEL_DEFINITION,
}
"""Each table's DDL by its name; the database is the parameter `database`."""


def create_tables(execute: Execute, database: str) -> None:
    """Create the database, PostHog's tables and the channel dictionary where they are missing.

    Rows of the four source tables stay as they are; the channel definitions are written afresh.
    """
    parameters = {"database": database}
    execute("CREATE DATABASE IF NOT EXISTS {database:Identifier}", parameters)
    for statement in TABLES.values():
        execute(statement, parameters)
    execute(CHANNEL_DEFINITION_EMPTIED, parameters)
    execute(CHANNEL_DEFINITION_ROWS, parameters)
    execute(CHANNEL_DEFINITION_DICT, parameters)
