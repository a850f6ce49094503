"""How far our conditioning is from that of ComfyUI's own T5, for each family, as Markdown.

    COMFYUI_PATH=… PYTHONPATH=.:tests python tests/comfyui/equality.py

Toy sizes with random weights in float32. Each figure is the largest difference over the prompts, divided by the largest
value; in float32 the tests allow 1e-4.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from comfy_toys import FAMILY_CONFIGS, conditioning, error, knows, require_comfyui, stock, toy_file

PROMPTS = (
    "a photo of a cat",
    "a (photo:1.3) of ((a cat)) on a [sofa], (blurry:0.4)",
    "",
    "line\nbreaks, Ünïcode, 猫 and   spaces",
    "a very long prompt " * 150,
)
DTYPES = ("float32", "float16", "bfloat16")


def replaced(clip: Any, dtype: str) -> Any:
    from comfy_nai_t5.nodes import ReplaceT5

    return ReplaceT5.execute(clip=clip, dtype=dtype).args[0]


def largest_error(ours: Any, theirs: Any) -> float:
    """Over all prompts. Everything beside the hidden states, such as the mask, must be the same."""
    errors = []
    for prompt in PROMPTS:
        mine, expected = conditioning(ours, prompt), conditioning(theirs, prompt)
        assert mine.keys() == expected.keys()
        errors.append(error(mine["cond"], expected["cond"]))
    return max(errors)


def main() -> None:
    require_comfyui()
    print(f"| family | {' | '.join(DTYPES)} |\n|---|{'---|' * len(DTYPES)}")
    for family, config in FAMILY_CONFIGS.items():
        if not knows(family):
            continue
        with tempfile.TemporaryDirectory() as folder:
            theirs = stock(toy_file(Path(folder), config), family)
            cells = (f"{largest_error(replaced(theirs, dtype), theirs):.1e}" for dtype in DTYPES)
            print(f"| {family} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
