"""A pytest plugin: diffusers' own pipeline tests get our encoder for each T5 among the parts that they make."""

from __future__ import annotations

import inspect
from functools import wraps
from typing import Any

import pytest

from nai_t5_core.hf import NAIT5EncoderModel

T5_TYPES = ("t5", "mt5", "umt5")
# What the run ends with if tests have run and none has got an encoder of ours: it has compared nothing.
NOTHING_PLACED = 9


_placed: list[str] = []


def with_our_encoder(test_class: type) -> type:
    """A test class derived from one, whose tests run with our encoder in the place of each T5."""
    original: Any = test_class.get_dummy_components  # type: ignore[attr-defined]

    @wraps(original)  # tests look at its parameters
    def get_dummy_components(self: Any, *args: Any, **options: Any) -> dict[str, Any]:
        parts: dict[str, Any] = original(self, *args, **options)
        encoders = {name: part for name, part in parts.items() if name.startswith("text_encoder") and _is_t5(part)}
        if not encoders:
            raise LookupError(f"{type(self).__name__} has no T5 to put ours in place of; it has {', '.join(parts)}")
        ours = {name: NAIT5EncoderModel.from_hf(part).train(part.training) for name, part in encoders.items()}
        _placed.append(type(self).__name__)
        return {**parts, **ours}

    attributes = {"__module__": test_class.__module__, "__doc__": test_class.__doc__}
    return type(test_class.__name__, (test_class,), {**attributes, "get_dummy_components": get_dummy_components})


def _is_t5(part: Any) -> bool:
    return getattr(getattr(part, "config", None), "model_type", "") in T5_TYPES


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(obj: Any) -> Any:
    """Puts a derived class in place of each that has the function."""
    collected = yield
    if inspect.isclass(obj) and hasattr(obj, "get_dummy_components") and isinstance(collected, pytest.Class):
        # A collector looks its class up by name, whatever class it was made for, unless it is set here; and reads the
        # marks of the class when it is first asked for it.
        collected.obj = with_our_encoder(collected.obj)
    return collected


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    has_run = any(reporter.stats.get(outcome) for outcome in ("passed", "failed", "error"))
    if has_run and not _placed:
        session.exitstatus = NOTHING_PLACED
