// The instances of projection_bwd.cuh.
#include "projection_bwd.cuh"

KERNEL(activation_grad_f32, ActivationGradParams, ACTIVATION_GRAD_THREADS) { activation_grad<float>(p); }
KERNEL(activation_grad_f16, ActivationGradParams, ACTIVATION_GRAD_THREADS) { activation_grad<__half>(p); }
KERNEL(activation_grad_bf16, ActivationGradParams, ACTIVATION_GRAD_THREADS) { activation_grad<__nv_bfloat16>(p); }

constexpr int kBiasThreads = BIAS_GRAD_WARPS * kWarp;
static_assert(sizeof(BiasGradStorage) == BIAS_GRAD_SHARED_BYTES);
KERNEL(bias_grad_f32, BiasGradParams, kBiasThreads) { bias_grad<float>(p); }
KERNEL(bias_grad_f16, BiasGradParams, kBiasThreads) { bias_grad<__half>(p); }
KERNEL(bias_grad_bf16, BiasGradParams, kBiasThreads) { bias_grad<__nv_bfloat16>(p); }
