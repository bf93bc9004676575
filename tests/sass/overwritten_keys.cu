// The loop of the attention's key pass, without dropout, in a form that ptxas before CUDA 13.1 gets wrong. It overwrites
// the keys and values that wgmma reads from registers in every step: eight operands, which scripts/check-sass.py has to
// find. Only its machine code is wanted; nothing launches it.
#include "rel_pos_attention/sm90/bwd_key.cuh"

using Block = KeyBlock<__nv_bfloat16, 64, 64, true>;

__device__ __forceinline__ void consume(const RelPosAttentionBwdKeySm90Params& p, Block::Storage& shared) {
    using T = Block::T;
    constexpr int kDim = Block::kDim, kKeys = Block::kKeys, kQueries = Block::kQueries, kCols = Block::kCols;
    const RelPosAttentionShape& s = p.shape;
    const KeyBlockWork<Block> work(s);
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const uint32_t first = 16 * warp, row = first / kCols, column[2] = {first % kCols + g, first % kCols + g + 8};
    const float scale = s.softmax_scale * kLog2e;

    uint32_t keys[kDim / 16][4], values[kDim / 16][4];
    ptx::mbarrier_wait_parity(shared.keys_full, 0);
    load_left<kKeys, kDim>(keys, shared.keys, first);
    load_left<kKeys, kDim>(values, shared.values, first);
    const auto query_of = [t](int n) { return 8 * (n / 4) + 2 * t + n % 2; };
    ChannelSums<kDim> dk, dv;
    float scores[kQueries / 2], dweights[kQueries / 2];
    uint32_t weights[kQueries / 16][4], dscores[kQueries / 16][4];
    for (uint32_t step = 0; step < work.steps; ++step) {
        const auto& stage = shared.stages[step % Block::kStages];
        ptx::mbarrier_wait_parity(shared.full[step % Block::kStages], step / Block::kStages % 2);
        ptx::wgmma_fence();
        multiply_rows<T, kDim, kQueries>(scores, keys, stage.queries);
        multiply_rows<T, kDim, kQueries>(dweights, values, stage.dout);
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_pin(scores);
        dk.pin();
        dv.pin();
        if (step > 0 && lane == 0) ptx::mbarrier_arrive(shared.empty[(step - 1) % Block::kStages]);

#pragma unroll
        for (int n = 0; n < kQueries / 2; ++n) {
            const uint32_t query = query_of(n), half = n / 2 % 2;
            scores[n] = ptx::ex2_approx(
                fmaf(scores[n], scale, stage.rel_w[query][column[half]] + stage.rel_h[query][row]));
        }
        const uint32_t begin = step * kQueries;
        if (begin + kQueries > work.queries) {
#pragma unroll
            for (int n = 0; n < kQueries / 2; ++n)
                if (begin + query_of(n) >= work.queries) scores[n] = 0.0f;
        }
        pack_weights<T, kQueries>(weights, scores);
        ptx::wgmma_fence();
        add_weighted<T, kDim, kQueries>(dv, weights, stage.dout);
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_pin(dweights);
#pragma unroll
        for (int n = 0; n < kQueries / 2; ++n)
            dweights[n] = scores[n] * (dweights[n] - stage.delta[query_of(n)]);
        pack_weights<T, kQueries>(dscores, dweights);
        ptx::wgmma_fence();
        add_weighted<T, kDim, kQueries>(dk, dscores, stage.queries);
    }
    ptx::wgmma_wait_group<0>();
    dk.pin();
    dv.pin();
    const float ones[2] = {1.0f, 1.0f};
    T *dkeys[2] = {global<T>(p.dqkv), global<T>(p.dqkv) + g}, *dvalues[2] = {dkeys[1] + warp, dkeys[1] + lane};
    store_rows<T, kDim>(dk, ones, dkeys);
    store_rows<T, kDim>(dv, ones, dvalues);
}

KERNEL(overwritten_keys, RelPosAttentionBwdKeySm90Params, REL_POS_ATTENTION_SM90_BWD_KEY_THREADS, 1) {
    auto& shared = ptx::shared_storage<Block::Storage>();
    if (ptx::shfl_idx(threadIdx.x / kGroup, 0) == Block::kGroups) {
        ptx::setmaxnreg_dec<24>();
        if (threadIdx.x % kGroup == 0) load_queries_for_keys<Block>(p, shared);
    } else {
        ptx::setmaxnreg_inc<240>();
        consume(p, shared);
    }
}
