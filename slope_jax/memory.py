"""What training or serving holds in memory, item by item, from shapes alone."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from flax import linen as nn
from flax import traverse_util

from slope_jax.account import (
    ACTIVATIONS,
    CACHED,
    CAST,
    GRADIENTS,
    HEADS,
    KERNELS,
    METADATA,
    PARAMETERS,
    PARTS,
    PRUNED,
    TRANSPOSED,
    Memory,
    MemoryRow,
)
from slope_jax.dense import ADAPTER_L, ADAPTER_R, MASKS, SparseDense
from slope_jax.inputs import eval_shape, example_inputs, unboxed
from slope_jax.models.cache import cache_slots, init_cache
from slope_jax.models.decoder import Decoder
from slope_jax.prompts import is_integer
from slope_jax.working import find_layers, working_copies

_LAYERS = "layers_"  # how the models' stacks of layers are named

Bytes = dict[tuple[str, str], int]  # by kind and part


def memory(
    model: nn.Module,
    variables: Mapping[str, Any],
    tx: optax.GradientTransformation | None = None,
    *args,
    dense: nn.Module | None = None,
    accumulation: int = 1,
    activations: bool = True,
    cache: tuple[int, int] | None = None,
    **kwargs,
) -> Memory:
    """Itemises what a training step, or a served model, holds, sparse and dense. Allocates nothing.

    Sizes are bytes of the actual arrays: parameters and masks as given, the optimizer's state as
    `tx.init` makes it, gradients in the parameters' dtypes, and the dense model in the same ones.
    Kinds of rows:

    * "parameters", "metadata" (positions of the survivors), "gradients";
    * "keys and values" of earlier tokens, which generation keeps;
    * each field of the optimizer's state that follows the parameters, by its own name ("mu", "nu",
      "trace", ...), and "optimizer counters";
    * "cast copies" and "transposed copies", which products multiply: with `accumulation` > 1 those
      of `working_copies`, held for the whole step; else those of one layer, the largest, because
      each layer makes its own when it runs and drops them;
    * "activations": what JAX saves in one forward pass of these inputs for the backward pass, and
      the outputs. XLA may keep less; it adds what a layer needs while it runs. With
      `jax.checkpoint` over layers that is their inputs. Not part of the state; exact numbers are in
      `compiled.memory_analysis()`.

    Parts are kinds of parameters; "heads" are dense kernels outside of the stacked layers.

    Args:
      model: a Flax module with `SparseDense` layers.
      variables: from `model.init`, or shapes from `jax.eval_shape(model.init, ...)`.
      tx: the optimizer; None leaves out what only training holds.
      *args, **kwargs: example inputs (arrays, shapes, Python values) as `model.apply` takes them; by
        default `model.example_inputs()`, which are small.
      dense: the same model without sparsity; found by itself for the models of `slope_jax.models`
        and a lone `SparseDense`. Without one, nothing is compared.
      accumulation: micro-batches in a step.
      activations: whether to count these; it takes as long as all the rest.
      cache: (sequences, tokens of each, prompt and new ones) to generate at once, by a decoder, which
        makes room for multiples of 256, of 64 for more than 16 sequences; None: nothing is generated.

    Raises:
      ValueError: no example inputs, variables that are not those of the model, `accumulation`
        below 1, a `dense` model with other kernels, or a `cache` of nothing, of no decoder,
        or of more tokens than its `max_positions`.

    >>> import jax.numpy as jnp
    >>> layer = SparseDense(64)
    >>> x = jax.ShapeDtypeStruct((8, 64), jnp.float32)
    >>> account = memory(layer, jax.eval_shape(layer.init, jax.random.key(0), x), optax.adam(1e-3), x)
    >>> account.total("mu", "pruned kernels"), account.total("metadata")
    (8192, 512)
    >>> print(f"{account.ratio:.3f}")  # a lone layer's transposed copy is there as a whole
    0.646
    """
    if isinstance(accumulation, bool) or not isinstance(accumulation, int) or accumulation < 1:
        raise ValueError(f"accumulation={accumulation!r} must be a positive integer: micro-batches")
    if "params" not in variables:
        raise ValueError(
            f"variables hold {', '.join(variables) or 'nothing'}; pass what model.init returns, or"
            " its shapes: {'params': ..., 'masks': ...}"
        )
    variables = unboxed(variables)
    cached = None if cache is None else cache_bytes(model, *_checked_cache(cache))
    args, kwargs = example_inputs(model, args, kwargs)
    account = functools.partial(
        _account,
        tx=tx,
        accumulation=accumulation,
        activations=activations,
        inputs=(args, kwargs),
        cached=cached,
    )
    ours = account(model, variables)
    if (twin := dense or _dense_twin(model)) is None:
        theirs = None
    else:
        shapes = unboxed(eval_shape(twin.init, jax.random.key(0), *args, **kwargs))
        theirs = _aligned(account(twin, _of_dtypes(shapes, variables)), ours)
    kinds = dict.fromkeys(kind for kind, _ in (*ours, *(theirs or ())))
    order = sorted(kinds, key=lambda kind: kind == ACTIVATIONS)
    return Memory(
        tuple(
            MemoryRow(kind, part, ours.get((kind, part), 0), theirs and theirs.get((kind, part), 0))
            for kind in order
            for part in PARTS
            if (kind, part) in ours or (kind, part) in (theirs or ())
        )
    )


def cache_bytes(model: Decoder, batch: int, length: int) -> int:
    """Bytes of the keys and values for which generation makes room, `batch` sequences of `length` tokens.

    Raises:
      ValueError: not a decoder, or sequences longer than it reads.
    """
    if not isinstance(model, Decoder):
        raise ValueError(
            f"a {type(model).__name__} keeps no keys and values; leave out the cache, or give a"
            " GPT-2, OPT, LLaMA or Mistral"
        )
    if length > (most := model.config.max_positions):
        raise ValueError(
            f"sequences of {length} tokens are longer than max_positions={most}; ask for no more"
        )
    slots = cache_slots(model.config, batch, length)
    made = jax.eval_shape(lambda: init_cache(model.config, batch, slots))
    return sum(map(_nbytes, jax.tree.leaves(made)))


def _checked_cache(cache: Any) -> tuple[int, int]:
    pair = isinstance(cache, Sequence) and len(cache) == 2
    if not pair or not all(is_integer(count) and count > 0 for count in cache):
        raise ValueError(
            f"cache={cache!r} must be two positive integers: sequences, and tokens of each"
        )
    return tuple(cache)


def _of_dtypes(shapes: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of the dense model's variables with the dtypes that the parameters of ours have.

    Its layers may be in other stacks, so that a parameter is told by its name in any layer.
    """

    def anonymous(path: tuple[str, ...]) -> tuple[str, ...]:
        return (path[0].split("_")[0] if path[0].startswith(_LAYERS) else path[0], *path[1:])

    ours = traverse_util.flatten_dict(variables["params"])
    dtypes = {anonymous(path): leaf.dtype for path, leaf in ours.items()}
    theirs = traverse_util.flatten_dict(shapes["params"])
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtypes.get(anonymous(path), leaf.dtype))
        for path, leaf in theirs.items()
    }
    return {**shapes, "params": traverse_util.unflatten_dict(params)}


