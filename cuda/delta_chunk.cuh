// What the two kernels of the chunked delta sweep share. In matrix form (the WY or UT transform), with the steps of a segment
// as rows, g what fades between them, X the state before, and
//
//     L_ts = k_t . k_s exp(g_{s+1} + ... + g_t)  for s < t        forwards P_ts = q_t . k_s exp(...)  for s <= t
//                                                                 in reverse     k_t . q_s
//     T    = (1 + L diag(beta))^-1
//
// a segment of a delta sweep (see delta.h) is
//
//     forwards     m = T (V - exp(g_0 + ... + g_t) K X)       O = s (exp(...) Q X + P c)     c = beta m
//     in reverse   m = T (s P dO + exp(...) K X)              dV = -c                        c = -beta m
//     X = exp(all) X + sum_s exp(g_{s+1} + ...) (k_s c_s^T [+ s q_s do_s^T])
//
// T, P and the decays depend on no state. They are found for all segments at once, T by substitution, with all bits of f32: with
// beta up to 2 and keys of any length it is only as large as what tokens do to each other.
#pragma once
#include <type_traits>

#include "delta_segments.cuh"
#include "products.cuh"

namespace cla {

static_assert(CHUNK == CLA_DELTA_SEGMENT, "a segment is solved as one chunk");

// What is prepared for a segment and head, in bytes from its start: T and P as tiles, each the sum of two parts, and numbers
// of each step in f32. What is above the blocks of 16 on the diagonal of a tile has a place but is not written.
struct Prepared {
  static constexpr int T = 0, P = 2 * SUBTILE, FACTORS = 4 * SUBTILE;
  static constexpr int FROM_START = 0, TO_END = CHUNK, BETA = 2 * CHUNK, WHOLE = 3 * CHUNK;  // floats
  // With a decay by channel keys have all but this multiplied in.
  static constexpr int WHOLE_BY_CHANNEL = 0;
  static constexpr int BYTES = FACTORS + 1024;
  static_assert(WHOLE_BY_CHANNEL + 128 <= BETA && WHOLE < 256, "numbers have room");
};
// With a decay by channel these follow, tiles in two parts each: keys with the decay since the start of the segment, which
// meet the state before, keys with the decay to its end, which are written, and q, which in reverse is written too, scaled.
template <int R> struct PreparedKeys {
  static constexpr int EACH = 2 * R * 128, READS = 0, QUERIES = EACH, WRITES = 2 * EACH, BYTES = 3 * EACH;
};
// Without one, of f16: k and q, each the sum of two bf16, which f16 is.
template <int R> struct PreparedPlainKeys {
  static constexpr int EACH = 2 * R * 128, K = 0, Q = EACH, BYTES = 2 * EACH;
};

// In the low-rank family, where r1 to x2 are those of delta.h with all decays since the start of the segment or to its end, and
//
//     m = T (L V + r1 X)      out = r2 X + P m + N V      X = exp(all) X + sum_s (x1_s v_s^T + x2_s m_s^T)
//
// a segment has P as above, then L and N, tiles in two parts each, then keys, the same.
template <int R> struct PreparedLowRank {
  static constexpr int EACH = 2 * R * 128, L = 0, N = 2 * SUBTILE, KEYS = 4 * SUBTILE;
  static constexpr int R1 = KEYS, R2 = KEYS + EACH, X1 = KEYS + 2 * EACH, X2 = KEYS + 3 * EACH, BYTES = KEYS + 4 * EACH;
};

// The steps of one segment, in the order of the sweep. A sequence is cut from its first token on, either way.
struct SegmentSteps {
  Steps steps;
  int64_t first;
  int count;

  CLA_DEVICE SegmentSteps(const Steps &steps, int64_t segment) : steps(steps) {
    const int64_t begin = segment * CHUNK, left = steps.count - begin;
    count = left < CHUNK ? (int)left : CHUNK;
    first = steps.start + (steps.reverse ? begin + count - 1 : begin);
  }
  CLA_DEVICE SegmentSteps(const cla_delta_problem &of, int64_t sequence, int64_t segment, bool reverse)
      : SegmentSteps(Steps(of.cu_seqlens, of.tokens, sequence, reverse), segment) {}
  CLA_DEVICE int64_t token(int row) const { return steps.reverse ? first - row : first + row; }
};

// What a gate with a number for each step leaves between any two steps of a segment, as exponents of 2. Logarithms are summed up
// from one step to another, in two parts that meet where their halves do: a difference of two sums would be one of large
// numbers, or of infinities.
struct GateSums {
  static constexpr int LEVELS = 6, HALF = CHUNK / 2, BYTES = LEVELS * 2 * 4 * CHUNK;
  float *sums;

