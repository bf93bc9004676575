// For the tests of the emulator alone: y [m, n] = x [m, k] w [n, k]^T, k a multiple of 8. Tiles are 64 x 64; their operands
// are staged twice by cp.async. tests/planted_bugs/gemm.rs plants bugs in it.
#include "common/kernel.cuh"

struct GemmParams {
    device_ptr x, w, y;
    uint32_t m, n, k, reserved;
};

constexpr int kTile = 64, kDepth = 32, kRow = kDepth + 8, kThreads = 128;

template <class T> struct GemmStorage {
    T x[2][kTile][kRow], w[2][kTile][kRow];
};

template <class T> __device__ void load_tile(T (&tile)[kTile][kRow], const T* from, uint32_t row0, uint32_t rows, uint32_t k0, uint32_t k) {
    for (int i = threadIdx.x; i < kTile * kDepth / 8; i += kThreads) {
        const uint32_t row = i / (kDepth / 8), col = i % (kDepth / 8) * 8;
        const bool valid = row0 + row < rows && k0 + col < k;
        ptx::cp_async<16>(&tile[row][col], valid ? from + uint64_t(row0 + row) * k + k0 + col : from, valid);
    }
}

template <class T> __device__ void gemm(const GemmParams& p) {
    auto& shared = ptx::shared_storage<GemmStorage<T>>();
    const T *x = global<const T>(p.x), *w = global<const T>(p.w);
    const uint32_t m0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile, steps = ceil_div(p.k, uint32_t(kDepth));
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    load_tile(shared.x[0], x, m0, p.m, 0, p.k);
    load_tile(shared.w[0], w, n0, p.n, 0, p.k);
    ptx::cp_async_commit_group();
    float acc[8][4] = {};
    for (uint32_t step = 0; step < steps; ++step) {
        const int stage = step % 2;
        if (step + 1 < steps) {
            load_tile(shared.x[1 - stage], x, m0, p.m, (step + 1) * kDepth, p.k);
            load_tile(shared.w[1 - stage], w, n0, p.n, (step + 1) * kDepth, p.k);
        }
        ptx::cp_async_commit_group();
        ptx::cp_async_wait_group<1>();
        __syncthreads();  // everybody's copies have landed
        for (int kk = 0; kk < kDepth; kk += 16) {
            uint32_t a[4];
            ptx::ldmatrix_x4(a, &shared.x[stage][warp * 16 + lane % 16][kk + lane / 16 * 8]);
            for (int n = 0; n < 8; n += 2) {
                uint32_t b[4];
                ptx::ldmatrix_x4(b, &shared.w[stage][n * 8 + lane / 16 * 8 + lane % 8][kk + lane / 8 % 2 * 8]);
                ptx::mma_m16n8k16(acc[n], a, b[0], b[1], T{});
                ptx::mma_m16n8k16(acc[n + 1], a, b[2], b[3], T{});
            }
        }
        __syncthreads();  // nobody reads this stage any more
    }
    float* y = global<float>(p.y);
    for (int n = 0; n < 8; ++n)
        for (int i = 0; i < 4; ++i) {
            const uint32_t row = m0 + warp * 16 + lane / 4 + 8 * (i / 2), col = n0 + n * 8 + 2 * (lane % 4) + i % 2;
            if (row < p.m && col < p.n) y[uint64_t(row) * p.n + col] = acc[n][i];
        }
}

KERNEL(gemm_f16, GemmParams, kThreads) { gemm<__half>(p); }
KERNEL(gemm_bf16, GemmParams, kThreads) { gemm<__nv_bfloat16>(p); }
