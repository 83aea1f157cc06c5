#include "cuda/runtime.h"

#include <cuda_runtime_api.h>

namespace fusestep::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // or the next call would report it again
  if (status == cudaErrorStreamCaptureUnsupported || status == cudaErrorStreamCaptureImplicit ||
      status == cudaErrorStreamCaptureIsolation)
    throw Error(std::string("a CUDA graph is being captured, which forbids ") + what +
                ": take one such step before the capture");
  throw Error(std::string("CUDA error while ") + what + ": " + cudaGetErrorString(status) + " (" +
              cudaGetErrorName(status) + ")");
}

// Or the next check would report it.
void forgive(cudaError_t status) {
  if (status != cudaSuccess) static_cast<void>(cudaGetLastError());
}

cudaStream_t native(Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

// Kernels of a toolkit run on any driver of its major version. Below CUDA 12.1 no driver takes 32
// KB of kernel parameters.
constexpr int kOldestDriver = CUDART_VERSION / 1000 == 12 ? 12010 : CUDART_VERSION / 1000 * 1000;
constexpr const char* kOldestDriverName = CUDART_VERSION / 1000 == 12 ? "530" : "580";

std::string requirement() {
  return std::string("fusestep's CUDA kernels are built for CUDA ") + version_text(CUDART_VERSION) +
         " and need an NVIDIA GPU with driver " + kOldestDriverName + " or later";
}

}  // namespace

void check_available() {
  const int driver = driver_version();
  if (driver == 0) throw Error(requirement() + "; this machine has no NVIDIA driver");
  if (driver < kOldestDriver)
    throw Error(requirement() + "; the driver of this machine is for CUDA " + version_text(driver) +
                ": update it, or build fusestep from source with the CUDA toolkit of that version "
                "(12.1 or later)");
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && count > 0) return;
  static_cast<void>(cudaGetLastError());
  throw Error(requirement() + "; " +
              (status == cudaSuccess ? "no device is visible" : cudaGetErrorString(status)));
}

int device_count() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "counting GPUs");
  return count;
}

int device_of(const void* address) {
  cudaPointerAttributes attributes;
  check(cudaPointerGetAttributes(&attributes, address), "looking at an address");
  const bool of_a_gpu =
      attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged;
  return of_a_gpu ? attributes.device : -1;
}

int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current GPU");
  return device;
}

CurrentDevice::CurrentDevice(int device) : before_(current_device()) {
  if (device == before_)
    before_ = -1;
  else
    check(cudaSetDevice(device), "choosing a GPU");
}

CurrentDevice::~CurrentDevice() {
  if (before_ >= 0) forgive(cudaSetDevice(before_));
}

void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "allocating memory");
  return memory;
}

// Fails in a forked child and when the process ends, where the memory is gone anyway. An optimizer
// may be deleted while a graph is captured, which must not spoil the graph.
void release(void* memory) noexcept {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  const bool is_relaxed = cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess;
  forgive(cudaFree(memory));
  if (is_relaxed) forgive(cudaThreadExchangeStreamCaptureMode(&mode));
}

void copy_to_host(void* to, const void* from, std::size_t bytes, Stream stream) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, native(stream)),
        "copying from the GPU");
  check(cudaStreamSynchronize(native(stream)), "waiting for the GPU");
}

void synchronize() { check(cudaDeviceSynchronize(), "waiting for the GPU"); }

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(native(stream), &status);
  // The default stream must not be used, and cannot be captured, while another one is.
  if (error == cudaErrorStreamCaptureImplicit) {
    static_cast<void>(cudaGetLastError());
    throw Error(
        "a CUDA graph is being captured on another stream; step on the stream of the graph");
  }
  check(error, "asking whether a CUDA graph is being captured");
  return status != cudaStreamCaptureStatusNone;
}

void wait(Stream stream, Stream other) {
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "creating an event");
  cudaError_t status = cudaEventRecord(event, native(other));
  if (status == cudaSuccess) status = cudaStreamWaitEvent(native(stream), event, 0);
  forgive(cudaEventDestroy(event));  // takes effect once nobody needs it
  check(status, "having one stream wait for another");
}

void check_launch() { check(cudaGetLastError(), "launching a kernel"); }

Build build() { return {CUDART_VERSION, FUSESTEP_CUDA_ARCHITECTURES, false}; }

int driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  static_cast<void>(cudaGetLastError());
  return 0;
}

}  // namespace fusestep::cuda
