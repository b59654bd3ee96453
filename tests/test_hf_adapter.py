"""Adapters beside a folder's weights: those that we wrote and those of PEFT, read as PEFT computes."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports import FAMILIES, IDS, SMALL, load_theirs, logits_of_ours, logits_of_theirs, made
from parity import close, same_form

from slope_jax import models

# PEFT still asks Transformers by a name that is going away.
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def peft(transformers):
    return pytest.importorskip("peft")


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, family):
    model, variables = made(family, 3)
    folder = models.export_hf(tmp_path / family, model, variables, adapters="lora")
    again, loaded = models.from_hf(folder, sparsity="2:4", dropout=model.config.dropout)
    assert again.config == model.config
    same_form(again, loaded)
    equal(loaded, dict(variables))
    equal(models.load_hf(folder, model), dict(variables))


def changed(folder, **fields):
    raw = json.loads((folder / "adapter" / CONFIG).read_text()) | fields
    (folder / "adapter" / CONFIG).write_text(json.dumps(raw))


@pytest.mark.parametrize("fields", [{"lora_alpha": 7}, {"lora_alpha": 2.5, "use_rslora": True}])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_scale_is_that_of_peft(torch, transformers, peft, tmp_path, family, fields):
    model, variables = made(family, 3)
    folder = models.export_hf(tmp_path / family, model, variables, adapters="lora")
    changed(folder, **fields)
    base = load_theirs(transformers, folder)
    theirs = logits_of_theirs(torch, peft.PeftModel.from_pretrained(base, folder / "adapter"))
    again = logits_of_ours(*models.from_hf(folder))
    close(again, theirs)
    assert np.abs(again - logits_of_ours(model, variables)).max() > 0.1


def test_adapters_that_peft_made_for_some_of_the_linears(torch, transformers, peft, tmp_path):
    """The others have none, which is one that adds nothing, but can be trained."""
    folder = models.export_hf(tmp_path / "llama", *made("llama", 0))
    base = load_theirs(transformers, folder)
    wanted = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["down_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(base, wanted)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(folder / "adapter")
    model, variables = models.from_hf(folder)
    assert model.config.rank == 4
    same_form(model, variables)
    expected = logits_of_theirs(torch, theirs.eval())
    close(logits_of_ours(model, variables), expected)

    def output(params):
        return model.apply(variables | {"params": params}, jnp.asarray(IDS))[..., :61].var()

    gradients = jax.jit(jax.grad(output))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        if path[-1].key == "adapter_r":
            assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    equal(models.from_hf(folder)[1], variables)
    again = models.export_hf(tmp_path / "again", model, variables, adapters="lora")
    reread, loaded = models.from_hf(again)
    assert reread.config == model.config
    equal(loaded, variables)
    base = peft.PeftModel.from_pretrained(load_theirs(transformers, again), again / "adapter")
    close(logits_of_theirs(torch, base.eval()), expected)


@pytest.mark.parametrize(
    ("targets", "rank"),
    [(["q_proj", "v_proj"], 8), ("all-linear", 12), (["up_proj", "o_proj"], 4)],
)
def test_adapters_of_parts_of_a_linear_of_ours(torch, transformers, peft, tmp_path, targets, rank):
    """Each by itself, as PEFT makes them: with a lora_A of its own, or for queries and values alone."""
    sparsity = {"sparsity": "layers/.*=2:4; .*=dense"}
    whole = models.export_hf(tmp_path / "whole", *made("llama", 0))
    folder = models.export_hf(tmp_path / "pruned", *models.from_hf(whole, **sparsity))
    wanted = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(load_theirs(transformers, folder), wanted)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(theirs.named_parameters()):
            if "lora" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    theirs.save_pretrained(folder / "adapter")
    model, variables = models.from_hf(folder, **sparsity)
    assert model.config.rank == rank
    same_form(model, variables)
    expected = logits_of_theirs(torch, theirs.eval())
    close(logits_of_ours(model, variables), expected)
    assert np.abs(logits_of_ours(*models.from_hf(whole, **sparsity)) - expected).max() > 0.1
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if path[-1].key == "adapter_l":  # or no gradient would reach its half of adapter_r
            assert np.abs(leaf).max(axis=-2).min() > 0, jax.tree_util.keystr(path)
    again = models.export_hf(tmp_path / "again", model, variables, adapters="lora")
    base = peft.PeftModel.from_pretrained(load_theirs(transformers, again), again / "adapter")
    close(logits_of_theirs(torch, base.eval()), expected)
    equal(models.from_hf(again, **sparsity)[1], variables)


def test_parts_that_are_too_many_together_are_named(torch, transformers, peft, tmp_path):
    sparsity = {"sparsity": "layers/.*=2:4; .*=dense"}
    whole = models.export_hf(tmp_path / "whole", *made("llama", 0))
    theirs = load_theirs(transformers, whole)
    wanted = peft.LoraConfig(r=24, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(theirs, wanted).save_pretrained(whole / "adapter")
    message = r"adapter has adapters of rank 24, 72 columns .* the smallest one can use 32: merge"
    with pytest.raises(ValueError, match=message):
        models.from_hf(whole, **sparsity)


def test_newborn_adapters_are_of_the_size_that_the_model_says(folder):
    """As `add_adapters` makes them, and each its own."""
    with_tensors(lambda t: [t.pop(n) for n in list(t) if "down_proj" not in n])(folder)
    for scale in (1.0, 3.0):
        _, variables = models.from_hf(folder, adapter_scale=scale)
        rows = [
            row.tobytes()
            for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
            if path[-1].key == "adapter_l" and path[-2].key != "down"
            for row in np.asarray(leaf).reshape(-1, 32, 3)
        ]
        spread = np.frombuffer(b"".join(rows), np.float32).std() * 3 / scale
        assert 0.9 < spread < 1.1
        assert len(set(rows)) == len(rows) > 4


def test_ways_to_be_born_that_leave_the_weights_alone_are_read(folder):
    expected = models.from_hf(folder)[1]
    for born in (None, True, False, "gaussian", "Orthogonal", "EVA", "mica"):
        changed(folder, init_lora_weights=born)
        equal(models.from_hf(folder)[1], expected)


def test_automatic_classes_of_peft_find_the_model_from_anywhere(
    torch, transformers, peft, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    for family, auto in (
        ("gpt2", peft.AutoPeftModelForCausalLM),
        ("mistral", peft.AutoPeftModelForCausalLM),
        ("bert", peft.AutoPeftModel),
    ):
        model, variables = made(family, 3)
        models.export_hf(family, model, variables, adapters="lora")  # a relative path
        os.chdir(tmp_path / "elsewhere")
        theirs = auto.from_pretrained(tmp_path / family / "adapter").eval()
        os.chdir(tmp_path)
        close(logits_of_ours(model, variables), logits_of_theirs(torch, theirs))


@pytest.fixture
def folder(tmp_path):
    return models.export_hf(tmp_path / "llama", *made("llama", 3), adapters="lora")


def with_tensors(change):
    def apply(folder):
        file = folder / "adapter" / TENSORS
        tensors = safetensors_numpy.load_file(file)
        change(tensors)
        safetensors_numpy.save_file(tensors, file)

    return apply


STEM = "base_model.model.model.layers.1."
UP_A = f"{STEM}mlp.up_proj.lora_A.weight"
DOWN_B = f"{STEM}mlp.down_proj.lora_B.weight"


def nan(tensors):
    tensors[DOWN_B][3, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: changed(f, peft_type="IA3"), "peft_type='IA3'; our adapters are LoRA of one"),
        (lambda f: changed(f, use_dora=True, bias="all"), "bias='all', use_dora=True; our"),
        (lambda f: changed(f, rank_pattern={"o_proj": 2}), r"rank_pattern={'o_proj': 2}; our"),
        (lambda f: changed(f, modules_to_save=["lm_head"]), r"modules_to_save=\['lm_head'\]"),
        *(
            (
                lambda f, b=born: changed(f, init_lora_weights=b),
                f"init_lora_weights='{born}'; our .*merge",
            )
            for born in ("pissa", "PiSSA_niter_4", "olora", "corda", "loftq", "lora_ga", "new")
        ),
        (lambda f: changed(f, init_lora_weights=[1]), r"init_lora_weights=\[1\]; our"),
        (
            lambda f: changed(f, use_rslora="false"),
            "use_rslora='false' must be true or false; copy",
        ),
        (
            with_tensors(
                lambda t: t.update({UP_A.replace("model.model.model.", "model.model."): t[UP_A]})
            ),
            r"holds base_model.model.layers.1.mlp.up_proj.lora_A.weight and"
            r" base_model.model.model.layers.1.mlp.up_proj.lora_A.weight, which name the same",
        ),
        (lambda f: changed(f, r=0, lora_alpha="6"), "r=0 must be .*, lora_alpha='6' must be a num"),
        (lambda f: changed(f, r=4, lora_alpha=4), r"lora_A.weight is F32\[3, 32\], not \[4, 32\]"),
        (with_tensors(lambda t: t.pop(UP_A)), "layers.1.mlp.up_proj.lora_A.weight is missing"),
        (with_tensors(lambda t: t.pop(DOWN_B)), "layers.1.mlp.down_proj.lora_B.weight is missing"),
        (
            with_tensors(lambda t: t.update({"base_model.model.score.weight": t[UP_A]})),
            "holds base_model.model.score.weight; ours are adapters of linear layers alone",
        ),
        (
            with_tensors(lambda t: t.update({f"{STEM}mlp.fc3.lora_A.weight": t[UP_A]})),
            "has adapters of layers.1.mlp.fc3.lora_A.weight, which are no linear layers of our",
        ),
        (with_tensors(lambda t: t.clear()), "adapter_model.safetensors holds no tensors; take the"),
        (with_tensors(nan), "NaN or infinity in adapter/layers.1.mlp.down_proj.weight; copy"),
        (lambda f: (f / "adapter" / CONFIG).unlink(), "adapter_config.json is missing"),
        (lambda f: (f / "adapter" / TENSORS).unlink(), "adapter_model.safetensors is missing"),
        (lambda f: (f / "adapter" / TENSORS).write_bytes(b"x"), "damaged or cut off: adapter_mo"),
        (
            lambda f: shutil.copy(f / "adapter" / CONFIG, f),
            "move adapter_config.json and adapter_m",
        ),
    ],
)
def test_what_is_refused(folder, change, message):
    change(folder)
    with pytest.raises(ValueError, match=message):
        models.from_hf(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "dense"}, "sparsity '.*dense' leaves dense, .* merge them in PEFT"),
        (
            {"sparsity": r"layers/0/.*=dense; layers/.*=2:4; .*=dense"},
            "of layers.0.attention.output",
        ),
        ({"adapter_rank": 2}, "adapter_rank=2: .*adapter holds adapters of rank 3; build"),
        ({"adapter_rank": 0}, "adapter_rank=0: .*adapter holds adapters of rank 3; build"),
        ({"calibration": [jnp.zeros((1, 4), int)]}, "take that folder out, or leave out calib"),
    ],
)
def test_options_that_do_not_go_with_adapters(folder, options, message):
    with pytest.raises(ValueError, match=message):
        models.from_hf(folder, **options)
    shutil.rmtree(folder / "adapter")
    assert models.from_hf(folder)[0].config.rank == 0


def test_a_pruned_head_has_no_adapter_of_padding(torch, transformers, peft, tmp_path):
    fields = SMALL | {"sparsity": ".*=2:4", "num_kv_heads": 2, "adapter_rank": 3}
    model = models.build("llama-nano", **fields)
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    params = jax.tree.map(lambda leaf: 5 * leaf + 0.1, variables["params"])
    variables = variables | {"params": params}
    folder = models.export_hf(tmp_path / "llama", model, variables, adapters="lora")
    base = load_theirs(transformers, folder)
    theirs = logits_of_theirs(torch, peft.PeftModel.from_pretrained(base, folder / "adapter"))
    close(logits_of_ours(model, variables), theirs)
    again, loaded = models.from_hf(folder, sparsity=".*=2:4")
    same_form(again, loaded)
    close(logits_of_ours(again, loaded), theirs)
