// LayerNorm: y = (x - mean) rstd weight + bias for each row of x [rows, size]; statistics and arithmetic in f32.
#pragma once
#include "layer_norm/common.cuh"

template <class T, int N>
__device__ __forceinline__ void layer_norm_fwd_row(const LayerNormFwdParams& p, uint64_t row) {
    const T* x = global<const T>(p.x) + row * p.size;
    T* y = global<T>(p.y) + row * p.size;
    const T *weight = global<const T>(p.weight), *bias = global<const T>(p.bias);
    const RowStatistics s = row_statistics<N>(x, p.size, p.eps);
    for_row<N>(x, p.size, [&](uint32_t column, const float(&v)[N]) {
        float w[N], b[N], out[N];
        load(w, weight + column);
        load(b, bias + column);
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = fmaf(normalise(v[i], s), w[i], b[i]);
        store(y + column, out);
    });
}

template <class T> __device__ __forceinline__ void layer_norm_fwd(const LayerNormFwdParams& p) {
    const uint64_t row = row_of_warp();
    if (row >= p.rows) return;
    if (vectorisable<T>(p.size, p.x, p.weight, p.bias, p.y)) layer_norm_fwd_row<T, kVec<T>>(p, row);
    else layer_norm_fwd_row<T, 1>(p, row);
}
