// Tiles of matrices in shared memory: how they get there, and what a warp multiplies from them.
//
// Two kinds of product, d += left right, in mma.sync fragments (m16n8, four f32 a thread):
//
// - product_16bit: f16 or bf16 operands through ldmatrix.
// - product_tf32: f32 operands as tf32. Plain tf32 has 11 bits, enough beside 16-bit operands. Split in two, x = high +
//   low, it keeps f32's accuracy: `high high + high low + low high` ("3xTF32"). A 16-bit operand has no low part. An
//   infinite f32 operand comes out as NaN.
#pragma once
#include "common/kernel.cuh"

// Fills tile[r][c], rows kStride apart, from `from [.., stride]`; rows and cols say how much of it there is (at least
// one column), the rest is zero. In 16-byte copies where memory is aligned for them, else element by element.
template <int kRows, int kCols, int kStride, int kThreads, class E>
__device__ __forceinline__ void stage_tile(E* tile, const E* from, uint32_t stride, uint32_t rows, uint32_t cols) {
    constexpr int kChunks = kCols / kVec<E>, kSteps = ceil_div(kRows * kChunks, kThreads);
    static_assert(kCols % kVec<E> == 0 && kStride % kVec<E> == 0);
    if (vectorisable<E>(stride | cols, reinterpret_cast<uintptr_t>(from))) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const uint32_t i = step * kThreads + threadIdx.x, row = i / kChunks, col = i % kChunks * kVec<E>;
            if (kRows * kChunks % kThreads != 0 && row >= kRows) break;
            const bool valid = row < rows && col < cols;
            ptx::cp_async<16>(tile + row * kStride + col, valid ? from + uint64_t(row) * stride + col : from, valid);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < kRows * kCols; i += kThreads) {
            const uint32_t row = i / kCols, col = i % kCols;
            const bool valid = row < rows && col < cols;
            const E* source = valid ? from + uint64_t(row) * stride + col : from;
            if constexpr (sizeof(E) == 4) ptx::cp_async<4>(tile + row * kStride + col, source, valid);
            else {  // as bits: with the half types nvcc 13.0 does not come to an end here
                const uint16_t bits = valid ? *reinterpret_cast<const uint16_t*>(source) : uint16_t(0);
                reinterpret_cast<uint16_t*>(tile)[row * kStride + col] = bits;
            }
        }
    }
}

// The 16-byte vectors of a tile that a thread copies. The tiles follow each other along a matrix's columns, or down its
// rows. Their vectors lie at the same places, so no tile but the first one takes work for addresses.
template <int kRows, int kCols, int kStride, int kThreads, bool kDown, class E> struct TileVectors {
    static constexpr int kChunks = kCols / kVec<E>, kRowsAtOnce = kThreads / kChunks, kCount = kRows / kRowsAtOnce;
    static_assert(kThreads % kChunks == 0 && kRows % kRowsAtOnce == 0);
    // This thread's first vector of the next tile. It is an address, as nvcc 13.0 never ends on a pointer here.
    device_ptr from;
    uint32_t stride;  // elements of a row of the matrix
    uint32_t valid;   // a bit for each vector

    // The first tile begins at (first, k) of a matrix, or at (k, first) if tiles go down. They follow each other along
    // k; `extent` is what the matrix has left of the other side.
    __device__ __forceinline__ TileVectors(device_ptr matrix, uint32_t stride, uint32_t first, uint32_t k,
                                           uint32_t extent)
        : stride(stride), valid(0) {
        const uint32_t top = kDown ? k : first, left = kDown ? first : k;
        from = matrix + (uint64_t(top + row()) * stride + left + column()) * sizeof(E);
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            valid |= uint32_t(kDown ? column() < extent : row() + i * kRowsAtOnce < extent) << i;
    }
    // Whether memory is aligned for them.
    static __device__ __forceinline__ bool fit(device_ptr matrix, uint32_t stride, uint32_t first, uint32_t k,
                                               uint32_t extent) {
        return vectorisable<E>(stride | (kDown ? first | extent : k), matrix);
    }
    static __device__ __forceinline__ uint32_t row() { return threadIdx.x / kChunks; }
    static __device__ __forceinline__ uint32_t column() { return threadIdx.x % kChunks * kVec<E>; }
    // Starts copying the next tile.
    __device__ __forceinline__ void copy(E* tile) {
        const uint64_t row_bytes = uint64_t(stride) * sizeof(E);
        E* to = tile + row() * kStride + column();
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            ptx::cp_async<16>(to + i * kRowsAtOnce * kStride, global<const E>(from + i * kRowsAtOnce * row_bytes),
                              valid >> i & 1);
        from += kDown ? kRows * row_bytes : kCols * sizeof(E);
    }
};

