"""Generation with a cache against the same model without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slope_jax import decoding, models
from slope_jax.generate import generate, inference_variables, stream

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SMALL = {
    "hidden_size": 32,
    "num_heads": 4,
    "mlp_size": 64,
    "num_layers": 2,
    "vocab_size": 61,
    "max_positions": 16,
    "sparsity": "layers/.*=2:4; .*=dense",
}
LLAMA = {"num_kv_heads": 2, "window": 4}
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (3, 12)), jnp.int32)
LENGTHS = np.array([6, 1, 4])
PROMPTS = IDS[:, :6]


@functools.cache
def made(name, **overrides):
    """A model and variables far from its birth, where all logits are alike."""
    model = models.build(name, **(SMALL | overrides))
    variables = jax.jit(model.init)(jax.random.key(0), IDS)
    params = jax.tree.map(lambda leaf: leaf * 6, variables["params"])
    return model, variables | {"params": params}


@functools.cache
def applied(model):
    return jax.jit(model.apply)


@pytest.fixture(params=["opt-nano", "llama-nano"])
def decoder(request):
    return made(request.param, **(LLAMA if request.param == "llama-nano" else {}))


def test_cached_logits_are_those_of_the_whole_sequence(decoder):
    """Five tokens at once, then each by itself, in other places in every row."""
    model, variables = decoder
    whole = np.asarray(applied(model)(variables, IDS))[..., :61]
    step = jax.jit(functools.partial(model.apply, mutable=["cache"]))
    cache = {"cache": models.init_cache(model.config, 3, 12)}
    first = jnp.asarray([[4], [2], [0]], jnp.int32)
    logits, cache = step({**variables, **cache}, IDS[:, :5], logits_at=first)
    rows = np.arange(3)[:, None]
    np.testing.assert_allclose(logits[..., :61], whole[rows, first], rtol=1e-4, atol=1e-4)
    for i in range(1, 8):
        ids = jnp.take_along_axis(IDS, first + i, axis=1)
        logits, cache = step({**variables, **cache}, ids, positions=first + i)
        np.testing.assert_allclose(logits[..., :61], whole[rows, first + i], rtol=1e-4, atol=1e-4)


def test_cached_logits_of_one_sequence_are_those_of_the_whole():
    """One row by itself, whose keys and values are placed in the cache in a way of their own."""
    model, variables = made("llama-nano", **LLAMA)
    ids = IDS[1:2]
    whole = np.asarray(applied(model)(variables, ids))
    step = jax.jit(functools.partial(model.apply, mutable=["cache"]))
    cache = {"cache": models.init_cache(model.config, 1, 12)}
    _, cache = step({**variables, **cache}, ids[:, :3])
    for i in range(3, 10):
        at = jnp.asarray([[i]], jnp.int32)
        logits, cache = step({**variables, **cache}, ids[:, i : i + 1], positions=at)
        np.testing.assert_allclose(logits[:, 0], whole[:, i], rtol=1e-4, atol=1e-4)


def test_greedy_is_the_argmax_of_the_whole_sequence():
    model, variables = made("llama-nano", **LLAMA)
    apply = applied(model)
    ids = np.pad(np.asarray(PROMPTS), ((0, 0), (0, 6)))
    expected = np.zeros((3, 6), np.int32)
    for step in range(6):
        logits = np.asarray(apply(variables, jnp.asarray(ids)))
        expected[:, step] = logits[np.arange(3), LENGTHS + step - 1].argmax(-1)
        ids[np.arange(3), LENGTHS + step] = expected[:, step]
    assert len(np.unique(expected)) > 4
    got = generate(model, variables, PROMPTS, lengths=LENGTHS, max_new_tokens=6)
    np.testing.assert_array_equal(got.tokens, expected)
    np.testing.assert_array_equal(got.lengths, [6, 6, 6])


def test_prepared_variables_say_the_same():
    model, variables = made("llama-nano", **LLAMA)
    single, prepared = inference_variables(model, variables)
    assert "layers_1" in prepared["params"]
    plain = generate(model, variables, PROMPTS, lengths=LENGTHS, max_new_tokens=6)
    again = generate(single, prepared, PROMPTS, lengths=LENGTHS, max_new_tokens=6)
    np.testing.assert_array_equal(plain.tokens, again.tokens)


def test_ranks_are_filled_up_with_zeros_to_what_kernels_take():
    model, variables = made("opt-nano", adapter_rank=3)
    single, prepared = inference_variables(model, variables)
    assert single.config.rank == 8
    plain = models.unstack_layers(variables)["params"]["layers_1"]["mlp"]["up"]
    filled = prepared["params"]["layers_1"]["mlp"]["up"]
    for name, axis in (("adapter_l", 1), ("adapter_r", 0)):
        kept, added = np.split(np.asarray(filled[name]), [3], axis=axis)
        np.testing.assert_array_equal(kept, plain[name])
        assert added.shape[axis] == 5
        assert not added.any()
    again, same = inference_variables(single, prepared)
    assert again == single
    jax.tree.map(np.testing.assert_array_equal, same, prepared)
    tokens = generate(model, variables, PROMPTS, lengths=LENGTHS, max_new_tokens=6).tokens
    filled = generate(single, prepared, PROMPTS, lengths=LENGTHS, max_new_tokens=6).tokens
    np.testing.assert_array_equal(tokens, filled)


def test_preparing_changes_no_bit_and_halves_the_bytes():
    """What is cast ahead is what the layers would cast."""
    model = models.build("opt-nano", **SMALL, dtype="bfloat16", scan=False)
    variables = models.unstack_layers(made("opt-nano")[1])
    single, prepared = inference_variables(model, variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(prepared["params"]):
        wide = path[-1].key in ("bias", "scale")
        assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16), path
    np.testing.assert_array_equal(
        jax.jit(single.apply)(prepared, IDS), jax.jit(model.apply)(variables, IDS)
    )


def test_an_end_token_ends_its_row():
    model, variables = made("opt-nano")
    options = {"lengths": LENGTHS, "max_new_tokens": 6}
    free = np.asarray(generate(model, variables, PROMPTS, **options).tokens)
    end = int(free[0, 2])
    got = generate(model, variables, PROMPTS, end_token=end, **options)
    for row, expected in enumerate(free):
        hits = np.flatnonzero(expected == end)
        length = hits[0] + 1 if len(hits) else 6
        assert got.lengths[row] == length
        np.testing.assert_array_equal(got.tokens[row, :length], expected[:length])
        assert (np.asarray(got.tokens[row, length:]) == end).all()
    assert got.lengths[0] <= 3


def test_any_of_several_end_tokens_ends_a_row():
    model, variables = made("opt-nano")
    options = {"lengths": LENGTHS, "max_new_tokens": 6}
    free = np.asarray(generate(model, variables, PROMPTS, **options).tokens)
    ends = [int(free[0, 2]), int(free[1, 4])]
    got = generate(model, variables, PROMPTS, end_token=np.array(ends), **options)
    pieces = stream(model, variables, PROMPTS, end_token=jnp.array(ends), chunk=2, **options)
    streamed = np.concatenate(list(pieces), axis=1)
    for row, expected in enumerate(free):
        hits = np.flatnonzero(np.isin(expected, ends))
        length = hits[0] + 1 if len(hits) else 6
        assert got.lengths[row] == length
        expected = np.where(np.arange(6) < length, expected, ends[0])
        np.testing.assert_array_equal(got.tokens[row], expected)
        np.testing.assert_array_equal(streamed[row], expected[: streamed.shape[1]])
    assert got.lengths[1] <= 5


def test_a_temperature_may_be_an_array():
    model, variables = made("opt-nano")
    options = {"max_new_tokens": 3, "key": jax.random.key(1)}
    expected = generate(model, variables, PROMPTS, temperature=1.5, **options).tokens
    found = generate(model, variables, PROMPTS, temperature=jnp.float32(1.5), **options).tokens
    np.testing.assert_array_equal(found, expected)
    greedy = generate(model, variables, PROMPTS, temperature=jnp.float32(0), **options).tokens
    np.testing.assert_array_equal(greedy, generate(model, variables, PROMPTS, **options).tokens)


def test_sampling_follows_the_distribution():
    model, variables = made("opt-nano")
    count = 2048
    logits = np.asarray(applied(model)(variables, IDS), np.float64)[0, 5, :61] / 2
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    prompts = jnp.tile(PROMPTS[:1], (count, 1))
    got = generate(model, variables, prompts, max_new_tokens=1, temperature=2.0, key=KEY)
    got = np.bincount(np.asarray(got.tokens)[:, 0], minlength=61)
    often = count * shares > 5
    chi_squared = ((got - count * shares) ** 2 / (count * shares))[often].sum()
    assert often.sum() > 10
    assert chi_squared < often.sum() + 5 * np.sqrt(2 * often.sum())  # mean and deviation


KEY = jax.random.key(7)


@pytest.mark.parametrize("padding", [-100, 2**31 - 1])
def test_what_pads_prompts_changes_nothing(padding):
    model, variables = made("opt-nano")
    padded = np.where(np.arange(6) < LENGTHS[:, None], PROMPTS, padding)
    options = {"lengths": LENGTHS, "max_new_tokens": 6}
    expected = generate(model, variables, PROMPTS, **options).tokens
    np.testing.assert_array_equal(generate(model, variables, padded, **options).tokens, expected)


def test_prompts_may_be_traced():
    model, variables = made("opt-nano")

    @jax.jit
    def run(prompts, lengths):
        return generate(model, variables, prompts, lengths=lengths, max_new_tokens=6).tokens

    expected = generate(model, variables, PROMPTS, lengths=LENGTHS, max_new_tokens=6).tokens
    np.testing.assert_array_equal(run(PROMPTS, LENGTHS), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a positive integer"),
        ({"max_new_tokens": 11}, "6 tokens and 11 new ones are 17, more than max_positions=16"),
        ({"lengths": [0, 1, 1]}, r"lengths=\[0, 1, 1\]; .* 3 integers in 1 .. 6"),
        ({"lengths": [7, 1, 1]}, r"in 1 .. 6"),
        ({"lengths": [1.0, 1.0, 1.0]}, "integers"),
        ({"temperature": -1.0}, "temperature=-1.0 must not be negative"),
        ({"temperature": float("nan")}, "temperature=nan must not be"),
        ({"temperature": float("inf"), "key": KEY}, "temperature=inf must not be .* infinite"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0 must be a positive integer"),
        ({"temperature": 1e-46, "key": KEY}, "temperature=1e-46 divides .* 1e-30 and 1e[+]30"),
        ({"temperature": 1e39, "key": KEY}, r"temperature=1e[+]39 divides"),
        ({"end_token": 61}, r"end_token=61 must be an integer between 0 and 60"),
        ({"end_token": -1}, "end_token=-1 must be"),
        ({"end_token": [3, 61]}, r"end_token=\[3, 61\] must be"),
        ({"end_token": jnp.array([3, 61])}, r"end_token=\[3, 61\] must be"),
        ({"end_token": jnp.array([3.0])}, r"end_token=\[3.0\] must be"),
        ({"end_token": np.array(61)}, r"end_token=61 must be"),
        ({"end_token": []}, r"end_token=\[\] must be"),
        ({"end_token": "</s>"}, "end_token='</s>' must be"),
        ({"temperature": None}, "temperature=None must be a number"),
        ({"temperature": "hot"}, "temperature='hot' must be a number"),
        ({"temperature": np.array("hot")}, "temperature=array.* must be a number"),
        ({"temperature": True}, "temperature=True must be a number"),
        ({"temperature": np.complex64(1)}, "temperature=.* must be a number"),
        ({"temperature": 1.0, "key": KEY, "top_p": "a"}, "top_p='a' must be a probability"),
        ({"temperature": 1.0, "key": 0}, r"key=0 is no key; pass key=jax.random.key\(0\)"),
        ({"temperature": 1.0, "key": np.zeros(3)}, r"key is float64\[3\], which is no key; pass"),
        ({"temperature": 1.0, "key": np.zeros(3, np.uint32)}, r"key is uint32\[3\], which is no"),
        (
            {"temperature": 1.0, "key": np.zeros((4, 2), np.uint32)},
            "4 keys; pass one, .* the 3 rows",
        ),
        ({"temperature": 1.0, "key": KEY, "top_k": 2.0}, "top_k=2.0 must be an integer"),
        ({"temperature": 1.0}, r"samples; pass key="),
        ({"temperature": 1.0, "key": KEY, "top_k": 62}, "top_k=62 must be .* between 1 and 61"),
        ({"temperature": 1.0, "key": KEY, "top_p": 0.0}, "top_p=0.0 must be a probability"),
        ({"top_k": 2}, "set a temperature above 0"),
    ],
)
def test_bad_options(options, message):
    model = models.build("gpt2-nano", **SMALL)
    with pytest.raises(ValueError, match=message):
        generate(model, {}, PROMPTS, **({"max_new_tokens": 2} | options))


def test_bad_models_prompts_and_places():
    with pytest.raises(ValueError, match=r"Bert does not generate; fill_masks .* LLaMA or Mistral"):
        generate(models.build("bert-tiny"), {}, PROMPTS, max_new_tokens=1)
    model = models.build("gpt2-nano", **SMALL)
    with pytest.raises(ValueError, match=r"prompts are int32\[6\]; they must be integers"):
        generate(model, {}, PROMPTS[0], max_new_tokens=1)
    with pytest.raises(ValueError, match="prompts have rows of different lengths; pad them"):
        generate(model, {}, [[1, 2], [3]], max_new_tokens=1)
    for wrong, lengths in ((61, None), (-1, None), (2**40, [6, 1, 3])):  # which wraps to 0
        prompts = np.asarray(PROMPTS, np.int64)
        prompts[2, 2] = wrong
        with pytest.raises(ValueError, match=rf"prompts\[2, 2\]={wrong} is no token: .* 0 and 60"):
            generate(model, {}, prompts, lengths=lengths, max_new_tokens=1)
    apart = models.build("gpt2-nano", **SMALL, scan=False)
    for each in (model, apart):
        init = functools.partial(jax.eval_shape, each.init, jax.random.key(0), PROMPTS)
        with pytest.raises(ValueError, match="positions are given without a cache"):
            init(positions=PROMPTS)
    with pytest.raises(ValueError, match=r"positions is int32\[3, 2\]; .* integers \[3, 6\]"):
        init(positions=PROMPTS[:, :2])
    with pytest.raises(ValueError, match=r"logits_at is int32\[3\]; .* integers \[3, K\]"):
        init(logits_at=PROMPTS[:, 0])


def test_a_stream_is_the_whole_in_pieces():
    model, variables = made("llama-nano", **LLAMA)
    options = {"lengths": LENGTHS, "max_new_tokens": 9, "temperature": 1.0, "top_k": 20}
    options["key"] = jax.random.key(3)
    whole = generate(model, variables, PROMPTS, **options)
    pieces = list(stream(model, variables, PROMPTS, chunk=3, **options))
    assert [piece.shape[1] for piece in pieces] == [1, 3, 3, 2]
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole.tokens)
    # It stops where the row ends, with the third token or before.
    greedy = generate(model, variables, PROMPTS[:1], lengths=[6], max_new_tokens=9)
    end = int(greedy.tokens[0, 2])
    ended = generate(model, variables, PROMPTS[:1], lengths=[6], end_token=end, max_new_tokens=9)
    pieces = list(
        stream(model, variables, PROMPTS[:1], lengths=[6], end_token=end, max_new_tokens=9)
    )
    found = np.concatenate(pieces, axis=1)[0]
    np.testing.assert_array_equal(found, ended.tokens[0, : len(found)])
    assert len(found) == ended.lengths[0] <= 3
    for chunk in (0, 1.5, True, None):
        with pytest.raises(ValueError, match=f"chunk={chunk} must be a positive integer"):
            stream(model, variables, PROMPTS, max_new_tokens=2, chunk=chunk)


@pytest.mark.parametrize("rows", [1, 3])
def test_it_generates_where_jax_counts_in_64_bits(rows):
    model, variables = made("llama-nano", **LLAMA)
    prompts = np.asarray(PROMPTS[:rows])
    options = {"lengths": LENGTHS[:rows], "max_new_tokens": 5}
    expected = generate(model, variables, prompts, **options).tokens
    with jax.enable_x64(True):
        found = generate(model, variables, prompts, **options).tokens
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_steps_that_are_not_needed_leave_nothing(steps, monkeypatch):
    """As one by one: with ends of rows and of all rows, and of the cache, in the midst of a program."""
    model, variables = made("llama-nano", **LLAMA)
    options = {"lengths": LENGTHS, "max_new_tokens": 10}
    free = np.asarray(generate(model, variables, PROMPTS, **options).tokens)
    ends = sorted({int(row[at]) for row, at in zip(free, (3, 4, 2), strict=True)})
    sampled = {"temperature": 1.0, "key": jax.random.key(1)}

    def texts():
        for more in ({}, sampled, {"end_token": ends}, {"end_token": ends[0], **sampled}):
            yield generate(model, variables, PROMPTS, **options, **more)
            for chunk in (1, 4, 7):
                yield list(stream(model, variables, PROMPTS, chunk=chunk, **options, **more))

    expected = list(texts())
    monkeypatch.setattr(decoding, "_runs_through", lambda *_: True)
    monkeypatch.setattr(decoding, "STEPS", steps)
    jax.tree.map(np.testing.assert_array_equal, list(texts()), expected)
    pieces = [text for text in expected if isinstance(text, list)]
    assert any(sum(piece.shape[1] for piece in text) < 10 for text in pieces)  # all rows ended


def test_programs_make_all_their_steps_where_waiting_costs_a_gpu_more(monkeypatch):
    """By hand: 3 GB are read in 1000 us, and a program costs the host 1400."""

    class Gpu:
        platform = "gpu"

    def runs_through(steps, size, nbytes):
        weights = jax.ShapeDtypeStruct((nbytes // 2,), jnp.bfloat16)
        given = decoding.Given({"params": weights}, np.ones(1), None, None, None)
        loop = decoding.Loop(None, None, np.zeros((1, 1)), None, None)
        return decoding._runs_through(given, loop, steps, size)

    assert not runs_through(128, 8, 10**8)  # a CPU does not wait
    monkeypatch.setattr(decoding, "current", Gpu)
    found = {steps: runs_through(steps, 8, 3 * 10**9) for steps in (1, 6, 7, 8, 9, 11, 16, 41)}
    assert found == {1: False, 6: False, 7: True, 8: True, 9: False, 11: False, 16: True, 41: True}
    assert all(runs_through(steps, 8, 10**8) for steps in range(1, 100))
    assert runs_through(41, 1, 10**12)


def test_few_programs_serve_all_lengths_of_prompts_and_numbers_of_new_tokens():
    """Three of widths and two of caches; the tokens are those of the model without a cache."""
    model, variables = made("gpt2-nano", max_positions=280, num_layers=1)
    ids = np.tile(np.asarray(IDS), (1, 24))
    programs = (decoding.start, decoding.advance)
    before = [program._cache_size() for program in programs]
    sizes = ((1, 16), (5, 252), (64, 192), (63, 1), (65, 33), (128, 2), (279, 1), (270, 9))
    for width, count in sizes:
        prompts = ids[:1, :width]
        expected = generate(model, variables, prompts, max_new_tokens=count)
        pieces = list(stream(model, variables, prompts, max_new_tokens=count))
        streamed = np.concatenate(pieces, axis=1)
        assert expected.tokens.shape == (1, count)
        np.testing.assert_array_equal(streamed, expected.tokens)
        whole = np.concatenate([prompts, streamed], axis=1)
        padded = np.pad(whole, ((0, 0), (0, 280 - whole.shape[1])))
        best = np.asarray(applied(model)(variables, padded)).argmax(-1)
        np.testing.assert_array_equal(best[:, width - 1 : whole.shape[1] - 1], streamed)
    made_now = [program._cache_size() - n for program, n in zip(programs, before, strict=True)]
    assert made_now == [3, 2]


def test_prompts_that_fill_the_positions_fit():
    model, variables = made("opt-nano")
    whole = np.asarray(applied(model)(variables, np.pad(np.asarray(IDS), ((0, 0), (0, 4)))))
    for width in (12, 15):
        ids = np.pad(np.asarray(IDS), ((0, 0), (0, 3)))[:, :width]
        made_of = generate(model, variables, ids, lengths=[12] * 3, max_new_tokens=16 - width)
        assert made_of.tokens.shape == (3, 16 - width)
        np.testing.assert_array_equal(made_of.tokens[:, 0], whole[:, 11].argmax(-1))


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_a_row_with_a_key_of_its_own_is_sampled_as_by_itself(kind):
    model, variables = made("opt-nano")
    options = {"max_new_tokens": 6, "temperature": 2.0, "top_k": 30}
    keys = jax.random.split(jax.random.key(1, impl=kind), 3)
    found = generate(model, variables, PROMPTS, lengths=LENGTHS, key=keys, **options).tokens
    for row, length in enumerate(LENGTHS):
        prompt = PROMPTS[row : row + 1, :length]
        raw = [jax.random.key_data(keys[row])] if kind == "threefry2x32" else []
        for key in (keys[row], *raw):
            alone = generate(model, variables, prompt, key=key, **options).tokens
            np.testing.assert_array_equal(alone[0], found[row])
    if kind == "threefry2x32":  # whose raw numbers are keys
        raw = np.asarray(jax.random.key_data(keys))
        again = generate(model, variables, PROMPTS, lengths=LENGTHS, key=raw, **options).tokens
        np.testing.assert_array_equal(again, found)


def test_keys_may_be_batched_by_vmap():
    model, variables = made("opt-nano")
    keys = jax.random.split(jax.random.key(0), 3)

    def texts(key):
        options = {"max_new_tokens": 5, "temperature": 1.0, "key": key}
        return generate(model, variables, PROMPTS, lengths=LENGTHS, **options).tokens

    np.testing.assert_array_equal(jax.vmap(texts)(keys), [texts(key) for key in keys])
