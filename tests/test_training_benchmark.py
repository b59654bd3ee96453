"""The benchmarks of training steps: what is run, what is said of given times, and the report."""

import argparse
import dataclasses
import doctest
import json
import math
import threading
import types

import jax
import numpy as np
import pytest

from benchmarks import (
    memory,
    pictures,
    report_scaling,
    report_training,
    sharded_step,
    step_profile,
    steps,
    train_step,
)
from benchmarks.step_profile import Event, Instruction
from benchmarks.steps import Case
from benchmarks.train_step import Failed, Timing
from pallas_kernels import CompressedMatrix, Pattern, decompress
from slope_jax import masks, models

DEVICE = "NVIDIA H100 80GB HBM3"


def test_examples_of_the_docstrings():
    for module in (steps, step_profile):
        assert doctest.testmod(module).failed == 0


def test_operations_are_counted_as_on_paper():
    tokens, width, layers, length = 4 * 64, 128, 3, 64
    case = Case("gpt2-nano", layers, 4, length)
    vocabulary = 50264  # padded
    linears = 6 * tokens * (12 * width**2 * layers + width * vocabulary)
    attention = 12 * length * width * tokens * layers / 2
    assert steps.flops(case) == linears + attention
    assert steps.flops(case) == steps.flops(dataclasses.replace(case, sparsity="dense"))
    bert = Case("bert-tiny", 2, 4, length)
    masked = 4 * 10
    heads = 6 * (masked * (width**2 + width * 30528) + 4 * (width**2 + 2 * width))
    assert steps.flops(bert) == 6 * tokens * 12 * width**2 * 2 + heads + 2 * attention * 2 / layers


def test_models_are_timed_at_lengths_and_depths_that_they_have():
    for name, chosen in steps.MODELS.items():
        config = models.variant_config(name)
        assert chosen.length == min(config.max_positions, 2048)
        assert 3 <= chosen.depths[0] < chosen.depths[1] <= config.num_layers
        ranks = {Case(name, 3, 1, 8, rank=steps.ADAPTERS).config.rank}
        assert all(rank % 8 == 0 and rank / config.hidden_size >= 0.0156 for rank in ranks)


@pytest.fixture(scope="module")
def program():
    """A real one: three layers, so that two are scanned."""
    case = Case("gpt2-nano", 3, 2, 16, dtype="float32")
    return steps.lower(case).compile()


def test_a_real_step_trains_a_random_state(program):
    run = program.start()
    params, metadata = run.state.params, run.state.masks
    up = params["layers_1_to_2"]["mlp"]["up"]["kernel"]
    assert float(up.std()) == pytest.approx(steps.WEIGHT_STD, rel=0.02)
    assert abs(float(up.mean())) < 1e-3
    assert float((up[:, 1:] == up[:, :-1]).mean()) < 0.01
    assert (params["norm"]["scale"] == 1).all()
    positions = metadata["layers_1_to_2"]["mlp"]["up"]["kernel"]
    pattern = Pattern(2, 4)
    for values, kept in zip(up, positions, strict=True):
        w = CompressedMatrix(np.ones_like(values), kept, pattern, 0, (128, 512))
        mask = decompress(w) != 0
        assert masks.is_nm(mask, pattern)
        assert int(mask.sum()) == 128 * 512 // 2
    run.steps(1)
    assert run.loss() == pytest.approx(math.log(50257), abs=0.5)
    before = run.loss()
    run.steps(3)
    assert run.loss() < before


def test_xla_counts_what_the_account_of_memory_counts(program):
    case = program.case
    found = memory.account(case)
    kinds = ("parameters", "metadata", "mu", "nu", "optimizer counters")
    tokens, step = 2 * case.tokens * 4, 4  # the key is dropped, for nothing is
    given = sum(found.total(kind) for kind in kinds) + tokens + step
    assert program.xla_bytes["arguments"] == given
    assert program.nbytes > given + found.total("gradients") / 2


