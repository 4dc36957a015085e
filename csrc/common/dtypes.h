// Element types of tensors, by the names of torch; and what marks a function for host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define VLMK_HD __host__ __device__ __forceinline__
#else
#define VLMK_HD inline
#endif

namespace vlmk {

enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

}  // namespace vlmk
