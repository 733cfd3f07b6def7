// Runs a kernel's blocks one after another on the CPU, each thread of a block as a fiber.
#include <cuda_runtime.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <mutex>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr int kMostThreads = 1024, kWarp = 32;
constexpr size_t kSharedBytes = 48 * 1024;  // what a launch may ask for without further ado
constexpr size_t kGuardBytes = 4096;
constexpr uint8_t kPoison = 0xff;  // a NaN in every float type

// launch.h declares it inside a function of this namespace
namespace qk::cuda {
uint4 shared_memory[(kSharedBytes + kGuardBytes) / sizeof(uint4)];
}

namespace {

enum class State { ready, at_barrier, at_warp, done };

struct Fiber {
  ucontext_t context;  // for the first entry; later switches jump, which needs no system call
  jmp_buf here;
  char* stack = nullptr;
  bool entered = false;
  State state = State::done;
  shim::Site site = {};
  int phase = 0;  // which half of the warp's words the next exchange uses
};

struct Warp {
  int arrived;
  shim::Site site;
  uint64_t words[2][kWarp];
};

std::mutex launching;
std::string error_text;
std::vector<Fiber> fibers(kMostThreads);
Warp warps[kMostThreads / kWarp];
jmp_buf scheduler;
int current, threads, waiting, finished;
bool failed, reversed;
int multiprocessors = 1;
void (*thread_function)(void*);
void* thread_argument;
cudaStream_t last_stream;
int64_t launches;

void to_scheduler() {
  if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}

std::string text(shim::Site site) {
  return std::string(site.file) + ":" + std::to_string(site.line);
}

// Ends the launch. A fiber that fails is left where it stands: its stack holds nothing to release.
void fail(const std::string& why) {
  if (!failed)
    error_text = why + " (block " + std::to_string(blockIdx.x) + ", thread " +
                 std::to_string(threadIdx.x) + ")";
  failed = true;
  to_scheduler();
}

// A fiber's life: one thread after another, of this launch and of later ones.
void enter() {
  for (;;) {
    thread_function(thread_argument);
    fibers[current].state = State::done;
    ++finished;
    to_scheduler();
  }
}

void make_stack(Fiber& fiber) {
  constexpr size_t size = 128 * 1024;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(memory, page, PROT_NONE);  // an overflow faults
  fiber.stack = static_cast<char*>(memory);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = size;
}

void go_on(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.entered) _longjmp(fiber.here, 1);
  fiber.entered = true;
  makecontext(&fiber.context, enter, 0);
  setcontext(&fiber.context);
}

std::string why_stuck() {
  std::string at;
  for (int t = 0; t < threads; ++t)
    if (fibers[t].state != State::done) at = text(fibers[t].site);
  return std::to_string(threads - finished - waiting) + " threads wait for their warp, " +
         std::to_string(waiting) + " at a barrier, " + std::to_string(finished) +
         " have left: none can go on; the last waits at " + at;
}

void run_block(size_t shared_bytes) {
  memset(qk::cuda::shared_memory, kPoison, shared_bytes + kGuardBytes);
  memset(warps, 0, sizeof(warps));
  waiting = finished = 0;
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    if (!fiber.stack) make_stack(fiber);
    fiber.state = State::ready;
    fiber.phase = 0;
  }
  while (finished < threads && !failed) {
    bool moved = false;
    for (int i = 0; i < threads && !failed; ++i) {
      current = reversed ? threads - 1 - i : i;
      if (fibers[current].state != State::ready) continue;
      moved = true;
      threadIdx.x = unsigned(current);
      go_on(fibers[current]);
    }
    if (!moved) {
      failed = true;
      error_text = why_stuck() + " (block " + std::to_string(blockIdx.x) + ")";
    }
  }
  const auto* bytes = reinterpret_cast<const uint8_t*>(qk::cuda::shared_memory);
  for (size_t b = shared_bytes; b < shared_bytes + kGuardBytes && !failed; ++b) {
    if (bytes[b] == kPoison) continue;
    failed = true;
    error_text = "shared memory was written beyond its " + std::to_string(shared_bytes) + " bytes";
  }
}

}  // namespace

