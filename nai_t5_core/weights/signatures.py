"""Kinds of quantised files that cannot be read, known by their tensors' names.

Tables and pure functions over names and dtypes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nai_t5_core.weights.formats import TensorInfo


@dataclass(frozen=True)
class Signature:
    """A tensor that one kind of quantised file has for a module; ``dtypes`` empty: of any."""

    kind: str
    leaf: re.Pattern[str]
    dtypes: tuple[torch.dtype, ...] = ()

    def find(self, module: Mapping[str, TensorInfo]) -> str | None:
        """The leaf by which a module is of this kind."""
        fitting = (leaf for leaf, info in module.items() if not self.dtypes or info.dtype in self.dtypes)
        return next((leaf for leaf in fitting if self.leaf.fullmatch(leaf)), None)


def _signature(kind: str, leaf: str, *dtypes: str) -> Signature:
    # Older versions of torch lack some of these types.
    present = tuple(getattr(torch, name) for name in dtypes if hasattr(torch, name))
    return Signature(kind, re.compile(leaf), present)


# The first that fits is the kind: those further down fit others too.
SIGNATURES = (
    _signature("4-bit of bitsandbytes", r"weight\.absmax"),
    _signature("int8 of bitsandbytes", r"SCB|weight_format"),
    _signature("quanto", r"weight\._(data|scale|shift)(\..*)?"),
    _signature("HQQ", r"W_q"),
    _signature("torchao", r"_?weight_qdata"),
    _signature("GPTQ", r"g_idx"),
    _signature("AWQ of Nunchaku", r"scaled_zeros|wzeros"),
    _signature("AWQ", r"qweight|qzeros"),
    _signature("NVFP4 of compressed-tensors", r"weight_global_scale"),
    _signature("compressed-tensors", r"weight_packed"),
    _signature("NVFP4 without ComfyUI's note, which leaves the order of its numbers open", r"weight_scale_2"),
    _signature(
        "MXFP8 without ComfyUI's note, which leaves the order of its scales open",
        r"weight_scale",
        "float8_e8m0fnu",
        "uint8",
    ),
    _signature("float8 with a scale for each block", r"weight_scale_inv"),
)


def kind_by_names(modules: Mapping[str, Mapping[str, TensorInfo]]) -> tuple[str, str] | None:
    """The kind of the first module that cannot be read, and the tensor by which it was known."""
    found = (
        (signature.kind, f"{module}.{leaf}")
        for signature in SIGNATURES
        for module, leaves in modules.items()
        if (leaf := signature.find(leaves))
    )
    return next(found, None)
