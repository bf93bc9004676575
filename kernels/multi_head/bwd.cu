// The instances of multi_head/bwd.cuh: pass, head_dim rounded up, rows of a block, columns of a tile, dtype.
#include "multi_head/bwd.cuh"
#include "tiles.h"

// One block a multiprocessor is asked for: ptxas would spill to have as many as its rule wants.
#define PASS(pass, by_key, suffix, T, dim, rows, columns)                                       \
    KERNEL(multi_head_bwd_##pass##_hd##dim##_##rows##x##columns##_##suffix, MultiHeadBwdParams, \
           rows / 16 * kWarp, 1) {                                                              \
        multi_head_bwd<MultiHeadTile<T, dim, rows, columns>, by_key>(p);                        \
    }
#define INSTANCE(suffix, T, dim, rows, columns)       \
    PASS(query, false, suffix, T, dim, rows, columns) \
    PASS(key, true, suffix, T, dim, rows, columns)
MULTI_HEAD_TILES(INSTANCE)

KERNEL(multi_head_bwd_rows_f32, MultiHeadBwdRowsParams, MULTI_HEAD_THREADS) { multi_head_bwd_rows<float>(p); }
KERNEL(multi_head_bwd_rows_f16, MultiHeadBwdRowsParams, MULTI_HEAD_THREADS) { multi_head_bwd_rows<__half>(p); }
KERNEL(multi_head_bwd_rows_bf16, MultiHeadBwdRowsParams, MULTI_HEAD_THREADS) { multi_head_bwd_rows<__nv_bfloat16>(p); }
