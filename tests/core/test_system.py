import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hope_jax.core import system
from hope_jax.core.clock import Clock
from hope_jax.core.level import Level, begin, unroll
from hope_jax.core.system import (
    Box,
    Edge,
    System,
    as_level,
    by_frequency,
    describe,
    live,
    rows,
    start,
)
from hope_jax.core.transfer import attend
from hope_jax.optim.rules.dgd import dgd
from hope_jax.plot import draw
from tests import compare

close = compare.within()


def box(name, period=1.0, level=None):
    if level is not None:
        return Box(name, level.clock, 10, level=level)
    return Box(name, Clock(period=period), 10, "½‖Mk − v‖²", "GD")


def names(sys):
    return [[b.name for b in level] for level in by_frequency(sys)]


def hope() -> System:
    inner = ("k", "v", "eta", "alpha")
    slow, fast, long = 2.0**19, 16.0, 4096.0
    cms = (("CMS 64", 64.0), ("CMS 256", 256.0), ("CMS 4096", long))
    boxes = (
        box("embedding", slow),
        *(box(name, fast) for name in inner),
        box("memory", fast),
        *(box(name, period) for name, period in cms),
        box("head", slow),
    )
    chain = ("memory", "CMS 64", "CMS 256", "CMS 4096", "head")
    edges = (
        *(Edge("embedding", name, "initialise") for name in (*inner, "memory")),
        *(Edge(name, "memory", "generate") for name in inner),
        Edge("memory", "memory", "generate", False),
        *(Edge(a, b, "backprop") for a, b in zip(chain, chain[1:], strict=False)),
    )
    return System(boxes, edges)


# Order --------------------------------------------------------------------------------


def test_levels_are_ordered_by_frequency_and_shared():
    assert names(hope()) == [
        ["embedding", "head"],
        ["CMS 4096"],
        ["CMS 256"],
        ["CMS 64"],
        ["k", "v", "eta", "alpha", "memory"],
    ]


def test_of_equal_frequency_the_one_that_is_needed_is_faster():
    """M3: the moments are faster than the weights that read them."""
    m3 = System(
        (box("slow moment", 10), *map(box, ("weights", "moment", "variance"))),
        (
            Edge("moment", "weights", "condition"),
            Edge("variance", "weights", "condition"),
            Edge("weights", "moment", "generate"),  # gradients: no present state needed
            Edge("slow moment", "weights", "condition"),
        ),
    )
    assert names(m3) == [["slow moment"], ["weights"], ["moment", "variance"]]


def test_frozen_and_non_parametric_are_the_ends():
    ends = System(
        (box("attention", 0), box("mlp", math.inf), box("head")),
        (Edge("attention", "mlp", "attend"),),
    )
    assert names(ends) == [["mlp"], ["head"], ["attention"]]


# Errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("boxes", "edges", "message"),
    [
        ("ab", [("c", "b", "backprop")], "there is no level 'c'. Known: a, b."),
        ("aa", [], "two levels named 'a'"),
        ("ab", [("a", "b", "backprop"), ("b", "a", "backprop")], "form a circle: "),
        ("ab", [("a", "b", "condition"), ("b", "a", "condition")], "present state"),
        ("ab", [("a", "b", "initialise")], "a start comes from a slower level"),
        ("ab", [("a", "b", "attend")], "one end must be non-parametric"),
    ],
)
def test_systems_that_make_no_sense_are_refused(boxes, edges, message):
    with pytest.raises(ValueError, match=message):
        System(tuple(map(box, boxes)), tuple(Edge(*edge) for edge in edges))


def test_names_that_are_almost_right():
    two = (box("memory", 16), box("head"))
    with pytest.raises(ValueError, match="'memroy'. Did you mean 'memory'?"):
        System(two, (Edge("memroy", "head", "backprop"),))
    with pytest.raises(ValueError, match="'backprob'. Did you mean 'backprop'?"):
        Edge("memory", "head", "backprob")
    with pytest.raises(KeyError, match="Did you mean 'memory'?"):
        System(two)["memori"]


