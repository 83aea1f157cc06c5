// The floating-point environment that a rule's bits depend on.
//
// A library linked with -ffast-math, or torch.set_flush_denormal, sets flush-to-zero for the whole
// thread; fesetround changes the rounding. While one of these guards lives, the thread has the
// IEEE defaults: round to nearest even, gradual underflow.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fusestep::cpu {

class IeeeEnvironment {
 public:
  IeeeEnvironment() : saved_(get()) {
    if (saved_ != kDefault) set(kDefault);
  }
  ~IeeeEnvironment() {
    if (saved_ != kDefault) set(saved_);
  }
  IeeeEnvironment(const IeeeEnvironment&) = delete;
  IeeeEnvironment& operator=(const IeeeEnvironment&) = delete;

 private:
#if defined(__x86_64__)
  using Register = std::uint32_t;
  static constexpr Register kDefault = 0x1f80;  // all exceptions masked
  // The exception flags (low six bits) are sticky results, not modes.
  static Register get() { return _mm_getcsr() & ~0x3fu; }
  static void set(Register value) { _mm_setcsr(value); }
#elif defined(__aarch64__)
  using Register = std::uint64_t;
  static constexpr Register kDefault = 0;
  static Register get() {
    Register value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set(Register value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
  using Register = int;
  static constexpr Register kDefault = 0;
  static Register get() { return kDefault; }
  static void set(Register) {}
#endif

  Register saved_;
};

}  // namespace fusestep::cpu
