// Operands of a 16 x 8 x 16 product on tensor cores, read from shared memory: D [16, 8] += A [16, 16] B [16, 8].
//
// f16 and bf16 are one mma.m16n8k16. A product in f32 is 3xTF32, six mma.m16n8k8, with x = high + low, both tf32: `a b
// = low high + high low + high high`, without terms of 2^-22. The accumulators lie in the same place for all: lane l,
// with g = l / 4 and t = l % 4, holds D[g][2t], D[g][2t + 1], D[g + 8][2t], D[g + 8][2t + 1].
//
// The low part is cut off, not rounded, so high + low splits into the same two parts again. A sum of one product, 1 v,
// then counts in the next product exactly as v does. An infinity has no low part: its f32 products are NaN.
//
// Both f32 operands take the depth in the order `0 2 4 6 1 3 5 7` within each eight, which no sum notices. A lane then
// needs two neighbours of a row, and accumulators are A operands without moving between lanes.
#pragma once
#include "common/kernel.cuh"

template <class T> struct FragmentA {
    uint32_t at[4];
};
template <> struct FragmentA<float> {
    float at[2][4];
};
template <class T> struct FragmentB {
    uint32_t at[2];
};
template <> struct FragmentB<float> {
    float at[2][2];
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % kWarp; }

// A from a tile [16][stride] that holds it row by row.
template <class T> __device__ __forceinline__ void load_a(FragmentA<T>& a, const T* tile, int stride) {
    const int lane = lane_id();
    ptx::ldmatrix_x4(a.at, tile + lane % 16 * stride + lane / 16 * 8);
}
__device__ __forceinline__ void load_a(FragmentA<float>& a, const float* tile, int stride) {
    const float* row = tile + lane_id() / 4 * stride + lane_id() % 4 * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const auto upper = *reinterpret_cast<const Vec<float, 2>*>(row + 8 * h);
        const auto lower = *reinterpret_cast<const Vec<float, 2>*>(row + 8 * stride + 8 * h);
        a.at[h][0] = upper.at[0];
        a.at[h][1] = lower.at[0];
        a.at[h][2] = upper.at[1];
        a.at[h][3] = lower.at[1];
    }
}

// Two B side by side, of the tile [16][stride] that holds their columns as rows: B[k][n] = tile[n][k].
template <class T> __device__ __forceinline__ void load_b(FragmentB<T> (&b)[2], const T* tile, int stride) {
    const int lane = lane_id();
    uint32_t r[4];
    ptx::ldmatrix_x4(r, tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
    b[0] = {{r[0], r[1]}};
    b[1] = {{r[2], r[3]}};
}
__device__ __forceinline__ void load_b(FragmentB<float> (&b)[2], const float* tile, int stride) {
    const float* row = tile + lane_id() / 4 * stride + lane_id() % 4 * 2;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const auto pair = *reinterpret_cast<const Vec<float, 2>*>(row + 8 * j * stride + 8 * h);
            b[j].at[h][0] = pair.at[0];
            b[j].at[h][1] = pair.at[1];
        }
}

// Two B side by side, of the tile [16][stride] that holds their rows: B[k][n] = tile[k][n].
template <class T> __device__ __forceinline__ void load_b_trans(FragmentB<T> (&b)[2], const T* tile, int stride) {
    const int lane = lane_id();
    uint32_t r[4];
    ptx::ldmatrix_x4<true>(r, tile + lane % 16 * stride + lane / 16 * 8);
    b[0] = {{r[0], r[1]}};
    b[1] = {{r[2], r[3]}};
}
__device__ __forceinline__ void load_b_trans(FragmentB<float> (&b)[2], const float* tile, int stride) {
    const float* column = tile + lane_id() % 4 * 2 * stride + lane_id() / 4;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int i = 0; i < 2; ++i) b[j].at[h][i] = column[(8 * h + i) * stride + 8 * j];
}

// A from the accumulators of its left and right half.
template <class T>
__device__ __forceinline__ void make_a(FragmentA<T>& a, const float (&left)[4], const float (&right)[4]) {
    a.at[0] = pack<T>(left[0], left[1]);
    a.at[1] = pack<T>(left[2], left[3]);
    a.at[2] = pack<T>(right[0], right[1]);
    a.at[3] = pack<T>(right[2], right[3]);
}
__device__ __forceinline__ void make_a(FragmentA<float>& a, const float (&left)[4], const float (&right)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        a.at[0][i] = left[i % 2 * 2 + i / 2];
        a.at[1][i] = right[i % 2 * 2 + i / 2];
    }
}

// A from a function of row and column.
template <class T, class At> __device__ __forceinline__ void gather_a(FragmentA<T>& a, At at) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    float left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        left[i] = at(g + 8 * (i / 2), 2 * t + i % 2);
        right[i] = at(g + 8 * (i / 2), 2 * t + i % 2 + 8);
    }
    make_a(a, left, right);
}

template <class T> __device__ __forceinline__ void mma(float (&d)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
    ptx::mma_m16n8k16(d, a.at, b.at[0], b.at[1], T{});
}
__device__ __forceinline__ uint32_t low_tf32(float x, uint32_t high) {
    return __float_as_uint(x - __uint_as_float(high)) & 0xFFFFE000u;
}
template <bool kTransposed = false>
__device__ __forceinline__ void mma(float (&d)[4], const FragmentA<float>& a, const FragmentB<float>& b) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a_high[i] = ptx::cvt_rna_tf32(a.at[h][i]);
            a_low[i] = low_tf32(a.at[h][i], a_high[i]);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            b_high[i] = ptx::cvt_rna_tf32(b.at[h][i]);
            b_low[i] = low_tf32(b.at[h][i], b_high[i]);
        }
        if constexpr (kTransposed) ptx::mma_m16n8k8_tf32(d, a_high, b_low[0], b_low[1]);
        ptx::mma_m16n8k8_tf32(d, a_low, b_high[0], b_high[1]);
        if constexpr (!kTransposed) ptx::mma_m16n8k8_tf32(d, a_high, b_low[0], b_low[1]);
        ptx::mma_m16n8k8_tf32(d, a_high, b_high[0], b_high[1]);
    }
}

// D^T += B^T A^T, for operands in exchanged roles: with the bits that mma gives D.
template <class T>
__device__ __forceinline__ void mma_transposed(float (&d)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
    if constexpr (sizeof(T) == 4) mma<true>(d, a, b);
    else mma(d, a, b);
}

// Takes the diagonal of 16 rows' products with 16, [8 columns at a time]: row g with row g, and g + 8 with g + 8.
__device__ __forceinline__ void take_diagonal(float (&diagonal)[2], const float (&products)[2][4]) {
    const int g = lane_id() / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
        diagonal[half] =
            ptx::shfl_idx(g % 2 == 0 ? products[half][2 * half] : products[half][2 * half + 1], 4 * g + g / 2);
}

// The sum and the maximum over the four lanes that hold a row of accumulators.
__device__ __forceinline__ float quad_sum(float x) {
    x += ptx::shfl_xor(x, 1);
    return x + ptx::shfl_xor(x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, ptx::shfl_xor(x, 1));
    return fmaxf(x, ptx::shfl_xor(x, 2));
}
