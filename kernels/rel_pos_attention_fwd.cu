// The instances of rel_pos_attention_fwd.cuh: head_dim rounded up, the columns of a key tile, dtype.
#include "rel_pos_attention_fwd.cuh"

#define INSTANCE(dim, cols, rows, warps, suffix, T)                                                                  \
    KERNEL(rel_pos_attention_fwd_hd##dim##_cols##cols##_##suffix, RelPosAttentionFwdParams, 32 * warps) {            \
        rel_pos_attention_fwd<AttentionTile<T, dim, cols, rows, warps>>(p);                                          \
    }
#include "rel_pos_attention_instances.h"
