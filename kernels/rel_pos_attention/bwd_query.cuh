// The backward of rel_pos_attention, first pass, by queries: dq, and the gradients of the tables.
//
//   P = exp(S - lse)   dP = dropout(dO V^T)   dS = P (dP - delta)   delta_n = dO_n . O_n
//   (f32: P = exp(S - max) / sum)
//
//   drel_h[n, y] = sum_x dS[n, (y, x)]        drel_w[n, x] = sum_y dS[n, (y, x)]
//
//   dq_n = softmax_scale sum_m dS[n, m] k_m + sum_y drel_h[n, y] Rh[y_n - y + side_h - 1] + the same for w
//
//   dRh[r] = sum_n drel_h[n, y_n - r + side_h - 1] q_n, the same for w
//
// Tiles are the forward's. A stripe's drel_w stays in registers, as rel_w does; drel_h is a row sum. A block takes
// every gridDim.x-th block of queries, and adds the tables' gradients up in its own part of `table_partials`. The
// kernel of sum_partials/sum_partials.cu sums the parts in order: no atomics, the same bits every time. For the second
// pass this one leaves delta and the biases in base 2: rel_h minus lse, and rel_w. In f32 it leaves rel_h as it is, and
// max and 1 / sum with delta.
//
// Where one weight is 1 and the others are 0, O is that key's value. Tensor cores compute delta as the same product as
// dP, so it has the bits of the key's dP: dS is exactly 0. In f32, where one weight is above 1/2, its dS may be small
// beside the roundings of dP and delta. A row's dS add up to zero, so the sum that they do have is taken off that
// weight's dS.
//
// The products with rows of the tables include rows that some queries of a block do not read, with gradients of zero
// there. Zero times a value that is not finite (a table's mask of minus infinity) is NaN. So a sum that is not finite
// is computed anew from the rows that belong to it.
#pragma once
#include "rel_pos_attention/common.cuh"

// Behind the forward's storage: rel_h, rel_w, drel_h. drel_w replaces rel_w stripe by stripe; drel_h replaces rel_h row
// by row, if there is but one stripe.
template <class Tile> struct BiasGradients {
    Biases<Tile> bias;
    float* dh;

    __device__ __forceinline__ BiasGradients(const RelPosAttentionShape& s, float* memory) : bias(s, memory) {
        dh = s.side_w <= Tile::kCols ? bias.h : bias.w + Tile::kQueries * bias.stride_w;
    }
    // The gradient of number i of the list for a query of the block.
    __device__ __forceinline__ float at(const TableRows& list, uint32_t row, Token query, uint32_t i) const {
        float gradient = 0.0f;
        list.key_of(i, query, [&](bool is_h, uint32_t k) {
            gradient = is_h ? dh[row * bias.stride_h + k] : bias.w[row * bias.stride_w + k];
        });
        return gradient;
    }
};

// For the key pass: the biases of this warp's queries that exist, lse taken off rel_h here and there.
template <class Tile>
__device__ __forceinline__ void write_biases(const Biases<Tile>& bias, const RelPosAttentionShape& s,
                                             const AttentionUnit& unit, uint32_t first, const float* lse, float* to) {
    const uint32_t pad_h = ceil_div(s.side_h, 8u) * 8, pad_w = ceil_div(s.side_w, 8u) * 8, pitch = pad_h + pad_w;
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    for (uint32_t row = 16 * warp; row < 16 * warp + 16 && first + row < unit.queries(); ++row) {
        const uint64_t query = unit.first_row() + first + row;
        const float shift = kExactWeights<typename Tile::T> ? 0.0f : lse[query] * kLog2e;
        for (uint32_t y = lane; y < pad_h; y += kWarp) {
            const float value = y < s.side_h ? bias.h[row * bias.stride_h + y] - shift : -INFINITY;
            if (y < s.side_h) bias.h[row * bias.stride_h + y] = value;
            to[query * pitch + y] = value;
        }
        for (uint32_t x = lane; x < pad_w; x += kWarp)
            to[query * pitch + pad_h + x] = x < s.side_w ? bias.w[row * bias.stride_w + x] : -INFINITY;
    }
    __syncwarp();
}

// Hidden where tiles are wide: the compiler would work out before the loops over keys what is wanted behind them, and
// spill.
template <class Tile> __device__ __forceinline__ uint32_t thread_of_block() {
    return Tile::kKeys > 64 ? ptx::hide(threadIdx.x) : threadIdx.x;
}

