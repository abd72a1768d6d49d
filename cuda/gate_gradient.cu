// The gradient of the log decay, from dq and dk of exclusive sweeps (see cla.h for the sums): first the terms of every
// token, then their sums from the end of the sequence, a segment of tokens a thread. In double: over thousands of tokens
// the terms of one sign nearly cancel those of the other.
#include "elements.cuh"

namespace cla {

constexpr int TERM_THREADS = 256, SUM_THREADS = 128, AHEAD = 8;

CLA_DEVICE float warp_sum(float x) {
  CLA_UNROLL
  for (int d = 16; d > 0; d /= 2) x += shuffle_xor(x, d);
  return x;
}

// Whether a sequence ends with token t.
CLA_DEVICE bool is_last(const cla_gate_gradient &c, int64_t t) {
  if (!c.cu_seqlens) return t + 1 == c.tokens;
  int32_t below = 0, to = c.sequences;  // cu_seqlens[below] <= t < cu_seqlens[to]
  while (to - below > 1) {
    const int32_t middle = below + (to - below) / 2;
    (c.cu_seqlens[middle] <= t ? below : to) = middle;
  }
  return c.cu_seqlens[to] == t + 1;
}

// A warp for each token and value head: its terms into dg, and what it adds to its own dq and dk.
CLA_KERNEL(TERM_THREADS, 2) void gate_terms_kernel(cla_gate_gradient c) {
  const int64_t index = block_x() * (int64_t)(TERM_THREADS / 32) + thread_index() / 32;
  const int lane = thread_index() & 31;
  if (index >= c.batch * c.tokens * c.heads) return;
  const int head = (int)(index % c.heads);
  const int64_t t = index / c.heads % c.tokens, batch = index / c.heads / c.tokens;
  const Rows q(c.q, batch, head), k(c.k, batch, head), v(c.v, batch, head), grad_out(c.grad_out, batch, head);
  float own = 0.f;
  for (int i = lane; i < c.v_dim; i += 32) own += v.load(t, i) * grad_out.load(t, i);
  own = c.scale * warp_sum(own);
  // What a last token's k dk has is not in `after`.
  const float behind = is_last(c, t) ? 0.f : 1.f;
  float sum = 0.f;
  for (int i = lane; i < c.k_dim; i += 32) {
    float &dq = c.dq[index * c.k_dim + i], &dk = c.dk[index * c.k_dim + i];
    const float a = q.load(t, i), b = k.load(t, i), term = a * dq - behind * (b * dk);
    sum += term;
    if (!c.summed) c.dg[index * c.k_dim + i] = term;
    dq += own * b;
    dk += own * a;
  }
  sum = warp_sum(sum);
  if (c.summed && lane == 0) c.dg[index] = sum;
}

// One thread has a column (head and channel) of one segment of a sequence.
struct Column {
  Steps steps;
  Rows gate;
  int64_t width, at, begin, end, plane;
  int64_t index;  // of its partial sum; a segment further is `width` further
  int channel;
  float *dg;

  CLA_DEVICE Column(const cla_gate_gradient &c, int64_t sequence, int64_t segment, int64_t at)
      : steps(c.cu_seqlens, c.tokens, sequence, false),
        gate(c.gate, steps.batch, (int)(at / (c.summed ? 1 : c.k_dim))), at(at) {
    width = c.heads * (int64_t)(c.summed ? 1 : c.k_dim);
    channel = c.summed ? 0 : (int)(at % c.k_dim);
    begin = segment * c.segment;
    end = begin + c.segment < steps.count ? begin + c.segment : steps.count;
    plane = c.sequences * (int64_t)c.segments * width;
    index = (sequence * c.segments + segment) * width + at;
    dg = c.dg + (steps.batch * c.tokens + steps.start) * width + at;
  }

  // Adds up the terms from the last to the first onto `sum`, showing each sum to `use`; returns whether a token forgot.
  template <class F> CLA_DEVICE bool sum_up(double &sum, F use) const {
    bool forgot = false;
    for (int64_t last = end - 1; last >= begin; last -= AHEAD) {
      float term[AHEAD], g[AHEAD];
      CLA_UNROLL
      for (int i = 0; i < AHEAD; i++) {
        const bool valid = last - i >= begin;
        term[i] = valid ? dg[(last - i) * width] : 0.f;
        g[i] = valid ? gate.load(steps.start + last - i, channel) : 0.f;
      }
      CLA_UNROLL
      for (int i = 0; i < AHEAD; i++) {
        if (last - i < begin) continue;
        sum += term[i];
        if (exp_fast(g[i]) == 0.f) {
          sum = 0.;
          forgot = true;
        }
        use(last - i, sum);
      }
    }
    return forgot;
  }
};

CLA_KERNEL(SUM_THREADS, 4) void partial_sums_kernel(cla_gate_gradient c) {
  const int64_t at = block_y() * (int64_t)SUM_THREADS + thread_index();
  if (at >= c.heads * (int64_t)(c.summed ? 1 : c.k_dim)) return;
  const Column column(c, block_x() / c.segments, block_x() % c.segments, at);
  double sum = 0.;
  const bool forgot = column.sum_up(sum, [](int64_t, double) {});
  c.partial[column.index] = (float)sum;
  c.partial[column.plane + column.index] = forgot ? 1.f : 0.f;
}

CLA_KERNEL(SUM_THREADS, 4) void sums_kernel(cla_gate_gradient c) {
  const int64_t sequence = block_x() / c.segments, segment = block_x() % c.segments;
  const int64_t at = block_y() * (int64_t)SUM_THREADS + thread_index();
  if (at >= c.heads * (int64_t)(c.summed ? 1 : c.k_dim)) return;
  const Column column(c, sequence, segment, at);
  double sum = 0.;
  bool forgot = false;
  for (int64_t later = segment + 1; later < c.segments && !forgot; later++) {
    const int64_t index = column.index + (later - segment) * column.width;
    sum += c.partial[index];
    forgot = c.partial[column.plane + index] != 0.f;
  }
  if (!forgot && c.after) sum += c.after[sequence * column.width + at];
  column.sum_up(sum, [&](int64_t step, double x) { column.dg[step * column.width] = (float)x; });
}

}  // namespace cla

extern "C" int32_t cla_gate_gradients(const cla_gate_gradient *call, void *stream) {
  using namespace cla;
  const cla_gate_gradient &c = *call;
  const int warps = TERM_THREADS / 32;
  const int64_t rows = c.batch * c.tokens * c.heads, width = c.heads * (int64_t)(c.summed ? 1 : c.k_dim);
  int32_t code = launch(gate_terms_kernel, Dims{(rows + warps - 1) / warps, 1}, TERM_THREADS, 0, stream, c);
  const Dims grid = {(int64_t)c.sequences * c.segments, (width + SUM_THREADS - 1) / SUM_THREADS};
  if (code == 0) code = launch(partial_sums_kernel, grid, SUM_THREADS, 0, stream, c);
  if (code == 0) code = launch(sums_kernel, grid, SUM_THREADS, 0, stream, c);
  return code;
}
