// The instances of projection/fwd.cuh.
#include "projection/fwd.cuh"

template <class T> using Large = ProjectionTile<T, 128, 128, 2, 4, false>;
template <class T> using Small = ProjectionTile<T, 64, 64, 2, 2, false>;
static_assert(sizeof(Large<__half>::Storage) == PROJECTION_FWD_128X128_SHARED_BYTES && sizeof(Large<float>::Storage) == PROJECTION_FWD_128X128_SHARED_BYTES);
static_assert(sizeof(Small<__half>::Storage) == PROJECTION_FWD_64X64_SHARED_BYTES && sizeof(Small<float>::Storage) == PROJECTION_FWD_64X64_SHARED_BYTES);

KERNEL(projection_fwd_128x128_f32, ProjectionParams, 256) { projection_fwd<Large<float>>(p); }
KERNEL(projection_fwd_128x128_f16, ProjectionParams, 256) { projection_fwd<Large<__half>>(p); }
KERNEL(projection_fwd_128x128_bf16, ProjectionParams, 256) { projection_fwd<Large<__nv_bfloat16>>(p); }
KERNEL(projection_fwd_64x64_f32, ProjectionParams, 128) { projection_fwd<Small<float>>(p); }
KERNEL(projection_fwd_64x64_f16, ProjectionParams, 128) { projection_fwd<Small<__half>>(p); }
KERNEL(projection_fwd_64x64_bf16, ProjectionParams, 128) { projection_fwd<Small<__nv_bfloat16>>(p); }
