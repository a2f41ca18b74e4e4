"""The device a Triton kernel runs on."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """(architecture, number of multiprocessors); the interpreter on the CPU plays a small Hopper."""
    if device.type != "cuda":
        return 90, 4
    facts = torch.cuda.get_device_properties(device)
    return facts.major * 10 + facts.minor, facts.multi_processor_count


def on_its_device(launcher: Callable) -> Callable:
    """Makes the device of the first tensor the current one: that is where Triton launches, wherever the tensors are."""

    @functools.wraps(launcher)
    def launch(first: torch.Tensor, *rest, **keywords):
        if first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return launcher(first, *rest, **keywords)
        with torch.cuda.device(first.device):
            return launcher(first, *rest, **keywords)

    return launch
