"""Time and memory of prefill and decode, dense beside sparse: ``python -m benchmarks.inference``.

Each model is cut to two depths, in the form that generates (`benchmarks.serving_steps`): 16-bit
weights, random; the line through the depths gives the cost of the whole model. The weights of both
depths are more than the device's cache holds, so that decode reads them from memory.

Times are wall times of compiled loops of several steps, many of them in a row, the last one waited
for; dense and sparse of all ranks take turns, and the median of the rounds counts. Bytes of the
weights are what the device says it gave them (`memory_stats()["bytes_in_use"]`), beside those of
their shapes. What matters most comes first: the first prompts and batches at the first two ranks for
every model, then the rest. The record is written after each model, from the first that has a result or
fails, which is named in it, as is what there was no time for. Without a GPU, `--models` is needed.
"""

import argparse
import gc
import itertools
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # of the device, kept at once

import jax

from benchmarks import serving_steps, steps, train_step
from benchmarks.record import RESULTS, make_record, write_record
from benchmarks.serving_rows import Key, Timing, line, result, weight_row
from benchmarks.serving_steps import DECODE, ITERATIONS, PREFILL, Cut, Program, Work
from benchmarks.train_step import Failed
from pallas_kernels.mosaic import support
from pallas_kernels.samples import CACHE_BYTES
from slope_jax import models
from slope_jax.models.decoder import DecoderConfig
from train.environment import accelerator

MODELS = (
    "opt-13b",
    "llama-3-8b",
    "mistral-7b",
    "opt-6.7b",
    "opt-66b",
    "opt-30b",
    "opt-2.7b",
    "gpt2-xl",
    "gpt2-large",
    "gpt2-medium",
    "gpt2-small",
)
PROMPTS = ((1, 2048), (8, 512), (1, 512), (8, 2048))
BATCHES = (1, 16, 4, 64)
RANKS = (0.0, steps.ADAPTERS, 0.0625)
FIRST = 2  # of each come first
CONTEXT = 512  # tokens before those that are decoded
FIRST_SECONDS, SWITCH_SECONDS = 0.5, 0.1  # of preheating: the first of all, and at each switch
THREADS = 8


class Stage(NamedTuple):
    """A model and what is measured of it together."""

    model: str
    works: tuple[Work, ...]
    ranks: tuple[float, ...]

    def __str__(self) -> str:
        ranks = ", ".join(f"{rank:g}" for rank in self.ranks)
        return f"{self.model}: {', '.join(map(str, self.works))}; rank {ranks}"


def main() -> None:
    arguments = _arguments()
    if why := support.device_obstacle():
        print(f"sparse products by XLA, for {why}", file=sys.stderr)
    stop = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    name = f"inference-{arguments.part}" if arguments.part else "inference"
    record = make_record(name, [], device=accelerator(), module="benchmarks.inference")
    record |= {"cache_bytes": CACHE_BYTES, "weights": [], "failed": [], "left_out": []}
    planned = stages(arguments)
    record["left_out"] = [str(stage) for stage in planned]  # until it is measured
    path = None  # an older record stays until there is something to put in its place
    with ThreadPoolExecutor(THREADS) as pool:
        for stage in planned:
            if time.monotonic() > stop:
                break
            begin = time.monotonic()
            print(f"{stage}: begins", flush=True)
            found, left = measured(stage, pool, arguments, stop)
            known = {(row["model"], row["rank"]) for row in record["weights"]}
            found["weights"] = [
                row for row in found["weights"] if (row["model"], row["rank"]) not in known
            ]
            for kind, rows in found.items():
                record[kind] += rows
            place = record["left_out"].index(str(stage))
            rest = [str(stage._replace(works=left))] if left else []
            record["left_out"][place : place + 1] = rest
            if record["results"] or record["failed"]:
                path = write_record(record, arguments.results)
            print(f"{stage}: {time.monotonic() - begin:.0f} s", flush=True)
            for row in (*found["weights"], *found["results"]):
                print(line(row), flush=True)
    if record["left_out"]:
        print("left out for want of time:", *record["left_out"], sep="\n  ")
    if path is None:
        print("nothing was measured, and no record is written; give more --minutes")
        return
    print(f"{path.name}: {len(record['results'])} results, {len(record['failed'])} failed")
    if record["failed"]:
        sys.exit(1)


