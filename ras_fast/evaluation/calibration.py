"""A profile of each method for the tiny model, from the calibration split of the synthetic world."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ras_fast.evaluation import tinyworld
from ras_fast.methods import attention, autosteer, moras, projection
from ras_fast.profile import RasProfile

ITEMS = 50  # refused texts, and as many image-question pairs
PROBER_PAIRS = 3000  # as in the paper: a prober is trained, where MoRAS averages
ATTENTION_PAIRS, COMBINED_PAIRS = 500, 300  # a regression is fitted; S takes two answers for each question
STEERING_PAIRS = 300
OVER_REFUSAL = 0.1  # what AutoSteer's threshold may cost on held-out pairs, of which most safe ones are look-alikes


def _moras(model, processor, made, progress: bool, *, preset: str, context_prompt: str) -> RasProfile:
    return moras.calibrate(
        model,
        processor,
        refused_texts=tinyworld.refused_texts(ITEMS),
        pairs=tinyworld.calibration_pairs(ITEMS),
        preset=preset,
        progress=progress,
        context_prompt=context_prompt,
        safety_prompt=tinyworld.SAFETY_PROMPT,
    )


def _autosteer(model, processor, made, progress: bool) -> RasProfile:
    # The layer by validation: in a model of four layers the safety awareness score is no guide.
    pairs = tinyworld.contrast_pairs(PROBER_PAIRS)
    options = {"layer": "validation", "over_refusal": OVER_REFUSAL, "progress": progress}
    return autosteer.calibrate(model, processor, pairs=pairs, refusal=tinyworld.REFUSAL, **options)


def _attention(model, processor, made, progress: bool) -> RasProfile:
    pairs, texts = tinyworld.contrast_pairs(ATTENTION_PAIRS), tinyworld.refused_texts(ITEMS)
    return attention.calibrate(model, processor, pairs=pairs, refused_texts=texts, progress=progress)


def _combined(model, processor, made, progress: bool) -> RasProfile:
    pairs = tinyworld.contrast_pairs(COMBINED_PAIRS)
    return attention.calibrate(model, processor, pairs=pairs, combine_with=made["moras"], progress=progress)


def _projection(model, processor, made, progress: bool) -> RasProfile:
    """Towards what the model does with harm in words, which it refuses, where the picture is as harmful ones are (as CAST)."""
    in_words, in_pictures = [], []
    for image, unsafe, safe, other in tinyworld.contrast_pairs(STEERING_PAIRS):
        if unsafe not in tinyworld.HOW_TO:
            in_words.append(((unsafe, image), (safe, other)))
        elif unsafe == safe:
            in_pictures.append(((unsafe, image), (safe, other)))
    last = model.config.get_text_config().num_hidden_layers - 1
    return projection.calibrate(
        model, processor, pairs=in_words, layers=[last], condition_pairs=in_pictures, progress=progress
    )


# name -> (model, processor, profiles made before, progress) -> profile. The prompts are in the tiny model's few words; "ras"
# does not ask for the text in the image to be read out.
CALIBRATIONS: dict[str, Callable[..., RasProfile]] = {
    "moras": partial(_moras, preset="moras", context_prompt=tinyworld.CONTEXT_PROMPT),
    "ras": partial(_moras, preset="ras", context_prompt="Describe the image in one sentence."),
    "autosteer": _autosteer,
    "projection": _projection,
    "attention": _attention,
    "moras+attention": _combined,
}


def calibrate_on_tinyworld(name: str, model, processor, made=None, progress: bool = True) -> RasProfile:
    """The profile called `name`, one of CALIBRATIONS; `made`: profiles by name, which it may build on."""
    return CALIBRATIONS[name](model, processor, made or {}, progress)
