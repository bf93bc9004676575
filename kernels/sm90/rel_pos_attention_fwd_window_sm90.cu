// The instances of rel_pos_attention_fwd_window_sm90.cuh: head_dim, dtype. Two blocks a multiprocessor.
#include "rel_pos_attention_fwd_window_sm90.cuh"

#define INSTANCE(dim, suffix, T)                                                                                    \
    KERNEL(rel_pos_attention_fwd_window_sm90_hd##dim##_##suffix, RelPosAttentionFwdSm90Params, REL_POS_ATTENTION_SM90_WINDOW_THREADS, 2) {            \
        rel_pos_attention_fwd_window_sm90<WindowTile<T, dim>>(p);                                                   \
    }
INSTANCE(64, f16, __half)
INSTANCE(64, bf16, __nv_bfloat16)
INSTANCE(80, f16, __half)
INSTANCE(80, bf16, __nv_bfloat16)
