"""Reimplement the article's program, the reference that this project is compared with.

It uses nothing from captcha_exp and is not tuned. Like the programs of the article, it has three stages:

    prepare   shuffles images named 00000-R865.png (index, dash, label; case folded; actually GIFs),
              resizes them to 56x24 before converting to RGB (which forces nearest-neighbor), divides by 255;
              writes shards of 1,000, split 80/10/10, as gzipped float32 tensors; drops a partial shard
    train     ResNet-18 with a 3x3 stem of stride 1 and no max-pool, a softmax per character, BCELoss,
              Adam with its defaults; batches of 100 in fixed order, shards read again in each epoch;
              validation without no_grad; stops after more than 20 epochs without improvement, then
              tests the best state
    predict   returns the label that the network predicts for one image

Deliberate differences, and why:

    safetensors in the gzip, not pickle      this project does not read pickles
    files are sorted, then shuffled          the order must not depend on the file system
    accuracies are printed, not plotted      numbers can be compared, plots cannot
    `predict` takes a path, does not ask     other programs call it

Assumptions where the article gives no details: in each epoch all training parts precede the validating
parts; training accuracy is counted during training; of two equal epochs the first is the best.

Prints one JSON line. `seconds_per_shard` corresponds to the article's 13.60 s on its CPU and 1.90 s on
its GPU: 800 images trained and 100 validated, file reading included, each the median over shards and
epochs. `first_shard_seconds` includes the warm-up. Neither includes saving the best state and testing.

    python benchmarks/article_loop.py --images DIR [--device cpu] [--shards 2] [--epochs 3]
    python benchmarks/article_loop.py --images DIR --work NEW    keeps the shards and the best state
    python benchmarks/article_loop.py --work OLD                 reuses these shards
"""

import argparse
import gzip
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
LENGTH, WIDTH, HEIGHT = 4, 56, 24
SHARD, BATCH, EPOCHS, PATIENCE = 1000, 100, 10_000, 20
PARTS = ("training", "validating", "testing")
MIB = 2**20

Batch = tuple[Tensor, Tensor]  # images (B, 3, H, W) in [0, 1] and one-hot labels (B, 4*36), float32


# -- prepare --------------------------------------------------------------------------------------------


def image_tensor(path: Path) -> Tensor:
    """Return an image as (3, 24, 56) float32 in [0, 1]."""
    with Image.open(path) as image:
        small = image.resize((WIDTH, HEIGHT)).convert("RGB")
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(HEIGHT, WIDTH, 3).permute(2, 0, 1).float() / 255


def label_tensor(path: Path) -> Tensor:
    """Return the one-hot label (4*36,), float32, of the file's name.

    Raises:
        ValueError: the name has no valid label. Rename the file.
    """
    label = path.stem.partition("-")[2].lower()
    if len(label) != LENGTH or not set(label) <= set(ALPHABET):
        raise ValueError(f"{path}: the name must end in a dash and {LENGTH} of {ALPHABET}")
    ids = torch.tensor([ALPHABET.index(character) for character in label])
    return nn.functional.one_hot(ids, len(ALPHABET)).float().flatten()


def prepare(images: Path, out: Path, limit: int | None = None, shard: int = SHARD) -> int:
    """Write the shards to out/training, out/validating and out/testing; return their number.

    Raises:
        ValueError: there are fewer images than one shard. Give more.
    """
    files = sorted(images.glob("*.png"))
    random.Random(0).shuffle(files)
    starts = range(0, len(files) - shard + 1, shard)[:limit]
    if not starts:
        raise ValueError(f"{images}: {len(files)} images are fewer than a shard of {shard}; add images")
    for part in PARTS:
        (out / part).mkdir(parents=True)
    for number, start in enumerate(starts):
        chosen, first, second = files[start : start + shard], shard * 8 // 10, shard * 9 // 10
        splits = chosen[:first], chosen[first:second], chosen[second:]
        for part, paths in zip(PARTS, splits, strict=True):
            pixels = torch.stack([image_tensor(path) for path in paths])
            labels = torch.stack([label_tensor(path) for path in paths])
            write_gzip(out / part / f"{number:05}.gz", {"images": pixels, "labels": labels})
    return len(starts)


