"""write_cache_ on a GPU: beside plain indexing, in graphs, next to kernels that it overlaps with."""

import caches
import pytest
import torch

import ras_fast
from ras_fast import ops
from ras_fast.engine.graphs import capture

CUDA = ras_fast.backends()["cuda"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA.available, reason=str(CUDA))]


def inputs(*shape, dtype=torch.bfloat16, **more):
    return caches.inputs(*shape, dtype, device="cuda", **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32, 700, 2, 128), (8, 8, 90, 3, 72), (3, 1, 7, 7, 1), (2, 32, 700, 600, 64)], ids=str)
def test_writes_what_indexing_does(shape, dtype):
    caches.check(ops.write_cache_, *inputs(*shape, dtype=dtype))
    caches.check(ops.write_cache_, *inputs(*shape, dtype=dtype, value_dim=24))


def test_a_slot_outside_of_the_cache_is_dropped():
    keys, values, slots, key, value = inputs(1, 2, 5, 3, 8)
    before = keys.clone()
    slots[0] = torch.tensor([-1, 5, 2])
    ops.write_cache_(keys, values, slots, key, value)
    before[:, :, 2] = key[:, :, 2]
    assert torch.equal(keys, before)


def test_in_a_graph_between_what_makes_and_what_reads_its_rows():
    """On Hopper all three overlap."""
    keys, values, slots, key, value = inputs(2, 8, 300, 1, 128)
    query, end = torch.randn(2, 32, 1, 128, device="cuda").bfloat16(), torch.full((2,), 300, device="cuda", dtype=torch.int32)
    cos, sin = torch.randn(2, 2, 1, 128, device="cuda").bfloat16()

    def call():
        rotated, new = ops.rotary_embedding(query, key, cos, sin)
        ops.write_cache_(keys, values, slots, new, value)
        return ops.region_attention(rotated, keys, values, None, 0, kv_end=end)[0]

    replay = capture(call)
    for _ in range(20):
        for tensor in (query, key, value, keys):
            tensor.copy_(torch.randn_like(tensor))
        slots.copy_(torch.randint(0, 300, (2, 1)))
        got = replay().clone()
        assert torch.equal(got, call())
