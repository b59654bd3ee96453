"""Bytes that devices exchange in a training step, dense beside sparse: ``python -m benchmarks.communication``.

Compiles the job's own step (`train.step`) for a mesh of CPU devices, from shapes alone, and adds up
the collectives in the compiled program: bytes that each device sends in a step, by mesh axis, kind and
dtype, those in loops as often as the loops run. XLA's CPU backend widens collectives of 16-bit numbers
to float32, so that each is counted twice: as compiled, and in the dtype that the program asks for
(its StableHLO), which is what a GPU moves. `benchmarks.traffic` says on paper what must be moved.
"""

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from benchmarks import hlo, steps, traffic
from benchmarks.record import RESULTS, make_record, write_record
from pallas_kernels.samples import adapter_rank
from slope_jax import models
from slope_jax.sharding import BATCH, FSDP, batch_spec, shardings, size_of
from train.config import Config
from train.environment import cpu
from train.mesh import check_mesh, make_mesh, parse_mesh, set_mesh
from train.state import abstract_state, make_setup
from train.step import make_train_step

MODELS = ("opt-13b", "llama-3-8b", "mistral-7b", "gpt2-xl", "gpt2-small")
MESHES = ("fsdp:8", "data:2,fsdp:4", "fsdp:4,tensor:2")
DEVICES = 8
# Neither changes what is exchanged; both shorten the making of code that never runs.
COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """One step: a model on a mesh. `rank` is that of the adapters, 0 for none."""

    model: str
    mesh: str
    method: str
    rank: int
    sequences: int  # of a micro-batch, for each device along data and fsdp
    length: int
    remat: bool = False
    dtype: str = "bfloat16"

    @property
    def sizes(self) -> dict[str, int]:
        return parse_mesh(self.mesh)

    @functools.cached_property
    def config(self) -> Config:
        share = self.sizes[BATCH[0]] * self.sizes[BATCH[1]]
        return Config(
            model=self.model,
            method=self.method,
            mesh=self.mesh,
            adapter_rank=self.rank,
            dtype=self.dtype,
            remat=self.remat,
            seq_len=(self.length,),
            batch_size=(share * self.sequences,),
        )


def main() -> None:
    arguments = _arguments()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    name = f"communication-{arguments.part}" if arguments.part else "communication"
    record = make_record(name, [], device=cpu(), module="benchmarks.communication")
    record["left_out"] = []
    for model in arguments.models:
        for mesh in arguments.meshes:
            dense = None
            for case in cases(model, mesh, arguments):
                begin = time.monotonic()
                try:
                    row = measure(case)
                except Refused as error:
                    record["left_out"].append({"model": model, "mesh": mesh, "why": str(error)})
                    print(f"{model} {mesh}: {error}", file=sys.stderr, flush=True)
                    break
                dense = row if case.method == "dense" else dense
                row |= {f"{name}_ratio": round(row[f"{name}_bytes"] / dense[f"{name}_bytes"], 4) for name in ("sent", "compiled", "planned")}  # fmt: skip
                record["results"].append(row)
                write_record(record, arguments.results)
                print(f"{line(row)}, {time.monotonic() - begin:.0f} s", flush=True)
    path = write_record(record, arguments.results)
    print(f"{path.name}: {len(record['results'])} results, {len(record['left_out'])} left out")


class Refused(ValueError):
    """The mesh cannot cut the model."""


def cases(model: str, mesh: str, arguments: argparse.Namespace) -> list[Case]:
    """Dense first, then sparse, and with adapters where `fsdp` alone cuts."""
    chosen = steps.setting(model)
    length, sequences = arguments.length or chosen.length, arguments.sequences or chosen.sequences
    rank = adapter_rank(models.variant_config(model).hidden_size)
    make = functools.partial(
        Case, model, mesh, sequences=sequences, length=length, remat=arguments.remat
    )
    found = [make("dense", 0), make("slope", 0)]
    alone = parse_mesh(mesh)[FSDP] == DEVICES
    return [*found, make("slope", rank)] if arguments.adapters and alone else found


