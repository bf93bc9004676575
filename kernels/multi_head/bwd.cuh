// The gradients of multi_head/fwd.cuh:
//
//   P = exp(S - max) / sum      dP[n, m] = dO_n . v_m      dS = P (dP - D)      D_n = dO_n . O_n
//   dq_n = scale sum_m dS[n, m] k_m        dk_m = scale sum_n dS[n, m] q_n        dv_m = sum_n P[n, m] dO_n
//
// Two passes compute the weights anew. The query pass holds queries and streams keys, the key pass holds keys and
// streams queries. Where the entries share q, the query pass streams the keys of all entries. Several blocks may share
// out the columns of a row; sum_partials/sum_partials.cu adds their sums.
#pragma once
#include "multi_head/common.cuh"

// D, beside maximum and inverse sum; a thread a row. Rows are counted as they lie in memory.
template <class T> __device__ __forceinline__ void multi_head_bwd_rows(const MultiHeadBwdRowsParams& p) {
    const MultiHeadShape& s = p.shape;
    const uint64_t index = uint64_t(blockIdx.x) * MULTI_HEAD_THREADS + threadIdx.x, token = index / s.num_heads;
    if (token >= uint64_t(s.batch) * s.queries) return;
    const uint32_t head = index % s.num_heads;
    const T* dout = head_of<const T>(p.dout, s, token, head);
    float delta = 0.0f;
    if (p.exact != 0) {
        const float* out = head_of<const float>(p.exact, s, token, head);
        for (uint32_t c = 0; c < s.head_dim; ++c) delta = fmaf(to_float(dout[c]), out[c], delta);
    } else {
        const T* out = head_of<const T>(p.out, s, token, head);
        for (uint32_t c = 0; c < s.head_dim; ++c) delta = fmaf(to_float(dout[c]), to_float(out[c]), delta);
    }
    const uint64_t row = (token / s.queries * s.num_heads + head) * s.queries + token % s.queries;
    float statistics[2];
    load(statistics, global<const float>(p.statistics) + 2 * row);
    store(global<float>(p.rows) + 4 * row, {finite_maximum(statistics[0]), 1.0f / statistics[1], delta, 0.0f});
}

