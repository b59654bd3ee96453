"""The runner of experiments and what is made of its records."""

import concurrent.futures
import json
import statistics
import types

import pytest
from rich.console import Console

from benchmarks import report_accuracy
from experiments import __main__ as runner
from experiments import work
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
        Config(**fields, init_from="somewhere" if run.after else "")


class Pool:
    """Runs at once, in the order of submission."""

    def __init__(self, results):
        self.results, self.calls = results, []

    def submit(self, function, fields, folder, valid):
        assert function is (work.finetune if "task" in fields else work.train)
        self.calls.append((folder.name, fields))
        found = concurrent.futures.Future()
        found.set_result(self.results(fields))
        return found


def arguments(folder, **changes):
    given = {"data": "text:a.txt", "valid": {}, "folder": folder, "results": folder, "glue": "G"}
    return types.SimpleNamespace(**given, variants=None, override={}, override_tasks={}, **changes)


def group_of(monkeypatch, folder, runs, **changes):
    monkeypatch.setitem(runner.GROUPS, "gpt2-trial", runs)
    return runner._Group(
        "gpt2-trial", arguments(folder, **changes), "a GPU", "tokenizer.json", Console(quiet=True)
    )


def row(perplexity=10.0, **fields):
    return {"perplexity": {"books": perplexity}, "seconds": 1.0} | fields


def test_a_run_waits_for_the_one_it_begins_from_and_is_not_repeated(monkeypatch, tmp_path):
    runs = [Run("late", {"method": "wanda"}, after="early"), Run("early", {"method": "dense"})]
    pool = Pool(lambda fields: row())
    group_of(monkeypatch, tmp_path, runs).run(pool, 2, float("inf"))
    assert [name for name, _ in pool.calls] == ["early-seed-0", "late-seed-0"]
    assert pool.calls[1][1]["init_from"].endswith("trial/early-seed-0")
    assert "tokenizer" not in pool.calls[1][1]
    again = Pool(lambda fields: row())
    group_of(monkeypatch, tmp_path, runs).run(again, 2, float("inf"))
    assert again.calls == []


def test_failures_are_recorded_tried_again_and_end_a_group_that_has_nothing_else(
    monkeypatch, tmp_path
):
    runs = [Run("a", {}, seed) for seed in range(9)]
    pool = Pool(lambda fields: {"error": "ValueError: no"})
    group_of(monkeypatch, tmp_path, runs).run(pool, 1, float("inf"))
    assert len(pool.calls) == runner.MOST_FAILURES
    (path,) = tmp_path.glob("accuracy-gpt2-trial-*.json")
    assert [r["error"] for r in json.loads(path.read_text())["results"]] == ["ValueError: no"] * 3
    good = Pool(lambda fields: row())
    group_of(monkeypatch, tmp_path, runs).run(good, 1, float("inf"))
    assert len(good.calls) == 9


def test_no_run_starts_when_the_time_is_up(monkeypatch, tmp_path):
    pool = Pool(lambda fields: row())
    group_of(monkeypatch, tmp_path, [Run("a", {})]).run(pool, 1, 0.0)
    assert pool.calls == []


def test_a_task_waits_for_its_pretraining_and_goes_on_from_it(monkeypatch, tmp_path):
    runs = [Run("dense, glue/rte", {"epochs": 1}, seed=2, after="dense", task="glue/rte")]
    group = group_of(monkeypatch, tmp_path, runs)
    group.name = "bert-glue"
    monkeypatch.setitem(runner.GROUPS, "bert-glue", runs)
    pool = Pool(
        lambda fields: {"task": "glue/rte", "metric": "accuracy", "score": 0.5, "seconds": 1}
    )
    group.run(pool, 1, float("inf"))
    assert pool.calls == []
    pretrained = tmp_path / "bert-methods" / "dense-seed-2"
    pretrained.mkdir(parents=True)
    (pretrained / "summary.json").write_text("{}")
    group.run(pool, 1, float("inf"))
    ((_, fields),) = pool.calls
    assert fields == {
        "task": "glue/rte",
        "data": "G",
        "seeds": (2,),
        "checkpoint": str(pretrained),
        "epochs": 1,
    }
    assert group.rows[0] | {"score": 0.5, "seed": 2} == group.rows[0]


def test_scores_are_percents_by_method_and_task():
    def scored(method, task, score, seed):
        return {
            "variant": f"{method}, {task}",
            "task": task,
            "metric": "m",
            "score": score,
            "seed": seed,
        }

    rows = [scored("slope, adapters 6.25 %", "glue/rte", s, i) for i, s in enumerate((0.5, 0.7))]
    rows += [scored("dense", "glue/cola", 0.25, 0)]
    table = report_accuracy._scores(rows).splitlines()
    cells = lambda line: [cell.strip() for cell in line.strip("|").split("|")]  # noqa: E731
    assert cells(table[0]) == ["method", "seeds", "glue/rte, m", "glue/cola, m"]
    deviation = statistics.stdev([50.0, 70.0])
    assert cells(table[2]) == ["slope, adapters 6.25 %", "2", f"60.00 ± {deviation:.2f}", "–"]
    assert cells(table[3]) == ["dense", "1", "–", "25.00"]


def test_the_best_learning_rate_is_the_methods_own():
    rows = [
        row(9.0, method="dense", lr=1e-3),
        row(8.0, method="dense", lr=2e-3),
        row(7.0, method="slope", lr=4e-3),
        {"method": "dense", "lr": 8e-3, "error": "x"},
    ]
    assert runner.best_rate(rows, "dense", "books") == 2e-3
    assert runner.best_rate(rows, "sr-ste", "books") == 2e-3  # nothing tried


def test_the_table_has_means_deviations_and_pairs_seeds():
    def run(variant, seed, perplexity):
        return row(perplexity, variant=variant, seed=seed, lr=1e-3)

    rows = [run("dense", 0, 10.0), run("dense", 1, 20.0), run("slope", 1, 22.0)]
    table = report_accuracy._methods(rows).splitlines()
    assert f"15.00 ± {statistics.stdev([10.0, 20.0]):.2f}" in table[2]
    assert table[3].split("|")[-2].strip() == "+10.0 %"
    assert "±" not in table[3]


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
