"""The benchmark of several GPUs of a host: the whole command on CPU devices, the check, the report."""

import doctest
import json

import jax
import numpy as np
import pytest

from benchmarks import agreement, multi_gpu, report_multi_gpu, steps
from benchmarks.steps import Case
from pallas_kernels.mosaic import support
from slope_jax.models import gpt2

DEVICE = "8x NVIDIA H100 80GB HBM3"


def test_examples_of_the_docstrings():
    assert doctest.testmod(agreement).failed == 0


@pytest.fixture
def small(monkeypatch):
    """A model with few words, so that its steps are quick."""
    few = gpt2.VARIANTS["gpt2-nano"] | {"vocab_size": 256}
    monkeypatch.setitem(gpt2.VARIANTS, "gpt2-nano", few)
    monkeypatch.setattr(agreement, "MOVES", 2)
    if jax.device_count() < 8:
        pytest.skip(f"8 devices are needed, {jax.device_count()} are there")


def run(monkeypatch, folder, *arguments):
    given = ["--models=gpt2-nano", "--depths=1,2", "--tokens=32", "--dtype=float32", *arguments]
    given += ["--overlap=", "--preheat=0", "--seconds=0", "--rounds=1", f"--results={folder}"]
    monkeypatch.setattr("sys.argv", ["multi_gpu", *given])
    multi_gpu.main()


def test_a_mesh_is_held_against_one_device_and_timed(small, monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "--meshes=fsdp:2;fsdp:16;fsdp:3")
    (path,) = tmp_path.glob("multi-gpu-*.json")
    record = json.loads(path.read_text())
    assert [(r["mesh"], r["gpus"]) for r in record["results"]] == [("", 1), ("fsdp:2", 2)]
    assert [left["mesh"] for left in record["left_out"]] == ["fsdp:16", "fsdp:3"]
    assert record["failed"] == []
    one, two = record["results"]
    for side in ("dense", "sparse"):
        check = two[f"{side}_agreement"]
        assert check["agrees"]
        assert check["loss"] != check["losses"][0]  # of tokens of its own for each share
        assert check["losses"][-1] < check["losses"][0]
        rates = [row[f"{side}_tokens_per_s_per_gpu"] for row in (two, one)]
        assert two[f"{side}_efficiency"] == pytest.approx(rates[0] / rates[1], rel=0.1)
    assert "agrees" in capsys.readouterr().out
    assert "| gpt2-nano | 1 | 2 | fsdp:2 |" in report_multi_gpu.measured(tmp_path)


def one_device(noise):
    course, noise = np.array([[10.0, 2.0]] * 3), np.full((3, 2), noise)
    limit = agreement.allowed(course, noise, "bfloat16")
    return agreement.Alone((10.0, 11.0), course, limit)


@pytest.mark.parametrize(
    ("first", "course", "agrees"),
    [
        (10.5, [[10.0, 2.0]] * 3, True),
        (10.501, [[10.001, 1.995]] * 3, True),
        (10.0, [[10.0, 2.0]] * 3, False),  # the first share's tokens everywhere
        (10.5, [[10.0, 1.0]] * 3, False),  # gradients that were not added up
        (10.5, [[10.0, 2.0], [10.0, 2.0], [10.1, 2.0]], False),  # another update
    ],
)
def test_what_differs_by_more_than_roundings_is_told(first, course, agrees, monkeypatch):
    def ran(program, data, *, count=3):
        return np.array([[first, 2.0]] if count == 1 else course)

    monkeypatch.setattr(agreement, "course", ran)
    program = steps.Program(Case("gpt2-nano", 1, 1, 4, mesh="data:2"), None, None, {})
    data = {"input_ids": np.zeros((2, 4), np.int32)}
    assert agreement.compare(program, data, one_device(1e-3))["agrees"] == agrees


def test_weights_move_within_what_is_rounded_away():
    w = {"a": {"kernel": steps.noise(np.uint32(1), (64, 64))}, "b": np.ones((3,), np.float32)}
    kept = jax.tree.map(np.array, w)
    for dtype in ("bfloat16", "float32"):
        found = agreement.moved(jax.tree.map(jax.numpy.array, kept), jax.random.key(0), dtype)
        change = np.abs(found["a"]["kernel"] / kept["a"]["kernel"] - 1)
        limit = jax.numpy.finfo(dtype).eps / 2
        assert limit / 2 < change.max() <= limit * (1 + 1e-3) + 1e-7
        assert (found["b"] != 1).any()


def test_the_step_of_a_mesh_lowers_with_the_kernels(monkeypatch):
    if (why := support.version_obstacle()) is not None:
        pytest.skip(why)
    monkeypatch.setattr(support, "device_obstacle", lambda: None)
    case = Case("gpt2-nano", 1, 2, 64, mesh="fsdp:2,tensor:2", implementation="mosaic")
    text = steps.lower(case, platforms=("cuda",)).step.as_text()
    for name in ("nm_matmul", "nm_sddmm", "nm_transpose", "all_gather", "reduce_scatter"):
        assert name in text


