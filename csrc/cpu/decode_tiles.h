// Tiles of decode_attention: products of a few rows with a panel of keys or values, and how operands are packed for them.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kKeys = 128;          // keys of a block
constexpr int64_t kPanel = 2 * kLanes;  // keys, or columns of the values, that a tile multiplies
// Rows of a tile: its sums, 2 vectors per row, are in registers.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kRows = 3;
#else
constexpr int kRows = 1;
#endif

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Memory that is aligned to vectors and not initialized.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t size) : memory_(new T[size + 64 / sizeof(T)]) {
        void* address = memory_.get();
        size_t space = size * sizeof(T) + 64;
        begin_ = static_cast<T*>(std::align(64, size * sizeof(T), address, space));
    }
    T* get() const { return begin_; }

  private:
    std::unique_ptr<T[]> memory_;
    T* begin_;
};

#if defined(__AVX512F__)
inline void transpose(f32 (&x)[kLanes]) {
    auto get = [&](int i) { return bit_cast<__m512>(x[i]); };
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(get(i), get(i + 1));
        a[i + 1] = _mm512_unpackhi_ps(get(i), get(i + 1));
    }
    auto low = [](__m512 u, __m512 v) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(u), _mm512_castps_pd(v)));
    };
    auto high = [](__m512 u, __m512 v) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(u), _mm512_castps_pd(v)));
    };
    for (int i = 0; i < 16; i += 4) {  // b[i + c]: columns c, 4 + c, 8 + c, 12 + c of rows i to i + 3
        b[i] = low(a[i], a[i + 2]);
        b[i + 1] = high(a[i], a[i + 2]);
        b[i + 2] = low(a[i + 1], a[i + 3]);
        b[i + 3] = high(a[i + 1], a[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        __m512 even_top = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd_top = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        __m512 even = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88), odd = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        x[c] = bit_cast<f32>(_mm512_shuffle_f32x4(even_top, even, 0x88));
        x[8 + c] = bit_cast<f32>(_mm512_shuffle_f32x4(even_top, even, 0xdd));
        x[4 + c] = bit_cast<f32>(_mm512_shuffle_f32x4(odd_top, odd, 0x88));
        x[12 + c] = bit_cast<f32>(_mm512_shuffle_f32x4(odd_top, odd, 0xdd));
    }
}
#else
inline void transpose(f32 (&x)[kLanes]) {
    float rows[kLanes][kLanes], columns[kLanes][kLanes];
    std::memcpy(rows, x, sizeof(rows));
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < kLanes; ++j) columns[j][i] = rows[i][j];
    }
    std::memcpy(x, columns, sizeof(columns));
}
#endif

// How products are computed. A word, 32 bits, holds kPerWord neighboring elements of a dot product.
//   load_words(p, n)                the n <= kLanes * kPerWord elements at p as words, the others 0
//   pack_values(rows, column, at)   words of the values of kPerWord tokens, for the kPanel columns from `column` on
//   madd(sum, word, panel)          adds the products of one row's word with the words of kLanes keys or columns

template <class T>
struct Floats {
    using Word = float;
    static constexpr int kPerWord = 1;
    static f32 load_words(const T* p, int64_t n) { return n >= kLanes ? load(p) : load_tail(p, n, 0.0f); }
    static void pack_values(const T* const* rows, int64_t, int64_t column, int64_t width, float* at) {
        for (int64_t c = 0; c < kPanel; c += kLanes) {
            int64_t left = width - column - c;
            store(at + c, left > 0 ? load_words(rows[0] + column + c, left) : f32{});
        }
    }
    static void store_words(float* at, f32 x) { store(at, x); }
    static f32 madd(f32 sum, float word, f32 panel) { return sum + word * panel; }
};

#if defined(__AVX512F__)
// With the instructions of AVX512_BF16, which not every processor with AVX-512 has. They are written as assembly because a
// compiler knows them only in functions for such a processor, into which it does not inline templates for all others.
struct Pairs {
    using Word = float;  // only copied
    static constexpr int kPerWord = 2;
    static bool supported() { return __builtin_cpu_supports("avx512bf16"); }
    static f32 load_words(const bf16* p, int64_t n) {
        if (n >= 2 * kLanes) return load(reinterpret_cast<const float*>(p));
        f32 x{};
        std::memcpy(&x, p, n * sizeof(bf16));
        return x;
    }
    static void pack_values(const bf16* const* rows, int64_t tokens, int64_t column, int64_t width, float* at) {
        int64_t left = width - column;
        __m512i first = bit_cast<__m512i>(load_words(rows[0] + column, left));
        __m512i second = tokens > 1 ? bit_cast<__m512i>(load_words(rows[1] + column, left)) : _mm512_setzero_si512();
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                             36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        store(at, bit_cast<f32>(_mm512_permutex2var_epi16(first, low, second)));
        store(at + kLanes, bit_cast<f32>(_mm512_permutex2var_epi16(first, high, second)));
    }
    static void store_words(float* at, f32 x) {
        u16 raw;
        asm("vcvtneps2bf16 %1, %0" : "=v"(raw) : "v"(x));
        std::memcpy(at, &raw, sizeof(raw));
    }
    static f32 madd(f32 sum, float word, f32 panel) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(panel), "v"(splat(word)));
        return sum;
    }
};
#endif

