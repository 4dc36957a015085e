// decode_attention on a GPU. Formulas: common/decode_attention.h.
//
// A block reads a part of a segment once, for one key head and a tile of rows (slots x query heads of the key head). 16-bit
// keys and values go through shared memory: blocks of kDecodeKeys keys, then their values, in a ring of kDecodeStages buffers,
// two of which are being filled. A tile has 64 rows, 16 per warp, or 16 rows, whose keys the warps share.
//
// Vectors of 16 bytes go from memory to the operands of mma() without a transposition, because the order of what a product sums
// over, and of its columns, is free:
//   scores   lane (g, t) reads the features 8t to 8t + 7 of each 32 of key g. These are rows 2t, 2t + 1, 2t + 8, 2t + 9 of the
//            operand b in two products; the query is read in the same order.
//   outputs  lane (g, t) reads the columns 8g to 8g + 7 of each 64 of the values 2t, 2t + 1, 2t + 8, 2t + 9. Product i uses
//            column 8g + i, so that the lane gets the 16 outputs from 16t on of its two rows.
// Rows of a buffer are multiples of 128 bytes, and vectors are permuted within 128 bytes so that the 8 lanes that read together
// read different banks.
//
// A row is computed by the same operations in the same order whichever rows are beside it.
#pragma once

#include "../common/decode_attention.h"
#include "mma.cuh"

namespace vlmk::cuda {

constexpr int kDecodeThreads = 128;
constexpr int kDecodeWarps = kDecodeThreads / 32;
constexpr int kDecodeKeys = 64;  // keys of a block
constexpr int kDecodeStages = 3;
constexpr int kDecodeWidth = kDecodeMaxWidth;
constexpr int kDecodeResident = 2;  // blocks per multiprocessor: at most 255 registers per thread
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kDecodeLowest =
    -3.4028234663852886e38f;  // the maximum starts at a finite value: -inf - lowest is -inf, not NaN

struct DecodeArguments {
    DecodeAttention p;
    DecodeLevel levels[kDecodeMaxLevels];
    int32_t first_block[kDecodeMaxLevels + 1];  // of the grid of decode_parts_kernel
    int32_t first_part[kDecodeMaxLevels + 1];
    int32_t tile_heads;  // query heads of a tile
    int32_t head_tiles;  // tiles for the query heads of a key head
    int32_t tile_slots;  // of a level whose segments are shared
};

// The number of tokens that a slot reads at a level, its new one included; -1: its segment or length is out of bounds.
VLMK_DEVICE int decode_held(const DecodeArguments& a, int l, int slot) {
    const DecodeLevel& level = a.levels[l];
    const int64_t segment = decode_segment(level, slot);
    if (segment == -1) return 0;
    if (segment < 0 || segment >= level.num_segments) return -1;
    const int64_t length = level.lengths[segment], held = length + decode_appends(a.p, l);
    return length >= 0 && held <= level.capacity ? static_cast<int>(held) : -1;
}

// The first token of a level that a slot sees, if it has a window.
VLMK_DEVICE int decode_begin(const DecodeArguments& a, int l, int slot) {
    if (a.p.window == 0) return 0;
    int64_t hidden = -a.p.window;
    for (int i = 0; i < a.p.num_levels; ++i) hidden += max(decode_held(a, i, slot), 0);
    for (int i = 0; i < l; ++i) hidden -= max(decode_held(a, i, slot), 0);
    return static_cast<int>(min(max(hidden, int64_t{0}), int64_t{1} << 30));
}

// What a block computes.
struct DecodeTile {
    int level, part;
    int first;  // the first slot is order[first], or `first` itself
    int rank;   // of the first slot in its segment
    int slots;  // at most
    int key_head;
    int head;   // the first query head
    int heads;  // query heads per slot
    int64_t segment;
    int held;      // tokens that the slots read
    int appended;  // the position of the new token; -1: none
};

// The slot and the query head of a row of the tile; slot -1: none.
struct DecodeRow {
    int slot, head;
};

VLMK_DEVICE DecodeRow decode_row_of(const DecodeArguments& a, const DecodeTile& tile, int row) {
    const int member = row / a.tile_heads, head = row % a.tile_heads, at = tile.first + member;
    if (member >= tile.slots || head >= tile.heads || at >= a.p.slots) return {-1, 0};
    const DecodeLevel& level = a.levels[tile.level];
    if (tile.slots == 1)
        return {level.order != nullptr && !decode_appends(a.p, tile.level) ? level.order[at] : at, tile.head + head};
    if (level.rank[at] != tile.rank + member) return {-1, 0};
    return {level.order[at], tile.head + head};
}

// The tile of this block; false if it has none, or nothing to read.
VLMK_DEVICE bool decode_tile(const DecodeArguments& a, DecodeTile& tile) {
    const int block = static_cast<int>(blockIdx.x);
    int l = 0;
    while (block >= a.first_block[l + 1]) ++l;
    const DecodeLevel& level = a.levels[l];
    const bool appends = decode_appends(a.p, l), shared = level.order != nullptr && !appends;
    const int parts = a.first_part[l + 1] - a.first_part[l], rest = (block - a.first_block[l]) / parts;
    const int tiles = static_cast<int>(a.p.key_heads) * a.head_tiles,
              all_heads = static_cast<int>(a.p.query_heads) / static_cast<int>(a.p.key_heads);
    const int head_tile = rest % tiles % a.head_tiles;
    tile.level = l;
    tile.part = (block - a.first_block[l]) % parts;
    tile.first = rest / tiles;
    tile.key_head = rest % tiles / a.head_tiles;
    tile.head = tile.key_head * all_heads + head_tile * a.tile_heads;
    tile.heads = min(a.tile_heads, all_heads - head_tile * a.tile_heads);
    tile.rank = 0;
    tile.slots = shared ? a.tile_slots : 1;
    int slot = tile.first;
    if (shared) {
        tile.rank = level.rank[tile.first];
        if (tile.rank < 0 || tile.rank % tile.slots != 0) return false;
        slot = level.order[tile.first];
    }
    tile.segment = decode_segment(level, slot);
    tile.held = decode_held(a, l, slot);
    tile.appended = appends ? tile.held - 1 : -1;
    return tile.held > tile.part * static_cast<int>(level.part);
}

// The tokens of a tile's segment and key head in the keys, or the values, of its level.
template <class T, bool kValues>
struct DecodeTokens {
    const DecodeLevel& level;
    T* first;
    const int32_t* pages;
    const T* fresh;  // the new token, which the buffers may not have yet
    int appended, width;

