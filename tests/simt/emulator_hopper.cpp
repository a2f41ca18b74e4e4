// Hopper's asynchronous instructions on the host: mbarriers, tensor copies, warpgroup products, named barriers.
//
// Whatever the hardware may do late happens late, and whoever has not waited sees poison:
//   - a copy lands when somebody waits on its barrier; until then its bytes are NaN and nobody may read them. A thread may
//     read them only when it has itself waited for the phase that the copy counted on;
//   - a copy may only overwrite what every warp has finished reading, and has said so to the copying thread through barriers
//     (vector clocks, one entry a warp);
//   - the accumulators of a product are NaN from its start until the thread waits for the product's group. Operands in shared
//     memory count as being read until then. The product is computed from the descriptors, registers by PTX's layout.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"
#include "emulator_core.h"

namespace simt {
namespace {

constexpr int kWarp = 32, kWarpgroup = 128, kMaxWarps = 32, kGranule = 16;

// ------------------------------------------------------------------------------------------------------- who knows what

using Clock = std::array<uint32_t, kMaxWarps>;
std::array<Clock, kMaxWarps> clocks;  // clocks[w][v]: up to which of its releases warp w knows of warp v

int warp() { return int(thread_number()) / kWarp; }

void merge(Clock& into, const Clock& from) {
  for (int w = 0; w < kMaxWarps; ++w) into[w] = std::max(into[w], from[w]);
}

// What this warp has done so far becomes known to who acquires `clock`.
void release(Clock& clock) {
  merge(clock, clocks[warp()]);
  ++clocks[warp()][warp()];
}

bool knows(int other, uint32_t when) { return clocks[warp()][other] >= when; }

// --------------------------------------------------------------------------------------------------- barriers and copies

struct Copy {
  char* shared;
  TensorMap map;
  Corner corner;
};

struct Barrier {
  int index;
  unsigned expected, missing;
  int64_t bytes = 0;  // still to land
  uint32_t phase = 0;
  bool fenced = false;
  int init_warp;
  uint32_t init_time;
  Clock arrivals{}, over{};  // of the current phase, of the phases that are over
  std::deque<Copy> copies;
};

struct Granule {
  int barrier = -1;  // whose copy wrote it last; -1: none
  uint32_t phase = 0;
  bool landing = false;
  Clock readers{};
};

std::map<const void*, Barrier> barriers;
std::vector<Granule> granules;
std::vector<std::map<int, uint32_t>> seen;  // of each thread: phases known to be over, by barrier
unsigned random_state = 1;

Granule& granule_at(size_t offset) {
  if (offset / kGranule >= granules.size()) granules.resize(offset / kGranule + 1);
  return granules[offset / kGranule];
}

size_t offset_of(const void* shared) { return size_t(static_cast<const char*>(shared) - dynamic_shared()); }

Barrier& find(const void* address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("an mbarrier is used that nobody has initialised");
  Barrier& barrier = found->second;
  if (!knows(barrier.init_warp, barrier.init_time)) fail("an mbarrier is used with no barrier after its initialisation");
  return barrier;
}

void end_phase_if_complete(Barrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.missing = barrier.expected;
  merge(barrier.over, barrier.arrivals);
  note_progress();
}

size_t box_bytes(const TensorMap& map) { return size_t(2) * map.box[0] * map.box[1] * map.box[2] * map.box[3]; }

// Calls visit(offset in the box, offset in memory or -1) for each element of the box.
template <typename Visit>
void for_each_element(const TensorMap& map, const Corner& corner, Visit&& visit) {
  size_t linear = 0;
  for (int w = 0; w < map.box[3]; ++w) {
    for (int z = 0; z < map.box[2]; ++z) {
      for (int y = 0; y < map.box[1]; ++y) {
        for (int x = 0; x < map.box[0]; ++x, linear += 2) {
          const int64_t at[4] = {corner.at[0] + x, corner.at[1] + y, corner.at[2] + z, corner.at[3] + w};
          int64_t from = 0;
          for (int i = 0; i < 4; ++i) from = from < 0 || at[i] < 0 || at[i] >= map.size[i] ? -1 : from + at[i] * map.stride[i];
          visit(linear, from);
        }
      }
    }
  }
}

// The 128-byte swizzle: bits 4 .. 6 of an address are xored with bits 7 .. 9.
size_t swizzle(size_t offset) { return offset ^ ((offset >> 7 & 7) << 4); }

void land(Barrier& barrier) {
  random_state = random_state * 1664525u + 1013904223u;
  const size_t which = (random_state >> 16) % barrier.copies.size();
  const Copy copy = barrier.copies[which];
  barrier.copies.erase(barrier.copies.begin() + which);
  const size_t start = offset_of(copy.shared), bytes = box_bytes(copy.map);
  for_each_element(copy.map, copy.corner, [&](size_t linear, int64_t from) {
    if (from >= 0) check(copy.map.data + from, 2, false);
    char* to = dynamic_shared() + (copy.map.swizzle_128 ? swizzle(start + linear) : start + linear);
    from >= 0 ? std::memcpy(to, copy.map.data + from, 2) : std::memset(to, 0, 2);
  });
  for (size_t i = start; i < start + bytes; i += kGranule) granule_at(i).landing = false;
  barrier.bytes -= int64_t(bytes);
  end_phase_if_complete(barrier);
}

struct Named {
  int threads = 0, arrived = 0;
  uint32_t turns = 0;
  Clock arrivals{}, over{};
};
std::map<int, Named> named;

// ------------------------------------------------------------------------------------------------------------ products

// One product of a warpgroup, put together from its threads' calls.
struct Product {
  Wgmma call;
  std::array<float*, kWarpgroup> accumulators;
  int arrived = 0, warps_done = 0;  // threads; bits
  std::shared_ptr<Product> before;  // in flight on the same accumulators
  std::vector<float> a, result;     // [64, 16], [64, columns]; result holds what is added to until it is computed
  std::vector<size_t> reads;        // granules in shared memory
};

struct ThreadState {
  bool fenced = false;
  size_t products = 0;
  std::vector<std::vector<std::shared_ptr<Product>>> groups{1};  // committed, and the open one
};

std::vector<ThreadState> states;
std::vector<std::vector<std::shared_ptr<Product>>> called;  // of each warpgroup; null once every thread has called it
std::vector<std::shared_ptr<Product>> in_flight;            // still reading shared memory

ThreadState& state() { return states[thread_number()]; }

struct Descriptor {
  size_t start, panel, group;
  explicit Descriptor(uint64_t bits) : start((bits & 0x3fff) << 4), panel((bits >> 16 & 0x3fff) << 4), group((bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1) fail("wgmma descriptor: only 128-byte swizzle (1) is emulated, not %d", int(bits >> 62));
    if (bits >> 49 & 7) fail("wgmma descriptor: base offset %d, where patterns start at multiples of 1024", int(bits >> 49 & 7));
  }
  // Element (i of the rows or columns of the result, k); rows of k, or transposed: rows of i in panels of 64.
  size_t at(int i, int k, bool transposed) const {
    return swizzle(transposed ? start + i / 64 * panel + i % 64 * 2 + k / 8 * group + k % 8 * 128
                              : start + i / 8 * group + i % 8 * 128 + k * 2);
  }
};

float decode(uint16_t bits, bool half) { return half ? __half2float({bits}) : __bfloat162float({bits}); }

float load(size_t offset, bool half) {
  uint16_t bits;
  std::memcpy(&bits, dynamic_shared() + offset, 2);
  return decode(bits, half);
}

void add_reads(Product& product, const Descriptor& descriptor, int rows, bool transposed) {
  for (int i = 0; i < rows; ++i) {
    for (int k = 0; k < 16; ++k) product.reads.push_back(descriptor.at(i, k, transposed) / kGranule);
  }
}

std::shared_ptr<Product> new_product(const Wgmma& call) {
  auto product = std::make_shared<Product>();
  product->call = call;
  product->a.resize(64 * 16);
  product->result.resize(64 * call.columns);
  add_reads(*product, Descriptor(call.b_descriptor), call.columns, call.b_transposed);
  if (!call.a) add_reads(*product, Descriptor(call.a_descriptor), 64, false);
  std::sort(product->reads.begin(), product->reads.end());
  product->reads.erase(std::unique(product->reads.begin(), product->reads.end()), product->reads.end());
  return product;
}

void check_reads(const Product& product) {
  for (const size_t granule : product.reads) {
    const Granule& g = granule_at(granule * kGranule);
    if (g.barrier < 0) fail("wgmma reads byte %zu of shared memory, which no copy has written", granule * kGranule);
    const auto known = seen[thread_number()].find(g.barrier);
    if (g.landing || known == seen[thread_number()].end() || known->second <= g.phase) {
      fail("wgmma reads byte %zu of shared memory without having waited for the copy into it", granule * kGranule);
    }
  }
}

// Row and column of a thread's accumulator i: PTX ISA, "Register Fragments for wgmma".
int row_of(int i) { return int(thread_number()) % kWarpgroup / kWarp * 16 + lane() / 4 + i / 2 % 2 * 8; }
int column_of(int i) { return i / 4 * 8 + lane() % 4 * 2 + i % 2; }

void compute(Product& product) {
  const Wgmma& call = product.call;
  if (!call.a) {
    const Descriptor a(call.a_descriptor);
    for (int i = 0; i < 64; ++i) {
      for (int k = 0; k < 16; ++k) product.a[i * 16 + k] = load(a.at(i, k, false), call.half);
    }
  }
  const Descriptor descriptor(call.b_descriptor);
  std::vector<float> b(16 * call.columns);
  for (int k = 0; k < 16; ++k) {
    for (int j = 0; j < call.columns; ++j) b[k * call.columns + j] = load(descriptor.at(j, k, call.b_transposed), call.half);
  }
  if (product.before) product.result = product.before->result;
  product.before.reset();
  for (int i = 0; i < 64; ++i) {
    float* row = &product.result[i * call.columns];
    if (!call.add) std::fill(row, row + call.columns, 0.f);
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < call.columns; ++j) row[j] += product.a[i * 16 + k] * b[k * call.columns + j];
    }
  }
  note_progress();
}

