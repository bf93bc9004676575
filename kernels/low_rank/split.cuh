// b [out_dim, rank], f32, in three matrices of 16 bits, so that tensor cores multiply it as exactly as f32:
//
//   b = unscale (high + middle + low),   high = round(b / unscale), middle = round(b / unscale - high), low the rest.
//
// bf16 has the range of f32, and three times 8 bits are its 24. f16 has not: `unscale` is a power of two that makes the
// largest element of b about 2^14. One block a matrix.
//
// The columns are 16 of each, those beyond the rank zero, in an order by which the lane that holds two columns of each of
// two fragments of a product has four of b that lie side by side: columns 8 j + 2 t + i are b's 4 t + 2 j + i.
#pragma once
#include "common/reduce.cuh"

struct LowRankSplitStorage {
    float largest[LOW_RANK_SPLIT_THREADS / kWarp];
};

template <class T> __device__ __forceinline__ void low_rank_split(const LowRankSplitParams& p) {
    auto& shared = ptx::shared_storage<LowRankSplitStorage>();
    const LowRankSplitPart& part = p.parts[blockIdx.x];
    const float* b = global<const float>(part.b);
    float scale = 1.0f, unscale = 1.0f;
    if constexpr (std::is_same_v<T, __half>) {
        float largest = 0.0f;
        for (uint32_t i = threadIdx.x; i < part.out_dim * part.rank; i += LOW_RANK_SPLIT_THREADS) largest = fmaxf(largest, fabsf(b[i]));
        largest = warp_max(largest);
        if (threadIdx.x % kWarp == 0) shared.largest[threadIdx.x / kWarp] = largest;
        __syncthreads();
        largest = warp_max(shared.largest[threadIdx.x % kWarp]);
        // Of the exponents: neither is infinite.
        int shift = 127 + 14 - int(__float_as_uint(largest) >> 23);
        shift = shift < -100 ? -100 : shift > 100 ? 100 : shift;
        scale = __uint_as_float(uint32_t(127 + shift) << 23);
        unscale = __uint_as_float(uint32_t(127 - shift) << 23);
    }
    if (threadIdx.x == 0) global<float>(p.unscale)[blockIdx.x] = unscale;
    T* out = global<T>(part.out);
    for (uint32_t i = threadIdx.x; i < part.out_dim * LOW_RANK_SPLIT_RANK; i += LOW_RANK_SPLIT_THREADS) {
        const uint32_t row = i / LOW_RANK_SPLIT_RANK, col = i % LOW_RANK_SPLIT_RANK;
        float rest = col < part.rank ? scale * b[uint64_t(row) * part.rank + col] : 0.0f;
        const uint32_t at = row * LOW_RANK_SPLIT_COLUMNS + col % 4 / 2 * 8 + col / 4 * 2 + col % 2;
#pragma unroll
        for (int piece = 0; piece < 3; ++piece) {
            const T rounded = from_float<T>(rest);
            out[at + piece * LOW_RANK_SPLIT_RANK] = rounded;
            rest -= to_float(rounded);
        }
    }
}
