"""Wanda (Sun et al., 2024, arXiv 2306.11695): prunes a trained dense model in one pass over text."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from pallas_kernels import compress, decompress
from slope_jax import masks
from slope_jax.dense import MASKS
from slope_jax.models.bert import Bert
from slope_jax.models.calibration import Path, Runner, Sums, checked_batch, dense_twin
from slope_jax.models.casting import is_cast
from slope_jax.models.config import TransformerConfig
from slope_jax.models.decoder import Decoder
from slope_jax.models.hf_files import listed
from slope_jax.models.stack import stack_layers, unstack_layers
from slope_jax.policy import DENSE


def prune_wanda(
    model: Bert | Decoder,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    progress: Callable[[int, int], None] | None = None,
    for_inference: bool = False,
) -> dict[str, Any]:
    """Variables of a sparse model from those of a trained dense one, weights unchanged where kept.

    Of m consecutive inputs of an output, the n of the largest |w_ij| * ||x_i||_2 stay (equation 1),
    x_i being input i on all tokens of the batches, padding left out. As in the paper, layers are
    pruned one after the other: norms are those of the dense layer behind layers that are pruned
    already. Pruned linears outside the layers come last, together. Sums of squares are in float32,
    activations in the model's `dtype`.

    The hidden states of all batches stay on the device, tokens * hidden_size numbers, and beside the
    result one layer, dense, twice. Parameters may be NumPy arrays: they are sent one layer at a time,
    and tables when text enters. The paper takes 128 sequences of text.

    Args:
      model: the sparse model to fill; its policy gives the patterns. Without adapters (add those to
        a training state).
      variables: {"params": ...} of the same model with sparsity="dense", stacked or not.
      batches: each (B, S) integers, or a mapping with "input_ids" (B, S), where rows are padded to
        the right "lengths" (B,), and for BERT "token_type_ids" (B, S); what else it holds is left
        alone. Equal shapes compile once.
      progress: called with (layers done, layers) after each layer.
      for_inference: kernels and tables of the result are of the model's `dtype`, else they keep theirs.

    Returns:
      {"params": ..., "masks": ...} as `model.init` gives them, but for dtypes.

    Raises:
      ValueError: nothing is pruned, the model has adapters, the variables are not those of the
        dense model, there are no batches, one does not fit the model, or an activation is not
        finite.

    >>> from slope_jax.models import build
    >>> sizes = {"vocab_size": 64, "num_layers": 2, "hidden_size": 32, "mlp_size": 64}
    >>> dense = build("gpt2-nano", **sizes, sparsity="dense")
    >>> variables = jax.jit(dense.init)(jax.random.key(0), **dense.example_inputs())
    >>> text = jax.random.randint(jax.random.key(1), (4, 16), 0, 64)
    >>> pruned = prune_wanda(build("gpt2-nano", **sizes, sparsity="2:4"), variables, [text])
    >>> pruned["params"]["layers_1"]["mlp"]["up"]["kernel"].shape
    (16, 64)
    """
    check_model(model)
    params = _single_layers(model, variables)
    if not isinstance(batches, Iterable):
        raise ValueError(f"calibration batches are {batches!r}; give a list of token ids (B, S)")
    inputs = [checked_batch(model, batch) for batch in batches]
    if not inputs:
        raise ValueError("no calibration batches; give at least one of token ids (B, S)")
    dtype = model.config.dtype if for_inference else None
    names = _layers(model.config)
    outside = {name: tree for name, tree in params.items() if name not in names}
    runner = Runner(model, outside, params[names[0]], inputs[0])
    states = [runner.enter(batch) for batch in inputs]
    result: dict[str, Any] = {"params": {}, MASKS: {}}
    for i, name in enumerate(names):
        patterns, layer = _patterns(model.config, {name}), jax.tree.map(jnp.asarray, params[name])
        sums = []
        if patterns:
            for (x, context), batch in zip(states, inputs, strict=True):
                found = runner.layer(layer, x, context, batch)[1]
                sums.append({(name, *path): total for path, total in found.items()})
        masked = _prune(result, {name: layer}, patterns, sums, dtype)[name]
        states = [
            (runner.layer(masked, x, context, batch)[0], context)
            for (x, context), batch in zip(states, inputs, strict=True)
        ]
        del layer, masked  # before the next one is sent
        if progress is not None:
            progress(i + 1, len(names))
    patterns = _patterns(model.config, set(outside))
    sums = []
    if patterns:
        sums = [runner.heads(x, batch) for (x, _), batch in zip(states, inputs, strict=True)]
    _prune(result, outside, patterns, sums, dtype)
    return stack_layers(result, model.config)


def _prune(
    result: dict, tree: dict, patterns: dict[Path, str], sums: list[Sums], dtype: Any
) -> dict:
    """Adds the compressed tree to `result`, cast; returns it dense, with zeros, as it was."""
    masked = traverse_util.flatten_dict(tree)
    kept, metadata = {}, {}
    for path, x in masked.items():
        if path[-1] != "kernel" or path[:-1] not in patterns:
            cast = dtype is not None and is_cast(path[-1])
            kept[path] = jnp.asarray(x.astype(dtype) if cast else x)
    for path, pattern in patterns.items():
        total = functools.reduce(jnp.add, [found[path] for found in sums])
        if not np.isfinite(total).all():
            raise ValueError(
                f"{'/'.join(path)}: its inputs are not finite on the calibration batches; check the"
                " weights, or build the model with a wider dtype"
            )
        at = (*path, "kernel")
        kept[at], metadata[at], masked[at] = _compress(masked[at], total, pattern, dtype)
    result["params"] |= traverse_util.unflatten_dict(kept)
    result[MASKS] |= traverse_util.unflatten_dict(metadata)
    return traverse_util.unflatten_dict(masked)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _compress(kernel: jax.Array, squares: jax.Array, pattern: str, dtype: Any):
    """Values, of a dtype unless it is None, metadata, and both as a dense kernel of the dtype it had."""
    scores = jnp.abs(kernel.astype(jnp.float32)) * jnp.sqrt(squares)[:, None]
    compressed = compress(kernel, pattern, mask=masks.score_mask(scores, pattern))
    values = compressed.values if dtype is None else compressed.values.astype(dtype)
    return values, compressed.metadata, decompress(compressed)


def _layers(config: TransformerConfig) -> list[str]:
    return [f"layers_{i}" for i in range(config.num_layers)]


def _patterns(config: TransformerConfig, tops: set[str]) -> dict[Path, str]:
    """Pruned linears below the names `tops` of the parameter tree -> pattern."""
    paths = {
        tuple(re.sub(r"^layers/", "layers_", path).split("/")): pattern
        for path, pattern in config.patterns.items()
        if pattern != DENSE
    }
    return {path: pattern for path, pattern in paths.items() if path[0] in tops}


def check_model(model: Bert | Decoder) -> None:
    """Raises the ValueError of `prune_wanda` unless the model is one to prune into."""
    if all(pattern == DENSE for pattern in model.config.patterns.values()):
        raise ValueError(
            f"the model prunes nothing (sparsity {str(model.config.sparsity)!r}); build it with a"
            " sparsity such as '2:4'"
        )
    if model.config.rank:
        raise ValueError(
            f"adapter_rank={model.config.adapter_rank}: prune into a model with adapter_rank=0,"
            " then add adapters with slope_jax.add_adapters"
        )


def _single_layers(model: Bert | Decoder, variables: Mapping[str, Any]) -> dict:
    """The parameters of the dense model, checked, one entry a layer."""
    if "params" not in variables:
        raise ValueError(
            f"variables hold {listed(sorted(variables)) or 'nothing'}; they must be"
            " {'params': ...} of the model with sparsity='dense'"
        )
    params = unstack_layers({"params": variables["params"]})["params"]
    dense = dense_twin(model)
    wanted = jax.eval_shape(dense.init, jax.random.key(0), **dense.example_inputs())["params"]
    found, wanted = (
        {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}
        for tree in (params, wanted)
    )
    if found != wanted:
        wrong = sorted(p for p in found.keys() | wanted.keys() if found.get(p) != wanted.get(p))
        lines = [f"{'/'.join(p)}: {found.get(p)}, not {wanted.get(p)}" for p in wrong]
        raise ValueError(
            "the variables are not those of the model with sparsity='dense'; in shape differ "
            + listed(lines)
        )
    return params
