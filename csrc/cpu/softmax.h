// The softmax of a row of logits in one read, and its gradient. Formulas: common/gather_logps.h.
#pragma once

#include <algorithm>

#include "simd.h"

namespace vlmk::VLMK_ISA {

constexpr int64_t kBlock = 1024;  // elements between two checks of the maximum; they stay in the L1 cache
constexpr float kSlack = 4;       // in bits
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// s = sum_v 2^y_v and sy = sum_v 2^y_v y_v, where y_v = (x_v - m) log2(e) / temperature and m is the maximum so far.
struct Softmax {
    float m = std::numeric_limits<float>::lowest();
    f32 s{};
    f32 sy{};

    void raise(float to, float scale) {
        float shift = (m - to) * scale;
        shift = shift < -126.0f ? -126.0f : shift;
        float alpha = std::exp2(shift);
        sy = (sy + s * shift) * alpha;
        s = s * alpha;
        m = to;
    }

    template <bool kEntropy>
    void add(f32 x, float scale) {
        f32 y = (x - m) * scale;
        f32 e = exp2_clamp(y);
        s += e;
        if constexpr (kEntropy) sy += e * y;
    }
};

// A row in memory. row(v) reads the sixteen elements from v on; row.tail(v, n, fill) reads the last n, padded with `fill`.
template <class T>
struct PlainRow {
    const T* x;

    f32 operator()(int64_t v) const { return load(x + v); }
    f32 tail(int64_t v, int64_t n, float fill) const { return load_tail(x + v, n, fill); }
};

// Reads the row once and checks the maximum only after each block. If some y exceeds kSlack, m is raised and the block, which
// is still in the L1 cache, is computed again. This is rare, because the maximum of the first block is a good estimate.
template <bool kEntropy, class Row>
Softmax read_row(const Row& row, int64_t vocab, float scale) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    Softmax softmax;
    for (int64_t start = 0; start < vocab; start += kBlock) {
        int64_t end = std::min(start + kBlock, vocab);
        while (true) {
            Softmax next = softmax;
            f32 maximum[2] = {splat(kNone), splat(kNone)};
            int64_t v = start;
            for (; v + 2 * kLanes <= end; v += 2 * kLanes) {
                for (int i = 0; i < 2; ++i) {
                    f32 loaded = row(v + i * kLanes);
                    maximum[i] = max(loaded, maximum[i]);
                    next.template add<kEntropy>(loaded, scale);
                }
            }
            for (; v < end; v += kLanes) {
                f32 loaded = end - v < kLanes ? row.tail(v, end - v, kNone) : row(v);
                maximum[0] = max(loaded, maximum[0]);
                next.template add<kEntropy>(loaded, scale);
            }
            float top = hmax(max(maximum[0], maximum[1]));
            // The negated comparison ends the loop for a maximum of infinity; the result is NaN.
            if (!((top - softmax.m) * scale > kSlack) || top == softmax.m) {
                softmax = next;
                break;
            }
            softmax.raise(top, scale);
        }
    }
    return softmax;
}

// The gradient of one row without the one-hot term: dx_v = -p_v (dlogp + dentropy (log p_v + entropy)) / temperature.
struct RowGradient {
    float m, scale, log2_sum;  // log2 p_v = (x_v - m) scale - log2_sum
    float constant, slope;     // dx_v = -p_v (constant + slope log2 p_v)

    f32 operator()(f32 x) const {
        f32 y = (x - m) * scale - log2_sum;
        f32 e = exp2_clamp(y);
        return -e * (y * slope + constant);
    }
};

// dx may be the memory of the row, with the same or a narrower type: every element is read before it is overwritten.
template <class Gradient, class Row, class Out>
void write_row(const Gradient& gradient, const Row& row, Out* dx, int64_t vocab) {
    int64_t v = 0;
    for (; v + kLanes <= vocab; v += kLanes) store(dx + v, gradient(row(v)));
    if (v < vocab) store_tail(dx + v, vocab - v, gradient(row.tail(v, vocab - v, 0)));
}

}  // namespace vlmk::VLMK_ISA
