"""Tiles of an adapter's first product in the kernel for many tokens: which there are, and what they compute."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compress, decompress
from hopper import lowered, needs_gpu, needs_jax

from pallas_kernels.epilogue import gradient_through
from pallas_kernels.mosaic import support


def shape_of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def integers(seed, shape, most, dtype=jnp.bfloat16):
    values = np.random.default_rng(seed).integers(-most, most + 1, shape)
    return jnp.asarray(values.astype(np.float32), dtype)


def left_of(k, rank, dtype=jnp.bfloat16):
    """Of which every 23rd row is not zero, so that x @ l of integers is exact in 16 bits."""
    return integers(1, (k, rank), 1, dtype) * (jnp.arange(k) % 23 == 5).astype(dtype)[:, None]


def float32(x):
    return np.asarray(x, np.float32)


def small_tile():
    from pallas_kernels.mosaic import matmul

    return matmul.Tile(blocks=1, tokens=128, slot_tokens=64, stages=6)


def expected(x, w, t, right, *, bias=0, activation=None, residual=0, through=None, **others):
    """By the definition, in float32, where all of it is exact; rounded once."""
    z = float32(x) @ float32(decompress(w)) + t @ float32(right) + float32(bias)
    y = np.maximum(z, 0) if activation else z
    y = y + float32(residual)
    if through is not None:
        y = np.asarray(gradient_through(*through, jnp.asarray(y)))
    sizes = others.get("sections")
    y = [y] if sizes is None else np.split(y, np.cumsum(sizes)[:-1], axis=-1)
    saved = [z] if others.get("save_preactivation") else []
    sums = [float32(x).sum(0)] if others.get("save_sums") else []
    return [*y, *saved], sums


def tiles():
    if support.version_obstacle():
        return []
    from pallas_kernels.mosaic import matmul_tiles

    return list(matmul_tiles.SIZES)


@needs_jax
@pytest.mark.parametrize("size", tiles(), ids=str)
def test_every_tile_lowers_for_cuda(size, strict_dtypes):
    """Alone and with all else; where JAX has 64 bits as well."""
    from pallas_kernels.mosaic import matmul

    rank, size = size.rows // 2 + 16, dataclasses.replace(size, slices=2)  # in two tiles each way
    x, values, metadata = shape_of(4000, 776), shape_of(388, 520), shape_of(97, 520, dtype="uint8")
    right, joining = shape_of(rank, 520), shape_of(4000, 520)

    def run(transposed, x, values, metadata, left, right, joining):
        options = {"joining": joining, "save_sums": True} if transposed else {}
        adapter = {"adapter": (left, right), "transposed": transposed}
        return matmul.nm_matmul(x, values, metadata, size, **adapter, **options)

    for transposed in (False, True):
        left = shape_of(rank, 776) if transposed else shape_of(776, rank)
        program = functools.partial(run, transposed)
        with jax.enable_x64(transposed):
            assert "nm_matmul" in lowered(program, x, values, metadata, left, right, joining)


@needs_jax
def test_what_loads_t_waits_for_what_stores_it():
    """Results would rarely show a kernel that does not: t has mostly long been there."""
    from pallas_kernels.mosaic import matmul

    x, values, metadata = shape_of(4000, 776), shape_of(388, 520), shape_of(97, 520, dtype="uint8")

    def program(name, left):
        def run(x, values, metadata, pair):
            return matmul.nm_matmul(x, values, metadata, small_tile(), **{name: pair})

        return lowered(run, x, values, metadata, (left, shape_of(left.shape[1], 520)))

    inside = program("adapter", shape_of(776, 16))
    apart = program("low_rank", shape_of(4000, 16))
    for instruction in ("st.release.gpu", "ld.acquire.gpu", "fence.proxy.async"):
        assert instruction in inside
        assert instruction not in apart


@needs_jax
@pytest.mark.parametrize(("rank", "count"), [(16, 1), (64, 1), (72, 2), (136, 3)])
def test_what_loads_t_waits_for_all_ranks(monkeypatch, rank, count):
    from pallas_kernels.mosaic import first_tiles, matmul

    waited, flag, wait = [], first_tiles.FirstTiles.flag, first_tiles.FirstTiles.wait

    def noted(self, block, part):
        waited.append(part)
        return flag(self, block, part)

    def waiting(self, column):
        with monkeypatch.context() as patch:
            patch.setattr(first_tiles.FirstTiles, "flag", noted)
            wait(self, column)

    monkeypatch.setattr(first_tiles.FirstTiles, "wait", waiting)

    def run(x, values, metadata, pair):
        return matmul.nm_matmul(x, values, metadata, small_tile(), adapter=pair)

    x, values, metadata = shape_of(3000, 776), shape_of(388, 520), shape_of(97, 520, dtype="uint8")
    lowered(run, x, values, metadata, (shape_of(776, rank), shape_of(rank, 520)))
    assert waited == list(range(count))


@needs_jax
def test_tiles_that_can_make_no_first_product_are_named():
    from pallas_kernels.mosaic import matmul

    tile = small_tile()
    x, values, metadata = shape_of(200, 776), shape_of(388, 520), shape_of(97, 520, dtype="uint8")

    def run(tile, rank):
        adapter = shape_of(776, rank), shape_of(rank, 520)
        call = functools.partial(matmul.nm_matmul, tile=tile)
        jax.eval_shape(lambda x, v, e, a: call(x, v, e, adapter=a), x, values, metadata, adapter)

    for changed, rank, message in [
        ({"tokens": 64, "slot_tokens": 32, "along": 2}, 16, "share tiles along the inputs"),
        (
            {"tokens": 160, "slot_tokens": 32, "slots": 1},
            16,
            "80 tokens are no multiple of its slots' tokens",
        ),
        ({"splits": 8}, 16, "12 tiles are no whole wave"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(dataclasses.replace(tile, **changed), rank)
    run(tile, 136)
    pair = {"adapter": (shape_of(776, 16), shape_of(16, 520))}
    both = pair | {"low_rank": (shape_of(200, 16), shape_of(16, 520))}
    for given, message in [(both, "are both given"), ({"transposed": True}, "there is no adapter")]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(
                functools.partial(
                    matmul.nm_matmul, tile=tile, transposed=given.pop("transposed", False)
                ),
                x,
                values,
                metadata,
                **given,
            )


@needs_jax
@pytest.mark.parametrize("tokens", [65, 512, 2048, 65536])
@pytest.mark.parametrize("size", [(768, 768), (4096, 14336), (72, 40)])
@pytest.mark.parametrize("rank", [40, 80, 320])
def test_every_tile_of_t_and_of_y_is_made_once_and_t_waits_for_nothing(tokens, size, rank):
    """By the schedule alone: the tiles of t are the first ones of their processors."""
    from pallas_kernels.mosaic import first_tiles, matmul

    shared = [dataclasses.replace(tile, splits=8) for tile in matmul.firsts(tokens, *size, rank)]
    for tile in (*matmul.firsts(tokens, *size, rank), *shared):
        plan = tile.schedule(tokens, *size, 132, first_rank=rank)
        count = tile.firsts(tokens, size[0], rank)
        if first_tiles.obstacle(tile, plan, count):
            continue
        # l has as many bytes for an input as half as many outputs of the weight.
        whole = count * tile.cluster // first_tiles.Cut.of(tile, size[0], rank).slices
        assert whole * tile.tokens * (tile.rows // 2) >= tokens * rank
        down, across = tile.grid(tokens, size[1])
        assert plan.tiles == count + down * across
        processors = np.arange(plan.processors)
        firsts = np.asarray(first_tiles.share(count, plan.processors, jnp.asarray(processors)))
        assert int(firsts.sum()) == count
        units = np.broadcast_to(plan.units(jnp.asarray(processors)), processors.shape)
        number = np.arange(units.max())[:, None]
        found = [np.asarray(each) for each in jax.jit(plan.unit)(processors[None], number)]
        index, *whole = (np.broadcast_to(each, (len(number), len(processors))) for each in found)
        mine = number < units
        assert ((index < count) == (number < firsts))[mine].all()
        of_t = mine & (index < count)
        for values, value in zip(whole, (0, plan.steps, -1, 0), strict=True):
            assert (values[of_t] == value).all()
            assert tile.splits > 1 or (values[mine] == value).all()
        finished = mine & (whole[2] < 0)
        assert sorted(index[finished]) == list(range(plan.tiles))


@needs_jax
@pytest.mark.parametrize("k", [8, 136, 1416])
@pytest.mark.parametrize(("tokens", "rank"), [(1, 8), (177, 64), (512, 72), (2100, 200)])
def test_every_part_of_t_is_made_once_and_has_a_flag_and_a_place_of_its_own(tokens, k, rank):
    from pallas_kernels.mosaic import first_tiles, matmul_tiles

    f, left = 520, shape_of(k, rank)
    tiles = [dataclasses.replace(t, slices=n) for t in matmul_tiles.SIZES for n in (1, 2, 3)]
    for tile, splits in itertools.product(tiles, (1, 8)):
        tile = dataclasses.replace(tile, splits=splits)
        plan = tile.schedule(tokens, k, f, 132, first_rank=rank)
        kernel = types.SimpleNamespace(
            tile=tile, refs={"l": left}, sizes=[k], schedule=plan, member=0
        )
        made = first_tiles.FirstTiles(kernel, tile.firsts(tokens, k, rank), False)
        slices, steps, spans, flags = made.cut.slices, -(-k // 64), {}, []
        for kernel.member in range(tile.cluster):
            units = first_tiles.Unit(*map(np.asarray, made.unit(jnp.arange(made.count))))
            for i, unit in enumerate(zip(*units, strict=True)):
                unit = first_tiles.Unit(*map(int, unit))
                spans.setdefault((unit.block, unit.part), []).append((unit.start, unit.stop))
                assert unit.slice == i % slices  # it waits for those ahead of it, which have come
                last = unit.slice == slices - 1
                place = None if last else made.place_left(unit, unit.slice)
                assert last or place < made.count // slices * (slices - 1) * tile.cluster
                flags.append(made.flag(unit.block, unit.part) if last else made.base + place)
        assert sorted(flags) == list(range(made.base, made.base + made.flags))
        for span in spans.values():
            starts, stops = zip(*span, strict=True)
            assert (starts[0], stops[-1]) == (0, steps)
            assert starts[1:] == stops[:-1]
            assert all(start < stop for start, stop in span)
        blocks = range(-(-tokens // tile.tokens))
        assert {(block, part) for block in blocks for part in range(made.cut.parts)} <= set(spans)
        assert made.cut.parts * made.cut.rank_blocks * 64 >= rank
        assert made.tokens_of(1) + made.cut.half == tile.tokens <= 2 * made.cut.half


@needs_gpu
@pytest.mark.parametrize("processors", [132, 6])
@pytest.mark.parametrize("splits", [1, 8])
@pytest.mark.parametrize("ranks", [{128: 40, 256: 104}, {128: 80, 256: 168}], ids=["one", "two"])
@pytest.mark.parametrize("slices", [1, 2])
def test_every_tile_is_exact_on_ragged_sizes(slices, ranks, splits, processors):
    """With ranks in one or two tiles, inputs in one or two, and with few CTAs several tiles of t for each;
    repeats are equal."""
    from pallas_kernels.mosaic import first_tiles, matmul, matmul_tiles

    tokens, k, f, ran = 2100, 1416, 1096, 0
    x, w = integers(0, (tokens, k), 2), compress(integers(3, (k, f), 2), "2:4")
    bias = integers(4, (f,), 4, jnp.float32)
    for size in matmul_tiles.SIZES:
        tile, rank = dataclasses.replace(size, splits=splits, slices=slices), ranks[size.rows]
        if tile.cluster > processors:
            continue
        plan = tile.schedule(tokens, k, f, processors, first_rank=rank)
        if first_tiles.obstacle(tile, plan, tile.firsts(tokens, k, rank)):
            continue
        left, right = left_of(k, rank), integers(2, (rank, f), 1)
        t, transposed = float32(x) @ float32(left), (splits == 8) == (processors == 6)
        (exact,), _ = expected(x, w, t, right, bias=bias)
        options = {"transposed": transposed, "processors": processors, "bias": bias}
        run = jax.jit(functools.partial(matmul.nm_matmul, tile=tile, **options))
        adapter = (left.T if transposed else left, right)
        for _ in range(3):
            y, found = run(x, w.values, w.metadata, adapter=adapter)
            np.testing.assert_array_equal(float32(found), t, str(tile))
            np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16), str(tile))
        ran += 1
    assert ran >= 4


@needs_gpu
def test_layers_of_a_scan_wait_for_their_own_first_products():
    """Flags begin at zero in every layer, and in every call."""
    from pallas_kernels.mosaic import matmul

    tokens, k, f, rank = 1100, 776, 1032, 24
    x = integers(0, (tokens, k), 2)
    ws = [compress(integers(seed, (k, f), 2), "2:4") for seed in range(3, 7)]
    lefts = [left_of(k, rank) * sign for sign in (1, -1, 1, -1)]
    right = integers(2, (rank, f), 1)
    stacks = [jnp.stack([getattr(w, name) for w in ws]) for name in ("values", "metadata")]
    tile = dataclasses.replace(small_tile(), slices=2)

    @jax.jit
    def run(values, metadata, lefts):
        def step(_, layer):
            v, e, left = layer
            return None, matmul.nm_matmul(x, v, e, tile, adapter=(left, right))

        return jax.lax.scan(step, None, (values, metadata, lefts))[1]

    for _ in range(3):
        for y, t, w, left in zip(*run(*stacks, jnp.stack(lefts)), ws, lefts, strict=True):
            exact_t = float32(x) @ float32(left)
            np.testing.assert_array_equal(float32(t), exact_t)
            (exact,), _ = expected(x, w, exact_t, right)
            np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@needs_gpu
def test_not_a_number_stays_in_its_row():
    from pallas_kernels.mosaic import matmul

    x, w = integers(0, (1000, 776), 2), compress(integers(3, (776, 520), 2), "2:4")
    left, right = left_of(776, 24), integers(2, (24, 520), 1)
    t = float32(x) @ float32(left)
    (exact,), _ = expected(x, w, t, right)
    y, found = matmul.nm_matmul(
        x.at[7, 5].set(jnp.nan), w.values, w.metadata, small_tile(), adapter=(left, right)
    )
    assert np.isnan(float32(found)[7]).all()
    assert np.isnan(float32(y)[7]).all()
    np.testing.assert_array_equal(np.delete(float32(found), 7, 0), np.delete(t, 7, 0))
    rounded = float32(exact.astype(jnp.bfloat16))
    np.testing.assert_array_equal(np.delete(float32(y), 7, 0), np.delete(rounded, 7, 0))