    VLMK_DEVICE DecodeTokens(const DecodeArguments& a, const DecodeTile& tile)
        : level(a.levels[tile.level]), fresh(nullptr), appended(tile.appended) {
        const DecodeAttention& p = a.p;
        first = static_cast<T*>(kValues ? level.value : level.key);
        first += tile.key_head * (kValues ? level.value_stride_head : level.key_stride_head);
        if (level.table == nullptr) first += tile.segment * stride_n();
        pages = level.table == nullptr ? nullptr : level.table + tile.segment * level.table_stride;
        if (appended >= 0 && kValues) {  // the slot is tile.first
            fresh = static_cast<const T*>(p.new_value) + tile.first * p.value_stride_slot + tile.key_head * p.value_stride_head;
        } else if (appended >= 0) {
            fresh = static_cast<const T*>(p.new_key) + tile.first * p.key_stride_slot + tile.key_head * p.key_stride_head;
        }
        width = static_cast<int>(kValues ? p.value_width : p.width);
    }

    VLMK_DEVICE int64_t stride_n() const { return kValues ? level.value_stride_n : level.key_stride_n; }
    VLMK_DEVICE int64_t stride_token() const { return kValues ? level.value_stride_token : level.key_stride_token; }

    // The address of a token in the buffers; null: on a page that does not exist.
    VLMK_DEVICE T* stored(int j) const {
        if (pages == nullptr) return first + j * stride_token();
        const int size = static_cast<int>(level.page_size), page = pages[j / size];
        if (page < 0 || page >= level.num_pages) return nullptr;
        return first + page * stride_n() + j % size * stride_token();
    }
    VLMK_DEVICE const T* read(int j) const {
        const T* at = stored(j);
        return j == appended && at != nullptr ? fresh : at;
    }
};

// Writes the new token into the buffers.
template <class T, bool kValues>
VLMK_DEVICE void decode_append(const DecodeArguments& a, const DecodeTile& tile, const DecodeTokens<T, kValues>& tokens) {
    const bool mine = tile.appended >= 0 && tile.appended / static_cast<int>(tokens.level.part) == tile.part;
    if (!mine || tile.head != tile.key_head * (static_cast<int>(a.p.query_heads) / static_cast<int>(a.p.key_heads))) return;
    T* to = tokens.stored(tile.appended);
    if (to == nullptr) return;
    for (int d = threadIdx.x; d < tokens.width; d += kDecodeThreads) to[d] = tokens.fresh[d];
}

// The kVec<T> elements from `first` on of a row of `width` elements, 0 beyond it and for a null row.
template <class T>
VLMK_DEVICE uint4 decode_vector(const T* row, int first, int width) {
    if (row == nullptr) return make_uint4(0, 0, 0, 0);
    row += first;
    if (first + kVec<T> <= width && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
        return __ldg(reinterpret_cast<const uint4*>(row));
    }
    float x[kVec<T>];
#pragma unroll
    for (int i = 0; i < kVec<T>; ++i) x[i] = first + i < width ? load_one(row + i) : 0.0f;
    return pack<T>(x);
}

// ---- 16-bit formats ----

// The vector of a key or a value in a buffer whose rows have kVectors vectors.
template <int kVectors, bool kValues>
VLMK_DEVICE int decode_place(int key, int vector) {
    return key * kVectors + (vector ^ (kValues ? (key >> 1 & 3) << 1 : (key & 1) << 2));
}

// Starts to fill a buffer with the tokens [first, first + kDecodeKeys): 0 from `end` on and beyond the width. A key on a page
// that does not exist is NaN, so that its score is.
template <int kVectors, class T, bool kValues>
VLMK_DEVICE void decode_load(uint4* buffer, const DecodeTokens<T, kValues>& tokens, int first, int end) {
    constexpr uint32_t kNaNs = 0x7fff7fffu;
    static_assert(kDecodeThreads % kVectors == 0);
    const int vector = threadIdx.x % kVectors, feature = vector * kVec<T>;
#pragma unroll 1
    for (int key = threadIdx.x / kVectors; key < kDecodeKeys; key += kDecodeThreads / kVectors) {
        uint4* to = buffer + decode_place<kVectors, kValues>(key, vector);
        const bool inside = first + key < end;
        const T* row = inside ? tokens.read(first + key) : nullptr;
        if (row != nullptr && feature + kVec<T> <= tokens.width && reinterpret_cast<uintptr_t>(row) % 16 == 0) {
            copy_async(to, row + feature);
        } else if (!kValues && inside && row == nullptr) {
            *to = make_uint4(kNaNs, kNaNs, kNaNs, kNaNs);
        } else {
            *to = decode_vector(row, feature, tokens.width);
        }
    }
}

// (m, l, acc) of the two rows g and g + 8 of a lane, and what they see: tokens [begin, held).
template <int kWidth>
struct DecodeSums {
    float m[2] = {kDecodeLowest, kDecodeLowest};
    float l[2] = {0, 0};  // of the keys of this lane
    float acc[kWidth / 64][8][4] = {};
    int begin[2];
};

// Adds kKeys keys from `key` on of a buffer to the sums.
template <class T, int kWidth, int kKeys>
VLMK_DEVICE void decode_scores(const uint4* keys, int key, const uint4 (&query)[kWidth / 32][2], float scale, int first,
                               int held, DecodeSums<kWidth>& sums, uint32_t (&shares)[kKeys / 8][2]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float s[kKeys / 8][4] = {};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int x = 0; x < kWidth / 32; ++x) {
            const uint4 b = keys[decode_place<kWidth / 8, false>(key + 8 * j + g, 4 * x + t)];
            const uint32_t low[4] = {query[x][0].x, query[x][1].x, query[x][0].y, query[x][1].y};
            const uint32_t high[4] = {query[x][0].z, query[x][1].z, query[x][0].w, query[x][1].w};
            mma(s[j], low, b.x, b.y, T{});
            mma(s[j], high, b.z, b.w, T{});
        }
    }
    float top[2] = {sums.m[0], sums.m[1]};
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int at = first + key + 8 * j + 2 * t + i % 2;
            s[j][i] = at < held && at >= sums.begin[i / 2] ? s[j][i] * scale : -kInfinity;
            top[i / 2] = fmaxf(top[i / 2], s[j][i]);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], 2));
        const float alpha = exp2_approx(sums.m[r] - top[r]);
        sums.m[r] = top[r];
        sums.l[r] *= alpha;
