"""Alerts: a webhook call or an e-mail where an export fails for good, or is late.

Off unless a `defs.yaml` asks for `pg_exports.ExportAlerts`. `component` has its settings and the sensor, `watch` looks
for what is wrong in Dagster's storage, `channels` sends.
"""

from pg_exports.alerts.component import ExportAlerts

__all__ = ["ExportAlerts"]
