// Shared by the passes of rel_pos_attention: tiles, addressing, and the biases of a block of queries.
//
// A *unit* is one head of one window. Partition and padding are addressing: a window's tokens are looked up on the
// grid. Tokens outside the grid are the `pad` vector as keys and values, and do not exist as queries. So the queries of
// a unit are the tokens of a rectangle, numbered row by row. Key (y, x) is token y side_w + x of the window.
//
// Key tiles are row-aligned: kRows key rows by kCols columns. A stripe of the window is kCols wide (usually the whole
// row), and its tiles have the same columns. So rel_w is one register fragment for all of them, and rel_h one number
// per query and key row. As kCols is a multiple of 8, each 8 columns of an accumulator belong to one key row.
#pragma once
#include "common/philox.cuh"
#include "common/softmax.cuh"

// The softmax in f32 keeps max and sum apart, P = exp2(S - max) / sum, where in 16 bits it has lse = max + log(sum). At
// a score of 1e3, lse has lost all below 1e-4, and so have all of the row's weights, more than f32 may lose. In f32
// rel_h also joins the score before the maximum is taken off, so that the largest one's weight is exactly 1 / sum.
template <class T> constexpr bool kExactWeights = sizeof(T) == 4;

// How far a maximum may rise, in base 2, before sums and output are scaled to it. Until then weights reach 2^8, which
// 16 bits hold as exactly as 1. In f32 the largest weight has to be exactly 1 / sum, so no rise is left out.
template <class T> constexpr float kMaximumRise = kExactWeights<T> ? 0.0f : 8.0f;
// Numbers of a query that the backward's passes share: delta; in f32 delta, max, 1 / sum and one that is not used.
template <class T> constexpr int kRowStatistics = kExactWeights<T> ? 4 : 1;

// kDim channels (head_dim rounded up, the rest zero), key tiles of kRows x kCols, 16 queries a warp.
template <class Element, int Dim, int Cols, int Rows, int Warps> struct AttentionTile {
    using T = Element;
    static constexpr int kDim = Dim, kCols = Cols, kRows = Rows, kWarps = Warps;
    static constexpr int kKeys = kCols * kRows, kQueries = 16 * kWarps, kThreads = kWarp * kWarps;
    static constexpr int kStride = kDim + kRowPad;
    static_assert(kCols % 8 == 0, "an accumulator's 8 columns must belong to one key row: rel_h is read once for them");
    static_assert(kKeys == kRows * kCols && kKeys % 16 == 0,
                  "a tile holds whole key rows, and is a whole depth of products");
    static_assert(kDim % 16 == 0);
    // Two stages of keys and values; before and after, as many rows of whatever is staged.
    static constexpr int kStagedRows = 4 * kKeys;
    static_assert(kStagedRows >= kQueries);
    struct Storage {
        T rows[kStagedRows][kStride];
    };
    static_assert(sizeof(Storage) == kStagedRows * kStride * sizeof(T));
};

struct Token {
    uint32_t y, x;
};

// One head of one window.
struct AttentionUnit {
    const RelPosAttentionShape& s;
    uint64_t first_token;
    uint32_t index, head, image, valid_h, valid_w;
    Token origin;  // of the window, on the grid

    __device__ __forceinline__ AttentionUnit(const RelPosAttentionShape& s, uint32_t unit)
        : s(s), index(unit), head(unit % s.num_heads) {
        const uint32_t window = unit / s.num_heads, windows = s.window_rows * s.window_cols,
                       in_image = window % windows;
        image = window / windows;
        origin = {in_image / s.window_cols * s.side_h, in_image % s.window_cols * s.side_w};
        valid_h = min(s.side_h, s.h - origin.y);
        valid_w = min(s.side_w, s.w - origin.x);
        first_token = (uint64_t(image) * s.h + origin.y) * s.w + origin.x;
    }
    // Where the unit's queries start in what is [windows, heads, tokens].
    __device__ __forceinline__ uint64_t first_row() const { return uint64_t(index) * (s.side_h * s.side_w); }
    __device__ __forceinline__ uint64_t dropout_row(Token query) const {
        return first_row() + query.y * s.side_w + query.x;
    }
    __device__ __forceinline__ uint32_t queries() const { return valid_h * valid_w; }
    __device__ __forceinline__ Token query(uint32_t n) const { return {n / valid_w, n % valid_w}; }
    __device__ __forceinline__ bool on_grid(Token t) const { return t.y < valid_h && t.x < valid_w; }
    // Index of a token on the grid, among all tokens.
    __device__ __forceinline__ uint64_t token(Token t) const { return first_token + uint64_t(t.y) * s.w + t.x; }
};

