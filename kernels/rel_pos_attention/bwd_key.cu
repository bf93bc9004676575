// The instances of rel_pos_attention/bwd_key.cuh: head_dim rounded up, dtype. One block a multiprocessor is asked for,
// or the compiler would spill to have more.
#include "rel_pos_attention/bwd_key.cuh"

#define INSTANCE(dim, suffix, T, queries)                                                                             \
    KERNEL(rel_pos_attention_bwd_key_hd##dim##_##suffix, RelPosAttentionBwdKeyParams, 32 * REL_POS_ATTENTION_KEY_WARPS, 1) { \
        rel_pos_attention_bwd_key<KeyTile<T, dim, queries>>(p);                                                       \
    }
#define INSTANCES(suffix, T, queries)   \
    INSTANCE(16, suffix, T, queries)    \
    INSTANCE(32, suffix, T, queries)    \
    INSTANCE(64, suffix, T, queries)    \
    INSTANCE(80, suffix, T, queries)
INSTANCES(f16, __half, REL_POS_ATTENTION_KEY_QUERIES)
INSTANCES(bf16, __nv_bfloat16, REL_POS_ATTENTION_KEY_QUERIES)
INSTANCES(f32, float, REL_POS_ATTENTION_KEY_QUERIES_F32)
