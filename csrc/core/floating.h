// The few floating-point operations a rule needs besides + - * /.
//
// All of them are correctly rounded, so that a rule gives the same bits on every instruction set
// and every device. Nothing here may call the C library: its functions differ between versions
// and between processors.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/annotations.h"

namespace fusestep {

FUSESTEP_HOST_DEVICE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

FUSESTEP_HOST_DEVICE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// The larger of two values; NaN if the second one is (as torch.maximum does).
template <class T>
FUSESTEP_HOST_DEVICE T maximum(T a, T b) {
  return a >= b ? a : b;
}

// The largest finite value of a type.
FUSESTEP_HOST_DEVICE float largest(float) { return 0x1.fffffep+127f; }
FUSESTEP_HOST_DEVICE double largest(double) { return 0x1.fffffffffffffp+1023; }

// The same bytes seen as another type.
template <class To, class From>
FUSESTEP_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace fusestep
