// The instances of rel_pos_attention/sm90/bwd_key.cuh: head_dim, the columns of a block of keys, dtype. One block a
// multiprocessor.
//
// Within a loop, ptxas before CUDA 13.1 gives registers that wgmma reads in every step to other values, and never
// restores them. The weights' gradients are then those of other keys. So there keys and values stay in shared memory.
// scripts/check-sass.py reads the machine code of both compilers for it.
#include "rel_pos_attention/sm90/bwd_key.cuh"
#include "tiles.h"

#if !defined(KEYS_IN_REGISTERS)
#if defined(__CUDACC__) && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1301
#define KEYS_IN_REGISTERS false
#else
#define KEYS_IN_REGISTERS true
#endif
#endif

#define INSTANCE(suffix, T, dim, cols)                                                                      \
    KERNEL(rel_pos_attention_bwd_key_sm90_hd##dim##_cols##cols##_##suffix, RelPosAttentionBwdKeySm90Params, \
           REL_POS_ATTENTION_SM90_BWD_KEY_THREADS, 1) {                                                             \
        rel_pos_attention_bwd_key_sm90<KeyBlock<T, dim, cols, KEYS_IN_REGISTERS>>(p);                       \
    }
REL_POS_ATTENTION_BWD_KEY_SM90_TILES(INSTANCE)
