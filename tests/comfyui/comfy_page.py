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
# Seconds: a busy machine starts a page slowly, and the bundled workflow calibrates a model.
_PATIENCE, _RUN_PATIENCE = 120, 300
# What the front end keeps of a run that failed: faults of inputs by node, and that of the node that was running.
_ERRORS = "[app.lastExecutionError, ...Object.values(app.lastNodeErrors ?? {})].filter(Boolean)"
# Pixels of the window that bars may cover: left, top, right, bottom.
_BARS = [90, 100, 40, 60]
_FIT = """([left, top, right, bottom]) => {
    const { canvas, graph } = app;
    canvas.low_quality_zoom_threshold = 0;
    canvas.min_font_size_for_lod = 0;
    const title = LiteGraph.NODE_TITLE_HEIGHT;
    const boxes = [...graph.nodes.map(({ pos, size }) => [pos[0], pos[1] - title, pos[0] + size[0], pos[1] + size[1]]),
        ...graph.groups.map(({ pos, size }) => [pos[0], pos[1], pos[0] + size[0], pos[1] + size[1]])];
    const edge = (index, most) => most(...boxes.map(box => box[index]));
    const [x0, y0, x1, y1] = [edge(0, Math.min), edge(1, Math.min), edge(2, Math.max), edge(3, Math.max)];
    // The page may be larger than the window, and scrolled.
    document.documentElement.scrollTo(0, 0);
    document.body.scrollTo(0, 0);
    const place = canvas.canvas.getBoundingClientRect();
    const width = innerWidth - left - right, height = innerHeight - top - bottom;
    const scale = Math.min(width / (x1 - x0), height / (y1 - y0));
    canvas.ds.scale = scale;
    canvas.ds.offset[0] = (left - place.left + width / 2) / scale - (x0 + x1) / 2;
    canvas.ds.offset[1] = (top - place.top + height / 2) / scale - (y0 + y1) / 2;
    canvas.setDirty(true, true);
}"""

# How the page can draw nodes.
RENDERERS = ("classic", "modern")
# Node types that show a text of one line under their inputs when they have run.
_TELLING = ["NAILoadT5", "NAILoadClipT5", "NAIReplaceT5", "NAIT5TokenCount"]
_TELL = """types => app.graph.nodes.filter(node => types.includes(node.type)).forEach(node =>
    app.api.dispatchCustomEvent('progress_text', { nodeId: String(node.id), text: 'a line of text' }))"""
_NODES = "app.graph.nodes.map(({ id, type, pos, size }) => ({ id: Number(id), type, pos: [...pos], size: [...size] }))"


