"""Hugging Face folders served like runs: generated from, evaluated, saved, and refused."""

import json
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from parity import randomised

from slope_jax import models
from slope_jax.generate import generate
from train import evaluate, serving
from train.data.tokenizer import train_tokenizer
from train.generate import main
from train.harness import Harness
from train.prompts import encoded
from train.texts import complete

pytest.importorskip("safetensors", reason="safetensors is not installed")

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 48}
LLAMA |= {
    "head_dim": 16,  # more than 32 / 4
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0},
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 48}
BERT = SIZES | {"intermediate_size": 64, "max_position_embeddings": 48}
VOCABULARY = 304
PROMPTS = ("Sparse kernel", "Mask values dense")


@pytest.fixture(scope="module")
def imported(torch, transformers, tmp_path_factory, small_text):
    """Their model and its folder, with a byte-level tokenizer, by family."""
    text = (small_text / "a.txt").read_text()
    ends = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    made = {}
    for name, kind, config in (
        ("gpt2", transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2, **ends)),
        ("llama", transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA, **ends)),
        ("bert", transformers.BertForPreTraining, transformers.BertConfig(**BERT, **ends)),
    ):
        model, folder = randomised(torch, kind(config)), tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, safe_serialization=True)
        vocabulary = train_tokenizer([text], "mlm" if name == "bert" else "clm", 300)
        vocabulary.save(folder / "tokenizer.json")
        made[name] = model, folder
    return made


@pytest.fixture
def folder(imported, tmp_path):
    return shutil.copytree(imported["gpt2"][1], tmp_path / "gpt2")


def theirs_continued(torch, model, ids, count):
    found = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return found[0, len(ids) :].tolist()


def ours_continued(served, ids, count):
    end = served.vocabulary.specials.end_of_text
    made = generate(
        served.model, served.variables, jnp.array([ids]), max_new_tokens=count, end_token=end
    )
    return np.asarray(made.tokens[0])[: int(made.lengths[0])].tolist()


def same(a, b):
    assert a.model == b.model
    assert a.about == b.about
    assert a.vocabulary.specials == b.vocabulary.specials
    assert a.vocabulary.fingerprint == b.vocabulary.fingerprint
    assert jax.tree.structure(a.variables) == jax.tree.structure(b.variables)
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_dense_import_generates_what_transformers_generates(torch, imported, tmp_path, family):
    theirs, folder = imported[family]
    served = serving.load(folder)
    assert not served.variables.get("masks")
    assert served.longest == 48
    assert served.title == f"{family} of {folder}"
    assert served.about["imported"]["source"] == str(folder)
    assert not served.about["adapters"]
    for text in PROMPTS:
        ids = served.vocabulary.encode(text)
        assert ours_continued(served, ids, 20) == theirs_continued(torch, theirs, ids, 20)
    same(serving.load(serving.save(served, tmp_path / "saved", dtype="float32")), served)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("by", ["magnitude", "wanda"])
