"""Compose a config with Hydra from conf/, its groups, and overrides.

Hydra only composes plain YAML: no schema is registered with it, and its output directories and logging are
disabled. `config.load` validates the result, which reports all mistakes at once.
"""

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captcha_exp.cli import launcher
from captcha_exp.cli.overrides import as_typed, parse_override, plain_value
from captcha_exp.errors import ConfigError, UserError, one_line

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

    from captcha_exp.config import Config, Machine

YAML_SUFFIXES = (".yaml", ".yml")
MAX_LENGTH = 500  # characters of Hydra's reason
MAX_DEPTH = 5  # folders below a group
HYDRA_KEYS = {  # beginning of a key that has no effect -> what to do
    "hydra.mode": "use train -m for a sweep",
    "hydra.sweeper.params": "list the values, as in train -m train.batch_size=32,64",
    "hydra.sweeper": "sweeps are grids of all values; remove it",
    "hydra.job.name": "use name=NAME",
    "hydra.run": "set CAPTCHA_EXP_ROOT to another directory",
    "hydra.sweep": "set CAPTCHA_EXP_ROOT to another directory",
    "hydra.verbose": "use --verbose",
}


@dataclass(frozen=True)
class ComposedConfig:
    """A composed config, and the mistakes in its overrides."""

    config: Any  # a DictConfig, or the plain values of one
    choices: dict[str, str]  # config group -> selected file
    raw_overrides: dict[str, str]  # key -> value as typed
    errors: list[str]
    multirun: bool = False  # hydra.mode is MULTIRUN

    def to_config(self, machine: "Machine | None") -> "Config":
        """Return the config as dataclasses, checked against the machine if there is one.

        Raises:
            ConfigError: every mistake, one line each.
        """
        from captcha_exp.config import load

        mistakes = list(self.errors)
        rejected = {re.split("[=:]", line.lstrip("+"))[0] for line in mistakes}
        try:
            config = load(self.config, machine, self.raw_overrides)
        except ConfigError as error:
            lines = (line for line in error.lines if line.partition(": is missing")[0] not in rejected)
            mistakes += map(self._name_gpu_file, lines)
        if mistakes:
            raise ConfigError(*mistakes)
        return config

    def _name_gpu_file(self, line: str) -> str:
        """Start the line of a mistake with the path of the GPU's file, if it is in that file."""
        file = self.choices.get("gpu", "")
        is_in_file = line.startswith("gpu") and re.split("[=:]", line)[0] not in self.raw_overrides
        return f"{file}: {line}" if is_in_file and file.endswith(YAML_SUFFIXES) else line


def compose(*overrides: str, config_dir: str | None = None) -> "DictConfig":
    """Compose conf/ and the overrides, for `config.load`.

    Raises:
        ConfigError: an override is invalid or selects a file that does not exist.
    """
    composed = try_compose(list(overrides), config_dir)
    if composed.errors:
        raise ConfigError(*composed.errors)
    config: DictConfig = composed.config
    return config


def try_compose(overrides: Sequence[str], config_dir: str | None) -> ComposedConfig:
    """Compose conf/ and the overrides, and collect mistakes in the grammar and in choices of groups.

    Unknown keys are added to the config: `config.load` reports them with all other mistakes.
    """
    with hydra_loader(config_dir) as loader:
        return compose_overrides(overrides, list_groups(loader))[0]


