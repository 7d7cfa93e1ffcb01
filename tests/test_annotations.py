"""The check of annotations, which every other test runs under."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float, PyTree

from hope_jax.kernels import delta
from tests import annotations


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_a_call_with_another_shape_fails_and_the_message_names_the_argument(shape):
    with annotations.raises(jaxtyping.TypeCheckError, match="parameter 'gate'"):
        delta.cumulative_products(jnp.ones(shape))


def test_a_result_of_another_shape_fails():
    @jaxtyping.jaxtyped(typechecker=annotations.check)
    def halved(x: Float[Array, " N"]) -> Float[Array, " N"]:
        return x[::2]

    with annotations.raises(jaxtyping.TypeCheckError, match="return value"):
        jax.eval_shape(halved, jnp.ones(4))


def test_a_call_that_is_to_fail_is_refused_by_the_package_alone():
    @jaxtyping.jaxtyped(typechecker=annotations.check)
    def refuse(x: Float[Array, " N"]):
        raise ValueError(f"x must be a vector, got {x.shape}")

    with pytest.raises(ValueError, match="must be a vector"):
        refuse(jnp.ones(()))
    assert not jaxtyping.config.jaxtyping_disable


@pytest.mark.parametrize(
    "hint, of_arrays",
    [
        (Float[Array, "B T"] | None, True),
        (dict[str, tuple[Array, ...]], True),
        (np.ndarray, True),
        (PyTree, True),
        (int | None, False),
        (str, False),
    ],
)
def test_which_annotations_are_of_arrays(hint, of_arrays):
    assert annotations.of_arrays(hint) == of_arrays
