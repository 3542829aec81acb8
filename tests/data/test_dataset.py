"""Test splits, batches, and the cache of images."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import generator_config, warnings
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from captcha_exp import compose, load
from captcha_exp.config import Config, to_dict
from captcha_exp.data import dataset, sources, splits
from captcha_exp.data.dataset import Dataset, Split
from captcha_exp.errors import ConfigError, UserError

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny: Config, tmp_path: Path) -> Config:
    """Return a config of 60 images with a temporary cache."""
    return with_data(tiny, count=60, cache=str(tmp_path / "cache"))


@pytest.fixture
def render_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace rendering by noise, and record the number of images of each call."""
    calls: list[int] = []

    def render(data: Any, captcha: Any, indices: Any) -> Any:
        calls.append(len(indices))
        shape = (len(indices), captcha.height, captcha.width, captcha.channels)
        return np.random.default_rng(data.seed).integers(0, 256, shape, dtype=np.uint8)

    monkeypatch.setattr(sources, "render_images", render)
    return calls


def with_data(config: Config, **data: Any) -> Config:
    return replace(config, data=replace(config.data, **data))


def with_captcha(config: Config, **captcha: Any) -> Config:
    return replace(config, captcha=replace(config.captcha, **captcha))


def load_dataset(config: Config) -> Dataset:
    return dataset.load_or_build(dataset.inspect_dataset(config))


def split_labels(config: Config, labels: list[str]) -> dict[str, list[int]]:
    return splits.split_images(labels, [], config)


LABELS = [f"{n:04}" for n in range(4000)]


# -- the split -----------------------------------------------------------------------------------------------


def test_every_image_is_in_one_split(config: Config) -> None:
    members = split_labels(config, LABELS)
    assert list(members) == ["train", "validation", "test"]
    assert sorted(members["train"] + members["validation"] + members["test"]) == list(range(4000))


def test_no_label_is_in_two_splits(config: Config) -> None:
    labels = [LABELS[n % 100] for n in range(700)]
    label_sets = [{labels[n] for n in rows} for rows in split_labels(config, labels).values()]
    assert sum(map(len, label_sets)) == len(set.union(*label_sets)) == 100


def test_new_images_do_not_move_existing_ones(config: Config) -> None:
    few, many = split_labels(config, LABELS[:500]), split_labels(config, LABELS)
    assert all(few[name] == [n for n in many[name] if n < 500] for name in few)


def test_the_split_does_not_depend_on_the_order(config: Config) -> None:
    one, other = split_labels(config, LABELS), split_labels(config, LABELS[::-1])
    assert all({LABELS[n] for n in one[name]} == {LABELS[::-1][n] for n in other[name]} for name in one)


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.1), (0.25, 0.05), (0.4, 0.4)])
def test_split_sizes_match_the_fractions(config: Config, validation: float, test: float) -> None:
    config = with_data(config, validation_fraction=validation, test_fraction=test)
    members = split_labels(config, LABELS)
    for name, fraction in (("validation", validation), ("test", test)):
        assert abs(len(members[name]) - 4000 * fraction) < 4 * (4000 * fraction * (1 - fraction)) ** 0.5


def test_split_seed_changes_the_split(config: Config) -> None:
    one, other = split_labels(config, LABELS), split_labels(with_data(config, split_seed=1), LABELS)
    moved = len(set(one["train"]) ^ set(other["train"]))
    assert moved > 1000


def test_other_seeds_do_not_change_the_split(config: Config) -> None:
    assert split_labels(config, LABELS) == split_labels(with_data(replace(config, seed=9), seed=9), LABELS)


def test_each_label_is_in_the_test_split_of_one_fold(config: Config) -> None:
    labels = [f"{n:04}" for n in range(4000)]
    tested: list[int] = []
    for fold in range(5):
        members = splits.split_images(
            labels, [], with_data(config, folds=5, fold=fold, validation_fraction=0.1)
        )
        assert sorted(n for indices in members.values() for n in indices) == list(range(4000))
        assert len(members["validation"]) == pytest.approx(400, abs=80)
        tested += members["test"]
    assert sorted(tested) == list(range(4000))


