"""Continue prompts with a trained GPT-2, OPT, LLaMA or Mistral, or fill the [MASK]s of a BERT:

    python -m train.generate --checkpoint=runs/NAME --prompt="The kernel"
    python -m train.generate --checkpoint=runs/NAME --prompt="The [MASK] of a matrix"

One prompt is written as it is made; several are made together, and written one after the other.
`--save=FOLDER` writes the model without what only training needs, its weights in bfloat16 unless the
run or this command is given another --dtype, or `--save-dtype` says otherwise.
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.command import check_new, exit_code, option
from train.prompts import encoded, masked_ids, utf8_fault
from train.texts import CHUNK, NEW_TOKENS, continuations, fitting_tokens

if TYPE_CHECKING:
    from train.serving import Served

CANDIDATES = 5  # where none are asked for
# Options of a decoder alone.
_OF_DECODERS = ("max_new_tokens", "temperature", "top_p", "stop", "seed", "special_tokens")
_LESS_MEMORY = "give fewer or shorter prompts, a lower --max-new-tokens, or --dtype=bfloat16 where it is float32"


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 if it is done, 1 if files or the memory failed, 2 for bad input."""
    return exit_code(_run, _arguments(args), less_memory=_LESS_MEMORY)


def _run(arguments: argparse.Namespace) -> None:
    from slope_jax.models import Bert
    from train import serving
    from train.display import size

    _check(arguments)
    served = serving.load(arguments.checkpoint, step=arguments.step, dtype=arguments.dtype)
    about = served.about
    masked = isinstance(served.model, Bert)
    if masked:
        _check_masked(arguments)
    if arguments.prompt:
        _check_sampling(arguments, masked=masked, vocab_size=served.model.config.vocab_size)
    print(
        f"{served.title}: {size(served.nbytes)} of weights,"
        f" adapters {'fused' if about['adapters'] else 'none'}",
        file=sys.stderr,
    )
    if arguments.save is not None:
        dtype = arguments.save_dtype or serving.saved_dtype(about)
        folder = serving.save(served, arguments.save, dtype=dtype)
        print(f"saved to {folder}, weights in {dtype}", file=sys.stderr)
    if not arguments.prompt:
        if arguments.save is None:
            raise ValueError("nothing to do; give --prompt=TEXT or --save=FOLDER")
        return
    if masked:
        _fill(served, arguments)
    else:
        _continue(served, arguments)


