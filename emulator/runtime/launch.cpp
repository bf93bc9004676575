// The table of kernels, and the launch of one by its name, as the driver does it: grid, block, shared memory, params.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <thread>

#include "cluster.h"

namespace emulator {

struct Kernel {
    size_t params_bytes;
    void (*run)(const void* params);
    int max_threads;
};

static std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> table;
    return table;
}

Registration::Registration(const char* name, size_t params_bytes, void (*run)(const void*), int max_threads, int) {
    kernels()[name] = {params_bytes, run, max_threads};
}

// A launch, and those of its clusters that have begun before the launches before it have ended.
struct Started {
    std::string kernel;
    std::vector<unsigned char> params;
    Launch launch;
    unsigned workers;
    std::vector<std::unique_ptr<Cluster>> early;

    unsigned columns() const { return launch.grid.x / launch.cluster; }
    uint64_t total() const { return uint64_t(columns()) * launch.grid.y * launch.grid.z; }
    // Its first block.
    uint3 first(uint64_t cluster) const {
        return {unsigned(cluster % columns()) * launch.cluster, unsigned(cluster / columns() % launch.grid.y), unsigned(cluster / columns() / launch.grid.y)};
    }
};

// As many as find room; the others begin later.
constexpr uint64_t kEarly = 8;

static std::string begin_clusters(Started& started) {
    for (uint64_t i = 0; i < std::min(kEarly, started.total()); ++i) {
        const std::string error = started.early.emplace_back(std::make_unique<Cluster>(started.launch))->begin(started.first(i));
        if (!error.empty()) return error;
    }
    return {};
}

// The clusters are independent; the report is that of the first one that fails, so it does not depend on their timing.
static std::string run_clusters(Started& started) {
    const uint64_t total = started.total(), early = started.early.size();
    for (const auto& cluster : started.early) {
        const std::string error = cluster->end();
        if (!error.empty()) return error;
    }
    std::atomic<uint64_t> next{early}, failed{total};
    std::mutex mutex;
    std::string report;
    const auto work = [&] {
        try {
            Cluster cluster(started.launch);
            for (uint64_t i; (i = next++) < total && i < failed;) {
                const std::string error = cluster.run(started.first(i));
                std::lock_guard lock(mutex);
                if (!error.empty() && i < failed) {
                    failed = i;
                    report = error;
                }
            }
        } catch (const std::exception& error) {
            std::lock_guard lock(mutex);
            failed = 0;
            report = error.what();
        }
    };
    std::vector<std::thread> others;
    for (unsigned i = 1; i < std::min<uint64_t>(started.workers, total - early); ++i) others.emplace_back(work);
    work();
    for (auto& other : others) other.join();
    return report;
}

// A launch and its mode, as src/lib.rs gives them.
struct Arguments {
    const char* kernel;
    const void* params;
    uint64_t params_bytes, seed;
    uint32_t grid[3], block[3];
    uint32_t shared_bytes, cluster, begins_early, early, early_products, workers;
};

// Makes the driver's checks, and the launch with a copy of the params.
static std::string look_up(const Arguments& arguments, Started& started) {
    const auto& [name, params, params_bytes, seed, g, b, shared_bytes, cluster, begins_early, early, early_products, workers] = arguments;
    const dim3 grid{g[0], g[1], g[2]}, block{b[0], b[1], b[2]};
    const auto found = kernels().find(name);
    if (found == kernels().end()) return "no such kernel";
    const Kernel& kernel = found->second;
    if (params_bytes != kernel.params_bytes)
        return "params of " + std::to_string(params_bytes) + " bytes, the kernel takes " + std::to_string(kernel.params_bytes);
    const uint64_t threads = uint64_t(block.x) * block.y * block.z;
    if (threads == 0 || threads % kWarp || threads > uint64_t(kernel.max_threads))
        return "a block of " + std::to_string(threads) + " threads; expected a multiple of 32, at most " + std::to_string(kernel.max_threads);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) return "a grid that no device has";
    if (cluster == 0 || cluster > 8) return "a cluster of " + std::to_string(cluster) + " blocks; 1 to 8 run on every device that has clusters";
    if (grid.x % cluster) return "a grid of " + std::to_string(grid.x) + " blocks along x is not one of clusters of " + std::to_string(cluster);
    if (shared_bytes > 227 * 1024) return std::to_string(shared_bytes) + " bytes of shared memory; a block has at most 227 KiB";
    started.kernel = name;
    started.workers = workers;
    started.params.resize(params_bytes + 63);
    auto* copy = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(started.params.data()) + 63) / 64 * 64);
    std::memcpy(copy, params, params_bytes);
    started.launch = {kernel.run, copy, grid, block, cluster, shared_bytes, begins_early != 0, {early != 0, early_products != 0, seed}};
    return {};
}

}  // namespace emulator

#define EXPORTED extern "C" __attribute__((visibility("default")))

// 0, or 1 with the reason in `error`, cut to `error_bytes`.
static int told(const std::string& kernel, const std::string& report, char* error, size_t error_bytes) {
    if (report.empty()) return 0;
    const std::string full = kernel + ": " + report;
    const size_t length = std::min(full.size(), error_bytes - 1);
    std::memcpy(error, full.data(), length);
    error[length] = 0;
    return 1;
}

// Begins a launch: if it `waits`, the first of its clusters, as far as they get before those before it have ended. Then
// there is a launch to end, or a reason in `error`.
EXPORTED emulator::Started* emulator_begin(const emulator::Arguments* arguments, int waits, char* error, size_t error_bytes) {
    auto started = std::make_unique<emulator::Started>();
    std::string report = emulator::look_up(*arguments, *started);
    if (report.empty() && waits) report = emulator::begin_clusters(*started);
    return told(arguments->kernel, report, error, error_bytes) ? nullptr : started.release();
}

// Runs the rest of a launch and waits for it, or, without `error`, gives it up. On the thread that began it.
EXPORTED int emulator_end(emulator::Started* begun, char* error, size_t error_bytes) {
    const std::unique_ptr<emulator::Started> started(begun);
    return error ? told(started->kernel, emulator::run_clusters(*started), error, error_bytes) : 0;
}

// The names of all kernels, one a line; the bytes needed, the final zero included.
EXPORTED size_t emulator_kernels(char* names, size_t bytes) {
    std::string all;
    for (const auto& [name, kernel] : emulator::kernels()) all += name + "\n";
    if (bytes > all.size()) std::memcpy(names, all.c_str(), all.size() + 1);
    return all.size() + 1;
}

// Bytes of a kernel's params, or 0 if there is no such kernel. The driver is told only their address.
EXPORTED size_t emulator_params_bytes(const char* kernel) {
    const auto found = emulator::kernels().find(kernel);
    return found == emulator::kernels().end() ? 0 : found->second.params_bytes;
}
