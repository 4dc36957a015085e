// few_rows_linear on the CPU. The rows of x are the lanes of vectors, so that a product needs no sum over lanes, and the weight
// streams from memory once for every 32 rows, without a packed copy. Every sum is in the order of k, in blocks, so that a
// result does not depend on the number of rows or on its place among them.
#include "../common/few_rows_linear.h"

#include <algorithm>
#include <vector>

#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

// Rows of the weight whose sums are in registers.
#if defined(__AVX512F__)
constexpr int kTile = 12;
#elif defined(__AVX2__)
constexpr int kTile = 6;
#else
constexpr int kTile = 3;
#endif
constexpr int64_t kBlock = 64;           // products that are summed in registers, before the sum of the blocks
constexpr int64_t kLine = 16;            // floats of a cache line
constexpr int64_t kPerThread = 1 << 16;  // least number of products per thread

// x (rows, width) as panels of kLanes rows, (panels, width, kLanes), the last one with rows of zeros.
void transpose(const FewRowsLinear& p, float* panels) {
    for (int64_t m = 0; m < p.rows; ++m) {
        const float* x = p.x + m * p.stride_x;
        float* panel = panels + m / kLanes * p.width * kLanes + m % kLanes;
        for (int64_t k = 0; k < p.width; ++k) panel[k * kLanes] = x[k];
    }
}

// Rows n to n + kTile of the weight with kPanels panels of x, from row m. Prefetches the next kTile rows of the weight.
template <int kPanels>
void tile(const FewRowsLinear& p, const float* panels, int64_t m, int64_t n, bool prefetch) {
    const float *w[kTile], *x[kPanels];
    for (int j = 0; j < kTile; ++j) w[j] = p.weight + std::min(n + j, p.outputs - 1) * p.stride_weight;
    for (int i = 0; i < kPanels; ++i) x[i] = panels + (m / kLanes + i) * p.width * kLanes;
    f32 sums[kPanels][kTile] = {};
    int64_t ahead = kTile * p.stride_weight;
    for (int64_t begin = 0; begin < p.width; begin += kBlock) {
        int64_t end = std::min(begin + kBlock, p.width);
        f32 block[kPanels][kTile] = {};
        for (int64_t line = begin; line < end; line += kLine) {
            if (prefetch) {
                for (int j = 0; j < kTile; ++j) __builtin_prefetch(w[j] + ahead + line);
            }
            for (int64_t k = line, stop = std::min(line + kLine, end); k < stop; ++k) {
                f32 lanes[kPanels];
                for (int i = 0; i < kPanels; ++i) lanes[i] = load(x[i] + k * kLanes);
                for (int j = 0; j < kTile; ++j) {
                    for (int i = 0; i < kPanels; ++i) block[i][j] += lanes[i] * w[j][k];
                }
            }
        }
        for (int i = 0; i < kPanels; ++i) {
            for (int j = 0; j < kTile; ++j) sums[i][j] += block[i][j];
        }
    }
    int columns = static_cast<int>(std::min<int64_t>(kTile, p.outputs - n));
    for (int j = 0; p.bias && j < columns; ++j) {
        for (int i = 0; i < kPanels; ++i) sums[i][j] += p.bias[n + j];
    }
    int64_t rows = std::min<int64_t>(kPanels * kLanes, p.rows - m);
    for (int64_t r = 0; r < rows; ++r) {
        float* out = p.out + (m + r) * p.outputs + n;
        for (int j = 0; j < columns; ++j) out[j] = sums[r / kLanes][j][r % kLanes];
    }
}

}  // namespace

void few_rows_linear(const FewRowsLinear& p, int threads) {
    int64_t tiles = (p.outputs + kTile - 1) / kTile;
    int64_t most = std::min(tiles, p.rows * p.outputs * p.width / kPerThread);
    threads = static_cast<int>(std::clamp<int64_t>(most, 1, threads));
    std::vector<float> panels((p.rows + kLanes - 1) / kLanes * kLanes * p.width);
    transpose(p, panels.data());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t m = 0; m < p.rows; m += 2 * kLanes) {
            bool first = m == 0;
            if (p.rows - m > kLanes)
                tile<2>(p, panels.data(), m, t * kTile, first);
            else
                tile<1>(p, panels.data(), m, t * kTile, first);
        }
    }
}

}  // namespace vlmk::VLMK_ISA
