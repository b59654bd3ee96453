"""PyTorch's semi-structured tensors, against its own conversions on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compress, decompress

from slope_jax import models
from slope_jax.models import hf_export

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

SMALL = {
    "vocab_size": 61,
    "hidden_size": 64,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_size": 128,
    "max_positions": 16,
}


@pytest.fixture
def conversions(torch):
    return pytest.importorskip("torch.sparse._semi_structured_conversions")


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(64, 32), (128, 96), (192, 64)])
def test_bytes_are_those_of_pytorch(torch, conversions, pattern, dtype, shape):
    """No survivor is zero here, so that there is one way to say where they are."""
    w = compress(jax.random.normal(jax.random.key(0), shape).astype(dtype), pattern)
    dense = torch.tensor(np.asarray(decompress(w).astype(jnp.float32)).T.copy())
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(
        dense.to(getattr(torch, dtype))
    )
    ours = models.semi_structured(w)
    assert ours[0].dtype == w.dtype
    np.testing.assert_array_equal(ours[0].view(np.int16), packed.view(torch.int16).numpy())
    np.testing.assert_array_equal(ours[1], meta.numpy(), strict=True)


def test_zeros_that_survive(torch, conversions):
    """Groups with fewer than two entries that are not zero, as training may leave them."""
    w = jax.random.randint(jax.random.key(0), (128, 64), -1, 2).astype(jnp.float16)
    w = compress(w * (jax.random.uniform(jax.random.key(1), w.shape) < 0.4), "2:4")
    packed, meta = (torch.tensor(array) for array in models.semi_structured(w))
    back = conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)
    np.testing.assert_array_equal(back.numpy().T, decompress(w))


@pytest.mark.parametrize(
    ("shape", "pattern", "options", "message"),
    [
        ((96, 32), "2:4", {}, "64 must divide the inputs and 32 the outputs"),
        ((64, 48), "2:4", {}, "64 must divide the inputs and 32 the outputs"),
        ((64, 32), "2:8", {}, "the pattern must be 2:4 or 1:2"),
        ((64, 32), "2:4", {"axis": 1}, "compressed along axis 0"),
        ((2, 64, 32), "2:4", {}, "must be one matrix"),
    ],
)
def test_matrices_that_pytorch_does_not_take(shape, pattern, options, message):
    w = compress(jnp.ones(shape, jnp.bfloat16), pattern, **options)
    with pytest.raises(ValueError, match=message):
        models.semi_structured(w)
    with pytest.raises(ValueError, match="float32 must be bfloat16 or float16"):
        models.semi_structured(compress(jnp.ones((64, 32)), "2:4"))


@pytest.mark.parametrize("name", ["gpt2-nano", "llama-nano"])
def test_folder_holds_what_the_dense_one_holds(torch, conversions, tmp_path, monkeypatch, name):
    """Fused kernels are split and transposed as in `export_hf`, whose folders Transformers reads."""
    fields = {"num_kv_heads": 1, "tied_head": True} if name == "llama-nano" else {}
    policy = r"layers/.*=2:4; .*=dense"
    model = models.build(name, **SMALL, **fields, sparsity=policy, adapter_rank=2)
    variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    dense = models.export_hf(
        tmp_path / "dense", model, variables, adapters="lora", dtype=jnp.bfloat16
    )
    monkeypatch.setattr(hf_export, "SHARD_BYTES", 30_000)
    folder = models.export_semi_structured(tmp_path / "packed", model, variables)
    files = sorted(folder.glob("semi_structured-*.safetensors"))
    assert len(files) > 1
    assert not list(folder.glob("model*"))
    adapters = [f / "adapter" / "adapter_model.safetensors" for f in (dense, folder)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert (folder / "config.json").read_bytes() == (dense / "config.json").read_bytes()
    found = {}
    for file in files:
        found |= safetensors_numpy.load_file(file)
    expected = safetensors_numpy.load_file(dense / "model.safetensors")
    packed = [key.removesuffix(".packed") for key in found if key.endswith(".packed")]
    assert len(packed) == {"gpt2-nano": 4, "llama-nano": 7}[name]
    for key in packed:
        parts = torch.tensor(found.pop(f"{key}.packed").view(np.int16)).view(torch.bfloat16)
        meta = torch.tensor(found.pop(f"{key}.meta"))
        back = conversions.sparse_semi_structured_to_dense_cutlass(parts, meta)
        back = back.view(torch.int16).numpy()
        back = back.T if name == "gpt2-nano" else back
        np.testing.assert_array_equal(back, expected.pop(key).view(np.int16), err_msg=key)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[key], err_msg=key)


@pytest.mark.parametrize(
    ("fields", "dtype", "message"),
    [
        ({"sparsity": "dense"}, "bfloat16", "prunes nothing; write it with export_hf"),
        ({"sparsity": "2:4"}, "float32", "dtype='float32'; choose bfloat16 or float16"),
        (
            {"sparsity": "2:4,2:8", "num_layers": 2},
            "bfloat16",
            r"tensors of PyTorch: h.1.attn.c_attn.weight \(2:8, 64 x 192\): the pattern must .*"
            r"h.1.mlp.c_proj.weight \(2:8, 128 x 64\)",
        ),
        ({"mlp_size": 48}, "float16", r"h.0.mlp.c_fc.weight \(2:4, 64 x 48\): 64 must divide"),
    ],
)
def test_models_that_pytorch_does_not_take(tmp_path, fields, dtype, message):
    model = models.build("gpt2-nano", **{**SMALL, **fields})
    with pytest.raises(ValueError, match=message):
        models.export_semi_structured(tmp_path / "new", model, {}, dtype=dtype)
    assert not list(tmp_path.iterdir())
