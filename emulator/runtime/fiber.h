// Fibers: a stack and a place to go on from, and switching between two of them. Told to the sanitizers.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMULATOR_ASAN 1
#endif
#endif

#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT 1
#endif
#if defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace emulator {

struct Context {
    char* stack = nullptr;  // lowest address; of the thread's own context, known after the first switch
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's
    void* tsan = nullptr;        // ThreadSanitizer's fiber
#if defined(EMULATOR_UCONTEXT)
    ucontext_t state;
#else
    void* stack_pointer = nullptr;
#endif
};

// Lets `context` begin in `entry` on its stack. `entry` must call `switched` first, and never returns.
void prepare(Context& context, void (*entry)());

// Makes the running thread a context that fibers can switch back to.
void adopt(Context& context);

// Leaves `from` for `to`; returns when something switches back. `last`: nothing will.
void switch_to(Context& from, Context& to, bool last = false);

// On arrival in a fiber for the first time.
void switched(Context& context);

// Frees what the sanitizers hold for a fiber that will not run again.
void release(Context& context);

}  // namespace emulator
