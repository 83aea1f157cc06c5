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

cuda::Factor factor_of(const Array& array) {
  const auto strides = array.geometry().strides;
  const std::size_t axes = strides.size();
  return {array.operand(), axes > 1 ? strides[0] : 0, axes > 2 ? strides[1] : 0, strides[axes - 1]};
}

}  // namespace

Work one_sample(const Update& update) {
  const auto [shape, strides] = update.gradient.geometry();
  return beside(update, update.gradient.operand(), {shape.subspan(1), strides.subspan(1)});
}

SamplesToAdd samples_to_add(const Update& update, const Array& sum) {
  if (!update.is_outer)
    return {beside(update, sum.operand(), sum.geometry()), stride_of_samples(update)};
  SamplesToAdd samples;
  samples.work.compute = update.slot->work.compute;
  samples.work.iteration.operand[kParameter] = sum.operand();
  samples.work.iteration.operand[kGradient] = sum.operand();
  samples.work.iteration.plan_dense(sum.size, 2);
  samples.factors = {factor_of(update.gradient), {}, 1, update.samples->positions};
  if (update.x) {
    samples.factors->x = factor_of(*update.x);
    samples.factors->columns = update.x->geometry().shape.back();
  }
  return samples;
}

std::int64_t stride_of_samples(const Update& update) {
  return update.gradient.geometry().strides[0];
}

}  // namespace fusestep::engine
