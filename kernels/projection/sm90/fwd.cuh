// The projections' forward on sm_90a, the formula of projection/fwd.cuh: packed outputs of up to three linear layers,
//
//   out [rows, columns of p] = act(x W_p^T + S_p b_p^T + constants_p) + residual,
//
// S_p [rows, rank], f32, comes from low_rank.cu. S_p b_p^T is further steps of the same loop, whose f32 operands the
// copies round to tf32. This kernel takes f16 and bf16, and rows of multiples of 16 bytes. For the rest there is
// projection/fwd.cuh.
//
// It may begin before low_rank.cu has ended: x and W are there by then; S, and leave to write, are waited for.
#pragma once
#include "projection/fwd.cuh"
#include "projection/sm90/common.cuh"

// A tile of one projection. Tiles go along a row of tiles first, which shares its x: q, then k, then v.
struct ForwardWork {
    uint32_t part, row, col;  // col: of the projection
    uint32_t base, steps;     // steps over x, and with those over the rank
};

template <class Tile>
__device__ __forceinline__ ForwardWork forward_work(const ProjectionFwdSm90Params& p, uint32_t tile) {
    const uint32_t column_tiles = p.problem.column_tiles, column_tile = tile % column_tiles;
    uint32_t part = 0, first = 0, end = 0;
#pragma unroll
    for (uint32_t i = 0; i < PROJECTION_PARTS; ++i) {
        const uint32_t tiles = ceil_div(p.problem.parts[i].out_dim, uint32_t(Tile::kCols));
        if (tiles != 0 && column_tile >= end) part = i, first = end;
        end += tiles;
    }
    const uint32_t base = ceil_div(p.problem.in_dim, uint32_t(Tile::kDepth));
    const uint32_t low_rank = ceil_div(p.problem.parts[part].rank, uint32_t(Tile::kLowRankDepth));
    return {part, block_row<Tile>(tile / column_tiles), (column_tile - first) * Tile::kCols, base, base + low_rank};
}

// One thread: fills stage after stage.
template <class Tile>
__device__ __forceinline__ void load_forward(const ProjectionFwdSm90Params& p, typename Tile::Storage& shared) {
    RingPosition<Tile::kStages> at;
#pragma unroll 1
    for (uint32_t tile = first_tile<Tile>(); tile < p.tiles; tile += clusters<Tile>()) {
        const ForwardWork work = forward_work<Tile>(p, tile);
#pragma unroll 1
        for (uint32_t step = 0; step < work.steps; ++step) {
            auto& stage = shared.stages[at.stage];
            auto& full = shared.full[at.stage];
            ptx::mbarrier_wait_parity(shared.empty[at.stage], at.parity ^ 1);
            ptx::mbarrier_arrive_expect_tx(full, sizeof(stage));
            const bool low_rank = step >= work.base;
            if (step == work.base) ptx::griddepcontrol_wait();
            const uint32_t k = low_rank ? (step - work.base) * Tile::kLowRankDepth : step * Tile::kDepth;
            ptx::cp_async_bulk_tensor(stage.left, low_rank ? p.low_rank[work.part] : p.x, full, k, work.row);
            load_right<Tile, Tile::kCols>(stage.right, low_rank ? p.b[work.part] : p.weight[work.part], full, k,
                                          work.col);
            at.advance();
        }
    }
    wait_for_last_stages<Tile>(shared, at);
}

// One step of f32 operands, both [..][32]; `depth` of the 32 are not zero.
template <class Tile>
__device__ __forceinline__ void multiply_low_rank(typename Tile::Accumulators& acc, const typename Tile::Stage& stage,
                                                  int first_row, uint32_t depth) {
    const uint64_t left = descriptor_k_inner<128>(stage.left + first_row * 128),
                   right = descriptor_k_inner<128>(stage.right);
#pragma unroll
    for (int k = 0; k < Tile::kLowRankDepth / 8; ++k)
        if (uint32_t(8 * k) < depth) {
#pragma unroll
            for (int m = 0; m < Tile::kM; ++m)
                ptx::wgmma_m64k8_tf32<Tile::kCols>(acc[m], left + descriptor_step(m * 64 * 128 + 32 * k),
                                                   right + descriptor_step(32 * k), true);
        }
}

// Adds what is constant over the rows to 64 columns of the accumulators, from column `col` of the projection on.
template <class Tile>
__device__ __forceinline__ void add_constants(typename Tile::Accumulators& acc, const ProjectionPart& part, int first,
                                              uint32_t col) {
    using T = typename Tile::T;
    const uint32_t mine = col + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < Tile::kPiece / 4; ++i) {
        const uint32_t at = mine + i / 2 * 8 + i % 2;
        float constant = 0.0f;
        if (part.bias != 0 && at < part.out_dim) constant = bias_at<T>(part.bias, part.bias_typed, at);
        if (part.lora_bias != 0 && at < part.out_dim)
            constant = fmaf(part.scaling, bias_at<T>(part.lora_bias, part.lora_bias_typed, at), constant);
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m) {
            acc[m][first / 2 + i / 2 * 4 + i % 2] += constant;
            acc[m][first / 2 + i / 2 * 4 + i % 2 + 2] += constant;
        }
    }
}

