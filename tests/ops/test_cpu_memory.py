"""The CPU kernels read and write nothing beyond their tensors: here these end where the process's memory does."""

import ctypes
import mmap
import subprocess
import sys
from functools import partial

import pytest
import torch

from ras_fast import ops


def at_the_end(tensor):
    """The same values before a page that may not be touched."""
    size = tensor.numel() * tensor.element_size()
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    past = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room)
    assert ctypes.CDLL(None).mprotect(past, mmap.PAGESIZE, 0) == 0  # PROT_NONE
    end = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return end.view(tensor.shape).copy_(tensor)


def call_every_kernel(dim, dtype):
    def rand(*shape, of=dtype):
        return at_the_end(torch.randn(shape).to(of))

    ids, bias = at_the_end(torch.arange(29, dtype=torch.int32)[None] % 3 - 1), rand(2, 2, of=torch.float32)
    key, value = rand(1, 1, 29, dim), rand(1, 1, 29, dim)
    for rows in (1, 9):
        query = rand(1, 2, rows, dim)
        masks = {"num_regions": 2, "region_bias": bias}
        _, lse, _ = ops.region_attention(query, key, value, ids, sinks=rand(2, of=torch.float32), **masks)
        ops.region_statistics(query, key, at_the_end(lse), ids, **masks)
        ops.region_mass(query, key, at_the_end(lse), ids, **masks)

    steer = {"steer_vectors": rand(2, dim), "steer_slot": at_the_end(torch.tensor([1, -1, 0], dtype=torch.int32)),
             "steer_alpha": rand(3, of=torch.float32), "probes": rand(2, dim)}  # fmt: skip
    for mode in ("add", "lerp"):
        layer = partial(ops.add_layer_norm, bias=rand(dim))
        for norm in (ops.add_rms_norm, ops.add_rms_norm_, layer):
            norm(rand(3, dim), rand(3, dim), rand(dim), eps=1e-6, steer_mode=mode, **steer)
    for rows in (1, 3, 18):
        ops.linear(rand(rows, dim), rand(5, dim), rand(5))
        ops.linears(rand(rows, dim), [rand(5, dim), rand(3, dim)], [rand(5), None])
        ops.linear_glu(rand(rows, dim), rand(4, dim), rand(4, dim))
    ops.gated_linear(rand(6, dim), rand(dim, dim), rand(6, of=torch.float32))
    ops.gated_linear(rand(6, dim), rand(dim, 5), rand(6, of=torch.float32), right=rand(5, dim))
    for rotated in {dim // 2 * 2, dim // 4 * 2} - {0}:
        ops.rotary_embedding(rand(1, 2, 3, dim), rand(1, 1, 3, dim), rand(1, 3, rotated), rand(1, 3, rotated))
    ops.gelu_tanh(rand(3, dim))
    ops.quick_gelu(rand(3, dim))
    ops.refusal_similarity(rand(2, 3, dim), rand(3, dim, of=torch.float32))


@pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect")
def test_nothing_beyond_the_tensors_is_touched():
    """In a process of its own, which a forbidden access ends."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


if __name__ == "__main__":
    for dim in (1, 7, 37, 64):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            print(dim, dtype, flush=True)
            call_every_kernel(dim, dtype)
