"""Test the arithmetic of the benchmarks of speed; their figures depend on the machine."""

import json
from pathlib import Path
from types import SimpleNamespace

import bench
import interference
import operations
import pytest
import time_to_accuracy
import torch
from conftest import CPU, TINY
from loops import ArticleLoop, OurLoop, Step, first_images, write_shards
from rounds import Timing, compare, interleave, ratios

from captcha_exp import compose, load
from captcha_exp.data import dataset
from captcha_exp.data.dataset import Dataset
from captcha_exp.runtime.cpu_time import CpuTimes


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds() -> None:
    # The ratio of the medians is 3; the machine was slow in the second round.
    assert ratios([2, 30, 3], [1, 10, 1]) == {"median": 3, "min": 2, "max": 3}
    assert ratios([1, 40, 9], [1, 10, 1]) == {"median": 4, "min": 1, "max": 9}
    timings = [Timing(wall, cpu) for wall, cpu in ((4, 1), (2, 1))]
    assert compare(timings, [Timing(1, 1)] * 2)["wall"] == {"median": 3, "min": 2, "max": 4}


def test_every_other_round_is_in_reverse_order() -> None:
    order: list[str] = []
    found = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(timings) for name, timings in found.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("others", "figure", "met", "code"), [(0.0, 0.9, True, 0), (0.0, 0.8, False, 1), (5.0, 0.9, None, 3)]
)
def test_a_disturbed_figure_neither_meets_nor_misses_a_goal(
    others: float, figure: float, met: bool | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(lap=lambda: CpuTimes(10.0, 10.0, 0.0, 0.0, others, 0.0))
    monkeypatch.setattr(interference, "_CLOCK", clock)
    monkeypatch.setattr(interference, "_LAPS", [])
    conclusion = interference.conclude(figure, at_least=0.88)
    assert conclusion["met"] is met
    assert conclusion["goal"] == "at least 0.88"
    assert interference.exit_code(conclusion) == code
    assert interference.conclude(figure)["met"] is None


def test_the_interference_is_that_since_the_import_however_often_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    laps = iter([CpuTimes(10.0, 1.0, 0.0, 0.0, 9.0, 0.0), CpuTimes(20.0, 1.0, 0.0, 0.0, 0.0, 0.0)])
    monkeypatch.setattr(interference, "_CLOCK", SimpleNamespace(lap=lambda: next(laps)))
    monkeypatch.setattr(interference, "_LAPS", [])
    assert interference.interference() == {"cores_of_others": 0.9, "disturbed": True}
    assert interference.interference() == {"cores_of_others": 0.3, "disturbed": True}


def event(*names: str) -> SimpleNamespace:
    """Return an event of the profiler inside others, the innermost first."""
    parent = event(*names[1:]) if len(names) > 1 else None
    return SimpleNamespace(name=names[0], cpu_parent=parent)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("aten::mkldnn_convolution", "aten::_convolution", "aten::conv2d"), "convolution, forward"),
        (("aten::add_", "aten::batch_norm"), "batch norm, forward"),
        (("aten::add",), "ReLU and addition, forward"),
        (("aten::copy_", "aten::_to_copy", "aten::to"), "casts and copies, forward"),
        (("aten::index", "loader"), "loader"),
        (("aten::_fused_adam_", "Optimizer.step#Adam.step"), "optimizer"),
        (("aten::convolution_backward", "ConvolutionBackward0"), "convolution, backward"),
        (("aten::something_new",), operations.OTHER),
    ],
)
def test_operations_are_counted_where_they_belong(names: tuple[str, ...], kind: str) -> None:
    assert operations._kind_of(event(*names)) == kind


def tiny_data(num_images: int) -> tuple[list[str], Dataset]:
    config = load(compose(*TINY, "captcha.length=4", "tracking=none"))
    batch = dataset.random_batch(config, num_images, CPU)
    labels = ["".join(config.captcha.alphabet[k] for k in row) for row in batch.targets.tolist()]
    return labels, Dataset(batch.images, batch.targets, labels, {"train": torch.arange(num_images)}, {})


