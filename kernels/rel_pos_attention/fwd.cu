// The instances of rel_pos_attention/fwd.cuh: head_dim rounded up, the columns of a key tile, dtype.
#include "rel_pos_attention/fwd.cuh"
#include "tiles.h"

// Blocks that a multiprocessor is asked to have room for; f32 would spill to have more than one.
constexpr int min_blocks(int bytes) { return bytes == 4 ? 1 : 0; }

#define INSTANCE(suffix, T, dim, cols, rows, warps)                                                     \
    KERNEL(rel_pos_attention_fwd_hd##dim##_cols##cols##_##suffix, RelPosAttentionFwdParams, 32 * warps, \
           min_blocks(sizeof(T))) {                                                                     \
        rel_pos_attention_fwd<AttentionTile<T, dim, cols, rows, warps>>(p);                             \
    }
REL_POS_ATTENTION_TILES(INSTANCE)