def write_gzip(path: Path, tensors: dict[str, Tensor]) -> None:
    path.write_bytes(gzip.compress(save(tensors)))


def read_gzip(path: Path) -> dict[str, Tensor]:
    return load(gzip.decompress(path.read_bytes()))


def batches(path: Path, size: int) -> Iterator[Batch]:
    """Yield the batches of one part of a shard in order; the last one may be smaller."""
    tensors = read_gzip(path)
    yield from zip(*(torch.split(tensors[name], size) for name in ("images", "labels")), strict=True)


# -- the network ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.downsample.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return torch.relu(out + self.downsample(x))


class Network(nn.Module):
    """ResNet-18: (B, 3, H, W) -> (B, 4*36), the probabilities of 36 characters at each of 4 positions."""

    def __init__(self, widths: tuple[int, int, int, int] = (64, 128, 256, 512)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        for inputs, outputs, stride in zip(widths[:1] + widths[:3], widths, (1, 2, 2, 2), strict=True):
            self.stages.append(nn.Sequential(Block(inputs, outputs, stride), Block(outputs, outputs, 1)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[3], LENGTH * len(ALPHABET))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.norm(self.conv(images))))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits.view(-1, LENGTH, len(ALPHABET)).softmax(2).flatten(1)


def init_network(device: torch.device) -> Network:
    """Return the untrained network, always with the same weights."""
    torch.manual_seed(0)
    return Network().to(device)


def num_correct(outputs: Tensor, labels: Tensor) -> int:
    """Return the number of labels that are predicted exactly."""
    predicted, expected = (x.view(-1, LENGTH, len(ALPHABET)).argmax(2) for x in (outputs, labels))
    return int((predicted == expected).all(1).sum().item())


# -- train ----------------------------------------------------------------------------------------------


@dataclass
class History:
    """The history of a training."""

    losses: list[float] = field(default_factory=list)  # of each step
    training: list[float] = field(default_factory=list)  # accuracy of each epoch
    validating: list[float] = field(default_factory=list)  # accuracy of each epoch
    best_epoch: int = 0
    testing: float = 0.0  # accuracy of the best epoch's state
    training_seconds: list[float] = field(default_factory=list)  # of each shard in each epoch
    validating_seconds: list[float] = field(default_factory=list)  # of each shard in each epoch


