"""`captcha-exp plan`: compose the config for one GPU or several, and plan (`plan_report`).

This module does not import torch: a mistake in the config is reported without waiting for that.
"""

import argparse
import contextlib
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from captcha_exp.cli import gpu_specs
from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.cli.overrides import quote
from captcha_exp.errors import UserError
from captcha_exp.runtime import fork

if TYPE_CHECKING:
    from captcha_exp.config import CaptchaConfig, Config

MISFIT_EXIT_CODE = 3  # exit code of --must-fit


def plan(arguments: argparse.Namespace) -> tuple[dict[str, Any] | None, list[str]]:
    """Return plans as JSON values, or None if they are printed, and the misfits for --must-fit."""
    names = (
        gpu_specs.parse_gpu_names(arguments.gpu, arguments.config_dir) if arguments.gpu is not None else None
    )
    if names is not None and arguments.advise:
        raise UserError(
            f"plan --advise: works for one GPU, but --gpu={arguments.gpu} names several; choose one"
        )
    with contextlib.ExitStack() as stack:
        with _gc_disabled():
            if names is not None:
                configs = gpu_specs.compose_configs(names, arguments.overrides, arguments.config_dir)
            else:
                # Not checked against the machine: the planned device may be another one.
                overrides = [
                    *arguments.overrides,
                    *([_gpu_override(arguments.gpu)] if arguments.gpu else []),
                ]
                config = try_compose(overrides, arguments.config_dir).to_config(None)
                configs = {config.gpu.name: config}
            count = stack.enter_context(_image_counter(next(iter(configs.values()))))
            from captcha_exp.cli import plan_report
        return plan_report.run(configs, names is not None, arguments, count)


@contextlib.contextmanager
def _image_counter(
    config: "Config",
) -> Iterator[Callable[["Config"], tuple["CaptchaConfig", dict[str, int]]]]:
    """Yield a function of the resolved config: its captcha group without `auto`, and images per split.

    Generated images are counted in a child process while this one imports torch, which takes as long. A
    folder is read in this process, which shows progress and warnings.
    """
    from captcha_exp.config import FolderConfig
    from captcha_exp.data.splits import generated_split_sizes

    if not isinstance(config.data, FolderConfig):
        with fork.run_in_child(partial(generated_split_sizes, config)) as wait:
            yield lambda resolved: (resolved.captcha, wait())
        return

    def count(resolved: "Config") -> tuple["CaptchaConfig", dict[str, int]]:
        from captcha_exp.data import dataset

        spec = dataset.inspect_dataset(resolved)
        return spec.config.captcha, spec.split_sizes

    yield count


def _gpu_override(name: str) -> str:
    is_file = name.endswith((".yaml", ".yml"))  # a path may have characters with a meaning in Hydra's grammar
    return f"gpu={quote(name) if is_file else name}"


@contextlib.contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable the garbage collector during imports: it would traverse torch's objects and free none."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
