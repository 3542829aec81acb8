"""The GPUs of `plan --gpu`: all of conf/gpu/, a list, or one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from captcha_exp.cli.hydra_config import apply_overrides, try_compose
from captcha_exp.errors import ConfigError, UserError
from captcha_exp.runtime.paths import find_gpu_file, list_gpu_files

if TYPE_CHECKING:
    from captcha_exp.config import Config

ALL = "all"
GENERIC = "generic"  # bounds that hold for any GPU


def parse_gpu_names(text: str, config_dir: str | None) -> list[str] | None:
    """Return the names and files that `--gpu` lists; None for a single GPU.

    Raises:
        UserError: a name is empty.
    """
    if text == ALL:
        return sorted(set(list_gpu_files(config_dir)) - {GENERIC})
    names = [name.strip() for name in text.split(",")]
    if Path(text).is_file() or names == [text] != [""]:  # a path may contain a comma
        return None
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
            with_gpu = replace(config, gpu=load_gpu(find_gpu_file(name, config_dir)))
            configs[name] = apply_overrides(with_gpu, gpu_overrides) if gpu_overrides else with_gpu
        except ConfigError as error:
            mistakes += error.lines
    if mistakes:
        raise ConfigError(*dict.fromkeys(mistakes))
    return configs