  // Steps are halves of halves, down to one. The sums of the gates from the start of a step's part of 2^level steps up to and
  // with its own, and from there to the part's end.
  CLA_DEVICE float *until(int level) const { return sums + 2 * level * CHUNK; }
  CLA_DEVICE float *since(int level) const { return until(level) + CHUNK; }

  // By the first CHUNK threads, each with the gate of its step. To be followed by a barrier.
  CLA_DEVICE void sum(int step, float gate) const {
    float left = 0.f;
    gate *= 1.4426950408889634f;
    CLA_UNROLL
    for (int level = 0; level < LEVELS; level++) {
      until(level)[step] = gate;
      since(level)[step] = left;
      if (level == LEVELS - 1) break;
      const int half = 1 << level, lane = step & 31;
      const float other = shuffle(gate, (lane | (half - 1)) ^ half);
      if (lane & half) gate += other;
      else left += other;
    }
  }

  // What is left of the start of the segment after a step, of the step at the end, and of the start there.
  CLA_DEVICE float from_start(int step) const {
    const float *last = until(LEVELS - 1);
    return step < HALF ? last[step] : last[HALF - 1] + last[step];
  }
  CLA_DEVICE float to_end(int step) const {
    const float left = since(LEVELS - 1)[step];
    return step < HALF ? left + until(LEVELS - 1)[CHUNK - 1] : left;
  }
  CLA_DEVICE float all() const { return from_start(CHUNK - 1); }
  // Of an earlier step at a later one; `level` is that of the halves they are in.
  CLA_DEVICE float between(int later, int earlier, int level) const { return since(level)[earlier] + until(level)[later]; }
  CLA_DEVICE float between(int later, int earlier) const { return between(later, earlier, highest_bit(later ^ earlier)); }
};

// What gates with a number for each of up to R channels leave at each step of a segment, or at the one so many steps before it, to
// the floats of row(step): 1 where there is none. By THREADS threads.
template <int R, int THREADS, class Row>
CLA_DEVICE void load_decays(const Rows &gate, const SegmentSteps &at, int before, int width, int tid, Row row) {
  constexpr int PER_ROW = R / 4, EVERY = THREADS / PER_ROW, BATCH = CHUNK / EVERY < 8 ? CHUNK / EVERY : 8;
  const int own = tid / PER_ROW, channel = tid % PER_ROW * 4, size = gate.size();
  const bool wide = gate.dtype == CLA_F32, f16 = gate.dtype == CLA_F16;
  auto valid = [&](int step) { return step >= before && step < at.count; };
  if (!gate.in_pieces(width)) {
    CLA_NO_UNROLL
    for (int n = 4 * own; n < 4 * CHUNK; n += n % 4 == 3 ? 4 * EVERY - 3 : 1) {
      const int step = n / 4, c = channel + n % 4;
      row(step)[c] = valid(step) && c < width ? exp_fast(gate.load(at.token(step - before), c)) : 1.f;
    }
    return;
  }
  const unsigned char *from = gate.data + channel * size;
  CLA_NO_UNROLL
  for (int first = own; first < CHUNK; first += BATCH * EVERY) {
    // As they lie in memory, so that all loads are under way before one is looked at.
    Vec4 x[BATCH];
    CLA_UNROLL
    for (int i = 0; i < BATCH; i++) {
      const int step = first + i * EVERY;
      x[i] = Vec4{0, 0, 0, 0};
      if (!valid(step) || channel >= width) continue;
      const unsigned char *p = from + at.token(step - before) * gate.token * size;
      if (wide) {
        x[i] = load16(p);
      } else {
        const Vec2 two = *(const Vec2 *)p;
        x[i].x = two.x, x[i].y = two.y;
      }
    }
    CLA_UNROLL
    for (int i = 0; i < BATCH; i++) {
      const uint32_t words[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
      float left[4];
      CLA_UNROLL
      for (int k = 0; k < 4; k += 2) {
        float two[2] = {bits_to_float(words[k]), bits_to_float(words[k + 1])};
        if (f16) unpack_pair<CLA_F16>(two, words[k / 2]);
        else if (!wide) unpack_pair<CLA_BF16>(two, words[k / 2]);
        left[k] = exp_fast(two[0]), left[k + 1] = exp_fast(two[1]);
      }
      store4(row(first + i * EVERY) + channel, left);
    }
  }
}

// Two neighbours in f16 as the sum of two in bf16, which they are.
CLA_DEVICE void split_half(uint32_t &high, uint32_t &rest, uint32_t pair) {
  float x[2];
  unpack_pair<CLA_F16>(x, pair);
  high = pack_bf16(x[0], x[1]);
  rest = pack_rest(high, x[0], x[1]);
}

// The rows of a segment, `width` of up to WIDTH columns of 16 bits, to a tile as they are; zeros elsewhere. By THREADS threads, of
// which this is `tid`, each of which has the same piece of every EVERY-th row, so that one address and one stride lead to all.
template <int WIDTH, int THREADS> struct TileRows {
  static constexpr int EVERY = THREADS / (WIDTH / 8), EACH = CHUNK / EVERY;
  static_assert(EVERY % 8 == 0 && EACH * EVERY == CHUNK, "pieces cover the rows");

  // Whatever lies between elements: rare, and out of the way of other instructions.
  CLA_COLD static void fetch_apart(Tile tile, Rows rows, SegmentSteps at, int width, int tid) {
    const int first = tid / (WIDTH / 8), c = tid % (WIDTH / 8) * 8;
    const uint16_t *from = (const uint16_t *)rows.data;
    CLA_NO_UNROLL
    for (int n = 0; n < 4 * EACH; n++) {
      const int row = first + n / 4 * EVERY, column = c + n % 4 * 2;
      uint32_t pair = 0;
      CLA_UNROLL
      for (int j = 0; j < 2; j++) {
        if (!from || row >= at.count || column + j >= width) continue;
        pair |= (uint32_t)from[at.token(row) * rows.token + (column + j) * rows.element] << (16 * j);
      }
      *(uint32_t *)tile.element(row, column) = pair;
    }
  }
  // Copies are to be committed and waited for.
  CLA_DEVICE static void fetch(Tile tile, const Rows &rows, const SegmentSteps &at, int width, int tid) {
    if (!rows.in_pieces(width)) return fetch_apart(tile, rows, at, width, tid);
    const int first = tid / (WIDTH / 8), c = tid % (WIDTH / 8) * 8;
    unsigned char *to = tile.piece(first, c / 8);
    const unsigned char *from = rows.data + (at.token(first) * rows.token + c) * 2;
    const int64_t stride = (at.steps.reverse ? -2 : 2) * EVERY * rows.token;
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      copy16_async(to + i * EVERY * 128, from + i * stride, c < width && first + i * EVERY < at.count);
    }
  }
};

// ---- on the side of the launch: what kernels in matrix form are for ----

// Whether all inputs of a call have one dtype of 16 bits.
inline bool in_16_bits(const cla_delta_problem &of, const cla_tensor &value, const cla_tensor &other) {
  for (const cla_tensor &x : {of.q, of.a, of.b, value, other}) {
    if (x.data && x.dtype != of.k.dtype) return false;
  }
  return of.k.dtype != CLA_F32;
}
// Calls `f` with that dtype, and with the rows that a state of up to 128 is padded to, as types.
template <class F> auto by_16_bits(int32_t dtype, F f) {
  return dtype == CLA_F16 ? f(std::integral_constant<int, CLA_F16>()) : f(std::integral_constant<int, CLA_BF16>());
}
template <class F> auto by_rows(int32_t k_dim, F f) {
  return k_dim <= 64 ? f(std::integral_constant<int, 64>()) : f(std::integral_constant<int, 128>());
}

}  // namespace cla
