"""What devices exchange: the collectives in a compiled program, the account on paper, the walk."""

import doctest
import json
import os
import subprocess
import sys

import pytest

from benchmarks import hlo, report, report_scaling, scaling, traffic
from benchmarks.record import RESULTS, ROOT
from benchmarks.scaling import BETWEEN, INSIDE, Layout, Stage, walk
from slope_jax import models
from slope_jax.sharding import AXES
from train.mesh import parse_mesh

GROUPS = "replica_groups={{0,1,2,3},{4,5,6,7}}"
PROGRAM = """\
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%narrowing (p: bf16[16]) -> f32[16] {
  %p = bf16[16]{0} parameter(0)
  ROOT %wide = f32[16]{0} convert(%p)
}

%inner (a: (s32[], f32[16])) -> (s32[], f32[16]) {
  %fused = f32[16]{0} fusion(%q), kind=kLoop, calls=%narrowing
  %ag = f32[4,16]{1,0} all-gather(%fused), channel_id=1, GROUPS, dimensions={0}, metadata={op_name="jit(step)/all_gather"}
  %both = (f32[10]{0}, /*index=1*/u8[6]{0}) all-reduce(%x, %y), channel_id=1, replica_groups=[4,2]<=[4,2]T(1,0), to_apply=%add
}

%condition (a: (s32[], f32[16])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%outer (a: (s32[], f32[16])) -> (s32[], f32[16]) {
  %while.1 = (s32[], f32[16]{0}) while(%t), condition=%condition, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %rs = f32[5]{0} reduce-scatter(%z), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.2 = (s32[], f32[16]{0}) while(%t), condition=%condition, body=%outer, backend_config={"known_trip_count":{"n":"2"}}
  %call.1 = f32[8]{0} call(%p), to_apply=%called
  %alone = f32[8]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add
}
"""
CALLED = """
%called (p: f32[8]) -> f32[8] {
  %aa = (f32[3]{0}, f32[3]{0}) all-to-all(%p, %q), channel_id=1, replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}
  ROOT %cp = bf16[8]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
}
"""
TEXT = PROGRAM.replace("GROUPS", GROUPS).replace("\nENTRY", f"{CALLED}\nENTRY")


def test_examples_of_the_docstrings():
    for module in (hlo, scaling):
        assert doctest.testmod(module).failed == 0


def test_collectives_are_counted_as_often_as_their_loops_run():
    found = {(c.kind, c.dtype): c for c in hlo.collectives(TEXT)}
    assert len(found) == len(hlo.collectives(TEXT)) == 6
    gather = found["all-gather", "f32"]
    assert (gather.elements, gather.group, gather.count) == (64, (0, 1, 2, 3), 6)
    assert gather.name == "jit(step)/all_gather"
    assert gather.sent == 6 * 64 * 4 * 3 / 4
    assert found["all-reduce", "f32"].sent == 6 * 2 * 40 / 2
    assert found["all-reduce", "u8"].sent == 6 * 2 * 6 / 2
    assert found["all-reduce", "u8"].group == (0, 2)
    scatter = found["reduce-scatter", "f32"]
    assert (scatter.group, scatter.sent) == ((0, 2, 4, 6), 2 * 3 * 20)
    exchange = found["all-to-all", "f32"]
    assert (exchange.elements, exchange.group, exchange.sent) == (6, (0, 1), 6 * 4 / 2)
    assert found["collective-permute", "bf16"].sent == 16


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (', backend_config={"known_trip_count":{"n":"3"}}', "", "unknown trip count of while.1"),
        (" all-gather(", " all-gather-start(", "all-gather-start is not counted"),
        ("call(%p), to_apply", "conditional(%p), true_computation", "under a condition"),
        (GROUPS, "replica_groups=@somewhere", "no replica groups"),
        ("f32[4,16]{1,0} all-gather", "c64[4,16]{1,0} all-gather", "no known shape"),
        ("ENTRY ", "", "no ENTRY"),
    ],
)
def test_what_is_not_understood_is_not_left_out(old, new, message):
    assert old in TEXT
    with pytest.raises(ValueError, match=message):
        hlo.collectives(TEXT.replace(old, new))


