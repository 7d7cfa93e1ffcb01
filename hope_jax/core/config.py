"""Configs: frozen dataclasses that nest, as JSON, from the command line, compared.

A config holds ints, floats, bools, strings, None, tuples and other configs; its
annotations say which, and every value that comes in as text or JSON is held to them.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

C = TypeVar("C")
Json = Any

_MISSING = object()


def to_json(config: Any) -> Json:
    """`config` as dicts, lists and scalars; infinities become "inf" and "-inf".

    Raises:
      ValueError: a value that is not plain data (a NaN, an array, a function).
    """
    return _encode(config, "")


def from_json(cls: type[C], data: Json) -> C:
    """The config of type `cls` that `to_json` wrote.

    Fields that are absent take their defaults.

    Raises:
      ValueError: an unknown field, a missing one without a default, or a value of
        another type than the field's; the message names the field and the value.
    """
    return _decode(cls, data, "")


def override(config: C, settings: Iterable[str]) -> C:
    """A copy of `config` with some fields set, as on a command line.

    All settings are applied before the config is built, so two fields that must agree
    can be changed together. Later settings win.

    Args:
      config: a dataclass instance.
      settings: `"path=value"`, where the path joins field names and tuple indices with
        dots (`model.cms.0.period=64`). Values are read by the field's annotation:
        numbers, `true` and `false`, `none` where it is allowed, `a,b,c` for a tuple of
        scalars, JSON for a whole config or a tuple of configs.

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
    return from_json(type(config), data)


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


def _decode(hint: Any, value: Json, path: str) -> Any:
    """`value` as `hint` says, or a ValueError that names `path`."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _decode_config(hint, value, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _first(arguments, value, path, hint)
    if origin is Literal:
        if value in arguments and type(value) in {type(a) for a in arguments}:
            return value
        raise _wrong(path, value, "one of " + ", ".join(map(repr, arguments)))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(path, value, _name(hint))
        hints = _element_hints(arguments, len(value), path, value)
        return tuple(
            _decode(h, v, _join(path, i))
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


def _decode_config(cls: Any, value: Json, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(path, value, f"the fields of {cls.__name__}")
    hints = _hints(cls)
    for name in value:
        _known(cls, hints, name, path)
    fields = {n: _decode(hints[n], v, _join(path, n)) for n, v in value.items()}
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


def _first(hints: tuple, value: Json, path: str, hint: Any) -> Any:
    """The first member of a union that takes `value`."""
    if value is None and types.NoneType in hints:
        return None
    members = [h for h in hints if h is not types.NoneType]
    if len(members) == 1:  # its error says more than the union's
        return _decode(members[0], value, path)
    for member in members:
        try:
            return _decode(member, value, path)
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
        hint = next((h for h in members if _fits(h, data, at)), members[0])
    if dataclasses.is_dataclass(hint):
        hints = _hints(hint)
        _known(hint, hints, name, at)
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
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if types.NoneType in arguments and text.lower() in ("none", "null"):
            return None
        members = [h for h in arguments if h is not types.NoneType]
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
    if origin is tuple or dataclasses.is_dataclass(hint):
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
    near = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
    if near:
        hint = f"Did you mean {near[0]!r}?"
    else:
        hint = f"Its fields are {', '.join(hints)}."
    where = f"{path} ({cls.__name__})" if path else cls.__name__
    raise ValueError(f"{where} has no field {name!r}. {hint}")


def _hints(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
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
    if hint in _WORDS:
        return _WORDS[hint]
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else str(name)
