// The backward of rel_pos_attention, second pass, by keys: dk, dv, and the sums over keys outside the grid.
//
//   dv_m = sum_n dropout(P)[n, m] dO_n          dk_m = softmax_scale sum_n dS[n, m] q_n
//
// A block holds a key tile of a unit, 8 key rows by 8 columns, two key rows a warp. It goes through the unit's queries.
// It computes S^T, keys as rows, so that P^T and dS^T are operands without a transpose. A lane's two keys share their
// column, so rel_w is one number for both, and rel_h one for each.
//
// The biases are the query pass's. In 16 bits lse is taken off: P = exp2(q k scale log2(e) + rel_w + rel_h). In f32
// they are as they are, and max and 1 / sum come with the query's delta. S and dP have the query pass's bits. Queries
// that do not exist are rows of zeros in q and dO, and add nothing. Keys that do not exist have a bias of minus
// infinity.
#pragma once
#include "rel_pos_attention/common.cuh"

template <class Element, int Dim, int Queries> struct KeyTile {
    using T = Element;
    static constexpr int kDim = Dim, kQueries = Queries, kSide = REL_POS_ATTENTION_KEY_SIDE,
                         kWarps = REL_POS_ATTENTION_KEY_WARPS;
    static constexpr int kKeys = kSide * kSide, kThreads = kWarp * kWarps, kCols = kSide;
    static constexpr int kStride = kDim + kRowPad;
    static_assert(kSide == 8 && 16 * kWarps == kKeys, "the 8 rows of an accumulator are one key row, a warp has two");
    // 16-byte aligned rows of 8 biases; 12 floats keep the lanes' reads in different banks.
    static constexpr int kBiasStride = 12;
    struct Stage {
        T q[kQueries][kStride], dout[kQueries][kStride];
        float rel_h[kQueries][kBiasStride], rel_w[kQueries][kBiasStride], statistics[kQueries][kRowStatistics<T>];
    };
    // After the stages, in their place, the sums over keys outside the grid.
    struct Stages {
        union {
            Stage stages[2];
            float pad_sums[kWarps][2][kDim];
        };
    };
    struct StagesAndKeys : Stages {
        T keys[2 * kKeys][kStride];
    };
    // In 16 bits, registers take the keys and values before the stages need the memory. In f32 they and their two tf32
    // parts would be too many, and stay in memory.
    static constexpr bool kKeysInRegisters = sizeof(T) == 2;
    using Storage = std::conditional_t<kKeysInRegisters, Stages, StagesAndKeys>;
    static_assert(sizeof(Stages) >= 2 * kKeys * kStride * sizeof(T) || !kKeysInRegisters);
};

// The vectors of a block of queries that a thread copies. From block to block the thread's queries move on by as many
// tokens, so the division that finds them is made once.
template <class Tile> struct QueryVectors {
    using T = typename Tile::T;
    static constexpr int kPieces = Tile::kDim / kVec<T>, kCount = ceil_div(Tile::kQueries * kPieces, Tile::kThreads);
    static_assert(Tile::kQueries * kPieces % Tile::kThreads == 0);
    Token query[kCount];
    uint32_t token[kCount];  // from the unit's first one

    __device__ __forceinline__ explicit QueryVectors(const AttentionUnit& unit) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            query[k] = unit.query(index(k) / kPieces);
            token[k] = query[k].y * unit.s.w + query[k].x;
        }
    }
    static __device__ __forceinline__ uint32_t index(int k) { return threadIdx.x + k * Tile::kThreads; }

    // Starts copying this block's rows from `q` and `dout`, of the unit's first token, and moves on to the next block.
    __device__ __forceinline__ void copy(typename Tile::Stage& to, const AttentionUnit& unit, const T* q,
                                         const T* dout) {
        const RelPosAttentionShape& s = unit.s;
        const uint32_t channels = s.num_heads * s.head_dim;
        const Token step = unit.query(Tile::kQueries);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            const uint32_t row = index(k) / kPieces, column = index(k) % kPieces * kVec<T>;
            const bool valid = query[k].y < unit.valid_h && column < s.head_dim;
            ptx::cp_async<16>(&to.q[row][column], q + (uint64_t(token[k]) * (3 * channels) + column), valid);
            ptx::cp_async<16>(&to.dout[row][column], dout + (uint64_t(token[k]) * channels + column), valid);
            query[k] = {query[k].y + step.y, query[k].x + step.x};
            token[k] += step.y * s.w + step.x;
            if (query[k].x >= unit.valid_w) {
                query[k] = {query[k].y + 1, query[k].x - unit.valid_w};
                token[k] += s.w - unit.valid_w;
            }
        }
    }
};

