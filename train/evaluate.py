"""Perplexity of a trained GPT-2, OPT, LLaMA or Mistral on text, or tasks of the LM Evaluation Harness:

    python -m train.evaluate --checkpoint=runs/NAME --data='text:held-out/*.txt'
    python -m train.evaluate --checkpoint=runs/NAME --data=docs --held-out
    python -m train.evaluate --checkpoint=runs/NAME --tasks=hellaswag,arc_easy

Documents are joined, each with an end-of-text token after it, behind what the model expects ahead of a
text (LLaMA's <s>), and read in windows: the first scores all its tokens, each later one those that are
new in it. `--held-out` keeps to the documents that the
run did not train on. Tasks need the extra `eval`.
"""

import argparse
import json
import math
import pathlib
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from train.command import check_place, exit_code, option
from train.generate import warn_of_length

if TYPE_CHECKING:
    import numpy as np

    from train.serving import Served

MOST_WINDOW = 4096  # tokens where none are asked for: some imported models have 131,072 positions
_LESS_MEMORY = (
    "give a lower --batch, a lower --window with --data, or --dtype=bfloat16 where it is float32"
)
# Options that one of the two ways takes alone.
_OF_MODE = {
    "data": ("held_out", "max_tokens", "window", "stride", "cache_dir"),
    "tasks": ("shots", "limit", "no_bos_token", "seed"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 if it is done, 1 if files or the memory failed, 2 for bad input."""
    return exit_code(_run, _arguments(args), less_memory=_LESS_MEMORY)


def perplexity(
    served: "Served",
    tokens: "np.ndarray",
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Perplexity of tokens in strided windows.

    Args:
      served: what `train.serving.load` gives, a decoder.
      tokens: integers (T,), T >= 2; each but the first is scored once.
      window: tokens read at once; None: the longest sequence of the run, or 4096 if that is longer.
      stride: tokens from window to window; None: half a window.

    Returns:
      {"tokens": scored ones, "nats_per_token", "perplexity", "accuracy", "window", "stride"}

    Raises:
      ValueError: no decoder, too few tokens, or a window, stride or batch size out of range.
      TypeError: `served` is something else, such as the path of a run.
    """
    import numpy as np

    from train.scoring import score, strided_windows

    check_decoder(served)
    window, stride = _steps(served, window, stride)
    windows = strided_windows(len(tokens), window, stride)
    pieces = [(tokens[w.start : w.stop + 1], w.stop - w.scored) for w in windows]
    with _progress(len(pieces)) as advance:
        scores = score(
            served.model, served.variables, pieces, batch_size=batch_size, advance=advance
        )
    nats = math.fsum(float(s.nats.sum(dtype=np.float64)) for s in scores)
    count = sum(len(s.nats) for s in scores)
    return {
        "tokens": count,
        "nats_per_token": nats / count,
        "perplexity": math.exp(min(nats / count, 700.0)),
        "accuracy": sum(int(s.greedy.sum()) for s in scores) / count,
        "window": window,
        "stride": stride,
    }


def _steps(served: "Served", window: int | None, stride: int | None) -> tuple[int, int]:
    most = served.model.config.max_positions
    window = min(served.longest, MOST_WINDOW) if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= most:
        raise ValueError(f"window={window} must lie between 1 and max_positions={most}")
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must lie between 1 and the window of {window} tokens")
    return window, stride


def check_decoder(served: "Served") -> None:
    """Raises a ValueError unless the model predicts the next token; a TypeError if it is none."""
    from slope_jax.models.decoder import Decoder
    from train.serving import check_served

    check_served(served)
    if not isinstance(served.model, Decoder):
        name = type(served.model).__name__
        raise ValueError(f"a {name} gives no next token; evaluate a GPT-2, OPT, LLaMA or Mistral")


def _run(arguments: argparse.Namespace) -> None:
    from pallas_kernels.files import write_atomically
    from train import serving

    _check(arguments)
    if arguments.held_out and serving.is_imported(arguments.checkpoint.expanduser()):
        raise _nothing_held_out(arguments.checkpoint)  # before weights are read
    served = serving.load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype)
    check_decoder(served)
    if arguments.held_out and "imported" in served.about:
        raise _nothing_held_out(served.title)
    if arguments.tasks is not None:
        from train.harness import evaluate_tasks

        found = evaluate_tasks(
            served,
            _task_names(arguments.tasks),
            shots=arguments.shots,
            limit=arguments.limit,
            batch_size=arguments.batch,
            add_bos_token=not arguments.no_bos_token,
            seed=arguments.seed or 0,
        )
        for name, numbers in found.items():
            for metric, value in numbers.items():
                print(f"{name}  {metric}  {value}")
    else:
        found = _text(served, arguments)
    if arguments.output is not None:
        about = _setting(served, arguments)
        write_atomically(arguments.output, json.dumps(about | {"results": found}, indent=1) + "\n")


def _setting(served: "Served", arguments: argparse.Namespace) -> dict[str, Any]:
    """What the numbers are of, and all that changes them; windows and strides are with the results."""
    about = {
        "model": served.about["config"]["model"],
        "step": served.about["step"],
        "dtype": served.model.config.dtype.name,
    }
    if arguments.tasks is None:
        return about | {
            "data": arguments.data,
            "held_out": bool(arguments.held_out),
            "max_tokens": arguments.max_tokens,
        }
    return about | {
        "tasks": _task_names(arguments.tasks),
        "shots": arguments.shots,
        "limit": arguments.limit,
        "add_bos_token": not arguments.no_bos_token,
        "seed": arguments.seed or 0,
    }


def _check(arguments: argparse.Namespace) -> None:
    """What is wrong, before the model and the data are read."""
    if (arguments.data is None) == (arguments.tasks is None):
        raise ValueError("give either --data=SOURCE for perplexity or --tasks=NAME,... for tasks")
    mode, other = ("data", "tasks") if arguments.tasks is None else ("tasks", "data")
    values = vars(arguments)
    given = [option(name) for name in _OF_MODE[other] if values[name] is not None]
    if given:
        raise ValueError(
            f"--{mode} takes no {', '.join(given)}, which --{other} does; leave it out"
        )
    for name in ("window", "stride", "batch", "max_tokens", "limit", "shots"):
        value, least = values[name], int(name != "shots")
        if value is not None and value < least:
            raise ValueError(f"{option(name)}={value} must be {least} or more")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**31:
        raise ValueError(f"--seed={arguments.seed} must lie in [0, 2**31)")
    if arguments.output is not None:
        _check_output(arguments.output)
    if arguments.tasks is not None:
        from train.harness import check_tasks

        check_tasks(_task_names(arguments.tasks))


def _check_output(path: pathlib.Path) -> None:
    """Raises a ValueError unless a file can be written there, in the place of one or as a new one."""
    if path.is_dir():
        raise ValueError(f"--output={path} is a folder; name a file in it")
    check_place(path)


def _task_names(given: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise ValueError(f"--tasks={given!r} has an empty name; give NAME or NAME,NAME")
    return names


def _text(served: "Served", arguments: argparse.Namespace) -> dict[str, Any]:
    from train.data import read_documents

    window, stride = _steps(served, arguments.window, arguments.stride)
    warn_of_length(served, window, f"a window of {window} tokens is long", "Give a lower --window")
    texts = read_documents(arguments.data, cache_dir=arguments.cache_dir)
    if arguments.held_out:
        texts = _held_out(texts, served.about["config"]["valid_fraction"])
    tokens, nbytes, documents = _tokens(served, texts, arguments.max_tokens)
    if documents == 0:
        which = " that the run held out; leave out --held-out" if arguments.held_out else ""
        raise ValueError(f"{arguments.data!r} gives no documents{which or '; give other data'}")
    begin = time.perf_counter()
    found = perplexity(
        served,
        tokens,
        window=window,
        stride=stride,
        batch_size=arguments.batch,
    )
    found["documents"] = documents
    # Where nothing is ahead of it, the first token is not scored, but its bytes count: of a long text,
    # nothing.
    found["bits_per_byte"] = found["nats_per_token"] * found["tokens"] / math.log(2) / nbytes
    found["seconds"] = round(time.perf_counter() - begin, 3)
    print(
        f"perplexity {found['perplexity']:,.3f}  ({found['nats_per_token']:.4f} nats a token,"
        f" {found['bits_per_byte']:.4f} bits a byte, accuracy {found['accuracy']:.4f};"
        f" {found['tokens']:,} tokens of {documents:,} documents, windows of {found['window']}"
        f" every {found['stride']})"
    )
    return found


def _nothing_held_out(name: object) -> ValueError:
    return ValueError(
        f"{name} comes from no run of ours, and nothing was held out; leave out --held-out"
    )


def _held_out(texts: Iterable[str], fraction: float) -> Iterable[str]:
    from train.data.build import held_out_score

    return (text for text in texts if held_out_score(text) < fraction)


def _tokens(served: "Served", texts: Iterable[str], most: int | None):
    """The documents' tokens in a row, the bytes of their text, and how many they are."""
    import numpy as np

    from train.data.build import encode_document

    pieces, nbytes, count, total = [np.array(served.beginning, np.int32)], 0, 0, 0
    for text in texts:
        tokens, _ = encode_document(text, served.vocabulary)
        if not len(tokens):
            continue
        pieces.append(tokens.astype(np.int32))
        nbytes += len(text.encode())
        count += 1
        total += len(tokens)
        if most is not None and total >= most:
            break
    return np.concatenate(pieces), nbytes, count


def _progress(total: int):
    """A bar of windows on a terminal; gives what advances it."""
    import contextlib

    from rich.console import Console
    from rich.progress import Progress

    @contextlib.contextmanager
    def shown():
        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("windows", total=total)
            yield lambda count: bar.advance(task, count)

    return shown()


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        required=True,
        help="folder of a run, one of its checkpoints/STEP, what train.generate --save wrote, or a"
        " Hugging Face folder",
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run; the latest if not given")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of the computation; that of the run if not given",
    )
    parser.add_argument("--data", help="as of train.pretrain: text:GLOB, tfds:NAME, docs")
    parser.add_argument(
        "--held-out", action="store_true", default=None, help="what the run held out alone"
    )
    parser.add_argument("--max-tokens", type=int, help="stop reading after the document with these")
    parser.add_argument(
        "--window", type=int, help="tokens; the run's longest sequence by default, at most 4096"
    )
    parser.add_argument("--stride", type=int, help="tokens; half a window by default")
    parser.add_argument(
        "--batch", type=int, default=8, help="most windows, or requests of tasks, at a time"
    )
    parser.add_argument("--tasks", help="of the LM Evaluation Harness: names or .yaml files, a,b")
    parser.add_argument(
        "--shots", type=int, help="solved examples ahead of each; the task's if not given"
    )
    parser.add_argument("--limit", type=int, help="examples of each task; all if not given")
    parser.add_argument(
        "--no-bos-token",
        action="store_true",
        default=None,
        help="tasks: put nothing ahead of texts, not even what the tokenizer does",
    )
    parser.add_argument("--seed", type=int, help="of tasks that sample; 0 if not given")
    parser.add_argument("--cache-dir", type=pathlib.Path, help="of the data, as of train.pretrain")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file for the numbers")
    return parser.parse_args(args)


if __name__ == "__main__":
    sys.exit(main())
