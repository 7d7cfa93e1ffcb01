"""Shampoo and SOAP, held to NumPy in float64 and to what they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hope_jax.optim.kronecker import (
    inverse_root,
    orthonormal,
    power_iteration,
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    soap,
)
from hope_jax.optim.matrices import with_adamw
from tests import compare

close = compare.within(1e-6, 1e-9)

SHAPES = {"a": (4, 4), "b": (4, 4, 4)}

RULES = {
    "shampoo": lambda **more: scale_by_shampoo(frequency=3, **more),
    "soap": lambda **more: scale_by_soap(frequency=3, **more),
}


@functools.cache
def program(name):
    """Compiled once for all tests that run the rule on SHAPES in float32."""
    return jax.jit(RULES[name]().update)


def stream(steps=8, shapes=SHAPES):
    draw = np.random.default_rng(0).standard_normal
    return [{name: draw(shape) for name, shape in shapes.items()} for _ in range(steps)]


def run(rule, gradients, state=None, step=None):
    """Every update and every state, by one program."""
    gradients = [jax.tree.map(jnp.asarray, g) for g in gradients]
    state = rule.init(gradients[0]) if state is None else state
    step, updates, states = step or jax.jit(rule.update), [], []
    for gradient in gradients:
        update, state = step(gradient, state)
        updates.append(update)
        states.append(state)
    assert step._cache_size() == 1
    return updates, states


def floats(dtype, gradients):
    return [jax.tree.map(lambda x: x.astype(dtype), g) for g in gradients]


def power_of(matrix, power, eps):
    values, vectors = np.linalg.eigh(matrix)
    values = values + eps * np.linalg.norm(matrix)
    return (vectors * values**-power) @ vectors.T


def slow_shampoo(gs, *, b1, b2, frequency, root, grafting, eps, max_size):
    """As it is defined, for one matrix: one update for each of gs."""
    rows, columns = gs[0].shape
    left, right = np.zeros((rows, rows)), np.zeros((columns, columns))
    mean, square = 0.0, 0.0
    for t, g in enumerate(gs, start=1):
        new = 1.0 if b2 == 1 else 1 - b2
        debt = 1.0 if b2 == 1 else 1 - b2**t
        left, right = b2 * left + new * g @ g.T, b2 * right + new * g.T @ g
        mean, square = b1 * mean + (1 - b1) * g, b2 * square + new * g**2
        if (t - 1) % frequency == 0:
            two = max(rows, columns) <= max_size
            power = 1 / root if two else 1 / 2
            of_left, of_right = np.eye(rows), np.eye(columns)
            if rows <= max_size:
                of_left = power_of(left / np.trace(left), power, eps)
            if columns <= max_size:
                of_right = power_of(right / np.trace(right), power, eps)
        m = mean / (1 - b1**t)
        direction = of_left @ m @ of_right / np.sqrt(np.trace(left) / debt)
        adam = m / np.sqrt(square / debt)
        size = {
            "none": np.linalg.norm(direction),
            "rms": 0.2 * np.sqrt(g.size),
            "adam": np.linalg.norm(adam),
        }[grafting]
        yield size * direction / np.linalg.norm(direction)


SHAMPOOS = [
    dict(b1=0.9, b2=0.8, frequency=3, root=4, grafting="adam", eps=1e-6, max_size=9),
    dict(b1=0.0, b2=1.0, frequency=1, root=2, grafting="rms", eps=1e-3, max_size=9),
    dict(b1=0.5, b2=0.9, frequency=2, root=4, grafting="none", eps=1e-3, max_size=4),
]


@pytest.mark.parametrize("settings", SHAMPOOS, ids=str)
def test_shampoo_is_its_definition(float64, settings):
    """For two sides and for one, whose power is another."""
    gradients = stream(6, {"a": (6, 4), "b": (2, 4, 3)})
    updates, _ = run(scale_by_shampoo(**settings), gradients)
    assert updates[0]["a"].dtype == jnp.float64
    for matrix in (lambda tree: tree["a"], lambda tree: tree["b"][1]):
        expected = list(slow_shampoo([matrix(g) for g in gradients], **settings))
        close([matrix(u) for u in updates], expected)


def test_without_a_short_side_shampoo_is_momentum(float64):
    """At the size of a whole gradient."""
    gradients = stream(4)
    rule = scale_by_shampoo(b1=0.5, b2=1.0, grafting="none", max_size=2)
    updates, _ = run(rule, gradients)
    mean, total = 0.0, 0.0
    for t, (g, update) in enumerate(zip(gradients, updates, strict=True), start=1):
        mean, total = 0.5 * mean + 0.5 * g["a"], total + np.sum(g["a"] ** 2)
        close(update["a"], mean / (1 - 0.5**t) / np.sqrt(total))


def slow_soap(gs, *, b1, b2, shampoo_beta, frequency, eps):
    """As it is defined, for one matrix, with LAPACK's QR, whose signs are others."""

    def better(gram, basis, rounds, shift):
        order = np.arange(len(gram))
        gram = gram + shift * np.linalg.norm(gram) * np.eye(len(gram))
        for _ in range(rounds):
            by = np.argsort(-np.diag(basis.T @ gram @ basis))
            basis, order = np.linalg.qr(gram @ basis[:, by])[0], order[by]
        return basis, order

    rows, columns = gs[0].shape
    left, right = np.zeros((rows, rows)), np.zeros((columns, columns))
    ql, qr, mean, square = np.eye(rows), np.eye(columns), 0.0, np.zeros(gs[0].shape)
    for t, g in enumerate(gs):
        step = np.zeros(g.shape)
        if t > 0:
            mean = b1 * mean + (1 - b1) * g
            square = b2 * square + (1 - b2) * (ql.T @ g @ qr) ** 2
            root = np.sqrt(square / (1 - b2**t)) + eps
            step = ql @ (ql.T @ mean @ qr / (1 - b1**t) / root) @ qr.T
        left = shampoo_beta * left + (1 - shampoo_beta) * g @ g.T
        right = shampoo_beta * right + (1 - shampoo_beta) * g.T @ g
        if t % frequency == 0:
            how = (1, 0.0) if t else (10, 1e-3)
            ql, by_left = better(left, ql, *how)
            qr, by_right = better(right, qr, *how)
            square = square[by_left][:, by_right]
        yield step


