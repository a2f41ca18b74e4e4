"""What a defended answer costs: the engine beside the undefended model and beside MoRAS as three calls.

    python bench/bench_engine.py                                  # CPU, about 0.3 B random weights
    python bench/bench_engine.py --quick                          # one answer; where there is a GPU, on that
    python bench/bench_engine.py --shape qwen3-vl-2b --dtype bfloat16     # another of random_models.py's shapes
    python bench/bench_engine.py --gpu --tokens 128               # LLaVA-1.5-7B's shape on a GPU, batches of 1, 8 and 32

All contenders run in one process and produce equally many tokens. On the CPU they are interleaved, after a first answer of
each, in which the engine compares a prompt with the model's own forward; a case is KIND:TOKENS or KIND:TOKENS:ROUNDS. On a GPU
those of the patched model come after the others, as captured graphs end with the patch; the call that captures them is shown
apart. Undefended is `model.generate`, by the engine's loop or with graphs the engine without a defence.
Weights and the refusal prototypes are random, so *what* is said means nothing; the risk is computed and then replaced by 0
for benign queries (the draft stands) and by 1 for refused ones (the draft falls at its first token). Writes engine.json, and
on the CPU engine_timeline.png, into bench/results/<device>/ after each case; of another shape than 0.3b and 7b, into a folder
of its name there. --quick writes engine_quick.json.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import harness
import torch
from PIL import Image
from random_models import IMAGE_SIZE, SHAPES, build
from transformers.generation.streamers import BaseStreamer

import ras_fast
from ras_fast.decoding import Decoding
from ras_fast.engine import SafeGenerator
from ras_fast.engine.one_pass import OnePass
from ras_fast.engine.plan import Plan
from ras_fast.engine.runner import Runner
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import make_queries
from ras_fast.methods.moras import PRESETS
from ras_fast.profile import RasProfile
from ras_fast.sequential import SequentialPipeline

QUESTION = "What would be a good name for the thing in the picture and why ?"
RISKS = {"benign": 0.0, "refused": 1.0}
# Kind, answer tokens, rounds (None: as --rounds says), answers at once.
DEFAULT_CASES = [*((kind, tokens, None, 1) for kind in RISKS for tokens in (16, 64, 256)), ("benign", 64, 1, 8)]
WARM_UP_TOKENS = 4
STAGES = ["prompt", "prefix", "context", "context and draft", "risk", "check", "answer"]
COLOURS = dict(zip(STAGES, ["#bbbbbb", "#999999", "#4477aa", "#66ccee", "#ee6677", "#ccbb44", "#228833"], strict=True))


def make_profile(model, processor, risk: float) -> RasProfile:
    """A profile that computes the similarity as always and then takes ``risk`` for every query."""
    generator = torch.Generator().manual_seed(1)
    prototypes = torch.randn(3, model.config.text_config.hidden_size, generator=generator)
    config = PRESETS["moras"] | {"s_base": 0.5, "k": 9.0, "gate": risk}
    return RasProfile("moras", config, {"prototypes": prototypes}, fingerprint(model, processor))


def autosteer_profile(model, processor, on: bool) -> RasProfile:
    """One whose gate is on for every query, or off for every query."""
    d = model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "prober_in.weight": torch.randn(64, d, generator=generator),
        "prober_in.bias": torch.zeros(64),
        "prober_out.weight": torch.zeros(2, 64),
        "prober_out.bias": torch.tensor([0.0, 9.0 if on else -9.0]),
        "refusal": torch.randn(d, d, generator=generator) * d**-0.5,
    }
    config = {"layer": model.config.get_text_config().num_hidden_layers // 2, "strength": 1.0, "threshold": 0.5}
    return RasProfile("autosteer", config, tensors, fingerprint(model, processor))


class FirstToken(BaseStreamer):
    """Notes when the first token after the prompt comes."""

    def __init__(self):
        self.begin, self.puts, self.seconds = time.perf_counter(), 0, None

    def put(self, value):
        self.puts += 1
        if self.puts == 2:
            self.seconds = time.perf_counter() - self.begin

    def end(self):
        pass


class Undefended:
    """``model.generate``."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def __call__(self, images, tokens: int, streamer=None) -> dict[str, float]:
        begin = time.perf_counter()
        inputs = chat(self.model, self.processor, images, [QUESTION] * len(images))
        self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=streamer)
        return {"answer": time.perf_counter() - begin}


