"""Steps of optimizers that need the inputs of matrices, captured in the step itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hope_jax import optim
from hope_jax.models import lm
from hope_jax.models.cms import CMSConfig, CMSLevel
from hope_jax.models.mixers.self_modifying import MLP, SelfModifyingConfig
from hope_jax.optim import rules
from hope_jax.optim.capture import dgd_gradients
from hope_jax.train import loop
from hope_jax.train import state as state_lib
from hope_jax.train import step as step_lib
from hope_jax.train.config import OptimizerConfig, RunConfig, TrainConfig
from tests.models import small
from tests.train import tiny

ETA, STEPS, SEQ = 0.05, 3, 16
DGD = OptimizerConfig(
    rule="dgd",
    learning_rate=ETA,
    warmup_steps=0,
    final_fraction=1.0,
    weight_decay=0.0,
    clip_norm=None,
)


def made(model, optimizer=DGD):
    """What `loop.train` makes of a config: the step, its state, and what groups it."""
    run = RunConfig(
        experiment="tiny",
        row="tiny",
        model=model,
        optimizer=optimizer,
        train=TrainConfig(steps=STEPS, seq_len=SEQ),
    )
    graphdef, params = lm.build(model, jax.random.key(1))
    groups = loop.groups(run, graphdef, params)
    tx = optim.build(optimizer, total_steps=STEPS, **groups._asdict())
    state = state_lib.create(params, tx, jax.random.key(2))
    differentiation = functools.partial(optim.differentiation, optimizer, groups.layers)
    step = step_lib.make_step(graphdef, lm.apply, tx, differentiation)
    return graphdef, groups, state, jax.jit(step)


def batches(vocab):
    shape = (STEPS, 2, SEQ + 1)
    return np.random.default_rng(0).integers(0, vocab, shape).astype(np.int32)


def flat(tree):
    return {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(tree)}


def test_training_with_dgd_is_what_its_gradients_say_by_hand():
    """Projections at every step; the MLP, whose period is three of them, by the mean of
    its gradients and of the outer products of its inputs; all else by Adam."""
    graphdef, groups, state, step = made(tiny.MODEL)
    assert set(jax.tree.leaves(groups.periods)) == {1, 3}

    def loss(params, tokens):
        logits, _ = lm.apply(graphdef, params, tokens[:, :-1], None)
        return lm.next_token_loss(logits, tokens[:, 1:]).mean()

    by_hand = jax.jit(functools.partial(dgd_gradients, loss, layers=groups.layers))
    adam = optax.scale_by_adam(b1=0.9, b2=0.95)
    chosen, period = flat(groups.layers), flat(groups.periods)
    expected = flat(state.params)
    seen = {name: [] for name in expected}
    moments = {name: adam.init(expected[name]) for name in expected if not chosen[name]}
    assert len(expected) - len(moments) == 5 and len(moments) > 3

    for number, tokens in enumerate(batches(tiny.MODEL.vocab), start=1):
        gradients, inputs = map(flat, by_hand(state.params, tokens))
        state, metrics = step(state, tokens)
        norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in gradients.values()))
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
        for name, w in expected.items():
            seen[name].append((gradients[name], inputs.get(name, 0.0)))
            if number % period[name]:
                continue
            g, gram = (np.mean(x, axis=0) for x in zip(*seen.pop(name), strict=True))
            seen[name] = []
            if chosen[name]:
                left = np.eye(gram.shape[-1]) + ETA * gram
                expected[name] = w - ETA * np.linalg.solve(left, gram @ w + g)
                continue
            with jax.numpy_dtype_promotion("standard"):
                move, moments[name] = adam.update(jnp.asarray(g), moments[name])
            expected[name] = w - ETA * move
        for name, leaf in flat(state.params).items():
            np.testing.assert_allclose(
                leaf, expected[name], rtol=1e-3, atol=1e-5, err_msg=name
            )


def test_training_with_ggd_of_squares_is_explicit_dgd():
    """Also on a slow clock, where slopes are reduced like gradients."""
    explicit = dataclasses.replace(DGD, rule=rules.DGD(explicit=True))
    squares = dataclasses.replace(DGD, rule="ggd")
    ends = []
    for optimizer in (explicit, squares):
        *_, state, step = made(tiny.MODEL, optimizer)
        for tokens in batches(tiny.MODEL.vocab):
            state, _ = step(state, tokens)
        ends.append(flat(state.params))
    for name, leaf in ends[0].items():
        np.testing.assert_allclose(
            leaf, ends[1][name], rtol=1e-3, atol=1e-5, err_msg=name
        )


def test_a_model_that_modifies_itself_trains_with_dgd():
    cms = CMSConfig(levels=(CMSLevel(period=2 * SEQ),), hidden=8)
    memory = SelfModifyingConfig(
        memory=dataclasses.replace(MLP, chunk=SEQ, expansion=2), projection_chunk=SEQ
    )
    model = dataclasses.replace(small.HOPE, layers=1, mixer=memory, cms=cms)
    _, groups, state, step = made(model)
    before = flat(state.params)
    for tokens in batches(model.vocab)[:2]:
        state, metrics = step(state, tokens)
    assert all(np.isfinite(value) for value in metrics.values())
    moved = {
        name: float(jnp.max(jnp.abs(leaf - before[name])))
        for name, leaf in flat(state.params).items()
    }
    chosen = flat(groups.layers)
    assert all(np.isfinite(change) for change in moved.values())
    assert all(moved[name] > 0 for name in chosen if chosen[name])
    period = flat(groups.periods)
    assert {period[name] for name in chosen if chosen[name]} == {1, 2}


def test_inputs_are_captured_only_where_they_are_asked_for():
    run = tiny.rows("smoke")["tiny"]
    graphdef, params = lm.abstract_model(run.model)
    for name in optim.RULES:
        config = dataclasses.replace(run.optimizer, rule=name, weight_decay=0.0)
        asked = loop.groups(
            dataclasses.replace(run, optimizer=config), graphdef, params
        )
        assert (asked.layers is None) == (config.rule.inputs is None)


def test_a_run_says_which_parameters_move_by_what():
    run = tiny.rows("smoke")["tiny"]
    table = loop.describe(dataclasses.replace(run, optimizer=DGD)).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[2:]]
    assert ["matrices", "dgd", "every 3 steps", "768"] in cells
    assert ["embeddings", "adamw", "every step", "4.11K"] in cells
