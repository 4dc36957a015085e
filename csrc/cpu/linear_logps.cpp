// The rows of linear_logps and linear_grpo_loss on the CPU. A row is read from memory once; the second read is mostly from the
// L2 cache. Formulas: common/linear_logps.h.
#include "grpo.h"
#include "softcap.h"

namespace vlmk::VLMK_ISA {
namespace {

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
        Row row(p.softcap, p.logit_scale, x);
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
