"""The model card: what it says, what keeps it up to date, and what `push` would send to the hub.

Run with `pytest tests/test_card.py`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Lines, logits_of, stored_tensors
from commands import Run, assert_one_line
from huggingface_hub import ModelCard
from test_report import everything
from transformers import AutoModelForCausalLM

import subbit
from subbit import CheckpointError, Recipe, UserError
from subbit.checkpoint.reader import open_checkpoint
from subbit.evaluation.record import read_evaluations
from subbit.reporting import push as push_module
from subbit.reporting.card import PLACEHOLDER, keep_measurements, source_facts

Tiny = Callable[[str], Path]
RecipeFor = Callable[..., Recipe]


@pytest.fixture(scope="module")
def recipe(recipe_for: RecipeFor) -> Recipe:
    """The cheapest one."""
    return recipe_for("rtn", calibration={"samples": 2, "seq_len": 16})


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests must not change it."""
    out = tmp_path_factory.mktemp("card") / "out"
    subbit.compress(tiny("llama-gqa"), recipe, out)
    return out


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def card_of(directory: Path) -> Any:
    """As the hub reads it, a ModelCard with ModelCardData."""
    return ModelCard.load(directory / "README.md")


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_a_card_is_written_with_the_checkpoint(checkpoint: Path) -> None:
    """Metadata that the hub knows, the three kinds of bits, what stayed dense; no path of this machine."""
    data = card_of(checkpoint).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "text-generation", None)
    assert data.tags[:2] == ["subbit", "subbit-rtn"]
    assert data.eval_results is None
    text = (checkpoint / "README.md").read_text(encoding="utf-8")
    bits = subbit.inspect(checkpoint)["bits"]
    for kind in ("nominal", "stored", "model"):
        assert f"| {bits[kind]:.3f} |" in text
    assert "norms and biases" in text
    assert "Not measured yet" in text
    assert str(checkpoint.parent) not in text
    assert "calibration.txt" in text  # by its name