def test_edges_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="only 'generate' may lead .* to itself"):
        Edge("a", "a", "condition")
    with pytest.raises(ValueError, match="a backprop edge is a gradient flow"):
        Edge("a", "b", "backprop", differentiable=False)
    ends = (box("attention", 0), box("mlp", 4))
    for edge, message in (
        (Edge("attention", "mlp", "condition"), "has no parameters; use 'attend'"),
        (Edge("attention", "mlp", "backprop"), "has no gradient; use 'attend'"),
        (Edge("mlp", "attention", "initialise"), "starts nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            System(ends, (edge,))
    mutual = Edge("a", "b", "condition"), Edge("b", "a", "condition")
    System((box("a"), box("b", 4)), mutual)  # each a constant of the other's problem
    System((box("a", math.inf), box("b", math.inf)), mutual)  # neither moves


def test_boxes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="parameters must be at least 0, got -1"):
        Box("a", Clock(), -1, "", "")
    with pytest.raises(ValueError, match="name must not be empty"):
        Box("", Clock(), 1, "", "")
    with pytest.raises(ValueError, match="differs from its level's own"):
        Box("a", Clock(period=3), 1, "", "", projection())
    with pytest.raises(ValueError, match="rule of 'a' is 'GD', what its level says, "):
        Box("a", Clock(), 1, "", "Adam", projection()._replace(flow_name="GD"))


# Running ------------------------------------------------------------------------------


def projection(**changes) -> Level:
    """Makes (k, v, q) of a token; learns nothing by itself."""
    return Level(
        init=lambda key: 0.5 * jax.random.normal(key, (3, 2, 2)),
        read=lambda w, x: tuple(jnp.einsum("nij,j->ni", w, x)),
        objective=lambda w, x: jnp.zeros(()),
        flow=optax.sgd(0.1),
        clock=Clock(period=math.inf),
    )._replace(**changes)


def memory(**changes) -> Level:
    """Linear attention on what the projection makes."""

    def objective(m, item):
        k, v, _ = item[1]["projection"]
        return -jnp.vdot(m @ k, v)

    return Level(
        init=lambda key: jnp.zeros((2, 2)),
        read=lambda m, item: m @ item[1]["projection"][2],
        objective=objective,
        flow=optax.sgd(1.0),
        read_at="post",
    )._replace(**changes)


def linear_transformer(differentiable=True, **changes) -> System:
    return System(
        (box("projection", level=projection()), box("memory", level=memory(**changes))),
        (Edge("projection", "memory", "generate", differentiable),),
    )


def linear_attention(w, x):
    k, v, q = (x @ w_i.T for w_i in w)
    return jnp.tril(q @ k.T) @ v


def initial(sys, key):
    return as_level(sys, echo, flow=optax.identity()).init(key)


def test_live_is_linear_attention(key):
    x = jax.random.normal(key, (6, 2))
    params = {"projection": projection().init(key), "memory": jnp.zeros((2, 2))}

    def ours(params, differentiable=True):
        sys = linear_transformer(differentiable)
        return live(sys, start(sys, params), x)[1]["memory"]

    close(ours(params), linear_attention(params["projection"], x), rtol=1e-4)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(ours(p))))(params)
    expected = jax.grad(lambda w: jnp.sum(jnp.sin(linear_attention(w, x))))
    close(gradient["projection"], expected(params["projection"]), rtol=1e-3, atol=1e-4)
    stopped = jax.grad(lambda p: jnp.sum(jnp.sin(ours(p, False))))(params)
    np.testing.assert_array_equal(stopped["projection"], 0.0)
    assert float(jnp.abs(stopped["memory"]).max()) > 0  # its start is not detached


def test_levels_that_do_not_match_are_named(key):
    """Before anything is computed."""
    sys, x = linear_transformer(), jnp.ones((6, 2))
    params = {"projection": projection().init(key), "memory": jnp.zeros((2, 2))}
    states = start(sys, params)
    lacking = {name: p for name, p in params.items() if name != "memory"}
    with pytest.raises(ValueError, match="params lacks memory; it must have memory, "):
        start(sys, lacking)
    with pytest.raises(ValueError, match="params has more, which nothing asks for"):
        start(sys, params | {"more": 1.0})
    with pytest.raises(ValueError, match="states lacks projection"):
        live(sys, {"memory": states["memory"]}, x)
    with pytest.raises(ValueError, match="states\\['memory'\\] is no LevelState, got"):
        live(sys, states | {"memory": params["memory"]}, x)


def test_live_in_two_pieces_is_live(key):
    sys = linear_transformer()
    x = jax.random.normal(key, (6, 2))
    params = {"projection": projection().init(key), "memory": jnp.zeros((2, 2))}
    states, whole = live(sys, start(sys, params), x)
    half, first = live(sys, start(sys, params), x[:2])
    rest, second = live(sys, half, x[2:])
    close(jnp.concatenate([first["memory"], second["memory"]]), whole["memory"])
    close(rest, states)


