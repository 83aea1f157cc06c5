#include "engine/samples.h"

#include <array>
#include <span>

#include "engine/stepper.h"

namespace fusestep::engine {
namespace {

using arrays::Array;

// Sample 0's values beside an array of one sample's geometry, in place of a parameter.
Work beside(const Update& update, const Operand& operand, const Geometry& geometry) {
  const Array& values = update.gradient;
  Work work;
  work.compute = update.slot->work.compute;
  work.iteration.operand[kParameter] = operand;
  work.iteration.operand[kGradient] = values.operand();
  const auto [shape, strides] = values.geometry();
  if (values.c_contiguous)
    work.iteration.plan_dense(update.slot->parameter().size, 2);
  else
    work.iteration.plan(std::array{geometry, Geometry{shape.subspan(1), strides.subspan(1)}});
  return work;
}

}  // namespace

Work one_sample(const Update& update) {
  const auto [shape, strides] = update.gradient.geometry();
  return beside(update, update.gradient.operand(), {shape.subspan(1), strides.subspan(1)});
}

Work one_sample_of(const Update& update, const Array& sum) {
  return beside(update, sum.operand(), sum.geometry());
}

std::int64_t stride_of_samples(const Update& update) {
  return update.gradient.geometry().strides[0];
}

}  // namespace fusestep::engine