def test_a_fold_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"fold=5: must be less than folds=5; the first is 0"):
        load(compose("data.folds=5", "data.fold=5"))
    with pytest.raises(ConfigError, match=r"validation_fraction=0.5 and folds=2 leave no training set"):
        load(compose("data.folds=2", "data.validation_fraction=0.5"))


@pytest.mark.parametrize(
    ("fractions", "empty"),
    [((0.0, 0.2), "validation"), ((0.2, 0.0), "test"), ((0.98, 0.01), "train")],
)
def test_an_empty_split_is_an_error_in_one_line(
    config: Config, fractions: tuple[float, float], empty: str
) -> None:
    validation, test = fractions
    with pytest.raises(UserError) as error:
        dataset.inspect_dataset(with_data(config, validation_fraction=validation, test_fraction=test))
    (line,) = error.value.lines
    assert line.startswith("data.count=60: ")
    assert f"distinct labels leave the {empty} split empty; use more images" in line
    assert not Path(config.data.cache).exists()


# -- content -------------------------------------------------------------------------------------------------


def test_images_targets_and_labels_match(config: Config) -> None:
    data = load_dataset(config)
    assert data.images.shape == (60, 16, 32, 3)
    assert data.images.dtype == torch.uint8
    assert data.targets.shape == (60, 2)
    rendered = sources.render_images(generator_config(config), config.captcha, range(60))
    assert (data.images.numpy() == rendered).all()
    assert data.labels == sources.generate_labels(generator_config(config), config.captcha)
    for n, label in enumerate(data.labels):
        assert "".join("01234"[k] for k in data.targets[n]) == label


def test_class_ids_are_in_the_order_of_the_alphabet(config: Config, render_calls: list[int]) -> None:
    data = load_dataset(with_captcha(config, alphabet="3210x"))
    for label, target in zip(data.labels, data.targets.tolist(), strict=True):
        assert label == "".join("3210x"[k] for k in target)


def test_a_split_has_its_own_images(config: Config, render_calls: list[int]) -> None:
    data = load_dataset(config)
    for name in splits.SPLITS:
        split = data.split(name, CPU, 512)
        assert len(split) == len(split.images) == len(split.targets) == len(split.indices)
        assert torch.equal(split.images, data.images[split.indices])
        assert torch.equal(split.targets, data.targets[split.indices])


def test_the_manifest_describes_the_dataset(config: Config, render_calls: list[int]) -> None:
    data = load_dataset(config)
    manifest = data.manifest
    assert manifest["images"] == 60
    assert manifest["distinct_labels"] == len(set(data.labels))
    assert manifest["lengths"] == {"2": 60}
    assert manifest["splits"] == {name: len(rows) for name, rows in data.split_indices.items()}
    assert json.loads(json.dumps(manifest)) == manifest


# -- batches -------------------------------------------------------------------------------------------------


def make_split(count: int) -> Split:
    """Return a split in which pixels and target of each image are its position; indices are 1000 higher."""
    numbers = torch.arange(count)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 1)
    return Split(images, numbers[:, None], numbers + 1000, CPU)


@given(count=st.integers(1, 120), size=st.integers(1, 130), shuffled=st.booleans())
def test_batches_have_every_image_once(count: int, size: int, shuffled: bool) -> None:
    """With and without an order, including the last smaller batch."""
    order = make_split(count).epoch_order(0, 1) if shuffled else None
    batches = list(make_split(count).batches(size, order))
    assert [len(b.indices) for b in batches] == [min(size, count - start) for start in range(0, count, size)]
    positions = torch.cat([b.indices for b in batches]) - 1000
    assert positions.tolist() == (list(range(count)) if order is None else order.tolist())
    assert sorted(positions.tolist()) == list(range(count))
    assert torch.cat([b.targets for b in batches])[:, 0].tolist() == positions.tolist()
    assert torch.cat([b.images for b in batches])[:, 1, 2, 0].tolist() == positions.tolist()