class UndefendedLoop(OnePass):
    """The engine's prefill and decode steps, on a GPU in graphs, and nothing that defends."""

    def __init__(self, model, processor):
        Plan.__init__(self, Runner(model), processor, Counter())
        self.region_mass = False

    def _attached(self):
        return nullcontext(SimpleNamespace(risk=torch.zeros(self.rows), failed=torch.zeros(self.rows)))

    @torch.no_grad()
    def __call__(self, images, tokens: int, streamer=None) -> dict[str, float]:
        self.rows = len(images)
        queries = make_queries([QUESTION] * len(images), images, self.processor)
        outputs = self.answer(list(enumerate(queries)), Decoding(tokens), streamer)
        check_counts(outputs, tokens)
        return {stage: outputs[0].timings[stage] for stage in ("prompt", "answer")}


class Hooks:
    """MoRAS as one would write it with Hugging Face alone: three calls, hidden states from ``output_hidden_states``, and a
    forward hook on the last norm."""

    def __init__(self, model, processor, profile: RasProfile):
        self.model, self.processor, self.config = model, processor, profile.config
        self.prototypes = profile.tensors["prototypes"].to(model.device, model.dtype)

    @torch.no_grad()
    def __call__(self, images, tokens: int, streamer=None) -> dict[str, float]:
        marks, config = [time.perf_counter()], self.config
        inputs = chat(self.model, self.processor, images, [config["context_prompt"]] * len(images))
        out = self.model.generate(**inputs, max_new_tokens=config["max_context_tokens"], do_sample=False)
        contexts = self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        marks.append(time.perf_counter())

        texts = [f"{config['safety_prompt']} {context} {QUESTION}" for context in contexts]
        inputs = chat(self.model, self.processor, images, texts)
        out = self.model.generate(
            **inputs,
            max_new_tokens=config["steps"],
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        states = torch.stack([step[-1][:, -1] for step in out.hidden_states], 1)
        weights = config["gamma"] ** torch.arange(config["steps"], device=states.device)[:, None]
        q = (weights * self.model.lm_head(states).float().softmax(-1)).sum(1)
        p = (weights * self.model.lm_head(self.prototypes).float().softmax(-1)).sum(0)
        similarity = torch.cosine_similarity(p, q, dim=-1)
        sigmoids = torch.sigmoid(config["k"] * (similarity - config["s_base"])).tolist()
        risks = [config["gate"] if math.isfinite(sigmoid) else 1.0 for sigmoid in sigmoids]
        risk = torch.tensor(risks, device=states.device, dtype=states.dtype)[:, None]
        marks.append(time.perf_counter())

        step = 0

        def steer(module, args, output):
            nonlocal step
            if step < config["steps"]:
                output = output.clone()
                output[:, -1] = (1 - risk) * output[:, -1] + risk * self.prototypes[step]
            step += 1
            return output

        inputs = chat(self.model, self.processor, images, [QUESTION] * len(images))
        hook = self.model.get_decoder().norm.register_forward_hook(steer)
        try:
            self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=streamer)
        finally:
            hook.remove()
        marks.append(time.perf_counter())
        return dict(zip(["context", "risk", "answer"], (after - before for before, after in pairwise(marks)), strict=True))


