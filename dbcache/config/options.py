"""What all configs have in common: checked names and values, and which fields were given.

A field is checked by its annotation (bool, int, float, names, a list of block numbers), within the
range that `option` gives it. A config that knows which of its fields were given can be partial:
where it modifies another one, only those count (see `ParamsModifier`).
"""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from dbcache.config.renamed import hint

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4028234663852886e38
"""What the device holds: int32 and float32."""

LONGEST = 300
"""Characters of a value in an error."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 120, 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 16

_WORDS: dict[type, str] = {str: "a string", os.PathLike: "a path", Mapping: "a mapping"}


def shown(value: Any) -> str:
    """Return `repr` of a value for an error: one line, bounded in time and length.

    Values come from files, too, in which a few aliases stand for billions of entries.
    """
    try:
        text = " ".join(_SHORT.repr(value).split())
    except ValueError:  # an int of too many digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def unknown(who: str, name: Any, known: Iterable[str]) -> str:
    """Return the text of an error that names the nearest known option."""
    known = sorted(known)
    return f"{who}: unknown option {shown(name)}; {hint(name, known)}known: {', '.join(known)}"


def reject_unknown(who: str, names: Iterable[Any], known: Iterable[str]) -> None:
    """Raise a TypeError that names the nearest known option, if one of `names` is not `known`."""
    known = set(known)
    for name in names:
        if name not in known:
            raise TypeError(unknown(who, name, known))


def _plain(value: Any) -> Any:
    """Return the number that a tensor or array of no dimension holds, anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def is_number(value: Any, kind: type | UnionType) -> bool:
    """Whether a value is a number of that kind, NumPy's too; True and False are none."""
    return isinstance(value, kind) and not isinstance(value, bool)


def check_int(who: str, value: Any, low: int, high: int = LARGEST_INT) -> int:
    """Return `value` as an int; raise unless it is an integer from `low` to `high`."""
    value = _plain(value)
    if not is_number(value, Integral):
        raise TypeError(f"{who} must be an integer, got {shown(value)}{_number_hint(value)}")
    if not low <= value <= high:
        is_open = high == LARGEST_INT and value < low
        allowed = f">= {low}" if is_open else f"from {low} to {high}"
        raise ValueError(f"{who} must be an integer {allowed}, got {shown(value)}")
    return int(value)


def check_ids(who: str, value: Any, count: int | None = None) -> list[int]:
    """Return a sorted list of the block numbers in `value`, each once.

    Raises:
        TypeError: it is not a sequence of integers. ValueError: one is negative, or not below
            `count`.
    """
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{who} must be a list of block numbers, got {shown(value)}")
    ids = [_plain(entry) for entry in value]
    for entry in ids:
        if not is_number(entry, Integral):
            raise TypeError(f"{who} must be a list of block numbers, got {shown(ids)}")
        if entry < 0 or (count is not None and entry >= count):
            allowed = "at least 0" if count is None else f"from 0 to {count - 1}"
            raise ValueError(
                f"{who}: each number must be {allowed}, got {shown(entry)} in {shown(ids)}"
            )
    return sorted(set(map(int, ids)))


def check_number(
    who: str, value: Any, *, low: float = 0.0, high: float = LARGEST_FLOAT, positive: bool = False
) -> float:
    """Return `value` as a Python number.

    Raises:
        TypeError: it is none.
        ValueError: it is not finite in float32, below `low` or above `high`, or (`positive`) not
            above 0.
    """
    value = _plain(value)
    if not is_number(value, Real):
        raise TypeError(f"{who} must be a number, got {shown(value)}{_number_hint(value)}")
    number: float = value if isinstance(value, int | float) else float(value)
    if number != number or number < low or (positive and number == 0):
        raise ValueError(
            f"{who} must be a number {'> 0' if positive else f'>= {low:g}'}, got {shown(number)}"
        )
    if number > high:
        raise ValueError(f"{who} must be at most {high:g}, got {shown(number)}")
    return number


def _number_hint(value: Any) -> str:
    """Return what to do about a number that is written as text."""
    try:
        float(value if isinstance(value, str) else "")
    except ValueError:
        return ""
    return ", which is text; write it without quotes, and in YAML with a point, as in 1.0e-2"


def check_flag(who: str, value: Any) -> bool:
    """Return `value`; raise unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{who} must be True or False, got {shown(value)}")
    return value


def check_choice(who: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """Return the entry of `allowed` (names or integers) that `value` is; raise if there is none."""
    for entry in allowed:
        if isinstance(value, type(entry)) and not isinstance(value, bool) and value == entry:
            return entry
    raise ValueError(f"{who} must be one of {allowed}, got {shown(value)}")


_METHODS = {
    "DBCache": "pass a DBCacheConfig",
    "DBPrune": "pass a DBPruneConfig",
    "NONE": "to cache nothing call dbcache.disable, or do not enable it",
}


def check_method(who: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Return the entry of `allowed` that a `cache_type` is; the error says what to do otherwise."""
    if isinstance(value, str) and value in _METHODS and value not in allowed:
        raise ValueError(f"{who} must be one of {allowed}, got {shown(value)}; {_METHODS[value]}")
    return str(check_choice(who, value, allowed))


