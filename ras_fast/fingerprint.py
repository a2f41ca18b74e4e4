"""Which model a profile belongs to."""

from __future__ import annotations

import hashlib
import json

import torch

from ras_fast.weights import adapters_of

HEAD_ROWS = 64  # of the LM head, that go into the fingerprint
OTHER_VALUES = 64  # of each parameter outside the decoder layers, likewise


def fingerprint(model, processor=None) -> dict:
    """What ties a profile to a model: architecture, sizes, dtype, a hash of the tokenizer's vocabulary and chat template
    (without a processor left out), hashes of the first rows of the LM head, of the first row of every parameter of the decoder
    layers and of the last values of every other parameter (which tell fine-tuned siblings apart, also those by adapters), and
    which adapters act. A spot check: weights that differ elsewhere alone have the same fingerprint.

    Raises ValueError where the weights cannot be read.
    """
    from ras_fast.patching.structure import find_decoder, find_head  # which import transformers: seconds

    root, _, layers = find_decoder(model)
    head = find_head(root)
    if head is None:
        raise ValueError(f"model is a {type(root).__name__}, which has no head that makes logits")
    rows = head.weight[:HEAD_ROWS]
    found = fingerprint_of_parts(type(root).__name__, root.config.get_text_config(), root.dtype, rows, processor)
    decoder = list(layers.parameters())
    inside = set(map(id, decoder))
    others = [parameter for parameter in root.parameters() if id(parameter) not in inside]
    return found | {
        "decoder": _hash_of([_row(parameter, 0) for parameter in decoder]),
        "other_parts": _hash_of([_row(parameter, -1) for parameter in others], OTHER_VALUES),
        "adapters": _adapters(root),
    }


def _row(parameter: torch.Tensor, index: int) -> torch.Tensor:
    if parameter.dim() < 2:
        return parameter
    try:
        return parameter[(index,) * (parameter.dim() - 1)]
    except NotImplementedError:  # of a quantised one
        return _row(parameter.detach().dequantize(), index)


def fingerprint_of_parts(architecture: str, text_config, dtype: torch.dtype, head: torch.Tensor, processor=None) -> dict:
    """`fingerprint` of a model that is not a transformers object, from its parts.

    head: [HEAD_ROWS, d], the first rows of the LM head in the model's dtype.
    """
    found = {
        "architecture": architecture,
        "hidden_size": text_config.hidden_size,
        "num_hidden_layers": text_config.num_hidden_layers,
        "vocab_size": text_config.vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "lm_head": _hash_of([head]),
        "adapters": None,
    }
    if processor is not None:
        tokenizer = getattr(processor, "tokenizer", processor)
        wording = [sorted(tokenizer.get_vocab().items()), getattr(processor, "chat_template", None)]
        found["tokenizer"] = hashlib.sha256(json.dumps(wording).encode()).hexdigest()[:16]
    return found


def wording(processor) -> str:
    """The chat template and the size of the vocabulary: what changes where a processor comes to make other prompts."""
    return json.dumps([getattr(processor, "chat_template", None), len(processor.tokenizer)])


def _adapters(model: torch.nn.Module) -> str | None:
    """`adapters_of` the layers in words: "a × 2.0, b × 0.5", "off". None for a model without adapters."""

    def words(off: bool, active: tuple, scales: tuple, merged: tuple) -> str:
        acting = [name if scale is None else f"{name} × {scale}" for name, scale in zip(active, scales, strict=True)]
        return ", ".join((["off"] if off else acting) + [f"{name} merged" for name in merged]) or "off"

    states = {adapters_of(module) for module in model.modules()} - {None}
    return "; ".join(sorted({words(*state) for state in states})) or None


def _hash_of(tensors: list[torch.Tensor], last: int = 0) -> str:
    """Of their values, or of the `last` ones of each (0: all), as float32, copied from the device at once."""
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("the model's weights are not in memory (device meta), so a profile cannot be compared with it")
    if any(hasattr(tensor, "full_tensor") for tensor in tensors):  # of DTensors; a rank would see its own heads alone, too
        raise ValueError(
            "the model's weights are split among processes (tensor parallelism, FSDP), so a profile cannot be compared with it"
        )
    # A quantised tensor may be of a class that has no float().
    plain = [t.detach() if type(t) in (torch.Tensor, torch.nn.Parameter) else t.detach().dequantize() for t in tensors]
    values = torch.cat([tensor.reshape(-1)[-last:].to(plain[0].device, torch.float32) for tensor in plain])
    return hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()[:16]
