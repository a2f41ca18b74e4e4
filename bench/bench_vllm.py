"""What a defended answer costs in vLLM, on the shipped tiny model.

    python bench/bench_vllm.py                       # needs vLLM, see docs/vllm.md
    python bench/bench_vllm.py --no-prefix-caching

One engine, fp32, greedy. "undefended" asks it for the answers alone, in the same process and in turn with "MoRAS"
(`ras_fast.vllm.SafeLLM`); the prefix cache is emptied before each. Medians of the rounds, of the process's processor time: the
engine is in this process, with one thread, and other work on the machine counts less so. A model this small shows what the
requests and vLLM's own steps cost, not what a GPU's would.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other would count as work
TOKENS = 24


def readable_by_vllm(source: Path, target: Path) -> Path:
    """A copy of a LLaVA checkpoint with the names that vLLM 0.32 reads. Since transformers 5.20 the tensors of a CLIP tower are
    saved without "vision_model" in their names."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    old, new = "vision_tower.", "vision_tower.vision_model."
    named = {name if name.startswith(new) else name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(named, target / "model.safetensors", metadata={"format": "pt"})
    return target


def tiny_profile(checkpoint: Path, target: Path) -> Path:
    """A MoRAS profile of the tiny model in fp32."""
    from ras_fast.evaluation import tinyworld
    from ras_fast.loading import load
    from ras_fast.methods import moras

    profile = moras.calibrate(
        *load(str(checkpoint), device="cpu", dtype="float32"),
        refused_texts=tinyworld.refused_texts(12),
        pairs=tinyworld.calibration_pairs(12),
        context_prompt=tinyworld.CONTEXT_PROMPT,
        safety_prompt=tinyworld.SAFETY_PROMPT,
        progress=False,
    )
    profile.save_pretrained(target)
    return target


def undefended(llm, guard, prompts, images) -> float:
    """Seconds of processor time for the answers alone."""
    from vllm import SamplingParams

    from ras_fast.inputs import make_queries, short_ids

    start = time.process_time()
    requests = [
        {"prompt_token_ids": short_ids(guard.processor, query), "multi_modal_data": {"image": query.images}}
        for query in make_queries(prompts, images, guard.processor)
    ]
    llm.generate(requests, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
    return time.process_time() - start


def case(llm, guard, name: str, items, at_once: int, rounds: int) -> None:
    times: dict[str, list[float]] = {"undefended": [], "MoRAS": []}
    guard.counters.clear()
    groups = [items[i : i + at_once] for i in range(0, len(items), at_once)]
    for number in range(rounds + 1):  # the first warms up
        spent = dict.fromkeys(times, 0.0)
        for contender in ("undefended", "MoRAS"):
            llm.reset_prefix_cache()
            for group in groups:
                prompts, images = [item.question for item in group], [item.image for item in group]
                if contender == "undefended":
                    spent[contender] += undefended(llm, guard, prompts, images)
                    continue
                start = time.process_time()
                guard.generate(prompts, images, max_tokens=TOKENS)
                spent[contender] += time.process_time() - start
        if number:
            for contender, seconds in spent.items():
                times[contender].append(1000 * seconds / len(items))
    medians = {contender: statistics.median(values) for contender, values in times.items()}
    counts = guard.counters
    print(
        f"{name:20} {at_once:3} at once   undefended {medians['undefended']:6.1f} ms a query   MoRAS {medians['MoRAS']:6.1f}   "
        f"drafts kept {1 - counts['rejected'] / counts['queries']:4.0%}   "
        f"prompt tokens from the prefix cache {counts['cached_tokens'] / counts['prompt_tokens']:4.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=24, help="queries of a kind (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-prefix-caching", action="store_true")
    arguments = parser.parse_args()
    from vllm import LLM

    from ras_fast.evaluation import tinyworld
    from ras_fast.loading import TINY
    from ras_fast.vllm import SafeLLM, engine_args

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = readable_by_vllm(TINY, Path(folder, "model"))
        profile = tiny_profile(checkpoint, Path(folder, "profile"))
        llm = LLM(
            str(checkpoint),
            dtype="float32",
            enforce_eager=True,
            max_model_len=512,
            block_size=32,
            enable_prefix_caching=not arguments.no_prefix_caching,
            **engine_args(profile),
        )
        guard = SafeLLM(llm)
        items = [item for item in tinyworld.split("test", 6 * arguments.n) if item.image is not None]
        kinds = {"harmless": ("benign", "lookalike"), "harm in the image": ("typographic", "pictured")}
        for at_once in (1, 8, arguments.n):
            for name, wanted in kinds.items():
                case(llm, guard, name, [i for i in items if i.kind in wanted][: arguments.n], at_once, arguments.rounds)


if __name__ == "__main__":
    main()
