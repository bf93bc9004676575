// Dropout of accumulators: which elements of a lane are kept.
//
// Four fragments side by side are 16 rows of 32 columns. After mma.m16n8 and wgmma alike, element i of fragment n is in
// row `lane / 4 + 8 (i / 2)` and column `8 n + 2 (lane % 4) + i % 2`. A fragment's row is one group of eight columns.
// The four lanes of a row share its random words: lane c draws those of fragment c, and hands word d to lane d.
#pragma once
#include "common/philox.cuh"

__device__ __forceinline__ constexpr int keep_bit(int n, int i) { return 8 * (i / 2) + 2 * n + i % 2; }

// The bits of four fragments from row `row` and column 8 `group` on.
__device__ __forceinline__ uint32_t keep_bits(const DropoutMask& mask, uint32_t row, uint32_t group) {
    const int lane = threadIdx.x % kWarp, c = lane % 4;
    uint32_t keep = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint4 words = dropout_words(mask, row + lane / 4 + 8 * half, group + c);
#pragma unroll
        for (int d = 0; d < 4; ++d) {
            const int other = c ^ d;
            const uint32_t mine = other < 2 ? (other == 0 ? words.x : words.y) : (other == 2 ? words.z : words.w);
            const uint32_t word = ptx::shfl_xor(mine, d);  // word c of fragment `other`
            const uint32_t bits =
                uint32_t((word & 0xFFFFu) >= mask.threshold) | uint32_t((word >> 16) >= mask.threshold) << 1;
            keep |= bits << keep_bit(other, 2 * half);
        }
    }
    return keep;
}
