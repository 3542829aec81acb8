"""What is said of torch's build, the NVIDIA driver and the cards."""

import re
from collections.abc import Iterator, Sequence

from captcha_exp.doctor.machine_info import Card, Driver, Facts, Finding, Holder, Level, Torch

GET_TORCH = "pytorch.org, 'Get started'"
GET_DRIVER = "nvidia.com/drivers"
# docs.nvidia.com, 'CUDA Compatibility': from these on, a driver runs every minor version of the CUDA.
DRIVER_FOR = {11: 450, 12: 525, 13: 580}
MOSTLY_HELD = 0.5  # share of a card that others hold
CARD_FULL_MIB = 512
UNKNOWN_MIB = 1024  # more is in use than a driver and a desktop take for themselves

# Turing without tensor cores (TU116, TU117), though its capability, 7.5, is that of the cards with them.
_WITHOUT_TENSOR_CORES = re.compile(r"GTX 16\d\d|\bMX ?[45]50\b|\bT(400|500|550|600|1000|1200|2000)\b")


def of_cards(facts: Facts) -> Iterator[Finding]:
    """The build, the driver, what is hidden, each card."""
    yield from _build(facts)
    yield from _driver(facts)
    yield from _not_seen(facts)
    for card in facts.cards:
        yield from _card(facts, card)


def _build(facts: Facts) -> Iterator[Finding]:
    torch = facts.torch
    if torch is None:
        if facts.torch_error:
            remedy = f"python -m pip install --force-reinstall torch (which build: {GET_TORCH})"
            yield Finding("problem", f"torch cannot be imported: {facts.torch_error}", remedy)
    elif torch.cuda:
        yield Finding("ok", f"torch {torch.version} is built for CUDA {torch.cuda}")
    elif torch.hip:
        text = f"torch {torch.version} is built for ROCm {torch.hip}"
        if any(name.startswith("cuda") for name in facts.devices):
            yield Finding("ok", text)
        else:
            text += f", which is not used here: training takes {', '.join(facts.devices[:1])}"
            yield Finding("note", text, f"go on without the card; CUDA builds: {GET_TORCH}")
    elif facts.cards:
        names = ", ".join(card.name for card in facts.cards)
        text = f"torch {torch.version} is a CPU-only build, on a machine with {names}"
        level: Level = "note" if facts.device_name == "cpu" else "problem"
        yield Finding(level, text, _another_build(torch, facts.driver, facts.cards))
    elif torch.mps:
        yield Finding("ok", f"torch {torch.version} is built with MPS")
    else:
        yield Finding("ok", f"torch {torch.version} is a CPU-only build, no NVIDIA card answers")


def _another_build(torch: Torch, driver: Driver, cards: Sequence[Card]) -> str:
    """What to install, for a driver and cards."""
    fitting = _fitting(torch, driver, cards)
    if fitting:
        return f"install torch built for CUDA {' or '.join(fitting)} ({GET_TORCH})"
    if torch.releases and driver.cuda:
        return f"install the newest driver ({GET_DRIVER}), then torch built for CUDA ({GET_TORCH})"
    newest = f"{driver.cuda[0]}.x" if driver.cuda else "(nvidia-smi says which version the driver takes)"
    return f"install torch built for CUDA {newest} ({GET_TORCH})"


