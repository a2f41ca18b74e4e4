"""What AutoSteer costs a decode step: `python bench/bench_autosteer.py [--shape 0.3b] [--dtype float32 bfloat16]`.

A LLaVA of random weights decodes behind an image: patched, with the method attached and every gate off, and with every gate
on, by turns in one run. "M h" is the refusal head alone on the same rows, timed in between: what remains of a gate that is on
is overhead. Writes autosteer.json into bench/results/<device>/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import nullcontext

import harness
import torch
from bench_engine import autosteer_profile
from random_models import SHAPES, build

import ras_fast
from ras_fast import ops
from ras_fast.profile import RasProfile

PROMPT = 600  # tokens behind which is decoded


class Decoder:
    """Decodes one token again and again behind the same prompt, with a method attached or none."""

    def __init__(self, model, patch, profile: RasProfile | None, batch: int):
        self.model, self.patch, self.profile = model, patch, profile
        ids = torch.randint(10, 1000, (batch, PROMPT), device=model.device)
        self.step = {"input_ids": ids[:, :1]}
        with self.attached():
            self.cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def attached(self):
        return nullcontext() if self.profile is None else ras_fast.methods.attach(self.patch, self.profile)

    def seconds(self, steps: int) -> float:
        """The median step of `steps`."""
        times = []
        with self.attached():
            for _ in range(steps + 1):  # the first is for warmth
                self._synchronise()
                begin = time.perf_counter()
                self.model(**self.step, past_key_values=self.cache)
                self._synchronise()
                times.append(time.perf_counter() - begin)
                self.cache.crop(-1)
        harness.return_freed_memory()
        return statistics.median(times[1:])

    def _synchronise(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def measure(model, processor, batch: int, rounds: int, steps: int) -> dict[str, object]:
    d, head = model.config.get_text_config().hidden_size, autosteer_profile(model, processor, True).tensors["refusal"]
    x, m = torch.randn(batch, 1, d, device=model.device).to(model.dtype), head.to(model.device, model.dtype)
    gate = torch.full((batch,), 0.1, device=model.device)
    times: dict[str, list[float]] = {"patched": [], "gate off": [], "gate on": [], "M h": []}
    with ras_fast.patch(model) as patch:
        decoders = {
            "patched": Decoder(model, patch, None, batch),
            "gate off": Decoder(model, patch, autosteer_profile(model, processor, False), batch),
            "gate on": Decoder(model, patch, autosteer_profile(model, processor, True), batch),
        }
        for turn in range(rounds):
            for name, decoder in harness.in_turn(decoders, turn):
                times[name].append(decoder.seconds(steps))
            times["M h"].append(harness.compare({"M h": lambda: ops.gated_linear(x, m, gate)}, seconds=0.05)["M h"])
    # Each round's ratio to its own unattached step: what slows the machine slows both.
    share = {
        name: statistics.median(mine / base for mine, base in zip(values, times["patched"], strict=True))
        for name, values in times.items()
    }
    row: dict[str, object] = {"B": batch} | {f"{name} ms": 1e3 * statistics.median(values) for name, values in times.items()}
    row |= {"off, %": 100 * (share["gate off"] - 1), "on, %": 100 * (share["gate on"] - 1), "M h, %": 100 * share["M h"]}
    return row | {"on beyond M h, %": row["on, %"] - row["M h, %"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.3b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="decode steps a round")
    args = parser.parse_args()
    rows = []
    for dtype in args.dtype:
        model, processor = build(args.shape, args.device, getattr(torch, dtype))
        case = {"shape": args.shape, "dtype": dtype}
        rows += [case | measure(model, processor, batch, args.rounds, args.steps) for batch in args.batch]
    print(harness.table(rows))
    print(f"\nwritten to {harness.save('autosteer', rows)}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
