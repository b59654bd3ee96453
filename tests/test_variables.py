"""Variables that are not the model's, at all that takes both."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from slope_jax import export, models
from slope_jax.fill import fill_masks
from slope_jax.generate import generate, inference_variables, stream
from slope_jax.models.variables import check_variables

SIZES = {"hidden_size": 32, "num_heads": 4, "mlp_size": 64, "num_layers": 3, "vocab_size": 61}
IDS = np.array([[5, 4, 7]])
CALLS = {
    "generate": functools.partial(generate, prompts=IDS, max_new_tokens=2),
    "stream": functools.partial(stream, prompts=IDS, max_new_tokens=2),
    "export": functools.partial(export.export, batch=1, prompt=3, max_new_tokens=2),
    "fill_masks": functools.partial(fill_masks, input_ids=IDS, mask_token=4),
}


@functools.cache
def made(name, seed=0, **fields):
    model = models.build(name, **(SIZES | {"max_positions": 16} | fields))
    return model, jax.jit(model.init)(jax.random.key(seed), **model.example_inputs())


def of(call, **fields):
    return made("bert-tiny" if call == "fill_masks" else "gpt2-nano", **fields)


def other(model, variables):
    """The same form in another size."""
    return made("bert-tiny" if isinstance(model, models.Bert) else "gpt2-nano", mlp_size=48)[1]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda model, variables: {}, "variables hold nothing; .* has params and masks: give"),
        (lambda model, variables: variables["params"], "variables hold embeddings, .*: give"),
        (
            lambda model, variables: {"params": variables["params"]},
            "variables hold params; .*: give",
        ),
        (lambda model, variables: {"params": np.zeros(3)}, "variables hold params; .*: give"),
        (lambda model, variables: None, "variables are a NoneType; give"),
        (
            other,
            r"not those of this \w+; give its own. In shape differ masks/layers_0/.*: \(.*, 32\) here",
        ),
        (
            lambda model, variables: models.unstack_layers(variables),
            "in the form of this .* use the model that inference_variables returned with them",
        ),
        (
            lambda model, variables: inference_variables(model, variables)[1],
            "in the form of this .* use the model that inference_variables returned with them",
        ),
    ],
)
def test_variables_of_another_kind_are_refused(call, wrong, message):
    model, variables = of(call, adapter_rank=3)
    with pytest.raises(ValueError, match=message):
        CALLS[call](model, wrong(model, variables))


def test_a_prepared_model_refuses_what_it_was_prepared_from():
    model, variables = made("gpt2-nano", adapter_rank=3)
    prepared, _ = inference_variables(model, variables)
    with pytest.raises(ValueError, match="use the variables that inference_variables returned"):
        generate(prepared, variables, IDS, max_new_tokens=2)


def test_only_the_models_own_are_prepared_stacked_or_apart():
    model, variables = made("gpt2-nano")
    for wrong in ({}, variables["params"], made("gpt2-nano", mlp_size=48)[1]):
        with pytest.raises(ValueError, match=r"variables .* give"):
            inference_variables(model, wrong)
    whole, apart = (
        inference_variables(model, v) for v in (variables, models.unstack_layers(variables))
    )
    assert whole[0] == apart[0]
    jax.tree.map(np.testing.assert_array_equal, whole[1], apart[1])


def test_whats_besides_is_not_looked_at_and_dense_models_need_no_masks():
    model, variables = made("gpt2-nano")
    check_variables(model, variables | {"intermediates": {"x": 1}})
    dense, plain = made("gpt2-nano", sparsity="dense")
    assert "masks" not in plain
    for masks in ({}, {"masks": {}}):
        check_variables(dense, plain | masks)
    with pytest.raises(ValueError, match=r"has not, .*: masks/layers_0/.* or leave them out"):
        check_variables(dense, plain | {"masks": variables["masks"]})
    adapted = made("gpt2-nano", adapter_rank=2)[1]
    with pytest.raises(ValueError, match=r"has not, .*/adapter_l, .* or leave them out"):
        check_variables(model, adapted)


def test_boxes_are_named():
    model, variables = made("gpt2-nano")
    boxed = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), variables)
    with pytest.raises(ValueError, match=r"give flax\.linen\.unbox\(variables\)"):
        generate(model, boxed, IDS, max_new_tokens=2)


def test_models_for_another_device_are_known_too():
    model, variables = made("gpt2-nano")
    fields = {"attention": "cudnn", "implementation": "mosaic", "remat": True}
    check_variables(type(model)(dataclasses.replace(model.config, **fields)), variables)


def test_variables_may_be_batched_by_vmap():
    model, first = made("gpt2-nano")
    second = made("gpt2-nano", seed=1)[1]
    both = jax.tree.map(lambda *leaves: np.stack(leaves), first, second)
    run = functools.partial(generate, model, prompts=IDS, max_new_tokens=4)
    tokens = jax.vmap(lambda variables: run(variables).tokens)(both)
    expected = [run(variables).tokens for variables in (first, second)]
    assert not np.array_equal(*expected)
    np.testing.assert_array_equal(tokens, np.stack(expected))
    with pytest.raises(ValueError, match="In shape differ"):  # one axis more than the model's
        run(both)


def test_a_model_is_traced_for_its_shapes_once(monkeypatch):
    model, variables = made("gpt2-nano", hidden_size=48)
    check_variables(model, variables)
    monkeypatch.setattr(type(model), "init", None)
    check_variables(
        models.build("gpt2-nano", **SIZES | {"max_positions": 16, "hidden_size": 48}), variables
    )
