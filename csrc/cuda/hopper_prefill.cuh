// Attention of many query rows with the mass of every region, for Hopper: the tensor cores never wait for memory or softmax.
//
// A block walks the keys of one tile after the other, 128 (or 80) at a time; a tile is 64 query rows of one head for each warpgroup but
// the first. The next tile's first copies are on their way while this one's results are written.
//   * One warp of warpgroup 0 keeps two tiles of keys and two of values on their way (TMA); each tile has a barrier that says
//     "full" and one that says "empty". With the keys it tells which region they lie in. The rest of the warpgroup lends its
//     registers to the others.
//   * The other warpgroups, the consumers, own 64 rows each. A turn starts S = Q K^T of this step and O += P V of the step
//     before, and does the softmax of S while the tensor cores are still on O. They take turns at starting (named barriers), so
//     that one has its products running while the other is at its exponentials.
// Where O is narrow (D <= 64) and tiles are many, three consumers share a block: each is most of the time at the end of its own
// chain of instructions, and a third fills the gaps. They lack the registers for a softmax beside a product of their own.
// S, P and O live in registers: 64 + 32 + D/2 a thread, for D > 128 40 + 20 + 128. P needs no exchange: the accumulator layout of S is the operand layout
// that P V wants.
//
// Region mass is the row sum that online softmax has anyway, begun anew where the keys enter another region (RegionSums in
// online_softmax.cuh); only a step whose keys mix regions is summed once for each, and the last one's run stays open. Registers do
// not depend on R.
//
// Framework-free: hopper_prefill.cu is the launcher. Layouts: PTX ISA, "wgmma", "Register Fragments" and "Matrix Descriptor".
#pragma once

#include "online_softmax.cuh"

#if defined(__CUDACC__)
#include "hopper_ptx.cuh"
#else
#include "hopper_twin.h"
#endif

namespace ras::cuda {

constexpr int kWarpgroup = 128;
constexpr int kConsumerRows = 64;  // of a consumer warpgroup: the height of a wgmma
constexpr int kStages = 2;
constexpr int kMixed = -2;         // in place of a region: a step's keys lie in several, -1 (none) being one

// The keys of a step. At D = 256 80 are what registers and shared memory have room for, and fewer would have the tensor cores
// wait for shared memory: a product reads its 64 rows of Q for every 64 keys as for every 80.
constexpr int prefill_keys(int dim) { return dim <= 128 ? 128 : 80; }

// A block by its width and the number of its consumers. Registers are a thread's: (40 + 2 * 232) * 128 = 64512 of 65536,
// (32 + 3 * 160) * 128 all of them.
template <int kDim, int kConsumers>
struct PrefillShape {
  static constexpr int kRows = kConsumerRows * kConsumers, kKeys = prefill_keys(kDim);
  static constexpr int kIdWords = (kKeys + kWarp - 1) / kWarp;  // ids of a step that a lane holds
  static constexpr int kThreads = kWarpgroup * (1 + kConsumers);
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32, kConsumerRegisters = kConsumers == 2 ? 232 : 160;
};

// Shared memory holds a tile as panels of 64 columns, 128 bytes a row: the widest rows that TMA swizzles, and wgmma reads
// without bank conflicts. 8 rows are the 1024 bytes in which the swizzle repeats.
constexpr int kPanelColumns = 64;
constexpr int kPanelRowBytes = 128;
constexpr int kPatternBytes = 8 * kPanelRowBytes;

template <typename T, int kRows, int kDim>
struct alignas(kPatternBytes) PanelTile {
  T panel[kDim / kPanelColumns][kRows][kPanelColumns];
};

template <typename T, int kDim, int kConsumers>
struct PrefillShared {
  using Shape = PrefillShape<kDim, kConsumers>;
  PanelTile<T, Shape::kRows, kDim> query;
  PanelTile<T, Shape::kKeys, kDim> key[kStages], value[kStages];
  int region[kStages];  // of a stage's keys, or kMixed; written before they are full, read before they are empty
  Mbarrier query_full, query_empty, key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
};

template <typename T>
struct PrefillArgs {
  CUtensorMap query, key, value;  // [B, H, L, D]; boxes of a panel
  T* out;                         // [B, Lq, Hq, D]
  float* lse;                     // [B, Hq, Lq]
  float* mass;                    // [B, Hq, mass_rows, R]
  const int32_t* region_ids;      // [B, Lk]
  int64_t ids_batch_stride;
  int dim;                        // D, at most the kernel's own; TMA fills what lies between with zeros
  int batch, heads, group;        // B, Hq, query heads of a key/value head
  int query_rows, keys;           // Lq, Lk > 0
  int regions, mass_rows;
  bool shared_sums;               // whether the sums by region fit into shared memory behind PrefillShared
  bool causal;
  float scale_log2;               // scale * log2(e), positive
};

// A shared-memory operand with 128-byte swizzle: where it starts, and the bytes from one panel of 64 columns, and from one
// group of 8 rows, to the next.
__device__ inline uint64_t wgmma_descriptor(const void* start, int panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  const auto field = [](uint64_t bytes) { return (bytes >> 4) & 0x3fff; };
  return kSwizzle128 | field(kPatternBytes) << 32 | field(panel_bytes) << 16 | field(shared_address(start));
}

// ------------------------------------------------------------------------------------------------------ what to do

__host__ __device__ constexpr int row_tiles(int rows, int tile_rows) { return (rows + tile_rows - 1) / tile_rows; }

// kRows query rows of one head, and the steps that its keys take.
template <typename T, typename Shape>
struct PrefillTile {
  static constexpr int kRows = Shape::kRows, kKeys = Shape::kKeys, kIdWords = Shape::kIdWords;