class Page:
    """The page, and the faults that it told of since it was opened."""

    def __init__(self, page: Any) -> None:
        self.page = page
        page.set_default_timeout(_PATIENCE * 1000)
        self.faults: list[str] = []
        page.on("console", lambda told: told.type == "error" and self.faults.append(f"{told.text} {told.location}"))
        page.on("pageerror", lambda error: self.faults.append(f"{error} {error.stack}"))
        page.on("response", lambda reply: reply.status >= 400 and self.faults.append(f"{reply.status} {reply.url}"))

    def open(self, url: str) -> None:
        """Opens it, waits until our nodes are known, and empties the graph that it greets with."""
        self.page.goto(url, wait_until="domcontentloaded")
        self.wait(
            "Boolean(window.app?.graph && window.LiteGraph?.registered_node_types?.NAILoadT5)", "our nodes are known"
        )
        self.wait("app.graph.nodes.length > 0", "the first graph is shown")
        self.page.evaluate("app.graph.clear()")

    def wait(self, condition: str, what: str, argument: Any = None, seconds: int = _PATIENCE) -> None:
        """Waits until a condition holds in the page; raises an AssertionError that says what did not come true."""
        from playwright.sync_api import TimeoutError as TooLate

        try:
            self.page.wait_for_function(condition, arg=argument, timeout=seconds * 1000)
        except TooLate:
            raise AssertionError(f"after {seconds} s it is not so that {what}; the page told: {self.faults}") from None

    def see(self, text: str, state: str = "visible") -> Any:
        """The first element with exactly this text, when it is there; raises an AssertionError if it does not come."""
        from playwright.sync_api import TimeoutError as TooLate

        element = self.page.get_by_text(text, exact=True).first
        try:
            element.wait_for(state=state)
        except TooLate:
            raise AssertionError(f"after {_PATIENCE} s no {text!r} is {state}; the page told: {self.faults}") from None
        return element

    def _comes(self, element: Any, seconds: int = 10) -> bool:
        """Whether an element comes into view in this time."""
        from playwright.sync_api import TimeoutError as TooLate

        try:
            element.first.wait_for(timeout=seconds * 1000)
        except TooLate:
            return False
        return True

    def see_no_more(self, text: str) -> None:
        """Waits until exactly this text is nowhere in sight."""
        self.page.get_by_text(text, exact=True).first.wait_for(state="hidden")

    def faults_of_ours(self) -> list[str]:
        return [fault for fault in self.faults if PACK in fault or "NAI" in fault]

    def node_types(self) -> list[str]:
        return list(self.page.evaluate("app.graph.nodes.map(node => node.type)"))

    def nodes(self) -> list[dict[str, Any]]:
        """Id, type, place and size of every node, as they are shown."""
        return list(self.page.evaluate(_NODES))

    def missing_nodes(self) -> list[str]:
        """Types in the graph that the front end does not know."""
        condition = "!(node.type in LiteGraph.registered_node_types)"
        return list(self.page.evaluate(f"app.graph.nodes.filter(node => {condition}).map(node => node.type)"))

    def find_and_place(self, name: str) -> None:
        """Searches for a node by double click and its full name, and places the first that is found."""
        area = self.page.locator("#graph-canvas").bounding_box()
        box, found = self.page.locator("input:focus"), self.page.get_by_text(name, exact=True)
        for _ in range(_PATIENCE // 10):  # a busy page may lose clicks and letters, and not take what it found
            self.page.mouse.dblclick(area["x"] + area["width"] / 2, area["y"] + area["height"] / 2)
            if self._comes(box):
                self.page.keyboard.type(name, delay=20)
            if self._comes(found):
                self.page.keyboard.press("Enter")
                self.page.wait_for_timeout(5000)
            if self.node_types():
                return
            self.page.keyboard.press("Escape")
        raise AssertionError(f"after {_PATIENCE} s {name} is not placed; the page told: {self.faults}")

    def browse_templates(self) -> None:
        """Opens the template browser at this pack."""
        self.page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.see(PACK).click()

    def open_template(self, name: str) -> None:
        """Opens a workflow from the template browser, which shows it."""
        self.see(name).click()
        self.wait("app.graph.nodes.length > 0", f"{name} is opened")

    def show_workflow(self, path: Path) -> None:
        """Opens a workflow file."""
        self.show(json.loads(path.read_text(encoding="utf-8")), path.stem)

    def show(self, workflow: dict[str, Any], name: str) -> None:
        """Opens a workflow as the editor saves it."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        count = len(workflow["nodes"])
        self.wait("count => app.graph.nodes.length == count", f"{name} shows its {count} nodes", count)

    def has_modern_nodes(self) -> bool:
        """Whether nodes can be elements of the page; before this release of the front end they are an experiment."""
        version = self.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
        return tuple(map(int, version.split(".")[:2])) >= (1, 41)

    def show_nodes_by(self, renderer: str) -> None:
        """Draws nodes the classic way, on the canvas, or the modern one, as elements of the page."""
        modern = json.dumps(renderer == "modern")
        self.page.evaluate(f"app.extensionManager.setting.set('Comfy.VueNodes.Enabled', {modern})")
        self.wait(f"Boolean(LiteGraph.vueNodesMode) == {modern}", f"nodes are {renderer}")

    def smallest_sizes(self, path: Path) -> dict[int, list[float]]:
        """Width and height that the page gives to each node of a workflow file which asks for its width alone.

        Nodes that show a text when they have run are as large as with one.
        """
        workflow = json.loads(path.read_text(encoding="utf-8"))
        for node in workflow["nodes"]:
            node["size"] = [node["size"][0], 1]
        self.show(workflow, path.stem)
        self.page.evaluate(_TELL, _TELLING)
        self.page.wait_for_timeout(2000)  # the page draws, and gives its nodes what they need
        return {node["id"]: node["size"] for node in self.nodes()}

    def fit(self) -> None:
        """Brings the whole graph into view, between the bars of the page, drawn in full at any scale."""
        self.page.evaluate(_FIT, _BARS)
        self.page.wait_for_timeout(1500)  # it is drawn when the page has time

    def run(self) -> None:
        """Runs the workflow, and waits until it has ended.

        Raises:
            AssertionError: the page shows an error, or no picture on any node.
        """
        self.page.evaluate(
            "() => { window.hasEnded = false; for (const event of ['execution_success', 'execution_error'])"
            " app.api.addEventListener(event, () => { window.hasEnded = true; }); app.queuePrompt(0); }"
        )
        self.wait(f"window.hasEnded || {_ERRORS}.length > 0", "the workflow has ended", seconds=_RUN_PATIENCE)
        if errors := self.errors():
            raise AssertionError(f"the page shows errors: {errors}")
        self.wait("app.graph.nodes.some(node => node.imgs?.length)", "a node shows a picture")

    def errors(self) -> list[Any]:
        """What the front end shows as the errors of the last run, and the nodes that it marks."""
        self.page.wait_for_timeout(500)  # it learns of the end and of an error by two events
        marked = self.page.evaluate("app.graph.nodes.filter(node => node.has_errors).map(node => node.type)")
        return [*self.page.evaluate(_ERRORS), *marked]

    def picture(self, path: Path, **options: Any) -> None:
        self.page.screenshot(path=path, **options)


def greeted(base: Path) -> None:
    """Tells a server that is not started yet that its user was here before, so that nothing covers the page."""
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}))


@contextmanager
def open_page(width: int = 1400, height: int = 900) -> Iterator[Page]:
    """A fresh browser with one page. Raises an ImportError without playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options, timeout=_PATIENCE * 1000)
        try:
            yield Page(browser.new_page(viewport={"width": width, "height": height}))
        finally:
            browser.close()
