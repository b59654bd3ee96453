"""The tasks by name: their columns, labels, metrics and usual settings.

GLUE: Wang et al., arXiv 1804.07461; the names of columns and the order of labels are those of
TensorFlow Datasets. SQuAD v1.1: Rajpurkar et al., arXiv 1606.05250. Epochs and lengths are those of
the SLoPe paper (arXiv 2405.16325, appendix).
"""

import dataclasses

CLASSES, SCORE, SPAN = "classes", "score", "span"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      name: as given to `--task`, and of TensorFlow Datasets.
      folder: what published archives call its folder.
      columns: the one or two texts of an example.
      labels: names of the classes in order; none for a score or a span.
      metrics: names of its metrics, the main one first; larger is better.
      kind: "classes", "score" (a real number) or "span" (of the second text).
      held_out: splits to evaluate on, as TensorFlow Datasets call them.
      aliases: names that published files give to columns, by ours.
      epochs, seq_len, lr: settings where none are given.
    """

    name: str
    folder: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    kind: str = CLASSES
    held_out: tuple[str, ...] = ("validation",)
    aliases: tuple[tuple[str, str], ...] = ()
    epochs: int = 3
    seq_len: int = 128
    lr: float = 5e-5

    @property
    def outputs(self) -> int:
        """Numbers that the head gives: for a sequence, or for each token of a span task."""
        return {CLASSES: len(self.labels), SCORE: 1, SPAN: 2}[self.kind]


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_TABLE = (
    Task(
        "glue/cola",
        "CoLA",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews", "accuracy"),
        epochs=5,
    ),
    Task("glue/sst2", "SST-2", ("sentence",), ("negative", "positive"), ("accuracy",)),
    Task(
        "glue/mrpc",
        "MRPC",
        _PAIR,
        ("not_equivalent", "equivalent"),
        ("f1", "accuracy"),
        aliases=(("sentence1", "#1 String"), ("sentence2", "#2 String"), ("label", "Quality")),
    ),
    Task(
        "glue/qqp",
        "QQP",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("f1", "accuracy"),
        aliases=(("label", "is_duplicate"),),
    ),
    Task(
        "glue/stsb",
        "STS-B",
        _PAIR,
        (),
        ("pearson", "spearman"),
        kind=SCORE,
        aliases=(("label", "score"),),
    ),
    Task(
        "glue/mnli",
        "MNLI",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        held_out=("validation_matched", "validation_mismatched"),
        aliases=(("premise", "sentence1"), ("hypothesis", "sentence2"), ("label", "gold_label")),
    ),
    Task("glue/qnli", "QNLI", ("question", "sentence"), _ENTAILMENT, ("accuracy",)),
    Task("glue/rte", "RTE", _PAIR, _ENTAILMENT, ("accuracy",)),
    Task("glue/wnli", "WNLI", _PAIR, ("not_entailment", "entailment"), ("accuracy",)),
    Task(
        "squad",
        "SQuAD",
        ("question", "context"),
        (),
        ("f1", "exact_match"),
        kind=SPAN,
        epochs=2,
        seq_len=384,
        lr=3e-5,
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _TABLE}


def find_task(name: str) -> Task:
    """The task of a name; "sst2" is "glue/sst2".

    Raises:
      ValueError: no such task; lists all.
    """
    task = TASKS.get(name) or TASKS.get(f"glue/{name}")
    if task is None:
        raise ValueError(f"unknown task {name!r}; choose one of: {', '.join(TASKS)}")
    return task