def test_whole_models_follow_from_two_depths():
    dense = [Case("opt-13b", depth, 4, 2048, sparsity="dense") for depth in (3, 5)]
    sparse = [Case("opt-13b", depth, 4, 2048) for depth in (3, 5)]
    times = [
        (timing(40.0, 30_000), timing(30.0, 20_000)),
        (timing(60.0, 50_000), timing(44.0, 31_000)),
    ]
    found = train_step.result(dense, sparse, times, DEVICE, {"mosaic: fast": 19})
    assert (found["model"], found["layers"], found["depths"]) == ("opt-13b", 40, [3, 5])
    assert (found["dense_ms_per_layer"], found["sparse_ms_per_layer"]) == (10.0, 7.0)
    assert (found["dense_ms"], found["sparse_ms"]) == (60 + 35 * 10, 44 + 35 * 7)
    assert found["speedup"] == round(410 / 289, 3)
    assert (found["dense_bytes"], found["sparse_bytes"]) == (400_000, 223_500)
    assert found["ratio"] == round(223_500 / 400_000, 4)
    # 40 layers of 12 h^2 weights and the vocabulary at 6 operations, and causal attention.
    operations = 8192 * (6 * (40 * 12 * 5120**2 + 5120 * 50272) + 40 * 6 * 2048 * 5120)
    assert found["mfu_dense"] == pytest.approx(operations / 0.410 / 989e12, abs=1e-4)
    assert [at["speedup"] for at in found["at_depths"]] == [round(40 / 30, 3), round(60 / 44, 3)]
    json.dumps(found)


def timing(ms: float, nbytes: int) -> Timing:
    return Timing((ms, 0.9 * ms, 1.5 * ms), nbytes, 10.0, alone=False)


