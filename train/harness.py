"""Trained models under EleutherAI's LM Evaluation Harness (the extra `eval`)."""

import functools
import pathlib
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from slope_jax.prompts import is_integer
from slope_jax.sampling import check_sampling
from train.evaluate import check_decoder
from train.prompts import start_token, with_special_tokens
from train.requests import Request, generated
from train.scoring import score, strided_windows
from train.serving import Served
from train.texts import stop_texts

MAX_NEW_TOKENS = 256  # where a task does not say
_COUNTS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # first one first
_OPTIONS = (*_COUNTS, "until", "do_sample", "temperature", "top_k", "top_p")


class Harness:
    """What the harness asks of a model; `harness_model` makes it one of the harness's own.

    Requests are its `Instance`s, of which only `args` is read. Texts longer than the sequences that
    the model was trained on (`Served.longest`) lose their beginning.

    Texts become tokens as in the harness's own `HFLM`: behind what the tokenizer puts ahead of every
    text, such as LLaMA's <s>, unless they spell it themselves; and where a text spells a special
    token, it is that token. An empty context is the token that begins a text, or, without one, the
    one that ends it. Chat templates are not applied: a folder's is not kept.

    Args:
      served: what `train.serving.load` gives, a decoder.
      batch_size: most requests at a time; of those that generate, with equal options but for stops.
      add_bos_token: False leaves out what the tokenizer puts ahead, as that of `HFLM` does.
      seed: of tasks that sample, an integer in [0, 2**31).
    """

    def __init__(
        self, served: Served, batch_size: int = 8, *, add_bos_token: bool = True, seed: int = 0
    ):
        check_decoder(served)
        if not is_integer(seed) or not 0 <= seed < 2**31:
            raise ValueError(f"seed={seed!r} must be an integer in [0, 2**31)")
        self.served, self.size, self.seed = served, batch_size, seed
        self.longest = served.longest
        self.tokenizer = served.vocabulary.with_special_tokens
        self.beginning = served.beginning if add_bos_token else []
        self.start = start_token(served)
        names = {
            token: self.tokenizer.id_to_token(token) for token in served.vocabulary.specials.all
        }
        self.specials = {token: name for token, name in names.items() if token not in served.ends}

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False):
        """For args (context, continuation): nats of the continuation's likelihood, and whether
        greedy generation gives it.

        Raises:
          ValueError: a continuation has no tokens, or more than a sequence; says whose.
        """
        pieces = []
        for number, (context, continuation) in enumerate(request.args for request in requests):
            before, after = self._pair(context, continuation)
            if not 1 <= len(after) <= self.longest:
                raise ValueError(
                    f"request {number}, {_shown(context)} and {_shown(continuation)}: a continuation"
                    f" of {len(after)} tokens; there must be 1 .. {self.longest}, as many as the"
                    " longest sequences of the run have. Leave it out of the task"
                )
            tokens = np.array([*before, *after], np.int32)[-(self.longest + 1) :]
            pieces.append((tokens, len(after)))
        scores = self._score(pieces)
        return [(-float(s.nats.sum(dtype=np.float64)), bool(s.greedy.all())) for s in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False):
        """For args (text,): nats of the whole text's likelihood, in windows that score side by side.

        Each reads as much as fits, so that the last one scores what is left behind a full context,
        as the harness asks. As in `HFLM`, the token that begins a text stands ahead of all: where the
        tokenizer puts it ahead, too, it is there twice, and the second one is scored like the text's
        tokens. `add_bos_token=False` scores those alone.
        """
        pieces, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = np.array([self.start, *self._encode(text)], np.int32)
            if len(tokens) < 2:
                continue  # no tokens are certain
            for w in strided_windows(len(tokens), self.longest, self.longest):
                start = max(0, w.stop - self.longest)
                pieces.append((tokens[start : w.stop + 1], w.stop - w.scored))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, s in zip(owners, self._score(pieces), strict=True):
            totals[owner] -= float(s.nats.sum(dtype=np.float64))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """For args (context, options): the continuation ahead of the first stop.

        Options: `until`, a text or several; `max_gen_toks`, or another of its names, of which a prompt
        leaves room for all, or, where they are not fewer than the model's longest sequence, for half
        of that; `temperature`, `top_k` and `top_p`, as of `slope_jax.generate.generate`. Greedy
        unless `do_sample` is true, or there is a temperature and no `do_sample`; a temperature of 0 is
        greedy, too, and without one it is 1. What is sampled depends on the seed and on the number of
        the request, so that repeats differ. `top_k=0` is none.

        The new tokens are decoded by themselves and without special ones, as in `HFLM`: some tokenizers
        write no space ahead of a first word.

        Raises:
          ValueError: no new tokens are asked for, there is no room for any prompt, or a temperature,
            `top_k` or `top_p` is out of range; says by whom.
          NotImplementedError: another option, such as beams.
        """
        named = [
            (f"request {number}, {_shown(context)}", context, options)
            for number, (context, options) in enumerate(request.args for request in requests)
        ]
        for who, _, options in named:
            self._check(who, options)
        asked = [self._asked(context, options) for _, context, options in named]
        return generated(
            self.served, asked, batch_size=self.size, seed=self.seed, specials=self.specials
        )

    def _check(self, who: str, options: dict[str, Any]) -> None:
        known = [*_OPTIONS, *(["num_beams"] if options.get("num_beams") == 1 else [])]
        if others := [f"{name}={value!r}" for name, value in options.items() if name not in known]:
            raise NotImplementedError(
                f"{who}: {', '.join(others)}; generation here takes {', '.join(_OPTIONS)}. Take the"
                " others out of the task"
            )
        if (wanted := _wanted(options)) < 1:
            raise ValueError(f"{who}: max_gen_toks={wanted} must be 1 or more")
        if self.longest < 2:
            raise ValueError(
                f"{who}: max_gen_toks={wanted} leaves no room for a prompt in sequences of"
                f" {self.longest} tokens, the longest of the run; evaluate a model trained on longer"
                " ones"
            )
        vocab_size = self.served.model.config.vocab_size
        if how := _sampling(options, vocab_size):
            try:
                check_sampling(**how, vocab_size=vocab_size)
            except ValueError as error:
                raise ValueError(f"{who}: {error}") from error

    def _asked(self, context: str, options: dict[str, Any]) -> Request:
        stops = options.get("until") or []
        stops = stop_texts(self.served.vocabulary, [stops] if isinstance(stops, str) else stops)
        wanted = _wanted(options)
        count = wanted if wanted < self.longest else self.longest // 2
        prompt = (self._encode(context) or [self.start])[-(self.longest - count) :]
        sampling = _sampling(options, self.served.model.config.vocab_size)
        return Request(prompt, count, sampling, stops)

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both, those of the continuation from where they are not the context's alone.

        It has one at least, even where it only makes the context's last word longer: `HFLM` scores
        the tokens behind as many as the context has, and so leaves out some of its letters there. The
        last spaces of the context go along with it.
        """
        encode = self._encode
        if not context:
            tokens = self._bare(continuation)
            cut = int(tokens[:1] == [self.start])
            return tokens[:cut] or [self.start], tokens[cut:]
        if not continuation:
            return encode(context), []
        if spaces := len(context) - len(context.rstrip()):
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before, both = encode(context), encode(context + continuation)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, both, strict=False))
        cut = min(sum(1 for _ in same), len(both) - 1)
        return both[:cut] or [self.start], both[cut:]

    def _bare(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _encode(self, text: str) -> list[int]:
        """Ids, behind what the tokenizer puts ahead, unless the text begins with that by name."""
        return with_special_tokens(self.served, text, self.beginning)

    def _score(self, pieces):
        model, variables = self.served.model, self.served.variables
        return score(model, variables, pieces, batch_size=self.size)


def _wanted(options: dict[str, Any]) -> int:
    """New tokens that a task asks for."""
    given = [options[name] for name in _COUNTS if options.get(name) is not None]
    return given[0] if given else MAX_NEW_TOKENS


def _sampling(options: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """How `stream` samples for a task; nothing where it is greedy."""
    temperature, sampled = options.get("temperature"), options.get("do_sample")
    sampled = bool(temperature) if sampled is None else sampled
    temperature = 1.0 if temperature is None else temperature
    if not sampled or not temperature:
        return {}
    top_k = options.get("top_k") or None
    if is_integer(top_k):
        top_k = min(top_k, vocab_size)
    return {"temperature": temperature, "top_k": top_k, "top_p": options.get("top_p")}


def _shown(text: str) -> str:
    """Enough of a text to find it by."""
    return repr(text if len(text) <= 60 else f"{text[:28]} ... {text[-27:]}")


def harness_model(
    served: Served, batch_size: int = 8, *, add_bos_token: bool = True, seed: int = 0
):
    """A `Harness` that is an `lm_eval.api.model.LM`; arguments are those of `Harness`.

    Raises:
      ValueError: the harness is not installed, or the model is no decoder.
    """
    base = _lm_eval("lm_eval.api.model").LM

    class SlopeModel(Harness, base):
        def __init__(self):
            base.__init__(self)
            Harness.__init__(self, served, batch_size, add_bos_token=add_bos_token, seed=seed)

    return SlopeModel()


def evaluate_tasks(
    served: Served,
    tasks: Sequence[str | dict[str, Any]],
    *,
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    add_bos_token: bool = True,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Numbers by task and metric, from the harness.

    Args:
      served: what `train.serving.load` gives, a decoder.
      tasks: names, files (.yaml) or configurations of tasks.
      shots: solved examples ahead of each; None: as each task has it.
      limit: examples of each task; None: all.
      batch_size: requests at a time.
      add_bos_token, seed: as of `Harness`.

    Raises:
      ValueError: the harness is not installed, or as `check_tasks`.
    """
    harness, tasks = _lm_eval("lm_eval"), list(tasks)
    check_tasks(task for task in tasks if isinstance(task, str))
    model = harness_model(served, batch_size, add_bos_token=add_bos_token, seed=seed)
    found = harness.simple_evaluate(
        model=model,
        tasks=[_found(task) if isinstance(task, str) else task for task in tasks],
        num_fewshot=shots,
        limit=limit,
        task_manager=_task_manager(),
    )
    return {
        name: {metric: value for metric, value in numbers.items() if isinstance(value, float)}
        for name, numbers in found["results"].items()
    }


