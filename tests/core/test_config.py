"""Configs: to JSON and back, from a command line, and compared."""

import dataclasses
import json
from typing import Annotated, Literal

import pytest

from hope_jax.core import config as config_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cms:
    period: int | float = 1
    width: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    chunk: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    d_model: int = 128
    heads: int = 4
    rate: float = 0.1
    tied: bool = True
    mixer: Literal["hope", "attention"] = "hope"
    window: int | None = None
    memory: Memory | None = Memory()
    cms: tuple[Cms, ...] = (Cms(), Cms(period=float("inf")))
    shape: tuple[int, ...] = (2, 3)

    def __post_init__(self):
        if self.d_model % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide {self.d_model}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    model: Model
    seed: int = 0


RUN = Run(model=Model(name="tiny"))


def test_json_and_back_through_text():
    changed = config_lib.override(
        RUN, ["model.window=5", "model.memory=none", "model.rate=2"]
    )
    for run in (RUN, changed):
        text = json.dumps(config_lib.to_json(run), allow_nan=False)
        assert config_lib.from_json(Run, json.loads(text)) == run


def test_types_survive():
    run = config_lib.from_json(Run, {"model": {"name": "a", "rate": 3}})
    assert isinstance(run.model.rate, float)
    assert isinstance(run.model.cms, tuple)
    assert run.model.cms[1].period == float("inf")
    run = config_lib.override(RUN, ["model.cms.1.period=4"])
    assert isinstance(run.model.cms[1].period, int)


@pytest.mark.parametrize(
    ("setting", "read"),
    [
        ("seed=7", lambda r: r.seed == 7),
        ("model.rate=1e-3", lambda r: r.model.rate == 1e-3),
        ("model.tied=false", lambda r: r.model.tied is False),
        ("model.name=a=b", lambda r: r.model.name == "a=b"),
        ("model.mixer=attention", lambda r: r.model.mixer == "attention"),
        ("model.window=none", lambda r: r.model.window is None),
        ("model.window=16", lambda r: r.model.window == 16),
        ("model.memory=none", lambda r: r.model.memory is None),
        ("model.memory.chunk=3", lambda r: r.model.memory == Memory(chunk=3)),
        (
            "model.cms.0.period=64",
            lambda r: r.model.cms == (Cms(period=64), Cms(period=float("inf"))),
        ),
        (
            'model.cms=[{"period": 2}]',
            lambda r: r.model.cms == (Cms(period=2),),
        ),
        ("model.shape=4,5,6", lambda r: r.model.shape == (4, 5, 6)),
        ("model.shape=(4,)", lambda r: r.model.shape == (4,)),
    ],
)
def test_override(setting, read):
    assert read(config_lib.override(RUN, [setting]))


def test_overrides_that_need_one_another():
    """Neither of the two alone makes a valid config."""
    run = config_lib.override(RUN, ["model.d_model=90", "model.heads=3"])
    assert (run.model.d_model, run.model.heads) == (90, 3)
    with pytest.raises(ValueError, match="must divide 90"):
        config_lib.override(RUN, ["model.d_model=90"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.d_modl=1", "model .Model. has no field 'd_modl'. Did you mean 'd_mod"),
        ("modle.d_model=1", "Run has no field 'modle'. Did you mean 'model'"),
        ("seed=x", "seed must be a whole number, got 'x'"),
        ("seed=1.5", "seed must be a whole number, got '1.5'"),
        ("model.rate=nan", "model.rate must be a number"),
        ("model.tied=maybe", "model.tied must be true or false, got 'maybe'"),
        ("model.mixer=mamba", "model.mixer must be one of hope, attention, got 'mam"),
        ("model.window=wide", "model.window must be a whole number, got 'wide'"),
        ("model.cms.2.period=1", "model.cms has 2 entries, 0 to 1; got '2'"),
        ("model.cms.0.perod=1", "Did you mean 'period'"),
        ("model.cms.0.period=x", "period must be a whole number or a number, got 'x'"),
        ("model.memory=big", "model.memory is a whole Memory: set one of its fields"),
        ("seed.x=1", "seed is a whole number, so it has no field 'x'"),
        ("seed", "A setting reads 'field=value', got 'seed'"),
    ],
)
def test_wrong_settings_name_field_and_value(setting, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(RUN, [setting])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"model": {"name": "a"}, "sed": 1}, "Did you mean 'seed'"),
        ({"seed": 1}, "model is missing"),
        (
            {"model": {"name": "a", "d_model": "128"}},
            "model.d_model must be a whole number",
        ),
        (
            {"model": {"name": "a", "tied": 1}},
            "model.tied must be true or false, got 1",
        ),
        (
            {"model": {"name": "a", "heads": True}},
            "model.heads must be a whole number, got True",
        ),
        ({"model": {"name": "a", "cms": [{"width": "x"}]}}, "model.cms.0.width"),
        ({"model": 3}, "model must be the fields of Model, got 3"),
    ],
)
def test_wrong_json_names_field_and_value(data, message):
    with pytest.raises(ValueError, match=message):
        config_lib.from_json(Run, data)


def test_differences_name_each_field_with_both_values():
    other = config_lib.override(
        RUN, ["model.d_model=256", "model.cms.1.period=8", "model.memory=none"]
    )
    assert config_lib.differences(RUN, RUN) == []
    assert config_lib.differences(RUN, other) == [
        "model.d_model: saved 128, now 256",
        "model.memory.chunk: saved 8, now nothing",
        'model.cms.1.period: saved "inf", now 8',
        "model.memory: saved nothing, now null",
    ]


def test_a_field_that_a_saved_config_lacks_had_its_default():
    saved = config_lib.to_json(RUN)
    del saved["model"]["window"], saved["seed"]
    assert config_lib.differences(saved, RUN) == []
    assert config_lib.differences(saved, dataclasses.replace(RUN, seed=1)) == [
        "seed: saved 0, now 1"
    ]


