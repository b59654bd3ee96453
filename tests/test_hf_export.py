"""Export to Hugging Face folders: what Transformers computes with them, and what comes back."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import close, randomised

from slope_jax import models
from slope_jax.models import hf_export

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "mlp_size": 64,
    "max_positions": 24,
    "sparsity": "2:4",
}
SCALED = models.RopeScaling(8.0, 1.0, 4.0, 16)
FAMILIES = {
    "bert": ("bert-tiny", {}),
    "gpt2": ("gpt2-nano", {}),
    "opt": ("opt-nano", {}),
    "llama": ("llama-nano", {"num_kv_heads": 2, "rope_scaling": SCALED}),
    "mistral": ("llama-nano", {"num_kv_heads": 2, "window": 5}),
}
IDS = np.random.default_rng(0).integers(0, 61, (3, 20)).astype(np.int32)


@functools.cache
def made(family, rank):
    """A model whose every parameter is random, as zeros and ones would hide a wrong name."""
    name, fields = FAMILIES[family]
    model = models.build(name, **SMALL, **fields, adapter_rank=rank)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    rng = np.random.default_rng(1)
    pairs = np.array([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], np.uint8)  # 2 of 4

    def metadata(leaf):
        low, high = rng.choice(pairs, (2, *leaf.shape))
        return jnp.asarray(low | high << 4)

    def parameter(path, leaf):
        noise = 0.2 * rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(noise + np.float32(path[-1].key == "scale"))

    masks = jax.tree.map(metadata, shapes["masks"])
    params = jax.tree_util.tree_map_with_path(parameter, shapes["params"])
    table = params["embeddings"]["token"]
    table["embedding"] = table["embedding"].at[61:].set(0)
    if "lm_head" in params:
        params["lm_head"]["kernel"] = params["lm_head"]["kernel"].at[:, 61:].set(0)
    if "mlm" in params:
        params["mlm"]["bias"] = params["mlm"]["bias"].at[61:].set(0)
    return model, {"params": params, "masks": masks}


def logits_of_ours(model, variables):
    found = jax.jit(model.apply)(variables, jnp.asarray(IDS))
    return np.asarray(getattr(found, "mlm_logits", found))[..., :61]


def load_theirs(transformers, folder):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits_of_theirs(torch, model):
    with torch.no_grad():
        output = model(input_ids=torch.tensor(IDS))
    return getattr(output, "logits", getattr(output, "prediction_logits", None)).numpy()


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
    ):
        with pytest.raises(ValueError, match=message):
            models.export_hf(path / "new", model, variables, **options)
    with pytest.raises(ValueError, match=f"hold no .*; give those of this {type(model).__name__}"):
        models.export_hf(path / "new", model, {"params": {}})
    assert sorted(p.name for p in path.iterdir()) == ["alone", "damaged", "given"]


def test_a_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    model, variables = made("opt", 0)
    with pytest.raises(ValueError, match="'merge' or 'lora'"):
        models.export_hf(tmp_path / "new", model, variables, adapters="both")
    models.export_hf(tmp_path / "old", model, variables)
    with pytest.raises(ValueError, match="exists already"):
        models.export_hf(tmp_path / "old", model, variables)
    monkeypatch.setattr(hf_export, "config_json", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        models.export_hf(tmp_path / "new", model, variables)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
