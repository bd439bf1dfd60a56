// Fibers: threads of a block that take turns on one CPU thread, the next one always chosen at random.
#include "runtime.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_OWN_SWITCH 1
#else  // ten times as slow
#define EMULATOR_OWN_SWITCH 0
#include <ucontext.h>
#endif

namespace emulator {

State state;

// ---- switching ------------------------------------------------------------------------------------------------------

#if EMULATOR_OWN_SWITCH
// Saves the registers that a call preserves and the stack pointer, and takes those of the other fiber.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
static void* fresh_stack(char* end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(end) - 2;  // `entry` starts as if called: 8 bytes off an alignment of 16
  *top = reinterpret_cast<void*>(entry);
  return top - 6;
}
#else
static void emulator_switch(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}
static void* fresh_stack(char* end, void (*entry)()) {
  auto* context = reinterpret_cast<ucontext_t*>(end - sizeof(ucontext_t) - 64);
  getcontext(context);
  context->uc_stack.ss_sp = end - stack_bytes;
  context->uc_stack.ss_size = stack_bytes - sizeof(ucontext_t) - 64;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

static char* stacks;
static int stack_count;
static size_t page() { return 4096; }

void allocate_stacks(int count) {
  if (count <= stack_count) return;
  free_stacks();
  const size_t bytes = stack_bytes + page();  // the lowest page of each is never touched without a fault
  void* memory = mmap(nullptr, bytes * count, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return;
  stacks = static_cast<char*>(memory);
  stack_count = count;
  for (int i = 0; i < count; ++i) mprotect(stacks + i * bytes, page(), PROT_NONE);
}
void free_stacks() {
  if (stacks != nullptr) munmap(stacks, (stack_bytes + page()) * stack_count);
  stacks = nullptr;
  stack_count = 0;
}

// ---- scheduling -----------------------------------------------------------------------------------------------------

static void* main_stack;
static void (*body)(void*);
static void* body_arguments;

uint64_t next_random() {  // xorshift64*
  uint64_t& x = state.random;
  x ^= x >> 12, x ^= x << 25, x ^= x >> 27;
  return x * 0x2545f4914f6cdd1dull >> 32;
}

void make_ready(int thread) {
  state.threads[thread].waits_for = nullptr;
  state.ready.push_back(thread);
}

static Thread* take_ready() {
  auto& ready = state.ready;
  const size_t i = next_random() % ready.size();
  Thread* next = &state.threads[ready[i]];
  ready[i] = ready.back();
  ready.pop_back();
  return next;
}

[[noreturn]] static void go_to_main() {
  void* unused;
  state.current = nullptr;
  emulator_switch(&unused, main_stack);
  __builtin_unreachable();
}

[[noreturn]] static void deadlock() {
  const Thread* first = nullptr;
  int waiting = 0;
  for (int i = 0; i < state.thread_count; ++i) {
    const Thread& thread = state.threads[i];
    if (thread.waits_for == nullptr) continue;
    ++waiting;
    if (first == nullptr) first = &thread;
  }
  std::string others;
  for (int i = 0; i < state.thread_count; ++i) {
    const Thread& thread = state.threads[i];
    if (thread.waits_for == nullptr || (thread.waits_for == first->waits_for && thread.waits_line == first->waits_line)) continue;
    others = "; thread " + std::to_string(i) + " at " + thread.waits_for + " of line " + std::to_string(thread.waits_line);
    break;
  }
  fail("deadlock: %d threads wait and %d have exited: thread %d at %s of line %d%s", waiting, state.exited_count,
       first->number, first->waits_for, first->waits_line, others.c_str());
}

static void give_way() {
  Thread* self = state.current;
  if (state.ready.empty()) deadlock();
  Thread* next = take_ready();
  self->accesses = 0;
  ++state.statistics.switches;
  if (next == self) return;
  state.current = next;
  emulator_switch(&self->stack_pointer, next->stack_pointer);
}

void wait_for(const char* what, int line) {
  Thread* self = state.current;
  self->waits_for = what;
  self->waits_line = line;
  give_way();
  self->waits_for = nullptr;
}

void let_others_run() {
  if (state.current == nullptr) return;
  state.ready.push_back(state.current->number);
  give_way();
}

static void thread_main() {
  body(body_arguments);
  Thread& self = *state.current;
  thread_exited(self);
  if (state.exited_count == state.thread_count) go_to_main();
  if (state.ready.empty()) deadlock();
  void* unused;
  state.current = take_ready();
  emulator_switch(&unused, state.current->stack_pointer);
  __builtin_unreachable();
}

// ---- faults ---------------------------------------------------------------------------------------------------------

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  const Thread* self = state.current;
  state.has_failed = true;
  state.error = message;
  if (self == nullptr) {
    fprintf(stderr, "emulator: %s\n", message);
    __builtin_trap();
  }
  char where[128];
  snprintf(where, sizeof where, " [thread (%u, %u, %u) of block (%u, %u, %u)]", self->index.x, self->index.y, self->index.z,
           state.block_index.x, state.block_index.y, state.block_index.z);
  state.error += where;
  go_to_main();
}

static sigjmp_buf crash_exit;

static void on_crash(int number, siginfo_t* info, void*) {
  const char* name = number == SIGSEGV ? "SIGSEGV" : number == SIGBUS ? "SIGBUS" : number == SIGFPE ? "SIGFPE" : "SIGILL";
  char message[256];
  const Thread* self = state.current;
  const char* address = static_cast<char*>(info->si_addr);
  const bool overflow = self != nullptr && address < self->stack_begin && address >= self->stack_begin - page();
  snprintf(message, sizeof message, "%s at address %p%s [thread %d of block (%u, %u, %u)]", name, info->si_addr,
           overflow ? ": the thread's stack is full" : "", self == nullptr ? -1 : self->number, state.block_index.x,
           state.block_index.y, state.block_index.z);
  state.error = message;
  state.has_failed = true;
  siglongjmp(crash_exit, 1);
}

static const int crash_signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

void run_block(void (*call)(void*), void* arguments) {
  body = call;
  body_arguments = arguments;
  const size_t bytes = stack_bytes + page();
  state.ready.clear();
  for (int i = 0; i < state.thread_count; ++i) {
    Thread& thread = state.threads[i];
    thread.stack_begin = stacks + i * bytes + page();
    thread.stack_end = thread.stack_begin + stack_bytes;
    thread.stack_pointer = fresh_stack(thread.stack_end, thread_main);
    thread.exited = false;
    thread.accesses = 0;
    make_ready(i);
  }
  state.exited_count = 0;

  static char signal_stack[64 << 10];
  stack_t own{}, previous_stack{};
  own.ss_sp = signal_stack;
  own.ss_size = sizeof signal_stack;
  sigaltstack(&own, &previous_stack);
  struct sigaction action{}, previous[4];
  action.sa_sigaction = on_crash;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int i = 0; i < 4; ++i) sigaction(crash_signals[i], &action, &previous[i]);
  if (sigsetjmp(crash_exit, 1) == 0) {
    state.current = take_ready();
    emulator_switch(&main_stack, state.current->stack_pointer);
  }
  state.current = nullptr;
  for (int i = 0; i < 4; ++i) sigaction(crash_signals[i], &previous[i], nullptr);
  sigaltstack(&previous_stack, nullptr);
}

// ---- what a thread knows of itself ----------------------------------------------------------------------------------

uint3 thread_index() { return state.current->index; }
uint3 block_index() { return state.block_index; }
uint3 block_size() { return {state.block_size.x, state.block_size.y, state.block_size.z}; }
uint3 grid_size() { return {state.grid_size.x, state.grid_size.y, state.grid_size.z}; }
unsigned lane_index() { return unsigned(state.current->lane); }

}  // namespace emulator
