"""What the experiments share: what is run and kept, refused, and how it is shown."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import (
    fig4_toy,
    fig11_vit,
    lab,
    learned_optimizers,
    memory,
    noisy_gradients,
    orthogonal_tasks,
    twins,
)
from hope_jax.train import metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Of a row."""

    size: int = 2
    seed: int = 0


@pytest.fixture
def made(tmp_path, monkeypatch):
    """An experiment that notes what it measures; its results go to a folder."""
    monkeypatch.setattr(lab, "RESULTS", tmp_path / "results")
    tasks = []

    def measure(task):
        tasks.append(task)
        return {"loss": task.config.size + task.seed / 10}

    def table(found):
        lines = [[r["row"], r["seed"], r["metrics"]["loss"]] for r in found]
        return lab.table(["row", "seed", "loss"], lines)

    experiment = lab.Experiment(
        name="made_up",
        doc="Made up.",
        rows=lambda flags: {"wide": Config(size=flags.size), "narrow": Config(size=1)},
        measure=measure,
        table=table,
        seeds=(0, 1),
        define=lambda define: define.integer("size", 2, "of wide"),
    )

    def run(*arguments):
        """Starts it; returns the rows and seeds that were measured, and the table."""
        tasks.clear()
        said = experiment(arguments)
        return [(task.row, task.seed) for task in tasks], said

    run.tasks, run.folder = tasks, tmp_path / "results" / "made_up"
    return run


def test_every_row_is_measured_with_every_seed_and_tabulated(made, capsys):
    measured, said = made()
    assert measured == [("wide", 0), ("narrow", 0), ("wide", 1), ("narrow", 1)]
    assert said.splitlines() == [
        "| row | seed | loss |",
        "|---|---:|---:|",
        "| wide | 0 | 2.0 |",
        "| wide | 1 | 2.1 |",
        "| narrow | 0 | 1.0 |",
        "| narrow | 1 | 1.1 |",
    ]
    assert said in capsys.readouterr().out
    result = metrics.read_result(made.folder / "narrow-s1.json")
    assert result["config"] == {"size": 1, "seed": 1}  # the seed is the config's too
    assert (result["scale"], result["seed"]) == ("full", 1)


def test_programs_of_a_row_are_let_go_after_it(made, monkeypatch):
    """Every one maps memory, and where no more can be had compiling crashes."""
    program, kept = jax.jit(lambda x: x + 1), []

    def write(*_, metrics, **__):
        program(metrics["loss"])
        kept.append(program._cache_size())

    monkeypatch.setattr(lab.metrics, "write_result", write)
    made()
    assert kept == [1] * 4 and program._cache_size() == 0


def test_what_is_finished_is_not_measured_again(made):
    measured, _ = made("--rows=wide", "--seeds=1")
    assert measured == [("wide", 1)]
    before = (made.folder / "wide-s1.json").read_bytes()
    measured, said = made()
    assert measured == [("wide", 0), ("narrow", 0), ("narrow", 1)]
    assert (made.folder / "wide-s1.json").read_bytes() == before
    assert made() == ([], said)


def test_a_table_has_what_there_is_of_all_rows(made):
    made("--rows=wide", "--seeds=0")
    _, said = made("--rows=narrow", "--seeds=7")
    assert "| wide | 0 |" in said and "| narrow | 7 |" in said


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renamed:
    """Once there was a length that nothing read, and what is the length was a size."""

    length: int = 2

    @classmethod
    def migrated(cls, data):
        return {"length": data["size"]} if "size" in data else data


@pytest.mark.parametrize("size, told", [(2, 0), (5, 1)])
def test_what_says_the_same_in_other_words_is_of_no_other_settings(made, size, told):
    made("--seeds=0")
    file = made.folder / "wide-s0.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"config": {"size": size, "length": 9}}))
    assert len(lab._differences(file, "full", Renamed())) == told
    assert len(lab._differences(file, "smoke", Renamed())) == 1


