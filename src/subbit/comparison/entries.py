"""What a sweep runs: recipes with names, how they are evaluated, and keys that tell what is done already."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from subbit.calibration.text import DATASETS, SPLITS, is_text_file, split_sources
from subbit.checkpoint.files import sha256
from subbit.effort import merge, with_effort
from subbit.errors import UserError
from subbit.methods import METHODS
from subbit.recipe import Recipe, read_yaml

__all__ = [
    "DENSE",
    "Entry",
    "Protocol",
    "dataset_key",
    "dataset_name",
    "entry_key",
    "grid",
    "read_entries",
    "recipe_key",
    "with_seeds",
    "without_later",
]

DENSE = "dense"
DTYPES = ("float32", "bfloat16", "float16")
ENTRY_FIELDS = ("name", "series", "label", "group", "baseline", "effort")


@dataclass(frozen=True)
class Entry:
    """One thing to compress and to evaluate. Its names are for people: they are no part of its key."""

    recipe: Recipe | None  # None: the dense model
    series: str  # entries of one series are one line of a figure
    label: str = ""  # which point of it this is: "4:8", "0.8 bits"
    group: str = "sweep"  # heading of its table
    baseline: str | None = None  # an ablation: the name of the entry that this one changes in one place

    @property
    def name(self) -> str:
        """Of its row in a table."""
        return f"{self.series} {self.label}".strip()

    @property
    def title(self) -> str:
        """In a list: with the group, and the seed where it is not the usual one."""
        seed = self.recipe.calibration.seed if self.recipe else 0
        return f"{self.group}: {self.name}" + (f", seed {seed}" if seed else "")


@dataclass(frozen=True)
class Protocol:
    """How the perplexities are measured."""

    datasets: tuple[str, ...] = ("wikitext2",)  # wikitext2, ptb, c4, or a .txt or .jsonl file
    split: str = "test"
    seq_len: int = 2048  # tokens of a window; windows do not overlap
    max_windows: int | None = None  # from the start of the text
    dtype: str = "float32"

    def check(self) -> None:
        """UserError for what could only fail after hours of compressing."""
        if not self.datasets:
            raise UserError("give at least one data set or text file to evaluate on")
        for dataset in self.datasets:
            if dataset not in DATASETS and not (is_text_file(dataset) and Path(dataset).is_file()):
                known = ", ".join(DATASETS)
                raise UserError(f"unknown data set {dataset!r}: choose {known}, or a .txt or .jsonl file that exists")
        names = [dataset_name(dataset) for dataset in self.datasets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise UserError(f"two of the data sets are called {twice}; results go by that name, so rename a file")
        if self.split not in SPLITS:
            raise UserError(f"unknown split {self.split!r}: choose one of {', '.join(SPLITS)}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.seq_len < 2 or (self.max_windows is not None and self.max_windows < 1):
            raise UserError("an evaluation needs windows of at least 2 tokens, and at least 1 window")

    def to_dict(self) -> dict[str, Any]:
        """For the results: data sets by name, without the folders of files."""
        return {**dataclasses.asdict(self), "datasets": [dataset_name(dataset) for dataset in self.datasets]}


# ---- keys ------------------------------------------------------------------------------------------------------------


def entry_key(recipe: Recipe | None, model: str, protocol: Protocol) -> str:
    """Of a finished entry: another recipe, model, text or way of measuring is another entry."""
    measured = [dataset_key(dataset, protocol) for dataset in sorted(protocol.datasets)]
    return short_hash({"recipe": recipe_key(recipe, model), "measured": measured})


# Fields that recipes once did not have, and what all were made with then.
LATER = (("allocation", "spread", "value"), ("options", "residual_order", 2))


def without_later(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a recipe, but for fields of :data:`LATER` that are as before: what it would have had then."""
    values = dict(recipe)
    for section, field, before in LATER:
        if values[section].get(field) == before:
            values[section] = {name: value for name, value in values[section].items() if name != field}
    return values


def recipe_key(recipe: Recipe | None, model: str) -> str:
    """Of a checkpoint: the recipe, with the contents of a calibration file, and the digest of the model.

    A stage that is off is left out: its other fields change nothing, nor does a field that it gets later. Nor does one
    of :data:`LATER` that is as before.
    """
    values = recipe.to_dict() if recipe else None
    if values:
        values = without_later(values)
        for stage in ("reconstruction", "distillation"):
            if not values[stage]["steps"]:
                del values[stage]
        values["calibration"] = {**values["calibration"], "source": fingerprint(values["calibration"]["source"])}
    return short_hash({"recipe": values, "model": model})


def dataset_key(dataset: str, protocol: Protocol) -> str:
    """Of one measurement on a checkpoint."""
    return short_hash({**dataclasses.asdict(protocol), "datasets": fingerprint(dataset)})


