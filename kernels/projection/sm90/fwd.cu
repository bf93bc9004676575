// The instances of projection/sm90/fwd.cuh: tile, dtype. One block a multiprocessor.
#include "projection/sm90/fwd.cuh"

#define INSTANCE(tile, rows, cols, stages, ping_pong, cluster, TILE, suffix, T)                                                            \
    static_assert(sizeof(ProjectionTileSm90<T, rows, cols, stages, ping_pong, cluster>::Storage) == PROJECTION_SM90_##TILE##_SHARED_BYTES); \
    KERNEL(projection_fwd_sm90_##tile##_##suffix, ProjectionFwdSm90Params, PROJECTION_SM90_THREADS, 1) {                                   \
        projection_fwd_sm90<ProjectionTileSm90<T, rows, cols, stages, ping_pong, cluster>>(p);                                             \
    }
#define INSTANCES(suffix, T)                                                                  \
    INSTANCE(pingpong_128x192, 128, 192, 4, true, 1, PINGPONG_128X192, suffix, T)             \
    INSTANCE(pingpong_128x192_x2, 128, 192, 4, true, 2, PINGPONG_128X192, suffix, T)          \
    INSTANCE(cooperative_128x256, 128, 256, 4, false, 1, COOPERATIVE_128X256, suffix, T)      \
    INSTANCE(cooperative_128x256_x2, 128, 256, 4, false, 2, COOPERATIVE_128X256, suffix, T)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)
