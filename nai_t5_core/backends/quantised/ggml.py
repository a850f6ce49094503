"""The kinds of GGUF files that are described here, under ggml's own names."""

from __future__ import annotations

from nai_t5_core.backends.quantised.blocks import BlockKind
from nai_t5_core.backends.quantised.ggml_32 import KINDS_OF_32
from nai_t5_core.backends.quantised.ggml_256 import KINDS_OF_256

GGML_KINDS: dict[str, BlockKind] = {**KINDS_OF_32, **KINDS_OF_256}
