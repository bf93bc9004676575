// The instances of projection/bwd_input.cuh: rows and columns of a tile, dtype.
#include "projection/bwd_input.cuh"
#include "tiles.h"

#define INSTANCE(suffix, T, rows, cols, warps_m, warps_n)                                               \
    KERNEL(projection_bwd_input_##rows##x##cols##_##suffix, ProjectionParams, 32 * warps_m * warps_n) { \
        projection_bwd_input<ProjectionTile<T, rows, cols, warps_m, warps_n, true>>(p);                 \
    }
PROJECTION_TILES(INSTANCE)
