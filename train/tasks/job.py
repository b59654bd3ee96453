"""The finetuning job: from a pretraining run to finetune.json, one seed after another."""

import math
import time
from typing import Any, NoReturn

import jax
import numpy as np
from rich.console import Console

from pallas_kernels.files import write_atomically
from slope_jax import TrainState
from train import environment
from train.display import Display, Speed, duration
from train.metrics import MetricsWriter
from train.step import all_finite
from train.tasks import results
from train.tasks.config import FinetuneConfig
from train.tasks.examples import TRAIN, Splits, read_splits
from train.tasks.features import make_features
from train.tasks.plan import Plan, make_plan
from train.tasks.saved import save_model
from train.tasks.scoring import score
from train.tasks.setup import Setup, init_state, load_run, make_setup
from train.tasks.step import batches, make_predict_step, make_train_step, on_device, predict

LOG_EVERY = 10  # steps whose mean loss is a line of metrics.jsonl
PLAN_FILE = "plan.txt"


def finetune(config: FinetuneConfig, *, console: Console | None = None) -> dict[str, Any]:
    """Finetune as configured; seeds that finetune.json holds already are not run again.

    Args:
      config: the job.
      console: where to report; by default standard output.

    Returns:
      What OUT/finetune.json holds (see `train.tasks.results`).

    Raises:
      ValueError: bad input, before anything was computed.
      ArithmeticError: the loss or the state is not finite; seeds that were finished are kept.
      OSError: the disk is full, or a download failed.
    """
    console = console or Console()
    trained = load_run(config)  # and what can be said against it ahead of a download
    setup = make_setup(config, trained, 1)
    examples = _read(config)
    setup = setup.with_sequences(len(examples[TRAIN]))
    plan = make_plan(config, trained, setup, {k: len(v) for k, v in examples.items()})
    folder = config.folder()
    record = results.open_record(config, trained, plan, examples, folder)
    write_atomically(folder / PLAN_FILE, f"{plan}\n")
    _say(console, plan.summary)
    seeds = [seed for seed in config.seeds if str(seed) not in record["seeds"]]
    if seeds:
        _Job(config, setup, trained, examples, folder, console).run(seeds, record)
    else:
        _say(console, f"{folder} is complete. To start anew, name another --out.")
    _say(console, results.describe(record, folder))
    return record


def dry_run(config: FinetuneConfig) -> Plan:
    """The plan of a job. Local files are read, nothing is downloaded.

    Raises:
      ValueError: bad input.
    """
    trained = load_run(config)
    setup = make_setup(config, trained, 1)
    examples = _read(config) if config.data else None
    setup = setup.with_sequences(len(examples[TRAIN])) if examples else setup
    counts = {split: len(rows) for split, rows in examples.items()} if examples else None
    return make_plan(config, trained, setup, counts)


def _read(config: FinetuneConfig) -> Splits:
    examples = read_splits(config.chosen, config.data)
    return examples | {TRAIN: examples[TRAIN][: config.limit]}


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


class _Job:
    def __init__(self, config: FinetuneConfig, setup: Setup, trained, examples, folder, console):
        self.config, self.setup, self.trained = config, setup, trained
        self.task, self.folder, self.console = config.chosen, folder, console
        self.examples, started = examples, time.monotonic()
        self.features = {
            split: make_features(self.task, rows, trained.vocabulary, setup.seq_len, config.stride)
            for split, rows in examples.items()
        }
        widths = ", ".join(
            f"{k} {len(v)} x {v.input_ids.shape[1]}" for k, v in self.features.items()
        )
        _say(self.console, f"tokenised in {duration(time.monotonic() - started)}: {widths}")
        self.setup = setup = setup.with_sequences(len(self.features[TRAIN]))
        self.data = {split: on_device(rows) for split, rows in self.features.items()}
        self.train_step = make_train_step(self.task.kind)
        self.predict_step = make_predict_step(self.task.kind, setup.apply_fn)
        self.done, self.pending, self.speed = 0, [], Speed()

    def run(self, seeds: list[int], record: dict[str, Any]) -> None:
        """Finetune with each seed, writing the record after each."""
        with Display(self.console, total=self.setup.steps * len(seeds), done=0) as self.display:
            for seed in seeds:
                record["seeds"][str(seed)] = self._run_seed(seed)
                record["environment"] = environment.describe(environment.JOB_PACKAGES)
                record["command"] = self.config.command()
                results.write(record, self.folder)

    def _run_seed(self, seed: int) -> dict[str, Any]:
        folder, started = self.folder / f"seed-{seed}", time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        self.seed, self.first = seed, self.done
        self.writer = MetricsWriter(folder, step=-1, tensorboard=False)
        try:
            state, evals = self._train(seed)
        finally:
            self.writer.close()
        if self.config.save_model:
            save_model(folder / "model", self.config, self.trained, state)
        found = results.of_seed(self.task, evals)
        return found | {"seconds": round(time.monotonic() - started, 1)}

    def _train(self, seed: int) -> tuple[TrainState, list[dict[str, Any]]]:
        head_key, dropout_key = jax.random.split(jax.random.key(seed))
        state = init_state(self.setup, self.trained, head_key)
        order, evals = np.random.default_rng(seed), []
        count = len(self.features[TRAIN])
        for epoch in range(1, self.setup.epochs + 1):
            for rows in batches(count, self.config.batch_size, order):
                state, loss = self.train_step(state, self.data[TRAIN], rows, dropout_key)
                self.done += 1
                self.pending.append(loss)
                if len(self.pending) == 2 * LOG_EVERY:  # those before the latest are done by now
                    self._report(LOG_EVERY)
            self._report(len(self.pending))
            if not bool(all_finite(state)):  # the latest update is in no loss yet
                self._stop(f"the state is not finite after step {self.done - self.first}")
            evals.append(self._evaluate(state, epoch))
        return state, evals

    def _report(self, count: int) -> None:
        """Look at the oldest `count` losses that weren't looked at."""
        if not count:
            return
        losses, self.pending = jax.device_get(self.pending[:count]), self.pending[count:]
        step, mean = self.done - len(self.pending), float(np.mean(losses))
        if not math.isfinite(mean):
            self._stop(f"the loss is {mean} by step {step - self.first}")
        width = self.features[TRAIN].input_ids.shape[1]
        self.speed.update(step, step * self.config.batch_size * width)
        self.display.update(step, {"loss": mean}, self.speed)
        line = {"loss": mean, "lr": float(self.setup.schedule(step - self.first - 1))}
        self.writer.write(step - self.first, line)

    def _stop(self, why: str) -> NoReturn:
        raise ArithmeticError(
            f"{why} of seed {self.seed}: finetuning stopped. Try a lower --lr, a longer --warmup or"
            f" --dtype=float32; seeds that were finished are in {self.folder}"
        )

    def _evaluate(self, state: TrainState, epoch: int) -> dict[str, Any]:
        found: dict[str, float] = {}
        with self.speed.paused():
            for split in self.task.held_out:
                predicted = predict(
                    self.predict_step, state.variables, self.data[split], 2 * self.config.batch_size
                )
                scores = score(self.task, self.examples[split], self.features[split], predicted)
                suffix = split.removeprefix("validation").removeprefix("_matched")
                found |= {f"{name}{suffix}": value for name, value in scores.items()}
        self.writer.write(
            self.done - self.first, {f"eval_{name}": value for name, value in found.items()}
        )
        text = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        self.display.message(f"seed {self.seed}  epoch {epoch}/{self.setup.epochs}  {text}")
        return {"epoch": epoch} | found
