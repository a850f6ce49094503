"""The words for what is done with pad tokens."""

from typing import Literal, get_args

PaddingPolicy = Literal["attend", "exact", "skip", "trim"]
PADDING_POLICIES: tuple[PaddingPolicy, ...] = get_args(PaddingPolicy)
"""What each does says :func:`nai_t5_core.model.packing.pack_batch`."""

PadTo = Literal["max_length", "longest", "none"]
"""How long the rows of a batch are made: a given length, that of the longest prompt, or each its own."""
