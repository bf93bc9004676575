// The first pass of rel_pos_attention's backward on sm_90a, for whole grids; the formulas are those of
// rel_pos_attention/bwd_query.cuh. It computes dq, the gradients of the tables, and delta and the biases for the second
// pass.
//
// A block of queries and its ring of slots are as in rel_pos_attention/sm90/stream.cuh, with the output's gradient
// beside the queries. Through the ring come rows of the tables, K_0 V_0 K_1 V_1 ..., and once more rows of the tables.
// The products S = q K^T and dP = dO V^T start together, and dq += dS K runs on while the next two start. For a stripe,
// rel_w and drel_w stay in registers; drel_h is a row sum. The gradients drel_h and drel_w end where the biases were.
// There they are gathered as left operands:
//
// - dq += drel R, for each box of rows, by each warpgroup for its queries;
// - dR += drel^T q, for each box of rows, by one of the warpgroups, for all queries of the block.
//
// If the tables are trained, a block takes every gridDim.x-th block of queries. It adds dR up in its own part of
// `table_partials`: no atomics, the same bits every time.
#pragma once
#include "rel_pos_attention/bwd_query.cuh"
#include "rel_pos_attention/sm90/stream.cuh"

template <class Tile> struct QueryPassStorage : Tile::Storage {
    alignas(1024) unsigned char dout[Panel<Tile::kQueries, Tile::kDim>::kBytes];
    ptx::mbarrier queries_empty;
};

template <class Tile>
__device__ __forceinline__ void load_query_pass(const RelPosAttentionBwdQuerySm90Params& p,
                                                QueryPassStorage<Tile>& shared) {
    StreamLoader<Tile> ring{shared};
    uint32_t count = 0;
    for (uint32_t item = blockIdx.x; item < p.items; item += gridDim.x, ++count) {
        const StreamWork<Tile> work(p.shape, item);
        ptx::mbarrier_wait_parity(shared.queries_empty, count % 2 ^ 1);
        ptx::mbarrier_arrive_expect_tx(shared.queries_full, 2 * Tile::kQueryBytes);
        ring.queries(shared.queries, p.qkv_maps, work);
        ring.queries(shared.dout, p.dout_maps, work);
        if (p.tables[0] != 0) ring.tables(p.table_maps, work);
        for (uint32_t tile = 0; tile < work.tiles; ++tile) {
            ring.keys(p.qkv_maps, work, tile, 1);
            ring.keys(p.qkv_maps, work, tile, 2);
        }
        if (p.tables[0] != 0) ring.tables(p.table_maps, work);
    }
}

// delta = dO . O and lse in base 2 of a lane's two queries; delta is left for the key pass.
template <class Tile>
__device__ __forceinline__ void row_statistics(float (&delta)[2], float (&lse)[2],
                                               const RelPosAttentionBwdQuerySm90Params& p, const StreamWork<Tile>& work,
                                               uint32_t first) {
    using T = typename Tile::T;
    const AttentionUnit& unit = work.unit;
    const uint32_t g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t row = first + g + 8 * half;
        const bool exists = work.exists(row);
        const Token query = work.query(row);
        delta[half] = lse[half] = 0.0f;
        if (exists) {
            const uint64_t at = (unit.token(query) * unit.s.num_heads + unit.head) * Tile::kDim;
#pragma unroll
            for (uint32_t piece = 0; piece < Tile::kDim / 8; piece += 4) {
                if (piece + t >= Tile::kDim / 8) continue;
                float out[8], dout[8];
                load(out, global<const T>(p.out) + at + 8 * (piece + t));
                load(dout, global<const T>(p.dout) + at + 8 * (piece + t));
#pragma unroll
                for (int i = 0; i < 8; ++i) delta[half] = fmaf(out[i], dout[i], delta[half]);
            }
        }
        delta[half] = quad_sum(delta[half]);
        if (!exists) continue;
        const uint64_t index = unit.first_row() + query.y * unit.valid_w + query.x;
        lse[half] = global<const float>(p.lse)[index] * kLog2e;
        if (t == 0) global<float>(p.delta)[index] = delta[half];
    }
}

