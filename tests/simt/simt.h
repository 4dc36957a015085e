// Runs CUDA kernels on the host for tests: one fiber per thread, and the blocks of a grid one after another. It is slow.
//
// The fibers of a warp run in turns, each until it waits at a barrier or a warp operation; the warps run one after another,
// each until all its fibers wait for another warp. Mistakes for which a GPU hangs, faults or returns garbage raise an
// exception: a barrier that not all threads of the block reach, a warp operation that not all lanes of its mask reach, a lane
// that does not exist, a load or store that is not aligned to its size. Shared memory starts as NaN. simt_watch() counts the
// bytes that loads and stores move within a range of memory. Kernels and grids have one dimension. The checks see __ldg,
// __ldcs, __ldcg, __stcs and __stcg, but not a plain dereference.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

using std::max;
using std::min;

namespace simt {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr size_t kShared = 48 * 1024;  // shared memory of a block without opting in to more

// The place in the source where a fiber waits.
struct Site {
    const char* what;
    const char* file;
    int line;
    bool operator==(const Site& other) const {
        return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
    }
    std::string text() const { return std::string(what) + " (" + file + ":" + std::to_string(line) + ")"; }
};

struct Fiber {
    enum class State { ready, at_barrier, at_warp_op, done };

    ucontext_t start;
    jmp_buf place;  // where it waits, once it has started
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = State::ready;
    Site site{};
    uint32_t mask = 0;   // of the warp operation
    uint64_t value = 0;  // input of the lane
    int source = 0;      // the lane whose value this lane receives
    uint64_t received = 0;
    uint32_t votes = 0;  // bit per lane of the mask: its value is not 0
};

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

// The emulated GPU of one host thread.
struct Device {
    std::string kernel;
    std::function<void()> body;
    std::vector<std::unique_ptr<Fiber>> fibers;
    jmp_buf scheduler;
    size_t done = 0, at_barrier = 0;  // fibers of the block in these states
    Site barrier_site{};
    std::exception_ptr error;
    Index thread, block, block_dim, grid_dim;
    std::vector<std::pair<const void*, size_t>> shared_arrays;  // declaration, offset
    size_t shared_used = 0;
    alignas(16) char shared[kShared];

