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
from train.calibration import calibration_batches
from train.data.tokenizer import train_tokenizer
from train.export import export_run, main
from train.generate import main as generate_main
from train.prompts import masked_ids

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
    with pytest.raises(
        ValueError, match=r"holds 2:4 tensors for PyTorch, .* which are not read back"
    ):
        serving.load(tmp_path / "run1packed")
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
    for option, message in (
        ("--semi-structured", "leave out --semi-structured"),
        ("--adapters=lora", "error: --adapters=lora: "),
    ):
        assert main([*dense, option]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*options[:1], f"--output={tmp_path / 'x'}"]) == 2
    assert "slope-jax[hf]" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_adapters_that_stay_apart_are_read_back(run, tmp_path, capsys):
    """With the rank that they have, and the length that the run was trained on."""
    from safetensors.numpy import load_file

    lora, again, merged = (tmp_path / name for name in ("lora", "again", "merged"))
    for source, output, how in (
        (run, lora, "lora"),
        (lora, again, "lora"),
        (lora, merged, "merge"),
    ):
        args = [f"--checkpoint={source}", f"--output={output}", f"--adapters={how}"]
        assert main(args) == 0
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        tensors = [load_file(folder / file) for folder in (lora, again)]
        jax.tree.map(np.testing.assert_array_equal, *tensors)
    assert (lora / "config.json").read_text() == (again / "config.json").read_text()
    assert not (merged / "adapter").exists()

    trained, found = serving.load(run), serving.load(lora)
    assert found.about["adapters"]
    assert found.model.config == trained.model.config
    for kind, collection in found.variables.items():  # but for rows that pad the vocabulary
        for name in (name for name in collection if name.startswith("layers")):
            jax.tree.map(
                np.testing.assert_array_equal, collection[name], trained.variables[kind][name]
            )
    ids = jnp.arange(24).reshape(2, 12)
    logits = [jax.jit(s.model.apply)(s.variables, ids)[..., :300] for s in (trained, found)]
    np.testing.assert_array_equal(*logits)
    saved = serving.load(serving.save(found, tmp_path / "saved", dtype="float32"))
    assert saved.model == found.model
    jax.tree.map(np.testing.assert_array_equal, saved.variables, found.variables)
    for served in (trained, found, saved, serving.load(merged)):
        assert served.longest == 16

    capsys.readouterr()
    assert generate_main([f"--checkpoint={lora}", "--prompt=Sparse", "--max-new-tokens=4"]) == 0
    assert "adapters fused" in capsys.readouterr().err
    assert generate_main([f"--checkpoint={lora / 'adapter'}", "--prompt=Sparse"]) == 2
    assert "holds adapters alone; give the folder of their model" in capsys.readouterr().err


def test_adapters_are_not_added_to_what_is_to_be_pruned(run, tmp_path, capsys, monkeypatch):
    """They would fill the zeros; apart, they leave them."""
    from safetensors.numpy import load_file

    folder, merged = tmp_path / "lora", tmp_path / "merged"
    assert main([f"--checkpoint={run}", f"--output={folder}", "--adapters=lora"]) == 0
    assert "no zeros" not in capsys.readouterr().out
    assert main([f"--checkpoint={run}", f"--output={merged}"]) == 0
    assert "no zeros then; --adapters=lora keeps both" in capsys.readouterr().out
    pruned = [f"--checkpoint={folder}", "--sparsity=2:4"]
    forms = {"apart": "--adapters=lora", "packed": "--semi-structured"}
    if json.loads((folder / "config.json").read_text())["model_type"] == "llama":
        del forms["packed"]  # sizes that PyTorch's class does not take
    for name, more in forms.items():
        assert main([*pruned, more, f"--output={tmp_path / name}"]) == 0
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert "2:4" in config["slope_jax"]["sparsity"]
        assert (tmp_path / name / "adapter" / "adapter_model.safetensors").is_file()
    tensors = load_file(tmp_path / "apart" / "model.safetensors")
    (down, *_) = (
        w for name, w in tensors.items() if name.endswith(("down_proj.weight", "fc.weight"))
    )
    assert (down == 0).mean() == 0.5
    for name in ("train.imported.read", "train.calibration.calibration_batches"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("something was read"))
    capsys.readouterr()
    for more, message in (
        ([], f"{folder}/adapter has adapters, and added to the pruned weights they would leave no"),
        (["--adapters=merge"], "Give --adapters=lora"),
        (["--calibration=text:a.txt", "--adapters=lora"], "take that folder out, or leave out cal"),
    ):
        assert main([*pruned, *more, f"--output={tmp_path / 'x'}"]) == 2
        assert message in capsys.readouterr().err


