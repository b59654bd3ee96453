"""Rows of the record of `benchmarks.inference`: times, weights, and what a line of text says of them."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import steps
from benchmarks.serving_steps import DECODE, ITERATIONS, Cut, Work
from pallas_kernels.samples import CACHE_BYTES
from slope_jax import models

Key = tuple[Cut, Work]


class Timing(NamedTuple):
    """Milliseconds a step in each round."""

    rounds_ms: tuple[float, ...]

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.rounds_ms)


def result(
    work: Work, dense: Sequence[Cut], sparse: Sequence[Cut], timings: Mapping[Key, Timing]
) -> dict[str, Any]:
    """What the record says: the whole model by the line through both depths, and the depths."""
    depths, layers = _depths(dense)

    def whole(pair: Sequence[Cut], depth: int = layers) -> float:
        ms = tuple(timings[cut, work].milliseconds for cut in pair)
        return steps.line(depths, ms, depth)

    layer = [whole(pair, 1) - whole(pair, 0) for pair in (dense, sparse)]
    dense_ms, sparse_ms = whole(dense), whole(sparse)
    tokens = work.batch * (1 if work.phase == DECODE else work.prompt)
    return {
        **_named(dense, sparse),
        **work._asdict(),
        "sparsity": sparse[0].sparsity,
        "dtype": sparse[0].dtype,
        "iterations": ITERATIONS[work.phase],
        "dense_ms": round(dense_ms, 4),
        "sparse_ms": round(sparse_ms, 4),
        "speedup": round(dense_ms / sparse_ms, 3),
        "dense_tokens_per_s": round(1e3 * tokens / dense_ms, 1),
        "sparse_tokens_per_s": round(1e3 * tokens / sparse_ms, 1),
        "dense_ms_per_layer": round(layer[0], 5),
        "sparse_ms_per_layer": round(layer[1], 5),
        # None where noise hides the cost of a layer.
        "speedup_per_layer": round(layer[0] / layer[1], 3) if layer[1] > 0 else None,
        # Even the fewest layers, without table and head, do not stay in the device's cache.
        "weights_exceed_cache": min(c.layer_bytes for c in (*dense, *sparse)) > CACHE_BYTES,
        "at_depths": [
            {
                "depth": d.depth,
                "dense_ms": round(timings[d, work].milliseconds, 4),
                "sparse_ms": round(timings[s, work].milliseconds, 4),
                "speedup": round(timings[d, work].milliseconds / timings[s, work].milliseconds, 3),
                "dense_rounds_ms": [round(t, 4) for t in timings[d, work].rounds_ms],
                "sparse_rounds_ms": [round(t, 4) for t in timings[s, work].rounds_ms],
                "dense_layer_bytes": d.layer_bytes,
                "sparse_layer_bytes": s.layer_bytes,
            }
            for d, s in zip(dense, sparse, strict=True)
        ],
        "paths": sparse[1].paths(work),
    }


def weight_row(
    dense: Sequence[Cut],
    sparse: Sequence[Cut],
    dense_given: tuple[int, int] | None,
    sparse_given: tuple[int, int] | None,
) -> dict[str, Any]:
    """Bytes of the whole model's weights: of shapes, and by the line through what the device says.

    `ratio` is the device's, if it tells.
    """
    depths, layers = _depths(dense)
    shapes = [_whole(pair[0], layers).nbytes for pair in (dense, sparse)]
    given = [
        None if two is None else round(steps.line(depths, two, layers))
        for two in (dense_given, sparse_given)
    ]
    known = None not in given
    dense_bytes, sparse_bytes = given if known else shapes
    return {
        **_named(dense, sparse),
        "source": "device" if known else "shapes",
        "dense_bytes": dense_bytes,
        "sparse_bytes": sparse_bytes,
        "ratio": round(sparse_bytes / dense_bytes, 4),
        "dense_shape_bytes": shapes[0],
        "sparse_shape_bytes": shapes[1],
        "shape_ratio": round(shapes[1] / shapes[0], 4),
        "at_depths": [
            {
                "depth": d.depth,
                "dense_bytes": dense_given and dense_given[i],
                "sparse_bytes": sparse_given and sparse_given[i],
                "dense_shape_bytes": d.nbytes,
                "sparse_shape_bytes": s.nbytes,
            }
            for i, (d, s) in enumerate(zip(dense, sparse, strict=True))
        ],
    }


def line(row: dict[str, Any]) -> str:
    """A row of results or of weights in a line of text."""
    if "phase" not in row:
        return (
            f"  weights, rank {row['rank']}: {row['dense_bytes'] / 1e9:.3f} ->"
            f" {row['sparse_bytes'] / 1e9:.3f} GB ({row['ratio']:.4f}, by {row['source']})"
        )
    at = "; ".join(
        f"{x['depth']} layers {x['dense_ms']:.3f} -> {x['sparse_ms']:.3f} ms ({x['speedup']:.2f})"
        for x in row["at_depths"]
    )
    return (
        f"  {row['phase']} {row['batch']} x {row['prompt']}, rank {row['rank']}:"
        f" {row['speedup']:.2f} of all {row['layers']} layers ({row['dense_ms']:.2f} ->"
        f" {row['sparse_ms']:.2f} ms), {row['speedup_per_layer']} per layer; {at}"
    )


def _depths(dense: Sequence[Cut]) -> tuple[tuple[int, int], int]:
    """Those of both cuts, and of the whole model."""
    shallow, deep = dense
    return (shallow.depth, deep.depth), models.variant_config(shallow.model).num_layers


def _named(dense: Sequence[Cut], sparse: Sequence[Cut]) -> dict[str, Any]:
    """What a row is about."""
    depths, layers = _depths(dense)
    return {
        "model": dense[0].model,
        "layers": layers,
        "depths": list(depths),
        "rank": sparse[0].columns,
        "share": sparse[0].rank,
    }


def _whole(cut: Cut, layers: int) -> Cut:
    return Cut(cut.model, layers, cut.sparsity, cut.rank, cut.dtype)
