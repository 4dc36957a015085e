// Launches every CUDA kernel on small inputs for compute-sanitizer: odd sizes, rows at every alignment, split rows, gradients
// that overwrite their logits. Each tensor is an allocation of its exact size, so that memcheck knows its bounds. The program
// fails if a result is not finite. It does not need Python or torch, so it starts in a second, also under compute-sanitizer.
//
//   nvcc -std=c++17 -O3 -lineinfo -arch=native -o kernels tests/sanitizer/kernels.cu csrc/cuda/*.cu
//   compute-sanitizer --tool memcheck ./kernels
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/ops.h"

using namespace vlmk;

namespace {

int failures = 0;
uint32_t state = 1;

float uniform() {  // in [0, 1)
    state = state * 1664525u + 1013904223u;
    return (state >> 8) / 16777216.0f;
}
int64_t below(int64_t size) { return static_cast<int64_t>(uniform() * size); }

template <class T>
T* empty(int64_t count) {
    T* address = nullptr;
    cudaMalloc(&address, count * sizeof(T));
    return address;
}

template <class T>
T* on_device(const std::vector<T>& values) {
    T* address = empty<T>(values.size());
    cudaMemcpy(address, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
    return address;
}

template <class T>
T random_value();
template <>
float random_value<float>() {
    return 6 * uniform() - 3;
}
template <>
uint16_t random_value<uint16_t>() {  // bf16
    float x = 6 * uniform() - 3;
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits >> 16;
}
template <>
uint8_t random_value<uint8_t>() {
    return below(256);
}

template <class T>
T* random(int64_t count) {
    std::vector<T> values(count);
    for (T& x : values) x = random_value<T>();
    return on_device(values);
}

const int64_t* targets(int64_t count, int64_t vocab) {
    std::vector<int64_t> values(count);
    for (int64_t& x : values) x = below(vocab);
    return on_device(values);
}

const bool* random_mask(int64_t count) {
    std::vector<uint8_t> values(count);
    for (uint8_t& x : values) x = below(4) > 0;
    return reinterpret_cast<const bool*>(on_device(values));
}

void expect_finite(const char* what, const float* results, int64_t count) {
    std::vector<float> values(count);
    cudaMemcpy(values.data(), results, count * sizeof(float), cudaMemcpyDeviceToHost);
    cudaError_t error = cudaDeviceSynchronize();
    int64_t bad = 0;
    for (float x : values) bad += !std::isfinite(x);
    if (error == cudaSuccess && bad == 0) return;
    std::printf("%s: %s, %lld of %lld not finite\n", what, cudaGetErrorString(error), static_cast<long long>(bad),
                static_cast<long long>(count));
    ++failures;
}

// T: float, or uint16_t for bf16. `offset` elements lie before the first row.
template <class T>
void gather(int64_t num, int64_t vocab, int64_t offset, int64_t splits, bool in_place) {
    T* logits = random<T>(offset + num * vocab);
    GatherLogps p{};
    p.logits = logits + offset;
    p.dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
    p.num_rows = p.num_results = p.inner = num;
    p.vocab = p.stride_inner = p.grad_stride_inner = vocab;
    p.targets = targets(num, vocab);
    p.temperature = 0.7f;
    p.logp = empty<float>(num);
    p.entropy = empty<float>(num);
    p.stats = empty<float>(2 * num);
    p.partial = splits > 1 ? empty<float>(3 * num * splits) : nullptr;
    p.splits = splits;
    cuda::gather_logps_fwd(p, 0, 0);
    expect_finite("gather_logps_fwd", p.logp, num);
    p.dlogp = random<float>(num);
    p.dentropy = random<float>(num);
    p.dlogits = in_place ? logits + offset : empty<T>(num * vocab);
    cuda::gather_logps_bwd(p, 0, 0);
    expect_finite("gather_logps_bwd", p.stats, 2 * num);
}

// T: the type of the logits. Out: the type of the gradient and the operands. In place, row k of a narrower gradient starts at
// the address of row k of the logits.
template <class T, class Out>
void linear(int64_t num, int64_t vocab, bool in_place, float softcap) {
    constexpr int64_t kWidth = 33, kRatio = sizeof(T) / sizeof(Out);
    LinearLogps p{};
    T* logits = random<T>(num * vocab);
    p.logits = logits;
    p.dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
    p.operand_dtype = sizeof(Out) == 4 ? DType::float32 : DType::bfloat16;
    p.num_rows = num;
    p.vocab = vocab;
    p.targets = targets(num, vocab);
    p.inverse = 1.2f;
    p.softcap = softcap;
    p.logit_scale = 1;
    if (sizeof(T) == 2) {  // the logit of the target is computed again
        p.hidden = random<Out>(num * kWidth);
        p.weight = random<Out>(vocab * kWidth);
        p.width = p.hidden_stride = p.weight_stride = kWidth;
        p.weight_step = 1;
    }
    p.read = p.objective = p.write = true;
    p.variant.kl = KlEstimator::k3;
    p.variant.beta = 0.04f;
    p.variant.epsilon_low = p.variant.epsilon_high = 0.2f;
    p.variant.delta = INFINITY;
    p.logp = empty<float>(num);
    p.entropy = empty<float>(num);
    p.stats = empty<float>(2 * num);
    p.old_logp = random<float>(num);
    p.ref_logp = random<float>(num);
    p.advantages = random<float>(num);
    p.share = random<float>(num);
    p.dlogits = in_place ? static_cast<void*>(logits) : empty<Out>(num * vocab);
    p.dlogits_stride = in_place ? vocab * kRatio : vocab;
    cuda::linear_logps(p, 0, 0);
    expect_finite("linear_logps", p.logp, num);
}

// T: the type of the student's logits; those of the teacher have type Out.
template <class T, class Out>
void divergence(int64_t num, int64_t vocab, bool in_place, float softcap, float beta) {
    constexpr int64_t kRatio = sizeof(T) / sizeof(Out);
    LinearKl p{};
    T* logits = random<T>(num * vocab);
    p.student = {logits, sizeof(T) == 4 ? DType::float32 : DType::bfloat16, 1.2f, softcap, 1.0f};
    p.teacher = {random<Out>(num * vocab), sizeof(Out) == 4 ? DType::float32 : DType::bfloat16, 0.8f, 0.0f, 1.0f};
    p.num_rows = num;
    p.vocab = vocab;
    p.beta = beta;
    p.read = p.write = true;
    p.divergence = empty<float>(num);
    p.stats = empty<float>(5 * num);
    p.dlogits = in_place ? static_cast<void*>(logits) : empty<Out>(num * vocab);
    p.gradient_dtype = p.teacher.dtype;
    p.dlogits_stride = in_place ? vocab * kRatio : vocab;
    p.upstream = random<float>(num);
    cuda::linear_kl(p, 0, 0);
    expect_finite("linear_kl", p.divergence, num);
    p.read = false;  // the backward pass alone, on other logits if the gradient is in their place
    p.student.logits = random<T>(num * vocab);
    p.dlogits = in_place ? const_cast<void*>(p.student.logits) : p.dlogits;
    cuda::linear_kl(p, 0, 0);
    expect_finite("linear_kl, backward", p.stats, 5 * num);
}

void grpo(GrpoSurrogate surrogate, bool sequence_level) {
    constexpr int64_t kSequences = 5, kLength = 601, kTokens = kSequences * kLength;
    GrpoLoss p{};
    p.variant.surrogate = surrogate;
    p.variant.kl = KlEstimator::k3;
    p.variant.perception = true;
    p.variant.perception_loss_weight = 0.01f;
    p.variant.sequence_level = sequence_level;
    p.variant.beta = 0.04f;
    p.variant.epsilon_low = p.variant.epsilon_high = 0.2f;
    p.variant.delta = INFINITY;
    p.variant.sapo_temperature_pos = p.variant.sapo_temperature_neg = 1;
    p.variant.vespo_k_pos = p.variant.vespo_lambda_pos = p.variant.vespo_k_neg = p.variant.vespo_lambda_neg = 1;
    p.num_sequences = kSequences;
    p.num_tokens = kTokens;
    p.logp = random<float>(kTokens);
    p.old_logp = random<float>(kTokens);
    p.ref_logp = random<float>(kTokens);
    p.masked_logp = random<float>(kTokens);
    p.entropy = random<float>(kTokens);
    p.advantages = random<float>(kSequences);
    p.loss_mask = random_mask(kTokens);
    p.logp_stride = p.old_logp_stride = p.ref_logp_stride = p.masked_logp_stride = kLength;
    p.entropy_stride = p.loss_mask_stride = kLength;
    p.advantages_stride = 1;
    p.divisor = p.accumulation_steps = 1;
    p.divide_by_tokens = true;
    p.entropy_coef = 0.1f;
    p.partial = empty<float>(kSequences * GrpoColumn::count);
    p.dlogp = empty<float>(kTokens);
    p.dentropy = empty<float>(kTokens);
    p.dmasked = empty<float>(kTokens);
    p.loss = empty<float>(1);
    p.stats = empty<float>(GrpoStat::count);
    cuda::grpo_loss(p, 0, 0);
    expect_finite("grpo_loss", p.dlogp, kTokens);
}

void advantages(GroupScale scale, GroupBaseline baseline) {
    constexpr int64_t kNum = 301, kFunctions = 3;
    GroupAdvantages p{};
    p.num = kNum;
    p.functions = kFunctions;
    p.num_groups = 43;
    p.rewards = random<float>(kNum * kFunctions);
    p.scale = scale;
    p.baseline = baseline;
    p.eps = 1e-4f;
    p.advantages = empty<float>(kNum);
    p.total = empty<float>(kNum);
    p.mean = empty<float>(kNum);
    p.std = empty<float>(kNum);
    p.degenerate = empty<bool>(kNum);
    cuda::group_advantages(p, 0, 0);
    expect_finite("group_advantages", p.advantages, kNum);
}

void rotate(int64_t width) {
    constexpr int64_t kTokens = 13;
    auto heads = [&](int64_t num) {
        int64_t count = kTokens * num * width;
        return RotaryHeads{random<float>(count), empty<float>(count), num, count, num * width, width};
    };
    Rotary p{};
    p.query = heads(5);
    p.key = heads(2);
    p.batch = 1;
    p.tokens = kTokens;
    p.width = width;
    p.pairs = width / 2;
    p.cos = {random<float>(kTokens * p.pairs), kTokens * p.pairs, p.pairs};
    p.sin = {random<float>(kTokens * p.pairs), kTokens * p.pairs, p.pairs};
    cuda::rotary(p, 0, 0);
    expect_finite("rotary", static_cast<const float*>(p.query.out), kTokens * 5 * width);
}

const int32_t* indices(const std::vector<int32_t>& values) { return on_device(values); }

// T: float, or uint16_t for bf16. `offset` elements lie before the buffers. Slots 0 to 4 read segments 1, 0, 1, none, 1.
template <class T>
void decode(int64_t width, int64_t offset, bool paged, int64_t window) {
    constexpr int64_t kSlots = 5, kHeads = 6, kKeyHeads = 2, kPage = 3, kPages = 50, kOwn = 9;
    auto tokens = [&](DecodeLevel& level, int64_t num, int64_t length) {
        level.key = random<T>(offset + num * kKeyHeads * length * width) + offset;
        level.value = random<T>(offset + num * kKeyHeads * length * width) + offset;
        level.key_stride_n = level.value_stride_n = kKeyHeads * length * width;
        level.key_stride_head = level.value_stride_head = length * width;
        level.key_stride_token = level.value_stride_token = width;
        level.page_size = length;
        level.num_pages = num;
        level.capacity = length;
        level.part = 64;
    };
    DecodeLevel levels[2]{};
    tokens(levels[0], paged ? 2 * kPages : 2, paged ? kPage : kPage * kPages);
    levels[0].num_segments = 2;
    levels[0].capacity = kPage * kPages;
    levels[0].lengths = indices({149, 7});
    levels[0].segment = indices({1, 0, 1, -1, 1});
    levels[0].order = indices({3, 1, 0, 2, 4});
    levels[0].rank = indices({-1, 0, 0, 1, 2});
    if (paged) {
        std::vector<int32_t> table(2 * kPages);
        for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i * 7 % table.size());
        levels[0].table = indices(table);
        levels[0].table_stride = kPages;
    }
    tokens(levels[1], kSlots, kOwn);
    levels[1].num_segments = kSlots;
    levels[1].lengths = indices({0, 8, 3, 1, 5});
    DecodeAttention p{};
    p.levels = levels;
    p.num_levels = 2;
    p.dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
    p.query = random<T>(offset + kSlots * kHeads * width) + offset;
    p.new_key = random<T>(offset + kSlots * kKeyHeads * width) + offset;
    p.new_value = random<T>(offset + kSlots * kKeyHeads * width) + offset;
    p.out = empty<T>(kSlots * kHeads * width);
    p.lse = empty<float>(kSlots * kHeads);
    p.partial = empty<float>(kSlots * kHeads * 4 * decode_row(width));
    p.slots = kSlots;
    p.query_heads = kHeads;
    p.key_heads = kKeyHeads;
    p.width = p.value_width = width;
    p.query_stride_slot = kHeads * width;
    p.key_stride_slot = p.value_stride_slot = kKeyHeads * width;
    p.query_stride_head = p.key_stride_head = p.value_stride_head = width;
    p.window = window;
    p.scale = 0.2f;
    cuda::decode_attention(p, 0, 0);
    expect_finite("decode_attention", p.lse, kSlots * kHeads);
}

void pack(int64_t patch, int64_t slots, int64_t offset) {
    constexpr int64_t kImages = 34;  // more than one launch
    const int64_t side = 2 * patch, features = 3 * slots * patch * patch;
    std::vector<PatchImage> images;
    for (int64_t i = 0; i < kImages; ++i) {
        const uint8_t* pixels = random<uint8_t>(offset + 3 * side * side) + offset;
        images.push_back({pixels, 3 * side * side, side * side, side, 1, 1, 2, 2, 4 * i});
    }
    PackPatches p{};
    p.images = images.data();
    p.num_images = kImages;
    p.num_rows = 4 * kImages;
    p.patch_size = patch;
    p.merge_size = 2;
    p.temporal_patch_size = slots;
    p.element_size = 4;
    p.table = random<float>(3 * 256);
    p.rows = empty<float>(p.num_rows * features);
    cuda::pack_patches(p, 0, 0);
    expect_finite("pack_patches", static_cast<const float*>(p.rows), p.num_rows * features);
}

// T: float, or uint16_t for bf16. `offset` elements lie before the first row. `plain`: without banned tokens and a penalty.
template <class T>
void sample(int64_t num, int64_t vocab, int64_t offset, bool filtered, bool plain, bool greedy) {
    SampleLogps p{};
    p.logits = random<T>(offset + num * vocab) + offset;
    p.dtype = sizeof(T) == 4 ? DType::float32 : DType::bfloat16;
    p.num_rows = num;
    p.vocab = p.stride = p.seen_stride = vocab;
    std::vector<double> draws(num);
    for (double& u : draws) u = uniform();
    p.uniform = greedy ? nullptr : on_device(draws);
    if (!plain) {
        p.seen = random_mask(num * vocab);
        p.banned = random_mask(2 * vocab);
        p.banned_rows = targets(num, 2);
        p.num_banned = 2;
    }
    p.temperature = 0.7f;
    p.repetition_penalty = plain ? 1.0f : 1.2f;
    p.top_k = filtered ? 40 : 0;
    p.removable = filtered ? 0.1f : 0.0f;
    p.min_p_distance = filtered ? -3.0f : -INFINITY;
    p.ids = empty<int64_t>(num);
    p.logps = empty<float>(num);
    p.log_kept_mass = empty<float>(num);
    p.entropy = empty<float>(num);
    p.workspace = empty<float>(6 * num * ((vocab + kTokenBlock - 1) / kTokenBlock));
    cuda::sample_logps(p, 0, 0);
    expect_finite("sample_logps", p.log_kept_mass, num);
}

}  // namespace

