"""The runner of experiments and what is made of its records."""

import concurrent.futures
import json
import math
import statistics
import types

import pytest
from rich.console import Console

from benchmarks import report_accuracy, report_tasks
from experiments import __main__ as runner
from experiments import group as groups
from experiments import work
from experiments.record import best_rate, identity, is_of
from experiments.runs import COMMON, GROUPS, Run, family_of
from train.config import Config
from train.tasks.config import FinetuneConfig


@pytest.mark.parametrize("group", GROUPS)
def test_every_run_is_a_configuration_and_has_a_name_of_its_own(group):
    runs = GROUPS[group]
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        others = GROUPS["bert-methods"] if run.task else runs
        assert run.after is None or any(
            (other.variant, other.seed) == (run.after, run.seed) for other in others
        )
        if run.task:
            FinetuneConfig(**run.fields, task=run.task, checkpoint="somewhere", seeds=(run.seed,))
            continue
        fields = dict(COMMON[family_of(group)]) | dict(run.fields) | {"seed": run.seed}
        config = Config(**fields, init_from="somewhere" if run.after and not run.branch else "")
        if run.branch:
            (before,) = (o for o in others if (o.variant, o.seed) == (run.after, run.seed))
            assert run.branch % before.fields["checkpoint_every"] == 0
            assert run.branch <= config.adapter_step


class Pool:
    """Runs at once, in the order of submission; leaves a summary unless the run failed."""

    def __init__(self, results):
        self.results, self.calls, self.functions = results, [], []

    def submit(self, function, fields, folder, valid):
        assert ("task" in fields) == (function is work.finetune)
        self.functions.append(function)
        self.calls.append((folder.name, fields))
        found = concurrent.futures.Future()
        result = self.results(fields)
        if "error" not in result:
            finish(folder)
        found.set_result(result)
        return found

    @property
    def names(self):
        return [name for name, _ in self.calls]


