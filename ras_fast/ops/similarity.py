"""Similarity of the first answer steps to a refusal (MoRAS, arXiv 2510.13698; docs/methods.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from ras_fast.ops import _check
from ras_fast.ops._registry import call, define


def refusal_similarity(
    logits: Tensor, prototype_probs: Tensor, *, gamma: float = 0.3, steps: Tensor | None = None
) -> Tensor:
    """Cosine of the γ-discounted sums of the predicted and the refusal prototypes' distributions.

    With q_n = softmax(logits_n), Q = Σ γⁿ q_n and P = Σ γⁿ p_n over the steps a row produced: S = P·Q / (‖P‖‖Q‖).
    float64 is taken as well, by the reference alone.

    Args:
        logits: [B, n, V], float32, float16 or bfloat16; contiguous last dimension.
        prototype_probs: [N, V] float32 with N ≥ n ≥ 1; row i is softmax(W μ_i).
        gamma: discount γ in [0, 1].
        steps: [B] int32 in 0..n, how many of the n steps each row really produced; None: all n.

    Returns:
        S: [B] float32 in [0, 1]. A row without any step, or with a logit that is NaN or +inf, has S = NaN: callers must take
        that for the highest risk. A logit of −inf is a token that cannot come.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        RuntimeError: an input requires grad and grad mode is on.
    """
    _check.no_grad("refusal_similarity", logits, prototype_probs)
    return call("refusal_similarity", _validate, logits, prototype_probs, gamma, steps)


def _validate(logits: Tensor, prototype_probs: Tensor, gamma: float, steps: Tensor | None) -> None:
    _check.tensors(logits=logits, prototype_probs=prototype_probs)
    _check.tensors_or_none(steps=steps)
    if logits.dim() != 3 or logits.shape[1] == 0 or logits.shape[2] == 0:
        _check.fail("logits", f"of shape {tuple(logits.shape)}", "[B, n, V] with n, V > 0")
    _check.floating("logits", logits)
    _check.last_dim_contiguous("logits", logits)
    batch, n, vocabulary = logits.shape
    if prototype_probs.dim() != 2 or prototype_probs.shape[0] < n or prototype_probs.shape[1] != vocabulary:
        _check.fail("prototype_probs", f"of shape {tuple(prototype_probs.shape)}",
                    f"[N, V] with N >= n = {n} and V = {vocabulary}")
    _check.stored("prototype_probs", prototype_probs, torch.float32, logits.device)
    if not (_check.is_number(gamma) and 0.0 <= gamma <= 1.0):
        _check.fail("gamma", repr(gamma), "in [0, 1]")
    if steps is not None:
        _check.shape("steps", steps, (batch,), "[B]")
        _check.stored("steps", steps, torch.int32, logits.device)


def _reference(logits: Tensor, prototype_probs: Tensor, gamma: float, steps: Tensor | None) -> Tensor:
    batch, n, _ = logits.shape
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    order = torch.arange(n, device=logits.device)
    discount = torch.full((), gamma, dtype=acc, device=logits.device) ** order
    produced = order[None] < (n if steps is None else steps[:, None])
    weights = (discount * produced).expand(batch, n)
    # A step that was not produced may hold anything, NaN included: it is left out, not multiplied by zero.
    probs = torch.softmax(logits.to(acc), -1).masked_fill(~produced[..., None].expand(batch, n, 1), 0)
    predicted = torch.einsum("bn,bnv->bv", weights, probs)
    refusal = weights @ prototype_probs[:n].to(acc)
    norms = torch.linalg.vector_norm(predicted, dim=-1) * torch.linalg.vector_norm(refusal, dim=-1)
    return ((predicted * refusal).sum(-1) / norms).clamp(max=1).float()


def _fake(logits: Tensor, prototype_probs: Tensor, gamma: float, steps: Tensor | None) -> Tensor:
    _check.one_device("refusal_similarity", logits, prototype_probs, steps)
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


define(
    "refusal_similarity(Tensor logits, Tensor prototype_probs, float gamma, Tensor? steps) -> Tensor",
    fake=_fake,
    reference=_reference,
)