class Defended:
    """A `SafeGenerator` or a `SequentialPipeline`."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def __call__(self, images, tokens: int, streamer=None) -> dict[str, float]:
        outputs = self.pipeline.generate([QUESTION] * len(images), images, max_new_tokens=tokens, streamer=streamer)
        check_counts(outputs, tokens)
        return {stage: outputs[0].timings[stage] for stage in STAGES if stage in outputs[0].timings}


def check_counts(outputs, tokens: int) -> None:
    counts = {len(output.tokens) for output in outputs}
    if counts != {tokens}:
        raise RuntimeError(f"{counts} tokens were produced; equal counts need {tokens}")


def chat(model, processor, images, texts: list[str]):
    """Inputs of one user turn a row, left-padded."""
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
    rendered = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    options = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    inputs = processor(text=rendered, images=images, **options).to(model.device)
    return inputs | {"pixel_values": inputs["pixel_values"].to(model.dtype)}


def contenders(plain, patched, processor, risk: float) -> dict[str, Callable]:
    """By name, each with a model of its own kind."""
    profile = make_profile(plain, processor, risk)
    return {
        "undefended": Undefended(plain, processor),
        "undefended, patched": Undefended(patched, processor),
        "undefended, engine's loop": UndefendedLoop(patched, processor),
        "MoRAS by hooks": Hooks(plain, processor, profile),
        "MoRAS in sequence, patched": Defended(SequentialPipeline(patched, processor, profile)),
        "MoRAS, engine": Defended(SafeGenerator(patched, processor, profile)),
    }


def twin(model):
    """Another model of the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def cpu_cases(model, processor, cases, rounds: int) -> Iterator[tuple[str, dict]]:
    """(case, figures of each contender), one after the other. Done before is what is done once: with its first answer after a
    patch the engine proves that it may share prefixes."""
    with ras_fast.patch(twin(model)) as patch:
        kinds = dict.fromkeys(case[0] for case in cases)
        ready = {kind: contenders(model, patch.model, processor, RISKS[kind]) for kind in kinds}
        for runs in ready.values():
            measure(runs, pictures(1), WARM_UP_TOKENS, 1)
        for kind, tokens, own_rounds, size in cases:
            runs = {name: run for name, run in ready[kind].items() if size == 1 or "in sequence" not in name}
            found = measure(runs, pictures(size), tokens, own_rounds or rounds)
            name = case_name(kind, tokens, size)
            print(table(name, found), flush=True)
            yield name, found


def case_name(kind: str, tokens: int, size: int) -> str:
    return f"{kind}, {tokens} answer tokens" + (f", batch {size}" if size > 1 else "")


def pictures(count: int) -> list[Image.Image]:
    return [Image.effect_noise(IMAGE_SIZE, 80).convert("RGB") for _ in range(count)]


def measure(runs: dict[str, Callable], images, tokens: int, rounds: int) -> dict[str, dict]:
    """Medians over interleaved rounds; also when the first token came, which of several answers no streamer says (None)."""
    samples, firsts = ({name: [] for name in runs} for _ in range(2))
    for turn in range(rounds):
        for name, run in harness.in_turn(runs, turn):
            streamer = FirstToken() if len(images) == 1 else None
            samples[name].append(stopwatch(run, images, tokens, streamer))
            firsts[name] += [streamer.seconds] if streamer else []
    return {name: medians(samples[name]) | {"first_token": statistics.median(firsts[name] or [None])} for name in samples}


def stopwatch(run, images, tokens: int, streamer=None) -> tuple[float, dict[str, float]]:
    """(seconds, seconds of each stage) of one answer."""
    begin = time.perf_counter()
    timing = run(images, tokens, streamer)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    harness.return_freed_memory()
    return seconds, timing


def medians(samples: list[tuple[float, dict[str, float]]]) -> dict[str, object]:
    seconds, stages = zip(*samples, strict=True)
    return {
        "seconds": statistics.median(seconds),
        "all_seconds": list(seconds),
        "stages": {stage: statistics.median(timing[stage] for timing in stages) for stage in stages[0]},
    }


# On a GPU


def gpu_cases(model, processor, tokens: int, batches: list[int], rounds: int, budget: float) -> Iterator[tuple[str, dict]]:
    """As `cpu_cases`: benign queries in batches of several sizes. A size that would not fit into what is left of ``budget``
    seconds, going by the last one, is left out and named."""
    begin, took = time.perf_counter(), 0.0
    for size in batches:
        used = time.perf_counter() - begin
        if used + took > budget:
            print(f"batch {size} is left out: {used:.0f} of {budget:.0f} s are gone and it would take more than {took:.0f} s")
            continue
        name = case_name("benign", tokens, size)
        found = gpu_case(model, processor, pictures(size), tokens, rounds if size == 1 else 1)
        took = time.perf_counter() - begin - used
        print(gpu_table(name, tokens, found), flush=True)
        yield name, found


