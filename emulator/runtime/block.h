// A block of threads: its fibers, whom they wait for, and its shared memory.
#pragma once
#include <deque>
#include <string>
#include <vector>

#include "emulator/simt.h"
#include "fiber.h"

namespace emulator {

// How the freedoms that the rules leave are used; a right kernel gives the same result for all of them.
struct Mode {
    bool early;     // asynchronous copies land when issued, else when waited for
    uint64_t seed;  // 0: threads run in turn; else any ready one, by this seed
};

struct Launch {
    void (*run)(const void* params);
    const void* params;
    dim3 grid, block;
    size_t shared_bytes;
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
};

// Threads that do something together.
struct Group {
    int arrived = 0;
    const char* name = nullptr;
    Location at{};
    std::vector<void*> operands;
    std::vector<Fiber*> sleepers;
};

struct Block {
    explicit Block(const Launch& launch);
    ~Block();

    // Runs the block with this index; what went wrong, or nothing.
    std::string run(uint3 index);

    void meet(Group& group, int slot, int size, const char* name, bool same_line, void* operands, Operation operation, Location at);
    [[noreturn]] void fail(const std::string& what, Location at);

    const Launch& launch_;
    int threads_;
    std::vector<Fiber> fibers_;
    std::vector<Group> warps_, barriers_;
    Fiber* self_ = nullptr;
    unsigned char* shared_ = nullptr;

private:
    static void entry();
    void wake(Fiber& fiber);
    Fiber* next();
    void transfer(Context& from, Fiber* to, bool last = false);
    void sleep(const char* name, Location at);
    std::string who_waits_where() const;

    std::vector<Fiber*> ready_;  // a ring
    size_t head_ = 0, count_ = 0;
    uint64_t random_ = 0;
    Context main_;
    int live_ = 0;
    uint3 index_{};
    size_t capacity_ = 0;
    std::string error_;
};

}  // namespace emulator
