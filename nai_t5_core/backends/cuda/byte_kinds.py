"""Which kinds of quantised weights the kernels for CUDA read. A hit of the cache asks for it, so little is imported."""

from __future__ import annotations

import torch

from nai_t5_core.backends.quantised.ggml import GGML_KINDS
from nai_t5_core.backends.quantised.kinds import Kind
from nai_t5_core.backends.quantised.scaled import Scaled

BLOCK = 32
Q8_0 = GGML_KINDS["Q8_0"]
# Q8_0 with numbers and scales apart.
APART = Scaled("Q8_0", torch.int8, block=(1, BLOCK))
READ_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def is_read(kind: Kind) -> bool:
    """Whether the kernels for CUDA read weights of a kind."""
    if isinstance(kind, Scaled) and kind != APART:
        return kind.dtype in READ_DTYPES and kind.block is None and not kind.turned
    return kind in (Q8_0, APART)
