// The rows of linear_kl on a GPU, one block per row. Formulas: common/linear_kl.h.
//
// A thread loads single elements, kThreads apart: the rows of student and teacher may have different types and alignments.
#pragma once

#include "../common/linear_kl.h"
#include "softmax.cuh"

namespace vlmk::cuda {
VLMK_HD float probability_of(float log) { return exp2_approx(log * kLog2e); }
VLMK_HD float log_of(float x) { return logf(x); }
}  // namespace vlmk::cuda

#ifndef VLMK_NS
#define VLMK_NS cuda
#endif
#include "../common/divergence.h"

namespace vlmk::cuda {

constexpr int kGroup = 8;  // elements of a row that a thread loads before it computes with the first one

// Elements v, v + kThreads, ... of a row; -infinity beyond the vocabulary.
template <class T>
VLMK_DEVICE void load_elements(const T* row, uint32_t v, uint32_t vocab, float (&x)[kGroup]) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
        uint32_t at = v + j * kThreads;
        if constexpr (sizeof(T) == 4) {
            x[j] = at < vocab ? __ldcg(row + at) : -kInfinity;
        } else {
            float second;
            widen(at < vocab ? __ldcg(&row[at].bits) : 0, T{}, x[j], second);
            if (at >= vocab) x[j] = -kInfinity;
        }
    }
}

// The same for row k of a side, as u.
VLMK_DEVICE void load_group(const LinearKlSide& side, int64_t k, uint32_t v, uint32_t vocab, float (&u)[kGroup]) {
    switch (side.dtype) {
        case DType::float32:
            load_elements(static_cast<const float*>(side.logits) + k * vocab, v, vocab, u);
            break;
        case DType::bfloat16:
            load_elements(static_cast<const bf16*>(side.logits) + k * vocab, v, vocab, u);
            break;
        case DType::float16:
            load_elements(static_cast<const f16*>(side.logits) + k * vocab, v, vocab, u);
            break;
    }
    if (side.softcap <= 0.0f) return;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
        if (v + j * kThreads < vocab) u[j] = side.softcap * tanhf(u[j] * (side.logit_scale / side.softcap));
    }
}

// The logarithm of the probability of u.
struct LogProbability {
    float m, inverse, log_sum;
    VLMK_DEVICE float operator()(float u) const { return fmaf(u - m, inverse, -log_sum); }
};

// Writes m and L of a side; thread 0 does.
VLMK_DEVICE void read_softmax(const LinearKlSide& side, int64_t k, uint32_t vocab, float scale, float* stats) {
    Softmax softmax;
    float u[kGroup];
    for (uint32_t v = threadIdx.x; v < vocab; v += kGroup * kThreads) {
        load_group(side, k, v, vocab, u);
        float top = softmax.m;
#pragma unroll
        for (float value : u) top = fmaxf(top, value);
        rebase(softmax, top, scale);
        add<false>(softmax, u, softmax.m, scale);
    }
    softmax = merge_block(softmax, scale);
    if (threadIdx.x == 0) {
        stats[0] = softmax.m;
        stats[1] = logf(softmax.s);
    }
    __syncthreads();
}

// Grid: (n,), one block per row.
template <class Divergence>
__global__ void __launch_bounds__(kThreads, 4)
    linear_kl_kernel(const __grid_constant__ LinearKl p, float scale, float teacher_scale) {
    VLMK_SHARED(float, stats, 5);
    int64_t k = blockIdx.x;
    uint32_t vocab = static_cast<uint32_t>(p.vocab);
    if (p.read) {
        read_softmax(p.student, k, vocab, scale, stats);
        read_softmax(p.teacher, k, vocab, teacher_scale, stats + 2);
    } else {
        if (threadIdx.x < 5) stats[threadIdx.x] = p.stats[5 * k + threadIdx.x];
        __syncthreads();
    }
    LogProbability of_student{stats[0], p.student.inverse, stats[1]}, of_teacher{stats[2], p.teacher.inverse, stats[3]};
    float u[kGroup], other[kGroup];
    if (p.read) {
        Terms<float> sum;
        for (uint32_t v = threadIdx.x; v < vocab; v += kGroup * kThreads) {
            load_group(p.student, k, v, vocab, u);
            load_group(p.teacher, k, v, vocab, other);
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
                if (v + j * kThreads >= vocab) break;
                Terms<float> of_token = Divergence::terms(of_student(u[j]), of_teacher(other[j]), p.beta);
                sum.total += of_token.total;
                sum.mean += of_token.mean;
            }
        }
        float total = sum_block(sum.total);
        __syncthreads();
        float mean = sum_block(sum.mean);
        if (threadIdx.x == 0) {
            p.divergence[k] = total;
            stats[4] = mean;
            for (int i = 0; i < 5; ++i) p.stats[5 * k + i] = stats[i];
        }
        __syncthreads();
    }
    if (!p.write) return;
    float mean = stats[4], factor = p.upstream[k] * p.student.inverse, cap = p.student.softcap;
    // The block reads a group of elements before it writes any of them: a narrower gradient in the memory of the logits
    // overlaps elements that other threads read.
    for (uint32_t start = 0; start < vocab; start += kGroup * kThreads) {
        uint32_t v = start + threadIdx.x;
        load_group(p.student, k, v, vocab, u);
        load_group(p.teacher, k, v, vocab, other);
        if (p.dlogits == p.student.logits) __syncthreads();
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            uint32_t at = v + j * kThreads;
            if (at >= vocab) break;
            float slope = cap > 0.0f ? p.student.logit_scale * (1.0f - u[j] / cap * (u[j] / cap)) : 1.0f;
            float dx = Divergence::gradient(of_student(u[j]), of_teacher(other[j]), p.beta, mean) * factor * slope;
            int64_t to = k * p.dlogits_stride + at;
            switch (p.gradient_dtype) {
                case DType::float32:
                    store_one(static_cast<float*>(p.dlogits) + to, dx);
                    break;
                case DType::bfloat16:
                    store_one(static_cast<bf16*>(p.dlogits) + to, dx);
                    break;
                case DType::float16:
                    store_one(static_cast<f16*>(p.dlogits) + to, dx);
                    break;
            }
        }
    }
}

}  // namespace vlmk::cuda
