"""What a CUDA card's counters say while the project's own networks do their first steps on it.

Only readings; what they mean is `judging`'s part.
"""

import copy
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captcha_exp.config import Config, Precision
from captcha_exp.data.dataset import Batch, random_batch
from captcha_exp.errors import RunFailed
from captcha_exp.memory.gpu_profile import ConvWorkspace, GpuMeasurements, MemoryStage, TimingRound
from captcha_exp.model import networks as models
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Display, ProgressBar

MIB = devices.MIB
DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
MATRIX_SIZE = 256  # of the matrices
BATCH_SIZES = (16, 64, 256, 1024)  # of the convolutions
DEFAULT_BATCH_SIZE = 256  # pictures in a training step where train.batch_size is auto
NUM_ROUNDS, NUM_WARMUP_STEPS, NUM_TIMED_STEPS = 3, 2, 5

T = TypeVar("T")


class ConvLayer(NamedTuple):
    """A convolution of a network, on the host."""

    layer: nn.Module
    input_shape: torch.Size  # of one picture
    input_requires_grad: bool  # its input has a gradient


def measure(
    configs: Sequence[Config], device: torch.device, free_before_mib: float | None, display: Display
) -> GpuMeasurements:
    """The readings of the card, on which this process has done nothing so far.

    The configs are resolved; the first one sets threads and determinism.

    Raises:
        RunFailed: the card has no room for a training step, or cannot do one in fp32.
    """
    # Deterministic trainings have it, and on no card does cuBLAS take more without it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    devices.setup_device(configs[0])
    networks = [(config, list_conv_layers(config)) for config in configs]
    stages: list[MemoryStage] = []

    def stage(after: str) -> None:
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        own = devices.nvml_process_bytes(device)
        reserved = torch.cuda.memory_reserved(device) / MIB
        stages.append(MemoryStage(after, (total - free) / MIB, reserved, None if own is None else own / MIB))
        display.info(f"{stages[-1].used_mib:,.0f} MiB of the card in use after {after}")

    total = 1 + len(DTYPES) * (1 + len(networks) * (len(BATCH_SIZES) + NUM_ROUNDS))
    with display.progress_bar("calibrate", total) as bar:
        torch.zeros(1, device=device)
        stage("the first tensor")
        kept = _cublas_workspace(device, display)
        stage("the first matrix products")
        bar.advance(1)
        for precision, dtype in DTYPES.items():
            first = functools.partial(_max_conv_workspace, networks[0][1][:1], BATCH_SIZES[0], dtype, device)
            if _attempt(first, f"a convolution in {precision}", display) is not None:
                stage(f"the first convolution in {precision}")
            elif precision == "fp32":
                raise RunFailed("a convolution in fp32 fails on this card; captcha-exp doctor may tell why")
            bar.advance(1)
        transients = [
            t
            for config, convs in networks
            for t in _measure_conv_workspaces(config, convs, device, display, bar)
        ]
        rounds = [each for config, _ in networks for each in _time_rounds(config, device, display, bar)]
        stage("training steps in every precision")
    properties = torch.cuda.get_device_properties(device)
    return GpuMeasurements(
        name=properties.name,
        totals_mib=(torch.cuda.mem_get_info(device)[1] / MIB, properties.total_memory / MIB),
        free_before_mib=free_before_mib,
        stages=tuple(stages),
        smallest=2,  # a training in fp32 alone comes so far
        cublas_mib=kept,
        cublas_config=os.environ["CUBLAS_WORKSPACE_CONFIG"],
        transients=tuple(transients),
        deterministic=configs[0].train.deterministic,
        rounds=tuple(rounds),
        compute_capability=f"{properties.major}.{properties.minor}",
    )