void deposit_a(Product& product, const uint32_t* a) {
  for (int i = 0; i < 8; ++i) {  // a[i / 2] holds row g + 8 (i / 2 % 2), k 2 c + 8 (i / 4) + i % 2
    const int row = row_of(i / 2 % 2 * 2), k = lane() % 4 * 2 + i / 4 * 8 + i % 2;
    product.a[row * 16 + k] = decode(uint16_t(a[i / 2] >> (16 * (i % 2))), product.call.half);
  }
}

// This thread's accumulators appear; its warp has read the operands.
void finish(const std::shared_ptr<Product>& product) {
  float* d = product->accumulators[thread_number() % kWarpgroup];
  for (int i = 0; i < product->call.columns / 2; ++i) d[i] = product->result[row_of(i) * product->call.columns + column_of(i)];
  const int bit = 1 << (warp() % 4);
  if (product->warps_done & bit) return;
  product->warps_done |= bit;
  for (const size_t granule : product->reads) granule_at(granule * kGranule).readers[warp()] = clocks[warp()][warp()];
  if (product->warps_done == 15) in_flight.erase(std::find(in_flight.begin(), in_flight.end(), product));
}

bool same(const Wgmma& a, const Wgmma& b) {
  return a.columns == b.columns && !a.a == !b.a && a.a_descriptor == b.a_descriptor && a.b_descriptor == b.b_descriptor &&
         a.b_transposed == b.b_transposed && a.add == b.add && a.half == b.half;
}

}  // namespace

