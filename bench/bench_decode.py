"""What a growing cache costs Hugging Face's `generate`: `python bench/bench_decode.py [--shape 0.3b] [--batch 1 8]`.

A LLaVA of random weights answers behind a text prompt of 600 tokens: unpatched and patched, each with a `DynamicCache` and a
`StaticCache`, and patched with the `DynamicCache` left as it is, by turns in one run. A step's time is the difference between a
long answer and one of a single token; its memory, what the process holds after the long one beyond what it held before (on a
GPU, the most that was allocated). Writes decode.json into bench/results/<device>/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import harness
import torch
from random_models import SHAPES, build

import ras_fast

PROMPT = 600
# On a GPU generate would compile the model for a static cache, for minutes and inside the first long answer.
STATIC = {"cache_implementation": "static", "disable_compile": True}
CONTENDERS = {  # what `patch` is told, or None for an unpatched model, and what `generate` is
    "unpatched": (None, {}),
    "unpatched, static": (None, STATIC),
    "patched, caches=False": ({"caches": False}, {}),
    "patched": ({}, {}),
    "patched, static": ({}, STATIC),
}


def held_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def answer(model, ids: torch.Tensor, tokens: int, options: dict[str, str]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    model.generate(input_ids=ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, **options)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(model, batch: int, tokens: int, rounds: int) -> list[dict[str, object]]:
    ids = torch.randint(10, 1000, (batch, PROMPT), device=model.device)
    steps: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds):
        for name, (patched, options) in harness.in_turn(CONTENDERS, turn):
            with nullcontext() if patched is None else ras_fast.patch(model, **patched):
                single = answer(model, ids, 1, options)
                harness.return_freed_memory()
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                before = held_bytes()
                steps[name].append((answer(model, ids, tokens, options) - single) / (tokens - 1))
                memory[name].append(held_bytes() - before)
    return [
        {"contender": name, "ms a step": 1e3 * statistics.median(steps[name]), "MB": statistics.median(memory[name]) / 1e6}
        for name in CONTENDERS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.3b")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="of the long answer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for dtype in args.dtype:
        model, _ = build(args.shape, "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype))
        for batch in args.batch:
            case = {"shape": args.shape, "dtype": dtype, "B": batch, "tokens": args.tokens}
            rows += [case | row for row in measure(model, batch, args.tokens, args.rounds)]
            path = harness.save("decode", rows)  # now: the run may be cut short
    print(harness.table(rows))
    print(f"\nwritten to {path}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
