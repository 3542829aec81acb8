"""The command `calibrate`: write the file of the GPU at hand, or of one that a GPU session measured."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.cli.parser import PROGRAM
from captcha_exp.errors import UserError

if TYPE_CHECKING:
    from captcha_exp.config import GpuSpec, Machine


def calibrate(
    arguments: argparse.Namespace, detect_machine: Callable[[], "Machine"]
) -> "tuple[GpuSpec, Path]":
    """Return the specification of the GPU and the file it was written to.

    Raises:
        UserError: no CUDA GPU, an invalid session, or a file that exists; the line says what to do.
    """
    options = {
        "name": arguments.name,
        "config_dir": arguments.config_dir,
        "force": arguments.force,
        "command": [PROGRAM, *sys.argv[1:]],
    }
    if arguments.session is not None:
        return _calibrate_from_session(arguments, options)
    return _calibrate_this_gpu(arguments, detect_machine(), options)


def _calibrate_this_gpu(
    arguments: argparse.Namespace, machine: "Machine", options: dict[str, Any]
) -> "tuple[GpuSpec, Path]":
    # By default the article's network and the compact one, on the same images.
    overridden = {text.partition("=")[0] for text in arguments.overrides}
    defaults = (("experiment=article",), ("experiment=article", "model=compact"))
    remaining = (tuple(w for w in words if w.partition("=")[0] not in overridden) for words in defaults)
    configs = [
        try_compose([*words, *arguments.overrides], arguments.config_dir).to_config(None)
        for words in dict.fromkeys(remaining)
    ]
    from captcha_exp.memory.calibrate import calibrate

    return calibrate(configs, machine, **options)


def _calibrate_from_session(arguments: argparse.Namespace, options: dict[str, Any]) -> "tuple[GpuSpec, Path]":
    if arguments.overrides:
        raise UserError(
            f"{arguments.overrides[0]}: calibrate --from takes no overrides, it uses the session's config"
        )
    known = try_compose(["gpu=generic"], arguments.config_dir).to_config(None).gpu
    from captcha_exp.memory.calibrate import calibrate_from_session

    return calibrate_from_session(Path(arguments.session), known, **options)
