"""The grid of a sweep: expansion of overrides, and their mistakes."""

from pathlib import Path

import pytest

from captcha_exp.cli.grid import compose_grid
from captcha_exp.errors import ConfigError


def expand(*overrides: str, config_dir: Path | None = None) -> list[dict[str, str]]:
    grid = compose_grid(overrides, None if config_dir is None else str(config_dir))
    return [swept for swept, _ in grid.jobs]


def mistakes_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose_grid(overrides, None)
    return list(caught.value.lines)


def test_the_last_key_varies_fastest() -> None:
    assert expand("train.batch_size=32,64", "name=x", "seed=0,1") == [
        {"train.batch_size": "32", "seed": "0"},
        {"train.batch_size": "32", "seed": "1"},
        {"train.batch_size": "64", "seed": "0"},
        {"train.batch_size": "64", "seed": "1"},
    ]


@pytest.mark.parametrize(
    ("override", "key", "values"),
    [
        ("train.batch_size=range(10,40,10)", "train.batch_size", ["10", "20", "30"]),
        ("train.epochs=choice(1,3)", "train.epochs", ["1", "3"]),
        ("model=glob(*)", "model", ["compact", "resnet18"]),
        ("model.channels=[4,8],[4,8,8]", "model.channels", ["[4,8]", "[4,8,8]"]),
        ("captcha.alphabet='0,1','ab'", "captcha.alphabet", ["0,1", "ab"]),
        ("++seed=1,2", "seed", ["1", "2"]),
    ],
)
def test_every_sweep_syntax_of_hydra(override: str, key: str, values: list[str]) -> None:
    assert expand(override) == [{key: value} for value in values]


def test_each_job_is_composed_with_its_own_values() -> None:
    grid = compose_grid(["model=compact,resnet18", "train.batch_size=8,16", "train.epochs=7"], None)

    values = [(c.config.model.name, c.config.train.batch_size, c.config.train.epochs) for _, c in grid.jobs]
    assert values == [("compact", 8, 7), ("compact", 16, 7), ("resnet18", 8, 7), ("resnet18", 16, 7)]
    assert [composed.choices["model"] for _, composed in grid.jobs] == ["compact"] * 2 + ["resnet18"] * 2


def test_a_sweep_of_one_job() -> None:
    assert expand("train.batch_size=32") == [{}]
    assert expand() == [{}]


def test_the_last_override_of_a_key_counts() -> None:
    assert expand("seed=1,2", "seed=3,4") == [{"seed": "3"}, {"seed": "4"}]
    assert expand("seed=1,2", "seed=3") == [{}]


def test_a_gpu_file_can_be_swept(tmp_path: Path) -> None:
    gpu_file = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[2] / "conf" / "gpu" / "gtx1650.yaml").read_text()
    gpu_file.write_text(text.replace("NVIDIA GeForce GTX 1650", "mine"))
    grid = compose_grid([f"gpu=generic,'{gpu_file}'"], None)

    assert [composed.config.gpu.name for _, composed in grid.jobs][1] == "mine"


def test_a_config_file_can_define_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "sizes.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /hydra/launcher: joblib\n"
        "hydra:\n  mode: MULTIRUN\n  launcher: {n_jobs: 2}\n"
        "  sweeper:\n    params: {train.batch_size: '8,16', seed: '1,2'}\n"
    )

    grid = compose_grid(["experiment=sizes", "seed=5"], str(tmp_path))
    assert [swept for swept, _ in grid.jobs] == [{"train.batch_size": "8"}, {"train.batch_size": "16"}]
    assert [composed.config.seed for _, composed in grid.jobs] == [5, 5]
    assert all(composed.multirun for _, composed in grid.jobs)
    assert grid.n_jobs == 2
    assert grid.launcher_overrides == ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


def test_only_the_joblib_launcher_runs_jobs_in_parallel() -> None:
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=8"]

    assert compose_grid([*launcher, "seed=1,2,3"], None).n_jobs == 8
    assert compose_grid(["seed=1,2,3"], None).n_jobs == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=1,2,1", "seed=1,2,1: has 1 twice; each job of a sweep runs once"),
        (
            "seed=interval(0,1)",
            "seed=interval(0,1): is not a finite list; separate values by commas, or use range(1,9,2)",
        ),
        (
            "tracking=mlflow,none",
            "tracking=mlflow,none: a sweep logs to one store; write one value",
        ),
        (
            "tracking.experiment=a,b",
            "tracking.experiment=a,b: a sweep logs to one store; write one value",
        ),
        (
            "hydra/launcher=ray",
            "hydra/launcher=ray: is not installed; available: basic, joblib",
        ),
        (
            "hydra/launcher=basic,joblib",
            "hydra/launcher=basic,joblib: a sweep has one launcher; write one value",
        ),
    ],
)
def test_each_mistake_of_the_grid_is_one_line(override: str, line: str) -> None:
    assert mistakes_of(override, "model=compact,resnet18") == [line]


def test_all_mistakes_of_the_grid_are_reported() -> None:
    assert len(mistakes_of("seed=1,1", "tracking=mlflow,none", "train.epochs=2,2")) == 3


def test_mistakes_of_a_job_are_collected_with_the_job() -> None:
    grid = compose_grid(["model=compact,resnet", "hydra.run.dir=x", "seed=1,2"], None)

    assert [len(composed.errors) for _, composed in grid.jobs] == [1, 1, 2, 2]


def test_unknown_setting_of_the_launcher() -> None:
    (line,) = mistakes_of("hydra.launcher.jobs=2", "seed=1,2")

    assert "jobs" in line
