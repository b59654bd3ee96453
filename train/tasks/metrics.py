"""Metrics of GLUE and SQuAD, as fractions: 1.0 is perfect.

Where a formula divides by zero (predictions of one class only, scores that are all the same) the
result is 0.0: nothing was told apart.
"""

import collections
import math
import re
import string
from collections.abc import Callable, Iterable, Sequence

import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(predictions: Sequence, labels: Sequence) -> float:
    """Share of the predictions that are right."""
    return float(np.mean(np.asarray(predictions) == np.asarray(labels)))


def f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """F1 of class 1: harmonic mean of precision and recall."""
    found, true = np.asarray(predictions) == 1, np.asarray(labels) == 1
    return _ratio(2.0 * (found & true).sum(), found.sum() + true.sum())


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Matthews' correlation of two classes, 0 and 1."""
    found, true = np.asarray(predictions) == 1, np.asarray(labels) == 1
    right, missed = int((found & true).sum()), int((~found & true).sum())
    wrong, rejected = int((found & ~true).sum()), int((~found & ~true).sum())
    sums = (right + wrong, right + missed, rejected + wrong, rejected + missed)
    return _ratio(right * rejected - wrong * missed, math.sqrt(math.prod(sums)))


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Pearson's correlation."""
    x, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    if (x == x[0]).all() or (y == y[0]).all():
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return _ratio(float(x @ y), math.sqrt(float(x @ x) * float(y @ y)))


def spearman(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share the mean of their ranks."""
    return pearson(_ranks(predictions), _ranks(labels))


METRICS: dict[str, Callable[[Sequence, Sequence], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def normalise(answer: str) -> str:
    """An answer as SQuAD compares it: lower case, no punctuation, no articles, single spaces."""
    text = answer.lower().translate(_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the prediction is one of the answers, both normalised."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def answer_f1(prediction: str, answers: Iterable[str]) -> float:
    """F1 of the words that prediction and answer share, of the answer that fits best."""
    return max(_overlap(prediction, answer) for answer in answers)


def _overlap(prediction: str, answer: str) -> float:
    found, true = normalise(prediction).split(), normalise(answer).split()
    shared = (collections.Counter(found) & collections.Counter(true)).total()
    return _ratio(2.0 * shared, len(found) + len(true))


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place]


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator else 0.0