// A warp's rows of a tile, from the accumulators to memory: 64 columns at a time. `loads`: how many residuals it has
// had.
template <class Tile>
__device__ __forceinline__ void store_forward(const ProjectionFwdSm90Params& p, typename Tile::Storage& shared,
                                              const ForwardWork& work, typename Tile::Accumulators& acc, int first_row,
                                              uint32_t& loads) {
    using T = typename Tile::T;
    const int warp = threadIdx.x / kWarp;
    const ProjectionPart& part = p.problem.parts[work.part];
    const uint32_t activation = p.problem.activation, row = work.row + first_row + warp % 4 * 16;
    const bool residual = p.problem.residual != 0;
    auto& pieces = shared.pieces[warp];
    ptx::griddepcontrol_wait();
#pragma unroll
    for (int c = 0; c < Tile::kCols; c += Tile::kPiece) {
        const uint32_t col = work.col + c;
        if (col >= part.out_dim) break;
        add_constants<Tile>(acc, part, c, col);
        wait_for_stores();
        if (p.problem.sum != 0) {
#pragma unroll
            for (int m = 0; m < Tile::kM; ++m) {
                write_piece<T>(pieces[m], acc[m], c, [](float(&)[8], unsigned char*) {});
                store_piece(p.sum[work.part], pieces[m], col, row + m * 64);
            }
            wait_for_stores();
        }
        if (residual) {
            if (threadIdx.x % kWarp == 0) {
                ptx::mbarrier_arrive_expect_tx(shared.loaded[warp], sizeof(pieces));
#pragma unroll
                for (int m = 0; m < Tile::kM; ++m)
                    ptx::cp_async_bulk_tensor(pieces[m], p.residual[work.part], shared.loaded[warp], col, row + m * 64);
            }
            ptx::mbarrier_wait_parity(shared.loaded[warp], loads++ % 2);
        }
#pragma unroll
        for (int m = 0; m < Tile::kM; ++m) {
            write_piece<T>(pieces[m], acc[m], c, [&](float(&values)[8], unsigned char* at) {
                activate(values, activation);
                if (residual) {
                    uint32_t r[4];
                    ptx::ldmatrix_x4(r, at);
                    T elements[8];
                    memcpy(elements, r, 16);
#pragma unroll
                    for (int i = 0; i < 8; ++i) values[i] += to_float(elements[i]);
                }
            });
            store_piece(p.out[work.part], pieces[m], col, row + m * 64);
        }
    }
}

template <class Tile>
__device__ __forceinline__ void multiply_forward(const ProjectionFwdSm90Params& p, typename Tile::Storage& shared,
                                                 int group) {
    const int first_row = Tile::kPingPong ? 0 : group * Tile::kM * 64;
    RingPosition<Tile::kStages> at;
    uint32_t loads = 0, turn = 0;
#pragma unroll 1
    for (uint32_t tile = first_tile<Tile>(); tile < p.tiles; tile += clusters<Tile>(), ++turn) {
        const ForwardWork work = forward_work<Tile>(p, tile);
        if (Tile::kPingPong && turn % 2 != uint32_t(group)) {
            at.advance(work.steps);
            continue;
        }
        typename Tile::Accumulators acc;
        bool add = false;
        uint32_t busy = 0;
        wait_for_turn<Tile>(shared, group, turn / 2);
        run_steps<Tile>(shared, at, acc, 0, work.base, busy,
                        [&](const auto& stage, uint32_t) { multiply_stage<Tile, false>(acc, stage, first_row, add); });
        const uint32_t rank = p.problem.parts[work.part].rank;
        run_steps<Tile>(shared, at, acc, work.base, work.steps, busy, [&](const auto& stage, uint32_t step) {
            multiply_low_rank<Tile>(acc, stage, first_row, rank - (step - work.base) * Tile::kLowRankDepth);
        });
        pass_turn<Tile>(shared, group);
        finish_steps<Tile>(shared, acc, busy);
        store_forward<Tile>(p, shared, work, acc, first_row, loads);
    }
}

template <class Tile> __device__ __forceinline__ void projection_fwd_sm90(const ProjectionFwdSm90Params& p) {
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    run_warpgroups<Tile>(
        shared, [&] { load_forward<Tile>(p, shared); }, [&](int group) { multiply_forward<Tile>(p, shared, group); });
}
