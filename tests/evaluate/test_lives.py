"""Lives of optimizers: what their numbers mean, how rates are chosen, the problems."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.data.synthetic.problems import FAMILIES, FLOOR, network
from hope_jax.evaluate import lives
from hope_jax.optim.meta import solve

MEASURES = ["rate", "mean", "mean_se", "mean_sd", "final"]


@pytest.fixture(autouse=True)
def _as_a_program():
    """Optax raises floats to whole powers, which our tests' strict types forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_measures_by_hand():
    curves = np.zeros((2, 3, 20))  # memories, tasks, steps
    curves[0] -= 2.0
    curves[:, :, -2:] -= 10.0
    found = lives.measures(lives.Lives(0.5, curves))
    assert list(found) == MEASURES
    np.testing.assert_allclose(
        [found[m] for m in MEASURES], [0.5, -2.0, 0.0, 1.0, -11.0]
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

    monkeypatch.setattr(lives, "curves", curves)
    keys = jax.random.split(jax.random.key(0), 5)
    rates = np.array([0.1, 1.0, 10.0], np.float32)
    given = rule, network, rates, np.argmin, (10, 20)
    short, long = lives.tuned(*given, tuning=keys[:2], keys=keys[2:]).values()
    np.testing.assert_allclose((short.rate, long.rate), (0.1, 1.0), rtol=1e-5)
    assert short.curves.shape[-1] == 10 and long.curves.shape[-1] == 20
    np.testing.assert_allclose(short.curves, 5.0 * 3, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_start_near_one_and_can_be_solved(family):
    keys = jax.random.split(jax.random.key(3), 16)

    @jax.jit
    def ends(key):
        task = FAMILIES[family](key)
        params, losses = solve(task, optax.adam(0.1), 150, key)
        return losses[0], task.loss(params, key)

    starts, last = map(np.asarray, zip(*map(ends, keys), strict=True))
    assert 0.3 < np.exp(np.log(starts).mean()) < 4.0
    assert np.median(last) < 0.05 and np.all(last >= FLOOR)
