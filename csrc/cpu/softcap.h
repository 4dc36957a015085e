// Rows of logits with a softcap, and without. Formulas: common/linear_logps.h.
#pragma once

#include "softmax.h"

namespace vlmk::VLMK_ISA {

// tanh within a few ulp. Near 0 it uses the series, because 1 - 2 / (e^(2x) + 1) would cancel.
inline f32 tanh(f32 x) {
    f32 square = x * x;
    f32 series = x + x * square * (-1 / 3.0f + square * (2 / 15.0f + square * (-17 / 315.0f + square * (62 / 2835.0f))));
    return square < 0.0625f ? series : 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
}

// A row of u, and du/dx. Without a softcap, u = x and the factor logit_scale is part of `inverse`.
template <class T>
struct Uncapped : PlainRow<T> {
    Uncapped(float, float, const T* x) : PlainRow<T>{x} {}
    f32 cap(f32 x) const { return x; }
    f32 slope(f32) const { return splat(1.0f); }
};

template <class T>
struct Capped {
    float softcap, logit_scale;
    const T* x;

    Capped(float softcap, float logit_scale, const T* x) : softcap(softcap), logit_scale(logit_scale), x(x) {}
    f32 cap(f32 value) const { return softcap * tanh(value * (logit_scale / softcap)); }
    f32 slope(f32 u) const { return logit_scale * (1.0f - u / softcap * (u / softcap)); }
    f32 operator()(int64_t v) const { return cap(load(x + v)); }
    f32 tail(int64_t v, int64_t n, float fill) const {
        f32 u = cap(load_tail(x + v, n, 0.0f));
        for (int i = n; i < kLanes; ++i) u[i] = fill;
        return u;
    }
};

}  // namespace vlmk::VLMK_ISA
