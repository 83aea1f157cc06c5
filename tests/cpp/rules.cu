// The rules and gradients in device code, as they are: this file only has to compile.
#include "core/half.h"
#include "core/reduction.h"
#include "gradients/dense.h"
#include "rules/registry.h"

namespace fusestep {

template <class T, class Rule, class... State>
__global__ void move(const Rule rule, std::int64_t size, T* parameter,
                     const gradients::Dense<T> gradient, State*... state) {
  const std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x;
  if (i < size) rule(parameter[i], gradient(i), state[i]...);
}

#define FUSESTEP_INSTANTIATE(T)                                                                   \
  template __global__ void move(const rules::Sgd<T>, std::int64_t, T*, gradients::Dense<T>);      \
  template __global__ void move(const rules::Sgd<T>, std::int64_t, T*, gradients::Dense<T>, T*);  \
  template __global__ void move(const rules::Adam<T>, std::int64_t, T*, gradients::Dense<T>, T*,  \
                                T*);                                                              \
  template __global__ void move(const rules::Adam<T>, std::int64_t, T*, gradients::Dense<T>, T*,  \
                                T*, T*);                                                          \
  template __global__ void move(const rules::NAdam<T>, std::int64_t, T*, gradients::Dense<T>, T*, \
                                T*);                                                              \
  template __global__ void move(const rules::Adagrad<T>, std::int64_t, T*, gradients::Dense<T>, T*);

FUSESTEP_INSTANTIATE(float)
FUSESTEP_INSTANTIATE(double)

__global__ void convert(const float* from, Float16* half, BFloat16* bfloat, float* back) {
  half[0] = cast<Float16>(from[0]);
  bfloat[0] = cast<BFloat16>(from[0]);
  back[0] = cast<float>(half[0]) + cast<float>(bfloat[0]);
}

}  // namespace fusestep
