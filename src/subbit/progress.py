"""How long runs tell a person where they are: stages with a bar and an ETA, and lines that stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBar

__all__ = ["ConsoleProgress", "Progress", "Report", "SilentProgress"]

Report = Callable[[int, int], None]  # (done, total)

SILENT_SECONDS = 30.0  # at most, of a stage that goes on in a file


class Progress(Protocol):
    """What the pipeline calls."""

    def line(self, text: str) -> None:
        """Say something that stays on the screen."""

    def stage(self, name: str) -> AbstractContextManager[Report]:
        """A context manager that yields ``report(done, total)``."""


class SilentProgress:
    """Says nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """Nothing."""
        yield lambda done, total: None


class ConsoleProgress:
    """Lines and bars on standard error, so that standard output stays clean for results.

    Where that is no terminal, a stage says a line instead of its bar when nothing has been said for a while.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._said = time.monotonic()
        self._bar = RichBar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,  # in a file it would be blank lines
        )

    def line(self, text: str) -> None:
        """One line, above the bar if there is one."""
        self._said = time.monotonic()
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        """A bar; stages nest."""
        if not self._bar.tasks:
            self._bar.start()
        task = self._bar.add_task(name, total=None)

        def report(done: int, total: int) -> None:
            self._bar.update(task, completed=done, total=total)
            if not self._console.is_terminal and time.monotonic() - self._said > SILENT_SECONDS:
                self.line(f"{name}: {done}/{total}")

        try:
            yield report
        finally:
            self._bar.remove_task(task)
            if not self._bar.tasks:
                self._bar.stop()
