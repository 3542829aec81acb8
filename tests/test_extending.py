"""Add a network, a head and a data source as docs/extending.md says.

Each test applies the diffs of a section of the page to a copy of the project, and runs the section's command
there, with tiny overrides.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from conftest import TINY

PROJECT = Path(__file__).resolve().parents[1]
PAGE = PROJECT / "docs" / "extending.md"
_BLOCK = re.compile(r"^( *)```(?P<language>\w+)\n(?P<text>.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks_of_section(title: str, language: str) -> list[str]:
    """Return the blocks of a language in a section of the page."""
    (section,) = re.findall(
        rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [dedent(found["text"]) for found in _BLOCK.finditer(section) if found["language"] == language]


def apply_diff(diff: str, folder: Path) -> None:
    """Apply a diff of one file, whose hunks are separated by @@; without old lines it is a new file."""
    header, _, hunks = diff.partition("\n")
    path = folder / header.removeprefix("--- ")
    for hunk in hunks.split("@@\n"):
        lines = hunk.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        if old:
            text = path.read_text(encoding="utf-8")
            assert f"\n{text}".count(f"\n{old}") == 1, f"{path.name}: must occur exactly once:\n{old}"
            path.write_text(text.replace(old, new), encoding="utf-8")
        else:
            assert not path.exists()
            path.write_text(new, encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("title", ["A network", "A head", "A source"])
def test_the_steps_of_the_page_train(title: str, tmp_path: Path) -> None:
    for name in ("captcha_exp", "conf"):
        shutil.copytree(PROJECT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in blocks_of_section(title, "diff"):
        apply_diff(diff, tmp_path)
    (command,) = blocks_of_section(title, "bash")
    _, train, *overrides = shlex.split(command)
    has_own_model = any(word.startswith("model=") for word in overrides)
    tiny = [word for word in TINY if not (has_own_model and word.startswith("model."))]

    done = subprocess.run(
        [
            *(sys.executable, "-m", "captcha_exp", train),
            *(*tiny, "train.epochs=1", "tracking=none", *overrides),
        ],
        cwd=tmp_path,
        env=os.environ | {"CAPTCHA_EXP_ROOT": str(tmp_path / "root"), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    (saved,) = (tmp_path / "root").glob("outputs/*/*/config.yaml")
    for word in overrides:
        assert f": {word.partition('=')[2]}\n" in saved.read_text(encoding="utf-8"), word
