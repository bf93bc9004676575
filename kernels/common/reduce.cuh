// Sums in a fixed order, so the same bits come out every time.
#pragma once
#include "common/kernel.cuh"

// The sum over a warp's lanes, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x += ptx::shfl_xor(x, mask);
    return x;
}

// The maximum over a warp's lanes, in every lane.
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, ptx::shfl_xor(x, mask));
    return x;
}
