"""torch's attention on a GPU as the ops call it: arguments and results of either kernel, on tensors that have no memory."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend

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
