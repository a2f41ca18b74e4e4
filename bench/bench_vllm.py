"""What a defended answer costs in vLLM.

    python bench/bench_vllm.py                       # the shipped tiny model; needs vLLM, see docs/vllm.md
    python bench/bench_vllm.py --no-prefix-caching
    python bench/bench_vllm.py --shape 0.3b --n 8    # random weights, 64 tokens: another of random_models.py's LLaVAs
    python bench/bench_vllm.py --temperature 0.7     # answers that are sampled
    python bench/bench_vllm.py --method autosteer

One engine, greedy unless asked otherwise, in fp32 or, of random weights, bf16. "undefended" asks it for the answers alone, in
the same process and in turn with "defended" (`ras_fast.vllm.SafeLLM`); the prefix cache is emptied before each. Medians of the
rounds, of the process's processor time: the engine is in this process, with one thread, and other work on the machine counts
less so. The tiny model shows what the requests and vLLM's own steps cost. What random weights say means nothing: their risk
is computed, and then 0 for benign queries (MoRAS's drafts stand) and 1 for refused ones (they fall at their first token).
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from safetensors.torch import load_file, save_file

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other would count as work
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else vLLM takes a thread for each core, whatever is said above


class Subject(NamedTuple):
    """A checkpoint, the profile of its engine, and queries by the kind that they are of."""

    checkpoint: Path
    dtype: str
    profile: Path
    queries: dict[str, list]
    tokens: int


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


def tiny_gate(checkpoint: Path, target: Path) -> Path:
    """An AutoSteer profile of the tiny model in fp32."""
    from ras_fast.evaluation import tinyworld
    from ras_fast.loading import load
    from ras_fast.methods import autosteer

    profile = autosteer.calibrate(
        *load(str(checkpoint), device="cpu", dtype="float32"),
        pairs=tinyworld.contrast_pairs(400),
        refusal=tinyworld.REFUSAL,
        layer="validation",
        progress=False,
    )
    profile.save_pretrained(target)
    return target


def tiny(method: str, folder: Path, n: int) -> Iterator[Subject]:
    """The shipped model."""
    from ras_fast.evaluation import tinyworld
    from ras_fast.loading import TINY

    checkpoint = readable_by_vllm(TINY, folder / "model")
    items = [item for item in tinyworld.split("test", 6 * n) if item.image is not None]
    kinds = {"harmless": ("benign", "lookalike"), "harm in the image": ("typographic", "pictured")}
    queries = {name: [item for item in items if item.kind in wanted][:n] for name, wanted in kinds.items()}
    make = {"moras": tiny_profile, "autosteer": tiny_gate}[method]
    yield Subject(checkpoint, "float32", make(checkpoint, folder / "profile"), queries, 24)


def of_random_weights(shape: str, method: str, folder: Path, n: int) -> Iterator[Subject]:
    """One subject for each risk."""
    import numpy
    import torch
    from bench_engine import QUESTION, RISKS, autosteer_profile, make_profile
    from PIL import Image
    from random_models import build

    from ras_fast.methods.autosteer import known_risks

    model, processor = build(shape, "cpu", torch.bfloat16)
    for part in (model, processor):
        part.save_pretrained(folder / "saved")
    checkpoint = readable_by_vllm(folder / "saved", folder / "model")
    pixels = numpy.random.default_rng(0).integers(0, 256, (n, 336, 336, 3), dtype="uint8")
    items = [SimpleNamespace(question=QUESTION, image=Image.fromarray(image)) for image in pixels]
    for name, risk in RISKS.items():
        if method == "moras":
            profile = make_profile(model, processor, risk)
        else:
            profile = autosteer_profile(model, processor, risk)  # a gate is on or off
            profile.config["known"] = known_risks(profile, model, processor, [QUESTION])
        profile.save_pretrained(folder / name)
        yield Subject(checkpoint, "bfloat16", folder / name, {name: items}, 64)


def undefended(llm, guard, prompts, images, sampling: dict) -> float:
    """Seconds of processor time for the answers alone. sampling: of vLLM's SamplingParams."""
    from vllm import SamplingParams

    from ras_fast.inputs import make_queries, short_ids

    start = time.process_time()
    requests = [
        {"prompt_token_ids": short_ids(guard.processor, query), "multi_modal_data": {"image": query.images}}
        for query in make_queries(prompts, images, guard.processor)
    ]
    llm.generate(requests, SamplingParams(**sampling), use_tqdm=False)
    return time.process_time() - start


def case(llm, guard, name: str, items, sampling: dict, at_once: int, rounds: int) -> None:
    times: dict[str, list[float]] = {"undefended": [], "defended": []}
    guard.counters.clear()
    groups = [items[i : i + at_once] for i in range(0, len(items), at_once)]
    for number in range(rounds + 1):  # the first warms up
        spent = dict.fromkeys(times, 0.0)
        for contender in times:
            llm.reset_prefix_cache()
            for group in groups:
                prompts, images = [item.question for item in group], [item.image for item in group]
                if contender == "undefended":
                    spent[contender] += undefended(llm, guard, prompts, images, sampling)
                    continue
                start = time.process_time()
                guard.generate(prompts, images, **sampling)
                spent[contender] += time.process_time() - start
        if number:
            for contender, seconds in spent.items():
                times[contender].append(1000 * seconds / len(items))
    medians = {contender: statistics.median(values) for contender, values in times.items()}
    counts = guard.counters
    drafts = f"drafts kept {1 - counts['rejected'] / counts['queries']:4.0%}   " if guard.method != "autosteer" else ""
    print(
        f"{name:20} {at_once:3} at once   undefended {medians['undefended']:6.1f} ms a query   "
        f"defended {medians['defended']:6.1f}   {drafts}"
        f"prompt tokens from the prefix cache {counts['cached_tokens'] / counts['prompt_tokens']:4.0%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", help="a LLaVA of random_models.py (default: the shipped model)")
    parser.add_argument("--method", choices=("moras", "autosteer"), default="moras")
    parser.add_argument("--n", type=int, default=24, help="queries of a kind (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--no-prefix-caching", action="store_true")
    arguments = parser.parse_args()
    from vllm import LLM

    from ras_fast.vllm import SafeLLM, engine_args

    with tempfile.TemporaryDirectory() as room:
        shape, method, folder, n = arguments.shape, arguments.method, Path(room), arguments.n
        for subject in tiny(method, folder, n) if shape == "tiny" else of_random_weights(shape, method, folder, n):
            llm = LLM(
                str(subject.checkpoint),
                dtype=subject.dtype,
                enforce_eager=True,
                max_model_len=512 if shape == "tiny" else 1024,
                block_size=32,
                enable_prefix_caching=not arguments.no_prefix_caching,
                **engine_args(subject.profile),
            )
            guard = SafeLLM(llm)
            sampling = {"temperature": arguments.temperature, "max_tokens": subject.tokens}
            for at_once in sorted({1, min(8, n), n}):
                for name, items in subject.queries.items():
                    case(llm, guard, name, items, sampling, at_once, arguments.rounds)
            del guard, llm
            gc.collect()  # an engine's memory, before the next one


if __name__ == "__main__":
    main()
