// The fibers, the memory checker and the sanitizer hooks behind emulator.h. Compiled without -fsanitize=thread.
#include "emulator.h"

#include <link.h>
#include <pthread.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "emulator_core.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarp = 32;

// The stand-in headers make __shared__ variables thread-local, so that they lie together: in this library's block of
// thread-local memory. The anchor is there to find it.
thread_local char anchor[16];

// ---------------------------------------------------------------------------------------------------------- memory

// When and by whom a byte was touched. Two touches are ordered if a block barrier, a warp barrier of their common warp, or an
// arrival and a wait at an mbarrier or a named barrier lie between them; touches of different blocks never are. An arrival is
// taken for one of the whole warp.
struct Touch {
  uint32_t block = 0;  // counted through all launches, from 1; 0: never
  uint32_t thread = 0, barriers = 0, warp_barriers = 0, time = 0;
};

// Of the reads since the last write, those of the two latest distinct threads are enough: a third is a hazard exactly
// when one of these two is, unless warp barriers order them differently.
struct Byte {
  Touch write, read, other_read;
};

// Of so many bytes. They are many times larger themselves, so only those that are touched get memory: zero, as a new Byte is.
std::unique_ptr<Byte[], void (*)(void*)> histories(size_t bytes) {
  return {static_cast<Byte*>(std::calloc(bytes, sizeof(Byte))), std::free};
}

struct Buffer {
  const char* begin;
  size_t bytes;
  bool writable;
  bool shared;
  std::string name;
  Byte* history;  // of its bytes; writable buffers only
  bool contains(const char* p, size_t n) const { return p >= begin && p + n <= begin + bytes; }
};

std::vector<Buffer> buffers;     // global memory
std::vector<Buffer> shared_now;  // of the running block: static variables, dynamic array
std::vector<decltype(histories(0))> global_histories, shared_histories;
std::vector<char> dynamic_memory;

// --------------------------------------------------------------------------------------------------------- threads

enum class State { kReady, kAtBarrier, kAtExchange, kWaiting, kDone };

struct Exchange;

struct Pending {
  void* shared;
  const void* global;
  size_t bytes, valid;
};

struct Thread {
  ucontext_t start;  // where its stack begins
  jmp_buf place;     // and where it is, once started
  bool started;
  char* stack;
  State state;
  dim3 index;
  uint32_t linear, barriers, warp_barriers;
  std::shared_ptr<Exchange> result;
  uint64_t waiting_since;  // kWaiting: the progress there was, and what for
  std::string waiting_for;
  std::vector<std::vector<Pending>> copies;  // groups, the last one still open
  void* fake_stack;                          // AddressSanitizer's, while switched out
};

// A warp-wide operation that lanes are arriving at.
struct Exchange {
  unsigned mask, arrived = 0;
  size_t bytes;
  bool barrier;
  std::vector<char> data;
};

struct Warp {
  std::vector<std::shared_ptr<Exchange>> open;
};

std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<char*> stacks;
Thread* current = nullptr;
uint64_t progress = 0;
jmp_buf scheduler;
#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;
#endif
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
dim3 grid_size, block_size, block_at;
uint32_t block_number = 0, first_block;  // counted through all launches; this one's first
std::string message;
void (*body)(const void*) = nullptr;
const void* body_argument = nullptr;

// By jumps, as swapcontext asks the kernel for the signal mask, which takes longer than all that happens in between.
void switch_to_scheduler(bool for_good = false) {
  Thread* self = current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, host_stack, host_stack_bytes);
#endif
  (void)for_good;
  if (!_setjmp(self->place)) _longjmp(scheduler, 1);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

void switch_to(Thread& thread) {
  current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, thread.stack, kStackBytes);
#endif
  if (!_setjmp(scheduler)) {
    if (std::exchange(thread.started, true)) _longjmp(thread.place, 1);
    setcontext(&thread.start);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  body(body_argument);
  current->state = State::kDone;
  switch_to_scheduler(true);
}

std::string where() {
  char text[128];
  std::snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", current->index.x, current->index.y,
                current->index.z, block_at.x, block_at.y, block_at.z);
  return text;
}

void find_host_stack() {
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  void* begin = nullptr;
  pthread_attr_getstack(&attributes, &begin, &host_stack_bytes);
  host_stack = begin;
  pthread_attr_destroy(&attributes);
}

