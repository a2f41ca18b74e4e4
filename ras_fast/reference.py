"""``model.generate`` with its states on view: what the engine is held to, and what calibration reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, StoppingCriteria

from ras_fast.decoding import Decoding, EndWhenNotFinite, eos_ids, holds_stop
from ras_fast.inputs import Query, encode
from ras_fast.model_checks import check_length
from ras_fast.model_lock import in_this_thread, lock_of
from ras_fast.patching.structure import find_head, transformers_model


@torch.no_grad()
def reference_generate(model, processor, inputs, decoding: Decoding, *, query: int = 0, edit=None, streamer=None):
    """``model.generate`` for one query, with the hidden states after the last norm on view. One call at a time on a model, in
    turn with the engine's.

    inputs: from `ras_fast.inputs.encode`.
    edit: None, or ``edit(step, hidden [1, d]) -> hidden``, which replaces the state from which that step's token is read.

    Returns the produced token ids (an end-of-sequence token included), the states before ``edit`` [n, d], and the
    logits that the tokens were read from [n, V]. Where the last of these are not finite, the last token is that of the end of
    sequence; in a model that has none there are n − 1 tokens.
    """
    states = []

    def watch(module, args):
        states.append(args[0][:, -1])
        if edit is None:
            return None
        edited = args[0].clone()
        edited[:, -1] = edit(len(states) - 1, states[-1])
        return (edited, *args[1:])

    length = inputs["input_ids"].shape[1]
    check_length(model, inputs["input_ids"][0].tolist())
    chain = decoding.apart_from(model).processors(query, length, eos_ids(model))
    with lock_of(model), find_head(model).register_forward_pre_hook(in_this_thread(watch)), _own_config_set_aside(model):
        output = model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=chain,
            stopping_criteria=[StopStrings(decoding.stop_strings, processor.tokenizer, length), StopWhenBroken(chain[0])],
            return_dict_in_generate=True,
            output_logits=True,
            streamer=streamer,
        )
    tokens = output.sequences[0, length:].tolist()
    if chain[0].broken:
        tokens[-1:] = chain[0].eos[:1]
    return tokens, torch.cat(states), torch.cat(output.logits)


def generate_text(model, processor, query: Query, decoding: Decoding, edit=None, streamer=None) -> str:
    """The answer of one ``model.generate``, as text; ``edit`` and ``streamer`` as in `reference_generate`."""
    inputs, _ = encode(processor, query, model.device, model.dtype)
    tokens, _, _ = reference_generate(model, processor, inputs, decoding, edit=edit, streamer=streamer)
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


@contextmanager
def _own_config_set_aside(model) -> Iterator[None]:
    """generate() fills in what is not given from the model's own config, say a ban of repetitions; the engine does not."""
    model = transformers_model(model)
    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:  # with the assignment, after which Ctrl-C may come at once
        model.generation_config = GenerationConfig(**tokens)
        yield
    finally:
        model.generation_config = own


class StopStrings(StoppingCriteria):
    """Ends an answer once its text holds one of the strings. For one sequence at a time."""

    def __init__(self, stops, tokenizer, prompt_length: int):
        self.stops, self.tokenizer, self.prompt_length = stops, tokenizer, prompt_length

    def __call__(self, input_ids, scores, **kwargs):
        stopped = holds_stop(self.stops, self.tokenizer, input_ids[0, self.prompt_length :].tolist())
        return torch.tensor([stopped], device=input_ids.device)


class StopWhenBroken(StoppingCriteria):
    """Ends an answer whose logits are not finite, also where no end-of-sequence token does: the model has none, or a processor
    forbids it. For one sequence at a time."""

    def __init__(self, end: EndWhenNotFinite):
        self.end = end

    def __call__(self, input_ids, scores, **kwargs):
        if self.end.broken is None:  # as Janus's
            raise ValueError(
                "this model's `generate` leaves out the `logits_processor` that it is given, which sees to it that an answer "
                "ends where its logits are not finite, and decodes as asked: use ras_fast.SafeGenerator, which does without"
            )
        return self.end.broken
