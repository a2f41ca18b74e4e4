// A tile of matrices goes through every asynchronous step of Hopper, with at most one planted mistake: the emulator must find it.
// Out[64, 64] = a[64, 64] b[64, 64]^T, then b is overwritten by c and Out += a c^T.
#include "hopper_twin.h"

using namespace ras::cuda;

namespace {

enum Fault {
  kNone, kNoWaitForCopy, kWrongParity, kEarlyRelease, kNoRelease, kNoWaitForRelease, kNoWgmmaWait, kNoFence, kNoCommit,
  kTooFewBytes, kTooManyBytes, kNoInitFence, kNoSync, kWrongGroupStride, kNoSwizzle, kUnalignedTile, kLonelyTurn,
  kEarlyRead, kLateWrite
};

using Half = __half;
constexpr int kTile = 64 * 64 * sizeof(Half);

struct Shared {
  alignas(1024) Half a[64][64], b[64][64];
  Mbarrier full_a, full_b, empty_b;
  volatile int note;  // an ordinary variable that full_a hands over as well
};

uint64_t descriptor(const void* start, int group_bytes, bool swizzled) {
  return uint64_t(swizzled) << 62 | uint64_t(group_bytes >> 4) << 32 | uint64_t(shared_address(start) >> 4);
}

void produce(Shared& shared, const CUtensorMap& a, const CUtensorMap& b, const CUtensorMap& c, Fault fault) {
  const int bytes = kTile + (fault == kTooManyBytes ? 16 : fault == kTooFewBytes ? -16 : 0);
  if (fault != kLateWrite) shared.note = 1;
  mbarrier_arrive_expect_tx(shared.full_a, bytes);
  if (fault == kLateWrite) shared.note = 1;
  tma_load(fault == kUnalignedTile ? shared.a[4] : shared.a[0], a, shared.full_a, 0, 0, 0, 0);
  mbarrier_arrive_expect_tx(shared.full_b, kTile);
  tma_load(shared.b, b, shared.full_b, 0, 0, 0, 0);
  if (fault != kNoWaitForRelease) mbarrier_wait(shared.empty_b, 0);
  mbarrier_arrive_expect_tx(shared.full_b, kTile);
  tma_load(shared.b, c, shared.full_b, 0, 0, 0, 0);
}

void multiply(float (&d)[32], Shared& shared, bool add, Fault fault) {
  const int group = fault == kWrongGroupStride ? 512 : 1024;
  for (int k = 0; k < 4; ++k) {
    simt::wgmma({d, 64, nullptr, descriptor(shared.a, group, fault != kNoSwizzle) + 2 * k,
                 descriptor(shared.b, group, fault != kNoSwizzle) + 2 * k, false, add || k > 0, true});
  }
}

void consume(Shared& shared, float* out, Fault fault) {
  float d[32];
  const auto release = [&] {
    if (threadIdx.x % 32 == 0 && fault != kNoRelease) mbarrier_arrive(shared.empty_b);
  };
  int note = fault == kEarlyRead ? shared.note : 0;
  mbarrier_wait(shared.full_a, 0);
  if (fault != kEarlyRead) note = shared.note;
  if (fault != kNoWaitForCopy) mbarrier_wait(shared.full_b, fault == kWrongParity);
  if (fault != kNoFence) wgmma_fence();
  multiply(d, shared, false, fault);
  wgmma_commit();
  if (fault == kEarlyRelease) release();
  wgmma_wait<0>(d);
  if (fault != kEarlyRelease) release();
  mbarrier_wait(shared.full_b, 1);
  bar_sync(1, fault == kLonelyTurn ? 256 : 128);
  wgmma_fence();
  multiply(d, shared, true, fault);
  if (fault != kNoCommit) wgmma_commit();
  if (fault != kNoWgmmaWait) wgmma_wait<0>(d);
  const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
  for (int i = 0; i < 32; ++i) out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2] = note * d[i];
}

void kernel(const CUtensorMap& a, const CUtensorMap& b, const CUtensorMap& c, float* out, Fault fault) {
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared());
  if (threadIdx.x == 0) {
    mbarrier_init(shared.full_a, 1);
    mbarrier_init(shared.full_b, 1);
    mbarrier_init(shared.empty_b, 4);
    if (fault != kNoInitFence) mbarrier_init_fence();
  }
  if (fault != kNoSync) __syncthreads();
  if (threadIdx.x < 128) {
    if (threadIdx.x == 0) produce(shared, a, b, c, fault);
  } else {
    consume(shared, out, fault);
  }
}

bool encode(CUtensorMap* map, const void* data, int columns, int row_bytes) {
  const cuuint64_t sizes[4] = {cuuint64_t(columns), 60, 1, 1}, strides[3] = {cuuint64_t(row_bytes), 16384, 16384};
  const cuuint32_t box[4] = {64, 64, 1, 1}, steps[4] = {1, 1, 1, 1};
  return cuTensorMapEncodeTiled(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(data), sizes, strides, box, steps,
                                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

// a, b, c: float16 [60, columns]; what lies outside a box counts as zeros.
extern "C" int planted_hopper_run(int fault, const void* a, const void* b, const void* c, float* out, int columns) {
  CUtensorMap maps[3];
  for (int i = 0; i < 3; ++i) {
    if (!encode(&maps[i], i == 0 ? a : i == 1 ? b : c, columns, 2 * columns)) return 0;
  }
  return simt::launch(1, 256, sizeof(Shared), [&] { kernel(maps[0], maps[1], maps[2], out, Fault(fault)); });
}
