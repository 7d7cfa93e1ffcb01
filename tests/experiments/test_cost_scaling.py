"""Exponents by hand, and a smoke run that stops where it is told to."""

import dataclasses
import types

import numpy as np
import pytest

from experiments import cost_scaling
from hope_jax.models import lm
from hope_jax.train.metrics import read_result


def test_exponents_by_hand():
    lengths = [1024, 2048, 4096]
    x = np.array(lengths, float)
    found = cost_scaling.exponent(lengths, np.stack([x**2, 3 * x**2], axis=1))
    assert [found[k] for k in ("exponent", "low", "high")] == pytest.approx([2, 2, 2])
    assert (found["from"], found["to"]) == (1024, 4096)
    # Slopes of 0.9 and 1.1: a deviation of 0.1 √2, over √2, times t of one degree.
    found = cost_scaling.exponent(lengths, np.stack([x**0.9, x**1.1], axis=1))
    assert found["exponent"] == pytest.approx(1.0)
    assert found["high"] - 1.0 == pytest.approx(0.1 * 12.7062, rel=1e-4)
    of = cost_scaling.exponent(lengths, np.stack([x * np.log(x)] * 2, axis=1))
    assert of["exponent"] == pytest.approx(of["of n log n"])
    assert 1.1 < of["of n log n"] < 1.15


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.98, 1.02, "n"),
        (1.05, 1.15, "n log n"),
        (0.95, 1.15, "n or n log n"),
        (0.8, 0.9, "neither: below n"),
        (1.02, 1.05, "neither: between"),
        (1.9, 2.1, "neither: above n log n"),
    ],
)
def test_what_an_interval_leaves_possible(low, high, said):
    assert cost_scaling.grows_like(low, high, 1.1) == said


def test_rows_are_of_one_size():
    rows = cost_scaling.rows(types.SimpleNamespace(scale="full"))
    ends = {(row.lengths[0], row.lengths[-1]) for row in rows.values()}
    assert ends == {(2**10, 2**17)}
    assert rows["hope"].model.fast and not rows["titans"].model.fast
    states = [lm.state_bytes(rows[r].model)["all"] for r in ("hope_matrix", "hope")]
    assert states[0] < states[1] < 2**20


def test_a_smoke_run_stops_at_its_limits(tmp_path, capsys):
    rows = cost_scaling.rows(types.SimpleNamespace(scale="smoke"))
    most = 2 * cost_scaling.program(rows["attention"].model, "forward", 128).bytes
    limited = dataclasses.replace(rows["attention"], bytes=most)
    experiment = dataclasses.replace(
        cost_scaling.main, rows=lambda flags: {"attention": limited}
    )
    made = experiment(["--scale=smoke", f"--out={tmp_path}"])
    file = tmp_path / "cost_scaling" / "attention-s0.json"
    m = read_result(file)["metrics"]
    assert m["forward/temporary bytes/128"] <= most
    assert m["forward/seconds/128"] > 0 and m["state bytes/256"] > m["state bytes/128"]
    assert "training/seconds/256" not in m  # keeps more than was allowed
    assert (file.parent / "cost_scaling.png").stat().st_size > 1000
    assert made.startswith("| row | task | tokens |")
