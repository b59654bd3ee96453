"""What a configuration must get right before it is timed: right products pass, wrong ones are stopped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gate, nm_matmul, nm_sddmm


def xla_matmul(x, w):
    return nm_matmul(x, w, implementation="xla")


def xla_sddmm(x, dy, w):
    return nm_sddmm(x, dy, w, implementation="xla")


SHAPE = (40, 24, 72)


def test_the_gate_lets_right_products_pass():
    gate.check_matmul(jax.jit(xla_matmul), *SHAPE)
    gate.check_sddmm(jax.jit(xla_sddmm), *SHAPE)


def flaky():
    count = iter(range(100))

    def run(x, w):
        y = xla_matmul(x, w)
        return y.at[0, 0].multiply(1 + 0.01 * (next(count) > 5))

    return run


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x, w: xla_matmul(x, w).at[-1, -1].add(1), "integers: 1 of 2880 .* at \\(39, 71\\)"),
        (lambda x, w: jnp.nan_to_num(xla_matmul(x, w)), "NaN and Inf in w"),
        (lambda x, w: xla_matmul(jnp.nan_to_num(x), w), "a NaN in x does not reach"),
        (lambda x, w: xla_matmul(x, w) + 0 * jnp.sum(x), "rows beside one with a NaN"),
        (lambda x, w: jnp.floor(4 * xla_matmul(x, w)) / 4, "error .* the dense product's"),
        (flaky(), "repeated runs differ"),
    ],
)
def test_the_gate_stops_wrong_products(run, message):
    with pytest.raises(gate.WrongResult, match=message):
        gate.check_matmul(run, *SHAPE)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x, dy, w: xla_sddmm(x[:32], dy[:32], w), "integers"),
        (lambda x, dy, w: jnp.nan_to_num(xla_sddmm(x, dy, w)), "NaN and Inf in x"),
    ],
)
def test_the_gate_stops_wrong_gradients(run, message):
    with pytest.raises(gate.WrongResult, match=message):
        gate.check_sddmm(run, *SHAPE)


def xla_with_first(x, w, left, right):
    return nm_matmul(x, w, adapter=(left, right), save_first=True, implementation="xla")


def without_adapter(x, w, left, right):
    return xla_matmul(x, w), xla_with_first(x, w, left, right)[1]


def one_wrong(x, w, left, right):
    y, t = xla_with_first(x, w, left, right)
    return y, t.at[-1, -1].add(1)


def nans_lost(x, w, left, right):
    y, t = xla_with_first(x, w, left, right)
    return y, jnp.nan_to_num(t)


def flaky_with_first():
    count = iter(range(100))

    def run(*operands):
        y, t = xla_with_first(*operands)
        return y.at[0, 0].multiply(1 + 0.01 * (next(count) > 3)), t

    return run


def test_the_gate_lets_right_pairs_of_products_pass():
    gate.check_with_first(jax.jit(xla_with_first), *SHAPE, 16)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (one_wrong, "the first product of integers: 1 of 640 .* at \\(39, 15\\)"),
        (without_adapter, "^integers"),
        (nans_lost, "a NaN in x does not reach all"),
        (flaky_with_first(), "repeated runs differ"),
    ],
)
def test_the_gate_stops_wrong_pairs_of_products(run, message):
    with pytest.raises(gate.WrongResult, match=message):
        gate.check_with_first(run, *SHAPE, 16)


def test_inputs_of_the_gate_are_adversarial():
    x = np.asarray(gate._integers(0, (64, 64), jnp.float32))
    assert (np.signbit(x) & (x == 0)).any()
    assert (~np.signbit(x) & (x == 0)).any()
    groups = np.abs(x).reshape(16, 4, 64)
    assert (groups == 0).all(1).any()
    assert (np.sort(groups, 1)[:, 1] == np.sort(groups, 1)[:, 2]).any()  # a tie at the border
