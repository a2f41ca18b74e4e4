"""The functional API. One file per op family: public function, validation, reference, fake (meta) kernel.

Attention's reference, and what each backend makes of a call, have files of their own, attention_*.py.
"""

from ras_fast.ops.activation import gelu_tanh, quick_gelu
from ras_fast.ops.attention import explain, key_attention, region_attention, region_mass, region_statistics
from ras_fast.ops.cache import write_cache_
from ras_fast.ops.linear import gated_linear, linear, linear_glu, linears
from ras_fast.ops.norm import add_layer_norm, add_layer_norm_, add_rms_norm, add_rms_norm_
from ras_fast.ops.rotary import rotary_embedding
from ras_fast.ops.similarity import refusal_similarity

__all__ = [
    "add_layer_norm",
    "add_layer_norm_",
    "add_rms_norm",
    "add_rms_norm_",
    "explain",
    "gated_linear",
    "gelu_tanh",
    "key_attention",
    "linear",
    "linear_glu",
    "linears",
    "quick_gelu",
    "refusal_similarity",
    "region_attention",
    "region_mass",
    "region_statistics",
    "rotary_embedding",
    "write_cache_",
]
