// The instances of projection/fwd.cuh: rows and columns of a tile, dtype.
#include "projection/fwd.cuh"
#include "tiles.h"

#define INSTANCE(suffix, T, rows, cols, warps_m, warps_n)                                         \
    KERNEL(projection_fwd_##rows##x##cols##_##suffix, ProjectionParams, 32 * warps_m * warps_n) { \
        projection_fwd<ProjectionTile<T, rows, cols, warps_m, warps_n, false>>(p);                \
    }
PROJECTION_TILES(INSTANCE)
