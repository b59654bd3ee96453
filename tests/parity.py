"""What the comparisons with Transformers share: random weights, pruned weights, tolerances."""

import jax
import numpy as np


def randomised(torch, model):
    """Every parameter random: a bias or scale left at 0 or 1 would hide a wrong mapping."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1 + 0.2 * torch.randn(parameter.shape, generator=generator)
            other = 0.25 * torch.randn(parameter.shape, generator=generator)
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(scale if is_scale else other)
    return model.eval()


def pruned_in_place(torch, model, patterns, axis):
    """Their model with its weights masked by magnitude, groups along `axis` of the tensor."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            pattern = patterns(name)
            if pattern is None:
                continue
            n, m = pattern
            w = np.moveaxis(parameter.numpy().copy(), axis, -1)
            groups = w.reshape(*w.shape[:-1], -1, m)
            drop = np.argsort(np.abs(groups), axis=-1)[..., : m - n]
            np.put_along_axis(groups, drop, 0, axis=-1)
            parameter.copy_(torch.tensor(np.moveaxis(groups.reshape(w.shape), -1, axis)))


def logits(torch, model, ids):
    """Their logits, numpy."""
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids)).logits.numpy()


def close(ours, theirs):
    assert theirs.std() > 0.1  # a thousand times the tolerance
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def same_form(model, variables):
    """What `init` gives: structure, shapes, dtypes."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    described = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)
        for tree in (dict(shapes), variables)
    ]
    assert described[0] == described[1]
