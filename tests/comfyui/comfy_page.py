"""ComfyUI's page in a headless Chromium. Needs playwright and an installed Chromium; it downloads neither."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACK = "comfy-nai-t5"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_PATIENCE = 240_000  # milliseconds; a busy machine starts a page slowly


class Page:
    """The page, and the faults that it told of since it was opened."""

    def __init__(self, page: Any) -> None:
        self.page = page
        page.set_default_timeout(_PATIENCE)
        self.faults: list[str] = []
        page.on("console", lambda told: told.type == "error" and self.faults.append(f"{told.text} {told.location}"))
        page.on("pageerror", lambda error: self.faults.append(f"{error} {error.stack}"))
        page.on("response", lambda reply: reply.status >= 400 and self.faults.append(f"{reply.status} {reply.url}"))

    def open(self, url: str) -> None:
        """Opens it, waits until our nodes are known, and empties the graph that it greets with."""
        self.page.goto(url, wait_until="domcontentloaded")
        self.wait("Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.NAILoadT5)")
        self.wait("app.graph.nodes.length > 0")
        self.page.evaluate("app.graph.clear()")

    def wait(self, condition: str, argument: Any = None) -> None:
        self.page.wait_for_function(condition, arg=argument)

    def faults_of_ours(self) -> list[str]:
        return [fault for fault in self.faults if PACK in fault or "NAI" in fault]

    def node_types(self) -> list[str]:
        return list(self.page.evaluate("app.graph.nodes.map(node => node.type)"))

    def missing_nodes(self) -> list[str]:
        """Types in the graph that the front end does not know."""
        condition = "!(node.type in LiteGraph.registered_node_types)"
        return list(self.page.evaluate(f"app.graph.nodes.filter(node => {condition}).map(node => node.type)"))

    def find_and_place(self, name: str) -> None:
        """Searches for a node by double click and its full name, and places the first that is found."""
        area = self.page.locator("#graph-canvas").bounding_box()
        self.page.mouse.dblclick(area["x"] + area["width"] / 2, area["y"] + area["height"] / 2)
        self.page.keyboard.type(name, delay=20)
        self.page.get_by_text(name, exact=True).first.wait_for()
        self.page.keyboard.press("Enter")
        self.wait("app.graph.nodes.length > 0")

    def browse_templates(self) -> None:
        """Opens the template browser at this pack."""
        self.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.page.get_by_text(PACK, exact=True).first.click()

    def template(self, name: str) -> Any:
        return self.page.get_by_text(name, exact=True).first

    def show_workflow(self, path: Path) -> None:
        """Opens a workflow file."""
        workflow = json.loads(path.read_text(encoding="utf-8"))
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.wait("count => app.graph.nodes.length == count", len(workflow["nodes"]))

    def fit(self) -> None:
        """Brings the whole graph into view, drawn in full at any scale."""
        self.page.evaluate(
            "() => { app.canvas.low_quality_zoom_threshold = 0; app.canvas.min_font_size_for_lod = 0;"
            " app.extensionManager.command.execute('Comfy.Canvas.FitView'); }"
        )
        self.page.wait_for_timeout(1500)  # it moves there slowly

    def run(self) -> None:
        """Runs the workflow, and waits until a picture is shown on a node."""
        self.page.evaluate("app.queuePrompt(0)")
        self.wait("app.graph.nodes.some(node => node.imgs?.length)")

    def picture(self, path: Path, **options: Any) -> None:
        self.page.screenshot(path=path, **options)


def greeted(base: Path) -> None:
    """Tells a server that is not started yet that its user was here before, so that no tutorial covers the page."""
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))


@contextmanager
def open_page(width: int = 1400, height: int = 900) -> Iterator[Page]:
    """A fresh browser with one page. Raises an ImportError without playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options, timeout=_PATIENCE)
        try:
            yield Page(browser.new_page(viewport={"width": width, "height": height}))
        finally:
            browser.close()
