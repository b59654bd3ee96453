"""The kernel benchmark: its shapes, what it says of given times, and the report of a record."""

import importlib.metadata
import json
import re
import types

import jax
import pytest

from benchmarks import (
    bench,
    kernels,
    peers,
    pictures,
    problems,
    report,
    report_kernels,
    shapes,
)
from benchmarks.bench import Bench, check_kernels, result
from benchmarks.problems import Problem
from pallas_kernels import device_time, kept_mask, samples
from pallas_kernels.device_time import Time

TINY = {
    "tiny": shapes.Model(64, 128, 4, "gelu"),
    "opt": shapes.Model(64, 256, 4, "relu"),
    "gated": shapes.Model(64, 192, 8, "silu", kv=2, gated=True),
}


@pytest.mark.parametrize(
    ("model", "parameters"),  # of all blocks, by the models' papers and cards
    [("bert-base", 85e6), ("gpt2-xl", 1475e6), ("opt-66b", 65.2e9), ("llama-3-8b", 6.98e9)],
)
def test_linear_layers_add_up_to_the_models(model, parameters):
    layers = {"bert-base": 12, "gpt2-xl": 48, "opt-66b": 64, "llama-3-8b": 32}[model]
    total = sum(k * f for k, f in shapes.MODELS[model].linears().values())
    assert layers * total == pytest.approx(parameters, rel=0.005)


def test_fused_projections_have_the_heads_of_the_model():
    llama = shapes.MODELS["llama-3-8b"].linears()
    assert llama["qkv"] == (4096, 4096 + 2 * 8 * 128)
    assert llama["gate_up"] == (4096, 2 * 14336)
    assert shapes.MODELS["mistral-7b"].linears() == llama


def test_every_size_is_there_once_with_all_who_need_it():
    found = {shape.size: shape for shape in shapes.unique()}
    assert len(found) == len(shapes.unique()) == 51
    assert found[768, 3072].names == (
        "bert-base up",
        "bert-base down dx",
        "gpt2-small up",
        "gpt2-small down dx",
    )
    assert not found[2304, 768].forward
    assert len(shapes.unique(dx=False)) == 39
    with pytest.raises(ValueError, match="bert-huge"):
        shapes.unique(["bert-huge"])


def test_epilogues_are_those_of_the_models():
    found = {(shape.size, name) for shape, name in shapes.epilogues()}
    assert {((768, 3072), "bias+gelu"), ((768, 3072), "bias+gelu_tanh")} <= found
    assert ((9216, 36864), "bias+relu") in found
    assert ((4096, 6144), "bias") not in found  # LLaMA has none
    assert {name for size, name in found if size == (4096, 28672)} == {"gate+silu"}
    assert [samples.adapter_rank(w) for w in (768, 1024, 4096, 9216)] == [16, 16, 64, 144]


@pytest.fixture
def fake_times(monkeypatch):
    """Variants take 10, 11, ... microseconds; each call is made once."""

    def measure(calls, **options):
        for variants in calls.values():
            jax.block_until_ready([call() for call in variants])
        return {name: Time(10.0 + i, ("nm_x",)) for i, name in enumerate(calls)}

    monkeypatch.setattr(device_time, "measure", measure)
    monkeypatch.setattr(shapes, "MODELS", TINY)


@pytest.mark.parametrize("kind", problems.KINDS)
def test_every_kind_runs_from_problem_to_result(kind, fake_times):
    found = Bench("xla")
    listed = problems.listed(kind, ["tiny", "opt"], (16,))[:3]
    assert len(list(found.run(listed))) == 3
    assert not found.failed
    assert found.seen == set(listed)
    for r in found.results:
        assert r["kind"] == kind
        assert r["sparse_us"] in (10.0, 11.0)
        if kind != "transpose":  # plain XLA is as exact as the dense product, or more
            assert 0 < r["max_error_ratio"] <= 1.0
            assert r["speedup"] == round(r["dense_us"] / r["sparse_us"], 3)
    json.dumps(found.results)