def gpu_case(model, processor, images, tokens: int, rounds: int) -> dict[str, dict]:
    """Each contender's seconds by stage, peak memory, and the seconds of the call that captured its graphs."""
    profile = make_profile(model, processor, RISKS["benign"])
    one_by_one = {"MoRAS in sequence, patched": Defended(SequentialPipeline(model, processor, profile))}
    plain = {"undefended": Undefended(model, processor), "MoRAS by hooks": Hooks(model, processor, profile)}
    rows: dict[str, dict] = {name: sampled(run, images, tokens, WARM_UP_TOKENS, rounds) for name, run in plain.items()}
    with ras_fast.patch(model):
        if len(images) == 1:
            rows |= {name: sampled(run, images, tokens, WARM_UP_TOKENS, rounds) for name, run in one_by_one.items()}
        generic = UndefendedLoop(model, processor)
        rows["undefended, graphs"] = sampled(generic, images, tokens, tokens, rounds + 2)
        generic.runner.workspaces.clear()
        guarded = {"MoRAS, engine": profile}
        if len(images) == 1:
            guarded["AutoSteer, engine, gate off"] = autosteer_profile(model, processor, on=False)
            guarded["AutoSteer, engine, gate on"] = autosteer_profile(model, processor, on=True)
        for name, profile in guarded.items():
            with SafeGenerator(model, processor, profile, batch_size=len(images)) as guard:
                rows[name] = sampled(Defended(guard), images, tokens, tokens, rounds + 2)
    return rows


