"""Cleaning documentation, splitting sentences."""

import ast
import re
import sysconfig
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from train.data import docs_corpus, segment
from train.data.docs_corpus import DocsSource
from train.data.prose import prose, reads_well

NUMPY_STYLE = """
Compute the mean of the values along the given axis of an array.

.. versionadded:: 1.7

Parameters
----------
a : array_like
    The array that contains the numbers whose mean is wanted by the caller.
axis : None or int, optional
    Axis along which the means are computed. The default is to use all of the axes.

Returns
-------
m : ndarray
    If it is given then a reference to the output array is returned.

Notes
-----
The arithmetic mean is the sum of the elements divided by their number::

    mean = total / count

It is a good idea to read :func:`numpy.median <numpy>` before ``average`` is used [1]_.

.. math:: \\frac{1}{n} \\sum_i a_i

======  =====================
name    what is in the column
======  =====================
a       the first of the rows
======  =====================

Examples
--------
>>> a = np.array([[1, 2], [3, 4]])
>>> np.mean(a)
2.5

The last paragraph is prose and should be kept as it stands.
"""

GOOGLE_STYLE = """
Restores the checkpoint that was written at the given step.

Args:
  directory: The folder in which all of the checkpoints are to be found.
  keep_all_of_the_older_ones (`Optional[bool]`, *optional*, defaults to `False`):
    Whether the checkpoints of the steps before it should be kept.
  step (int): The step that should be restored, or the latest if it is None.

Returns:
  The state as it was when the checkpoint was written to the disk.
"""

MARKDOWN = """
# A title that should not be there

[![badge](https://example.org/x.svg)](https://example.org)

This library is for *people* who want to read [the manual](https://example.org) of it.

```python
this is not a sentence but it is long enough to be one of them
```

- The first item of the list is a sentence that can be kept.

| a | b |
|---|---|

Copyright (c) the authors of this, and all rights are reserved by them.
"""


def test_numpy_docstring_becomes_prose():
    assert prose(NUMPY_STYLE) == [
        "Compute the mean of the values along the given axis of an array.",
        "The array that contains the numbers whose mean is wanted by the caller.",
        "Axis along which the means are computed. The default is to use all of the axes.",
        "If it is given then a reference to the output array is returned.",
        "It is a good idea to read numpy.median before average is used.",
        "The last paragraph is prose and should be kept as it stands.",
    ]


def test_google_docstring_becomes_prose():
    assert prose(GOOGLE_STYLE) == [
        "Restores the checkpoint that was written at the given step.",
        "The folder in which all of the checkpoints are to be found.",
        "Whether the checkpoints of the steps before it should be kept.",
        "The step that should be restored, or the latest if it is None.",
        "The state as it was when the checkpoint was written to the disk.",
    ]


def test_markdown_becomes_prose():
    assert prose(MARKDOWN) == [
        "This library is for people who want to read the manual of it.",
        "The first item of the list is a sentence that can be kept.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Too short.",
        "x = f(a, b)[0] + g(c) if d else e.f.g(h) for i in range(j) or k",
        "0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8 0.9 the of and to in is a for",
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi.",
        "See https://example.org for the details of what it is that is meant.",
        "Licensed under the terms of this or that agreement of the two parties.",
        "The density of the distribution for all of the values is given by",
    ],
)
def test_what_is_not_prose_is_dropped(text):
    assert not reads_well(text)


@hypothesis.given(st.text())
def test_prose_takes_any_text(text):
    for paragraph in prose(text):
        assert "\n" not in paragraph


def test_docstrings_are_read_without_running_the_module(tmp_path):
    source = '''"""Module text."""
raise SystemExit("ran")
class A:
    """Class text."""
    async def f(self):
        """Method text."""
if True:
    def g():
        "Function text." """ And more."""
add_newdoc("numpy", "x", """
    Added text.
    """)
'''
    assert [*docs_corpus._docstrings(source)] == [
        "Module text.",
        "Class text.",
        "Method text.",
        "Function text. And more.",
        "numpy",
        "x",
        "Added text.",
    ]
    assert [*docs_corpus._docstrings('"""not python: """ = (')] == []


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    """A small docs corpus of this machine: its units, and a second build of it elsewhere."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    source = DocsSource(megabytes=3)
    return [source.units(folder, workers=1) for folder in folders], folders


def test_docs_are_deterministic_and_bounded(docs):
    (units, _), folders = docs
    contents = [next(folder.glob("docs-*/documents.jsonl")).read_bytes() for folder in folders]
    assert contents[0] == contents[1]
    assert DocsSource(3).fingerprint == DocsSource(3).fingerprint != DocsSource(4).fingerprint
    assert sum(file.size for file in DocsSource(3)._files) <= 3_000_000
    assert sum(1 for unit in units for _ in unit.documents()) >= 20


def test_docs_read_as_english_without_duplicates(docs):
    (units, _), _ = docs
    documents = [text for unit in units for text in unit.documents()]
    paragraphs = [p for text in documents for p in text.split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert min(map(len, documents)) >= docs_corpus.MIN_DOCUMENT_CHARS
    words = re.findall(r"[a-z]+", " ".join(paragraphs).lower())
    # In English running text "the" is about one word in twenty, "of" one in forty.
    assert 0.03 < words.count("the") / len(words) < 0.12
    assert 0.01 < words.count("of") / len(words) < 0.05
    assert sum(p.count(">>>") + p.count("::") for p in paragraphs) < 0.01 * len(paragraphs)


def test_topics_of_the_python_reference_are_found():
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    topics = docs_corpus._topics(path.read_text(encoding="utf-8"))
    assert "comparisons" in topics
    assert topics == next(
        ast.literal_eval(node.value)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
    )
    assert any("exception" in paragraph for paragraph in prose(topics["try"]))


def test_sentences_of_english():
    text = 'One is here. "Two?" is it, e.g. this. Mr. X came! It costs 3.5 dollars.\n\nNew one'
    assert [*segment.sentences(text)] == [
        "One is here.",
        ' "Two?" is it, e.g. this.',
        " Mr. X came!",
        " It costs 3.5 dollars.",
        "\n\nNew one",
    ]


@hypothesis.given(st.text(alphabet="aA1 .!?\n\"')(e.g", max_size=300) | st.text())
def test_sentences_join_to_the_text(text):
    assert "".join(segment.sentences(text)) == text


def test_text_without_sentences_is_cut():
    pieces = [*segment.sentences("x" * 10_000)]
    assert "".join(pieces) == "x" * 10_000
    assert max(map(len, pieces)) <= segment.MAX_SENTENCE_CHARS


@hypothesis.given(st.lists(st.integers(0, 400), max_size=40))
def test_sentence_ends_are_bounded_and_complete(lengths):
    total = sum(lengths)
    ends = segment.sentence_ends(np.array(lengths, np.int64))
    assert ends[-1] == total
    if total >= segment.MIN_SENTENCE_TOKENS:
        sizes = np.diff(ends, prepend=0)
        assert sizes.min() >= segment.MIN_SENTENCE_TOKENS
        assert sizes.max() <= segment.MAX_SENTENCE_TOKENS + 2 * segment.MIN_SENTENCE_TOKENS
