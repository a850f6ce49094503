"""A pytest plugin: diffusers' own pipeline tests get our encoder for each T5 among the parts that they make."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from nai_t5_core.hf import NAIT5EncoderModel

T5_TYPES = ("t5", "mt5", "umt5")


class WithOurEncoder:
    """Stands before a test class, so that its tests run with the parts that come from here."""

    def get_dummy_components(self, *args: Any, **options: Any) -> dict[str, Any]:
        parts: dict[str, Any] = super().get_dummy_components(*args, **options)  # type: ignore[misc]
        encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder") and _is_t5(part)}
        if not encoders:
            raise LookupError(f"{type(self).__name__} has no T5 to put ours in place of; it has {', '.join(parts)}")
        ours = {name: NAIT5EncoderModel.from_hf(part).train(part.training) for name, part in encoders.items()}
        return {**parts, **ours}


def _is_t5(part: Any) -> bool:
    return getattr(getattr(part, "config", None), "model_type", "") in T5_TYPES


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> Any:
    """Collects a derived class in place of each that has the function."""
    if not inspect.isclass(obj) or issubclass(obj, WithOurEncoder) or not hasattr(obj, "get_dummy_components"):
        return None
    derived = type(name, (WithOurEncoder, obj), {"__module__": obj.__module__, "__doc__": obj.__doc__})
    return collector.ihook.pytest_pycollect_makeitem(collector=collector, name=name, obj=derived)