def _account(
    model, variables, *, tx, accumulation: int, activations: bool, inputs, cached: int | None
) -> Bytes:
    args, kwargs = inputs
    params, masks = variables["params"], variables.get(MASKS, {})
    parts = _parts(params, masks)
    found: Bytes = Counter()
    for path, leaf in traverse_util.flatten_dict(params).items():
        found[PARAMETERS, parts[path]] += _nbytes(leaf)
    for leaf in jax.tree.leaves(masks):
        found[METADATA, PRUNED] += _nbytes(leaf)
    if cached is not None:
        found[CACHED, "other"] = cached
    if tx is None:
        return found
    for path, leaf in traverse_util.flatten_dict(params).items():
        found[GRADIENTS, parts[path]] += _nbytes(leaf)
    found.update(_optimizer(jax.eval_shape(tx.init, params), parts))
    found.update(_copies(model, variables, args, kwargs, parts, held=accumulation > 1))
    if activations:
        found[ACTIVATIONS, "other"] = _activations(model, variables, args, kwargs)
    return found


def _parts(params: Any, masks: Any) -> dict[tuple[str, ...], str]:
    """The part of the model that each parameter belongs to, by its path."""
    flat, pruned = traverse_util.flatten_dict(params), set(traverse_util.flatten_dict(masks))
    stacked = any(path[0].startswith(_LAYERS) for path in flat)
    names = {"embedding": "embeddings", "scale": "norms"}
    names |= {ADAPTER_L: "adapters", ADAPTER_R: "adapters"}
    found = {}
    for path in flat:
        if path in pruned:
            found[path] = PRUNED
        elif path[-1] == "kernel":
            head = stacked and not path[0].startswith(_LAYERS)
            found[path] = HEADS if head else KERNELS
        elif path[-1] == "bias":
            found[path] = "norms" if (*path[:-1], "scale") in flat else "biases"
        else:
            found[path] = names.get(path[-1], "other")
    return found


