// gather_logps on a GPU. The forward pass reads each row once; the backward pass reads and writes it once. `splits` blocks
// share a row. Formulas: common/gather_logps.h. How a row is split into vectors: softmax.cuh.
#pragma once

#include "../common/gather_logps.h"
#include "softmax.cuh"

namespace vlmk::cuda {

constexpr int kResident = 5;  // blocks per multiprocessor: at most 48 registers per thread
// A thread of the backward pass has at most kBwdDepth * kUnroll vectors. On an H200, 2 reaches 97 % of the copy bandwidth and 4
// reaches 93 %.
constexpr int kBwdDepth = 2;

VLMK_DEVICE int64_t row_offset(const GatherLogps& p, int64_t row, int64_t outer, int64_t inner) {
    // 64-bit division is slow, and the launcher checks that N < 2^31.
    uint32_t n = static_cast<uint32_t>(row), size = static_cast<uint32_t>(p.inner);
    return n / size * outer + n % size * inner;
}

VLMK_DEVICE bool selected(const GatherLogps& p, int64_t k) { return p.mask == nullptr || p.mask[k]; }
VLMK_DEVICE bool valid(int64_t index, int64_t size) { return 0 <= index && index < size; }

// The row that result k is computed from; null if the result is masked, or its row or target is out of range.
template <class T>
VLMK_DEVICE const T* row_of_result(const GatherLogps& p, int64_t k) {
    int64_t n = p.rows == nullptr ? k : p.rows[k];
    if (!selected(p, k) || !valid(n, p.num_rows) || !valid(p.targets[k], p.vocab)) return nullptr;
    return static_cast<const T*>(p.logits) + row_offset(p, n, p.stride_outer, p.stride_inner);
}

// Writes a result without a row: 0 if it is masked, else NaN.
VLMK_DEVICE void write_nothing(const GatherLogps& p, int64_t k) {
    float value = selected(p, k) ? kNaN : 0.0f;
    p.logp[k] = value;
    if (p.entropy != nullptr) p.entropy[k] = value;
    p.stats[2 * k] = value;
    p.stats[2 * k + 1] = value;
}

VLMK_DEVICE void write_result(const GatherLogps& p, int64_t k, Softmax softmax, float x_target) {
    float log_sum = logf(softmax.s);
    p.logp[k] = (x_target - softmax.m) / p.temperature - log_sum;
    if (p.entropy != nullptr) p.entropy[k] = log_sum - softmax.sy / softmax.s * kLn2;
    p.stats[2 * k] = softmax.m;
    p.stats[2 * k + 1] = log_sum;
}

// logp = (x_t - m) / temperature - L, entropy = L - sum_v p_v (x_v - m) / temperature, stats = (m, L). With splits > 1, the
// sums of the block's part of the row go to `partial`.
//
// Grid: (K * splits,), block k * splits + split.
template <class T, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kResident)
    gather_logps_fwd_kernel(const __grid_constant__ GatherLogps p, float scale) {
    uint32_t splits = p.splits, k = blockIdx.x / splits, split = blockIdx.x % splits;
    const T* x = row_of_result<T>(p, k);
    if (x == nullptr) {
        if (splits == 1 && threadIdx.x == 0) write_nothing(p, k);
        return;
    }
    Part part = part_of_row(x, static_cast<uint32_t>(p.vocab), split, splits);
    float x_target = splits == 1 && threadIdx.x == 0 ? load_one(x + p.targets[k]) : 0.0f;

    Softmax softmax;
    for (uint32_t i = part.begin + threadIdx.x; i < part.end; i += kUnroll * kThreads) {
        uint4 raw[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            raw[u] = i + u * kThreads < part.end ? load_vec(x + part.head, i + u * kThreads) : lowest_vec<T>();
        }
        rebase(softmax, fmaxf(softmax.m, max_of<T>(raw)), scale);
        // One chain of dependent additions per vector.
        static_assert(kUnroll == 4);
        Softmax sum[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float values[kVec<T>];
            unpack<T>(raw[u], values);
            add<kEntropy>(sum[u], values, softmax.m, scale);
        }
        softmax.s += (sum[0].s + sum[1].s) + (sum[2].s + sum[3].s);
        if constexpr (kEntropy) softmax.sy += (sum[0].sy + sum[1].sy) + (sum[2].sy + sum[3].sy);
    }
    if (part.edge < p.vocab) {
        float value[1] = {load_one(x + part.edge)};
        rebase(softmax, fmaxf(softmax.m, value[0]), scale);
        add<kEntropy>(softmax, value, softmax.m, scale);
    }

    softmax = merge_block(softmax, scale);
    if (threadIdx.x != 0) return;
    if (splits == 1) {
        write_result(p, k, softmax, x_target);
    } else {
        float* partial = p.partial + 3 * static_cast<int64_t>(blockIdx.x);
        partial[0] = softmax.m;
        partial[1] = softmax.s;
        partial[2] = softmax.sy;
    }
}