def test_condition_gives_parameters_and_attend_gives_answers(key):
    """A reader of the memory's state, and of a running softmax over the tokens."""
    reader = Level(
        init=lambda key: jnp.ones((2,)),
        read=lambda w, item: w * (item[1]["memory"] @ item[0] + item[1]["attention"]),
        objective=lambda w, item: jnp.zeros(()),
        flow=optax.sgd(0.1),
        clock=Clock(period=math.inf),
    )
    attention = attend(through=lambda x: (x, x, x))
    base = linear_transformer()
    sys = System(
        (*base.boxes, box("attention", level=attention), box("reader", level=reader)),
        (
            *base.edges,
            Edge("memory", "reader", "condition"),
            Edge("attention", "reader", "attend"),
        ),
    )
    x = jax.random.normal(key, (5, 2))
    params = {"projection": projection().init(key), "memory": jnp.zeros((2, 2))}
    params |= {"attention": (), "reader": jnp.array([1.0, 2.0])}
    _, reads = live(sys, start(sys, params), x)
    w = params["projection"].at[2].set(jnp.eye(2))  # the reader asks x itself
    scores = jnp.where(jnp.tri(5, dtype=bool), x @ x.T / 2**0.5, -jnp.inf)
    soft = jax.nn.softmax(scores, axis=-1) @ x
    expected = (linear_attention(w, x) + soft) * jnp.array([[1.0, 2.0]])
    close(reads["reader"], expected, rtol=1e-4)


def two_layers(periods=(2, 1), **changes):
    first = Level(
        init=lambda key: jax.random.normal(key, (2, 2)),
        read=lambda w, x: jnp.tanh(w @ x),
        objective=lambda w, x: jnp.sum(w),  # not at the end of the flow: unused
        flow=optax.sgd(0.1),
        clock=Clock(period=periods[0]),
    )
    second = first._replace(
        read=lambda w, item: w @ item[1]["first"],
        objective=lambda w, item: 0.5 * jnp.sum((w @ item[1]["first"] - 1.0) ** 2),
        clock=Clock(period=periods[1]),
    )._replace(**changes)
    return System(
        (box("first", level=first), box("second", level=second)),
        (Edge("first", "second", "backprop"),),
    )


def test_backprop_edges_make_one_gradient_flow_on_two_clocks(key):
    sys = two_layers()
    params = initial(sys, key)
    x = jax.random.normal(key, (4, 2))
    states, reads = live(sys, start(sys, params), x)

    def loss(w, x_t):
        return 0.5 * jnp.sum((w["second"] @ jnp.tanh(w["first"] @ x_t) - 1.0) ** 2)

    w, owed = params, jnp.zeros((2, 2))
    for t, x_t in enumerate(x, 1):
        close(reads["second"][t - 1], w["second"] @ jnp.tanh(w["first"] @ x_t), 1e-4)
        gradient = jax.grad(loss)(w, x_t)
        owed = owed + gradient["first"]
        w = w | {"second": w["second"] - 0.1 * gradient["second"]}
        if t % 2 == 0:
            w, owed = w | {"first": w["first"] - 0.1 * owed}, jnp.zeros((2, 2))
    close({name: states[name].params for name in states}, w, rtol=1e-4)


def test_a_flow_in_a_gradient_flow_is_given_its_inputs(key):
    """Delta gradient descent on the second layer needs what the first one said."""
    sys = two_layers(
        (math.inf, 1), flow=dgd(0.3), inputs=lambda w, item: item[1]["first"]
    )
    params = initial(sys, key)
    x = jax.random.normal(key, (1, 2))
    states, _ = live(sys, start(sys, params), x)
    w, hidden = params["second"], jnp.tanh(params["first"] @ x[0])
    rate = 0.3 / (1 + 0.3 * jnp.vdot(hidden, hidden))
    expected = w - rate * jnp.outer(w @ hidden + (w @ hidden - 1.0), hidden)
    close(states["second"].params, expected, rtol=1e-4)


@pytest.mark.parametrize("gradient", ["exact", "first_order", "none"])
def test_levels_in_a_gradient_flow_keep_their_outer_gradient(key, gradient):
    sys = two_layers((1, 1), gradient=gradient)
    x = jax.random.normal(key, (3, 2))

    def outer(params):
        return jnp.sum(jnp.sin(live(sys, start(sys, params), x)[1]["second"]))

    got = jax.grad(outer)(initial(sys, key))
    assert (float(jnp.abs(got["second"]).max()) > 0) == (gradient != "none")
    assert float(jnp.abs(got["first"]).max()) > 0


