"""Changed pictures: by how much, by whose chance, and by nothing else."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from captcha_exp.config import AugmentConfig, Config
from captcha_exp.data import augment
from captcha_exp.data.augment import NUM_PARAMS, Augmenter, apply_warmup, sample_params
from captcha_exp.data.dataset import Batch
from captcha_exp.training import train

pytestmark = pytest.mark.usefixtures("one_thread")

OFF = AugmentConfig(
    translate=0.0,
    scale=0.0,
    rotate=0.0,
    shear=0.0,
    elastic=0.0,
    color_jitter=0.0,
    invert_p=0.0,
    warmup_fraction=0.0,
)
ALL = AugmentConfig(
    translate=0.1,
    scale=0.2,
    rotate=10.0,
    shear=10.0,
    elastic=0.05,
    color_jitter=0.3,
    invert_p=0.5,
    warmup_fraction=0.0,
)
CPU = torch.device("cpu")


def noise(pictures: int, height: int = 16, width: int = 32, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (pictures, height, width, channels), dtype=torch.uint8, generator=generator)


def draws(*numbers: tuple[int, float]) -> Tensor:
    """A row of the table: zeros, but for these."""
    row = torch.zeros(1, NUM_PARAMS)
    for place, number in numbers:
        row[0, place] = number
    return row


def config_with(config: Config, how: AugmentConfig, epochs: int = 10) -> Config:
    return replace(config, augment=how, train=replace(config.train, epochs=epochs))


# -- by how much ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_off_is_off_and_a_draw_of_zeros_changes_nothing(channels: int) -> None:
    images = noise(4, channels=channels)

    assert torch.equal(augment.augment(images, sample_params(0, 1, 4), OFF), images)
    assert torch.equal(
        augment.augment(images, torch.zeros(4, NUM_PARAMS), replace(ALL, invert_p=0.0)), images
    )


@pytest.mark.parametrize(("right", "down"), [(3, 0), (-3, 0), (0, 2), (0, -2), (4, 1)])
def test_a_shift_is_the_picture_moved_and_its_edge_repeated(right: int, down: int) -> None:
    """By whole pixels, against indices made by hand."""
    height, width = 17, 33
    images = noise(1, height, width)
    one = 1 / (height - 1)  # a pixel, as a share of the way from the first row to the last
    how = replace(OFF, translate=10 * one)

    moved = augment.augment(images, draws((0, right / 10), (1, down / 10)), how)

    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    assert (moved.int() - images[:, rows][:, :, columns].int()).abs().max() <= 1


def test_a_half_turn_is_the_picture_upside_down() -> None:
    images = noise(1, 17, 33)

    turned = augment.augment(images, draws((4, 1.0)), replace(OFF, rotate=180.0))

    assert (turned.int() - images.flip(1, 2).int()).abs().max() <= 1


def test_wider_and_taller_look_at_a_smaller_or_larger_part() -> None:
    """A ramp of grey from left to right: its slope changes, and nothing in the middle."""
    ramp = torch.linspace(20, 220, 33).round().to(torch.uint8).view(1, 1, 33, 1).expand(1, 17, 33, 1)

    wide = augment.augment(ramp, draws((2, 1.0)), replace(OFF, scale=0.5))[0, 8, :, 0].float()

    assert wide[16] == ramp[0, 8, 16, 0]
    before = ramp[0, 8, :, 0].float()
    assert float(wide[20] - wide[12]) == pytest.approx(1.5 * float(before[20] - before[12]), abs=2)


def test_colour_is_contrast_about_the_middle_and_brightness_of_each_channel() -> None:
    images = noise(1)
    how = replace(OFF, color_jitter=0.2)

    brighter = augment.augment(images, draws((augment._NUM_AFFINE + augment._NUM_ELASTIC + 3, 1.0)), how)
    harder = augment.augment(images, draws((augment._NUM_AFFINE + augment._NUM_ELASTIC + 1, 1.0)), how)

    assert torch.equal(brighter[..., 1:], images[..., 1:])
    assert torch.equal(brighter[..., 0], (images[..., 0].float() + 51).clamp(max=255).to(torch.uint8))
    expected = ((images[..., 1].float() - 127.5) * 1.2 + 127.5).clamp(0, 255)
    assert (harder[..., 1].float() - expected).abs().max() <= 0.51


def test_the_share_that_is_inverted_becomes_its_negative() -> None:
    images = noise(2000, 4, 4, 1)

    changed = augment.augment(images, sample_params(0, 1, 2000), replace(OFF, invert_p=0.25))

    negative = (changed == 255 - images).flatten(1).all(1)
    same = (changed == images).flatten(1).all(1)
    assert bool((negative | same).all())
    assert int(negative.sum()) == pytest.approx(500, abs=80)


# -- whose chance --------------------------------------------------------------------------------------------


def test_a_picture_changes_by_its_own_number_whatever_the_batch(tiny: Config) -> None:
    """In one batch or in many, in any order: (seed, epoch, number) decides."""
    config, images = config_with(tiny, ALL), noise(12)
    change = Augmenter(config, 3, 12, CPU)
    targets = torch.zeros(12, 2, dtype=torch.int64)

    whole = change(Batch(images, targets, torch.arange(12))).images

    order = torch.tensor([7, 3, 11, 0, 5, 1, 2, 10, 4, 6, 9, 8])
    for rows in torch.split(order, 5):
        assert torch.equal(change(Batch(images[rows], targets[rows], rows)).images, whole[rows])
    again = Augmenter(config, 3, 12, CPU)(Batch(images, targets, torch.arange(12))).images
    assert torch.equal(again, whole)


@pytest.mark.parametrize("other", ["epoch", "seed"])
def test_another_epoch_or_seed_changes_otherwise(tiny: Config, other: str) -> None:
    config, batch = config_with(tiny, ALL), Batch(noise(4), torch.zeros(4, 2), torch.arange(4))

    one = Augmenter(config, 1, 4, CPU)(batch).images
    changed = replace(config, seed=config.seed + 1) if other == "seed" else config
    two = Augmenter(changed, 2 if other == "epoch" else 1, 4, CPU)(batch)

    assert all(not torch.equal(one[n], two.images[n]) for n in range(4))


@given(seed=st.integers(0, 2**62), epoch=st.integers(1, 10_000))
@settings(max_examples=20)
def test_the_table_is_even_and_each_row_is_independent_of_the_others(seed: int, epoch: int) -> None:
    made = sample_params(seed, epoch, 500)

    assert made.shape == (500, NUM_PARAMS)
    assert float(made.min()) >= -1
    assert float(made.max()) < 1
    assert abs(float(made.mean())) < 0.03


def test_the_ramp_grows_from_nothing_to_what_is_written() -> None:
    how = replace(ALL, warmup_fraction=0.5)

    shares = [apply_warmup(how, epoch, 10).rotate / how.rotate for epoch in range(1, 11)]

    assert shares == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1])
    assert apply_warmup(ALL, 1, 10) == ALL


# -- in a training -------------------------------------------------------------------------------------------


def test_it_can_be_traced_and_keeps_shape_and_type() -> None:
    with FakeTensorMode():
        images = torch.zeros(8, 16, 32, 3, dtype=torch.uint8)
        changed = augment.augment(images, torch.zeros(8, NUM_PARAMS), ALL)

    assert isinstance(changed, FakeTensor)
    assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)


def test_it_reads_no_tensor_on_the_host(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    change = Augmenter(config_with(tiny, ALL), 1, 8, CPU)
    batch = Batch(noise(8), torch.zeros(8, 2), torch.arange(8))

    def read(self: Tensor, *args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, read)
        changed = change(batch)
    assert changed.indices is batch.indices


def test_a_training_sees_changed_pictures_and_an_evaluation_does_not(
    tiny: Config, unplanned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = augment.augment

    def spy(images: Tensor, draws: Tensor, how: AugmentConfig) -> Tensor:
        seen.append(len(images))
        return plain(images, draws, how)

    monkeypatch.setattr(augment, "augment", spy)
    with_it = train.train(config_with(tiny, ALL, epochs=1))
    training = json.loads((with_it.run_dir / "dataset.json").read_text())["splits"]["train"]
    assert sum(seen) == training, "each picture once, and none of the other splits"
    without = train.train(config_with(tiny, OFF, epochs=1))

    assert sum(seen) == training, "off is never asked"
    assert with_it.weights_sha256 != without.weights_sha256
    assert with_it.weights_sha256 == train.train(config_with(tiny, ALL, epochs=1)).weights_sha256
