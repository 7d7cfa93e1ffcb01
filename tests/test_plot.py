"""Pictures: that what is asked for is drawn, where it belongs."""

import io
import subprocess
import sys
from pathlib import Path

import matplotlib._pylab_helpers
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

import hope_jax
from hope_jax import Box, Clock, System, plot
from hope_jax.evaluate import telemetry

ROOT = Path(__file__).parents[1]
TOKENS = np.arange(1, 41) * 1000.0
CURVES = {"Hope": (TOKENS, 2 + 1000 / TOKENS), "twin": (TOKENS, 2.1 + 1000 / TOKENS)}


def test_writes_a_picture(tmp_path):
    figure = plot.loss_curves(
        CURVES,
        lines={"gzip -9": 2.2, "xz -9": 2.15},
        marks={"Hope": 2.05},
        title="a title",
    )
    figure.savefig(tmp_path / "loss.png")
    image = matplotlib.image.imread(tmp_path / "loss.png")
    assert image.shape[0] > 500 and image.shape[1] > 900
    assert image[..., :3].std() > 0.01  # something is on it


def test_names_every_line_and_its_number(tmp_path):
    figure = plot.loss_curves(
        CURVES,
        lines={"gzip -9": 2.2},
        marks={"Hope": 2.05},
        title="a title",
        ylabel="bits per byte",
        note="what is what",
    )
    figure.savefig(tmp_path / "loss.svg")
    said = (tmp_path / "loss.svg").read_text()
    for text in (
        "Hope 2.05",
        "twin, training",
        "gzip -9 2.20",
        "a title",
        "bits per byte",
        "training tokens",
        "what is what",
        "40k",
    ):
        assert f"<!-- {text} -->" in said, text


def test_a_loss_of_ones_own_is_named_as_it_is():
    losses = -1.0 - 1000 / TOKENS  # a likelihood's, below 0
    (axes,) = plot.loss_curves({"mine": (TOKENS, losses)}, xlabel="steps").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("steps", "loss")
    assert [text.get_text() for text in axes.texts] == ["mine"]
    low, high = axes.get_ylim()
    assert low < losses[6] < losses[-1] < high < 0


def memory_alone():
    return System((Box("memory", Clock(), 8, "recall", "GD"),))


@pytest.mark.parametrize(
    "make",
    [
        lambda: plot.loss_curves(CURVES),
        lambda: plot.heat_map(VALUES, rows=ROWS, columns=COLUMNS),
        lambda: hope_jax.draw(memory_alone()),
        lambda: plot.level_timeline(timeline()),
    ],
)
def test_a_figure_shows_itself_and_is_left_to_nobody(make):
    """A notebook shows what has a `_repr_png_`; matplotlib's own has none, and would
    be text where pyplot has not been set up."""
    figure = make()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert not hasattr(matplotlib.figure.Figure, "_repr_png_")
    png, size = figure._repr_png_()
    image = matplotlib.image.imread(io.BytesIO(png))
    assert image[..., :3].std() > 0.01
    inches = figure.get_size_inches()
    np.testing.assert_allclose(image.shape[1::-1], 160 * inches, atol=1)
    np.testing.assert_allclose([size["width"], size["height"]], 100 * inches, atol=1)
    assert matplotlib._pylab_helpers.Gcf.figs == {}
    code = "import sys, hope_jax.plot; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_same_picture_is_the_same_file():
    def svg():
        file = io.StringIO()
        plot.loss_curves(CURVES).savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()

    assert svg() == svg()


def test_running_mean_by_hand():
    values = np.arange(40.0)
    values[20] = 50.0
    mean = plot._running_mean(values)
    assert mean[20] == (19 + 50 + 21) / 3
    assert mean[10] == 10 and mean[0] == 0.5 and mean[-1] == 38.5
    np.testing.assert_array_equal(plot._running_mean(values[:5]), values[:5])


def test_labels_move_apart_as_little_as_needed():
    apart = plot._apart(np.array([1.0, 1.0, 5.0]), 1.0, 0.0, 10.0)
    np.testing.assert_allclose(apart, [0.5, 1.5, 5.0])
    crowded = plot._apart(np.array([9.8, 9.9]), 1.0, 0.0, 10.0)
    np.testing.assert_allclose(crowded, [9.0, 10.0])
    # The third pushes into the first two, so all three share one middle.
    chain = plot._apart(np.array([1.0, 1.5, 2.0]), 1.0, 0.0, 10.0)
    np.testing.assert_allclose(chain, [0.5, 1.5, 2.5])


def test_large_numbers_are_short():
    assert [plot._short(v, None) for v in (0, 500, 2e5, 1.5e6, 3e9)] == [
        "0",
        "500",
        "200k",
        "1.5M",
        "3B",
    ]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="curves is empty"):
        plot.loss_curves({})
    with pytest.raises(ValueError, match="'a' has 2 numbers of tokens and 1 losses"):
        plot.loss_curves({"a": ([1, 2], [1])})
    with pytest.raises(ValueError, match="'a' has 0 numbers"):
        plot.loss_curves({"a": ([], [])})
    with pytest.raises(ValueError, match="mark 'b' has no curve; curves: a"):
        plot.loss_curves({"a": ([1], [1])}, marks={"b": 1.0})


ROWS, COLUMNS = [("linear", "dot"), ("linear", "l2"), ("mlp", "l2")], ["gd", "muon"]
VALUES = [[0.1, 0.9], [0.5, np.nan], [np.nan, 0.7]]


