"""The GPUs of `plan --gpu`: all of conf/gpu/, a list, or one."""

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from captcha_exp.cli.hydra_config import apply_overrides, try_compose
from captcha_exp.errors import ConfigError, UserError

if TYPE_CHECKING:
    from captcha_exp.config import Config

ALL = "all"
GENERIC = "generic"  # bounds of any GPU: not one that a person can choose
_YAML_SUFFIXES = (".yaml", ".yml")


def parse_gpu_names(text: str, config_dir: str | None) -> list[str] | None:
    """Return the names and files that `--gpu` lists; None where it names one GPU.

    Raises:
        UserError: a name is empty, or there is nothing to list.
    """
    if text == ALL:
        return sorted(set(_list_gpu_files(config_dir)) - {GENERIC})
    if "," not in text or Path(text).exists():  # a path may contain a comma
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(
            f"--gpu={text}: a name is empty; write names or files with single commas between them"
        )
    return list(dict.fromkeys(names))


def compose_configs(
    names: Sequence[str], overrides: Sequence[str], config_dir: str | None
) -> "dict[str, Config]":
    """Return the config with each GPU, by the name or file that was given.

    The rest of the config is composed once; `card.KEY=VALUE` changes every GPU, `gpu=` none.

    Raises:
        ConfigError: every mistake, one line each.
    """
    from captcha_exp.config import load_gpu

    of_cards = [word for word in overrides if word.lstrip("+").startswith("card.")]
    rest = [word for word in overrides if word not in of_cards and not word.lstrip("+").startswith("gpu=")]
    config = try_compose(rest, config_dir).to_config(None)  # without the machine: the GPUs need not be here
    configs: dict[str, Config] = {}
    mistakes: list[str] = []
    for name in names:
        try:
            found = replace(config, gpu=load_gpu(_find_file(name, config_dir)))
            configs[name] = apply_overrides(found, of_cards) if of_cards else found
        except ConfigError as error:
            mistakes += error.lines
    if mistakes:
        raise ConfigError(*dict.fromkeys(mistakes))
    return configs


def _find_file(name: str, config_dir: str | None) -> Path:
    """Return the file of a GPU.

    Raises:
        ConfigError: no such GPU is known; the line has the nearest name.
    """
    if name.endswith(_YAML_SUFFIXES):
        return Path(name)
    known = _list_gpu_files(config_dir)
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"--gpu {name}: there is no such file in conf/gpu; {hint}one of {', '.join(sorted(known))}"
        )
    return known[name]


def _list_gpu_files(config_dir: str | None) -> dict[str, Path]:
    """Return the file of each GPU, by its name; a file of `config_dir` hides one of conf/."""
    from captcha_exp.runtime.paths import conf_dir

    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir={config_dir}: there is no such folder")
    folders = [conf_dir(), *([Path(config_dir)] if config_dir is not None else [])]
    return {path.stem: path for folder in folders for path in sorted((folder / "gpu").glob("*.yaml"))}