def train_steps(
    network: Network, optimizer: torch.optim.Optimizer, data: Iterable[Batch], device: torch.device
) -> tuple[list[float], int, int]:
    """Train one step per batch; return the losses, the number of correct labels and their total."""
    criterion = nn.BCELoss()
    losses, correct, total = [], 0, 0
    network.train()
    for images, labels in data:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs = network(images)
        loss = criterion(outputs, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        correct, total = correct + num_correct(outputs, labels), total + len(labels)
    return losses, correct, total


def evaluate(network: Network, data: Iterable[Batch], device: torch.device) -> tuple[int, int]:
    """Return the number of correct labels and their total. Without no_grad, as in the article."""
    correct = total = 0
    network.eval()
    for images, labels in data:
        outputs = network(images.to(device))
        correct, total = correct + num_correct(outputs, labels.to(device)), total + len(labels)
    return correct, total


def train(
    network: Network,
    shards: Path,
    device: torch.device,
    size: int = BATCH,
    epochs: int = EPOCHS,
    limit: int | None = None,
) -> History:
    """Train and return the history; the network ends in its best state, saved as shards/best.gz."""
    history, optimizer = History(), torch.optim.Adam(network.parameters())
    training, validating, testing = (sorted((shards / part).glob("*.gz"))[:limit] for part in PARTS)
    for epoch in range(1, epochs + 1):
        counts = []
        for path in training:
            began = clock(device)
            losses, *count = train_steps(network, optimizer, batches(path, size), device)
            history.training_seconds.append(clock(device) - began)
            history.losses += losses
            counts.append(count)
        history.training.append(accuracy(counts))

        validated = []
        for path in validating:
            began = clock(device)
            validated.append(evaluate(network, batches(path, size), device))
            history.validating_seconds.append(clock(device) - began)
        if accuracy(validated) > max(history.validating, default=-1):
            history.best_epoch = epoch
            write_gzip(shards / "best.gz", network.state_dict())
        history.validating.append(accuracy(validated))
        print(f"{epoch}: {history.training[-1]:.2%} {history.validating[-1]:.2%}", file=sys.stderr)
        if epoch - history.best_epoch > PATIENCE:
            break

    network.load_state_dict(read_gzip(shards / "best.gz"))
    history.testing = accuracy([evaluate(network, batches(path, size), device) for path in testing])
    return history


def accuracy(counts: Iterable[Iterable[int]]) -> float:
    """Return the fraction of correct labels, from (correct, total) of each shard."""
    correct, total = map(sum, zip(*counts, strict=True))
    return correct / total


def predict(network: Network, path: Path, device: torch.device) -> str:
    """Return the label that the network predicts for an image."""
    network.eval()
    outputs = network(image_tensor(path)[None].to(device))
    return "".join(ALPHABET[k] for k in outputs.view(LENGTH, -1).argmax(1).tolist())


# -- measure --------------------------------------------------------------------------------------------


def measure(
    shards: Path, device: torch.device, size: int = BATCH, epochs: int = EPOCHS, limit: int | None = None
) -> dict[str, Any]:
    """Train and return the figures as JSON values; memory is the peak of the whole process."""
    history = train(init_network(device), shards, device, size, epochs, limit)
    training, validating = history.training_seconds, history.validating_seconds
    num_images = len(read_gzip(shards / PARTS[0] / "00000.gz")["labels"])
    return {
        "shards": len(training) // len(history.training),
        "batch_size": size,
        "epochs": len(history.training),
        "seconds_per_shard": statistics.median(training) + statistics.median(validating),
        "first_shard_seconds": training[0] + validating[0],
        "training_images_per_second": num_images / statistics.median(training),
        "first_losses": history.losses[:8],
        "training_accuracy": history.training,
        "validating_accuracy": history.validating,
        "best_epoch": history.best_epoch,
        "testing_accuracy": history.testing,
        **memory(device),
    }


def clock(device: torch.device) -> float:
    """Synchronize the device and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(device: torch.device) -> dict[str, float | None]:
    """Return memory in MiB. On the CPU: the peak of resident memory, on Linux only.

    On CUDA: the peaks of torch's allocator, and the current GPU memory of this process and of all processes,
    which is a peak too, since torch does not free cached memory on its own.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        process = nvml_process_bytes(device)
        return {
            "peak_allocated_mib": torch.cuda.max_memory_allocated(device) / MIB,
            "peak_reserved_mib": torch.cuda.max_memory_reserved(device) / MIB,
            "process_mib": None if process is None else process / MIB,
            "gpu_used_mib": (total - free) / MIB,
        }
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")]
    return {"peak_rss_mib": peaks[0] if peaks else None}


def nvml_process_bytes(device: torch.device) -> int | None:
    """Return the GPU memory of this process by NVML; None if not reported, as in many containers."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return None
    return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)


def main(arguments: list[str] | None = None) -> None:
    from interference import interference  # not used by the training

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="folder of images (default: use the shards in --work)")
    parser.add_argument("--work", type=Path, help="folder that keeps the shards and the best state")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--shards", type=int, help="maximum number of shards of 1,000 images")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="maximum number of epochs")
    options = parser.parse_args(arguments)
    if not options.images and not options.work:
        parser.error("--images or --work is required")
    with tempfile.TemporaryDirectory() as folder:
        work, device = options.work or Path(folder), torch.device(options.device)
        if options.images:
            prepare(options.images, work, options.shards)
        figures = measure(work, device, options.batch_size, options.epochs, options.shards)
    settings = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "article_loop", **settings, **figures, **interference()}))


if __name__ == "__main__":
    main()
