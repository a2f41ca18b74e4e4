"""Hugging Face integration: attention and mask functions, fusion of decoder layers, `patch` and the `Patch` it returns."""

from ras_fast.patching.attention import range_mask
from ras_fast.patching.model import Patch, Report, patch, patched
from ras_fast.patching.state import gather_heads

__all__ = ["Patch", "Report", "gather_heads", "patch", "patched", "range_mask"]

