"""What this package's components share: their attributes are read from YAML without showing a value that may be a secret."""

import functools
import json
import os
import re
from collections.abc import Mapping
from typing import Any, Self, cast

import dagster as dg
from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, create_model, model_validator

from pg_exports.errors import SettingsError

_VARIABLE = re.compile(r"\{\{\s*env\.(\w+)\s*\}\}")


def as_written(context: dg.ResolutionContext, value: Any) -> Any:
    """A YAML value with its templates filled in; reading it is the field's own business.

    What is no template stays the text that it is: Dagster would make a number of "1e5", and a list of "[1]".
    """
    if isinstance(value, Mapping):
        return {name: as_written(context, each) for name, each in value.items()}
    if isinstance(value, list):
        return [as_written(context, each) for each in value]
    is_template = isinstance(value, str) and ("{{" in value or "{%" in value)
    return context.resolve_value(value) if is_template else value


class SettingsComponent(dg.Component, dg.Model, dg.Resolvable):
    """A component whose errors name it, the attribute and the remedy, and show no value."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, hide_input_in_errors=True)

    @classmethod
    def who(cls, written: Mapping[str, Any]) -> str:
        """The component with these attributes, for messages."""
        raise NotImplementedError

    @classmethod
    def resolve_from_model(cls, context: dg.ResolutionContext, model: BaseModel) -> Self:
        """The component that a YAML file describes.

        Raises:
            SettingsError: an attribute is missing or wrong, or an environment variable is not set; with the component's
                name. No value is shown, as it may be a secret.
        """
        written = model.model_dump(by_alias=True, exclude_unset=True)
        who = cls.who(written)
        missing = sorted(set(_VARIABLE.findall(json.dumps(written, default=str))) - set(os.environ))
        if missing:
            raise SettingsError(
                f"{who}: the environment variable {', '.join(missing)} is not set. Set it where Dagster runs (or in the "
                ".env file of the project), or write the value into the YAML."
            )
        try:
            return cast("Self", super().resolve_from_model(context, model))
        except ValidationError as error:
            raise SettingsError(f"{who}: {sentence(error)}") from None
        except SettingsError as error:
            raise SettingsError(f"{who}: {error}") from None

    @classmethod
    @functools.cache
    def get_model_cls(cls) -> type[BaseModel]:
        """The attributes as a YAML file has them."""

        class RefusingWithoutValues(BaseModel):
            # Dagster prints what it refuses, and a password may be among it.
            @model_validator(mode="wrap")
            @classmethod
            def _refuse(own, written: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:  # noqa: N804
                try:
                    return handler(written)
                except ValidationError as error:
                    who = cls.who(written if isinstance(written, Mapping) else {})
                    # No ValueError: pydantic would put the values beside it.
                    raise SettingsError(f"{who}: {sentence(error)}") from None

        return create_model(f"{cls.__name__}Model", __base__=(RefusingWithoutValues, cls.model()))


def read_part(kind: type[BaseModel], value: Any, where: str = "") -> Any:
    """A mapping as one of these, for a field's validator; anything else is left to the field's own type.

    Raises:
        ValueError: what is wrong with it, behind `where`. As text: a nested pydantic error would print the values beside the
            field at fault, and a password may be one.
    """
    if not isinstance(value, Mapping):
        return value
    try:
        return kind(**value)
    except ValidationError as error:
        raise ValueError(f"{where}{sentence(error)}") from None


def sentence(error: ValidationError) -> str:
    """A pydantic error in one line, without the values, which may be secrets. Of an attribute's problems the first."""
    problems: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        # What follows an attribute's name may be a type of pydantic's own, one for each that was tried.
        attribute = f"`{problem['loc'][0]}`: " if problem["loc"] else ""
        problems.setdefault(attribute, _said(problem["msg"]))
    return "; ".join(f"{attribute}{message}" for attribute, message in problems.items())


def _said(message: str) -> str:
    """A message without what pydantic puts before a validator's own words, and in a user's words."""
    return message.removeprefix("Value error, ").replace("Extra inputs are not permitted", "there is no such attribute")
