"""rotary_embedding: every backend against Hugging Face's eager code, bit for bit."""

import os
import subprocess
import sys

import pytest
import rotations
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotations import inputs

from ras_fast import ops

BACKENDS = pytest.mark.parametrize("backend", ["cpu", "torch", "triton"], indirect=True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Head dimensions and how many of them are rotated: a pair, fewer than a vector, odd halves, partial rotations, usual ones.
DIMS = [(2, 2), (6, 6), (14, 10), (16, 16), (72, 72), (80, 32), (128, 128), (256, 64)]


def skip_if_interpreted(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter cuts bfloat16 off where the hardware rounds")


def check(*given):
    """Pairs that are half the rotated dimensions apart, and neighbours."""
    for interleaved in (False, True):
        rotations.check(ops.rotary_embedding(*given, interleaved=interleaved), *given, interleaved)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotated"), DIMS)
def test_bits_of_eager_code(backend, dim, rotated, dtype):
    skip_if_interpreted(backend, dtype)
    check(*inputs(2, 6, 2, 5, dim, rotated, dtype))
    check(*inputs(3, 9, 9, 1, dim, rotated, dtype, tables=1))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "rotated"), DIMS)
def test_tables_in_float32_round_once(backend, dim, rotated, dtype):
    skip_if_interpreted(backend, dtype)
    check(*inputs(2, 6, 2, 5, dim, rotated, dtype, table_dtype=torch.float32))
    query, key, cos, sin = inputs(1, 9, 9, 3, dim, rotated, dtype, table_dtype=torch.float32)
    cos[0, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN that rounding to bfloat16 could lose
    check(query, key, cos, sin)
    assert ops.rotary_embedding(query, key, cos, sin)[0][0, :, 0, :rotated].isnan().all()


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(backend, dtype):
    """Slices of a joint projection, contiguous heads, cosines of every other token, a batch that repeats."""
    skip_if_interpreted(backend, dtype)
    query, key, cos, sin = inputs(2, 4, 2, 6, 64, 64, dtype)
    joint = torch.randn(2, 6, 4 * 64 + 2 * 64 + 3).to(dtype)
    check(joint[..., 1:257].view(2, 6, 4, 64).transpose(1, 2), joint[..., 257:385].view(2, 6, 2, 64).transpose(1, 2), cos, sin)
    check(query.contiguous(), key.contiguous(), cos.repeat_interleave(2, 1)[:, ::2], sin)
    check(query[:1].expand(3, -1, -1, -1), key[1:].expand(3, -1, -1, -1), cos[:1].expand(3, -1, -1), sin[:1])


@BACKENDS
def test_nothing_to_rotate(backend):
    for batch, heads, kv_heads, length in ((0, 2, 2, 3), (2, 2, 2, 0), (2, 2, 0, 3), (2, 0, 2, 3)):
        query, key, cos, sin = inputs(batch, heads, kv_heads, length, 8, 8, torch.float32, tables=1)
        check(query, key, cos, sin)


@BACKENDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_values(backend, dtype):
    """What is not finite stays in its pair of dimensions; denormals and -0 as in eager code."""
    skip_if_interpreted(backend, dtype)
    query, key, cos, sin = inputs(1, 2, 2, 4, 32, 32, dtype)
    query[0, 0, 1, 3], key[0, 1, 2, 20] = torch.nan, torch.inf
    query[0, 1, 0] = torch.finfo(dtype).smallest_normal / 2
    key[0, 0, 3] = -0.0
    check(query, key, cos, sin)
    for interleaved, partner in ((False, 19), (True, 2)):
        got, _ = ops.rotary_embedding(query, key, cos, sin, interleaved=interleaved)
        assert got.isnan().nonzero().tolist() == sorted([[0, 0, 1, 3], [0, 0, 1, partner]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_a_prompt(dtype):
    check(*inputs(2, 8, 4, 300, 64, 64, dtype))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 9), kv_heads=st.integers(1, 4), length=st.integers(1, 9),
    half=st.integers(1, 40), rest=st.integers(0, 40), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape_on_the_cpu(batch, heads, kv_heads, length, half, rest, dtype):
    check(*inputs(batch, heads, kv_heads, length, 2 * half + rest, 2 * half, dtype))


def test_opcheck():
    for dtype, table_dtype, interleaved in ((torch.float32, None, False), (torch.bfloat16, torch.float32, True)):
        given = (*inputs(2, 4, 2, 3, 16, 8, dtype, table_dtype=table_dtype), interleaved)
        torch.library.opcheck(torch.ops.ras_fast.rotary_embedding.default, given)


def test_one_graph():
    given = inputs(2, 4, 2, 3, 16, 16, torch.float32)
    compiled = torch.compile(ops.rotary_embedding, fullgraph=True, backend="eager")
    for got, wanted in zip(compiled(*given), ops.rotary_embedding(*given), strict=True):
        assert torch.equal(got, wanted)


def test_float64_takes_the_reference():
    given = [tensor.double() for tensor in inputs(2, 4, 2, 3, 16, 16, torch.float32)]
    check(*given)


QUERY, KEY, TABLE = torch.zeros(2, 4, 3, 16), torch.zeros(2, 2, 3, 16), torch.zeros(2, 3, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((QUERY[0], KEY, TABLE, TABLE), r"query is of shape \(4, 3, 16\); it must be \[B, Hq, L, D\]"),
        ((QUERY.int(), KEY, TABLE, TABLE), "query is of dtype"),
        ((QUERY.transpose(2, 3).contiguous().transpose(2, 3), KEY, TABLE, TABLE), "query is of strides"),
        ((QUERY, KEY[0], TABLE, TABLE), "key is of shape"),
        ((QUERY, KEY[:1], TABLE, TABLE), r"key is of shape \(1, 2, 3, 16\); it must be \[B, Hkv, L, D\] = \(2, 2, 3, 16\)"),
        ((QUERY, KEY[..., :8], TABLE, TABLE), "key is of shape"),
        ((QUERY, KEY.half(), TABLE, TABLE), "key is of dtype"),
        ((QUERY, KEY, TABLE[..., :7], TABLE), r"cos is of shape \(2, 3, 7\); it must be \[B or 1, L, r\] with r even"),
        ((QUERY, KEY, TABLE[..., :0], TABLE), "cos is of shape"),
        ((QUERY, KEY, torch.zeros(2, 3, 18), TABLE), "cos is of shape"),
        ((QUERY, KEY, TABLE[0], TABLE), "cos is of shape"),
        ((QUERY, KEY, TABLE[:, :2], TABLE), "cos is of shape"),
        ((QUERY, KEY, TABLE, TABLE[..., :8]), r"sin is of shape \(2, 3, 8\); it must be \[B or 1, L, r\] = \(2, 3, 16\)"),
        ((QUERY, KEY, TABLE, TABLE.expand(3, 2, 3, 16)), "sin is of shape"),
        ((QUERY, KEY, TABLE, torch.tensor(0.0)), "sin is of shape"),
        ((QUERY, KEY, TABLE, TABLE.half()), r"sin is of dtype torch.float16; it must be torch.float32"),
        ((QUERY, KEY, TABLE.half(), TABLE.half()), r"cos is of dtype torch.float16; it must be torch.float32, that of query"),
        ((QUERY.half(), KEY.half(), TABLE.bfloat16(), TABLE.bfloat16()), r"cos is of dtype torch.bfloat16; .* or float32"),
        ((QUERY.half(), KEY.half(), TABLE, TABLE.half()), "sin is of dtype"),
        ((QUERY.double(), KEY.double(), TABLE, TABLE), "cos is of dtype"),
        ((QUERY, KEY, TABLE, torch.zeros(2, 3, 32)[..., ::2]), "sin is of strides"),
        ((QUERY, KEY, TABLE, TABLE.to("meta")), "sin is on device"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.rotary_embedding(*arguments)


def test_what_says_how_pairs_lie_is_true_or_false():
    with pytest.raises(ValueError, match="interleaved is 'yes'; it must be True or False"):
        ops.rotary_embedding(QUERY, KEY, TABLE, TABLE, interleaved="yes")


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="no backward"):
        ops.rotary_embedding(QUERY.clone().requires_grad_(), KEY, TABLE, TABLE)


COMPILED = """
from ras_fast import inspect
from ras_fast.triton_kernels import rotary

case, names = rotary.aot_cases(90)[0], ("query_heads", "key_heads", "length", "query_head_stride", "key_head_stride")
case["signature"] = {name: kind for name, kind in case["signature"].items() if name not in names}
case["divisible_by_16"] = [name for name in case["divisible_by_16"] if name not in names]
case["constexprs"] |= dict.fromkeys(names, 1)
inspect.compile_triton([case], 90)
"""


def test_triton_compiles_for_a_lone_head_of_any_stride():
    """Of an argument that is 1 Triton makes a constant; the interpreter does not."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
