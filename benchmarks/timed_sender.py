"""Run captcha_exp, and print how much CPU time the thread that sends to MLflow used during the training.

python benchmarks/timed_sender.py train ...
"""

import sys
import time
from unittest import mock

from captcha_exp.cli import main
from captcha_exp.tracking import tracker

LABEL = "CPU seconds of the MLflow thread:"


class TimedSender(tracker.Sender):
    """A sender that prints the CPU time of its thread at the end of the training."""

    def finish(self) -> None:
        """Print the CPU time so far, and finish."""
        assert self._thread.ident is not None
        seconds = 0.0
        if self._thread.is_alive():
            seconds = time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))
        print(LABEL, f"{seconds:.3f}", file=sys.stderr, flush=True)
        super().finish()


if __name__ == "__main__":
    with mock.patch.object(tracker, "Sender", TimedSender):
        main.main()
