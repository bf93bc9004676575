// Attention with decomposed relative positions over grids, global or in windows (see rel_pos_attention/common.cuh):
//
//   S[n, m] = softmax_scale q_n . k_m + rel_h[n, y_m] + rel_w[n, x_m]          O = dropout(softmax(S)) V
//   rel_h[n, y] = q_n . Rh[y_n - y + side_h - 1]      rel_w[n, x] = q_n . Rw[x_n - x + side_w - 1]     (unscaled q)
//
// `qkv [batch, h, w, 3, heads, head_dim]` -> `out [batch, h, w, heads, head_dim]` and lse f32 `[windows, heads,
// tokens]`. With f32 operands, lse is `[windows, heads, tokens, 2]`: max in base 2, and sum.
//
// A block holds kParts times 16 kWarps queries of a unit. For each stripe it computes their biases first. Then key
// tiles stream by, two in flight, under an online softmax in base 2: p = exp2((q k scale log2(e) + rel_w) + (rel_h -
// max)). Scores are scaled in f32. Operands in f32 are multiplied as 3xTF32 (fragment.cuh), which keeps f32's accuracy.
#pragma once
#include "rel_pos_attention/common.cuh"

// The biases of the forward: rel_h of all parts, and rel_w of one part and stripe. Registers take rel_w before the
// stages of keys and values need its memory.
template <class Tile, int kParts> struct ForwardBiases : Biases<Tile> {
    static constexpr int kStageBytes = sizeof(typename Tile::Storage), kRowBytes = kStageBytes / Tile::kStagedRows,
                         kColumns = Tile::kCols + 8, kBytesOfW = Tile::kQueries * kColumns * 4,
                         kRowsBeside = (kStageBytes - kBytesOfW) / kRowBytes / 16 * 16;  // of the tables
    static_assert(kRowsBeside > 0, "beside rel_w, the stages have no room for the tables' rows");

    __device__ __forceinline__ ForwardBiases(const RelPosAttentionShape& s, typename Tile::Storage& shared, int part,
                                             uint32_t x)
        : Biases<Tile>(s, reinterpret_cast<float*>(&shared + 1)) {
        this->w = this->h - kBytesOfW / 4;
        this->h += part * Tile::kQueries * this->stride_h;
        this->stride_w = kColumns;
        this->x = x;
        // Another stripe has the same rel_h. Tiles with one part have no registers for that, and project all anew.
        if constexpr (kParts > 1) {
            this->first_column = x;
            this->columns = Tile::kCols;
            this->with_h = x == 0;
        }
    }
};

// A block has kParts times the tile's queries, and each of its warps 16 of each part. An operand of keys or values is
// read once for all parts.
template <class Tile, int kParts = 1>
__device__ __forceinline__ void rel_pos_attention_fwd(const RelPosAttentionFwdParams& p) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim, kCols = Tile::kCols, kRows = Tile::kRows, kKeys = Tile::kKeys,
                  kStride = Tile::kStride, kQueries = Tile::kQueries;
    // Products are added to rel_w / scale, which spares a multiplication of each score. The host sees to it that scale
    // allows this where there are several parts.
    constexpr bool kOnBias = kParts > 1;
    // Each lane compares its own scores with the maximum, so that only a rise takes shuffles. Windows would spill.
    constexpr bool kLanesVote = kParts > 1;
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    const RelPosAttentionShape& s = p.shape;
    const uint32_t blocks = ceil_div(s.side_h * s.side_w, uint32_t(kParts * kQueries));
    const AttentionUnit unit(s, blockIdx.x / blocks);
    const uint32_t first = blockIdx.x % blocks * (kParts * kQueries), queries = unit.queries();
    if (first >= queries) return;

    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const uint32_t channels = s.num_heads * s.head_dim, head_column = unit.head * s.head_dim;
    const T *qkv = global<const T>(p.qkv), *pad = p.pad == 0 ? nullptr : global<const T>(p.pad);
    const Tables<T> tables(p.tables);
    const bool wide = vectorisable<T>(s.head_dim, p.qkv, p.pad, p.tables[0], p.tables[1]);

    FragmentA<T> q[kParts][kDim / 16];
