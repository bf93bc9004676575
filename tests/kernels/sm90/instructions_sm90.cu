// For the tests of the emulator alone: Hopper's instructions by one warpgroup, each against its definition.
#include "common/kernel.cuh"
#include "common/descriptor.cuh"

struct ProductParams {
    EncodedTensorMap a, b;
    device_ptr out;
    uint64_t unused[7];
};

constexpr int kDepth = 64;  // of 16-bit operands; half of it of f32

struct ProductStorage {
    unsigned char a[64 * kDepth * 2], b[256 * kDepth * 2];
    ptx::mbarrier landed;
};

// An operand [mn, depth] in tiles of rows of kSwizzle bytes; or [depth, mn] if kTrans.
template <class E, int kMn, bool kTrans, int kSwizzle> struct OperandOf {
    static constexpr int kBytes = kDepth * 2, kDepthOf = kBytes / sizeof(E);
    static constexpr int kRows = kTrans ? kDepthOf : kMn, kCols = kTrans ? kMn : kDepthOf, kTileCols = kSwizzle / sizeof(E);
    static constexpr int kTileBytes = kRows * kSwizzle;

    static __device__ __forceinline__ void load(unsigned char* to, const EncodedTensorMap& map, ptx::mbarrier& bar) {
        for (int tile = 0; tile < kCols / kTileCols; ++tile) ptx::cp_async_bulk_tensor(to + tile * kTileBytes, map, bar, tile * kTileCols, 0);
    }
    static __device__ __forceinline__ uint64_t descriptor(const unsigned char* at, int step) {
        if constexpr (kTrans) return descriptor_mn_inner<kSwizzle>(at, kTileBytes) + descriptor_step(step * 16 * kSwizzle);
        else return descriptor_k_inner<kSwizzle>(at + step * 32 / kSwizzle * kTileBytes) + descriptor_step(step * 32 % kSwizzle);
    }
};

// out [64, N] = a b, then out - 2 a b + a b with the last product alone kept, in another group: tests scale_d and groups.
template <class T, int N, bool kTransA, bool kTransB, int kSwizzle, bool kRegisters> __device__ __forceinline__ void product(const ProductParams& p) {
    constexpr bool kTf32 = sizeof(T) == 4;
    using A = OperandOf<T, 64, kTransA, kSwizzle>;
    using B = OperandOf<T, N, kTransB, kSwizzle>;
    auto& shared = ptx::shared_storage<ProductStorage>();
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(shared.landed, 1);
        ptx::fence_mbarrier_init();
        ptx::prefetch_tensormap(p.a);
        ptx::mbarrier_arrive_expect_tx(shared.landed, (64 + N) * kDepth * 2);
        A::load(shared.a, p.a, shared.landed);
        B::load(shared.b, p.b, shared.landed);
    }
    __syncthreads();
    ptx::mbarrier_wait_parity(shared.landed, 0);
    uint32_t a[kDepth / 16][4];
    if constexpr (kRegisters)
        for (int step = 0; step < kDepth / 16; ++step)
            for (int i = 0; i < 4; ++i) {
                const int row = warp * 16 + lane / 4 + 8 * (i % 2);
                const int byte = kTf32 ? 4 * (step * 8 + lane % 4 + 4 * (i / 2)) : 2 * (step * 16 + 2 * (lane % 4) + 8 * (i / 2));
                const int offset = row * 128 + byte;
                memcpy(&a[step][i], shared.a + (offset ^ (offset >> 7 & 7) << 4), 4);
            }
    float d[N / 2];
    for (int i = 0; i < N / 2; ++i) d[i] = 1.0f;
    for (int pass = 0; pass < 2; ++pass) {
        ptx::wgmma_pin(d);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kDepth / 16; ++step) {
            const uint64_t b = B::descriptor(shared.b, step);
            const bool scale_d = step > 0;
            if constexpr (kTf32 && kRegisters) ptx::wgmma_m64k8_tf32<N>(d, a[step], b, scale_d);
            else if constexpr (kTf32) ptx::wgmma_m64k8_tf32<N>(d, A::descriptor(shared.a, step), b, scale_d);
            else if constexpr (kRegisters) ptx::wgmma_m64k16<N, kTransB>(d, a[step], b, scale_d, T{});
            else ptx::wgmma_m64k16<N, kTransA, kTransB>(d, A::descriptor(shared.a, step), b, scale_d, T{});
        }
        ptx::wgmma_commit_group();
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_pin(d);
    }
    for (int i = 0; i < N / 2; ++i)
        global<float>(p.out)[(warp * 16 + lane / 4 + 8 * (i / 2 % 2)) * N + 8 * (i / 4) + 2 * (lane % 4) + i % 2] = d[i];
}