def programs(case: Case) -> tuple[Any, str, str]:
    """The model's configuration, and its step: lowered and compiled, as text.

    Raises:
      Refused: the mesh cannot cut the model.
    """
    vocabulary = models.variant_config(case.model).vocab_size
    mesh = make_mesh(case.config)
    with set_mesh(mesh):
        setup = make_setup(case.config, vocab_size=vocabulary)
        config = (setup.adapted if case.rank else setup.model).config
        try:
            check_mesh(case.config, config, setup.method.simulated)
        except ValueError as error:
            raise Refused(str(error)) from error
        state = abstract_state(setup, adapters=case.rank > 0)
        state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            state,
            shardings(state, mesh),
        )
        size = (case.sequences * size_of(mesh, BATCH), case.length)
        ids = jax.ShapeDtypeStruct(size, jnp.int32, sharding=NamedSharding(mesh, batch_spec(2)))
        step = make_train_step(1, setup.schedule, setup.method.at(0))
        key = jax.eval_shape(lambda: jax.random.key(0))
        lowered = step.lower(state, {"input_ids": ids, "labels": ids}, key)
        return config, lowered.as_text(), lowered.compile(compiler_options=COMPILER).as_text()


def measure(case: Case) -> dict[str, Any]:
    """What the record says of a case; the ratios to dense are left to the caller."""
    config, lowered, compiled = programs(case)
    dtypes, found = hlo.asked(lowered), hlo.collectives(compiled)
    asked = hlo.as_asked(found, dtypes)
    paper = traffic.items(
        config,
        case.sizes,
        tokens=case.sequences * case.length,
        itemsize=jnp.dtype(case.dtype).itemsize,
        remat=case.remat,
    )
    added = [c for c in asked if c.key not in dtypes]
    return {
        "model": case.model,
        "layers": config.num_layers,
        "method": case.method,
        "rank": case.rank,
        "mesh": case.mesh,
        "tokens": case.sequences * case.length,  # of a micro-batch, for each share of a batch
        "length": case.length,
        "remat": case.remat,
        "dtype": case.dtype,
        "collectives": len(found),
        "sent_bytes": round(sum(c.sent for c in asked)),
        "compiled_bytes": round(sum(c.sent for c in found)),
        "planned_bytes": round(traffic.total(paper)),
        "by": table(asked, case.sizes),
        "compiled_by": table(found, case.sizes),
        "added": largest(added, case.sizes),
    }


def table(found: list[hlo.Collective], sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Bytes by mesh axes, kind and dtype, the most first."""
    sums: Counter = Counter()
    for c in found:
        sums["+".join(hlo.axes_of(c.group, sizes)), c.kind, c.dtype] += c.sent
    return [
        {"axes": axes, "kind": kind, "dtype": dtype, "bytes": round(nbytes)}
        for (axes, kind, dtype), nbytes in sums.most_common()
    ]


def largest(added: list[hlo.Collective], sizes: dict[str, int], count: int = 3) -> dict[str, Any]:
    """What the partitioner added, all together and the largest ones."""
    rows = sorted(added, key=lambda c: -c.sent)[:count]
    return {
        "bytes": round(sum(c.sent for c in added)),
        "largest": [
            {
                "axes": "+".join(hlo.axes_of(c.group, sizes)),
                "kind": c.kind,
                "dtype": c.dtype,
                "bytes": round(c.sent),
                "operation": c.name[:160],
            }
            for c in rows
        ],
    }


def line(row: dict[str, Any]) -> str:
    """A result in a line of text."""
    return (
        f"{row['model']}, {row['mesh']}, {row['method']}, rank {row['rank']}:"
        f" {row['sent_bytes'] / 1e9:.3f} GB, {row['sent_ratio']:.3f} of dense (as compiled"
        f" {row['compiled_ratio']:.3f}, on paper {row['planned_ratio']:.3f};"
        f" {row['planned_bytes'] / row['sent_bytes']:.4f} of it on paper)"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--models", type=split, default=list(MODELS), help="a,b,...")
    parser.add_argument(
        "--meshes", type=lambda text: text.split(";"), default=list(MESHES), help="'a;b;...'"
    )
    parser.add_argument("--length", type=int, help="tokens in a sequence; each model's if left out")
    parser.add_argument("--sequences", type=int, help="of a micro-batch, for each device")
    parser.add_argument("--no-adapters", dest="adapters", action="store_false")
    parser.add_argument("--remat", action="store_true", help="keep the inputs of layers alone")
    parser.add_argument("--part", help="of the record's name")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the record")
    return parser.parse_args()


if __name__ == "__main__":
    main()
