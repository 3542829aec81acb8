"""`captcha-exp plan`: which module plans, one GPU (`planning`) or several (`planning_cards`).

This module is imported before torch, so that a mistake in the config is reported without waiting for it.
"""

import argparse
import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from captcha_exp.cli import cards
from captcha_exp.cli.composing import compose_checked
from captcha_exp.errors import UserError

MISFIT = 3  # exit code of --must-fit


def plan(arguments: argparse.Namespace) -> tuple[dict[str, Any] | None, list[str]]:
    """Return plans as JSON values, or None if they are printed; and, with --must-fit, what does not fit."""
    names = cards.names_of(arguments.card, arguments.config_dir) if arguments.card else None
    if names is not None and arguments.advise:
        raise UserError(
            f"plan --advise: works for one GPU, but --card={arguments.card} names several; choose one"
        )
    with _without_collector():
        if names is not None:
            configs = cards.configs_of(names, arguments.overrides, arguments.config_dir)
        else:
            # Checked without the machine: what is planned for need not be here.
            words = [*arguments.overrides, *_card_override(arguments.card)]
            config = compose_checked(words, arguments.config_dir).checked(None)
        from captcha_exp.cli import planning, planning_cards
        from captcha_exp.display import Terminal
    if names is not None:
        return planning_cards.run(configs, arguments, Terminal())
    return planning.run(config, arguments, Terminal())


def _card_override(card: str | None) -> list[str]:
    if not card:
        return []
    # In quotes, as Hydra's grammar sees more than a path in some paths.
    quoted = card.replace("\\", "\\\\").replace("'", "\\'")
    return [f"card='{quoted}'" if quoted.endswith((".yaml", ".yml")) else f"card={card}"]


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Import without the garbage collector, which would traverse all objects of torch to free none."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
