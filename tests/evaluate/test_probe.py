"""A model trained on recall: that it learns, and what ends it."""

import dataclasses

import jax
import numpy as np
import pytest

from hope_jax.core import config as config_lib
from hope_jax.data.synthetic.compression import CompressionConfig
from hope_jax.data.synthetic.recall import RecallConfig
from hope_jax.evaluate import probe
from hope_jax.models import lm

TINY = ("task.vocab=8", "task.pairs=2", "task.length=8", "d_model=4", "layers=1")
TINY += ("hidden=4", "batch=2", "evaluation=1", "optimizer.warmup_steps=1")


def settings(*changed):
    return config_lib.override(probe.ProbeConfig(), [*TINY, *changed])


def test_training_learns():
    """To say the one value that a row has shown, from next to nothing to always."""
    config = settings(
        *("task.pairs=1", "task.length=4", "d_model=16", "hidden=16", "batch=16"),
        *("steps=81", "optimizer.learning_rate=2e-2"),
    )
    model = probe.model_for(config, "softmax_attention")
    made = probe.train(config, model, seed=0)
    assert made["status"] == "done" and made["steps"] == 81
    assert made["accuracy"] > 0.9 and made["loss"] < 0.5


def test_time_ends_a_point():
    config = settings("steps=500", "seconds=1e-6")
    made = probe.train(config, probe.model_for(config, "softmax_attention"), seed=0)
    assert made["steps"] == probe.STRIDE and made["status"] == "done"


def test_what_is_not_finite_is_told_and_ended():
    config = settings("steps=500", "optimizer.learning_rate=1e38")
    model = probe.model_for(config, "softmax_attention")
    made = probe.train(config, model, seed=0, ask=lambda params, key: {"of": 1.0})
    assert made["status"] == "not finite by step 20" and made["asked"] == {}
    assert made["accuracy"] is None and made["loss"] is None


def test_what_is_learned_ends_training():
    """Steps of any loss are enough here; and no rate or seed is compiled for again."""
    config = settings("steps=500", "enough=100")
    model = probe.model_for(config, "softmax_attention")

    def size(params, key):
        return {"size": float(sum(map(np.size, jax.tree.leaves(params))))}

    made = probe.train(config, model, seed=0, ask=size)
    assert made["asked"] == {"size": float(lm.count_parameters(model))}
    assert made["enough"] and made["steps"] == probe.STRIDE
    assert made["status"] == "done" and made["accuracy"] is not None
    before = probe._programs.cache_info().misses
    other = config_lib.override(config, ["enough=0", "optimizer.learning_rate=1e-3"])
    other = dataclasses.replace(other, seconds=1e-6)
    found = probe.train(other, model, seed=1)
    assert not found["enough"] and found["loss"] != made["loss"]
    assert probe._programs.cache_info().misses == before


def test_a_finite_set_is_read_again_and_again(monkeypatch):
    config = settings("steps=3", "examples=4", "batch=8")
    seen = []

    def row(self, key):
        jax.debug.callback(lambda k: seen.append(k.tobytes()), jax.random.key_data(key))
        return rows(self, key)

    rows = RecallConfig.row
    monkeypatch.setattr(RecallConfig, "row", row)
    monkeypatch.setattr(probe.answers, "score", lambda *_, **__: probe.Score(0, 0, 0))
    probe.train(config, probe.model_for(config, "softmax_attention"), seed=0)
    probe._programs.cache_clear()
    assert len(seen) == 24 and len(set(seen)) == 4
    with pytest.raises(ValueError, match="enough .* is a loss of new rows"):
        config_lib.override(config, ["enough=0.1"])


def test_a_text_is_learned_by_its_last_vector():
    """Who guesses has one of two tokens, and the last."""
    task = CompressionConfig(vocab=3, length=3)
    config = dataclasses.replace(
        settings("d_model=16", "hidden=16", "batch=16", "steps=240"), task=task
    )
    model = probe.model_for(config, "softmax_attention")
    made = probe.train(config, model, seed=0)
    assert made["accuracy"] > 0.9
    assert np.isfinite(made["loss"])