int main() {
    for (bool in_place : {false, true}) {
        gather<uint16_t>(9, 1003, 1, 1, in_place);
        gather<uint16_t>(2, 40001, 3, 4, in_place);
        gather<float>(9, 1003, 1, 1, in_place);
        gather<float>(2, 40001, 3, 4, in_place);
        linear<float, uint16_t>(7, 9001, in_place, 0.0f);
        linear<float, uint16_t>(7, 4099, in_place, 4.0f);
        linear<float, float>(7, 2051, in_place, 0.0f);
        linear<uint16_t, uint16_t>(7, 2051, in_place, 0.0f);
        for (float beta : {0.0f, 0.3f, 1.0f}) {
            divergence<float, uint16_t>(7, 9001, in_place, 4.0f, beta);
            divergence<uint16_t, uint16_t>(7, 2051, in_place, 0.0f, beta);
            divergence<float, float>(3, 1025, in_place, 0.0f, beta);
        }
    }
    using S = GrpoSurrogate;
    for (S surrogate : {S::ppo_clip, S::cispo, S::sapo, S::vespo}) {
        for (bool sequence_level : {false, true}) grpo(surrogate, sequence_level);
    }
    using B = GroupBaseline;
    for (GroupScale scale : {GroupScale::none, GroupScale::group, GroupScale::batch}) {
        for (B baseline : {B::none, B::mean, B::leave_one_out, B::pass_at_k}) advantages(scale, baseline);
    }
    for (int64_t width : {80, 82}) rotate(width);
    for (int64_t width : {128, 40, 27}) {
        for (int64_t window : {0, 20}) {
            decode<uint16_t>(width, width == 40, window > 0, window);
            decode<float>(width, width == 40, window == 0, window);
        }
    }
    for (int64_t patch : {14, 16, 6}) {
        for (int64_t offset : {0, 1}) pack(patch, patch == 6 ? 3 : 1 + offset, offset);
    }
    for (bool filtered : {false, true}) {
        for (bool plain : {false, true}) {
            sample<uint16_t>(5, 5003, 1, filtered, plain, false);
            sample<float>(5, 5003, 1, filtered, plain, false);
        }
        sample<uint16_t>(2, 40960, 0, filtered, false, false);
        sample<uint16_t>(3, 2049, 1, filtered, false, true);
    }
    std::printf(failures ? "%d failures\n" : "every result is finite\n", failures);
    return failures > 0;
}
