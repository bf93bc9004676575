// For the tests of the emulator alone: y [m, n] = x [m, k] w [n, k]^T, k a multiple of 8, in 64 x 64 tiles. A producer warp
// copies operands in bulk, a warpgroup multiplies them. tests/planted_bugs/gemm_sm90.rs plants bugs in it.
#include "common/kernel.cuh"
#include "common/descriptor.cuh"

struct GemmParams {
    EncodedTensorMap x, w;
    device_ptr y;
    uint32_t m, n, k, reserved;
    uint64_t unused[5];
};
static_assert(sizeof(GemmParams) == 320);

constexpr int kTile = 64, kDepth = 64, kStages = 3;

template <class T> struct GemmStorage {
    T x[kStages][kTile * kDepth], w[kStages][kTile * kDepth];
    ptx::mbarrier full[kStages], empty[kStages];
};

template <class T> __device__ __forceinline__ void gemm(const GemmParams& p) {
    auto& shared = ptx::shared_storage<GemmStorage<T>>();
    const uint32_t m0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile, steps = ceil_div(p.k, uint32_t(kDepth));
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(shared.full[i], 1);
            ptx::mbarrier_init(shared.empty[i], 4);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (warp < 4) {
        ptx::setmaxnreg_dec<40>();
        if (warp == 0 && ptx::elect_sync())
            for (uint32_t step = 0; step < steps; ++step) {
                const uint32_t stage = step % kStages, parity = step / kStages % 2;
                ptx::mbarrier_wait_parity(shared.empty[stage], parity ^ 1);
                ptx::mbarrier_arrive_expect_tx(shared.full[stage], 2 * kTile * kDepth * sizeof(T));
                ptx::cp_async_bulk_tensor(shared.x[stage], p.x, shared.full[stage], step * kDepth, m0);
                ptx::cp_async_bulk_tensor(shared.w[stage], p.w, shared.full[stage], step * kDepth, n0);
            }
    } else {
        ptx::setmaxnreg_inc<160>();
        float acc[kTile / 2] = {};
        for (uint32_t step = 0; step < steps; ++step) {
            const uint32_t stage = step % kStages, parity = step / kStages % 2;
            ptx::mbarrier_wait_parity(shared.full[stage], parity);
            const uint64_t x = descriptor_k_inner<128>(shared.x[stage]), w = descriptor_k_inner<128>(shared.w[stage]);
            ptx::wgmma_pin(acc);
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) ptx::wgmma_m64k16<kTile>(acc, x + descriptor_step(32 * k), w + descriptor_step(32 * k), true, T{});
            ptx::wgmma_commit_group();
            ptx::wgmma_wait_group<0>();
            ptx::wgmma_pin(acc);
            if (lane == 0) ptx::mbarrier_arrive(shared.empty[stage]);  // nobody reads it any more
        }
        float* y = global<float>(p.y);
#pragma unroll
        for (int i = 0; i < kTile / 2; ++i) {
            const uint32_t row = m0 + warp % 4 * 16 + lane / 4 + 8 * (i / 2 % 2), col = n0 + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
            if (row < p.m && col < p.n) y[uint64_t(row) * p.n + col] = acc[i];
        }
    }
}

KERNEL(gemm_sm90_f16, GemmParams, 256, 1) { gemm<__half>(p); }
KERNEL(gemm_sm90_bf16, GemmParams, 256, 1) { gemm<__nv_bfloat16>(p); }