@pytest.mark.usefixtures("one_thread")
def test_both_loops_train_on_the_same_images(tmp_path: Path) -> None:
    _, data = tiny_data(6)
    article = ArticleLoop(data, tmp_path / "shards", 0, CPU)
    (path,) = article.shards("train")
    import article_loop

    read = article_loop.read_gzip(path)
    pixels = (read["images"] * 255).round().byte().permute(0, 2, 3, 1)
    assert sorted(map(bytes, pixels.contiguous().numpy())) == sorted(map(bytes, data.images.numpy()))
    ours = OurLoop(load(compose(*TINY, "captcha.length=4", "tracking=none")), data, tmp_path)
    ours.train_epoch()
    assert ours.state.step == -(-6 // int(ours.config.train.batch_size))
    assert len(first_images(data, 9).split_indices["train"]) == 9
    step = Step(ours.config, first_images(data, int(ours.config.train.batch_size)))
    step()
    assert len(step.load().indices) == int(ours.config.train.batch_size)


@pytest.mark.usefixtures("one_thread")
def test_an_interrupted_training_of_the_article_continues(tmp_path: Path) -> None:
    _, data = tiny_data(8)
    data.split_indices["validation"] = torch.arange(4)
    state = tmp_path / "state.gz"

    def loop(name: str) -> ArticleLoop:
        found = ArticleLoop(data, tmp_path / name, 0, CPU)
        write_shards(data.images[:4], data.labels[:4], tmp_path / f"{name}-more", 4)
        (tmp_path / f"{name}-more" / "00000.gz").rename(tmp_path / name / "train" / "00001.gz")
        return found

    whole = loop("whole")
    expected = time_to_accuracy.ArticleTraining(whole, tmp_path / "none.gz").run(2.0, 2, lambda: None)
    calls = iter(range(9))

    def stop_at_the_second_file() -> None:
        if next(calls) == 1:
            raise time_to_accuracy.OutOfTimeError

    with pytest.raises(time_to_accuracy.OutOfTimeError):
        time_to_accuracy.ArticleTraining(loop("first"), state).run(2.0, 2, stop_at_the_second_file)
    resumed = loop("second")
    found = time_to_accuracy.ArticleTraining(resumed, state).run(2.0, 2, lambda: None)
    assert found["accuracies"] == expected["accuracies"]
    assert found["seconds"] is None  # the target was not reached
    assert found["calls"] == 2
    assert not state.exists()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name


def test_finished_trainings_are_found_by_their_settings(tmp_path: Path) -> None:
    path, about = tmp_path / "results" / "lines.jsonl", {"task": "digits", "target": 0.95}
    results = time_to_accuracy.Results(path, about)
    results.add(0, "ours", {"seconds": 3.0})
    again = time_to_accuracy.Results(path, about)
    assert (again.find(0, "ours") or {})["seconds"] == 3.0
    assert again.find(1, "ours") is None
    assert again.find(0, "article") is None
    assert time_to_accuracy.Results(path, {**about, "target": 0.9}).find(0, "ours") is None


def test_the_table_has_a_row_per_figure_and_marks_disturbed_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spread = {"median": 0.5, "min": 0.4, "max": 0.6}
    step = {
        "fraction": spread,
        "goal": "at least 0.88",
        "met": None,
        "cores_of_others": 1.2,
        "disturbed": True,
    }
    lines = {
        "roofline": {"precision": "bf16", "convolution_gflops": spread, "networks": {"article": step}},
        "startup": {"benchmark": "startup", "runs": 3, "first_step_seconds": 3.9, "disturbed": False},
        "loader": "Traceback ...\nNameError: x",
    }
    monkeypatch.setattr(bench, "run", lambda name, _: lines[name])
    monkeypatch.setattr("sys.argv", ["bench.py", "--only", *lines, "--json", str(tmp_path / "new" / "lines")])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        bench.main()
    out = capsys.readouterr().out
    assert caught.value.code == 1
    row = next(line for line in out.splitlines() if "step of article" in line)
    assert "0.5 (0.4 to 0.6)" in row
    assert "no conclusion" in row
    assert "disturbed: others used 1.2 cores" in row
    assert "NameError: x" in out
    row = next(line for line in out.splitlines() if "first step seconds" in line)
    assert "disturbed" not in row
    kept = [json.loads(line) for line in (tmp_path / "new" / "lines").read_text().splitlines()]
    assert kept == [lines["roofline"], lines["startup"]]
