// Launchers of gather_logps on a GPU. They do not allocate or synchronize, and can be captured in a CUDA graph.
#include "gather_logps.cuh"

namespace vlmk::cuda {
namespace {

void check_sizes(const GatherLogps& p) {
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    if (p.num_rows > kMax || p.num_results > kMax || p.vocab > kMax - 8 * kThreads) {
        throw std::runtime_error("gather_logps: the numbers of rows and results and the vocabulary must be below 2^31, got " +
                                 std::to_string(p.num_rows) + ", " + std::to_string(p.num_results) + " and " +
                                 std::to_string(p.vocab));
    }
}

// log2(e) / temperature, computed in fp64 and rounded once.
float scale_of(const GatherLogps& p) { return static_cast<float>(1.4426950408889634 / p.temperature); }

template <class T>
void forward(const GatherLogps& p, uintptr_t stream) {
    auto kernel = p.entropy != nullptr ? gather_logps_fwd_kernel<T, true> : gather_logps_fwd_kernel<T, false>;
    launch("gather_logps_fwd_kernel", kernel, p.num_results * p.splits, kThreads, stream, p, scale_of(p));
    if (p.splits > 1) {
        int64_t blocks = (p.num_results + kWarps - 1) / kWarps;
        launch("gather_logps_merge_kernel", gather_logps_merge_kernel<T>, blocks, kThreads, stream, p, scale_of(p));
    }
}

template <class T>
void backward(GatherLogps p, int device, uintptr_t stream) {
    // Parts are long, because the start of a block costs two round trips to memory, but short enough for sixteen blocks per
    // multiprocessor.
    int64_t step = kThreads * kUnroll * kVec<T>, steps = (p.vocab + step - 1) / step;
    int64_t depth = std::min<int64_t>(p.num_rows * steps / (16 * multiprocessors(device)), kBwdDepth);
    p.splits = depth < 2 ? steps : (steps + depth - 1) / depth;
    auto kernel = p.dentropy != nullptr ? gather_logps_bwd_kernel<T, true> : gather_logps_bwd_kernel<T, false>;
    launch("gather_logps_bwd_kernel", kernel, p.num_rows * p.splits, kThreads, stream, p, scale_of(p), 1 / p.temperature);
}

}  // namespace

void gather_logps_fwd(const GatherLogps& p, int device, uintptr_t stream) {
    check_sizes(p);
    DeviceGuard guard(device);
    with_dtype(p.dtype, [&](auto x) { forward<decltype(x)>(p, stream); });
}

void gather_logps_bwd(const GatherLogps& p, int device, uintptr_t stream) {
    check_sizes(p);
    DeviceGuard guard(device);
    with_dtype(p.dtype, [&](auto x) { backward<decltype(x)>(p, device, stream); });
}

}  // namespace vlmk::cuda
