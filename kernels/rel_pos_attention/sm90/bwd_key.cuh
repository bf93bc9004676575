// The second pass of rel_pos_attention's backward (see rel_pos_attention/bwd_key.cuh) on sm_90a, for whole grids:
//
//   dv_m = sum_n dropout(P)[n, m] dO_n          dk_m = softmax_scale sum_n dS[n, m] q_n
//
// A block holds 128 keys of a unit, 64 for each of two warpgroups: whole stretches of kCols of grid rows. They stay in
// shared memory and, if InRegisters, as far as there is room, in registers. The first thread of a third warpgroup loads
// the unit's queries, 64 at a time. With them it loads the biases and delta that the query pass left; lse is taken off
// the biases. Products are transposed, keys as rows: S^T = k q^T and dP^T = v dO^T give P^T and dS^T, left operands
// without a transpose. The products with dO and q run on while the next ones with k and v start.
//
// Registers save a sixth of a step's traffic of shared memory. But some compilers overwrite them within the loop: the
// instances say which.
//
// Keys outside the grid hold arbitrary values: a row of keys depends on no other row, and theirs is not stored. Queries
// behind the last one are rows of zeros, and their weights are made zero.
#pragma once
#include "rel_pos_attention/sm90/common.cuh"

template <class Element, int Dim, int Cols, bool InRegisters> struct KeyBlock {
    using T = Element;
    static constexpr int kDim = Dim, kCols = Cols, kStages = 4, kGroups = 2;
    static constexpr int kKeys = kGroups * kGroupRows, kRows = kKeys / Cols, kBoxRows = kRows,
                         kThreads = kGroup * (kGroups + 1);
    static constexpr int kQueries = REL_POS_ATTENTION_SM90_BWD_KEY_QUERIES;
    static_assert(kKeys == REL_POS_ATTENTION_SM90_BWD_KEYS && kThreads == REL_POS_ATTENTION_SM90_BWD_KEY_THREADS);
    static_assert(Cols % 8 == 0,
                  "the eight rows of an accumulator must belong to one key row: rel_h is read once for them");
    static constexpr bool kKeysInRegisters = InRegisters;
    // With longer rows there are not registers enough for both.
    static constexpr bool kValuesInRegisters = InRegisters && Dim == kWide;
    // Four more columns than there are keys: a lane's reads are in different banks. Boxes are whole 16 bytes.
    static constexpr int kStrideW = Cols + 4, kStrideH = (kRows + 3) / 4 * 4;
    static_assert(kStrideW % 16 == 4 || kStrideW % 16 == 12, "queries 0, 2, 4 and 6 lie 8 banks apart");
    struct Stage {
        alignas(1024) unsigned char queries[Panel<kQueries, Dim>::kBytes], dout[Panel<kQueries, Dim>::kBytes];
        float rel_w[kQueries][kStrideW], rel_h[kQueries][kStrideH], delta[kQueries];
    };
    static constexpr int kStageBytes = kQueries * (2 * Dim * 2 + (kStrideW + kStrideH + 1) * 4);
    struct Storage {
        Stage stages[kStages];
        alignas(1024) unsigned char keys[Panel<kKeys, Dim>::kBytes], values[Panel<kKeys, Dim>::kBytes];
        ptx::mbarrier keys_full, full[kStages], empty[kStages];
    };
};

// Which keys a block has.
template <class Block> struct KeyBlockWork {
    AttentionUnit unit;
    Token first;  // key
    uint32_t queries, steps;

    __device__ __forceinline__ KeyBlockWork(const RelPosAttentionShape& s) : unit(s, blockIdx.x / blocks(s)) {
        const uint32_t block = blockIdx.x % blocks(s), across = ceil_div(s.side_w, uint32_t(Block::kCols));
        first = {block / across * Block::kRows, block % across * Block::kCols};
        queries = unit.queries();
        steps = ceil_div(queries, uint32_t(Block::kQueries));
    }
    static __device__ __forceinline__ uint32_t blocks(const RelPosAttentionShape& s) {
        return ceil_div(s.side_h, uint32_t(Block::kRows)) * ceil_div(s.side_w, uint32_t(Block::kCols));
    }
};

