"""`ras-fast bench --tune`: measures launch configurations of the Triton kernels on the GPU that is here.

For every shape class a handful of configurations is timed (CUDA events, cold L2, median) beside the kernel's rule. The fastest
that spills no register in any variant of its class, and beats the rule by more than noise, goes into
`triton_kernels/configs.json` with both times and what they were measured with.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from ras_fast.backend import backends, interprets_triton

NOISE = 0.02  # a configuration that gains less than this is not worth departing from the rule
WORKERS = 8
# Tried beside the rule, in the order of tuned.FIELDS. What does not fit into shared memory drops out by itself.
GRID = {
    "prefill": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4), (64, 64, 4, 2),
                (64, 64, 4, 3), (64, 32, 4, 3), (64, 32, 8, 2), (64, 128, 4, 2), (128, 64, 4, 3)],
    "decode": [(128, 4, 2), (128, 4, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (32, 4, 3), (32, 4, 5), (64, 2, 3), (128, 8, 3)],
    "mass": [(64, 4, 2), (64, 8, 2), (32, 4, 2), (32, 8, 2), (128, 8, 2)],
    "keys": [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3)],
    "norm": [(warps, registers) for warps in (1, 2, 4, 8, 16, 32) for registers in (64, 128)],
}  # fmt: skip
HEAD_DIMS = (64, 128, 256)
WIDTHS = (1024, 4096, 8192, 16384)
HEADS, KV_HEADS, REGIONS = 32, 8, 8
DEVICE = "cuda"


def problem(wanted) -> tuple[str, Callable[[], object]]:
    """The call that is timed for a shape class: (its sizes in words, the call)."""
    return (_norm_problem if wanted.kernel == "norm" else _attention_problem)(wanted)


def _attention_problem(wanted) -> tuple[str, Callable[[], object]]:
    from ras_fast.triton_kernels import attention

    batch, rows, keys = {"prefill": (1, 4096, 4096), "decode": (8, 1, 8192)}.get(wanted.kernel, (1, 2048, 2048))
    query = torch.randn(batch, rows, HEADS, wanted.size, device=DEVICE, dtype=torch.bfloat16).transpose(1, 2)
    key, value = (torch.randn(batch, KV_HEADS, keys, wanted.size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    ids = (torch.arange(keys, device=DEVICE, dtype=torch.int32) * (REGIONS + 2) // keys - 1).clamp(max=REGIONS - 1)
    ids = ids.expand(batch, keys).contiguous()
    start, end, window, softcap, sinks, bias = None, None, 0, 0.0, None, None
    if wanted.variant == "rows":  # what a causal mask hides
        end = torch.arange(keys - rows + 1, keys + 1, device=DEVICE, dtype=torch.int32).expand(batch, -1).contiguous()
        start = torch.zeros_like(end)
    if wanted.variant == "every":
        start = torch.full((batch,), 7, device=DEVICE, dtype=torch.int32)
        end = torch.full((batch,), keys, device=DEVICE, dtype=torch.int32)
        window, softcap, sinks = keys, 50.0, torch.randn(HEADS, device=DEVICE)
        bias = torch.randn(HEADS, REGIONS, device=DEVICE)
    masks = (wanted.size**-0.5, wanted.variant != "rows", start, end, window, softcap)
    shape = f"B{batch} Hq{HEADS} Hkv{KV_HEADS} Lq{rows} Lk{keys} D{wanted.size} R{REGIONS}"
    if wanted.kernel in ("prefill", "decode"):
        return shape, lambda: attention.region_attention(query, key, value, ids, REGIONS, *masks, sinks, bias, rows)
    _, lse, _ = attention.region_attention(query, key, value, ids, REGIONS, *masks, None, bias, 0)
    if wanted.kernel == "keys":
        return shape, lambda: attention.key_attention(query, key, lse, rows, "mean", ids, *masks, bias)
    return f"{shape} M64", lambda: attention.region_mass(query, key, lse, ids, REGIONS, *masks, bias, 64)


def _norm_problem(wanted) -> tuple[str, Callable[[], object]]:
    from ras_fast.triton_kernels import norm

    tokens, vectors = 4096, torch.randn(2, wanted.size, device=DEVICE)
    x, residual = (torch.randn(tokens, wanted.size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.randn(wanted.size, device=DEVICE, dtype=torch.bfloat16)
    slot = torch.ones(tokens, device=DEVICE, dtype=torch.int32)
    alpha = torch.full((tokens,), 0.5, device=DEVICE)
    call = functools.partial(norm.add_rms_norm, x, residual, weight, 1e-6, vectors, slot, alpha, False, 0.0, True, None)
    return f"T{tokens} d{wanted.size}", call


def shape_classes(arch: int, match: str = "") -> list:
    """Every class that is tuned, in bf16; `match` is part of "kernel size variant"."""
    from ras_fast.triton_kernels import norm
    from ras_fast.triton_kernels.tuned import FIELDS, ShapeClass

    kernels = [kernel for kernel in FIELDS if kernel != "norm"]
    classes = [ShapeClass(kernel, arch, 2, size, variant)
               for variant in ("plain", "every", "rows") for kernel in kernels for size in HEAD_DIMS]  # fmt: skip
    classes += [norm.shape_class(arch, 2, width) for width in WIDTHS]
    return [wanted for wanted in classes if match in f"{wanted.kernel} {wanted.size} {wanted.variant}"]


def candidates(wanted) -> list[dict[str, int]]:
    """The rule's configuration first, then the others to try."""
    from ras_fast.triton_kernels import attention, norm
    from ras_fast.triton_kernels.tuned import FIELDS

    fields = FIELDS[wanted.kernel]
    rule = (norm if wanted.kernel == "norm" else attention).rule(wanted)
    default = {field: getattr(rule, field) for field in fields}
    others = [dict(zip(fields, values, strict=True)) for values in GRID[wanted.kernel]]
    if wanted.kernel == "norm":  # no fewer than 4 elements a thread, no more than 64
        others = [other for other in others if 4 <= wanted.size / other["num_warps"] / 32 <= 64]
    return [default, *(other for other in others if other != default)]


