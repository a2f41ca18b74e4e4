// Every op's CPU entry point; the schemas are in ras_fast/ops/, the registrations in ops.cpp.
#pragma once

#include "cpu/tensor.h"

namespace ras::cpu {

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight, double eps,
                                                const MaybeTensor& vectors, const MaybeTensor& slot, const MaybeTensor& alpha,
                                                bool lerp, double weight_offset, bool hf, const MaybeTensor& probes);

Tensor add_rms_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps, const MaybeTensor& vectors,
                     const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, double weight_offset, bool hf,
                     const MaybeTensor& probes);

std::tuple<Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const MaybeTensor& residual, const Tensor& weight,
                                                  const MaybeTensor& bias, double eps, const MaybeTensor& vectors,
                                                  const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, bool hf,
                                                  const MaybeTensor& probes);

Tensor add_layer_norm_(const Tensor& x, const Tensor& residual, const Tensor& weight, const MaybeTensor& bias, double eps,
                       const MaybeTensor& vectors, const MaybeTensor& slot, const MaybeTensor& alpha, bool lerp, bool hf,
                       const MaybeTensor& probes);

// region_attention's path for one query row per sequence.
std::tuple<Tensor, Tensor, Tensor> decode_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                    const MaybeTensor& region_ids, int64_t num_regions, double scale,
                                                    bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end,
                                                    int64_t window, double softcap, const MaybeTensor& sinks,
                                                    const MaybeTensor& region_bias, int64_t mass_rows);

// The same for more rows.
std::tuple<Tensor, Tensor, Tensor> prefill_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                                     const MaybeTensor& region_ids, int64_t num_regions, double scale,
                                                     bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end,
                                                     int64_t window, double softcap, const MaybeTensor& sinks,
                                                     const MaybeTensor& region_bias, int64_t mass_rows);

Tensor region_mass(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& region_ids, int64_t num_regions,
                   double scale, bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end, int64_t window,
                   double softcap, const MaybeTensor& region_bias, int64_t mass_rows);

Tensor key_attention(const Tensor& query, const Tensor& key, const Tensor& lse, int64_t rows, const std::string& reduce,
                     const MaybeTensor& region_ids, double scale, bool is_causal, const MaybeTensor& kv_start,
                     const MaybeTensor& kv_end, int64_t window, double softcap, const MaybeTensor& region_bias);

std::tuple<Tensor, Tensor> region_statistics(const Tensor& query, const Tensor& key, const Tensor& lse, const Tensor& region_ids,
                                             int64_t num_regions, int64_t rows, const std::string& reduce, double scale,
                                             bool is_causal, const MaybeTensor& kv_start, const MaybeTensor& kv_end,
                                             int64_t window, double softcap, const MaybeTensor& region_bias);

Tensor refusal_similarity(const Tensor& logits, const Tensor& prototype_probs, double gamma, const MaybeTensor& steps);

Tensor gated_linear(const Tensor& x, const Tensor& weight, const MaybeTensor& right, const Tensor& gate);

}  // namespace ras::cpu
