"""Which kernel an attention call on a GPU goes to: decided from shapes alone, so tested without one."""

import pytest
import torch

from ras_fast import backend
from ras_fast.ops import attention_cuda


@pytest.fixture(params=[True, False], ids=["built", "not built"])
def built(request, monkeypatch):
    state = backend.Backend("cuda", request.param, "not built", "build it")
    monkeypatch.setattr(backend, "backends", lambda: {"cuda": state})
    return request.param


def states(length_q, length_k, dim=128, dtype=torch.bfloat16, heads=32, kv_heads=8):
    shapes = ((1, heads, length_q, dim), (1, kv_heads, length_k, dim), (1, kv_heads, length_k, dim))
    return tuple(torch.empty(shape, dtype=dtype) for shape in shapes)


def kernel(*args, **kwargs):
    return attention_cuda.plan_attention(*args, **kwargs).kernel


def test_few_rows_go_to_the_cuda_kernel(built):
    assert kernel(*states(1, 4096), 1, 1) == ("cuda" if built else "triton")
    assert kernel(*states(16, 4096), 1, 16) == ("cuda" if built else "triton")
    assert kernel(*states(17, 4096), 1, 17) == "triton"


@pytest.mark.parametrize(("rows", "expected"), [(64, "flash"), (128, "flash"), (129, "triton"), (1024, "triton")])
def test_selected_rows_go_to_flash_and_all_rows_to_triton(built, rows, expected):
    assert kernel(*states(1024, 1024), 1, rows) == expected


def test_without_regions_flash_is_enough(built):
    assert kernel(*states(1024, 1024), 0, 1024) == "flash"


def test_what_flash_attention_lacks_goes_to_triton(built):
    assert kernel(*states(1024, 1024), 1, 1, plain=False) == "triton"
    assert kernel(*states(1024, 2048), 1, 1) == "triton"  # its causal mask is aligned top-left
    assert kernel(*states(1024, 2048), 1, 1, is_causal=False) == "flash"
    assert kernel(*states(1024, 1024, dtype=torch.float32), 1, 1) == "triton"


def test_the_reason_names_what_the_cuda_kernels_do_not_take(built):
    if not built:
        return
    assert "float32" in attention_cuda.fits_cuda_kernels(*states(1, 64, dtype=torch.float32))
    assert "not 84" in attention_cuda.fits_cuda_kernels(*states(1, 64, dim=84))
    assert "not 264" in attention_cuda.fits_cuda_kernels(*states(1, 64, dim=264))
    query, key, value = states(1, 64)
    assert attention_cuda.fits_cuda_kernels(query, key, value) == ""
    assert "16 bytes" in attention_cuda.fits_cuda_kernels(query, torch.empty(1, 8, 64, 132, dtype=torch.bfloat16)[..., :128])
