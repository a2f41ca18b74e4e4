"""Timing shared by every benchmark: candidates interleaved in one run, median of many, cold L2 on a GPU."""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch

Shape = TypeVar("Shape")
Candidate = TypeVar("Candidate")
RESULTS = Path(__file__).resolve().parent / "results"


@functools.cache
def machine() -> dict[str, object]:
    """What a reader needs to judge a figure: device, versions, threads, commit."""
    import transformers

    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def _commit() -> str:
    """RAS_FAST_COMMIT, for a machine that was sent the tree without its history; else git's. Empty where there is neither."""
    git = shutil.which("git")
    command = [git, "rev-parse", "--short", "HEAD"]
    asked = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip() if git else ""
    return os.environ.get("RAS_FAST_COMMIT", asked)


def device_name() -> str:
    """A folder-safe name: the GPU's, or the CPU's with its number of threads and whether it multiplies bf16 by itself."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "-").lower()
    bf16 = "-bf16" if torch.cpu._is_avx512_bf16_supported() else ""  # one and the same table must not mix the two
    return f"cpu-{torch.get_num_threads()}-threads{bf16}"


def results_folder(about: str) -> Path:
    """The command line of what reads results, `[DEVICE]`: the folder of that device, or of this machine's."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", help="a folder of bench/results (default: this machine's)")
    return RESULTS / (parser.parse_args().device or device_name())


def in_turn(candidates: dict[str, Candidate], turn: int) -> list[tuple[str, Candidate]]:
    """The candidates' items in the order of a round: none is always the first."""
    items, first = [*candidates.items()], turn % len(candidates)
    return items[first:] + items[:first]