def test_a_pruned_import_is_what_models_gives_and_survives_its_folder(
    imported, tmp_path, family, by
):
    folder = imported[family][1]
    ids = np.random.default_rng(0).integers(0, 300, (2, 16)).astype(np.int32)
    options = {"sparsity": "2:4", "calibration": [ids] if by == "wanda" else None}
    served = serving.from_hf(folder, **options)
    model, variables = models.from_hf(folder, **options)
    expected, found = model.apply(variables, ids), served.model.apply(served.variables, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert served.model.config.patterns == model.config.patterns
    again = serving.load(serving.save(served, tmp_path / "saved", dtype="float32"))
    same(again, served)
    rounded = serving.load(serving.save(served, tmp_path / "rounded"))  # in bfloat16, as runs are
    kernel = served.variables["params"]["layers_1"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(
        rounded.variables["params"]["layers_1"]["mlp"]["down"]["kernel"],
        kernel.astype(jnp.bfloat16).astype(jnp.float32),
    )


def test_the_commands_take_an_import_and_what_they_save_of_it(
    torch, imported, tmp_path, small_text, capsys
):
    theirs, folder = imported["gpt2"]
    saved = tmp_path / "saved"
    options = ["--prompt=Sparse kernel", "--max-new-tokens=12"]
    save = [f"--save={saved}", "--save-dtype=float32"]
    assert main([f"--checkpoint={folder}", *save, *options]) == 0
    out = capsys.readouterr().out
    vocabulary = serving.load(folder).vocabulary
    ids = vocabulary.encode("Sparse kernel")
    expected = theirs_continued(torch, theirs, ids, 12)
    expected = expected[: expected.index(0)] if 0 in expected else expected
    assert out == vocabulary.decode([*ids, *expected]) + "\n"
    assert main([f"--checkpoint={saved}", *options]) == 0
    assert capsys.readouterr().out == out

    data = [f"--data=text:{small_text / 'a.txt'}", f"--cache-dir={tmp_path / 'cache'}"]
    output = tmp_path / "numbers.json"
    limit = ["--max-tokens=40", "--window=40", f"--output={output}"]
    assert evaluate.main([f"--checkpoint={saved}", *data, *limit]) == 0
    found = json.loads(output.read_text())["results"]
    document = (small_text / "a.txt").read_text().split("\n\n")[0]
    tokens = [*vocabulary.encode(document), 0]
    assert found["tokens"] == len(tokens) - 1 > 40
    assert found["nats_per_token"] == pytest.approx(
        perplexity_of_windows(torch, theirs, tokens, 40, 20), rel=1e-4
    )
    assert evaluate.main([f"--checkpoint={saved}", *data, "--held-out"]) == 2
    assert "leave out --held-out" in capsys.readouterr().err
    assert main([f"--checkpoint={folder}", "--step=3", "--prompt=a"]) == 2
    assert "holds one model, not the steps of a run" in capsys.readouterr().err


def perplexity_of_windows(torch, model, tokens, window, stride):
    """Nats a token by their model, each scored in the first window that has it."""
    nats, start, done = [], 0, 0
    while done < len(tokens) - 1:
        stop = min(start + window, len(tokens) - 1)
        with torch.no_grad():
            logits = model(torch.tensor([tokens[start:stop]])).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(tokens[start + 1 : stop + 1]), reduction="none"
        )
        nats += losses[done - start :].tolist()
        start, done = start + stride, stop
    return sum(nats) / len(nats)


def test_a_bert_fills_masks(imported, tmp_path, capsys):
    folder = imported["bert"][1]
    served = serving.from_hf(folder)
    assert served.vocabulary.objective == "mlm"
    same(serving.load(serving.save(served, tmp_path / "saved", dtype="float32")), served)
    assert main([f"--checkpoint={folder}", "--prompt=Sparse [MASK] mask", "--top-k=2"]) == 0
    assert capsys.readouterr().out.splitlines()[1].count("%") == 2


def test_weights_that_are_2_to_4_already_stay_so(imported, tmp_path):
    folder = imported["llama"][1]
    model, variables = models.from_hf(folder, sparsity="2:4")
    again = models.export_hf(tmp_path / "pruned", model, variables, tokenizer=folder)
    served, dense = serving.load(again), serving.load(folder)
    assert "2:4" in served.model.config.patterns.values()
    pruned = serving.from_hf(folder, sparsity="2:4")
    jax.tree.map(np.testing.assert_array_equal, served.variables, pruned.variables)
    assert served.nbytes < dense.nbytes

    # One weight more, in the last kernel that is looked at, and they stay dense.
    filled = serving.from_hf(again, sparsity="dense")
    kernel = filled.variables["params"]["layers_2"]["mlp"]["down"]["kernel"]
    params = filled.variables["params"] | {}
    params["layers_2"] = params["layers_2"] | {"mlp": params["layers_2"]["mlp"] | {}}
    params["layers_2"]["mlp"]["down"] = {"kernel": kernel.at[:3, 5].set(1.0)}
    other = models.export_hf(tmp_path / "filled", filled.model, {"params": params}, tokenizer=again)
    assert set(serving.load(other).model.config.patterns.values()) == {"dense"}


def put(folder, name, **fields):
    file = folder / name
    raw = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(raw | fields))


