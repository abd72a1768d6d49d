// The gradient of the log decay, from dq and dk of exclusive sweeps (see cla.h for the sums): first the terms of every
// token, then their sums from the end of the sequence, a segment of tokens a thread. In double: over thousands of tokens
// the terms of one sign nearly cancel those of the other.
#include <type_traits>

#include "vectors.cuh"

namespace cla {

constexpr int TERM_THREADS = 256, TERM_COLUMNS = 256, SUM_THREADS = 128, AHEAD = 8;

// Whether token t is one that `after` stands behind.
CLA_DEVICE bool is_last(const cla_gate_gradient &c, int64_t t) {
  int64_t start = 0, end = c.tokens;
  if (c.cu_seqlens) {
    const int32_t sequence = run_of(c.cu_seqlens, c.sequences, t);
    start = c.cu_seqlens[sequence], end = c.cu_seqlens[sequence + 1];
  }
  return t + 1 == end || (c.anchored && (t + 1 - start) % c.segment == 0);
}

template <bool IN_FOURS> CLA_DEVICE void store_four(const Rows &rows, int64_t t, int d, int width, const float (&x)[4]) {
  if (IN_FOURS) return store_four(rows.data, rows.dtype, t * rows.token + d, x);
  CLA_UNROLL
  for (int i = 0; i < 4; i++) {
    if (d + i < width) rows.store(t, d + i, x[i]);
  }
}

// [B, T, HV, K] in f32, contiguous.
CLA_DEVICE cla_tensor f32_of(float *data, const cla_gate_gradient &c) {
  const int64_t token = (int64_t)c.heads * c.k_dim;
  return {data, c.tokens * token, token, c.k_dim, 1, 1, CLA_F32};
}

// A warp for each token and value head: its terms, and its dq and dk with what it adds to them itself. A token's rows are
// read once, up to 256 columns of all at the same time: what a lane has of them waits in registers until the warp knows v . do.
// AT_ONCE: there are no more. A loop that might go on took a third longer.
template <int DTYPE, bool IN_FOURS, bool AT_ONCE> CLA_KERNEL(TERM_THREADS, AT_ONCE ? 3 : 2) void gate_terms_kernel(cla_gate_gradient c) {
  using Input = Vector<DTYPE, 4, IN_FOURS>;
  using Gradient = Vector<CLA_F32, 4, IN_FOURS>;
  constexpr int COLUMNS = TERM_COLUMNS, MOST = COLUMNS / 128;  // a lane has four neighbours of each 128
  const int64_t index = block_x() * (int64_t)(TERM_THREADS / 32) + thread_index() / 32;
  const int first = (thread_index() & 31) * 4;
  if (index >= c.batch * c.tokens * c.heads) return;
  const int head = (int)(index % c.heads);
  const int64_t t = index / c.heads % c.tokens, batch = index / c.heads / c.tokens;
  const Rows q(c.q, batch, head), k(c.k, batch, head), v(c.v, batch, head), grad_out(c.grad_out, batch, head);
  const Rows dq(f32_of(c.dq, c), batch, head), dk(f32_of(c.dk, c), batch, head);
  const Rows dq_out = c.dq_out.data ? Rows(c.dq_out, batch, head) : dq, dk_out = c.dk_out.data ? Rows(c.dk_out, batch, head) : dk;
  Input of_q[MOST], of_k[MOST], of_v[MOST], of_out[MOST];
  Gradient of_dq[MOST], of_dk[MOST];
  auto load = [&](auto &x, const Rows &rows, int i, int width) {
    x.clear();
    if (rows.data && i < width) x.load(rows, t, i, width);
  };
  auto load_keys = [&](int from) {
    CLA_UNROLL
    for (int j = 0; j < MOST; j++) {
      const int i = from + first + 128 * j;
      load(of_q[j], q, i, c.k_dim);
      load(of_k[j], k, i, c.k_dim);
      load(of_dq[j], dq, i, c.k_dim);
      load(of_dk[j], dk, i, c.k_dim);
    }
  };
  load_keys(0);
  float own = 0.f;
  for (int from = 0; from == 0 || (!AT_ONCE && from < c.v_dim); from += COLUMNS) {
    CLA_UNROLL
    for (int j = 0; j < MOST; j++) {
      load(of_v[j], v, from + first + 128 * j, c.v_dim);
      load(of_out[j], grad_out, from + first + 128 * j, c.v_dim);
    }
    CLA_UNROLL
    for (int j = 0; j < MOST; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) own += of_v[j][e] * of_out[j][e];
    }
  }
  own = c.scale * sum_of_lanes(own);
  // What a last token's k dk has is not in `after`.
  const float behind = is_last(c, t) ? 0.f : 1.f;
  double sum = 0.;
  for (int from = 0; from == 0 || (!AT_ONCE && from < c.k_dim); from += COLUMNS) {
    if (from > 0) load_keys(from);
    CLA_UNROLL
    for (int j = 0; j < MOST; j++) {
      const int i = from + first + 128 * j;
      if (i >= c.k_dim) continue;
      float term[4], with_own_q[4], with_own_k[4];
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        term[e] = of_q[j][e] * of_dq[j][e] - behind * (of_k[j][e] * of_dk[j][e]);
        if (c.summed) sum += (double)of_q[j][e] * of_dq[j][e] - behind * ((double)of_k[j][e] * of_dk[j][e]);
        with_own_q[e] = of_dq[j][e] + own * of_k[j][e];
        with_own_k[e] = of_dk[j][e] + own * of_q[j][e];
      }
      if (!c.summed) store_four<IN_FOURS>(Rows(f32_of(c.terms, c), batch, head), t, i, c.k_dim, term);
      store_four<IN_FOURS>(dq_out, t, i, c.k_dim, with_own_q);
      store_four<IN_FOURS>(dk_out, t, i, c.k_dim, with_own_k);
    }
  }
  sum = sum_of_lanes(sum);
  if (c.summed && first == 0) c.terms[index] = (float)sum;
}

