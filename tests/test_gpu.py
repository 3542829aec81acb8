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
from conftest import TINY, generator_config, make_batch, with_train
from PIL import Image

from captcha_exp import compose, load
from captcha_exp.config import (
    AugmentConfig,
    Config,
    HeadName,
    Precision,
    ResNet18Config,
    precision_of_gpu,
    to_dict,
)
from captcha_exp.data import dataset
from captcha_exp.data.alphabet import END
from captcha_exp.data.augment import NUM_PARAMS, Augmenter, augment, sample_params
from captcha_exp.data.dataset import Batch, Split
from captcha_exp.doctor import collect_info, run_checks
from captcha_exp.memory.plan import Planner
from captcha_exp.model.heads import build_head
from captcha_exp.model.predict import Predictor
from captcha_exp.model.saved import evaluate_run
from captcha_exp.model.state import TrainState
from captcha_exp.model.step import Step, init_train_state, train_step
from captcha_exp.runs import find_run, make_run_dir
from captcha_exp.runtime.device import set_memory_limit, setup_device
from captcha_exp.sweep.supervisor import TrainJob, train_with_oom_retry
from captcha_exp.training import autotune
from captcha_exp.training.oom import TrainingOutOfMemoryError
from captcha_exp.training.train import train

pytestmark = pytest.mark.gpu

TRANSFORMS = {"translate": 0.1, "scale": 0.2, "rotate": 10.0, "shear": 10.0, "elastic": 0.05}
AUGMENT = AugmentConfig(**TRANSFORMS, color_jitter=0.3, invert_p=0.5, warmup_fraction=0.0)

each_precision = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])


@pytest.fixture
def cuda(tiny: Config) -> Config:
    return replace(tiny, device=replace(tiny.device, name="cuda"))


