"""The model card: README.md of a checkpoint, with the metadata that the Hugging Face hub reads.

Written when a checkpoint is complete, and then a file of the user: later only the metadata of the evaluation and what
stands between two markers are replaced. Nothing in it depends on time or on where a model lies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load

from subbit.calibration.text import split_sources
from subbit.checkpoint.files import write_text
from subbit.checkpoint.reader import Checkpoint, open_checkpoint
from subbit.errors import UserError
from subbit.evaluation.record import Measurement, read_evaluations, record_evaluation
from subbit.reporting.facts import Facts, facts_of
from subbit.reporting.headline import by_kind, show
from subbit.reporting.markdown import cell
from subbit.reporting.page import allocation_note, distillation_line, environment, parameters, version

__all__ = ["CARD_FILE", "PLACEHOLDER", "SourceFacts", "keep_measurements", "new_card", "read_card", "source_facts"]

CARD_FILE = "README.md"
PLACEHOLDER = "directory-or-hub-id"  # in the lines that load the model; pushing puts the repository there
START, END = "<!-- subbit eval: start -->", "<!-- subbit eval: end -->"
MEASURED_BY = "subbit eval"  # tells our results in the metadata from those that a user added
HUB_DATASETS = {"wikitext2": "Salesforce/wikitext", "ptb": "ptb-text-only/ptb_text_only", "c4": "allenai/c4"}
HUB_CONFIGS = {"wikitext2": "wikitext-2-raw-v1", "c4": "en"}
CARRIED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class SourceFacts:
    """What is known of the model that was compressed, beside its weights."""

    base_model: str | None = None  # on the hub
    carried: Mapping[str, Any] | None = None  # metadata of its own card that hold for the compressed model as well


def source_facts(directory: Path) -> SourceFacts:
    """Of a model's directory: its name on the hub, if it was fetched from there, and the license in its own card."""
    try:
        found = metadata_load(directory / CARD_FILE) or {}
    except (OSError, ValueError, yaml.YAMLError):
        found = {}
    carried = {key: found[key] for key in CARRIED if isinstance(found.get(key), (str, list)) and found[key]}
    return SourceFacts(hub_id(directory), carried)


def hub_id(directory: Path) -> str | None:
    """``org/name`` of a directory in the hub's cache, ``…/models--org--name/snapshots/…``."""
    found = re.search(r"models--(.+)$", directory.resolve().parent.parent.name)
    inside = directory.resolve().parent.name == "snapshots"
    return found[1].replace("--", "/") if found and inside else None


# ---- writing ---------------------------------------------------------------------------------------------------------


def new_card(checkpoint: Checkpoint, source: SourceFacts, measurements: Sequence[Measurement] = ()) -> str:
    """The text of a card; equal checkpoints of equal sources give equal texts."""
    facts = facts_of(checkpoint, measurements)
    recipe = checkpoint.manifest.get("recipe", {})
    title = title_of(facts, source)
    template = environment(escape=False)
    template.filters["cell"] = cell
    text = template.get_template("card.md.j2").render(
        title=title,
        facts=facts,
        source=source,
        parameters=parameters(facts.parameters),
        placeholder=PLACEHOLDER,
        evaluation=evaluation_section(measurements),
        allocation_note=allocation_note(facts),
        windows=windows_of(recipe),
        tuning=tuning_line(facts, recipe),
        distillation=distillation_line(facts),
        version=version(),
    )
    card = ModelCard(f"---\n{metadata(facts, source, recipe).to_yaml()}\n---\n{text}")
    add_results(card, title, measurements)
    return str(card)


def title_of(facts: Facts, source: SourceFacts) -> str:
    """What the model is called; the directory has no part in it."""
    name = (source.base_model or f"{facts.model_type}, {parameters(facts.parameters)} parameters").rpartition("/")[2]
    return f"{name}, {facts.bits['stored']:.2f} bits per weight"


def metadata(facts: Facts, source: SourceFacts, recipe: Mapping[str, Any]) -> ModelCardData:
    """All but the evaluation."""
    sources = split_sources(recipe.get("calibration", {}).get("source", ""))
    datasets = [HUB_DATASETS[source] for source in sources if source in HUB_DATASETS]
    return ModelCardData(
        base_model=source.base_model,
        base_model_relation="quantized" if source.base_model else None,
        datasets=datasets or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["subbit", f"subbit-{facts.method}", "quantized", "sub-1-bit" if facts.bits["stored"] < 1 else "low-bit"],
        **(source.carried or {}),
    )


