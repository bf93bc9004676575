// The instructions of kernels/common/ptx_sm90.cuh on the CPU.
#pragma once
#include "async.h"
#include "ptx.h"

namespace ptx {

struct alignas(8) mbarrier {
    uint64_t state;
};
inline void mbarrier_init(mbarrier& bar, uint32_t arrivals, EMULATOR_LOCATION) { emulator::mbarrier_init(&bar, arrivals, at); }
inline void mbarrier_arrive(mbarrier& bar, EMULATOR_LOCATION) { emulator::mbarrier_arrive(&bar, 0, at); }
inline void mbarrier_arrive_expect_tx(mbarrier& bar, uint32_t bytes, EMULATOR_LOCATION) { emulator::mbarrier_arrive(&bar, bytes, at); }
inline void mbarrier_wait_parity(mbarrier& bar, uint32_t parity, EMULATOR_LOCATION) { emulator::mbarrier_wait(&bar, parity, at); }
inline void mbarrier_arrive_cluster(mbarrier& bar, uint32_t rank, EMULATOR_LOCATION) { emulator::mbarrier_arrive_cluster(&bar, rank, at); }
inline void fence_mbarrier_init() { emulator::fence_mbarrier_init(); }
inline void fence_proxy_async() { emulator::fence_proxy_async(); }

// Where these were called cannot be a default argument after a pack: it is taken with the barrier, or the source.
template <class T> struct Here {
    T value;
    emulator::Location at;
    Here(T value, EMULATOR_LOCATION) : value(value), at(at) {}
};
inline void prefetch_tensormap(const EncodedTensorMap& map, EMULATOR_LOCATION) { emulator::check_tensor_map(&map, 0, at); }
template <class... C> void cp_async_bulk_tensor(Here<void*> dst, const EncodedTensorMap& map, mbarrier& bar, C... coordinates) {
    const int c[] = {int(coordinates)...};
    emulator::tensor_load(dst.value, &map, &bar, c, sizeof...(C), nullptr, dst.at);
}
template <class... C> void cp_async_bulk_tensor_multicast(Here<void*> dst, const EncodedTensorMap& map, mbarrier& bar, uint16_t mask, C... coordinates) {
    const int c[] = {int(coordinates)...};
    emulator::tensor_load(dst.value, &map, &bar, c, sizeof...(C), &mask, dst.at);
}
template <class... C> void cp_async_bulk_tensor_store(const EncodedTensorMap& map, Here<const void*> src, C... coordinates) {
    const int c[] = {int(coordinates)...};
    emulator::tensor_store(&map, src.value, c, sizeof...(C), src.at);
}
inline void cp_async_bulk(void* dst, const void* src, uint32_t bytes, mbarrier& bar, EMULATOR_LOCATION) { emulator::bulk_load(dst, src, bytes, &bar, at); }
inline void cp_async_bulk_store(void* dst, const void* src, uint32_t bytes, EMULATOR_LOCATION) { emulator::bulk_store(dst, src, bytes, at); }
inline void cp_async_bulk_commit_group() { emulator::commit_bulk(); }
template <int N> void cp_async_bulk_wait_group() { emulator::wait_bulk(N); }
template <int N> void cp_async_bulk_wait_group_read() { emulator::wait_bulk(N); }

namespace detail {
constexpr emulator::Operand operand(__half) { return emulator::Operand::f16; }
constexpr emulator::Operand operand(__nv_bfloat16) { return emulator::Operand::bf16; }
template <int N> constexpr bool kIsWgmma = N % 8 == 0 && N >= 8 && N <= 256;
}  // namespace detail

template <int N, int kTransA = 0, int kTransB = 0, class T>
void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool scale_d, T type, EMULATOR_LOCATION) {
    static_assert(detail::kIsWgmma<N>);
    emulator::Wgmma operands{detail::operand(type), N, d, nullptr, a, b, scale_d, kTransA != 0, kTransB != 0};
    emulator::wgmma(operands, at);
}
template <int N, int kTransB = 0, class T>
void wgmma_m64k16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool scale_d, T type, EMULATOR_LOCATION) {
    static_assert(detail::kIsWgmma<N>);
    emulator::Wgmma operands{detail::operand(type), N, d, a, 0, b, scale_d, false, kTransB != 0};
    emulator::wgmma(operands, at);
}
template <int N> void wgmma_m64k8_tf32(float (&d)[N / 2], uint64_t a, uint64_t b, bool scale_d, EMULATOR_LOCATION) {
    static_assert(detail::kIsWgmma<N>);
    emulator::Wgmma operands{emulator::Operand::tf32, N, d, nullptr, a, b, scale_d, false, false};
    emulator::wgmma(operands, at);
}
template <int N> void wgmma_m64k8_tf32(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool scale_d, EMULATOR_LOCATION) {
    static_assert(detail::kIsWgmma<N>);
    emulator::Wgmma operands{emulator::Operand::tf32, N, d, a, 0, b, scale_d, false, false};
    emulator::wgmma(operands, at);
}
inline void wgmma_fence(EMULATOR_LOCATION) { emulator::wgmma_fence(at); }
inline void wgmma_commit_group(EMULATOR_LOCATION) { emulator::wgmma_commit(at); }
template <int N> void wgmma_wait_group(EMULATOR_LOCATION) { emulator::wgmma_wait(N, at); }
template <int N> void wgmma_pin(float (&)[N]) {}

