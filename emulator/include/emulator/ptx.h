// The instructions of kernels/common/ptx.cuh on the CPU, straight from the PTX ISA's definitions of their fragments.
#pragma once
#include <bit>
#include <cmath>
#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"
#include "simt.h"

namespace ptx {

template <class T> T& shared_storage() { return *reinterpret_cast<T*>(emulator::shared_memory()); }

// The block's shared memory begins at 0.
inline uint32_t cvta_shared(const void* p) { return uint32_t(static_cast<const unsigned char*>(p) - emulator::shared_memory()); }

inline void* cvta_global(uint64_t address) { return reinterpret_cast<void*>(address); }

// --- ldmatrix: lane l gets elements (l / 4, 2 (l % 4)) and the next of each matrix, or of its transpose ---------------

namespace detail {
struct Ldmatrix {
    const unsigned char* row;
    uint32_t* registers;
};

template <int Count, bool Trans> void ldmatrix(const char* name, uint32_t* registers, const void* row, emulator::Location at) {
    if (emulator::lane() < 8 * Count) emulator::check_shared(name, row, 16, at);
    Ldmatrix operands{static_cast<const unsigned char*>(row), registers};
    emulator::meet_warp(name, &operands, [](void** p) {
        for (int matrix = 0; matrix < Count; ++matrix) {
            uint16_t element[8][8];
            for (int i = 0; i < 8; ++i) std::memcpy(element[i], static_cast<Ldmatrix*>(p[matrix * 8 + i])->row, 16);
            for (int l = 0; l < 32; ++l) {
                const int i = l / 4, j = 2 * (l % 4);
                const uint32_t low = Trans ? element[j][i] : element[i][j];
                const uint32_t high = Trans ? element[j + 1][i] : element[i][j + 1];
                static_cast<Ldmatrix*>(p[l])->registers[matrix] = low | high << 16;
            }
        }
    }, at);
}
}  // namespace detail

template <bool Trans = false> void ldmatrix_x1(uint32_t& r, const void* row, EMULATOR_LOCATION) {
    detail::ldmatrix<1, Trans>("ldmatrix.x1", &r, row, at);
}
template <bool Trans = false> void ldmatrix_x2(uint32_t (&r)[2], const void* row, EMULATOR_LOCATION) {
    detail::ldmatrix<2, Trans>("ldmatrix.x2", r, row, at);
}
template <bool Trans = false> void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_LOCATION) {
    detail::ldmatrix<4, Trans>("ldmatrix.x4", r, row, at);
}

// --- mma.sync: products exact in f32, summed over k in order, then added to the accumulator ---------------------------

namespace detail {
struct Mma {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

inline float half_of(uint32_t word, int which, __nv_bfloat16) {
    return std::bit_cast<float>(which ? word & 0xFFFF0000u : word << 16);
}
inline float half_of(uint32_t word, int which, __half) { return __half2float(__half{uint16_t(word >> (16 * which))}); }

template <int K> void multiply(void** p, const float (&a)[16][K], const float (&b)[K][8]) {
    float d[16][8] = {};
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < K; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < 4; ++i) static_cast<Mma*>(p[l])->d[i] += d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
}

template <class T> void mma_m16n8k16(void** p) {
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
        const auto& lane = *static_cast<Mma*>(p[l]);
        for (int i = 0; i < 4; ++i)
            for (int h = 0; h < 2; ++h) a[l / 4 + 8 * (i % 2)][2 * (l % 4) + h + 8 * (i / 2)] = half_of(lane.a[i], h, T{});
        for (int i = 0; i < 2; ++i)
            for (int h = 0; h < 2; ++h) b[2 * (l % 4) + h + 8 * i][l / 4] = half_of(lane.b[i], h, T{});
    }
    multiply<16>(p, a, b);
}

inline void mma_m16n8k8_tf32(void** p) {
    // The hardware ignores the 13 bits that tf32 does not have.
    const auto tf32 = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xFFFFE000u); };
    float a[16][8], b[8][8];
    for (int l = 0; l < 32; ++l) {
        const auto& lane = *static_cast<Mma*>(p[l]);
        for (int i = 0; i < 4; ++i) a[l / 4 + 8 * (i % 2)][l % 4 + 4 * (i / 2)] = tf32(lane.a[i]);
        for (int i = 0; i < 2; ++i) b[l % 4 + 4 * i][l / 4] = tf32(lane.b[i]);
    }
    multiply<8>(p, a, b);
}
}  // namespace detail

template <class T> void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T, EMULATOR_LOCATION) {
    detail::Mma operands{d, a, {b0, b1}};
    emulator::meet_warp("mma.m16n8k16", &operands, detail::mma_m16n8k16<T>, at);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATOR_LOCATION) {
    detail::Mma operands{d, a, {b0, b1}};
    emulator::meet_warp("mma.m16n8k8", &operands, detail::mma_m16n8k8_tf32, at);
}

// To nearest, ties away from zero.
inline uint32_t cvt_rna_tf32(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return std::isfinite(x) ? (bits + 0x1000u) & 0xFFFFE000u : bits;
}

// --- cp.async ---------------------------------------------------------------------------------------------------------

template <int Bytes> void cp_async(void* dst, const void* src, bool valid = true, EMULATOR_LOCATION) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
    // Here, and not in the scheduler, so that sanitizers see the accesses as the kernel's.
    const auto move = [](void* dst, const void* src, bool valid) {
        uint32_t words[Bytes / 4] = {};
        if (valid) std::memcpy(words, src, Bytes);
        std::memcpy(dst, words, Bytes);
    };
    emulator::copy_async(dst, src, Bytes, valid, move, at);
}
inline void cp_async_commit_group() { emulator::commit_copies(); }
template <int N> void cp_async_wait_group() { emulator::wait_copies(N); }

inline uint32_t hide(uint32_t x) { return x; }

// Reads it, for AddressSanitizer to see.
inline void prefetch_l2(const void* p) { [[maybe_unused]] const char byte = *static_cast<const volatile char*>(p); }

// --- barriers, shuffles, arithmetic -----------------------------------------------------------------------------------

inline void bar_sync(int id, int threads, EMULATOR_LOCATION) {
    if (id < 1 || id > 15 || threads <= 0 || threads % 32) emulator::fail("bar.sync wants an id in 1..15 and a multiple of 32 threads", at);
    emulator::meet_barrier("bar.sync", id, threads, at);
}

template <class T> T shfl_xor(T value, int lane_mask, EMULATOR_LOCATION) { return __shfl_xor_sync(~0u, value, lane_mask, 32, at); }
template <class T> T shfl_idx(T value, int lane, EMULATOR_LOCATION) { return __shfl_sync(~0u, value, lane, 32, at); }
template <class T> T shfl_down(T value, int delta, EMULATOR_LOCATION) { return __shfl_down_sync(~0u, value, delta, 32, at); }
inline bool any(bool value, EMULATOR_LOCATION) { return __any_sync(~0u, value, at) != 0; }

// Who waits is told apart, not who lets others begin: that is a permission.
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait(EMULATOR_LOCATION) { emulator::wait_for_grids(at); }

// Flush subnormals as the .ftz forms do.
inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float ex2_approx(float x) { return flush(std::exp2(flush(x))); }
inline float rcp_approx(float x) { return flush(1.0f / flush(x)); }

}  // namespace ptx
