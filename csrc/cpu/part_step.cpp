#include "cpu/part_step.h"

#include "cpu/part_reader.h"
#include "cpu/part_updater.h"
#include "selections/part.h"

namespace fusestep::cpu {
namespace {

template <class T>
double sum_of_squares(const Kernels<T>& kernels, const selections::Part& part, std::int64_t i,
                      double prescale) {
  alignas(kCacheLine) T moved[kTileSize];
  const std::int64_t size = PartReader<T>(kernels, part).moved_gradient(i, moved);
  return kernels.sum_of_squares(moved, size, prescale);
}

}  // namespace

void update_part(const KernelTable& kernels, const Work& work, const StepOptions& options,
                 std::int64_t first, std::int64_t last) {
  if (work.compute == DType::float64)
    PartUpdater<double>(kernels, work, options)(first, last);
  else
    PartUpdater<float>(kernels, work, options)(first, last);
}

double sum_of_moved_squares(const KernelTable& kernels, const Work& work, std::int64_t tile,
                            double prescale) {
  return work.compute == DType::float64
             ? sum_of_squares(kernels.float64, *work.part, tile, prescale)
             : sum_of_squares(kernels.float32, *work.part, tile, prescale);
}

}  // namespace fusestep::cpu
