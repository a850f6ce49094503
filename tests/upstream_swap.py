"""A pytest plugin: diffusers' own pipeline tests get our encoder for each T5 among the parts that they make."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from nai_t5_core.hf import NAIT5EncoderModel

T5_TYPES = ("t5", "mt5", "umt5")
# What the run ends with if no test has got an encoder of ours: it has compared nothing.
NOTHING_PLACED = 9


class WithOurEncoder:
    """Stands before a test class, so that its tests run with the parts that come from here."""

    placed = 0

    def get_dummy_components(self, *args: Any, **options: Any) -> dict[str, Any]:
        parts: dict[str, Any] = super().get_dummy_components(*args, **options)  # type: ignore[misc]
        encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder") and _is_t5(part)}
        if not encoders:
            raise LookupError(f"{type(self).__name__} has no T5 to put ours in place of; it has {', '.join(parts)}")
        ours = {name: NAIT5EncoderModel.from_hf(part).train(part.training) for name, part in encoders.items()}
        WithOurEncoder.placed += len(ours)
        return {**parts, **ours}


def _is_t5(part: Any) -> bool:
    return getattr(getattr(part, "config", None), "model_type", "") in T5_TYPES


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(obj: Any) -> Any:
    """Puts a derived class in place of each that has the function."""
    collected = yield
    if inspect.isclass(obj) and hasattr(obj, "get_dummy_components") and isinstance(collected, pytest.Class):
        # A collector looks its class up by name, whatever class it was made for, unless it is set here.
        collected.obj = type(
            obj.__name__, (WithOurEncoder, obj), {"__module__": obj.__module__, "__doc__": obj.__doc__}
        )
    return collected


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if not WithOurEncoder.placed:
        session.exitstatus = NOTHING_PLACED
