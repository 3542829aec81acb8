"""The command `calibrate`: measure the GPU of this machine and write its file."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.cli.parser import PROGRAM

if TYPE_CHECKING:
    from captcha_exp.config import Config, GpuSpec, Machine


def calibrate(
    arguments: argparse.Namespace, detect_machine: Callable[[], "Machine"]
) -> "tuple[GpuSpec, Path]":
    """Return the specification of the GPU and the file it was written to.

    Raises:
        UserError: no CUDA GPU, or a file that exists; the line says what to do.
    """
    configs = _compose_configs(arguments)
    from captcha_exp.memory import calibrate as calibration

    command = [PROGRAM, *sys.argv[1:]]

    def find_path(gpu_name: str) -> "Path":
        return calibration.gpu_file_path(gpu_name, arguments.name, arguments.config_dir, arguments.force)

    return calibration.calibrate(configs, detect_machine(), find_path, command)


def _compose_configs(arguments: argparse.Namespace) -> "list[Config]":
    """Compose the configs to measure: by default the article's network and the compact one, on its images."""
    overridden = {text.partition("=")[0] for text in arguments.overrides}
    defaults = (("experiment=article",), ("experiment=article", "model=compact"))
    remaining = (tuple(w for w in words if w.partition("=")[0] not in overridden) for words in defaults)
    return [
        try_compose([*words, *arguments.overrides], arguments.config_dir).to_config(None)
        for words in dict.fromkeys(remaining)
    ]
