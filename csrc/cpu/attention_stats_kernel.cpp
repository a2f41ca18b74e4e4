// Softmax probabilities of a few query rows, recomputed from the LSE and summed by region or by key.
//
// The keys are walked in blocks of two vectors. A block is transposed to [D][keys] floats once and then multiplied with all
// query rows of the heads that share it, six rows at a time: 12 accumulators, 2 loads and 6 broadcasts for 12 FMAs a step.
#include "cpu/attention_stats.h"

#include <cstdlib>

#include "cpu/attention_view.h"
#include "cpu/vec.h"

namespace ras::cpu::RAS_FAST_ISA {
namespace {

constexpr int kRows = 6;
constexpr int kBlock = 2 * kLanes;

// Keys of one block: positions (−1 past the block's end) and their transposed values.
struct KeyBlock {
  int count = 0, runs = 0;  // keys, and runs of keys of one region
  int32_t position[kBlock];
  int32_t region[kBlock];  // −1: none
  float* panel;  // [D][kBlock]
};

template <class T>
void pack(const AttentionStatsArgs& args, int64_t batch, int64_t kv_head, KeyBlock& block) {
  const T* keys = row_of<T>(args.key, args.key_stride, batch, kv_head);
  alignas(64) float row[512];
  for (int k = 0; k < kBlock; ++k) {
    if (k >= block.count) {
      block.position[k] = -1;
      for (int64_t i = 0; i < args.dim; ++i) block.panel[i * kBlock + k] = 0;
      continue;
    }
    const T* from = keys + block.position[k] * args.key_stride[2];
    for (int64_t start = 0; start < args.dim; start += 512) {
      const int64_t count = args.dim - start < 512 ? args.dim - start : 512;
      widen_row(row, from + start, count);
      for (int64_t i = 0; i < count; ++i) block.panel[(start + i) * kBlock + k] = row[i];
    }
  }
}

template <int N>
void dot_rows(const float* const* q, const float* panel, int64_t dim, vfloat (*s)[2]) {
  vfloat acc[N][2] = {};
  for (int64_t i = 0; i < dim; ++i) {
    const vfloat left = load(panel + i * kBlock), right = load(panel + i * kBlock + kLanes);
    for (int r = 0; r < N; ++r) {
      const float value = q[r][i];
      acc[r][0] += value * left;
      acc[r][1] += value * right;
    }
  }
  for (int r = 0; r < N; ++r) s[r][0] = acc[r][0], s[r][1] = acc[r][1];
}

using DotRows = void (*)(const float* const*, const float*, int64_t, vfloat (*)[2]);
constexpr DotRows kDotRows[kRows] = {dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>, dot_rows<5>, dot_rows<6>};

// Everything about one query row that turns its raw dot products into probabilities.
struct Row : Span {
  float lse;
  const float* bias;  // [R] or null
  float scale, softcap;

  Row(const AttentionStatsArgs& args, int64_t batch, int64_t head, int64_t index)
      : Span(args, batch, index), scale(args.scale), softcap(args.softcap) {
    lse = args.lse[(batch * args.heads + head) * args.length_q + index];
    if (lse == -INFINITY) high = -1;
    bias = bias_of(args, batch, head);
  }

  bool sees(const KeyBlock& block) const {
    return block.position[0] <= high && block.position[block.count - 1] >= low;
  }

