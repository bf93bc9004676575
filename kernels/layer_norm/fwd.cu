// The instances of layer_norm/fwd.cuh.
#include "layer_norm/fwd.cuh"

KERNEL(layer_norm_fwd_f32, LayerNormFwdParams, LAYER_NORM_THREADS) { layer_norm_fwd<float>(p); }
KERNEL(layer_norm_fwd_f16, LayerNormFwdParams, LAYER_NORM_THREADS) { layer_norm_fwd<__half>(p); }
KERNEL(layer_norm_fwd_bf16, LayerNormFwdParams, LAYER_NORM_THREADS) { layer_norm_fwd<__nv_bfloat16>(p); }
