r"""The sample's events: what visitors of a shop do, written as one INSERT for any range of event numbers.

Ten neighbouring numbers make a block, a block one or two visits, a visit one session. Everything about an event is a
hash of its number, its visit or its person (`sample_people`), so that a range gives the same rows however it is cut.
Which block starts in which hour is a plan of `sample_data`; the sessions' table is derived in `sample_sessions`.

Every value is one that Postgres can hold; beyond that the properties are as awkward as real ones: `$set` as a string,
a number past 64 bits, null or twice in one document, keys written with escapes, text that only looks like `$set`.
"""

from pg_exports.sandbox.sample_people import IDENTITIES

# With `copies` = 1 the same statement writes the second copy of the events that were ingested twice.
VISITS = r"""
    visits AS (
        SELECT
            number,
            intDiv(number, 10) AS block,
            number % 10 AS step,
            -- Half of the blocks are one visit, the others two.
            roll(block, 'cut') % 20 AS cut,
            block * 2 + (step >= cut) AS visit,
            step = 0 OR step = cut AS is_first,
            step = 9 OR step + 1 = cut AS is_last,
            roundDown(block, {first_blocks:Array(UInt64)}) AS hour_block,
            transform(hour_block, {first_blocks:Array(UInt64)}, {hour_starts:Array(Int64)}, toInt64(0))
                + toInt64(roll(visit, 'start') % 3600000000) AS started,
            least(toInt64(roll(visit, 'length') % 2400000000), intDiv({end:Int64} - started, 2)) AS lasted,
            -- Squared, so that some people come often and most seldom.
            bitShiftRight(roll(visit, 'who') % 1048576 * (roll(visit, 'who') % 1048576), 20) AS habit,
            intDiv({people:UInt64} * habit, 1048576) AS p,
            roll(visit, 'known') % 100 >= 15 AS is_known,
            roll(visit, 'device') % 12 = 0 AS is_mobile,
            if(is_known, team_of(p), toInt64(1 + (roll(visit, 'team') % 5 = 0))) AS team
        FROM numbers_mt({first:UInt64}, {count:UInt64})
        WHERE {copies:UInt8} = 0 OR roll(number, 'twice') % 200 = 0
    )"""

# Insertion: seconds after the event for most, minutes for some, hours for what a visitor's device sent later; then a
# few exactly on an hour or one microsecond before it.
TIMES = r"""
    times AS (
        SELECT
            *,
            roll(number, 'late') % 50 AS lateness,
            least(
                started + intDiv(lasted * toInt64(step), 10) + toInt64(roll(number, 'jitter') % 1000000),
                {end:Int64} - 1000) AS lived,
            multiIf(
                lateness = 1 AND NOT is_first AND NOT is_last,
                    3600000000 + toInt64(roll(number, 'delay') % 18000000000),
                roll(number, 'slow') % 10 = 0, toInt64(roll(number, 'delay') % 600000000),
                toInt64(500000 + roll(number, 'delay') % 20000000)) AS delay,
            lived + least(delay, intDiv({end:Int64} - lived, 2)) AS arrived,
            intDiv(arrived, 3600000000) * 3600000000 AS arrival_hour,
            settled(multiIf(
                roll(number, 'edge') % 500 = 0, arrival_hour,
                roll(number, 'edge') % 500 = 1, arrival_hour + 3599999999,
                arrived)) AS inserted_first,
            intDiv(inserted_first, 3600000000) * 3600000000 AS inserted_hour,
            multiIf(
                {copies:UInt8} = 0 OR roll(number, 'copy') % 10 < 6, inserted_first,
                roll(number, 'copy') % 10 < 9, least(inserted_first + 5000000, inserted_hour + 3599999999),
                settled(least(inserted_first + 3600000000, {end:Int64} - 1))) AS inserted,
            least(lived, inserted_first - 250000) - if(lateness != 0, 0, multiIf(
                roll(number, 'days') % 10 < 5, toInt64(3600000000 + roll(number, 'month') % 82800000000),
                roll(number, 'days') % 10 < 8, toInt64(86400000000 + roll(number, 'month') % 518400000000),
                toInt64(604800000000 + roll(number, 'month') % 1900800000000))) AS happened
        FROM visits
    )"""

