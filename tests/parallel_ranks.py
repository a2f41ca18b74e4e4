"""Run by test_parallel.py, alone and under torchrun: calibrates and evaluates, and writes what came out to argv[1]."""

import json
import sys
from pathlib import Path

import pytest

from ras_fast import parallel
from ras_fast.evaluation import run, tinyworld
from ras_fast.evaluation.datasets import load_dataset
from ras_fast.evaluation.defences import Answer
from ras_fast.loading import load
from ras_fast.methods import attention, autosteer, moras

parallel.join()
rank, processes = parallel.rank(), parallel.world_size()
folder = Path(sys.argv[1])
model, processor = load("tiny", device="cpu", dtype="float32")
data = {"refused_texts": tinyworld.refused_texts(11), "pairs": tinyworld.calibration_pairs(5), "progress": False}
profile = moras.calibrate(
    model, processor, **data, context_prompt=tinyworld.CONTEXT_PROMPT, safety_prompt=tinyworld.SAFETY_PROMPT
)
attentive = attention.calibrate(model, processor, **data | {"pairs": tinyworld.calibration_pairs(16)})
prober = autosteer.calibrate(
    model,
    processor,
    pairs=tinyworld.contrast_pairs(12),
    refusal=tinyworld.REFUSAL,
    batch_size=1,
    checkpoint=folder / "autosteer-checkpoint",
    progress=False,
)

asked = []


def defence(question, images):
    asked.append(question)
    return Answer(f"about {question}", risk=0.5, score=0.5, passes=1, tokens=1)


dataset = load_dataset("tinyworld", 21, 0)
answers = run.AnswerFile(folder, {"model": {}, "profiles": {}})
records = run.run(dataset, {"fake": defence}, answers, progress=False)
assert [record["id"] for record in records] == [item.id for item in dataset.items]
assert len(asked) == 1 + len(dataset.items[rank::processes]), (len(asked), len(dataset.items), rank)  # and the warm-up


answers = run.AnswerFile(folder, {"model": {}, "profiles": {}})
assert run.run(dataset, {"fake": defence}, answers, progress=False) == records  # all found again
assert len(asked) == 1 + len(dataset.items[rank::processes])


def fails(item):
    if item == 1:
        raise ValueError("item 1")


with pytest.raises(ValueError, match="item 1"):  # on every rank
    parallel.each(fails, range(4), "failing", progress=False)

if rank == 0:
    profile.save_pretrained(folder / "moras")
    attentive.save_pretrained(folder / "attention")
    prober.save_pretrained(folder / "autosteer")
    timeless = [{key: value for key, value in record.items() if key != "ms"} for record in records]
    (folder / "records.json").write_text(json.dumps({"processes": processes, "records": timeless}))
