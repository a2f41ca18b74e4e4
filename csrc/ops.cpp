// Every op that has a CPU kernel. Schemas are in ras_fast/ops/: an install without a compiler has the ops, too.
#include "ops.h"

#include "sources.h"

STABLE_TORCH_LIBRARY_IMPL(ras_fast, CPU, m) {
  m.impl("add_rms_norm", TORCH_BOX(&ras::cpu::add_rms_norm));
  m.impl("add_rms_norm_", TORCH_BOX(&ras::cpu::add_rms_norm_));
  m.impl("add_layer_norm", TORCH_BOX(&ras::cpu::add_layer_norm));
  m.impl("add_layer_norm_", TORCH_BOX(&ras::cpu::add_layer_norm_));
  m.impl("decode_attention", TORCH_BOX(&ras::cpu::decode_attention));
  m.impl("prefill_attention", TORCH_BOX(&ras::cpu::prefill_attention));
  m.impl("region_mass", TORCH_BOX(&ras::cpu::region_mass));
  m.impl("key_attention", TORCH_BOX(&ras::cpu::key_attention));
  m.impl("region_statistics", TORCH_BOX(&ras::cpu::region_statistics));
  m.impl("gated_linear", TORCH_BOX(&ras::cpu::gated_linear));
  m.impl("refusal_similarity", TORCH_BOX(&ras::cpu::refusal_similarity));
}
