"""Attention on a GPU as the ops call it: what reaches a kernel, and what torch's give, on tensors that have no memory."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

from ras_fast import backend, ops
from ras_fast.ops import attention_cuda


@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("length_q", "length_k", "is_causal"), [(640, 640, True), (17, 333, False)])
def test_both_kernels_leave_an_lse_a_row(monkeypatch, backend, dim, length_q, length_k, is_causal):
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **options: backend.value)
    with FakeTensorMode():
        query = torch.empty(2, length_q, 8, dim, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        key, value = (torch.empty(2, 2, length_k, dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        out, lse = attention_cuda.flash(query, key, value, is_causal, 0.1)
    assert (out.shape, out.dtype) == (query.shape, query.dtype)
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)


class OnDevice(torch.Tensor):
    """Without memory, on a device that is not there; says which op it has reached."""

    @staticmethod
    def __new__(cls, *shape, dtype=torch.bfloat16):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cuda:0")

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise SystemError(f"reached {function}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_end": (2, torch.int64)}, "kv_end"),
        ({"kv_end": (1, torch.int32)}, "kv_end"),
        ({"value": (2, 2, 9, 64)}, "value"),
        ({"value": (2, 2, 90, 64, torch.float32)}, "value"),
        ({"key": (1, 2, 90, 64)}, "key"),
        ({"region_ids": (1, 90, torch.int32), "num_regions": 3}, "region_ids"),
        ({"region_ids": (2, 90, torch.int32), "num_regions": 3, "region_bias": (1, 3, torch.float32)}, "region_bias"),
    ],
)
def test_what_a_gpu_would_read_wrongly_is_refused_before(monkeypatch, arguments, message):
    """A library that is built makes no difference: its kernels take what they are given."""

    def on_device(given):
        if not isinstance(given, tuple):
            return given
        *shape, dtype = given if isinstance(given[-1], torch.dtype) else (*given, torch.bfloat16)
        return OnDevice(*shape, dtype=dtype)

    monkeypatch.setattr(backend, "has_kernel", lambda name, device: True)
    monkeypatch.setattr("ras_fast.ops._registry._selected", {})
    monkeypatch.setattr("ras_fast.ops._registry.backend.resolve", lambda name, device: "cuda")
    right = {"query": (2, 4, 1, 64), "key": (2, 2, 90, 64), "value": (2, 2, 90, 64)}
    with pytest.raises(SystemError, match="reached ras_fast"):
        ops.region_attention(**{name: on_device(given) for name, given in right.items()})
    with pytest.raises(ValueError, match=rf"^{message} is "):
        ops.region_attention(**{name: on_device(given) for name, given in (right | arguments).items()})
