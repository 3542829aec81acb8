"""The grid of a sweep: expand the overrides of `train -m` and compose the config of each job."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from captcha_exp.cli import launcher
from captcha_exp.cli.hydra_config import (
    ComposedConfig,
    compose_overrides,
    hydra_loader,
    list_groups,
)
from captcha_exp.cli.overrides import parse_override
from captcha_exp.errors import ConfigError, one_line

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

MAX_JOBS = 10_000
MAX_NAMED = 4  # jobs in one line


@dataclass(frozen=True)
class Grid:
    """The jobs of a sweep, and the overrides of Hydra's launcher."""

    jobs: list[tuple[dict[str, str], ComposedConfig]]
    """swept key -> value, and the composed config"""
    launcher_overrides: list[str]
    """overrides for Hydra's launcher only"""
    n_jobs: int
    """maximum number of concurrent jobs"""
    override_keys: frozenset[str]
    """keys that the overrides set, except those of the launcher"""
    hydra: "DictConfig"
    """Hydra's own config"""


def compose_grid(overrides: Sequence[str], config_dir: str | None) -> Grid:
    """Expand the overrides and compose each job.

    Raises:
        ConfigError: every mistake of the grid, one line each. Mistakes of a job are in its ComposedConfig.
    """
    with hydra_loader(config_dir) as loader:
        groups = list_groups(loader)
        axes = _Axes(loader, groups)
        for text in overrides:
            axes.add(text)
        axes.raise_errors()
        _, hydra = compose_overrides(axes.fixed_overrides(), groups, axes.launcher_overrides)
        for key, value in _sweeper_params(hydra).items():  # set in a file of conf/
            if key not in axes.values:  # the command line takes precedence
                axes.add(f"{key}={value}", "hydra.sweeper.params: ")
        launcher_overrides = launcher.launcher_overrides(hydra)
        axes.raise_errors()
        jobs: list[tuple[dict[str, str], ComposedConfig]] = []
        mistakes: dict[str, list[int]] = {}
        points = axes.expand()
        for number, (swept, job_overrides) in enumerate(points):
            try:
                composed, job_hydra = compose_overrides(job_overrides, groups, axes.launcher_overrides)
                jobs.append((swept, composed))
                lines: Sequence[str] = _swept_hydra_mistakes(job_hydra, hydra)
            except ConfigError as error:
                lines = error.lines
            for line in lines:
                mistakes.setdefault(line, []).append(number)
        if mistakes:
            raise ConfigError(*name_jobs(mistakes, [swept for swept, _ in points]))
    return Grid(jobs, launcher_overrides, launcher.num_parallel(hydra), frozenset(axes.values), hydra)


def show_config(kind: str, overrides: Sequence[str], config_dir: str | None, multirun: bool) -> int:
    """Print the composed config for `--cfg`, not validated, of each job of a sweep; return the exit code.

    Raises:
        ConfigError: an override is invalid or selects a file that does not exist.
    """
    from omegaconf import OmegaConf

    with hydra_loader(config_dir) as loader:
        composed, hydra = compose_overrides([] if multirun else overrides, list_groups(loader))
    jobs: list[tuple[dict[str, str], ComposedConfig]] = [({}, composed)]
    if multirun or composed.multirun:
        grid = compose_grid(overrides, config_dir)
        jobs, hydra = grid.jobs, grid.hydra
    mistakes: dict[str, list[int]] = {}
    for number, (_, composed) in enumerate(jobs):
        for line in composed.errors:
            mistakes.setdefault(line, []).append(number)
    if mistakes:
        raise ConfigError(*name_jobs(mistakes, [swept for swept, _ in jobs]))
    for number, (swept, composed) in enumerate(jobs, 1):
        if len(jobs) > 1:
            print(f"---\n# job {number}: {' '.join(f'{key}={value}' for key, value in swept.items())}")
        if kind in ("hydra", "all"):
            print(OmegaConf.to_yaml(OmegaConf.create({"hydra": hydra})), end="")
        if kind in ("job", "all"):
            print(OmegaConf.to_yaml(composed.config), end="")
    return 0