def _optimizer(state: Any, parts: Mapping[tuple[str, ...], str]) -> Bytes:
    """Leaves whose path ends in that of a parameter are of the kind that stands before it."""
    found: Bytes = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = tuple(map(_name, path))
        ends = [i for i in range(1, len(names)) if names[i:] in parts]
        key = (
            (names[ends[0] - 1], parts[names[ends[0] :]])
            if ends
            else ("optimizer counters", "other")
        )
        found[key] += _nbytes(leaf)
    return found


def _copies(model, variables, args, kwargs, parts, *, held: bool) -> Bytes:
    try:
        layers = find_layers(model.apply, variables, *args, **kwargs)
    except ValueError:
        if jax.tree.leaves(variables.get(MASKS, {})):
            raise
        return {}  # a dense model without any SparseDense casts as Flax does
    flat = traverse_util.flatten_dict(variables["params"])
    made = jax.eval_shape(lambda v: working_copies(v, layers), dict(variables))
    groups: dict[str, Bytes] = {}
    for path, copies in traverse_util.flatten_dict(made).items():
        kernel = flat[path]
        count = 1 if held else math.prod(kernel.shape[:-2])
        group = groups.setdefault("" if held else path[0], Counter())
        if copies.values.dtype != kernel.dtype:
            group[CAST, parts[path]] += _nbytes(copies.values) // count
        if copies.transpose is not None:
            nbytes = sum(map(_nbytes, jax.tree.leaves(copies.transpose)))
            group[TRANSPOSED, parts[path]] += nbytes // count
    return max(groups.values(), key=lambda group: sum(group.values()), default={})


def _activations(model, variables, args, kwargs) -> int:
    def saved(variables, args, kwargs):
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        outputs, backward = jax.vjp(
            lambda params: model.apply({"params": params, **rest}, *args, **kwargs),
            variables["params"],
        )
        given = {id(x) for x in jax.tree.leaves((variables, args, kwargs))}
        return {id(x): x for x in jax.tree.leaves((backward, outputs)) if id(x) not in given}

    return sum(map(_nbytes, eval_shape(saved, dict(variables), args, kwargs).values()))


def _aligned(theirs: Bytes, ours: Bytes) -> Bytes:
    """The dense model's bytes, its kernels told apart as they are in the sparse one.

    Those that are dense in both have the same size; the rest are pruned in the sparse model.
    """
    found: Bytes = Counter(theirs)
    for kind in dict.fromkeys(kind for kind, _ in (*theirs, *ours)):
        if kind in (CAST, TRANSPOSED, ACTIVATIONS):
            continue
        kernels = (PRUNED, KERNELS, HEADS)
        total = sum(found.pop((kind, part), 0) for part in kernels)
        for part in (KERNELS, HEADS):
            if kept := ours.get((kind, part), 0):
                found[kind, part] = kept
                total -= kept
        if total < 0:
            raise ValueError(
                f"the dense model has {-total} bytes of {kind} less in its kernels than the sparse"
                " one keeps dense; dense= must be the same model without sparsity"
            )
        if total:
            found[kind, PRUNED] = total
    return dict(found)


def _dense_twin(model: nn.Module) -> nn.Module | None:
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config) and hasattr(config, "sparsity"):
        changes = {"sparsity": "dense", "adapter_rank": 0}
        return model.clone(config=dataclasses.replace(config, **changes))
    if isinstance(model, SparseDense):
        return model.clone(sparsity=None, adapter_rank=0)
    return None


def _name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
