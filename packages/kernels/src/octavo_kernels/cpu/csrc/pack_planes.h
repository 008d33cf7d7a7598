// What pack.cpp leaves to planes.cpp.

#pragma once

#include "ops.h"

namespace octavo {

void pack_planes(const PackWeightArgs& args, Team& team);
void read_planes(const PackedEmbeddingArgs& args, int64_t row);  // one row of the lookup

}  // namespace octavo
