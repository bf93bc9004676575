// AdamW over all parameters at once: check of finiteness, norm, clipping and update.
//
// `partials` has the sum of g^2 of each chunk of each gradient, NaN where a gradient is not finite. `outcome` has the
// root of their sum, in f64, and the factor min(1, max_norm / (norm + 1e-6)) of the gradients. Then the update:
//
//   m <- m + (g - m) beta1_rest        v <- v beta2 + g^2 beta2_rest
//   p <- p decay - rate m / (sqrt(v) root_correction + eps)               decay, rate, .. of each parameter
//
// A chunk is a block, wherever it runs, so no sum depends on the grid. The update rounds after every operation, as the
// CPU's does: equal gradients make equal parameters. Nothing changes if the loss, a gradient or the norm's square is
// not finite in f32.
#pragma once
#include "common/reduce.cuh"

constexpr float kLargest = 3.402823466e+38f;

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= kLargest; }

struct AdamWStorage {
    float sums[ADAMW_THREADS / kWarp];
    uint32_t tensor;
};

// This block's elements of a tensor.
struct AdamWChunk {
    const AdamWTensor* tensor;
    uint64_t begin;
    uint32_t length;
};

// The chunk belongs to the last tensor that begins before it or with it.
__device__ __forceinline__ AdamWChunk adamw_chunk(const AdamWParams& p, AdamWStorage& shared) {
    const AdamWTensor* tensors = global<const AdamWTensor>(p.tensors);
    for (uint32_t i = threadIdx.x; i < p.tensor_count; i += ADAMW_THREADS) {
        const uint32_t next = i + 1 < p.tensor_count ? tensors[i + 1].first_chunk : p.chunks;
        if (tensors[i].first_chunk <= blockIdx.x && blockIdx.x < next) shared.tensor = i;
    }
    __syncthreads();
    const AdamWTensor* tensor = tensors + shared.tensor;
    const uint64_t begin = uint64_t(blockIdx.x - tensor->first_chunk) * ADAMW_CHUNK, rest = tensor->size - begin;
    return {tensor, begin, rest < ADAMW_CHUNK ? uint32_t(rest) : ADAMW_CHUNK};
}

// Calls body(offset in the chunk, integral constant N) for the elements of this thread, N at a time.
template <class Body> __device__ __forceinline__ void adamw_elements(uint32_t length, bool vectors, Body body) {
    for (uint32_t i = 4 * threadIdx.x; i < length; i += 4 * ADAMW_THREADS) {
        if (vectors && i + 4 <= length) body(i, std::integral_constant<int, 4>());
        else
            for (uint32_t one = i; one < i + 4 && one < length; ++one) body(one, std::integral_constant<int, 1>());
    }
}

__device__ __forceinline__ void adamw_partials(const AdamWParams& p) {
    auto& shared = ptx::shared_storage<AdamWStorage>();
    const AdamWChunk chunk = adamw_chunk(p, shared);
    const float* gradient = global<const float>(chunk.tensor->gradient) + chunk.begin;
    float sum = 0.0f;
    bool finite = true;
    adamw_elements(chunk.length, chunk.tensor->gradient % 16 == 0, [&](uint32_t at, auto count) {
        float g[count.value];
        load(g, gradient + at);
#pragma unroll
        for (int i = 0; i < count.value; ++i) {
            finite = finite && is_finite(g[i]);
            sum = fmaf(g[i], g[i], sum);
        }
    });
    sum = warp_sum(finite ? sum : __int_as_float(0x7FC00000));
    if (threadIdx.x % kWarp == 0) shared.sums[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < ADAMW_THREADS / kWarp; ++warp) sum += shared.sums[warp];
    global<float>(p.partials)[blockIdx.x] = sum;
}

struct AdamWOutcomeStorage {
    double sums[ADAMW_THREADS];
    uint32_t first_wrong[ADAMW_THREADS];
};