#pragma unroll
        for (int y = 0; y < kWidth / 64; ++y) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                sums.acc[y][i][2 * r] *= alpha;
                sums.acc[y][i][2 * r + 1] *= alpha;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float first_share = exp2_approx(s[j][2 * r] - top[r]), second_share = exp2_approx(s[j][2 * r + 1] - top[r]);
            sums.l[r] += first_share + second_share;
            shares[j][r] = narrow(first_share, second_share, T{});
        }
    }
}

template <class T, int kWidth, int kKeys>
VLMK_DEVICE void decode_values(const uint4* values, int key, const uint32_t (&shares)[kKeys / 8][2], DecodeSums<kWidth>& sums) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
        const uint32_t a[4] = {shares[2 * k][0], shares[2 * k][1], shares[2 * k + 1][0], shares[2 * k + 1][1]};
        const int row = key + 16 * k + 2 * t;
#pragma unroll
        for (int y = 0; y < kWidth / 64; ++y) {
            const uint4 v0 = values[decode_place<kWidth / 8, true>(row, 8 * y + g)];
            const uint4 v1 = values[decode_place<kWidth / 8, true>(row + 1, 8 * y + g)];
            const uint4 v2 = values[decode_place<kWidth / 8, true>(row + 8, 8 * y + g)];
            const uint4 v3 = values[decode_place<kWidth / 8, true>(row + 9, 8 * y + g)];
            float (&acc)[8][4] = sums.acc[y];
            mma(acc[0], a, low_halves(v0.x, v1.x), low_halves(v2.x, v3.x), T{});
            mma(acc[1], a, high_halves(v0.x, v1.x), high_halves(v2.x, v3.x), T{});
            mma(acc[2], a, low_halves(v0.y, v1.y), low_halves(v2.y, v3.y), T{});
            mma(acc[3], a, high_halves(v0.y, v1.y), high_halves(v2.y, v3.y), T{});
            mma(acc[4], a, low_halves(v0.z, v1.z), low_halves(v2.z, v3.z), T{});
            mma(acc[5], a, high_halves(v0.z, v1.z), high_halves(v2.z, v3.z), T{});
            mma(acc[6], a, low_halves(v0.w, v1.w), low_halves(v2.w, v3.w), T{});
            mma(acc[7], a, high_halves(v0.w, v1.w), high_halves(v2.w, v3.w), T{});
        }
    }
}

