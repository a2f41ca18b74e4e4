"""The defences that the safety table compares, each a function from one query to its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from ras_fast.decoding import Decoding
from ras_fast.engine import SafeGenerator
from ras_fast.evaluation import robustness
from ras_fast.inputs import make_queries
from ras_fast.methods import moras
from ras_fast.output_head import output_head
from ras_fast.patching.structure import text_dtype
from ras_fast.profile import RasProfile
from ras_fast.reference import generate_text
from ras_fast.sequential import SequentialPipeline

PROMPT_ONLY, CONSTANT, BINARY, SEQUENTIAL, CAPTION = "prompt-only", "constant-", "-binary", "-sequential", "-caption-"
COMBINED = "moras+attention"


class Answer(NamedTuple):
    """What a defence says, and what it took.

    risk: of its gate; score: what the gate is read from (MoRAS: S), higher for more harm. None where it computes none.
    passes, tokens: forward passes of the model, and the token positions that they computed.
    """

    text: str
    risk: float | None = None
    score: float | None = None
    passes: int = 0
    tokens: int = 0


Defence = Callable[[str, list], Answer]  # (question, images)


def name_of(profile: RasProfile) -> str:
    """What the table calls a profile: its method, or the two that its gate reads."""
    return COMBINED if profile.config.get("risk") == COMBINED else profile.method


def default_names(profiles: dict[str, RasProfile]) -> list[str]:
    """What the table compares with these profiles, row by row: always-on baselines, each profile, and variants of the first
    one with stages."""
    names = ["undefended"]
    for name, profile in profiles.items():
        if profile is _staged(profiles):
            constants = [f"{CONSTANT}{gate}" for gate in (0.25, 0.5, 0.75)]
            names += [PROMPT_ONLY, *constants, name, f"{name}{SEQUENTIAL}", f"{name}{BINARY}"]
        else:
            names.append(name)
    return names


def robustness_names(profiles: dict[str, RasProfile]) -> list[str]:
    """The defences compared on perturbed inputs: the undefended model, each profile, and the first profile with stages under
    each of the wrong captions."""
    first = next((name for name, profile in profiles.items() if profile is _staged(profiles)), None)
    captions = [f"{first}{CAPTION}{wrong}" for wrong in robustness.CAPTIONS] if first else []
    return ["undefended", *profiles, *captions]


def _staged(profiles: dict[str, RasProfile]) -> RasProfile | None:
    """The first profile of a method with stages and prototypes (MoRAS, RAS)."""
    return next((profile for profile in profiles.values() if profile.method in moras.PRESETS), None)


def borrowed_profiles(names: list[str], profiles: dict[str, RasProfile]) -> dict[str, RasProfile]:
    """Of these defences, those that take something from a profile that they are not named after: defence -> profile."""
    staged = _staged(profiles)
    return {name: staged for name in names if staged and (name == PROMPT_ONLY or name.startswith(CONSTANT))}


def check_names(names: list[str], methods: Mapping[str, str]) -> None:
    """Raises ValueError for a name that `make_defences` will not know with profiles that are called so, of these methods."""
    suffixes = (SEQUENTIAL, BINARY, *(f"{CAPTION}{wrong}" for wrong in robustness.CAPTIONS))
    staged = [name for name, method in methods.items() if method in moras.PRESETS]
    variants = [f"{name}{suffix}" for name in staged for suffix in suffixes]
    known = ["undefended", *methods, *variants, *([PROMPT_ONLY, f"{CONSTANT}0.5"] if staged else [])]
    for name in names:
        if staged and name.startswith(CONSTANT):
            _gate_of(name)
        elif name not in known:
            raise ValueError(f"defence {name!r} is unknown; with these profiles there are {', '.join(sorted(known))}")


def _gate_of(name: str) -> float:
    """The risk that an always-on defence steers by."""
    try:
        gate = float(name.removeprefix(CONSTANT))
    except ValueError:
        gate = -1.0
    if not 0 <= gate <= 1:
        raise ValueError(f"defence {name!r} needs a number in [0, 1] after {CONSTANT!r}")
    return gate


def make_defences(
    names: list[str], model, processor, profiles: dict[str, RasProfile], max_new_tokens: int
) -> dict[str, Defence]:
    """name -> defence.

    "undefended": the model alone. "prompt-only": the safety prompt of the first MoRAS profile before the question.
    "constant-R": the first N states moved to that profile's prototypes by R whatever the query, without stages 1 and 2. A
    profile's name: that profile through `SafeGenerator`; for MoRAS and RAS also with "-sequential": through three calls of
    `model.generate`, which give the same answers; "-binary": its gate is [S > S_base]; "-caption-X": sequential, stage 1
    replaced by a caption of `ras_fast.evaluation.robustness.CAPTIONS`.

    Raises ValueError for a name that is none of these, and for a profile of another model.
    """
    maker = _Maker(model, processor, profiles, Decoding(max_new_tokens=max_new_tokens))
    return {name: maker.make(name) for name in names}


def _counted(model, defence: Defence) -> Defence:
    """The defence with the forward passes of `model.generate` counted."""
    passes: list[int] = []

    def count(module, args, output) -> None:
        passes.append(output.last_hidden_state[..., 0].numel())

    def answer(question: str, images: list) -> Answer:
        passes.clear()
        with model.base_model.register_forward_hook(count):
            given = defence(question, images)
        return given._replace(passes=len(passes), tokens=sum(passes))

    return answer


class _Maker:
    """Makes a defence from its name; see `make_defences`."""

    def __init__(self, model, processor, profiles: dict[str, RasProfile], decoding: Decoding):
        self.model, self.processor, self.profiles, self.decoding = model, processor, profiles, decoding
        self.staged = _staged(profiles)

    def make(self, name: str) -> Defence:
        if name == "undefended":
            return self._single_call()
        if name in self.profiles:
            return self._by_engine(self.profiles[name])
        if self.staged and name == PROMPT_ONLY:
            return self._single_call(prefix=self._checked(self.staged).config["safety_prompt"])
        if self.staged and name.startswith(CONSTANT):
            return self._single_call(edit=self._constant(name))
        for suffix, variant in self._variants().items():
            profile = self.profiles.get(name.removesuffix(suffix))
            if profile is not None and profile.method in moras.PRESETS:
                return variant(profile)
        raise ValueError(f"defence {name!r} is unknown; with these profiles there are {default_names(self.profiles)}")

    def _variants(self) -> dict[str, Callable[[RasProfile], Defence]]:
        """Suffix of a MoRAS profile's name -> what it makes of the profile."""

        def binary(profile: RasProfile) -> Defence:
            return self._by_engine(replace(profile, config=profile.config | {"gate": "binary"}))

        def told(caption) -> Callable[[RasProfile], Defence]:
            return partial(self._in_calls, partial(robustness.WrongCaption, caption=caption))

        captions = {f"{CAPTION}{wrong}": told(caption) for wrong, caption in robustness.CAPTIONS.items()}
        return {SEQUENTIAL: partial(self._in_calls, SequentialPipeline), BINARY: binary} | captions

    def _checked(self, profile: RasProfile) -> RasProfile:
        """What the guards do with their profiles by themselves."""
        profile.check(self.model, self.processor)
        return profile

    def _constant(self, name: str):
        gate = _gate_of(name)
        profile = replace(self._checked(self.staged), config=self.staged.config | {"gate": gate})
        steering = moras.Moras(profile, output_head(self.model), self.model.device, text_dtype(self.model))
        risk = torch.full((1,), gate, device=self.model.device)
        return lambda step, hidden: steering.steer(hidden, risk, step)

    def _single_call(self, prefix: str = "", edit=None) -> Defence:
        """One `model.generate`."""

        def answer(question: str, images: list) -> Answer:
            (query,) = make_queries([question], [images], self.processor)
            query = query.prefix_last_question(prefix) if prefix else query
            return Answer(generate_text(self.model, self.processor, query, self.decoding, edit))

        return _counted(self.model, answer)

    def _in_calls(self, make_pipeline, profile: RasProfile) -> Defence:
        """A `SequentialPipeline`."""
        return _counted(self.model, self._guarded(make_pipeline(self.model, self.processor, profile), profile))

    def _by_engine(self, profile: RasProfile) -> Defence:
        """A `SafeGenerator`. It counts its own passes: where a captured graph stands for one, no hook in the model runs."""
        guard = SafeGenerator(self.model, self.processor, profile)
        runner, defence = guard.plan.runner, self._guarded(guard, profile)

        def answer(question: str, images: list) -> Answer:
            passes, tokens = runner.passes, runner.tokens
            given = defence(question, images)
            return given._replace(passes=runner.passes - passes, tokens=runner.tokens - tokens)

        return answer

    def _guarded(self, guard, profile: RasProfile) -> Defence:
        """`guard`: a `SafeGenerator`, or what has its `generate`."""

        def answer(question: str, images: list) -> Answer:
            (out,) = guard.generate([question], [images], max_new_tokens=self.decoding.max_new_tokens)
            return Answer(out.text, out.risk, out.similarity if name_of(profile) in moras.PRESETS else out.risk)

        return answer
