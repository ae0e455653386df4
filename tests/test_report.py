"""Reports: what they say is what the files say, in one page that needs nothing else; and the record of evaluations.

Run with `pytest tests/test_report.py`. The test in a browser needs Chromium (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from checkpoints import stored_tensors
from commands import Run, assert_one_line

import subbit
from subbit import CheckpointError, Recipe, UserError
from subbit.evaluation.bench import Bench, Measured
from subbit.evaluation.divergence import Divergence
from subbit.evaluation.perplexity import Perplexity
from subbit.evaluation.record import VALUES, Measurement, measurements_of, read_evaluations, record_evaluation, speed_of
from subbit.evaluation.suite import Evaluation
from subbit.evaluation.zero_shot import ZeroShot
from subbit.reporting import svg
from subbit.reporting.charts import heat_map, input_peaks, short_names
from subbit.reporting.facts import Grid, read_facts
from subbit.reporting.headline import headline, show
from subbit.reporting.markdown import fenced
from subbit.reporting.svg import Axis, linear_ticks, log_ticks, pieces

Tiny = Callable[[str], Path]
RecipeFor = Callable[..., Recipe]


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, recipe_for: RecipeFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PBS²P, a linear left dense, the embedding packed. Tests must not change it."""
    out = tmp_path_factory.mktemp("report") / "tiny model"
    overrides = {"model.layers.1.self_attn.q_proj": {"dense": True}, "re:up_proj": {"sparsity": "6:8"}}
    subbit.compress(tiny("llama-gqa"), recipe_for(overrides=overrides, embeddings="8bit"), out)
    return out


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


TEXT_PROTOCOL: dict[str, Any] = {
    "dataset": "wikitext2",
    "split": "test",
    "origin": "wikitext2 test",
    "tokens": 40940,
    "windows": 20,
    "seq_len": 2048,
    "stride": 2048,
    "dtype": "float32",
    "backend": "native (AVX2)",
}
PERPLEXITY = Perplexity(**TEXT_PROTOCOL, value=23.456, standard_error=1.25, nll=3.155, seconds=100.0)
DIVERGENCE = Divergence(
    **TEXT_PROTOCOL,
    reference="SmolLM2",
    reference_digest="0123456789abcdef",
    mean=0.8125,
    standard_error=0.02,
    median=0.5,
    p99=4.0,
    maximum=9.0,
    top1=0.625,
    top1_standard_error=0.01,
    reference_perplexity=13.4,
)
FAILED = Measured("dense float32", "float32", 10**9, error="the process was killed by SIGKILL (out of memory?)")


def timed(name: str, dtype: str, decode: float) -> Measured:
    """What a bench says of one model."""
    return Measured(
        name=name,
        dtype=dtype,
        file_bytes=10**9,
        prompt_tokens_per_second=210.0,
        decode_tokens_per_second=decode,
        load_seconds=1.5,
        peak_bytes=10**9,
        resident_bytes=10**9,
        model_bytes=10**8,
        bytes_per_token=10**8,
    )


BENCH = Bench(
    directory="somewhere",
    dense="dense",
    prompt_tokens=128,
    new_tokens=32,
    rounds=3,
    models=(timed("dense bfloat16", "bfloat16", 18.75), FAILED, timed("packed codes 2:8", "float32", 21.37)),
    environment={"machine": {"processor": "a processor", "threads": 2, "device": "cpu"}},
    notes=(),
)


def accuracy(task: str, value: float) -> ZeroShot:
    """A result of a zero-shot task."""
    return ZeroShot(
        task=task,
        accuracy=value,
        standard_error=0.02,
        accuracy_norm=None,
        standard_error_norm=None,
        chance=0.25,
        constant=0.3,
        items=100,
        items_in_all=1000,
        origin=f"tasks/{task}.jsonl",
        note="",
        harness="lm-eval 0.4.13",
        batch_size=4,
        dtype="float32",
        backend="native (AVX2)",
        seconds=3.0,
    )


def everything() -> list[Measurement]:
    """One measurement of every kind."""
    tasks = {name: accuracy(name, value) for name, value in (("arc_easy", 0.5), ("hellaswag", 0.3))}
    evaluation = Evaluation({"wikitext2": PERPLEXITY}, {"wikitext2": DIVERGENCE}, tasks)
    return [*measurements_of(evaluation), *speed_of(BENCH)]


