"""A model trained on recall: that it learns, and what ends it."""

from hope_jax.core import config as config_lib
from hope_jax.evaluate import probe

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
    made = probe.train(config, probe.model_for(config, "softmax_attention"), seed=0)
    assert made["status"] == "not finite by step 20"
    assert made["accuracy"] is None and made["loss"] is None