template <class Block>
__device__ __forceinline__ void load_queries_for_keys(const RelPosAttentionBwdKeySm90Params& p,
                                                      typename Block::Storage& shared) {
    const KeyBlockWork<Block> work(p.shape);
    const AttentionUnit& unit = work.unit;
    const uint32_t channels = p.shape.num_heads * Block::kDim, head_column = unit.head * Block::kDim;
    const uint32_t pad_h = ceil_div(p.shape.side_h, 8u) * 8, first_row = uint32_t(unit.first_row());

    ptx::mbarrier_arrive_expect_tx(shared.keys_full, 2 * Block::kRows * Block::kCols * Block::kDim * 2);
    const auto load_keys = [&](unsigned char* panel, uint32_t part) {
        load_tokens<Block, Block::kKeys>(panel, Block::kRows, p.key_maps, shared.keys_full,
                                         part * channels + head_column, work.first.x, work.first.y, unit.image);
    };
    load_keys(shared.keys, 1);
    load_keys(shared.values, 2);
    for (uint32_t step = 0; step < work.steps; ++step) {
        const uint32_t query = step * Block::kQueries;
        auto& stage = shared.stages[step % Block::kStages];
        auto& full = shared.full[step % Block::kStages];
        ptx::mbarrier_wait_parity(shared.empty[step % Block::kStages], step / Block::kStages % 2 ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, Block::kStageBytes);
        load_rows<Block::kQueries, Block::kDim>(stage.queries, p.query_maps, full, head_column, query, unit.image);
        load_rows<Block::kQueries, Block::kDim>(stage.dout, p.dout_maps, full, head_column, query, unit.image);
        ptx::cp_async_bulk_tensor(stage.rel_w, p.rel_w_map, full, pad_h + work.first.x, first_row + query);
        ptx::cp_async_bulk_tensor(stage.rel_h, p.rel_h_map, full, work.first.y, first_row + query);
        ptx::cp_async_bulk_tensor(stage.delta, p.delta_map, full, first_row + query);
    }
}

