"""The commands, links and language of README.md and docs/.

Every command in a block of README.md or docs/*.md that starts with captcha-exp, make or python is run in this
process, with tiny overrides, or only checked where a comment in the line before the block says so:

    <!-- test: compose -->       parse the arguments and compose the config
    <!-- test: any exit code --> run; a problem that is found is not an error
    <!-- test: run -->           run a Python block with a tiny config; without it, the block is compiled
    <!-- test: after the changes --> run by test_extending.py

Every text block is output, and is compared with that of a command: one after a $ in the block, one that the
mark names, or the last one before the block. Line breaks and the borders of tables do not count, and a line
of dots stands for any text:

    <!-- test: output -->
    <!-- test: masked output -->            any number, hash and run directory is right
    <!-- test: masked output of COMMAND -->
    <!-- test: masked output after a kill --> the first command in the block is interrupted
    <!-- test: masked output after an edit --> a comment is added to config.yaml of the latest run
    <!-- test: sweep -->                    see test_the_output_of_a_sweep
    <!-- test: no output -->                not compared

A command that occurs on several pages is run on the first one, and checked on the others.
The working directory has a folder my_captchas/, the same as held_out/, an image captcha.png, and a folder
captchas/ in which five images cannot be used; `latest` is a tiny finished run.
"""

import ast
import contextlib
import importlib.util
import io
import json
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, edit_record, infos
from omegaconf import DictConfig
from PIL import Image
from support.offline_site import remote_loads
from support.phrases import LIMIT, PhraseCount, count_file, count_files, count_text, prose_of_python

from captcha_exp import compose, load, runs
from captcha_exp.cli import main, output
from captcha_exp.cli.grid import compose_grid
from captcha_exp.cli.hydra_config import try_compose
from captcha_exp.cli.parser import COMMANDS, PROGRAM, build_parser
from captcha_exp.config import CaptchaLibraryConfig, Config
from captcha_exp.data.dataset import Batch
from captcha_exp.data.sources.generators import get_renderer_spec, image_rng
from captcha_exp.errors import ConfigError
from captcha_exp.memory.interval import MiBRange
from captcha_exp.memory.plan import Planner
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import Step, train_step
from captcha_exp.runtime.paths import root_dir
from captcha_exp.sweep import planner
from captcha_exp.sweep.record import Job
from captcha_exp.sweep.results import JobResult
from captcha_exp.sweep.summary import SweepSummary
from captcha_exp.training.recorder import NullTracker

PROJECT = Path(__file__).resolve().parents[1]
README = PROJECT / "README.md"
PAGES = [README, *sorted((PROJECT / "docs").glob("*.md"))]
MARKDOWN = [
    *sorted(PROJECT.glob("*.md")),
    *PAGES[1:],
    *(PROJECT / n / "README.md" for n in ("benchmarks", "tests")),
]
LONG_PAGES = ("sweeps.md", "memory.md", "configuration.md", "resume.md")
"""pages whose commands only `make test-all` runs"""
MAX_README_LINES = 160
NUM_IMAGES = 200

_FENCE = re.compile(
    r"^(?:<!-- test: (?P<mode>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)
_PROGRAMS = (PROGRAM, "make", "python")
_SEPARATORS = {"&&", "||", "|", ";", "&"}
_OUTPUT_MODE = re.compile(
    r"(?P<masked>masked )?output(?P<killed> after a kill)?(?P<edited> after an edit)?(?: of (?P<command>.+))?"
)
_OTHER_MODES = ("", "compose", "any exit code", "run", "after the changes", "sweep", "no output")
_RUN_DIR = re.compile(r"\S*outputs/\d{4}-\d\d-\d\d/\d{6}-[\w.-]+")
_HASH_OR_NUMBER = re.compile(r"\b(?=\w*\d)[0-9a-f]{8,}\b|\d[\d,.:]*(?<![,.:])")
_PROGRESS_LINE = re.compile(r"^.*: \d+%, about .* left\n", re.MULTILINE)


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

    @property
    def is_output(self) -> bool:
        """Whether the block quotes the output of a command that the test runs."""
        return _OUTPUT_MODE.fullmatch(self.mode) is not None

    def quoted_commands(self) -> list[list[str]]:
        """Return the words of each command after a $ in a text block."""
        lines = [line for line in self.text.splitlines() if line.startswith("$ ")]
        return [words for line in lines for words in commands_of(line.removeprefix("$ "))]


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
        if block.language in ("bash", "console") and block.mode not in ("compose", "after the changes")
        for words in block.commands()
    }


