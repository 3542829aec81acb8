"""What the parts of gpu_session share: configs, noise to train on, and what a process holds of the card.

Nothing here starts CUDA or draws a picture, and little is imported, as each part is a process of its own.
"""

import functools
import gc
import hashlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from gpu_judging import PROJECT

from captcha_exp import compose, load
from captcha_exp.config import Config
from captcha_exp.data.augment import Augmenter
from captcha_exp.data.dataset import Batch, Dataset
from captcha_exp.model.evaluate import evaluate
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices

MIB = 2**20
CARD = "h200"  # the file in conf/gpu/ that a measured config names; nothing that is measured depends on it
SENT = "device.preload_limit_mib=0"  # keeps pictures on the host: results do not depend on their number
NETWORKS = {"resnet18": "experiment=article", "compact": "experiment=alnum"}
VARIANTS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "bf16": ("device.precision=bf16",),
    "fp16": ("device.precision=fp16",),
    "fp32-again": ("train.activation_checkpointing=true",),  # activations are computed again
    "bf16-again": ("device.precision=bf16", "train.activation_checkpointing=true"),
}
_NO_MEMORY = ("out of memory", "ALLOC_FAILED", "unable to find an engine")  # the driver, cuBLAS, cuDNN


class Case(NamedTuple):
    """A training that is foretold and measured."""

    network: str
    variant: str
    batch: int

    @property
    def name(self) -> str:
        """As in resnet18-fp32-100."""
        return f"{self.network}-{self.variant}-{self.batch}"


def config_of(case: Case, device: str, *more: str, gpu: str = CARD) -> Config:
    """The config of a case: one epoch, on a device that nobody has looked for yet."""
    fixed = ("train.epochs=1", f"train.batch_size={case.batch}", f"gpu={gpu}", "tracking=none")
    place = (f"device.name={device}", f"device.threads={1 if device == 'cpu' else 4}")
    return load(compose(NETWORKS[case.network], *VARIANTS[case.variant], *fixed, *place, *more))


def noise(config: Config, pictures: Mapping[str, int]) -> Dataset:
    """So many pictures of noise in each split: what memory is taken does not depend on what they show."""
    captcha, count = config.captcha, sum(pictures.values())
    generator = torch.Generator().manual_seed(0)
    shape = (count, captcha.height, captcha.width, captcha.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, len(captcha.alphabet), (count, captcha.length), generator=generator)
    numbers = torch.split(torch.arange(count), list(pictures.values()))
    return Dataset(images, targets, [], dict(zip(pictures, numbers, strict=True)), {})


def noise_batch(config: Config, device: torch.device) -> Batch:
    """One batch of noise on the device."""
    data = noise(config, {"train": int(config.train.batch_size)})
    return next(data.split("train", device, config.device.preload_limit_mib).batches(len(data.targets)))


