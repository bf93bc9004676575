// The instances of projection/sm90/bwd_input.cuh: tile, dtype. One block a multiprocessor.
#include "projection/sm90/bwd_input.cuh"
#include "tiles.h"

#define INSTANCE(suffix, T, tile, ping_pong, rows, cols, stages, cluster)                                           \
    KERNEL(projection_bwd_input_sm90_##tile##_##suffix, ProjectionBwdInputSm90Params, PROJECTION_SM90_THREADS, 1) { \
        projection_bwd_input_sm90<ProjectionTileSm90<T, rows, cols, stages, ping_pong, cluster>>(p);                \
    }
PROJECTION_BWD_INPUT_SM90_TILES(INSTANCE)
