"""The names of the padding policies, and the longest row that is computed."""

from typing import Literal, get_args

PaddingPolicy = Literal["attend", "exact", "skip", "trim"]
PADDING_POLICIES: tuple[PaddingPolicy, ...] = get_args(PaddingPolicy)
"""They are described in :func:`nai_t5_core.model.packing.pack_batch`."""

PadTo = Literal["max_length", "longest", "none"]
PAD_TO: tuple[PadTo, ...] = get_args(PadTo)
"""The length that rows are padded to: a given length, that of the longest prompt, or none: each keeps its own."""

LONGEST_ROW = 8192
"""The most tokens of a prompt, pads included, that are computed: 16 times what T5 was trained on.

Attention's time grows with the square of a row's length: a T5-XXL takes minutes for this many, and hours for more.
"""
