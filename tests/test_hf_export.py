"""Export to Hugging Face folders: what Transformers computes with them, and what comes back."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports import FAMILIES, SMALL, load_theirs, logits_of_ours, logits_of_theirs, made
from parity import close, randomised

from slope_jax import models
from slope_jax.models import hf_export, hf_files
from slope_jax.models.casting import cast_weights

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_the_same_with_the_adapters_merged(
    torch, transformers, tmp_path, family
):
    model, variables = made(family, 3)
    folder = models.export_hf(tmp_path / "a" / family, model, variables)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["model_type"] == family
    theirs = logits_of_theirs(torch, load_theirs(transformers, folder))
    close(logits_of_ours(model, variables), theirs)


# PEFT still asks Transformers by a name that is going away.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adds_the_adapters_that_stay_apart(torch, transformers, tmp_path, family):
    peft = pytest.importorskip("peft")
    model, variables = made(family, 3)
    folder = models.export_hf(tmp_path / family, model, variables, adapters="lora")
    theirs = load_theirs(transformers, folder)
    without = logits_of_theirs(torch, theirs)
    adapted = logits_of_theirs(torch, peft.PeftModel.from_pretrained(theirs, folder / "adapter"))
    ours = logits_of_ours(model, variables)
    close(ours, adapted)
    assert np.abs(ours - without).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_from_dense_to_compressed_and_back(torch, transformers, tmp_path, family):
    """With adapters merged the folder is dense; magnitudes choose other masks than those made."""
    dense = models.export_hf(tmp_path / "dense", *made(family, 3))
    model, variables = models.from_hf(dense, sparsity="2:4")
    folder = models.export_hf(tmp_path / "pruned", model, variables)
    theirs = logits_of_theirs(torch, load_theirs(transformers, folder))
    close(logits_of_ours(model, variables), theirs)
    before = logits_of_theirs(torch, load_theirs(transformers, dense))
    assert np.abs(theirs - before).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, family):
    model, variables = made(family, 0)
    folder = models.export_hf(tmp_path / family, model, variables)
    again, loaded = models.from_hf(folder, sparsity="2:4", dropout=model.config.dropout)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, loaded, dict(variables))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_files_and_the_kernels_make_up_the_merged_kernels(tmp_path, family):
    model, variables = made(family, 3)
    merged = models.export_hf(tmp_path / "merged", model, variables)
    apart = models.export_hf(tmp_path / "apart", model, variables, adapters="lora")
    whole, base, lora = (
        safetensors_numpy.load_file(path)
        for path in (
            merged / "model.safetensors",
            apart / "model.safetensors",
            apart / "adapter" / "adapter_model.safetensors",
        )
    )
    config = json.loads((apart / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert len(lora) == 2 * len(config["target_modules"])
    changed = {name for name in base if (base[name] != whole[name]).any()}
    assert changed == {f"{module}.weight" for module in config["target_modules"]}
    for module in config["target_modules"]:
        stem = f"base_model.model.{module}"
        added = lora[f"{stem}.lora_B.weight"] @ lora[f"{stem}.lora_A.weight"]
        added = added.T if config["fan_in_fan_out"] else added
        total = base[f"{module}.weight"] + added
        np.testing.assert_allclose(whole[f"{module}.weight"], total, rtol=1e-5, atol=1e-6)


def test_large_models_are_written_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_export, "SHARD_BYTES", 20_000)
    model, variables = made("opt", 0)
    folder = models.export_hf(tmp_path / "opt", model, variables, dtype=jnp.bfloat16)
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert len(names) > 3
    assert all((folder / name).stat().st_size < 25_000 for name in names)
    _, loaded = models.from_hf(folder, sparsity="2:4")
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), variables["params"]
    )
    jax.tree.map(np.testing.assert_array_equal, loaded["params"], rounded)


@pytest.fixture
def with_tokenizer(torch, transformers, tmp_path):
    """A folder of Transformers whose special ids are those of no family's first model."""
    import tokenizers

    words = ["sparse", "kernel", "<end>", "<pad>", "<begin>", "mask", "<stop>"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="mask")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    named = {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<pad>"}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=["<stop>"], **named
    )
    wrapped.chat_template = "{{ messages[0].content }}"
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        bos_token_id=4,
        eos_token_id=[2, 6],
        pad_token_id=3,
    )
    theirs = randomised(torch, transformers.LlamaForCausalLM(config))
    theirs.generation_config.repetition_penalty = 1.5
    theirs.save_pretrained(tmp_path / "given")
    wrapped.save_pretrained(tmp_path / "given")
    wrapped.save_pretrained(tmp_path / "alone")
    return tmp_path, made, wrapped, named


