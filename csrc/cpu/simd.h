// Vectors of sixteen floats, in the vector extensions of GCC and Clang: one source for every instruction set.
//
// Each .cpp file of this folder is compiled once per instruction set. VLMK_ISA is the name of the instruction set and the
// namespace of everything in the file. bindings.cpp calls the best one that the processor supports.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../common/dtypes.h"

#ifndef VLMK_ISA
#error "compile with -DVLMK_ISA=<name of the instruction set>"
#endif

namespace vlmk::VLMK_ISA {

constexpr int kLanes = 16;
using f32 = float __attribute__((vector_size(64)));
using i32 = int32_t __attribute__((vector_size(64)));
using u32 = uint32_t __attribute__((vector_size(64)));
using u16 = uint16_t __attribute__((vector_size(32)));

inline f32 splat(float x) { return x - f32{}; }

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// ---- conversion of 16-bit formats: exact to fp32, rounded to nearest even from fp32 ----

inline f32 widen(u16 raw, bf16) { return bit_cast<f32>(__builtin_convertvector(raw, u32) << 16); }

inline u16 narrow(f32 x, bf16) {
    u32 bits = bit_cast<u32>(x);
    u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32 quiet = (bits >> 16) | 0x40;
    return __builtin_convertvector(x == x ? rounded : quiet, u16);
}

#if defined(__AVX512F__)
inline f32 widen(u16 raw, f16) { return bit_cast<f32>(_mm512_cvtph_ps(bit_cast<__m256i>(raw))); }
inline u16 narrow(f32 x, f16) { return bit_cast<u16>(_mm512_cvtps_ph(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT)); }
#else
inline f32 widen(u16 raw, f16) {
    u32 h = __builtin_convertvector(raw, u32);
    // A multiplication changes the exponent's bias. It is exact, also for denormals.
    f32 x = bit_cast<f32>((h & 0x7fff) << 13) * 0x1p112f;
    u32 bits = bit_cast<u32>(x);
    bits = (h & 0x7c00) == 0x7c00 ? bits | 0x7f800000 : bits;
    return bit_cast<f32>(bits | (h & 0x8000) << 16);
}

inline u16 narrow(f32 x, f16) {
    u32 bits = bit_cast<u32>(x), sign = bits & 0x80000000, magnitude = bits ^ sign;
    // Below 2^-14, adding 0.5 leaves the rounded denormal in the low bits of the significand.
    u32 denormal = bit_cast<u32>(bit_cast<f32>(magnitude) + 0.5f) - 0x3f000000;
    u32 normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    u32 half = magnitude < 0x38800000 ? denormal : normal;
    half = magnitude >= 0x477ff000 ? 0x7c00 + u32{} : half;
    half = magnitude > 0x7f800000 ? 0x7e00 + u32{} : half;
    return __builtin_convertvector(half | sign >> 16, u16);
}
#endif

// ---- memory ----

inline f32 load(const float* p) {
    f32 x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

template <class T>
inline f32 load(const T* p) {
    u16 raw;
    std::memcpy(&raw, p, sizeof(raw));
    return widen(raw, T{});
}

inline void store(float* p, f32 x) { std::memcpy(p, &x, sizeof(x)); }

template <class T>
inline void store(T* p, f32 x) {
    u16 raw = narrow(x, T{});
    std::memcpy(p, &raw, sizeof(raw));
}

template <class T>
inline float load_one(const T* p) {
    T lanes[kLanes] = {*p};
    return load(lanes)[0];
}

template <class T>
inline void store_one(T* p, float x) {
    T lanes[kLanes];
    store(lanes, splat(x));
    *p = lanes[0];
}

// The n < 16 elements at p, padded with `fill`.
template <class T>
inline f32 load_tail(const T* p, int64_t n, float fill) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, n * sizeof(T));
    f32 x = load(lanes);
    for (int i = n; i < kLanes; ++i) x[i] = fill;
    return x;
}

template <class T>
inline void store_tail(T* p, int64_t n, f32 x) {
    T lanes[kLanes];
    store(lanes, x);
    std::memcpy(p, lanes, n * sizeof(T));
}

// ---- arithmetic ----

inline f32 max(f32 a, f32 b) { return a > b ? a : b; }

inline float hmax(f32 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(bit_cast<__m512>(x));
#endif
    float m = x[0];
    for (int i = 1; i < kLanes; ++i) m = x[i] > m ? x[i] : m;
    return m;
}

inline float hsum(f32 x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(bit_cast<__m512>(x));
#endif
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    }
    return x[0];
}

