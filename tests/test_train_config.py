"""The configuration, its recipes and the command line."""

import dataclasses

import pytest

from slope_jax.models import VARIANTS, variant_config
from train.config import Config, choices, free_fields, from_json, to_json
from train.config_checks import ADAPTER_OPTIONS
from train.plan import make_plan
from train.pretrain import main, parse
from train.recipes import make_config

BAD = [
    ({"model": "bert-huge"}, "choose one of: .*bert-base.*gpt2-xl"),
    ({"recipe": "fast"}, "choose one of: quickstart, paper"),
    ({"method": "magic"}, "choose one of: slope, dense"),
    ({"optimizer": "sgd"}, "choose one of: adamw, lamb"),
    ({"moments": "float16"}, "choose one of: float32, bfloat16"),
    ({"schedule": "cosine"}, "choose one of: linear, polynomial"),
    ({"dtype": "int8"}, "choose one of: auto, bfloat16, float32"),
    ({"data": "wikipedia"}, "'wikipedia'.*(?s:.)*docs(?s:.)*tfds:(?s:.)*text:"),
    ({"steps": 0}, "steps must be a positive integer, got 0"),
    ({"steps": (3, 4)}, "steps has 2 values .* 1 phase"),
    ({"seq_len": ()}, "seq_len is empty"),
    ({"batch_size": 8, "accumulation": 3}, "batch_size 8 is not divisible by accumulation 3"),
    ({"adapter_start": 1.0}, r"adapter_start .* \[0, 1\).* set adapter_rank to 0"),
    ({"adapter_rank": -1}, "adapter_rank"),
    ({"adapter_rank": 1.5}, "adapter_rank"),
    ({"lr": 0.0}, "lr must be above 0"),
    ({"warmup": 1.0}, "warmup"),
    ({"max_predictions": 64}, "max_predictions 64 must be below seq_len 64"),
    ({"dropout": 1.0}, "dropout"),
    ({"clip": -1.0}, "clip must not be negative"),
    ({"weight_decay": float("nan")}, "weight_decay"),
    ({"eval_batches": 0}, "eval_batches must be above 0"),
    ({"valid_fraction": 0.0}, "valid_fraction"),
    ({"vocab_size": 10}, "vocab_size"),
    ({"seed": -1}, "seed"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda x: str(x)[:40])
def test_bad_values_are_named_with_the_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**{"model": "bert-tiny", **fields})


def test_paper_recipe_of_bert_has_the_published_numbers():
    config = make_config("bert-large", "paper")
    first, second = config.phases
    assert (first.seq_len, second.seq_len) == (128, 512)
    assert (first.batch_size, second.batch_size) == (65536, 32768)
    assert (first.steps, second.steps) == (7038, 1563)
    assert (first.lr, second.lr) == (6e-3, 4e-3)
    assert (first.warmup, second.warmup) == (0.2843, 0.128)
    assert (first.max_predictions, second.max_predictions) == (20, 80)
    assert (config.optimizer, config.schedule, config.weight_decay) == ("lamb", "polynomial", 0.01)
    assert config.vocab_size == 30522
    # The last 1 % of phase 2.
    assert config.adapter_step == 7038 + 1547
    assert config.total_tokens == 7038 * 65536 * 128 + 1563 * 32768 * 512


def test_paper_recipe_of_gpt2_has_the_published_numbers():
    small, large = make_config("gpt2-small", "paper"), make_config("gpt2-large", "paper")
    assert (small.lr, large.lr) == ((6e-4,), (1.5e-4,))
    (phase,) = small.phases
    assert (phase.seq_len, phase.batch_size, phase.steps) == (1024, 512, 400_000)
    assert (small.weight_decay, small.eps, small.clip) == (0.1, 1e-4, 1.0)
    assert (small.optimizer, small.schedule, phase.warmup) == ("adamw", "linear", 0.01)
    assert small.total_steps - small.adapter_step == 4000


def test_paper_recipes_of_opt_and_llama_have_the_published_numbers():
    config = make_config("opt-13b", "paper")
    (phase,) = config.phases
    assert (config.lr, phase.seq_len, phase.tokens_per_step) == ((1e-4,), 2048, 2**22)
    assert (config.beta1, config.beta2, config.weight_decay, config.clip) == (0.9, 0.95, 0.1, 1.0)
    assert config.total_tokens == pytest.approx(300e9, rel=1e-4)
    assert phase.warmup_steps * phase.tokens_per_step == pytest.approx(375e6, rel=0.01)
    assert config.dropout == 0.1
    assert make_config("opt-125m", "paper").phases[0].tokens_per_step == 2**19

    for model, tokens in (("llama-3-8b", 15e12), ("mistral-7b", 2e12)):
        config = make_config(model, "paper")
        (phase,) = config.phases
        assert (config.lr, phase.seq_len, phase.tokens_per_step) == ((3e-4,), 8192, 2**22)
        assert (config.beta2, config.eps, config.weight_decay) == (0.95, 1e-5, 0.1)
        assert (phase.warmup_steps, config.dropout) == (2000, 0.0)
        assert config.total_tokens == pytest.approx(tokens, rel=1e-6)
    assert config.vocab_size == 32_000