template <class Tile> __device__ __forceinline__ void rel_pos_attention_bwd_key(const RelPosAttentionBwdKeyParams& p) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim, kQueries = Tile::kQueries, kKeys = Tile::kKeys, kSide = Tile::kSide,
                  kStride = Tile::kStride;
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    const RelPosAttentionShape& s = p.shape;
    const uint32_t channels = s.num_heads * s.head_dim;
    const uint32_t tile_cols = ceil_div(s.side_w, uint32_t(kSide)),
                   tiles = tile_cols * ceil_div(s.side_h, uint32_t(kSide));
    const AttentionUnit unit(s, blockIdx.x / tiles);
    const uint32_t tile = blockIdx.x % tiles, y = tile / tile_cols * kSide, x = tile % tile_cols * kSide;
    // Keys outside the grid have no gradients but their sum.
    if (p.pad_partials == 0 && !unit.on_grid({y, x})) return;

    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const uint32_t head_column = unit.head * s.head_dim, queries = unit.queries();
    const T *qkv = global<const T>(p.qkv), *pad = p.pad == 0 ? nullptr : global<const T>(p.pad),
            *dout = global<const T>(p.dout);
    const bool wide = vectorisable<T>(s.head_dim, p.qkv, p.pad, p.dout);

    T(*keys)[kStride];
    if constexpr (Tile::kKeysInRegisters) keys = reinterpret_cast<T(*)[kStride]>(&shared);
    else keys = shared.keys;
    copy_keys<Tile>(keys, s, unit, y, x, wide, qkv, pad, 1);
    copy_keys<Tile>(keys + kKeys, s, unit, y, x, wide, qkv, pad, 2);
    wait_for_copies();
    FragmentA<T> k[kDim / 16], v[kDim / 16];
    const auto load_keys = [&](int c) {
        load_a(k[c], &keys[16 * warp][16 * c], kStride);
        load_a(v[c], &keys[kKeys + 16 * warp][16 * c], kStride);
    };
    if constexpr (Tile::kKeysInRegisters) {
#pragma unroll
        for (int c = 0; c < kDim / 16; ++c) load_keys(c);
        __syncthreads();
    }

    const uint32_t pad_h = ceil_div(s.side_h, 8u) * 8, pitch = pad_h + ceil_div(s.side_w, 8u) * 8;
    const float* bias = global<const float>(p.bias) + unit.first_row() * pitch;
    constexpr int kStatistics = kRowStatistics<T>;
    const float* statistics = global<const float>(p.delta) + unit.first_row() * kStatistics;
    QueryVectors<Tile> vectors(unit);
    const T *first_q = qkv + unit.first_token * (3 * channels) + head_column,
            *first_dout = dout + unit.first_token * channels + head_column;
    const auto copy_rows_of = [&](uint32_t first, typename Tile::Stage& to) {
        const auto source = [&](const T* array, uint64_t stride) {
            return [=, &unit](int row) -> const T* {
                const uint32_t n = first + row;
                return n < queries ? array + unit.token(unit.query(n)) * stride : nullptr;
            };
        };
        const bool in_vectors = !Tile::kKeysInRegisters && wide;
        copy_rows<Tile>(in_vectors, to.q, kQueries, s.head_dim, qkv, source(qkv + head_column, 3 * channels));
        copy_rows<Tile>(in_vectors, to.dout, kQueries, s.head_dim, dout, source(dout + head_column, channels));
    };
    const auto copy_block = [&](uint32_t first, int stage) {
        auto& to = shared.stages[stage];
        if (Tile::kKeysInRegisters && wide) vectors.copy(to, unit, first_q, first_dout);
        else copy_rows_of(first, to);
#pragma unroll
        for (int piece = 0; piece < kQueries * 4 / Tile::kThreads; ++piece) {
            const uint32_t i = threadIdx.x + piece * Tile::kThreads;
            const uint32_t row = i / 4, n = first + row, column = i % 2 * 4;
            const bool is_h = i % 4 < 2, valid = n < queries;
            float* at = is_h ? &to.rel_h[row][column] : &to.rel_w[row][column];
            ptx::cp_async<16>(at, valid ? bias + uint64_t(n) * pitch + (is_h ? y : pad_h + x) + column : bias, valid);
        }
        for (uint32_t i = threadIdx.x; i < kQueries; i += Tile::kThreads) {
            const bool valid = first + i < queries;
            ptx::cp_async<4 * kStatistics>(to.statistics[i],
                                           valid ? statistics + uint64_t(first + i) * kStatistics : statistics, valid);
        }
    };
    copy_block(0, 0);
    ptx::cp_async_commit_group();

    // Without keys in its rows a warp helps with the copies alone.
    const bool active = y + 2 * warp < s.side_h;
    const float scale = s.softmax_scale * kLog2e;
    float dk[kDim / 8][4] = {}, dv[kDim / 8][4] = {};
    for (uint32_t first = 0, step = 0; first < queries; first += kQueries, ++step) {
        if (first + kQueries < queries) copy_block(first + kQueries, (step + 1) % 2);
        ptx::cp_async_commit_group();
        ptx::cp_async_wait_group<1>();
        __syncthreads();  // everybody's copies of this block have landed
        if (active) {
            const auto& from = shared.stages[step % 2];
#pragma unroll 1
            for (int block = 0; block < kQueries && first + block < queries; block += 16) {
                float scores[2][4] = {}, dweights[2][4] = {};
#pragma unroll
                for (int c = 0; c < kDim / 16; ++c) {
                    if constexpr (!Tile::kKeysInRegisters) load_keys(c);
                    FragmentB<T> b[2];
                    load_b(b, &from.q[block][16 * c], kStride);
                    mma_transposed(scores[0], k[c], b[0]);
                    mma_transposed(scores[1], k[c], b[1]);
                    load_b(b, &from.dout[block][16 * c], kStride);
                    mma_transposed(dweights[0], v[c], b[0]);
                    mma_transposed(dweights[1], v[c], b[1]);
                }
                uint32_t kept = ~0u;
                if (s.dropout.threshold != 0) {
                    kept = 0;
#pragma unroll 1
                    for (int i = 0; i < 8; ++i) {
                        const uint64_t row = unit.dropout_row(unit.query(first + block + 8 * (i / 4) + 2 * t + i % 2));
                        kept |= uint32_t(dropout_keeps(s.dropout, row, (y + 2 * warp + i / 2 % 2) * s.side_w + x + g))
                                << i;
                    }
                }
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    float &score = scores[i / 4][i % 4], &dweight = dweights[i / 4][i % 4];
                    const int row = block + 8 * (i / 4) + 2 * t + i % 2;
                    const float rel_w = from.rel_w[row][g], rel_h = from.rel_h[row][2 * warp + i / 2 % 2];
                    float weight;
                    if constexpr (kExactWeights<T>) {
                        const auto* row_of = from.statistics[row];
                        weight = ptx::ex2_approx(fmaf(score, scale, rel_w) + rel_h - row_of[1]) * row_of[2];
                    } else {
                        weight = ptx::ex2_approx(fmaf(score, scale, rel_w + rel_h));
                    }
                    const float factor = s.dropout.threshold != 0 ? dropout_factor(s.dropout, kept, i) : 1.0f;
                    score = weight * factor;
                    dweight = weight * (dweight * factor - from.statistics[row][0]);
                }
                FragmentA<T> weights, dscores;
                make_a(weights, scores[0], scores[1]);
                make_a(dscores, dweights[0], dweights[1]);
#pragma unroll
                for (int n = 0; n < kDim / 16; ++n) {
                    FragmentB<T> b[2];
                    load_b_trans(b, &from.dout[block][16 * n], kStride);
                    mma(dv[2 * n], weights, b[0]);
                    mma(dv[2 * n + 1], weights, b[1]);
                    load_b_trans(b, &from.q[block][16 * n], kStride);
                    mma(dk[2 * n], dscores, b[0]);
                    mma(dk[2 * n + 1], dscores, b[1]);
                }
            }
        }
        __syncthreads();  // nobody reads this stage any more
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Token key{y + 2 * warp + half, x + g};
        if (!unit.on_grid(key)) continue;
        T* to = global<T>(p.dqkv) + unit.token(key) * 3 * channels + channels + head_column;
