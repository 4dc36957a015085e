// Matrix products of a warp on tensor cores, and asynchronous copies to shared memory.
#pragma once

#include "vec.h"

namespace vlmk::cuda {

// c += a b with a (16, 16), b (16, 8), c (16, 8). With g = lane / 4 and t = lane % 4, a lane holds:
//   a[0] row g, columns 2t and 2t + 1        a[1] row g + 8    a[2], a[3] the same rows, columns 2t + 8 and 2t + 9
//   b0   column g, rows 2t and 2t + 1        b1   column g, rows 2t + 8 and 2t + 9
//   c[0], c[1] row g, columns 2t, 2t + 1     c[2], c[3] row g + 8
// All lanes of the warp must take part. PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
#ifdef __CUDACC__

VLMK_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
VLMK_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T format) {
    struct Operands {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } own{c, a, {b0, b1}};
    auto half = [&](uint32_t pair, int i) {
        float first, second;
        widen(pair, format, first, second);
        return i == 0 ? first : second;
    };
    SIMT_COLLECTIVE("mma", &own, [&](void* const(&lanes)[32]) {
        auto of = [&](int lane) { return static_cast<const Operands*>(lanes[lane]); };
        float rows[16][16], columns[8][16];
        for (int k = 0; k < 16; ++k) {
            for (int i = 0; i < 16; ++i) rows[i][k] = half(of(i % 8 * 4 + k % 8 / 2)->a[i / 8 + k / 8 * 2], k % 2);
            for (int n = 0; n < 8; ++n) columns[n][k] = half(of(n * 4 + k % 8 / 2)->b[k / 8], k % 2);
        }
        for (int lane = 0; lane < 32; ++lane) {
            for (int i = 0; i < 4; ++i) {
                const float *row = rows[lane / 4 + i / 2 * 8], *column = columns[lane % 4 * 2 + i % 2];
                for (int k = 0; k < 16; ++k) of(lane)->c[i] += row[k] * column[k];
            }
        }
    });
}

#endif

// The low halves of two registers as one, and the high halves.
VLMK_DEVICE uint32_t low_halves(uint32_t first, uint32_t second) {
#ifdef __CUDA_ARCH__
    return __byte_perm(first, second, 0x5410);
#else
    return (first & 0xffff) | second << 16;
#endif
}
VLMK_DEVICE uint32_t high_halves(uint32_t first, uint32_t second) {
#ifdef __CUDA_ARCH__
    return __byte_perm(first, second, 0x7632);
#else
    return first >> 16 | (second & 0xffff0000u);
#endif
}

// Copies 16 bytes from global to shared memory. The copies of a thread before a commit_copies() are a group;
// wait_copies<n>() waits until at most the last n groups of the thread are not complete. Other threads see them after a
// barrier.
VLMK_DEVICE void copy_async(void* shared, const void* global) {
#ifdef __CUDA_ARCH__
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
    *static_cast<uint4*>(shared) = load_vec(static_cast<const uint4*>(global), 0);
#endif
}
VLMK_DEVICE void commit_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kPending>
VLMK_DEVICE void wait_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace vlmk::cuda
