// The instances of low_rank/low_rank.cuh: by product, tile and dtype.
#include "low_rank/low_rank.cuh"
#include "tiles.h"

// Blocks that a multiprocessor is asked to have room for. For the wide tile in f32, ptxas of CUDA 13.5 spills to have
// six if it is not asked, and every ptxas spills to have four.
constexpr int min_blocks(int bytes, int cols) { return bytes == 4 && cols == 64 ? 3 : 0; }

#define INSTANCE(suffix, T, product, cols, warps_m, warps_n, left_columns, right_rows) \
    KERNEL(low_rank_##product##_64x##cols##_##suffix, LowRankParams, LOW_RANK_THREADS, \
           min_blocks(sizeof(T), cols)) {                                              \
        low_rank<LowRankTile<T, cols, warps_m, warps_n, left_columns, right_rows>>(p); \
    }
LOW_RANK_TILES(INSTANCE)
