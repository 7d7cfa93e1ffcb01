"""What an optimizer forgets: numbers by hand, and a rule that forgets nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.data.synthetic.orthogonal import OrthogonalConfig
from hope_jax.evaluate import forgetting


@pytest.fixture(autouse=True)
def _as_a_program():
    """Optax raises floats to whole powers, which our tests' strict types forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_measures_by_hand():
    stream = forgetting.Stream(
        errors=jnp.array([[[0.1, 0.9], [0.5, 0.2]]]),  # after task 1, after task 2
        old=jnp.array([[1.0, 4.0]]),
        gradient=jnp.array([[0.0, 0.0]]),
    )
    found = forgetting.measures(stream)
    expected = dict(final=0.35, learned=0.15, forgotten=0.4, old=0.25, gradient=0.0)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], [value], rtol=1e-6, err_msg=name)


def test_without_a_leak_gradient_descent_forgets_nothing(key):
    settings = OrthogonalConfig(tasks=2, rank=2, width=6, outputs=2)
    runs = {
        leak: forgetting.live(
            optax.sgd(0.1), settings, key, leak=leak, steps=60, batch=16
        )
        for leak in (0.0, 0.5)
    }
    after, old = runs[0.0].errors, runs[0.0].old
    np.testing.assert_allclose(after[1, 0], after[0, 0], atol=1e-5)
    assert after[0, 0] < 1e-3 and old[0] < 1e-6 * old[1] and old[1] > 0
    leaking = runs[0.5]
    assert leaking.errors[1, 0] > leaking.errors[0, 0] + 0.05
    assert leaking.gradient[0] > 1e-3 * leaking.gradient[1]


def test_subspaces_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"width \(6\) must be at least tasks \(4\)"):
        OrthogonalConfig(tasks=4, rank=2, width=6)
