// The activations of projections and their derivatives, elementwise in f32, without branches between elements.
//
// GELU is x cdf(x), with the cdf of the normal distribution. Its lower tail is one exponential of a polynomial, which
// stays accurate where 1 + erf cancels. The upper half is 1 minus that. tests/kernels/instructions.rs has the errors.
#pragma once
#include "common/kernel.cuh"

// Behind it cdf(-t) is below f32's normal numbers.
constexpr float kGeluLimit = 13.0f;

// cdf(-t) for t in 0 .. kGeluLimit: log2 of it is t q(t) - 1, q a minimax fit weighted by the distribution.
__device__ __forceinline__ float lower_tail(float t) {
    constexpr float kQ[] = {
        -1.15110576f, -0.459203333f, -0.052507598f, 0.0070667332f, -0.00011874218f,
        -0.000211008984f, 5.29458594e-05f, -6.33335912e-06f, 3.80143319e-07f, -9.02981867e-09f};
    float q = kQ[sizeof(kQ) / sizeof(float) - 1];
#pragma unroll
    for (int i = int(sizeof(kQ) / sizeof(float)) - 2; i >= 0; --i) q = fmaf(q, t, kQ[i]);
    return ptx::ex2_approx(fmaf(q, t, -1.0f));
}

__device__ __forceinline__ float relu(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN

__device__ __forceinline__ float gelu(float x) {
    const float t = fminf(fabsf(x), kGeluLimit);
    return fmaf(-t, lower_tail(t), relu(x));
}

// cdf(x) + x pdf(x)
__device__ __forceinline__ float gelu_derivative(float x) {
    const float t = fminf(fabsf(x), kGeluLimit);
    // From x instead of t, so that NaN stays NaN.
    const float pdf = 0.39894228f * ptx::ex2_approx(-0.72134752f * x * x);
    const float below = fmaf(-t, pdf, lower_tail(t));
    return x < 0.0f ? below : 1.0f - below;
}

// act of N values. Decided once for all of them: the compiler would make a branch of each, one after the other.
template <int N> __device__ __forceinline__ void activate(float (&v)[N], uint32_t activation) {
    if (activation == ACTIVATION_GELU) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = gelu(v[i]);
    } else if (activation == ACTIVATION_RELU) {
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = relu(v[i]);
    }
}

// grad = grad act'(sum), of N values.
template <int N>
__device__ __forceinline__ void scale_by_derivative(float (&grad)[N], const float (&sum)[N], uint64_t activation) {
    if (activation == ACTIVATION_RELU) {
#pragma unroll
        for (int i = 0; i < N; ++i) grad[i] *= sum[i] > 0.0f ? 1.0f : 0.0f;
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) grad[i] *= gelu_derivative(sum[i]);
    }
}
