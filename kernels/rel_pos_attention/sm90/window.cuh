// Shared by Hopper's kernels of rel_pos_attention for windows of up to 14 x 14 tokens, f16 and bf16. A unit lies whole
// in a block's shared memory, and a warp has a row of the window.
//
// They multiply by mma.sync, not wgmma. A unit of SAM takes 75 KB in and 25 KB out for 13 MFLOP. So memory is the bound
// while the tensor cores do half of their best. A row of 14 fills a product of 16 rows, not one of 64. They need Hopper
// for the memory: up to 226 KiB a block.
//
// Rows of channels lie as the window's tokens do, y side_w + x, without gaps. A product takes sixteen of them, from the
// first of a row of the window on. Those behind the end of the row are its neighbour's: as keys they get a weight of
// zero, as queries they are left out. Behind the last token are rows of zeros for the last row's sixteen.
#pragma once
#include "rel_pos_attention/common.cuh"

template <class Element, int Dim> struct WindowTile {
    using T = Element;
    static constexpr int kDim = Dim, kSide = REL_POS_ATTENTION_WINDOW_SM90_SIDE, kWarps = kSide,
                         kThreads = kWarp * kWarps;
    static constexpr int kStride = kDim + kRowPad, kPieces = kDim / kVec<T>;
    // Sixteen from the last row on, with a row of zeros; both tables, of the second 32 rows, and whole depths.
    static constexpr int kTokens = (kSide - 1) * kSide + 16, kTableRows = 64;
    static_assert(kTokens > kSide * kSide && kTableRows >= 2 * kSide - 1 + 32);
    static_assert(kThreads == REL_POS_ATTENTION_WINDOW_SM90_THREADS);
    using Row = T[kStride];
};

// Hidden, since the compiler would keep all that follows from it in registers from one unit to the next.
__device__ __forceinline__ uint32_t warp_of_block() { return ptx::hide(threadIdx.x / kWarp); }

// Starts copying row y of the window from `array [.., stride]`, by one warp, 16 bytes at a time. Tokens outside the
// grid come from `pad`, or are zeros. Behind the last row come zeros up to its sixteenth.
template <class Tile>
__device__ __forceinline__ void copy_window_row(typename Tile::Row* rows, const AttentionUnit& unit, uint32_t y,
                                                const typename Tile::T* array, uint64_t stride,
                                                const typename Tile::T* pad) {
    using T = typename Tile::T;
    const uint32_t width = unit.s.side_w, count = y + 1 == unit.s.side_h ? 16 : width;
    array += unit.token({y, 0}) * stride;
#pragma unroll 1
    for (uint32_t i = threadIdx.x % kWarp; i < count * Tile::kPieces; i += kWarp) {
        const uint32_t x = i / Tile::kPieces, column = i % Tile::kPieces * kVec<T>;
        const T* from = unit.on_grid({y, x}) ? array + x * stride : x < width ? pad : nullptr;
        ptx::cp_async<16>(&rows[y * width + x][column], from == nullptr ? array : from + column, from != nullptr);
    }
}

// Starts copying both tables, by the whole block; zeros behind their end.
template <class Tile>
__device__ __forceinline__ void copy_tables(typename Tile::Row* rows, const RelPosAttentionShape& s,
                                            const Tables<typename Tile::T>& tables) {
    using T = typename Tile::T;
    const uint32_t count = 2 * s.side_h - 1 + 2 * s.side_w - 1;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < Tile::kTableRows * Tile::kPieces; i += Tile::kThreads) {
        const uint32_t row = i / Tile::kPieces, column = i % Tile::kPieces * kVec<T>;
        ptx::cp_async<16>(&rows[row][column], row < count ? tables.row(s, row) + column : tables.h, row < count);
    }
}

