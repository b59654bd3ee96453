"""How many tokens a second the input pipeline delivers: ``python -m benchmarks.input_pipeline``.

Measures the whole way from the token store to batches of numpy arrays, on the ``docs`` corpus by
default, for both objectives: with plain indexing in one thread, with the background threads the
training job uses, and with Grain's worker processes. Tokens of padding do not count. Each figure is
the median of the repeats, after a warm-up; the goal is 1M tokens/s on two cores.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

from benchmarks.record import make_record, write_record
from train.data import Corpus, batches_from, make_dataset, prepare
from train.environment import cpu

SHAPES = {"mlm": ((128, 256), (512, 64)), "clm": ((128, 256), (1024, 32))}
MODES = ("indexing", "threads", "processes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="docs", help="as for train.pretrain")
    parser.add_argument("--cache-dir", default=None, help="as for train.pretrain")
    parser.add_argument("--workers", type=int, default=2, help="threads or processes")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each repeat")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    results = []
    for objective, shapes in SHAPES.items():
        corpus = prepare(arguments.data, objective=objective, cache_dir=arguments.cache_dir)
        for (seq_len, batch_size), mode in itertools.product(shapes, MODES):
            workers = 1 if mode == "indexing" else arguments.workers
            dataset = make_dataset(
                corpus.train, objective=objective, seq_len=seq_len, batch_size=batch_size
            )
            rate = tokens_per_second(
                lambda d=dataset, m=mode, w=workers: _iterator(d, m, w),
                arguments.seconds,
                arguments.repeats,
            )
            results.append(
                {
                    "objective": objective,
                    "mode": mode,
                    "workers": workers,
                    "seq_len": seq_len,
                    "batch_size": batch_size,
                    "tokens_per_s": round(rate),
                    "corpus_tokens": _tokens(corpus),
                }
            )
            print(f"{objective} {seq_len:5} x {batch_size:<4} {mode:10} {rate / 1e6:7.2f} M/s")
    record = make_record(
        "input-pipeline",
        results,
        device=cpu(),
        module="benchmarks.input_pipeline",
        packages=("grain", "tokenizers"),
    )
    print(write_record(record))


def tokens_per_second(make: Callable[[], Iterator], seconds: float, repeats: int) -> float:
    """Median rate of an iterator over batches, once it is warm."""
    batches = make()
    for _ in range(20):
        next(batches)
    rates = []
    for _ in range(repeats):
        tokens, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            batch = next(batches)
            lengths = batch.get("lengths")
            tokens += int(batch["input_ids"].size if lengths is None else lengths.sum())
        rates.append(tokens / elapsed)
    return statistics.median(rates)


def _iterator(dataset, mode: str, workers: int) -> Iterator:
    if mode == "indexing":
        return (dataset[i] for i in itertools.count())
    if mode == "threads":
        return batches_from(dataset, threads=workers)
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask for flags nobody has set.
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=8)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1)).mp_prefetch(options))


def _tokens(corpus: Corpus) -> int:
    return sum(split["tokens"] for split in corpus.stats.values())


if __name__ == "__main__":
    main()
