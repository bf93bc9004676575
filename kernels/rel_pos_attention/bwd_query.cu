// The instances of rel_pos_attention/bwd_query.cuh: head_dim rounded up, the columns of a key tile, dtype. One block a
// multiprocessor is asked for, or the compiler would spill to have more.
#include "rel_pos_attention/bwd_query.cuh"
#include "tiles.h"

#define INSTANCE(suffix, T, dim, cols, rows, warps, parts)                                             \
    KERNEL(rel_pos_attention_bwd_query_hd##dim##_cols##cols##_##suffix, RelPosAttentionBwdQueryParams, \
           32 * warps, 1) {                                                                            \
        rel_pos_attention_bwd_query<AttentionTile<T, dim, cols, rows, warps>>(p);                      \
    }
REL_POS_ATTENTION_TILES(INSTANCE)
