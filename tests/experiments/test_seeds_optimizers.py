"""Claims about optimizers at their smallest: equal budgets, choices, verdicts."""

import types

import jax
import matplotlib.image
import numpy as np
import pytest

from experiments import seeds_optimizers
from hope_jax import optim
from hope_jax.train.metrics import read_result


@pytest.fixture(autouse=True)
def _as_a_program():
    """Optax raises floats to whole powers, which our tests' strict types forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def settings(row="permuted", scale="smoke"):
    return seeds_optimizers.rows(types.SimpleNamespace(scale=scale))[row]


def test_a_smoke_run_writes_tables_a_picture_and_a_result(
    tmp_path, capsys, monkeypatch
):
    few = ("adamw", "dgd", "replay")  # of ten: compiling
    methods = {name: seeds_optimizers.METHODS[name] for name in few}
    monkeypatch.setattr(seeds_optimizers, "METHODS", methods)
    seeds_optimizers.main(["--scale=smoke", "--rows=split", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    result = read_result(tmp_path / "seeds_optimizers" / "split-s0.json")
    assert result["scale"] == "smoke" and result["config"]["stream"] == "split"
    for name in few:
        assert said.count(f"\n| {name} |") == len(seeds_optimizers.CHOICES)
        assert 0.0 < result["metrics"][f"{name}_own_acc"] < 1.0
        assert result["metrics"][f"{name}_equal_rate"] in np.array(
            [1e-3, 1e-2], np.float32
        )
    assert "| split | dgd | fewer steps " in said
    image = matplotlib.image.imread(tmp_path / "seeds_optimizers_split.png")
    assert min(image.shape[:2]) > 300 and image[..., :3].std() > 0.01


def test_all_methods_share_the_grid_but_for_strengths():
    rules = [name for name, more in seeds_optimizers.METHODS.items() if not more]
    assert set(rules) <= set(optim.RULES)
    assert set(seeds_optimizers.CLAIMED) < set(rules) and rules[0] == "adamw"
    full = seeds_optimizers.rows(types.SimpleNamespace(scale="full"))
    assert (
        len({(s.low, s.high, s.rates, s.seeds, s.lesson) for s in full.values()}) == 1
    )


def test_choices_are_made_on_other_seeds_and_images(monkeypatch):
    """By made-up lives: what is tried, on what, and which trial is reported."""
    s, calls = settings(), []

    def program(method, stream, tasks, lesson):
        def run(rates, strengths, keys, labels, of, held):
            calls.append((method, jax.random.key_data(keys), held, rates))
            # The higher rate is best; the lower one learns faster and forgets less.
            good = np.where(rates > 5e-3, 0.8, 0.4)[:, None, None, None, None]
            shape = (len(rates), len(keys), tasks)
            accuracy = good * np.ones((*shape, 2, tasks))
            accuracy[..., 0, 0, 0] = 0.0
            losses = np.where(rates > 5e-3, 3.0, 1.0)[:, None, None, None]
            return seeds_optimizers.Life(accuracy, losses * np.ones((*shape, 20)))

        return run

    monkeypatch.setattr(seeds_optimizers, "program", program)
    found = seeds_optimizers.compare(s)
    assert [name for name, *_ in calls] == [
        name for name in seeds_optimizers.METHODS for _ in range(2)
    ]
    counts = set()
    for (_, keys, valid, rates), (_, others, test, same) in zip(
        calls[::2], calls[1::2], strict=True
    ):
        assert not {*map(tuple, keys.tolist())} & {*map(tuple, others.tolist())}
        assert valid.x.shape == test.x.shape and (rates == same).all()
        counts.add(((valid.y >= 0).sum().item(), (test.y >= 0).sum().item()))
    ((valid, test),) = counts
    assert valid < test  # the parts of the digits, which differ in size
    for of in found.values():
        assert of.chosen == {"own": 1, "equal": 1, "fast": 0}


def test_equal_is_the_best_of_those_that_learn_as_much():
    s = settings(scale="full")
    scores = {
        "error": np.array([[0.2], [0.3], [0.4], [np.nan]]),
        "learned": np.array([[0.5], [0.7], [0.9], [0.1]]),
        "steps": np.array([[9.0], [8.0], [7.0], [9.0]]),
    }
    chosen, learned = seeds_optimizers.choose(s, scores, None)
    assert chosen == {"own": 0, "equal": 0, "fast": 2} and learned == 0.5
    assert seeds_optimizers.choose(s, scores, 0.6)[0]["equal"] == 1
    assert seeds_optimizers.choose(s, scores, 0.95)[0]["equal"] == 2  # comes nearest


def test_where_no_rate_arrives_the_best_is_called_fast():
    s = settings(scale="full")
    same = np.full((3, 1), 200.0)
    error = np.array([[0.9], [0.4], [0.5]])
    scores = {"error": error, "learned": 1.0 - error, "steps": same}
    assert seeds_optimizers.choose(s, scores, None)[0]["fast"] == 1
