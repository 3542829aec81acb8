"""Find what a built page loads from another host. Also a hook of MkDocs: each finding is a warning."""

import logging
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

LOADING = {  # tag -> attributes whose address a browser loads by itself; an <a> is followed by the reader
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
_REMOTE = re.compile(r"(?:^|[\s,])((?:[a-z][a-z0-9+.-]*:)?//[^\s,]+)", re.IGNORECASE)
_IN_CSS = re.compile(r"(?:url\(\s*|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        for name, value in attrs:
            if name in LOADING.get(tag, ()):
                self.remote += _REMOTE.findall(value or "")
            elif name == "style":
                self.remote += _IN_CSS.findall(value or "")

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.remote += _IN_CSS.findall(data)


def remote_loads(site: Path) -> list[str]:
    """Return a line for each address on another host that a page or style sheet of the site loads."""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".svg"):
            page = _Page()
            page.feed(path.read_text(encoding="utf-8"))
            remote = page.remote
        elif path.suffix == ".css":
            remote = _IN_CSS.findall(path.read_text(encoding="utf-8"))
        else:
            continue
        found += [f"{path.relative_to(site)}: loads {address}" for address in remote]
    return found


def on_post_build(config: Mapping[str, Any]) -> None:
    """Warn of each address, which fails a strict build; called by MkDocs."""
    for line in remote_loads(Path(config["site_dir"])):
        logging.getLogger("mkdocs.hooks.offline_site").warning(line)