@contextmanager
def trial(wanted, config: dict[str, int]) -> Iterator[None]:
    """Within, the kernel's launches of this class use `config`."""
    from ras_fast.triton_kernels import tuned

    table = tuned.table()
    before = table.get(wanted)
    table[wanted] = config
    try:
        yield
    finally:
        del table[wanted]
        if before is not None:
            table[wanted] = before


def select(
    configs: list[dict[str, int]], times: list[float | None], spills: Callable[[dict[str, int]], bool]
) -> tuple[dict[str, int], float, float]:
    """(the best configuration, its µs, the rule's µs); the rule's is `configs[0]`.

    Args:
        times: µs of each; None for what does not run here.
        spills: asked only of what would otherwise be chosen.

    Raises:
        ValueError: the rule's own configuration does not run.
    """
    default = times[0]
    if default is None:
        raise ValueError(f"the rule's configuration {configs[0]} does not run on this GPU")
    faster = [(time, i) for i, time in enumerate(times) if time is not None and time < (1 - NOISE) * default]
    for time, i in sorted(faster):
        if not spills(configs[i]):
            return configs[i], time, default
    return configs[0], default, default


def spills(wanted, config: dict[str, int]) -> bool:
    """Whether any variant of the class spills with this configuration, compiled ahead of time."""
    from ras_fast.inspect import compile_triton
    from ras_fast.triton_kernels import attention, norm

    with trial(wanted, config):
        cases = (norm if wanted.kernel == "norm" else attention).aot_cases(wanted.arch)
    return any(facts.spills for facts in compile_triton([c for c in cases if c["shape_class"] == wanted], wanted.arch))


def _runs(wanted, config: dict[str, int]) -> bool:
    """Compiles and runs a configuration once, which leaves it in Triton's cache on disk."""
    from triton.errors import TritonError

    with torch.no_grad(), trial(wanted, config):
        try:
            problem(wanted)[1]()
            torch.cuda.synchronize()
        except (TritonError, RuntimeError):  # too much shared memory, or the compiler or ptxas gives up
            return False
    return True


