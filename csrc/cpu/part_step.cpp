#include "cpu/part_step.h"

#include "cpu/part_reader.h"
#include "cpu/part_updater.h"
#include "selections/part.h"

namespace fusestep::cpu {
namespace {

template <class T>
void sum_squares(const Kernels<T>& kernels, const selections::Part& part, std::int64_t first,
                 std::int64_t last, double prescale, double* sums) {
  alignas(kCacheLine) T moved[kTileSize];
  PartReader<T> reader(kernels, part);
  for (std::int64_t i = first; i < last; ++i) {
    reader.expect(i, last);
    const std::int64_t size = reader.moved_gradient(i, moved);
    *sums++ = kernels.sum_of_squares(moved, size, prescale);
  }
}

}  // namespace

void update_part(const KernelTable& kernels, const Work& work, const StepOptions& options,
                 std::int64_t first, std::int64_t last) {
  if (work.compute == DType::float64)
    PartUpdater<double>(kernels, work, options)(first, last);
  else
    PartUpdater<float>(kernels, work, options)(first, last);
}

void sum_moved_squares(const KernelTable& kernels, const Work& work, std::int64_t first,
                       std::int64_t last, double prescale, double* sums) {
  if (work.compute == DType::float64)
    sum_squares(kernels.float64, *work.part, first, last, prescale, sums);
  else
    sum_squares(kernels.float32, *work.part, first, last, prescale, sums);
}

}  // namespace fusestep::cpu
