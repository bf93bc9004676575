// The forward of rel_pos_attention (see ../rel_pos_attention_fwd.cuh) on sm_90a, for windows that the grid is a whole
// number of: TMA, wgmma, and warpgroups with different tasks.
//
// A block holds 128 queries of a unit, whole stretches of kCols of grid rows, 64 for each of two warpgroups. A third one's
// first thread loads what they need into a ring of slots, in the order in which it is wanted: rows of the tables, then
//
//   K_0  K_1 V_0  K_2 V_1  ...  V_last
//
// since a warpgroup starts the product with the next keys before that with the last values, and computes the softmax of
// the former while the latter runs. The two warpgroups take turns at starting products, so that the tensor cores work for
// one while the other computes its softmax. The online softmax is the portable kernel's, in base 2: the tile is row-aligned,
// its rel_w a register fragment for all of a stripe, rel_h one number per query and key row that joins the maximum.
//
// Tables: q R^T for the rows that the block's queries need, 64 at a time, is the same product as q k^T; each is put into
// shared memory where its key is.
#pragma once
#include "rel_pos_attention_sm90.cuh"

template <class Element, int Dim, int Cols, int Rows, int BoxRows, int Slots> struct StreamTile {
    using T = Element;
    static constexpr int kDim = Dim, kCols = Cols, kRows = Rows, kKeys = Cols * Rows, kBoxRows = BoxRows, kSlots = Slots, kGroups = 2;
    static constexpr int kQueries = kGroups * kGroupRows, kQueryRows = kQueries / Cols, kThreads = kGroup * (kGroups + 1);
    static_assert(kQueries == REL_POS_ATTENTION_SM90_QUERIES && kThreads == REL_POS_ATTENTION_SM90_THREADS);
    static_assert(Cols % 8 == 0, "an accumulator's 8 columns must belong to one key row: rel_h is read once for them");
    static_assert(kKeys % 16 == 0 && kKeys <= 256, "a tile is the width of one wgmma, and a whole depth of products");
    static_assert(Rows % BoxRows == 0 && kQueryRows % BoxRows == 0);
    static_assert(kKeys >= kTableRows, "rows of the tables take a slot too");
    struct Storage {
        alignas(1024) unsigned char queries[Panel<kQueries, Dim>::kBytes];
        alignas(1024) unsigned char slots[Slots][Panel<kKeys, Dim>::kBytes];
        ptx::mbarrier queries_full, full[Slots], empty[Slots];
    };
};

// Which queries a block has, and what it goes through.
template <class Tile> struct StreamWork {
    AttentionUnit unit;
    Token first;                      // query, in the window
    uint32_t chunks_h, chunks;        // boxes of rows that these queries need: of rel_pos_h, of both tables
    uint32_t tiles_of_stripe, tiles;

    __device__ __forceinline__ StreamWork(const RelPosAttentionShape& s) : unit(s, blockIdx.x / blocks(s)) {
        const uint32_t block = blockIdx.x % blocks(s), across = ceil_div(s.side_w, uint32_t(Tile::kCols));
        first = {block / across * Tile::kQueryRows, block % across * Tile::kCols};
        chunks_h = ceil_div(min(first.y + Tile::kQueryRows, s.side_h) - first.y - 1 + s.side_h, uint32_t(kTableRows));
        chunks = chunks_h + ceil_div(2 * s.side_w - 1, uint32_t(kTableRows));
        tiles_of_stripe = ceil_div(s.side_h, uint32_t(Tile::kRows));
        tiles = tiles_of_stripe * across;
    }
    static __device__ __forceinline__ uint32_t blocks(const RelPosAttentionShape& s) {
        return ceil_div(s.side_h, uint32_t(Tile::kQueryRows)) * ceil_div(s.side_w, uint32_t(Tile::kCols));
    }
    // The first row of a box of the tables: in its table, first h's boxes, then w's; and in both.
    __device__ __forceinline__ uint32_t distance(uint32_t chunk) const {
        return chunk < chunks_h ? first.y + chunk * kTableRows : (chunk - chunks_h) * kTableRows;
    }
    __device__ __forceinline__ uint32_t table_row(uint32_t chunk) const {
        return distance(chunk) + (chunk < chunks_h ? 0 : 2 * unit.s.side_h - 1);
    }
    // The first key of a tile, in the window.
    __device__ __forceinline__ Token key(uint32_t tile) const {
        return {tile % tiles_of_stripe * Tile::kRows, tile / tiles_of_stripe * Tile::kCols};
    }
};

