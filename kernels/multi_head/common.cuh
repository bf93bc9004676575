// Shared by the passes of multi_head: tiles, addressing, and the products of a block of rows with columns that stream
// past it.
//
// A *unit* is one head of one entry. A block holds rows of a unit as left operands, 16 a warp. Columns come in tiles,
// two in flight. Rows are queries and columns are keys; in the key pass of the backward it is the other way round.
#pragma once
#include "common/softmax.cuh"
#include "common/tile.cuh"

// kDim channels: head_dim rounded up, the rest zero.
template <class Element, int Dim, int Rows, int Columns> struct MultiHeadTile {
    using T = Element;
    static constexpr int kDim = Dim, kRows = Rows, kColumns = Columns, kThreads = Rows / 16 * kWarp;
    static constexpr int kStride = kDim + kRowPad;
    static_assert(kDim % 16 == 0 && kRows % 16 == 0 && kColumns % 16 == 0);
    // Two stages of both operands of a tile of columns.
    using Columns2 = T[2][kColumns][kStride];
    struct ForwardStorage {
        T rows[kRows][kStride];
        Columns2 stages[2];
    };
    // Rows of two entries, and of each column what `rows` of the backward has.
    struct BackwardStorage {
        T rows[2][kRows][kStride];
        Columns2 stages[2];
        float statistics[2][kColumns][4];
    };
};

// The head's channels of a token, of a tensor `[.., heads, head_dim]`.
template <class T>
__device__ __forceinline__ T* head_of(device_ptr tensor, const MultiHeadShape& s, uint64_t token, uint32_t head) {
    return global<T>(tensor) + (token * s.num_heads + head) * s.head_dim;
}

// Starts copying up to kTokens tokens of a head to shared memory, with zeros for those that do not exist.
template <class Tile, int kTokens, class T>
__device__ __forceinline__ void copy_tokens(T (&to)[kTokens][Tile::kStride], const MultiHeadShape& s, const T* from,
                                            uint32_t tokens) {
    stage_tile<kTokens, Tile::kDim, Tile::kStride, Tile::kThreads>(&to[0][0], from, s.num_heads * s.head_dim, tokens,
                                                                   s.head_dim);
}

// This warp's sixteen rows as left operands.
template <class Tile, class T>
__device__ __forceinline__ void load_rows(FragmentA<T> (&a)[Tile::kDim / 16],
                                          const T (&rows)[Tile::kRows][Tile::kStride]) {
#pragma unroll
    for (int k = 0; k < Tile::kDim / 16; ++k) load_a(a[k], &rows[threadIdx.x / kWarp * 16][16 * k], Tile::kStride);
}

// products = left columns^T, over the channels.
template <class Tile, class T>
__device__ __forceinline__ void multiply(float (&products)[Tile::kColumns / 8][4],
                                         const FragmentA<T> (&left)[Tile::kDim / 16],
                                         const T (&columns)[Tile::kColumns][Tile::kStride]) {
#pragma unroll
    for (int n = 0; n < Tile::kColumns / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) products[n][i] = 0.0f;
#pragma unroll
    for (int k = 0; k < Tile::kDim / 16; ++k)
#pragma unroll
        for (int n = 0; n < Tile::kColumns / 16; ++n) {
            FragmentB<T> b[2];
            load_b(b, &columns[16 * n][16 * k], Tile::kStride);
            mma(products[2 * n], left[k], b[0]);
            mma(products[2 * n + 1], left[k], b[1]);
        }
}

// sum = sum * factor + weights columns, over a tile's columns; rows g and g + 8 have a factor each. The tile's own sum
// is rounded before it is added: a long chain inside the tensor cores would cut off more than f32 does.
template <class Tile, class T>
__device__ __forceinline__ void accumulate(float (&sum)[Tile::kDim / 8][4], const float (&factor)[2],
                                           const float (&weights)[Tile::kColumns / 8][4],
                                           const T (&columns)[Tile::kColumns][Tile::kStride]) {
    float of_tile[Tile::kDim / 8][4] = {};
#pragma unroll
    for (int k = 0; k < Tile::kColumns / 16; ++k) {
        FragmentA<T> a;
        make_a(a, weights[2 * k], weights[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < Tile::kDim / 16; ++n) {
            FragmentB<T> b[2];
            load_b_trans(b, &columns[16 * k][16 * n], Tile::kStride);
            mma(of_tile[2 * n], a, b[0]);
            mma(of_tile[2 * n + 1], a, b[1]);
        }
    }
#pragma unroll
    for (int n = 0; n < Tile::kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[n][i] = fmaf(sum[n][i], factor[i / 2], of_tile[n][i]);
}

// Writes the channels of row g, or g + 8 if `half`, times `scale`.
template <class Tile, class T>
__device__ __forceinline__ void store_row(T* to, const MultiHeadShape& s, const float (&sum)[Tile::kDim / 8][4],
                                          int half, float scale) {
#pragma unroll
    for (int n = 0; n < Tile::kDim / 8; ++n)
        store_pair(to, 8 * n + threadIdx.x % 4 * 2, s.head_dim, sum[n][2 * half] * scale, sum[n][2 * half + 1] * scale);
}
