// Stands in for CUDA's header when kernels are compiled for the host: qualifiers, vector types, built-in functions.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "emulator/simt.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
// Never contracted into a fused multiply-add, on either side.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

inline void __syncthreads(EMULATOR_LOCATION) { emulator::meet_barrier("__syncthreads", 0, 0, at); }

inline void __syncwarp(unsigned mask = ~0u, EMULATOR_LOCATION) {
    if (mask != ~0u) emulator::fail("__syncwarp: only whole warps are emulated", at);
    emulator::meet_warp("__syncwarp", nullptr, [](void**) {}, at);
}

namespace emulator {
template <class T> struct Shuffle {
    T value, result;
    int argument;
};

// Source: the lane to read from, of the reading lane and its argument; out of range is the lane itself.
template <class T, class Source>
T shuffle(const char* name, unsigned mask, T value, int argument, int width, Source, Location at) {
    if (mask != ~0u || width != 32) fail("shuffles: only whole warps are emulated", at);
    Shuffle<T> operands{value, value, argument};
    meet_warp(name, &operands, [](void** p) {
        for (int lane = 0; lane < 32; ++lane) {
            auto& reader = *static_cast<Shuffle<T>*>(p[lane]);
            const int source = Source{}(lane, reader.argument);
            if (source >= 0 && source < 32) reader.result = static_cast<Shuffle<T>*>(p[source])->value;
        }
    }, at);
    return operands.result;
}
}  // namespace emulator

template <class T> T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_LOCATION) {
    return emulator::shuffle("shfl.bfly", mask, value, lane_mask, width, [](int lane, int m) { return lane ^ m; }, at);
}
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_LOCATION) {
    return emulator::shuffle("shfl.idx", mask, value, source, width, [](int, int s) { return s & 31; }, at);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, EMULATOR_LOCATION) {
    return emulator::shuffle("shfl.down", mask, value, delta, width, [](int lane, int d) { return lane + d; }, at);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, EMULATOR_LOCATION) {
    return emulator::shuffle("shfl.up", mask, value, delta, width, [](int lane, int d) { return lane - d; }, at);
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_LOCATION) {
    if (mask != ~0u) emulator::fail("votes: only whole warps are emulated", at);
    emulator::meet_warp("vote.any", &predicate, [](void** p) {
        int any = 0;
        for (int lane = 0; lane < 32; ++lane) any |= *static_cast<int*>(p[lane]) != 0;
        for (int lane = 0; lane < 32; ++lane) *static_cast<int*>(p[lane]) = any;
    }, at);
    return predicate;
}
