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


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
