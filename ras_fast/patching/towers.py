"""Layers outside of the text model, as of vision towers. Their attention: SDPA's, by this package's kernel where that is
faster, and for all images or windows of one size in one call. Their GELUs: likewise. Their states: laid out by rows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ras_fast import ops
from ras_fast.patching.attention import as_ranges, is_causal_call, is_range, may_look, sdpa_is_slow
from ras_fast.patching.report import Report
from ras_fast.patching.undo import StandIn, Undo, forward_slot
from ras_fast.registration import PACKED, TOWER, register

# Keyword arguments that SDPA's function obeys or refuses.
_OF_SDPA = ("position_bias", "softcap")
_GELU_TANH, _QUICK_GELU = (type(ACT2FN[name]) for name in ("gelu_pytorch_tanh", "quick_gelu"))
_READ = "_ras_fast_read"  # attribute of boundaries or a mask: its version, and what `_once` made of that


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' function for SDPA gives, within rounding: where every patch sees one run of patches, all for one, in
    half precision and on a CPU by this package's kernel; whatever else by that function itself.

    Args:
        query: [B, Hq, Lq, D]; key, value: [B, Hkv, Lk, D].
        attention_mask: None, bool or additive [B or 1, Hq or 1, Lq or 1, Lk].

    Returns:
        out: [B, Lq, Hq, D]; None.
    """
    obeys_more = dropout or is_causal_call(module, is_causal) or any(kwargs.get(name) is not None for name in _OF_SDPA)
    if not obeys_more and _kernel_takes(query, key, value) and sdpa_is_slow(query, key, value, None):
        bounds = _bounds(attention_mask, query, key)
        if bounds is not None:
            return ops.region_attention(query, key, value, scale=scaling, is_causal=False, **bounds)[0].transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attention` inside each image or window, as towers hand all of them to flash attention. For SDPA they call once for each
    and ask the device for the sizes in every layer: here neighbours of one size are one call, and it is asked once.

    Args:
        query, key, value: [1, H, T, D], the patches of all images.
        cu_seq_lens_q: [n + 1], where each image or window begins, and T. None: this is `attention`.

    Returns:
        out: [1, T, H, D]; None.

    Raises:
        ValueError: a mask beside boundaries, or these end elsewhere.
    """
    if cu_seq_lens_q is None:
        return attention(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None:
        raise ValueError("attention_mask is given beside cu_seq_lens_q; use ras_fast.patch(model, regions=False)")
    if torch.compiler.is_compiling():  # where sizes may be symbols, which have no values to go by: as for SDPA
        lengths = cu_seq_lens_q.diff().tolist()
        parts = (x.split(lengths, 2) for x in (query, key, value))
        found = [sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in zip(*parts, strict=True)]
        return torch.cat(found, 1), None
    found, begin = [], 0
    for length, count in _once(cu_seq_lens_q, _runs):
        end = begin + length * count
        tensors = (x[0, :, begin:end].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value))
        found.append(attention(module, *tensors, None, **kwargs)[0].flatten(0, 1))
        begin = end
    if begin != query.shape[2]:
        raise ValueError(f"cu_seq_lens_q ends at {begin}; there are {query.shape[2]} patches")
    return (found[0] if len(found) == 1 else torch.cat(found))[None], None


def _bounds(mask: Tensor | None, query: Tensor, key: Tensor) -> dict[str, Tensor] | None:
    """The keywords for `ops.region_attention` that say what a mask says; None where nothing but the mask does."""
    if mask is None:
        return {}
    batch, rows, keys = query.shape[0], query.shape[2], key.shape[2]
    # What else SDPA broadcasts, or refuses, is left to it.
    fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, (batch, 1, rows), strict=False))
    if not may_look(mask) or mask.dtype != torch.bool or not fits or mask.shape[3] != keys:
        return None
    ranges = _once(mask, _ranges)
    if ranges is None:
        return None
    bounds = ranges[:, 0, :, :2].expand(batch, -1, -1).unbind(-1)
    shared = bounds[0].shape[1] == 1  # by all rows
    return dict(zip(("kv_start", "kv_end"), ((bound[:, 0] if shared else bound).contiguous() for bound in bounds), strict=True))


def _ranges(mask: Tensor) -> Tensor | None:
    """A mask as ranges; None where it is none: remembered on the mask, that itself would never be freed."""
    ranges = as_ranges(mask, 0)
    return ranges if is_range(ranges) else None


def _runs(boundaries: Tensor) -> list[tuple[int, int]]:
    """(length, how many of that length follow each other)."""
    return [(length, len(list(same))) for length, same in groupby(filter(None, boundaries.diff().tolist()))]


def _once(tensor: Tensor, read: Callable[[Tensor], Any]) -> Any:
    """What `read` makes of a tensor's values. One host sync for all layers, which are given the same tensor; one that was
    filled anew meanwhile, which tensors of inference mode do not tell, is read again."""
    version = None if tensor.is_inference() else tensor._version
    before, found = getattr(tensor, _READ, (None, None))
    if version is None or before != version:
        found = read(tensor)
        setattr(tensor, _READ, (version, found))
    return found


def _kernel_takes(*tensors: Tensor) -> bool:
    """A vision tower may be asked for gradients or tangents, which the kernel has none of."""
    _, key, value = tensors
    rows = key.shape == value.shape and all(tensor.stride(-1) == 1 for tensor in tensors)
    return rows and not _may_want_derivatives(*tensors)


def _may_want_derivatives(*tensors: Tensor) -> bool:
    return forward_ad._current_level >= 0 or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _outside(root: nn.Module, text_model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are not in its text model."""
    text = {id(module) for module in text_model.modules()}
    return [module for module in root.modules() if id(module) not in text]


def speed_up_towers(root: nn.Module, text_model: nn.Module, undo: Undo, report: Report) -> None:
    """Has the attention modules outside of the text model that go by SDPA go by `packed_attention`, where they can hand over
    all images at once, or by `attention`, where they are on a CPU."""
    by_config: dict[int, list[nn.Module]] = {}
    for module in _outside(root, text_model):
        config = vars(module).get("config")
        if config is not text_model.config and getattr(config, "_attn_implementation", "") == "sdpa":
            by_config.setdefault(id(config), []).append(module)
    for modules in by_config.values():
        attentions = [module for module in modules if _attends(module)]
        packs = any(map(_packs, modules))
        if attentions and (packs or all(map(_is_on_cpu, attentions))):
            register()
            # A copy: for a model made from the model's config, transformers would look for a flash attention of the name.
            own = copy.copy(attentions[0].config)
            own._attn_implementation_internal = PACKED if packs else TOWER
            for module in modules:
                if module is not root:  # whose config is its users' to change
                    undo.set(module, "config", own)
            report.tower_attentions += len(attentions)


class FastGelu(StandIn):
    """Stands in for the `forward` of an approximation of GELU: `ops.gelu_tanh` or `ops.quick_gelu` in half precision and on a
    CPU, where torch is slow, else the original."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        if type(input) is Tensor and not torch.compiler.is_compiling() and _gelu_takes(input):
            op = _gelu_of(self.module)
            if op is not None:
                return getattr(ops, op)(input)
        return type(self.module).forward(self.module, input)


def _gelu_takes(x: Tensor) -> bool:
    """As `_kernel_takes`. Under torch.vmap torch's is one call, and the op one for each sample."""
    if x.device.type != "cpu" or x.element_size() != 2 or not x.is_floating_point() or is_functorch_wrapped_tensor(x):
        return False
    return x.layout is torch.strided and not x.is_nested and x.is_contiguous() and not _may_want_derivatives(x)


def speed_up_gelus(root: nn.Module, text_model: nn.Module, undo: Undo, report: Report) -> None:
    """Every GELU outside of the text model that there is an op for and that is a module of its own, where all is on a CPU."""
    for module in _outside(root, text_model) if _is_on_cpu(root) else ():
        slot = None if _gelu_of(module) is None else forward_slot(module)
        if slot is not None:
            undo.set(module, slot, FastGelu(module))
            report.tower_gelus += 1


def _gelu_of(module: nn.Module) -> str | None:
    """The op that computes a module's approximation of GELU; None for other modules, and for one whose function, an attribute,
    somebody has replaced."""
    if type(module) is _QUICK_GELU:
        return "quick_gelu"
    act = module.act if type(module) is _GELU_TANH else None
    by_tanh = isinstance(act, partial) and act.func is nn.functional.gelu and act.keywords == {"approximate": "tanh"}
    return "gelu_tanh" if by_tanh else None


def lay_out_by_rows(root: nn.Module, text_model: nn.Module, undo: Undo) -> None:
    """Has the states of all stacks of layers outside of the text model lie row by row."""
    stacks = [module for module in _outside(root, text_model) if isinstance(module, nn.ModuleList)]
    for first in (stack[0] for stack in stacks if len(stack)):
        if first is not None and any(map(_attends, first.modules())):
            undo.hook_before(first, partial(_by_rows))  # one of its own: another patch of the tower leaves it there


def _by_rows(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hook of a stack's first layer. What comes out of SigLIP's convolution lies channel by channel, and so would the sums of
    all layers: each norm would copy them, and each add go across."""
    states = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(states, Tensor) or states.dim() != 3:  # Florence-2's [B, C, H, W] lie pixel by pixel, and stay so
        return args, kwargs
    states = states.contiguous()
    return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})


def _is_on_cpu(module: nn.Module) -> bool:
    return all(parameter.device.type == "cpu" for parameter in module.parameters())


def _attends(module: nn.Module) -> bool:
    """Whether it goes by an implementation of transformers' attention interface."""
    return "ALL_ATTENTION_FUNCTIONS" in _names(module)


def _packs(module: nn.Module) -> bool:
    """Whether it hands all images over at once, with their boundaries, to what has "flash" in its name: an attention module, or
    as in Pixtral the model around it."""
    return {"is_flash_attention_requested", "cu_seqlens"} <= _names(module)


def _names(module: nn.Module) -> set[str]:
    """The names that the module's forward uses: global ones, attributes and arguments."""
    forward = getattr(type(module), "forward", None)  # TorchScript's classes have none
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return set() if code is None else {*code.co_names, *code.co_varnames}
