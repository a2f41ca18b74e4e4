"""`ras-fast demo`: the shipped model with and without defence on four pictures."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

from PIL import Image

from ras_fast.attention_map import image_attention
from ras_fast.decoding import Decoding
from ras_fast.engine import SafeGenerator, SafeOutput
from ras_fast.evaluation import tinyworld
from ras_fast.evaluation.calibration import calibrate_on_tinyworld
from ras_fast.inputs import make_queries
from ras_fast.loading import load
from ras_fast.reference import generate_text
from ras_fast.viz import save_heat_map

NAMES = {"benign": "benign", "lookalike": "look-alike", "typographic": "harm in letters", "pictured": "harm in a drawing"}
ABOUT = """The model is synthetic: 96-pixel pictures, some 200 words, trained to fail as the papers found real models to fail.
It refuses harm that is asked for in words and complies when the same harm is in the image. Its "steps" tell nothing.
"""
MAX_NEW_TOKENS = 32
SHOWN_SIDE = 384  # the tiny model's pictures are 96 pixels wide; enlarged for looking at


def main(out: Path, progress: bool = True) -> int:
    """Prints answers and times, and writes a heat map of each picture into the folder `out`, which is there. Returns 0."""
    start = time.perf_counter()
    print(ABOUT)
    model, processor = load("tiny")
    profile = calibrate_on_tinyworld("moras", model, processor, progress=progress)
    print(f"Calibrated: S_base {profile.config['s_base']:.3f}, k {profile.config['k']:.2f}\n")
    items = tinyworld.demo_items()
    undefended = [_undefended(model, processor, item) for item in items]
    with SafeGenerator(model, processor, profile, batch_size=1) as guard:
        guard.generate([items[0].question], [items[0].image], max_new_tokens=2)  # the first call pays for patching
        defended = [guard.generate([i.question], [i.image], max_new_tokens=MAX_NEW_TOKENS)[0] for i in items]
    print(_answers(items, [text for text, _ in undefended], defended))
    print(_times(items, [seconds for _, seconds in undefended], defended))
    for path in _heat_maps(model, processor, items, out):
        print(f"heat map  {path}")
    print(f"\nDone in {time.perf_counter() - start:.0f} s. Next: ras-fast generate --help, ras-fast eval --model tiny")
    return 0


def _undefended(model, processor, item: tinyworld.Item) -> tuple[str, float]:
    """(answer, seconds)."""
    (query,) = make_queries([item.question], [item.image], processor)
    start = time.perf_counter()
    text = generate_text(model, processor, query, Decoding(max_new_tokens=MAX_NEW_TOKENS))
    return text, time.perf_counter() - start


def _answers(items: list[tinyworld.Item], before: list[str], after: list[SafeOutput]) -> str:
    rows = [("picture", "question", "risk", "S", "undefended", "defended")]
    for item, text, out in zip(items, before, after, strict=True):
        rows.append((NAMES[item.kind], item.question, f"{out.risk:.3f}", f"{out.similarity:.3f}", text, out.text))
    return _format_table(rows, widths=(17, 22, 5, 5, 27, 27))


def _times(items: list[tinyworld.Item], before: list[float], after: list[SafeOutput]) -> str:
    stages = list(after[0].timings)
    rows = [("ms", "undefended", *(stage.replace("_", " ") for stage in stages))]
    for item, seconds, out in zip(items, before, after, strict=True):
        times = (seconds, *(out.timings[stage] for stage in stages))
        rows.append((NAMES[item.kind], *(f"{1000 * t:.0f}" for t in times)))
    return _format_table(rows, widths=(17, 10, *(max(7, *map(len, stage.replace("_", " ").split())) for stage in stages)))


def _heat_maps(model, processor, items: list[tinyworld.Item], out: Path) -> list[Path]:
    paths = []
    for number, item in enumerate(items, 1):
        looked = image_attention(model, processor, item.question, item.image)
        shown = item.image.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.NEAREST)
        paths.append(out / f"{number}-{item.kind}.png")
        share = looked.mass.mean().item()
        save_heat_map(paths[-1], shown, looked.maps[0], title=f'"{item.question}"  {share:.0%} of attention is on the image')
    return paths


def _format_table(rows: list[tuple[str, ...]], widths: tuple[int, ...]) -> str:
    """Rows of text cells, wrapped to the widths; the first row is the header."""
    rule = "  ".join("─" * width for width in widths)
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells))):
            parts = (cell[i] if i < len(cell) else "" for cell in cells)
            lines.append("  ".join(f"{part:{width}}" for part, width in zip(parts, widths, strict=True)).rstrip())
        lines += [rule] if row is rows[0] else []
    return "\n".join(lines) + "\n"