// One thread has a column (head and channel) of one segment of a sequence.
template <int DTYPE> struct Column {
  using Gate = std::conditional_t<DTYPE == CLA_F32, float, uint16_t>;

  Steps steps;
  Rows gate;
  int64_t width, at, begin, end, plane;
  int64_t index;  // of its partial sum; a segment further is `width` further
  int channel;
  float *terms;
  Rows dg;  // no data: it takes the place of the terms

  CLA_DEVICE Column(const cla_gate_gradient &c, int64_t sequence, int64_t segment, int64_t at)
      : steps(c.cu_seqlens, c.tokens, sequence, false),
        gate(c.gate, steps.batch, (int)(at / (c.summed ? 1 : c.k_dim))), at(at),
        dg(c.dg, steps.batch, (int)(at / (c.summed ? 1 : c.k_dim))) {
    width = c.heads * (int64_t)(c.summed ? 1 : c.k_dim);
    channel = c.summed ? 0 : (int)(at % c.k_dim);
    begin = segment * c.segment;
    end = begin + c.segment < steps.count ? begin + c.segment : steps.count;
    plane = c.sequences * (int64_t)c.segments * width;
    index = (sequence * c.segments + segment) * width + at;
    terms = c.terms + (steps.batch * c.tokens + steps.start) * width + at;
  }

  CLA_DEVICE static float number(Gate x) {
    if constexpr (DTYPE == CLA_F32) return x;
    else return DTYPE == CLA_BF16 ? from_bf16(x) : from_f16(x);
  }
  // Adds up the terms from the last to the first onto `sum`, showing each sum to `use`; returns whether a token forgot.
  template <class F> CLA_DEVICE bool sum_up(double &sum, F use) const {
    bool forgot = false;
    for (int64_t last = end - 1; last >= begin; last -= AHEAD) {
      // As they lie in memory, so that all loads are under way before one is looked at.
      float term[AHEAD];
      Gate g[AHEAD];
      CLA_UNROLL
      for (int i = 0; i < AHEAD; i++) {
        const bool valid = last - i >= begin;
        term[i] = valid ? terms[(last - i) * width] : 0.f;
        g[i] = valid ? ((const Gate *)gate.data)[(steps.start + last - i) * gate.token + channel * gate.element] : Gate(0);
      }
      CLA_UNROLL
      for (int i = 0; i < AHEAD; i++) {
        if (last - i < begin) continue;
        sum += term[i];
        if (exp_fast(number(g[i])) == 0.f) {
          sum = 0.;
          forgot = true;
        }
        use(last - i, sum);
      }
    }
    return forgot;
  }
};

