"""Predict whether training fits a GPU, for a config and a batch size.

    process = context + memory that torch's allocator reserves for (tensors + workspaces)

Tensors come from a trace of the training (`trace`), reserved memory from a model of the allocator
(`allocator`). Context and workspaces cannot be traced: the GPU's file has bounds for them, so the prediction
is a range. A batch *fits* if it does with every bound at its maximum, and *does not fit* if it does not with
every bound at its minimum. Otherwise the verdict is *unsure*, which is treated as *does not fit*.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from captcha_exp.config import Config, GpuSpec
from captcha_exp.memory.allocator import MIB
from captcha_exp.memory.interval import Fits, MiBRange
from captcha_exp.memory.replay import (
    PhasePeaks,
    TraceReplayer,
    peak_range,
    replay_trace,
    uses_expandable_segments,
)
from captcha_exp.memory.search import find_max_batch_size
from captcha_exp.memory.trace import Trace, trace
from captcha_exp.memory.traces import TraceCache
from captcha_exp.memory.workspaces import Workspaces, workspace_scenarios

logger = logging.getLogger(__name__)

# Of the reserved memory: the largest error of a trace (tests/memory/test_trace.py), with some margin.
ERROR_MARGIN = 0.02
MAX_MICRO_BATCHES = 16  # micro-batches per step in the search for the maximum batch size


class Peak(NamedTuple):
    """The peak of training or of evaluation, as torch.cuda.max_memory_allocated and _reserved."""

    allocated_mib: MiBRange
    reserved_mib: MiBRange


@dataclass(frozen=True)
class Plan:
    """The predicted memory of a batch size, and whether it fits."""

    batch_size: int
    tensors_mib: float  # of a training step, without the images that stay on the device
    state_mib: float  # of them parameters, buffers and the optimizer's state
    activations_mib: float  # of them everything else at the peak: activations, gradients, the batch
    images_mib: float  # splits that stay on the device
    workspace_mib: MiBRange  # of cuBLAS and cuDNN, at most at one time
    training: Peak
    evaluation: Peak
    reserved_mib: MiBRange  # of the whole run
    process_mib: MiBRange
    budget_mib: MiBRange | None  # available to the process; None: unknown
    fits: Fits | None

    @property
    def is_evaluation_peak(self) -> bool:
        """Return whether a smaller evaluation batch would lower the peak."""
        return self.evaluation.allocated_mib.max > self.training.allocated_mib.max

    def describe(self, gpu_name: str) -> str:
        """Return the plan in one line."""
        text = f"batch size {self.batch_size}: predicted {self.process_mib} MiB on {gpu_name}"
        text += f" (tensors {self.tensors_mib:,.0f})"
        return text if self.budget_mib is None else f"{text}, budget {self.budget_mib} MiB: {self.fits}"

    def prediction_error_metrics(self, measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return metrics of the prediction and of its error, from the measured metrics of each epoch.

        An error is relative to the measured value: 0 within the bounds, above 0 if predicted too high.
        """
        metrics = {
            "memory/predicted_peak_min_mib": self.process_mib.min,
            "memory/predicted_peak_mib": self.process_mib.max,
        }
        is_measured = False
        for kind, peak in (("train", self.training), ("eval", self.evaluation)):
            for field, bounds in (("allocated", peak.allocated_mib), ("reserved", peak.reserved_mib)):
                key = f"memory/{kind}_peak_{field}_mib"
                if peak_mib := max((row[key] for row in measured if key in row), default=0.0):
                    metrics[f"memory/{kind}_peak_{field}_error"] = bounds.relative_error(peak_mib)
                    is_measured = True
        if is_measured:
            peak_mib = max((row.get("memory/process_peak_mib", 0.0) for row in measured), default=0.0)
            metrics["memory/process_peak_error"] = self.process_mib.relative_error(peak_mib)
        return metrics

    def to_json(self) -> dict[str, Any]:
        """Return values that `json` can write; a range is a list of two."""
        values = asdict(self)
        for kind in ("training", "evaluation"):
            values[kind] = getattr(self, kind)._asdict()
        return values


