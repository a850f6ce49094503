"""What the nodes let the user choose from, where it is no family."""

from __future__ import annotations

# What is computed in.
DTYPES = ("auto", "float32", "bfloat16", "float16")
# How weights are kept in memory. "auto" casts to what is computed in, unless the file's own form is smaller or the
# server streams weights from the file.
WEIGHTS = ("auto", "file", "float8_e4m3fn", "float8_e5m2")
