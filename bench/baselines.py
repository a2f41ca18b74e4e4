"""The strongest peers, one function each. What is not installed is left out of the table, never replaced."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.glm4v import modeling_glm4v
from transformers.models.llama import modeling_llama

from ras_fast.ops import attention_cuda

# Residual + RMSNorm. Each returns a callable that does h = x + residual; y = norm(h) and gives (y, h).

Call = Callable[[], object]


def norm_peers(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> dict[str, Call]:
    """Every peer that runs on this machine, by name."""
    makers = {
        "eager": norm_eager,
        "compile": norm_compiled,
        "sandwich, compile": sandwich_compiled,
        "liger": norm_liger,
        "flashinfer": norm_flashinfer,
        "quack": norm_quack,
    }
    made = {name: make(x, residual, weight, eps) for name, make in makers.items()}
    return {name: call for name, call in made.items() if call is not None}


def norm_eager(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Call:
    """What Hugging Face's Llama does: an add, then its RMSNorm module op by op."""
    module = _llama_norm(weight, eps)

    def chain():
        h = residual + x
        return module(h), h

    return chain


def norm_compiled(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Call:
    """torch.compile of the same chain, specialised to the shape: the real competitor."""
    module = _llama_norm(weight, eps)

    def chain(x, residual):
        h = residual + x
        return module(h), h

    return _compiled(chain, x, residual)


def sandwich_compiled(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Call:
    """The same with a norm of x before the add."""
    module = _llama_norm(weight, eps)

    def chain(x, residual):
        h = residual + module(x)
        return module(h), h

    return _compiled(chain, x, residual)


def _compiled(chain: Callable, *args: Tensor) -> Call:
    compiled = torch.compile(chain, dynamic=False, fullgraph=True)
    torch._dynamo.reset()
    return lambda: compiled(*args)


def norm_liger(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Call | None:
    """Liger's fused add + RMSNorm."""
    if not (x.is_cuda and importlib.util.find_spec("liger_kernel")):
        return None
    from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward

    return lambda: fused_add_rms_norm_forward(x, residual, weight, eps, 0.0, "llama")


def norm_flashinfer(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Call | None:
    """FlashInfer's fused add + RMSNorm, which works in place: on private copies, whose values do not matter for its time."""
    if not (x.is_cuda and importlib.util.find_spec("flashinfer")) or x.dtype == torch.float32:
        return None
    import flashinfer

    x, residual = x.clone(), residual.clone()
    return lambda: flashinfer.fused_add_rmsnorm(x, residual, weight, eps)


def norm_quack(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Call | None:
    """quack's RMSNorm with residual."""
    if not (x.is_cuda and importlib.util.find_spec("quack")):
        return None
    import quack

    return lambda: quack.rmsnorm(x, weight, residual=residual, eps=eps, prenorm=True)


def _llama_norm(weight: Tensor, eps: float) -> torch.nn.Module:
    module = modeling_llama.LlamaRMSNorm(weight.shape[0], eps).to(weight)
    module.weight.data.copy_(weight)
    return module


# Rotary embedding: candidates rotate query [B, Hq, L, D] and key [B, Hkv, L, D] by cos and sin [B, L, r].


def rotary_peers(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, tower: bool) -> dict[str, Call]:
    """What Hugging Face's Llama does, or its GLM-4V, or the latter's vision tower, op by op and compiled; Liger's kernel, which
    knows Llama's way alone."""
    eager = modeling_glm4v.apply_rotary_pos_emb if interleaved else modeling_llama.apply_rotary_pos_emb
    given = query, key, cos, sin
    if tower:
        eager = modeling_glm4v.apply_rotary_pos_emb_vision
        given = query[0].transpose(0, 1), key[0].transpose(0, 1), cos[0], sin[0]
    peers = {"eager": lambda: eager(*given), "compile": _compiled(eager, *given)}
    if query.is_cuda and not (interleaved or tower) and importlib.util.find_spec("liger_kernel"):
        peers["liger"] = _rotary_liger(query, key, cos, sin)
    return peers


def _rotary_liger(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> Call:
    """It works in place: on private copies, whose values do not matter for its time."""
    from liger_kernel.ops.rope import rope_forward

    query, key = (x.transpose(1, 2).clone().transpose(1, 2) for x in (query, key))
    return lambda: rope_forward(query, key, cos, sin)


# Few rows times a weight [N, K]: (call, weights), where a call takes one of the weights.


def linear_peers(x: Tensor, weights: list[Tensor]) -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
    peers = {"torch": (lambda weight: torch.nn.functional.linear(x, weight), weights)}
    packed = None if x.is_cuda else _packed(x, weights)
    return peers if packed is None else peers | {"packed": packed}


def gated_peers(x: Tensor, weights: list[list[Tensor]]) -> dict[str, tuple[Callable, list[list[Tensor]]]]:
    """Weights are pairs [N, K]."""
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    return {"torch": (lambda both: silu(linear(x, both[0])) * linear(x, both[1]), weights)}


def _packed(x: Tensor, weights: list[Tensor]) -> tuple[Callable[[Tensor], Tensor], list[Tensor]] | None:
    """oneDNN's product with a weight in oneDNN's own layout, as torch.compile's freezing calls it; None where it cannot."""
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(weight, len(x)) for weight in weights]
    except RuntimeError:  # half precision without the processor's own instructions
        return None
    return lambda weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""), packed


# Attention with region mass. Each returns a callable that gives (out, mass of the last `rows` query rows), or None where it
# cannot run here. The regions are contiguous spans of keys (start, end); attention is causal, aligned bottom-right, or under a
# mask [Lq, Lk] bool of the keys that each query sees.


def attention_peers(query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]], rows: int) -> dict[str, Call]:
    """Every peer that gives these masses on this machine, by name. The floor is not among them: it gives no masses."""
    makers = {
        "eager weights": attention_eager,
        "flash + recompute": attention_recompute,
        "indicator values": attention_indicators,
        "split by region": attention_split,
        "flex": attention_flex,
    }
    made = {name: make(query, key, value, spans, rows) for name, make in makers.items()}
    return {name: call for name, call in made.items() if call is not None}


def attention_floor(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Call]:
    """Attention without statistics: every backend of SDPA that takes this input, flash-attn and FlashInfer if installed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    causal = query.shape[2] > 1
    calls = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def call(backend=backend):
            with sdpa_kernel(backend):
                return _sdpa(query, key, value, causal)

        try:
            call()
        except RuntimeError:  # this backend is not built, or does not take this input
            continue
        calls[f"sdpa {backend.name.split('_')[0].lower()}"] = call
    if query.is_cuda and importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        calls["flash-attn"] = lambda: flash_attn_func(q, k, v, causal=causal)
    if query.is_cuda and importlib.util.find_spec("flashinfer") and not causal:
        calls["flashinfer"] = attention_flashinfer(query, key, value)
    return calls


def attention_flashinfer(query: Tensor, key: Tensor, value: Tensor) -> Call:
    """FlashInfer's batched decode over a paged cache: its pages of 16 keys are copies, made and planned before it is timed."""
    batch, heads, _, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]

    @functools.cache
    def planned():
        import flashinfer

        pages = [t.unflatten(2, (-1, 16)).transpose(1, 2).flatten(0, 1).contiguous() for t in (key, value)]
        index = functools.partial(torch.arange, dtype=torch.int32, device=query.device)
        workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=query.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=heads > kv_heads)
        per_row = length // 16
        last = torch.full((batch,), 16, dtype=torch.int32, device=query.device)
        wrapper.plan(index(0, (batch + 1) * per_row, per_row), index(batch * per_row), last, heads, kv_heads, dim, 16,
                     q_data_type=query.dtype, kv_data_type=key.dtype)  # fmt: skip
        return wrapper, tuple(pages)

    def call():
        wrapper, pages = planned()
        return wrapper.run(query[:, :, 0], pages)

    return call


