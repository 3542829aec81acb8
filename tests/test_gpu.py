"""Tests that need a CUDA GPU. Run by `pytest -m gpu`; `-m gpu_quick` runs the essential ones alone."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, batch_of, drawn, training
from PIL import Image

from captcha_exp import compose, load
from captcha_exp.config import AugmentConfig, Config, Precision, ResNet18Config, to_dict
from captcha_exp.data import dataset
from captcha_exp.data.augment import NUM_PARAMS, Augmenter, augment, sample_params
from captcha_exp.data.dataset import Split
from captcha_exp.doctor import collect_info, run_checks
from captcha_exp.model.evaluate import evaluate_run
from captcha_exp.model.predict import Predictor
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runs import find_run, make_run_dir
from captcha_exp.runtime.console import NullDisplay
from captcha_exp.runtime.device import half_precisions, set_memory_limit, setup_device
from captcha_exp.sweep.supervisor import TrainJob, train_with_oom_retry
from captcha_exp.training import autotune
from captcha_exp.training.oom import TrainingOutOfMemoryError
from captcha_exp.training.train import train

pytestmark = pytest.mark.gpu

FORMS = {"shift": 0.1, "scale": 0.2, "rotate": 10.0, "slant": 10.0, "warp": 0.05}
CHANGED = AugmentConfig(**FORMS, color_jitter=0.3, invert_p=0.5, warmup_fraction=0.0)

each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


@pytest.fixture
def cuda(tiny: Config) -> Config:
    return replace(tiny, device=replace(tiny.device, name="cuda"))


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Within the test, whatever waits for the device is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def on_the_card(config: Config, **values: Any) -> Config:
    """The config with these values in its group `device`."""
    return replace(config, device=replace(config.device, **values))


def training_split(config: Config) -> Split:
    """The pictures that a config trains on, where it has them."""
    data = dataset.load_or_build(dataset.inspect_dataset(config, NullDisplay()), config, NullDisplay())
    return data.split("train", torch.device(config.device.name), config.device.preload_limit_mib)


# -- a training ----------------------------------------------------------------------------------------------


@pytest.mark.gpu_quick
def test_every_epoch_has_the_peaks_of_the_card(cuda: Config) -> None:
    result = train(cuda)
    rows = [
        json.loads(line)["metrics"] for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()
    ]

    for row in rows[:2]:
        for phase in ("train", "eval"):
            allocated = row[f"memory/{phase}_peak_allocated_mib"]
            assert 0 < allocated <= row[f"memory/{phase}_peak_reserved_mib"] < row["memory/process_peak_mib"]


@pytest.mark.gpu_quick
@pytest.mark.parametrize("model", ["compact", "resnet18"])
def test_what_a_plan_says_is_what_the_card_measures(cuda: Config, model: str) -> None:
    """With all that a small run leaves to fragments and workspaces, the bounds hold what was measured."""
    chosen = (
        cuda if model == "compact" else replace(cuda, model=ResNet18Config(name="resnet18", head="position"))
    )
    result = train(chosen)
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(lines[-1])["metrics"]

    for phase in ("train", "eval"):
        assert abs(metrics[f"memory/{phase}_peak_allocated_error"]) <= 0.01
    assert metrics["memory/process_peak_error"] >= -0.02  # never too little
    assert json.loads((result.run_dir / "memory.json").read_text())["fits"] == "fits"


LEVERS: list[dict[str, Any]] = [
    {"optimizer_impl": "foreach"},
    {"optimizer_impl": "for_loop"},
    {"activation_checkpointing": True, "micro_batch_size": 16},
]


@pytest.mark.parametrize("levers", LEVERS)
def test_a_training_that_spares_memory_never_waits_and_repeats(
    cuda: Config, levers: dict[str, Any], no_waiting: None
) -> None:
    config = replace(cuda, train=replace(cuda.train, **levers))
    device = setup_device(config)
    batch = dataset.random_batch(config, 64, device)
    losses = []
    for _ in range(2):
        state = init_train_state(config, device)
        train_step(state, batch, config)  # kernels are loaded
        torch.cuda.set_sync_debug_mode("error")
        steps = [train_step(state, batch, config) for _ in range(3)]
        torch.cuda.set_sync_debug_mode("default")
        losses.append([float(step.loss) for step in steps])
    assert losses[0] == losses[1]


def test_the_best_weights_take_nothing_of_the_card(cuda: Config) -> None:
    state = init_train_state(cuda, setup_device(cuda))
    before = torch.cuda.memory_allocated()
    assert state.update_best(1.0, 0.0)
    assert torch.cuda.memory_allocated() == before


def test_auto_takes_a_batch_size_that_fits_and_writes_down_what_it_saw(cuda: Config) -> None:
    result = train(replace(cuda, train=replace(cuda.train, batch_size="auto")))
    tried = json.loads((result.run_dir / "environment.json").read_text())["batch_sizes_tried"]

    assert result.config.train.batch_size in [row["batch_size"] for row in tried if row["fits"]]


@pytest.mark.gpu_quick
@each_precision
def test_the_same_bits_twice_and_whether_the_pictures_live_on_the_card_or_not(
    cuda: Config, precision: Precision
) -> None:
    config = on_the_card(cuda, precision=precision)
    sent = on_the_card(config, preload_limit_mib=0)

    assert len({train(each).weights_sha256 for each in (config, config, sent)}) == 1


def test_changed_pictures_too_give_the_same_bits_wherever_they_live(cuda: Config) -> None:
    config = replace(cuda, augment=CHANGED)
    sent = on_the_card(config, preload_limit_mib=0)
    digests = [train(each).weights_sha256 for each in (config, config, sent)]

    assert len(set(digests)) == 1
    assert digests[0] != train(cuda).weights_sha256


@pytest.mark.gpu_quick
@pytest.mark.parametrize("preload_limit_mib", [512, 0], ids=["resident", "sent"])
@each_precision
def test_a_step_never_waits_for_the_card(
    cuda: Config, precision: Precision, preload_limit_mib: int, no_waiting: None
) -> None:
    """Nor does the change of its pictures, nor their way to the card."""
    config = on_the_card(cuda, precision=precision, preload_limit_mib=preload_limit_mib)
    config = replace(config, augment=CHANGED)
    device = setup_device(config)
    split = training_split(config)
    order = split.permutation(0, 1)
    change = Augmenter(config, 1, drawn(config).count, device)
    state = init_train_state(config, device)
    for batch in split.batches(64, order):  # the first steps load kernels and make room, which may wait
        train_step(state, change(batch), config)

    torch.cuda.set_sync_debug_mode("error")
    for batch in split.batches(64, order):
        step = train_step(state, change(batch), config)
    torch.cuda.set_sync_debug_mode("default")
    assert not bool(step.diverged)


# -- 16 bits -------------------------------------------------------------------------------------------------


@pytest.mark.gpu_quick
def test_auto_takes_what_is_right_and_fastest_here_and_writes_down_what_it_saw(cuda: Config) -> None:
    result = train(on_the_card(cuda, precision="auto"))
    tried = json.loads((result.run_dir / "environment.json").read_text())["precisions_tried"]

    plain = tried[0]
    assert [row["precision"] for row in tried] == ["fp32", *half_precisions(torch.device("cuda"))]
    assert (plain["finite"], plain["cosine"]) == (True, 1.0)
    enough = plain["step_seconds"] / autotune.MIN_SPEEDUP
    right = [row for row in tried[1:] if row["finite"] and row["cosine"] >= autotune.MIN_COSINE]
    good = [row for row in right if row["step_seconds"] <= enough]
    best = min(good, key=lambda row: float(row["step_seconds"]), default=plain)
    assert result.config.device.precision == best["precision"]
    assert f"precision: {best['precision']}" in (result.run_dir / "config.yaml").read_text()


@pytest.mark.gpu_quick
def test_16_bits_point_where_32_do_on_every_card_since_ampere(cuda: Config) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("older cards may have no right 16 bits; auto finds out")
    _, tried = autotune.choose_precision(on_the_card(cuda, precision="auto"), NullDisplay())

    assert [row["precision"] for row in tried] == ["fp32", "bf16", "fp16"]
    for row in tried:
        assert row["finite"], row
        assert isinstance(row["cosine"], float)
        assert row["cosine"] >= autotune.MIN_COSINE, row


def test_fp16_learns_a_batch_and_its_loss_scale_stays_sane(cuda: Config) -> None:
    """A power of two, as high as it began or some halvings below, and far from the floor."""
    config = on_the_card(training(cuda, label_smoothing=0.0, learning_rate=0.01), precision="fp16")
    device = setup_device(config)
    batch = batch_of(config, 32)
    batch = batch._replace(images=batch.images.to(device), targets=batch.targets.to(device))
    state = init_train_state(config, device)
    steps = [train_step(state, batch, config) for _ in range(60)]

    losses = [float(step.loss) for step in steps]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.5 * losses[0]
    assert not any(bool(step.diverged) for step in steps)
    assert state.loss_scale is not None
    factor = float(state.loss_scale.factor)
    halvings = sum(not bool(step.finite) for step in steps)
    assert factor == state.loss_scale.INIT_SCALE / 2**halvings
    assert halvings <= 8
    assert all(bool(weight.isfinite().all()) for weight in state.model.state_dict().values())


@pytest.mark.gpu_quick
@each_precision
def test_a_training_in_any_precision_has_finite_figures(cuda: Config, precision: Precision) -> None:
    result = train(on_the_card(cuda, precision=precision))
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]

    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row["metrics"].values())


# -- changed pictures ----------------------------------------------------------------------------------------


@pytest.mark.gpu_quick
@pytest.mark.parametrize("channels", [1, 3])
def test_the_card_changes_pictures_as_the_cpu_does_to_one_of_255(cuda: Config, channels: int) -> None:
    """Movements and colours; a share of one in a hundred may be rounded the other way."""
    generator = torch.Generator().manual_seed(0)
    shape = (200, 24, 56, channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    draws = sample_params(0, 1, 200)
    assert draws.shape == (200, NUM_PARAMS)

    here = augment(images, draws, CHANGED)
    there = augment(images.to(cuda.device.name), draws.to(cuda.device.name), CHANGED)

    apart = (here.int() - there.cpu().int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 0.01
    assert not torch.equal(here, images)


# -- memory --------------------------------------------------------------------------------------------------


@pytest.fixture
def unlimited() -> Iterator[None]:
    """After the test the process may take all of the card again: the limit stays until another is set."""
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_what_a_budget_leaves_can_be_taken_to_the_last_block_and_no_more(
    cuda: Config, unlimited: None
) -> None:
    context = replace(cuda.gpu.context_mib, min=0.0, max=800.0)
    config = on_the_card(replace(cuda, gpu=replace(cuda.gpu, context_mib=context)), vram_budget_mib=1000)
    device = setup_device(config)
    left = 200 * 2**20 - torch.cuda.memory_reserved(device)  # what other tests have left is taken, too
    assert left > 64 * 2**20
    set_memory_limit(config, device)

    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(left + 2**21, dtype=torch.uint8, device=device)
    assert torch.empty(left, dtype=torch.uint8, device=device).nbytes == left
    assert torch.cuda.memory_reserved(device) <= 200 * 2**20


def too_little(cuda: Config) -> Config:
    """A config with more than it may take: wide pictures, all at once, and room for the context and little
    more."""
    card = replace(cuda.gpu, context_mib=replace(cuda.gpu.context_mib, min=300.0, max=600.0))
    wide = replace(cuda, gpu=card, captcha=replace(cuda.captcha, width=1024, height=64))
    return on_the_card(training(wide, batch_size=150), vram_budget_mib=640, preload_limit_mib=0)


@pytest.mark.gpu_quick
def test_too_little_memory_is_a_result_with_what_was_taken_and_foretold(cuda: Config) -> None:
    with pytest.raises(
        TrainingOutOfMemoryError, match=r"out of memory in .+: peak .+ MiB, predicted .+ MiB for"
    ) as caught:
        train(training(too_little(cuda), on_oom="record"))
    state = json.loads((find_run("latest") / "run.json").read_text())

    assert caught.value.exit_code == 0
    assert (state["status"], state["tags"]) == ("FINISHED", {"oom": "true"})
    assert 0 < state["oom"]["peak_mib"] < 1200


def test_with_split_the_parts_get_smaller_until_they_fit(cuda: Config, root: Path) -> None:
    config = training(too_little(cuda), on_oom="split", eval_batch_size=4)
    folder = train_with_oom_retry(TrainJob(config, {}), lambda each: nullcontext(make_run_dir(each.name)))
    state = json.loads((folder / "run.json").read_text())
    micro = load(folder / "config.yaml").train.micro_batch_size

    assert state["status"] == "FINISHED"
    assert len(list(root.glob("outputs/*/*/run.json"))) > 1
    assert micro is not None
    assert micro < 150
    asked = training(on_the_card(config, vram_budget_mib=None), micro_batch_size=micro)
    assert train(asked).weights_sha256 == state["result"]["weights_sha256"]


PLANNING = """
import sys
from captcha_exp import compose, load
from captcha_exp.device import nvml_free_bytes
from captcha_exp.display import Silent
from captcha_exp.sweep.foretelling import foretell
from captcha_exp.sweep.points import Point
config = load(compose(*sys.argv[1:]))
before = nvml_free_bytes()
foretell([Point(number=1, swept={}, choices={}, requested=config)], Silent())
print(max(abs(before[card] - free) for card, free in nvml_free_bytes().items()))
"""


def test_who_plans_a_sweep_takes_nothing_of_the_card(cuda: Config, cache: Path) -> None:
    """Each point has the card to itself: the process above them makes no context on it."""
    words = [*TINY, f"data.cache={cache}", "device.name=cuda", "tracking=none"]
    command = [sys.executable, "-c", PLANNING, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert int(done.stdout) < 64 * 2**20, "a context takes 300 MiB"


def test_calibrate_writes_a_card_that_a_training_can_choose(root: Path) -> None:
    """In a process of its own: this one has touched the card already."""
    words = [sys.executable, "-m", "captcha_exp", "calibrate", "--json", "--name", "mine"]
    done = subprocess.run(
        [*words, "--config-dir", str(root), "train.batch_size=32"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    told = json.loads(done.stdout)
    gpu = load(compose("gpu=mine", config_dir=str(root))).gpu
    assert to_dict(gpu) == told["gpu"]
    assert Path(told["path"]) == root / "gpu/mine.yaml"
    properties = torch.cuda.get_device_properties(0)
    assert gpu.name == properties.name
    assert gpu.total_mib is not None
    assert gpu.total_mib.min <= properties.total_memory / 2**20 <= gpu.total_mib.max
    assert 20 < gpu.context_mib.min < gpu.context_mib.max < 3000
    assert 8 <= gpu.cublas_workspace_mib.max <= 128  # 8.1 or 32 for each of two threads, as torch has it
    assert gpu.cudnn_workspace_mib.max < gpu.total_mib.max
    for speed in (gpu.fp16_speedup, gpu.bf16_speedup):
        assert 0 < speed.min <= speed.max < 20
        assert speed.source.startswith("measured") or properties.major < 8


# -- reading -------------------------------------------------------------------------------------------------


@each_precision
def test_predict_answers_as_evaluate(cuda: Config, precision: Precision, tmp_path: Path) -> None:
    """The pictures of the test split as files, in their own size."""
    folder = train(on_the_card(cuda, precision=precision)).run_dir
    evaluation, data = evaluate_run(folder, "test", NullDisplay(), "cuda")
    files = [tmp_path / f"{row}.png" for row in evaluation.indices]
    for row, file in zip(evaluation.indices, files, strict=True):
        Image.fromarray(data.images[int(row)].numpy()).save(file)

    reader = Predictor(folder / "model.safetensors", "cuda", NullDisplay())
    readings = list(reader.predict_all(files, NullDisplay()))

    assert reader.device.type == "cuda"
    assert [reading.image for reading in readings] == files
    assert [reading.text for reading in readings] == [
        data.alphabet.decode(ids) for ids in evaluation.predicted
    ]
    for reading, confidences in zip(readings, evaluation.confidences, strict=True):
        assert reading.confidences == pytest.approx(confidences, abs=1e-3)


@pytest.mark.gpu_quick
def test_what_was_trained_on_the_card_reads_the_same_on_the_cpu(cuda: Config) -> None:
    """In fp32, but for the few pictures on which the network is torn."""
    folder = train(cuda).run_dir
    there, _ = evaluate_run(folder, "test", NullDisplay(), "cuda")
    here, _ = evaluate_run(folder, "test", NullDisplay(), "cpu")

    assert (there.indices == here.indices).all()
    assert float((there.predicted == here.predicted).mean()) > 0.95
    assert abs(there.loss - here.loss) < 0.01


# -- doctor --------------------------------------------------------------------------------------------------


def test_doctor_names_the_card_its_memory_and_the_driver(cuda: Config) -> None:
    import pynvml

    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    pynvml.nvmlShutdown()
    properties = torch.cuda.get_device_properties(0)
    said = [finding.message for finding in run_checks(collect_info(cuda))]

    assert any(f"NVIDIA driver {driver}" in text for text in said)
    assert any(f"built for CUDA {torch.version.cuda}" in text for text in said)
    (memory,) = (text for text in said if f"cuda:0 ({properties.name})" in text and "MiB free" in text)
    assert f"capability {properties.major}.{properties.minor}" in memory
    figures = re.findall(r"([\d,]+) of ([\d,]+) MiB free", memory)[0]
    free, total = (float(figure.replace(",", "")) for figure in figures)
    assert 0 < free <= total
    # The driver keeps a little of the card for itself, which torch does not count.
    assert total == pytest.approx(properties.total_memory / 2**20, rel=0.05)
    assert any("fast 16-bit types" in text for text in said) or properties.major < 7
