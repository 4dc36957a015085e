// decode_attention on the CPU. A task computes a part of a segment for one key head and all slots that read the segment: a
// block of keys is transposed once, and all rows (slots x query heads of the key head) are multiplied with it from the cache.
// Formulas: common/decode_attention.h.
//
// Every row is computed by the same operations in the same order whichever rows are beside it, so the result of a slot depends
// neither on other slots nor on the number of threads.
#include "../common/decode_attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "simd.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kKeys = 128;           // keys of a block
constexpr int64_t kPanel = 2 * kLanes;   // keys, or columns of the values, that a tile multiplies
constexpr int64_t kPerThread = 1 << 18;  // least number of products per thread
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kLowest = std::numeric_limits<float>::lowest();
// Rows of a tile: its sums, 2 vectors per row, are in registers.
#if defined(__AVX512F__)
constexpr int kRows = 8;
#elif defined(__AVX2__)
constexpr int kRows = 3;
#else
constexpr int kRows = 1;
#endif

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Memory that is aligned to vectors and not initialized.
template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t size) : memory_(new T[size + 64 / sizeof(T)]) {
        void* address = memory_.get();
        size_t space = size * sizeof(T) + 64;
        begin_ = static_cast<T*>(std::align(64, size * sizeof(T), address, space));
    }
    T* get() const { return begin_; }

  private:
    std::unique_ptr<T[]> memory_;
    T* begin_;
};

// The address of a token.
template <class T>
struct Tokens {
    T* first;
    const int32_t* pages;
    int64_t page_size, stride_page, stride_token;

    Tokens(void* buffer, const DecodeLevel& level, int64_t segment, int64_t head, int64_t stride_n, int64_t stride_head,
           int64_t stride_token)
        : first(static_cast<T*>(buffer) + head * stride_head + (level.table == nullptr ? segment * stride_n : 0)),
          pages(level.table == nullptr ? nullptr : level.table + segment * level.table_stride),
          page_size(level.page_size),
          stride_page(stride_n),
          stride_token(stride_token) {}

    T* operator[](int64_t j) const {
        return pages == nullptr ? first + j * stride_token
                                : first + pages[j / page_size] * stride_page + j % page_size * stride_token;
    }
};

template <class T>
Tokens<T> keys_of(const DecodeLevel& level, int64_t segment, int64_t head) {
    return {level.key, level, segment, head, level.key_stride_n, level.key_stride_head, level.key_stride_token};
}
template <class T>
Tokens<T> values_of(const DecodeLevel& level, int64_t segment, int64_t head) {
    return {level.value, level, segment, head, level.value_stride_n, level.value_stride_head, level.value_stride_token};
}

// The number of tokens that a slot reads at a level, its new one included.
int64_t length_of(const DecodeAttention& p, int64_t level, int64_t slot) {
    int64_t segment = decode_segment(p.levels[level], slot);
    return segment < 0 ? 0 : p.levels[level].lengths[segment] + decode_appends(p, level);
}

// ranges[l * slots + s]: what slot s sees at level l.
std::vector<DecodeRange> ranges_of(const DecodeAttention& p) {
    std::vector<DecodeRange> ranges(p.num_levels * p.slots);
    for (int64_t s = 0; s < p.slots; ++s) {
        int64_t hidden = 0;
        if (p.window > 0) {
            for (int64_t l = 0; l < p.num_levels; ++l) hidden += length_of(p, l, s);
            hidden = std::max<int64_t>(hidden - p.window, 0);
        }
        for (int64_t l = 0; l < p.num_levels; ++l) {
            int64_t length = length_of(p, l, s), begin = std::min(hidden, length);
            ranges[l * p.slots + s] = {begin, length};
            hidden -= begin;
        }
    }
    return ranges;
}

// ---- tiles ----

