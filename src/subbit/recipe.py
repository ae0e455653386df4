"""Recipe: everything that a compression depends on, validated, saved beside the weights, readable as YAML."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from subbit.binary.allocate import AllocationKind, Spread
from subbit.binary.nm import Sparsity
from subbit.errors import UserError
from subbit.methods import METHODS
from subbit.tuning.precision import Precision

__all__ = ["Allocation", "Calibration", "Override", "Recipe"]


# What pydantic says in words of Python.
PLAIN = {
    "extra_forbidden": "there is no such field",
    **dict.fromkeys(("model_type", "dict_type", "dataclass_type"), "must be a mapping of fields"),
}
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class Section(BaseModel):
    """A part of the recipe: unknown fields are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Calibration(Section):
    """The text whose activations say which weights matter."""

    # wikitext2, ptb, c4, a .txt or .jsonl file, or self: text that the model itself samples; or some, commas between
    source: str = "self"
    samples: int = Field(default=32, ge=1, le=1_000_000)  # windows
    seq_len: int = Field(default=512, ge=2)  # tokens of a window
    seed: int = Field(default=0, ge=0, lt=2**32)
    clip_norm: float = Field(
        default=0.0, ge=0
    )  # tokens longer than this multiple of the median count as that long; 0: off
    precision: Precision = (
        "auto"  # of matrix products when the text runs through the layers; auto: bfloat16 where the hardware has it
    )
    min_expert_tokens: float = Field(
        default=1.0, ge=0
    )  # an expert with fewer tokens than this multiple of in_features gets statistics of all experts besides; 0: off


class Allocation(Section):
    """How N is spread over the layers; the mean stays that of the sparsity."""

    kind: AllocationKind = "uniform"
    n_low: float | None = None  # N of the least important layer; None: N − 1
    n_high: float | None = None  # N of the most important layer; None: N + 1
    spread: Spread = "value"  # N between the two in proportion to the importance (the papers), or to its place in order
    samples: int = Field(default=8, ge=1)  # calibration windows that the importance is measured on (outliers, cosine)


class Reconstruction(Section):
    """Tuning every decoder layer against the dense one, as soon as its linears are compressed."""

    steps: int = Field(default=0, ge=0)  # of the optimizer, for every decoder layer; 0: off
    batch: int = Field(default=4, ge=1)  # calibration windows a step
    latent_rate: float = Field(default=1e-2, ge=0)  # learning rates; latents: signs and positions, codes only
    scale_rate: float = Field(default=2e-3, ge=0)
    norm_rate: float = Field(default=1e-3, ge=0)
    token_exponent: float = Field(
        default=1.0, ge=0, le=2
    )  # what a token's error counts, (its size / the median)^this: 0 all tokens alike, 2 mean square
    first_token: float = Field(default=0.1, ge=0, lt=1)  # share of a window that its first token has at least
    precision: Precision = "auto"  # of matrix products, as above


