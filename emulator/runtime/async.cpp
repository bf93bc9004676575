// Hopper's asynchronous machine, from the PTX ISA: mbarriers, bulk copies of bytes and of tensors' tiles (TMA). It
// decodes the products of warpgroups (wgmma) from the bits of their descriptors.
//
// Late: a load lands when no thread can run without it, a store when it is waited for, a product when it is waited for.
// Early: at once. Copies and products have modes of their own.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "cluster.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator/async.h"

#if defined(__clang__)
#define UNCHECKED __attribute__((no_sanitize("address", "undefined")))
#else
#define UNCHECKED __attribute__((no_sanitize_address, no_sanitize_undefined))
#endif

namespace emulator {

static constexpr uint64_t kCookie = 0x6D62617272696572u;

// --- shared memory, by offsets -------------------------------------------------------------------------------------

static uint32_t offset_of(const char* name, const void* p, uint64_t bytes, uint32_t alignment, Location at) {
    Block& block = current();
    const auto offset = static_cast<const unsigned char*>(p) - block.shared_;
    if (offset < 0 || uint64_t(offset) + bytes > block.launch_.shared_bytes)
        block.fail(std::string(name) + " touches byte " + std::to_string(offset) + " of " + std::to_string(block.launch_.shared_bytes) + " bytes of shared memory", at);
    if (offset % alignment) block.fail(std::string(name) + " wants an address aligned to " + std::to_string(alignment) + " bytes", at);
    return uint32_t(offset);
}

// Four address bits are exchanged within 128, 64 or 32 bytes of a row by the row.
static uint32_t swizzled(uint32_t offset, uint32_t swizzle) {
    return offset ^ ((offset >> 7 & (swizzle / 16 - (swizzle != 0))) << 4);
}

void note_generic_write(const void* p, int bytes) {
    Block& block = current();
    const auto first = static_cast<const unsigned char*>(p) - block.shared_;
    for (auto unit = first / 16; unit <= (first + bytes - 1) / 16; ++unit) {
        block.unfenced_[unit] = uint16_t(block.self_->rank + 1);
        block.self_->unfenced.push_back(uint32_t(unit));
    }
}

void fence_proxy_async() {
    Block& block = current();
    Fiber& self = *block.self_;
    for (const uint32_t unit : self.unfenced)
        if (block.unfenced_[unit] == self.rank + 1) block.unfenced_[unit] = 0;
    self.unfenced.clear();
}

static void check_fenced(const char* name, uint32_t offset, uint32_t bytes, Location at) {
    Block& block = current();
    for (uint32_t unit = offset / 16; unit < (offset + bytes + 15) / 16; ++unit)
        if (const int writer = block.unfenced_[unit])
            block.fail(std::string(name) + " reads byte " + std::to_string(16 * unit) + " of shared memory, which thread " + std::to_string(writer - 1) + " wrote without fence.proxy.async after it", at);
}

// --- mbarrier ----------------------------------------------------------------------------------------------------------

// The barrier at this place, or at the same place of another block of the cluster.
static Mbarrier& mbarrier_at(const char* name, Block& block, uint32_t offset, Location at) {
    const bool other = &block != &current();
    const std::string whose = other ? " of block " + std::to_string(block.rank_) + " of the cluster" : "";
    if (other && block.live_ == 0) current().fail(std::string(name) + " on a barrier" + whose + ", which has ended", at);
    const auto found = block.mbarriers_.find(offset);
    if (other && (found == block.mbarriers_.end() || found->second.made == block.cluster_.phase_))
        current().fail(std::string(name) + " on a barrier" + whose + " without a barrier of the cluster after its mbarrier.init", at);
    if (other && current().self_->arrived)
        current().fail(std::string(name) + " on a barrier" + whose + " between barrier.cluster.arrive and wait, which orders nothing", at);
    if (found == block.mbarriers_.end()) current().fail(std::string(name) + " on a barrier that nobody has initialised", at);
    uint64_t cookie;
    std::memcpy(&cookie, block.shared_ + offset, 8);
    if (cookie != (kCookie ^ offset)) current().fail(std::string(name) + " on a barrier" + whose + " that has been overwritten", at);
    return found->second;
}

static Mbarrier& mbarrier_at(const char* name, const void* bar, Location at) {
    return mbarrier_at(name, current(), offset_of(name, bar, 8, 8, at), at);
}

// One that the engine or another block uses.
static Mbarrier& fenced_barrier(const char* name, Block& block, const void* bar, Location at) {
    Mbarrier& barrier = mbarrier_at(name, block, offset_of(name, bar, 8, 8, at), at);
    if (!barrier.fenced) current().fail(std::string(name) + " on a barrier without fence.mbarrier_init after its mbarrier.init", at);
    return barrier;
}

static void settle(Mbarrier& bar) {
    if (bar.pending != 0 || bar.bytes != 0) return;
    bar.pending = bar.arrivals;
    bar.parity ^= 1;
    bar.unseen |= bar.visited;
    bar.visited = false;
    for (Fiber* fiber : bar.sleepers) current().wake(*fiber);
    bar.sleepers.clear();
}

void mbarrier_init(void* bar, uint32_t arrivals, Location at) {
    Block& block = current();
    const uint32_t offset = offset_of("mbarrier.init", bar, 8, 8, at);
    if (arrivals == 0 || arrivals >= 1u << 20) block.fail("mbarrier.init wants 1 to 2^20 - 1 arrivals", at);
    if (block.mbarriers_.contains(offset)) block.fail("mbarrier.init on a barrier that is in use", at);
    const uint64_t cookie = kCookie ^ offset;
    std::memcpy(bar, &cookie, 8);
    block.mbarriers_[offset] = {arrivals, arrivals, 0, 0, false, block.self_->rank, at, block.cluster_.phase_};
}

void fence_mbarrier_init() {
    Block& block = current();
    for (auto& [offset, bar] : block.mbarriers_)
        if (bar.owner == block.self_->rank) bar.fenced = true;
}

static void arrive(Mbarrier& bar, Location at) {
    if (bar.pending == 0) current().fail("more arrivals at a phase of a barrier than mbarrier.init gave", at);
    sync_release(&bar);
    --bar.pending;
    settle(bar);
}

void mbarrier_arrive(void* at_bar, int64_t expected_bytes, Location at) {
    const char* name = expected_bytes ? "mbarrier.arrive.expect_tx" : "mbarrier.arrive";
    Mbarrier& bar = mbarrier_at(name, at_bar, at);
    bar.bytes += expected_bytes;
    if (bar.bytes >= 1 << 20) current().fail("a barrier cannot expect 2^20 bytes", at);
    arrive(bar, at);
}

static Block& block_of_cluster(const char* name, uint32_t rank, Location at) {
    Block& self = current();
    if (rank >= self.launch_.cluster) self.fail(std::string(name) + " names block " + std::to_string(rank) + " of a cluster of " + std::to_string(self.launch_.cluster), at);
    return *self.cluster_.blocks_[rank];
}

void mbarrier_arrive_cluster(void* at_bar, uint32_t rank, Location at) {
    const char* name = "mbarrier.arrive.shared::cluster";
    Block& block = block_of_cluster(name, rank, at);
    Mbarrier& bar = fenced_barrier(name, block, at_bar, at);
    bar.visited |= &block != &current();
    arrive(bar, at);
}

void mbarrier_wait(void* at_bar, uint32_t parity, Location at) {
    Mbarrier& bar = mbarrier_at("mbarrier.try_wait", at_bar, at);
    if (parity > 1) current().fail("mbarrier.try_wait wants the parity 0 or 1", at);
    while (bar.parity == parity) {
        bar.sleepers.push_back(current().self_);
        current().sleep("mbarrier.try_wait", at);
    }
    bar.unseen = false;
    sync_acquire(&bar);
}

static void complete(Mbarrier& bar, uint32_t bytes) {
    bar.bytes -= bytes;
    sync_release(&bar);
    settle(bar);
}

// --- copies ------------------------------------------------------------------------------------------------------------

void check_tensor_map(const void* map, int rank, Location at) {
    TensorMap m;
    std::memcpy(&m, map, sizeof m);
    Block& block = current();
    if (reinterpret_cast<uintptr_t>(map) % 64) block.fail("a tensor map wants an address aligned to 64 bytes", at);
    if (m.magic != kTensorMapMagic) block.fail("this is no tensor map", at);
    if (rank != 0 && int(m.rank) != rank) block.fail(std::to_string(rank) + " coordinates for a tensor map of rank " + std::to_string(m.rank), at);
}

// Calls move(offset in the box, address or null outside of the tensor) for each element of the box.
template <class Move> static void for_box(const TensorMap& m, const int* coordinates, Move move) {
    uint32_t index[5] = {}, offset = 0;
    for (;; offset += m.element_bytes) {
        uint64_t address = m.address;
        bool inside = true;
        for (uint32_t d = 0; d < m.rank; ++d) {
            const int64_t at = int64_t(coordinates[d]) + index[d];
            inside = inside && at >= 0 && at < int64_t(m.dims[d]);
            address += uint64_t(at) * (d ? m.strides[d - 1] : m.element_bytes);
        }
        move(offset, inside ? reinterpret_cast<unsigned char*>(address) : nullptr);
        uint32_t d = 0;
        while (d < m.rank && ++index[d] == m.box[d]) index[d++] = 0;
        if (d == m.rank) return;
    }
}

struct TileCopy {
    TensorMap map;
    uint32_t offset, bytes;
    int coordinates[5];
};

static TileCopy tile_copy(const char* name, const void* shared, const void* map, const int* coordinates, int rank, Location at) {
    check_tensor_map(map, rank, at);
    TileCopy copy{};
    std::memcpy(&copy.map, map, sizeof copy.map);
    copy.bytes = copy.map.element_bytes;
    for (int d = 0; d < rank; ++d) copy.bytes *= copy.map.box[d];
    std::copy_n(coordinates, rank, copy.coordinates);
    // A swizzled pattern repeats after eight rows.
    const uint32_t alignment = std::max(128u, 8 * copy.map.swizzle);
    copy.offset = offset_of(name, shared, copy.bytes, alignment, at);
    return copy;
}

// Into this block's shared memory, or to the same places of the blocks that the mask names.
void tensor_load(void* dst, const void* map, void* bar, const int* coordinates, int rank, const uint16_t* mask, Location at) {
    const char* name = mask ? "cp.async.bulk.tensor.multicast::cluster" : "cp.async.bulk.tensor";
    Block& self = current();
    const TileCopy copy = tile_copy(name, dst, map, coordinates, rank, at);
    const uint32_t blocks = mask ? *mask : 1u << self.rank_;
    if (blocks == 0) self.fail(std::string(name) + " for no block", at);
    for (uint32_t to = 0; blocks >> to; ++to) {
        if ((blocks >> to & 1) == 0) continue;
        Block& block = block_of_cluster(name, to, at);
        Mbarrier& barrier = fenced_barrier(name, block, bar, at);
        const bool other = &block != &self;
        self.cluster_.start_load([&block, &barrier, other, copy, at] {
            if (block.live_ == 0) block.cluster_.fail(block.name() + "a bulk copy issued at " + text(at) + " lands in a block that has ended");
            for_box(copy.map, copy.coordinates, [&](uint32_t offset, const unsigned char* from) {
                uint32_t bits = 0;
                if (from) std::memcpy(&bits, from, copy.map.element_bytes);
                const float value = std::bit_cast<float>(bits);
                if (copy.map.round_tf32 && std::isfinite(value)) bits = (bits + 0x1000u) & 0xFFFFE000u;
                std::memcpy(block.shared_ + swizzled(copy.offset + offset, copy.map.swizzle), &bits, copy.map.element_bytes);
            });
            barrier.visited |= other;
            complete(barrier, copy.bytes);
        });
    }
}

void tensor_store(const void* map, const void* src, const int* coordinates, int rank, Location at) {
    const char* name = "cp.async.bulk.tensor";
    const TileCopy copy = tile_copy(name, src, map, coordinates, rank, at);
    check_fenced(name, copy.offset, copy.bytes, at);
    Block& block = current();
    block.start_store([&block, copy] {
        for_box(copy.map, copy.coordinates, [&](uint32_t offset, unsigned char* to) {
            if (to) std::memcpy(to, block.shared_ + swizzled(copy.offset + offset, copy.map.swizzle), copy.map.element_bytes);
        });
    }, at);
}

static void check_bulk(const char* name, const void* global, uint32_t bytes, Location at) {
    if (bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16) current().fail(std::string(name) + " wants multiples of 16 bytes at aligned addresses", at);
}

void bulk_load(void* dst, const void* src, uint32_t bytes, void* bar, Location at) {
    Mbarrier& barrier = fenced_barrier("cp.async.bulk", current(), bar, at);
    check_bulk("cp.async.bulk", src, bytes, at);
    offset_of("cp.async.bulk", dst, bytes, 16, at);
    current().cluster_.start_load([=, &barrier] {
        std::memcpy(dst, src, bytes);
        complete(barrier, bytes);
    });
}

void bulk_store(void* dst, const void* src, uint32_t bytes, Location at) {
    check_bulk("cp.async.bulk", dst, bytes, at);
    check_fenced("cp.async.bulk", offset_of("cp.async.bulk", src, bytes, 16, at), bytes, at);
    current().start_store([=] { std::memcpy(dst, src, bytes); }, at);
}

void Block::start_store(std::function<void()> copy, Location at) {
    self_->store_at = at;
    if (launch_.mode.early) copy();
    self_->open_stores.push_back(launch_.mode.early ? [] {} : std::move(copy));
}

void commit_bulk() {
    Fiber& self = *current().self_;
    self.stores.push_back(std::move(self.open_stores));
    self.open_stores.clear();
}

void wait_bulk(int in_flight) {
    auto& groups = current().self_->stores;
    for (; int(groups.size()) > in_flight; groups.pop_front())
        for (const auto& copy : groups.front()) copy();
}

// Names work that a block must not leave behind when its shared memory is given to another.
std::string Block::left_behind() const {
    for (const auto& [offset, bar] : mbarriers_) {
        if (bar.bytes != 0)
            return "the barrier initialised at " + text(bar.at) + " ends with " + std::to_string(bar.bytes) + " bytes more expected than have come";
        if (bar.visited || bar.unseen)
            return "has ended while others of its cluster may still arrive at the barrier initialised at " + text(bar.at) + ": nobody has waited for that";
    }
    const auto some = [](const auto& group) { return !group.empty(); };
    for (size_t warp = 0; warp < products_.size(); ++warp)
        if (some(products_[warp].open) || std::ranges::any_of(products_[warp].groups, some)) return "warp " + std::to_string(warp) + " ends without waiting for its wgmma";
    for (const Fiber& fiber : fibers_)
        if (!fiber.stores.empty() || !fiber.open_stores.empty())
            return "thread " + std::to_string(fiber.rank) + " ends without waiting for its bulk store at " + text(fiber.store_at);
    return {};
}

// --- wgmma -------------------------------------------------------------------------------------------------------------

// A matrix in shared memory as its descriptor says: where the 16 bytes lie that hold element (mn, k) and those after it.
struct Matrix {
    uint32_t start, leading, stride, swizzle;
    bool trans;  // mn innermost

