// Rotary position embedding. A thread has a few channels of one token, and their angles, in CLA_ROTARY_HEADS heads.
#include "vectors.cuh"

namespace cla {

constexpr int ROTARY_THREADS = CLA_ROTARY_THREADS, ROTARY_HEADS = CLA_ROTARY_HEADS;

// What a thread takes of a head: a vector of each half, or one of the channels that are not rotated.
CLA_ANYWHERE int64_t vectors_of(int channels, int each) { return (channels + each - 1) / each; }

template <int DTYPE, bool WHOLE> CLA_KERNEL(ROTARY_THREADS, 4) void rotary_kernel(cla_rotary c) {
  constexpr int N = IN_16_BYTES<DTYPE>;
  using V = Vector<DTYPE, N, WHOLE>;
  const int rotated = (int)vectors_of(c.half, N), vectors = rotated + (int)vectors_of(c.width - 2 * c.half, N);
  int64_t piece, group, token;
  int64_t rest = divided(block_x() * (int64_t)ROTARY_THREADS + thread_index(), vectors, piece);
  rest = divided(rest, (c.heads + ROTARY_HEADS - 1) / ROTARY_HEADS, group);
  const int64_t batch = divided(rest, c.tokens, token);
  if (batch >= c.batch) return;
  const int first = (int)group * ROTARY_HEADS;
  const bool copies = piece >= rotated;
  const int d = (int)(copies ? 2 * c.half + (piece - rotated) * N : piece * N);
  const int end = copies ? c.width : c.half;
  V x[2][ROTARY_HEADS];
  CLA_UNROLL
  for (int h = 0; h < ROTARY_HEADS; h++) {
    if (first + h >= c.heads) continue;
    const Rows rows(c.x, batch, first + h);
    x[0][h].load(rows, token, d, end);
    if (!copies) x[1][h].load(rows, token, c.half + d, 2 * c.half);
  }
  if (!copies) {
    const float position = (float)(c.positions ? c.positions[batch * c.tokens + token] : c.first + token);
    float cosine[N], sine[N];
    CLA_UNROLL
    for (int i = 0; i < N; i++) {
      // The product is rounded to f32, as where the checkpoints were trained.
      const float angle = d + i < c.half ? position * c.frequencies[d + i] : 0.f;
      cosine[i] = cosf(angle) * c.factor;
      sine[i] = sinf(angle) * (c.backwards ? -c.factor : c.factor);
    }
    CLA_UNROLL
    for (int h = 0; h < ROTARY_HEADS; h++) {
      float y1[N], y2[N];
      CLA_UNROLL
      for (int i = 0; i < N; i++) {
        y1[i] = x[0][h][i] * cosine[i] - x[1][h][i] * sine[i];
        y2[i] = x[1][h][i] * cosine[i] + x[0][h][i] * sine[i];
      }
      x[0][h].set(y1);
      x[1][h].set(y2);
    }
  }
  CLA_UNROLL
  for (int h = 0; h < ROTARY_HEADS; h++) {
    if (first + h >= c.heads) continue;
    const Rows rows(c.out, batch, first + h);
    x[0][h].store(rows, token, d, end);
    if (!copies) x[1][h].store(rows, token, c.half + d, 2 * c.half);
  }
}

inline int32_t launch_rotary(const cla_rotary &c, void *stream) {
  return by_dtype(c.x.dtype, [&](auto dtype) {
    constexpr int DTYPE = decltype(dtype)::value, N = IN_16_BYTES<DTYPE>;
    const bool whole = c.half % N == 0 && in_pieces(c.x, c.width) && in_pieces(c.out, c.width);
    const int64_t groups = (c.heads + ROTARY_HEADS - 1) / ROTARY_HEADS;
    const int64_t threads = (vectors_of(c.half, N) + vectors_of(c.width - 2 * c.half, N)) * groups * c.tokens * c.batch;
    const Dims grid = {(threads + ROTARY_THREADS - 1) / ROTARY_THREADS, 1};
    return launch(whole ? rotary_kernel<DTYPE, true> : rotary_kernel<DTYPE, false>, grid, ROTARY_THREADS, 0, stream, c);
  });
}

}  // namespace cla

extern "C" int32_t cla_rotate(const cla_rotary *call, void *stream) { return cla::launch_rotary(*call, stream); }