def test_soap_is_its_definition(float64):
    """For square matrices: where a gram is singular, QR may end in any columns."""
    gradients = stream(steps=9, shapes={"a": (4, 4), "b": (2, 3, 3)})
    settings = dict(b1=0.7, b2=0.8, shampoo_beta=0.6, frequency=3, eps=1e-3)
    updates, _ = run(scale_by_soap(**settings), gradients)
    matrices = (lambda tree: tree["a"], lambda tree: tree["b"][1])
    for matrix in matrices:
        expected = list(slow_soap([matrix(g) for g in gradients], **settings))
        close([matrix(u) for u in updates], expected, 1e-5, 1e-8)


def test_soap_in_bases_that_are_the_axes_is_adam(float64):
    gradients = stream(steps=6)
    updates, _ = run(scale_by_soap(b1=0.9, b2=0.8, max_size=2), gradients)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = run(optax.scale_by_adam(b1=0.9, b2=0.8), gradients[1:])
    assert not np.any(updates[0]["a"]) and not np.any(updates[0]["b"])
    close(updates[1:], expected)


def test_soap_turns_with_its_gradients(float64):
    """Gradients in turned axes: the updates are those of Adam in these axes, turned."""
    draw = np.random.default_rng(1)
    left, right = (np.linalg.qr(draw.standard_normal((n, n)))[0] for n in (3, 4))
    sizes = np.outer([9.0, 3.0, 1.0], [4.0, 2.0, 1.0, 0.5])
    grid = np.zeros((8, 3, 4))
    for t in range(8):  # the grams stay diagonal: one entry a row and a column
        for i in range(3):
            grid[t, i, (i + t) % 4] = (sizes * draw.uniform(0.9, 1.1))[i, (i + t) % 4]
    gradients = [{"a": left @ g @ right.T} for g in grid]
    rule = scale_by_soap(b1=0.9, b2=0.9, shampoo_beta=1.0, frequency=1)
    updates, states = run(rule, gradients)
    grams = jax.tree.map(np.asarray, states[-1].grams["a"])
    expected = left.T @ np.asarray(grams.sides.left) @ left
    close(expected, np.diag(np.diag(expected)), atol=1e-9)
    basis = np.abs(left.T @ np.asarray(states[-1].bases["a"].left))
    close(basis, np.eye(3), atol=1e-2)
    step = left.T @ np.asarray(updates[-1]["a"]) @ right
    with jax.numpy_dtype_promotion("standard"):
        adam = run(optax.scale_by_adam(b1=0.9, b2=0.9), list(grid[1:]))[0][-1]
    assert np.linalg.norm(step - adam) < 0.2 * np.linalg.norm(adam)