#if defined(__AVX512F__)
inline void transpose(f32 (&x)[kLanes]) {
    auto get = [&](int i) { return bit_cast<__m512>(x[i]); };
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(get(i), get(i + 1));
        a[i + 1] = _mm512_unpackhi_ps(get(i), get(i + 1));
    }
    auto low = [](__m512 u, __m512 v) {
        return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(u), _mm512_castps_pd(v)));
    };
    auto high = [](__m512 u, __m512 v) {
        return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(u), _mm512_castps_pd(v)));
    };
    for (int i = 0; i < 16; i += 4) {  // b[i + c]: columns c, 4 + c, 8 + c, 12 + c of rows i to i + 3
        b[i] = low(a[i], a[i + 2]);
        b[i + 1] = high(a[i], a[i + 2]);
        b[i + 2] = low(a[i + 1], a[i + 3]);
        b[i + 3] = high(a[i + 1], a[i + 3]);
    }
    for (int c = 0; c < 4; ++c) {
        __m512 even_top = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88), odd_top = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
        __m512 even = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88), odd = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
        x[c] = bit_cast<f32>(_mm512_shuffle_f32x4(even_top, even, 0x88));
        x[8 + c] = bit_cast<f32>(_mm512_shuffle_f32x4(even_top, even, 0xdd));
        x[4 + c] = bit_cast<f32>(_mm512_shuffle_f32x4(odd_top, odd, 0x88));
        x[12 + c] = bit_cast<f32>(_mm512_shuffle_f32x4(odd_top, odd, 0xdd));
    }
}
#else
inline void transpose(f32 (&x)[kLanes]) {
    float rows[kLanes][kLanes], columns[kLanes][kLanes];
    std::memcpy(rows, x, sizeof(rows));
    for (int i = 0; i < kLanes; ++i) {
        for (int j = 0; j < kLanes; ++j) columns[j][i] = rows[i][j];
    }
    std::memcpy(x, columns, sizeof(columns));
}
#endif

// How products are computed. A word, 32 bits, holds kPerWord neighboring elements of a dot product.
//   load_words(p, n)                the n <= kLanes * kPerWord elements at p as words, the others 0
//   pack_values(rows, column, at)   words of the values of kPerWord tokens, for the kPanel columns from `column` on
//   madd(sum, word, panel)          adds the products of one row's word with the words of kLanes keys or columns

template <class T>
struct Floats {
    using Word = float;
    static constexpr int kPerWord = 1;
    static f32 load_words(const T* p, int64_t n) { return n >= kLanes ? load(p) : load_tail(p, n, 0.0f); }
    static void pack_values(const T* const* rows, int64_t, int64_t column, int64_t width, float* at) {
        for (int64_t c = 0; c < kPanel; c += kLanes) {
            int64_t left = width - column - c;
            store(at + c, left > 0 ? load_words(rows[0] + column + c, left) : f32{});
        }
    }
    static void store_words(float* at, f32 x) { store(at, x); }
    static f32 madd(f32 sum, float word, f32 panel) { return sum + word * panel; }
};

#if defined(__AVX512F__)
// With the instructions of AVX512_BF16, which not every processor with AVX-512 has. They are written as assembly because a
// compiler knows them only in functions for such a processor, into which it does not inline templates for all others.
struct Pairs {
    using Word = float;  // only copied
    static constexpr int kPerWord = 2;
    static bool supported() { return __builtin_cpu_supports("avx512bf16"); }
    static f32 load_words(const bf16* p, int64_t n) {
        if (n >= 2 * kLanes) return load(reinterpret_cast<const float*>(p));
        f32 x{};
        std::memcpy(&x, p, n * sizeof(bf16));
        return x;
    }
    static void pack_values(const bf16* const* rows, int64_t tokens, int64_t column, int64_t width, float* at) {
        int64_t left = width - column;
        __m512i first = bit_cast<__m512i>(load_words(rows[0] + column, left));
        __m512i second = tokens > 1 ? bit_cast<__m512i>(load_words(rows[1] + column, left)) : _mm512_setzero_si512();
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                             36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        store(at, bit_cast<f32>(_mm512_permutex2var_epi16(first, low, second)));
        store(at + kLanes, bit_cast<f32>(_mm512_permutex2var_epi16(first, high, second)));
    }
    static void store_words(float* at, f32 x) {
        u16 raw;
        asm("vcvtneps2bf16 %1, %0" : "=v"(raw) : "v"(x));
        std::memcpy(at, &raw, sizeof(raw));
    }
    static f32 madd(f32 sum, float word, f32 panel) {
        asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(panel), "v"(splat(word)));
        return sum;
    }
};
#endif

