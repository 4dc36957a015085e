// Launches a kernel: with <<<>>> under nvcc, with the SIMT emulator of tests/simt if the kernels are compiled as C++.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include <simt.h>
#endif

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

// VLMK_SHARED(float, sums, 32) declares float* sums, 32 uninitialized elements in the shared memory of the block.
#ifdef __CUDACC__
#define VLMK_SHARED(TYPE, NAME, COUNT)                                \
    __shared__ alignas(16) char NAME##_bytes[sizeof(TYPE) * (COUNT)]; \
    TYPE* NAME = reinterpret_cast<TYPE*>(NAME##_bytes)
#else
#define VLMK_SHARED(TYPE, NAME, COUNT) \
    static char NAME##_site;           \
    TYPE* NAME = static_cast<TYPE*>(::simt::shared_array(&NAME##_site, sizeof(TYPE) * (COUNT)))
#endif

namespace vlmk::cuda {

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // clear the error, or the next launch would report it again
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes `device` current, and restores the previous device at the end of the scope.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) : device_(device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        if (device_ != previous_) check(cudaSetDevice(device_), "cudaSetDevice");
    }
    ~DeviceGuard() {
        if (device_ != previous_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int device_;
    int previous_ = 0;
};

inline int multiprocessors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return count;
}

#else

class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        if (device != 0) throw std::runtime_error("cudaSetDevice: the host is device 0, got " + std::to_string(device));
    }
};

inline int multiprocessors(int) { return 2; }

#endif

// Launches `grid` blocks of `threads` threads on `stream`. Does not allocate or synchronize. `name` is used in errors.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), int64_t grid, int threads, uintptr_t stream, const Args&... args) {
    if (grid > std::numeric_limits<int32_t>::max()) {
        throw std::runtime_error(std::string(name) + ": the grid must have fewer than 2^31 blocks, got " +
                                 std::to_string(grid));
    }
    if (grid == 0) return;
#ifdef __CUDACC__
    kernel<<<dim3(static_cast<unsigned>(grid)), dim3(threads), 0, reinterpret_cast<cudaStream_t>(stream)>>>(args...);
    check(cudaGetLastError(), name);
#else
    (void)stream;
    simt::launch(name, static_cast<unsigned>(grid), threads, [&] { kernel(args...); });
#endif
}

}  // namespace vlmk::cuda
