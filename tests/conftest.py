"""Settings for every test and the processes that it starts.

Strict: promotions that hide a bug raise instead. Quick: most of the time goes into compiling small
programs that run once or twice, so on a CPU XLA optimizes little and keeps what it compiled;
JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the programs that users have.
"""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", str(os.environ["JAX_PLATFORMS"] == "cpu"))
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", str(os.environ["JAX_PLATFORMS"] == "cpu"))
# A folder for each worker of pytest: JAX writes these files in place, others would read a half.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="slope_jax-compiled-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# These halve the time again, but an XLA that does not know a flag ends the process.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"].lower() in ("1", "true")
    else ""
)

import hypothesis
import jax
import jax.monitoring
import numpy
import pytest

LOWERING = "jaxpr_to_mlir_module_duration"

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else runs on the first
gc.set_threshold(20_000, 20, 100)  # programs are many objects, and none of them garbage
LOWERED: list[float] = []  # seconds of each program since they were last forgotten
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: LOWERED.append(seconds) if name.endswith(LOWERING) else None
)
LONGEST = {
    f"test_{x}" for x in ("train_resume", "train_mesh", "notebooks", "train_processes", "soak")
}
COMPILED = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])


def pytest_collection_modifyitems(items):
    """The longest first: what begins last is waited for by all but one worker."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_unconfigure():
    shutil.rmtree(COMPILED, ignore_errors=True)


@pytest.fixture(autouse=True)
def few_programs():
    """Forgets programs once they are many: what MLIR does for a new one grows with those kept."""
    yield
    if len(LOWERED) > 1000:
        jax.clear_caches()
        LOWERED.clear()


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


@pytest.fixture
def optimized():
    """Programs as users have them, for what holds to the last bits only there."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.clear_caches()
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)
    jax.clear_caches()
