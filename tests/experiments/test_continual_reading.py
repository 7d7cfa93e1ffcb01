"""What was asked of a model that reads real text is written down and drawn."""

import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import continual_reading
from hope_jax.evaluate import ablation
from hope_jax.models import lm
from hope_jax.stream.reader import Opened, reader_of
from hope_jax.train.config import check_rows
from hope_jax.train.metrics import read_result


def texts(folder):
    """Stand-ins for the data: lines of words, and other words."""
    (folder / "tinyshakespeare").mkdir(parents=True)
    lines = "".join(f"line {i} of a play\n" for i in range(4000))
    (folder / "tinyshakespeare" / "input.txt").write_text(lines, encoding="utf-8")
    (folder / "us-presidential-addresses").mkdir()
    file = folder / "us-presidential-addresses" / "state_union.zip"
    with zipfile.ZipFile(file, "w") as made:
        for year in (1990, 1991):
            made.writestr(f"state_union/{year}-X.txt", "My fellow citizens! " * 400)
    return folder


def test_rows_have_as_many_parameters():
    rows = continual_reading.rows("full", None)
    counts = [lm.count_parameters(config.model) for config in rows.values()]
    assert max(counts) <= 1.06 * min(counts)
    assert len({config.train for config in rows.values()}) == 1
    for config in rows.values():
        check_rows(config)
    periods = [len(config.model.fast) for config in rows.values()]
    assert periods == [1, 2, 3, 4, 0, 4, 0, 4, 4]


def test_every_question_has_its_answer(tmp_path, monkeypatch, capsys):
    def opens(folder):
        row = folder.name.removesuffix("-0")
        config = continual_reading.rows("smoke", str(tmp_path / "data"))[row]
        _, params = lm.build(config.model, jax.random.key(0))
        return Opened(config, reader_of(config.model), params, None, 0)

    texts(tmp_path / "data")
    log = [{"step": 2, "bits_per_byte": 8.0}]
    monkeypatch.setattr(continual_reading.lab, "trained", lambda *_: log)
    monkeypatch.setattr(continual_reading, "open_checkpoint", opens)
    made = continual_reading.main(
        [
            f"--workdir={tmp_path}",
            f"--data_dir={tmp_path / 'data'}",
            "--scale=smoke",
            f"--out={tmp_path}",
            "--rows=transformer,hope_matrix",
            "--seeds=0",
        ]
    )
    folder = tmp_path / "continual_reading"
    assert (folder / "continual_reading.png").stat().st_size > 1000
    hope, attention = (
        read_result(folder / f"{row}-s0.json") for row in ("hope_matrix", "transformer")
    )
    assert str(tmp_path) not in str(hope)  # results say nothing of a machine
    for found in (hope["metrics"], attention["metrics"]):
        assert all(0 < found[f"position/{t}/384-768"] < 12 for t in "AB")
        left = found["lasting/B alone"] - found["lasting/after B"]
        assert found["lasting/left"] == pytest.approx(left)
    # CMS levels have moved at the first reading, attention's window is over.
    gained = lambda m: m["lasting/first"] - m["lasting/again"]  # noqa: E731
    assert gained(hope["metrics"]) > 0.1 > abs(gained(attention["metrics"]))
    config, reader, params, *_ = opens(tmp_path / "hope_matrix-0")
    plays = config.data.load().validation[0].data
    a, b = (
        ablation.texts([ids.astype(np.int32)], count=2, length=769)[:, :385]
        for ids in (
            np.frombuffer(plays, np.uint8),
            continual_reading.addresses(str(tmp_path / "data")),
        )
    )
    state, bits = reader.initial_state(params, 2), []
    for text in (a, b, a):
        cost, state = ablation.costs(reader, True, params, jnp.asarray(text), state)
        bits.append(float(cost.mean() / np.log(2)))
    assert hope["metrics"]["lasting/first"] == pytest.approx(bits[0], rel=1e-5)
    assert hope["metrics"]["lasting/after B"] == pytest.approx(bits[2], rel=1e-5)
    assert hope["metrics"]["facts/nothing/1"] == 0
    assert "| hope_matrix | all |" in made and "| transformer | all |" in made
