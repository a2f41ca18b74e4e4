"""A line per profiled kernel from ncu's CSV (`--page details`): time, DRAM, tensor and issue use, occupancy, chief stalls."""

import csv
import sys
from collections import defaultdict
from pathlib import Path

WANTED = {
    "Duration": "time",
    "DRAM Throughput": "DRAM %",
    "Memory Throughput": "memory %",
    "Compute (SM) Throughput": "SM %",
    "Achieved Occupancy": "occupancy %",
    "Registers Per Thread": "regs",
}
STALL = "smsp__average_warps_issue_stalled_"


def main(path: str) -> None:
    lines = Path(path).read_text().splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise SystemExit(f"{path} holds no ncu table")
    kernels: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    stalls: dict[tuple[str, str], list[tuple[float, str]]] = defaultdict(list)
    for row in csv.DictReader(lines[first:]):
        key = row["ID"], row["Kernel Name"].split("(")[0].removeprefix("void ")[:60]
        metric, unit, value = row["Metric Name"], row["Metric Unit"], row["Metric Value"]
        percent_of_memory = metric == "Memory Throughput" and unit != "%"
        if metric in WANTED and not percent_of_memory:
            kernels[key][WANTED[metric]] = f"{value} {unit}" if metric == "Duration" else value
        elif metric.startswith(STALL) and metric.endswith("_per_issue_active.ratio"):
            reason = metric.removeprefix(STALL).removesuffix("_per_issue_active.ratio")
            stalls[key].append((float(value.replace(",", "")), reason))
    for (number, name), facts in kernels.items():
        worst = ", ".join(f"{reason} {ratio:.1f}" for ratio, reason in sorted(stalls[number, name], reverse=True)[:2])
        print(f"{name:60}  " + "  ".join(f"{key} {facts.get(key, '?')}" for key in WANTED.values()) + f"  stalls: {worst}")


if __name__ == "__main__":
    main(sys.argv[1])