def test_a_tokenizer_goes_along_whatever_its_form(transformers, with_tokenizer):
    path, made, wrapped, named = with_tokenizer
    model, variables = models.from_hf(path / "given", sparsity="dense")
    auto, load = transformers.AutoTokenizer, transformers.AutoModelForCausalLM
    before = load.from_pretrained(path / "given")
    text = "sparse kernel <begin> unknown"
    expected = wrapped(text, return_tensors="pt")
    for name, tokenizer, special in (
        ("folder", str(path / "given"), None),
        ("alone", path / "alone", None),
        ("wrapped", wrapped, None),
        ("bare", made, named),
    ):
        options = {"tokenizer": tokenizer, "special_tokens": special}
        models.export_hf(path / "to" / name, model, variables, **options)
        found, theirs = (kind.from_pretrained(path / "to" / name) for kind in (auto, load))
        given = found(text, return_tensors="pt")
        assert given["input_ids"].tolist() == expected["input_ids"].tolist() == [[0, 1, 4, 5]]
        assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (4, 2, 3)
        ends = [2, 6] if name == "folder" else 2
        for config in (theirs.config, theirs.generation_config):
            assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (4, ends, 3)
        assert (found.chat_template is None) == (name == "bare")
        if name == "folder":
            made_by = (model.generate(**given, max_new_tokens=8) for model in (before, theirs))
            np.testing.assert_array_equal(*(tokens.numpy() for tokens in made_by))
            assert theirs.generation_config.repetition_penalty == 1.5


def test_without_a_tokenizer_no_id_is_special(transformers, tmp_path):
    """Those that Transformers takes by itself are of other vocabularies."""
    for family in FAMILIES:
        models.export_hf(tmp_path / family, *made(family, 0))
        config = transformers.AutoConfig.from_pretrained(tmp_path / family)
        assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == [None] * 3


def test_a_tokenizer_of_another_model_is_refused(with_tokenizer):
    import tokenizers

    path, tokenizer, wrapped, named = with_tokenizer
    model, variables = models.from_hf(path / "given", sparsity="dense")
    large = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 61, "b": 1}, unk_token="a"))
    (path / "damaged").mkdir()
    (path / "damaged" / "tokenizer.json").write_text("{")
    for options, message in (
        ({"tokenizer": large}, "ids up to 61, but the model vocab_size=61"),
        (
            {"tokenizer": tokenizer, "special_tokens": {"end": "<end>"}},
            "no role end; there are bos",
        ),
        ({"tokenizer": tokenizer, "special_tokens": {"eos_token": "</s>"}}, "no token '</s>'"),
        ({"tokenizer": wrapped, "special_tokens": named}, "others name theirs"),
        ({"special_tokens": named}, "others name theirs"),
        ({"tokenizer": path}, "not a folder with one of tokenizer.json"),
        ({"tokenizer": path / "damaged"}, "cannot be read"),
        ({"tokenizer": 3}, "tokenizer is a int; give"),
        (
            {"dtype": "int8"},
            "dtype='int8': weights are not written in that; choose float32, bfloat16, float16",
        ),
        ({"dtype": "floaty"}, "dtype='floaty': weights are not written"),
        ({"adapters": "lora"}, "has none to write apart; export it with adapters='merge'"),
    ):
        with pytest.raises(ValueError, match=message):
            models.export_hf(path / "new", model, variables, **options)
    assert sorted(p.name for p in path.iterdir()) == ["alone", "damaged", "given"]


