"""Two tasks in context: rows of equal size, a smoke run, and which rate is asked."""

import dataclasses
import os
import types
from pathlib import Path

import numpy as np
import pytest

from experiments import in_context_continual
from hope_jax.core import config as config_lib
from hope_jax.evaluate import in_context
from hope_jax.models import vectors
from hope_jax.train.metrics import read_result

FOLDER = os.environ.get("HOPE_DATA_DIR", Path(__file__).parents[2] / "../shared/data")


def rows(scale="full"):
    return in_context_continual.rows(types.SimpleNamespace(scale=scale))


def test_rows_differ_in_their_mixer_and_what_they_are_paid_for():
    made = rows()
    counts, budgets = {}, set()
    for name, row in made.items():
        model = in_context_continual.model_of(row)
        saved = config_lib.to_json(row)
        assert config_lib.from_json(type(row), saved) == row
        budgets.add((row.config, row.rates))
        if model is None:
            continue
        counts[name] = vectors.count_parameters(model, row.config.inputs)
        assert name.startswith("acl_" if row.backward else "plain_")
    assert len(budgets) == 1 and len(counts) == 2 * len(in_context_continual.MODELS)
    assert max(counts.values()) < 1.02 * counts["acl_hope"]
    assert min(counts.values()) > 0.98 * counts["acl_hope"]


def test_a_smoke_run_writes_results_and_a_table(tmp_path):
    if not (Path(FOLDER) / "omniglot-small").exists():
        pytest.skip("needs omniglot-small under HOPE_DATA_DIR")
    flags = ["--scale=smoke", "--seeds=1", f"--out={tmp_path}", f"--data_dir={FOLDER}"]
    made = in_context_continual.main([*flags, "--rows=plain_lstm,nearest"])
    for row in ("plain_lstm", "nearest"):
        assert f"| {row} |" in made
        result = read_result(tmp_path / in_context_continual.NAME / f"{row}-s1.json")
        for kind in in_context_continual.KINDS:
            for place in in_context_continual.ASKED:
                assert 0.0 <= result["metrics"][f"{kind}/{place}"] <= 1.0


def test_the_rate_with_the_least_loss_of_what_was_trained_is_asked(monkeypatch):
    """On images that are neither those of the training nor those that are asked."""
    row = dataclasses.replace(
        rows("smoke")["plain_lstm"], rates=(1.0, 0.1, 0.01, 0.001)
    )
    images = {kind: kind for kind in ("train", "valid", "omniglot", "digits")}
    monkeypatch.setattr(in_context_continual, "characters", lambda *_: images)
    # Of task 1 after task 2, which is not in its loss, 0.1 has the least.
    loss = {0.1: [2.0, 2.0, 0.1], 0.01: [1.0, 1.0, 9.0], 0.001: [1.5, 1.0, 1.0]}
    asked = []

    def train(config, model, seed, given, *, backward):
        assert given == "train" and seed == 7 and not backward
        if config.optimizer.learning_rate == 1.0:
            raise FloatingPointError("it diverged")
        return config.optimizer.learning_rate, {"seconds": 1.0}

    def score(config, model, params, seed, given):
        asked.append((params, tuple(given)))
        assert all(kind == name for kind, name in given.items())
        told = np.array([loss[params]] * 4)
        return {kind: in_context.Told(told / 10, told) for kind in given}

    monkeypatch.setattr(in_context, "train", train)
    monkeypatch.setattr(in_context, "score", score)
    flags = types.SimpleNamespace(data_dir=None)
    task = types.SimpleNamespace(config=row, seed=7, flags=flags)
    made = in_context_continual.measure(task)
    assert made["rate"] == 0.01 and made["loss_at_0.001"] == 1.25
    assert "loss_at_1" not in made
    assert asked[-1] == (0.01, ("omniglot", "digits"))
    assert made["digits/task 1 after task 2"] == pytest.approx(0.9)
