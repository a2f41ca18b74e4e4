"""The rotary kernels on a GPU: the bits of Hugging Face's eager code, in graphs, next to kernels that they overlap with."""

import pytest
import rotations
import torch

import ras_fast
from ras_fast import ops
from ras_fast.engine.graphs import capture

CUDA = ras_fast.backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA.available, reason=str(CUDA))]
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"], indirect=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def rand(*shape, dtype):
    return torch.randn(*shape, device="cuda").to(dtype)


def inputs(*shape, **settings):
    return rotations.inputs(*shape, device="cuda", **settings)


def check(*given):
    for interleaved in (False, True):
        rotations.check(ops.rotary_embedding(*given, interleaved=interleaved), *given, interleaved)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotated"), [(2, 2), (14, 10), (64, 64), (72, 72), (80, 32), (128, 128), (256, 64)])
def test_bits_of_eager_code(backend, dim, rotated, dtype):
    for shape in ((2, 6, 2, 5), (3, 9, 9, 1), (1, 40, 8, 1000), (0, 4, 2, 3)):
        for tables in {1, shape[0]} - {0}:
            check(*inputs(*shape, dim, rotated, dtype, tables))
            check(*inputs(*shape, dim, rotated, dtype, tables, table_dtype=torch.float32))


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_values_that_are_not_finite(backend, dtype):
    query, key, cos, sin = inputs(2, 4, 2, 6, 64, 64, dtype, 2)
    joint = rand(2, 6, 4 * 64 + 2 * 64 + 3, dtype=dtype)
    query[0, 0, 1, 3], key[0, 1, 2, 20] = torch.nan, torch.inf
    for given in (
        (joint[..., 1:257].view(2, 6, 4, 64).transpose(1, 2), joint[..., 257:385].view(2, 6, 2, 64).transpose(1, 2), cos, sin),
        (query.contiguous(), key.contiguous(), cos.repeat_interleave(2, 1)[:, ::2], sin),
        (query[:1].expand(3, -1, -1, -1), key[1:].expand(3, -1, -1, -1), cos[:1].expand(3, -1, -1), sin[:1]),
    ):
        check(*given)


@BACKENDS
def test_in_a_graph_behind_what_writes_its_inputs(backend):
    """On Hopper the kernel starts before the one that makes its queries has ended."""
    query, key, cos, sin = inputs(2, 32, 8, 3, 128, 128, torch.bfloat16, 2)
    weight = rand(128, 128, dtype=torch.bfloat16)

    def call():
        return ops.rotary_embedding(query @ weight, key @ weight, cos + 1, sin)

    replay = capture(call)
    for _ in range(20):
        for tensor in (query, key, cos, sin):
            tensor.copy_(torch.randn_like(tensor))
        got = replay()
        rotations.check(got, query @ weight, key @ weight, cos + 1, sin)