def test_texts_end_as_the_folder_says(folder, tmp_path):
    def end():
        return serving.from_hf(folder).vocabulary.specials.end_of_text

    put(folder, "generation_config.json", eos_token_id=[7, 3])
    served = serving.from_hf(folder)
    specials = served.vocabulary.specials
    assert specials.end_of_text == 7
    assert specials.all == (0, 7)
    same(serving.load(serving.save(served, tmp_path / "saved", dtype="float32")), served)
    (folder / "generation_config.json").unlink()
    put(folder, "config.json", eos_token_id=5)
    assert end() == 5
    put(folder, "config.json", eos_token_id=None)
    assert end() == 0  # <|endoftext|>
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<|endoftext|>", "<|fin|>"))
    with pytest.raises(ValueError, match="has no token for end_of_text"):
        end()
    put(folder, "config.json", eos_token_id=0)
    served = serving.from_hf(folder)
    assert served.vocabulary.specials.end_of_text == 0
    same(serving.load(serving.save(served, tmp_path / "again", dtype="float32")), served)


def test_prompts_begin_and_end_as_those_of_transformers(torch, transformers, imported, tmp_path):
    """With a token that the tokenizer puts ahead of every text, and several that end one."""
    model, given = imported["llama"]
    folder = shutil.copytree(given, tmp_path / "llama")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    first = tokenizer.id_to_token(9)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, 9)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(PROMPTS[0]).ids
    assert ids[0] == 9
    free = theirs_continued(torch, model, ids, 12)
    put(folder, "generation_config.json", eos_token_id=[0, free[5]])
    served = serving.from_hf(folder, dtype="float32")
    assert served.beginning == [9]
    assert served.ends == (0, free[5])
    kept = free[: free.index(free[5])]
    expected = tokenizer.decode([*ids, *kept]).removeprefix(tokenizer.decode(ids))
    assert complete(served, PROMPTS[0], max_new_tokens=12) == [expected]
    again = serving.load(serving.save(served, tmp_path / "saved", dtype="float32"))
    assert complete(again, PROMPTS[0], max_new_tokens=12) == [expected]

    tokens, *_ = evaluate._tokens(served, [PROMPTS[0], "a"], None)
    assert tokens.tolist() == [*ids, 0, *served.vocabulary.encode("a"), 0]
    harness = Harness(served, add_bos_token=False)  # the token ahead is not scored
    (nats,) = harness.loglikelihood_rolling([Request((PROMPTS[0],))])
    theirs = perplexity_of_windows(torch, model, ids, 40, 40) * (len(ids) - 1)
    assert -nats == pytest.approx(theirs, rel=1e-4)


