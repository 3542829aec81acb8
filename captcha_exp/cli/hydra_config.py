"""Compose a config with Hydra from conf/, its groups, and overrides.

Hydra only composes plain YAML: no schema is registered with it, and its output directories and logging are
disabled. `config.load` validates the result, which reports all mistakes at once.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captcha_exp.errors import ConfigError, UserError, one_line

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

    from captcha_exp.config import Config, Machine
YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class ComposedConfig:
    """A composed config, and the mistakes in its overrides."""

    config: "DictConfig"
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
        try:
            config = load(self.config, machine, self.raw_overrides)
        except ConfigError as error:
            mistakes += map(self._name_gpu_file, error.lines)
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
    return composed.config


def try_compose(overrides: Sequence[str], config_dir: str | None) -> ComposedConfig:
    """Compose conf/ and the overrides, and collect mistakes in the grammar and in choices of groups.

    Unknown keys are added to the config: `config.load` reports them with all other mistakes.
    """
    with hydra_loader(config_dir) as loader:
        return compose_overrides(overrides, list_groups(loader))[0]


def compose_overrides(
    overrides: Sequence[str], groups: dict[str, list[str]], launcher_overrides: Sequence[str] = ()
) -> "tuple[ComposedConfig, DictConfig]":
    """Compose the overrides inside `hydra_loader`; also return Hydra's own config, with the launcher's."""
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from yaml import YAMLError

    from captcha_exp.config import frozen_without, with_gpu
    from captcha_exp.config.messages import renamed

    mistakes: list[str] = []
    accepted: list[str] = []
    raw_overrides: dict[str, str] = {}
    gpu_file: Path | None = None
    gpu_overrides: dict[str, Any] = {}
    for text in overrides:
        try:
            override = _parse_override(text, groups)
        except ConfigError as error:
            mistakes += error.lines
            continue
        if _is_gpu_file(override):
            gpu_file = Path(str(override.value()))
        elif override.key_or_group in groups or override.is_delete():
            accepted.append(text.removeprefix("+") if override.key_or_group in groups else text)
        else:
            accepted.append("++" + text.lstrip("+"))
            raw_overrides[override.key_or_group] = text.partition("=")[2]
            if override.key_or_group.startswith("gpu."):
                gpu_overrides[override.key_or_group] = override.value()
    try:
        config = hydra_compose("config", overrides=[*accepted, *launcher_overrides], return_hydra_config=True)
    except (HydraException, YAMLError, OSError, UnicodeDecodeError) as error:
        # A defaults list may name a file or a group of an earlier version.
        match = re.search(r"Could not (?:find|override) '([\w/]+?)(?:/(\w+))?'", str(error))
        if match and (new_name := renamed(match[1], match[2])):
            old_name = "/".join(filter(None, match.groups()))
            raise ConfigError(*mistakes, f"{old_name}: was renamed to {new_name}") from None
        raise ConfigError(*mistakes, one_line(error)) from None
    hydra = config.hydra
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
            node[name] = override.value()
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
        yield loader


def list_groups(loader: Any) -> dict[str, list[str]]:
    """Return the files of each config group."""
    names = [name for name in loader.list_groups("") if name != "hydra"]
    return {name: sorted(loader.get_group_options(name)) for name in names}


def _parse_override(text: str, groups: Mapping[str, Sequence[str]]) -> "Override":
    """Parse an override.

    Raises:
        ConfigError: it is invalid, has no effect, or selects a file that does not exist.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from captcha_exp.config.messages import renamed

    try:
        override = OverridesParser.create().parse_overrides([text])[0]
    except HydraException:
        problem = "invalid override; write key=value, with quotes around special characters"
        raise ConfigError(f"{text!r}: {problem}") from None
    key, problem = override.key_or_group, ""
    if override.is_sweep_override():
        problem = "is a sweep; use train -m (for a list write [1,2], for text use quotes)"
    elif key.startswith(("hydra/launcher", "hydra.launcher.")):
        problem = "configures the launcher of a sweep; use train -m"
    elif key == "hydra" or key.startswith(("hydra/", "hydra.")):
        problem = "has no effect, Hydra only composes the config; remove it"
    elif new_name := renamed(key, override.value()):
        problem = f"was renamed to {new_name}"
    elif key in groups and not override.is_delete() and not _is_gpu_file(override):
        choice = str(override.value())
        if choice not in groups[key]:
            close = get_close_matches(choice, groups[key], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            problem = f"no such file in conf/{key}; {hint}one of {', '.join(groups[key])}"
    if problem:
        raise ConfigError(f"{text}: {problem}")
    return override


def _is_gpu_file(override: "Override") -> bool:
    """Return whether the override selects a GPU by the path of its file."""
    return override.key_or_group == "gpu" and str(override.value()).endswith(YAML_SUFFIXES)


def run_hydra(argv: list[str], task: "Callable[[DictConfig], None] | None" = None) -> None:
    """Run Hydra's own command line to print a config, complete words, or launch `task`."""
    import hydra

    from captcha_exp.runtime.paths import conf_dir

    sys.argv = [sys.argv[0], *argv]
    run = hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
    run(task or (lambda _: None))()


def show_config(kind: str, overrides: Sequence[str], config_dir: str | None) -> int:
    """Print the composed config for `--cfg`, not validated; return the exit code."""
    config = compose(*overrides, config_dir=config_dir)
    if kind == "job":
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(config), end="")
        return 0
    flag = ["--config-dir", str(Path(config_dir).resolve())] if config_dir else []
    run_hydra([*flag, "--cfg", kind, *overrides])
    return 0


def complete(argv: list[str], commands: Iterable[str], override_commands: Iterable[str]) -> int:
    """Complete a command line for the shell: commands here, groups and keys by Hydra."""
    words = os.environ.get("COMP_LINE", "").split(" ")
    if any(word.startswith("query=") for word in argv):
        if len(words) <= 2:
            print("\n".join(command for command in commands if command.startswith(words[-1])))
            return 0
        if words[1] not in override_commands:
            return 0
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])  # Hydra has no commands
    run_hydra(argv)
    return 0