template <class Tile, bool kByKey> __device__ __forceinline__ void multi_head_bwd(const MultiHeadBwdParams& p) {
    using T = typename Tile::T;
    constexpr int kColumns = Tile::kColumns;
    auto& shared = ptx::shared_storage<typename Tile::BackwardStorage>();
    const MultiHeadShape& s = p.shape;
    const uint32_t rows = kByKey ? s.keys : s.queries, columns = kByKey ? s.queries : s.keys;
    const uint32_t blocks = ceil_div(rows, uint32_t(Tile::kRows)), unit = blockIdx.x / blocks;
    const uint32_t first_entry = unit / s.num_heads, head = unit % s.num_heads;
    const uint32_t first = blockIdx.x % blocks * Tile::kRows;
    // A step is a tile of columns of an entry.
    const uint32_t tiles = ceil_div(columns, uint32_t(kColumns)), entries = !kByKey && s.shared_q ? s.batch : 1;
    const uint32_t begin = blockIdx.y * s.split_tiles, end = min(entries * tiles, begin + s.split_tiles);

    const auto query_of = [&](device_ptr tensor, uint32_t entry, uint32_t n) {
        return head_of<const T>(tensor, s, uint64_t(entry) * s.queries + n, head);
    };
    const auto key_of = [&](device_ptr tensor, uint32_t entry, uint32_t m) {
        return head_of<const T>(tensor, s, uint64_t(entry) * s.keys + m, head);
    };
    const auto statistics_of = [&](uint32_t entry, uint32_t n) {
        return global<const float>(p.rows) + 4 * ((uint64_t(entry) * s.num_heads + head) * s.queries + n);
    };
    const auto copy = [&](uint32_t step) {
        if (step < end) {
            const uint32_t entry = first_entry + step / tiles, column = step % tiles * kColumns;
            auto& stage = shared.stages[step % 2];
            if constexpr (kByKey) {
                copy_tokens<Tile>(stage[0], s, query_of(p.q, s.shared_q ? 0 : entry, column), columns - column);
                copy_tokens<Tile>(stage[1], s, query_of(p.dout, entry, column), columns - column);
                // Zeros, and so no weight, for queries that do not exist.
                for (uint32_t n = threadIdx.x; n < kColumns; n += Tile::kThreads) {
                    const bool exists = n < columns - column;
                    ptx::cp_async<16>(shared.statistics[step % 2][n], statistics_of(entry, exists ? column + n : 0),
                                      exists);
                }
            } else {
                copy_tokens<Tile>(stage[0], s, key_of(p.k, entry, column), columns - column);
                copy_tokens<Tile>(stage[1], s, key_of(p.v, entry, column), columns - column);
            }
            if (step == begin || column == 0) {
                const T* second = kByKey ? key_of(p.v, entry, first) : query_of(p.dout, entry, first);
                copy_tokens<Tile>(shared.rows[entry % 2], s, second, rows - first);
            }
        }
        ptx::cp_async_commit_group();
    };

    const int warp = threadIdx.x / kWarp, lane = lane_id(), g = lane / 4, t = lane % 4;
    const uint32_t first_row = first + 16 * warp + g;
    const T* left = kByKey ? key_of(p.k, first_entry, first) : query_of(p.q, s.shared_q ? 0 : first_entry, first);
    copy_tokens<Tile>(shared.rows[0], s, left, rows - first);
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    FragmentA<T> scored[Tile::kDim / 16], graded[Tile::kDim / 16];
    load_rows<Tile>(scored, shared.rows[0]);
    __syncthreads();
    copy(begin);

    const float scale = s.softmax_scale * kLog2e, one[2] = {1.0f, 1.0f};
    float statistics[2][4] = {}, sums[kByKey ? 2 : 1][Tile::kDim / 8][4] = {};
    for (uint32_t step = begin; step < end; ++step) {
        copy(step + 1);
        ptx::cp_async_wait_group<1>();
        __syncthreads();  // everybody's copies of this step have landed
        const uint32_t entry = first_entry + step / tiles, column = step % tiles * kColumns;
        if (step == begin || column == 0) {
            load_rows<Tile>(graded, shared.rows[entry % 2]);
            if constexpr (!kByKey)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (first_row + 8 * half < rows) load(statistics[half], statistics_of(entry, first_row + 8 * half));
        }
        const auto& stage = shared.stages[step % 2];
        float weights[kColumns / 8][4], grads[kColumns / 8][4];
        multiply<Tile>(weights, scored, stage[0]);
        multiply<Tile>(grads, graded, stage[1]);
#pragma unroll
        for (int n = 0; n < kColumns / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = 8 * n + 2 * t + i % 2;
                const float* of_row = kByKey ? shared.statistics[step % 2][at] : statistics[i / 2];
                const bool exists = kByKey || uint32_t(at) < columns - column;
                const float weight = ptx::ex2_approx(fmaf(weights[n][i], scale, -of_row[0])) * of_row[1];
                weights[n][i] = exists ? weight : 0.0f;
                grads[n][i] = weights[n][i] * (grads[n][i] - of_row[2]);
            }
        accumulate<Tile>(sums[0], one, grads, stage[0]);
        if constexpr (kByKey) accumulate<Tile>(sums[1], one, weights, stage[1]);
        __syncthreads();  // nobody reads this stage any more
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t row = first_row + 8 * half;
        if (row >= rows) continue;
        const uint64_t token = uint64_t(first_entry) * rows + row;
#pragma unroll
        for (int i = 0; i < (kByKey ? 2 : 1); ++i) {
            const float factor = i == 0 ? s.softmax_scale : 1.0f;
            if (p.split_stride == 0) store_row<Tile>(head_of<T>(p.grads[i], s, token, head), s, sums[i], half, factor);
            else
                store_row<Tile>(head_of<float>(p.grads[i], s, token, head) + blockIdx.y * p.split_stride, s, sums[i],
                                half, factor);
        }
    }
}
