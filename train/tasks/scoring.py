"""From predictions to a task's metrics."""

from typing import Any

import numpy as np

from train.tasks.examples import Example
from train.tasks.features import Features
from train.tasks.metrics import METRICS, answer_f1, exact_match
from train.tasks.registry import SPAN, Task


def score(
    task: Task, examples: list[Example], features: Features, predicted: Any
) -> dict[str, float]:
    """The metrics of a split, the main one first.

    Args:
      task, examples, features: the split.
      predicted: what `train.tasks.step.predict` gives for `features`.
    """
    if task.kind == SPAN:
        answers = best_answers(examples, features, *predicted)
        pairs = [(a, [t for _, t in e.answers]) for a, e in zip(answers, examples, strict=True)]
        measures = {"f1": answer_f1, "exact_match": exact_match}
        return {name: float(np.mean([measures[name](*p) for p in pairs])) for name in task.metrics}
    return {name: METRICS[name](predicted, features.labels) for name in task.metrics}


def best_answers(
    examples: list[Example],
    features: Features,
    scores: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
) -> list[str]:
    """The text of the likeliest span of each example, over all its windows."""
    best: dict[int, int] = {}
    for window, example in enumerate(features.example.tolist()):
        if example not in best or scores[window] > scores[best[example]]:
            best[example] = window
    answers = []
    for i, example in enumerate(examples):
        window = best[i]
        begin = features.offsets[window, first[window], 0]
        end = features.offsets[window, last[window], 1]
        answers.append(example.texts[1][begin:end].strip())
    return answers
