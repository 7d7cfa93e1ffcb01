"""Pictures: that what is asked for is drawn, where it belongs."""

import matplotlib.image
import numpy as np
import pytest

from hope_jax import plot

TOKENS = np.arange(1, 41) * 1000.0
CURVES = {"Hope": (TOKENS, 2 + 1000 / TOKENS), "twin": (TOKENS, 2.1 + 1000 / TOKENS)}


def test_writes_a_picture(tmp_path):
    path = plot.loss_curves(
        tmp_path / "new" / "loss.png",
        CURVES,
        lines={"gzip -9": 2.2, "xz -9": 2.15},
        marks={"Hope": 2.05},
        title="a title",
    )
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 500 and image.shape[1] > 900
    assert image[..., :3].std() > 0.01  # something is on it


def test_names_every_line_and_its_number(tmp_path):
    path = plot.loss_curves(
        tmp_path / "loss.svg",
        CURVES,
        lines={"gzip -9": 2.2},
        marks={"Hope": 2.05},
        title="a title",
    )
    said = path.read_text()
    for text in (
        "Hope 2.05",
        "twin, training",
        "gzip -9 2.20",
        "a title",
        "bits per byte",
        "training tokens",
        "40k",
    ):
        assert f"<!-- {text} -->" in said, text


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


def test_bad_arguments_are_named(tmp_path):
    path = tmp_path / "loss.png"
    with pytest.raises(ValueError, match="curves is empty"):
        plot.loss_curves(path, {})
    with pytest.raises(ValueError, match="'a' has 2 numbers of tokens and 1 of"):
        plot.loss_curves(path, {"a": ([1, 2], [1])})
    with pytest.raises(ValueError, match="'a' has 0 numbers"):
        plot.loss_curves(path, {"a": ([], [])})
    with pytest.raises(ValueError, match="mark 'b' has no curve; curves: a"):
        plot.loss_curves(path, {"a": ([1], [1])}, marks={"b": 1.0})
    assert not path.exists()


ROWS, COLUMNS = [("linear", "dot"), ("linear", "l2"), ("mlp", "l2")], ["gd", "muon"]
VALUES = [[0.1, 0.9], [0.5, np.nan], [np.nan, 0.7]]


def test_heat_map_colours_numbers_and_hatches_the_rest(tmp_path):
    path = plot.heat_map(
        tmp_path / "new" / "map.png",
        VALUES,
        rows=ROWS,
        columns=COLUMNS,
        hatched={"refused": [[False, False], [False, True], [True, False]]},
    )
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 300 and image.shape[1] > 400
    scale = matplotlib.colormaps["cividis"]

    def share(colour):
        return (np.abs(image[..., :3] - colour).max(-1) < 0.01).mean()

    assert all(share(scale(v)[:3]) > 0.02 for v in (0.1, 0.5, 0.7, 0.9))
    assert share(scale(0.3)[:3]) < 0.005
    plain = plot.heat_map(tmp_path / "no.png", VALUES, rows=ROWS, columns=COLUMNS)
    assert (matplotlib.image.imread(plain)[..., :3] > 0.99).mean() > (
        (image[..., :3] > 0.99).mean() + 0.02
    )


def test_heat_map_names_everything(tmp_path):
    path = plot.heat_map(
        tmp_path / "map.svg",
        VALUES,
        rows=ROWS,
        columns=[("none", name) for name in COLUMNS],
        hatched={"refused": [[False] * 2] * 2 + [[True, False]]},
        marks={"chance": 0.25},
        label="share",
        title="a title\nin two lines",
    )
    said = path.read_text()
    texts = ("0.10", "0.90", "0.50", "0.70", "refused", "chance", "share", "a title")
    texts += ("in two lines", "linear", "mlp", "dot", "l2", "none", "gd", "muon")
    for text in texts:
        assert f"<!-- {text} -->" in said, text
    assert said.count("<!-- linear -->") == 1 and "nan" not in said.lower()


def test_groups_are_spans_of_neighbours():
    names = plot._grouped(["a", ("x", "b"), ("x", "c"), ("y", "d"), ("x", "e")])
    assert names[0] == ("", "a")
    assert plot._spans(names) == [("", 0, 0), ("x", 1, 2), ("y", 3, 3), ("x", 4, 4)]


def test_bad_heat_maps_are_named(tmp_path):
    def draw(values=VALUES, rows=ROWS, **more):
        plot.heat_map(tmp_path / "map.png", values, rows=rows, columns=COLUMNS, **more)

    with pytest.raises(ValueError, match=r"values must be .* = \[2, 2\].* \[3, 2\]"):
        draw(rows=ROWS[:2])
    with pytest.raises(ValueError, match=r"at least one of each, got \[0\]"):
        draw([], [])
    with pytest.raises(ValueError, match=r"hatched 'why' must be .* got \[1, 2\]"):
        draw(hatched={"why": [[True, False]]})
    with pytest.raises(ValueError, match="'why' covers a cell that has a number"):
        draw(hatched={"why": [[True, False]] * 3})
