"""A kill at a random moment; `python -m benchmarks.soak` does two hundred."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import soak
from train.pretrain import parse

ROOT = pathlib.Path(__file__).parents[1]
SHORT = """
import sys
from benchmarks import soak
soak.STEPS, soak.JOIN = 24, 6
soak.SHARED |= {"steps": 24, "adapter-start": 0.25, "eval-every": 0, "adapter-rank": 0}
soak.SHARED["sparsity"] = "layers/[1-3]/mlp/up=2:4; .*=dense"  # few linears compile fast
soak.STARTING_SHARE, soak.TRAINING_SECONDS = 0.0, 0.3
sys.argv[1:] = ["--kills=1", "--variants", "asynchronous", "--results", sys.argv[1]]
sys.exit(soak.main())
"""


def test_killed_runs_lose_nothing(tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),  # a kill may cut a file in it
    }
    done = subprocess.run(
        [sys.executable, "-c", SHORT, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("soak-*.json")
    found = json.loads(path.read_text())["results"]
    assert found["kills"] == 1
    assert found["runs_equal_to_the_uninterrupted_one"] == found["runs"] >= 1


@pytest.mark.parametrize("name", soak.VARIANTS)
def test_every_variant_has_adapters_that_join_on_the_way(name, tmp_path):
    config = parse(soak.command(name, tmp_path / "run"))
    assert 0 < config.adapter_step < soak.STEPS
