"""A chunk of any memory of `compose`, in parallel over its tokens.

Reference: `unroll(memory_level(config, width), ...)`. There are two ways. *Rank one*:
gradients are outer products whose factors are known at the chunk's start (or solve a
triangular system), so every matrix follows `kernels.delta` by itself, and a read is the
architecture's own text with each product taken from the token's state. *States*: for
retentions and rules that are not linear, gradients are taken in parallel at the
anchor, the rule moves the weights token by token, and reads are parallel again.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.kernels import delta
from hope_jax.kernels.channel import channel_chunk
from hope_jax.kernels.mesa import mesa_chunk, mesa_weights
from hope_jax.kernels.newton_schulz import orthogonalise
from hope_jax.kernels.vector import scan_one, scan_two
from hope_jax.memory import rates
from hope_jax.memory.architecture import PRODUCTS, Product, Weights
from hope_jax.memory.compose import (
    MemoryConfig,
    Tokens,
    build_architecture,
    build_bias,
    build_flow,
    delta_rates,
    erasures,
    plain_tokens,
    threshold,
)
from hope_jax.memory.rule import NewtonState
from hope_jax.memory.state import Form, MemoryState, commit, form, next_recent


def piece(
    config: MemoryConfig,
    state: MemoryState,
    tokens: Tokens,
    reads: bool = True,
    start: Weights | None = None,
    count: Int[Array, ""] | None = None,
) -> tuple[MemoryState, Float[Array, "C V"] | None]:
    """Reads and writes the C tokens of one chunk, or of a part of one, in parallel.

    The caller commits when the chunk is complete. With `reads` False only the state
    is computed and None stands for the reads. A memory that `returns` needs the `start`
    the level above gave it; no copy of it is in the state, unless it has `starts`. What
    follows the first `count` tokens is padding, from which nothing is learned and whose
    reads mean nothing; None is all of them.
    """
    start = _nearest(state, start)
    if config.returns and start is None:
        raise ValueError(
            f"toward={config.toward!r} and erases={config.erases!r} need the start of "
            "the memory: give start, the weights of begin_memory."
        )
    start = start if config.returns else None
    with jax.default_matmul_precision("float32"):
        tokens, state = _prepared(config, state, tokens, count)
        if config.steps > 1:
            return _several_steps(config, state, tokens, reads, start, count)
        chunk = _FORMS[_form_of(config, tokens)]
        return chunk(config, state, tokens, reads, start, count)


def _nearest(state, start):
    """The start to which a memory returns."""
    return state.starts[0] if state.starts else start


def _prepared(config, state, tokens, count):
    """Plain tokens, with no more to write than the chunk has left."""
    tokens = plain_tokens(config, tokens)
    if count is not None:
        tokens = _padded(tokens, count * config.steps)
    if state.left is not None:
        shares, left = rates.ration(tokens.eta, state.left)
        tokens, state = tokens._replace(eta=shares), state._replace(left=left)
    return tokens, state


def _padded(tokens, count):
    """Of the first tokens themselves; of what follows gates that change nothing."""

    def there(leaf, otherwise):
        if leaf is None:
            return None
        own = jnp.arange(leaf.shape[0], dtype=jnp.int32) < count
        own = own.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(own, leaf, jnp.full_like(leaf, otherwise))

    return tokens._replace(
        eta=there(tokens.eta, 0.0),
        alpha=there(tokens.alpha, 1.0),
        theta=there(tokens.theta, 0.0),
        erase_rate=there(tokens.erase_rate, 0.0),
    )


def _form_of(config: MemoryConfig, tokens: Tokens) -> Form:
    """`form`, unless the tokens erase along another vector than they write."""
    kind = form(config)
    vector_rate = tokens.erase_rate is not None and tokens.erase_rate.ndim > 1
    apart = config.dgd != "none" and (tokens.erase_key is not None or vector_rate)
    if not apart or kind in ("channel", "states"):
        return kind
    exact = config.chosen.architecture.matrix and config.gradient == "exact"
    if not exact or config.inertia or config.products != "float32":
        raise ValueError(
            "tokens.erase_key and a vector erase_rate need architecture='linear', "
            "gradient='exact', rule 'gd' or 'implicit' and products='float32', got "
            f"{config.architecture!r}, {config.gradient!r}, {config.rule!r} and "
            f"{config.products!r}."
        )
    return "channel"


def _several_steps(config, state, tokens, reads, start, count):
    single = dataclasses.replace(config, steps=1)
    if config.gradient == "exact":
        count = None if count is None else count * config.steps
        state, y = piece(single, state, tokens, reads, start, count)
        return state, y if y is None else y[config.steps - 1 :: config.steps]

    # Anchored memories of chunk 1 (the only ones with several steps) move at each.
    if count is not None:  # the token is there, or is not
        after, y = _several_steps(config, state, tokens, reads, start, None)
        keep = lambda new, old: jnp.where(count > 0, new, old)  # noqa: E731
        return jax.tree.map(keep, after, state), y

    def step(state, token):
        state, _ = piece(single, state, token, reads=False, start=start)
        return commit(state), None

    one = lambda leaf: leaf[:, None]  # noqa: E731 a time of one token
    before = jax.tree.map(lambda leaf: one(leaf[:-1]), tokens)
    last = jax.tree.map(lambda leaf: leaf[-1:], tokens)
    state, _ = jax.lax.scan(step, state, before)
    return piece(single, state, last, reads, start)


class Written(NamedTuple):
    """A chunk of a rank-one memory with all that its tokens wrote, to be read from.

    Attributes:
      state: before the chunk.
      inputs: what each matrix meets at the keys, `[P, K]`.
      rows: what it writes there.
      gates: how these decay and coast.
      start: the weights it returns to, or None.
    """

    state: MemoryState
    inputs: dict[str, Array]
    rows: dict[str, delta.Rows]
    gates: dict[str, delta.Transitions]
    start: Weights | None


def write(
    config: MemoryConfig,
    state: MemoryState,
    tokens: Tokens,
    start: Weights | None = None,
    count: Int[Array, ""] | None = None,
) -> tuple[MemoryState, Written]:
    """Of a memory whose `form` is rank one, the part of `piece` that no read needs; of
    one with several steps a token, if its gradient is exact.

    Memories of one shape may so be written as a batch, and one of them be read.
    """
    with jax.default_matmul_precision("float32"):
        tokens, state = _prepared(config, state, tokens, count)
        start = _nearest(state, start) if config.returns else None
        if config.steps > 1:
            count = None if count is None else count * config.steps
        return _write(config, state, tokens, start, count)


def read(
    config: MemoryConfig, written: Written, q: Float[Array, "C K"]
) -> Float[Array, "C V"]:
    """What a query of every token gets from a chunk that `write` wrote."""
    with jax.default_matmul_precision("float32"):
        if config.steps == 1:
            return _read(config, written, q)
        y = _read(config, written, jnp.repeat(q, config.steps, axis=0))
        return y[config.steps - 1 :: config.steps]


def _rank_one(config, state, tokens, reads, start, count):
    after, written = _write(config, state, tokens, start, count)
    return after, _read(config, written, tokens.q) if reads else None


def _write(config, state, tokens, start, count):
    function = build_architecture(config, tokens.v.shape[-1])
    theta = tokens.theta if config.inertia else None
    ahead = config.chosen.rule.lookahead
    gates = delta.transitions(tokens.alpha, theta, ahead, count)
    layer = functools.partial(_layer, config, state, start)
    inputs, rows, gates = _rows(config, function, state, tokens, gates, layer)
    gates = dict.fromkeys(inputs, gates)
    if config.rate_law == "output":  # its output layer has no momentum
        gates["w1"] = delta.transitions(tokens.alpha, None)

    ends = {
        name: layer(name).finish(x, rows[name], gates[name])
        for name, x in inputs.items()
    }
    momentum = state.momentum
    if momentum is not None:
        moved = {n: end[1] for n, end in ends.items() if end[1] is not None}
        momentum = momentum | moved
    after = state._replace(
        weights={name: end[0] for name, end in ends.items()},
        momentum=momentum,
        recent=next_recent(config, state.recent, tokens, count),
    )
    return after, Written(state, inputs, rows, gates, start)


def _read(config, written, q):
    weights = written.state.weights
    function = build_architecture(
        config, weights["w1" if "w1" in weights else "w"].shape[0]
    )
    if config.read == "anchor":
        return function.apply(written.state.anchor, q)

    def multiply(name, x):
        return _layer(config, written.state, written.start, name).read(
            written.inputs[name],
            written.rows[name],
            written.gates[name],
            x,
            config.read == "pre",
        )

    return function.forward(multiply, q)


class _Matrix(NamedTuple):
    """One matrix of a memory: where it stands, measured from where it decays to.

    Attributes:
      m: its weights, less the origin.
      s: its momentum.
      origin: its start; None where that is zero.
      product: how its products are taken.
    """

    m: Array
    s: Array | None
    origin: Array | None
    product: Product

    def finish(self, k, rows, gates):
        m, s = delta.finish(self.m, self.s, k, rows, gates, self.product)
        return m if self.origin is None else m + self.origin, s

    def read(self, k, rows, gates, q, before):
        y = delta.read(self.m, self.s, k, rows, gates, q, before, self.product)
        return y if self.origin is None else y + self.product(self.origin, q)


def _layer(config: MemoryConfig, state: MemoryState, start: Weights | None, name: str):
    m = state.weights[name]
    s = None if state.momentum is None else state.momentum[name]
    if config.rate_law == "output" and name == "w1":
        s = None
    origin = None if start is None else start[name]
    m = m if origin is None else m - origin
    return _Matrix(m, s, origin, PRODUCTS[config.products])


def _rows(config, function, state, tokens, gates, layer):
    """What each matrix meets, its delta and write rows, and the gates they obey."""
    all_erased = config.erases == "all"
    squares = config.chosen.bias.squares
    if config.gradient == "exact" and squares:
        k, eta = tokens.k, _rate(config, tokens.eta, tokens.k)
        b = _delta_coefficients(config, tokens, {"w": k}).get("w")
        m, s, origin, product = layer("w")
        rows = delta.exact_rows(
            m, s, k, tokens.v, eta, b, gates, origin, all_erased, product
        )
        return {"w": k}, {"w": rows}, gates

    k, v, limits = _pairs(config, state, tokens)
    slope = jax.vmap(jax.grad(build_bias(config)))
    # The gradient of the dot product is the same at any state.
    point = state.weights if state.anchor is None else state.anchor
    blame = lambda output: slope(output, v, limits)  # noqa: E731
    if config.rate_law != "token":
        met = rates.meet(function, point, k, blame)
        inputs, errors = met.inputs, met.errors
        eta = rates.steps(config, tokens, met)
        b = _delta_coefficients(config, tokens, inputs, eta)
    else:
        inputs, errors = function.inputs_and_errors(point, k, blame)
        b = _delta_coefficients(config, tokens, inputs)
        if config.window == 1:
            eta = {n: _rate(config, tokens.eta, x) for n, x in inputs.items()}
    if config.window > 1:
        band = tokens.eta[:, None] * _band(config, tokens)
        gates = gates._replace(spread=gates.spread @ band, coast=gates.coast @ band)
        writes = {name: -error for name, error in errors.items()}
    else:
        writes = {n: -eta[n][:, None] * error for n, error in errors.items()}

    rows = {}
    for name, x in inputs.items():
        m, s, origin, product = layer(name)
        if squares and (config.rate_law, name) == ("output", "w1"):
            plain = delta.transitions(tokens.alpha, None)
            rows[name] = delta.exact_rows(
                *(m, s, x, v - met.skip, eta[name], b.get(name), plain),
                *(origin, all_erased, product),
            )
        else:
            own = gates
            if config.rate_law == "output" and name == "w1":
                own = delta.transitions(tokens.alpha, None)
            erased = origin if all_erased else None
            rows[name] = delta.anchored_rows(
                m, s, x, writes[name], b.get(name), own, erased, product
            )
    return inputs, rows, gates


def _rate(config, eta, x):
    rate = config.chosen.rule.rate
    return eta if rate is None else jax.vmap(rate)(eta, x)


def _delta_rates(config, tokens, inputs, eta=None):
    if config.dgd == "none":
        return {}
    eta = tokens.eta if eta is None else eta
    made = jax.vmap(lambda eta, x: delta_rates(config, eta, x))(eta, inputs)
    if tokens.erase_rate is not None:
        made = dict.fromkeys(made, tokens.erase_rate)
    return made


def _delta_coefficients(config, tokens, inputs, eta=None):
    """How much of each matrix's recall is erased, as of the memory before retention."""
    made = _delta_rates(config, tokens, inputs, eta)
    if config.recall == "after":
        made = {name: b * tokens.alpha for name, b in made.items()}
    return made