#pragma unroll
        for (int c = 0; c < kDim / 8; ++c) {
            store_pair(to, 8 * c + 2 * t, s.head_dim, dk[c][2 * half] * s.softmax_scale,
                       dk[c][2 * half + 1] * s.softmax_scale);
            store_pair(to + channels, 8 * c + 2 * t, s.head_dim, dv[c][2 * half], dv[c][2 * half + 1]);
        }
    }

    if (p.pad_partials == 0) return;
    bool outside[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Token key{y + 2 * warp + half, x + g};
        outside[half] = key.y < s.side_h && key.x < s.side_w && !unit.on_grid(key);
    }
#pragma unroll
    for (int c = 0; c < kDim / 8; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&gradient)[4] = i < 2 ? dk[c] : dv[c];
            float sum = (outside[0] ? gradient[i % 2] : 0.0f) + (outside[1] ? gradient[i % 2 + 2] : 0.0f);
            for (int mask = 4; mask < kWarp; mask *= 2) sum += ptx::shfl_xor(sum, mask);
            if (g == 0) shared.pad_sums[warp][i / 2][8 * c + 2 * t + i % 2] = sum;
        }
    __syncthreads();
    const uint32_t window = unit.index / s.num_heads;
    float* partial = global<float>(p.pad_partials) + uint64_t(window * tiles + tile) * 3 * channels + head_column;
    for (uint32_t c = threadIdx.x; c < s.head_dim; c += Tile::kThreads) {
        float sums[2] = {};
        for (int w = 0; w < Tile::kWarps; ++w)
            for (int part = 0; part < 2; ++part) sums[part] += shared.pad_sums[w][part][c];
        partial[c] = 0.0f;
        partial[channels + c] = sums[0] * s.softmax_scale;
        partial[2 * channels + c] = sums[1];
    }
}
