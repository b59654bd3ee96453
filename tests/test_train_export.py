"""Runs as Hugging Face folders: what Transformers reads, writes and finds in their text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jobs import save_run

from slope_jax.fill import fill_masks
from slope_jax.generate import generate
from train import serving
from train.export import export_run, main
from train.texts import masked_ids

pytest.importorskip("safetensors", reason="safetensors is not installed")

TEXTS = ["Sparse kernel", "Mask values, dense", "a\n\tÜ€ 日本 \U0001f3c3  x", ""]


@pytest.fixture(scope="module", params=["gpt2-nano", "llama-nano"])
def run(request, tmp_path_factory, small_text):
    """Of a run, its checkpoint in float32, adapters joined."""
    folder = tmp_path_factory.mktemp(request.param)
    save_run(folder, [(small_text / "a.txt").read_text()], request.param, 7, dtype="float32")
    return folder


def ours(run, texts, count):
    """Greedy continuations as we generate them."""
    served = serving.load(run)
    end = served.vocabulary.specials.end_of_text
    prompts = [served.vocabulary.encode(text) for text in texts]
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.array([[*prompt, *[end] * (lengths.max() - len(prompt))] for prompt in prompts])
    options = {"lengths": lengths, "max_new_tokens": count, "end_token": end}
    made = generate(served.model, served.variables, jnp.asarray(ids), **options)
    rows = zip(np.asarray(made.tokens), made.lengths, strict=True)
    return [row[: int(length)].tolist() for row, length in rows]


def loaded(transformers, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_transformers_reads_and_writes_the_text_of_a_run(transformers, run, tmp_path, capsys):
    assert main([f"--checkpoint={run}", f"--output={tmp_path / 'hf'}"]) == 0
    assert f"of step 7: exported to {tmp_path / 'hf'}" in capsys.readouterr().out
    tokenizer, theirs = loaded(transformers, tmp_path / "hf")
    vocabulary = serving.load(run).vocabulary
    end = vocabulary.specials.end_of_text
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == vocabulary.encode(text)
        assert tokenizer.decode(vocabulary.encode(text)) == text
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == end
    assert (theirs.config.eos_token_id, theirs.config.bos_token_id) == (end, end)
    assert theirs.config.pad_token_id is None
    made = theirs.generation_config
    assert (made.eos_token_id, made.bos_token_id, made.pad_token_id) == (end, end, end)

    expected = ours(run, TEXTS[:2], 12)
    assert expected[0] != expected[1]
    for text, tokens in zip(TEXTS, expected, strict=False):
        given = tokenizer(text, return_tensors="pt")
        found = theirs.generate(**given, max_new_tokens=12, do_sample=False)[0]
        assert found[given["input_ids"].shape[1] :].tolist() == tokens
        assert tokenizer.decode(found) == text + vocabulary.decode(tokens)
    given = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    assert 0 in given["attention_mask"]
    found = theirs.generate(**given, max_new_tokens=12, do_sample=False)
    assert found[:, given["input_ids"].shape[1] :].tolist() == expected


def test_transformers_ends_where_the_run_ends(transformers, run, tmp_path):
    """The latest token to come up changes places with the end of text."""
    trained = serving.load_trained(run)
    end = trained.vocabulary.specials.end_of_text
    tokens = ours(run, ["Mask"], 12)[0]
    count = max(tokens.index(token) for token in tokens)
    assert 0 < count < 11
    assert tokens[count] not in trained.vocabulary.encode("Mask")
    order = np.arange(304)
    order[[end, tokens[count]]] = tokens[count], end

    def swapped(path, leaf):
        name = jax.tree_util.keystr(path)
        if "token'" in name:
            return leaf[order[: len(leaf)]]
        return leaf[:, order[: leaf.shape[1]]] if "lm_head" in name else leaf

    params = jax.tree_util.tree_map_with_path(swapped, trained.variables["params"])
    variables = trained.variables | {"params": params}
    export_run(tmp_path / "hf", trained._replace(variables=variables))
    tokenizer, theirs = loaded(transformers, tmp_path / "hf")
    given = tokenizer("Mask", return_tensors="pt")
    found = theirs.generate(**given, max_new_tokens=12, do_sample=False)[0]
    assert found[given["input_ids"].shape[1] :].tolist() == [*tokens[:count], end]


def test_a_run_with_a_tokenizer_of_its_own():
    """Its own padding, and a post-processor that the run never used."""
    import tokenizers

    from train.data.tokenizer import vocabulary_from_json
    from train.export import hf_tokenizer

    words = {"<s>": 0, "</s>": 1, "<unk>": 2, "<pad>": 3, "sparse": 4, "kernel": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    vocabulary = vocabulary_from_json(made.to_str(), "clm")
    tokenizer, roles = hf_tokenizer(vocabulary)
    assert roles == {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    assert tokenizer.encode("sparse kernel").ids == [4, 5]
    assert vocabulary.tokenizer.encode("sparse kernel").ids == [0, 4, 5]  # what was given is left


def test_transformers_fills_the_masks_of_a_bert(torch, transformers, tmp_path, small_text):
    texts = [(small_text / "a.txt").read_text()]
    save_run(tmp_path / "run", texts, "bert-tiny", 7, dtype="float32")
    assert main([f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'hf'}"]) == 0
    assert not (tmp_path / "hf" / "generation_config.json").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    theirs = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "hf").eval()
    served = serving.load(tmp_path / "run")
    specials, encode = served.vocabulary.specials, served.vocabulary.encode
    given = tokenizer("Sparse [MASK] mask", return_tensors="pt")
    ids = masked_ids(served.vocabulary, "Sparse [MASK] mask")
    assert ids == [specials.cls, *encode("Sparse"), specials.mask, *encode(" mask"), specials.sep]
    assert given["input_ids"].tolist() == [ids]
    for text in ("[MASK] [MASK].", "Sparse[MASK]", "[MASK]"):
        assert tokenizer(text)["input_ids"] == masked_ids(served.vocabulary, text)
    with torch.no_grad():
        logits = theirs(**given).prediction_logits[0, ids.index(specials.mask)]
    found = fill_masks(served.model, served.variables, jnp.asarray([ids]), specials.mask, top=3)
    assert logits.topk(3).indices.tolist() == np.asarray(found.tokens[0]).tolist()
    pair = tokenizer("Sparse", "mask")
    first, second = encode("Sparse"), encode("mask")
    assert pair["input_ids"] == [specials.cls, *first, specials.sep, *second, specials.sep]
    assert pair["token_type_ids"] == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert theirs.config.pad_token_id == specials.pad


def test_a_bert_without_spaces_in_its_words_leaves_its_mask_alone(tmp_path):
    from train.data.tokenizer import BERT_SPECIALS, load_tokenizer
    from train.export import hf_tokenizer

    (tmp_path / "vocab.txt").write_text("\n".join((*BERT_SPECIALS, "sparse", "kernel")))
    vocabulary = load_tokenizer(tmp_path / "vocab.txt", "mlm")
    tokenizer, _ = hf_tokenizer(vocabulary)
    assert not tokenizer.get_added_tokens_decoder()[vocabulary.specials.mask].lstrip
    text = "Sparse [MASK] kernel"
    assert tokenizer.encode(text).ids == masked_ids(vocabulary, text) == [2, 5, 4, 6, 3]


def test_other_forms_and_what_is_wrong(tmp_path, small_text, capsys, monkeypatch):
    from safetensors.numpy import load_file

    texts = [(small_text / "a.txt").read_text()]
    save_run(tmp_path / "run", texts, "gpt2-nano", 7)
    options = [f"--checkpoint={tmp_path / 'run'}", "--dtype=float16"]
    served = serving.load(tmp_path / "run")
    serving.save(served, tmp_path / "saved")
    for checkpoint, more, file, name in (
        ("run", ["--adapters=lora"], "adapter/adapter_model.safetensors", "lora_A"),
        ("run", ["--semi-structured"], "semi_structured.safetensors", ".packed"),
        ("saved", [], "model.safetensors", "wte"),
    ):
        folder = tmp_path / f"{checkpoint}{len(more)}{name.strip('.')}"
        options[0] = f"--checkpoint={tmp_path / checkpoint}"
        assert main([*options, *more, f"--output={folder}"]) == 0
        tensors = load_file(folder / file)
        (example, *_) = (tensors[key] for key in tensors if name in key)
        assert example.dtype == np.float16
        assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 0
        assert (folder / "tokenizer.json").is_file()
    capsys.readouterr()
    for wrong, message in (
        ([f"--output={tmp_path / 'saved'}"], "exists already"),
        ([f"--output={tmp_path / 'x'}", "--step=5"], "leave out step=5"),
        ([f"--output={tmp_path / 'x'}", "--semi-structured", "--dtype=float32"], "bfloat16 or"),
        (
            [f"--output={tmp_path / 'x'}", "--semi-structured", "--adapters=merge"],
            "leave out --adapters=merge or --semi-structured",
        ),
    ):
        assert main([*options[:1], *wrong]) == 2
        assert message in capsys.readouterr().err
    save_run(tmp_path / "dense", texts, "gpt2-nano", 7, method="dense")
    dense = [f"--checkpoint={tmp_path / 'dense'}", f"--output={tmp_path / 'x'}"]
    assert main([*dense, "--semi-structured"]) == 2
    assert "leave out --semi-structured" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*options[:1], f"--output={tmp_path / 'x'}"]) == 2
    assert "slope-jax[hf]" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
