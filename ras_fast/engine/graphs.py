"""A step as one CUDA graph, and why some steps cannot be one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def capture(function: Callable[[], Tensor], device: torch.device | None = None) -> Callable[[], Tensor]:
    """``function`` as one CUDA graph. What the replay returns is overwritten by the next replay.

    The function runs once before it is captured, because what is allocated or compiled on first use must not be so during
    capture, and its work is done again by the first replay: doing it twice has to leave the same result as doing it once.

    device: where its tensors are; None: on the current device. A stream of another one would capture nothing of it.

    Raises HostRead where the host takes part in the function.
    """
    with torch.cuda.device(device):
        return _captured(function)


def _captured(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`capture` on the current device."""
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph, inputs = torch.cuda.CUDAGraph(), UsedStorages()
    # Thread-local: what other threads do with the device is none of this capture's business.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"), inputs:
        output = function()

    def replay() -> Tensor:
        graph.replay()
        return output

    replay.inputs = inputs.storages  # they must live as long as the graph, which reads their addresses
    return replay


_streams: dict[int, torch.cuda.Stream] = {}


def _stream(device: int) -> torch.cuda.Stream:
    """The stream that graphs are captured on: one for all, as each stream has a cuBLAS workspace of its own."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


class HostRead(RuntimeError):
    """The host waits for a value of the device, or sends it one: a graph would repeat what came of the first."""


class UsedStorages(TorchDispatchMode):
    """Collects the storages that the operations inside the block read or write and that were there before it.

    device: the type of what is captured.

    Raises HostRead before an operation in which the host takes part: CUDA would refuse it, and the capture be lost half-way.
    """

    def __init__(self, device: str = "cuda"):
        super().__init__()
        self.device = device
        self.storages: dict[int, torch.UntypedStorage] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.device in _read_by_host(function, args, kwargs or {}):
            raise HostRead(f"{function} waits for the device")
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self.storages[storage._cdata] = storage
        output = function(*args, **kwargs or {})
        self._made |= {storage._cdata for storage in _storages(output)} - self.storages.keys()
        return output


_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


def _read_by_host(function, args: tuple, kwargs: dict) -> set[str]:
    """The types of the devices whose values an operation needs on the host, or copies to or from another one."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    devices, copies = {tensor.device.type for tensor in tensors}, function in _COPIES
    if copies and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    reads = not _READS.isdisjoint(function.tags)
    if function is torch.ops.aten.index.Tensor:  # reads masks, whose trues have to be counted
        reads = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    # A kernel takes a single number of the host's as it is; more, such as indices, are copied.
    copies |= any(tensor.dim() > 0 and tensor.device.type == "cpu" for tensor in tensors)
    return devices if reads or (copies and len(devices) > 1) else set()


def _storages(tree) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
