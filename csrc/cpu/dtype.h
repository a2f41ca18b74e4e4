#pragma once

namespace ras::cpu {
enum class DType : int { f32, f16, bf16 };
}
