"""What a notebook shows: everything there is to say, and no text as markup."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

import hope_jax
from hope_jax.core import show
from hope_jax.models import lm
from tests.models import small


def cells(html):
    """The texts of a table's cells, a line each; of folded ones their outside."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def error(w, x):
    return jnp.sum((w - x) ** 2)


def level(**more):
    start, read = (lambda key: jnp.zeros(3)), (lambda w, x: w)
    return hope_jax.Level(start, read, error, optax.adam(0.1), **more)


def test_a_level_says_what_it_is():
    said = dict(cells(level(clock=hope_jax.Clock(period=4))._repr_html_())[1:])
    assert said["descends"] == "error"
    assert said["by"] == "scale_by_adam, scale"
    assert said["moves"] == "period 4, anchor 1"
    named = level(objective_name="a < b", flow_name="Adam")
    said = dict(cells(named._repr_html_())[1:])
    assert (said["descends"], said["by"]) == ("a &lt; b", "Adam")


def test_a_system_is_shown_as_it_is_described():
    system = hope_jax.System(
        (
            hope_jax.Box.of("<memory>", level()),
            hope_jax.Box("head", hope_jax.Clock(period=8), 2_000, "loss", "AdamW"),
        ),
        (hope_jax.Edge("head", "<memory>", "initialise"),),
    )
    head, *lines = cells(system._repr_html_())
    assert head[1:6] == ["name", "period", "parameters", "objective", "rule"]
    assert lines[0][1:] == [
        *("head", "8 items", "2K", "loss", "AdamW", "initialise &lt;memory&gt;")
    ]
    assert lines[1][1] == "&lt;memory&gt;" and lines[1][4] == "error"


def test_a_config_shows_its_fields_and_marks_what_was_chosen():
    html = small.HOPE._repr_html_()
    assert html.startswith("<table><caption") and ">ModelConfig<" in html
    fields = [field.name for field in dataclasses.fields(small.HOPE)]
    assert [name for name in fields if f">{name}</td>" in html] == fields
    assert re.search(r">vocab</td><td[^>]*><b>13</b>", html)
    assert re.search(r">layers</td><td[^>]*>2<", html)  # as by default
    folded = re.findall(r"<summary>(.*?)</summary>", html)
    assert {"self_modifying", "CMSConfig", "MemoryConfig"} <= set(folded)
    assert "CMSLevel, CMSLevel, CMSLevel" in folded


def test_a_state_shows_where_its_arrays_are():
    state = small.start(small.HOPE_ATTENTION)
    html = state._repr_html_()
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    arrays = len(jax.tree.leaves(state))
    assert f"LMState: {arrays} arrays, {count:,} numbers" in html
    assert [".position", "int32[2]"] in cells(html)
    begun = hope_jax.begin(level(), jnp.zeros(3))
    assert [".params", "float32[3]"] in cells(begun._repr_html_())
    many = cells(show.state(dict.fromkeys(range(show.MOST + 7), jnp.zeros(2))))
    assert len(many) == show.MOST + 2 and many[-1][0] == "and 7 more"


def test_nothing_is_read_of_an_array():
    shapes = jax.eval_shape(
        lambda: lm.initial_state(*small.built(small.HOPE_ATTENTION), 2)
    )
    assert "LMState" in shapes._repr_html_()
