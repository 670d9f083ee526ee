"""Alerts: what is told of an export in trouble, how often, and through what; by real runs, receivers and storage.

The sensor is evaluated by hand, a tick at a time, on a Dagster instance in the sandbox's Postgres; once by a code server.
"""

import itertools
import json
import logging
import socket
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import dagster as dg
import pytest
from dagster._core.definitions.sensor_definition import SensorExecutionData
from dagster._core.remote_origin import (
    InProcessCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    ScheduleInstigatorData,
)
from dagster._core.test_utils import create_test_daemon_workspace_context, freeze_time
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.load_target import ModuleTarget
from dagster._daemon.sensor import execute_sensor_iteration
from dagster._scheduler.scheduler import launch_scheduled_runs
from dagster._utils.error import serializable_error_info_from_exc_info
from pydantic import SecretStr, ValidationError

from pg_exports import PostgresExport, PostgresIOManager, PostgresResource
from pg_exports.alerts import ExportAlerts, channels, component, watch
from pg_exports.errors import SettingsError
from pg_exports.sandbox import Sandbox, postgres_server
from pg_exports.sandbox.certificates import HOST
from pg_exports.sandbox.postgres_server import SUPERUSER
from pg_exports_tests.conftest import Source, Target, partition_key
from pg_exports_tests.faults import eventually, storage_by_socket
from pg_exports_tests.receivers import WebhookReceiver, mail_receiver, webhook_receiver
from pg_exports_tests.source_rows import HOUR, export_of

COMPONENT = "pg_exports.ExportAlerts"
SECRET = "s3cret-T0/B0/x-y_z"
SERVER = "https://dagster.example"
DAY = timedelta(days=1)
SETTLING = watch.SETTLING
NOTHING = "Nothing to tell."
EMAIL: dict[str, Any] = {"from": "a@a.example", "to": ["b@b.example"], "password": SECRET, "smtp_host": "mail.example"}
QUIET = "password authentication failed"
"""What an export says whose password is wrong: it fails at once."""