def test_a_failure_is_named_and_does_not_end_the_run(fake_times, monkeypatch, capsys):
    make = problems.make

    def broken(problem, implementation):
        if problem.size == (64, 128):
            raise RuntimeError("out of luck")
        return make(problem, implementation)

    monkeypatch.setattr(problems, "make", broken)
    found = Bench("xla")
    listed = problems.listed("matmul", ["tiny"], (16,))
    list(found.run(listed))
    assert len(found.results) == len(listed) - 1
    (failure,) = found.failed
    assert failure["error"] == "RuntimeError: out of luck"
    assert (failure["in"], failure["out"]) == (64, 128)
    assert found.seen == set(listed)
    assert "out of luck" in capsys.readouterr().err


def test_a_fallback_cannot_pass_for_the_kernel():
    problem = Problem("matmul", 16, (64, 64))
    dense, sparse = Time(1.0, ("nvjet_sm90",)), Time(1.0, ("Memset", "nm_matmul_kernel"))
    check_kernels(problem, "mosaic", {"dense": dense, "sparse": sparse})
    with pytest.raises(RuntimeError, match="sparse of nm_matmul ran nvjet_sm90"):
        check_kernels(problem, "mosaic", {"dense": dense, "sparse": dense})
    with pytest.raises(RuntimeError, match="dense of nm_matmul ran"):
        check_kernels(problem, "mosaic", {"dense": sparse, "sparse": sparse})


@pytest.mark.parametrize("kind", ["matmul", "sddmm"])
def test_errors_are_those_of_the_results(kind):
    """A result that is off by 1 somewhere in the sample has an error of about 1."""
    problem = Problem(kind, 16, (64, 128))
    case = problems.make(problem, "xla")
    results = {n: v.function(*v.operands[0]) for n, v in case.variants.items()}
    errors = case.error(results, *case.exact)
    assert float(errors["sparse"]) <= float(errors["dense"]) < 0.2
    wrong = results | {"sparse": results["sparse"].at[-1, -1].add(1)}
    off = case.error(wrong, *case.exact)
    assert float(off["sparse"]) == pytest.approx(1, abs=0.2)
    assert off["dense"] == errors["dense"]


def test_operands_are_normal_different_and_pruned():
    first, second = samples.normal(1, 2, (500, 300))
    assert float(first.astype("float32").std()) == pytest.approx(1, abs=0.02)
    assert float((first == second).mean()) < 0.05
    assert float((first[1:] == first[:-1]).mean()) < 0.05
    (w,) = samples.weights(0, 1, (64, 40))
    assert ((w.dense != 0) <= kept_mask(w.sparse)).all()
    large = samples.normal(0, 1, (samples.BASE_SIZE + 5,))[0]
    assert large[:5].tolist() == large[-5:].tolist()


def test_problems_fit_on_the_device_in_order_of_their_worth():
    listed = kernels.ordered(["matmul", "sddmm"], list(shapes.MODELS), None)
    assert listed[0].tokens == 8192
    firsts = list(dict.fromkeys((p.kind, p.tokens) for p in listed))
    assert firsts[:4] == [("matmul", 8192), ("sddmm", 8192), ("matmul", 65536), ("sddmm", 65536)]
    made = list(kernels.batches(listed))
    assert [p for batch in made for p in batch] == listed
    for batch in made:
        assert len(batch) <= kernels.BATCH
        assert len(batch) == 1 or sum(p.nbytes for p in batch) <= kernels.BATCH_BYTES
    assert max(p.nbytes for p in listed) < 40e9


