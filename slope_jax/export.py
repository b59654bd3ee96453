"""Generation as files that need no model code: prefill and decode by `jax.export`."""

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from pallas_kernels.files import new_folder
from slope_jax.models.cache import CACHE, init_cache
from slope_jax.models.decoder import Decoder
from slope_jax.models.hf_files import listed
from slope_jax.models.variables import check_variables, differences, leaves_by_path
from slope_jax.prompts import checked_prompts, is_integer

ABOUT_FILE, PREFILL_FILE, DECODE_FILE = "exported.json", "prefill.jax", "decode.jax"
_FILES = {"prefill": PREFILL_FILE, "decode": DECODE_FILE}
_REMEDY = "Copy the folder again, or export the model again"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_SIZES = ("batch", "prompt", "slots", "vocab_size")


@dataclasses.dataclass(frozen=True)
class Exported:
    """Two functions of arrays alone, for one batch size; `slots` are those of the cache.

    Attributes:
      prefill: (variables, ids (B, P), lengths (B,)) -> (logits (B, V) after each prompt, cache).
      decode: (variables, cache, ids (B, 1), positions (B, 1)) -> (logits (B, V), cache).
      batch, prompt, slots: sizes they were made for.
      vocab_size: one more than the largest id.
    """

    prefill: jax_export.Exported
    decode: jax_export.Exported
    batch: int
    prompt: int
    slots: int
    vocab_size: int

    @property
    def platforms(self) -> tuple[str, ...]:
        return self.prefill.platforms

    def greedy(
        self, variables: Mapping[str, Any], prompts: jax.Array, count: int, lengths=None
    ) -> jax.Array:
        """The likeliest next `count` tokens, int32 (B, count), one call of `decode` after another.

        Args:
          variables: of the model as it was exported.
          prompts: integers (batch, prompt), right-padded with anything.
          lengths: (batch,) integers in 1 .. prompt; None: all.

        Raises:
          ValueError: more tokens than the cache has slots, prompts of another shape, a length or an id
            out of range, or variables of other names, shapes or dtypes.
        """
        if np.shape(prompts) != (self.batch, self.prompt):
            raise ValueError(
                f"prompts are {list(np.shape(prompts))}; what was exported reads"
                f" {[self.batch, self.prompt]}"
            )
        if not is_integer(count) or not 1 <= count <= self.slots - self.prompt + 1:
            raise ValueError(
                f"count={count} must be an integer between 1 and {self.slots - self.prompt + 1}, for the"
                f" cache has {self.slots} slots"
            )
        prompts, lengths = checked_prompts(prompts, lengths, self.vocab_size)
        self._check_variables(variables)
        logits, cache = self.prefill.call(variables, prompts.astype(jnp.int32), lengths)
        tokens = [logits.argmax(-1).astype(jnp.int32)]
        for i in range(count - 1):
            places = (lengths + i)[:, None]
            logits, cache = self.decode.call(variables, cache, tokens[-1][:, None], places)
            tokens.append(logits.argmax(-1).astype(jnp.int32))
        return jnp.stack(tokens, axis=1)

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        given = self.prefill
        (wanted, *_), _ = jax.tree.unflatten(given.in_tree, given.in_avals)
        found, wanted = (leaves_by_path(tree, _typed) for tree in (variables, wanted))
        if wrong := differences(found, wanted, "in the export"):
            raise ValueError(
                "the variables must be those of the export, in names, shapes and dtypes: give what was"
                f" exported, saved and loaded in the same dtype, or export again. There differ {listed(wrong)}"
            )


def _typed(leaf: Any) -> str:
    shape = ", ".join(map(str, np.shape(leaf)))
    return f"{jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))}[{shape}]"


def export(
    model: Decoder,
    variables: Mapping[str, Any],
    *,
    batch: int,
    prompt: int,
    max_new_tokens: int,
    platforms: Sequence[str] | None = None,
) -> Exported:
    """Prefill and decode of a decoder; the weights stay arguments.

    What multiplies a sparse layer, and what computes attention, is chosen while tracing, for the
    device that JAX would run on. Programs for another platform, or for several, hold what runs on all
    of them: XLA's attention (in float32 if traced on a CPU), and dense products on decompressed
    weights, which must be asked for by implementation="xla", for they are slower than the sparse
    kernels that a Hopper GPU gets by itself. For those, export on the GPU, for "cuda" alone.

    Args:
      model, variables: from `inference_variables`; shapes are enough.
      batch, prompt: rows and tokens of the prompts.
      max_new_tokens: for which the cache has slots.
      platforms: of "cpu", "cuda", "rocm", "tpu"; None: the one that JAX runs on.

    Raises:
      ValueError: not a decoder, variables that are not its own, sizes out of range, or an unknown platform.
      NotImplementedError: a platform that JAX does not run on is asked for, and the model keeps to
        what is chosen for the device at hand, see above.

    >>> from slope_jax.models import build
    >>> model = build("gpt2-nano", vocab_size=64, num_layers=1, hidden_size=32, mlp_size=64)
    >>> variables = jax.jit(model.init)(jax.random.key(0), **model.example_inputs())
    >>> made = export(model, variables, batch=1, prompt=4, max_new_tokens=3)
    >>> made.greedy(variables, jnp.array([[3, 1, 4, 1]]), 3).shape
    (1, 3)
    """
    if not isinstance(model, Decoder):
        raise ValueError(f"{type(model).__name__} has no prefill and decode; export a decoder")
    sizes = (batch, prompt, max_new_tokens)
    slots, most = prompt + max_new_tokens - 1, model.config.max_positions
    if not all(map(is_integer, sizes)) or min(sizes) < 1 or slots >= most:
        raise ValueError(
            f"batch={batch}, prompt={prompt}, max_new_tokens={max_new_tokens}: each must be an integer"
            f" of 1 or more, and the last two together at most max_positions={most}"
        )
    check_variables(model, variables)
    here = jax_export.default_export_platform()
    platforms = (platforms,) if isinstance(platforms, str) else tuple(platforms or (here,))
    model = _for_all(model, platforms, here, sparse="masks" in variables)

    def prefill(variables, ids, lengths):
        variables = {**variables, CACHE: init_cache(model.config, batch, slots)}
        at = (lengths - 1)[:, None]
        logits, updated = model.apply(variables, ids, logits_at=at, mutable=[CACHE])
        return logits[:, 0].astype(jnp.float32), updated[CACHE]

    def decode(variables, cache, ids, positions):
        variables = {**variables, CACHE: cache}
        logits, updated = model.apply(variables, ids, positions=positions, mutable=[CACHE])
        return logits[:, 0].astype(jnp.float32), updated[CACHE]

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(variables))
    cache = jax.eval_shape(lambda: init_cache(model.config, batch, slots))

    def made(function, donated, *sizes):
        integers = (jax.ShapeDtypeStruct(size, jnp.int32) for size in sizes)
        jitted = jax.jit(function, donate_argnums=donated)
        checks = [jax_export.DisabledSafetyCheck.custom_call(name) for name in _CALLS]
        given = (shapes, cache) if donated else (shapes,)
        return jax_export.export(jitted, platforms=platforms, disabled_checks=checks)(
            *given, *integers
        )

    return Exported(
        made(prefill, (), (batch, prompt), (batch,)),
        made(decode, (1,), (batch, 1), (batch, 1)),
        batch,
        prompt,
        slots,
        model.config.vocab_size,
    )