// panel[w * kPanel + j] = word w of key j; 0 beyond the last key and beyond the width.
template <class Unit, class T>
void pack_keys(const T* const* keys, int64_t count, int64_t width, float* panel) {
    for (int64_t j = 0; j < kPanel; j += kLanes) {
        for (int64_t d = 0; d < width; d += kLanes * Unit::kPerWord) {
            f32 x[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                x[i] = j + i < count ? Unit::load_words(keys[j + i] + d, width - d) : f32{};
                if (j + kLanes + i < count) __builtin_prefetch(keys[j + kLanes + i] + d);
            }
            transpose(x);
            for (int i = 0; i < kLanes; ++i) store(panel + (d / Unit::kPerWord + i) * kPanel + j, x[i]);
        }
    }
}

// Cache lines that the tiles prefetch one by one while they compute: a burst would wait for memory.
class Ahead {
  public:
    // Lists `count` tokens, to be prefetched in `steps` steps.
    template <class T>
    void list(const T* const* tokens, int64_t count, int64_t width, int64_t steps) {
        const int64_t bytes = width * sizeof(T), size = count * ((bytes + 63) / 64);
        if (static_cast<int64_t>(lines_.size()) < size) lines_.resize(size);
        next_ = end_ = lines_.data();
        for (int64_t j = 0; j < count; ++j) {
            const char* row = reinterpret_cast<const char*>(tokens[j]);
            for (int64_t at = 0; at < bytes; at += 64) *end_++ = row + at;
        }
        twice_ = size > steps;
    }

    // The lines of a tile, in registers.
    class Cursor {
      public:
        explicit Cursor(Ahead& ahead) : ahead_(ahead), next_(ahead.next_), end_(ahead.end_), twice_(ahead.twice_) {}
        ~Cursor() { ahead_.next_ = next_; }
        void step() {
            if (next_ < end_) __builtin_prefetch(*next_++, 0, 2);
            if (twice_ && next_ < end_) __builtin_prefetch(*next_++, 0, 2);
        }

      private:
        Ahead& ahead_;
        const char** next_;
        const char** const end_;
        const bool twice_;
    };

  private:
    std::vector<const char*> lines_;
    const char** next_ = nullptr;
    const char** end_ = nullptr;
    bool twice_ = false;
};

