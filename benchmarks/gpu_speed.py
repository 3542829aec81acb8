"""The parts of gpu_session about time: pictures per second, matrix products, the price of determinism."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from gpu_cases import (
    NETWORKS,
    Case,
    attempt,
    clear,
    config_of,
    noise_batch,
    peaks,
    start,
    step_seconds,
    wait,
)

from captcha_exp.config import Config
from captcha_exp.model.step import init_train_state, train_step
from captcha_exp.runtime import device as devices


def speed(network: str, variant: str, most: int, seconds: float, device: str) -> dict[str, Any]:
    """Pictures per second and peaks of memory against the batch, which doubles from 8 on until none fits."""
    place = torch.device(device)
    config = config_of(Case(network, variant, 8), device)
    devices.setup_device(config)
    rows: list[dict[str, Any]] = []
    size = 8
    while size <= most:
        sized = replace(config, train=replace(config.train, batch_size=size))
        row: dict[str, Any] = {"batch": size}

        def measure(config: Config = sized, row: dict[str, Any] = row) -> None:
            start(place)
            row["images_per_second"] = _pictures_per_second(config, seconds, place)
            row.update(peaks(place))

        reason = attempt(measure, place)
        rows.append(row if reason is None else {**row, "reason": reason})
        if reason is not None:
            break
        size *= 2
    return {"network": network, "variant": variant, "rows": rows}


def _pictures_per_second(config: Config, seconds: float, device: torch.device) -> float:
    """Of training steps on one batch, after three that are not counted."""
    state, batch = init_train_state(config, device), noise_batch(config, device)
    state.model.train()
    for _ in range(1 if device.type == "cpu" else 3):
        train_step(state, batch, config)
    wait(device)
    began, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - began < seconds:
        for _ in range(1 if device.type == "cpu" else 5):  # waiting after each would let the card run dry
            train_step(state, batch, config)
            steps += 1
        wait(device)
    return steps * len(batch.indices) / (time.perf_counter() - began)


def matrix_products(size: int, seconds: float, device: str) -> dict[str, float]:
    """TFLOP/s of a product of two square matrices of noise, for each kind of number."""
    place = torch.device(device)
    kinds = {"fp32": ("highest", torch.float32), "tf32": ("high", torch.float32)}
    kinds |= {"bf16": ("highest", torch.bfloat16), "fp16": ("highest", torch.float16)}
    found = {}
    for name, (precision, dtype) in kinds.items():
        torch.set_float32_matmul_precision(precision)
        left, right = (torch.randn(size, size, device=place).to(dtype) for _ in range(2))
        for _ in range(3):
            left @ right
        wait(place)
        began, products = time.perf_counter(), 0
        while products < 2 or time.perf_counter() - began < seconds:
            for _ in range(1 if device == "cpu" else 20):
                left @ right
                products += 1
            wait(place)
        found[name] = 2 * size**3 * products / (time.perf_counter() - began) / 1e12
    return found


def determinism(deterministic: bool, batches: dict[str, int], steps: int, device: str) -> dict[str, Any]:
    """The median seconds of a step of each network with train.deterministic on or off."""
    place = torch.device(device)
    found = {}
    for network in NETWORKS:
        more = f"train.deterministic={str(deterministic).lower()}"
        config = config_of(Case(network, "fp32", batches[network]), device, more)
        devices.setup_device(config)
        state, batch = init_train_state(config, place), noise_batch(config, place)
        state.model.train()

        def step(config: Config = config, state: Any = state, batch: Any = batch) -> object:
            return train_step(state, batch, config)

        step_seconds(step, 2 if device == "cpu" else 10, place)  # loads kernels; without it, chooses them
        found[network] = step_seconds(step, steps, place)
        clear(place)
    return {"deterministic": deterministic, "batches": batches, "step_seconds": found}


def graphs(batches: dict[str, int], variants: Sequence[str], steps: int, device: str) -> dict[str, Any]:
    """Return the median seconds of a step launched kernel by kernel, and replayed as one CUDA graph.

    The CPU has no graphs: there it is the first alone. The learning rate is part of the graph, so this is a
    measurement, not a training.
    """
    place = torch.device(device)
    found = {}
    for network, batch_size in batches.items():
        for variant in variants:
            name = f"{network}-{variant}-{batch_size}"
            config = config_of(Case(network, variant, batch_size), device)
            devices.setup_device(config)
            state, batch = init_train_state(config, place), noise_batch(config, place)
            state.model.train()

            def step(config: Config = config, state: Any = state, batch: Any = batch) -> object:
                return train_step(state, batch, config)

            if place.type != "cuda":
                found[name] = {"eager": step_seconds(step, steps, place)}
                continue
            for group in state.optimizer.param_groups:
                group["capturable"] = True
            stream = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]  # no capture on the default one
            stream.wait_stream(torch.cuda.current_stream(place))
            with torch.cuda.stream(stream):
                step_seconds(step, 5, place)
                eager = step_seconds(step, steps, place)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    step()
                replayed = step_seconds(graph.replay, steps, place)
            found[name] = {"eager": eager, "graph": replayed}
            del graph
            clear(place)
    return {"step_seconds": found}