namespace shim {

int lane() { return current % kWarp; }

void barrier(Site site) {
  Fiber& fiber = fibers[current];
  fiber.site = site;
  fiber.state = State::at_barrier;
  if (++waiting < threads) return to_scheduler();
  waiting = 0;
  for (int t = 0; t < threads; ++t) {
    const Site other = fibers[t].site;
    if (other.line != site.line || strcmp(other.file, site.file))
      return fail("threads of a block wait at different barriers, " + text(site) + " and " +
                  text(other));
    fibers[t].state = State::ready;
  }
}

const uint64_t* exchange(unsigned mask, int width, uint64_t word, Site site) {
  Fiber& fiber = fibers[current];
  Warp& warp = warps[current / kWarp];
  if (mask != ~0u || width != kWarp) fail("only whole warps are supported, at " + text(site));
  if (warp.arrived == 0) warp.site = site;
  if (warp.site.line != site.line || strcmp(warp.site.file, site.file))
    fail("lanes of a warp meet in different calls, " + text(warp.site) + " and " + text(site));
  // two halves in turn: no lane can write a half again before all have read it
  uint64_t* words = warp.words[fiber.phase];
  fiber.phase ^= 1;
  words[lane()] = word;
  fiber.site = site;
  fiber.state = State::at_warp;
  if (++warp.arrived < kWarp) {
    to_scheduler();
    return words;
  }
  warp.arrived = 0;
  const int first = current / kWarp * kWarp;
  for (int t = first; t < first + kWarp; ++t) fibers[t].state = State::ready;
  return words;
}

cudaError_t run(const cudaLaunchConfig_t& config, void (*thread)(void*), void* kernel) {
  const std::lock_guard<std::mutex> lock(launching);
  threads = int(config.blockDim.x);
  const bool fits = threads <= kMostThreads && config.dynamicSmemBytes <= kSharedBytes;
  if (config.gridDim.x == 0 || threads == 0 || threads % kWarp || !fits) {
    error_text = "a launch of " + std::to_string(config.gridDim.x) + " blocks of " +
                 std::to_string(threads) + " threads with " +
                 std::to_string(config.dynamicSmemBytes) + " bytes of shared memory";
    return cudaErrorInvalidConfiguration;
  }
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  last_stream = config.stream;
  ++launches;
  thread_function = thread;
  thread_argument = kernel;
  failed = false;
  for (unsigned b = 0; b < gridDim.x && !failed; ++b) {
    blockIdx.x = reversed ? gridDim.x - 1 - b : b;
    run_block(config.dynamicSmemBytes);
  }
  if (!failed) return cudaSuccess;
  for (Fiber& fiber : fibers) fiber.entered = false;  // what stands in a kernel starts anew
  return cudaErrorLaunchFailure;
}

}  // namespace shim

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = multiprocessors;
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  memset(memory, value, bytes);
  last_stream = stream;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid value" : error_text.c_str();
}

// For the tests: blocks and threads run from the last to the first; the stream of the last launch.
extern "C" void shim_reverse(int on) { reversed = on; }
extern "C" void* shim_last_stream() { return last_stream; }
extern "C" int64_t shim_launches() { return launches; }
extern "C" const char* shim_error_text() { return error_text.c_str(); }

// What -fsanitize=alignment,bounds-strict,shift calls. Its data begin with the place in the source.
struct SanitizerData {
  const char* file;
  uint32_t line, column;
};

static void sanitizer(const char* what, const SanitizerData* data) {
  fail(std::string(what) + " at " + text({data->file, int(data->line)}));
}

extern "C" void __ubsan_handle_type_mismatch_v1(SanitizerData* data, uintptr_t) {
  sanitizer("misaligned access", data);
}
extern "C" void __ubsan_handle_out_of_bounds(SanitizerData* data, uintptr_t) {
  sanitizer("index out of bounds", data);
}
extern "C" void __ubsan_handle_shift_out_of_bounds(SanitizerData* data, uintptr_t, uintptr_t) {
  sanitizer("shift by too much", data);
}
