"""What may join a product: a norm of its input; low-rank term, bias, activation, residual of its output."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from pallas_kernels.compressed import check_array, check_dtype, check_pair
from pallas_kernels.sections import check_sizes

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}
RANK_MULTIPLE = 8  # of adapters in the kernels, which read 16 bytes at once
MOMENTS_BLOCK = 64  # entries whose moments are taken together


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm along the last axis, computed in float32: (x - mean) / sqrt(variance + epsilon) * scale + shift.

    * `scale`: (in,); `shift`: (in,), or None.
    * `centred`: False leaves the mean in, as RMSNorm does: x / sqrt(mean of squares + epsilon) * scale.
    * `moments`: those of x, float32 (..., blocks, 2) as of `moments`, where the product that made x has
      left them; a kernel that makes the norm then need not read all of x first. None: not known.
    """

    scale: jax.Array
    shift: jax.Array | None = None
    epsilon: float = dataclasses.field(default=1e-5, metadata={"static": True})
    centred: bool = dataclasses.field(default=True, metadata={"static": True})
    moments: jax.Array | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """The norm of x (..., in), in x's dtype."""
        values, row = x.astype(jnp.float32), (1,) * (x.ndim - 1) + (-1,)
        if self.centred:
            values = values - values.mean(-1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.square(values).mean(-1, keepdims=True) + self.epsilon)
        values = values * (factor * self.scale.astype(jnp.float32).reshape(row))
        if self.shift is not None:
            values = values + self.shift.astype(jnp.float32).reshape(row)
        return values.astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Epilogue:
    """y = activation(z) + residual, z = x @ w + t @ r + bias; all in float32, cast at the end.

    Or y = activation(z) * through'(source), in the place of the sum: a gradient on its way back.

    * `bias`: (out,), or None.
    * `low_rank`: t (..., rank) with x's leading axes and r (rank, out), both in x's dtype, or None.
    * `adapter`: l (in, rank) and r in x's dtype, in the place of `low_rank`: t is x @ l, or None.
    * `left_transposed`: the adapter's l is given as (rank, in).
    * `activation`: a key of `ACTIVATIONS`, or None.
    * `save_preactivation`: z is returned too, for the backward pass.
    * `save_moments`: those of y are returned too, for a norm of it; None where they are not known.
    * `norm`: of x, which is multiplied in its place; or None.
    * `residual`: (..., out) with x's leading axes, in x's dtype, or None.
    * `source`: likewise, what once entered the activation `through` (for relu, or left it); or None.
    * `save_sums`: the sums of what is multiplied over all its axes but the last are returned too,
      float32 (in,): of a gradient, that of a bias.
    * `save_first`: the adapter's first product t is returned too, after all else.
    * `sections`: how many outputs each of several arrays has that y then comes in, as a tuple; or None.
    * `gated`: y = activation(gate) * up, gate and up being the halves of z's outputs; not for `finish`.
    """

    bias: jax.Array | None = None
    low_rank: tuple[jax.Array, jax.Array] | None = None
    adapter: tuple[jax.Array, jax.Array] | None = None
    norm: Norm | None = None
    residual: jax.Array | None = None
    source: jax.Array | None = None
    activation: str | None = dataclasses.field(default=None, metadata={"static": True})
    save_preactivation: bool = dataclasses.field(default=False, metadata={"static": True})
    save_moments: bool = dataclasses.field(default=False, metadata={"static": True})
    through: str | None = dataclasses.field(default=None, metadata={"static": True})
    save_sums: bool = dataclasses.field(default=False, metadata={"static": True})
    save_first: bool = dataclasses.field(default=False, metadata={"static": True})
    left_transposed: bool = dataclasses.field(default=False, metadata={"static": True})
    sections: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    gated: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def is_empty(self) -> bool:
        terms = (self.bias, self.low_rank, self.adapter, self.activation, *self.joining)
        return all(term is None for term in terms)

    @property
    def joining(self) -> tuple[jax.Array | None, jax.Array | None]:
        """What has y's shape: residual and source, of which at least one is None."""
        return self.residual, self.source

    @property
    def saves(self) -> bool:
        """Whether more comes back than y, and t."""
        return self.save_preactivation or self.save_moments or self.save_sums

    def ungated(self) -> "Epilogue":
        """The same of z, gate and up side by side."""
        return dataclasses.replace(self, gated=False, activation=None)

    def without_joining(self) -> "Epilogue":
        """The same without what has y's shape, and moments, which are of both together."""
        nothing = {"residual": None, "source": None, "through": None, "save_moments": False}
        return dataclasses.replace(self, **nothing)

    def multiplied(self, x: jax.Array, precision=None) -> "Epilogue":
        """The same with the adapter's first product made: `low_rank` for `adapter`."""
        if self.adapter is None:
            return self
        return self.with_first(first_product(x, self.left, precision))

    def with_first(self, t: jax.Array) -> "Epilogue":
        """The same with t, the adapter's first product, which is not saved once more."""
        given = {"low_rank": (t, self.adapter[1]), "adapter": None}
        return dataclasses.replace(self, **given, save_first=False, left_transposed=False)

    @property
    def left(self) -> jax.Array:
        """The adapter's l, (in, rank)."""
        return self.adapter[0].T if self.left_transposed else self.adapter[0]

    def without_nothing(self) -> "Epilogue":
        """The same without an adapter or low-rank term of rank 0, whose t is not saved."""
        adapter, low_rank = (
            pair if pair is None or pair[1].shape[0] else None
            for pair in (self.adapter, self.low_rank)
        )
        of_adapter = {
            name: getattr(self, name) and adapter is not None
            for name in ("save_first", "left_transposed")
        }
        return dataclasses.replace(self, adapter=adapter, low_rank=low_rank, **of_adapter)

    def normalised(self, x: jax.Array) -> tuple[jax.Array, "Epilogue"]:
        """The norm of x, made, and what is left to do."""
        if self.norm is None:
            return x, self
        return self.norm(x), dataclasses.replace(self, norm=None)

    def check(self, x: jax.Array, out: int) -> None:
        """Raises a ValueError unless this fits x (..., in) times (in, out)."""
        check_activation(self.activation)
        self._check_norm(x)
        self._check_joining(x, out)
        for name in ("save_sums", "save_first"):
            if getattr(self, name) and self.norm is not None:
                raise ValueError(f"{name}=True and a norm are both given; make the norm first")
        for name in ("save_first", "left_transposed"):
            if getattr(self, name) and self.adapter is None:
                raise ValueError(f"{name}=True needs an adapter, (l, r)")
        if self.save_preactivation and self.activation is None:
            raise ValueError("save_preactivation=True needs an activation; y is what enters it")
        if self.sections is not None:
            self._check_sections(out)
        if self.gated is not False:
            self._check_gated(out)
        if self.bias is not None:
            check_array(self.bias, "bias")
            check_dtype(self.bias.dtype, "bias")
            if self.bias.shape != (out,):
                raise ValueError(f"bias has shape {self.bias.shape}; it must be (out,), ({out},)")
        if self.low_rank is not None and self.adapter is not None:
            raise ValueError(
                "low_rank and adapter are both given; leave out one, they are the same"
            )
        if self.low_rank is not None:
            self._check_low_rank(x, out)
        if self.adapter is not None:
            self._check_adapter(x, out)

    def _check_sections(self, out: int) -> None:
        check_sizes(self.sections, out, "w")
        if self.save_preactivation or self.save_moments:
            raise ValueError(
                "sections and what is saved of y (a preactivation, moments) are both given; save it of"
                " a y in one piece"
            )

    def _check_gated(self, out: int) -> None:
        check_gated(self.gated, out)
        if self.saves or self.sections is not None or any(a is not None for a in self.joining):
            raise ValueError(
                "gated=True goes with a bias, an adapter, a norm and an activation alone: make what is"
                " saved, sections, and what joins y in a product without it"
            )

    def _check_joining(self, x: jax.Array, out: int) -> None:
        check_activation(self.through, "through goes back through")
        if (self.through is None) != (self.source is None):
            raise ValueError("through needs both: an activation's name, and what entered it")
        if self.residual is not None and self.source is not None:
            raise ValueError(
                "residual and through are both given; a product is added to one, or goes back"
                " through the other"
            )
        wanted = (*x.shape[:-1], out)
        for name, array in zip(("residual", "through"), self.joining, strict=True):
            if array is not None:
                check_array(array, name)
            if array is not None and (array.shape != wanted or array.dtype != x.dtype):
                raise ValueError(
                    f"{name} is {array.dtype}{list(array.shape)}; it must be"
                    f" {x.dtype}{list(wanted)}"
                )

    def _check_norm(self, x: jax.Array) -> None:
        if self.norm is None:
            return
        if not isinstance(self.norm, Norm):
            raise TypeError(f"norm is a {type(self.norm).__name__}; it must be a Norm: Norm(scale)")
        for name in ("scale", "shift"):
            array = getattr(self.norm, name)
            if array is not None or name == "scale":
                check_array(array, f"the norm's {name}")
            if array is not None and array.shape != x.shape[-1:]:
                raise ValueError(
                    f"the norm's {name} has shape {array.shape}; it must be (in,), {x.shape[-1:]}"
                )
        if self.norm.moments is not None:
            check_array(self.norm.moments, "the norm's moments")
        known, wanted = self.norm.moments, (*x.shape[:-1], *moments_shape(x.shape[-1]))
        if known is not None and (known.shape != wanted or known.dtype != jnp.float32):
            raise ValueError(
                f"the norm's moments are {known.dtype}{list(known.shape)}; of x {x.shape} they must"
                f" be float32{list(wanted)}"
            )

    def _check_low_rank(self, x: jax.Array, out: int) -> None:
        check_pair(self.low_rank, "low_rank")
        t, r = self.low_rank
        if r.ndim != 2 or t.shape != (*x.shape[:-1], r.shape[0]) or r.shape[1] != out:
            raise ValueError(
                f"low_rank has shapes {t.shape} and {r.shape}; they must be"
                f" {(*x.shape[:-1], 'rank')} and ('rank', {out})"
            )
        if t.dtype != x.dtype or r.dtype != x.dtype:
            raise ValueError(f"low_rank is {t.dtype} and {r.dtype}; both must be x's {x.dtype}")

    def _check_adapter(self, x: jax.Array, out: int) -> None:
        check_pair(self.adapter, "adapter")
        left, r = self.adapter
        wanted, known = (x.shape[-1], "rank"), (x.shape[-1], *r.shape[:1])
        if self.left_transposed:
            wanted, known = wanted[::-1], known[::-1]
        if r.ndim != 2 or left.shape != known or r.shape[1] != out:
            raise ValueError(
                f"adapter has shapes {left.shape} and {r.shape}; they must be"
                f" {wanted} and ('rank', {out})"
            )
        if left.dtype != x.dtype or r.dtype != x.dtype:
            raise ValueError(f"adapter is {left.dtype} and {r.dtype}; both must be x's {x.dtype}")