def compose_overrides(
    overrides: Sequence[str], groups: Mapping[str, Sequence[str]], launcher_overrides: Sequence[str] = ()
) -> "tuple[ComposedConfig, DictConfig]":
    """Compose the overrides inside `hydra_loader`; also return Hydra's own config, with the launcher's."""
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from captcha_exp.config import frozen_without, with_gpu

    mistakes: list[str] = []
    accepted: list[str] = []
    raw_overrides: dict[str, str] = {}
    gpu_file: Path | None = None
    gpu_overrides: dict[str, Any] = {}
    for text in overrides:
        try:
            override = _parse_override(text, groups)
            if _is_gpu_file(override):
                gpu_file = Path(os.path.expanduser(plain_value(override)))  # noqa: PTH111 - Path's raises for ~unknown
                continue
        except ConfigError as error:
            mistakes += error.lines
            continue
        readable = str(override.input_line)
        if override.key_or_group == "experiment":  # the last one counts; Hydra has no null for a group
            accepted = [each for each in accepted if not re.match("~?experiment(=|$)", each)]
            readable = "~experiment" if override.value() is None else readable
        if override.key_or_group in groups or override.is_delete():
            accepted.append(readable.removeprefix("+") if override.key_or_group in groups else readable)
        else:
            accepted.append("++" + readable.lstrip("+"))
            raw_overrides[override.key_or_group] = text.partition("=")[2]
            if override.key_or_group.startswith("gpu."):
                gpu_overrides[override.key_or_group] = override.value()
    try:
        config = hydra_compose("config", overrides=[*accepted, *launcher_overrides], return_hydra_config=True)
        _check_headers(config, [*accepted, *launcher_overrides])
    except ConfigError as error:
        raise ConfigError(*mistakes, *error.lines) from None
    except RecursionError:
        chosen = (
            ", ".join(text for text in accepted if text.partition("=")[0] in groups) or "conf/config.yaml"
        )
        raise ConfigError(*mistakes, f"{chosen}: a defaults list includes its own file again") from None
    except (
        *(HydraException, OmegaConfBaseException, YAMLError, OSError),
        *(AssertionError, AttributeError, TypeError, ValueError),  # odd content of a file
    ) as error:
        raise ConfigError(*mistakes, _explain(error)) from None
    hydra = config.hydra
    for key, value in (("callbacks", hydra.callbacks), ("job.env_set", hydra.job.env_set)):
        if value:
            mistakes.append(f"hydra.{key}: has no effect, Hydra only composes the config; remove it")
    if gpu_file is not None:
        config = with_gpu(config, gpu_file, gpu_overrides)
    choices = {str(g): str(c) for g, c in hydra.runtime.choices.items() if g in groups and c is not None}
    if gpu_file is not None:
        choices["gpu"] = str(gpu_file)
    multirun = str(hydra.mode).endswith("MULTIRUN")
    composed = ComposedConfig(
        frozen_without(config, group="hydra"), choices, raw_overrides, mistakes, multirun
    )
    return composed, hydra


def _check_headers(config: "DictConfig", overrides: Sequence[str]) -> None:
    """Check that the file of each experiment applies to the whole config.

    Raises:
        ConfigError: it does not; the line has the path of the file and its missing first line.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from captcha_exp.config import Config

    choice = config.hydra.runtime.choices.get("experiment")
    loader: Any = GlobalHydra.instance().config_loader()
    chosen = loader.repository.load_config(f"experiment/{choice}")
    known = {"hydra", *(field.name for field in fields(Config))}
    if choice is None or (chosen.header.get("package") == "_global_" and known.issuperset(config)):
        return  # the defaults list below takes as long as the composition itself
    files = loader.compute_defaults_list("config", list(overrides), RunMode.RUN).defaults
    lines = []
    for name in dict.fromkeys(file.config_path for file in files if file.package and not file.is_self):
        if name and name.startswith("experiment/"):
            path = Path(loader.repository.load_config(name).path.removeprefix("file://"), f"{name}.yaml")
            has_bom = path.read_bytes().startswith(b"\xef\xbb\xbf")
            hint = "; the file begins with a byte order mark: save it as UTF-8 without" if has_bom else ""
            lines.append(f"{path}: its first line must be '# @package _global_'{hint}")
    if lines:
        raise ConfigError(*lines)


def _explain(error: Exception) -> str:
    """Return the reason on one line: Hydra's, or the new name of a file or group of an earlier version."""
    from captcha_exp.config.messages import renamed

    causes = dict.fromkeys(str(each) for each in (error, error.__cause__) if each is not None and str(each))
    text = ": ".join(causes).partition("Config search path:")[0][:MAX_LENGTH]
    # A defaults list may name a file or a group of an earlier version.
    match = re.search(r"Could not (?:find|override) '([\w/]+?)(?:/(\w+))?'", text)
    if match and (new_name := renamed(match[1], match[2])):
        return f"{'/'.join(filter(None, match.groups()))}: was renamed to {new_name}"
    if match and match[1] == "hydra/sweeper":
        return f"hydra/sweeper={match[2]}: {launcher.SWEEPER_PROBLEM}"
    if match and match[1] == "hydra/launcher":
        return f"hydra/launcher={match[2]}: {launcher.missing_launcher(match[2])}"
    if match := re.search(r"Key '(\w+)' not in '\w+'\s+full_key: hydra\.launcher\.", text):
        return launcher.unknown_setting(match[1])
    if match := re.search(r"(hydra\.launcher\.\w+=.*): Value .* could not be converted to (\w+)", text):
        return f"{match[1]}: must be of type {match[2].lower()}"
    if match := re.search(r"full_key: hydra\.sweeper\.params\.(\S+)", text):
        return launcher.not_text(match[1])
    return one_line(text or error)