def stages(arguments: argparse.Namespace) -> list[Stage]:
    """What is run, the most important first; each point of works x ranks once."""
    prompts, batches = arguments.prompts, arguments.batches
    prefills = [Work(PREFILL, *prompt) for prompt in prompts]
    decodes = [Work(DECODE, batch, arguments.context) for batch in batches]
    ranks = tuple(arguments.ranks)
    core = (*prefills[:FIRST], *decodes[:FIRST])
    others = (*prefills[FIRST:], *decodes[FIRST:])
    found = []
    for works, some in ((core, ranks[:FIRST]), (core, ranks[FIRST:]), (others, ranks)):
        if not works or not some:
            continue
        for model in arguments.models:
            fitting = tuple(dict.fromkeys(_within(model, work) for work in works))
            if works is others:  # a model with few positions may have them all done
                fitting = tuple(w for w in fitting if w not in {_within(model, x) for x in core})
            if fitting:
                found.append(Stage(model, fitting, some))
    return found


def measured(
    stage: Stage, pool: ThreadPoolExecutor, arguments: argparse.Namespace, stop: float
) -> tuple[dict[str, list[dict[str, Any]]], tuple[Work, ...]]:
    """Results, weights and failures of a stage, as the record keeps them; and works left at `stop`."""
    depths = arguments.depths or serving_steps.depths(stage.model)
    common = {"model": stage.model, "dtype": arguments.dtype}
    variants = [{"sparsity": "dense"}, *({"rank": rank} for rank in stage.ranks)]
    cuts = {i: [Cut(**common, **v, depth=d) for d in depths] for i, v in enumerate(variants)}
    errors: dict[Key | Cut, Failed] = {}
    variables, nbytes = {}, {}
    for number, (shallow, deep) in cuts.items():
        made = train_step.outcome(lambda deep=deep, shallow=shallow: weighed(deep, shallow))
        if isinstance(made, Failed):
            errors[deep] = made
        else:
            variables[number], nbytes[number] = made
    works = stage.works if time.monotonic() <= stop else ()
    keys = [(cut, work) for i in variables for work in works for cut in cuts[i]]
    programs = compiled(keys, pool, arguments)
    errors |= {key: p for key, p in programs.items() if isinstance(p, Failed)}
    held = {cut: variables[i] for i in variables for cut in cuts[i]}
    timings: dict[Key, Timing] = {}
    done = 0
    for work in itertools.takewhile(lambda _: time.monotonic() <= stop, works):
        done += 1
        for place in range(2):
            group = [(pair[place], work) for i, pair in cuts.items() if i in variables]
            group = {key: programs[key] for key in group if key not in errors}
            found, wrong = timed(group, held, arguments)
            timings |= found
            errors |= wrong
            gc.collect()
    dense, *sparse = cuts.values()
    results = [
        result(work, dense, pair, timings)
        for pair in sparse
        for work in stage.works
        if all((cut, work) in timings for cut in (*dense, *pair))
    ]
    weights = [
        weight_row(dense, cuts[i], nbytes[0], nbytes[i]) for i in nbytes if i and 0 in nbytes
    ]
    found = {"results": results, "weights": weights, "failed": _failures(errors)}
    return found, stage.works[done:]


def weighed(deep: Cut, shallow: Cut) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Variables of the deeper cut, and the bytes that the device gave to both; None: it is silent."""
    before = in_use()
    variables = serving_steps.random_variables(deep)
    both = in_use()
    if before is None or both is None:
        return variables, None
    variables = serving_steps.first_layers(variables, shallow.depth)
    gc.collect()
    few = in_use()
    del variables
    gc.collect()
    return serving_steps.random_variables(deep), (few - before, both - before)


def in_use() -> int | None:
    """Bytes of the device's arrays; None if it does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_in_use")


def compiled(
    keys: Sequence[Key], pool: ThreadPoolExecutor, arguments: argparse.Namespace
) -> dict[Key, Program | Failed]:
    """The compiled loops, or why one could not be; never while anything is timed."""

    def lower(key: Key):
        return train_step.outcome(lambda: serving_steps.lower(*key))

    def compile_(lowered):
        if isinstance(lowered, Failed):
            return lowered
        options = {"autotune": arguments.autotune, "options": dict(arguments.xla)}
        return train_step.outcome(lambda: lowered.compile(**options))

    lowered = dict(zip(keys, pool.map(lower, keys), strict=True))
    # The first of each work tries the products that it shares with the others.
    firsts = list({key[1]: key for key in reversed(keys)}.values())
    programs = dict(zip(firsts, pool.map(lambda k: compile_(lowered[k]), firsts), strict=True))
    rest = [key for key in keys if key not in programs]
    return programs | dict(zip(rest, pool.map(lambda k: compile_(lowered[k]), rest), strict=True))


