"""Measure memory and speed of a CUDA GPU during the first steps of the project's networks.

`gpu_profile` derives the bounds of the GPU's file from these measurements.
"""

import copy
import functools
import logging
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
from captcha_exp.errors import RunFailed, one_line
from captcha_exp.memory.gpu_profile import ConvWorkspace, GpuMeasurements, MemoryStage, TimingRound
from captcha_exp.model import networks
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import ProgressBar, progress_bar
from captcha_exp.runtime.cpu_time import measure_undisturbed

logger = logging.getLogger(__name__)

MIB = devices.MIB
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATRIX_SIZE = 256  # of the matrices
BATCH_SIZES = (16, 64, 256, 1024)  # of the convolutions
DEFAULT_BATCH_SIZE = 256  # of a training step if train.batch_size is auto
NUM_ROUNDS, NUM_WARMUP_STEPS, NUM_TIMED_STEPS = 3, 2, 5

T = TypeVar("T")


class ConvLayer(NamedTuple):
    """A convolution layer of a network, on the host."""

    layer: nn.Module
    input_shape: torch.Size  # of one image
    input_requires_grad: bool


def measure(
    configs: Sequence[Config], device: torch.device, free_before_mib: float | None
) -> GpuMeasurements:
    """Measure a GPU that this process has not used yet.

    The configs are resolved; the first one sets threads and determinism.

    Raises:
        RunFailed: a training step does not fit, or fails in fp32; run captcha-exp doctor.
    """
    # Deterministic training sets it, and cuBLAS takes no more memory without it on any GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    devices.setup_device(configs[0])
    conv_layers = [(config, list_conv_layers(config)) for config in configs]
    stages: list[MemoryStage] = []

    def record_stage(after: str) -> None:
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        process = devices.nvml_process_bytes(device)
        reserved = torch.cuda.memory_reserved(device) / MIB
        stages.append(
            MemoryStage(after, (total - free) / MIB, reserved, None if process is None else process / MIB)
        )
        logger.info(f"{stages[-1].used_mib:,.0f} MiB of GPU memory in use after {after}")

    total = 1 + len(DTYPES) * (1 + len(conv_layers) * (len(BATCH_SIZES) + NUM_ROUNDS))
    with progress_bar("calibrate", total) as bar:
        torch.zeros(1, device=device)
        record_stage("the first tensor")
        cublas_mib = _cublas_workspace(device)
        record_stage("the first matrix products")
        bar.advance(1)
        for precision, dtype in DTYPES.items():
            first = functools.partial(
                _max_conv_workspace, conv_layers[0][1][:1], BATCH_SIZES[0], dtype, device
            )
            if _attempt(first, f"a convolution in {precision}") is not None:
                record_stage(f"the first convolution in {precision}")
            bar.advance(1)
        workspaces = [
            each
            for config, convs in conv_layers
            for each in _measure_conv_workspaces(config, convs, device, bar)
        ]
        rounds = [each for config, _ in conv_layers for each in _time_rounds(config, device, bar)]
        record_stage("training steps in every precision")
    properties = torch.cuda.get_device_properties(device)
    return GpuMeasurements(
        name=properties.name,
        totals_mib=(torch.cuda.mem_get_info(device)[1] / MIB, properties.total_memory / MIB),
        free_before_mib=free_before_mib,
        stages=tuple(stages),
        cublas_mib=cublas_mib,
        cublas_config=os.environ["CUBLAS_WORKSPACE_CONFIG"],
        transients=tuple(workspaces),
        deterministic=configs[0].train.deterministic,
        rounds=tuple(rounds),
        compute_capability=f"{properties.major}.{properties.minor}",
    )


def _attempt(work: Callable[[], T], what: str) -> T | None:
    """Return the result of `work`; None if memory does not suffice, or if it fails, with a warning."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        logger.warning(f"{what} fails: {one_line(error)[:200]}")
        return None
    finally:
        torch.cuda.empty_cache()


# -- matrix products -----------------------------------------------------------------------------------------


def _cublas_workspace(device: torch.device) -> float:
    """Return the MiB that stay allocated after matrix products, forward and backward."""
    before = torch.cuda.memory_allocated(device)
    for precision, dtype in DTYPES.items():
        matmul = functools.partial(_run_matmul, dtype, device)
        _attempt(matmul, f"a matrix product in {precision}")
    torch.cuda.synchronize(device)
    return (torch.cuda.memory_allocated(device) - before) / MIB


def _run_matmul(dtype: torch.dtype, device: torch.device) -> None:
    """Run a linear layer with a bias and a batched matrix product, as the heads do."""
    matrix = torch.zeros(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype, device=device, requires_grad=True)
    stack = F.linear(matrix, matrix, matrix[0])[None] @ matrix[None]
    stack.sum().backward()  # type: ignore[no-untyped-call]  # torch has no types for it


# -- convolutions --------------------------------------------------------------------------------------------


def list_conv_layers(config: Config) -> list[ConvLayer]:
    """Return the distinct convolutions of a config's network, in order of execution."""
    captcha, found = config.captcha, dict[str, ConvLayer]()

    def collect(layer: nn.Module, inputs: tuple[Tensor], _: Tensor) -> None:
        shape = inputs[0].shape[1:]
        found.setdefault(f"{layer} {tuple(shape)}", ConvLayer(layer, shape, input_requires_grad=bool(found)))

    model = networks.build(config.model, captcha)
    for layer in model.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            layer.register_forward_hook(collect)
    with torch.no_grad():
        shape = (1, captcha.height, captcha.width, captcha.channels)
        model.eval()(torch.zeros(shape, dtype=torch.uint8))
    return list(found.values())


