"""Compare the article's program with this project's training, and test the program itself.

It is the reference of every comparison, hence it is also checked against independent calculations.
"""

import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import article_loop
import numpy as np
import pytest
import torch
from article_loop import Batch, Network
from conftest import TINY
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.data import dataset
from captcha_exp.data.dataset import Dataset, Split
from captcha_exp.model.evaluate import Evaluation
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import Step, init_train_state, make_train_state, train_step
from captcha_exp.report import figures
from captcha_exp.training import train

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
ALNUM = "abcdefghijklmnopqrstuvwxyz0123456789"


def draw(folder: Path, count: int) -> list[str]:
    """Draw images like the article's, GIFs in mode P named .png, and return their labels."""
    folder.mkdir()
    labels = []
    for index in range(count):
        code = "".join(ALNUM[(index * step + step) % 36] for step in (1, 5, 7, 11)).upper()
        image = Image.new("RGB", (120, 50), (230 - index % 7, 240, 250))
        pen = ImageDraw.Draw(image)
        for position, character in enumerate(code):
            color = (90, 20 * position, index % 200)
            pen.text((8 + 28 * position, 4 + index % 9), character, color, font_size=32)
        image.quantize(64).save(folder / f"{index:05}-{code}.png", format="GIF")
        labels.append(code.lower())
    return labels


def texts(labels: Tensor) -> list[str]:
    """Return the texts of one-hot labels (B, 4*36)."""
    ids = labels.reshape(-1, 4, 36).nonzero()[:, 2].reshape(-1, 4).tolist()
    return ["".join(ALNUM[k] for k in row) for row in ids]


# -- the same training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def article() -> Config:
    """Return the config of the article's training."""
    chosen = ("captcha=alnum", "model=resnet18", "train=constant_lr")
    return load(compose(*chosen, "tracking=none", "device.name=cpu", "device.threads=1"))


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    """Return eight batches of 6, prepared by the article's program."""
    folder = tmp_path_factory.mktemp("eight")
    draw(folder / "images", 60)
    article_loop.prepare(folder / "images", folder / "shards", shard=60)
    return list(article_loop.batches(folder / "shards" / "training" / "00000.gz", 6))


NAMES = {  # layers of this project -> layers of the reference
    "network.blocks.0.0": "conv",
    "network.blocks.0.1": "norm",
    "head.linear": "linear",
}
for block, (stage, number) in enumerate(itertools.product(range(4), range(2)), start=2):
    here, there = f"network.blocks.{block}", f"stages.{stage}.{number}"
    NAMES |= {f"{here}.conv1.0": f"{there}.conv1", f"{here}.conv1.1": f"{there}.norm1"}
    NAMES |= {f"{here}.conv2.0": f"{there}.conv2", f"{here}.conv2.1": f"{there}.norm2"}
    NAMES |= {
        f"{here}.downsample.0": f"{there}.downsample.0",
        f"{here}.downsample.1": f"{there}.downsample.1",
    }