def short_hash(value: Any) -> str:
    """16 hexadecimal digits of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(source: str) -> str:
    """A data set by its name, a file by its contents: a folder that moves changes nothing, an edited text does."""
    return ",".join(
        f"file {sha256(Path(part))}" if is_text_file(part) and Path(part).is_file() else part
        for part in split_sources(source)
    )


def dataset_name(dataset: str) -> str:
    """What a data set is called in results: a file by its name without the folder."""
    return Path(dataset).name if is_text_file(dataset) else dataset


# ---- lists of entries ------------------------------------------------------------------------------------------------


def grid(
    methods: Sequence[str],
    sparsities: Sequence[str] = (),
    bits: Sequence[float] = (),
    code_bits: Sequence[int] = (),
    common: Mapping[str, Any] | None = None,
    effort: str | None = None,
) -> list[Entry]:
    """Methods × what each of them can vary.

    Args:
        methods: of METHODS, or dense.
        sparsities: N:M of the methods that prune; none given: the default of each method.
        bits: budgets of ``codes``, instead of the sparsities.
        code_bits: of rtn and gptq, which do not prune.
        common: recipe values that all get, nested.
        effort: of ``codes``.
    """
    entries = []
    for method in methods:
        if method == DENSE:
            entries.append(Entry(None, DENSE))
            continue
        for values in variations(method, sparsities, bits, code_bits):
            values = merge({"method": method, **(common or {})}, values)
            entries.append(make_entry(with_effort(effort, values) if effort and method == "codes" else values))
    return unique(entries)


def variations(
    method: str, sparsities: Sequence[str], bits: Sequence[float], code_bits: Sequence[int]
) -> list[dict[str, Any]]:
    """Recipe values, one set for every point of a method's line."""
    if method == "codes" and bits:
        return [{"bits": value} for value in bits]
    known = METHODS.get(method)
    if known and any(field.name == "bits" for field in dataclasses.fields(known.options)):
        return [{"options": {"bits": value}} for value in code_bits] or [{}]
    return [{"sparsity": value} for value in sparsities] or [{}]


def make_entry(values: Mapping[str, Any], **names: Any) -> Entry:
    """An entry from recipe values; UserError when they make no recipe."""
    recipe = Recipe.create(dict(values))
    return Entry(recipe, names.pop("series", recipe.method), names.pop("label", describe(recipe)), **names)


def describe(recipe: Recipe) -> str:
    """What tells a recipe from others of its method in a word: its budget, the bits of a code, or N:M."""
    if recipe.bits is not None:
        return f"{recipe.bits:g} bits"
    code_bits = getattr(recipe.options, "bits", None)
    if code_bits is not None:
        return f"{code_bits} bit" + ("" if code_bits == 1 else "s")
    return "unpruned" if recipe.sparsity == "1:1" else recipe.sparsity


def read_entries(path: str | Path, common: Mapping[str, Any] | None = None) -> list[Entry]:
    """The entries of a YAML file: a list ``entries`` of recipes, and ``defaults`` for all of them.

    Beside the fields of a recipe an entry may have name (or series and label), group, baseline and effort;
    ``method: dense`` is the dense model.

    Args:
        common: recipe values that all get; those of the file go before them.
    """
    values = read_yaml(path)
    listed, defaults = values.pop("entries", None), values.pop("defaults", {})
    if values or not isinstance(listed, list) or not isinstance(defaults, dict) or not listed:
        raise UserError(f"{path} must have a list 'entries' of recipes, and may have 'defaults' for all of them")
    entries = []
    for number, item in enumerate(listed, start=1):
        if not isinstance(item, dict):
            raise UserError(f"{path}, entry {number}: give the fields of a recipe, for example {{method: pbs2p}}")
        try:
            entries.append(read_entry(merge(merge(common or {}, defaults), item)))
        except UserError as error:
            raise UserError(f"{path}, entry {number}: {error}") from None
    return unique(entries)


def read_entry(values: dict[str, Any]) -> Entry:
    """One item of a list of entries."""
    names = {field: str(values.pop(field)) for field in ENTRY_FIELDS if field in values}
    effort = names.pop("effort", None)
    if "name" in names:
        names.setdefault("series", names.pop("name"))
        names.setdefault("label", "")
    if values.get("method") == DENSE:
        return Entry(None, **{"series": DENSE, **names})
    return make_entry(with_effort(effort, values) if effort else values, **names)


def with_seeds(entries: Sequence[Entry], seeds: Sequence[int]) -> list[Entry]:
    """Every entry with every seed of the calibration windows; the dense model once. UserError if there are none."""
    if not entries or not seeds:
        raise UserError("give at least one method and one seed")
    seeded = []
    for entry in entries:
        if entry.recipe is None:
            seeded.append(entry)
            continue
        for seed in seeds:
            calibration = {**entry.recipe.to_dict()["calibration"], "seed": seed}
            seeded.append(replace(entry, recipe=Recipe.create({**entry.recipe.to_dict(), "calibration": calibration})))
    return seeded


def unique(entries: Sequence[Entry]) -> list[Entry]:
    """Without those that an earlier entry equals."""
    return list({(short_hash(e.recipe.to_dict() if e.recipe else None), e.name, e.group): e for e in entries}.values())
