"""Local files of zero-shot tasks, item by item in the form that lm-evaluation-harness's own task definitions read.

The definitions (YAML) beside this file name :func:`load` as their data set. But for that they are lm-eval's own, so a
number differs from its own only where a file does; `LocalTask.note` says where. Plain lm-eval takes them too:

    lm_eval --model hf --model_args pretrained=MODEL --include_path THIS_FOLDER --tasks subbit_arc_easy
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from subbit.calibration.text import data_root, read_utf8
from subbit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["LOCAL_TASKS", "LocalTask", "find_file", "load", "read_items"]

Item = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """A file below `tasks/` of the data folder, and how its items come to the form that the YAML expects."""

    file: str
    parse: Callable[[str], Iterator[Item]]  # raises _Malformed
    note: str = ""  # how the items differ from those of lm-eval's own task; empty where they do not


class _Malformed(Exception):  # noqa: N818 (becomes a UserError)
    """What is wrong with a line (counted from 1)."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


def load(task: str, **_: Any) -> dict[str, Dataset]:
    """What lm-eval calls: the items of a local file as the split "test". Raises UserError as `read_items` does."""
    from datasets import Dataset

    return {"test": Dataset.from_list(read_items(task))}


def find_file(task: str) -> Path | None:
    """The local file of a task, if it is in the data folder."""
    path = data_root() / "tasks" / LOCAL_TASKS[task].file
    return path if path.is_file() else None


def read_items(task: str) -> list[Item]:
    """All items of a task. UserError for a file that is missing, empty or malformed: with its line."""
    local = LOCAL_TASKS[task]
    path = data_root() / "tasks" / local.file
    text = read_utf8(path, f"{task}: {path}", "set SUBBIT_DATA to the folder that has tasks/", "get the file again")
    try:
        items = list(local.parse(text))
    except _Malformed as error:
        raise UserError(f"{task}: {path}, line {error.line}: {error}; get the file again") from None
    if not items:
        raise UserError(f"{task}: {path} is empty; get the file again")
    return items


# ---- lines of JSON ---------------------------------------------------------------------------------------------------


class _Row(BaseModel, strict=True):
    """The fields of a line; others are ignored."""


_AnyRow = TypeVar("_AnyRow", bound=_Row)


class _QuestionRow(_Row):
    query: str
    choices: list[str]
    gold: int


class _ContextRow(_Row):
    context_options: list[str]
    continuation: str
    gold: int


class _Labelled(_Row):
    text: str
    label: str


class _Question(_Row):
    stem: str
    choices: list[_Labelled]


class _OpenBookRow(_Row):
    question: _Question
    answerKey: str  # noqa: N815 (the file's spelling)


class _TextRow(_Row):
    text: str


