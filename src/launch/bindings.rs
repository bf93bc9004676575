// Made from kernels/abi.h by scripts/bindings.sh; not edited by hand.

pub const DROPOUT_SEED_AT: u32 = 65536;
pub const DROPOUT_THREADS: u32 = 256;
pub const LAYER_NORM_THREADS: u32 = 128;
pub const LAYER_NORM_COLUMN_WARPS: u32 = 8;
pub const LAYER_NORM_COLUMN_ROWS: u32 = 256;
pub const LAYER_NORM_COLUMN_SHARED_BYTES: u32 = 2048;
pub const PROJECTION_PARTS: u32 = 3;
pub const ACTIVATION_IDENTITY: u32 = 0;
pub const ACTIVATION_GELU: u32 = 1;
pub const ACTIVATION_RELU: u32 = 2;
pub const PROJECTION_SM90_THREADS: u32 = 384;
pub const LOW_RANK_THREADS: u32 = 128;
pub const ACTIVATION_GRAD_THREADS: u32 = 256;
pub const BIAS_GRAD_WARPS: u32 = 8;
pub const BIAS_GRAD_SHARED_BYTES: u32 = 1024;
pub const DORA_NORM_ROWS: u32 = 8;
pub const DORA_NORM_THREADS: u32 = 128;
pub const DORA_NORM_RANK: u32 = 256;
pub const DORA_NORM_SHARED_BYTES: u32 = 8320;
pub const REL_POS_ATTENTION_SM90_TABLE_ROWS: u32 = 64;
pub const REL_POS_ATTENTION_WINDOW_SM90_SIDE: u32 = 14;
pub const REL_POS_ATTENTION_WINDOW_SM90_THREADS: u32 = 448;
pub const REL_POS_ATTENTION_KEY_SIDE: u32 = 8;
pub const REL_POS_ATTENTION_KEY_WARPS: u32 = 4;
pub const REL_POS_ATTENTION_SM90_BWD_KEY_THREADS: u32 = 384;
pub const REL_POS_ATTENTION_SM90_BWD_KEYS: u32 = 128;
pub const REL_POS_ATTENTION_SM90_BWD_KEY_QUERIES: u32 = 64;
pub const SUM_PARTIALS_THREADS: u32 = 256;
pub const MULTI_HEAD_THREADS: u32 = 256;
pub const ADAMW_THREADS: u32 = 256;
pub const ADAMW_CHUNK: u32 = 2048;
pub const ADAMW_SHARED_BYTES: u32 = 36;
pub const ADAMW_OUTCOME_SHARED_BYTES: u32 = 3072;
pub const ADAMW_F32: u32 = 0;
pub const ADAMW_F16: u32 = 1;
pub const ADAMW_BF16: u32 = 2;
pub const CONV_COLUMNS_THREADS: u32 = 256;
pub const CONCAT_PARTS: u32 = 8;
pub const CONCAT_THREADS: u32 = 256;
#[doc = " An address in device memory."]
pub type device_ptr = u64;
#[doc = " How a tensor lies in memory and which tile of it is copied at once, encoded by the driver\n (src/launch/tensor_map.rs)."]
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct EncodedTensorMap {
    pub opaque: [u64; 16usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of EncodedTensorMap"][::std::mem::size_of::<EncodedTensorMap>() - 128usize];
    ["Alignment of EncodedTensorMap"][::std::mem::align_of::<EncodedTensorMap>() - 64usize];
    ["Offset of field: EncodedTensorMap::opaque"]
        [::std::mem::offset_of!(EncodedTensorMap, opaque) - 0usize];
};
impl Default for EncodedTensorMap {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = " Where a dropout mask lies (see philox.cuh): seed and stream address it, an element is kept if its 16 bits are at\n least `threshold`, and multiplied by `scale`. No dropout is threshold 0 and scale 1. With DROPOUT_SEED_AT in the\n threshold, the seed's words are its address. The attention's kernels take no such mask."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
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
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
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
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
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
#[doc = " The gradient of x, plus `residual`, the gradient of what is added to y, if it is not 0. The rows' statistics for the\n column pass: `[3, rows]` f32, mean high, mean low, rstd; 0 if they are not wanted."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct LayerNormBwdParams {
    pub x: device_ptr,
    pub weight: device_ptr,
    pub dy: device_ptr,
    pub residual: device_ptr,
    pub dx: device_ptr,
    pub statistics: device_ptr,
    pub rows: u64,
    pub size: u32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LayerNormBwdParams"][::std::mem::size_of::<LayerNormBwdParams>() - 64usize];
    ["Alignment of LayerNormBwdParams"][::std::mem::align_of::<LayerNormBwdParams>() - 8usize];
    ["Offset of field: LayerNormBwdParams::x"]
        [::std::mem::offset_of!(LayerNormBwdParams, x) - 0usize];
    ["Offset of field: LayerNormBwdParams::weight"]
        [::std::mem::offset_of!(LayerNormBwdParams, weight) - 8usize];
    ["Offset of field: LayerNormBwdParams::dy"]
        [::std::mem::offset_of!(LayerNormBwdParams, dy) - 16usize];
    ["Offset of field: LayerNormBwdParams::residual"]
        [::std::mem::offset_of!(LayerNormBwdParams, residual) - 24usize];
    ["Offset of field: LayerNormBwdParams::dx"]
        [::std::mem::offset_of!(LayerNormBwdParams, dx) - 32usize];
    ["Offset of field: LayerNormBwdParams::statistics"]
        [::std::mem::offset_of!(LayerNormBwdParams, statistics) - 40usize];
    ["Offset of field: LayerNormBwdParams::rows"]
        [::std::mem::offset_of!(LayerNormBwdParams, rows) - 48usize];
    ["Offset of field: LayerNormBwdParams::size"]
        [::std::mem::offset_of!(LayerNormBwdParams, size) - 56usize];
    ["Offset of field: LayerNormBwdParams::eps"]
        [::std::mem::offset_of!(LayerNormBwdParams, eps) - 60usize];
};
#[doc = " Partial sums of the gradients of weight and bias: `partials [2, ceil(rows / LAYER_NORM_COLUMN_ROWS), size]` f32."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
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
#[doc = " One of the projections that share an input. Weight `[out_dim, in_dim]` is of the kernel's dtype, the small tensors\n are f32: bias `[out_dim]`, a `[rank, in_dim]`, b `[out_dim, rank]`, lora_bias `[out_dim]`; the biases are of the\n kernel's dtype if `bias_typed`, `lora_bias_typed`. Its columns of packed tensors start at `column`, those of S at\n `s_column`. Without LoRA the rank is 0."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct ProjectionPart {
    pub weight: device_ptr,
    pub bias: device_ptr,
    pub a: device_ptr,
    pub b: device_ptr,
    pub lora_bias: device_ptr,
    pub out_dim: u32,
    pub column: u32,
    pub rank: u32,
    pub s_column: u32,
    pub bias_typed: u32,
    pub lora_bias_typed: u32,
    pub scaling: f32,
    pub mask: DropoutMask,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ProjectionPart"][::std::mem::size_of::<ProjectionPart>() - 88usize];
    ["Alignment of ProjectionPart"][::std::mem::align_of::<ProjectionPart>() - 8usize];
    ["Offset of field: ProjectionPart::weight"]
        [::std::mem::offset_of!(ProjectionPart, weight) - 0usize];
    ["Offset of field: ProjectionPart::bias"]
        [::std::mem::offset_of!(ProjectionPart, bias) - 8usize];
    ["Offset of field: ProjectionPart::a"][::std::mem::offset_of!(ProjectionPart, a) - 16usize];
    ["Offset of field: ProjectionPart::b"][::std::mem::offset_of!(ProjectionPart, b) - 24usize];
    ["Offset of field: ProjectionPart::lora_bias"]
        [::std::mem::offset_of!(ProjectionPart, lora_bias) - 32usize];
    ["Offset of field: ProjectionPart::out_dim"]
        [::std::mem::offset_of!(ProjectionPart, out_dim) - 40usize];
    ["Offset of field: ProjectionPart::column"]
        [::std::mem::offset_of!(ProjectionPart, column) - 44usize];
    ["Offset of field: ProjectionPart::rank"]
        [::std::mem::offset_of!(ProjectionPart, rank) - 48usize];
    ["Offset of field: ProjectionPart::s_column"]
        [::std::mem::offset_of!(ProjectionPart, s_column) - 52usize];
    ["Offset of field: ProjectionPart::bias_typed"]
        [::std::mem::offset_of!(ProjectionPart, bias_typed) - 56usize];
    ["Offset of field: ProjectionPart::lora_bias_typed"]
        [::std::mem::offset_of!(ProjectionPart, lora_bias_typed) - 60usize];
    ["Offset of field: ProjectionPart::scaling"]
        [::std::mem::offset_of!(ProjectionPart, scaling) - 64usize];
    ["Offset of field: ProjectionPart::mask"]
        [::std::mem::offset_of!(ProjectionPart, mask) - 68usize];
};
#[doc = " `out = act(cat_p (left W_p^T + low_rank_p b_p^T + constants)) + residual` in the forward (left is x `[rows,\n in_dim]`, low_rank is S, out is `[rows, total]`); `out = sum_p (left_p W_p + mask_p(low_rank_p a_p))` in the backward\n (left is the gradient `[rows, total]`, low_rank is dS, out is `[rows, in_dim]`). S and dS are `[rows, s_stride]`,\n f32, and carry `scaling`. `sum`, if wanted, is what `act` is applied to."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct ProjectionParams {
    pub left: device_ptr,
    pub low_rank: device_ptr,
    pub residual: device_ptr,
    pub sum: device_ptr,
    pub out: device_ptr,
    pub rows: u32,
    pub in_dim: u32,
    pub total: u32,
    pub s_stride: u32,
    pub column_tiles: u32,
    pub activation: u32,
    pub parts: [ProjectionPart; 3usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ProjectionParams"][::std::mem::size_of::<ProjectionParams>() - 328usize];
    ["Alignment of ProjectionParams"][::std::mem::align_of::<ProjectionParams>() - 8usize];
    ["Offset of field: ProjectionParams::left"]
        [::std::mem::offset_of!(ProjectionParams, left) - 0usize];
    ["Offset of field: ProjectionParams::low_rank"]
        [::std::mem::offset_of!(ProjectionParams, low_rank) - 8usize];
    ["Offset of field: ProjectionParams::residual"]
        [::std::mem::offset_of!(ProjectionParams, residual) - 16usize];
    ["Offset of field: ProjectionParams::sum"]
        [::std::mem::offset_of!(ProjectionParams, sum) - 24usize];
    ["Offset of field: ProjectionParams::out"]
        [::std::mem::offset_of!(ProjectionParams, out) - 32usize];
    ["Offset of field: ProjectionParams::rows"]
        [::std::mem::offset_of!(ProjectionParams, rows) - 40usize];
    ["Offset of field: ProjectionParams::in_dim"]
        [::std::mem::offset_of!(ProjectionParams, in_dim) - 44usize];
    ["Offset of field: ProjectionParams::total"]
        [::std::mem::offset_of!(ProjectionParams, total) - 48usize];
    ["Offset of field: ProjectionParams::s_stride"]
        [::std::mem::offset_of!(ProjectionParams, s_stride) - 52usize];
    ["Offset of field: ProjectionParams::column_tiles"]
        [::std::mem::offset_of!(ProjectionParams, column_tiles) - 56usize];
    ["Offset of field: ProjectionParams::activation"]
        [::std::mem::offset_of!(ProjectionParams, activation) - 60usize];
    ["Offset of field: ProjectionParams::parts"]
        [::std::mem::offset_of!(ProjectionParams, parts) - 64usize];
};
#[doc = " The forward on Hopper: tensor maps of x, and of each projection's weight, S, b and columns of the packed tensors, in\n the tiles of the kernel; those of absent tensors are zero. `tiles` is the number of tiles."]
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct ProjectionFwdSm90Params {
    pub x: EncodedTensorMap,
    pub weight: [EncodedTensorMap; 3usize],
    pub low_rank: [EncodedTensorMap; 3usize],
    pub b: [EncodedTensorMap; 3usize],
    pub residual: [EncodedTensorMap; 3usize],
    pub sum: [EncodedTensorMap; 3usize],
    pub out: [EncodedTensorMap; 3usize],
    pub problem: ProjectionParams,
    pub tiles: u64,
    pub reserved: [u64; 6usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ProjectionFwdSm90Params"]
        [::std::mem::size_of::<ProjectionFwdSm90Params>() - 2816usize];
    ["Alignment of ProjectionFwdSm90Params"]
        [::std::mem::align_of::<ProjectionFwdSm90Params>() - 64usize];
    ["Offset of field: ProjectionFwdSm90Params::x"]
        [::std::mem::offset_of!(ProjectionFwdSm90Params, x) - 0usize];
    ["Offset of field: ProjectionFwdSm90Params::weight"]
        [::std::mem::offset_of!(ProjectionFwdSm90Params, weight) - 128usize];
    ["Offset of field: ProjectionFwdSm90Params::low_rank"]
        [::std::mem::offset_of!(ProjectionFwdSm90Params, low_rank) - 512usize];
    ["Offset of field: ProjectionFwdSm90Params::b"]
        [::std::mem::offset_of!(ProjectionFwdSm90Params, b) - 896usize];
    ["Offset of field: ProjectionFwdSm90Params::residual"]
        [::std::mem::offset_of!(ProjectionFwdSm90Params, residual) - 1280usize];
    ["Offset of field: ProjectionFwdSm90Params::sum"]
        [::std::mem::offset_of!(ProjectionFwdSm90Params, sum) - 1664usize];
    ["Offset of field: ProjectionFwdSm90Params::out"]
        [::std::mem::offset_of!(ProjectionFwdSm90Params, out) - 2048usize];
    ["Offset of field: ProjectionFwdSm90Params::problem"]
        [::std::mem::offset_of!(ProjectionFwdSm90Params, problem) - 2432usize];
    ["Offset of field: ProjectionFwdSm90Params::tiles"]
        [::std::mem::offset_of!(ProjectionFwdSm90Params, tiles) - 2760usize];
    ["Offset of field: ProjectionFwdSm90Params::reserved"]
        [::std::mem::offset_of!(ProjectionFwdSm90Params, reserved) - 2768usize];
};
impl Default for ProjectionFwdSm90Params {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = " The gradient of x on Hopper: tensor maps of each projection's columns of the gradient and weight, and of dx; those\n of absent tensors are zero."]
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct ProjectionBwdInputSm90Params {
    pub g: [EncodedTensorMap; 3usize],
    pub weight: [EncodedTensorMap; 3usize],
    pub dx: EncodedTensorMap,
    pub problem: ProjectionParams,
    pub tiles: u64,
    pub reserved: [u64; 6usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ProjectionBwdInputSm90Params"]
        [::std::mem::size_of::<ProjectionBwdInputSm90Params>() - 1280usize];
    ["Alignment of ProjectionBwdInputSm90Params"]
        [::std::mem::align_of::<ProjectionBwdInputSm90Params>() - 64usize];
    ["Offset of field: ProjectionBwdInputSm90Params::g"]
        [::std::mem::offset_of!(ProjectionBwdInputSm90Params, g) - 0usize];
    ["Offset of field: ProjectionBwdInputSm90Params::weight"]
        [::std::mem::offset_of!(ProjectionBwdInputSm90Params, weight) - 384usize];
    ["Offset of field: ProjectionBwdInputSm90Params::dx"]
        [::std::mem::offset_of!(ProjectionBwdInputSm90Params, dx) - 768usize];
    ["Offset of field: ProjectionBwdInputSm90Params::problem"]
        [::std::mem::offset_of!(ProjectionBwdInputSm90Params, problem) - 896usize];
    ["Offset of field: ProjectionBwdInputSm90Params::tiles"]
        [::std::mem::offset_of!(ProjectionBwdInputSm90Params, tiles) - 1224usize];
    ["Offset of field: ProjectionBwdInputSm90Params::reserved"]
        [::std::mem::offset_of!(ProjectionBwdInputSm90Params, reserved) - 1232usize];
};
impl Default for ProjectionBwdInputSm90Params {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = " One product with a thin f32 side: `out(i, j) = scale * sum over k of mask(left)(i, k) right(k, j)`. How i, k and j\n lie in memory is the kernel's (low_rank/low_rank.cuh). Columns j up to `out_j >= size_j` are written, as zeros."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct LowRankPart {
    pub left: device_ptr,
    pub right: device_ptr,
    pub out: device_ptr,
    pub size_i: u32,
    pub size_j: u32,
    pub out_j: u32,
    pub depth: u32,
    pub left_stride: u32,
    pub right_stride: u32,
    pub out_stride_i: u32,
    pub out_stride_j: u32,
    pub scale: f32,
    pub mask: DropoutMask,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LowRankPart"][::std::mem::size_of::<LowRankPart>() - 80usize];
    ["Alignment of LowRankPart"][::std::mem::align_of::<LowRankPart>() - 8usize];
    ["Offset of field: LowRankPart::left"][::std::mem::offset_of!(LowRankPart, left) - 0usize];
    ["Offset of field: LowRankPart::right"][::std::mem::offset_of!(LowRankPart, right) - 8usize];
    ["Offset of field: LowRankPart::out"][::std::mem::offset_of!(LowRankPart, out) - 16usize];
    ["Offset of field: LowRankPart::size_i"][::std::mem::offset_of!(LowRankPart, size_i) - 24usize];
    ["Offset of field: LowRankPart::size_j"][::std::mem::offset_of!(LowRankPart, size_j) - 28usize];
    ["Offset of field: LowRankPart::out_j"][::std::mem::offset_of!(LowRankPart, out_j) - 32usize];
    ["Offset of field: LowRankPart::depth"][::std::mem::offset_of!(LowRankPart, depth) - 36usize];
    ["Offset of field: LowRankPart::left_stride"]
        [::std::mem::offset_of!(LowRankPart, left_stride) - 40usize];
    ["Offset of field: LowRankPart::right_stride"]
        [::std::mem::offset_of!(LowRankPart, right_stride) - 44usize];
    ["Offset of field: LowRankPart::out_stride_i"]
        [::std::mem::offset_of!(LowRankPart, out_stride_i) - 48usize];
    ["Offset of field: LowRankPart::out_stride_j"]
        [::std::mem::offset_of!(LowRankPart, out_stride_j) - 52usize];
    ["Offset of field: LowRankPart::scale"][::std::mem::offset_of!(LowRankPart, scale) - 56usize];
    ["Offset of field: LowRankPart::mask"][::std::mem::offset_of!(LowRankPart, mask) - 60usize];
};
#[doc = " The products of all parts; each is split along its depth into `splits` of `split_depth`, whose results lie\n `split_stride` elements apart."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct LowRankParams {
    pub parts: [LowRankPart; 3usize],
    pub split_stride: u64,
    pub splits: u32,
    pub split_depth: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of LowRankParams"][::std::mem::size_of::<LowRankParams>() - 256usize];
    ["Alignment of LowRankParams"][::std::mem::align_of::<LowRankParams>() - 8usize];
    ["Offset of field: LowRankParams::parts"]
        [::std::mem::offset_of!(LowRankParams, parts) - 0usize];
    ["Offset of field: LowRankParams::split_stride"]
        [::std::mem::offset_of!(LowRankParams, split_stride) - 240usize];
    ["Offset of field: LowRankParams::splits"]
        [::std::mem::offset_of!(LowRankParams, splits) - 248usize];
    ["Offset of field: LowRankParams::split_depth"]
        [::std::mem::offset_of!(LowRankParams, split_depth) - 252usize];
};
#[doc = " `g = grad * act'(sum)` of `size` elements."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct ActivationGradParams {
    pub grad: device_ptr,
    pub sum: device_ptr,
    pub g: device_ptr,
    pub size: u64,
    pub activation: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ActivationGradParams"][::std::mem::size_of::<ActivationGradParams>() - 40usize];
    ["Alignment of ActivationGradParams"][::std::mem::align_of::<ActivationGradParams>() - 8usize];
    ["Offset of field: ActivationGradParams::grad"]
        [::std::mem::offset_of!(ActivationGradParams, grad) - 0usize];
    ["Offset of field: ActivationGradParams::sum"]
        [::std::mem::offset_of!(ActivationGradParams, sum) - 8usize];
    ["Offset of field: ActivationGradParams::g"]
        [::std::mem::offset_of!(ActivationGradParams, g) - 16usize];
    ["Offset of field: ActivationGradParams::size"]
        [::std::mem::offset_of!(ActivationGradParams, size) - 24usize];
    ["Offset of field: ActivationGradParams::activation"]
        [::std::mem::offset_of!(ActivationGradParams, activation) - 32usize];
};
#[doc = " Where the column sums of one part go: to `bias`, and times `scaling` to `lora_bias`; 0 where not wanted."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct BiasGradPart {
    pub bias: device_ptr,
    pub lora_bias: device_ptr,
    pub column: u32,
    pub out_dim: u32,
    pub scaling: f32,
    pub reserved: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of BiasGradPart"][::std::mem::size_of::<BiasGradPart>() - 32usize];
    ["Alignment of BiasGradPart"][::std::mem::align_of::<BiasGradPart>() - 8usize];
    ["Offset of field: BiasGradPart::bias"][::std::mem::offset_of!(BiasGradPart, bias) - 0usize];
    ["Offset of field: BiasGradPart::lora_bias"]
        [::std::mem::offset_of!(BiasGradPart, lora_bias) - 8usize];
    ["Offset of field: BiasGradPart::column"]
        [::std::mem::offset_of!(BiasGradPart, column) - 16usize];
    ["Offset of field: BiasGradPart::out_dim"]
        [::std::mem::offset_of!(BiasGradPart, out_dim) - 20usize];
    ["Offset of field: BiasGradPart::scaling"]
        [::std::mem::offset_of!(BiasGradPart, scaling) - 24usize];
    ["Offset of field: BiasGradPart::reserved"]
        [::std::mem::offset_of!(BiasGradPart, reserved) - 28usize];
};
#[doc = " A block of 32 x BIAS_GRAD_WARPS threads sums 32 columns of `g [rows, total]` over `split_rows` rows; the sums of\n blocks of rows lie `split_stride` f32 apart."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct BiasGradParams {
    pub parts: [BiasGradPart; 3usize],
    pub g: device_ptr,
    pub rows: u64,
    pub split_rows: u64,
    pub split_stride: u64,
    pub total: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of BiasGradParams"][::std::mem::size_of::<BiasGradParams>() - 136usize];
    ["Alignment of BiasGradParams"][::std::mem::align_of::<BiasGradParams>() - 8usize];
    ["Offset of field: BiasGradParams::parts"]
        [::std::mem::offset_of!(BiasGradParams, parts) - 0usize];
    ["Offset of field: BiasGradParams::g"][::std::mem::offset_of!(BiasGradParams, g) - 96usize];
    ["Offset of field: BiasGradParams::rows"]
        [::std::mem::offset_of!(BiasGradParams, rows) - 104usize];
    ["Offset of field: BiasGradParams::split_rows"]
        [::std::mem::offset_of!(BiasGradParams, split_rows) - 112usize];
    ["Offset of field: BiasGradParams::split_stride"]
        [::std::mem::offset_of!(BiasGradParams, split_stride) - 120usize];
    ["Offset of field: BiasGradParams::total"]
        [::std::mem::offset_of!(BiasGradParams, total) - 128usize];
};
#[doc = " `norm [out_dim] = || W + scaling b a ||` of each row; weight `[out_dim, in_dim]` of the kernel's dtype, a\n `[rank, in_dim]`, b `[out_dim, rank]` and norm f32."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct DoraNormParams {
    pub weight: device_ptr,
    pub a: device_ptr,
    pub b: device_ptr,
    pub norm: device_ptr,
    pub out_dim: u32,
    pub in_dim: u32,
    pub rank: u32,
    pub scaling: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of DoraNormParams"][::std::mem::size_of::<DoraNormParams>() - 48usize];
    ["Alignment of DoraNormParams"][::std::mem::align_of::<DoraNormParams>() - 8usize];
    ["Offset of field: DoraNormParams::weight"]
        [::std::mem::offset_of!(DoraNormParams, weight) - 0usize];
    ["Offset of field: DoraNormParams::a"][::std::mem::offset_of!(DoraNormParams, a) - 8usize];
    ["Offset of field: DoraNormParams::b"][::std::mem::offset_of!(DoraNormParams, b) - 16usize];
    ["Offset of field: DoraNormParams::norm"]
        [::std::mem::offset_of!(DoraNormParams, norm) - 24usize];
    ["Offset of field: DoraNormParams::out_dim"]
        [::std::mem::offset_of!(DoraNormParams, out_dim) - 32usize];
    ["Offset of field: DoraNormParams::in_dim"]
        [::std::mem::offset_of!(DoraNormParams, in_dim) - 36usize];
    ["Offset of field: DoraNormParams::rank"]
        [::std::mem::offset_of!(DoraNormParams, rank) - 40usize];
    ["Offset of field: DoraNormParams::scaling"]
        [::std::mem::offset_of!(DoraNormParams, scaling) - 44usize];
};
#[doc = " Attention over grids of `h x w` tokens in windows of `side_h x side_w`, `window_rows x window_cols` of them; of no\n dropout the threshold is 0."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
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
#[doc = " `qkv [batch, h, w, 3, heads, head_dim]`, `tables` rel_pos_h `[2 side_h - 1, head_dim]` and rel_pos_w `[2 side_w - 1,\n head_dim]` or 0, `pad [3, heads, head_dim]` or 0; out `[batch, h, w, heads, head_dim]`, lse f32\n `[windows, heads, tokens]`, tokens on the grid first. With f32 operands it is `[windows, heads, tokens, 2]`, the\n maximum in base 2 and the sum."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct RelPosAttentionFwdParams {
    pub qkv: device_ptr,
    pub tables: [device_ptr; 2usize],
    pub pad: device_ptr,
    pub out: device_ptr,
    pub lse: device_ptr,
    pub shape: RelPosAttentionShape,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RelPosAttentionFwdParams"]
        [::std::mem::size_of::<RelPosAttentionFwdParams>() - 104usize];
    ["Alignment of RelPosAttentionFwdParams"]
        [::std::mem::align_of::<RelPosAttentionFwdParams>() - 8usize];
    ["Offset of field: RelPosAttentionFwdParams::qkv"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, qkv) - 0usize];
    ["Offset of field: RelPosAttentionFwdParams::tables"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, tables) - 8usize];
    ["Offset of field: RelPosAttentionFwdParams::pad"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, pad) - 24usize];
    ["Offset of field: RelPosAttentionFwdParams::out"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, out) - 32usize];
    ["Offset of field: RelPosAttentionFwdParams::lse"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, lse) - 40usize];
    ["Offset of field: RelPosAttentionFwdParams::shape"]
        [::std::mem::offset_of!(RelPosAttentionFwdParams, shape) - 48usize];
};
#[doc = " Rows of channels for bulk copies: maps of the first 64 channels of a head and, if it has more, of the others."]
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct PanelMaps {
    pub wide: EncodedTensorMap,
    pub tail: EncodedTensorMap,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of PanelMaps"][::std::mem::size_of::<PanelMaps>() - 256usize];
    ["Alignment of PanelMaps"][::std::mem::align_of::<PanelMaps>() - 64usize];
    ["Offset of field: PanelMaps::wide"][::std::mem::offset_of!(PanelMaps, wide) - 0usize];
    ["Offset of field: PanelMaps::tail"][::std::mem::offset_of!(PanelMaps, tail) - 128usize];
};
impl Default for PanelMaps {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = " The forward on sm_90a: as RelPosAttentionFwdParams, with maps of qkv as `[batch, h, w, 3 heads head_dim]` and of the\n tables as they lie. `tables` only says whether there are any."]
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct RelPosAttentionFwdSm90Params {
    pub qkv_maps: PanelMaps,
    pub table_maps: [PanelMaps; 2usize],
    pub tables: [device_ptr; 2usize],
    pub pad: device_ptr,
    pub out: device_ptr,
    pub lse: device_ptr,
    pub shape: RelPosAttentionShape,
    pub unused: [u64; 4usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RelPosAttentionFwdSm90Params"]
        [::std::mem::size_of::<RelPosAttentionFwdSm90Params>() - 896usize];
    ["Alignment of RelPosAttentionFwdSm90Params"]
        [::std::mem::align_of::<RelPosAttentionFwdSm90Params>() - 64usize];
    ["Offset of field: RelPosAttentionFwdSm90Params::qkv_maps"]
        [::std::mem::offset_of!(RelPosAttentionFwdSm90Params, qkv_maps) - 0usize];
    ["Offset of field: RelPosAttentionFwdSm90Params::table_maps"]
        [::std::mem::offset_of!(RelPosAttentionFwdSm90Params, table_maps) - 256usize];
    ["Offset of field: RelPosAttentionFwdSm90Params::tables"]
        [::std::mem::offset_of!(RelPosAttentionFwdSm90Params, tables) - 768usize];
    ["Offset of field: RelPosAttentionFwdSm90Params::pad"]
        [::std::mem::offset_of!(RelPosAttentionFwdSm90Params, pad) - 784usize];
    ["Offset of field: RelPosAttentionFwdSm90Params::out"]
        [::std::mem::offset_of!(RelPosAttentionFwdSm90Params, out) - 792usize];
    ["Offset of field: RelPosAttentionFwdSm90Params::lse"]
        [::std::mem::offset_of!(RelPosAttentionFwdSm90Params, lse) - 800usize];
    ["Offset of field: RelPosAttentionFwdSm90Params::shape"]
        [::std::mem::offset_of!(RelPosAttentionFwdSm90Params, shape) - 808usize];
    ["Offset of field: RelPosAttentionFwdSm90Params::unused"]
        [::std::mem::offset_of!(RelPosAttentionFwdSm90Params, unused) - 864usize];
};
impl Default for RelPosAttentionFwdSm90Params {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = " As RelPosAttentionFwdParams; the blocks take turns at `units`, windows x heads."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct RelPosAttentionWindowFwdParams {
    pub qkv: device_ptr,
    pub tables: [device_ptr; 2usize],
    pub pad: device_ptr,
    pub out: device_ptr,
    pub lse: device_ptr,
    pub units: u64,
    pub shape: RelPosAttentionShape,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RelPosAttentionWindowFwdParams"]
        [::std::mem::size_of::<RelPosAttentionWindowFwdParams>() - 112usize];
    ["Alignment of RelPosAttentionWindowFwdParams"]
        [::std::mem::align_of::<RelPosAttentionWindowFwdParams>() - 8usize];
    ["Offset of field: RelPosAttentionWindowFwdParams::qkv"]
        [::std::mem::offset_of!(RelPosAttentionWindowFwdParams, qkv) - 0usize];
    ["Offset of field: RelPosAttentionWindowFwdParams::tables"]
        [::std::mem::offset_of!(RelPosAttentionWindowFwdParams, tables) - 8usize];
    ["Offset of field: RelPosAttentionWindowFwdParams::pad"]
        [::std::mem::offset_of!(RelPosAttentionWindowFwdParams, pad) - 24usize];
    ["Offset of field: RelPosAttentionWindowFwdParams::out"]
        [::std::mem::offset_of!(RelPosAttentionWindowFwdParams, out) - 32usize];
    ["Offset of field: RelPosAttentionWindowFwdParams::lse"]
        [::std::mem::offset_of!(RelPosAttentionWindowFwdParams, lse) - 40usize];
    ["Offset of field: RelPosAttentionWindowFwdParams::units"]
        [::std::mem::offset_of!(RelPosAttentionWindowFwdParams, units) - 48usize];
    ["Offset of field: RelPosAttentionWindowFwdParams::shape"]
        [::std::mem::offset_of!(RelPosAttentionWindowFwdParams, shape) - 56usize];
};
#[doc = " The whole backward of windows: dqkv, and of each block its sums of the gradients of the tables, f32 `[blocks, rows\n of the tables, head_dim]`, and of pad, `[blocks, 3, heads, head_dim]`; 0 where not wanted."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct RelPosAttentionWindowBwdParams {
    pub qkv: device_ptr,
    pub tables: [device_ptr; 2usize],
    pub pad: device_ptr,
    pub out: device_ptr,
    pub lse: device_ptr,
    pub dout: device_ptr,
    pub dqkv: device_ptr,
    pub table_partials: device_ptr,
    pub pad_partials: device_ptr,
    pub units: u64,
    pub shape: RelPosAttentionShape,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RelPosAttentionWindowBwdParams"]
        [::std::mem::size_of::<RelPosAttentionWindowBwdParams>() - 144usize];
    ["Alignment of RelPosAttentionWindowBwdParams"]
        [::std::mem::align_of::<RelPosAttentionWindowBwdParams>() - 8usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::qkv"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, qkv) - 0usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::tables"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, tables) - 8usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::pad"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, pad) - 24usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::out"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, out) - 32usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::lse"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, lse) - 40usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::dout"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, dout) - 48usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::dqkv"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, dqkv) - 56usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::table_partials"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, table_partials) - 64usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::pad_partials"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, pad_partials) - 72usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::units"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, units) - 80usize];
    ["Offset of field: RelPosAttentionWindowBwdParams::shape"]
        [::std::mem::offset_of!(RelPosAttentionWindowBwdParams, shape) - 88usize];
};
#[doc = " The query pass: dq into dqkv, and for the key pass `delta` f32 `[units, tokens]` and `bias` f32 `[units, tokens,\n side_h + side_w]`, each side rounded up to 8. Units are windows x heads. `table_partials` is 0 or f32 `[blocks of the\n launch, rows of the tables, head_dim]`; `items` are the blocks of queries. With f32 operands `delta` is `[units,\n tokens, 4]`: delta, the maximum, 1 / the sum, and an unused number."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct RelPosAttentionBwdQueryParams {
    pub qkv: device_ptr,
    pub tables: [device_ptr; 2usize],
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
        [::std::mem::size_of::<RelPosAttentionBwdQueryParams>() - 152usize];
    ["Alignment of RelPosAttentionBwdQueryParams"]
        [::std::mem::align_of::<RelPosAttentionBwdQueryParams>() - 8usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::qkv"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, qkv) - 0usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::tables"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, tables) - 8usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::pad"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, pad) - 24usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::out"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, out) - 32usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::lse"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, lse) - 40usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::dout"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, dout) - 48usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::dqkv"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, dqkv) - 56usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::bias"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, bias) - 64usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::delta"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, delta) - 72usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::table_partials"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, table_partials) - 80usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::items"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, items) - 88usize];
    ["Offset of field: RelPosAttentionBwdQueryParams::shape"]
        [::std::mem::offset_of!(RelPosAttentionBwdQueryParams, shape) - 96usize];
};
#[doc = " The key pass: dk and dv into dqkv. `pad_partials` is 0 or f32 `[windows, key tiles, 3, heads, head_dim]`, the sums\n over a tile's keys outside the grid."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
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
#[doc = " As RelPosAttentionBwdQueryParams, with maps of qkv and dout as grids and of the tables as they lie."]
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct RelPosAttentionBwdQuerySm90Params {
    pub qkv_maps: PanelMaps,
    pub dout_maps: PanelMaps,
    pub table_maps: [PanelMaps; 2usize],
    pub tables: [device_ptr; 2usize],
    pub out: device_ptr,
    pub lse: device_ptr,
    pub dout: device_ptr,
    pub dqkv: device_ptr,
    pub bias: device_ptr,
    pub delta: device_ptr,
    pub table_partials: device_ptr,
    pub items: u64,
    pub shape: RelPosAttentionShape,
    pub unused: [u64; 7usize],
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RelPosAttentionBwdQuerySm90Params"]
        [::std::mem::size_of::<RelPosAttentionBwdQuerySm90Params>() - 1216usize];
    ["Alignment of RelPosAttentionBwdQuerySm90Params"]
        [::std::mem::align_of::<RelPosAttentionBwdQuerySm90Params>() - 64usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::qkv_maps"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, qkv_maps) - 0usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::dout_maps"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, dout_maps) - 256usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::table_maps"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, table_maps) - 512usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::tables"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, tables) - 1024usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::out"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, out) - 1040usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::lse"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, lse) - 1048usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::dout"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, dout) - 1056usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::dqkv"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, dqkv) - 1064usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::bias"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, bias) - 1072usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::delta"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, delta) - 1080usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::table_partials"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, table_partials) - 1088usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::items"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, items) - 1096usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::shape"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, shape) - 1104usize];
    ["Offset of field: RelPosAttentionBwdQuerySm90Params::unused"]
        [::std::mem::offset_of!(RelPosAttentionBwdQuerySm90Params, unused) - 1160usize];
};
impl Default for RelPosAttentionBwdQuerySm90Params {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = " Maps of qkv as grids for the keys, and as `[batch, tokens, 3 heads head_dim]`, like dout, for the queries; of what\n the query pass left: of its `bias` a key tile's columns and its rows, and `delta`."]
#[repr(C)]
#[repr(align(64))]
#[derive(Debug, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct RelPosAttentionBwdKeySm90Params {
    pub key_maps: PanelMaps,
    pub query_maps: PanelMaps,
    pub dout_maps: PanelMaps,
    pub rel_w_map: EncodedTensorMap,
    pub rel_h_map: EncodedTensorMap,
    pub delta_map: EncodedTensorMap,
    pub dqkv: device_ptr,
    pub shape: RelPosAttentionShape,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of RelPosAttentionBwdKeySm90Params"]
        [::std::mem::size_of::<RelPosAttentionBwdKeySm90Params>() - 1216usize];
    ["Alignment of RelPosAttentionBwdKeySm90Params"]
        [::std::mem::align_of::<RelPosAttentionBwdKeySm90Params>() - 64usize];
    ["Offset of field: RelPosAttentionBwdKeySm90Params::key_maps"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeySm90Params, key_maps) - 0usize];
    ["Offset of field: RelPosAttentionBwdKeySm90Params::query_maps"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeySm90Params, query_maps) - 256usize];
    ["Offset of field: RelPosAttentionBwdKeySm90Params::dout_maps"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeySm90Params, dout_maps) - 512usize];
    ["Offset of field: RelPosAttentionBwdKeySm90Params::rel_w_map"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeySm90Params, rel_w_map) - 768usize];
    ["Offset of field: RelPosAttentionBwdKeySm90Params::rel_h_map"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeySm90Params, rel_h_map) - 896usize];
    ["Offset of field: RelPosAttentionBwdKeySm90Params::delta_map"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeySm90Params, delta_map) - 1024usize];
    ["Offset of field: RelPosAttentionBwdKeySm90Params::dqkv"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeySm90Params, dqkv) - 1152usize];
    ["Offset of field: RelPosAttentionBwdKeySm90Params::shape"]
        [::std::mem::offset_of!(RelPosAttentionBwdKeySm90Params, shape) - 1160usize];
};
impl Default for RelPosAttentionBwdKeySm90Params {
    fn default() -> Self {
        let mut s = ::std::mem::MaybeUninit::<Self>::uninit();
        unsafe {
            ::std::ptr::write_bytes(s.as_mut_ptr(), 0, 1);
            s.assume_init()
        }
    }
}
#[doc = " Attention of `queries` tokens to `keys` tokens in each of `batch` entries; of q there is a single one if `shared_q`.\n The tiles of keys, or of queries in the key pass, are split over the blocks in y: `split_tiles` for each."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct MultiHeadShape {
    pub batch: u32,
    pub shared_q: u32,
    pub queries: u32,
    pub keys: u32,
    pub num_heads: u32,
    pub head_dim: u32,
    pub softmax_scale: f32,
    pub split_tiles: u32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of MultiHeadShape"][::std::mem::size_of::<MultiHeadShape>() - 32usize];
    ["Alignment of MultiHeadShape"][::std::mem::align_of::<MultiHeadShape>() - 4usize];
    ["Offset of field: MultiHeadShape::batch"]
        [::std::mem::offset_of!(MultiHeadShape, batch) - 0usize];
    ["Offset of field: MultiHeadShape::shared_q"]
        [::std::mem::offset_of!(MultiHeadShape, shared_q) - 4usize];
    ["Offset of field: MultiHeadShape::queries"]
        [::std::mem::offset_of!(MultiHeadShape, queries) - 8usize];
    ["Offset of field: MultiHeadShape::keys"]
        [::std::mem::offset_of!(MultiHeadShape, keys) - 12usize];
    ["Offset of field: MultiHeadShape::num_heads"]
        [::std::mem::offset_of!(MultiHeadShape, num_heads) - 16usize];
    ["Offset of field: MultiHeadShape::head_dim"]
        [::std::mem::offset_of!(MultiHeadShape, head_dim) - 20usize];
    ["Offset of field: MultiHeadShape::softmax_scale"]
        [::std::mem::offset_of!(MultiHeadShape, softmax_scale) - 24usize];
    ["Offset of field: MultiHeadShape::split_tiles"]
        [::std::mem::offset_of!(MultiHeadShape, split_tiles) - 28usize];
};
#[doc = " `q [batch or 1, queries, heads, head_dim]`, `k` and `v [batch, keys, heads, head_dim]`; `out [batch, queries, heads,\n head_dim]`. For a backward also `statistics` f32 `[batch, heads, queries, 2]`, the maximum in base 2 and the sum, and\n `exact`, out in f32; else 0. With `splits` > 1 a block leaves its sum, maximum and sum of weights, `partials` f32\n `[splits, batch, heads, queries, head_dim + 2]`, and the combining kernel writes the rest."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct MultiHeadFwdParams {
    pub q: device_ptr,
    pub k: device_ptr,
    pub v: device_ptr,
    pub out: device_ptr,
    pub statistics: device_ptr,
    pub exact: device_ptr,
    pub partials: device_ptr,
    pub splits: u64,
    pub shape: MultiHeadShape,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of MultiHeadFwdParams"][::std::mem::size_of::<MultiHeadFwdParams>() - 96usize];
    ["Alignment of MultiHeadFwdParams"][::std::mem::align_of::<MultiHeadFwdParams>() - 8usize];
    ["Offset of field: MultiHeadFwdParams::q"]
        [::std::mem::offset_of!(MultiHeadFwdParams, q) - 0usize];
    ["Offset of field: MultiHeadFwdParams::k"]
        [::std::mem::offset_of!(MultiHeadFwdParams, k) - 8usize];
    ["Offset of field: MultiHeadFwdParams::v"]
        [::std::mem::offset_of!(MultiHeadFwdParams, v) - 16usize];
    ["Offset of field: MultiHeadFwdParams::out"]
        [::std::mem::offset_of!(MultiHeadFwdParams, out) - 24usize];
    ["Offset of field: MultiHeadFwdParams::statistics"]
        [::std::mem::offset_of!(MultiHeadFwdParams, statistics) - 32usize];
    ["Offset of field: MultiHeadFwdParams::exact"]
        [::std::mem::offset_of!(MultiHeadFwdParams, exact) - 40usize];
    ["Offset of field: MultiHeadFwdParams::partials"]
        [::std::mem::offset_of!(MultiHeadFwdParams, partials) - 48usize];
    ["Offset of field: MultiHeadFwdParams::splits"]
        [::std::mem::offset_of!(MultiHeadFwdParams, splits) - 56usize];
    ["Offset of field: MultiHeadFwdParams::shape"]
        [::std::mem::offset_of!(MultiHeadFwdParams, shape) - 64usize];
};
#[doc = " Numbers of a row of weights for both passes of the backward, `rows` f32 `[batch, heads, queries, 4]`: the maximum in\n base 2, 1 / the sum, `dout . out`, and one that is not used. `exact` is 0 if `out` is exact itself."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct MultiHeadBwdRowsParams {
    pub out: device_ptr,
    pub exact: device_ptr,
    pub dout: device_ptr,
    pub statistics: device_ptr,
    pub rows: device_ptr,
    pub shape: MultiHeadShape,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of MultiHeadBwdRowsParams"][::std::mem::size_of::<MultiHeadBwdRowsParams>() - 72usize];
    ["Alignment of MultiHeadBwdRowsParams"]
        [::std::mem::align_of::<MultiHeadBwdRowsParams>() - 8usize];
    ["Offset of field: MultiHeadBwdRowsParams::out"]
        [::std::mem::offset_of!(MultiHeadBwdRowsParams, out) - 0usize];
    ["Offset of field: MultiHeadBwdRowsParams::exact"]
        [::std::mem::offset_of!(MultiHeadBwdRowsParams, exact) - 8usize];
    ["Offset of field: MultiHeadBwdRowsParams::dout"]
        [::std::mem::offset_of!(MultiHeadBwdRowsParams, dout) - 16usize];
    ["Offset of field: MultiHeadBwdRowsParams::statistics"]
        [::std::mem::offset_of!(MultiHeadBwdRowsParams, statistics) - 24usize];
    ["Offset of field: MultiHeadBwdRowsParams::rows"]
        [::std::mem::offset_of!(MultiHeadBwdRowsParams, rows) - 32usize];
    ["Offset of field: MultiHeadBwdRowsParams::shape"]
        [::std::mem::offset_of!(MultiHeadBwdRowsParams, shape) - 40usize];
};
#[doc = " The query pass writes dq, the key pass dk and dv. With `split_stride` > 0 they are f32, and those of the splits lie\n so many elements apart."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct MultiHeadBwdParams {
    pub q: device_ptr,
    pub k: device_ptr,
    pub v: device_ptr,
    pub dout: device_ptr,
    pub rows: device_ptr,
    pub grads: [device_ptr; 2usize],
    pub split_stride: u64,
    pub shape: MultiHeadShape,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of MultiHeadBwdParams"][::std::mem::size_of::<MultiHeadBwdParams>() - 96usize];
    ["Alignment of MultiHeadBwdParams"][::std::mem::align_of::<MultiHeadBwdParams>() - 8usize];
    ["Offset of field: MultiHeadBwdParams::q"]
        [::std::mem::offset_of!(MultiHeadBwdParams, q) - 0usize];
    ["Offset of field: MultiHeadBwdParams::k"]
        [::std::mem::offset_of!(MultiHeadBwdParams, k) - 8usize];
    ["Offset of field: MultiHeadBwdParams::v"]
        [::std::mem::offset_of!(MultiHeadBwdParams, v) - 16usize];
    ["Offset of field: MultiHeadBwdParams::dout"]
        [::std::mem::offset_of!(MultiHeadBwdParams, dout) - 24usize];
    ["Offset of field: MultiHeadBwdParams::rows"]
        [::std::mem::offset_of!(MultiHeadBwdParams, rows) - 32usize];
    ["Offset of field: MultiHeadBwdParams::grads"]
        [::std::mem::offset_of!(MultiHeadBwdParams, grads) - 40usize];
    ["Offset of field: MultiHeadBwdParams::split_stride"]
        [::std::mem::offset_of!(MultiHeadBwdParams, split_stride) - 56usize];
    ["Offset of field: MultiHeadBwdParams::shape"]
        [::std::mem::offset_of!(MultiHeadBwdParams, shape) - 64usize];
};
#[doc = " `out [size] = sum over parts of partials [parts, size]`, in order; partials are f32."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
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
#[doc = " A parameter of `size` elements, with its gradient and moments in f32. `first_chunk` counts the chunks of the tensors\n before it. A step multiplies it by `decay` and subtracts `rate` times its direction. All that differs from step to\n step is in this table, so a graph of the kernels makes every step."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct AdamWTensor {
    pub parameter: device_ptr,
    pub gradient: device_ptr,
    pub exp_avg: device_ptr,
    pub exp_avg_sq: device_ptr,
    pub size: u64,
    pub first_chunk: u32,
    pub dtype: u32,
    pub decay: f32,
    pub rate: f32,
    pub root_correction: f32,
    pub eps: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AdamWTensor"][::std::mem::size_of::<AdamWTensor>() - 64usize];
    ["Alignment of AdamWTensor"][::std::mem::align_of::<AdamWTensor>() - 8usize];
    ["Offset of field: AdamWTensor::parameter"]
        [::std::mem::offset_of!(AdamWTensor, parameter) - 0usize];
    ["Offset of field: AdamWTensor::gradient"]
        [::std::mem::offset_of!(AdamWTensor, gradient) - 8usize];
    ["Offset of field: AdamWTensor::exp_avg"]
        [::std::mem::offset_of!(AdamWTensor, exp_avg) - 16usize];
    ["Offset of field: AdamWTensor::exp_avg_sq"]
        [::std::mem::offset_of!(AdamWTensor, exp_avg_sq) - 24usize];
    ["Offset of field: AdamWTensor::size"][::std::mem::offset_of!(AdamWTensor, size) - 32usize];
    ["Offset of field: AdamWTensor::first_chunk"]
        [::std::mem::offset_of!(AdamWTensor, first_chunk) - 40usize];
    ["Offset of field: AdamWTensor::dtype"][::std::mem::offset_of!(AdamWTensor, dtype) - 44usize];
    ["Offset of field: AdamWTensor::decay"][::std::mem::offset_of!(AdamWTensor, decay) - 48usize];
    ["Offset of field: AdamWTensor::rate"][::std::mem::offset_of!(AdamWTensor, rate) - 52usize];
    ["Offset of field: AdamWTensor::root_correction"]
        [::std::mem::offset_of!(AdamWTensor, root_correction) - 56usize];
    ["Offset of field: AdamWTensor::eps"][::std::mem::offset_of!(AdamWTensor, eps) - 60usize];
};
#[doc = " A step of AdamW over all tensors of a table. `partials` f32 `[chunks]`: sums of the squared gradients. `loss` is an\n f32 or 0. `outcome` f32 `[4]` has the norm of all gradients first. The second is 0, or says which tensor, from 1, has\n the first gradient that is not finite. The third is the loss. The fourth is the factor of the gradients: NaN if\n nothing may change."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct AdamWParams {
    pub tensors: device_ptr,
    pub partials: device_ptr,
    pub loss: device_ptr,
    pub outcome: device_ptr,
    pub tensor_count: u32,
    pub chunks: u32,
    pub max_norm: f32,
    pub beta1_rest: f32,
    pub beta2: f32,
    pub beta2_rest: f32,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of AdamWParams"][::std::mem::size_of::<AdamWParams>() - 56usize];
    ["Alignment of AdamWParams"][::std::mem::align_of::<AdamWParams>() - 8usize];
    ["Offset of field: AdamWParams::tensors"]
        [::std::mem::offset_of!(AdamWParams, tensors) - 0usize];
    ["Offset of field: AdamWParams::partials"]
        [::std::mem::offset_of!(AdamWParams, partials) - 8usize];
    ["Offset of field: AdamWParams::loss"][::std::mem::offset_of!(AdamWParams, loss) - 16usize];
    ["Offset of field: AdamWParams::outcome"]
        [::std::mem::offset_of!(AdamWParams, outcome) - 24usize];
    ["Offset of field: AdamWParams::tensor_count"]
        [::std::mem::offset_of!(AdamWParams, tensor_count) - 32usize];
    ["Offset of field: AdamWParams::chunks"][::std::mem::offset_of!(AdamWParams, chunks) - 36usize];
    ["Offset of field: AdamWParams::max_norm"]
        [::std::mem::offset_of!(AdamWParams, max_norm) - 40usize];
    ["Offset of field: AdamWParams::beta1_rest"]
        [::std::mem::offset_of!(AdamWParams, beta1_rest) - 44usize];
    ["Offset of field: AdamWParams::beta2"][::std::mem::offset_of!(AdamWParams, beta2) - 48usize];
    ["Offset of field: AdamWParams::beta2_rest"]
        [::std::mem::offset_of!(AdamWParams, beta2_rest) - 52usize];
};
#[doc = " The `kernel x kernel` neighbourhood of every position of x `[batch, h, w, channels]`, or of one in each `stride x\n stride`, zero outside: columns `[batch, rows, cols, kernel, kernel, channels]`. The backward makes the gradient x of\n that of columns. `vectors` of channels, or `channels` single ones; `count` of what is made."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct ConvColumnsParams {
    pub x: device_ptr,
    pub columns: device_ptr,
    pub h: u32,
    pub w: u32,
    pub channels: u32,
    pub rows: u32,
    pub cols: u32,
    pub kernel: u32,
    pub stride: u32,
    pub vectors: u32,
    pub count: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ConvColumnsParams"][::std::mem::size_of::<ConvColumnsParams>() - 56usize];
    ["Alignment of ConvColumnsParams"][::std::mem::align_of::<ConvColumnsParams>() - 8usize];
    ["Offset of field: ConvColumnsParams::x"]
        [::std::mem::offset_of!(ConvColumnsParams, x) - 0usize];
    ["Offset of field: ConvColumnsParams::columns"]
        [::std::mem::offset_of!(ConvColumnsParams, columns) - 8usize];
    ["Offset of field: ConvColumnsParams::h"]
        [::std::mem::offset_of!(ConvColumnsParams, h) - 16usize];
    ["Offset of field: ConvColumnsParams::w"]
        [::std::mem::offset_of!(ConvColumnsParams, w) - 20usize];
    ["Offset of field: ConvColumnsParams::channels"]
        [::std::mem::offset_of!(ConvColumnsParams, channels) - 24usize];
    ["Offset of field: ConvColumnsParams::rows"]
        [::std::mem::offset_of!(ConvColumnsParams, rows) - 28usize];
    ["Offset of field: ConvColumnsParams::cols"]
        [::std::mem::offset_of!(ConvColumnsParams, cols) - 32usize];
    ["Offset of field: ConvColumnsParams::kernel"]
        [::std::mem::offset_of!(ConvColumnsParams, kernel) - 36usize];
    ["Offset of field: ConvColumnsParams::stride"]
        [::std::mem::offset_of!(ConvColumnsParams, stride) - 40usize];
    ["Offset of field: ConvColumnsParams::vectors"]
        [::std::mem::offset_of!(ConvColumnsParams, vectors) - 44usize];
    ["Offset of field: ConvColumnsParams::count"]
        [::std::mem::offset_of!(ConvColumnsParams, count) - 48usize];
};
#[doc = " A vector, and where it ends in `out`, in elements."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct ConcatPart {
    pub from: device_ptr,
    pub end: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ConcatPart"][::std::mem::size_of::<ConcatPart>() - 16usize];
    ["Alignment of ConcatPart"][::std::mem::align_of::<ConcatPart>() - 8usize];
    ["Offset of field: ConcatPart::from"][::std::mem::offset_of!(ConcatPart, from) - 0usize];
    ["Offset of field: ConcatPart::end"][::std::mem::offset_of!(ConcatPart, end) - 8usize];
};
#[doc = " `out` is all parts in a row; the last one that is used ends at `size`."]
#[repr(C)]
#[derive(Debug, Default, Copy, Clone, bytemuck :: Pod, bytemuck :: Zeroable)]
pub struct ConcatParams {
    pub parts: [ConcatPart; 8usize],
    pub out: device_ptr,
    pub size: u64,
}
#[allow(clippy::unnecessary_operation, clippy::identity_op)]
const _: () = {
    ["Size of ConcatParams"][::std::mem::size_of::<ConcatParams>() - 144usize];
    ["Alignment of ConcatParams"][::std::mem::align_of::<ConcatParams>() - 8usize];
    ["Offset of field: ConcatParams::parts"][::std::mem::offset_of!(ConcatParams, parts) - 0usize];
    ["Offset of field: ConcatParams::out"][::std::mem::offset_of!(ConcatParams, out) - 128usize];
    ["Offset of field: ConcatParams::size"][::std::mem::offset_of!(ConcatParams, size) - 136usize];
};

