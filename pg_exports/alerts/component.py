"""ExportAlerts: the alerts' settings, and the sensor that they become.

What is wrong is found by `watch` and sent by `channels`; here is whether it is told now.
"""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any
from urllib.parse import urlsplit

import dagster as dg
from pydantic import BaseModel, Field, SecretStr, field_validator, model_validator

from pg_exports.alerts import watch
from pg_exports.alerts.channels import Alert, Channel, Email, RefusedAlertError, Webhook
from pg_exports.component import SettingsComponent, as_written, read_part
from pg_exports.errors import PassingError, SettingsError

SECONDS_BETWEEN = 60
"""How long the sensor waits from one look to the next."""

AGAIN = timedelta(days=1)
"""After how long an export that is still in trouble is told of again."""


class Trouble(BaseModel):
    """What was told of an export that has not recovered since.

    Attributes:
        told: when, in seconds since 1970.
        since: when its newest failure was, told or not; for lag when that was told. What lands later is a recovery.
        untold: the id of a run that has failed since.
    """

    told: float
    since: float
    untold: str | None = None


class Unsent(BaseModel):
    """An alert that some channels have not taken yet."""

    alert: Alert
    channels: list[str]


class Memory(BaseModel):
    """What one tick leaves to the next: the sensor's cursor.

    Attributes:
        seen: storage id of the last failure that was looked at.
        troubles: by the export's name.
        unsent: oldest first.
    """

    seen: int
    troubles: dict[str, Trouble] = {}
    unsent: list[Unsent] = []


