// out[i] = sum over p of partials[p, i], p in order: the second half of every sum over rows. One thread a column.
#include "common/kernel.cuh"

template <class T> __device__ void sum_partials(const SumPartialsParams& p) {
    const uint64_t column = uint64_t(blockIdx.x) * SUM_PARTIALS_THREADS + threadIdx.x;
    if (column >= p.size) return;
    const float* partials = global<const float>(p.partials) + column;
    float sum = 0.0f;
    for (uint64_t part = 0; part < p.parts; ++part) sum += partials[part * p.size];
    global<T>(p.out)[column] = from_float<T>(sum);
}

KERNEL(sum_partials_f32, SumPartialsParams, SUM_PARTIALS_THREADS) { sum_partials<float>(p); }
KERNEL(sum_partials_f16, SumPartialsParams, SUM_PARTIALS_THREADS) { sum_partials<__half>(p); }
KERNEL(sum_partials_bf16, SumPartialsParams, SUM_PARTIALS_THREADS) { sum_partials<__nv_bfloat16>(p); }