    static Matrix decode(uint64_t bits, bool trans, Location at) {
        constexpr uint64_t kUnused = ~(0x3FFFull | 0x3FFFull << 16 | 0x3FFFull << 32 | 7ull << 49 | 3ull << 62);
        if (bits & kUnused) current().fail("a wgmma descriptor with bits that have no meaning", at);
        if (bits >> 49 & 7) current().fail("a wgmma descriptor with a base offset: not emulated", at);
        constexpr uint32_t kSwizzle[] = {0, 128, 64, 32};
        Matrix m{uint32_t(bits & 0x3FFF) << 4, uint32_t(bits >> 16 & 0x3FFF) << 4, uint32_t(bits >> 32 & 0x3FFF) << 4, kSwizzle[bits >> 62], trans};
        if (m.start & (8 * m.swizzle - 1) & ~(m.swizzle - 1) && m.swizzle) current().fail("a wgmma descriptor that starts within a swizzled pattern of eight rows", at);
        return m;
    }

    // `chunk` counts 16 bytes along the innermost dimension, `row` elements along the other one.
    uint32_t at(uint32_t chunk, uint32_t row) const {
        const uint32_t span = swizzle ? swizzle / 16 : 1;
        const uint32_t row_bytes = 16 * span;
        uint32_t linear = start + row % 8 * row_bytes + chunk % span * 16;
        if (trans && !swizzle) linear += chunk * stride + row / 8 * leading;
        else linear += chunk / span * leading + row / 8 * stride;
        return swizzled(linear, swizzle);
    }
};

static const unsigned char* chunk_at(const char* what, const Matrix& m, uint32_t chunk, uint32_t row, Location at) {
    Block& block = current();
    const uint32_t offset = m.at(chunk, row);
    if (offset + 16 > block.launch_.shared_bytes) block.fail(std::string("wgmma reads ") + what + " at byte " + std::to_string(offset) + " of " + std::to_string(block.launch_.shared_bytes) + " bytes of shared memory", at);
    if (block.unfenced_[offset / 16]) check_fenced("wgmma", offset, 16, at);
    return block.shared_ + offset;
}

static float element(const unsigned char* chunk, int index, Operand type) {
    if (type == Operand::tf32) {
        uint32_t bits;
        std::memcpy(&bits, chunk + 4 * index, 4);
        return std::bit_cast<float>(bits & 0xFFFFE000u);
    }
    uint16_t bits;
    std::memcpy(&bits, chunk + 2 * index, 2);
    return type == Operand::f16 ? __half2float({bits}) : __bfloat162float({bits});
}

// Rows first .. first + count of the matrix, of one instruction's depth: out[k][i], or out[i][k].
template <class Set> static void read(const char* what, const Matrix& m, uint32_t first, uint32_t count, Operand type, Location at, Set set) {
    const uint32_t per_chunk = type == Operand::tf32 ? 4 : 8, depth = type == Operand::tf32 ? 8 : 16;
    if (!m.trans) {
        for (uint32_t i = 0; i < count; ++i)
            for (uint32_t chunk = 0; chunk < 2; ++chunk) {
                const unsigned char* bytes = chunk_at(what, m, chunk, first + i, at);
                for (uint32_t e = 0; e < per_chunk; ++e) set(i, chunk * per_chunk + e, element(bytes, int(e), type));
            }
    } else {
        for (uint32_t k = 0; k < depth; ++k)
            for (uint32_t i = 0; i < count; i += per_chunk) {
                const unsigned char* bytes = chunk_at(what, m, (first + i) / per_chunk, k, at);
                for (uint32_t e = 0; e < per_chunk; ++e) set(i + e, k, element(bytes, int(e), type));
            }
    }
}

UNCHECKED static void multiply(float (&d)[16][256], const float (&a)[16][16], const float (&b)[16][256], int depth, int n) {
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < depth; ++k)
            for (int j = 0; j < n; ++j) d[m][j] += a[m][k] * b[k][j];
}

