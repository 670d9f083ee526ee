"""A session's channel, rule by rule and tie by tie, as the real engine decides it."""

from datetime import datetime

from pg_exports_tests.conftest import RunExport, Source, Target, partition_key
from pg_exports_tests.models.channels import channel_type, definitions
from pg_exports_tests.source_rows import INITIAL, export_of, insert_sessions, new_session, session

DEFINITIONS = (
    ("facebook.com", "source", "Paid Social", "Organic Social"),
    ("m.mail.example", "source", "Email", "Email"),
    ("mail.example", "source", "SMS", "SMS"),
    ("organic.example", "source", None, "Affiliate"),
    ("paid.example", "source", "Affiliate", None),
    ("paid-native", "medium", "Native", None),
)
"""Further rows for the dictionary: (name, kind, type if paid, type if organic)."""

CASES: dict[str, tuple[dict[str, str], str]] = {
    # 1. Cross Network
    "cross-network": ({"utm_campaign": "cross-network"}, "Cross Network"),
    "cross-network in any case, anywhere": ({"utm_campaign": "2026 CROSS-Network b"}, "Cross Network"),
    "cross-network before all else": (
        {"utm_campaign": "cross-network shop video", "gclid": "x", "utm_source": "google", "utm_medium": "cpc"},
        "Cross Network",
    ),
    "cross-network before direct": ({"utm_campaign": "cross-network", "referring_domain": "$direct"}, "Cross Network"),
    # 2. Paid: each way to be it
    **{
        f"paid by medium {medium}": ({"utm_medium": medium, "utm_source": "tiktok"}, "Paid Social")
        for medium in (
            "cpc",
            "cpm",
            "cpv",
            "cpa",
            "ppc",
            "retargeting",
            "paid",
            "paid_social",
            "paidwhatever",
            "CPC",
            "PaiD",
        )
    },
    "paid by gclid": ({"gclid": "x", "utm_source": "tiktok"}, "Paid Social"),
    "paid by gad_source": ({"gad_source": "5", "utm_source": "tiktok"}, "Paid Social"),
    "not paid by a medium that only ends so": ({"utm_medium": "unpaid", "utm_source": "tiktok"}, "Organic Social"),
    "not paid by a medium that only begins so": ({"utm_medium": "cpcx", "utm_source": "tiktok"}, "Organic Social"),
    "not paid by fbclid": ({"fbclid": "x", "utm_source": "tiktok"}, "Organic Social"),
    "not paid by other click ids": ({"msclkid": "x", "ttclid": "x", "dclid": "x", "gclsrc": "x"}, "Unknown"),
    "not paid by a gclid that says null": ({"gclid": "null", "utm_source": "tiktok"}, "Organic Social"),
    # 2. Paid: what decides, in order
    "paid: source first": (
        {"utm_source": "google", "utm_campaign": "shop", "utm_medium": "cpm", "referring_domain": "facebook.com"},
        "Paid Search",
    ),
    "paid: then a shopping campaign": (
        {"utm_source": "?", "utm_campaign": "shop", "utm_medium": "cpm", "referring_domain": "facebook.com"},
        "Paid Shopping",
    ),
    "paid: then medium": (
        {
            "utm_source": "?",
            "utm_campaign": "?",
            "utm_medium": "cpm",
            "referring_domain": "facebook.com",
            "gad_source": "1",
        },
        "Display",
    ),
    "paid: then referring domain": (
        {"utm_source": "?", "utm_medium": "paid", "referring_domain": "facebook.com", "gad_source": "1"},
        "Paid Social",
    ),
    "paid: then gad_source 1": (
        {
            "utm_medium": "paid",
            "referring_domain": "x.example",
            "gad_source": "1",
            "utm_campaign": "video",
            "fbclid": "x",
        },
        "Paid Search",
    ),
    "paid: then a video campaign": (
        {
            "utm_medium": "paid",
            "referring_domain": "x.example",
            "gad_source": "2",
            "utm_campaign": "MyVideo1",
            "fbclid": "x",
        },
        "Paid Video",
    ),
    "paid: then fbclid": ({"gad_source": "2", "utm_campaign": "vide", "fbclid": "x"}, "Paid Social"),
    "paid: else unknown": ({"gad_source": "11", "utm_campaign": "?", "referring_domain": "$direct"}, "Paid Unknown"),
    "paid: a source that has no paid type is passed over": (
        {"utm_source": "newsletter", "utm_medium": "cpc"},
        "Paid Search",
    ),
    "paid: a source of which only the domain above has a paid type": (
        {"utm_source": "a.paid.example", "utm_medium": "paid"},
        "Affiliate",
    ),
    "paid: a medium with a paid type of its own": ({"utm_medium": "paid-native"}, "Native"),
    "paid: nothing but a gclid": ({"gclid": "x"}, "Paid Unknown"),
    # 3. Direct
    "direct": ({"referring_domain": "$direct"}, "Direct"),
    **{
        f"direct with source {source}": ({"referring_domain": "$direct", "utm_source": source}, "Direct")
        for source in ("(direct)", "direct", "$direct", "Direct", "null", "")
    },
    "direct: a campaign does not matter": ({"referring_domain": "$direct", "utm_campaign": "shop video"}, "Direct"),
    "not direct with a medium": ({"referring_domain": "$direct", "utm_medium": "email"}, "Email"),
    "not direct with a source": ({"referring_domain": "$direct", "utm_source": "google"}, "Organic Search"),
    "not direct with fbclid": ({"referring_domain": "$direct", "fbclid": "x"}, "Organic Social"),
    # 4. Organic: what decides, in order
    "organic: source first": (
        {"utm_source": "google", "utm_campaign": "shop", "utm_medium": "email", "referring_domain": "facebook.com"},
        "Organic Search",
    ),
    "organic: then a shopping campaign": (
        {"utm_source": "?", "utm_campaign": "Shopping", "utm_medium": "email", "referring_domain": "facebook.com"},
        "Organic Shopping",
    ),
    "organic: then medium": (
        {"utm_source": "?", "utm_campaign": "video", "utm_medium": "email", "referring_domain": "facebook.com"},
        "Email",
    ),
    "organic: then referring domain": (
        {"utm_source": "?", "utm_campaign": "video", "utm_medium": "webpush", "referring_domain": "facebook.com"},
        "Organic Social",
    ),
    "organic: then a video campaign": (
        {"utm_campaign": "a VIDEO", "utm_medium": "webpush", "fbclid": "x", "referring_domain": "x.example"},
        "Organic Video",
    ),
    "organic: then push": ({"utm_medium": "WebPush", "fbclid": "x", "referring_domain": "x.example"}, "Push"),
    "organic: then fbclid": (
        {"utm_medium": "pushy", "fbclid": "x", "referring_domain": "x.example"},
        "Organic Social",
    ),
    "organic: then direct": ({"utm_medium": "pushy", "referring_domain": "$direct"}, "Direct"),
    "organic: then referral": ({"utm_medium": "pushy", "referring_domain": "x.example"}, "Referral"),
    "organic: else unknown": ({"utm_medium": "pushy"}, "Unknown"),
    "organic: a source that has no organic type is passed over": (
        {"utm_source": "adwords", "referring_domain": "x.example"},
        "Referral",
    ),
    "organic: no referring domain is no direct": ({"utm_source": "?"}, "Unknown"),
    # Look-ups
    "a referring domain below a known one": (
        {"utm_medium": "?", "referring_domain": "m.facebook.com"},
        "Organic Social",
    ),
    "a referring domain far below a known one": (
        {"utm_medium": "?", "referring_domain": "a.b.facebook.com"},
        "Organic Social",
    ),
    "a source below a known one": ({"utm_medium": "?", "utm_source": "l.facebook.com"}, "Organic Social"),
    "a referring domain whose name alone is known": (
        {"utm_medium": "?", "referring_domain": "www.google.com"},
        "Organic Search",
    ),
    "the name itself before the domain above": ({"utm_medium": "?", "referring_domain": "m.mail.example"}, "Email"),
    "the domain above where the name has no type": ({"utm_medium": "?", "referring_domain": "x.mail.example"}, "SMS"),
    "a domain that only ends like a known one": (
        {"utm_medium": "?", "referring_domain": "notfacebook.com"},
        "Referral",
    ),
    "a source in any case": ({"utm_medium": "?", "utm_source": "LinkedIn"}, "Organic Social"),
    "a medium in any case": ({"utm_medium": "E-Mail"}, "Email"),
    "a medium is no source": ({"utm_medium": "google", "referring_domain": "x.example"}, "Referral"),
    "a source is no medium": (
        {"utm_medium": "?", "utm_source": "affiliate", "referring_domain": "x.example"},
        "Referral",
    ),
    "a referring domain that only has an organic type": (
        {"utm_medium": "?", "referring_domain": "organic.example"},
        "Affiliate",
    ),
    # Shopping campaigns
    **{
        f"campaign {campaign} is shopping": ({"utm_medium": "?", "utm_campaign": campaign}, "Organic Shopping")
        for campaign in (
            "shop",
            "SHOP now",
            "summer shop",
            "e-shop",
            "eshop",
            "1shop",
            "workshopping",
            "the shopping one",
            "_shop_",
        )
    },
    **{
        f"campaign {campaign} is not": ({"utm_medium": "?", "utm_campaign": campaign}, "Unknown")
        for campaign in ("workshop", "bishop", "sho p", "hop")
    },
    # Nothing, in its three spellings
    "null is nothing": (dict.fromkeys(INITIAL, "null") | {"utm_medium": "?"}, "Unknown"),
    "nothing at all": ({}, "Unknown"),
}


def test_the_channel_follows_the_rules_in_their_order(
    source: Source, target: Target, run: RunExport, hour: datetime
) -> None:
    rows = ", ".join(str(row).replace("None", "NULL") for row in DEFINITIONS)
    source.execute(f"INSERT INTO channel_definition (domain, kind, type_if_paid, type_if_organic) VALUES {rows}")
    source.execute("SYSTEM RELOAD DICTIONARY channel_definition_dict")
    insert_sessions(
        source,
        *(
            session(
                new_session(hour),
                hour,
                distinct_id=case,
                **{f"initial_{name}": value for name, value in initial.items()},
            )
            for case, (initial, _) in CASES.items()
        ),
    )
    assert run(export_of("sessions", target, hour), partition_key(hour)).error is None
    landed = dict(target.rows("SELECT distinct_id, channel_type FROM sessions"))
    assert landed == {case: channel for case, (_, channel) in CASES.items()}

    known = definitions(source)
    cleaned = {
        case: {name: initial.get(name) if initial.get(name) not in ("", "null") else None for name in INITIAL}
        for case, (initial, _) in CASES.items()
    }
    assert landed == {case: channel_type(known, initial) for case, initial in cleaned.items()}, (
        "the tests' own reference"
    )