@pytest.fixture(scope="module")
def instance(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    """An instance that tries crashed runs again, as the shipped one does, with a database of its own."""
    database = f"alerts_{uuid.uuid4().hex[:8]}"
    postgres_server.create_database(sandbox.postgres, database, owner=SUPERUSER)
    folder = tmp_path_factory.mktemp("instance")
    settings = {
        "storage": {
            "postgres": {"postgres_url": storage_by_socket(sandbox.postgres, database)},
        },
        "run_retries": {"enabled": True, "max_retries": 3, "retry_on_asset_or_op_failure": False},
        "run_coordinator": {"module": "dagster._core.run_coordinator", "class": "DefaultRunCoordinator"},
        "telemetry": {"enabled": False},
    }
    (folder / "dagster.yaml").write_text(json.dumps(settings))
    with dg.DagsterInstance.from_config(str(folder)) as running:
        yield running


@pytest.fixture(autouse=True)
def failures_settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures are looked at without delay."""
    monkeypatch.setattr(watch, "SETTLING", timedelta(0))


@pytest.fixture
def webhook() -> Iterator[WebhookReceiver]:
    """A receiver whose address is a secret."""
    with webhook_receiver(f"/services/{SECRET}?key={SECRET}") as receiver:
        yield receiver


@dataclass
class Deployed:
    """A code location with one hourly export and alerts, and the cursor that its sensor left.

    Attributes:
        ahead: how far the sensor's clock is before the runs'.
    """

    instance: dg.DagsterInstance
    source: Source
    target: Target
    export: PostgresExport
    alerts: ExportAlerts
    monkeypatch: pytest.MonkeyPatch
    cursor: str | None = None
    ahead: timedelta = timedelta(0)

    @property
    def name(self) -> str:
        """The export's."""
        return self.export.key

    def definitions(self, postgres: PostgresResource) -> dg.Definitions:
        """The code location, with the export's destination."""
        resources = {
            "clickhouse": self.source.resource(),
            "postgres": postgres,
            "postgres_io_manager": PostgresIOManager(postgres=postgres),
        }
        return dg.Definitions.merge(
            self.export.build_defs(None),
            self.alerts.build_defs(None),
            dg.Definitions(resources=resources, executor=dg.in_process_executor, assets=[bystander]),
        )

    def run(self, *keys: str, tags: Mapping[str, str] | None = None, **postgres: Any) -> dg.ExecuteInProcessResult:
        """A run of the export, for a partition or from one to another."""
        first, last = keys[0], keys[-1]
        job = self.definitions(self.target.resource(**postgres)).resolve_job_def(f"{self.name}_job")
        span = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
        result = job.execute_in_process(
            instance=self.instance,
            partition_key=first if first == last else None,
            tags={**(span if first != last else {}), **(tags or {})},
            raise_on_error=False,
        )
        if result.success:
            assert "dagster/will_retry" not in self.instance.get_runs(dg.RunsFilter([result.run_id]))[0].tags
        return result

    def fails(self, *keys: str, **options: Any) -> str:
        """A run that fails at once, as the password is wrong; its id."""
        result = self.run(*keys, password=f"wrong-{SECRET}", **options)
        assert not result.success
        return result.run_id

    def succeeds(self, *keys: str) -> None:
        """A run that does not fail."""
        assert self.run(*keys).success

    def tick(self) -> SensorExecutionData:
        """What the sensor does now. As in the daemon, a tick that fails leaves the cursor as it was."""
        self.monkeypatch.setattr(component, "_now", lambda: datetime.now(UTC) + self.ahead)
        definitions = self.definitions(self.target.resource())
        with dg.build_sensor_context(
            instance=self.instance,
            cursor=self.cursor,
            repository_def=definitions.get_repository_def(),
            sensor_name="export_alerts",
        ) as context:
            done = definitions.get_sensor_def("export_alerts").evaluate_tick(context)
        self.cursor = done.cursor
        return done

    def starts_schedule(self, at: datetime, status: InstigatorStatus = InstigatorStatus.DECLARED_IN_CODE) -> None:
        """Have the instance remember that the schedule was started, as its daemon does."""
        location = InProcessCodeLocationOrigin(LoadableTargetOrigin(module_name="unused"))
        origin = RemoteInstigatorOrigin(RemoteRepositoryOrigin(location, "__repository__"), f"{self.name}_schedule")
        data = ScheduleInstigatorData("1 * * * *", at.timestamp())
        state = InstigatorState(origin, InstigatorType.SCHEDULE, status, data)
        if self.instance.get_instigator_state(state.instigator_origin_id, state.selector_id):
            self.instance.update_instigator_state(state)
        else:
            self.instance.add_instigator_state(state)


@dg.asset(name="bystander")
def bystander() -> None:
    """An asset that is no export, and fails."""
    raise ValueError("not an export")


@pytest.fixture
def deployed(
    instance: dg.DagsterInstance,
    source: Source,
    target: Target,
    hour: datetime,
    webhook: WebhookReceiver,
    monkeypatch: pytest.MonkeyPatch,
) -> Deployed:
    """An export of the test's own, and alerts to the webhook; the first tick is done."""
    name = f"export_{uuid.uuid4().hex[:8]}"
    alerts = alerts_of(webhook=webhook.url, webserver_url=f"{SERVER}/")
    made = Deployed(instance, source, target, export_of("events", target, hour, name=name), alerts, monkeypatch)
    made.tick()
    return made


def alerts_of(**settings: Any) -> ExportAlerts:
    """Alerts with these attributes, as a user of Python writes them."""
    return ExportAlerts(**settings)


def hook(url: str) -> channels.Webhook:
    return channels.Webhook(url=SecretStr(url))


def mailbox(**changes: Any) -> channels.Email:
    return channels.Email(**(EMAIL | changes))


def error_of(failing: Any) -> str:
    """The whole text that the UI shows of a call that fails, stack traces and causes included."""
    with pytest.raises(Exception, match=r".") as caught:
        failing()
    return serializable_error_info_from_exc_info((caught.type, caught.value, caught.tb)).to_string()


# What is told


def test_a_failed_run_is_told_with_export_interval_error_and_link(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    run_id = deployed.fails(partition_key(hour))
    assert deployed.tick().skip_message == "1 sent."
    [text] = webhook.texts
    title, *error, link = text.split("\n")
    assert title == f"Export {deployed.name} failed: interval {partition_key(hour)}"
    assert QUIET in " ".join(error)
    assert "Traceback" not in text
    assert "DagsterExecution" not in text
    assert link == f"{SERVER}/runs/{run_id}"
    assert webhook.content_types == ["application/json"]
    assert webhook.paths == [f"/services/{SECRET}?key={SECRET}"]


def test_a_range_is_told_by_its_ends_and_without_the_uis_address_the_run_by_its_id(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    deployed.alerts = alerts_of(webhook=webhook.url)
    run_id = deployed.fails(partition_key(hour - 5 * HOUR), partition_key(hour))
    deployed.tick()
    [text] = webhook.texts
    assert text.startswith(
        f"Export {deployed.name} failed: intervals {partition_key(hour - 5 * HOUR)} to {partition_key(hour)}\n"
    )
    assert text.endswith(f"\nRun {run_id}")


def test_nothing_in_an_error_is_a_link_or_a_mention(
    deployed: Deployed, webhook: WebhookReceiver, target: Target, hour: datetime
) -> None:
    table = "<!channel> & <https://a.example|b>"
    deployed.export = export_of("events", target, hour, name=deployed.name, table=table)
    target.execute(f'CREATE TABLE "{table}" (uuid INTEGER)')
    assert not deployed.run(partition_key(hour)).success
    deployed.tick()
    [text] = webhook.texts
    assert "&lt;!channel&gt; &amp; &lt;https://a.example|b&gt;" in text
    assert "<" not in text


def test_a_long_error_is_cut() -> None:
    assert watch._shortened("a" * 600) == "a" * 600
    assert watch._shortened("a" * 601) == "a" * 596 + " ..."


def test_a_run_that_crashed_before_the_export_ended_is_told(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    job = deployed.definitions(deployed.target.resource()).resolve_job_def(f"{deployed.name}_job")
    crashed = deployed.instance.create_run_for_job(
        job, tags={"dagster/partition": partition_key(hour), "dagster/max_retries": "0"}
    )
    deployed.instance.report_run_failed(crashed, "The run's worker has died.")
    deployed.tick()
    [text] = webhook.texts
    assert text == (
        f"Export {deployed.name} failed: interval {partition_key(hour)}\nThe run's worker has died.\n"
        f"{SERVER}/runs/{crashed.run_id}"
    )


def test_of_a_run_with_other_assets_only_the_export_that_failed_is_told(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    definitions = deployed.definitions(deployed.target.resource())
    [exporting] = deployed.export.build_defs(None).assets or []
    assert isinstance(exporting, dg.AssetsDefinition)

    @dg.asset(partitions_def=exporting.partitions_def)
    def beside_it() -> None:
        raise ValueError("not an export")

    mixed = dg.Definitions.merge(
        definitions, dg.Definitions(assets=[beside_it])
    ).resolve_implicit_global_asset_job_def()
    alone = mixed.execute_in_process(instance=deployed.instance, asset_selection=[bystander.key], raise_on_error=False)
    together = mixed.execute_in_process(
        instance=deployed.instance,
        asset_selection=[beside_it.key, exporting.key],
        partition_key=partition_key(hour),
        raise_on_error=False,
    )
    assert (alone.success, together.success) == (False, False)
    assert len(together.asset_materializations_for_node(deployed.name)) == 1
    assert deployed.tick().skip_message == NOTHING
    assert webhook.texts == []


def test_what_failed_before_the_first_tick_is_not_told(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    deployed.cursor = None
    deployed.fails(partition_key(hour))
    deployed.tick()
    assert deployed.tick().skip_message == NOTHING
    assert webhook.texts == []


# How often


def test_an_export_that_keeps_failing_is_told_of_once_a_day(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    deployed.fails(partition_key(hour - 2 * HOUR))
    deployed.tick()
    assert len(webhook.taken()) == 1
    deployed.fails(partition_key(hour - HOUR))
    last = deployed.fails(partition_key(hour))
    for ahead in (timedelta(0), DAY - timedelta(minutes=5)):
        deployed.ahead = ahead
        assert deployed.tick().skip_message == NOTHING
    # The newest of those that were not told.
    deployed.ahead = DAY
    deployed.tick()
    [text] = webhook.taken()
    assert partition_key(hour) in text
    assert last in text
    # Without another failure there is nothing to tell on the third day.
    deployed.ahead = 3 * DAY
    assert deployed.tick().skip_message == NOTHING


def test_after_it_has_recovered_the_next_failure_is_told_at_once(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    deployed.fails(partition_key(hour - HOUR))
    deployed.tick()
    assert len(webhook.taken()) == 1
    deployed.fails(partition_key(hour - HOUR))
    deployed.succeeds(partition_key(hour))
    deployed.tick()
    # What failed and was not told is history.
    deployed.ahead = DAY
    assert deployed.tick().skip_message == NOTHING
    assert webhook.taken() == []
    deployed.ahead = timedelta(0)
    deployed.fails(partition_key(hour))
    deployed.tick()
    assert len(webhook.taken()) == 1
    # The same within one tick.
    deployed.succeeds(partition_key(hour))
    deployed.fails(partition_key(hour))
    deployed.tick()
    assert len(webhook.taken()) == 1


def test_what_a_range_has_committed_before_it_failed_is_no_recovery(
    deployed: Deployed, webhook: WebhookReceiver, target: Target, hour: datetime
) -> None:
    deployed.succeeds(partition_key(hour - 3 * HOUR))
    target.execute(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF new.interval_start = '{hour:%Y-%m-%d %H:%M}+00' THEN RAISE 'refused'; END IF;
            RETURN new;
        END
        $$
        """,
        "CREATE TRIGGER refuse BEFORE INSERT ON pg_exports_ledger FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    for expected in (1, 0):
        failed = deployed.run(partition_key(hour - 2 * HOUR), partition_key(hour))
        assert not failed.success
        records = deployed.instance.fetch_materializations(dg.AssetKey(deployed.name), limit=10).records
        assert failed.run_id in {record.run_id for record in records}
        deployed.tick()
        assert len(webhook.taken()) == expected


def test_a_run_that_is_tried_again_is_told_only_when_the_last_try_has_failed(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    retried = deployed.fails(partition_key(hour), tags={"dagster/retry_on_asset_or_op_failure": "true"})
    [run] = deployed.instance.get_runs(dg.RunsFilter([retried]))
    assert run.tags["dagster/will_retry"] == "true"
    assert deployed.tick().skip_message == NOTHING
    last = deployed.fails(partition_key(hour), tags={"dagster/max_retries": "0"})
    deployed.tick()
    [text] = webhook.texts
    assert last in text


def test_a_failure_is_left_alone_until_dagster_has_noted_whether_it_tries_again(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SETTLING", timedelta(minutes=1))
    deployed.fails(partition_key(hour))
    assert deployed.tick().skip_message == NOTHING
    deployed.ahead = timedelta(minutes=1)
    deployed.tick()
    assert len(webhook.texts) == 1


# Lag


def test_an_interval_that_is_late_is_told_once_a_day_until_it_lands(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    deployed.alerts = alerts_of(webhook=webhook.url, webserver_url=SERVER, lag_minutes=60)
    deployed.starts_schedule(hour - DAY)
    # Ended from 60 to 120 minutes ago.
    due = hour + HOUR
    for ahead, told in ((timedelta(0), 1), (timedelta(0), 0), (DAY, 1)):
        deployed.ahead = ahead
        deployed.tick()
        texts = webhook.taken()
        assert len(texts) == told
        if told and not ahead:
            title, why, link = texts[0].split("\n")
            assert title == f"Export {deployed.name} is late: interval {partition_key(due)}"
            assert why.startswith(f"It ended at {due + HOUR:%Y-%m-%d %H:%M} UTC, ")
            assert "is not in Postgres" in why
            assert link == f"{SERVER}/assets/{deployed.name}"


def test_an_export_that_catches_up_is_told_again_only_when_it_is_late_anew(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    deployed.alerts = alerts_of(webhook=webhook.url, lag_minutes=60)
    deployed.starts_schedule(hour - DAY)
    deployed.tick()
    assert len(webhook.taken()) == 1
    # It is on its way, and still late.
    deployed.succeeds(partition_key(hour))
    assert deployed.tick().skip_message == NOTHING
    deployed.succeeds(partition_key(hour + HOUR))
    assert deployed.tick().skip_message == NOTHING
    deployed.ahead = HOUR
    deployed.tick()
    [text] = webhook.taken()
    assert partition_key(hour + 2 * HOUR) in text


def test_an_export_that_fails_and_so_is_late_is_told_of_once(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    deployed.starts_schedule(hour - DAY)
    deployed.fails(partition_key(hour + HOUR))
    deployed.tick()
    assert "failed" in webhook.taken()[0]
    deployed.alerts = alerts_of(webhook=webhook.url, lag_minutes=60)
    assert deployed.tick().skip_message == NOTHING
    deployed.ahead = DAY
    deployed.tick()
    assert "is late" in webhook.taken()[0]


def test_an_export_whose_schedule_does_not_run_or_was_started_later_is_never_late(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime
) -> None:
    deployed.alerts = alerts_of(webhook=webhook.url, lag_minutes=60)
    # It starts stopped: Dagster remembers nothing of it.
    assert deployed.tick().skip_message == NOTHING
    deployed.starts_schedule(hour - DAY, InstigatorStatus.STOPPED)
    assert deployed.tick().skip_message == NOTHING
    deployed.starts_schedule(hour + 2 * HOUR, InstigatorStatus.RUNNING)
    assert deployed.tick().skip_message == NOTHING
    deployed.starts_schedule(hour + 2 * HOUR - timedelta(seconds=1), InstigatorStatus.RUNNING)
    assert deployed.tick().skip_message == "1 sent."
    assert len(webhook.texts) == 1


# Sending


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "answers HTTP 404. From 400 to 499 its address is wrong or no longer valid"),
        (503, "answers HTTP 503"),
        (302, "answers with a redirect (HTTP 302), which is not followed"),
    ],
)
def test_an_alert_that_was_not_taken_is_sent_at_the_next_tick(
    deployed: Deployed, webhook: WebhookReceiver, hour: datetime, status: int, said: str
) -> None:
    with webhook_receiver("/elsewhere") as elsewhere:
        webhook.status, webhook.headers = status, {"Location": elsewhere.url}
        run_id = deployed.fails(partition_key(hour))
        before = deployed.cursor
        text = error_of(deployed.tick)
        assert said in text
        assert "pg_exports.errors.PassingError" in text
        assert SECRET not in text
        assert HOST not in text
        assert deployed.cursor == before
        assert elsewhere.texts == []
    assert len(webhook.taken()) == 1
    webhook.status = 204
    assert deployed.tick().skip_message == "1 sent."
    assert deployed.tick().skip_message == NOTHING
    [taken] = webhook.taken()
    assert run_id in taken


def test_a_receiver_that_is_down_or_frozen_or_speaks_no_http_is_an_error_within_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channels, "TIMEOUT", 0.2)
    alert = channels.Alert(title="a", text="b", link="c")
    with socket.create_server((HOST, 0)) as listening:
        port = listening.getsockname()[1]
        frozen = hook(f"http://{HOST}:{port}/{SECRET}")
        assert "timed out" in (text := error_of(lambda: frozen.send(alert)))
        assert SECRET not in text
    for url, said in (
        (f"http://{HOST}:{port}/{SECRET}", "Connection refused"),
        (f"https://{HOST}:{port}/{SECRET}", "Connection refused"),
        (f"https://nowhere.invalid/{SECRET}", "Name"),
    ):
        text = error_of(lambda url=url: hook(url).send(alert))
        assert "The alerts' `webhook` does not answer" in text
        assert said in text
        assert SECRET not in text


def test_a_webhook_over_https_is_verified_with_the_systems_authorities(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    alert = channels.Alert(title="a", text="b", link="")
    with webhook_receiver(f"/{SECRET}", sandbox.certificates) as receiver:
        text = error_of(lambda: hook(receiver.url).send(alert))
        assert "CERTIFICATE_VERIFY_FAILED" in text
        assert SECRET not in text
        monkeypatch.setenv("SSL_CERT_FILE", str(sandbox.certificates.authority))
        hook(receiver.url).send(alert)
        assert "CERTIFICATE_VERIFY_FAILED" in error_of(
            lambda: hook(receiver.url.replace(HOST, "127.0.0.1")).send(alert)
        )
        assert receiver.texts == ["a\nb"]


def test_what_one_channel_has_taken_is_not_sent_there_again_when_the_other_fails(
    deployed: Deployed, sandbox: Sandbox, webhook: WebhookReceiver, hour: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(sandbox.certificates.authority))
    with mail_receiver(sandbox.certificates, "SSL", "alerts@a.example", SECRET) as mail:
        email = {"from": "alerts@a.example", "to": ["b@b.example"], "smtp_host": HOST, "smtp_port": mail.port}
        deployed.alerts = alerts_of(webhook=webhook.url, email=email | {"password": f"not {SECRET}"})
        deployed.fails(partition_key(hour))
        said = deployed.tick().skip_message
        assert said is not None
        assert said.startswith(f"1 sent. The alerts' mail server {HOST}:{mail.port} does not take the mail (SSL): 535")
        # With nothing else to send the tick fails.
        text = error_of(deployed.tick)
        assert "535" in text
        assert SECRET not in text + said + str(deployed.cursor)
        deployed.alerts = alerts_of(webhook=webhook.url, email=email | {"password": SECRET})
        assert deployed.tick().skip_message == "1 sent."
        assert deployed.tick().skip_message == NOTHING
        assert len(mail.mails) == len(webhook.texts) == 1


def test_a_channel_that_fails_is_asked_once_a_tick_and_gets_all_alerts_when_it_is_back(
    webhook: WebhookReceiver,
) -> None:
    unsent = [
        component.Unsent(alert=channels.Alert(title=title, text="", link=""), channels=["webhook", "gone"])
        for title in "abc"
    ]
    sending: dict[str, channels.Channel] = {"webhook": hook(webhook.url)}
    webhook.status = 500
    sent, left, problems = component._send(unsent, sending)
    assert (sent, len(problems)) == (0, 1)
    assert webhook.taken() == ["a"]
    webhook.status = 200
    assert component._send(left, sending) == (3, [], [])
    assert webhook.taken() == ["a", "b", "c"]


def test_an_alert_that_the_receiver_refuses_for_its_words_does_not_keep_others_from_it(
    webhook: WebhookReceiver,
) -> None:
    unsent = [
        component.Unsent(alert=channels.Alert(title=title, text="", link=""), channels=["webhook"]) for title in "abc"
    ]
    webhook.refuses = "a"
    sent, left, [problem] = component._send(unsent, {"webhook": hook(webhook.url)})
    assert sent == 2
    assert [item.alert.title for item in left] == ["a"]
    assert "answers HTTP 400" in problem
    assert webhook.taken() == ["a", "b", "c"]


@pytest.mark.parametrize("smtp_type", ["SSL", "STARTTLS"])
def test_a_mail_goes_over_verified_tls_with_the_exports_name_in_its_subject(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, smtp_type: Literal["SSL", "STARTTLS"]
) -> None:
    alert = channels.Alert(
        title="Export events failed: ä", text="Schema ”x“ <b>\n.\nFrom here", link=f"{SERVER}/runs/1"
    )
    with mail_receiver(sandbox.certificates, smtp_type, "alerts", SECRET) as receiver:
        email = mailbox(
            to=["b@b.example", "c@c.example"],
            smtp_host=HOST,
            smtp_port=receiver.port,
            smtp_type=smtp_type,
            smtp_user="alerts",
        )
        text = error_of(lambda: email.send(alert))
        assert "CERTIFICATE_VERIFY_FAILED" in text
        assert SECRET not in text
        monkeypatch.setenv("SSL_CERT_FILE", str(sandbox.certificates.authority))
        email.send(alert)
        [mail] = receiver.mails
        assert receiver.envelopes == [("a@a.example", ["b@b.example", "c@c.example"])]
        assert (mail["From"], mail["To"]) == ("a@a.example", "b@b.example, c@c.example")
        assert mail["Subject"] == alert.title
        assert mail.get_content_type() == "text/plain"
        assert mail.get_content().replace("\r\n", "\n") == f"{alert.text}\n\n{alert.link}\n"


def test_a_line_break_or_half_a_character_in_a_mail_stops_no_alert(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(sandbox.certificates.authority))
    alert = channels.Alert(title="a\nBcc: d@d.example\r\n\ud800b\x1b[31m", text="c\x1b[2J\ud800\nd", link=SERVER)
    with mail_receiver(sandbox.certificates, "SSL", "alerts", SECRET) as receiver:
        mailbox(smtp_host=HOST, smtp_port=receiver.port, smtp_user="alerts", to=["b@b.example"]).send(alert)
        [mail] = receiver.mails
    assert mail["Subject"] == r"a Bcc: d@d.example\r \ud800b\x1b[31m"
    assert mail["Bcc"] is None
    assert receiver.envelopes == [("a@a.example", ["b@b.example"])]
    assert mail.get_content().replace("\r\n", "\n") == r"c\x1b[2J\ud800" + f"\nd\n\n{SERVER}\n"


def test_a_mail_server_that_is_down_or_frozen_is_an_error_within_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "TIMEOUT", 0.2)
    alert = channels.Alert(title="a", text="b", link="c")
    with socket.create_server((HOST, 0)) as listening:
        port = listening.getsockname()[1]
        for smtp_type in ("SSL", "STARTTLS"):
            email = mailbox(smtp_host=HOST, smtp_port=port, smtp_type=smtp_type)
            text = error_of(lambda email=email: email.send(alert))
            assert f"The alerts' mail server {HOST}:{port} does not take the mail ({smtp_type}): " in text
            assert "timed out" in text
            assert SECRET not in text
    assert "Connection refused" in error_of(lambda: email.send(alert))
    assert socket.getdefaulttimeout() is None


# In a deployment


def test_the_daemons_find_a_failed_run_and_a_late_interval_by_a_code_server(
    instance: dg.DagsterInstance,
    sandbox: Sandbox,
    source: Source,
    target: Target,
    webhook: WebhookReceiver,
    hour: datetime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = sandbox.environment() | {"CLICKHOUSE_DATABASE": source.database, "ALERTS_WEBHOOK": webhook.url}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Not the repository's root: a code server loads the `.env` of its folder, which wins.
    monkeypatch.chdir(tmp_path)
    began = datetime.now(UTC)
    # Half an hour from both ends of the time in which that interval is the latest that is late: the clock may strike.
    lag_minutes = int((began - (hour + 2 * HOUR)) / timedelta(minutes=1)) - 30
    alerts = {"webhook": "{{ env.ALERTS_WEBHOOK }}", "webserver_url": SERVER, "lag_minutes": lag_minutes}
    package = project(tmp_path, alerts, monkeypatch)
    for name, settings in (
        ("failing", {"schema": "nowhere"}),
        ("landing", {"schema": target.schema}),
        ("off", {"paused": True}),
    ):
        start = f"{hour - DAY:%Y-%m-%d}"
        attributes = {"name": name, "model": "events", "team_id": 1, "start": start} | settings
        write_yaml(package / "defs" / name, "pg_exports.PostgresExport", attributes)
    (package / "defs" / "resources.py").write_text("from pg_exports.defs.resources import connections as connections\n")
    (package / "definitions.py").write_text(
        "from pathlib import Path\n\nimport dagster as dg\n\n\n@dg.definitions\ndef defs():\n"
        "    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)\n"
    )
    code = ModuleTarget(f"{package.name}.definitions", None, str(tmp_path), tmp_path.name)
    logger = logging.getLogger("daemon")
    minutes = itertools.count(1)
    with create_test_daemon_workspace_context(code, instance) as workspace:

        def sensor_ticks() -> None:
            with freeze_time(began + timedelta(seconds=61) * next(minutes)):
                list(execute_sensor_iteration(workspace, logger, None, None))

        def told() -> list[str]:
            sensor_ticks()
            return [text.split("\n")[0] for text in webhook.texts]

        def have_settled() -> bool:
            records = instance.get_run_records(dg.RunsFilter(tags={"dagster/partition": partition_key(hour + HOUR)}))
            before = (datetime.now(UTC) - SETTLING).timestamp()
            ended = {record.dagster_run.job_name for record in records if record.end_time and record.end_time < before}
            return ended >= {"failing_job", "landing_job"}

        # The schedules are started half an hour before that interval ends, and see its end.
        sensor_ticks()
        for moment in (hour + 1.5 * HOUR, hour + 2 * HOUR + timedelta(minutes=2)):
            with freeze_time(moment):
                list(launch_scheduled_runs(workspace, logger, moment, {}))
        # Until then the failing export is no more than late.
        eventually(have_settled, seconds=120)
        assert told() == [f"Export failing failed: interval {partition_key(hour + HOUR)}"]
        instance.wipe_assets([dg.AssetKey("landing")])
        assert told()[1:] == [f"Export landing is late: interval {partition_key(hour + HOUR)}"]
        assert len(told()) == 2
        failed = instance.get_runs(dg.RunsFilter(job_name="failing_job"))
        assert [f"{SERVER}/runs/{run.run_id}" for run in failed] == [webhook.texts[0].split("\n")[-1]]
        assert 'Schema "nowhere" does not exist' in webhook.texts[0]


# Settings


def load(folder: Path, attributes: Mapping[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> dg.Definitions:
    """The definitions of a project with these attributes of alerts, or without alerts."""
    return dg.load_from_defs_folder(path_within_project=project(folder, attributes, monkeypatch))


def project(folder: Path, attributes: Mapping[str, Any] | None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a Dagster project with alerts, or without; gives its package."""
    package = folder / f"project_{uuid.uuid4().hex}"
    (package / "defs").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        f'[tool.dg]\ndirectory_type = "project"\n[tool.dg.project]\nroot_module = "{package.name}"\n'
    )
    for module in (package, package / "defs"):
        (module / "__init__.py").touch()
    if attributes is not None:
        write_yaml(package / "defs" / "alerts", COMPONENT, attributes)
    monkeypatch.syspath_prepend(str(folder))
    return package


def write_yaml(folder: Path, component_type: str, attributes: Mapping[str, Any]) -> None:
    """A `defs.yaml`, written as JSON."""
    folder.mkdir()
    (folder / "defs.yaml").write_text(json.dumps({"type": component_type, "attributes": attributes}))


EVERY: dict[str, Any] = {
    "webhook": "{{ env.ALERTS_WEBHOOK }}",
    "email": EMAIL
    | {"password": "{{ env.ALERTS_PASSWORD }}", "smtp_type": "STARTTLS", "smtp_port": 25, "smtp_user": "a"},
    "lag_minutes": 60,
    "webserver_url": SERVER,
}


def test_there_is_no_sensor_of_alerts_unless_a_file_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not load(tmp_path, None, monkeypatch).sensors
    monkeypatch.setenv("ALERTS_WEBHOOK", f"https://hooks.example/{SECRET}")
    monkeypatch.setenv("ALERTS_PASSWORD", SECRET)
    definitions = load(tmp_path, EVERY, monkeypatch)
    [sensor] = definitions.sensors or []
    assert isinstance(sensor, dg.SensorDefinition)
    assert (sensor.name, sensor.minimum_interval_seconds) == ("export_alerts", 60)
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
    assert SECRET not in repr(definitions) + repr(sensor) + repr(vars(sensor)) + repr(sensor.metadata)


def test_the_shipped_definitions_have_no_alerts(repository: Path) -> None:
    assert not [file for file in (repository / "pg_exports" / "defs").rglob("*") if "alerts" in file.name]


def test_secrets_are_in_no_repr() -> None:
    alerts = alerts_of(webhook=f"https://hooks.example/{SECRET}", email=mailbox())
    assert alerts.email is not None
    sending = hook(f"https://hooks.example/{SECRET}")
    assert SECRET not in f"{alerts!r} {alerts} {alerts.email!r} {sending!r} {alerts.model_dump()}"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "give `webhook` or `email`, or both"),
    ({"webhook": None}, "give `webhook` or `email`, or both"),
    ({"webhook": ""}, "`webhook` must be an address that begins with https://"),
    ({"webhook": SECRET}, "`webhook` must be an address that begins with https://"),
    ({"webhook": f"ftp://{SECRET}"}, "`webhook` must be an address that begins with https://"),
    ({"webhook": f"https://hooks.example:{SECRET}/"}, "`webhook` must be an address that begins with https://"),
    ({"webhook": f"https://hooks.example/ä {SECRET}"}, "`webhook` must be an address that begins with https://"),
    ({"webhook": [SECRET]}, "`webhook`"),
    ({"webhok": f"https://{SECRET}"}, "`webhok`: there is no such attribute"),
    ({"email": SECRET}, "`email`"),
    ({"email": {"password": SECRET, "to": ["b@b.example"], "smtp_host": "h"}}, "`email`: `from`: Field required"),
    ({"email": EMAIL | {"to": []}}, "`email`: `to`: must be e-mail addresses"),
    ({"email": EMAIL | {"to": "b@b.example"}}, "`email`: `to`: Input should be a valid list"),
    ({"email": EMAIL | {"from": "nobody"}}, "`email`: `from`: must be an e-mail address"),
    ({"email": EMAIL | {"from": "a@a.example\nBcc: c@c.example"}}, "`email`: `from`: must be an e-mail address"),
    ({"email": EMAIL | {"pasword": SECRET}}, "`email`: `pasword`: there is no such attribute"),
    ({"email": EMAIL | {"password": [SECRET]}}, "`email`: `password`"),
    ({"email": EMAIL | {"smtp_type": "TLS"}}, "`email`: `smtp_type`: Input should be 'SSL' or 'STARTTLS'"),
    ({"email": EMAIL | {"smtp_port": SECRET}}, "`email`: `smtp_port`: Input should be a valid integer"),
    ({"webhook": "https://a.example", "lag_minutes": 0}, "`lag_minutes` must be 1 or greater"),
    ({"webhook": "https://a.example", "lag_minutes": "soon"}, "`lag_minutes`"),
    ({"webhook": "https://a.example", "webserver_url": "dagster"}, "`webserver_url` must be an address"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=lambda value: str(value).replace(SECRET, "..."))
def test_a_wrong_attribute_is_one_error_that_names_it_and_shows_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str
) -> None:
    text = error_of(lambda: load(tmp_path, wrong, monkeypatch))
    assert text.count("pg_exports.errors.SettingsError: ") == 1
    assert f"SettingsError: ExportAlerts: {message}" in text
    assert SECRET not in text
    with pytest.raises((ValidationError, SettingsError)) as caught:
        ExportAlerts(**wrong).build_defs(None)
    assert SECRET not in str(caught.value)


def test_a_variable_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALERTS_WEBHOOK", raising=False)
    monkeypatch.setenv("ALERTS_PASSWORD", SECRET)
    text = error_of(lambda: load(tmp_path, EVERY, monkeypatch))
    assert "ExportAlerts: the environment variable ALERTS_WEBHOOK is not set" in text
    assert SECRET not in text
