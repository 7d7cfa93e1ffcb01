"""The trainings differ in rate and seed alone; one that diverges is told apart."""

import dataclasses

import pytest

from experiments import quickstart, stability
from hope_jax.train import loop
from hope_jax.train.metrics import read_result


def test_rows_differ_in_the_rate_alone():
    hope = quickstart.rows("full")["hope"]
    for config in stability.rows("full").values():
        same = dataclasses.replace(hope.optimizer, learning_rate=stability.RATES[0])
        assert config.model == hope.model and config.train == hope.train
        assert same == dataclasses.replace(
            config.optimizer, learning_rate=stability.RATES[0]
        )


def test_a_smoke_run_writes_results_and_a_table(tmp_path, capsys, monkeypatch):
    arguments = [f"--workdir={tmp_path / 'runs'}", f"--out={tmp_path}"]
    arguments += ["--scale=smoke", "--rows=rate_0.004", "--seeds=3"]
    made = stability.main(arguments)
    found = read_result(tmp_path / "stability" / "rate_0.004-s3.json")["metrics"]
    assert found["finite"] == 1.0 and 0 < found["training bits per byte"] < 10
    assert f"| 0.004 | {found['training bits per byte']:.3f} |" in made
    capsys.readouterr()
    assert stability.main(arguments) == made  # nothing is trained again
    assert "step" not in capsys.readouterr().out

    def diverges(*_, **__):
        raise loop.NonFinite("step 2: loss is nan")

    monkeypatch.setattr(loop, "train", diverges)
    assert "| 0.008 | not finite |" in stability.main([*arguments, "--rows=rate_0.008"])


@pytest.mark.parametrize(
    "arguments, message",
    [(["--rows=hop"], "no row 'hop'"), (["--scale=smoke"], "needs --out")],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        stability.main([f"--workdir={tmp_path / 'runs'}", *arguments])
