"""Sizes are refused by arithmetic, before anything is allocated."""

import time

import jax
import numpy as np
import pytest

from hope_jax.core import config as config_lib
from hope_jax.train import checkpoint, limits, loop
from hope_jax.train.config import OptimizerConfig
from tests.train import tiny

CONFIG = tiny.rows("smoke")["tiny"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.d_model=1000000000"], r"d_model \(1,000,000,000\).*\d PiB in float32"),
        (["model.vocab=2000000000", "model.d_model=128"], r"vocab \(2,000,000,000\)"),
        (
            ["train.batch=2000000000", "train.accumulate=2"],
            r"batch \(2,000,000,000\) x train.seq_len \(16\) .* 953.7 GiB",
        ),
    ],
    ids=str,
)
def test_what_is_larger_than_the_memory_is_refused_at_once(settings, message, tmp_path):
    began = time.monotonic()
    with pytest.raises(ValueError, match=message):
        loop.train(config_lib.override(CONFIG, settings), tmp_path / "run")
    assert time.monotonic() - began < 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.layers=100000000", "layers must be at most 65536, got 100000000"),
        ("model.d_model=10000000000", "d_model must be at most 2147483647"),
        ("train.steps=100000000000000000000", "steps must be at most 2147483647"),
        ("optimizer.clip_norm=1e-99", "clip_norm must be 0 or lie between.*1e-99"),
        ("optimizer.learning_rate=inf", "learning_rate must be 0 or lie.* got inf"),
        ("optimizer.weight_decay=1e39", "weight_decay must be 0 or lie between"),
    ],
)
def test_numbers_that_no_array_holds(setting, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(CONFIG, [setting])
    assert OptimizerConfig(clip_norm=None, learning_rate=0.0).clip_norm is None


def test_the_least_is_below_what_models_have():
    from hope_jax.models import lm, zoo

    for name in ("hope_tiny", "transformer_tiny"):
        model = zoo.get(name)
        assert limits.least_parameters(model) <= lm.count_parameters(model)


def test_a_checkpoint_says_how_large_it_is_before_it_is_read(monkeypatch):
    arrays = {"a": np.zeros((3, 4), np.float32), "b": jax.numpy.zeros(5, "bfloat16")}
    declared = checkpoint.manifest(arrays)
    assert limits.declared(declared) == 4 * 12 + 2 * 5
    limits.check_declared(declared, "here")
    monkeypatch.setattr(limits, "memory", lambda: 57)
    with pytest.raises(ValueError, match="here declares arrays of 58 bytes.*57 bytes"):
        limits.check_declared(declared, "here")


def test_a_small_file_that_asks_for_much_is_not_restored(trained, monkeypatch):
    read = []
    monkeypatch.setattr(
        checkpoint.Checkpoints, "_item", _recording(read, checkpoint.Checkpoints._item)
    )
    monkeypatch.setattr(limits, "memory", lambda: 20_000)
    with pytest.raises(ValueError, match="params of step 12 .* declares arrays of"):
        checkpoint.restore_params(trained)
    assert read == ["meta"]


def _recording(read, item):
    def recording(self, step, name, arguments):
        read.append(name)
        return item(self, step, name, arguments)

    return recording