def _measure_conv_workspaces(
    config: Config, convs: Sequence[ConvLayer], device: torch.device, bar: ProgressBar
) -> Iterator[ConvWorkspace]:
    """Yield the largest workspace of any convolution, for each precision and batch size that fits."""
    network = config.model.name
    for precision, dtype in DTYPES.items():
        fits = True
        for size in BATCH_SIZES:
            what = f"{network}, {precision}, batch size {size}"
            work = functools.partial(_max_conv_workspace, convs, size, dtype, device)
            mib = _attempt(work, what) if fits else None
            if mib is not None:
                yield ConvWorkspace(network, precision, size, mib)
            fits = mib is not None
            bar.advance(1, what)


def _max_conv_workspace(
    convs: Sequence[ConvLayer], size: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Return the largest workspace of any of these layers in MiB, forward or backward."""
    return max(_conv_workspace_bytes(conv, size, dtype, device) for conv in convs) / MIB


def _conv_workspace_bytes(conv: ConvLayer, size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the largest workspace of a layer in bytes.

    Each gradient is computed alone, so its workspace is not hidden by the memory of another gradient.
    """
    layer = copy.deepcopy(conv.layer).to(device, dtype)
    x = torch.zeros(size, *conv.input_shape, dtype=dtype, device=device)
    if x.ndim == 4:  # as in networks.to_device
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch has no type for it
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    output, max_bytes = _measure_transient_bytes(functools.partial(layer, x), device)
    gradient = torch.ones_like(output)
    for tensor in [*layer.parameters(), *([x] if conv.input_requires_grad else [])]:
        backward = functools.partial(torch.autograd.grad, output, tensor, gradient, retain_graph=True)
        max_bytes = max(max_bytes, _measure_transient_bytes(backward, device)[1])
    return max_bytes


def _measure_transient_bytes(work: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """Return the result of `work`, and the bytes that were allocated at its peak and freed at its end."""
    torch.cuda.reset_peak_memory_stats(device)
    result = work()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)


# -- training steps ------------------------------------------------------------------------------------------


def _time_rounds(config: Config, device: torch.device, bar: ProgressBar) -> Iterator[TimingRound]:
    """Yield the step times of several rounds over all precisions, which warm-up thus affects alike."""
    batch = _find_fitting_batch(config, device)
    size = batch.indices.shape[0]
    for _ in range(NUM_ROUNDS):
        seconds: dict[Precision, float] = {}
        for precision in DTYPES:
            chosen = replace(config, device=replace(config.device, precision=precision))
            what = f"{config.model.name}, {precision}, training steps of batch size {size}"
            step_seconds = _attempt(functools.partial(_time_step, chosen, batch), what)
            if step_seconds is not None:
                seconds[precision] = step_seconds
            bar.advance(1, what)
        if "fp32" in seconds:
            yield TimingRound(config.model.name, size, seconds)


def _find_fitting_batch(config: Config, device: torch.device) -> Batch:
    """Return a random batch with which an fp32 step fits, its size halved from the config's until it does.

    Raises:
        RunFailed: not even one image fits, or the step fails; run captcha-exp doctor.
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
            text = f"a training step of {network} in fp32 fails on this GPU: {one_line(error)[:200]}"
            raise RunFailed(text) from None
        torch.cuda.empty_cache()  # after the exception has released the tensors
    raise RunFailed(
        f"{network}: one image does not fit on this GPU; captcha-exp doctor lists the processes that use it"
    )


def _time_step(config: Config, batch: Batch) -> float | None:
    """Return the median time of a training step after warm-up; None if other processes disturb it."""
    seconds, disturbed = measure_undisturbed(
        functools.partial(_time_steps, config, batch), batch.images.device
    )
    if disturbed:
        text = f"{config.model.name}, {config.device.precision}"
        logger.warning(
            f"{text}: other processes took cores of the CPU during the training steps; left out, measure "
            "again with --force when they are idle"
        )
        return None
    return statistics.median(seconds[NUM_WARMUP_STEPS:])


def _time_steps(config: Config, batch: Batch) -> list[float]:
    device = batch.images.device
    state = init_train_state(config, device)
    seconds = []
    for _ in range(NUM_WARMUP_STEPS + NUM_TIMED_STEPS):  # the first ones load kernels and fill the cache
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        train_step(state, batch, config)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds
