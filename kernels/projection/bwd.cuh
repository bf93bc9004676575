// Elementwise and summing parts of the projections' backward, besides its products:
//
//   activation_grad   g = grad act'(sum), elementwise, rounded to the tensors' dtype
//   bias_grad         dbias_p = sum over rows of g_p,   dlora_bias_p = scaling_p dbias_p
//
// The sums go down the columns of one block of rows into partial sums, which sum_partials/sum_partials.cu adds in
// order.
#pragma once
#include "projection/activation.cuh"

template <class T, int N>
__device__ __forceinline__ void activation_grad_at(const ActivationGradParams& p, uint64_t at) {
    if (at >= p.size) return;
    float grad[N], sum[N];
    load(grad, global<const T>(p.grad) + at);
    load(sum, global<const T>(p.sum) + at);
    scale_by_derivative(grad, sum, p.activation);
    store(global<T>(p.g) + at, grad);
}

// Thread t takes the 16 bytes from element t kVec<T> on.
template <class T> __device__ __forceinline__ void activation_grad(const ActivationGradParams& p) {
    const uint64_t at = (uint64_t(blockIdx.x) * ACTIVATION_GRAD_THREADS + threadIdx.x) * kVec<T>;
    if (vectorisable<T>(p.size, p.grad, p.sum, p.g)) activation_grad_at<T, kVec<T>>(p, at);
    else
        for (int i = 0; i < kVec<T>; ++i) activation_grad_at<T, 1>(p, at + i);
}

struct BiasGradStorage {
    float sums[BIAS_GRAD_WARPS][kWarp];
};

// Block (row block, column tile, part): warp w takes rows w, w + 8, ... of the block, a lane one column.
template <class T> __device__ __forceinline__ void bias_grad(const BiasGradParams& p) {
    auto& shared = ptx::shared_storage<BiasGradStorage>();
    const BiasGradPart& part = p.parts[blockIdx.z];
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const uint32_t column = blockIdx.y * kWarp + lane;
    const uint64_t begin = blockIdx.x * p.split_rows;
    const uint64_t end = begin + p.split_rows < p.rows ? begin + p.split_rows : p.rows;
    float sum = 0.0f;
    if (column < part.out_dim)
        for (uint64_t row = begin + warp; row < end; row += BIAS_GRAD_WARPS)
            sum += to_float(global<const T>(p.g)[row * p.total + part.column + column]);
    shared.sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && column < part.out_dim) {
        for (int other = 1; other < BIAS_GRAD_WARPS; ++other) sum += shared.sums[other][lane];
        const uint64_t at = blockIdx.x * p.split_stride + column;
        if (part.bias != 0) global<float>(part.bias)[at] = sum;
        if (part.lora_bias != 0) global<float>(part.lora_bias)[at] = part.scaling * sum;
    }
}