def test_special_tokens_that_a_prompt_spells_are_those_of_transformers(
    torch, transformers, imported, tmp_path, capsys
):
    """What a chat template writes: turns that end, behind the token that begins a text, or without it."""
    model, given = imported["llama"]
    folder = shutil.copytree(given, tmp_path / "llama")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    theirs.save_pretrained(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    put(folder, "config.json", eos_token_id=tokenizer.token_to_id("</s>"))
    served = serving.from_hf(folder, dtype="float32")
    said = "Sparse kernel</s>mask values"
    for text, ahead in ((said, True), ("</s>", True), ("", True), (f"<s>{said}", False)):
        expected = theirs(text, add_special_tokens=ahead).input_ids
        assert encoded(served, [text], special_tokens=True) == [expected]
        as_text = theirs(text, split_special_tokens=True).input_ids
        assert encoded(served, [text]) == [as_text]
    ids = theirs(said).input_ids
    assert tokenizer.token_to_id("</s>") in ids
    made = theirs_continued(torch, model, ids, 12)
    expected = theirs.decode([*ids, *made]).removeprefix(theirs.decode(ids)).split("</s>")[0]
    assert complete(served, said, max_new_tokens=12, special_tokens=True) == [expected]
    assert complete(served, said, max_new_tokens=12) != [expected]
    options = [f"--checkpoint={folder}", "--dtype=float32", f"--prompt={said}"]
    assert main([*options, "--max-new-tokens=12", "--special-tokens"]) == 0
    assert capsys.readouterr().out == f"{said}{expected}\n"


@pytest.mark.filterwarnings("ignore")  # the harness and what it imports are not ours
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_numbers_of_tasks_are_those_of_the_harness(transformers, imported, tmp_path, family):
    """Of its own model class, which reads the same folder."""
    theirs = pytest.importorskip("lm_eval.models.huggingface", reason="lm_eval is not installed")
    model, given = imported[family]
    folder = shutil.copytree(given, tmp_path / family)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    if family == "llama":
        tokenizer.add_special_tokens(["<s>"])
        special["bos_token"] = "<s>"
        begin = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", begin)]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    served = serving.from_hf(folder, dtype="float32")
    begun = tokenizer.bos_token + PROMPTS[0]
    pairs = [("Sparse", " kernel"), ("", " mask"), ("a ", "rank"), ("rank " * 60, " mask")]
    pairs += [(begun, " mask"), ("", tokenizer.bos_token + " rank")]
    texts = [*PROMPTS, "Mask values dense. " * 20, begun]
    for add in (None, False):
        ours = Harness(served, add_bos_token=add is None)
        reference = theirs.HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=add
        )
        for name, arguments in (
            ("loglikelihood", pairs),
            ("loglikelihood_rolling", [(text,) for text in texts]),
            ("generate_until", [(text, {"until": ["q"], "max_gen_toks": 9}) for text in texts]),
        ):
            found, expected = (
                getattr(lm, name)([Request(one) for one in arguments], disable_tqdm=True)
                for lm in (ours, reference)
            )
            if name == "generate_until":
                assert found == expected
            else:
                np.testing.assert_allclose(found, expected, rtol=1e-4)


class Request(NamedTuple):
    """As the harness makes them."""

    args: tuple


def test_an_import_is_exported_as_it_was(transformers, imported, tmp_path, monkeypatch, capsys):
    """With its digits, where "auto" computes with fewer, its <s> and both its ends, though its folder is gone."""
    from train import export
    from train import imported as module

    folder = shutil.copytree(imported["llama"][1], tmp_path / "llama")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    first = tokenizer.id_to_token(9)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, 9)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    put(folder, "config.json", bos_token_id=9)
    put(folder, "generation_config.json", eos_token_id=[0, 7], bos_token_id=9)
    expected = serving.from_hf(folder, dtype="float32")
    ids = tokenizer.encode(PROMPTS[0]).ids
    saved = serving.save(expected, tmp_path / "saved", dtype="float32")

    known = module.named_dtype
    monkeypatch.setattr(
        module, "named_dtype", lambda name: jnp.bfloat16 if name == "auto" else known(name)
    )
    for number, source in enumerate((folder, saved)):
        exported = tmp_path / f"exported-{number}"
        assert export.main([f"--checkpoint={source}", f"--output={exported}"]) == 0
        capsys.readouterr()
        shutil.rmtree(folder, ignore_errors=True)  # the second time, it is gone
        found = serving.from_hf(exported, dtype="float32")
        jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
        assert (found.beginning, found.ends) == ([9], (0, 7))
        theirs = transformers.AutoTokenizer.from_pretrained(exported)
        assert theirs(PROMPTS[0]).input_ids == ids
        assert json.loads((exported / "config.json").read_text())["bos_token_id"] == 9