def _pairs(config, state, tokens):
    """The keys, values and thresholds whose losses the tokens descend."""
    if config.window == 1:
        return tokens.k, tokens.v, threshold(config, tokens)
    k = jnp.concatenate([state.recent.k, tokens.k])
    v = jnp.concatenate([state.recent.v, tokens.v])
    return k, v, jnp.full_like(k[:, 0], config.threshold)


def _band(config, tokens):
    """`[C, window - 1 + C]`: how each token weighs the pairs that its window sees."""
    length, back = tokens.eta.shape[0], config.window - 1
    lag = jnp.arange(length)[:, None] + back - jnp.arange(length + back)[None]
    seen = (lag >= 0) & (lag <= back)
    weights = jnp.take_along_axis(tokens.weights, jnp.clip(lag, 0, back), axis=1)
    return jnp.where(seen, weights, 0.0)


def _channel(config, state, tokens, reads, start, count):
    """Key channels that decay apart: the diagonal-plus-rank-one form."""
    del count  # padding changes no sum
    eta, k = _rate(config, tokens.eta, tokens.k), tokens.k
    alpha = tokens.alpha
    if alpha.ndim == 1:
        alpha = jnp.broadcast_to(alpha[:, None], k.shape)
    recall, along = None, None  # along None erases along k itself, at less cost
    if config.dgd != "none":
        recall, along = erasures(config, tokens, {"w": k})["w"]
        if tokens.erase_key is None and tokens.erase_rate is None:
            rate = _delta_rates(config, tokens, {"w": k})["w"]
            recall, along = rate[:, None] * recall, None
    write, m = eta[:, None] * tokens.v, state.weights["w"]
    if start is not None:
        m = m - start["w"]
        if recall is not None and config.erases == "all":
            if along is not None:
                raise ValueError(
                    "erases='all' with a delta term of its own key or rate takes a "
                    "second write from the start: use erases='written'."
                )
            write = write - recall @ start["w"].T
    if config.chosen.bias.squares:
        if along is not None:
            raise ValueError(
                "bias='l2' with a delta term of its own key or rate is a transition of "
                "rank two: use bias='dot'."
            )
        own = eta[:, None] * k
        recall = own if recall is None else own + recall
        if start is not None:
            write = write - own @ start["w"].T
    m, y = channel_chunk(
        m,
        k,
        write,
        tokens.q,
        alpha,
        recall,
        along,
        before_write=config.read == "pre",
    )
    if start is not None:
        m, y = m + start["w"], y + tokens.q @ start["w"].T
    return state._replace(weights={"w": m}), y if reads else None