  const PrefillArgs<T>& args;
  int index, head, batch, first_row, steps;
  bool tracked;  // whether masses of the tile's rows are wanted

  // In the order of `index` all heads' last rows come first: under a causal mask they see the most keys.
  __device__ PrefillTile(const PrefillArgs<T>& args, int index) : args(args), index(index) {
    const int heads = args.heads * args.batch, before = index / heads, of_all = index - before * heads;
    batch = of_all / args.heads;
    head = of_all - batch * args.heads;
    first_row = (row_tiles(args.query_rows, kRows) - 1 - before) * kRows;
    const int last_row = min(first_row + kRows, args.query_rows) - 1;
    // At least one step, if only to find that no row sees a key.
    steps = max((last_key(last_row) + kKeys) / kKeys, 1);
    tracked = first_row + kRows > args.query_rows - args.mass_rows;
  }

  // The last key that a row sees; before the first: none.
  __device__ int last_key(int row) const { return args.causal ? row + args.keys - args.query_rows : args.keys - 1; }

  // Of the step's keys lane, lane + 32, ... Beyond the step's last key, and the last of all, nothing has weight: its region keeps
  // a step of one region what it is.
  __device__ void load_ids(int (&ids)[kIdWords], int step) const {
    const int32_t* all = args.region_ids + batch * args.ids_batch_stride;
#pragma unroll
    for (int w = 0; w < kIdWords; ++w) {
      int key = kWarp * w + int(threadIdx.x) % kWarp;
      if constexpr (kKeys % kWarp != 0) key = min(key, kKeys - 1);
      ids[w] = all[min(step * kKeys + key, args.keys - 1)];
    }
  }

  // The region that these ids of all lanes have in common, -1 for none, or kMixed. Ids outside 0 .. regions - 1 count as none.
  __device__ int common_region(const int (&ids)[kIdWords]) const {
    const auto region_of = [&](int id) { return unsigned(id) < unsigned(args.regions) ? id : -1; };
    const int first = __shfl_sync(kFullWarp, region_of(ids[0]), 0);
    bool alike = true;
#pragma unroll
    for (int id : ids) alike = alike && region_of(id) == first;
    return __all_sync(kFullWarp, alike) ? first : kMixed;
  }

