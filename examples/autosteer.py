"""Calibrates AutoSteer for a model and answers a question with the model's own `generate`, defended and not.

    python examples/autosteer.py                        # the shipped synthetic model: some minutes
    python examples/autosteer.py --model NAME --pairs pairs.jsonl --image photo.jpg --prompt "What is this for?"

A line of pairs.jsonl is {"image": "a.png", "unsafe": "…", "safe": "…"}, with "safe_image": "b.png" where the safe question is
about another picture; paths are relative to the file. Where the harm sits in the image, most pairs should ask the same question
about a harmful and a harmless picture (docs/methods.md). A calibration that was stopped goes on where it was.

What the profile does to your own questions (docs/evaluation.md has the format):

    ras-fast eval --model NAME --profile autosteer-profile --dataset questions.jsonl --out results
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ras_fast
from ras_fast.evaluation import tinyworld
from ras_fast.inputs import encode, make_queries, read_pairs
from ras_fast.loading import load
from ras_fast.methods import autosteer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="'tiny', a local folder or a hub id")
    parser.add_argument("--pairs", type=Path, help="needed for any other model than 'tiny'")
    parser.add_argument("--image")
    parser.add_argument("--prompt", default=tinyworld.HOW_TO[0])
    parser.add_argument("--out", type=Path, default=Path("autosteer-profile"))
    options = parser.parse_args()

    try:
        model, processor = load(options.model)
    except ValueError as error:
        raise SystemExit(f"--model: {error}") from error
    if options.pairs:
        pairs, refusal, layer = read_pairs(options.pairs), autosteer.REFUSAL, "sas"
    else:
        pairs, refusal, layer = tinyworld.contrast_pairs(1000), tinyworld.REFUSAL, "validation"
    profile = autosteer.calibrate(
        model, processor, pairs=pairs, refusal=refusal, layer=layer, over_refusal=0.1, checkpoint=options.out / "unfinished"
    )
    profile.save_pretrained(options.out)
    probed = profile.config["prober"]
    print(f"layer {profile.config['layer']}, threshold {profile.config['threshold']:.2f}: of the held-out pairs it refuses "
          f"{probed['refused_toxic']:.0%} of the unsafe and {probed['refused_safe']:.0%} of the safe questions")  # fmt: skip

    image = options.image or tinyworld.demo_items()[2].image  # the word "bomb"
    (query,) = make_queries([options.prompt], [image], processor)
    inputs, _ = encode(processor, query, model.device, model.dtype)

    def answer() -> str:
        tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    with torch.no_grad(), ras_fast.patch(model) as patch:
        print("undefended:", answer())
        with ras_fast.methods.attach(patch, profile) as method:
            print("defended:  ", answer())
            print("risk:      ", round(method.risk.item(), 3))


if __name__ == "__main__":
    main()
