"""Configs: frozen dataclasses that nest, as JSON, from the command line, compared.

A config holds ints, floats, bools, strings, None, tuples and other configs; its
annotations say which, and every value that comes in as text or JSON is held to them.
Where a field may hold one of several configs, it is annotated
`Annotated[Base, KINDS]` with a `Kinds`, the registry of them, and the field `kind` of
each says which one it is.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar, Union


class _OfAKind(Protocol):
    @property
    def kind(self) -> str: ...


C = TypeVar("C")
K = TypeVar("K", bound=_OfAKind)
Json = Any

_MISSING = object()
_LEAST, _MOST = 2.0**-126, 2.0**127  # in float32, with all digits


class Kinds(Generic[K]):
    """The configs that a field may hold, by kind.

    Args:
      what: the thing they are kinds of, for messages.
      made: for each kind the config that its name alone stands for. Its class is a
        frozen dataclass with a field `kind`; several kinds may share one.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Disc:
    ...     kind: Literal["disc"] = "disc"
    ...     radius: float = 1.0
    >>> shapes = Kinds("shape", {"disc": Disc()})
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Drawing:
    ...     shape: Annotated[Any, shapes] = Disc()
    >>> override(Drawing(), ["shape=disc", "shape.radius=2"]).shape
    Disc(kind='disc', radius=2.0)
    """

    def __init__(self, what: str, made: Mapping[str, K]):
        self.what = what
        self._made = dict(made)
        for kind, config in self._made.items():
            if config.kind != kind:
                raise ValueError(f"the {what} {kind!r} calls itself {config.kind!r}.")

    @classmethod
    def of_entries(cls, what: str, *entries: K) -> "Kinds[K]":
        """Those of `entries`, each by its own `kind`."""
        return cls(what, {entry.kind: entry for entry in entries})

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, kind: object) -> bool:
        return kind in self._made

    def get(self, kind: str, path: str = "") -> K:
        """What a kind stands for; `path` is the field that asks for it.

        Raises:
          ValueError: there is no such kind.
        """
        if kind not in self._made:
            raise ValueError(
                f"{path or self.what} must be one of {', '.join(self)}, got {kind!r}."
                f"{did_you_mean(kind, self)}"
            )
        return self._made[kind]

    def which(self, has: Callable[[K], bool]) -> tuple[str, ...]:
        """The kinds of which `has` is true."""
        return tuple(kind for kind, made in self._made.items() if has(made))

    def of(self, value: Any, path: str = "") -> Any:
        """`value`, or what it stands for if it is a name; see `get`."""
        return self.get(value, path) if isinstance(value, str) else value


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of a message on a name that is not `known`: a likely one, or nothing.

    >>> did_you_mean("mometum", ["momentum", "muon"])
    " Did you mean 'momentum'?"
    """
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def at_least(config: Any, **bounds: float) -> None:
    """Refuses a config whose fields are below their bounds; None is no number.

    Raises:
      ValueError: names the field and its value.
    """
    for name, bound in bounds.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}.")


def at_most(config: Any, **bounds: float) -> None:
    """Refuses a config whose fields are above their bounds; None is no number.

    Raises:
      ValueError: names the field and its value.
    """
    for name, bound in bounds.items():
        value = getattr(config, name)
        if value is not None and not value <= bound:
            raise ValueError(f"{name} must be at most {bound}, got {value}.")


def float32(config: Any, *names: str) -> None:
    """Refuses fields that are no numbers in float32: infinite, or lost to 0.

    Raises:
      ValueError: names the field and its value.
    """
    for name in names:
        value = getattr(config, name)
        if value is None or value == 0:
            continue
        if not _LEAST <= abs(value) <= _MOST:
            raise ValueError(
                f"{name} must be 0 or lie between {_LEAST:.0e} and {_MOST:.0e}, as "
                f"numbers of float32 do; got {value}."
            )


def one_of(config: Any, **choices: Iterable[Any]) -> None:
    """Refuses a config with a field that is none of its choices.

    Raises:
      ValueError: names the field and its value.
    """
    for name, allowed in choices.items():
        value = getattr(config, name)
        if value not in allowed:
            known = ", ".join(map(str, allowed))
            raise ValueError(f"{name} must be one of {known}, got {value!r}.")