def outer_adagrad(gs):
    """Σ vec(g) vec(g)ᵀ."""
    flat = np.stack([g.ravel() for g in gs])
    return flat.T @ flat


PLAIN = dict(b1=0.0, b2=1.0, frequency=1, grafting="none", eps=1e-9)


def test_shampoo_is_adagrad_for_one_gradient_of_rank_one(float64):
    """Appendix B: an approximation of H^(-1/2) g, and here exact."""
    draw = np.random.default_rng(2)
    g = np.outer(draw.standard_normal(3), draw.standard_normal(4))
    values, vectors = np.linalg.eigh(outer_adagrad([g]))
    inverse = np.where(values > 1e-9, np.maximum(values, 1e-9) ** -0.5, 0.0)
    expected = ((vectors * inverse) @ vectors.T @ g.ravel()).reshape(g.shape)
    for root in (4, 2):
        (update,), _ = run(scale_by_shampoo(root=root, **PLAIN), [g])
        close(update, expected, 1e-5, 1e-6)


def test_shampoo_is_adagrad_for_diagonal_gradients(float64):
    diagonals = np.random.default_rng(3).standard_normal((5, 4))
    updates, _ = run(scale_by_shampoo(**PLAIN), [np.diag(d) for d in diagonals])
    for t, update in enumerate(updates, start=1):
        root = np.sqrt(np.sum(diagonals[:t] ** 2, axis=0))
        close(update, np.diag(diagonals[t - 1] / root), 1e-5, 1e-6)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_kronecker_product_bounds_the_matrix_of_adagrad(float64, rank):
    """H <= r sqrt(L) x sqrt(R) for gradients of rank r (Gupta et al., lemma 8)."""
    draw = np.random.default_rng(4)
    shape = (rank,)
    gs = [
        draw.standard_normal((3, *shape)) @ draw.standard_normal((*shape, 4))
        for _ in range(5)
    ]
    _, states = run(scale_by_shampoo(**PLAIN), gs)
    grams = states[-1].grams
    left, right = (
        np.linalg.eigh(np.asarray(grams.size**2 * side)) for side in grams.sides
    )
    roots = [(v * np.sqrt(np.maximum(w, 0))) @ v.T for w, v in (left, right)]
    bound = rank * np.kron(*roots)
    values = np.linalg.eigvalsh(bound - outer_adagrad(gs))
    assert values.min() > -1e-9 * values.max()
    assert np.linalg.eigvalsh(bound / rank / 1.5 - outer_adagrad(gs)).min() < 0


@pytest.mark.parametrize("power", [2, 4])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_inverse_roots_against_eigh(power, eps):
    """In float32, of singular matrices; zero has the identity."""
    x = np.random.default_rng(5).standard_normal((2, 20, 9))
    a = x @ x.transpose(0, 2, 1)
    a /= np.trace(a, axis1=1, axis2=2)[:, None, None]
    batch = jnp.asarray(np.concatenate([a, np.zeros((1, 20, 20))]), jnp.float32)
    roots = jax.jit(inverse_root, static_argnums=(1, 2))(batch, power, eps)
    for root, one in zip(roots, a, strict=False):
        expected = power_of(one, 1 / power, eps)
        assert np.linalg.norm(root - expected) < 1e-2 * np.linalg.norm(expected)
    close(roots[-1], np.eye(20), atol=1e-6)


