// The backward of rel_pos_attention in windows on Hopper (formulas: rel_pos_attention/bwd_query.cuh and _key.cuh): all
// gradients of a unit at once, on chip.
//
// Blocks are persistent: each takes every gridDim.x-th unit, and prefetches the next unit's rows into L2 meanwhile.
// Each warp has a row of the window, in four steps with a barrier after each:
//
// - copies: its row of q, k, v and dO; delta = dO . O and the biases of its queries, lse taken off rel_h.
// - keys: as a row of keys, it goes through the rows of queries. S^T and dP^T come in sixteenths. P^T is an operand of
//   dv += P^T dO without a transpose. The place of v gets dS, in the dtype, all queries by all keys; then dk = dS^T q.
// - queries: as a row of queries, dS [k | one-hot of key rows | of key columns] is dq, drel_h and drel_w at once. The
//   biases' gradients are put at the rows of the tables that they come from. These times the tables join dq.
// - tables: sixteenths of these rows, transposed, times q: the tables' gradients.
//
// Five products of queries by keys, where two passes need seven, and q, k, v and dO are read once. Each block adds up
// the gradients of the tables and of pad for itself; sum_partials/sum_partials.cu sums the blocks' in order.
#pragma once
#include "common/ptx_sm90.cuh"
#include "rel_pos_attention/sm90/window.cuh"

template <class Tile> struct WindowBackwardStorage {
    // Sixteen columns for each key row; rows do not meet in the same banks.
    static constexpr int kScoresStride = 16 * Tile::kSide + 8;
    struct alignas(16) Queries {
        typename Tile::Row q[Tile::kTokens], dout[Tile::kTokens], keys[Tile::kTokens];
    } rows;
    union {
        typename Tile::Row values[Tile::kTokens];
        typename Tile::T dscores[Tile::kTokens][kScoresStride];
    };
    typename Tile::Row tables[Tile::kTableRows];
    // After the keys' step, in their place, each warp's sums over keys outside the grid.
    union {
        float biases[2][Tile::kTokens][Tile::kSide];
        float pad_sums[Tile::kWarps][2][Tile::kDim];
    };
    typename Tile::T behind[Tile::kWarps][16];  // dS of queries behind the end of a row: zeros
    float delta[Tile::kTokens];
    uint32_t index;  // of the unit: its numbers are worked out anew in every step, rather than kept in registers
};

// Where dO was, [query][row of the tables]: each query's gradients of the biases.
template <class Tile> using TableGradients = typename Tile::Row*;

// Asks the L2 cache for row y of a unit.
template <class Tile>
__device__ __forceinline__ void prefetch_row(const RelPosAttentionWindowBwdParams& p, const AttentionUnit& unit,
                                             uint32_t y) {
    using T = typename Tile::T;
    // A line is 128 bytes; the row's end may lie in one more.
    constexpr uint32_t kLine = 128 / sizeof(T), kLines = Tile::kDim / kLine + 1;
    const uint64_t channels = unit.s.num_heads * Tile::kDim;
#pragma unroll 1
    for (uint32_t i = threadIdx.x % kWarp; i < 5 * kLines * unit.valid_w; i += kWarp) {
        const uint32_t array = i % 5, x = i / 5 / kLines, channel = min(i / 5 % kLines * kLine, Tile::kDim - 1u);
        const uint64_t token = unit.token({y, x}), column = unit.head * Tile::kDim + channel;
        const T* row = array < 3 ? global<const T>(p.qkv) + (token * 3 + array) * channels
                                 : global<const T>(array == 3 ? p.out : p.dout) + token * channels;
        ptx::prefetch_l2(row + column);
    }
}

// Delta and biases of row y's queries on the grid.
template <class Tile>
__device__ __forceinline__ void prepare_queries(WindowBackwardStorage<Tile>& shared,
                                                const RelPosAttentionWindowBwdParams& p, const AttentionUnit& unit,
                                                uint32_t y) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim;
    const RelPosAttentionShape& s = p.shape;
    const uint32_t lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, first = y * s.side_w;

    // Two lanes have a query, half of its channels each.
    const uint32_t x = min(lane / 2, unit.valid_w - 1), half_dim = lane % 2 * (kDim / 2);
    const T* out = global<const T>(p.out) + (unit.token({y, x}) * s.num_heads + unit.head) * kDim + half_dim;
    float delta = 0.0f;
