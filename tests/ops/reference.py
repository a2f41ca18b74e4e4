"""float64 twins of inputs, and the rule by which an output is judged against them."""

import torch


def to64(value):
    """The value with every floating tensor in float64 (alpha, lse and bias stay float32: their dtype is the contract)."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def assert_close(actual, exact, torchs_own, atol):
    """|actual − exact| ≤ 2·(error of torch's own implementation in that dtype) + atol, in the maximum over all elements."""
    error = (actual.double() - exact.double()).abs().max().item() if actual.numel() else 0.0
    allowed = 2 * (torchs_own.double() - exact.double()).abs().max().item() + atol if actual.numel() else atol
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
