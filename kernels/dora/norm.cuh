// DoRA's norm: norm [out_dim] = || W + scaling b a || of each row of the weight [out_dim, in_dim], in f32.
//
// A block takes DORA_NORM_ROWS rows, a thread every 128th column of them. Each element of a is read once for all rows.
// The elements of b come from shared memory, and W is read once.
#pragma once
#include "common/reduce.cuh"

struct DoraNormStorage {
    float b[DORA_NORM_RANK][DORA_NORM_ROWS];  // times scaling
    float sums[DORA_NORM_THREADS / kWarp][DORA_NORM_ROWS];
};

template <class T> __device__ __forceinline__ void dora_norm(const DoraNormParams& p) {
    auto& shared = ptx::shared_storage<DoraNormStorage>();
    const uint32_t row0 = blockIdx.x * DORA_NORM_ROWS;
    for (uint32_t i = threadIdx.x; i < p.rank * DORA_NORM_ROWS; i += DORA_NORM_THREADS) {
        const uint32_t rank = i / DORA_NORM_ROWS, row = i % DORA_NORM_ROWS;
        shared.b[rank][row] =
            row0 + row < p.out_dim ? p.scaling * global<const float>(p.b)[uint64_t(row0 + row) * p.rank + rank] : 0.0f;
    }
    __syncthreads();
    float sums[DORA_NORM_ROWS] = {};
    for (uint32_t col = threadIdx.x; col < p.in_dim; col += DORA_NORM_THREADS) {
        float delta[DORA_NORM_ROWS] = {};
        for (uint32_t rank = 0; rank < p.rank; ++rank) {
            const float a = global<const float>(p.a)[uint64_t(rank) * p.in_dim + col];
#pragma unroll
            for (int row = 0; row < DORA_NORM_ROWS; ++row) delta[row] = fmaf(shared.b[rank][row], a, delta[row]);
        }
#pragma unroll
        for (int row = 0; row < DORA_NORM_ROWS; ++row)
            if (row0 + row < p.out_dim) {
                const float w = to_float(global<const T>(p.weight)[uint64_t(row0 + row) * p.in_dim + col]) + delta[row];
                sums[row] = fmaf(w, w, sums[row]);
            }
    }
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int row = 0; row < DORA_NORM_ROWS; ++row) {
        const float sum = warp_sum(sums[row]);
        if (lane == 0) shared.sums[warp][row] = sum;
    }
    __syncthreads();
    if (threadIdx.x < DORA_NORM_ROWS && row0 + threadIdx.x < p.out_dim) {
        float sum = 0.0f;
        for (int other = 0; other < DORA_NORM_THREADS / kWarp; ++other) sum += shared.sums[other][threadIdx.x];
        global<float>(p.norm)[row0 + threadIdx.x] = sqrtf(sum);
    }
}