def moments_shape(size: int) -> tuple[int, int]:
    """Of the moments of `size` entries: those of whole blocks, and of a last one that may be smaller."""
    return -(-size // MOMENTS_BLOCK), 2


def moments(x: jax.Array) -> jax.Array:
    """Of each 64 entries of x (..., size): their sum, and that of their squares about their mean.

    Returns:
      float32 (..., blocks, 2).

    >>> moments(jnp.array([1.0, 2.0, 3.0])).tolist()
    [[6.0, 2.0]]
    """
    size = x.shape[-1]
    blocks, _ = moments_shape(size)
    widths = [(0, 0)] * (x.ndim - 1) + [(0, blocks * MOMENTS_BLOCK - size)]
    values, there = (
        jnp.pad(a, widths).reshape(*x.shape[:-1], blocks, MOMENTS_BLOCK)
        for a in (x.astype(jnp.float32), jnp.ones(x.shape, jnp.float32))
    )
    total = values.sum(-1, keepdims=True)
    away = (values - total / there.sum(-1, keepdims=True)) * there
    return jnp.concatenate([total, jnp.square(away).sum(-1, keepdims=True)], axis=-1)


def padded_rank(array: jax.Array, axis: int) -> jax.Array:
    """An adapter with zeros along the axis of the rank, up to a multiple of `RANK_MULTIPLE`."""
    missing = -array.shape[axis] % RANK_MULTIPLE
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return jnp.pad(array, widths) if missing else array


def first_product(x: jax.Array, left: jax.Array, precision=None) -> jax.Array:
    """x @ left, by XLA."""
    # Without the barrier, XLA multiplies twice in a scan: for now, and into the stack for later.
    return jax.lax.optimization_barrier(jnp.matmul(x, left, precision=precision))


def check_activation(name: str | None, what: str = "activation is") -> None:
    """Raises a ValueError unless it is None or the name of one."""
    if name is not None and not (isinstance(name, str) and name in ACTIVATIONS):
        raise ValueError(
            f"{what} {name!r}; it must be None or one of {', '.join(map(repr, ACTIVATIONS))}"
        )


def check_gated(gated: bool, out: int) -> None:
    """Raises a ValueError unless it is False, or True and the outputs have halves."""
    if not isinstance(gated, bool):
        raise ValueError(f"gated is {gated!r}; it must be True or False, beside activation=...")
    if gated and out % 2:
        raise ValueError(
            f"gated=True halves the outputs of w, which has {out}; give an even number"
        )


def finish(z: jax.Array, epilogue: Epilogue, out_dtype, precision=None, *, x=None):
    """The result of a product whose float32 sum is z = x @ w, in plain JAX.

    Returns:
      y, or a tuple of y and what is saved: z, None for moments that nobody asks for here, and sums.

    Args:
      epilogue: without an adapter and a norm; see `Epilogue.multiplied`, `Epilogue.normalised`.
      x: what is multiplied, for its sums.
    """
    if epilogue.low_rank is not None:
        t, r = epilogue.low_rank
        z = z + jnp.matmul(t, r, precision=precision, preferred_element_type=jnp.float32)
    if epilogue.bias is not None:
        bias = epilogue.bias.astype(jnp.float32)
        z = z + bias.reshape((1,) * (z.ndim - 1) + (-1,))
    y = z if epilogue.activation is None else ACTIVATIONS[epilogue.activation](z)
    if epilogue.residual is not None:
        y = y + epilogue.residual.astype(jnp.float32)
    if epilogue.source is not None:
        y = gradient_through(epilogue.through, epilogue.source, y)
    saved = (z.astype(out_dtype),) if epilogue.save_preactivation else ()
    saved += (None,) if epilogue.save_moments else ()
    saved += (sums_of(x),) if epilogue.save_sums else ()
    y = y.astype(out_dtype)
    if epilogue.sections is not None:
        y = apart(y, epilogue.sections)
    return (y, *saved) if saved else y


def gate(z: jax.Array, activation: str | None) -> jax.Array:
    """activation(gate) * up of z (..., [gate | up]), in float32, returned in z's dtype."""
    return gate_of(*jnp.split(z, 2, axis=-1), activation)


def gate_of(first: jax.Array, second: jax.Array, activation: str | None) -> jax.Array:
    """`gate` of its two halves."""
    opened = first.astype(jnp.float32)
    if activation is not None:
        opened = ACTIVATIONS[activation](opened)
    return (opened * second.astype(jnp.float32)).astype(first.dtype)


def gated_apart(result: jax.Array | tuple[jax.Array, ...], activation: str | None):
    """What a gated product returns, from what it does ungated."""
    if not isinstance(result, tuple):
        return gate(result, activation)
    return gate(result[0], activation), *result[1:]


def apart(y: jax.Array, sections: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """y (..., out) as arrays of so many outputs each."""
    ends = list(itertools.accumulate(sections))
    return tuple(jnp.split(y, ends[:-1], axis=-1))


def sums_of(x: jax.Array) -> jax.Array:
    """Over all axes but the last, in float32."""
    return x.astype(jnp.float32).sum(range(x.ndim - 1))


def gradient_through(activation: str, source: jax.Array, dy: jax.Array) -> jax.Array:
    """The gradient of what entered an activation, float32, by JAX's own derivative.

    Args:
      source: what entered it; for relu, what left it will do.
    """
    back = jax.vjp(ACTIVATIONS[activation], source.astype(jnp.float32))[1]
    return back(dy.astype(jnp.float32))[0]
