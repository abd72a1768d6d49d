// The gradients of keys, gates and beta in the delta families (see delta.h), token by token, from what the two sweeps left.
// What every token wrote is known by then, and so is the gradient of everything that was read: states and their gradients are
// sums that fade. A block has 32 channels of one segment of a head: the state's columns here, its rows are the values.
//
// With P = do, Q the gradient of what a token read (of the token after it in the low-rank family, which reads before it
// fades), A and B what a token writes, each without its factor, and r the key that goes with Q,
//
//     forwards   S~ = D S              of_q = S~^T P    of_r = S~^T Q      S = S~ + A (factor k)^T + B b^T
//     in reverse of_k = G^T A          of_b = G^T B     G = D (G + P (s q)^T + Q (factor r)^T)
//
// The products leave out what a token reads of itself, for dg; its terms are added to the gradients of the keys.
#include "delta_gradients.cuh"
#include "delta_state.cuh"

namespace cla {

template <int EACH, bool LOW_RANK> struct DeltaGradients {
  using State = DeltaState<EACH>;
  static constexpr int ROWS = State::ROWS, COLUMNS = State::COLUMNS, THREADS = State::THREADS, WARPS = State::WARPS;
  static constexpr int PER_THREAD = ROWS > THREADS ? ROWS / THREADS : 1, SEGMENT = CLA_DELTA_SEGMENT;
  // Of one token, in shared memory: vectors over values, then over channels.
  static constexpr int A = 0, B = ROWS, P = 2 * ROWS, Q = 3 * ROWS;
  static constexpr int KEY_Q = 4 * ROWS, KEY_K = KEY_Q + COLUMNS, KEY_B = KEY_K + COLUMNS, KEY_R = KEY_B + COLUMNS;
  static constexpr int DECAY = KEY_R + COLUMNS, BETA = DECAY + COLUMNS, STAGE = BETA + COLUMNS;
  // Then the sums of warps and products of two tokens, and what the pass forwards found.
  static constexpr int SUMS_STAGE = 2 * WARPS * COLUMNS, SUMS = 2 * STAGE, DOTS = SUMS + 2 * SUMS_STAGE;
  static constexpr int OF_Q = DOTS + 2 * WARPS, OF_R = OF_Q + SEGMENT * COLUMNS, SHARED = 4 * (OF_R + SEGMENT * COLUMNS);

  const cla_delta_gradient &c;
  float *shared;
  int tid, head, first_channel;
  int64_t sequence, segment;
  Steps steps;
  Rows q, k, a, b, gate, beta, grad_out, v, written, of_written, dq, dk, da, db, dg, dbeta;
  int64_t begin;  // the segment's first token, from the sequence's
  int count;
  State state;

  CLA_DEVICE DeltaGradients(const cla_delta_gradient &c, int slice, int head, int64_t sequence, int64_t segment)
      : c(c), shared((float *)shared_memory()), tid(thread_index()), head(head),
        first_channel(slice * COLUMNS), sequence(sequence), segment(segment),
        steps(c.of.cu_seqlens, c.of.tokens, sequence, false), q(c.of.q, steps.batch, head), k(c.of.k, steps.batch, head),
        a(c.of.a, steps.batch, head), b(c.of.b, steps.batch, head), gate(c.of.gate, steps.batch, head),
        beta(c.of.beta, steps.batch, head), grad_out(c.grad_out, steps.batch, head), v(c.v, steps.batch, head),
        written(c.written, steps.batch, head), of_written(c.of_written, steps.batch, head), dq(c.dq, steps.batch, head),
        dk(c.dk, steps.batch, head), da(c.da, steps.batch, head), db(c.db, steps.batch, head), dg(c.dg, steps.batch, head),
        dbeta(c.dbeta, steps.batch, head), begin(segment * SEGMENT) {
    count = steps.count - begin < SEGMENT ? (int)(steps.count - begin) : SEGMENT;
  }

  CLA_DEVICE int channels() const { return c.of.k_dim - first_channel < COLUMNS ? c.of.k_dim - first_channel : COLUMNS; }
  CLA_DEVICE int64_t token(int i) const { return steps.start + begin + i; }
  // Whether the sequence has the token behind the segment's i-th.
  CLA_DEVICE bool has_next(int i) const { return begin + i + 1 < steps.count; }

  struct Fetched {
    float a[PER_THREAD], b[PER_THREAD], p[PER_THREAD], q[PER_THREAD];
    float key_q, key_k, key_b, key_r, gate, beta;
  };
  CLA_DEVICE void fetch(Fetched &f, int i) const {
    const int64_t t = token(i), read_by = LOW_RANK ? t + 1 : t;
    const bool is_read = !LOW_RANK || has_next(i);
    CLA_UNROLL
    for (int j = 0; j < PER_THREAD; j++) {
      const int r = tid + j * THREADS;
      const bool valid = r < c.of.v_dim;
      f.a[j] = valid ? v.load(t, r) : 0.f;
      f.b[j] = valid && LOW_RANK ? written.load(t, r) : 0.f;
      f.p[j] = valid ? grad_out.load(t, r) : 0.f;
      f.q[j] = valid && is_read ? of_written.load(read_by, r) : 0.f;
    }
    const int channel = first_channel + tid;
    const bool valid = tid < channels();
    f.key_q = valid ? q.load(t, channel) : 0.f;
    f.key_k = valid ? k.load(t, channel) : 0.f;
    f.key_b = valid && LOW_RANK ? b.load(t, channel) : 0.f;
    f.key_r = valid && is_read ? (LOW_RANK ? a.load(read_by, channel) : f.key_k) : 0.f;
    f.gate = valid && c.of.gate_kind != CLA_NO_GATE ? gate.load(t, c.of.gate_kind == CLA_GATE_ROWS ? channel : 0) : 0.f;
    f.beta = tid < COLUMNS && !LOW_RANK ? beta.load(t, 0) : 1.f;
  }
  CLA_DEVICE void place(const Fetched &f, int i) const {
    float *to = stage(i);
    CLA_UNROLL
    for (int j = 0; j < PER_THREAD; j++) {
      const int r = tid + j * THREADS;
      if (r >= ROWS) continue;
      to[A + r] = f.a[j];
      to[B + r] = f.b[j];
      to[P + r] = f.p[j];
      to[Q + r] = f.q[j];
    }
    // Each thread its own: `finish`, by which others still need theirs, goes on while the rest of the block is here.
    if (tid < COLUMNS) {
      to[KEY_Q + tid] = f.key_q;
      to[KEY_K + tid] = f.key_k;
      to[KEY_B + tid] = f.key_b;
      to[KEY_R + tid] = f.key_r;
      to[DECAY + tid] = exp_fast(f.gate);
      to[BETA + tid] = f.beta;
    }
  }
  CLA_DEVICE float *stage(int i) const { return shared + (i & 1) * STAGE; }
  CLA_DEVICE float *sums(int i) const { return shared + SUMS + (i & 1) * SUMS_STAGE; }
  CLA_DEVICE float *dots(int i) const { return shared + DOTS + (i & 1) * WARPS; }
  CLA_DEVICE float *found(int which, int i) const { return shared + (which ? OF_R : OF_Q) + i * COLUMNS; }
  // What r is multiplied by.
  CLA_DEVICE static float read_factor(float beta) { return LOW_RANK ? 1.f : -beta; }

  CLA_DEVICE void read_into(const float *by_row, float *to) const {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    state.read(by_row, sum);
    state.sum_of_warp(sum, to + tid / 32 * COLUMNS);
  }
  CLA_DEVICE float sum_of_warps(const float *from, int column) const {
    float sum = 0.f;
    CLA_UNROLL
    for (int w = 0; w < WARPS; w++) sum += from[w * COLUMNS + column];
    return sum;
  }
  CLA_DEVICE void load(const cla_delta_states &states) {
    const float *from = anchor_of(states, sequence, segment, head, c.of.heads, (int64_t)c.state_rows * c.state_columns);
    state.load(from + first_channel * (int64_t)c.state_columns, 1, c.state_columns, c.of.v_dim, channels());
  }
  CLA_DEVICE void fade(const float *of) {
    if (c.of.gate_kind == CLA_NO_GATE) return;
    float decay[4];
    load4(decay, of + DECAY + state.column);
    state.scale_columns(decay);
  }
  CLA_DEVICE void add(const float *of, int rows, int keys, float factor) {
    float key[4];
    load4(key, of + keys + state.column);
    CLA_UNROLL
    for (int i = 0; i < 4; i++) key[i] *= factor;
    state.add(of + rows, key);
  }

  // ---- forwards ----

  // Leaves the state without what the segment's last token writes.
  CLA_DEVICE void run_forwards() {
    load(c.starts);
    Fetched next;
    fetch(next, 0);
    place(next, 0);
    if (LOW_RANK && segment == 0 && da.data) read_initial_state();
    CLA_NO_UNROLL
    for (int i = 0; i < count; i++) {
      barrier();
      if (i > 0) keep(i - 1);
      if (i + 1 < count) fetch(next, i + 1);
      const float *of = stage(i);
      fade(of);
      read_into(of + P, sums(i));
      read_into(of + Q, sums(i) + WARPS * COLUMNS);
      if (i + 1 < count) {
        add(of, A, KEY_K, of[BETA]);
        if (LOW_RANK) add(of, B, KEY_B, 1.f);
        place(next, i + 1);
      }
    }
    barrier();
    keep(count - 1);
  }
  CLA_DEVICE void keep(int i) const {
    if (tid >= 2 * COLUMNS) return;
    const int which = tid / COLUMNS, column = tid % COLUMNS;
    found(which, i)[column] = sum_of_warps(sums(i) + which * WARPS * COLUMNS, column);
  }
  // In the low-rank family a sequence's first token reads the initial state.
  CLA_DEVICE void read_initial_state() {
    float *row = shared + OF_Q;  // free as yet
    for (int r = tid; r < ROWS; r += THREADS) row[r] = r < c.of.v_dim ? of_written.load(token(0), r) : 0.f;
    barrier();
    read_into(row, sums(1));
    barrier();
    if (tid < channels()) da.store(token(0), first_channel + tid, sum_of_warps(sums(1), tid));
  }

  // ---- in reverse ----

  CLA_DEVICE void run_in_reverse() {
    const State before_last = state;
    load(c.ends);
    double sum = at_end(before_last);
    Fetched next;
    fetch(next, count - 1);
    place(next, count - 1);
    CLA_NO_UNROLL
    for (int i = count - 1; i >= 0; i--) {
      barrier();
      if (i + 1 < count && tid < COLUMNS) finish(i + 1, sum);
      if (i > 0) fetch(next, i - 1);
      const float *of = stage(i);
      read_into(of + A, sums(i));
      if (LOW_RANK) read_into(of + B, sums(i) + WARPS * COLUMNS);
      multiply_rows(of, dots(i));
      if (i > 0) {
        add(of, P, KEY_Q, c.of.scale);
        add(of, Q, KEY_R, read_factor(of[BETA]));
        fade(of);
        place(next, i - 1);
      }
    }
    barrier();
    if (tid < COLUMNS) finish(0, sum);
  }

  // The sum over values of S G behind the segment, of the thread's channel.
  CLA_DEVICE float at_end(const State &before_last) {
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    CLA_UNROLL
    for (int i = 0; i < EACH; i++) {
      CLA_UNROLL
      for (int j = 0; j < 4; j++) sum[j] += before_last.x[i][j] * state.x[i][j];
    }
    state.sum_of_warp(sum, sums(count) + tid / 32 * COLUMNS);
    barrier();
    return tid < COLUMNS ? sum_of_warps(sums(count), tid) : 0.f;
  }

  // What a token reads of its own: A . P, A . Q, B . P and B . Q, a warp each.
  CLA_DEVICE void multiply_rows(const float *of, float *to) const {
    const int warp = tid / 32;
    if (warp >= 2 && !LOW_RANK) return;
    const float *x = of + (warp & 2 ? B : A), *y = of + (warp & 1 ? Q : P);
    float sum = 0.f;
    for (int r = tid & 31; r < ROWS; r += 32) sum += x[r] * y[r];
    sum = sum_of_lanes(sum);
    if ((tid & 31) == 0) to[warp] = sum;
  }

  CLA_DEVICE void store(const Rows &to, int64_t t, float x) const {
    if (to.data && tid < channels()) to.store(t, first_channel + tid, x);
  }

  // By the thread of a channel, when all sums of token i are there.
  CLA_DEVICE void finish(int i, double &sum) {
    const float *of = stage(i), *dot = dots(i);
    const int64_t t = token(i);
    const float query = of[KEY_Q + tid], key = of[KEY_K + tid], rank = of[KEY_B + tid], r = of[KEY_R + tid];
    const float beta = of[BETA + tid], s = c.of.scale;
    const float of_q = s * found(0, i)[tid], of_r = read_factor(beta) * found(1, i)[tid];
    const float of_k = beta * sum_of_warps(sums(i), tid);
    const float of_b = LOW_RANK ? sum_of_warps(sums(i) + WARPS * COLUMNS, tid) : 0.f;
    sum += (double)(query * of_q) + (double)(r * of_r);
    // What the last token of a segment wrote is not in what the sum began with.
    if (i + 1 < count) sum -= (double)(key * of_k) + (double)(rank * of_b);
    if (of[DECAY + tid] == 0.f) sum = 0.;
    if (dg.data) {
      if (c.of.gate_kind == CLA_GATE_ROWS) {
        store(dg, t, (float)sum);
      } else {
        const float all = sum_of_lanes(tid < channels() ? (float)sum : 0.f);
        if (tid == 0) dg.store(t, first_channel / COLUMNS, all);
      }
    }
    const float own = s * beta * dot[0], own_rank = LOW_RANK ? s * dot[2] : 0.f;
    store(dq, t, of_q + own * key + own_rank * rank);
    if (LOW_RANK) {
      const float read = dot[1], read_rank = dot[3];
      store(dk, t, of_k + own * query + read * r);
      store(db, t, of_b + own_rank * query + read_rank * r);
      if (has_next(i)) store(da, t + 1, of_r + read * key + read_rank * rank);
    } else {
      store(dk, t, of_k + own * query + of_r);
      if (dbeta.data && tid == 0 && first_channel == 0) dbeta.store(t, 0, dot[1]);
    }
  }
};

template <int EACH, bool LOW_RANK> CLA_KERNEL(128, EACH > 8 ? 2 : EACH == 8 ? 3 : 4) void delta_gradients_kernel(cla_delta_gradient c) {
  const int slices = (c.of.k_dim + CLA_DELTA_COLUMNS - 1) / CLA_DELTA_COLUMNS;
  const int slice = block_x() % slices, head = block_x() / slices % c.of.heads;
  const SegmentOf of(c.starts, c.of.sequences, block_x() / slices / c.of.heads);
  DeltaGradients<EACH, LOW_RANK> gradients(c, slice, head, of.sequence, of.segment);
  gradients.run_forwards();
  gradients.run_in_reverse();
}

template <int EACH, bool LOW_RANK> int32_t launch_delta_gradients(cla_delta_gradient c, void *stream) {
  using Kernel = DeltaGradients<EACH, LOW_RANK>;
  if (!LOW_RANK) c.v = c.written;  // the A of the kernel: choosing there would put all of `c` in local memory
  const int64_t slices = (c.of.k_dim + CLA_DELTA_COLUMNS - 1) / CLA_DELTA_COLUMNS;
  const Dims grid = {c.starts.all * c.of.heads * slices, 1};
  return launch(delta_gradients_kernel<EACH, LOW_RANK>, grid, Kernel::THREADS, Kernel::SHARED, stream, c);
}

}  // namespace cla

extern "C" int32_t cla_delta_gradients(const cla_delta_gradient *call, void *stream) {
  const int32_t code = cla::delta_chunk_gradients(*call, stream);
  if (code != cla::NOT_IN_CHUNKS) return code;
  return cla::by_rows(call->of.v_dim, call->of.low_rank, [&](auto each, auto low_rank) {
    return cla::launch_delta_gradients<decltype(each)::value, decltype(low_rank)::value>(*call, stream);
  });
}
