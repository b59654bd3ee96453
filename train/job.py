"""The pretraining job: from a configuration to a trained, summarised run, through any stop."""

import contextlib
import functools
import json
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from rich.console import Console

from pallas_kernels.files import write_atomically
from slope_jax import TrainState
from slope_jax.sharding import BATCH, size_of
from train import environment, processes, summary
from train.checkpoint import Checkpoints, check_space
from train.config import Config, Phase, to_json
from train.data import batches_from
from train.display import Display
from train.folder import (
    TOKENIZER_FILE,
    check_config,
    note_config,
    open_folder,
    run_folder,
    start_anew,
)
from train.history import History
from train.inputs import make_datasets, open_corpus
from train.integrity import set_aside_damaged
from train.mesh import make_mesh, place, set_mesh, share_of
from train.methods import wanda
from train.metrics import MetricsWriter
from train.plan import Plan, make_plan
from train.processes import first_then_others, is_first, together
from train.signals import StopRequest
from train.state import (
    Setup,
    abstract_state,
    as_called,
    init_state,
    join_adapters,
    make_setup,
    step_key,
)
from train.step import all_finite, evaluate, make_train_step
from train.stops import Exit, Stopped, Stops
from train.watch import NonFiniteError, Watch


def pretrain(config: Config, *, console: Console | None = None, stop_at: int | None = None) -> int:
    """Train as configured, going on from the run's last checkpoint if there is one.

    Args:
      config: the run.
      console: where to report; by default standard output.
      stop_at: save and stop after so many steps in all, as a signal would.

    Returns:
      An exit code, see `Exit`.

    Raises:
      ValueError: bad input, before anything was computed.
      NonFiniteError: training diverged; names the last good checkpoint.
      DamagedError: none of the run's checkpoints is what was written.
      OutOfSpace: the disk is full; what was saved before is intact.
    """
    started = time.monotonic()
    processes.connect(config)
    job: _Job | None = None

    def where() -> str:
        return f"after step {job.step}" if job else "before the first step"

    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.lost_together(where))
        processes.check_command(config)
        with together("plan the run"):  # finds all that is wrong without the data
            mesh = make_mesh(config)
            stack.enter_context(set_mesh(mesh))
            setup = make_setup(config)
            plan = make_plan(config, setup)
        folder, console = stack.enter_context(_opened(config, plan, console or Console()))
        with together("open the checkpoints"):
            checkpoints = Checkpoints(folder, keep=config.keep_checkpoints)
            stack.callback(checkpoints.close)
        with processes.lost_together(where):  # ahead of closing, which waits for the others
            job = _Job(config, mesh, folder, checkpoints, console, started, (setup, plan))
            return _run(job, stop_at)


@contextlib.contextmanager
def _opened(config: Config, plan: Plan, console: Console) -> Iterator[tuple[pathlib.Path, Console]]:
    """The run's folder, which the first process holds and has made fit to go on in, and a console."""
    with contextlib.ExitStack() as stack:
        folder = run_folder(config)
        with together("open the run's folder"):
            if is_first():
                stack.enter_context(open_folder(config))
                check_space(folder, plan.checkpoint_bytes)
                set_aside_damaged(folder / "checkpoints", functools.partial(_say, console))
        if jax.process_count() > 1:
            processes.check_shared(folder)
        with together("write a log"):
            if not is_first():
                console = stack.enter_context(processes.own_log(folder))
        yield folder, console


def _run(job: "_Job", stop_at: int | None) -> int:
    try:
        return job.run(stop_at)
    except ValueError as error:  # not the caller's fault any more
        raise RuntimeError(f"training failed after step {job.step}") from error


