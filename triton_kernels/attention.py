"""Attention with region statistics in Triton: prefill, decode, and recomputation of selected rows from the LSE.

One kernel serves prefill and decode. A program owns a tile of query rows and a range of keys and computes, for that
range, the attention output, the log-sum-exp and the softmax mass of every region. Prefill has one range per row tile;
decode cuts the cache into several (split-KV), packs the query heads of a group into one tile so that the cache is read
once, and a second kernel merges the ranges with weights exp(lse_range - lse).

Region mass costs no matrix product when a key block lies in one region: its mass is the row sum that online softmax
computes anyway. It is kept as a running sum beside the softmax denominator and folded into memory, as a logarithm,
when the region changes. Only a block that mixes regions (a border, or scattered regions) multiplies its probabilities
by a one-hot matrix, sixteen regions at a time. Registers do not depend on the number of regions, no table of segments
is built, and the host is never asked: each program looks at the ids of the block it holds.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ras_fast.triton_kernels import tuned
from ras_fast.triton_kernels.device import device_facts, on_its_device

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
REGION_CHUNK = tl.constexpr(16)  # the narrowest one-hot matrix that tensor cores take


@triton.jit
def _finite_or_zero(x):
    """Replace -inf by 0, so that exp2(-inf - x) is 0 and never NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _fold(pointers, mask, value, LOG: tl.constexpr):
    """Add value to memory that only this program touches; with LOG both are base-2 logarithms of what is added.

    The thread that wrote an element last may be another one, so a barrier must lie between two calls. A loop over key
    blocks has one in each iteration: the one that follows the wait for the asynchronous copies of keys and values (an
    explicit one would keep the compiler from overlapping these copies with arithmetic). Calls elsewhere bring their own.
    """
    if LOG:
        old = tl.load(pointers, mask, other=float("-inf"))
        top = _finite_or_zero(tl.maximum(old, value))
        tl.store(pointers, top + tl.log2(tl.exp2(old - top) + tl.exp2(value - top)), mask)
    else:
        tl.store(pointers, tl.load(pointers, mask, other=0.0) + value, mask)


@triton.jit
def _fill_regions(mass_rows, row_mask, num_regions, value):
    for first in tl.range(0, num_regions, REGION_CHUNK, num_stages=1):
        region = first + tl.arange(0, REGION_CHUNK)
        mask = row_mask[:, None] & (region < num_regions)[None, :]
        tl.store(mass_rows[:, None] + region[None, :], tl.full(mask.shape, value, tl.float32), mask)


@triton.jit
def _fold_run(mass_rows, row_mask, num_regions, run_region, run_sum, top, LOG: tl.constexpr):
    """Fold the running sum of the run of keys that ends here into its region."""
    if (run_region >= 0) & (run_region < num_regions):
        value = run_sum
        if LOG:
            value = tl.log2(run_sum) + top
        _fold(mass_rows + run_region, row_mask, value, LOG)


@triton.jit
def _fold_block(p, ids, mass_rows, row_mask, num_regions, top, LOG: tl.constexpr, PRECISION: tl.constexpr):
    """Fold a block of keys of several regions: probabilities times a one-hot matrix of the regions that occur."""
    known = (ids >= 0) & (ids < num_regions)
    lowest = tl.min(tl.where(known, ids, num_regions), 0)
    highest = tl.max(tl.where(known, ids, -1), 0)
    for first in tl.range(lowest, highest + 1, REGION_CHUNK, num_stages=1):
        region = first + tl.arange(0, REGION_CHUNK)
        one_hot = (ids[:, None] == region[None, :]).to(p.dtype)
        value = tl.dot(p, one_hot, input_precision=PRECISION)
        if LOG:
            value = tl.log2(value) + top[:, None]
        mask = row_mask[:, None] & (region <= highest)[None, :]
        _fold(mass_rows[:, None] + region[None, :], mask, value, LOG)


