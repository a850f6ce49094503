"""torch.compile with a chosen limit on the number of graphs, in every version of torch that can compile the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

# Before torch 2.12 the limit counts the graphs of all models of a class together; the most models to allow for.
_MODELS_TOGETHER = 8

# Whether every compiled function has graphs of its own; before, a copy of a model finds those of the original.
GRAPHS_ARE_SEPARATE = "recompile_limit" in inspect.signature(torch.compile).parameters


def compile_with_limit(function: Callable[..., Any], limit: int, **options: Any) -> Callable[..., Any]:
    """``torch.compile(function, fullgraph=True, **options)`` that may compile ``limit`` graphs.

    torch's own limit is 8 for all models together, beyond which a call fails.
    """
    if GRAPHS_ARE_SEPARATE:
        options |= {"recompile_limit": limit, "isolate_recompiles": True}
        compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, **options)
        return compiled
    within = torch._dynamo.config.patch(recompile_limit=limit * _MODELS_TOGETHER)
    limited: Callable[..., Any] = within(torch.compile(function, fullgraph=True, **options))
    return limited
