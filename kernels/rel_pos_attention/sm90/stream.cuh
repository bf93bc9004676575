// A block of queries and the keys that stream past it, on sm_90a: what the forward and the backward's query pass share.
//
// A block holds queries of a unit, whole stretches of kCols of grid rows, 64 for each of two or three warpgroups. The
// first thread of one more warpgroup fills a ring of slots in the order of use: rows of the tables, then key tiles.
//
// For the tables, q R^T is the same product as q k^T, for the rows that the block's queries need, 64 at a time. Each
// product goes to its key's place in shared memory.
#pragma once
#include "rel_pos_attention/sm90/common.cuh"

template <class Element, int Dim, int Cols, int Rows, int BoxRows, int Slots, int Groups>
struct StreamTile {
    using T = Element;
    static constexpr int kDim = Dim, kCols = Cols, kRows = Rows, kKeys = Cols * Rows, kBoxRows = BoxRows,
                         kSlots = Slots, kGroups = Groups;
    static constexpr int kQueries = kGroups * kGroupRows, kQueryRows = kQueries / Cols,
                         kThreads = kGroup * (kGroups + 1);
    // Registers of a thread that loads, and of one that computes. All of a block's are those of a multiprocessor.
    static_assert(Groups == 2 || Groups == 3);
    static constexpr int kLoaderRegisters = Groups == 2 ? 24 : 32, kRegisters = Groups == 2 ? 240 : 160;
    static_assert(Cols % 8 == 0, "an accumulator's 8 columns must belong to one key row: rel_h is read once for them");
    static_assert(kKeys % 16 == 0 && kKeys <= 256, "a tile is the width of one wgmma, and a whole depth of products");
    static_assert(Rows % BoxRows == 0 && kQueryRows % BoxRows == 0);
    static_assert(kKeys >= kTableRows, "rows of the tables take a slot too");
    // Bytes of each panel that tokens are loaded to.
    static constexpr int kQueryBytes = kQueryRows * Cols * Dim * 2, kKeyBytes = kKeys * Dim * 2;
    struct Storage {
        alignas(1024) unsigned char queries[Panel<kQueries, Dim>::kBytes];
        alignas(1024) unsigned char slots[Slots][Panel<kKeys, Dim>::kBytes];
        ptx::mbarrier queries_full, full[Slots], empty[Slots];
    };
    // By one thread, before the block's barrier.
    static __device__ __forceinline__ void init_barriers(Storage& shared) {
        ptx::mbarrier_init(shared.queries_full, 1);
        for (int i = 0; i < Slots; ++i) {
            ptx::mbarrier_init(shared.full[i], 1);
            ptx::mbarrier_init(shared.empty[i], kGroups * kGroup / kWarp);  // one lane of each warp
        }
    }
};

// A block of queries, and what it goes through.
template <class Tile> struct StreamWork {
    AttentionUnit unit;
    Token first;                      // query, in the window
    uint32_t chunks_h, chunks;        // boxes of rows that these queries need: of rel_pos_h, of both tables
    uint32_t tiles_of_stripe, tiles;

    __device__ __forceinline__ StreamWork(const RelPosAttentionShape& s, uint32_t item) : unit(s, item / blocks(s)) {
        const uint32_t block = item % blocks(s), across = ceil_div(s.side_w, uint32_t(Tile::kCols));
        first = {block / across * Tile::kQueryRows, block % across * Tile::kCols};
        chunks_h = ceil_div(min(first.y + Tile::kQueryRows, s.side_h) - first.y - 1 + s.side_h, uint32_t(kTableRows));
        chunks = chunks_h + ceil_div(2 * s.side_w - 1, uint32_t(kTableRows));
        tiles_of_stripe = ceil_div(s.side_h, uint32_t(Tile::kRows));
        tiles = tiles_of_stripe * across;
    }
    static __device__ __forceinline__ uint32_t blocks(const RelPosAttentionShape& s) {
        return ceil_div(s.side_h, uint32_t(Tile::kQueryRows)) * ceil_div(s.side_w, uint32_t(Tile::kCols));
    }
    // A row of the block's panel of queries.
    __device__ __forceinline__ Token query(uint32_t row) const {
        return {first.y + row / Tile::kCols, first.x + row % Tile::kCols};
    }
    __device__ __forceinline__ bool exists(uint32_t row) const {
        return row < Tile::kQueryRows * Tile::kCols && unit.on_grid(query(row));
    }
    // The first row of a box of the tables: in its table, first h's boxes, then w's; and in both.
    __device__ __forceinline__ uint32_t distance(uint32_t chunk) const {
        return chunk < chunks_h ? first.y + chunk * kTableRows : (chunk - chunks_h) * kTableRows;
    }
    __device__ __forceinline__ uint32_t table_row(uint32_t chunk) const {
        return distance(chunk) + (chunk < chunks_h ? 0 : 2 * unit.s.side_h - 1);
    }
    // Row of the box for this query and key row (or column) 0. Key `k` uses `row_of_zero - k`.
    __device__ __forceinline__ int row_of_zero(uint32_t chunk, Token query) const {
        const bool is_h = chunk < chunks_h;
        return int((is_h ? query.y + unit.s.side_h : query.x + unit.s.side_w) - 1 - distance(chunk));
    }
    // The first key of a tile, in the window.
    __device__ __forceinline__ Token key(uint32_t tile) const {
        return {tile % tiles_of_stripe * Tile::kRows, tile / tiles_of_stripe * Tile::kCols};
    }
    // The first key of the next tile, without a division.
    __device__ __forceinline__ Token key_after(Token key) const {
        if (key.y + Tile::kRows < unit.s.side_h) return {key.y + Tile::kRows, key.x};
        return {0, key.x + Tile::kCols};
    }
};