def _oja(config, state, tokens, reads, start, count):
    """The delta rule of the transposed matrix: it erases along values."""
    del start, count  # oja decays to zero; padding changes no sum
    m, k, v, q = state.weights["w"], tokens.k, tokens.v, tokens.q
    gates = delta.transitions(tokens.alpha, None)
    write = tokens.eta[:, None] * k
    rows = delta.anchored_rows(m.T, None, v, write, tokens.eta, gates)
    end, _ = delta.finish(m.T, None, v, rows, gates)
    y = None
    if reads:
        assert rows.u is not None  # the delta term was given
        match = gates.decay * (q @ (rows.u + rows.e).T)
        y = gates.kept[1:, None] * (q @ m.T) + match @ v
    return state._replace(weights={"w": end.T}), y


def _newton(config, state, tokens, reads, start, count):
    del start, count  # it decays sums, which padding does not change
    sums = state.rule.step
    g, h, y = mesa_chunk(
        sums.values["w"],
        sums.keys["w"],
        tokens.k,
        tokens.v,
        tokens.q,
        tokens.eta,
        tokens.alpha,
        config.ridge,
    )
    weights = {"w": mesa_weights(g, h, config.ridge)}
    rule = state.rule._replace(step=NewtonState({"w": g}, {"w": h}))
    return state._replace(weights=weights, rule=rule), y if reads else None