// Merges the sums of the parts in a fixed order and writes the results.
// Grid: (ceil(K / kWarps),), one warp per result.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_logps_merge_kernel(const __grid_constant__ GatherLogps p, float scale) {
    int64_t k = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    uint32_t lane = threadIdx.x % 32;
    if (k >= p.num_results) return;
    const T* x = row_of_result<T>(p, k);
    if (x == nullptr) {
        if (lane == 0) write_nothing(p, k);
        return;
    }
    float x_target = lane == 0 ? load_one(x + p.targets[k]) : 0.0f;
    Softmax softmax;
    for (uint32_t split = lane; split < p.splits; split += 32) {
        const float* partial = p.partial + 3 * (k * p.splits + split);
        Softmax other;
        other.m = partial[0];
        other.s = partial[1];
        other.sy = partial[2];
        merge(softmax, other, scale);
    }
    softmax = merge_warp(softmax, scale);
    if (lane == 0) write_result(p, k, softmax, x_target);
}

// The results [begin, end) of a row; the launcher checks that K < 2^31.
struct Results {
    uint32_t begin, end;
};

VLMK_DEVICE Results results_of_row(const GatherLogps& p, uint32_t n) {
    if (p.offsets != nullptr) return {static_cast<uint32_t>(p.offsets[n]), static_cast<uint32_t>(p.offsets[n + 1])};
    return {n, n + selected(p, n)};
}

// Adds the one-hot terms to the kCount elements of a row from `first` on. (If a target is out of range, they are NaN already.)
template <int kCount>
VLMK_DEVICE void add_one_hot(const GatherLogps& p, Results results, uint32_t first, float inverse, float (&x)[kCount]) {
#pragma unroll 1
    for (uint32_t k = results.begin; k < results.end; ++k) {
        uint32_t at = static_cast<uint32_t>(p.targets[k]) - first;
        float dlogp = p.dlogp[k] * inverse;
#pragma unroll
        for (int j = 0; j < kCount; ++j) x[j] += at == j ? dlogp : 0.0f;
    }
}

// Loads the next vectors of the thread, up to `end`. kAligned: the vectors of the row are aligned to 16 bytes.
template <bool kAligned, class T, int kCount>
VLMK_DEVICE void load_some(uint4 (&raw)[kCount], const T* x, uint32_t i, uint32_t end) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
        uint32_t at = i + u * kThreads;
        if (at < end) raw[u] = kAligned ? load_vec(x, at) : load_unaligned(x, at);
    }
}