// The ring as the loading thread sees it.
template <class Tile> struct StreamLoader {
    typename Tile::Storage& shared;
    uint32_t next = 0;

    // The next slot, once it is free, for so many bytes.
    __device__ __forceinline__ uint32_t slot(uint32_t bytes) {
        const uint32_t index = next % Tile::kSlots;
        ptx::mbarrier_wait_parity(shared.empty[index], next / Tile::kSlots % 2 ^ 1);
        ptx::mbarrier_arrive_expect_tx(shared.full[index], bytes);
        ++next;
        return index;
    }
    __device__ __forceinline__ void queries(unsigned char* panel, const PanelMaps& maps, const StreamWork<Tile>& work) {
        const AttentionUnit& unit = work.unit;
        load_tokens<Tile, Tile::kQueries>(
            panel, Tile::kQueryRows, maps, shared.queries_full, unit.head * Tile::kDim, unit.origin.x + work.first.x,
            unit.origin.y + work.first.y, unit.image);
    }
    __device__ __forceinline__ void tables(const PanelMaps (&maps)[2], const StreamWork<Tile>& work) {
        for (uint32_t chunk = 0; chunk < work.chunks; ++chunk) {
            const uint32_t index = slot(kTableRows * Tile::kDim * 2);
            load_rows<kTableRows, Tile::kDim>(shared.slots[index], maps[chunk < work.chunks_h ? 0 : 1],
                                              shared.full[index], 0, work.distance(chunk));
        }
    }
    // A tile of part 1 (keys) or 2 (values) of qkv.
    __device__ __forceinline__ void keys(const PanelMaps& maps, const StreamWork<Tile>& work, uint32_t tile,
                                         uint32_t part) {
        const AttentionUnit& unit = work.unit;
        const uint32_t index = slot(Tile::kKeyBytes);
        const Token key = work.key(tile);
        load_tokens<Tile, Tile::kKeys>(shared.slots[index], Tile::kRows, maps, shared.full[index],
                                       (part * unit.s.num_heads + unit.head) * Tile::kDim, unit.origin.x + key.x,
                                       unit.origin.y + key.y, unit.image);
    }
};

// The ring as those see it who read the slots.
template <class Tile> struct StreamReader {
    typename Tile::Storage& shared;
    uint32_t next = 0;

    __device__ __forceinline__ const unsigned char* wait() {
        const uint32_t index = next % Tile::kSlots;
        ptx::mbarrier_wait_parity(shared.full[index], next / Tile::kSlots % 2);
        ++next;
        return shared.slots[index];
    }
    // Slot `number`, counted from the beginning; once for each warp.
    __device__ __forceinline__ void release(uint32_t number) const {
        if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(shared.empty[number % Tile::kSlots]);
    }
};

// Fills the biases of this warp's queries, once they are there.
template <class Tile>
__device__ __forceinline__ void project_tables(const Biases<Tile>& bias, StreamReader<Tile>& ring,
                                               const StreamWork<Tile>& work, uint32_t group, bool tables) {
    using T = typename Tile::T;
    const RelPosAttentionShape& s = work.unit.s;
    const uint32_t warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
    float *rel_h = bias.h + 16 * warp * bias.stride_h, *rel_w = bias.w + 16 * warp * bias.stride_w;
    fill_biases(rel_h, bias.stride_h, s.side_h, tables);
    fill_biases(rel_w, bias.stride_w, s.side_w, tables);
    __syncwarp();
    if (!tables) return;
    for (uint32_t chunk = 0; chunk < work.chunks; ++chunk) {
        const unsigned char* rows = ring.wait();
        float products[kTableRows / 2];
        ptx::wgmma_fence();
        multiply_rows<T, Tile::kDim, kTableRows, Tile::kQueries, kTableRows>(products, ring.shared.queries,
                                                                             group * kGroupRows, rows);
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_pin(products);
        ring.release(ring.next - 1);
        const bool is_h = chunk < work.chunks_h;
        const uint32_t stride = is_h ? bias.stride_h : bias.stride_w;
        uint32_t sides[2];
        int row_of_zero[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const uint32_t row = 16 * warp + g + 8 * half;
            sides[half] = !work.exists(row) ? 0 : is_h ? s.side_h : s.side_w;
            row_of_zero[half] = work.row_of_zero(chunk, work.query(row));
        }
        scatter_biases((is_h ? rel_h : rel_w) + g * stride, stride, row_of_zero, sides, products);
    }
    __syncwarp();
}
