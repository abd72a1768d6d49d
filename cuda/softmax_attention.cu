// Causal softmax attention, see `cla_attention` in layers.h: the layers of hybrid models beside those of linear attention.
//
// A warpgroup has 64 rows, queries of the heads that share a key-value head, and goes over tiles of 64 keys: scores, weights
// relative to the largest score so far, and the sum of the values with these weights, all in registers (Dao et al., 2022). What
// the scores accumulate is the operand of the product with the values in the same registers.
#include "layers.h"
#include "elements.cuh"
#include "products.cuh"

namespace cla {

// Heads have up to WIDTH channels. A block has GROUPS warpgroups, and keys and values of STAGES tiles: with two of them one is
// copied while the other is read.
template <int WIDTH, int GROUPS, int STAGES_> struct AttentionLayout {
  static constexpr int R = WIDTH, THREADS = 128 * GROUPS, ROWS = CHUNK * GROUPS, STAGES = STAGES_;
  static constexpr int TILE = R * 128, STAGE = 2 * TILE, FIRST_STAGE = GROUPS * TILE, SHARED = FIRST_STAGE + STAGES * STAGE;
};

static_assert(CHUNK == CLA_ATTENTION_KEYS, "keys come in tiles");

template <class L> struct Attention {
  static constexpr int R = L::R, COLUMNS = R < 128 ? R : 128, PARTS = R / COLUMNS, STEPS = CHUNK / 16;
  static constexpr bool WGMMA = HAS_WGMMA;

  const cla_attention &s;
  unsigned char *shared;
  int tid, group, pair, split, kv_head, shares;  // shares: heads that share the key-value head
  int64_t rows, first_row, past;                 // rows: of the key-value head, queries times heads
  int begin, end;                                // tiles of keys
  int row[2];                                    // this thread's, within the block
  float out[PARTS][COLUMNS / 8][4], most[2], sum[2];

  CLA_DEVICE Attention(const cla_attention &s) : s(s), shared(shared_memory()) {
    tid = thread_index();
    group = tid >> 7;
    pair = (tid & 3) * 2;
    shares = s.heads / s.kv_heads;
    rows = s.tokens * shares;
    past = s.keys - s.tokens;
    split = block_x() % s.splits;
    kv_head = block_x() / s.splits % s.kv_heads;
    // Those that see the most keys begin first.
    const int64_t tiles = (rows + L::ROWS - 1) / L::ROWS;
    first_row = (tiles - 1 - block_x() / s.splits / s.kv_heads) * L::ROWS;
    const int64_t seen = limit(first_row + L::ROWS - 1) + 1, key_tiles = (seen + CHUNK - 1) / CHUNK;
    begin = (int)(key_tiles * split / s.splits);
    end = (int)(key_tiles * (split + 1) / s.splits);
    for (int h = 0; h < 2; h++) row[h] = CHUNK * group + 16 * ((tid >> 5) & 3) + ((tid & 31) >> 2) + 8 * h;
  }

  CLA_ANYWHERE static Dims grid(const cla_attention &s) {
    const int64_t rows = s.tokens * (s.heads / s.kv_heads);
    return {(rows + L::ROWS - 1) / L::ROWS * s.kv_heads * s.splits, 1};
  }

  // The last key that a row sees; rows behind the last one see what that sees.
  CLA_DEVICE int64_t limit(int64_t row) const { return past + (row < rows ? row : rows - 1) / shares; }
  CLA_DEVICE Tile queries(int group) const { return {shared + group * L::TILE}; }
  CLA_DEVICE Tile keys(int i) const { return {shared + L::FIRST_STAGE + i % L::STAGES * L::STAGE}; }
  CLA_DEVICE Tile values(int i) const { return {keys(i).base + L::TILE}; }

  // Rows of a tile, of `width` columns, from the address that at(row) gives, or zeros where that is null. Copies are to be
  // committed and waited for.
  template <class At> CLA_DEVICE void fetch(Tile to, int width, int64_t element, bool in_pieces, At at) const {
    if (in_pieces) {
      CLA_UNROLL_TWICE
      for (int n = 0; n < CHUNK * (R / 8) / L::THREADS; n++) {
        const int index = tid + n * L::THREADS, row = index / (R / 8), piece = index % (R / 8);
        const unsigned char *from = at(row);
        const bool valid = from && 8 * piece < width;
        copy16_async(to.piece(row, piece), valid ? from + 16 * piece : (const unsigned char *)s.q.data, valid);
      }
      return;
    }
    CLA_NO_UNROLL
    for (int index = tid; index < CHUNK * R; index += L::THREADS) {
      const int row = index / R, column = index % R;
      const unsigned char *from = at(row);
      *to.element(row, column) = from && column < width ? ((const uint16_t *)from)[column * element] : 0;
    }
  }
  CLA_DEVICE void fetch_queries() const {
    for (int g = 0; g < L::ROWS / CHUNK; g++) {
      fetch(queries(g), s.k_dim, s.q.element, whole(s.q, s.k_dim), [&](int row) -> const unsigned char * {
        const int64_t index = first_row + CHUNK * g + row;
        if (index >= rows) return nullptr;
        const int64_t token = index / shares, head = kv_head * shares + index % shares;
        return (const unsigned char *)s.q.data + 2 * (token * s.q.token + head * s.q.head);
      });
    }
  }
  CLA_DEVICE void fetch_keys(int i) const {
    if (i < end) {
      fetch_tile(keys(i), s.k, s.k_dim, i);
      fetch_tile(values(i), s.v, s.v_dim, i);
    }
    copies_commit();
  }
  CLA_DEVICE void fetch_tile(Tile to, const cla_tensor &x, int width, int i) const {
    const unsigned char *from = (const unsigned char *)x.data + 2 * kv_head * x.head;
    fetch(to, width, x.element, whole(x, width), [&](int row) -> const unsigned char * {
      const int64_t key = (int64_t)i * CHUNK + row;
      return key < s.keys ? from + 2 * key * x.token : nullptr;
    });
  }
  // Whether rows of `width` can be moved 16 bytes at a time.
  CLA_DEVICE static bool whole(const cla_tensor &x, int width) {
    return x.element == 1 && ((width | x.token | x.head) & 7) == 0 && ((uintptr_t)x.data & 15) == 0;
  }

  // One tile of keys.
  CLA_DEVICE void add(int i) {
    float p[CHUNK / 8][4];
    CLA_UNROLL
    for (int j = 0; j < CHUNK / 8; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) p[j][e] = opaque(0.f);
    }
    products_fence<WGMMA>();
    add_rows_by_rows<WGMMA, CHUNK>(p, queries(group), keys(i), 0, R);
    products_commit<WGMMA>();
    products_wait<WGMMA, 0>();
    const float to_log2 = s.scale * 1.4426950408889634f;
    const int64_t first = (int64_t)i * CHUNK;
    const bool masked = first + CHUNK - 1 > limit(first_row);
    CLA_UNROLL
    for (int h = 0; h < 2; h++) {
      const int64_t last = limit(first_row + row[h]) - first;
      float largest = -INFINITY;
      CLA_UNROLL
      for (int j = 0; j < CHUNK / 8; j++) {
        CLA_UNROLL
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          p[j][e] *= to_log2;
          if (masked && 8 * j + pair + (e & 1) > last) p[j][e] = -INFINITY;
          largest = larger(largest, p[j][e]);
        }
      }
      largest = larger(largest, shuffle_xor(largest, 1));
      largest = larger(most[h], larger(largest, shuffle_xor(largest, 2)));
      // Nothing seen so far: any finite number does.
      const float from = largest == -INFINITY ? 0.f : largest, left = exp2_fast(most[h] - from);
      most[h] = largest;
      sum[h] *= left;
      CLA_UNROLL
      for (int j = 0; j < CHUNK / 8; j++) {
        CLA_UNROLL
        for (int e = 2 * h; e < 2 * h + 2; e++) {
          p[j][e] = exp2_fast(p[j][e] - from);
          sum[h] += p[j][e];
        }
      }
      CLA_UNROLL
      for (int part = 0; part < PARTS; part++) {
        CLA_UNROLL
        for (int j = 0; j < COLUMNS / 8; j++) out[part][j][2 * h] *= left, out[part][j][2 * h + 1] *= left;
      }
    }
    uint32_t weights[STEPS][4];
    CLA_UNROLL
    for (int k = 0; k < STEPS; k++) to_a<CHUNK>(weights[k], p, 16 * k);
    products_fence<WGMMA>();
    CLA_UNROLL
    for (int k = 0; k < STEPS; k++) {
      CLA_UNROLL
      for (int part = 0; part < PARTS; part++) {
        add_parts_by_columns<WGMMA, COLUMNS>(out[part], values(i).from_column(part * COLUMNS), 16 * k, weights[k]);
      }
    }
    products_commit<WGMMA>();
    products_wait<WGMMA, 0>();
  }

  // f(column, element of this thread's row h, the next one's) for all columns of the values.
  template <class F> CLA_DEVICE void each_pair(int h, F f) const {
    CLA_UNROLL
    for (int part = 0; part < PARTS; part++) {
      CLA_UNROLL
      for (int j = 0; j < COLUMNS / 8; j++) f(part * COLUMNS + 8 * j + pair, out[part][j][2 * h], out[part][j][2 * h + 1]);
    }
  }
  CLA_DEVICE void store() {
    CLA_UNROLL
    for (int h = 0; h < 2; h++) {
      sum[h] += shuffle_xor(sum[h], 1);
      sum[h] += shuffle_xor(sum[h], 2);
      const int64_t index = first_row + row[h];
      if (index >= rows) continue;
      const int64_t token = index / shares, head = kv_head * shares + index % shares;
      if (s.splits > 1) {
        float *to = s.partial + ((split * s.tokens + token) * s.heads + head) * (s.v_dim + 2);
        each_pair(h, [&](int column, float x, float y) {
          if (column < s.v_dim) to[column] = x;
          if (column + 1 < s.v_dim) to[column + 1] = y;
        });
        if (pair == 0) to[s.v_dim] = most[h], to[s.v_dim + 1] = sum[h];
        continue;
      }
      uint16_t *to = (uint16_t *)s.out.data + token * s.out.token + head * s.out.head;
      const float by = 1.f / sum[h];
      const bool pairs = s.v_dim % 2 == 0;
      each_pair(h, [&](int column, float x, float y) {
        const uint32_t both = pack_bf16(x * by, y * by);
        if (pairs && column < s.v_dim) {
          *(uint32_t *)(to + column) = both;
        } else if (column < s.v_dim) {
          to[column] = (uint16_t)both;
          if (column + 1 < s.v_dim) to[column + 1] = (uint16_t)(both >> 16);
        }
      });
    }
  }

  CLA_DEVICE void run() {
    CLA_UNROLL
    for (int h = 0; h < 2; h++) most[h] = -INFINITY, sum[h] = 0.f;
    CLA_UNROLL
    for (int part = 0; part < PARTS; part++) {
      CLA_UNROLL
      for (int j = 0; j < COLUMNS / 8; j++) {
        CLA_UNROLL
        for (int e = 0; e < 4; e++) out[part][j][e] = 0.f;
      }
    }
    fetch_queries();
    fetch_keys(begin);
    const bool used = first_row + CHUNK * group < rows;
    CLA_NO_UNROLL
    for (int i = begin; i < end; i++) {
      copies_wait<0>();
      shared_fence();
      barrier();
      if (L::STAGES > 1) fetch_keys(i + 1);
      if (used) add(i);
      if (L::STAGES == 1) {
        barrier();
        fetch_keys(i + 1);
      }
    }
    copies_wait<0>();
    store();
  }
};

