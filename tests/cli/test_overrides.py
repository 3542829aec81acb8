"""Overrides whose text Hydra's grammar cannot read, and Hydra's own habits."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Call
from omegaconf import OmegaConf

from captcha_exp import compose
from captcha_exp.cli.grid import compose_grid
from captcha_exp.cli.overrides import as_typed, parse_override, plain_value, quote
from captcha_exp.errors import ConfigError


def mistakes(*overrides: str, config_dir: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(*overrides, config_dir=None if config_dir is None else str(config_dir))
    return list(caught.value.lines)


def sweep_mistakes(*overrides: str, config_dir: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose_grid(overrides, None if config_dir is None else str(config_dir))
    return list(caught.value.lines)


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    (tmp_path / "experiment" / "team").mkdir(parents=True)
    return tmp_path


def write(directory: Path, name: str, text: str, header: str = "# @package _global_\n") -> Path:
    file = directory / "experiment" / f"{name}.yaml"
    file.write_text(header + text, encoding="utf-8")
    return file


# -- text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *(
            "~",
            "~/captchas",
            "/srv/Übung",
            "/srv/a=b",
            "/srv/x#y",
            "/srv/set (1)",
            "it's",
            'a"b',
            "a;b",
            "a&b!",
        ),
        *(
            "(?P<label>.+?)_.*",
            r"(?P<label>\w{4,5})_\(.*",
            "[^_]+(?P<label>[a-z])",
            "set(1)",
            "{=}",
            "~/a [1,2]",
        ),
        *(
            "的一是",
            "0123456789+-*=?",
            "${}",
            r"C:\Users\Übung",
            "a\\,b;c",
            "~/a\nb",
            "\udcff",
            "<>^`",
            "(((",
            "1=2",
        ),
    ],
)
def test_text_that_the_grammar_cannot_read_is_taken_as_typed(text: str) -> None:
    assert plain_value(parse_override(f"data.path={text}")) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/srv/a b", "/srv/a b"),
        ("'~/a'", "~/a"),
        (r"a\,b", "a,b"),
        ("", ""),
        ("null", None),
        ("1e3", 1000.0),
        ("[a b,1]", ["a b", 1]),
        ("[~/a.ttf, it's.ttf, 'b,c', 1]", ["~/a.ttf", "it's.ttf", "b,c", 1]),
        ("{min: 1, source: by hand (2024)}", {"min": 1, "source": "by hand (2024)"}),
        (" ~/a ", "~/a"),
    ],
)
def test_other_text_keeps_its_meaning_in_hydra(text: str, value: Any) -> None:
    assert plain_value(parse_override(f"data.path={text}")) == value


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("~/a,~/b", ["~/a", "~/b"]),
        ("a b , it's", ["a b", "it's"]),
        ("choice(~/a,(b,c))", ["~/a", "(b,c)"]),
        (r"'a\'b\\',${name}", ["a'b\\", "${name}"]),
    ],
)
def test_commas_outside_of_brackets_separate_the_values_of_a_sweep(text: str, values: list[str]) -> None:
    grid = compose_grid(["data=folder", f"data.path={text}"], None)
    assert [swept["data.path"] for swept, _ in grid.jobs] == values
    paths = [value.replace("${name}", "captcha") for value in values]
    assert [composed.config.data.path for _, composed in grid.jobs] == paths

    (line,) = mistakes("data=folder", f"data.path={text}")
    assert line.endswith(
        f"is a sweep; use train -m (for a list write [1,2], for this text {as_typed('data.path', text)})"
    )


@pytest.mark.parametrize(
    "text", ["'a", "'a'b", "x,'a", "[a,b", "a],b", "a,", "a,,b", "[a,,~]", "(?P<label>[^(,]+)"]
)
def test_text_that_could_mean_several_things_is_an_error_with_the_word_to_type(text: str) -> None:
    (line,) = mistakes("data=folder", f"data.path={text}")

    problem = "its brackets, commas or quotes could mean several things"
    assert line == f"data.path={text}: {problem}; write {as_typed('data.path', text)} for this text"


def test_the_word_to_type() -> None:
    assert as_typed("data.path", "~/a") == "'data.path=~/a'"
    assert as_typed("data.path", "/a,b") == "\"data.path='/a,b'\""
    assert as_typed("data.path", "it's,") == "'data.path=\"it'\"'\"'s,\"'"


def test_the_mistake_of_a_function_is_hydras() -> None:
    (line,) = mistakes("seed=range(a,b)")
    assert line.startswith("seed=range(a,b): mismatch type argument start")


def test_an_interpolation_keeps_its_meaning() -> None:
    assert compose("data=folder", "data.path=~/${name}").data.path == "~/captcha"
    assert compose("data=folder", "data.path=~/${").data.path == "~/${"


@pytest.mark.parametrize(
    "path", ["/a b", "/a'b\"", "/$HOME", "/${x}", "/a\\${x}", "/a\\b", "/a\\'b", "/a\\", "/a\\\n"]
)
@pytest.mark.parametrize("mark", ["'", '"'])
def test_quoted_text_is_the_same_text(path: str, mark: str) -> None:
    assert plain_value(parse_override(f"dir={quote(path, mark)}")) == path
    assert OmegaConf.create({"dir": parse_override(f"dir={quote(path, mark)}").value()}).dir == path


# -- config groups -------------------------------------------------------------------------------------------


def test_an_experiment_of_null_or_in_a_subfolder(experiments: Path) -> None:
    write(experiments, "team/one", "name: one\n")

    assert compose("experiment=alnum", "experiment=null").name == "captcha"
    assert compose("experiment=null", "experiment=team/one", config_dir=str(experiments)).name == "one"
    grid = compose_grid(["experiment=null,team/one"], str(experiments))
    assert [composed.config.name for _, composed in grid.jobs] == ["captcha", "one"]
    (line,) = mistakes("experiment=team/two", config_dir=experiments)
    assert line == (
        "experiment=team/two: no such file in conf/experiment; did you mean team/one? one of alnum, article, "
        "quickstart, team/one, variable_length, null"
    )


def test_an_experiment_without_the_header_is_an_error_with_its_path(experiments: Path) -> None:
    for header in (
        "",
        "# a comment\n# @package _global_\n",
        "# @package data\n",
        "\ufeff# @package _global_\n",
    ):
        file = write(experiments, "team/one", "name: one\n", header)
        hint = (
            "; the file begins with a byte order mark: save it as UTF-8 without" if "\ufeff" in header else ""
        )
        line = f"{file}: its first line must be '# @package _global_'{hint}"
        assert mistakes("experiment=team/one", config_dir=experiments) == [line]
    write(experiments, "two", "defaults: [team/one]\n")
    assert mistakes("experiment=two", config_dir=experiments) == [line]


def test_a_file_that_would_fill_the_memory_is_refused(experiments: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)]
    file = write(experiments, "bomb", "a0: &a0 [1, 1]\n" + "".join(levels))
    (line,) = mistakes("experiment=bomb", config_dir=experiments)
    assert line == f"{file}: more than 10,000 values, aliases expanded"
    assert compose("experiment=alnum", config_dir=str(experiments)).name == "alnum", "others are not affected"


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("data=~/captchas", "did you mean data=folder 'data.path=~/captchas'?"),
        ("tracking=sqlite:///a.db", "did you mean tracking.uri=sqlite:///a.db?"),
        ("hydra/sweeper=optuna", "use hydra/sweeper=basic and list the values"),
        ("hydra/sweeper=basic", "configures a sweep; use train -m"),
        ("hydra.mode=MULTIRUN", "use train -m for a sweep"),
        ("hydra.run.dir=/x", "set CAPTCHA_EXP_ROOT to another directory"),
        ("=1", "write key=value"),
    ],
)
def test_a_habit_that_is_not_supported_is_answered(override: str, hint: str) -> None:
    (line,) = mistakes(override)
    assert hint in line


@pytest.mark.parametrize(
    "content",
    [
        *(
            "[]\n",
            "3\n",
            "defaults: 3\n",
            "defaults: [1]\n",
            "defaults: [team/one]\n",
            "name: &a [*a]\n",
            "? null\n: 1\n",
        ),
        *(
            "a: " + "[" * 2000 + "]" * 2000,
            "seed: " + "9" * 5000,
            "train: {x: .inf}\n",
            "name: ${\n",
            "# @a b c\n",
        ),
    ],
)
def test_a_file_with_odd_content_is_one_line(experiments: Path, content: str) -> None:
    write(experiments, "team/one", content)

    for line in mistakes("experiment=team/one", "train=1.0", config_dir=experiments):
        assert line
        assert "\n" not in line
        assert len(line) < 700


@pytest.mark.parametrize("flag", ["--config-path=x", "--config-name", "-cp", "-cn=a"])
def test_a_flag_of_hydra_is_answered_with_what_to_use_instead(call: Call, flag: str) -> None:
    code, _, error = call("train", flag)
    assert code == 2
    assert error.startswith(f"{flag.partition('=')[0]}: conf/ is always used; --config-dir DIR")


def test_a_home_directory_in_a_flag(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("train", "--config-dir=~/none")[2] == f"--config-dir={tmp_path}/none: no such directory\n"
    assert str(tmp_path / "none.yaml") in call("plan", "--gpu=~/none.yaml")[2]
    assert str(tmp_path / "b.yaml") in call("plan", "--gpu=a10,~/b.yaml")[2]
    assert f"{tmp_path}/none" in call("evaluate", "~/none")[2]


# -- sweeps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=range(3,1)", "seed=range(3,1): gives no value"),
        ("seed=range(1,2,0)", "seed=range(1,2,0): range() arg 3 must not be zero"),
        ("seed=range(0,100000)", "seed=range(0,100000): gives more than 10,000 values"),
        ("model=glob(x*)", "model=glob(x*): gives no value; glob chooses from compact, resnet18"),
        (
            "name=glob(/*)",
            "name=glob(/*): gives no value; glob chooses from the files of a config group; write the values",
        ),
        ("hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs belongs to joblib; add hydra/launcher=joblib"),
        ("+hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs belongs to joblib; add hydra/launcher=joblib"),
        ("hydra.launcher.x=2", "hydra.launcher.x: unknown setting of the launcher; remove it"),
    ],
)
def test_a_sweep_that_cannot_run_is_one_line(override: str, line: str) -> None:
    assert sweep_mistakes(override) == [line]


@pytest.mark.parametrize("jobs", ["auto", "0", "null"])
def test_the_number_of_parallel_jobs_is_checked_before_the_sweep(jobs: str) -> None:
    (line,) = sweep_mistakes("hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}", "seed=1,2")
    assert f"hydra.launcher.n_jobs={jobs}: " in line


@pytest.mark.parametrize(
    ("hydra", "line"),
    [
        (
            "{sweeper: {params: {seed: 'range(3,1)'}}}",
            "hydra.sweeper.params: seed=range(3,1): gives no value",
        ),
        (
            "{sweeper: {params: {seed: [1, 2]}}}",
            "hydra.sweeper.params.seed: must be text, as in '1,2' for two values or '[1,2]' for a list",
        ),
        (
            "{sweeper: {params: {seed: null}}}",
            "hydra.sweeper.params.seed: must be text, as in '1,2' for two values or '[1,2]' for a list",
        ),
        ("{launcher: {n_jobs: 2}}", "hydra.launcher.n_jobs belongs to joblib; add hydra/launcher=joblib"),
    ],
)
def test_a_sweep_of_a_file_that_cannot_run_is_one_line(experiments: Path, hydra: str, line: str) -> None:
    write(experiments, "grid", f"hydra: {hydra}\n")
    assert sweep_mistakes("experiment=grid", config_dir=experiments) == [line]


def test_another_sweeper_is_not_supported(experiments: Path) -> None:
    write(experiments, "grid", "defaults: [override /hydra/sweeper: optuna]\n")

    for lines in (
        sweep_mistakes("hydra/sweeper=optuna", "seed=1,2"),
        sweep_mistakes("experiment=grid", config_dir=experiments),
    ):
        assert [line.partition(",")[0] for line in lines] == ["hydra/sweeper=optuna: not supported"]
    overrides = ["experiment=grid", "hydra/sweeper=basic", "seed=1,2"]
    assert len(compose_grid(overrides, str(experiments)).jobs) == 2


def test_a_swept_file_does_not_configure_the_launcher(experiments: Path) -> None:
    write(experiments, "parallel", "defaults: [override /hydra/launcher: joblib]\n")

    (line,) = sweep_mistakes("experiment=alnum,parallel", config_dir=experiments)
    assert line.startswith("hydra/launcher=joblib: is set in a swept file")
    assert line.endswith("; with experiment=parallel")
    overrides = ["experiment=alnum,parallel", "hydra/launcher=joblib"]
    assert compose_grid(overrides, str(experiments)).launcher_overrides == ["hydra/launcher=joblib"]


def test_a_file_cannot_name_code_for_hydra_to_run(experiments: Path) -> None:
    write(experiments, "code", "hydra: {callbacks: {a: {_target_: os.getcwd}}}\n")
    (line,) = mistakes("experiment=code", config_dir=experiments)
    assert line == "hydra.callbacks: has no effect, Hydra only composes the config; remove it"
    write(experiments, "code", "hydra: {launcher: {_target_: os.getcwd}}\n")
    (line,) = sweep_mistakes("experiment=code", config_dir=experiments)
    assert line.startswith("hydra.launcher: has the class of no installed launcher")


@pytest.mark.parametrize("words", [("-m", "seed=1,2"), ("experiment=grid",)])
def test_cfg_prints_every_job_of_a_sweep(call: Call, experiments: Path, words: tuple[str, ...]) -> None:
    write(experiments, "grid", "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}\n")
    code, out, _ = call("train", "--config-dir", str(experiments), "--cfg", "job", *words)

    assert code == 0
    assert [line for line in out.splitlines() if line.startswith(("---", "#", "seed"))] == [
        *("---", "# job 1: seed=1", "seed: 1"),
        *("---", "# job 2: seed=2", "seed: 2"),
    ]


def test_cfg_prints_hydras_own_config(call: Call) -> None:
    assert call("train", "--cfg", "hydra", "data=folder", "data.path=~/a")[1].startswith("hydra:\n")
    assert "\nseed: 5\n" in call("train", "--cfg", "all", "seed=5")[1]


def test_a_mistake_of_some_jobs_names_them(call: Call) -> None:
    _, _, error = call("train", "-m", "data=wheezy,captcha", "data.font_sizes=[30]", "seed=1,2")
    assert error.endswith("; with data=captcha\n")
    _, _, error = call("train", "-m", "train.batch_size=4,8", "train.micro_batch_size=4,8")
    assert error.endswith("; with train.batch_size=4 train.micro_batch_size=8\n")
    _, _, error = call("train", "-m", "seed=1,2", "train.batch_size=0")
    assert "; with" not in error