// acc += left right over 32 of depth. `left` [m][32] is at the warp's first row, `right` at its first column: [n][32],
// or [32][n] if kRightRows.
template <bool kRightRows, int kLeftStride, int kRightStride, int kM, int kN, class T>
__device__ __forceinline__ void product_16bit(float (&acc)[kM][kN][4], const T* left, const T* right) {
    static_assert(kN % 2 == 0);
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < 32; k += 16) {
        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m)
            ptx::ldmatrix_x4(a[m], left + (m * 16 + lane % 16) * kLeftStride + k + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < kN; n += 2) {
            uint32_t b[4];
            if constexpr (kRightRows)
                ptx::ldmatrix_x4<true>(b, right + (k + lane % 16) * kRightStride + n * 8 + lane / 16 * 8);
            else
                ptx::ldmatrix_x4(b, right + (n * 8 + lane / 16 * 8 + lane % 8) * kRightStride + k + lane / 8 % 2 * 8);
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                ptx::mma_m16n8k16(acc[m][n], a[m], b[0], b[1], T{});
                ptx::mma_m16n8k16(acc[m][n + 1], a[m], b[2], b[3], T{});
            }
        }
    }
}

// x as the sum of two tf32, to 22 bits.
struct Tf32 {
    uint32_t high, low;
};
__device__ __forceinline__ Tf32 split_tf32(float x) {
    const uint32_t high = ptx::cvt_rna_tf32(x);
    return {high, ptx::cvt_rna_tf32(x - __uint_as_float(high))};
}

// acc += the sum that `body` adds to zeros. Tensor cores cut their sums off, where f32 would round. One long chain of
// such sums would lose the accuracy that splitting the operands keeps.
template <class Body> __device__ __forceinline__ void add_rounded(float (&acc)[4], Body body) {
    float sum[4] = {};
    body(sum);
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] += sum[i];
}

// left(i, k) right(k, j) over kDepth of depth, i and j counted from the warp's corner. For each fragment (m, n) calls
// add(m, n, body), and body(d) adds the product of this step of eight to d. A left side of 16 bits is exact as it is.
template <int kDepth, bool kSplitLeft, bool kSplitRight, int kM, int kN, class Left, class Right, class Add>
__device__ __forceinline__ void product_tf32(Left left, Right right, Add add) {
    const int lane = threadIdx.x % kWarp, row = lane / 4, col = lane % 4;
#pragma unroll
    for (int k = 0; k < kDepth; k += 8) {
        uint32_t a_high[kM][4], a_low[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const auto element = left(m * 16 + row + 8 * (i % 2), k + col + 4 * (i / 2));
                const float value = to_float(element);
                const Tf32 x = sizeof(element) == 2 ? Tf32{__float_as_uint(value), 0} : split_tf32(value);
                a_high[m][i] = x.high;
                a_low[m][i] = x.low;
            }
#pragma unroll
        for (int n = 0; n < kN; ++n) {
            const Tf32 b0 = split_tf32(right(k + col, n * 8 + row)), b1 = split_tf32(right(k + col + 4, n * 8 + row));
#pragma unroll
            for (int m = 0; m < kM; ++m)
                add(m, n, [&](float(&d)[4]) {
                    if constexpr (kSplitLeft) ptx::mma_m16n8k8_tf32(d, a_low[m], b0.high, b1.high);
                    if constexpr (kSplitRight) ptx::mma_m16n8k8_tf32(d, a_high[m], b0.low, b1.low);
                    ptx::mma_m16n8k8_tf32(d, a_high[m], b0.high, b1.high);
                });
        }
    }
}
