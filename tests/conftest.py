"""Strict settings for every test: promotions that hide a bug raise instead."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import numpy
import pytest

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else runs on the first


@pytest.fixture
def strict_dtypes():
    """No implicit dtype promotion. Not for all tests: optax itself relies on promotion."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def torch():
    return pytest.importorskip("torch", reason="torch is not installed", exc_type=ImportError)


@pytest.fixture(scope="session")
def transformers(torch):
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="session")
def small_text(tmp_path_factory):
    """A folder with 60 documents of made-up sentences in a.txt."""
    folder = tmp_path_factory.mktemp("text")
    rng = numpy.random.default_rng(0)
    words = ["sparse", "kernel", "mask", "values", "dense", "layer", "adapter", "rank", "token"]
    documents = [
        " ".join(" ".join(rng.choice(words, 8)).capitalize() + "." for _ in range(12))
        for _ in range(60)
    ]
    (folder / "a.txt").write_text("\n\n".join(documents))
    return folder


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """The folder where compiled programs are kept, for tests that compile the same ones again."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
