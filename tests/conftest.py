"""Settings every test shares: four CPU devices, strict types, keys as fixtures."""

import os

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


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield
