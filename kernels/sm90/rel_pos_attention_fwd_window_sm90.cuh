// The forward of rel_pos_attention (see ../rel_pos_attention_fwd.cuh) on sm_90a, for windows of at most 14 x 16 tokens:
// one warpgroup has a unit, and whole rows of scores lie in its registers.
//
// Everything is tiles of rows of 16 columns, in which a window's row of 14 has two of its neighbour's tokens: as keys
// they get no weight, as queries they are not stored. So a warp's 16 queries are a row of the window, a score tile is
// 64 x 224, and rel_w is a fragment of 64 x 16. The unit's keys, values and tables are loaded once, its queries four rows
// at a time, the next ones while these are worked on. Keys outside the grid are zeros as TMA leaves them, or become `pad`.
//
// One unit, SAM ViT-B: 75 KB in, 25 KB out, and on 4 tiles 2 x 64 x 224 x 64 multiplications; two units share a
// multiprocessor, so that one computes while the other loads.
#pragma once
#include "rel_pos_attention_sm90.cuh"

template <class Element, int Dim> struct WindowTile {
    using T = Element;
    static constexpr int kDim = Dim, kCols = REL_POS_ATTENTION_SM90_WINDOW_COLS, kRows = REL_POS_ATTENTION_SM90_WINDOW_ROWS;
    static constexpr int kKeys = kCols * kRows, kBoxRows = REL_POS_ATTENTION_SM90_WINDOW_BOX_ROWS;
    static constexpr int kQueries = kGroupRows, kQueryRows = kQueries / kCols;
    struct Storage {
        alignas(1024) unsigned char queries[2][Panel<kQueries, Dim>::kBytes];
        alignas(1024) unsigned char keys[Panel<kKeys, Dim>::kBytes], values[Panel<kKeys, Dim>::kBytes];
        alignas(1024) unsigned char tables[Panel<kTableRows, Dim>::kBytes];
        ptx::mbarrier queries_full[2], tables_full, keys_full, values_full;
    };
};

// The keys and values of tokens outside the grid become those of `pad`.
template <class Tile>
__device__ __forceinline__ void fill_pad(typename Tile::Storage& shared, const AttentionUnit& unit, const typename Tile::T* pad) {
    constexpr int kPieces = Tile::kDim / 8;
    const uint32_t channels = unit.s.num_heads * Tile::kDim;
    for (uint32_t i = threadIdx.x; i < Tile::kKeys * kPieces; i += kGroup) {
        const uint32_t row = i / kPieces, piece = i % kPieces;
        const Token key{row / Tile::kCols, row % Tile::kCols};
        if (unit.on_grid(key) || key.y >= unit.s.side_h || key.x >= unit.s.side_w) continue;
        const auto* from = reinterpret_cast<const Vec<uint32_t, 4>*>(pad + channels + unit.head * Tile::kDim) + piece;
        const uint32_t at = Panel<Tile::kKeys, Tile::kDim>::offset(row, piece);
        *reinterpret_cast<Vec<uint32_t, 4>*>(shared.keys + at) = *from;
        *reinterpret_cast<Vec<uint32_t, 4>*>(shared.values + at) = from[channels / 8];
    }
    ptx::fence_proxy_async();
    __syncthreads();
}