def test_axes_of_a_group():
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    assert hlo.axes_of((0, 1), sizes) == ("tensor",)
    assert hlo.axes_of((1, 3), sizes) == ("fsdp",)
    assert hlo.axes_of(tuple(range(8)), sizes) == ("data", "fsdp", "tensor")
    with pytest.raises(ValueError, match="not all devices along"):
        hlo.axes_of((0, 1, 2), sizes)


def test_dtypes_are_those_that_the_program_asks_for():
    lowered = """
    %1 = "stablehlo.all_gather"(%0) <{all_gather_dim = 0 : i64, replica_groups = dense<[[0, 1, 2, 3], [4, 5, 6, 7]]> : tensor<2x4xi64>, use_global_device_ids}> : (tensor<16xbf16>) -> tensor<4x16xbf16>
    %2 = "stablehlo.reduce_scatter"(%0) <{replica_groups = dense<[[0, 2, 4, 6], [1, 3, 5, 7]]> : tensor<2x4xi64>}> ({
    ^bb0(%a: tensor<f32>, %b: tensor<f32>):
      %s = stablehlo.add %a, %b : tensor<f32>
      stablehlo.return %s : tensor<f32>
    }) : (tensor<20xf32>) -> tensor<5xf32>
    """
    asked = hlo.asked(lowered)
    assert asked == {
        ("all-gather", 64, (0, 1, 2, 3)): {"bf16"},
        ("reduce-scatter", 5, (0, 2, 4, 6)): {"f32"},
    }
    found = hlo.collectives(TEXT)
    kinds = lambda asked: [(c.kind, c.dtype) for c in hlo.as_asked(found, asked)]  # noqa: E731
    assert ("all-gather", "bf16") in kinds(asked)
    assert ("reduce-scatter", "f32") in kinds(asked)
    # Where both are asked for, by what was there before: the gather's operand was narrow.
    both = {key: {"f32", "bf16"} for key in asked}
    assert kinds(both) == kinds(asked)
    assert kinds({}) == [(c.kind, c.dtype) for c in found]


def test_account_is_that_of_the_paper():
    """Of a scanned layer: 8 bytes an entry dense; 1 and 1/8 each way and 2 sparse."""
    ring, layers, width = 7 / 8, 12, 768
    vocabulary = 50264 * width * (2 + 4) * 2  # table and head: gathered once each, and scattered
    entries = 12 * width**2
    sizes = parse_mesh("fsdp:8")
    dense = traffic.items(models.variant_config("gpt2-small", sparsity="dense"), sizes)
    assert traffic.total(dense) == pytest.approx(ring * (8 * entries * layers + vocabulary))
    sparse = traffic.items(models.variant_config("gpt2-small"), sizes)
    of_layer = lambda i: traffic.total(item for item in sparse if item.place == i)  # noqa: E731
    assert of_layer(5) == pytest.approx(ring * 4.25 * entries)
    # The first one is not scanned: its kernels, of which qkv is dense, are gathered once.
    first = 6 * 3 * width**2 + 3.125 * 9 * width**2
    assert of_layer(0) == pytest.approx(ring * first)
    data = traffic.items(models.variant_config("gpt2-small"), parse_mesh("data:2,fsdp:4"))
    halves = [i.sent for i in data if i.axis == "data" and i.place == 5]
    assert sum(halves) == pytest.approx(2 * 0.5 * 2 * entries / 4)  # float32, half of them kept
    # What is computed again has the kernels that dx gathers anyway.
    assert traffic.items(models.variant_config("gpt2-small"), sizes, remat=True) == sparse
    with pytest.raises(ValueError, match="no account"):
        traffic.items(models.variant_config("gpt2-small"), parse_mesh("tensor:2"), remat=True)


