"""The defences that the safety table compares, each a function from one query to its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from ras_fast.decoding import Decoding, output_head, reference_generate
from ras_fast.engine import SafeGenerator
from ras_fast.evaluation import tinyworld
from ras_fast.inputs import Query, encode, make_queries
from ras_fast.methods import moras
from ras_fast.profile import RasProfile
from ras_fast.sequential import SequentialPipeline

CONSTANT, BINARY, SEQUENTIAL = "constant-", "-binary", "-sequential"
CALIBRATION_ITEMS = 50  # refused texts, and as many image-question pairs


class Answer(NamedTuple):
    """What a defence says; risk and similarity are None where it computes none."""

    text: str
    risk: float | None = None
    similarity: float | None = None


Defence = Callable[[str, list], Answer]  # (question, images)


def calibrate_on_tinyworld(model, processor, preset: str = "moras", progress: bool = True) -> RasProfile:
    """A profile from the calibration split of the synthetic world, with prompts in the tiny model's few words.

    "ras" differs from "moras" in its context prompt alone, which does not ask for the text in the image to be read out.
    """
    context_prompt = {"moras": tinyworld.CONTEXT_PROMPT, "ras": "Describe the image in one sentence."}[preset]
    return moras.calibrate(
        model,
        processor,
        refused_texts=tinyworld.refused_texts(CALIBRATION_ITEMS),
        pairs=tinyworld.calibration_pairs(CALIBRATION_ITEMS),
        preset=preset,
        progress=progress,
        context_prompt=context_prompt,
        safety_prompt=tinyworld.SAFETY_PROMPT,
    )


def default_names(profiles: dict[str, RasProfile]) -> list[str]:
    """What the table compares with these profiles, row by row: the first one in its variants, then the others."""
    if not profiles:
        return ["undefended"]
    first, *others = profiles
    return ["undefended", "prompt-only", f"{CONSTANT}0.5", first, f"{first}{SEQUENTIAL}", f"{first}{BINARY}", *others]


def make_defences(
    names: list[str], model, processor, profiles: dict[str, RasProfile], max_new_tokens: int
) -> dict[str, Defence]:
    """name -> defence.

    "undefended": the model alone. "prompt-only": the first profile's safety prompt before the question. "constant-R": the
    first N states moved to the first profile's prototypes by R whatever the query, without stages 1 and 2. A profile's
    name: that profile through `SafeGenerator`; with "-sequential": through three calls of `model.generate`, which give the
    same answers; with "-binary": its gate is [S > S_base].

    Raises ValueError for a name that is none of these.
    """
    maker = _Maker(model, processor, profiles, Decoding(max_new_tokens=max_new_tokens))
    return {name: maker.make(name) for name in names}


class _Maker:
    def __init__(self, model, processor, profiles: dict[str, RasProfile], decoding: Decoding):
        self.model, self.processor, self.profiles, self.decoding = model, processor, profiles, decoding

    def make(self, name: str) -> Defence:
        if name == "undefended":
            return self._single_call()
        if name in self.profiles:
            return self._three_stages(SafeGenerator(self.model, self.processor, self.profiles[name], batch_size=1))
        if name.removesuffix(SEQUENTIAL) in self.profiles:
            profile = self.profiles[name.removesuffix(SEQUENTIAL)]
            return self._three_stages(SequentialPipeline(self.model, self.processor, profile))
        if name.removesuffix(BINARY) in self.profiles:
            profile = self.profiles[name.removesuffix(BINARY)]
            binary = replace(profile, config=profile.config | {"gate": "binary"})
            return self._three_stages(SafeGenerator(self.model, self.processor, binary, batch_size=1))
        if self.profiles and name == "prompt-only":
            return self._single_call(prefix=self._first().config["safety_prompt"])
        if self.profiles and name.startswith(CONSTANT):
            return self._single_call(edit=self._constant(name))
        raise ValueError(f"defence {name!r} is unknown; with these profiles there are {default_names(self.profiles)}")

    def _first(self) -> RasProfile:
        return next(iter(self.profiles.values()))

    def _constant(self, name: str):
        try:
            gate = float(name.removeprefix(CONSTANT))
        except ValueError as error:
            raise ValueError(f"defence {name!r} needs a number in [0, 1] after {CONSTANT!r}") from error
        profile = replace(self._first(), config=self._first().config | {"gate": gate})
        steering = moras.Moras(profile, output_head(self.model), self.model.device, self.model.dtype)
        risk = torch.full((1,), gate, device=self.model.device)
        return lambda step, hidden: steering.steer(hidden, risk, step)

    def _single_call(self, prefix: str = "", edit=None) -> Defence:
        """One `model.generate`."""

        def answer(question: str, images: list) -> Answer:
            (query,) = make_queries([question], [images], self.processor)
            query = query.prefix_last_question(prefix) if prefix else query
            return Answer(generate(self.model, self.processor, query, self.decoding, edit))

        return answer

    def _three_stages(self, guard: SafeGenerator | SequentialPipeline) -> Defence:
        def answer(question: str, images: list) -> Answer:
            (out,) = guard.generate([question], [images], max_new_tokens=self.decoding.max_new_tokens)
            return Answer(out.text, out.risk, out.similarity)

        return answer


def generate(model, processor, query: Query, decoding: Decoding, edit=None) -> str:
    """The text of one `model.generate`; `edit` as in `reference_generate`."""
    inputs, _ = encode(processor, query, model.device, model.dtype)
    tokens, _, _ = reference_generate(model, processor, inputs, decoding, edit=edit)
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)
