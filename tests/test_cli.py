"""The command line: every mistake is one line and exit code 2, and every command does its work end to end."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
import yaml
from commands import Ran, Run, assert_one_line

import subbit
from subbit import Recipe, UserError
from subbit.cli import build_recipe, main

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def finished(tiny: Tiny, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint."""
    out = tmp_path_factory.mktemp("finished") / "out"
    calibration = {"source": str(text_file), "samples": 2, "seq_len": 16}
    subbit.compress(tiny("llama-gqa"), Recipe.create({"calibration": calibration}), out)
    return out


# ---- mistakes of compress --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--sparsity", "8:8"], "N must be between 1 and 7"),
        (["--sparsity", "9:8"], "N must be between 1 and 7"),
        (["--sparsity", "0:4"], "N must be between 1 and 3"),
        (["--sparsity", "3:6"], "M must be one of 4, 8, 16"),
        (["--sparsity", "half"], "sparsity 'half' is not of the form N:M"),
        (["--sparsity", "-4:8"], "is not of the form N:M"),
        (["--sparsity", ""], "is not of the form N:M"),
        (["--method", "luck"], "recipe: method: there is no method 'luck'; choose stbllm, "),
        (["--samples", "0"], "calibration.samples: Input should be greater than or equal to 1"),
        (["--seq-len", "1"], "calibration.seq_len: Input should be greater than or equal to 2"),
        (["--samples", "1000000000000"], "calibration.samples: Input should be less than or equal to 1000000"),
        (["--seed", "99999999999999999999"], "calibration.seed: Input should be less than 4294967296"),
        (["--seed", "-1"], "calibration.seed: Input should be greater than or equal to 0"),
        (["--bits", "-1"], "bits: Input should be greater than 0"),
        (["--bits", "0"], "bits: Input should be greater than 0"),
        (["--bits", "nan"], "bits: Input should be a finite number"),
        (["--bits", "0.8", "--sparsity", "2:8"], "bits and a sparsity exclude each other; give one of them"),
        (["--bits", "0.8", "--set", "sparsity=2:8"], "bits and a sparsity exclude each other; give one of them"),
        (["--embeddings", "3bit"], "embeddings: Input should be 'keep', '8bit' or '4bit'"),
        (["--effort", "fast", "--method", "pbs2p"], "effort is for method codes, not pbs2p"),
        (["--effort", ""], "there is no effort ''; choose fast, "),
        (["--set", "nonsense"], "'nonsense' is not of the form field=value"),
        (["--set", "=red"], "'=red' is not of the form field=value"),
        (["--set", "options.=red"], "'options.=red' is not of the form field=value"),
        (["--set", "colour=red"], "recipe: colour: there is no such field"),
        (["--set", "calibration.colour=red"], "recipe: calibration.colour: there is no such field"),
        (["--set", "options=3"], "recipe: options: must be a mapping of fields"),
        (["--set", "embeddings=" + "{a: " * 2000], "is not YAML: it is nested too deeply"),
        (["--set", "method.colour=red"], "method"),
        (["--set", "options.colour=red"], "has no option 'colour'; it has block_size, "),
        (["--set", "options.block_size=100"], "block_size 100 must be a multiple of M = 8"),
        (["--set", "options.block_size=0"], "block_size 0 must be a multiple of M = 8"),
        (["--set", "options.block_size=wide"], "recipe: options.block_size: Input should be a valid integer"),
        (["--set", "options.block_size=["], "is not YAML"),
        (["--set", "options.damping=0"], "damping 0.0 must be positive"),
        (["--set", "options.damping=.nan"], "damping nan must be positive"),
        (["--set", "options.damping=.inf"], "damping inf must be positive and finite"),
        (["--set", "options.score=luck"], "score"),
        (["--set", "allocation.kind=luck"], "allocation.kind"),
        (["--set", "allocation.n_low=.nan"], "allocation.n_low"),
        (["--set", "calibration.clip_norm=.inf"], "calibration.clip_norm"),
        (["--set", "overrides={'re:(': {dense: true}}"], "'re:(' is not a regular expression"),
        (["--set", "overrides={down_proj: {}}"], "give either a sparsity or dense: true"),
        (["--set", "overrides={down_proj: {sparsity: '8:8'}}"], "N must be between 1 and 7"),
        (
            ["--set", "overrides={'re:x': {sparsity: '3:16'}}", "--set", "options.block_size=24"],
            "multiple of M = 16",
        ),
        (["--set", "overrides={down_proj: {dense: true}}"], "'down_proj' matches no linear"),
        (["--set", "method=[stbllm]"], "method"),
        (["--recipe", "no.yaml"], "cannot read the recipe no.yaml"),
        (["--calibration", "wikitext3", "--seq-len", "16"], "unknown calibration source 'wikitext3'"),
        (["--calibration", "no.txt", "--seq-len", "16"], "text file no.txt does not exist"),
        (["--seq-len", "257"], "257"),
        (["--calibration", "self", "--seq-len", "257"], "257"),
        (["--device", "tpu"], "device 'tpu' is not available here"),
        (["--device", ""], "device '' is not available here"),
        (["--device", "meta"], "device 'meta' is not available here"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(options: list[str], complaint: str, run: Run, tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    """One line that says which option and what it may be; no output directory."""
    given = ["--calibration", text_file, "--samples", 2, "--seq-len", 16] if "--calibration" not in options else []
    ran = run("compress", tiny("llama-gqa"), "--out", tmp_path / "out", *given, *options)
    assert_one_line(ran, complaint)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device that must be missing")
def test_a_missing_gpu_is_one_line(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    """For every command that takes a device."""
    assert_one_line(run("compress", tiny("opt"), "-o", tmp_path / "out", "--device", "cuda"), "use --device cpu")
    assert_one_line(run("eval", tiny("opt"), "--device", "cuda:1"), "use --device cpu")
    assert_one_line(run("generate", tiny("opt"), "--prompt", "x", "--device", "cuda"), "use --device cpu")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", "", "is empty"),
        ("blank.txt", " \n\n", "is empty"),
        ("short.txt", "the river", "calibration text too short"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "is not UTF-8"),
        ("broken.jsonl", '{"text": "x"}\n{', "line 2: not valid JSON"),
        ("other.jsonl", '{"content": "x"}', 'line 1: no "text" string'),
        ("text.csv", "the river", "unknown calibration source"),
    ],
)
def test_bad_calibration_files(
    name: str, content: str | bytes, complaint: str, run: Run, tiny: Tiny, tmp_path: Path
) -> None:
    """Named, with what is wrong in them."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    ran = run("compress", tiny("opt"), "--out", tmp_path / "out", "--calibration", tmp_path / name, "--seq-len", 32)
    assert_one_line(ran, complaint)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "must be a mapping"),
        ("- method", "must be a mapping"),
        ("method: [", "is not YAML"),
        ("method: stbllm\ncolour: red", "colour: there is no such field"),
        ("method: codes\nbits: 0.8\nsparsity: 2:8", "bits and a sparsity exclude each other; give one of them"),
        ("{a: " * 2000, "is not YAML: it is nested too deeply"),
        ("1: 2", "recipe: "),
        ("calibration: 3", "calibration: must be a mapping of fields"),
        ("options: 3", "recipe: "),
        ("method: stbllm\noptions: {steps: 3}", "method stbllm has no option 'steps'"),
        ("!!python/object/apply:os.system [exit]", "is not YAML"),
        (b"\xff\xfe\xff", "cannot read the recipe"),
    ],
)
def test_bad_recipe_files(content: str | bytes, complaint: str, run: Run, tiny: Tiny, tmp_path: Path) -> None:
    """Unreadable, no mapping, unknown fields, fields of the wrong type."""
    (tmp_path / "recipe.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    ran = run("compress", tiny("opt"), "--out", tmp_path / "out", "--recipe", tmp_path / "recipe.yaml")
    assert_one_line(ran, complaint)
    assert not (tmp_path / "out").exists()


def edited_copy(source: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_bad_models(run: Run, tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    """None there, no language model, nothing to read, compressed already, for every command that takes a model."""
    (tmp_path / "nothing").mkdir()
    classifier = edited_copy(tiny("opt"), tmp_path / "classifier", architectures=["OPTForSequenceClassification"])
    vision = edited_copy(tiny("opt"), tmp_path / "vision", model_type="vit", architectures=["ViTModel"])
    unknown = edited_copy(tiny("opt"), tmp_path / "unknown", model_type="spiral")
    truncated = edited_copy(tiny("opt"), tmp_path / "truncated")
    (truncated / "model.safetensors").write_bytes((truncated / "model.safetensors").read_bytes()[:-9])
    wordless = edited_copy(tiny("opt"), tmp_path / "wordless")
    for path in wordless.glob("tokenizer*"):
        path.unlink()
    bad: dict[object, str] = {
        tmp_path / "nowhere": "does not exist",
        "nobody/nothing": "not a local path",
        tmp_path / "nothing": "has no config.json",
        classifier: "no causal language model",
        vision: "no causal language model",
        unknown: "spiral",
        truncated: "no valid safetensors file",
        wordless: "no tokenizer files",
        tiny("opt") / "config.json": "not a .gguf",
    }
    for model, complaint in bad.items():
        assert_one_line(run("compress", model, "--out", tmp_path / "out"), complaint)
        assert_one_line(run("eval", model), complaint)
        assert_one_line(run("generate", model, "--prompt", "the"), complaint)
    assert_one_line(run("compress", finished, "--out", tmp_path / "out"), "already compressed by subbit")
    assert not (tmp_path / "out").exists()


def test_bad_outputs(run: Run, tiny: Tiny, finished: Path, text_file: Path, tmp_path: Path) -> None:
    """A file, a full directory, somebody else's, a place where nothing can be made."""
    options = ["--calibration", text_file, "--samples", 2, "--seq-len", 16, "--out"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo").write_text("x")
    assert_one_line(run("compress", tiny("opt"), *options, tmp_path / "file"), "is a file")
    assert_one_line(run("compress", tiny("opt"), *options, finished), "is not empty; use --resume")
    assert_one_line(run("compress", tiny("opt"), *options, finished, "--resume"), "another model")
    assert_one_line(run("compress", tiny("opt"), *options, tmp_path / "notes", "--overwrite"), "did not write")
    below = run("compress", tiny("opt"), *options, tmp_path / "file" / "out")
    assert below.code == 2
    assert below.err.splitlines()[-1].startswith("error: cannot write")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["compress"], "Missing argument 'model'; see: subbit compress --help"),
        (["compress", "x"], "Missing option '--out'"),
        (["inspect", "--colour"], "No such option: --colour; see: subbit inspect --help"),
        (["eval", "x", "--seq-len", "long"], "'--seq-len'"),
        (["fly"], "No such command 'fly'; see: subbit --help"),
    ],
)
def test_a_command_that_is_not_one_is_one_line(arguments: list[str], complaint: str, run: Run) -> None:
    """Missing and unknown arguments, values of another kind: what is wrong, and where the right ones are listed."""
    assert_one_line(run(*arguments), complaint)


