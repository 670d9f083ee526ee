"""Celery's settings for the workers: those of the launcher in DAGSTER_HOME/dagster.yaml, so that both have the same.

`celery --app dagster_celery.app` looks for a module of this name on PYTHONPATH. (`dagster-celery worker start -y` would write
one with the broker's password in it.)
"""

import os

from dagster._core.instance.ref import InstanceRef
from dagster_celery.launcher import CeleryRunLauncher

_launcher = InstanceRef.from_dir(os.environ["DAGSTER_HOME"]).run_launcher
if not isinstance(_launcher, CeleryRunLauncher):
    raise SystemExit(
        f"DAGSTER_HOME ({os.environ['DAGSTER_HOME']}) has no dagster.yaml with a CeleryRunLauncher: "
        "it should be that of deploy/celery."
    )
broker_url = _launcher.broker
result_backend = _launcher.backend
globals().update(_launcher.config_source)
