"""Composing a config with Hydra: conf/, the groups, the grammar of overrides.

Hydra composes plain YAML and nothing more: no schema is registered with it, its own folders and loggings stay
out, and `load` does all the checking, so that every mistake is reported at once.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captcha_exp.errors import ConfigError, UserError

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

    from captcha_exp.config import Config, Machine


@dataclass(frozen=True)
class ComposedConfig:
    """A composed config, and what was wrong with the words that asked for it."""

    config: "DictConfig"
    choices: dict[str, str]  # conf group -> the file chosen
    raw_overrides: dict[str, str]  # key -> value as typed
    errors: list[str]
    multirun: bool = False  # a file of conf/ says that this is a sweep

    def to_config(self, machine: "Machine | None") -> "Config":
        """The config as dataclasses.

        Raises:
            ConfigError: every mistake, one line each.
        """
        from captcha_exp.config import load

        mistakes = list(self.errors)
        try:
            config = load(self.config, machine, self.raw_overrides)
        except ConfigError as error:
            mistakes += error.lines
        if mistakes:
            raise ConfigError(*mistakes)
        return config


def compose(*overrides: str, config_dir: str | None = None) -> "DictConfig":
    """The config that conf/ and the overrides describe, for `load`.

    Raises:
        ConfigError: an override cannot be read or names a file that is not there.
    """
    composed = try_compose(list(overrides), config_dir)
    if composed.errors:
        raise ConfigError(*composed.errors)
    return composed.config


def try_compose(overrides: Sequence[str], config_dir: str | None) -> ComposedConfig:
    """The composed config, with the mistakes that only Hydra's grammar and groups can show.

    Overrides of values are forced in, so that `load` sees unknown keys too, and reports them with all the
    rest.
    """
    with hydra_loader(config_dir) as loader:
        return compose_overrides(overrides, list_groups(loader))[0]


def compose_overrides(
    overrides: Sequence[str], groups: dict[str, list[str]], launcher_overrides: Sequence[str] = ()
) -> "tuple[ComposedConfig, DictConfig]":
    """What the overrides describe, in an opened conf/; and Hydra's settings, with those of the launcher."""
    from hydra import compose as hydra_compose
    from hydra.errors import HydraException
    from yaml import YAMLError

    from captcha_exp.config import frozen_without, with_gpu

    mistakes, accepted, written = [], [], {}
    card_file: Path | None = None
    of_card: dict[str, Any] = {}
    for text in overrides:
        try:
            override, mistake = _parse_override(text, groups)
        except HydraException:
            mistakes.append(_format_invalid_override(text))
            continue
        if override.key_or_group == "gpu" and str(override.value()).endswith((".yaml", ".yml")):
            card_file = Path(str(override.value()))
        elif mistake:
            mistakes.append(mistake)
        elif override.key_or_group in groups or override.is_delete():
            accepted.append(text.removeprefix("+") if override.key_or_group in groups else text)
        else:
            accepted.append("++" + text.lstrip("+"))
            written[override.key_or_group] = text.partition("=")[2]
            if override.key_or_group.startswith("gpu."):
                of_card[override.key_or_group] = override.value()
    try:
        config = hydra_compose("config", overrides=[*accepted, *launcher_overrides], return_hydra_config=True)
    except (HydraException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(*mistakes, _one_line(error)) from None
    hydra = config.hydra
    if card_file is not None:
        config = with_gpu(config, card_file, of_card)
    choices = {str(g): str(c) for g, c in hydra.runtime.choices.items() if g in groups and c is not None}
    if card_file is not None:
        choices["gpu"] = str(card_file)
    multirun = str(hydra.mode).endswith("MULTIRUN")
    return ComposedConfig(frozen_without(config, group="hydra"), choices, written, mistakes, multirun), hydra


def apply_overrides(config: "Config", overrides: Sequence[str], machine: "Machine | None" = None) -> "Config":
    """A saved config with other values in it, checked as a whole. Each word is key=value, in Hydra's grammar.

    Raises:
        ConfigError: every mistake, one line each; a choice between files of conf/ is one.
    """
    from hydra.errors import HydraException

    from captcha_exp.config import load, to_dict

    values = to_dict(config)
    mistakes: list[str] = []
    written: dict[str, str] = {}
    for text in overrides:
        try:
            override, mistake = _parse_override(text, {})
        except HydraException:
            mistakes.append(_format_invalid_override(text))
            continue
        *groups, name = key = override.key_or_group.split(".")
        node: Any = values
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if mistake:
            mistakes.append(mistake)
        elif override.is_delete() or (len(key) == 1 and not isinstance(values.get(name, {}), str | int)):
            mistakes.append(
                f"{text}: gives no key of a saved config a value; beside a run, write GROUP.KEY=VALUE"
            )
        elif not isinstance(node, dict):
            mistakes.append(f"{text}: there is no such key; known are those of the run's config.yaml")
        else:
            node[name] = override.value()
            written[override.key_or_group] = text.partition("=")[2]
    if isinstance(tracking := values["tracking"], dict) and tracking.get("backend") == "none":
        values["tracking"] = {"backend": "none"}  # the store has no keys then
    try:
        changed = load(values, machine, written)
    except ConfigError as error:
        mistakes.extend(error.lines)
    if mistakes:
        raise ConfigError(*mistakes)
    return changed


def _format_invalid_override(text: str) -> str:
    return f"{text!r}: is no override; write key=value, with quotes around odd values"


@contextlib.contextmanager
def hydra_loader(config_dir: str | None) -> Iterator["ConfigLoader"]:
    """conf/ as Hydra reads it, with another folder beside it."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from captcha_exp.runtime.paths import conf_dir

    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir={config_dir}: there is no such folder")
    with initialize_config_dir(str(conf_dir()), job_name="captcha-exp", version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        if config_dir is not None:
            loader.get_search_path().prepend("command-line", f"file://{Path(config_dir).resolve()}")
            loader.repository.initialize_sources(loader.get_search_path())
        yield loader


def list_groups(loader: Any) -> dict[str, list[str]]:
    """Each group of conf/ with the files to choose from."""
    names = [name for name in loader.list_groups("") if name != "hydra"]
    return {name: sorted(loader.get_group_options(name)) for name in names}


def _parse_override(text: str, groups: dict[str, list[str]]) -> "tuple[Override, str | None]":
    """The override, and what is wrong with it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from captcha_exp.config.messages import renamed

    override = OverridesParser.create().parse_overrides([text])[0]
    key = override.key_or_group
    if override.is_sweep_override():
        return (
            override,
            f"{text}: is a sweep; train -m runs each point (a list is written [1,2], a text in quotes)",
        )
    if key.startswith(("hydra/launcher", "hydra.launcher.")):
        return override, f"{text}: launches the points of a sweep; add -m to train"
    if key == "hydra" or key.startswith(("hydra/", "hydra.")):
        return override, f"{text}: Hydra only composes here; its own settings have nothing to act on"
    if new_name := renamed(key, override.value()):
        return override, f"{text}: was renamed to {new_name}"
    if key in groups and not override.is_delete():
        choice = override.value()
        if choice not in groups[key]:
            close = get_close_matches(str(choice), groups[key], n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            return (
                override,
                f"{text}: there is no such file in conf/{key}; {hint}one of {', '.join(groups[key])}",
            )
    return override, None


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def run_hydra(argv: list[str], task: "Callable[[DictConfig], None] | None" = None) -> None:
    """Hydra's own command line: it shows, completes or launches; to show and complete it needs no task."""
    import hydra

    from captcha_exp.runtime.paths import conf_dir

    sys.argv = [sys.argv[0], *argv]

    def nothing(config: "DictConfig") -> None:
        del config

    hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(task or nothing)()


def show_config(kind: str, overrides: Sequence[str], config_dir: str | None) -> int:
    """`--cfg`: Hydra prints what it composed, checked by nobody."""
    composed = try_compose(overrides, config_dir)
    if composed.errors:
        raise ConfigError(*composed.errors)
    if kind == "job":
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(composed.config), end="")
        return 0
    folder = ["--config-dir", str(Path(config_dir).resolve())] if config_dir else []
    run_hydra([*folder, "--cfg", kind, *overrides])
    return 0


def complete(argv: list[str], commands: Iterable[str], override_commands: Iterable[str]) -> int:
    """What the shell may put at TAB: verbs by ourselves, groups and keys by Hydra."""
    words = os.environ.get("COMP_LINE", "").split(" ")
    if any(word.startswith("query=") for word in argv):
        if len(words) <= 2:
            print("\n".join(verb for verb in commands if verb.startswith(words[-1])))
            return 0
        if words[1] not in override_commands:
            return 0
        os.environ["COMP_LINE"] = " ".join([words[0], *words[2:]])  # Hydra knows no verbs
    run_hydra(argv)
    return 0
