// The softmax of a row of logits that a block reads once, and its gradient. Formulas: common/gather_logps.h.
//
// A row is split into vectors of 16 bytes. The elements before the first aligned address and after the last complete vector are
// processed one by one.
#pragma once

#include "vec.h"

namespace vlmk::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnroll = 4;  // vectors that a thread loads before it computes with the first one
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// The part of a row that a block works on.
struct Part {
    uint32_t head;   // elements before the first vector of the row
    uint32_t begin;  // first vector, counted from `head`
    uint32_t end;
    uint32_t edge;  // the single element of this thread; V: none
};

template <class T>
VLMK_DEVICE Part part_of_row(const T* row, uint32_t vocab, uint32_t split, uint32_t splits) {
    uint32_t head = -(reinterpret_cast<uintptr_t>(row) / sizeof(T)) % kVec<T>;
    head = head < vocab ? head : vocab;
    uint32_t vectors = (vocab - head) / kVec<T>;
    // Complete groups of 8 vectors, 128 bytes, so that the blocks of a row rarely share a cache line.
    uint32_t each = ((vectors + 7) / 8 + splits - 1) / splits * 8;
    uint32_t begin = min(split * each, vectors), end = min(begin + each, vectors);
    uint32_t first = threadIdx.x, last = head + vectors * kVec<T> + threadIdx.x - kVec<T>, edge = vocab;
    if (split == 0 && first < head) edge = first;
    if (split == splits - 1 && first >= kVec<T> && last < vocab) edge = last;
    return {head, begin, end, edge};
}

// Lower bound of y: 2^y and y 2^y are 0 there, while y 2^y is NaN for y = -infinity.
constexpr float kLowest = -200.0f;

// s = sum_v 2^y_v and sy = sum_v 2^y_v y_v, where y_v = (x_v - m) log2(e) / temperature and m is the maximum so far.
struct Softmax {
    float m = std::numeric_limits<float>::lowest();
    float s = 0;
    float sy = 0;
};

// Changes m, and s and sy with it.
VLMK_DEVICE void rebase(Softmax& softmax, float m, float scale) {
    float shift = max_nan((softmax.m - m) * scale, kLowest), alpha = exp2_approx(shift);
    softmax.sy = fmaf(softmax.s, shift, softmax.sy) * alpha;
    softmax.s *= alpha;
    softmax.m = m;
}

VLMK_DEVICE void merge(Softmax& softmax, Softmax other, float scale) {
    float m = fmaxf(softmax.m, other.m);
    rebase(softmax, m, scale);
    rebase(other, m, scale);
    softmax.s += other.s;
    softmax.sy += other.sy;
}

// Adds kCount elements.
template <bool kEntropy, int kCount>
VLMK_DEVICE void add(Softmax& sum, const float (&x)[kCount], float m, float scale) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
        float y = (x[j] - m) * scale;
        if constexpr (kEntropy) y = max_nan(y, kLowest);
        float e = exp2_approx(y);
        sum.s += e;
        if constexpr (kEntropy) sum.sy = fmaf(e, y, sum.sy);
    }
}

// Merges the values of a warp; every lane gets the result.
VLMK_DEVICE Softmax merge_warp(Softmax softmax, float scale) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        Softmax other;
        other.m = __shfl_xor_sync(kFullWarp, softmax.m, lane);
        other.s = __shfl_xor_sync(kFullWarp, softmax.s, lane);
        other.sy = __shfl_xor_sync(kFullWarp, softmax.sy, lane);
        merge(softmax, other, scale);
    }
    return softmax;
}

// Merges the values of a block; the first warp gets the result.
VLMK_DEVICE Softmax merge_block(Softmax softmax, float scale) {
    VLMK_SHARED(Softmax, of_warp, kWarps);
    softmax = merge_warp(softmax, scale);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = softmax;
    __syncthreads();
    softmax = threadIdx.x < kWarps ? of_warp[threadIdx.x] : Softmax{};
    return threadIdx.x < 32 ? merge_warp(softmax, scale) : softmax;
}

// The sum of x over the block; thread 0 gets it.
VLMK_DEVICE float sum_block(float x) {
    VLMK_SHARED(float, of_warp, kWarps);
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullWarp, x, lane);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int warp = 0; warp < kWarps; ++warp) total += of_warp[warp];
    }
    return total;
}

// The gradient of one row without the one-hot terms.
struct RowGradient {
    float m, scale, log2_sum;  // log2 p_v = (x_v - m) scale - log2_sum
    float constant, slope;     // dx_v = -p_v (constant + slope log2 p_v)
};

template <bool kEntropy>
VLMK_DEVICE float gradient_at(const RowGradient& row, float x) {
    float y = fmaf(x - row.m, row.scale, -row.log2_sum);
    if constexpr (!kEntropy) return -exp2_approx(y) * row.constant;
    y = max_nan(y, kLowest);
    return -exp2_approx(y) * fmaf(y, row.slope, row.constant);
}

}  // namespace vlmk::cuda
