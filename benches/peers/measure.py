"""Times, CPU time and peak memory of a run: what `benches/support/probe.rs` measures, in Python."""

import time

import torch


def status(name):
    """A line of /proc/self/status, in bytes; none where there is no such file."""
    try:
        with open("/proc/self/status") as lines:
            for line in lines:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def reset_peak():
    """Sets the peak of the resident memory to what is resident now; false where the system cannot."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def flush_cache(device):
    """Drives everything out of a GPU's L2 (50 MB on an H200), outside the measured time."""
    if device.type == "cuda":
        torch.empty(100 << 20, dtype=torch.uint8, device=device).zero_()
        torch.cuda.synchronize(device)


def timed(device, run):
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(device, reps, run):
    """Runs once, then `reps` times: the keys that `cases.rs` prints too."""
    on_gpu = device.type == "cuda"
    resident = torch.cuda.memory_allocated(device) if on_gpu else status("VmRSS") if reset_peak() else None
    peak = 0

    def timed_run():
        nonlocal peak
        flush_cache(device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        times = timed(device, run)
        if on_gpu:
            peak = max(peak, torch.cuda.max_memory_allocated(device))
        return times

    first, _ = timed_run()
    runs = [timed_run() for _ in range(reps)]
    if not on_gpu:
        peak = status("VmHWM")
    return {
        "first_s": first,
        "wall_s": [wall for wall, _ in runs],
        "cpu_s": [cpu for _, cpu in runs],
        "memory": max(peak - resident, 0) if resident is not None and peak is not None else None,
        "gpu_peak": peak if on_gpu else None,
    }
