"""The commands, links and language of README.md and docs/.

Every command in a block of README.md or docs/*.md that starts with captcha-exp, make or python is run in this
process, with tiny overrides, or only checked where a comment in the line before the block says so:

    <!-- test: compose -->       parse the arguments and compose the config
    <!-- test: any exit code --> run; a problem that is found is not an error
    <!-- test: run -->           run a Python block; without it, the block is compiled

A command that occurs on several pages is run on the first one, and checked on the others.
The working directory has a folder my_captchas/ and an image captcha.png; `latest` is a tiny finished run.
"""

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from support.offline_site import remote_loads
from support.phrases import LIMIT, PhraseCount, count_file, count_files, count_text, prose_of_python

from captcha_exp import compose, load
from captcha_exp.cli import main
from captcha_exp.cli.grid import compose_grid
from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.cli.parser import COMMANDS, PROGRAM, build_parser
from captcha_exp.config import CaptchaLibraryConfig
from captcha_exp.data.sources.generators import get_renderer_spec, image_rng
from captcha_exp.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[1]
README = PROJECT / "README.md"
PAGES = [README, *sorted((PROJECT / "docs").glob("*.md"))]
MARKDOWN = [
    *sorted(PROJECT.glob("*.md")),
    *PAGES[1:],
    *(PROJECT / n / "README.md" for n in ("benchmarks", "tests")),
]
MAX_README_LINES = 160
NUM_IMAGES = 200

