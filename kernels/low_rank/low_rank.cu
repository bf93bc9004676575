// The instances of low_rank/low_rank.cuh: by product, tile and dtype.
#include "low_rank/low_rank.cuh"
#include "tiles.h"

// Blocks for which a multiprocessor must have room. Without a number, ptxas of CUDA 13.5 spills the wide tile in f32 to
// fit six. Every ptxas spills it to fit four.
constexpr int min_blocks(int bytes, int cols) { return bytes == 4 && cols == 64 ? 3 : 0; }

#define INSTANCE(suffix, T, product, cols, warps_m, warps_n, left_columns, right_rows) \
    KERNEL(low_rank_##product##_64x##cols##_##suffix, LowRankParams, LOW_RANK_THREADS, \
           min_blocks(sizeof(T), cols)) {                                              \
        low_rank<LowRankTile<T, cols, warps_m, warps_n, left_columns, right_rows>>(p); \
    }
LOW_RANK_TILES(INSTANCE)
