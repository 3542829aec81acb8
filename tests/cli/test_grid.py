"""The grid of a sweep: what the overrides span, and what is wrong with them."""

from pathlib import Path

import pytest

from captcha_exp.cli.grid import compose_grid
from captcha_exp.errors import ConfigError


def spanned(*overrides: str, config_dir: Path | None = None) -> list[dict[str, str]]:
    grid = compose_grid(overrides, None if config_dir is None else str(config_dir))
    return [swept for swept, _ in grid.jobs]


def refused(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose_grid(overrides, None)
    return list(caught.value.lines)


def test_the_last_key_of_the_command_moves_fastest() -> None:
    assert spanned("train.batch_size=32,64", "name=x", "seed=0,1") == [
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
        ("captcha.alphabet='0,1','ab'", "captcha.alphabet", ["'0,1'", "'ab'"]),
        ("++seed=1,2", "seed", ["1", "2"]),
    ],
)
def test_every_kind_of_sweep_that_hydra_has(override: str, key: str, values: list[str]) -> None:
    assert spanned(override) == [{key: value} for value in values]


def test_each_point_is_composed_with_its_own_values() -> None:
    grid = compose_grid(["model=compact,resnet18", "train.batch_size=8,16", "train.epochs=7"], None)

    found = [(c.config.model.name, c.config.train.batch_size, c.config.train.epochs) for _, c in grid.jobs]
    assert found == [("compact", 8, 7), ("compact", 16, 7), ("resnet18", 8, 7), ("resnet18", 16, 7)]
    assert [composed.choices["model"] for _, composed in grid.jobs] == ["compact"] * 2 + ["resnet18"] * 2


def test_one_point_is_a_sweep_too() -> None:
    assert spanned("train.batch_size=32") == [{}]
    assert spanned() == [{}]


def test_of_two_words_for_one_key_the_last_counts() -> None:
    assert spanned("seed=1,2", "seed=3,4") == [{"seed": "3"}, {"seed": "4"}]
    assert spanned("seed=1,2", "seed=3") == [{}]


def test_a_card_from_a_file_can_be_swept(tmp_path: Path) -> None:
    card = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[2] / "conf" / "gpu" / "gtx1650.yaml").read_text()
    card.write_text(text.replace("NVIDIA GeForce GTX 1650", "mine"))
    grid = compose_grid([f"gpu=generic,'{card}'"], None)

    assert [composed.config.gpu.name for _, composed in grid.jobs][1] == "mine"


def test_a_file_of_conf_may_describe_a_sweep(tmp_path: Path) -> None:
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
    assert grid.parallelism == 2
    assert grid.launcher_overrides == ["experiment=sizes", "hydra.sweeper.params=null"]


def test_no_more_points_run_at_a_time_than_there_are() -> None:
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=8"]

    assert compose_grid([*words, "seed=1,2,3"], None).parallelism == 3
    assert compose_grid(["seed=1,2,3"], None).parallelism == 1


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=1,2,1", "seed=1,2,1: names 1 twice; each point of a sweep runs once"),
        (
            "seed=interval(0,1)",
            "seed=interval(0,1): has no end of values; write them with commas, or range(1,9,2)",
        ),
        (
            "tracking=mlflow,none",
            "tracking=mlflow,none: the runs of a sweep stand in one store; write one value",
        ),
        (
            "tracking.experiment=a,b",
            "tracking.experiment=a,b: the runs of a sweep stand in one store; write one value",
        ),
        (
            "hydra/launcher=ray",
            "hydra/launcher=ray: is not installed; here are basic, joblib",
        ),
        (
            "hydra/launcher=basic,joblib",
            "hydra/launcher=basic,joblib: one sweep has one launcher; write one value",
        ),
    ],
)
def test_a_mistake_of_the_grid_is_one_line(override: str, line: str) -> None:
    assert refused(override, "model=compact,resnet18") == [line]


def test_all_mistakes_of_the_grid_come_at_once() -> None:
    assert len(refused("seed=1,1", "tracking=mlflow,none", "train.epochs=2,2")) == 3


def test_a_mistake_of_a_point_stands_with_the_point() -> None:
    grid = compose_grid(["model=compact,resnet", "hydra.run.dir=x", "seed=1,2"], None)

    assert [len(composed.errors) for _, composed in grid.jobs] == [1, 1, 2, 2]


def test_hydras_launcher_with_a_setting_that_it_does_not_have() -> None:
    (line,) = refused("hydra.launcher.jobs=2", "seed=1,2")

    assert "jobs" in line