def _check(arguments: argparse.Namespace) -> None:
    """What is wrong whatever the model, before it is read."""
    if arguments.save_dtype and arguments.save is None:
        raise ValueError("--save-dtype is of the folder that --save=FOLDER names")
    if arguments.save is not None:
        check_new(arguments.save.expanduser(), "--save")
    for name in ("top_k", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{option(name)}={value} must be 1 or more")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**31:
        raise ValueError(f"--seed={arguments.seed} must lie in [0, 2**31)")
    # Where no temperature is given, the model may be a BERT, which takes --top-k alone and says so.
    _check_sampling(arguments, masked=arguments.temperature is None)


def _check_sampling(
    arguments: argparse.Namespace, *, masked: bool, vocab_size: int | None = None
) -> None:
    """`masked`: of what a BERT takes, which knows no temperature and is bounded by the same vocabulary."""
    from slope_jax.sampling import check_sampling

    temperature = 1.0 if masked else arguments.temperature or 0.0
    top_k, top_p = arguments.top_k, arguments.top_p
    check_sampling(temperature, top_k, top_p, vocab_size=vocab_size, named=option)


def _check_masked(arguments: argparse.Namespace) -> None:
    given = [option(name) for name in _OF_DECODERS if getattr(arguments, name) is not None]
    if given:
        raise ValueError(
            f"a BERT fills masks with its likeliest tokens, --top-k of them, and takes no"
            f" {', '.join(given)}; leave out what a decoder alone takes"
        )


def _continue(served: "Served", arguments: argparse.Namespace) -> None:
    from slope_jax.memory import cache_bytes
    from slope_jax.models.cache import cache_slots
    from train.display import size

    prompts, special = arguments.prompt, bool(arguments.special_tokens)
    longest = max(map(len, encoded(served, prompts, special_tokens=special)))
    asked = arguments.max_new_tokens
    count = fitting_tokens(served, longest) if asked is None else asked
    begin = time.perf_counter()
    growing = continuations(
        served,
        prompts,
        max_new_tokens=count,
        temperature=arguments.temperature or 0.0,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        stops=arguments.stop or (),
        seed=arguments.seed or 0,
        special_tokens=special,
    )
    if asked is None and count < NEW_TOKENS:
        print(
            f"{count} new tokens, not {NEW_TOKENS}: no more fit behind a prompt of {longest}, for the"
            f" model has {served.model.config.max_positions} positions",
            file=sys.stderr,
        )
    warn_of_length(
        served,
        longest + count,
        f"a prompt of {longest} tokens and {count} new ones are {longest + count}",
        "Give a shorter prompt or a lower --max-new-tokens",
    )
    print(
        f"{size(cache_bytes(served.model, len(prompts), longest + count))} of keys and values, for"
        f" {len(prompts)} x {cache_slots(served.model.config, len(prompts), longest + count)} tokens",
        file=sys.stderr,
    )
    print(f"a new token: {paths(served, len(prompts))}", file=sys.stderr)
    alone = len(prompts) == 1
    if alone:
        print(prompts[0], end="", flush=True)
    written, marks = 0, [begin]
    for texts in growing:
        marks.append(time.perf_counter())
        if alone:  # what a later token can still change is held back
            print(texts[0].text[written : texts[0].settled], end="", flush=True)
            written = max(written, texts[0].settled)
    if alone:
        print(texts[0].text[written:])
    else:
        for prompt, made in zip(prompts, texts, strict=True):
            print(f"{prompt}{made.text}\n")
    _say_speed(marks, len(prompts), texts[0].tokens)


def warn_of_length(served: "Served", tokens: int, what: str, remedy: str) -> None:
    """Says on stderr if `tokens`, which `what` explains, are more than the model was trained on."""
    if tokens > served.longest:
        print(
            f"warning: {what}; the model was trained on sequences of at most {served.longest} tokens,"
            f" and what it makes of those behind them may be noise. {remedy}",
            file=sys.stderr,
        )


def paths(served: "Served", rows: int) -> str:
    """What multiplies the sparse linears for one new token of each row, what attends, and why."""
    import jax
    import jax.numpy as jnp

    from slope_jax import explain
    from slope_jax.models import decode_path

    ids = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    ways = explain(served.model, served.variables, input_ids=ids).forward_paths
    path = decode_path(served.model.config)
    said = [f"{count} sparse linears by {way}" for way, count in ways.items()]
    return "; ".join([*said, f"attention by {path.implementation}: {path.reason}"])


def _say_speed(marks: Sequence[float], rows: int, tokens: int) -> None:
    first = 1000 * (marks[1] - marks[0])
    said = f"first token after {first:.0f} ms, compilation included"
    # The first chunk waits for its compilation, too.
    if len(marks) > 3:
        rate = rows * (tokens - 1 - CHUNK) / (marks[-1] - marks[2])
        said += f"; then {rate:,.0f} tokens/s"
    print(said, file=sys.stderr)


def _fill(served: "Served", arguments: argparse.Namespace) -> None:
    import jax.numpy as jnp

    from slope_jax.fill import fill_masks

    vocabulary, mask = served.vocabulary, served.vocabulary.specials.mask
    top = CANDIDATES if arguments.top_k is None else arguments.top_k
    rows = [masked_ids(vocabulary, text) for text in arguments.prompt]
    longest = max(map(len, rows))
    said = f"a prompt of {longest} tokens, special ones included, is long"
    warn_of_length(served, longest, said, "Give a shorter one")
    for text, ids in zip(arguments.prompt, rows, strict=True):
        found = fill_masks(served.model, served.variables, jnp.asarray([ids]), mask, top=top)
        print(text)
        for number, (tokens, shares) in enumerate(
            zip(found.tokens, found.probabilities, strict=True), 1
        ):
            words = [
                f"{vocabulary.decode([token]).strip()} {share:.1%}"
                for token, share in zip(tokens.tolist(), shares.tolist(), strict=True)
            ]
            print(f"  {number}: {', '.join(words)}")


def _text(given: str) -> str:
    """A text of the command line, in which bytes that are no UTF-8 arrive as lone surrogates."""
    if fault := utf8_fault(given):
        raise argparse.ArgumentTypeError(fault)
    return given


def _stop(given: str) -> str:
    if not given:
        raise argparse.ArgumentTypeError("an empty text ends nothing; leave it out")
    return _text(given)


def _arguments(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        required=True,
        help="folder of a run, one of its checkpoints/STEP, what --save wrote, or one of Hugging Face",
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run; the latest if not given")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="of the computation; that of the run if not given",
    )
    parser.add_argument(
        "--prompt", type=_text, action="append", default=[], help="may be given again"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help=f"{NEW_TOKENS} if not given, or what fits"
    )
    parser.add_argument("--temperature", type=float, help="0, the default, takes the likeliest")
    parser.add_argument(
        "--top-k",
        type=int,
        help=f"sample among so many; candidates of a BERT, {CANDIDATES} if not given",
    )
    parser.add_argument("--top-p", type=float, help="sample among those that hold this share")
    parser.add_argument(
        "--stop", type=_stop, action="append", help="text to end at; may be given again"
    )
    parser.add_argument("--seed", type=int, help="of the sampling; 0 if not given")
    parser.add_argument(
        "--special-tokens",
        action="store_true",
        default=None,
        help="what spells a special token in a prompt, such as </s>, is that token",
    )
    parser.add_argument("--save", type=pathlib.Path, help="new folder for the model alone")
    parser.add_argument(
        "--save-dtype", choices=("bfloat16", "float16", "float32"), help="of its weights"
    )
    return parser.parse_args(args)


if __name__ == "__main__":
    sys.exit(main())