def refuse_unread(
    config: Any, option: str, choice: str, chosen: str, readers: Collection[str]
) -> None:
    """Refuses a config that sets an option which the choices it makes do not read.

    Args:
      config: a dataclass instance.
      option: a field of it.
      choice: the choice on which it depends, as one sets it.
      chosen: what is chosen.
      readers: what would have to be chosen for the option to be read.

    Raises:
      ValueError: names the option, its value and the choices that read it.
    """
    value, default = getattr(config, option), default_of(type(config), option)
    if chosen in readers or value == default:
        return
    raise ValueError(
        f"{option}={value!r} is read by nothing: {choice}={chosen!r} does not read it, "
        f"{choice} {' or '.join(map(repr, readers))} would. Leave {option} at "
        f"{default!r}, or choose one of those."
    )


def default_of(cls: type, name: str) -> Any:
    """What a field of a config is if it is not set."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    return fields[name].default


def to_json(config: Any) -> Json:
    """`config` as dicts, lists and scalars; infinities become "inf" and "-inf".

    Raises:
      ValueError: a value that is not plain data (a NaN, an array, a function).
    """
    return _encode(config, "")


def from_json(cls: type[C], data: Json) -> C:
    """The config of type `cls` that `to_json` wrote.

    Fields that are absent take their defaults. A class whose fields have changed has a
    `migrated` class method, which is given the data of its configs as they were saved
    and returns them with its fields of today. What `override` sets is of today, and is
    not migrated.

    Raises:
      ValueError: an unknown field, a missing one without a default, or a value of
        another type than the field's; the message names the field and the value.
    """
    return _decode(cls, data, "", saved=True)


def override(config: C, settings: Iterable[str]) -> C:
    """A copy of `config` with some fields set, as on a command line.

    All settings are applied before the config is built, so two fields that must agree
    can be changed together. Later settings win.

    Args:
      config: a dataclass instance.
      settings: `"path=value"`, where the path joins field names and tuple indices with
        dots (`model.cms.0.period=64`). Values are read by the field's annotation:
        numbers, `true` and `false`, `none` where it is allowed, `a,b,c` for a tuple of
        scalars, the name of a kind (`model.mixer=tnt`; then `model.mixer.shard=64`) or
        several, JSON for a whole config or a tuple of configs.

    Raises:
      ValueError: no such field, or not such a value.

    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Inner:
    ...     width: int = 2
    >>> @dataclasses.dataclass(frozen=True, kw_only=True)
    ... class Outer:
    ...     parts: tuple[Inner, ...] = (Inner(), Inner())
    >>> override(Outer(), ["parts.1.width=8"]).parts[1]
    Inner(width=8)
    """
    data = to_json(config)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ValueError(f"A setting reads 'field=value', got {setting!r}.")
        data = _set(type(config), data, path.split("."), text, "")
    return _decode(type(config), data, "")


def differences(saved: Any, current: Any) -> list[str]:
    """What changed between two configs (or their JSON), one line for each field.

    Saved JSON that lacks fields of the current config, as that of an earlier version
    does, had their defaults.

    >>> differences({"model": {"d_model": 128}}, {"model": {"d_model": 256}})
    ['model.d_model: saved 128, now 256']
    """
    if dataclasses.is_dataclass(current) and isinstance(saved, Mapping):
        try:
            saved = from_json(type(current), saved)
        except ValueError:
            pass  # it has fields that are no more: shown as they are
    before, after = (dict(_flat(to_json(c), "")) for c in (saved, current))

    def said(values, path):
        return json.dumps(values[path]) if path in values else "nothing"

    def same(path):
        a, b = before.get(path, _MISSING), after.get(path, _MISSING)
        return a == b and isinstance(a, bool) == isinstance(
            b, bool
        )  # 1 is 1.0, not True

    return [
        f"{path}: saved {said(before, path)}, now {said(after, path)}"
        for path in [*before, *(path for path in after if path not in before)]
        if not same(path)
    ]


def _flat(data: Json, path: str):
    """Pairs (path, scalar); an empty list or config counts as a scalar."""
    if isinstance(data, dict | list) and data:
        items = data.items() if isinstance(data, dict) else enumerate(data)
        for name, value in items:
            yield from _flat(value, _join(path, name))
    else:
        yield path, data


def _encode(value: Any, path: str) -> Json:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _encode(getattr(value, field.name), _join(path, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {str(k): _encode(v, _join(path, k)) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_encode(v, _join(path, i)) for i, v in enumerate(value)]
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, float) and math.isnan(value):
        raise ValueError(f"{path} is NaN, which no config can mean.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"{path} is {value!r}; a config holds numbers, strings, tuples and configs."
    )


def _decode(hint: Any, value: Json, path: str, saved: bool = False) -> Any:
    """`value` as `hint` says, or a ValueError that names `path`; what was `saved`,
    perhaps by an earlier version, is migrated."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _decode_config(hint, value, path, saved)
    kinds = _kinds(hint)
    if kinds is not None:
        if isinstance(value, str):
            return kinds.get(value, path)
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            raise _wrong(path, value, f"a {kinds.what}: a name, or fields with a kind")
        cls = type(kinds.get(value["kind"], _join(path, "kind")))
        return _decode_config(cls, value, path, saved)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _first(arguments, value, path, hint, saved)
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise _wrong(path, value, "one of " + ", ".join(map(repr, arguments)))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(path, value, _name(hint))
        hints = _element_hints(arguments, len(value), path, value)
        return tuple(
            _decode(h, v, _join(path, i), saved)
            for i, (h, v) in enumerate(zip(hints, value, strict=True))
        )
    if hint in (None, types.NoneType) and value is None:
        return None
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is float:
        if value in ("inf", "-inf"):
            return float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    if hint is str and isinstance(value, str):
        return value
    raise _wrong(path, value, _name(hint))


