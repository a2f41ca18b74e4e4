"""Triton launches on the current device: launchers make it their tensors' own. Without a second GPU, on pretended devices."""

from types import SimpleNamespace

import pytest
import torch

device = pytest.importorskip("ras_fast.triton_kernels.device")


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [1])])
def test_the_tensors_device_is_current_during_the_launch(monkeypatch, index, entered):
    current = [0]

    class Guard:
        def __init__(self, where):
            self.index = where.index

        def __enter__(self):
            entered_now.append(self.index)
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    entered_now = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    launcher = device.on_its_device(lambda first, second, *, third: (current[-1], second, third))
    tensor = SimpleNamespace(device=torch.device("cuda", index))
    assert launcher(tensor, 2, third=3) == (index, 2, 3)
    assert entered_now == entered
    assert current == [0]


def test_every_launcher_looks():
    from ras_fast.triton_kernels import attention, gated_linear, norm, rotary

    launchers = (
        attention.region_attention, attention.region_mass, attention.key_attention, attention.region_statistics,
        norm._launch, gated_linear.gated_linear, rotary.rotary_embedding,
    )  # fmt: skip
    assert all(hasattr(launcher, "__wrapped__") for launcher in launchers)
