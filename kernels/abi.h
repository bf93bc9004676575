/* The interface between host and kernels: one plain struct per kernel family, and the constants that both sides need.
 *
 * nvcc, the host compiler (emulator) and, through bindgen, Rust read this file, so the three cannot drift.
 * scripts/bindings.sh writes src/launch/bindings.rs from it. The rules:
 *
 * - Only <stdint.h>.
 * - No padding in a struct, not even at its end. Rust checks that.
 * - Every struct has its size asserted here.
 */
#ifndef CANDLE_SAM_LORA_ABI_H
#define CANDLE_SAM_LORA_ABI_H

#include <stdint.h>

#ifdef __cplusplus
#define ABI_SIZE(type, bytes) static_assert(sizeof(type) == (bytes), #type)
#else
#define ABI_SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), #type)
#endif

/** An address in device memory. */
typedef uint64_t device_ptr;

/** How a tensor lies in memory and which tile of it is copied at once, encoded by the driver
 * (src/launch/tensor_map.rs). */
typedef struct EncodedTensorMap {
  uint64_t opaque[16];
} __attribute__((aligned(64))) EncodedTensorMap;
ABI_SIZE(EncodedTensorMap, 128);

/** Added to a mask's threshold: its seed lies in device memory, where each replay of a graph finds another one. */
#define DROPOUT_SEED_AT 0x10000

/** Where a dropout mask lies (see philox.cuh): seed and stream address it, an element is kept if its 16 bits are at
 * least `threshold`, and multiplied by `scale`. No dropout is threshold 0 and scale 1. With DROPOUT_SEED_AT in the
 * threshold, the seed's words are its address. The attention's kernels take no such mask. */
typedef struct DropoutMask {
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t stream;
  uint32_t threshold;
  float scale;
} DropoutMask;
ABI_SIZE(DropoutMask, 20);

/** Threads of a block of the dropout kernel. */
#define DROPOUT_THREADS 256

/** `y = x * mask`, all `[rows, cols]`. */
typedef struct DropoutParams {
  device_ptr x;
  device_ptr y;
  uint64_t rows;
  uint32_t cols;
  DropoutMask mask;
} DropoutParams;
ABI_SIZE(DropoutParams, 48);

/** Threads of a block of the row-wise LayerNorm kernels: one warp a row. */
#define LAYER_NORM_THREADS 128

/** `y = (x - mean) rstd weight + bias` of each row of `x [rows, size]`. */
typedef struct LayerNormFwdParams {
  device_ptr x;
  device_ptr weight;
  device_ptr bias;
  device_ptr y;
  uint64_t rows;
  uint32_t size;
  float eps;
} LayerNormFwdParams;
ABI_SIZE(LayerNormFwdParams, 48);

/** The gradient of x, plus `residual`, the gradient of what is added to y, if it is not 0. The rows' statistics for the
 * column pass: `[3, rows]` f32, mean high, mean low, rstd; 0 if they are not wanted. */
typedef struct LayerNormBwdParams {
  device_ptr x;
  device_ptr weight;
  device_ptr dy;
  device_ptr residual;
  device_ptr dx;
  device_ptr statistics;
  uint64_t rows;
  uint32_t size;
  float eps;
} LayerNormBwdParams;
ABI_SIZE(LayerNormBwdParams, 64);

/** The column pass: a block of 32 x LAYER_NORM_COLUMN_WARPS threads sums 32 columns over LAYER_NORM_COLUMN_ROWS
 * rows. */
#define LAYER_NORM_COLUMN_WARPS 8
#define LAYER_NORM_COLUMN_ROWS 256
#define LAYER_NORM_COLUMN_SHARED_BYTES 2048

/** Partial sums of the gradients of weight and bias: `partials [2, ceil(rows / LAYER_NORM_COLUMN_ROWS), size]` f32. */
typedef struct LayerNormBwdWeightParams {
  device_ptr x;
  device_ptr dy;
  device_ptr statistics;
  device_ptr partials;
  uint64_t rows;
  uint64_t size;
} LayerNormBwdWeightParams;
ABI_SIZE(LayerNormBwdWeightParams, 48);

/** Most projections that share an input: q, k and v. */
#define PROJECTION_PARTS 3