class ExportAlerts(SettingsComponent):
    """Tells a webhook or mailbox of exports that have failed for good, or are late: once a day while it lasts.

    In YAML:

        type: pg_exports.ExportAlerts
        attributes:
          webhook: "{{ env.ALERTS_WEBHOOK }}"
          lag_minutes: 60

    It looks after all exports of its code location.
    """

    webhook: Annotated[
        SecretStr | None,
        dg.Resolver(
            as_written,
            model_field_type=str | None,
            description="Address that takes Slack's JSON, as Slack, Mattermost and others give it out.",
        ),
    ] = None
    email: Annotated[
        Email | None,
        dg.Resolver(
            as_written,
            model_field_type=dict | None,
            description="Mail: from, to (a list), password, smtp_host, and smtp_type, smtp_port and smtp_user.",
        ),
    ] = None
    lag_minutes: int | None = Field(
        default=None,
        description="Tell of an interval that ended longer ago and is not in Postgres; by default failures alone are told.",
    )
    webserver_url: str | None = Field(
        default=None, description="Address of Dagster's UI, for links such as https://dagster.example/runs/..."
    )

    @classmethod
    def who(cls, written: Mapping[str, Any]) -> str:
        """How messages call it."""
        return "ExportAlerts"

    @field_validator("email", mode="before")
    @classmethod
    def _read_email(cls, value: Any) -> Any:
        return read_part(Email, value)

    @field_validator("webserver_url")
    @classmethod
    def _without_slash(cls, value: str | None) -> str | None:
        return value.rstrip("/") if value else value

    @model_validator(mode="after")
    def _check(self) -> "ExportAlerts":
        if self.webhook is not None and not _is_address(self.webhook.get_secret_value()):
            raise ValueError("`webhook` must be an address that begins with https:// or http://")
        if self.lag_minutes is not None and self.lag_minutes < 1:
            raise ValueError("`lag_minutes` must be 1 or greater")
        if self.webserver_url is not None and not _is_address(self.webserver_url):
            raise ValueError("`webserver_url` must be an address that begins with https:// or http://")
        return self

    def build_defs(self, context: dg.ComponentLoadContext | None) -> dg.Definitions:
        """The sensor. The context is not used: None will do.

        Raises:
            SettingsError: there is neither a webhook nor a mailbox.
        """
        channels: dict[str, Channel] = {}
        if self.webhook is not None:
            channels["webhook"] = Webhook(url=self.webhook)
        if self.email is not None:
            channels["email"] = self.email
        if not channels:
            raise SettingsError(f"{self.who({})}: give `webhook` or `email`, or both: where alerts are sent.")

        @dg.sensor(
            name="export_alerts",
            minimum_interval_seconds=SECONDS_BETWEEN,
            default_status=dg.DefaultSensorStatus.RUNNING,
            description="Sends an alert for each export that has failed for good, or is late.",
        )
        def export_alerts(context: dg.SensorEvaluationContext) -> dg.SkipReason:
            if context.cursor is None:
                memory = Memory(seen=watch.newest_failure(context.instance))
                context.update_cursor(memory.model_dump_json())
                return dg.SkipReason("Failures are told of from now on.")
            memory = self._look(context, Memory.model_validate_json(context.cursor), channels)
            sent, memory.unsent, problems = _send(memory.unsent, channels)
            if problems and not sent:
                # The cursor stays where it is, and the next tick finds the same.
                raise PassingError(" ".join(problems))
            # A tick that fails would forget what it has sent.
            context.update_cursor(memory.model_dump_json())
            return dg.SkipReason(" ".join([f"{sent} sent.", *problems]) if sent else "Nothing to tell.")

        return dg.Definitions(sensors=[export_alerts])

    def _look(self, context: dg.SensorEvaluationContext, memory: Memory, channels: Iterable[str]) -> Memory:
        """What is to be remembered after a look at all exports, with the alerts that are to be sent now."""
        assert context.repository_def is not None
        now = _now()
        exports = watch.exports_of(context.repository_def)
        failed, seen = watch.failed_runs(context, exports, memory.seen, now)
        running = watch.running_schedules(context) if self.lag_minutes else {}
        found = Memory(seen=seen, unsent=memory.unsent)
        for export in exports:
            alert, trouble = self._judge(
                context.instance, export, memory.troubles.get(export.name), failed.get(export.name), running, now
            )
            if trouble is not None:
                found.troubles[export.name] = trouble
            if alert is not None:
                found.unsent.append(Unsent(alert=alert, channels=list(channels)))
        return found

    def _judge(
        self,
        instance: dg.DagsterInstance,
        export: watch.Export,
        trouble: Trouble | None,
        failed: watch.FailedRun | None,
        running: Mapping[str, float],
        now: datetime,
    ) -> tuple[Alert | None, Trouble | None]:
        """What to tell of an export now, and what to remember of it."""
        late = None
        if self.lag_minutes:
            late = watch.late_interval(instance, export, timedelta(minutes=self.lag_minutes), running, now)
        # Up to the failed run's beginning: what it has itself committed before it failed is no recovery.
        until = failed.began if failed else now.timestamp()
        if trouble and not late and watch.has_landed(instance, export, trouble.since, until):
            trouble = None
        untold = failed.run_id if failed else trouble.untold if trouble else None
        since = failed.ended if failed else trouble.since if trouble else now.timestamp()
        if trouble and now - watch.utc(trouble.told) < AGAIN:
            return None, Trouble(told=trouble.told, since=since, untold=untold)
        alert = watch.failure_alert(instance, export, untold, self.webserver_url) if untold else None
        if alert is None and late:
            alert, since = watch.lag_alert(export, late, now, self.webserver_url), now.timestamp()
        return alert, Trouble(told=now.timestamp(), since=since) if alert else trouble


def _send(unsent: list[Unsent], channels: Mapping[str, Channel]) -> tuple[int, list[Unsent], list[str]]:
    """How many alerts were sent (counted for each channel), those that are left, and what went wrong.

    A channel that fails is left alone until the next tick: its timeouts would add up. One that refuses an alert for the
    alert's own sake is sent the others.
    """
    sent, left, problems = 0, [], {}
    failing: set[str] = set()
    for item in unsent:
        remaining = []
        # A channel that was taken out of the settings is owed nothing.
        for name in (name for name in item.channels if name in channels):
            try:
                if name not in failing:
                    channels[name].send(item.alert)
                    sent += 1
                    continue
            except RefusedAlertError as error:
                problems[name] = str(error)
            except PassingError as error:
                problems[name] = str(error)
                failing.add(name)
            remaining.append(name)
        if remaining:
            left.append(Unsent(alert=item.alert, channels=remaining))
    return sent, left, list(problems.values())


def _is_address(value: str) -> bool:
    try:
        url = urlsplit(value)
        is_whole = url.scheme in ("https", "http") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False
    return is_whole and value.isascii() and value.isprintable() and " " not in value


def _now() -> datetime:
    return datetime.now(UTC)