@pytest.fixture
def sync_debug_reset() -> Iterator[None]:
    """Restore the CUDA sync debug mode, with which a test detects synchronization."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def with_device(config: Config, **values: Any) -> Config:
    """Return the config with these values in its group `device`."""
    return replace(config, device=replace(config.device, **values))


def training_split(config: Config) -> Split:
    """Return the training split of a config."""
    data = dataset.load_or_build(dataset.inspect_dataset(config))
    return data.split("train", torch.device(config.device.name), config.device.preload_limit_mib)


# -- a training ----------------------------------------------------------------------------------------------


@pytest.mark.gpu_quick
def test_every_epoch_has_gpu_memory_peaks(cuda: Config) -> None:
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
def test_a_plan_matches_the_measured_memory(cuda: Config, model: str) -> None:
    """The measured memory is within the bounds, despite the fragmentation and workspaces of a small run."""
    chosen = (
        cuda if model == "compact" else replace(cuda, model=ResNet18Config(name="resnet18", head="position"))
    )
    result = train(chosen)
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(lines[-1])["metrics"]

    for phase in ("train", "eval"):
        assert abs(metrics[f"memory/{phase}_peak_allocated_error"]) <= 0.01
    assert metrics["memory/process_peak_error"] >= -0.02  # never an underestimate
    assert json.loads((result.run_dir / "memory.json").read_text())["fits"] == "fits"


def run_steps_without_sync(config: Config, batch: Batch) -> tuple[TrainState, list[Step]]:
    """Run three steps, of which each fails if it waits for the device."""
    state = init_train_state(config, batch.images.device)
    train_step(state, batch, config)  # loads kernels
    torch.cuda.set_sync_debug_mode("error")
    steps = [train_step(state, batch, config) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("default")
    return state, steps


OPTIONS: list[dict[str, Any]] = [
    {"optimizer_impl": "foreach"},
    {"optimizer_impl": "for_loop"},
    {"activation_checkpointing": True, "micro_batch_size": 16},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_memory_saving_options_never_synchronize_and_are_deterministic(
    cuda: Config, options: dict[str, Any], sync_debug_reset: None
) -> None:
    config = replace(cuda, train=replace(cuda.train, **options))
    device = setup_device(config)
    batch = dataset.random_batch(config, 64, device)
    losses = []
    for _ in range(2):
        _, steps = run_steps_without_sync(config, batch)
        losses.append([float(step.loss) for step in steps])
    assert losses[0] == losses[1]


@pytest.mark.gpu_quick
@pytest.mark.parametrize("head", ["end_class", "ctc"])
def test_heads_for_any_length_never_synchronize_and_are_deterministic(
    cuda: Config, head: HeadName, sync_debug_reset: None
) -> None:
    config = replace(
        cuda,
        captcha=replace(cuda.captcha, min_length=1),
        model=replace(cuda.model, head=head),
    )
    device = setup_device(config)
    batch = dataset.random_batch(config, 64, device)
    batch.targets[::3, 1] = END
    results = []
    for _ in range(3):
        state, steps = run_steps_without_sync(config, batch)
        results.append([*(step.loss for step in steps), *(p.detach() for p in state.model.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("head", ["end_class", "ctc"])
def test_heads_for_any_length_agree_with_the_cpu(cuda: Config, head: HeadName) -> None:
    captcha = replace(cuda.captcha, min_length=1, length=3)
    built = build_head(head, 8, 12, captcha)
    features = torch.randn(50, 8, 12, generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 5, (50, 3), generator=torch.Generator().manual_seed(1))
    targets[::2, 1:] = END
    outputs = []
    for device in ("cpu", "cuda"):
        head_there = built.to(device)
        head_there.zero_grad()
        logits = head_there(features.to(device))
        loss = head_there.loss(logits, targets.to(device), 0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        decoded = head_there.decode(logits.detach())
        gradients = [p.grad for p in head_there.parameters() if p.grad is not None]
        outputs.append([x.detach().cpu() for x in (loss, *gradients, *decoded)])
    for on_cpu, on_gpu in zip(*outputs, strict=True):
        torch.testing.assert_close(on_cpu, on_gpu, atol=1e-4, rtol=1e-3)


def test_the_best_weights_use_no_gpu_memory(cuda: Config) -> None:
    state = init_train_state(cuda, setup_device(cuda))
    before = torch.cuda.memory_allocated()
    assert state.update_best(1.0, 0.0)
    assert torch.cuda.memory_allocated() == before


def test_auto_batch_size_fits_and_is_recorded(cuda: Config) -> None:
    result = train(replace(cuda, train=replace(cuda.train, batch_size="auto")))
    tried = json.loads((result.run_dir / "environment.json").read_text())["batch_sizes_tried"]

    assert result.config.train.batch_size in [row["batch_size"] for row in tried if row["fits"]]


@pytest.mark.gpu_quick
@each_precision
def test_training_is_deterministic_with_and_without_preloading(cuda: Config, precision: Precision) -> None:
    config = with_device(cuda, precision=precision)
    streamed = with_device(config, preload_limit_mib=0)

    assert len({train(each).weights_sha256 for each in (config, config, streamed)}) == 1


def test_training_with_augmentation_is_deterministic_with_and_without_preloading(cuda: Config) -> None:
    config = replace(cuda, augment=AUGMENT)
    streamed = with_device(config, preload_limit_mib=0)
    digests = [train(each).weights_sha256 for each in (config, config, streamed)]

    assert len(set(digests)) == 1
    assert digests[0] != train(cuda).weights_sha256


@pytest.mark.gpu_quick
@pytest.mark.parametrize("preload_limit_mib", [512, 0], ids=["preloaded", "streamed"])
@each_precision
def test_a_step_never_synchronizes(
    cuda: Config, precision: Precision, preload_limit_mib: int, sync_debug_reset: None
) -> None:
    """This includes augmentation and the transfer of the images."""
    config = with_device(cuda, precision=precision, preload_limit_mib=preload_limit_mib)
    config = replace(config, augment=AUGMENT)
    device = setup_device(config)
    split = training_split(config)
    order = split.epoch_order(0, 1)
    augmenter = Augmenter(config, 1, generator_config(config).count, device)
    state = init_train_state(config, device)
    for batch in split.batches(64, order):  # warm-up: the first steps may synchronize
        train_step(state, augmenter(batch), config)

    torch.cuda.set_sync_debug_mode("error")
    for batch in split.batches(64, order):
        step = train_step(state, augmenter(batch), config)
    torch.cuda.set_sync_debug_mode("default")
    assert not bool(step.diverged)


# -- 16 bits -------------------------------------------------------------------------------------------------


@pytest.mark.gpu_quick
def test_auto_precision_is_that_of_the_hardware_and_is_recorded(cuda: Config) -> None:
    result = train(with_device(cuda, precision="auto"))
    tried = json.loads((result.run_dir / "environment.json").read_text())["precisions_tried"]

    expected = precision_of_gpu(torch.cuda.get_device_capability(), torch.cuda.get_device_name())
    assert [row["precision"] for row in tried] == ([] if expected == "fp32" else [expected])
    good = all(row["finite"] and row["cosine"] >= autotune.MIN_COSINE for row in tried)
    assert result.config.device.precision == (expected if good else "fp32")


@pytest.mark.gpu_quick
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_gradients_agree_with_fp32_since_ampere(cuda: Config, precision: Precision) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("older GPUs may have inaccurate 16-bit types, which auto detects")
    chosen, (trial,) = autotune.check_precision(with_device(cuda, precision=precision))

    assert chosen == precision, trial
    assert trial["finite"]
    assert isinstance(trial["cosine"], float)
    assert trial["cosine"] >= autotune.MIN_COSINE


def test_fp16_fits_a_batch_with_a_reasonable_loss_scale(cuda: Config) -> None:
    """The loss scale is the initial one after at most 8 halvings."""
    config = with_device(with_train(cuda, label_smoothing=0.0, learning_rate=0.01), precision="fp16")
    device = setup_device(config)
    batch = make_batch(config, 32)
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
def test_metrics_are_finite_in_every_precision(cuda: Config, precision: Precision) -> None:
    result = train(with_device(cuda, precision=precision))
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]

    assert len(rows) == 3
    assert all(math.isfinite(value) for row in rows for value in row["metrics"].values())


# -- augmentation --------------------------------------------------------------------------------------------


@pytest.mark.gpu_quick
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_on_gpu_and_cpu_differs_by_at_most_one_level(cuda: Config, channels: int) -> None:
    """At most one value in a hundred may differ by rounding."""
    generator = torch.Generator().manual_seed(0)
    shape = (200, 24, 56, channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    params = sample_params(0, 1, 200)
    assert params.shape == (200, NUM_PARAMS)

    on_cpu = augment(images, params, AUGMENT)
    on_gpu = augment(images.to(cuda.device.name), params.to(cuda.device.name), AUGMENT)

    difference = (on_cpu.int() - on_gpu.cpu().int()).abs()
    assert int(difference.max()) <= 1
    assert float((difference > 0).float().mean()) < 0.01
    assert not torch.equal(on_cpu, images)


# -- memory --------------------------------------------------------------------------------------------------


@pytest.fixture
def memory_limit_reset() -> Iterator[None]:
    """Remove the memory limit of the process after the test."""
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_a_budget_can_be_used_completely_but_not_exceeded(cuda: Config, memory_limit_reset: None) -> None:
    context = replace(cuda.gpu.context_mib, min=0.0, max=800.0)
    config = with_device(replace(cuda, gpu=replace(cuda.gpu, context_mib=context)), vram_budget_mib=1000)
    device = setup_device(config)
    available = 200 * 2**20 - torch.cuda.memory_reserved(device)  # other tests have reserved some
    assert available > 64 * 2**20
    set_memory_limit(config, device)

    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(available + 2**21, dtype=torch.uint8, device=device)
    assert torch.empty(available, dtype=torch.uint8, device=device).nbytes == available
    assert torch.cuda.memory_reserved(device) <= 200 * 2**20


def too_large(cuda: Config) -> Config:
    """Return a config with large images whose budget is little more than the CUDA context."""
    gpu = replace(cuda.gpu, context_mib=replace(cuda.gpu.context_mib, min=300.0, max=600.0))
    wide = replace(cuda, gpu=gpu, captcha=replace(cuda.captcha, width=1024, height=64))
    return with_device(with_train(wide, batch_size=150), vram_budget_mib=640, preload_limit_mib=0)


@pytest.mark.gpu_quick
def test_out_of_memory_is_recorded_with_peak_and_prediction(cuda: Config) -> None:
    with pytest.raises(
        TrainingOutOfMemoryError, match=r"out of memory in .+: peak .+ MiB, predicted .+ MiB for"
    ) as caught:
        train(with_train(too_large(cuda), on_oom="record"))
    state = json.loads((find_run("latest") / "run.json").read_text())

    assert caught.value.exit_code == 0
    assert (state["status"], state["tags"]) == ("FINISHED", {"oom": "true"})
    assert 0 < state["oom"]["peak_mib"] < 1200


def test_on_oom_split_reduces_micro_batches_until_they_fit(cuda: Config, root: Path) -> None:
    """The limit is below the tensors of the whole batch; half of it and cuBLAS's workspace fit.

    Memory reserved without a limit is no measure: with one, cuDNN takes an algorithm with less workspace.
    """
    config = with_train(too_large(cuda), on_oom="split", eval_batch_size=4)
    split_sizes = {"train": 150, "validation": 75, "test": 75}
    tensors = Planner(config, split_sizes).plan_for(150).tensors_mib
    config = with_device(config, vram_budget_mib=600 + round(0.95 * tensors))  # 600: too_large's context

    def run(config: Config) -> Path:
        return train_with_oom_retry(TrainJob(config, {}), lambda each: nullcontext(make_run_dir(each.name)))

    folder = run(config)
    state = json.loads((folder / "run.json").read_text())
    attempts = list(root.glob("outputs/*/*/run.json"))
    micro = load(folder / "config.yaml").train.micro_batch_size
    asked = json.loads((run(with_train(config, micro_batch_size=micro)) / "run.json").read_text())

    assert (state["status"], state.get("oom")) == ("FINISHED", None)
    assert len(attempts) > 1
    assert micro is not None
    assert micro < 150
    assert asked["result"]["weights_sha256"] == state["result"]["weights_sha256"]


PLANNING = """
import sys
from captcha_exp import compose, load
from captcha_exp.runtime.device import nvml_free_bytes
from captcha_exp.sweep.planner import plan_jobs
from captcha_exp.sweep.record import Job
config = load(compose(*sys.argv[1:]))
before = nvml_free_bytes()
plan_jobs([Job(number=1, swept={}, choices={}, requested=config)])
print(max(abs(before[gpu] - free) for gpu, free in nvml_free_bytes().items()))
"""


def test_planning_a_sweep_uses_no_gpu_memory(cuda: Config, cache: Path) -> None:
    """The supervising process creates no CUDA context: each job has the GPU to itself."""
    words = [*TINY, f"data.cache={cache}", "device.name=cuda", "tracking=none"]
    command = [sys.executable, "-c", PLANNING, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert int(done.stdout) < 64 * 2**20, "a CUDA context has 300 MiB"


def test_calibrate_writes_a_gpu_config_that_a_training_can_use(root: Path) -> None:
    """Runs in its own process, since this one has used the GPU."""
    words = [sys.executable, "-m", "captcha_exp", "calibrate", "--json", "--name", "mine"]
    done = subprocess.run(
        [*words, "--config-dir", str(root), "train.batch_size=32"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

    printed = json.loads(done.stdout)
    gpu = load(compose("gpu=mine", config_dir=str(root))).gpu
    assert to_dict(gpu) == printed["gpu"]
    assert Path(printed["path"]) == root / "gpu/mine.yaml"
    properties = torch.cuda.get_device_properties(0)
    assert gpu.name == properties.name
    assert gpu.total_mib is not None
    assert gpu.total_mib.min <= properties.total_memory / 2**20 <= gpu.total_mib.max
    assert 20 < gpu.context_mib.min < gpu.context_mib.max < 3000
    assert 8 <= gpu.cublas_workspace_mib.max <= 128  # 8.1 or 32 for each of two threads
    assert gpu.cudnn_workspace_mib.max < gpu.total_mib.max
    for speed in (gpu.fp16_speedup, gpu.bf16_speedup):
        assert 0 < speed.min <= speed.max < 20
        assert speed.source.startswith("measured") or properties.major < 8


# -- prediction ----------------------------------------------------------------------------------------------


@each_precision
def test_predict_agrees_with_evaluate(cuda: Config, precision: Precision, tmp_path: Path) -> None:
    """On the images of the test split, saved in their original size."""
    folder = train(with_device(cuda, precision=precision)).run_dir
    evaluation, data = evaluate_run(folder, "test", "cuda")
    files = [tmp_path / f"{row}.png" for row in evaluation.indices]
    for row, file in zip(evaluation.indices, files, strict=True):
        Image.fromarray(data.images[int(row)].numpy()).save(file)

    predictor = Predictor(folder / "model.safetensors", "cuda")
    predictions = list(predictor.predict_all(files))

    assert predictor.device.type == "cuda"
    assert [prediction.image for prediction in predictions] == files
    assert [prediction.text for prediction in predictions] == [
        data.alphabet.decode(ids) for ids in evaluation.predicted
    ]
    for prediction, confidences in zip(predictions, evaluation.confidences, strict=True):
        assert prediction.confidences == pytest.approx(confidences, abs=1e-3)


@pytest.mark.gpu_quick
def test_predictions_on_gpu_and_cpu_agree(cuda: Config) -> None:
    """In fp32, except for a few ambiguous images."""
    folder = train(cuda).run_dir
    on_gpu, _ = evaluate_run(folder, "test", "cuda")
    on_cpu, _ = evaluate_run(folder, "test", "cpu")

    assert (on_gpu.indices == on_cpu.indices).all()
    assert float((on_gpu.predicted == on_cpu.predicted).mean()) > 0.95
    assert abs(on_gpu.loss - on_cpu.loss) < 0.01


# -- doctor --------------------------------------------------------------------------------------------------


def test_doctor_reports_gpu_memory_and_driver(cuda: Config) -> None:
    import pynvml

    pynvml.nvmlInit()
    driver = pynvml.nvmlSystemGetDriverVersion()
    pynvml.nvmlShutdown()
    properties = torch.cuda.get_device_properties(0)
    messages = [finding.message for finding in run_checks(collect_info(cuda))]

    assert any(f"NVIDIA driver {driver}" in text for text in messages)
    assert any(f"built for CUDA {torch.version.cuda}" in text for text in messages)
    (memory,) = (text for text in messages if f"cuda:0 ({properties.name})" in text and "MiB free" in text)
    assert f"capability {properties.major}.{properties.minor}" in memory
    figures = re.findall(r"([\d,]+) of ([\d,]+) MiB free", memory)[0]
    free, total = (float(figure.replace(",", "")) for figure in figures)
    assert 0 < free <= total
    # The driver reserves some memory that torch does not count.
    assert total == pytest.approx(properties.total_memory / 2**20, rel=0.05)
    assert any("fast 16-bit types" in text for text in messages) or properties.major < 7
