// The instances of low_rank/low_rank.cuh: by product, tile and dtype.
#include "low_rank/low_rank.cuh"

// Of the tile's columns: 16, for small ranks, or 64.
template <class T, int kCols, bool kLeftColumns, bool kRightRows>
using Tile = LowRankTile<T, kCols, kCols == 16 ? 4 : 2, kCols == 16 ? 1 : 2, kLeftColumns, kRightRows>;

// Blocks that a multiprocessor is asked to have room for. For the wide tile in f32, ptxas of CUDA 13.5 spills to have six
// if it is not asked, and every ptxas spills to have four.
constexpr int min_blocks(int cols) { return cols == 64 ? 3 : 0; }

#define LOW_RANK_KERNELS(product, PRODUCT, cols, kLeftColumns, kRightRows)                                                             \
    static_assert(sizeof(Tile<__half, cols, kLeftColumns, kRightRows>::Storage) == LOW_RANK_##PRODUCT##_64X##cols##_SHARED_BYTES_2);  \
    static_assert(sizeof(Tile<float, cols, kLeftColumns, kRightRows>::Storage) == LOW_RANK_##PRODUCT##_64X##cols##_SHARED_BYTES_4);   \
    KERNEL(low_rank_##product##_64x##cols##_f32, LowRankParams, LOW_RANK_THREADS, min_blocks(cols)) {                                 \
        low_rank<Tile<float, cols, kLeftColumns, kRightRows>>(p);                                                                     \
    }                                                                                                                                 \
    KERNEL(low_rank_##product##_64x##cols##_f16, LowRankParams, LOW_RANK_THREADS) {                                                   \
        low_rank<Tile<__half, cols, kLeftColumns, kRightRows>>(p);                                                                    \
    }                                                                                                                                 \
    KERNEL(low_rank_##product##_64x##cols##_bf16, LowRankParams, LOW_RANK_THREADS) {                                                  \
        low_rank<Tile<__nv_bfloat16, cols, kLeftColumns, kRightRows>>(p);                                                             \
    }

LOW_RANK_KERNELS(input, INPUT, 16, false, false)
LOW_RANK_KERNELS(input, INPUT, 64, false, false)
LOW_RANK_KERNELS(grad, GRAD, 16, false, true)
LOW_RANK_KERNELS(grad, GRAD, 64, false, true)
LOW_RANK_KERNELS(weight, WEIGHT, 16, true, true)
LOW_RANK_KERNELS(weight, WEIGHT, 64, true, true)
