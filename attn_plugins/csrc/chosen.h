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
    for (int64_t q = 0; q < c.queries; q++, chosen += x.width)  // by block, and in each in the order of the queries
      for (int64_t i = 0; i < x.width; i++)
        if (chosen[i] >= 0) index[at[chosen[i]]++] = int32_t(q);
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
  bool partly_hidden(const Chosen& x, const Softmax& c, int64_t b, const Tile& tile, const Block& block) const {
    if (x.causal && index[tile.query_index] + x.before < block.key + block.keys - 1) return true;
    for (int32_t k = block.key; x.padding && k < block.key + block.keys; k++)
      if (!x.padding[b * c.keys + k]) return true;
    return false;
  }
  int32_t mask(const Chosen& x, const Softmax& c, int64_t b, const Tile& tile, const Block& block) {
    const int64_t number = ranges.size() / RANGES;
    masks.resize((number + 1) * TILE * TILE, 0);
    ranges.resize((number + 1) * RANGES, 0);
    uint8_t *m = masks.data() + number * TILE * TILE, *r = ranges.data() + number * RANGES;
    for (int i = 0; i < 2 * GROUPS; i++) r[2 * i] = TILE;
    const int32_t* query = index.data() + tile.query_index;
    int first = 0;  // the first query that sees a key: the later the key, the later it is
    for (int key = 0; key < block.keys; key++) {
      while (x.causal && first < tile.rows && query[first] + x.before < block.key + key) first++;
      if (first == tile.rows) break;
      if (x.padding && !x.padding[b * c.keys + block.key + key]) continue;
      memset(m + key * TILE + first, 1, tile.rows - first);
      uint8_t *queries = r + key / MR * 2, *keys = r + 2 * GROUPS;
      queries[0] = std::min<int>(queries[0], first), queries[1] = tile.rows;
      for (int set = first / MR; set * MR < tile.rows; set++)
        keys[2 * set] = std::min<int>(keys[2 * set], key), keys[2 * set + 1] = key + 1;
    }
    return int32_t(number);
  }
  // The call with these tiles.
  Softmax of(Softmax c) const {
    c.tiles = {tiles.data(), blocks.data(), index.data(), masks.data(), ranges.data(), int64_t(tiles.size()), true};
    return c;
  }
};

// Queries of a head are gathered, and their sums added to, many times over: they are kept side by side for that.
static View side_by_side(std::vector<float>& held, int64_t tokens, int64_t size) {
  held.resize(tokens * size);
  return {held.data(), 0, 0, size};
}
static void copy_rows(const View& from, const View& to, int64_t b, int64_t h, int64_t tokens, int64_t size) {
  for (int64_t t = 0; t < tokens; t++) memcpy(to.at(b, h, t), from.at(b, h, t), sizeof(float) * size);
}

static void chosen_forward(const Softmax& c, const Chosen& x, Parallel parallel) {
  run(parallel, c.batch * c.heads, 1, [&](int64_t low, int64_t high) {
    std::vector<float> queries, sums;
    for (int64_t i = low; i < high; i++) {
      const int64_t b = i / c.heads, h = i % c.heads;
      const HeadTiles tiles(c, x, b, h);
      Softmax call = tiles.of(c);
      call.q = side_by_side(queries, c.queries, c.size);
      call.out = side_by_side(sums, c.queries, c.value_size);
      copy_rows(c.q, call.q, b, h, c.queries, c.size);
      const Forward f(call);
      f.merged(b, h, scratch(f.memory()), c.out);
    }
  });
}

static void chosen_backward(const SoftmaxBackward& d, const Chosen& x, Parallel parallel) {
  const Softmax& c = d.forward;
  const int64_t shared = c.heads / c.groups;
  run(parallel, c.batch * c.groups, 1, [&](int64_t low, int64_t high) {
    std::vector<float> queries, gradients, dq, products(c.queries);
    for (int64_t i = low; i < high; i++)
      for (int64_t h = i % c.groups * shared; h < (i % c.groups + 1) * shared; h++) {
        const int64_t b = i / c.groups;
        const HeadTiles tiles(c, x, b, h);
        SoftmaxBackward call = d;
        call.forward = tiles.of(c);
        call.forward.q = side_by_side(queries, c.queries, c.size);
        call.grad = side_by_side(gradients, c.queries, c.value_size);
        call.dq = side_by_side(dq, c.queries, c.size);
        std::fill(dq.begin(), dq.end(), 0.f);
        copy_rows(c.q, call.forward.q, b, h, c.queries, c.size);
        copy_rows(d.grad, call.grad, b, h, c.queries, c.value_size);
        for (int64_t t = 0; t < c.queries; t++)
          products[t] = product_of_rows(call.grad.at(b, h, t), c.out.at(b, h, t), c.value_size);
        backward_of_head(call, call.forward, b, h, 0, 0, call.forward.tiles.number, scratch(memory_of_backward(c)),
                         products.data());
        copy_rows(call.dq, d.dq, b, h, c.queries, c.size);
      }
  });
}

}  // namespace ISA
}  // namespace attn_plugins