template <class L> CLA_KERNEL(L::THREADS, 1) void softmax_attention_kernel(const CLA_CONSTANT cla_attention s) {
  Attention<L>(s).run();
}

// The parts of a row, a block a row.
CLA_KERNEL(128, 1) void attention_parts_kernel(const CLA_CONSTANT cla_attention s) {
  const int64_t row = block_x(), rows = s.tokens * s.heads, pitch = s.v_dim + 2;
  const float *part = s.partial + row * pitch;
  float most = -INFINITY, weights = 0.f;
  for (int i = 0; i < s.splits; i++) most = larger(most, part[i * rows * pitch + s.v_dim]);
  for (int i = 0; i < s.splits; i++) {
    const float *numbers = part + i * rows * pitch + s.v_dim;
    weights += exp2_fast(numbers[0] - most) * numbers[1];
  }
  uint16_t *to = (uint16_t *)s.out.data + row / s.heads * s.out.token + row % s.heads * s.out.head;
  for (int column = thread_index(); column < s.v_dim; column += 128) {
    float x = 0.f;
    for (int i = 0; i < s.splits; i++) {
      const float *numbers = part + i * rows * pitch;
      x += exp2_fast(numbers[s.v_dim] - most) * numbers[column];
    }
    to[column] = to_bf16(x / weights);
  }
}