// Copies `count` rows of head_dim elements to shared memory, asynchronously, with zeros up to kDim. Row i comes from
// source(i), or is zeros if that is null. `any` is a valid address, for copies that read nothing.
template <class Tile, int Bytes, class T, class Source>
__device__ __forceinline__ void copy_rows_by(T (*rows)[Tile::kStride], int count, uint32_t head_dim, const T* any,
                                             Source source) {
    constexpr int kElements = Bytes / sizeof(T), kPieces = Tile::kDim / kElements;
#pragma unroll 1
    for (int i = threadIdx.x; i < count * kPieces; i += Tile::kThreads) {
        const int row = i / kPieces, column = i % kPieces * kElements;
        const T* from = source(row);
        const bool valid = from != nullptr && uint32_t(column) < head_dim;
        ptx::cp_async<Bytes>(&rows[row][column], valid ? from + column : any, valid);
    }
}

// `wide` says that all rows are made of aligned 16-byte vectors; if not, 4 bytes at a time.
template <class Tile, class T, class Source>
__device__ __forceinline__ void copy_rows(bool wide, T (*rows)[Tile::kStride], int count, uint32_t head_dim,
                                          const T* any, Source source) {
    if (wide) copy_rows_by<Tile, 16>(rows, count, head_dim, any, source);
    else copy_rows_by<Tile, 4>(rows, count, head_dim, any, source);
}

__device__ __forceinline__ void wait_for_copies() {
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
}

// Starts copying the rows of the block's queries from `array [.., stride]`; zeros for queries that do not exist.
template <class Tile, class T>
__device__ __forceinline__ void copy_queries(
    T (*rows)[Tile::kStride], const AttentionUnit& unit, uint32_t first, bool wide, const T* array, uint64_t stride) {
    copy_rows<Tile>(wide, rows, Tile::kQueries, unit.s.head_dim, array, [&](int row) -> const T* {
        const uint32_t n = first + row;
        return n < unit.queries() ? array + unit.token(unit.query(n)) * stride : nullptr;
    });
}

// Stages them and takes this warp's sixteen as operands.
template <class Tile, class T>
__device__ __forceinline__ void load_queries(FragmentA<T> (&a)[Tile::kDim / 16], typename Tile::Storage& shared,
                                             const AttentionUnit& unit, uint32_t first, bool wide, const T* array,
                                             uint64_t stride) {
    copy_queries<Tile>(shared.rows, unit, first, wide, array, stride);
    wait_for_copies();
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int k = 0; k < Tile::kDim / 16; ++k) load_a(a[k], &shared.rows[16 * warp][16 * k], Tile::kStride);
    __syncthreads();
}

// Whether dropout keeps one element.
__device__ __forceinline__ bool dropout_keeps(const DropoutMask& mask, uint64_t row, uint32_t col) {
    return dropout_factor(mask, dropout_words(mask, row, col / 8), col % 8) > 0.0f;
}

// A bool that the compiler knows.
template <bool kValue> struct Known {
    static constexpr bool value = kValue;
    __device__ constexpr operator bool() const { return kValue; }
};

// Calls loop(Known<true>) with dropout and loop(Known<false>) without. A loop that asks in each step spends issue slots
// on factors of 1. Unless `kTwice`, for loops without registers to spare, it gets a bool and asks.
template <bool kTwice = true, class Loop>
__device__ __forceinline__ void compile_twice(const DropoutMask& mask, Loop loop) {
    if constexpr (!kTwice) loop(mask.threshold != 0);
    else if (mask.threshold != 0) loop(Known<true>{});
    else loop(Known<false>{});
}

// Starts copying the rows of the key tile with first key (y, x), of part 1 (keys) or 2 (values) of qkv.
template <class Tile, class T>
__device__ __forceinline__ void copy_keys(T (*rows)[Tile::kStride], const RelPosAttentionShape& s,
                                          const AttentionUnit& unit, uint32_t y, uint32_t x, bool wide, const T* qkv,
                                          const T* pad, int part) {
    const uint32_t channels = s.num_heads * s.head_dim, column = part * channels + unit.head * s.head_dim;
    copy_rows<Tile>(wide, rows, Tile::kKeys, s.head_dim, qkv, [&](int row) -> const T* {
        const Token key{y + row / Tile::kCols, x + row % Tile::kCols};
        if (unit.on_grid(key)) return qkv + unit.token(key) * 3 * channels + column;
        return pad != nullptr && key.y < s.side_h && key.x < s.side_w ? pad + column : nullptr;
    });
}

