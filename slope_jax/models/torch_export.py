"""2:4 kernels as PyTorch's semi-structured tensors: survivors and reordered metadata, no zeros."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import CompressedMatrix, Pattern
from pallas_kernels.files import new_folder, write_atomically
from slope_jax.models import hf_export, hf_names
from slope_jax.models.bert import Bert
from slope_jax.models.decoder import Decoder
from slope_jax.models.hf_adapter import FOLDER, write_adapter
from slope_jax.models.hf_families import Source
from slope_jax.models.hf_files import SEMI_STRUCTURED, listed
from slope_jax.models.hf_names import at, full_name, linear_of, parts_of
from slope_jax.models.hf_tokenizer import write_tokenizer
from slope_jax.models.stack import unstack_layers
from slope_jax.models.variables import check_variables
from slope_jax.policy import DENSE

ROWS, COLUMNS = 32, 64  # what divides (out, in), in PyTorch's class
_DTYPES = ("bfloat16", "float16")
_PATTERNS = ("2:4", "1:2")


def semi_structured(w: CompressedMatrix) -> tuple[np.ndarray, np.ndarray]:
    """`packed` and `meta` of `torch.sparse.SparseSemiStructuredTensorCUTLASS`, of w transposed.

    A 1:2 matrix is a 2:4 one too.

    Args:
      w: (in, out), compressed along its inputs, "2:4" or "1:2", bfloat16 or float16; 64 divides in
        and 32 divides out.

    Returns:
      packed: (out, in / 2), dtype of w: the survivors of each output in order.
      meta: int16 (out, in / 16): the positions of eight survivors each, two bits a position, in the
        order in which the tensor cores of Ampere take them (not that of its indices).

    Raises:
      ValueError: w is not such a matrix.

    >>> from pallas_kernels import compress
    >>> packed, meta = semi_structured(compress(jnp.ones((64, 32), jnp.bfloat16), "2:4"))
    >>> packed.shape, meta.shape, hex(meta[0, 0])
    ((32, 32), (32, 4), '0x4444')
    """
    w.check()
    problem = _problem(str(w.pattern), w.shape)
    if w.axis != 0 or w.values.ndim != 2:
        problem = "it must be one matrix, compressed along axis 0"
    if w.dtype.name not in _DTYPES:
        problem = f"{w.dtype.name} must be {' or '.join(_DTYPES)}"
    if problem:
        raise ValueError(f"a {w.pattern} matrix {w.shape} as a semi-structured tensor: {problem}")
    words = np.ascontiguousarray(_octets(w).T).view("<i2").astype(np.int16)
    # Rows are (groups of 32, 2, 2, 8), columns (pairs, 2); of a row's middle axes and the column's
    # last one, those of 8 rows, the upper two rows, columns and lower two rows follow each other.
    rows, columns = words.shape
    axes = words.reshape(rows // 32, 2, 2, 8, columns // 2, 2)
    meta = axes.transpose(4, 0, 3, 1, 5, 2).reshape(rows, columns)
    return np.ascontiguousarray(np.asarray(w.values).T), np.ascontiguousarray(meta)


def export_semi_structured(
    folder: str | Path,
    model: Bert | Decoder,
    variables: Mapping[str, Any],
    *,
    dtype: Any = jnp.bfloat16,
    tokenizer: Any = None,
    special_tokens: Mapping[str, str] | None = None,
) -> Path:
    """Writes the model for PyTorch with its pruned kernels compressed, 9/16 of the dense bytes.

    The folder holds config.json and semi_structured.safetensors (numbered files where it is large):
    the tensors of `export_hf` under the names of Transformers, but for each pruned weight NAME, of
    `semi_structured`, NAME.packed (out, in / 2) and NAME.meta (out, in / 16). Both are of (out, in)
    always, which for GPT-2 is the transpose of the weight of its Conv1D. Adapters are in
    folder/adapter, as by `export_hf` with adapters="lora". docs/interop.md shows how to load it.

    Args:
      folder: a new one; it is there whole or not at all.
      model, variables, tokenizer, special_tokens: as for `export_hf`.
      dtype: of all floats, bfloat16 or float16.

    Raises:
      ValueError: the folder exists already, nothing is pruned, a pruned linear has a pattern or
        sizes that PyTorch's class does not take (all such are listed), the variables are not the
        model's, or the tokenizer is wrong.
      ImportError: safetensors is not installed.

    >>> export_semi_structured("~/models/gpt2-2to4", model, variables)  # doctest: +SKIP
    """
    dtype = checked_dtype(dtype)
    family = hf_export.family_of(model)
    check_model(model)
    check_variables(model, variables, any_stack=True)
    folder, single = Path(folder).expanduser().resolve(), unstack_layers(variables)
    with new_folder(folder) as staging:
        causal = isinstance(model, Decoder)
        ids = write_tokenizer(staging, tokenizer, special_tokens, model.config, causal=causal)
        hf_export.write_shards(staging, _tensors(model, family, single, dtype), SEMI_STRUCTURED)
        config = hf_export.config_json(model, family, dtype.name) | ids
        write_atomically(staging / "config.json", json.dumps(config, indent=2) + "\n")
        if model.config.rank:
            write_adapter(staging / FOLDER, folder, model.config, family, single, dtype)
    return folder


def checked_dtype(dtype: Any) -> np.dtype:
    """Raises the ValueError of `export_semi_structured` for one that PyTorch's class does not take."""
    dtype = jnp.dtype(dtype)
    if dtype.name not in _DTYPES:
        raise ValueError(f"dtype={dtype.name!r}; choose {' or '.join(_DTYPES)}")
    return dtype


