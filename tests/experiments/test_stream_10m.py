"""A row that is streamed moves when it has to, and goes on where it was stopped."""

import jax
import pytest

from experiments import stream_10m
from hope_jax.models import lm
from hope_jax.stream.reader import Opened, reader_of
from hope_jax.train.config import check_rows
from hope_jax.train.metrics import read_result


def test_rows_differ_in_the_model_alone():
    for scale in ("full", "smoke"):
        hope, titans = stream_10m.rows(scale).values()
        check_rows(hope)
        assert hope.train == titans.train and hope.data == titans.data
        counts = [lm.count_parameters(c.model) for c in (hope, titans)]
        assert abs(counts[0] - counts[1]) <= 0.02 * counts[0]


def test_ten_parts_are_read_and_every_move_is_counted(tmp_path, monkeypatch, capsys):
    config = stream_10m.rows("smoke")["hope"]
    _, params = lm.build(config.model, jax.random.key(0))
    opened = Opened(config, reader_of(config.model), params, None, 0)
    monkeypatch.setattr(
        stream_10m.lab, "trained", lambda *_: [{"step": 2, "bits_per_byte": 8.0}]
    )
    monkeypatch.setattr(stream_10m, "open_checkpoint", lambda folder: opened)

    def run(name):
        (tmp_path / name / "hope").mkdir(parents=True, exist_ok=True)
        arguments = [f"--workdir={tmp_path / name}", "--rows=hope", "--scale=smoke"]
        made = stream_10m.main([*arguments, f"--out={tmp_path / name}"])
        file = tmp_path / name / "stream_10m" / "hope-s0.json"
        return made, read_result(file)["metrics"]

    made, found = run("whole")
    assert found["tokens"] == 5120
    for level, period in enumerate((128, 256, 1024)):
        at = f"CMS {level + 1}"
        assert found[f"moves/{at}"] == found[f"due/{at}"] == 5120 // period
    assert found["moves/main"] == found["moves/projection"] == 40  # base chunks
    assert found["loss_last"] == found["loss at 5120"] != found["loss_first"]
    norms = [found[f"norm at {at}/main"] for at in (5120, 512)]
    assert found["norm_ratio"] >= norms[0] / norms[1]
    assert "| hope | 5,120 |" in made and "40 / 20 / 5 | 40 / 20 / 5" in made

    seen = []

    def stops():
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(stream_10m, "_resident", stops)
    with pytest.raises(KeyboardInterrupt):
        run("parts")
    _, again = run("parts")
    assert len(seen) == 4 + 7  # three parts were kept
    drop = lambda m: {k: v for k, v in m.items() if "resident" not in k}  # noqa: E731
    assert drop(again) == drop(found)