#pragma unroll
    for (int c = 0; c < kDim / 2; c += kVec<T>) {
        float a[kVec<T>], b[kVec<T>];
        load(a, out + c);
        load(b, &shared.rows.dout[first + x][half_dim + c]);
#pragma unroll
        for (int i = 0; i < kVec<T>; ++i) delta = fmaf(a[i], b[i], delta);
    }
    delta += ptx::shfl_xor(delta, 1);
    if (lane % 2 == 0 && lane / 2 < unit.valid_w) shared.delta[first + x] = delta;

    FragmentA<T> q[kDim / 16];
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) load_a_of_row(q[k], &shared.rows.q[first], s.side_w, 16 * k);
    float rel_h[2][4] = {};
    project_row<Tile>(rel_h, &shared.biases[1][first], q, shared.tables, p.tables[0] != 0, s, y);
    const float* lse = global<const float>(p.lse) + unit.first_row() + y * unit.valid_w;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t n = g + 8 * half;
        if (n >= unit.valid_w) continue;
        const float shift = lse[n] * kLog2e;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t key = i / 2 * 8 + 2 * t + i % 2;
            if (key < s.side_h) shared.biases[0][first + n][key] = rel_h[i / 2][2 * half + i % 2] - shift;
        }
    }
}

// The eight dS that a lane names, of a row of queries and this warp's row of keys, sixteen by sixteen. They are the
// left operand of a product over queries, which lies in memory transposed. Queries behind the row's end have a place
// apart, of zeros.
template <class Tile>
__device__ __forceinline__ typename Tile::T* dscores_of_key_row(WindowBackwardStorage<Tile>& shared,
                                                                const RelPosAttentionShape& s, uint32_t first) {
    const uint32_t warp = warp_of_block(), lane = threadIdx.x % kWarp, query = lane / 16 * 8 + lane % 8,
                   column = lane / 8 % 2 * 8;
    return query < s.side_w ? &shared.dscores[first + query][16 * warp + column] : &shared.behind[warp][column];
}

// Adds to dv of this warp's keys what row y's queries give, and leaves dS.
template <class Tile>
__device__ __forceinline__ void add_query_row(float (&dv)[Tile::kDim / 8][4], WindowBackwardStorage<Tile>& shared,
                                              const AttentionUnit& unit,
                                              const FragmentA<typename Tile::T> (&k)[Tile::kDim / 16],
                                              const FragmentA<typename Tile::T> (&v)[Tile::kDim / 16], uint32_t y) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim, kStride = Tile::kStride;
    const RelPosAttentionShape& s = unit.s;
    const uint32_t warp = warp_of_block(), lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4, first = y * s.side_w;
    const typename Tile::Row *q = &shared.rows.q[first], *dout = &shared.rows.dout[first];
    float scores[2][4] = {}, dweights[2][4] = {};
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
        FragmentB<T> b[2];
        load_b(b, &q[0][16 * c], kStride);
        mma(scores[0], k[c], b[0]);
        mma(scores[1], k[c], b[1]);
        load_b(b, &dout[0][16 * c], kStride);
        mma(dweights[0], v[c], b[0]);
        mma(dweights[1], v[c], b[1]);
    }
    uint32_t kept = ~0u;
    if (s.dropout.threshold != 0) {
        kept = 0;
#pragma unroll 1
        for (int i = 0; i < 8; ++i) {
            const uint64_t row = unit.dropout_row({y, 8 * (i / 4) + 2 * t + i % 2});
            kept |= uint32_t(dropout_keeps(s.dropout, row, warp * s.side_w + g + 8 * (i / 2 % 2))) << i;
        }
    }
    const float scale = s.softmax_scale * kLog2e;
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            // A query that does not exist takes the numbers of the last one, times zero.
            const uint32_t x = 8 * j + 2 * t + c, row = first + min(x, unit.valid_w - 1);
            const float rel_h = x < unit.valid_w ? shared.biases[0][row][warp] : -INFINITY, delta = shared.delta[row];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float &score = scores[j][2 * half + c], &dweight = dweights[j][2 * half + c];
                const uint32_t key = g + 8 * half;
                const float rel_w = key < s.side_w ? shared.biases[1][row][key] : -INFINITY;
                const float weight = ptx::ex2_approx(fmaf(score, scale, rel_w) + rel_h);
                const float factor =
                    s.dropout.threshold != 0 ? dropout_factor(s.dropout, kept, 4 * j + 2 * half + c) : 1.0f;
                score = weight * factor;
                dweight = weight * (dweight * factor - delta);
            }
        }
    FragmentA<T> weights, dscores;
    make_a(weights, scores[0], scores[1]);
    make_a(dscores, dweights[0], dweights[1]);
    ptx::stmatrix_x4<true>(dscores_of_key_row<Tile>(shared, s, first), dscores.at);
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
        FragmentB<T> b[2];
        load_b_trans(b, &dout[0][16 * n], kStride);
        mma(dv[2 * n], weights, b[0]);
        mma(dv[2 * n + 1], weights, b[1]);
    }
}

