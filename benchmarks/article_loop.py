"""The article's program, written afresh: the reference that this project is compared with.

Nothing of captcha_exp is in it, and nothing is tuned. It does what the article's programs do:

    prepare   pictures named 00000-R865.png (index, dash, code; case folded; in truth GIF), shuffled,
              resized to 56x24 before they become RGB (which forces nearest-neighbour), divided by 255;
              shards of 1,000, split 80/10/10, as gzip'ed float32 tensors; a part-shard is dropped
    train     ResNet-18 with a 3x3 stem of stride 1 and no max-pool, a softmax per character, BCELoss,
              Adam as it comes; batches of 100 in fixed order, the shards read again in each epoch;
              validation without no_grad; ends when that has not improved for more than 20 epochs, and
              tests the best state
    read      what the network reads in one picture

Deliberately different, and why:

    safetensors in the gzip, not pickle      this project reads no pickle
    files are sorted, then shuffled          the order must not hang on the file system
    the accuracies are printed, not drawn    figures are compared, pictures are not
    `read` is given a path, asks for none    other programs call it

Where the article is not known: all training parts come before the validating parts of an epoch;
training accuracy is counted on the way, in training mode; the first of two equal epochs is the better.

Prints one JSON line. `seconds_per_shard` is what the article gives as 13.60 s on its CPU and 1.90 s on
its GPU: 800 pictures trained on and 100 validated, reading included, each the median over shards and
epochs. In `first_shard_seconds` the device warms up. Writing the best state and the test are in neither.

    python benchmarks/article_loop.py --pictures DIR [--device cpu] [--shards 2] [--epochs 3]
    python benchmarks/article_loop.py --pictures DIR --work NEW    keeps the shards and the best state
    python benchmarks/article_loop.py --work OLD                   takes the shards from there
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

Batch = tuple[Tensor, Tensor]  # pictures (B, 3, H, W) in [0, 1] and codes (B, 4*36) of 0 and 1, float32


# -- prepare --------------------------------------------------------------------------------------------


def picture_tensor(path: Path) -> Tensor:
    """(3, 24, 56) float32 in [0, 1]."""
    with Image.open(path) as image:
        small = image.resize((WIDTH, HEIGHT)).convert("RGB")
    pixels = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
    return pixels.view(HEIGHT, WIDTH, 3).permute(2, 0, 1).float() / 255


def code_tensor(path: Path) -> Tensor:
    """(4*36,) float32, a 1 for each character of the code in the file's name."""
    code = path.stem.partition("-")[2].lower()
    if len(code) != LENGTH or not set(code) <= set(ALPHABET):
        raise ValueError(f"{path}: the name must end in a dash and {LENGTH} of {ALPHABET}")
    ids = torch.tensor([ALPHABET.index(character) for character in code])
    return nn.functional.one_hot(ids, len(ALPHABET)).float().flatten()


def prepare(pictures: Path, out: Path, limit: int | None = None, shard: int = SHARD) -> int:
    """The number of shards written: for each a file in out/training, out/validating and out/testing."""
    files = sorted(pictures.glob("*.png"))
    random.Random(0).shuffle(files)
    starts = range(0, len(files) - shard + 1, shard)[:limit]
    if not starts:
        raise ValueError(f"{pictures}: {len(files)} pictures make no shard of {shard}")
    for part in PARTS:
        (out / part).mkdir(parents=True)
    for number, start in enumerate(starts):
        chosen, first, second = files[start : start + shard], shard * 8 // 10, shard * 9 // 10
        sides = chosen[:first], chosen[first:second], chosen[second:]
        for part, paths in zip(PARTS, sides, strict=True):
            images = torch.stack([picture_tensor(path) for path in paths])
            codes = torch.stack([code_tensor(path) for path in paths])
            write_gzip(out / part / f"{number:05}.gz", {"images": images, "codes": codes})
    return len(starts)


def write_gzip(path: Path, tensors: dict[str, Tensor]) -> None:
    path.write_bytes(gzip.compress(save(tensors)))


