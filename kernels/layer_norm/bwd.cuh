// LayerNorm's gradients, from x and dy alone; the statistics are recomputed.
//
//   dx = rstd (g - mean(g) - xhat mean(g xhat)),   g = dy weight,   xhat = (x - mean) rstd
//   dweight = sum over rows of dy xhat,   dbias = sum over rows of dy
//
// Two kernels, since weight and bias are mostly frozen. `bwd` goes along rows: dx, plus the gradient of a residual, and
// the statistics if asked for. `bwd_weight` goes down the columns of one block of rows, into partial sums that
// sum_partials/sum_partials.cu adds in order.
#pragma once
#include "layer_norm/common.cuh"

template <class T, int N>
__device__ __forceinline__ void layer_norm_bwd_row(const LayerNormBwdParams& p, uint64_t row) {
    const T *x = global<const T>(p.x) + row * p.size, *dy = global<const T>(p.dy) + row * p.size;
    const T* weight = global<const T>(p.weight);
    const T* residual = p.residual != 0 ? global<const T>(p.residual) + row * p.size : nullptr;
    T* dx = global<T>(p.dx) + row * p.size;
    const RowStatistics s = row_statistics<N>(x, p.size, p.eps);
    float sum_g = 0.0f, sum_gx = 0.0f;
    for_row<N>(x, p.size, [&](uint32_t column, const float(&v)[N]) {
        float g[N], w[N];
        load(g, dy + column);
        load(w, weight + column);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            sum_g = fmaf(g[i], w[i], sum_g);
            sum_gx = fmaf(g[i] * w[i], normalise(v[i], s), sum_gx);
        }
    });
    const float mean_g = warp_sum(sum_g) / float(p.size), mean_gx = warp_sum(sum_gx) / float(p.size);
    for_row<N>(x, p.size, [&](uint32_t column, const float(&v)[N]) {
        float g[N], w[N], out[N];
        load(g, dy + column);
        load(w, weight + column);
#pragma unroll
        for (int i = 0; i < N; ++i) out[i] = s.rstd * (g[i] * w[i] - mean_g - normalise(v[i], s) * mean_gx);
        if (residual != nullptr) {
            float r[N];
            load(r, residual + column);
            // Rounded twice, as an addition of its own would be.
#pragma unroll
            for (int i = 0; i < N; ++i) out[i] = r[i] + to_float(from_float<T>(out[i]));
        }
        store(dx + column, out);
    });
    if (p.statistics != 0 && threadIdx.x % kWarp == 0) {
        float* statistics = global<float>(p.statistics) + row;
        statistics[0] = s.mean;
        statistics[p.rows] = s.mean_low;
        statistics[2 * p.rows] = s.rstd;
    }
}

template <class T> __device__ __forceinline__ void layer_norm_bwd(const LayerNormBwdParams& p) {
    const uint64_t row = row_of_warp();
    if (row >= p.rows) return;
    if (vectorisable<T>(p.size, p.x, p.weight, p.dy, p.residual, p.dx)) layer_norm_bwd_row<T, kVec<T>>(p, row);
    else layer_norm_bwd_row<T, 1>(p, row);
}

struct LayerNormColumnStorage {
    float dweight[LAYER_NORM_COLUMN_WARPS][kWarp], dbias[LAYER_NORM_COLUMN_WARPS][kWarp];
};

// Block (row block, column tile): warp w takes rows w, w + 8, ... of the block, a lane one column.
template <class T> __device__ __forceinline__ void layer_norm_bwd_weight(const LayerNormBwdWeightParams& p) {
    auto& shared = ptx::shared_storage<LayerNormColumnStorage>();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const uint64_t column = uint64_t(blockIdx.y) * kWarp + lane;
    const uint64_t begin = uint64_t(blockIdx.x) * LAYER_NORM_COLUMN_ROWS;
    const uint64_t end = begin + LAYER_NORM_COLUMN_ROWS < p.rows ? begin + LAYER_NORM_COLUMN_ROWS : p.rows;
    const float* statistics = global<const float>(p.statistics);
    float dweight = 0.0f, dbias = 0.0f;
    if (column < p.size)
        for (uint64_t row = begin + warp; row < end; row += LAYER_NORM_COLUMN_WARPS) {
            const RowStatistics s{statistics[row], statistics[p.rows + row], statistics[2 * p.rows + row]};
            const float g = to_float(global<const T>(p.dy)[row * p.size + column]);
            dweight = fmaf(g, normalise(to_float(global<const T>(p.x)[row * p.size + column]), s), dweight);
            dbias += g;
        }
    shared.dweight[warp][lane] = dweight;
    shared.dbias[warp][lane] = dbias;
    __syncthreads();
    if (warp == 0 && column < p.size) {
        for (int other = 1; other < LAYER_NORM_COLUMN_WARPS; ++other) {
            dweight += shared.dweight[other][lane];
            dbias += shared.dbias[other][lane];
        }
        float* partials = global<float>(p.partials) + column;
        partials[blockIdx.x * p.size] = dweight;
        partials[(uint64_t(gridDim.x) + blockIdx.x) * p.size] = dbias;
    }
}