def timed(
    programs: Mapping[Key, Program],
    held: Mapping[Cut, Mapping[str, Any]],
    arguments: argparse.Namespace,
) -> tuple[dict[Key, Timing], dict[Key, Failed]]:
    """Rounds of many loops in alternating order, each after a preheating; and what failed."""
    runs, counts, errors = {}, {}, {}
    for key, program in programs.items():
        started = train_step.outcome(lambda key=key, p=program: _started(p, held[key[0]]))
        if isinstance(started, Failed):
            errors[key] = started
            continue
        runs[key], seconds = started
        counts[key] = max(1, round(arguments.seconds / seconds))
    times: dict[Key, list[float]] = {key: [] for key in runs}
    heating = FIRST_SECONDS
    for number in range(arguments.rounds):
        for key in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            run, loops = runs[key], counts[key]
            begin = time.perf_counter()
            while time.perf_counter() - begin < heating * arguments.preheat:
                run.loops(1)
            heating = SWITCH_SECONDS
            begin = time.perf_counter()
            run.loops(loops)
            seconds = (time.perf_counter() - begin) / loops
            times[key].append(1e3 * seconds / ITERATIONS[key[1].phase])
    found = {}
    for key, run in runs.items():
        wrong = train_step.outcome(run.check)
        if isinstance(wrong, Failed):
            errors[key] = wrong
        else:
            found[key] = Timing(tuple(times[key]))
    return found, errors


def _started(program: Program, variables: Mapping[str, Any]):
    run = program.start(variables)
    run.loops(1)
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        run.loops(1)
        seconds.append(time.perf_counter() - begin)
    return run, min(seconds)


def _within(model: str, work: Work) -> Work:
    """The work with a prompt that the model has positions for."""
    spare = ITERATIONS[DECODE] if work.phase == DECODE else 0
    most = models.variant_config(model).max_positions - spare
    return work._replace(prompt=min(work.prompt, most))


def _failures(errors: Mapping[Key | Cut, Failed]) -> list[dict[str, Any]]:
    rows = []
    for key, text in errors.items():
        cut, work = (key, None) if isinstance(key, Cut) else key
        what = f"{cut.name}, {work}" if work else f"{cut.name}, weights"
        print(f"failed: {cut.model} {what}: {text[:300]}", file=sys.stderr, flush=True)
        where = {"model": cut.model, "depth": cut.depth, "what": what, "rank": cut.columns}
        rows.append({**where, "error": str(text)[:500]})
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is run, for how long, and where the record goes."""
    parser.add_argument("--models", type=_decoders, help="a,b,...; on a GPU, all if not given")
    parser.add_argument(
        "--batches", type=_numbers, default=BATCHES, help="decoded; a,b,... or none"
    )
    parser.add_argument(
        "--prompts", type=_prompts, default=PROMPTS, help="BATCHxTOKENS,... or none"
    )
    parser.add_argument("--ranks", type=train_step.ranks, default=list(RANKS), help="of adapters")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens ahead of decoded ones")
    parser.add_argument(
        "--depths", type=train_step.two_depths, help="A,B; each model's if not given"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--minutes", type=float, help="start nothing after; what is done is kept")
    parser.add_argument("--part", help="name of the record, for a part of the list")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    train_step.add_compiler_arguments(parser)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each variant")
    parser.add_argument("--seconds", type=float, default=0.1, help="of a turn")
    arguments = parser.parse_args()
    _fill_in_models(parser, arguments)
    if not arguments.batches and not arguments.prompts:
        parser.error("--batches=none and --prompts=none leave nothing to do")
    return arguments


def _fill_in_models(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """All of them if none is named, which ends the command where they would take hours."""
    if arguments.models is not None:
        return
    if jax.default_backend() == "cpu":
        parser.error(
            "there is no GPU here, and on a CPU the models take hours: name small ones, as in"
            " --models=gpt2-nano"
        )
    arguments.models = list(MODELS)


def _decoders(text: str) -> list[str]:
    found = train_step.model_names(text)
    wrong = [name for name in found if not isinstance(models.variant_config(name), DecoderConfig)]
    if wrong:
        raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: no decoder, so it generates nothing")
    return found


def _numbers(text: str) -> list[int]:
    return [] if text == "none" else train_step.numbers(text)


def _prompts(text: str) -> list[tuple[int, int]]:
    if text == "none":
        return []
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give batches and tokens, as in 1x2048,8x512")
    return [tuple(int(n) for n in part.split("x")) for part in text.split(",")]


if __name__ == "__main__":
    main()