// The sum over the warp's keys outside the grid, times a factor.
template <class Tile>
__device__ __forceinline__ void sum_outside(float (&to)[Tile::kDim], const float (&sums)[Tile::kDim / 8][4],
                                            float factor, const AttentionUnit& unit) {
    const uint32_t warp = warp_of_block(), lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const auto outside = [&](uint32_t x) { return x < unit.s.side_w && !unit.on_grid({warp, x}); };
#pragma unroll
    for (int c = 0; c < Tile::kDim / 8; ++c)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float sum = (outside(g) ? sums[c][i] : 0.0f) + (outside(g + 8) ? sums[c][i + 2] : 0.0f);
            for (int mask = 4; mask < kWarp; mask *= 2) sum += ptx::shfl_xor(sum, mask);
            if (g == 0) to[8 * c + 2 * t + i] = sum * factor;
        }
}

// dk of the warp's keys, scaled by nothing yet.
template <class Tile>
__device__ __forceinline__ void multiply_dscores(float (&dk)[Tile::kDim / 8][4], WindowBackwardStorage<Tile>& shared,
                                                 const AttentionUnit& unit) {
    using T = typename Tile::T;
#pragma unroll 1
    for (uint32_t y = 0; y < unit.valid_h; ++y) {
        const uint32_t first = y * unit.s.side_w;
        FragmentA<T> a;
        ptx::ldmatrix_x4<true>(a.at, dscores_of_key_row<Tile>(shared, unit.s, first));
#pragma unroll
        for (int n = 0; n < Tile::kDim / 16; ++n) {
            FragmentB<T> b[2];
            load_b_trans(b, &shared.rows.q[first][16 * n], Tile::kStride);
            mma(dk[2 * n], a, b[0]);
            mma(dk[2 * n + 1], a, b[1]);
        }
    }
}

// Stores dk or dv of the warp's keys, part 1 or 2 of qkv. Keys on the grid go by way of the warp's row of dO. For the
// others it stores the sum, if that is wanted.
template <class Tile>
__device__ __forceinline__ void finish_keys(const float (&sums)[Tile::kDim / 8][4], WindowBackwardStorage<Tile>& shared,
                                            const RelPosAttentionWindowBwdParams& p, const AttentionUnit& unit,
                                            uint32_t part, float factor, bool pad_wanted) {
    using T = typename Tile::T;
    const uint32_t warp = warp_of_block(), heads = unit.s.num_heads;
    if (warp < unit.valid_h) {
        T* to = global<T>(p.dqkv) + ((unit.token({warp, 0}) * 3 + part) * heads + unit.head) * Tile::kDim;
        store_window_row<Tile>(&shared.rows.dout[warp * unit.s.side_w], sums, {factor, factor}, unit.valid_w, to,
                               uint64_t(3) * heads * Tile::kDim);
    }
    if (pad_wanted) sum_outside<Tile>(shared.pad_sums[warp][part - 1], sums, factor, unit);
}

