import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slope_jax import masks

pytestmark = pytest.mark.usefixtures("strict_dtypes")

PATTERNS = ["1:2", "2:4", "1:4", "2:8", "4:8"]
# method: "= 12.5 % (1:2), 9.375 % (2:4), 7.910 % (1:4), 5.840 % (2:8), 6.836 % (4:8)"
EXTRA = {"1:2": 12.5, "2:4": 9.375, "1:4": 7.910, "2:8": 5.840, "4:8": 6.836}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_extra_sparsity_matches_the_published_figures_and_exact_counting(pattern):
    assert round(100 * masks.extra_sparsity(pattern), 3) == EXTRA[pattern]
    n, m = map(int, pattern.split(":"))
    exact = sum(
        Fraction(math.comb(m, j) * n**j * (m - n) ** (m - j) * max(j - n, 0), m**m * m)
        for j in range(m + 1)
    )
    assert masks.extra_sparsity(pattern) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_double_pruned_density_follows_the_closed_form(pattern):
    n, m = map(int, pattern.split(":"))
    w = jax.random.normal(jax.random.key(1), (1024, 1024))
    w_r = jnp.where(masks.random_mask(jax.random.key(0), w.shape, pattern), w, 0.0)
    mask_rc = masks.double_prune(w_r, pattern)
    expected = n / m - masks.extra_sparsity(pattern)
    assert abs(float(mask_rc.mean()) - expected) < 0.002
    assert masks.is_nm(mask_rc, pattern, axis=1)
    assert masks.is_nm(mask_rc, pattern, axis=0)
    assert not bool((mask_rc & (w_r == 0)).any())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_keep_exactly_n_of_m(pattern, axis):
    n, m = map(int, pattern.split(":"))
    w = jax.random.normal(jax.random.key(0), (32, 64))
    for mask in (
        masks.magnitude_mask(w, pattern, axis=axis),
        masks.score_mask(w, pattern, axis=axis),
        masks.random_mask(jax.random.key(2), w.shape, pattern, axis=axis),
    ):
        lines = np.moveaxis(np.asarray(mask), axis, -1)
        assert (lines.reshape(lines.shape[0], -1, m).sum(-1) == n).all()


def test_magnitude_keeps_the_largest_and_scores_the_highest():
    w = jnp.array([[3.0], [-4.0], [1.0], [2.0]])
    assert masks.magnitude_mask(w, "2:4")[:, 0].tolist() == [True, True, False, False]
    assert masks.score_mask(w, "2:4")[:, 0].tolist() == [True, False, False, True]


def test_random_mask_chooses_every_combination_equally_often():
    mask = np.asarray(masks.random_mask(jax.random.key(0), (4, 60_000), "2:4"))
    codes = (mask * np.array([[1], [2], [4], [8]])).sum(0)
    found, counts = np.unique(codes, return_counts=True)
    assert found.tolist() == [3, 5, 6, 9, 10, 12]
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi_square < 20.5  # 0.1 % quantile of chi square with 5 degrees of freedom


def test_double_prune_loses_nothing_where_n_or_fewer_survive():
    w = jnp.array([[0.0, 5.0, 0.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    expected = [[False, True, False, True], [True, True, False, False]]
    assert masks.double_prune(w, "2:4").tolist() == expected


def test_is_nm_tells_the_axes_apart():
    mask = np.array([[True, True, True, True], [False] * 4] * 2)
    assert masks.is_nm(mask, "2:4", axis=0)
    assert not masks.is_nm(mask, "2:4", axis=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks.random_mask(jax.random.key(0), (6, 4), "2:4"), "6 entries"),
        (lambda: masks.is_nm(np.ones((4, 4)), "2:4"), "bool"),
        (lambda: masks.is_nm(np.ones((6, 4), bool), "2:4"), "6 entries"),
        (lambda: masks.magnitude_mask(jnp.ones((4, 4)), "5:4"), "5:4"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_of_other_dtypes_are_named():
    for w in (np.ones((8, 4)), jnp.ones((8, 4), int)):
        with pytest.raises(ValueError, match=f"w has dtype {w.dtype}; it must be float32"):
            masks.magnitude_mask(w, "2:4")
