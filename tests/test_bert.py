"""BERT: padding, segments, masked positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slope_jax import models

pytestmark = pytest.mark.usefixtures("strict_dtypes")
RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(0, 61, (3, 12)), jnp.int32)
TYPES = jnp.asarray(RNG.integers(0, 2, (3, 12)), jnp.int32)
LENGTHS = jnp.asarray([12, 7, 1], jnp.int32)


@pytest.fixture(scope="module")
def bert():
    model = models.build(
        "bert-tiny",
        hidden_size=32,
        mlp_size=48,
        num_layers=2,
        vocab_size=61,
        max_positions=12,
        sparsity="1:2",
    )
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    # Larger weights, so that attention is not close to uniform.
    params = jax.tree.map(lambda leaf: 5 * leaf if leaf.ndim > 1 else leaf, variables["params"])
    variables = variables | {"params": params}
    return model, variables, jax.jit(lambda *a, **k: model.apply(variables, *a, **k))


def test_output(bert):
    model, _, run = bert
    out = run(IDS, TYPES, LENGTHS)
    assert isinstance(out, models.BertOutput)
    assert [x.shape for x in out] == [(3, 12, 64), (3, 2), (3, 32), (3, 12, 32)]
    assert model.example_inputs(2, 64)["lengths"].tolist() == [12, 12]


def test_padding_reaches_nothing(bert):
    """Rows padded to one batch agree with each sequence alone, whatever the padding holds."""
    _, _, run = bert
    out = run(IDS, TYPES, LENGTHS)
    other = run(
        *(jnp.where(jnp.arange(12)[None, :] < LENGTHS[:, None], x, 1) for x in (IDS, TYPES)),
        LENGTHS,
    )
    for i, length in enumerate(LENGTHS.tolist()):
        np.testing.assert_array_equal(out.hidden[i, :length], other.hidden[i, :length])
        alone = run(IDS[i : i + 1, :length], TYPES[i : i + 1, :length])
        for name in ("hidden", "mlm_logits"):
            got = getattr(out, name)[i, :length, :61]
            np.testing.assert_allclose(got, getattr(alone, name)[0, ..., :61], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(out.nsp_logits[i], alone.nsp_logits[0], rtol=1e-4, atol=1e-5)
    unpadded = run(IDS, TYPES).hidden
    assert np.abs(out.hidden[1, :7] - unpadded[1, :7]).max() > 1e-2


def test_segments_matter_and_default_to_zero(bert):
    _, _, run = bert
    np.testing.assert_allclose(
        run(IDS).hidden, run(IDS, jnp.zeros_like(TYPES)).hidden, rtol=1e-4, atol=1e-5
    )
    assert np.abs(run(IDS).hidden - run(IDS, TYPES).hidden).max() > 1e-2


def test_attention_looks_both_ways(bert):
    _, _, run = bert
    changed = run(IDS.at[:, -1].set((IDS[:, -1] + 1) % 61)).hidden
    assert (np.abs(changed - run(IDS).hidden).max(axis=-1) > 1e-5).all()


def test_mlm_positions(bert):
    """Logits at chosen positions are those of the whole, and the whole is never formed."""
    model, variables, run = bert
    positions = jnp.asarray([[0, 5, 11], [6, 6, 0], [0, 0, 0]], jnp.int32)
    out = run(IDS, TYPES, LENGTHS, mlm_positions=positions)
    whole = run(IDS, TYPES, LENGTHS)
    expected = np.asarray(whole.mlm_logits)[np.arange(3)[:, None], np.asarray(positions)]
    np.testing.assert_allclose(out.mlm_logits, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.nsp_logits, whole.nsp_logits, rtol=1e-4, atol=1e-5)

    def shapes(**kwargs):
        return str(jax.make_jaxpr(lambda v: model.apply(v, IDS, **kwargs))(variables))

    assert "[3,12,64]" in shapes()
    assert "[3,12,64]" not in shapes(mlm_positions=positions)
    assert "[3,3,64]" in shapes(mlm_positions=positions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token_type_ids": TYPES[:, :5]}, r"token_type_ids is int32\[3, 5\].*\[3, 12\]"),
        ({"lengths": LENGTHS[:2]}, r"lengths is int32\[2\].*\[3\]"),
        ({"lengths": LENGTHS.astype(jnp.float32)}, r"lengths is float32\[3\]"),
        ({"mlm_positions": LENGTHS}, r"mlm_positions is int32\[3\].*\[3, P\]"),
    ],
)
def test_bad_input(bert, arguments, message):
    model, variables, _ = bert
    with pytest.raises(ValueError, match=message):
        model.apply(variables, IDS, **arguments)


def test_lengths_of_any_integer_type(bert):
    _, _, run = bert
    np.testing.assert_allclose(
        run(IDS, TYPES, LENGTHS.astype(jnp.uint8)).hidden,
        run(IDS, TYPES, LENGTHS).hidden,
        rtol=1e-4,
        atol=1e-5,
    )