/** One of the projections that share an input. Weight `[out_dim, in_dim]` is of the kernel's dtype, the small tensors
 * are f32: bias `[out_dim]`, a `[rank, in_dim]`, b `[out_dim, rank]`, lora_bias `[out_dim]`; the biases are of the
 * kernel's dtype if `bias_typed`, `lora_bias_typed`. Its columns of packed tensors start at `column`, those of S at
 * `s_column`. Without LoRA the rank is 0. */
typedef struct ProjectionPart {
  device_ptr weight;
  device_ptr bias;
  device_ptr a;
  device_ptr b;
  device_ptr lora_bias;
  uint32_t out_dim;
  uint32_t column;
  uint32_t rank;
  uint32_t s_column;
  uint32_t bias_typed;
  uint32_t lora_bias_typed;
  float scaling;
  DropoutMask mask;
} ProjectionPart;
ABI_SIZE(ProjectionPart, 88);

/** The activation of a projection's sum. */
#define ACTIVATION_IDENTITY 0
#define ACTIVATION_GELU 1
#define ACTIVATION_RELU 2

/** `out = act(cat_p (left W_p^T + low_rank_p b_p^T + constants)) + residual` in the forward (left is x `[rows,
 * in_dim]`, low_rank is S, out is `[rows, total]`); `out = sum_p (left_p W_p + mask_p(low_rank_p a_p))` in the backward
 * (left is the gradient `[rows, total]`, low_rank is dS, out is `[rows, in_dim]`). S and dS are `[rows, s_stride]`,
 * f32, and carry `scaling`. `sum`, if wanted, is what `act` is applied to. */
typedef struct ProjectionParams {
  device_ptr left;
  device_ptr low_rank;
  device_ptr residual;
  device_ptr sum;
  device_ptr out;
  uint32_t rows;
  uint32_t in_dim;
  uint32_t total;
  uint32_t s_stride;
  uint32_t column_tiles;
  uint32_t activation;
  ProjectionPart parts[PROJECTION_PARTS];
} ProjectionParams;
ABI_SIZE(ProjectionParams, 328);

/** The forward on Hopper: tensor maps of x, and of each projection's weight, S, b and columns of the packed tensors, in
 * the tiles of the kernel; those of absent tensors are zero. `tiles` is the number of tiles. */
typedef struct ProjectionFwdSm90Params {
  EncodedTensorMap x;
  EncodedTensorMap weight[PROJECTION_PARTS];
  EncodedTensorMap low_rank[PROJECTION_PARTS];
  EncodedTensorMap b[PROJECTION_PARTS];
  EncodedTensorMap residual[PROJECTION_PARTS];
  EncodedTensorMap sum[PROJECTION_PARTS];
  EncodedTensorMap out[PROJECTION_PARTS];
  ProjectionParams problem;
  uint64_t tiles;
  uint64_t reserved[6];
} ProjectionFwdSm90Params;
ABI_SIZE(ProjectionFwdSm90Params, 2816);

/** The gradient of x on Hopper: tensor maps of each projection's columns of the gradient and weight, and of dx; those
 * of absent tensors are zero. */
typedef struct ProjectionBwdInputSm90Params {
  EncodedTensorMap g[PROJECTION_PARTS];
  EncodedTensorMap weight[PROJECTION_PARTS];
  EncodedTensorMap dx;
  ProjectionParams problem;
  uint64_t tiles;
  uint64_t reserved[6];
} ProjectionBwdInputSm90Params;
ABI_SIZE(ProjectionBwdInputSm90Params, 1280);

/** Threads of a block of the projection kernels on Hopper: three warpgroups. */
#define PROJECTION_SM90_THREADS 384

/** One product with a thin f32 side: `out(i, j) = scale * sum over k of mask(left)(i, k) right(k, j)`. How i, k and j
 * lie in memory is the kernel's (low_rank/low_rank.cuh). Columns j up to `out_j >= size_j` are written, as zeros. */
