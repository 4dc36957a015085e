// The rows of linear_logps and linear_grpo_loss on a GPU, one block per row. Formulas: common/linear_logps.h.
#pragma once

#include "grpo.cuh"
#include "softmax.cuh"

namespace vlmk::cuda {

// u, and du/dx. Without a softcap, u = x and the factor logit_scale is part of `inverse`.
template <bool kCap>
VLMK_DEVICE float cap(const LinearLogps& p, float x) {
    if constexpr (!kCap) return x;
    return p.softcap * tanhf(x * (p.logit_scale / p.softcap));
}
template <bool kCap>
VLMK_DEVICE float slope(const LinearLogps& p, float u) {
    if constexpr (!kCap) return 1.0f;
    return p.logit_scale * (1.0f - u / p.softcap * (u / p.softcap));
}

VLMK_DEVICE bool in_vocabulary(const LinearLogps& p, int64_t target) { return 0 <= target && target < p.vocab; }

// hidden . weight[target] + bias in fp32; thread 0 gets it.
template <class T>
VLMK_DEVICE float target_logit(const LinearLogps& p, int64_t k, int64_t target) {
    const T* h = static_cast<const T*>(p.hidden) + k * p.hidden_stride;
    const T* w = static_cast<const T*>(p.weight) + target * p.weight_stride;
    float sum = 0;
    for (int64_t i = threadIdx.x; i < p.width; i += kThreads) sum = fmaf(load_one(h + i), load_one(w + i * p.weight_step), sum);
    sum = sum_block(sum);
    return p.bias == nullptr ? sum : sum + load_one(static_cast<const T*>(p.bias) + target);
}

// The terms 2^y and y 2^y of s and sy; 0 for y = -infinity.
struct Addend {
    float s, sy;
};
VLMK_DEVICE Addend addend(float y) {
    y = max_nan(y, kLowest);
    float s = exp2_approx(y);
    return {s, s * y};
}

// The softmax of the row; thread 0 gets it.
template <class T, bool kCap>
VLMK_DEVICE Softmax read_softmax(const LinearLogps& p, const T* x, const Part& part, float scale) {
    Softmax softmax;
    for (uint32_t i = part.begin + threadIdx.x; i < part.end; i += kUnroll * kThreads) {
        uint4 raw[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            raw[u] = i + u * kThreads < part.end ? load_cached(x + part.head, i + u * kThreads) : lowest_vec<T>();
        }
        // The cap is monotonic, so the maximum of u is the cap of the maximum of x.
        rebase(softmax, fmaxf(softmax.m, cap<kCap>(p, max_of<T>(raw))), scale);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float values[kVec<T>];
            unpack<T>(raw[u], values);
            if (kCap && i + u * kThreads >= part.end) continue;  // the cap of -infinity is finite
#pragma unroll
            for (float& value : values) value = cap<kCap>(p, value);
            Softmax sum;
            add<true>(sum, values, softmax.m, scale);
            softmax.s += sum.s;
            softmax.sy += sum.sy;
        }
    }
    if (part.edge < p.vocab) {
        float value[1] = {cap<kCap>(p, load_one(x + part.edge))};
        rebase(softmax, fmaxf(softmax.m, value[0]), scale);
        add<true>(softmax, value, softmax.m, scale);
    }
    return merge_block(softmax, scale);
}

// The values of a row that one stage passes to the next.
struct RowResults {
    float logp, entropy, m, log_sum;
    TokenGradient token;
};

template <class T, class Out, bool kCap>
VLMK_DEVICE RowResults read(const LinearLogps& p, int64_t k, const T* x, const Part& part, float scale) {
    int64_t target = p.targets[k];
    bool here = in_vocabulary(p, target);
    float x_target = here && threadIdx.x == 0 ? load_one(x + target) : 0.0f;
    Softmax softmax = read_softmax<T, kCap>(p, x, part, scale);
    float u = cap<kCap>(p, x_target);
    if (here && p.hidden != nullptr) {
        Addend rounded = addend((u - softmax.m) * scale);
        u = cap<kCap>(p, target_logit<Out>(p, k, target));
        Addend exact = addend((u - softmax.m) * scale);
        softmax.s += exact.s - rounded.s;
        softmax.sy += exact.sy - rounded.sy;
    }
    float log_sum = logf(softmax.s);
    RowResults r{};
    r.logp = here ? (u - softmax.m) * p.inverse - log_sum : target < 0 ? -kInfinity : kNaN;
    r.entropy = log_sum - softmax.sy / softmax.s * kLn2;
    r.m = softmax.m;
    r.log_sum = log_sum;
    if (threadIdx.x == 0) {
        p.logp[k] = r.logp;
        p.entropy[k] = r.entropy;
        p.stats[2 * k] = r.m;
        p.stats[2 * k + 1] = r.log_sum;
    }
    return r;
}

