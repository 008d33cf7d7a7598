// group_rows: rows sorted by group, stably, into tiles of one group each.

#include "ops.h"

namespace octavo {
namespace {

template <class Id>
void group(const GroupRowsArgs& args, const Id* ids, int64_t num_rows) {
  const auto is_grouped = [&](int64_t row) { return ids[row] >= 0 && ids[row] < args.num_groups; };
  for (int64_t g = 0; g < args.num_groups; ++g) args.places[g] = 0;
  for (int64_t row = 0; row < num_rows; ++row)
    if (is_grouped(row)) ++args.places[ids[row]];
  int64_t tile = 0;
  for (int64_t g = 0; g < args.num_groups; ++g) {  // from how many rows a group has to where its next row goes
    const int64_t end = tile + (args.places[g] + args.tile_rows - 1) / args.tile_rows;
    args.places[g] = static_cast<int32_t>(tile * args.tile_rows);
    for (; tile < end; ++tile) args.groups[tile] = static_cast<int32_t>(g);
  }
  for (; tile < args.num_tiles; ++tile) args.groups[tile] = -1;
  for (int64_t i = 0; i < args.num_tiles * args.tile_rows; ++i) args.rows[i] = static_cast<int32_t>(num_rows);
  for (int64_t row = 0; row < num_rows; ++row)
    if (is_grouped(row)) args.rows[args.places[ids[row]]++] = static_cast<int32_t>(row);
}

}  // namespace

void group_rows(const GroupRowsArgs& args, int64_t num_rows, Team& team) {
  team.parallel_for(1, [&](int64_t) {
    if (args.bytes_of_id == 4) return group(args, static_cast<const int32_t*>(args.ids), num_rows);
    return group(args, static_cast<const int64_t*>(args.ids), num_rows);
  });
}

}  // namespace octavo
