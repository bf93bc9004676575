// A cluster of blocks: the scheduler that lets all threads take turns, the copies in flight to shared memory, and the
// barrier between the blocks. Most launches have clusters of one block.
#pragma once
#include <memory>

#include "block.h"

namespace emulator {

struct Cluster {
    explicit Cluster(const Launch& launch);

    // Runs the blocks from this index on, along x; what went wrong, or nothing.
    std::string run(uint3 first);
    // `run` in two steps: as far as the blocks get before the previous kernel has ended, and the rest.
    std::string begin(uint3 first);
    std::string end();

    // The other threads' turn, until somebody wakes this one.
    void sleep(Fiber& self, const char* name, Location at);
    void wake(Fiber& fiber);
    // Ends the run.
    [[noreturn]] void fail(const std::string& report);

    // barrier.cluster
    void arrive(Location at);
    void wait(Location at);

    // griddepcontrol.wait
    void wait_for_grids(Location at);

    void start_load(std::function<void()> copy);

    const Launch& launch_;
    std::vector<std::unique_ptr<Block>> blocks_;
    uint64_t phase_ = 0;  // of its barrier

private:
    static void entry();
    void start(uint3 first, bool held);
    void go();
    std::string report();
    Fiber* next();
    uint64_t random();
    bool land();
    void settle();
    void transfer(Context& from, Fiber* to, bool last = false);

    std::vector<Fiber*> ready_;  // a ring
    size_t head_ = 0, count_ = 0;
    uint64_t random_ = 0;
    Context main_;
    int live_ = 0, arrived_ = 0;
    std::vector<Fiber*> sleepers_;              // at the barrier
    bool held_ = false;                         // the kernel before has not ended
    std::vector<Fiber*> held_sleepers_;         // until it has
    std::vector<std::function<void()>> loads_;  // bulk copies that have not landed
    std::string error_;
};

}  // namespace emulator