  __device__ int64_t stat_row(int row) const { return (int64_t(batch) * args.heads + head) * args.query_rows + row; }
};

// Calls use(tile, round) for each of the block's tiles, of which every round of the grid has one. Rounds change direction: who
// got the longest tile of one gets the shortest of the next.
template <typename Shape, typename T, typename Use>
__device__ void for_each_tile(const PrefillArgs<T>& args, Use use) {
  const int blocks = gridDim.x, block = blockIdx.x;
  const int tiles = row_tiles(args.query_rows, Shape::kRows) * args.heads * args.batch;
  for (int round = 0;; ++round) {
    const int index = round * blocks + (round % 2 ? blocks - 1 - block : block);
    if (index >= tiles) return;
    use(PrefillTile<T, Shape>(args, index), round);
  }
}

// A step by its number among all steps of the block: the stage whose buffers it uses, and the parity of their barriers' phase.
struct StageOf {
  int stage, parity;
  __device__ explicit StageOf(int number) : stage(number % kStages), parity(number / kStages % 2) {}
};

// -------------------------------------------------------------------------------------------------------- producer

// A tile's panels, and the bytes that `full` then waits for.
template <typename T, int kRows, int kDim>
__device__ void load_tile(PanelTile<T, kRows, kDim>& to, const CUtensorMap& map, Mbarrier& full, int row, int head, int batch) {
  mbarrier_arrive_expect_tx(full, sizeof(to.panel));
#pragma unroll
  for (int i = 0; i < kDim / kPanelColumns; ++i) tma_load(to.panel[i], map, full, i * kPanelColumns, row, head, batch);
}

// By one warp, of which a lane asks for the copies. The consumers, who have the softmax to do, would spend a tenth of their
// instructions on finding the regions; here a step's ids are on their way with its keys, most of them before.
template <bool kMass, typename T, int kDim, int kConsumers>
__device__ void produce(PrefillShared<T, kDim, kConsumers>& shared, const PrefillArgs<T>& args) {
  using Shape = PrefillShape<kDim, kConsumers>;
  const bool copies = threadIdx.x % kWarp == 0;
  int number = 0;
  for_each_tile<Shape>(args, [&](const PrefillTile<T, Shape>& tile, int round) {
    const int kv_head = tile.head / args.group;
    const bool tells = kMass && tile.tracked;
    int ids[Shape::kIdWords];
    if (tells) tile.load_ids(ids, 0);
    mbarrier_wait(shared.query_empty, round % 2 ^ 1);
    if (copies) load_tile(shared.query, args.query, shared.query_full, tile.first_row, tile.head, tile.batch);
#pragma unroll 1
    for (int step = 0; step < tile.steps; ++step, ++number) {
      const auto [stage, parity] = StageOf(number);
      mbarrier_wait(shared.key_empty[stage], parity ^ 1);
      if (copies) load_tile(shared.key[stage], args.key, shared.key_full[stage], step * Shape::kKeys, kv_head, tile.batch);
      if constexpr (kMass) {
        const int region = tells ? tile.common_region(ids) : -1;
        if (copies) {
          shared.region[stage] = region;
          mbarrier_arrive(shared.key_full[stage]);
        }
        if (tells) tile.load_ids(ids, step + 1);
      }
      mbarrier_wait(shared.value_empty[stage], parity ^ 1);
      if (!copies) continue;
      load_tile(shared.value[stage], args.value, shared.value_full[stage], step * Shape::kKeys, kv_head, tile.batch);
    }
  });
}

// -------------------------------------------------------------------------------------------------------- consumers

// Lane c of a quad gives v[i] to lane i and gets lane i's v[c], in two steps that exchange half of the values each.
__device__ inline void transpose_quad(uint32_t (&v)[4], int c) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = c & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t give = upper ? v[i] : v[i + bit], got = __shfl_xor_sync(kFullWarp, give, bit);
      (upper ? v[i] : v[i + bit]) = got;
    }
  }
}

__device__ inline int which_consumer() { return in_place(int(threadIdx.x)) / kWarpgroup - 1; }

