// few_rows_linear on the CPU: the weight streams from memory once, without a packed copy of it. A block of its rows stays in
// the cache for all rows of x. Every sum is over the lanes of vectors in the order of k, then over the lanes, so that a result
// does not depend on the number of rows or on its place among them.
#include "../common/few_rows_linear.h"

#include <algorithm>

#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int kTile = 4;                  // rows of x and rows of the weight in registers: 16 sums
constexpr int64_t kBlockBytes = 1 << 17;  // of the weight, in the cache
constexpr int64_t kPerThread = 1 << 16;   // least number of products per thread

#if defined(__AVX512F__)
inline __m256 halves(f32 x) {
    __m512 a = bit_cast<__m512>(x);
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}
#endif

// The sums over the lanes of four vectors.
inline void lane_sums(const f32 (&x)[kTile], float (&sums)[kTile]) {
#if defined(__AVX512F__)
    __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(halves(x[0]), halves(x[1])), _mm256_hadd_ps(halves(x[2]), halves(x[3])));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    for (int i = 0; i < kTile; ++i) sums[i] = hsum(x[i]);
#endif
}

// Rows m to m + kRows and columns n to n + kTile of out; columns from `end` on are not written. Prefetches the rows that are
// `ahead` elements further.
template <int kRows, bool kAhead>
void tile(const FewRowsLinear& p, int64_t m, int64_t n, int64_t end, int64_t ahead) {
    const float *x[kRows], *w[kTile];
    for (int i = 0; i < kRows; ++i) x[i] = p.x + (m + i) * p.stride_x;
    for (int j = 0; j < kTile; ++j) w[j] = p.weight + std::min(n + j, end - 1) * p.stride_weight;
    f32 sums[kRows][kTile] = {};
    int64_t k = 0;
    for (const int64_t stop = p.width - kLanes; k <= stop; k += kLanes) {
        f32 a[kRows];
        for (int i = 0; i < kRows; ++i) a[i] = load(x[i] + k);
        for (int j = 0; j < kTile; ++j) {
            if (kAhead) __builtin_prefetch(w[j] + ahead + k);
            f32 b = load(w[j] + k);
            for (int i = 0; i < kRows; ++i) sums[i][j] += a[i] * b;
        }
    }
    if (k < p.width) {
        for (int j = 0; j < kTile; ++j) {
            f32 b = load_tail(w[j] + k, p.width - k, 0.0f);
            for (int i = 0; i < kRows; ++i) sums[i][j] += load_tail(x[i] + k, p.width - k, 0.0f) * b;
        }
    }
    float bias[kTile] = {};
    int64_t columns = std::min<int64_t>(kTile, end - n);
    if (p.bias) std::memcpy(bias, p.bias + n, columns * sizeof(float));
    for (int i = 0; i < kRows; ++i) {
        float row[kTile];
        lane_sums(sums[i], row);
        for (int j = 0; j < kTile; ++j) row[j] += bias[j];
        float* out = p.out + (m + i) * p.outputs + n;
        if (columns == kTile)
            std::memcpy(out, row, sizeof(row));
        else
            std::memcpy(out, row, columns * sizeof(float));
    }
}

template <bool kAhead>
void rows_of_tile(const FewRowsLinear& p, int64_t m, int64_t n, int64_t end, int64_t ahead) {
    int64_t rows = p.rows - m;
    if (rows >= 4) tile<4, kAhead>(p, m, n, end, ahead);
    if (rows == 3) tile<3, kAhead>(p, m, n, end, ahead);
    if (rows == 2) tile<2, kAhead>(p, m, n, end, ahead);
    if (rows == 1) tile<1, kAhead>(p, m, n, end, ahead);
}

void block(const FewRowsLinear& p, int64_t begin, int64_t end, int64_t ahead) {
    for (int64_t m = 0; m < p.rows; m += kTile) {
        bool last = ahead && m + kTile >= p.rows;
        for (int64_t n = begin; n < end; n += kTile) {
            if (last)
                rows_of_tile<true>(p, m, n, end, ahead);
            else
                rows_of_tile<false>(p, m, n, end, 0);
        }
    }
}

}  // namespace

void few_rows_linear(const FewRowsLinear& p, int threads) {
    int64_t fitting = kBlockBytes / static_cast<int64_t>(sizeof(float)) / std::max<int64_t>(p.width, 1);
    int64_t size = std::clamp<int64_t>(fitting / kTile * kTile, kTile, 64), blocks = (p.outputs + size - 1) / size;
    int64_t most = std::min(blocks, p.rows * p.outputs * p.width / kPerThread);
    threads = static_cast<int>(std::clamp<int64_t>(most, 1, threads));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        bool last = b + 2 > blocks;  // the block after it is not complete
        block(p, b * size, std::min((b + 1) * size, p.outputs), last ? 0 : size * p.stride_weight);
    }
}

}  // namespace vlmk::VLMK_ISA
