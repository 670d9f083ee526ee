"""The sample's people: who they are, what their distinct_ids are called, and when each was last touched.

`IDENTITIES` is the vocabulary that the SQL of events and people shares, so that an event's distinct_id and person_id
are those of the person tables. What people do lives in `sample_events`; sizes and times come from `sample_data`.

A person is a number p. Its place in every fifty decides its fate, which keeps both teams (p % 5 = 0 is team 2) in
every fate: 7, 10, 17 were merged into the person five before them, 13, 15 were deleted, 23, 25 lost their mapping
only, 33, 35 were deleted while their mapping stayed, 40, 41 have no profile. 18, 20, 28, 30 have a higher version
that carries an older `_timestamp` than a lower one; so has the mapping of 17.
"""

# Times are microseconds since 1970 in UTC until the outermost SELECT: integer arithmetic is exact and fast.
IDENTITIES = r"""
    (a, salt) -> cityHash64({seed:UInt64}, a, salt) AS roll,
    (options, a, salt) -> options[1 + roll(a, salt) % length(options)] AS pick,
    -- The engine keeps a UUID's two halves in the other order than the integer's.
    bits -> reinterpretAsUUID(bitOr(bitShiftLeft(bits, 64), bitShiftRight(bits, 64))) AS uuid_of_bits,
    (a, salt) -> bitOr(bitShiftRight(roll(a, concat(salt, ' low')), 2), bitShiftLeft(toUInt64(2), 62)) AS low_bits,
    (a, salt) -> uuid_of_bits(bitOr(
        bitShiftLeft(toUInt128(bitOr(bitAnd(roll(a, salt), 0xFFFFFFFFFFFF0FFF), 0x4000)), 64),
        toUInt128(low_bits(a, salt)))) AS uuid_v4,
    (micros, a, salt) -> uuid_of_bits(bitOr(
        bitShiftLeft(toUInt128(bitOr(bitOr(bitShiftLeft(toUInt64(intDiv(micros, 1000)), 16), 0x7000),
            bitAnd(roll(a, salt), 0x0FFF))), 64),
        toUInt128(low_bits(a, salt)))) AS uuid_v7,

    -- Nothing is ingested in the empty hour: what was due in it arrives one hour later.
    micros -> micros + if(micros >= {empty:Int64} AND micros < {empty:Int64} + 3600000000, 3600000000, 0) AS settled,

    p -> toInt64(if(p % 5 = 0, 2, 1)) AS team_of,
    p -> uuid_v4(p, 'person') AS person_id_of,
    p -> p % 50 IN (7, 10, 17) AS is_merged,
    p -> if(is_merged(p), toUInt64(p - 5), toUInt64(p)) AS survivor_of,
    p -> p % 50 NOT IN (40, 41) AS has_profile,
    p -> p % 50 IN (18, 20, 28, 30) AS is_backdated,
    p -> toInt64(if(is_backdated(p), 2, 1) + roll(p, 'versions') % 4) AS versions_of,
    -- One in three was there before the sample begins.
    p -> {begin:Int64} + if(roll(p, 'known') % 3 = 0,
        -toInt64(roll(p, 'first') % 7776000000000),
        toInt64(roll(p, 'first') % ({end:UInt64} - {begin:UInt64}))) AS first_seen,
    (p, step) -> settled(first_seen(p) + intDiv(({end:Int64} - first_seen(p)) * step, versions_of(p) + 1)) AS moment_of,
    p -> moment_of(p, versions_of(p)) AS fate_at,

    -- Half of team 2 bears a name from team 1: the same distinct_id stands in both teams.
    p -> if(p % 5 = 0 AND roll(p, 'namesake') % 2 = 0, p + 1, p) AS name_of,
    p -> toUInt64(1 + roll(name_of(p), 'ids') % 3) AS ids_of,
    (p, k) -> multiIf(
        k = 0, toString(uuid_v7(1704067200000000, name_of(p), 'device')),
        k = 1, concat('user', toString(name_of(p)), '@example.com'),
        name_of(p) % 37 = 0, concat('o''brien "', toString(name_of(p)), '"'),
        name_of(p) % 37 = 1, concat('zoë-🚀-', toString(name_of(p))),
        concat('crm_', toString(100000 + name_of(p)))) AS distinct_id_of,
    p -> concat(
        '{"email":"user', toString(p), '@example.com","name":"',
        pick(
            ['Ada Lovelace', 'José Ñandú', '山田太郎', $$Zo\u00eb \ud83d\ude80$$, $$Miles \"Tails\" Prower$$],
            p, 'name'),
        '","plan":"', pick(['free', 'pro', 'team', 'enterprise'], p, 'plan'),
        '","$initial_referring_domain":"', pick(['$direct', 'www.google.com', 'news.ycombinator.com'], p, 'origin'),
        '","company":{"name":"Acme ', toString(p % 97), '","seats":', toString(roll(p, 'seats') % 200), '}'
    ) AS profile_of
"""

PERSONS = (
    """
INSERT INTO {database:Identifier}.person
    (id, created_at, team_id, properties, is_identified, is_deleted, version, _timestamp, _offset)
SETTINGS optimize_on_insert = 0
WITH"""
    + IDENTITIES
    + """,
    states AS (
        SELECT
            number AS p,
            arrayJoin(range(toUInt64(versions_of(p) + if(is_merged(p) OR p % 50 IN (13, 15, 33, 35), 1, 0)))) AS step,
            step = versions_of(p) AS gone,
            moment_of(p, if(is_backdated(p) AND NOT gone, versions_of(p) - 1 - step, step)) AS touched
        FROM numbers({people:UInt64})
        WHERE has_profile(p)
    )
SELECT
    person_id_of(p),
    fromUnixTimestamp64Milli(intDiv(first_seen(p), 1000), 'UTC'),
    team_of(p),
    if(gone, '{}',
        concat(profile_of(p), ',"visits":', toString(step), if(step = 0, '}', ',"tags":["returning",null]}'))),
    if(p % 3 != 0 AND step > 0, 1, 0),
    if(gone, 1, 0),
    if(gone, versions_of(p) + 99, step),
    toDateTime(intDiv(touched, 1000000)),
    p * 10 + step
FROM states
"""
)

MAPPINGS = (
    """
INSERT INTO {database:Identifier}.person_distinct_id2
    (team_id, distinct_id, person_id, is_deleted, version, _timestamp, _offset, _partition)
SETTINGS optimize_on_insert = 0
WITH"""
    + IDENTITIES
    + """,
    mappings AS (
        SELECT
            number AS p,
            arrayJoin(range(ids_of(p))) AS k,
            arrayJoin(range(toUInt64(if(is_merged(p) OR p % 50 IN (13, 15, 23, 25), 2, 1)))) AS change,
            multiIf(
                change = 1 AND p % 50 = 17, settled(first_seen(p) - 3600000000),
                change = 1, fate_at(p),
                settled(least(first_seen(p) + k * 60000000, {end:Int64} - 1000000))) AS touched
        FROM numbers({people:UInt64})
    )
SELECT
    team_of(p),
    distinct_id_of(p, k),
    if(change = 1, person_id_of(survivor_of(p)), person_id_of(p)),
    if(change = 1 AND NOT is_merged(p), 1, 0),
    multiIf(change = 0, 0, is_merged(p), 1, 100),
    toDateTime(intDiv(touched, 1000000)),
    p * 10 + k,
    p % 8
FROM mappings
"""
)
