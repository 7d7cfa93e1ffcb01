"""The race of optimizers: what a step is, what a period costs, what is written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import optimizers, timing
from hope_jax import optim
from hope_jax.models import lm
from hope_jax.optim.rules.m3 import M3
from hope_jax.train.metrics import read_benchmark

TINY = optimizers.SIZES["tiny"]


class Clock:
    """Time that passes only when a program says so; its cores work half as long."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return 0.5 * self.now


class Fake:
    """A rule whose steps take the given seconds, over and over."""

    def __init__(self, clock, *seconds):
        self._clock, self._seconds, self._steps = clock, seconds, 0
        self.period, self.rounds = len(seconds), []

    def __call__(self):
        self._clock.now += self._seconds[self._steps % self.period]
        self._steps += 1
        return jnp.zeros(())


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def test_a_step_is_the_mean_of_a_period_and_the_slowest_one_of_its_positions(clock):
    slow, steady = Fake(clock, 1.0, 1.0, 4.0), Fake(clock, 2.0)
    times = timing.interleave({"a": slow, "b": steady}, 3, optimizers.measure)
    assert times["a"] == timing.Times((2.0,) * 3, (1.0,) * 3)
    assert times["b"] == timing.Times((2.0,) * 3, (1.0,) * 3)
    assert slow._steps == 3 * (2 + 3)  # two warm-ups, three rounds
    assert optimizers.slowest(slow, 3) == timing.Times((4.0,) * 3, (2.0,) * 3)
    assert optimizers.slowest(steady, 3) == times["b"]


def test_the_slowest_step_is_one_position_for_all_rounds():
    rule = Fake(None, 0.0, 0.0)
    walls = [[9.0, 9.0], [8.0, 3.0], [1.0, 3.0], [1.0, 4.0]]  # a warm-up comes first
    rule.rounds = [[(wall, 0.5 * wall) for wall in walls] for walls in walls]
    found = optimizers.slowest(rule, 3)
    assert found == timing.Times((3.0, 3.0, 4.0), (1.5, 1.5, 2.0))


def test_a_short_program_is_called_for_several_periods(clock):
    short = Fake(clock, 0.01, 0.03)
    times = timing.interleave({"a": short}, 2, optimizers.measure)
    assert short._steps == 2 * (2 + 2 * 5)  # 0.1 s of periods whose mean is 0.02
    np.testing.assert_allclose(times["a"].wall, 0.02)
    np.testing.assert_allclose(optimizers.slowest(short, 2).wall, 0.03)


def test_every_optimizer_is_measured_and_adamw_beside_all():
    names = optimizers.names()
    assert set(optim.RULES) - {"adamw"} <= set(names) and "adamw" not in names
    groups = optimizers.groups_of(names)
    assert sorted(sum(groups, ())) == sorted(names)
    assert groups[0] == optimizers.TOGETHER
    assert {name for pair in optimizers.PAIRS for name in pair} <= set(groups[0])


def test_periods_are_those_of_the_clocks():
    found = {n: optimizers.period(optimizers.config(n)) for n in optimizers.names()}
    slow = {"m3": 10, "m3_spread": 10, "shampoo": 10, "soap": 10}
    assert {name: period for name, period in found.items() if period > 1} == slow


def test_sizes_are_what_they_are_called():
    counts = {n: lm.count_parameters(s.model) for n, s in optimizers.SIZES.items()}
    assert abs(counts["10m"] / 10e6 - 1) < 0.05
    assert abs(counts["140m"] / 140e6 - 1) < 0.01


def test_products_of_an_orthogonalisation():
    """X Xᵀ, its square, and both times X, of matrices 2 x 3 lying or standing."""
    once = 2 * (2 * 3 * 2 + 2 * 2 * 2 + 2 * 2 * 3)
    for shape in [(7, 2, 3), (7, 3, 2)]:
        assert optimizers._newton_schulz(shape, steps=4) == 7 * 4 * once


def test_a_step_moves_the_parameters_by_the_rule():
    rule = optimizers.Rule("sgd", TINY.model)
    assert rule.compiling > 0
    rate = optimizers.config("sgd").learning_rate
    shapes = lm.abstract(TINY.model)
    given = jax.tree.leaves(optimizers.gradients(shapes))
    first = [np.array(leaf) for leaf in jax.tree.leaves(rule())]
    for moved, gradient in zip(first, given, strict=True):
        np.testing.assert_allclose(moved, -rate * gradient, rtol=1e-4)
    second = jax.tree.leaves(rule())
    assert all((2 * abs(b) > abs(a)).all() for a, b in zip(first, second, strict=True))
    assert not np.allclose(first[0], second[0])


@pytest.mark.parametrize("name", ["dgd", "ggd"])
def test_rules_that_need_inputs_are_given_some(name):
    rule = optimizers.Rule(name, TINY.model)
    moved = rule()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(moved))


def test_m3_beside_muon(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "_SHORTEST", 1e-6)
    arguments = ["--size=tiny", "--only=muon_ours,m3,muon,sgd", "--rounds=3"]
    assert optimizers.main([*arguments, f"--out={tmp_path}"]) == 0
    (path,) = (tmp_path / "benchmarks").iterdir()
    benchmark = read_benchmark(path)
    assert benchmark["name"] == "optimizers_tiny"
    found = {(w["workload"], w["metric"]): w for w in benchmark["workloads"]}
    assert len(found) == len(benchmark["workloads"])
    for pair in [
        "muon_ours against muon",
        "m3 against muon",
        "m3 against muon_ours",
        "slowest step of m3 against muon",
        "m3 against adamw",
        "sgd against adamw",
        "slowest step of m3 against adamw",
    ]:
        for metric in ("steps per second", "steps per second of one core"):
            race = found[pair, metric]
            assert len(race["ratios"]) == 3 and race["ours"] > 0
    assert ("slowest step of sgd against adamw", "steps per second") not in found
    state = found["state of m3 against adamw", "parameters per byte of state"]
    assert 8.0 <= 1 / state["peer"] < 8.1 < 1 / state["ours"] < 20.1
    assert ("compiling m3 against adamw", "compilations per minute") in found
    products = found["products of muon against one of width 64", "GFLOP/s"]
    muon = found["m3 against muon", "steps per second"]["peer"]
    each = sum(
        optimizers._newton_schulz(leaf.shape)
        for leaf in jax.tree.leaves(lm.abstract(TINY.model)["blocks"])
        if leaf.ndim == 3
    )
    np.testing.assert_allclose(products["ours"], 1e-9 * each * muon, rtol=1e-6)
    output = capsys.readouterr().out
    assert "first updates of muon_ours and muon agree to" in output
    goal = "m3 against muon, steps per second of one core: "
    assert goal in output and "goal 1.15" in output
    for name in ("adamw", "muon", "muon_ours", "m3", "sgd"):
        assert output.count(f"| {name} |") == 1
    assert path.name in output


def test_two_that_disagree_are_not_timed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(optimizers.VARIANTS, "muon_ours", M3(periods=(1,)))
    arguments = ["--size=tiny", "--only=muon,muon_ours", f"--out={tmp_path}"]
    assert optimizers.main(arguments) == 1
    output = capsys.readouterr().out
    assert "not timed: muon, muon_ours: first updates of muon_ours and muon" in output
    assert not (tmp_path / "benchmarks").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=adamun"], "no rule 'adamun'.*Did you mean 'adamuon'"),
        (["--only=adamw"], "no rule 'adamw'"),
        (["--rounds=0"], "--rounds=0: 0 is not a positive integer"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(SystemExit, match=message):
        optimizers.main(arguments)
