// Memory of newly allocated results.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vlmk {

// The first write to each page of new memory is a page fault. Pages of 2 MiB reduce the number of faults 512 times.
inline void advise_huge_pages(void* p, size_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t kHugePage = 2u << 20;
    uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
    uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHugePage * kHugePage;
    // Only a hint: without huge pages the result is the same, but slower.
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace vlmk
