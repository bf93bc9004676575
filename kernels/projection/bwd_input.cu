// The instances of projection/bwd_input.cuh.
#include "projection/bwd_input.cuh"

template <class T> using Large = ProjectionTile<T, 128, 128, 2, 4, true>;
template <class T> using Small = ProjectionTile<T, 64, 64, 2, 2, true>;
static_assert(sizeof(Large<__half>::Storage) == PROJECTION_BWD_INPUT_128X128_SHARED_BYTES && sizeof(Large<float>::Storage) == PROJECTION_BWD_INPUT_128X128_SHARED_BYTES);
static_assert(sizeof(Small<__half>::Storage) == PROJECTION_BWD_INPUT_64X64_SHARED_BYTES && sizeof(Small<float>::Storage) == PROJECTION_BWD_INPUT_64X64_SHARED_BYTES);

KERNEL(projection_bwd_input_128x128_f32, ProjectionParams, 256) { projection_bwd_input<Large<float>>(p); }
KERNEL(projection_bwd_input_128x128_f16, ProjectionParams, 256) { projection_bwd_input<Large<__half>>(p); }
KERNEL(projection_bwd_input_128x128_bf16, ProjectionParams, 256) { projection_bwd_input<Large<__nv_bfloat16>>(p); }
KERNEL(projection_bwd_input_64x64_f32, ProjectionParams, 128) { projection_bwd_input<Small<float>>(p); }
KERNEL(projection_bwd_input_64x64_f16, ProjectionParams, 128) { projection_bwd_input<Small<__half>>(p); }
KERNEL(projection_bwd_input_64x64_bf16, ProjectionParams, 128) { projection_bwd_input<Small<__nv_bfloat16>>(p); }
