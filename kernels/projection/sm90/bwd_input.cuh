// The gradient of the projections' input on sm_90a, the formula of projection/bwd_input.cuh:
//
//   dx [rows, in_dim] = sum over p of g_p W_p + drop_p(dS_p a_p),
//
// dS [rows, ranks], f32, comes from low_rank.cu. The weights' rows are the depth here, so the copies take them as they
// lie, in columns of 64, and wgmma transposes. It does not transpose f32: mma (tf32) multiplies dS_p a_p. The fragments
// of mma go through the dropout mask into the accumulators of wgmma, which lie alike.
//
// dS and a do not pass through the ring of stages. When the tile's other products are done, each warp reads its rows of
// dS and the tile's columns of a from global memory. All warps want the same few KB of a (12 for rank 16 and 192
// columns), which the L1 cache has. By then the ring is the next tile's, so the warpgroups can take tiles in turn.
//
// This kernel may begin before low_rank.cu has ended: g and W are there by then; dS, and leave to write, are waited
// for.
#pragma once
#include "common/dropout_fragment.cuh"
#include "projection/sm90/common.cuh"

// The corner of a tile. Tiles go along a row of tiles first, which shares its g.
template <class Tile> __device__ __forceinline__ uint2 tile_corner(const ProjectionParams& p, uint32_t tile) {
    return make_uint2(tile % p.column_tiles * Tile::kCols, block_row<Tile>(tile / p.column_tiles));
}

// One thread: fills stage after stage with the depth of q, k and v; parts that are not there have none.
template <class Tile>
__device__ __forceinline__ void load_bwd_input(const ProjectionBwdInputSm90Params& p, typename Tile::Storage& shared) {
    RingPosition<Tile::kStages> at;
#pragma unroll 1
    for (uint32_t tile = first_tile<Tile>(); tile < p.tiles; tile += clusters<Tile>()) {
        const uint2 corner = tile_corner<Tile>(p.problem, tile);
#pragma unroll 1
        for (uint32_t part = 0; part < PROJECTION_PARTS; ++part)
#pragma unroll 1
            for (uint32_t k = 0; k < p.problem.parts[part].out_dim; k += Tile::kDepth) {
                auto& stage = shared.stages[at.stage];
                auto& full = shared.full[at.stage];
                ptx::mbarrier_wait_parity(shared.empty[at.stage], at.parity ^ 1);
                ptx::mbarrier_arrive_expect_tx(full, sizeof(stage));
                ptx::cp_async_bulk_tensor(stage.left, p.g[part], full, k, corner.y);
#pragma unroll 1
                for (uint32_t c = 0; c < Tile::kCols; c += 64)
                    load_right<Tile, Tile::kDepth>(stage.right + c * 128, p.weight[part], full, corner.x + c, k);
                at.advance();
            }
    }
    wait_for_last_stages<Tile>(shared, at);
}

// A low-rank product takes a depth of sixteen at once, in two steps of mma. In step s, lane t of four has depths 4 t +
// 2 s and the next one. So a lane's share of a row of dS is one vector. Depth from the rank on is zero.
constexpr uint32_t kLowRankDepth = 16;

// dS of rows `row` + lane / 4 and eight further. The only place that reads what the kernel before this one has written.
__device__ __forceinline__ void load_low_rank_left(uint32_t (&left)[2][4], const ProjectionParams& p,
                                                   const ProjectionPart& part, uint32_t row, uint32_t k) {
    const uint32_t mine = row + threadIdx.x % kWarp / 4, depth = k + threadIdx.x % 4 * 4;
    const device_ptr ds = p.low_rank + 4 * uint64_t(part.s_column + depth);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float values[4] = {};
        // dS has zeros up to a multiple of four columns.
        if (mine + 8 * half < p.rows && depth < part.rank)
            load(values, global<const float>(ds + uint64_t(mine + 8 * half) * (4 * p.s_stride)));
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i / 2][half + i % 2 * 2] = ptx::cvt_rn_tf32(values[i]);
    }
}

// products += dS of 16 rows times a of 8 kN columns.
template <int kN>
__device__ __forceinline__ void multiply_low_rank(float (&products)[kN][4], const ProjectionParams& p,
                                                  const ProjectionPart& part, uint32_t row, uint32_t col) {
    const uint32_t cols = ptx::hide(p.in_dim - col);
    const device_ptr a = part.a + 4 * uint64_t(col + threadIdx.x % kWarp / 4);
#pragma unroll 1
    for (uint32_t k = 0; k < part.rank; k += kLowRankDepth) {
        uint32_t left[2][4], right[kN][4];
        load_low_rank_left(left, p, part, row, k);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Rows of a that are not there are multiplied by zeros of dS: any other will do.
            const uint32_t depth = k + threadIdx.x % 4 * 4 + i;
            const float* from = global<const float>(a + uint64_t(depth < part.rank ? depth : k) * (4 * p.in_dim));
#pragma unroll
            for (int n = 0; n < kN; ++n) right[n][i] = ptx::cvt_rn_tf32(uint32_t(8 * n) < cols ? from[8 * n] : 0.0f);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int n = 0; n < kN; ++n)
                ptx::mma_m16n8k8_tf32(products[n], left[s], right[n][2 * s], right[n][2 * s + 1]);
    }
}

