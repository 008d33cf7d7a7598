// octavo_use_tiles: whether this process multiplies in the tiles of AMX.

#include "tile_rows.h"

#if defined(OCTAVO_HAS_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace octavo {
namespace {

// Asks Linux, since tiles make what it keeps of a thread 8 KiB larger; with its answer all threads of the process may use them.
bool may_use_tiles() {
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;  // bits of EDX
  constexpr int kRequestState = 0x1023, kTileData = 18;   // ARCH_REQ_XCOMP_PERM
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool present = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kTile) != 0 && (edx & kInt8) != 0;
  return present && syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
}

}  // namespace
}  // namespace octavo
#endif

// Has products use tiles, or not. Returns whether they do.
extern "C" __attribute__((visibility("default"))) int octavo_use_tiles(int wanted) {
#if defined(OCTAVO_HAS_TILES)
  octavo::tiles_are_used = wanted != 0 && octavo::may_use_tiles();
  return octavo::tiles_are_used ? 1 : 0;
#else
  (void)wanted;
  return 0;
#endif
}