inline uint32_t cluster_ctarank() { return emulator::cluster_rank(); }
inline void cluster_arrive_relaxed(EMULATOR_LOCATION) { emulator::cluster_arrive(at); }
inline void cluster_wait(EMULATOR_LOCATION) { emulator::cluster_wait(at); }

template <int N> void setmaxnreg_inc(EMULATOR_LOCATION) { emulator::set_registers(N, true, at); }
template <int N> void setmaxnreg_dec(EMULATOR_LOCATION) { emulator::set_registers(N, false, at); }
inline void bar_arrive(int id, int threads, EMULATOR_LOCATION) {
    if (id < 1 || id > 15 || threads <= 0 || threads % 32) emulator::fail("bar.arrive wants an id in 1..15 and a multiple of 32 threads", at);
    emulator::arrive_barrier(id, threads, at);
}
// To nearest, ties to even.
inline uint32_t cvt_rn_tf32(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    return std::isfinite(x) ? (bits + 0x0FFFu + (bits >> 13 & 1u)) & 0xFFFFE000u : bits;
}
inline bool elect_sync(EMULATOR_LOCATION) {
    emulator::meet_warp("elect.sync", nullptr, [](void**) {}, at);
    return emulator::lane() == 0;
}

namespace detail {
struct Stmatrix {
    unsigned char* row;
    const uint32_t* registers;
};
template <int Count, bool Trans> void stmatrix(const char* name, void* row, const uint32_t* registers, emulator::Location at) {
    if (emulator::lane() < 8 * Count) {
        emulator::check_shared(name, row, 16, at);
        emulator::note_generic_write(row, 16);
    }
    Stmatrix operands{static_cast<unsigned char*>(row), registers};
    emulator::meet_warp(name, &operands, [](void** p) {
        for (int matrix = 0; matrix < Count; ++matrix) {
            uint16_t element[8][8];
            for (int l = 0; l < 32; ++l) {
                const int i = l / 4, j = 2 * (l % 4);
                const uint32_t word = static_cast<Stmatrix*>(p[l])->registers[matrix];
                (Trans ? element[j][i] : element[i][j]) = uint16_t(word);
                (Trans ? element[j + 1][i] : element[i][j + 1]) = uint16_t(word >> 16);
            }
            for (int i = 0; i < 8; ++i) std::memcpy(static_cast<Stmatrix*>(p[matrix * 8 + i])->row, element[i], 16);
        }
    }, at);
}
}  // namespace detail
template <bool Trans = false> void stmatrix_x4(void* row, const uint32_t (&r)[4], EMULATOR_LOCATION) { detail::stmatrix<4, Trans>("stmatrix.x4", row, r, at); }
template <bool Trans = false> void stmatrix_x2(void* row, const uint32_t (&r)[2], EMULATOR_LOCATION) { detail::stmatrix<2, Trans>("stmatrix.x2", row, r, at); }

}  // namespace ptx