// A thread of a consumer warpgroup with a tile, lane (g, c) of its warp: the warp's rows g and g + 8. scores[4 t + 2 half + e]
// belongs to row g + 8 half and key 8 t + 2 c + e of the step; out likewise with dimensions for keys.
template <typename T, int kDim, int kConsumers, bool kMass>
struct Consumer {
  using Shape = PrefillShape<kDim, kConsumers>;
  using Tile = PrefillTile<T, Shape>;
  static constexpr int kKeys = Shape::kKeys, kScores = kKeys / 2, kOut = kDim / 2;
  static constexpr bool kRoomy = kConsumers == 2;  // registers for what waits a whole step, or a whole tile
  // Whether mixed steps are summed behind the wait for O, beside which the softmax's last sums run then. At 256 dimensions ptxas
  // would put the exponentials there as well.
  static constexpr bool kMixedLast = kDim <= 128;

  PrefillShared<T, kDim, kConsumers>& shared;
  const Tile& tile;
  int last_key;                 // that the warp's first row sees
  float top[2], sum[2];         // of the scores so far, base 2: maximum (of the row), this lane's share of the sum
  float out[kOut];
  RegionSums<2, true> regions;
  int region, ids[Shape::kIdWords];  // of the step's keys; where those are mixed, of each

  __device__ Consumer(PrefillShared<T, kDim, kConsumers>& shared, const Tile& tile)
      : shared(shared), tile(tile), last_key(tile.last_key(warp_row(tile))) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = -INFINITY;
      sum[half] = 0.f;
    }
#pragma unroll
    for (int i = 0; i < kOut; ++i) out[i] = 0.f;
  }

  // The tile, or, where registers are short, its numbers found again: between its ends they would wait in registers.
  __device__ Tile same_tile() const {
    if constexpr (kRoomy) return tile;
    return Tile(tile.args, in_place(tile.index));
  }
  __device__ static int warp_row(const Tile& tile) {
    return tile.first_row + (int(threadIdx.x) / kWarp - kWarpgroup / kWarp) * 16;
  }
  __device__ static int row_of(const Tile& tile, int half) { return warp_row(tile) + int(threadIdx.x) % kWarp / 4 + 8 * half; }

  __device__ static float* mass_of(const Tile& tile, int half) {
    const PrefillArgs<T>& args = tile.args;
    const int64_t head = int64_t(tile.batch) * args.heads + tile.head;
    return args.mass + (head * args.mass_rows + row_of(tile, half) - (args.query_rows - args.mass_rows)) * args.regions;
  }

  // Where the sums by region are: in shared memory, or, where R is too large for that, in the masses' own place. Where
  // registers are short this is said again whenever a region is folded.
  __device__ void find_totals() {
    const PrefillArgs<T>& args = tile.args;
    const int warp_row = ((kRoomy ? int(threadIdx.x) : in_place(int(threadIdx.x))) - kWarpgroup) / kWarp * 16;
    float* own = reinterpret_cast<float*>(&shared + 1) + (warp_row + int(threadIdx.x) % kWarp / 4) * args.regions;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      regions.totals[half] = own + 8 * half * args.regions;
      regions.ok[half] = true;
    }
    if (args.shared_sums) return;
    const Tile here = same_tile();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      regions.totals[half] = mass_of(here, half);
      regions.ok[half] = is_wanted(here, half);
    }
  }

  __device__ static bool is_wanted(const Tile& tile, int half) {
    const int row = row_of(tile, half), rows = tile.args.query_rows;
    return row < rows && row >= rows - tile.args.mass_rows;
  }

  __device__ void begin_regions() {
    regions.regions = tile.args.regions;
    find_totals();
    regions.begin(regions.ok);
    regions.clear();
  }

  // One lane of each warp says that the warp has read a tile; the producer waits for all warps.
  __device__ void release(Mbarrier& empty) const {
    if (threadIdx.x % kWarp == 0) mbarrier_arrive(empty);
  }

  __device__ void start_scores(float (&scores)[kScores], int stage) const {
    const uint64_t query = wgmma_descriptor(shared.query.panel[0][kConsumerRows * which_consumer()], 0);
    const uint64_t key = wgmma_descriptor(shared.key[in_place(stage)].panel[0], 0);
#pragma unroll
    for (int k = 0; k < kDim; k += 16) {  // in units of 16 bytes, as descriptors count
      const int column = k % kPanelColumns * sizeof(T) / 16, panel = k / kPanelColumns;
      wgmma_shared<T>(scores, query + column + panel * int(sizeof(shared.query.panel[0]) / 16),
                      key + column + panel * int(sizeof(shared.key[stage].panel[0]) / 16), k > 0);
    }
    wgmma_commit();
  }

  __device__ void start_out(const uint32_t (&p)[kScores / 2], int stage) {
    const uint64_t value = wgmma_descriptor(shared.value[in_place(stage)].panel[0], sizeof(shared.value[stage].panel[0]));
#pragma unroll
    for (int k = 0; k < kKeys; k += 16) wgmma_registers<T>(out, p + k / 4, value + k * kPanelRowBytes / 16);
    wgmma_commit();
  }

  // The consumers start their products in turns: 0, 1, 0, 1, ... A barrier's name is that of who waits at it.
  __device__ void wait_for_turn() const { bar_sync(1 + which_consumer(), 2 * kWarpgroup); }
  __device__ void pass_turn() const {
    const int next = which_consumer() + 1;
    bar_arrive(next == kConsumers ? 1 : 1 + next, 2 * kWarpgroup);
  }

  __device__ void mask(float (&scores)[kScores], int first_key) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int lane = in_place(int(threadIdx.x)) % kWarp;
      const int own = last_key + (tile.args.causal ? lane / 4 + 8 * half : 0), last = own - first_key - lane % 4 * 2;