class PlannerCache:
    """Traces and replays for planners whose configs differ only in the GPU or the budget."""

    def __init__(self, config: Config, split_sizes: Mapping[str, int]) -> None:
        def trace_batch(batch_size: int) -> Trace:
            return trace(with_batch_size(config, batch_size), batch_size, split_sizes)

        self.traces = TraceCache(trace_batch, split_sizes["train"], config.train.micro_batch_size is not None)
        self._replayers: dict[int, TraceReplayer] = {}
        self._fits_cache: dict[tuple[int, Workspaces, float, bool], bool] = {}

    def replayer_for(self, batch_size: int) -> TraceReplayer:
        """Return the replayer of a batch size, which caches the peaks without a limit."""
        if batch_size not in self._replayers:
            self._replayers[batch_size] = TraceReplayer(self.traces.trace(batch_size))
        return self._replayers[batch_size]

    def fits(self, batch_size: int, workspaces: Workspaces, available_mib: float) -> bool:
        """Return whether this much memory suffices; GPUs with equal figures share the result."""
        key = batch_size, workspaces, available_mib, uses_expandable_segments()
        if key not in self._fits_cache:
            traced = self.traces.trace_or_interpolate(batch_size)
            self._fits_cache[key] = replay_trace(traced, workspaces, available_mib) is not None
        return self._fits_cache[key]


class Planner:
    """Plans for one resolved config and these numbers of images per split."""

    def __init__(
        self,
        config: Config,
        split_sizes: Mapping[str, int],
        total_mib: float | None = None,
        cache: PlannerCache | None = None,
    ) -> None:
        """`total_mib` is the memory of the device in use, for a GPU file without a size."""
        self.config = config
        self.split_sizes = dict(split_sizes)
        self.budget_mib = memory_budget(config, total_mib)
        self.cache = cache or PlannerCache(config, split_sizes)
        micro = config.train.micro_batch_size
        # Each micro-batch is traced: their number hardly changes memory, but the time of the trace.
        self.batch_size_limit = (
            min(split_sizes["train"], MAX_MICRO_BATCHES * micro) if micro else split_sizes["train"]
        )
        self._plans: dict[int, Plan] = {}
        self._workspaces = workspace_scenarios(config.gpu)

    def plan_for(self, batch_size: int) -> Plan:
        """Return the plan for a batch size."""
        if batch_size not in self._plans:
            replayer = self.cache.replayer_for(batch_size)
            plan = self._plans[batch_size] = _make_plan(
                replayer, self.config.gpu, batch_size, self.budget_mib
            )
            logger.debug(f"batch size {batch_size:,}: {plan.describe(self.config.gpu.name)}")
        return self._plans[batch_size]

    def max_batch_plan(self) -> Plan | None:
        """Return the plan of the maximum batch size; None if no batch fits.

        It is at most `batch_size_limit`: the whole training split, or MAX_MICRO_BATCHES micro-batches.
        """
        batch_size = self.max_batch_size()
        return self.plan_for(batch_size) if batch_size else None

    def max_batch_size(self) -> int | None:
        """Return a batch size that fits while the next larger one does not; 0: none fits; None: no budget."""
        if self.budget_mib is None:
            return None
        scenario = self._workspaces[-1]  # usually the first to fail
        limit = self.batch_size_limit
        guess = min(max(self._guess_max_batch_size(), 1), limit)
        while size := find_max_batch_size(partial(self._fits, scenario), limit, guess):
            failed = next((each for each in self._workspaces if not self._fits(each, size)), None)
            if failed is None:
                break
            scenario, limit, guess = failed, size - 1, size - 1
            if not limit:
                return 0
        return size

    def _fits(self, workspaces: Workspaces, batch_size: int) -> bool:
        """Return whether a batch size fits with these workspaces."""
        assert self.budget_mib is not None
        available_mib = allocator_limits(self.config.gpu, self.budget_mib)[0]
        return self.cache.fits(batch_size, workspaces, available_mib)

    def _guess_max_batch_size(self) -> int:
        """Return an estimate of the maximum batch size, as memory is almost linear in the batch size."""
        assert self.budget_mib is not None
        small = min(32, self.split_sizes["train"])
        one, two = (self.cache.traces.trace_or_interpolate(size) for size in (small, 2 * small))
        mib_per_image = (_activations_mib(two) - _activations_mib(one)) / small
        if mib_per_image <= 0:
            return small
        allocator_mib = self.budget_mib.min - self.config.gpu.context_mib.max
        size = small
        for _ in range(2):  # workspaces grow with the batch size
            workspace_mib = self._workspaces[-1].max_mib(self.cache.traces.trace_or_interpolate(size))
            free_mib = (allocator_mib - workspace_mib) * 0.95
            free_mib -= _state_mib(one) + one.resident_bytes / MIB + _activations_mib(one)
            size = min(max(int(free_mib / mib_per_image) + small, 1), self.batch_size_limit)
        return size


