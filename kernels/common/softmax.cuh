// Shared by the attentions: the softmax in base 2, and rows of channels in shared memory and back in global memory.
#pragma once
#include "common/fragment.cuh"

// Padding of a row of channels in shared memory, in elements: no bank conflicts.
constexpr int kRowPad = 8;

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The maximum that weights are relative to. While all scores are minus infinity, their weights are zero, not NaN.
__device__ __forceinline__ float finite_maximum(float max) { return max == -INFINITY ? 0.0f : max; }

// Writes channels column and column + 1 of a row, as far as they exist.
template <class T>
__device__ __forceinline__ void store_pair(T* row, uint32_t column, uint32_t head_dim, float first, float second) {
    if constexpr (sizeof(T) == 2) {
        // The host sees to it that head_dim is even, and rows aligned to pairs.
        if (column < head_dim) store(row + column, {first, second});
    } else {
        if (column < head_dim) row[column] = first;
        if (column + 1 < head_dim) row[column + 1] = second;
    }
}