class _Job:
    """One process's part of a run."""

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh | None,
        folder: pathlib.Path,
        checkpoints: Checkpoints,
        console: Console,
        started: float,
        ahead: tuple[Setup, Plan],
    ):
        self.config, self.folder, self.checkpoints = config, folder, checkpoints
        self.console, self.started = console, started
        self.fresh = checkpoints.latest() is None
        self.step = checkpoints.latest() or 0
        self.history = History(started)
        processes.check_same(
            f"{checkpoints.latest()}",
            f"the last checkpoint in {folder}",
            "its disk is slow to show all hosts the same; try again, or another --run-dir",
        )
        with together("read the last checkpoint"):
            data = self._open_record()
        self.corpus = first_then_others(
            "prepare the data", lambda: open_corpus(config, folder, data)
        )
        processes.check_same(
            self.corpus.fingerprint,
            f"the text of --data={config.data}",
            "give every process the same files and packages",
        )
        with together("set up the model"):
            self.share, devices = share_of(mesh), size_of(mesh, BATCH) if mesh else 1
            self.data = make_datasets(config, self.corpus, self.share, devices)
            self.setup, self.plan = ahead
            if self.corpus.vocab_size != config.vocab_size:
                self.setup = make_setup(config, vocab_size=self.corpus.vocab_size)
                self.plan = make_plan(config, self.setup)
        self.key = processes.replicated(step_key(self.setup))

    def run(self, stop_at: int | None) -> int:
        if is_first():
            write_atomically(self.folder / "plan.txt", f"{self.plan}\n")
        if self.step == self.config.total_steps and not self.fresh:
            self._say(f"{self.folder} is complete. To start anew, name another --run-dir.")
            return self._finish()
        self._say(str(self.plan).split("\n\n")[0])
        stopped = self._train(stop_at)
        if stopped is None:
            return self._finish()
        self.checkpoints.wait()
        self._say(
            f"{stopped.reason}; saved after step {self.step} of {self.config.total_steps} in "
            f"{self.checkpoints.path(self.step)}.\nThe same command goes on from there:\n"
            f"  {summary.command()}"
        )
        return stopped.code

    def _open_record(self) -> str | None:
        """Take up what the last checkpoint says; returns the fingerprint of its corpus."""
        if self.fresh:
            _check_start(self.config)
            if is_first():
                start_anew(self.folder, self.config)
                if self.config.init_from:
                    wanda.take_tokenizer(self.config, self.folder)
            return None
        record, tokenizer = self.checkpoints.read_run(self.step)
        check_config(record["config"], self.step, self.config, self.folder)
        self.history |= record["history"]  # one of an earlier version may lack some
        if is_first():
            note_config(self.folder, self.config)
            if not (self.folder / TOKENIZER_FILE).exists():
                write_atomically(self.folder / TOKENIZER_FILE, json.dumps(tokenizer))
        return record["data"]

    def _initial_state(self) -> TrainState:
        if self.fresh:
            state, batches = init_state(self.setup), self.data[0].train
            return self.setup.method.start(state, self.setup.model, batches, self._say)
        joined = self.config.adapter_step
        shapes = abstract_state(self.setup, adapters=joined is not None and self.step > joined)
        state, self.key = self.checkpoints.restore(self.step, shapes)
        self._say(f"Going on after step {self.step} from {self.checkpoints.path(self.step)}")
        return state

    def _train(self, stop_at: int | None) -> Stopped | None:
        total, stopped = self.config.total_steps, None
        with StopRequest(self.config.grace_seconds) as request:
            stops = Stops(self.config, request, self.started, stop_at)
            state = self._initial_state()
            self.writer = MetricsWriter(
                self.folder,
                step=self.step,
                evaluated=any(x["step"] == self.step for x in self.history["evals"]),
                tensorboard=self.config.tensorboard,
                active=is_first(),
            )
            try:
                with Display(self.console, total=total, done=self.step) as self.display:
                    self.watch = Watch(
                        self.config,
                        self.history,
                        self.display,
                        self.writer,
                        self.started,
                        self._give_up,
                    )
                    if self.fresh:
                        self._evaluate(state, self.config.phases[0])
                    if total == 0:
                        self._save(state)
                    while self.step < total and not stopped:
                        state, stopped = self._train_phase(state, stops)
                    self.checkpoints.wait()
            finally:
                self.writer.close()
        return stopped

    def _train_phase(self, state: TrainState, stops: Stops) -> tuple[TrainState, Stopped | None]:
        phase = next(p for p in self.config.phases if self.step < p.end)
        train_step = self._train_step(phase)
        batches = batches_from(self.data[phase.index].train, self.step - phase.start)
        self.watch.compiles()
        while self.step < phase.end:
            if self.step == self.config.adapter_step:
                if self.history["evals"][-1]["step"] != self.step:
                    self._evaluate(state, phase)  # what the adapters bring is told from here on
                state = self._join(state)
            if self.step in self.setup.method.turns:
                train_step = self._turn(phase)
            batch = place(next(batches), self.share)
            state, metrics = train_step(state, batch, self.key)
            self.step += 1
            self.watch.add(self.step, metrics)
            if self._due(self.config.eval_every):
                self._evaluate(state, phase)
            stopped = stops.after(self.step)
            if stopped or self._due(self.config.checkpoint_every):
                self._save(state)
            if stopped:
                return state, stopped
        return state, None

    def _train_step(self, phase: Phase):
        method = self.setup.method.at(self.step)
        return make_train_step(phase.accumulation, self.setup.schedule, method)

    def _turn(self, phase: Phase):
        self.watch.compiles()
        self.display.message(
            f"step {self.step}/{self.config.total_steps}  {self.setup.method.turns[self.step]}; the"
            f" step is compiled again"
        )
        return self._train_step(phase)

    def _join(self, state: TrainState) -> TrainState:
        self.watch.compiles()
        state, count = join_adapters(self.setup, state)
        if count != self.plan.adapters:
            raise RuntimeError(f"{count} layers got adapters, {self.plan.adapters} were planned")
        self.history["adapters"] = count
        self.display.message(
            f"step {self.step}/{self.config.total_steps}  adapters of rank {self.plan.rank} join "
            f"{count} linears; the step is compiled again"
        )
        return state

    def _evaluate(self, state: TrainState, phase: Phase) -> None:
        self.watch.look()
        held_out = self.data[phase.index].held_out
        with self.watch.speed.paused():
            count = min(self.config.eval_batches, len(held_out))
            batches = [place(held_out[i], self.share) for i in range(count)]
            metrics = evaluate(as_called(self.setup, state), batches)
        if not math.isfinite(metrics["eval_loss"]):
            self._give_up(f"the held-out loss is {metrics['eval_loss']} after step {self.step}")
        self.history["evals"].append({"step": self.step} | metrics)
        self.writer.write(self.step, metrics)
        accuracy = "".join(f"  {k[5:]} {v:.3f}" for k, v in metrics.items() if "accuracy" in k)
        self.display.message(
            f"step {self.step}/{self.config.total_steps}  held-out loss {metrics['eval_loss']:.4f}"
            f"  perplexity {metrics['eval_perplexity']:,.1f}{accuracy}"
        )

    def _save(self, state: TrainState) -> None:
        self.watch.look()
        with self.watch.speed.paused():
            if not bool(all_finite(state)):
                self._give_up(f"the state is not finite after step {self.step}")
            self.writer.sync()
            self.history.settle(self.watch.speed)
            evals = {x["step"]: x["eval_loss"] for x in self.history["evals"]}
            tokenizer = json.loads(self.corpus.tokenizer.to_json())
            self.checkpoints.save(state, self.key, self._record(), tokenizer, evals.get(self.step))

    def _record(self) -> dict[str, Any]:
        phase = next(p for p in self.config.phases if self.step <= p.end)
        return {
            "config": to_json(self.config),
            "step": self.step,
            "phase": phase.index,
            "data": self.corpus.fingerprint,
            "history": self.history,
            "environment": environment.describe(environment.JOB_PACKAGES),
        }

    def _due(self, every: int) -> bool:
        return self.step == self.config.total_steps or (every > 0 and self.step % every == 0)

    def _give_up(self, what: str) -> NoReturn:
        self.checkpoints.wait()
        good = self.checkpoints.latest()
        where = (
            "No checkpoint had been saved yet"
            if good is None
            else f"The last good checkpoint is {self.checkpoints.path(good)}"
        )
        raise NonFiniteError(
            f"{what}: training stopped, nothing was saved. {where}. Try a lower --lr, a longer "
            f"--warmup, a smaller --clip or --dtype=float32, in another --run-dir."
        )

    def _finish(self) -> int:
        self.checkpoints.wait()
        if not is_first():
            return Exit.DONE
        evals = [x for x in self.history["evals"] if x["step"] in self.checkpoints.steps()]
        best = min(evals, key=lambda x: x["eval_loss"])["step"]
        paths = {"last": self.checkpoints.path(self.step), "best": self.checkpoints.path(best)}
        result = summary.write_summary(
            self.config,
            self.plan,
            self.folder,
            self.history,
            {name: str(path) for name, path in paths.items()},
        )
        self._say(summary.describe(result, self.folder))
        return Exit.DONE

    def _say(self, text: str) -> None:
        _say(self.console, text)


def _check_start(config: Config) -> None:
    if config.mesh and config.method == "wanda":
        raise ValueError(
            "--method=wanda prunes on one device: start it without --mesh, stop it once it trains"
            " (Ctrl-C, or --max-minutes), and give --mesh to the command that goes on"
        )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)
