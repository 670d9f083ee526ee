"""The sample's raw_sessions, derived from its events as PostHog's materialised view derives them.

The rows are built for one stretch of insertion time: a session gets a row for each hour in which events of it were
inserted, so that it grows from one interval to the next. Only sessions whose id is a UUIDv7 have any.
"""

# The view takes each initial_* by an argMin of its own. All of them come from the same earliest event, so here that
# event is found once and parsed once for a session, which makes the statement three times as fast.
SESSIONS = """
INSERT INTO {database:Identifier}.raw_sessions (
    team_id, session_id_v7, distinct_id, min_timestamp, max_timestamp, max_inserted_at,
    urls, entry_url, end_url, last_external_click_url,
    pageview_uniq, autocapture_uniq, screen_uniq, page_screen_autocapture_uniq_up_to, vitals_lcp,
    initial_referring_domain, initial_utm_source, initial_utm_campaign, initial_utm_medium, initial_utm_term,
    initial_utm_content, initial_gclid, initial_gad_source, initial_gclsrc, initial_dclid, initial_gbraid,
    initial_wbraid, initial_fbclid, initial_msclkid, initial_twclid, initial_li_fat_id, initial_mc_cid,
    initial_igshid, initial_ttclid, initial__kx, initial_irclid)
SETTINGS optimize_on_insert = 0, max_insert_threads = 2, min_insert_block_size_rows = 50000
WITH
    parsed AS (
        SELECT
            uuid, event, properties, timestamp, team_id, distinct_id,
            coalesce(inserted_at, _timestamp) AS ingested_at,
            JSONExtract(properties, 'Tuple(
                "$session_id" String, "$current_url" String, "$external_click_url" String,
                "$web_vitals_LCP_value" Nullable(Float64))') AS property,
            property.`$current_url` AS url,
            toUInt128(toUUIDOrZero(property.`$session_id`)) AS session
        FROM {database:Identifier}.events
        WHERE ingested_at >= fromUnixTimestamp64Micro({from:Int64}, 'UTC')
            AND ingested_at < fromUnixTimestamp64Micro({to:Int64}, 'UTC')
    ),
    sessions AS (
        SELECT
            team_id,
            session,
            argMaxState(distinct_id, timestamp) AS distinct_id_state,
            min(timestamp) AS started,
            max(timestamp) AS ended,
            max(ingested_at) AS last_ingested_at,
            groupUniqArrayIf(url, url != '') AS urls,
            argMinState(url, timestamp) AS entry_url,
            argMaxState(url, timestamp) AS end_url,
            argMaxState(property.`$external_click_url`, timestamp) AS external_click_url,
            uniqState(CAST(if(event = '$pageview', uuid, NULL) AS Nullable(UUID))) AS pageviews,
            uniqState(CAST(if(event = '$autocapture', uuid, NULL) AS Nullable(UUID))) AS autocaptures,
            uniqState(CAST(if(event = '$screen', uuid, NULL) AS Nullable(UUID))) AS screens,
            uniqUpToState(1)(
                CAST(if(event IN ('$pageview', '$screen', '$autocapture'), uuid, NULL) AS Nullable(UUID))) AS up_to_one,
            argMinState(property.`$web_vitals_LCP_value`, timestamp) AS vitals_lcp,
            JSONExtract(argMin(properties, timestamp), 'Tuple(
                "$referring_domain" String, "utm_source" String, "utm_campaign" String, "utm_medium" String,
                "utm_term" String, "utm_content" String, "gclid" String, "gad_source" String, "gclsrc" String,
                "dclid" String, "gbraid" String, "wbraid" String, "fbclid" String, "msclkid" String, "twclid" String,
                "li_fat_id" String, "mc_cid" String, "igshid" String, "ttclid" String, "_kx" String,
                "irclid" String)') AS first
        FROM parsed
        WHERE bitAnd(bitShiftRight(session, 76), 0xF) = 7
        GROUP BY team_id, session, toStartOfHour(ingested_at)
    )
SELECT
    team_id,
    session,
    distinct_id_state,
    started,
    ended,
    last_ingested_at,
    urls,
    entry_url,
    end_url,
    external_click_url,
    pageviews,
    autocaptures,
    screens,
    up_to_one,
    vitals_lcp,
    initializeAggregation('argMinState', first.`$referring_domain`, started),
    initializeAggregation('argMinState', first.utm_source, started),
    initializeAggregation('argMinState', first.utm_campaign, started),
    initializeAggregation('argMinState', first.utm_medium, started),
    initializeAggregation('argMinState', first.utm_term, started),
    initializeAggregation('argMinState', first.utm_content, started),
    initializeAggregation('argMinState', first.gclid, started),
    initializeAggregation('argMinState', first.gad_source, started),
    initializeAggregation('argMinState', first.gclsrc, started),
    initializeAggregation('argMinState', first.dclid, started),
    initializeAggregation('argMinState', first.gbraid, started),
    initializeAggregation('argMinState', first.wbraid, started),
    initializeAggregation('argMinState', first.fbclid, started),
    initializeAggregation('argMinState', first.msclkid, started),
    initializeAggregation('argMinState', first.twclid, started),
    initializeAggregation('argMinState', first.li_fat_id, started),
    initializeAggregation('argMinState', first.mc_cid, started),
    initializeAggregation('argMinState', first.igshid, started),
    initializeAggregation('argMinState', first.ttclid, started),
    initializeAggregation('argMinState', first._kx, started),
    initializeAggregation('argMinState', first.irclid, started)
FROM sessions
"""