typedef struct LowRankPart {
  device_ptr left;
  device_ptr right;
  device_ptr out;
  uint32_t size_i;
  uint32_t size_j;
  uint32_t out_j;
  uint32_t depth;
  uint32_t left_stride;
  uint32_t right_stride;
  uint32_t out_stride_i;
  uint32_t out_stride_j;
  float scale;
  DropoutMask mask;
} LowRankPart;
ABI_SIZE(LowRankPart, 80);

/** The products of all parts; each is split along its depth into `splits` of `split_depth`, whose results lie
 * `split_stride` elements apart. */
typedef struct LowRankParams {
  LowRankPart parts[PROJECTION_PARTS];
  uint64_t split_stride;
  uint32_t splits;
  uint32_t split_depth;
} LowRankParams;
ABI_SIZE(LowRankParams, 256);

#define LOW_RANK_THREADS 128

#define ACTIVATION_GRAD_THREADS 256

/** `g = grad * act'(sum)` of `size` elements. */
typedef struct ActivationGradParams {
  device_ptr grad;
  device_ptr sum;
  device_ptr g;
  uint64_t size;
  uint64_t activation;
} ActivationGradParams;
ABI_SIZE(ActivationGradParams, 40);

/** Where the column sums of one part go: to `bias`, and times `scaling` to `lora_bias`; 0 where not wanted. */
typedef struct BiasGradPart {
  device_ptr bias;
  device_ptr lora_bias;
  uint32_t column;
  uint32_t out_dim;
  float scaling;
  uint32_t reserved;
} BiasGradPart;
ABI_SIZE(BiasGradPart, 32);

/** A block of 32 x BIAS_GRAD_WARPS threads sums 32 columns of `g [rows, total]` over `split_rows` rows; the sums of
 * blocks of rows lie `split_stride` f32 apart. */
typedef struct BiasGradParams {
  BiasGradPart parts[PROJECTION_PARTS];
  device_ptr g;
  uint64_t rows;
  uint64_t split_rows;
  uint64_t split_stride;
  uint64_t total;
} BiasGradParams;
ABI_SIZE(BiasGradParams, 136);

#define BIAS_GRAD_WARPS 8
#define BIAS_GRAD_SHARED_BYTES 1024

/** A block takes DORA_NORM_ROWS rows; most ranks that fit its shared memory. */
#define DORA_NORM_ROWS 8
#define DORA_NORM_THREADS 128
#define DORA_NORM_RANK 256
#define DORA_NORM_SHARED_BYTES 8320

/** `norm [out_dim] = || W + scaling b a ||` of each row; weight `[out_dim, in_dim]` of the kernel's dtype, a
 * `[rank, in_dim]`, b `[out_dim, rank]` and norm f32. */
typedef struct DoraNormParams {
  device_ptr weight;
  device_ptr a;
  device_ptr b;
  device_ptr norm;
  uint32_t out_dim;
  uint32_t in_dim;
  uint32_t rank;
  float scaling;
} DoraNormParams;
ABI_SIZE(DoraNormParams, 48);

/** Attention over grids of `h x w` tokens in windows of `side_h x side_w`, `window_rows x window_cols` of them; of no
 * dropout the threshold is 0. */
typedef struct RelPosAttentionShape {
  uint32_t h;
  uint32_t w;
  uint32_t side_h;
  uint32_t side_w;
  uint32_t window_rows;
  uint32_t window_cols;
  uint32_t num_heads;
  uint32_t head_dim;
  float softmax_scale;
  DropoutMask dropout;
} RelPosAttentionShape;
ABI_SIZE(RelPosAttentionShape, 56);

/** `qkv [batch, h, w, 3, heads, head_dim]`, `tables` rel_pos_h `[2 side_h - 1, head_dim]` and rel_pos_w `[2 side_w - 1,
 * head_dim]` or 0, `pad [3, heads, head_dim]` or 0; out `[batch, h, w, heads, head_dim]`, lse f32
 * `[windows, heads, tokens]`, tokens on the grid first. With f32 operands it is `[windows, heads, tokens, 2]`, the
 * maximum in base 2 and the sum. */
typedef struct RelPosAttentionFwdParams {
  device_ptr qkv;
  device_ptr tables[2];
  device_ptr pad;
  device_ptr out;
  device_ptr lse;
  RelPosAttentionShape shape;
} RelPosAttentionFwdParams;
ABI_SIZE(RelPosAttentionFwdParams, 104);

