"""Figure 11 at its smallest: equal budgets, splits kept apart, folders of images."""

import dataclasses
import json
import re

import jax
import matplotlib.image
import numpy as np
import pytest
from PIL import Image

from experiments import fig11_vit
from hope_jax import optim
from hope_jax.models import vit
from hope_jax.train import images
from hope_jax.train.metrics import read_result

SMOKE = fig11_vit.SETTINGS["smoke"]


@pytest.fixture(autouse=True)
def _as_a_program():
    """Optax raises floats to whole powers, which our tests' strict types forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_a_smoke_run_writes_a_table_a_picture_and_a_result(
    tmp_path, capsys, monkeypatch
):
    names = ("momentum", "adamw")
    monkeypatch.setattr(fig11_vit, "OPTIMIZERS", names)  # of seven: compiling
    fig11_vit.main(["--scale=smoke", f"--out={tmp_path}"])
    said = capsys.readouterr().out
    (file,) = (tmp_path / "fig11_vit").glob("*.json")
    result = read_result(file)
    numbers = result["metrics"]
    for name in names:
        assert re.search(rf"^\| {name} \|", said, re.MULTILINE), name
        assert 0 < numbers[f"{name}_test_loss"] < np.log(10) + 0.1
        assert numbers[f"{name}_step_ms"] > 0
        assert numbers[f"{name}_rate"] in (SMOKE.low, SMOKE.high)
    image = matplotlib.image.imread(tmp_path / "fig11_vit.png")
    assert min(image.shape[:2]) > 300 and image[..., :3].std() > 0.01
    assert result["scale"] == "smoke"
    assert result["config"]["data"] == "digits"
    assert json.dumps(result["config"])  # says what was searched


def test_every_optimizer_of_the_figure_has_a_name():
    assert set(fig11_vit.OPTIMIZERS) <= set(optim.RULES)
    figure = {"adamw", "muon", "adamuon", "m3", "delta_momentum", "deep_momentum"}
    assert figure <= set(fig11_vit.OPTIMIZERS)


def test_every_optimizer_has_the_same_budget_and_tuning_sees_no_test(monkeypatch):
    """Which runs are made, on what: without training, by a made-up loss."""
    calls = []
    best = {"adamw": 0.1, "muon": 0.001}

    def fake(model, name, lanes, reader, held, steps, divided):
        calls.append((name, lanes, held, steps))
        far = [
            abs(np.log(lane.rate / best[name])) + lane.weight_decay for lane in lanes
        ]
        points = np.tile(np.array(far)[:, None], steps // settings.every)
        return images.Curves(points, points, points)

    monkeypatch.setattr(fig11_vit, "program", lambda name, steps, settings: name)
    monkeypatch.setattr(images, "run", fake)
    monkeypatch.setattr(
        fig11_vit, "step_times", lambda found, *_: dict.fromkeys(found, 1.0)
    )
    settings = dataclasses.replace(SMOKE, rates=3, threads=1)
    data, settings = fig11_vit.load(settings)
    outcomes = fig11_vit.compare(settings, data, tuple(best))

    for name, rate in best.items():
        (_, tuning, valid, short), (_, final, test, long) = (
            call for call in calls if call[0] == name
        )
        assert tuning == fig11_vit.grid(settings) and short == settings.tuning_steps
        assert valid is data.valid and test is data.test and long == settings.steps
        assert [lane.seed for lane in final] == list(range(settings.seeds))
        assert not {lane.seed for lane in final} & {lane.seed for lane in tuning}
        assert {(lane.rate, lane.weight_decay) for lane in final} == {(rate, 0.0)}
        assert outcomes[name].rate == rate and outcomes[name].edge
    tried = fig11_vit.grid(settings)
    assert len(tried) == len(set(tried)) == 6
    ratios = [tried[2].rate / tried[0].rate, tried[4].rate / tried[2].rate]
    np.testing.assert_allclose(ratios, 10, rtol=1e-6)


def test_a_folder_of_photographs_runs_the_large_scales_way(tmp_path):
    """`s16` with everything small: augmented, from disk, each batch on all devices."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2), ("test", 2)):
        for name, level in (("dark", 40), ("light", 200), ("lighter", 250)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.full((12, 9, 3), level) - rng.integers(0, 30, (12, 9, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    large = fig11_vit.SETTINGS["s16"]
    assert large.augment and large.split_batch and large.model == vit.get("s16")
    settings = dataclasses.replace(
        large,
        model=dataclasses.replace(
            large.model, image=8, patch=4, d_model=8, heads=2, hidden=8, layers=1
        ),
        steps=4,
        tuning_steps=4,
        batch=8,
        every=2,
        warmup=1,
        rates=1,
    )
    splits = ("train", "val", "test")
    data, settings = fig11_vit.load(settings, str(tmp_path), splits)
    assert settings.model.classes == 3 and data.test.on_disk
    outcome = fig11_vit.compare(settings, data, ["momentum"])["momentum"]
    assert outcome.curves.train.shape == (1, 2) and not outcome.edge
    assert np.isfinite(outcome.curves.held).all()
    assert 0 < outcome.curves.held[0, -1] < 2 * np.log(3)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"steps \(7\) must be a multiple of every"):
        dataclasses.replace(SMOKE, steps=7)
    with pytest.raises(ValueError, match="splits must be three"):
        fig11_vit.load(SMOKE, "digits", ["train", "test"])


def test_other_images_are_no_result_of_the_digits():
    with pytest.raises(SystemExit, match="--data=elsewhere needs --out"):
        fig11_vit.main(["--data=elsewhere"])