// scores[r * kKeys + j] = scale sum_w q[w * kRows + r] panel[w * kPanel + j].
template <class Unit, int kCount>
void score_tile(const float* q, const float* panel, int64_t words, float scale, float* scores, Ahead& lines) {
    Ahead::Cursor ahead(lines);
    f32 sum[kCount][2] = {};
    for (int64_t w = 0; w < words; ++w) {
        ahead.step();
        f32 first = load(panel + w * kPanel), second = load(panel + w * kPanel + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
            sum[r][0] = Unit::madd(sum[r][0], q[w * kRows + r], first);
            sum[r][1] = Unit::madd(sum[r][1], q[w * kRows + r], second);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
        store(scores + r * kKeys, sum[r][0] * scale);
        store(scores + r * kKeys + kLanes, sum[r][1] * scale);
    }
}

// rows[r][c] = alpha[r] rows[r][c] + sum_w shares[r * kKeys + w] panel[w * kPanel + c]. Without alpha, rows are not read.
template <class Unit, int kCount>
void value_tile(const float* shares, const float* alpha, const float* panel, int64_t words, int64_t column, float* const* rows,
                Ahead& lines) {
    Ahead::Cursor ahead(lines);
    f32 sum[kCount][2] = {};
    if (alpha != nullptr) {
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
            sum[r][0] = load(rows[r] + column) * alpha[r];
            sum[r][1] = load(rows[r] + column + kLanes) * alpha[r];
        }
    }
    for (int64_t w = 0; w < words; ++w) {
        ahead.step();
        f32 first = load(panel + w * kPanel), second = load(panel + w * kPanel + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
            sum[r][0] = Unit::madd(sum[r][0], shares[r * kKeys + w], first);
            sum[r][1] = Unit::madd(sum[r][1], shares[r * kKeys + w], second);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
        store(rows[r] + column, sum[r][0]);
        store(rows[r] + column + kLanes, sum[r][1]);
    }
}

// Calls f with the number of rows of a tile as a constant.
template <int kCount = kRows, class Function>
void with_rows(int64_t count, Function f) {
    if constexpr (kCount > 1) {
        if (count < kCount) return with_rows<kCount - 1>(count, f);
    }
    f(std::integral_constant<int, kCount>{});
}

// The scores of a row, of which `padded` are computed, become words of 2^(s - m). Returns the factor of what was summed before.
// The row sees the keys [begin, end) of the block.
template <class Unit>
float soften(float* scores, int64_t begin, int64_t end, int64_t padded, float& m, float& l) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < begin; ++j) scores[j] = kNone;
    for (int64_t j = end; j < padded; ++j) scores[j] = kNone;
    f32 top[2] = {load(scores), load(scores + kLanes)};
    for (int64_t j = kPanel; j < padded; j += kPanel) {
        top[0] = max(load(scores + j), top[0]);
        top[1] = max(load(scores + j + kLanes), top[1]);
    }
    float next = std::max(m, hmax(max(top[0], top[1])));
    f32 sum[2] = {};
    for (int64_t j = 0; j < padded; j += kPanel) {
        f32 y[2] = {load(scores + j) - next, load(scores + j + kLanes) - next};
        for (int i = 0; i < 2; ++i) {
            f32 e = exp2_clamp(y[i]);
            sum[i] += e;
            Unit::store_words(scores + (j + i * kLanes) / Unit::kPerWord, e);
        }
    }
    f32 shift = splat(m - next);
    float alpha = exp2_clamp(shift)[0];
    l = l * alpha + hsum(sum[0] + sum[1]);
    m = next;
    return alpha;
}

// ---- tasks ----

// The slots that read a segment, and the tokens from the first to the last that one of them sees.
struct Group {
    int64_t level, segment;
    const int64_t* members;
    int64_t size;
    DecodeRange range;
};

struct Task {
    const Group* group;
    int64_t head, part;
};

// Everything that the tasks of a call share.
struct Call {
    const DecodeAttention& p;
    std::vector<DecodeRange> ranges;
    std::vector<int64_t> members;
    std::vector<Group> groups;
    std::vector<Task> tasks;
    std::vector<int64_t> first_part;  // of a level, among the parts of a slot
    int64_t parts = 0;
    int64_t most_rows = 0;
    double products = 0;

    explicit Call(const DecodeAttention& p) : p(p), ranges(ranges_of(p)) {
        members.resize(p.num_levels * p.slots);
        for (int64_t l = 0; l < p.num_levels; ++l) {
            first_part.push_back(parts);
            parts += decode_parts(p.levels[l]);
            add_groups(l);
        }
        int64_t shared = p.query_heads / p.key_heads;
        for (const Group& group : groups) {
            most_rows = std::max(most_rows, group.size * shared);
            products += static_cast<double>(group.range.end - group.range.begin) * group.size * p.query_heads;
            const int64_t tokens = p.levels[group.level].part;
            for (int64_t part = group.range.begin / tokens; part * tokens < group.range.end; ++part) {
                for (int64_t head = 0; head < p.key_heads; ++head) tasks.push_back({&group, head, part});
            }
        }
    }

