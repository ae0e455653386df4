"""What tests of the command line share: what a command left behind, and what a mistake must look like."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Ran", "Run", "assert_one_line"]


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]
"""The fixture ``run``: ``run("inspect", directory, …)`` is the command line in this process."""


def assert_one_line(ran: Ran, complaint: str = "") -> None:
    """Exit code 2, one line on stderr that says what is wrong, nothing on stdout."""
    assert ran.code == 2, ran
    assert re.fullmatch(r"error: .*\n", ran.err), ran
    assert complaint in ran.err, ran
    assert ran.out == "", ran
