// Launchers of decode_attention on a GPU. They do not allocate or synchronize, and can be captured in a CUDA graph.
#include "decode_attention.cuh"

namespace vlmk::cuda {
namespace {

DecodeArguments arguments(const DecodeAttention& p, int tile_rows) {
    DecodeArguments a{};
    a.p = p;
    const int64_t shared = p.query_heads / p.key_heads;
    a.tile_heads = static_cast<int32_t>(std::min<int64_t>(shared, tile_rows));
    a.head_tiles = static_cast<int32_t>((shared + a.tile_heads - 1) / a.tile_heads);
    // Not fewer for few slots: the result of a slot would depend on their number.
    a.tile_slots = tile_rows / a.tile_heads;
    for (int64_t l = 0; l < p.num_levels; ++l) {
        const DecodeLevel& level = a.levels[l] = p.levels[l];
        const int64_t parts = level.num_segments == 0 ? 0 : decode_parts(level);
        const int64_t blocks = a.first_block[l] + p.slots * p.key_heads * a.head_tiles * parts;
        if (blocks > std::numeric_limits<int32_t>::max() || level.capacity > std::numeric_limits<int32_t>::max() / 2) {
            throw std::runtime_error(
                "decode_attention: the grid must have fewer than 2^31 blocks and a segment fewer than 2^30 "
                "tokens, got " +
                std::to_string(blocks) + " and " + std::to_string(level.capacity));
        }
        a.first_block[l + 1] = static_cast<int32_t>(blocks);
        a.first_part[l + 1] = static_cast<int32_t>(a.first_part[l] + parts);
    }
    return a;
}

template <class T>
void run(const DecodeAttention& p, uintptr_t stream) {
    const DecodeArguments a = arguments(p, sizeof(T) == 4 ? kDecodeFloatRows : 16 * kDecodeWarps);
    auto kernel = decode_parts_kernel<T, kDecodeWidth>;
    if constexpr (sizeof(T) == 2) {
        if (std::max(p.width, p.value_width) <= 64) kernel = decode_parts_kernel<T, 64>;
    }
    launch("decode_parts_kernel", kernel, a.first_block[p.num_levels], kDecodeThreads, stream, a);
    const int64_t rows = p.slots * p.query_heads;
    launch("decode_merge_kernel", decode_merge_kernel<T>, (rows + kDecodeWarps - 1) / kDecodeWarps, kDecodeThreads, stream, a);
}

}  // namespace

void decode_attention(const DecodeAttention& p, int device, uintptr_t stream) {
    DeviceGuard guard(device);
    with_dtype(p.dtype, [&](auto x) { run<decltype(x)>(p, stream); });
}

}  // namespace vlmk::cuda