#pragma unroll
      for (int i = 2 * half; i < kScores; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (2 * (i - 2 * half) + e > last) scores[i + e] = -INFINITY;
        }
      }
    }
  }

  // Reads where the step's keys lie and ends the run of keys before them, all while the tensor cores are busy. One lane of a warp
  // reads, the one that will call the keys empty.
  __device__ void enter_region(StageOf at, int step) {
    if (threadIdx.x % kWarp == 0) region = shared.region[at.stage];
    region = __shfl_sync(kFullWarp, region, 0);
    if (kRoomy && region == kMixed) tile.load_ids(ids, step);
    if (region == regions.current) return;
    if constexpr (!kRoomy) find_totals();
    regions.enter(region, sum, top);
  }

  // Scores become probabilities in units of 2^top; what was summed before has to shrink by `shrink`.
  __device__ void softmax(float (&scores)[kScores], float (&shrink)[2], int step) {
    const int first_key = step * kKeys;
    if (first_key + kKeys - 1 > last_key) mask(scores, first_key);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float highest = -INFINITY;
#pragma unroll
      for (int i = 2 * half; i < kScores; i += 4) highest = fmaxf(highest, fmaxf(scores[i], scores[i + 1]));
      const float old = top[half];
      top[half] = fmaxf(old, quad_max(highest) * tile.args.scale_log2);
      const float shift = finite_or_zero(top[half]);
      shrink[half] = exp2_approximate(old - shift);
      float part = 0.f;
#pragma unroll
      for (int i = 2 * half; i < kScores; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          scores[i + e] = exp2_approximate(fmaf(scores[i + e], tile.args.scale_log2, -shift));
          part += scores[i + e];
        }
      }
      sum[half] = sum[half] * shrink[half] + part;
    }
  }

  // Tells the regions of a mixed step's probabilities p apart, one after the other. The last one's run stays open: where a region
  // begins or ends, no run is folded but beside the products.
  __device__ void split_if_mixed(const float (&p)[kScores], int step) {
    if (region != kMixed) return;
    if constexpr (!kRoomy) {
      find_totals();
      same_tile().load_ids(ids, step);
    }
    float part[2];
    while (true) {
      unsigned lowest = regions.regions;  // -1, in no region and those done, is the highest number
#pragma unroll
      for (int id : ids) lowest = min(lowest, unsigned(id));
      lowest = __reduce_min_sync(kFullWarp, lowest);
      if (lowest == unsigned(regions.regions)) break;
      if (regions.current >= 0) regions.fold(regions.current, part, top);
      regions.current = int(lowest);
      part[0] = part[1] = 0.f;
#pragma unroll
      for (int w = 0; w < Shape::kIdWords; ++w) {
        const bool found = unsigned(ids[w]) == lowest;
        add_keys(p + kWarp / 2 * w, min(kScores - kWarp / 2 * w, kWarp / 2), __ballot_sync(kFullWarp, found), part);
        if (found) ids[w] = -1;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      regions.before[half] += sum[half] - part[half];
      sum[half] = part[half];
    }
  }

  // Adds this lane's probabilities, `count` of them, of 2 count keys (32, or the last 16), of those whose bits are set.
  __device__ void add_keys(const float* p, int count, unsigned keys, float (&part)[2]) const {
    const unsigned mine = keys >> 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (mine >> (i / 4 * 8 + i % 2) & 1) part[i / 2 % 2] += p[i];
    }
  }

  __device__ void pack(uint32_t (&p)[kScores / 2], const float (&scores)[kScores]) const {
#pragma unroll
    for (int i = 0; i < kScores / 2; ++i) p[i] = pack_pair<T>(scores[2 * i], scores[2 * i + 1]);
  }

  // Scores become probabilities, and on return the step's values have arrived.
  __device__ void softmax_and_await_values(float (&scores)[kScores], float (&shrink)[2], int step, StageOf at) {
    softmax(scores, shrink, step);
    // Waited for as late as here, because a loop is what keeps ptxas from moving the exponentials behind the wgmma_wait that
    // follows, beside idle tensor cores.
    keep_in_registers(scores);
    mbarrier_wait(shared.value_full[at.stage], at.parity);
  }

  // Up to the start of a step's scores; the turn is still this consumer's.
  __device__ void begin_step(float (&scores)[kScores], StageOf at) {
    mbarrier_wait(shared.key_full[at.stage], at.parity);
    wait_for_turn();
    wgmma_fence();
    start_scores(scores, at.stage);
  }

  // The steps of the tile; `number` of others came before.
  // kTracked: masses of the tile's rows are wanted. The others run the code of a kernel without masses.
  template <bool kTracked>
  __device__ void walk(int number) {
    float scores[kScores], shrink[2];
    uint32_t p[kScores / 2];
    {
      const StageOf at(number);
      begin_step(scores, at);
      pass_turn();
      if constexpr (kTracked) {
        begin_regions();
        enter_region(at, 0);
      }
      wgmma_wait<0>(scores);
      release(shared.key_empty[at.stage]);
      softmax_and_await_values(scores, shrink, 0, at);
      if constexpr (kTracked) split_if_mixed(scores, 0);
      pack(p, scores);
    }
    for (int step = 1; step < tile.steps; ++step) {
      const StageOf at(number + step), before(number + step - 1);
      begin_step(scores, at);
      start_out(p, before.stage);
      pass_turn();
      if constexpr (kTracked) enter_region(at, step);
      if constexpr (kRoomy) {
        wgmma_wait<1>(scores);
      } else {
        wgmma_wait<0>(scores, out, p);
        release(shared.value_empty[before.stage]);
      }
      release(shared.key_empty[at.stage]);
      softmax_and_await_values(scores, shrink, step, at);
      if constexpr (kTracked && !kMixedLast) {
        regions.rescale(shrink);
        split_if_mixed(scores, step);
      }
      if constexpr (kRoomy) {
        wgmma_wait<0>(out, p);
        release(shared.value_empty[before.stage]);
      }
      if (!__all_sync(kFullWarp, shrink[0] == 1.f && shrink[1] == 1.f)) {
        if constexpr (kTracked && kMixedLast) regions.rescale(shrink);
#pragma unroll
        for (int i = 0; i < kOut; ++i) out[i] *= shrink[i / 2 % 2];
      }
      if constexpr (kTracked && kMixedLast) split_if_mixed(scores, step);
      pack(p, scores);
    }
    release(shared.query_empty);
    const StageOf last(number + tile.steps - 1);
    wgmma_fence();
    start_out(p, last.stage);
    write_statistics<kTracked>();
    wgmma_wait<0>(out, p);
    release(shared.value_empty[last.stage]);
  }

  // LSE and masses, beside the tile's last product. `sum` becomes the whole row's.
  template <bool kTracked>
  __device__ void write_statistics() {
    const Tile tile = same_tile();
    if constexpr (kTracked) {
      if constexpr (!kRoomy) find_totals();
      regions.close(sum, top);
      __syncwarp();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = quad_sum(sum[half]);
      const float lse = top[half] + log2_approximate(sum[half]);
      if (row_of(tile, half) >= tile.args.query_rows) continue;
      if (threadIdx.x % 4 == 0) tile.args.lse[tile.stat_row(row_of(tile, half))] = lse * kLn2;
      if constexpr (kTracked) {
        if (!is_wanted(tile, half)) continue;
        const float *sums = regions.totals[half], shift = finite_or_zero(lse);
        for (int r = threadIdx.x % 4; r < regions.regions; r += 4) mass_of(tile, half)[r] = exp2_approximate(sums[r] - shift);
      }
    }
    __syncwarp();  // what waits for the product is the whole warp
  }

  __device__ void write_out() {
    const Tile tile = same_tile();
#pragma unroll
    for (int half = 0; half < 2; ++half) store_out(tile, half, 1.f / (sum[half] == 0.f ? 1.f : sum[half]));
  }

  // The four lanes of a row hold two neighbours of every 8 dimensions each. They trade until lane c has all 8 of every fourth
  // such group, and stores 16 bytes at a time.
  __device__ void store_out(const Tile& tile, int half, float factor) const {
    const int c = threadIdx.x % 4, row = row_of(tile, half);
    const int64_t at = (int64_t(tile.batch) * tile.args.query_rows + row) * tile.args.heads + tile.head;
    T* to = tile.args.out + at * tile.args.dim + 8 * c;
#pragma unroll
    for (int t = 0; t < kDim / 8; t += 4) {
      uint32_t group[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = 4 * (t + i) + 2 * half;
        group[i] = pack_pair<T>(out[o] * factor, out[o + 1] * factor);
      }
      transpose_quad(group, c);
      if (row >= tile.args.query_rows || 8 * (t + c) >= tile.args.dim) continue;
      *reinterpret_cast<uint4*>(to + 8 * t) = {group[0], group[1], group[2], group[3]};
    }
  }
};

