"""Learned optimizers, end to end at the smallest scale, and what its numbers mean."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
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


def test_measures_by_hand():
    curves = np.zeros((2, 3, 20))  # memories, tasks, steps
    curves[0] -= 2.0
    curves[:, :, -2:] -= 10.0
    found = experiment.measures(experiment.Outcome(0.5, curves))
    assert set(found) == set(experiment.MEASURES)
    np.testing.assert_allclose(
        [found[m] for m in experiment.MEASURES], [0.5, -2.0, 0.0, 1.0, -11.0]
    )


def test_a_rule_is_tuned_for_each_length_on_tasks_it_is_not_scored_on(monkeypatch):
    """A loss 1 + (log10 rate - aim)^2 whose aim is -1 in short lives, 0 in long ones,
    and elsewhere on the tasks that count."""

    def curves(rule, family, steps, keys):
        del rule, family
        time = jnp.arange(steps, dtype=jnp.float32)[None]
        aim = jnp.where(time < 10, -1.0, 1.0)
        return (rate_seen[-1] - aim) ** 2 + 5.0 * len(keys) + 0.0 * time

    rate_seen = []

    def rule(rate, steps):
        rate_seen.append(jnp.log10(rate))
        return optax.sgd(rate)

    monkeypatch.setattr(experiment, "curves", curves)
    monkeypatch.setattr(experiment, "RULES", {"rule": rule})
    settings = dataclasses.replace(
        experiment.SETTINGS["smoke"], low=0.1, high=10.0, rates=3, longer=2
    )
    keys = jax.random.split(jax.random.key(0), settings.tuning + settings.tasks)
    found = experiment.tune(settings, "rule", "networks", keys)
    short, long = found.values()
    np.testing.assert_allclose((short.rate, long.rate), (0.1, 1.0), rtol=1e-5)
    assert short.curves.shape[-1] == 10 and long.curves.shape[-1] == 20
    np.testing.assert_allclose(short.curves, 5.0 * settings.tasks, rtol=1e-5)


@pytest.mark.parametrize("family", experiment.FAMILIES)
def test_tasks_start_near_one_and_can_be_solved(family):
    keys = jax.random.split(jax.random.key(3), 16)

    @jax.jit
    def ends(key):
        task = experiment.FAMILIES[family](key)
        params, losses = experiment.solve(task, optax.adam(0.1), 150, key)
        return losses[0], task.loss(params, key)

    starts, last = map(np.asarray, zip(*map(ends, keys), strict=True))
    assert 0.3 < np.exp(np.log(starts).mean()) < 4.0
    assert np.median(last) < 0.05 and np.all(last >= experiment.FLOOR)


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