void start_hopper() {
  clocks = {};
  for (int w = 0; w < kMaxWarps; ++w) clocks[w][w] = 1;
  barriers.clear();
  granules.clear();
  named.clear();
  seen.assign(thread_count(), {});
  states.assign(thread_count(), {});
  called.assign((thread_count() + kWarpgroup - 1) / kWarpgroup, {});
  in_flight.clear();
}

void meet_all_warps() {
  Clock all{};
  for (const Clock& clock : clocks) merge(all, clock);
  for (int w = 0; w < kMaxWarps; ++w) {
    clocks[w] = all;
    ++clocks[w][w];
  }
}

uint32_t warp_time() { return clocks[warp()][warp()]; }

bool warp_knows(int other, uint32_t time) { return knows(other, time); }

void mbarrier_init(void* address, unsigned arrivals) {
  if (offset_of(address) % 8) fail("an mbarrier at byte %zu of shared memory: it needs a multiple of 8", offset_of(address));
  Barrier barrier{int(barriers.size()), arrivals, arrivals};
  barrier.init_warp = warp();
  barrier.init_time = clocks[warp()][warp()];
  barriers[address] = barrier;
}

void mbarrier_init_fence() {
  for (auto& [address, barrier] : barriers) barrier.fenced = true;
}

void mbarrier_arrive(void* address, unsigned expected_bytes) {
  Barrier& barrier = find(address);
  if (barrier.missing == 0) fail("an mbarrier for %u arrivals gets one more in the same phase", barrier.expected);
  barrier.bytes += expected_bytes;
  --barrier.missing;
  release(barrier.arrivals);
  end_phase_if_complete(barrier);
  pause();
}

