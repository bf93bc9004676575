// A block of threads: its fibers, whom they wait for, and its shared memory. Blocks run in clusters, most of them of one
// block: cluster.h.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "emulator/async.h"
#include "fiber.h"

namespace emulator {

// How the freedoms that the rules leave are used; a right kernel gives the same result for all of them.
struct Mode {
    bool early;           // asynchronous copies land when issued, else when waited for
    bool early_products;  // so do asynchronous products
    uint64_t seed;        // 0: threads run in turn; else any ready one, by this seed
};

struct Launch {
    void (*run)(const void* params);
    const void* params;
    dim3 grid, block;
    unsigned cluster;  // blocks of one, along x
    size_t shared_bytes;
    bool begins_early;  // before the kernel before it has ended, for which it has to wait
    Mode mode;
    int threads() const { return int(block.x * block.y * block.z); }
};

struct Copy {
    void* dst;
    const void* src;
    bool valid;
    Move move;
};

struct Block;
struct Cluster;

struct Fiber {
    Context context;
    Block* block = nullptr;
    int rank = 0;
    uint3 index{};
    bool ended = false;
    const char* waits_in = nullptr;
    Location at{};
    std::vector<Copy> open;                // issued, not committed
    std::deque<std::vector<Copy>> groups;  // committed, not waited for
    // Bulk stores: issued, then committed and not waited for.
    std::vector<std::function<void()>> open_stores;
    std::deque<std::vector<std::function<void()>>> stores;
    Location store_at{};
    std::vector<uint32_t> unfenced;  // units of 16 bytes, written and not fenced
    bool arrived = false;            // at the cluster's barrier, and has not waited
    uint64_t arrived_in = 0;         // its phase
};

// Threads that do something together.
struct Group {
    int arrived = 0, size = 0;
    const char* name = nullptr;
    Location at{};
    std::vector<void*> operands;
    std::vector<Fiber*> sleepers;
};

struct Mbarrier {
    uint32_t arrivals, pending;  // of a phase; still to come in this one
    int64_t bytes;               // expected and not there
    uint32_t parity;             // of the phase that has not ended
    bool fenced;
    int owner;
    Location at;
    uint64_t made;  // in this phase of the cluster's barrier
    // Other blocks have been here, in this phase; in one that has ended, for which nobody has waited.
    bool visited = false, unseen = false;
    std::vector<Fiber*> sleepers{};
};

// A warp's share of a wgmma: rows 16 quarter .. 16 quarter + 15.
struct Product {
    Operand type;
    int n;
    float* d[kWarp];
    const uint32_t* a_registers[kWarp];
    bool from_registers;
    uint64_t a, b;
    bool scale_d, trans_a, trans_b;
    uint32_t quarter;
    Location at;
};

struct WarpProducts {
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
    bool fenced = false;
};

struct Block {
    Block(const Launch& launch, Cluster& cluster, unsigned rank);
    ~Block();

    // Makes this the block with the index. All its threads are ready.
    void begin(uint3 index);
    // All threads have ended, or cannot: what is wrong with what they leave, or nothing.
    std::string end(bool failed);

    void meet(Group& group, int slot, int size, const char* name, bool same_line, void* operands, Operation operation, Location at);
    // Arrives at a meeting of `size` and goes on.
    void arrive(Group& group, int size, const char* name, Location at);
    void sleep(const char* name, Location at);
    void wake(Fiber& fiber);
    [[noreturn]] void fail(const std::string& what, Location at);
    std::string who_waits_where() const;
    // "block (1, 0, 0): "
    std::string name() const;

    // async.cpp
    void start_store(std::function<void()> copy, Location at);
    std::string left_behind() const;

    const Launch& launch_;
    Cluster& cluster_;
    const unsigned rank_;  // in the cluster
    uint3 index_{};
    int threads_, live_ = 0;
    std::vector<Fiber> fibers_;
    std::vector<Group> warps_, warpgroups_, barriers_;
    Fiber* self_ = nullptr;  // who runs, or ran last
    unsigned char* shared_ = nullptr;

    std::map<uint32_t, Mbarrier> mbarriers_;  // by offset in shared memory
    std::vector<WarpProducts> products_;      // by warp
    std::vector<uint16_t> unfenced_;          // of 16 bytes of shared memory: 0, or who wrote them, counted from 1
    std::vector<int> registers_;              // of a warp's threads
    int free_registers_ = 0;
    std::vector<Fiber*> register_sleepers_;
    bool waited_ = false;  // some thread, for the kernel before

private:
    void join(Group& group, int size, const char* name, bool same_line, Location at);
    void leave(Group& group);

    size_t capacity_ = 0;
};

// The block that this thread of the operating system runs.
Block& current();
std::string text(Location at);
// Synchronisation told to ThreadSanitizer.
void sync_acquire(void* object);
void sync_release(void* object);

}  // namespace emulator
