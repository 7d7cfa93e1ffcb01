"""The sweep: what it trains, what it refuses and keeps, and how it goes on."""

import contextlib
import io
import json
import re

import matplotlib.image
import numpy as np
import pytest

from experiments import sweep
from hope_jax import plot
from hope_jax.core import config as config_lib
from hope_jax.memory import named

TINY = (
    *("--set=task.vocab=8", "--set=task.pairs=2", "--set=task.length=8"),
    *("--set=d_model=4", "--set=layers=1", "--set=hidden=4", "--set=batch=2"),
    *("--set=evaluation=1", "--set=optimizer.warmup_steps=1"),
)
# Two that train and two that are refused.
GRID = (
    *("--architectures=linear", "--biases=l2", "--retentions=none,oja"),
    *("--rules=gd,implicit", "--set=gradients=exact"),
)


def start(*arguments):
    """Runs the program; returns what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        sweep.main(arguments)
    return out.getvalue()


def settings(*changed):
    return config_lib.override(
        sweep.GridConfig(), [s.removeprefix("--set=") for s in TINY + changed]
    )


def saved(folder):
    return json.loads((folder / "sweep.json").read_text())


@pytest.fixture
def no_training(monkeypatch):
    """Points whose training is a note of their name; `fail` says where it stops."""

    class Trained(list):
        fail = None

    trained = Trained()

    def train(config, model, seed):
        if len(trained) == trained.fail:
            raise KeyboardInterrupt
        trained.append(seed)
        result = {"status": "done", "accuracy": 0.5 + seed / 10, "loss": 1.0}
        return result | {"steps": 2, "tokens_per_second": 9.0, "seconds": 0.1}

    monkeypatch.setattr(sweep, "train", train)
    return trained


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "new"
    said = start(f"--out={folder}", *TINY, *GRID, "--steps=2")
    return folder, said


def test_table_has_every_product(swept):
    table = saved(swept[0])
    names = [row["point"].removeprefix("linear/l2/") for row in table["rows"]]
    assert names == ["none/gd", "none/implicit", "oja/gd", "oja/implicit"]
    for row in table["rows"]:
        assert list(row)[: len(sweep.COLUMNS)] == list(sweep.COLUMNS)
        assert "/".join(row[choice] for choice in sweep.CHOICES) == row["point"]
    assert table["config"]["steps"] == 2 and table["versions"]["jax"]


def test_trained_rows_have_their_numbers(swept):
    for row in saved(swept[0])["rows"][:2]:
        assert row["status"] == "done" and row["chunk"] == "exact 8"
        assert row["steps"] == 2 and row["seed"] == 0
        assert 0 <= row["accuracy"] <= 1 and 0 < row["loss"] < 20
        assert row["tokens_per_second"] == pytest.approx(2 * 2 * 8 / row["seconds"])
        assert "cpu" in row["device"] and row["commit"]


def test_refused_rows_say_why_and_have_none(swept):
    for row in saved(swept[0])["rows"][2:]:
        assert row["status"].startswith("refused: retention='oja'")
        assert "bias='dot'" in row["status"]
        assert row["accuracy"] is None and row["steps"] is None


def test_prints_one_markdown_line_a_row(swept):
    lines = [line for line in swept[1].splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert [c.replace("/", "_per_") for c in cells[0]] == list(sweep.COLUMNS)
    assert {len(row) for row in cells} == {len(sweep.COLUMNS)}
    assert len(cells) == 2 + 4
    assert cells[2][0] == "linear/l2/none/gd" and cells[2][7] == "done"
    assert cells[4][7] == saved(swept[0])["rows"][2]["status"]
    assert f"wrote {swept[0] / 'sweep.json'} and" in swept[1]


def test_picture_is_not_blank(swept):
    image = matplotlib.image.imread(swept[0] / "sweep.png")
    assert image.shape[0] > 300 and image.shape[1] > 500
    assert image[..., :3].std() > 0.05


def test_second_start_trains_nothing(swept, no_training):
    folder, first = swept
    before = (folder / "sweep.json").read_bytes()
    again = start(f"--out={folder}", *TINY, *GRID, "--steps=2")
    assert no_training == [] and again.count("kept, accuracy") == 2
    assert (folder / "sweep.json").read_bytes() == before
    table = [s[s.index("|") :] for s in (first, again)]
    assert table[0] == table[1]


def test_a_stopped_sweep_goes_on_where_it_stood(tmp_path, no_training):
    arguments = (f"--out={tmp_path}", *TINY, *GRID, "--seeds=3,1", "--steps=2")
    no_training.fail = 3
    with pytest.raises(SystemExit, match="130"):
        start(*arguments)
    assert len(saved(tmp_path)["rows"]) == len(no_training) == 3
    no_training.fail = None
    start(*arguments)
    assert no_training == [3, 1, 3, 1]
    rows = saved(tmp_path)["rows"]
    assert len({(row["point"], row["seed"]) for row in rows}) == len(rows) == 8


def test_another_grid_adds_to_the_table(tmp_path, no_training):
    shared = (f"--out={tmp_path}", *TINY, *GRID, "--steps=2")
    start(*shared)
    said = start(*shared, "--biases=dot", "--rules=gd", "--retentions=none")
    assert len(no_training) == 3
    names = [row["point"] for row in saved(tmp_path)["rows"]]
    assert "linear/dot/none/gd" in names and "linear/l2/none/gd" in names
    assert "l2" not in said  # but it is about what was asked


def test_a_table_of_other_settings_is_left_alone(tmp_path, no_training):
    start(f"--out={tmp_path}", *TINY, *GRID, "--steps=2")
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(SystemExit, match=r"steps: saved 2, now 3\nGive another --out"):
        start(f"--out={tmp_path}", *TINY, *GRID, "--steps=3")
    assert (tmp_path / "sweep.json").read_bytes() == before


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{}]}', '{"rows": [1]}'])
def test_a_file_that_is_no_table_is_left_alone(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(SystemExit, match="is no table of experiments.sweep"):
        start(f"--out={tmp_path}", *TINY, *GRID)
    assert (tmp_path / "sweep.json").read_text() == text


def test_heat_map_is_the_mean_over_seeds(monkeypatch):
    config = settings("gradients=exact")
    choices = dict(architecture=["linear", "mlp"], bias=["l2"])
    choices |= dict(retention=["none"], rule=["gd", "momentum", "nesterov"])
    points = sweep.miras(config, choices)
    scores = {"linear/l2/none/gd": (0.25, 0.75), "linear/l2/none/momentum": (0.5, None)}
    rows = []
    for point in points:
        for seed, accuracy in enumerate(scores.get(point.name, (None, None))):
            refused = "refused: so" if point.model is None else "not finite by step 2"
            status = refused if accuracy is None else "done"
            rows.append(sweep.row_of(point) | {"seed": seed, "status": status})
            rows[-1]["accuracy"] = accuracy
    drawn = {}
    monkeypatch.setattr(plot, "heat_map", lambda v, **k: drawn.update(k, v=v))
    sweep.draw(config, points, rows)
    nan = np.nan
    np.testing.assert_array_equal(drawn["v"], [[0.5, nan, nan], [nan, nan, nan]])
    assert drawn["rows"] == [("linear", "l2"), ("mlp", "l2")]
    assert drawn["columns"] == [("none", r) for r in choices["rule"]]
    hatched = {why: cells.tolist() for why, cells in drawn["hatched"].items()}
    assert hatched == {
        "refused, the table says why": [[False] * 3, [True] * 3],
        "did not stay finite": [[False, True, True], [False] * 3],
    }
    assert drawn["marks"] == {"chance": 0.5} and "mean of 2 seeds" in drawn["title"]


def test_default_grid_is_of_a_few_minutes():
    points = sweep.miras(
        sweep.GridConfig(), {c: d.split(",") for c, d in sweep.DEFAULTS.items()}
    )
    assert 12 <= len(points) <= 16 and all(point.model for point in points)
    kinds = {point.choices[0]: point.chunk.split()[0] for point in points}
    assert kinds == {"linear": "exact", "mlp": "anchored"}
    assert len({point.name for point in points}) == len(points)


def test_every_product_trains_or_has_a_reason():
    """A corner of the grid with the choices that are hardest to combine."""
    every = {c: sweep.options(c) for c in sweep.CHOICES}
    every |= {"bias": ("dot", "l2", "huber")}
    points = sweep.miras(sweep.GridConfig(), every)
    assert len(points) == 5 * 3 * 9 * 7
    refused = [point for point in points if point.model is None]
    assert 50 < len(refused) < len(points) - 300
    assert all(len(point.reason) > 20 for point in refused)
    reasons = {point.name: point.reason for point in refused}
    # What the choices lack, not that the first gradient tried was not for an mlp.
    assert reasons["mlp/l2/none/newton"].startswith("rule='newton' solves")
    assert reasons["linear/huber/oja/gd"].startswith("retention='oja'")
    assert "linear/dot/oja/gd" not in reasons and "mlp/huber/lq/gd" not in reasons


def test_named_points_are_all_there(tmp_path, no_training):
    points = sweep.published(sweep.GridConfig())
    assert [point.name for point in points] == list(named.POINTS)
    assert all(point.model is not None for point in points)
    kinds = {point.name: point.chunk for point in points}
    assert kinds["delta_net"] == "exact 8" and kinds["titans"] == "anchored 8"
    assert kinds["softmax_attention"] == "non-parametric"
    models = {point.name: point.model for point in points}
    for name in ("rwkv7", "mamba2"):
        assert models[name].mixer.gates == named.get(name).gates
    assert models["softmax_attention"].kinds == "softmax_attention"
    said = start(f"--out={tmp_path}", "--grid=named", "--points=titans,delta_net")
    assert len(no_training) == 2
    assert [row["point"] for row in saved(tmp_path)["rows"]] == ["titans", "delta_net"]
    assert "| titans " in said and "momentum" in said
    assert matplotlib.image.imread(tmp_path / "sweep.png")[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--architectures=liner"], "no architecture 'liner'; .*Did you mean 'linear'"),
        (["--biases=l2,l3"], "--biases: there is no bias 'l3'; there are dot, l2, lp"),
        (["--retentions=keep"], "no retention 'keep'; there are none, decay, channel"),
        (["--rules=sgd"], "no rule 'sgd'; there are gd, .* and optax.<name>"),
        (["--rules=optax.adamx"], "optax has no optimizer 'adamx'.*Near: adam"),
        (["--rules="], "--rules is empty; choose from gd, momentum"),
        (["--grid=named", "--points=titan"], "no memory is named.*mean 'titans'"),
        (["--grid=named", "--rules=gd"], "--rules is about --grid=miras"),
        (["--points=titans"], "--points needs --grid=named"),
        (["--seeds=1,x"], "--seeds must be whole numbers .* got '1,x'"),
        (["--seeds="], "--seeds must be whole numbers"),
        (["--steps=0"], "steps must be at least 1, got 0"),
        (["--seconds=0"], "seconds must be above 0, got 0"),
        (["--steps=5"], r"warmup_steps \(20\) exceeds steps \(5\)"),
        (["--set=task.pair=4"], "no field 'pair'. Did you mean 'pairs'"),
        (["--set=task.pairs=40"], r"vocab must be at least 2 \(pairs \+ 1\) = 82"),
        (["--set=mixer.memory.bias=dot"], "the grid sets it; use --biases="),
        (["--set=mixer.memory.gradient=exact"], "use --set gradients="),
        (["--set=gradients="], "gradients must name 'exact', 'anchored' or both"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_trained(
    arguments, message, tmp_path, no_training
):
    with pytest.raises(SystemExit) as stopped:
        start(f"--out={tmp_path / 'new'}", *arguments)
    assert re.match(f"error: .*{message}", str(stopped.value), re.DOTALL)
    assert no_training == [] and not (tmp_path / "new").exists()
