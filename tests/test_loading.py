"""What loading a model takes at its peak, next to what is kept of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jobs import save_run
from live import peak

from slope_jax import models
from slope_jax.generate import inference_variables
from train import serving
from train.data.tokenizer import train_tokenizer

SIZES = {"vocab_size": 304, "num_layers": 4, "hidden_size": 128, "num_heads": 4, "mlp_size": 512}
LARGER = 1.1  # than what is served: less than one of the layers besides


@pytest.fixture(scope="module")
def text(small_text):
    return (small_text / "a.txt").read_text()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text):
    """Hugging Face folders of a dense LLaMA, by the dtype of their tensors."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    model = models.build("llama-3-8b", **SIZES, num_kv_heads=2, max_positions=48, sparsity="dense")
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    made = {}
    for dtype in ("bfloat16", "float32"):
        made[dtype] = tmp_path_factory.mktemp("hf") / dtype
        models.export_hf(made[dtype], model, variables, dtype=dtype)
        train_tokenizer([text], "clm", 300).save(made[dtype] / "tokenizer.json")
    return made


def equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, expected)


@pytest.mark.parametrize(
    ("stored", "sparsity"), [("bfloat16", "dense"), ("bfloat16", "2:4"), ("float32", "2:4")]
)
def test_a_folder_takes_little_more_than_what_is_served(folders, stored, sparsity):
    """And masks are chosen among all digits that the folder has, whatever is served of them."""
    most, served = peak(serving.from_hf, folders[stored], sparsity=sparsity, dtype="bfloat16")
    assert served.nbytes <= most < LARGER * served.nbytes
    model, full = models.from_hf(folders[stored], sparsity=sparsity, dtype=jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(full["params"])} == {"float32"}
    equal(served.variables, inference_variables(model, full)[1])


def test_wanda_takes_a_layer_and_the_hidden_states_besides(folders):
    ids = np.random.default_rng(0).integers(0, 300, (2, 16)).astype(np.int32)
    options = {"sparsity": "2:4", "calibration": [ids]}
    folder = folders["float32"]
    most, served = peak(serving.from_hf, folder, **options, dtype="bfloat16")
    layer = 4 * (128 * 256 + 128 * 128 + 3 * 128 * 512)  # float32, dense
    assert served.nbytes <= most < 1.05 * (served.nbytes + 2 * layer)
    model, full = models.from_hf(folder, **options, dtype=jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(full["params"])} == {"float32"}
    equal(served.variables, inference_variables(model, full)[1])


@pytest.mark.parametrize("method", ["slope", "sr-ste", "fst"])
def test_a_run_takes_little_more_than_what_is_served(tmp_path, text, method):
    save_run(tmp_path, [text], "gpt2-nano", 7, **({} if method == "slope" else {"method": method}))
    most, served = peak(serving.load, tmp_path)
    assert served.nbytes <= most < LARGER * served.nbytes
    trained = serving.load_trained(tmp_path)
    assert {x.dtype.name for x in jax.tree.leaves(trained.variables["params"])} == {"float32"}
    config = dataclasses.replace(trained.model.config, dtype=served.model.config.dtype)
    expected = inference_variables(type(trained.model)(config), trained.variables)[1]
    equal(served.variables, expected)
