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

from captcha_exp.config import Card, Config
from captcha_exp.memory.allocator import MIB
from captcha_exp.memory.interval import Between, Fits
from captcha_exp.memory.replay import Peaks, Plays, bounds_of, expandable_segments, play
from captcha_exp.memory.search import largest_that
from captcha_exp.memory.trace import Trace, trace
from captcha_exp.memory.traces import Traces
from captcha_exp.memory.workspaces import Workspaces, workspaces_of

ERROR = 0.02  # of what is reserved: the largest error of a trace (tests/memory/test_trace.py), and a margin
MAX_PASSES = 16  # micro-batches of a step up to which the largest batch is searched


class Peak(NamedTuple):
    """The peak of one kind of work: what torch.cuda.max_memory_allocated and _reserved would say."""

    allocated_mib: Between
    reserved_mib: Between


@dataclass(frozen=True)
class Plan:
    """What a batch size needs, and whether there is room for it."""

    batch_size: int
    tensors_mib: float  # of a training step, without the pictures that live on the device
    state_mib: float  # of them weights, statistics, the optimiser's state
    activations_mib: float  # of them all others at the peak: activations, gradients, the batch
    pictures_mib: float  # what lives on the device from the first step to the last
    workspace_mib: Between  # at most at one time
    training: Peak
    evaluation: Peak
    reserved_mib: Between  # over the whole run
    process_mib: Between
    budget_mib: Between | None  # what there is for the process; None: unknown
    fits: Fits | None

    @property
    def evaluation_is_the_peak(self) -> bool:
        """Whether a smaller evaluation batch would need less."""
        return self.evaluation.allocated_mib.most > self.training.allocated_mib.most

    def words(self, card: str) -> str:
        """The plan in one line."""
        text = f"a batch of {self.batch_size:,} has {self.tensors_mib:,.0f} MiB of tensors"
        if self.budget_mib is None:
            return f"{text} and takes {self.process_mib} MiB on {card}"
        return f"{text} and takes {self.process_mib} of {self.budget_mib} MiB on {card}: {self.fits}"

    def beside(self, measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Metrics: what was foretold, and how far what was measured in each epoch lies outside of it.

        An error is a share of what was measured: 0 within the bounds, above 0 where too much was foretold.
        """
        found = {
            "memory/predicted_peak_least_mib": self.process_mib.least,
            "memory/predicted_peak_mib": self.process_mib.most,
        }
        on_card = False
        for kind, peak in (("train", self.training), ("eval", self.evaluation)):
            for what, bounds in (("allocated", peak.allocated_mib), ("reserved", peak.reserved_mib)):
                key = f"memory/{kind}_peak_{what}_mib"
                if seen := max((row[key] for row in measured if key in row), default=0.0):
                    found[f"memory/{kind}_peak_{what}_error"] = bounds.error(seen)
                    on_card = True
        seen = max((row.get("memory/process_peak_mib", 0.0) for row in measured), default=0.0)
        return found | ({"memory/process_peak_error": self.process_mib.error(seen)} if on_card else {})

    def to_json(self) -> dict[str, Any]:
        """Plain values; an interval is a list of two."""
        values = asdict(self)
        for kind in ("training", "evaluation"):
            values[kind] = getattr(self, kind)._asdict()
        return values


class Shared:
    """What planners share whose configs differ in the GPU or the budget alone: no trace depends on those."""

    def __init__(self, config: Config, pictures: Mapping[str, int]) -> None:
        def traced(batch_size: int) -> Trace:
            return trace(with_batch(config, batch_size), batch_size, pictures)

        self.traces = Traces(traced, pictures["train"], config.train.micro_batch_size is not None)
        self._plays: dict[int, Plays] = {}
        self._fitting: dict[tuple[int, Workspaces, float, bool], bool] = {}

    def plays(self, batch_size: int) -> Plays:
        """Return the plays of the traced batch size, whose peaks without a limit are kept."""
        if batch_size not in self._plays:
            self._plays[batch_size] = Plays(self.traces.at(batch_size))
        return self._plays[batch_size]

    def fits(self, batch_size: int, workspaces: Workspaces, room_mib: float) -> bool:
        """Return whether the allocator has room; GPUs with equal figures share the answer."""
        key = batch_size, workspaces, room_mib, expandable_segments()
        if key not in self._fitting:
            traced = self.traces.near(batch_size)
            self._fitting[key] = play(traced, workspaces, room_mib) is not None
        return self._fitting[key]


class Planner:
    """Plans of one resolved config, for so many pictures of each split."""

    def __init__(
        self,
        config: Config,
        pictures: Mapping[str, int],
        total_mib: float | None = None,
        shared: Shared | None = None,
    ) -> None:
        """`total_mib` is what the device at hand has, if it is one that the card's file leaves open."""
        self.config = config
        self.pictures = dict(pictures)
        self.budget_mib = budget(config, total_mib)
        self.shared = shared or Shared(config, pictures)
        micro = config.train.micro_batch_size
        # Passes repeat, and each is traced: memory hardly grows with their number, but time does.
        self.max_batch = min(pictures["train"], MAX_PASSES * micro) if micro else pictures["train"]
        self._known: dict[int, Plan] = {}
        self._workspaces = workspaces_of(config.card)

    def at(self, batch_size: int) -> Plan:
        """The plan of a batch size."""
        if batch_size not in self._known:
            plays = self.shared.plays(batch_size)
            self._known[batch_size] = _plan(plays, self.config.card, batch_size, self.budget_mib)
        return self._known[batch_size]

    def largest(self) -> Plan | None:
        """The plan of a batch that fits where one more picture would not; None if no batch does.

        At most `max_batch`: the whole training split, or MAX_PASSES micro-batches.
        """
        batch_size = self.largest_batch()
        return self.at(batch_size) if batch_size else None

    def largest_batch(self) -> int | None:
        """Return the batch size of `largest` without its plan: 0 if none fits; None without a budget."""
        if self.budget_mib is None:
            return None
        pilot = self._workspaces[-1]  # as a rule those that fail first
        most = self.max_batch
        guess = min(max(self._guess(), 1), most)
        while found := largest_that(partial(self._fits, pilot), most, guess):
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
        room_mib = limits(self.config.card, self.budget_mib)[0]
        return self.shared.fits(batch_size, workspaces, room_mib)

    def _guess(self) -> int:
        """A batch size near the largest: what is needed grows almost in a straight line."""
        assert self.budget_mib is not None
        few = min(32, self.pictures["train"])
        one, two = (self.shared.traces.near(size) for size in (few, 2 * few))
        each = (_activations_mib(two) - _activations_mib(one)) / few
        if each <= 0:
            return few
        free = self.budget_mib.least - self.config.card.context_mib.most
        size = few
        for _ in range(2):  # workspaces grow with the batch
            room = (free - self._workspaces[-1].most_mib(self.shared.traces.near(size))) * 0.95
            room -= _state_mib(one) + one.resident_bytes / MIB + _activations_mib(one)
            size = min(max(int(room / each) + few, 1), self.max_batch)
        return size


def with_batch(config: Config, batch_size: int) -> Config:
    """The config with this batch size; a micro-batch is at most all of it."""
    micro = config.train.micro_batch_size
    micro = None if micro is None or micro >= batch_size else micro
    return replace(config, train=replace(config.train, batch_size=batch_size, micro_batch_size=micro))


def budget(config: Config, total_mib: float | None = None) -> Between | None:
    """What the process may take: the budget of the config, if the card has so much, else what others leave.

    None where nobody says.
    """
    asked, card = config.device.vram_budget_mib, config.card
    if card.total_mib is not None:
        least, most = card.total_mib.least, card.total_mib.most
    elif total_mib is not None:
        least = most = total_mib
    else:
        return None if asked is None else Between(asked, asked)
    if asked is not None and asked <= most:
        return Between(asked, asked)
    return Between(max(0.0, least - card.others_mib.most), max(0.0, most - card.others_mib.least))


def limits(card: Card, budget_mib: Between) -> tuple[float, float]:
    """Return the MiB that the allocator has with all that is against it at its most, and at its least."""
    tight_mib = (budget_mib.least - card.context_mib.most) / (1 + ERROR)
    return tight_mib, (budget_mib.most - card.context_mib.least) / (1 - ERROR)


def verdict(fits_at_most: bool, fits_at_least: bool) -> Fits:
    """Return the verdict from whether it fits with the bounds at their most, and at their least."""
    if fits_at_most:
        return "fits"
    return "unsure" if fits_at_least else "does not fit"


def _plan(plays: Plays, card: Card, batch_size: int, budget_mib: Between | None) -> Plan:
    traced, context, workspaces = plays.traced, card.context_mib, workspaces_of(card)
    tried: list[float | None] = [None]
    if budget_mib is not None:
        # At a limit the allocator gives its cache back before it gives up: a run may need less than it takes
        # where there is plenty.
        tried = [*limits(card, budget_mib), None]
    peaks, within = [], []
    for each in workspaces:
        played = ((limit, plays.peaks(each, limit)) for limit in tried)
        limit, found = next((limit, found) for limit, found in played if found is not None)
        peaks.append(found)
        within.append(tried.index(limit))
    fits = None if budget_mib is None else verdict(max(within) == 0, min(within) < 2)
    reserved = bounds_of(peaks, "reserved_bytes")
    return Plan(
        batch_size=batch_size,
        tensors_mib=(traced.peak_bytes("step") - traced.resident_bytes) / MIB,
        state_mib=_state_mib(traced),
        activations_mib=_activations_mib(traced),
        pictures_mib=traced.resident_bytes / MIB,
        workspace_mib=Between(workspaces[0].most_mib(traced), workspaces[-1].most_mib(traced)),
        training=_peak(peaks, _is_training),
        evaluation=_peak(peaks, _is_evaluation),
        reserved_mib=reserved,
        process_mib=Between(
            context.least + reserved.least * (1 - ERROR), context.most + reserved.most * (1 + ERROR)
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


def _peak(played: Sequence[Peaks], chosen: Callable[[str], bool]) -> Peak:
    """The peak of the chosen phases."""
    played = [{name: usage for name, usage in peaks.items() if chosen(name)} for peaks in played]
    return Peak(bounds_of(played, "allocated_bytes"), bounds_of(played, "reserved_bytes"))
