"""Save checkpoints during training, and stop when asked to."""

import logging
from pathlib import Path

from captcha_exp.config import Config
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
        self._interval = checkpoint.CheckpointInterval(config.train.checkpoint_every)
        self._last_position: tuple[int, bool] | None = None

    def maybe_save(self, state: TrainState) -> None:
        """Save a checkpoint if one is due after this step or epoch.

        Raises:
            StopRequested: training has to stop.
        """
        if self._interval.is_due(state):
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
        self._interval.reset()
