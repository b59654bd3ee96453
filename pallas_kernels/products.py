"""The three products of a compressed weight, and that of an adapter: each validates once, then dispatches."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, xla
from pallas_kernels.compressed import (
    DTYPES,
    CompressedMatrix,
    check_array,
    check_compressed,
    check_dtype,
)
from pallas_kernels.epilogue import Epilogue, Norm, first_product, gated_apart
from pallas_kernels.sections import Sections, whole


def nm_matmul(
    x: jax.Array | Sections,
    w: CompressedMatrix,
    *,
    bias: jax.Array | None = None,
    activation: str | None = None,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    adapter: tuple[jax.Array, jax.Array] | None = None,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    through: tuple[str, jax.Array] | None = None,
    save_preactivation: bool = False,
    save_moments: bool = False,
    save_sums: bool = False,
    save_first: bool = False,
    left_transposed: bool = False,
    sections: tuple[int, ...] | None = None,
    gated: bool = False,
    out_dtype=None,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array | tuple[jax.Array, ...] | None, ...]:
    """y = activation(x @ w + t @ r + bias) + residual, accumulated in float32.

    Args:
      x: (..., in), float32, bfloat16 or float16; or `Sections` of it, which the kernel reads where they
        are if all are multiples of 64, and there is no adapter and no norm.
      w: (in, out), compressed along the input axis (axis 0), in x's dtype.
      bias: (out,), added in float32.
      activation: "relu", "gelu" (exact), "gelu_tanh" or "silu"; None for none. In 16-bit results
        of more than 64 tokens the kernels may err by 3e-4 of its argument's size: less than bfloat16's
        rounding where the result is near the argument, more where it is near 0, at negative ones.
      low_rank: t (..., rank) and r (rank, out) in x's dtype, as of adapters: t = x @ adapter_l.
      adapter: l (in, rank) and r in x's dtype, in the place of `low_rank`, with t = x @ l. The
        kernels multiply it themselves where tokens are few, and for many where that was timed to be faster.
      norm: x's norm is multiplied in its place, rounded to x's dtype. For few tokens a kernel makes
        it on the way, from x's moments.
      residual: (..., out) in x's dtype, added last, in float32.
      through: an activation's name and what once entered it, (..., out) in x's dtype; for "relu",
        what left it will do. y is multiplied by its derivative there, as a gradient on its way back;
        not together with a residual. In 16-bit results the kernels' derivatives may err by 1e-3.
      save_preactivation: return what enters the activation as well.
      save_moments: return y's moments as well, for a `norm` of it; None where no kernel takes them.
      save_sums: return the sums of what is multiplied over its leading axes as well, float32 (in,).
      save_first: return t = x @ l of the adapter as well, (..., rank); not together with a norm.
      left_transposed: the adapter's l is (rank, in): on a way back, that is the r of the way there.
      sections: how many outputs each of several arrays has that y then comes in, as a tuple: of several
        projections in one matrix. The kernel writes them apart where all are multiples of 64; no
        preactivation and no moments are saved of them.
      gated: y is activation(gate) * up, (..., out / 2), gate and up being the halves [gate | up] of the
        outputs; not together with a residual, `through`, sections, nor what else is saved than t. Where no
        kernel does so on the way (`choose_gate`), gate and up are rounded to `out_dtype` first.
      out_dtype: dtype of y and the preactivation; None for x's.
      precision: of the products, as in `jax.lax.dot_general`.
      implementation: None for the best, or a name; `choose` tells which and why.

    Returns:
      y (..., out), or a tuple of y, the preactivation, the moments, the sums and t, those that are
      saved.

    Raises:
      TypeError: w is no CompressedMatrix, x or what joins the product no array, or no pair of them.
      ValueError: shapes or dtypes do not fit, or w is compressed along the output axis.
      NotImplementedError: the implementation asked for cannot run this here; or a gradient is asked of
        a kernel, which has none: `slope_jax.slope_matmul` has one, and so has implementation="xla".

    >>> from pallas_kernels import compress
    >>> w = compress(jnp.ones((8, 3)), "2:4")
    >>> nm_matmul(jnp.ones((2, 8)), w, bias=jnp.arange(3.0)).tolist()
    [[4.0, 5.0, 6.0], [4.0, 5.0, 6.0]]
    """
    _check_matrix(w)
    if w.axis != 0:
        raise ValueError(
            "w is compressed along axis 1 (output); nm_matmul contracts the compressed axis, so it"
            " needs axis 0: compress(w, pattern, axis=0), or nm_transpose(w)"
        )
    _check_rows(x, w.shape[0], "x", "in")
    _check_same_dtype(x, w.values, "x", "w.values")
    name, source = (None, None) if through is None else _through(through)
    epilogue = Epilogue(
        bias=bias,
        low_rank=low_rank,
        adapter=adapter,
        norm=norm,
        residual=residual,
        source=source,
        activation=activation,
        save_preactivation=save_preactivation,
        save_moments=save_moments,
        through=name,
        save_sums=save_sums,
        save_first=save_first,
        left_transposed=left_transposed,
        sections=None if sections is None else _sections(sections),
        gated=gated,
    )
    epilogue.check(x, w.shape[1])
    given, epilogue = epilogue, epilogue.without_nothing()
    out_dtype = _written(out_dtype or x.dtype)
    choice = dispatch.choose(_query("nm_matmul", w, x, out_dtype), implementation)
    x = x if choice.implementation == "mosaic" else whole(x)
    run = functools.partial(_run(choice).nm_matmul, x, w, out_dtype, precision)
    if epilogue.gated and choice.implementation != "mosaic":
        run = functools.partial(_gated_by_xla, run)
    if not given.save_first or (choice.implementation == "mosaic" and epilogue.save_first):
        return run(epilogue)
    options = {"transposed": left_transposed, "precision": precision}
    t = narrow_matmul(whole(x), given.adapter[0], **options, implementation=implementation)
    result = run(given.with_first(t).without_nothing())
    return (*result, t) if given.saves else (result, t)


def _gated_by_xla(run, epilogue: Epilogue):
    return gated_apart(run(epilogue.ungated()), epilogue.activation)


def nm_sddmm(
    x: jax.Array,
    dy: jax.Array | Sections,
    w: CompressedMatrix,
    *,
    into: jax.Array | None = None,
    out_dtype=None,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """The values of (x.T @ dy) * mask, where w's metadata keeps; accumulated in float32.

    Args:
      x: (..., in), float32, bfloat16 or float16; the leading axes are tokens.
      dy: (..., out), same tokens and dtype; or `Sections` of it, as of `nm_matmul`'s x.
      w: (in, out); only its positions are read.
      into: an array of the shape of `w.values`, float32 or `out_dtype`, that the product is added
        to in float32, as when gradients accumulate; None for none. The kernels add in place where
        it is donated and has `out_dtype`.
      out_dtype: dtype of the result; None for that of `into`, or else of `w.values`.
      precision: of the product, as in `jax.lax.dot_general`.
      implementation: None for the best, or a name.

    Returns:
      An array of the shape of `w.values`.

    Raises:
      TypeError: w is no CompressedMatrix, or x or dy no array.
      ValueError: shapes or dtypes do not fit.

    >>> from pallas_kernels import compress
    >>> w = compress(jnp.ones((4, 1)), "2:4")
    >>> nm_sddmm(jnp.ones((3, 4)), jnp.ones((3, 1)), w, into=10 * jnp.ones((2, 1))).tolist()
    [[13.0], [13.0]]
    """
    _check_matrix(w)
    if isinstance(x, Sections):
        raise TypeError(
            "x comes in sections; nm_sddmm takes those of dy, and x in one piece: whole"
        )
    _check_rows(x, w.shape[0], "x", "in")
    _check_rows(dy, w.shape[1], "dy", "out")
    _check_same_dtype(x, dy, "x", "dy")
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"x {x.shape} and dy {dy.shape} must have the same tokens")
    if into is not None:
        check_array(into, "into")
    out_dtype = _written(out_dtype or (w if into is None else into).dtype)
    _check_into(into, w, out_dtype)
    choice = dispatch.choose(_query("nm_sddmm", w, x), implementation)
    dy = dy if choice.implementation == "mosaic" else whole(dy)
    return _run(choice).nm_sddmm(x, dy, w, out_dtype, precision, into)


def nm_transpose(
    w: CompressedMatrix, *, dtype=None, implementation: str | None = None
) -> CompressedMatrix:
    """The double-pruned transpose: w.T pruned again, n:m along its own input axis.

    In each group of m consecutive outputs of w the n largest magnitudes survive; ties, zeros and
    NaN as in `compress`. Groups with n survivors or fewer lose nothing. (SLoPe, section 2.)

    Args:
      w: (in, out), compressed along the input axis; m divides out.
      dtype: dtype of the new values; None for w's. Selection is made before the cast.
      implementation: None for the best, or a name.

    Returns:
      A compressed (out, in) matrix with axis 0, ready for `nm_matmul(dy, ...)`.

    Raises:
      TypeError: w is no CompressedMatrix.
      ValueError: w is compressed along axis 1, or m does not divide the output axis.
    """
    check_compressed(w)
    if w.axis != 0:
        raise ValueError("w is compressed along axis 1; nm_transpose needs axis 0 (input)")
    w.pattern.check_divides(w.shape[1], f"output axis of shape {w.shape}")
    dtype = _written(dtype or w.dtype, "dtype")
    choice = dispatch.choose(_query("nm_transpose", w), implementation)
    return _run(choice).nm_transpose(w, dtype)


def narrow_matmul(
    x: jax.Array,
    left: jax.Array,
    *,
    transposed: bool = False,
    precision: jax.lax.PrecisionLike = None,
    implementation: str | None = None,
) -> jax.Array:
    """x @ left for a matrix of few columns: the first product of an adapter, forward or backward.

    Args:
      x: (..., in), float32, bfloat16 or float16; the leading axes are tokens.
      left: (in, rank) in x's dtype.
      transposed: left is (rank, in) instead.
      precision: of the product, as in `jax.lax.dot_general`.
      implementation: None for the best; "xla" for XLA's. "mosaic" as None: XLA's where the kernel
        does not take the product.

    Returns:
      (..., rank) in x's dtype, accumulated in float32.

    Raises:
      ValueError: shapes or dtypes do not fit.

    >>> narrow_matmul(jnp.ones((2, 8)), jnp.ones((8, 1))).tolist()
    [[8.0], [8.0]]
    """
    check_array(left, "left")
    if left.ndim != 2:
        raise ValueError(f"left has shape {left.shape}; it must be a matrix")
    _check_rows(x, left.shape[1 if transposed else 0], "x", "in", "left")
    _check_same_dtype(x, left, "x", "left")
    query = dispatch.NarrowQuery(
        (x.shape[-1], left.shape[0 if transposed else 1]), str(x.dtype), math.prod(x.shape[:-1])
    )
    if dispatch.choose_narrow(query, implementation).implementation == "xla":
        return first_product(x, left.T if transposed else left, precision)
    from pallas_kernels.mosaic import products  # needs a newer JAX than the package does

    return products.narrow_matmul(x, left, transposed)


def _run(choice: dispatch.Choice):
    if choice.implementation == "mosaic":
        from pallas_kernels.mosaic import products  # needs a newer JAX than the package does

        return products
    if choice.implementation == "triton":
        from pallas_kernels.triton import products  # needs the extra 'triton'

        return products
    return xla


def _query(
    op: str, w: CompressedMatrix, x: jax.Array | None = None, out_dtype=None
) -> dispatch.Query:
    tokens = None if x is None else math.prod(x.shape[:-1])
    dtype = (w.values if x is None else x).dtype
    written = None if out_dtype is None else str(out_dtype)
    return dispatch.Query(op, w.shape, w.pattern, str(dtype), tokens, w.axis, written)


def _written(dtype, name: str = "out_dtype") -> jnp.dtype:
    try:
        dtype = jnp.dtype(dtype)
    except TypeError as error:
        raise ValueError(f"{name} is {dtype!r}; it must be float32, bfloat16 or float16") from error
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype}; it must be float32, bfloat16 or float16")
    return dtype


def _check_matrix(w: CompressedMatrix) -> None:
    check_compressed(w)
    if w.values.ndim != 2:
        raise ValueError(
            f"w.values has shape {w.values.shape}: a stack of matrices; use jax.vmap or scan"
        )


def _check_rows(
    x: jax.Array | Sections, size: int, name: str, role: str, matrix: str = "w"
) -> None:
    if isinstance(x, Sections):
        x.check(name)
    else:
        check_array(x, name)
    check_dtype(x.dtype, name)
    if x.ndim < 1 or x.shape[-1] != size:
        raise ValueError(
            f"{name} has shape {x.shape}; its last axis must be {matrix}'s {role}, {size}"
        )


def _sections(sections: Any) -> tuple:
    if not isinstance(sections, tuple | list | np.ndarray):
        raise TypeError(
            f"sections is a {type(sections).__name__}; it must be the outputs of each, as a tuple"
        )
    return tuple(sections)


def _through(through: Any) -> tuple[Any, Any]:
    if not isinstance(through, tuple | list) or len(through) != 2:
        raise TypeError(
            f"through is {through!r}; it must be the name of an activation and what entered it, (name, z)"
        )
    return through


def _check_same_dtype(a: jax.Array, b: jax.Array, a_name: str, b_name: str) -> None:
    if a.dtype != b.dtype:
        raise ValueError(
            f"{a_name} is {a.dtype} and {b_name} is {b.dtype}; cast one so that they agree"
        )


def _check_into(into: jax.Array | None, w: CompressedMatrix, out_dtype) -> None:
    if into is None:
        return
    if into.shape != w.values.shape or into.dtype not in (jnp.float32, out_dtype):
        raise ValueError(
            f"into is {into.dtype}{list(into.shape)}; it must have the shape of w.values,"
            f" {list(w.values.shape)}, and be float32 or of out_dtype, {out_dtype}"
        )