@pytest.mark.parametrize("older", [False, True])
def test_an_export_keeps_the_token_that_the_folder_names_as_its_first(imported, tmp_path, older):
    """Though the tokenizer puts none ahead of texts; an older served.json does not tell of it."""
    from train.export import export_run

    folder = shutil.copytree(imported["llama"][1], tmp_path / "llama")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    put(folder, "tokenizer_config.json", bos_token=tokenizer.id_to_token(9))
    served = serving.from_hf(folder)
    if older:
        del served.about["imported"]["bos"]
    saved = serving.save(served, tmp_path / "saved")
    shutil.rmtree(folder)
    exported = export_run(tmp_path / "exported", serving.load(saved))
    assert json.loads((exported / "config.json").read_text())["bos_token_id"] == (0 if older else 9)
    assert serving.from_hf(exported).beginning == []


def test_the_dtype_is_that_of_the_computation(folder, tmp_path):
    served = serving.from_hf(folder, dtype="bfloat16")
    assert served.model.config.dtype == jnp.bfloat16
    same(serving.load(serving.save(served, tmp_path / "saved")), served)
    half = serving.from_hf(folder, dtype="float16")
    assert half.model.config.dtype == jnp.float16
    same(serving.load(serving.save(half, tmp_path / "half")), half)
    assert serving.saved_dtype(serving.from_hf(folder, dtype="float32").about) == "float32"
    same(serving.load(folder, dtype="bfloat16"), served)
    wider = serving.load(tmp_path / "saved", dtype="float32")
    assert wider.model.config.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, wider.variables, served.variables)


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (remove("tokenizer.json"), {}, r"tokenizer.json is missing; let Transformers write it"),
        (remove("config.json"), {}, r"config.json is missing; save the model with save_pretrained"),
        (remove("model.safetensors"), {}, r"model.safetensors is missing; the folder holds"),
        (
            lambda folder: put(folder, "config.json", model_type="t5"),
            {},
            r"model_type 't5'; choose a folder of bert, gpt2",
        ),
        (
            lambda folder: put(folder, "config.json", model_type=["gpt2"]),
            {},
            r"model_type \['gpt2'\]; choose a folder of",
        ),
        (
            lambda folder: put(folder, "config.json", vocab_size=256),
            {},
            "tokenizer.json has ids up to 299, but the model vocab_size=256; copy the tokenizer",
        ),
        (
            lambda folder: put(folder, "generation_config.json", eos_token_id=50256),
            {},
            "eos_token_id=50256 is no id of tokenizer.json, which has 300; correct it",
        ),
        (
            lambda folder: put(folder, "generation_config.json", eos_token_id=-1),
            {},
            "eos_token_id=-1 is no id of tokenizer.json",
        ),
        (None, {"calibration": []}, "give a sparsity such as '2:4' as well"),
        (None, {"sparsity": "2:3"}, "2:3"),
        (
            None,
            {"dtype": "float8"},
            "dtype='float8' must be one of auto, bfloat16, float16, float32$",
        ),
    ],
)
def test_what_is_refused(folder, change, options, message):
    if change is not None:
        change(folder)
    with pytest.raises(ValueError, match=message):
        serving.from_hf(folder, **options)


def test_a_missing_extra_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    assert main([f"--checkpoint={folder}", "--prompt=a"]) == 2
    assert "pip install 'slope-jax[hf]'" in capsys.readouterr().err


def test_weights_are_not_read_before_the_tokenizer(folder, monkeypatch):
    monkeypatch.setattr(models, "from_hf", lambda *_, **__: pytest.fail("weights were read"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a tokenizer.json of the tokenizers library"):
        serving.load(folder)


def test_a_folder_may_be_called_as_a_checkpoint_of_ours_is(folder, tmp_path):
    path = tmp_path / "checkpoints" / "1000"
    path.parent.mkdir()
    folder.rename(path)
    for read in (serving.load, serving.from_hf):
        assert read(path).title.endswith(str(path))
