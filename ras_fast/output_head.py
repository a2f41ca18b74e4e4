"""From hidden states after the last norm to logits, as a model does it."""

from __future__ import annotations

from itertools import product

import torch

from ras_fast.model_lock import in_this_thread, lock_of
from ras_fast.patching.structure import find_head


def output_head(model):
    """The function from hidden states after the last norm to logits, with what the model does to them after its last matrix: a
    factor, a soft cap, tokens that it rules out."""
    layer, text = find_head(model), model.config.get_text_config()
    named = [getattr(text, name, None) for name in ("logit_scale", "logits_scaling", "output_multiplier")]
    factors = [1.0, *(factor for value in named if value for factor in (value, 1 / value))]
    caps = [*filter(None, [getattr(text, "final_logit_softcapping", None)]), None]
    if len(factors) == len(caps) == 1 and not getattr(model.config, "vocabulary_map", None):
        return layer
    plain, logits = _small_forward(model, layer)
    # Chameleon's image tokens, which are in its vocabulary, get the lowest number there is.
    ruled_out = (logits == torch.finfo(logits.dtype).min).all(dim=1)[0]
    wanted = logits[..., ~ruled_out].double()

    def finish(logits: torch.Tensor, factor: float, cap: float | None) -> torch.Tensor:
        logits = logits if factor == 1 else logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    def error(done: tuple) -> float:
        return float((finish(plain, *done)[..., ~ruled_out].double() - wanted).norm())

    # Some families divide by what others multiply with, some have a factor or a cap in their config and leave it out.
    factor, cap = min(product(factors, caps), key=error)
    only = ruled_out if ruled_out.any() else None

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = finish(layer(hidden), factor, cap)
        return logits if only is None else logits.masked_fill(only, torch.finfo(logits.dtype).min)

    return head


@torch.no_grad()
def _small_forward(model, layer) -> tuple[torch.Tensor, torch.Tensor]:
    """What a small forward's last matrix gives, and the model's logits, both [1, 4, V]."""
    plain = []

    def note(module, args, output) -> None:
        plain.append(output.clone())  # the model may write into it

    ids = torch.arange(4, device=model.device)[None]  # one may be that of padding, and embedded as zeros
    with lock_of(model), layer.register_forward_hook(in_this_thread(note)):
        logits = model(input_ids=ids, use_cache=False).logits
    return plain[-1], logits