_FENCE = re.compile(
    r"^(?:<!-- test: (?P<mode>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_PROGRAMS = (PROGRAM, "make", "python")
_SEPARATORS = {"&&", "||", "|", ";", "&"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    where: str
    """page:line"""
    language: str
    mode: str
    text: str

    def commands(self) -> list[list[str]]:
        """Return the words of each command that starts with captcha-exp, make or python."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [words for line in lines for words in commands_of(line) if words[0] in _PROGRAMS]


def commands_of(line: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell line, without comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    for is_separator, words in groupby(lexer, key=_SEPARATORS.__contains__):
        if not is_separator:
            yield list(words)


def blocks_of(path: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            where=f"{path.name}:{text.count(chr(10), 0, found.start('text'))}",
            language=found["language"],
            mode=found["mode"] or "",
            text=found["text"],
        )
        for found in _FENCE.finditer(text)
    ]


def runs_of(page: Path) -> set[tuple[str, ...]]:
    """Return the commands that a page has run for real."""
    return {
        tuple(words)
        for block in blocks_of(page)
        if block.language in ("bash", "console") and block.mode != "compose"
        for words in block.commands()
    }


# -- commands ------------------------------------------------------------------------------------------------


def run_command(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", [*words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return int(ended.value.code or 0)


def make_tiny(words: Sequence[str], cache: Path) -> list[str]:
    """Return the command with overrides that make it take a second; its own ones come later and win."""
    program, command, *rest = words
    named = "--resume" in rest and rest[rest.index("--resume") + 1] not in ("auto", "never")
    if command not in ("train", "data") or named or "--cfg" in rest:
        return list(words)
    tiny = [*TINY, f"data.cache={cache}", "tracking=none"]
    if "data=folder" in rest:
        tiny = [word for word in tiny if not word.startswith(("data.count", "data.workers"))]
    flags = [word for word in rest if word == "-m"]
    return [program, command, *flags, *tiny, *(word for word in rest if word != "-m")]


def check_composes(words: Sequence[str]) -> None:
    """Parse the arguments of a command, and compose and check its config, without running it."""
    parsed, unknown = build_parser().parse_known_args(words[1:])
    overrides = list(getattr(parsed, "overrides", ())) + unknown
    assert not [word for word in unknown if word.startswith("-")], f"unknown arguments: {unknown}"
    if words[1] == "reproduce":
        overrides = ["data=folder", "data.path=.", *overrides]  # the run's own config is not known here
    if getattr(parsed, "multirun", False):
        for _, composed in compose_grid(overrides, None).jobs:
            composed.to_config(None)
    else:
        try_compose(overrides, None).to_config(None)
    for name in (getattr(parsed, "gpu", None) or "all").split(","):
        assert name == "all" or (PROJECT / "conf" / "gpu" / f"{name}.yaml").is_file()


def check_program(words: Sequence[str]) -> None:
    """Check that a make target, or a Python script with its options, exists; compile code."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[1] == "-c":
        compile(words[2], "<docs>", "exec")
    elif words[1] == "-m":
        assert importlib.util.find_spec(words[2]) is not None
    else:
        source = (PROJECT / words[1]).read_text(encoding="utf-8")
        assert all(f'"{word}"' in source for word in words[2:] if word.startswith("--"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with my_captchas/ and captcha.png."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "my_captchas").mkdir()
    config = load(compose("experiment=quickstart", "tracking=none"))
    assert isinstance(config.data, CaptchaLibraryConfig)
    spec = get_renderer_spec(config.data)
    render = spec.make_renderer()
    for index in range(NUM_IMAGES):
        rng = image_rng(config.data, index)
        label = spec.sample_label(config.captcha, rng)
        render(label, rng).save(folder / "my_captchas" / f"{index:05}-{label}.png")
    shutil.copy(next(iter((folder / "my_captchas").iterdir())), folder / "captcha.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A root with one tiny finished run."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(root))
        assert run_command(make_tiny([PROGRAM, "train"], cache), monkeypatch) == 0
    return root


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(
    page: Path, images: Path, trained: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page in a root of its own, its commands in order."""
    shutil.copytree(trained, tmp_path / "root")
    shutil.copytree(images, tmp_path / "cwd")
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path / "cwd")
    names: dict[str, Any] = {}
    run_before: set[tuple[str, ...]] = set().union(*(runs_of(other) for other in PAGES[: PAGES.index(page)]))
    for block in blocks_of(page):
        if block.language == "python":
            code = compile(block.text, block.where, "exec")
            if block.mode == "run":
                exec(code, names)  # noqa: S102 - a block of our own docs
        if block.language not in ("bash", "console"):
            continue
        for words in block.commands():
            print(f"{block.where}: {shlex.join(words)}")  # noqa: T201 - shown where the test fails
            if words[0] != PROGRAM:
                check_program(words)
            elif block.mode == "compose" or tuple(words) in run_before:
                check_composes(words)
            else:
                ended = run_command(make_tiny(words, cache), monkeypatch)
                assert ended == 0 or block.mode == "any exit code", (
                    f"{block.where}: {words}: exit code {ended}"
                )


def test_every_mode_is_known() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            assert block.mode in ("", "compose", "any exit code", "run"), block.where


def test_a_command_in_an_unmarked_block_is_not_overlooked() -> None:
    """Blocks without a language, or of text, have no commands except after a prompt, with their output."""
    for page in PAGES:
        for block in blocks_of(page):
            if block.language in ("", "text"):
                assert not re.findall(rf"^(?:{'|'.join(_PROGRAMS)}) ", block.text, re.MULTILINE), block.where


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("captcha-exp train a=1  # why", [["captcha-exp", "train", "a=1"]]),
        ("git clone <x> && cd y", [["git", "clone", "<", "x", ">"], ["cd", "y"]]),
        (
            "captcha-exp runs 'a>1' || [ $? -ne 75 ]",
            [["captcha-exp", "runs", "a>1"], ["[", "$?", "-ne", "75", "]"]],
        ),
        ("#SBATCH --time=1", []),
    ],
)
def test_commands_are_found(line: str, expected: list[list[str]]) -> None:
    assert list(commands_of(line)) == expected


@pytest.mark.parametrize(
    "command",
    [
        "captcha-exp train train.batchsize=64",
        "captcha-exp train model=lstm",
        "captcha-exp train -m train.batch_size=0,64",
        "captcha-exp plan --gpu no-such-gpu",
        "captcha-exp train --no-such-flag",
        "captcha-exp reproduce latest no.such.key=1",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    with pytest.raises((ConfigError, AssertionError, SystemExit)):
        check_composes(shlex.split(command))


@pytest.mark.parametrize("command", ["make no-such-target", "python benchmarks/none.py", "python -c 'a b'"])
def test_a_wrong_program_is_found(command: str) -> None:
    with pytest.raises((AssertionError, OSError, SyntaxError)):
        check_program(shlex.split(command))


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(PROJECT)))
def test_commands_in_the_text_exist(page: Path) -> None:
    """`python FILE` and `captcha-exp COMMAND` between backticks."""
    for code in re.findall(r"`([^`\n]+)`", _without_blocks(page)):
        match code.split():
            case ["python", script, *_] if not script.startswith("-"):
                assert (PROJECT / script).is_file(), code
            case [program, command, *_] if program == PROGRAM and not command.startswith("-"):
                assert command in COMMANDS, code


# -- links, layout, language ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(PROJECT)))
def test_relative_links_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#:]+)(?:#[^)]*)?\)", _without_blocks(page))

    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(
        r": ([\w-]+\.md)$", (PROJECT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE
    )

    assert sorted(listed) == [page.name for page in PAGES[1:]]


def test_the_packages_are_those_of_the_import_contract() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (c["layers"] for c in project["tool"]["importlinter"]["contracts"] if c["name"] == "Layers")
    upwards = [name for name in reversed(layers) if name != "errors"]
    svg = (PROJECT / "docs" / "architecture.svg").read_text(encoding="utf-8")

    assert re.findall(r"^  (\w+)/ ", README.read_text(encoding="utf-8"), re.MULTILINE) == upwards
    assert re.findall(r'font-family="monospace"[^>]*>(\w+)<', svg) == layers


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(PROJECT)))
def test_phrases_of_a_page(page: Path) -> None:
    found = count_file(page)

    assert found.per_thousand <= LIMIT, found.phrases


def test_phrases_of_readme_and_docs() -> None:
    assert count_files(PAGES).per_thousand <= LIMIT


def test_phrases_are_counted() -> None:
    assert count_text("It goes on; nobody told Nobody.") == PhraseCount(
        6, ("goes on", "nobody", "told", "Nobody")
    )
    assert count_text("") == PhraseCount(0, ())
    assert PhraseCount(500, ("told",)).per_thousand == 2.0


def test_prose_of_python_is_comments_and_long_strings() -> None:
    source = '"""Return what it was told."""\nx = "too short"  # nobody\ny = f"{x} is not the same as {x}"\n'
    prose = prose_of_python(source)

    assert ast.parse(source)
    assert sorted(prose.splitlines()) == [" is not the same as ", "# nobody", "Return what it was told."]


@pytest.mark.parametrize(
    ("name", "content", "remote"),
    [
        ("a.html", '<a href="https://x.org/">link</a> <img src="b.png"> <link href="c.css">', []),
        ("a.html", '<script src="https://x.org/a.js"></script>', ["https://x.org/a.js"]),
        ("a.html", '<link rel="stylesheet" href="//x.org/a.css">', ["//x.org/a.css"]),
        ("a.html", '<img srcset="a.png 1x, https://x.org/b.png 2x">', ["https://x.org/b.png"]),
        ("a.html", "<style>@import 'https://x.org/a.css';</style>", ["https://x.org/a.css"]),
        ("a.html", '<p style="background: url(https://x.org/a.png)">', ["https://x.org/a.png"]),
        ("a.css", "a { background: url(data:image/png;base64,AA//BB) }", []),
        ("a.css", "@font-face { src: url('https://x.org/a.woff') }", ["https://x.org/a.woff"]),
        (
            "a.svg",
            '<svg xmlns="http://www.w3.org/2000/svg"><image href="https://x.org/a"/></svg>',
            ["https://x.org/a"],
        ),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(
    name: str, content: str, remote: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)

    assert remote_loads(tmp_path) == [f"{name}: loads {address}" for address in remote]


@pytest.mark.parametrize(
    ("added", "warning"),
    [
        ("", None),
        ("[a link](nowhere.md)", "'nowhere.md'"),
        ("[a link](data.md#nowhere)", "'data.md#nowhere'"),
        ("<script src='https://example.invalid/a.js'></script>", "loads https://example.invalid/a.js"),
    ],
)
def test_make_docs_fails_on_a_warning(added: str, warning: str | None, tmp_path: Path) -> None:
    """The command of `make docs`, on a copy."""
    (recipe,) = re.findall(
        r"^docs:.*\n\t.*\$\(BIN\)/(mkdocs .*)$", (PROJECT / "Makefile").read_text(), re.MULTILINE
    )
    for name in ("mkdocs.yml", "tests/support/offline_site.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    shutil.copytree(PROJECT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "glossary.md").open("a", encoding="utf-8") as file:
        file.write(f"\n{added}\n")
    done = subprocess.run(
        [sys.executable, "-m", *recipe.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == (0 if warning is None else 1), done.stderr
    assert warning is None or warning in done.stderr


def _without_blocks(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