// One warp's 16 rows.
static void perform(const Product& p) {
    static thread_local float a[16][16], b[16][256], d[16][256];
    const int depth = p.type == Operand::tf32 ? 8 : 16;
    if (p.from_registers) {
        for (int l = 0; l < 32; ++l)
            for (int i = 0; i < 4; ++i) {
                const uint32_t word = p.a_registers[l][i];
                unsigned char bytes[4];
                std::memcpy(bytes, &word, 4);
                if (p.type == Operand::tf32) a[l / 4 + 8 * (i % 2)][l % 4 + 4 * (i / 2)] = element(bytes, 0, p.type);
                else
                    for (int h = 0; h < 2; ++h) a[l / 4 + 8 * (i % 2)][2 * (l % 4) + h + 8 * (i / 2)] = element(bytes, h, p.type);
            }
    } else {
        const Matrix left = Matrix::decode(p.a, p.trans_a, p.at);
        read("a", left, 16 * p.quarter, 16, p.type, p.at, [](uint32_t i, uint32_t k, float x) { a[i][k] = x; });
    }
    const Matrix right = Matrix::decode(p.b, p.trans_b, p.at);
    read("b", right, 0, uint32_t(p.n), p.type, p.at, [](uint32_t j, uint32_t k, float x) { b[k][j] = x; });
    for (auto& row : d) std::fill_n(row, p.n, 0.0f);
    multiply(d, a, b, depth, p.n);
    for (int l = 0; l < 32; ++l)
        for (int i = 0; i < p.n / 2; ++i) {
            float& to = p.d[l][i];
            to = (p.scale_d ? to : 0.0f) + d[l / 4 + 8 * (i / 2 % 2)][8 * (i / 4) + 2 * (l % 4) + i % 2];
        }
}

