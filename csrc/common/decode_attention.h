// Arguments of decode_attention on every device. vlmkernels/ops/decode_attention/native.py fills them in.
//
// With the keys k_j and values v_j on the path of a slot and s_j = q . k_j scale log2(e):
//   m = max_j s_j,   l = sum_j 2^(s_j - m),   acc = sum_j 2^(s_j - m) v_j,   out = acc / l,   lse = (m + log2 l) ln 2
// The tokens of a segment are read in fixed parts, each of which gives (m, l, acc) for the slots that read it. The parts of a
// slot are merged in order:  m = max_i m_i,   l = sum_i 2^(m_i - m) l_i,   acc = sum_i 2^(m_i - m) acc_i
#pragma once

#include "dtypes.h"

namespace vlmk {

constexpr int kDecodeMaxLevels = 8;
constexpr int64_t kDecodeMaxWidth = 128;  // CUDA: limited by the registers of a thread

// One level, as level_fields() of native.py describes it. Strides are in elements. The last axis is contiguous.
struct DecodeLevel {
    void* key;               // (N, Hkv, capacity, D), or with a table (num_pages, Hkv, page_size, D)
    void* value;             // the same with Dv
    const int32_t* lengths;  // (N,)
    const int32_t* segment;  // (S,), -1: none; null: slot s reads segment s
    const int32_t* table;    // (N, max_pages); null: not paged
    const int32_t* order;    // (S,): the slots sorted by segment; null without `segment`, and on the CPU
    const int32_t* rank;     // (S,): order[i] is the rank[i]-th slot of its segment; -1: it reads none
    int64_t num_segments;    // N
    int64_t capacity;        // of a segment, in tokens
    int64_t page_size;
    int64_t num_pages;
    int64_t table_stride;
    int64_t key_stride_n;
    int64_t key_stride_head;
    int64_t key_stride_token;
    int64_t value_stride_n;
    int64_t value_stride_head;
    int64_t value_stride_token;
};
static_assert(sizeof(DecodeLevel) == 18 * sizeof(int64_t));

struct DecodeAttention {
    VLMK_STRUCT(DecodeAttention);
    VLMK_FIELD(const DecodeLevel*, levels);  // in host memory
    VLMK_FIELD(int64_t, num_levels);
    VLMK_FIELD(DType, dtype);            // of all but lse and partial
    VLMK_FIELD(const void*, query);      // (slots, query_heads, width)
    VLMK_FIELD(const void*, new_key);    // (slots, key_heads, width), or null
    VLMK_FIELD(const void*, new_value);  // (slots, key_heads, value_width)
    VLMK_FIELD(void*, out);              // (slots, query_heads, value_width), contiguous
    VLMK_FIELD(float*, lse);             // (slots, query_heads), contiguous
    VLMK_FIELD(float*, partial);         // (slots, query_heads, parts, row): the parts of all levels, see decode_parts
    VLMK_FIELD(int64_t, slots);
    VLMK_FIELD(int64_t, query_heads);
    VLMK_FIELD(int64_t, key_heads);
    VLMK_FIELD(int64_t, width);
    VLMK_FIELD(int64_t, value_width);
    VLMK_FIELD(int64_t, query_stride_slot);
    VLMK_FIELD(int64_t, query_stride_head);
    VLMK_FIELD(int64_t, key_stride_slot);
    VLMK_FIELD(int64_t, key_stride_head);
    VLMK_FIELD(int64_t, value_stride_slot);
    VLMK_FIELD(int64_t, value_stride_head);
    VLMK_FIELD(int64_t, part);    // tokens of a part, a multiple of 64
    VLMK_FIELD(int64_t, window);  // a slot sees so many tokens; 0: all
    VLMK_FIELD(float, scale);     // of the scores, times log2(e)
};

// The number of parts of the segments of a level.
VLMK_HD int64_t decode_parts(const DecodeAttention& p, const DecodeLevel& level) {
    return (level.capacity + p.part - 1) / p.part;
}

// The floats of a partial result: acc, padded, then m and l.
VLMK_HD int64_t decode_row(int64_t value_width) { return (value_width + 31) / 32 * 32 + 16; }

// The tokens [begin, end) of its segment that a slot sees at a level.
struct DecodeRange {
    int64_t begin;
    int64_t end;
};

// The segment that a slot reads at a level; -1: none.
VLMK_HD int64_t decode_segment(const DecodeLevel& level, int64_t slot) {
    return level.segment == nullptr ? slot : level.segment[slot];
}

// Whether a slot appends its new token to a segment of this level, which then holds one token more than its length.
VLMK_HD bool decode_appends(const DecodeAttention& p, int64_t level) {
    return p.new_key != nullptr && level == p.num_levels - 1;
}

}  // namespace vlmk
