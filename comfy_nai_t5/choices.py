"""What the user chooses of a T5 of ours, by the names that the nodes' inputs have."""

from __future__ import annotations

from dataclasses import dataclass, fields

# What is computed in.
DTYPES = ("auto", "float32", "bfloat16", "float16")
# How weights are kept in memory. "auto" casts to what is computed in, unless the file's own form is smaller, the server
# streams weights from the file, or the kernels read them as they are. Quantised weights stay so but with "unpack",
# which is else as "auto".
WEIGHTS = ("auto", "file", "unpack", "float8_e4m3fn", "float8_e5m2")
ATTENTIONS = ("auto", "flex", "sdpa")
# "auto" joins products where that changes nothing; "fused" makes it an error where it would; "packed" keeps a second,
# faster copy of the joined weights for the CPU, and "int8" one in 8 bits.
LAYOUTS = ("auto", "fused", "packed", "int8", "separate")
# Where embeddings are kept: "on" in memory and in the user's cache folder.
CACHES = ("off", "on", "memory only")
_ALLOWED = {"dtype": DTYPES, "weights": WEIGHTS, "attention": ATTENTIONS, "layout": LAYOUTS, "cache": CACHES}


@dataclass(frozen=True)
class Settings:
    """The choices of one T5; ``device`` is ``"default"`` or a torch device.

    Raises:
        ValueError: an unknown choice, or compilation in a layout that it is not for.
    """

    dtype: str = "auto"
    weights: str = "auto"
    device: str = "default"
    attention: str = "auto"
    layout: str = "auto"
    compile: bool = False
    cache: str = "off"

    @property
    def unpacks(self) -> bool:
        """Whether numbers are made of a file's quantised weights when they are loaded."""
        return self.weights == "unpack"

    def __post_init__(self) -> None:
        for field in fields(self):
            chosen, allowed = getattr(self, field.name), _ALLOWED.get(field.name)
            if allowed and chosen not in allowed:
                raise ValueError(f"unknown choice {chosen!r} for {field.name}; allowed: {', '.join(allowed)}")
        if self.compile and self.layout == "separate":
            raise ValueError("compile needs joined products; choose the layout auto or fused, or switch compile off")
        if self.compile and self.layout in ("packed", "int8"):
            kept = "packed weights" if self.layout == "packed" else "weights in 8 bits"
            raise ValueError(f"{kept} are not compiled; choose the layout auto or fused, or switch compile off")
        if self.compile and self.attention == "sdpa":
            raise ValueError("compile brings flex attention; choose the attention auto or flex, or switch compile off")