# ---- the record of evaluations ---------------------------------------------------------------------------------------


def test_what_was_measured_can_be_read_back(tmp_path: Path) -> None:
    """Kind, protocol and values, the newest last; nothing where there is no file."""
    assert read_evaluations(tmp_path) == []
    path = record_evaluation(tmp_path, everything())
    assert path.name == "evaluation.json"
    assert read_evaluations(tmp_path) == everything()
    assert not list(tmp_path.glob(".*"))
    first = json.loads(path.read_text())["measurements"][0]
    assert first["values"]["value"] == 23.456
    assert first["protocol"] == TEXT_PROTOCOL


def test_the_newest_of_one_protocol_wins(tmp_path: Path) -> None:
    """Another protocol is another measurement; values have no part in that."""
    record_evaluation(tmp_path, everything())
    again = Measurement.of("perplexity", dataclasses.replace(PERPLEXITY, value=20.0, seconds=1.0))
    shorter = Measurement.of("perplexity", dataclasses.replace(PERPLEXITY, windows=2, tokens=4094))
    record_evaluation(tmp_path, [again])
    record_evaluation(tmp_path, [shorter])
    found = read_evaluations(tmp_path)
    assert len(found) == len(everything()) + 1
    assert found[-2:] == [again, shorter]


def test_the_fields_that_count_as_values_are_fields() -> None:
    """So that a field that is renamed cannot become a part of the protocol unseen."""
    results = {"perplexity": Perplexity, "divergence": Divergence, "zero_shot": ZeroShot, "speed": Measured}
    assert results.keys() == VALUES.keys()
    for kind, result in results.items():
        assert set(VALUES[kind]) < {field.name for field in dataclasses.fields(result)}, kind


def test_a_bench_that_failed_leaves_nothing() -> None:
    """A dense model that did not run is left out; without the checkpoint's own speed there is none."""
    (speed,) = speed_of(BENCH)
    assert speed.values["dense_decode_tokens_per_second"] == {"bfloat16": 18.75}
    assert (speed.protocol["threads"], speed.protocol["prompt_tokens"]) == (2, 128)
    assert speed_of(dataclasses.replace(BENCH, models=(BENCH.models[0], FAILED))) == []


def test_no_path_of_the_machine_and_no_infinity_is_recorded(tmp_path: Path) -> None:
    """A text file goes by its name; JSON has no infinity."""
    result = dataclasses.replace(PERPLEXITY, dataset=str(tmp_path / "text.txt"), value=math.inf, standard_error=None)
    path = record_evaluation(tmp_path, [Measurement.of("perplexity", result)])
    assert str(tmp_path) not in path.read_text()
    (measured,) = read_evaluations(tmp_path)
    assert measured.values["value"] is None
    assert show(measured).value == "∞"


@pytest.mark.parametrize(
    "contents",
    [
        "",
        "[]",
        "{}",
        '{"subbit_evaluation": 1}',
        '{"subbit_evaluation": 1, "measurements": [{"kind": "speed"}]}',
        '{"subbit_evaluation": 1, "measurements": [{"kind": "perplexity", "protocol": {}, "values": {"value": "9"}}]}',
        '{"subbit_evaluation": 1, "measurements": [{"kind": "speed", "protocol": {"tokens": "9"}, "values": {}}]}',
    ],
)
def test_a_damaged_record_is_one_line(contents: str, tmp_path: Path) -> None:
    """It names the file and the way out, and recording does not write over it."""
    (tmp_path / "evaluation.json").write_text(contents)
    for act in (lambda: read_evaluations(tmp_path), lambda: record_evaluation(tmp_path, everything())):
        with pytest.raises(UserError, match=r"evaluation\.json is damaged; delete it"):
            act()
    assert (tmp_path / "evaluation.json").read_text() == contents


