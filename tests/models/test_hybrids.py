"""Layers that repeat a pattern of mixers: the same promises, in one model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hope_jax
from hope_jax.models import cms, convert, lm, systems
from hope_jax.models.block import Block, BlockState, Group
from hope_jax.models.config import ModelConfig
from hope_jax.models.mixers.attention import SlidingWindowConfig
from hope_jax.models.mixers.memory import NamedConfig
from tests.models import small

TWO_LAYERS = dataclasses.replace(small.HYBRID, layers=2)


@pytest.mark.slow
def test_reads_no_future_and_no_other_row():
    hope_jax.check_causality(
        lambda t: small.read(TWO_LAYERS, t)[0],
        jnp.asarray(small.some_tokens()),
        vocab=small.VOCAB,
        positions=[0, 3, 4, 8, 20],
    )


@pytest.mark.slow
def test_streamed_in_pieces_of_1_3_and_7_through_bytes():
    tokens = small.some_tokens()
    whole, end = small.read(TWO_LAYERS, tokens)
    state = small.start(TWO_LAYERS)
    logits, start = [], 0
    for piece in (1, 7, 3, 7, 3):
        part = tokens[:, start : start + piece]
        y, state = small.read(TWO_LAYERS, part, state, aligned=False)
        logits.append(y)
        start += piece
        leaves, structure = jax.tree.flatten(state)
        stored = [(np.asarray(x).tobytes(), x.dtype, x.shape) for x in leaves]
        leaves = [np.frombuffer(b, d).reshape(s) for b, d, s in stored]
        state = jax.tree.unflatten(structure, leaves)
    assert start == small.LENGTH
    np.testing.assert_allclose(np.concatenate(logits, 1), whole, atol=1e-5)
    for a, b in zip(
        jax.tree.leaves((state.blocks, state.levels)),
        jax.tree.leaves((end.blocks, end.levels)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_one_step_of_training_moves_every_parameter_downhill():
    graphdef, params = small.built(TWO_LAYERS)
    tokens = jnp.asarray(small.some_tokens(length=17))

    @jax.jit
    def loss_and_gradient(params):
        def loss(params):
            logits, _ = lm.apply(graphdef, params, tokens[:, :-1], labels=tokens[:, 1:])
            return lm.next_token_loss(logits, tokens[:, 1:]).mean()

        return jax.value_and_grad(loss)(params)

    before, gradient = loss_and_gradient(params)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(g).all() and np.abs(g).max() > 0, name
    down = jax.jit(lambda *both: jax.tree.map(lambda w, g: w - 0.05 * g, *both))
    after, _ = loss_and_gradient(down(params, gradient))
    assert after < before - 1e-3


@pytest.mark.slow
def test_layers_repeat_the_pattern_in_its_order():
    """Four layers, read without learning, against the four blocks one by one."""
    config = small.HYBRID
    graphdef, params = small.built(config)
    tokens = small.some_tokens(length=8)
    whole, _ = small.read(config, tokens, learn=False)

    @jax.jit
    def one_by_one(params):
        model = nnx.merge(graphdef, params)
        assert isinstance(model.blocks, Group)
        x = model.embed(tokens) * config.d_model**0.5
        for layer in range(4):
            weights = params["blocks"]["parts"][layer % 2]
            weights = jax.tree.map(lambda w, at=layer // 2: w[at], weights)
            mixer = config.pattern[layer % 2]
            block = nnx.graphdef(Block(config, mixer, rngs=nnx.Rngs(0)))
            x, state = nnx.merge(block, weights)(x, learn=False)
            assert isinstance(state, BlockState)
        return model.embed.attend(model.norm(x))

    np.testing.assert_allclose(one_by_one(params), whole, atol=1e-5)


def test_the_order_of_a_pattern_matters():
    turned = dataclasses.replace(TWO_LAYERS, mixer=TWO_LAYERS.mixer[::-1])
    assert turned.kinds == "sliding_window,titans"
    assert lm.count_parameters(turned) == lm.count_parameters(TWO_LAYERS)
    _, params = small.built(TWO_LAYERS)
    parts = params["blocks"]["parts"]
    flipped = nnx.clone(params)
    flipped["blocks"]["parts"][0], flipped["blocks"]["parts"][1] = parts[1], parts[0]
    tokens = small.some_tokens(length=8)
    first, _ = small.read(TWO_LAYERS, tokens, learn=False)
    second, _ = small.reading(turned, learn=False)(flipped, tokens, None)
    assert np.abs(first - second).max() > 1e-2


def test_a_window_is_all_that_sliding_attention_sees():
    config = dataclasses.replace(
        small.TRANSFORMER, mixer=SlidingWindowConfig(window=3), layers=1
    )
    tokens = small.some_tokens(length=8)
    read = lambda t: small.read(config, t)[0]  # noqa: E731
    changed = tokens.copy()
    changed[:, 0] = (tokens[:, 0] + 1) % small.VOCAB
    moved = np.abs(read(tokens) - read(changed)).max(axis=(0, 2)) > 0
    assert moved.tolist() == [True] * 3 + [False] * 5
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        SlidingWindowConfig(window=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(mixer="attention,self_modifying", layers=3),
            r"layers \(3\) must be a multiple of the 2 mixers of the pattern",
        ),
        (
            dict(mixer="attention,sliding_windw"),
            "got 'sliding_windw'. Did you mean 'sliding_window'?",
        ),
        (dict(mixer="attention,"), "mixer must be one of .* got ''"),
        (dict(mixer=()), "mixer must name at least one mixer"),
        (
            dict(mixer="self_modifying,sliding_window", d_model=12, heads=4),
            "d_model / heads must be even for the rotary positions of sliding_window",
        ),
    ],
)
def test_bad_patterns(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_boundaries_are_those_of_every_mixer_of_the_pattern():
    config = ModelConfig(mixer="sliding_window, self_modifying")
    assert config.mixer_chunk == config.mixer[1].projection_chunk == 64
    points = (NamedConfig(kind=kind, chunk=48) for kind in ("titans", "yaad"))
    both = ModelConfig(mixer=(*points, "self_modifying"), layers=3)
    assert (both.mixer_chunk, both.span) == (192, 192)
    assert ModelConfig(mixer="mamba2,sliding_window").span == 1  # exact: any cut
    between = dataclasses.replace(
        config, cms=cms.CMSConfig(levels=(cms.CMSLevel(period=96),))
    )
    assert (between.base_chunk, between.span, between.nests) == (96, 192, False)


@pytest.mark.parametrize(
    "mixer, shown",
    [
        ("delta_net,sliding_window", {"DeltaNet memory": 1, "sliding window": 0}),
        ("titans,self_modifying,yaad", {"main memory": 4, "Yaad memory": 4}),
        ("titans,attention,titans", {"Titans (LMM) memory": 4, "attention": 0}),
        ("tnt,titans_mac", {"TNT global memory": 256, "MAC memory": 16}),
    ],
)
def test_described_levels_are_those_of_every_mixer(mixer, shown):
    made = {"self_modifying": small.HOPE.mixer}
    made |= {kind: NamedConfig(kind=kind, chunk=4) for kind in ("titans", "yaad")}
    pattern = tuple(made.get(kind, kind) for kind in mixer.split(","))

    def model(pattern, layers):
        return dataclasses.replace(small.TRANSFORMER, mixer=pattern, layers=layers)

    config = model(pattern, 6)
    picture = systems.system(config, 64)
    assert sum(b.parameters for b in picture.boxes) == lm.count_parameters(config)
    clocks = {box.name: box.clock.period for box in picture.boxes}
    assert shown.items() <= clocks.items()
    for mixer in set(config.pattern):  # as many as in a model of these layers alone
        layers = 6 * config.pattern.count(mixer) // len(config.pattern)
        alone = systems.system(model(mixer, layers), 64)
        for part in mixer.parts:
            assert picture[part.name].parameters == alone[part.name].parameters


def test_mixers_of_one_kind_are_told_apart():
    """Two windows are two levels of the picture, each with its own parameters."""
    windows = (SlidingWindowConfig(window=3), SlidingWindowConfig(window=9))
    config = dataclasses.replace(small.TRANSFORMER, mixer=windows)
    picture = systems.system(config, 64)
    assert picture["sliding window"].clock == picture["sliding window 2"].clock
    assert sum(b.parameters for b in picture.boxes) == lm.count_parameters(config)


@pytest.mark.slow
def test_stacked_levels_keep_the_logits_of_a_hybrid():
    """Layers 0 to 3 keep their MLPs as levels 1, 0, 0, 1 of a chain of two."""
    config = dataclasses.replace(small.HYBRID, cms=cms.CMSConfig(hidden=12))
    _, params = small.built(config)
    tokens = small.some_tokens(length=12)
    trained, _ = small.read(config, tokens)
    levels = [cms.CMSLevel(period=p, rate=0.0) for p in (4, 8)]
    stacked, weights = convert.stack_levels(config, params, levels, [1, 0, 0, 1])
    got, _ = small.reading(stacked)(weights, tokens, None)
    np.testing.assert_array_equal(got, trained)
    for layer, mine in enumerate([1, 0, 0, 1]):
        part = weights["blocks"]["parts"][layer % 2]["levels"]
        alive = [
            np.abs(v["mlp"]["down"]["kernel"][...][layer // 2]).max()
            for v in (part[0], part[1])
        ]
        assert [a > 0 for a in alive] == [mine == 0, mine == 1]