# A late event's session is an old one of its own; one visit in fifteen has no session, one in a hundred no UUIDv7.
ACTORS = r"""
    actors AS (
        SELECT
            number, step, visit, is_known, is_mobile, is_first, team, lateness, happened, inserted,
            if(is_known, distinct_id_of(p, roll(visit, 'which id') % ids_of(p)),
                toString(uuid_v7(started, visit, 'visitor'))) AS distinct_id,
            multiIf(
                NOT is_known, uuid_v4(visit, 'visitor'),
                inserted_first >= fate_at(p), person_id_of(survivor_of(p)),
                person_id_of(p)) AS person_id,
            if(is_known AND has_profile(p), concat(profile_of(p), '}'), '{}') AS person_properties,
            multiIf(
                roll(visit, 'sessionless') % 15 = 0, '',
                lateness = 0, toString(uuid_v7(happened, number, 'session')),
                roll(visit, 'sessionless') % 100 = 1, toString(uuid_v4(visit, 'session')),
                toString(uuid_v7(started, visit, 'session'))) AS session_id,
            roll(number, 'event') % 1000 AS draw,
            multiIf(
                is_first AND is_mobile, '$screen',
                is_first, '$pageview',
                is_mobile AND (draw < 330 OR draw BETWEEN 720 AND 799), '$screen',
                draw < 330, '$pageview',
                draw < 720, '$autocapture',
                draw < 800, '$pageleave',
                draw < 840, '$identify',
                draw < 860, '$set',
                draw < 930, 'purchase',
                draw < 960, 'user signed up',
                draw < 985, 'it''s "quoted"',
                '🚀 launched') AS event
        FROM times
    )"""

