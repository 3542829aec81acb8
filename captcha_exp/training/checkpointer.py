"""Save checkpoints during training, and stop when asked to."""

import logging
import time
from pathlib import Path

from captcha_exp.config import CHECKPOINT_EVERY_PATTERN, Config
from captcha_exp.model import state as checkpoint
from captcha_exp.model.state import TrainState
from captcha_exp.runtime.shutdown import ShutdownHandler
from captcha_exp.training import sanity

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves checkpoints when they are due, and checks whether training has to stop."""

    def __init__(
        self,
        checkpoint_dir: Path,
        config: Config,
        sanity_checker: sanity.SanityChecker,
        shutdown: ShutdownHandler,
    ) -> None:
        self._checkpoint_dir = checkpoint_dir
        self._sanity_checker, self._shutdown = sanity_checker, shutdown
        parts = CHECKPOINT_EVERY_PATTERN.fullmatch(config.train.checkpoint_every or "")
        self._every, self._unit = (int(parts[1]), parts[2]) if parts else (0, "")
        self._last_saved = time.monotonic()
        self._last_position: tuple[int, bool] | None = None

    def is_due(self, state: TrainState) -> bool:
        """Return whether train.checkpoint_every asks for a checkpoint after this step or epoch."""
        match self._unit:
            case "step":
                return state.progress is not None and state.step % self._every == 0
            case "epoch":
                return state.progress is None and state.epoch % self._every == 0
            case "minute":
                return time.monotonic() - self._last_saved >= 60 * self._every
        return False

    def maybe_save(self, state: TrainState) -> None:
        """Save a checkpoint if one is due after this step or epoch.

        Raises:
            StopRequested: training has to stop.
        """
        if self.is_due(state):
            self.save(state)
        self._shutdown.check_stop()

    def save(self, state: TrainState) -> None:
        """Save a checkpoint; warn if it cannot be written, and continue without it.

        Raises:
            RunFailed: a step was not finite; such a state is never saved.
        """
        position = state.step, state.progress is None
        if position == self._last_position:
            return
        self._sanity_checker.check(state.model, state.epoch)
        try:
            checkpoint.save(self._checkpoint_dir, state)
            self._last_position = position
            logger.debug(f"saved a checkpoint at step {state.step:,} in {self._checkpoint_dir}")
        except OSError as error:
            logger.warning(f"{self._checkpoint_dir}: cannot write a checkpoint: {error}")
        self._last_saved = time.monotonic()