@pytest.mark.parametrize("n", [5, 40])
def test_orthonormal_is_the_q_of_qr(n):
    """Over more than one block, of columns of very different sizes."""
    x = np.random.default_rng(6).standard_normal((2, n, n))
    x = (x * np.logspace(0, -4, n)).astype(np.float32)
    q = np.asarray(jax.jit(orthonormal)(jnp.asarray(x)), np.float64)
    close(q.transpose(0, 2, 1) @ q, np.stack([np.eye(n)] * 2), atol=2e-6)
    for ours, one in zip(q, x, strict=True):
        theirs, r = np.linalg.qr(one.astype(np.float64))
        close(ours, theirs * np.sign(np.diag(r)), atol=1e-3)


def test_power_iteration_finds_eigenvectors_of_singular_matrices():
    draw = np.random.default_rng(7)
    basis = np.linalg.qr(draw.standard_normal((40, 40)))[0]
    values = np.where(np.arange(40) < 6, 0.5 ** np.arange(40), 0.0)
    a = jnp.asarray((basis * values) @ basis.T, jnp.float32)[None]
    better, q = jax.jit(power_iteration), jnp.eye(40)[None]
    for _ in range(10):
        q, _ = better(a, q, 0)
    close(q[0].T @ q[0], np.eye(40), atol=3e-6)
    inside = np.asarray(q[0].T @ a[0] @ q[0])
    close(inside, np.diag(values), atol=3e-3)
    first = jnp.zeros((1, 40, 40)).at[0, 0, 0].set(1.0)  # all else is exactly 0
    kept, _ = better(first, jnp.eye(40)[None], 0)
    close(kept[0], np.eye(40), atol=1e-6)
    same, order = better(jnp.zeros((1, 40, 40)), q, 0)
    close(same, q, atol=1e-6)
    assert order.tolist() == [list(range(40))]


@pytest.mark.parametrize("name", RULES)
def test_roots_and_bases_move_on_the_clock_only(name):
    rule = RULES[name]()
    gradients = floats(jnp.float32, stream(steps=8))
    _, states = run(rule, gradients, step=program(name))
    before = rule.init(jax.tree.map(jnp.asarray, gradients[0]))

    def moved(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return [bool(jnp.any(x != y)) for x, y in pairs]

    for t, state in enumerate(states, start=1):
        assert set(moved(state[-1], before[-1])) == {(t - 1) % 3 == 0}
        assert all(moved(state.grams, before.grams))
        before = state


@pytest.mark.parametrize("name", RULES)
def test_nothing_is_computed_off_the_clock(name):
    """Outside of the branches there are no loops, and few products."""
    rule = RULES[name]()
    g = jnp.ones((4, 3))
    program = jax.make_jaxpr(rule.update)(g, rule.init(g)).jaxpr

    def count(jaxpr, inside):
        found = {"dot_general": 0, "while": 0, "scan": 0}
        for equation in jaxpr.eqns:
            if equation.primitive.name in found:
                found[equation.primitive.name] += 1
            if equation.primitive.name == "cond" and not inside:
                continue
            for inner in jax.tree.leaves(equation.params):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    for kind, n in count(inner, inside).items():
                        found[kind] += n
        return found

    products = {"shampoo": 4, "soap": 8}[name]  # two grams; two sides, once or thrice
    off = count(program, inside=False)
    assert off == {"dot_general": products, "while": 0, "scan": 0}
    on = count(program, inside=True)
    assert on["dot_general"] > products and on["scan"] + on["while"] > 0


@pytest.mark.parametrize("name", RULES)
def test_saved_in_the_middle_of_a_period(name):
    """The state as bytes and back: the updates go on to the last bit."""
    rule = RULES[name]()
    gradients = floats(jnp.float32, stream(steps=9))
    unbroken, states = run(rule, gradients, step=program(name))
    leaves, structure = jax.tree.flatten(states[4])
    saved = [(np.asarray(x).tobytes(), x.dtype, x.shape) for x in leaves]
    restored = [jnp.asarray(np.frombuffer(b, d).reshape(s)) for b, d, s in saved]
    after, _ = run(rule, gradients[5:], structure.unflatten(restored), program(name))
    jax.tree.map(np.testing.assert_array_equal, after, unbroken[5:])


@pytest.mark.parametrize(("name", "over"), [("shampoo", False), ("soap", True)])
def test_sharded_is_unsharded(name, over):
    """Parameters and state cut over four devices, by rows, and bases by matrices."""
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))
    gradients = floats(jnp.float32, stream(5))
    expected, _ = run(RULES[name](), gradients, step=program(name))
    rule = RULES[name](mesh=mesh if over else None)
    rows = NamedSharding(mesh, PartitionSpec("x"))
    cut = [jax.device_put(gradient, rows) for gradient in gradients]
    state = jax.tree.map(
        lambda x: jax.device_put(x, rows) if x.ndim and x.shape[0] % 4 == 0 else x,
        rule.init(cut[0]),
    )
    step = jax.jit(rule.update)
    for gradient, there in zip(cut, expected, strict=True):
        update, state = step(gradient, state)
        close(update, there, 1e-3, 1e-3)
    assert len(state.memory["a"].devices()) == 4


