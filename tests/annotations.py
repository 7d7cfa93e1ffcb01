"""What annotations say of arrays is checked in every call.

Others are left alone: that a wrong value is refused, by name and with what to do, the
package sees to itself, and tests look at that. So what a test expects to fail is not
checked either.
"""

import contextlib
import functools
import types
import typing

import beartype
import jax
import jaxtyping
import numpy as np
import pytest

_ARRAYS = (jaxtyping.AbstractArray, jaxtyping.PyTree, jax.Array, np.ndarray)
_check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
raises = pytest.raises  # which `install` replaces


def install(package: str) -> None:
    """Checks the functions of a package; before any of it is imported."""
    jaxtyping.config.update("jaxtyping_remove_typechecker_stack", True)
    # What the hook puts round every function costs a third of the tests' time.
    jaxtyping.jaxtyped = functools.partial(_of_arrays_alone, jaxtyping.jaxtyped)
    jaxtyping.install_import_hook(package, f"{__name__}.check")
    pytest.raises = _refused


def check(function):
    """`function`, which raises where an array is not what its annotation says.

    The fields of a dataclass are not looked at: JAX makes one anew around what stands
    for its arrays while a tree is taken apart.
    """
    if getattr(function, "__name__", "") == "__init__":
        return function
    said = {k: hint for k, hint in function.__annotations__.items() if of_arrays(hint)}
    if not said:
        return function
    function.__annotations__ = said
    return _check(function)


def _of_arrays_alone(jaxtyped, **how):
    """`jaxtyped`, which leaves functions alone whose annotations are of no array."""

    def decorate(made):
        if isinstance(made, types.FunctionType):
            hints = made.__annotations__.values()
            if not any(isinstance(hint, str) or of_arrays(hint) for hint in hints):
                return made
        return jaxtyped(made, **how)

    return decorate


def of_arrays(hint) -> bool:
    """Whether a type is one of arrays, or made of one."""
    if isinstance(hint, type) and issubclass(hint, _ARRAYS):
        return True
    return any(of_arrays(part) for part in typing.get_args(hint))


@contextlib.contextmanager
def _refused(*expected, **more):
    """`pytest.raises`, in which annotations are not checked."""
    __tracebackhide__ = True
    with raises(*expected, **more) as found:
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            yield found
        finally:
            jaxtyping.config.update("jaxtyping_disable", False)
