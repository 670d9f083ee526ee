"""Resources that take no configuration at launch.

Dagster lets whoever may launch a run configure its resources, and resolves `{env: NAME}` there, in the run's environment: a
launch with a host of one's own and `password: {env: POSTGRES_PASSWORD}` would send the password to that host. So what a
connection is has been said in code or YAML; a launch that says otherwise is refused.
"""

import functools
import json
import os
from collections.abc import Mapping
from typing import Any

import dagster as dg

from pg_exports.errors import SettingsError


class FixedAtLaunch:
    """A base beside Dagster's own for resources and IO managers: a launch that configures one is refused.

    In a launch's errors Dagster says `Received unexpected config entry`.
    """

    def get_resource_definition(self) -> Any:
        """What Dagster makes a run's resource from."""
        return self._fixed

    @functools.cached_property
    def _fixed(self) -> dg.ResourceDefinition:
        # One for each resource: Dagster compares definitions by identity.
        return fixed_at_launch(super().get_resource_definition())  # type: ignore[misc]  # of Dagster's own base

    @classmethod
    def configure_at_launch(cls, **_: Any) -> Any:
        """Dagster's way to leave settings open until a launch; it is not offered.

        Raises:
            SettingsError: always.
        """
        raise SettingsError(
            f"A {cls.__name__} takes no configuration at launch: whoever may launch a run could have its password sent to "
            "any host. Give its settings in code, passwords as dg.EnvVar."
        )


def fixed_at_launch(definition: dg.ResourceDefinition) -> dg.ResourceDefinition:
    """The same resource with the settings that it has, and no way to give others at launch."""
    schema = definition.config_schema
    settings = json.loads(schema.default_value_as_json_str) if schema.default_provided else {}

    def as_defined(_: Mapping[str, Any]) -> Mapping[str, Any]:
        # Dagster says nothing that a person can read where a variable is missing for a resource within another one.
        needed = {value["env"] for value in settings.values() if isinstance(value, dict) and [*value] == ["env"]}
        if missing := sorted(needed - os.environ.keys()):
            raise SettingsError(
                f"The environment variable {', '.join(missing)} is not set. Set it where Dagster runs, or in the .env file of "
                "the project."
            )
        return settings

    return definition.configured(as_defined, config_schema={})