// For the key pass: the biases of this warp's queries that exist, lse taken off rel_h here and there.
template <class Tile>
__device__ __forceinline__ void write_biases(const Biases<Tile>& bias, const StreamWork<Tile>& work, uint32_t first,
                                             const float (&lse)[2], float* to) {
    const RelPosAttentionShape& s = work.unit.s;
    const uint32_t pad_h = ceil_div(s.side_h, 8u) * 8, pad_w = ceil_div(s.side_w, 8u) * 8, pitch = pad_h + pad_w;
    const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (uint32_t i = 0; i < 16; ++i) {
        const float shift = ptx::shfl_idx(i < 8 ? lse[0] : lse[1], i % 8 * 4);
        const uint32_t row = first + i;
        if (!work.exists(row)) continue;
        const Token query = work.query(row);
        float* of_query = to + (work.unit.first_row() + query.y * work.unit.valid_w + query.x) * pitch;
        for (uint32_t y = lane; y < pad_h; y += kWarp) {
            const float value = y < s.side_h ? bias.h[row * bias.stride_h + y] - shift : -INFINITY;
            if (y < s.side_h) bias.h[row * bias.stride_h + y] = value;
            of_query[y] = value;
        }
        for (uint32_t x = lane; x < pad_w; x += kWarp)
            of_query[pad_h + x] = x < s.side_w ? bias.w[row * bias.stride_w + x] : -INFINITY;
    }
    __syncwarp();
}

// Left operands [64, 16 Steps] from a function of a lane's half and the first of two columns.
template <class T, int Steps, class Pair>
__device__ __forceinline__ void gather_left(uint32_t (&left)[Steps][4], Pair pair) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < Steps; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i % 2, column = 16 * k + 8 * (i / 2) + 2 * t;
            left[k][i] = pack<T>(pair(half, column), pair(half, column + 1));
        }
}

// Computes this lane's terms anew that are not finite, as the sum of term(half, column, i) for i below `count`. Zero
// times a value that is not finite (a table's mask of minus infinity) is NaN. No query may get NaN from a row that it
// does not read.
template <int Dim, class Term>
__device__ __forceinline__ void mend_terms(ChannelSums<Dim>& terms, uint32_t count, Term term) {
    float zero = 0.0f;
#pragma unroll
    for (int n = 0; n < Dim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) zero = fmaf(terms.at(n, i), 0.0f, zero);
    if (zero == 0.0f) return;
    // Hidden, so that the compiler works nothing of this out before the loops over keys, where it would take registers.
    const uint32_t first = ptx::hide(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int n = 0; n < Dim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float& sum = terms.at(n, i);
            if (is_finite(sum)) continue;
            sum = 0.0f;
#pragma unroll 1
            for (uint32_t row = 0; row < count; ++row) sum += term(i / 2, 8 * n + first + i % 2, row);
        }
}

