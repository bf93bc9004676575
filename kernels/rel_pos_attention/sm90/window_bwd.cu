// The instances of rel_pos_attention/sm90/window_bwd.cuh: head_dim, dtype. One block a multiprocessor.
#include "rel_pos_attention/sm90/window_bwd.cuh"

#define INSTANCE(dim, suffix, T)                                                                                        \
    static_assert(sizeof(WindowBackwardStorage<WindowTile<T, dim>>) == REL_POS_ATTENTION_WINDOW_SM90_BWD_HD##dim##_SHARED_BYTES); \
    KERNEL(rel_pos_attention_window_bwd_sm90_hd##dim##_##suffix, RelPosAttentionWindowBwdParams,                        \
           REL_POS_ATTENTION_WINDOW_SM90_THREADS, 1) {                                                                  \
        rel_pos_attention_window_bwd_sm90<WindowTile<T, dim>>(p);                                                       \
    }
INSTANCE(64, f16, __half)
INSTANCE(64, bf16, __nv_bfloat16)
INSTANCE(80, f16, __half)
INSTANCE(80, bf16, __nv_bfloat16)
