// The tile registers of AMX: eight, of up to 16 rows of 64 bytes. A thread gives them a shape before it uses them, and
// releases them afterwards, so that the system need not keep them.
//
// Written as assembly: the compiler's intrinsics are macros that say nothing about memory, and pass through it unordered.

#pragma once

#include <cstdint>

// Compilers with this header come with an assembler that knows tiles. Older ones build the library without them.
#if defined(__AVX512VNNI__) && defined(__linux__) && __has_include(<amxint8intrin.h>)
#define OCTAVO_HAS_TILES 1
#endif

namespace octavo {

#if defined(OCTAVO_HAS_TILES)

constexpr int kTileRows = 16;
constexpr int kTileRowBytes = 64;

// Tiles 0 to 5 hold sums, [16 rows][16] words; 6 holds bytes of inputs, [16 rows][depth], 7 bytes of weights,
// [depth / 4][16] words of 4.
class TileShapes {
 public:
  explicit TileShapes(int depth) {
    for (int tile = 0; tile < 8; ++tile) {
      row_bytes_[tile] = tile == 6 ? static_cast<uint16_t>(depth) : kTileRowBytes;
      rows_[tile] = static_cast<uint8_t>(tile == 7 ? depth / 4 : kTileRows);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(*this));
  }
  ~TileShapes() { __asm__ volatile("tilerelease" : : : "memory"); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:  // as the processor reads it
  uint8_t palette_ = 1;
  uint8_t start_row_ = 0;
  uint8_t reserved_[14] = {};
  uint16_t row_bytes_[16] = {};
  uint8_t rows_[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// From `from` on, a row behind the other.
template <int Tile>
inline __attribute__((always_inline)) void load_tile(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(Tile) : "memory");
}

template <int Tile>
inline __attribute__((always_inline)) void store_tile(int32_t* to) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)"
                   :
                   : "r"(to), "r"(static_cast<int64_t>(kTileRowBytes)), "i"(Tile)
                   : "memory");
}

// Sums = inputs times weights, both signed bytes.
template <int Sums, int Inputs, int Weights>
inline __attribute__((always_inline)) void multiply_tiles() {
  __asm__ volatile("tilezero %%tmm%c0\n\ttdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Inputs), "i"(Weights));
}

#endif

}  // namespace octavo
