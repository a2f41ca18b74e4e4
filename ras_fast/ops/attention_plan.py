"""The dispatcher: which kernel runs an attention call, and why. Measured crossovers: docs/kernels.md, "Which kernel runs".

CPU: few query rows per sequence take the decode kernel. More rows take the prefill kernel, unless the processor has matrix
instructions for half precision, which torch's flash attention uses.

CUDA: few rows over a long cache take the decode kernel, whose time is that of reading the cache. More take the Hopper kernel
where it can run, whose row sums give the masses. Elsewhere, and in wide heads, few of many rows take torch's flash attention
and a recomputation of their masses, as scores of the keys do everywhere, and masses of many rows the Triton kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ras_fast import backend

CPU_DECODE_ROWS = 8  # query rows up to which the decode kernel is the fastest on a CPU
WIDE_DECODE_ROWS = 4  # of several rows, packed rows up to which it is with AVX-512, whose registers are for many of prefill's
HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
# CUDA's thresholds were measured on an H200.
DECODE_ROWS = 128  # packed rows of a key/value head up to which the decode kernel is the fastest
FEW_ROWS = 8  # masses of 1/8 of the rows are recomputed faster than a fused kernel other than Hopper's gives them
SCORED_ROWS = 8  # key scores of more rows take Triton's larger tiles, which fetch fewer bytes an operation
HOPPER_FIRST_DIM = 128  # head dimension up to which the Hopper kernel is faster than cuDNN without masses; beyond, unmeasured
HOPPER_ROWS = 128  # of a tile of the Hopper kernel; with fewer, too many multiprocessors have nothing to do
MIN_FLASH_KEYS = 32  # below it aten's CPU kernel turns a NaN query into zeros


def _matrix_dtypes() -> frozenset[torch.dtype]:
    able = getattr(torch.cpu, "get_capabilities", dict)()
    halves = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}
    # ARM's processors have such instructions for both.
    return frozenset(dtype for dtype in halves if able.get(halves[dtype]) or able.get("architecture", "x86_64") != "x86_64")


# What this processor multiplies by matrix instructions, faster than float or pairs of bf16.
MATRIX_DTYPES = _matrix_dtypes()


class Plan(NamedTuple):
    """What runs a call, the reason in words, and its configuration.

    kernel: "decode" (csrc: one read of the cache), "prefill" (csrc, CPU: fused), "flash" (torch's flash attention, then csrc
        or Triton for the masses), "softmax" (explicit, by chunks of rows), "triton" (fused), "hopper" (csrc: fused, sm_90a), or
        "torch" (the reference).
    config: tile, warps, stages and splits of a Triton kernel, as `explain` says them; "" for the others, which have one each.
    """

    kernel: str
    why: str
    config: str = ""


class Case(NamedTuple):
    """What a plan depends on beside the three tensors: the arguments of `region_attention`, reduced to what matters.

    rows: M, the rows whose masses are wanted; 0 without regions. bounds, sinks, bias: whether they are given. row_bounds:
    whether each row has bounds of its own.
    """

    rows: int = 0
    is_causal: bool = True
    window: int = 0
    softcap: float = 0.0
    bounds: bool = False
    sinks: bool = False
    bias: bool = False
    row_bounds: bool = False
    scale: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether any flash attention gives the same result; it masks before it scales, which wants a positive scale."""
        return self.scale > 0 and not (self.window or self.softcap or self.bounds or self.sinks or self.bias)


def case_of(
    region_ids, num_regions, scale, is_causal, kv_start, kv_end, window, softcap, sinks, region_bias, mass_rows
) -> Case:
    """What the dispatcher looks at, from the op's arguments after the three tensors."""
    bounds = kv_start is not None or kv_end is not None
    rows = mass_rows if num_regions else 0
    row_bounds = are_per_row(kv_start, kv_end)
    return Case(rows, is_causal, window, softcap, bounds, sinks is not None, region_bias is not None, row_bounds, scale)


def are_per_row(*bounds: Tensor | None) -> bool:
    """Whether one of them is [B, Lq], each row's own."""
    return any(isinstance(bound, Tensor) and bound.dim() == 2 for bound in bounds)


