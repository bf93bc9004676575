// Shared by the sm_90a kernels of rel_pos_attention: rows of channels as TMA writes and wgmma reads them.
//
// A *panel* is rows of kDim channels of one head. The first 64 channels are rows of 128 bytes, 128B-swizzled. Behind
// all of them, for head_dim 80, the other 16 channels are rows of 32 bytes, 32B-swizzled. Either side of a product over
// channels (q k^T) has its k innermost. The right side of a product over the panel's rows (P v) has its n innermost.
//
// The accumulators of wgmma lie as those of mma.m16n8k16. Warp w of a warpgroup has 16 rows, from 16 w on. With g =
// lane / 4 and t = lane % 4, element 4 j + i of a lane is in row g + 8 (i / 2), column 8 j + 2 t + i % 2.
#pragma once
#include "rel_pos_attention/common.cuh"
#include "common/descriptor.cuh"

constexpr int kGroup = 128;                            // threads of a warpgroup
constexpr int kGroupRows = 64;                         // rows of its products
constexpr int kWide = 64, kWideRow = 128, kTailRow = 32;  // channels of the first part, bytes of the rows of both
constexpr int kTableRows = REL_POS_ATTENTION_SM90_TABLE_ROWS;  // rows of the tables in a box

template <int Rows, int Dim> struct Panel {
    static constexpr int kSteps = Dim / 16, kWideSteps = kWide / 16;
    static constexpr bool kTail = Dim > kWide;
    static_assert(Dim == kWide || Dim == kWide + 16);
    static_assert(Rows % 8 == 0, "a swizzle's pattern is eight rows");
    // Whole patterns, so that what follows is aligned to one.
    static constexpr int kBytes = (Rows * Dim * 2 + 1023) / 1024 * 1024;

    // Where the 16 bytes number `piece` of a row lie.
    static __device__ __forceinline__ uint32_t offset(uint32_t row, uint32_t piece) {
        if (piece < kWide / 8) return row * kWideRow + (piece ^ row % 8) * 16;
        return Rows * kWideRow + row * kTailRow + ((piece - kWide / 8) ^ row / 4 % 2) * 16;
    }
    // Rows from `row` on, channels 16 step ..
    static __device__ __forceinline__ uint64_t k_inner(const unsigned char* panel, int row, int step) {
        if (step < kWideSteps) return descriptor_k_inner<kWideRow>(panel + row * kWideRow) + descriptor_step(32 * step);
        return descriptor_k_inner<kTailRow>(panel + Rows * kWideRow + row * kTailRow);
    }
    // Rows 16 step .., the first 64 channels or the others.
    static __device__ __forceinline__ uint64_t channels_inner(const unsigned char* panel, int step, bool tail) {
        if (!tail) return descriptor_mn_inner<kWideRow>(panel, 0) + descriptor_step(16 * step * kWideRow);
        return descriptor_mn_inner<kTailRow>(panel + Rows * kWideRow, 0) + descriptor_step(16 * step * kTailRow);
    }
};

// Sums over the rows of a panel, for a row and all channels.
template <int Dim> struct ChannelSums {
    static constexpr bool kTail = Dim > kWide;
    float wide[kWide / 2] = {}, tail[kTail ? (Dim - kWide) / 2 : 1] = {};
    __device__ __forceinline__ void pin() {
        ptx::wgmma_pin(wide);
        if constexpr (kTail) ptx::wgmma_pin(tail);
    }
    __device__ __forceinline__ float& at(int column, int i) {
        return column < kWide / 8 ? wide[4 * column + i] : tail[4 * (column - kWide / 8) + i];
    }
};

// products [64, N] = rows `row` .. of one panel times those of the other, transposed. In flight until it is waited for.
template <class T, int Dim, int N, int RowsA, int RowsB>
__device__ __forceinline__ void multiply_rows(float (&products)[N / 2], const unsigned char* a, int row,
                                              const unsigned char* b) {
#pragma unroll
    for (int k = 0; k < Dim / 16; ++k)
        ptx::wgmma_m64k16<N>(products, Panel<RowsA, Dim>::k_inner(a, row, k), Panel<RowsB, Dim>::k_inner(b, 0, k),
                             k > 0, T{});
    ptx::wgmma_commit_group();
}

// A warp's 16 rows of a panel, from `row` on, as left operands of products over channels.
template <int Rows, int Dim>
__device__ __forceinline__ void load_left(uint32_t (&left)[Dim / 16][4], const unsigned char* panel, uint32_t row) {
    const uint32_t lane = threadIdx.x % kWarp;
#pragma unroll
    for (int k = 0; k < Dim / 16; ++k)
        ptx::ldmatrix_x4(left[k], panel + Panel<Rows, Dim>::offset(row + lane % 16, 2 * k + lane / 16));
}