def epoch(config: Config, data: Dataset, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """The peaks of an epoch's training, and of the evaluation after it; all that was made is gone then.

    What `fit` does, in its order, so what memory.trace foretells; without the loop's progress and its guard,
    who hold scalars alone.
    """
    limit = config.device.preload_limit_mib
    training, validation = (data.split(name, device, limit) for name in ("train", "validation"))
    state = init_train_state(config, device)
    start(device)
    change = Augmenter(config, 1, len(data.images), device)
    state.model.train()
    for batch in training.batches(int(config.train.batch_size), training.permutation(config.seed, 1)):
        _kept = train_step(state, change(batch), config)  # lives until the next one, as in fit
    trained = peaks(device)
    start(device)
    evaluate(state.model, validation, config)
    state.update_best(0.0, 0.0)
    return trained, peaks(device)


# -- memory of the card --------------------------------------------------------------------------------------


def start(device: torch.device) -> None:
    """The peaks begin again at what is in use now."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, Any]:
    """MiB at most since the last `start`; None on the CPU, which has no such allocator."""
    if device.type != "cuda":
        return {"requested_mib": None, "allocated_mib": None, "reserved_mib": None}
    torch.cuda.synchronize(device)
    found = torch.cuda.memory_stats(device)
    return {
        "requested_mib": found["requested_bytes.all.peak"] / MIB,
        "allocated_mib": found["allocated_bytes.all.peak"] / MIB,
        "reserved_mib": found["reserved_bytes.all.peak"] / MIB,
    }


def reserved_mib(device: torch.device) -> float | None:
    """MiB that torch's allocator holds now."""
    return torch.cuda.memory_reserved(device) / MIB if device.type == "cuda" else None


def allocated_mib(device: torch.device) -> float | None:
    """MiB of torch's allocator that are in use now."""
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else None


def clear(device: torch.device) -> None:
    """Everything that torch keeps goes back to the driver; what a caller still holds does not."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def attempt(act: Callable[[], object], device: torch.device) -> str | None:
    """None if it had memory enough, else the error's first line; whatever it held is given back."""
    reason: str | None = None
    try:
        act()
    except RuntimeError as error:
        words = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in words for sign in _NO_MEMORY):
            raise
        reason = words.splitlines()[0]
    clear(device)  # only here is the traceback gone, which holds the tensors
    return reason


class ProcessMeter:
    """What this process holds of the card; made before CUDA starts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free_before = None if device.type == "cpu" else _free_bytes()

    @property
    def free_before_mib(self) -> float | None:
        """MiB of the GPU that were free before CUDA started here, by NVML."""
        return None if self.free_before is None else self.free_before / MIB

    def now(self) -> dict[str, Any]:
        """MiB of the process now, who says so, and how many of them torch's allocator did not reserve.

        By NVML for this process. Where that is silent, as in many containers: what the card has in use, less
        what it had before CUDA started here; at worst all that it has in use.
        """
        if self.device.type != "cuda":
            return {"process_mib": _resident_mib(), "process_by": "resident memory", "context_mib": None}
        torch.cuda.synchronize(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        used, own = total - free, devices.nvml_process_bytes(self.device)
        if own is not None:
            process, by = own, "NVML, this process"
        elif self.free_before is not None and (now := _free_bytes()) is not None:
            process, by = self.free_before - now, "NVML, the card now and before"
        else:
            process, by = used, "all that the card has in use"
        return {
            "process_mib": process / MIB,
            "process_by": by,
            "context_mib": (process - reserved) / MIB,
            "card_used_mib": used / MIB,
            "card_free_before_mib": self.free_before_mib,
        }


def hold(process_mib: float, context_mib: float) -> None:
    """From here on torch reserves no more of the current card than leaves the process within so many MiB."""
    _, total = torch.cuda.mem_get_info()
    share = (process_mib - context_mib) * MIB / total
    # Alone among its kind this function takes no torch.device("cuda"): it wants a number, or nothing.
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, share)))


def _free_bytes() -> int | None:
    """What is free of the first card; None where NVML does not say. Starts no CUDA."""
    return next(iter(devices.nvml_free_bytes().values()), None)


def _resident_mib() -> float:
    """MiB of memory, at most so far: only so that a dry run has a figure."""
    return devices.process_peak_mib(torch.device("cpu"))


def step_seconds(act: Callable[[], object], steps: int, device: torch.device) -> float:
    """Return the median seconds of so many calls, each waited for."""
    taken = []
    for _ in range(steps):
        wait(device)
        began = time.perf_counter()
        act()
        wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def wait(device: torch.device) -> None:
    """Wait until the device has done all of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def code_sha256() -> str:
    """SHA-256 over the code and the settings that a prediction depends on."""
    digest = hashlib.sha256()
    for file in sorted([*PROJECT.glob("captcha_exp/**/*.py"), *PROJECT.glob("conf/**/*.yaml")]):
        digest.update(f"{file.relative_to(PROJECT)}\n".encode() + file.read_bytes())
    return digest.hexdigest()
