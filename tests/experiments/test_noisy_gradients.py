"""Noise in labels and gradients: what is drawn, tuned, and told apart."""

import collections
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

from experiments import noisy_gradients
from experiments.noisy_gradients import Noise, Outcome, Scores, Settings
from hope_jax.evaluate import noise as noise_lib
from hope_jax.train.metrics import read_result


@pytest.fixture(autouse=True)
def _as_a_program():
    """Optax raises floats to whole powers, which our tests' strict types forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_smoke_run_writes_tables_a_picture_and_results(tmp_path, capsys, monkeypatch):
    names = ("gradient_descent", "delta_momentum", "memory_huber")  # of 15: compiling
    few = {name: noisy_gradients.RULES[name] for name in names}
    monkeypatch.setattr(noisy_gradients, "RULES", few)
    noisy_gradients.main(["--scale=smoke", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    for name in few:
        lines = re.findall(rf"^\| {name} \|.*", said, re.MULTILINE)
        assert len(lines) == len(noisy_gradients.NOISES)
    for noise in noisy_gradients.NOISES:
        assert f"{noise}: cannot be told apart: " in said and f"| {noise} |" in said
    image = matplotlib.image.imread(tmp_path / f"{noisy_gradients.NAME}.png")
    assert min(image.shape[:2]) > 200 and image[..., :3].std() > 0.01
    files = (tmp_path / noisy_gradients.NAME).glob("*.json")
    results = {result["row"]: result for result in map(read_result, files)}
    assert set(results) == set(noisy_gradients.NOISES)
    assert results["clean"]["scale"] == "smoke"
    for measure in ("rate", "decay", "loss", "loss_sd", "accuracy", "accuracy_sd"):
        assert f"delta_momentum_{measure}" in results["spikes-300"]["metrics"]


def test_every_rule_tries_the_same_and_its_best_is_scored_on_other_seeds(monkeypatch):
    settings = Settings(low=0.01, high=1.0, rates=3, decays=(0.5, 0.9), seeds=2)
    noises = {"clean": Noise(), "labels-0.2": Noise(labels=0.2)}
    tried = {"a": collections.Counter(), "b": collections.Counter()}
    seeds = {"a": set(), "b": set()}

    def fake(rule, digits, noise, key, **sizes):
        name, rate, decay = rule

        def note(rate, decay, key):
            tried[name][round(float(rate), 4), round(float(decay), 4)] += 1
            seeds[name].add((round(float(rate), 4), round(float(decay), 4), int(key)))

        jax.debug.callback(note, rate, decay, jax.random.key_data(key)[-1])
        # Best at 0.1 and 0.9, but with noisy labels at 1 and 0.5.
        wanted = jnp.where(noise.labels > 0, 0.0, -1.0)
        miss = jnp.abs(jnp.log10(rate) - wanted)
        miss += jnp.abs(decay - jnp.where(noise.labels > 0, 0.5, 0.9))
        return Scores(miss, 2.0 * rate, decay)

    rules = {name: lambda r, d, name=name: (name, r, d) for name in tried}
    monkeypatch.setattr(noisy_gradients, "RULES", rules)
    monkeypatch.setattr(noisy_gradients, "NOISES", noises)
    monkeypatch.setattr(noise_lib, "train", fake)
    monkeypatch.setattr(noise_lib, "load", dict)
    outcomes = noisy_gradients.compare(settings, report=lambda line: None)
    jax.effects_barrier()

    each = len(noises) * settings.seeds
    expected = collections.Counter(
        {(rate, decay): each for rate in (0.01, 0.1, 1.0) for decay in (0.5, 0.9)}
    )
    expected[0.1, 0.9] += settings.seeds  # the numbers, of other seeds
    expected[1.0, 0.5] += settings.seeds
    assert tried["a"] == tried["b"] == expected
    assert seeds["a"] == seeds["b"]
    assert len({key for rate, _, key in seeds["a"] if rate == 0.01}) == settings.seeds
    chosen = {key for rate, decay, key in seeds["a"] if (rate, decay) == (1.0, 0.5)}
    assert len(chosen) == 2 * settings.seeds
    for name in tried:
        clean, labels = outcomes[name, "clean"], outcomes[name, "labels-0.2"]
        np.testing.assert_allclose((clean.rate, clean.decay), (0.1, 0.9), rtol=1e-6)
        np.testing.assert_allclose((labels.rate, labels.decay), (1.0, 0.5), rtol=1e-6)
        np.testing.assert_allclose(clean.scores.loss, [0.2, 0.2], rtol=1e-6)
        np.testing.assert_allclose(labels.scores.loss, [2.0, 2.0], rtol=1e-6)


def test_ties_are_of_differences_on_the_same_seed(monkeypatch):
    losses = {
        "best": [0.1, 0.5, 0.9],
        "steadily_worse": [0.2, 0.6, 1.0],  # by 0.1 on every seed
        "now_and_then_worse": [0.1, 0.5, 1.2],  # by 0.1 in the mean, spread 0.17
    }
    monkeypatch.setattr(noisy_gradients, "RULES", dict.fromkeys(losses))
    outcomes = {
        (name, "clean"): Outcome(0.1, 0.9, Scores(None, np.array(loss), np.ones(3)))
        for name, loss in losses.items()
    }
    found = noisy_gradients.tied(outcomes, "clean")
    assert found == ["best", "now_and_then_worse"]
    numbers = noisy_gradients.summary(outcomes, "clean")
    np.testing.assert_allclose(numbers["best_loss"], 0.5)
    np.testing.assert_allclose(numbers["best_loss_sd"], 0.4)