// A from sixteen columns of a row of `width` tokens; the last token stands for those behind it.
template <int kStride, class T>
__device__ __forceinline__ void load_a_of_row(FragmentA<T>& a, const T (*row)[kStride], uint32_t width,
                                              uint32_t column) {
    const uint32_t lane = threadIdx.x % kWarp;
    ptx::ldmatrix_x4(a.at, &row[min(lane % 16, width - 1)][column + lane / 16 * 8]);
}

// Two B side by side, with row_of(0 .. 15) as their columns.
template <class T, class RowOf>
__device__ __forceinline__ void load_b_of(FragmentB<T> (&b)[2], uint32_t column, RowOf row_of) {
    const uint32_t lane = threadIdx.x % kWarp;
    uint32_t r[4];
    ptx::ldmatrix_x4(r, row_of(lane / 16 * 8 + lane % 8) + column + lane / 8 % 2 * 8);
    b[0] = {{r[0], r[1]}};
    b[1] = {{r[2], r[3]}};
}

// The biases of row y's queries, in base 2; zeros without tables. Accumulators hold rel_h of a query and all key rows.
// As the queries share their row, rows of the table in reverse order are the columns of that product. Memory holds
// `rel_w [query][key column]`: each product with a row of the table goes to its key's place.
template <class Tile>
__device__ __forceinline__ void project_row(float (&rel_h)[2][4], float (*rel_w)[Tile::kSide],
                                            const FragmentA<typename Tile::T> (&q)[Tile::kDim / 16],
                                            const typename Tile::Row* tables, bool present,
                                            const RelPosAttentionShape& s, uint32_t y) {
    using T = typename Tile::T;
    const uint32_t lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    float products[4][4] = {};
    if (present) {
        const uint32_t last = y + s.side_h - 1;
        const typename Tile::Row* tables_w = tables + 2 * s.side_h - 1;
#pragma unroll
        for (int k = 0; k < Tile::kDim / 16; ++k) {
            FragmentB<T> b[2];
            load_b_of(b, 16 * k, [&](uint32_t key) { return tables[key < last ? last - key : 0]; });
            mma(rel_h[0], q[k], b[0]);
            mma(rel_h[1], q[k], b[1]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                load_b(b, &tables_w[16 * half][16 * k], Tile::kStride);
                mma(products[2 * half], q[k], b[0]);
                mma(products[2 * half + 1], q[k], b[1]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) rel_h[i / 4][i % 4] *= kLog2e;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const uint32_t n = g + 8 * (i % 4 / 2), key = n + s.side_w - 1 - (8 * (i / 4) + 2 * t + i % 2);
        if (n < s.side_w && key < s.side_w) rel_w[n][key] = products[i / 4][i % 4] * kLog2e;
    }
    __syncwarp();
}

// Writes accumulators of a row of tokens, times a factor for each, to `width` rows of global memory. They pass through
// `own`, memory of this warp alone, to leave 16 bytes at a time.
template <class Tile, int kStride>
__device__ __forceinline__ void store_window_row(typename Tile::T (*own)[kStride],
                                                 const float (&sums)[Tile::kDim / 8][4], const float (&factor)[2],
                                                 uint32_t width, typename Tile::T* to, uint64_t stride) {
    using T = typename Tile::T;
    const uint32_t lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (g + 8 * half >= width) continue;
#pragma unroll
        for (int c = 0; c < Tile::kDim / 8; ++c)
            store(&own[g + 8 * half][8 * c + 2 * t],
                  {sums[c][2 * half] * factor[half], sums[c][2 * half + 1] * factor[half]});
    }
    __syncwarp();
#pragma unroll 1
    for (uint32_t i = lane; i < width * Tile::kPieces; i += kWarp) {
        const uint32_t n = i / Tile::kPieces, column = i % Tile::kPieces * kVec<T>;
        *reinterpret_cast<Vec<uint32_t, 4>*>(to + n * stride + column) =
            *reinterpret_cast<const Vec<uint32_t, 4>*>(&own[n][column]);
    }
    __syncwarp();
}