def attention_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Call:
    """SDPA under a mask, by default one that hides nothing: what a static cache, padding, or a captured step costs without a
    kernel for ranges. No statistics."""
    if mask is None:
        mask = torch.ones(query.shape[0], 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def attention_eager(
    query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]], rows: int, mask: Tensor | None = None,
    softcap: float | None = None,
) -> Call | None:  # fmt: skip
    """What Hugging Face's eager attention does with output_attentions=True: the whole matrix, then sums."""
    group, length_q, length_k = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    scores, states = query.shape[0] * query.shape[1] * length_q * length_k, key.numel() * group
    if max(scores, states) * 4 > 16 << 30:
        return None  # the matrix, or the keys and values of all query heads, would take more than 16 GB
    if mask is None:
        mask = torch.ones(length_q, length_k, dtype=torch.bool, device=query.device).tril(length_k - length_q)
    hidden = ~mask

    def call():
        k, v = (t.repeat_interleave(group, 1) for t in (key, value))
        scores = query @ k.mT * query.shape[-1] ** -0.5
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1, dtype=torch.float32)
        return weights.to(query.dtype) @ v, _span_sums(weights[:, :, length_q - rows :], spans)

    return call


def attention_recompute(query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]], rows: int) -> Call | None:
    """Flash attention that leaves the LSE, then Q Kᵀ of the selected rows and the regions' keys only: the strongest."""
    flash = _flash_with_lse(query)
    if flash is None or rows == query.shape[2] > 4096:
        return None
    group, length_q, length_k = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    own = torch.arange(length_q - rows, length_q, device=query.device)[:, None] + length_k - length_q

    def call():
        out, lse = flash(query, key, value, length_q > 1)
        mass = []
        for start, end in spans:
            scores = query[:, :, length_q - rows :] @ key[:, :, start:end].repeat_interleave(group, 1).mT
            p = torch.exp(scores.float() * query.shape[-1] ** -0.5 - lse[:, :, length_q - rows :, None])
            mass.append((p * (torch.arange(start, end, device=query.device) <= own)).sum(-1))
        return out, torch.stack(mass, -1)

    return call