    // Sorts the slots by segment.
    void add_groups(int64_t l) {
        const DecodeLevel& level = p.levels[l];
        int64_t* ordered = members.data() + l * p.slots;
        std::vector<int64_t> offsets(level.num_segments + 1);
        for (int64_t s = 0; s < p.slots; ++s) {
            if (decode_segment(level, s) >= 0) ++offsets[decode_segment(level, s) + 1];
        }
        for (int64_t n = 0; n < level.num_segments; ++n) offsets[n + 1] += offsets[n];
        std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
        for (int64_t s = 0; s < p.slots; ++s) {
            int64_t segment = decode_segment(level, s);
            if (segment >= 0) ordered[next[segment]++] = s;
        }
        for (int64_t n = 0; n < level.num_segments; ++n) {
            Group group{l, n, ordered + offsets[n], offsets[n + 1] - offsets[n], {level.capacity, 0}};
            for (int64_t i = 0; i < group.size; ++i) {
                DecodeRange range = ranges[l * p.slots + group.members[i]];
                group.range = {std::min(group.range.begin, range.begin), std::max(group.range.end, range.end)};
            }
            if (group.range.begin < group.range.end) groups.push_back(group);
        }
    }

    float* partial(int64_t slot, int64_t head, int64_t part) const {
        return p.partial + ((slot * p.query_heads + head) * parts + part) * decode_row(p.value_width);
    }
};

template <class T>
void append(const DecodeAttention& p, int64_t slot) {
    const DecodeLevel& level = p.levels[p.num_levels - 1];
    int64_t segment = decode_segment(level, slot);
    if (segment < 0) return;
    for (int64_t h = 0; h < p.key_heads; ++h) {
        const T* key = static_cast<const T*>(p.new_key) + slot * p.key_stride_slot + h * p.key_stride_head;
        const T* value = static_cast<const T*>(p.new_value) + slot * p.value_stride_slot + h * p.value_stride_head;
        std::memcpy(keys_of<T>(level, segment, h)[level.lengths[segment]], key, p.width * sizeof(T));
        std::memcpy(values_of<T>(level, segment, h)[level.lengths[segment]], value, p.value_width * sizeof(T));
    }
}

// The memory of a thread.
template <class T>
struct Buffers {
    int64_t words, padded, value_width;  // of a query, and padded to complete vectors; of a value, padded to panels
    Scratch<float> query, panel, scores;
    std::vector<float> alpha;
    std::vector<float*> rows;
    std::vector<const T*> queries;
    std::vector<DecodeRange> ranges;
    Ahead ahead;

    Buffers(const DecodeAttention& p, int64_t most_rows, int64_t per_word)
        : words((p.width + per_word - 1) / per_word),
          padded(round_up(words, kLanes)),
          value_width(round_up(p.value_width, kPanel)),
          query(round_up(most_rows, kRows) * padded),
          panel(kPanel * std::max(padded, kKeys)),
          scores(round_up(most_rows, kRows) * kKeys),
          alpha(most_rows),
          rows(most_rows),
          queries(most_rows),
          ranges(most_rows) {}
};

// q[(r / kRows * padded + w) * kRows + r % kRows] = word w of the query of row r.
template <class Unit, class T>
void read_queries(const T* const* rows, int64_t num_rows, int64_t width, int64_t padded, float* q) {
    for (int64_t r = 0; r < num_rows; r += kRows, q += padded * kRows) {
        for (int64_t d = 0; d < width; d += kLanes * Unit::kPerWord) {
            f32 x[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                x[i] = i < kRows && r + i < num_rows ? Unit::load_words(rows[r + i] + d, width - d) : f32{};
            }
            transpose(x);
            for (int i = 0; i < kLanes; ++i) std::memcpy(q + (d / Unit::kPerWord + i) * kRows, &x[i], kRows * sizeof(float));
        }
    }
}

