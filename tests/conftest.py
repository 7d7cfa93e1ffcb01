"""Settings every test shares: four CPU devices, strict types, keys as fixtures.

`--quick` runs one member of each kind: of every test the first set of parameters that
is not marked `slow`.
"""

import gc
import os
import signal
from pathlib import Path

from tests.versions import FORMER_EMITTERS

# jax <= 0.11.2 can dead-lock a virtual-device collective on a two-core host unless
# its thread pool is larger than the number of devices; set before jax starts.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: unoptimised programs halve their time, and the
# older code generator halves it again where XLA still has it, for a flag that it does
# not know ends the process. Every core has a worker, none needs to share.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * FORMER_EMITTERS,
)

import hypothesis  # noqa: F401 parsed now: its plugin would, late, beside threads
import jax
import pytest
from absl import flags

from tests import annotations
from tests.chosen import quick

annotations.install("hope_jax")  # before any of it is imported

# What was started with `nohup` or `&` ignores these, and so would all that it starts.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
    flags.FLAGS.mark_as_parsed()


def pytest_addoption(parser):
    said = "one member of each kind: no second parameters, and no test marked slow"
    parser.addoption("--quick", action="store_true", help=said)


def pytest_collection_modifyitems(config, items):
    if config.getoption("quick"):
        kept = quick(items)
        chosen = set(kept)
        left_out = [item for item in items if item not in chosen]
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def pytest_collection_finish():
    """What is imported by now stays: looking through it for garbage takes a tenth."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def pytest_configure(config):
    """Keeps compiled programs beside what pytest keeps; `--cache-clear` forgets them.

    JAX names a program by all that it is made of, its own version and flags included.
    With a size given it locks the folder, so that workers share it, and evicts.
    """
    # Programs that tests start keep none: some are killed, in the middle of a file too.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        jax.config.update("jax_enable_compilation_cache", False)
        return
    folder = config.cache.mkdir(f"programs-jax-{jax.__version__}")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 2 * 1024**3)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


_MAPS = Path("/proc/self/maps")
_MANY = 25_000  # of the 65,530 that Linux gives a process


@pytest.fixture(autouse=True, scope="module")
def _forgotten_programs():
    """Every program maps some memory; where no more can be had, compiling crashes."""
    yield
    if _MAPS.exists() and len(_MAPS.read_bytes().splitlines()) > _MANY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