@pytest.mark.parametrize("scale", [1e-2, 1e20])
@pytest.mark.parametrize("name", RULES)
def test_the_update_does_not_know_the_size_of_gradients(name, scale):
    rule, step = RULES[name](), program(name)
    gradients = floats(jnp.float32, stream(steps=5))
    scaled = [jax.tree.map(lambda x: np.float32(scale) * x, g) for g in gradients]
    expected, _ = run(rule, gradients, step=step)
    close(run(rule, scaled, step=step)[0], expected, 1e-2, 1e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_finite_at_any_scale_and_type(name, dtype):
    rule = RULES[name]()
    w = {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}
    state = rule.init(w)
    kinds = {x.dtype for x in jax.tree.leaves(state) if x.ndim}
    assert kinds == {jnp.dtype(jnp.float32)}
    step = program(name) if dtype == jnp.float32 else jax.jit(rule.update)
    scales = (0, 0, 1, 1e-20, 1e-20, 1e-20, 1e-20, 1e20, 1e20, 1e20, 1e20, 1e-20, 0, 0)
    for scale, draw in zip(scales, stream(len(scales)), strict=True):
        g = jax.tree.map(lambda x, scale=scale: jnp.asarray(scale * x, dtype), draw)
        update, state = step(g, state)
        for x in jax.tree.leaves((update, state)):
            assert jnp.isfinite(x).all()
        for x in jax.tree.leaves(update):
            assert x.dtype == dtype and jnp.abs(x).max() < 50
            assert x.any() or not scale or name == "soap"
        if not any(x.any() for x in jax.tree.leaves(state.memory)):
            assert not any(x.any() for x in jax.tree.leaves(update))
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", RULES)
def test_can_be_differentiated_through(name):
    """As an inner optimizer, below a level that learns through it."""
    rule = RULES[name]()
    gradients = jnp.asarray(np.random.default_rng(8).standard_normal((3, 2, 2)))

    def outer(gradients):
        def step(state, g):
            update, state = rule.update(g, state)
            return state, update

        return jnp.sum(jax.lax.scan(step, rule.init(gradients[0]), gradients)[1] ** 2)

    slope = jax.jit(jax.grad(outer))(gradients)
    assert jnp.isfinite(slope).all() and slope.any()


@pytest.mark.parametrize("rule", [shampoo, soap])
def test_descends_where_axes_are_mixed(key, rule):
    """A quadratic of condition 1000 whose axes are not those of the matrix."""
    draw = np.random.default_rng(9)
    mix = np.linalg.qr(draw.standard_normal((6, 6)))[0] * np.logspace(0, -1.5, 6)
    mix, goal = jnp.asarray(mix @ mix.T, jnp.float32), jax.random.normal(key, (6, 6))

    def loss(w):
        return 0.5 * jnp.sum((w - goal) * (mix @ (w - goal)))

    def step(carry, _):
        w, state = carry
        update, state = tx.update(jax.grad(loss)(w), state, w)
        return (w + update, state), None

    w = jnp.zeros_like(goal)
    with jax.numpy_dtype_promotion("standard"):
        tx = rule(optax.cosine_decay_schedule(0.3, 150))
        (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), None, length=150)
    assert loss(w) < 1e-3 * loss(jnp.zeros_like(goal))


