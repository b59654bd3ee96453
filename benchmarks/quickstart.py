"""The quickstart job, sparse and dense, side by side: ``python -m benchmarks.quickstart``.

Runs ``python -m train.pretrain`` once for each method, with the same seed, data and tokenizer, one
after the other, and records what both end with. Held-out text is the same for both and masked the
same way; accuracy is that of the masked words (BERT) or of the next word (GPT-2). Evaluation is
rarer than the recipe's and on more text. Options of the job may follow: ``--steps=300``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, make_record, write_record
from train.environment import JOB_PACKAGES, accelerator

METHODS = ("slope", "dense")
EVALUATION = ("--eval-batches=32", "--eval-every=75")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="bert-base", help="as for train.pretrain")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record")
    parser.add_argument("--runs", type=Path, default=None, help="keep the runs here, and go on")
    arguments, options = parser.parse_known_args()  # others are for train.pretrain
    with tempfile.TemporaryDirectory() as temporary:
        runs = arguments.runs or Path(temporary)
        summaries = [run(arguments.model, method, runs, options) for method in METHODS]
    record = make_record(
        f"quickstart-{arguments.model}",
        [result_of(summary) for summary in summaries],
        device=accelerator(),
        module="benchmarks.quickstart",
        packages=JOB_PACKAGES,
    )
    print(write_record(record, arguments.results).name)


def run(model: str, method: str, runs: Path, options: list[str]) -> dict[str, Any]:
    """Run the job through its command; returns what it wrote in summary.json.

    Raises:
      SystemExit: the job failed; with its exit code.
    """
    folder = folder_of(runs, model, method)
    command = ["-m", "train.pretrain", f"--model={model}", f"--method={method}"]
    command += [f"--run-dir={folder}", *EVALUATION, *options]
    done = subprocess.run([sys.executable, *command])
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads((folder / "summary.json").read_text())


def folder_of(runs: Path, model: str, method: str) -> Path:
    """Where `run` leaves a run."""
    return runs / f"{model}-{method}"


def result_of(summary: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a run that the record keeps, units in their names."""
    last, config = summary["held_out_last"], summary["config"]
    accuracy = "eval_mlm_accuracy" if "eval_mlm_accuracy" in last else "eval_token_accuracy"
    return {
        "model": summary["model"],
        "recipe": summary["recipe"],
        "method": summary["method"],
        "sparsity": summary["sparsity"],
        "data": config["data"].split(":")[0],
        "seed": config["seed"],
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "adapter_step": summary["adapter_step"],
        "adapter_rank": summary["adapter_rank"],
        "parameters_stored": summary["parameters"],
        "parameters_dense": summary["dense_parameters"],
        "held_out_sequences": config["eval_batches"]
        * (config["batch_size"][-1] // config["accumulation"][-1]),
        "held_out_loss_first": summary["held_out_first"]["eval_loss"],
        "held_out_loss": last["eval_loss"],
        "held_out_perplexity": last["eval_perplexity"],
        "held_out_accuracy": last[accuracy],
        "seconds": summary["seconds"],
        "tokens_per_second": summary["tokens_per_second"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }


if __name__ == "__main__":
    main()