template <bool kMass, typename T, int kDim, int kConsumers>
__device__ void consume(PrefillShared<T, kDim, kConsumers>& shared, const PrefillArgs<T>& args) {
  using Shape = PrefillShape<kDim, kConsumers>;
  int number = 0;
  if (which_consumer() == kConsumers - 1) bar_arrive(1, 2 * kWarpgroup);  // the first turn is consumer 0's
  for_each_tile<Shape>(args, [&](const PrefillTile<T, Shape>& tile, int round) {
    Consumer<T, kDim, kConsumers, kMass> consumer(shared, tile);
    mbarrier_wait(shared.query_full, round % 2);
    // Tiles of which no masses are wanted run the code of a kernel without masses, but where products take so long that a few
    // instructions more of softmax go unnoticed.
    if (kMass && (kDim > 128 || tile.tracked)) {
      consumer.template walk<kMass>(number);
    } else {
      consumer.template walk<false>(number);
    }
    number += tile.steps;
    consumer.write_out();
  });
  if (which_consumer() == 0) bar_sync(1, 2 * kWarpgroup);  // the turn that nobody takes
}

// ---------------------------------------------------------------------------------------------------------- kernel

template <typename T, int kDim, int kConsumers, bool kMass>
__global__ void __launch_bounds__(PrefillShape<kDim, kConsumers>::kThreads, 1)
prefill_kernel(const __grid_constant__ PrefillArgs<T> args) {
  using Shape = PrefillShape<kDim, kConsumers>;
  auto& shared = *reinterpret_cast<PrefillShared<T, kDim, kConsumers>*>(dynamic_shared());
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(args.query);
    tma_prefetch_descriptor(args.key);
    tma_prefetch_descriptor(args.value);
    constexpr int kReaders = kConsumers * kWarpgroup / kWarp;
    mbarrier_init(shared.query_full, 1);
    mbarrier_init(shared.query_empty, kReaders);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared.key_full[stage], kMass ? 2 : 1);  // the copies, and the region
      mbarrier_init(shared.value_full[stage], 1);
      mbarrier_init(shared.key_empty[stage], kReaders);
      mbarrier_init(shared.value_empty[stage], kReaders);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  wait_for_previous_kernel();
  if (threadIdx.x < kWarpgroup) {
    setmaxnreg_dec<Shape::kProducerRegisters>();
    if (threadIdx.x < kWarp) produce<kMass>(shared, args);
  } else {
    setmaxnreg_inc<Shape::kConsumerRegisters>();
    consume<kMass>(shared, args);
  }
}

