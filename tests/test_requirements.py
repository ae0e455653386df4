"""What pyproject.toml asks for is enough for what the code uses."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def least(requirement: Requirement) -> Version:
    """The version after >=."""
    return max(Version(part.version) for part in requirement.specifier if part.operator == ">=")


def test_the_least_torch_is_one_that_transformers_takes() -> None:
    """transformers switches torch off where it is older; ``nn.Module.set_submodule`` came in 2.5."""
    lines = re.findall(r'"(torch>=[^"]*)"', PYPROJECT.read_text())
    wanted = [Requirement(text) for text in requires("transformers") or []]
    there = [least(one) for one in wanted if one.name == "torch" and one.specifier]
    assert len(lines) == 1
    assert least(Requirement(lines[0])) >= max([Version("2.5"), *there])
