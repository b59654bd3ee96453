"""Time to the first token and tokens/s of generated text, dense beside sparse.

    python -m benchmarks.generation --model=gpt2-small --steps=100

trains both (as `benchmarks.quickstart` does; other options are those of the job), then generates as
`python -m train.generate` does: the same loop and the same chunks, greedily. Prompts are random
tokens, and no token ends a text, so that both sides make as many. Dense and sparse take turns; the
median of the rounds counts, and the first round is told apart, for it compiles.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import quickstart
from benchmarks.record import RESULTS, make_record, write_record
from slope_jax import explain
from slope_jax.generate import stream
from train import serving
from train.command import quiet
from train.environment import JOB_PACKAGES, accelerator
from train.texts import CHUNK

PROMPTS = ((1, 32), (1, 512), (8, 128), (32, 128))


class Timing(NamedTuple):
    """Of one call: the first token, and all that follow."""

    first_seconds: float
    rest_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2-small", help="as for train.pretrain")
    parser.add_argument("--prompts", type=_shapes, default=PROMPTS, help="as 1x32,8x128")
    parser.add_argument("--new-tokens", type=int, default=129, help="of each prompt")
    parser.add_argument("--rounds", type=int, default=7, help="besides the one that compiles")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--runs", type=Path, default=None, help="keep the runs here, and go on")
    arguments, options = parser.parse_known_args()  # others are for train.pretrain
    if arguments.new_tokens < 2 or arguments.rounds < 1:
        parser.error("--new-tokens must be at least 2, --rounds at least 1")
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or Path(temporary)
        for method in quickstart.METHODS:
            quickstart.run(arguments.model, method, runs, options)
        served = {
            method: serving.load(quickstart.folder_of(runs, arguments.model, method))
            for method in quickstart.METHODS
        }
    results = [
        measure(served, batch, length, arguments.new_tokens, arguments.rounds)
        for batch, length in arguments.prompts
    ]
    record = make_record(
        f"generation-{arguments.model}",
        results,
        device=accelerator(),
        module="benchmarks.generation",
        packages=JOB_PACKAGES,
    )
    print(write_record(record | {"models": about(served)}, arguments.results).name)


def measure(
    served: Mapping[str, serving.Served], batch: int, length: int, new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Both sides on prompts of one shape; the numbers that the record keeps."""
    size = min(each.about["vocab_size"] for each in served.values())
    prompts = jax.random.randint(jax.random.key(length), (batch, length), 0, size)
    compiling = {name: once(each, prompts, new_tokens) for name, each in served.items()}
    timings: dict[str, list[Timing]] = {name: [] for name in served}
    for turn in range(rounds):
        for name in list(served)[:: -1 if turn % 2 else 1]:
            timings[name].append(once(served[name], prompts, new_tokens))
    numbers = {}
    for name, side in (("dense", "dense"), ("slope", "sparse")):
        first, rest = map(statistics.median, zip(*timings[name], strict=True))
        numbers[f"{side}_first_ms"] = 1000 * first
        numbers[f"{side}_tokens_per_s"] = batch * (new_tokens - 1) / rest
        numbers[f"{side}_compiling_s"] = sum(compiling[name])
    return {
        "batch": batch,
        "prompt": length,
        "new_tokens": new_tokens,
        "rounds": rounds,
        **numbers,
        "first_speedup": numbers["dense_first_ms"] / numbers["sparse_first_ms"],
        "speedup": numbers["sparse_tokens_per_s"] / numbers["dense_tokens_per_s"],
    }


def once(served: serving.Served, prompts: jax.Array, new_tokens: int) -> Timing:
    """Generates and looks at every chunk, as the command does.

    Raises:
      RuntimeError: it gave another number of tokens.
    """
    begin = time.perf_counter()
    pieces = stream(served.model, served.variables, prompts, max_new_tokens=new_tokens, chunk=CHUNK)
    made = next(pieces).shape[1]
    first = time.perf_counter()
    made += sum(piece.shape[1] for piece in pieces)
    end = time.perf_counter()
    if made != new_tokens:
        raise RuntimeError(f"{made} tokens were made, not {new_tokens}")
    return Timing(first - begin, end - first)


def about(served: Mapping[str, serving.Served]) -> dict[str, Any]:
    """What was served: bytes, adapters, training, and what multiplies."""
    return {
        name: {
            "bytes": each.nbytes,
            "adapters": each.about["adapters"],
            "steps": each.about["step"],
            "paths": explain(
                each.model, each.variables, input_ids=jnp.zeros((1, 1), jnp.int32)
            ).forward_paths,
        }
        for name, each in served.items()
    }


def _shapes(text: str) -> Sequence[tuple[int, int]]:
    try:
        shapes = tuple(tuple(map(int, part.split("x"))) for part in text.split(","))
    except ValueError:
        shapes = ()
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise argparse.ArgumentTypeError(f"{text!r} is not BATCHxTOKENS,BATCHxTOKENS,...")
    return shapes


if __name__ == "__main__":
    main()