#pragma unroll
    for (int m = 0; m < kParts; ++m)
        load_queries<Tile>(q[m], shared, unit, first + m * kQueries, wide, qkv + head_column, 3 * channels);

    // A warp without queries helps with the copies alone.
    const uint32_t warp_first = first + 16 * warp;
    const bool active = warp_first < queries;
    const float scale = s.softmax_scale * kLog2e;
    float fragment_w[kParts][kCols / 8][4], out[kParts][kDim / 8][4] = {}, row_max[kParts][2], row_sum[kParts][2] = {};
#pragma unroll
    for (int m = 0; m < kParts; ++m) row_max[m][0] = row_max[m][1] = -INFINITY;

    // The tile of `keys` and, behind them, values, whose first key is (y, x); `rel_h` of this lane's first query.
    using Rows = const T(*)[kStride];  // nvcc 13.0 crashes on the type itself as a parameter of a generic lambda
    const auto pass_tile = [&](auto dropped, Rows keys, uint32_t y, uint32_t x, const float* rel_h, uint32_t stride_h) {
        const Rows values = keys + kKeys;
        float scores[kParts][kKeys / 8][4];
#pragma unroll
        for (int m = 0; m < kParts; ++m)
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) scores[m][n][i] = kOnBias ? fragment_w[m][n % (kCols / 8)][i] : 0.0f;
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k)
#pragma unroll
            for (int n = 0; n < kKeys / 16; ++n) {
                FragmentB<T> b[2];
                load_b(b, &keys[16 * n][16 * k], kStride);
#pragma unroll
                for (int m = 0; m < kParts; ++m) {
                    mma(scores[m][2 * n], q[m][k], b[0]);
                    mma(scores[m][2 * n + 1], q[m][k], b[1]);
                }
            }

        // Rows g and g + 8 of the warp's queries, of each part.
        float bias_h[kParts][kRows][2], new_max[kParts][2];
        bool rises = false;
#pragma unroll
        for (int m = 0; m < kParts; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                new_max[m][half] = row_max[m][half];
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    bias_h[m][r][half] = rel_h[(m * kQueries + 8 * half) * stride_h + y + r];
                    float row = -INFINITY;
#pragma unroll
                    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
                        for (int i = 2 * half; i < 2 * half + 2; ++i) {
                            float& score = scores[m][r * (kCols / 8) + j][i];
                            if constexpr (!kOnBias) score = fmaf(score, scale, fragment_w[m][j][i]);
                            if constexpr (kExactWeights<T>) score += bias_h[m][r][half];
                            row = fmaxf(row, score);
                        }
                    if constexpr (kOnBias) row = fmaf(row, scale, bias_h[m][r][half]);
                    else if constexpr (!kExactWeights<T>) row += bias_h[m][r][half];
                    new_max[m][half] = fmaxf(new_max[m][half], row);
                }
                if constexpr (!kLanesVote) new_max[m][half] = quad_max(new_max[m][half]);
                rises |= new_max[m][half] > row_max[m][half] + kMaximumRise<T>;
            }
        if (ptx::any(rises)) {
#pragma unroll
            for (int m = 0; m < kParts; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    if constexpr (kLanesVote) new_max[m][half] = quad_max(new_max[m][half]);
                    const float rescale = ptx::ex2_approx(row_max[m][half] - finite_maximum(new_max[m][half]));
                    row_max[m][half] = new_max[m][half];
                    row_sum[m][half] *= rescale;
#pragma unroll
                    for (int n = 0; n < kDim / 8; ++n) {
                        out[m][n][2 * half] *= rescale;
                        out[m][n][2 * half + 1] *= rescale;
                    }
                }
        }
