"""Whether a training fits a graphics card, for a config and a batch size.

    process = context + what torch's allocator reserves for (tensors + workspaces)

Tensors come from a trace of the training itself (`trace`), what is reserved for them from a model of the
allocator (`allocator`). Context and workspaces no tensor shows: they are intervals of the card's file, and so
the answer is one. A batch *fits* if it does with all that is against it at its most, it *does not fit* if it
does not with all at its least, and between the two it is *unsure*, which counts as no.
"""

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

ERROR_MARGIN = (
    0.02  # of what is reserved: the largest error of a trace (tests/memory/test_trace.py), and a margin
)
MAX_MICRO_BATCHES = 16  # micro-batches of a step up to which the largest batch is searched


class Peak(NamedTuple):
    """The peak of one kind of work: what torch.cuda.max_memory_allocated and _reserved would say."""

    allocated_mib: MiBRange
    reserved_mib: MiBRange


@dataclass(frozen=True)
class Plan:
    """What a batch size needs, and whether there is room for it."""

    batch_size: int
    tensors_mib: float  # of a training step, without the pictures that live on the device
    state_mib: float  # of them weights, statistics, the optimiser's state
    activations_mib: float  # of them all others at the peak: activations, gradients, the batch
    images_mib: float  # what lives on the device from the first step to the last
    workspace_mib: MiBRange  # at most at one time
    training: Peak
    evaluation: Peak
    reserved_mib: MiBRange  # over the whole run
    process_mib: MiBRange
    budget_mib: MiBRange | None  # what there is for the process; None: unknown
    fits: Fits | None

    @property
    def is_evaluation_peak(self) -> bool:
        """Whether a smaller evaluation batch would need less."""
        return self.evaluation.allocated_mib.max > self.training.allocated_mib.max

    def describe(self, gpu_name: str) -> str:
        """The plan in one line."""
        text = f"a batch of {self.batch_size:,} has {self.tensors_mib:,.0f} MiB of tensors"
        if self.budget_mib is None:
            return f"{text} and takes {self.process_mib} MiB on {gpu_name}"
        return f"{text} and takes {self.process_mib} of {self.budget_mib} MiB on {gpu_name}: {self.fits}"

    def prediction_error_metrics(self, measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics: what was foretold, and how far what was measured in each epoch lies outside of it.

        An error is a share of what was measured: 0 within the bounds, above 0 where too much was foretold.
        """
        found = {
            "memory/predicted_peak_min_mib": self.process_mib.min,
            "memory/predicted_peak_mib": self.process_mib.max,
        }
        on_card = False
        for kind, peak in (("train", self.training), ("eval", self.evaluation)):
            for what, bounds in (("allocated", peak.allocated_mib), ("reserved", peak.reserved_mib)):
                key = f"memory/{kind}_peak_{what}_mib"
                if seen := max((row[key] for row in measured if key in row), default=0.0):
                    found[f"memory/{kind}_peak_{what}_error"] = bounds.relative_error(seen)
                    on_card = True
        seen = max((row.get("memory/process_peak_mib", 0.0) for row in measured), default=0.0)
        return found | (
            {"memory/process_peak_error": self.process_mib.relative_error(seen)} if on_card else {}
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; an interval is a list of two."""
        values = asdict(self)
        for kind in ("training", "evaluation"):
            values[kind] = getattr(self, kind)._asdict()
        return values


class PlannerCache:
    """What planners share whose configs differ in the GPU or the budget alone: no trace depends on those."""

    def __init__(self, config: Config, split_sizes: Mapping[str, int]) -> None:
        def traced(batch_size: int) -> Trace:
            return trace(with_batch_size(config, batch_size), batch_size, split_sizes)

        self.traces = TraceCache(traced, split_sizes["train"], config.train.micro_batch_size is not None)
        self._replayers: dict[int, TraceReplayer] = {}
        self._fits_cache: dict[tuple[int, Workspaces, float, bool], bool] = {}

    def replayer_for(self, batch_size: int) -> TraceReplayer:
        """Return the plays of the traced batch size, whose peaks without a limit are kept."""
        if batch_size not in self._replayers:
            self._replayers[batch_size] = TraceReplayer(self.traces.trace(batch_size))
        return self._replayers[batch_size]

    def fits(self, batch_size: int, workspaces: Workspaces, available_mib: float) -> bool:
        """Return whether the allocator has room; GPUs with equal figures share the answer."""
        key = batch_size, workspaces, available_mib, uses_expandable_segments()
        if key not in self._fits_cache:
            traced = self.traces.trace_or_interpolate(batch_size)
            self._fits_cache[key] = replay_trace(traced, workspaces, available_mib) is not None
        return self._fits_cache[key]


class Planner:
    """Plans of one resolved config, for so many pictures of each split."""

    def __init__(
        self,
        config: Config,
        split_sizes: Mapping[str, int],
        total_mib: float | None = None,
        cache: PlannerCache | None = None,
    ) -> None:
        """`total_mib` is what the device at hand has, if it is one that the card's file leaves open."""
        self.config = config
        self.split_sizes = dict(split_sizes)
        self.budget_mib = memory_budget(config, total_mib)
        self.cache = cache or PlannerCache(config, split_sizes)
        micro = config.train.micro_batch_size
        # Passes repeat, and each is traced: memory hardly grows with their number, but time does.
        self.batch_size_limit = (
            min(split_sizes["train"], MAX_MICRO_BATCHES * micro) if micro else split_sizes["train"]
        )
        self._plans: dict[int, Plan] = {}
        self._workspaces = workspace_scenarios(config.gpu)

    def plan_for(self, batch_size: int) -> Plan:
        """The plan of a batch size."""
        if batch_size not in self._plans:
            plays = self.cache.replayer_for(batch_size)
            self._plans[batch_size] = _make_plan(plays, self.config.gpu, batch_size, self.budget_mib)
        return self._plans[batch_size]

    def max_batch_plan(self) -> Plan | None:
        """The plan of a batch that fits where one more picture would not; None if no batch does.

        At most `max_batch`: the whole training split, or MAX_PASSES micro-batches.
        """
        batch_size = self.max_batch_size()
        return self.plan_for(batch_size) if batch_size else None

    def max_batch_size(self) -> int | None:
        """Return the batch size of `largest` without its plan: 0 if none fits; None without a budget."""
        if self.budget_mib is None:
            return None
        pilot = self._workspaces[-1]  # as a rule those that fail first
        most = self.batch_size_limit
        guess = min(max(self._guess_max_batch_size(), 1), most)
        while found := find_max_batch_size(partial(self._fits, pilot), most, guess):
            failed = next((each for each in self._workspaces if not self._fits(each, found)), None)
            if failed is None:
                break
            pilot, most, guess = failed, found - 1, found - 1
            if not most:
                return 0
        return found

    def _fits(self, workspaces: Workspaces, batch_size: int) -> bool:
        """Return whether it fits with these workspaces, as it must with all."""
        assert self.budget_mib is not None
        room_mib = allocator_limits(self.config.gpu, self.budget_mib)[0]
        return self.cache.fits(batch_size, workspaces, room_mib)

    def _guess_max_batch_size(self) -> int:
        """A batch size near the largest: what is needed grows almost in a straight line."""
        assert self.budget_mib is not None
        few = min(32, self.split_sizes["train"])
        one, two = (self.cache.traces.trace_or_interpolate(size) for size in (few, 2 * few))
        each = (_activations_mib(two) - _activations_mib(one)) / few
        if each <= 0:
            return few
        free = self.budget_mib.min - self.config.gpu.context_mib.max
        size = few
        for _ in range(2):  # workspaces grow with the batch
            room = (free - self._workspaces[-1].max_mib(self.cache.traces.trace_or_interpolate(size))) * 0.95
            room -= _state_mib(one) + one.resident_bytes / MIB + _activations_mib(one)
            size = min(max(int(room / each) + few, 1), self.batch_size_limit)
        return size


def with_batch_size(config: Config, batch_size: int) -> Config:
    """The config with this batch size; a micro-batch is at most all of it."""
    micro = config.train.micro_batch_size
    micro = None if micro is None or micro >= batch_size else micro
    return replace(config, train=replace(config.train, batch_size=batch_size, micro_batch_size=micro))


def memory_budget(config: Config, total_mib: float | None = None) -> MiBRange | None:
    """What the process may take: the budget of the config, if the card has so much, else what others leave.

    None where nobody says.
    """
    asked, gpu = config.device.vram_budget_mib, config.gpu
    if gpu.total_mib is not None:
        least, most = gpu.total_mib.min, gpu.total_mib.max
    elif total_mib is not None:
        least = most = total_mib
    else:
        return None if asked is None else MiBRange(asked, asked)
    if asked is not None and asked <= most:
        return MiBRange(asked, asked)
    return MiBRange(
        max(0.0, least - gpu.other_processes_mib.max), max(0.0, most - gpu.other_processes_mib.min)
    )


def allocator_limits(gpu: GpuSpec, budget_mib: MiBRange) -> tuple[float, float]:
    """Return the MiB that the allocator has with all that is against it at its most, and at its least."""
    tight_mib = (budget_mib.min - gpu.context_mib.max) / (1 + ERROR_MARGIN)
    return tight_mib, (budget_mib.max - gpu.context_mib.min) / (1 - ERROR_MARGIN)


def classify_fit(fits_at_max: bool, fits_at_min: bool) -> Fits:
    """Return the verdict from whether it fits with the bounds at their most, and at their least."""
    if fits_at_max:
        return "fits"
    return "unsure" if fits_at_min else "does not fit"


def _make_plan(replayer: TraceReplayer, gpu: GpuSpec, batch_size: int, budget_mib: MiBRange | None) -> Plan:
    traced, context, workspaces = replayer.trace, gpu.context_mib, workspace_scenarios(gpu)
    tried: list[float | None] = [None]
    if budget_mib is not None:
        # At a limit the allocator gives its cache back before it gives up: a run may need less than it takes
        # where there is plenty.
        tried = [*allocator_limits(gpu, budget_mib), None]
    peaks, within = [], []
    for each in workspaces:
        played = ((limit, replayer.peaks(each, limit)) for limit in tried)
        limit, found = next((limit, found) for limit, found in played if found is not None)
        peaks.append(found)
        within.append(tried.index(limit))
    fits = None if budget_mib is None else classify_fit(max(within) == 0, min(within) < 2)
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
    """Return all tensors of a step but the state and the pictures that live on the device."""
    tensors_bytes = traced.peak_bytes("step") - traced.resident_bytes
    return (tensors_bytes - traced.parameters_bytes - traced.buffers_bytes - traced.optimizer_bytes) / MIB


def _is_training(phase: str) -> bool:
    return phase.startswith("epoch") and not phase.endswith("evaluation")


def _is_evaluation(phase: str) -> bool:
    return phase.startswith("epoch") and phase.endswith("evaluation")


def _make_peak(replays: Sequence[PhasePeaks], is_included: Callable[[str], bool]) -> Peak:
    """The peak of the chosen phases."""
    replays = [{name: usage for name, usage in peaks.items() if is_included(name)} for peaks in replays]
    return Peak(peak_range(replays, "allocated_bytes"), peak_range(replays, "reserved_bytes"))
