// A few vectors one behind the other, by one launch: one thread an element.
#include "common/kernel.cuh"

template <class T> __device__ void concat(const ConcatParams& p) {
    const uint64_t index = uint64_t(blockIdx.x) * CONCAT_THREADS + threadIdx.x;
    if (index >= p.size) return;
    uint64_t begin = 0, from = p.parts[0].from;
#pragma unroll
    for (int part = 1; part < CONCAT_PARTS; ++part) {
        const uint64_t end = p.parts[part - 1].end;
        if (index >= end && p.parts[part].from != 0) begin = end, from = p.parts[part].from;
    }
    global<T>(p.out)[index] = global<const T>(from)[index - begin];
}

KERNEL(concat_f32, ConcatParams, CONCAT_THREADS) { concat<float>(p); }
KERNEL(concat_f16, ConcatParams, CONCAT_THREADS) { concat<__half>(p); }
KERNEL(concat_bf16, ConcatParams, CONCAT_THREADS) { concat<__nv_bfloat16>(p); }
