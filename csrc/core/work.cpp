#include "core/work.h"

#include <algorithm>

#include "selections/part.h"

namespace fusestep {

std::int64_t Work::tiles_of_part() const { return part->tiles(); }

std::int64_t Work::elements_of_part() const {
  return std::min(part->size, part->tiles() * kTileSize) * part->effort();
}

}  // namespace fusestep
