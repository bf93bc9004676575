// Hopper's instructions (sm_90a) as inline PTX, named as in the PTX ISA. Like ptx.cuh this is a seam: the same names
// are implemented for the CPU in emulator/include/emulator/ptx_sm90.h.
//
// The fences:
//
// - Barriers that bulk copies or other threads use need fence_mbarrier_init after mbarrier_init.
// - Shared memory that ordinary stores or stmatrix write, and wgmma or a bulk store reads, needs fence_proxy_async by
//   each writer, then a barrier.
// - Accumulators and register operands need wgmma_fence before the first wgmma_mma after they were touched.
#pragma once
#include "abi.h"
#include "common/ptx.cuh"

#if !defined(__CUDACC__)
#include <emulator/ptx_sm90.h>
#else

#define PTX __device__ __forceinline__
#include "common/wgmma.cuh"

namespace ptx {

// --- mbarrier: a phase ends when all arrivals and all expected bytes are there; phases have the parities 0, 1, 0, ... 

struct alignas(8) mbarrier {
    uint64_t state;
};

PTX void mbarrier_init(mbarrier& bar, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cvta_shared(&bar)), "r"(arrivals) : "memory");
}
PTX void mbarrier_arrive(mbarrier& bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(cvta_shared(&bar)) : "memory");
}
PTX void mbarrier_arrive_expect_tx(mbarrier& bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(cvta_shared(&bar)), "r"(bytes) : "memory");
}
// Until the phase of this parity has ended; at first, that of parity 1 has.
PTX void mbarrier_wait_parity(mbarrier& bar, uint32_t parity) {
    uint32_t ended;
    do {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(ended) : "r"(cvta_shared(&bar)), "r"(parity) : "memory");
    } while (!ended);
}
// Arrives at the barrier at the same place in the shared memory of that block of the cluster. The arrival tells that
// this thread has waited for wgmma's reads. It releases no write of this thread to the other block: that would take a
// fence of the whole GPU.
PTX void mbarrier_arrive_cluster(mbarrier& bar, uint32_t rank) {
    asm volatile("{.reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
                 "mbarrier.arrive.shared::cluster.b64 _, [remote];}"
                 ::"r"(cvta_shared(&bar)), "r"(rank) : "memory");
}
PTX void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// --- cp.async.bulk: tiles of tensors (TMA), and plain bytes; one thread issues them ----------------------------------

PTX void prefetch_tensormap(const EncodedTensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The tile whose first element is at these coordinates, innermost first, into shared memory; zeros outside of the
// tensor. Counts the whole tile's bytes on `bar`.
template <class... C>
PTX void cp_async_bulk_tensor(void* dst, const EncodedTensorMap& map, mbarrier& bar, C... coordinates) {
    const int c[] = {int(coordinates)...};
    const uint32_t to = cvta_shared(dst), on = cvta_shared(&bar);
#define LOAD(rank, list, ...)                                                                               \
    if constexpr (sizeof...(C) == rank)                                                                     \
        asm volatile("cp.async.bulk.tensor." #rank "d.shared::cluster.global.mbarrier::complete_tx::bytes " \
                     "[%0], [%1, {" list "}], [%2];"                                                        \
                     ::"r"(to), "l"(&map), "r"(on), __VA_ARGS__ : "memory");
    static_assert(sizeof...(C) >= 1 && sizeof...(C) <= 5);
    LOAD(1, "%3", "r"(c[0]))
    LOAD(2, "%3, %4", "r"(c[0]), "r"(c[1]))
    LOAD(3, "%3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]))
    LOAD(4, "%3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]))
    LOAD(5, "%3, %4, %5, %6, %7", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]))
#undef LOAD
}

// As cp_async_bulk_tensor, to the same place in the shared memory of every block of the cluster in the mask. Each of
// these blocks counts the bytes on its own barrier.
template <class... C>
PTX void cp_async_bulk_tensor_multicast(void* dst, const EncodedTensorMap& map, mbarrier& bar, uint16_t mask,
                                        C... coordinates) {
    const int c[] = {int(coordinates)...};
    static_assert(sizeof...(C) == 2);
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(cvta_shared(dst)), "l"(&map), "r"(cvta_shared(&bar)), "r"(c[0]), "r"(c[1]), "h"(mask)
                 : "memory");
}

