"""What the points of a sweep will need, told before the first one starts; and those that are not trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captcha_exp import runs
from captcha_exp.config import Captcha, Config, Data, resolve
from captcha_exp.data import dataset
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.memory.plan import Plan, Planner
from captcha_exp.runtime import device as devices
from captcha_exp.runtime.console import Display
from captcha_exp.sweep.record import Point
from captcha_exp.training import oom
from captcha_exp.training.recorder import Recording, Tracker, recorded


@dataclass(frozen=True)
class Foretold:
    """A point, and what it will need."""

    point: Point
    config: Config
    """resolved, as far as it can be before it runs"""
    pictures: Mapping[str, int]
    """of each split"""
    plan: Plan | None
    """None where the batch size is measured when it runs"""

    @property
    def is_trained(self) -> bool:
        """Whether there is a reason to try: on a CUDA card the allocator keeps to the budget and shows what
        is true; elsewhere only the prediction can."""
        if self.plan is None or self.plan.fits in ("fits", None):
            return True
        return self.config.device.name.startswith("cuda") or self.config.sweep.train_unfit

    def to_json(self) -> dict[str, Any] | None:
        """The plan as plain values."""
        return None if self.plan is None else self.plan.to_json()


def foretell(points: Sequence[Point], display: Display) -> list[Foretold]:
    """What each point will need.

    Raises:
        ConfigError: the pictures of points cannot be had; the lines say why, for all points.
    """
    machine = devices.this_machine(best_batch_size=lambda asked: (asked.train.micro_batch_size or 0) + 1)
    outlines: dict[tuple[Data, Captcha], Mapping[str, int]] = {}  # a folder is read once for all points
    found = []
    mistakes: dict[str, None] = {}  # each once
    with display.bar("planning", len(points)) as bar:
        for point in points:
            config = resolve(point.requested, machine)
            seen = (config.data, config.captcha)
            try:
                if seen not in outlines:
                    outlines[seen] = dataset.outline(config, display).counts
            except UserError as error:
                mistakes |= dict.fromkeys(error.lines)
                continue
            planner = Planner(config, outlines[seen], devices.card_total_mib(config))
            size = point.requested.train.batch_size
            plan = None if size == "auto" else planner.at(size)
            found.append(Foretold(point, config, outlines[seen], plan))
            bar.advance(1)
    if mistakes:
        raise ConfigError(*mistakes)
    return found


def record_unfit(foretold: Foretold, folder: Path, tracker: Tracker, display: Display) -> None:
    """The run of a point that is not trained, since it is foretold not to fit: finished, with a tag."""
    plan, point, config = foretold.plan, foretold.point, foretold.config
    assert plan is not None
    run = runs.create(config, point.requested, folder)
    spared = oom.remedies(plan, foretold.pictures, config, display)
    run.note(tags={"fits": str(plan.fits), "trained": "false"}, unfit={"remedies": spared})
    display.line(f"{point.name}: {plan.words(config.card.name)}; not trained; {oom.words(spared)}")
    recording = Recording(run, tracker, display)
    with recorded(recording, config):
        run.write_json("memory.json", plan.to_json())
        recording.log(runs.MetricsRow(0, runs.now_ms(), plan.beside([])))