class FakeProgram(steps.Program):
    """Takes bytes as told, and milliseconds that a fake clock counts."""

    def __init__(self, case, nbytes=100, error=None):
        super().__init__(case, None, None, {"xla: told to": 3})
        self.xla_bytes = {"arguments": nbytes, "temporaries": nbytes // 10, "outputs": 0}
        self.error = error

    def start(self):
        if self.error:
            raise RuntimeError(self.error)
        return types.SimpleNamespace(steps=lambda count: None, loss=lambda: 1.0)


def options(**other) -> argparse.Namespace:
    return argparse.Namespace(rounds=2, seconds=0.0, preheat=0.0, **other)


CASES = [
    Case("gpt2-nano", depth, 2, 16, sparsity=sparsity)
    for sparsity in ("dense", "2:4")
    for depth in (3, 4)
]


def test_what_does_not_fit_or_fails_is_named_and_the_rest_is_timed(monkeypatch, capsys):
    programs = {case: FakeProgram(case) for case in CASES}
    programs[CASES[1]] = FakeProgram(CASES[1], nbytes=10_000)
    programs[CASES[2]] = Failed("ValueError: no such thing")
    monkeypatch.setattr(train_step, "bytes_limit", lambda: 1_000)
    found, failed = train_step.measured(programs, options())
    assert set(found) == {CASES[0], CASES[3]}
    assert {(f["what"], f["depth"]): f["error"] for f in failed} == {
        ("sparse", 3): "ValueError: no such thing",
        ("dense", 4): "needs 0.0 GB by XLA's account, 0.0 are there",
    }
    assert "no such thing" in capsys.readouterr().err
    assert train_step.results(CASES, found, DEVICE, {}) == []


def test_programs_that_fail_together_are_tried_alone():
    programs = {case: FakeProgram(case) for case in CASES}
    programs[CASES[0]] = FakeProgram(CASES[0], error="RESOURCE_EXHAUSTED: out of memory")
    found, failed = train_step.measured(programs, options())
    assert set(found) == set(CASES[1:])
    assert found[CASES[2]].alone
    assert not found[CASES[3]].alone
    assert [f["error"] for f in failed] == ["RuntimeError: RESOURCE_EXHAUSTED: out of memory"]


def test_programs_take_turns_only_where_all_fit():
    two = {case: FakeProgram(case, 100) for case in CASES[::2]}
    assert [list(group) for group in train_step.groups(two, 211)] == [CASES[::2]]
    assert [list(group) for group in train_step.groups(two, 209)] == [[c] for c in CASES[::2]]
    assert train_step.groups({}, 1.0) == []


@pytest.fixture
def fake_programs(monkeypatch):
    """No program is compiled; what is compiled beside what is in `compiled`."""
    compiled = []

    class FakeLowered:
        def __init__(self, case):
            self.case = case

        def compile(self, **options):
            compiled.append((self.case, options["autotune"]))
            error = "out of memory" if self.case.model == "bert-tiny" else None
            return FakeProgram(self.case, error=error)

    monkeypatch.setattr(steps, "lower", FakeLowered)
    return compiled


@pytest.mark.parametrize("autotune", [True, False])
def test_a_run_writes_its_record_and_goes_on_after_a_failure(
    autotune, fake_programs, monkeypatch, tmp_path, capsys
):
    arguments = ["--models=bert-tiny,gpt2-nano", "--tokens=256", f"--results={tmp_path}"]
    arguments += ["--preheat=0", "--seconds=0", "--depths=3,4", "--part=trial"]
    arguments += [] if autotune else ["--no-autotune"]
    monkeypatch.setattr("sys.argv", ["train_step", *arguments])
    with pytest.raises(SystemExit, match="1"):
        train_step.main()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert path.name.startswith("train-step-trial-")
    assert record["benchmark"] == "train-step-trial"
    assert [(r["model"], r["rank"]) for r in record["results"]] == [
        ("gpt2-nano", 0),
        ("gpt2-nano", 8),
    ]
    assert {r["tokens"] for r in record["results"]} == {256}
    assert {f["model"] for f in record["failed"]} == {"bert-tiny"}
    assert len(record["failed"]) == 6
    assert record["left_out"] == []
    assert len(fake_programs) == 12
    assert {flag for _, flag in fake_programs} == {autotune}
    assert "bert-tiny" in capsys.readouterr().err


def test_the_sharded_step_is_timed_beside_the_plain_one(fake_programs, monkeypatch, tmp_path):
    arguments = ["--models=gpt2-nano", "--preheat=0", "--seconds=0", f"--results={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["sharded_step", *arguments])
    sharded_step.main()
    (path,) = tmp_path.glob("*.json")
    ((row,),) = [json.loads(path.read_text())["results"]]
    assert len(row["sharded_rounds_ms"]) == len(row["unsharded_rounds_ms"]) == 3
    assert f"| {row['ratio']:.3f} |" in report_scaling.sharded(tmp_path)
    timings = [Timing((10.0, 30.0, 20.0), 5, 1.0, False), Timing((21.0, 22.0, 90.0), 6, 1.0, False)]
    planned = [case for case, _ in fake_programs]
    row = sharded_step.result(planned, timings, FakeProgram(planned[1]))
    assert (row["unsharded_ms"], row["sharded_ms"], row["ratio"]) == (20.0, 22.0, 1.1)
    assert [case.mesh for case, _ in fake_programs] == ["", "data:1"]
    assert {case.sparsity for case, _ in fake_programs} == {"2:4"}


@pytest.mark.parametrize("mesh", ["", "data:1"])
def test_only_a_step_on_a_mesh_is_mapped_over_devices(mesh):
    case = Case("gpt2-nano", 3, 2, 16, dtype="float32", mesh=mesh)
    text = steps.lower(case).step.as_text()
    assert ("sdy.mesh @mesh" in text) == bool(mesh)


def test_a_run_ends_in_time_and_says_what_is_left(fake_programs, monkeypatch, tmp_path):
    clock = iter([0.0, 1.0, 2.0, 3.0, 100.0])
    monkeypatch.setattr(
        train_step,
        "time",
        types.SimpleNamespace(monotonic=clock.__next__, perf_counter=train_step.time.perf_counter),
    )
    arguments = ["--models=gpt2-nano,opt-nano,llama-nano", "--minutes=1", "--preheat=0"]
    monkeypatch.setattr("sys.argv", ["train_step", *arguments, f"--results={tmp_path}"])
    train_step.main()
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["left_out"] == ["opt-nano", "llama-nano"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--models=gpt9", "gpt9"),
        ("--depths=5,3", "the smaller first"),
        ("--ranks=-1", "fractions of the width"),
        ("--tokens=1500", "not whole sequences of 1024"),
    ],
)
def test_bad_options_are_explained(argument, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_step", "--models=gpt2-small", argument])
    with pytest.raises(SystemExit) as stopped:
        train_step.main()
    assert message in capsys.readouterr().err + str(stopped.value)


def numbers_of(peak: int) -> dict:
    return {"peak_bytes": peak, "state_bytes": 1, "xla_bytes": {}, "xla_total_bytes": 2 * peak}


def test_peaks_of_the_whole_model_follow_from_two_depths():
    peaks = (100, 130, 60, 75)
    found = {case: numbers_of(peak) for case, peak in zip(CASES, peaks, strict=True)}
    cases = [dataclasses.replace(c, model="gpt2-medium") for c in CASES]
    found = {c: n for c, n in zip(cases, found.values(), strict=True)}
    (row,) = memory.results(cases, found)
    assert (row["dense_peak_bytes"], row["sparse_peak_bytes"]) == (130 + 20 * 30, 75 + 20 * 15)
    assert row["peak_ratio"] == round(375 / 730, 4)
    assert row["dense_xla_bytes"] == 2 * 730
    weights = models.count_parameters(models.build("gpt2-medium", sparsity="dense"))
    assert row["dense_state_bytes"] == pytest.approx(16 * weights, rel=0.01)
    assert sum(ours for ours, _ in row["kinds"].values()) == row["sparse_state_bytes"]
    assert memory.results(cases, found | {cases[0]: {"error": "lost"}}) == []
    json.dumps(row)


def test_processes_share_the_device_within_its_memory(monkeypatch):
    device, running, most = memory.Device(100.0), [], []
    lock = threading.Lock()
    enough = threading.Barrier(2, timeout=10)

    def in_process(case):
        with lock:
            running.append(case)
            most.append(len(running))
        if case.depth < 9:
            enough.wait()  # two at a time are there
        with lock:
            running.remove(case)
        return {}

    monkeypatch.setattr(memory, "estimate", lambda case: 45.0 if case.depth < 9 else 1000.0)
    monkeypatch.setattr(memory, "in_process", in_process)
    cases = [dataclasses.replace(CASES[0], depth=depth) for depth in (3, 4, 5, 6, 9)]
    threads = [threading.Thread(target=device.run, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert max(most) == 2
    assert device.free == 100.0


def test_a_process_that_fails_says_why(monkeypatch):
    done = types.SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nOom: no memory\n\n")
    monkeypatch.setattr(memory.subprocess, "run", lambda *a, **k: done)
    assert memory.in_process(CASES[0]) == {"error": "Oom: no memory"}
    done.returncode, done.stdout = 0, 'noise\n{"peak_bytes": 3}\n'
    assert memory.in_process(CASES[0]) == {"peak_bytes": 3}


PROGRAM = """
%gemm_fusion_dot.4_computation (p: bf16[8192,5120]) -> bf16[8192,5120] {
  %dot.4 = bf16[8192,5120]{1,0} dot(%p, %q), metadata={op_name="jit(train_step)/jvp(OPT)/layers_0/mlp/down/dot_general"}
  ROOT %convert.4 = bf16[8192,5120]{1,0} convert(%dot.4), metadata={op_name="jit(train_step)/jvp(OPT)/convert_element_type"}
}

%gemm_fusion_dot.10_computation (p: bf16[8192,5120]) -> bf16[8192,5120] {
  ROOT %dot.10 = bf16[8192,5120]{1,0} dot(%p, %q)
}

ENTRY %main (a: bf16[8192,5120]) -> bf16[8192,5120] {
  %gemm_fusion_dot.10 = bf16[8192,5120]{1,0} fusion(%p), kind=kCustom, calls=%gemm_fusion_dot.10_computation
  %loop_add_fusion.10 = bf16[8192,5120]{1,0} fusion(bf16[8192,5120]{1,0} %bias, bf16[8192,5120]{1,0} %gemm_fusion_dot.10), kind=kLoop, metadata={op_name="jit(train_step)/jvp(OPT)/layers_0/attention/output/add"}
  %gemm_fusion_dot.4 = bf16[8192,5120]{1,0} fusion(%p), kind=kCustom, calls=%gemm_fusion_dot.4_computation
  %custom-call.5 = (bf16[8192,15360]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", metadata={op_name="jit(train_step)/jvp(OPT)/while/body/closed_call/layers_1_to_2/attention/qkv/qkv._dense/dot_general" stack_frame_id=1}
  %custom-call.6 = (bf16[8192,5120]{1,0}, s8[33554432]{0}) custom-call(%a, %b), metadata={op_name="jit(train_step)/transpose(jvp(OPT))/while/body/checkpoint/layers_1_to_2/attention/qkv/dot_general"}
  ROOT %custom-call.7 = (bf16[5120,15360]{1,0}, s8[33554432]{0}) custom-call(%a, %b), metadata={op_name="jit(train_step)/transpose(jvp(OPT))/while/body/checkpoint/layers_1_to_2/attention/qkv/dot_general"}
  %loop_convert_fusion.3 = bf16[5120,15360]{1,0} fusion(%p), kind=kLoop, metadata={op_name="jit(train_step)/jvp(OPT)/while/body/layers_1_to_2/attention/qkv/convert_element_type"}
  %loop_multiply_fusion = (f32[5120,5120]{1,0}, f32[5120,5120]{1,0}) fusion(%p), kind=kLoop, metadata={op_name="jit(train_step)/mul"}
  %custom-call.8 = (bf16[8192,50272]{1,0}, s8[1]{0}) custom-call(%a, %b), metadata={op_name="jit(train_step)/jvp(OPT)/token.attend/dot_general"}
  %input_reduce_fusion.1 = f32[8192]{0} fusion(%p), metadata={op_name="jit(train_step)/jvp(OPT)/layers_0/attention_norm/reduce_sum"}
  %custom-call.9 = (bf16[4,2048,5120]{2,1,0}, s8[1]{0}) custom-call(%a, %b), metadata={op_name="jit(train_step)/transpose(jvp(OPT))/while/body/checkpoint/rematted_computation/layers_1_to_2/mlp/up/dot_general"}
}
"""


@pytest.mark.parametrize(
    ("kernel", "instruction", "category"),
    [
        ("nvjet_tst_192x128", "custom-call.5", "forward"),
        ("nvjet_tst_192x128", "custom-call.6", "dx"),
        ("nvjet_tst_192x128", "custom-call.7", "dw"),
        ("nvjet_tst_192x128", "custom-call.8", "vocabulary and heads"),
        ("sm90_xmma_gemm_bf16", "custom-call.9", "forward"),  # rematerialised
        ("gemm_fusion_dot_4", "gemm_fusion_dot.4", "forward"),  # the operation is inside
        ("gemm_fusion_dot_10", "gemm_fusion_dot.10", "forward"),  # only its user has one
        ("nvjet_tst_192x128", "", "products of unknown use"),
        ("nm_matmul_kernel", "custom-call.5", "forward"),
        ("nm_matmul_kernel", "custom-call.6", "dx"),
        ("nm_sddmm_kernel", "", "dw"),
        ("nm_transpose_kernel", "", "casts and transposes"),
        ("loop_convert_fusion_3", "", "casts and transposes"),
        ("loop_multiply_fusion", "loop_multiply_fusion", "optimizer"),
        ("input_reduce_fusion_1", "", "elementwise"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "", "attention"),
        ("MemcpyD2D", "", "copies"),
    ],
)
def test_kernels_are_told_by_name_and_by_operation(kernel, instruction, category):
    found = step_profile.instructions(PROGRAM)
    event = Event(kernel, instruction, 0.0, 4e6)
    sums = step_profile.sums([event, event], found, 8192, 2)
    assert sums["categories"] == {category: 4.0}
    assert sums["busy_ms"] == 4.0
    assert sums["kernels"][0]["calls"] == 1.0
    assert sums["unnamed"] == (1.0 if not instruction and "fusion" not in kernel else 0.0)


def test_operations_of_a_real_program_are_found(program):
    found = step_profile.instructions(program.step.as_text())
    operations = {entry.operation for entry in found.values()}
    for part in ("jvp(GPT2)/while", "transpose(jvp(GPT2))/while", "layers_1_to_2/mlp/up"):
        assert any(part in operation for operation in operations)
    optimizer = Instruction((8,), "jit(train_step)/mul")
    assert optimizer.operation in operations
    assert step_profile.classify("loop_fusion", optimizer, 32) == "optimizer"


def profile_of(**categories) -> dict:
    return {
        "step_ms": 1.1 * sum(categories.values()),
        "busy_ms": sum(categories.values()),
        "categories": categories,
        "unnamed": 0.0,
        "kernels": [],
    }


def test_the_bound_of_the_kernels_is_amdahls():
    dense = profile_of(forward=30.0, dx=30.0, dw=30.0, optimizer=10.0)
    sparse = profile_of(forward=20.0, dx=20.0, dw=20.0, optimizer=5.0)
    row = step_profile.result(CASES[1], CASES[3], dense, sparse)
    assert row["products_speedup"] == 1.5
    assert row["kernel_bound"] == round(100 / 70, 4)
    assert row["busy_speedup"] == round(100 / 65, 4)
    assert "forward" in step_profile.table(row)


@pytest.fixture
def records(tmp_path):
    """A folder with one record of each kind."""
    sparse = [[c for c in CASES if c.sparsity == "2:4"]]
    sparse.append([dataclasses.replace(c, rank=8) for c in sparse[0]])
    times = [(timing(40.0, 3 * 2**30), timing(32.0, 2**30))] * 2
    times[1] = (timing(50.0, 4 * 2**30), timing(40.0, 2 * 2**30))
    paths = {"mosaic: measured": 7, "y:mosaic dx:xla dw:mosaic: it depends": 4}
    rows = [train_step.result(CASES[:2], cases, times, DEVICE, paths) for cases in sparse]
    peaks = {case: numbers_of(2**30 * (1 + i)) for i, case in enumerate(CASES)}
    profile = step_profile.result(
        CASES[1], CASES[3], profile_of(forward=3.0, dx=2.0), profile_of(forward=2.0, attention=1.0)
    )
    shared = {
        "device": DEVICE,
        "versions": {"jax": "0.11.2", "python": "3.12.3"},
        "date": "2026-12-01",
        "commit": "0123456789abcdef",
    }
    failed = [{"model": "opt-66b", "what": "dense", "depth": 4, "error": "out of memory\nmore"}]
    for name, results in (
        ("train-step", rows),
        ("memory", memory.results(CASES, peaks)),
        ("step-profile", [profile]),
    ):
        record = shared | {"command": f"python -m {name}", "results": results, "failed": failed}
        (tmp_path / f"{name}-x.json").write_text(
            json.dumps(record | {"left_out": ["opt-30b", "gpt2-nano"]})
        )
    return tmp_path


def test_report_says_what_the_records_say(records):
    text = report_training.steps(records)
    (row,) = (line for line in text.splitlines() if line.startswith("| gpt2-nano"))
    assert row == "| gpt2-nano | 4 | 2 x 16 | 50.0 | 40.0 | 1.25 | 1.25 | 1.25 | 0% | 0.50 |"
    assert "Failed: opt-66b what dense depth 4: out of memory\n" in text
    assert "Left out for want of time: opt-30b." in text
    assert "JAX 0.11.2" in text
    text = report_training.depths(records)
    assert text.count("| gpt2-nano |") == 4
    assert "mosaic (7), y:mosaic dx:xla dw:mosaic (4)" in text
    text = report_training.memory(records)
    assert "3 layers: 1.00 → 3.00; 4 layers: 2.00 → 4.00" in text
    text = report_training.profile(records)
    assert "| forward | 3.00 | 2.00 |" in text
    assert "| all | 5.00 | 3.00 |" in text
    assert "](step-nvidia-h100-80gb-hbm3.svg)" in text


def test_the_faster_dense_step_is_held_against_the_faster_sparse_one(records):
    assert "The faster dense step" not in report_training.steps(records)
    record = json.loads((records / "train-step-x.json").read_text())
    unrolled = {"scan": False, "dense_ms": 44.0, "sparse_ms": 41.0, "speedup": 1.07}
    record["results"] = [row | unrolled for row in record["results"]]
    (records / "train-step-unrolled.json").write_text(json.dumps(record))
    text = report_training.steps(records)
    assert "| gpt2-nano | 4 | 2 x 16, unrolled | 44.0 | 41.0 | 1.07 |" in text
    assert "scanned or unrolled: gpt2-nano 1.10." in text


def test_report_refuses_two_records_of_one_thing(records):
    path = records / "train-step-x.json"
    (records / "train-step-y.json").write_text(path.read_text())
    with pytest.raises(ValueError, match="two records hold gpt2-nano at rank 0"):
        report_training.steps(records)


def test_pictures_are_the_same_each_time(records, tmp_path):
    first = report_training.drawn(tmp_path, records)
    assert list(first) == [tmp_path / "step-nvidia-h100-80gb-hbm3.svg"]
    assert report_training.drawn(tmp_path, records) == first
    assert report_training.COLOURS[0] in next(iter(first.values()))


def test_nothing_measured_is_said_and_not_drawn(tmp_path):
    for make in (report_training.steps, report_training.memory, report_training.profile):
        assert make(tmp_path).startswith("Not measured yet: `python -m benchmarks.")
    assert report_training.drawn(tmp_path, tmp_path) == {}
    assert pictures.drawn(tmp_path, tmp_path) == {}


def test_measuring_needs_no_gpu(program, monkeypatch):
    lowered = types.SimpleNamespace(compile=lambda autotune: program)
    monkeypatch.setattr(steps, "lower", lambda case: lowered)
    numbers = memory.measure(program.case)
    assert numbers["xla_total_bytes"] == sum(numbers["xla_bytes"].values()) > 0
    if jax.default_backend() == "cpu":
        assert numbers["peak_bytes"] is None
