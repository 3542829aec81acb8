"""The report of a dataset: its content in numbers, and one HTML page with images that needs no network."""

import base64
import functools
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from captcha_exp.data.dataset import Dataset
from captcha_exp.data.duplicates import KINDS
from captcha_exp.runtime.files import write_atomically
from captcha_exp.runtime.text import escape_unprintable

MIN_OCCURRENCES = 10  # of a character that is not called rare
MAX_SAMPLES, MAX_GROUPS, MAX_ROWS = 60, 40, 200  # shown on the page


def summarize(data: Dataset) -> dict[str, Any]:
    """Return what is in a dataset, as plain values: the content of `data --json`, without the manifest."""
    alphabet, labels = data.alphabet, data.labels
    occurrences = Counter("".join(labels))
    characters = {c: occurrences[c] for c in alphabet.characters}
    repeated = [(label, count) for label, count in Counter(labels).most_common() if count > 1]
    files = [each["file"] for each in data.manifest["files"]]
    return {
        "characters": characters,
        "absent_characters": [c for c, count in characters.items() if not count],
        "rare_characters": [c for c, count in characters.items() if 0 < count < MIN_OCCURRENCES],
        "repeated_labels": dict(repeated),
        "duplicate_files": [
            {
                "kind": group["kind"],
                "files": [files[n] for n in group["indices"]],
                "labels": [labels[n] for n in group["indices"]],
            }
            for group in data.manifest["duplicates"]
        ],
        "odd_sizes": _odd_sizes(data.manifest["sizes"]),
    }


def _odd_sizes(sizes: dict[str, int]) -> dict[str, int]:
    """Return the sizes of fewer than 5 % of the images, if most have one size."""
    total = sum(sizes.values())
    if not total or max(sizes.values()) < 0.5 * total:
        return {}
    return {size: count for size, count in sizes.items() if count < 0.05 * total}


def write_page(data: Dataset, augmented: Sequence[npt.NDArray[np.uint8]], path: Path) -> None:
    """Write the HTML page of a dataset; `augmented` has versions (N, H, W, C) of its first images."""
    summary, manifest = summarize(data), data.manifest
    page = (
        template_environment()
        .get_template("dataset.html")
        .render(
            manifest=manifest,
            summary=summary,
            kinds=KINDS,
            most=max(summary["characters"].values(), default=1),
            total_characters=sum(summary["characters"].values()),
            samples=_tiles(data, range(min(MAX_SAMPLES, len(data.labels)))),
            augmented=[[data_uri(image) for image in version] for version in zip(*augmented, strict=True)],
            groups=[
                {"kind": KINDS[group["kind"]], "tiles": _tiles(data, group["indices"][:6])}
                for group in manifest["duplicates"][:MAX_GROUPS]
            ],
            max_groups=MAX_GROUPS,
            max_rows=MAX_ROWS,
        )
    )
    write_atomically(path, page.encode())


@functools.cache  # with the compiled templates
def template_environment() -> Environment:
    """Return the templates; file names and labels are hostile input, and are escaped."""
    loader = PackageLoader("captcha_exp.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["printable"] = escape_unprintable
    environment.filters["thousands"] = "{:,}".format
    return environment


def _tiles(data: Dataset, indices: Iterable[int]) -> list[dict[str, str]]:
    """Return the image, label and name of each index."""
    return [
        {"image": data_uri(data.images[n].numpy()), "label": data.labels[n], "name": data.image_name(n)}
        for n in indices
    ]


def data_uri(image: npt.NDArray[np.uint8]) -> str:
    """Return an image (H, W, C) as the address of a PNG file that contains it."""
    content = io.BytesIO()
    pixels = image[..., 0] if image.shape[2] == 1 else image
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
