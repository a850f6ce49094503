"""Floating-point operations that a call really executes, counted while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nai_t5_core.backends.kernels.calls import counted
from nai_t5_core.facts.config import Shape


def count_flops(call: Callable[[], Any]) -> int:
    """Operations of the matrix products and of attention in one call; elementwise operations are not counted.

    Compiled functions run eagerly here, since torch's counter does not see the operations of compiled code.
    """
    # torch 2.5 has no set_stance, and nothing is compiled with it.
    eager = torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
    mode = FlopCounterMode(display=False, custom_mapping=_formulas())
    with eager, counted() as by_kernels, mode as by_torch:
        call()
    return int(by_torch.get_total_flops()) + by_kernels.flops


def _formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for CPU kernels that torch's counter does not know."""
    formulas: dict[Any, Callable[..., int]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops
    }
    if torch.backends.mkldnn.is_available():
        formulas[torch.ops.mkldnn._linear_pointwise] = _linear_flops
        formulas[torch.ops.onednn.qlinear_pointwise] = _linear_flops
    return formulas


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Operations of attention's two products; shapes are [batch, heads, tokens, d_kv]."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _linear_flops(x: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * math.prod(x) * out_shape[-1]
