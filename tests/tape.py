"""What a CUDA graph does, on the CPU."""

import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from waits import Waits


class Tape(TorchDispatchMode):
    """Notes the operations of a function and repeats them, on the same memory, without running its Python again: what the
    host has decided is fixed, and tensors that others have taken the place of are still the ones that are read."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, output))
        return output

    @torch.inference_mode()  # a graph does not mind whether its tensors are inference tensors
    def replay(self):
        for function, args, kwargs, output in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class HostReads(TorchDispatchMode):
    """Notes what a capture on a GPU forbids and the CPU does not mind: tensors of the host in operations of the device, for
    which "meta" stands in here. That device also refuses to hand out values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs))
        if any(isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" for leaf in leaves):
            self.found.append(f"{function} from {traceback.extract_stack()[-2]}")
        return function(*args, **kwargs or {})


class Graphs:
    """Stands in for `capture`."""

    def __init__(self):
        self.made, self.replays = 0, 0

    def __call__(self, function, device):
        assert device == torch.device("cpu")  # whose stream the graph is to be captured on
        self.made += 1
        function()  # warm-up
        tape, waits = Tape(), Waits()
        with tape, waits:
            output = function()
        assert waits.found == []

        def replay():
            self.replays += 1
            tape.replay()
            return output

        return replay
