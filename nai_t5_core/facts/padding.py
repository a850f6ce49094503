"""The names of the padding policies."""

from typing import Literal, get_args

PaddingPolicy = Literal["attend", "exact", "skip", "trim"]
PADDING_POLICIES: tuple[PaddingPolicy, ...] = get_args(PaddingPolicy)
"""They are described in :func:`nai_t5_core.model.packing.pack_batch`."""

PadTo = Literal["max_length", "longest", "none"]
"""The length that rows are padded to: a given length, that of the longest prompt, or none: each keeps its own."""
