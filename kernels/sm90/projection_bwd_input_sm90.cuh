// The gradient of the projections' input on sm_90a, the formula of ../projection_bwd_input.cuh:
//
//   dx [rows, in_dim] = sum over p of g_p W_p + drop_p(dS_p a_p),
//
// dS [rows, ranks], f32, from low_rank.cu. The weights' rows are the depth here, so the copies take them as they lie, in
// columns of 64, and wgmma transposes. It does not transpose f32: dS_p a_p is multiplied by mma (tf32) from the same
// stages, whose fragments go through the dropout mask into the accumulators of wgmma, which lie alike.
#pragma once
#include "dropout_fragment.cuh"
#include "projection_sm90.cuh"

// A tile's steps: the depth of q, k and v, then their ranks; parts that are not there have none. Calls
// base(part, k) and low_rank(part, k) for those from depth k on.
template <class Tile, class Base, class LowRank>
__device__ __forceinline__ void for_steps(const ProjectionParams& p, Base base, LowRank low_rank) {
#pragma unroll 1
    for (uint32_t part = 0; part < PROJECTION_PARTS; ++part)
#pragma unroll 1
        for (uint32_t k = 0; k < p.parts[part].out_dim; k += Tile::kDepth) base(part, k);
#pragma unroll 1
    for (uint32_t part = 0; part < PROJECTION_PARTS; ++part)
#pragma unroll 1
        for (uint32_t k = 0; k < p.parts[part].rank; k += Tile::kLowRankDepth) low_rank(part, k);
}

// The corner of a tile; tiles go along a row of tiles first, whose g is the same.
template <class Tile> __device__ __forceinline__ uint2 tile_corner(const ProjectionParams& p, uint32_t tile) {
    return make_uint2(tile % p.column_tiles * Tile::kCols, tile / p.column_tiles * Tile::kRows);
}

// One thread: fills stage after stage.
template <class Tile> __device__ __forceinline__ void load_bwd_input(const ProjectionBwdInputSm90Params& p, typename Tile::Storage& shared) {
    RingPosition<Tile::kStages> at;
#pragma unroll 1
    for (uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const uint2 corner = tile_corner<Tile>(p.problem, tile);
        const auto load = [&](const EncodedTensorMap& left, const EncodedTensorMap& right, uint32_t right_cols, uint32_t k) {
            auto& stage = shared.stages[at.stage];
            auto& full = shared.full[at.stage];
            ptx::mbarrier_wait_parity(shared.empty[at.stage], at.parity ^ 1);
            ptx::mbarrier_arrive_expect_tx(full, sizeof(stage));
            ptx::cp_async_bulk_tensor(stage.left, left, full, k, corner.y);
#pragma unroll 1
            for (uint32_t c = 0; c < Tile::kCols; c += right_cols) ptx::cp_async_bulk_tensor(stage.right + c * 128, right, full, corner.x + c, k);
            at.advance();
        };
        for_steps<Tile>(
            p.problem, [&](uint32_t part, uint32_t k) { load(p.g[part], p.weight[part], 64, k); },
            [&](uint32_t part, uint32_t k) { load(p.low_rank[part], p.a[part], 32, k); });
    }
}

// Element k of a row of 32 f32, of rows of 128 bytes as the copies swizzle them.
__device__ __forceinline__ uint32_t low_rank_element(const unsigned char* rows, int row, int k) {
    uint32_t bits;
    memcpy(&bits, rows + row * 128 + ((k / 4 ^ row % 8) << 4) + k % 4 * 4, 4);
    return bits;
}

// One step of a low-rank product: `left` is dS [rows][32] from the warp's first row on, `right` a in tiles [32][32] of 32
// columns; `depth` of the 32 are not zero. row and col are the warp's in dx.
template <int kCols>
__device__ __forceinline__ void add_low_rank(
    float (&acc)[kCols / 2], const unsigned char* left, const unsigned char* right, uint32_t depth, const DropoutMask& mask, uint32_t row,
    uint32_t col) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    uint32_t a[4][4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) a[k][i] = low_rank_element(left, g + i % 2 * 8, 8 * k + t + i / 2 * 4);
#pragma unroll
    for (int c = 0; c < kCols; c += 32) {
        float products[4][4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (uint32_t(8 * k) < depth) {
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    const uint32_t upper = low_rank_element(right + c * 128, 8 * k + t, 8 * n + g);
                    const uint32_t lower = low_rank_element(right + c * 128, 8 * k + t + 4, 8 * n + g);
                    ptx::mma_m16n8k8_tf32(products[n], a[k], upper, lower);
                }
            }
        const uint32_t keep = mask.threshold == 0 ? ~0u : keep_bits(mask, row, (col + c) / 8);
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& sum = acc[c / 2 + 4 * n + i];
                if (keep >> keep_bit(n, i) & 1) sum = fmaf(mask.scale, products[n][i], sum);
            }
    }
}

template <class Tile> __device__ __forceinline__ void multiply_bwd_input(const ProjectionBwdInputSm90Params& p, typename Tile::Storage& shared, int group) {
    static_assert(!Tile::kPingPong && Tile::kM == 1, "a warpgroup's mma would run ahead of the other one's turn");
    using T = typename Tile::T;
    const int warp = threadIdx.x / kWarp, first_row = group * 64;
    unsigned char* piece = shared.pieces[warp][0];
    uint32_t depth = 0;  // in steps
#pragma unroll
    for (int part = 0; part < PROJECTION_PARTS; ++part) depth += ceil_div(p.problem.parts[part].out_dim, uint32_t(Tile::kDepth));
    RingPosition<Tile::kStages> at;
#pragma unroll 1
    for (uint32_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const uint2 corner = tile_corner<Tile>(p.problem, tile);
        const uint32_t row = corner.y + warp * 16;
        typename Tile::Accumulators acc;
        bool add = false;
        uint32_t busy = 0;
        run_steps<Tile>(shared, at, acc, 0, depth, busy, [&](const auto& stage, uint32_t) { multiply_stage<Tile, true>(acc, stage, first_row, add); });
        finish_steps<Tile>(shared, acc, busy);
#pragma unroll 1
        for (int part = 0; part < PROJECTION_PARTS; ++part) {
            const uint32_t rank = p.problem.parts[part].rank;
#pragma unroll 1
            for (uint32_t k = 0; k < rank; k += Tile::kLowRankDepth) {
                const auto& stage = shared.stages[at.stage];
                ptx::mbarrier_wait_parity(shared.full[at.stage], at.parity);
                add_low_rank<Tile::kCols>(acc[0], stage.left + warp * 16 * 128, stage.right, rank - k, p.problem.parts[part].mask, row, corner.x);
                __syncwarp();  // all lanes have read the stage
                arrive(shared.empty[at.stage]);
                at.advance();
            }
        }
#pragma unroll
        for (int c = 0; c < Tile::kCols; c += Tile::kPiece) {
            if (corner.x + c >= p.problem.in_dim) break;
            wait_for_stores();
            write_piece<T>(piece, acc[0], c, [](float(&)[8], unsigned char*) {});
            store_piece(p.dx, piece, corner.x + c, row);
        }
    }
}

template <class Tile> __device__ __forceinline__ void projection_bwd_input_sm90(const ProjectionBwdInputSm90Params& p) {
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    run_warpgroups<Tile>(shared, [&] { load_bwd_input<Tile>(p, shared); }, [&](int group) { multiply_bwd_input<Tile>(p, shared, group); });
}
