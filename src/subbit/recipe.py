"""Recipe: everything that a compression depends on, validated, saved beside the weights, readable as YAML."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from subbit.binary.allocate import AllocationKind
from subbit.binary.nm import Sparsity
from subbit.errors import UserError
from subbit.methods import METHODS

__all__ = ["Allocation", "Calibration", "Override", "Recipe"]


NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class Section(BaseModel):
    """A part of the recipe: unknown fields are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Calibration(Section):
    """The text whose activations say which weights matter."""

    source: str = "self"  # wikitext2, ptb, c4, a .txt or .jsonl file, or self: text that the model itself samples
    samples: int = Field(default=32, ge=1)  # windows
    seq_len: int = Field(default=512, ge=2)  # tokens of a window
    seed: int = 0
    clip_norm: float = Field(
        default=2.0, ge=0
    )  # tokens longer than this multiple of the median count as that long; 0: off


class Allocation(Section):
    """How N is spread over the layers; the mean stays that of the sparsity."""

    kind: AllocationKind = "uniform"
    n_low: float | None = None  # N of the least important layer; None: N − 1
    n_high: float | None = None  # N of the most important layer; None: N + 1
    samples: int = Field(default=8, ge=1)  # calibration windows that the importance is measured on (outliers, cosine)


class Override(Section):
    """What one or more linears get instead: another N:M, or ``dense: true`` to leave them as they are."""

    sparsity: str | None = None
    dense: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> Override:
        if self.dense == (self.sparsity is not None):
            raise ValueError("give either a sparsity or dense: true")
        if self.sparsity is not None:
            Sparsity.parse(self.sparsity)
        return self


class Recipe(Section):
    """What to do to a model. ``Recipe(method="pbs2p", sparsity="4:8")`` is complete; the rest has defaults.

    Raises:
        UserError: from :meth:`create`, :meth:`from_yaml`; pydantic's ValidationError from the constructor.
    """

    method: Literal["stbllm", "pbs2p"] = "pbs2p"
    sparsity: str = "4:8"  # N of every M consecutive weights are kept
    options: Any = None  # of the method: StbllmOptions or Pbs2pOptions, or a mapping of some of their fields
    allocation: Allocation = Allocation()
    calibration: Calibration = Calibration()
    overrides: dict[str, Override] = {}  # linear name, or re:PATTERN, → what it gets; the first match counts

    @model_validator(mode="before")
    @classmethod
    def _allocation_of_the_method(cls, values: dict[str, Any]) -> dict[str, Any]:
        method = METHODS.get(str(values.get("method", "pbs2p")))
        allocation = values.get("allocation", {})
        if method and isinstance(allocation, dict):
            values = {**values, "allocation": {"kind": method.allocation, **allocation}}
        return values

    @field_validator("sparsity")
    @classmethod
    def _parse_sparsity(cls, value: str) -> str:
        return str(Sparsity.parse(value))

    @field_validator("overrides")
    @classmethod
    def _compile_patterns(cls, value: dict[str, Override]) -> dict[str, Override]:
        for pattern in value:
            try:
                cls.matches(pattern, "")
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _read_options(self) -> Recipe:
        kind = METHODS[self.method].options
        given = self.options if self.options is not None else {}
        if isinstance(given, dict):
            unknown = sorted(set(given) - {field.name for field in dataclasses.fields(kind)})
            if unknown:
                known = ", ".join(field.name for field in dataclasses.fields(kind))
                raise ValueError(f"method {self.method} has no option {unknown[0]!r}; it has {known}")
        object.__setattr__(self, "options", TypeAdapter(kind).validate_python(given))
        check_options(self.options, Sparsity.parse(self.sparsity))
        for override in self.overrides.values():
            if override.sparsity is not None:
                check_options(self.options, Sparsity.parse(override.sparsity))
        return self

    def sparsity_of(self, name: str) -> Sparsity | Literal["dense"] | None:
        """What an override says about a linear, or None."""
        for pattern, override in self.overrides.items():
            if self.matches(pattern, name):
                return "dense" if override.dense else Sparsity.parse(override.sparsity or "")
        return None

    @staticmethod
    def matches(pattern: str, name: str) -> bool:
        """Whether the key of an override, a linear's name or ``re:PATTERN``, means the linear ``name``."""
        return bool(re.search(pattern[3:], name)) if pattern.startswith("re:") else pattern == name

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, every field spelled out."""
        return {**self.model_dump(exclude={"options"}), "options": dataclasses.asdict(self.options)}

    def to_yaml(self) -> str:
        """YAML that :meth:`from_yaml` reads back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def create(cls, values: dict[str, Any]) -> Recipe:
        """Validate a mapping; UserError with the first problem in one line."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"]) or "recipe"
            message = problem["msg"].removeprefix("Value error, ")
            raise UserError(f"recipe: {where}: {message}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file; UserError when it cannot be read."""
        return cls.create(read_yaml(path))


class RecipeLoader(yaml.SafeLoader):
    """YAML as people write it: 4:8 is a sparsity, not the number 248 in base 60 that YAML 1.1 takes it for."""


RecipeLoader.yaml_implicit_resolvers = {
    first: [
        (tag, re.compile("(?!.*:)" + regexp.pattern, re.VERBOSE) if tag in NUMBER_TAGS else regexp)
        for tag, regexp in pairs
    ]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """What a recipe file or a ``--set`` value says; raises yaml.YAMLError."""
    return yaml.load(text, RecipeLoader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file; UserError when it is none."""
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"the recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"the recipe {path} must be a mapping of fields, for example 'method: pbs2p'")
    return values


def check_options(options: Any, sparsity: Sparsity) -> None:
    """Limits that the types of the options cannot say; ValueError."""
    if options.block_size < sparsity.m or options.block_size % sparsity.m:
        raise ValueError(f"block_size {options.block_size} must be a multiple of M = {sparsity.m}")
    if not 0 < options.damping < math.inf:
        raise ValueError(f"damping {options.damping} must be positive and finite")
    if options.candidates < 1 or options.salient_columns < 0:
        raise ValueError("candidates must be at least 1 and salient_columns at least 0")
