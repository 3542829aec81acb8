"""The images of a folder are decoded in several processes, with the result of one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from test_duplicates import drawn

ROOT = Path(__file__).resolve().parents[2]
two_cores = pytest.mark.skipif(
    sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and a second core"
)

DECODE = """
import hashlib, os, sys
from captcha_exp import compose, load
from captcha_exp.config import resolve
from captcha_exp.data import sources
from captcha_exp.data.sources import decoder
from captcha_exp.errors import UserError
from captcha_exp.runtime import fork
from captcha_exp.runtime.device import detect_machine

def decode(cores, min_part=10):
    decoder.MIN_PART = min_part
    decoder.count_usable_cores = lambda: cores
    config = load(compose("data=folder", f"data.path={sys.argv[1]}", "tracking=none"))
    config = resolve(config, detect_machine())
    source = sources.make_source(config.data, config.captcha)
    scan = source.scan()
    return scan, source.load_images().tobytes()
"""


@pytest.fixture
def folder(root: Path) -> Path:
    """Create a folder of images in two sizes, of which some are rejected, equal, or used with a remark."""
    directory = root / "images"
    directory.mkdir()
    sample = drawn(40)
    for n, (label, image) in enumerate(sample):
        image.resize((160 - n % 2, 60)).save(directory / f"{n:05}-{label}.png")
    for n in (0, 20, 38):
        (directory / f"{n:05}-{sample[n][0]}_2.png").write_bytes(b"GIF89a")
        sample[n + 1][1].save(directory / f"{n:05}-{sample[n + 1][0]}_3.png")
        sample[n][1].save(
            directory / f"{n:05}-{sample[n][0]}_4.gif", save_all=True, append_images=[sample[3][1]]
        )
    return directory


def run(folder: Path, code: str) -> str:
    """Run code in a new process with a single thread, which may fork, and return its output."""
    command = [sys.executable, "-c", DECODE + textwrap.dedent(code), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert not done.stderr, done.stderr
    return done.stdout.strip()


@two_cores
def test_images_are_the_same_from_one_process_and_from_several(folder: Path) -> None:
    code = """
    one = decode(1)
    assert len(one[0].rejected) == 3 and len(one[0].remarks) == 1 and len(one[0].sizes) == 2, one[0]
    pids = []
    unpatched = decoder.run_in_child
    decoder.run_in_child = lambda function: pids.append(1) or unpatched(lambda: [os.getpid(), function()][1])
    for cores in (2, 3, 5):
        assert decode(cores) == one
    assert decode(7, min_part=1000) == one
    print(len(pids))
    """
    assert run(folder, code) == "6"  # of 2, 3 and 4 parts, the first is decoded here


@two_cores
def test_a_file_that_changes_is_an_error_in_any_process(folder: Path) -> None:
    code = """
    original, parent = decoder._check_unchanged, os.getpid()
    for name in ("00000-", "00039-"):
        def check(candidate, content):
            return original(candidate, b"" if candidate.name.startswith(name) else content)
        decoder._check_unchanged = check
        try:
            decode(2)
        except UserError as error:
            print(error.lines[0].split(" ")[1][:6], "changed while it was read" in error.lines[0])
    """
    assert run(folder, code).splitlines() == ["00000- True", "00039- True"]