def _vector(config, state, tokens, reads, start, count):
    """Every channel is a memory of one number."""
    k, m = tokens.k, state.weights["w"]
    origin = jnp.zeros_like(m) if start is None else start["w"]
    m, started = m - origin, k * origin[None]
    eta = _rate(config, tokens.eta, k)[:, None]
    keep = jnp.broadcast_to(tokens.alpha[:, None], k.shape)
    b = _delta_coefficients(config, tokens, {"w": k}).get("w")
    if b is not None:
        keep = keep - b[:, None] * k * k
    squares = config.chosen.bias.squares
    pull = eta * k * k if squares else jnp.zeros_like(k)
    missing = tokens.v - started if squares else tokens.v
    write = eta * missing * k
    gone = jnp.zeros_like(write)
    if b is not None and config.erases == "all":
        gone = b[:, None] * started * k
    if state.momentum is None:
        after, momentum = scan_one(keep - pull, write - gone, m), None
    else:
        theta = jnp.broadcast_to(tokens.theta[:, None], k.shape)
        ahead = config.chosen.rule.lookahead
        now, coast = (1.0 + theta, theta * theta) if ahead else (1.0, theta)
        after, momentum = scan_two(
            ((keep - now * pull, coast), (-pull, theta)),
            (now * write - gone, write),
            (m, state.momentum["w"]),
        )
        momentum = {"w": _last(momentum, state.momentum["w"], count)}
    m, after = m + origin, after + origin[None]
    moved = state._replace(weights={"w": after[-1]}, momentum=momentum)
    if not reads:
        return moved, None
    if config.read == "pre":
        after = jnp.concatenate([m[None], after[:-1]])
    return moved, after * tokens.q