def test_without_arguments_there_is_help(run: Run) -> None:
    """The commands, and the exit code of a mistake."""
    ran = run()
    assert ran.code == 2
    assert "Usage: " in ran.err + ran.out


# ---- mistakes of the other commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--seq-len", "257"], "a sequence of 257 tokens is beyond the model's context of 256"),
        (["--seq-len", "1"], "give 2 or more"),
        (["--max-windows", "0", "--seq-len", "64"], "give 1 or more"),
        (["--split", "dev"], "unknown split 'dev'"),
        (["--dtype", "int4"], "dtype 'int4': choose float32, bfloat16 or float16"),
        (["--perplexity", "wikitext3"], "unknown text source 'wikitext3'"),
        (["--perplexity", "no.txt"], "text file no.txt does not exist"),
        (["--perplexity", "self"], "'self' is for calibration only"),
        (["--device", "tpu"], "device 'tpu' is not available here"),
        (["--tasks", ","], "--tasks ',' names none: choose winogrande, "),
        (["--limit", "5"], "--limit is of the items of --tasks: for perplexity, give --max-windows"),
    ],
)
def test_bad_eval_options(options: list[str], complaint: str, run: Run, finished: Path, text_file: Path) -> None:
    """For a compressed model; a dense one takes the same way."""
    given = ["--perplexity", text_file] if "--perplexity" not in options else []
    assert_one_line(run("eval", finished, *given, "--json", *options), complaint)


