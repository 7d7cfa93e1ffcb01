"""The toys, end to end at their smallest scale, and what their numbers mean."""

import json
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import fig4_toy, orthogonal_tasks
from hope_jax.train.metrics import read_result


@pytest.fixture(autouse=True)
def _as_a_program():
    """Optax raises floats to whole powers, which our tests' strict types forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("toy", [fig4_toy, orthogonal_tasks])
def test_a_smoke_run_writes_a_table_a_picture_and_a_result(
    toy, tmp_path, capsys, monkeypatch
):
    few = {name: toy.RULES[name] for name in list(toy.RULES)[:5]}  # of ten: compiling
    monkeypatch.setattr(toy, "RULES", few)
    arguments = ["--scale=smoke", f"--out={tmp_path}"]
    made = toy.main(arguments)
    said = capsys.readouterr().out
    assert made in said
    for name in toy.RULES:
        assert re.search(rf"^\| {name} \|", said, re.MULTILINE), name
    image = matplotlib.image.imread(tmp_path / f"{toy.NAME}.png")
    assert min(image.shape[:2]) > 300 and image[..., :3].std() > 0.01
    (file,) = (tmp_path / toy.NAME).glob("*.json")
    result = read_result(file)
    assert result["scale"] == "smoke" and result["experiment"] == toy.NAME
    assert json.dumps(result["config"])  # says what was searched
    for name in toy.RULES:
        assert any(key.startswith(f"{name}_") for key in result["metrics"])
    assert toy.main(arguments) == made  # from the file
    assert "picture" not in capsys.readouterr().out


def test_arrival_is_the_step_from_which_on_all_is_well():
    values = np.array([[9, 0.1, 9, 0.1, 0.2], [0, 0, 0, 0, 0], [0, 0, 0, 0, 9]])
    np.testing.assert_array_equal(fig4_toy.arrival(values, 1.0), [4, 1, np.inf])
    assert fig4_toy.arrival(np.array([0.1, np.nan]), 1.0) == np.inf


def test_a_search_finds_the_best_rate_of_each_rule():
    settings = fig4_toy.SETTINGS["smoke"]
    found = fig4_toy.search(settings)
    cell, start = jnp.array(found.cells[0]), jnp.array(settings.start)
    rates = np.geomspace(settings.low, settings.high, settings.rates, dtype=np.float32)
    for name in fig4_toy.CLAIM:

        @jax.jit
        def values(rate, rule=fig4_toy.RULES[name]):
            points = fig4_toy.path(rule(rate), cell, start, settings.steps)
            return jax.vmap(lambda at: fig4_toy.psi(at, cell))(points)

        steps = [fig4_toy.arrival(values(r), settings.tolerance) for r in rates]
        assert found.steps[name][0] == min(steps) < np.inf
        assert found.rates[name][0] == rates[np.argmin(steps)]