def check(apart: float) -> dict:
    return {"loss": 10.0, "loss_alone": 10.00001, "apart": apart, "agrees": apart <= 1}


def row(mesh: str, gpus: int, ms: tuple, efficiency: tuple, apart=0.5, **other) -> dict:
    sides = {}
    for side, t, e in zip(("dense", "sparse"), ms, efficiency, strict=True):
        sides |= {
            f"{side}_ms": t,
            f"{side}_tokens_per_s_per_gpu": round(8192e3 / t),
            f"{side}_efficiency": e,
            f"{side}_bytes": 20e9,
            f"{side}_agreement": check(apart) if mesh else None,
        }
    common = {"model": "opt-2.7b", "depth": 4, "tokens": 8192, "length": 2048, "sparsity": "2:4"}
    common |= {"rank": 0, "overlap": False, "speedup": round(ms[0] / ms[1], 3)}
    return common | {"mesh": mesh, "gpus": gpus} | sides | other


@pytest.fixture
def folder(tmp_path):
    rows = [
        row("", 1, (48.0, 40.0), (1.0, 1.0)),
        row("fsdp:2", 2, (50.0, 42.0), (0.96, 0.9524)),
        row("fsdp:8", 8, (60.0, 48.0), (0.8, 0.8333)),
        row("fsdp:8", 8, (50.0, 41.0), (0.96, 0.9756), overlap=True),
        row("data:8", 8, (64.0, 50.0), (0.75, 0.8)),
        row("tensor:2", 2, (30.0, 26.0), (0.8, 0.7692)),
    ]
    write(tmp_path, rows)
    return tmp_path


def write(folder, rows, **other):
    record = {"device": DEVICE, "versions": {"jax": "0.11.2", "python": "3.12.3"}, "failed": []}
    record |= {"date": "2026-12-01", "commit": "0123456789abcdef", "command": "python -m x"}
    record |= {"left_out": [], "results": rows} | other
    (folder / "multi-gpu-x.json").write_text(json.dumps(record))


def test_report_says_what_the_record_says(folder):
    text = report_multi_gpu.measured(folder)
    lines = {tuple(x.split(" | ")[2:4]): x for x in text.splitlines() if x.startswith("| opt-2.7b")}
    assert len(lines) == 6
    cells = lines["8", "fsdp:8"].split(" | ")
    assert cells[4:8] == ["60.0 → 48.0", "1.25", "136,533 → 170,667", "0.800 → 0.833"]
    hidden, bare = ([float(x) for x in cell.split(" → ")] for cell in cells[8:10])
    assert all(0.5 < low < high < 1 for low, high in zip(bare, hidden, strict=True))
    assert bare[0] < bare[1]  # 2:4 sends less
    assert "fsdp:8, overlap" in text
    assert lines["2", "tensor:2"].split(" | ")[8:10] == ["", ""]
    assert "As XLA schedules it, each of 8 GPUs keeps" in text
    assert "0.75 to 0.80 dense" in text
    assert "0.80 to 0.83 at 2:4" in text
    assert "All 10 steps on meshes have the losses" in text
    assert DEVICE in text


def test_report_names_what_is_not_right(folder):
    left = [{"model": "gpt2-xl", "mesh": "tensor:2", "overlap": False, "why": "25 heads"}]
    failed = [{"model": "gpt2-xl", "mesh": "", "what": "check", "error": "out of memory\nmore"}]
    rows = [row("data:8", 8, (64.0, 50.0), (None, None), apart=3.0)]
    write(folder, rows, left_out=left, failed=failed)
    text = report_multi_gpu.measured(folder)
    assert "**Not the losses and gradients of one GPU: opt-2.7b on data:8, dense; " in text
    assert "Left out: gpt2-xl on tensor:2: 25 heads." in text
    assert "Failed: gpt2-xl on one GPU, check: out of memory\n" in text


def test_pictures_are_the_same_each_time(folder, tmp_path):
    first = report_multi_gpu.drawn(tmp_path, folder)
    assert list(first) == [tmp_path / "multi-gpu.svg"]
    assert report_multi_gpu.drawn(tmp_path, folder) == first


def test_nothing_measured_is_said_and_not_drawn(tmp_path):
    assert report_multi_gpu.measured(tmp_path) == report_multi_gpu.MISSING
    assert report_multi_gpu.drawn(tmp_path, tmp_path) == {}


@pytest.mark.parametrize("argument", ["--meshes=fdsp:2", "--dropout=0.1"])
def test_bad_options_are_refused(argument, monkeypatch):
    monkeypatch.setattr("sys.argv", ["multi_gpu", argument])
    with pytest.raises(SystemExit, match="2"):
        multi_gpu.main()