// The 16-byte vectors of a key tile that a thread copies, as many of its keys as of its values. They lie in one column
// of channels, and all threads copy a whole stretch of a key row at once. So no step divides or looks a token up, and a
// thread keeps one address.
template <class Tile> struct KeyVectors {
    using T = typename Tile::T;
    static constexpr int kPieces = Tile::kDim / kVec<T>, kKeysAtOnce = Tile::kThreads / kPieces,
                         kCount = Tile::kKeys / kKeysAtOnce, kOfRow = Tile::kCols / kKeysAtOnce;
    // With f32, the kernels have no registers for them.
    static constexpr bool kPossible =
        sizeof(T) == 2 && Tile::kThreads % kPieces == 0 && Tile::kCols % kKeysAtOnce == 0;
    device_ptr from;       // this thread's first key of the next tile; nvcc 13.0 never ends on a pointer here
    uint32_t on_grid = 0;  // a bit for each of its keys in a row: this column of the grid exists

    __device__ __forceinline__ KeyVectors(const AttentionUnit& unit, const T* qkv, uint32_t x) {
        const RelPosAttentionShape& s = unit.s;
        const uint32_t channels = s.num_heads * s.head_dim;
        from = device_ptr(qkv + unit.token({0, x + key(0)}) * (3 * channels) + channels + unit.head * s.head_dim +
                          column());
#pragma unroll
        for (int k = 0; k < kOfRow; ++k)
            on_grid |= uint32_t(x + key(k) < unit.valid_w && column() < s.head_dim) << k;
    }
    static __device__ __forceinline__ uint32_t column() { return threadIdx.x % kPieces * kVec<T>; }
    static __device__ __forceinline__ uint32_t key(int k) { return threadIdx.x / kPieces + k * kKeysAtOnce; }
    // Starts copying the keys and values of the tile with first key row y, and moves on to the next one.
    __device__ __forceinline__ void copy(T (*rows)[Tile::kStride], const AttentionUnit& unit, uint32_t y) {
        const uint32_t channels = unit.s.num_heads * unit.s.head_dim;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            const int row = k / kOfRow, stretch = k % kOfRow;
            const T* keys = global<const T>(from) + (row * unit.s.w + stretch * kKeysAtOnce) * (3 * channels);
            const bool valid = y + row < unit.valid_h && on_grid >> stretch & 1;
            ptx::cp_async<16>(&rows[key(k)][column()], keys, valid);
            ptx::cp_async<16>(&rows[Tile::kKeys + key(k)][column()], keys + channels, valid);
        }
        from += uint64_t(Tile::kRows * unit.s.w) * (3 * channels) * sizeof(T);
    }
};

// The key tiles of a stripe, from column x on, on their way through the two stages: while one is worked on, the next is
// copied. Every thread of the block must come.
template <class Tile> struct KeyTiles {
    using T = typename Tile::T;
    const RelPosAttentionShape& s;
    const AttentionUnit& unit;
    typename Tile::Storage& shared;
    const T *qkv, *pad;
    const uint32_t x;
    uint32_t next = 0;  // the first key row of the tile that is copied next
    bool wide, in_vectors;
    struct None {
        __device__ __forceinline__ None(const AttentionUnit&, const T*, uint32_t) {}
    };
    static constexpr bool kInVectors = KeyVectors<Tile>::kPossible;
    std::conditional_t<kInVectors, KeyVectors<Tile>, None> vectors;

    // Starts the first one.
    __device__ __forceinline__ KeyTiles(const RelPosAttentionShape& s, const AttentionUnit& unit,
                                        typename Tile::Storage& shared, const T* qkv, const T* pad, uint32_t x,
                                        bool wide)
        : s(s), unit(unit), shared(shared), qkv(qkv), pad(pad), x(x), wide(wide), vectors(unit, qkv, x) {
        // A key outside the grid is the pad, or zeros.
        in_vectors = kInVectors && wide && (pad == nullptr || (unit.valid_h == s.side_h && unit.valid_w == s.side_w));
        copy();
    }
    // Starts the next tile, if there is one, and gives the one before it: its keys, and behind them its values. Before
    // the next call, all must have done with them.
    __device__ __forceinline__ const T (*advance())[Tile::kStride] {
        T(*rows)[Tile::kStride] = stage(next - Tile::kRows);
        copy();
        ptx::cp_async_wait_group<1>();
        __syncthreads();  // everybody's copies of this tile have landed
        return rows;
    }

  private:
    // Where the tile with first key row y lies.
    __device__ __forceinline__ T (*stage(uint32_t y) const)[Tile::kStride] {
        return &shared.rows[y / Tile::kRows % 2 * (2 * Tile::kKeys)];
    }
    __device__ __forceinline__ void copy() {
        if (next < s.side_h) {
            T(*rows)[Tile::kStride] = stage(next);
            if (in_vectors) {
                if constexpr (kInVectors) vectors.copy(rows, unit, next);
            } else {
                copy_keys<Tile>(rows, s, unit, next, x, wide, qkv, pad, 1);
                copy_keys<Tile>(rows + Tile::kKeys, s, unit, next, x, wide, qkv, pad, 2);
            }
        }
        next += Tile::kRows;
        ptx::cp_async_commit_group();
    }
};

