"""Finetune a pretrained BERT on a task of GLUE or on SQuAD, its sparse weights kept sparse:

    python -m train.finetune --task=glue/cola --checkpoint=runs/NAME --seeds 0 1 2
    python -m train.finetune --task=glue/rte --checkpoint=runs/NAME --data=DIR

DIR holds local files, DIR/RTE/train.tsv and dev.tsv; without it TensorFlow Datasets gives the data.
Results land in RUN/finetune, in finetune.json. Running the same command again goes on with the seeds
that are missing. In Python: `train.tasks.finetune(FinetuneConfig(task=..., checkpoint=...))`. Exit
codes: 0 done, 1 failed (diverged, full disk), 2 bad input, 130 stopped by Ctrl-C.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.command import quiet

if TYPE_CHECKING:
    from train.tasks import FinetuneConfig


def parse(args: Sequence[str]) -> "FinetuneConfig":
    """The configuration that a command line asks for.

    Raises:
      ValueError: a value out of range or not among the choices.
      SystemExit: after `--help`, or for an unknown or unreadable option.
    """
    import tyro

    from train.tasks.config import FinetuneConfig

    return tyro.cli(FinetuneConfig, args=args, prog="python -m train.finetune", description=__doc__)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    sys.stdout.reconfigure(line_buffering=True)
    quiet()
    try:
        config = parse(sys.argv[1:] if args is None else args)
        from train.tasks.job import dry_run, finetune

        if config.dry_run:
            print(dry_run(config))
        else:
            finetune(config)
    except (ValueError, NotImplementedError) as error:
        return _fail(str(error), 2)
    except (ArithmeticError, OSError) as error:
        return _fail(getattr(error, "strerror", None) or str(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on with the seeds that are missing", 130)
    return 0


def _fail(text: str, code: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
