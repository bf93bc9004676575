// The instances of multi_head/fwd.cuh: head_dim rounded up, rows of a block, columns of a tile, dtype.
#include "multi_head/fwd.cuh"
#include "tiles.h"

#define INSTANCE(suffix, T, dim, rows, columns)                                                              \
    KERNEL(multi_head_fwd_hd##dim##_##rows##x##columns##_##suffix, MultiHeadFwdParams, rows / 16 * kWarp) { \
        multi_head_fwd<MultiHeadTile<T, dim, rows, columns>>(p);                                             \
    }
MULTI_HEAD_TILES(INSTANCE)

KERNEL(multi_head_fwd_combine_f32, MultiHeadFwdParams, MULTI_HEAD_THREADS) { multi_head_fwd_combine<float>(p); }
KERNEL(multi_head_fwd_combine_f16, MultiHeadFwdParams, MULTI_HEAD_THREADS) { multi_head_fwd_combine<__half>(p); }
KERNEL(multi_head_fwd_combine_bf16, MultiHeadFwdParams, MULTI_HEAD_THREADS) {
    multi_head_fwd_combine<__nv_bfloat16>(p);
}
