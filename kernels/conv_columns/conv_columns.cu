// The neighbourhoods that a convolution multiplies, and their gradient: one thread a vector of channels.
//
//   columns[i, j, (a, b)] = x[s i + a - half, s j + b - half], zero outside
//   dx[y, x] = sum over (a, b), in order, of dcolumns[(y + half - a) / s, (x + half - b) / s, (a, b)] if it divides
#include "common/kernel.cuh"

// Batch, row, column, and channel of a vector of a tensor `[batch, h, w, vectors]`.
struct Place {
    uint32_t batch, y, x, vector;
};

__device__ __forceinline__ Place place_of(uint64_t index, uint32_t h, uint32_t w, uint32_t vectors) {
    const uint32_t position = uint32_t(index / vectors);
    return {position / (h * w), position / w % h, position % w, uint32_t(index % vectors)};
}

template <class T, int N> __device__ void conv_columns_fwd(const ConvColumnsParams& p, uint64_t index) {
    const uint32_t taps = p.kernel * p.kernel, half = p.kernel / 2;
    const uint32_t row = uint32_t(index / p.vectors), tap = row % taps, vector = uint32_t(index % p.vectors);
    const Place to = place_of(row / taps, p.rows, p.cols, 1);
    // Left of the grid or above it, these wrap around and are too large.
    const uint32_t y = to.y * p.stride + tap / p.kernel - half, x = to.x * p.stride + tap % p.kernel - half;
    // As floats, which is exact: on a vector of one element that is copied or zero, nvcc 13.0 never ends.
    float values[N] = {};
    if (y < p.h && x < p.w) {
        const uint64_t from = ((uint64_t(to.batch) * p.h + y) * p.w + x) * p.vectors + vector;
        load(values, global<const T>(p.x) + from * N);
    }
    store(global<T>(p.columns) + index * N, values);
}

template <class T, int N> __device__ void conv_columns_bwd(const ConvColumnsParams& p, uint64_t index) {
    const uint32_t half = p.kernel / 2;
    const Place at = place_of(index, p.h, p.w, p.vectors);
    float sum[N] = {};
    for (uint32_t a = 0; a < p.kernel; ++a) {
        const uint32_t y = at.y + half - a;
        if (y % p.stride != 0 || y / p.stride >= p.rows) continue;
        for (uint32_t b = 0; b < p.kernel; ++b) {
            const uint32_t x = at.x + half - b;
            if (x % p.stride != 0 || x / p.stride >= p.cols) continue;
            const uint64_t row = (uint64_t(at.batch) * p.rows + y / p.stride) * p.cols + x / p.stride;
            const uint64_t from = (row * p.kernel + a) * p.kernel + b;
            float part[N];
            load(part, global<const T>(p.columns) + (from * p.vectors + at.vector) * N);
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i] += part[i];
        }
    }
    store(global<T>(p.x) + index * N, sum);
}

template <class T, bool kForward> __device__ void conv_columns(const ConvColumnsParams& p) {
    const uint64_t index = uint64_t(blockIdx.x) * CONV_COLUMNS_THREADS + threadIdx.x;
    if (index >= p.count) return;
    const bool single = p.vectors == p.channels;
    if constexpr (kForward) single ? conv_columns_fwd<T, 1>(p, index) : conv_columns_fwd<T, kVec<T>>(p, index);
    else single ? conv_columns_bwd<T, 1>(p, index) : conv_columns_bwd<T, kVec<T>>(p, index);
}

KERNEL(conv_columns_fwd_f32, ConvColumnsParams, CONV_COLUMNS_THREADS) { conv_columns<float, true>(p); }
KERNEL(conv_columns_fwd_f16, ConvColumnsParams, CONV_COLUMNS_THREADS) { conv_columns<__half, true>(p); }
KERNEL(conv_columns_fwd_bf16, ConvColumnsParams, CONV_COLUMNS_THREADS) { conv_columns<__nv_bfloat16, true>(p); }
KERNEL(conv_columns_bwd_f32, ConvColumnsParams, CONV_COLUMNS_THREADS) { conv_columns<float, false>(p); }
KERNEL(conv_columns_bwd_f16, ConvColumnsParams, CONV_COLUMNS_THREADS) { conv_columns<__half, false>(p); }
KERNEL(conv_columns_bwd_bf16, ConvColumnsParams, CONV_COLUMNS_THREADS) { conv_columns<__nv_bfloat16, false>(p); }