def renamed(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of our state dict with the reference's names."""
    state = model.state_dict()
    parts = {name: name.rpartition(".") for name in state}
    return {f"{NAMES[layer]}.{leaf}": state[name].clone() for name, (layer, _, leaf) in parts.items()}


def ours(state: TrainState, given: list[Batch], config: Config) -> list[float]:
    """Return the losses of our steps on the reference's batches."""
    losses = []
    for images, labels in given:
        images = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        batch = dataset.Batch(images, labels.view(-1, 4, 36).argmax(2), torch.arange(len(images)))
        losses.append(float(train_step(state, batch, config).loss))
    return losses


def max_difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.long
def test_eight_steps_match_the_article(article: Config, eight: list[Batch]) -> None:
    """From equal weights and with the same rounding: channels_last and the fused Adam.

    This project uses both. They change the rounding, not the formulas, as the next test shows. Batch norm
    rounds a hundred times more coarsely in channels_last, which flips some ReLUs, and the size of Adam's
    first steps does not depend on the gradient: compared with the unchanged reference, losses differ by
    2e-7 at the first step and by 3e-4 within eight.
    """
    state = init_train_state(article, CPU)
    network = Network()
    network.load_state_dict(renamed(state.model))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # untyped in torch
    given = [(images.contiguous(memory_format=torch.channels_last), labels) for images, labels in eight]
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    expected, _, total = article_loop.train_steps(network, optimizer, given, CPU)

    losses = ours(state, eight, article)
    assert total == 48
    assert len(set(losses)) == 8
    assert losses == pytest.approx(expected, rel=0, abs=1e-5)
    assert max_difference(renamed(state.model), network.state_dict()) < 1e-5


@pytest.mark.long
def test_in_64_bits_our_steps_equal_the_article_s(
    article: Config, eight: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our unchanged steps match the unchanged reference: default memory format, default Adam."""
    state = init_train_state(article, CPU)
    network = Network()
    network.load_state_dict(renamed(state.model))
    whole = [((images[:2] * 255).round().double(), labels[:2].double()) for images, labels in eight[:4]]
    given = [(images / 255, labels) for images, labels in whole]  # exact, where 32 bits were not
    optimizer = torch.optim.Adam(network.double().parameters())
    expected, *_ = article_loop.train_steps(network, optimizer, given, CPU)

    def double(x: Tensor) -> Tensor:
        return plain(x) if x.dtype == torch.bool else x.double()

    plain = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", double)
    state = make_train_state(state.model.double(), article, CPU)
    losses = ours(state, given, article)
    assert losses == pytest.approx(expected, rel=0, abs=1e-8)
    assert max_difference(renamed(state.model), network.state_dict()) < 1e-6


# -- the same network -----------------------------------------------------------------------------------

CONVOLUTIONS = [  # outputs, inputs, kernel, output height and width, number of convolutions
    (64, 3, 3, 24, 56, 1),
    (64, 64, 3, 24, 56, 4),
    (128, 64, 3, 12, 28, 1),
    (128, 64, 1, 12, 28, 1),
    (128, 128, 3, 12, 28, 3),
    (256, 128, 3, 6, 14, 1),
    (256, 128, 1, 6, 14, 1),
    (256, 256, 3, 6, 14, 3),
    (512, 256, 3, 3, 7, 1),
    (512, 256, 1, 3, 7, 1),
    (512, 512, 3, 3, 7, 3),
]
FORWARD = 2 * sum(o * i * k * k * h * w * n for o, i, k, h, w, n in CONVOLUTIONS) + 2 * 512 * 4 * 36
# Backward has two products each, for the gradients of weights and inputs; the images need no gradient.
TRAINING = 3 * FORWARD - 2 * 64 * 3 * 3 * 3 * 24 * 56


def test_the_table_gives_the_article_s_figures() -> None:
    weights = sum(o * i * k * k * n for o, i, k, _, _, n in CONVOLUTIONS)
    norms = sum(2 * o * n for o, _, _, _, _, n in CONVOLUTIONS)
    assert weights + norms + 512 * 144 + 144 == 11_242_704
    assert f"{FORWARD / 1e9:.3f} {TRAINING / 1e9:.2f}" == "1.458 4.37"


@pytest.fixture(params=["ours", "the article's"])
def either(request: pytest.FixtureRequest, article: Config) -> nn.Module:
    return init_train_state(article, CPU).model if request.param == "ours" else Network()


def test_every_layer_has_the_table_s_shape(either: nn.Module) -> None:
    expected = Counter({(144, 512): 1, (144,): 1})
    for outputs, inputs, kernel, _, _, count in CONVOLUTIONS:
        expected[outputs, inputs, kernel, kernel] += count
        expected[outputs,] += 2 * count
    assert Counter(tuple(parameter.shape) for parameter in either.parameters()) == expected
    assert sum(parameter.numel() for parameter in either.parameters()) == 11_242_704


def test_every_step_has_the_table_s_operations(article: Config, eight: list[Batch]) -> None:
    given = [(images[:2], labels[:2]) for images, labels in eight[:1]]
    state, network = init_train_state(article, CPU), Network()
    with FlopCounterMode(display=False) as counter:
        ours(state, given, article)
    assert counter.get_total_flops() == 2 * TRAINING
    with FlopCounterMode(display=False) as counter:
        article_loop.train_steps(network, torch.optim.Adam(network.parameters()), given, CPU)
    assert counter.get_total_flops() == 2 * TRAINING
    with FlopCounterMode(display=False) as counter:
        article_loop.evaluate(network, given, CPU)
    assert counter.get_total_flops() == 2 * FORWARD


# -- prepare --------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of 34 images: three shards of 10, and four that are dropped."""
    draw(tmp_path / "images", 34)
    return tmp_path / "images"


@pytest.fixture
def shards(tmp_path: Path, images: Path) -> Path:
    assert article_loop.prepare(images, tmp_path / "shards", shard=10) == 3
    return tmp_path / "shards"


def parts(shards: Path) -> dict[str, list[dict[str, Tensor]]]:
    """Return part -> content of its files."""
    return {
        part: [article_loop.read_gzip(path) for path in sorted((shards / part).iterdir())]
        for part in ("training", "validating", "testing")
    }


def test_shards_are_split_80_10_10_and_the_rest_is_dropped(images: Path, shards: Path) -> None:
    found = parts(shards)
    sizes = {part: [len(file["labels"]) for file in files] for part, files in found.items()}
    assert sizes == {"training": [8] * 3, "validating": [1] * 3, "testing": [1] * 3}
    labels = [text for files in found.values() for file in files for text in texts(file["labels"])]
    there = {path.stem.partition("-")[2].lower() for path in images.iterdir()}
    assert len(set(labels)) == len(labels) == 30
    assert set(labels) < there
    assert len(there) == 34


def test_a_shard_is_shuffled_and_deterministic(images: Path, shards: Path, tmp_path: Path) -> None:
    article_loop.prepare(images, tmp_path / "again", shard=10)
    article_loop.prepare(images, tmp_path / "fewer", limit=2, shard=10)
    one, again, fewer = (parts(folder) for folder in (shards, tmp_path / "again", tmp_path / "fewer"))
    order = sorted(path.stem.partition("-")[2].lower() for path in images.iterdir())
    first = texts(one["training"][0]["labels"])
    assert max(abs(order.index(a) - order.index(b)) for a, b in itertools.pairwise(first)) > 10
    for part, files in one.items():
        assert len(fewer[part]) == 2
        for file, same in zip(files, again[part], strict=True):
            assert all(torch.equal(file[name], same[name]) for name in ("images", "labels"))
        for file, same in zip(files, fewer[part], strict=False):
            assert all(torch.equal(file[name], same[name]) for name in ("images", "labels"))


def test_a_shard_file_is_gzipped_float32(shards: Path) -> None:
    path = shards / "training" / "00000.gz"
    with gzip.open(path) as file:
        assert len(file.read()) > 8 * 4 * (3 * 24 * 56 + 4 * 36)
    tensors = article_loop.read_gzip(path)
    assert {name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()} == {
        "images": (torch.float32, (8, 3, 24, 56)),
        "labels": (torch.float32, (8, 144)),
    }
    assert tensors["labels"].view(8, 4, 36).sum(2).eq(1).all()


def test_tensors_round_trip_exactly(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(3, 5), "n": torch.tensor(7)}
    article_loop.write_gzip(tmp_path / "x.gz", tensors)
    back = article_loop.read_gzip(tmp_path / "x.gz")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) for name, value in tensors.items())


