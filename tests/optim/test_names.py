"""A name of `hope_jax.optim` means one thing: a function, a class or a module."""

import doctest
import importlib
import pkgutil
import types

import pytest

from hope_jax import optim

MODULES = [module.name for module in pkgutil.iter_modules(optim.__path__)]


def test_no_module_has_the_name_of_a_function():
    assert {"rules", "groups", "capture"} <= set(MODULES)
    assert not set(MODULES) & set(optim.__all__)
    for name in optim.__all__:
        assert not isinstance(getattr(optim, name), types.ModuleType), name
    for name in MODULES:
        module = importlib.import_module(f"hope_jax.optim.{name}")
        assert getattr(optim, name) is module


@pytest.mark.parametrize("name", ["m3", "dgd", "momentum", "shampoo", "soap"])
def test_an_optimizer_is_called_by_its_name(name):
    rule = getattr(optim, name)(1e-3)
    assert callable(rule.init) and callable(rule.update)


@pytest.mark.parametrize("name", ["builder", "leaves", "groups"])
def test_examples_run(name):
    module = importlib.import_module(f"hope_jax.optim.{name}")
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