def test_compiled_step_moves_what_the_account_says():
    """A real step on data and fsdp, its gathers and scattered gradients byte for byte."""
    code = """
import json
from benchmarks import communication as c
print(json.dumps(c.measure(c.Case("llama-nano", "data:2,fsdp:2", "slope", 0, 1, 16))))
"""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    config = models.variant_config("llama-nano")
    check(row, traffic.items(config, parse_mesh(row["mesh"])))
    assert row["compiled_bytes"] > 1.2 * row["sent_bytes"]  # or the CPU no longer widens


def check(row: dict, paper: list[traffic.Item]) -> None:
    """Gathers of parameters and scattered gradients are on paper; the small rest is not."""
    sums: dict[tuple[str, str], float] = {}
    for item in paper:
        sums[item.axis, item.kind] = sums.get((item.axis, item.kind), 0.0) + item.sent
    assert sum(sums.values()) == pytest.approx(row["planned_bytes"], abs=1)
    found: dict[tuple[str, str], float] = {}
    for at in row["by"]:
        key = at["axes"], at["kind"]
        found[key] = found.get(key, 0) + at["bytes"]
    for key, sent in sums.items():
        exact = key[1] in ("reduce-scatter", "all-to-all")
        slack = 5 if exact else 5e-3 * row["sent_bytes"]  # positions, norms, biases
        assert -5 <= found[key] - sent <= slack, key
    assert row["planned_bytes"] == pytest.approx(row["sent_bytes"], rel=0.02)


@pytest.fixture(scope="module")
def counted():
    found = [json.loads(path.read_text()) for path in RESULTS.glob("communication-*.json")]
    return [row | {"remat": row.get("remat", False)} for one in found for row in one["results"]]


def test_records_hold_to_the_account(counted):
    for row in counted:
        sparsity = "dense" if row["method"] == "dense" else "2:4"
        config = models.variant_config(row["model"], sparsity=sparsity, adapter_rank=row["rank"])
        sizes, tokens = parse_mesh(row["mesh"]), row["tokens"]
        check(row, traffic.items(config, sizes, tokens=tokens, remat=row["remat"]))


def test_large_models_exchange_no_more_than_three_fifths(counted):
    models_, meshes = ("opt-13b", "llama-3-8b", "mistral-7b"), ("fsdp:8", "data:2,fsdp:4")
    kept = [
        r
        for r in counted
        if r["method"] == "slope" and r["model"] in models_ and r["mesh"] in meshes
    ]
    assert len(kept) == 3 * (3 + 2)  # adapters on fsdp alone, and both again with remat
    assert {r["remat"] for r in kept} == {False, True}
    assert all(r["sent_ratio"] <= 0.6 for r in kept)


def test_walk_hides_what_it_can():
    link = lambda seconds: (("link", seconds),)  # noqa: E731
    layers = [Stage(2.0, link(1.0), link(0.5))] * 5
    alone = [stage._replace(before=(), after=()) for stage in layers]
    assert walk(alone) == (10.0, 10.0, 0.0)
    idle = [stage._replace(compute=0.0) for stage in layers]
    assert walk(idle) == (7.5, 0.0, 7.5)
    # The first gather and the last scatter have nothing to hide behind.
    assert walk(layers).step == 10.0 + 1.0 + 0.5
    slow = [Stage(1.0, link(3.0))] * 5
    assert walk(slow).step == 5 * 3.0 + 1.0
    assert walk(slow).efficiency == 5 / 16
    assert walk(slow).unhidden == 5 / 20
    other = [Stage(2.0, link(1.0), (("other", 2.0),))] * 5
    assert walk(other).step == 1.0 + 10.0 + 2.0  # links don't wait for each other
    assert walk([Stage(1.0), *[Stage(1.0, link(1.0))] * 3]).step == 4.0


ROW = {
    "model": "gpt2-small",
    "sparsity": "2:4",
    "rank": 0,
    "layers": 12,
    "dense_ms": 100.0,
    "sparse_ms": 80.0,
    "dense_ms_per_layer": 7.0,
    "sparse_ms_per_layer": 5.5,
}