// 2^x for x <= 127, with a relative error of 2e-7. Results below 2^-126 are 0, and x is clamped so that x 2^x is 0, not NaN.
inline f32 exp2_clamp(f32& x) {
#if defined(__AVX512F__)
    x = bit_cast<f32>(_mm512_max_ps(_mm512_set1_ps(-1000.0f), bit_cast<__m512>(x)));  // a NaN in x stays
    f32 n = bit_cast<f32>(_mm512_roundscale_ps(bit_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#else
    constexpr float kShift = 0x1.8p23f;  // adding it rounds x to an integer, in the low bits
    i32 tiny = x < -126.0f;
    x = tiny ? splat(-126.0f) : x;
    f32 shifted = x + kShift;
    f32 n = shifted - kShift;
#endif
    f32 f = x - n;  // in [-0.5, 0.5]
    f32 y = f * 1.3264726390e-03f + 9.6715126972e-03f;
    y = y * f + 5.5507337459e-02f;
    y = y * f + 2.4022242084e-01f;
    y = y * f + 6.9314697760e-01f;
    y = y * f + 1.0f;
#if defined(__AVX512F__)
    return bit_cast<f32>(_mm512_scalef_ps(bit_cast<__m512>(y), bit_cast<__m512>(n)));
#else
    f32 power = bit_cast<f32>(bit_cast<i32>(y) + (bit_cast<i32>(shifted) << 23));
    return tiny ? f32{} : power;
#endif
}

// min(x, high) and max(x, low) that keep a NaN.
inline f32 at_most(f32 x, float high) {
#if defined(__AVX512F__)
    return bit_cast<f32>(_mm512_min_ps(_mm512_set1_ps(high), bit_cast<__m512>(x)));  // a NaN in x stays
#else
    return x > high ? splat(high) : x;
#endif
}
inline f32 at_least(f32 x, float low) {
#if defined(__AVX512F__)
    return bit_cast<f32>(_mm512_max_ps(_mm512_set1_ps(low), bit_cast<__m512>(x)));
#else
    return x < low ? splat(low) : x;
#endif
}

inline float exp(float x) { return std::exp(x); }

// e^x within 2 ulp. It is 0 for x < -87 and e^88 for x > 88; a NaN stays NaN.
inline f32 exp(f32 x) {
    i32 tiny = x < -87.0f;
    f32 bounded = at_least(at_most(x, 88.0f), -87.0f);
#if defined(__AVX512F__)
    f32 n = bit_cast<f32>(_mm512_roundscale_ps(bit_cast<__m512>(bounded * 1.44269504088896340736f), _MM_FROUND_TO_NEAREST_INT));
#else
    constexpr float kShift = 0x1.8p23f;  // adding it rounds to an integer, in the low bits
    f32 shifted = bounded * 1.44269504088896340736f + kShift;
    f32 n = shifted - kShift;
#endif
    f32 r = bounded - n * 0x1.62e4p-1f;  // ln 2 in two parts; n times the first part is exact
    r = r - n * 0x1.7f7d1cp-20f;
    f32 q = r * 1.3814540106e-03f + 8.3687451956e-03f;
    q = q * r + 4.1668390791e-02f;
    q = q * r + 1.6666520398e-01f;
    q = q * r + 4.9999993432e-01f;
    f32 y = q * r * r + r + 1.0f;
#if defined(__AVX512F__)
    f32 power = bit_cast<f32>(_mm512_scalef_ps(bit_cast<__m512>(y), bit_cast<__m512>(n)));
#else
    f32 power = bit_cast<f32>(bit_cast<i32>(y) + (bit_cast<i32>(shifted) << 23));
    power = x == x ? power : x;
#endif
    return tiny ? f32{} : power;
}

// log of positive, normal numbers, with a relative error of 2e-7; a NaN stays NaN.
inline f32 log(f32 x) {
    i32 bits = bit_cast<i32>(x);
    i32 exponent = (bits - 0x3f3504f3) >> 23;  // so that the significand is in [sqrt(0.5), sqrt(2))
    f32 significand = bit_cast<f32>(bits - (exponent << 23));
    f32 s = (significand - 1.0f) / (significand + 1.0f), square = s * s;  // log(significand) = 2 atanh(s)
    f32 series = square * (2 / 9.0f) + 2 / 7.0f;
    series = series * square + 2 / 5.0f;
    series = series * square + 2 / 3.0f;
    series = series * square + 2.0f;
    f32 result = __builtin_convertvector(exponent, f32) * 0.69314718055994530942f + s * series;
    return x == x ? result : x;
}

}  // namespace vlmk::VLMK_ISA