# `$$...$$` is a string in which ClickHouse reads no escapes: the JSON stands as it is stored. `~` becomes a click id.
DOCUMENTS = r"""
    documents AS (
        SELECT
            *,
            pick(['shop.example.com', 'www.example.com', 'app.example.io'], visit, 'host') AS host,
            pick(['/', '/products', '/pricing', '/cart', '/checkout', '/blog/caf%C3%A9', '/account/settings'],
                number, 'page') AS page,
            if(page = '/products', concat('/products/', toString(roll(number, 'product') % 500)), page) AS pathname,
            concat('https://', host, pathname,
                if(roll(number, 'query') % 3 = 0, '?color=red&size=42', '')) AS current_url,
            lower(hex(roll(visit, 'click'))) AS click_id,
            replaceAll(pick([
                '"$referring_domain":"$direct"',
                '"$referring_domain":"$direct"',
                '"$referring_domain":"$direct","utm_source":"(direct)"',
                '"$referring_domain":"www.google.com"',
                '"$referring_domain":"www.google.com"',
                '"$referring_domain":"duckduckgo.com"',
                '"$referring_domain":"www.google.com","utm_source":"google","utm_medium":"cpc","gclid":"~"',
                '"$referring_domain":"www.google.com","utm_campaign":"Cross-Network_2","gad_source":"1","gclid":"~"',
                '"$referring_domain":"www.google.com","gad_source":"1"',
                '"$referring_domain":"blog.example.org","gad_source":"5"',
                '"$referring_domain":"m.facebook.com","utm_source":"facebook","utm_medium":"paid_social","fbclid":"~"',
                '"$referring_domain":"l.facebook.com","fbclid":"~"',
                '"$referring_domain":"intranet.example.net","fbclid":"~"',
                '"$referring_domain":"$direct","utm_source":"newsletter","utm_medium":"Email","mc_cid":"~","_kx":"~"',
                '"$referring_domain":"www.youtube.com","utm_campaign":"spring_video"',
                '"$referring_domain":"blog.example.org"',
                $$"$referring_domain":"blog.example.org","utm_campaign":"launch video","utm_content":"header \"A\""$$,
                '"$referring_domain":"null","utm_source":"null","utm_medium":"","utm_campaign":"null"',
                '"$referring_domain":"www.bing.com","utm_source":"bing","utm_medium":"CPC","utm_term":"shoes","msclkid":"~"',
                '"$referring_domain":"www.amazon.com","utm_source":"amazon","utm_campaign":"summer_shopping"',
                '"$referring_domain":"deals.example.org","utm_medium":"cpc","utm_campaign":"shop now"',
                '"$referring_domain":"www.linkedin.com","utm_source":"LinkedIn","li_fat_id":"~"',
                '"$referring_domain":"t.co","twclid":"~"',
                '"$referring_domain":"www.instagram.com","igshid":"~"',
                '"$referring_domain":"www.tiktok.com","utm_medium":"paid","ttclid":"~"',
                '"$referring_domain":"partner.example.org","utm_medium":"affiliate","irclid":"~"',
                '"$referring_domain":"$direct","utm_medium":"webpush"',
                '"$referring_domain":"$direct","utm_source":"sms","utm_medium":"sms"',
                '"$referring_domain":"ads.example.net","utm_medium":"display","dclid":"~","gclsrc":"aw.ds"',
                '"$referring_domain":"www.google.com","utm_medium":"ppc","gbraid":"~","wbraid":"~"',
                '"utm_source":"vimeo","utm_medium":"video"',
                '"$referring_domain":""'
            ], visit, 'arrival'), '~', click_id) AS attribution,
            multiIf(
                roll(number, 'ip kind') % 20 < 13,
                    concat('"$ip":"', IPv4NumToString(toUInt32(roll(visit, 'ip'))), '",'),
                roll(number, 'ip kind') % 20 < 16,
                    concat('"$ip":"2001:db8::', lower(hex(toUInt16(roll(visit, 'ip')))), '",'),
                roll(number, 'ip kind') % 20 < 18, '',
                pick(['"$ip":"",', '"$ip":null,', '"$ip":127,', '"$ip":{"v4":"10.0.0.1"},', '"$ip":["10.0.0.1"],',
                    '"$ip":"10.0.0.1","$ip":"10.0.0.2",', '"$ip":"10.0.0.3","$ip":null,',
                    $$"$ip":"10.0.0.4\u002f24",$$, $$"\u0024ip":"10.0.0.5",$$], number, 'odd ip')) AS ip,
            multiIf(
                event NOT IN ('$identify', '$set') AND roll(number, 'sets') % 10 != 0, '',
                roll(number, 'set kind') % 10 < 4,
                    concat('"$set":{"email":"user', toString(number), '@example.com","plan":"pro","logins":3},'),
                roll(number, 'set kind') % 10 < 7,
                    concat('"$set":{"last_seen":', toString(intDiv(happened, 1000)),
                        '},"$set_once":{"$initial_referrer":"$direct","$initial_os":"iOS"},'),
                pick([
                    '"$set":"pro",',
                    '"$set":1.50,',
                    '"$set":12345678901234567890123,',
                    '"$set":1e3,"$set_once":-0.0,',
                    '"$set":null,',
                    '"$set":true,"$set_once":null,',
                    '"$set":{},"$set_once":[],',
                    '"$set":[1,"two",{"three":3.0}],',
                    '"$set":{"v":1},"$set":{"v":2},',
                    '"$set_once":{"v":1},"$set_once":"second",',
                    '"$set":{"v":1},"$set":null,',
                    '"$set":{"balance":1.50,"big":12345678901234567890123,"nested":{"$set":{"deep":true}}},',
                    $$"$set":"{\"looks\":\"like an object\"}",$$,
                    $$"$set":{"name":"Zo\u00eb \ud83d\ude80","quote":"\"","path":"C:\\Temp"},$$,
                    $$"\u0024set":{"v":"escaped key"},$$,
                    $$"$set":{"v":"} , \"$set_once\":{"},$$
                ], number, 'odd set')) AS sets,
            if(roll(number, 'nested') % 25 != 0, '', pick([
                '"payload":{"$set":{"inner":1},"$set_once":{"inner":2},"$ip":"192.0.2.1"},',
                '"history":[{"$set":{"inner":1}},{"$set":"inner"}],',
                $$"message":"please send \"$set\":{\"v\":1} again",$$,
                '"set":{"v":1},"$sets":{"v":2},'
            ], number, 'nesting')) AS nested,
            pick([
                'plain text', 'plain text', 'plain text', 'plain text', '日本語 🚀 ñ', $$Caf\u00e9 \ud83d\ude80$$,
                $$He said \"hi\", then: \"bye\"$$, $$C:\\path\\new$$, $$line one\nline two\ttab$$, $$a\/b$$,
                $$\\u0000 is plain text$$, $${\"not\": \"an object\"}$$
            ], number, 'text') AS text
        FROM actors
    )"""