def test_heat_map_colours_numbers_and_hatches_the_rest(tmp_path):
    def drawn(**more):
        figure = plot.heat_map(VALUES, rows=ROWS, columns=COLUMNS, **more)
        figure.savefig(tmp_path / "map.png")
        return matplotlib.image.imread(tmp_path / "map.png")

    image = drawn(hatched={"refused": [[False, False], [False, True], [True, False]]})
    assert image.shape[0] > 300 and image.shape[1] > 400
    scale = matplotlib.colormaps["cividis"]

    def share(colour):
        return (np.abs(image[..., :3] - colour).max(-1) < 0.01).mean()

    assert all(share(scale(v)[:3]) > 0.02 for v in (0.1, 0.5, 0.7, 0.9))
    assert share(scale(0.3)[:3]) < 0.005
    white, plain = ((im[..., :3] > 0.99).mean() for im in (image, drawn()))
    assert plain > white + 0.02


def test_heat_map_names_everything(tmp_path):
    figure = plot.heat_map(
        VALUES,
        rows=ROWS,
        columns=[("none", name) for name in COLUMNS],
        hatched={"refused": [[False] * 2] * 2 + [[True, False]]},
        marks={"chance": 0.25},
        label="share",
        title="a title\nin two lines",
    )
    figure.savefig(tmp_path / "map.svg")
    said = (tmp_path / "map.svg").read_text()
    texts = ("0.10", "0.90", "0.50", "0.70", "refused", "chance", "share", "a title")
    texts += ("in two lines", "linear", "mlp", "dot", "l2", "none", "gd", "muon")
    for text in texts:
        assert f"<!-- {text} -->" in said, text
    assert said.count("<!-- linear -->") == 1 and "nan" not in said.lower()


def test_groups_are_spans_of_neighbours():
    names = plot._grouped(["a", ("x", "b"), ("x", "c"), ("y", "d"), ("x", "e")])
    assert names[0] == ("", "a")
    assert plot._spans(names) == [("", 0, 0), ("x", 1, 2), ("y", 3, 3), ("x", 4, 4)]


def test_bad_heat_maps_are_named():
    def draw(values=VALUES, rows=ROWS, **more):
        plot.heat_map(values, rows=rows, columns=COLUMNS, **more)

    with pytest.raises(ValueError, match=r"values must be .* = \[2, 2\].* \[3, 2\]"):
        draw(rows=ROWS[:2])
    with pytest.raises(ValueError, match=r"at least one of each, got \[0\]"):
        draw([], [])
    with pytest.raises(ValueError, match=r"hatched 'why' must be .* got \[1, 2\]"):
        draw(hatched={"why": [[True, False]]})
    with pytest.raises(ValueError, match="'why' covers a cell that has a number"):
        draw(hatched={"why": [[True, False]] * 3})


def timeline(levels=2, memories=("main memory", "key <memory>"), alive=True):
    """Three pieces of 4 tokens, two layers of two heads; the first level moves at
    each."""
    at = np.array([4, 8, 12])
    shape, heads = (3, 2), (3, 2, 2)
    up = np.broadcast_to(np.arange(1.0, 4.0)[:, None], shape)
    lines = tuple(
        telemetry.LevelLine(
            name=f"CMS {i + 1}",
            period=4 * 2**i,
            moved=at % (4 * 2**i) == 0,
            gradient=up,
            move=0.1 * up,
            distance=0.2 * up * (i + 1),
        )
        for i in range(levels)
    )
    full = lambda value: np.full(heads, value)  # noqa: E731
    made = tuple(
        telemetry.MemoryLine(
            name=name,
            layers=(0, 1),
            norm=full(2.0),
            distance=full(1.0 + i),
            eta=full(0.5),
            alpha=full(0.9 if alive else 1.0),
            half_life=full(6.6 if alive else np.inf),
            recall=full(0.9),
            before=full(0.1),
        )
        for i, name in enumerate(memories)
    )
    return telemetry.Timeline(at, np.full(3, 2.0), lines, made)


def test_a_timeline_draws_moves_as_ticks_and_norms_as_lines():
    figure = plot.level_timeline(timeline(), title="a title")
    far, steps, memories, recall, lives = figure.axes
    assert far.get_title(loc="left") == "a title"
    assert lives.get_xlabel() == "tokens read"
    ticks = [line for line in far.lines if line.get_marker() == "|"]
    assert [line.get_xdata().tolist() for line in ticks] == [[4, 8, 12], [8]]
    norm = np.sqrt(2.0)
    np.testing.assert_allclose(ticks[0].get_ydata(), norm * 0.2 * np.arange(1, 4))
    dots = [line for line in steps.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots[1].get_ydata(), [norm * 0.2])
    np.testing.assert_allclose(memories.lines[0].get_ydata(), 2.0)  # of 4 heads, 1 each
    before, after = (recall.lines[i].get_ydata()[0] for i in (1, 0))
    np.testing.assert_allclose([before, after], [0.1, 0.9])
    np.testing.assert_allclose(lives.lines[0].get_ydata(), 6.6)
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    for name in ("CMS 1, every 4", "CMS 2, every 8", "main memory", "key <memory>"):
        assert name in said
    assert all(axes.get_ylabel() for axes in figure.axes)


def test_a_timeline_draws_what_there_is():
    assert len(plot.level_timeline(timeline(memories=())).axes) == 2
    *_, lives = plot.level_timeline(timeline(levels=0, alive=False)).axes
    assert [text.get_text() for text in lives.texts] == ["nothing is forgotten"]
    with pytest.raises(ValueError, match="neither CMS levels nor memories"):
        plot.level_timeline(timeline(levels=0, memories=()))