def test_what_is_left_out_is_in_the_record(fake_times, monkeypatch, tmp_path):
    clock = iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(kernels, "time", types.SimpleNamespace(monotonic=clock.__next__))
    monkeypatch.setattr(kernels, "support", types.SimpleNamespace(device_obstacle=lambda: None))
    monkeypatch.setattr(kernels, "Bench", lambda name, **options: Bench("xla", **options))
    monkeypatch.setattr(kernels, "BATCH", 2)
    options = [
        "--ops=matmul",
        "--models=tiny",
        "--tokens=16",
        "--minutes=0.5",
        f"--results={tmp_path}",
    ]
    monkeypatch.setattr("sys.argv", ["kernels", *options, "--part=some"])
    kernels.main()
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert path.name.startswith("kernels-some-")
    assert (len(record["results"]), len(record["failed"])) == (2, 0)
    total = len(problems.listed("matmul", ["tiny"], (16,)))
    assert len(record["left_out"]) == total - 2
    assert record["command"].startswith("python -m benchmarks.kernels --ops=matmul")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--ops=matmul,add", "kinds ['add'] are not of"),
        ("--models=bert", "models ['bert'] are not of"),
        ("--tokens=a", "give numbers"),
        ("--tokens=0", "give numbers"),
    ],
)
def test_wrong_options_are_named(option, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["kernels", option])
    with pytest.raises(SystemExit):
        kernels.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mosaic", "triton"])
def test_without_a_gpu_nothing_is_measured_or_written(name, monkeypatch, tmp_path):
    arguments = [f"--implementation={name}", f"--results={tmp_path}", "--ops=few"]
    monkeypatch.setattr("sys.argv", ["kernels", *arguments])
    with pytest.raises(SystemExit, match=r"nothing to measure here: the .* GPU"):
        kernels.main()
    assert not list(tmp_path.iterdir())


def test_the_peer_needs_pytorch(monkeypatch):
    monkeypatch.setattr(peers, "obstacle", lambda: "PyTorch is not installed")
    with pytest.raises(RuntimeError, match="--peer=cusparselt: PyTorch is not installed"):
        peers.Peer()


class FakePeer:
    """Knows every product but the wide one, at which its process ends."""

    alive = True

    def __init__(self, wide=(768, 3072)):
        self.wide = wide

    def measure(self, tokens, size):
        if size == self.wide:
            self.alive = False
            raise RuntimeError("cuSPARSELt: no algorithm")
        return {"peer_us": 2.004, "peer_dense_us": 3.0, "peer_layout": "y"}


def test_the_peer_is_measured_beside_forward_products_of_its_numbers_of_tokens():
    bench = Bench("xla", peer=FakePeer(), peer_tokens=(2048,))
    bench.results += [
        made("matmul", 2048, (768, 768), 1.5, names=["bert-base out", "bert-base out dx"]),
        made("matmul", 2048, (3072, 768), 1.5, names=["bert-base up dx"]),
        made("matmul", 8192, (768, 768), 1.5),
        made("epilogue", 2048, (768, 768), 1.5),
        made("matmul", 2048, (768, 3072), 1.5),
    ]
    assert [(r["in"], r["out"]) for r in bench.with_peer()] == [(768, 768), (768, 3072)]


def test_ours_is_timed_once_more_right_before_the_peer(fake_times):
    sizes = [(64, 128), (64, 192), (128, 64)]
    bench = Bench("xla", peer=FakePeer(wide=(64, 192)), peer_tokens=(16,))
    list(bench.run([Problem("matmul", 16, size, ("tiny up",)) for size in sizes]))
    asked = bench.with_peer()
    texts = [bench.beside(found) for found in asked]
    numbers = {"peer_us": 2.0, "peer_dense_us": 3.0, "peer_layout": "y"}
    again = {"beside_us": 10.0, "beside_dense_us": 11.0}  # as the clock of this test says
    assert asked[0] | numbers | again == asked[0]
    assert "no algorithm" in texts[1]
    assert "ended" in texts[2]
    assert [r["peer_us"] for r in bench.results] == [2.0, None, None]
    (failure,) = bench.failed
    assert (failure["in"], failure["out"], failure["error"]) == (
        64, 192, "RuntimeError: cuSPARSELt: no algorithm"
    )  # fmt: skip