def name_jobs(mistakes: Mapping[str, Sequence[int]], jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """Add to each mistake the swept values of the jobs that have it, unless all have.

    Args:
        mistakes: line -> indices of the jobs
        jobs: swept key -> value, of every job
    """
    return [
        line if len(numbers) == len(jobs) else f"{line}; with {_describe(set(numbers), jobs)}"
        for line, numbers in mistakes.items()
    ]


def _describe(numbers: set[int], jobs: Sequence[Mapping[str, str]]) -> str:
    """Describe some jobs of a grid, by the values of one key if that is possible."""
    for key in jobs[0]:
        values = dict.fromkeys(jobs[n][key] for n in sorted(numbers))
        if all(n in numbers for n, job in enumerate(jobs) if job[key] in values):
            break
    else:
        key, values = (
            "",
            dict.fromkeys(" ".join(f"{k}={v}" for k, v in jobs[n].items()) for n in sorted(numbers)),
        )
    names = [f"{key}={value}" if key else value for value in values]
    others = f" or {len(names) - MAX_NAMED} others" if len(names) > MAX_NAMED else ""
    return " or ".join(names[:MAX_NAMED]) + others


def _sweeper_params(hydra: "DictConfig") -> dict[str, Any]:
    """Return the sweep that a file defines.

    Raises:
        ConfigError: it has another sweeper than Hydra's basic one, or values that are not text.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    sweeper = str(hydra.runtime.choices["hydra/sweeper"])
    if sweeper != "basic":
        raise ConfigError(f"hydra/sweeper={sweeper}: {launcher.SWEEPER_PROBLEM}")
    try:
        params: Any = OmegaConf.to_container(hydra.sweeper, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.sweeper.params: {one_line(error)}") from None
    values: dict[str, Any] = params["params"] or {}
    if lines := [launcher.not_text(key) for key, value in values.items() if not isinstance(value, str)]:
        raise ConfigError(*lines)
    return values


def _swept_hydra_mistakes(job: "DictConfig", sweep: "DictConfig") -> list[str]:
    """Return a line if a swept file configures the launcher or the sweep, which are those of all jobs."""
    mistakes = []
    if job.launcher != sweep.launcher:
        name = job.runtime.choices["hydra/launcher"]
        mistakes.append(
            f"hydra/launcher={name}: is set in a swept file, but all jobs have one launcher; set it and "
            "hydra.launcher on the command line"
        )
    if job.sweeper != sweep.sweeper:
        mistakes.append("hydra.sweeper: is set in a swept file, and has no effect there; remove it")
    return mistakes


@dataclass
class _Axes:
    """The overrides by key, with their values. As in Hydra, the last override of a key counts."""

    loader: "ConfigLoader"
    groups: Mapping[str, Sequence[str]]
    values: dict[str, dict[str, str]] = field(default_factory=dict)
    """key -> one override for each value -> the value without quotes"""
    launcher_overrides: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def add(self, text: str, origin: str = "") -> None:
        """Add an override, or an error if it is invalid; it begins with the origin."""
        try:
            override = parse_override(text, self.loader)
        except ConfigError:
            self.values[text] = {text: ""}  # composing reports the mistake
            return
        key = override.key_or_group
        if key in ("hydra/launcher", "hydra/sweeper") or key.startswith("hydra.launcher."):
            problem = self._add_launcher_override(override)
        elif not override.is_sweep_override():
            self.values[key] = {text: ""}
            return
        elif not override.is_discrete_sweep():
            problem = "is not a finite list; separate values by commas, or use range(1,9,2)"
        elif key.partition(".")[0] == "tracking":
            problem = "a sweep logs to one store; write one value"
        else:
            problem = self._add_axis(override)
        if problem:
            self.errors.append(f"{origin}{text}: {problem}")

    def _add_axis(self, override: "Override") -> str:
        """Add the values of a sweep; return its mistake, else an empty string."""
        from hydra.core.override_parser.types import Glob, QuotedString, Transformer
        from hydra.errors import HydraException

        try:
            elements = list(itertools.islice(override.sweep_iterator(), MAX_JOBS + 1))
        except (HydraException, ArithmeticError, ValueError) as error:
            return one_line(error)
        pairs = [(Transformer.str(element), element) for element in elements]
        texts = [text for text, _ in pairs]
        if not texts:
            if not isinstance(override.value(), Glob):
                return "gives no value"
            known = self.groups.get(override.key_or_group)
            files = "the files of a config group; write the values" if known is None else ", ".join(known)
            return f"gives no value; glob chooses from {files}"
        if len(texts) > MAX_JOBS:
            return f"gives more than {MAX_JOBS:,} values"
        if duplicate := next((text for text in texts if texts.count(text) > 1), None):
            return f"has {duplicate} twice; each job of a sweep runs once"
        plain = (element.text if isinstance(element, QuotedString) else element for _, element in pairs)
        self.values[override.key_or_group] = {
            f"{override.get_key_element()}={text}": value if isinstance(value, str) else text
            for text, value in zip(texts, plain, strict=True)
        }
        return ""

    def _add_launcher_override(self, override: "Override") -> str:
        """Add an override of the launcher or the sweeper; return its mistake, else an empty string."""
        if override.is_sweep_override():
            return "a sweep has one launcher; write one value"
        key, name = override.key_or_group, str(override.value())
        if key == "hydra/sweeper" and name != "basic":
            return launcher.SWEEPER_PROBLEM
        if key == "hydra/launcher" and name not in self.loader.get_group_options("hydra/launcher"):
            return launcher.missing_launcher(name)
        self.launcher_overrides.append(str(override.input_line).lstrip("+"))
        return ""

    def raise_errors(self) -> None:
        """Raise the mistakes so far.

        Raises:
            ConfigError: there are some.
        """
        if self.errors:
            raise ConfigError(*self.errors)

    def fixed_overrides(self) -> list[str]:
        """Return the overrides with a single value."""
        return [text for texts in self.values.values() if len(texts) == 1 for text in texts]

    def expand(self) -> list[tuple[dict[str, str], list[str]]]:
        """Return (swept key -> value, all overrides) for each job.

        Raises:
            ConfigError: there are too many.
        """
        swept_keys = [key for key, texts in self.values.items() if len(texts) > 1]
        if math.prod(map(len, self.values.values())) > MAX_JOBS:
            raise ConfigError(
                f"{', '.join(swept_keys)}: more than {MAX_JOBS:,} jobs; sweep over fewer values"
            )
        jobs = []
        for overrides in itertools.product(*self.values.values()):
            pairs = zip(self.values.items(), overrides, strict=True)
            swept = {key: texts[text] for (key, texts), text in pairs if len(texts) > 1}
            jobs.append((swept, list(overrides)))
        return jobs
