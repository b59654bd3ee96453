"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import pallas_kernels
import slope_jax

MODULES = [
    name
    for package in (pallas_kernels, slope_jax)
    for _, name, _ in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]


NEEDS = {"pallas_kernels.triton.kernel": "triton"}  # modules of extras


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    assert doctest.testmod(importlib.import_module(name)).failed == 0