def test_an_image_is_resized_by_nearest_neighbor(images: Path, shards: Path) -> None:
    """Each pixel is the one under its center; converted to RGB first, the image would be smooth."""
    training = parts(shards)["training"][0]
    code = texts(training["labels"])[0].upper()
    (path,) = images.glob(f"*-{code}.png")
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("GIF", "P", (120, 50))
        large = np.asarray(image.convert("RGB"))
        smooth = np.asarray(image.convert("RGB").resize((56, 24)))
    rows, columns = (
        [int((y + 0.5) * 50 / 24) for y in range(24)],
        [int((x + 0.5) * 120 / 56) for x in range(56)],
    )
    by_hand = large[rows][:, columns]
    prepared = training["images"][0].permute(1, 2, 0).numpy()
    assert np.array_equal(prepared, by_hand.astype(np.float32) / np.float32(255))
    assert (by_hand != smooth).mean() > 0.1


@pytest.mark.parametrize("name", ["00000.png", "00000-R86.png", "00000-R8651.png", "00000-R8+5.png"])
def test_a_name_without_a_label_is_rejected(name: str) -> None:
    with pytest.raises(ValueError, match="must end in a dash"):
        article_loop.label_tensor(Path(name))


def test_too_few_images_are_rejected(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="34 images are fewer than a shard of 1000"):
        article_loop.prepare(images, tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


# -- the article's loop ---------------------------------------------------------------------------------


def tiny() -> Network:
    torch.manual_seed(0)
    return Network((4, 4, 4, 4))


def test_batches_have_the_same_order_in_every_epoch(shards: Path) -> None:
    """In each epoch, all training images shard by shard in order, in batches of 3, 3 and 2."""
    network, calls = tiny(), []
    network.register_forward_pre_hook(lambda module, given: calls.append((module.training, *given)))
    history = article_loop.train(network, shards, CPU, size=3, epochs=2)

    trained = [images for training, images in calls if training]
    assert [len(batch) for batch in trained] == [3, 3, 2] * 3 * 2
    everything = torch.cat([file["images"] for file in parts(shards)["training"]])
    assert torch.equal(torch.cat(trained), torch.cat([everything, everything]))
    assert [training for training, _ in calls] == ([True] * 9 + [False] * 3) * 2 + [False] * 3
    assert len(history.losses) == 18
    assert len(history.training_seconds) == len(history.validating_seconds) == 6


def test_a_step_matches_the_textbook(eight: list[Batch]) -> None:
    """Adam and binary cross entropy written out, in 64 bits, and the accuracy."""
    network = tiny().double()
    weight = network.linear.weight
    given = [(images.double(), labels.double()) for images, labels in eight[:3]]
    first = second = torch.zeros_like(weight)
    expected = weight.detach().clone()
    for number, batch in enumerate(given, start=1):
        copy = tiny().double()
        copy.load_state_dict(network.state_dict())
        outputs = copy(batch[0])
        loss = -(batch[1] * outputs.log() + (1 - batch[1]) * (1 - outputs).log()).mean()
        (gradient,) = torch.autograd.grad(loss, [copy.linear.weight])
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        rate = (first / (1 - 0.9**number)) / ((second / (1 - 0.999**number)).sqrt() + 1e-8)
        expected = expected - 0.001 * rate
        if number == 1:
            optimizer = torch.optim.Adam(network.parameters())
        losses, correct, total = article_loop.train_steps(network, optimizer, [batch], CPU)
        assert losses == pytest.approx([loss.item()], rel=1e-9)
        assert (correct, total) == (0, 6)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-9)