def test_a_text_that_is_too_short_to_evaluate_on(run: Run, finished: Path, tmp_path: Path) -> None:
    """Shorter than one window."""
    (tmp_path / "short.txt").write_text("the river")
    ran = run("eval", finished, "--perplexity", tmp_path / "short.txt", "--seq-len", 64)
    assert_one_line(ran, "evaluation text too short")


def test_bad_generate_options(run: Run, finished: Path) -> None:
    """Nothing to continue, nothing to write, no temperature."""
    for options in (["--max-new-tokens", 0], ["--temperature", -1], ["--temperature", "nan"], ["--temperature", "inf"]):
        assert_one_line(run("generate", finished, "--prompt", "x", *options), "give a prompt that is not empty")
    assert_one_line(run("generate", finished, "--prompt", ""), "give a prompt that is not empty")
    assert_one_line(run("generate", finished, "--prompt", "x", "--seed", 2**64), "--seed 18446744073709551616: give a")
    assert_one_line(run("generate", finished, "--prompt", "x", "--dtype", "half"), "dtype 'half'")
    too_long = run("generate", finished, "--prompt", "x", "--max-new-tokens", 300)
    assert_one_line(too_long, "beyond the model's context of 256")


def test_inspect_refuses_what_is_not_compressed(run: Run, tiny: Tiny, finished: Path, tmp_path: Path) -> None:
    """A dense model, no directory, an unfinished run, a damaged file."""
    (tmp_path / "unfinished" / ".subbit").mkdir(parents=True)
    damaged = Path(shutil.copytree(finished, tmp_path / "damaged"))
    (damaged / "model-layer-00000.safetensors").write_bytes(b"")
    for directory, complaint in {
        tiny("opt"): "was not compressed by subbit",
        tmp_path / "nowhere": "is no directory",
        tmp_path / "unfinished": "is unfinished",
        damaged: "is truncated",
    }.items():
        assert_one_line(run("inspect", directory), complaint)
        assert_one_line(run("inspect", directory, "--json"), complaint)
    (tmp_path / "unfinished" / "list").mkdir()
    (tmp_path / "unfinished" / "list" / "config.json").write_text("[]")
    for command in (["inspect"], ["report"], ["eval"], ["chat"]):
        assert_one_line(run(*command, tmp_path / "unfinished" / "list"), "is no JSON object")
    for command in (["eval"], ["generate", "--prompt", "x"]):
        assert_one_line(run(*command, tmp_path / "unfinished"), "is unfinished")
        assert_one_line(run(*command, damaged), "is truncated")