// The biases of the block's queries: rel_h [kQueries][stride_h], and rel_w [kQueries][stride_w] from column x on. They
// are times log2(e), and minus infinity where there is no key.
template <class Tile> struct Biases {
    float *h, *w;
    uint32_t stride_h, stride_w, x = 0;
    // Those that project_tables computes: rel_w of so many columns from `first_column` on; rel_h, unless it is there.
    uint32_t first_column = 0, columns;
    bool with_h = true;

    // All columns, behind rel_h.
    __device__ __forceinline__ Biases(const RelPosAttentionShape& s, float* memory) {
        // Odd, and with 8 more, so that the rows of a fragment lie in different banks.
        stride_h = ceil_div(s.side_h, uint32_t(Tile::kRows)) * Tile::kRows | 1;
        stride_w = ceil_div(s.side_w, uint32_t(Tile::kCols)) * Tile::kCols + 8;
        columns = s.side_w;
        h = memory;
        w = memory + Tile::kQueries * stride_h;
    }
};

// The rows of both tables that the queries `first ..` of a unit need, as one list. The first part is rel_pos_h's rows,
// from the first query's distance to the last key row on, or nothing. The second part is rel_pos_w's rows of so many
// key columns from x on.
struct TableRows {
    uint32_t first_h, count_h, first_w, count, side_h, side_w;

    __device__ __forceinline__ TableRows(const RelPosAttentionShape& s, const AttentionUnit& unit, uint32_t first,
                                         uint32_t queries, bool with_h, uint32_t x, uint32_t columns) {
        const uint32_t last = min(first + queries, unit.queries()) - 1;
        first_h = unit.query(first).y;
        count_h = with_h ? unit.query(last).y - first_h + s.side_h : 0;
        first_w = s.side_w - min(x + columns, s.side_w);
        count = count_h + 2 * s.side_w - 1 - (x + first_w);
        side_h = s.side_h;
        side_w = s.side_w;
    }
    // All of rel_pos_w.
    __device__ __forceinline__ TableRows(const RelPosAttentionShape& s, const AttentionUnit& unit, uint32_t first,
                                         uint32_t queries)
        : TableRows(s, unit, first, queries, true, 0, s.side_w) {}
    // Which row of the two tables, one after the other, is number i.
    __device__ __forceinline__ uint32_t row(uint32_t i) const {
        return i < count_h ? first_h + i : 2 * side_h - 1 + i - count_h + first_w;
    }
    // Calls found(is_h, k) if number i of the list is the distance of the query from key row or column k.
    template <class Found> __device__ __forceinline__ void key_of(uint32_t i, Token query, Found found) const {
        const bool is_h = i < count_h;
        const uint32_t k = is_h ? query.y + side_h - 1 - first_h - i : query.x + side_w - 1 - (i - count_h) - first_w;
        if (i < count && k < (is_h ? side_h : side_w)) found(is_h, k);
    }
};

