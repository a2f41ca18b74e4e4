"""write_cache_: every backend beside plain indexing."""

import caches
import pytest
import torch
from caches import inputs

from ras_fast import ops

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch", "triton"], indirect=True)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def check(*given):
    caches.check(ops.write_cache_, *given)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("shape", [(1, 8, 40, 1, 128), (2, 3, 9, 5, 20), (3, 1, 7, 7, 1), (1, 16, 700, 600, 64)], ids=str)
def test_writes_what_indexing_does(backend, shape, dtype):
    check(*inputs(*shape, dtype))
    check(*inputs(*shape, dtype, value_dim=24))


@BACKENDS
def test_nothing_to_write(backend):
    for batch, heads, tokens in ((0, 2, 3), (2, 0, 3), (2, 2, 0)):
        check(*inputs(batch, heads, 8, tokens, 16, torch.float32))


@BACKENDS
def test_strides(backend):
    """Some rows of a larger cache, slots of one tensor for all rows, slices of a joint projection, a token that repeats."""
    keys, values, slots, key, value = inputs(4, 2, 9, 3, 16, torch.bfloat16)
    check(keys[1:3], values[1:3], slots[1:3], key[1:3], value[1:3])
    check(keys[:, :, 1:], values[:, :, 1:], slots[:1].clamp(max=7).expand(4, -1), key, value)
    check(keys, values, slots.T.contiguous().T, key.contiguous(), value[:, :, :1].expand(-1, -1, 3, -1))
    joint = torch.randn(4, 3, 2 * 2 * 16 + 1).bfloat16()[..., 1:].view(4, 3, 2, 2, 16).permute(2, 0, 3, 1, 4)
    check(keys, values, slots, joint[0], joint[1])


@BACKENDS
def test_what_is_not_finite_is_copied(backend):
    keys, values, slots, key, value = inputs(1, 2, 5, 2, 8, torch.float16)
    key[0, 0, 0, 3], value[0, 1, 1, 0], keys[0, 1, 4] = torch.nan, -torch.inf, torch.nan
    check(keys, values, slots, key, value)


@BACKENDS
def test_two_tokens_of_one_slot(backend):
    keys, values, slots, key, value = inputs(1, 2, 5, 3, 8, torch.float32)
    slots[0, 1] = slots[0, 0]
    ops.write_cache_(keys, values, slots, key, value)
    place = slots[0, 0]
    assert any(torch.equal(keys[0, :, place], key[0, :, t]) for t in (0, 1))


@pytest.mark.parametrize("slot", [-1, 5, 2**40])
@pytest.mark.parametrize("backend", ["cpu", "torch"], indirect=True)
def test_a_slot_outside_of_the_cache(backend, slot):
    keys, values, slots, key, value = inputs(2, 2, 5, 3, 8, torch.float32)
    slots[1, 2] = slot
    before = keys.clone(), values.clone()
    with pytest.raises(RuntimeError, match=f"slots holds {slot}; the cache has 5 slots"):
        ops.write_cache_(keys, values, slots, key, value)
    assert torch.equal(keys, before[0])
    assert torch.equal(values, before[1])


def wrong(**changes):
    names = ("keys", "values", "slots", "key", "value")
    given = dict(zip(names, inputs(2, 3, 7, 4, 16, torch.bfloat16), strict=True))
    return [*(given | {name: change(given[name]) for name, change in changes.items()}).values()]


@BACKENDS
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("keys", lambda t: t[0]), ("keys", lambda t: t.long()), ("keys", lambda t: t.mT.contiguous().mT),
        ("values", lambda t: t[:, :2]), ("values", lambda t: t.float()), ("values", lambda t: t[:, :, :5]),
        ("slots", lambda t: t.int()), ("slots", lambda t: t[0]), ("slots", lambda t: t[:1]), ("slots", lambda t: t[:, :3]),
        ("key", lambda t: t[..., :8]), ("key", lambda t: t.half()), ("key", lambda t: t.transpose(1, 2)),
        ("value", lambda t: t[:, :, :3]), ("value", lambda t: t.flip(-1).mT.contiguous().mT),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(backend, name, change):
    expected = "key" if name == "slots" and change(torch.zeros(2, 4)).shape == (2, 3) else name
    with pytest.raises(ValueError, match=rf"^{expected} is "):
        ops.write_cache_(*wrong(**{name: change}))


def test_other_devices_and_gradients():
    with pytest.raises(ValueError, match="value is on device meta"):
        ops.write_cache_(*wrong(value=lambda t: t.to("meta")))
    with pytest.raises(RuntimeError, match="an input requires grad"):
        ops.write_cache_(*wrong(key=lambda t: t.requires_grad_()))


def test_what_is_written_is_marked():
    keys, *others = inputs(1, 2, 5, 2, 8, torch.float32)
    before = keys._version
    ops.write_cache_(keys, *others)
    assert keys._version > before


@BACKENDS
def test_compiled(backend):
    given = inputs(2, 3, 7, 4, 16, torch.float32)
    caches.check(torch.compile(ops.write_cache_, fullgraph=True, backend="aot_eager"), *given)


def test_opcheck():
    torch.library.opcheck(torch.ops.ras_fast.write_cache_.default, inputs(2, 3, 7, 4, 16, torch.float32))