// The partial result of a row.
VLMK_DEVICE float* decode_partial(const DecodeArguments& a, const DecodeTile& tile, DecodeRow row) {
    const int64_t parts = a.first_part[a.p.num_levels];
    return a.p.partial + ((row.slot * a.p.query_heads + row.head) * parts + a.first_part[tile.level] + tile.part) *
                             decode_row(a.p.value_width);
}

// The lane's outputs of row r (g or g + 8): columns 64y + 16t to 64y + 16t + 15, as four vectors.
template <int kWidth>
VLMK_DEVICE void decode_store(const DecodeSums<kWidth>& sums, int r, float* row, int padded) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int y = 0; y < kWidth / 64; ++y) {
        if (64 * y + 16 * t >= padded) continue;
        float* to = row + 64 * y + 16 * t;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
                float x[4];
#pragma unroll
                for (int k = 0; k < 4; ++k) x[k] = sums.acc[y][i + k][2 * r + half];
                *reinterpret_cast<uint4*>(to + 8 * half + i) = pack<float>(x);
            }
        }
    }
}

// kRowWarps: warps that have rows of their own, 4 or 1. The other warps have other keys of each block.
template <class T, int kWidth, int kRowWarps>
VLMK_DEVICE void decode_part(const DecodeArguments& a, const DecodeTile& tile, uint4* ring) {
    constexpr int kVectors = kWidth / 8, kBuffer = kDecodeKeys * kVectors, kKeys = kDecodeKeys * kRowWarps / kDecodeWarps;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int part = static_cast<int>(a.levels[tile.level].part), padded = static_cast<int>(decode_row(a.p.value_width)) - 16;
    const DecodeTokens<T, false> keys(a, tile);
    const DecodeTokens<T, true> values(a, tile);
    const int first_row = kRowWarps == 1 ? 0 : 16 * warp;

    DecodeSums<kWidth> sums;
    bool active = false;
    uint4 query[kWidth / 32][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const DecodeRow row = decode_row_of(a, tile, first_row + g + 8 * r);
        sums.begin[r] = row.slot < 0 ? tile.held : decode_begin(a, tile.level, row.slot);
        active |= row.slot >= 0;
        const T* q = row.slot < 0 ? nullptr
                                  : static_cast<const T*>(a.p.query) + row.slot * a.p.query_stride_slot +
                                        row.head * a.p.query_stride_head;
#pragma unroll
        for (int x = 0; x < kWidth / 32; ++x) query[x][r] = decode_vector(q, 32 * x + 8 * t, keys.width);
    }
    active = __any_sync(kAllLanes, active);

    // From the block of keys in which the first row begins. All warps find the same one.
    int start = tile.held;
    for (int row = lane; row < 16 * kRowWarps; row += 32) {
        const int slot = a.p.window == 0 ? -1 : decode_row_of(a, tile, row).slot;
        if (slot >= 0) start = min(start, decode_begin(a, tile.level, slot));
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) start = min(start, __shfl_xor_sync(kAllLanes, start, lanes));
    start = max(a.p.window == 0 ? 0 : start / kDecodeKeys * kDecodeKeys, tile.part * part);
    const int end = min(tile.held, (tile.part + 1) * part),
              blocks = end > start ? (end - start + kDecodeKeys - 1) / kDecodeKeys : 0;

    auto load = [&](int step) {  // steps alternate between keys and values
        uint4* buffer = ring + step % kDecodeStages * kBuffer;
        const int first = start + step / 2 * kDecodeKeys;
        if (step < 2 * blocks) {
            if (step % 2 == 0) {
                decode_load<kVectors>(buffer, keys, first, end);
            } else {
                decode_load<kVectors>(buffer, values, first, end);
            }
        }
        commit_copies();
    };
    load(0);
    load(1);
    const int own_key = kRowWarps == 1 ? warp * kKeys : 0;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
        uint32_t shares[kKeys / 8][2];
        wait_copies<1>();
        __syncthreads();  // the keys are there, and no warp still reads the buffer that is filled next
        load(2 * block + 2);
        if (active) {
            decode_scores<T, kWidth, kKeys>(ring + 2 * block % kDecodeStages * kBuffer, own_key, query, a.p.scale,
                                            start + block * kDecodeKeys, tile.held, sums, shares);
        }
        wait_copies<1>();
        __syncthreads();
        load(2 * block + 3);
        if (active) {
            decode_values<T, kWidth, kKeys>(ring + (2 * block + 1) % kDecodeStages * kBuffer, own_key, shares, sums);
        }
    }
    wait_copies<0>();
    decode_append(a, tile, keys);
    decode_append(a, tile, values);

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sums.l[r] += __shfl_xor_sync(kAllLanes, sums.l[r], 1);
        sums.l[r] += __shfl_xor_sync(kAllLanes, sums.l[r], 2);
    }
    if constexpr (kRowWarps > 1) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const DecodeRow to = decode_row_of(a, tile, first_row + g + 8 * r);
            if (to.slot < 0) continue;
            float* row = decode_partial(a, tile, to);
            decode_store(sums, r, row, padded);
            if (t == 0) {
                row[padded] = sums.m[r];
                row[padded + 1] = sums.l[r];
            }
        }
    } else {
        // Merges the warps in order.
        constexpr int kRow = kWidth + 4;
        float* all = reinterpret_cast<float*>(ring);  // (warps, 16 rows, kRow)
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float* row = all + (warp * 16 + g + 8 * r) * kRow;
            decode_store(sums, r, row, kWidth);
            if (t == 0) {
                row[kWidth] = sums.m[r];
                row[kWidth + 1] = sums.l[r];
            }
        }
        __syncthreads();
        const DecodeRow to = decode_row_of(a, tile, threadIdx.x / 8);
        if (to.slot < 0) return;
        const float* from = all + threadIdx.x / 8 * kRow;
        float m = kDecodeLowest, l = 0, weight[kDecodeWarps];
