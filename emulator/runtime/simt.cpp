// A block: its memory, and what its threads do together.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

#include "cluster.h"

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif
#if defined(EMULATOR_TSAN)
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#define ACQUIRE(p) __tsan_acquire(p)
#define RELEASE(p) __tsan_release(p)
#else
#define ACQUIRE(p) ((void)0)
#define RELEASE(p) ((void)0)
#endif

namespace emulator {

void sync_acquire([[maybe_unused]] void* object) { ACQUIRE(object); }
void sync_release([[maybe_unused]] void* object) { RELEASE(object); }

#if defined(EMULATOR_ASAN) || defined(EMULATOR_TSAN)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kPage = 4096;

// Stacks are kept from launch to launch, until the library is unloaded: the maps of a process are limited. The low end of a
// stack is a page that may not be touched.
static struct Stacks {
    std::mutex mutex;
    std::vector<char*> free;
    ~Stacks() {
        for (char* stack : free) munmap(stack - kPage, kPage + kStackBytes);
    }
} stacks;

static char* take_stack() {
    {
        std::lock_guard lock(stacks.mutex);
        if (!stacks.free.empty()) {
            char* stack = stacks.free.back();
            stacks.free.pop_back();
            return stack;
        }
    }
    void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPage, PROT_NONE);
    return static_cast<char*>(memory) + kPage;
}

Block::Block(const Launch& launch, Cluster& cluster, unsigned rank)
    : launch_(launch), cluster_(cluster), rank_(rank), threads_(launch.threads()), fibers_(threads_), warps_(threads_ / kWarp), warpgroups_((threads_ + 127) / 128), barriers_(16) {
    for (int i = 0; i < threads_; ++i) {
        fibers_[i].block = this;
        fibers_[i].rank = i;
        fibers_[i].context.stack = take_stack();
        fibers_[i].context.stack_bytes = kStackBytes;
    }
    // A tail of NaN behind the exact size, which nobody may write.
    capacity_ = (launch.shared_bytes + 1023) / 1024 * 1024 + 1024;
    shared_ = static_cast<unsigned char*>(std::aligned_alloc(1024, capacity_));
    if (!shared_) throw std::bad_alloc();
}

Block::~Block() {
    std::free(shared_);
    std::lock_guard lock(stacks.mutex);
    for (auto& fiber : fibers_) {
        release(fiber.context);
        stacks.free.push_back(fiber.context.stack);
    }
}

void Block::begin(uint3 index) {
    index_ = index;
    live_ = threads_;
    for (auto* groups : {&warps_, &warpgroups_, &barriers_})
        for (auto& group : *groups) group = {};
    mbarriers_.clear();
    products_.assign(warps_.size(), {});
    unfenced_.assign(capacity_ / 16, 0);
    // As many as there are for all, in steps of eight.
    registers_.assign(warps_.size(), std::min(255, (64 << 10) / threads_ / 8 * 8));
    free_registers_ = 0;
    register_sleepers_.clear();
    waited_ = false;
    std::memset(shared_, 0xFF, capacity_);
#if defined(EMULATOR_ASAN)
    __asan_poison_memory_region(shared_ + launch_.shared_bytes, capacity_ - launch_.shared_bytes);
#endif
    const dim3 size = launch_.block;
    for (Fiber& fiber : fibers_) {
        const unsigned rank = unsigned(fiber.rank);
        fiber.index = {rank % size.x, rank / size.x % size.y, rank / (size.x * size.y)};
        fiber.ended = false;
        fiber.waits_in = nullptr;
        fiber.open.clear();
        fiber.groups.clear();
        fiber.open_stores.clear();
        fiber.stores.clear();
        fiber.unfenced.clear();
        fiber.arrived = false;
    }
}

std::string Block::end(bool failed) {
#if defined(EMULATOR_ASAN)
    __asan_unpoison_memory_region(shared_, capacity_);
#endif
    if (failed) return {};
    if (launch_.begins_early && !waited_) return name() + "ends without griddepcontrol.wait, in a kernel that may begin before the one before it has ended";
    const std::string left = left_behind();
    if (!left.empty()) return name() + left;
    const auto* end = shared_ + capacity_;
    const auto* touched = std::find_if(shared_ + launch_.shared_bytes, const_cast<unsigned char*>(end), [](unsigned char byte) { return byte != 0xFF; });
    if (touched == end) return {};
    return name() + "wrote byte " + std::to_string(touched - shared_) + " of " + std::to_string(launch_.shared_bytes) + " bytes of shared memory";
}

std::string Block::name() const {
    char text[64];
    std::snprintf(text, sizeof text, "block (%u, %u, %u): ", index_.x, index_.y, index_.z);
    return text;
}

void Block::wake(Fiber& fiber) { cluster_.wake(fiber); }

void Block::sleep(const char* name, Location at) { cluster_.sleep(*self_, name, at); }

std::string text(Location at) {
    const char* slash = std::strrchr(at.file, '/');
    return std::string(slash ? slash + 1 : at.file) + ":" + std::to_string(at.line);
}

