// The scheduler: runs the threads of a cluster's blocks as fibers until all have ended, or tells why they cannot.
#include "cluster.h"

constinit thread_local uint3 threadIdx{}, blockIdx{};
constinit thread_local dim3 blockDim{}, gridDim{};

namespace emulator {

static constinit thread_local Block* running = nullptr;

Block& current() { return *running; }

Cluster::Cluster(const Launch& launch) : launch_(launch), ready_(size_t(launch.threads()) * launch.cluster) {
    for (unsigned rank = 0; rank < launch.cluster; ++rank) blocks_.push_back(std::make_unique<Block>(launch, *this, rank));
}

std::string Cluster::run(uint3 first) {
    start(first, false);
    go();
    return report();
}

std::string Cluster::begin(uint3 first) {
    start(first, true);
    go();
    return error_.empty() && live_ > 0 && !held_sleepers_.empty() ? std::string() : report();
}

std::string Cluster::end() {
    held_ = false;
    for (Fiber* fiber : held_sleepers_) wake(*fiber);
    held_sleepers_.clear();
    go();
    return report();
}

// Sets up the blocks; no thread of them has run yet.
void Cluster::start(uint3 first, bool held) {
    error_.clear();
    live_ = int(ready_.size());
    head_ = count_ = 0;
    random_ = (launch_.mode.seed + 1) * 0x9E3779B97F4A7C15u ^ (uint64_t(first.z) << 42 ^ uint64_t(first.y) << 21 ^ first.x) * 0xBF58476D1CE4E5B9u;
    phase_ = 0;
    arrived_ = 0;
    sleepers_.clear();
    held_ = held;
    held_sleepers_.clear();
    loads_.clear();
    for (auto& block : blocks_) {
        block->begin({first.x + block->rank_, first.y, first.z});
        for (Fiber& fiber : block->fibers_) {
            prepare(fiber.context, entry);
            wake(fiber);
        }
    }
}

// Lets the threads run until none can, always on the same thread of the operating system.
void Cluster::go() {
    blockDim = launch_.block;
    gridDim = launch_.grid;
    adopt(main_);
    sync_release(this);
    transfer(main_, next());
    sync_acquire(this);
    running = nullptr;
}

// The error, once no thread can run.
std::string Cluster::report() {
    if (error_.empty() && live_ > 0) {
        for (const auto& block : blocks_)
            if (block->live_ > 0) error_ += (error_.empty() ? "" : "; ") + block->name() + "deadlock: " + block->who_waits_where();
    }
    if (error_.empty() && !loads_.empty()) error_ = blocks_[0]->name() + "a bulk copy into shared memory is in flight when the block ends";
    for (const auto& block : blocks_) error_ += block->end(!error_.empty());
    return error_;
}

// In a fiber: the kernel, for one thread.
void Cluster::entry() {
    Block& block = current();
    Fiber& self = *block.self_;
    Cluster& cluster = block.cluster_;
    switched(self.context);
    sync_acquire(&cluster);
    cluster.launch_.run(cluster.launch_.params);
    sync_release(&cluster);
    self.ended = true;
    --block.live_;
    --cluster.live_;
    if (self.arrived && self.arrived_in == cluster.phase_) --cluster.arrived_;
    cluster.settle();
    cluster.transfer(self.context, cluster.next(), true);
}

void Cluster::wake(Fiber& fiber) { ready_[(head_ + count_++) % ready_.size()] = &fiber; }

uint64_t Cluster::random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_;
}

// Who runs next: the first ready fiber, or with a seed any; with none, who waits for a load; at last, the scheduler.
Fiber* Cluster::next() {
    while (count_ == 0)
        if (live_ == 0 || !land()) return nullptr;
    if (launch_.mode.seed != 0) std::swap(ready_[head_], ready_[(head_ + random() % count_) % ready_.size()]);
    Fiber* fiber = ready_[head_];
    head_ = (head_ + 1) % ready_.size();
    --count_;
    return fiber;
}

void Cluster::transfer(Context& from, Fiber* to, bool last) {
    if (to) {
        if (running != to->block) {
            running = to->block;
            blockIdx = running->index_;
        }
        running->self_ = to;
        threadIdx = to->index;
        // A thread that waits for a load may be the first to run once it has landed: there is nowhere to go.
        if (&to->context == &from) return;
    }
    switch_to(from, to ? to->context : main_, last);
}

void Cluster::sleep(Fiber& self, const char* name, Location at) {
    self.waits_in = name;
    self.at = at;
    transfer(self.context, next());
    self.waits_in = nullptr;
}

void Cluster::fail(const std::string& report) {
    error_ = report;
    transfer(current().self_->context, nullptr, true);
    std::abort();  // nothing switches back into a cluster that has failed
}

void Cluster::start_load(std::function<void()> copy) {
    if (launch_.mode.early) copy();
    else loads_.push_back(std::move(copy));
}

// Lets one load land, whichever; false if there is none.
bool Cluster::land() {
    if (loads_.empty()) return false;
    const size_t which = launch_.mode.seed == 0 ? 0 : random() % loads_.size();
    const auto copy = std::move(loads_[which]);
    loads_.erase(loads_.begin() + ptrdiff_t(which));
    copy();
    return true;
}

void Cluster::arrive(Location at) {
    Fiber& self = *current().self_;
    if (self.arrived) current().fail("barrier.cluster.arrive twice without barrier.cluster.wait", at);
    self.arrived = true;
    self.arrived_in = phase_;
    ++arrived_;
    sync_release(this);
    settle();
}

void Cluster::wait(Location at) {
    Fiber& self = *current().self_;
    if (!self.arrived) current().fail("barrier.cluster.wait without barrier.cluster.arrive", at);
    if (self.arrived_in == phase_) {
        sleepers_.push_back(&self);
        sleep(self, "barrier.cluster.wait", at);
    }
    self.arrived = false;
    sync_acquire(this);
}

void Cluster::wait_for_grids(Location at) {
    if (!held_) return;
    Fiber& self = *current().self_;
    held_sleepers_.push_back(&self);
    sync_release(this);
    sleep(self, "griddepcontrol.wait", at);
    sync_acquire(this);
}

// A phase ends when all threads have arrived that have not ended.
void Cluster::settle() {
    if (arrived_ == 0 || arrived_ < live_) return;
    arrived_ = 0;
    ++phase_;
    for (Fiber* fiber : sleepers_) wake(*fiber);
    sleepers_.clear();
}

}  // namespace emulator
