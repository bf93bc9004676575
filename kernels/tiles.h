/* The tiles that the kernels are compiled for. Each table is a macro of rows: TABLE(X) expands to X(..) for every
 * instance.
 *
 * The files kernels/<op>/<pass>.cu expand them to kernels. emulator/src/tiles.cpp expands them to
 * src/launch/tile_table.rs, with the shared memory that a block takes: run scripts/bindings.sh after a change. So a
 * tile is one row here. `pick` of its module in src/launch says which problems get it.
 */
#ifndef CANDLE_SAM_LORA_TILES_H
#define CANDLE_SAM_LORA_TILES_H

/* Elements: X(their name in a kernel's name, their type, ..). */
#define FLOAT(X, ...) X(f32, float, __VA_ARGS__)
#define HALF(X, ...) X(f16, __half, __VA_ARGS__) X(bf16, __nv_bfloat16, __VA_ARGS__)
#define ANY_FLOAT(X, ...) FLOAT(X, __VA_ARGS__) HALF(X, __VA_ARGS__)

/* Channels of a head; other heads are padded to the next size in shared memory, where a kernel allows it. */
#define HEADS(X, elements, ...) HEADS_TO_32(X, elements, __VA_ARGS__) LARGE_HEADS(X, elements, __VA_ARGS__)
#define HEADS_TO_32(X, elements, ...) elements(X, 16, __VA_ARGS__) elements(X, 32, __VA_ARGS__)
#define LARGE_HEADS(X, elements, ...) elements(X, 64, __VA_ARGS__) elements(X, 80, __VA_ARGS__)

/* Attention, forward and query pass: X(element, type, head_dim, columns and key rows of a key tile, warps of 16
 * queries, parts). If two widths leave equally little of a window's width empty, the first one is taken.
 *
 * - 64: rel_h is one number for 64 keys. A block's 64 queries are one row of SAM's grid of 64 x 64.
 * - 16: a window's row of 14 is 16, and its 196 queries are two blocks of 112. In f32, of twice the bytes, a tile has
 *   half the keys.
 * - 40: grids of 40 and 80, which stripes of 16 or 64 do not fill.
 *
 * In the forward, a warp has 16 queries of each part. A tile with two parts has half the columns and twice the key rows
 * there, so that rel_w takes no more registers. For 32 queries only heads of 64 channels have registers enough.
 */
#define REL_POS_ATTENTION_TILES(X)                    \
    HALF(X, 64, 64, 1, 4, 2) HALF(X, 80, 64, 1, 4, 1) \
    HEADS(X, HALF, 16, 4, 7, 1)                       \
    LARGE_HEADS(X, HALF, 40, 2, 4, 1)                 \
    HEADS(X, FLOAT, 16, 2, 4, 1)

/* Attention, key pass: X(element, type, head_dim, queries of a step). */
#define REL_POS_ATTENTION_BWD_KEY_TILES(X) \
    HEADS(X, HALF, 64)                     \
    HEADS(X, FLOAT, 32)

/* Attention on Hopper, a row a width; among equals the first one is taken. The key pass has the same widths.
 *
 * W(X, columns of a key tile; then five numbers of the forward and five of the query pass). The five are key rows, rows
 * that a bulk copy brings, tiles in flight for heads of 64 and of 80 channels, and warpgroups. Each has 64 queries.
 *
 * - 64: rel_w is one fragment for all tiles of the forward; SAM's grid of 64 x 64. The forward's three warpgroups hide
 *   more of each other's softmax; with wider tiles they would not have registers enough.
 * - 16: grids of 32 and 48.
 * - 40: grids of 40 and 80.
 */
#define REL_POS_ATTENTION_SM90_WIDTHS(W, X) \
    W(X, 64, 1, 1, 6, 6, 3, 1, 1, 8, 8, 2)  \
    W(X, 16, 8, 8, 6, 5, 2, 4, 4, 8, 8, 2)  \
    W(X, 40, 4, 1, 5, 4, 2, 2, 1, 5, 4, 2)

/* X(element, type, head_dim, columns, key rows, rows of a bulk copy, tiles in flight, warpgroups of queries), and for
 * the key pass X(element, type, head_dim, columns). */
