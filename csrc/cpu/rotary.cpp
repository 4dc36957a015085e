// rotary on the CPU. The angles of a token are converted to fp32 once for all heads of its query and key. Formulas:
// common/rotary.h.
#include "../common/rotary.h"

#include <algorithm>
#include <vector>

#include "memory.h"
#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kPerThread = 1 << 14;  // least number of elements per thread

template <class T>
void widen_row(const void* values, int64_t offset, int64_t count, float* out) {
    const T* x = static_cast<const T*>(values) + offset;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
    if (i < count) store_tail(out + i, count - i, load_tail(x + i, count - i, 0.0f));
}

void read_row(const RotaryTable& table, DType dtype, int64_t b, int64_t s, int64_t count, float* out) {
    int64_t offset = b * table.stride_batch + s * table.stride_token;
    with_dtype(dtype, [&](auto x) { widen_row<decltype(x)>(table.values, offset, count, out); });
}

template <class T>
void rotate_head(const T* x, T* out, const float* cos, const float* sin, int64_t pairs, int64_t width) {
    auto turn = [&](int64_t j, auto read, auto write) {
        f32 first = read(x + j), second = read(x + pairs + j), c = read(cos + j), s = read(sin + j);
        write(out + j, first * c - second * s);
        write(out + pairs + j, second * c + first * s);
    };
    if (pairs >= kLanes) {
        auto read = [](auto* p) { return load(p); };
        auto write = [](auto* p, f32 y) { store(p, y); };
        // The last vector overlaps the one before it, so that every vector is complete.
        for (int64_t j = 0; j < pairs; j += kLanes) turn(std::min(j, pairs - kLanes), read, write);
    } else if (pairs > 0) {
        turn(0, [&](auto* p) { return load_tail(p, pairs, 0.0f); }, [&](auto* p, f32 y) { store_tail(p, pairs, y); });
    }
    if (2 * pairs < width) std::memcpy(out + 2 * pairs, x + 2 * pairs, (width - 2 * pairs) * sizeof(T));
}

template <class T>
void rotate_token(const RotaryHeads& heads, const Rotary& p, int64_t b, int64_t s, const float* cos, const float* sin) {
    const T* x = static_cast<const T*>(heads.x) + b * heads.stride_batch + s * heads.stride_token;
    T* out = static_cast<T*>(heads.out) + (b * p.tokens + s) * heads.num * p.width;
    for (int64_t h = 0; h < heads.num; ++h) {
        rotate_head(x + h * heads.stride_head, out + h * p.width, cos, sin, p.pairs, p.width);
    }
}

template <class T>
void rotate(const Rotary& p, int threads) {
    int64_t num = p.batch * p.tokens, elements = num * p.width * (p.query.num + p.key.num);
    advise_huge_pages(p.query.out, num * p.query.num * p.width * sizeof(T));
    advise_huge_pages(p.key.out, num * p.key.num * p.width * sizeof(T));
    threads = static_cast<int>(std::clamp<int64_t>(elements / kPerThread, 1, threads));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> cos(p.pairs), sin(p.pairs);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < num; ++n) {
            int64_t b = n / p.tokens, s = n % p.tokens;
            read_row(p.cos, p.table_dtype, b, s, p.pairs, cos.data());
            read_row(p.sin, p.table_dtype, b, s, p.pairs, sin.data());
            if (p.inverse) {
                for (float& value : sin) value = -value;
            }
            rotate_token<T>(p.query, p, b, s, cos.data(), sin.data());
            rotate_token<T>(p.key, p, b, s, cos.data(), sin.data());
        }
    }
}

}  // namespace

void rotary(const Rotary& p, int threads) {
    with_dtype(p.dtype, [&](auto x) { rotate<decltype(x)>(p, threads); });
}

}  // namespace vlmk::VLMK_ISA