template <class Tile> __device__ __forceinline__ void load_stream(const RelPosAttentionFwdSm90Params& p, typename Tile::Storage& shared) {
    const StreamWork<Tile> work(p.shape);
    const AttentionUnit& unit = work.unit;
    const uint32_t channels = p.shape.num_heads * p.shape.head_dim, head_column = unit.head * p.shape.head_dim;
    uint32_t next = 0;
    const auto slot = [&](uint32_t bytes) {
        const uint32_t index = next % Tile::kSlots;
        ptx::mbarrier_wait_parity(shared.empty[index], next / Tile::kSlots % 2 ^ 1);
        ptx::mbarrier_arrive_expect_tx(shared.full[index], bytes);
        ++next;
        return index;
    };
    ptx::mbarrier_arrive_expect_tx(shared.queries_full, Tile::kQueryRows * Tile::kCols * Tile::kDim * 2);
    load_tokens<Tile, Tile::kQueries>(
        shared.queries, Tile::kQueryRows, p.qkv_maps, shared.queries_full, head_column, unit.origin.x + work.first.x, unit.origin.y + work.first.y,
        unit.image);
    if (p.tables != 0)
        for (uint32_t chunk = 0; chunk < work.chunks; ++chunk) {
            const uint32_t index = slot(kTableRows * Tile::kDim * 2);
            load_rows<kTableRows, Tile::kDim>(shared.slots[index], p.table_maps, shared.full[index], 0, work.table_row(chunk));
        }
    const auto load = [&](uint32_t tile, int part) {
        const uint32_t index = slot(Tile::kKeys * Tile::kDim * 2);
        const Token key = work.key(tile);
        load_tokens<Tile, Tile::kKeys>(
            shared.slots[index], Tile::kRows, p.qkv_maps, shared.full[index], part * channels + head_column, unit.origin.x + key.x,
            unit.origin.y + key.y, unit.image);
    };
    load(0, 1);
    for (uint32_t tile = 1; tile < work.tiles; ++tile) {
        load(tile, 1);
        load(tile - 1, 2);
    }
    load(work.tiles - 1, 2);
}