# -- commands ------------------------------------------------------------------------------------------------


def run_command(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Run the command in this process; return its exit code and output."""
    monkeypatch.setattr(sys, "argv", [*words])
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        pytest.raises(SystemExit) as ended,
    ):
        main.main()
    print(printed.getvalue())  # noqa: T201 - shown where the test fails
    return int(ended.value.code or 0), printed.getvalue()


def make_tiny(words: Sequence[str], cache: Path) -> list[str]:
    """Return the command with overrides that make it take a second; its own ones come later and win."""
    program, command, *rest = words
    named = "--resume" in rest and rest[rest.index("--resume") + 1] not in ("auto", "never")
    if command not in ("train", "data") or named or "--cfg" in rest:
        return list(words)
    tiny = [*TINY, f"data.cache={cache}", "tracking=none"]
    if "data=folder" in rest:
        tiny = [word for word in tiny if not word.startswith(("data.count", "data.workers", "captcha."))]
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
    """A folder with my_captchas/, held_out/ and captcha.png."""
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
    shutil.copytree(folder / "my_captchas", folder / "held_out")
    shutil.copy(next(iter((folder / "my_captchas").iterdir())), folder / "captcha.png")
    (folder / "captchas").mkdir()
    names = [f"{1000 + number * 37 % 9000}" for number in range(220)]
    for number, name in enumerate([*names, "0012", "0817", "31x7", "912"]):
        pixels = random.Random(number).randbytes(32 * 16)
        Image.frombytes("L", (32, 16), pixels).save(folder / "captchas" / f"{name}.png")
    shutil.copy(folder / "captchas" / "0012.png", folder / "captchas" / "0011.png")
    truncated = folder / "captchas" / "0817.png"
    truncated.write_bytes(truncated.read_bytes()[:-12])  # the IEND chunk
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A root with one tiny finished run."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(root))
        assert run_command(make_tiny([PROGRAM, "train"], cache), monkeypatch)[0] == 0
    return root


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.long] if page.name in LONG_PAGES else [], id=page.name)
        for page in PAGES
    ],
)
def test_commands_run(
    page: Path, images: Path, trained: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each page in a root of its own, its commands in order."""
    shutil.copytree(trained, tmp_path / "root")
    shutil.copytree(images, tmp_path / "cwd")
    monkeypatch.setenv("CAPTCHA_EXP_ROOT", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr("torch.version.cuda", None)  # the docs quote messages of a machine without a GPU
    names: dict[str, Any] = {}
    printed = ""
    run_before: set[tuple[str, ...]] = set().union(*(runs_of(other) for other in PAGES[: PAGES.index(page)]))
    blocks = blocks_of(page)
    for block, next_block in zip_longest(blocks, blocks[1:]):
        if block.language == "python":
            run_python(block, names, cache, monkeypatch)
        elif block.language == "text":
            check_output(block, printed, cache, monkeypatch)
        if block.language not in ("bash", "console") or block.mode == "after the changes":
            continue
        is_quoted = next_block is not None and next_block.is_output and not next_block.quoted_commands()
        for words in block.commands():
            print(f"{block.where}: {shlex.join(words)}")  # noqa: T201 - shown where the test fails
            if words[0] != PROGRAM:
                check_program(words)
            elif block.mode == "compose" or (tuple(words) in run_before and not is_quoted):
                check_composes(words)
            else:
                ended, printed = run_command(make_tiny(words, cache), monkeypatch)
                assert ended == 0 or block.mode == "any exit code", (
                    f"{block.where}: {words}: exit code {ended}"
                )


def run_python(block: Block, names: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile a Python block, and run it with tiny configs if it is marked so."""
    code = compile(block.text, block.where, "exec")
    if block.mode != "run":
        return

    def compose_tiny(*overrides: str) -> DictConfig:
        return compose(*overrides, *TINY, f"data.cache={cache}")

    with monkeypatch.context() as patched:
        patched.setattr(main, "compose", compose_tiny)
        exec(code, names)  # noqa: S102 - a block of our own docs


def check_output(block: Block, printed: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a text block with the output of its commands, or with what was printed before it."""
    mode = _OUTPUT_MODE.fullmatch(block.mode)
    if mode is None:
        return
    quoted = block.quoted_commands()
    if mode["command"]:
        quoted = [shlex.split(mode["command"])]
    if mode["killed"]:
        interrupt_second_epoch(make_tiny(quoted.pop(0), cache), monkeypatch)
    with edited_config() if mode["edited"] else contextlib.nullcontext():
        for words in quoted:
            _, printed = run_command(make_tiny(words, cache), monkeypatch)
    lines = [line for line in block.text.splitlines(keepends=True) if not line.startswith("$ ")]
    printed = printed.replace(str(Path.cwd()), "/home/me")
    assert_quoted("".join(lines), printed, is_masked=mode["masked"] is not None)


@contextlib.contextmanager
def edited_config() -> Iterator[None]:
    """Add a comment to config.yaml of the latest run, and remove it afterwards."""
    path = runs.find_run("latest") / "config.yaml"
    content = path.read_bytes()
    path.write_bytes(content + b"# a comment\n")
    yield
    path.write_bytes(content)


def assert_quoted(quoted: str, printed: str, is_masked: bool = False) -> None:
    """Check that a page quotes this output: line breaks and borders do not count, `...` is any text."""
    normal = _normalize(_PROGRESS_LINE.sub("", printed), is_masked)
    parts = re.split(r"^\.\.\.$", quoted, flags=re.MULTILINE)
    pattern = ".*".join(re.escape(_normalize(part, is_masked)) for part in parts)
    assert re.fullmatch(pattern, normal), f"quoted:\n{_normalize(quoted, is_masked)}\nprinted:\n{normal}"


def _normalize(text: str, is_masked: bool) -> str:
    if is_masked:
        text = _HASH_OR_NUMBER.sub("N", _RUN_DIR.sub("RUN_DIR", text))
    return " ".join(re.sub("[\u2500-\u257f]", " ", text).split())


def interrupt_second_epoch(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the record of a training that was killed in its second epoch and has saved a checkpoint."""

    def train_step_and_stop(state: TrainState, batch: Batch, config: Config) -> Step:
        if state.epoch == 2:
            signal.raise_signal(signal.SIGTERM)
        return train_step(state, batch, config)

    with monkeypatch.context() as patched:
        patched.setattr("captcha_exp.training.train.train_step", train_step_and_stop)
        patched.setattr(runs.Run, "close", lambda *_: None)
        assert run_command(words, monkeypatch)[0] == 143
    for path in root_dir().glob("outputs/*/*/run.json"):
        state = json.loads(path.read_text(encoding="utf-8"))
        if state["status"] == "RUNNING":
            exited = subprocess.Popen([sys.executable, "-c", ""])
            exited.wait()
            edit_record(path.parent, pid=exited.pid)


def test_every_mode_is_known() -> None:
    for page in PAGES:
        for block in blocks_of(page):
            assert block.mode in _OTHER_MODES or block.is_output, block.where


def test_every_quoted_output_is_compared() -> None:
    """A block of text without a mark would be neither run nor compared."""
    for page in PAGES:
        for block in blocks_of(page):
            assert block.language, block.where
            if block.language == "text":
                assert block.is_output or block.mode in ("sweep", "no output"), block.where


@pytest.mark.parametrize(
    ("quoted", "printed", "is_masked", "is_right"),
    [
        ("a b\nc\n", "a  b c\n", False, True),
        ("a\n...\n", "a\nb\nc\n", False, True),
        ("...\nc\n", "a\nb\nc\n", False, True),
        ("b\n", "a\nb\n", False, False),
        ("12 MiB\n", "13 MiB\n", False, False),
        ("1,234 MiB, 0.5 %\n", "13 MiB, 12.25 %\n", True, True),
        ("1,234 MiB\n", "13 GiB\n", True, False),
        (
            "outputs/2026-01-02/030405-a: 901f3c3ea854\n",
            "/x/outputs/2026-01-03/030407-b: 0123456789ab\n",
            True,
            True,
        ),
        (" a  b\n 1  2\n", "┃ a ┃ b ┃\n│ 1 │ 2 │\n└───┘", False, True),
        ("a\n", "planning: 38%, about 34 s left\na\n", False, True),
    ],
)
def test_a_wrong_quote_is_found(quoted: str, printed: str, is_masked: bool, is_right: bool) -> None:
    with contextlib.nullcontext() if is_right else pytest.raises(AssertionError):
        assert_quoted(quoted, printed, is_masked)


def test_the_output_of_a_sweep(
    tiny: Config,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The figures in the block were measured in minutes; its words and layout are those of the code."""
    (block,) = (each for each in blocks_of(PROJECT / "docs" / "sweeps.md") if each.mode == "sweep")
    skipped, _, table = block.text.partition("...\n")
    results = _results_of_table(table)
    output.print_sweep(SweepSummary(results))
    assert_quoted(table, capsys.readouterr().out)

    predicted = results[-1].predicted_mib
    assert predicted is not None
    tensors = re.search(r"\(tensors ([\d,]+) MiB\)", skipped)
    assert tensors is not None
    remedies = " ".join(skipped.partition("set ")[2].split()).split(", or ")
    monkeypatch.setattr("captcha_exp.training.oom.find_remedies", lambda *_: remedies)
    plan = replace(
        Planner(tiny, {"train": 150, "validation": 75, "test": 75}).plan_for(64),
        process_mib=predicted,
        tensors_mib=_number(tensors[1]),
        budget_mib=results[-1].budget_mib,
        fits="does not fit",
    )
    job = Job(number=5, swept=results[-1].swept, choices={}, requested=tiny)
    planned = planner.PlannedJob(job, tiny, {}, plan)
    planner.record_skipped(planned, runs.make_run_dir("skipped"), NullTracker())
    assert_quoted(skipped, infos(caplog)[0])


def _results_of_table(table: str) -> list[JobResult]:
    rows = re.findall(
        r"^ +(\d+) +([\d,]+) to ([\d,]+)(?: +([\d,]+) +fits +([\d,]+) +([\d.]+)% +([\d.]+))?",
        table,
        re.MULTILINE,
    )
    return [
        JobResult(
            number=number,
            name=f"batch_size={size}",
            swept={"train.batch_size": size},
            outcome="finished" if measured else "skipped",
            error=None,
            stop_reason=None,
            attempts=1,
            batch_size=int(size),
            micro_batch_size=None,
            device="cpu",
            budget_mib=MiBRange(1500.0, 1500.0),
            predicted_mib=MiBRange(_number(low), _number(high)),
            fits="fits" if measured else "does not fit",
            measured_mib=_number(measured) if measured else None,
            images_per_second=_number(speed) if measured else None,
            val_accuracy=_number(accuracy) / 100 if measured else None,
            seconds_to_best=_number(seconds) if measured else None,
            test_accuracy=None,
            run_dir=None,
            run_id=None,
            weights_sha256=None,
        )
        for number, (size, low, high, measured, speed, accuracy, seconds) in enumerate(rows, 1)
    ]


def _number(text: str) -> float:
    return float(text.replace(",", ""))


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
    svg = (PROJECT / "docs" / "architecture.svg").read_text(encoding="utf-8")

    assert re.findall(r"^  (\w+)/ ", README.read_text(encoding="utf-8"), re.MULTILINE) == layers[:-1]
    assert re.findall(r'font-family="monospace"[^>]*>(\w+)<', svg) == layers


def missing_names(row: str) -> list[str]:
    """Return the files of a row, and the functions and classes named after each, that do not exist."""
    missing, defined = [], set[str]()
    for name in re.findall(r"`([\w./]+)`", row):
        path = PROJECT / "captcha_exp" / name
        if name.endswith(".py"):
            defined = names_in(path) if path.is_file() else set()
        if not (path.is_file() if name.endswith(".py") else name in defined):
            missing.append(name)
    return missing


def names_in(path: Path) -> set[str]:
    """Return the functions, classes, methods and constants of a module."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name):
                names.add(name)
            case ast.ClassDef(name=name, body=body):
                names |= {
                    name,
                    *(f"{name}.{each.name}" for each in body if isinstance(each, ast.FunctionDef)),
                }
            case ast.Assign(targets=[ast.Name(id=name)]):
                names.add(name)
    return names


def test_the_names_of_the_architecture_page_exist() -> None:
    page = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, _, table = page.partition("## Where things happen")
    rows = re.findall(r"^\| .+\? \| (.+) \|$", table, re.MULTILINE)

    assert len(rows) > 10
    assert {row: missing for row in rows if (missing := missing_names(row))} == {}


@pytest.mark.parametrize(
    ("row", "missing"),
    [
        ("`training/train.py`: `fit`", []),
        ("`training/fit.py`", ["training/fit.py"]),
        ("`training/train.py`: `fitted`", ["fitted"]),
        ("`sweep/planner.py`: `PlannedJob.should_train`", []),
        ("`sweep/planner.py`: `PlannedJob.is_trained`", ["PlannedJob.is_trained"]),
    ],
)
def test_a_wrong_name_is_found(row: str, missing: list[str]) -> None:
    assert missing_names(row) == missing


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
