"""The report of a dataset: its summary, and the HTML page."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captcha_exp.data.dataset import Dataset
from captcha_exp.report import dataset_page

LABELS = ["ab", "ab", "ba", "<b", "aa"]
FILES = ["ab.png", "ab_2.png", '"><img src=x onerror=alert(1)>.png', "\x1b[31m.png", "half\ud800.png"]


def dataset(**manifest: Any) -> Dataset:
    """Return a dataset of five gray images, with hostile names and labels."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 16, 32, 1), dtype=np.uint8))
    content = {
        "key": "0123",
        "images": 5,
        "distinct_labels": 4,
        "images_sha256": "00",
        "lengths": {"2": 5},
        "splits": {"train": 3, "validation": 1, "test": 1},
        "provenance": {"captcha": {"alphabet": "ab<z"}},
        "files": [
            {"file": name, "sha256": "", "label": label} for name, label in zip(FILES, LABELS, strict=True)
        ],
        "sizes": {"32x16": 100, "33x16": 2},
        "formats": {"PNG L": 5},
        "rejected": [{"file": FILES[2], "reason": "is blank: all pixels are equal", "kind": "invalid"}],
        "duplicates": [{"kind": "bytes", "indices": [0, 1]}],
        "remarks": {"has transparent pixels, which become white": [FILES[3]]},
        "ignored": ["<script>.txt"],
        "inferred": [{"key": "captcha.width", "value": "32", "evidence": "images of 32x16"}],
    }
    return Dataset(images, torch.zeros(5, 2, dtype=torch.int64), LABELS, {}, content | manifest)


def test_the_summary_counts_characters_labels_and_duplicates() -> None:
    summary = dataset_page.summarize(dataset())
    assert summary["characters"] == {"a": 5, "b": 4, "<": 1, "z": 0}
    assert summary["absent_characters"] == ["z"]
    assert summary["rare_characters"] == ["a", "b", "<"]
    assert summary["repeated_labels"] == {"ab": 2}
    assert summary["duplicate_files"] == [
        {"kind": "bytes", "files": ["ab.png", "ab_2.png"], "labels": ["ab", "ab"]}
    ]
    assert summary["odd_sizes"] == {"33x16": 2}


@pytest.mark.parametrize("sizes", [{}, {"32x16": 1, "33x16": 1, "34x16": 1}])
def test_sizes_are_odd_only_beside_a_usual_one(sizes: dict[str, int]) -> None:
    assert dataset_page.summarize(dataset(sizes=sizes))["odd_sizes"] == {}


class Page(HTMLParser):
    """Collects the tags, the attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_every_image_and_escapes_names(tmp_path: Path) -> None:
    data = dataset()
    augmented = [data.images[:2].numpy()] * 3
    dataset_page.write_page(data, augmented, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.images) == 5 + 2 * 3 + 2
    for source in page.images:
        content = base64.b64decode(source.removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(content)).size == (32, 16)
    assert "script" not in page.tags
    assert not {name for name in page.attributes if name.startswith("on")}
    assert "<script>.txt" in page.text
    assert "1 file that is not an image" in page.text
    assert r"\x1b[31m.png" in page.text
    assert not re.search(r"(https?:)?//\w", re.sub(r"data:image/png;base64,[^\"]*", "", text))


def test_a_page_without_anything_odd(tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"rejected": [], "duplicates": [], "remarks": {}, "ignored": [], "inferred": []}
    dataset_page.write_page(dataset(**nothing, files=[], sizes={}, formats={}), [], tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "rejected" not in text
    assert "groups of equal images" not in text
    assert "Inferred" not in text


@pytest.mark.ui
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """No request but for the page, nothing in the console, and every image is shown."""
    from playwright.sync_api import sync_playwright

    path = tmp_path / "page.html"
    data = dataset()
    dataset_page.write_page(data, [data.images[:2].numpy()] * 3, path)
    requests: list[str] = []
    messages: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})  # a phone
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(path.as_uri())
        widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        browser.close()
    assert [url for url in requests if not url.startswith("data:")] == [path.as_uri()]
    assert messages == []
    assert widths == [32] * 13
    assert overflow <= 0
