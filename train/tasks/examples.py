"""Examples of a task: from local files, or from TensorFlow Datasets.

    DIR/FOLDER/train.tsv, dev.tsv (MNLI: dev_matched.tsv, dev_mismatched.tsv)
        a header, then a line per example, separated by tabs, without quoting. Columns are found by
        name, `label` holds names of classes, their numbers, or a score
    DIR/SQuAD/train-v1.1.json, dev-v1.1.json

FOLDER is the task's (CoLA, SST-2, ...); the files may also lie in DIR itself.
"""

import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from train.tasks.registry import CLASSES, SCORE, SPAN, Task

TRAIN = "train"


class Example(NamedTuple):
    """One example.

    Attributes:
      texts: one text or two.
      label: the class's number or a score; 0 for spans.
      answers: of spans: (first character in the second text, the answer's text) each.
    """

    texts: tuple[str, ...]
    label: float = 0
    answers: tuple[tuple[int, str], ...] = ()


Splits = dict[str, list[Example]]


def read_splits(task: Task, data: str) -> Splits:
    """Training and held-out examples by split.

    Args:
      task: which one.
      data: a folder; empty: TensorFlow Datasets.

    Raises:
      ValueError: files, columns, labels or lines are missing or wrong; names them.
    """
    if not data:
        return _read_tfds(task)
    folder = _find_folder(task, pathlib.Path(data).expanduser())
    read = read_squad if task.kind == SPAN else read_tsv
    return {split: read(task, folder / name) for split, name in _files(task).items()}


def read_tsv(task: Task, path: pathlib.Path) -> list[Example]:
    """The examples of one file."""
    header, *lines = _read_text(path).split("\n")
    names = header.rstrip("\r").split("\t")
    columns = [_column(task, name, names, path) for name in (*task.columns, "label")]
    to_label = _label_reader(task)
    examples = []
    for number, line in enumerate(lines, 2):
        fields = line.rstrip("\r").split("\t")
        if fields == [""] and number == len(lines) + 1:
            break  # behind the last line's end
        if len(fields) != len(names):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} fields where the header names {len(names)};"
                f" separate fields by single tabs, without line ends in them"
            )
        *texts, label = (fields[i] for i in columns)
        try:
            examples.append(Example(tuple(texts), to_label(label)))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise ValueError(f"{path} holds no examples behind its header")
    return examples


def read_squad(task: Task, path: pathlib.Path) -> list[Example]:
    """The questions of a SQuAD v1.1 file; one without answers, as v2 has them, is refused."""
    try:
        content = json.loads(_read_text(path))
        examples = [
            Example(
                (entry["question"], paragraph["context"]),
                answers=tuple((int(a["answer_start"]), a["text"]) for a in entry["answers"]),
            )
            for article in content["data"]
            for paragraph in article["paragraphs"]
            for entry in paragraph["qas"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not in the format of SQuAD v1.1 ({type(error).__name__}: {error})"
        ) from error
    return _checked_answers(examples, str(path))


def _checked_answers(examples: list[Example], name: str) -> list[Example]:
    if not examples:
        raise ValueError(f"{name} holds no questions")
    return [e._replace(answers=tuple(_placed_answers(e, name))) for e in examples]


def _placed_answers(example: Example, name: str) -> Iterator[tuple[int, str]]:
    """The answers where they stand: some published positions are off by a character or two."""
    question, context = example.texts
    if not example.answers:
        raise ValueError(f"{name}: the question {question!r} has no answer; give SQuAD v1.1")
    for start, text in example.answers:
        places = [m.start() for m in re.finditer(re.escape(text), context)] if text else []
        if not places:
            raise ValueError(f"{name}: the context of {question!r} does not hold {text!r}")
        yield min(places, key=lambda place, start=start: abs(place - start)), text


def _files(task: Task) -> dict[str, str]:
    if task.kind == SPAN:
        return {TRAIN: "train-v1.1.json", "validation": "dev-v1.1.json"}
    dev = {split: f"{split.replace('validation', 'dev')}.tsv" for split in task.held_out}
    return {TRAIN: "train.tsv", **dev}


def _find_folder(task: Task, data: pathlib.Path) -> pathlib.Path:
    if not data.is_dir():
        raise ValueError(f"--data={data} is no folder")
    names = list(_files(task).values())
    short = task.name.removeprefix("glue/")
    for folder in (data / task.folder, data / short, data):
        if (folder / names[0]).is_file():
            break
    else:
        raise ValueError(
            f"--data={data} has neither {task.folder}/{names[0]} nor {names[0]}, which"
            f" --task={task.name} needs; leave out --data to use TensorFlow Datasets"
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which --task={task.name} needs")
    return folder


def _column(task: Task, name: str, names: list[str], path: pathlib.Path) -> int:
    choices = [name, *(theirs for ours, theirs in task.aliases if ours == name)]
    for choice in choices:
        if choice in names:
            return names.index(choice)
    raise ValueError(
        f"{path}: its first line names {', '.join(map(repr, names))}, but no column"
        f" {' or '.join(map(repr, choices))}; add a header with the columns of {task.name}:"
        f" {', '.join((*task.columns, 'label'))}"
    )


def _label_reader(task: Task) -> Callable[[str], float]:
    if task.kind == SCORE:
        return _score
    numbers = {name: i for i, name in enumerate(task.labels)}
    numbers |= {str(i): i for i in range(len(task.labels))}

    def read(text: str) -> int:
        if text not in numbers:
            allowed = ", ".join(f"{i} or {name}" for i, name in enumerate(task.labels))
            raise ValueError(f"unknown label {text!r}; {task.name} has {allowed}")
        return numbers[text]

    return read


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"label {text!r} is no number")
    return value


def _read_text(path: pathlib.Path) -> str:
    try:
        # Bytes first: universal newlines would split at a lone carriage return.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error})") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _read_tfds(task: Task) -> Splits:
    from train.data.tfds_source import read_records

    records = read_records(task.name, (TRAIN, *task.held_out))
    return {split: _from_records(task, split, rows) for split, rows in records.items()}


def _from_records(task: Task, split: str, records: list[dict[str, Any]]) -> list[Example]:
    name = f"tfds:{task.name} {split}"
    if task.kind == SPAN:
        examples = [Example(_texts(task, r), answers=_answers(r["answers"])) for r in records]
        return _checked_answers(examples, name)
    number = float if task.kind == SCORE else int
    examples = [Example(_texts(task, r), number(r["label"])) for r in records]
    if task.kind == CLASSES and any(not 0 <= e.label < len(task.labels) for e in examples):
        raise ValueError(f"{name} has examples without a label; it cannot be trained on or scored")
    return examples


def _texts(task: Task, record: dict[str, Any]) -> tuple[str, ...]:
    return tuple(_string(record[name]) for name in task.columns)


def _answers(answers: dict[str, Any]) -> tuple[tuple[int, str], ...]:
    starts, texts = answers["answer_start"], answers["text"]
    return tuple((int(s), _string(t)) for s, t in zip(starts, texts, strict=True))


def _string(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