def finish(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text("{}")


def arguments(folder, **changes):
    given = {"data": "text:/home/a.txt", "valid": {}, "folder": folder, "results": folder}
    given |= {"glue": "/home/G", "variants": None, "override": {}, "override_tasks": {}}
    return types.SimpleNamespace(**given | changes)


def group_of(monkeypatch, folder, runs, name="gpt2-trial", console=None, **changes):
    monkeypatch.setitem(groups.GROUPS, name, runs)
    console = console or Console(quiet=True)
    given = arguments(folder, **changes)
    return groups.Group(name, given, "a GPU", str(folder / "tokenizer.json"), console)


def rows_of(folder, name="gpt2-trial"):
    return json.loads((folder / f"accuracy-{name}-a-gpu.json").read_text())["results"]


def row(perplexity=10.0, **fields):
    return {"perplexity": {"books": perplexity}, "seconds": 1.0} | fields


def test_a_run_waits_for_the_one_it_begins_from_and_is_not_repeated(monkeypatch, tmp_path):
    runs = [Run("late", {"method": "wanda"}, after="early"), Run("early", {"method": "dense"})]
    pool = Pool(lambda fields: row())
    group_of(monkeypatch, tmp_path, runs).run(pool, 2, float("inf"))
    assert pool.names == ["early-seed-0", "late-seed-0"]
    assert pool.calls[1][1]["init_from"].endswith("trial/early-seed-0")
    assert "tokenizer" not in pool.calls[1][1]
    again = Pool(lambda fields: row())
    group_of(monkeypatch, tmp_path, runs).run(again, 2, float("inf"))
    assert again.calls == []


def test_a_branch_goes_on_from_a_checkpoint_of_the_other_run(monkeypatch, tmp_path):
    runs = [Run("late", {"adapter_rank": 4}, after="early", branch=7), Run("early", {})]
    pool = Pool(lambda fields: row(9.0 if fields["adapter_rank"] else 10.0))
    group_of(monkeypatch, tmp_path, runs).run(pool, 2, float("inf"))
    assert pool.names == ["early-seed-0", "late-seed-0"]
    early, late = rows_of(tmp_path)
    assert late["without"] == {"books": 10.0}  # what it is compared with, should that be run again
    assert "without" not in early
    assert "init_from" not in pool.calls[1][1]
    assert pool.functions[0] is work.train
    assert pool.functions[1].func is work.branch
    assert pool.functions[1].args == (tmp_path / "gpt2-trial" / "early-seed-0", 7)


def test_a_copy_ends_at_its_checkpoint(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "copy"
    for step in ("3", "7", "9"):
        (source / "checkpoints" / step / "run").mkdir(parents=True)
        (source / "checkpoints" / step / "summary.json").write_text(step)
    for name in ("config.json", "metrics.jsonl", "summary.json"):
        (source / name).write_text(name)
    work.copy_until(source, 7, folder)
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert found == ["checkpoints/7/summary.json", "config.json", "metrics.jsonl"]
    with pytest.raises(FileNotFoundError, match="source has no checkpoint of step 8"):
        work.copy_until(source, 8, tmp_path / "more")


def test_failures_are_recorded_tried_again_and_end_a_group_that_has_nothing_else(
    monkeypatch, tmp_path
):
    runs = [Run("a", {}, seed) for seed in range(9)]
    pool = Pool(lambda fields: {"error": "ValueError: no"})
    group_of(monkeypatch, tmp_path, runs).run(pool, 1, float("inf"))
    assert len(pool.calls) == groups.MOST_FAILURES
    assert [r["error"] for r in rows_of(tmp_path)] == ["ValueError: no"] * 3
    good = Pool(lambda fields: row())
    group_of(monkeypatch, tmp_path, runs).run(good, 1, float("inf"))
    assert len(good.calls) == 9


def test_no_run_starts_when_the_time_is_up(monkeypatch, tmp_path):
    pool = Pool(lambda fields: row())
    group_of(monkeypatch, tmp_path, [Run("a", {})]).run(pool, 1, 0.0)
    assert pool.calls == []


def test_a_task_waits_for_its_pretraining_and_goes_on_from_it(monkeypatch, tmp_path):
    runs = [Run("dense, glue/rte", {"epochs": 1}, seed=2, after="dense", task="glue/rte")]
    group = group_of(monkeypatch, tmp_path, runs, "bert-glue")
    pool = Pool(
        lambda fields: {"task": "glue/rte", "metric": "accuracy", "score": 0.5, "seconds": 1}
    )
    group.run(pool, 1, float("inf"))
    assert pool.calls == []
    pretrained = tmp_path / "bert-methods" / "dense-seed-2"
    finish(pretrained)
    group.run(pool, 1, float("inf"))
    ((_, fields),) = pool.calls
    assert fields == {
        "task": "glue/rte",
        "data": "/home/G",
        "seeds": (2,),
        "checkpoint": str(pretrained),
        "epochs": 1,
    }
    assert group.rows[0] | {"score": 0.5, "seed": 2} == group.rows[0]


def test_a_run_leaves_what_the_report_reads(small_text, tmp_path):
    fields = dict(COMMON["gpt2"]) | {"model": "gpt2-nano", "vocab_size": 300, "seq_len": 16}
    fields |= {"batch_size": 2, "steps": 2, "eval_every": 1, "eval_batches": 1, "lr": 1e-3}
    fields |= {"method": "dense"}  # is compiled in half the time
    fields |= {
        "data": f"text:{small_text}/a.txt",
        "cache_dir": str(tmp_path),
        "valid_fraction": 0.2,
    }
    text = tmp_path / "books.txt"
    text.write_text("Sparse kernel mask values. " * 9)
    found = work.train(fields, tmp_path / "run", {"books": text})
    assert found.get("error") is None
    assert (found["model"], found["method"], found["lr"]) == ("gpt2-nano", "dense", 1e-3)
    assert found["tokens"] == 2 * 2 * 16
    assert found["parameters"] == found["dense_parameters"]
    assert [step for step, _ in found["curve"]] == [0, 1, 2]
    assert found["curve"][-1][1] == pytest.approx(found["held_out_loss"], abs=1e-4)
    assert found["perplexity"] == {"books": pytest.approx(math.exp(found["loss"]["books"]))}
    assert 1 < found["perplexity"]["books"] < 400
    rows = [{"variant": name, "seed": 0} | found for name in ("dense", "another")]
    rows = json.loads(json.dumps(rows))
    perplexity = f"{found['perplexity']['books']:,.2f}"
    assert report_accuracy._methods(rows).count(perplexity) == 2
    assert report_accuracy.noise_of(row | {"method": "slope"} for row in rows) == 0
    assert report_accuracy._each(rows).count(perplexity) == 2
    first = report_accuracy._notes("gpt2-methods", {"results": rows})[0]
    assert f"{found['dense_parameters'] / 1e6:.1f} million parameters" in first


def test_scores_are_percents_by_method_and_task_at_the_best_rate():
    def scored(method, task, score, seed, rate=1e-4):
        return {
            "variant": f"{method}, {task}, lr {rate:g}",
            "fields": {"lr": rate},
            "task": task,
            "metric": "m",
            "score": score,
            "seed": seed,
        }

    rows = [scored("slope, adapters 6.25 %", "glue/rte", s, i) for i, s in enumerate((0.5, 0.7))]
    rows += [
        scored("slope, adapters 6.25 %", "glue/rte", s, i, 3e-4) for i, s in enumerate((0.9, 0.1))
    ]
    rows += [scored("slope, adapters 6.25 %", "glue/rte", 0.95, 0, 1e-3)]  # of one seed only
    rows += [scored("dense", "glue/cola", 0.25, 0)]
    table = report_tasks._scores(rows).splitlines()
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]  # noqa: E731
    assert cells(table[0]) == ["method", "seeds", "glue/cola, m (lr)", "glue/rte, m (lr)"]
    deviation = statistics.stdev([50.0, 70.0])
    assert cells(table[2]) == [
        "slope, adapters 6.25 %",
        "2",
        "–",
        f"60.00 ± {deviation:.2f} (0.0001)",
    ]
    assert cells(table[3]) == ["dense", "1", "25.00 (0.0001)", "–"]


RATES = [
    {"method": "dense", "lr": 1e-3, "perplexity": {"books": 9.0}},
    {"method": "dense", "lr": 2e-3, "perplexity": {"books": 8.0}},
    {"method": "dense", "lr": 4e-3, "perplexity": {"books": 7.0}},  # by one seed the best
    {"method": "dense", "lr": 4e-3, "perplexity": {"books": 9.5}},
    {"method": "slope", "lr": 4e-3, "perplexity": {"books": 7.0}},
    {"method": "dense", "lr": 8e-3, "error": "x"},
]


@pytest.mark.parametrize(("method", "text"), [("sr-ste", "books"), ("dense", "others")])
def test_the_best_learning_rate_is_the_methods_own_or_named_as_missing(method, text):
    assert best_rate(RATES, "dense", "books", group="gpt2-lr") == 2e-3
    message = f"no record of gpt2-lr has a learning rate of {method} .* '{text}': run --groups=gpt2"
    with pytest.raises(ValueError, match=message):
        best_rate(RATES, method, text, group="gpt2-lr")


def test_learning_rates_come_from_the_record_and_are_missed_before_anything_runs(
    monkeypatch, tmp_path
):
    text = tmp_path / "books.txt"
    text.write_text("words")
    changes = {"valid": {"books": text}, "results": tmp_path / "records"}
    changes["results"].mkdir()
    tuned = Run("a", {"method": "slope"}, tuned_as="slope")
    free = group_of(monkeypatch, tmp_path, [Run("b", {})], "gpt2-free", **changes)
    group = group_of(monkeypatch, tmp_path, [tuned], **changes)
    pool = Pool(lambda fields: row())
    with pytest.raises(ValueError, match="run --groups=gpt2-lr first"):
        runner._run_all([free, group], pool, 1, float("inf"))
    assert pool.calls == []
    assert group_of(monkeypatch, tmp_path, [tuned], override={"lr": 7e-3}, **changes)._fields(
        tuned
    ) == {**COMMON["gpt2"], "method": "slope", "seed": 0, "lr": 7e-3} | {
        "data": "text:/home/a.txt",
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "cache_dir": str(tmp_path / "tokens"),
    }
    record = {"results": RATES, "date": "2026-01-01"}
    # Another device's: how fast to learn has nothing to do with the device.
    (changes["results"] / "accuracy-gpt2-lr-another-gpu.json").write_text(json.dumps(record))
    assert group._fields(tuned)["lr"] == 4e-3
    assert runner._run_all([free, group], pool, 1, float("inf"))
    assert pool.names == ["b-seed-0", "a-seed-0"]


CHAIN = [Run("late", {"method": "wanda"}, after="early"), Run("early", {"method": "dense"})]


def test_a_recorded_run_is_run_again_where_its_folder_is_needed_and_gone(monkeypatch, tmp_path):
    records = tmp_path / "records"
    records.mkdir()
    first, early = tmp_path / "first", Pool(lambda fields: row(1.0))
    group_of(monkeypatch, first, CHAIN, results=records, variants=["early"]).run(early, 1, 1e9)
    again = Pool(lambda fields: row(2.0))
    group_of(monkeypatch, tmp_path / "other", CHAIN, results=records).run(again, 2, float("inf"))
    assert early.names == ["early-seed-0"]
    assert again.names == ["early-seed-0", "late-seed-0"]
    found = [(r["variant"], r["perplexity"]["books"]) for r in rows_of(records)]
    assert found == [("early", 2.0), ("late", 2.0)]
    third = Pool(lambda fields: row())
    group_of(monkeypatch, tmp_path / "third", CHAIN, results=records).run(third, 1, float("inf"))
    assert third.calls == []  # nothing that is left needs a folder


def test_a_result_outlives_a_failure_of_the_run_for_its_folder(monkeypatch, tmp_path):
    first, later = tmp_path / "first", tmp_path / "later"
    good, bad = Pool(lambda fields: row(1.0)), Pool(lambda fields: {"error": "OSError: full"})
    group_of(monkeypatch, first, CHAIN, results=tmp_path, variants=["early"]).run(good, 1, 1e9)
    assert not group_of(monkeypatch, later, CHAIN, results=tmp_path).run(bad, 1, float("inf"))
    assert bad.names == ["early-seed-0"]
    assert [(r["variant"], r["perplexity"]["books"]) for r in rows_of(tmp_path)] == [("early", 1.0)]


def test_pretraining_is_repeated_for_the_tasks_that_need_its_folder(monkeypatch, tmp_path):
    dense = [Run("dense", {"method": "dense"}, seed) for seed in (0, 1)]
    task = [Run("dense, rte", {}, 1, after="dense", task="glue/rte")]
    scores = {"metric": "accuracy", "score": 0.5, "seconds": 1}
    pool = Pool(lambda fields: scores if "task" in fields else row())
    group_of(monkeypatch, tmp_path / "a", dense, "bert-methods", results=tmp_path).run(pool, 1, 1e9)
    made = [
        group_of(monkeypatch, tmp_path / "b", runs, name, results=tmp_path)
        for name, runs in (("bert-methods", dense), ("bert-glue", task))
    ]
    assert runner._run_all(made, pool, 1, float("inf"))
    assert pool.names[2:] == ["dense-seed-1", "dense--rte-seed-1"]


def test_rows_hold_what_repeats_them_and_count_for_that_alone(monkeypatch, tmp_path):
    runs = [Run("a", {"method": "slope", "lr": 1e-3}), Run("b", {"method": "dense"})]
    pool = Pool(lambda fields: row())
    monkeypatch.setattr("sys.argv", ["experiments", "--data=text:/home/a.txt", "--parallel=2"])
    group_of(monkeypatch, tmp_path, runs).run(pool, 1, float("inf"))
    first, _ = rows_of(tmp_path)
    repeated = Config(**dict(COMMON["gpt2"]) | dict(runs[0].fields))
    expected = repeated.identity() | {"data": "text:a.txt", "tokenizer": "tokenizer.json"}
    assert first["fields"] == expected
    assert first["command"] == "python -m experiments --data=text:... --parallel=2"
    assert len(first["commit"]) == 40
    assert first["date"].count("-") == 2
    assert str(tmp_path) not in json.dumps(rows_of(tmp_path))
    changed = [Run("a", {"method": "slope", "lr": 2e-3}), runs[1]]
    group_of(monkeypatch, tmp_path, changed).run(pool, 1, float("inf"))
    assert pool.names == ["a-seed-0", "b-seed-0", "a-seed-0"]
    assert sorted((r["variant"], r["fields"]["lr"]) for r in rows_of(tmp_path)) == [
        ("a", [2e-3]),
        ("b", [1e-3]),
    ]


def test_names_stand_for_the_paths_of_tasks():
    config = FinetuneConfig("cola", "/home/runs/dense-seed-1", data="/home/glue")
    assert identity(config) == config.identity() | {"checkpoint": "dense-seed-1", "data": "glue"}


@pytest.mark.parametrize("option", ["--override", "--override-tasks"])
def test_trials_stay_out_of_the_committed_records(monkeypatch, tmp_path, option, capsys):
    text = tmp_path / "a.txt"
    text.write_text("words")
    given = ["experiments", f"--data=text:{text}", f"--valid=books={text}", f'{option}={{"a": 1}}']
    monkeypatch.setattr("sys.argv", given)
    with pytest.raises(SystemExit):
        runner._arguments()
    assert "name another folder for their records with --results" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*given, f"--results={tmp_path}"])
    assert runner._arguments().results == tmp_path