def test_links_carry_what_is_sent():
    config = scaling.model(ROW, "sparse")
    for layout in (Layout(1, 8), Layout(8, 8), Layout(2, 16)):
        sent = traffic.total(traffic.items(config, layout.sizes))
        found = scaling.links(ROW, layout, "sparse")
        assert sum(found.values()) == pytest.approx(sent)
    assert scaling.links(ROW, Layout(1, 8), "dense")[BETWEEN] == 0
    item = traffic.Item(3, traffic.FORWARD, "all-gather", "fsdp", 800.0)
    assert scaling.link_bytes(item, Layout(1, 64)) == {INSIDE: 700.0, BETWEEN: 100.0}
    assert scaling.seconds(item, Layout(1, 8)) == (INSIDE, 800 / 450e9)
    assert scaling.seconds(item, Layout(1, 64)) == (BETWEEN, 100 / 50e9)
    assert scaling.seconds(item._replace(axis="data"), Layout(4, 8)) == (BETWEEN, 800 / 50e9)


@pytest.mark.parametrize("layout", [Layout(1, 8), Layout(8, 8)], ids=str)
def test_steps_go_from_computation_alone_to_communication_alone(layout):
    fast = scaling.side(ROW, layout, "sparse", share=1e9)
    assert fast.step == pytest.approx(0.080, rel=1e-6)
    assert fast.compute == pytest.approx(0.080)
    slow = scaling.side(ROW, layout, "sparse", share=1e-6)
    assert slow.step <= slow.compute + slow.communication
    items = traffic.items(scaling.model(ROW, "sparse"), layout.sizes)
    times: dict[str, float] = {}
    for item in items:
        link, seconds = scaling.seconds(item, layout)
        times[link] = times.get(link, 0.0) + seconds
    assert slow.communication == pytest.approx(1e6 * sum(times.values()))
    assert slow.step >= 1e6 * max(times.values())
    usual = scaling.side(ROW, layout, "sparse")
    assert usual.compute < usual.step < usual.compute + usual.communication


def test_meshes_that_cannot_cut_a_model_are_named():
    assert scaling.refused(ROW, Layout(1, 8)) == ""
    assert "in multiples of 8" in scaling.refused(ROW, Layout(1, 64))
    assert set(Layout(1, 8).sizes) == set(AXES)
    assert [layout.gpus for layout in scaling.LAYOUTS] == [8, 64, 64, 1024, 1024]


def test_nothing_counted_is_said_and_not_drawn(tmp_path):
    assert report_scaling.communication(tmp_path).startswith("Not counted yet: `python -m")
    assert report_scaling.drawn(tmp_path, tmp_path) == {}
    assert report_scaling.PICTURE in {path.name for path in report.drawn()}


def test_refused_meshes_are_reported(tmp_path):
    row = {"model": "m", "mesh": "fsdp:8", "method": "dense", "rank": 0, "sent_bytes": 2e9}
    row |= {"compiled_bytes": 3e9, "planned_bytes": 2e9, "sent_ratio": 1.0, "compiled_ratio": 1.0}
    sparse = row | {"method": "slope", "sent_bytes": 1e9, "sent_ratio": 0.5}
    record = {
        "results": [row, sparse],
        "left_out": [{"model": "m", "mesh": "tensor:3", "why": "the mesh\n  heads\nmore"}],
        "device": "CPU",
        "versions": {"jax": "1", "python": "3"},
        "date": "2026-01-01",
        "commit": "0123456789abcdef",
        "command": "python -m benchmarks.communication",
    }
    (tmp_path / "communication-cpu.json").write_text(json.dumps(record))
    text = report_scaling.communication(tmp_path)
    assert "| m | fsdp:8 | 0 | 2.000 | 1.000 | 0.500 |" in text
    assert "Left out, m on tensor:3: heads." in text