def compare(
    candidates: dict[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    graph: bool = False,
    ours: tuple[str, ...] = ("ras_fast",),
) -> dict[str, float]:
    """Median seconds per call of each candidate, called in turn so that drift hits all alike.

    Args:
        seconds: rough time to spend in all.
        graph: on a GPU, time the replay of a CUDA graph instead of the eager call.
        ours: candidates that have to run; another one that raises an error is left out, and that is said.
    """
    timer, timers = functools.partial(_GpuTimer, graph=graph) if torch.cuda.is_available() else _CpuTimer, {}
    for name, call in candidates.items():
        try:
            timers[name] = timer(call)
        except Exception as error:  # a peer's own, of whatever type
            if name in ours:
                raise
            left_out(name, error)
    once = sum(timer.sample() for timer in timers.values())
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(max(5, min(200, int(seconds / max(once, 1e-4))))):
        for name, timer in timers.items():
            samples[name].append(timer.sample() / timer.repeats)
    return {name: statistics.median(values) for name, values in samples.items()}


def left_out(name: str, error: Exception) -> None:
    """Says that a candidate does not run here."""
    print(f"{name} is left out: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)


class _CpuTimer:
    """Times enough calls at once for the clock's resolution and the interpreter's overhead not to show."""

    TARGET = 2e-3

    def __init__(self, call: Callable[[], object]):
        self.call, self.repeats = call, 1
        for _ in range(3):
            call()
        self.repeats = max(1, int(self.TARGET / max(self.sample(), 1e-7)))

    def sample(self) -> float:
        self.call()  # takes back the pages that the candidate before it left to the allocator
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        return time.perf_counter() - start


class _GpuTimer:
    """One call between two events, the L2 cache full of something else.

    The cache is filled by reading: lines that were written would go back to memory while the call is timed. The fill also
    keeps the GPU busy until the call is in the queue, so that calls are timed without their launch from Python: one fill of
    some 60 µs for a graph, five where Python calls the kernels one by one.
    """

    repeats = 1

    def __init__(self, call: Callable[[], object], graph: bool):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up off the default stream, as graph capture wants
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        self.call, self.fills = call, 1 if graph else 5
        if graph:
            self.captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.captured):
                call()
            self.call = self.captured.replay

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(self.fills):
            _something_else().sum()
        start.record()
        self.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


@functools.cache
def _something_else() -> torch.Tensor:
    return torch.zeros(64 << 20, device="cuda")  # 256 MB, several times any L2


def extra_megabytes(call: Callable[[], object]) -> float:
    """What a call allocates at its peak, its results included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes), default=0) / 2**20


def return_freed_memory() -> None:
    """transformers' cache is copied to a longer one at each step, and the holes add up: 9 GB by 256 steps of one answer, which
    the next contender would begin with."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def copy_bandwidth() -> float:
    """Bytes per second (read plus written) of a plain copy too large for the caches."""
    gpu = torch.cuda.is_available()
    source = torch.ones(2 << 30 if gpu else 256 << 20, dtype=torch.int8, device="cuda" if gpu else "cpu")
    target = torch.empty_like(source)
    return 2 * source.numel() / compare({"copy": lambda: target.copy_(source)})["copy"]


def matmul_rate() -> float:
    """Operations per second of a square bf16 matrix product, on a CPU of a float32 one where that is faster: what the
    processor's best-kept library gets out of it."""
    gpu = torch.cuda.is_available()
    size = 8192 if gpu else 1024
    a = torch.randn(size, size, device="cuda" if gpu else "cpu")
    factors = [a.to(dtype) for dtype in ([torch.bfloat16] if gpu else [torch.bfloat16, torch.float32])]
    times = compare({str(factor.dtype): functools.partial(torch.matmul, factor, factor) for factor in factors})
    return 2 * size**3 / min(times.values())


def ceilings() -> dict[str, float]:
    """What the machine can do, measured in the same run as what is compared with it."""
    return {"copy GB/s": copy_bandwidth() / 1e9, "matmul GFLOP/s": matmul_rate() / 1e9}


def numbers(names: str) -> Callable[[str], tuple[int, ...]]:
    """The type of an argument of so many whole numbers, as "T,d" names two."""
    count = len(names.split(","))

    def read(text: str) -> tuple[int, ...]:
        found = tuple(map(int, text.split(",")))
        if len(found) != count or min(found) < 0:
            raise argparse.ArgumentTypeError(f"{text!r}; it needs to be {names}")
        return found

    return read


def bound_by_memory(
    about: str,
    name: str,
    dims: str,
    shapes: Iterable[Shape],
    quick: Iterable[Shape],
    case: Callable[[Shape, torch.dtype, str], tuple[dict[str, object], int, dict[str, Callable[[], object]]]],
    ours: tuple[str, ...] = ("ras_fast",),
) -> None:
    """The command line of a benchmark of calls that memory bounds, in bf16 and fp32, on a GPU eagerly and as a graph.

    Args:
        about: what it says of itself.
        name: of the file of results. Shapes that the command line names are shown alone, and not written there.
        dims: what the numbers of a shape are, with commas between them.
        quick: the shapes of the headline figures, which `--quick` measures in bf16 alone.
        case: (columns that name the shape, elements that must move, candidates) for a shape, dtype and device.
        ours: candidates that have to run.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the shapes of the headline figures, bf16")
    parser.add_argument("--shape", type=numbers(dims), nargs="+", metavar=dims, help="shapes of your own; nothing is written")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on a shape")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    limits, rows, written = ceilings(), [], ""
    for dtype in (torch.bfloat16,) if args.quick else (torch.bfloat16, torch.float32):
        for shape in args.shape or (quick if args.quick else shapes):
            columns, elements, calls = case(shape, dtype, "cuda" if gpu else "cpu")
            moved = elements * dtype.itemsize
            for graph in (False, True) if gpu else (False,):
                times = compare(calls, seconds=args.seconds, graph=graph, ours=ours)
                row = {"dtype": str(dtype)[6:], **columns, **({"graph": graph} if gpu else {})}
                row |= {f"{name} µs": seconds * 1e6 for name, seconds in times.items()}
                row |= {"MB": moved / 1e6, "GB/s": moved / times["ras_fast"] / 1e9}
                row["share"] = row["GB/s"] / limits["copy GB/s"]
                rows.append(row)
            if not args.shape:  # now: the run may be cut short
                written = f"; written to {save(f'{name}_quick' if args.quick else name, rows, limits)}"
    print(table(rows))
    print(f"\ncopy bandwidth {limits['copy GB/s']:.1f} GB/s{written}")


def bound_by_products(
    about: str,
    name: str,
    ours: str,
    cases: Callable[[str], Iterable[tuple[dict[str, object], float, dict[str, Callable[[], object]]]]],
    graph: bool = False,
) -> None:
    """The command line of a benchmark of calls that matrix products bound.

    Args:
        about: what it says of itself.
        name: of the file of results.
        ours: the candidate whose rate stands beside a matrix product's.
        cases: for a device, (columns that name a shape, its GFLOP, candidates) one after the other.
        graph: whether a GPU runs them as a graph.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="time to spend on a shape")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    limits, rows = ceilings(), []
    for columns, gflop, calls in cases("cuda" if gpu else "cpu"):
        times = compare(calls, seconds=args.seconds, graph=graph and gpu)
        row = columns | {f"{candidate} ms": seconds * 1e3 for candidate, seconds in times.items()}
        rate = gflop / times[ours]
        rows.append(row | {"GFLOP/s": rate, "share": rate / limits["matmul GFLOP/s"]})
        path = save(name, rows, limits)  # now: the run may be cut short
    print(table(rows))
    print(f"\nmatrix product {limits['matmul GFLOP/s']:.0f} GFLOP/s; written to {path}")


def save(name: str, rows: list[dict[str, object]], limits: dict[str, float] | None = None) -> Path:
    """Writes bench/results/<device>/<name>.json; `limits` are the run's `ceilings`."""
    path = RESULTS / device_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "ceilings": limits or {}, "rows": rows}, indent=1) + "\n")
    return path


def table(rows: list[dict[str, object]]) -> str:
    """Rows as a Markdown table; what a row lacks stays blank."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
