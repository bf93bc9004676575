// The forward of rel_pos_attention (see rel_pos_attention/fwd.cuh) in windows on Hopper: a unit at a time, on chip.
//
// Each persistent block, one a multiprocessor, takes every gridDim.x-th unit. While its warps work on one unit, a row
// of queries each, the next unit's q, k and v are copied into the other stage. The tables stay. A warp's scores come
// two key rows at a time, under an online softmax in base 2. For all key rows rel_w is one fragment; rel_h is in the
// accumulators of its product and goes round by shuffles.
//
// SAM's ViT-B: 75 KB in, 25 KB out for 300 units an image and layer.
#pragma once
#include "rel_pos_attention/sm90/window.cuh"

template <class Tile> struct WindowForwardStorage {
    struct alignas(16) Stage {
        typename Tile::Row q[Tile::kTokens], keys[Tile::kTokens], values[Tile::kTokens];
    };
    Stage stages[2];
    typename Tile::Row tables[Tile::kTableRows];
    float rel_w[Tile::kWarps][Tile::kSide][Tile::kSide];
};

// A lane's two queries, g and g + 8 of the row.
template <class Tile> struct WindowQueries {
    // q's 80 channels and their sums do not fit in the 128 registers of a thread: q is read anew.
    static constexpr bool kStay = Tile::kDim <= 64;
    FragmentA<typename Tile::T> q[Tile::kDim / 16];
    float rel_h[2][4] = {}, fragment_w[2][4];
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {}, out[Tile::kDim / 8][4] = {};
};

// The keys of a step, as dropout counts them.
struct TwoKeyRows {
    static constexpr int kCols = 16, kRows = 2, kKeys = kCols * kRows;
};

// The key rows y and y + 1, y even. The second may be behind the window's end: its rel_h is minus infinity.
template <class Tile>
__device__ __forceinline__ void attend_key_rows(
    WindowQueries<Tile>& state, const AttentionUnit& unit, const typename Tile::Row* queries,
    const typename Tile::Row* keys, const typename Tile::Row* values, uint32_t y) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim, kStride = Tile::kStride;
    const RelPosAttentionShape& s = unit.s;
    const uint32_t lane = threadIdx.x % kWarp, first[2] = {y * s.side_w, min(y + 1, s.side_h - 1) * s.side_w};
    const float scale = s.softmax_scale * kLog2e;

    float scores[4][4] = {};
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
        if constexpr (!WindowQueries<Tile>::kStay) load_a_of_row(state.q[k], queries, s.side_w, 16 * k);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            FragmentB<T> b[2];
            load_b(b, &keys[first[r]][16 * k], kStride);
            mma(scores[2 * r], state.q[k], b[0]);
            mma(scores[2 * r + 1], state.q[k], b[1]);
        }
    }

    // Each lane compares its own scores with the maximum, so that only a rise takes shuffles.
    float bias_h[2][2], new_max[2];
    bool rises = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        new_max[half] = state.row_max[half];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            // Lane t of four has key rows 2 t and 2 t + 1 of eight.
            const int i = 2 * half + r;
            bias_h[r][half] =
                ptx::shfl_idx(y < 8 ? state.rel_h[0][i] : state.rel_h[1][i], int(lane / 4 * 4 + y % 8 / 2));
            float row = -INFINITY;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float& score = scores[2 * r + j / 2][2 * half + j % 2];
                score = fmaf(score, scale, state.fragment_w[j / 2][2 * half + j % 2]);
                row = fmaxf(row, score);
            }
            new_max[half] = fmaxf(new_max[half], row + bias_h[r][half]);
        }
        rises |= new_max[half] > state.row_max[half] + kMaximumRise<T>;
    }
    if (ptx::any(rises)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            new_max[half] = quad_max(new_max[half]);
            const float rescale = ptx::ex2_approx(state.row_max[half] - finite_maximum(new_max[half]));
            state.row_max[half] = new_max[half];
            state.row_sum[half] *= rescale;
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n) {
                state.out[n][2 * half] *= rescale;
                state.out[n][2 * half + 1] *= rescale;
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float reference = finite_maximum(state.row_max[half]);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                float& score = scores[2 * r + j / 2][2 * half + j % 2];
                score = ptx::ex2_approx(score + (bias_h[r][half] - reference));
                state.row_sum[half] += score;
            }
        if (s.dropout.threshold != 0) {
            const Token query{threadIdx.x / kWarp, lane / 4 + 8 * half};
            const auto kept = kept_keys<TwoKeyRows>(s, unit.dropout_row(query), y, 0);
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) scores[n][2 * half + i] *= dropout_factor(s.dropout, kept, 2 * n + i);
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        FragmentA<T> weights;
        make_a(weights, scores[2 * r], scores[2 * r + 1]);
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
            FragmentB<T> b[2];
            load_b_trans(b, &values[first[r]][16 * n], kStride);
            mma(state.out[2 * n], weights, b[0]);
            mma(state.out[2 * n + 1], weights, b[1]);
        }
    }
}