@pytest.mark.parametrize("recipe", choices("recipe"))
@pytest.mark.parametrize("model", VARIANTS)
def test_every_model_has_every_recipe(recipe, model):
    config = make_config(model, recipe)
    assert config.objective == ("mlm" if model.startswith("bert") else "clm")
    assert max(config.seq_len) <= variant_config(model).max_positions


@pytest.mark.parametrize("option", ADAPTER_OPTIONS)
def test_options_of_adapters_need_adapters(option):
    """Given by name; a run of before has them beside rank 0, and is read all the same."""
    message = rf"{option} 0\.5 has no meaning without adapters; give their --adapter-rank as well"
    with pytest.raises(ValueError, match=message):
        make_config("bert-tiny", **{option: 0.5})
    flag = f"--{option.replace('_', '-')}"
    for args in ([flag, "0.5"], [f"{flag}=0.5"]):
        with pytest.raises(ValueError, match=message):
            parse(["--model=bert-tiny", *args])
    assert parse(["--model=bert-tiny", "--adapter-rank=0", f"{flag}=0.5"]).adapter_step is None
    assert parse(["--model=bert-tiny", "--adapter-rank=4", f"{flag}=0.5"]).adapter_step is not None
    assert make_config("bert-base", "paper", **{option: 0.5}).adapter_rank == 0.0156


def test_dense_runs_of_before_adapters_were_a_choice_are_read():
    saved = to_json(make_config("bert-tiny", method="dense"))
    saved |= {"adapter_rank": 0.0156, "adapter_start": 0.9}
    assert from_json(saved).adapter_step is None


def test_explicit_values_win_over_the_recipe():
    config = make_config("bert-base", "paper", lr=(1e-3, 2e-3), steps=(10, 20), optimizer="adamw")
    assert [p.lr for p in config.phases] == [1e-3, 2e-3]
    assert [(p.start, p.end) for p in config.phases] == [(0, 10), (10, 30)]
    assert config.optimizer == "adamw"
    assert config.batch_size == (65536, 32768)


def test_fewer_sequence_lengths_than_the_recipe_drop_its_later_phases():
    config = make_config("bert-base", "paper", seq_len=128)
    assert len(config.phases) == 1
    assert config.phases[0].steps == 7038


def test_adapters_are_off_for_rank_zero_and_for_the_dense_control():
    assert make_config("bert-tiny", adapter_rank=0).adapter_step is None
    assert make_config("bert-tiny", method="dense").adapter_step is None


def test_adapters_join_ahead_of_the_last_step_however_short_the_run():
    assert make_config("bert-tiny", steps=2, adapter_rank=4, adapter_start=0.99).adapter_step == 1


def test_run_folder_depends_on_what_the_run_is_and_on_nothing_else():
    base = make_config("bert-tiny").default_run_dir()
    assert base.startswith("runs/bert-tiny-quickstart-slope-")
    assert make_config("bert-tiny", lr=1e-4).default_run_dir() != base
    assert make_config("bert-tiny", log_every=7, max_minutes=3.0).default_run_dir() == base
    assert {"log_every", "max_minutes", "run_dir"} <= free_fields()


def test_command_line_takes_defaults_from_recipe_and_model():
    config = parse(["--model", "gpt2-large", "--recipe=paper", "--steps", "1000"])
    assert (config.lr, config.steps) == ((1.5e-4,), (1000,))
    two = parse(["--recipe=paper", "--steps", "5", "6", "--adapter-rank", "4"])
    assert (two.steps, two.seq_len, two.adapter_rank) == ((5, 6), (128, 512), 4)
    assert isinstance(parse(["--adapter-rank", "0.05"]).adapter_rank, float)


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (["--model=bert-huge"], "gpt2-nano"),
        (["--recipe=fast"], "quickstart"),
        (["--data=web"], "text:"),
        (["--model=bert-tiny", "--seq-len=4096"], "512 positions"),
        (["--model=bert-tiny", "--adapter-rank=999"], "rank"),
        (["--model=bert-tiny", "--sparsity=4:2"], "4:2"),
    ],
)
def test_command_line_reports_bad_values_and_exits_2(args, shown, capsys, tmp_path):
    try:
        code = main([*args, f"--run-dir={tmp_path / 'run'}"])
    except SystemExit as exit_:  # found while the options are read
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert "rror" in error
    assert "Traceback" not in error
    assert shown in " ".join(error.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--method", "--optimizer", "--schedule"])
def test_command_line_lists_the_choices_of_an_option(option, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([f"{option}=nonsense"])
    assert exit_.value.code == 2
    printed = "".join(capsys.readouterr())
    assert {"--method": "dense", "--optimizer": "lamb", "--schedule": "polynomial"}[
        option
    ] in printed


def test_help_documents_every_field(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
    # One default is printed for each, and a sentence ahead of it.
    assert text.count("(default:") == len(dataclasses.fields(Config))
    assert "│  (default" not in text


@pytest.mark.parametrize("method", ["slope", "dense"])
def test_plan_says_in_its_first_lines_how_sparse_products_run(method):
    plan = make_plan(make_config("bert-tiny", method=method))
    first = str(plan).split("\n\n")[0]
    sparse = [row for row in plan.explanation.rows if row.pattern != "dense"]
    assert ("sparse products" in first) == (method == "slope")
    if method == "slope":
        count = sum(row.layers for row in sparse)
        way = f"sparse products of {count} linears: {sparse[0].implementation}, {sparse[0].reason}"
        assert way in first
