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
from slope_jax.models.hf_adapter import FOLDER, write_adapter
from slope_jax.models.hf_families import FAMILIES, Source
from slope_jax.models.hf_files import save_tensors
from slope_jax.models.hf_names import ABOUT, at, full_name, linear_of, parts_of
from slope_jax.models.hf_rope import rope_json
from slope_jax.models.hf_tokenizer import write_tokenizer
from slope_jax.models.opt import OPT
from slope_jax.models.stack import unstack_layers
from slope_jax.models.variables import check_variables
from slope_jax.policy import DENSE

SHARD_BYTES = 4 * 2**30
_HEADS = {
    "bert": "BertForPreTraining",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
}
_decompress = jax.jit(decompress)
DTYPES = ("float32", "bfloat16", "float16")


def export_hf(
    folder: str | Path,
    model: Bert | Decoder,
    variables: Mapping[str, Any],
    *,
    adapters: Literal["merge", "lora"] = "merge",
    dtype: Any = None,
    tokenizer: Any = None,
    special_tokens: Mapping[str, str] | None = None,
    about: Mapping[str, Any] | None = None,
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
      dtype: of the tensors, which config.json names; None is the widest of the parameters', so that
        no digit is lost. Sums are in float32.
      tokenizer: a Hugging Face folder, whose tokenizer and generation_config.json are copied, with
        the special ids of its config.json; a tokenizer of Transformers; or a `tokenizers.Tokenizer`.
        Its ids are those of the model. None: there are no special ids, and nothing ends what
        Transformers generates.
      special_tokens: of a `tokenizers.Tokenizer`: tokens by role, such as {"eos_token": "</s>"}; the
        roles are those of Transformers. Of a decoder, the end pads too where nothing else does.
      about: more for the entry "slope_jax" of config.json, which holds the sparsity of kernels that are
        pruned; Transformers keeps it and makes no use of it.

    Raises:
      ValueError: the folder exists already, `adapters` is neither of the two, or "lora" of a model without
        any, `dtype` is no float of 16 or 32 bits, the variables are not the model's, or the tokenizer is
        none, or not one of it.
      ImportError: safetensors is not installed.

    >>> model, variables = from_hf("~/models/gpt2", sparsity="2:4")  # doctest: +SKIP
    >>> export_hf("~/gpt2-sparse", model, variables, tokenizer="~/models/gpt2")  # doctest: +SKIP
    """
    if adapters not in ("merge", "lora"):
        raise ValueError(f"adapters={adapters!r}; choose 'merge' or 'lora'")
    if adapters == "lora" and not model.config.rank:
        raise ValueError(
            "adapters='lora': the model has none to write apart; export it with adapters='merge', which"
            " adds none"
        )
    check_variables(model, variables, any_stack=True)
    params, merged = variables["params"], adapters == "merge"
    dtype = _widest(params) if dtype is None else checked_dtype(dtype)
    folder, family = Path(folder).expanduser().resolve(), family_of(model)
    single = unstack_layers(variables)
    with new_folder(folder) as staging:
        causal = isinstance(model, Decoder)
        ids = write_tokenizer(staging, tokenizer, special_tokens, model.config, causal=causal)
        write_shards(staging, _tensors(model, family, single, merged=merged, dtype=dtype))
        config = config_json(model, family, dtype.name, merged=merged, about=about) | ids
        write_atomically(staging / "config.json", json.dumps(config, indent=2) + "\n")
        if model.config.rank and not merged:
            write_adapter(staging / FOLDER, folder, model.config, family, single, dtype)
    return folder


def _widest(params: Mapping[str, Any]) -> np.dtype:
    dtypes = {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}
    return dtypes.pop() if len(dtypes) == 1 else jnp.dtype("float32")  # which holds all the others


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
    config = model.config
    # Transformers' LLaMA has no window, nor heads that do not divide the hidden size; Mistral is the same
    # model otherwise.
    plain = config.window is None and config.hidden_size % config.num_heads == 0
    return config.family if plain else "mistral"


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
    metadata = at(variables.get("masks", {}), source.path)
    layer = at(variables["params"], source.path[:-1])
    if metadata is not None:
        array = _dense(array, metadata, model.config.patterns[linear_of(source)])
    if merged and source.path[-1] == "kernel" and ADAPTER_L in layer:
        left, right = (layer[name].astype(jnp.float32) for name in (ADAPTER_L, ADAPTER_R))
        array = array.astype(jnp.float32) + jnp.matmul(left, right, precision="highest")
    array = np.asarray(array.astype(dtype))
    if source.vocabulary is not None:
        array = array.take(range(model.config.vocab_size), axis=source.vocabulary)
    for name, part in zip(source.names, parts_of(model.config, source, array), strict=True):
        part = part.T if source.transpose else part
        yield full_name(family, name), np.ascontiguousarray(part)


def _dense(values, metadata, pattern: str):
    parsed = Pattern.parse(pattern)
    shape = (values.shape[0] * parsed.m // parsed.n, values.shape[1])
    return _decompress(CompressedMatrix(values, metadata, parsed, 0, shape))


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], stem: str = "model"
) -> None:
    """stem.safetensors, or numbered files and their index; no more than one of them in memory."""
    files: list[list[str]] = []
    held: dict[str, np.ndarray] = {}
    total = size = 0

    def write() -> None:
        save_tensors(held, folder / f"part-{len(files)}")
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


def config_json(
    model: Bert | Decoder,
    family: str,
    dtype: str,
    *,
    merged: bool = False,
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json: our fields by their names, and what we do not vary."""
    table, ours = FAMILIES[family], model.config
    found = {"architectures": [_HEADS[family]], "model_type": family, "torch_dtype": dtype}
    found |= {theirs: getattr(ours, name) for name, (theirs, _) in table.fields.items()}
    found |= {name: values[0] for name, values in table.fixed.items()}
    if table.dropout is not None:
        found |= {table.dropout: ours.dropout}
    if family in ("llama", "mistral"):
        found |= {"head_dim": ours.head_width, "tie_word_embeddings": ours.tied_head}
        found |= rope_json(ours.rope_theta, ours.rope_scaling)
    if family == "opt":
        found["word_embed_proj_dim"] = ours.hidden_size
    dense = set(ours.patterns.values()) == {DENSE} or (merged and ours.rank)
    noted = ({} if dense else {"sparsity": str(ours.sparsity)}) | dict(about or {})
    return found | ({ABOUT: noted} if noted else {})