// Computes this lane's sums of one half anew that are not finite: add(i, column, sum) for i below `count`. Rolled,
// since hardly ever taken.
template <class Tile, class Add>
__device__ __forceinline__ void mend_sums(float (&sums)[Tile::kDim / 8][4], int half, uint32_t head_dim, uint32_t count,
                                          Add add) {
#pragma unroll
    for (int n = 0; n < Tile::kDim / 8; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const uint32_t column = 8 * n + thread_of_block<Tile>() % 4 * 2 + c;
            float& sum = half == 0 ? sums[n][c] : sums[n][2 + c];
            if (is_finite(sum) || column >= head_dim) continue;
            sum = 0.0f;
#pragma unroll 1
            for (uint32_t i = 0; i < count; ++i) add(i, column, sum);
        }
}

// dq += drel R, for all rows of the list; with dq scaled already. Every thread of the block must come.
template <class Tile, class T>
__device__ __forceinline__ void add_table_terms(float (&dq)[Tile::kDim / 8][4], const BiasGradients<Tile>& gradients,
                                                typename Tile::Storage& shared, const RelPosAttentionShape& s,
                                                const AttentionUnit& unit, uint32_t first, const Tables<T>& tables,
                                                bool wide) {
    const int warp = thread_of_block<Tile>() / kWarp, g = thread_of_block<Tile>() % kWarp / 4;
    const TableRows list(s, unit, first, Tile::kQueries);
    const Token query[2] = {unit.query(first + 16 * warp + g), unit.query(first + 16 * warp + g + 8)};
    float terms[Tile::kDim / 8][4] = {};
    for (uint32_t begin = 0; begin < list.count; begin += Tile::kStagedRows) {
        const int count = int(min(list.count - begin, uint32_t(Tile::kStagedRows))), whole = (count + 15) / 16 * 16;
        // Zeros up to a whole depth: what was staged before would count, times zero, if it is not finite.
        copy_rows<Tile>(wide, shared.rows, whole, s.head_dim, tables.h, [&](int row) -> const T* {
            return row < count ? tables.row(s, list.row(begin + row)) : nullptr;
        });
        wait_for_copies();
        for (int block = 0; block < count; block += 16) {
            FragmentA<T> a;
            gather_a(a, [&](int row, int i) {
                return gradients.at(list, 16 * warp + row, query[row / 8], begin + block + i);
            });
#pragma unroll
            for (int n = 0; n < Tile::kDim / 16; ++n) {
                FragmentB<T> b[2];
                load_b_trans(b, &shared.rows[block][16 * n], Tile::kStride);
                mma(terms[2 * n], a, b[0]);
                mma(terms[2 * n + 1], a, b[1]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (first + 16 * warp + g + 8 * half < unit.queries())
            mend_sums<Tile>(terms, half, s.head_dim, list.count, [&](uint32_t i, uint32_t column, float& sum) {
                list.key_of(i, query[half], [&](bool, uint32_t) {
                    const float gradient = gradients.at(list, 16 * warp + g + 8 * half, query[half], i);
                    sum = fmaf(gradient, to_float(tables.row(s, list.row(i))[column]), sum);
                });
            });
#pragma unroll
    for (int n = 0; n < Tile::kDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) dq[n][i] += terms[n][i];
}

// partial += drel^T q over the block's queries, warp by warp 16 rows of the list. Every thread of the block must come.
template <class Tile, class T>
__device__ __forceinline__ void add_table_gradients(
    float* partial, const BiasGradients<Tile>& gradients, typename Tile::Storage& shared, const RelPosAttentionShape& s,
    const AttentionUnit& unit, uint32_t first, const T* q, uint64_t stride, bool wide) {
    const uint32_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const TableRows list(s, unit, first, Tile::kQueries);
    copy_queries<Tile>(shared.rows, unit, first, wide, q, stride);
    wait_for_copies();
    for (uint32_t block = 16 * warp; block < list.count; block += 16 * Tile::kWarps) {
        float sum[Tile::kDim / 8][4] = {};
#pragma unroll 1
        for (int k = 0; k < Tile::kWarps && first + 16 * k < unit.queries(); ++k) {
            FragmentA<T> a;
            gather_a(a, [&](int i, int column) {
                const uint32_t row = 16 * k + column;
                return first + row < unit.queries() ? gradients.at(list, row, unit.query(first + row), block + i)
                                                    : 0.0f;
            });
#pragma unroll
            for (int n = 0; n < Tile::kDim / 16; ++n) {
                FragmentB<T> b[2];
                load_b_trans(b, &shared.rows[16 * k][16 * n], Tile::kStride);
                mma(sum[2 * n], a, b[0]);
                mma(sum[2 * n + 1], a, b[1]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t i = block + g + 8 * half;
            if (i >= list.count) continue;
            mend_sums<Tile>(sum, half, s.head_dim, min(unit.queries() - first, uint32_t(Tile::kQueries)),
                            [&](uint32_t row, uint32_t column, float& sum) {
                                const Token query = unit.query(first + row);
                                list.key_of(i, query, [&](bool, uint32_t) {
                                    sum = fmaf(gradients.at(list, row, query, i), to_float(shared.rows[row][column]),
                                               sum);
                                });
                            });
            float* to = partial + uint64_t(list.row(i)) * s.head_dim;
#pragma unroll
            for (int n = 0; n < Tile::kDim / 8; ++n)
#pragma unroll
                for (uint32_t c = 0; c < 2; ++c)
                    if (8 * n + 2 * t + c < s.head_dim) to[8 * n + 2 * t + c] += sum[n][2 * half + c];
        }
    }
    __syncthreads();
}

// In f32 q and dO, with their two tf32 parts, are too many for registers: they stay in shared memory.
template <class Tile> struct QueryStorage : Tile::Storage {
    typename Tile::T q[Tile::kQueries][Tile::kStride], dout[Tile::kQueries][Tile::kStride];
};
template <class Tile> constexpr bool kQueriesInRegisters = sizeof(typename Tile::T) == 2;
template <class Tile>
using QueryPassShared = std::conditional_t<kQueriesInRegisters<Tile>, typename Tile::Storage, QueryStorage<Tile>>;

// The normalizers of a lane's two queries. In 16 bits lse has been taken off rel_h.
template <class T> struct RowStatistics {
    __device__ __forceinline__ void load(int, const float*, uint64_t) {}
    __device__ __forceinline__ float weight(int, float score) const { return ptx::ex2_approx(score); }
    __device__ __forceinline__ void store(int, float delta, float* to, uint64_t row) const { to[row] = delta; }
};
template <> struct RowStatistics<float> {
    float max[2] = {}, inverse_sum[2] = {};
    __device__ __forceinline__ void load(int half, const float* from, uint64_t row) {
        max[half] = from[2 * row];
        inverse_sum[half] = 1.0f / from[2 * row + 1];
    }
    __device__ __forceinline__ float weight(int half, float score) const {
        return ptx::ex2_approx(score - max[half]) * inverse_sum[half];
    }
    __device__ __forceinline__ void store(int half, float delta, float* to, uint64_t row) const {
        ::store(to + 4 * row, {delta, max[half], inverse_sum[half], 0.0f});
    }
};

template <class Tile>
__device__ __forceinline__ void rel_pos_attention_bwd_query(const RelPosAttentionBwdQueryParams& p) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim, kCols = Tile::kCols, kRows = Tile::kRows, kKeys = Tile::kKeys,
                  kStride = Tile::kStride;
    auto& shared = ptx::shared_storage<QueryPassShared<Tile>>();
    const RelPosAttentionShape& s = p.shape;
    const uint32_t blocks = ceil_div(s.side_h * s.side_w, uint32_t(Tile::kQueries));
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const uint32_t channels = s.num_heads * s.head_dim;
    const T *qkv = global<const T>(p.qkv), *pad = p.pad == 0 ? nullptr : global<const T>(p.pad);
    const Tables<T> tables(p.tables);
    const bool wide = vectorisable<T>(s.head_dim, p.qkv, p.pad, p.tables[0], p.tables[1], p.out, p.dout);
    const BiasGradients<Tile> gradients(s, reinterpret_cast<float*>(&shared + 1));
    const Biases<Tile>& bias = gradients.bias;
    const float scale = s.softmax_scale * kLog2e;

    // This block's part of the tables' gradients.
    const uint64_t partial_size = uint64_t(2 * s.side_h - 1 + 2 * s.side_w - 1) * s.head_dim;
    const auto partial = [&] { return global<float>(p.table_partials) + blockIdx.x * partial_size; };
    if (p.table_partials != 0)
        for (uint64_t i = threadIdx.x; i < partial_size; i += Tile::kThreads) partial()[i] = 0.0f;

    for (uint32_t item = blockIdx.x; item < p.items; item += gridDim.x) {
        const AttentionUnit unit(s, item / blocks);
        const uint32_t first = item % blocks * Tile::kQueries, queries = unit.queries();
        if (first >= queries) continue;
        const uint32_t head_column = unit.head * s.head_dim, warp_first = first + 16 * warp;

        FragmentA<T> q[kDim / 16], dout[kDim / 16];
        static_assert(Tile::kStagedRows >= 2 * Tile::kQueries);
        copy_queries<Tile>(shared.rows + Tile::kQueries, unit, first, wide, global<const T>(p.out) + head_column,
                           channels);
        load_queries<Tile>(dout, shared, unit, first, wide, global<const T>(p.dout) + head_column, channels);
        float delta[2], products[2][4] = {};
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {
            FragmentB<T> b[2];
            load_b(b, &shared.rows[Tile::kQueries + 16 * warp][16 * k], kStride);
            mma(products[0], dout[k], b[0]);
            mma(products[1], dout[k], b[1]);
        }
        take_diagonal(delta, products);
        __syncthreads();  // nobody reads the output any more
        RowStatistics<T> statistics;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t n = warp_first + g + 8 * half;
            if (n >= queries) continue;
            if constexpr (kExactWeights<T>) statistics.load(half, global<const float>(p.lse), unit.first_row() + n);
            else if (t == 0) statistics.store(half, delta[half], global<float>(p.delta), unit.first_row() + n);
        }
        load_queries<Tile>(q, shared, unit, first, wide, qkv + head_column, 3 * channels);
        project_tables<Tile>(bias, shared, s, unit, first, q, qkv + head_column, 3 * channels, tables, wide);
        write_biases<Tile>(bias, s, unit, first, global<const float>(p.lse), global<float>(p.bias));

        if constexpr (!kQueriesInRegisters<Tile>) {
            copy_queries<Tile>(shared.q, unit, first, wide, qkv + head_column, 3 * channels);
            copy_queries<Tile>(shared.dout, unit, first, wide, global<const T>(p.dout) + head_column, channels);
        }
        const bool active = warp_first < queries;
        const float* rel_h = bias.h + (16 * warp + g) * bias.stride_h;
        float* rel_w = bias.w + (16 * warp + g) * bias.stride_w + 2 * t;
        float* drel_h = gradients.dh + (16 * warp + g) * bias.stride_h;
        const auto column_at = [&](uint32_t x, int column, int half) {
            return reinterpret_cast<Vec<float, 2>*>(rel_w + 8 * half * bias.stride_w + x + 8 * column);
        };
        float fragment_dw[kCols / 8][4], dq[kDim / 8][4] = {};
        int largest[2] = {-1, -1};  // in f32, the key whose weight is above 1/2

        // The tile of `keys` and, behind them, values, whose first key is (y, x).
        using Rows = const T(*)[kStride];  // nvcc 13.0 crashes on the type itself as a parameter of a generic lambda
        const auto pass_tile = [&](auto dropped, Rows keys, uint32_t y, uint32_t x) {
            const Rows values = keys + kKeys;
            KeptKeys<Tile> kept[2] = {};
            if (dropped) {
                kept[0] = kept_keys<Tile>(s, unit.dropout_row(unit.query(warp_first + g)), y, x);
                kept[1] = kept_keys<Tile>(s, unit.dropout_row(unit.query(warp_first + g + 8)), y, x);
            }
            float row_sum[2] = {}, bias_h[kRows][2];
#pragma unroll
            for (int r = 0; r < kRows; ++r)
#pragma unroll
                for (int half = 0; half < 2; ++half) bias_h[r][half] = rel_h[8 * half * bias.stride_h + y + r];
#pragma unroll
            for (int chunk = 0; chunk < kKeys / 16; ++chunk) {
                float scores[2][4] = {}, dweights[2][4] = {};
#pragma unroll
                for (int k = 0; k < kDim / 16; ++k) {
                    if constexpr (!kQueriesInRegisters<Tile>) {
                        load_a(q[k], &shared.q[16 * warp][16 * k], kStride);
                        load_a(dout[k], &shared.dout[16 * warp][16 * k], kStride);
                    }
                    FragmentB<T> b[2];
                    load_b(b, &keys[16 * chunk][16 * k], kStride);
                    mma(scores[0], q[k], b[0]);
                    mma(scores[1], q[k], b[1]);
                    load_b(b, &values[16 * chunk][16 * k], kStride);
                    mma(dweights[0], dout[k], b[0]);
                    mma(dweights[1], dout[k], b[1]);
                }
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int n = 2 * chunk + j, r = n / (kCols / 8), column = n % (kCols / 8);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const auto bias_w = *column_at(x, column, half);
#pragma unroll
                        for (int c = 0; c < 2; ++c) {
                            const int i = 2 * half + c;
                            const float score = fmaf(scores[j][i], scale, bias_w.at[c]) + bias_h[r][half];
                            const float weight = statistics.weight(half, score);
                            if constexpr (kExactWeights<T>)
                                if (weight > 0.5f)
                                    largest[half] = int((y + r) * s.side_w + x + 8 * column + 2 * t + c);
                            float dweight = dweights[j][i];
                            if (dropped)
                                dweight *= dropout_factor(s.dropout, kept[half], 2 * n + c);
                            scores[j][i] = weight * (dweight - delta[half]);
                            fragment_dw[column][i] += scores[j][i];
                            row_sum[half] += scores[j][i];
                        }
                    }
                    if (column == kCols / 8 - 1) {
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const float sum = quad_sum(row_sum[half]);
                            float& total = drel_h[8 * half * bias.stride_h + y + r];
                            if (t == 0) total = x == 0 ? sum : total + sum;
                            row_sum[half] = 0.0f;
                        }
                    }
                }
                FragmentA<T> a;
                make_a(a, scores[0], scores[1]);
#pragma unroll
                for (int n = 0; n < kDim / 16; ++n) {
                    FragmentB<T> b[2];
                    load_b_trans(b, &keys[16 * chunk][16 * n], kStride);
                    mma(dq[2 * n], a, b[0]);
                    mma(dq[2 * n + 1], a, b[1]);
                }
            }
        };
        for (uint32_t x = 0; x < s.side_w; x += kCols) {
            // A stripe's drel_w stays in registers; its rel_w too would be too many, and is read where it lies.
            for (auto& column : fragment_dw)
                for (float& value : column) value = 0.0f;
            KeyTiles<Tile> tiles(s, unit, shared, qkv, pad, x, wide);
            compile_twice<(kDim <= 64)>(s.dropout, [&](auto dropped) {
                for (uint32_t y = 0; y < s.side_h; y += kRows) {
                    const T(*keys)[kStride] = tiles.advance();
                    if (active) pass_tile(dropped, keys, y, x);
                    __syncthreads();  // nobody reads this stage any more
                }
            });
            // Only this lane has read them.
            if (active) {
#pragma unroll
                for (int column = 0; column < kCols / 8; ++column)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        *column_at(x, column, half) = {fragment_dw[column][2 * half],
                                                       fragment_dw[column][2 * half + 1]};
            }
        }
        __syncthreads();  // all see drel
        if constexpr (kExactWeights<T>) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float excess = 0.0f;
                for (uint32_t key = t; key < s.side_h; key += 4) excess += drel_h[8 * half * bias.stride_h + key];
                excess = quad_sum(excess);
                largest[half] = max(largest[half], ptx::shfl_xor(largest[half], 1));
                largest[half] = max(largest[half], ptx::shfl_xor(largest[half], 2));
                if (largest[half] >= 0 && is_finite(excess)) {
                    const Token key{largest[half] / s.side_w, largest[half] % s.side_w};
                    delta[half] += excess;
                    if (t == 0) drel_h[8 * half * bias.stride_h + key.y] -= excess;
                    if (t == 0) rel_w[8 * half * bias.stride_w + key.x] -= excess;
                    const T* from = unit.on_grid(key) ? qkv + unit.token(key) * 3 * channels : pad;
#pragma unroll
                    for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
                        for (int c = 0; c < 2; ++c) {
                            const uint32_t column = 8 * n + 2 * t + c;
                            if (from != nullptr && column < s.head_dim)
                                dq[n][2 * half + c] -= excess * from[channels + head_column + column];
                        }
                }
                const uint32_t n = warp_first + g + 8 * half;
                if (t == 0 && n < queries)
                    statistics.store(half, delta[half], global<float>(p.delta), unit.first_row() + n);
            }
            __syncthreads();  // all see drel
        }

#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) dq[n][i] *= s.softmax_scale;
        if (tables.h != nullptr) add_table_terms<Tile>(dq, gradients, shared, s, unit, first, tables, wide);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t n = warp_first + g + 8 * half;
            if (n >= queries) continue;
            T* to = global<T>(p.dqkv) + unit.token(unit.query(n)) * 3 * channels + head_column;
#pragma unroll
            for (int c = 0; c < kDim / 8; ++c)
                store_pair(to, 8 * c + 2 * t, s.head_dim, dq[c][2 * half], dq[c][2 * half + 1]);
        }
        if (p.table_partials != 0)
            add_table_gradients<Tile>(partial(), gradients, shared, s, unit, first, qkv + head_column, 3 * channels,
                                      wide);
    }
}
