"""What a run costs is seen, and changes nothing of it."""

import json
import sys
import types

import jax
import pytest

from hope_jax.core import config as config_lib
from hope_jax.models import lm, zoo
from hope_jax.train import loop, watching
from tests.train import tiny

RUN = config_lib.override(
    tiny.rows("smoke")["tiny"],
    ["train.steps=4", "train.checkpoint_every=2", "train.log_every=2"],
)


class Board:
    """What of Weights & Biases is used."""

    def __init__(self):
        self.begun, self.lines, self.finished = {}, {}, False

    def init(self, **given):
        self.begun = given
        return self

    def log(self, line, step):
        self.lines[step] = line

    def finish(self):
        self.finished = True


def test_a_watched_run(tmp_path, monkeypatch):
    board = Board()
    module = types.ModuleType("wandb")
    module.init = board.init  # pyright: ignore[reportAttributeAccessIssue]
    module.__spec__ = types.SimpleNamespace()  # pyright: ignore
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(watching, "peak", lambda device: 1e9)
    loop.train(RUN, tmp_path / "run", profile=(2, 3), wandb="mine")
    text = (tmp_path / "run" / "hosts" / "0.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    last = lines[-1]
    shares = [v for k, v in last.items() if k == "goodput" or k.startswith("waiting/")]
    assert {"goodput", "waiting/batch", "waiting/compilation", "waiting/save"} <= {
        *last
    }
    assert 0 < sum(shares) <= 1
    assert last["memory/host_peak_bytes"] > 2**26
    done = last["tokens_per_second"] * watching.flops_per_token(RUN.model)
    assert last["mfu"] == pytest.approx(done / (1e9 * jax.device_count()))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert board.begun["project"] == "mine" and board.finished
    assert board.begun["config"]["train"]["steps"] == 4
    assert sorted(board.lines) == [2, 4] and "loss" in board.lines[4]
    # And it is the run that it would have been.
    loop.train(RUN, tmp_path / "plain")
    plain, watched = (tmp_path / n / "metrics.jsonl" for n in ("plain", "run"))
    assert plain.read_bytes() == watched.read_bytes()
    assert not (tmp_path / "plain" / "profile").exists()


def test_arithmetic_of_a_token():
    model = zoo.get("transformer_tiny")
    count = lm.count_parameters(model)
    assert watching.flops_per_token(model) == 6 * count
    untied = config_lib.override(model, ["tied_embedding=false"])
    assert watching.flops_per_token(untied) == 6 * count


@pytest.mark.parametrize(
    ("kind", "most"),
    [("TPU v5 lite", 197e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)],
)
def test_peaks_are_known_by_name(kind, most):
    assert watching.peak(types.SimpleNamespace(device_kind=kind)) == most


def test_what_cannot_be_watched_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(watching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb .'mine'. asks for Weights & Biases"):
        loop.train(RUN, tmp_path / "run", wandb="mine")
    with pytest.raises(ValueError, match="profile ends with step 9, but train.steps"):
        loop.train(RUN, tmp_path / "run", profile=(2, 9))
    assert not (tmp_path / "run").exists()
    for wrong in ("3:2", "0:1", "x", "1:", ""):
        with pytest.raises(ValueError, match="profile must be first:last steps"):
            watching.profiled(wrong)