def _octets(w: CompressedMatrix) -> np.ndarray:
    """The metadata of w as a 2:4 matrix."""
    metadata = np.asarray(w.metadata)
    if w.m == 4:
        return metadata
    low = np.unpackbits(metadata, axis=0, bitorder="little")
    # Of two consecutive groups of two, the second one's positions are 2 and 3.
    high = np.broadcast_to(np.arange(len(low), dtype=np.uint8)[:, None] % 2, low.shape)
    bits = np.stack([low, high], axis=1).reshape(2 * len(low), -1)
    return np.packbits(bits, axis=0, bitorder="little")


def _problem(pattern: str, shape: tuple[int, int]) -> str | None:
    if pattern not in _PATTERNS:
        return f"the pattern must be {' or '.join(_PATTERNS)}"
    if shape[0] % COLUMNS or shape[1] % ROWS:
        return f"{COLUMNS} must divide the inputs and {ROWS} the outputs"
    return None


def _pattern(model: Bert | Decoder, source: Source) -> str:
    """Of the linear whose kernel it is; "dense" for other parameters."""
    if source.path[-1] != "kernel":
        return DENSE
    return model.config.patterns[linear_of(source)]


def check_model(model: Bert | Decoder) -> None:
    """Raises the ValueError of `export_semi_structured` unless PyTorch's class takes what is pruned."""
    family = hf_export.family_of(model)
    sizes = {linear.path: linear for linear in model.config.linears}
    wrong, pruned = [], 0
    for source in hf_names.sources(model.config, family):
        pattern = _pattern(model, source)
        if pattern == DENSE:
            continue
        pruned += 1
        linear = sizes[linear_of(source)]
        columns = parts_of(model.config, source, np.empty((0, linear.out_features)))
        for name, part in zip(source.names, columns, strict=True):
            shape = (linear.in_features, part.shape[1])
            problem = _problem(pattern, shape)
            if problem:
                wrong.append(f"{name} ({pattern}, {shape[0]} x {shape[1]}): {problem}")
    if not pruned:
        raise ValueError("the model prunes nothing; write it with export_hf")
    if wrong:
        raise ValueError(
            f"not semi-structured tensors of PyTorch: {listed(wrong)}. export_hf writes any model,"
            " with zeros"
        )


def _tensors(
    model: Bert | Decoder, family: str, variables: Mapping, dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors by name, one after the other."""
    for source in hf_names.sources(model.config, family):
        pattern = _pattern(model, source)
        if pattern == DENSE:
            yield from hf_export.dense_tensors(model, family, source, variables, dtype)
            continue
        values = np.asarray(at(variables["params"], source.path).astype(dtype))
        metadata = np.asarray(at(variables["masks"], source.path))
        columns = (parts_of(model.config, source, array) for array in (values, metadata))
        for name, part, positions in zip(source.names, *columns, strict=True):
            kept = Pattern.parse(pattern)
            shape = (len(part) * kept.m // kept.n, part.shape[1])
            packed, meta = semi_structured(CompressedMatrix(part, positions, kept, 0, shape))
            yield f"{full_name(family, name)}.packed", packed
            yield f"{full_name(family, name)}.meta", meta
