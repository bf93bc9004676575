// The kernels of adamw/adamw.cuh. Gradients and moments are f32; a parameter's dtype stands in the table.
#include "adamw/adamw.cuh"

static_assert(sizeof(AdamWStorage) == ADAMW_SHARED_BYTES);
static_assert(sizeof(AdamWOutcomeStorage) == ADAMW_OUTCOME_SHARED_BYTES);
KERNEL(adamw_partials_f32, AdamWParams, ADAMW_THREADS) { adamw_partials(p); }
KERNEL(adamw_outcome_f32, AdamWParams, ADAMW_THREADS) { adamw_outcome(p); }
KERNEL(adamw_update_f32, AdamWParams, ADAMW_THREADS) { adamw_update(p); }
