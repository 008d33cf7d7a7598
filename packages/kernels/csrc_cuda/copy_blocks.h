// copy_blocks on a GPU: what one call moves, and how it is dealt out; plain C++, for the launch, the binding and tests.
//
// Every read comes before any write, so that chains and swaps of blocks are defined: one kernel copies the source blocks
// of all parts aside, a second one behind it in the same stream copies them to their places. Between two kernels of a
// stream all that the first wrote is seen by the second, and no thread block of the second begins before the first is over.

#pragma once

#include <cstdint>
#include <cstring>

namespace octavo_cuda {

constexpr int kMostParts = 64;          // of one launch: their table is an argument of the kernel, of at most 4 KiB
constexpr int kThreads = 256;           // of a thread block
constexpr int64_t kBytesPerSpan = 32768;  // of a row, that one thread block takes where rows are long
constexpr int64_t kMostInGrid = 65535;  // thread blocks in y and z, and enough in x

// A piece of a cache: blocks whose rows of row_bytes lie side by side in memory, stride bytes from block to block.
struct Part {
  char* blocks;
  int64_t stride;
  int64_t row_bytes;
  int64_t aside;  // where its rows begin in the memory aside: num_copies of them, one behind the other
  int64_t width;  // bytes that are moved at once: 16, 8, 4, 2 or 1; it divides every address of a row, here and there
};

struct Parts {
  Part part[kMostParts];
};
static_assert(sizeof(Parts) + 64 <= 4096, "a kernel's arguments may take 4 KiB");

struct Grid {
  unsigned x, y, z;  // copies, parts, spans of a row
};

// The most bytes that can be moved at once in a part whose blocks begin at `address`; its rows aside begin at a multiple
// of 16 bytes.
inline int64_t width_of(uint64_t address, int64_t stride, int64_t row_bytes) {
  const uint64_t bits = address | static_cast<uint64_t>(stride) | static_cast<uint64_t>(row_bytes) | 16;
  return static_cast<int64_t>(bits & (~bits + 1));  // the lowest bit that is set
}

// Makes a part whose rows aside begin at *taken, and moves *taken on to where the next one's may begin.
inline Part make_part(char* blocks, int64_t stride, int64_t row_bytes, int64_t num_copies, int64_t* taken) {
  const Part part{blocks, stride, row_bytes, *taken, width_of(reinterpret_cast<uint64_t>(blocks), stride, row_bytes)};
  *taken += (row_bytes * num_copies + 15) / 16 * 16;
  return part;
}

// Calls launch(table, number of parts in it) for as many tables as hold all parts.
template <typename Launch>
void in_tables(const Part* parts, int num_parts, const Launch& launch) {
  for (int first = 0; first < num_parts; first += kMostParts) {
    const int count = num_parts - first < kMostParts ? num_parts - first : kMostParts;
    Parts table;
    std::memset(static_cast<void*>(&table), 0, sizeof(table));
    std::memcpy(static_cast<void*>(table.part), parts + first, static_cast<size_t>(count) * sizeof(Part));
    launch(table, count);
  }
}

inline Grid grid_of(const Parts& parts, int num_parts, int64_t num_copies) {
  int64_t longest = 0;
  for (int i = 0; i < num_parts; ++i) longest = parts.part[i].row_bytes > longest ? parts.part[i].row_bytes : longest;
  const int64_t spans = (longest + kBytesPerSpan - 1) / kBytesPerSpan;
  const auto clipped = [](int64_t value) { return static_cast<unsigned>(value < kMostInGrid ? value : kMostInGrid); };
  return Grid{clipped(num_copies), static_cast<unsigned>(num_parts), spans > 1 ? clipped(spans) : 1};
}

// Copies blocks src[i] to blocks dst[i] of all parts, in a CUDA stream; ids and all memory are the device's.
// Returns null, or what the driver says of a launch that failed.
const char* copy_blocks(const Part* parts, int num_parts, char* aside, const int64_t* src, const int64_t* dst,
                        int64_t num_copies, void* stream);

}  // namespace octavo_cuda
