// The instances of rel_pos_attention/fwd.cuh: head_dim rounded up, the columns of a key tile, dtype.
#include "rel_pos_attention/fwd.cuh"
#include "tiles.h"

// Hopper has kernels of its own for windows.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kBlocksOfWindows = 1;
#else
constexpr int kBlocksOfWindows = 2;
#endif

// Blocks that a multiprocessor is asked to have room for; f32 would spill to have more than one. Tiles for windows have
// more warps, which would take the registers of a second block. With head_dim 80, and with nvcc 13.5 on Hopper, they
// need those.
constexpr int min_blocks(int bytes, int dim, int warps) {
    if (bytes == 4) return 1;
    return warps > 4 && dim <= 64 ? kBlocksOfWindows : 0;
}

#define INSTANCE(suffix, T, dim, cols, rows, warps, parts)                                              \
    KERNEL(rel_pos_attention_fwd_hd##dim##_cols##cols##_##suffix, RelPosAttentionFwdParams, 32 * warps, \
           min_blocks(sizeof(T), dim, warps)) {                                                         \
        rel_pos_attention_fwd<AttentionTile<T, dim, cols / parts, rows * parts, warps>, parts>(p);      \
    }
REL_POS_ATTENTION_TILES(INSTANCE)
