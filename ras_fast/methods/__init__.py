"""Inference-time defences. Each module: ``calibrate(...) -> RasProfile``, and how that profile is applied."""

from ras_fast.methods import moras

__all__ = ["moras"]