def _fitting(torch: Torch, driver: Driver, cards: Sequence[Card]) -> list[str]:
    """CUDA of the builds of this release that the driver and one of the cards take, the newest first."""
    fitting = [
        cuda
        for cuda, capabilities in torch.releases.items()
        if (driver.cuda is None or _numbers(cuda)[0] <= driver.cuda[0])
        and any(_served(card, [f"sm_{number}" for number in capabilities]) == "" for card in cards)
    ]
    return sorted(fitting, key=_numbers, reverse=True)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _driver(facts: Facts) -> Iterator[Finding]:
    driver, torch = facts.driver, facts.torch
    for card in driver.unreachable:
        yield Finding("problem", f"NVIDIA card {card}", "restart the machine; see nvidia-smi")
    if driver.mismatch:
        yield Finding(
            "problem",
            f"NVIDIA driver: it was updated and the old one still runs ({driver.error})",
            "restart the machine",
        )
    elif driver.error and facts.cards and not (torch and torch.hip):
        text = f"NVML does not answer ({driver.error}): who holds the memory of the cards is unknown"
        remedy = "python -m pip install nvidia-ml-py; in a container, see nvidia-smi on the host"
        yield Finding("note", text, remedy)
    elif driver.error and facts.pci_cards:
        yield Finding(
            "note",
            f"NVIDIA driver: none answers ({driver.error}), {facts.pci_cards} NVIDIA cards on the bus",
            f"install it ({GET_DRIVER}); start a container with --gpus all",
        )
    elif driver.error and facts.pci_cards is None and torch is not None and torch.cuda:
        text = f"NVIDIA driver: none answers ({driver.error}); torch is built for CUDA"
        yield Finding("note", text, f"if there is an NVIDIA card, install its driver ({GET_DRIVER})")
    elif driver.error:
        yield Finding("ok", f"NVIDIA driver: none ({driver.error}), and none is needed without a card")
    elif driver.version:
        takes = f", takes CUDA {driver.cuda[0]}.{driver.cuda[1]}" if driver.cuda else ""
        text = f"NVIDIA driver {driver.version}{takes}"
        if not _too_old(facts):
            build = _numbers(torch.cuda) if torch and torch.cuda else ()
            if driver.cuda and driver.cuda < build:
                text += " and, by minor-version compatibility, torch's"
            yield Finding("ok", text)
            return
        assert torch is not None  # or no driver would be too old for it
        assert torch.cuda is not None
        needed = DRIVER_FOR.get(_numbers(torch.cuda)[0])
        newer = f"a driver from {needed} on" if needed else "the newest driver"
        fitting = _fitting(torch, driver, facts.cards)
        older = f", or torch built for CUDA {' or '.join(fitting)} ({GET_TORCH})" if fitting else ""
        yield Finding(
            "problem",
            f"{text}: too old for torch's CUDA {torch.cuda}",
            f"install {newer} ({GET_DRIVER}){older}",
        )


def _too_old(facts: Facts) -> bool:
    """Whether the driver is of a CUDA before the build's; minor versions get on."""
    torch, newest = facts.torch, facts.driver.cuda
    return bool(torch and torch.cuda and newest and newest[0] < _numbers(torch.cuda)[0])


def _not_seen(facts: Facts) -> Iterator[Finding]:
    """Cards that NVML has and torch, though built for them, has not."""
    torch = facts.torch
    missing = [card.name for card in facts.cards if card.device is None]
    if torch is None or torch.cuda is None or not missing or _too_old(facts):
        return
    if facts.visible_devices is not None:
        hides = f"hides {len(missing)} of {len(facts.cards)} cards from torch: {', '.join(missing)}"
        text = f"CUDA_VISIBLE_DEVICES={facts.visible_devices!r} {hides}"
        yield Finding("note", text, "unset CUDA_VISIBLE_DEVICES")
    elif not torch.works:
        says = f": {torch.says[:200]}" if torch.says else ""
        yield Finding(
            "problem",
            f"torch sees no card, the driver has {', '.join(missing)}{says}",
            "restart the machine; start a container with --gpus all; see nvidia-smi",
        )


def _card(facts: Facts, card: Card) -> Iterator[Finding]:
    if card.device is None:
        yield Finding("ok", f"a card that torch does not use: {card.name}{_state(card)}")
        return
    chosen = _chosen(facts) == card.device
    name = f"{card.device} ({card.name})"
    yield from _suits(facts, card, name, chosen)
    yield from _memory(facts, card, name, chosen)
    capable = card.capability is not None and card.capability >= (7, 0)
    if card.capability == (7, 5) and _WITHOUT_TENSOR_CORES.search(card.name):
        capable = False
        level: Level = "problem" if chosen and facts.precision == "fp16" else "note"
        text = f"{name} has no tensor cores: fp16 gives NaN in some convolutions, 2 to 4 times slower"
        yield Finding(level, text, "device.precision=auto (tries it), or fp32")
    if chosen and facts.precision == "bf16" and not card.bf16:
        text = f"{name}: device.precision=bf16 is only emulated on this card, and slower than fp32"
        yield Finding("note", text, "device.precision=fp32")
    elif card.capability is not None:  # AMD's cards have none
        kinds = [kind for kind, has in (("bf16", card.bf16), ("fp16", capable)) if has]
        yield Finding("ok", f"{name}: 16 bits at full speed: {' and '.join(kinds) or 'none, take fp32'}")


