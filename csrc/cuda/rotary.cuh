// rotary on a GPU: one block per token. The angles of the token are in shared memory for all heads of query and key. Formulas:
// common/rotary.h.
#pragma once

#include "../common/rotary.h"
#include "vec.h"

namespace vlmk::cuda {

constexpr int kRotaryThreads = 128;

VLMK_DEVICE float table_value(const RotaryTable& table, DType dtype, int64_t i) {
    if (dtype == DType::float32) return __ldg(static_cast<const float*>(table.values) + i);
    const uint32_t bits = __ldg(static_cast<const uint16_t*>(table.values) + i);
    float first, second;
    if (dtype == DType::bfloat16) {
        widen(bits, bf16{}, first, second);
    } else {
        widen(bits, f16{}, first, second);
    }
    return first;
}

// Reads kCount consecutive elements as floats, and writes them.
template <class T, int kCount>
VLMK_DEVICE void read_elements(const T* address, float (&x)[kCount]) {
    if constexpr (kCount == 1) {
        x[0] = load_one(address);
    } else {
        unpack<T>(load_vec(address, 0), x);
    }
}
template <class T, int kCount>
VLMK_DEVICE void write_elements(T* address, const float (&x)[kCount]) {
    if constexpr (kCount == 1) {
        store_one(address, x[0]);
    } else {
        store_vec(address, 0, pack<T>(x));
    }
}

// kCount: kVec<T> if every head is aligned to 16 bytes and P is a multiple of kVec<T>, else 1.
// Grid: (batch * tokens,).
template <class T, int kCount>
__global__ void __launch_bounds__(kRotaryThreads) rotary_kernel(const __grid_constant__ Rotary p) {
    VLMK_SHARED(float, cos, kRotaryMaxPairs);
    VLMK_SHARED(float, sin, kRotaryMaxPairs);
    const uint32_t n = blockIdx.x, b = n / static_cast<uint32_t>(p.tokens), s = n % static_cast<uint32_t>(p.tokens);
    const uint32_t pairs = static_cast<uint32_t>(p.pairs), width = static_cast<uint32_t>(p.width);
    for (uint32_t j = threadIdx.x; j < pairs; j += kRotaryThreads) {
        cos[j] = table_value(p.cos, p.table_dtype, b * p.cos.stride_batch + s * p.cos.stride_token + j);
        const float value = table_value(p.sin, p.table_dtype, b * p.sin.stride_batch + s * p.sin.stride_token + j);
        sin[j] = p.inverse ? -value : value;
    }
    __syncthreads();

    // Work items of a head: runs of kCount pairs, then the elements that are copied.
    const uint32_t runs = pairs / kCount, items = runs + (width - 2 * pairs);
    const uint32_t total = static_cast<uint32_t>(p.query.num + p.key.num) * items;
    for (uint32_t i = threadIdx.x; i < total; i += kRotaryThreads) {
        uint32_t head = i / items;
        const uint32_t item = i % items;
        const bool of_query = head < p.query.num;
        const RotaryHeads& heads = of_query ? p.query : p.key;
        if (!of_query) head -= static_cast<uint32_t>(p.query.num);
        const T* x =
            static_cast<const T*>(heads.x) + b * heads.stride_batch + s * heads.stride_token + head * heads.stride_head;
        T* out = static_cast<T*>(heads.out) + (n * heads.num + head) * width;
        if (item >= runs) {
            const uint32_t k = 2 * pairs + item - runs;
            store_one(out + k, load_one(x + k));
            continue;
        }
        const uint32_t j = item * kCount;
        float first[kCount], second[kCount], low[kCount], high[kCount];
        read_elements(x + j, first);
        read_elements(x + pairs + j, second);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            low[k] = first[k] * cos[j + k] - second[k] * sin[j + k];
            high[k] = second[k] * cos[j + k] + first[k] * sin[j + k];
        }
        write_elements(out + j, low);
        write_elements(out + pairs + j, high);
    }
}

}  // namespace vlmk::cuda