    Fiber& current() { return *fibers[thread.x]; }
};

inline Device& device() {
    static thread_local Device instance;
    return instance;
}

[[noreturn]] inline void fail(const std::string& message) {
    Device& d = device();
    throw std::runtime_error(d.kernel + ", block " + std::to_string(d.block.x) + ", thread " + std::to_string(d.thread.x) +
                             ": " + message);
}

// ---- fibers ----

// Fibers switch by setjmp and longjmp, because swapcontext makes a system call each time.
inline void resume(Fiber& fiber) {
    if (_setjmp(device().scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

inline void suspend(Fiber& fiber) {
    if (_setjmp(fiber.place) == 0) _longjmp(device().scheduler, 1);
}

inline void fiber_main() {
    Device& d = device();
    for (;;) {
        Fiber& self = d.current();
        try {
            d.body();
        } catch (...) {
            d.error = std::current_exception();
        }
        self.state = Fiber::State::done;
        ++d.done;
        suspend(self);
    }
}

inline void wait(Fiber::State state, const Site& site) {
    Device& d = device();
    Fiber& self = d.current();
    unsigned thread = d.thread.x;
    self.state = state;
    self.site = site;
    suspend(self);
    d.thread.x = thread;
}

// Fails with the name of a thread that waits, and of one that it waits for.
inline void report_deadlock() {
    Device& d = device();
    unsigned first = 0;
    while (d.fibers[first]->state == Fiber::State::done) ++first;
    d.thread.x = first;
    const Fiber& fiber = *d.fibers[first];
    std::string message = "deadlock, waits at " + fiber.site.text();
    for (unsigned t = 0; t < d.fibers.size(); ++t) {
        const Fiber& other = *d.fibers[t];
        bool needed = fiber.state == Fiber::State::at_barrier || (t / kWarp == first / kWarp && (fiber.mask >> t % kWarp & 1));
        if (!needed || (other.state == fiber.state && other.site == fiber.site)) continue;
        bool done = other.state == Fiber::State::done;
        fail(message + "; thread " + std::to_string(t) + (done ? " has returned" : " waits at " + other.site.text()));
    }
    fail(message);
}

// Runs the lanes of a warp that are ready, each until it waits. Returns whether there were any.
inline bool run_warp(unsigned first) {
    Device& d = device();
    bool ran = false;
    for (unsigned t = first; t < std::min<size_t>(first + kWarp, d.fibers.size()); ++t) {
        Fiber& fiber = *d.fibers[t];
        if (fiber.state != Fiber::State::ready) continue;
        ran = true;
        d.thread.x = t;
        resume(fiber);
        if (d.error) std::rethrow_exception(d.error);
    }
    return ran;
}

inline void run_block() {
    Device& d = device();
    std::memset(d.shared, 0xff, sizeof(d.shared));
    d.shared_arrays.clear();
    d.shared_used = 0;
    d.done = d.at_barrier = 0;
    for (auto& fiber : d.fibers) fiber->state = Fiber::State::ready;
    while (d.done < d.fibers.size()) {
        bool ran = false;
        // Each warp runs as far as it can, so that a missing barrier shows: the other warps have not written their values.
        for (unsigned warp = 0; warp < d.fibers.size(); warp += kWarp) {
            while (run_warp(warp)) ran = true;
        }
        if (!ran) report_deadlock();
    }
}

inline void launch(const std::string& kernel, unsigned grid, unsigned threads, std::function<void()> body) {
    Device& d = device();
    if (threads == 0 || threads > 1024)
        throw std::runtime_error(kernel + ": a block must have 1 to 1024 threads, got " + std::to_string(threads));
    d.kernel = kernel;
    d.body = std::move(body);
    d.error = nullptr;
    d.block_dim = {threads, 1, 1};
    d.grid_dim = {grid, 1, 1};
    // Fibers of an earlier launch are reused: they are at the start of the loop in fiber_main.
    d.fibers.resize(std::min<size_t>(d.fibers.size(), threads));
    while (d.fibers.size() < threads) {
        d.fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *d.fibers.back();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStack;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, fiber_main, 0);
    }
    try {
        for (unsigned b = 0; b < grid; ++b) {
            d.block = {b, 0, 0};
            run_block();
        }
    } catch (...) {
        d.fibers.clear();  // some have not finished
        throw;
    }
}

// The shared memory of the block for the declaration with this address. The first thread allocates it.
inline void* shared_array(const void* declaration, size_t bytes) {
    Device& d = device();
    for (auto& [known, offset] : d.shared_arrays) {
        if (known == declaration) return d.shared + offset;
    }
    size_t offset = d.shared_used;
    d.shared_used += (bytes + 15) / 16 * 16;
    if (d.shared_used > kShared)
        fail("a block must use at most 48 KB of shared memory, got " + std::to_string(d.shared_used) + " bytes");
    d.shared_arrays.emplace_back(declaration, offset);
    return d.shared + offset;
}

// ---- barriers and warp operations ----

inline void barrier(const Site& site) {
    Device& d = device();
    if (d.done > 0) fail(site.text() + " after another thread has returned");
    if (d.at_barrier > 0 && !(d.barrier_site == site)) {
        fail(site.text() + " while another thread waits at " + d.barrier_site.text());
    }
    d.barrier_site = site;
    if (++d.at_barrier < d.fibers.size()) return wait(Fiber::State::at_barrier, site);
    d.at_barrier = 0;
    for (auto& fiber : d.fibers) fiber->state = Fiber::State::ready;
}

// Waits for all lanes of the mask. Only the last lane to arrive gets true; it continues at once, and releases the others.
inline bool arrive(const Site& site, uint32_t mask) {
    Device& d = device();
    unsigned lane = d.thread.x % kWarp, warp = d.thread.x - lane;
    auto in_mask = [&](unsigned l) { return l < kWarp && (mask >> l & 1); };
    if (!in_mask(lane)) fail(site.text() + " by a lane that is not in its mask");
    d.current().mask = mask;
    bool last = true;
    for (unsigned l = 0; l < kWarp; ++l) {
        if (!in_mask(l)) continue;
        if (warp + l >= d.fibers.size()) fail(site.text() + " names lane " + std::to_string(l) + ", beyond the block");
        Fiber& other = *d.fibers[warp + l];
        if (other.state == Fiber::State::done) {
            fail(site.text() + " names lane " + std::to_string(l) + ", which has returned");
        }
        last &= l == lane || (other.state == Fiber::State::at_warp_op && other.site == site && other.mask == mask);
    }
    if (!last) wait(Fiber::State::at_warp_op, site);
    return last;
}

// Gives `value` to the lanes that read it and receives the value of lane `source`.
inline Fiber& exchange(const Site& site, uint32_t mask, uint64_t value, int source) {
    Device& d = device();
    Fiber& self = d.current();
    unsigned warp = d.thread.x - d.thread.x % kWarp;
    auto in_mask = [&](unsigned l) { return l < kWarp && (mask >> l & 1); };
    if (!in_mask(source)) fail(site.text() + " reads lane " + std::to_string(source) + ", which is not in its mask");
    self.value = value;
    self.source = source;
    if (!arrive(site, mask)) return self;
    uint32_t votes = 0;
    for (unsigned l = 0; l < kWarp; ++l) {
        if (in_mask(l) && d.fibers[warp + l]->value != 0) votes |= 1u << l;
    }
    for (unsigned l = 0; l < kWarp; ++l) {
        if (!in_mask(l)) continue;
        Fiber& other = *d.fibers[warp + l];
        other.received = d.fibers[warp + other.source]->value;
        other.votes = votes;
        other.state = Fiber::State::ready;
    }
    return self;
}

// An instruction of a whole warp: the last lane calls compute(operands of all lanes) while the others wait.
template <class Compute>
void collective(const Site& site, void* operands, Compute compute) {
    Device& d = device();
    d.current().value = reinterpret_cast<uint64_t>(operands);
    if (!arrive(site, 0xffffffffu)) return;
    unsigned warp = d.thread.x - d.thread.x % kWarp;
    void* lanes[kWarp];
    for (unsigned l = 0; l < kWarp; ++l) lanes[l] = reinterpret_cast<void*>(d.fibers[warp + l]->value);
    compute(lanes);
    for (unsigned l = 0; l < kWarp; ++l) d.fibers[warp + l]->state = Fiber::State::ready;
}

template <class T>
T shuffle(const Site& site, uint32_t mask, T value, int source) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    if (source < 0 || source >= kWarp) source = device().thread.x % kWarp;  // like the hardware: the lane's own value
    uint64_t raw = 0;
    std::memcpy(&raw, &value, sizeof(T));
    raw = exchange(site, mask, raw, source).received;
    std::memcpy(&value, &raw, sizeof(T));
    return value;
}

// ---- memory ----

struct Watch {
    uintptr_t begin = 0, end = 0;
    int64_t loaded = 0, stored = 0;
};
inline Watch watch;

template <class T>
int64_t watched(const T* address) {
    uintptr_t at = reinterpret_cast<uintptr_t>(address);
    if (at % sizeof(T) != 0) fail("an access of " + std::to_string(sizeof(T)) + " bytes is not aligned to its size");
    uintptr_t begin = std::max(at, watch.begin), end = std::min(at + sizeof(T), watch.end);
    return begin < end ? end - begin : 0;
}

template <class T>
T load(const T* address) {
    watch.loaded += watched(address);
    return *address;
}

template <class T>
void store(T* address, T value) {
    watch.stored += watched(address);
    *address = value;
}

}  // namespace simt

// ---- for the tests, through ctypes ----

#define SIMT_EXPORT extern "C" __attribute__((visibility("default"), used)) inline
SIMT_EXPORT void simt_watch(uintptr_t address, int64_t bytes) {
    simt::watch = {address, address + static_cast<uintptr_t>(bytes), 0, 0};
}
SIMT_EXPORT int64_t simt_loaded() { return simt::watch.loaded; }
SIMT_EXPORT int64_t simt_stored() { return simt::watch.stored; }

// ---- CUDA's names ----

#define threadIdx (::simt::device().thread)
#define blockIdx (::simt::device().block)
#define blockDim (::simt::device().block_dim)
#define gridDim (::simt::device().grid_dim)

#define SIMT_SITE(NAME) \
    ::simt::Site { NAME, __FILE__, __LINE__ }
#define SIMT_LANE (static_cast<int>(threadIdx.x % ::simt::kWarp))
#define __syncthreads() ::simt::barrier(SIMT_SITE("__syncthreads"))
#define __syncwarp(MASK) static_cast<void>(::simt::exchange(SIMT_SITE("__syncwarp"), MASK, 0, SIMT_LANE))
#define SIMT_COLLECTIVE(NAME, ...) ::simt::collective(SIMT_SITE(NAME), __VA_ARGS__)
#define __ballot_sync(MASK, VOTE) ::simt::exchange(SIMT_SITE("__ballot_sync"), MASK, (VOTE) != 0, SIMT_LANE).votes
#define __any_sync(MASK, VOTE) (__ballot_sync(MASK, VOTE) != 0)
#define __all_sync(MASK, VOTE) (__ballot_sync(MASK, VOTE) == (MASK))
#define __shfl_sync(MASK, VALUE, LANE) ::simt::shuffle(SIMT_SITE("__shfl_sync"), MASK, VALUE, (LANE) % ::simt::kWarp)
#define __shfl_xor_sync(MASK, VALUE, LANES) ::simt::shuffle(SIMT_SITE("__shfl_xor_sync"), MASK, VALUE, SIMT_LANE ^ (LANES))
#define __shfl_down_sync(MASK, VALUE, LANES) ::simt::shuffle(SIMT_SITE("__shfl_down_sync"), MASK, VALUE, SIMT_LANE + (LANES))
#define __shfl_up_sync(MASK, VALUE, LANES) ::simt::shuffle(SIMT_SITE("__shfl_up_sync"), MASK, VALUE, SIMT_LANE - (LANES))

template <class T>
T __ldcs(const T* address) {
    return simt::load(address);
}
template <class T>
T __ldg(const T* address) {
    return simt::load(address);
}
template <class T>
T __ldcg(const T* address) {
    return simt::load(address);
}
template <class T>
void __stcs(T* address, T value) {
    simt::store(address, value);
}
template <class T>
void __stcg(T* address, T value) {
    simt::store(address, value);
}

// Other threads run only while this one waits, so these need no synchronization.
template <class T>
T atomicAdd(T* address, T value) {
    return std::exchange(*address, *address + value);
}
template <class T>
T atomicMax(T* address, T value) {
    return std::exchange(*address, std::max(*address, value));
}
template <class T>
T atomicExch(T* address, T value) {
    return std::exchange(*address, value);
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
    T old = *address;
    if (old == expected) *address = value;
    return old;
}
