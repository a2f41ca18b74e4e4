"""x + gate · (M x) for the rows that a gate lets through, in Triton.

A program owns a tile of rows and a block of outputs. A tile whose gates are all 0 is copied and its program ends: M is not
read. Otherwise the tile shares one pass over its block of M by `tl.dot`, in which rows do not meet: one that is off is
copied, one that is NaN stays alone. Two factors are two launches, the first of which leaves its product in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ras_fast.triton_kernels.device import on_its_device

ROWS = 16  # the narrowest tile that tensor cores take
OUTPUTS = 32  # 128 programs at d = 4096: one a multiprocessor
COLUMNS = {2: 256, 4: 64}  # inner elements a step, by the size of one; with more, float32 spills on sm_80


@triton.jit
def gated_linear_kernel(
    x_ptr, rows_ptr, weight_ptr, gate_ptr, out_ptr,
    x_stride, rows_stride, weight_stride, out_stride, count, length, outputs,
    ADD: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, output blocks). out = weight · rows, and with ADD x + gate · that; `length` is weight's inner size."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    row_mask, output_mask = row < count, output < outputs
    mask = row_mask[:, None] & output_mask[None, :]
    gate = tl.load(gate_ptr + row, row_mask, other=0.0)
    on = gate != 0.0  # NaN is on: its row becomes NaN
    any_on = tl.max(on.to(tl.int32)) > 0
    dots = tl.zeros([ROWS, OUTPUTS], tl.float32)
    if any_on:
        weight_rows = weight_ptr + output.to(tl.int64)[:, None] * weight_stride
        for start in tl.range(0, length, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = (column < length)[None, :]
            values = tl.load(rows_ptr + row[:, None] * rows_stride + column[None, :], row_mask[:, None] & inside, other=0.0)
            weight = tl.load(weight_rows + column[None, :], output_mask[:, None] & inside, other=0.0).to(values.dtype)
            dots = tl.dot(values, tl.trans(weight), dots, input_precision="ieee")
    pointers = out_ptr + row[:, None] * out_stride + output[None, :]
    if ADD:
        x = tl.load(x_ptr + row[:, None] * x_stride + output[None, :], mask, other=0.0)
        turned = (x.to(tl.float32) + gate[:, None] * dots).to(x.dtype)
        tl.store(pointers, tl.where(on[:, None], turned, x), mask)
    else:
        tl.store(pointers, dots.to(out_ptr.dtype.element_ty), mask)


def _launch(x: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, add: bool) -> torch.Tensor:
    outputs, length = weight.shape
    out = torch.empty((len(rows), outputs), dtype=x.dtype if add else torch.float32, device=rows.device)
    grid = (triton.cdiv(len(rows), ROWS), triton.cdiv(outputs, OUTPUTS))
    gated_linear_kernel[grid](
        x, rows, weight, gate, out, x.stride(0), rows.stride(0), weight.stride(0), out.stride(0), len(rows), length, outputs,
        ADD=add, ROWS=ROWS, OUTPUTS=OUTPUTS, COLUMNS=COLUMNS[rows.dtype.itemsize], num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@on_its_device
def gated_linear(x, weight, right, gate):
    """ras_fast::gated_linear (ras_fast/ops/linear.py) in Triton: the op's arguments and result."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    inner = rows if right is None else _launch(rows, rows, right, gate, False)
    return _launch(rows, inner, weight, gate, True).view(x.shape)


def aot_cases(arch: int) -> list[dict]:
    """Default configurations for the static inspector (ras_fast/inspect.py): the last and the first factor, 16 and 32 bits."""
    cases = []
    for dtype, inner, itemsize in (("bf16", "bf16", 2), ("bf16", "fp32", 4), ("fp32", "fp32", 4)):
        for add in (True, False) if dtype == inner else (True,):
            types = dict.fromkeys(("x_ptr", "weight_ptr"), f"*{dtype}") | {"rows_ptr": f"*{inner}", "gate_ptr": "*fp32"}
            types["out_ptr"] = f"*{dtype}" if add else "*fp32"
            constexprs = {"ADD": add, "ROWS": ROWS, "OUTPUTS": OUTPUTS, "COLUMNS": COLUMNS[itemsize]}
            signature = {name: types.get(name, "i32") for name in gated_linear_kernel.arg_names if name not in constexprs}
            divisible = [n for n, kind in signature.items() if kind[0] == "*" or n in ("length", "outputs") or "stride" in n]
            what = "first factor" if not add else "sum" if dtype == inner else "sum of two factors"
            cases.append({"name": f"gated_linear[{dtype}, {what}]", "kernel": gated_linear_kernel, "signature": signature,
                          "constexprs": constexprs, "divisible_by_16": divisible, "num_warps": 4, "num_stages": 3})  # fmt: skip
    return cases