def sampled(run, images, tokens: int, warm_up: int, rounds: int) -> dict[str, object]:
    """Medians after a first call of ``warm_up`` tokens."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    first, samples = stopwatch(run, images, warm_up)[0], [stopwatch(run, images, tokens) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return medians(samples) | {"first_call": first, "peak_gigabytes": peak}


def floor(model) -> dict[str, float]:
    """What a decode step cannot beat: reading the weights of the text model once."""
    read = [*model.model.language_model.layers.parameters(), *model.lm_head.parameters()]
    weights, bandwidth = sum(p.numel() * p.element_size() for p in read), harness.copy_bandwidth()
    return {"weights GB": weights / 1e9, "copy GB/s": bandwidth / 1e9, "decode step s": weights / bandwidth}


def gpu_table(case: str, tokens: int, rows: dict[str, dict]) -> str:
    base, engine = rows["undefended, graphs"]["seconds"], rows["MoRAS, engine"]["seconds"]
    lines = [f"{case:30}{'seconds':>9}{'of graphs':>11}{'engine by':>11}{'first':>8}{'GB':>7}"]
    for name, row in rows.items():
        memory = f"{row['peak_gigabytes']:.1f}" if row["peak_gigabytes"] else "-"
        lines.append(
            f"  {name:28}{row['seconds']:9.3f}{row['seconds'] / base:10.2f}x{row['seconds'] / engine:10.2f}x"
            f"{row['first_call']:8.2f}{memory:>7}  " + ", ".join(f"{k} {v * 1e3:.0f}" for k, v in row["stages"].items()) + " ms"
        )
    step = rows["undefended, graphs"]["stages"]["answer"] / max(tokens - 1, 1)
    return "\n".join([*lines, f"  a decode step, undefended with graphs: {step * 1e3:.2f} ms"])


def table(case: str, rows: dict[str, dict]) -> str:
    base, engine = rows["undefended, patched"]["seconds"], rows["MoRAS, engine"]["seconds"]
    lines = [f"{case:34}{'seconds':>9}{'first token':>13}{'of undefended, patched':>24}{'engine is faster by':>21}"]
    for name, row in rows.items():
        first = "-" if row["first_token"] is None else f"{row['first_token']:.3f}"
        lines.append(
            f"  {name:32}{row['seconds']:9.3f}{first:>13}{row['seconds'] / base:23.2f}x"
            f"{row['seconds'] / engine:20.2f}x"
        )
    return "\n".join(lines)


def plot(rows: list[dict], path: Path) -> None:
    """A bar per contender, cut into stages; a tick where the first token can be shown."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 1, figsize=(9, 1.9 * len(rows) + 0.6), squeeze=False)
    for axis, row in zip(axes[:, 0], rows, strict=True):
        for y, found in enumerate(reversed(row["contenders"].values())):
            left = 0.0
            for stage, seconds in found["stages"].items():
                axis.barh(y, seconds, left=left, color=COLOURS[stage], label=stage)
                left += seconds
            if (first := found["first_token"]) is not None:
                axis.plot([first] * 2, [y - 0.45, y + 0.45], color="black", linewidth=2, label="first token shown")
            axis.text(left, y, f" {found['seconds']:.2f} s", va="center", fontsize=8)
        axis.set_yticks(range(len(row["contenders"])), reversed(row["contenders"]))
        axis.set_title(row["case"], fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    axes[-1, 0].set_xlabel("seconds")
    seen = {label: h for axis in axes[:, 0] for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = [name for name in [*STAGES, "first token shown"] if name in seen]
    figure.legend([seen[name] for name in names], names, ncols=len(names), loc="lower center", fontsize=8, frameon=False)
    what = f"{rows[0]['shape']}: {rows[0]['parameters'] / 1e9:.2g} B random weights, {rows[0]['dtype']}"
    figure.suptitle(f"{what}, 576 image tokens, {harness.device_name()}", fontsize=10)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=150)


def case(text: str) -> tuple[str, int, int | None, int]:
    """KIND:TOKENS, KIND:TOKENS:ROUNDS or KIND:TOKENS:ROUNDS:BATCH."""
    number = "([1-9][0-9]*)"
    match = re.fullmatch(rf"({'|'.join(RISKS)}):{number}(?::{number}(?::{number})?)?", text)
    if match is None:
        kinds = " or ".join(RISKS)
        raise argparse.ArgumentTypeError(f"{text!r} is not {kinds}, then :TOKENS, :TOKENS:ROUNDS or :TOKENS:ROUNDS:BATCH")
    kind, tokens, rounds, size = match.groups()
    return kind, int(tokens), int(rounds) if rounds else None, int(size or 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one benign answer of 64 tokens; by --gpu if there is one")
    parser.add_argument("--shape", choices=SHAPES, help="0.3b by default; with --gpu 7b")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="float32 by default; with --gpu bfloat16")
    parser.add_argument("--cases", type=case, nargs="+", default=DEFAULT_CASES, metavar="CASE",
                        help="kind and answer tokens, and if you like rounds and answers at once: benign:64, refused:64:3:8")
    parser.add_argument("--rounds", type=int, default=3, help="of cases that name none")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, with captured graphs")
    parser.add_argument("--tokens", type=int, default=128, help="with --gpu: answer tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="with --gpu")
    parser.add_argument("--budget", type=float, default=80, help="with --gpu: seconds after the model is built")
    args = parser.parse_args()
    if args.quick:
        args.gpu, args.cases, args.batches = torch.cuda.is_available(), [("benign", 64, 1, 1)], [1]
    if args.gpu and not torch.cuda.is_available():
        raise SystemExit("--gpu needs a CUDA device, and torch sees none")
    device, shape, dtype = ("cuda", "7b", "bfloat16") if args.gpu else ("cpu", "0.3b", "float32")
    shape, dtype = args.shape or shape, args.dtype or dtype

    model, processor = build(shape, device, getattr(torch, dtype))
    facts = {"shape": shape, "parameters": sum(p.numel() for p in model.parameters()), "dtype": dtype}
    print(", ".join(f"{k} {v}" for k, v in (harness.machine() | facts).items()), flush=True)
    if args.gpu:
        limits = floor(model)
        print(f"floor of a decode step: {limits['decode step s'] * 1e3:.2f} ms", flush=True)
        cases = gpu_cases(model, processor, args.tokens, args.batches, 2, args.budget)
    else:
        limits, cases = None, cpu_cases(model, processor, args.cases, args.rounds)
    rows, file = [], "engine_quick" if args.quick else "engine"
    for name, found in cases:
        seconds = {f"{contender} s": figures["seconds"] for contender, figures in found.items()}
        rows.append(facts | {"case": name} | seconds | {"contenders": found})
        path = harness.save(file if shape in ("0.3b", "7b") else f"{shape}/{file}", rows, limits)
        if not (args.gpu or args.quick):
            plot(rows, path.with_name("engine_timeline.png"))
    if rows:
        print(f"written to {path}")


if __name__ == "__main__":
    main()
