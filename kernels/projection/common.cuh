// The main loop that the projections' forward and their input's gradient share: a sum of products,
//
//   acc [kRows, kCols] = sum over products of left [kRows, depth] right [depth, kCols],
//
// first those of the weights, in the tensors' dtype, then the low-rank ones, in f32, as blocks of depth of the same
// loop. The copies by cp.async fill stages of shared memory while earlier stages are multiplied. Each stage holds 64
// bytes of depth: 32 elements of 16 bits, or 16 of f32. Tensors in f32 are multiplied as 3xTF32. Beside 16-bit tensors,
// the low-rank part is plain TF32 (see tile.cuh).
#pragma once
#include "common/tile.cuh"

// kWarpsM x kWarpsN warps share the tile. The right side lies as [n, k] in memory, or as [k, n] if kRightRows.
template <class T_, int kRows_, int kCols_, int kWarpsM_, int kWarpsN_, bool kRightRows_> struct ProjectionTile {
    using T = T_;
    static constexpr int kRows = kRows_, kCols = kCols_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_;
    static constexpr bool kRightRows = kRightRows_, kSplit = sizeof(T) == 4;
    static constexpr int kThreads = kWarpsM * kWarpsN * kWarp, kStages = 4;
    // Fragments of a warp; 4 x 8 columns are what keep_bits wants.
    static constexpr int kM = kRows / kWarpsM / 16, kN = kCols / kWarpsN / 8;
    static_assert(kN == 4);
    template <class E> static constexpr int kDepth = 64 / sizeof(E);
    // Rows of 64 bytes lie 80 apart, and rows of columns 16 (32 for f32) more than their length: no bank conflicts.
    template <class E> static constexpr int kLeftStride = 80 / sizeof(E);
    template <class E> static constexpr int kRightStride = kRightRows ? kCols + 8 : 80 / sizeof(E);
    static constexpr int kOutStride = kCols + 8;

    struct Stage {
        alignas(16) unsigned char left[kRows * 80];
        alignas(16) unsigned char right[kRightRows ? kCols * 64 + 512 : kCols * 80];
    };
    union Storage {
        Stage stages[kStages];
        float out[kRows][kOutStride];
    };

    using Accumulators = float[kM][kN][4];

    // The warp's first row and column in the tile.
    static __device__ __forceinline__ int warp_row() { return threadIdx.x / kWarp / kWarpsN * kM * 16; }
    static __device__ __forceinline__ int warp_col() { return threadIdx.x / kWarp % kWarpsN * kN * 8; }
};

// One step of the sum: from depth k on of one of its products. `left` is at the tile's first row; `right` at its first
// column (a row of memory, or a column).
struct Step {
    device_ptr left, right;
    uint32_t left_stride, right_stride;
    uint32_t depth, k;  // of the product: all of it, and where this step begins
    uint32_t part;
    bool low_rank;
};

template <class Tile, class E>
__device__ __forceinline__ void stage_step(typename Tile::Stage& stage, const Step& s, uint32_t rows, uint32_t cols) {
    constexpr int kDepth = Tile::template kDepth<E>, kRightStride = Tile::template kRightStride<E>;
    const uint32_t k = s.k, depth = s.depth - k;
    const E *left = global<const E>(s.left) + k, *right = global<const E>(s.right);
    E *left_tile = reinterpret_cast<E*>(stage.left), *right_tile = reinterpret_cast<E*>(stage.right);
    stage_tile<Tile::kRows, kDepth, Tile::template kLeftStride<E>, Tile::kThreads>(left_tile, left, s.left_stride, rows,
                                                                                   depth);
    if constexpr (Tile::kRightRows)
        stage_tile<kDepth, Tile::kCols, kRightStride, Tile::kThreads>(right_tile, right + uint64_t(k) * s.right_stride,
                                                                      s.right_stride, depth, cols);
    else
        stage_tile<Tile::kCols, kDepth, kRightStride, Tile::kThreads>(right_tile, right + k, s.right_stride, cols,
                                                                      depth);
}

// One stage of f32 operands.
template <class Tile, class Add>
__device__ __forceinline__ void product_f32(const typename Tile::Stage& stage, Add add) {
    constexpr int kLeftStride = Tile::template kLeftStride<float>, kRightStride = Tile::template kRightStride<float>;
    const float* left = reinterpret_cast<const float*>(stage.left) + Tile::warp_row() * kLeftStride;
    const float* right =
        reinterpret_cast<const float*>(stage.right) + Tile::warp_col() * (Tile::kRightRows ? 1 : kRightStride);
    product_tf32<Tile::template kDepth<float>, Tile::kSplit, Tile::kSplit, Tile::kM, Tile::kN>(
        [&](int i, int k) { return left[i * kLeftStride + k]; },
        [&](int k, int j) { return right[Tile::kRightRows ? k * kRightStride + j : j * kRightStride + k]; }, add);
}

// The low-rank products beside 16-bit operands are a short chain.
template <class Tile, class Body> __device__ __forceinline__ void add_product(float (&acc)[4], Body body) {
    if constexpr (Tile::kSplit) add_rounded(acc, body);
    else body(acc);
}

