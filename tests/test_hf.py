"""Import from Hugging Face folders, against Transformers' own PyTorch models."""

import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import close, logits, pruned_in_place, randomised, same_form

from slope_jax import models
from slope_jax.models import hf_names

pytestmark = pytest.mark.usefixtures("strict_dtypes")
safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

BERT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 24,
}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24}
RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 61, (3, 20)).astype(np.int32)
TYPES = RNG.integers(0, 2, (3, 20)).astype(np.int32)
LENGTHS = np.array([20, 13, 1], np.int32)
VALID = np.arange(20)[None, :] < LENGTHS[:, None]


@pytest.fixture(scope="module")
def bert(torch, transformers, tmp_path_factory):
    config = transformers.BertConfig(**BERT)
    model = randomised(torch, transformers.BertForPreTraining(config))
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder, safe_serialization=True)
    return model, folder


@pytest.fixture(scope="module")
def gpt2(torch, transformers, tmp_path_factory):
    config = transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)
    model = randomised(torch, transformers.GPT2LMHeadModel(config))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder, safe_serialization=True)
    return model, folder


def run_bert(torch, model):
    """Their MLM logits, NSP logits, last hidden state."""
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(IDS),
            token_type_ids=torch.tensor(TYPES),
            attention_mask=torch.tensor(VALID),
            output_hidden_states=True,
        )
    result = (out.prediction_logits, out.seq_relationship_logits, out.hidden_states[-1])
    return [x.numpy() for x in result]


def assert_bert_agrees(torch, theirs, model, variables):
    mlm, nsp, hidden = run_bert(torch, theirs)
    ours = jax.jit(model.apply)(variables, IDS, TYPES, LENGTHS)
    close(ours.mlm_logits[..., :61][VALID], mlm[VALID])
    close(ours.nsp_logits, nsp)
    close(ours.hidden[VALID], hidden[VALID])


def test_bert_logits(torch, bert):
    theirs, folder = bert
    model, variables = models.from_hf(folder, sparsity="dense")
    assert model.config.num_layers == 3
    assert model.config.mlp_size == 64
    same_form(model, variables)
    assert_bert_agrees(torch, theirs, model, variables)
    assert (variables["params"]["embeddings"]["token"]["embedding"][61:] == 0).all()


def test_gpt2_logits(torch, gpt2):
    theirs, folder = gpt2
    model, variables = models.from_hf(folder, sparsity="dense")
    assert model.config.mlp_size == 128
    same_form(model, variables)
    ours = jax.jit(model.apply)(variables, IDS)
    close(ours[..., :61], logits(torch, theirs, IDS))


def test_defaults_are_those_of_transformers(transformers):
    """Sizes, epsilons and dropout of bert-base and gpt2-small, against Transformers' defaults."""
    for name, theirs in (
        ("bert-base", transformers.BertConfig()),
        ("gpt2-small", transformers.GPT2Config()),
    ):
        raw, family = theirs.to_dict(), theirs.model_type
        expected = hf_names.read_config(raw, family, pathlib.Path("config.json")) | {
            "dropout": hf_names.dropout(raw, family)
        }
        config = models.build(name).config
        assert {field: getattr(config, field) for field in expected} == expected


def test_bert_compressed_by_magnitude(torch, transformers, bert, tmp_path):
    folder = bert[1]
    theirs = transformers.BertForPreTraining.from_pretrained(folder).eval()

    def pattern(name):
        in_layer = "encoder.layer" in name and name.endswith("weight") and "Norm" not in name
        if not in_layer or "layer.0.attention.self" in name:
            return None
        return (2, 8) if "layer.2" in name else (2, 4)

    pruned_in_place(torch, theirs, pattern, axis=1)
    policy = "layers/0/attention/qkv=dense; layers/2/.*=2:8; layers/.*=2:4; .*=dense"
    model, variables = models.from_hf(folder, sparsity=policy, mask_init="random")
    same_form(model, variables)
    assert_bert_agrees(torch, theirs, model, variables)


def test_gpt2_compressed_by_magnitude(torch, transformers, gpt2):
    folder = gpt2[1]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()

    def pattern(name):
        in_layer = ".h." in name and name.endswith("weight") and ".ln_" not in name
        return (2, 4) if in_layer and "h.0.attn.c_attn" not in name else None

    pruned_in_place(torch, theirs, pattern, axis=0)  # Conv1D: (in, out)
    model, variables = models.from_hf(folder, sparsity="2:4")
    same_form(model, variables)
    ours = jax.jit(model.apply)(variables, IDS)
    close(ours[..., :61], logits(torch, theirs, IDS))


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_shards(transformers, bert, tmp_path):
    theirs, folder = bert
    theirs.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    equal(models.from_hf(tmp_path)[1], models.from_hf(folder)[1])
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    remedy = "index.json names all shards of the model: copy or download the missing again"
    with pytest.raises(ValueError, match=f"{lost.name} is missing; the folder holds .*{remedy}"):
        models.from_hf(tmp_path)