def _decode_config(cls: Any, value: Json, path: str, saved: bool) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(path, value, f"the fields of {cls.__name__}")
    if saved and hasattr(cls, "migrated"):
        value = cls.migrated(value)
    hints = _hints(cls)
    for name in value:
        _known(cls, hints, name, path)
    fields = {n: _decode(hints[n], v, _join(path, n), saved) for n, v in value.items()}
    for field in dataclasses.fields(cls):
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in fields:
            raise ValueError(
                f"{_join(path, field.name)} is missing; it has no default."
            )
    return cls(**fields)


def _first(hints: tuple, value: Json, path: str, hint: Any, saved: bool) -> Any:
    """The first member of a union that takes `value`."""
    if value is None and types.NoneType in hints:
        return None
    members = [h for h in hints if h is not types.NoneType]
    if isinstance(value, list | tuple) or isinstance(value, Mapping):
        members = [h for h in members if _is_tuple(h) != isinstance(value, Mapping)]
    if len(members) == 1:  # its error says more than the union's
        return _decode(members[0], value, path, saved)
    for member in members:
        try:
            return _decode(member, value, path, saved)
        except ValueError:
            continue
    raise _wrong(path, value, _name(hint))


def _set(hint: Any, data: Json, path: list[str], text: str, at: str) -> Json:
    """`data`, of type `hint`, with `text` at `path`."""
    if not path:
        return to_json(_parse(hint, text, at))
    name, rest = path[0], path[1:]
    if typing.get_origin(hint) in (Union, types.UnionType):
        if data is None:
            raise ValueError(f"{at} is none, so it has no field {name!r} to set.")
        members = [h for h in typing.get_args(hint) if h is not types.NoneType]
        # What does not fit yet may do so with the next setting.
        like = [h for h in members if _is_tuple(h) == isinstance(data, list)]
        hint = next((h for h in members if _fits(h, data, at)), (like or members)[0])
    kinds = _kinds(hint)
    if kinds is not None:
        hint = type(kinds.get(data["kind"], at))
    if dataclasses.is_dataclass(hint):
        hints = _hints(hint)
        _known(hint, hints, name, at)
        if kinds is not None and name == "kind":
            raise ValueError(f"{_join(at, name)} is not set by itself: set {at}.")
        inner = data.get(name)
        return {**data, name: _set(hints[name], inner, rest, text, _join(at, name))}
    if typing.get_origin(hint) is tuple:
        if not name.isdigit() or int(name) >= len(data):
            raise ValueError(
                f"{at} has {len(data)} entries, 0 to {len(data) - 1}; got {name!r}."
            )
        hints = _element_hints(typing.get_args(hint), len(data), at, data)
        index = int(name)
        entry = _set(hints[index], data[index], rest, text, _join(at, name))
        return [*data[:index], entry, *data[index + 1 :]]
    raise ValueError(f"{at} is {_name(hint)}, so it has no field {name!r} to set.")


