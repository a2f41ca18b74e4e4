"""The prompts that MoRAS's stages make of a query: their token ids, and what they have in common, which is computed once."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ras_fast.batching import SIGHT, is_per_token
from ras_fast.engine.answer import Sequence
from ras_fast.engine.image_tokens import ImageTokens
from ras_fast.engine.runner import Runner
from ras_fast.inputs import Query, common_length, encode, image_placeholder, short_ids, texts_of
from ras_fast.methods.moras import Moras, marks_of, risk_query


@dataclass
class Job:
    """One query on its way through the stages."""

    query: Query
    inputs: dict[str, Tensor]
    draft: Sequence
    image_key: str = ""  # `image_key` of its inputs, where something is kept by it
    prefix: list[int] = field(default_factory=list)  # of its prompt, what is computed ahead
    context: str | None = None
    context_key: bytes = b""
    similarity: float = float("nan")
    risk: float = 1.0
    rejected_at: int | None = None
    failed_closed: str | None = None
    region_mass: Tensor | None = None
    features: Tensor | None = None  # [3n] fp32, of a gate that also looks at attention
    image_tokens: ImageTokens | None = None  # None unless it has just one image, and no text like a special token

    @property
    def whole(self) -> bool:
        """Whether its prompts are computed in one piece, and share nothing."""
        return len(self.prefix) == len(self.draft.prompt)

    def key(self, kind: str, ids: list[int]) -> bytes:
        """Of what is kept about its images and these tokens. A hash: the tokens can take more room than what is kept."""
        return hashlib.sha256(f"{kind} {self.image_key} {ids}".encode()).digest()

    def begins_as(self, other: Job) -> bool:
        """Whether both begin with the same images and words."""
        if not self.query.images or self.prefix != other.prefix:
            return False
        own, others = image_tensors(self.inputs), image_tensors(other.inputs)
        return own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)


class Prompts:
    """What the prompts of a query's stages are in token ids.

    marks: what a text spells out where it writes special tokens.
    """

    def __init__(self, runner: Runner, processor, moras: Moras):
        self._runner, self._processor, self._moras = runner, processor, moras
        self.marks = marks_of(processor)
        self._placeholder = processor.tokenizer.convert_tokens_to_ids(image_placeholder(processor))
        # Some that images are made of (Molmo 2's ends of rows) the processor alone knows.
        of_images = {*getattr(processor, "image_token_ids", ())} - {processor.tokenizer.unk_token_id}
        self._special = runner.special_tokens | of_images
        # By stage and by what is next to the image, whether it becomes the same tokens there as in the draft's prompt; not
        # there: not compared yet.
        self._same_tokens: dict[tuple, bool] = {}

    def image_tokens(self, job: Job) -> ImageTokens | None:
        """What the image of a job's own prompt is there; None unless it has just one, and no text like a special token."""
        # Processors may join what a question spells out with what they put around an image, as Idefics2's does.
        if not job.query.images or _spells_out(job.query, self.marks):
            return None
        return ImageTokens.between(short_ids(self._processor, job.query), job.draft.prompt, self._placeholder)

    def shared(self, job: Job) -> int:
        """How many tokens of a job's own prompt those of its stages may begin with."""
        ids = job.draft.prompt
        if not job.query.images:
            return common_length(ids, self.ids(job, risk_query(job.query, "", self._moras.config, self.marks), "risk"))
        # A gate that looks at attention reads all rows after the images.
        length = self._images_closed(ids) if self._moras.attention is None else self.images_end(ids)
        return max(length, _sight_settled(job.inputs))

    def ids(self, job: Job, query: Query, stage: str) -> list[int]:
        """The token ids of a stage's prompt about the job's images. With one image, whose tokens were found to be the same
        there, the image is not processed again."""
        image, put = job.image_tokens, None
        if image is not None:
            put = image.put_into(short_ids(self._processor, query), self._placeholder)
        if put is None:
            return self._full_ids(query)
        ids, beside = put
        # Another token next to the image may be joined with what the processor puts there: each is tried once.
        case = stage, *("same" if own == there else there for own, there in zip(image.beside, beside, strict=True))
        if self._same_tokens.get(case):
            return ids
        full = self._full_ids(query)
        self._same_tokens.setdefault(case, ids == full)
        return full

    def _full_ids(self, query: Query) -> list[int]:
        inputs, _ = encode(self._processor, query, self._runner.device, self._runner.model.dtype)
        return inputs["input_ids"][0].tolist()

    def feed(self, job: Job, prompt: list[int]) -> tuple[bool, int]:
        """(whether a stage's prompt begins with the job's prefix and may reuse it, how many tokens it adds to the pool)."""
        length = len(job.prefix)
        shares = length and not job.whole and prompt[:length] == job.prefix and self._runner.image_token not in prompt[length:]
        # What its tokens see of images they cross-attend to follows from where these are, which is in the prefix.
        # A special token after the images is proved harmless in the query's own prompt alone.
        shares = shares and not self.has_special_token(prompt)
        return (True, len(prompt) - length) if shares else (False, len(prompt))

    def images_end(self, ids: list[int]) -> int:
        """The place after the last image token; 0 without images."""
        return max((i + 1 for i, token in enumerate(ids) if token == self._runner.image_token), default=0)

    def _images_closed(self, ids: list[int]) -> int:
        """The place after the last image and the special tokens that close it, if there are any."""
        end = self.images_end(ids)
        while end < len(ids) and ids[end] in self._special:
            end += 1
        return end

    def has_special_token(self, ids: list[int]) -> bool:
        """Whether a special token comes after what closes the last image."""
        return not self._special.isdisjoint(ids[self._images_closed(ids) :])


def tells_kinds_behind(inputs: dict[str, Tensor], length: int) -> bool:
    """Whether the processor calls a token behind the first ones of another kind than the prompt's last, which a step would not
    tell the model: ERNIE-4.5-VL's, of a vision token that a text spells out."""
    kinds = [tensor[0] for name, tensor in inputs.items() if name.endswith("token_type_ids")]
    return any(bool((own[length:] != own[-1]).any()) for own in kinds)


def image_key(inputs: dict[str, Tensor]) -> str:
    """A hash of the images."""
    digest = hashlib.sha256()
    for name, value in sorted(image_tensors(inputs).items()):
        value = value.float() if value.is_floating_point() else value
        digest.update(f"{name}{tuple(value.shape)}".encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def image_tensors(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pixels, and the sizes and grids without which pixels are ambiguous."""
    return {name: value for name, value in inputs.items() if not is_per_token(name, inputs)}


def _sight_settled(inputs: dict[str, Tensor]) -> int:
    """The place from which on all tokens of a prompt see the same of its images, where these are cross-attended to."""
    if SIGHT not in inputs:
        return 0
    differs = (inputs[SIGHT] != inputs[SIGHT][:, -1:]).flatten(2).any(-1)[0].tolist()
    return max((place + 1 for place, other in enumerate(differs) if other), default=0)


def _spells_out(query: Query, marks: re.Pattern) -> bool:
    """Whether a text of the chat, or several put together, holds one of these."""
    texts = [text for message in query.messages for text in texts_of(message)]
    return any(map(marks.search, [*texts, "".join(texts)]))