def test_a_newer_record_is_refused(tmp_path: Path) -> None:
    """With what to do."""
    newer = (
        '{"subbit_evaluation": 2, "measurements": [{"kind": "perplexity", "protocol": {}, "values": {"value": "9"}}]}'
    )
    (tmp_path / "evaluation.json").write_text(newer)
    with pytest.raises(UserError, match="pip install -U subbit"):
        read_evaluations(tmp_path)


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_the_facts_are_those_of_the_files(checkpoint: Path) -> None:
    """Bits and bytes as inspect counts them; errors as the manifest has them; the parts add up."""
    facts, inspected = read_facts(checkpoint), subbit.inspect(checkpoint)
    assert facts.bits == inspected["bits"]
    assert sum(part.bytes for part in facts.parts) == facts.file_bytes == inspected["file_bytes"]
    assert facts.dense_bytes == 4 * facts.parameters  # float32
    manifest = json.loads((checkpoint / "subbit_manifest.json").read_text())
    for number, layer in enumerate(manifest["layers"]):
        for name, linear in layer["linears"].items():
            row, column = facts.errors.rows.index(str(number)), facts.errors.columns.index(name.split(".", 3)[3])
            assert facts.errors.values[row][column] == linear["error"]
            assert facts.allocation.texts[row][column] == linear["label"]
    assert facts.errors.columns[0] == "self_attn.q_proj"
    assert facts.errors.values[1][0] is None
    assert facts.errors.texts[1][0] == facts.allocation.texts[1][0] == "dense"


def test_what_stayed_dense_has_a_reason(checkpoint: Path) -> None:
    """All dense bytes are accounted for."""
    facts = read_facts(checkpoint)
    kept = {entry.name: entry for entry in facts.dense}
    assert kept["model.layers.*.self_attn.q_proj.weight"].reason == "the recipe says so"
    assert kept["norms and biases"].count == 7
    dense = [tensor for name, tensor in stored_tensors(checkpoint).items() if name.endswith("weight")]
    assert sum(entry.bytes for entry in facts.dense) == sum(tensor.nbytes for tensor in dense)


def test_every_scale_is_counted(checkpoint: Path) -> None:
    """In one bin each, by role, zeros apart; quantiles are right to a bin."""
    facts = read_facts(checkpoint)
    stored = stored_tensors(checkpoint)
    scales = [tensor for name, tensor in stored.items() if name.endswith(".scales") and "layers" in name]
    groups = [group for group in facts.scales if "embedding" not in group.role]
    assert sum(group.total + group.zeros for group in groups) == sum(tensor.numel() for tensor in scales)
    embedding = stored["model.embed_tokens.scales"].float().flatten()
    (group,) = (group for group in facts.scales if "embedding" in group.role)
    assert group.total == embedding.numel()
    assert group.quantile(0.5) == pytest.approx(float(embedding.median()), rel=0.05)


def test_outliers_of_activations_are_recorded(checkpoint: Path) -> None:
    """By distinct input, at least 1; what reads the same has the same."""
    peaks = {peak.name: peak for peak in input_peaks(read_facts(checkpoint))}
    assert {"k, v", "gate, up", "o", "down"} <= {name.removeprefix("q, ") for name in peaks} | {"k, v"}
    assert all(value is None or value >= 1 for peak in peaks.values() for value in (*peak.tokens, *peak.channels))
    assert any(value is not None for peak in peaks.values() for value in peak.tokens)


def test_experts_of_a_layer_are_one_kind(tiny: Tiny, recipe_for: RecipeFor, tmp_path: Path) -> None:
    """The cell has their mean; the note the spread."""
    subbit.compress(tiny("mixtral"), recipe_for("rtn"), tmp_path / "out")
    facts = read_facts(tmp_path / "out")
    column = facts.errors.columns.index("mlp.experts.*.up_proj")
    errors = [
        linear.error for linear in facts.linears if linear.layer == "0" and linear.kind == "mlp.experts.*.up_proj"
    ]
    assert len(errors) > 1
    assert facts.errors.values[0][column] == pytest.approx(sum(filter(None, errors)) / len(errors))
    assert f"{len(errors)} experts" in facts.errors.notes[0][column]
    page, text = subbit.report(tmp_path / "out", tmp_path / "report.html")
    assert "experts" in page.read_text()
    assert "experts" in text.read_text()