@triton.jit
def _track_regions(
    p, row_sum, ids, first_id, run_region, run_sum, mass_rows, row_mask, num_regions, top, dtype,
    LOG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Account one block of probabilities; returns the run of keys that is still open."""
    if tl.max((ids != first_id).to(tl.int32), 0) == 0:
        if first_id != run_region:
            _fold_run(mass_rows, row_mask, num_regions, run_region, run_sum, top, LOG)
            run_region = first_id
            run_sum = tl.zeros_like(run_sum)
        run_sum += row_sum
    else:
        _fold_block(p.to(dtype), ids, mass_rows, row_mask, num_regions, top, LOG, PRECISION)
    return run_region, run_sum


@triton.jit
def _tile_rows(tile, rows, first_row, GROUP: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query row and head offset of each row of a tile in which PACK heads (GROUP of them real) lie side by side."""
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    member = t % PACK
    row = first_row + t // PACK
    ok = row < first_row + rows
    if PACK != 1:
        ok = ok & (member < GROUP)
        member = tl.minimum(member, GROUP - 1)  # what is read by head, a bias for one, must exist
    last = tl.minimum(first_row + (tile * BLOCK_M + BLOCK_M - 1) // PACK, first_row + rows - 1)
    return row, member, ok, first_row + tile * BLOCK_M // PACK, last


@triton.jit
def _key_limits(
    kv_start, kv_end, batch, row, lq, lk, HAS_START: tl.constexpr, HAS_END: tl.constexpr, ROW_BOUNDS: tl.constexpr
):
    """The valid keys [start, end) of a batch element, clamped to the memory there is; with ROW_BOUNDS those of each row, as
    [rows, 1]."""
    start = 0
    end = lk
    at = batch
    if ROW_BOUNDS:
        at = (batch * lq + tl.minimum(row, lq - 1))[:, None]
        start = tl.zeros(at.shape, tl.int32)
        end = start + lk
    if HAS_START:
        start = tl.maximum(tl.load(kv_start + at), 0)
    if HAS_END:
        end = tl.minimum(tl.load(kv_end + at), lk)
    return start, end


@triton.jit
def _is_valid(key, start, end, ROW_BOUNDS: tl.constexpr):
    """[1, keys], or with ROW_BOUNDS [rows, keys]."""
    if ROW_BOUNDS:
        return (key[None, :] >= start) & (key[None, :] < end)
    else:
        return ((key >= start) & (key < end))[None, :]


@triton.jit
def _ends(start, end, ROW_BOUNDS: tl.constexpr):
    """Keys [first, past) in which those lie that are valid for some row."""
    if ROW_BOUNDS:
        return tl.min(start), tl.max(end)
    else:
        return start, end


@triton.jit
def _limit(row, lq, end, ROW_BOUNDS: tl.constexpr):
    """The last key that each row sees under a causal mask, which rows with bounds of their own are not under."""
    if ROW_BOUNDS:
        return row
    else:
        return row + (end - lq)


@triton.jit
def _visible(
    first_limit, last_limit, start, end, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROW_BOUNDS: tl.constexpr
):
    """Keys [low, high) that some row of the tile sees, and [full_low, full_high) that every row sees."""
    low, high = _ends(start, end, ROW_BOUNDS)
    full_low = low
    full_high = high
    if ROW_BOUNDS:
        full_low = tl.max(start)
        full_high = tl.min(end)
    if CAUSAL:
        high = tl.minimum(end, last_limit + 1)
        full_high = tl.minimum(end, first_limit + 1)
    if WINDOW:
        low = tl.maximum(start, first_limit - window + 1)
        full_low = tl.maximum(start, last_limit - window + 1)
    return low, high, full_low, full_high


@triton.jit
def _split_range(low, high, split, BLOCK_N: tl.constexpr):
    """The part of [low, high) that a split walks, in whole key blocks."""
    first = low // BLOCK_N
    share = tl.cdiv(tl.maximum(tl.cdiv(high, BLOCK_N) - first, 0), tl.num_programs(1))
    return (first + split * share) * BLOCK_N, tl.minimum((first + (split + 1) * share) * BLOCK_N, high)


@triton.jit
def _scores(
    q, k, key, ids, limit, block, start, end, full_low, full_high, bias, stride_bias_h, member, num_regions,
    scale, softcap, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ROW_BOUNDS: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr,
    PACK: tl.constexpr, PRESCALED: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of a block, -inf where masked; in base-2 units when PRESCALED, else still to be multiplied by scale."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if PRESCALED:
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1), saturating without overflow on both sides
            s = s * (2.0 * LOG2E * scale / softcap)
            s = softcap * LOG2E * (1.0 - 2.0 / (tl.exp2(s) + 1.0))
        else:
            s = s * (scale * LOG2E)
        if BIAS:
            known = (ids >= 0) & (ids < num_regions)
            if PACK == 1:
                s += (tl.load(bias + ids, known, other=0.0) * LOG2E)[None, :]
            else:
                s += tl.load(bias + (member * stride_bias_h)[:, None] + ids[None, :], known[None, :], other=0.0) * LOG2E
    if (block < full_low) | (block + BLOCK_N > full_high):
        valid = _is_valid(key, start, end, ROW_BOUNDS)
        if CAUSAL:
            valid = valid & (key[None, :] <= limit[:, None])
        if WINDOW:
            valid = valid & (key[None, :] > limit[:, None] - window)
        s = tl.where(valid, s, float("-inf"))
    return s


@triton.jit(do_not_specialize=["num_batch", "lq", "lk", "num_regions", "mass_rows", "window"])
def _attention_kernel(
    Q, K, V, Out, Lse, Mass, Ids, KvStart, KvEnd, Sinks, Bias,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_os, stride_ob, stride_oh, stride_om, stride_ib, stride_bb, stride_bh,
    num_batch, num_heads, lq, lk, num_regions, mass_rows, scale, softcap, window,
    GROUP: tl.constexpr, PACK: tl.constexpr, CAUSAL: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    ROW_BOUNDS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, BIAS: tl.constexpr,
    MASS: tl.constexpr, PRESCALED: tl.constexpr, PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = 1 if PACK == 1 else GROUP  # query heads of this program
    tiles = tl.cdiv(lq * PACK, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles  # under a causal mask the last rows work longest: start them first
    head_block = tl.program_id(0) // tiles
    head = head_block % (num_heads // HEADS) * HEADS
    batch = (head_block // (num_heads // HEADS)).to(tl.int64)
    split = tl.program_id(1)

    row, member, row_ok, first_row, last_row = _tile_rows(tile, lq, 0, GROUP, PACK, BLOCK_M)
    start, end = _key_limits(KvStart, KvEnd, batch, row, lq, lk, HAS_START, HAS_END, ROW_BOUNDS)
    first_key, past_key = _ends(start, end, ROW_BOUNDS)
    limit = _limit(row, lq, end, ROW_BOUNDS)
    low, high, full_low, full_high = _visible(
        first_row + end - lq, last_row + end - lq, start, end, window, CAUSAL, WINDOW, ROW_BOUNDS
    )
    low, high = _split_range(low, high, split, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    column = tl.arange(0, BLOCK_N)
    q_rows = Q + batch * stride_qb + (head + member).to(tl.int64) * stride_qh + row.to(tl.int64) * stride_qm
    q = tl.load(q_rows[:, None] + d[None, :], row_ok[:, None] & d_ok[None, :], other=0.0)
    k_rows = K + batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh + column.to(tl.int64) * stride_kn
    v_rows = V + batch * stride_vb + (head // GROUP).to(tl.int64) * stride_vh + column.to(tl.int64) * stride_vn
    ids_row = Ids
    bias = Bias
    if MASS or BIAS:
        ids_row += batch * stride_ib
    if BIAS:
        bias += batch * stride_bb + head * stride_bh
    stat_row = (split * num_batch + batch) * num_heads + head + member
    mass_row = Mass + (stat_row * mass_rows + row - (lq - mass_rows)) * num_regions
    mass_ok = row_ok & (row >= lq - mass_rows)
    tracked = last_row >= lq - mass_rows

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SINKS:  # noqa: SIM102 (nested: the outer one is decided at compile time)
        if split == 0:
            top = tl.load(Sinks + head + member, row_ok, other=0.0).to(tl.float32) * LOG2E
    denominator = tl.exp2(top - _finite_or_zero(top))
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    run_sum = tl.zeros([BLOCK_M], tl.float32)
    run_region = -1
    if MASS:  # noqa: SIM102
        if tracked:
            _fill_regions(mass_row, mass_ok, num_regions, float("-inf"))

    for block in range(low, high, BLOCK_N):
        key = block + column
        kv_ok = (key < past_key)[:, None] & d_ok[None, :]
        if HAS_START:
            kv_ok = kv_ok & (key >= first_key)[:, None]
        k = tl.load(k_rows[:, None] + tl.cast(block, tl.int64) * stride_kn + d[None, :], kv_ok, other=0.0)
        ids = key
        first_id = block
        if BIAS or MASS:
            ids = tl.load(ids_row + tl.minimum(key, lk - 1))
            first_id = tl.load(ids_row + block)
        s = _scores(
            q, k, key, ids, limit, block, start, end, full_low, full_high, bias, stride_bh, member, num_regions,
            scale, softcap, window, CAUSAL, WINDOW, ROW_BOUNDS, SOFTCAP, BIAS, PACK, PRESCALED, BLOCK_N, PRECISION,
        )  # fmt: skip
        factor = 1.0 if PRESCALED else scale * LOG2E
        new_top = tl.maximum(top, tl.max(s, 1) * factor)
        shift = _finite_or_zero(new_top)
        p = tl.exp2(s * factor - shift[:, None])
        shrink = tl.exp2(top - shift)
        row_sum = tl.sum(p, 1)
        top = new_top
        denominator = denominator * shrink + row_sum
        if MASS:
            run_sum *= shrink
            if tracked:
                run_region, run_sum = _track_regions(
                    p, row_sum, ids, first_id, run_region, run_sum, mass_row, mass_ok, num_regions, top,
                    V.dtype.element_ty, True, PRECISION,
                )  # fmt: skip
        if ROW_BOUNDS:  # between two rows' keys may lie some that no row sees, and in uninitialised memory
            seen = tl.max(_is_valid(key, start, end, ROW_BOUNDS).to(tl.int32), 0)
            kv_ok = kv_ok & (seen != 0)[:, None]
        v = tl.load(v_rows[:, None] + tl.cast(block, tl.int64) * stride_vn + d[None, :], kv_ok, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    out = acc / tl.where(denominator == 0.0, 1.0, denominator)[:, None]
    out_rows = Out + split * stride_os + batch * stride_ob + (head + member).to(tl.int64) * stride_oh
    out_rows += row.to(tl.int64) * stride_om
    tl.store(out_rows[:, None] + d[None, :], out.to(Out.dtype.element_ty), row_ok[:, None] & d_ok[None, :])
    lse = top + tl.log2(denominator)
    tl.store(Lse + stat_row * lq + row, lse * LN2, row_ok)
    if MASS:  # noqa: SIM102
        if tracked:
            tl.debug_barrier()
            _fold_run(mass_row, mass_ok, num_regions, run_region, run_sum, top, True)
            tl.debug_barrier()
            for first in tl.range(0, num_regions, REGION_CHUNK, num_stages=1):
                region = first + tl.arange(0, REGION_CHUNK)
                mask = mass_ok[:, None] & (region < num_regions)[None, :]
                pointers = mass_row[:, None] + region[None, :]
                mass = tl.exp2(tl.load(pointers, mask, other=float("-inf")) - _finite_or_zero(lse)[:, None])
                tl.store(pointers, mass, mask)


@triton.jit(do_not_specialize=["rows", "lq", "num_regions", "mass_rows", "splits"])
def _merge_kernel(
    PartOut, PartLse, PartMass, Out, Lse, Mass, stride_ob, stride_oh, stride_om,
    rows, num_heads, lq, num_regions, mass_rows, splits,
    MASS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query row: everything is weighted by exp(lse_split), scaled to add up to 1."""
    r = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, BLOCK_S)
    split_ok = split < splits
    parts = tl.load(PartLse + split * rows.to(tl.int64) + r, split_ok, other=float("-inf")) * LOG2E
    top = _finite_or_zero(tl.max(parts, 0))
    weight = tl.exp2(parts - top)
    denominator = tl.sum(weight, 0)
    weight = weight / tl.where(denominator == 0.0, 1.0, denominator)
    tl.store(Lse + r, (top + tl.log2(denominator)) * LN2)

    d = tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    partial = PartOut + (split * rows.to(tl.int64) + r)[:, None] * HEAD_DIM + d[None, :]
    out = tl.sum(tl.load(partial, split_ok[:, None] & d_ok[None, :], other=0.0) * weight[:, None], 0)
    row = r % lq
    head = r // lq % num_heads
    out_row = Out + r // lq // num_heads * stride_ob + head * stride_oh + row * stride_om
    tl.store(out_row + d, out.to(Out.dtype.element_ty), d_ok)

    if MASS:
        mass_row = row - (lq - mass_rows)
        if mass_row >= 0:
            total = rows.to(tl.int64) // lq * mass_rows
            m = r // lq * mass_rows + mass_row
            for first in tl.range(0, num_regions, REGION_CHUNK, num_stages=1):
                region = first + tl.arange(0, REGION_CHUNK)
                parts_mass = PartMass + (split * total + m)[:, None] * num_regions + region[None, :]
                ok = split_ok[:, None] & (region < num_regions)[None, :]
                mass = tl.sum(tl.load(parts_mass, ok, other=0.0) * weight[:, None], 0)
                tl.store(Mass + m * num_regions + region, mass, region < num_regions)


@triton.jit(do_not_specialize=["num_batch", "lq", "lk", "num_regions", "rows", "window"])
def _selected_rows_kernel(
    Q, K, Lse, Mass, Keys, Ids, KvStart, KvEnd, Bias,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_lb, stride_lh, stride_lm,
    stride_ib, stride_bb, stride_bh,
    num_batch, num_heads, lq, lk, num_regions, rows, scale, softcap, window,
    GROUP: tl.constexpr, PACK: tl.constexpr, CAUSAL: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    ROW_BOUNDS: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, MASS: tl.constexpr,
    KEYS: tl.constexpr, REDUCE: tl.constexpr, PRESCALED: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Probabilities of the last rows, recomputed from the LSE and summed by region (MASS) and over the rows (KEYS).

    With KEYS each tile of rows has scores of its own; without, key blocks that hold no region are not read.
    """
    tiles = tl.cdiv(rows * PACK, BLOCK_M)
    tile = tl.program_id(0) % tiles
    HEADS: tl.constexpr = 1 if PACK == 1 else GROUP
    head_block = tl.program_id(0) // tiles
    head = head_block % (num_heads // HEADS) * HEADS
    batch = (head_block // (num_heads // HEADS)).to(tl.int64)
    split = tl.program_id(1)

    row, member, row_ok, first_row, last_row = _tile_rows(tile, rows, lq - rows, GROUP, PACK, BLOCK_M)
    start, end = _key_limits(KvStart, KvEnd, batch, row, lq, lk, HAS_START, HAS_END, ROW_BOUNDS)
    _, past_key = _ends(start, end, ROW_BOUNDS)
    limit = _limit(row, lq, end, ROW_BOUNDS)
    low, high, full_low, full_high = _visible(
        first_row + end - lq, last_row + end - lq, start, end, window, CAUSAL, WINDOW, ROW_BOUNDS
    )
    if KEYS:
        low, high = _split_range(0, lk, split, BLOCK_N)
    else:
        low, high = _split_range(low, high, split, BLOCK_N)

    d = tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    column = tl.arange(0, BLOCK_N)
    heads = (head + member).to(tl.int64)
    q_rows = Q + batch * stride_qb + heads * stride_qh + row.to(tl.int64) * stride_qm
    q = tl.load(q_rows[:, None] + d[None, :], row_ok[:, None] & d_ok[None, :], other=0.0)
    lse_rows = Lse + batch * stride_lb + heads * stride_lh + row.to(tl.int64) * stride_lm
    shift = _finite_or_zero(tl.load(lse_rows, row_ok, other=float("inf")) * LOG2E)
    k_rows = K + batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh + column.to(tl.int64) * stride_kn
    ids_row = Ids
    bias = Bias
    if MASS or BIAS:
        ids_row += batch * stride_ib
    if BIAS:
        bias += batch * stride_bb + head * stride_bh
    stat_row = (split * num_batch + batch) * num_heads + heads
    run_sum = tl.zeros([BLOCK_M], tl.float32)
    run_region = -1
    if MASS:
        mass_row = Mass + (stat_row * rows + row - (lq - rows)) * num_regions
        _fill_regions(mass_row, row_ok, num_regions, 0.0)

    for block in range(low, high, BLOCK_N):
        key = block + column
        ids = key
        wanted = key >= 0
        first_id = block
        if BIAS or MASS:
            ids = tl.load(ids_row + tl.minimum(key, lk - 1))
            first_id = tl.load(ids_row + block)
        if MASS and not KEYS:
            wanted = (ids >= 0) & (ids < num_regions)
        if tl.max(wanted.to(tl.int32), 0) != 0:
            tl.debug_barrier()  # this loop is not pipelined: it skips blocks
            k_ok = (key < past_key)[:, None] & d_ok[None, :]
            k = tl.load(k_rows[:, None] + tl.cast(block, tl.int64) * stride_kn + d[None, :], k_ok, other=0.0)
            s = _scores(
                q, k, key, ids, limit, block, start, end, full_low, full_high, bias, stride_bh, member, num_regions,
                scale, softcap, window, CAUSAL, WINDOW, ROW_BOUNDS, SOFTCAP, BIAS, PACK, PRESCALED, BLOCK_N, PRECISION,
            )  # fmt: skip
            p = tl.exp2(s * (1.0 if PRESCALED else scale * LOG2E) - shift[:, None])
            if MASS:
                run_region, run_sum = _track_regions(
                    p, tl.sum(p, 1), ids, first_id, run_region, run_sum, mass_row, row_ok, num_regions, shift,
                    K.dtype.element_ty, False, PRECISION,
                )  # fmt: skip
            if KEYS:
                by_head = tl.reshape(p, [BLOCK_M // PACK, PACK, BLOCK_N])
                score = tl.sum(by_head, 0)
                if REDUCE == "max":
                    score = tl.max(by_head, 0) + 0.0 * score  # a maximum alone would hide NaN
                if REDUCE == "mean":
                    score = score / rows
                h = tl.arange(0, PACK)
                pointers = Keys + (((tile * num_batch + batch) * num_heads + head + h) * lk)[:, None] + key[None, :]
                tl.store(pointers, score, (h < HEADS)[:, None] & (key < lk)[None, :])
    if MASS:
        tl.debug_barrier()
        _fold_run(mass_row, row_ok, num_regions, run_region, run_sum, shift, False)


@triton.jit(do_not_specialize=["lq", "lk", "num_regions", "rows", "window"])
def _key_attention_kernel(
    Q, K, Lse, Keys, Ids, KvStart, KvEnd, Bias,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_lb, stride_lh, stride_lm,
    stride_ib, stride_bb, stride_bh,
    num_heads, lq, lk, num_regions, rows, scale, softcap, window,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr, ROW_BOUNDS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, REDUCE: tl.constexpr, PRESCALED: tl.constexpr,
    PRECISION: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention that one block of keys receives from the last rows: keys stay, row tiles stream by."""
    blocks = tl.cdiv(lk, BLOCK_N)
    block = tl.program_id(0) % blocks * BLOCK_N
    head = tl.program_id(0) // blocks % num_heads
    batch = (tl.program_id(0) // blocks // num_heads).to(tl.int64)
    past_key = lk
    if not ROW_BOUNDS:
        start, end = _key_limits(KvStart, KvEnd, batch, 0, lq, lk, HAS_START, HAS_END, False)
        past_key = end

    d = tl.arange(0, BLOCK_D)
    d_ok = d < HEAD_DIM
    key = block + tl.arange(0, BLOCK_N)
    k_rows = K + batch * stride_kb + (head // GROUP).to(tl.int64) * stride_kh + key.to(tl.int64) * stride_kn
    k = tl.load(k_rows[:, None] + d[None, :], (key < past_key)[:, None] & d_ok[None, :], other=0.0)
    ids = key
    bias = Bias
    if BIAS:
        ids = tl.load(Ids + batch * stride_ib + tl.minimum(key, lk - 1))
        bias += batch * stride_bb + head * stride_bh
    q_head = Q + batch * stride_qb + head.to(tl.int64) * stride_qh
    lse_head = Lse + batch * stride_lb + head.to(tl.int64) * stride_lh
    score = tl.zeros([BLOCK_N], tl.float32)

    first = 0
    if CAUSAL:  # the first selected row that sees a key of this block
        first = tl.maximum(block - (end - rows), 0) // BLOCK_M * BLOCK_M
    for offset in range(first, rows, BLOCK_M):
        row, member, row_ok, first_row, last_row = _tile_rows(offset // BLOCK_M, rows, lq - rows, 1, 1, BLOCK_M)
        if ROW_BOUNDS:
            start, end = _key_limits(KvStart, KvEnd, batch, row, lq, lk, HAS_START, HAS_END, True)
        _, _, full_low, full_high = _visible(
            first_row + end - lq, last_row + end - lq, start, end, window, CAUSAL, WINDOW, ROW_BOUNDS
        )
        q_rows = q_head + row.to(tl.int64) * stride_qm
        q = tl.load(q_rows[:, None] + d[None, :], row_ok[:, None] & d_ok[None, :], other=0.0)
        lse = tl.load(lse_head + row.to(tl.int64) * stride_lm, row_ok, other=float("inf"))
        s = _scores(
            q, k, key, ids, _limit(row, lq, end, ROW_BOUNDS), block, start, end, full_low, full_high, bias, stride_bh, member,
            num_regions, scale, softcap, window, CAUSAL, WINDOW, ROW_BOUNDS, SOFTCAP, BIAS, 1, PRESCALED, BLOCK_N, PRECISION,
        )  # fmt: skip
        factor = 1.0 if PRESCALED else scale * LOG2E
        p = tl.exp2(s * factor - _finite_or_zero(lse * LOG2E)[:, None])
        if REDUCE == "max":
            score = tl.maximum(score, tl.max(p, 0)) + 0.0 * (score + tl.sum(p, 0))  # a maximum alone would hide NaN
        else:
            score += tl.sum(p, 0)
    if REDUCE == "mean":
        score = score / rows
    tl.store(Keys + (batch * num_heads + head) * lk + key, score, key < lk)


class Config(NamedTuple):
    """Tile shape and launch options of a kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    # Set explicitly where ptxas would otherwise spill a value or two to reach a rounder register count.
    maxnreg: int | None = None


# What a call may use beside plain attention; each is compiled in only where it is used.
FEATURES = ("HAS_START", "HAS_END", "WINDOW", "SOFTCAP", "BIAS", "PRESCALED")
DECODE_REGISTERS = 255  # of a thread: two blocks of 4 warps fit on a multiprocessor, as many as `_splits` asks for
DECODE_ROWS = 16  # up to this many rows of a group are one tile, and the cache is read once for all its query heads
SELECTED_ROWS = 64  # the same for recomputed probabilities, which keep no output in registers
SHARED_LAUNCH_ROWS = 256  # masses and key scores together: each tile of rows writes scores of its own, which are then reduced


def config(wanted: tuned.ShapeClass) -> Config:
    """Configuration of "prefill", "decode", "mass" (selected rows) or "keys": what was measured, else the rule."""
    return tuned.choose(wanted, rule(wanted))


def rule(wanted: tuned.ShapeClass) -> Config:
    """Chosen ahead of time: the largest tiles that fit into shared memory and spill no register.

    float32 alone, at a head dimension above 128, fits into no tile that tensor cores take, and spills.
    """
    kind, arch, wide = wanted.kernel, wanted.arch, wanted.itemsize == 4
    plain, own = wanted.variant == "plain", wanted.variant == "rows"  # each row's bounds take registers
    size = 0 if wanted.size <= 64 else 1 if wanted.size <= 128 else 2
    if kind == "prefill":
        if wide:
            return (Config(32, 16, 4, 1), Config(16, 16, 8, 2), Config(16, 16, 8, 2))[size]
        if own:
            roomy = arch in (90, 100)  # whose tensor cores take operands from shared memory
            return Config(64 if roomy else 32, 32, 8, 2) if size == 2 else Config(64, 64 if roomy else 32, 8, 3)
        return (Config(128, 64, 8, 3), Config(128, 64 if arch == 90 and plain else 32, 8, 3), Config(64, 32, 8, 2))[size]
    if kind == "decode":
        if wide:
            return (Config(16, 32, 4, 2), Config(16, 16, 8, 2), Config(16, 16, 8, 2))[size]
        return Config(16, (128 if arch == 80 else 64, 32 if own else 64, 32)[size], 4, 3, DECODE_REGISTERS)
    if kind == "mass":
        block_n = ((64, 32 if own else 64, 16 if arch == 80 else 32), (32, 16, 16))[wide][size]
        # On sm_90 Triton 3.6 multiplies tiles of 64 × 16 by 8 warps wrongly, and reads beyond its shared memory.
        few = (arch == 90 and (not wide or block_n == 16)) or (arch == 100 and size == 0 and not wide)
        return Config(SELECTED_ROWS, block_n, 4 if few else 8, 2)
    block_m = ((64, 64, 32), (32, 32, 16))[wide][size]
    return Config(min(block_m, 32) if own else block_m, 64, 4, 2)


def _shape_class(kind: str, query: torch.Tensor, constants: dict, *options: torch.Tensor | None) -> tuned.ShapeClass:
    plain = not any(constants[flag] for flag in FEATURES) and all(option is None for option in options)
    arch, _ = device_facts(query.device)
    size = max(64, triton.next_power_of_2(query.shape[-1]))
    variant = "rows" if constants["ROW_BOUNDS"] else "plain" if plain else "every"
    return tuned.ShapeClass(kind, arch, query.element_size(), size, variant)


def _splits(programs: int, key_blocks: int, device: torch.device) -> int:
    """Into how many ranges to cut the keys, so that a small grid still fills the device twice over."""
    wanted = 2 * device_facts(device)[1] // max(programs, 1)
    return max(1, min(wanted, key_blocks // 2, 128))


def _strides(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()[:dims]


def _bias_strides(bias: torch.Tensor | None) -> tuple[int, int]:
    """(batch, head) strides of a bias [B, Hq, R] or [Hq, R]."""
    return (0, 0) if bias is None else (0, 0, *bias.stride())[-3:-1]


def _constants(query: torch.Tensor, is_causal, kv_start, kv_end, window, softcap, region_bias, scale) -> dict:
    """Compile-time facts that every kernel here takes: a feature that is absent costs nothing."""
    row_bounds = any(bound is not None and bound.dim() == 2 for bound in (kv_start, kv_end))
    return {
        "CAUSAL": is_causal, "HAS_START": kv_start is not None, "HAS_END": kv_end is not None, "ROW_BOUNDS": row_bounds,
        "WINDOW": window > 0,
        "SOFTCAP": softcap > 0, "BIAS": region_bias is not None,
        "PRESCALED": softcap > 0 or region_bias is not None or scale <= 0,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
        "HEAD_DIM": query.shape[-1], "BLOCK_D": max(16, triton.next_power_of_2(query.shape[-1])),
    }  # fmt: skip


class Launch(NamedTuple):
    """How `region_attention` is launched: row tiles of `pack` heads side by side times `splits` of the keys."""

    tile: Config
    pack: int
    programs: int
    splits: int


def launch_of(query: torch.Tensor, key: torch.Tensor, constants: dict, sinks: torch.Tensor | None) -> Launch:
    """The launch for query [B, Hq, Lq, D] and key [B, Hkv, Lk, D], in which `constants` is what `_constants` gives."""
    batch, heads, lq = query.shape[:3]
    group = heads // key.shape[1]
    packed = lq * group <= DECODE_ROWS
    pack = triton.next_power_of_2(group) if packed else 1
    tile = config(_shape_class("decode" if packed else "prefill", query, constants, sinks))
    programs = triton.cdiv(lq * pack, tile.block_m) * batch * (heads if pack == 1 else key.shape[1])
    return Launch(tile, pack, programs, _splits(programs, triton.cdiv(key.shape[2], tile.block_n), query.device))


def explain(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
) -> str:  # fmt: skip
    """The configuration of a call of the op `ras_fast::region_attention` with these arguments, in words."""
    constants = _constants(query, is_causal, kv_start, kv_end, window, softcap, region_bias, scale)
    tile, pack, programs, splits = launch_of(query, key, constants, sinks)
    return (
        f"tiles of {tile.block_m} rows × {tile.block_n} keys, {tile.num_warps} warps, {tile.num_stages} stages; {pack} heads a "
        f"tile, {programs} programs × {splits} splits of the keys"
    )


@on_its_device
def region_attention(
    query, key, value, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias,
    mass_rows,
):  # fmt: skip
    """Arguments and results of the op `ras_fast::region_attention`."""
    batch, heads, lq, dim = query.shape
    lk = key.shape[2]
    out = query.new_empty((batch, lq, heads, dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, lq), dtype=torch.float32)
    mass = query.new_empty((batch, heads, mass_rows, num_regions), dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse, mass
    constants = _constants(query, is_causal, kv_start, kv_end, window, softcap, region_bias, scale)
    tile, pack, programs, splits = launch_of(query, key, constants, sinks)

    parts = (out[None], lse, mass)
    if splits > 1:
        parts = tuple(t.new_empty((splits, *t.shape), dtype=torch.float32) for t in (out, lse, mass))
    _attention_kernel[(programs, splits)](
        query, key, value, *parts, region_ids, kv_start, kv_end, sinks, region_bias,
        *_strides(query, 3), *_strides(key, 3), *_strides(value, 3), *_strides(parts[0], 4), *_strides(region_ids, 1),
        *_bias_strides(region_bias), batch, heads, lq, lk, num_regions, mass_rows, scale, softcap, window,
        GROUP=heads // key.shape[1], PACK=pack, SINKS=sinks is not None, MASS=mass.numel() > 0, **constants,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(batch * heads * lq,)](
            *parts, out, lse, mass, *_strides(out, 3), batch * heads * lq, heads, lq, num_regions, mass_rows, splits,
            MASS=mass.numel() > 0, HEAD_DIM=dim, BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=triton.next_power_of_2(dim),
            num_warps=4,
        )  # fmt: skip
    return out, lse, mass


def _launch_selected_rows(
    query, key, lse, region_ids, num_regions, rows, mass, keys, reduce, scale, is_causal, kv_start, kv_end, window,
    softcap, region_bias,
):  # fmt: skip
    """Fill mass [B, Hq, rows, R] and keys [B, Hq, Lk] (either may be None) in one launch."""
    batch, heads, lq = query.shape[:3]
    group = heads // key.shape[1]
    packed = rows * group <= SELECTED_ROWS
    pack = triton.next_power_of_2(group) if packed else 1
    constants = _constants(query, is_causal, kv_start, kv_end, window, softcap, region_bias, scale)
    tile = config(_shape_class("mass", query, constants, keys))
    block_m = max(16, min(triton.next_power_of_2(rows * pack), SELECTED_ROWS))
    tiles = triton.cdiv(rows * pack, block_m)
    programs = tiles * batch * (heads if pack == 1 else key.shape[1])
    splits = _splits(programs, triton.cdiv(key.shape[2], tile.block_n), query.device)
    key_part = keys if keys is None or tiles == 1 else keys.new_empty((tiles, *keys.shape))
    part = mass if mass is None or splits == 1 else mass.new_empty((splits, *mass.shape))
    _selected_rows_kernel[(programs, splits)](
        query, key, lse, part, key_part, region_ids, kv_start, kv_end, region_bias,
        *_strides(query, 3), *_strides(key, 3), *_strides(lse, 3), *_strides(region_ids, 1), *_bias_strides(region_bias),
        batch, heads, lq, key.shape[2], num_regions, rows, scale, softcap, window,
        GROUP=group, PACK=pack, MASS=mass is not None, KEYS=keys is not None, REDUCE=reduce, **constants,
        BLOCK_M=block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if part is not mass:
        torch.sum(part, 0, out=mass)
    if key_part is not keys:
        torch.amax(key_part, 0, out=keys) if reduce == "max" else torch.sum(key_part, 0, out=keys)


@on_its_device
def region_mass(
    query, key, lse, region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, region_bias, mass_rows
):
    """Arguments and result of the op `ras_fast::region_mass`."""
    mass = query.new_empty((*query.shape[:2], mass_rows, num_regions), dtype=torch.float32)
    if mass.numel():
        _launch_selected_rows(
            query, key, lse, region_ids, num_regions, mass_rows, mass, None, None, scale, is_causal, kv_start, kv_end,
            window, softcap, region_bias,
        )  # fmt: skip
    return mass


@on_its_device
def key_attention(
    query, key, lse, rows, reduce, region_ids, scale, is_causal, kv_start, kv_end, window, softcap, region_bias
):
    """Arguments and result of the op `ras_fast::key_attention`."""
    batch, heads, lq = query.shape[:3]
    lk = key.shape[2]
    scores = query.new_empty((batch, heads, lk), dtype=torch.float32)
    num_regions = 0 if region_bias is None else region_bias.shape[-1]
    if scores.numel() == 0 or rows == 0:
        return scores.zero_()
    if rows <= SELECTED_ROWS:
        _launch_selected_rows(
            query, key, lse, region_ids, num_regions, rows, None, scores, reduce, scale, is_causal, kv_start, kv_end,
            window, softcap, region_bias,
        )  # fmt: skip
        return scores
    constants = _constants(query, is_causal, kv_start, kv_end, window, softcap, region_bias, scale)
    tile = config(_shape_class("keys", query, constants))
    _key_attention_kernel[(triton.cdiv(lk, tile.block_n) * heads * batch,)](
        query, key, lse, scores, region_ids, kv_start, kv_end, region_bias,
        *_strides(query, 3), *_strides(key, 3), *_strides(lse, 3), *_strides(region_ids, 1), *_bias_strides(region_bias),
        heads, lq, lk, num_regions, rows, scale, softcap, window, GROUP=heads // key.shape[1], REDUCE=reduce, **constants,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return scores


@on_its_device
def region_statistics(
    query, key, lse, region_ids, num_regions, rows, reduce, scale, is_causal, kv_start, kv_end, window, softcap,
    region_bias,
):  # fmt: skip
    """Arguments and results of the op `ras_fast::region_statistics`."""
    masks = (scale, is_causal, kv_start, kv_end, window, softcap, region_bias)
    if not 0 < rows <= SHARED_LAUNCH_ROWS or key.shape[2] == 0 or query.numel() == 0:
        return (
            region_mass(query, key, lse, region_ids, num_regions, *masks, rows),
            key_attention(query, key, lse, rows, reduce, region_ids, *masks),
        )
    mass = query.new_empty((*query.shape[:2], rows, num_regions), dtype=torch.float32)
    scores = query.new_empty((*query.shape[:2], key.shape[2]), dtype=torch.float32)
    _launch_selected_rows(query, key, lse, region_ids, num_regions, rows, mass, scores, reduce, *masks)
    return mass, scores


def aot_cases(arch: int) -> list[dict]:
    """Default configurations for the static inspector (ras_fast/inspect.py): each head-dimension class, plain and with all
    features on, under a causal mask or under bounds of each row's own.
    """
    types = dict.fromkeys(("Q", "K", "V", "Out"), "*bf16") | dict.fromkeys(("Ids", "KvStart", "KvEnd"), "*i32")
    types |= dict.fromkeys(("Lse", "Mass", "Keys", "Sinks", "Bias", "PartOut", "PartLse", "PartMass"), "*fp32")
    types |= dict.fromkeys(("scale", "softcap"), "fp32")
    optional = {"HAS_START": "KvStart", "HAS_END": "KvEnd", "BIAS": "Bias", "SINKS": "Sinks"}
    optional |= {"MASS": "Mass", "KEYS": "Keys"}
    cases = []

    def add(name, kernel, wanted, tile, **constexprs):
        absent = {optional[flag]: None for flag in optional if flag in kernel.arg_names and not constexprs.get(flag, True)}
        constexprs = {flag: value for flag, value in (constexprs | absent).items() if flag in kernel.arg_names}
        signature = {n: types.get(n, "i32") for n in kernel.arg_names if n not in constexprs}
        odd = ("stride_ib", "stride_bb", "stride_bh")  # follow the number of keys or of regions
        divisible = [n for n, kind in signature.items() if kind[0] == "*" or (n.startswith("stride_") and n not in odd)]
        cases.append({"name": name, "shape_class": wanted, "kernel": kernel, "signature": signature, "constexprs": constexprs,
                      "divisible_by_16": divisible, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
                      "maxnreg": tile.maxnreg})  # fmt: skip

    for dim in (64, 128, 256):
        for variant, words in (("plain", "plain"), ("every", "every feature"), ("rows", "rows' own bounds")):
            own = variant == "rows"
            flags = dict.fromkeys((*FEATURES, "SINKS"), variant != "plain") | {"CAUSAL": not own, "ROW_BOUNDS": own}
            flags |= {"REDUCE": "mean", "PRECISION": "tf32", "GROUP": 4, "HEAD_DIM": dim, "BLOCK_D": dim}
            if own:
                flags["WINDOW"] = False
            for name, kind, kernel, pack, mass, keys in (
                ("prefill", "prefill", _attention_kernel, 1, True, False),
                ("decode", "decode", _attention_kernel, 4, True, False),
                ("region_mass", "mass", _selected_rows_kernel, 4, True, False),
                ("key_attention of few rows", "mass", _selected_rows_kernel, 4, False, True),
                ("both of few rows", "mass", _selected_rows_kernel, 4, True, True),
                ("key_attention", "keys", _key_attention_kernel, 1, False, True),
            ):
                wanted = tuned.ShapeClass(kind, arch, 2, dim, variant)
                tile = config(wanted)
                add(f"{name}[D={dim}, {words}]", kernel, wanted, tile, **flags, PACK=pack, MASS=mass, KEYS=keys,
                    BLOCK_M=tile.block_m, BLOCK_N=tile.block_n)  # fmt: skip
    add("merge[D=128]", _merge_kernel, None, Config(1, 1, 4, 3), MASS=True, HEAD_DIM=128, BLOCK_S=32, BLOCK_D=128)
    return cases
