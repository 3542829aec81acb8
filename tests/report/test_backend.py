"""matplotlib is imported in any environment, and the backend of a notebook is left alone."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import os
import captcha_exp.report
import matplotlib
from matplotlib.figure import Figure
Figure().savefig(os.devnull, format="png")
print(os.environ.get("MPLBACKEND"), dict.__getitem__(matplotlib.rcParams, "backend"))
"""


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("module://matplotlib_inline.backend_inline", "module://matplotlib_inline.backend_inline <object"),
        ("no such backend", "no such backend <object"),
        ("module://a.b", "module://a.b module://a.b"),
        ("svg", "svg svg"),
    ],
)
def test_any_backend_of_the_environment(variable: str, expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "MPLBACKEND": variable},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(expected)