def made(kind, tokens, size, speedup, path="mosaic: x", **more):
    times = {"sparse": 10.0, "dense": 10.0 * speedup, "copy": 8.0}
    found = result(Problem(kind, tokens, size, ("bert-base up",)), "xla", {
        name: Time(value, ("k",)) for name, value in times.items()
    }, 1.25)  # fmt: skip
    return found | {"path": path} | more


@pytest.fixture
def folder(tmp_path):
    peer = {"peer_us": 8.0, "peer_dense_us": 12.0}
    results = [
        made("matmul", 8192, (768, 3072), 2.0, **peer),
        made("matmul", 65536, (3072, 768), 0.5),
        made("matmul", 2048, (768, 768), 0.9, path="xla: dense"),
        made("few", 1, (4096, 4096), 1.6),
        made("few", 64, (4096, 4096), 1.3),
        made("few", 1, (768, 768), 1.2),
        made("transpose", 0, (768, 768), 1.0),
        made("adapters", 8192, (768, 768), 1.0, bare_us=8.0, whole_us=12.0),
        made("epilogue", 8192, (768, 3072), 1.5, epilogue="bias+gelu"),
    ]
    record = {
        "benchmark": "kernels",
        "device": "NVIDIA H100 80GB HBM3",
        "versions": {"jax": "1", "python": "3"},
        "date": "2026-01-01",
        "commit": "a" * 40,
        "command": "python -m benchmarks.kernels",
        "results": results,
        "failed": [],
        "left_out": [
            {"kind": "sddmm"},
            made("matmul", 2048, (768, 768), 1.0),
        ],  # the second is there
    }
    (tmp_path / "kernels-a.json").write_text(json.dumps(record))
    return tmp_path


def row(text, *start):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    (found,) = [cells for cells in rows if cells[: len(start)] == list(start)]
    return found


def test_the_summary_has_means_worst_and_every_loss(folder):
    text = report_kernels.summary(folder)
    many = row(text, "nm_matmul", "8,192 to 65,536")
    assert many[2:] == ["2", "dense", "1.00", "0.50", "2.00", "0.50"]
    few = row(text, "nm_matmul", "2,048")
    assert few[2:] == ["1", "dense", "0.90", "0.90", "0.90", "1.00"]  # the dispatcher is not slower
    assert row(text, "nm_matmul, few tokens", "1; 4096² and larger")[4] == "1.60"
    assert row(text, "nm_matmul, few tokens", "64; 4096² and larger")[4] == "1.30"
    assert "- nm_matmul: 65536 x 3072 x 768 (0.50), 2048 x 768 x 768 (0.90†)" in text
    assert "add 25.0% to the product" in text
    assert "50.0% with x @ L" in text
    assert "from bfloat16 80% (worst 80%, 1 shapes)" in text
    assert "1 / 1.33 of the time of cuSPARSELt" in text  # 2.0 against 12 / 8
    assert "at most 1.25 times" in text
    assert "commit aaaaaaaaaa: `python -m benchmarks.kernels`" in text


def test_the_page_has_every_result_and_what_is_missing(folder):
    text = report_kernels.full(folder, names=pictures.names)
    assert row(text, "768 x 3072", "bert-base up", "")[-3:] == ["", "2.00 (20.0 → 10.0)", ""]
    assert "0.90† (9.0 → 10.0)" in text
    assert row(text, "768 x 3072", "bert-base up", "bias+gelu")[-1] == "1.50 (15.0 → 10.0)"
    assert "Left out for want of time: 1 products" in text
    assert "(speedup-nvidia-h100-80gb-hbm3.svg)" in text


