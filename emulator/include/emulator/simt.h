// The machine as a kernel compiled for the host sees it (runtime/simt.cpp).
//
// A CUDA thread is a fiber; the threads of a block take turns on one thread of the operating system. Everything that
// several threads do together is one primitive, `meet`. Each thread leaves a pointer to its operands, on its own stack,
// and sleeps. The last to arrive performs the operation on everybody's operands and wakes the rest.
#pragma once
#include <cstddef>
#include <cstdint>

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern constinit thread_local uint3 threadIdx, blockIdx;
extern constinit thread_local dim3 blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;

// Where in the kernel a collective was called: a default argument, so that it is the caller's line.
struct Location {
    const char* file;
    int line;
};
#define EMULATOR_LOCATION \
    emulator::Location at = { __builtin_FILE(), __builtin_LINE() }

// Runs once all of a group have arrived; operands[i] is what thread i of the group passed.
using Operation = void (*)(void** operands);

// All 32 threads of the warp; they must be in the same call.
void meet_warp(const char* name, void* operands, Operation operation, Location at);

// `threads` threads of the block, whichever they are, at barrier `id`; 0 threads are all of the block.
void meet_barrier(const char* name, int id, int threads, Location at);

// This thread's place in its warp.
int lane();

// The block's dynamic shared memory: exactly as much as the launch gave, all NaN at first.
unsigned char* shared_memory();

// Fails the launch unless [p, p + bytes) lies in it and is aligned to `bytes`.
void check_shared(const char* name, const void* p, int bytes, Location at);

// cp.async: `move(dst, src, valid)` happens when it is issued (early mode) or when it is waited for (late mode); the
// rules allow both.
using Move = void (*)(void* dst, const void* src, bool valid);
void copy_async(void* dst, const void* src, int bytes, bool valid, Move move, Location at);
void commit_copies();
void wait_copies(int in_flight);

// Until the kernels before this one have ended, where it may begin earlier.
void wait_for_grids(Location at);

// Ends the launch, with this thread's place and the message in its error.
[[noreturn]] void fail(const char* what, Location at);

// Puts a kernel into the table that launches look it up in.
struct Registration {
    Registration(const char* name, size_t params_bytes, void (*run)(const void* params), int max_threads, int min_blocks = 1);
};

}  // namespace emulator