def _rows(text: str, kind: type[_AnyRow]) -> Iterator[tuple[int, _AnyRow]]:
    """Number and contents of every line that is not blank."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, kind.model_validate_json(line)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise _Malformed(number, f"{where}: {first['msg']}" if where else first["msg"]) from None


def _require(condition: bool, line: int, reason: str) -> None:
    if not condition:
        raise _Malformed(line, reason)


# ---- the tasks -------------------------------------------------------------------------------------------------------


def _arc(text: str) -> Iterator[Item]:
    """Items with three answers were filled up to four with a repeated one; a repetition is no answer of its own."""
    for line, row in _rows(text, _QuestionRow):
        answers = list(dict.fromkeys(row.choices))
        _require(row.query.startswith("Question: "), line, 'query does not begin with "Question: "')
        _require(0 <= row.gold < len(row.choices), line, f"gold {row.gold} is no index of its choices")
        _require(len(answers) > 1, line, "there is no second answer")
        labels = [chr(ord("A") + index) for index in range(len(answers))]
        key = labels[answers.index(row.choices[row.gold])]
        question = row.query.removeprefix("Question: ")
        yield {"question": question, "choices": {"text": answers, "label": labels}, "answerKey": key}


def _winogrande(text: str) -> Iterator[Item]:
    for line, row in _rows(text, _ContextRow):
        _require(len(row.context_options) == 2, line, f"{len(row.context_options)} context_options instead of 2")
        _require(row.gold in (0, 1), line, f"gold {row.gold} is neither 0 nor 1")
        yield {"contexts": row.context_options, "continuation": row.continuation, "gold": row.gold}


def _boolq(text: str) -> Iterator[Item]:
    for line, row in _rows(text, _QuestionRow):
        passage, separator, question = row.query.removeprefix("Passage: ").rpartition("\nQuestion: ")
        _require(bool(separator) and row.query.startswith("Passage: "), line, 'query is not "Passage: …\\nQuestion: …"')
        _require(row.choices == ["no", "yes"] and row.gold in (0, 1), line, "the answers are not no (0) and yes (1)")
        yield {"passage": passage, "question": question.removesuffix("?"), "label": row.gold}


def _openbookqa(text: str) -> Iterator[Item]:
    for line, row in _rows(text, _OpenBookRow):
        choices = row.question.choices
        labels = [choice.label for choice in choices]
        _require(row.answerKey in labels, line, f"answerKey {row.answerKey!r} is no label of its choices")
        answers = {"text": [choice.text for choice in choices], "label": labels}
        yield {"question_stem": row.question.stem, "choices": answers, "answerKey": row.answerKey}


def _lambada(text: str) -> Iterator[Item]:
    for line, row in _rows(text, _TextRow):
        _require(" " in row.text.strip(), line, "the text has no last word to predict")
        yield {"text": row.text}


def _rte(text: str) -> Iterator[Item]:
    """GLUE's TSV, which knows no quoting."""
    header, *lines = text.removesuffix("\n").split("\n")
    columns = ["index", "sentence1", "sentence2", "label"]
    _require(header.split("\t") == columns, 1, f"the columns are not {', '.join(columns)}")
    labels = ["entailment", "not_entailment"]
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        _require(len(cells) == len(columns), number, f"{len(cells)} columns instead of {len(columns)}")
        _require(cells[3] in labels, number, f"label {cells[3]!r} is neither {labels[0]} nor {labels[1]}")
        yield {"sentence1": cells[1], "sentence2": cells[2], "label": labels.index(cells[3])}


def _hellaswag(text: str) -> Iterator[Item]:
    """llama.cpp's form: six lines an item, context, number of the right ending, four endings."""
    lines = text.removesuffix("\n").split("\n")
    for first in range(0, len(lines), 6):
        item = lines[first : first + 6]
        _require(len(item) == 6, first + 1, f"the last item has {len(item)} lines instead of 6")
        _require(item[1] in ("0", "1", "2", "3"), first + 2, f"{item[1][:40]!r} is no number of an ending, 0 to 3")
        _require(all(item), first + 1, "a line of this item is empty")
        yield {"query": item[0], "choices": item[2:], "label": int(item[1])}


LOCAL_TASKS = {
    "winogrande": LocalTask("winogrande/dev_llmfoundry.jsonl", _winogrande),
    "openbookqa": LocalTask("openbookqa/test.jsonl", _openbookqa),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag_val_full.txt",
        _hellaswag,
        "llama.cpp's text form, which does not capitalise the second half of the context as lm-eval does",
    ),
    "boolq": LocalTask(
        "boolq/dev_llmfoundry.jsonl", _boolq, "passages lack the title that lm-eval's own items begin with"
    ),
    "arc_easy": LocalTask("arc_easy/test_llmfoundry.jsonl", _arc, "a fifth answer, where lm-eval has one, is missing"),
    "arc_challenge": LocalTask(
        "arc_challenge/test_llmfoundry.jsonl", _arc, "a fifth answer, where lm-eval has one, is missing"
    ),
    "rte": LocalTask("rte/dev.tsv", _rte),
    "lambada_openai": LocalTask("lambada/lambada_test.jsonl", _lambada),
}
