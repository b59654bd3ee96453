"""Our variables as a Hugging Face folder that Transformers loads: dense, adapters merged or apart."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import CompressedMatrix, Pattern, decompress
from pallas_kernels.files import new_folder, write_atomically
from slope_jax.dense import ADAPTER_L, ADAPTER_R
from slope_jax.models import hf_names
from slope_jax.models.bert import Bert
from slope_jax.models.decoder import Decoder
from slope_jax.models.gpt2 import GPT2
from slope_jax.models.hf_families import FAMILIES, Source
from slope_jax.models.hf_tokenizer import write_tokenizer
from slope_jax.models.opt import OPT
from slope_jax.models.stack import unstack_layers

SHARD_BYTES = 4 * 2**30
_HEADS = {
    "bert": "BertForPreTraining",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
_PREFIX = {"bert": "bert.", "gpt2": "transformer."}  # "model." for the others
_ROPE_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_decompress = jax.jit(decompress)
DTYPES = ("float32", "bfloat16", "float16")
_ALONE = ("cls.", "lm_head.")  # names outside of the base model


def export_hf(
    folder: str | Path,
    model: Bert | Decoder,
    variables: Mapping[str, Any],
    *,
    adapters: Literal["merge", "lora"] = "merge",
    dtype: Any = None,
    tokenizer: Any = None,
    special_tokens: Mapping[str, str] | None = None,
) -> Path:
    """Writes config.json, safetensors files and the tokenizer's; the inverse of `load_hf`.

    Kernels are dense in the folder, with zeros where ours are pruned.

    Args:
      folder: a new one; it is there whole or not at all.
      model: a BERT, GPT-2, OPT, LLaMA or Mistral, and `variables`: its {"params": ..., "masks": ...}.
      adapters: "merge" adds them to the kernels, which are not 2:4 any more then. "lora" leaves the
        kernels alone and writes folder/adapter, in the form of PEFT. Where a kernel of ours is made
        of several of theirs (queries, keys, values; gate, up), each gets the same lora_A and its
        columns of adapter_r, so that nothing is lost.
      dtype: of the tensors; None keeps that of each parameter. Sums are in float32.
      tokenizer: a Hugging Face folder, whose tokenizer and generation_config.json are copied, with
        the special ids of its config.json; a tokenizer of Transformers; or a `tokenizers.Tokenizer`.
        Its ids are those of the model. None: there are no special ids, and nothing ends what
        Transformers generates.
      special_tokens: of a `tokenizers.Tokenizer`: tokens by role, such as {"eos_token": "</s>"}; the
        roles are those of Transformers. Of a decoder, the end pads too where nothing else does.

    Raises:
      ValueError: the folder exists already, `adapters` is neither of the two, `dtype` is no float of
        16 or 32 bits, the variables are not the model's, or the tokenizer is none, or not one of it.
      ImportError: safetensors is not installed.

    >>> model, variables = from_hf("~/models/gpt2", sparsity="2:4")  # doctest: +SKIP
    >>> export_hf("~/gpt2-sparse", model, variables, tokenizer="~/models/gpt2")  # doctest: +SKIP
    """
    if adapters not in ("merge", "lora"):
        raise ValueError(f"adapters={adapters!r}; choose 'merge' or 'lora'")
    dtype = None if dtype is None else checked_dtype(dtype)
    folder, family = Path(folder).expanduser().resolve(), family_of(model)
    single = unstack_layers(variables)
    with new_folder(folder) as staging:
        causal = isinstance(model, Decoder)
        ids = write_tokenizer(staging, tokenizer, special_tokens, model.config, causal=causal)
        tensors = _tensors(model, family, single, merged=adapters == "merge", dtype=dtype)
        write_shards(staging, tensors)
        config = (
            config_json(
                model, family, np.dtype(model.config.param_dtype if dtype is None else dtype).name
            )
            | ids
        )
        write_atomically(staging / "config.json", json.dumps(config, indent=2) + "\n")
        if adapters == "lora" and model.config.rank:
            write_adapter(staging / "adapter", model, family, single, dtype)
    return folder


def checked_dtype(dtype: Any) -> np.dtype:
    """One that weights are written in; raises ValueError, with the choices, for another."""
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.name not in DTYPES:
        raise ValueError(
            f"dtype={dtype!r}: weights are not written in that; choose {', '.join(DTYPES)}"
        )
    return known


def family_of(model: Bert | Decoder) -> str:
    if isinstance(model, Bert | GPT2 | OPT):
        return type(model).__name__.lower()
    return "llama" if model.config.window is None else "mistral"


def full_name(family: str, name: str) -> str:
    return name if name.startswith(_ALONE) else _PREFIX.get(family, "model.") + name


def at(tree: Mapping, path: tuple[str, ...]) -> Any:
    for part in path:
        if part not in tree:
            return None
        tree = tree[part]
    return tree


def linear_of(source: Source) -> str:
    """The logical path of the linear that has the parameter."""
    return "/".join(source.path[:-1]).replace("layers_", "layers/", 1)


def _tensors(
    model, family: str, variables: Mapping, *, merged: bool, dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors by name, one after the other."""
    for source in hf_names.sources(model.config, family):
        yield from dense_tensors(model, family, source, variables, dtype, merged=merged)