// The first key of the blocks that a task reads.
int64_t first_key(const DecodeAttention& p, const Task& task) {
    const int64_t part_begin = task.part * p.levels[task.group->level].part;
    return part_begin + std::max<int64_t>(task.group->range.begin - part_begin, 0) / kKeys * kKeys;
}

// `next`: the task that a thread probably computes after this one, or null.
template <class Unit, class T>
void run_task(const Call& call, const Task& task, const Task* next, Buffers<T>& b) {
    const DecodeAttention& p = call.p;
    const Group& group = *task.group;
    const DecodeLevel& level = p.levels[group.level];
    const int64_t shared = p.query_heads / p.key_heads, num_rows = group.size * shared, tiles = (num_rows + kRows - 1) / kRows;
    const int64_t end = std::min((task.part + 1) * level.part, group.range.end);
    const int64_t begin = first_key(p, task);
    for (int64_t r = 0; r < num_rows; ++r) {
        int64_t slot = group.members[r / shared], head = task.head * shared + r % shared;
        float* row = b.rows[r] = call.partial(slot, head, call.first_part[group.level] + task.part);
        row[b.value_width] = kLowest;
        row[b.value_width + 1] = 0.0f;
        b.ranges[r] = call.ranges[group.level * p.slots + slot];
        b.queries[r] = static_cast<const T*>(p.query) + slot * p.query_stride_slot + head * p.query_stride_head;
    }
    read_queries<Unit>(b.queries.data(), num_rows, p.width, b.padded, b.query.get());
    float* panel = b.panel.get();
    const T *keys[kKeys], *values[kKeys];
    auto find = [&](const T** tokens, bool are_keys, const Task& of, int64_t from, int64_t to) {
        const DecodeLevel& at = p.levels[of.group->level];
        const Tokens<T> all = (are_keys ? keys_of<T> : values_of<T>)(at, of.group->segment, of.head);
        for (int64_t j = from; j < to; ++j) *tokens++ = all[j];
    };
    find(keys, true, task, begin, std::min(begin + kKeys, end));
    for (int64_t first = begin; first < end; first += kKeys) {
        const int64_t count = std::min(kKeys, end - first), padded = round_up(count, kPanel);
        find(values, false, task, first, first + count);
        b.ahead.list(values, count, p.value_width, tiles * padded / kPanel * b.words);
        for (int64_t j = 0; j < count; j += kPanel) {
            pack_keys<Unit>(keys + j, count - j, p.width, panel);
            for (int64_t r = 0; r < num_rows; r += kRows) {
                with_rows(num_rows - r, [&](auto rows) {
                    score_tile<Unit, rows()>(b.query.get() + r * b.padded, panel, b.words, p.scale,
                                             b.scores.get() + r * kKeys + j, b.ahead);
                });
            }
        }
        for (int64_t r = 0; r < num_rows; ++r) {
            float* row = b.rows[r] + b.value_width;
            int64_t from = std::clamp<int64_t>(b.ranges[r].begin - first, 0, padded);
            int64_t to = std::clamp(b.ranges[r].end - first, from, padded);
            b.alpha[r] = soften<Unit>(b.scores.get() + r * kKeys, from, to, padded, row[0], row[1]);
        }
        const int64_t words = (count + Unit::kPerWord - 1) / Unit::kPerWord;
        // The keys of the next block, or of the next task.
        int64_t ahead = 0;
        if (first + kKeys < end) {
            ahead = std::min(kKeys, end - first - kKeys);
            find(keys, true, task, first + kKeys, first + kKeys + ahead);
        } else if (next != nullptr) {
            const int64_t from = first_key(p, *next);
            ahead = std::clamp<int64_t>(next->group->range.end - from, 0, kKeys);
            find(keys, true, *next, from, from + ahead);
        }
        b.ahead.list(keys, ahead, p.width, tiles * b.value_width / kPanel * words);
        for (int64_t c = 0; c < b.value_width; c += kPanel) {
            for (int64_t w = 0; w < words; ++w) {
                int64_t j = w * Unit::kPerWord;
                Unit::pack_values(values + j, count - j, c, p.value_width, panel + w * kPanel);
            }
            for (int64_t r = 0; r < num_rows; r += kRows) {
                with_rows(num_rows - r, [&](auto rows) {
                    value_tile<Unit, rows()>(b.scores.get() + r * kKeys, first == begin ? nullptr : &b.alpha[r], panel, words,
                                             c, b.rows.data() + r, b.ahead);
                });
            }
        }
    }
}