#pragma unroll
        for (int w = 0; w < kDecodeWarps; ++w) m = fmaxf(m, from[w * 16 * kRow + kWidth]);
#pragma unroll
        for (int w = 0; w < kDecodeWarps; ++w) {
            weight[w] = exp2_approx(from[w * 16 * kRow + kWidth] - m);
            l = fmaf(weight[w], from[w * 16 * kRow + kWidth + 1], l);
        }
        float* row = decode_partial(a, tile, to);
        for (int c = threadIdx.x % 8; c < padded; c += 8) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < kDecodeWarps; ++w) sum = fmaf(weight[w], from[w * 16 * kRow + c], sum);
            row[c] = sum;
        }
        if (threadIdx.x % 8 == 0) {
            row[padded] = m;
            row[padded + 1] = l;
        }
    }
}

// ---- fp32 ----

constexpr int kDecodeFloatRows = 16;  // of a tile, four per warp

// Lane j of a warp computes the scores of key j of 32 for four rows, then four output columns. Warps read the same keys, from
// L1.
VLMK_DEVICE void decode_part_fp32(const DecodeArguments& a, const DecodeTile& tile) {
    constexpr int kRows = kDecodeFloatRows / kDecodeWarps;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int part = static_cast<int>(a.levels[tile.level].part), padded = static_cast<int>(decode_row(a.p.value_width)) - 16;
    const DecodeTokens<float, false> keys(a, tile);
    const DecodeTokens<float, true> values(a, tile);
    DecodeRow rows[kRows];
    const float* query[kRows];
    int begin[kRows], start = tile.held;
    float m[kRows], l[kRows], acc[kRows][4] = {};
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        rows[r] = decode_row_of(a, tile, warp * kRows + r);
        const bool valid = rows[r].slot >= 0;
        query[r] = valid ? static_cast<const float*>(a.p.query) + rows[r].slot * a.p.query_stride_slot +
                               rows[r].head * a.p.query_stride_head
                         : nullptr;
        begin[r] = valid ? decode_begin(a, tile.level, rows[r].slot) : tile.held;
        start = min(start, begin[r]);
        m[r] = kDecodeLowest;
        l[r] = 0;
    }
    const int end = min(tile.held, (tile.part + 1) * part);
    for (int first = max(start / 32 * 32, tile.part * part); first < end; first += 32) {
        const int j = first + lane;
        const float* key = j < end ? keys.read(j) : nullptr;
        const float* value = j < end ? values.read(j) : nullptr;
        float s[kRows] = {};
        for (int d = 0; d < keys.width; d += 4) {
            float k[4], q[4];
            unpack<float>(decode_vector(key, d, keys.width), k);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                unpack<float>(decode_vector(query[r], d, keys.width), q);
#pragma unroll
                for (int i = 0; i < 4; ++i) s[r] = fmaf(q[i], k[i], s[r]);
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            s[r] = j < end && j >= begin[r] ? (key == nullptr ? kNaN : s[r] * a.p.scale) : -kInfinity;
            float top = fmaxf(m[r], s[r]);
#pragma unroll
            for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, lanes));
            const float alpha = exp2_approx(m[r] - top);
            m[r] = top;
            s[r] = exp2_approx(s[r] - top);
            l[r] = fmaf(l[r], alpha, s[r]);
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[r][i] *= alpha;
        }
        for (int k = 0; k < min(32, end - first); ++k) {
            const auto address = __shfl_sync(kAllLanes, reinterpret_cast<uintptr_t>(value), k);
            float v[4];
            unpack<float>(decode_vector(reinterpret_cast<const float*>(address), 4 * lane, values.width), v);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const float share = __shfl_sync(kAllLanes, s[r], k);
#pragma unroll
                for (int i = 0; i < 4; ++i) acc[r][i] = fmaf(share, v[i], acc[r][i]);
            }
        }
    }
    decode_append(a, tile, keys);
    decode_append(a, tile, values);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) l[r] += __shfl_xor_sync(kAllLanes, l[r], lanes);
        if (rows[r].slot < 0) continue;
        float* row = decode_partial(a, tile, rows[r]);
        if (4 * lane < padded) *reinterpret_cast<uint4*>(row + 4 * lane) = pack<float>(acc[r]);
        if (lane == 0) {
            row[padded] = m[r];
            row[padded + 1] = l[r];
        }
    }
}