template <class Block>
__device__ __forceinline__ void consume_queries_for_keys(const RelPosAttentionBwdKeySm90Params& p,
                                                         typename Block::Storage& shared) {
    using T = typename Block::T;
    constexpr int kDim = Block::kDim, kKeys = Block::kKeys, kQueries = Block::kQueries, kCols = Block::kCols;
    const RelPosAttentionShape& s = p.shape;
    const KeyBlockWork<Block> work(s);
    const AttentionUnit& unit = work.unit;
    const uint32_t group = ptx::shfl_idx(threadIdx.x / kGroup, 0), warp = threadIdx.x / kWarp,
                   lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    // This lane's two keys in the block's rows and columns. If 16 divides the columns, a warp's keys are in one row.
    const uint32_t first = 16 * warp, second = first + 8;
    const uint32_t row[2] = {first / kCols, kCols % 16 == 0 ? first / kCols : second / kCols};
    const uint32_t column[2] = {first % kCols + g, second % kCols + g};
    const Token key[2] = {{work.first.y + row[0], work.first.x + column[0]},
                          {work.first.y + row[1], work.first.x + column[1]}};
    const float scale = s.softmax_scale * kLog2e;

    [[maybe_unused]] uint32_t keys[kDim / 16][4], values[kDim / 16][4];
    ptx::mbarrier_wait_parity(shared.keys_full, 0);
    if constexpr (Block::kKeysInRegisters) load_left<kKeys, kDim>(keys, shared.keys, first);
    if constexpr (Block::kValuesInRegisters) load_left<kKeys, kDim>(values, shared.values, first);

    // Query of the step that element n of a lane's accumulators belongs to; its key is number n / 2 % 2.
    const auto query_of = [t](int n) { return 8 * (n / 4) + 2 * t + n % 2; };
    ChannelSums<kDim> dk, dv;
    float scores[kQueries / 2], dweights[kQueries / 2];
    uint32_t weights[kQueries / 16][4], dscores[kQueries / 16][4];
    [[maybe_unused]] const uint32_t first_key = group * kGroupRows;
    const auto pass_queries = [&](auto with_dropout) {
        constexpr bool kDropout = decltype(with_dropout)::value;
        for (uint32_t step = 0; step < work.steps; ++step) {
            const auto& stage = shared.stages[step % Block::kStages];
            ptx::mbarrier_wait_parity(shared.full[step % Block::kStages], step / Block::kStages % 2);
            ptx::wgmma_fence();
            if constexpr (Block::kKeysInRegisters) multiply_rows<T, kDim, kQueries>(scores, keys, stage.queries);
            else multiply_rows<T, kDim, kQueries, kKeys, kQueries>(scores, shared.keys, first_key, stage.queries);
            if constexpr (Block::kValuesInRegisters) multiply_rows<T, kDim, kQueries>(dweights, values, stage.dout);
            else multiply_rows<T, kDim, kQueries, kKeys, kQueries>(dweights, shared.values, first_key, stage.dout);
            ptx::wgmma_wait_group<1>();  // the scores, and all products of the step before
            ptx::wgmma_pin(scores);
            dk.pin();
            dv.pin();
            if (step > 0 && lane == 0) ptx::mbarrier_arrive(shared.empty[(step - 1) % Block::kStages]);

#pragma unroll
            for (int n = 0; n < kQueries / 2; ++n) {
                const uint32_t query = query_of(n), half = n / 2 % 2;
                scores[n] = ptx::ex2_approx(
                    fmaf(scores[n], scale, stage.rel_w[query][column[half]] + stage.rel_h[query][row[half]]));
            }
            const uint32_t begin = step * kQueries;
            if (begin + kQueries > work.queries) {
#pragma unroll
                for (int n = 0; n < kQueries / 2; ++n)
                    if (begin + query_of(n) >= work.queries) scores[n] = 0.0f;
            }
            [[maybe_unused]] uint32_t kept = 0;
            if constexpr (kDropout) {
#pragma unroll 1
                for (uint32_t n = 0; n < kQueries / 2; ++n) {
                    const Token at = n / 2 % 2 == 0 ? key[0] : key[1];
                    const uint64_t row = unit.first_row() + begin + query_of(n);
                    kept |= uint32_t(dropout_keeps(s.dropout, row, at.y * s.side_w + at.x)) << n;
                }
            }
            const auto dropped = [&](float x, int n) { return kDropout ? x * dropout_factor(s.dropout, kept, n) : x; };
#pragma unroll
            for (int k = 0; k < kQueries / 16; ++k)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int n = 8 * k + 2 * i;
                    weights[k][i] = pack<T>(dropped(scores[n], n), dropped(scores[n + 1], n + 1));
                }
            ptx::wgmma_fence();
            add_weighted<T, kDim, kQueries>(dv, weights, stage.dout);
            ptx::wgmma_wait_group<1>();  // the weights' gradients
            ptx::wgmma_pin(dweights);
#pragma unroll
            for (int n = 0; n < kQueries / 2; ++n)
                dweights[n] = scores[n] * (dropped(dweights[n], n) - stage.delta[query_of(n)]);
            pack_weights<T, kQueries>(dscores, dweights);
            ptx::wgmma_fence();
            add_weighted<T, kDim, kQueries>(dk, dscores, stage.queries);
        }
    };
    compile_twice(s.dropout, pass_queries);
    ptx::wgmma_wait_group<0>();
    dk.pin();
    dv.pin();

    const uint64_t channels = s.num_heads * kDim;
    const float scales[2] = {s.softmax_scale, s.softmax_scale}, ones[2] = {1.0f, 1.0f};
    T *dkeys[2] = {}, *dvalues[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (row[half] < Block::kRows && unit.on_grid(key[half])) {
            dkeys[half] = global<T>(p.dqkv) + unit.token(key[half]) * 3 * channels + channels + unit.head * kDim;
            dvalues[half] = dkeys[half] + channels;
        }
    store_rows<T, kDim>(dk, scales, dkeys);
    store_rows<T, kDim>(dv, ones, dvalues);
}

template <class Block>
__device__ __forceinline__ void rel_pos_attention_bwd_key_sm90(const RelPosAttentionBwdKeySm90Params& p) {
    auto& shared = ptx::shared_storage<typename Block::Storage>();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(shared.keys_full, 1);
        for (int i = 0; i < Block::kStages; ++i) {
            ptx::mbarrier_init(shared.full[i], 1);
            ptx::mbarrier_init(shared.empty[i], Block::kGroups * kGroup / kWarp);  // one lane of each warp
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    // From one lane, so that the compiler knows it to be the same for the warp.
    if (ptx::shfl_idx(threadIdx.x / kGroup, 0) == Block::kGroups) {
        ptx::setmaxnreg_dec<24>();
        if (threadIdx.x % kGroup == 0) load_queries_for_keys<Block>(p, shared);
    } else {
        ptx::setmaxnreg_inc<240>();
        consume_queries_for_keys<Block>(p, shared);
    }
}
