// The instances of rel_pos_attention/sm90/fwd.cuh: head_dim, the columns of a key tile, dtype. One block a multiprocessor.
#include "rel_pos_attention/sm90/fwd.cuh"

#define INSTANCE(dim, cols, suffix, T)                                                                                       \
    KERNEL(rel_pos_attention_fwd_sm90_hd##dim##_cols##cols##_##suffix, RelPosAttentionFwdSm90Params,                         \
           REL_POS_ATTENTION_SM90_THREADS, 1) {                                                                              \
        rel_pos_attention_fwd_sm90<StreamTile<                                                                               \
            T, dim, cols, REL_POS_ATTENTION_SM90_COLS##cols##_ROWS, REL_POS_ATTENTION_SM90_COLS##cols##_BOX_ROWS,            \
            REL_POS_ATTENTION_SM90_COLS##cols##_HD##dim##_SLOTS>>(p);                                                        \
    }
#define INSTANCES(suffix, T)    \
    INSTANCE(64, 64, suffix, T) \
    INSTANCE(64, 40, suffix, T) \
    INSTANCE(64, 16, suffix, T) \
    INSTANCE(80, 64, suffix, T) \
    INSTANCE(80, 40, suffix, T) \
    INSTANCE(80, 16, suffix, T)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)