// Stores kCount elements of the gradient: in one store of 8 or 16 bytes if `address` is aligned to it.
template <class Out, int kCount>
VLMK_DEVICE void store_some(Out* address, const float (&values)[kCount], bool aligned) {
    if (!aligned) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) store_one(address + i, values[i]);
    } else if constexpr (kCount == kVec<Out>) {
        store_cached(address, pack<Out>(values));
    } else {
        store_cached(address, make_uint2(narrow(values[0], values[1], Out{}), narrow(values[2], values[3], Out{})));
    }
}

// Writes the gradient of the row. If it overwrites the logits in a narrower dtype, it overlaps elements that other threads
// read: the block reads a group of vectors before it writes any of them, and writes the single elements last.
template <class T, class Out, bool kCap>
VLMK_DEVICE void write(const LinearLogps& p, const RowResults& r, int64_t k, int64_t target, const T* x, const Part& part,
                       float scale) {
    bool narrows_in_place = sizeof(Out) < sizeof(T) && p.dlogits == p.logits;
    Out* dx = static_cast<Out*>(p.dlogits) + k * p.dlogits_stride;
    RowGradient row{r.m, scale, r.log_sum * kLog2e, p.inverse * fmaf(r.token.dentropy, r.entropy, r.token.dlogp),
                    p.inverse * r.token.dentropy * kLn2};
    auto gradient = [&](float value) {
        float u = cap<kCap>(p, value);
        return gradient_at<true>(row, u) * slope<kCap>(p, u);
    };
    bool aligned = reinterpret_cast<uintptr_t>(dx + part.head) % (kVec<T> * sizeof(Out)) == 0;
    float edge = part.edge < p.vocab ? gradient(load_one(x + part.edge)) : 0.0f;
    for (uint32_t start = part.begin; start < part.end; start += kUnroll * kThreads) {
        uint32_t i = start + threadIdx.x;
        uint4 raw[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (i + u * kThreads < part.end) raw[u] = load_cached(x + part.head, i + u * kThreads);
        }
        if (narrows_in_place) __syncthreads();
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            if (i + u * kThreads >= part.end) break;
            float values[kVec<T>];
            unpack<T>(raw[u], values);
#pragma unroll
            for (float& value : values) value = gradient(value);
            store_some(dx + part.head + (i + u * kThreads) * kVec<T>, values, aligned);
        }
    }
    if (narrows_in_place) __syncthreads();
    if (part.edge < p.vocab) store_one(dx + part.edge, edge);
    __syncthreads();
    if (threadIdx.x != 0 || !in_vocabulary(p, target)) return;
    // From logp, which is more accurate than the rounded logit, and without the cancellation of 1 - p.
    float probability = expf(r.logp), surprise = probability > 0.0f ? probability * (r.logp + r.entropy) : probability;
    float du = -p.inverse * (r.token.dlogp * expm1f(r.logp) + r.token.dentropy * surprise);
    store_one(dx + target, du * slope<kCap>(p, (r.logp + r.log_sum) / p.inverse + r.m));
}

// Grid: (n,), one block per row.
template <class T, class Out, bool kCap>
__global__ void __launch_bounds__(kThreads, 4) linear_logps_kernel(const __grid_constant__ LinearLogps p, float scale) {
    VLMK_SHARED(RowResults, shared, 1);
    int64_t k = blockIdx.x, target = p.targets[k];
    const T* x = static_cast<const T*>(p.logits) + k * p.vocab;
    Part part = part_of_row(x, static_cast<uint32_t>(p.vocab), 0, 1);
    RowResults r{};
    if (p.read) {
        r = read<T, Out, kCap>(p, k, x, part, scale);
    } else if (threadIdx.x == 0) {
        r.logp = p.logp[k];
        r.entropy = p.entropy[k];
        r.m = p.stats[2 * k];
        r.log_sum = p.stats[2 * k + 1];
    }
    if (!p.write) return;
    if (threadIdx.x == 0) {
        if (p.objective) {
            r.token = token_gradient(p, k, r.logp);
        } else {
            r.token = {p.dlogp[k], p.dentropy == nullptr ? 0.0f : p.dentropy[k]};
        }
        // The target is out of range: the gradient of the row is NaN, like its logp.
        if (target >= p.vocab) r.token.dlogp = kNaN;
        shared[0] = r;
    }
    __syncthreads();
    r = shared[0];
    write<T, Out, kCap>(p, r, k, target, x, part, scale);
}

}  // namespace vlmk::cuda