template <class Tile>
__device__ __forceinline__ void consume_query_pass(const RelPosAttentionBwdQuerySm90Params& p,
                                                   QueryPassStorage<Tile>& shared) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim, kCols = Tile::kCols, kRows = Tile::kRows, kKeys = Tile::kKeys,
                  kQueries = Tile::kQueries;
    static_assert(Tile::kGroups == 2, "the two take turns at the tables' boxes");
    const RelPosAttentionShape& s = p.shape;
    const uint32_t group = ptx::shfl_idx(threadIdx.x / kGroup, 0), warp = threadIdx.x / kWarp,
                   g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    const uint32_t first = 16 * warp, own_row = first + g;
    const uint64_t channels = s.num_heads * kDim;
    const float scale = s.softmax_scale * kLog2e;
    StreamReader<Tile> ring{shared};

    const BiasGradients<Tile> gradients(s, reinterpret_cast<float*>(&shared + 1));
    const Biases<Tile>& bias = gradients.bias;
    const float* rel_h = bias.h + own_row * bias.stride_h;
    float *rel_w = bias.w + own_row * bias.stride_w, *drel_h = gradients.dh + own_row * bias.stride_h;

    const uint64_t partial_size = uint64_t(2 * s.side_h - 1 + 2 * s.side_w - 1) * kDim;
    const auto partial = [&] { return global<float>(p.table_partials) + blockIdx.x * partial_size; };
    if (p.table_partials != 0)
        for (uint64_t i = threadIdx.x; i < partial_size; i += 2 * kGroup) partial()[i] = 0.0f;

    uint32_t count = 0;
    for (uint32_t item = blockIdx.x; item < p.items; item += gridDim.x, ++count) {
        const StreamWork<Tile> work(s, item);
        const AttentionUnit& unit = work.unit;
        const Token query[2] = {work.query(own_row), work.query(own_row + 8)};
        float delta[2], lse[2];
        row_statistics(delta, lse, p, work, first);
        ptx::mbarrier_wait_parity(shared.queries_full, count % 2);
        project_tables(bias, ring, work, group, p.tables[0] != 0);
        write_biases(bias, work, first, lse, global<float>(p.bias));

        ChannelSums<kDim> dq;
        float scores[kKeys / 2], dweights[kKeys / 2], fragment_w[kCols / 2], fragment_dw[kCols / 2];
        uint32_t dscores[kKeys / 16][4];
        const auto rel_w_at = [&](uint32_t x, int j, int half) {
            return reinterpret_cast<Vec<float, 2>*>(rel_w + 8 * half * bias.stride_w + x + 8 * j + 2 * t);
        };
        const auto pass_keys = [&](auto with_dropout) {
            constexpr bool kDropout = decltype(with_dropout)::value;
            Token key{0, 0};
            for (uint32_t tile = 0; tile < work.tiles; ++tile, key = work.key_after(key)) {
                const unsigned char* keys = ring.wait();
                const unsigned char* values = ring.wait();
                ptx::wgmma_fence();
                multiply_rows<T, kDim, kKeys, kQueries, kKeys>(scores, shared.queries, group * kGroupRows, keys);
                multiply_rows<T, kDim, kKeys, kQueries, kKeys>(dweights, shared.dout, group * kGroupRows, values);
                if (key.y == 0) {
#pragma unroll
                    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const auto pair = *rel_w_at(key.x, j, half);
                            fragment_w[4 * j + 2 * half] = pair.at[0];
                            fragment_w[4 * j + 2 * half + 1] = pair.at[1];
                            fragment_dw[4 * j + 2 * half] = fragment_dw[4 * j + 2 * half + 1] = 0.0f;
                        }
                }
                ptx::wgmma_wait_group<1>();  // the scores, and the product of the tile before
                ptx::wgmma_pin(scores);
                dq.pin();
                if (tile > 0) ring.release(ring.next - 4);
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        const float bias_h = rel_h[8 * half * bias.stride_h + key.y + r];
#pragma unroll
                        for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
                            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                                float& score = scores[4 * (r * (kCols / 8) + j) + i];
                                score = ptx::ex2_approx(fmaf(score, scale, fragment_w[4 * j + i]) + bias_h);
                            }
                    }
                [[maybe_unused]] KeptKeys<Tile> kept[2] = {};
                if constexpr (kDropout) {
                    kept[0] = kept_keys<Tile>(s, unit.dropout_row(query[0]), key.y, key.x);
                    kept[1] = kept_keys<Tile>(s, unit.dropout_row(query[1]), key.y, key.x);
                }
                ptx::wgmma_wait_group<0>();
                ptx::wgmma_pin(dweights);
                ring.release(ring.next - 1);
                float sums[2][kRows];
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        float sum = 0.0f;
#pragma unroll
                        for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
                            for (int c = 0; c < 2; ++c) {
                                const int column = r * (kCols / 8) + j, n = 4 * column + 2 * half + c;
                                float dweight = dweights[n];
                                if constexpr (kDropout)
                                    dweight *= dropout_factor(s.dropout, kept[half], 2 * column + c);
                                scores[n] *= dweight - delta[half];
                                fragment_dw[4 * j + 2 * half + c] += scores[n];
                                sum += scores[n];
                            }
                        sums[half][r] = sum;
                    }
                pack_weights<T, kKeys>(dscores, scores);
                ptx::wgmma_fence();
                add_weighted<T, kDim, kKeys>(dq, dscores, keys);
                // Beside that product.
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int r = 0; r < kRows; ++r) {
                        // All of a query's four lanes have read its rel_h.
                        const float sum = quad_sum(sums[half][r]);
                        float& total = drel_h[8 * half * bias.stride_h + key.y + r];
                        if (t == 0) total = key.x == 0 ? sum : total + sum;
                    }
                // Only this lane has read what was here.
                if (key.y + kRows >= s.side_h) {
#pragma unroll
                    for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
                        for (int half = 0; half < 2; ++half)
                            *rel_w_at(key.x, j, half) = {fragment_dw[4 * j + 2 * half],
                                                         fragment_dw[4 * j + 2 * half + 1]};
                }
            }
        };
        compile_twice(s.dropout, pass_keys);
        ptx::wgmma_wait_group<0>();
        dq.pin();
        ring.release(ring.next - 2);
        __syncwarp();

        // The gradient of a box's row `i` for a query of the block, at `row` of its panel.
        const auto gradient = [&](bool is_h, uint32_t row, int row_of_zero, int i) {
            const uint32_t key = row_of_zero - i;
            if (key >= (is_h ? s.side_h : s.side_w)) return 0.0f;
            return is_h ? gradients.dh[row * bias.stride_h + key] : bias.w[row * bias.stride_w + key];
        };
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) dq.at(n, i) *= s.softmax_scale;
        for (uint32_t chunk = 0; p.tables[0] != 0 && chunk < work.chunks; ++chunk) {
            const unsigned char* rows = ring.wait();
            const int row_of_zero[2] = {work.row_of_zero(chunk, query[0]), work.row_of_zero(chunk, query[1])};
            uint32_t left[kTableRows / 16][4];
            gather_left<T>(left, [&](int half, int i) {
                return gradient(chunk < work.chunks_h, own_row + 8 * half, row_of_zero[half], i);
            });
            ChannelSums<kDim> terms;
            ptx::wgmma_fence();
            add_weighted<T, kDim, kTableRows>(terms, left, rows);
            ptx::wgmma_wait_group<0>();
            terms.pin();
            mend_terms(terms, kTableRows, [&](int half, uint32_t column, uint32_t i) {
                const bool is_h = chunk < work.chunks_h;
                if (row_of_zero[half] - i >= (is_h ? s.side_h : s.side_w)) return 0.0f;
                const float weight = gradient(is_h, own_row + 8 * half, row_of_zero[half], i);
                const unsigned char* piece = rows + Panel<kTableRows, kDim>::offset(i, column / 8);
                return to_float(from_float<T>(weight)) * to_float(reinterpret_cast<const T*>(piece)[column % 8]);
            });
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) dq.at(n, i) += terms.at(n, i);
            __syncwarp();  // all lanes have read the rows
            ring.release(ring.next - 1);
        }
        T* to[2] = {};
        const float ones[2] = {1.0f, 1.0f};
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (work.exists(own_row + 8 * half))
                to[half] = global<T>(p.dqkv) + unit.token(query[half]) * 3 * channels + unit.head * kDim;
        store_rows<T, kDim>(dq, ones, to);

        if (p.table_partials != 0) {
            ptx::bar_sync(1, 2 * kGroup);  // all queries' drel are there, and the partial sums so far
            for (uint32_t chunk = group; chunk < work.chunks; chunk += 2) {
                const bool is_h = chunk < work.chunks_h;
                const uint32_t in_box =
                    own_row % kGroupRows;  // the rows of the box that are this lane's, this and the eighth after it
                uint32_t left[kQueries / 16][4];
                // Hidden, so that the places of all rows are not worked out before the loop over keys.
                gather_left<T>(left, [&](int half, uint32_t i) {
                    const uint32_t row = ptx::hide(i);
                    return work.exists(row)
                               ? gradient(is_h, row, work.row_of_zero(chunk, work.query(row)), in_box + 8 * half)
                               : 0.0f;
                });
                ChannelSums<kDim> sums;
                ptx::wgmma_fence();
                add_weighted<T, kDim, kQueries>(sums, left, shared.queries);
                ptx::wgmma_wait_group<0>();
                sums.pin();
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t row = in_box + 8 * half;
                    if (work.distance(chunk) + row >= 2 * (is_h ? s.side_h : s.side_w) - 1) continue;
                    float* of_row = partial() + uint64_t(work.table_row(chunk) + row) * kDim + 2 * t;
#pragma unroll
                    for (int n = 0; n < kDim / 8; ++n) {
                        auto& pair = *reinterpret_cast<Vec<float, 2>*>(of_row + 8 * n);
                        pair = {pair.at[0] + sums.at(n, 2 * half), pair.at[1] + sums.at(n, 2 * half + 1)};
                    }
                }
            }
            ptx::bar_sync(1, 2 * kGroup);  // nobody needs this block's drel any more
        }
        if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(shared.queries_empty);
    }
}