def test_a_product_in_two_records_is_an_error(folder):
    (folder / "kernels-b.json").write_text((folder / "kernels-a.json").read_text())
    with pytest.raises(ValueError, match=r"two records hold .*768"):
        report_kernels.devices(folder)


def test_the_peer_stands_beside_what_was_timed_right_before_it(folder):
    record = json.loads((folder / "kernels-a.json").read_text())
    record["results"][0] |= {"beside_us": 5.0, "beside_dense_us": 11.0}
    (folder / "kernels-a.json").write_text(json.dumps(record))
    text = report_kernels.full(folder)
    assert "1 / 1.60 of the time of cuSPARSELt" in text  # 8 against 5
    assert "both timed within seconds" in text
    assert "takes 1.09 of the time of XLA's there" in text  # 12 against 11
    assert "nm_matmul wins 1.47 times" in text  # 11 / 5 against 12 / 8
    assert row(text, "8192 x 768 x 3072")[1:] == ["11.0", "5.0", "12.0", "8.0", "1.60"]


def test_without_a_record_the_command_is_named(tmp_path):
    assert report_kernels.summary(tmp_path) == report_kernels.MISSING
    assert report_kernels.full(tmp_path) == report_kernels.MISSING
    assert pictures.drawn(tmp_path, tmp_path) == {}


def test_pictures_are_the_same_from_the_same_record(folder, tmp_path):
    pytest.importorskip("matplotlib")
    first = pictures.drawn(tmp_path, folder)
    assert [path.name.partition("-")[0] for path in first] == ["speedup", "roofline", "peers"]
    assert pictures.drawn(tmp_path, folder) == first
    for text in first.values():
        assert "<dc:date>" not in text
        assert len(text) < 500_000
    assert pictures.WIN in first[tmp_path / "speedup-nvidia-h100-80gb-hbm3.svg"]
    assert pictures.LOSS in first[tmp_path / "speedup-nvidia-h100-80gb-hbm3.svg"]


def test_intensity_counts_what_must_be_moved():
    r = {"tokens": 100, "in": 64, "out": 32}
    assert pictures.intensity(r, dense=True) == 2 * 100 * 64 * 32 / (2 * (6400 + 3200 + 2048))
    assert pictures.intensity(r, dense=False) == 2 * 100 * 64 * 32 / (2 * (6400 + 3200 + 1152))


def test_pictures_are_up_to_date():
    pytest.importorskip("matplotlib")
    pins = (report.ROOT / "constraints.txt").read_text()
    (pinned,) = re.findall(r"^matplotlib==([\w.]+)", pins, re.MULTILINE)
    if importlib.metadata.version("matplotlib") != pinned:
        pytest.skip(f"pictures are compared with matplotlib {pinned}")
    drawn = report.drawn()
    assert {path.name for path in drawn} == {path.name for path in report.DOCS.glob("*.svg")}
    for path, text in drawn.items():
        assert path.read_text(encoding="utf-8") == text, "run: make report"


def test_bursts_are_for_few_problems():
    listed = kernels.ordered(problems.KINDS, list(shapes.MODELS), None)
    assert 0 < sum(map(bench.is_cool, listed)) < 20


@pytest.mark.parametrize(
    ("cublas", "by_xla", "best"), [(20.0, 15.0, "triton"), (14.0, 15.0, "nvjet")]
)
def test_of_few_tokens_the_faster_dense_product_counts(cublas, by_xla, best):
    problem = Problem("few", 1, (768, 3072))
    times = {"sparse": Time(10.0, ("few",)), "dense": Time(cublas, ("nvjet",))}
    found = result(problem, "xla", times | {"dense_xla": Time(by_xla, ("triton",))}, 1.0)
    assert found["dense_us"] == min(cublas, by_xla)
    assert found["dense_xla_us"] == by_xla
    assert found["speedup"] == min(cublas, by_xla) / 10
    assert found["dense_kernels"] == [best]
    assert result(problem, "xla", times, 1.0)["dense_us"] == cublas
