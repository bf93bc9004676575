// A block of threads: its fibers, whom they wait for, and its shared memory.
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

struct Fiber {
    Context context;
    int rank = 0;
    uint3 index{};
    bool ended = false;
    const char* waits_in = nullptr;
    Location at{};
    std::vector<Copy> open;                // issued, not committed
    std::deque<std::vector<Copy>> groups;  // committed, not waited for
    // The same of bulk stores.
    std::vector<std::function<void()>> open_stores;
    std::deque<std::vector<std::function<void()>>> stores;
    Location store_at{};
    std::vector<uint32_t> unfenced;  // units of 16 bytes, written and not fenced
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
    std::vector<Fiber*> sleepers;
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
    explicit Block(const Launch& launch);
    ~Block();

    // Runs the block with this index; what went wrong, or nothing.
    std::string run(uint3 index);
    // The same in two steps: to where all that can be done is done before the kernel before it has ended, and the rest.
    std::string begin(uint3 index);
    std::string end();
    // griddepcontrol.wait
    void wait_for_grids(Location at);

    void meet(Group& group, int slot, int size, const char* name, bool same_line, void* operands, Operation operation, Location at);
    // Arrives at a meeting of `size` and goes on.
    void arrive(Group& group, int size, const char* name, Location at);
    void sleep(const char* name, Location at);
    void wake(Fiber& fiber);
    [[noreturn]] void fail(const std::string& what, Location at);

    // async.cpp
    void start_load(std::function<void()> copy);
    void start_store(std::function<void()> copy, Location at);
    bool land();
    std::string left_behind() const;

    const Launch& launch_;
    int threads_;
    std::vector<Fiber> fibers_;
    std::vector<Group> warps_, warpgroups_, barriers_;
    Fiber* self_ = nullptr;
    unsigned char* shared_ = nullptr;

    std::map<uint32_t, Mbarrier> mbarriers_;   // by offset in shared memory
    std::vector<std::function<void()>> loads_;  // bulk copies that have not landed
    std::vector<WarpProducts> products_;        // by warp
    std::vector<uint16_t> unfenced_;            // of 16 bytes of shared memory: 0, or who wrote them, counted from 1
    std::vector<int> registers_;                // of a warp's threads
    int free_registers_ = 0;
    std::vector<Fiber*> register_sleepers_;

private:
    static void entry();
    void start(uint3 index, bool held);
    void go();
    std::string report();
    void join(Group& group, int size, const char* name, bool same_line, Location at);
    void leave(Group& group);
    Fiber* next();
    uint64_t random();
    void transfer(Context& from, Fiber* to, bool last = false);
    std::string who_waits_where() const;

    std::vector<Fiber*> ready_;  // a ring
    size_t head_ = 0, count_ = 0;
    bool held_ = false, waited_ = false;  // for the kernel before: it has not ended; some thread has waited
    std::vector<Fiber*> held_sleepers_;
    uint64_t random_ = 0;
    Context main_;
    int live_ = 0;
    uint3 index_{};
    size_t capacity_ = 0;
    std::string error_;
};

// The block that this thread of the operating system runs.
Block& current();
std::string text(Location at);
// What ThreadSanitizer is told.
void sync_acquire(void* object);
void sync_release(void* object);

}  // namespace emulator
