// Made from kernels/abi.h by scripts/bindings.sh; not edited by hand.

pub const DROPOUT_THREADS: u32 = 256;
pub const LAYER_NORM_THREADS: u32 = 128;
pub const LAYER_NORM_COLUMN_WARPS: u32 = 8;
pub const LAYER_NORM_COLUMN_ROWS: u32 = 256;
pub const LAYER_NORM_COLUMN_SHARED_BYTES: u32 = 2048;
pub const REL_POS_ATTENTION_ROW_PAD: u32 = 8;
pub const REL_POS_ATTENTION_COLS16_ROWS: u32 = 4;
pub const REL_POS_ATTENTION_COLS16_WARPS: u32 = 7;
pub const REL_POS_ATTENTION_COLS40_ROWS: u32 = 2;
pub const REL_POS_ATTENTION_COLS40_WARPS: u32 = 4;
pub const REL_POS_ATTENTION_COLS64_ROWS: u32 = 1;
pub const REL_POS_ATTENTION_COLS64_WARPS: u32 = 4;
pub const REL_POS_ATTENTION_F32_ROWS: u32 = 2;
pub const REL_POS_ATTENTION_F32_WARPS: u32 = 4;
pub const REL_POS_ATTENTION_KEY_SIDE: u32 = 8;
pub const REL_POS_ATTENTION_KEY_WARPS: u32 = 4;
pub const REL_POS_ATTENTION_KEY_QUERIES: u32 = 64;
pub const REL_POS_ATTENTION_KEY_QUERIES_F32: u32 = 32;
pub const REL_POS_ATTENTION_TABLE_PARTS: u32 = 264;
pub const SUM_PARTIALS_THREADS: u32 = 256;
#[doc = " An address in device memory."]
pub type device_ptr = u64;
#[doc = " Where a dropout mask lies (see philox.cuh): seed and stream address it, an element is kept if its 16 bits are at least\n `threshold`, and multiplied by `scale`. No dropout is threshold 0 and scale 1."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: NoUninit)]
pub struct DropoutMask {
    pub seed_low: u32,
    pub seed_high: u32,
    pub stream: u32,
    pub threshold: u32,
    pub scale: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of DropoutMask"][::std::mem::size_of::<DropoutMask>() - 20usize];
    ["Alignment of DropoutMask"][::std::mem::align_of::<DropoutMask>() - 4usize];
    ["Offset of field: DropoutMask::seed_low"]
        [::std::mem::offset_of!(DropoutMask, seed_low) - 0usize];
    ["Offset of field: DropoutMask::seed_high"]
        [::std::mem::offset_of!(DropoutMask, seed_high) - 4usize];
    ["Offset of field: DropoutMask::stream"][::std::mem::offset_of!(DropoutMask, stream) - 8usize];
    ["Offset of field: DropoutMask::threshold"]
        [::std::mem::offset_of!(DropoutMask, threshold) - 12usize];
    ["Offset of field: DropoutMask::scale"][::std::mem::offset_of!(DropoutMask, scale) - 16usize];
};
#[doc = " `y = x * mask`, all `[rows, cols]`."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: NoUninit)]
pub struct DropoutParams {
    pub x: device_ptr,
    pub y: device_ptr,
    pub rows: u64,
    pub cols: u32,
    pub mask: DropoutMask,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of DropoutParams"][::std::mem::size_of::<DropoutParams>() - 48usize];
    ["Alignment of DropoutParams"][::std::mem::align_of::<DropoutParams>() - 8usize];
    ["Offset of field: DropoutParams::x"][::std::mem::offset_of!(DropoutParams, x) - 0usize];
    ["Offset of field: DropoutParams::y"][::std::mem::offset_of!(DropoutParams, y) - 8usize];
    ["Offset of field: DropoutParams::rows"][::std::mem::offset_of!(DropoutParams, rows) - 16usize];
    ["Offset of field: DropoutParams::cols"][::std::mem::offset_of!(DropoutParams, cols) - 24usize];
    ["Offset of field: DropoutParams::mask"][::std::mem::offset_of!(DropoutParams, mask) - 28usize];
};
#[doc = " `y = (x - mean) rstd weight + bias` of each row of `x [rows, size]`."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: NoUninit)]
pub struct LayerNormFwdParams {
    pub x: device_ptr,
    pub weight: device_ptr,
    pub bias: device_ptr,
    pub y: device_ptr,
    pub rows: u64,
    pub size: u32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LayerNormFwdParams"][::std::mem::size_of::<LayerNormFwdParams>() - 48usize];
    ["Alignment of LayerNormFwdParams"][::std::mem::align_of::<LayerNormFwdParams>() - 8usize];
    ["Offset of field: LayerNormFwdParams::x"]
        [::std::mem::offset_of!(LayerNormFwdParams, x) - 0usize];
    ["Offset of field: LayerNormFwdParams::weight"]
        [::std::mem::offset_of!(LayerNormFwdParams, weight) - 8usize];
    ["Offset of field: LayerNormFwdParams::bias"]
        [::std::mem::offset_of!(LayerNormFwdParams, bias) - 16usize];
    ["Offset of field: LayerNormFwdParams::y"]
        [::std::mem::offset_of!(LayerNormFwdParams, y) - 24usize];
    ["Offset of field: LayerNormFwdParams::rows"]
        [::std::mem::offset_of!(LayerNormFwdParams, rows) - 32usize];
    ["Offset of field: LayerNormFwdParams::size"]
        [::std::mem::offset_of!(LayerNormFwdParams, size) - 40usize];
    ["Offset of field: LayerNormFwdParams::eps"]
        [::std::mem::offset_of!(LayerNormFwdParams, eps) - 44usize];
};
#[doc = " The gradient of x, and the rows' statistics for the column pass: `[3, rows]` f32, mean high, mean low, rstd; 0 if\n they are not wanted."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: NoUninit)]
pub struct LayerNormBwdParams {
    pub x: device_ptr,
    pub weight: device_ptr,
    pub dy: device_ptr,
    pub dx: device_ptr,
    pub statistics: device_ptr,
    pub rows: u64,
    pub size: u32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LayerNormBwdParams"][::std::mem::size_of::<LayerNormBwdParams>() - 56usize];
    ["Alignment of LayerNormBwdParams"][::std::mem::align_of::<LayerNormBwdParams>() - 8usize];
    ["Offset of field: LayerNormBwdParams::x"]
        [::std::mem::offset_of!(LayerNormBwdParams, x) - 0usize];
    ["Offset of field: LayerNormBwdParams::weight"]
        [::std::mem::offset_of!(LayerNormBwdParams, weight) - 8usize];
    ["Offset of field: LayerNormBwdParams::dy"]
        [::std::mem::offset_of!(LayerNormBwdParams, dy) - 16usize];
    ["Offset of field: LayerNormBwdParams::dx"]
        [::std::mem::offset_of!(LayerNormBwdParams, dx) - 24usize];
    ["Offset of field: LayerNormBwdParams::statistics"]
        [::std::mem::offset_of!(LayerNormBwdParams, statistics) - 32usize];
    ["Offset of field: LayerNormBwdParams::rows"]
        [::std::mem::offset_of!(LayerNormBwdParams, rows) - 40usize];
    ["Offset of field: LayerNormBwdParams::size"]
        [::std::mem::offset_of!(LayerNormBwdParams, size) - 48usize];
    ["Offset of field: LayerNormBwdParams::eps"]
        [::std::mem::offset_of!(LayerNormBwdParams, eps) - 52usize];
};
#[doc = " Partial sums of the gradients of weight and bias: `partials [2, ceil(rows / LAYER_NORM_COLUMN_ROWS), size]` f32."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: NoUninit)]
pub struct LayerNormBwdWeightParams {
    pub x: device_ptr,
    pub dy: device_ptr,
    pub statistics: device_ptr,
    pub partials: device_ptr,
    pub rows: u64,
    pub size: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LayerNormBwdWeightParams"]
        [::std::mem::size_of::<LayerNormBwdWeightParams>() - 48usize];
    ["Alignment of LayerNormBwdWeightParams"]
        [::std::mem::align_of::<LayerNormBwdWeightParams>() - 8usize];
    ["Offset of field: LayerNormBwdWeightParams::x"]
        [::std::mem::offset_of!(LayerNormBwdWeightParams, x) - 0usize];
    ["Offset of field: LayerNormBwdWeightParams::dy"]
        [::std::mem::offset_of!(LayerNormBwdWeightParams, dy) - 8usize];
    ["Offset of field: LayerNormBwdWeightParams::statistics"]
        [::std::mem::offset_of!(LayerNormBwdWeightParams, statistics) - 16usize];
    ["Offset of field: LayerNormBwdWeightParams::partials"]
        [::std::mem::offset_of!(LayerNormBwdWeightParams, partials) - 24usize];
    ["Offset of field: LayerNormBwdWeightParams::rows"]
        [::std::mem::offset_of!(LayerNormBwdWeightParams, rows) - 32usize];
    ["Offset of field: LayerNormBwdWeightParams::size"]
        [::std::mem::offset_of!(LayerNormBwdWeightParams, size) - 40usize];
};
#[doc = " Attention over grids of `h x w` tokens in windows of `side_h x side_w`, `window_rows x window_cols` of them; of no\n dropout the threshold is 0."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: NoUninit)]
pub struct RelPosAttentionShape {
    pub h: u32,
    pub w: u32,
    pub side_h: u32,
    pub side_w: u32,
    pub window_rows: u32,
    pub window_cols: u32,
    pub num_heads: u32,
    pub head_dim: u32,
    pub softmax_scale: f32,
    pub dropout: DropoutMask,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RelPosAttentionShape"][::std::mem::size_of::<RelPosAttentionShape>() - 56usize];
    ["Alignment of RelPosAttentionShape"][::std::mem::align_of::<RelPosAttentionShape>() - 4usize];
    ["Offset of field: RelPosAttentionShape::h"]
        [::std::mem::offset_of!(RelPosAttentionShape, h) - 0usize];
    ["Offset of field: RelPosAttentionShape::w"]
        [::std::mem::offset_of!(RelPosAttentionShape, w) - 4usize];
    ["Offset of field: RelPosAttentionShape::side_h"]
        [::std::mem::offset_of!(RelPosAttentionShape, side_h) - 8usize];
    ["Offset of field: RelPosAttentionShape::side_w"]
        [::std::mem::offset_of!(RelPosAttentionShape, side_w) - 12usize];
    ["Offset of field: RelPosAttentionShape::window_rows"]
        [::std::mem::offset_of!(RelPosAttentionShape, window_rows) - 16usize];
    ["Offset of field: RelPosAttentionShape::window_cols"]
        [::std::mem::offset_of!(RelPosAttentionShape, window_cols) - 20usize];
    ["Offset of field: RelPosAttentionShape::num_heads"]
        [::std::mem::offset_of!(RelPosAttentionShape, num_heads) - 24usize];
    ["Offset of field: RelPosAttentionShape::head_dim"]
        [::std::mem::offset_of!(RelPosAttentionShape, head_dim) - 28usize];
    ["Offset of field: RelPosAttentionShape::softmax_scale"]
        [::std::mem::offset_of!(RelPosAttentionShape, softmax_scale) - 32usize];
    ["Offset of field: RelPosAttentionShape::dropout"]
        [::std::mem::offset_of!(RelPosAttentionShape, dropout) - 36usize];
};
#[doc = " `qkv [batch, h, w, 3, heads, head_dim]`, `tables [2 side_h - 1 + 2 side_w - 1, head_dim]` or 0, `pad [3, heads,\n head_dim]` or 0; out `[batch, h, w, heads, head_dim]`, lse f32 `[windows, heads, tokens]`, tokens on the grid first."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: NoUninit)]
pub struct RelPosAttentionFwdParams {
    pub qkv: device_ptr,
    pub tables: device_ptr,
    pub pad: device_ptr,
    pub out: device_ptr,
    pub lse: device_ptr,
    pub shape: RelPosAttentionShape,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RelPosAttentionFwdParams"]
        [::std::mem::size_of::<RelPosAttentionFwdParams>() - 96usize];
    ["Alignment of RelPosAttentionFwdParams"]
        [::std::mem::align_of::<RelPosAttentionFwdParams>() - 8usize];
    ["Offset of field: RelPosAttentionFwdParams::qkv"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, qkv) - 0usize];
    ["Offset of field: RelPosAttentionFwdParams::tables"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, tables) - 8usize];
    ["Offset of field: RelPosAttentionFwdParams::pad"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, pad) - 16usize];
    ["Offset of field: RelPosAttentionFwdParams::out"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, out) - 24usize];
    ["Offset of field: RelPosAttentionFwdParams::lse"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, lse) - 32usize];
    ["Offset of field: RelPosAttentionFwdParams::shape"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, shape) - 40usize];
};
#[doc = " The query pass: dq into dqkv, and for the key pass `delta` f32 `[units, tokens]` and `bias` f32 `[units, tokens,\n side_h + side_w, each rounded up to 8]`, units being windows x heads. `table_partials` is 0 or f32 `[blocks of the\n launch, rows of the tables, head_dim]`; `items` are the blocks of queries."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: NoUninit)]
pub struct RelPosAttentionBwdQueryParams {
    pub qkv: device_ptr,
    pub tables: device_ptr,
    pub pad: device_ptr,
    pub out: device_ptr,
    pub lse: device_ptr,
    pub dout: device_ptr,
    pub dqkv: device_ptr,
    pub bias: device_ptr,
    pub delta: device_ptr,
    pub table_partials: device_ptr,
    pub items: u64,
    pub shape: RelPosAttentionShape,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RelPosAttentionBwdQueryParams"]
        [::std::mem::size_of::<RelPosAttentionBwdQueryParams>() - 144usize];
    ["Alignment of RelPosAttentionBwdQueryParams"]
        [::std::mem::align_of::<RelPosAttentionBwdQueryParams>() - 8usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::qkv"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, qkv) - 0usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::tables"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, tables) - 8usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::pad"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, pad) - 16usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::out"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, out) - 24usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::lse"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, lse) - 32usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::dout"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, dout) - 40usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::dqkv"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, dqkv) - 48usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::bias"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, bias) - 56usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::delta"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, delta) - 64usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::table_partials"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, table_partials) - 72usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::items"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, items) - 80usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::shape"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, shape) - 88usize];
};
#[doc = " The key pass: dk and dv into dqkv. `pad_partials` is 0 or f32 `[windows, key tiles, 3, heads, head_dim]`, the sums\n over a tile's keys outside the grid."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: NoUninit)]
pub struct RelPosAttentionBwdKeyParams {
    pub qkv: device_ptr,
    pub pad: device_ptr,
    pub dout: device_ptr,
    pub bias: device_ptr,
    pub delta: device_ptr,
    pub dqkv: device_ptr,
    pub pad_partials: device_ptr,
    pub shape: RelPosAttentionShape,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RelPosAttentionBwdKeyParams"]
        [::std::mem::size_of::<RelPosAttentionBwdKeyParams>() - 112usize];
    ["Alignment of RelPosAttentionBwdKeyParams"]
        [::std::mem::align_of::<RelPosAttentionBwdKeyParams>() - 8usize];
    ["Offset of field: RelPosAttentionBwdKeyParams::qkv"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeyParams, qkv) - 0usize];
    ["Offset of field: RelPosAttentionBwdKeyParams::pad"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeyParams, pad) - 8usize];
    ["Offset of field: RelPosAttentionBwdKeyParams::dout"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeyParams, dout) - 16usize];
    ["Offset of field: RelPosAttentionBwdKeyParams::bias"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeyParams, bias) - 24usize];
    ["Offset of field: RelPosAttentionBwdKeyParams::delta"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeyParams, delta) - 32usize];
    ["Offset of field: RelPosAttentionBwdKeyParams::dqkv"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeyParams, dqkv) - 40usize];
    ["Offset of field: RelPosAttentionBwdKeyParams::pad_partials"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeyParams, pad_partials) - 48usize];
    ["Offset of field: RelPosAttentionBwdKeyParams::shape"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeyParams, shape) - 56usize];
};
#[doc = " `out [size] = sum over parts of partials [parts, size]`, in order; partials are f32."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: NoUninit)]
pub struct SumPartialsParams {
    pub partials: device_ptr,
    pub out: device_ptr,
    pub parts: u64,
    pub size: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of SumPartialsParams"][::std::mem::size_of::<SumPartialsParams>() - 32usize];
    ["Alignment of SumPartialsParams"][::std::mem::align_of::<SumPartialsParams>() - 8usize];
    ["Offset of field: SumPartialsParams::partials"]
        [::std::mem::offset_of!(SumPartialsParams, partials) - 0usize];
    ["Offset of field: SumPartialsParams::out"]
        [::std::mem::offset_of!(SumPartialsParams, out) - 8usize];
    ["Offset of field: SumPartialsParams::parts"]
        [::std::mem::offset_of!(SumPartialsParams, parts) - 16usize];
    ["Offset of field: SumPartialsParams::size"]
        [::std::mem::offset_of!(SumPartialsParams, size) - 24usize];
};
