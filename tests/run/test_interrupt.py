"""The first signal asks and interrupts, the second ends; what comes out is an exit code, and nothing is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from orchestrator.run import interrupt as module
from orchestrator.run.interrupt import AT_ONCE, TOLD, Interrupt, Interrupted

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_makes_the_stop_file_and_interrupts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    stop, before = tmp_path / "stop", [signal.getsignal(one) for one in NUMBERS]
    with pytest.raises(SystemExit) as left, Interrupt() as interrupt:  # noqa: PT012
        interrupt.stop = stop
        try:
            signal.raise_signal(number)
        except Interrupted:
            assert interrupt.number == number and stop.exists()
            assert capfd.readouterr().err == f"{TOLD}\n"
            raise
    assert left.value.code == 128 + number
    assert capfd.readouterr().err == f"{AT_ONCE}\n"
    assert not stop.exists()
    assert [signal.getsignal(one) for one in NUMBERS] == before


def test_a_run_that_ends_by_itself_after_a_signal_has_its_own_code(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left, Interrupt() as interrupt:  # noqa: PT012
        interrupt.stop = tmp_path / "stop"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        raise SystemExit(7)
    assert left.value.code == 7
    assert list(tmp_path.iterdir()) == []


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.mark.parametrize(("first", "second"), [(2, 15), (15, 2), (15, 15)])
def test_the_second_signal_ends_the_process_with_the_code_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], first: int, second: int
) -> None:
    codes: list[int] = []

    def end(code: int) -> None:
        codes.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit), Interrupt() as interrupt:  # noqa: PT012
        interrupt.stop = tmp_path / "stop"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(first)
        capfd.readouterr()
        with pytest.raises(Ended):
            signal.raise_signal(second)
        assert capfd.readouterr().err == f"{AT_ONCE}\n"
        assert not interrupt.stop.exists()
        raise Ended
    assert codes == [128 + first]


def test_before_there_is_a_store_nobody_is_asked(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), Interrupt() as interrupt:  # noqa: PT012
        assert interrupt.stop is None
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == f"{AT_ONCE}\n"


def test_a_store_that_cannot_be_written_is_not_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), Interrupt() as interrupt:  # noqa: PT012
        interrupt.stop = tmp_path / "absent" / "stop"
        signal.raise_signal(signal.SIGINT)
    assert TOLD not in capfd.readouterr().err


def test_without_a_signal_an_error_is_an_error() -> None:
    with pytest.raises(KeyError), Interrupt():
        raise KeyError
    with Interrupt() as interrupt:
        pass
    assert interrupt.number == 0


def test_what_is_said_does_not_go_through_a_stream(capfd: pytest.CaptureFixture[str]) -> None:
    module._say("né")
    assert capfd.readouterr().err == "né\n"