// Grid: for each level (slots * tiles of heads * parts,), the part fastest. Blocks without a tile, or beyond a segment, return.
template <class T, int kWidth>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeResident)
    decode_parts_kernel(const __grid_constant__ DecodeArguments a) {
    DecodeTile tile;
    if (!decode_tile(a, tile)) return;
    if constexpr (sizeof(T) == 4) {
        decode_part_fp32(a, tile);
    } else {
        VLMK_SHARED(uint4, ring, kDecodeStages * kDecodeKeys * kWidth / 8);
        if (tile.slots * a.tile_heads > 16) {
            decode_part<T, kWidth, kDecodeWarps>(a, tile, ring);
        } else {
            decode_part<T, kWidth, 1>(a, tile, ring);
        }
    }
}

// Merges the parts of a row in order.
// Grid: (ceil(slots * query_heads / kDecodeWarps),), one warp per row.
template <class T>
__global__ void __launch_bounds__(kDecodeThreads) decode_merge_kernel(const __grid_constant__ DecodeArguments a) {
    const int64_t index = static_cast<int64_t>(blockIdx.x) * kDecodeWarps + threadIdx.x / 32;
    if (index >= a.p.slots * a.p.query_heads) return;
    const int lane = threadIdx.x % 32, slot = static_cast<int>(index) / static_cast<int>(a.p.query_heads);
    const int64_t width = decode_row(a.p.value_width), padded = width - 16;
    const float* partial = a.p.partial + index * a.first_part[a.p.num_levels] * width;
    float m = kDecodeLowest, l = 0, sum[kDecodeWidth / 32] = {};
    for (int level = 0; level < a.p.num_levels; ++level) {
        const int held = decode_held(a, level, slot);
        if (held < 0) l = kNaN;
        if (held <= 0) continue;
        const int part = static_cast<int>(a.levels[level].part);
#pragma unroll 4
        for (int i = decode_begin(a, level, slot) / part; i < (held + part - 1) / part; ++i) {
            const float* row = partial + (a.first_part[level] + i) * width;
            const float top = fmaxf(m, row[padded]), alpha = exp2_approx(m - top), weight = exp2_approx(row[padded] - top);
            l = fmaf(l, alpha, row[padded + 1] * weight);
#pragma unroll
            for (int k = 0; k < kDecodeWidth / 32; ++k) {
                if (32 * k < padded) sum[k] = fmaf(sum[k], alpha, row[32 * k + lane] * weight);
            }
            m = top;
        }
    }
    const float total = l == 0 ? 1 : l;
    T* out = static_cast<T*>(a.p.out) + index * a.p.value_width;
#pragma unroll
    for (int k = 0; k < kDecodeWidth / 32; ++k) {
        if (32 * k + lane < a.p.value_width) store_one(out + 32 * k + lane, sum[k] / total);
    }
    if (lane == 0) a.p.lse[index] = l == 0 ? -kInfinity : (m + log2f(l)) * 0.69314718055994530942f;
}

}  // namespace vlmk::cuda
