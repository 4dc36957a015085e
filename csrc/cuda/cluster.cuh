// Thread block clusters of sm_90 and later: blocks that run at the same time, synchronise, and read each other's shared memory.
// Elsewhere, and in a launch without clusters, a block is a cluster by itself.
#pragma once

#include "vec.h"

namespace vlmk::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define VLMK_CLUSTERS 1
#else
#define VLMK_CLUSTERS 0
#endif

VLMK_DEVICE uint32_t cluster_size() {
#if VLMK_CLUSTERS
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
#else
    return 1;
#endif
}

VLMK_DEVICE uint32_t cluster_rank() {
#if VLMK_CLUSTERS
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
}

// All threads of the cluster; what they wrote to shared memory before it is visible after it.
VLMK_DEVICE void cluster_barrier() {
#if VLMK_CLUSTERS
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

// *address of the block `rank` of the cluster, `address` being in shared memory.
VLMK_DEVICE float load_shared(const float* address, uint32_t rank) {
#if VLMK_CLUSTERS
    uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(address)), other;
    float value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(other) : "r"(own), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(other) : "memory");
    return value;
#else
    (void)rank;
    return *address;
#endif
}

}  // namespace vlmk::cuda
