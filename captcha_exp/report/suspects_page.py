"""The page of suspected wrong labels: images with both texts, to be marked and saved as corrections.

The page needs no network. Its script runs only in the browser; what is marked there becomes a file that the
user saves.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from captcha_exp.data.dataset import Dataset
from captcha_exp.report.dataset_page import data_uri, template_environment
from captcha_exp.runtime.files import write_atomically

MAX_SUSPECTS = 500  # on the page


def write_page(data: Dataset, suspects: Sequence[Mapping[str, Any]], target: Path, page: Path) -> None:
    """Write the page.

    Args:
        data: The dataset.
        suspects: The values of each, the most certain first, as in `captcha-exp data --json`.
        target: The file with the corrections; those that were applied are part of what the page saves.
        page: Where to write it.
    """
    environment = template_environment()
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "suspects.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = suspects[:MAX_SUSPECTS]
    text = environment.get_template("suspects.html").render(
        suspects=[{**each, "image": data_uri(data.images[each["index"]].numpy())} for each in shown],
        num_more=len(suspects) - len(shown),
        earlier=data.manifest["corrections"],
        target=str(target),
        key=data.manifest["key"],
        script=script,
        script_sha256=digest,
    )
    write_atomically(page, text.encode())
