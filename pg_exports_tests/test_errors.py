"""The errors that a user sees: a message as it is, and whether another try may help."""

import dagster as dg
import pytest

from pg_exports.errors import LONGEST, DestinationError, ExportError, PassingError, SettingsError, SourceError


@pytest.mark.parametrize("kind", [SettingsError, SourceError, DestinationError])
def test_a_lasting_error_is_a_failure_that_is_not_retried(kind: type[ExportError]) -> None:
    error = kind("The table is gone. Create it.")
    assert isinstance(error, dg.Failure)
    assert not error.allow_retries
    assert str(error) == error.description == "The table is gone. Create it."


def test_a_passing_error_is_a_failure_that_may_be_retried() -> None:
    error = PassingError("The server restarts.")
    assert isinstance(error, dg.Failure)
    assert not isinstance(error, ExportError)
    assert error.allow_retries
    assert str(error) == error.description == "The server restarts."


@pytest.mark.parametrize("kind", [SourceError, PassingError])
def test_what_a_terminal_would_obey_is_written_out(kind: type[SourceError | PassingError]) -> None:
    error = kind("a\x1b[31m\r\u202eb\ud800\n\tÄ 🦔 \x00\x9b")
    assert str(error) == error.description == "a\\x1b[31m\\r\\u202eb\\ud800\n\tÄ 🦔 \\x00\\x9b"


@pytest.mark.parametrize("kind", [SourceError, PassingError])
def test_of_a_text_of_any_length_both_ends_are_kept(kind: type[SourceError | PassingError]) -> None:
    text = str(kind(f"What it is. {'x' * 50_000_000} What to do."))
    assert text.startswith("What it is. xxx")
    assert text.endswith("xxx What to do.")
    assert f"({50_000_000 + 24 - LONGEST} characters are left out)" in text
    assert len(text) < LONGEST + 100


@pytest.mark.parametrize(("error", "tries"), [(SourceError("no"), 1), (PassingError("not now"), 3)])
def test_a_retry_policy_tries_again_only_what_may_pass(error: dg.Failure, tries: int) -> None:
    made = []

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=2))
    def refused() -> None:
        made.append(1)
        raise error

    result = dg.materialize([refused], raise_on_error=False)
    assert not result.success
    assert len(made) == tries
    [failure] = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert failure.user_failure_data is not None
    assert failure.user_failure_data.description == str(error)
