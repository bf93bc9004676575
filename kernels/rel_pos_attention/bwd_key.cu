// The instances of rel_pos_attention/bwd_key.cuh: head_dim rounded up, dtype. One block a multiprocessor is asked for,
// or the compiler would spill to have more.
#include "rel_pos_attention/bwd_key.cuh"
#include "tiles.h"

#define INSTANCE(suffix, T, dim, queries)                                             \
    KERNEL(rel_pos_attention_bwd_key_hd##dim##_##suffix, RelPosAttentionBwdKeyParams, \
           32 * REL_POS_ATTENTION_KEY_WARPS, 1) {                                     \
        rel_pos_attention_bwd_key<KeyTile<T, dim, queries>>(p);                       \
    }
REL_POS_ATTENTION_BWD_KEY_TILES(INSTANCE)
