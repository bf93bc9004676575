// Attention between two sets of tokens (see multi_head/common.cuh):
//
//   S[n, m] = softmax_scale q_n . k_m          O = softmax(S) V
//
// Tiles of keys stream past a block's queries under an online softmax in base 2. Few queries would leave most of a GPU
// idle, so several blocks share out the keys. Each leaves sums relative to its own maximum, and `combine` adds them.
#pragma once
#include "multi_head/common.cuh"

template <class Tile> __device__ __forceinline__ void multi_head_fwd(const MultiHeadFwdParams& p) {
    using T = typename Tile::T;
    constexpr int kColumns = Tile::kColumns;
    auto& shared = ptx::shared_storage<typename Tile::ForwardStorage>();
    const MultiHeadShape& s = p.shape;
    const uint32_t blocks = ceil_div(s.queries, uint32_t(Tile::kRows)), unit = blockIdx.x / blocks;
    const uint32_t entry = unit / s.num_heads, head = unit % s.num_heads;
    const uint32_t first = blockIdx.x % blocks * Tile::kRows;
    const uint64_t first_key = uint64_t(entry) * s.keys;
    const uint32_t begin = blockIdx.y * s.split_tiles, tiles = ceil_div(s.keys, uint32_t(kColumns)),
                   end = min(tiles, begin + s.split_tiles);

    const auto copy = [&](uint32_t tile) {
        if (tile < end) {
            auto& stage = shared.stages[tile % 2];
            const uint32_t key = tile * kColumns;
            copy_tokens<Tile>(stage[0], s, head_of<const T>(p.k, s, first_key + key, head), s.keys - key);
            copy_tokens<Tile>(stage[1], s, head_of<const T>(p.v, s, first_key + key, head), s.keys - key);
        }
        ptx::cp_async_commit_group();
    };
    const uint64_t first_query = uint64_t(s.shared_q ? 0 : entry) * s.queries + first;
    copy_tokens<Tile>(shared.rows, s, head_of<const T>(p.q, s, first_query, head), s.queries - first);
    copy(begin);

    const int warp = threadIdx.x / kWarp, lane = lane_id(), g = lane / 4, t = lane % 4;
    const float scale = s.softmax_scale * kLog2e;
    FragmentA<T> q[Tile::kDim / 16];
    float out[Tile::kDim / 8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
    for (uint32_t tile = begin; tile < end; ++tile) {
        copy(tile + 1);
        ptx::cp_async_wait_group<1>();
        __syncthreads();  // everybody's copies of this tile have landed, and with the first one the queries
        if (tile == begin) load_rows<Tile>(q, shared.rows);
        const auto& stage = shared.stages[tile % 2];
        float scores[kColumns / 8][4], rescale[2];
        multiply<Tile>(scores, q, stage[0]);
        const uint32_t keys = s.keys - tile * kColumns;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float max = row_max[half];
#pragma unroll
            for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    const bool exists = uint32_t(8 * n + 2 * t + i % 2) < keys;
                    scores[n][i] = exists ? scores[n][i] * scale : -INFINITY;
                    max = fmaxf(max, scores[n][i]);
                }
            max = quad_max(max);
            const float reference = finite_maximum(max);
            rescale[half] = ptx::ex2_approx(row_max[half] - reference);
            row_max[half] = max;
            row_sum[half] *= rescale[half];
#pragma unroll
            for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    scores[n][i] = ptx::ex2_approx(scores[n][i] - reference);
                    row_sum[half] += scores[n][i];
                }
        }
        accumulate<Tile>(out, rescale, scores, stage[1]);
        __syncthreads();  // nobody reads this stage any more
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t n = first + 16 * warp + g + 8 * half;
        const float sum = quad_sum(row_sum[half]);
        if (n >= s.queries) continue;
        const uint64_t row = uint64_t(unit) * s.queries + n, token = uint64_t(entry) * s.queries + n;
        if (p.splits > 1) {
            const uint64_t rows = uint64_t(s.batch) * s.num_heads * s.queries;
            float* partial = global<float>(p.partials) + (blockIdx.y * rows + row) * (s.head_dim + 2);
            store_row<Tile>(partial, s, out, half, 1.0f);
            if (t != 0) continue;
            partial[s.head_dim] = row_max[half];
            partial[s.head_dim + 1] = sum;
            continue;
        }
        const float inverse = 1.0f / sum;
        store_row<Tile>(head_of<T>(p.out, s, token, head), s, out, half, inverse);
        if (p.exact != 0) store_row<Tile>(head_of<float>(p.exact, s, token, head), s, out, half, inverse);
        if (p.statistics != 0 && t == 0) store(global<float>(p.statistics) + 2 * row, {row_max[half], sum});
    }
}

// Adds what the blocks of a row have left, in order; a thread for each channel.
template <class T> __device__ __forceinline__ void multi_head_fwd_combine(const MultiHeadFwdParams& p) {
    const MultiHeadShape& s = p.shape;
    const uint64_t index = uint64_t(blockIdx.x) * MULTI_HEAD_THREADS + threadIdx.x;
    const uint64_t rows = uint64_t(s.batch) * s.num_heads * s.queries, row = index / s.head_dim;
    const uint32_t channel = index % s.head_dim;
    if (row >= rows) return;
    const uint64_t length = s.head_dim + 2;
    const float* partials = global<const float>(p.partials) + row * length;
    float max = -INFINITY;
    for (uint64_t split = 0; split < p.splits; ++split)
        max = fmaxf(max, partials[split * rows * length + s.head_dim]);
    const float reference = finite_maximum(max);
    float value = 0.0f, sum = 0.0f;
    for (uint64_t split = 0; split < p.splits; ++split) {
        const float* partial = partials + split * rows * length;
        const float factor = ptx::ex2_approx(partial[s.head_dim] - reference);
        value = fmaf(partial[channel], factor, value);
        sum = fmaf(partial[s.head_dim + 1], factor, sum);
    }
    const uint64_t unit = row / s.queries, token = unit / s.num_heads * s.queries + row % s.queries;
    const uint32_t head = unit % s.num_heads;
    head_of<T>(p.out, s, token, head)[channel] = from_float<T>(value / sum);
    if (p.exact != 0) head_of<float>(p.exact, s, token, head)[channel] = value / sum;
    if (p.statistics != 0 && channel == 0) store(global<float>(p.statistics) + 2 * row, {max, sum});
}
