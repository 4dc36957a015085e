// The rows of linear_logps and linear_grpo_loss on the CPU. A row is read from memory once; the second read is mostly from the
// L2 cache. Formulas: common/linear_logps.h.
#include "grpo.h"
#include "softmax.h"

namespace vlmk::VLMK_ISA {
namespace {

// tanh within a few ulp. Near 0 it uses the series, because 1 - 2 / (e^(2x) + 1) would cancel.
f32 tanh(f32 x) {
    f32 square = x * x;
    f32 series = x + x * square * (-1 / 3.0f + square * (2 / 15.0f + square * (-17 / 315.0f + square * (62 / 2835.0f))));
    return square < 0.0625f ? series : 1.0f - 2.0f / (exp(2.0f * x) + 1.0f);
}

// A row of u, and du/dx. Without a softcap, u = x and the factor logit_scale is part of `inverse`.
template <class T>
struct Uncapped : PlainRow<T> {
    Uncapped(const LinearLogps&, const T* x) : PlainRow<T>{x} {}
    f32 cap(f32 x) const { return x; }
    f32 slope(f32) const { return splat(1.0f); }
};

template <class T>
struct Capped {
    float softcap, logit_scale;
    const T* x;

    Capped(const LinearLogps& p, const T* x) : softcap(p.softcap), logit_scale(p.logit_scale), x(x) {}
    f32 cap(f32 value) const { return softcap * tanh(value * (logit_scale / softcap)); }
    f32 slope(f32 u) const { return logit_scale * (1.0f - u / softcap * (u / softcap)); }
    f32 operator()(int64_t v) const { return cap(load(x + v)); }
    f32 tail(int64_t v, int64_t n, float fill) const {
        f32 u = cap(load_tail(x + v, n, 0.0f));
        for (int i = n; i < kLanes; ++i) u[i] = fill;
        return u;
    }
};

// hidden . weight[target] + bias in fp32.
template <class T>
float target_logit(const LinearLogps& p, int64_t k) {
    const T* h = static_cast<const T*>(p.hidden) + k * p.hidden_stride;
    const T* w = static_cast<const T*>(p.weight) + p.targets[k] * p.weight_stride;
    f32 sum{};
    float rest = p.bias == nullptr ? 0.0f : load_one(static_cast<const T*>(p.bias) + p.targets[k]);
    int64_t i = 0;
    if (p.weight_step == 1) {
        for (; i + kLanes <= p.width; i += kLanes) sum += load(h + i) * load(w + i);
    }
    for (; i < p.width; ++i) rest += load_one(h + i) * load_one(w + i * p.weight_step);
    return hsum(sum) + rest;
}

// The terms 2^y and y 2^y of s and sy; 0 for y = -infinity.
struct Addend {
    float s, sy;
};
Addend addend(float y) {
    y = y < -200.0f ? -200.0f : y;
    float s = std::exp2(y);
    return {s, s * y};
}

template <class T, class Operand, class Row>
void read(const LinearLogps& p, int64_t k, const T* x, const Row& row) {
    float scale = p.inverse * kLog2e;
    Softmax softmax = read_row<true>(row, p.vocab, scale);
    float s = hsum(softmax.s), sy = hsum(softmax.sy), u = -std::numeric_limits<float>::infinity();
    int64_t target = p.targets[k];
    if (target >= 0) {
        u = row.cap(splat(load_one(x + target)))[0];
        if (p.hidden != nullptr) {
            Addend rounded = addend((u - softmax.m) * scale);
            u = row.cap(splat(target_logit<Operand>(p, k)))[0];
            Addend exact = addend((u - softmax.m) * scale);
            s += exact.s - rounded.s;
            sy += exact.sy - rounded.sy;
        }
    }
    float log_sum = std::log(s);
    p.logp[k] = (u - softmax.m) * p.inverse - log_sum;
    p.entropy[k] = log_sum - sy / s * kLn2;
    p.stats[2 * k] = softmax.m;
    p.stats[2 * k + 1] = log_sum;
}

template <class Out, class Row>
void write(const LinearLogps& p, int64_t k, TokenGradient token, Out* dx, const Row& row) {
    float logp = p.logp[k], entropy = p.entropy[k], m = p.stats[2 * k], log_sum = p.stats[2 * k + 1];
    RowGradient by_u{m, p.inverse * kLog2e, log_sum * kLog2e, p.inverse * (token.dlogp + token.dentropy * entropy),
                     p.inverse * token.dentropy * kLn2};
    write_row([&](f32 u) { return by_u(u) * row.slope(u); }, row, dx, p.vocab);
    if (p.targets[k] < 0) return;
    // From logp, which is more accurate than the rounded logit, and without the cancellation of 1 - p.
    float probability = std::exp(logp), surprise = probability > 0.0f ? probability * (logp + entropy) : probability;
    float du = -p.inverse * (token.dlogp * std::expm1(logp) + token.dentropy * surprise);
    f32 u = splat((logp + log_sum) / p.inverse + m);
    store_one(dx + p.targets[k], (du * row.slope(u))[0]);
}

template <class T, class Out, class Row>
void run(const LinearLogps& p, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t k = 0; k < p.num_rows; ++k) {
        T* x = static_cast<T*>(p.logits) + k * p.vocab;
        Row row(p, x);
        if (p.read) read<T, Out>(p, k, x, row);
        if (!p.write) continue;
        TokenGradient token = p.objective ? token_gradient(p, k, p.logp[k])
                                          : TokenGradient{p.dlogp[k], p.dentropy == nullptr ? 0.0f : p.dentropy[k]};
        write(p, k, token, static_cast<Out*>(p.dlogits) + k * p.dlogits_stride, row);
    }
}

template <class T, class Out>
void run(const LinearLogps& p, int threads) {
    p.softcap > 0.0f ? run<T, Out, Capped<T>>(p, threads) : run<T, Out, Uncapped<T>>(p, threads);
}

}  // namespace

void linear_logps(const LinearLogps& p, int threads) {
    with_dtypes(p, [&](auto x, auto out) { run<decltype(x), decltype(out)>(p, threads); });
}

}  // namespace vlmk::VLMK_ISA