// As above, with the left rows in registers.
template <class T, int Dim, int N>
__device__ __forceinline__ void multiply_rows(float (&products)[N / 2], const uint32_t (&left)[Dim / 16][4],
                                              const unsigned char* b) {
#pragma unroll
    for (int k = 0; k < Dim / 16; ++k)
        ptx::wgmma_m64k16<N>(products, left[k], Panel<N, Dim>::k_inner(b, 0, k), k > 0, T{});
    ptx::wgmma_commit_group();
}

// sums += weights [64, Rows] times the panel. In flight until it is waited for.
template <class T, int Dim, int Rows>
__device__ __forceinline__ void add_weighted(ChannelSums<Dim>& sums, const uint32_t (&weights)[Rows / 16][4],
                                             const unsigned char* panel) {
#pragma unroll
    for (int k = 0; k < Rows / 16; ++k) {
        ptx::wgmma_m64k16<kWide, 1>(sums.wide, weights[k], Panel<Rows, Dim>::channels_inner(panel, k, false), true,
                                    T{});
        if constexpr (Panel<Rows, Dim>::kTail)
            ptx::wgmma_m64k16<Dim - kWide, 1>(sums.tail, weights[k], Panel<Rows, Dim>::channels_inner(panel, k, true),
                                              true, T{});
    }
    ptx::wgmma_commit_group();
}

// Starts loading `rows` grid rows of Tile::kCols tokens from (y, x) on, of the head that starts at `channel`; zeros
// outside the grid. The barrier is to expect rows * kCols * kDim * 2 bytes.
template <class Tile, int PanelRows>
__device__ __forceinline__ void load_tokens(unsigned char* panel, uint32_t rows, const PanelMaps& maps,
                                            ptx::mbarrier& barrier, uint32_t channel, uint32_t x, uint32_t y,
                                            uint32_t image) {
#pragma unroll 1
    for (uint32_t r = 0; r < rows; r += Tile::kBoxRows) {
        ptx::cp_async_bulk_tensor(panel + r * Tile::kCols * kWideRow, maps.wide, barrier, channel, x, y + r, image);
        if constexpr (Tile::kDim > kWide)
            ptx::cp_async_bulk_tensor(panel + PanelRows * kWideRow + r * Tile::kCols * kTailRow, maps.tail, barrier,
                                      channel + kWide, x, y + r, image);
    }
}

// As load_tokens, for one box of rows of a list, or of a list for each image, from `row` on; zeros behind its end.
template <int PanelRows, int Dim, class... C>
__device__ __forceinline__ void load_rows(unsigned char* panel, const PanelMaps& maps, ptx::mbarrier& barrier,
                                          uint32_t channel, C... row) {
    ptx::cp_async_bulk_tensor(panel, maps.wide, barrier, channel, row...);
    if constexpr (Dim > kWide)
        ptx::cp_async_bulk_tensor(panel + PanelRows * kWideRow, maps.tail, barrier, channel + kWide, row...);
}

// Puts the products of a lane's two queries with rows of a table where their keys are, in base 2. Key 0 of a query has
// the product number row_of_zero, each next key the product before. Products without a key are left out: `side` is 0
// for no query.
__device__ __forceinline__ void scatter_biases(float* bias, uint32_t stride, const int (&row_of_zero)[2],
                                               const uint32_t (&side)[2], const float (&products)[kTableRows / 2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int first = row_of_zero[half] - int(threadIdx.x % 4) * 2;
        float* of_first = bias + 8 * half * stride + first;
#pragma unroll
        for (int n = 0; n < kTableRows / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (uint32_t(first - 8 * n - i) < side[half])
                    of_first[-8 * n - i] = products[4 * n + 2 * half + i] * kLog2e;
    }
}

// Fills a warp's 16 rows of biases: minus infinity where there is no key, and zeros elsewhere if there are no tables.
__device__ __forceinline__ void fill_biases(float* bias, uint32_t stride, uint32_t side, bool tables) {
    const uint32_t lane = threadIdx.x % kWarp;
    for (uint32_t key = (tables ? side : 0) + lane % 2; key < stride; key += 2)
        bias[lane / 2 * stride + key] = key < side ? 0.0f : -INFINITY;
}

// Writes a lane's two rows of sums, scaled, 16 bytes at a time. Four lanes exchange their parts of four stretches of
// eight channels, so that each lane has one whole stretch.
template <class T, int Dim>
__device__ __forceinline__ void store_rows(ChannelSums<Dim>& sums, const float (&factor)[2], T* const (&rows)[2]) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int first = 0; first < Dim / 8; first += 4) {
            // Words of stretches first .. first + 3; those behind the end are not stored.
            uint32_t words[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const int column = first + n < Dim / 8 ? first + n : first;
                words[n] =
                    pack<T>(sums.at(column, 2 * half) * factor[half], sums.at(column, 2 * half + 1) * factor[half]);
            }
            // A 4 x 4 transpose: blocks of two, then within them.
#pragma unroll
            for (int step = 2; step > 0; step /= 2)
#pragma unroll
                for (int n = 0; n < 4; ++n)
                    if ((n & step) == 0) {
                        const bool upper = (t & step) != 0;
                        const uint32_t received = ptx::shfl_xor(upper ? words[n] : words[n + step], step);
                        words[n] = upper ? received : words[n];
                        words[n + step] = upper ? words[n + step] : received;
                    }
            if (rows[half] != nullptr && first + t < Dim / 8)
                *reinterpret_cast<Vec<uint32_t, 4>*>(rows[half] + 8 * (first + t)) = {words[0], words[1], words[2],
                                                                                      words[3]};
        }
}

