"""Argument checks shared by the public op wrappers: each error names the argument, what came and what is needed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def fail(name: str, got: object, need: str) -> None:
    """Raises ValueError: argument `name` is `got` and must be `need`, both in words."""
    raise ValueError(f"{name} is {got}; it must be {need}")


def shape(name: str, tensor: Tensor, expected: Sequence[int], symbols: str) -> None:
    """`tensor` has exactly the sizes `expected`; `symbols` says them in the docstring's letters."""
    if tuple(tensor.shape) != tuple(expected):
        fail(name, f"of shape {tuple(tensor.shape)}", f"{symbols} = {tuple(expected)}")


def is_tensor(name: str, value: object, need: str) -> None:
    """`value` is a tensor; `need` says which one is wanted."""
    if not isinstance(value, Tensor):
        fail(name, repr(value), need)


def tensors(**given: object) -> None:
    """Each, by its name, is a tensor."""
    for name, value in given.items():
        is_tensor(name, value, "a tensor")


def tensors_or_none(**given: object) -> None:
    """Each, by its name, is a tensor or None."""
    for name, value in given.items():
        if value is not None:
            is_tensor(name, value, "a tensor or None")


def is_integer(value: object) -> bool:
    """Whether it is an integer of Python, of NumPy or of a trace; True and False are none."""
    return isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a real number of Python, of NumPy or of a trace, or a tensor, which may hold one."""
    return isinstance(value, (float, int, Tensor, torch.SymFloat, torch.SymInt, Real))


def numbers(**given: object) -> None:
    """Each, by its name, is a number."""
    for name, value in given.items():
        if not is_number(value):
            fail(name, repr(value), "a number")


def floating(name: str, tensor: Tensor) -> None:
    """`tensor`, of any shape, has a dtype that the ops compute with."""
    if tensor.dtype not in FLOATS:
        fail(name, f"of dtype {tensor.dtype}", "float32, float16, bfloat16, or float64 (reference only)")


def dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    """`tensor`, of any shape, has the dtype `expected`."""
    if tensor.dtype != expected:
        fail(name, f"of dtype {tensor.dtype}", f"{expected}")


def device(name: str, tensor: Tensor, expected: torch.device) -> None:
    """`tensor`, of any shape, lies on the device `expected`."""
    if tensor.device != expected:
        fail(name, f"on device {tensor.device}", f"on {expected}")


def last_dim_contiguous(name: str, tensor: Tensor) -> None:
    """Neighbours in the last dimension of `tensor` [..., n] are neighbours in memory."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        fail(name, f"of strides {tuple(tensor.stride())}", "contiguous in its last dimension")


def stored(name: str, tensor: Tensor, expected_dtype: torch.dtype, expected_device: torch.device) -> None:
    """`tensor`, of any shape, is of this dtype, contiguous in its last dimension and on this device."""
    dtype(name, tensor, expected_dtype)
    last_dim_contiguous(name, tensor)
    device(name, tensor, expected_device)


def may_read(tensor: Tensor) -> bool:
    """Whether the tensor has values, and an op that looks at them is neither traced nor recorded."""
    if torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or is_in_torch_dispatch_mode():
        return False
    return not is_functorch_wrapped_tensor(tensor)  # as under torch.vmap


def one_device(op: str, x: Tensor, *others: Tensor | None) -> None:
    """For fake kernels, to which torch sends a call with any meta tensor. Tensors of several devices are a mistake; the error
    makes the public function validate its arguments and name the wrong one."""
    if any(t is not None and t.device != x.device for t in others):
        raise RuntimeError(f"{op} needs all tensors on one device")


def no_grad(op: str, *tensors: Tensor | None) -> None:
    """Inference only: silently dropping a gradient would be worse than an error."""
    # What is no tensor is named by the op's validation.
    if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in tensors):
        raise RuntimeError(
            f"{op} has no backward, and an input requires grad: call it under torch.no_grad() or "
            "torch.inference_mode(), or detach the input"
        )
    forward_mode = forward_ad._current_level >= 0 and not torch.compiler.is_compiling()
    if forward_mode and any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(f"{op} has no forward-mode derivative, and an input has a tangent: take the input's primal alone")
