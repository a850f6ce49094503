"""ComfyUI nodes on nai_t5_core. Importing this needs no ComfyUI; the modules do."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the nodes."""
    # Imported with the server, which takes seconds to start, and not with the first prompt, which may take none.
    from comfy_nai_t5 import late  # noqa: F401
    from comfy_nai_t5.nodes import Extension

    return Extension()