/** The kernels for whole grids on sm_90a: rows of both tables that a bulk copy brings. */
#define REL_POS_ATTENTION_SM90_TABLE_ROWS 64

/** Rows of channels for bulk copies: maps of the first 64 channels of a head and, if it has more, of the others. */
typedef struct PanelMaps {
  EncodedTensorMap wide;
  EncodedTensorMap tail;
} PanelMaps;
ABI_SIZE(PanelMaps, 256);

/** The forward on sm_90a: as RelPosAttentionFwdParams, with maps of qkv as `[batch, h, w, 3 heads head_dim]` and of the
 * tables as they lie. `tables` only says whether there are any. */
typedef struct RelPosAttentionFwdSm90Params {
  PanelMaps qkv_maps;
  PanelMaps table_maps[2];
  device_ptr tables[2];
  device_ptr pad;
  device_ptr out;
  device_ptr lse;
  RelPosAttentionShape shape;
  uint64_t unused[4];
} RelPosAttentionFwdSm90Params;
ABI_SIZE(RelPosAttentionFwdSm90Params, 896);

/** The windows' kernels for Hopper: sides up to SIDE, a warp for each row of the window; persistent blocks, one for
 * each multiprocessor. */
#define REL_POS_ATTENTION_WINDOW_SM90_SIDE 14
#define REL_POS_ATTENTION_WINDOW_SM90_THREADS 448

/** As RelPosAttentionFwdParams; the blocks take turns at `units`, windows x heads. */
typedef struct RelPosAttentionWindowFwdParams {
  device_ptr qkv;
  device_ptr tables[2];
  device_ptr pad;
  device_ptr out;
  device_ptr lse;
  uint64_t units;
  RelPosAttentionShape shape;
} RelPosAttentionWindowFwdParams;
ABI_SIZE(RelPosAttentionWindowFwdParams, 112);

/** The whole backward of windows: dqkv, and of each block its sums of the gradients of the tables, f32 `[blocks, rows
 * of the tables, head_dim]`, and of pad, `[blocks, 3, heads, head_dim]`; 0 where not wanted. */
typedef struct RelPosAttentionWindowBwdParams {
  device_ptr qkv;
  device_ptr tables[2];
  device_ptr pad;
  device_ptr out;
  device_ptr lse;
  device_ptr dout;
  device_ptr dqkv;
  device_ptr table_partials;
  device_ptr pad_partials;
  uint64_t units;
  RelPosAttentionShape shape;
} RelPosAttentionWindowBwdParams;
ABI_SIZE(RelPosAttentionWindowBwdParams, 144);

/** Key tiles of the backward's key pass: 8 key rows of 8 columns, each warp two rows; queries come in blocks. */
#define REL_POS_ATTENTION_KEY_SIDE 8
#define REL_POS_ATTENTION_KEY_WARPS 4

/** The query pass: dq into dqkv, and for the key pass `delta` f32 `[units, tokens]` and `bias` f32 `[units, tokens,
 * side_h + side_w]`, each side rounded up to 8. Units are windows x heads. `table_partials` is 0 or f32 `[blocks of the
 * launch, rows of the tables, head_dim]`; `items` are the blocks of queries. With f32 operands `delta` is `[units,
 * tokens, 4]`: delta, the maximum, 1 / the sum, and an unused number. */
typedef struct RelPosAttentionBwdQueryParams {
  device_ptr qkv;
  device_ptr tables[2];
  device_ptr pad;
  device_ptr out;
  device_ptr lse;
  device_ptr dout;
  device_ptr dqkv;
  device_ptr bias;
  device_ptr delta;
  device_ptr table_partials;
  uint64_t items;
  RelPosAttentionShape shape;
} RelPosAttentionBwdQueryParams;
ABI_SIZE(RelPosAttentionBwdQueryParams, 152);

/** The key pass: dk and dv into dqkv. `pad_partials` is 0 or f32 `[windows, key tiles, 3, heads, head_dim]`, the sums
 * over a tile's keys outside the grid. */