#pragma unroll
        for (int m = 0; m < kParts; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float reference = finite_maximum(row_max[m][half]);
#pragma unroll
                for (int n = 0; n < kKeys / 8; ++n) {
                    const float shift = bias_h[m][n / (kCols / 8)][half] - reference;
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        float& score = scores[m][n][i];
                        if constexpr (kOnBias) score = fmaf(score, scale, shift);
                        else score += kExactWeights<T> ? -reference : shift;
                        score = ptx::ex2_approx(score);
                        row_sum[m][half] += score;
                    }
                }
                if (dropped) {
                    const Token query = unit.query(warp_first + m * kQueries + g + 8 * half);
                    const KeptKeys<Tile> kept = kept_keys<Tile>(s, unit.dropout_row(query), y, x);
#pragma unroll
                    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                        for (int i = 0; i < 2; ++i)
                            scores[m][n][2 * half + i] *= dropout_factor(s.dropout, kept, 2 * n + i);
                }
            }

#pragma unroll
        for (int k = 0; k < kKeys / 16; ++k) {
            FragmentA<T> weights[kParts];
#pragma unroll
            for (int m = 0; m < kParts; ++m) make_a(weights[m], scores[m][2 * k], scores[m][2 * k + 1]);
#pragma unroll
            for (int n = 0; n < kDim / 16; ++n) {
                FragmentB<T> b[2];
                load_b_trans(b, &values[16 * k][16 * n], kStride);
#pragma unroll
                for (int m = 0; m < kParts; ++m) {
                    mma(out[m][2 * n], weights[m], b[0]);
                    mma(out[m][2 * n + 1], weights[m], b[1]);
                }
            }
        }
    };
    for (uint32_t x = 0; x < s.side_w; x += kCols) {
#pragma unroll
        for (int m = 0; m < kParts; ++m) {
            const ForwardBiases<Tile, kParts> bias(s, shared, m, x);
            project_tables<Tile>(bias, shared, s, unit, first + m * kQueries, q[m], qkv + head_column, 3 * channels,
                                 tables, wide, bias.kRowsBeside);
            const float* rel_w = bias.w + (16 * warp + g) * bias.stride_w + 2 * t;
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    fragment_w[m][j][i] =
                        rel_w[8 * (i / 2) * bias.stride_w + 8 * j + i % 2] * (kOnBias ? 1.0f / scale : 1.0f);
            __syncthreads();  // nobody reads rel_w in the stages any more
        }

        const ForwardBiases<Tile, kParts> bias(s, shared, 0, x);
        const float* rel_h = bias.h + (16 * warp + g) * bias.stride_h;
        KeyTiles<Tile> tiles(s, unit, shared, qkv, pad, x, wide);
        compile_twice<sizeof(T) == 2>(s.dropout, [&](auto dropped) {
            for (uint32_t y = 0; y < s.side_h; y += kRows) {
                const Rows keys = tiles.advance();
                if (active) pass_tile(dropped, keys, y, x, rel_h, bias.stride_h);
                __syncthreads();  // nobody reads this stage any more
            }
        });
    }

    // Hidden with several parts: the compiler would keep the rows' numbers through the loops, and spill.
    const uint32_t thread = kParts > 1 ? ptx::hide(threadIdx.x) : threadIdx.x,
                   row = thread / kWarp * 16 + thread % kWarp / 4, pair = thread % 4;
#pragma unroll
    for (int m = 0; m < kParts; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t n = first + m * kQueries + row + 8 * half;
            const float sum = quad_sum(row_sum[m][half]), inverse = 1.0f / sum;
            if (n >= queries) continue;
            T* to = global<T>(p.out) + unit.token(unit.query(n)) * channels + head_column;
#pragma unroll
            for (int c = 0; c < kDim / 8; ++c)
                store_pair(to, 8 * c + 2 * pair, s.head_dim, out[m][c][2 * half] * inverse,
                           out[m][c][2 * half + 1] * inverse);
            if (pair != 0) continue;
            if constexpr (kExactWeights<T>)
                store(global<float>(p.lse) + 2 * (unit.first_row() + n), {row_max[m][half], sum});
            else global<float>(p.lse)[unit.first_row() + n] = row_max[m][half] * kLn2 + logf(sum);
        }
}
