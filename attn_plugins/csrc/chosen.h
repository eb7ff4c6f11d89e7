// Softmax attention over blocks of keys that each query has chosen: tiles of queries that share a block, head by head.
#pragma once

#include "softmax.h"

namespace attn_plugins {
namespace ISA {

// The tiles of one head.
struct HeadTiles {
  std::vector<Tile> tiles;
  std::vector<Block> blocks;
  std::vector<int32_t> index;
  std::vector<uint8_t> masks, ranges;

  HeadTiles(const Softmax& c, const Chosen& x, int64_t b, int64_t h) {
    const int64_t* chosen = x.chosen + (b * x.heads + h / (c.heads / x.heads)) * c.queries * x.width;
    std::vector<int32_t> start(x.number + 1, 0);
    for (int64_t i = 0; i < c.queries * x.width; i++)
      if (chosen[i] >= 0) start[chosen[i] + 1]++;
    for (int64_t n = 0; n < x.number; n++) start[n + 1] += start[n];
    index.resize(start[x.number]);
    std::vector<int32_t> at(start.begin(), start.end() - 1);
    for (int64_t i = 0; i < c.queries * x.width; i++)  // by block, and in each in the order of the queries
      if (chosen[i] >= 0) index[at[chosen[i]]++] = int32_t(i / x.width);
    for (int64_t n = 0; n < x.number; n++) {
      const int32_t first = x.first[b * x.number + n], keys = x.keys[b * x.number + n];
      for (int32_t q = start[n]; q < start[n + 1]; q += TILE) {
        Tile tile{0, 1, std::min(TILE, start[n + 1] - q), q, 0, int32_t(blocks.size()), 0};
        for (int32_t k = 0; k < keys; k += TILE) {
          Block block{first + k, 1, std::min(TILE, keys - k), -1, 0, -1, 0};
          if (partly_hidden(x, c, b, tile, block)) block.mask = mask(x, c, b, tile, block);
          blocks.push_back(block);
          tile.blocks++;
        }
        if (tile.blocks) tiles.push_back(tile);
      }
    }
  }
  bool seen(const Chosen& x, const Softmax& c, int64_t b, int32_t query, int32_t key) const {
    return !(x.causal && key > query + x.before) && !(x.padding && !x.padding[b * c.keys + key]);
  }
  bool partly_hidden(const Chosen& x, const Softmax& c, int64_t b, const Tile& tile, const Block& block) const {
    if (x.causal && index[tile.query_index] + x.before < block.key + block.keys - 1) return true;
    for (int32_t k = block.key; x.padding && k < block.key + block.keys; k++)
      if (!x.padding[b * c.keys + k]) return true;
    return false;
  }
  int32_t mask(const Chosen& x, const Softmax& c, int64_t b, const Tile& tile, const Block& block) {
    const int32_t number = int32_t(ranges.size() / RANGES);
    masks.resize((number + 1) * TILE * TILE, 0);
    ranges.resize((number + 1) * RANGES, 0);
    uint8_t *m = masks.data() + number * TILE * TILE, *r = ranges.data() + number * RANGES;
    for (int i = 0; i < 2 * GROUPS; i++) r[2 * i] = TILE;
    for (int key = 0; key < block.keys; key++)
      for (int query = 0; query < tile.rows; query++) {
        if (!seen(x, c, b, index[tile.query_index + query], block.key + key)) continue;
        m[key * TILE + query] = 1;
        uint8_t *queries = r + key / MR * 2, *keys = r + 2 * GROUPS + query / MR * 2;
        queries[0] = std::min<int>(queries[0], query), queries[1] = std::max<int>(queries[1], query + 1);
        keys[0] = std::min<int>(keys[0], key), keys[1] = std::max<int>(keys[1], key + 1);
      }
    return number;
  }
  // The call with these tiles.
  Softmax of(Softmax c) const {
    c.tiles = {tiles.data(), blocks.data(), index.data(), masks.data(), ranges.data(), int64_t(tiles.size()), true};
    return c;
  }
};

static void chosen_forward(const Softmax& c, const Chosen& x, Parallel parallel) {
  run(parallel, c.batch * c.heads, 1, [&](int64_t low, int64_t high) {
    for (int64_t i = low; i < high; i++) {
      const HeadTiles tiles(c, x, i / c.heads, i % c.heads);
      const Softmax call = tiles.of(c);
      const Forward f(call);
      f.merged(i / c.heads, i % c.heads, scratch(f.memory()));
    }
  });
}

static void chosen_backward(const SoftmaxBackward& d, const Chosen& x, Parallel parallel) {
  const Softmax& c = d.forward;
  const int64_t shared = c.heads / c.groups;
  run(parallel, c.batch * c.groups, 1, [&](int64_t low, int64_t high) {
    for (int64_t i = low; i < high; i++)
      for (int64_t h = i % c.groups * shared; h < (i % c.groups + 1) * shared; h++) {
        const HeadTiles tiles(c, x, i / c.groups, h);
        const Softmax call = tiles.of(c);
        backward_of_head(d, call, i / c.groups, h, 0, 0, call.tiles.number, scratch(memory_of_backward(c)));
      }
  });
}

}  // namespace ISA
}  // namespace attn_plugins