def _last(
    states: Float[Array, "C *D"],
    before: Float[Array, "*D"],
    count: Int[Array, ""] | None,
) -> Float[Array, "*D"]:
    """What `before` has become after the last token there is."""
    if count is None:
        return states[-1]
    states = jnp.concatenate([before[None], states])
    return jax.lax.dynamic_index_in_dim(states, count, keepdims=False)


def _states(config, state, tokens, reads, start, count):
    """Any rule and retention: the weights of every token are formed."""
    function = build_architecture(config, tokens.v.shape[-1])
    loss = build_bias(config)

    def objective(weights, k, v, limit):
        return loss(function.apply(weights, k), v, limit)

    gradients = jax.vmap(jax.grad(objective), (None, 0, 0, 0))(
        state.anchor, *_pairs(config, state, tokens)
    )
    if config.window > 1:
        band = _band(config, tokens)
        gradients = jax.tree.map(lambda g: jnp.tensordot(band, g, 1), gradients)
    if _affine(config):
        after, rule = _move_in_parallel(config, state, tokens, gradients, start, count)
    else:
        inputs = function.inputs(state.anchor, tokens.k)
        after, rule = _move_in_turn(config, state, tokens, gradients, inputs, count)
    moved = state._replace(
        weights=jax.tree.map(lambda w: w[-1], after),
        rule=rule,
        recent=next_recent(config, state.recent, tokens, count),
    )
    if not reads:
        return moved, None
    if config.read == "anchor":
        return moved, function.apply(state.anchor, tokens.q)
    if config.read == "pre":
        after = jax.tree.map(
            lambda first, w: jnp.concatenate([first[None], w[:-1]]),
            state.weights,
            after,
        )
    return moved, jax.vmap(function.apply)(after, tokens.q)


