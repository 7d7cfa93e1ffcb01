"""What `import hope_jax` gives."""

import importlib
from pathlib import Path

import pytest

import hope_jax


@pytest.mark.parametrize("name", hope_jax.__all__)
def test_every_name_is_there(name):
    assert getattr(hope_jax, name) is not None
    assert name in dir(hope_jax)


def test_later_names_are_those_of_their_modules():
    for name, path in hope_jax._LATER.items():
        module, _, attribute = path.partition(":")
        found = importlib.import_module(module)
        expected = getattr(found, attribute) if attribute else found
        assert getattr(hope_jax, name) is expected
        assert name in hope_jax.__all__


def test_the_version_is_that_of_the_package():
    setup = (Path(__file__).parents[1] / "setup.py").read_text()
    assert f'version="{hope_jax.__version__}"' in setup


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="'hope_jax' has no attribute 'hop'"):
        hope_jax.hop  # noqa: B018
