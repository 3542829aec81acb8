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
GENERIC = "generic"  # bounds that hold for any GPU
_YAML_SUFFIXES = (".yaml", ".yml")


def parse_gpu_names(text: str, config_dir: str | None) -> list[str] | None:
    """Return the names and files that `--gpu` lists; None for a single GPU.

    Raises:
        UserError: a name is empty.
    """
    if text == ALL:
        return sorted(set(_list_gpu_files(config_dir)) - {GENERIC})
    if "," not in text or Path(text).exists():  # a path may contain a comma
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"--gpu={text}: a name is empty; separate names or files with single commas")
    return list(dict.fromkeys(names))


def compose_configs(
    names: Sequence[str], overrides: Sequence[str], config_dir: str | None
) -> "dict[str, Config]":
    """Compose the config with each GPU; the keys are the given names and files.

    The rest of the config is composed once. `gpu.KEY=VALUE` changes every GPU; `gpu=` is ignored.

    Raises:
        ConfigError: every mistake, one line each.
    """
    from captcha_exp.config import load_gpu

    gpu_overrides = [text for text in overrides if text.lstrip("+").startswith("gpu.")]
    rest = [t for t in overrides if t not in gpu_overrides and not t.lstrip("+").startswith("gpu=")]
    config = try_compose(rest, config_dir).to_config(None)
    configs: dict[str, Config] = {}
    mistakes: list[str] = []
    for name in names:
        try:
            with_gpu = replace(config, gpu=load_gpu(_find_file(name, config_dir)))
            configs[name] = apply_overrides(with_gpu, gpu_overrides) if gpu_overrides else with_gpu
        except ConfigError as error:
            mistakes += error.lines
    if mistakes:
        raise ConfigError(*dict.fromkeys(mistakes))
    return configs


def _find_file(name: str, config_dir: str | None) -> Path:
    """Return the file of a GPU.

    Raises:
        ConfigError: there is no such file; the line suggests the closest name.
    """
    if name.endswith(_YAML_SUFFIXES):
        return Path(name)
    known = _list_gpu_files(config_dir)
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"--gpu {name}: no such file in conf/gpu; {hint}one of {', '.join(sorted(known))}")
    return known[name]


def _list_gpu_files(config_dir: str | None) -> dict[str, Path]:
    """Return the file of each GPU by name; a file of `config_dir` takes precedence over conf/."""
    from captcha_exp.runtime.paths import conf_dir

    dirs = [conf_dir(), *([Path(config_dir)] if config_dir is not None else [])]
    return {path.stem: path for each in dirs for path in sorted((each / "gpu").glob("*.yaml"))}
