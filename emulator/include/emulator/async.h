// The machine as Hopper's kernels see it: barriers in shared memory, and an engine that copies and multiplies in the
// background (runtime/async.cpp). Each operation is performed as early or as late as the rules allow, by the mode.
#pragma once
#include "simt.h"

namespace emulator {

// An encoded tensor map: what src/lib.rs writes, as the driver writes its own. Dimensions innermost first.
struct TensorMap {
    uint64_t magic;
    uint64_t address;
    uint64_t strides[4];  // bytes, of the dimensions from the second on
    uint32_t dims[5];
    uint32_t box[5];
    uint32_t rank;
    uint32_t element_bytes;
    uint32_t round_tf32;  // f32 elements lose, rounding, the bits that tf32 does not have
    uint32_t swizzle;     // bytes: 0, 32, 64 or 128
};
static_assert(sizeof(TensorMap) <= 128);
constexpr uint64_t kTensorMapMagic = 0x70616D726F736E65u;

// A block's barriers are known by where they lie; eight bytes there tell whether somebody overwrote them.
void mbarrier_init(void* bar, uint32_t arrivals, Location at);
void mbarrier_arrive(void* bar, int64_t expected_bytes, Location at);
// At the barrier at the same place of that block of the cluster.
void mbarrier_arrive_cluster(void* bar, uint32_t rank, Location at);
void mbarrier_wait(void* bar, uint32_t parity, Location at);
void fence_mbarrier_init();

// The engine may read data written by stmatrix only after its writers' fences.
void note_generic_write(const void* p, int bytes);
void fence_proxy_async();

// `mask`: the blocks of the cluster that get it, or null for this one.
void tensor_load(void* dst, const void* map, void* bar, const int* coordinates, int rank, const uint16_t* mask, Location at);
void tensor_store(const void* map, const void* src, const int* coordinates, int rank, Location at);
void bulk_load(void* dst, const void* src, uint32_t bytes, void* bar, Location at);
void bulk_store(void* dst, const void* src, uint32_t bytes, Location at);
void commit_bulk();
void wait_bulk(int in_flight);
void check_tensor_map(const void* map, int rank, Location at);

enum class Operand { f16, bf16, tf32 };
struct Wgmma {
    Operand type;
    int n;
    float* d;
    const uint32_t* a_registers;  // or null: a is a descriptor
    uint64_t a, b;
    bool scale_d, trans_a, trans_b;
    Location at{};
};
void wgmma(Wgmma& operands, Location at);
void wgmma_fence(Location at);
void wgmma_commit(Location at);
void wgmma_wait(int in_flight, Location at);

// The barrier between the threads of a cluster's blocks.
void cluster_arrive(Location at);
void cluster_wait(Location at);
uint32_t cluster_rank();

void set_registers(int count, bool increase, Location at);
void arrive_barrier(int id, int threads, Location at);

}  // namespace emulator