// panel[w * kPanel + j] = word w of key j; 0 beyond the last key, in its vector, and beyond the width.
template <class Unit, class T>
void pack_keys(const T* const* keys, int64_t count, int64_t width, float* panel) {
    for (int64_t j = 0; j < std::min(kPanel, count); j += kLanes) {
        for (int64_t d = 0; d < width; d += kLanes * Unit::kPerWord) {
            f32 x[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                x[i] = j + i < count ? Unit::load_words(keys[j + i] + d, width - d) : f32{};
                if (j + kLanes + i < count) __builtin_prefetch(keys[j + kLanes + i] + d);
            }
            transpose(x);
            for (int i = 0; i < kLanes; ++i) store(panel + (d / Unit::kPerWord + i) * kPanel + j, x[i]);
        }
    }
}

// Cache lines that the tiles prefetch one by one while they compute: a burst would wait for memory.
class Ahead {
  public:
    // Lists `count` tokens, to be prefetched in `steps` steps.
    template <class T>
    void list(const T* const* tokens, int64_t count, int64_t width, int64_t steps) {
        const int64_t bytes = width * sizeof(T), size = count * ((bytes + 63) / 64);
        if (static_cast<int64_t>(lines_.size()) < size) lines_.resize(size);
        next_ = end_ = lines_.data();
        for (int64_t j = 0; j < count; ++j) {
            const char* row = reinterpret_cast<const char*>(tokens[j]);
            for (int64_t at = 0; at < bytes; at += 64) *end_++ = row + at;
        }
        twice_ = size > steps;
    }

    // The lines of a tile, in registers.
    class Cursor {
      public:
        explicit Cursor(Ahead& ahead) : ahead_(ahead), next_(ahead.next_), end_(ahead.end_), twice_(ahead.twice_) {}
        ~Cursor() { ahead_.next_ = next_; }
        void step() {
            if (next_ < end_) __builtin_prefetch(*next_++, 0, 2);
            if (twice_ && next_ < end_) __builtin_prefetch(*next_++, 0, 2);
        }

      private:
        Ahead& ahead_;
        const char** next_;
        const char** const end_;
        const bool twice_;
    };

  private:
    std::vector<const char*> lines_;
    const char** next_ = nullptr;
    const char** end_ = nullptr;
    bool twice_ = false;
};

// scores[r * kKeys + j] = scale sum_w q[w * kRows + r] panel[w * kPanel + j], for kVectors * kLanes keys.
template <class Unit, int kVectors, int kCount>
void score_tile(const float* q, const float* panel, int64_t words, float scale, float* scores, Ahead& lines) {
    Ahead::Cursor ahead(lines);
    f32 sum[kCount][kVectors] = {};
    for (int64_t w = 0; w < words; ++w) {
        ahead.step();
        f32 keys[kVectors];
        for (int v = 0; v < kVectors; ++v) keys[v] = load(panel + w * kPanel + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
            for (int v = 0; v < kVectors; ++v) sum[r][v] = Unit::madd(sum[r][v], q[w * kRows + r], keys[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
        for (int v = 0; v < kVectors; ++v) store(scores + r * kKeys + v * kLanes, sum[r][v] * scale);
    }
}

// rows[r][c] = alpha[r] rows[r][c] + sum_w shares[r * kKeys + w] panel[w * kPanel + c]. Without alpha, rows are not read.
template <class Unit, int kCount>
void value_tile(const float* shares, const float* alpha, const float* panel, int64_t words, int64_t column, float* const* rows,
                Ahead& lines) {
    Ahead::Cursor ahead(lines);
    f32 sum[kCount][2] = {};
    if (alpha != nullptr) {
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
            sum[r][0] = load(rows[r] + column) * alpha[r];
            sum[r][1] = load(rows[r] + column + kLanes) * alpha[r];
        }
    }
    for (int64_t w = 0; w < words; ++w) {
        ahead.step();
        f32 first = load(panel + w * kPanel), second = load(panel + w * kPanel + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
            sum[r][0] = Unit::madd(sum[r][0], shares[r * kKeys + w], first);
            sum[r][1] = Unit::madd(sum[r][1], shares[r * kKeys + w], second);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
        store(rows[r] + column, sum[r][0]);
        store(rows[r] + column + kLanes, sum[r][1]);
    }
}

// Calls f with the number of rows of a tile as a constant.
template <int kCount = kRows, class Function>
void with_rows(int64_t count, Function f) {
    if constexpr (kCount > 1) {
        if (count < kCount) return with_rows<kCount - 1>(count, f);
    }
    f(std::integral_constant<int, kCount>{});
}

// The scores of a row, of which `padded` are computed, become words of 2^(s - m). Returns the factor of what was summed before.
// The row sees the keys [begin, end) of the block.
template <class Unit>
float soften(float* scores, int64_t begin, int64_t end, int64_t padded, float& m, float& l) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < begin; ++j) scores[j] = kNone;
    for (int64_t j = end; j < padded; ++j) scores[j] = kNone;
    f32 top[2] = {load(scores), load(scores + kLanes)};
    for (int64_t j = kPanel; j < padded; j += kPanel) {
        top[0] = max(load(scores + j), top[0]);
        top[1] = max(load(scores + j + kLanes), top[1]);
    }
    float next = std::max(m, hmax(max(top[0], top[1])));
    f32 sum[2] = {};
    for (int64_t j = 0; j < padded; j += kPanel) {
        f32 y[2] = {load(scores + j) - next, load(scores + j + kLanes) - next};
        for (int i = 0; i < 2; ++i) {
            f32 e = exp2_clamp(y[i]);
            sum[i] += e;
            Unit::store_words(scores + (j + i * kLanes) / Unit::kPerWord, e);
        }
    }
    f32 shift = splat(m - next);
    float alpha = exp2_clamp(shift)[0];
    l = l * alpha + hsum(sum[0] + sum[1]);
    m = next;
    return alpha;
}

}  // namespace
}  // namespace vlmk::VLMK_ISA