def _attempt(work: Callable[[], T], what: str, display: Display) -> T | None:
    """What it gives; None where the card has no room for it, or cannot do it, which is told."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        display.warn(f"{what} fails: {' '.join(str(error).split())[:200]}")
        return None
    finally:
        torch.cuda.empty_cache()


# -- matrix products -----------------------------------------------------------------------------------------


def _cublas_workspace(device: torch.device, display: Display) -> float:
    """MiB that stay allocated when the tensors of products, forward and backward, have gone."""
    before = torch.cuda.memory_allocated(device)
    for precision, dtype in DTYPES.items():
        product = functools.partial(_run_matmul, dtype, device)
        _attempt(product, f"a matrix product in {precision}", display)
    torch.cuda.synchronize(device)
    return (torch.cuda.memory_allocated(device) - before) / MIB


def _run_matmul(dtype: torch.dtype, device: torch.device) -> None:
    """As in the heads: a linear layer with a bias, and a product of stacks of matrices."""
    matrix = torch.zeros(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype, device=device, requires_grad=True)
    stack = F.linear(matrix, matrix, matrix[0])[None] @ matrix[None]
    stack.sum().backward()  # type: ignore[no-untyped-call]  # torch has no types for it


# -- convolutions --------------------------------------------------------------------------------------------


def list_conv_layers(config: Config) -> list[ConvLayer]:
    """The different convolutions of a config's network, in their order."""
    captcha, found = config.captcha, dict[str, ConvLayer]()

    def note(layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        sees = inputs[0].shape[1:]
        found.setdefault(f"{layer} {tuple(sees)}", ConvLayer(layer, sees, input_requires_grad=bool(found)))

    model = models.build(config.model, captcha)
    for layer in model.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            layer.register_forward_hook(note)
    with torch.no_grad():
        shape = (1, captcha.height, captcha.width, captcha.channels)
        model.eval()(torch.zeros(shape, dtype=torch.uint8))
    return list(found.values())


def _measure_conv_workspaces(
    config: Config, convs: Sequence[ConvLayer], device: torch.device, display: Display, bar: ProgressBar
) -> Iterator[ConvWorkspace]:
    """For each precision and each batch size that fits: what its hungriest convolution takes."""
    network = config.model.name
    for precision, dtype in DTYPES.items():
        fits = True
        for size in BATCH_SIZES:
            what = f"{network}, {precision}, a batch of {size}"
            if fits:
                work = functools.partial(_max_conv_workspace, convs, size, dtype, device)
                mib = _attempt(work, what, display)
                if mib is not None:
                    yield ConvWorkspace(network, precision, size, mib)
                fits = mib is not None
            bar.advance(1, what)


def _max_conv_workspace(
    convs: Sequence[ConvLayer], size: int, dtype: torch.dtype, device: torch.device
) -> float:
    """MiB: the most that one of them takes beside its tensors while it runs, forward or backward."""
    return max(_conv_workspace_bytes(conv, size, dtype, device) for conv in convs) / MIB


def _conv_workspace_bytes(conv: ConvLayer, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes. Each gradient is asked for alone: the room of one is not to hide in the tensors of both."""
    layer = copy.deepcopy(conv.layer).to(device, dtype)
    seen = torch.zeros(size, *conv.input_shape, dtype=dtype, device=device)
    if seen.ndim == 4:  # as models.place lays them out
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types other forms alone
        seen = seen.to(memory_format=torch.channels_last)
    seen.requires_grad_()
    given, most = _measure_transient_bytes(functools.partial(layer, seen), device)
    gradient = torch.ones_like(given)
    for wanted in [*layer.parameters(), *([seen] if conv.input_requires_grad else [])]:
        backward = functools.partial(torch.autograd.grad, given, wanted, gradient, retain_graph=True)
        most = max(most, _measure_transient_bytes(backward, device)[1])
    return most


def _measure_transient_bytes(work: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What it gives, and the bytes that were allocated at its peak and are not any more."""
    torch.cuda.reset_peak_memory_stats(device)
    given = work()
    torch.cuda.synchronize(device)
    return given, torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)


# -- training steps ------------------------------------------------------------------------------------------


def _time_rounds(
    config: Config, device: torch.device, display: Display, bar: ProgressBar
) -> Iterator[TimingRound]:
    """Each precision in turn, several times over, so that a card that warms up does so to all alike."""
    batch = _find_fitting_batch(config, device)
    size = batch.indices.shape[0]
    for _ in range(NUM_ROUNDS):
        seconds: dict[Precision, float] = {}
        for precision in DTYPES:
            chosen = replace(config, device=replace(config.device, precision=precision))
            what = f"{config.model.name}, {precision}, training steps of {size}"
            found = _attempt(functools.partial(_time_step, chosen, batch), what, display)
            if found is not None:
                seconds[precision] = found
            bar.advance(1, what)
        if "fp32" in seconds:
            yield TimingRound(config.model.name, size, seconds)


def _find_fitting_batch(config: Config, device: torch.device) -> Batch:
    """Noise, with which a step in fp32 fits: as much as the config's batch size, or a half, a quarter ...

    Raises:
        RunFailed: not one picture fits, or the step fails.
    """
    network = config.model.name
    size = DEFAULT_BATCH_SIZE if config.train.batch_size == "auto" else config.train.batch_size
    while size:
        try:
            batch = random_batch(config, size, device)
            _time_step(config, batch)
            return batch
        except torch.OutOfMemoryError:
            size //= 2
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            text = f"a training step of {network} in fp32 fails on this card: {reason}"
            raise RunFailed(text) from None
        torch.cuda.empty_cache()  # when what failed has gone
    raise RunFailed(
        f"no room on this card for one picture of {network}; captcha-exp doctor tells who holds it"
    )


def _time_step(config: Config, batch: Batch) -> float:
    """Of one training step, the median of some."""
    device = batch.images.device
    state = init_train_state(config, device)
    seconds = []
    for _ in range(NUM_WARMUP_STEPS + NUM_TIMED_STEPS):  # the first ones load kernels and make room
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        train_step(state, batch, config)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[NUM_WARMUP_STEPS:])
