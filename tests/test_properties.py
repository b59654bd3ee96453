"""What holds for every mask, every compressed matrix and every pattern, whatever the numbers."""

import contextlib

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compress, decompress, double_prune, magnitude_mask

from pallas_kernels import Pattern
from slope_jax import masks
from slope_jax.policy import SparsityPolicy

hypothesis_settings = hypothesis.settings(max_examples=25)
patterns = st.sampled_from(["1:2", "2:4", "2:8", "1:4", "3:4", "4:4"])
# Zeros of both signs, ties, extremes.
entries = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-38, -1e-38, 3e38, 0.5, -2.0, 7.25])


@st.composite
def weights(draw, pattern):
    """(inputs, outputs), both multiples of m; of a few shapes only, which are compiled once."""
    m = Pattern.parse(pattern).m
    count = 2 * m * m
    values = draw(st.lists(entries, min_size=count, max_size=count))
    return jnp.asarray(values, jnp.float32).reshape(2 * m, m)


def groups(mask, m, axis):
    return np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, m).sum(-1)


@hypothesis.given(st.data(), patterns, st.sampled_from([0, 1]))
@hypothesis_settings
def test_masks_keep_n_of_every_m_and_the_largest(data, pattern, axis):
    w, (n, m) = data.draw(weights(pattern)), map(int, pattern.split(":"))
    mask = magnitude_mask(w, pattern, axis=axis)
    assert (groups(mask, m, axis) == n).all()
    assert masks.is_nm(mask, pattern, axis=axis)
    size = np.moveaxis(np.abs(np.asarray(w)), axis, -1).reshape(-1, m)
    kept = np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, m)
    lowest = np.where(kept, size, np.inf).min(-1)
    highest = np.where(kept, -np.inf, size).max(-1)
    assert (lowest >= highest).all()


@hypothesis.given(st.data(), patterns)
@hypothesis_settings
def test_compression_loses_nothing_that_is_kept(data, pattern):
    w = data.draw(weights(pattern))
    mask = magnitude_mask(w, pattern)
    made = compress(w, pattern, mask=mask)
    assert made.values.size == w.size * Pattern.parse(pattern).density
    wanted = np.where(np.asarray(mask), np.asarray(w), np.float32(0))
    np.testing.assert_array_equal(decompress(made), wanted)
    again = compress(decompress(made), pattern, mask=mask)
    np.testing.assert_array_equal(again.metadata, made.metadata)
    np.testing.assert_array_equal(again.values, made.values)


@hypothesis.given(st.data(), st.sampled_from(["1:2", "2:4", "2:8", "1:4", "3:4"]))
@hypothesis_settings
def test_double_pruning_prunes_more_and_along_both_axes(data, pattern):
    w, (n, m) = data.draw(weights(pattern)), map(int, pattern.split(":"))
    mask_r = np.asarray(magnitude_mask(w, pattern))
    mask_rc = np.asarray(double_prune(jnp.where(mask_r, w, 0), pattern)) & mask_r
    assert not (mask_rc & ~mask_r).any()
    assert (groups(mask_rc, m, 0) <= n).all()
    assert (groups(mask_rc, m, 1) <= n).all()


@hypothesis.given(st.text(max_size=8) | st.from_regex(r"\s*\d{1,3}\s*:\s*\d{1,3}", fullmatch=True))
def test_patterns_are_read_or_refused(text):
    with contextlib.suppress(ValueError):
        pattern = Pattern.parse(text)
        assert Pattern.parse(str(pattern)) == pattern
        assert 1 <= pattern.n <= pattern.m <= 16


@hypothesis.given(st.lists(st.tuples(st.text(max_size=6), st.text(max_size=4)), max_size=3))
def test_policies_are_read_or_refused(rules):
    with contextlib.suppress(ValueError):
        SparsityPolicy(tuple(rules)).resolve(["layers/0/mlp/up", "layers/1/mlp/up"])


@pytest.mark.parametrize("arguments", [["--steps=x"], ["--clip=-1"], ["--model=?"], ["--what"]])
def test_bad_options_of_the_command_are_named(arguments, capsys):
    from train.pretrain import main

    try:
        code = main([*arguments, "--dry-run"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    text = "".join(capsys.readouterr())
    assert arguments[0].strip("-").split("=")[0] in text
    assert "Traceback" not in text
