"""Takes the thumbnails of the bundled workflows, and the README's picture, from ComfyUI's page.

COMFYUI_PATH=… PYTHONPATH=.:tests python tests/comfyui/pictures.py
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from comfy_page import Page, greeted, open_page
from comfy_server import ROOT, WORKFLOWS, Server

_RUN = "t5_try_it"


def take(page: Page) -> None:
    for path in WORKFLOWS:
        page.show_workflow(path)
        page.fit()
        if path.stem == _RUN:
            page.run()
            page.page.wait_for_timeout(3000)  # the nodes behind the first picture
            page.picture(ROOT / "docs" / "images" / "comfyui.jpg", type="jpeg", quality=70)
        page.picture(path.with_suffix(".jpg"), type="jpeg", quality=60)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        greeted(Path(folder))
        server = Server(os.environ["COMFYUI_PATH"], Path(folder))
        try:
            with open_page(1600, 900) as page:
                page.open(server.url)
                take(page)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
