"""CLIPs of GGUF files, loaded by ComfyUI behind the pack ComfyUI-GGUF, and the T5 in them replaced by ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfy_toys import assert_equal_conditioning, conditioning, error, require_comfyui, toy_lora

require_comfyui()

from gguf_pack import by_pack, require_pack  # noqa: E402 - needs ComfyUI
from test_patches import t5_of, with_lora  # noqa: E402
from test_quantised import CONFIG, EVERYWHERE, FLOAT32, PROMPT, load, stock_of, write_kind  # noqa: E402

NODES = require_pack()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q4_0", "Q6_K"])
def test_what_the_pack_loads(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced by ours, or read by our own loader: the same numbers, with and without a LoRA."""
    from comfy_nai_t5.clip import describe, with_our_t5

    path = write_kind(tmp_path, kind)
    theirs = by_pack(NODES, path, CONFIG)
    ours = {"replaced": with_our_t5(theirs, FLOAT32), "loaded": load(path, monkeypatch)}
    assert "separate layout" in describe(ours["replaced"])
    # The pack itself takes no patches of a quantised table into account.
    keys = tuple(key for key in EVERYWHERE if key != "shared")
    lora = toy_lora(t5_of(ours["loaded"]), keys, "t5xxl")
    # Behind the pack, ComfyUI rounds norms and biases to float16, which our loader reads as they are.
    exact = stock_of(tmp_path, path)
    for way, meant in (("replaced", theirs), ("loaded", exact)):
        plain, patched = (conditioning(clip, PROMPT) for clip in (meant, with_lora(meant, lora, 0.7)))
        assert error(patched["cond"], plain["cond"]) > 1e-3
        for _ in range(2):
            assert_equal_conditioning(conditioning(ours[way], PROMPT), plain)
            assert_equal_conditioning(conditioning(with_lora(ours[way], lora, 0.7), PROMPT), patched)