// One block.
__device__ __forceinline__ void adamw_outcome(const AdamWParams& p) {
    auto& shared = ptx::shared_storage<AdamWOutcomeStorage>();
    const float* partials = global<const float>(p.partials);
    double sum = 0.0;
    uint32_t wrong = p.chunks;
    for (uint32_t chunk = threadIdx.x; chunk < p.chunks; chunk += ADAMW_THREADS) {
        const float partial = partials[chunk];
        sum += double(partial);
        // The sum of finite squares may be infinite, and is never NaN.
        if (partial != partial && wrong == p.chunks) wrong = chunk;
    }
    shared.sums[threadIdx.x] = sum;
    shared.first_wrong[threadIdx.x] = wrong;
    for (uint32_t half = ADAMW_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x >= half) continue;
        shared.sums[threadIdx.x] += shared.sums[threadIdx.x + half];
        const uint32_t other = shared.first_wrong[threadIdx.x + half];
        if (other < shared.first_wrong[threadIdx.x]) shared.first_wrong[threadIdx.x] = other;
    }
    if (threadIdx.x != 0) return;
    wrong = shared.first_wrong[0];
    uint32_t tensor = 0;  // from 1
    if (wrong < p.chunks)
        while (tensor < p.tensor_count && global<const AdamWTensor>(p.tensors)[tensor].first_chunk <= wrong) ++tensor;
    const double norm = sqrt(shared.sums[0]), factor = double(p.max_norm) / (norm + 1e-6);
    const float loss = p.loss != 0 ? *global<const float>(p.loss) : 0.0f;
    float* outcome = global<float>(p.outcome);
    const double rounded = double(float(norm));  // as the host sees it
    const bool usable = tensor == 0 && is_finite(loss) && rounded * rounded <= double(kLargest);
    outcome[0] = float(norm);
    outcome[1] = float(tensor);
    outcome[2] = loss;
    outcome[3] = !usable ? __int_as_float(0x7FC00000) : factor < 1.0 ? float(factor) : 1.0f;
}

template <class T>
__device__ __forceinline__ void adamw_update_chunk(const AdamWParams& p, const AdamWChunk& chunk, float factor) {
    const AdamWTensor& tensor = *chunk.tensor;
    T* parameter = global<T>(tensor.parameter) + chunk.begin;
    const float* gradient = global<const float>(tensor.gradient) + chunk.begin;
    float* exp_avg = global<float>(tensor.exp_avg) + chunk.begin;
    float* exp_avg_sq = global<float>(tensor.exp_avg_sq) + chunk.begin;
    const bool vectors = (tensor.parameter | tensor.gradient | tensor.exp_avg | tensor.exp_avg_sq) % 16 == 0;
    adamw_elements(chunk.length, vectors, [&](uint32_t at, auto count) {
        float w[count.value], g[count.value], m[count.value], v[count.value];
        load(w, parameter + at);
        load(g, gradient + at);
        load(m, exp_avg + at);
        load(v, exp_avg_sq + at);
#pragma unroll
        for (int i = 0; i < count.value; ++i) {
            g[i] = __fmul_rn(g[i], factor);
            m[i] = __fadd_rn(m[i], __fmul_rn(__fsub_rn(g[i], m[i]), p.beta1_rest));
            v[i] = __fadd_rn(__fmul_rn(v[i], p.beta2), __fmul_rn(__fmul_rn(g[i], g[i]), p.beta2_rest));
            const float denominator = __fadd_rn(__fmul_rn(sqrtf(v[i]), tensor.root_correction), tensor.eps);
            w[i] = __fsub_rn(__fmul_rn(w[i], tensor.decay), __fmul_rn(m[i] / denominator, tensor.rate));
        }
        store(parameter + at, w);
        store(exp_avg + at, m);
        store(exp_avg_sq + at, v);
    });
}

__device__ __forceinline__ void adamw_update(const AdamWParams& p) {
    const float factor = global<const float>(p.outcome)[3];
    if (factor != factor) return;
    const AdamWChunk chunk = adamw_chunk(p, ptx::shared_storage<AdamWStorage>());
    switch (chunk.tensor->dtype) {
    case ADAMW_F32: return adamw_update_chunk<float>(p, chunk, factor);
    case ADAMW_F16: return adamw_update_chunk<__half>(p, chunk, factor);
    case ADAMW_BF16: return adamw_update_chunk<__nv_bfloat16>(p, chunk, factor);
    }
}
