// Descriptors, which tell wgmma where a matrix lies in shared memory. Tiles are as bulk copies with swizzling leave
// them: consecutive rows of kSwizzle = 128, 64 or 32 bytes. Eight rows are a pattern, aligned to its own size.
//
//   k innermost     a row for each m or n; one instruction takes 32 bytes of the rows. Wider depth is further tiles.
//   m, n innermost  a row for each k; one instruction takes 16 rows (8 of tf32 do not exist). Wider m or n are further
//                   tiles, `next_tile` bytes on.
//
// The descriptor of data `bytes` further on is this one + descriptor_step(bytes): the next depth within rows, or other
// rows.
#pragma once
#include "common/ptx_sm90.cuh"

template <int kSwizzle> __device__ __forceinline__ uint64_t make_descriptor(const void* tile, uint32_t leading_bytes) {
    static_assert(kSwizzle == 128 || kSwizzle == 64 || kSwizzle == 32);
    constexpr uint64_t kKind = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : 3, kStride = 8 * kSwizzle;
    return uint64_t((ptx::cvta_shared(tile) & 0x3FFFF) >> 4) | uint64_t(leading_bytes >> 4) << 16 |
           (kStride >> 4) << 32 | kKind << 62;
}

template <int kSwizzle>
__device__ __forceinline__ uint64_t descriptor_k_inner(const void* tile) {
    return make_descriptor<kSwizzle>(tile, 16);
}
template <int kSwizzle> __device__ __forceinline__ uint64_t descriptor_mn_inner(const void* tile, uint32_t next_tile) {
    return make_descriptor<kSwizzle>(tile, next_tile);
}

__device__ __forceinline__ constexpr uint64_t descriptor_step(uint32_t bytes) { return bytes >> 4; }