void mbarrier_wait(void* address, unsigned parity) {
  Barrier& barrier = find(address);
  while ((barrier.phase & 1) == parity) {
    if (!barrier.copies.empty()) {
      land(barrier);
      pause();
    } else {
      wait_for_progress("mbarrier " + std::to_string(barrier.index) + ", phase " + std::to_string(barrier.phase) + ": " +
                        std::to_string(barrier.missing) + " arrivals and " + std::to_string(barrier.bytes) + " bytes never come");
    }
  }
  seen[thread_number()][barrier.index] = barrier.phase;
  merge(clocks[warp()], barrier.over);
}

void tma_load(void* shared, const TensorMap& map, void* address, Corner corner) {
  Barrier& barrier = find(address);
  if (!barrier.fenced) fail("a copy counts on an mbarrier that the copy engine may not see yet: mbarrier_init_fence is missing");
  const size_t start = offset_of(shared), bytes = box_bytes(map);
  const size_t alignment = map.swizzle_128 ? 1024 : 128;
  if (start % alignment) fail("a tensor copy to byte %zu of shared memory: it needs a multiple of %zu", start, alignment);
  check(shared, bytes, true);
  for (const auto& product : in_flight) {
    for (const size_t granule : product->reads) {
      if (granule * kGranule >= start && granule * kGranule < start + bytes) {
        fail("a copy overwrites byte %zu of shared memory, which a wgmma in flight reads", granule * kGranule);
      }
    }
  }
  for (size_t i = start; i < start + bytes; i += kGranule) {
    Granule& granule = granule_at(i);
    if (granule.landing) fail("a copy into byte %zu of shared memory, to which another copy is still on its way", i);
    for (int w = 0; w < kMaxWarps; ++w) {
      if (!knows(w, granule.readers[w])) fail("a copy overwrites byte %zu of shared memory before warp %d said it has read it", i, w);
    }
    granule = {barrier.index, barrier.phase, true, {}};
  }
  std::memset(shared, 0xff, bytes);
  barrier.copies.push_back({static_cast<char*>(shared), map, corner});
  note_progress();
}

void named_barrier(int name, int threads, bool wait) {
  if (name < 1 || name > 15 || threads % kWarp) fail("named barrier %d for %d threads: 1 .. 15, whole warps", name, threads);
  Named& barrier = named[name];
  if (barrier.arrived && barrier.threads != threads) {
    fail("named barrier %d is used for %d and for %d threads at once", name, barrier.threads, threads);
  }
  barrier.threads = threads;
  release(barrier.arrivals);
  const uint32_t turn = barrier.turns;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.turns;
    merge(barrier.over, barrier.arrivals);
    note_progress();
  }
  while (wait && barrier.turns == turn) {
    wait_for_progress("named barrier " + std::to_string(name) + " is reached by " + std::to_string(barrier.arrived) + " of " +
                      std::to_string(threads) + " threads");
  }
  if (wait) merge(clocks[warp()], barrier.over);
}

void wgmma(const Wgmma& call) {
  if (!state().fenced) fail("wgmma uses registers that were touched since the last wgmma_fence");
  auto& products = called[thread_number() / kWarpgroup];
  const size_t number = state().products++, member = thread_number() % kWarpgroup;
  if (number == products.size()) {
    products.push_back(new_product(call));
    in_flight.push_back(products.back());
  }
  const auto product = products[number];
  if (!same(product->call, call)) fail("threads of a warpgroup call different wgmmas");
  check_reads(*product);
  product->accumulators[member] = call.d;
  if (call.a) deposit_a(*product, call.a);
  for (const auto& group : state().groups) {
    for (const auto& other : group) {
      if (other->accumulators[member] == call.d) product->before = other;
    }
  }
  for (int i = 0; i < call.columns / 2; ++i) {
    if (!product->before) product->result[row_of(i) * call.columns + column_of(i)] = call.d[i];
    call.d[i] = NAN;
  }
  state().groups.back().push_back(product);
  if (++product->arrived == kWarpgroup) {
    compute(*product);
    products[number].reset();
  }
}

void wgmma_fence() { state().fenced = true; }
void wgmma_commit() { state().groups.emplace_back(); }

void wgmma_wait(int groups_still_pending) {
  pause();
  auto& groups = state().groups;
  while (int(groups.size()) - 1 > groups_still_pending) {
    for (const auto& product : groups.front()) {
      while (product->arrived < kWarpgroup) wait_for_progress("a wgmma is not called by the whole warpgroup");
      finish(product);
    }
    groups.erase(groups.begin());
  }
  state().fenced = false;
}

}  // namespace simt
