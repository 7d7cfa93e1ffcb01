"""Learned optimizers, end to end at the smallest scale, and what its numbers mean."""

import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import learned_optimizers as experiment
from hope_jax.train.metrics import read_result


@pytest.fixture(autouse=True)
def _as_a_program():
    """Optax raises floats to whole powers, which our tests' strict types forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def few(table, *names):
    return {name: table[name] for name in names}


def test_a_smoke_run_writes_a_table_a_picture_and_a_result(
    tmp_path, capsys, monkeypatch
):
    for name, kept in (  # of many: compiling
        ("RULES", ["gradient_descent"]),
        ("LESSONS", ["recurrent_on_networks"]),
        ("FAMILIES", ["networks"]),
    ):
        monkeypatch.setattr(experiment, name, few(getattr(experiment, name), *kept))
    experiment.main(["--scale=smoke", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    (file,) = (tmp_path / experiment.NAME).glob("*.json")
    result = read_result(file)
    assert result["scale"] == "smoke"
    for name in ("gradient_descent", "recurrent_on_networks"):
        assert len(re.findall(rf"^\| {name} \|", said, re.MULTILINE)) == 2
        assert f"{name}_networks_20_mean" in result["metrics"]
    assert "recurrent_on_networks: the mean of its lives went from" in said
    image = matplotlib.image.imread(tmp_path / f"{experiment.NAME}.png")
    assert min(image.shape[:2]) > 300 and image[..., :3].std() > 0.01


def test_adam_with_a_cosine_ends_at_no_rate():
    rule = experiment.RULES["adam_cosine"](0.1, 10.0)
    state = rule.init(jnp.ones(()))
    sizes = []
    for _ in range(11):
        update, state = rule.update(jnp.ones(()), state)
        sizes.append(-float(update))
    np.testing.assert_allclose(sizes[0], 0.1, rtol=1e-3)
    np.testing.assert_allclose(sizes[5], 0.05, rtol=1e-3)
    assert sizes[10] < 1e-6