// ------------------------------------------------------------------------------------------------------------ host

constexpr bool prefill_supports_head_dim(int dim) { return dim > 0 && dim <= 256 && dim % 8 == 0; }

struct MappedTensor {
  const void* data;
  int64_t batch, heads, rows, dim;
  int64_t stride[3];  // of the first three, in elements
};

// A map of the tensor in boxes of `box_rows` rows by one panel; `encode` is cuTensorMapEncodeTiled.
template <typename T, typename Encode>
CUresult encode_panels(Encode encode, CUtensorMap* map, const MappedTensor& t, int box_rows) {
  const cuuint64_t sizes[4] = {cuuint64_t(t.dim), cuuint64_t(t.rows), cuuint64_t(t.heads), cuuint64_t(t.batch)};
  cuuint64_t strides[3];
  for (int i = 0; i < 3; ++i) {  // the stride of a dimension of one may be anything, and the driver would refuse some
    strides[i] = sizes[i + 1] == 1 ? t.dim * sizeof(T) : t.stride[2 - i] * sizeof(T);
  }
  const cuuint32_t box[4] = {kPanelColumns, cuuint32_t(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode(map, type, 4, const_cast<void*>(t.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

constexpr size_t kPrefillMostShared = 227 * 1024;  // that a block may have on sm_90

// How many consumers a block has: a third one wants rows of 64 dimensions at most, and enough tiles for all multiprocessors to
// end alike.
inline int prefill_consumers(int dim, int query_rows, int64_t heads, int multiprocessors) {
  const bool many = row_tiles(query_rows, PrefillShape<64, 3>::kRows) * heads >= 4 * int64_t(multiprocessors);
  return dim <= 64 && many ? 3 : 2;
}

// Calls start(kernel, threads, bytes of shared memory) for the instance that fits; says in `args` where the sums by region go.
template <typename T, typename Start>
void with_prefill_kernel(int dim, int consumers, PrefillArgs<T>& args, Start&& start) {
  const auto pick = [&](auto width, auto number) {
    constexpr int kDim = decltype(width)::value, kConsumers = decltype(number)::value;
    using Shape = PrefillShape<kDim, kConsumers>;
    constexpr size_t kBytes = sizeof(PrefillShared<T, kDim, kConsumers>);
    const size_t sums = sizeof(float) * Shape::kRows * args.regions;
    args.shared_sums = kBytes + sums <= kPrefillMostShared;
    const auto kernel = args.mass ? prefill_kernel<T, kDim, kConsumers, true> : prefill_kernel<T, kDim, kConsumers, false>;
    start(kernel, Shape::kThreads, kBytes + (args.shared_sums ? sums : 0));
  };
  using std::integral_constant;
  args.dim = dim;
  if (dim > 128) return pick(integral_constant<int, 256>{}, integral_constant<int, 2>{});
  if (dim > 64) return pick(integral_constant<int, 128>{}, integral_constant<int, 2>{});
  if (consumers == 2) return pick(integral_constant<int, 64>{}, integral_constant<int, 2>{});
  pick(integral_constant<int, 64>{}, integral_constant<int, 3>{});
}

}  // namespace ras::cuda
