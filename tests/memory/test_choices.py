"""A choice is declared in one file, with what is so of it, and works everywhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.core.config import Kinds
from hope_jax.memory import architecture, bias, compose, retention, rule
from hope_jax.memory.compose import MemoryConfig
from hope_jax.memory.flow import Flow, FlowState, chain
from hope_jax.memory.gates import GateConfig
from hope_jax.memory.state import begin_memory, form
from hope_jax.models.mixers.memory import MemoryMixerConfig
from hope_jax.models.mixers.self_modifying import SelfModifyingConfig
from hope_jax.optim import generalised, slopes
from tests.kernels.test_select import assert_is_the_level, some_state, some_tokens

EXACT = dict(architecture="linear", gradient="exact", dgd="none", chunk=4)


def normalised(eta, x):
    return eta / (0.1 + jnp.vdot(x, x))


def least_mean_squares():
    def update(updates, state, params=None, *, context, inputs, **extra):
        del params, extra
        moved = {n: -normalised(context.eta, inputs[n]) * g for n, g in updates.items()}
        return moved, state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def log_cosh(output, value, threshold):
    return jnp.sum(threshold**2 * jnp.log(jnp.cosh((output - value) / threshold)))


def squared_decay():
    def update(updates, state, params, *, context, **extra):
        del extra
        lost = context.alpha**2 - 1.0
        return jax.tree.map(lambda u, m: u + lost * m, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: (), update)


def squashed(config, width, key_width, skip):
    return architecture.Architecture(
        init=lambda key: {"w": jnp.eye(width, key_width, dtype=jnp.float32)},
        forward=lambda multiply, x: jnp.tanh(multiply("w", x)),
    )


NEW = {
    "rule": rule.Rule(
        kind="lms",
        step=lambda config: least_mean_squares(),
        rate=normalised,
        linear=True,
        bounded=True,
        single_key=True,
    ),
    "bias": bias.Bias(kind="log_cosh", loss=log_cosh, options=("threshold",)),
    "retention": retention.Retention(
        kind="squared", make=lambda config: squared_decay()
    ),
    "architecture": architecture.FunctionClass(
        kind="squashed", make=squashed, first=lambda config: ("w",)
    ),
}
_PLACES = {
    "rule": (rule, "RULES"),
    "bias": (bias, "BIASES"),
    "retention": (retention, "RETENTIONS"),
    "architecture": (architecture, "ARCHITECTURES"),
}


@pytest.fixture
def declared(monkeypatch):
    """The new members stand in the registries of their files, and nowhere else."""
    for choice, made in NEW.items():
        file, name = _PLACES[choice]
        old = getattr(file, name)
        entries = [old.get(kind) for kind in old]
        monkeypatch.setattr(file, name, Kinds.of_entries(choice, *entries, made))


@pytest.mark.parametrize(
    "choices, expected",
    [
        (EXACT | dict(rule="lms"), "rank_one"),
        (EXACT | dict(rule="lms", retention="channel"), "channel"),
        (EXACT | dict(rule="lms", architecture="vector"), "vector"),
        (dict(rule="lms", chunk=4), "rank_one"),
        (dict(bias="log_cosh", threshold=0.5, rule="momentum", chunk=4), "rank_one"),
        (dict(retention="squared", dgd="none", chunk=4), "states"),
        (dict(architecture="squashed", rule="gd", chunk=4), "rank_one"),
    ],
    ids=str,
)
def test_a_new_choice_has_a_chunk_form(declared, choices, expected):
    config = MemoryConfig(**choices)
    assert form(config) == expected
    tokens = some_tokens(0, 10)
    if config.chosen.retention.channels:
        alpha = jnp.broadcast_to(tokens.alpha[:, None], tokens.k.shape)
        tokens = tokens._replace(alpha=alpha)
    assert_is_the_level(config, some_state(0, config), tokens)


def test_a_new_choice_is_asked_what_it_can(declared, key):
    lms = MemoryConfig(**EXACT | dict(rule="lms"))
    # Rows of a gradient are read one by one by what takes one key at a time.
    g = {"w": jax.random.normal(key, (4, 3))}
    ours = generalised.from_memory(0.1, lms)
    assert np.all(np.isfinite(ours.update(g, ours.init(g))[0]["w"]))
    with pytest.raises(ValueError, match="rule='lms' reads one key after another"):
        generalised.from_memory(0.1, lms, rows="mean")
    with pytest.raises(ValueError, match="rule='lms' solves for one key at a time"):
        slopes.check_config(lms)
    # No rate makes it overshoot, so its rate may have no bound.
    MemoryMixerConfig(memory=lms, gates=GateConfig(rate="step"))
    with pytest.raises(ValueError, match="solves for one pair at a time"):
        MemoryConfig(rule="lms", dgd="none", window=2)
    with pytest.raises(ValueError, match="needs rule .*'implicit', 'newton' or 'lms'"):
        MemoryConfig(**EXACT | dict(rule="adam"))
    SelfModifyingConfig(memory=MemoryConfig(rule="lms"), projection_chunk=16)

    robust = MemoryConfig(bias="log_cosh", threshold=0.5)
    MemoryMixerConfig(memory=robust, gates=GateConfig(threshold="token"))
    with pytest.raises(ValueError, match="linear in the memory.*bias='log_cosh'"):
        MemoryConfig(**EXACT | dict(bias="log_cosh", rule="gd"))
    with pytest.raises(ValueError, match="threshold=0.5 .* or 'log_cosh' would"):
        MemoryConfig(threshold=0.5)
    with pytest.raises(ValueError, match="retention='squared' is not linear"):
        MemoryConfig(**EXACT | dict(retention="squared", rule="gd"))
    with pytest.raises(ValueError, match="expansion=2 .*architecture='squashed'"):
        MemoryConfig(architecture="squashed", expansion=2)


@pytest.mark.parametrize(
    "option, value, without, choice, reader",
    [
        ("norm", True, None, "architecture", "linear"),  # a vector refuses it itself
        ("expansion", 2, "linear", "architecture", "mlp"),
        ("activation", "tanh", "vector", "architecture", "gated_mlp"),
        ("depth", 3, "mlp", "architecture", "deep_mlp"),
        ("degree", 3, "elu", "features", "exponential"),
        ("power", 2.0, "l2", "bias", "lp"),
        ("threshold", 0.5, "lp", "bias", "huber_switched"),
        ("retention_power", 3.0, "none", "retention", "lq"),
        ("retention_scale", 0.5, "lq", "retention", "bregman"),
        ("ridge", 0.5, "optax.sgd", "rule", "newton"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(
    option, value, without, choice, reader
):
    plain = dict(dgd="none", rule="gd") | {option: value}
    exact = EXACT if reader == "newton" else {}
    config = MemoryConfig(**plain | exact | {choice: reader})
    assert compose.with_choices(config, **{choice: reader}) == config
    if without is None:
        return
    message = f"{option}={value!r} is read by nothing: {choice}={without!r} .*"
    with pytest.raises(ValueError, match=f"{message}{reader!r}.* would. Leave"):
        MemoryConfig(**plain | {choice: without})
    default = compose.with_choices(MemoryConfig(dgd="none"), **{choice: without})
    assert compose.with_choices(default, **{option: value}) == default


def test_every_option_of_an_entry_is_a_field():
    fields = {field.name for field in dataclasses.fields(MemoryConfig)}
    assert {name for name, *_ in compose.readers()} <= fields


def test_a_flow_is_its_parts_by_name(key):
    """The same as `optax.chain` of them, whose state has places."""
    w = {"w": jax.random.normal(key, (2, 3))}
    parts = dict(step=optax.scale(-0.5), momentum=optax.trace(0.9))
    ours, theirs = chain(Flow(**parts)), optax.chain(*parts.values())
    state, standing = ours.init(w), theirs.init(w)
    for _ in range(2):
        moved, state = ours.update(w, state, w)
        expected, standing = theirs.update(w, standing, w)
        np.testing.assert_array_equal(moved["w"], expected["w"])
    np.testing.assert_array_equal(state.momentum.trace["w"], standing[1].trace["w"])
    assert state.erase is None and state.retention is None and state.landing is None


def test_what_a_state_keeps_of_a_flow():
    start = {"w": jnp.ones((2, 2))}
    keeps = dict(architecture="linear", dgd="none")
    plain = begin_memory(MemoryConfig(**keeps), start)
    assert plain.rule is None and plain.momentum is not None
    muon = begin_memory(
        MemoryConfig(**keeps, rule="muon", retention="bregman"), start
    ).rule
    assert isinstance(muon, FlowState) and muon.step is None
    np.testing.assert_array_equal(muon.momentum["w"], np.zeros((2, 2)))
    dual = np.arcsinh(np.sinh(start["w"]))
    np.testing.assert_allclose(muon.retention["w"], dual, rtol=1e-5)
