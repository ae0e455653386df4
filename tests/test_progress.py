"""What a long run says where there is no terminal for a bar."""

from __future__ import annotations

import pytest

from subbit import progress
from subbit.progress import SILENT_SECONDS, ConsoleProgress


class Clock:
    """Stands for the module ``time``."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_a_silent_stage_says_where_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a file a line now and then, and none where the stage says lines of its own or is short."""
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    console = ConsoleProgress()
    with console.stage("plan") as report:
        for done in range(1, 6):
            clock.now += 0.4 * SILENT_SECONDS
            report(done, 5)
    assert capsys.readouterr().err.split("\n") == ["plan: 3/5", ""]
    clock.now += 9 * SILENT_SECONDS
    with console.stage("layers") as report, console.stage("tuning") as inner:
        console.line("layer 1/2: said")
        clock.now += 0.9 * SILENT_SECONDS
        inner(1, 2)
        report(1, 2)
    assert capsys.readouterr().err.split("\n") == ["layer 1/2: said", ""]