typedef struct RelPosAttentionBwdKeyParams {
  device_ptr qkv;
  device_ptr pad;
  device_ptr dout;
  device_ptr bias;
  device_ptr delta;
  device_ptr dqkv;
  device_ptr pad_partials;
  RelPosAttentionShape shape;
} RelPosAttentionBwdKeyParams;
ABI_SIZE(RelPosAttentionBwdKeyParams, 112);

/** The backward on sm_90a, for whole grids. The key pass: threads and keys of a block, queries of a step. */
#define REL_POS_ATTENTION_SM90_BWD_KEY_THREADS 384
#define REL_POS_ATTENTION_SM90_BWD_KEYS 128
#define REL_POS_ATTENTION_SM90_BWD_KEY_QUERIES 64

/** As RelPosAttentionBwdQueryParams, with maps of qkv and dout as grids and of the tables as they lie. */
typedef struct RelPosAttentionBwdQuerySm90Params {
  PanelMaps qkv_maps;
  PanelMaps dout_maps;
  PanelMaps table_maps[2];
  device_ptr tables[2];
  device_ptr out;
  device_ptr lse;
  device_ptr dout;
  device_ptr dqkv;
  device_ptr bias;
  device_ptr delta;
  device_ptr table_partials;
  uint64_t items;
  RelPosAttentionShape shape;
  uint64_t unused[7];
} RelPosAttentionBwdQuerySm90Params;
ABI_SIZE(RelPosAttentionBwdQuerySm90Params, 1216);

/** Maps of qkv as grids for the keys, and as `[batch, tokens, 3 heads head_dim]`, like dout, for the queries; of what
 * the query pass left: of its `bias` a key tile's columns and its rows, and `delta`. */
typedef struct RelPosAttentionBwdKeySm90Params {
  PanelMaps key_maps;
  PanelMaps query_maps;
  PanelMaps dout_maps;
  EncodedTensorMap rel_w_map;
  EncodedTensorMap rel_h_map;
  EncodedTensorMap delta_map;
  device_ptr dqkv;
  RelPosAttentionShape shape;
} RelPosAttentionBwdKeySm90Params;
ABI_SIZE(RelPosAttentionBwdKeySm90Params, 1216);

/** Threads of a block of the sum over partials. */
#define SUM_PARTIALS_THREADS 256

/** Attention of `queries` tokens to `keys` tokens in each of `batch` entries; of q there is a single one if `shared_q`.
 * The tiles of keys, or of queries in the key pass, are split over the blocks in y: `split_tiles` for each. */
typedef struct MultiHeadShape {
  uint32_t batch;
  uint32_t shared_q;
  uint32_t queries;
  uint32_t keys;
  uint32_t num_heads;
  uint32_t head_dim;
  float softmax_scale;
  uint32_t split_tiles;
} MultiHeadShape;
ABI_SIZE(MultiHeadShape, 32);

#define MULTI_HEAD_THREADS 256

/** `q [batch or 1, queries, heads, head_dim]`, `k` and `v [batch, keys, heads, head_dim]`; `out [batch, queries, heads,
 * head_dim]`. For a backward also `statistics` f32 `[batch, heads, queries, 2]`, the maximum in base 2 and the sum, and
 * `exact`, out in f32; else 0. With `splits` > 1 a block leaves its sum, maximum and sum of weights, `partials` f32
 * `[splits, batch, heads, queries, head_dim + 2]`, and the combining kernel writes the rest. */
typedef struct MultiHeadFwdParams {
  device_ptr q;
  device_ptr k;
  device_ptr v;
  device_ptr out;
  device_ptr statistics;
  device_ptr exact;
  device_ptr partials;
  uint64_t splits;
  MultiHeadShape shape;
} MultiHeadFwdParams;
ABI_SIZE(MultiHeadFwdParams, 96);

/** Numbers of a row of weights for both passes of the backward, `rows` f32 `[batch, heads, queries, 4]`: the maximum in
 * base 2, 1 / the sum, `dout . out`, and one that is not used. `exact` is 0 if `out` is exact itself. */
typedef struct MultiHeadBwdRowsParams {
  device_ptr out;
  device_ptr exact;
  device_ptr dout;
  device_ptr statistics;
  device_ptr rows;
  MultiHeadShape shape;
} MultiHeadBwdRowsParams;
ABI_SIZE(MultiHeadBwdRowsParams, 72);

