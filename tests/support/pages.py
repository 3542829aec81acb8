"""Read an HTML page as a test sees it, and open it in a browser."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Literal, NamedTuple


class Page(HTMLParser):
    """The tags, the attributes, the links, the images and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.tables: dict[str, list[list[str]]] = {}
        self._rows: list[list[str]] = []
        self._is_in_cell = False
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        values = {name: value or "" for name, value in attrs}
        if tag == "img":
            self.images.append(values["src"])
        elif tag == "a":
            self.links.append(values["href"])
        elif tag == "table":
            self._rows = self.tables.setdefault(values.get("id", ""), [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            self._is_in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._is_in_cell = self._is_in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._is_in_cell:
            self._rows[-1][-1] += data.strip()


class Seen(NamedTuple):
    """What a browser does with a page."""

    requests: list[str]
    """but for the page itself and its own images"""
    messages: list[str]
    image_widths: list[int]
    overflow: int
    """pixels that the page is wider than the window"""
    text: str
    smallest_text: float
    """height of the smallest text in a chart, in pixels"""


def open_in_browser(
    path: Path, width: int, screenshot: Path, scheme: Literal["light", "dark"] = "light"
) -> Seen:
    """Open a page in chromium, with all its details, and save a screenshot of it."""
    from playwright.sync_api import sync_playwright

    requests: list[str] = []
    messages: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        seen = Seen(
            requests=[url for url in requests if not url.startswith("data:") and url != path.as_uri()],
            messages=messages,
            image_widths=page.eval_on_selector_all("img", "images => images.map(i => i.naturalWidth)"),
            overflow=page.evaluate("document.documentElement.scrollWidth - window.innerWidth"),
            text=page.inner_text("body"),
            smallest_text=page.evaluate(
                "Math.min(99, ...[...document.querySelectorAll('svg text')]"
                ".map(text => text.getBoundingClientRect().height))"
            ),
        )
        page.screenshot(path=screenshot, full_page=True)
        browser.close()
    return seen
