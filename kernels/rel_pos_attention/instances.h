/* INSTANCE(head_dim, columns of the key tile, its rows, warps, dtype, element) for every row of the tile table in
 * src/launch/rel_pos_attention.rs. */
#define COLS(dim, cols, suffix, T) \
    INSTANCE(dim, cols, REL_POS_ATTENTION_COLS##cols##_ROWS, REL_POS_ATTENTION_COLS##cols##_WARPS, suffix, T)
#define HALF(suffix, T)     \
    COLS(16, 16, suffix, T) \
    COLS(32, 16, suffix, T) \
    COLS(64, 16, suffix, T) \
    COLS(64, 40, suffix, T) \
    COLS(64, 64, suffix, T) \
    COLS(80, 16, suffix, T) \
    COLS(80, 40, suffix, T) \
    COLS(80, 64, suffix, T)
#define F32(dim) INSTANCE(dim, 16, REL_POS_ATTENTION_F32_ROWS, REL_POS_ATTENTION_F32_WARPS, f32, float)
HALF(f16, __half)
HALF(bf16, __nv_bfloat16)
F32(16)
F32(32)
F32(64)
F32(80)
