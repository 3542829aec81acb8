"""Predict whether training fits a GPU, for a config and a batch size.

    process = context + memory that torch's allocator reserves for (tensors + workspaces)

Tensors come from a trace of the training (`trace`), reserved memory from a model of the allocator
(`allocator`). Context and workspaces cannot be traced: the GPU's file has bounds for them, so the prediction
is a range. A batch *fits* if it does with every bound at its maximum, and *does not fit* if it does not with
every bound at its minimum. Otherwise the verdict is *unsure*, which is treated as *does not fit*.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Annotated, Any

from pydantic import Field, with_config

from captcha_exp.config import Config, GpuSpec
from captcha_exp.config.gpu import STRICT
from captcha_exp.memory.allocator import MIB
from captcha_exp.memory.interval import Fits, MiB, MiBRange, described
from captcha_exp.memory.replay import (
    PhasePeaks,
    Scenario,
    list_scenarios,
    peak_range,
    replay_trace,
)
from captcha_exp.memory.trace import Trace, trace
from captcha_exp.memory.trace_cache import TraceCache

# Of the reserved memory: the largest error of a trace (tests/memory/test_trace.py), with some margin.
ERROR_MARGIN = 0.02
MAX_MICRO_BATCHES = 16  # micro-batches per step in the search for the maximum batch size


@with_config(STRICT)
@dataclass(frozen=True)
class Peak:
    """The largest memory use of the training steps, or of the evaluations."""

    allocated_mib: Annotated[MiBRange, described("torch.cuda.max_memory_allocated")]
    reserved_mib: Annotated[MiBRange, described("torch.cuda.max_memory_reserved")]


@with_config(STRICT)
@dataclass(frozen=True)
class Plan:
    """The predicted memory of a batch size, and whether it fits."""

    batch_size: Annotated[int, Field(ge=1), described("images of a training step")]
    tensors_mib: Annotated[MiB, described("tensors of a training step, without resident images")]
    state_mib: Annotated[MiB, described("of these, weights, batch norm statistics, optimizer state")]
    activations_mib: Annotated[MiB, described("of these, the rest: activations, gradients, the batch")]
    images_mib: Annotated[MiB, described("images that stay on the device for the whole training")]
    workspace_mib: Annotated[MiBRange, described("memory of cuBLAS and cuDNN in use at one time, at most")]
    training: Annotated[Peak, described("peak of the training steps")]
    evaluation: Annotated[Peak, described("peak of the evaluations")]
    reserved_mib: Annotated[MiBRange, described("memory that torch's allocator reserves over the whole run")]
    process_mib: Annotated[MiBRange, described("memory of the process: CUDA context and reserved memory")]
    budget_mib: Annotated[MiBRange | None, described("memory available to the process; null: unknown")]
    fits: Annotated[Fits | None, described("the verdict; treat unsure as does not fit; null: unknown")]

    @property
    def is_evaluation_peak(self) -> bool:
        """Return whether a smaller evaluation batch would lower the peak."""
        return self.evaluation.allocated_mib.max > self.training.allocated_mib.max

    def describe(self, gpu_name: str) -> str:
        """Return the plan in one line."""
        text = f"predicted {self.process_mib} MiB on {gpu_name} (tensors {self.tensors_mib:,.0f} MiB)"
        return text if self.budget_mib is None else f"{text}, budget {self.budget_mib} MiB: {self.fits}"

    def prediction_error_metrics(self, measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return metrics of the prediction and of its error, from the measured metrics of each epoch.

        An error is relative to the measured value: 0 within the bounds, above 0 if predicted too high.
        """

        def peak_of(key: str) -> float:
            return max((row[key] for row in measured if key in row), default=0.0)

        errors = {}
        for kind, peak in (("train", self.training), ("eval", self.evaluation)):
            for field, bounds in (("allocated", peak.allocated_mib), ("reserved", peak.reserved_mib)):
                if measured_mib := peak_of(f"memory/{kind}_peak_{field}_mib"):
                    errors[f"memory/{kind}_peak_{field}_error"] = bounds.relative_error(measured_mib)
        if errors:
            process_mib = peak_of("memory/process_peak_mib")
            errors["memory/process_peak_error"] = self.process_mib.relative_error(process_mib)
        return {
            "memory/predicted_peak_min_mib": self.process_mib.min,
            "memory/predicted_peak_mib": self.process_mib.max,
        } | errors

    def to_json(self) -> dict[str, Any]:
        """Return values that `json` can write; a range is a list of two."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Plan":
        """Return the plan with these values, those of `to_json` after a round trip through `json`."""

        def restore(value: Any) -> Any:
            match value:
                case [low, high]:
                    return MiBRange(low, high)
                case {}:
                    return Peak(**{name: restore(each) for name, each in value.items()})
            return value

        return Plan(**{name: restore(value) for name, value in values.items()})


class PlannerCache:
    """Traces and replays for planners whose configs differ only in the GPU or the budget."""

    def __init__(self, config: Config, split_sizes: Mapping[str, int]) -> None:
        def trace_batch(batch_size: int) -> Trace:
            return trace(with_batch_size(config, batch_size), batch_size, split_sizes)

        def fits(batch_size: int, scenario: Scenario, available_mib: float) -> bool:
            traced = self.traces.trace_or_interpolate(batch_size)
            return replay_trace(traced, scenario, available_mib) is not None

        self.traces = TraceCache(trace_batch, split_sizes["train"], config.train.micro_batch_size is not None)
        self.fits = cache(fits)  # GPUs with equal figures share the result


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
        self.budget_mib = memory_budget(config.gpu, config.device.vram_budget_mib, total_mib)
        self.cache = cache or PlannerCache(config, split_sizes)
        micro, limit = config.train.micro_batch_size, split_sizes["train"]
        # Each micro-batch is traced: their number hardly changes memory, but the time of the trace.
        self.batch_size_limit = min(limit, MAX_MICRO_BATCHES * micro) if micro else limit
        self._scenarios = list_scenarios(config.gpu)

    def plan_for(self, batch_size: int) -> Plan:
        """Return the plan for a batch size."""
        traced = self.cache.traces.trace(batch_size)
        return make_plan(traced, self.config.gpu, batch_size, self.budget_mib)

    def max_batch_plan(self) -> Plan | None:
        """Return the plan of the maximum batch size; None if no batch fits.

        It is at most `batch_size_limit`: the whole training split, or MAX_MICRO_BATCHES micro-batches.
        """
        return self.plan_for(batch_size) if (batch_size := self.max_batch_size()) else None

    def max_batch_size(self) -> int | None:
        """Return a batch size that fits while the next larger one does not; 0: none fits; None: no budget."""
        if self.budget_mib is None:
            return None
        scenario = self._scenarios[-1]  # usually the first to fail
        limit = self.batch_size_limit
        guess = min(max(self._guess_max_batch_size(), 1), limit)
        while size := _find_max_batch_size(partial(self._fits, scenario), limit, guess):
            failed = next((each for each in self._scenarios if not self._fits(each, size)), None)
            if failed is None:
                break
            scenario, limit, guess = failed, size - 1, size - 1
        return size

    def _fits(self, scenario: Scenario, batch_size: int) -> bool:
        """Return whether a batch size fits in this scenario."""
        assert self.budget_mib is not None
        available_mib = allocator_limits(self.config.gpu, self.budget_mib)[0]
        return self.cache.fits(batch_size, scenario, available_mib)

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
            traced = self.cache.traces.trace_or_interpolate(size)
            workspace_mib = self._scenarios[-1].max_workspace_mib(traced)
            free_mib = (allocator_mib - workspace_mib) * 0.95
            free_mib -= one.state_bytes / MIB + one.resident_bytes / MIB + _activations_mib(one)
            size = min(max(int(free_mib / mib_per_image) + small, 1), self.batch_size_limit)
        return size


def _find_max_batch_size(fits: Callable[[int], bool], limit: int, guess: int) -> int:
    """Return a batch size up to `limit` that fits while the next larger one does not; 0 if none fits.

    Fitting need not be monotonic: a batch may fit while a smaller one does not, due to fragmentation. The
    result then depends on `guess`.
    """
    low, high = 0, limit + 1  # low fits, high does not
    batch = guess
    stride = batch // 32 + 1
    while high - low > 1:
        batch = min(max(batch, low + 1), high - 1)
        low, high = (batch, high) if fits(batch) else (low, batch)
        if low == 0 or high > limit:  # one end is still open
            batch = low + stride if high > limit else high - stride
            stride *= 2
        else:
            batch = (low + high) // 2
    return low


def with_batch_size(config: Config, batch_size: int) -> Config:
    """Return the config with this batch size, and without micro-batches if they are as large."""
    micro = config.train.micro_batch_size
    micro = None if micro is None or micro >= batch_size else micro
    return replace(config, train=replace(config.train, batch_size=batch_size, micro_batch_size=micro))


def memory_budget(
    gpu: GpuSpec, requested_mib: float | None, total_mib: float | None = None
) -> MiBRange | None:
    """Return the memory available to the process; None if unknown.

    This is the requested memory if the GPU has that much, else the memory that other programs leave.
    `total_mib` is the memory of the device in use, for a GPU file without a size.
    """
    total = None if total_mib is None else MiBRange(total_mib, total_mib)
    if gpu.total_mib is not None:
        total = MiBRange(gpu.total_mib.min, gpu.total_mib.max)
    if requested_mib is not None and (total is None or requested_mib <= total.max):
        return MiBRange(requested_mib, requested_mib)
    if total is None:
        return None
    others = gpu.other_processes_mib
    return MiBRange(max(0.0, total.min - others.max), max(0.0, total.max - others.min))


def allocator_limits(gpu: GpuSpec, budget_mib: MiBRange) -> tuple[float, float]:
    """Return the MiB left to the allocator in the worst and in the best case of the bounds."""
    tight_mib = (budget_mib.min - gpu.context_mib.max) / (1 + ERROR_MARGIN)
    return tight_mib, (budget_mib.max - gpu.context_mib.min) / (1 - ERROR_MARGIN)


def make_plan(traced: Trace, gpu: GpuSpec, batch_size: int, budget_mib: MiBRange | None) -> Plan:
    """Return the plan for the trace of a batch size."""
    context, scenarios = gpu.context_mib, list_scenarios(gpu)
    # At a limit the allocator flushes its cache before it fails: a run may need less than it uses when memory
    # is plentiful.
    limits = [None] if budget_mib is None else [*allocator_limits(gpu, budget_mib), None]

    def replay(scenario: Scenario) -> tuple[int, PhasePeaks]:
        """Return the index of the first limit that suffices, and the peaks."""
        replays = ((index, replay_trace(traced, scenario, limit)) for index, limit in enumerate(limits))
        return next((index, peaks) for index, peaks in replays if peaks is not None)

    indices, replays = zip(*map(replay, scenarios), strict=True)
    fits: Fits | None = None
    if budget_mib is not None:
        fits = "fits" if max(indices) == 0 else "unsure" if min(indices) < 2 else "does not fit"
    reserved = peak_range(replays, "reserved_bytes")
    smallest, largest = (scenario.max_workspace_mib(traced) for scenario in (scenarios[0], scenarios[-1]))
    return Plan(
        batch_size=batch_size,
        tensors_mib=(traced.peak_bytes("step") - traced.resident_bytes) / MIB,
        state_mib=traced.state_bytes / MIB,
        activations_mib=_activations_mib(traced),
        images_mib=traced.resident_bytes / MIB,
        workspace_mib=MiBRange(smallest, largest),
        training=_epoch_peak(replays, evaluation=False),
        evaluation=_epoch_peak(replays, evaluation=True),
        reserved_mib=reserved,
        process_mib=MiBRange(
            context.min + reserved.min * (1 - ERROR_MARGIN), context.max + reserved.max * (1 + ERROR_MARGIN)
        ),
        budget_mib=budget_mib,
        fits=fits,
    )


def _activations_mib(traced: Trace) -> float:
    """Return the tensors of a step without the state and the images that stay on the device."""
    return (traced.peak_bytes("step") - traced.resident_bytes - traced.state_bytes) / MIB


def _epoch_peak(replays: Sequence[PhasePeaks], evaluation: bool) -> Peak:
    """Return the peak over the evaluations of all epochs, or over everything else in them."""
    selected = [
        {
            phase: usage
            for phase, usage in peaks.items()
            if phase.startswith("epoch") and phase.endswith("evaluation") == evaluation
        }
        for peaks in replays
    ]
    return Peak(peak_range(selected, "allocated_bytes"), peak_range(selected, "reserved_bytes"))