template <class T>
void merge(const Call& call, int64_t slot, int64_t head, std::vector<float>& weights) {
    const DecodeAttention& p = call.p;
    const int64_t padded = round_up(p.value_width, kPanel);
    auto each = [&](auto f) {
        for (int64_t l = 0; l < p.num_levels; ++l) {
            DecodeRange range = call.ranges[l * p.slots + slot];
            if (range.begin >= range.end) continue;
            const int64_t tokens = p.levels[l].part;
            for (int64_t part = range.begin / tokens; part * tokens < range.end; ++part) {
                f(call.partial(slot, head, call.first_part[l] + part));
            }
        }
    };
    float m = kLowest, l = 0.0f;
    each([&](const float* row) { m = std::max(m, row[padded]); });
    weights.clear();
    each([&](const float* row) {
        f32 shift = splat(row[padded] - m);
        weights.push_back(exp2_clamp(shift)[0]);
        l += weights.back() * row[padded + 1];
    });
    const float inverse = l == 0.0f ? 0.0f : 1 / l;
    T* out = static_cast<T*>(p.out) + (slot * p.query_heads + head) * p.value_width;
    for (int64_t c = 0; c < p.value_width; c += kLanes) {
        f32 sum{};
        const float* weight = weights.data();
        each([&](const float* row) { sum += load(row + c) * *weight++; });
        sum *= inverse;
        if (c + kLanes <= p.value_width) {
            store(out + c, sum);
        } else {
            store_tail(out + c, p.value_width - c, sum);
        }
    }
    p.lse[slot * p.query_heads + head] = l == 0.0f ? -std::numeric_limits<float>::infinity() : (m + std::log2(l)) * kLn2;
}

template <class Unit, class T>
void run(const DecodeAttention& p, int threads) {
    Call call(p);
    const double work = call.products * static_cast<double>(p.width + p.value_width);
    threads = static_cast<int>(std::clamp<double>(work / kPerThread, 1, threads));
#pragma omp parallel num_threads(threads)
    {
        if (p.new_key != nullptr) {
#pragma omp for schedule(static)
            for (int64_t s = 0; s < p.slots; ++s) append<T>(p, s);
        }
        Buffers<T> buffers(p, call.most_rows, Unit::kPerWord);
        std::vector<float> weights;
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < call.tasks.size(); ++i) {
            const Task* next = i + 1 < call.tasks.size() ? &call.tasks[i + 1] : nullptr;
            run_task<Unit, T>(call, call.tasks[i], next, buffers);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.slots * p.query_heads; ++i) {
            merge<T>(call, i / p.query_heads, i % p.query_heads, weights);
        }
    }
}

}  // namespace

void decode_attention(const DecodeAttention& p, int threads) {
#if defined(__AVX512F__)
    if (p.dtype == DType::bfloat16 && Pairs::supported()) return run<Pairs, bf16>(p, threads);
#endif
    with_dtype(p.dtype, [&](auto x) { run<Floats<decltype(x)>, decltype(x)>(p, threads); });
}

}  // namespace vlmk::VLMK_ISA
