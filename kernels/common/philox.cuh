// Philox4x32-7 and the dropout masks made of it: the same bits as src/philox.rs, whose header gives the addressing.
#pragma once
#include "common/kernel.cuh"

__device__ __forceinline__ uint4 philox4x32(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 7; ++round) {
        const uint32_t high0 = __umulhi(0xD2511F53u, counter.x), low0 = 0xD2511F53u * counter.x;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, counter.z), low1 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
        key = make_uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
    }
    return counter;
}

// The mask with its seed, which a graph's kernels find in memory.
__device__ __forceinline__ DropoutMask seeded(const DropoutMask& mask) {
    DropoutMask own = mask;
    if (mask.threshold < DROPOUT_SEED_AT) return own;
    const auto* seed = global<const uint32_t>(uint64_t(mask.seed_high) << 32 | mask.seed_low);
    own.seed_low = seed[0];
    own.seed_high = seed[1];
    own.threshold -= DROPOUT_SEED_AT;
    return own;
}

// The random words of the columns 8 * group .. 8 * group + 7 of a row.
__device__ __forceinline__ uint4 dropout_words(const DropoutMask& mask, uint64_t row, uint32_t group) {
    return philox4x32(make_uint4(group, uint32_t(row), uint32_t(row >> 32), mask.stream),
                      make_uint2(mask.seed_low, mask.seed_high));
}

// The factor of column 8 * group + lane: the scale, or 0 if it is dropped.
__device__ __forceinline__ float dropout_factor(const DropoutMask& mask, uint4 words, int lane) {
    const uint32_t word = lane < 4 ? (lane < 2 ? words.x : words.y) : (lane < 6 ? words.z : words.w);
    return ((word >> (16 * (lane % 2))) & 0xFFFFu) >= mask.threshold ? mask.scale : 0.0f;
}
