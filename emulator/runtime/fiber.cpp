// Switching by twenty instructions of assembly on x86-64, by ucontext (five times slower) elsewhere.
#include "fiber.h"

#include <cstdint>

#if defined(EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATOR_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
}
#endif

namespace emulator {

// The context that is being left: whoever arrives tells AddressSanitizer what stack it had.
static constinit thread_local Context* leaving = nullptr;

#if !defined(EMULATOR_UCONTEXT)
extern "C" void emulator_switch(void** save, void* load);
// Saves what a call must preserve, on the stack; `prepare` lays out the same frame.
asm(R"(
.text
.local emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  subq $8, %rsp
  stmxcsr (%rsp)
  fnstcw 4(%rsp)
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  ldmxcsr (%rsp)
  fldcw 4(%rsp)
  addq $8, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
#endif

void prepare(Context& context, void (*entry)()) {
#if defined(EMULATOR_ASAN)
    __asan_unpoison_memory_region(context.stack, context.stack_bytes);
#endif
#if defined(EMULATOR_TSAN)
    if (!context.tsan) context.tsan = __tsan_create_fiber(0);
#endif
#if defined(EMULATOR_UCONTEXT)
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = context.stack;
    context.state.uc_stack.ss_size = context.stack_bytes;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
#else
    auto* top = reinterpret_cast<uint64_t*>(context.stack + context.stack_bytes);
    *--top = 0;  // the stack as after a call: 8 below a multiple of 16
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int i = 0; i < 6; ++i) *--top = 0;
    *--top = uint64_t(0x037F) << 32 | 0x1F80;  // the default floating-point control words
    context.stack_pointer = top;
#endif
}

void adopt([[maybe_unused]] Context& context) {
#if defined(EMULATOR_TSAN)
    context.tsan = __tsan_get_current_fiber();
#endif
}

void switch_to(Context& from, Context& to, [[maybe_unused]] bool last) {
    leaving = &from;
#if defined(EMULATOR_ASAN)
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(EMULATOR_TSAN)
    __tsan_switch_to_fiber(to.tsan, 1);  // 1: a switch orders nothing; only `meet` does
#endif
#if defined(EMULATOR_UCONTEXT)
    swapcontext(&from.state, &to.state);
#else
    emulator_switch(&from.stack_pointer, to.stack_pointer);
#endif
    switched(from);
}

void switched([[maybe_unused]] Context& context) {
#if defined(EMULATOR_ASAN)
    const void* stack;
    size_t bytes;
    __sanitizer_finish_switch_fiber(context.fake_stack, &stack, &bytes);
    leaving->stack = static_cast<char*>(const_cast<void*>(stack));
    leaving->stack_bytes = bytes;
#endif
}

void release([[maybe_unused]] Context& context) {
#if defined(EMULATOR_ASAN)
    __asan_unpoison_memory_region(context.stack, context.stack_bytes);  // may be unmapped, and become other memory
#endif
#if defined(EMULATOR_TSAN)
    if (context.tsan) __tsan_destroy_fiber(context.tsan);
#endif
}

}  // namespace emulator
