import copy
import traceback

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Waits(TorchDispatchMode):
    """Notes what a GPU would be waited for, and what a capture forbids: reading values, and copies from the CPU or to it."""

    def __init__(self):
        super().__init__()
        self.found = []
        self._uploads = _Uploads(self.found)

    def __enter__(self):
        self._uploads.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self._uploads.__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if _reads_values(function, args) or _copies_between_devices(function, args, result):
            self.found.append(f"{function} from {traceback.extract_stack()[-2]}")
        return result


class _Uploads(TorchFunctionMode):
    """Notes tensors that are made from Python numbers on another device than the CPU."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        made = function in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and not isinstance(args[-1], Tensor)
        if made and result.device.type != "cpu":
            self.found.append(f"{function} from {traceback.extract_stack()[-2]}")
        return result


def _reads_values(function, args) -> bool:
    by_number = function is torch.ops.aten.index.Tensor and all(i is None or i.dtype != torch.bool for i in args[1])
    return not by_number and bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags))


def _copies_between_devices(function, args, result) -> bool:
    if function not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
        return False
    return len({tensor.device for tensor in tree_leaves((args, result)) if isinstance(tensor, Tensor)}) > 1


def without_values(*things):
    """Copies of models, caches and tensors on the meta device, which stands for a GPU.

    Nothing can read their values, and they do not mix with tensors that are made on the CPU.
    """
    with _CopyToMeta():
        return copy.deepcopy(things)


class _CopyToMeta(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), _meta(tensor))
        if function is Tensor.clone:  # a parameter's deepcopy
            return _meta(args[0])
        return function(*args, **kwargs or {})


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
