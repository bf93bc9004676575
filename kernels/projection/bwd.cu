// The instances of projection/bwd.cuh.
#include "projection/bwd.cuh"

KERNEL(projection_bwd_activation_f32, ActivationGradParams, ACTIVATION_GRAD_THREADS) { activation_grad<float>(p); }
KERNEL(projection_bwd_activation_f16, ActivationGradParams, ACTIVATION_GRAD_THREADS) { activation_grad<__half>(p); }
KERNEL(projection_bwd_activation_bf16, ActivationGradParams, ACTIVATION_GRAD_THREADS) {
    activation_grad<__nv_bfloat16>(p);
}

constexpr int kBiasThreads = BIAS_GRAD_WARPS * kWarp;
static_assert(sizeof(BiasGradStorage) == BIAS_GRAD_SHARED_BYTES);
KERNEL(projection_bwd_bias_f32, BiasGradParams, kBiasThreads) { bias_grad<float>(p); }
KERNEL(projection_bwd_bias_f16, BiasGradParams, kBiasThreads) { bias_grad<__half>(p); }
KERNEL(projection_bwd_bias_bf16, BiasGradParams, kBiasThreads) { bias_grad<__nv_bfloat16>(p); }
