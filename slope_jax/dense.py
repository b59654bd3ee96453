"""`SparseDense`: `flax.linen.Dense` with a kernel that is stored, trained and saved compressed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import (
    CompressedMatrix,
    Pattern,
    compress,
    compressed_shapes,
    epilogue,
    nm_matmul,
)
from pallas_kernels.epilogue import ACTIVATIONS, Norm
from slope_jax import masks
from slope_jax.layer_checks import check_call, check_layer, name_of
from slope_jax.matmul import Activated, Working, slope_matmul
from slope_jax.normed import Normed, Stream
from slope_jax.operands import DOUBLE_PRUNED
from slope_jax.sharded import sharded_matmul, split_sections
from slope_jax.sharding import active_mesh, cut_of

MASKS = "masks"
PRODUCT = "product"  # the name of results, for policies of jax.checkpoint
WORKING = "working"  # copies of kernels in the compute dtype, see slope_jax.working_copies
ADAPTER_L, ADAPTER_R = "adapter_l", "adapter_r"

Initializer = Callable[..., jax.Array]


def inverse_rank_normal(
    key: jax.Array, shape: tuple[int, int], dtype=jnp.float32, *, scale: float = 1.0
) -> jax.Array:
    """N(0, 1) scale / rank for an adapter_l (in, rank): with scale 1 the paper's N(0, 1) / r."""
    return jax.random.normal(key, shape, dtype) * (scale / shape[1])