std::pair<char*, size_t> find_shared_variables() {
  std::pair<char*, size_t> found{anchor, sizeof anchor};
  dl_iterate_phdr(
      [](dl_phdr_info* library, size_t, void* result) {
        char* begin = static_cast<char*>(library->dlpi_tls_data);
        for (int i = 0; begin != nullptr && i < library->dlpi_phnum; ++i) {
          const auto& segment = library->dlpi_phdr[i];
          if (segment.p_type != PT_TLS || anchor < begin || anchor >= begin + segment.p_memsz) continue;
          *static_cast<std::pair<char*, size_t>*>(result) = {begin, segment.p_memsz};
          return 1;
        }
        return 0;
      },
      &found);
  return found;
}

// ------------------------------------------------------------------------------------------------- the memory check

bool ordered(const Touch& before, const Touch& now) {
  if (before.block < first_block) return true;  // never, or by an earlier launch
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.barriers != now.barriers) return true;
  if (before.thread / kWarp != now.thread / kWarp) return warp_knows(int(before.thread / kWarp), before.time);
  return before.warp_barriers != now.warp_barriers;
}

void hazard(const Buffer& buffer, size_t offset, const Touch& before, const char* first, const char* second) {
  fail("hazard: %s of byte %zu of %s follows a %s by thread %u of block %u with no barrier in between", second, offset,
       buffer.name.c_str(), first, before.thread, before.block - first_block);
}

void record(Buffer& buffer, size_t offset, size_t bytes, bool write) {
  const Touch now{block_number, current->linear, current->barriers, current->warp_barriers, warp_time()};
  for (size_t i = offset; i < offset + bytes; ++i) {
    Byte& byte = buffer.history[i];
    if (buffer.shared && byte.write.block != now.block) byte = {};  // an earlier block's
    if (!ordered(byte.write, now)) hazard(buffer, i, byte.write, "write", write ? "a write" : "a read");
    if (write) {
      if (!ordered(byte.read, now)) hazard(buffer, i, byte.read, "read", "a write");
      if (!ordered(byte.other_read, now)) hazard(buffer, i, byte.other_read, "read", "a write");
      byte.write = now;
      continue;
    }
    if (buffer.shared && byte.write.block == 0) fail("read of byte %zu of %s before anyone wrote it", i, buffer.name.c_str());
    if (byte.read.thread != now.thread || byte.read.block != now.block) byte.other_read = byte.read;
    byte.read = now;
  }
}

Buffer* find(const char* p, size_t bytes) {
  for (Buffer& buffer : shared_now) {
    if (buffer.contains(p, bytes)) return &buffer;
  }
  for (Buffer& buffer : buffers) {
    if (buffer.contains(p, bytes)) return &buffer;
  }
  return nullptr;
}

bool within(const void* p, size_t bytes, const void* begin, size_t size) {
  const auto at = reinterpret_cast<uintptr_t>(p), from = reinterpret_cast<uintptr_t>(begin);
  return at >= from && at + bytes <= from + size;
}

// ---------------------------------------------------------------------------------------------------- running a block

void start_block(size_t shared_bytes) {
  shared_now.clear();
  const auto add = [](char* begin, size_t bytes, const char* name) {
    std::memset(begin, 0xff, bytes);  // NaN, or -1
    if (!bytes) return;
    if (shared_histories.size() == shared_now.size()) shared_histories.push_back(histories(bytes));  // the first block's
    shared_now.push_back({begin, bytes, true, true, name, shared_histories[shared_now.size()].get()});
  };
  const auto [variables, variables_bytes] = find_shared_variables();
  add(variables, variables_bytes, "the __shared__ variables");
  dynamic_memory.assign(shared_bytes + 1024, 0);
  add(dynamic_shared(), shared_bytes, "dynamic shared memory");

  const size_t count = size_t(block_size.x) * block_size.y * block_size.z;
  while (stacks.size() < count) {
    stacks.push_back(static_cast<char*>(
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));
  }
  threads.assign(count, Thread{});
  warps.assign((count + kWarp - 1) / kWarp, Warp{});
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.stack = stacks[i];
    thread.state = State::kReady;
    thread.linear = i;
    thread.index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
    thread.copies.resize(1);
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, fiber_main, 0);
  }
  start_hopper();
}

std::string lanes(unsigned mask) {
  std::string text;
  for (int i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) text += (text.empty() ? "" : ", ") + std::to_string(i);
  }
  return text;
}