# ---- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements and the text of a page; every tag must be closed."""

    VOID = ("meta", "link", "br", "wbr", "hr", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def addresses(page: Page) -> Iterator[str]:
    """Everything that a browser would fetch."""
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            if attributes.get(name):
                yield str(attributes[name])


def test_the_page_needs_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    """No script, no address but the empty icon, small, and every section is there."""
    html, markdown = subbit.report(checkpoint, tmp_path / "report.html")
    text = html.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert set(addresses(page)) == {"data:,"}
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/)", text)
    assert "prefers-color-scheme: dark" in text
    assert len(text) < 2_000_000
    sections = {str(attributes["id"]) for tag, attributes in page.elements if tag == "section"}
    assert sections == {"files", "quality", "layers", "scales", "activations", "dense", "recipe"}
    assert sum(tag == "svg" for tag, _ in page.elements) >= 5
    assert "tiny model" in "".join(page.words)
    assert markdown == tmp_path / "report.md"


def test_what_was_not_measured_says_how(checkpoint: Path, tmp_path: Path) -> None:
    """In both forms, with the command."""
    for path in subbit.report(checkpoint, tmp_path / "report.html"):
        text = re.sub("</?span>", "", path.read_text(encoding="utf-8"))
        assert text.count("not measured") >= 4
        for option in ("--perplexity wikitext2", "--reference DENSE", "--tasks all"):
            assert f"subbit eval tiny model {option}" in text
        assert "subbit bench tiny model" in text


def test_what_was_measured_is_shown(copy: Path, tmp_path: Path) -> None:
    """In both forms, with its protocol; the dense model's perplexity beside the checkpoint's."""
    record_evaluation(copy, everything())
    for path in subbit.report(copy, tmp_path / "report.html"):
        text = path.read_text(encoding="utf-8")
        assert "not measured" not in text
        for words in (
            "23.46 ± 1.25",
            "0.8125 ± 0.02",
            "40.0%",
            "50.0% ± 2.0",
            "21.37 tokens/s",
            "bfloat16 18.75 tokens/s",
            "20 windows",
            "SmolLM2",
        ):
            assert words in text, words
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "this one: 23.46" in page
    assert "this one, dense: 13.40" in page


def test_the_headline_is_of_the_usual_data_set(copy: Path) -> None:
    """WikiText-2 where it was measured, whatever was measured after it; the most tokens of it, of equals the newer."""
    newer = dataclasses.replace(PERPLEXITY, dtype="bfloat16", value=30.0)
    short = dataclasses.replace(PERPLEXITY, windows=2, tokens=4094, value=77.0)
    other = dataclasses.replace(PERPLEXITY, dataset="c4", value=99.0)
    record_evaluation(copy, [Measurement.of("perplexity", result) for result in (PERPLEXITY, newer, short, other)])
    values = [shown.value for shown in headline(read_facts(copy))]
    assert "30.00 ± 1.25" in values


def test_a_measurement_of_an_unknown_kind_is_shown(copy: Path, tmp_path: Path) -> None:
    """A newer subbit may have measured something else."""
    record_evaluation(copy, [Measurement("chess_rating", {"opponent": {"name": "<b>"}}, {"elo": 812.25})])
    html, markdown = subbit.report(copy, tmp_path / "report.html")
    assert "chess rating" in html.read_text()
    assert "elo 812.2" in html.read_text()
    assert "opponent.name &lt;b&gt;" in html.read_text()
    assert "opponent.name <b>" in markdown.read_text()


def test_a_checkpoint_that_was_saved_again_has_a_report(checkpoint: Path, tmp_path: Path) -> None:
    """Without manifest, recipe and log: what is not known says so."""
    model, tokenizer = subbit.load(checkpoint)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    html, markdown = subbit.report(tmp_path / "saved", tmp_path / "report.html")
    Page(html.read_text())
    for path in (html, markdown):
        text = path.read_text()
        assert "has no <code>subbit_recipe.yaml" in text or "has no `subbit_recipe.yaml" in text
        assert "Not recorded" in text


def test_hostile_names_stay_text(checkpoint: Path, tmp_path: Path) -> None:
    """A directory may be called anything."""
    name = "<img src=x onerror=alert(1)> & 'so' \"on\""
    shutil.copytree(checkpoint, tmp_path / name)
    page = Page(subbit.report(tmp_path / name, tmp_path / "report.html")[0].read_text())
    assert "img" not in {tag for tag, _ in page.elements}
    assert name in "".join(page.words)


