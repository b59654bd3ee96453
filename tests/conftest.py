"""Strict settings for every test: promotions that hide a bug raise instead."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """No implicit dtype promotion. Not for all tests: optax itself relies on promotion."""
    with jax.numpy_dtype_promotion("strict"):
        yield