def test_other_patterns_than_the_usual_one_are_kept(tmp_path, small_text):
    texts = [(small_text / "a.txt").read_text()]
    options = {"method": "slope", "sparsity": "2:4,2:8", "adapter_rank": 3, "adapter_start": 0.0}
    save_run(tmp_path / "run", texts, "gpt2-nano", 7, **options)
    export_run(tmp_path / "hf", serving.load_trained(tmp_path / "run"), adapters="lora")
    trained, found = serving.load(tmp_path / "run"), serving.load(tmp_path / "hf")
    assert found.model.config.patterns == trained.model.config.patterns
    assert "2:8" in found.model.config.patterns.values()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for noted in ("2:4", {"seq_len": []}, {"seq_len": [0]}, {"seq_len": 16}):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"slope_jax": noted}))
        with pytest.raises(ValueError, match=r"slope_jax=.* is not what an export of ours says"):
            serving.load(tmp_path / "hf")


def test_a_folder_is_pruned_on_the_way(tmp_path, small_text, capsys):
    """To what Python gives for the same text, by magnitude and by Wanda."""
    texts = [(small_text / "a.txt").read_text()]
    text = ["--sparsity=2:4", f"--calibration=text:{small_text / 'a.txt'}"]
    text += [f"--cache-dir={tmp_path / 'cache'}"]
    for model in ("gpt2-nano", "bert-tiny"):
        save_run(tmp_path / model, texts, model, 7, method="dense")
        dense = tmp_path / f"{model}-dense"
        export_run(dense, serving.load_trained(tmp_path / model))
        size = ["--calibration-length=20", "--calibration-sequences=11"]
        for name, options in (("magnitude", ["--sparsity=2:4"]), ("wanda", [*text, *size])):
            output = tmp_path / f"{model}-{name}"
            assert main([f"--checkpoint={dense}", f"--output={output}", *options]) == 0
        encode = serving.load(dense).vocabulary.encode
        specials = serving.load(dense).vocabulary.specials
        documents = texts[0].split("\n\n")
        if model == "gpt2-nano":
            ids = [i for text in documents for i in [*encode(text), specials.end_of_text]]
            rows = np.array(ids[: 11 * 20]).reshape(11, 20)
        else:
            ids = [i for text in documents for i in encode(text)][: 11 * 18]
            rows = np.pad(np.reshape(ids, (11, 18)), ((0, 0), (1, 1)))
            rows[:, 0], rows[:, -1] = specials.cls, specials.sep
        for name, batches in (("magnitude", None), ("wanda", [rows[:8], rows[8:]])):
            expected = serving.from_hf(dense, sparsity="2:4", calibration=batches)
            found = serving.load(tmp_path / f"{model}-{name}")
            assert "2:4" in found.model.config.patterns.values()
            jax.tree.map(np.testing.assert_array_equal, found.variables, expected.variables)
        masks = [
            serving.load(tmp_path / f"{model}-{name}").variables["masks"]
            for name in ("magnitude", "wanda")
        ]
        assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), *masks)))
    capsys.readouterr()
    output, empty = f"--output={tmp_path / 'x'}", tmp_path / "empty.txt"
    short = tmp_path / "short.txt"
    empty.write_text("\n")
    short.write_text("a")
    for wrong, message in (
        ([f"--checkpoint={tmp_path / 'gpt2-nano'}", "--sparsity=2:4"], "export it first, and then"),
        ([f"--checkpoint={dense}", *text[1:]], "--calibration, --cache-dir without --sparsity"),
        (
            [f"--checkpoint={dense}", text[0], *size],
            "calibration-length without --calibration: give text",
        ),
        ([f"--checkpoint={dense}", *text, "--calibration-length=0"], "=0 must be 1 or more"),
        ([f"--checkpoint={dense}", *text, "--calibration-length=9999"], "9999 must lie between"),
        ([f"--checkpoint={dense}", *text, "--calibration-length=2"], "2 must lie between"),
        ([f"--checkpoint={dense}", "--sparsity=2:3"], "2:3"),
        ([f"--checkpoint={dense}", *text, f"--calibration=text:{empty}"], "no "),
        (
            [f"--checkpoint={dense}", *text, f"--calibration=text:{short}"],
            "text for 1 of 128 rows, 1 of 65,280 tokens. Wanda needs 1,024 or more",
        ),
        (
            [f"--checkpoint={dense}", *text, *size, f"--calibration=text:{short}"],
            "text for 1 of 11 rows, 1 of 198 tokens. Wanda needs 198 or more",
        ),
    ):
        assert main([*wrong, output]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_calibration_says_how_much_text_there_was(small_text, tmp_path):
    vocabulary = train_tokenizer([(small_text / "a.txt").read_text()], "clm", 300)
    said = []

    def read(length, sequences):
        options = {"sequences": sequences, "cache_dir": tmp_path, "say": said.append}
        source = f"text:{small_text / 'a.txt'}"
        return len(np.concatenate(calibration_batches(source, vocabulary, length, **options)))

    assert read(64, 20) == 20
    assert said.pop() == "calibration: read 20 of 20 rows, 1,280 of 1,280 tokens"
    found = read(64, 9999)
    assert 20 < found < 9999
    (told,) = said
    start = f"calibration: read {found:,} of 9,999 rows, {64 * found:,} of 639,936 tokens"
    assert told == f"{start}; warning: the text ends there, and more would choose better"


def test_what_cannot_be_exported_is_said_before_anything_is_read(
    tmp_path, small_text, monkeypatch, capsys
):
    texts = [(small_text / "a.txt").read_text()]
    save_run(tmp_path / "run", texts, "gpt2-nano", 7, method="dense")
    export_run(tmp_path / "hf", serving.load_trained(tmp_path / "run"))
    for name in ("train.imported.read", "train.serving.load_trained", "train.serving.load"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(
        "train.calibration.calibration_batches", lambda *_, **__: pytest.fail("text was read")
    )
    (tmp_path / "file").write_text("")
    folder, run = (f"--checkpoint={tmp_path / name}" for name in ("hf", "run"))
    new = f"--output={tmp_path / 'new'}"
    text = f"--calibration=text:{small_text / 'a.txt'}"
    packed = [folder, new, text, "--semi-structured"]
    for args, message in (
        ([folder, "--sparsity=2:4", text, f"--output={tmp_path / 'hf'}"], "exists already; name a"),
        ([run, f"--output={tmp_path / 'file' / 'a'}"], f"{tmp_path / 'file'} is no folder; name"),
        ([run, new, "--semi-structured", "--dtype=float32"], "'float32'; choose bfloat16 or"),
        ([*packed, "--sparsity=2:8"], "(2:8, 128 x 512): the pattern must be 2:4 or 1:2"),
        ([*packed[:2], "--semi-structured", "--sparsity=dense"], "leave out --semi-structured"),
        ([folder, new, text, "--sparsity=dense"], "the model prunes nothing"),
        ([folder, new, text, "--sparsity=2:3"], "2:3"),
        ([folder, new, "--adapters=lora"], "hf has no adapters to write apart; leave it out"),
        (
            [folder, new, "--adapters=lora", "--sparsity=2:4"],
            "no adapters to write apart; leave it",
        ),
    ):
        assert main(args) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_model_to_use_is_not_taken_for_a_run(run, tmp_path):
    """By what trains on; the message says what takes it."""
    folder = export_run(tmp_path / "hf", serving.load_trained(run))
    saved = serving.save(serving.load(run), tmp_path / "saved")
    for path, kind in ((folder, "of Hugging Face"), (saved, "with served.json")):
        with pytest.raises(ValueError, match=f"is a folder {kind}: a model to use, .* --sparsity"):
            serving.load_trained(path)
