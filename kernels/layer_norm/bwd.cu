// The instances of layer_norm/bwd.cuh.
#include "layer_norm/bwd.cuh"

KERNEL(layer_norm_bwd_f32, LayerNormBwdParams, LAYER_NORM_THREADS) { layer_norm_bwd<float>(p); }
KERNEL(layer_norm_bwd_f16, LayerNormBwdParams, LAYER_NORM_THREADS) { layer_norm_bwd<__half>(p); }
KERNEL(layer_norm_bwd_bf16, LayerNormBwdParams, LAYER_NORM_THREADS) { layer_norm_bwd<__nv_bfloat16>(p); }

constexpr int kColumnThreads = LAYER_NORM_COLUMN_WARPS * kWarp;
static_assert(sizeof(LayerNormColumnStorage) == LAYER_NORM_COLUMN_SHARED_BYTES);
KERNEL(layer_norm_bwd_weight_f32, LayerNormBwdWeightParams, kColumnThreads) { layer_norm_bwd_weight<float>(p); }
KERNEL(layer_norm_bwd_weight_f16, LayerNormBwdWeightParams, kColumnThreads) { layer_norm_bwd_weight<__half>(p); }
KERNEL(layer_norm_bwd_weight_bf16, LayerNormBwdWeightParams, kColumnThreads) {
    layer_norm_bwd_weight<__nv_bfloat16>(p);
}
