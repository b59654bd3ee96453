"""The gate in the epilogue of the kernel for many tokens: what it computes, and where it is made there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import standins
from compiled import compress, decompress
from hopper import lowered, needs_gpu, needs_jax
from test_mosaic_first_tiles import float32, integers, left_of, shape_of

from benchmarks import bench
from benchmarks.problems import Problem
from pallas_kernels import nm_matmul
from pallas_kernels.mosaic import support
from slope_jax import SparseDense, explain, models, slope_matmul

TOKENS, K, RANK = 700, 776, 40  # of no tile a multiple


def gating_tiles():
    if support.version_obstacle():
        return []
    from pallas_kernels.mosaic import matmul_tiles

    return [size for size in matmul_tiles.SIZES if size.gates]


def gate(z, activation=None):
    """In float64, of z (..., [gate | up])."""
    first, second = np.split(np.asarray(z, np.float64), 2, axis=-1)
    with np.errstate(over="ignore"):
        first = first / (1 + np.exp(-first)) if activation == "silu" else first
    return (np.maximum(first, 0) if activation == "relu" else first) * second


@needs_jax
def test_tiles_of_256_outputs_gate_and_smaller_ones_say_that_they_do_not():
    from pallas_kernels.mosaic import matmul, matmul_tiles

    assert {size.rows for size in gating_tiles()} == {256}
    x, values, metadata = shape_of(700, 776), shape_of(388, 512), shape_of(97, 512, dtype="uint8")
    small = matmul_tiles.Tile(blocks=1, tokens=128, slot_tokens=64, stages=6)
    with pytest.raises(ValueError, match="gated needs that"):
        jax.eval_shape(
            functools.partial(matmul.nm_matmul, tile=small, gated=True), x, values, metadata
        )
    run = functools.partial(matmul.nm_matmul, tile=gating_tiles()[0], gated=True)
    with pytest.raises(ValueError, match="gated=True goes with a bias"):
        jax.eval_shape(functools.partial(run, save_sums=True), x, values, metadata)
    x, values, metadata = shape_of(700, 776), shape_of(388, 520), shape_of(97, 520, dtype="uint8")
    with pytest.raises(ValueError, match="a multiple of 32, not 520"):
        jax.eval_shape(run, x, values, metadata)


@needs_jax
@pytest.mark.parametrize("mlp", [16, 64, 1008, 1024])
@pytest.mark.parametrize("down", [1, 2])
def test_rows_of_a_tile_are_a_gate_and_what_it_multiplies(mlp, down):
    """Each output of y once, with both of its own of w, and with their biases."""
    from pallas_kernels.mosaic import matmul, matmul_body

    tile = dataclasses.replace(gating_tiles()[0], down=down)
    w = shape_of(8, 2 * mlp)
    kernel = object.__new__(matmul_body.Kernel)
    kernel.w, kernel.gated = w, True
    bias = np.asarray(matmul._laid_out(jnp.arange(2.0 * mlp) + 1, tile, True))
    made = {}
    for number in range(tile.grid(1, 2 * mlp)[0] * down):
        row = tile.rows * number
        for wg in range(2):
            first, second = (int(kernel.first_output(jnp.int32(row), 2 * wg + b)) for b in (0, 1))
            there = row + 128 * wg  # of the biases, 64 of each block
            for i in range(64):
                if (out := row // 2 + 64 * wg + i) < mlp:
                    assert out not in made
                    made[out] = first + i, second + i
                    assert (bias[there + i], bias[there + 64 + i]) == (1 + out, 1 + mlp + out)
    assert made == {out: (out, mlp + out) for out in range(mlp)}


@needs_jax
@pytest.mark.parametrize("size", gating_tiles(), ids=str)
def test_every_gating_tile_lowers_for_cuda(size):
    from pallas_kernels.mosaic import matmul

    x, values, metadata = shape_of(700, 776), shape_of(388, 544), shape_of(97, 544, dtype="uint8")
    left, right = shape_of(776, RANK), shape_of(RANK, 544)
    bias = shape_of(544, dtype="float32")

    def run(splits, out_dtype, x, values, metadata, pair, bias):
        tile = dataclasses.replace(size, splits=splits)
        options = {"gated": True, "activation": "silu", "bias": bias, "out_dtype": out_dtype}
        pair = {"low_rank" if splits == 0 else "adapter": pair}
        return matmul.nm_matmul(x, values, metadata, tile, **pair, **options)

    assert dataclasses.replace(size, splits=0).schedule(700, 776, 544, 132).slots
    for splits, out_dtype, wide in ((1, None, False), (1, jnp.float32, True), (0, None, True)):
        pair = (shape_of(700, RANK) if splits == 0 else left, right)
        program = functools.partial(run, splits, out_dtype)
        with jax.enable_x64(wide):
            found = jax.eval_shape(program, x, values, metadata, pair, bias)
            text = lowered(program, x, values, metadata, pair, bias)
        shapes = [each.shape for each in jax.tree.leaves(found)]
        assert shapes == [(700, 272), (700, RANK)][: len(shapes)]
        assert len(shapes) == 1 + (splits == 1)
        assert "nm_matmul" in text


@needs_jax
def test_it_is_made_by_the_kernel_unless_that_takes_longer_than_a_pass(monkeypatch):
    from pallas_kernels.mosaic import matmul, matmul_tiles, products

    ran = standins.install(monkeypatch)
    seen = []

    def noted(*args, **options):
        seen.append((args[3], options.get("gated", False)))
        return standins._many(*args, **options)

    monkeypatch.setattr(matmul, "nm_matmul", noted)
    x, w = integers(0, (300, 1024), 1), compress(integers(1, (1024, 64), 1), "2:4")
    exact = gate(float32(x) @ float32(decompress(w)), "relu").astype(jnp.bfloat16)
    small = matmul_tiles.Tile(blocks=1, tokens=128, slot_tokens=64, stages=6)
    options = {"activation": "relu", "gated": True, "implementation": "mosaic"}
    np.testing.assert_array_equal(nm_matmul(x[:16], w, **options), exact[:16])
    assert (ran, seen) == (["few"], [])
    odd = compress(integers(1, (1024, 48), 1), "2:4")  # halves that are no multiple of 16
    for tile, of, taken in (
        (gating_tiles()[0], w, True),
        (gating_tiles()[0], odd, False),
        (small, w, False),
    ):
        monkeypatch.setattr(products, "configuration", lambda *_, tile=tile: tile)
        seen.clear()
        y = nm_matmul(x, of, **options)
        assert seen == [(tile, taken)]
        if of is w:
            np.testing.assert_array_equal(y, exact)


@needs_jax
def test_a_record_names_the_tile_that_gates(monkeypatch):
    from pallas_kernels.mosaic import products

    tile = dataclasses.replace(gating_tiles()[0], snake=8)
    monkeypatch.setattr(products, "gated_tile", lambda *_: tile)
    named = {
        epilogue: bench.configuration(Problem("epilogue", 2048, (4096, 28672), epilogue=epilogue))
        for epilogue in ("gate+silu", "bias")
    }
    assert named["gate+silu"] == dataclasses.asdict(tile) != named["bias"]


@needs_jax
def test_the_gate_of_a_model_that_is_not_trained_is_the_kernels(monkeypatch):
    monkeypatch.setattr(support, "device_obstacle", lambda *_: None)
    model = models.build(
        "llama-nano", vocab_size=64, adapter_rank=8, dtype="bfloat16", implementation="mosaic"
    )
    ids = jax.ShapeDtypeStruct((4, 128), jnp.int32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
    wide = 2 * model.config.mlp_size

    def program(**options):
        return lowered(lambda v, ids: model.apply(v, ids, **options), variables, ids)

    training = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    shape = f"tensor<4x128x{wide}xbf16>"
    assert shape not in program()
    assert shape in program(**training)
    gates = {row.path: row.gate for row in explain(model, variables, ids).rows if row.gate}
    assert {path.split("/")[-1] for path in gates} == {"gate_up"}
    assert set(gates.values()) == {
        ("mosaic", "by the kernel of the product, where no gradient follows")
    }
    few = explain(model, variables, jax.ShapeDtypeStruct((1, 16), jnp.int32)).rows
    (gate,) = {row.gate for row in few if row.gate}
    assert gate == ("xla", "the kernel for few tokens makes none")


@needs_jax
def test_a_first_product_goes_apart_from_a_tile_that_gates_where_its_own_does_not(monkeypatch):
    """What runs, and what is said of it."""
    from pallas_kernels import tuning
    from pallas_kernels.mosaic import matmul_tiles, products

    monkeypatch.setattr(support, "device_obstacle", lambda *_: None)
    size, tokens, rank = (4096, 28672), 2048, 64
    w = jax.eval_shape(lambda w: compress(w, "2:4"), shape_of(*size))
    x, adapter = shape_of(tokens, size[0]), (shape_of(size[0], rank), shape_of(rank, size[1]))
    layer = SparseDense(
        size[1], adapter_rank=rank, dtype=x.dtype, param_dtype=x.dtype, implementation="mosaic"
    )
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    small = matmul_tiles.Tile(blocks=1, tokens=128, slot_tokens=64, stages=6)
    for tile, inside in ((gating_tiles()[0], True), (small, False)):
        config = dataclasses.asdict(tile)
        entry = tuning.Entry("with_first", "16-bit", tokens, size, config, 1.0, 2.0)

        def measured(op, *_, entry=entry):
            return entry if op == "with_first" else None

        monkeypatch.setattr(products, "_measured", measured)
        for gated in (False, True):
            options = {"gated": gated, "implementation": "mosaic"}
            text = lowered(
                lambda x, w, adapter, options=options: nm_matmul(x, w, adapter=adapter, **options),
                *(x, w, adapter),
            )
            asked = {"gate": "silu"} if gated else {}
            (row,) = explain(layer, variables, x, **asked).rows
            joins = inside or not gated
            assert ("narrow_product" not in text) == joins, (tile, gated)
            assert ("joins" in row.first_product.reason) == joins, (tile, gated)


@needs_gpu
@pytest.mark.parametrize("processors", [132, 6])  # tiles shared by many CTAs, many tiles per CTA
@pytest.mark.parametrize("size", gating_tiles(), ids=str)
def test_every_gating_tile_is_exact_on_integers(size, processors):
    from pallas_kernels.mosaic import matmul

    for mlp, activation, out_dtype, inside, splits in (
        (1008, None, jnp.bfloat16, False, 0),
        (1024, "relu", jnp.float32, False, 8),
        (80, "relu", jnp.bfloat16, True, 1),
    ):
        x, w = integers(0, (TOKENS, K), 1), compress(integers(1, (K, 2 * mlp), 1), "2:4")
        left, right = left_of(K, RANK), integers(2, (RANK, 2 * mlp), 1)
        bias, t = integers(3, (2 * mlp,), 2, jnp.float32), float32(x) @ float32(left)
        z = float32(x) @ float32(decompress(w)) + t @ float32(right) + float32(bias)
        exact = gate(z, activation)
        assert np.abs(exact).max() < 2**24
        tile = dataclasses.replace(size, splits=splits)
        run = functools.partial(matmul.nm_matmul, tile=tile, processors=processors, gated=True)
        run = jax.jit(functools.partial(run, activation=activation, out_dtype=out_dtype))
        pair = {"low_rank": (jnp.asarray(t, x.dtype), right)}
        for _ in range(3):
            given = {"adapter": (left, right)} if inside else pair
            y, *found = jax.tree.leaves(run(x, w.values, w.metadata, bias=bias, **given))
            np.testing.assert_array_equal(y, exact.astype(out_dtype), f"{tile} {mlp}")
            for array in found:
                np.testing.assert_array_equal(float32(array), t)


@needs_jax
def test_tiles_are_shared_and_make_t_in_those_tests():
    from pallas_kernels.mosaic import first_tiles

    for size in gating_tiles():
        tile = dataclasses.replace(size, splits=0)
        plans = [tile.schedule(TOKENS, K, 2016, processors) for processors in (132, 6)]
        assert any(plan.slots for plan in plans), size
        for processors in (132, 6):
            plan = size.schedule(TOKENS, K, 160, processors, first_rank=RANK)
            assert first_tiles.obstacle(size, plan, size.firsts(TOKENS, K, RANK)) is None


@needs_gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("tokens", [40, 300])  # the kernel for few, and that for many
def test_the_gate_is_the_formula(monkeypatch, tokens, dtype):
    from pallas_kernels.mosaic import products

    if tokens > 64:
        monkeypatch.setattr(products, "configuration", lambda *_: gating_tiles()[0])
    x = jax.random.normal(jax.random.key(0), (tokens, 512)).astype(dtype)
    w = compress(jax.random.normal(jax.random.key(1), (512, 2048)).astype(dtype) / 16, "2:4")
    z = np.asarray(x, np.float64) @ np.asarray(decompress(w), np.float64)
    exact = gate(z, "silu")
    options = {"activation": "silu", "gated": True, "implementation": "mosaic"}
    y, again = (np.asarray(nm_matmul(x, w, **options), np.float64) for _ in range(2))
    np.testing.assert_array_equal(y, again)
    # Sums of 256 products in float32, and what that is times the other half; rounded once, or both as well.
    gates, ups = (np.abs(half) for half in np.split(z, 2, axis=-1))
    off = 256 * np.finfo(np.float32).eps * np.abs(z).max() * (gates + ups + 1)
    roundings = 1 if tokens > 64 else 3.2  # silu's slope is at most 1.1
    off += (
        roundings
        * jnp.finfo(dtype).eps
        / 2
        * np.maximum(np.abs(exact), gates * ups * (roundings > 1))
    )
    assert (np.abs(y - exact) <= off + jnp.finfo(dtype).smallest_normal).all()


@needs_gpu
def test_a_nan_in_a_gate_reaches_its_output_alone(monkeypatch):
    from pallas_kernels.mosaic import products

    monkeypatch.setattr(products, "configuration", lambda *_: gating_tiles()[0])
    x, w = integers(0, (300, 256), 1), compress(integers(1, (256, 1024), 1), "2:4")
    options = {"activation": "silu", "gated": True, "implementation": "mosaic"}
    clean = float32(nm_matmul(x, w, **options))
    for row in (5, 512 + 70):  # of a gate, of what one multiplies
        spoiled = w.with_values(w.values.at[3, row].set(jnp.nan))
        y = float32(nm_matmul(x, spoiled, **options))
        assert np.isnan(y[:, row % 512]).any()
        others = np.arange(512) != row % 512
        np.testing.assert_array_equal(y[:, others], clean[:, others])


@needs_gpu
def test_gradients_of_a_gated_product_are_those_of_xla():
    x, w = integers(0, (300, 128), 1), compress(integers(1, (128, 512), 1), "2:4")
    adapter = left_of(128, 8), integers(2, (8, 512), 1)

    def gradients(implementation):
        def loss(x, w, adapter):
            y = slope_matmul(
                x, w, adapter=adapter, activation="relu", gated=True, implementation=implementation
            )
            return (y.astype(jnp.float32) * (jnp.arange(256) % 3 - 1.0)[None]).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), allow_int=True))(x, w, adapter)

    ours, theirs = gradients("mosaic"), gradients("xla")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_array_equal(float32(a), float32(b))
