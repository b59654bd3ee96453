"""Continue prompts with a trained GPT-2, OPT, LLaMA or Mistral, or fill the [MASK]s of a BERT:

    python -m train.generate --checkpoint=runs/NAME --prompt="The kernel"
    python -m train.generate --checkpoint=runs/NAME --prompt="The [MASK] of a matrix"

One prompt is written as it is made; several are made together, and written one after the other.
`--save=FOLDER` writes the model without what only training needs, its weights in bfloat16 unless the
run was given --dtype=float32, or `--save-dtype` says otherwise.
"""

import argparse
import logging
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.data.tokenizer import Vocabulary
    from train.serving import Served

CHUNK = 8  # tokens that are made between two looks at them


def main(args: Sequence[str] | None = None) -> int:
    """Run the command; 0 if it is done, 1 if files failed, 2 for bad input."""
    return exit_code(_run, _arguments(args))


def exit_code(run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """What a command returns: 0, or what went wrong, which is said on stderr."""
    quiet()
    try:
        run(arguments)
    except (ValueError, NotImplementedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a damaged checkpoint, a full disk
        explained = error.strerror if error.filename is None else None
        print(f"error: {explained or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _run(arguments: argparse.Namespace) -> None:
    from slope_jax.models import Bert
    from train import serving
    from train.display import size

    if arguments.save_dtype and arguments.save is None:
        raise ValueError("--save-dtype is of the folder that --save=FOLDER names")
    served = serving.load(arguments.checkpoint, step=arguments.step)
    about = served.about
    print(
        f"{about['config']['model']} of step {about['step']}: {size(served.nbytes)} of weights,"
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
    if isinstance(served.model, Bert):
        _fill(served, arguments)
    else:
        _continue(served, arguments)


def _continue(served: "Served", arguments: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from slope_jax.generate import stream

    vocabulary = served.vocabulary
    end = vocabulary.specials.end_of_text
    prompts = [vocabulary.encode(text) or [end] for text in arguments.prompt]
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    sampled = arguments.temperature > 0
    begin = time.perf_counter()
    pieces = stream(
        served.model,
        served.variables,
        jnp.asarray(ids),
        lengths=lengths,
        max_new_tokens=arguments.max_new_tokens,
        chunk=CHUNK,
        end_token=end,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        key=jax.random.key(arguments.seed) if sampled else None,
    )
    _warn_of_length(served, lengths.max(), arguments.max_new_tokens)
    print(f"a new token: {paths(served, len(prompts))}", file=sys.stderr)
    rows: list[list[int]] = [[] for _ in prompts]
    written, marks = 0, [begin]
    alone = len(prompts) == 1
    if alone:
        print(arguments.prompt[0], end="", flush=True)
    for piece in pieces:
        marks.append(time.perf_counter())
        for row, tokens in zip(rows, piece.tolist(), strict=True):
            row.extend(tokens)
        texts = [
            continued_text(vocabulary, prompt, row, arguments.stop)
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        if alone:  # what a later token can still change is held back
            text, ended = texts[0]
            safe = len(text) if ended else _settled(text, arguments.stop)
            print(text[written:safe], end="", flush=True)
            written = max(written, safe)
        if all(ended for _, ended in texts):
            break
    if alone:
        print(texts[0][0][written:])
    else:
        for prompt, (text, _) in zip(arguments.prompt, texts, strict=True):
            print(f"{prompt}{text}\n")
    _say_speed(marks, len(prompts), len(rows[0]))


def _warn_of_length(served: "Served", prompt: int, count: int) -> None:
    if prompt + count > served.longest:
        print(
            f"warning: a prompt of {prompt} tokens and {count} new ones are {prompt + count}; the"
            f" model was trained on sequences of at most {served.longest}, and what it writes behind"
            " them may be noise. Give a shorter prompt or a lower --max-new-tokens",
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


def continued_text(
    vocabulary: "Vocabulary", prompt: list[int], tokens: list[int], stops: Sequence[str]
) -> tuple[str, bool]:
    """The text that `tokens` add to a prompt's, ahead of an end of text and of any stop.

    Decoded behind the prompt, for some tokenizers write no space ahead of a first word.

    Returns:
      The text, and whether an end or a stop was there.
    """
    end = vocabulary.specials.end_of_text
    ended = end in tokens
    tokens = tokens[: tokens.index(end)] if ended else tokens
    prompt = [token for token in prompt if token != end]
    text = vocabulary.decode([*prompt, *tokens])[len(vocabulary.decode(prompt)) :]
    found = [text.index(stop) for stop in stops if stop and stop in text]
    return (text[: min(found)], True) if found else (text, ended)


def _settled(text: str, stops: Sequence[str]) -> int:
    """Characters ahead of what may yet become another character, or turn out to begin a stop."""
    text = text.rstrip("\ufffd")
    begun = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    return len(text) - max(begun, default=0)


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

    vocabulary, specials = served.vocabulary, served.vocabulary.specials
    mask = vocabulary.tokenizer.id_to_token(specials.mask)
    for text in arguments.prompt:
        pieces = text.split(mask)  # in a text, the name of a special token is just text
        if len(pieces) == 1:
            raise ValueError(f"{text!r} has no {mask}; a BERT fills masks and does not continue")
        ids = [specials.cls, *vocabulary.encode(pieces[0])]
        for piece in pieces[1:]:
            ids += [specials.mask, *vocabulary.encode(piece)]
        ids.append(specials.sep)
        found = fill_masks(
            served.model,
            served.variables,
            jnp.asarray([ids]),
            specials.mask,
            top=arguments.top_k or 5,
        )
        print(text)
        for number, (tokens, shares) in enumerate(
            zip(found.tokens, found.probabilities, strict=True), 1
        ):
            words = [
                f"{vocabulary.decode([token]).strip()} {share:.1%}"
                for token, share in zip(tokens.tolist(), shares.tolist(), strict=True)
            ]
            print(f"  {number}: {', '.join(words)}")


def quiet() -> None:
    """Keeps libraries from writing into what is generated."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    logging.getLogger("absl").setLevel(logging.ERROR)


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
        help="folder of a run, one of its checkpoints/STEP, or what --save wrote",
    )
    parser.add_argument("--step", type=int, help="checkpoint of a run; the latest if not given")
    parser.add_argument("--prompt", action="append", default=[], help="may be given again")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, help="sample among so many; candidates of a BERT")
    parser.add_argument("--top-p", type=float, help="sample among those that hold this share")
    parser.add_argument("--stop", action="append", default=[], help="text to end at; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--save", type=pathlib.Path, help="new folder for the model alone")
    parser.add_argument("--save-dtype", choices=("bfloat16", "float32"), help="of its weights")
    return parser.parse_args(args)


if __name__ == "__main__":
    sys.exit(main())
