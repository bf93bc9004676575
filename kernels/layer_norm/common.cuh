// The statistics of a row, shared by LayerNorm's forward and backward: one warp a row, any length.
#pragma once
#include "common/reduce.cuh"

// The mean as the sum of two f32, and 1 / sqrt(var + eps).
struct RowStatistics {
    float mean, mean_low, rstd;
};

// Calls body(column, values) for a row's vectors of N elements; lane i takes vectors i, i + 32, ...
template <int N, class T, class Body> __device__ __forceinline__ void for_row(const T* x, uint32_t size, Body body) {
    for (uint32_t column = threadIdx.x % kWarp * N; column < size; column += kWarp * N) {
        float values[N];
        load(values, x + column);
        body(column, values);
    }
}

// Two passes, so that a large common offset does not cancel: around a first mean the differences are exact, and their
// own mean corrects it. The row is read from L1 the second time; holding it in registers would bound its length.
template <int N, class T>
__device__ __forceinline__ RowStatistics row_statistics(const T* x, uint32_t size, float eps) {
    float sum = 0.0f;
    for_row<N>(x, size, [&](uint32_t, const float(&v)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) sum += v[i];
    });
    const float mean = warp_sum(sum) / float(size);
    float first = 0.0f, second = 0.0f;
    for_row<N>(x, size, [&](uint32_t, const float(&v)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float d = v[i] - mean;
            first += d;
            second = fmaf(d, d, second);
        }
    });
    const float correction = warp_sum(first) / float(size);
    const float var = fmaxf(warp_sum(second) / float(size) - correction * correction, 0.0f);
    return {mean, correction, 1.0f / sqrtf(var + eps)};
}

__device__ __forceinline__ float normalise(float x, const RowStatistics& s) {
    return ((x - s.mean) - s.mean_low) * s.rstd;
}

// The row of this warp; the whole warp is out if there is none.
__device__ __forceinline__ uint64_t row_of_warp() {
    return uint64_t(blockIdx.x) * (LAYER_NORM_THREADS / kWarp) + threadIdx.x / kWarp;
}
