// A delta sweep (see delta.h) token by token, in the order of the definition: decoding, short sequences, and whatever other
// kernels do not take. Columns of the state do not see each other, so a block has 32 of one sequence and head in registers;
// decoding reads and writes each state once, with all loads under way before the first is used.
#include "delta_state.cuh"

namespace cla {

// The rows of a tensor: in a crowd made anew for each use, out of what is in constant memory, since registers are for the state.
template <bool CROWDED> struct RowsAtHand {
  Rows rows;

  CLA_DEVICE RowsAtHand(const cla_tensor &x, int64_t batch, int head) : rows(x, batch, head) {}
  CLA_DEVICE const Rows &operator()() const { return rows; }
};
template <> struct RowsAtHand<true> {
  const cla_tensor &x;
  int64_t batch;
  int head;

  CLA_DEVICE RowsAtHand(const cla_tensor &x, int64_t batch, int head) : x(x), batch(batch), head(head) {}
  CLA_DEVICE Rows operator()() const { return Rows(x, batch, opaque(head)); }
};

template <int EACH, bool LOW_RANK, bool CROWDED> struct DeltaRecurrent {
  using State = DeltaState<EACH>;
  static constexpr int ROWS = State::ROWS, COLUMNS = State::COLUMNS, THREADS = State::THREADS, WARPS = State::WARPS;
  static constexpr int PER_THREAD = ROWS > THREADS ? ROWS / THREADS : 1;
  // The vectors of one step in shared memory, and of its products q . k and q . b what each warp has.
  static constexpr int R1 = 0, R2 = ROWS, X1 = 2 * ROWS, X2 = 3 * ROWS, DECAY = 4 * ROWS, VALUE = 5 * ROWS;
  static constexpr int BETA = VALUE + COLUMNS, DOTS = BETA + 4, STAGE = DOTS + 2 * WARPS;
  static constexpr int SUMS = 2 * STAGE, SHARED = 4 * (SUMS + 2 * WARPS * COLUMNS);

  const cla_delta_sweep &s;
  const bool reverse;
  float *shared;
  int tid, head, first_column;
  int64_t sequence;
  Steps steps;
  RowsAtHand<CROWDED> q, k, value, gate, a, b, beta, inner, out;
  State state;

  CLA_DEVICE DeltaRecurrent(const cla_delta_sweep &s, int tiles, const Place &place)
      : s(s), reverse(s.reverse), shared((float *)shared_memory()), tid(thread_index()),
        head(place.head), first_column(block_x() % tiles * COLUMNS), sequence(place.sequence),
        steps(s.of.cu_seqlens, s.of.tokens, sequence, reverse), q(s.of.q, steps.batch, head), k(s.of.k, steps.batch, head),
        value(s.value, steps.batch, head), gate(s.of.gate, steps.batch, head), a(s.of.a, steps.batch, head),
        b(s.of.b, steps.batch, head), beta(s.of.beta, steps.batch, head), inner(s.inner, steps.batch, head),
        out(s.out, steps.batch, head) {}

  CLA_DEVICE int columns() const { return s.of.v_dim - first_column < COLUMNS ? s.of.v_dim - first_column : COLUMNS; }

  // What a thread loads of a step, one step ahead.
  struct Fetched {
    float q[PER_THREAD], k[PER_THREAD], g[PER_THREAD], a[PER_THREAD], b[PER_THREAD], value, beta;
  };
  CLA_DEVICE void fetch(Fetched &f, int64_t step) const {
    const int64_t t = steps.token(step);
    CLA_UNROLL
    for (int i = 0; i < PER_THREAD; i++) {
      const int r = tid + i * THREADS;
      const bool valid = r < s.of.k_dim;
      f.q[i] = valid ? q().load(t, r) : 0.f;
      f.k[i] = valid ? k().load(t, r) : 0.f;
      f.g[i] = valid && s.of.gate_kind != CLA_NO_GATE ? gate().load(t, s.of.gate_kind == CLA_GATE_ROWS ? r : 0) : 0.f;
      f.a[i] = valid && LOW_RANK ? a().load(t, r) : 0.f;
      f.b[i] = valid && LOW_RANK ? b().load(t, r) : 0.f;
    }
    f.value = tid < columns() ? value().load(t, first_column + tid) : 0.f;
    f.beta = tid == 0 && !LOW_RANK ? beta().load(t, 0) : 1.f;
  }
  CLA_DEVICE void place(const Fetched &f, float *to) const {
    float qk = 0.f, qb = 0.f;
    CLA_UNROLL
    for (int i = 0; i < PER_THREAD; i++) {
      const int r = tid + i * THREADS;
      qk += f.q[i] * f.k[i];
      qb += f.q[i] * f.b[i];
      if (r >= ROWS) continue;
      const float decay = exp_fast(f.g[i]), query = s.of.scale * f.q[i] * decay;
      to[DECAY + r] = decay;
      if (LOW_RANK) {
        to[R1 + r] = reverse ? f.b[i] : f.a[i];
        to[X2 + r] = reverse ? f.a[i] : f.b[i];
        to[R2 + r] = reverse ? f.k[i] : query;
        to[X1 + r] = reverse ? query : f.k[i];
      } else {
        const float key = f.k[i] * decay;
        to[R1 + r] = reverse ? f.k[i] : key;
        to[X2 + r] = reverse ? key : f.k[i];
        to[R2 + r] = query;
        to[X1 + r] = query;
      }
    }
    qk = sum_of_lanes(qk);
    if (LOW_RANK) qb = sum_of_lanes(qb);
    if (tid % 32 == 0) {
      to[DOTS + tid / 32] = s.of.scale * qk;
      to[DOTS + WARPS + tid / 32] = s.of.scale * qb;
    }
    if (tid < COLUMNS) to[VALUE + tid] = f.value;
    if (tid == 0) to[BETA] = f.beta;
  }

  CLA_DEVICE static float sum_of_warps(const float *x, int stride) {
    float sum = 0.f;
    CLA_UNROLL
    for (int w = 0; w < WARPS; w++) sum += x[w * stride];
    return sum;
  }

  // x[i], in registers.
  CLA_DEVICE static float pick(const float (&x)[4], int i) { return i == 0 ? x[0] : i == 1 ? x[1] : i == 2 ? x[2] : x[3]; }

  // Before the first step of a segment.
  CLA_DEVICE void keep_before(int64_t step) {
    if (!s.anchors.data || (LOW_RANK && reverse && step > 0)) return;
    const int64_t at = steps.token(step) - steps.start;
    const bool first = reverse ? step == 0 || (at + 1) % CLA_DELTA_SEGMENT == 0 : at % CLA_DELTA_SEGMENT == 0;
    if (first) keep(at / CLA_DELTA_SEGMENT);
  }
  CLA_DEVICE void keep(int64_t segment) {
    float *to = anchor_of(s.anchors, sequence, segment, head, s.of.heads, (int64_t)s.of.k_dim * s.of.v_dim);
    state.store(to + first_column, s.of.v_dim, 1, s.of.k_dim, columns());
  }

  CLA_DEVICE void solve(const float *of, int64_t step) {
    // Whether something is read for `out`; the backward delta sweep has it in c.
    const bool reads = s.out.data && (LOW_RANK || !reverse), writes_value = LOW_RANK || reverse;
    float w[4] = {0.f, 0.f, 0.f, 0.f}, y[4] = {0.f, 0.f, 0.f, 0.f}, m[4], c[4], v[4];
    float *sums = shared + SUMS, *own = sums + tid / 32 * COLUMNS, *others = sums + WARPS * COLUMNS;
    state.read(of + R1, w);
    state.sum_of_warp(w, own);
    if (reads) {
      state.read(of + R2, y);
      state.sum_of_warp(y, own + WARPS * COLUMNS);
    }
    barrier();
    const float qk = sum_of_warps(of + DOTS, 1), qb = LOW_RANK ? sum_of_warps(of + DOTS + WARPS, 1) : 0.f, beta = of[BETA];
    const float ev = LOW_RANK ? (reverse ? qb : 0.f) : (reverse ? qk : 1.f), ew = LOW_RANK || reverse ? 1.f : -1.f;
    const float f = LOW_RANK ? 1.f : reverse ? -beta : beta;
    const float hv = LOW_RANK ? qk : 0.f, hc = LOW_RANK ? (reverse ? 0.f : qb) : (reverse ? -1.f : qk);
    load4(v, of + VALUE + state.column);
    CLA_UNROLL
    for (int i = 0; i < 4; i++) {
      m[i] = ev * v[i] + ew * sum_of_warps(sums + state.column + i, COLUMNS);
      c[i] = f * m[i];
      y[i] = hv * v[i] + hc * c[i] + (reads ? sum_of_warps(others + state.column + i, COLUMNS) : 0.f);
    }
    // The first warp has the columns of all four threads that share them, the second too.
    const int lane = tid & 31, part = lane / State::COLUMN_GROUPS, column = state.column + part;
    if (tid < 64 && column < columns()) {
      const int64_t t = steps.token(step);
      if (tid < 32 && s.out.data) out().store(t, first_column + column, pick(y, part));
      if (tid >= 32 && s.inner.data) inner().store(t, first_column + column, pick(m, part));
    }
    if (s.of.gate_kind != CLA_NO_GATE) state.scale_rows(of + DECAY);
    if (writes_value) state.add(of + X1, v);
    if (LOW_RANK && reverse && s.anchors.data) {
      // What a low-rank token reads is read before the state fades.
      const int64_t at = steps.token(step) - steps.start;
      if (at > 0 && at % CLA_DELTA_SEGMENT == 0) keep(at / CLA_DELTA_SEGMENT - 1);
    }
    state.add(of + X2, c);
  }

  CLA_DEVICE void run() {
    const int64_t count = steps.count;
    if (s.first.data) {
      const float *from = s.first.data + sequence * s.first.sequence + head * s.first.head + first_column * s.first.col;
      state.load(from, s.first.row, s.first.col, s.of.k_dim, columns());
    } else {
      state.zero();
    }
    Fetched next;
    if (count > 0) {
      fetch(next, 0);
      place(next, shared);
    }
    int stage = 0;
    for (int64_t step = 0; step < count; step++, stage ^= 1) {
      barrier();
      if (step + 1 < count) fetch(next, step + 1);
      keep_before(step);
      solve(shared + stage * STAGE, step);
      if (step + 1 < count) place(next, shared + (stage ^ 1) * STAGE);
    }
    if (!s.last.data) return;
    float *to = s.last.data + sequence * s.last.sequence + head * s.last.head + first_column * s.last.col;
    state.store(to, s.last.row, s.last.col, s.of.k_dim, columns());
  }
};

template <int EACH, bool LOW_RANK, bool CROWDED>
CLA_KERNEL(128, EACH > 8 ? 2 : !CROWDED ? (EACH == 8 && LOW_RANK ? 3 : 4) : LOW_RANK ? 7 : 8)
void delta_recurrent_kernel(const CLA_CONSTANT cla_delta_sweep s) {
  const int tiles = (s.of.v_dim + CLA_DELTA_COLUMNS - 1) / CLA_DELTA_COLUMNS;
  DeltaRecurrent<EACH, LOW_RANK, CROWDED>(s, tiles, Place(block_x() / tiles, s.of.heads, 1)).run();
}

template <int EACH, bool LOW_RANK, bool CROWDED> int32_t launch_delta_recurrent(const cla_delta_sweep &s, void *stream) {
  using Kernel = DeltaRecurrent<EACH, LOW_RANK, CROWDED>;
  const int64_t tiles = (s.of.v_dim + CLA_DELTA_COLUMNS - 1) / CLA_DELTA_COLUMNS;
  const Dims grid = {(int64_t)s.of.sequences * s.of.heads * tiles, 1};
  return launch(delta_recurrent_kernel<EACH, LOW_RANK, CROWDED>, grid, Kernel::THREADS, Kernel::SHARED, stream, s);
}

}  // namespace cla

extern "C" int32_t cla_delta_recurrent(const cla_delta_sweep *sweep, void *stream) {
  return cla::by_rows(sweep->of.k_dim, sweep->of.low_rank, [&](auto each, auto low_rank) {
    constexpr int EACH = decltype(each)::value;
    constexpr bool LOW_RANK = decltype(low_rank)::value;
    return sweep->crowded ? cla::launch_delta_recurrent<EACH, LOW_RANK, true>(*sweep, stream)
                          : cla::launch_delta_recurrent<EACH, LOW_RANK, false>(*sweep, stream);
  });
}