// dq of the warp's queries, and where their row of dO was, their TableGradients.
template <class Tile>
__device__ __forceinline__ void finish_queries(
    WindowBackwardStorage<Tile>& shared, const RelPosAttentionWindowBwdParams& p, const AttentionUnit& unit) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim, kStride = Tile::kStride;
    const RelPosAttentionShape& s = p.shape;
    const uint32_t warp = warp_of_block(), lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4,
                   first = warp * s.side_w;
    float dq[kDim / 8][4] = {}, drel_h[2][4] = {}, drel_w[2][4] = {};
    // The identity's two halves: column g of depths 2 t and 2 t + 1, if it is one of them.
    const uint32_t diagonal = pack<T>(2 * t == g ? 1.0f : 0.0f, 2 * t + 1 == g ? 1.0f : 0.0f),
                   ones = pack<T>(1.0f, 1.0f);
#pragma unroll 1
    for (uint32_t y = 0; y < s.side_h; ++y) {
        FragmentA<T> a;
        load_a_of_row(a, &shared.dscores[first], s.side_w, 16 * y);
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
            FragmentB<T> b[2];
            load_b_trans(b, &shared.rows.keys[y * s.side_w][16 * n], kStride);
            mma(dq[2 * n], a, b[0]);
            mma(dq[2 * n + 1], a, b[1]);
        }
        mma(drel_w[0], a, FragmentB<T>{{diagonal, 0}});
        mma(drel_w[1], a, FragmentB<T>{{0, diagonal}});
#pragma unroll
        for (uint32_t j = 0; j < 2; ++j) {
            const uint32_t column = 8 * j + g == y ? ones : 0;
            mma(drel_h[j], a, FragmentB<T>{{column, column}});
        }
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) dq[n][i] *= s.softmax_scale;

    if (p.tables[0] != 0) {
        TableGradients<Tile> own = &shared.rows.dout[first];
        for (uint32_t i = lane; i < s.side_w * Tile::kTableRows / 8; i += kWarp)
            *reinterpret_cast<Vec<uint32_t, 4>*>(&own[i / (Tile::kTableRows / 8)][i % (Tile::kTableRows / 8) * 8]) = {};
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t n = g + 8 * (i % 4 / 2), key = 8 * (i / 4) + 2 * t + i % 2;
            if (n >= s.side_w) continue;
            if (key < s.side_h) own[n][warp + s.side_h - 1 - key] = from_float<T>(drel_h[i / 4][i % 4]);
            if (key < s.side_w) own[n][2 * s.side_h - 1 + n + s.side_w - 1 - key] = from_float<T>(drel_w[i / 4][i % 4]);
        }
        __syncwarp();
        // Zero times a value that is not finite (a table's mask of minus infinity) is NaN. Such a term is computed
        // anew, from the rows that the query reads.
        const auto reads = [&](uint32_t query, uint32_t row) {
            const uint32_t of_h = row - warp, of_w = row - (2 * s.side_h - 1 + query);
            return row < 2 * s.side_h - 1 ? of_h < s.side_h : of_w < s.side_w;
        };
