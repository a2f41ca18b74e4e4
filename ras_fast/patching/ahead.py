"""Results that are computed before the module that they are of is called."""

from __future__ import annotations

import torch
from torch import Tensor


class Ahead:
    """A result for a tensor: for the next call alone, and only if that brings the very tensor, which nobody has written
    to since.

    held: what it is of, the version of that, and the result; None where there is none.
    """

    def __init__(self) -> None:
        self.held: tuple[Tensor, int, Tensor] | None = None

    def keep(self, x: Tensor, result: Tensor) -> None:
        """Of a tensor that does not count what is written to it, one of inference mode, a result is never taken."""
        self.held = x, 0 if torch.compiler.is_compiling() or x.is_inference() else x._version, result

    def take(self, x: object) -> Tensor | None:
        """The result for `x`; None where there is none. It is gone then, in any case."""
        held = self.held  # read once: another thread may change it
        if held is None:
            return None
        self.held = None
        of, version, result = held
        untouched = of is x and (torch.compiler.is_compiling() or (not of.is_inference() and version == of._version))
        return result if untouched else None
