// group_advantages on the CPU, in fp64: a batch has a few thousand rewards.
#include "../common/group_advantages.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace vlmk::VLMK_ISA {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Moments {
    int64_t count = 0;
    double mean = 0, std = 0;
    double best = -kInfinity, second = -kInfinity, least = kInfinity;  // second: the greatest without one occurrence of best

    bool equal() const { return best <= least || count == 0; }
    // x - mean; exactly 0 if all values are equal.
    double center(double x) const { return equal() ? 0.0 : x - mean; }
    // Infinite if all values are equal, so that eps = 0 does not give 0 / 0.
    double divisor(double eps) const { return std == 0 ? kInfinity : std + eps; }
};

// The moments of value(i) for i in [begin, end). NaN is left out.
template <class Value>
Moments moments_of(int64_t begin, int64_t end, Value value) {
    Moments m;
    double sum = 0, squares = 0;
    for (int64_t i = begin; i < end; ++i) {
        double x = value(i);
        if (std::isnan(x)) continue;
        ++m.count;
        sum += x;
        m.second = std::max(m.second, std::min(x, m.best));
        m.best = std::max(m.best, x);
        m.least = std::min(m.least, x);
    }
    m.mean = m.count > 0 ? sum / m.count : 0.0;
    for (int64_t i = begin; i < end; ++i) {
        double x = value(i);
        if (!std::isnan(x)) squares += (x - m.mean) * (x - m.mean);
    }
    m.std = m.equal() ? 0.0 : std::sqrt(squares / (m.count - 1));
    return m;
}

double advantage(double r, const Moments& group, GroupBaseline baseline) {
    switch (baseline) {
        case GroupBaseline::mean:
            return group.center(r);
        case GroupBaseline::leave_one_out:
            return group.center(r) * group.count / std::max<int64_t>(group.count - 1, 1);
        case GroupBaseline::pass_at_k:
            return group.count > 1 && r == group.best ? group.best - group.second : 0.0;
        case GroupBaseline::none:
            break;
    }
    return r;
}

}  // namespace

void group_advantages(const GroupAdvantages& p, int) {
    auto start = [&](int64_t g) { return p.offsets != nullptr ? p.offsets[g] : g * (p.num / p.num_groups); };
    auto weight = [&](int64_t k) { return p.weights != nullptr ? p.weights[k] : 1.0f; };
    std::vector<double> r(p.num, std::nan(""));
    auto add = [&](int64_t i, double x) { r[i] = std::isnan(r[i]) ? x : r[i] + x; };
    for (int64_t i = 0; i < p.num; ++i) {
        for (int64_t k = 0; k < p.functions; ++k) {
            float x = p.rewards[i * p.functions + k];
            if (!std::isnan(x)) add(i, static_cast<double>(weight(k)) * x);
        }
        r[i] = p.total[i] = static_cast<float>(r[i]);  // rewards that are equal in fp32 count as equal
    }
    auto value = [&](int64_t i) { return r[i]; };
    Moments batch = moments_of(0, p.num, value);
    for (int64_t g = 0; g < p.num_groups; ++g) {
        Moments group = moments_of(start(g), start(g + 1), value);
        double divisor = p.scale == GroupScale::none ? 1.0 : (p.scale == GroupScale::group ? group : batch).divisor(p.eps);
        for (int64_t i = start(g); i < start(g + 1); ++i) {
            p.advantages[i] = std::isnan(r[i]) ? 0.0f : static_cast<float>(advantage(r[i], group, p.baseline) / divisor);
            p.mean[i] = static_cast<float>(group.mean);
            p.std[i] = static_cast<float>(group.std);
            p.degenerate[i] = group.equal();
        }
    }
    if (!p.normalize_first) return;
    std::fill(r.begin(), r.end(), std::nan(""));
    for (int64_t g = 0; g < p.num_groups; ++g) {
        for (int64_t k = 0; k < p.functions; ++k) {
            auto reward = [&](int64_t i) { return static_cast<double>(p.rewards[i * p.functions + k]); };
            Moments group = moments_of(start(g), start(g + 1), reward);
            for (int64_t i = start(g); i < start(g + 1); ++i) {
                if (!std::isnan(reward(i))) add(i, weight(k) * group.center(reward(i)) / group.divisor(p.eps));
            }
        }
    }
    batch = moments_of(0, p.num, value);
    for (int64_t i = 0; i < p.num; ++i) {
        p.advantages[i] = std::isnan(r[i]) ? 0.0f : static_cast<float>(batch.center(r[i]) / batch.divisor(p.eps));
    }
}

}  // namespace vlmk::VLMK_ISA
