// Stand-in for the CUDA header of this name: tensor maps, with the driver's own rules for them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator.h"

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE = 0, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap {
  simt::TensorMap map;
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* result, CUtensorMapDataType, cuuint32_t rank, void* address,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank != 4 || uintptr_t(address) % 16) return CUDA_ERROR_INVALID_VALUE;
  simt::TensorMap map{static_cast<const char*>(address), {}, {}, {}, swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  for (int i = 0; i < 4; ++i) {
    map.size[i] = int64_t(sizes[i]);
    map.box[i] = int(box[i]);
    map.stride[i] = i ? int64_t(strides[i - 1]) : 2;
    const bool fits = sizes[i] > 0 && sizes[i] <= (uint64_t(1) << 32) && box[i] > 0 && box[i] <= 256 && element_strides[i] == 1;
    if (!fits || (i && (map.stride[i] % 16 || map.stride[i] <= 0 || map.stride[i] >= int64_t(1) << 40))) {
      return CUDA_ERROR_INVALID_VALUE;
    }
  }
  if (map.box[0] * 2 % 16 || (map.swizzle_128 && map.box[0] * 2 > 128)) return CUDA_ERROR_INVALID_VALUE;
  *result = {map};
  return CUDA_SUCCESS;
}