def _affine(config):
    """Whether a token's weights are a fixed function of sums over earlier tokens."""
    found = config.chosen
    kept = found.retention.uniform or found.retention.mirrors
    return found.rule.affine and kept and config.dgd == "none"


def _move_in_turn(
    config, state, tokens, gradients, inputs, count
) -> tuple[PyTree, PyTree]:
    flow = build_flow(config)
    there = jnp.arange(tokens.eta.shape[0], dtype=jnp.int32)
    there = there if count is None else there < count

    def move(carry, item):
        weights, rule = carry
        gradient, token, met, real = item
        updates, rule = flow.update(gradient, rule, weights, context=token, inputs=met)
        made = optax.apply_updates(weights, updates), rule
        if count is not None:  # a rule of any kind may count its steps
            made = jax.tree.map(lambda new, old: jnp.where(real, new, old), made, carry)
        return made, made[0]

    (_, rule), after = jax.lax.scan(
        move, (state.weights, state.rule), (gradients, tokens, inputs, there)
    )
    return after, rule


def _move_in_parallel(config, state, tokens, gradients, origin, count):
    """The weights after each token: sums over time are products with the gates."""
    theta = tokens.theta if config.inertia else None
    found, rule = config.chosen, state.rule
    gates = delta.transitions(tokens.alpha, theta, found.rule.lookahead, count)
    over = lambda coefficients, x: jnp.tensordot(coefficients, x, 1)  # noqa: E731

    def from_start(weight, x):
        return weight.reshape(-1, *[1] * x.ndim) * x[None]

    def coasting(s, moves):
        coasts = delta.cumulative_products(tokens.theta)[1:]
        return from_start(coasts[:, 0], s) + over(coasts[:, 1:], moves)

    eta = lambda x: tokens.eta.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
    if found.rule.orthogonal:
        momenta = jax.tree.map(lambda s, g: coasting(s, -g), rule.momentum, gradients)
        writes = jax.tree.map(lambda s: eta(s) * orthogonalise(s), momenta)
        gates = delta.transitions(tokens.alpha, None)
        last = jax.tree.map(lambda s, old: _last(s, old, count), momenta, rule.momentum)
        rule = rule._replace(momentum=last)
    else:
        writes = jax.tree.map(lambda g: -eta(g) * g, gradients)

    link = found.retention.link
    start = state.weights if link is None else rule.retention
    if origin is not None:
        start = jax.tree.map(jnp.subtract, start, origin)
    after = jax.tree.map(
        lambda a, u: from_start(gates.kept[1:], a) + over(gates.spread, u),
        start,
        writes,
    )
    if found.rule.inertia and not found.rule.orthogonal:
        after = jax.tree.map(
            lambda w, s: w + from_start(gates.lag[1:], s), after, rule.momentum
        )
        momentum = jax.tree.map(
            lambda s, u: gates.coast_start * s + over(gates.coast, u),
            rule.momentum,
            writes,
        )
        rule = rule._replace(momentum=momentum)
    if origin is not None:
        after = jax.tree.map(lambda w, o: w + o[None], after, origin)
    if link is not None:
        rule = rule._replace(retention=jax.tree.map(lambda a: a[-1], after))
        after = jax.tree.map(jax.vmap(link(config).primal), after)
    return after, rule


_FORMS = {
    "rank_one": _rank_one,
    "channel": _channel,
    "oja": _oja,
    "newton": _newton,
    "vector": _vector,
    "states": _states,
}
