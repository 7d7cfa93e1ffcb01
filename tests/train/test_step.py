"""The pure step: its loss, its update, and the same on one device or four."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies

from hope_jax import optim
from hope_jax.models import lm
from hope_jax.models.capture import dense_kernels
from hope_jax.optim.rules.dgd import DGD
from hope_jax.optim.rules.ggd import GGD
from hope_jax.optim.rules.m3 import M3
from hope_jax.train import sharding
from hope_jax.train import state as state_lib
from hope_jax.train import step as step_lib
from hope_jax.train.config import OptimizerConfig
from tests.models import small
from tests.train import tiny

VOCAB = 5


def apply_fn(graphdef, params, tokens, state, after=None):
    """A bigram model with a context: enough to have gradients in two leaves."""
    assert graphdef == "static" and state is None
    logits = params["table"][tokens] + jnp.tanh(params["bias"])
    if after is None:
        return logits, {"read": tokens}
    return losses(logits, tokens, after), {"read": tokens}


def losses(logits, tokens, after):
    targets = jnp.concatenate([tokens[:, 1:], after[:, None]], axis=1)
    return lm.next_token_loss(logits, targets)


@pytest.fixture
def params(key):
    return {
        "table": jax.random.normal(key, (VOCAB, VOCAB)),
        "bias": jnp.zeros((1, 1, VOCAB)),
    }


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, VOCAB, (8, 7)).astype(np.int32)


def test_loss_by_hand():
    logits = jnp.log(jnp.array([[[0.25, 0.75], [0.5, 0.5]]]))
    said = lambda *given, after: (losses(logits, given[2], after), None)  # noqa: E731
    evaluate = step_lib.make_evaluation("static", said)
    loss = evaluate({}, jnp.array([[0, 1, 0]]))
    np.testing.assert_allclose(loss, -(np.log(0.75) + np.log(0.5)) / 2, rtol=1e-6)
    assert loss.dtype == jnp.float32


def test_step_is_gradient_descent_on_the_loss(params, tokens, key):
    tx = optax.sgd(0.3)
    step = step_lib.make_step("static", apply_fn, tx)
    state = state_lib.create(params, tx, key)
    after, metrics = jax.jit(step)(state, tokens)

    def loss(p):
        logits, _ = apply_fn("static", p, tokens[:, :-1], None)
        picked = jnp.take_along_axis(
            jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1
        )
        return -picked.mean()

    value, gradient = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(
        metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["update_norm"], 0.3 * metrics["grad_norm"], rtol=1e-4
    )
    for name in params:
        np.testing.assert_allclose(
            after.params[name], params[name] - 0.3 * gradient[name], atol=1e-6
        )
    assert metrics["tokens"] == 8 * 6
    assert after.step == 1 and state.step == 0


def run(devices, params, tokens, key, steps=5, accumulate=1):
    mesh = sharding.make_mesh(devices)
    tx, traces = optax.adam(0.1), []

    def counted(*arguments, after):
        traces.append(arguments)
        return apply_fn(*arguments, after)

    step = step_lib.make_step("static", counted, tx, mesh=mesh, accumulate=accumulate)
    step = sharding.jit_step(step, mesh)
    params, key = jax.tree.map(jnp.copy, (params, key))  # the step donates them
    with jax.numpy_dtype_promotion("standard"):  # optax raises to an integer power
        state = sharding.replicate(state_lib.create(params, tx, key), mesh)
        losses = []
        for i in range(steps):
            batch = sharding.shard_batch(np.roll(tokens, i, axis=0), mesh)
            before = state
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    assert len(traces) == 1
    assert jax.tree.leaves(before.params)[0].is_deleted()
    return state, losses, batch


@pytest.mark.parametrize(("devices", "accumulate"), [(4, 1), (1, 4), (2, 2)])
def test_shared_rows_and_rows_in_turn_equal_one_batch(
    params, tokens, key, devices, accumulate
):
    one, losses_one, _ = run(jax.devices()[:1], params, tokens, key)
    some, losses, batch = run(
        jax.devices()[:devices], params, tokens, key, accumulate=accumulate
    )
    assert len(batch.sharding.device_set) == devices
    assert batch.addressable_shards[0].data.shape == (8 // devices, 7)
    np.testing.assert_allclose(losses_one, losses, rtol=1e-5)
    for a, b in zip(
        jax.tree.leaves(one.level), jax.tree.leaves(some.level), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert jax.tree.leaves(some.params)[0].sharding.is_fully_replicated


PACKED = step_lib.Packed(
    tokens=np.array([[4, 1, 2, 0, 4, 3, 1, 2, 4]] * 4, np.int32),
    document=np.array(
        [[0, 0, 0, -1, 1, 1, 1, 1, 2], [5] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]],
        np.int32,
    ),
)


def test_where_documents_begin_and_what_is_predicted():
    begins = step_lib.begins(jnp.asarray(PACKED.document), 4)
    assert begins.tolist() == [[False, True], [False] * 2, [False, True], [False] * 2]
    weight = np.asarray(step_lib.weighed(PACKED).weight)
    said = [1, 1, 0, 0, 1, 1, 1, 0], [1] * 8, [1] * 3 + [0] + [1] * 4, [1] * 7 + [0]
    np.testing.assert_array_equal(weight > 0, np.array(said) > 0)
    np.testing.assert_allclose(weight.mean(), 1.0, rtol=1e-6)


def test_packed_rows_train_as_their_documents_do_one_by_one():
    """On one device, and in turn on two; their rows predict different numbers of
    tokens."""
    config = dataclasses.replace(small.HOPE_ATTENTION, layers=1)
    graphdef, params = small.built(config)
    tx = optax.sgd(0.5)

    def by_hand(params):
        losses = []
        for row, owners in zip(PACKED.tokens, PACKED.document, strict=True):
            for document in set(owners.tolist()) - {-1}:
                (places,) = np.nonzero(owners == document)
                if len(places) > 1:
                    ids = jnp.asarray(row[places])[None]
                    logits, _ = lm.apply(graphdef, params, ids[:, :-1])
                    losses.append(lm.next_token_loss(logits, ids[:, 1:]).ravel())
        losses = jnp.concatenate(losses)
        return losses.mean(), losses.size

    (loss, count), gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params)
    for devices, accumulate in ((1, 1), (2, 2)):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        step = step_lib.make_step(
            graphdef, lm.apply, tx, mesh=mesh, stretch=4, accumulate=accumulate
        )
        start = jax.tree.map(jnp.copy, params)  # the step donates them
        state = sharding.replicate(state_lib.create(start, tx, jax.random.key(3)), mesh)
        batch = sharding.shard_batch(PACKED, mesh)
        after, metrics = sharding.jit_step(step, mesh)(state, batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        assert metrics["tokens"] == count
        for new, old, g in zip(
            *map(jax.tree.leaves, (after.params, params, gradient)), strict=True
        ):
            np.testing.assert_allclose(new, old - 0.5 * g, atol=2e-5)
    evaluate = sharding.jit_evaluation(
        step_lib.make_evaluation(graphdef, lm.apply, 4), mesh
    )
    np.testing.assert_allclose(evaluate(params, batch), loss, rtol=1e-5)


def looped(program: str) -> set[str]:
    """The computations of a compiled program that a loop runs again and again."""
    calls, current, inside = {}, "", set()
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = head[1]
            calls[current] = set()
        named = re.findall(r"(body|condition|to_apply|calls)=%?([\w.\-]+)", line)
        calls.get(current, set()).update(name for _, name in named)
        inside |= {name for kind, name in named if kind in ("body", "condition")}
        branches = re.search(r"branch_computations=\{([^}]*)\}", line)
        if branches:
            calls[current] |= set(re.findall(r"[\w.\-]+", branches[1]))
    grown = None
    while grown != inside:
        grown, inside = inside, inside.union(*(calls.get(name, ()) for name in inside))
    return inside


def collectives(program: str) -> dict[str, list[str]]:
    """Where a compiled program has its devices wait for each other, by computation."""
    found, current = {}, ""
    for line in program.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = head[1]
        kind = re.search(r" (all-\w+|reduce-scatter|collective-\w+)(-start)?\(", line)
        if kind:
            found.setdefault(current, []).append(kind[1])
    return found


def test_devices_wait_for_each_other_once_a_step():
    """And not at every chunk of tokens, in every layer."""
    graphdef, params = small.built(small.HOPE)  # of two layers, which are a loop too
    mesh, tx = sharding.make_mesh(), optax.sgd(0.1)
    tokens = jnp.zeros((4, 17), jnp.int32)
    state = state_lib.create(params, tx, jax.random.key(0))

    def program(mesh_of_step):
        apply = functools.partial(lm.apply, horizon=16)
        step = step_lib.make_step(graphdef, apply, tx, mesh=mesh_of_step)
        lowered = sharding.jit_step(step, mesh).lower(state, tokens)
        return lowered.compile().as_text()

    shared = program(mesh)
    assert set(sum(collectives(shared).values(), [])) == {"all-reduce"}
    assert not looped(shared) & collectives(shared).keys()
    left_to_the_compiler = program(None)
    assert looped(left_to_the_compiler) & collectives(left_to_the_compiler).keys()


def test_tpus_wait_for_each_other_once_a_step(monkeypatch):
    """Compiled ahead of time, where the compiler for TPUs is installed."""
    pytest.importorskip("libtpu", reason="pip install libtpu compiles for TPUs")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-8")
    found = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    mesh = sharding.make_mesh(found.devices)
    graphdef, params = lm.abstract_model(small.HOPE)
    tx = optax.sgd(0.1)
    step = step_lib.make_step(
        graphdef, functools.partial(lm.apply, horizon=16), tx, mesh=mesh
    )
    state = jax.eval_shape(lambda p: state_lib.create(p, tx, jax.random.key(0)), params)
    tokens = jax.ShapeDtypeStruct((4, 17), jnp.int32)
    program = sharding.jit_step(step, mesh).lower(state, tokens).compile().as_text()
    assert collectives(program)
    assert not looped(program) & collectives(program).keys()


@pytest.mark.parametrize("rule", [DGD(), GGD()], ids=lambda rule: rule.kind)
def test_what_rules_take_of_rows_is_the_same_of_shared_rows_and_in_turn(rule):
    """Outer products of inputs, and slopes of another loss, are means as gradients."""
    graphdef, params = lm.build(tiny.MODEL, jax.random.key(0))
    config = OptimizerConfig(rule=rule, learning_rate=0.05, warmup_steps=0)
    layers = dense_kernels(graphdef, params, 16)
    periods = optim.one_clock(params)
    tokens = np.random.default_rng(0).integers(0, 257, (4, 17)).astype(np.int32)
    ends = []
    for devices, accumulate in ((1, 1), (2, 2)):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        tx = optim.build(config, total_steps=9, periods=periods, layers=layers)
        step = step_lib.make_step(
            graphdef,
            lm.apply,
            tx,
            functools.partial(optim.differentiation, config, layers),
            mesh,
            accumulate=accumulate,
        )
        start = jax.tree.map(jnp.copy, params)  # the step donates them
        state = sharding.replicate(state_lib.create(start, tx, jax.random.key(3)), mesh)
        state, _ = sharding.jit_step(step, mesh)(
            state, sharding.shard_batch(tokens, mesh)
        )
        ends.append(state.params)
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_devices_that_share_the_orthogonalisations_equal_one(tokens, key):
    """M3 on a mesh: five matrices for four devices, in the middle of a period too."""
    keys = jax.random.split(key, 6)
    params = {
        f"layer{i}": {"kernel": 0.3 * jax.random.normal(k, (VOCAB, VOCAB))}
        for i, k in enumerate(keys[1:])
    }
    params["token"] = {"embedding": jax.random.normal(keys[0], (VOCAB, VOCAB))}

    def deep(graphdef, params, tokens, state, after):
        x = params["token"]["embedding"][tokens]
        for i in range(5):
            x = x + x @ params[f"layer{i}"]["kernel"]
        return losses(x, tokens, after), state

    config = OptimizerConfig(
        rule=M3(periods=(1, 2)), learning_rate=0.05, warmup_steps=0
    )
    ends = []
    for devices, spread in ((1, False), (4, True)):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        tx = optim.build(
            config,
            total_steps=9,
            periods=optim.one_clock(params),
            mesh=mesh if spread else None,
        )
        step = step_lib.make_step("static", deep, tx)
        start = jax.tree.map(jnp.copy, params)  # the step donates them
        state = sharding.replicate(state_lib.create(start, tx, jax.random.key(3)), mesh)
        program = str(jax.make_jaxpr(step)(state, tokens))
        assert ("sharding_constraint" in program) == spread
        step = sharding.jit_step(step, mesh)
        for i in range(3):
            batch = sharding.shard_batch(np.roll(tokens, i, axis=0), mesh)
            state, _ = step(state, batch)
        ends.append(state.level)
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_parts_of_a_state_that_start_as_one_array(params, tokens, key):
    """They are donated as two."""

    def init(params):
        zero = jnp.zeros((), jnp.int32)
        return {"here": zero, "there": zero}

    tx = optax.chain(
        optax.GradientTransformation(init, lambda g, state, p: (g, state)),
        optax.scale(-0.1),
    )
    mesh = sharding.make_mesh(jax.devices()[:1])
    step = sharding.jit_step(step_lib.make_step("static", apply_fn, tx), mesh)
    state = sharding.replicate(state_lib.create(params, tx, key), mesh)
    state, _ = step(state, sharding.shard_batch(tokens, mesh))
    assert state.step == 1


def test_a_batch_the_devices_cannot_share(tokens):
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match=r"batch \(6\) .* 4 devices; .* are 4 and 8"):
        sharding.shard_batch(tokens[:6], mesh)
    two = sharding.make_mesh(jax.devices()[:2])
    sharding.check_batch(6, two)
    sharding.check_batch(6, two, parts=3)
    with pytest.raises(ValueError, match="accumulate=2; the nearest are 4 and 8"):
        sharding.check_batch(6, two, parts=2)


def test_evaluation_is_the_loss_of_the_step(params, tokens, key):
    mesh = sharding.make_mesh()
    evaluate = sharding.jit_evaluation(
        step_lib.make_evaluation("static", apply_fn), mesh
    )
    loss = evaluate(params, sharding.shard_batch(tokens, mesh))
    tx = optax.sgd(0.0)
    _, metrics = step_lib.make_step("static", apply_fn, tx)(
        state_lib.create(params, tx, key), jnp.asarray(tokens)
    )
    np.testing.assert_allclose(loss, metrics["loss"], rtol=1e-6)