def _fits(hint: Any, data: Json, path: str) -> bool:
    try:
        _decode(hint, data, path)
    except ValueError:
        return False
    return True


def _parse(hint: Any, text: str, path: str) -> Any:
    """The value of type `hint` that `text` writes."""
    kinds = _kinds(hint)
    if kinds is not None and not text.startswith("{"):
        return kinds.get(text, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if types.NoneType in arguments and text.lower() in ("none", "null"):
            return None
        members = [h for h in arguments if h is not types.NoneType]
        if any(_kinds(h) is not None for h in members):  # one kind, or a tuple of them
            several = "," in text and not text.startswith("{") or text.startswith("[")
            members = [h for h in members if _is_tuple(h) == several] or members
        for member in members:
            try:
                return _parse(member, text, path)
            except ValueError:
                if len(members) == 1:
                    raise
        raise _wrong(path, text, _name(hint))
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise _wrong(path, text, _name(hint))
    if hint in (int, float):
        try:
            value = hint(text)
        except ValueError:
            raise _wrong(path, text, _name(hint)) from None
        if value != value:
            raise _wrong(path, text, _name(hint))
        return value
    if origin is Literal:
        for choice in arguments:
            if str(choice) == text:
                return choice
        raise _wrong(path, text, "one of " + ", ".join(map(str, arguments)))
    if origin is tuple and not text.startswith(("[", "{")):
        inner = text.strip().removeprefix("(").removesuffix(")")
        parts = [part.strip() for part in inner.split(",") if part.strip()]
        hints = _element_hints(arguments, len(parts), path, text)
        return tuple(_parse(h, p, path) for h, p in zip(hints, parts, strict=True))
    if origin is tuple or dataclasses.is_dataclass(hint) or kinds is not None:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            raise ValueError(
                f"{path} is a whole {_name(hint)}: set one of its fields, or write it "
                f"as JSON; got {text!r}."
            ) from None
        return _decode(hint, value, path)
    if hint is str or hint is Any:
        return text
    raise _wrong(path, text, _name(hint))


def _known(cls: Any, hints: Mapping[str, Any], name: str, path: str) -> None:
    if name in hints:
        return
    hint = did_you_mean(name, hints) or f" Its fields are {', '.join(hints)}."
    where = f"{path} ({cls.__name__})" if path else cls.__name__
    raise ValueError(f"{where} has no field {name!r}.{hint}")


def _kinds(hint: Any) -> Kinds | None:
    """The registry that an annotation names."""
    if typing.get_origin(hint) is not Annotated:
        return None
    return next((m for m in hint.__metadata__ if isinstance(m, Kinds)), None)


def _is_tuple(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple


def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _element_hints(arguments: tuple, length: int, path: str, value: Any) -> list:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return [arguments[0]] * length
    if len(arguments) != length:
        raise _wrong(path, value, f"{len(arguments)} entries")
    return list(arguments)


def _wrong(path: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{path or 'The config'} must be {expected}, got {value!r}.")


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _name(hint: Any) -> str:
    kinds = _kinds(hint)
    if kinds is not None:
        return f"a {kinds.what}"
    if hint in _WORDS:
        return _WORDS[hint]
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(map(_name, typing.get_args(hint)))
    if _is_tuple(hint) and typing.get_args(hint)[1:] == (Ellipsis,):
        return f"several, each {_name(typing.get_args(hint)[0])}"
    if hint is types.NoneType:
        return "none"
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)