@pytest.mark.parametrize("gradient", ["exact", "none"])
def test_a_system_as_a_level_is_differentiable_in_its_start(key, gradient):
    sys = linear_transformer()
    level = as_level(sys, echo, flow=optax.sgd(0.1), gradient=gradient)
    sequences = jax.vmap(copy_task)(jax.random.split(key, 2))

    def outer(params):
        state, _ = unroll(level, begin(level, params), sequences)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(state.params))

    got = jax.grad(outer)(level.init(key))
    assert (float(jnp.abs(got["projection"]).max()) > 0) == (gradient != "none")


def test_a_start_from_a_slower_level_and_its_gradient(key):
    """MAML as a system: a frozen box says where the memory starts."""
    frozen = memory(
        init=lambda key: jnp.eye(2), clock=Clock(period=math.inf), read=lambda m, x: ()
    )
    base = linear_transformer()
    x = jax.random.normal(key, (4, 2))

    def total(m_0, differentiable):
        sys = System(
            (*base.boxes, box("start", level=frozen)),
            (*base.edges, Edge("start", "memory", "initialise", differentiable)),
        )
        params = {"projection": projection().init(key), "start": m_0}
        assert set(initial(sys, key)) == set(params)
        return jnp.sum(live(sys, start(sys, params), x)[1]["memory"])

    q = x @ projection().init(key)[2].T
    gradient = jax.grad(total)(jnp.eye(2), True)
    close(gradient, jnp.tile(q.sum(0), (2, 1)), rtol=1e-4)  # d sum(m_0 q_t)
    np.testing.assert_array_equal(jax.grad(total)(jnp.eye(2), False), 0.0)


def gently():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05))


def copy_task(key, length=5):
    """Tokens that the memory should give back as they are."""
    x = jax.random.normal(key, (length, 2))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def echo(params, seen):
    x, reads = seen
    return jnp.mean((reads["memory"] - x) ** 2)


def test_a_system_of_two_levels_trains_inside_a_third(key):
    sys = linear_transformer()
    level = as_level(sys, echo, flow=gently())
    sequences = jax.vmap(copy_task)(jax.random.split(key, 200))
    state = begin(level, level.init(key))
    learn = jax.jit(lambda state, sequences: unroll(level, state, sequences))
    state, reads = learn(state, sequences)
    error = jnp.mean((reads["memory"] - sequences) ** 2, axis=(1, 2))
    assert error[-20:].mean() < 0.3 * error[:5].mean()
    learn(state, sequences[::-1])
    assert learn._cache_size() == 1


def test_a_system_is_a_box_of_a_system(key):
    """Two levels inside one, which with another level is a system again."""
    inner = as_level(linear_transformer(), echo, flow=gently())
    readout = Level(
        init=lambda key: jnp.zeros(()),
        read=lambda b, item: item[1]["inner"]["memory"] + b,
        objective=lambda b, item: jnp.mean(
            (item[1]["inner"]["memory"] + b - item[0]) ** 2
        ),
        flow=optax.sgd(0.1),
        clock=Clock(period=5),
    )
    inner_box = Box.of("inner", inner._replace(objective_name="echo"))
    assert inner_box.objective == "echo"
    assert inner_box.parameters == 3 * 2 * 2 + 2 * 2
    outer = System(
        (inner_box, box("readout", level=readout)),
        (Edge("inner", "readout", "backprop"),),
    )
    assert names(outer) == [["readout"], ["inner"]]
    sequences = jax.vmap(copy_task)(jax.random.split(key, 200)) + 0.5
    params = initial(outer, key)
    states, reads = live(outer, start(outer, params), sequences)
    error = jnp.mean((reads["readout"] - sequences) ** 2, axis=(1, 2))
    assert error[-20:].mean() < 0.5 * error[:5].mean()
    assert float(states["readout"].params) != 0.0
    moved = states["inner"].params["projection"] - params["inner"]["projection"]
    assert float(jnp.abs(moved).max()) > 0.05