@pytest.mark.parametrize("left", ["index", "single"])
def test_a_folder_that_was_saved_again_is_read_as_transformers_reads_it(
    torch, transformers, bert, tmp_path, left
):
    """In one file beside the index of its shards, or in shards beside the file that it was in."""
    theirs, _ = bert
    sizes = ["20KB", "1GB"] if left == "index" else ["1GB", "20KB"]
    for factor, size in zip((1.0, 0.5), sizes, strict=True):
        changed = type(theirs)(theirs.config)
        changed.load_state_dict({k: factor * v for k, v in theirs.state_dict().items()})
        changed.save_pretrained(tmp_path, safe_serialization=True, max_shard_size=size)
    assert len(list(tmp_path.glob("model.safetensors*"))) == 2
    read = type(theirs).from_pretrained(tmp_path).eval()
    with pytest.warns(UserWarning, match=r"holds model.safetensors and .*index.json: the first is"):
        model, variables = models.from_hf(tmp_path, sparsity="dense")
    assert_bert_agrees(torch, read, model, variables)


# Folders written by hand need neither torch nor transformers.


def gpt2_tensors(prefix="transformer."):
    rng = np.random.default_rng(1)
    h = GPT2["n_embd"]
    shapes = {"wte.weight": (61, h), "wpe.weight": (24, h), "ln_f.weight": (h,), "ln_f.bias": (h,)}
    for i in range(GPT2["n_layer"]):
        sizes = {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h)}
        sizes |= {"mlp.c_fc": (h, 4 * h), "mlp.c_proj": (4 * h, h)}
        for name, shape in sizes.items():
            shapes |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (h,), f"h.{i}.{name}.bias": (h,)}
    return {prefix + k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    safetensors_numpy.save_file(tensors, folder / "model.safetensors")
    raw = {"model_type": "gpt2", **GPT2, **config}
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", gpt2_tensors())


def test_other_spellings_of_the_same_weights(folder, tmp_path):
    """No prefix, buffers, the tied table stored twice."""
    tensors = gpt2_tensors(prefix="")
    tensors["lm_head.weight"] = tensors["wte.weight"].copy()
    tensors["h.0.attn.bias"] = np.tri(24, dtype=np.uint8)
    tensors["h.1.attn.masked_bias"] = np.float32(-1e4).reshape(1)
    other = write(tmp_path / "other", tensors)
    equal(models.from_hf(other)[1], models.from_hf(folder)[1])
    tensors["lm_head.weight"][5, 5] += 1
    with pytest.raises(ValueError, match=r"lm_head.weight differs from wte.weight"):
        models.from_hf(write(tmp_path / "other", tensors))


def test_a_bert_without_the_heads_that_fill_mask_does_without(torch, transformers, tmp_path):
    """BertForMaskedLM has no pooler and no NSP head: zeros here. One part of a head is not enough."""
    theirs = randomised(torch, transformers.BertForMaskedLM(transformers.BertConfig(**BERT)))
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    model, variables = models.from_hf(tmp_path, sparsity="dense")
    same_form(model, variables)
    ours = jax.jit(model.apply)(variables, IDS)
    close(ours.mlm_logits[..., :61], logits(torch, theirs, IDS))
    assert not any(x.any() for x in (ours.pooled, ours.nsp_logits))
    again = models.export_hf(tmp_path / "again", model, variables)
    equal(models.from_hf(again, sparsity="dense")[1], variables)

    tensors = safetensors_numpy.load_file(tmp_path / "model.safetensors")
    for name, shape, message in (
        ("bert.pooler.dense.weight", (32, 32), r"missing: bert.pooler.dense.bias; surplus: none\."),
        (
            "cls.seq_relationship.bias",
            (2,),
            "missing: cls.seq_relationship.weight, bert.pooler.dense.b",
        ),
    ):
        partial = tensors | {name: np.zeros(shape, np.float32)}
        safetensors_numpy.save_file(partial, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            models.from_hf(tmp_path)


def test_weights_that_are_not_finite_are_named(tmp_path):
    tensors = gpt2_tensors()
    tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = np.nan
    tensors["transformer.h.2.mlp.c_fc.weight"][0, 0] = np.inf
    tensors["transformer.ln_f.bias"][7] = -np.inf
    folder = write(tmp_path / "m", tensors)
    named = r"infinity in transformer.h.{1\.\.2}.mlp.c_fc.weight, transformer.ln_f.bias; copy"
    for sparsity in ("dense", "2:4"):
        with pytest.raises(ValueError, match=named):
            models.from_hf(folder, sparsity=sparsity)
    with pytest.raises(ValueError, match=named):
        models.from_hf(folder, sparsity="2:4", calibration=[IDS])
    tied = tensors | {"lm_head.weight": tensors["transformer.wte.weight"]}
    tied["transformer.wte.weight"][0, 0] = np.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in .*transformer.wte.weight"):
        models.from_hf(write(tmp_path / "m", tied))


def test_old_names_of_bert_norms(bert, tmp_path):
    """Files of the first BERTs say gamma and beta, and hold position_ids."""
    folder = bert[1]
    shutil.copy(folder / "config.json", tmp_path)
    tensors = safetensors_numpy.load_file(folder / "model.safetensors")
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in tensors.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(24)[None, :]
    old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    assert old.keys() != tensors.keys()
    safetensors_numpy.save_file(old, tmp_path / "model.safetensors")
    equal(models.from_hf(tmp_path)[1], models.from_hf(folder)[1])


def test_half_precision_weights(tmp_path):
    import ml_dtypes

    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in gpt2_tensors().items()}
    rounded = {k: v.astype(np.float32) for k, v in half.items()}
    a = models.from_hf(write(tmp_path / "half", half))[1]
    b = models.from_hf(write(tmp_path / "single", rounded))[1]
    assert a["params"]["layers_0"]["mlp"]["up"]["kernel"].dtype == jnp.float32
    equal(a, b)
    stored = models.from_hf(tmp_path / "half", param_dtype="bfloat16")[1]
    assert stored["params"]["layers_0"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16


def test_dropout_of_the_folder(tmp_path):
    model, _ = models.from_hf(write(tmp_path / "m", gpt2_tensors(), resid_pdrop=0.25))
    assert model.config.dropout == 0.25
    assert models.from_hf(tmp_path / "m", dropout=0.0)[0].config.dropout == 0.0


def test_the_models_configuration_must_agree(folder):
    sizes = {"hidden_size": 32, "num_heads": 4, "vocab_size": 61, "max_positions": 24}
    model = models.build("gpt2-nano", num_layers=3, mlp_size=128, **sizes)
    same_form(model, models.load_hf(folder, model))
    model = models.build("gpt2-nano", num_layers=2, mlp_size=64, **sizes)
    with pytest.raises(
        ValueError, match=r"num_layers: folder 3, model 2; mlp_size: folder 128, model 64\."
    ):
        models.load_hf(folder, model)
    with pytest.raises(ValueError, match=r"model_type is 'gpt2', but the model is a bert"):
        models.load_hf(folder, models.build("bert-tiny"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, r"activation_function='relu' \(ours: 'gelu_new'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"model_type": "t5"}, "model_type 't5'; choose"),
        ({"model_type": ["gpt2"]}, r"model_type \['gpt2'\]; choose"),
        ({"n_layer": 9999}, r"tensors missing: transformer.h.{3\.\.9998}.attn.c_attn.bias"),
        ({"n_head": 5}, r"n_embd=32 is not a multiple of n_head=5; choose .* Correct it, or copy"),
        ({"n_layer": 0}, "n_layer=0 must be a positive integer"),
        ({"resid_pdrop": 1.5}, "resid_pdrop=1.5 must be a probability"),
    ],
)
def test_variations_that_we_do_not_have(folder, change, message):
    raw = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(folder))}[/:].*{message}"):
        models.from_hf(folder)


