"""Pretrain BERT, GPT-2, OPT, LLaMA or Mistral, 2:4 sparse, with low-rank adapters if asked for:

    python -m train.pretrain --model=bert-base
    python -m train.pretrain --model=gpt2-small --recipe=paper --dry-run

Running the same command again goes on from the last checkpoint. Exit codes: 0 done, 1 failed
(diverged, full disk, a lost process), 2 bad input, 75 stopped by --max-minutes, 130 and 143 stopped
and saved upon Ctrl-C and SIGTERM; a second Ctrl-C ends it at once, unsaved.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.config import Config


def parse(args: Sequence[str]) -> "Config":
    """The configuration that a command line asks for.

    The recipe, the model and the number of phases are looked at first: they decide the defaults of
    all other fields, which `--help` then shows.

    Raises:
      ValueError: a value out of range or not among the choices.
      SystemExit: after `--help`, or for an unknown or unreadable option.
    """
    import tyro

    from train.config import Config
    from train.config_checks import check_given
    from train.recipes import defaults

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model", default=Config.model)
    first.add_argument("--recipe", default=Config.recipe)
    first.add_argument("--seq-len", "--seq_len", nargs="+", default=None)
    known, _ = first.parse_known_args(args)
    phases = len(known.seq_len) if known.seq_len else None
    fields = defaults(known.recipe, known.model, phases=phases)
    config = tyro.cli(
        Config,
        args=args,
        default=Config(**fields),
        prog="python -m train.pretrain",
        description=__doc__,
    )
    flags = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
    check_given(config, {flag[2:].replace("-", "_") for flag in flags})
    return config


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (see `train.job.Exit`)."""
    sys.stdout.reconfigure(line_buffering=True)
    _quiet()
    try:
        config = parse(sys.argv[1:] if args is None else args)
        if config.dry_run:
            from train.plan import make_plan

            print(make_plan(config))
            return 0
        from train.job import pretrain

        return int(pretrain(config))
    except (ValueError, NotImplementedError) as error:
        return _fail(error, 2)
    except (ArithmeticError, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail(
            RuntimeError("interrupted; the same command goes on from the last checkpoint"), 130
        )


def _quiet() -> None:
    """Show this package's own messages; of libraries only warnings."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's, despite the name
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("train").setLevel(logging.INFO)


def _fail(error: Exception, code: int) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        text = error.strerror
    print(f"error: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