#pragma unroll
        for (int n = 0; n < kDim / 16; ++n) {
            float terms[2][4] = {};
#pragma unroll 1
            for (int k = 0; k < Tile::kTableRows / 16; ++k) {
                FragmentA<T> a;
                FragmentB<T> b[2];
                load_a_of_row(a, own, s.side_w, 16 * k);
                load_b_trans(b, &shared.tables[16 * k][16 * n], kStride);
                mma(terms[0], a, b[0]);
                mma(terms[1], a, b[1]);
            }
            float zero = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) zero = fmaf(terms[i / 4][i % 4], 0.0f, zero);
            if (zero != 0.0f) {
#pragma unroll
                for (int i = 0; i < 8; ++i) terms[i / 4][i % 4] = 0.0f;
#pragma unroll 1
                for (uint32_t row = 0; row < Tile::kTableRows; ++row)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint32_t query = g + 8 * half;
                        if (query >= s.side_w || !reads(query, row)) continue;
                        const float weight = to_float(own[query][row]);
                        const T* table = &shared.tables[row][16 * n + 2 * t];
#pragma unroll
                        for (int i = 0; i < 4; ++i)
                            terms[i / 2][2 * half + i % 2] += weight * to_float(table[8 * (i / 2) + i % 2]);
                    }
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) dq[2 * n + i / 4][i % 4] += terms[i / 4][i % 4];
            __syncwarp();
        }
    }
    // Nobody else reads this row of dS.
    T* to = global<T>(p.dqkv) + (unit.token({warp, 0}) * 3 * s.num_heads + unit.head) * kDim;
    store_window_row<Tile>(&shared.dscores[first], dq, {1.0f, 1.0f}, unit.valid_w, to,
                           3 * uint64_t(s.num_heads) * kDim);
}

// partial [rows of the tables, kDim] += TableGradients^T q, warp by warp sixteen rows and channels.
template <class Tile>
__device__ __forceinline__ void add_table_gradients(float* partial, const WindowBackwardStorage<Tile>& shared,
                                                    const RelPosAttentionShape& s, const AttentionUnit& unit) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim;
    const uint32_t warp = warp_of_block(), lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const uint32_t count = 2 * s.side_h - 1 + 2 * s.side_w - 1, queries = unit.valid_h * s.side_w,
                   zeros = s.side_h * s.side_w;
    for (uint32_t job = warp; job < Tile::kTableRows / 16 * (kDim / 16); job += Tile::kWarps) {
        const uint32_t row = job % (Tile::kTableRows / 16) * 16, channel = job / (Tile::kTableRows / 16) * 16;
        if (row >= count) continue;
        float sums[2][4] = {};
#pragma unroll 1
        for (uint32_t first = 0; first < queries; first += 16) {
            FragmentA<T> a;
            ptx::ldmatrix_x4<true>(
                a.at, &shared.rows.dout[min(first + lane / 16 * 8 + lane % 8, zeros)][row + lane / 8 % 2 * 8]);
            uint32_t b[4];
            ptx::ldmatrix_x4<true>(b, &shared.rows.q[min(first + lane % 16, zeros)][channel + lane / 16 * 8]);
            mma(sums[0], a, FragmentB<T>{{b[0], b[1]}});
            mma(sums[1], a, FragmentB<T>{{b[2], b[3]}});
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t r = row + g + 8 * (i % 4 / 2);
            if (r < count) partial[r * kDim + channel + 8 * (i / 4) + 2 * t + i % 2] += sums[i / 4][i % 4];
        }
    }
}

template <class Tile>
__device__ __forceinline__ void rel_pos_attention_window_bwd_sm90(const RelPosAttentionWindowBwdParams& p) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim;
    auto& shared = ptx::shared_storage<WindowBackwardStorage<Tile>>();
    const RelPosAttentionShape& s = p.shape;
    const uint64_t channels = s.num_heads * kDim;

    // This block's parts of the sums.
    const uint32_t table_elements = (2 * s.side_h - 1 + 2 * s.side_w - 1) * kDim;
    const auto table_partial = [&](uint32_t block) {
        return global<float>(p.table_partials) + uint64_t(block) * table_elements;
    };
    const auto pad_partial = [&](uint32_t block) { return global<float>(p.pad_partials) + block * 3 * channels; };
    if (p.table_partials != 0)
        for (uint32_t i = threadIdx.x; i < table_elements; i += Tile::kThreads) table_partial(blockIdx.x)[i] = 0.0f;
    if (p.pad_partials != 0)
        for (uint32_t i = threadIdx.x; i < 3 * channels; i += Tile::kThreads) pad_partial(blockIdx.x)[i] = 0.0f;
    if (p.tables[0] != 0) {
        copy_tables<Tile>(shared.tables, s, Tables<T>(p.tables));
        wait_for_copies();
    }

    const auto unit_at_work = [&] { return AttentionUnit(s, shared.index); };
    const auto pad_wanted = [&](const AttentionUnit& unit) {
        return p.pad_partials != 0 && (unit.valid_h < s.side_h || unit.valid_w < s.side_w);
    };