template <class Tile>
__device__ __forceinline__ void rel_pos_attention_bwd_query_sm90(const RelPosAttentionBwdQuerySm90Params& p) {
    auto& shared = ptx::shared_storage<QueryPassStorage<Tile>>();
    if (threadIdx.x == 0) {
        Tile::init_barriers(shared);
        ptx::mbarrier_init(shared.queries_empty, Tile::kGroups * kGroup / kWarp);
        ptx::fence_mbarrier_init();
    }
    // Rows that no token is loaded to: as right operand of dR they would count, times zero, if they were not finite.
    constexpr int kLoaded = Tile::kQueryRows * Tile::kCols;
    if constexpr (kLoaded < Tile::kQueries) {
        using Rows = Panel<Tile::kQueries, Tile::kDim>;
        for (uint32_t i = threadIdx.x; i < (Tile::kQueries - kLoaded) * (Tile::kDim / 8); i += Tile::kThreads)
            *reinterpret_cast<Vec<uint32_t, 4>*>(
                shared.queries + Rows::offset(kLoaded + i / (Tile::kDim / 8), i % (Tile::kDim / 8))) = {};
        ptx::fence_proxy_async();
    }
    __syncthreads();
    // From one lane, so that the compiler knows it to be the same for the warp.
    if (ptx::shfl_idx(threadIdx.x / kGroup, 0) == Tile::kGroups) {
        ptx::setmaxnreg_dec<Tile::kLoaderRegisters>();
        if (threadIdx.x % kGroup == 0) load_query_pass<Tile>(p, shared);
    } else {
        ptx::setmaxnreg_inc<Tile::kRegisters>();
        consume_query_pass<Tile>(p, shared);
    }
}
