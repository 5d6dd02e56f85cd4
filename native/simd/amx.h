// AMX tiles for int8 products, and the same four operations in plain C++, so that what is built on them is tested on
// machines without AMX (STROP_EMULATE_AMX).
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace strop::STROP_ISA {

// Roles of the tiles: two pairs, so that one product runs while the other's result is used.
constexpr int kSumTile = 0, kLeftTile = 2, kRightTile = 4;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {};
};

// Sums [rows][16] int32, left operands [rows][32] int8, right operands [8][16][4] uint8.
inline TileConfig tile_config(int rows) {
  TileConfig config;
  for (int i = 0; i < 2; ++i) {
    config.num_rows[kSumTile + i] = config.num_rows[kLeftTile + i] = uint8_t(rows);
    config.num_rows[kRightTile + i] = 8;
    config.row_bytes[kSumTile + i] = config.row_bytes[kRightTile + i] = 64;
    config.row_bytes[kLeftTile + i] = 32;
  }
  return config;
}

#if defined(STROP_EMULATE_AMX)

struct EmulatedTiles {
  TileConfig config;
  uint8_t data[8][16][64];
};
inline EmulatedTiles& emulated() {
  thread_local EmulatedTiles tiles;
  return tiles;
}
inline void begin_tiles(const TileConfig& config) { emulated().config = config; }
inline void end_tiles() {}
inline void move_tile(int tile, uint8_t* memory, int64_t stride, bool in) {
  EmulatedTiles& t = emulated();
  for (int r = 0; r < t.config.num_rows[tile]; ++r) {
    uint8_t *a = t.data[tile][r], *b = memory + r * stride;
    std::memcpy(in ? a : b, in ? b : a, t.config.row_bytes[tile]);
  }
}
// sums = left (signed) x right (unsigned).
template <int kPair>
inline void tile_product(const int8_t* left, int64_t left_stride, const uint8_t* right, int32_t* sums) {
  EmulatedTiles& t = emulated();
  move_tile(kLeftTile + kPair, const_cast<uint8_t*>(reinterpret_cast<const uint8_t*>(left)), left_stride, true);
  move_tile(kRightTile + kPair, const_cast<uint8_t*>(right), 64, true);
  for (int r = 0; r < t.config.num_rows[kSumTile + kPair]; ++r)
    for (int c = 0; c < 16; ++c) {
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k)
        sum += int(int8_t(t.data[kLeftTile + kPair][r][k])) * int(t.data[kRightTile + kPair][k / 4][c * 4 + k % 4]);
      std::memcpy(&t.data[kSumTile + kPair][r][c * 4], &sum, 4);
    }
  move_tile(kSumTile + kPair, reinterpret_cast<uint8_t*>(sums), 64, false);
}

#else

inline void begin_tiles(const TileConfig& config) {
  // gcc 12 takes only 8 of the 64 bytes for an input: without this it may drop the stores to the rest.
  __asm__ volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}
inline void end_tiles() { _tile_release(); }
template <int kPair>
inline void tile_product(const int8_t* left, int64_t left_stride, const uint8_t* right, int32_t* sums) {
  if constexpr (kPair == 0) {
    _tile_zero(0);
    _tile_loadd(2, left, left_stride);
    _tile_loadd(4, right, 64);
    _tile_dpbsud(0, 2, 4);
    _tile_stored(0, sums, 64);
  } else {
    _tile_zero(1);
    _tile_loadd(3, left, left_stride);
    _tile_loadd(5, right, 64);
    _tile_dpbsud(1, 3, 5);
    _tile_stored(1, sums, 64);
  }
}

#endif

}  // namespace strop::STROP_ISA
