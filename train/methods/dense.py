"""The dense control: the same recipe without sparsity."""

from train.methods.base import Method


class Dense(Method):
    """Nothing is pruned."""

    about = "nothing is pruned"
