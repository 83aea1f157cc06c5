// The few functions of CUDA's runtime that are needed, with errors as exceptions.
//
// runtime.cpp calls CUDA; simulation/runtime.cpp stands in for it in tests, in the host's memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fusestep::cuda {

// A cudaStream_t. 0 is the default stream.
using Stream = std::uintptr_t;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws, with a sentence that says what to do, unless there is a driver that can run this build
// and a GPU.
void check_available();

int device_count();

// The GPU whose memory this is; -1 for memory that is not a GPU's.
int device_of(const void* address);

int current_device();

// Makes a GPU the current one of this thread while it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_;
};

// Memory of the current GPU, aligned to 256 bytes.
void* allocate(std::size_t bytes);
void release(void* memory) noexcept;

// After what is in the stream; returns when it is done.
void copy_to_host(void* to, const void* from, std::size_t bytes, Stream stream);

// Waits for all that the current GPU has been given.
void synchronize();

bool is_capturing(Stream stream);

// What comes into `stream` from now on waits for what is in `other` now.
void wait(Stream stream, Stream other);

// Throws where the launch just made has failed.
void check_launch();

struct Build {
  int toolkit;                // 13000 is CUDA 13.0
  std::string architectures;  // as CMake was given them
  bool simulated;
};
Build build();

int driver_version();  // likewise; 0 where there is no driver

}  // namespace fusestep::cuda