// "threads 0-31 wait in __syncthreads at x.cuh:12; threads 32-63 have ended"
std::string Block::who_waits_where() const {
    std::map<std::string, std::string> ranks;
    for (int first = 0, last; first < threads_; first = last + 1) {
        const auto state = [&](int rank) {
            const Fiber& fiber = fibers_[rank];
            return fiber.ended ? "have ended" : "wait in " + std::string(fiber.waits_in ? fiber.waits_in : "?") + " at " + text(fiber.at);
        };
        const std::string here = state(first);
        for (last = first; last + 1 < threads_ && state(last + 1) == here;) ++last;
        std::string& list = ranks[here];
        list += (list.empty() ? "threads " : ", ") + std::to_string(first) + (last > first ? "-" + std::to_string(last) : "");
    }
    std::string all;
    for (const auto& [state, list] : ranks) all += (all.empty() ? "" : "; ") + list + " " + state;
    return all;
}

void Block::fail(const std::string& what, Location at) {
    cluster_.fail(name() + "thread " + std::to_string(self_->rank) + " at " + text(at) + ": " + what);
}

// Literals: mostly one and the same.
static bool differ(const char* a, const char* b) { return a != b && std::strcmp(a, b) != 0; }

void Block::join(Group& group, int size, const char* name, bool same_line, Location at) {
    if (group.arrived == 0) {
        group.name = name;
        group.at = at;
        group.size = size;
    } else if (differ(group.name, name) || (same_line && (group.at.line != at.line || differ(group.at.file, at.file)))) {
        fail(std::string("divergence: reached ") + name + " while others of its group are in " + group.name + " at " + text(group.at), at);
    } else if (group.size != size) {
        fail(std::string(name) + " for " + std::to_string(size) + " threads, others say " + std::to_string(group.size) + " at " + text(group.at), at);
    }
    ++group.arrived;
    RELEASE(&group);
}

void Block::leave(Group& group) {
    group.arrived = 0;
    for (Fiber* fiber : group.sleepers) wake(*fiber);
    group.sleepers.clear();
    RELEASE(&group);
}

void Block::meet(Group& group, int slot, int size, const char* name, bool same_line, void* operands, Operation operation, Location at) {
    if (group.operands.size() < size_t(size)) group.operands.resize(size);
    group.operands[slot < 0 ? 0 : slot] = operands;
    join(group, size, name, same_line, at);
    if (group.arrived < size) {
        group.sleepers.push_back(self_);
        sleep(name, at);
    } else {
        ACQUIRE(&group);
        operation(group.operands.data());
        leave(group);
    }
    ACQUIRE(&group);
}

void Block::arrive(Group& group, int size, const char* name, Location at) {
    join(group, size, name, false, at);
    if (group.arrived == size) leave(group);
}

void meet_warp(const char* name, void* operands, Operation operation, Location at) {
    Block& block = current();
    block.meet(block.warps_[block.self_->rank / kWarp], lane(), kWarp, name, true, operands, operation, at);
}

void meet_barrier(const char* name, int id, int threads, Location at) {
    Block& block = current();
    if (threads > block.threads_) fail("a barrier for more threads than the block has", at);
    block.meet(block.barriers_[id], -1, threads ? threads : block.threads_, name, false, nullptr, [](void**) {}, at);
}

void wait_for_grids(Location at) {
    Block& block = current();
    block.cluster_.wait_for_grids(at);
    block.waited_ = true;
}

int lane() { return current().self_->rank % kWarp; }

unsigned char* shared_memory() { return current().shared_; }

void fail(const char* what, Location at) { current().fail(what, at); }

void check_shared(const char* name, const void* p, int bytes, Location at) {
    Block& block = current();
    const auto offset = static_cast<const unsigned char*>(p) - block.shared_;
    if (offset < 0 || offset + bytes > ptrdiff_t(block.launch_.shared_bytes))
        block.fail(std::string(name) + " touches byte " + std::to_string(offset) + " of " + std::to_string(block.launch_.shared_bytes) + " bytes of shared memory", at);
    if (offset % bytes) block.fail(std::string(name) + " wants an address aligned to " + std::to_string(bytes) + " bytes", at);
}

void copy_async(void* dst, const void* src, int bytes, bool valid, Move move, Location at) {
    Block& block = current();
    check_shared("cp.async", dst, bytes, at);
    if (valid && reinterpret_cast<uintptr_t>(src) % bytes) block.fail("cp.async wants an aligned source", at);
    if (block.launch_.mode.early) move(dst, src, valid);
    else block.self_->open.push_back({dst, src, valid, move});
}

void commit_copies() {
    Fiber& fiber = *current().self_;
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}

void wait_copies(int in_flight) {
    auto& groups = current().self_->groups;
    for (; int(groups.size()) > in_flight; groups.pop_front())
        for (const Copy& copy : groups.front()) copy.move(copy.dst, copy.src, copy.valid);
}

}  // namespace emulator