def test_the_code_in_the_card_loads_the_model(checkpoint: Path) -> None:
    """`import subbit` comes first: without it transformers would fill the model with random weights."""
    text = (checkpoint / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert code.index("import subbit") < code.index("from transformers")
    names: dict[str, Any] = {}
    exec(code.replace(PLACEHOLDER, str(checkpoint)), names)
    assert bool((logits_of(names["model"]) == logits_of(subbit.load(checkpoint)[0])).all())


def test_the_card_names_the_model_that_was_fetched_from_the_hub(tiny: Tiny, recipe: Recipe, tmp_path: Path) -> None:
    """From its place in the hub's cache; the license from its own card. Two runs give the same bytes."""
    snapshot = tmp_path / "hub" / "models--some-org--Tiny-Llama" / "snapshots" / "0123abc"
    shutil.copytree(tiny("llama-gqa"), snapshot)
    head = (
        "license: other\nlicense_name: tiny-license\nlicense_link: LICENSE\nlanguage: [en]\nbase_model: another/one\n"
    )
    (snapshot / "README.md").write_text(f"---\n{head}---\n# Its own card\n")
    for name in ("one", "two"):
        subbit.compress(snapshot, recipe, tmp_path / name)
    data = card_of(tmp_path / "one").data
    assert (data.base_model, data.base_model_relation) == ("some-org/Tiny-Llama", "quantized")
    assert (data.license, data.license_name, data.license_link) == ("other", "tiny-license", "LICENSE")
    assert data.language == ["en"]
    text = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "# Tiny-Llama, " in text
    assert "https://huggingface.co/some-org/Tiny-Llama" in text
    assert text == (tmp_path / "two" / "README.md").read_text(encoding="utf-8")


def test_the_metadata_names_every_data_set_of_the_calibration(
    tiny: Tiny, recipe_for: RecipeFor, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of several sources; a file is no data set of the hub, but its path is something to look at before a push."""
    (tmp_path / "wikitext2").mkdir()
    shutil.copy(text_file, tmp_path / "wikitext2" / "valid.txt")
    monkeypatch.setenv("SUBBIT_DATA", str(tmp_path))
    source = f"wikitext2,{text_file}"
    recipe = recipe_for("rtn", calibration={"samples": 2, "seq_len": 16, "source": source})
    subbit.compress(tiny("llama-gqa"), recipe, tmp_path / "out")
    assert card_of(tmp_path / "out").data.datasets == ["Salesforce/wikitext"]
    notes = subbit.push(tmp_path / "out", "tiny", dry_run=True).notes
    assert [note for note in notes if "calibration" in note] == [
        f"recipe and manifest name the calibration file {text_file}"
    ]


@pytest.mark.parametrize(
    "text", [None, "", "# no metadata", "---\n[\n---\n", "---\n- a list\n---\n", "---\nlicense: 3\n---\n"]
)
def test_a_source_without_a_license_has_none(text: str | None, tmp_path: Path) -> None:
    """Whatever its card is like."""
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    found = source_facts(tmp_path)
    assert found.base_model is None
    assert not found.carried


# ---- what keeps it up to date ----------------------------------------------------------------------------------------


def test_measurements_get_into_the_card(copy: Path) -> None:
    """Into the metadata as the hub's model index, with the protocol, and into the text; a repetition replaces."""
    keep_measurements(copy, everything())
    keep_measurements(copy, everything())
    card = card_of(copy)
    found = {result.metric_type: result for result in card.data.eval_results or []}
    assert len(card.data.eval_results or []) == 4  # perplexity, divergence, two tasks; the hub knows no speed
    assert found["perplexity"].metric_value == 23.456
    assert (found["perplexity"].dataset_type, found["perplexity"].dataset_split) == ("Salesforce/wikitext", "test")
    assert found["perplexity"].metric_args["seq_len"] == 2048
    assert card.data.metrics == ["perplexity", "kl_divergence", "accuracy"]
    assert "23.46 ± 1.25" in card.text
    assert "21.37 tokens/s" in card.text
    assert "Not measured yet" not in card.text
    assert card.text.count("## Evaluation") == 1


def test_what_a_user_wrote_stays(copy: Path) -> None:
    """Text, metadata and results of others; without the markers the text is left alone."""
    path = copy / "README.md"
    added = "license: mit\nmodel-index:\n- name: mine\n  results:\n  - task: {type: text-generation}\n"
    added += "    dataset: {name: X, type: x}\n    metrics: [{type: bleu, value: 7.5}]\n---\n"
    path.write_text(
        path.read_text().replace("---\n\n", f"{added}\n", 1).replace("## Limits", "## Mine\n\nHello.\n\n## Limits")
    )
    keep_measurements(copy, everything()[:1])
    card = card_of(copy)
    assert card.data.license == "mit"
    assert card.data.model_name == "mine"
    assert [result.metric_type for result in card.data.eval_results or []] == ["bleu", "perplexity"]
    assert "## Mine\n\nHello." in card.text
    assert "23.46 ± 1.25" in card.text
    bare = re.sub(r"<!-- subbit eval: (start|end) -->\n", "", path.read_text())
    path.write_text(bare)
    keep_measurements(copy, everything()[-1:])
    assert path.read_text() == bare


def test_a_card_that_is_missing_is_written(copy: Path) -> None:
    """Of a checkpoint from before there were cards."""
    (copy / "README.md").unlink()
    keep_measurements(copy, everything())
    assert "23.46 ± 1.25" in card_of(copy).text
    assert len(card_of(copy).data.eval_results or []) == 4


def test_a_card_that_cannot_be_read_is_one_line(copy: Path) -> None:
    """It names the file; the measurement is kept all the same."""
    (copy / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(UserError, match=r"README\.md cannot be read"):
        keep_measurements(copy, everything())
    assert read_evaluations(copy) == everything()


def test_a_checkpoint_with_measurements_is_the_same_checkpoint(
    copy: Path, tiny: Tiny, recipe: Recipe, tmp_path: Path
) -> None:
    """Its checks, loading, saving again, --resume and --overwrite know both files."""
    before = stored_tensors(copy)
    keep_measurements(copy, everything())
    open_checkpoint(copy).check_contents()
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.save_pretrained(tmp_path / "saved")
    assert stored_tensors(tmp_path / "saved").keys() == before.keys()
    assert not (tmp_path / "saved" / "evaluation.json").exists()
    progress = Lines()
    subbit.compress(tiny("llama-gqa"), recipe, copy, resume=True, progress=progress)
    assert progress.lines == [f"{copy} is already complete"]
    assert read_evaluations(copy) == everything()
    subbit.compress(tiny("llama-gqa"), recipe, copy, overwrite=True)
    assert read_evaluations(copy) == []
    assert card_of(copy).data.eval_results is None


# ---- what the command line does with it ------------------------------------------------------------------------------


def test_eval_leaves_its_numbers(run: Run, copy: Path, text_file: Path) -> None:
    """Beside the weights and in the card; a second run with the same protocol replaces the first."""
    for _ in range(2):
        ran = run("eval", copy, "--perplexity", text_file, "--seq-len", 32, "--max-windows", 2, "--json")
        assert ran.code == 0, ran.err
    value = json.loads(ran.out)["perplexity"][str(text_file)]["value"]
    (measured,) = read_evaluations(copy)
    assert measured.values["value"] == value
    assert (measured.protocol["dataset"], measured.protocol["windows"]) == (text_file.name, 2)
    assert str(text_file.parent) not in (copy / "evaluation.json").read_text()
    assert [result.metric_value for result in card_of(copy).data.eval_results or []] == [value]


def test_eval_of_a_dense_model_leaves_nothing(run: Run, tiny: Tiny, text_file: Path) -> None:
    """It is not ours to write there."""
    before = sorted(path.name for path in tiny("llama-gqa").iterdir())
    ran = run("eval", tiny("llama-gqa"), "--perplexity", text_file, "--seq-len", 32, "--max-windows", 1)
    assert ran.code == 0, ran.err
    assert sorted(path.name for path in tiny("llama-gqa").iterdir()) == before


def test_eval_says_where_it_cannot_write(run: Run, copy: Path, text_file: Path) -> None:
    """The numbers are printed; one line says that they were not kept."""
    (copy / ".evaluation.json.partial").mkdir()  # what an atomic write needs; root may write to read-only directories
    ran = run("eval", copy, "--perplexity", text_file, "--seq-len", 32, "--max-windows", 1)
    assert ran.code == 0, ran.err
    assert "perplexity" in ran.out
    assert [line for line in ran.err.splitlines() if line.startswith("not kept: cannot write")]
    assert not (copy / "evaluation.json").exists()


# ---- what would go to the hub ----------------------------------------------------------------------------------------


def test_a_dry_run_lists_what_would_be_uploaded(run: Run, copy: Path) -> None:
    """Every file with its size but log and hidden ones, the metadata, what it lacks; nothing is written."""
    (copy / ".hidden").write_text("x")
    before = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    ran = run("push", copy, "some-org/tiny", "--dry-run")
    assert ran.code == 0, ran.err
    listed = {name: size for size, name in re.findall(r"^ +([\d,]+)  (\S+)$", ran.out, flags=re.MULTILINE)}
    assert {"README.md", "config.json", "tokenizer.json", "subbit_manifest.json", "model-rest.safetensors"} <= set(
        listed
    )
    assert not {"subbit_log.jsonl", ".hidden"} & set(listed)
    assert listed["config.json"] == f"{(copy / 'config.json').stat().st_size:,}"
    assert "library_name: transformers" in ran.out
    assert "names no base_model" in ran.out
    assert "names no license" in ran.out
    assert "name the calibration file /" in ran.out
    assert ran.out.endswith("nothing was uploaded to some-org/tiny\n")
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == before


class FakeHub:
    """Stands for the hub's client."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.sent: dict[str, bytes] = {}

    def create_repo(self, repo: str, **options: Any) -> Any:
        self.made.append((repo, options))
        return type("Url", (), {"repo_id": f"me/{repo}"})

    def create_commit(self, repo: str, operations: Any, **options: Any) -> None:
        for operation in operations:
            with operation.as_file() as file:
                self.sent[operation.path_in_repo] = file.read()


def test_an_upload_is_what_the_dry_run_said(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card there loads the model from there; that of the checkpoint is not changed."""
    hub = FakeHub()
    monkeypatch.setattr(push_module, "HfApi", lambda: hub)
    planned = subbit.push(copy, "tiny", dry_run=True)
    assert hub.made == []
    done = subbit.push(copy, "tiny", private=True)
    assert hub.made == [("tiny", {"private": True, "exist_ok": True})]
    assert (planned.url, done.url) == (None, "https://huggingface.co/me/tiny")
    assert {name: len(contents) for name, contents in hub.sent.items()} == done.files
    assert hub.sent["config.json"] == (copy / "config.json").read_bytes()
    assert b'from_pretrained("me/tiny")' in hub.sent["README.md"]
    assert PLACEHOLDER in (copy / "README.md").read_text()


def test_a_checkpoint_without_a_card_is_uploaded_with_one(copy: Path) -> None:
    """It is made for the upload."""
    (copy / "README.md").unlink()
    upload = subbit.push(copy, "tiny", dry_run=True)
    assert "import subbit" in upload.card
    assert "README.md" in upload.files
    assert not (copy / "README.md").exists()


def test_checksums_that_are_not_there_are_said(copy: Path) -> None:
    """Saved again by transformers, a checkpoint has no manifest."""
    assert not any("checksum" in note for note in subbit.push(copy, "tiny", dry_run=True).notes)
    (copy / "subbit_manifest.json").unlink()
    assert any("no checksum was compared" in note for note in subbit.push(copy, "tiny", dry_run=True).notes)


def test_only_a_whole_checkpoint_is_uploaded(copy: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped bit, a dense model, an unfinished run: refused before anything is sent."""
    monkeypatch.setattr(push_module, "HfApi", FakeHub)
    with pytest.raises(CheckpointError, match="not compressed by subbit"):
        subbit.push(tiny("llama-gqa"), "tiny")
    shard = copy / "model-layer-00001.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(CheckpointError, match="checksum differs"):
        subbit.push(copy, "tiny")
    (copy / "config.json").unlink()
    (copy / ".subbit").mkdir()
    with pytest.raises(CheckpointError, match="is unfinished"):
        subbit.push(copy, "tiny", dry_run=True)


@pytest.mark.parametrize("name", ["", "a/b/c", "with space", "-x", "a..b"])
def test_a_name_that_no_repository_can_have(name: str, copy: Path) -> None:
    """One line."""
    with pytest.raises(UserError, match="is no name of a repository"):
        subbit.push(copy, name, dry_run=True)


def test_without_a_network_an_upload_is_one_line(run: Run, copy: Path) -> None:
    """The tests are offline."""
    assert_one_line(run("push", copy, "some-org/tiny"), "cannot upload to some-org/tiny")