def test_what_is_asked_for_is_told_in_our_names(folder):
    """Where the file is right by itself."""
    with pytest.raises(ValueError, match=r"^hidden_size=32 is not a multiple of num_heads=5"):
        models.from_hf(folder, num_heads=5)


def test_a_field_that_there_is_not_is_named_with_its_like(folder):
    with pytest.raises(ValueError, match=r"no field 'sparcity' \(did you mean 'sparsity'\?\)"):
        models.from_hf(folder, sparcity="2:4")


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_missing_and_surplus_tensors_are_listed_as_the_file_spells_them(tmp_path, prefix):
    tensors = gpt2_tensors(prefix=prefix)
    del tensors[f"{prefix}h.1.attn.c_attn.bias"]
    tensors[f"{prefix}score.weight"] = np.zeros((2, 32), np.float32)
    named = rf"missing: {prefix}h.1.attn.c_attn.bias; surplus: {prefix}score.weight\. The folder"
    with pytest.raises(ValueError, match=named):
        models.from_hf(write(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    "wrong", [np.zeros((96, 32), np.float32), np.zeros((32, 96), np.int8)], ids=["shape", "dtype"]
)
def test_tensor_of_another_shape_or_dtype(tmp_path, wrong):
    tensors = gpt2_tensors() | {"transformer.h.0.attn.c_attn.weight": wrong}
    with pytest.raises(
        ValueError,
        match=r"transformer.h.0.attn.c_attn.weight: .* for layers_0/attention/qkv/kernel \[32, 96\]",
    ):
        models.from_hf(write(tmp_path / "m", tensors))


def test_adapters_join_later(folder):
    with pytest.raises(ValueError, match=r"adapter_rank=0, then add them"):
        models.from_hf(folder, adapter_rank=4)


def cut(name, keep):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:keep])

    return damage