def dense_tensors(
    model: Bert | Decoder,
    family: str,
    source: Source,
    variables: Mapping,
    dtype: Any,
    *,
    merged: bool = False,
) -> Iterator[tuple[str, np.ndarray]]:
    """Their names and tensors of one parameter of ours, layers single."""
    array = at(variables["params"], source.path)
    if array is None:
        raise ValueError(
            f"the variables hold no {'/'.join(source.path)}; give those of this {type(model).__name__}"
        )
    metadata = at(variables.get("masks", {}), source.path)
    layer = at(variables["params"], source.path[:-1])
    wanted = array.dtype if dtype is None else jnp.dtype(dtype)
    if metadata is not None:
        array = _dense(array, metadata, model.config.patterns[linear_of(source)])
    if merged and source.path[-1] == "kernel" and ADAPTER_L in layer:
        left, right = (layer[name].astype(jnp.float32) for name in (ADAPTER_L, ADAPTER_R))
        array = array.astype(jnp.float32) + jnp.matmul(left, right, precision="highest")
    array = np.asarray(array.astype(wanted))
    if source.vocabulary is not None:
        array = array.take(range(model.config.vocab_size), axis=source.vocabulary)
    for name, part in zip(source.names, parts_of(model, source, array), strict=True):
        part = part.T if source.transpose else part
        yield full_name(family, name), np.ascontiguousarray(part)


def _dense(values, metadata, pattern: str):
    parsed = Pattern.parse(pattern)
    shape = (values.shape[0] * parsed.m // parsed.n, values.shape[1])
    return _decompress(CompressedMatrix(values, metadata, parsed, 0, shape))


def parts_of(model: Bert | Decoder, source: Source, array: np.ndarray) -> list[np.ndarray]:
    """The columns of each of their tensors: splits the last axis."""
    count = len(source.names)
    if count == 1:
        return [array]
    config = model.config
    if "qkv" in source.path:
        kv_width = getattr(config, "num_kv_heads", config.num_heads) * config.head_dim
        return np.split(array, [config.hidden_size, config.hidden_size + kv_width], axis=-1)
    return np.split(array, count, axis=-1)


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], stem: str = "model"
) -> None:
    """stem.safetensors, or numbered files and their index; no more than one of them in memory."""
    from safetensors.numpy import save_file

    files: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = size = 0

    def write() -> None:
        save_file(held, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            write()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    write()
    if len(files) == 1:
        (folder / "part-0").rename(folder / f"{stem}.safetensors")
        return
    index = {}
    for number, names in enumerate(files):
        target = f"{stem}-{number + 1:05}-of-{len(files):05}.safetensors"
        (folder / f"part-{number}").rename(folder / target)
        index |= dict.fromkeys(names, target)
    content = {"metadata": {"total_size": total}, "weight_map": index}
    write_atomically(
        folder / f"{stem}.safetensors.index.json", json.dumps(content, indent=2) + "\n"
    )


def config_json(model, family: str, dtype: str) -> dict[str, Any]:
    """config.json: our fields by their names, and what we do not vary."""
    table, ours = FAMILIES[family], model.config
    found = {"architectures": [_HEADS[family]], "model_type": family, "torch_dtype": dtype}
    found |= {theirs: getattr(ours, name) for name, (theirs, _) in table.fields.items()}
    found |= {name: values[0] for name, values in table.fixed.items()}
    if table.dropout is not None:
        found |= {table.dropout: ours.dropout}
    if family in ("llama", "mistral"):
        scaling = ours.rope_scaling
        found |= {"rope_theta": ours.rope_theta, "head_dim": ours.head_dim}
        if scaling is not None:
            found["rope_scaling"] = {
                "rope_type": "llama3",
                **dict(zip(_ROPE_SCALING, scaling, strict=True)),
            }
    if family == "opt":
        found["word_embed_proj_dim"] = ours.hidden_size
    return found


def write_adapter(folder: Path, model, family: str, variables: Mapping, dtype) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT's LoRA has them."""
    from safetensors.numpy import save_file

    tensors, modules = {}, set()
    for source in hf_names.sources(model.config, family):
        layer = at(variables["params"], source.path[:-1])
        if source.path[-1] != "kernel" or ADAPTER_L not in layer:
            continue
        wanted = layer[ADAPTER_L].dtype if dtype is None else jnp.dtype(dtype)
        left, right = (np.asarray(layer[name].astype(wanted)) for name in (ADAPTER_L, ADAPTER_R))
        for name, part in zip(source.names, parts_of(model, source, right), strict=True):
            module = full_name(family, name).removesuffix(".weight")
            modules.add(module)
            stem = f"base_model.model.{module}"
            tensors[f"{stem}.lora_A.weight"] = np.ascontiguousarray(left.T)
            tensors[f"{stem}.lora_B.weight"] = np.ascontiguousarray(part.T)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = model.config.rank
    config = {
        "peft_type": "LORA",
        "task_type": None if family == "bert" else "CAUSAL_LM",
        "base_model_name_or_path": "..",
        "r": rank,
        "lora_alpha": rank,  # PEFT multiplies by lora_alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",  # whose Conv1D stores (in, out)
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    write_atomically(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
