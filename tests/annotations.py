"""What annotations say of arrays is checked in every call.

Others are left alone: that a wrong value is refused, by name and with what to do, the
package sees to itself, and tests look at that.
"""

import typing

import beartype
import jax
import numpy as np
from jaxtyping import AbstractArray, PyTree

_ARRAYS = (AbstractArray, PyTree, jax.Array, np.ndarray)
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def check(function):
    """`function`, which raises where an array is not what its annotation says."""
    said = {k: hint for k, hint in function.__annotations__.items() if of_arrays(hint)}
    if not said:
        return function
    function.__annotations__ = said
    return _check(function)


def of_arrays(hint) -> bool:
    """Whether a type is one of arrays, or made of one."""
    if isinstance(hint, type) and issubclass(hint, _ARRAYS):
        return True
    return any(of_arrays(part) for part in typing.get_args(hint))