def apply_overrides(config: "Config", overrides: Sequence[str], machine: "Machine | None" = None) -> "Config":
    """Return a saved config with other values, validated. Each override is key=value in Hydra's grammar.

    Raises:
        ConfigError: every mistake, one line each; selecting a file of conf/ is one.
    """
    from captcha_exp.config import load, to_dict

    values = to_dict(config)
    mistakes: list[str] = []
    raw_overrides: dict[str, str] = {}
    for text in overrides:
        try:
            override = _parse_override(text, {})
            value = plain_value(override)
        except ConfigError as error:
            mistakes += error.lines
            continue
        *groups, name = key = override.key_or_group.split(".")
        node: Any = values
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if override.is_delete() or (len(key) == 1 and not isinstance(values.get(name, {}), str | int)):
            mistakes.append(
                f"{text}: does not set a key of a saved config; together with RUN, write GROUP.KEY=VALUE"
            )
        elif not isinstance(node, dict):
            mistakes.append(f"{text}: unknown key; see the run's config.yaml for the known ones")
        else:
            node[name] = value
            raw_overrides[override.key_or_group] = text.partition("=")[2]
    if isinstance(tracking := values["tracking"], dict) and tracking.get("backend") == "none":
        values["tracking"] = {"backend": "none"}  # without the keys of a store
    try:
        changed = load(values, machine, raw_overrides)
    except ConfigError as error:
        mistakes += error.lines
    if mistakes:
        raise ConfigError(*mistakes)
    return changed


@contextlib.contextmanager
def hydra_loader(config_dir: str | None) -> Iterator["ConfigLoader"]:
    """Initialize Hydra with conf/ and, if given, a directory that is searched first.

    Raises:
        UserError: the directory does not exist.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from captcha_exp.runtime.paths import conf_dir

    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir={config_dir}: no such directory")
    with initialize_config_dir(str(conf_dir()), job_name="captcha-exp", version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        if config_dir is not None:
            loader.get_search_path().prepend("command-line", f"file://{Path(config_dir).resolve()}")
            loader.repository.initialize_sources(loader.get_search_path())
            for source in loader.repository.sources:
                if source.provider == "command-line":
                    launcher.check_before_loading(source)
        yield loader


def list_groups(loader: Any) -> dict[str, list[str]]:
    """Return the files of each config group, those of subfolders of the groups of conf/ as folder/name."""
    from captcha_exp.runtime.paths import conf_dir

    def options(group: str) -> list[str]:
        files = [*loader.get_group_options(group)]
        if (conf_dir() / group.partition("/")[0]).is_dir() and group.count("/") < MAX_DEPTH:
            for folder in subfolders(group):
                files += [f"{folder}/{file}" for file in options(f"{group}/{folder}")]
        return sorted(files)

    def subfolders(group: str) -> list[str]:
        sources = (source.path.partition("file://")[2] for source in loader.get_search_path().get_path())
        entries = (entry for path in sources if path for entry in Path(path, group).glob("*/"))
        return sorted({entry.name for entry in entries if entry.is_dir()})

    return {name: options(name) for name in loader.list_groups("") if name != "hydra"}


def _parse_override(text: str, groups: Mapping[str, Sequence[str]]) -> "Override":
    """Parse an override.

    Raises:
        ConfigError: it is invalid, has no effect, or selects a file that does not exist.
    """
    from captcha_exp.config.messages import renamed

    override = parse_override(text)
    key, problem = override.key_or_group, ""
    if override.is_sweep_override():
        word = as_typed(key, text.partition("=")[2])
        problem = f"is a sweep; use train -m (for a list write [1,2], for this text {word})"
    elif key == "hydra/sweeper" and override.value() != "basic":
        problem = launcher.SWEEPER_PROBLEM
    elif key.startswith(("hydra/sweeper", "hydra/launcher", "hydra.launcher.")):
        problem = "configures a sweep; use train -m"
    elif key == "hydra" or key.startswith(("hydra/", "hydra.")):
        hints = (hint for prefix, hint in HYDRA_KEYS.items() if key.startswith(prefix))
        problem = f"has no effect, Hydra only composes the config; {next(hints, 'remove it')}"
    elif new_name := renamed(key, override.value()):
        problem = f"was renamed to {new_name}"
    elif key in groups and not override.is_delete() and not _is_gpu_file(override):
        problem = _choice_problem(key, override.value(), groups[key])
    if problem:
        raise ConfigError(f"{text}: {problem}")
    return override


def _choice_problem(group: str, value: Any, files: Sequence[str]) -> str:
    """Return the mistake of a choice of a config group, with the closest correct one; else no text."""
    choice = str(value)
    if choice in files or (value is None and group == "experiment"):
        return ""
    close = get_close_matches(choice, files, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    if group == "data" and re.search(r"[/\\~]", choice):
        hint = f"did you mean data=folder {as_typed('data.path', choice)}? "
    elif group == "tracking" and ":" in choice:
        hint = f"did you mean {as_typed('tracking.uri', choice)}? "
    known = [*files, "null"] if group == "experiment" else files
    return f"no such file in conf/{group}; {hint}one of {', '.join(known)}"


def _is_gpu_file(override: "Override") -> bool:
    """Return whether the override selects a GPU by the path of its file."""
    return override.key_or_group == "gpu" and str(override.value()).endswith(YAML_SUFFIXES)
