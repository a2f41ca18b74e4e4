// Every op that has a CUDA kernel. Schemas are in ras_fast/ops/: an install without a compiler has the ops, too.
#include "ops.h"

#include "sources.h"

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CUDA, m) {
  m.impl("add_rms_norm", TORCH_BOX(&ras::cuda::add_rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&ras::cuda::add_rms_norm_));
  m.impl("add_layer_norm", TORCH_BOX(&ras::cuda::add_layer_norm));
  m.impl("add_layer_norm_", TORCH_BOX(&ras::cuda::add_layer_norm_));
  m.impl("decode_attention", TORCH_BOX(&ras::cuda::decode_attention));
  m.impl("selected_region_mass", TORCH_BOX(&ras::cuda::selected_region_mass));
  m.impl("selected_key_attention", TORCH_BOX(&ras::cuda::selected_key_attention));
  m.impl("selected_statistics", TORCH_BOX(&ras::cuda::selected_statistics));
}
