"""Whether a mesh trains as one device does: losses and norms of gradients of the first steps.

A step on a mesh runs on two batches. One has tokens of its own for each share: its loss is the mean of
those that one device has, share by share. The other has the same tokens in all shares: its losses and
gradients are those of one device on one share, step by step.

Devices add up in another order, so that numbers differ by roundings; how much that may be is
measured. One device runs again with every weight moved at random within what the compute dtype rounds
away (`moved`), several times. A number agrees if it is no further from that of one device than `allowed`:
`WIDTH` times the root mean square of what the moves do to it, some units of float32, in which it is kept,
and of what follows from gradients, which are rounded on other ways, half a unit of the compute dtype.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import steps
from benchmarks.steps import Case, Program

STEPS = 3  # of the course that is compared
MOVES = 4
WIDTH = 4.0
UNITS = 8.0

Batch = dict[str, jax.Array]


class Alone(NamedTuple):
    """What one device does.

    Attributes:
      losses: of the first step, on each share.
      course: (STEPS, 2), loss and norm of the gradient of each step on the first share.
      allowed: (STEPS, 2), how far from it a mesh may be.
    """

    losses: tuple[float, ...]
    course: np.ndarray
    allowed: np.ndarray


def alone(program: Program, data: Batch) -> Alone:
    """Runs a step of one device on each share of `data`, and the first one's course again and again."""
    rows = program.case.sequences
    parts = [part(data, first, rows) for first in range(0, len(data["input_ids"]), rows)]
    reference = course(program, parts[0])
    others = [course(program, parts[0], seed=seed) for seed in range(MOVES)]
    noise = np.sqrt(np.mean([(other - reference) ** 2 for other in others], axis=0))
    losses = [course(program, each, count=1)[0, 0] for each in parts[1:]]
    limit = allowed(reference, noise, program.case.dtype)
    return Alone((reference[0, 0], *losses), reference, limit)


def allowed(numbers: np.ndarray, noise: np.ndarray, dtype: str) -> np.ndarray:
    """How far from the numbers of a course is near enough.

    Args:
      numbers: (steps, 2), losses and norms.
      noise: root mean square of what moved weights change of them.
      dtype: of the products.

    >>> numbers = np.array([[10.0, 2.0], [9.0, 2.0]])
    >>> allowed(numbers, 0 * numbers, "bfloat16").round(4).tolist()
    [[0.0, 0.0078], [0.0039, 0.0078]]
    """
    losses, norms = numbers.T
    from_gradients = np.stack([losses - losses[0], norms], axis=1)
    half = float(jnp.finfo(dtype).eps) / 2
    units = UNITS * np.finfo(np.float32).eps * numbers
    return WIDTH * noise + np.abs(units) + half * np.abs(from_gradients)


def compare(program: Program, data: Batch, one: Alone) -> dict[str, Any]:
    """What the record says of a mesh: both losses of the first step, and the worst of all numbers.

    Args:
      data: as given to `alone`, of which the mesh takes as many shares as it has.
    """
    shares, rows = program.case.shares, program.case.sequences
    loss = course(program, part(data, 0, shares * rows), count=1)[0, 0]
    found = course(program, jax.tree.map(lambda x: jnp.concatenate([x[:rows]] * shares), data))
    expected = np.mean(one.losses[:shares])
    apart = abs(loss - expected) / one.allowed[0, 0], *(abs(found - one.course) / one.allowed).flat
    worst = float(max(apart))
    return {
        "loss": round(float(loss), 7),
        "loss_alone": round(float(expected), 7),
        "loss_allowed": float(f"{one.allowed[0, 0]:.3g}"),
        "losses": [round(float(x), 7) for x in found[:, 0]],
        "losses_alone": [round(float(x), 7) for x in one.course[:, 0]],
        "norms": [round(float(x), 7) for x in found[:, 1]],
        "norms_alone": [round(float(x), 7) for x in one.course[:, 1]],
        "apart": float(f"{worst:.3g}"),
        "agrees": worst <= 1,
    }


def course(program: Program, data: Batch, *, count: int = STEPS, seed: int | None = None):
    """(count, 2): loss and norm of the gradient of each step from the start, or a moved one."""
    run = program.start(data)
    if seed is not None:
        key = jax.random.key(seed)
        run.state = run.state.replace(params=moved(run.state.params, key, program.case.dtype))
    found = []
    for _ in range(count):
        run.steps(1)
        found.append((run.loss(), float(run.metrics["grad_norm"])))
    return np.array(found)


@functools.partial(jax.jit, static_argnames="dtype", donate_argnums=0)
def moved(params: Any, key: jax.Array, dtype: str) -> Any:
    """Each parameter times 1 ± up to half of the distance between two numbers of `dtype` at 1."""
    leaves, treedef = jax.tree.flatten(params)
    seeds = jax.random.bits(key, (len(leaves),), jnp.uint32)
    unit = jnp.finfo(dtype).eps / 2 / (steps.WEIGHT_STD * math.sqrt(3))  # of the noise's largest
    pairs = zip(leaves, seeds, strict=True)
    return treedef.unflatten([w * (1 + unit * steps.noise(seed, w.shape)) for w, seed in pairs])


def part(data: Batch, first: int, rows: int) -> Batch:
    """Some rows of a batch."""
    return jax.tree.map(lambda x: x[first : first + rows], data)


def tokens(case: Case, shares: int) -> Batch:
    """A batch of so many shares, for one device to hold."""
    rows = [steps.batch(case, seed=share) for share in range(shares)]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)