@pytest.mark.parametrize("rule", [shampoo, soap])
def test_weight_decay_is_decoupled(rule):
    tx = rule(0.1, weight_decay=0.5)
    w = 2 * jnp.ones((3, 3))
    update, _ = jax.jit(tx.update)(jnp.zeros((3, 3)), tx.init(w), w)
    close(update, -0.1 * 0.5 * w)


@pytest.mark.parametrize("rule", [shampoo, soap])
def test_composes_with_optax(rule):
    """Injected rates, one that changes; a mask; a chain; the rest of a model."""
    static = ("frequency", "max_size") + (("root", "eps") if rule is shampoo else ())
    rate = optax.linear_schedule(1.0, 0.0, 2)
    injected = optax.inject_hyperparams(rule, static_args=static)(rate, b2=0.8)
    plain = rule(rate, b2=0.8)
    w = jax.random.normal(jax.random.key(0), (4, 3))
    with jax.numpy_dtype_promotion("standard"):
        here, there = injected.init(w), plain.init(w)
        step, plain_step = jax.jit(injected.update), jax.jit(plain.update)
        for t in range(3):
            update, here = step(w, here, w)
            expected, there = plain_step(w, there, w)
            close(update, expected, 1e-4, 1e-5)
            assert bool(update.any()) == (t == 1 or t == 0 and rule is shampoo)

        params = {"kernel": jnp.abs(w), "bias": jnp.ones(3)}
        direction = scale_by_shampoo() if rule is shampoo else scale_by_soap()
        whole = optax.chain(optax.clip_by_global_norm(1.0), with_adamw(direction, 0.1))
        state, update = whole.init(params), jax.jit(whole.update)
        for _ in range(2):
            updates, state = update(params, state, params)
        assert (updates["bias"] < 0).all() and jnp.vdot(updates["kernel"], w**2) < 0


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (scale_by_shampoo, dict(b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
        (scale_by_shampoo, dict(b2=1.5), r"b2 must be in \[0, 1\), got 1.5"),
        (scale_by_shampoo, dict(root=3), "root must be 2 or 4, got 3"),
        (scale_by_shampoo, dict(grafting="sgd"), "grafting must be .* got 'sgd'"),
        (scale_by_shampoo, dict(eps=0.0), r"eps must be .* \(0, 1\), got 0.0"),
        (scale_by_shampoo, dict(frequency=0), "frequency must be .* >= 1, got 0"),
        (scale_by_soap, dict(frequency=2.5), "frequency must be .* got 2.5"),
        (scale_by_soap, dict(max_size=0), "max_size must be .* >= 1, got 0"),
        (scale_by_soap, dict(shampoo_beta=-0.1), r"shampoo_beta must be .* got -0.1"),
        (scale_by_soap, dict(b2=1.0), r"b2 must be in \[0, 1\), got 1.0"),
    ],
)
def test_wrong_arguments_say_so(rule, settings, message):
    with pytest.raises(ValueError, match=message):
        rule(**settings)


@pytest.mark.parametrize("rule", [scale_by_shampoo, scale_by_soap])
def test_leaves_that_are_no_matrices_are_named(rule):
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(3,\)"):
        rule().init({"bias": jnp.ones(3)})


@pytest.mark.parametrize("rule", [scale_by_shampoo, scale_by_soap])
def test_a_model_that_is_said_to_have_no_matrices_moves_too(rule):
    tx = with_adamw(rule(), 0.1, axes={"bias": None})
    w = {"bias": jnp.ones(3)}
    with jax.numpy_dtype_promotion("standard"):
        update, _ = tx.update(w, tx.init(w), w)
    close(update, {"bias": -0.1 * jnp.ones(3)}, 1e-4)