def test_runs_take_the_gpus_in_turn():
    assert runner.gpus_in_turn(5, 2, None) == ["0", "1", "0", "1", "0"]
    assert runner.gpus_in_turn(3, 2, "4,6,7") == ["4", "6", "4"]


def test_no_more_gpus_than_runs_at_a_time(monkeypatch, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("words")
    given = ["experiments", f"--data=text:{text}", f"--valid=books={text}", "--gpus=3"]
    monkeypatch.setattr("sys.argv", [*given, "--parallel=2"])
    with pytest.raises(SystemExit):
        runner._arguments()
    assert "--gpus=3 must be from 1 to 2" in capsys.readouterr().err


def test_runs_that_wait_for_a_failed_one_say_so(monkeypatch, tmp_path, capsys):
    def ended(results, stop=float("inf"), **changes):
        console, folder = Console(width=200), tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        group = group_of(monkeypatch, folder, CHAIN, console=console, **changes)
        return group.run(Pool(results), 1, stop), capsys.readouterr().out

    waits = "not run, it waits for early-seed-0, which failed or was not run: late-seed-0"
    fine, out = ended(lambda fields: {"error": "ValueError: no"})
    assert not fine
    assert waits in out
    fine, out = ended(lambda fields: row(), variants=["late"])
    assert not fine
    assert waits in out
    fine, out = ended(lambda fields: row(), stop=0.0)
    assert fine
    assert out.count("not run, for want of time") == 2
    assert "waits" not in out
    assert ended(lambda fields: row())[0]


def cells_of(rows) -> dict[str, list[str]]:
    """Cells of the table of methods, by the first of each line."""
    lines = [x for x in report_accuracy._methods(rows).splitlines() if x.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


def test_the_table_has_means_deviations_and_pairs_single_seeds():
    def run(variant, seed, perplexity):
        return row(perplexity, variant=variant, seed=seed, lr=1e-3)

    rows = [run("dense", 0, 10.0), run("dense", 1, 20.0), run("slope", 1, 22.0)]
    cells = cells_of([*rows, run("fst", 2, 9.0)])
    assert f"15.00 ± {statistics.stdev([10.0, 20.0]):.2f}" in cells["dense"]
    assert cells["slope"][-2:] == ["+10.0 %", "–"]
    assert cells["dense"][-2:] == ["–", "-9.1 %"]
    assert cells["fst"][-2:] == ["–", "–"]


def test_a_change_of_several_seeds_is_as_sure_as_their_spread_lets_it():
    """By the quantile of Student's t with 4 degrees of freedom, 2.776, from a table."""

    def runs(variant, *logs):
        about = {"variant": variant, "lr": 1e-3}
        return [row(math.exp(log), seed=seed, **about) for seed, log in enumerate(logs)]

    dense, slope = runs("dense", 3.99, 4.0, 4.01), runs("slope", 4.01, 4.02, 4.03)
    change, margin = report_accuracy.change_and_margin(slope, dense, "books")
    assert change == pytest.approx(0.02)
    assert margin == pytest.approx(2.776 * math.sqrt(2 * 0.01**2 / 3), rel=1e-3)
    assert cells_of([*dense, *slope])["slope"][-2] == "+2.0 % ± 2.3 (noise)"
    far = runs("half", 4.03, 4.04, 4.05)
    assert cells_of([*dense, *far])["half"][-1] == "+4.1 % ± 2.3"


def test_what_adapters_add_is_told_by_pairs_of_one_seed():
    """By the quantile of Student's t with 2 degrees of freedom, 4.303, from a table."""

    def runs(variant, *logs, joins=None):
        about = {"variant": variant, "lr": 1e-3, "method": "slope", "adapter_step": joins}
        about["steps"] = 16
        curve = [[10, 4.0], [20, 3.0]]
        return [row(math.exp(x), seed=i, curve=curve, **about) for i, x in enumerate(logs)]

    base, wide = runs("slope", 3.9, 4.0, 4.1), runs("wide", 3.89, 3.98, 4.07, joins=15)
    lines = report_accuracy._adapters([*base, *wide, *runs("late", 3.9, joins=12)]).splitlines()
    cells = {x.split("|")[1].strip(): x.split("|")[-2].strip() for x in lines[2:5]}
    margin = 4.303 * 0.01 / math.sqrt(3)
    change = math.expm1(-0.02)
    assert cells == {
        "slope": "–",
        "wide": f"{100 * change:+.2f} % ± {100 * margin:.2f} (noise)",
        "late": "+0.00 %",
    }
    assert lines[-1].endswith("runs of one seed are 0.00 % apart at most.")
    surer = runs("wide", 3.88, 3.98, 4.081)
    assert report_accuracy._paired(surer, base, "books") == "-1.95 % ± 0.14"
    joined = [r | {"without": {"books": 2 * r["perplexity"]["books"]}} for r in surer]
    assert report_accuracy._paired(joined, base, "books").startswith("-50.00 %")


def test_experiments_with_adapters_stand_beside_the_methods(monkeypatch):
    def rows(**logs):
        return [
            row(math.exp(x), variant=variant, seed=seed)
            for variant, values in logs.items()
            for seed, x in enumerate(values)
        ]

    records = {
        "accuracy-gpt2-adapters": rows(slope=(4.0, 4.02), other=(9.0,)),
        "accuracy-gpt2-methods": rows(dense=(3.99, 4.01), slope=(8.0, 8.1)),
    }
    monkeypatch.setattr(
        report_accuracy, "records", lambda name, folder: [{"results": records[name]}]
    )
    table = report_accuracy.beside_methods().splitlines()
    assert [cell.strip() for cell in table[0].strip("|").split("|")][1:] == ["dense"]
    assert len(table) == 3  # of the experiments' runs those that have a place there
    assert table[2].startswith("| slope | +1.0 % ± ")


def test_one_run_is_told_how_far_it_may_be_from_the_seeds_by_chance(tmp_path):
    """By the quantile of Student's t with 2 degrees of freedom, 4.303, from a table."""
    logs = (3.99, 4.0, 4.01)
    rows = [row(math.exp(x), variant="slope", seed=seed, lr=1e-3) for seed, x in enumerate(logs)]
    told = report_accuracy._beside_seeds(rows, "slope")
    assert told.startswith(f"slope, 3 seeds: {math.exp(4.0):.2f} ± 0.55 on books.")
    margin = 4.303 * 0.01 * math.sqrt(1 + 1 / 3)
    assert f"less than {100 * margin:.1f} % away" in told
    assert report_accuracy._beside_seeds(rows[:1], "slope") is None


def test_noise_is_how_far_runs_are_apart_that_should_be_equal():
    def run(variant, seed, curve, *, perplexity=100.0, method="slope", joins=None):
        about = {"variant": variant, "seed": seed, "method": method, "lr": 1e-3, "steps": 30}
        curve = [[step, math.log(x)] for step, x in curve]
        return row(perplexity, **about, adapter_step=joins, curve=curve)

    rows = [
        run("slope", 0, [(0, 900.0), (10, 50.0), (20, 40.0), (25, 30.0), (30, 20.0)]),
        run("wide", 0, [(0, 900.0), (10, 80.0), (20, 41.0), (30, 90.0)], joins=28),
        run("narrow", 0, [(0, 900.0), (10, 50.0), (20, 42.0), (25, 60.0), (30, 20.0)], joins=20),
        run("early", 0, [(0, 900.0), (10, 10.0), (20, 5.0)], joins=15),
        run("slope", 1, [(20, 40.0)], perplexity=104.0),
        run("wide", 1, [(20, 40.4)], joins=28, perplexity=103.0),
        run("slope", 2, [(20, 99.0)]),
        run("dense", 0, [(20, 10.0)], method="dense"),
        run("dense", 1, [(20, 99.0)], method="dense", perplexity=101.0),
        run("half", 0, [(20, 10.0)], method="half", perplexity=94.9),
        run("fst", 0, [(20, 10.0)], method="fst", perplexity=95.1),
    ]
    assert report_accuracy.noise_of(rows) == pytest.approx(42 / 40 - 1)
    *_, told = report_accuracy._methods(rows).splitlines()
    assert "differ there by up to 5.0 % in held-out perplexity" in told
    cells = {name: found[-2] for name, found in cells_of(rows).items()}
    assert cells["half"] == "-5.1 %"
    assert cells["fst"] == "-4.9 % (noise)"
    assert report_accuracy.noise_of(rows[4:5]) is None


def test_curves_are_means_where_all_seeds_were_evaluated():
    drawn = {}
    axis = types.SimpleNamespace(
        plot=lambda steps, losses, label, **_: drawn.setdefault(label, (steps, losses)),
        set=lambda **_: None,
        legend=lambda **_: None,
    )
    figure = types.SimpleNamespace(tight_layout=lambda: None)
    pyplot = types.SimpleNamespace(subplots=lambda **_: (figure, axis))
    rows = [
        row(variant="slope", curve=[[0, 9.0], [10, 4.0], [20, 3.0]]),
        row(variant="slope", curve=[[0, 9.0], [10, 5.0], [15, 3.5], [20, 2.0]]),
        row(variant="dense", curve=[[0, 9.0]]),
    ]
    report_accuracy._curves(pyplot, rows)
    assert drawn == {"slope": ([10, 20], [4.5, 2.5])}


def test_fields_that_decide_nothing_do_not_make_another_run():
    """Options of other methods, and of adapters where there are none."""
    common = dict(COMMON["gpt2"])
    for config, changed, same in (
        (Config(**common, method="sr-ste"), {"pruned_lr_scale": 3.0}, True),
        (Config(**common, method="slope"), {"pruned_lr_scale": 3.0}, False),
        (Config(**common, method="slope"), {"adapter_lr_scale": 3.0}, True),
        (Config(**common, method="slope"), {"adapter_rank": 4}, False),
        (Config(**common | {"adapter_rank": 4}, method="slope"), {"adapter_lr_scale": 3.0}, False),
    ):
        assert is_of({"fields": identity(config) | changed}, config) is same
