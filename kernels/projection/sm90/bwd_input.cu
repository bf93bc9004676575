// The instances of projection/sm90/bwd_input.cuh and projection/sm90/bwd_ds.cuh: tile, dtype. One block a multiprocessor.
#include "projection/sm90/bwd_ds.cuh"

#define INSTANCE(tile, rows, cols, stages, ping_pong, cluster, TILE, suffix, T)                                                            \
    static_assert(sizeof(ProjectionTileSm90<T, rows, cols, stages, ping_pong, cluster>::Storage) == PROJECTION_SM90_##TILE##_SHARED_BYTES); \
    KERNEL(projection_bwd_input_sm90_##tile##_##suffix, ProjectionBwdInputSm90Params, PROJECTION_SM90_THREADS, 1) {                        \
        projection_bwd_input_sm90<ProjectionTileSm90<T, rows, cols, stages, ping_pong, cluster>>(p);                                       \
    }
#define INSTANCE_DS(suffix, T)                                                                                                        \
    static_assert(sizeof(ProjectionTileDsSm90<T, 4>::Storage) == PROJECTION_SM90_COOPERATIVE_128X192_DS_SHARED_BYTES);               \
    KERNEL(projection_bwd_input_sm90_cooperative_128x192_ds_##suffix, ProjectionBwdInputSm90Params, PROJECTION_SM90_THREADS, 1) {    \
        projection_bwd_ds_sm90<ProjectionTileDsSm90<T, 4>>(p);                                                                       \
    }
#define INSTANCES(suffix, T)                                                                  \
    INSTANCE(pingpong_128x192, 128, 192, 4, true, 1, PINGPONG_128X192, suffix, T)             \
    INSTANCE(pingpong_128x192_x2, 128, 192, 4, true, 2, PINGPONG_128X192, suffix, T)          \
    INSTANCE(cooperative_128x192, 128, 192, 5, false, 1, COOPERATIVE_128X192, suffix, T)      \
    INSTANCE(cooperative_128x256, 128, 256, 4, false, 1, COOPERATIVE_128X256, suffix, T)      \
    INSTANCE(cooperative_128x256_x2, 128, 256, 4, false, 2, COOPERATIVE_128X256, suffix, T)      \
    INSTANCE_DS(suffix, T)
INSTANCES(f16, __half)
INSTANCES(bf16, __nv_bfloat16)
