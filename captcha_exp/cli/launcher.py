"""Hydra's launchers: which are installed, their settings, and the mistakes in both; its command line.

Hydra receives the checked launcher and its settings alone, and no file of the user: a callback that a file
names is never called.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captcha_exp.cli.overrides import quote
from captcha_exp.errors import ConfigError, one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

SWEEPER_PROBLEM = (
    "not supported, since all jobs are checked and planned before the first one starts; use "
    "hydra/sweeper=basic and list the values, as in train.batch_size=32,64"
)


def missing_launcher(name: str) -> str:
    """Return the mistake of a launcher that is not installed, without its key."""
    hint = "; pip install 'captcha-exp[joblib]' installs it" if name == "joblib" else ""
    return f"is not installed{hint}; available: {', '.join(sorted(_installed()))}"


def unknown_setting(setting: str) -> str:
    """Return the mistake of a setting that the chosen launcher lacks: the launcher that has it."""
    owners = [name for name, defaults in _installed().items() if setting in defaults]
    owner = next(iter(owners), "joblib" if setting == "n_jobs" else None)
    if owner is None:
        return f"hydra.launcher.{setting}: unknown setting of the launcher; remove it"
    return f"hydra.launcher.{setting} belongs to {owner}; add hydra/launcher={owner}"


def not_text(key: str) -> str:
    """Return the mistake of a value in `hydra.sweeper.params` that is not text."""
    problem = "must be text, as in '1,2' for two values or '[1,2]' for a list"
    return f"hydra.sweeper.params.{key}: {problem}"


def launcher_overrides(hydra: "DictConfig") -> list[str]:
    """Return the overrides that give Hydra the same launcher with the same settings.

    Raises:
        ConfigError: it is not installed, or `n_jobs` is not a number of jobs.
    """
    from omegaconf import OmegaConf

    settings: Any = OmegaConf.to_container(hydra.launcher)
    reserved = {key: value for key, value in settings.items() if key.startswith("_")}  # of the class
    names = [
        name
        for name, defaults in _installed().items()
        if all(defaults.get(k) == reserved[k] for k in reserved)
    ]
    if not names:
        known = ", ".join(sorted(_installed()))
        raise ConfigError(f"hydra.launcher: has the class of no installed launcher; available: {known}")
    if settings.get("n_jobs", 1) == 0:
        raise ConfigError("hydra.launcher.n_jobs=0: must be a number of jobs, or -1 for one on each core")
    defaults = _installed()[names[0]]
    changed = {key: value for key, value in settings.items() if value != defaults.get(key)}
    return [
        f"hydra/launcher={names[0]}",
        *(f"hydra.launcher.{key}={_to_grammar(value)}" for key, value in changed.items()),
    ]


def run_hydra(argv: list[str], task: "Callable[[DictConfig], None] | None" = None) -> None:
    """Run Hydra's own command line to print a config, complete words, or launch `task`."""
    import hydra

    from captcha_exp.runtime.paths import conf_dir

    sys.argv = [sys.argv[0], *argv]
    run = hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")
    run(task or (lambda _: None))()


def num_parallel(hydra: "DictConfig") -> int:
    """Return the number of concurrent jobs of the joblib launcher, as joblib counts; 1 for others."""
    jobs = int(hydra.launcher.get("n_jobs", 1))
    return jobs if jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + jobs)


def _installed() -> dict[str, dict[str, Any]]:
    """Return the default settings of each installed launcher."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    store = ConfigStore.instance()
    nodes = {
        file.removesuffix(".yaml"): store.load(f"hydra/launcher/{file}").node
        for file in store.list("hydra/launcher")
    }
    return {name: OmegaConf.to_container(node) for name, node in nodes.items()}  # type: ignore[misc]  # mappings


def _to_grammar(value: Any) -> str:
    """Return a value in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_to_grammar(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_to_grammar, value)) + "]"
    return quote(value, interpolations=True) if isinstance(value, str) else json.dumps(value)


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


def check_before_loading(source: Any) -> None:
    """Let a directory of configs refuse a file that would fill the memory, before Hydra reads it."""
    from captcha_exp.config.documents import check_yaml, read_document

    load_config = source.load_config

    def checked(config_path: str) -> Any:
        path = Path(source.path, config_path if config_path.endswith(".yaml") else f"{config_path}.yaml")
        try:
            if path.exists():
                check_yaml(read_document(path).decode("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: {one_line(error)}") from None
        return load_config(config_path)

    source.load_config = checked
