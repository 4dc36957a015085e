// 16-byte vectors of elements, and instructions that C++ has no function for: as device code, and as equivalent host code.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../common/dtypes.h"
#include "launch.h"

#ifdef __CUDACC__
#define VLMK_DEVICE __device__ __forceinline__
#else
#define VLMK_DEVICE inline
#endif

namespace vlmk::cuda {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// ---- arithmetic ----

// 2^x within 2 ulp. Denormal results may be 0.
VLMK_HD float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return std::exp2(x);
#endif
}

// max(a, b), or NaN if one of them is NaN. (fmaxf returns the other one.)
VLMK_DEVICE float max_nan(float a, float b) {
#ifdef __CUDA_ARCH__
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
#else
    return a < b || b != b ? b : a;
#endif
}

// ---- 16-bit formats, two per register: the first in the low half ----

#ifdef __CUDA_ARCH__

VLMK_DEVICE void widen(uint32_t pair, bf16, float& first, float& second) {
    first = __uint_as_float(pair << 16);
    second = __uint_as_float(pair & 0xffff0000u);
}
VLMK_DEVICE void widen(uint32_t pair, f16, float& first, float& second) {
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(first), "=f"(second)
        : "r"(pair));
}
VLMK_DEVICE uint32_t max_pair(uint32_t a, uint32_t b, bf16) {
    uint32_t pair;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
VLMK_DEVICE uint32_t max_pair(uint32_t a, uint32_t b, f16) {
    uint32_t pair;
    asm("max.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
    return pair;
}
VLMK_DEVICE uint32_t narrow(float first, float second, bf16) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
VLMK_DEVICE uint32_t narrow(float first, float second, f16) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

#else

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline float widen_one(uint16_t bits, bf16) { return bit_cast<float>(uint32_t{bits} << 16); }
inline float widen_one(uint16_t bits, f16) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float magnitude = exponent == 31  ? (fraction != 0 ? kNaN : kInfinity)
                      : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                      : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
}
inline uint16_t narrow_one(float x, bf16) {
    uint32_t bits = bit_cast<uint32_t>(x);
    return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}
inline uint16_t narrow_one(float x, f16) {
    uint16_t sign = bit_cast<uint32_t>(x) >> 16 & 0x8000;
    if (x != x) return 0x7fff;
    float magnitude = std::fabs(x);
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    // In units of the spacing of floats around x. nearbyint rounds ties to even; a carry increments the exponent.
    int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : -14, -14);
    int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return sign | (((exponent + 14) << 10) + steps);
}
template <class T>
inline void widen(uint32_t pair, T format, float& first, float& second) {
    first = widen_one(pair & 0xffff, format);
    second = widen_one(pair >> 16, format);
}
template <class T>
inline uint32_t narrow(float first, float second, T format) {
    return narrow_one(first, format) | uint32_t{narrow_one(second, format)} << 16;
}
// The maximum per element, like fmaxf: NaN only if both are NaN.
template <class T>
inline uint32_t max_pair(uint32_t a, uint32_t b, T format) {
    float a_first, a_second, b_first, b_second;
    widen(a, format, a_first, a_second);
    widen(b, format, b_first, b_second);
    return narrow(std::fmax(a_first, b_first), std::fmax(a_second, b_second), format);
}

#endif

VLMK_DEVICE uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    return bit_cast<uint32_t>(x);
#endif
}
VLMK_DEVICE float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(bits);
#else
    return bit_cast<float>(bits);
#endif
}

// ---- vectors of 16 bytes ----

template <class T>
constexpr int kVec = 16 / sizeof(T);