// The whole steps of a weights' product that come after one of its steps, if they can be copied in vectors.
template <class Tile> struct WholeSteps {
    using T = typename Tile::T;
    static constexpr bool kRightRows = Tile::kRightRows;
    static constexpr int kDepth = Tile::template kDepth<T>, kThreads = Tile::kThreads;
    using Left = TileVectors<Tile::kRows, kDepth, Tile::template kLeftStride<T>, kThreads, false, T>;
    using Right = TileVectors<kRightRows ? kDepth : Tile::kCols, kRightRows ? Tile::kCols : kDepth,
                              Tile::template kRightStride<T>, kThreads, kRightRows, T>;
    Left left;
    Right right;
    uint32_t count = 0;

    __device__ __forceinline__ WholeSteps(const Step& s, uint32_t rows, uint32_t cols)
        : left(s.left, s.left_stride, 0, s.k + kDepth, rows), right(s.right, s.right_stride, 0, s.k + kDepth, cols) {
        const bool fit =
            Left::fit(s.left, s.left_stride, 0, s.k, rows) && Right::fit(s.right, s.right_stride, 0, s.k, cols);
        if (fit && !s.low_rank && s.depth - s.k >= kDepth) count = (s.depth - s.k) / kDepth - 1;
    }
    // Starts copying the next one.
    __device__ __forceinline__ void copy(typename Tile::Stage& stage) {
        left.copy(reinterpret_cast<T*>(stage.left));
        right.copy(reinterpret_cast<T*>(stage.right));
        --count;
    }
};

// Runs the loop; rows and cols are what the matrices have left from the tile's corner. `steps.at(i)` is step i of
// `steps.count()`, of which the first `steps.weights()` are of the weights' products. `low_rank(stage, step)`
// multiplies a stage of the others.
template <class Tile, class Steps, class LowRank>
__device__ __forceinline__ void sum_steps(typename Tile::Storage& shared, typename Tile::Accumulators& acc,
                                          const Steps& steps, uint32_t rows, uint32_t cols, LowRank low_rank) {
    using T = typename Tile::T;
    constexpr uint32_t kStages = Tile::kStages;
    const uint32_t count = steps.count(), weights = steps.weights();
    const auto stage_of = [&](uint32_t index) -> typename Tile::Stage& { return shared.stages[index % kStages]; };
    const auto multiply = [&](uint32_t index) {
        const auto& stage = stage_of(index);
        if constexpr (Tile::kSplit) {
            product_f32<Tile>(stage, [&](int m, int n, auto body) { add_product<Tile>(acc[m][n], body); });
        } else {
            constexpr int kLeftStride = Tile::template kLeftStride<T>, kRightStride = Tile::template kRightStride<T>;
            product_16bit<Tile::kRightRows, kLeftStride, kRightStride>(
                acc, reinterpret_cast<const T*>(stage.left) + Tile::warp_row() * kLeftStride,
                reinterpret_cast<const T*>(stage.right) + Tile::warp_col() * (Tile::kRightRows ? 1 : kRightStride));
        }
    };
    const auto wait = [] {
        ptx::cp_async_wait_group<kStages - 2>();
        __syncthreads();  // this stage has landed, and nobody reads the one before it any more
    };
    // Copies run so many steps ahead of products.
    constexpr uint32_t kAhead = kStages - 1;
    WholeSteps<Tile> whole(steps.at(0), rows, cols);
    whole.count = 0;  // until the copies are ahead
#pragma unroll 1
    for (uint32_t next = 0; next < count + kAhead; ++next) {
#pragma unroll 1
        for (; whole.count > 0; ++next) {
            wait();
            whole.copy(stage_of(next));
            ptx::cp_async_commit_group();
            multiply(next - kAhead);
        }
        if (next >= kAhead) wait();
        if (next < count) {
            const Step step = steps.at(next);
            if (step.low_rank) stage_step<Tile, float>(stage_of(next), step, rows, cols);
            else stage_step<Tile, T>(stage_of(next), step, rows, cols);
            if (next + 1 >= kAhead) whole = WholeSteps<Tile>(step, rows, cols);
        }
        ptx::cp_async_commit_group();
        if (next < kAhead) continue;
        const uint32_t index = next - kAhead;
        if (index < weights) multiply(index);
        else low_rank(stage_of(index), steps.at(index));
    }
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // the stages are free
}

// Lays the accumulators out as rows in shared memory, from where they are written in whole vectors.
template <class Tile>
__device__ __forceinline__ void accumulators_to_rows(typename Tile::Storage& shared,
                                                     const typename Tile::Accumulators& acc) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m)
#pragma unroll
        for (int n = 0; n < Tile::kN; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                store(&shared.out[Tile::warp_row() + m * 16 + lane / 4 + 8 * half]
                                 [Tile::warp_col() + n * 8 + 2 * (lane % 4)],
                      {acc[m][n][2 * half], acc[m][n][2 * half + 1]});
    __syncthreads();
}

// Calls body(row, col, values) for the tile's vectors of N elements that lie within rows and cols.
template <class Tile, int N, class Body>
__device__ __forceinline__ void for_tile(const typename Tile::Storage& shared, uint32_t rows, uint32_t cols,
                                         Body body) {
    constexpr int kVectors = Tile::kCols / N;
    for (int i = threadIdx.x; i < Tile::kRows * kVectors; i += Tile::kThreads) {
        const uint32_t row = i / kVectors, col = i % kVectors * N;
        if (row >= rows || col >= cols) continue;
        float values[N];
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = shared.out[row][col + j];
        body(row, col, values);
    }
}
