"""The twins are twins, and a smoke run of them writes results and a table."""

import dataclasses
import math

import pytest

from experiments import quickstart, twins
from hope_jax.models import lm
from hope_jax.train.metrics import read_result


def test_twins_differ_in_the_model_alone_and_are_of_one_size():
    rows = twins.rows("full")
    sizes = {row: lm.count_parameters(config.model) for row, config in rows.items()}
    assert max(sizes.values()) < 1.01 * min(sizes.values())
    hope = rows["hope"]
    assert hope.model == quickstart.rows("full")["hope"].model
    for row, config in rows.items():
        same = dataclasses.replace(config, row=hope.row, model=hope.model)
        assert same == hope
        assert (config.model.fast == ()) == (
            row in ("hope_still", "transformer", "gated_delta_net")
        )
    still = rows["hope_still"].model
    moving = [dataclasses.replace(v, period=math.inf) for v in hope.model.cms.levels]
    assert still.cms.levels == tuple(moving)
    assert still.mixer == hope.model.mixer


def test_a_smoke_run_writes_results_and_a_table(tmp_path, capsys):
    arguments = ["--scale=smoke", f"--out={tmp_path}", "--rows=transformer"]
    arguments += [f"--workdir={tmp_path / 'runs'}"]
    made = twins.main(arguments)
    found = read_result(tmp_path / "twins" / "transformer-s0.json")["metrics"]
    assert 0 < found["nothing learns/first"] < 10
    assert "| transformer | all learn |" in made
    capsys.readouterr()
    assert twins.main(arguments) == made  # nothing is trained or asked again
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows=hop"], "no row 'hop'; there are hope, hope_matrix"),
        (["--scale=smoke"], "needs --out"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        twins.main([f"--workdir={tmp_path / 'runs'}", *arguments])
    assert not (tmp_path / "runs").exists()
