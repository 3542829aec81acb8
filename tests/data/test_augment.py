"""Test the effect of each augmentation, and that it depends only on seed, epoch and image index."""

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


def noise(count: int, height: int = 16, width: int = 32, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, height, width, channels), dtype=torch.uint8, generator=generator)


def make_params(*values: tuple[int, float]) -> Tensor:
    """Return parameters (1, P): zeros except for these (index, value) pairs."""
    row = torch.zeros(1, NUM_PARAMS)
    for index, value in values:
        row[0, index] = value
    return row


def config_with(config: Config, augmentation: AugmentConfig, epochs: int = 10) -> Config:
    return replace(config, augment=augmentation, train=replace(config.train, epochs=epochs))


# -- effects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_zero_strength_or_zero_parameters_change_nothing(channels: int) -> None:
    images = noise(4, channels=channels)

    assert torch.equal(augment.augment(images, sample_params(0, 1, 4), OFF), images)
    assert torch.equal(
        augment.augment(images, torch.zeros(4, NUM_PARAMS), replace(ALL, invert_p=0.0)), images
    )


@pytest.mark.parametrize(("right", "down"), [(3, 0), (-3, 0), (0, 2), (0, -2), (4, 1)])
def test_translate_moves_the_image_and_repeats_the_edge(right: int, down: int) -> None:
    """By whole pixels, compared with indexing."""
    height, width = 17, 33
    images = noise(1, height, width)
    pixel = 1 / (height - 1)  # as a fraction of the height
    config = replace(OFF, translate=10 * pixel)

    moved = augment.augment(images, make_params((0, right / 10), (1, down / 10)), config)

    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    assert (moved.int() - images[:, rows][:, :, columns].int()).abs().max() <= 1


def test_rotate_by_180_degrees_flips_both_axes() -> None:
    images = noise(1, 17, 33)

    rotated = augment.augment(images, make_params((4, 1.0)), replace(OFF, rotate=180.0))

    assert (rotated.int() - images.flip(1, 2).int()).abs().max() <= 1


def test_scale_changes_the_slope_of_a_gradient() -> None:
    """The slope changes, and the value at the center does not."""
    gradient = torch.linspace(20, 220, 33).round().to(torch.uint8).view(1, 1, 33, 1).expand(1, 17, 33, 1)

    scaled = augment.augment(gradient, make_params((2, 1.0)), replace(OFF, scale=0.5))[0, 8, :, 0].float()

    assert scaled[16] == gradient[0, 8, 16, 0]
    before = gradient[0, 8, :, 0].float()
    assert float(scaled[20] - scaled[12]) == pytest.approx(1.5 * float(before[20] - before[12]), abs=2)


def test_color_jitter_changes_brightness_and_contrast_per_channel() -> None:
    images = noise(1)
    config = replace(OFF, color_jitter=0.2)
    first_color = augment._NUM_AFFINE + augment._NUM_ELASTIC

    brighter = augment.augment(images, make_params((first_color + 3, 1.0)), config)
    contrasted = augment.augment(images, make_params((first_color + 1, 1.0)), config)

    assert torch.equal(brighter[..., 1:], images[..., 1:])
    assert torch.equal(brighter[..., 0], (images[..., 0].float() + 51).clamp(max=255).to(torch.uint8))
    expected = ((images[..., 1].float() - 127.5) * 1.2 + 127.5).clamp(0, 255)
    assert (contrasted[..., 1].float() - expected).abs().max() <= 0.51


def test_invert_p_is_the_fraction_of_inverted_images() -> None:
    images = noise(2000, 4, 4, 1)

    changed = augment.augment(images, sample_params(0, 1, 2000), replace(OFF, invert_p=0.25))

    inverted = (changed == 255 - images).flatten(1).all(1)
    same = (changed == images).flatten(1).all(1)
    assert bool((inverted | same).all())
    assert int(inverted.sum()) == pytest.approx(500, abs=80)


