"""What the kernels of many tokens share: persistent CTAs of two consumers and one producer."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mutils

from pallas_kernels.sections import Sections, fit

CONSUMERS = 2  # warpgroups
STEP = 64  # of the contracted axis per stage
SHARED_MEMORY = 232448 - 1024  # bytes per CTA, less the barriers
OPTIONS = {
    "num_threads": CONSUMERS + 1,
    "thread_name": "wg",
    # Safe where every hand-over of shared memory goes through a barrier in it.
    "compiler_params": plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
    ),
}


def check_shared_memory(tile) -> None:
    if tile.shared_memory > SHARED_MEMORY:
        raise ValueError(f"{tile}: needs {tile.shared_memory} bytes of {SHARED_MEMORY}")


def clusters(processors: int, size: int) -> int:
    """About how many clusters of so many CTAs run at once, each CTA on a processor of its own.

    A cluster lies in one of the GPU's groups of processors. Of an H100's 132, 30 clusters of four found
    room together, and 32 did not; of two, all 66 do. Other sizes are a guess by these.

    >>> clusters(132, 2), clusters(132, 4)
    (66, 30)
    """
    fitting = processors // size
    return fitting if size <= 2 else fitting - fitting // 11


def run(produce, consume) -> None:
    """Calls produce() in one warp, and consume(wg) in warpgroups 0 .. CONSUMERS - 1."""
    wg = lax.axis_index("wg")

    @pl.when(wg == CONSUMERS)
    def _producer():
        plgpu.set_max_registers(24, action="decrease")

        @plgpu.warp_map
        def _(warp):
            pl.when(warp == 0)(produce)

    @pl.when(wg < CONSUMERS)
    def _consumer():
        plgpu.set_max_registers(240, action="increase")
        consume(wg)


def named(name: str, x: jax.Array | Sections) -> dict[str, jax.Array]:
    """An operand by its name, or its sections by their numbers as well: x0, x1, ...

    Raises:
      ValueError: a section would end within a stage.
    """
    if not isinstance(x, Sections):
        return {name: x}
    if not fit(x, STEP):
        raise ValueError(f"{name} has sections of {x.sizes}; they must be multiples of {STEP}")
    return {f"{name}{number}": part for number, part in enumerate(x.parts)}


def sections(name: str, refs: dict) -> list:
    """What `named` gave names to."""
    if name in refs:
        return [refs[name]]
    found = (refs.get(f"{name}{number}") for number in itertools.count())
    return list(itertools.takewhile(lambda ref: ref is not None, found))


def in_section(sizes: Sequence[int], column, body) -> None:
    """Calls body(number, column in it) for the section with this column of all; the last has all beyond it."""
    if len(sizes) == 1:
        body(0, column)
        return
    for number, first in enumerate(itertools.accumulate(sizes[:-1], initial=0)):
        inside = column >= first
        if number + 1 < len(sizes):
            inside &= column < first + sizes[number]
        pl.when(inside)(functools.partial(body, number, column - first))


def meet() -> None:
    """The threads of a warpgroup wait for each other: one of them may then speak for all."""

    @plgpu.inline_mgpu()
    def body(ctx):
        mutils.warpgroup_barrier()

    body()


def next_stage(stage, stages: int):
    return lax.select(stage == stages - 1, jnp.int32(0), stage + 1)