def test_tables_of_the_markdown_are_whole(copy: Path, tmp_path: Path) -> None:
    """Every line of a table has as many cells as its head."""
    record_evaluation(copy, everything())
    text = subbit.report(copy, tmp_path / "report.html")[1].read_text()
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) >= 7
    for table in tables:
        assert re.fullmatch(r"\|(:?-+:?\|| :?-+:? \|)+", table[1]), table[:2]
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
        assert len(counts) == 1, table
    assert not re.search(r"\n\n\n\n", text)


def test_texts_of_both_models_stand_beside_each_other(checkpoint: Path, tiny: Tiny, tmp_path: Path) -> None:
    """Only if asked for; the prompts are one's own."""
    options: dict[str, Any] = {"prompts": ["the river", "she counted"], "max_new_tokens": 3}
    for path in subbit.report(checkpoint, tmp_path / "report.html", reference=tiny("llama-gqa"), **options):
        text = path.read_text()
        assert "the river" in text
        assert "she counted" in text
        assert "at most 3 of them" in text
    page = Page((tmp_path / "report.html").read_text())
    assert sum(tag == "blockquote" for tag, _ in page.elements) == 4
    with pytest.raises(UserError, match="prompts that are not empty"):
        subbit.report(checkpoint, tmp_path / "other.html", prompts=[""])
    assert not (tmp_path / "other.html").exists()


def test_a_wrong_reference_is_said_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None, or a compressed one: no model runs; more tokens than the context are one line too."""
    with pytest.raises(UserError, match=r"a sequence of \d+ tokens is beyond the model's context of 256"):
        subbit.report(checkpoint, tmp_path / "report.html", generations=True, max_new_tokens=300)
    monkeypatch.setattr("subbit.reporting.generations.write_all", lambda *_: pytest.fail("a model was run"))
    for reference, complaint in ((tmp_path / "nowhere", "does not exist"), (checkpoint, "give the dense model")):
        with pytest.raises(UserError, match=complaint):
            subbit.report(checkpoint, tmp_path / "report.html", reference=reference)
    assert not (tmp_path / "report.html").exists()


def test_a_recipe_that_is_no_text_is_shown_as_it_is(copy: Path, tmp_path: Path) -> None:
    """It is the reader's to judge."""
    (copy / "subbit_recipe.yaml").write_bytes(b"method: \xff")
    assert "method: \N{REPLACEMENT CHARACTER}" in subbit.report(copy, tmp_path / "report.html")[0].read_text()


def test_a_fence_is_longer_than_those_inside() -> None:
    """Models write Markdown too."""
    assert fenced("a\n```\nb") == "````\na\n```\nb\n````"
    assert fenced("x", "yaml") == "```yaml\nx\n```"


# ---- where it goes ---------------------------------------------------------------------------------------------------


def test_where_a_report_goes(copy: Path, tmp_path: Path) -> None:
    """Beside the checkpoint, into a directory, or where one says; the Markdown beside it. No file is touched."""
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    assert subbit.report(copy) == (tmp_path / "copy-report.html", tmp_path / "copy-report.md")
    assert subbit.report(copy, tmp_path / "new" / "deep")[0] == tmp_path / "new" / "deep" / "report.html"
    assert subbit.report(copy, tmp_path / "other.html") == (tmp_path / "other.html", tmp_path / "other.md")
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before
    first = (tmp_path / "other.html").read_bytes()
    assert subbit.report(copy, tmp_path / "other.html")[0].read_bytes() == first


@pytest.mark.parametrize("name", ["report.md", "a file", "a file/report.html"])
def test_a_place_that_cannot_be_written_to(name: str, checkpoint: Path, tmp_path: Path) -> None:
    """One line, before any work."""
    (tmp_path / "a file").touch()
    with pytest.raises(UserError, match=r"give a name that ends in \.html|cannot write to"):
        subbit.report(checkpoint, tmp_path / name)


def test_no_report_of_what_is_no_checkpoint(run: Run, tiny: Tiny, copy: Path, tmp_path: Path) -> None:
    """A wrong path, a dense model, an unfinished run, a damaged file: one line each, no page."""
    assert_one_line(run("report", tmp_path / "nowhere", "-o", tmp_path / "r.html"), "is no directory")
    assert_one_line(run("report", tiny("llama-gqa"), "-o", tmp_path / "r.html"), "not compressed by subbit")
    (copy / "evaluation.json").write_text("{")
    assert_one_line(run("report", copy, "-o", tmp_path / "r.html"), "evaluation.json is damaged")
    (copy / "config.json").unlink()
    (copy / ".subbit").mkdir()
    assert_one_line(run("report", copy, "-o", tmp_path / "r.html"), "is unfinished")
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(CheckpointError):
        subbit.report(copy)


