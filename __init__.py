"""For ComfyUI alone, which imports this file when the repository lies in its ``custom_nodes``.

Nothing is imported before ComfyUI asks for the nodes, so any other tool may import it without effect.
"""

import sys
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "comfy_nai_t5/web"


async def comfy_entrypoint() -> Any:
    """The nodes. The repository is put at the end of the module path, where an installed package goes before it."""
    root = str(Path(__file__).resolve().parent)
    if root not in sys.path:
        sys.path.append(root)
    from comfy_nai_t5 import comfy_entrypoint as entrypoint

    return await entrypoint()