/** The query pass writes dq, the key pass dk and dv. With `split_stride` > 0 they are f32, and those of the splits lie
 * so many elements apart. */
typedef struct MultiHeadBwdParams {
  device_ptr q;
  device_ptr k;
  device_ptr v;
  device_ptr dout;
  device_ptr rows;
  device_ptr grads[2];
  uint64_t split_stride;
  MultiHeadShape shape;
} MultiHeadBwdParams;
ABI_SIZE(MultiHeadBwdParams, 96);

/** `out [size] = sum over parts of partials [parts, size]`, in order; partials are f32. */
typedef struct SumPartialsParams {
  device_ptr partials;
  device_ptr out;
  uint64_t parts;
  uint64_t size;
} SumPartialsParams;
ABI_SIZE(SumPartialsParams, 32);

/** A block of the kernels of AdamW takes ADAMW_CHUNK elements of one tensor. */
#define ADAMW_THREADS 256
#define ADAMW_CHUNK 2048
#define ADAMW_SHARED_BYTES 36
#define ADAMW_OUTCOME_SHARED_BYTES 3072

/** The dtype of a parameter. */
#define ADAMW_F32 0
#define ADAMW_F16 1
#define ADAMW_BF16 2

/** A parameter of `size` elements, with its gradient and moments in f32. `first_chunk` counts the chunks of the tensors
 * before it. A step multiplies it by `decay` and subtracts `rate` times its direction. All that differs from step to
 * step is in this table, so a graph of the kernels makes every step. */
typedef struct AdamWTensor {
  device_ptr parameter;
  device_ptr gradient;
  device_ptr exp_avg;
  device_ptr exp_avg_sq;
  uint64_t size;
  uint32_t first_chunk;
  uint32_t dtype;
  float decay;
  float rate;
  float root_correction;
  float eps;
} AdamWTensor;
ABI_SIZE(AdamWTensor, 64);

/** A step of AdamW over all tensors of a table. `partials` f32 `[chunks]`: sums of the squared gradients. `loss` is an
 * f32 or 0. `outcome` f32 `[4]` has the norm of all gradients first. The second is 0, or says which tensor, from 1, has
 * the first gradient that is not finite. The third is the loss. The fourth is the factor of the gradients: NaN if
 * nothing may change. */
typedef struct AdamWParams {
  device_ptr tensors;
  device_ptr partials;
  device_ptr loss;
  device_ptr outcome;
  uint32_t tensor_count;
  uint32_t chunks;
  float max_norm;
  float beta1_rest;
  float beta2;
  float beta2_rest;
} AdamWParams;
ABI_SIZE(AdamWParams, 56);

/** Threads of a block of the kernels of a convolution's columns; a thread makes a vector of channels. */
#define CONV_COLUMNS_THREADS 256

/** The `kernel x kernel` neighbourhood of every position of x `[batch, h, w, channels]`, or of one in each `stride x
 * stride`, zero outside: columns `[batch, rows, cols, kernel, kernel, channels]`. The backward makes the gradient x of
 * that of columns. `vectors` of channels, or `channels` single ones; `count` of what is made. */
typedef struct ConvColumnsParams {
  device_ptr x;
  device_ptr columns;
  uint32_t h;
  uint32_t w;
  uint32_t channels;
  uint32_t rows;
  uint32_t cols;
  uint32_t kernel;
  uint32_t stride;
  uint32_t vectors;
  uint64_t count;
} ConvColumnsParams;
ABI_SIZE(ConvColumnsParams, 56);

/** Most vectors that a launch puts one behind the other. */
#define CONCAT_PARTS 8
#define CONCAT_THREADS 256

/** A vector, and where it ends in `out`, in elements. */
typedef struct ConcatPart {
  device_ptr from;
  uint64_t end;
} ConcatPart;
ABI_SIZE(ConcatPart, 16);

/** `out` is all parts in a row; the last one that is used ends at `size`. */
typedef struct ConcatParams {
  ConcatPart parts[CONCAT_PARTS];
  device_ptr out;
  uint64_t size;
} ConcatParams;
ABI_SIZE(ConcatParams, 144);

#endif