def test_systems_that_cannot_run_say_why(key):
    with pytest.raises(ValueError, match="'k' only describes itself"):
        as_level(System((box("k"),)), echo, flow=optax.identity())
    loop = System(
        (box("a", level=projection()), box("b", level=projection())),
        (Edge("a", "b", "generate"), Edge("b", "a", "generate")),
    )
    with pytest.raises(ValueError, match="no order to run the levels in"):
        as_level(loop, echo, flow=optax.identity())
    twice = System(
        (box("a", level=projection()), box("b", level=projection())),
        (Edge("a", "b", "generate"), Edge("a", "b", "condition")),
    )
    with pytest.raises(ValueError, match="'a' gives 'b' two things"):
        as_level(twice, echo, flow=optax.identity())
    late = two_layers(read_at="post")
    params = initial(late, key)
    with pytest.raises(ValueError, match="'second' shares a gradient flow"):
        live(late, start(late, params), jnp.zeros((3, 2)))
    around = System(
        (*two_layers().boxes, box("between", level=projection())),
        (
            Edge("first", "second", "backprop"),
            Edge("first", "between", "generate"),
            Edge("between", "second", "generate"),
        ),
    )
    with pytest.raises(ValueError, match="a gradient flow needs what comes out of it"):
        as_level(around, echo, flow=optax.identity())


# Showing ------------------------------------------------------------------------------


def test_describe_says_what_is_there():
    table = rows(hope())
    assert [row["name"] for row in table[:3]] == ["embedding", "head", "CMS 4096"]
    assert [row["level"] for row in table] == list("1123455555")
    memory_row = table[-1]
    assert memory_row["period"] == "16 items"
    assert memory_row["edges"] == "generate memory (stopped), backprop CMS 64"
    lines = describe(hope()).splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 12
    ends = System((box("a", 0), box("b", math.inf), box("c", 1), box("d", 4096)))
    assert {row["name"]: row["period"] for row in rows(ends)} == {
        "a": "non-parametric",
        "b": "frozen",
        "c": "every item",
        "d": "4,096 items",
    }
    piped = System((Box("a", Clock(), 1, "|x|", "GD"),))
    assert r"\|x\|" in describe(piped)


def test_draw_keeps_boxes_apart_and_everything_in_the_picture(tmp_path):
    figure = draw(hope(), ylabel="pace", title="Hope")
    figure.savefig(tmp_path / "levels.png")
    assert (tmp_path / "levels.png").stat().st_size > 10_000
    axes = figure.axes[0]
    assert (axes.get_ylabel(), axes.get_title("left")) == ("pace", "Hope")
    figure.draw_without_rendering()
    patches = [p for p in axes.patches if type(p).__name__ == "FancyBboxPatch"]
    arrows = [p for p in axes.patches if type(p).__name__ == "FancyArrowPatch"]
    assert len(patches) == 10 and len(arrows) == len(hope().edges)
    frames = [p.get_window_extent() for p in patches]
    for i, a in enumerate(frames):
        assert not any(a.overlaps(b) for b in frames[:i])
    view = axes.get_window_extent()
    for arrow in arrows:
        frame = arrow.get_window_extent()
        assert view.y0 <= frame.y0 and frame.y1 <= view.y1
        assert view.x0 <= frame.x0 and frame.x1 <= view.x1
    for name, frame in zip(hope().boxes, frames, strict=True):
        text = next(t for t in axes.texts if t.get_text() == name.name)
        inside = text.get_window_extent()
        assert frame.x0 <= inside.x0 and inside.x1 <= frame.x1
    over = arrows[[e.kind for e in hope().edges].index("generate")]
    assert over.get_window_extent().y1 > max(f.y1 for f in frames)  # k over v to memory
    height = {
        b.name: p.get_bbox().y0 for b, p in zip(hope().boxes, patches, strict=True)
    }
    assert height["memory"] > height["CMS 64"] > height["CMS 4096"] > height["head"]
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert len(legend) == 3


def test_draw_all_kinds_and_the_ends_of_the_axis():
    ends = System(
        (box("attention", 0), box("mlp", math.inf), box("a"), box("b", 8)),
        (
            Edge("attention", "mlp", "attend"),
            Edge("a", "b", "condition"),
            Edge("a", "b", "generate"),
            Edge("mlp", "a", "initialise"),
        ),
    )
    figure = draw(ends)
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert set(labels) == {"non-parametric", "frozen", "every item", "8 items"}
    assert draw(System((box("alone"),))).legends == []


def test_examples_in_docstrings():
    results = doctest.testmod(system)
    assert results.attempted > 0 and results.failed == 0


def test_a_start_is_of_parameters():
    system = System((box("a", level=projection()),))
    params = {"a": jnp.zeros((2, 2))}
    with pytest.raises(ValueError, match=r"params\['a'\] is a LevelState, where"):
        start(system, start(system, params))
