"""Which model it is, and whether it is still the one that it was."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator

import torch

HEAD_ROWS = 64  # of the LM head, that go into the fingerprint
OTHER_VALUES = 64  # of each parameter outside the decoder layers, likewise


def fingerprint(model, processor=None) -> dict:
    """What ties a profile to a model: architecture, sizes, dtype, a hash of the tokenizer's vocabulary and chat template
    (without a processor left out), hashes of the first rows of the LM head, of the first row of every parameter of the decoder
    layers and of the last values of every other parameter (which tell fine-tuned siblings apart, also those by adapters), and
    which adapters act. A spot check: weights that differ elsewhere alone have the same fingerprint.

    Raises ValueError where the weights cannot be read.
    """
    from ras_fast.patching.structure import find_decoder, find_head

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


def adapters_of(module: torch.nn.Module) -> tuple | None:
    """How the PEFT adapters of a layer act now: (whether they are off, the active ones, their scales, those that are merged
    into its weights). None for a layer without adapters."""
    own = module.__dict__
    if "_active_adapter" not in own:
        return None
    active, scales = own["_active_adapter"], own.get("scaling", {})
    active = (active,) if isinstance(active, str) else tuple(active)
    merged = tuple(own.get("merged_adapters", ()))
    return own.get("_disable_adapters", False), active, tuple(scales.get(name) for name in active), merged


def _adapters(model: torch.nn.Module) -> str | None:
    """`adapters_of` the layers in words: "a × 2.0, b × 0.5", "off". None for a model without adapters."""

    def words(off: bool, active: tuple, scales: tuple, merged: tuple) -> str:
        acting = [name if scale is None else f"{name} × {scale}" for name, scale in zip(active, scales, strict=True)]
        return ", ".join((["off"] if off else acting) + [f"{name} merged" for name in merged]) or "off"

    states = {adapters_of(module) for module in model.modules()} - {None}
    return "; ".join(sorted({words(*state) for state in states})) or None


def weights_of(modules: list[torch.nn.Module]) -> tuple[list, tuple]:
    """(objects, which must live for their ids to mean something; a key), of the parameters and adapters of a model's
    `modules_of`. While the key stays the same, so does `fingerprint`, but for values written through `tensor.data`."""
    objects, key = tensors_of(held(modules, "_parameters"))
    return objects, (key, [adapters_of(module) for module in modules if "_active_adapter" in module.__dict__])


def held(modules: list[torch.nn.Module], kind: str) -> list[torch.Tensor]:
    """What these modules themselves hold of a kind: "_parameters" or "_buffers"."""
    return [tensor for module in modules for tensor in module.__dict__[kind].values() if tensor is not None]


def tensors_of(tensors: list[torch.Tensor]) -> tuple[list, tuple]:
    """As `weights_of`, of these tensors."""
    references = [*map(weakref.ref, tensors)]  # to keep old weights alive could take all the memory
    written = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]  # inference tensors do not count it
    return references, ([*map(id, references)], [tensor.data_ptr() for tensor in tensors], written)


def modules_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """`model.modules()` by levels, and in a fraction of its time."""
    found, seen = [model], {model}
    for module in found:
        yield module
        for child in module.__dict__["_modules"].values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)


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
