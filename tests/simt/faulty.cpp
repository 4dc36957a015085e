// Kernels for test_simt.py: correct ones, and one for each mistake that simt.h reports.
#include "cuda/launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// out[block] is the sum of the block's part of in.
void block_sum_kernel(const float* in, float* out) {
    VLMK_SHARED(float, sums, 32);
    float sum = __ldg(in + blockIdx.x * blockDim.x + threadIdx.x);
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(kAll, sum, lanes);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) sum += sums[warp];
    out[blockIdx.x] = sum;
}

// The same without the barrier: thread 0 reads values that later warps have not written yet.
void missing_barrier_kernel(const float* in, float* out) {
    VLMK_SHARED(float, sums, 32);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = in[threadIdx.x];
    if (threadIdx.x == 0) out[0] = sums[0] + sums[1];
}

void early_return_kernel(const float*, float*) {
    if (threadIdx.x >= 40) return;
    __syncthreads();
}

void two_barriers_kernel(const float*, float*) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}

void barrier_against_shuffle_kernel(const float* in, float* out) {
    if (threadIdx.x % 32 == 7) {
        __syncthreads();
    } else {
        out[0] = __shfl_xor_sync(kAll, in[0], 1);
    }
}

void divergent_shuffle_kernel(const float* in, float* out) {
    if (threadIdx.x % 32 < 16) out[0] = __shfl_xor_sync(kAll, in[0], 1);
}

// Full mask in a block of 16 threads.
void shuffle_beyond_block_kernel(const float* in, float* out) { out[0] = __shfl_xor_sync(kAll, in[0], 16); }

void shuffle_beyond_mask_kernel(const float* in, float* out) {
    if (threadIdx.x < 16) out[0] = __shfl_sync(0x0000ffffu, in[0], 20);
}

void misaligned_load_kernel(const float* in, float* out) {
    uint4 raw = __ldcs(reinterpret_cast<const uint4*>(in + 1));
    std::memcpy(out, &raw, sizeof(float));
}

void vote_kernel(const float*, float* out) {
    unsigned ballot = __ballot_sync(kAll, threadIdx.x % 3 == 0);
    bool any = __any_sync(kAll, threadIdx.x == 31), all = __all_sync(kAll, threadIdx.x < 31);
    __syncwarp(kAll);
    out[threadIdx.x] = ballot >> threadIdx.x & 1;
    if (threadIdx.x == 0) out[32] = any + 2 * all;
    atomicAdd(out + 33, 1.0f);
}

struct Kernel {
    const char* name;
    void (*kernel)(const float*, float*);
};
#define KERNEL(NAME) {#NAME, NAME##_kernel}
constexpr Kernel kKernels[] = {
    KERNEL(block_sum),
    KERNEL(missing_barrier),
    KERNEL(early_return),
    KERNEL(two_barriers),
    KERNEL(barrier_against_shuffle),
    KERNEL(divergent_shuffle),
    KERNEL(shuffle_beyond_block),
    KERNEL(shuffle_beyond_mask),
    KERNEL(misaligned_load),
    KERNEL(vote),
};

}  // namespace

// Runs a kernel. Returns the message of its exception, or an empty string.
extern "C" __attribute__((visibility("default"))) const char* run(const char* name, int grid, int threads, const float* in,
                                                                  float* out) {
    static std::string message;
    message.clear();
    try {
        for (const Kernel& k : kKernels) {
            if (std::strcmp(k.name, name) == 0) vlmk::cuda::launch(name, k.kernel, grid, threads, 0, in, out);
        }
    } catch (const std::exception& error) {
        message = error.what();
    }
    return message.c_str();
}