def test_a_field_that_is_no_more_is_named():
    saved = config_lib.to_json(RUN) | {"speed": 9}
    assert config_lib.differences(saved, RUN) == ["speed: saved 9, now nothing"]


def test_a_whole_float_is_no_difference_but_a_bool_is():
    whole = dataclasses.replace(RUN, model=_with_rate(2))
    read = config_lib.from_json(Run, config_lib.to_json(whole))
    assert isinstance(read.model.rate, float)
    assert config_lib.differences(whole, read) == []
    assert config_lib.differences({"a": 1}, {"a": True}) == ["a: saved 1, now true"]


def test_what_no_config_can_hold():
    for value in (float("nan"), object()):
        with pytest.raises(ValueError, match="model.rate"):
            config_lib.to_json(dataclasses.replace(RUN, model=_with_rate(value)))


def _with_rate(value):
    return dataclasses.replace(RUN.model, rate=value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ring:
    kind: Literal["ring"] = "ring"
    width: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """One class of two kinds."""

    kind: Literal["bar", "rod"] = "bar"
    length: float | None = None
    ends: Memory = Memory()


SHAPES = config_lib.Kinds(
    "shape", {"ring": Ring(), "bar": Bar(), "rod": Bar(kind="rod", length=9.0)}
)
Shape = Annotated[Ring | Bar, SHAPES]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Shape | tuple[Shape, ...] = Ring()
    other: Shape | None = None

    @classmethod
    def migrated(cls, data):
        if "width" not in data:
            return data
        data = dict(data)
        return data | {"shape": {"kind": "ring", "width": data.pop("width")}}


def test_a_kind_is_chosen_by_its_name_and_then_set():
    made = config_lib.override(Drawing(), ["shape=rod", "shape.ends.chunk=3"])
    assert made.shape == Bar(kind="rod", length=9.0, ends=Memory(chunk=3))
    made = config_lib.override(made, ["other=bar", "other.length=2", "shape=ring"])
    assert made == Drawing(shape=Ring(), other=Bar(length=2.0))
    made = config_lib.override(made, ["shape=ring, bar", "shape.1.length=4"])
    assert made.shape == (Ring(), Bar(length=4.0))
    made = config_lib.override(made, ['shape={"kind": "rod"}', "other=none"])
    assert made == Drawing(shape=Bar(kind="rod"))


def test_kinds_go_to_json_and_back():
    for shape in (Ring(width=3), (Bar(kind="rod"), Ring())):
        drawing = Drawing(shape=shape, other=Bar())
        data = json.loads(json.dumps(config_lib.to_json(drawing)))
        assert config_lib.from_json(Drawing, data) == drawing
    assert config_lib.from_json(Drawing, {"shape": "bar"}).shape == Bar()


def test_what_was_saved_before_is_migrated():
    assert config_lib.from_json(Drawing, {"width": 5}) == Drawing(shape=Ring(width=5))
    assert config_lib.differences({"width": 5}, Drawing(shape=Ring(width=5))) == []


@pytest.mark.parametrize(
    "setting, message",
    [
        ("shape=rung", "shape must be one of ring, bar, rod, .* mean 'ring'"),
        ("shape=ring,rung", "shape must be one of ring, bar, rod, got 'rung'"),
        ("shape.length=2", r"shape \(Ring\) has no field 'length'"),
        ("shape.kind=bar", r"shape\.kind is not set by itself: set shape"),
        ("other.width=2", "other is none, so it has no field 'width'"),
        ('shape={"width": 2}', "shape must be a shape: a name, or fields with a kind"),
    ],
)
def test_kinds_are_checked(setting, message):
    with pytest.raises(ValueError, match=message):
        config_lib.override(Drawing(), [setting])


def test_what_a_field_of_several_asks_for_is_said_in_words():
    with pytest.raises(ValueError, match="shape must be several, each a whole number"):
        config_lib.from_json(Model, {"name": "a", "shape": 5})


def test_a_registry_is_checked():
    with pytest.raises(ValueError, match="the shape 'disc' calls itself 'ring'"):
        config_lib.Kinds("shape", {"disc": Ring()})
    assert SHAPES.of("rod").length == 9.0 and SHAPES.of(Ring()) == Ring()


def test_what_is_set_now_is_not_migrated():
    """A migration is for what was saved: of a command line it would hide a mistake."""
    with pytest.raises(ValueError, match="Drawing has no field 'width'"):
        config_lib.override(Drawing(), ["width=5"])
    whole = 'drawing={"width": 5}'
    with pytest.raises(ValueError, match=r"drawing \(Drawing\) has no field 'width'"):
        config_lib.override(Wall(), [whole])
    assert config_lib.from_json(Wall, {"drawing": {"width": 5}}) == Wall(
        drawing=Drawing(shape=Ring(width=5))
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wall:
    drawing: Drawing = Drawing()


def test_a_registry_says_which_of_it_are_something():
    assert SHAPES.which(lambda made: made.kind != "bar") == ("ring", "rod")
    assert config_lib.Kinds.of_entries("shape", Ring(), Bar()).get("bar") == Bar()


def test_an_option_that_its_choice_does_not_read():
    refuse = config_lib.refuse_unread
    refuse(Ring(), "width", "paint", "none", ["thick"])
    refuse(Ring(width=2), "width", "paint", "thick", ["thick"])
    message = "width=2 is read by nothing: paint='none' .* 'thick' or 'thin' would. "
    with pytest.raises(ValueError, match=message + "Leave width at 1, or choose"):
        refuse(Ring(width=2), "width", "paint", "none", ["thick", "thin"])