// A lane's state for its two queries from tile to tile.
struct OnlineSoftmax {
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
};

// Scores of a tile become weights; returns by what the sums before it are to be multiplied.
template <class Tile>
__device__ __forceinline__ void softmax_of_tile(float (&rescale)[2], float (&scores)[Tile::kKeys / 2],
                                                OnlineSoftmax& state, const float (&fragment_w)[Tile::kCols / 2],
                                                const float* rel_h, uint32_t stride_h, float scale) {
    constexpr int kCols = Tile::kCols, kRows = Tile::kRows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float bias_h[kRows], new_max = state.row_max[half];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            bias_h[r] = rel_h[8 * half * stride_h + r];
            float row = -INFINITY;
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    float& score = scores[4 * (r * (kCols / 8) + j) + i];
                    score = fmaf(score, scale, fragment_w[4 * j + i]);
                    row = fmaxf(row, score);
                }
            new_max = fmaxf(new_max, row + bias_h[r]);
        }
        new_max = quad_max(new_max);
        const float reference = finite_maximum(new_max);
        rescale[half] = ptx::ex2_approx(state.row_max[half] - reference);
        state.row_max[half] = new_max;
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const float shift = bias_h[r] - reference;
#pragma unroll
            for (int j = 0; j < kCols / 8; ++j)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    float& score = scores[4 * (r * (kCols / 8) + j) + i];
                    score = ptx::ex2_approx(score + shift);
                    sum += score;
                }
        }
        state.row_sum[half] = fmaf(state.row_sum[half], rescale[half], sum);
    }
}

// Dropout of a tile's weights; `key` is the tile's first key.
template <class Tile>
__device__ __forceinline__ void drop_weights(float (&weights)[Tile::kKeys / 2], const RelPosAttentionShape& s,
                                             const AttentionUnit& unit, const Token (&query)[2], Token key) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const auto kept = kept_keys<Tile>(s, unit.dropout_row(query[half]), key.y, key.x);
#pragma unroll
        for (int n = 0; n < Tile::kKeys / 8; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) weights[4 * n + 2 * half + i] *= dropout_factor(s.dropout, kept, 2 * n + i);
    }
}

// Weights as the left operand of a product.
template <class T, int Keys>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[Keys / 16][4], const float (&weights)[Keys / 2]) {
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) packed[k][i] = pack<T>(weights[8 * k + 2 * i], weights[8 * k + 2 * i + 1]);
}

// The output and lse of a lane's two queries.
template <class T, int Dim>
__device__ __forceinline__ void store_queries(const RelPosAttentionFwdSm90Params& p, const AttentionUnit& unit,
                                              const Token (&query)[2], const bool (&exists)[2], ChannelSums<Dim>& sums,
                                              const OnlineSoftmax& state) {
    float inverse[2];
    T* rows[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float sum = quad_sum(state.row_sum[half]);
        inverse[half] = 1.0f / sum;
        rows[half] = nullptr;
        if (!exists[half]) continue;
        rows[half] = global<T>(p.out) + (unit.token(query[half]) * unit.s.num_heads + unit.head) * Dim;
        if (threadIdx.x % 4 == 0)
            global<float>(p.lse)[unit.first_row() + query[half].y * unit.valid_w + query[half].x] =
                state.row_max[half] * kLn2 + logf(sum);
    }
    store_rows<T, Dim>(sums, inverse, rows);
}
