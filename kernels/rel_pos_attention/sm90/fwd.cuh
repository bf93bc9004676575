// The forward of rel_pos_attention (see rel_pos_attention/fwd.cuh) on sm_90a, for windows that the grid is a whole
// number of: TMA, wgmma, and warpgroups with different tasks.
//
// A block of queries and its ring of slots are as in rel_pos_attention/sm90/stream.cuh. Through the ring come rows of
// the tables, then
//
//   K_0  K_1 V_0  K_2 V_1  ...  V_last
//
// since a warpgroup starts the product with the next keys before that with the last values. The softmax of the next
// scores runs beside the product with the values. Two warpgroups take turns at starting products, so that the
// tensor cores work for one while the other computes its softmax. Three need no turns: one of them always has products
// to start.
//
// The online softmax is the portable kernel's, in base 2. The tile is row-aligned, so rel_w is a register fragment for
// all of a stripe. The maximum includes rel_h, one number per query and key row.
#pragma once
#include "rel_pos_attention/sm90/stream.cuh"

template <class Tile>
__device__ __forceinline__ void load_stream(const RelPosAttentionFwdSm90Params& p, typename Tile::Storage& shared) {
    const StreamWork<Tile> work(p.shape, blockIdx.x);
    StreamLoader<Tile> ring{shared};
    ptx::mbarrier_arrive_expect_tx(shared.queries_full, Tile::kQueryBytes);
    ring.queries(shared.queries, p.qkv_maps, work);
    if (p.tables[0] != 0) ring.tables(p.table_maps, work);
    ring.keys(p.qkv_maps, work, 0, 1);
    for (uint32_t tile = 1; tile < work.tiles; ++tile) {
        ring.keys(p.qkv_maps, work, tile, 1);
        ring.keys(p.qkv_maps, work, tile - 1, 2);
    }
    ring.keys(p.qkv_maps, work, work.tiles - 1, 2);
}

template <class Tile>
__device__ __forceinline__ void consume_stream(const RelPosAttentionFwdSm90Params& p, typename Tile::Storage& shared) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim, kCols = Tile::kCols, kKeys = Tile::kKeys, kQueries = Tile::kQueries;
    constexpr bool kTurns = Tile::kGroups == 2;
    const RelPosAttentionShape& s = p.shape;
    const StreamWork<Tile> work(s, blockIdx.x);
    const AttentionUnit& unit = work.unit;
    const uint32_t group = ptx::shfl_idx(threadIdx.x / kGroup, 0), warp = threadIdx.x / kWarp,
                   lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    StreamReader<Tile> ring{shared};

    Token query[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t row = 16 * warp + g + 8 * half;
        query[half] = work.query(row);
        exists[half] = work.exists(row);
    }

    const Biases<Tile> bias(s, reinterpret_cast<float*>(&shared + 1));
    ptx::mbarrier_wait_parity(shared.queries_full, 0);
    project_tables(bias, ring, work, group, p.tables[0] != 0);
    const float *rel_h = bias.h + (16 * warp + g) * bias.stride_h, *rel_w = bias.w + (16 * warp + g) * bias.stride_w;

    const float scale = s.softmax_scale * kLog2e;
    float fragment_w[kCols / 2], scores[kKeys / 2], rescale[2];
    uint32_t weights[kKeys / 16][4];
    ChannelSums<kDim> out;
    OnlineSoftmax state;
    Token key{0, 0};
    const auto softmax = [&](auto with_dropout) {
        if (key.y == 0) {
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    fragment_w[4 * j + i] = rel_w[8 * (i / 2) * bias.stride_w + key.x + 8 * j + 2 * t + i % 2];
        }
        softmax_of_tile<Tile>(rescale, scores, state, fragment_w, rel_h + key.y, bias.stride_h, scale);
        if constexpr (decltype(with_dropout)::value) drop_weights<Tile>(scores, s, unit, query, key);
        key = work.key_after(key);
    };
    const auto multiply_keys = [&](const unsigned char* keys) {
        multiply_rows<T, kDim, kKeys, kQueries, kKeys>(scores, shared.queries, group * kGroupRows, keys);
    };

    const unsigned char* keys = ring.wait();
    ptx::wgmma_fence();
    multiply_keys(keys);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(scores);
    ring.release(ring.next - 1);
    const auto pass_keys = [&](auto with_dropout) {
        softmax(with_dropout);
        pack_weights<T, kKeys>(weights, scores);
        // Barrier 1 + group: the turn of that warpgroup, which the other one gives to it. The first has it.
        for (uint32_t tile = 1; tile < work.tiles; ++tile) {
            keys = ring.wait();
            if (kTurns && (tile > 1 || group == 1)) ptx::bar_sync(1 + group, 2 * kGroup);
            ptx::wgmma_fence();
            multiply_keys(keys);
            const unsigned char* values = ring.wait();
            ptx::wgmma_fence();
            add_weighted<T, kDim, kKeys>(out, weights, values);
            if (kTurns && (tile + 1 < work.tiles || group == 0)) ptx::bar_arrive(2 - group, 2 * kGroup);
            ptx::wgmma_wait_group<1>();
            ptx::wgmma_pin(scores);
            ring.release(ring.next - 2);
            softmax(with_dropout);
            ptx::wgmma_wait_group<0>();
            out.pin();
            ring.release(ring.next - 1);
            // The maximum of most rows stands after the first tiles.
            if (ptx::any(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
                for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) out.at(n, i) *= rescale[i / 2];
            }
            pack_weights<T, kKeys>(weights, scores);
        }
    };
    compile_twice(s.dropout, pass_keys);
    const unsigned char* values = ring.wait();
    ptx::wgmma_fence();
    add_weighted<T, kDim, kKeys>(out, weights, values);
    ptx::wgmma_wait_group<0>();
    out.pin();

    store_queries<T, kDim>(p, unit, query, exists, out, state);
}

template <class Tile>
__device__ __forceinline__ void rel_pos_attention_fwd_sm90(const RelPosAttentionFwdSm90Params& p) {
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    if (threadIdx.x == 0) {
        Tile::init_barriers(shared);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    // From one lane, so that the compiler knows it to be the same for the warp.
    if (ptx::shfl_idx(threadIdx.x / kGroup, 0) == Tile::kGroups) {
        ptx::setmaxnreg_dec<Tile::kLoaderRegisters>();
        if (threadIdx.x % kGroup == 0) load_stream<Tile>(p, shared);
    } else {
        ptx::setmaxnreg_inc<Tile::kRegisters>();
        consume_stream<Tile>(p, shared);
    }
}
