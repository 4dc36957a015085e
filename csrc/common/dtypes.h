// Element types of tensors, under torch's names, and the dispatch from a dtype to its C++ type.
#pragma once

#include <cstdint>

#include "fields.h"

// Marks a function that runs on the host and on the GPU.
#ifdef __CUDACC__
#define VLMK_HD __host__ __device__ __forceinline__
#else
#define VLMK_HD inline
#endif

namespace vlmk {

VLMK_ENUM(DType, float32, bfloat16, float16)

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// Calls f(T{}) with the C++ type T of `dtype`.
template <class Function>
void with_dtype(DType dtype, Function f) {
    switch (dtype) {
        case DType::float32:
            return f(float{});
        case DType::bfloat16:
            return f(bf16{});
        case DType::float16:
            return f(f16{});
    }
}

}  // namespace vlmk
