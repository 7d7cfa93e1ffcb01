"""What telemetry says, held to states, gradients and gates that are found otherwise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.evaluate import telemetry
from hope_jax.memory.compose import build_architecture
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.layers import unit
from hope_jax.models.learning import Learning
from hope_jax.models.mixers import MIXERS
from hope_jax.models.mixers.in_place_ttt import InPlaceTTTConfig
from tests import compare
from tests.models import small

CONFIG = dataclasses.replace(small.HOPE, layers=1)
PIECES, PIECE = 4, 4
TEXT = small.some_tokens(rows=1, length=PIECES * PIECE + 2)[0]
close = compare.within_size(1e-4)


@functools.cache
def followed(learn=True):
    return telemetry.follow(CONFIG, small.built(CONFIG)[1], TEXT, recent=3, learn=learn)


@functools.cache
def read(count, learn=True):
    """Logits and the state after so many tokens whose labels are known."""
    graphdef, params = small.built(CONFIG)
    run = jax.jit(functools.partial(lm.apply, graphdef, aligned=True, learn=learn))
    at = slice(PIECE * PIECES)
    tokens, labels = TEXT[None, at], TEXT[None, 1:][:, at]
    return run(params, tokens[:, :count], labels=labels[:, :count])


def norm(*trees):
    leaves = jax.tree.leaves(trees)
    return np.sqrt(sum(float(jnp.sum(leaf * leaf)) for leaf in leaves))


def minus(a, b):
    return jax.tree.map(jnp.subtract, a, b)


def test_it_is_the_reading_of_the_model():
    line = followed()
    logits, state = read(PIECE * PIECES)
    labels = jnp.asarray(TEXT[None, 1 : 1 + PIECE * PIECES])
    losses = lm.next_token_loss(logits, labels).reshape(PIECES, PIECE)
    close(line.loss, losses.mean(1))
    assert line.position.tolist() == [4, 8, 12, 16]
    start = small.start(CONFIG, 1)
    for level, now, then in zip(
        line.levels, state.blocks.fast, start.blocks.fast, strict=True
    ):
        close(line.columns()[f"{level.name} distance"][-1], norm(minus(now, then)))
    (main,) = (m for m in line.memories if m.name == "main memory")
    now, then = (s.blocks.mixer.main.weights for s in (state, start))
    for head in range(2):
        of = lambda tree, head=head: {n: w[0, 0, head] for n, w in tree.items()}  # noqa: E731
        close(main.norm[-1, 0, head], norm(of(now)))
        close(main.distance[-1, 0, head], norm(minus(of(now), of(then))))
    (key,) = (m for m in line.memories if m.name == "key memory")
    now, then = (s.blocks.mixer.projection.weights for s in (state, start))
    moved = [w[0, 0, 1, 0] - then[n][0, 0, 1, 0] for n, w in now.items()]
    close(key.distance[-1, 0, 1], norm(moved))


def test_levels_move_where_their_clocks_say():
    one, two, three = followed().levels
    assert (one.name, two.name, three.period) == ("CMS 1", "CMS 2", 128)
    assert one.moves.tolist() == [1, 2, 3, 4] and two.moves.tolist() == [0, 1, 1, 2]
    assert three.moves.tolist() == [0] * 4 and not three.move.any()
    assert (two.move[:, 0] > 0).tolist() == [False, True, False, True]
    before, after = (read(count)[1].blocks.fast[1] for count in (12, 16))
    close(two.move[3, 0], norm(minus(after, before)))


def test_gradients_are_those_of_the_text_read_so_far():
    """Of the first chunk, in which weights are the parameters: by `jax.grad`."""
    graphdef, params = small.built(CONFIG)
    still = Learning(levels=(False,) * 3)

    def loss(params):
        text = TEXT[None, : PIECE + 1]
        run = functools.partial(lm.apply, aligned=True, learn=still, horizon=PIECE)
        losses, _ = run(graphdef, params, text[:, :-1], after=text[:, -1])
        return jnp.sum(losses)

    gradient = jax.jit(jax.grad(loss))(params)
    for i, level in enumerate(followed().levels):
        of_level = gradient["blocks"]["levels"][i]["mlp"]
        close(level.gradient[0, 0], norm(of_level) / level.period)


def test_gates_and_recall_by_hand():
    """At the start every memory says back what it is given."""
    line = followed()
    graphdef, params = small.built(CONFIG)
    blocks = nnx.merge(graphdef, params).blocks
    graph, stacked = nnx.split(blocks, nnx.Param)
    block = nnx.merge(graph, jax.tree.map(lambda a: a[0], stacked))
    model, mixer = nnx.merge(graphdef, params), block.mixer
    x = block.norm(model.embedded(jnp.asarray(TEXT[None, :PIECE])))
    heads = lambda a: a.reshape(PIECE, 2, 4)  # noqa: E731
    gates = heads(mixer.gates(x))
    opened = lambda w, b: jax.nn.sigmoid(  # noqa: E731
        jnp.einsum("thk,hk->th", gates, w[...]) + b[...][None]
    )
    alpha = opened(mixer.read_alpha, mixer.bias_alpha)
    eta = opened(mixer.read_eta, mixer.bias_eta)
    share = jax.nn.sigmoid(mixer.shares[...])  # [H, P]
    main, key = line.memories[-1], line.memories[0]
    assert (key.name, main.name) == ("key memory", "main memory")
    close(main.alpha[0, 0], alpha.mean(0))
    close(main.eta[0, 0], eta.mean(0))
    close(key.eta[0, 0], eta.mean(0) * share[:, 0])
    close(main.half_life[0, 0], np.log(0.5) / np.log(alpha).mean(0))

    k = unit(heads(jax.nn.silu(mixer.conv_k(mixer.k(x), mixer.conv_k.tail(1))[0])))
    v = heads(jax.nn.silu(mixer.conv_v(mixer.v(x), mixer.conv_v.tail(1))[0]))
    weights = read(PIECE)[1].blocks.mixer.main.weights
    begun = small.start(CONFIG, 1).blocks.mixer.main.weights
    apply = build_architecture(CONFIG.pattern[0].memory, 4).apply
    for found, at in ((main.recall, weights), (main.before, begun)):
        for head in range(2):
            said = apply({n: w[0, 0, head] for n, w in at.items()}, k[-3:, head])
            cosine = jnp.sum(unit(said) * unit(v[-3:, head]), axis=-1)
            close(found[0, 0, head], cosine.mean())
    assert (main.recall[0] > main.before[0] + 0.1).all()


def test_nothing_moves_of_what_does_not_learn():
    line = followed(learn=False)
    for level in line.levels:
        assert not (level.moved.any() or level.move.any() or level.distance.any())
    for memory in line.memories:
        assert not memory.distance.any()
        np.testing.assert_array_equal(memory.recall, memory.before)


def test_lines_are_of_their_own_memories_whatever_stands_before_them():
    """Weights that move and are no memory of keys and values are not followed."""
    mixers = InPlaceTTTConfig(chunk=2), MIXERS.get("delta_net")
    config = dataclasses.replace(
        small.HOPE_ATTENTION,
        mixer=mixers,
        cms=CMSConfig(levels=(CMSLevel(period=PIECE, rate=0.5),), hidden=6),
    )
    graphdef, params = small.built(config)
    line = telemetry.follow(config, params, TEXT[: PIECE + 1])
    (memory,), (level,) = line.memories, line.levels
    assert memory.name.startswith("delta_net 2: ") and memory.layers == (1,)
    labels = TEXT[None, 1 : PIECE + 1]
    _, state = jax.jit(lm.apply, static_argnums=0)(
        graphdef, params, TEXT[None, :PIECE], labels=labels
    )
    start = small.start(config, 1)
    now, then = (s.blocks.mixer[1].memory.weights for s in (state, start))
    close(np.sqrt(np.square(memory.distance).sum()), norm(minus(now, then)))
    now, then = (s.blocks.fast[0] for s in (state, start))
    close(np.sqrt(np.square(level.distance).sum()), norm(minus(now, then)))


def test_one_program_reads_any_text():
    followed()
    count = telemetry._piece._cache_size()
    line = telemetry.follow(CONFIG, small.built(CONFIG)[1], TEXT[3:12], recent=3)
    assert len(line.position) == 2 and telemetry._piece._cache_size() == count


def test_the_table_has_a_line_a_piece():
    rows = followed().rows()
    assert [row["position"] for row in rows] == [4, 8, 12, 16]
    assert rows[3]["CMS 1 moves"] == 4
    main = followed().memories[-1]
    close(rows[3]["main memory norm"], np.sqrt(np.square(main.norm[3]).sum()))
    shown = followed()._repr_html_()
    assert (
        "4 tokens" in shown and "16 tokens" in shown and ">main memory recall<" in shown
    )
    assert f">{rows[3]['loss']:.4g}<" in shown
    close(rows[3]["main memory half_life"], np.exp(np.log(main.half_life[3]).mean()))


def test_what_cannot_be_followed_is_refused():
    params = small.built(CONFIG)[1]
    with pytest.raises(
        ValueError, match=r"tokens must be \[T\] with T above 4.*\(4,\)"
    ):
        telemetry.follow(CONFIG, params, TEXT[:4])
    with pytest.raises(ValueError, match="recent must be at least 1, got 0"):
        telemetry.follow(CONFIG, params, TEXT, recent=0)
    graphdef, _ = small.built(CONFIG)
    state = small.start(CONFIG, 1)
    with pytest.raises(ValueError, match=r"tokens must be \[B, 4\], a base chunk"):
        lm.watch(graphdef, params, TEXT[None, :3], TEXT[None, 1:4], state)
    amid = state._replace(position=state.position + 2)
    with pytest.raises(ValueError, match=r"state must stand at a multiple of 4.*\[2\]"):
        lm.watch(graphdef, params, TEXT[None, :4], TEXT[None, 1:5], amid)


def test_what_was_recalled_before_a_piece_is_of_the_memory_before_it():
    """And not of its start: that may be anything."""
    line, (_, params) = followed(), small.built(CONFIG)
    state, start = read(PIECE)[1], small.start(CONFIG, 1)
    text = TEXT[None, PIECE : 2 * PIECE + 1]
    for begun in (start, state):
        found, _ = telemetry._piece(CONFIG, 3, True, params, text, state, begun)
        for own, memory in zip(found.memories, line.memories, strict=True):
            close(own["before"], memory.before[1])
            close(own["recall"], memory.recall[1])
    assert (
        np.abs(line.memories[-1].before[1] - line.memories[-1].before[0]).min() > 0.05
    )


def test_gates_of_rows_are_those_that_a_text_is_read_with():
    """Token for token; a row that is no whole chunk has as many as it has tokens."""
    config = dataclasses.replace(CONFIG, cms=CMSConfig(hidden=8))
    params = small.built(config)[1]
    rows = small.some_tokens(rows=2, length=telemetry.PIECE + 1)
    found = telemetry.gates(config, params, rows)
    for row, text in enumerate(rows):
        line = telemetry.follow(config, params, text)
        assert list(found) == [memory.name for memory in line.memories]
        for memory in line.memories:
            eta, alpha = found[memory.name]
            assert alpha.shape == (2, 1, 2, telemetry.PIECE + 1)
            close(eta[row, :, :, :-1].mean(-1), memory.eta[0])
            close(alpha[row, :, :, :-1].mean(-1), memory.alpha[0])
    few = telemetry.gates(config, params, rows[:, :3])
    assert few["main memory"].eta.shape == (2, 1, 2, 3)
    close(few["main memory"].eta, found["main memory"].eta[..., :3])


def test_gates_that_change_between_moves_are_for_follow():
    with pytest.raises(ValueError, match="has CMS levels that move .* use follow"):
        telemetry.gates(CONFIG, small.built(CONFIG)[1], TEXT[None])


def test_gates_of_what_is_no_rows():
    with pytest.raises(ValueError, match=r"tokens must be \[B, T\], .* got \(18,\)"):
        telemetry.gates(CONFIG, small.built(CONFIG)[1], TEXT)