def test_a_mistake_is_one_line_in_a_real_process_too(finished: Path, text_file: Path) -> None:
    """Where progress bars and the warnings of libraries could get in between; and no half a result on stdout."""
    ran = subprocess.run(
        [sys.executable, "-m", "subbit.cli", "eval", finished, "--perplexity", text_file, "--seq-len", "300", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert_one_line(Ran(ran.returncode, ran.stdout, ran.stderr), "beyond the model's context of 256")


# ---- end to end ------------------------------------------------------------------------------------------------------


def test_compress_inspect_eval_generate(run: Run, tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    """What the README shows, on a tiny model."""
    out = tmp_path / "out"
    options = ["--method", "pbs2p", "--sparsity", "4:8", "--calibration", text_file, "--samples", 2, "--seq-len", 16]
    compressed = run("compress", tiny("llama-mha"), "--out", out, *options, "--json")
    assert compressed.code == 0
    assert [line.split(":")[0] for line in compressed.err.splitlines() if line.startswith("layer ")] == [
        "layer 1/3",
        "layer 2/3",
        "layer 3/3",
    ]
    facts = json.loads(compressed.out)
    assert facts == subbit.inspect(out) == json.loads(run("inspect", out, "--json").out)
    assert {"nominal", "stored", "model"} <= facts["bits"].keys()
    assert {"linear_weights", "linear_bytes", "file_bytes", "layers", "left_dense", "parameters"} <= facts.keys()
    table = run("inspect", out, "--linears")
    assert table.code == 0
    assert f"stored  {facts['bits']['stored']:.3f} bits  {facts['linear_bytes']:,} bytes" in table.out
    assert run("inspect", out).out.count("model.layers.") == 3

    evaluated = run("eval", out, "--perplexity", text_file, "--seq-len", 64, "--max-windows", 3, "--json")
    assert evaluated.code == 0
    result = json.loads(evaluated.out)
    assert result["model"] == str(out)
    measured = result["perplexity"][str(text_file)]
    assert measured["tokens"] == 3 * 63
    assert measured["seq_len"] == 64
    assert 1 < measured["value"] < 1e6
    assert math.isclose(measured["value"], math.exp(measured["nll"]), rel_tol=1e-6)
    text = run("eval", out, "--perplexity", text_file, "--seq-len", 64, "--max-windows", 3)
    assert f"perplexity: {measured['value']:.3f} ± " in text.out
    assert "64-token windows, no overlap, 3 windows, 189 predicted tokens, float32" in text.out

    generated = run("generate", out, "--prompt", "the river", "--max-new-tokens", 5)
    assert generated.code == 0
    assert generated.out.startswith("the river")
    assert "<s>" not in generated.out
    sampled = [run("generate", out, "--prompt", "the", "--max-new-tokens", 5, "--temperature", 1).out for _ in range(2)]
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize(
    ("method", "rule"), [("rtn", "the bits of a code"), ("codes", "N/M × (1 + share of salient columns)")]
)
def test_the_totals_say_what_they_count(
    method: str, rule: str, run: Run, tiny: Tiny, text_file: Path, tmp_path: Path
) -> None:
    """In the words of the method; what stayed dense is said once in a run, and by inspect."""
    options = ["--method", method, "--calibration", text_file, "--samples", 2, "--seq-len", 16]
    dense = ["--set", "overrides={'re:layers.[12]|k_proj': {dense: true}}"]
    ran = run("compress", tiny("llama-mha"), "--out", tmp_path / "out", *options, *dense)
    assert f"bits  as the papers count: {rule}; dense linears as stored\n" in ran.out
    reason = "left dense: model.layers.0.self_attn.k_proj (the recipe says so)"
    assert (ran.err + ran.out).count(reason) == 1
    assert run("inspect", tmp_path / "out").out.count(reason) == 1


def test_eval_takes_a_dense_model(run: Run, tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    """And several texts, each under the name that it was given by."""
    (tmp_path / "other.txt").write_text(text_file.read_text()[::-1])
    ran = run(
        "eval", tiny("llama-mha"), "--perplexity", text_file, "--perplexity", tmp_path / "other.txt",
        "--seq-len", 64, "--max-windows", 2, "--json", "--dtype", "bfloat16",
    )  # fmt: skip
    assert ran.code == 0
    results = json.loads(ran.out)["perplexity"]
    assert list(results) == [str(text_file), str(tmp_path / "other.txt")]
    assert all(result["dtype"] == "bfloat16" for result in results.values())
    assert run("generate", tiny("llama-mha"), "--prompt", "the", "--max-new-tokens", 2).code == 0


def test_eval_of_wikitext2(run: Run, finished: Path, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default data set, from the data folder."""
    monkeypatch.setenv("SUBBIT_DATA", str(data_root))
    ran = run("eval", finished, "--seq-len", 64, "--max-windows", 2, "--json")
    assert ran.code == 0
    measured = json.loads(ran.out)["perplexity"]["wikitext2"]
    assert measured["split"] == "test"
    assert measured["windows"] == 2
    again = json.loads(run("eval", finished, "--seq-len", 64, "--max-windows", 2, "--json", "--unpack").out)
    unpacked = again["perplexity"]["wikitext2"]
    assert unpacked["value"] == pytest.approx(measured["value"], rel=1e-5)
    assert unpacked["backend"] == "dense (torch)" != measured["backend"]


def test_resume_and_overwrite_from_the_command_line(run: Run, tiny: Tiny, text_file: Path, tmp_path: Path) -> None:
    """A finished run is complete; --overwrite does it again."""
    command = ["compress", tiny("opt"), "--out", tmp_path / "out", "--calibration", text_file]
    command += ["--samples", 2, "--seq-len", 16]
    assert run(*command, "--resume").code == 0
    again = run(*command, "--resume")
    assert again.code == 0
    assert again.err.splitlines() == [f"{tmp_path / 'out'} is already complete"]
    assert "stored" in again.out
    assert_one_line(run(*command, "--resume", "--seed", 1), "another recipe (calibration differs)")
    assert run(*command, "--seed", 1, "--overwrite").code == 0


def test_env(run: Run) -> None:
    """Versions and devices, for a person and for a machine."""
    facts = json.loads(run("env", "--json").out)
    assert facts["subbit"] == subbit.__version__
    assert facts["torch"] == torch.__version__
    assert {"python", "platform", "transformers", "threads", "gpu", "backend", "data"} <= facts.keys()
    assert f"torch         {torch.__version__}" in run("env").out


@pytest.mark.parametrize("command", [[], ["compress"], ["eval"], ["generate"], ["inspect"], ["env"]])
def test_help(command: list[str], run: Run) -> None:
    """Every command has one."""
    ran = run(*command, "--help")
    assert ran.code == 0
    assert "Usage: " in ran.out


def test_an_interrupt_says_how_to_go_on(run: Run, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C: no traceback, the exit code of the shell."""

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("subbit.compress", interrupt)
    ran = run("compress", tiny("opt"), "--out", tmp_path / "out")
    assert ran.code == 130
    assert "--resume" in ran.err
    assert "Traceback" not in ran.err


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_options_go_before_the_recipe_file_and_set_goes_before_both(tmp_path: Path) -> None:
    """The later the word, the more it counts."""
    file = tmp_path / "recipe.yaml"
    file.write_text("method: stbllm\nsparsity: 4:8\noptions: {block_size: 64}\ncalibration: {samples: 7, seed: 3}\n")
    expected = {"method": "stbllm", "options": {"block_size": 64}, "calibration": {"samples": 7, "seed": 3}}
    assert build_recipe(file, {}, []) == Recipe.create(expected)
    recipe = build_recipe(file, {"calibration.samples": 9, "sparsity": "6:8"}, ["calibration.samples=11"])
    assert recipe.calibration.samples == 11
    assert recipe.calibration.seed == 3
    assert recipe.sparsity == "6:8"
    assert recipe.options.block_size == 64


def test_another_method_does_not_inherit_the_options_of_the_file(tmp_path: Path) -> None:
    """They are another method's; the same method named again keeps them, also where the file leaves it out."""
    file = tmp_path / "recipe.yaml"
    file.write_text("method: stbllm\noptions: {standardize: false}\nallocation: {kind: outliers}\n")
    assert build_recipe(file, {"method": "pbs2p"}, []) == Recipe.create({"method": "pbs2p"})
    assert build_recipe(file, {"method": "stbllm"}, []).options.standardize is False
    file.write_text("options: {steps: 2}\n")
    assert build_recipe(file, {"method": "pbs2p"}, []).options.steps == 2


def test_a_sparsity_needs_no_quotes_in_yaml(tmp_path: Path) -> None:
    """YAML 1.1 would read 4:8 as a number in base 60."""
    file = tmp_path / "recipe.yaml"
    file.write_text("sparsity: 6:16\noverrides:\n  re:down_proj:\n    sparsity: 3:4\n")
    recipe = Recipe.from_yaml(file)
    assert recipe.sparsity == "6:16"
    assert recipe.overrides["re:down_proj"].sparsity == "3:4"
    assert build_recipe(None, {}, ["sparsity=5:8"]).sparsity == "5:8"
    assert build_recipe(None, {}, ["options.damping=1e-3", "calibration.clip_norm=0.5"]).options.damping == 1e-3


def test_recipe_yaml_round_trip(tmp_path: Path) -> None:
    """Every field is written, and what is written reads back equal, also with another YAML reader."""
    recipe = Recipe.create(
        {
            "method": "stbllm",
            "sparsity": "6:16",
            "options": {"block_size": 64, "score": "wanda"},
            "allocation": {"kind": "outliers", "n_low": 1.5, "n_high": 8},
            "calibration": {"source": "texts/a b: c.txt", "seed": 5},
            "overrides": {r"re:\.0\..*o_proj$": {"sparsity": "3:4"}, "model.layers.1.mlp.up_proj": {"dense": True}},
        }
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert yaml.safe_load(recipe.to_yaml()) == recipe.to_dict()
    assert list(recipe.overrides) == list(Recipe.from_yaml(tmp_path / "recipe.yaml").overrides)
    assert Recipe.create(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_recipes_do_not_change() -> None:
    """A recipe is a value."""
    recipe = Recipe()
    for name, value in {"method": "stbllm", "sparsity": "1:4", "options": None}.items():
        with pytest.raises(ValueError, match="frozen"):
            setattr(recipe, name, value)
    with pytest.raises(UserError, match="unknown: there is no such field"):
        Recipe.create({"unknown": 1})


def test_the_installed_command_is_main() -> None:
    """``subbit`` on the command line is the function that these tests call."""
    (command,) = entry_points(group="console_scripts", name="subbit")
    assert command.load() is main


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "examples" / "recipes").glob("*.yaml")), ids=lambda file: file.stem
)
def test_the_example_recipes_are_valid(file: Path) -> None:
    """Every recipe that the repository offers."""
    assert Recipe.from_yaml(file).method in file.name