def _found(name: str) -> str:
    """As the harness takes it, which does not know that ~ is a home."""
    known = name in _task_manager().all_tasks
    return name if known else str(pathlib.Path(name).expanduser())


def check_tasks(names: Iterable[str]) -> None:
    """Raises a ValueError unless there is a harness, and these are its tasks or files of others."""
    _lm_eval("lm_eval")
    known = set(_task_manager().all_tasks)
    for name in names:
        if name in known:
            continue
        file = pathlib.Path(name).expanduser()
        if not file.is_file():
            raise ValueError(
                f"{name!r} is neither a task of the LM Evaluation Harness nor a .yaml file that is"
                " there; `lm-eval ls tasks` lists its tasks, groups and tags"
            )
        _check_yaml(file)


def _check_yaml(file: pathlib.Path) -> None:
    import yaml  # comes with the harness

    try:
        for _ in yaml.parse(file.read_text(encoding="utf-8")):
            pass
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no YAML, so no task: {error}") from error


@functools.cache
def _task_manager():
    """What knows the harness's tasks; it reads thousands of files to."""
    return _lm_eval("lm_eval.tasks").TaskManager()


def _lm_eval(name: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "lm_eval":
            raise
        raise ValueError(
            "tasks need the LM Evaluation Harness: pip install 'slope-jax[eval]'"
        ) from error
