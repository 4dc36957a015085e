// The softmax of a row of logits that is read once, and its gradient. Formulas: common/gather_logps.h.
#pragma once

#include <algorithm>

#include "simd.h"

namespace vlmk::VLMK_ISA {

constexpr int64_t kBlock = 1024;  // elements between two looks at the maximum; they stay in the first-level cache
constexpr float kSlack = 4;       // bits
constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// Of y_v = (x_v - m) log2(e) / temperature: s = sum_v 2^y_v and sy = sum_v 2^y_v y_v, for the maximum m so far.
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

// A row in memory. What is read of a row: sixteen elements from v on, or the n that are left and then `fill`.
template <class T>
struct PlainRow {
    const T* x;

    f32 operator()(int64_t v) const { return load(x + v); }
    f32 tail(int64_t v, int64_t n, float fill) const { return load_tail(x + v, n, fill); }
};

// The row is read once, with a look at the maximum only after each block: y may exceed 0 by kSlack before m is raised and the
// block, which is still in the first-level cache, is done again. Few blocks are: the maximum of the first is a good guess.
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
            // Written so that a maximum of infinity ends the loop, as NaN.
            if (!((top - softmax.m) * scale > kSlack) || top == softmax.m) {
                softmax = next;
                break;
            }
            softmax.raise(top, scale);
        }
    }
    return softmax;
}

// What the results of one row ask of its gradient: dx_v = ([v == t] dlogp - p_v (dlogp + dentropy (log p_v + H))) /
// temperature.
struct RowGradient {
    float m, scale, log2_sum;  // log2 p_v = (x_v - m) scale - log2_sum
    float constant, slope;     // dx_v = -p_v (constant + slope log2 p_v), the one-hot term aside

    f32 operator()(f32 x) const {
        f32 y = (x - m) * scale - log2_sum;
        f32 e = exp2_clamp(y);
        return -e * (y * slope + constant);
    }
};

// dx may be the memory of the row, of its type or a narrower one: nothing is written ahead of what is read.
template <class Gradient, class Row, class Out>
void write_row(const Gradient& gradient, const Row& row, Out* dx, int64_t vocab) {
    int64_t v = 0;
    for (; v + kLanes <= vocab; v += kLanes) store(dx + v, gradient(row(v)));
    if (v < vocab) store_tail(dx + v, vocab - v, gradient(row.tail(v, vocab - v, 0)));
}

}  // namespace vlmk::VLMK_ISA
