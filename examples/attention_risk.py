"""How well attention to an image tells harmful from harmless questions: alone, beside MoRAS's S, and together with it.

Gates are fitted on the train and calibration splits of the synthetic world and judged on its test split:

    python examples/attention_risk.py --items 500 --seed 2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ras_fast.decoding import output_head
from ras_fast.evaluation import tinyworld
from ras_fast.evaluation.calibration import calibrate_on_tinyworld
from ras_fast.evaluation.metrics import auroc
from ras_fast.inputs import make_queries
from ras_fast.loading import load
from ras_fast.methods import attention
from ras_fast.methods.moras import Moras, assess, describe
from ras_fast.patching import patched
from ras_fast.profile import RasProfile


@torch.no_grad()
def risks(model, processor, items, alone, combined) -> dict[str, torch.Tensor]:
    """Each score of each item [n]; a question without an image has no attention risk, and there S decides by itself."""
    plain = Moras(combined, output_head(model), model.device, model.dtype)
    single, gate = attention.AttentionRisk(alone), plain.attention
    scores: dict[str, list] = {"S": [], "attention": [], "S and attention": []}
    with patched(model) as patch:
        for item in tqdm(items, desc="items"):
            (query,) = make_queries([item.question], [item.image], processor)
            similarity = assess(model, processor, query, describe(model, processor, query, plain), plain)
            found, has_image = attention.prompt_features(patch, processor, query, single.gate.heads)
            scores["attention"].append(single.assess(found[None], has_image[None])[0])
            found, _ = attention.prompt_features(patch, processor, query, gate.heads)
            scores["S"].append(similarity)
            scores["S and attention"].append(plain.risk(similarity, found[None], has_image[None])[0])
    return {name: torch.cat(values) for name, values in scores.items()}


def gain(scores: dict[str, torch.Tensor], harmful: torch.Tensor, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of AUROC(S and attention) − AUROC(S), by resampling the items."""
    labels, s, both = harmful.numpy(), scores["S"].numpy(), scores["S and attention"].numpy()
    draws = np.random.default_rng(0).integers(0, len(labels), (resamples, len(labels)))
    gains = [auroc(both[d], labels[d]) - auroc(s[d], labels[d]) for d in draws if 0 < labels[d].sum() < len(d)]
    return tuple(np.quantile(gains, (0.025, 0.975)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=500, help="items of the test split")
    parser.add_argument("--seed", type=int, default=0, help="which of them")
    parser.add_argument("--profiles", type=Path, help="use those that `ras-fast eval` has left in OUT/profiles")
    options = parser.parse_args()

    model, processor = load("tiny", device="cpu", dtype="float32")
    profiles = {}
    for name in ("moras", "attention", "moras+attention"):
        found = options.profiles and RasProfile.from_pretrained(options.profiles / name)
        profiles[name] = found or calibrate_on_tinyworld(name, model, processor, profiles)
    alone, combined = profiles["attention"], profiles["moras+attention"]
    print("heads (layer, head), best first:", alone.config["heads"])
    print("freedom of attention, alone and beside S:", alone.config["freedom"], combined.config["freedom"])

    items = tinyworld.split("test", options.items, options.seed)
    harmful = torch.tensor([item.harmful for item in items])
    kinds = {"all": torch.ones_like(harmful), "with an image": torch.tensor([item.image is not None for item in items])}
    for kind in ("typographic", "pictured", "text_harm"):
        own = torch.tensor([item.kind == kind and item.image is not None for item in items])
        kinds[f"{kind} against harmless"] = own | ~harmful
    scores = risks(model, processor, items, alone, combined)
    print("| AUROC |" + "".join(f" {name} |" for name in scores) + "\n|---|" + "---|" * len(scores))
    for name, mask in kinds.items():
        cells = [auroc(values[mask].tolist(), harmful[mask].tolist()) for values in scores.values()]
        print(f"| {name} (n = {int(mask.sum())}) |" + "".join(f" {value:.4f} |" for value in cells))
    low, high = gain(scores, harmful)
    print(f"AUROC of S and attention minus that of S, all items, 95 % bootstrap interval: {low:+.4f} to {high:+.4f}")


if __name__ == "__main__":
    main()
