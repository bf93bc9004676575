// The instances of low_rank/split.cuh.
#include "low_rank/split.cuh"

static_assert(sizeof(LowRankSplitStorage) == LOW_RANK_SPLIT_SHARED_BYTES);
KERNEL(low_rank_split_f16, LowRankSplitParams, LOW_RANK_SPLIT_THREADS) { low_rank_split<__half>(p); }
KERNEL(low_rank_split_bf16, LowRankSplitParams, LOW_RANK_SPLIT_THREADS) { low_rank_split<__nv_bfloat16>(p); }
