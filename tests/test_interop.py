"""docs/interop.md: its snippets run one after the other and do what the page says."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import close, randomised

from slope_jax import models
from slope_jax.generate import generate
from train import evaluate, serving
from train.data.tokenizer import END_OF_TEXT, vocabulary_from_json

pytest.importorskip("safetensors", reason="safetensors is not installed")

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "interop.md"
WORDS = ["sparse", "kernel", "mask", "values", "dense", "layer", "adapter", "rank"]
IDS = np.random.default_rng(0).integers(0, 8, (2, 12)).astype(np.int32)
GPT2 = {"vocab_size": 61, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 16}


@pytest.fixture
def folder(torch, transformers, tmp_path, monkeypatch):
    """What the page starts from: a folder gpt2, its tokenizer, text.txt; and a run."""
    config = transformers.GPT2Config(**GPT2, bos_token_id=0, eos_token_id=0)
    theirs = randomised(torch, transformers.GPT2LMHeadModel(config))
    theirs.save_pretrained(tmp_path / "gpt2", safe_serialization=True)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="mask"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(tmp_path / "gpt2" / "tokenizer.json"))
    text = " ".join(np.random.default_rng(1).choice(WORDS, 400))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")

    sizes = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "mlp_size": 64}
    model = models.build("gpt2-nano", **sizes, max_positions=16, adapter_rank=2)
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    params = jax.tree.map(lambda x: 3 * x + 0.1, variables["params"])  # no adapter is zero
    vocabulary = vocabulary_from_json(tokenizer.to_str(), "clm")
    run = serving.Trained(model, variables | {"params": params}, vocabulary, {})
    monkeypatch.setattr(serving, "load_trained", {"runs/gpt2": run}.__getitem__)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def products(torch, monkeypatch):
    """PyTorch's two sparse products, which CUDA alone has, by its own conversion; their calls."""
    conversions = pytest.importorskip("torch.sparse._semi_structured_conversions")
    calls = []

    def mm(packed, meta, x):
        calls.append(packed.shape)
        return conversions.sparse_semi_structured_to_dense_cutlass(packed, meta) @ x

    def addmm(bias, packed, meta, x):
        return bias[:, None] + mm(packed, meta, x)

    monkeypatch.setattr(torch, "_sparse_semi_structured_mm", mm)
    monkeypatch.setattr(torch, "_sparse_semi_structured_addmm", addmm)
    return calls


def ours(model, variables):
    return np.asarray(jax.jit(model.apply)(variables, jnp.asarray(IDS)))[..., :61]


def theirs(torch, model):
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.float().numpy()


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_page(torch, folder, products):
    pytest.importorskip("peft")
    pytest.importorskip("flatbuffers")
    text = PAGE.read_text(encoding="utf-8").replace('device="cuda"', 'device="cpu"')
    names, after = {}, []
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(snippet, names)
        after.append(dict(names))
    magnitude, wanda, served, pruned, lora, _, packed, programs = after

    masks = [found["variables"]["masks"] for found in (magnitude, wanda)]
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), *masks)))
    assert [batch.shape for batch in wanda["batches"]] == [(8, 16)] * 3 + [(1, 16)]

    again = serving.load(folder / "gpt2-served")
    for found in (served["served"], again):
        jax.tree.map(np.testing.assert_array_equal, found.variables["masks"], masks[1])
    assert evaluate.perplexity(again, np.arange(9))["tokens"] == 8

    expected = ours(wanda["model"], wanda["variables"])
    close(expected, theirs(torch, pruned["theirs"]))
    run = lora["run"]
    close(ours(run.model, run.variables), theirs(torch, lora["theirs"]))
    prompt = jnp.array([[WORDS.index("sparse")]])
    made = generate(run.model, run.variables, prompt, max_new_tokens=7, end_token=len(WORDS))
    ids = [*prompt[0].tolist(), *np.asarray(made.tokens[0])[: made.lengths[0]].tolist()]
    assert lora["text"] == run.vocabulary.decode(ids)

    # In bfloat16 the sparse weights are as far from float32 as the dense ones, give or take.
    assert not products
    error = np.abs(theirs(torch, packed["theirs"]) - expected).max()
    assert len(products) == 7
    dense = theirs(torch, pruned["theirs"].to(torch.bfloat16))
    assert error <= 2 * np.abs(dense - expected).max()

    exported = programs["export"].load(folder / "gpt2-programs")
    assert exported.greedy(wanda["variables"], jnp.zeros((1, 8), jnp.int32), 4).shape == (1, 4)