// Both tables. Their rows count as one list: first the rows of h, then those of w. Null if there are none.
template <class T> struct Tables {
    const T *h, *w;
    __device__ __forceinline__ explicit Tables(const device_ptr (&tables)[2])
        : h(tables[0] == 0 ? nullptr : global<const T>(tables[0])),
          w(tables[1] == 0 ? nullptr : global<const T>(tables[1])) {}
    __device__ __forceinline__ const T* row(const RelPosAttentionShape& s, uint32_t row) const {
        const uint32_t rows_h = 2 * s.side_h - 1;
        return row < rows_h ? h + uint64_t(row) * s.head_dim : w + uint64_t(row - rows_h) * s.head_dim;
    }
};

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// Fills the biases of this warp's queries: q R^T for all rows of the list on tensor cores, each put where its key is.
// Stages so many rows of the tables at a time, a multiple of 16.
// In f32, values that are not finite are computed anew, since an infinity in a table (a mask) is no operand of 3xTF32.
// `queries` are q's rows [.., stride] in memory. Uses the staging memory; every thread of the block must come.
template <class Tile, class T>
__device__ __forceinline__ void project_tables(const Biases<Tile>& bias, typename Tile::Storage& shared,
                                               const RelPosAttentionShape& s, const AttentionUnit& unit, uint32_t first,
                                               const FragmentA<T> (&q)[Tile::kDim / 16], const T* queries,
                                               uint64_t stride, const Tables<T>& tables, bool wide,
                                               int staged_rows = Tile::kStagedRows) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    float *h = bias.h + 16 * warp * bias.stride_h, *w = bias.w + 16 * warp * bias.stride_w;
    if (bias.with_h)
        for (uint32_t i = lane; i < 16 * bias.stride_h; i += kWarp)
            h[i] = i % bias.stride_h < s.side_h ? 0.0f : -INFINITY;
    for (uint32_t i = lane; i < 16 * bias.stride_w; i += kWarp)
        w[i] = bias.x + i % bias.stride_w < s.side_w ? 0.0f : -INFINITY;
    __syncwarp();
    if (tables.h == nullptr || first >= unit.queries()) return;
    const int g = lane / 4, t = lane % 4;
    const TableRows list(s, unit, first, Tile::kQueries, bias.with_h, bias.first_column,
                         bias.columns);
    const Token query[2] = {unit.query(first + 16 * warp + g), unit.query(first + 16 * warp + g + 8)};
    for (uint32_t begin = 0; begin < list.count; begin += staged_rows) {
        const int count = int(min(list.count - begin, uint32_t(staged_rows)));
        copy_rows<Tile>(wide, shared.rows, count, s.head_dim, tables.h,
                        [&](int row) { return tables.row(s, list.row(begin + row)); });
        wait_for_copies();
        for (int block = 0; block < count; block += 16) {
            float products[2][4] = {};
#pragma unroll
            for (int k = 0; k < Tile::kDim / 16; ++k) {
                FragmentB<T> b[2];
                load_b(b, &shared.rows[block][16 * k], Tile::kStride);
                mma(products[0], q[k], b[0]);
                mma(products[1], q[k], b[1]);
            }
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int half = i % 4 / 2, row = g + 8 * half, column = block + 8 * (i / 4) + 2 * t + i % 2;
                list.key_of(begin + column, query[half], [&](bool is_h, uint32_t k) {
                    float product = products[i / 4][i % 4];
                    if constexpr (sizeof(T) == 4)
                        if (!is_finite(product) && first + 16 * warp + row < unit.queries()) {
                            const T* of_query = queries + unit.token(query[half]) * stride;
                            product = 0.0f;
                            for (uint32_t c = 0; c < s.head_dim; ++c)
                                product = fmaf(of_query[c], shared.rows[column][c], product);
                        }
                    if (is_h) h[row * bias.stride_h + k] = product * kLog2e;
                    else if (k - bias.x < bias.stride_w) w[row * bias.stride_w + k - bias.x] = product * kLog2e;
                });
            }
        }
        __syncthreads();
    }
    __syncwarp();
}

// A bit for each of a lane's columns of a row of a key tile.
template <class Tile> using KeptKeys = std::conditional_t<(Tile::kKeys > 128), uint64_t, uint32_t>;

// Which of a lane's two columns of each accumulator of a row of a key tile dropout keeps, from bit 0 on. Columns are
// numbered as keys of the window, whatever the tile. Rolled, since rarely taken.
template <class Tile>
__device__ __forceinline__ KeptKeys<Tile> kept_keys(const RelPosAttentionShape& s, uint64_t row, uint32_t y,
                                                    uint32_t x) {
    static_assert(Tile::kKeys / 8 * 2 <= 8 * sizeof(KeptKeys<Tile>));
    KeptKeys<Tile> kept = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < Tile::kKeys / 8 * 2; ++i) {
        const uint32_t n = i / 2, column = n % (Tile::kCols / 8) * 8 + threadIdx.x % 4 * 2 + i % 2;
        kept |= KeptKeys<Tile>(dropout_keeps(s.dropout, row, (y + n / (Tile::kCols / 8)) * s.side_w + x + column)) << i;
    }
    return kept;
}

template <class Kept> __device__ __forceinline__ float dropout_factor(const DropoutMask& mask, Kept kept, int bit) {
    return kept >> bit & 1 ? mask.scale : 0.0f;
}