# -- randomness ----------------------------------------------------------------------------------------------


def test_augmentation_depends_on_the_image_index_not_on_the_batch(tiny: Config) -> None:
    """In one batch or several, in any order."""
    config, images = config_with(tiny, ALL), noise(12)
    augmenter = Augmenter(config, 3, 12, CPU)
    targets = torch.zeros(12, 2, dtype=torch.int64)

    expected = augmenter(Batch(images, targets, torch.arange(12))).images

    order = torch.tensor([7, 3, 11, 0, 5, 1, 2, 10, 4, 6, 9, 8])
    for rows in torch.split(order, 5):
        assert torch.equal(augmenter(Batch(images[rows], targets[rows], rows)).images, expected[rows])
    again = Augmenter(config, 3, 12, CPU)(Batch(images, targets, torch.arange(12))).images
    assert torch.equal(again, expected)


@pytest.mark.parametrize("other", ["epoch", "seed"])
def test_another_epoch_or_seed_gives_other_images(tiny: Config, other: str) -> None:
    config, batch = config_with(tiny, ALL), Batch(noise(4), torch.zeros(4, 2), torch.arange(4))

    first = Augmenter(config, 1, 4, CPU)(batch).images
    changed = replace(config, seed=config.seed + 1) if other == "seed" else config
    second = Augmenter(changed, 2 if other == "epoch" else 1, 4, CPU)(batch)

    assert all(not torch.equal(first[n], second.images[n]) for n in range(4))


@given(seed=st.integers(0, 2**62), epoch=st.integers(1, 10_000))
@settings(max_examples=20)
def test_parameters_are_uniform(seed: int, epoch: int) -> None:
    params = sample_params(seed, epoch, 500)

    assert params.shape == (500, NUM_PARAMS)
    assert float(params.min()) >= -1
    assert float(params.max()) < 1
    assert abs(float(params.mean())) < 0.03


def test_warmup_grows_linearly_from_zero() -> None:
    config = replace(ALL, warmup_fraction=0.5)

    factors = [apply_warmup(config, epoch, 10).rotate / config.rotate for epoch in range(1, 11)]

    assert factors == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1])
    assert apply_warmup(ALL, 1, 10) == ALL


# -- in training ---------------------------------------------------------------------------------------------


def test_it_can_be_traced_and_keeps_shape_and_dtype() -> None:
    with FakeTensorMode():
        images = torch.zeros(8, 16, 32, 3, dtype=torch.uint8)
        changed = augment.augment(images, torch.zeros(8, NUM_PARAMS), ALL)

    assert isinstance(changed, FakeTensor)
    assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)


def test_it_does_not_synchronize_with_the_device(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    augmenter = Augmenter(config_with(tiny, ALL), 1, 8, CPU)
    batch = Batch(noise(8), torch.zeros(8, 2), torch.arange(8))

    def fail(self: Tensor, *args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor was copied to the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            patch.setattr(torch.Tensor, name, fail)
        changed = augmenter(batch)
    assert changed.indices is batch.indices


def test_only_training_images_are_augmented(
    tiny: Config, unplanned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    original = augment.augment

    def spy(images: Tensor, params: Tensor, config: AugmentConfig) -> Tensor:
        calls.append(len(images))
        return original(images, params, config)

    monkeypatch.setattr(augment, "augment", spy)
    augmented = train.train(config_with(tiny, ALL, epochs=1))
    num_train = json.loads((augmented.run_dir / "dataset.json").read_text())["splits"]["train"]
    assert sum(calls) == num_train, "each image once, and none of the other splits"
    plain = train.train(config_with(tiny, OFF, epochs=1))

    assert sum(calls) == num_train, "never called if off"
    assert augmented.weights_sha256 != plain.weights_sha256
    assert augmented.weights_sha256 == train.train(config_with(tiny, ALL, epochs=1)).weights_sha256
