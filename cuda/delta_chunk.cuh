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
// T, P and the decays depend on no state. They are found for all segments at once, T by substitution in f32: with beta up to
// 2 and keys of any length it is only as large as what tokens do to each other.
#pragma once
#include "delta_state.cuh"
#include "products.cuh"

namespace cla {

static_assert(CHUNK == CLA_DELTA_SEGMENT, "a segment is solved as one chunk");

// What is prepared for a segment and head, in bytes from its start: T and P as tiles, each the sum of two parts, and numbers
// of each step in f32.
struct Prepared {
  static constexpr int T = 0, P = 2 * SUBTILE, FACTORS = 4 * SUBTILE;
  static constexpr int FROM_START = 0, TO_END = CHUNK, BETA = 2 * CHUNK, WHOLE = 3 * CHUNK;  // floats
  static constexpr int BYTES = FACTORS + 1024;
  static_assert(BYTES == CLA_DELTA_PREPARED, "as the interface says");
};

// The steps of one segment, in the order of the sweep. A sequence is cut from its first token on, either way.
struct SegmentSteps {
  Steps steps;
  int64_t first;
  int count;

  CLA_DEVICE SegmentSteps(const cla_delta_sweep &s, int64_t sequence, int64_t segment)
      : steps(s.of.cu_seqlens, s.of.tokens, sequence, s.reverse) {
    const int64_t begin = segment * CHUNK, left = steps.count - begin;
    count = left < CHUNK ? (int)left : CHUNK;
    first = steps.start + (s.reverse ? begin + count - 1 : begin);
  }
  CLA_DEVICE int64_t token(int row) const { return steps.reverse ? first - row : first + row; }
};

// The rows of a segment, `width` of up to WIDTH columns, into a tile; zeros elsewhere. By THREADS threads, of which this is
// `tid`. Copies are to be committed and waited for.
template <int WIDTH, int THREADS, class Piece>
CLA_DEVICE void fetch_rows(Piece piece, const Rows &rows, const SegmentSteps &at, int width, int tid) {
  const bool pieces = rows.in_pieces(width);
  CLA_UNROLL_TWICE
  for (int i = tid; i < CHUNK * (WIDTH / 8); i += THREADS) {
    const int row = i / (WIDTH / 8), c = i % (WIDTH / 8) * 8;
    unsigned char *to = piece(row, c);
    const bool valid = row < at.count && c < width;
    if (pieces) {
      copy16_async(to, rows.data + (valid ? (at.token(row) * rows.token + c) * 2 : 0), valid);
    } else {
      uint32_t x[4];
      CLA_UNROLL
      for (int k = 0; k < 4; k++) {
        float pair[2];
        CLA_UNROLL
        for (int j = 0; j < 2; j++) pair[j] = valid && c + 2 * k + j < width ? rows.load(at.token(row), c + 2 * k + j) : 0.f;
        x[k] = pack_bf16(pair[0], pair[1]);
      }
      store16(to, {x[0], x[1], x[2], x[3]});
    }
  }
}

}  // namespace cla
