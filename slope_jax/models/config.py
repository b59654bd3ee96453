"""What all models are configured by: sizes, sparsity, precision, memory."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from pallas_kernels import Pattern
from slope_jax.operands import DOUBLE_PRUNED, check_backward
from slope_jax.policy import DENSE, SparsityPolicy

VOCAB_MULTIPLE = 8
REMAT_POLICIES = (
    "nothing_saveable",
    "everything_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "linears_saveable",
)
_COMPUTE_DTYPES = ("float32", "bfloat16", "float16")


class Linear(NamedTuple):
    """One linear layer of a model: its logical path and sizes; `tied` shares the embedding."""

    path: str
    in_features: int
    out_features: int
    tied: bool = False


class Segment(NamedTuple):
    """Layers start .. stop-1, which share `patterns` ((path inside the layer, pattern), ...)."""

    name: str
    start: int
    stop: int
    patterns: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Frozen configuration of a model; every value is checked on construction.

    Attributes:
      vocab_size: tokens of the tokenizer. Tables have `padded_vocab_size` rows, the next multiple
        of 8; the padded columns of the logits are the most negative number of their dtype, so that
        no probability and no gradient reaches them.
      max_positions: longest sequence, in tokens.
      hidden_size, num_layers, num_heads, mlp_size: widths; heads divide the hidden size, where they
        have no width of their own (`LlamaConfig.head_dim`).
      dropout: probability, after the embeddings, attention and MLP. None on the attention
        probabilities: fused attention has none.
      sparsity: a `SparsityPolicy` or what `SparsityPolicy.parse` reads ("2:4", "2:4,2:8", "dense").
      adapter_rank: rank of the low-rank adapters of the pruned linears; 0 for none. Below 1 it is
        a fraction of the hidden size, to the nearest integer and at least 1 (0.0156 of 1024 is 16).
      adapter_scale: factor on the initial adapter_l, whose entries are N(0, (adapter_scale / rank)^2).
      mask_init: how masks are chosen at initialisation, passed on to `SparseDense`.
      dtype: compute dtype: float32, bfloat16 or float16. Norms compute in float32 whatever it is.
      param_dtype: dtype of the stored parameters.
      remat: False keeps what the backward pass needs, norms and gates apart, which are recomputed
        always; True keeps the inputs of layers alone; or one of `REMAT_POLICIES`: a name of
        `jax.checkpoint_policies` (to which sparse kernels are no dots), or "linears_saveable", which
        keeps what linears give: attention, norms and gates are computed twice, and of products
        those alone that are sparse and have their activation in them.
      scan: stack consecutive layers of equal patterns and `scan` over them (short compilation).
        False unrolls: the same function, parameters per layer (`slope_jax.models.unstack_layers`).
      implementation: of the sparse products, passed on to `SparseDense`; None is the best.
      backward: of the sparse products, "double-pruned" or "exact", passed on to `SparseDense`.
      attention: "xla", "cudnn", or None for the best (see `attention_path` and, for one token at a
        time, `decode_path`, which "xla" turns off).
      simulated: True keeps the kernels of pruned linears dense, for the caller to mask (see
        `SparseDense`); a Flax module class does so and is their `dot_general_cls`.

    Raises:
      ValueError: names the field, what must hold and what was given.
    """

    vocab_size: int
    max_positions: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    norm_epsilon: float
    dropout: float = 0.1
    sparsity: Any = "2:4"
    adapter_rank: int | float = 0
    adapter_scale: float = 1.0
    mask_init: str | Callable = "magnitude"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: bool | str = False
    scan: bool = True
    implementation: str | None = None
    backward: str = DOUBLE_PRUNED
    attention: str | None = None
    simulated: Any = False

    sizes: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "max_positions",
        "hidden_size",
        "num_layers",
        "num_heads",
        "mlp_size",
    )

    # Constants of a model family.
    init_std: ClassVar[float] = 0.02
    use_bias: ClassVar[bool] = True
    rms_norm: ClassVar[bool] = False
    window: ClassVar[int | None] = None

    def __post_init__(self):
        for name in self.sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        self._check_heads()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be a probability in [0, 1)")
        if not self.norm_epsilon > 0:
            raise ValueError(f"norm_epsilon={self.norm_epsilon} must be positive")
        if not isinstance(self.remat, bool) and self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r}; choose a bool or one of {REMAT_POLICIES}")
        if self.attention not in (None, "xla", "cudnn"):
            raise ValueError(f"attention={self.attention!r}; choose None, 'xla' or 'cudnn'")
        check_backward(self.backward)
        if not (math.isfinite(self.adapter_scale) and self.adapter_scale > 0):
            raise ValueError(
                f"adapter_scale={self.adapter_scale} must be positive: with both adapters at zero no"
                " gradient reaches either; for no adapters set adapter_rank=0"
            )
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, _checked_dtype(name, getattr(self, name)))
        policy = SparsityPolicy.parse(self.sparsity, num_layers=self.num_layers)
        object.__setattr__(self, "sparsity", policy)
        self._check_patterns()
        self._check_rank()

    def layer_linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of the linears inside one layer, by their path in it."""
        hidden, mlp = self.hidden_size, self.mlp_size
        return {
            "attention/qkv": (hidden, 3 * hidden),
            "attention/output": (hidden, hidden),
            "mlp/up": (hidden, mlp),
            "mlp/down": (mlp, hidden),
        }

    def head_linears(self) -> tuple[Linear, ...]:
        """The linears outside the layers."""
        raise NotImplementedError

    @functools.cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer of the model, in order of depth."""
        layers = (
            Linear(f"layers/{i}/{path}", *shape)
            for i in range(self.num_layers)
            for path, shape in self.layer_linears().items()
        )
        return (*layers, *self.head_linears())

    @functools.cached_property
    def patterns(self) -> dict[str, str]:
        """The table logical path -> "n:m" or "dense", every linear layer accounted for."""
        return self.sparsity.resolve(linear.path for linear in self.linears)

    @functools.cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Runs of consecutive layers with equal patterns; single layers with `scan=False`."""
        runs: list[Segment] = []
        for i in range(self.num_layers):
            patterns = tuple((p, self.patterns[f"layers/{i}/{p}"]) for p in self.layer_linears())
            if self.scan and runs and runs[-1].patterns == patterns:
                runs[-1] = runs[-1]._replace(stop=i + 1)
            else:
                runs.append(Segment("", i, i + 1, patterns))
        return tuple(run._replace(name=_segment_name(run)) for run in runs)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table: `vocab_size` rounded up to a multiple of 8."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_width(self) -> int:
        """Width of one head of attention."""
        return self.hidden_size // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_heads

    @property
    def rank(self) -> int:
        """`adapter_rank` as a number of columns."""
        if 0 < self.adapter_rank < 1:
            return max(1, round(self.adapter_rank * self.hidden_size))
        return int(self.adapter_rank)

    def _check_heads(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}; choose a"
                " number of heads that divides it"
            )

    def _check_patterns(self):
        for linear in self.linears:
            pattern = self.patterns[linear.path]
            if pattern == DENSE:
                continue
            if linear.tied:
                raise ValueError(
                    f"{linear.path} is tied to the token embedding, which is never pruned; its"
                    f" rule says {pattern!r}: make it 'dense'"
                )
            # Both axes: the kernel is pruned along its input, its transpose along its output.
            Pattern.parse(pattern).check_divides(linear.in_features, f"the input of {linear.path}")
            Pattern.parse(pattern).check_divides(
                linear.out_features, f"the output of {linear.path}"
            )

    def _check_rank(self):
        rank = self.adapter_rank
        if isinstance(rank, bool) or not math.isfinite(rank) or rank < 0 or (rank > 1 and rank % 1):
            raise ValueError(
                f"adapter_rank={rank!r} must be 0, a positive integer, or a fraction of the hidden"
                " size below 1"
            )
        if not self.rank:
            return
        if self.simulated:
            raise ValueError(
                f"adapter_rank={rank!r}: simulated linears have no adapters; set it to 0"
            )
        pruned = [linear for linear in self.linears if self.patterns[linear.path] != DENSE]
        if not pruned:
            raise ValueError(
                f"adapter_rank={rank!r} but nothing is pruned by {str(self.sparsity)!r}; adapters"
                " belong to pruned linears: set adapter_rank=0 or a sparsity such as '2:4'"
            )
        for linear in pruned:
            if self.rank > min(linear.in_features, linear.out_features):
                raise ValueError(
                    f"adapter_rank={rank!r} is {self.rank} columns, more than {linear.path} of"
                    f" {linear.in_features} x {linear.out_features} can use; choose a smaller rank"
                )


def _segment_name(run: Segment) -> str:
    if run.stop - run.start == 1:
        return f"layers_{run.start}"
    return f"layers_{run.start}_to_{run.stop - 1}"


def _checked_dtype(name: str, dtype: Any):
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.name not in _COMPUTE_DTYPES:
        raise ValueError(f"{name}={dtype!r}; choose one of {', '.join(_COMPUTE_DTYPES)}")
    return known