#define REL_POS_ATTENTION_FWD_SM90_TILES(X) REL_POS_ATTENTION_SM90_WIDTHS(FWD_SM90_TILES, X)
#define REL_POS_ATTENTION_BWD_QUERY_SM90_TILES(X) REL_POS_ATTENTION_SM90_WIDTHS(BWD_QUERY_SM90_TILES, X)
#define REL_POS_ATTENTION_BWD_KEY_SM90_TILES(X) REL_POS_ATTENTION_SM90_WIDTHS(BWD_KEY_SM90_TILES, X)
#define FWD_SM90_TILES(X, cols, rows, box_rows, slots_64, slots_80, groups, ...) \
    HALF(X, 64, cols, rows, box_rows, slots_64, groups) HALF(X, 80, cols, rows, box_rows, slots_80, groups)
#define BWD_QUERY_SM90_TILES(X, cols, rows, box_rows, slots_64, slots_80, groups, ...) \
    FWD_SM90_TILES(X, cols, __VA_ARGS__, unused)
#define BWD_KEY_SM90_TILES(X, cols, ...) LARGE_HEADS(X, HALF, cols)

/* Attention in windows on Hopper: X(element, type, head_dim). */
#define REL_POS_ATTENTION_WINDOW_SM90_TILES(X) HALF(X, 64) HALF(X, 80)

/* Attention between two sets of tokens: X(element, type, head_dim, rows that a block holds, columns of a tile that
 * streams past them). Rows are queries, in the key pass keys.
 *
 * - 16 x 32: a prompt's few tokens against an image, by many blocks of one warp.
 * - 64 x 16: an image against a prompt's few tokens.
 * - 64 x 32: many against many.
 */
#define MULTI_HEAD_TILES(X)            \
    HEADS_TO_32(X, ANY_FLOAT, 16, 32) \
    HEADS_TO_32(X, ANY_FLOAT, 64, 16) \
    HEADS_TO_32(X, ANY_FLOAT, 64, 32)

/* Projections: X(element, type, rows and columns of a block's output, warps that share its rows and its columns).
 *
 * - 128 x 128: each operand element is used 128 times, which keeps the tensor cores busy.
 * - 64 x 64: four times as many blocks where large ones would leave multiprocessors idle; less waste on narrow outputs.
 */
#define PROJECTION_TILES(X)      \
    ANY_FLOAT(X, 128, 128, 2, 4) \
    ANY_FLOAT(X, 64, 64, 2, 2)

/* Projections on Hopper: X(element, type, name, whether two warpgroups take tiles in turn (ping-pong) or share each
 * one's rows (cooperative), rows, columns, stages in flight, blocks of a cluster). Each tile of a cluster of two,
 * `_x2`, exists without the cluster too, for devices that launch none. */
#define PROJECTION_FWD_SM90_TILES(X)                    \
    HALF(X, pingpong_128x192, true, 128, 192, 4, 1)     \
    HALF(X, pingpong_128x192_x2, true, 128, 192, 4, 2)  \
    HALF(X, cooperative_128x256, false, 128, 256, 4, 1) \
    HALF(X, cooperative_128x256_x2, false, 128, 256, 4, 2)
#define PROJECTION_BWD_INPUT_SM90_TILES(X) \
    PROJECTION_FWD_SM90_TILES(X)           \
    HALF(X, cooperative_128x192, false, 128, 192, 5, 1)

/* Products with a thin f32 side: X(element, type, product, columns, warps that share its rows and its columns, whether
 * the left side lies in columns and the right one in rows). Most adapters have a rank of 16 or less, and a wider tile
 * would multiply zeros; above, 64 columns read the other side fewer times. */
#define LOW_RANK_TILES(X)                       \
    ANY_FLOAT(X, input, 16, 4, 1, false, false) \
    ANY_FLOAT(X, input, 64, 2, 2, false, false) \
    ANY_FLOAT(X, grad, 16, 4, 1, false, true)   \
    ANY_FLOAT(X, grad, 64, 2, 2, false, true)   \
    ANY_FLOAT(X, weight, 16, 4, 1, true, true)  \
    ANY_FLOAT(X, weight, 64, 2, 2, true, true)

#endif
