"""Images that are the same in bytes, in pixels, or nearly."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import warnings
from PIL import Image
from scipy import sparse
from scipy.sparse import csgraph

from captcha_exp import compose, load
from captcha_exp.config import CaptchaLibraryConfig, resolve
from captcha_exp.data import dataset, duplicates, images
from captcha_exp.data.duplicates import DuplicateGroup, find_duplicates, split_keys
from captcha_exp.data.resize import resize
from captcha_exp.data.sources.generators import get_renderer_spec, image_rng
from captcha_exp.runtime.device import detect_machine


def drawn(count: int, seed: int = 0) -> list[tuple[str, Image.Image]]:
    """Return labels and images of the default generator."""
    config = load(compose(f"data.seed={seed}", "tracking=none"))
    assert isinstance(config.data, CaptchaLibraryConfig)
    spec = get_renderer_spec(config.data)
    render, found = spec.make_renderer(), []
    for index in range(count):
        rng = image_rng(config.data, index)
        label = spec.sample_label(config.captcha, rng)
        found.append((label, render(label, rng)))
    return found


def resized(sample: Sequence[Image.Image]) -> npt.NDArray[np.uint8]:
    arrays = [resize(images.to_array(image, 3)[None], 28, 76)[0] for image in sample]
    return np.stack(arrays)


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def find(arrays: npt.NDArray[np.uint8], hashes: Sequence[str] = ()) -> list[DuplicateGroup]:
    return find_duplicates(
        hashes or [str(n) for n in range(len(arrays))], [array.tobytes() for array in arrays], arrays
    )


def test_distinct_images_are_no_duplicates() -> None:
    assert find(resized([image for _, image in drawn(800)])) == []


def test_recompressed_images_are_found() -> None:
    sample = [image for _, image in drawn(400)]
    copies = [recompressed(image, 40 + n % 50) for n, image in enumerate(sample[:100])]
    found = find(resized([*sample, *copies]))
    expected = {(n, 400 + n) for n in range(100)}
    assert {group.indices for group in found} <= expected
    assert len(found) >= 95
    assert {group.kind for group in found} == {"similar"}


def test_each_kind_has_its_groups() -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (6, 16, 32, 1), dtype=np.uint8)
    arrays[2], arrays[4] = arrays[0], arrays[0]
    found = find(arrays, ["a", "b", "a", "c", "d", "e"])
    assert found == [DuplicateGroup("bytes", (0, 2)), DuplicateGroup("pixels", (0, 4))]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_images(count: int) -> None:
    arrays = np.random.default_rng(0).integers(0, 256, (count, 16, 32, 1), dtype=np.uint8)
    assert find(arrays) == []


def test_black_images_are_not_compared_as_noise() -> None:
    arrays = np.zeros((3, 16, 32, 1), np.uint8)
    arrays[:, 0, 0] = [[1], [2], [3]]
    assert all(np.isfinite(duplicates._small_versions(arrays)).ravel())


def test_equal_images_and_equal_labels_have_one_split_key() -> None:
    labels = ["d", "c", "b", "a", "d", "e"]
    groups = [DuplicateGroup("similar", (0, 1)), DuplicateGroup("pixels", (1, 2))]
    assert split_keys(labels, groups) == ["b", "b", "b", "a", "b", "e"]
    assert split_keys(labels, []) == labels


def test_near_duplicates_with_other_labels_never_cross_a_split(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = root / "images"
    folder.mkdir()
    sample = drawn(150)
    for n, (label, image) in enumerate(sample):
        image.save(folder / f"{n:05}-{label}.png")
    for n, (label, image) in enumerate(sample[:50]):
        image.convert("RGB").save(folder / f"{1000 + n}-{label[::-1]}.jpg", quality=60)
    config = load(compose("data=folder", f"data.path={folder}", "device.name=cpu", "tracking=none"))
    spec = dataset.inspect_dataset(resolve(config, detect_machine()))
    split_of = {int(n): name for name, rows in spec.split_indices.items() for n in rows}
    groups = [group for group in spec.scan.duplicates if group.kind == "similar"]
    assert len(groups) >= 48
    for group in groups:
        assert len({split_of[n] for n in group.indices}) == 1
    assert any("groups of nearly equal images have different labels" in line for line in warnings(caplog))


def test_connected_components_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        count = int(rng.integers(1, 60))
        pairs = rng.integers(0, count, (int(rng.integers(0, 80)), 2))
        edges = sparse.coo_array((np.ones(len(pairs), np.bool_), pairs.T), shape=(count, count))
        _, component = csgraph.connected_components(edges, directed=False)
        smallest = [int(np.flatnonzero(component == each)[0]) for each in component]
        assert duplicates._smallest_connected(count, pairs).tolist() == smallest