static WarpProducts& products() {
    Block& block = current();
    return block.products_[size_t(block.self_->rank / kWarp)];
}

void wgmma(Wgmma& operands, Location at) {
    Block& block = current();
    const int warpgroup = block.self_->rank / 128;
    if (128 * (warpgroup + 1) > block.threads_) block.fail("wgmma wants whole warpgroups of 128 threads", at);
    if (!products().fenced) block.fail("wgmma without wgmma.fence since the last wait, or at all", at);
    operands.at = at;
    block.meet(block.warpgroups_[size_t(warpgroup)], block.self_->rank % 128, 128, "wgmma.mma_async", true, &operands, [](void** p) {
        Block& block = current();
        const Wgmma& first = *static_cast<Wgmma*>(p[0]);
        for (uint32_t warp = 0; warp < 4; ++warp) {
            Product product{first.type, first.n, {}, {}, first.a_registers != nullptr, first.a, first.b, first.scale_d, first.trans_a, first.trans_b, warp, first.at};
            for (int l = 0; l < kWarp; ++l) {
                const Wgmma& lane = *static_cast<Wgmma*>(p[warp * kWarp + uint32_t(l)]);
                if (lane.a != first.a || lane.b != first.b || lane.scale_d != first.scale_d) block.fail("the threads of a warpgroup give wgmma different descriptors", first.at);
                product.d[l] = lane.d;
                product.a_registers[l] = lane.a_registers;
            }
            if (block.launch_.mode.early_products) perform(product);
            else block.products_[size_t(block.self_->rank / 128 * 4) + warp].open.push_back(product);
        }
    }, at);
}

