"""Takes the thumbnails of the bundled workflows, and the picture of the template browser, from ComfyUI's page.

COMFYUI_PATH=… PYTHONPATH=.:tests python tests/comfyui/pictures.py
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from comfy_page import Page, greeted, open_page
from comfy_server import ROOT, WORKFLOWS, Server

_RUN = "t5_try_it"


# Where the files that the workflows name would lie.
_FOLDERS = ("checkpoints", "diffusion_models", "text_encoders", "vae")


def pretend_files(base: Path) -> None:
    """Puts an empty file for every model that a workflow names, whose loaders would be shown as faulty without."""
    names = {name for path in WORKFLOWS for name in re.findall(r'"([^"/]+\.safetensors)"', path.read_text("utf-8"))}
    for folder in _FOLDERS:
        (base / "models" / folder).mkdir(parents=True)
        for name in names:
            (base / "models" / folder / name).touch()


def take(page: Page) -> None:
    for path in WORKFLOWS:
        page.show_workflow(path)
        page.fit()
        if path.stem == _RUN:
            page.run()
            page.page.wait_for_timeout(3000)  # the nodes behind the first picture
            page.see_no_more("Job completed")
        page.picture(path.with_suffix(".jpg"), type="jpeg", quality=60)


def take_templates(page: Page) -> None:
    """With the thumbnails that were just taken."""
    page.browse_templates()
    page.see(_RUN)
    page.page.wait_for_timeout(3000)  # the thumbnails come one by one
    page.picture(ROOT / "docs" / "images" / "comfyui-templates.jpg", type="jpeg", quality=70)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        greeted(Path(folder))
        pretend_files(Path(folder))
        server = Server(os.environ["COMFYUI_PATH"], Path(folder))
        try:
            with open_page(1600, 900) as page:
                page.open(server.url)
                take(page)
            with open_page() as page:
                page.open(server.url)
                take_templates(page)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
