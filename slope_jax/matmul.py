"""The sparse linear map and its double-pruned gradient, as one `jax.custom_vjp`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    CompressedMatrix,
    decompress,
    narrow_matmul,
    nm_matmul,
    nm_sddmm,
    nm_transpose,
)
from pallas_kernels.compressed import check_compressed
from pallas_kernels.dispatch import check_implementation
from pallas_kernels.epilogue import gate, gradient_through, sums_of
from pallas_kernels.sections import Sections
from pallas_kernels.varying import alike
from slope_jax.operands import (
    DOUBLE_PRUNED,
    EXACT,
    as_array,
    check_activated,
    check_gate,
    check_operands,
    check_sections,
    check_terms,
)


class Working(NamedTuple):
    """What is multiplied in the place of a weight, made once for many products.

    Attributes:
      values: the weight's values in x's dtype; None casts them in each forward pass.
      transpose: `nm_transpose` of the weight, in x's dtype; None makes it in each backward pass.
    """

    values: jax.Array | None = None
    transpose: CompressedMatrix | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Activated:
    """What an activation made, for a product that takes its own gradient back through it.

    The kernel that makes the gradient of y then makes that of z of it while it has the numbers at
    hand, not in a pass over memory of its own. By contract, the gradient that this y receives is that
    of z; so nothing but `slope_matmul` and `SparseDense` may take it.

    Attributes:
      y: (..., features).
      z: what entered the activation, in y's dtype; None for relu, whose y says where it is flat.
      activation: a name of `slope_matmul`'s.
    """

    y: jax.Array
    z: jax.Array | None
    activation: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.y.shape

    @property
    def dtype(self) -> Any:
        return self.y.dtype

    def astype(self, dtype) -> "Activated":
        """Both y and z in this dtype."""
        y, z = (a if a is None else a.astype(dtype) for a in (self.y, self.z))
        return dataclasses.replace(self, y=y, z=z)


def slope_matmul(
    x: jax.Array | Activated,
    w: CompressedMatrix,
    *,
    working: Working | None = None,
    bias: jax.Array | None = None,
    activation: str | None = None,
    adapter: tuple[jax.Array, jax.Array] | None = None,
    residual: jax.Array | None = None,
    activated: bool = False,
    sections: tuple[int, ...] | None = None,
    gated: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
    backward: str = DOUBLE_PRUNED,
) -> jax.Array | Activated | tuple[jax.Array, ...]:
    """activation(x @ w + (x @ l) @ r + bias) + residual, with SLoPe's double-pruned backward pass.

        z  = x @ w_r + (x @ l) @ r + bias,  y = activation(z) + residual, or activation(gate) * up
        dz = dy * activation'(z)
        dx = dz @ w_rc.T + (dz @ r.T) @ l.T     w_rc: w_r pruned again, n:m along the output axis
        dw = (x.T @ dz) * mask_r                only the survivors' values

    (SLoPe, section 2.1, algorithm 1; adapters, section 2.2.) dx is therefore not the derivative
    of y. Bias, activation, adapter and residual join the sparse product's own kernel where one runs,
    and so does a gate where no gradient follows.

    Args:
      x: (..., in), float32, bfloat16 or float16; the products run in its dtype and accumulate in
        float32. Or an `Activated`: dx then goes back through its activation in the kernel.
      w: (in, out), compressed along the input axis, in any of these dtypes; in and out are
        multiples of m. The double pruning selects before w is cast to x's dtype.
      working: copies of w, which is then neither read nor kept for the backward pass; it gets the
        same gradient, in its own dtype, and the copies get none. They must be those of w.
      bias: (out,). adapter: l (in, rank), r (rank, out). In any of these dtypes as well.
      activation: None, "relu", "gelu" (exact), "gelu_tanh" or "silu".
      residual: (..., out) in x's dtype; not together with an activation.
      activated: return an `Activated` of the activation, for another product to multiply.
      sections: outputs of each of several arrays that y then comes in, as a tuple: of several
        projections in one matrix, without an activation and a residual. The kernel writes them apart.
      gated: y is activation(gate) * up, (..., out / 2), gate and up being the halves [gate | up] of z. Where
        a gradient follows, z is kept for it, and y made of z as that is rounded to x's dtype; the kernel,
        where none does, rounds y alone.
      precision: of the products, as in `jax.lax.dot_general`.
      implementation: of the products; None for the best. See `pallas_kernels.choose`.
      backward: "double-pruned", or "exact": dx = dz @ w_r.T + ..., the derivative, by a dense
        product. For comparisons: it is what the second pruning approximates.

    Returns:
      (..., out) in x's dtype, half of that if gated, an `Activated` of it, or a tuple of its sections. Gradients are in the dtypes
      of their operands, that of w straight from float32 accumulators; there are no second derivatives.

    Raises:
      TypeError: w is no CompressedMatrix, or something else no array, or no pair of them.
      ValueError: shapes or dtypes do not fit, the activation or `backward` is unknown, or what is
        given excludes each other.

    >>> import jax.numpy as jnp
    >>> from pallas_kernels import compress
    >>> w = compress(jnp.arange(16.0).reshape(4, 4), "2:4")
    >>> slope_matmul(jnp.ones((1, 4)), w, bias=jnp.ones(4)).tolist()
    [[21.0, 23.0, 25.0, 27.0]]
    """
    working = Working() if working is None else working
    through, source = None, None
    if isinstance(x, Activated):
        through, source, x = x.activation, x.z, x.y
        check_activated(through, source, x)
    x = as_array(x, "x")
    residual = None if residual is None else as_array(residual, "residual")
    check_compressed(w)
    check_operands(x, w, working, adapter, backward)
    check_terms(x, w, activation, residual, activated)
    check_sections(sections, activation, residual)
    check_gate(gated, w.shape[1], residual, activated, sections)
    added = residual is not None
    options = Options(
        precision, implementation, w.dtype, backward, through, activated, added, sections, gated
    )
    terms = Terms(bias, adapter, residual, source)
    x, w, working, terms = alike((x, w, working, terms))
    y = _slope_matmul(x, w, working, terms, activation, options)
    return Activated(*y, activation) if activated else y


class Options(NamedTuple):
    precision: jax.lax.PrecisionLike
    implementation: str | None
    dtype: jnp.dtype  # of the weight, hence of its gradient
    backward: str
    through: str | None = None  # the activation that made x, where dx is to go back through it
    activated: bool = False
    added: bool = False  # to a residual
    sections: tuple[int, ...] | None = None
    gated: bool = False


class Terms(NamedTuple):
    """What joins the product, and what entered the activation that made x."""

    bias: jax.Array | None = None
    adapter: tuple[jax.Array, jax.Array] | None = None
    residual: jax.Array | None = None
    source: jax.Array | None = None


class Saved(NamedTuple):
    """What a pass keeps beside y for the backward pass: what enters the activation, and x @ l."""

    preactivation: bool = False
    first_product: bool = False


NOTHING = Saved()


def saved_with(activation: str | None, gated: bool = False) -> Saved:
    """What the backward pass needs: where relu is flat, its y says."""
    return Saved(preactivation=gated or activation not in (None, "relu"), first_product=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _slope_matmul(x, w, working, terms, activation, options):
    saved = saved_with(activation)._replace(first_product=False) if options.activated else NOTHING
    y, z, _ = product(x, w, working, terms, activation, options, saved)
    return _handed_on(y, z, activation) if options.activated else y


def _handed_on(y, z, activation):
    """The arrays of an `Activated`."""
    return y, None if activation == "relu" else z


def product(x, w, working, terms: Terms, activation, options, saved=NOTHING):
    """y, and z and x @ l where they are saved."""
    first = saved.first_product and terms.adapter is not None
    if options.gated and saved.preactivation:
        z, _, t = product(
            x,
            w,
            working,
            terms,
            None,
            options._replace(gated=False),
            NOTHING._replace(first_product=first),
        )
        return gate(z, activation), z, t
    y = nm_matmul(
        x,
        w.with_values(w.values.astype(x.dtype) if working.values is None else working.values),
        bias=terms.bias,
        activation=activation,
        adapter=_cast(terms.adapter, x.dtype),
        residual=terms.residual,
        save_preactivation=saved.preactivation,
        save_first=first,
        sections=options.sections,
        gated=options.gated,
        precision=options.precision,
        implementation=options.implementation,
    )
    y, *others = y if saved.preactivation or first else (y,)
    t = others.pop() if first else None
    return y, others.pop() if saved.preactivation else None, t


def _forward(x, w, working, terms, activation, options):
    saved = saved_with(activation, options.gated)
    y, z, t = product(x, w, working, terms, activation, options, saved)
    if None not in working:  # the backward pass then reads w's positions alone
        w = w.with_values(working.values)
    out = _handed_on(y, z, activation) if options.activated else y
    entered = y if activation == "relu" and not options.gated else z
    terms = terms._replace(residual=None)
    return out, (x, w, working.transpose, terms, None if options.activated else entered, t)


def backward(activation, options, residuals, dy):
    """Gradients of x, w, its copies (none) and terms."""
    precision, implementation = options.precision, options.implementation
    x, w, transpose, terms, z, t = residuals
    if options.activated:  # that of z, by the contract of `Activated`
        dy, _ = dy
        activation = None
    if options.sections is not None:
        dy = Sections(tuple(dy))
        if terms.adapter is not None or options.backward == EXACT:  # other products read it, too
            dy = dy.whole()
    dz = gradient_of_gate(activation, z, dy) if options.gated else dy
    dz = gradient_of_product(None if options.gated else activation, x, z, dz)
    if options.backward == EXACT:
        dt = None if terms.adapter is None else gradient_of_first(dz, terms.adapter, options)
        dx, sums = _exact_dx(dz, dt, w, x, terms, options), sums_of(dz)
    else:
        if transpose is None:
            asked = for_transposes(implementation)
            transpose = nm_transpose(w, dtype=x.dtype, implementation=asked)
        through = options.through and (options.through, _source(x, terms))
        biased, adapted = terms.bias is not None, terms.adapter is not None
        dx = nm_matmul(
            dz,
            transpose,
            adapter=_turned(_cast(terms.adapter, dz.dtype)),
            left_transposed=adapted,
            through=through,
            save_sums=biased,
            save_first=adapted,
            precision=precision,
            implementation=implementation,
        )
        dx, *others = dx if biased or adapted else (dx,)
        dt = others.pop() if adapted else None
        sums = others.pop() if biased else None
    dadapter = None
    if terms.adapter is not None:
        dadapter = gradients_of_adapter(x, t, dz, dt, terms.adapter, options)
    dw = nm_sddmm(
        x, dz, w, out_dtype=options.dtype, precision=precision, implementation=implementation
    )
    no_gradient = np.zeros(w.metadata.shape, jax.dtypes.float0)
    dw = CompressedMatrix(dw, no_gradient, w.pattern, w.axis, w.shape)
    dbias = None if terms.bias is None else sums.astype(terms.bias.dtype)
    return dx, dw, None, Terms(dbias, dadapter, dy if options.added else None)


def for_transposes(implementation: str | None) -> str | None:
    """What is asked of `nm_transpose` where products are asked for so: it has no kernel for patterns other
    than 2:4, of which products have one."""
    check_implementation(implementation)
    return "xla" if implementation == "xla" else None


def _source(x, terms: Terms):
    return x if terms.source is None else terms.source


def gradient_of_product(activation, x, z, dy):
    """That of what enters the activation, in x's dtype. The gradient of the bias is its sums, rounded as it is."""
    dz = dy if activation is None else gradient_through(activation, z, dy)
    return dz.astype(x.dtype)


