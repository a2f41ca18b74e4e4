#pragma once

namespace ras {
enum class DType : int { f32, f16, bf16 };
}