#pragma unroll 1
    for (uint32_t index = blockIdx.x; index < p.units; index = shared.index + gridDim.x) {
        const uint32_t warp = warp_of_block();
        __syncthreads();  // nobody reads the last unit any more
        if (threadIdx.x == 0) shared.index = index;
        if (warp < s.side_h) {
            const AttentionUnit unit(s, index);
            const T *pad = p.pad == 0 ? nullptr : global<const T>(p.pad),
                    *from = global<const T>(p.qkv) + unit.head * kDim;
            const T* outside = pad == nullptr ? nullptr : pad + unit.head * kDim;
            copy_window_row<Tile>(shared.rows.q, unit, warp, from, 3 * channels, nullptr);
            copy_window_row<Tile>(shared.rows.keys, unit, warp, from + channels, 3 * channels,
                                  outside == nullptr ? nullptr : outside + channels);
            copy_window_row<Tile>(shared.values, unit, warp, from + 2 * channels, 3 * channels,
                                  outside == nullptr ? nullptr : outside + 2 * channels);
            copy_window_row<Tile>(shared.rows.dout, unit, warp, global<const T>(p.dout) + unit.head * kDim, channels,
                                  nullptr);
            ptx::cp_async_commit_group();
            ptx::cp_async_wait_group<0>();
            __syncwarp();  // this warp's row is there
            if (warp < unit.valid_h) prepare_queries<Tile>(shared, p, unit, warp);
        }
        FragmentA<T> k[kDim / 16], v[kDim / 16];
        if (warp < s.side_h) {
#pragma unroll
            for (int c = 0; c < kDim / 16; ++c) {
                load_a_of_row(k[c], &shared.rows.keys[warp * s.side_w], s.side_w, 16 * c);
                load_a_of_row(v[c], &shared.values[warp * s.side_w], s.side_w, 16 * c);
            }
        }
        __syncthreads();  // everybody's row is there, and v in registers

        float sums[kDim / 8][4] = {};
        if (warp < s.side_h) {
            if (shared.index + gridDim.x < p.units) {
                const AttentionUnit next(s, shared.index + gridDim.x);
                if (warp < next.valid_h) prefetch_row<Tile>(p, next, warp);
            }
            const AttentionUnit unit = unit_at_work();
#pragma unroll 1
            for (uint32_t y = 0; y < unit.valid_h; ++y) add_query_row<Tile>(sums, shared, unit, k, v, y);
        }
        __syncthreads();  // dS is there; biases and dO are not read any more

        if (warp < s.side_h) {
            const AttentionUnit unit = unit_at_work();
            finish_keys<Tile>(sums, shared, p, unit, 2, 1.0f, pad_wanted(unit));
#pragma unroll
            for (int c = 0; c < kDim / 8; ++c)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[c][i] = 0.0f;
            multiply_dscores<Tile>(sums, shared, unit);
            finish_keys<Tile>(sums, shared, p, unit, 1, s.softmax_scale, pad_wanted(unit));
        }
        __syncthreads();  // a row of dS is its warp's own from here on

        const AttentionUnit unit = unit_at_work();
        if (warp < unit.valid_h) finish_queries<Tile>(shared, p, unit);
        if (p.table_partials == 0 && !pad_wanted(unit)) continue;
        __syncthreads();  // the tables' gradients are there
        const uint32_t block = shared.index % gridDim.x;  // blockIdx.x, but not in registers all the time
        if (p.table_partials != 0) add_table_gradients<Tile>(table_partial(block), shared, s, unit);
        if (pad_wanted(unit) && threadIdx.x < 2 * kDim) {
            const uint32_t part = threadIdx.x / kDim, c = threadIdx.x % kDim;
            float sum = 0.0f;
            for (uint32_t w = 0; w < s.side_h; ++w) sum += shared.pad_sums[w][part][c];
            pad_partial(block)[(part + 1) * channels + unit.head * kDim + c] += sum;
        }
    }
}
