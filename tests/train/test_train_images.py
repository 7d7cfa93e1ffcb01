"""A vision transformer's runs: that a lane decides all of it, and what is scored."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax import optim
from hope_jax.data.images import load
from hope_jax.models import vit
from hope_jax.train import images
from hope_jax.train.config import OptimizerConfig


class Lane(NamedTuple):
    """What runs differ in."""

    rate: float
    weight_decay: float
    seed: int


@pytest.fixture(autouse=True)
def _as_a_program():
    """Optax raises floats to whole powers, which our tests' strict types forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_traced_rates_build_what_the_trainer_builds():
    config = OptimizerConfig(
        rule="adamw",
        learning_rate=0.03,
        warmup_steps=2,
        final_fraction=0.01,
        weight_decay=0.1,
        clip_norm=1.0,
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

    ours = jax.jit(lambda rate, decay: moved(images.optimizer(config, rate, decay, 8)))(
        0.03, 0.1
    )
    for key, value in moved(theirs).items():
        np.testing.assert_allclose(ours[key], value, rtol=1e-5, err_msg=key)


def test_a_lane_is_its_seed_and_rate():
    model = vit.get("digits", d_model=8, hidden=16, layers=1, heads=2, patch=4)
    train, test = (load("digits", split=split) for split in ("train", "test"))
    reader = images.Reader(train, batch=16, every=5)
    rule = OptimizerConfig(rule="momentum", warmup_steps=2)
    compiled = images.program(
        model, lambda lane: images.optimizer(rule, lane.rate, lane.weight_decay, 20)
    )
    lanes = [Lane(0.1, 0.0, 0), Lane(0.1, 0.0, 1), Lane(0.01, 0.0, 0)]
    found = images.run(model, compiled, lanes, reader, test, 20)
    again = images.run(model, compiled, lanes[:1], reader, test, 20)
    np.testing.assert_array_equal(again.held[0], found.held[0])
    assert len({*found.held[:, -1].tolist()}) == 3
    assert compiled.advance._cache_size() == 1
    # The held-out loss is that of every image once.
    params, other, same = (compiled.begin(lane)[0] for lane in lanes)
    kernels = [p["embed"]["kernel"][...] for p in (params, other, same)]
    assert (kernels[0] == kernels[2]).all() and (kernels[0] != kernels[1]).any()
    whole = [test[i] for i in range(len(test))]
    labels = jnp.array([row["label"] for row in whole])
    pixels = jnp.stack([row["image"] for row in whole])
    both = jax.jit(images.losses, static_argnums=0)
    entropy, hits = both(model, params, pixels, labels)
    sums = np.zeros(2)
    for batch in reader.held(test):
        part = images.score(
            model, params, batch["image"], batch["label"], batch["mask"]
        )
        sums += np.array(part, float)
    np.testing.assert_allclose(sums, [entropy.sum(), hits.sum()], rtol=1e-5)