def with_batch_size(config: Config, batch_size: int) -> Config:
    """Return the config with this batch size, and without micro-batches if they are as large."""
    micro = config.train.micro_batch_size
    micro = None if micro is None or micro >= batch_size else micro
    return replace(config, train=replace(config.train, batch_size=batch_size, micro_batch_size=micro))


def memory_budget(config: Config, total_mib: float | None = None) -> MiBRange | None:
    """Return the memory available to the process; None if unknown.

    This is the budget of the config if the GPU has that much, else the memory that other programs leave.
    """
    requested, gpu = config.device.vram_budget_mib, config.gpu
    if gpu.total_mib is not None:
        min_total, max_total = gpu.total_mib.min, gpu.total_mib.max
    elif total_mib is not None:
        min_total = max_total = total_mib
    else:
        return None if requested is None else MiBRange(requested, requested)
    if requested is not None and requested <= max_total:
        return MiBRange(requested, requested)
    return MiBRange(
        max(0.0, min_total - gpu.other_processes_mib.max), max(0.0, max_total - gpu.other_processes_mib.min)
    )


def allocator_limits(gpu: GpuSpec, budget_mib: MiBRange) -> tuple[float, float]:
    """Return the MiB left to the allocator in the worst and in the best case of the bounds."""
    tight_mib = (budget_mib.min - gpu.context_mib.max) / (1 + ERROR_MARGIN)
    return tight_mib, (budget_mib.max - gpu.context_mib.min) / (1 - ERROR_MARGIN)


def classify_fit(fits_at_max: bool, fits_at_min: bool) -> Fits:
    """Return the verdict, given whether it fits with the bounds at their maximum and at their minimum."""
    if fits_at_max:
        return "fits"
    return "unsure" if fits_at_min else "does not fit"


def _make_plan(replayer: TraceReplayer, gpu: GpuSpec, batch_size: int, budget_mib: MiBRange | None) -> Plan:
    traced, context, workspaces = replayer.trace, gpu.context_mib, workspace_scenarios(gpu)
    limits: list[float | None] = [None]
    if budget_mib is not None:
        # At a limit the allocator flushes its cache before it fails: a run may need less than it uses when
        # memory is plentiful.
        limits = [*allocator_limits(gpu, budget_mib), None]
    peaks, limit_indices = [], []
    for each in workspaces:
        replays = ((limit, replayer.peaks(each, limit)) for limit in limits)
        limit, first = next((limit, result) for limit, result in replays if result is not None)
        peaks.append(first)
        limit_indices.append(limits.index(limit))
    fits = None if budget_mib is None else classify_fit(max(limit_indices) == 0, min(limit_indices) < 2)
    reserved = peak_range(peaks, "reserved_bytes")
    return Plan(
        batch_size=batch_size,
        tensors_mib=(traced.peak_bytes("step") - traced.resident_bytes) / MIB,
        state_mib=_state_mib(traced),
        activations_mib=_activations_mib(traced),
        images_mib=traced.resident_bytes / MIB,
        workspace_mib=MiBRange(workspaces[0].max_mib(traced), workspaces[-1].max_mib(traced)),
        training=_make_peak(peaks, _is_training),
        evaluation=_make_peak(peaks, _is_evaluation),
        reserved_mib=reserved,
        process_mib=MiBRange(
            context.min + reserved.min * (1 - ERROR_MARGIN), context.max + reserved.max * (1 + ERROR_MARGIN)
        ),
        budget_mib=budget_mib,
        fits=fits,
    )


def _state_mib(traced: Trace) -> float:
    return (traced.parameters_bytes + traced.buffers_bytes + traced.optimizer_bytes) / MIB


def _activations_mib(traced: Trace) -> float:
    """Return the tensors of a step without the state and the images that stay on the device."""
    tensors_bytes = traced.peak_bytes("step") - traced.resident_bytes
    return (tensors_bytes - traced.parameters_bytes - traced.buffers_bytes - traced.optimizer_bytes) / MIB


def _is_training(phase: str) -> bool:
    return phase.startswith("epoch") and not phase.endswith("evaluation")


def _is_evaluation(phase: str) -> bool:
    return phase.startswith("epoch") and phase.endswith("evaluation")


def _make_peak(replays: Sequence[PhasePeaks], is_included: Callable[[str], bool]) -> Peak:
    """Return the peak over the included phases."""
    replays = [{name: usage for name, usage in peaks.items() if is_included(name)} for peaks in replays]
    return Peak(peak_range(replays, "allocated_bytes"), peak_range(replays, "reserved_bytes"))
