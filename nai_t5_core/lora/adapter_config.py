"""What peft's config of an adapter says, as far as it matters for merging: kind, alpha and how alpha is divided."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic_core import SchemaError, SchemaValidator, core_schema

from nai_t5_core.facts.nested_text import shown

# A pattern without anything of regular expressions but dots, which is what peft writes. Others may take memory far
# beyond their length, so there may only be as much of them as people write by hand.
_NAME = re.compile(r"(?:\w|\\?\.)*")
_MOST_PATTERN_CHARACTERS = 4_000


class AdapterConfig(BaseModel):
    """Fields have peft's names; what else a config says is for training."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    peft_type: str = "LORA"
    use_dora: bool = False
    use_rslora: bool = False
    lora_alpha: float | None = None
    alpha_pattern: dict[str, float] | None = None
    _matchers: list[tuple[SchemaValidator, float]] = PrivateAttr(default_factory=list)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """From a parsed adapter_config.json.

        Raises:
            ValueError: a field holds something else than it should, or a pattern cannot be used; the message goes on
                from the config's name.
        """
        try:
            config = cls.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"]))
            raise ValueError(f"has {place} = {shown(fault['input'])}: {fault['msg']}") from error
        patterns = config.alpha_pattern or {}
        if sum(len(pattern) for pattern in patterns if not _NAME.fullmatch(pattern)) > _MOST_PATTERN_CHARACTERS:
            raise ValueError(f"has {len(patterns):,} long patterns in alpha_pattern; give the names of modules instead")
        config._matchers.extend((_matcher(pattern), alpha) for pattern, alpha in patterns.items())
        return config

    def alpha(self, module: str) -> float | None:
        """Alpha of a module; peft matches its patterns with the end of a name."""
        found = (alpha for matcher, alpha in self._matchers if matcher.isinstance_python(module))
        return next(found, self.lora_alpha)


def _matcher(pattern: str) -> SchemaValidator:
    """What knows the modules that a pattern is meant for.

    The expressions are Rust's, whose time grows with the length of a name alone: Python's own may take forever for a
    pattern that was made so.

    Raises:
        ValueError: it is no regular expression, or one with a look around, a reference back or a count.
    """
    try:
        if "{" in pattern:  # it is made as many times
            raise SchemaError("counts are not supported")
        return SchemaValidator(core_schema.str_schema(pattern=rf"^(?:.*\.)?(?:{pattern})$", regex_engine="rust-regex"))
    except SchemaError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(
            f"has alpha_pattern {shown(pattern)}, which cannot be used ({reason}); give the names of modules instead"
        ) from None