def test_variables_of_another_model_are_refused(tmp_path):
    """Before anything is written, with what differs; layers may be stacked or single."""
    model, variables = made("opt", 0)
    shorter = models.build("opt-nano", **SMALL | {"max_positions": 16})
    named = r"params/embeddings/position/embedding: \(26, 32\) here, \(18, 32\) in the model$"
    with pytest.raises(
        ValueError, match=f"those of this OPT; give its own. In shape differ {named}"
    ):
        models.export_hf(tmp_path / "new", shorter, variables)
    for others, message in (
        (made("gpt2", 0)[1], r"position/embedding: \(24, 32\) here, \(26, 32\) in"),
        (made("llama", 0)[1], "mlp/gate_up/kernel: .* here, none in the model"),
        (variables | {"params": {"norm": variables["params"]["norm"]}}, r"and \d+ more"),
        (variables | {"masks": {"layers_0": {}}}, "masks/layers_1/.*: none here"),
        (made("opt", 3)[1], r"what this OPT has not, .*/adapter_l, .* or leave them out"),
    ):
        with pytest.raises(ValueError, match=message):
            models.export_hf(tmp_path / "new", model, others)
    wider = models.build("opt-nano", **SMALL | {"hidden_size": 64})
    with pytest.raises(ValueError, match="not those of this OPT"):
        models.export_semi_structured(tmp_path / "new", wider, variables)
    models.export_hf(tmp_path / "single", model, models.unstack_layers(variables))
    assert [p.name for p in tmp_path.iterdir()] == ["single"]


def test_tensors_have_the_dtype_that_config_json_names(transformers, tmp_path):
    """That of a model in bfloat16 whose norms are in float32 is the wider one: no digit is lost."""
    model, variables = made("llama", 3)
    mixed = variables | {"params": cast_weights(variables["params"], jnp.bfloat16)}
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), variables["params"]
    )
    for name, params, dtype, expected in (
        ("mixed", mixed["params"], None, "F32"),
        ("half", rounded, "bfloat16", "BF16"),
        ("whole", jax.tree.map(lambda x: x.astype(jnp.bfloat16), rounded), None, "BF16"),
    ):
        folder = models.export_hf(
            tmp_path / name, model, variables | {"params": params}, adapters="lora", dtype=dtype
        )
        for file in folder.rglob("*.safetensors"):
            tensors = hf_files.open_files(file.parent, [file.name])
            assert {tensor.dtype for _, tensor in tensors} == {expected}
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert str(theirs.dtype) == {"F32": "torch.float32", "BF16": "torch.bfloat16"}[expected]
    _, read = models.from_hf(tmp_path / "mixed")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), read["params"], mixed["params"])


def test_files_have_the_permissions_of_new_ones(tmp_path):
    model, variables = made("gpt2", 3)
    before = os.umask(0o027)
    try:
        folder = models.export_hf(tmp_path / "new", model, variables, adapters="lora")
    finally:
        os.umask(before)
    modes = [file.stat().st_mode & 0o777 for file in folder.rglob("*.safetensors")]
    assert modes == [0o640, 0o640]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    model, variables = made("opt", 0)
    with pytest.raises(ValueError, match="'merge' or 'lora'"):
        models.export_hf(tmp_path / "new", model, variables, adapters="both")
    models.export_hf(tmp_path / "old", model, variables)
    with pytest.raises(ValueError, match="exists already"):
        models.export_hf(tmp_path / "old", model, variables)
    monkeypatch.setattr(hf_export, "config_json", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.export_hf(tmp_path / "new", model, variables)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
