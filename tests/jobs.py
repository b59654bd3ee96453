"""The training job as tests run it."""

import os

from rich.console import Console

from train.config import Config
from train.job import pretrain


def run(config: Config, stop_at: int | None = None) -> tuple[int, str]:
    """The exit code of a run, and what it said."""
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, record=True, width=200)
        code = pretrain(config, console=console, stop_at=stop_at)
    return code, console.export_text()