def test_each_epoch_has_its_own_order() -> None:
    orders = [make_split(100).epoch_order(0, epoch).tolist() for epoch in range(1, 6)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert list(range(100)) not in orders


def test_the_order_depends_only_on_seed_and_epoch() -> None:
    first = make_split(100).epoch_order(0, 3)
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(first, make_split(100).epoch_order(0, 3))
    assert not torch.equal(first, make_split(100).epoch_order(1, 3))


def test_the_order_does_not_use_the_global_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    make_split(10).epoch_order(0, 1)
    assert torch.equal(torch.rand(1), expected)


def test_a_split_that_is_not_preloaded_gives_the_same_batches(
    config: Config, render_calls: list[int]
) -> None:
    data = load_dataset(config)
    preloaded, copied = (data.split("train", CPU, limit) for limit in (512, 0))
    order = preloaded.epoch_order(0, 1)
    for a, b in zip(preloaded.batches(7, order), copied.batches(7, order), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_only_tensors_in_cpu_memory_are_pinned() -> None:
    """`cuda` is not equal to `cuda:0`, the device of a preloaded tensor."""

    class FakeTensor:
        is_cpu = False
        device = torch.device("cuda:0")

        def pin_memory(self) -> "FakeTensor":
            if not self.is_cpu:
                raise RuntimeError("only dense CPU tensors can be pinned")
            self.pinned = True
            return self

        def to(self, device: torch.device, non_blocking: bool) -> "FakeTensor":
            self.copied_to = (device.type, non_blocking)
            return self

    empty = torch.zeros(0)
    split = Split(empty, empty, empty, torch.device("cuda"))
    on_gpu, on_cpu = FakeTensor(), FakeTensor()
    on_cpu.is_cpu = True
    for part in (on_gpu, on_cpu):
        split._to_device(part)  # type: ignore[arg-type]  # has the attributes that are used

    assert not hasattr(on_gpu, "pinned")
    assert on_cpu.pinned
    assert on_cpu.copied_to == ("cuda", True)


def test_all_tensors_of_a_batch_are_on_the_device(config: Config, render_calls: list[int]) -> None:
    """Including the indices: indexing with CPU tensors would synchronize."""
    for limit in (512, 0):
        split = load_dataset(config).split("train", torch.device("meta"), limit)
        batch = next(split.batches(7))
        assert [part.device.type for part in batch] == ["meta"] * 3


# -- the cache -----------------------------------------------------------------------------------------------


def test_images_are_rendered_once(config: Config, render_calls: list[int]) -> None:
    first, again = load_dataset(config), load_dataset(config)
    assert render_calls == [60]
    assert torch.equal(first.images, again.images)
    assert first.manifest == again.manifest


def flip_bit(path: Path, position: Callable[[int], int], bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position(len(content))] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".safetensors", ".sha256"])
@pytest.mark.parametrize(
    "position", [lambda n: 0, lambda n: n // 2, lambda n: n - 1], ids=["first", "middle", "last"]
)
@pytest.mark.parametrize("bit", [1, 128])
def test_a_flipped_bit_is_detected_and_the_cache_rebuilt(
    config: Config,
    render_calls: list[int],
    suffix: str,
    position: Callable[[int], int],
    bit: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = load_dataset(config)
    images = original.images.clone()  # the tensor itself is a view of the file
    flip_bit(Path(config.data.cache) / f"{original.manifest['key']}{suffix}", position, bit)
    caplog.clear()
    again = load_dataset(config)
    assert render_calls == [60, 60]
    (warning,) = warnings(caplog)
    assert "is damaged" in warning
    assert original.manifest["key"] in warning
    assert torch.equal(again.images, images)
    load_dataset(config)
    assert render_calls == [60, 60]


def test_partial_files_of_killed_processes_are_deleted(config: Config, render_calls: list[int]) -> None:
    key = load_dataset(config).manifest["key"]
    folder = Path(config.data.cache)
    part = folder / f".{key}.123.part"
    other = folder / f".{'0' * 16}.123.part"  # of another dataset, which may be being written
    for path in (part, other):
        path.write_bytes(b"part")
    load_dataset(config)
    assert (part.exists(), other.exists()) == (False, True)


def test_a_truncated_cache_file_is_detected(
    config: Config, render_calls: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    key = load_dataset(config).manifest["key"]
    path = Path(config.data.cache) / f"{key}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    caplog.clear()
    assert len(load_dataset(config).images) == 60
    assert len(warnings(caplog)) == 1


def test_a_cache_file_without_its_hash_is_rebuilt(config: Config, render_calls: list[int]) -> None:
    """The process that wrote the images was killed before it wrote the hash."""
    key = load_dataset(config).manifest["key"]
    (Path(config.data.cache) / f"{key}.sha256").unlink()
    load_dataset(config)
    assert render_calls == [60, 60]


def cache_key(config: Config) -> str:
    return dataset.inspect_dataset(config).key


@pytest.mark.parametrize(
    "other",
    [
        lambda c: with_captcha(c, width=33),
        lambda c: with_captcha(c, height=17),
        lambda c: with_captcha(c, channels=1),
        lambda c: with_captcha(c, alphabet="01243"),
        lambda c: with_captcha(c, length=3),
        lambda c: with_data(c, count=61),
        lambda c: with_data(c, seed=1),
        lambda c: with_data(c, width=161),
        lambda c: with_data(c, height=61),
        lambda c: with_data(c, fonts=("DejaVuSans.ttf",)),
    ],
)
def test_other_images_have_another_cache_file(config: Config, other: Callable[[Config], Config]) -> None:
    assert cache_key(other(config)) != cache_key(config)


@pytest.mark.parametrize(
    "same",
    [
        lambda c: with_data(c, validation_fraction=0.3, test_fraction=0.3),
        lambda c: with_data(c, split_seed=1),
        lambda c: with_data(c, workers=2),
        lambda c: with_data(c, cache="elsewhere"),
        lambda c: replace(c, seed=1, name="other"),
        lambda c: replace(c, train=replace(c.train, batch_size=3)),
    ],
)
def test_the_same_images_have_the_same_cache_file(config: Config, same: Callable[[Config], Config]) -> None:
    assert cache_key(same(config)) == cache_key(config)


@pytest.mark.parametrize("part", ["pillow", "package", "freetype", "raqm", "fonts"])
def test_another_version_of_a_dependency_has_another_cache_file(
    config: Config, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    before = cache_key(config)
    dependencies = {**sources.rendering_dependencies(generator_config(config)), part: "another"}
    monkeypatch.setattr(sources, "rendering_dependencies", lambda data: dependencies)
    assert cache_key(config) != before


def test_the_cache_key_does_not_depend_on_the_order_of_keys(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cache_key(config)
    dependencies = dict(reversed(sources.rendering_dependencies(generator_config(config)).items()))
    monkeypatch.setattr(sources, "rendering_dependencies", lambda data: dependencies)
    assert cache_key(config) == before


def test_another_split_uses_the_same_cache_file(config: Config, render_calls: list[int]) -> None:
    one = load_dataset(config)
    other = load_dataset(with_data(config, validation_fraction=0.4, split_seed=3))
    assert render_calls == [60]
    assert one.manifest["splits"] != other.manifest["splits"]


LOAD_DATASET = """
import json, logging, sys
from captcha_exp import load
from captcha_exp.data import dataset

logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
config = load(json.loads(sys.argv[1]))
data = dataset.load_or_build(dataset.inspect_dataset(config))
print(data.manifest["images_sha256"])
"""


@pytest.mark.long
def test_only_one_of_two_concurrent_processes_renders(config: Config) -> None:
    config = with_data(config, count=300)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD_DATASET, json.dumps(to_dict(config))],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (one, digest), (other, same_digest) = outputs
    assert digest == same_digest
    rendered, cached = sorted([one, other])
    assert rendered.startswith("Rendered 300 images")
    assert cached.startswith("Using cached images from")


def test_the_cache_file_can_be_read_without_this_package(config: Config, render_calls: list[int]) -> None:
    """And no other files are left."""
    data = load_dataset(config)
    key = data.manifest["key"]
    names = {path.name for path in Path(config.data.cache).iterdir()}
    assert names - {f"{key}.lock"} == {f"{key}.safetensors", f"{key}.sha256"}
    from safetensors.numpy import load_file

    stored: dict[str, Any] = load_file(Path(config.data.cache) / f"{key}.safetensors")
    assert torch.equal(Tensor(stored["images"]).to(torch.uint8), data.images)
