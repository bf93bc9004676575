// The gradient of the projections' input on sm_90a, and dS on the way:
//
//   dS_p [rows, rank] = scaling_p g_p b_p,   dx [rows, in_dim] = sum over p of g_p W_p + drop_p(dS_p a_p).
//
// The loop of projection/sm90/bwd_input.cuh, whose g is multiplied by b as well while it is in shared memory. b is f32, and
// dS is to be as good as that: low_rank_split.cu has made three matrices of 16 bits of it, 48 columns of a thin right side.
// The sums of the three lie in the same thread, which then has its share of dS as the next product's left side. The
// blocks of the first column of tiles store dS for who wants dA. For ranks of at most 16.
#pragma once
#include "projection/sm90/bwd_input.cuh"

template <class T, int kStages> using ProjectionTileDsSm90 = ProjectionTileSm90<T, 128, 192, kStages, false, 1, LOW_RANK_SPLIT_COLUMNS>;
using ThinAccumulators = float[PROJECTION_PARTS][LOW_RANK_SPLIT_COLUMNS / 2];

// Starts one step's products of a warpgroup's 64 rows with the thin side, in tiles [64 of depth][16].
template <class Tile>
__device__ __forceinline__ void multiply_thin(float (&acc)[Tile::kThin / 2], const typename Tile::Stage& stage, int first_row, bool& add) {
    const uint64_t left = descriptor_k_inner<128>(stage.left + first_row * 128), right = descriptor_mn_inner<32>(stage.thin, 64 * 32);
#pragma unroll
    for (int k = 0; k < Tile::kDepth / 16; ++k) {
        ptx::wgmma_m64k16<Tile::kThin, 0, 1>(acc, left + descriptor_step(32 * k), right + descriptor_step(16 * 32 * k), add, typename Tile::T{});
        add = true;
    }
}

// A lane's share of dS of 16 rows: of the rows lane / 4 and eight further the ranks 4 (lane % 4) and the three next.
using LowRankShare = float[PROJECTION_PARTS][2][4];

__device__ __forceinline__ void sum_thin(LowRankShare& ds, const ProjectionBwdInputSm90Params& p, const ThinAccumulators& acc) {
#pragma unroll
    for (int part = 0; part < PROJECTION_PARTS; ++part) {
        if (p.problem.parts[part].rank == 0) continue;
        const float scale = p.problem.parts[part].scaling * global<const float>(p.unscale)[part];
#pragma unroll
        for (int e = 0; e < 8; ++e) {  // of fragment e / 4, element e % 4
            const float sum = acc[part][16 + e] + acc[part][8 + e] + acc[part][e];
            ds[part][e % 4 / 2][e / 4 * 2 + e % 2] = scale * sum;
        }
    }
}

__device__ __forceinline__ void store_ds(const ProjectionParams& p, const LowRankShare& ds, uint32_t row) {
    const uint32_t mine = row + threadIdx.x % kWarp / 4, first = threadIdx.x % 4 * 4;
#pragma unroll
    for (int part = 0; part < PROJECTION_PARTS; ++part)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (first < p.parts[part].rank && mine + 8 * half < p.rows)
                store(global<float>(p.low_rank) + uint64_t(mine + 8 * half) * p.s_stride + p.parts[part].s_column + first, ds[part][half]);
}

template <class Tile> __device__ __forceinline__ void multiply_bwd_ds(const ProjectionBwdInputSm90Params& p, typename Tile::Storage& shared, int group) {
    const int first_row = group * 64;
    RingPosition<Tile::kStages> at;
#pragma unroll 1
    for (uint32_t tile = first_tile<Tile>(); tile < p.tiles; tile += clusters<Tile>()) {
        const uint2 corner = tile_corner<Tile>(p.problem, tile);
        typename Tile::Accumulators acc;
        ThinAccumulators thin = {};
        bool add = false;
        uint32_t busy = 0, end = 0;
#pragma unroll
        for (int part = 0; part < PROJECTION_PARTS; ++part) ptx::wgmma_pin(thin[part]);
#pragma unroll
        for (int part = 0; part < PROJECTION_PARTS; ++part) {
            const uint32_t first = end;
            end += ceil_div(p.problem.parts[part].out_dim, uint32_t(Tile::kDepth));
            if (p.problem.parts[part].rank == 0) {
                run_steps<Tile>(shared, at, acc, first, end, busy, [&](const auto& stage, uint32_t) { multiply_stage<Tile, true>(acc, stage, first_row, add); });
            } else {
                bool add_thin = false;
                run_steps<Tile>(shared, at, acc, first, end, busy, [&](const auto& stage, uint32_t) {
                    multiply_stage<Tile, true>(acc, stage, first_row, add);
                    multiply_thin<Tile>(thin[part], stage, first_row, add_thin);
                });
            }
        }
        finish_steps<Tile>(shared, acc, busy);
#pragma unroll
        for (int part = 0; part < PROJECTION_PARTS; ++part) ptx::wgmma_pin(thin[part]);
        const uint32_t row = corner.y + first_row + threadIdx.x / kWarp % 4 * 16;
        LowRankShare ds = {};
        sum_thin(ds, p, thin);
        if (corner.x == 0) store_ds(p.problem, ds, row);
        add_low_rank<Tile>(p.problem, acc, row, corner.x, [&](uint32_t(&left)[2][4], int i, uint32_t, uint32_t) {
            at_index<0, PROJECTION_PARTS>(i, [&](auto part) {
#pragma unroll
                for (int e = 0; e < 8; ++e) left[e / 2 % 2][e / 4 + e % 2 * 2] = ptx::cvt_rn_tf32(ds[decltype(part)::value][e / 4][e % 4]);
            });
        });
        store_bwd_input<Tile>(p, shared, acc, row, corner.x);
    }
}

template <class Tile> __device__ __forceinline__ void projection_bwd_ds_sm90(const ProjectionBwdInputSm90Params& p) {
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    run_warpgroups<Tile>(shared, [&] { load_bwd_input<Tile>(p, shared); }, [&](int group) { multiply_bwd_ds<Tile>(p, shared, group); });
}
