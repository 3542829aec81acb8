"""The parts of gpu_session about time: images per second, matrix products, the cost of determinism."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from gpu_cases import (
    NETWORKS,
    Case,
    clear,
    make_config,
    noise_batch,
    oom_reason,
    peak_memory,
    reset_peaks,
    step_seconds,
    wait,
)

from captcha_exp.config import Config
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices


def speed(network: str, variant: str, max_batch: int, seconds: float, device: str) -> dict[str, Any]:
    """Return images per second and peak memory by batch size, doubled from 8 until it does not fit."""
    torch_device = torch.device(device)
    config = make_config(Case(network, variant, 8), device)
    devices.setup_device(config)
    rows: list[dict[str, Any]] = []
    size = 8
    while size <= max_batch:
        sized = replace(config, train=replace(config.train, batch_size=size))
        row: dict[str, Any] = {"batch": size}

        def measure(config: Config = sized, row: dict[str, Any] = row) -> None:
            reset_peaks(torch_device)
            row["images_per_second"] = _images_per_second(config, seconds, torch_device)
            row.update(peak_memory(torch_device))

        reason = oom_reason(measure, torch_device)
        rows.append(row if reason is None else {**row, "reason": reason})
        if reason is not None:
            break
        size *= 2
    return {"network": network, "variant": variant, "rows": rows}


def _images_per_second(config: Config, seconds: float, device: torch.device) -> float:
    """Return the images per second of training steps on one batch, after a warm-up."""
    state, batch = init_train_state(config, device), noise_batch(config, device)
    state.model.train()
    for _ in range(1 if device.type == "cpu" else 3):
        train_step(state, batch, config)
    wait(device)
    began, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - began < seconds:
        for _ in range(1 if device.type == "cpu" else 5):  # synchronizing after each step would idle the GPU
            train_step(state, batch, config)
            steps += 1
        wait(device)
    return steps * len(batch.indices) / (time.perf_counter() - began)


def matrix_products(size: int, seconds: float, device: str) -> dict[str, float]:
    """Return the TFLOP/s of the product of two random square matrices, by precision."""
    torch_device = torch.device(device)
    precisions = {"fp32": ("highest", torch.float32), "tf32": ("high", torch.float32)}
    precisions |= {"bf16": ("highest", torch.bfloat16), "fp16": ("highest", torch.float16)}
    found = {}
    for name, (precision, dtype) in precisions.items():
        torch.set_float32_matmul_precision(precision)
        left, right = (torch.randn(size, size, device=torch_device).to(dtype) for _ in range(2))
        for _ in range(3):
            left @ right
        wait(torch_device)
        began, products = time.perf_counter(), 0
        while products < 2 or time.perf_counter() - began < seconds:
            for _ in range(1 if device == "cpu" else 20):
                left @ right
                products += 1
            wait(torch_device)
        found[name] = 2 * size**3 * products / (time.perf_counter() - began) / 1e12
    return found


def determinism(deterministic: bool, batches: dict[str, int], steps: int, device: str) -> dict[str, Any]:
    """Return the median seconds of a step of each network with train.deterministic on or off."""
    torch_device = torch.device(device)
    found = {}
    for network in NETWORKS:
        override = f"train.deterministic={str(deterministic).lower()}"
        config = make_config(Case(network, "fp32", batches[network]), device, override)
        devices.setup_device(config)
        state, batch = init_train_state(config, torch_device), noise_batch(config, torch_device)
        state.model.train()

        def step(config: Config = config, state: Any = state, batch: Any = batch) -> object:
            return train_step(state, batch, config)

        step_seconds(
            step, 2 if device == "cpu" else 10, torch_device
        )  # loads kernels and, if not deterministic, benchmarks them
        found[network] = step_seconds(step, steps, torch_device)
        clear(torch_device)
    return {"deterministic": deterministic, "batches": batches, "step_seconds": found}


def graphs(batches: dict[str, int], variants: Sequence[str], steps: int, device: str) -> dict[str, Any]:
    """Return the median seconds of an eager step and of one replayed as a CUDA graph.

    The CPU has no graphs and only the first figure. The learning rate is part of the graph: this measures
    speed only, it is not a valid training.
    """
    torch_device = torch.device(device)
    found = {}
    for network, batch_size in batches.items():
        for variant in variants:
            name = f"{network}-{variant}-{batch_size}"
            config = make_config(Case(network, variant, batch_size), device)
            devices.setup_device(config)
            state, batch = init_train_state(config, torch_device), noise_batch(config, torch_device)
            state.model.train()

            def step(config: Config = config, state: Any = state, batch: Any = batch) -> object:
                return train_step(state, batch, config)

            if torch_device.type != "cuda":
                found[name] = {"eager": step_seconds(step, steps, torch_device)}
                continue
            for group in state.optimizer.param_groups:
                group["capturable"] = True
            # The default stream cannot be captured.
            stream = torch.cuda.Stream(torch_device)  # type: ignore[no-untyped-call]  # torch has no types for it
            stream.wait_stream(torch.cuda.current_stream(torch_device))
            with torch.cuda.stream(stream):
                step_seconds(step, 5, torch_device)
                eager = step_seconds(step, steps, torch_device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    step()
                replayed = step_seconds(graph.replay, steps, torch_device)
            found[name] = {"eager": eager, "graph": replayed}
            del graph
            clear(torch_device)
    return {"step_seconds": found}
