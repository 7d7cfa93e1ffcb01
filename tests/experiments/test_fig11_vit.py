"""Figure 11 at its smallest: equal budgets, splits kept apart, folders of images."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from PIL import Image

from experiments import fig11_vit
from experiments.fig11_vit import Lane
from hope_jax import optim
from hope_jax.models import vit
from hope_jax.train.config import OptimizerConfig
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

    def fake(name, lanes, reader, held, steps, settings):
        calls.append((name, lanes, held, steps))
        far = [
            abs(np.log(lane.rate / best[name])) + lane.weight_decay for lane in lanes
        ]
        points = np.tile(np.array(far)[:, None], steps // settings.every)
        return fig11_vit.Curves(points, points, points)

    monkeypatch.setattr(fig11_vit, "program", lambda name, steps, settings: name)
    monkeypatch.setattr(fig11_vit, "train", fake)
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


def test_traced_rates_build_what_the_trainer_builds():
    """An optimizer of this experiment is that of `hope_jax.optim.build`."""
    config = OptimizerConfig(
        rule="adamw",
        learning_rate=0.03,
        warmup_steps=SMOKE.warmup,
        final_fraction=SMOKE.final_fraction,
        weight_decay=0.1,
        clip_norm=SMOKE.clip_norm,
    )
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones((2,))}
    theirs = optim.build(config, total_steps=8, periods=optim.one_clock(params))

    def moved(tx):
        at, state = params, tx.init(params)
        for i in range(4):
            gradient = jax.tree.map(lambda a, i=i: jnp.cos(a + i), at)
            updates, state = tx.update(gradient, state, at)
            at = optax.apply_updates(at, updates)
        return at

    ours = jax.jit(
        lambda rate, decay: moved(fig11_vit.optimizer("adamw", rate, decay, 8, SMOKE))
    )(0.03, 0.1)
    for key, value in moved(theirs).items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, err_msg=key)


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


def test_a_lane_is_its_seed_and_rate():
    data, settings = fig11_vit.load(SMOKE)
    reader = fig11_vit.Reader(data, settings)
    compiled = fig11_vit.program("momentum", SMOKE.steps, settings)
    lanes = [Lane(0.1, 0.0, 0), Lane(0.1, 0.0, 1), Lane(0.01, 0.0, 0)]
    args = (reader, data.test, SMOKE.steps, settings)
    found = fig11_vit.train(compiled, lanes, *args)
    again = fig11_vit.train(compiled, lanes[:1], *args)
    np.testing.assert_array_equal(again.held[0], found.held[0])
    assert len({*found.held[:, -1].tolist()}) == 3
    assert compiled.advance._cache_size() == 1
    # The held-out loss is that of every image once.
    params, other, same = (compiled.begin(lane)[0] for lane in lanes)
    kernels = [p["embed"]["kernel"][...] for p in (params, other, same)]
    assert (kernels[0] == kernels[2]).all() and (kernels[0] != kernels[1]).any()
    whole = [data.test[i] for i in range(len(data.test))]
    labels = jnp.array([row["label"] for row in whole])
    pixels = jnp.stack([row["image"] for row in whole])
    both = jax.jit(fig11_vit.losses, static_argnums=0)
    entropy, hits = both(settings.model, params, pixels, labels)
    sums = np.zeros(2)
    for batch in reader.held(data.test):
        part = fig11_vit.score(
            settings.model, params, batch["image"], batch["label"], batch["mask"]
        )
        sums += np.array(part, float)
    np.testing.assert_allclose(sums, [entropy.sum(), hits.sum()], rtol=1e-5)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"steps \(7\) must be a multiple of every"):
        dataclasses.replace(SMOKE, steps=7)
    with pytest.raises(ValueError, match="splits must be three"):
        fig11_vit.load(SMOKE, "digits", ["train", "test"])


def test_other_images_are_no_result_of_the_digits():
    with pytest.raises(SystemExit, match="--data=elsewhere needs --out"):
        fig11_vit.main(["--data=elsewhere"])
