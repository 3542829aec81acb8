"""The grid of a sweep: expand the overrides of `train -m` and compose the config of each job."""

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
    """The jobs of a sweep, and the overrides of Hydra's launcher."""

    jobs: list[tuple[dict[str, str], ComposedConfig]]
    """swept key -> value as typed, and the composed config"""
    launcher_overrides: list[str]
    """overrides for Hydra's launcher only"""
    n_jobs: int
    """maximum number of concurrent jobs"""
    override_keys: frozenset[str]
    """keys that the overrides set, except those of the launcher"""


def compose_grid(overrides: Sequence[str], config_dir: str | None) -> Grid:
    """Expand the overrides and compose each job.

    Raises:
        ConfigError: every mistake of the grid, one line each. Mistakes of a job are in its ComposedConfig.
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
        for key, values in (hydra.sweeper.params or {}).items():  # set in a file of conf/
            if key not in axes.values:  # the command line takes precedence
                axes.add(f"{key}={values}")
        if hydra.runtime.choices["hydra/sweeper"] != "basic":
            axes.errors.append(
                f"hydra/sweeper={hydra.runtime.choices['hydra/sweeper']}: not supported, since all jobs are "
                "checked and planned before the first one starts; use hydra/sweeper=basic"
            )
        if axes.errors:
            raise ConfigError(*axes.errors)
        jobs = [(swept, compose_overrides(job, groups)[0]) for swept, job in axes.expand()]
        # A file of conf/experiment/ may configure the launcher; its sweep is already expanded.
        experiment = [text for text in axes.fixed_overrides() if text.startswith("experiment=")]
        launcher_overrides = [*experiment, "hydra.sweeper.params=null", *axes.launcher_overrides]
    return Grid(jobs, launcher_overrides, _num_parallel(hydra), frozenset(axes.values))


@dataclass
class _Axes:
    """The overrides by key, with their values. As in Hydra, the last override of a key counts."""

    parser: "OverridesParser"
    available_launchers: Sequence[str]
    values: dict[str, list[str]] = field(default_factory=dict)
    """key -> one override for each value"""
    launcher_overrides: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        """Add an override, or an error if it is invalid."""
        from hydra.errors import HydraException

        try:
            override = self.parser.parse_overrides([text])[0]
        except HydraException:
            self.values[text] = [text]  # composing reports the mistake
            return
        key = override.key_or_group
        if key == "hydra/launcher" or key.startswith("hydra.launcher."):
            self._add_launcher_override(text, override)
        elif not override.is_sweep_override():
            self.values[key] = [text]
        elif not override.is_discrete_sweep():
            self.errors.append(
                f"{text}: is not a finite list; separate values by commas, or use range(1,9,2)"
            )
        elif key.partition(".")[0] == "tracking":
            self.errors.append(f"{text}: a sweep logs to one store; write one value")
        else:
            values = list(override.sweep_string_iterator())
            if duplicate := next((value for value in values if values.count(value) > 1), None):
                self.errors.append(f"{text}: has {duplicate} twice; each job of a sweep runs once")
            self.values[key] = [f"{override.get_key_element()}={value}" for value in values]

    def _add_launcher_override(self, text: str, override: "Override") -> None:
        name = str(override.value())
        if override.is_sweep_override():
            self.errors.append(f"{text}: a sweep has one launcher; write one value")
        elif override.key_or_group == "hydra/launcher" and name not in self.available_launchers:
            known = ", ".join(sorted(self.available_launchers))
            hint = "; pip install 'captcha-exp[joblib]' installs it" if name == "joblib" else ""
            self.errors.append(f"{text}: is not installed{hint}; available: {known}")
        else:
            self.launcher_overrides.append(text)

    def fixed_overrides(self) -> list[str]:
        """Return the overrides with a single value."""
        return [texts[0] for texts in self.values.values() if len(texts) == 1]

    def expand(self) -> list[tuple[dict[str, str], list[str]]]:
        """Return (swept key -> value, all overrides) for each job."""
        jobs = []
        for overrides in itertools.product(*self.values.values()):
            pairs = zip(self.values.items(), overrides, strict=True)
            swept = {key: text.partition("=")[2] for (key, texts), text in pairs if len(texts) > 1}
            jobs.append((swept, list(overrides)))
        return jobs


def _num_parallel(hydra: "DictConfig") -> int:
    """Return the number of concurrent jobs of the joblib launcher, as joblib counts; 1 for others."""
    jobs = int(hydra.launcher.get("n_jobs", 1))
    return jobs if jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + jobs)
