"""A line per profiled kernel from ncu's CSV (`ncu --import REPORT --page raw --csv`): time, use of memory, tensor cores and
issue slots against their peaks, occupancy, chief stalls."""

import csv
import re
import sys
from pathlib import Path

# Column: what metrics it is read from; the first that was collected.
WANTED = {
    "µs": ["gpu__time_duration.sum"],
    "DRAM %": ["gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", "dram__throughput.avg.pct_of_peak_sustained_elapsed"],
    "memory %": ["gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"],
    "tensor %": ["sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
                 "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"],
    "SM %": ["sm__throughput.avg.pct_of_peak_sustained_elapsed"],
    "occupancy %": ["sm__warps_active.avg.pct_of_peak_sustained_active"],
    "regs": ["launch__registers_per_thread"],
}  # fmt: skip
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}


def kernel_name(text: str) -> str:
    """A kernel's name with its template arguments, without namespaces, casts and function arguments."""
    text = re.sub(r"\((?:bool|int|unsigned int)\)", "", text.removeprefix("void "))
    return re.sub(r"\w+::", "", text.split("(")[0])


def number(text: str) -> float:
    return float(text.replace(",", ""))


def lines(rows: list[list[str]]) -> list[str]:
    """`rows`: the header, the units, a row per kernel."""
    header, units, *kernels = rows
    unit = dict(zip(header, units, strict=True))
    text = []
    for values in kernels:
        row = {name: value for name, value in zip(header, values, strict=True) if value}
        cells = []
        for column, metrics in WANTED.items():
            metric = next((metric for metric in metrics if metric in row), None)
            value = number(row[metric]) * (MICROSECONDS[unit[metric]] if column == "µs" else 1) if metric else None
            cells.append(f"{column} {'?' if value is None else f'{value:.1f}' if value < 100 else f'{value:.0f}'}")
        stalls = sorted(((number(row[name]), match[1]) for name in row if (match := STALL.fullmatch(name))), reverse=True)
        worst = ", ".join(f"{reason} {ratio:.1f}" for ratio, reason in stalls[:3])
        text.append(f"{kernel_name(row['Kernel Name'])[:60]:60}  {'  '.join(cells)}  stalls: {worst}")
    return text


def main(path: str) -> None:
    table = Path(path).read_text().splitlines()
    first = next((i for i, line in enumerate(table) if line.startswith('"ID"')), None)
    if first is None:
        raise SystemExit(f"{path} holds no ncu table")
    print("\n".join(lines(list(csv.reader(table[first:])))))


if __name__ == "__main__":
    main(sys.argv[1])