class SparseDense(nn.Dense):
    """A drop-in for `flax.linen.Dense` whose kernel is N:M sparse along the input axis.

        y = activation(x @ w_r + (x @ adapter_l) @ adapter_r + bias)

    The parameter `kernel` holds the survivors only, shape (in * n / m, out), so gradients, moments,
    weight decay, clip norms and checkpoints of any optax optimizer are compressed as well. Which
    entries they are is fixed at initialisation and lies in the collection `masks` (uint8, packed),
    which is not differentiated: pass it beside `params`. The backward pass is the double-pruned one
    of `slope_matmul`.

    Of two layers around an activation, `down(up(x, activated=down.joins))` is `down(up(x))` with a
    shorter backward pass: the second one's kernel takes the gradient back through the activation.

    Where the collection `working` is given as well, its copies of the kernel are multiplied, and the
    kernel gets the gradient. See `slope_jax.working_copies`.

    All attributes of `flax.linen.Dense`, and:

    Attributes:
      sparsity: "n:m"; None, "dense" or n == m is `flax.linen.Dense` itself (with adapters, if asked for).
      adapter_rank: rank of the low-rank adapters `adapter_l` (in, rank) and `adapter_r`
        (rank, out); 0 for none. See `slope_jax.add_adapters` for adding them later.
      mask_init: "magnitude" of the initial kernel, "random", or a function (key, kernel) -> scores
        of the kernel's shape, of which the highest n per group stay.
      kernel_init: as in `flax.linen.Dense`; where it names axes (`flax.linen.with_partitioning`), both
        the values and the metadata have these names.
      adapter_l_init, adapter_r_init: initialisers; one of the two must give zeros for the function
        not to change when adapters join.
      activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu"; joins the product's kernel.
      implementation: of the sparse products, None for the best. See `slope_jax.explain`.
      backward: "double-pruned", or "exact" for the derivative itself. See `slope_matmul`.
      simulated: the kernel stays dense and is multiplied as it is; whoever holds the parameters masks
        it by `sparsity`. For methods whose masks change in training, to compare with: nothing is
        saved. `dot_general_cls` applies, as in `flax.linen.Dense`.
      sections: output columns of each projection, where the layer is several in one; they add up to
        `features`. On a mesh that cuts columns, each device takes its share of every projection:
        see `slope_jax.sharded.split_sections`.

    On a mesh with the axes of `slope_jax.sharding` (see `jax.set_mesh`) the layer's path decides how
    its kernel is cut, and products run under `jax.shard_map`.

    `precision` and `dtype` work as in `flax.linen.Dense`; dtype None takes the promoted dtype of
    input and parameters. `dot_general` and `dot_general_cls` cannot apply to a compressed kernel.

    Raises:
      ValueError: the sizes are not multiples of m, the rank exceeds the layer, the `masks`
        collection is missing, or an option has an unknown value.

    >>> layer = SparseDense(8, sparsity="2:4")
    >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 16)))
    >>> jax.tree.map(jnp.shape, variables)
    {'masks': {'kernel': (2, 8)}, 'params': {'bias': (8,), 'kernel': (8, 8)}}
    """

    sparsity: str | None = "2:4"
    adapter_rank: int = 0
    mask_init: str | Callable[[jax.Array, jax.Array], jax.Array] = "magnitude"
    adapter_l_init: Initializer = inverse_rank_normal
    adapter_r_init: Initializer = nn.initializers.zeros_init()
    activation: str | None = None
    implementation: str | None = None
    backward: str = DOUBLE_PRUNED
    simulated: bool = False
    sections: tuple[int, ...] | None = None

    @property
    def pattern(self) -> Pattern | None:
        """The pattern that the kernel is compressed by, None when it is stored dense."""
        if self.sparsity in (None, "dense") or self.simulated:
            return None
        pattern = Pattern.parse(self.sparsity)
        return None if pattern.is_dense else pattern

    @property
    def joins(self) -> bool:
        """Whether the product is one kernel with what joins it, or may be: it is sparse and whole."""
        return self.pattern is not None and not self._is_sharded()

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array | Activated | Normed,
        residual: jax.Array | Stream | None = None,
        *,
        activated: bool = False,
        apart: bool = False,
        gate: str | None = None,
    ) -> jax.Array | Activated | Stream | tuple[jax.Array, ...]:
        """(..., in) to (..., features), with the residual (..., features) added if there is one.

        With a stream as the residual, or the norm of an array that is not made yet, the product
        joins them in one kernel where it can, and has no gradient; a stream gives a stream. What is
        returned has the layer's dtype, whatever that of the residual is.

        Args:
          activated: hand on an `Activated` for another layer that `joins`, if this one does.
          apart: return a tuple of the `sections`, which the product's kernel writes apart.
          gate: an activation's name: return activation(gate) * up, (..., features / 2), of the halves
            [gate | up] of what it would be without, if this layer `joins`. The product's kernel makes
            it where no gradient follows; where one does, what it keeps has no name for policies.
        """
        norm, stream = None, residual if isinstance(residual, Stream) else None
        if isinstance(inputs, Normed):
            inputs, norm = inputs if self.joins else (inputs.made(), None)
        if not isinstance(inputs, Activated):
            inputs = jnp.asarray(inputs)
        check_layer(self, inputs)
        check_call(self, inputs, residual, activated, apart, gate)
        if gate is not None:
            if norm is not None:
                return self._joined(inputs, norm, None, activation=gate, gated=True)
            return self._sparse(inputs, activation=gate, gated=True)
        if apart:
            return self._apart(inputs, norm, residual)
        if self.joins and (norm is not None or stream is not None):
            return self._joined(inputs, norm, stream)
        added = residual if stream is None else stream.x
        if self.pattern is None:
            y = self._dense(inputs)
        elif self.activation is not None:
            # The product is needed again to know what entered the activation.
            handed_on = {"activated": True} if activated and self.joins else {}
            y = self._sparse(inputs, **handed_on)
        elif added is not None and self.joins:
            y, added = self._sparse(inputs, added), None  # the sum, for the caller to name
        else:
            y = checkpoint_name(self._sparse(inputs), PRODUCT)
        y = y if added is None else added.astype(y.dtype) + y
        return y if stream is None else Stream(y)

    def _apart(
        self, inputs: jax.Array | Activated, norm: Norm | None, residual: Any
    ) -> tuple[jax.Array, ...]:
        if self.pattern is None:
            split = split_sections if self._is_sharded() else epilogue.apart
            return tuple(split(self._dense(inputs), self.sections))
        if norm is not None:
            return self._joined(inputs, norm, None, sections=self.sections)
        options = {"apart": True} if self._is_sharded() else {"sections": self.sections}
        return checkpoint_name(self._sparse(inputs, **options), PRODUCT)

    def _joined(
        self, inputs: jax.Array, norm: Norm | None, residual: Stream | None, **options: Any
    ) -> jax.Array | Stream | tuple[jax.Array, ...]:
        kernel, working = self._kernel(inputs.shape[-1]), self._working()
        bias, adapter = self._terms(inputs.shape[-1])
        inputs, *_ = self.promote_dtype(inputs, kernel.values, bias, dtype=self.dtype)
        values = kernel.values if working is None or working.values is None else working.values
        y = nm_matmul(
            inputs,
            kernel.with_values(values.astype(inputs.dtype)),
            bias=bias,
            activation=options.pop("activation", self.activation),
            adapter=None if adapter is None else tuple(a.astype(inputs.dtype) for a in adapter),
            norm=norm,
            residual=None if residual is None else residual.x.astype(inputs.dtype),
            save_moments=residual is not None,
            precision=self.precision,
            implementation=self.implementation,
            **options,
        )
        return y if residual is None else Stream(*y)

    def _dense(self, inputs: jax.Array) -> jax.Array:
        if self._is_sharded():
            kernel = super().param(
                "kernel", self.kernel_init, (inputs.shape[-1], self.features), self.param_dtype
            )
            return checkpoint_name(self._product(inputs, kernel), PRODUCT)
        y = super().__call__(inputs)
        adapter = self._adapter(inputs.shape[-1])
        if adapter is not None:
            x, left, right = (a.astype(y.dtype) for a in (inputs, *adapter))
            hidden = jnp.matmul(x, left, precision=self.precision)
            y = y + jnp.matmul(hidden, right, precision=self.precision)
        y = checkpoint_name(y, PRODUCT)
        return y if self.activation is None else _activate(y, self.activation)

    def _sparse(
        self, inputs: jax.Array | Activated, residual: jax.Array | None = None, **options: Any
    ) -> jax.Array | Activated | tuple[jax.Array, ...]:
        return self._product(inputs, self._kernel(inputs.shape[-1]), residual, **options)

    def _product(
        self,
        inputs: jax.Array | Activated,
        kernel: CompressedMatrix | jax.Array,
        residual: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array | Activated | tuple[jax.Array, ...]:
        bias, adapter = self._terms(inputs.shape[-1])
        # Parameters are promoted for their dtypes alone: slope_matmul casts them, so that their
        # gradients stay in float32.
        values = getattr(kernel, "values", kernel)
        x = inputs.y if isinstance(inputs, Activated) else inputs
        x, *_ = self.promote_dtype(x, values, bias, dtype=self.dtype)
        inputs = inputs.astype(x.dtype) if isinstance(inputs, Activated) else x
        if self._is_sharded():
            matmul = functools.partial(
                sharded_matmul, cut=cut_of(self.path), sections=self.sections
            )
        else:
            residual = None if residual is None else residual.astype(x.dtype)
            matmul = functools.partial(slope_matmul, residual=residual)
        return matmul(
            inputs,
            kernel,
            working=self._working(),
            bias=bias,
            adapter=adapter,
            precision=self.precision,
            implementation=self.implementation,
            backward=self.backward,
            **({"activation": self.activation} | options),
        )

    def _terms(self, in_features: int) -> tuple[jax.Array | None, tuple | None]:
        """Bias and adapter, if there are any."""
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        return bias, self._adapter(in_features)

    @nn.nowrap
    def param(self, name: str, init_fn: Callable, *init_args, **init_kwargs):
        # `nn.Dense` asks for its kernel here, to cast it: a dense layer's copy steps in.
        value = super().param(name, init_fn, *init_args, **init_kwargs)
        working = self._working() if name == "kernel" and self.pattern is None else None
        return value if working is None else _cast_already(value, working.values)

    def _is_sharded(self) -> bool:
        plain = self.dot_general is None and self.dot_general_cls is None and not self.simulated
        initializing = self.scope is not None and self.is_initializing()
        return plain and active_mesh() is not None and not initializing

    def _working(self) -> Working | None:
        return self.get_variable(WORKING, "kernel")

    def _kernel(self, in_features: int) -> CompressedMatrix:
        shape = (in_features, self.features)
        if not (self.is_initializing() or self.has_variable(MASKS, "kernel")):
            raise ValueError(
                f"{name_of(self)}: the collection '{MASKS}' is missing; call apply with"
                f" {{'params': params, '{MASKS}': masks}}, both from init"
            )
        born = {}

        def init(key):
            if self.has_variable("params", "kernel"):  # Flax compares shapes, no more
                return jnp.zeros(compressed_shapes(shape, self.pattern)[0], self.param_dtype)
            made = self.kernel_init(key, shape, self.param_dtype)
            kernel = meta.unbox(made)
            mask = self._mask(jax.random.fold_in(key, 1), kernel)
            compressed = compress(kernel, self.pattern, mask=mask)
            # What names the axes of a kernel (`nn.with_partitioning`) names those of both.
            born["metadata"] = meta.replace_boxed(made, compressed.metadata)
            return meta.replace_boxed(made, compressed.values)

        values = self.param("kernel", init)
        metadata = meta.unbox(self.variable(MASKS, "kernel", lambda: born["metadata"]).value)
        return CompressedMatrix(values, metadata, self.pattern, 0, shape)

    def _mask(self, key: jax.Array, kernel: jax.Array) -> jax.Array:
        if callable(self.mask_init):
            return masks.score_mask(self.mask_init(key, kernel), self.pattern)
        if self.mask_init == "random":
            return masks.random_mask(key, kernel.shape, self.pattern)
        return masks.magnitude_mask(kernel, self.pattern)

    def _adapter(self, in_features: int) -> tuple[jax.Array, jax.Array] | None:
        rank = int(self.adapter_rank)  # NumPy's would make another dtype of what is divided by it
        if not rank:
            return None
        return (
            self.param(ADAPTER_L, self.adapter_l_init, (in_features, rank), self.param_dtype),
            self.param(ADAPTER_R, self.adapter_r_init, (rank, self.features), self.param_dtype),
        )


def _activate(y: jax.Array, activation: str) -> jax.Array:
    if activation == "relu":  # keeps one byte a number
        return ACTIVATIONS[activation](y)
    # The backward pass recomputes it, or it would keep several arrays of y's size.
    return jax.checkpoint(ACTIVATIONS[activation], prevent_cse=False)(y)


@jax.custom_vjp
def _cast_already(value: jax.Array, cast: jax.Array) -> jax.Array:
    """`value.astype(cast.dtype)`, of which the result is there: gradients as of the cast."""
    return cast


_cast_already.defvjp(
    lambda value, cast: (cast, jnp.zeros((0,), value.dtype)),
    lambda like, dy: (dy.astype(like.dtype), None),
)