def read_gzip(path: Path) -> dict[str, Tensor]:
    return load(gzip.decompress(path.read_bytes()))


def batches(path: Path, size: int) -> Iterator[Batch]:
    """One part of a shard in its order; the last batch takes what is left."""
    tensors = read_gzip(path)
    yield from zip(*(torch.split(tensors[name], size) for name in ("images", "codes")), strict=True)


# -- the network ----------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3x3 convolutions; what went in is added to what came out."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.change = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.change.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.change.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        return torch.relu(out + self.change(x))


class Network(nn.Module):
    """(B, 3, H, W) -> (B, 4*36): at each of 4 places the probabilities of 36 characters."""

    def __init__(self, widths: tuple[int, int, int, int] = (64, 128, 256, 512)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.stages = nn.Sequential()
        for inputs, outputs, stride in zip(widths[:1] + widths[:3], widths, (1, 2, 2, 2), strict=True):
            self.stages.append(nn.Sequential(Block(inputs, outputs, stride), Block(outputs, outputs, 1)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(widths[3], LENGTH * len(ALPHABET))

    def forward(self, pictures: Tensor) -> Tensor:
        x = self.stages(torch.relu(self.norm(self.conv(pictures))))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits.view(-1, LENGTH, len(ALPHABET)).softmax(2).flatten(1)


def fresh(device: torch.device) -> Network:
    """The network before its first step, always with the same weights."""
    torch.manual_seed(0)
    return Network().to(device)


def right(outputs: Tensor, codes: Tensor) -> int:
    """How many codes are read right as a whole."""
    read, wanted = (x.view(-1, LENGTH, len(ALPHABET)).argmax(2) for x in (outputs, codes))
    return int((read == wanted).all(1).sum().item())


# -- train ----------------------------------------------------------------------------------------------


@dataclass
class History:
    """What a training was like."""

    losses: list[float] = field(default_factory=list)  # of each step
    training: list[float] = field(default_factory=list)  # accuracy of each epoch
    validating: list[float] = field(default_factory=list)  # accuracy of each epoch
    best_epoch: int = 0
    testing: float = 0.0  # accuracy of the best epoch's state
    training_seconds: list[float] = field(default_factory=list)  # of each shard in each epoch
    validating_seconds: list[float] = field(default_factory=list)  # of each shard in each epoch


def steps(
    network: Network, optimizer: torch.optim.Optimizer, given: Iterable[Batch], device: torch.device
) -> tuple[list[float], int, int]:
    """The loss of one step for each batch; codes read right, of how many."""
    criterion = nn.BCELoss()
    losses, correct, seen = [], 0, 0
    network.train()
    for pictures, codes in given:
        pictures, codes = pictures.to(device), codes.to(device)
        optimizer.zero_grad()
        outputs = network(pictures)
        loss = criterion(outputs, codes)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        correct, seen = correct + right(outputs, codes), seen + len(codes)
    return losses, correct, seen


def examine(network: Network, given: Iterable[Batch], device: torch.device) -> tuple[int, int]:
    """Codes read right, of how many. Without no_grad, as in the article."""
    correct = seen = 0
    network.eval()
    for pictures, codes in given:
        outputs = network(pictures.to(device))
        correct, seen = correct + right(outputs, codes.to(device)), seen + len(codes)
    return correct, seen


def train(
    network: Network,
    shards: Path,
    device: torch.device,
    size: int = BATCH,
    epochs: int = EPOCHS,
    limit: int | None = None,
) -> History:
    """What it was like; the network ends in its best state, which is in shards/best.gz too."""
    history, optimizer = History(), torch.optim.Adam(network.parameters())
    training, validating, testing = (sorted((shards / part).glob("*.gz"))[:limit] for part in PARTS)
    for epoch in range(1, epochs + 1):
        counts = []
        for path in training:
            began = clock(device)
            losses, *count = steps(network, optimizer, batches(path, size), device)
            history.training_seconds.append(clock(device) - began)
            history.losses += losses
            counts.append(count)
        history.training.append(accuracy(counts))

        examined = []
        for path in validating:
            began = clock(device)
            examined.append(examine(network, batches(path, size), device))
            history.validating_seconds.append(clock(device) - began)
        if accuracy(examined) > max(history.validating, default=-1):
            history.best_epoch = epoch
            write_gzip(shards / "best.gz", network.state_dict())
        history.validating.append(accuracy(examined))
        print(f"{epoch}: {history.training[-1]:.2%} {history.validating[-1]:.2%}", file=sys.stderr)
        if epoch - history.best_epoch > PATIENCE:
            break

    network.load_state_dict(read_gzip(shards / "best.gz"))
    history.testing = accuracy([examine(network, batches(path, size), device) for path in testing])
    return history


def accuracy(counts: Iterable[Iterable[int]]) -> float:
    """The share of right codes, from (right, of how many) of each shard."""
    correct, seen = map(sum, zip(*counts, strict=True))
    return correct / seen


def read(network: Network, picture: Path, device: torch.device) -> str:
    """The code that the network reads in a picture."""
    network.eval()
    outputs = network(picture_tensor(picture)[None].to(device))
    return "".join(ALPHABET[k] for k in outputs.view(LENGTH, -1).argmax(1).tolist())


# -- measure --------------------------------------------------------------------------------------------


def measure(
    shards: Path, device: torch.device, size: int = BATCH, epochs: int = EPOCHS, limit: int | None = None
) -> dict[str, Any]:
    """The figures of one training, as JSON values; memory is that of the whole process so far."""
    history = train(fresh(device), shards, device, size, epochs, limit)
    training, validating = history.training_seconds, history.validating_seconds
    pictures = len(read_gzip(shards / PARTS[0] / "00000.gz")["codes"])
    return {
        "shards": len(training) // len(history.training),
        "batch_size": size,
        "epochs": len(history.training),
        "seconds_per_shard": statistics.median(training) + statistics.median(validating),
        "first_shard_seconds": training[0] + validating[0],
        "training_pictures_per_second": pictures / statistics.median(training),
        "first_losses": history.losses[:8],
        "training_accuracy": history.training,
        "validating_accuracy": history.validating,
        "best_epoch": history.best_epoch,
        "testing_accuracy": history.testing,
        **memory(device),
    }


def clock(device: torch.device) -> float:
    """Seconds, once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def memory(device: torch.device) -> dict[str, float | None]:
    """MiB. On the CPU the peak of resident memory, which Linux alone tells.

    On CUDA the peaks of torch's allocator, and what this process and all processes hold of the card now;
    torch gives nothing back by itself, so that is a peak too.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        process = nvml_process_bytes(device)
        return {
            "peak_allocated_mib": torch.cuda.max_memory_allocated(device) / MIB,
            "peak_reserved_mib": torch.cuda.max_memory_reserved(device) / MIB,
            "process_mib": None if process is None else process / MIB,
            "card_used_mib": (total - free) / MIB,
        }
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")]
    return {"peak_rss_mib": peaks[0] if peaks else None}


def nvml_process_bytes(device: torch.device) -> int | None:
    """What nvidia-smi shows for this process; None where it shows nothing, as in many containers."""
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, help="else the shards in --work are taken")
    parser.add_argument("--work", type=Path, help="keeps the shards and the best state")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, default=BATCH)
    parser.add_argument("--shards", type=int, help="at most so many of 1,000 pictures")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="at most so many")
    asked = parser.parse_args(arguments)
    if not asked.pictures and not asked.work:
        parser.error("--pictures or --work is needed")
    with tempfile.TemporaryDirectory() as folder:
        work, device = asked.work or Path(folder), torch.device(asked.device)
        if asked.pictures:
            prepare(asked.pictures, work, asked.shards)
        figures = measure(work, device, asked.batch_size, asked.epochs, asked.shards)
    settings = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps({"benchmark": "article_loop", **settings, **figures}))


if __name__ == "__main__":
    main()