def plan_attention(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Plan:
    """The plan of a `region_attention` call under the backend in force. Looks at shapes and dtypes, never at values."""
    chosen = backend.resolve("region_attention", query.device)
    if chosen == "torch" or query.dtype == torch.float64:
        return Plan("torch", "float64" if query.dtype == torch.float64 else "no other backend is built or allowed")
    if chosen == "triton":
        return Plan("triton", "the backend is forced")
    return plan_cpu(query, key, value, case) if chosen == "cpu" else plan_cuda(query, key, value, case)


def plan_cpu(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Plan:
    """The plan of a call on CPU tensors: query [B, Hq, Lq, D], key and value [B, Hkv, Lk, D] of any dtype but float64."""
    if decodes_on_cpu(query, key, case.row_bounds):
        return Plan("decode", f"{query.shape[2]} rows (at most {CPU_DECODE_ROWS}): one read of the cache decides")
    return plan_cpu_prefill(query, key, value, case)


def decodes_on_cpu(query: Tensor, key: Tensor, row_bounds: bool) -> bool:
    """Whether there are so few query rows that a kernel which reads the cache once should run them. Looks at shapes only, so it
    may be traced.

    row_bounds: whether each row has bounds of its own. They may be of several sequences, with no keys that they could share.
    """
    rows = query.shape[2]
    prefill_is_wide = HAS_AVX512 and not row_bounds and query.dtype not in MATRIX_DTYPES
    few = rows <= CPU_DECODE_ROWS and (rows <= 1 or not prefill_is_wide or _packed_rows(query, key) <= WIDE_DECODE_ROWS)
    return few and backend.resolve("decode_attention", query.device) == "cpu"


def op_of(query: Tensor, key: Tensor, row_bounds: bool) -> str:
    """The op that a `region_attention` call runs: where a CPU kernel takes every such call it is that kernel's own, without the
    detour through Python."""
    if decodes_on_cpu(query, key, row_bounds):
        return "decode_attention"
    return "prefill_attention" if _prefills_on_cpu(query) else "region_attention"


def beats_flash_on_cpu(query: Tensor, key: Tensor, row_bounds: bool) -> bool:
    """Whether a kernel of this package is the fastest on the CPU, whatever the masks. Looks at shapes only, so it may be
    traced."""
    return decodes_on_cpu(query, key, row_bounds) or _prefills_on_cpu(query)


def _prefills_on_cpu(query: Tensor) -> bool:
    return backend.resolve("prefill_attention", query.device) == "cpu" and query.dtype not in MATRIX_DTYPES


def plan_cpu_prefill(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Plan:
    """`plan_cpu` of a call that the decode kernel is not for."""
    built = backend.has_kernel("prefill_attention", "cpu")
    square = not case.is_causal or query.shape[2] == key.shape[2]
    flash_takes = case.plain and square and key.shape == value.shape and key.shape[2] >= MIN_FLASH_KEYS and query.numel() > 0
    if flash_takes and query.dtype in MATRIX_DTYPES:
        return Plan("flash", f"the processor has matrix instructions for {query.dtype}, which torch's flash attention uses")
    if built:
        return Plan("prefill", "one pass over the keys for all rows, masks and masses")
    missing = "no kernel is built"
    if flash_takes:
        return Plan("flash", f"{missing}; masses of {case.rows} rows are recomputed from torch's LSE")
    return Plan("softmax", f"{missing}, and this is not for torch's flash attention")


def plan_cuda(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Plan:
    """The plan of a call on CUDA tensors: query [B, Hq, Lq, D], key and value [B, Hkv, Lk, D] of any dtype but float64."""
    length_q, length_k = query.shape[2], key.shape[2]
    if not query.numel() or not length_k:
        return Plan("torch", "there is nothing to compute")
    packed = _packed_rows(query, key)
    why_not = cuda_kernels_refuse(query, key, value)
    if packed <= DECODE_ROWS and not why_not:
        return Plan("decode", f"{packed} packed rows (at most {DECODE_ROWS}): one read of the cache decides")
    few = case.rows * FEW_ROWS <= length_q
    square = not case.is_causal or length_q == length_k
    flash_takes = query.element_size() == 2 and query.shape[3] % 8 == 0 and query.shape[3] <= 256
    flash = case.plain and few and square and flash_takes and not any(map(_misaligned, (query, key, value)))
    not_hopper = hopper_refuses(query, key, value, case)
    if not not_hopper and length_q >= HOPPER_ROWS and (query.shape[3] <= HOPPER_FIRST_DIM or not flash):
        return Plan("hopper", "the fastest attention, and masses come with its row sums")
    if flash:
        return Plan("flash", f"masses of {case.rows} of {length_q} rows: recomputing them from the LSE is the lesser work")
    if not backend.triton_is_installed():
        return Plan("torch", "Triton is not installed")
    reason = "masses of many rows" if not few else "masks, a dtype, a head dimension or an alignment that flash attention lacks"
    if packed <= DECODE_ROWS:
        return Plan("triton", f"{reason}; the CUDA kernels are out: {why_not}")
    return Plan("triton", f"{reason}; the Hopper kernel is out: {not_hopper or 'too few rows'}")


def plan_statistics(query: Tensor, key: Tensor, row_bounds: bool, scored_rows: int = 0) -> str:
    """The backend of a statistic that is recomputed from an LSE on CUDA: "cuda", "triton" or "torch".

    row_bounds: whether each row has bounds of its own. scored_rows: rows that are reduced to scores of the keys; 0 for masses
    alone.
    """
    others = "triton" if backend.triton_is_installed() else "torch"
    if row_bounds or cuda_kernels_refuse(query, key):
        return others
    return "triton" if scored_rows > SCORED_ROWS and others == "triton" else "cuda"


def decodes_on_cuda(query: Tensor, key: Tensor) -> bool:
    """Whether there are so few rows that a kernel which splits the keys should run them. Looks at shapes only, so it may be
    traced."""
    chosen = backend.resolve("region_attention", query.device)
    return chosen in ("cuda", "triton") and _packed_rows(query, key) <= DECODE_ROWS


def _packed_rows(query: Tensor, key: Tensor) -> int:
    return query.shape[2] * query.shape[1] // key.shape[1]


def cuda_kernels_refuse(*tensors: Tensor) -> str:
    """Why the CUDA C++ kernels cannot take these [B, H, L, D] tensors; "" if they can."""
    missing = backend.load_library("cuda")
    if missing:
        return missing
    for tensor in tensors:
        dim, itemsize = tensor.shape[-1], tensor.element_size()
        if itemsize != 2:
            return f"they take float16 and bfloat16, not {tensor.dtype}"
        if dim % 8 or dim > 256:
            return f"they take head dimensions in whole eights up to 256, not {dim}"
        if _misaligned(tensor):
            return "they load 16 bytes at a time, and a row does not begin at a multiple of 16 bytes"
    return ""


def _misaligned(tensor: Tensor) -> bool:
    """Whether a row of a 16-bit tensor begins elsewhere than at a multiple of 16 bytes; flash attention wants that as well."""
    return tensor.data_ptr() % 16 != 0 or any(stride % 8 for stride in tensor.stride()[:-1])


def hopper_refuses(query: Tensor, key: Tensor, value: Tensor, case: Case) -> str:
    """Why the Hopper prefill kernel cannot take a call; "" if it can."""
    if not is_hopper(query.device):
        return "it needs a GPU of compute capability 9.0"
    why_not = cuda_kernels_refuse(query, key, value)
    if why_not:
        return why_not
    if not backend.has_kernel("hopper_prefill", "cuda"):
        return "the library is not built for sm_90a"
    if not case.plain:
        return "it has no window, softcap, kv_start, kv_end, sinks or region_bias, and no scale that is not positive"
    if any(stride == 0 < size - 1 for t in (query, key, value) for size, stride in zip(t.shape, t.stride(), strict=True)):
        return "it takes no expanded tensors"
    return ""


def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9.0, the only one that runs sm_90a."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
