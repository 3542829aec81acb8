"""Figures of runs and sweeps, drawn by matplotlib without a backend: they are written to files only.

A notebook sets MPLBACKEND for all processes that it starts, and in an environment that lacks its backend
matplotlib cannot be imported. So it is imported here, without this variable.
"""

import contextlib
import os
import sys


def _import_matplotlib() -> None:
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):  # the figures of the user's notebook have this backend
            matplotlib.rcParams["backend"] = backend


_import_matplotlib()