def test_only_complete_labels_are_correct() -> None:
    labels = nn.functional.one_hot(torch.arange(12).view(3, 4), 36).flatten(1)
    outputs = labels.float() * 0.5
    outputs[1, 36 + 9] = 0.9  # one wrong character in the second label
    assert article_loop.num_correct(outputs, labels) == 2


def test_outputs_are_probabilities_at_each_position(eight: list[Batch]) -> None:
    outputs = tiny()(eight[0][0])
    assert outputs.shape == (6, 144)
    torch.testing.assert_close(outputs.view(6, 4, 36).sum(2), torch.ones(6, 4))


def test_the_most_probable_characters_are_predicted(images: Path) -> None:
    network = tiny()
    with torch.no_grad():
        network.linear.weight.zero_()
        for position, character in enumerate("r865"):
            network.linear.bias[36 * position + ALNUM.index(character)] = 5
    assert article_loop.predict(network, next(images.iterdir()), CPU) == "r865"


def test_the_command_prints_one_line(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(article_loop, "Network", tiny)
    arguments = [
        "--work",
        str(shards),
        "--device",
        "cpu",
        "--batch-size",
        "4",
        "--shards",
        "2",
        "--epochs",
        "3",
    ]
    article_loop.main(arguments)
    out, err = capsys.readouterr()
    printed = json.loads(out)
    assert out.count("\n") == 1
    assert err.count("\n") == 3  # one for each epoch
    assert (printed["shards"], printed["epochs"], printed["batch_size"]) == (2, 3, 4)
    assert len(printed["first_losses"]) == 8
    assert len(printed["training_accuracy"]) == len(printed["validating_accuracy"]) == 3
    assert printed["seconds_per_shard"] > 0
    assert {
        "device",
        "threads",
        "torch",
        "training_images_per_second",
        "peak_rss_mib",
    } <= printed.keys()


# -- early stopping ------------------------------------------------------------------------------------

# Validation accuracies (then 0), the expected best epoch and last epoch.
STOPPING = {
    "20 epochs without improvement do not stop": ([0.2, 0.5, *[0.4] * 20, 0.6], 23, 44),
    "the 21st stops, whatever would follow": ([0.2, 0.5, *[0.4] * 21, 0.6], 2, 23),
    "an equal accuracy is not an improvement": ([0.2, 0.5, *[0.4] * 9, 0.5], 2, 23),
    "the first epoch counts, even with accuracy 0": ([], 1, 22),
}
stopping = pytest.mark.parametrize(("accuracies", "best", "last"), STOPPING.values(), ids=STOPPING)


def padded(accuracies: list[float]) -> Iterator[float]:
    return itertools.chain(accuracies, itertools.repeat(0.0))


@stopping
def test_the_article_s_training_stops_and_tests_its_best_state_once(
    accuracies: list[float], best: int, last: int, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, evaluated = padded(accuracies), []

    def step(
        network: Network, optimizer: Any, path: Path, device: torch.device
    ) -> tuple[list[float], int, int]:
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.defaults == torch.optim.Adam(network.parameters()).defaults
        with torch.no_grad():
            network.linear.bias.add_(1)
        return [0.5], 1, 2

    def evaluate(network: Network, path: Path, device: torch.device) -> tuple[int, int]:
        evaluated.append((path.parent.name, round(network.linear.bias[0].item())))
        return round(next(script) * 100), 100

    monkeypatch.setattr(article_loop, "batches", lambda path, size: path)
    monkeypatch.setattr(article_loop, "train_steps", step)
    monkeypatch.setattr(article_loop, "evaluate", evaluate)
    network = tiny()
    nn.init.zeros_(network.linear.bias)
    history = article_loop.train(network, shards, CPU, limit=1)

    assert (history.best_epoch, len(history.validating)) == (best, last)
    assert evaluated == [("validating", epoch) for epoch in range(1, last + 1)] + [("testing", best)]
    kept = article_loop.read_gzip(shards / "best.gz")
    assert all(torch.equal(kept[name], value) for name, value in network.state_dict().items())
    assert history.training == [0.5] * last
    assert history.losses == [0.5] * last


@stopping
def test_our_training_stops_where_the_article_s_does(
    accuracies: list[float],
    best: int,
    last: int,
    root: Path,
    cache: Path,
    unplanned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the epochs and the patience of train=constant_lr."""
    script = padded(accuracies)
    events: list[tuple[str, int]] = []
    plain = Dataset.split

    def opened(self: Dataset, name: str, device: torch.device, limit: int) -> Split:
        events.append((f"open {name}", 0))
        return plain(self, name, device, limit)

    def step(state: TrainState, batch: dataset.Batch, config: Config) -> Step:
        with torch.no_grad():
            next(state.model.parameters()).fill_(state.epoch)
        return Step(torch.tensor(1.6), torch.tensor(0), torch.tensor(True), torch.tensor(False))

    def scripted(model: nn.Module, split: Split, config: Config, *_: object) -> Evaluation:
        events.append((f"evaluate {len(split)}", round(next(model.parameters()).flatten()[0].item())))
        predicted = split.targets.numpy().copy()
        predicted[round(next(script) * len(split)) :] += 1
        predicted %= 5
        confidences = np.zeros(predicted.shape, np.float32)
        return Evaluation(
            1.6, predicted, split.targets.numpy(), confidences, confidences[:, 0], split.indices.numpy()
        )

    monkeypatch.setattr(Dataset, "split", opened)
    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train, "evaluate", scripted)
    monkeypatch.setattr(figures, "plot_curves", lambda rows, path: None)
    monkeypatch.setattr(figures, "plot_confusion_matrix", lambda evaluation, alphabet, path: None)
    chosen = [text for text in TINY if not text.startswith("train.")]
    config = load(
        compose(*chosen, f"data.cache={cache}", "tracking=none", "train=constant_lr", "device.threads=1")
    )
    result = train.train(config, None)

    sizes = {name: len(rows) for name, rows in dataset.inspect_dataset(config).split_indices.items()}
    assert result.best_epoch == best
    assert events == [
        ("open train", 0),
        ("open validation", 0),
        *((f"evaluate {sizes['validation']}", epoch) for epoch in range(1, last + 1)),
        ("open test", 0),
        (f"evaluate {sizes['test']}", best),
    ]