// A tile from shared memory into the tensor; what lies outside of it is left out. Part of a bulk group of this thread.
template <class... C>
PTX void cp_async_bulk_tensor_store(const EncodedTensorMap& map, const void* src, C... coordinates) {
    const int c[] = {int(coordinates)...};
    const uint32_t from = cvta_shared(src);
#define STORE(rank, list, ...)                                                                               \
    if constexpr (sizeof...(C) == rank)                                                                      \
        asm volatile("cp.async.bulk.tensor." #rank "d.global.shared::cta.bulk_group [%0, {" list "}], [%1];" \
                     ::"l"(&map), "r"(from), __VA_ARGS__ : "memory");
    static_assert(sizeof...(C) >= 1 && sizeof...(C) <= 5);
    STORE(1, "%2", "r"(c[0]))
    STORE(2, "%2, %3", "r"(c[0]), "r"(c[1]))
    STORE(3, "%2, %3, %4", "r"(c[0]), "r"(c[1]), "r"(c[2]))
    STORE(4, "%2, %3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]))
    STORE(5, "%2, %3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]))
#undef STORE
}

// Multiples of 16 bytes between aligned addresses.
PTX void cp_async_bulk(void* dst, const void* src, uint32_t bytes, mbarrier& bar) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(cvta_shared(dst)), "l"(src), "r"(bytes), "r"(cvta_shared(&bar)) : "memory");
}
PTX void cp_async_bulk_store(void* dst, const void* src, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 ::"l"(dst), "r"(cvta_shared(src)), "r"(bytes) : "memory");
}
PTX void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most N of this thread's groups of stores are in flight; `read`: until the others have read their sources.
template <int N> PTX void cp_async_bulk_wait_group() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
template <int N> PTX void cp_async_bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// --- wgmma: d [64, N] = a b + scale_d d by the four warps of a warpgroup, in the background --------------------------
//
// Warp w holds rows 16 w .. 16 w + 15; d[4 j + i] of lane l is element (l / 4 + 8 (i / 2), 8 j + 2 (l % 4) + i % 2) of
// them. Descriptors (descriptor.cuh) give operands in shared memory. Registers may give a, as mma_m16n8k16 takes it for
// the warp's rows. kTrans: an operand lies with m, or n, innermost instead of k.

template <int N, int kTransA = 0, int kTransB = 0, class T>
PTX void wgmma_m64k16(float (&d)[N / 2], uint64_t a, uint64_t b, bool scale_d, T type) {
    Wgmma<N>::template mma<kTransA, kTransB>(d, a, b, scale_d, type);
}
template <int N, int kTransB = 0, class T>
PTX void wgmma_m64k16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool scale_d, T type) {
    Wgmma<N>::template mma<kTransB>(d, a, b, scale_d, type);
}
// Operands in f32, whose tf32 part is used; a in registers as mma_m16n8k8_tf32's.
template <int N> PTX void wgmma_m64k8_tf32(float (&d)[N / 2], uint64_t a, uint64_t b, bool scale_d) {
    Wgmma<N>::mma_tf32(d, a, b, scale_d);
}
template <int N> PTX void wgmma_m64k8_tf32(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool scale_d) {
    Wgmma<N>::mma_tf32(d, a, b, scale_d);
}

PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> PTX void wgmma_wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// No instruction. The compiler moves no use of these registers across this point: before the wait for the products that
// write them, they hold nothing.
template <int N> PTX void wgmma_pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// --- clusters: blocks that run at the same time and reach each other's shared memory ---------------------------------

// This block's rank in its cluster, counted along x first.
PTX uint32_t cluster_ctarank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// The barrier between all threads of a cluster; threads that have ended do not count. The barrier orders the work of
// fence_mbarrier_init before it, and nothing else. Arrivals at another block's barriers may be on their way still.
PTX void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
PTX void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// --- the rest --------------------------------------------------------------------------------------------------------

// Registers a thread of this warpgroup may use from here on, a multiple of 8; the others' sum decides what there is.
template <int N> PTX void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> PTX void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// Arrives at the barrier that others wait at with bar_sync, and goes on.
PTX void bar_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// To nearest, ties to even: one instruction, where ptx.cuh's rna takes three.
PTX uint32_t cvt_rn_tf32(float x) {
    uint32_t r;
    asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

// True for one lane of the warp.
PTX bool elect_sync() {
    uint32_t elected;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xFFFFFFFF; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
    return elected;
}

// ldmatrix's inverse: lanes 8i..8i+7 give the rows of matrix i.
template <bool Trans = false> PTX void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
    if constexpr (Trans)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                     ::"r"(cvta_shared(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                     ::"r"(cvta_shared(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
template <bool Trans = false> PTX void stmatrix_x2(void* row, const uint32_t (&r)[2]) {
    if constexpr (Trans)
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};"
                     ::"r"(cvta_shared(row)), "r"(r[0]), "r"(r[1]) : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};"
                     ::"r"(cvta_shared(row)), "r"(r[0]), "r"(r[1]) : "memory");
}

}  // namespace ptx
#undef PTX
#endif