// Calls `f` with the layout that a call takes, or returns `none`.
template <class F, class T> T with_attention_layout(const cla_attention &s, T none, F f) {
  auto bf16 = [](const cla_tensor &x) { return x.dtype == CLA_BF16; };
  const int width = s.k_dim > s.v_dim ? s.k_dim : s.v_dim;
  if (!bf16(s.q) || !bf16(s.k) || !bf16(s.v) || !bf16(s.out) || width > 256) return none;
  auto fits = [&](auto layout) { return decltype(layout)::SHARED <= s.shared_limit; };
  if (width <= 64) {
    const AttentionLayout<64, 2, 2> layout;
    return fits(layout) ? f(layout) : none;
  }
  if (width <= 128) {
    const AttentionLayout<128, 2, 2> layout;
    return fits(layout) ? f(layout) : none;
  }
  const AttentionLayout<256, 2, 2> large;
  if (fits(large)) return f(large);
  const AttentionLayout<256, 1, 1> small;
  return fits(small) ? f(small) : none;
}

template <class L> int32_t launch_softmax_attention(L, const cla_attention &s, void *stream) {
  return launch(softmax_attention_kernel<L>, Attention<L>::grid(s), L::THREADS, L::SHARED, stream, s);
}

}  // namespace cla

extern "C" int32_t cla_softmax_attention_rows(const cla_attention *call) {
  return cla::with_attention_layout(*call, 0, [](auto layout) -> int32_t { return decltype(layout)::ROWS; });
}

extern "C" int32_t cla_softmax_attention(const cla_attention *call, void *stream) {
  const cla_attention &s = *call;
  const int32_t failed = cla::with_attention_layout(
      s, -1, [&](auto layout) { return cla::launch_softmax_attention(layout, s, stream); });
  if (failed || s.splits == 1) return failed;
  return cla::launch(cla::attention_parts_kernel, cla::Dims{s.tokens * s.heads, 1}, 128, 0, stream, s);
}