template <class Tile> __device__ __forceinline__ void rel_pos_attention_fwd_window_sm90(const RelPosAttentionFwdSm90Params& p) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys, kQueries = Tile::kQueries;
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    const RelPosAttentionShape& s = p.shape;
    const AttentionUnit unit(s, blockIdx.x);
    const uint32_t channels = s.num_heads * kDim, head_column = unit.head * kDim;
    const uint32_t warp = ptx::shfl_idx(threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    const uint32_t tiles = ceil_div(unit.valid_h, uint32_t(Tile::kQueryRows));
    const auto load_queries_of = [&](uint32_t tile) {
        ptx::mbarrier& full = shared.queries_full[tile % 2];
        ptx::mbarrier_arrive_expect_tx(full, kQueries * kDim * 2);
        load_tokens<Tile, kQueries>(
            shared.queries[tile % 2], Tile::kQueryRows, p, full, head_column, unit.origin.x, unit.origin.y + tile * Tile::kQueryRows, unit.image);
    };
    if (threadIdx.x == 0) {
        for (auto& full : shared.queries_full) ptx::mbarrier_init(full, 1);
        ptx::mbarrier_init(shared.tables_full, 1);
        ptx::mbarrier_init(shared.keys_full, 1);
        ptx::mbarrier_init(shared.values_full, 1);
        ptx::fence_mbarrier_init();
        load_queries_of(0);
        if (p.tables != 0) {
            ptx::mbarrier_arrive_expect_tx(shared.tables_full, kTableRows * kDim * 2);
            load_table_rows<kTableRows, kDim>(shared.tables, p, shared.tables_full, 0);
        }
        ptx::mbarrier_arrive_expect_tx(shared.keys_full, kKeys * kDim * 2);
        load_tokens<Tile, kKeys>(shared.keys, Tile::kRows, p, shared.keys_full, channels + head_column, unit.origin.x, unit.origin.y, unit.image);
        ptx::mbarrier_arrive_expect_tx(shared.values_full, kKeys * kDim * 2);
        load_tokens<Tile, kKeys>(shared.values, Tile::kRows, p, shared.values_full, 2 * channels + head_column, unit.origin.x, unit.origin.y, unit.image);
    }

    const Biases<Tile> bias(s, reinterpret_cast<float*>(&shared + 1));
    float *rel_h = bias.h + 16 * warp * bias.stride_h, *rel_w = bias.w + 16 * warp * bias.stride_w;
    fill_biases(rel_h, bias.stride_h, s.side_h, p.tables != 0);
    fill_biases(rel_w, bias.stride_w, s.side_w, p.tables != 0);
    rel_h += g * bias.stride_h;
    rel_w += g * bias.stride_w;
    __syncthreads();
    if (p.tables != 0) ptx::mbarrier_wait_parity(shared.tables_full, 0);
    const bool padded = p.pad != 0 && (unit.valid_h < s.side_h || unit.valid_w < s.side_w);
    if (padded) {
        ptx::mbarrier_wait_parity(shared.keys_full, 0);
        ptx::mbarrier_wait_parity(shared.values_full, 0);
        fill_pad<Tile>(shared, unit, global<const T>(p.pad));
    }

    const float scale = s.softmax_scale * kLog2e;
#pragma unroll 1
    for (uint32_t tile = 0; tile < tiles; ++tile) {
        if (tile > 0) __syncthreads();  // nobody reads the other queries any more
        if (threadIdx.x == 0 && tile + 1 < tiles) load_queries_of(tile + 1);
        const uint32_t y = tile * Tile::kQueryRows + warp;
        const Token query[2] = {{y, g}, {y, g + 8}};
        const bool exists[2] = {unit.on_grid(query[0]), unit.on_grid(query[1])};
        const unsigned char* queries = shared.queries[tile % 2];
        ptx::mbarrier_wait_parity(shared.queries_full[tile % 2], tile / 2 % 2);

        if (p.tables != 0) {
            float products[kTableRows / 2];
            ptx::wgmma_fence();
            multiply_rows<T, kDim, kTableRows, kQueries, kTableRows>(products, queries, 0, shared.tables);
            ptx::wgmma_wait_group<0>();
            ptx::wgmma_pin(products);
            // The tables are one box, h's rows first.
            int row_of_h[2], row_of_w[2];
            uint32_t sides_h[2], sides_w[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row_of_h[half] = int(query[half].y + s.side_h - 1);
                row_of_w[half] = int(query[half].x + s.side_w - 1 + 2 * s.side_h - 1);
                sides_h[half] = exists[half] ? s.side_h : 0;
                sides_w[half] = exists[half] ? s.side_w : 0;
            }
            scatter_biases(rel_h, bias.stride_h, row_of_h, sides_h, products);
            scatter_biases(rel_w, bias.stride_w, row_of_w, sides_w, products);
            __syncwarp();
        }
        float scores[kKeys / 2];
        if (tile == 0) ptx::mbarrier_wait_parity(shared.keys_full, 0);
        ptx::wgmma_fence();
        multiply_rows<T, kDim, kKeys, kQueries, kKeys>(scores, queries, 0, shared.keys);
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_pin(scores);

        OnlineSoftmax state;
        uint32_t weights[kKeys / 16][4] = {};
        if (y < unit.valid_h) {
            float fragment_w[Tile::kCols / 2], rescale[2];
#pragma unroll
            for (int j = 0; j < Tile::kCols / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) fragment_w[4 * j + i] = rel_w[8 * (i / 2) * bias.stride_w + 8 * j + 2 * t + i % 2];
            softmax_of_tile<Tile>(rescale, scores, state, fragment_w, rel_h, bias.stride_h, scale);
            drop_weights<Tile>(scores, s, unit, query, Token{0, 0});
            pack_weights<T, kKeys>(weights, scores);
        }
        ChannelSums<kDim> out;
        if (tile == 0) ptx::mbarrier_wait_parity(shared.values_full, 0);
        ptx::wgmma_fence();
        add_weighted<T, kDim, kKeys>(out, weights, shared.values);
        ptx::wgmma_wait_group<0>();
        out.pin();
        store_queries<T, kDim>(p, unit, query, exists, out, state);
    }
}
