"""The command line: arguments, exit codes, messages, completion, and import time."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, Call
from omegaconf import OmegaConf

from captcha_exp import compose
from captcha_exp.cli import main as cli

COMMANDS = [
    *("train", "data", "plan", "evaluate", "reproduce", "predict", "export"),
    *("report", "watch", "runs", "diff", "sync", "ui", "calibrate", "doctor"),
]


def test_each_mistake_is_one_line_and_nothing_is_created(shell: Call, root: Path) -> None:
    code, out, err = shell("train", "captcha.widht=56", "train.batch_size=abc", "seed=null")
    assert (code, out) == (2, "")
    assert sorted(line.split(":")[0] for line in err.splitlines()) == [
        "captcha.widht=56",
        "seed=null",
        "train.batch_size=abc",
    ]
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "line"),
    [(signal.SIGINT, "captcha-exp: interrupted\n"), (signal.SIGTERM, "captcha-exp: stopped by SIGTERM\n")],
)
def test_a_signal_before_anything_is_created_is_confirmed(
    number: signal.Signals, line: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_dispatch", lambda _: os.kill(os.getpid(), number))
    try:
        with pytest.raises(SystemExit) as exited:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (exited.value.code, capfd.readouterr().err) == (128 + number, line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["train", "hydra.run.dir=x"], r"hydra\.run\.dir=x: .+"),
        (["train", "hydra/launcher=joblib"], r"hydra/launcher=joblib: configures .+; use train -m"),
        (["train", "hydra=x"], r"hydra=x: has no effect, .+"),
        (["train", "hydra/help=default"], r"hydra/help=default: has no effect, .+"),
        (["train", "train.batch_size=25,50"], r"train\.batch_size=25,50: is a sweep; .+"),
        (["train", "train.batch_size=[1"], r"train\.batch_size=\[1: must be a whole number, .+"),
        (
            ["train", "experiment=typo"],
            r"experiment=typo: .+ one of alnum, article, quickstart, variable_length, null",
        ),
        (["train", "train=null"], r"train=null: .+"),
        (["train", "--json", "seed=-1"], r"seed=-1: must be .+"),
        (["train", "--cfg", "job", "experiment=typo"], r"experiment=typo: .+"),
        (["train", "--config-dir", "/nowhere"], r"--config-dir=/nowhere: .+"),
        (["data", "data.count=0"], r"data\.count=0: must be .+"),
        (["ui", "tracking=none"], r"tracking=none: .+ use tracking=mlflow"),
        (["evaluate", "nosuchrun"], r"'nosuchrun' is not a run: .+captcha-exp runs.+"),
        (["runs", "x"], r"x: invalid condition; .+"),
        (["evaluate", "latest"], r"latest: no runs in .+ captcha-exp train creates one"),
        (["fly"], r"fly: unknown command; one of train, data, .+, doctor"),
        (["trian", "seed=1"], r"trian: unknown command; did you mean train\?"),
        (["train", "tain.epochs=1"], r"tain: unknown key; did you mean train\?"),
        (["train", "xyz=1"], r"xyz=1: unknown key; valid keys: augment, captcha, .+, train"),
        (["train", "lr=0.1"], r"lr=0\.1: unknown key; did you mean train\.learning_rate\?"),
        (["data", "data.path=x"], r"data\.path=x: unknown key; it is a key of data=folder; add that"),
        (["data", "my/set"], r"'my/set': invalid override; for a folder .+ data=folder data\.path=my/set"),
        (["plan", "--card", "h200"], r"--card: was renamed to --gpu"),
        (["plan", "--card=h200", "--json"], r"--card: was renamed to --gpu"),
    ],
)
def test_each_invalid_call_is_one_line(call: Call, root: Path, words: list[str], line: str) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert re.fullmatch(line + "\n", err)
    assert list(root.iterdir()) == []


def test_a_flag_for_a_setting_is_answered_with_its_form(call: Call) -> None:
    code, _, err = call("train", "--epochs", "3")
    assert code == 2
    assert err.endswith("unrecognized arguments: --epochs; settings have no dashes, as in train.epochs=3\n")


def test_overrides_are_not_called_required(call: Call) -> None:
    code, _, err = call("reproduce")
    assert code == 2
    assert err.endswith("the following arguments are required: RUN\n")


def test_outputs_on_a_disk_that_is_not_mounted_is_named(call: Call, root: Path) -> None:
    (root / "outputs").symlink_to(root / "disk")
    problem = f"{root}/outputs: is a symbolic link to {root}/disk, which does not exist"
    remedy = "mount its disk, or remove the link"
    for words in (["runs"], ["evaluate", "latest"], ["train", "tracking=none", "data.count=50"]):
        assert call(*words) == (2, "", f"{problem}; {remedy}\n")
    code, out, _ = call("doctor", "--json", "tracking=none", "device.name=cpu")
    findings = [each for each in json.loads(out) if each["level"] == "problem"]
    assert (code, findings) == (1, [{"level": "problem", "message": problem, "remedy": remedy}])


@pytest.mark.parametrize("words", [[], ["train", "--nosuchflag"], ["evaluate"], ["diff", "x"]])
def test_unknown_arguments_print_the_usage(call: Call, words: list[str]) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith("usage: captcha-exp")


@pytest.mark.parametrize(
    "words",
    [
        ["--json", "seed=null", "train.epochs=0"],
        ["seed=null", "--json", "train.epochs=0"],
        ["seed=null", "train.epochs=0", "--json"],
    ],
)
def test_flags_and_overrides_may_be_mixed(call: Call, words: list[str]) -> None:
    code, _, err = call("train", *words)
    assert code == 2
    assert sorted(line.split(":")[0] for line in err.splitlines()) == ["seed=null", "train.epochs=0"]


def test_a_full_disk_is_one_line_with_exit_code_1(
    call: Call, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = call("train", *TINY, f"data.cache={cache}", "tracking=none")
    assert code == 1
    line = err.splitlines()[-1]
    assert line.endswith(": No space left on device; free up disk space and start again")


def test_help_lists_every_command(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert re.findall(r"^    (\w+) ", out, re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(call: Call, command: str) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: captcha-exp {command}")
    assert "[-q | -v]" in out


# -- output --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ([], ["Rendered N images", "warning: PATH: is damaged"]),
        (["-q"], ["warning: PATH: is damaged"]),
        (["--quiet"], ["warning: PATH: is damaged"]),
        (["-v"], ["captcha_exp.data.dataset: no cached images at PATH", "Rendered N images"]),
        (["--verbose"], ["captcha_exp.data.dataset: no cached images at PATH", "Rendered N images"]),
    ],
    ids=str,
)
def test_quiet_and_verbose(
    call: Call, root: Path, tmp_path: Path, flag: list[str], expected: list[str]
) -> None:
    """In one process after the other calls, so each line would be printed several times."""
    words = ["data", *flag, "--json", *TINY, "data.count=40", f"data.cache={tmp_path}/cache"]
    code, out, err = call(*words)
    (images,) = tmp_path.glob("cache/*.safetensors")
    images.write_bytes(images.read_bytes()[:-1])
    same_code, same_out, damaged = call(*words)
    assert (code, same_code, out) == (0, 0, same_out)
    assert json.loads(out)["images"] == 40
    lines = [
        re.sub(r"(Rendered) \d+ (images).*", r"\1 N \2", line.replace(str(images), "PATH"))
        for line in (err + damaged).splitlines()
    ]
    for text in expected:
        assert sum(line.startswith(text) for line in lines) == 1 + (text.startswith("Rendered")), lines
    assert any("captcha_exp." in line for line in lines) == (flag in (["-v"], ["--verbose"]))
    assert any(line.startswith("Rendered") for line in lines) == (flag not in (["-q"], ["--quiet"]))


def test_quiet_and_verbose_exclude_each_other(call: Call) -> None:
    code, out, err = call("runs", "-q", "-v")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith("argument -v/--verbose: not allowed with argument -q/--quiet")


@pytest.mark.long
@pytest.mark.parametrize("flag", ["-q", "-v"])
def test_a_sweep_hands_the_flag_to_its_workers(shell: Call, root: Path, cache: Path, flag: str) -> None:
    words = (*TINY, f"data.cache={cache}", "tracking=none", "train.epochs=1")
    code, out, err = shell("train", "-m", flag, "--json", *words)
    assert code == 0
    (log,) = Path(json.loads(out)["run_dir"]).glob("*.log")
    if flag == "-q":
        assert (err, log.read_text()) == ("", "")
    else:
        line = "captcha_exp.training.checkpointer: saved a checkpoint at step "
        assert f"] {line}" in err, "of the worker, after the name of its job"
        assert log.read_text().count(line) == err.count(line)


def test_cfg_job_prints_the_composed_config_as_yaml(call: Call, root: Path) -> None:
    code, out, err = call("train", "--cfg", "job", "experiment=alnum", "captcha.width=77")
    assert (code, err) == (0, "")
    assert OmegaConf.create(out) == compose("experiment=alnum", "captcha.width=77")
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("kind", ["job", "all"])
def test_cfg_includes_the_config_dir(
    shell: Call, root: Path, tmp_path_factory: pytest.TempPathFactory, kind: str
) -> None:
    config_dir = tmp_path_factory.mktemp("conf")
    (config_dir / "captcha").mkdir()
    (config_dir / "captcha/mine.yaml").write_text("defaults: [digits]\nwidth: 99\n")
    code, out, err = shell("train", "--cfg", kind, "--config-dir", str(config_dir), "captcha=mine")
    assert (code, err) == (0, "")
    assert OmegaConf.select(OmegaConf.create(out), "captcha.width") == 99
    assert list(root.iterdir()) == []


@pytest.mark.parametrize(
    ("default", "line"),
    [
        ("override /train: few", "train/few: was renamed to train=small_data"),
        ("override /card: gtx1650", "card: was renamed to gpu"),
    ],
)
def test_an_old_name_in_a_defaults_list_is_answered_with_the_new_one(
    call: Call, tmp_path_factory: pytest.TempPathFactory, default: str, line: str
) -> None:
    config_dir = tmp_path_factory.mktemp("conf")
    (config_dir / "experiment").mkdir()
    (config_dir / "experiment/mine.yaml").write_text(f"# @package _global_\ndefaults:\n  - {default}\n")
    code, out, err = call("train", "--config-dir", str(config_dir), "experiment=mine")
    assert (code, out, err) == (2, "", f"{line}\n")


def test_runs_of_an_empty_root(call: Call, root: Path) -> None:
    assert call("runs") == (0, f"no runs in {root / 'outputs'} yet\n", "")
    code, out, _ = call("runs", "--json")
    assert (code, json.loads(out)) == (0, [])
    assert list(root.iterdir()) == []


# -- completion ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("captcha-exp ", COMMANDS),
        ("captcha-exp tr", ["train"]),
        (
            "captcha-exp train experiment=",
            ["experiment=alnum", "experiment=article", "experiment=quickstart", "experiment=variable_length"],
        ),
        ("captcha-exp train seed=1 captcha.wid", ["captcha.width="]),
        ("captcha-exp data data=w", ["data=wheezy"]),
    ],
)
def test_completion_of_commands_choices_and_keys(shell: Call, line: str, completions: list[str]) -> None:
    code, out, err = shell("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line)))
    assert (code, err) == (0, "")
    assert out.split() == completions


def test_bash_completion_script(shell: Call) -> None:
    code, out, _ = shell("-sc", "install=bash")
    assert code == 0
    assert re.search(r"^COMP_WORDBREAKS=.* complete .* -F hydra_bash_completion \S+$", out, re.MULTILINE)


# -- start-up ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import captcha_exp", "torch mlflow hydra matplotlib omegaconf pydantic numpy PIL"),
        ("import captcha_exp.cli.main", "torch mlflow hydra matplotlib omegaconf pydantic numpy PIL"),
        (
            "import sys, contextlib, captcha_exp.cli.main\n"
            "sys.argv = ['captcha-exp', '--help']\n"
            "with contextlib.suppress(SystemExit): captcha_exp.cli.main.main()",
            "torch mlflow hydra matplotlib omegaconf pydantic numpy PIL",
        ),
        ("from captcha_exp import compose; compose()", "torch mlflow matplotlib numpy"),
        ("import captcha_exp.config", "torch mlflow hydra matplotlib"),
        ("import captcha_exp.data.alphabet", "torch mlflow hydra matplotlib omegaconf pydantic"),
        ("import captcha_exp.data.images", "torch mlflow hydra matplotlib"),
        ("import captcha_exp.training.train", "mlflow hydra"),
    ],
)
def test_imports_are_lazy(code: str, unwanted: str) -> None:
    listing = "import sys; print('loaded:', *sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\n{listing}"], capture_output=True, text=True, check=True
    ).stdout
    loaded = {name.partition(".")[0] for name in out.rpartition("loaded:")[2].split()}
    assert loaded & set(unwanted.split()) == set()
