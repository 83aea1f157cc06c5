// CUDA's runtime for tests: one GPU, or several, in the host's memory.

#include "cuda/runtime.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace fusestep::cuda {
namespace {

constexpr std::align_val_t kAlignment{256};

thread_local int current = 0;

// FUSESTEP_SIMULATE=capture: every stream but the default one is being captured.
bool simulates(const char* what) {
  const char* wanted = std::getenv("FUSESTEP_SIMULATE");
  return wanted && std::strcmp(wanted, what) == 0;
}

}  // namespace

void check_available() {
  if (simulates("no driver")) throw Error("the simulated machine has no NVIDIA driver");
}

int device_count() { return 2; }

int device_of(const void*) { return 0; }

int current_device() { return current; }

CurrentDevice::CurrentDevice(int device) : before_(current) { current = device; }

CurrentDevice::~CurrentDevice() { current = before_; }

void* allocate(std::size_t bytes) { return ::operator new(bytes, kAlignment); }

void release(void* memory) noexcept { ::operator delete(memory, kAlignment); }

void copy_to_host(void* to, const void* from, std::size_t bytes, Stream) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

void synchronize() {}

bool is_capturing(Stream stream) { return stream != 0 && simulates("capture"); }

void wait(Stream, Stream) {}

void check_launch() {}

Build build() { return {0, "", true}; }

int driver_version() { return 0; }

}  // namespace fusestep::cuda
