"""The grid of a sweep: what the overrides of `train -m` span, each point composed."""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from captcha_exp.cli.hydra_config import ComposedConfig, compose_overrides, hydra_loader, list_groups
from captcha_exp.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Grid:
    """The points of a sweep, and how Hydra is to launch them."""

    jobs: list[tuple[dict[str, str], ComposedConfig]]
    """swept key -> value as typed, and the config with it"""
    launcher_overrides: list[str]
    """overrides for Hydra's launcher alone"""
    n_jobs: int
    """points that run at a time, if there are so many"""
    override_keys: frozenset[str]
    """keys of the points that the overrides name; others are of the launcher"""

    @property
    def parallelism(self) -> int:
        """points that run at a time"""
        return min(self.n_jobs, len(self.jobs))


def compose_grid(overrides: Sequence[str], config_dir: str | None) -> Grid:
    """Every point of the grid that the overrides span, composed.

    Raises:
        ConfigError: every mistake of the grid itself, one line each. Those of a point stand with the point.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with hydra_loader(config_dir) as loader:
        groups = list_groups(loader)
        axes = _Axes(OverridesParser.create(config_loader=loader), loader.get_group_options("hydra/launcher"))
        for text in overrides:
            axes.add(text)
        if axes.errors:
            raise ConfigError(*axes.errors)
        _, hydra = compose_overrides(axes.fixed_overrides(), groups, axes.launcher_overrides)
        for key, values in (hydra.sweeper.params or {}).items():  # a sweep that a file of conf/ describes
            if key not in axes.values:  # the command line has the last word
                axes.add(f"{key}={values}")
        if hydra.runtime.choices["hydra/sweeper"] != "basic":
            axes.errors.append(
                f"hydra/sweeper={hydra.runtime.choices['hydra/sweeper']}: chooses points while others run; "
                "here all are checked and planned before the first one starts: leave it basic"
            )
        if axes.errors:
            raise ConfigError(*axes.errors)
        points = [(swept, compose_overrides(words, groups)[0]) for swept, words in axes.expand()]
        # A file of conf/experiment/ may say how to launch; the points that it describes are known by now.
        chosen = [text for text in axes.fixed_overrides() if text.startswith("experiment=")]
        launching = [*chosen, "hydra.sweeper.params=null", *axes.launcher_overrides]
    return Grid(points, launching, _num_parallel(hydra), frozenset(axes.values))


@dataclass
class _Axes:
    """The overrides by key, each with its values; of two for one key the last counts, as for Hydra."""

    parser: "OverridesParser"
    available_launchers: Sequence[str]
    values: dict[str, list[str]] = field(default_factory=dict)
    """key -> an override for each value"""
    launcher_overrides: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """One override more, or what is wrong with it."""
        from hydra.errors import HydraException

        try:
            override = self.parser.parse_overrides([text])[0]
        except HydraException:
            self.values[text] = [text]  # what is wrong with it is told when it is composed
            return
        key = override.key_or_group
        if key == "hydra/launcher" or key.startswith("hydra.launcher."):
            self._add_launcher_override(text, override)
        elif not override.is_sweep_override():
            self.values[key] = [text]
        elif not override.is_discrete_sweep():
            self.errors.append(f"{text}: has no end of values; write them with commas, or range(1,9,2)")
        elif key.partition(".")[0] == "tracking":
            self.errors.append(f"{text}: the runs of a sweep stand in one store; write one value")
        else:
            values = list(override.sweep_string_iterator())
            if double := next((value for value in values if values.count(value) > 1), None):
                self.errors.append(f"{text}: names {double} twice; each point of a sweep runs once")
            self.values[key] = [f"{override.get_key_element()}={value}" for value in values]

    def _add_launcher_override(self, text: str, override: "Override") -> None:
        name = str(override.value())
        if override.is_sweep_override():
            self.errors.append(f"{text}: one sweep has one launcher; write one value")
        elif override.key_or_group == "hydra/launcher" and name not in self.available_launchers:
            known = ", ".join(sorted(self.available_launchers))
            hint = "; pip install 'captcha-exp[joblib]' brings it" if name == "joblib" else ""
            self.errors.append(f"{text}: is not installed{hint}; here are {known}")
        else:
            self.launcher_overrides.append(text)

    def fixed_overrides(self) -> list[str]:
        """The overrides that all points have in common."""
        return [texts[0] for texts in self.values.values() if len(texts) == 1]

    def expand(self) -> list[tuple[dict[str, str], list[str]]]:
        """Swept key -> value, and all overrides, of each point."""
        found = []
        for words in itertools.product(*self.values.values()):
            each = zip(self.values.items(), words, strict=True)
            swept = {key: word.partition("=")[2] for (key, texts), word in each if len(texts) > 1}
            found.append((swept, list(words)))
        return found


def _num_parallel(hydra: "DictConfig") -> int:
    """Points that joblib's launcher runs at a time, counted as joblib does; others run one."""
    jobs = int(hydra.launcher.get("n_jobs", 1))
    return jobs if jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + jobs)
