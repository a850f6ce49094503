"""Frozen dataclasses whose fields hold what they say: plain values of one kind each, within a range.

For what is read whenever a program begins: pydantic, which checks larger configs, takes a tenth of a second to import.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from nai_t5_core.facts.nested_text import parse_object, shown

if TYPE_CHECKING:
    from typing_extensions import Self

_RANGE, _CHOICES = "range", "choices"


@dataclass(frozen=True)
class _Range:
    above: float | None = None
    least: float | None = None
    most: float | None = None
    below: float | None = None

    def fault(self, value: float) -> str | None:
        """What the value has to be and is not."""
        if self.above is not None and not value > self.above:
            return f"greater than {self.above}"
        if self.least is not None and not value >= self.least:
            return f"greater than or equal to {self.least}"
        if self.most is not None and not value <= self.most:
            return f"less than or equal to {self.most}"
        if self.below is not None and not value < self.below:
            return f"less than {self.below}"
        return None


def within(**limits: Any) -> Any:
    """A field whose numbers have a range: ``above``, ``least``, ``most``, ``below``, and maybe a ``default``."""
    defaults = {"default": limits.pop("default")} if "default" in limits else {}
    return field(metadata={_RANGE: _Range(**limits)}, **defaults)


def one_of(*choices: str) -> dict[str, Any]:
    """The metadata of a field that has one of these texts."""
    return {_CHOICES: choices}


class CheckedFields:
    """What such a dataclass inherits: its fields are checked when it is made.

    The methods are those that pydantic's models have, so that either may be a part of the other.

    Raises:
        ValueError: a field holds something else than it should; the message has all of them.
    """

    # Where it is a part of a config that pydantic reads.
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    def __post_init__(self) -> None:
        faults = []
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            try:
                object.__setattr__(self, each.name, _settled(each, value))
            except ValueError as error:
                faults.append(f"{each.name}: {error} (given: {shown(value)})")
        if faults:
            raise ValueError("; ".join(faults))

    @classmethod
    def model_validate(cls, values: Any) -> Self:
        """From the values of a file.

        Raises:
            ValueError: a field is absent, unknown, or holds something else than it should.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"it is {shown(values)}, and fields with names are needed")
        own: tuple[Field[Any], ...] = fields(cls)  # type: ignore[arg-type]
        absent = [each.name for each in own if each.default is MISSING and each.name not in values]
        if absent:
            raise ValueError(f"it lacks {', '.join(absent)}")
        unknown = sorted(values.keys() - {each.name for each in own}, key=str)
        if unknown:
            raise ValueError(f"it has no fields {', '.join(map(shown, unknown))}")
        return cls(**values)

    @classmethod
    def model_validate_json(cls, text: str) -> Self:
        """From the text that holds these values; raises ValueError as :meth:`model_validate`."""
        return cls.model_validate(parse_object(text))

    def model_copy(self, update: Mapping[str, Any]) -> Self:
        """Another with some fields replaced by values that are known to be right: they are not checked."""
        made = copy(self)
        for name, value in update.items():
            object.__setattr__(made, name, value)
        return made

    def model_dump(
        self, include: Collection[str] | None = None, exclude: Collection[str] = (), exclude_none: bool = False
    ) -> dict[str, Any]:
        """The fields by name: all, some, or those that have a value."""
        kept = {name: value for name, value in asdict(self).items() if include is None or name in include}  # type: ignore[call-overload]
        return {
            name: value for name, value in kept.items() if name not in exclude and not (exclude_none and value is None)
        }


def _settled(each: Field[Any], value: Any) -> Any:
    """The value of a field; a whole number that came as a fraction, as in some files, as a whole one."""
    kind = str(each.type)
    if _CHOICES in each.metadata:
        return _chosen(value, each.metadata[_CHOICES])
    if kind.startswith("bool"):
        return _told(value, or_none=kind.endswith("None"))
    number = _whole(value) if kind == "int" else _real(value)
    fault = each.metadata[_RANGE].fault(number) if _RANGE in each.metadata else None
    if fault:
        raise ValueError(f"must be {fault}")
    return number


def _chosen(value: Any, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}")
    return value


def _told(value: Any, or_none: bool) -> Any:
    if isinstance(value, bool) or (value is None and or_none):
        return value
    raise ValueError("must be true or false")


def _whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    with suppress(TypeError):
        if not isinstance(value, bool):
            return operator.index(value)
    raise ValueError("must be an integer")


def _real(value: Any) -> float:
    with suppress(OverflowError):  # a whole number beyond all fractions
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise ValueError("must be a finite number")
