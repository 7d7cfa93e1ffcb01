"""Settings every test shares: four CPU devices, strict types, keys as fixtures."""

import gc
import os
from pathlib import Path

# jax <= 0.11.2 can dead-lock a virtual-device collective on a two-core host unless
# its thread pool is larger than the number of devices; set before jax starts.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: unoptimised programs halve their time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis  # noqa: F401 parsed now: its plugin would, late, beside threads
import jax
import pytest
from absl import flags

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
    flags.FLAGS.mark_as_parsed()


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
