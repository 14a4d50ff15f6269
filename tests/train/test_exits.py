"""How a command ends: lines and exit 2 for what a person can mend, a traceback for a bug."""

import pytest

from shards.errors import UserError
from train.settings.exits import command


@command
def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (UserError.of(["a: wrong", "b: wrong"]), ["error: a: wrong", "error: b: wrong"]),
        (FileNotFoundError(2, "No such file", "x"), ["error: [Errno 2] No such file: 'x'"]),
    ],
)
def test_what_a_person_can_mend_is_lines_and_exit_2(
    error: Exception, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        fail(error)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("error", [ValueError("bug"), AssertionError("bug"), KeyError("bug")])
def test_a_bug_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)):
        fail(error)
    assert not capsys.readouterr().err


def test_what_a_command_returns_is_handed_on() -> None:
    assert command(lambda a, b=1: a + b)(1, b=2) == 3