// Converts the kVec<T> elements of a vector to floats, and back.
template <class T>
VLMK_DEVICE void unpack(uint4 raw, float (&x)[kVec<T>]) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            x[i] = bits_float(words[i]);
        } else {
            widen(words[i], T{}, x[2 * i], x[2 * i + 1]);
        }
    }
}
template <class T>
VLMK_DEVICE uint4 pack(const float (&x)[kVec<T>]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 4) {
            words[i] = float_bits(x[i]);
        } else {
            words[i] = narrow(x[2 * i], x[2 * i + 1], T{});
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// The greatest element of kCount vectors; NaN only if all elements are NaN.
template <class T, int kCount>
VLMK_DEVICE float max_of(const uint4 (&raw)[kCount]) {
    uint4 top = raw[0];
    if constexpr (sizeof(T) == 4) {
        float a[4], b[4];
        unpack<T>(top, a);
#pragma unroll
        for (int i = 1; i < kCount; ++i) {
            unpack<T>(raw[i], b);
#pragma unroll
            for (int j = 0; j < 4; ++j) a[j] = fmaxf(a[j], b[j]);
        }
        return fmaxf(fmaxf(a[0], a[1]), fmaxf(a[2], a[3]));
    } else {
#pragma unroll
        for (int i = 1; i < kCount; ++i) {
            top.x = max_pair(top.x, raw[i].x, T{});
            top.y = max_pair(top.y, raw[i].y, T{});
            top.z = max_pair(top.z, raw[i].z, T{});
            top.w = max_pair(top.w, raw[i].w, T{});
        }
        float first, second;
        widen(max_pair(max_pair(top.x, top.y, T{}), max_pair(top.z, top.w, T{}), T{}), T{}, first, second);
        return fmaxf(first, second);
    }
}

// A vector of -infinity.
template <class T>
VLMK_DEVICE uint4 lowest_vec() {
    constexpr bool kBf16 = std::is_same_v<T, bf16>;
    constexpr uint32_t kWord = sizeof(T) == 4 ? 0xff800000u : kBf16 ? 0xff80ff80u : 0xfc00fc00u;
    return make_uint4(kWord, kWord, kWord, kWord);
}

// Load or store one element. Accesses to big tensors stream: their cache lines are evicted first.
template <class T>
VLMK_DEVICE float load_one(const T* address) {
    if constexpr (sizeof(T) == 4) {
        return __ldcs(address);
    } else {
        float first, second;
        widen(__ldcs(&address->bits), T{}, first, second);
        return first;
    }
}
template <class T>
VLMK_DEVICE void store_one(T* address, float x) {
    if constexpr (sizeof(T) == 4) {
        __stcs(address, x);
    } else {
        __stcs(&address->bits, static_cast<uint16_t>(narrow(x, 0.0f, T{})));
    }
}

// Load or store vector i from `base`, which is aligned to 16 bytes.
template <class T>
VLMK_DEVICE uint4 load_vec(const T* base, uint32_t i) {
    return __ldcs(reinterpret_cast<const uint4*>(base) + i);
}
template <class T>
VLMK_DEVICE void store_vec(T* base, uint32_t i, uint4 raw) {
    __stcs(reinterpret_cast<uint4*>(base) + i, raw);
}

// The same for memory that is read again soon, from the L2 cache.
template <class T>
VLMK_DEVICE uint4 load_cached(const T* base, uint32_t i) {
    return __ldcg(reinterpret_cast<const uint4*>(base) + i);
}
template <class T, class Vector>
VLMK_DEVICE void store_cached(T* address, Vector raw) {
    __stcg(reinterpret_cast<Vector*>(address), raw);
}

// The same if `base` is only aligned to its elements. Neighboring threads share cache lines, so these loads may stay in L1.
template <class T>
VLMK_DEVICE uint4 load_unaligned(const T* base, uint32_t i) {
    base += static_cast<int64_t>(i) * kVec<T>;
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        if constexpr (sizeof(T) == 4) {
            words[w] = float_bits(__ldg(base + w));
        } else {
            words[w] = __ldg(&base[2 * w].bits) | static_cast<uint32_t>(__ldg(&base[2 * w + 1].bits)) << 16;
        }
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace vlmk::cuda