class Distillation(Section):
    """Tuning the whole model at the end, by KL divergence to the dense one's next-token distribution."""

    steps: int = Field(default=0, ge=0)  # of the optimizer; 0: off
    batch: int = Field(default=4, ge=1)  # windows a step
    samples: int = Field(default=0, ge=0)  # windows of its own, from the calibration's source; 0: the calibration's
    seq_len: int = Field(default=0, ge=0)  # tokens in each of its own windows; 0: as many as in the calibration's
    latent_rate: float = Field(default=0.0, ge=0)  # codes; too high a rate destroys the model (docs/log.md)
    scale_rate: float = Field(default=1e-3, ge=0)
    norm_rate: float = Field(default=1e-3, ge=0)
    held_out: int = Field(default=2, ge=0)  # windows that are only measured
    precision: Precision = "auto"  # as above
    checkpoint_activations: bool = False  # half the speed, and activations of one decoder layer in memory


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
        UserError: from ``create`` and ``from_yaml``; pydantic's ValidationError from the constructor.
    """

    method: str = "pbs2p"  # one of METHODS
    bits: float | None = Field(default=None, gt=0)  # codes: stored bits a linear weight, instead of a sparsity
    sparsity: str = "4:8"  # N of every M consecutive weights are kept, or none: all are; the default is the method's
    options: Any = None  # of the method: StbllmOptions, Pbs2pOptions, …, or a mapping of some of their fields
    allocation: Allocation = Allocation()
    calibration: Calibration = Calibration()
    reconstruction: Reconstruction = Reconstruction()
    distillation: Distillation = Distillation()
    embeddings: Literal["keep", "8bit", "4bit"] = "keep"  # how the input embedding and the head are stored
    overrides: dict[str, Override] = {}  # linear name, or re:PATTERN, → what it gets; the first match counts

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: dict[str, Any]) -> dict[str, Any]:
        method = METHODS.get(str(values.get("method", "pbs2p")))
        if method is None:
            return values
        allocation = values.get("allocation", {})
        if values.get("method") == "codes" and None not in (values.get("bits"), values.get("sparsity")):
            # a saved recipe spells all out: the budget's kind of allocation, and the sparsity that nobody gave
            saved = isinstance(allocation, dict) and allocation.get("kind") == "budget"
            if not saved or values["sparsity"] != method.default_sparsity:
                raise ValueError("bits and a sparsity exclude each other; give one of them")
        values = {"sparsity": method.default_sparsity, **values}
        if isinstance(allocation, dict):
            kind = method.allocation if values.get("bits") is None else "budget"
            values["allocation"] = {"kind": kind, **allocation}
        return values

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise ValueError(f"there is no method {value!r}; choose {', '.join(METHODS)}")
        return value

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
        try:
            object.__setattr__(self, "options", TypeAdapter(kind).validate_python(given))
        except ValidationError as error:
            raise ValueError(first_problem(error, "options")) from None
        self.options.check(Sparsity.parse(self.sparsity))
        if (self.bits is None) != (self.allocation.kind != "budget"):
            raise ValueError("bits and allocation.kind: budget go together")
        if self.bits is not None and self.method != "codes":
            raise ValueError(f"bits, a budget, is for method codes, not {self.method}; give a sparsity")
        tunes = self.reconstruction.steps or self.distillation.steps
        if tunes and not METHODS[self.method].tunable:
            raise ValueError(f"what {self.method} writes cannot be tuned; leave reconstruction and distillation out")
        for name in ("reconstruction", "distillation"):
            section = getattr(self, name)
            rates = (section.latent_rate if self.method == "codes" else 0, section.scale_rate, section.norm_rate)
            if section.steps and not any(rates):
                raise ValueError(f"{name}: with all learning rates at 0 there is nothing to tune; say steps: 0")
        if self.distillation.seq_len and not self.distillation.samples:
            raise ValueError("distillation.seq_len is of windows of its own: give distillation.samples as well")
        for override in self.overrides.values():
            if override.sparsity is not None:
                self.options.check(Sparsity.parse(override.sparsity))
        return self

    @property
    def distillation_seq_len(self) -> int:
        """Tokens in each window of distillation."""
        return self.distillation.seq_len or self.calibration.seq_len

    @property
    def distillation_seed(self) -> int:
        """Seed of the windows of distillation, which are not those of the layers."""
        return self.calibration.seed + 1

    def held_out_of(self, windows: int) -> int:
        """How many of the windows of distillation are only measured: the last ones, and never all."""
        return min(self.distillation.held_out, windows - 1)

    @property
    def distills_latents(self) -> bool:
        """Whether distillation moves signs and positions, not scales and norms alone."""
        return self.method == "codes" and self.distillation.steps > 0 and self.distillation.latent_rate > 0

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
        """YAML that ``from_yaml`` reads back to an equal recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @classmethod
    def create(cls, values: dict[str, Any]) -> Recipe:
        """Validate a mapping; UserError with the first problem in one line."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"recipe: {first_problem(error)}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe file; UserError when it cannot be read."""
        return cls.create(read_yaml(path))


def first_problem(error: ValidationError, *section: str) -> str:
    """The first thing that pydantic found, in one line: which field, after its ``section``, and what is wrong."""
    problem = error.errors()[0]
    where = ".".join([*section, *map(str, problem["loc"])])
    message = PLAIN.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    return f"{where}: {message}" if where else message


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
    try:
        return yaml.load(text, RecipeLoader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


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
