"""Splits without leaks, batches without losses, and a cache that is drawn once and noticed when damaged."""

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
from conftest import Heard, drawn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from captcha_exp.config import Config, to_dict
from captcha_exp.data import dataset, sources, splits
from captcha_exp.data.dataset import Dataset, Split
from captcha_exp.errors import UserError
from captcha_exp.runtime.console import NullDisplay

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny: Config, tmp_path: Path) -> Config:
    """Few pictures, in a cache of this test's own."""
    return changed(tiny, count=60, cache=str(tmp_path / "cache"))


@pytest.fixture
def drawings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures were asked of the generator, at each asking; they are noise, and quickly made."""
    asked: list[int] = []

    def draw(data: Any, captcha: Any, indices: Any, display: Any) -> Any:
        asked.append(len(indices))
        shape = (len(indices), captcha.height, captcha.width, captcha.channels)
        return np.random.default_rng(data.seed).integers(0, 256, shape, dtype=np.uint8)

    monkeypatch.setattr(sources, "draw", draw)
    return asked


def changed(config: Config, **data: Any) -> Config:
    return replace(config, data=replace(config.data, **data))


def looking(config: Config, **captcha: Any) -> Config:
    return replace(config, captcha=replace(config.captcha, **captcha))


def prepare(config: Config, display: NullDisplay | None = None) -> Dataset:
    return dataset.load_or_build(
        dataset.inspect_dataset(config, NullDisplay()), config, display or NullDisplay()
    )


def members(config: Config, labels: list[str]) -> dict[str, list[int]]:
    return splits.split_by_label(labels, config)


LABELS = [f"{n:04}" for n in range(4000)]


# -- the split -----------------------------------------------------------------------------------------------


def test_every_picture_is_on_one_side(config: Config) -> None:
    sides = members(config, LABELS)
    assert list(sides) == ["train", "validation", "test"]
    assert sorted(sides["train"] + sides["validation"] + sides["test"]) == list(range(4000))


def test_no_label_is_on_two_sides(config: Config) -> None:
    labels = [LABELS[n % 100] for n in range(700)]
    sides = [{labels[n] for n in rows} for rows in members(config, labels).values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 100


def test_adding_pictures_moves_none(config: Config) -> None:
    few, many = members(config, LABELS[:500]), members(config, LABELS)
    assert all(few[name] == [n for n in many[name] if n < 500] for name in few)


def test_the_order_of_the_pictures_moves_no_label(config: Config) -> None:
    one, other = members(config, LABELS), members(config, LABELS[::-1])
    assert all({LABELS[n] for n in one[name]} == {LABELS[::-1][n] for n in other[name]} for name in one)


@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.1), (0.25, 0.05), (0.4, 0.4)])
def test_the_shares_are_near_the_fractions(config: Config, validation: float, test: float) -> None:
    config = changed(config, validation_fraction=validation, test_fraction=test)
    sides = members(config, LABELS)
    for name, share in (("validation", validation), ("test", test)):
        assert abs(len(sides[name]) - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_another_split_seed_moves_labels(config: Config) -> None:
    one, other = members(config, LABELS), members(changed(config, split_seed=1), LABELS)
    moved = len(set(one["train"]) ^ set(other["train"]))
    assert moved > 1000


def test_the_seed_of_the_weights_and_of_the_pictures_moves_no_label(config: Config) -> None:
    assert members(config, LABELS) == members(changed(replace(config, seed=9), seed=9), LABELS)


@pytest.mark.parametrize(
    ("fractions", "empty"),
    [((0.0, 0.2), "validation"), ((0.2, 0.0), "test"), ((0.98, 0.01), "train")],
)
def test_an_empty_split_is_one_line(config: Config, fractions: tuple[float, float], empty: str) -> None:
    validation, test = fractions
    with pytest.raises(UserError) as error:
        dataset.inspect_dataset(
            changed(config, validation_fraction=validation, test_fraction=test), NullDisplay()
        )
    (line,) = error.value.lines
    assert line.startswith("data.count=60: ")
    assert f"different labels leave the {empty} split empty; take more pictures" in line
    assert not Path(config.data.cache).exists()


# -- what the pictures are -----------------------------------------------------------------------------------


def test_images_targets_and_labels_belong_together(config: Config) -> None:
    data = prepare(config)
    assert data.images.shape == (60, 16, 32, 3)
    assert data.images.dtype == torch.uint8
    assert data.targets.shape == (60, 2)
    pictures = sources.render_images(drawn(config), config.captcha, range(60), NullDisplay())
    assert (data.images.numpy() == pictures).all()
    for n, label in enumerate(data.labels):
        assert label == sources.generate_label(drawn(config), config.captcha, n)
        assert "".join("01234"[k] for k in data.targets[n]) == label


def test_the_classes_are_in_the_order_of_the_alphabet(config: Config, drawings: list[int]) -> None:
    data = prepare(looking(config, alphabet="3210x"))
    for label, target in zip(data.labels, data.targets.tolist(), strict=True):
        assert label == "".join("3210x"[k] for k in target)


def test_a_side_holds_its_own_pictures(config: Config, drawings: list[int]) -> None:
    data = prepare(config)
    for name in splits.SPLITS:
        side = data.split(name, CPU, 512)
        assert len(side) == len(side.images) == len(side.targets) == len(side.indices)
        assert torch.equal(side.images, data.images[side.indices])
        assert torch.equal(side.targets, data.targets[side.indices])


def test_the_manifest_says_what_there_is(config: Config, drawings: list[int]) -> None:
    data = prepare(config)
    manifest = data.manifest
    assert manifest["images"] == 60
    assert manifest["distinct_labels"] == len(set(data.labels))
    assert manifest["lengths"] == {"2": 60}
    assert manifest["splits"] == {name: len(rows) for name, rows in data.split_indices.items()}
    assert json.loads(json.dumps(manifest)) == manifest


# -- batches -------------------------------------------------------------------------------------------------


def split(count: int) -> Split:
    """Each picture shows its own number, and so does its target; the rows are other numbers."""
    numbers = torch.arange(count)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 1)
    return Split(images, numbers[:, None], numbers + 1000, CPU)


@given(count=st.integers(1, 120), size=st.integers(1, 130), shuffled=st.booleans())
def test_batches_hold_every_picture_once(count: int, size: int, shuffled: bool) -> None:
    """The last short batch too, with an order and without one, each picture with its own target and row."""
    order = split(count).permutation(0, 1) if shuffled else None
    batches = list(split(count).batches(size, order))
    assert [len(b.indices) for b in batches] == [min(size, count - start) for start in range(0, count, size)]
    seen = torch.cat([b.indices for b in batches]) - 1000
    assert seen.tolist() == (list(range(count)) if order is None else order.tolist())
    assert sorted(seen.tolist()) == list(range(count))
    assert torch.cat([b.targets for b in batches])[:, 0].tolist() == seen.tolist()
    assert torch.cat([b.images for b in batches])[:, 1, 2, 0].tolist() == seen.tolist()


def test_shuffled_is_a_permutation_of_its_own_for_each_epoch() -> None:
    orders = [split(100).permutation(0, epoch).tolist() for epoch in range(1, 6)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert list(range(100)) not in orders


def test_shuffled_depends_on_seed_and_epoch_alone() -> None:
    first = split(100).permutation(0, 3)
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(first, split(100).permutation(0, 3))
    assert not torch.equal(first, split(100).permutation(1, 3))


def test_shuffled_leaves_the_global_chance_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    split(10).permutation(0, 1)
    assert torch.equal(torch.rand(1), expected)


def test_a_split_too_large_for_the_device_gives_the_same_batches(config: Config, drawings: list[int]) -> None:
    data = prepare(config)
    resident, sent = (data.split("train", CPU, limit) for limit in (512, 0))
    order = resident.permutation(0, 1)
    for a, b in zip(resident.batches(7, order), sent.batches(7, order), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_part_that_is_on_the_gpu_is_not_pinned_and_one_in_memory_is() -> None:
    """`cuda` is not equal to `cuda:0`, the device of a tensor that was sent to it."""

    class Part:
        is_cpu = False
        device = torch.device("cuda:0")

        def pin_memory(self) -> "Part":
            if not self.is_cpu:
                raise RuntimeError("only dense CPU tensors can be pinned")
            self.pinned = True
            return self

        def to(self, device: torch.device, non_blocking: bool) -> "Part":
            self.sent = (device.type, non_blocking)
            return self

    nothing = torch.zeros(0)
    split = Split(nothing, nothing, nothing, torch.device("cuda"))
    resident, in_memory = Part(), Part()
    in_memory.is_cpu = True
    for part in (resident, in_memory):
        split._to_device(part)  # type: ignore[arg-type]  # has what the method uses

    assert not hasattr(resident, "pinned")
    assert in_memory.pinned
    assert in_memory.sent == ("cuda", True)


def test_all_of_a_batch_is_on_the_device(config: Config, drawings: list[int]) -> None:
    """The numbers too: looking up with numbers that are elsewhere, a step would wait for their way."""
    for limit in (512, 0):
        split = prepare(config).split("train", torch.device("meta"), limit)
        batch = next(split.batches(7))
        assert [part.device.type for part in batch] == ["meta"] * 3


# -- the cache -----------------------------------------------------------------------------------------------


def test_the_pictures_are_drawn_once(config: Config, drawings: list[int]) -> None:
    first, again = prepare(config), prepare(config)
    assert drawings == [60]
    assert torch.equal(first.images, again.images)
    assert first.manifest == again.manifest


def flip(path: Path, where: Callable[[int], int], bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[where(len(content))] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("suffix", [".safetensors", ".sha256"])
@pytest.mark.parametrize(
    "where", [lambda n: 0, lambda n: n // 2, lambda n: n - 1], ids=["first", "middle", "last"]
)
@pytest.mark.parametrize("bit", [1, 128])
def test_a_flipped_bit_is_noticed_and_the_pictures_are_drawn_again(
    config: Config, drawings: list[int], suffix: str, where: Callable[[int], int], bit: int
) -> None:
    whole = prepare(config)
    images = whole.images.clone()  # the tensor itself is a view of the file
    flip(Path(config.data.cache) / f"{whole.manifest['key']}{suffix}", where, bit)
    heard = Heard()
    again = prepare(config, heard)
    assert drawings == [60, 60]
    (warning,) = heard.warnings
    assert "is damaged" in warning
    assert whole.manifest["key"] in warning
    assert torch.equal(again.images, images)
    prepare(config, heard)
    assert drawings == [60, 60]


def test_what_a_killed_process_was_writing_goes(config: Config, drawings: list[int]) -> None:
    key = prepare(config).manifest["key"]
    folder = Path(config.data.cache)
    part = folder / f".{key}.123.part"
    other = folder / f".{'0' * 16}.123.part"  # of other pictures, which somebody may be writing now
    for path in (part, other):
        path.write_bytes(b"half of")
    prepare(config)
    assert (part.exists(), other.exists()) == (False, True)


def test_a_short_cache_file_is_noticed(config: Config, drawings: list[int]) -> None:
    key = prepare(config).manifest["key"]
    path = Path(config.data.cache) / f"{key}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    heard = Heard()
    assert len(prepare(config, heard).images) == 60
    assert len(heard.warnings) == 1


def test_a_drawing_that_was_cut_short_is_done_again(config: Config, drawings: list[int]) -> None:
    """The pictures are there, but the process that wrote them ended before it could vouch for them."""
    key = prepare(config).manifest["key"]
    (Path(config.data.cache) / f"{key}.sha256").unlink()
    prepare(config)
    assert drawings == [60, 60]


def key(config: Config) -> str:
    return dataset.inspect_dataset(config, NullDisplay()).key


@pytest.mark.parametrize(
    "other",
    [
        lambda c: looking(c, width=33),
        lambda c: looking(c, height=17),
        lambda c: looking(c, channels=1),
        lambda c: looking(c, alphabet="01243"),
        lambda c: looking(c, length=3),
        lambda c: changed(c, count=61),
        lambda c: changed(c, seed=1),
        lambda c: changed(c, width=161),
        lambda c: changed(c, height=61),
        lambda c: changed(c, fonts=("DejaVuSans.ttf",)),
    ],
)
def test_other_pictures_are_another_file(config: Config, other: Callable[[Config], Config]) -> None:
    assert key(other(config)) != key(config)


@pytest.mark.parametrize(
    "same",
    [
        lambda c: changed(c, validation_fraction=0.3, test_fraction=0.3),
        lambda c: changed(c, split_seed=1),
        lambda c: changed(c, workers=2),
        lambda c: changed(c, cache="elsewhere"),
        lambda c: replace(c, seed=1, name="other"),
        lambda c: replace(c, train=replace(c.train, batch_size=3)),
    ],
)
def test_the_same_pictures_are_the_same_file(config: Config, same: Callable[[Config], Config]) -> None:
    assert key(same(config)) == key(config)


@pytest.mark.parametrize("part", ["pillow", "package", "freetype", "raqm", "fonts"])
def test_another_version_of_what_draws_is_another_file(
    config: Config, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    before = key(config)
    origin = {**sources.rendering_dependencies(drawn(config)), part: "another"}
    monkeypatch.setattr(sources, "origin", lambda data: origin)
    assert key(config) != before


def test_the_key_depends_on_no_order_of_keys(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(config)
    origin = dict(reversed(sources.rendering_dependencies(drawn(config)).items()))
    monkeypatch.setattr(sources, "origin", lambda data: origin)
    assert key(config) == before


def test_a_split_of_other_fractions_reuses_the_pictures(config: Config, drawings: list[int]) -> None:
    one = prepare(config)
    other = prepare(changed(config, validation_fraction=0.4, split_seed=3))
    assert drawings == [60]
    assert one.manifest["splits"] != other.manifest["splits"]


PREPARE = """
import json, sys
from captcha_exp import dataset, load
from captcha_exp.display import Silent

class Shown(Silent):
    def line(self, text):
        print(text)

config = load(json.loads(sys.argv[1]))
data = dataset.prepare(dataset.outline(config, Silent()), config, Shown())
print(data.manifest["images_sha256"])
"""


def test_of_two_processes_at_once_one_draws(config: Config) -> None:
    config = changed(config, count=300)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, json.dumps(to_dict(config))],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (one, digest), (other, same_digest) = said
    assert digest == same_digest
    drew, found = sorted([one, other])
    assert drew.startswith("drew 300 pictures")
    assert found.startswith("pictures from")


def test_the_cache_is_bytes_and_nothing_else(config: Config, drawings: list[int]) -> None:
    """No file is left over, and the pictures can be read without this project."""
    data = prepare(config)
    key = data.manifest["key"]
    names = {path.name for path in Path(config.data.cache).iterdir()}
    assert names - {f"{key}.lock"} == {f"{key}.safetensors", f"{key}.sha256"}
    from safetensors.numpy import load_file

    stored: dict[str, Any] = load_file(Path(config.data.cache) / f"{key}.safetensors")
    assert torch.equal(Tensor(stored["images"]).to(torch.uint8), data.images)
