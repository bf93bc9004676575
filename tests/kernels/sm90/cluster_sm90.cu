// For the tests of the emulator alone: clusters of two blocks. Each block adds up all tiles [16, 32] of its cluster, and
// loads half of them for both. Shapes: in [clusters, steps, 16, 32], out [blocks, 16, 32]. The first warp loads, the second adds.
// tests/planted_bugs/cluster_sm90.rs plants bugs in it.
#include "common/kernel.cuh"
#include "common/ptx_sm90.cuh"

struct ClusterParams {
    EncodedTensorMap in;  // [rows, 32], in tiles of 8 rows
    device_ptr out;
    uint64_t steps;
    uint64_t unused[6];
};
struct ClusterStorage {
    alignas(128) float tiles[2][16][32];
    ptx::mbarrier full[2], empty[2];
};
KERNEL(cluster_sm90, ClusterParams, 64) {
    auto& shared = ptx::shared_storage<ClusterStorage>();
    const uint32_t steps = uint32_t(p.steps), rank = ptx::cluster_ctarank(), lane = threadIdx.x % kWarp;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            ptx::mbarrier_init(shared.full[i], 1);
            ptx::mbarrier_init(shared.empty[i], 2);  // a warp of each block reads what is loaded here
        }
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();  // both blocks have initialised their barriers
    if (threadIdx.x == 0) {
        for (uint32_t step = 0; step < steps; ++step) {
            const uint32_t stage = step % 2, parity = step / 2 % 2;
            ptx::mbarrier_wait_parity(shared.empty[stage], parity ^ 1);
            ptx::mbarrier_arrive_expect_tx(shared.full[stage], sizeof(shared.tiles[0]));
            ptx::cp_async_bulk_tensor_multicast(shared.tiles[stage][8 * rank], p.in, shared.full[stage], 3, 0, (blockIdx.x / 2 * steps + step) * 16 + 8 * rank);
        }
        for (uint32_t step = steps; step < steps + 2; ++step)  // the other block has given back its last stages, here too
            ptx::mbarrier_wait_parity(shared.empty[step % 2], step / 2 % 2 ^ 1);
    } else if (threadIdx.x >= kWarp) {
        float sums[16] = {};
        for (uint32_t step = 0; step < steps; ++step) {
            const uint32_t stage = step % 2, parity = step / 2 % 2;
            ptx::mbarrier_wait_parity(shared.full[stage], parity);
            for (int row = 0; row < 16; ++row) sums[row] += shared.tiles[stage][row][lane];
            __syncwarp();
            if (lane < 2) ptx::mbarrier_arrive_cluster(shared.empty[stage], lane);
        }
        for (int row = 0; row < 16; ++row) global<float>(p.out)[(blockIdx.x * 16 + row) * 32 + lane] = sums[row];
    }
}