def _suits(facts: Facts, card: Card, name: str, chosen: bool) -> Iterator[Finding]:
    """Whether the build has programs for the card."""
    torch = facts.torch
    if torch is None or torch.cuda is None or card.capability is None or not torch.archs:
        return
    capability = "{}.{}".format(*card.capability)
    level: Level = "problem" if chosen else "note"
    verdict = _served(card, torch.archs)
    if verdict and verdict != "translated":
        others = [c for c in _fitting(torch, facts.driver, [card]) if c != torch.cuda]
        if others:
            builds = f"torch built for CUDA {' or '.join(others)} ({GET_TORCH})"
            remedy = f"install {builds}, or device.name=cpu"
        elif verdict == "too old for":
            remedy = "device.name=cpu"
        else:
            remedy = f"install the newest torch that is supported ({GET_TORCH}), or device.name=cpu"
        archs = " ".join(torch.archs)
        text = f"{name}: capability {capability} is {verdict} this torch, which has {archs}"
        yield Finding(level, text, remedy)
    elif verdict and facts.driver.cuda and facts.driver.cuda < _numbers(torch.cuda):
        # By minor-version compatibility a driver runs machine code, and does not translate.
        text = f"{name}: the driver must translate torch's programs, and is older than CUDA {torch.cuda}"
        yield Finding(level, text, f"install the newest driver ({GET_DRIVER})")


def _served(card: Card, archs: Sequence[str]) -> str:
    """Empty if there is machine code for the card, else `translated`, `too old for`, `too new for` ...

    Machine code for 8.0 runs on 8.6 and not on 9.0 or 7.5; a program to be translated runs on every
    later card. What ends in `a` is for that very card alone.
    """
    if card.capability is None:
        return ""
    here = card.capability
    kinds = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch) for arch in archs]
    known = [(m[1], (int(m[2]), int(m[3])), m[4]) for m in kinds if m]
    for kind, made_for, only in known:
        suits = made_for == here if only == "a" else made_for <= here
        if kind == "sm" and made_for[0] == here[0] and suits:
            return ""
    if any(kind == "compute" and made_for <= here and not only for kind, made_for, only in known):
        return "translated"
    if not known:
        return ""
    numbers = [made_for for _, made_for, _ in known]
    if here < min(numbers):
        return "too old for"
    return "too new for" if here > max(numbers) else "left out of"


def _chosen(facts: Facts) -> str | None:
    name = facts.devices[0] if facts.device_name == "auto" and facts.devices else facts.device_name
    return "cuda:0" if name == "cuda" else name


def _state(card: Card) -> str:
    """Capability, memory and who holds it."""
    capability = ", capability {}.{}".format(*card.capability) if card.capability else ""
    if card.total_mib is None or card.free_mib is None:
        return capability
    text = f"{capability}: {card.free_mib:,.0f} of {card.total_mib:,.0f} MiB free"
    if card.holders:
        return f"{text}, held by {', '.join(map(_holder, card.holders))}"
    unknown = card.total_mib - card.free_mib > UNKNOWN_MIB
    return text + (", who holds the rest is unknown (a container hides it)" if unknown else "")


def _holder(holder: Holder) -> str:
    return f"{holder.pid} {holder.name}" + (f" {holder.mib:,.0f} MiB" if holder.mib else "")


def _memory(facts: Facts, card: Card, name: str, chosen: bool) -> Iterator[Finding]:
    text = name + _state(card)
    if card.total_mib is None or card.free_mib is None or card.free_mib > MOSTLY_HELD * card.total_mib:
        yield Finding("ok", text)
        return
    freer = [c for c in facts.cards if c.device and (c.free_mib or 0) > 2 * card.free_mib]
    best = max(freer, key=lambda c: c.free_mib or 0, default=None)
    other = f"device.name={best.device} has {best.free_mib:,.0f} MiB free; or " if best else ""
    largest = max(card.holders, key=lambda holder: holder.mib or 0, default=None)
    wait = (
        f"end process {largest.pid} ({largest.name}), or wait for it"
        if largest
        else "see on the host, with nvidia-smi, who holds it"
    )
    full = chosen and card.free_mib < CARD_FULL_MIB
    yield Finding("problem" if full else "note", text, other + wait)