def test_kept_results_of_other_settings_are_told(made, capsys):
    made("--seeds=0")
    file = made.folder / "narrow-s0.json"
    saved = json.loads(file.read_text())
    del saved["config"]["size"]  # written before there was such a field
    file.write_text(json.dumps(saved))
    capsys.readouterr()
    measured, _ = made("--seeds=0", "--size=5")
    said = capsys.readouterr().out
    assert measured == [] and "config.size: saved 2, now 5" in said
    assert said.startswith("1 results are kept that are of other settings")
    made("--seeds=0", "--scale=smoke", f"--out={made.folder.parent}")
    assert 'scale: saved "full", now "smoke"' in capsys.readouterr().out


def test_results_and_pictures_go_where_they_are_sent(made, tmp_path):
    made("--seeds=0", "--rows=wide")
    (task,) = made.tasks
    assert task.picture.as_posix() == "runs/made_up/made_up.png"
    out = tmp_path / "out"
    measured, _ = made("--seeds=0", "--rows=wide", "--scale=smoke", f"--out={out}")
    assert measured == [("wide", 0)]  # there is none there
    assert made.tasks[0].picture == out / "made_up.png"
    assert metrics.read_result(out / "made_up" / "wide-s0.json")["scale"] == "smoke"
    assert len(list(made.folder.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--rows=wide,narow"],
            "no row 'narow'; there are wide, narrow. Did you mean 'narrow'?",
        ),
        (["--scale=smoke"], "--scale=smoke needs --out: .* has the full scale"),
        (["--scale=smok", "--out=x"], "--scale=smok: value should be one of"),
        (["--seeds="], "--seeds must be whole numbers"),
        (["--seeds=1,-2"], "--seeds must be whole numbers .* got '1,-2'"),
        (["--rowz=wide"], "flag 'rowz'. Did you mean: rows"),
        (["wide"], "not a flag: wide"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(made, arguments, message):
    with pytest.raises(SystemExit, match=message) as stopped:
        made(*arguments)
    assert "\n" not in stopped.value.code and made.tasks == []
    assert not made.folder.exists()


def test_everything_has_one_budget():
    grid = lab.Grid(low=0.01, high=10.0, rates=4)
    np.testing.assert_allclose(grid.tried(), [0.01, 0.1, 1.0, 10.0])
    scores = np.array([[3.0, np.inf], [np.nan, np.nan], [1.0, 8.0], [2.0, 9.0]])
    np.testing.assert_array_equal(grid.best(scores), [2, 2])
    assert grid.best(np.full(4, np.nan)) == 0
    for wrong in (scores[:3], np.concatenate([scores, scores])):
        with pytest.raises(
            ValueError, match=f"{len(wrong)} trials .* everything has 4"
        ):
            grid.best(wrong)
    assert grid.best(np.arange(8.0)[::-1], trials=8) == 7  # with two decays each
    with pytest.raises(ValueError, match="4 trials .* everything has 8"):
        grid.best(np.arange(4.0), trials=8)


def test_the_best_stand_first_and_what_is_missing_is_said():
    numbers = {
        "sgd_far_loss": 1.0,
        "adam_far_loss": 0.5,
        "adam_far_steps": 70,
        "adam_near_loss": 9.0,
        "lost_near_loss": 0.1,
    }
    result = {"row": "all", "config": {"at": ["far", "near"]}, "metrics": numbers}
    found = lab.ranked(
        [result],
        ("lost", "sgd", "adam"),
        {"loss": "{loss:.1f}", "both": "{loss:g} at {steps}"},
        by="loss",
        head="{sgd_far_loss:g} in {at}",
        places=lambda config: config["at"],
        missing="-",
    )
    assert found.splitlines() == [
        "1 in ['far', 'near']",
        "",
        "| far | loss | both |",
        "|---|---:|---:|",
        "| adam | 0.5 | 0.5 at 70 |",
        "| sgd | 1.0 | - |",
        "| lost | - | - |",
        "",
        "| near | loss | both |",
        "|---|---:|---:|",
        "| lost | 0.1 | - |",
        "| adam | 9.0 | - |",
        "| sgd | - | - |",
    ]


def test_points_are_means_between_ends():
    axes = Figure().subplots()
    a, b = np.array([1.0, 3.0]), np.array([4.0, 4.0])
    lab.points(axes, ["first_name", "other"], {"x": [a, b], "y": [b, a]})
    x, y = axes.containers
    np.testing.assert_allclose(x.lines[0].get_xdata(), [2.0, 4.0])
    np.testing.assert_allclose(y.lines[0].get_xdata(), [4.0, 2.0])
    (first, _), (_, last) = (c.lines[2][0].get_segments() for c in (x, y))
    for ends in (first, last):
        np.testing.assert_allclose(ends[:, 0], [1.0, 3.0])
    assert [t.get_text() for t in axes.get_yticklabels()] == ["first name", "other"]
    bottom, top = axes.get_ylim()
    assert bottom > top and x.get_label() == "x"


@pytest.mark.parametrize(
    ("spread", "half"), [("range", [1.0, 2.0]), ("deviation", [0.5, 1.0])]
)
def test_a_band_is_around_the_mean(spread, half):
    axes = Figure().subplots()
    runs = np.array([[1.0, 0.0], [3.0, 4.0], [2.0, 2.0], [2.0, 2.0]])
    half = np.array(half) * (math.sqrt(2.0) if spread == "deviation" else 1.0)
    line = lab.band(axes, [1, 2], runs, spread=spread, color="#123456")
    np.testing.assert_allclose(line.get_ydata(), [2.0, 2.0])
    corners = axes.collections[0].get_paths()[0].vertices
    for at, width in zip((1, 2), half, strict=True):
        heights = corners[corners[:, 0] == at][:, 1]
        np.testing.assert_allclose(
            [heights.min(), heights.max()], [2 - width, 2 + width]
        )


@pytest.mark.parametrize(
    ("experiment", "arguments", "line"),
    [
        (fig4_toy, [], "| delta_momentum_clip | 59 at 0.0087 | 59 | 26 | 23 |"),
        (orthogonal_tasks, [], "| adam | 0.004 | 0.1229 (0.0123) | 0.0147 |"),
        (learned_optimizers, [], "| gradient_descent | 0.56 | -3.17 (0.15) |"),
        (noisy_gradients, [], "| clipped_momentum | 0.145 (0.036) |"),
        (fig11_vit, [], "| m3 | 0.01 | 0 | 0 | 0.0003 (0.0000) | 0.1211 (0.0391)"),
        (memory, ["--group=static"], "| titans | 0.889, 0.166, 0.954 | 0.670 |"),
        (twins, ["--workdir=none"], "| hope_still | all learn | 4.656 | 0.008 |"),
    ],
)
def test_results_of_before_are_read_and_left_as_they_are(
    experiment, arguments, line, tmp_path, monkeypatch
):
    """Each table from the files of this repository, without a measurement."""

    def forbidden(*_, **__):
        raise AssertionError("it has results")

    monkeypatch.setattr(metrics, "write_result", forbidden)
    folder = tmp_path / experiment.NAME
    shutil.copytree(lab.RESULTS / experiment.NAME, folder)
    monkeypatch.setattr(lab, "RESULTS", tmp_path)
    kept = dataclasses.replace(experiment.main, measure=forbidden)
    assert line in kept(arguments)


def test_a_line_of_evidence_is_a_mean_beside_a_number():
    def result(row, seed, loss):
        return {"row": row, "seed": seed, "metrics": {"loss": loss}}

    found = [result("a", 0, 3.0), result("a", 1, 4.0), result("b", 1, 2.0)]
    a, b = (lab.values(found, row, "loss") for row in "ab")
    assert a == {0: 3.0, 1: 4.0} and lab.quotient(a, b) == {1: 2.0}
    (line,) = lab.compared("a", a, 5.0, "{:.1f} %", where="Table 9", command="x --y")
    assert line == ("a", "3.5 % (3.0 to 4.0)", "5.0 % (Table 9)", "-1.5 %", "x --y")
    assert lab.compared("b", b) == [lab.Evidence("b", "2.000")]
    assert lab.compared("c", lab.values(found, "c", "loss"), 1.0) == []


def test_a_picture_is_kept_beside_the_results(tmp_path, capsys):
    drawn = []

    def draw(found):
        drawn.append([result["row"] for result in found])
        return Figure()

    experiment = lab.Experiment(
        name="pictured",
        doc="Made up.",
        rows=lambda flags: {"a": Config()},
        measure=lambda task: {"loss": 1.0},
        table=lambda found: "",
        draw=draw,
    )
    experiment([f"--out={tmp_path}"])
    assert drawn == [["a"]] and (tmp_path / "pictured" / "pictured.png").exists()