# Python's json.dumps puts a space after colons and commas; one visit in five is sent by such a client.
PROPERTIES = r"""
    rows AS (
        SELECT
            *,
            concat(
                '{', ip, sets, nested,
                '"$lib":"', if(is_mobile, 'posthog-ios', 'web'), '","$lib_version":"1.205.0","$os":"',
                pick(['Mac OS X', 'Windows', 'iOS', 'Android', 'Linux'], visit, 'os'),
                '","$browser":"', pick(['Chrome', 'Safari', 'Firefox', 'Microsoft Edge'], visit, 'browser'),
                '","$browser_version":', toString(100 + roll(visit, 'browser version') % 40),
                ',"$device_type":"', if(is_mobile, 'Mobile', 'Desktop'),
                '","$screen_width":1920,"$screen_height":1080,"$viewport_width":1905,"$viewport_height":969,',
                if(is_mobile,
                    '"$screen_name":"Checkout",',
                    concat('"$current_url":"', current_url, '","$host":"', host, '","$pathname":"', pathname, '",')),
                if(event = '$autocapture' AND roll(number, 'external') % 12 = 0,
                    '"$event_type":"click","$external_click_url":"https://partner.example.org/offer?id=7",', ''),
                if(event = '$pageview' AND roll(number, 'vitals') % 8 = 0,
                    concat('"$web_vitals_LCP_value":', toString(roll(number, 'lcp') % 500000 / 100), ','), ''),
                if(event != 'purchase', '', concat(
                    '"cart":{"items":[{"sku":"A-', toString(roll(number, 'sku') % 900), '","qty":2,"price":19.90},',
                    '{"sku":"B-7","qty":1,"price":5}],"currency":"EUR","coupon":null},')),
                attribution,
                ',"$device_id":"', lower(hex(roll(visit, 'device id'))),
                '","distinct_id":', toJSONString(distinct_id),
                if(session_id = '', '', concat(',"$session_id":"', session_id, '","$window_id":"', session_id, '"')),
                ',"$insert_id":"', lower(hex(roll(number, 'insert id'))),
                '","$time":', toString(intDiv(happened, 1000)),
                ',"text":"', text, '"',
                ',"token":"phc_sample","$is_identified":', if(is_known, 'true', 'false'),
                ',"$geoip_city_name":"', pick(['Zürich', 'São Paulo', 'New York', 'Kraków', 'Sydney'], visit, 'city'),
                '","$geoip_latitude":', toString(roll(visit, 'latitude') % 90), '.4700',
                ',"$active_feature_flags":["new-checkout","beta-banner"],"$feature/new-checkout":"variant-b"}'
            ) AS compact,
            multiIf(
                roll(number, 'empty') % 500 = 0, '',
                roll(visit, 'client') % 5 = 0, replaceAll(replaceAll(compact, '":', '": '), ',"', ', "'),
                compact) AS properties,
            if(event != '$autocapture', '', concat(
                $$a.button.primary:attr__class="button primary"attr__href="$$, pathname,
                $$"href="$$, pathname, $$"nth-child="$$, toString(1 + step), $$"nth-of-type="1"text="$$,
                pick(['Buy now', $$Say \"hi\"$$, 'Añadir 🛒', $$back\\slash$$], number, 'label'),
                $$";li:nth-child="3"nth-of-type="3";ul.nav:attr__class="nav"nth-child="1"nth-of-type="1";$$,
                $$body:nth-child="2"nth-of-type="1"$$)) AS elements_chain
        FROM documents
    )"""

# Evaluated lazily, `compact` costs 36 microseconds a row instead of 3. Small blocks stay in the processor's cache,
# which halves the time; with parts of a bounded size they keep the memory flat however many events there are.
EVENTS = (
    """
INSERT INTO {database:Identifier}.events (
    uuid, event, properties, timestamp, team_id, distinct_id, elements_chain, created_at,
    person_id, person_properties, _timestamp, _offset, inserted_at)
SETTINGS short_circuit_function_evaluation = 'disable', optimize_on_insert = 0, max_insert_threads = 2,
    max_block_size = 16384, min_insert_block_size_rows = 65536, min_insert_block_size_bytes = 0
WITH"""
    + ",\n".join([IDENTITIES, VISITS, TIMES, ACTORS, DOCUMENTS, PROPERTIES])
    + """
SELECT
    uuid_v7(happened, number, 'event'),
    event,
    properties,
    fromUnixTimestamp64Micro(happened, 'UTC'),
    team,
    distinct_id,
    elements_chain,
    fromUnixTimestamp64Micro(inserted - 250000, 'UTC'),
    person_id,
    person_properties,
    -- Kafka's time lies a little before the insertion, and counts where inserted_at is NULL.
    toDateTime(intDiv(inserted - if(lateness = 2, 0, toInt64(roll(number, 'kafka') % 3000000)), 1000000)),
    number,
    if(lateness = 2, NULL, fromUnixTimestamp64Micro(inserted, 'UTC'))
FROM rows
"""
)
