"""Levels of a trained model come, go, divide and rest, and it stays the same then."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from hope_jax.core import config as config_lib
from hope_jax.models import convert, lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.config import ModelConfig
from hope_jax.models.learning import Learning
from tests.models import small

CONFIG = dataclasses.replace(
    small.HOPE,
    layers=1,
    mixer="attention",
    cms=dataclasses.replace(small.HOPE.cms, rates="generated", hidden=6),
)
LEVEL = CMSLevel(period=12, rate=0.5)


def trained():
    """Rates and weights away from where a new model has them."""
    graphdef, params = small.built(CONFIG)
    rates = np.float32([0.3, -0.2, 0.1])
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: rates if "rates" in str(path) else leaf, params
    )


def read(config, params, **flags):
    return np.asarray(small.reading(config, **flags)(params, TOKENS, None)[0])


TOKENS = small.some_tokens(length=17)


def fast_and_slow():
    return dict(faster=CMSLevel(period=8, rate=0.4), slower=CMSLevel(period=16))


CHANGES = {
    "added": lambda c, p: convert.add_level(c, p, LEVEL, jax.random.key(5)),
    "split": lambda c, p: convert.split_level(c, p, 1, **fast_and_slow()),
    "removed": lambda c, p: convert.remove_level(
        *convert.add_level(c, p, LEVEL, jax.random.key(5)), 2
    ),
    "frozen": lambda c, p: convert.freeze_level(c, p, 1),
    "all frozen": lambda c, p: functools.reduce(
        lambda made, i: convert.freeze_level(*made, i), range(3), (c, p)
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_says_what_it_said(name):
    params = trained()
    config, changed = CHANGES[name](CONFIG, params)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)  # noqa: E731
    assert shapes(changed) == shapes(lm.abstract(config))
    assert config_lib.from_json(ModelConfig, config_lib.to_json(config)) == config
    before = read(CONFIG, params, learn=False)
    np.testing.assert_allclose(read(config, changed, learn=False), before, atol=1e-6)


INDEPENDENT = dataclasses.replace(
    CONFIG,
    cms=dataclasses.replace(CONFIG.cms, order="independent", mixing="learned"),
)


@pytest.mark.parametrize("name", ["added", "split", "removed", "frozen"])
def test_levels_with_weights_of_their_own_keep_them(name):
    """Added, split or removed, the others weigh what they weighed."""
    _, params = small.built(INDEPENDENT)
    shares = np.float32([[0.3, -0.2, 0.1]])
    params = jax.tree_util.tree_map_with_path(
        lambda path, w: shares if "shares" in str(path) else w, params
    )
    config, changed = CHANGES[name](INDEPENDENT, params)
    before = read(INDEPENDENT, params, learn=False)
    np.testing.assert_allclose(read(config, changed, learn=False), before, atol=1e-6)
    now = 1 / len(config.cms.levels) + np.asarray(changed["blocks"]["mix"]["shares"])
    weights = np.ravel(1 / 3 + shares).tolist()
    new = {"added": (2, 1 / 4), "split": (1, 1 / 4)}
    if name in new:
        weights.insert(*new[name])
    np.testing.assert_allclose(now, [weights], atol=1e-6)


@pytest.mark.parametrize("mixing", ["learned", "gated", "routed"])
def test_copies_say_what_each_says_by_whatever_weights(mixing):
    """At rest bit for bit, and back; not back once their weights have learned."""
    one = dataclasses.replace(CONFIG, cms=CMSConfig(hidden=6))
    _, params = small.built(one)
    levels = [CMSLevel(period=p, rate=0.0) for p in (4, 8, 16)]
    config, copied = convert.copy_levels(one, params, levels, mixing=mixing)
    np.testing.assert_array_equal(read(config, copied), read(one, params))
    back = convert.unstack_levels(config, copied)
    assert back[0] == one
    jax.tree.map(np.testing.assert_array_equal, back[1], params)
    learned = jax.tree_util.tree_map_with_path(
        lambda path, w: w + 0.5 if "'mix'" in str(path) else w, copied
    )
    if mixing == "learned":
        with pytest.raises(ValueError, match=r"weights of \[2.5\] together"):
            convert.unstack_levels(config, learned)
    else:
        np.testing.assert_array_equal(read(config, learned), read(one, params))


def test_an_added_level_adds_what_it_learns():
    """Nothing before its first move; the others move as they did."""
    params = trained()
    config, changed = CHANGES["added"](CONFIG, params)
    assert [level.period for level in config.cms.levels] == [4, 8, 12, 128]
    before, after = read(CONFIG, params), read(config, changed)
    np.testing.assert_allclose(after[:, :12], before[:, :12], atol=1e-5)
    assert np.abs(after - before)[:, 12:].max() > 1e-4


def test_a_level_that_is_removed_again_was_never_there():
    params = trained()
    config, changed = CHANGES["removed"](CONFIG, params)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, changed, params)


def test_a_frozen_level_is_one_that_does_not_learn():
    params = trained()
    config, changed = CHANGES["frozen"](CONFIG, params)
    off = read(CONFIG, params, learn=Learning(levels=(True, False, True)))
    np.testing.assert_allclose(read(config, changed), off, atol=1e-5)
    assert np.abs(off - read(CONFIG, params)).max() > 1e-4


def test_what_cannot_be_done_is_said():
    params, key = trained(), jax.random.key(0)
    with pytest.raises(ValueError, match="level 1 adds something in 1 of its 1 output"):
        convert.remove_level(CONFIG, params, 1)
    config, _ = convert.remove_level(CONFIG, params, 1, forget=True)
    assert [level.period for level in config.cms.levels] == [4, 128]
    with pytest.raises(ValueError, match=r"index must be of config.cms.levels, 0..2"):
        convert.freeze_level(CONFIG, params, 3)
    with pytest.raises(ValueError, match="levels must be listed from fast to slow"):
        convert.split_level(CONFIG, params, 0, LEVEL, LEVEL)
    for mixing in ("mean", "gated", "routed"):
        cms = dataclasses.replace(CONFIG.cms, order="independent", mixing=mixing)
        mean = dataclasses.replace(CONFIG, cms=cms)
        with pytest.raises(ValueError, match=f"'independent' with mixing='{mixing}'"):
            convert.add_level(mean, params, LEVEL, key)
    one = dataclasses.replace(CONFIG, cms=CMSConfig(hidden=6))
    with pytest.raises(ValueError, match="levels has one level"):
        convert.remove_level(one, params, 0)
