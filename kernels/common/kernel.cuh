// Common to every kernel: the KERNEL macro, pointers, element types, vector loads.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "abi.h"
#include "common/ptx.cuh"

// Defines a kernel that the host finds by name: KERNEL(name, Params, max_threads[, min_blocks_per_sm]) { body on p }.
// The emulator registers it in a table instead.
#if defined(__CUDACC__)
#define KERNEL(name, Params, ...) \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) name(const __grid_constant__ Params p)
#else
#define KERNEL(name, Params, ...)                                                                \
    static void name(const Params& p);                                                           \
    static const emulator::Registration register_##name(                                         \
        #name, sizeof(Params), [](const void* p) { name(*static_cast<const Params*>(p)); }, __VA_ARGS__); \
    static void name([[maybe_unused]] const Params& p)
#endif

constexpr int kWarp = 32;

template <class T> __host__ __device__ constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }

// A typed pointer to global memory from its address in a params struct.
template <class T> __device__ __forceinline__ T* global(device_ptr address) {
    return static_cast<T*>(ptx::cvta_global(address));
}

// Elements to f32 and back, rounding to nearest even.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Two f32 rounded into one register of two 16-bit elements, the first in the low half: what mma operands are made of.
template <class T> __device__ __forceinline__ uint32_t pack(float low, float high) {
    static_assert(sizeof(T) == 2);
    const T pair[2] = {from_float<T>(low), from_float<T>(high)};
    uint32_t bits;
    memcpy(&bits, pair, 4);
    return bits;
}

// N elements moved by one instruction; the address must be aligned to all of them.
template <class T, int N> struct alignas(sizeof(T) * N) Vec { T at[N]; };

// The elements of the widest (16-byte) vector.
template <class T> constexpr int kVec = 16 / sizeof(T);

template <int N, class T> __device__ __forceinline__ void load(float (&out)[N], const T* from) {
    const auto v = *reinterpret_cast<const Vec<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(v.at[i]);
}

template <int N, class T> __device__ __forceinline__ void store(T* to, const float (&values)[N]) {
    Vec<T, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.at[i] = from_float<T>(values[i]);
    *reinterpret_cast<Vec<T, N>*>(to) = v;
}

// Whether rows of `size` elements that start at these addresses may be read in 16-byte vectors.
template <class T, class... Address> __device__ __forceinline__ bool vectorisable(uint64_t size, Address... address) {
    return size % kVec<T> == 0 && ((address | ...) % 16) == 0;
}