#define PRODUCT(name, T, N, kTransA, kTransB, kSwizzle, kRegisters) \
    KERNEL(product_sm90_##name, ProductParams, 128) { product<T, N, kTransA, kTransB, kSwizzle, kRegisters>(p); }
PRODUCT(bf16_n8_128, __nv_bfloat16, 8, false, false, 128, false)
PRODUCT(f16_n192_128, __half, 192, false, false, 128, false)
PRODUCT(bf16_n256_64, __nv_bfloat16, 256, false, false, 64, false)
PRODUCT(bf16_n24_32, __nv_bfloat16, 24, false, false, 32, false)
PRODUCT(bf16_n128_128_tb, __nv_bfloat16, 128, false, true, 128, false)
PRODUCT(f16_n64_64_ta, __half, 64, true, false, 64, false)
PRODUCT(bf16_n80_32_ta_tb, __nv_bfloat16, 80, true, true, 32, false)
PRODUCT(bf16_n64_128_ra, __nv_bfloat16, 64, false, false, 128, true)
PRODUCT(f16_n64_128_ra_tb, __half, 64, false, true, 128, true)
PRODUCT(tf32_n96_128, float, 96, false, false, 128, false)
PRODUCT(tf32_n16_128_ra, float, 16, false, false, 128, true)

// A tile of four dimensions, partly before and behind the tensor, goes into a tensor of three that it exceeds. A copy of
// 512 bytes is not changed. Two warps: the first loads, the second stores.
struct CopyParams {
    EncodedTensorMap from, to;
    device_ptr in, out;
    uint64_t unused[6];
};
struct CopyStorage {
    alignas(128) float tile[4 * 3 * 2 * 2];
    alignas(128) float bytes[128];
    ptx::mbarrier landed;
};
KERNEL(copies_sm90, CopyParams, 64) {
    auto& shared = ptx::shared_storage<CopyStorage>();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(shared.landed, 1);
        ptx::fence_mbarrier_init();
        ptx::mbarrier_arrive_expect_tx(shared.landed, sizeof(shared.tile) + sizeof(shared.bytes));
        ptx::cp_async_bulk_tensor(shared.tile, p.from, shared.landed, -1, 1, 0, 2);
        ptx::cp_async_bulk(shared.bytes, global<float>(p.in), sizeof(shared.bytes), shared.landed);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        ptx::bar_arrive(3, 64);
    } else {
        ptx::bar_sync(3, 64);
        ptx::mbarrier_wait_parity(shared.landed, 0);
        if (ptx::elect_sync()) {
            ptx::cp_async_bulk_tensor_store(p.to, shared.tile, 0, 1, 0);
            ptx::cp_async_bulk_store(global<float>(p.out), shared.bytes, sizeof(shared.bytes));
            ptx::cp_async_bulk_commit_group();
            ptx::cp_async_bulk_wait_group<0>();
        }
    }
}

// in [2, 64] 16-bit, two matrices in registers as mma's fragments: stored, and stored transposed, then from there to out.
struct StoreParams {
    device_ptr in, out;
};
struct StoreStorage {
    __half at[6][64];
};
KERNEL(stmatrix_sm90, StoreParams, 32) {
    auto& shared = ptx::shared_storage<StoreStorage>();
    const int lane = threadIdx.x;
    uint32_t r[4], half[2];
    for (int i = 0; i < 4; ++i) memcpy(&r[i], global<__half>(p.in) + 64 * (i % 2) + 2 * lane, 4);
    for (int i = 0; i < 2; ++i) half[i] = r[i];
    ptx::stmatrix_x4(&shared.at[lane / 8][lane % 8 * 8], r);
    __syncwarp();
    if (lane < 16) memset(&shared.at[2 + lane / 8][lane % 8 * 8], 0, 16);
    __syncwarp();
    ptx::stmatrix_x2<true>(&shared.at[2 + lane / 8 % 2][lane % 8 * 8], half);
    ptx::fence_proxy_async();
    __syncwarp();
    if (ptx::elect_sync()) {
        ptx::cp_async_bulk_store(global<__half>(p.out), shared.at, 512);
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group_read<0>();
    }
}

// in [32] f32, out [32]: their tf32.
KERNEL(tf32_sm90, StoreParams, 32) {
    global<uint32_t>(p.out)[threadIdx.x] = ptx::cvt_rn_tf32(global<const float>(p.in)[threadIdx.x]);
}
