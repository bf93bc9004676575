// The instances of dora/norm.cuh.
#include "dora/norm.cuh"

static_assert(sizeof(DoraNormStorage) == DORA_NORM_SHARED_BYTES);
KERNEL(dora_norm_f32, DoraNormParams, DORA_NORM_THREADS) { dora_norm<float>(p); }
KERNEL(dora_norm_f16, DoraNormParams, DORA_NORM_THREADS) { dora_norm<__half>(p); }
KERNEL(dora_norm_bf16, DoraNormParams, DORA_NORM_THREADS) { dora_norm<__nv_bfloat16>(p); }
