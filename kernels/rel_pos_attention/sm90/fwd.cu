// The instances of rel_pos_attention/sm90/fwd.cuh: head_dim, the columns of a key tile, dtype. One block a
// multiprocessor.
#include "rel_pos_attention/sm90/fwd.cuh"
#include "tiles.h"

#define INSTANCE(suffix, T, dim, cols, rows, box_rows, slots, groups)                                \
    KERNEL(rel_pos_attention_fwd_sm90_hd##dim##_cols##cols##_##suffix, RelPosAttentionFwdSm90Params, \
           (StreamTile<T, dim, cols, rows, box_rows, slots, groups>::kThreads), 1) {                 \
        rel_pos_attention_fwd_sm90<StreamTile<T, dim, cols, rows, box_rows, slots, groups>>(p);      \
    }
REL_POS_ATTENTION_FWD_SM90_TILES(INSTANCE)