def test_the_command_says_what_it_wrote(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """Two paths."""
    ran = run("report", checkpoint, "-o", tmp_path)
    assert (ran.code, ran.out.split()) == (0, [str(tmp_path / "report.html"), str(tmp_path / "report.md")])


# ---- small parts -----------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_inside() -> None:
    """Some, but not too many; also of a range of one value."""
    assert linear_ticks(0, 4.2, 5) == [0, 1, 2, 3, 4]
    assert linear_ticks(0.13, 0.41, 5) == pytest.approx([0.2, 0.3, 0.4])
    assert linear_ticks(2, 2, 5) == [2]
    assert log_ticks(4, 120, 5) == [5, 10, 20, 50, 100]
    assert log_ticks(1e-9, 1e9, 5)[0] == pytest.approx(1e-9)
    assert len(log_ticks(1e-9, 1e9, 5)) <= 7
    assert max(len(svg.short(10.0**power)) for power in range(-6, 9)) == len("10,000")  # fits beside the axis
    for low, high in ((0.9, 1.1), (3, 8), (0.001, 70)):
        ticks = log_ticks(low, high, 5)
        assert ticks
        assert all(low * 0.99 <= tick <= high * 1.01 for tick in ticks)


def test_an_axis_maps_its_ends() -> None:
    """Linear and logarithmic, also upside down; one value is in the middle."""
    assert [Axis(0, 10, 100, 0)(value) for value in (0, 5, 10)] == [100, 50, 0]
    assert Axis(1, 100, 0, 2, log=True)(10) == pytest.approx(1)
    assert Axis(3, 3, 0, 10)(3) == 5


def test_a_heat_map_goes_from_pale_to_deep() -> None:
    """The lowest is 0, the highest 7; what has no number has no colour; equal numbers are all pale."""
    values = ((0.0, 0.5, None), (1.0, 0.99, 0.0))
    texts = tuple(tuple(str(value) for value in row) for row in values)
    map_ = heat_map(Grid(("0", "1"), ("a.q_proj", "a.k_proj", "a.v_proj"), values, texts, texts), "0", "1")
    assert [[cell.step for cell in cells] for _, cells in map_.rows] == [[0, 4, None], [7, 7, 0]]
    assert map_.columns == ("q", "k", "v")
    same = heat_map(Grid(("0",), ("a",), ((0.5,),), (("x",),), (("x",),)), "", "0.5")
    assert same.rows[0][1][0].step == 1


def test_short_names_stay_distinct() -> None:
    """Last parts where these are enough."""
    assert short_names(["self_attn.q_proj", "mlp.fc1"]) == ("q_proj", "fc1")
    assert len(set(short_names(["mlp.up_proj", "mlp.experts.*.up_proj", "self_attn.q_proj"]))) == 3


def test_a_line_is_cut_at_its_gaps() -> None:
    """A lone point has no line."""
    assert pieces([(0, 0), (1, 1), None, (3, 3), None, (5, 5), (6, 6)]) == [[(0, 0), (1, 1)], [(5, 5), (6, 6)]]


# ---- in a browser ----------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
SWITCHES += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; skips where there is none."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no browser: install Chromium (Debian: apt-get install chromium)")
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the browser is driven by playwright: pip install it"
    )
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=SWITCHES)
        yield started
        started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it_without_a_complaint(
    browser: Any, width: int, scheme: str, copy: Path, tmp_path: Path
) -> None:
    """Nothing is fetched, nothing is logged, nothing sticks out, every figure has a size, the scheme is followed."""
    record_evaluation(copy, everything())
    html = subbit.report(copy, tmp_path / "report.html")[0]
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url != html.as_uri() else None)
    page.goto(html.as_uri())
    assert [line for line in complaints if line != "data:,"] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [figure.bounding_box() for figure in page.query_selector_all("svg, .heat")]
    assert len(boxes) >= 7
    assert all(box["width"] > 100 and box["height"] > 50 for box in boxes)
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colour)[:3])) > 384) == (scheme == "light")
    page.close()