  vfloat probability(vfloat s, const KeyBlock& block, int half) const {
    s *= scale;
    if (softcap) s = capped(s, softcap);
    if (bias) {
      vfloat shift;
      for (int i = 0; i < kLanes; ++i) {
        const int32_t region = block.region[half * kLanes + i];
        shift[i] = region >= 0 ? bias[region] : 0;
      }
      s += shift;
    }
    const vint position = load_raw<vint>(block.position + half * kLanes);
    const vint seen = (position >= splat(int32_t(low))) & (position <= splat(int32_t(high))) & (position >= 0);
    return seen ? exp(s - lse) : splat(0.0f);
  }
};

// Calls sum(head, row, p0, p1) with the probabilities of each (head of the group, row of the work) over the block.
template <class Sum>
void each_row(const AttentionStatsArgs& args, const StatsWork& work, const float* queries, const KeyBlock& block, Sum&& sum) {
  const int64_t per_group = args.heads / args.kv_heads, count = work.row_end - work.row_begin;
  const int64_t batch = work.group / args.kv_heads, first_head = work.group % args.kv_heads * per_group;
  const int64_t first_index = args.length_q - args.rows;
  for (int64_t start = 0; start < per_group * count; start += kRows) {
    const int n = int(per_group * count - start < kRows ? per_group * count - start : kRows);
    const float* q[kRows];
    for (int r = 0; r < n; ++r) q[r] = queries + (start + r) * args.dim;
    vfloat s[kRows][2];
    kDotRows[n - 1](q, block.panel, args.dim, s);
    for (int r = 0; r < n; ++r) {
      const int64_t head = first_head + (start + r) / count, index = work.row_begin + (start + r) % count;
      const Row row(args, batch, head, first_index + index);
      if (!row.sees(block)) continue;
      sum(head, index, row.probability(s[r][0], block, 0), row.probability(s[r][1], block, 1));
    }
  }
}

// The rows of the group's heads as floats, [heads of the group][rows][D], and room for the whole vectors of the last.
template <class T>
float* widen_queries(const AttentionStatsArgs& args, const StatsWork& work) {
  const int64_t per_group = args.heads / args.kv_heads, count = work.row_end - work.row_begin;
  const int64_t batch = work.group / args.kv_heads, first_head = work.group % args.kv_heads * per_group;
  float* queries = static_cast<float*>(std::malloc((per_group * count * args.dim + kLanes) * sizeof(float)));
  for (int64_t i = 0; i < per_group * count; ++i) {
    const int64_t index = args.length_q - args.rows + work.row_begin + i % count;
    const T* row = row_of<T>(args.query, args.query_stride, batch, first_head + i / count, index);
    widen_row(queries + i * args.dim, row, args.dim);
  }
  return queries;
}

// Takes the next keys from `next` on, up to a whole block: all of them for scores, which are stored side by side, else those
// in a region.
void fill(const AttentionStatsArgs& args, const int32_t* ids, int64_t& next, int64_t end, KeyBlock& block) {
  block.count = block.runs = 0;
  for (; block.count < kBlock && next < end; ++next) {
    const int32_t id = ids ? ids[next] : -1, region = id < args.num_regions ? id : -1;
    if (!args.scores && region < 0) continue;
    if (!block.count || region != block.region[block.count - 1]) ++block.runs;
    block.region[block.count] = region;
    block.position[block.count++] = int32_t(next);
  }
  for (int i = block.count; i < kBlock; ++i) block.region[i] = -1;
}

// Adds a row's probabilities to its masses [R], run by run of keys of one region.
void add_masses(const KeyBlock& block, float* mass, vfloat p0, vfloat p1) {
  if (block.runs == 1) {
    if (block.region[0] >= 0) mass[block.region[0]] += sum(p0 + p1);
    return;
  }
  alignas(64) float p[kBlock];
  store(p, p0), store(p + kLanes, p1);
  for (int i = 0; i < block.count;) {
    const int32_t region = block.region[i];
    float total = 0;
    for (; i < block.count && block.region[i] == region; ++i) total += p[i];
    if (region >= 0) mass[region] += total;
  }
}

void add_scores(const AttentionStatsArgs& args, float* scores, int count, vfloat p0, vfloat p1) {
  for (int i = 0; i < count; ++i) {
    const float p = i < kLanes ? p0[i] : p1[i - kLanes];
    if (args.reduce != Reduce::max) {
      scores[i] += p;
    } else if (scores[i] == scores[i] && !(p <= scores[i])) {  // written so that NaN wins, whenever it comes
      scores[i] = p;
    }
  }
}

// The keys of the work from the first to the last that one of its rows sees.
Span wanted_keys(const AttentionStatsArgs& args, const StatsWork& work) {
  const int64_t batch = work.group / args.kv_heads;
  int64_t first = work.key_end, last = work.key_begin - 1;
  for (int64_t row = work.row_begin; row < work.row_end; ++row) {
    const Span seen(args, batch, args.length_q - args.rows + row);
    if (seen.empty()) continue;
    first = seen.low < first ? seen.low : first;
    last = seen.high > last ? seen.high : last;
  }
  return {first > work.key_begin ? first : work.key_begin, last < work.key_end ? last : work.key_end - 1};
}

template <class T>
void attention_stats_typed(const AttentionStatsArgs& args, const StatsWork& work, float* mass) {
  const int64_t batch = work.group / args.kv_heads, kv_head = work.group % args.kv_heads;
  const int32_t* ids = ids_of(args, batch);
  const Span wanted = wanted_keys(args, work);
  if (wanted.empty()) return;
  float* queries = widen_queries<T>(args, work);
  KeyBlock block;
  block.panel = static_cast<float*>(std::malloc(kBlock * args.dim * sizeof(float)));
  for (int64_t next = wanted.low; fill(args, ids, next, wanted.high + 1, block), block.count;) {
    pack<T>(args, batch, kv_head, block);
    each_row(args, work, queries, block, [&](int64_t head, int64_t row, vfloat p0, vfloat p1) {
      const int64_t stat = batch * args.heads + head;
      if (args.mass) add_masses(block, mass + (stat * args.rows + row) * args.num_regions, p0, p1);
      if (args.scores) add_scores(args, args.scores + stat * args.length_k + block.position[0], block.count, p0, p1);
    });
  }
  if (args.scores && args.reduce == Reduce::mean) {
    for (int64_t h = kv_head * args.heads / args.kv_heads; h < (kv_head + 1) * args.heads / args.kv_heads; ++h)
      for (int64_t k = wanted.low; k <= wanted.high; ++k) args.scores[(batch * args.heads + h) * args.length_k + k] /= args.rows;
  }
  std::free(block.panel);
  std::free(queries);
}

}  // namespace

void attention_stats(const AttentionStatsArgs& args, const StatsWork& work, float* mass) {
  for_dtype(args.dtype, [&](auto zero) { attention_stats_typed<decltype(zero)>(args, work, mass); });
}

}  // namespace ras::cpu::RAS_FAST_ISA