def _microseconds(wanted, configs: list[dict[str, int]], call: Callable[[], object], pool) -> list[float | None]:
    from triton.testing import do_bench

    times: list[float | None] = []
    running = list(pool.map(_runs, [wanted] * len(configs), configs))  # all of it before the first is timed
    expected = None  # the rule's, which comes first
    for config, runs in zip(configs, running, strict=True):
        with trial(wanted, config):
            if runs and expected is None:
                expected = call()
            sound = runs and agree(call(), expected)
            times.append(1e3 * do_bench(call, warmup=5, rep=30, return_mode="median") if sound else None)
    return times


def agree(found: object, expected: object) -> bool:
    """Whether results are the same but for rounding. Triton has compiled tiles into kernels that compute something else."""
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        if isinstance(one, torch.Tensor) and one.numel():
            one, other = one.double(), other.double()
            error, scale = (one - other).masked_fill(one == other, 0).abs().max(), other[other.isfinite()].abs().max()
            if not error <= 0.02 * scale:  # nor where it is NaN
                return False
    return True


def tune(match: str, trying: bool) -> Iterator[dict]:
    """Measures launch configurations on this machine's GPU; yields an entry of configs.json after each shape class.

    Args:
        match: only classes whose "kernel size variant" contains this.
        trying: whether to try other configurations; False measures only the one in force and the rule's.

    Raises:
        ValueError: torch sees no CUDA GPU, or Triton's interpreter replaces its compiler.
    """
    if interprets_triton():
        raise ValueError("TRITON_INTERPRET=1 replaces Triton's compiler by an interpreter: unset it")
    if not backends()["triton"].available:
        raise ValueError(f"configurations are measured on a CUDA GPU: {backends()['triton'].reason}")
    from ras_fast.triton_kernels import tuned
    from ras_fast.triton_kernels.device import device_facts

    arch, _ = device_facts(torch.device("cuda"))
    made_with = _made_with()
    with torch.no_grad(), ProcessPoolExecutor(min(WORKERS, os.cpu_count()), mp_context=get_context("spawn")) as pool:
        for wanted in shape_classes(arch, match):
            configs = candidates(wanted)
            if not trying:
                configs = [configs[0], tuned.table().get(wanted, configs[0])]
            shape, call = problem(wanted)
            times = _microseconds(wanted, configs, call, pool)
            config, us, default_us = select(configs, times, functools.partial(spills, wanted))
            figures = {"config": config, "us": round(us, 2), "default_us": round(default_us, 2), "shape": shape}
            yield wanted._asdict() | figures | made_with


def _made_with() -> dict[str, str]:
    import triton

    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}


def write(path: Path, entries: list[dict]) -> None:
    """Puts entries into the file at `path`, in place of those of the same shape class; the others stay. A crash leaves the old
    file or the new one. Where the old one is broken, a warning says so and the new one begins anew.

    Raises ValueError for entries that `ras_fast.triton_kernels.tuned.read` would not take.
    """
    from ras_fast.triton_kernels.tuned import read, read_usable, shape_class

    found = {shape_class(entry): entry for entry in (read_usable(path) if path.is_file() else [])}
    found |= {shape_class(entry): entry for entry in entries}
    lines = ",\n".join(f"  {json.dumps(found[wanted])}" for wanted in sorted(found))
    new = Path(f"{path}.new")
    new.write_text(f'{{\n "entries": [\n{lines}\n ]\n}}\n')
    read(new)
    os.replace(new, path)


def configs_file() -> Path:
    """The configs.json that the installed kernels read."""
    from ras_fast.triton_kernels.tuned import FILE

    return FILE


def main(match: str, tuning: bool, out: Path) -> int:
    """Prints one line per shape class; when tuning, writes each to `out` as soon as it is measured. Returns 0."""
    for entry in tune(match, trying=tuning):
        name = f"{entry['kernel']} {entry['size']} {entry['variant']}"
        config = " ".join(f"{field}={value}" for field, value in entry["config"].items())
        print(f"{name:20} {entry['us']:9.1f} µs, rule {entry['default_us']:9.1f} µs  {config}  ({entry['shape']})", flush=True)
        if tuning:
            write(out, [entry])
    return 0