// Writes the thread's part of a row. kAligned: the vectors of x and dx start at the same elements.
template <class T, bool kEntropy, bool kAligned>
VLMK_DEVICE void write_gradient(const GatherLogps& p, const Part& part, Results results, const T* x, T* dx, float scale,
                                float inverse) {
    constexpr int kInFlight = kAligned ? kUnroll : 1;
    uint4 raw[kInFlight];
    uint32_t i = part.begin + threadIdx.x;
    load_some<kAligned>(raw, x + part.head, i, part.end);

    float dlogp = 0, dentropy = 0;
    uint32_t has_target = 0;  // bit j: a target is in vector j of the thread
#pragma unroll 1
    for (uint32_t k = results.begin; k < results.end; ++k) {
        int64_t target = p.targets[k];
        dlogp += valid(target, p.vocab) ? p.dlogp[k] : kNaN;
        if constexpr (kEntropy) dentropy += p.dentropy[k];
        int64_t offset = target - part.head - static_cast<int64_t>(part.begin) * kVec<T>;
        if (valid(offset, static_cast<int64_t>(part.end - part.begin) * kVec<T>)) {
            uint32_t j = static_cast<uint32_t>(offset) / kVec<T>;
            if (j % kThreads == threadIdx.x) has_target |= 1u << (j / kThreads);
        }
    }
    RowGradient row{p.stats[2 * results.begin], scale, p.stats[2 * results.begin + 1] * kLog2e, inverse * dlogp, 0};
    if constexpr (kEntropy) {
        row.constant = inverse * fmaf(dentropy, p.entropy[results.begin], dlogp);
        row.slope = dentropy * inverse * kLn2;
    }

    if (part.edge < p.vocab) {
        float value[1] = {gradient_at<kEntropy>(row, load_one(x + part.edge))};
        add_one_hot(p, results, part.edge, inverse, value);
        store_one(dx + part.edge, value[0]);
    }
    while (i < part.end) {
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
            uint32_t at = i + u * kThreads;
            if (at >= part.end) break;
            float values[kVec<T>];
            unpack<T>(raw[u], values);
#pragma unroll
            for (float& value : values) value = gradient_at<kEntropy>(row, value);
            if (has_target >> u & 1) add_one_hot(p, results, part.head + at * kVec<T>, inverse, values);
            store_vec(dx + part.head, at, pack<T>(values));
        }
        has_target >>= kInFlight;
        i += kInFlight * kThreads;
        load_some<kAligned>(raw, x + part.head, i, part.end);
    }
}

// dx_v = (dlogp ([v == t] - p_v) - dentropy p_v (log p_v + entropy)) / temperature, summed over the results of the row.
// Grid: (N * splits,), block n * splits + split; a thread has at most 32 vectors.
template <class T, bool kEntropy>
__global__ void __launch_bounds__(kThreads, kResident)
    gather_logps_bwd_kernel(const __grid_constant__ GatherLogps p, float scale, float inverse) {
    uint32_t splits = p.splits, n = blockIdx.x / splits, split = blockIdx.x % splits;
    Results results = results_of_row(p, n);
    T* dx = static_cast<T*>(p.dlogits) + row_offset(p, n, p.grad_stride_outer, p.grad_stride_inner);
    Part part = part_of_row(dx, static_cast<uint32_t>(p.vocab), split, splits);
    if (results.begin == results.end) {
        uint4 zero = make_uint4(0, 0, 0, 0);
        for (uint32_t i = part.begin + threadIdx.x; i < part.end; i += kThreads) store_vec(dx + part.head, i, zero);
        if (part.edge < p.vocab) store_one(dx + part.edge, 0.0f);
        return;
    }
    const T* x = static_cast<const T*>(p.logits) + row_offset(p, n, p.stride_outer, p.stride_inner);
    if (reinterpret_cast<uintptr_t>(x) % 16 == reinterpret_cast<uintptr_t>(dx) % 16) {
        write_gradient<T, kEntropy, true>(p, part, results, x, dx, scale, inverse);
    } else {
        write_gradient<T, kEntropy, false>(p, part, results, x, dx, scale, inverse);
    }
}

}  // namespace vlmk::cuda
