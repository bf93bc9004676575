/* INSTANCE(head_dim, columns of the key tile, its rows, warps, dtype, element) for every row of the tile table in
 * src/launch/rel_pos_attention.rs. */
#define COLS16(dim, suffix, T) INSTANCE(dim, 16, REL_POS_ATTENTION_COLS16_ROWS, REL_POS_ATTENTION_COLS16_WARPS, suffix, T)
#define COLS64(dim, suffix, T) INSTANCE(dim, 64, REL_POS_ATTENTION_COLS64_ROWS, REL_POS_ATTENTION_COLS64_WARPS, suffix, T)
#define F32(dim) INSTANCE(dim, 16, REL_POS_ATTENTION_F32_ROWS, REL_POS_ATTENTION_F32_WARPS, f32, float)
#define HALF(suffix, T)   \
    COLS16(16, suffix, T) \
    COLS16(32, suffix, T) \
    COLS16(64, suffix, T) \
    COLS64(64, suffix, T) \
    COLS16(80, suffix, T) \
    COLS64(80, suffix, T)
HALF(f16, __half)
HALF(bf16, __nv_bfloat16)
F32(16)
F32(32)
F32(64)
F32(80)