// Calls body(i) of the one i from kFirst to kFirst + kCount - 1 that is `index`, as a constant: registers have no
// index.
template <int kFirst, int kCount, class Body> __device__ __forceinline__ void at_index(uint32_t index, Body body) {
    if constexpr (kCount == 1) body(std::integral_constant<int, kFirst>{});
    else if (ptx::hide(index) < kFirst + kCount / 2) at_index<kFirst, kCount / 2>(index, body);
    else at_index<kFirst + kCount / 2, kCount - kCount / 2>(index, body);
}

// Adds the low-rank products of all parts to a warp's accumulators, kN fragments after another. A loop that is not
// unrolled: its addresses would leave no room for the accumulators, and its code none in the instruction cache.
template <class Tile>
__device__ __forceinline__ void add_low_rank(const ProjectionParams& p, typename Tile::Accumulators& acc, uint32_t row,
                                             uint32_t col) {
    constexpr int kN = Tile::kM == 1 ? 4 : 2;
#pragma unroll 1
    for (int i = 0; i < PROJECTION_PARTS; ++i) {
        const ProjectionPart& part = p.parts[i];
        if (part.rank == 0) continue;
#pragma unroll 1
        for (uint32_t at = 0; at < Tile::kM * Tile::kCols / 32; ++at) {
            const uint32_t mine = row + at % Tile::kM * 64, first = at / Tile::kM * 32;
            if (col + first >= p.in_dim) break;
            uint32_t keep = part.mask.threshold == 0 ? ~0u : keep_bits(seeded(part.mask), mine, (col + first) / 8);
#pragma unroll 1
            for (uint32_t n = 0; n < 4; n += kN) {
                float products[kN][4] = {};
                multiply_low_rank(products, p, part, mine, col + first + 8 * n);
#pragma unroll
                for (int e = 0; e < 4 * kN; ++e)
                    if (!(keep >> keep_bit(e / 4, e % 4) & 1)) products[e / 4][e % 4] = 0.0f;
                keep >>= keep_bit(kN, 0);
                at_index<0, Tile::kM * Tile::kCols / 8 / kN>((4 * at + n) / kN, [&](auto group) {
                    constexpr int kGroup = decltype(group)::value, kAt = kGroup / (4 / kN),
                                  kFirst = kAt / Tile::kM * 16 + kGroup % (4 / kN) * 4 * kN;
#pragma unroll
                    for (int e = 0; e < 4 * kN; ++e) {
                        float& sum = acc[kAt % Tile::kM][kFirst + e];
                        sum = fmaf(part.mask.scale, products[e / 4][e % 4], sum);
                    }
                });
            }
        }
    }
}

// A warp's rows of a tile, from the accumulators to memory: 64 columns at a time. row: of the first product.
template <class Tile>
__device__ __forceinline__ void store_bwd_input(const ProjectionBwdInputSm90Params& p, typename Tile::Storage& shared,
                                                typename Tile::Accumulators& acc, uint32_t row, uint32_t col) {
    auto& pieces = shared.pieces[threadIdx.x / kWarp];
#pragma unroll
    for (int c = 0; c < Tile::kCols; c += Tile::kPiece) {
        if (col + c >= p.problem.in_dim) break;
        wait_for_stores();
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m) {
            write_piece<typename Tile::T>(pieces[m], acc[m], c, [](float(&)[8], unsigned char*) {});
            store_piece(p.dx, pieces[m], col + c, row + m * 64);
        }
    }
}

template <class Tile>
__device__ __forceinline__ void multiply_bwd_input(const ProjectionBwdInputSm90Params& p,
                                                   typename Tile::Storage& shared, int group) {
    const int first_row = Tile::kPingPong ? 0 : group * Tile::kM * 64;
    uint32_t depth = 0;  // in steps
#pragma unroll
    for (int part = 0; part < PROJECTION_PARTS; ++part)
        depth += ceil_div(p.problem.parts[part].out_dim, uint32_t(Tile::kDepth));
#pragma unroll 1
    for (uint32_t turn = Tile::kPingPong ? group : 0; first_tile<Tile>() + turn * clusters<Tile>() < p.tiles;
         turn += Tile::kPingPong ? 2 : 1) {
        const uint32_t tile = first_tile<Tile>() + turn * clusters<Tile>();
        RingPosition<Tile::kStages> at;
        at.advance(turn * depth);
        const uint2 corner = tile_corner<Tile>(p.problem, tile);
        typename Tile::Accumulators acc;
        bool add = false;
        uint32_t busy = 0;
        wait_for_turn<Tile>(shared, group, turn / 2);
        run_steps<Tile>(shared, at, acc, 0, depth, busy,
                        [&](const auto& stage, uint32_t) { multiply_stage<Tile, true>(acc, stage, first_row, add); });
        pass_turn<Tile>(shared, group);
        finish_steps<Tile>(shared, acc, busy);
        const uint32_t row = corner.y + first_row + threadIdx.x / kWarp % 4 * 16;
        ptx::griddepcontrol_wait();
        add_low_rank<Tile>(p.problem, acc, row, corner.x);
        store_bwd_input<Tile>(p, shared, acc, row, corner.x);
    }
}

template <class Tile> __device__ __forceinline__ void projection_bwd_input_sm90(const ProjectionBwdInputSm90Params& p) {
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    run_warpgroups<Tile>(
        shared, [&] { load_bwd_input<Tile>(p, shared); },
        [&](int group) { multiply_bwd_input<Tile>(p, shared, group); });
}
