// The only inline PTX: one thin function per instruction, named as in the PTX ISA.
//
// This is the seam between the kernels and what runs them. The same names are implemented for the CPU in
// emulator/include/emulator/ptx.h; a function added here is added there.
#pragma once
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#if !defined(__CUDACC__)
#include <emulator/ptx.h>
#else

namespace ptx {

#define PTX __device__ __forceinline__

// The block's dynamic shared memory as one struct. Its size is the launch's business.
template <class T> PTX T& shared_storage() {
    extern __shared__ __align__(1024) unsigned char shared_memory[];
    return *reinterpret_cast<T*>(shared_memory);
}

// A 32-bit address in shared memory.
PTX uint32_t cvta_shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// A generic pointer from an address in global memory; tells the compiler so, which then loads with ld.global.
PTX void* cvta_global(uint64_t address) { return __cvta_global_to_generic(address); }

// --- ldmatrix: 8x8 matrices of 16-bit elements; lanes 8i..8i+7 give the rows of matrix i -----------------------------

template <bool Trans = false> PTX void ldmatrix_x1(uint32_t& r, const void* row) {
    if constexpr (Trans)
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r) : "r"(cvta_shared(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(r) : "r"(cvta_shared(row)) : "memory");
}

template <bool Trans = false> PTX void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    if constexpr (Trans)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(cvta_shared(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1]) : "r"(cvta_shared(row)) : "memory");
}

template <bool Trans = false> PTX void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    if constexpr (Trans)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(cvta_shared(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(cvta_shared(row)) : "memory");
}

// --- mma.sync: d += a b, f32 accumulators; a is row-major, b column-major --------------------------------------------

PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The operands are bits of f32; the instruction uses their tf32 part (10 bits of mantissa). Round with cvt_rna_tf32
// first.
PTX void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

PTX uint32_t cvt_rna_tf32(float x) {
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

// --- cp.async: global to shared, Bytes 4, 8 or 16, both aligned to it; zeros if not `valid` (the source is not read) -

template <int Bytes> PTX void cp_async(void* dst, const void* src, bool valid = true) {
    static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
    const int source_bytes = valid ? Bytes : 0;
    if constexpr (Bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     ::"r"(cvta_shared(dst)), "l"(src), "r"(source_bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     ::"r"(cvta_shared(dst)), "l"(src), "n"(Bytes), "r"(source_bytes) : "memory");
}

PTX void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of this thread's committed groups are in flight.
template <int N> PTX void cp_async_wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Asks for what lies at this address, so that it is in the L2 cache later.
PTX void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// --- barriers, shuffles, arithmetic ----------------------------------------------------------------------------------

// The barrier `id` (1..15) among `threads` threads, a multiple of 32.
PTX void bar_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

template <class T> PTX T shfl_xor(T value, int lane_mask) { return __shfl_xor_sync(~0u, value, lane_mask); }
template <class T> PTX T shfl_idx(T value, int lane) { return __shfl_sync(~0u, value, lane); }
template <class T> PTX T shfl_down(T value, int delta) { return __shfl_down_sync(~0u, value, delta); }
PTX bool any(bool value) { return __any_sync(~0u, value); }

// --- programmatic dependent launch, docs/kernels.md; before Hopper nothing: there kernels follow one another ---------

// Lets the next kernel begin, if it may, once all blocks have come here or ended.
PTX void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until the kernels before this one have ended, and what they wrote can be read.
PTX void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- the rest --------------------------------------------------------------------------------------------------------

// No instruction: the same value, about which the compiler knows nothing.
PTX uint32_t hide(uint32_t x) {
    asm volatile("" : "+r"(x));
    return x;
}

// 2^x to about 2 ulp; 2^-inf = 0.
PTX float ex2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1/x to 1 ulp.
PTX float rcp_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#undef PTX

}  // namespace ptx
#endif