def check_type(who: str, value: Any, *kinds: type) -> Any:
    """Return `value`; raise a TypeError unless it is None or of one of `kinds`."""
    if value is not None and not isinstance(value, kinds):
        names = ", ".join(_WORDS.get(kind, f"a {kind.__name__}") for kind in kinds)
        raise TypeError(f"{who} must be {names} or None, got {shown(value)}")
    return value


def option(default: Any, *, check: Callable[[str, Any], Any] | None = None, **rules: Any) -> Any:
    """Return a field of `Options` whose values are more than what its annotation says.

    Args:
        default: its default.
        check: called with the name for errors and a value, in place of the check by annotation;
            returns what is stored.
        **rules: of a number: `low`, `high`, and `positive` of floats; `flat`: another name of the
            field among flat options.
    """
    return dataclasses.field(default=default, metadata={"check": check, **rules})


def _check(who: str, value: Any, hint: Any, rules: Mapping[str, Any]) -> Any:
    """Return a value as a field of this annotation stores it.

    Raises:
        TypeError, ValueError: it may not have this value.
    """
    if rules.get("check") is not None:
        return rules["check"](who, value)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    words = tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
    if (value is None and NoneType in kinds) or (isinstance(value, str) and value in words):
        return value
    within = {name: rules[name] for name in ("low", "high", "positive") if name in rules}
    if bool in kinds:
        return check_flag(who, value)
    if int in kinds:
        return check_int(who, value, **{"low": 0, **within})
    if float in kinds:
        return check_number(who, value, **within)
    if words:
        return check_choice(who, value, words)
    types = [get_origin(kind) or kind for kind in kinds if kind is not NoneType]
    return check_ids(who, value) if list in types else check_type(who, value, *types)


@cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


class Options:
    """Base of the configs: remembers which fields were given, checks names and values.

    `__post_init__` of a config checks which fields go together, after each one's own value.
    """

    _given: frozenset[str]
    _who: ClassVar[str] = ""
    """What stands before a field's name in errors; "" is the name of the class and a point."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise TypeError(f"{cls.__name__}: options are given by name, got {shown(args)}")
        reject_unknown(cls.__name__, kwargs, cls.names())
        self = super().__new__(cls)
        self.__dict__["_given"] = frozenset(kwargs)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        cls: Any = type(self)
        if name not in cls.names():
            raise AttributeError(unknown(cls.__name__, name, cls.names()))
        rules = cls.__dataclass_fields__[name].metadata
        value = _check(f"{cls._who or f'{cls.__name__}.'}{name}", value, _hints(cls)[name], rules)
        if name in self.__dict__:  # `__init__` is over, this is the user
            self.__dict__["_given"] |= {name}
        self.__dict__[name] = value

    def require_defaults(self, refused: Mapping[str, str], where: str, remedy: str) -> None:
        """Raise a ValueError if a field has another value than its default.

        Args:
            refused: names of fields, and why each has no meaning.
            where: when it has none, as in "with policy='easycache'".
            remedy: what to do.
        """
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        for field in fields:
            value, default = getattr(self, field.name), field.default
            if default is dataclasses.MISSING:
                default = field.default_factory()
            if field.name in refused and value != default:
                raise ValueError(
                    f"{type(self).__name__}.{field.name} must be {default!r} {where}, got "
                    f"{shown(value)}: {refused[field.name]}; {remedy}"
                )

    @classmethod
    @cache
    def names(cls) -> tuple[str, ...]:
        """Return the names of all fields."""
        return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were set, by name or by `update`, with their values."""
        return {name: getattr(self, name) for name in sorted(self._given)}

    def update(self, **options: Any) -> Any:
        """Set `options` in place and return self; None leaves a field as it is.

        Raises:
            TypeError: an option that does not exist.
            ValueError: a value that is not allowed; nothing is changed then.
        """
        reject_unknown(type(self).__name__, options, self.names())
        options = {name: value for name, value in options.items() if value is not None}
        self.__dict__.update(self.changed(**options).__dict__)
        return self

    def changed(self, **options: Any) -> Any:
        """Return a checked copy with `options` on top, which count as given."""
        copy = type(self)(**{**self.as_dict(), **options})
        copy.__dict__["_given"] = self._given | frozenset(options)
        return copy

    def reset(self, **options: Any) -> Any:
        """Forget everything that was set, then set `options` but for those of None; return self.

        The result is partial: where it modifies another config, only `options` count.
        """
        given = {name: value for name, value in options.items() if value is not None}
        reject_unknown(type(self).__name__, options, self.names())
        self.__dict__.update(type(self)(**given).__dict__)
        return self

    empty = reset

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, by name."""
        return {name: getattr(self, name) for name in self.names()}