def _for_all(model: Decoder, platforms: tuple[str, ...], here: str, *, sparse: bool) -> Decoder:
    """The model with what runs on every platform, in the place of what is chosen for `here`."""
    if unknown := [p for p in platforms if p not in PLATFORMS]:
        raise ValueError(
            f"platforms {', '.join(map(str, unknown))}: choose from {', '.join(PLATFORMS)}"
        )
    foreign = [p for p in platforms if p != here]
    if not foreign:
        return model
    config, fixed = model.config, []
    if sparse and config.implementation != "xla":
        kernels = f"implementation={config.implementation!r} (sparse kernels)"
        fixed.append((kernels, "implementation='xla'"))
    if config.attention == "cudnn":
        fixed.append(("attention='cudnn'", "attention=None"))
    if fixed:
        chosen, instead = (" and ".join(words) for words in zip(*fixed, strict=True))
        raise NotImplementedError(
            f"platforms {', '.join(foreign)}: {chosen} would be chosen for the device at hand, which is {here};"
            f" export there, or build the model with {instead}, which runs on all"
        )
    return type(model)(dataclasses.replace(config, attention="xla"))


# Custom calls, of whose stability JAX knows nothing: kernels, attention, and the layout of the cache.
_CALLS = (
    "mosaic_gpu_v2",
    "mosaic_gpu",
    "triton_kernel_call",
    "__gpu$xla.gpu.triton",
    "__cudnn$fmhaSoftmax",
    "LayoutConstraint",
)


def save(exported: Exported, folder: pathlib.Path | str) -> pathlib.Path:
    """Writes a folder that `load` reads: whole or not at all.

    The weights are not in it (`train.serving.save` writes those). Programs take them in the dtypes that
    they were exported with: where that is float32, as on a CPU by default, save with dtype="float32".

    Raises:
      ValueError: the folder exists already, or flatbuffers, which JAX writes with, is missing.
    """
    _check_flatbuffers()
    folder = pathlib.Path(folder).expanduser().resolve()
    about = {name: getattr(exported, name) for name in _SIZES}
    about |= {"platforms": list(exported.platforms), "jax": jax.__version__}
    programs = {name: bytes(getattr(exported, name).serialize()) for name in _FILES}
    about["files"] = {_FILES[name]: _noted(program) for name, program in programs.items()}
    with new_folder(folder) as staging:
        for name, program in programs.items():
            (staging / _FILES[name]).write_bytes(program)
        (staging / ABOUT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return folder


def load(folder: pathlib.Path | str) -> Exported:
    """What `save` wrote.

    Raises:
      ValueError: files are missing or not what was written, or flatbuffers, which JAX reads with,
        is missing.
    """
    _check_flatbuffers()
    folder = pathlib.Path(folder).expanduser()
    names = (ABOUT_FILE, *_FILES.values())
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; slope_jax.export.save writes them")
    try:
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        sizes, noted = [int(about[name]) for name in _SIZES], dict(about["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / ABOUT_FILE} cannot be read ({error!r}). {_REMEDY}") from error
    programs = [(folder / name).read_bytes() for name in _FILES.values()]
    for name, program in zip(_FILES.values(), programs, strict=True):
        if noted.get(name) != _noted(program):
            raise ValueError(
                f"{folder / name} is damaged: its {len(program):,} bytes are not what was written."
                f" {_REMEDY}"
            )
    return Exported(*(jax_export.deserialize(bytearray(p)) for p in programs), *sizes)


def _noted(program: bytes) -> dict[str, Any]:
    return {"bytes": len(program), "sha256": hashlib.sha256(program).hexdigest()}


def _check_flatbuffers() -> None:
    if importlib.util.find_spec("flatbuffers") is None:
        raise ValueError("JAX writes exported programs with flatbuffers: pip install flatbuffers")