void wgmma_fence(Location at) {
    meet_warp("wgmma.fence", nullptr, [](void**) { products().fenced = true; }, at);
}

void wgmma_commit(Location at) {
    meet_warp("wgmma.commit_group", nullptr, [](void**) {
        auto& mine = products();
        mine.groups.push_back(std::move(mine.open));
        mine.open.clear();
    }, at);
}

// Each warp waits for its own rows: another one's may be due later.
void wgmma_wait(int in_flight, Location at) {
    meet_warp("wgmma.wait_group", &in_flight, [](void** p) {
        auto& mine = products();
        mine.fenced = false;
        for (; int(mine.groups.size()) > *static_cast<int*>(p[0]); mine.groups.pop_front())
            for (const Product& product : mine.groups.front()) perform(product);
    }, at);
}

// --- registers and barriers --------------------------------------------------------------------------------------------

void set_registers(int count, bool increase, Location at) {
    Block& block = current();
    if (count % 8 || count < 24 || count > 256) block.fail("setmaxnreg wants a multiple of 8 from 24 to 256", at);
    const size_t warp = size_t(block.self_->rank / kWarp);
    struct Change {
        int count;
        bool increase;
    } change{count, increase};
    meet_warp("setmaxnreg", &change, [](void**) {}, at);
    if (lane() == 0) {
        const int more = count - block.registers_[warp];
        // A kernel starts with no more than it asks for at most, so an increase may be none.
        if (!increase && more > 0) block.fail("setmaxnreg.dec from " + std::to_string(block.registers_[warp]) + " to " + std::to_string(count) + " registers", at);
        while (block.free_registers_ < more * kWarp) {
            block.register_sleepers_.push_back(block.self_);
            block.sleep("setmaxnreg.inc", at);
        }
        block.free_registers_ -= more * kWarp;
        block.registers_[warp] = count;
        for (Fiber* fiber : block.register_sleepers_) block.wake(*fiber);
        block.register_sleepers_.clear();
    }
    meet_warp("setmaxnreg", nullptr, [](void**) {}, at);
}

void cluster_arrive(Location at) { current().cluster_.arrive(at); }
void cluster_wait(Location at) { current().cluster_.wait(at); }
uint32_t cluster_rank() { return current().rank_; }

void arrive_barrier(int id, int threads, Location at) {
    Block& block = current();
    if (threads > block.threads_) fail("a barrier for more threads than the block has", at);
    block.arrive(block.barriers_[size_t(id)], threads, "bar.sync", at);
}

}  // namespace emulator
