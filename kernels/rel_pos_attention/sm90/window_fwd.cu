// The instances of rel_pos_attention/sm90/window_fwd.cuh: head_dim, dtype. One block a multiprocessor.
#include "rel_pos_attention/sm90/window_fwd.cuh"
#include "tiles.h"

#define INSTANCE(suffix, T, dim)                                                                 \
    KERNEL(rel_pos_attention_window_fwd_sm90_hd##dim##_##suffix, RelPosAttentionWindowFwdParams, \
           REL_POS_ATTENTION_WINDOW_SM90_THREADS, 1) {                                           \
        rel_pos_attention_window_fwd_sm90<WindowTile<T, dim>>(p);                                \
    }
REL_POS_ATTENTION_WINDOW_SM90_TILES(INSTANCE)