template <class Tile>
__device__ __forceinline__ void rel_pos_attention_window_fwd_sm90(const RelPosAttentionWindowFwdParams& p) {
    using T = typename Tile::T;
    using Storage = WindowForwardStorage<Tile>;
    constexpr int kDim = Tile::kDim;
    auto& shared = ptx::shared_storage<Storage>();
    const RelPosAttentionShape& s = p.shape;
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const uint64_t channels = s.num_heads * kDim;
    const T *qkv = global<const T>(p.qkv), *pad = p.pad == 0 ? nullptr : global<const T>(p.pad);
    if (p.tables[0] != 0) copy_tables<Tile>(shared.tables, s, Tables<T>(p.tables));

    const auto start_copying = [&](uint32_t index, typename Storage::Stage& to) {
        if (index < p.units && warp < s.side_h) {
            const AttentionUnit unit(s, index);
            const T *from = qkv + unit.head * kDim, *outside = pad == nullptr ? nullptr : pad + unit.head * kDim;
            copy_window_row<Tile>(to.keys, unit, warp, from + channels, 3 * channels,
                                  outside == nullptr ? nullptr : outside + channels);
            copy_window_row<Tile>(to.values, unit, warp, from + 2 * channels, 3 * channels,
                                  outside == nullptr ? nullptr : outside + 2 * channels);
            if (warp < unit.valid_h) copy_window_row<Tile>(to.q, unit, warp, from, 3 * channels, nullptr);
        }
        ptx::cp_async_commit_group();
    };
    start_copying(blockIdx.x, shared.stages[0]);
#pragma unroll 1
    for (uint32_t index = blockIdx.x, step = 0; index < p.units; index += gridDim.x, ++step) {
        ptx::cp_async_wait_group<0>();
        __syncthreads();  // this stage is full, and nobody reads the other one any more
        auto& stage = shared.stages[step % 2];
        start_copying(index + gridDim.x, shared.stages[(step + 1) % 2]);
        const AttentionUnit unit(s, index);
        if (warp >= unit.valid_h) continue;

        WindowQueries<Tile> state;
        typename Tile::Row* own = &stage.q[warp * s.side_w];
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) load_a_of_row(state.q[k], own, s.side_w, 16 * k);
        float(*rel_w)[Tile::kSide] = shared.rel_w[warp];
        project_row<Tile>(state.rel_h, rel_w, state.q, shared.tables, p.tables[0] != 0, s, warp);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t n = g + 8 * (i % 4 / 2), x = 8 * (i / 4) + 2 * t + i % 2;
            state.fragment_w[i / 4][i % 4] = x < s.side_w ? rel_w[min(n, s.side_w - 1)][x] : -INFINITY;
            if (x >= s.side_h) state.rel_h[i / 4][i % 4] = -INFINITY;
        }
#pragma unroll 1
        for (uint32_t y = 0; y < s.side_h; y += 2)
            attend_key_rows<Tile>(state, unit, own, stage.keys, stage.values, y);

        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = quad_sum(state.row_sum[half]);
            inverse[half] = 1.0f / sum;
            const uint32_t x = g + 8 * half;
            if (t == 0 && x < unit.valid_w)
                global<float>(p.lse)[unit.first_row() + warp * unit.valid_w + x] =
                    state.row_max[half] * kLn2 + logf(sum);
        }
        T* to = global<T>(p.out) + unit.token({warp, 0}) * channels + unit.head * kDim;
        store_window_row<Tile>(own, state.out, inverse, unit.valid_w, to, channels);
    }
}