void report_deadlock() {
  char text[256];
  for (size_t w = 0; w < warps.size(); ++w) {
    for (const auto& exchange : warps[w].open) {
      std::snprintf(text, sizeof text, "warp %zu: a %s with mask 0x%08x never sees lanes %s", w,
                    exchange->barrier ? "__syncwarp" : "shuffle", exchange->mask,
                    lanes(exchange->mask & ~exchange->arrived).c_str());
      message = text;
      return;
    }
  }
  for (const Thread& thread : threads) {
    if (thread.state != State::kWaiting) continue;
    message = "thread " + std::to_string(thread.linear) + " waits for ever: " + thread.waiting_for;
    return;
  }
  const auto waiting = std::count_if(threads.begin(), threads.end(), [](auto& t) { return t.state == State::kAtBarrier; });
  std::snprintf(text, sizeof text, "__syncthreads is reached by %td of %zu threads", waiting, threads.size());
  message = text;
}

void run_block() {
  while (true) {
    bool moved = false, done = true, all_at_barrier = true;
    for (Thread& thread : threads) {
      if (thread.state == State::kWaiting && thread.waiting_since != progress) thread.state = State::kReady;
      if (thread.state == State::kReady) {
        switch_to(thread);
        if (!message.empty()) return;
        moved = true;
      }
      done &= thread.state == State::kDone;
      all_at_barrier &= thread.state == State::kAtBarrier;
    }
    if (done) return;
    if (all_at_barrier) {
      for (Thread& thread : threads) {
        thread.state = State::kReady;
        ++thread.barriers;
      }
      meet_all_warps();
    } else if (!moved) {
      return report_deadlock();
    }
  }
}

// This lane's part of a warp-wide operation; returns once every lane of the mask has come.
std::shared_ptr<Exchange> join(unsigned mask, const void* in, size_t bytes, bool barrier) {
  const unsigned self = 1u << lane();
  const char* kind = barrier ? "__syncwarp" : "shuffle";
  if (!(mask & self)) fail("%s with mask 0x%08x is called by lane %d, which is not in it", kind, mask, lane());
  Warp& warp = warps[current->linear / kWarp];
  std::shared_ptr<Exchange> exchange;
  for (auto& open : warp.open) {
    if (open->mask == mask && open->bytes == bytes && open->barrier == barrier) {
      exchange = open;
    } else if (open->mask & mask) {
      fail("%s with mask 0x%08x meets another warp operation with mask 0x%08x", kind, mask, open->mask);
    }
  }
  if (!exchange) {
    exchange = std::make_shared<Exchange>(Exchange{mask, 0, bytes, barrier, std::vector<char>(bytes * kWarp)});
    warp.open.push_back(exchange);
  }
  if (bytes) std::memcpy(exchange->data.data() + bytes * lane(), in, bytes);
  exchange->arrived |= self;
  if (exchange->arrived == mask) {
    warp.open.erase(std::find(warp.open.begin(), warp.open.end(), exchange));
    const uint32_t first = current->linear / kWarp * kWarp;
    for (int i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      threads[first + i].state = State::kReady;
      if (barrier) ++threads[first + i].warp_barriers;
    }
  } else {
    current->state = State::kAtExchange;
    switch_to_scheduler();
  }
  return exchange;
}

}  // namespace

void check(const void* address, size_t bytes, bool write, bool atomic) {
  if (current == nullptr || !message.empty()) return;
  if (within(address, bytes, current->stack, kStackBytes)) return;
  if (!write && within(address, bytes, host_stack, host_stack_bytes)) return;  // the kernel's arguments
  const char* p = static_cast<const char*>(address);
  Buffer* buffer = find(p, bytes);
  if (buffer == nullptr) {
    for (Buffer& near : buffers) {
      if (p >= near.begin - 4096 && p < near.begin + near.bytes + 4096) {
        fail("out of bounds: %s of %zu bytes at byte %td of %s, which has %zu", write ? "write" : "read", bytes,
             p - near.begin, near.name.c_str(), near.bytes);
      }
    }
    fail("out of bounds: %s of %zu bytes outside every buffer", write ? "write" : "read", bytes);
  }
  if (write && !buffer->writable) fail("write into %s, an input", buffer->name.c_str());
  if (buffer->writable && !atomic) record(*buffer, p - buffer->begin, bytes, write);
}

void allow(const void* data, size_t bytes, bool writable, const char* name) {
  if (writable) global_histories.push_back(histories(bytes));
  Byte* history = writable ? global_histories.back().get() : nullptr;
  buffers.push_back({static_cast<const char*>(data), bytes, writable, false, name, history});
}
void forget_buffers() {
  buffers.clear();
  global_histories.clear();
}

