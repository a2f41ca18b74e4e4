"""Rotary position embedding of query and key heads, in Triton.

A program rotates a few heads of one token. Products are rounded to the tables' dtype and sums to that of the heads, as in eager
code: without fusion (`enable_fp_fusion`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ras_fast.triton_kernels.device import on_its_device

HEADS = 8  # of a program


@triton.jit
def rotary_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr,
    query_batch_stride, query_head_stride, query_token_stride, key_batch_stride, key_head_stride, key_token_stride,
    cos_batch_stride, cos_token_stride, sin_batch_stride, sin_token_stride,
    length, query_heads, key_heads, dim, rotated,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Grid (B·L tokens, blocks of query heads and then of key heads). HALF, REST: powers of two, of at least rotated / 2 and
    dim - rotated; REST is 0 where nothing is left. INTERLEAVED: pairs are neighbours, not half the rotated dimensions apart."""
    place = tl.program_id(0).to(tl.int64)
    batch, token = place // length, place % length
    block, query_blocks = tl.program_id(1), tl.cdiv(query_heads, HEADS)
    is_key = block >= query_blocks
    head = tl.where(is_key, block - query_blocks, block) * HEADS + tl.arange(0, HEADS)
    heads = tl.where(is_key, key_heads, query_heads)
    if is_key:
        x_ptr = key_ptr + batch * key_batch_stride + token * key_token_stride
        head_stride, out_ptr = tl.cast(key_head_stride, tl.int64), key_out_ptr
    else:
        x_ptr = query_ptr + batch * query_batch_stride + token * query_token_stride
        head_stride, out_ptr = tl.cast(query_head_stride, tl.int64), query_out_ptr
    x_ptr += head[:, None] * head_stride
    out_ptr += (place * heads + head[:, None]) * dim
    exists = (head < heads)[:, None]

    half, column = rotated // 2, tl.arange(0, HALF)
    inside = column < half
    mask = exists & inside[None, :]
    cos_row, sin_row = batch * cos_batch_stride + token * cos_token_stride, batch * sin_batch_stride + token * sin_token_stride
    first = 2 * column if INTERLEAVED else column
    second = first + (1 if INTERLEAVED else half)
    low, high = tl.load(x_ptr + first[None, :], mask), tl.load(x_ptr + second[None, :], mask)
    low_cos, low_sin = tl.load(cos_ptr + cos_row + first, inside), tl.load(sin_ptr + sin_row + first, inside)
    high_cos, high_sin = tl.load(cos_ptr + cos_row + second, inside), tl.load(sin_ptr + sin_row + second, inside)
    turned_low = _product(low, low_cos) - _product(high, low_sin)
    turned_high = _product(high, high_cos) + _product(low, high_sin)
    tl.store(out_ptr + first[None, :], turned_low.to(low.dtype), mask)
    tl.store(out_ptr + second[None, :], turned_high.to(low.dtype), mask)
    if REST > 0:
        column = rotated + tl.arange(0, REST)
        mask = exists & (column < dim)[None, :]
        tl.store(out_ptr + column[None, :], tl.load(x_ptr + column[None, :], mask), mask)


@triton.jit
def _product(x, factor):
    """x · factor in float32, rounded to the dtype of the factor."""
    return (x.to(tl.float32) * factor[None, :].to(tl.float32)).to(factor.dtype).to(tl.float32)


def constants(dim: int, rotated: int, interleaved: bool) -> dict[str, int]:
    rest = triton.next_power_of_2(dim - rotated) if rotated < dim else 0
    return {"HEADS": HEADS, "HALF": triton.next_power_of_2(rotated // 2), "REST": rest, "INTERLEAVED": interleaved}


@on_its_device
def rotary_embedding(query, key, cos, sin, interleaved=False):
    """ras_fast::rotary_embedding (ras_fast/ops/rotary.py) in Triton: the op's arguments and results."""
    batch, query_heads, length, dim = query.shape
    key_heads, rotated = key.shape[1], cos.shape[-1]
    outputs = [x.new_empty((batch, length, x.shape[1], dim)).transpose(1, 2) for x in (query, key)]
    strides = [(0 if len(table) == 1 else table.stride(0), table.stride(1)) for table in (cos, sin)]
    grid = (batch * length, triton.cdiv(query_heads, HEADS) + triton.cdiv(key_heads, HEADS))
    if grid[0] and grid[1]:
        rotary_kernel[grid](
            query, key, cos, sin, *outputs, *query.stride()[:3], *key.stride()[:3], *strides[0], *strides[1],
            length, query_heads, key_heads, dim, rotated, **constants(dim, rotated, interleaved), num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return tuple(outputs)


def aot_cases(arch: int) -> list[dict]:
    """Default configurations for the static inspector (ras_fast/inspect.py): whole and partial rotation, 16 and 32 bits, both
    kinds of pairs, tables of another dtype."""
    cases = []
    for dtype, tables, dim, rotated, note in (
        ("bf16", "bf16", 128, 128, ""), ("fp32", "fp32", 128, 128, ""), ("bf16", "bf16", 256, 64, ""),
        ("bf16", "bf16", 128, 64, ", interleaved"), ("bf16", "fp32", 80, 80, ", fp32 tables"),
    ):  # fmt: skip
        constexprs = constants(dim, rotated, note == ", interleaved")
        pointers = {name: f"*{dtype}" for name in rotary_kernel.arg_names if name.endswith("_ptr")}
        pointers |= dict.fromkeys(("cos_ptr", "sin_ptr"), f"*{tables}")
        signature = {name: pointers.get(name, "i32") for name in rotary_kernel.arg_names if name not in constexprs}
        divisible = [n for n, kind in signature.items() if kind[0] == "*" or "stride" in n or n in ("dim", "rotated")]
        cases.append({"name": f"rotary[{dtype}, {rotated} of {dim}{note}]", "kernel": rotary_kernel, "signature": signature,
                      "constexprs": constexprs, "divisible_by_16": divisible, "num_warps": 4, "num_stages": 3})  # fmt: skip
    return cases
