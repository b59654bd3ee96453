"""nm_sddmm on Hopper: who works on what, on any machine; lowering where JAX can; results on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import fenced, needs_gpu, needs_jax

from pallas_kernels import compress, kept_mask, nm_sddmm
from pallas_kernels.mosaic import support
from pallas_kernels.mosaic.schedule import Schedule
from pallas_kernels.mosaic.sddmm_tiles import (
    MEASURED,
    TILES,
    Tile,
    candidates,
    choose,
    estimate,
)


def units_of(schedule: Schedule) -> list[tuple[int, ...]]:
    """(processor, tile, start, stop, slot, parts) of all units."""
    processors = jnp.arange(schedule.processors, dtype=jnp.int32)
    counts = np.broadcast_to(schedule.units(processors), processors.shape)
    pairs = [(p, n) for p in range(schedule.processors) for n in range(counts[p])]
    columns = jax.jit(jax.vmap(schedule.unit))(
        *(jnp.asarray(c, jnp.int32) for c in zip(*pairs, strict=True))
    )
    rows = np.stack([np.asarray(column) for column in columns], axis=1)
    return [(p, *row.tolist()) for (p, _), row in zip(pairs, rows, strict=True)]


@pytest.mark.parametrize(
    ("tiles", "steps", "splits", "processors"),
    [
        (48, 128, 0, 132),  # two sharers a tile, and 36 fillers with parts of two or three tiles
        (48, 128, 2, 132),
        (133, 17, 0, 132),  # one tile left over, more processors than steps
        (300, 32, 0, 132),  # whole waves, then sharers and fillers
        (264, 5, 0, 132),  # whole waves alone
        (90, 7, 0, 132),  # each filler passes several tiles
        (3, 1, 8, 10),  # more splits than steps
        (7, 50, 3, 5),
    ],
)
def test_every_step_of_every_tile_is_done_once_and_every_part_is_added(
    tiles, steps, splits, processors
):
    schedule = Schedule(tiles, steps, splits, processors)
    of_tile = {tile: [] for tile in range(tiles)}
    for processor, tile, start, stop, slot, parts in units_of(schedule):
        of_tile[tile].append((start, stop, slot, parts, processor))
    slots = []
    for tile, units in of_tile.items():
        units.sort()
        starts, stops, left_in, parts, processor = zip(*units, strict=True)
        assert starts == (0, *stops[:-1])
        assert stops[-1] == steps
        assert all(start < stop for start, stop in zip(starts, stops, strict=True))
        added = [int(schedule.slot_of(jnp.int32(tile), part)) for part in range(parts[0])]
        assert left_in == (-1, *added)
        assert all(waited_for < processor[0] for waited_for in processor[1:])
        slots += added
    assert sorted(slots) == sorted(set(slots))
    assert all(0 <= slot < schedule.slots for slot in slots)


def test_an_even_share_is_even():
    loads = np.zeros(132, int)
    for processor, _, start, stop, *_ in units_of(Schedule(48, 128, 0, 132)):
        loads[processor] += stop - start
    assert loads.sum() == 48 * 128
    assert loads.max() <= -(-48 * 128 // 132)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": 100}, "multiple of 32"),
        ({"columns": 256}, "at most 384"),
        ({"stages": 5}, "bytes"),
        ({"down": 16}, "1 to 8"),
    ],
)
def test_tiles_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Tile(**options)


def test_schedules_that_cannot_be_are_named():
    with pytest.raises(ValueError, match="splits is -1"):
        Schedule(3, 4, -1, 5)
    with pytest.raises(ValueError, match="fewer processors"):
        Tile(down=2).schedule(64, 64, 64, 1)


@pytest.mark.parametrize("shape", [(1, 8, 8), (8192, 768, 3072), (8192, 4096, 14336)])
def test_candidates_are_distinct_and_survive_a_json_file(shape):
    found = candidates(*shape)
    assert 1 <= len(found) == len(set(found)) <= 24
    for tile in found:
        assert Tile(**dataclasses.asdict(tile)) == tile
        assert all(type(n) is int for n in dataclasses.asdict(tile).values())
    tile = choose(*shape)
    assert (tile.blocks, tile.columns, tile.stages) in MEASURED


@pytest.mark.parametrize(
    ("shape", "better", "worse"),
    [  # microseconds measured on an H100: 58, 114; 42, 51; 32, 47; 1303, 1343; 11, 21; 87, 150
        ((8192, 768, 3072), ((2, 192, 4), 0), ((2, 192, 4), 1)),
        ((8192, 768, 2304), ((1, 128, 6), 1), ((2, 192, 4), 3)),
        ((16384, 768, 768), ((1, 128, 6), 0), ((2, 192, 4), 8)),
        ((8192, 4096, 14336), ((2, 192, 4), 0), ((2, 192, 4), 1)),
        ((2048, 768, 768), ((1, 128, 6), 3), ((2, 192, 4), 8)),
        ((8192, 1024, 4096), ((1, 256, 4), 1), ((1, 256, 4), 0)),
    ],
)
def test_the_estimate_ranks_as_measured(shape, better, worse):
    times = [estimate(*shape, Tile(*size, splits=splits)) for size, splits in (better, worse)]
    assert times[0] < times[1]


def arguments(tokens, k, f, dtype=jnp.bfloat16, into=None):
    shapes = [((tokens, k), dtype), ((tokens, f), dtype), ((k // 8, f), jnp.uint8)]
    if into is not None:
        shapes.append(((k // 2, f), into))
    return [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def kernel(tile, out_dtype, processors=132):
    from pallas_kernels.mosaic import sddmm

    def run(x, dy, metadata, into=None):
        return sddmm.nm_sddmm(
            x, dy, metadata, tile, out_dtype=out_dtype, into=into, processors=processors
        )

    return run


@needs_jax
@pytest.mark.parametrize(
    ("tile", "dtype", "out_dtype", "into"),
    [
        (Tile(splits=0), jnp.bfloat16, jnp.bfloat16, None),
        (Tile(1, 256, 4, down=2), jnp.float16, jnp.float32, None),
        (Tile(1, 96, 6, across=2, splits=2), jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (Tile(1, 128, 6, splits=3), jnp.bfloat16, jnp.float16, jnp.float16),
    ],
)
def test_lowers_for_cuda_without_a_gpu(tile, dtype, out_dtype, into):
    traced = jax.jit(kernel(tile, out_dtype)).trace(*arguments(1000, 776, 1000, dtype, into))
    assert traced.out_info.dtype == out_dtype
    assert "nm_sddmm" in traced.lower(lowering_platforms=("cuda",)).as_text()


@needs_jax
@pytest.mark.parametrize("splits", [0, 1])
def test_a_buffer_of_the_outputs_dtype_is_added_to_in_place(splits):
    run = jax.jit(kernel(Tile(1, 128, 6, splits=splits), jnp.float32), donate_argnums=3)
    traced = run.trace(*arguments(640, 64, 128, into=jnp.float32))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "tf.aliasing_output" in text  # the argument is the result
    assert "output_operand_alias" in text  # and the kernel writes where it reads
    assert ("xi32>" in text) == (splits == 0)  # the flags of parts
    assert fenced(text)


def integers(seed, shape, dtype=jnp.bfloat16):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(-4, 5, shape).astype(np.float32)).astype(dtype)


def kept_product(x, dy, w) -> np.ndarray:
    """The values of x.T @ dy where w keeps, from NumPy."""
    dense = np.asarray(x, np.float32).T @ np.asarray(dy, np.float32)
    kept = np.asarray(kept_mask(w)).T
    return dense.T[kept].reshape(w.shape[1], -1).T


# Partial tiles in every direction, parts of tiles from sharers and fillers, many tiles per CTA.
GPU_CASES = [
    ((1000, 776, 1000), 0, 132, jnp.bfloat16),
    ((1000, 776, 1000), 0, 132, jnp.float32),
    ((300, 200, 1608), 3, 10, jnp.bfloat16),
    ((8, 64, 64), 1, 132, jnp.float32),
]


@needs_gpu
@pytest.mark.parametrize(("shape", "splits", "processors", "out_dtype"), GPU_CASES)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_exact_on_integers_and_equal_on_repeats(tile, shape, splits, processors, out_dtype):
    tokens, k, f = shape
    x, dy, w = integers(0, (tokens, k)), integers(1, (tokens, f)), integers(2, (k, f))
    w = compress(w, "2:4")  # small integers: ties and zeros abound
    exact = jnp.asarray(kept_product(x, dy, w)).astype(out_dtype)
    run = jax.jit(kernel(dataclasses.replace(tile, splits=splits), out_dtype, processors))
    for _ in range(3):
        found = np.asarray(run(x, dy, w.metadata), np.float32)
        np.testing.assert_array_equal(found, np.asarray(exact, np.float32))


@needs_gpu
@pytest.mark.parametrize("splits", [0, 1])
@pytest.mark.parametrize(
    ("out_dtype", "into"),
    [
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float16),
    ],
)
def test_adds_to_a_buffer(out_dtype, into, splits):
    x, dy, w = integers(0, (200, 264)), integers(1, (200, 392)), integers(2, (264, 392))
    w = compress(w, "2:4")
    buffer = integers(3, w.values.shape, into)
    exact = kept_product(x, dy, w) + np.asarray(buffer, np.float32)
    run = jax.jit(kernel(Tile(splits=splits), out_dtype), donate_argnums=3)
    found = run(x, dy, w.metadata, buffer)
    expected = np.asarray(jnp.asarray(exact).astype(out_dtype), np.float32)
    np.testing.assert_array_equal(np.asarray(found, np.float32), expected)


@needs_gpu
@pytest.mark.parametrize("splits", [0, 1])
def test_adds_to_the_buffer_of_each_layer_of_a_scan(splits):
    """Slices of stacks, into another one: what XLA lets a kernel read and write that is not in place.

    With tiles that are shared, the flags of their parts begin at zero in every layer."""
    xs, dys = integers(0, (3, 200, 264)), integers(1, (3, 200, 392))
    ws = [compress(integers(seed, (264, 392)), "2:4") for seed in (2, 4, 5)]
    metadata = jnp.stack([w.metadata for w in ws])
    buffers = integers(3, (3, *ws[0].values.shape), jnp.float32)

    @jax.jit
    def run(*stacks):
        add = kernel(Tile(splits=splits), jnp.float32)
        return jax.lax.scan(lambda _, layer: (_, add(*layer)), 0, stacks)[1]

    exact = [kept_product(*layer) for layer in zip(xs, dys, ws, strict=True)] + np.asarray(buffers)
    np.testing.assert_array_equal(run(xs, dys, metadata, buffers), exact)


@needs_gpu
def test_nan_and_inf_stay_with_the_inputs_and_outputs_that_they_belong_to():
    x = integers(0, (300, 64)).at[7, 3].set(jnp.nan)
    dy = integers(1, (300, 304)).at[9, 5].set(jnp.inf)
    w = compress(integers(2, (64, 304)), "2:4")
    dw = nm_sddmm(x, dy, w, out_dtype=jnp.float32, implementation="mosaic")
    with np.errstate(invalid="ignore"):
        expected = kept_product(x, dy, w)
    np.testing.assert_array_equal(dw, expected)


@needs_gpu
@pytest.mark.parametrize("shape", [(1, 8, 8), (100, 1600, 4800), (8200, 1024, 1032)])
def test_the_chosen_configuration_is_exact_on_integers(shape):
    tokens, k, f = shape
    x, dy, w = integers(0, (tokens, k)), integers(1, (tokens, f)), integers(2, (k, f))
    w = compress(w, "2:4")
    dw = nm_sddmm(x, dy, w, out_dtype=jnp.float32, implementation="mosaic")
    np.testing.assert_array_equal(dw, kept_product(x, dy, w))


@needs_gpu
@pytest.mark.parametrize("pattern", [str(p) for p in support.FITTING])
@pytest.mark.parametrize("into", [None, jnp.float32])
def test_gradients_of_any_fitting_pattern_are_exact_on_integers(pattern, into):
    x, dy = integers(0, (300, 208)), integers(1, (300, 136))
    w = compress(integers(2, (208, 136), jnp.float32), pattern)
    start = None if into is None else integers(3, w.values.shape, into)
    got = nm_sddmm(x, dy, w, into=start, out_dtype=jnp.float32, implementation="mosaic")
    exact = kept_product(x, dy, w) + (0 if start is None else np.asarray(start))
    np.testing.assert_array_equal(got, exact)