bool launch_erased(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(const void*), const void* kernel) {
  message.clear();
  find_host_stack();
  grid_size = grid;
  block_size = block;
  body = call;
  body_argument = kernel;
  shared_histories.clear();
  first_block = block_number + 1;
  for (uint32_t i = 0; i < grid.x * grid.y * grid.z; ++i) {
    ++block_number;
    block_at = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    start_block(shared_bytes);
    run_block();
    if (!message.empty()) return false;
  }
  return true;
}

const char* error() { return message.c_str(); }
dim3 thread_index() { return current->index; }
dim3 block_index() { return block_at; }
dim3 block_dim() { return block_size; }
dim3 grid_dim() { return grid_size; }
int lane() { return current->linear % kWarp; }
char* dynamic_shared() {
  const auto begin = reinterpret_cast<uintptr_t>(dynamic_memory.data());
  return reinterpret_cast<char*>((begin + 1023) / 1024 * 1024);
}

void fail(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  message = where() + ": " + text;
  switch_to_scheduler(true);
  __builtin_unreachable();
}

unsigned thread_number() { return current->linear; }
unsigned thread_count() { return unsigned(threads.size()); }
void note_progress() { ++progress; }
void pause() { switch_to_scheduler(); }
void wait_for_progress(const std::string& what) {
  current->state = State::kWaiting;
  current->waiting_since = progress;
  current->waiting_for = what;
  switch_to_scheduler();
}

void block_barrier() {
  current->state = State::kAtBarrier;
  switch_to_scheduler();
}
void warp_barrier(unsigned mask) { join(mask, nullptr, 0, true); }

void shuffle(unsigned mask, const void* in, void* out, size_t bytes, int source) {
  if (source < 0 || source >= kWarp || !(mask >> source & 1)) {
    fail("shuffle with mask 0x%08x reads lane %d, which is not in it", mask, source);
  }
  const auto exchange = join(mask, in, bytes, false);
  std::memcpy(out, exchange->data.data() + bytes * source, bytes);
}

void gather(unsigned mask, const void* in, void* out, size_t bytes) {
  const auto exchange = join(mask, in, bytes, false);
  std::memcpy(out, exchange->data.data(), bytes * kWarp);
}

void async_copy(void* shared, const void* global, size_t bytes, size_t valid_bytes) {
  current->copies.back().push_back({shared, global, bytes, valid_bytes});
}
void async_commit() { current->copies.emplace_back(); }
void async_wait(int groups_still_pending) {
  auto& groups = current->copies;
  while (int(groups.size()) - 1 > groups_still_pending) {
    for (const Pending& copy : groups.front()) {
      check(copy.global, copy.valid, false);
      check(copy.shared, copy.bytes, true);
      std::memset(copy.shared, 0, copy.bytes);
      std::memcpy(copy.shared, copy.global, copy.valid);
    }
    groups.erase(groups.begin());
  }
}

void atomic_access(const void* address, size_t bytes) { check(address, bytes, true, true); }

}  // namespace simt

// ------------------------------------------------------------------------- what -fsanitize=thread makes kernels call

#define HOOK(name, bytes, write) \
  extern "C" void name(void* address) { simt::check(address, bytes, write); }
#define HOOKS(bytes)                                  \
  HOOK(__tsan_read##bytes, bytes, false)              \
  HOOK(__tsan_write##bytes, bytes, true)              \
  HOOK(__tsan_unaligned_read##bytes, bytes, false)    \
  HOOK(__tsan_unaligned_write##bytes, bytes, true)    \
  HOOK(__tsan_volatile_read##bytes, bytes, false)     \
  HOOK(__tsan_volatile_write##bytes, bytes, true)
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
extern "C" void __tsan_read_range(void* address, unsigned long bytes) { simt::check(address, bytes, false); }
extern "C" void __tsan_write_range(void* address, unsigned long bytes) { simt::check(address, bytes, true); }
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_init() {}

// Called by UBSan's runtime for each finding, after it has printed it: turns the finding into an error of the launch.
extern "C" void __ubsan_get_current_report_data(const char** kind, const char** message, const char** file, unsigned* line,
                                                unsigned* column, char** address);
extern "C" void __ubsan_on_report() {
  const char *kind, *message, *file;
  unsigned line, column;
  char* address;
  __ubsan_get_current_report_data(&kind, &message, &file, &line, &column, &address);
  if (simt::current != nullptr) simt::fail("%s (%s:%u)", message, file, line);
}

// Python's side (ctypes).
extern "C" void simt_allow(const void* data, size_t bytes, int writable, const char* name) {
  simt::allow(data, bytes, writable != 0, name);
}
extern "C" void simt_forget_buffers() { simt::forget_buffers(); }
extern "C" const char* simt_error() { return simt::error(); }