def attention_indicators(
    query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]], rows: int, mask: Tensor | None = None
) -> Call | None:
    """Values with one more column for each region, 1 on its keys: the masses of all rows come out as columns of the output."""
    dim = value.shape[-1]
    columns = -(-len(spans) // 8) * 8
    indicators = value.new_zeros(*value.shape[:3], columns)
    for region, (start, end) in enumerate(spans):
        indicators[:, :, start:end, region] = 1
    pad = columns if query.is_cuda else 0  # on a GPU the fast backends want one head dimension for all three
    if pad and dim + pad > 256:
        return None  # more than they take

    def call():
        q, k = (torch.nn.functional.pad(t, (0, pad)) if pad else t for t in (query, key))
        wide = _sdpa(q, k, torch.cat([value, indicators], -1), query.shape[2] > 1, dim**-0.5, mask)
        return wide[..., :dim], wide[:, :, query.shape[2] - rows :, dim : dim + len(spans)]

    return call


def attention_split(query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]], rows: int) -> Call | None:
    """The LSE of the selected rows over each region's keys, by flash attention: mass = exp(lse_region − lse)."""
    flash = _flash_with_lse(query)
    first_row = key.shape[2] - rows
    if flash is None or any(end > first_row + 1 for _, end in spans):
        return None  # a row inside the region would need another mask

    def call():
        out, lse = flash(query, key, value, query.shape[2] > 1)
        last = query[:, :, query.shape[2] - rows :]
        parts = [flash(last, key[:, :, s:e], value[:, :, s:e], False)[1] for s, e in spans]
        return out, torch.exp(torch.stack(parts, -1) - lse[:, :, query.shape[2] - rows :, None])

    return call


def attention_flex(query: Tensor, key: Tensor, value: Tensor, spans: list[tuple[int, int]], rows: int) -> Call | None:
    """FlexAttention once for the output and once for each region's LSE, blocks outside the region skipped.

    It compiles for seconds a shape: only where the others are compared at D 128 over 1024 and 4096 keys.
    """
    length_q, length_k = query.shape[2], key.shape[2]
    if not query.is_cuda or query.shape[3] != 128 or length_k not in (1024, 4096):
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    offset = length_k - length_q

    def block_mask(start, end, first_row, count):
        def allowed(b, h, i, j):
            return (i + first_row + offset >= j) & (j >= start) & (j < end)

        return create_block_mask(allowed, None, None, count, length_k, device=query.device)

    whole = block_mask(0, length_k, 0, length_q)
    regions = [block_mask(start, end, length_q - rows, rows) for start, end in spans]
    attend = functools.partial(torch.compile(flex_attention, dynamic=False), enable_gqa=True, return_lse=True)
    # Of 2 to 127 rows torch makes a decode kernel, whose blocks do not fit the block mask's under GQA.
    options = {"BACKEND": "TRITON"} if rows > 1 else None

    def call():
        out, lse = attend(query, key, value, block_mask=whole)
        last = query[:, :, length_q - rows :]
        parts = [attend(last, key, value, block_mask=mask, kernel_options=options)[1] for mask in regions]
        return out, torch.exp(torch.stack(parts, -1) - lse[:, :, length_q - rows :, None])

    return call


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """causal: where there is no mask."""
    options = {"is_causal": causal} if mask is None else {"attn_mask": mask}
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True, **options)


def _flash_with_lse(query: Tensor) -> Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]] | None:
    """torch's attention with its LSE [B, Hq, Lq]: of the CPU, or what it prefers on the GPU, which takes 16-bit types only."""
    if not query.is_cuda:

        def cpu(q, k, v, causal):
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)

        return cpu
    if query.dtype == torch.float32:
        return None
    return attention_cuda.flash


def _span_sums(weights: Tensor, spans: list[tuple[int, int]]) -> Tensor:
    return torch.stack([weights[..., start:end].sum(-1) for start, end in spans], -1)
