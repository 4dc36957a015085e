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

constexpr int64_t kKeys = 64;            // keys of a block
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
class Scratch {
  public:
    explicit Scratch(int64_t floats) : memory_(new float[floats + kLanes]) {
        void* address = memory_.get();
        size_t space = (floats + kLanes) * sizeof(float);
        begin_ = static_cast<float*>(std::align(64, floats * sizeof(float), address, space));
    }
    float* get() const { return begin_; }

  private:
    std::unique_ptr<float[]> memory_;
    float* begin_;
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

// panel[d * kPanel + j] = element d of key first + j; 0 beyond the last key and beyond the width.
template <class T>
void pack_keys(const Tokens<T>& keys, int64_t first, int64_t count, int64_t width, float* panel) {
    for (int64_t j = 0; j < kPanel; j += kLanes) {
        const T* rows[kLanes];
        const bool complete = j + kLanes <= count;
        for (int i = 0; i < kLanes; ++i) rows[i] = j + i < count ? keys[first + j + i] : nullptr;
        for (int64_t d = 0; d < width; d += kLanes) {
            f32 x[kLanes];
            if (complete && d + kLanes <= width) {
                for (int i = 0; i < kLanes; ++i) x[i] = load(rows[i] + d);
            } else {
                for (int i = 0; i < kLanes; ++i) {
                    x[i] = rows[i] == nullptr ? f32{} : load_tail(rows[i] + d, std::min<int64_t>(width - d, kLanes), 0.0f);
                }
            }
            transpose(x);
            for (int i = 0; i < kLanes; ++i) store(panel + (d + i) * kPanel + j, x[i]);
        }
    }
}

// Cache lines that the tiles prefetch one by one while they compute: a burst would wait for memory.
class Ahead {
  public:
    // Lists the tokens [first, first + count), to be prefetched in `steps` steps. With few rows per token it is not worth it.
    template <class T>
    void list(const Tokens<T>& tokens, int64_t first, int64_t count, int64_t width, int64_t steps, bool worth) {
        const int64_t bytes = width * sizeof(T), size = worth ? count * ((bytes + 63) / 64) : 0;
        if (static_cast<int64_t>(lines_.size()) < size) lines_.resize(size);
        next_ = end_ = lines_.data();
        for (int64_t j = first; end_ < next_ + size; ++j) {
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
            if (next_ < end_) __builtin_prefetch(*next_++);
            if (twice_ && next_ < end_) __builtin_prefetch(*next_++);
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

// scores[r * kKeys + j] = scale sum_d q[d * kRows + r] panel[d * kPanel + j].
template <int kCount>
void score_tile(const float* q, const float* panel, int64_t width, float scale, float* scores, Ahead& lines) {
    Ahead::Cursor ahead(lines);
    f32 sum[kCount][2] = {};
    for (int64_t d = 0; d < width; ++d) {
        ahead.step();
        f32 first = load(panel + d * kPanel), second = load(panel + d * kPanel + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
            f32 x = splat(q[d * kRows + r]);
            sum[r][0] += x * first;
            sum[r][1] += x * second;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
        store(scores + r * kKeys, sum[r][0] * scale);
        store(scores + r * kKeys + kLanes, sum[r][1] * scale);
    }
}

// rows[r][c] = alpha[r] rows[r][c] + sum_j shares[r * kKeys + j] values[j][c], for the kPanel columns c from `column` on.
template <int kCount>
void value_tile(const float* shares, const float* alpha, const float* const* values, int64_t count, int64_t column,
                float* const* rows, Ahead& lines) {
    Ahead::Cursor ahead(lines);
    f32 sum[kCount][2];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
        sum[r][0] = load(rows[r] + column) * alpha[r];
        sum[r][1] = load(rows[r] + column + kLanes) * alpha[r];
    }
    for (int64_t j = 0; j < count; ++j) {
        ahead.step();
        f32 first = load(values[j] + column), second = load(values[j] + column + kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kCount; ++r) {
            f32 x = splat(shares[r * kKeys + j]);
            sum[r][0] += x * first;
            sum[r][1] += x * second;
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

// The scores of a row become 2^(s - m). Returns the factor of what was summed before. `begin` and `count`: the keys of the
// block that the row sees.
float soften(float* scores, int64_t begin, int64_t count, float& m, float& l) {
    constexpr float kNone = -std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < begin; ++j) scores[j] = kNone;
    for (int64_t j = count; j < kKeys; ++j) scores[j] = kNone;
    f32 top = load(scores);
    for (int64_t j = kLanes; j < kKeys; j += kLanes) top = max(load(scores + j), top);
    float next = std::max(m, hmax(top));
    f32 sum{};
    for (int64_t j = 0; j < kKeys; j += kLanes) {
        f32 y = load(scores + j) - next, e = exp2_clamp(y);
        store(scores + j, e);
        sum += e;
    }
    f32 shift = splat(m - next);
    float alpha = exp2_clamp(shift)[0];
    l = l * alpha + hsum(sum);
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
            parts += decode_parts(p, p.levels[l]);
            add_groups(l);
        }
        int64_t shared = p.query_heads / p.key_heads;
        for (const Group& group : groups) {
            most_rows = std::max(most_rows, group.size * shared);
            products += static_cast<double>(group.range.end - group.range.begin) * group.size * p.query_heads;
            for (int64_t part = group.range.begin / p.part; part * p.part < group.range.end; ++part) {
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
struct Buffers {
    int64_t width, value_width;  // padded to complete vectors and panels
    Scratch query, panel, scores, values;
    std::vector<float> alpha;
    std::vector<float*> rows;
    std::vector<DecodeRange> ranges;
    Ahead ahead;

    Buffers(const DecodeAttention& p, int64_t most_rows)
        : width(round_up(p.width, kLanes)),
          value_width(round_up(p.value_width, kPanel)),
          query(round_up(most_rows, kRows) * width),
          panel(kPanel * width),
          scores(round_up(most_rows, kRows) * kKeys),
          values(kKeys * value_width),
          alpha(most_rows),
          rows(most_rows),
          ranges(most_rows) {}
};

template <class T>
void read_query(const DecodeAttention& p, int64_t slot, int64_t head, float* q) {
    const T* x = static_cast<const T*>(p.query) + slot * p.query_stride_slot + head * p.query_stride_head;
    for (int64_t d = 0; d < p.width; d += kLanes) {
        f32 part = d + kLanes <= p.width ? load(x + d) : load_tail(x + d, p.width - d, 0.0f);
        for (int i = 0; i < kLanes; ++i) q[(d + i) * kRows] = part[i];
    }
}

template <class T>
void run_task(const Call& call, const Task& task, Buffers& b) {
    const DecodeAttention& p = call.p;
    const Group& group = *task.group;
    const DecodeLevel& level = p.levels[group.level];
    const int64_t shared = p.query_heads / p.key_heads, num_rows = group.size * shared, tiles = (num_rows + kRows - 1) / kRows;
    const int64_t part_begin = task.part * p.part;
    const int64_t end = std::min(part_begin + p.part, group.range.end);
    const int64_t begin = std::max(part_begin, group.range.begin / kKeys * kKeys);
    for (int64_t r = 0; r < num_rows; ++r) {
        int64_t slot = group.members[r / shared], head = task.head * shared + r % shared;
        float* row = b.rows[r] = call.partial(slot, head, call.first_part[group.level] + task.part);
        std::fill(row, row + b.value_width, 0.0f);
        row[b.value_width] = kLowest;
        row[b.value_width + 1] = 0.0f;
        b.ranges[r] = call.ranges[group.level * p.slots + slot];
        read_query<T>(p, slot, head, b.query.get() + r / kRows * kRows * b.width + r % kRows);
    }
    const Tokens<T> keys = keys_of<T>(level, group.segment, task.head), values = values_of<T>(level, group.segment, task.head);
    const bool in_place = std::is_same_v<T, float> && p.value_width % kPanel == 0;
    for (int64_t first = begin; first < end; first += kKeys) {
        const int64_t count = std::min(kKeys, end - first);
        b.ahead.list(values, first, count, p.value_width, tiles * round_up(count, kPanel) / kPanel * b.width, num_rows >= 8);
        for (int64_t j = 0; j < kKeys; j += kPanel) {
            if (j >= count) break;
            pack_keys(keys, first + j, count - j, p.width, b.panel.get());
            for (int64_t r = 0; r < num_rows; r += kRows) {
                const float* q = b.query.get() + r * b.width;
                with_rows(num_rows - r, [&](auto rows) {
                    score_tile<rows()>(q, b.panel.get(), b.width, p.scale, b.scores.get() + r * kKeys + j, b.ahead);
                });
            }
        }
        const float* addresses[kKeys];
        for (int64_t j = 0; j < count; ++j) {
            const T* value = values[first + j];
            if constexpr (std::is_same_v<T, float>) addresses[j] = value;
            if (in_place) continue;
            float* copy = b.values.get() + j * b.value_width;
            addresses[j] = copy;
            int64_t c = 0;
            for (; c + kLanes <= p.value_width; c += kLanes) store(copy + c, load(value + c));
            if (c < p.value_width) store(copy + c, load_tail(value + c, p.value_width - c, 0.0f)), c += kLanes;
            if (c < b.value_width) store(copy + c, f32{});
        }
        b.ahead.list(keys, first + count, std::min(kKeys, end - first - count), p.width, tiles * b.value_width / kPanel * count,
                     num_rows >= 8);
        for (int64_t r = 0; r < num_rows; r += kRows) {
            float* scores = b.scores.get() + r * kKeys;
            const int64_t tile = std::min<int64_t>(kRows, num_rows - r);
            for (int64_t i = 0; i < tile; ++i) {
                DecodeRange range = b.ranges[r + i];
                float* row = b.rows[r + i] + b.value_width;
                int64_t from = std::clamp<int64_t>(range.begin - first, 0, kKeys),
                        to = std::clamp(range.end - first, from, count);
                b.alpha[r + i] = soften(scores + i * kKeys, from, to, row[0], row[1]);
            }
            with_rows(tile, [&](auto rows) {
                for (int64_t c = 0; c < b.value_width; c += kPanel) {
                    value_tile<rows()>(scores, b.alpha.data() + r, addresses, count, c, b.rows.data() + r, b.ahead);
                }
            });
        }
    }
}

template <class T>
void merge(const Call& call, int64_t slot, int64_t head) {
    const DecodeAttention& p = call.p;
    const int64_t padded = round_up(p.value_width, kPanel);
    auto each = [&](auto f) {
        for (int64_t l = 0; l < p.num_levels; ++l) {
            DecodeRange range = call.ranges[l * p.slots + slot];
            if (range.begin >= range.end) continue;
            for (int64_t part = range.begin / p.part; part * p.part < range.end; ++part) {
                f(call.partial(slot, head, call.first_part[l] + part));
            }
        }
    };
    float m = kLowest, l = 0.0f;
    each([&](const float* row) { m = std::max(m, row[padded]); });
    auto weight = [&](const float* row) {
        f32 shift = splat(row[padded] - m);
        return exp2_clamp(shift)[0];
    };
    each([&](const float* row) { l += weight(row) * row[padded + 1]; });
    const float inverse = l == 0.0f ? 0.0f : 1 / l;
    T* out = static_cast<T*>(p.out) + (slot * p.query_heads + head) * p.value_width;
    for (int64_t c = 0; c < p.value_width; c += kLanes) {
        f32 sum{};
        each([&](const float* row) { sum += load(row + c) * weight(row); });
        sum *= inverse;
        if (c + kLanes <= p.value_width) {
            store(out + c, sum);
        } else {
            store_tail(out + c, p.value_width - c, sum);
        }
    }
    p.lse[slot * p.query_heads + head] = l == 0.0f ? -std::numeric_limits<float>::infinity() : (m + std::log2(l)) * kLn2;
}

template <class T>
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
        Buffers buffers(p, call.most_rows);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < call.tasks.size(); ++i) run_task<T>(call, call.tasks[i], buffers);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.slots * p.query_heads; ++i) merge<T>(call, i / p.query_heads, i % p.query_heads);
    }
}

}  // namespace

void decode_attention(const DecodeAttention& p, int threads) {
    with_dtype(p.dtype, [&](auto x) { run<decltype(x)>(p, threads); });
}

}  // namespace vlmk::VLMK_ISA
