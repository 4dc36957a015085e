// decode_attention on the CPU. A task computes a part of a segment for one key head and all slots that read the segment: a
// block of keys is transposed once, and all rows (slots x query heads of the key head) are multiplied with it from the cache.
// Formulas: common/decode_attention.h.
//
// Every row is computed by the same operations in the same order whichever rows are beside it, so the result of a slot depends
// neither on other slots nor on the number of threads.
#include "../common/decode_attention.h"

#include <algorithm>
#include <vector>

#include "decode_tiles.h"

namespace vlmk::VLMK_ISA {
namespace {

constexpr int64_t kPerThread = 1 << 18;  // least number of products per thread
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kLowest = std::numeric_limits<float>::lowest();

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
                const float* q = b.query.get() + r * b.padded;
                float* scores = b.scores.get() + r * kKeys + j;
                with_rows(num_rows - r, [&](auto rows) {
                    auto tile = count - j > kLanes ? score_tile<Unit, 2, rows()> : score_tile<Unit, 1, rows()>;
                    tile(q, panel, b.words, p.scale, scores, b.ahead);
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