def put(name, content):
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def index(folder, weight_map):
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def shards_cut_off(folder):
    names = [f"model-{i}.safetensors" for i in range(3)]
    tensors = list(gpt2_tensors().items())
    for i, name in enumerate(names):
        safetensors_numpy.save_file(dict(tensors[i::3]), folder / name)
    index(folder, {key: names[i % 3] for i, (key, _) in enumerate(tensors)})
    for name in names[1:]:
        cut(name, -8)(folder)


def shards_missing(folder):
    index(folder, {"wte.weight": "b.safetensors", "wpe.weight": "a.safetensors"})


def index_names_too_much(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index(folder, dict.fromkeys([*gpt2_tensors(), "ghost"], "a.safetensors"))


def index_is_empty(folder):
    index(folder, {})


def for_pytorch(folder):
    (folder / "model.safetensors").rename(folder / "semi_structured.safetensors")


def bert_under_the_name_of_gpt2(folder):
    write(folder, {"bert.pooler.dense.bias": np.zeros(32, np.float32)})


def stored_twice(folder):
    write(folder, gpt2_tensors() | {"ln_f.bias": np.zeros(32, np.float32)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("model.safetensors", -100), r"cut off: model.safetensors \(.*\); copy or download"),
        (cut("model.safetensors", 5), r"cut off: model.safetensors"),
        (cut("model.safetensors", 0), r"cut off: model.safetensors"),
        (put("model.safetensors", "not safetensors" * 20), r"cut off: model.safetensors"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            r"model.safetensors is missing; .*pytorch_model.bin.*save_pretrained",
        ),
        (shards_cut_off, r"cut off: model-1.safetensors \(.*\), model-2.safetensors \(.*copy or"),
        (shards_missing, r"a.safetensors, b.safetensors are missing; the folder holds config.json"),
        (
            lambda folder: index(folder, {"wte.weight": "../model.safetensors"}),
            r"index.json names files that are not in the folder: \.\./model.safetensors",
        ),
        (index_names_too_much, "names tensors that no shard holds: ghost"),
        (index_is_empty, "has no 'weight_map'"),
        (for_pytorch, r"2:4 tensors for PyTorch, .* Give what they were exported from, or export"),
        (
            stored_twice,
            r"more than once: (transformer.)?ln_f.bias and (transformer.)?ln_f.bias; save",
        ),
        (
            bert_under_the_name_of_gpt2,
            r"missing: transformer.h.{0\.\.\d}.attn.c_attn.bias, [^;]*, transformer.wte.weight;"
            r" surplus: bert.pooler.dense.bias\.",
        ),
        (cut("config.json", -5), r"config.json is not valid JSON"),
        (put("config.json", "[]"), r"config.json holds a list, not an object; copy"),
        (
            put("config.json", "{}"),
            "model_type None; choose a folder of bert, gpt2, opt, llama, mistral$",
        ),
        (lambda folder: (folder / "config.json").unlink(), r"config.json is missing"),
        (shutil.rmtree, "is not a folder"),
    ],
)
def test_bad_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        models.from_hf(folder)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {"n_layer": "3", "resid_pdrop": None}, "n_layer='3', resid_pdrop=None must be"),
        ("gpt2", {"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon=inf must be numbers"),
        ("gpt2", {"n_embd": 10**30}, "n_embd=10{30} must be numbers, .* none above 2147483647"),
        ("gpt2", {"n_layer": 10**6}, "n_layer=1000000 must be .* layers at most 10000"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads=0 must be positive"),
        ("bert", {"type_vocab_size": 2.0}, "type_vocab_size=2.0 must be numbers, counts whole"),
        ("opt", {"word_embed_proj_dim": [32]}, r"word_embed_proj_dim=\[32\] must be"),
        ("llama", {"rope_scaling": "llama3", "head_dim": True}, "head_dim=True, rope_scaling='ll"),
        ("llama", {"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta='1e4' must be numbers"),
    ],
)
def test_numbers_of_the_configuration(family, change, message):
    with pytest.raises(ValueError, match=f"^folder/config.json: .*{message}"):
        hf_names.read_config(change, family, pathlib.Path("folder/config.json"))
