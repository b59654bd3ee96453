"""What the kernels can run, in words: the predicate of the dispatcher and of the tests."""

import jax

from pallas_kernels.device import current
from pallas_kernels.pattern import Pattern

OLDEST_JAX = (0, 11, 2)
DTYPES = ("bfloat16", "float16")
# Patterns of which every 4 consecutive entries keep at most 2.
FITTING = tuple(Pattern(n, m) for n, m in ((1, 2), (2, 4), (1, 4), (2, 8), (1, 8), (1, 16)))


FEW_TOKENS = 64
# Tokens whose first product with an adapter the kernels for few tokens make faster than XLA: of more, every
# CTA would add up larger parts.
MOST_FIRST = 16
# Of an adapter's first product with many tokens: the kernel's ranks, and where it was measured to be faster
# than XLA's. Of higher ranks it reads l too often.
MOST_RANK, FASTER_INPUTS, FASTER_TOKENS = 128, 1536, 1536
# Of attention to a cache: queries that share a head of keys, and entries of a head.
MOST_QUERIES, WIDEST = 8, 128


# Outputs that a gate halves are a multiple: TMA reads metadata, a byte each, from multiples of 16 bytes on.
GATED = 32
PROCESSORS = 132  # of an H100 SXM, an H200 and a GH200


def processors(device: jax.Device | None = None) -> int:
    """Streaming multiprocessors of a GPU, for kernels that put one CTA on each; without a GPU, an H100's."""
    device = device or current()
    known = getattr(device, "core_count", None) if device.platform == "gpu" else None
    return known or PROCESSORS


def device_obstacle(
    device: jax.Device | None = None, kernels: str = "the sparse kernels"
) -> str | None:
    """Why this machine, or one device of it, cannot run `kernels`, or None."""
    device = device or current()
    if device.platform != "gpu":
        return f"{kernels} need an NVIDIA Hopper GPU, and this is {device.platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if capability != "9.0":
        return (
            f"{kernels} need compute capability 9.0 (Hopper), and"
            f" {device.device_kind} has {capability}"
        )
    return version_obstacle(kernels)


def version_obstacle(kernels: str = "the sparse kernels") -> str | None:
    """Why this JAX cannot compile `kernels`, or None."""
    if jax.__version_info__ < OLDEST_JAX:
        return f"{kernels} need JAX {'.'.join(map(str, OLDEST_JAX))}, and this is {jax.__version__}"
    return None


def attention_obstacle(dtype: str, width: int, queries: int) -> str | None:
    """Why the kernel cannot attend with `queries` heads of this width to each head of a cache, or None."""
    if dtype not in DTYPES:
        return f"attention to a cache has a kernel for {' or '.join(DTYPES)}, not {dtype}"
    if width % 8 or width > WIDEST:
        return f"it takes heads of a multiple of 8 up to {WIDEST}, not {width}"
    if queries > MOST_QUERIES:
        return f"it takes up to {MOST_QUERIES} queries to a head of keys, not {queries}"
    return None


def narrow_obstacle(shape: tuple[int, int], dtype: str, tokens: int) -> str | None:
    """Why an adapter's first product, of so many tokens and (in, rank), is left to XLA, or None."""
    if dtype not in DTYPES:
        return f"x @ l has a kernel for {' or '.join(DTYPES)}, not {dtype}"
    if shape[0] % 8:
        return f"x @ l has a kernel for inputs that are a multiple of 8, not {shape[0]}"
    if not 1 <= shape[1] <= MOST_RANK:
        return f"x @ l has a kernel for ranks from 1 to {MOST_RANK}, not {shape[1]}"
    for found, name, least in (
        (shape[0], "inputs", FASTER_INPUTS),
        (tokens, "tokens", FASTER_TOKENS),
    ):
        if found < least:
            return f"x @ l of {found} {name} is no slower in XLA"
    return None


def gate_obstacle(shape: tuple[int, int], tokens: int | None) -> str | None:
    """Why no kernel gates what so many tokens and an (in, out) matrix make, or None."""
    if tokens == 0:
        return "there are no tokens"
    if shape[1] % GATED:
        return f"a kernel makes a gate of outputs that are a multiple of {GATED}, not {shape[1]}"
    return None


def problem_obstacle(
    op: str,
    shape: tuple[int, int],
    pattern: Pattern,
    dtype: str,
    axis: int = 0,
    out_dtype: str | None = None,
) -> str | None:
    """Why the kernels cannot take this product, or None."""
    dtypes = ("float32", *DTYPES) if op == "nm_transpose" else DTYPES
    if dtype not in dtypes:
        return f"{op} has a kernel for {' or '.join(dtypes)}, not {dtype}"
    fitting = (Pattern(2, 4),) if op == "nm_transpose" else FITTING
    if pattern not in fitting:
        return f"{op} has a kernel for {', '.join(map(str, fitting))}, not {pattern}"
    if axis != 0:
        return f"{op} has a kernel for matrices compressed along axis 0 (input), not axis {axis}"
    if op == "nm_matmul" and out_dtype not in (None, dtype, "float32"):
        return f"{op} writes {dtype}, as x is, or float32, not {out_dtype}"
    if any(size % 8 or size == 0 for size in shape):
        return f"the sparse kernels need sizes that are multiples of 8, not {shape}"
    return None
