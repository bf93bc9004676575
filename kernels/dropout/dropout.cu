// y = x * mask, for `x [rows, cols]`: dropout on its own, and its gradient. One thread an aligned group of eight
// columns.
#include "common/philox.cuh"

template <class T> __device__ void dropout(const DropoutParams& p) {
    const uint32_t groups = ceil_div(p.cols, 8u);
    const uint64_t index = uint64_t(blockIdx.x) * DROPOUT_THREADS + threadIdx.x;
    const uint64_t row = index / groups;
    const uint32_t group = uint32_t(index % groups);
    if (row >= p.rows) return;
    const DropoutMask mask = seeded(p.mask);
    const uint4 words = dropout_words(mask, row, group);
    const T* x = global<const T>(p.x) + row * p.cols;
    T* y = global<T>(p.y) + row * p.cols;
#pragma unroll
    for (int lane = 0; lane < 8; ++lane) {
        const uint32_t col = group * 8 + lane;
        if (col >= p.cols) break;
        const float factor = dropout_factor(mask, words, lane);
        // A dropped element is 0 even where x is infinite or NaN, as on the CPU.
        y[col] = from_float<T>(factor > 0.0f ? to_float(x[col]) * factor : 0.0f);
    }
}

KERNEL(dropout_f32, DropoutParams, DROPOUT_THREADS) { dropout<float>(p); }
KERNEL(dropout_f16, DropoutParams, DROPOUT_THREADS) { dropout<__half>(p); }
KERNEL(dropout_bf16, DropoutParams, DROPOUT_THREADS) { dropout<__nv_bfloat16>(p); }
