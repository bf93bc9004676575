// The instances of projection/sm90/fwd.cuh: tile, dtype. One block a multiprocessor.
#include "projection/sm90/fwd.cuh"
#include "tiles.h"

#define INSTANCE(suffix, T, tile, ping_pong, rows, cols, stages, cluster)                                \
    KERNEL(projection_fwd_sm90_##tile##_##suffix, ProjectionFwdSm90Params, PROJECTION_SM90_THREADS, 1) { \
        projection_fwd_sm90<ProjectionTileSm90<T, rows, cols, stages, ping_pong, cluster>>(p);           \
    }
PROJECTION_FWD_SM90_TILES(INSTANCE)