/// Where what a launch fills stands in a params struct: the offsets of its addresses, and of its dropout masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots {
    pub addresses: &'static [usize],
    pub masks: &'static [usize],
}

/// A kernel's params struct.
pub trait Params: bytemuck::NoUninit {
    const SLOTS: Slots;
}

impl Params for DropoutParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8], masks: &[28] };
}
impl Params for LayerNormFwdParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24], masks: &[] };
}
impl Params for LayerNormBwdParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24, 32, 40], masks: &[] };
}
impl Params for LayerNormBwdWeightParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24], masks: &[] };
}
impl Params for ProjectionParams {
    const SLOTS: Slots = Slots {
        addresses: &[
            0, 8, 16, 24, 32, 64, 72, 80, 88, 96, 152, 160, 168, 176, 184, 240, 248, 256, 264, 272,
        ],
        masks: &[132, 220, 308],
    };
}
impl Params for ProjectionFwdSm90Params {
    const SLOTS: Slots = Slots {
        addresses: &[
            2432, 2440, 2448, 2456, 2464, 2496, 2504, 2512, 2520, 2528, 2584, 2592, 2600, 2608,
            2616, 2672, 2680, 2688, 2696, 2704,
        ],
        masks: &[2564, 2652, 2740],
    };
}
impl Params for ProjectionBwdInputSm90Params {
    const SLOTS: Slots = Slots {
        addresses: &[
            896, 904, 912, 920, 928, 960, 968, 976, 984, 992, 1048, 1056, 1064, 1072, 1080, 1136,
            1144, 1152, 1160, 1168,
        ],
        masks: &[1028, 1116, 1204],
    };
}
impl Params for LowRankParams {
    const SLOTS: Slots =
        Slots { addresses: &[0, 8, 16, 80, 88, 96, 160, 168, 176], masks: &[60, 140, 220] };
}
impl Params for ActivationGradParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16], masks: &[] };
}
impl Params for BiasGradParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 32, 40, 64, 72, 96], masks: &[] };
}
impl Params for DoraNormParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24], masks: &[] };
}
impl Params for RelPosAttentionFwdParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24, 32, 40], masks: &[84] };
}
impl Params for RelPosAttentionFwdSm90Params {
    const SLOTS: Slots = Slots { addresses: &[768, 776, 784, 792, 800], masks: &[844] };
}
impl Params for RelPosAttentionWindowFwdParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24, 32, 40], masks: &[92] };
}
impl Params for RelPosAttentionWindowBwdParams {
    const SLOTS: Slots =
        Slots { addresses: &[0, 8, 16, 24, 32, 40, 48, 56, 64, 72], masks: &[124] };
}
impl Params for RelPosAttentionBwdQueryParams {
    const SLOTS: Slots =
        Slots { addresses: &[0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80], masks: &[132] };
}
impl Params for RelPosAttentionBwdKeyParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24, 32, 40, 48], masks: &[92] };
}
impl Params for RelPosAttentionBwdQuerySm90Params {
    const SLOTS: Slots = Slots {
        addresses: &[1024, 1032, 1040, 1048, 1056, 1064, 1072, 1080, 1088],
        masks: &[1140],
    };
}
impl Params for RelPosAttentionBwdKeySm90Params {
    const SLOTS: Slots = Slots { addresses: &[1152], masks: &[1196] };
}
impl Params for MultiHeadFwdParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24, 32, 40, 48], masks: &[] };
}
impl Params for MultiHeadBwdRowsParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24, 32], masks: &[] };
}
impl Params for MultiHeadBwdParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24, 32, 40, 48], masks: &[] };
}
impl Params for SumPartialsParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8], masks: &[] };
}
impl Params for AdamWParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8, 16, 24], masks: &[] };
}
impl Params for ConvColumnsParams {
    const SLOTS: Slots = Slots { addresses: &[0, 8], masks: &[] };
}
impl Params for ConcatParams {
    const SLOTS: Slots = Slots { addresses: &[0, 16, 32, 48, 64, 80, 96, 112, 128], masks: &[] };
}