def windows_of(recipe: Mapping[str, Any]) -> str:
    """Size of the calibration text."""
    calibration = recipe.get("calibration")
    return f", {calibration['samples']} windows of {calibration['seq_len']} tokens" if calibration else ""


def tuning_line(facts: Facts, recipe: Mapping[str, Any]) -> str:
    """What tuning layer by layer did."""
    if not facts.tuning:
        return ""
    before = fmean(tuning.before for tuning in facts.tuning)
    after = fmean(tuning.after for tuning in facts.tuning)
    steps = recipe.get("reconstruction", {}).get("steps", "?")
    return f"Every decoder layer was tuned against the dense one, {steps} steps: mean error {before:.4f} → {after:.4f}."


# ---- the evaluation --------------------------------------------------------------------------------------------------


def evaluation_section(measurements: Sequence[Measurement]) -> str:
    """The part of the card between the markers, and these."""
    template = environment(escape=False)
    template.filters["cell"] = cell
    measured = [show(measurement) for measurement in by_kind(measurements)]
    return template.get_template("evaluation.md.j2").render(start=START, end=END, measured=measured).rstrip()


def add_results(card: ModelCard, title: str, measurements: Sequence[Measurement]) -> None:
    """Put measurements into the metadata; results that somebody else added stay."""
    data: Any = card.data  # ModelCardData, but declared as what all kinds of cards have
    others = [result for result in data.eval_results or [] if not is_ours(result)]
    results = [result for m in measurements for result in results_of(m)]
    metrics = [metric for metric in data.metrics or [] if metric not in METRICS.values()]
    metrics += [name for name in METRICS.values() if any(result.metric_type == name for result in results)]
    data.metrics = metrics or None
    data.eval_results = [*others, *results] or None
    data.model_name = (data.model_name or title) if data.eval_results else None


METRICS = {"perplexity": "perplexity", "divergence": "kl_divergence", "zero_shot": "accuracy"}


def is_ours(result: EvalResult) -> bool:
    """Whether an earlier ``subbit eval`` left this result."""
    return isinstance(result.metric_args, dict) and result.metric_args.get("measured_by") == MEASURED_BY


def results_of(measurement: Measurement) -> list[EvalResult]:
    """A measurement as the hub's model index wants it; none for speed, and for a value that is no number."""
    field = {"perplexity": "value", "divergence": "mean", "zero_shot": "accuracy"}.get(measurement.kind)
    value = measurement.values.get(field) if field else None
    if value is None:
        return []
    how = measurement.protocol
    dataset = str(how.get("dataset") or how.get("task"))
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=HUB_DATASETS.get(dataset, dataset),
            dataset_name=dataset,
            dataset_config=HUB_CONFIGS.get(dataset),
            dataset_split=how.get("split"),
            metric_type=METRICS[measurement.kind],
            metric_name=show(measurement).title,
            metric_value=value,
            metric_args={"measured_by": MEASURED_BY, **how},
        )
    ]


def read_card(path: Path) -> ModelCard:
    """A card that is there; UserError when its metadata cannot be read."""
    try:
        return ModelCard.load(path)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"the metadata of {path} cannot be read ({reason}); mend or delete the file") from None


def updated(card: ModelCard, title: str, measurements: Sequence[Measurement]) -> str:
    """The text of a card with other measurements; all that a user changed stays, also the absence of the markers."""
    add_results(card, title, measurements)
    before, start, rest = str(card).partition(START)
    _, end, after = rest.partition(END)
    return f"{before}{evaluation_section(measurements)}{after}" if start and end else str(card)


def keep_measurements(directory: Path, measurements: Sequence[Measurement]) -> Path:
    """Add measurements to ``evaluation.json`` and to the card of a checkpoint; a card that is missing is written.

    Returns:
        The path of evaluation.json.

    Raises:
        UserError: the directory cannot be written, or one of the files there is damaged.
    """
    recorded = record_evaluation(directory, measurements)
    checkpoint, known = open_checkpoint(directory), read_evaluations(directory)
    path = directory / CARD_FILE
    if path.exists():
        title = title_of(facts_of(checkpoint), SourceFacts())
        write_text(path, updated(read_card(path), title, known))
    else:
        write_text(path, new_card(checkpoint, SourceFacts(), known))
    return recorded
