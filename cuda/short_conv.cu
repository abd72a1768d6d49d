// The short convolution. A lane has a few neighbouring channels and a warp goes over a piece of the tokens, with the last W
// inputs in registers: each number is read once, but for the W - 1 tokens around a piece, which its neighbours have in the
// cache. In the backward pass the gradients of the last W sums are in registers as well, and with them the gradient of the
// input W - 1 tokens ago.
#include "vectors.cuh"

namespace cla {

constexpr int CONV_THREADS = 32 * CLA_CONV_PIECES;
// Tokens whose loads are under way at once.
constexpr int CONV_AHEAD = 4;

// Channels of a thread in the backward pass, which keeps four numbers for each channel and tap. Forwards: 16 bytes.
constexpr int FEW = CLA_CONV_BACKWARD_CHANNELS;

// Tokens from..to of one sequence, which begins at `start` and ends at `end`.
struct Stretch {
  int64_t sequence, batch, start, end, from, to;
};

// Where a thread works: channels d and on, and one piece of the tokens of a batch entry.
struct Spot {
  int64_t batch, group, from, to;
  int d, tile;

  CLA_DEVICE Spot(const cla_short_conv &c, int channels) {
    const int width = CLA_CONV_LANES * channels, tiles = (c.channels + width - 1) / width;
    const int64_t block = block_x(), groups = piece_groups(c);
    tile = (int)(block % tiles);
    group = block / tiles % groups;
    batch = block / tiles / groups;
    d = tile * width + (int)(thread_index() % CLA_CONV_LANES) * channels;
    from = (group * CLA_CONV_PIECES + thread_index() / CLA_CONV_LANES) * c.piece;
    to = from + c.piece < c.tokens ? from + c.piece : c.tokens;
  }
  static CLA_DEVICE int64_t piece_groups(const cla_short_conv &c) {
    const int64_t each = c.piece * CLA_CONV_PIECES;
    return (c.tokens + each - 1) / each;
  }
};

CLA_DEVICE Stretch whole_sequence(const cla_short_conv &c, int64_t sequence) {
  if (!c.cu_seqlens) return {sequence, sequence, 0, c.tokens, 0, c.tokens};
  const int64_t start = c.cu_seqlens[sequence], end = c.cu_seqlens[sequence + 1];
  return {sequence, 0, start, end, start, end};
}

// What a piece has of each sequence.
template <class F> CLA_DEVICE void each_stretch(const cla_short_conv &c, const Spot &spot, F use) {
  int64_t sequence = c.cu_seqlens ? run_of(c.cu_seqlens, c.sequences, spot.from) : spot.batch;
  for (int64_t from = spot.from; from < spot.to; sequence++) {
    Stretch stretch = whole_sequence(c, sequence);
    if (stretch.end <= from) continue;
    stretch.from = from;
    stretch.to = stretch.end < spot.to ? stretch.end : spot.to;
    use(stretch);
    from = stretch.to;
  }
}

// W taps of N channels, the last of them the call's own, `skip` before these that are none.
template <int N, int W, bool WHOLE> struct Taps {
  float weight[W][N], bias[N];
  int skip;

  CLA_DEVICE Taps(const cla_short_conv &c, int d) : skip(W == CLA_MOST_TAPS ? W - c.width : 0) {
    if constexpr (WHOLE && W < CLA_MOST_TAPS) {
      float x[N * W];
      load_numbers<N * W, true>(x, c.weight, (int64_t)d * W, N * W);
      CLA_UNROLL
      for (int i = 0; i < N * W; i++) weight[i % W][i / W] = x[i];
    } else {
      CLA_UNROLL
      for (int tap = 0; tap < W; tap++) {
        CLA_UNROLL
        for (int i = 0; i < N; i++) {
          const bool there = tap >= skip && d + i < c.channels;
          weight[tap][i] =
              there ? load_element(c.weight.data, c.weight.dtype, (int64_t)(d + i) * c.width + tap - skip) : 0.f;
        }
      }
    }
    CLA_UNROLL
    for (int i = 0; i < N; i++) bias[i] = 0.f;
    if (c.bias.data) load_numbers<N, WHOLE>(bias, c.bias, d, c.channels - d);
  }

  // bias + sum_i weight_i x_i
  CLA_DEVICE void sum(float (&z)[N], const float (&x)[W][N]) const {
    CLA_UNROLL
    for (int i = 0; i < N; i++) z[i] = bias[i];
    CLA_UNROLL
    for (int tap = 0; tap < W; tap++) {
      // Not by multiplying with 0: the input may be infinite.
      if (tap < skip) continue;
      CLA_UNROLL
      for (int i = 0; i < N; i++) z[i] += weight[tap][i] * x[tap][i];
    }
  }
};

// The last W rows that went by, the newest last.
template <int N, int W> struct Window {
  float x[W][N];

  CLA_DEVICE void push() {
    CLA_UNROLL
    for (int tap = 0; tap + 1 < W; tap++) {
      CLA_UNROLL
      for (int i = 0; i < N; i++) x[tap][i] = x[tap + 1][i];
    }
  }
  CLA_DEVICE void clear() {
    CLA_UNROLL
    for (int tap = 0; tap < W; tap++) {
      CLA_UNROLL
      for (int i = 0; i < N; i++) x[tap][i] = 0.f;
    }
  }
  // The rows before the first of a stretch, those of its sequence's past among them.
  template <class V> CLA_DEVICE void fill(const cla_short_conv &c, const Stretch &at, const Rows &rows, int d, int skip) {
    clear();
    const Rows past(c.past, at.sequence, 0);
    CLA_UNROLL
    for (int i = 1; i < W; i++) {
      if (i - 1 < skip) continue;
      const int64_t t = at.from - W + i;
      const bool before = t < at.start;
      if (before && !past.data) continue;
      V v;
      v.load(before ? past : rows, before ? t - at.start + c.width - 1 : t, d, c.channels);
      CLA_UNROLL
      for (int j = 0; j < N; j++) x[i][j] = v[j];
    }
  }
};

template <int DTYPE, int W, bool WHOLE> CLA_KERNEL(CONV_THREADS, W < CLA_MOST_TAPS ? 4 : 2) void short_conv_kernel(cla_short_conv c) {
  constexpr int N = IN_16_BYTES<DTYPE>;
  using V = Vector<DTYPE, N, WHOLE>;
  const Spot spot(c, N);
  const int d = spot.d;
  if (d >= c.channels || spot.from >= spot.to) return;
  const Taps<N, W, WHOLE> taps(c, d);
  each_stretch(c, spot, [&](const Stretch &at) {
    const Rows rows(c.x, at.batch, 0), out(c.out, at.batch, 0);
    Window<N, W> window;
    window.template fill<V>(c, at, rows, d, taps.skip);
    for (int64_t t = at.from; t < at.to; t += CONV_AHEAD) {
      V x[CONV_AHEAD];
      CLA_UNROLL
      for (int i = 0; i < CONV_AHEAD; i++) x[i].load(rows, t + i < at.to ? t + i : at.to - 1, d, c.channels);
      CLA_UNROLL
      for (int i = 0; i < CONV_AHEAD; i++) {
        if (t + i >= at.to) continue;
        window.push();
        float y[N];
        CLA_UNROLL
        for (int j = 0; j < N; j++) window.x[W - 1][j] = x[i][j];
        taps.sum(y, window.x);
        if (c.silu) {
          CLA_UNROLL
          for (int j = 0; j < N; j++) y[j] *= sigmoid(y[j]);
        }
        V v;
        v.set(y);
        v.store(out, t + i, d, c.channels);
      }
    }
    if (!c.last.data || at.to < at.end) return;
    const Rows last(c.last, at.sequence, 0);
    CLA_UNROLL
    for (int i = 1; i < W; i++) {
      if (i - 1 < taps.skip) continue;
      V v;
      v.set(window.x[i]);
      v.store(last, i - 1 - taps.skip, d, c.channels);
    }
  });
}

// Goes over the outputs that the tokens of a stretch reach and hands `use` the gradient of each input, from that of the
// W - 1 before the stretch on. What the stretch adds to the gradients of the taps and of the bias is added to `sums`.
template <int DTYPE, int W, bool WHOLE, class F>
CLA_DEVICE void gradients(const cla_short_conv &c, const Taps<FEW, W, WHOLE> &taps, const Stretch &at, int d,
                          float (&sums)[W + 1][FEW], F use) {
  constexpr int N = FEW;
  using V = Vector<DTYPE, N, WHOLE>;
  const Rows rows(c.x, at.batch, 0), grad(c.grad_out, at.batch, 0);
  Window<N, W> window, of_sums;
  window.template fill<V>(c, at, rows, d, taps.skip);
  of_sums.clear();
  // The outputs that there are of those that the last token reaches.
  const int64_t reached = at.to + c.width - 1, outputs = reached < at.end ? reached : at.end;
  for (int64_t t = at.from; t < at.to + W - 1; t += CONV_AHEAD) {
    V x[CONV_AHEAD], dy[CONV_AHEAD];
    if (t < outputs) {
      CLA_UNROLL
      for (int i = 0; i < CONV_AHEAD; i++) {
        const int64_t row = t + i < outputs ? t + i : outputs - 1;
        x[i].load(rows, row, d, c.channels);
        dy[i].load(grad, row, d, c.channels);
      }
    }
    CLA_UNROLL
    for (int i = 0; i < CONV_AHEAD; i++) {
      if (t + i >= at.to + W - 1) continue;
      window.push();
      of_sums.push();
      CLA_UNROLL
      for (int j = 0; j < N; j++) of_sums.x[W - 1][j] = 0.f;
      if (t + i < outputs) {
        float z[N];
        CLA_UNROLL
        for (int j = 0; j < N; j++) window.x[W - 1][j] = x[i][j];
        if (c.silu) taps.sum(z, window.x);
        CLA_UNROLL
        for (int j = 0; j < N; j++) of_sums.x[W - 1][j] = c.silu ? dy[i][j] * silu_slope(z[j]) : dy[i][j];
      }
      if (t + i < at.to) {
        CLA_UNROLL
        for (int j = 0; j < N; j++) {
          const float dz = of_sums.x[W - 1][j];
          CLA_UNROLL
          for (int tap = 0; tap < W; tap++) sums[tap][j] += dz * window.x[tap][j];
          sums[W][j] += dz;
        }
      }
      float dx[N];
      CLA_UNROLL
      for (int j = 0; j < N; j++) dx[j] = 0.f;
      CLA_UNROLL
      for (int tap = 0; tap < W; tap++) {
        if (tap < taps.skip) continue;
        CLA_UNROLL
        for (int j = 0; j < N; j++) dx[j] += taps.weight[tap][j] * of_sums.x[W - 1 - tap][j];
      }
      V v;
      v.set(dx);
      use(t + i - (W - 1), v);
    }
  }
}

template <int DTYPE, int W, bool WHOLE> CLA_KERNEL(CONV_THREADS, W < CLA_MOST_TAPS ? 3 : 2) void short_conv_backward_kernel(cla_short_conv c) {
  constexpr int N = FEW;
  const Spot spot(c, N);
  const int d = spot.d;
  float sums[W + 1][N];
  CLA_UNROLL
  for (int tap = 0; tap <= W; tap++) {
    CLA_UNROLL
    for (int i = 0; i < N; i++) sums[tap][i] = 0.f;
  }
  if (d < c.channels && spot.from < spot.to) {
    const Taps<N, W, WHOLE> taps(c, d);
    each_stretch(c, spot, [&](const Stretch &at) {
      const Rows dx(c.dx, at.batch, 0);
      gradients<DTYPE, W, WHOLE>(c, taps, at, d, sums, [&](int64_t t, const Vector<DTYPE, N, WHOLE> &v) {
        if (t >= at.from) v.store(dx, t, d, c.channels);
      });
    });
  }
  if (!c.partial) return;
  // Over the pieces of the block, in their order.
  const int skip = W - c.width, thread = (int)thread_index();
  const int64_t row = (spot.batch * Spot::piece_groups(c) + spot.group) * (c.width + 1) - skip;
  float *shared = (float *)shared_memory();
  CLA_UNROLL
  for (int tap = 0; tap <= W; tap++) {
    if (tap < skip) continue;
    barrier();
    store4(shared + thread * N, sums[tap]);
    barrier();
    for (int i = thread; i < CLA_CONV_LANES * N; i += CONV_THREADS) {
      float sum = 0.f;
      CLA_UNROLL
      for (int piece = 0; piece < CLA_CONV_PIECES; piece++) sum += shared[piece * CLA_CONV_LANES * N + i];
      const int channel = spot.tile * CLA_CONV_LANES * N + i;
      if (channel < c.channels) c.partial[(row + tap) * c.channels + channel] = sum;
    }
  }
}

// The gradient of what was before each sequence, from its first W - 1 outputs.
template <int DTYPE, int W, bool WHOLE> CLA_KERNEL(CONV_THREADS, W < CLA_MOST_TAPS ? 3 : 2) void short_conv_past_kernel(cla_short_conv c) {
  constexpr int N = FEW;
  const int64_t vectors = (c.channels + N - 1) / N, index = block_x() * (int64_t)CONV_THREADS + thread_index();
  const int64_t sequence = index / vectors;
  if (sequence >= c.sequences) return;
  const int d = (int)(index % vectors) * N;
  Stretch at = whole_sequence(c, sequence);
  at.to = at.from;
  const Taps<N, W, WHOLE> taps(c, d);
  const Rows dpast(c.dpast, sequence, 0);
  float sums[W + 1][N];
  gradients<DTYPE, W, WHOLE>(c, taps, at, d, sums, [&](int64_t t, const Vector<DTYPE, N, WHOLE> &v) {
    const int64_t row = t - at.start + c.width - 1;
    if (row >= 0) v.store(dpast, row, d, c.channels);
  });
}

template <int DTYPE, bool WHOLE> CLA_KERNEL(CONV_THREADS, 8) void short_conv_cache_kernel(cla_short_conv c) {
  constexpr int N = IN_16_BYTES<DTYPE>;
  const int64_t vectors = (c.channels + N - 1) / N, index = block_x() * (int64_t)CONV_THREADS + thread_index();
  const int before = c.width - 1, d = (int)(index % vectors) * N, row = (int)(index / vectors % before);
  const int64_t sequence = index / vectors / before;
  if (sequence >= c.sequences) return;
  const Stretch at = whole_sequence(c, sequence);
  const int64_t t = at.end - before + row;
  const Rows rows(c.x, at.batch, 0), past(c.past, sequence, 0);
  Vector<DTYPE, N, WHOLE> v;
  if (t >= at.start) v.load(rows, t, d, c.channels);
  else if (past.data) v.load(past, t - at.start + before, d, c.channels);
  else v.clear();
  v.store(Rows(c.last, sequence, 0), row, d, c.channels);
}

// On the side of the launch.

inline bool can_be_whole(const cla_short_conv &c, int channels) {
  auto fits = [&](const cla_tensor &x) { return !x.data || in_groups(x, c.channels, channels); };
  return fits(c.x) && fits(c.out) && fits(c.past) && fits(c.last) && fits(c.grad_out) && fits(c.dx) && fits(c.dpast) &&
         in_fours(c.weight) && in_fours(c.bias);
}

inline int64_t blocks(int64_t threads) { return (threads + CONV_THREADS - 1) / CONV_THREADS; }
inline int64_t piece_blocks(const cla_short_conv &c, int channels) {
  const int64_t tile = (int64_t)CLA_CONV_LANES * channels, each = c.piece * CLA_CONV_PIECES;
  return (c.channels + tile - 1) / tile * ((c.tokens + each - 1) / each) * c.batch;
}

template <int DTYPE, int W, bool WHOLE> int32_t launch_forward(const cla_short_conv &c, void *stream) {
  const int64_t grid = piece_blocks(c, IN_16_BYTES<DTYPE>);
  return launch(short_conv_kernel<DTYPE, W, WHOLE>, {grid, 1}, CONV_THREADS, 0, stream, c);
}

template <int DTYPE, int W, bool WHOLE> int32_t launch_backward(const cla_short_conv &c, void *stream) {
  constexpr int N = FEW;
  const int64_t shared = CONV_THREADS * N * sizeof(float);
  int32_t code = launch(short_conv_backward_kernel<DTYPE, W, WHOLE>, {piece_blocks(c, N), 1}, CONV_THREADS, shared, stream, c);
  if (code != 0 || !c.dpast.data) return code;
  const int64_t vectors = (c.channels + N - 1) / N;
  return launch(short_conv_past_kernel<DTYPE, W, WHOLE>, {blocks(c.sequences * vectors), 1}, CONV_THREADS, 0, stream, c);
}

template <int DTYPE> int32_t launch_cache(const cla_short_conv &c, void *stream) {
  constexpr int N = IN_16_BYTES<DTYPE>;
  const int64_t threads = c.sequences * (int64_t)(c.width - 1) * ((c.channels + N - 1) / N);
  return can_be_whole(c, N) ? launch(short_conv_cache_kernel<DTYPE, true>, {blocks(threads), 1}, CONV_THREADS, 0, stream, c)
                            : launch(short_conv_cache_kernel<DTYPE, false>, {blocks(threads), 1}, CONV_THREADS, 0, stream, c);
}

template <bool BACKWARD, int DTYPE, int W, bool WHOLE> int32_t launch_either(const cla_short_conv &c, void *stream) {
  if constexpr (BACKWARD) return launch_backward<DTYPE, W, WHOLE>(c, stream);
  else return launch_forward<DTYPE, W, WHOLE>(c, stream);
}

template <bool BACKWARD, int DTYPE> int32_t dispatch_width(const cla_short_conv &c, void *stream) {
  if (!can_be_whole(c, BACKWARD ? FEW : IN_16_BYTES<DTYPE>)) {
    return launch_either<BACKWARD, DTYPE, CLA_MOST_TAPS, false>(c, stream);
  }
  switch (c.width) {
    case 2: return launch_either<BACKWARD, DTYPE, 2, true>(c, stream);
    case 3: return launch_either<BACKWARD, DTYPE, 3, true>(c, stream);
    case 4: return launch_either<BACKWARD, DTYPE, 4, true>(c, stream);
    default: return launch_either<BACKWARD, DTYPE, CLA_MOST_TAPS, true>(c, stream);
  }
}

template <bool BACKWARD> int32_t dispatch(const cla_short_conv &c, void *stream) {
  return by_dtype(c.x.dtype, [&](auto dtype) { return dispatch_width<BACKWARD, decltype(dtype)::value>(c, stream); });
}

}  // namespace cla

extern "C" int32_t cla_short_conv_forward(const cla_short_conv *call, void *stream) {
  return cla::dispatch<false>(*call, stream);
}

extern "C" int32_t cla_short_conv_backward(const cla_short_conv *call, void *stream) {
  return cla::dispatch<true>(*call, stream);
}

extern "C" int32_t cla_short_conv_cache(const cla_short_conv *call, void *stream) {
  return cla::by_dtype(call->x.dtype, [&](auto dtype) { return cla::launch_cache<decltype(dtype)::value>(*call, stream); });
}