template <int DTYPE> CLA_KERNEL(SUM_THREADS, 4) void partial_sums_kernel(cla_gate_gradient c) {
  const int64_t at = block_y() * (int64_t)SUM_THREADS + thread_index();
  if (at >= c.heads * (int64_t)(c.summed ? 1 : c.k_dim)) return;
  const Column<DTYPE> column(c, block_x() / c.segments, block_x() % c.segments, at);
  double sum = 0.;
  const bool forgot = column.sum_up(sum, [](int64_t, double) {});
  c.partial[column.index] = (float)sum;
  c.partial[column.plane + column.index] = forgot ? 1.f : 0.f;
}

template <int DTYPE> CLA_KERNEL(SUM_THREADS, 4) void sums_kernel(cla_gate_gradient c) {
  const int64_t sequence = block_x() / c.segments, segment = block_x() % c.segments;
  const int64_t at = block_y() * (int64_t)SUM_THREADS + thread_index();
  if (at >= c.heads * (int64_t)(c.summed ? 1 : c.k_dim)) return;
  const Column<DTYPE> column(c, sequence, segment, at);
  double sum = 0.;
  if (c.anchored) {
    sum = c.after[column.index];
  } else {
    bool forgot = false;
    for (int64_t later = segment + 1; later < c.segments && !forgot; later++) {
      const int64_t index = column.index + (later - segment) * column.width;
      sum += c.partial[index];
      forgot = c.partial[column.plane + index] != 0.f;
    }
    if (!forgot && c.after) sum += c.after[sequence * column.width + at];
  }
  column.sum_up(sum, [&](int64_t step, double x) {
    if (column.dg.data) column.dg.store(column.steps.start + step, column.channel, (float)x);
    else column.terms[step * column.width] = (float)x;
  });
}

}  // namespace cla

extern "C" int32_t cla_gate_gradients(const cla_gate_gradient *call, void *stream) {
  using namespace cla;
  const cla_gate_gradient &c = *call;
  const int warps = TERM_THREADS / 32;
  const int64_t rows = c.batch * c.tokens * c.heads, width = c.heads * (int64_t)(c.summed ? 1 : c.k_dim);
  const Dims tokens = {(rows + warps - 1) / warps, 1};
  auto in_fours = [](const cla_tensor &x, int width) { return !x.data || in_groups(x, width, 4); };
  const bool fast = in_fours(c.q, c.k_dim) && in_fours(c.k, c.k_dim) && in_fours(c.v, c.v_dim) && in_fours(c.grad_out, c.v_dim);
  int32_t code = by_dtype(c.q.dtype, [&](auto dtype) {
    constexpr int DTYPE = decltype(dtype)::value;
    auto run = [&](auto in_fours, auto at_once) {
      const auto kernel = gate_terms_kernel<DTYPE, decltype(in_fours)::value, decltype(at_once)::value>;
      return launch(kernel, tokens, TERM_THREADS, 0, stream, c);
    };
    const bool at_once = c.k_dim <= TERM_COLUMNS && c.v_dim <= TERM_COLUMNS;
    if (fast) return at_once ? run(std::true_type(), std::true_type()) : run(std::true_type(), std::false_type());
    return at_once ? run(std::false_type(), std::true_type()) : run(std::false_type(), std::false_type());
  });
  const Dims grid = {(int64_t)c.sequences * c.segments, (width + SUM_THREADS - 1) / SUM_THREADS};
  if (code != 0) return code;
  return by_dtype(c.gate.dtype, [&](auto dtype) {
    constexpr int DTYPE = decltype(dtype)::value;
    int32_t code = c.anchored ? 0 : launch(partial_sums_kernel<DTYPE>, grid, SUM_THREADS, 0, stream, c);
    return code == 0 ? launch(sums_kernel<DTYPE>, grid, SUM_THREADS, 0, stream, c) : code;
  });
}