template <class Tile> __device__ __forceinline__ void consume_stream(const RelPosAttentionFwdSm90Params& p, typename Tile::Storage& shared) {
    using T = typename Tile::T;
    constexpr int kDim = Tile::kDim, kCols = Tile::kCols, kKeys = Tile::kKeys, kQueries = Tile::kQueries;
    const RelPosAttentionShape& s = p.shape;
    const StreamWork<Tile> work(s);
    const AttentionUnit& unit = work.unit;
    const uint32_t group = ptx::shfl_idx(threadIdx.x / kGroup, 0), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;

    uint32_t next = 0;
    const auto wait = [&]() -> const unsigned char* {
        const uint32_t index = next % Tile::kSlots;
        ptx::mbarrier_wait_parity(shared.full[index], next / Tile::kSlots % 2);
        ++next;
        return shared.slots[index];
    };
    const auto release = [&](uint32_t number) {
        if (lane == 0) ptx::mbarrier_arrive(shared.empty[number % Tile::kSlots]);
    };

    Token query[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint32_t row = 16 * warp + g + 8 * half;
        query[half] = {work.first.y + row / kCols, work.first.x + row % kCols};
        exists[half] = row < Tile::kQueryRows * kCols && unit.on_grid(query[half]);
    }

    // This warp's biases.
    const Biases<Tile> bias(s, reinterpret_cast<float*>(&shared + 1));
    float *rel_h = bias.h + (16 * warp) * bias.stride_h, *rel_w = bias.w + (16 * warp) * bias.stride_w;
    fill_biases(rel_h, bias.stride_h, s.side_h, p.tables != 0);
    fill_biases(rel_w, bias.stride_w, s.side_w, p.tables != 0);
    __syncwarp();
    rel_h += g * bias.stride_h;
    rel_w += g * bias.stride_w;
    ptx::mbarrier_wait_parity(shared.queries_full, 0);
    if (p.tables != 0) {
        for (uint32_t chunk = 0; chunk < work.chunks; ++chunk) {
            const unsigned char* rows = wait();
            float products[kTableRows / 2];
            ptx::wgmma_fence();
            multiply_rows<T, kDim, kTableRows, kQueries, kTableRows>(products, shared.queries, group * kGroupRows, rows);
            ptx::wgmma_wait_group<0>();
            ptx::wgmma_pin(products);
            release(next - 1);
            const bool is_h = chunk < work.chunks_h;
            const uint32_t side = is_h ? s.side_h : s.side_w, sides[2] = {exists[0] ? side : 0, exists[1] ? side : 0};
            int row_of_zero[2];
#pragma unroll
            for (int half = 0; half < 2; ++half)
                row_of_zero[half] = int((is_h ? query[half].y : query[half].x) + side - 1 - work.distance(chunk));
            scatter_biases(is_h ? rel_h : rel_w, is_h ? bias.stride_h : bias.stride_w, row_of_zero, sides, products);
        }
        __syncwarp();
    }

    const float scale = s.softmax_scale * kLog2e;
    float fragment_w[kCols / 2], scores[kKeys / 2], rescale[2];
    uint32_t weights[kKeys / 16][4];
    ChannelSums<kDim> out;
    OnlineSoftmax state;
    const auto softmax = [&](uint32_t tile) {
        const Token key = work.key(tile);
        if (key.y == 0) {
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) fragment_w[4 * j + i] = rel_w[8 * (i / 2) * bias.stride_w + key.x + 8 * j + 2 * t + i % 2];
        }
        softmax_of_tile<Tile>(rescale, scores, state, fragment_w, rel_h + key.y, bias.stride_h, scale);
        drop_weights<Tile>(scores, s, unit, query, key);
    };
    const auto multiply_keys = [&](const unsigned char* keys) {
        multiply_rows<T, kDim, kKeys, kQueries, kKeys>(scores, shared.queries, group * kGroupRows, keys);
    };

    const unsigned char* keys = wait();
    ptx::wgmma_fence();
    multiply_keys(keys);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(scores);
    release(next - 1);
    softmax(0);
    pack_weights<T, kKeys>(weights, scores);
    // Barrier 1 + group: the turn of that warpgroup, which the other one gives to it. The first has it.
    for (uint32_t tile = 1; tile < work.tiles; ++tile) {
        keys = wait();
        if (tile > 1 || group == 1) ptx::bar_sync(1 + group, 2 * kGroup);
        ptx::wgmma_fence();
        multiply_keys(keys);
        const unsigned char* values = wait();
        ptx::wgmma_fence();
        add_weighted<T, kDim, kKeys>(out, weights, values);
        if (tile + 1 < work.tiles || group == 0) ptx::bar_arrive(2 - group, 2 * kGroup);
        ptx::wgmma_wait_group<1>();
        ptx::wgmma_pin(scores);
        release(next - 2);
        softmax(tile);
        ptx::wgmma_wait_group<0>();
        out.pin();
        release(next - 1);
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out.at(n, i) *= rescale[i / 2];
        pack_weights<T, kKeys>(weights, scores);
    }
    const unsigned char* values = wait();
    ptx::wgmma_fence();
    add_weighted<T, kDim, kKeys>(out, weights, values);
    ptx::wgmma_wait_group<0>();
    out.pin();

    store_queries<T, kDim>(p, unit, query, exists, out, state);
}

template <class Tile> __device__ __forceinline__ void rel_pos_attention_fwd_sm90(const RelPosAttentionFwdSm90Params& p) {
    auto& shared = ptx::shared_storage<typename Tile::Storage>();
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(shared.queries_full, 1);
        for (int i = 0; i < Tile::kSlots; ++i) {
            ptx::mbarrier_init(shared.full[i], 1);
            ptx::mbarrier_init(shared.empty[i], Tile::kGroups * kGroup / kWarp);  // one lane of each warp
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    // From one lane, so that the compiler knows it to be the same for the warp.
    if (ptx::shfl_idx(threadIdx.x / kGroup, 0) == Tile::kGroups) {
        ptx::setmaxnreg_dec<24>();
        if (threadIdx.x % kGroup == 0) load_stream<Tile>(p, shared);
    } else {
        ptx::setmaxnreg_inc<240>();
        consume_stream<Tile>(p, shared);
    }
}
