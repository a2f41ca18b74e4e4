// cos(Σ γⁿ softmax(logits_n), Σ γⁿ p_n) without a softmax in memory: one pass for each step's log-sum-exp, one for the dots.
#include "cpu/similarity.h"

#include <cstdlib>

#include "cpu/vec.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // floats summed in float before the sum goes into a double

template <class T>
vfloat load_or(const T* from, int64_t left, float filler) {
  if (left >= kLanes) return load(from);
  vfloat value = load(from, int(left));
  for (int i = int(left); i < kLanes; ++i) value[i] = filler;
  return value;
}

template <class T>
float log_sum_exp(const T* logits, int64_t count) {
  vfloat highest = splat(-INFINITY);
  for (int64_t i = 0; i < count; i += kLanes) highest = max(highest, load_or(logits + i, count - i, -INFINITY));
  const float peak = max(highest);
  double total = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    vfloat partial{};
    for (int64_t i = start; i < start + kBlock && i < count; i += kLanes)
      partial += exp(load_or(logits + i, count - i, -INFINITY) - peak);
    total += sum(partial);
  }
  return peak + float(std::log(total));
}

template <class T>
float similarity(const SimilarityArgs& args, int64_t row, float* shift, float* discount) {
  const T* logits = static_cast<const T*>(args.logits) + row * args.batch_stride;
  const int64_t produced = args.produced ? args.produced[row] : args.steps;
  const int64_t steps = produced < args.steps ? produced : args.steps;
  float power = 1;
  for (int64_t n = 0; n < steps; ++n, power *= args.gamma) {
    discount[n] = power;
    shift[n] = log_sum_exp(logits + n * args.step_stride, args.vocabulary);
  }
  double dot = 0, predicted_square = 0, refusal_square = 0;
  for (int64_t start = 0; start < args.vocabulary; start += kBlock) {
    vfloat pq{}, qq{}, pp{};
    for (int64_t i = start; i < start + kBlock && i < args.vocabulary; i += kLanes) {
      vfloat predicted{}, refusal{};
      for (int64_t n = 0; n < steps; ++n) {
        const int64_t left = args.vocabulary - i;
        predicted += discount[n] * exp(load_or(logits + n * args.step_stride + i, left, -INFINITY) - shift[n]);
        refusal += discount[n] * load_or(args.prototypes + n * args.prototype_stride + i, left, 0.0f);
      }
      pq += predicted * refusal;
      qq += predicted * predicted;
      pp += refusal * refusal;
    }
    dot += sum(pq);
    predicted_square += sum(qq);
    refusal_square += sum(pp);
  }
  const double cosine = dot / (std::sqrt(predicted_square) * std::sqrt(refusal_square));
  return float(cosine > 1 ? 1 : cosine);  // NaN stays
}

template <class T>
void rows(const SimilarityArgs& args, int64_t begin, int64_t end) {
  float* scratch = static_cast<float*>(std::malloc(2 * args.steps * sizeof(float)));
  for (int64_t row = begin; row < end; ++row) args.similarity[row] = similarity<T>(args, row, scratch, scratch + args.steps);
  std::free(scratch);
}

}  // namespace

void similarity_rows(const SimilarityArgs& args, int64_t begin, int64_t end) {
  for_dtype(args.dtype, [&](auto zero) { rows<decltype(zero)>(args, begin, end); });
}

}  // namespace ras::cpu::RAS_FAST_ISA