def gradient_of_gate(activation, z, dy):
    """That of z, of which `gate` made y."""
    return jax.vjp(lambda z: gate(z, activation), z)[1](dy)[0]


def gradient_of_first(dz, adapter, options: Options):
    """dz @ r.T, that of x @ l, where no other product makes it."""
    _, right = _cast(adapter, dz.dtype)
    precision, implementation = options.precision, options.implementation
    return narrow_matmul(
        dz, right, transposed=True, precision=precision, implementation=implementation
    )


def gradients_of_adapter(x, t, dz, dt, adapter, options: Options):
    """Those of l and r, in their dtypes."""

    def over_tokens(a, b, like):
        tokens = tuple(range(a.ndim - 1))
        product = jax.lax.dot_general(
            a,
            b,
            ((tokens, tokens), ((), ())),
            precision=options.precision,
            preferred_element_type=jnp.float32,
        )
        return product.astype(like.dtype)

    return over_tokens(x, dt, adapter[0]), over_tokens(t, dz, adapter[1])


def _exact_dx(dz, dt, w, x, terms, options):
    """By a dense product."""
    w = decompress(w.with_values(w.values.astype(dz.dtype)))
    dx = jnp.matmul(dz, w.T, precision=options.precision)
    if dt is not None:
        left, _ = _cast(terms.adapter, dz.dtype)
        dx = dx + jnp.matmul(dt, left.T, precision=options.precision)
    if options.through is None:
        return dx
    return gradient_through(options.through, _source(x, terms), dx).astype(x.dtype)


def _cast(adapter, dtype):
    return None if adapter is None else tuple(a.astype(dtype) for a in adapter)


def _turned(adapter):
    """The adapter of dx: r, which is its l transposed, and l.T."""
    return None if adapter is None else (adapter[1], adapter[0].T)


# Where a layer is rematerialised, its first pass then runs `product` without the preactivation, but for
# an `Activated`, whose z is a result.
_slope_matmul.defvjp(_forward, backward, optimize_remat=True)
