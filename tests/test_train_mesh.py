"""Runs on meshes: refused ahead where they cannot work, equal to those of one device where they do."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jobs import on_small_text, run

from slope_jax.sharding import AXES, state_specs
from train import metrics, processes
from train.checkpoint import Checkpoints
from train.job import Exit
from train.mesh import Share, abstract_mesh, make_mesh, parse_mesh, place, set_mesh, share_of
from train.plan import make_plan
from train.recipes import make_config
from train.state import abstract_state, init_state, make_setup, step_key
from train.step import make_train_step

STEPS, JOIN = 6, 3
SIZES = {"data": 2, "fsdp": 2, "tensor": 2}
MESH = "data:2,fsdp:2,tensor:2"
# Few linears compile fast: one that a mesh cuts along each axis.
FEW = "layers/[1-3]/(attention/output|mlp/up)=2:4; .*=dense"


def options(folder, **fields):
    given = {
        "batch_size": 16,
        "accumulation": 2,
        "steps": STEPS,
        "adapter_start": JOIN / STEPS,
        "adapter_rank": 8,
        "sparsity": FEW,
        "eval_every": 3,
        "checkpoint_every": 2,
        "keep_checkpoints": 9,
        "dropout": 0.1,  # drawn alike whatever is cut
    }
    return on_small_text(folder, **given | fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_text):
    path = tmp_path_factory.mktemp("mesh")
    shutil.copytree(small_text, path / "text")
    return path


def losses(path) -> dict[int, float]:
    lines = metrics.read(path / "metrics.jsonl")
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


def restored(config, path, step):
    vocab = len(json.loads((path / "tokenizer.json").read_text())["model"]["vocab"])
    setup = make_setup(config, vocab_size=vocab)
    checkpoints = Checkpoints(path, keep=9, read_only=True)
    state, _ = checkpoints.restore(step, abstract_state(setup, adapters=step > JOIN))
    checkpoints.close()
    return state


def test_a_run_on_a_mesh_is_that_of_one_device_and_goes_on_anywhere(folder):
    """One test, so that its runs are not made by two workers."""
    path = folder / "meshed"
    config = make_config("gpt2-nano", **options(folder, run_dir=str(path), mesh=MESH))
    code, text = run(config, stop_at=JOIN)
    assert code == Exit.UNFINISHED
    assert f"mesh {MESH}: " in text
    shutil.copytree(path, folder / "alone")

    code, text = run(config)
    assert code == Exit.DONE
    assert f"Going on after step {JOIN}" in text
    assert "adapters of rank 8 join 6 linears" in text

    # On one device from where adapters join; steps up to there are compared below.
    alone = make_config("gpt2-nano", **options(folder, run_dir=str(folder / "alone")))
    code, text = run(alone)
    assert code == Exit.DONE
    assert f"Going on after step {JOIN}" in text
    ours, expected = losses(path), losses(folder / "alone")
    assert ours.keys() == expected.keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose([ours[s] for s in expected], list(expected.values()), rtol=1e-5)

    # Restored on one device, on eight and on four: the same numbers, cut as the rules say.
    state = restored(alone, path, STEPS)
    trees = (state.params, state.masks, state.opt_state)
    for mesh in (MESH, "fsdp:4"):
        other = make_config("gpt2-nano", **options(folder, mesh=mesh))
        devices = make_mesh(other)
        with set_mesh(devices):
            cut = restored(other, path, STEPS)
        ours = (cut.params, cut.masks, cut.opt_state)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(trees), jax.device_get(ours))
        specs = jax.tree.leaves(state_specs(ours))
        for leaf, spec in zip(jax.tree.leaves(ours), specs, strict=True):
            assert leaf.sharding.is_equivalent_to(NamedSharding(devices, spec), leaf.ndim)
        adapter = cut.params["layers_1_to_3"]["attention"]["output"]["adapter_l"]  # cut by both
        assert adapter.sharding.shard_shape(adapter.shape) == (3, adapter.shape[1] // 4, 8)


def batch_of(config, rows=8):
    rng = np.random.default_rng(0)
    ints = functools.partial(rng.integers, dtype=np.int32)
    ids = ints(5, 300, (rows, 17))
    if config.objective == "clm":
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    return {
        "input_ids": ids[:, :-1],
        "token_type_ids": ints(0, 2, (rows, 16)),
        "lengths": ints(8, 17, rows),
        "mlm_positions": ints(0, 8, (rows, 3)),
        "mlm_labels": ints(5, 300, (rows, 3)),
        "mlm_weights": (rng.random((rows, 3)) < 0.7).astype(np.float32),
        "nsp_labels": ints(0, 2, rows),
    }


def trained(config, steps=3) -> list[dict[str, float]]:
    """The metrics of a few steps, on the configured mesh."""
    setup = make_setup(config, vocab_size=300)
    found = []
    with set_mesh(make_mesh(config)):
        state, key = init_state(setup), processes.replicated(step_key(setup))
        state = setup.method.start(state, setup.model, None, print)
        step = make_train_step(config.phases[0].accumulation, setup.schedule, setup.method.at(0))
        for _ in range(steps):
            state, metrics = step(state, place(batch_of(config), Share(0, 1)), key)
            found.append({name: float(x) for name, x in metrics.items()})
    return found


@pytest.mark.parametrize(
    ("model", "mesh", "fields"),
    [
        ("gpt2-nano", "data:2,fsdp:2", {"method": "sr-ste"}),
        ("gpt2-nano", "fsdp:4", {"method": "fst", "mask_every": 2, "dense_finish": 0.0}),
        (
            "bert-tiny",
            MESH,
            {"optimizer": "lamb", "accumulation": 2, "remat": True, "sparsity": FEW},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_steps_on_a_mesh_are_those_of_one_device(model, mesh, fields):
    common = {"seq_len": 16, "batch_size": 8, "steps": 6, "warmup": 0.0, "dtype": "float32"}
    if fields.get("method", "slope") == "slope":
        common["adapter_rank"] = 0
    config = make_config(model, **common, **fields)
    ours, alone = (trained(dataclasses.replace(config, mesh=m)) for m in (mesh, ""))
    for step, (here, there) in enumerate(zip(ours, alone, strict=True)):
        assert here.keys() == there.keys()
        for name, value in there.items():
            np.testing.assert_allclose(here[name], value, rtol=1e-5, err_msg=f"{name}, step {step}")
    assert alone[0]["loss"] != alone[-1]["loss"]


# Refused ahead


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:2,pipe:4", "'pipe:4' is no axis and size; write sizes by axis, such as data:2"),
        ("data:0", "'data:0' is no axis and size"),
        ("data", "'data' is no axis and size"),
        ("data:2,data:4", "names data twice"),
    ],
)
def test_a_mesh_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        make_config("gpt2-nano", mesh=text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"processes": 2}, "need coordinator=HOST:PORT"),
        ({"coordinator": "auto", "process_id": 1}, "need coordinator=HOST:PORT"),
        ({"coordinator": "node0"}, "'node0' is no HOST:PORT"),
        ({"coordinator": "node0:99999"}, "'node0:99999' is no HOST:PORT"),
        ({"coordinator": "node0:1234"}, "needs processes and process_id as well"),
        (
            {"coordinator": "node0:1234", "processes": 2, "process_id": 2},
            r"process_id must lie in \[0, 2\), as processes says; got 2",
        ),
        ({"heartbeat_seconds": 0}, "heartbeat_seconds must be at least 1, got 0"),
    ],
)
def test_processes_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config("gpt2-nano", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"mesh": "data:3", "batch_size": 8},
            "micro-batches of 8 .* make batch_size a multiple of 3",
        ),
        ({"mesh": "tensor:3"}, r"num_heads has \d+, which tensor 3 = 3 devices cannot cut"),
        (
            {"mesh": "tensor:2", "method": "sr-ste"},
            "multiplies densely and cannot be cut by tensor",
        ),
    ],
)
def test_a_plan_finds_what_a_mesh_cannot_do(fields, message):
    with pytest.raises(ValueError, match=message):
        make_plan(make_config("gpt2-nano", **fields))


def test_a_mesh_of_more_devices_than_there_are():
    config = make_config("gpt2-nano", mesh="data:64", batch_size=64)
    with pytest.raises(ValueError, match="has 64 devices, but there are 8"):
        make_mesh(config)


def test_wanda_starts_on_one_device(folder, tmp_path):
    fields = {"method": "wanda", "init_from": str(tmp_path), "mesh": "data:2"}
    fields |= {"adapter_rank": 0, "run_dir": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="prunes on one device: start it without --mesh"):
        run(make_config("gpt2-nano", **options(folder, **fields)))


def test_the_plan_of_a_mesh_needs_no_devices():
    text = str(make_plan(make_config("gpt2-small", mesh="data:8,fsdp:32", batch_size=256)))
    assert "mesh data:8,fsdp:32: " in text


@pytest.mark.parametrize("mesh", ["fsdp:2,tensor:4", "data:8", MESH])
def test_the_bytes_of_a_device(mesh):
    config = make_config("gpt2-nano", mesh=mesh, batch_size=8, adapter_rank=8)
    plan = make_plan(config)
    setup = make_setup(config)
    state = abstract_state(setup, adapters=True)
    tree = (state.params, state.masks, state.opt_state, state.params)

    def nbytes(x, spec):
        piece = NamedSharding(make_mesh(config), spec).shard_shape(x.shape)
        return math.prod(piece) * x.dtype.itemsize

    pieces = jax.tree.map(nbytes, tree, state_specs(tree))
    assert plan.device_bytes == sum(jax.tree.leaves(pieces))


# Batches


def test_what_a_process_loads():
    config = make_config("gpt2-nano", mesh=MESH)
    assert share_of(None) == share_of(make_mesh(config)) == Share(0, 1)
    assert parse_mesh("tensor:2,data:3") == {"data": 3, "fsdp": 1, "tensor": 2}
    mesh = make_mesh(config)
    batch = {"input_ids": np.arange(32, dtype=np.int32).reshape(8, 4)}
    with set_mesh(mesh):
        placed = place(batch, Share(0, 1))["input_ids"]
    np.testing.assert_array_equal(placed, batch["input_ids"])
    assert placed.sharding.shard_shape(placed.shape) == (2, 4)  # rows by data and fsdp
    assert place(batch, Share(0, 1)) is batch


def test_an_abstract_mesh_has_the_axes_of_the_mesh():
    config = make_config("gpt2-nano", mesh="fsdp:4")
    mesh, abstract = make_mesh(config), abstract_mesh(config)
    assert (mesh.axis_names, mesh.axis_types) == (abstract.axis_names, abstract.axis_types)
    assert dict(abstract.shape) == dict(zip(AXES, (1, 4, 1), strict=True))
    assert abstract_mesh(make_config("gpt2-nano")) is None


def test_one_process_agrees_with_itself():
    assert processes.Agreement().agree(143) == 143
    assert processes.first_then_others("count", functools.partial(int, "7")) == 7
    processes.check_same("text", "it", "do")
    with pytest.raises(ValueError, match="wrong"), processes.together("fail"):
        raise ValueError("wrong")
