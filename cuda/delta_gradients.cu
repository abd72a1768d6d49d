// The gradients of keys, gates and beta in the delta families (see delta.h), token by token, from what the two sweeps left.
// What every token wrote is known by then, and so is the gradient of everything that was read: states and their gradients are
// sums that fade. A block has 64 channels of one segment of a head: the state's columns here, its rows are the values.
//
// With P = do, Q the gradient of what a token read (of the token after it in the low-rank family, which reads before it
// fades), A and B what a token writes, each without its factor, and r the key that goes with Q,
//
//     forwards   S~ = D S              of_q = S~^T P    of_r = S~^T Q      S = S~ + A (factor k)^T + B b^T
//     in reverse of_k = G^T A          of_b = G^T B     G = D (G + P (s q)^T + Q (factor r)^T)
//
// The products leave out what a token reads of itself, for dg; its terms are added to the gradients of the keys.
#include "delta_gradients.cuh"
#include "delta_segments.cuh"
#include "state_tile.cuh"

namespace cla {

// Which vectors can be copied.
enum {
  A_COPIED = 1,
  B_COPIED = 2,
  P_COPIED = 4,
  Q_COPIED = 8,
  KEY_Q_COPIED = 16,
  KEY_K_COPIED = 32,
  KEY_B_COPIED = 64,
  KEY_R_COPIED = 128,
  GATE_COPIED = 256,
};

template <int ROWS, bool LOW_RANK> struct DeltaGradients {
  using State = StateTile<ROWS>;
  static constexpr int COLUMNS = State::COLUMNS, SEGMENT = CLA_DELTA_SEGMENT, GROUP = ROWS > 128 ? 4 : 8;
  using Groups = TokenGroups<GROUP>;
  static_assert(GROUP <= TILE_WARPS && COLUMNS % CLA_DELTA_COLUMNS == 0 && COLUMNS <= 64, "as assumed below");
  // Of one token, in shared memory: vectors over values, then over channels, then numbers.
  static constexpr int A = 0, P = ROWS, Q = 2 * ROWS, B = 3 * ROWS, KEY_Q = (LOW_RANK ? 4 : 3) * ROWS;
  static constexpr int KEY_K = KEY_Q + COLUMNS, DECAY = KEY_K + COLUMNS, KEY_B = DECAY + COLUMNS;
  static constexpr int KEY_R = LOW_RANK ? KEY_B + COLUMNS : KEY_K, BETA = DECAY + (LOW_RANK ? 3 : 1) * COLUMNS;
  static constexpr int DOTS = BETA + 4, TOKEN = DOTS + 4;
  // What is read for the tokens of a group, in reverse: of_k and of_b.
  static constexpr int READ = 2 * COLUMNS, READS = 2 * GROUP * TOKEN;
  // For all tokens: of_q and of_r, later a token's term of dg as a sum of two, and whether all is forgotten before it.
  static constexpr int FOUND = READS + 2 * GROUP * READ, END = FOUND + 2 * SEGMENT * COLUMNS;
  static constexpr int FORGETS = 4 * (END + COLUMNS), SHARED = FORGETS + SEGMENT * COLUMNS;

  const cla_delta_gradient &c;
  const int copied;
  float *shared;
  int head, first_channel;
  int64_t sequence, segment;
  Steps steps;
  int64_t begin;  // the segment's first token, from the sequence's
  int count;
  TokenVector a, b, p, q, key_q, key_k, key_b, key_r, gate;
  State state;

  CLA_DEVICE DeltaGradients(const cla_delta_gradient &c, int copied, int slice, int head, const SegmentOf &of)
      : c(c), copied(copied), shared((float *)shared_memory()), head(head), first_channel(slice * COLUMNS),
        sequence(of.sequence), segment(of.segment), steps(c.of.cu_seqlens, c.of.tokens, sequence, false),
        begin(segment * SEGMENT), count(steps.count - begin < SEGMENT ? (int)(steps.count - begin) : SEGMENT),
        a(c.v, steps.batch, head), b(c.written, steps.batch, head), p(c.grad_out, steps.batch, head),
        q(c.of_written, steps.batch, head), key_q(c.of.q, steps.batch, head), key_k(c.of.k, steps.batch, head),
        key_b(c.of.b, steps.batch, head), key_r(c.of.a, steps.batch, head), gate(c.of.gate, steps.batch, head) {}

  CLA_DEVICE static int warp() { return State::warp(); }
  CLA_DEVICE static int lane() { return State::lane(); }
  CLA_DEVICE int channels() const { return c.of.k_dim - first_channel < COLUMNS ? c.of.k_dim - first_channel : COLUMNS; }
  CLA_DEVICE int64_t token(int64_t i) const { return steps.start + begin + i; }
  // Whether the sequence has the token behind the segment's i-th.
  CLA_DEVICE bool has_next(int64_t i) const { return begin + i + 1 < steps.count; }
  CLA_DEVICE bool by_channel() const { return c.of.gate_kind == CLA_GATE_ROWS; }
  CLA_DEVICE bool by_token() const { return c.of.gate_kind == CLA_GATE_SCALAR; }

  CLA_DEVICE float *slot(int group, int i) const { return shared + ((group & 1) * GROUP + i) * TOKEN; }
  CLA_DEVICE float *reads(int group, int i) const { return shared + READS + ((group & 1) * GROUP + i) * READ; }
  CLA_DEVICE float *found(int which, int64_t i) const { return shared + FOUND + (which * SEGMENT + i) * COLUMNS; }
  CLA_DEVICE unsigned char *forgets(int64_t i) const { return (unsigned char *)shared + FORGETS + i * COLUMNS; }

  // Single numbers of a warp's token; its vectors are on their way to shared memory.
  struct Fetched {
    float beta, gate;
  };
  CLA_DEVICE Fetched fetch(const Groups &groups, int group) const {
    Fetched f = {1.f, 0.f};
    if (warp() >= groups.size(group)) return f;
    const int64_t i = groups.place(group, warp()), t = token(i), read_by = LOW_RANK ? t + 1 : t;
    const bool is_read = !LOW_RANK || has_next(i);
    const int values = c.of.v_dim, keys = c.of.k_dim;
    float *to = slot(group, warp());
    a.fetch<ROWS>(c.v, copied & A_COPIED, t, 0, values, to + A);
    p.fetch<ROWS>(c.grad_out, copied & P_COPIED, t, 0, values, to + P);
    q.fetch<ROWS>(c.of_written, copied & Q_COPIED, read_by, 0, is_read ? values : 0, to + Q);
    key_q.fetch<COLUMNS>(c.of.q, copied & KEY_Q_COPIED, t, first_channel, keys, to + KEY_Q);
    key_k.fetch<COLUMNS>(c.of.k, copied & KEY_K_COPIED, t, first_channel, keys, to + KEY_K);
    if (by_channel()) gate.fetch<COLUMNS>(c.of.gate, copied & GATE_COPIED, t, first_channel, keys, to + DECAY);
    if (LOW_RANK) {
      b.fetch<ROWS>(c.written, copied & B_COPIED, t, 0, values, to + B);
      key_b.fetch<COLUMNS>(c.of.b, copied & KEY_B_COPIED, t, first_channel, keys, to + KEY_B);
      key_r.fetch<COLUMNS>(c.of.a, copied & KEY_R_COPIED, read_by, first_channel, is_read ? keys : 0, to + KEY_R);
    }
    copies_commit();
    if (!LOW_RANK) f.beta = Rows(c.of.beta, steps.batch, opaque(head)).load(t, 0);
    if (by_token()) f.gate = load_element(gate.data, c.of.gate.dtype, t * c.of.gate.token);
    return f;
  }
  CLA_DEVICE void place(const Groups &groups, int group, const Fetched &f) const {
    if (warp() >= groups.size(group)) return;
    float *to = slot(group, warp());
    copies_wait<0>();
    TokenVector::convert<ROWS>(c.v, copied & A_COPIED, to + A);
    TokenVector::convert<ROWS>(c.grad_out, copied & P_COPIED, to + P);
    TokenVector::convert<ROWS>(c.of_written, copied & Q_COPIED, to + Q);
    TokenVector::convert<COLUMNS>(c.of.q, copied & KEY_Q_COPIED, to + KEY_Q);
    TokenVector::convert<COLUMNS>(c.of.k, copied & KEY_K_COPIED, to + KEY_K);
    const auto decay = [](float g) { return exp_fast(g); };
    if (by_channel()) TokenVector::convert<COLUMNS>(c.of.gate, copied & GATE_COPIED, to + DECAY, decay);
    if (by_token()) to[DECAY + lane()] = to[DECAY + 32 + lane()] = exp_fast(f.gate);
    if (LOW_RANK) {
      TokenVector::convert<ROWS>(c.written, copied & B_COPIED, to + B);
      TokenVector::convert<COLUMNS>(c.of.b, copied & KEY_B_COPIED, to + KEY_B);
      TokenVector::convert<COLUMNS>(c.of.a, copied & KEY_R_COPIED, to + KEY_R);
    }
    if (lane() == 0) to[BETA] = f.beta;
    if (!groups.reverse) return;
    // What a token reads of its own: A . P, A . Q, B . P and B . Q.
    float dots[4] = {0.f, 0.f, 0.f, 0.f};
    warp_barrier();
    CLA_UNROLL
    for (int r = lane(); r < ROWS; r += 32) {
      dots[0] += to[A + r] * to[P + r], dots[1] += to[A + r] * to[Q + r];
      if (LOW_RANK) dots[2] += to[B + r] * to[P + r], dots[3] += to[B + r] * to[Q + r];
    }
    CLA_UNROLL
    for (int n = 0; n < (LOW_RANK ? 4 : 2); n++) {
      dots[n] = sum_of_lanes(dots[n]);
      if (lane() == 0) to[DOTS + n] = dots[n];
    }
  }
  // What r is multiplied by.
  CLA_DEVICE static float read_factor(float beta) { return LOW_RANK ? 1.f : -beta; }

  CLA_DEVICE void load(const cla_delta_states &states) {
    const float *from = anchor_of(states, sequence, segment, head, c.of.heads, (int64_t)c.state_rows * c.state_columns);
    state.load(from + first_channel * (int64_t)c.state_columns, 1, c.state_columns, c.of.v_dim, channels());
  }
  CLA_DEVICE void fade(const float *of) {
    if (c.of.gate_kind == CLA_NO_GATE) return;
    float decay[State::WIDTH];
    state.by_column(of + DECAY, decay);
    state.scale_columns(decay);
  }
  CLA_DEVICE void add(const float *of, int rows, int keys, float factor) {
    float key[State::WIDTH];
    state.by_column(of + keys, key);
    state.add(of + rows, {factor * key[0], factor * key[1]});
  }
  template <class Solve, class Finish> CLA_DEVICE void go(const Groups &groups, Solve solve, Finish finish) {
    barrier();
    for_groups(
        groups, warp() * State::OF_WARP < channels(), [] {}, [&](int group) { return fetch(groups, group); },
        [&](int group, const Fetched &f) { place(groups, group, f); }, solve, finish);
  }

  // ---- forwards ----

  // Leaves the state without what the segment's last token writes.
  CLA_DEVICE void run_forwards() {
    load(c.starts);
    if (LOW_RANK && segment == 0 && c.da.data) read_initial_state();
    const Groups groups(count, false);
    const auto solve = [&](int group, int n) {
      const float *of = slot(group, n);
      const int i = (int)groups.place(group, n);
      fade(of);
      const float read = state.read_two(of + P, of + Q);
      if (!(lane() & 16)) found(State::is_other(), i)[state.own_column()] = read;
      if (i + 1 == count) return;
      add(of, A, KEY_K, of[BETA]);
      if (LOW_RANK) add(of, B, KEY_B, 1.f);
    };
    go(groups, solve, [](int) {});
  }
  // In the low-rank family a sequence's first token reads the initial state.
  CLA_DEVICE void read_initial_state() {
    float *row = shared;
    if (warp() == 0) {
      q.fetch<ROWS>(c.of_written, false, token(0), 0, c.of.v_dim, row);
    }
    barrier();
    const float read = state.read(row);
    if (State::is_set(0) && state.own_column() < channels()) {
      Rows(c.da, steps.batch, head).store(token(0), first_channel + state.own_column(), read);
    }
  }

  // ---- in reverse ----

  CLA_DEVICE void run_in_reverse() {
    // The sum over values of S G behind the segment.
    const State before_last = state;
    load(c.ends);
    float sum[State::WIDTH] = {0.f, 0.f};
    state.each([&](int i, int n) { sum[n] += before_last.x[i][n] * state.x[i][n]; });
    shared[END + state.own_column()] = state.total(sum);

    const Groups groups(count, true);
    const auto solve = [&](int group, int n) {
      const float *of = slot(group, n);
      float *to = reads(group, n) + state.own_column();
      if (LOW_RANK) {
        const float read = state.read_two(of + A, of + B);
        if (!(lane() & 16)) to[State::is_other() ? COLUMNS : 0] = read;
      } else {
        const float read = state.read(of + A);
        if (State::is_set(0)) to[0] = read;
      }
      add(of, P, KEY_Q, c.of.scale);
      add(of, Q, KEY_R, read_factor(of[BETA]));
      fade(of);
    };
    go(groups, solve, [&](int group) {
      if (warp() >= groups.size(group)) return;
      const int i = (int)groups.place(group, warp());
      const float *of = slot(group, warp()), *read = reads(group, warp());
      for (int channel = lane(); channel < COLUMNS; channel += 32) finish(i, of, read, channel);
    });
    sum_up();
  }

  CLA_DEVICE void store(const cla_tensor &x, int64_t t, int channel, float value) const {
    if (x.data && channel < channels()) Rows(x, steps.batch, opaque(head)).store(t, first_channel + channel, value);
  }

  // A channel of token i, when all that is read for it is there.
  CLA_DEVICE void finish(int i, const float *of, const float *read, int channel) {
    const float *dot = of + DOTS;
    const int64_t t = token(i);
    const float query = of[KEY_Q + channel], key = of[KEY_K + channel], r = of[KEY_R + channel];
    const float rank = LOW_RANK ? of[KEY_B + channel] : 0.f, beta = of[BETA], s = c.of.scale;
    const float of_q = s * found(0, i)[channel], of_r = read_factor(beta) * found(1, i)[channel];
    const float of_k = beta * read[channel], of_b = LOW_RANK ? read[COLUMNS + channel] : 0.f;
    if (c.dg.data) {
      double term = (double)(query * of_q) + (double)(r * of_r);
      // What the last token of a segment wrote is not in what the sum began with.
      if (i + 1 < count) term -= (double)(key * of_k) + (double)(rank * of_b);
      const float most = (float)term;
      found(0, i)[channel] = most;
      // Of a term that is infinite there is no rest.
      found(1, i)[channel] = most - most == 0.f ? (float)(term - (double)most) : 0.f;
      forgets(i)[channel] = of[DECAY + channel] == 0.f;
    }
    const float own = s * beta * dot[0], own_rank = LOW_RANK ? s * dot[2] : 0.f;
    store(c.dq, t, channel, of_q + own * key + own_rank * rank);
    if (LOW_RANK) {
      const float own_read = dot[1], own_read_rank = dot[3];
      store(c.dk, t, channel, of_k + own * query + own_read * r);
      store(c.db, t, channel, of_b + own_rank * query + own_read_rank * r);
      if (has_next(i)) store(c.da, t + 1, channel, of_r + own_read * key + own_read_rank * rank);
    } else {
      store(c.dk, t, channel, of_k + own * query + of_r);
      if (first_channel == 0 && channel == 0) store(c.dbeta, t, 0, dot[1]);
    }
  }

  // dg, of the terms of all tokens.
  CLA_DEVICE void sum_up() {
    if (!c.dg.data) return;
    barrier();
    const int channel = thread_index();
    if (channel < COLUMNS) {
      double sum = shared[END + channel];
      for (int i = count - 1; i >= 0; i--) {
        sum += (double)found(0, i)[channel] + (double)found(1, i)[channel];
        if (forgets(i)[channel]) sum = 0.;
        found(0, i)[channel] = (float)sum;
      }
    }
    barrier();
    for (int i = warp(); i < count; i += TILE_WARPS) {
      for (int at = lane(); at < COLUMNS; at += 32) {
        const float sum = found(0, i)[at];
        if (by_channel()) {
          store(c.dg, token(i), at, sum);
        } else {
          const float all = sum_of_lanes(at < channels() ? sum : 0.f);
          const int slice = (first_channel + at) / CLA_DELTA_COLUMNS;
          if (lane() == 0 && at < channels()) Rows(c.dg, steps.batch, opaque(head)).store(token(i), slice, all);
        }
      }
    }
  }
};

template <int ROWS, bool LOW_RANK>
CLA_KERNEL(TILE_THREADS, ROWS > 128 ? 1 : 2)
void delta_gradients_kernel(const CLA_CONSTANT cla_delta_gradient c, int copied) {
  const int slices = (c.of.k_dim + StateTile<ROWS>::COLUMNS - 1) / StateTile<ROWS>::COLUMNS;
  const int slice = block_x() % slices, head = block_x() / slices % c.of.heads;
  const SegmentOf segment(c.starts, c.of.sequences, block_x() / slices / c.of.heads);
  DeltaGradients<ROWS, LOW_RANK> gradients(c, copied, slice, head, segment);
  gradients.run_forwards();
  gradients.run_in_reverse();
}

template <int ROWS, bool LOW_RANK> int32_t launch_delta_gradients(cla_delta_gradient c, void *stream) {
  using Kernel = DeltaGradients<ROWS, LOW_RANK>;
  if (!LOW_RANK) c.v = c.written;  // the A of the kernel
  const int64_t slices = (c.of.k_dim + Kernel::COLUMNS - 1) / Kernel::COLUMNS;
  const Dims grid = {c.starts.all * c.of.heads * slices, 1};
  int copied = 0;
  const auto check = [&](const cla_tensor &x, int width, int bit) { copied |= can_be_copied(x, width) ? bit : 0; };
  check(c.v, c.of.v_dim, A_COPIED), check(c.written, c.of.v_dim, B_COPIED), check(c.grad_out, c.of.v_dim, P_COPIED);
  check(c.of_written, c.of.v_dim, Q_COPIED), check(c.of.q, c.of.k_dim, KEY_Q_COPIED), check(c.of.k, c.of.k_dim, KEY_K_COPIED);
  check(c.of.b, c.of.k_dim, KEY_B_COPIED), check(c.of.a, c.of.k_dim, KEY_R_COPIED), check(c.of.gate, c.of.k_dim, GATE_COPIED);
  return launch(delta_gradients_kernel<ROWS, LOW_RANK>, grid, TILE_THREADS, Kernel::SHARED, stream, c, copied);
}

}  // namespace cla

extern "C" int32_t cla_delta_gradients(const cla_delta_gradient *call, void *stream) {
  const int32_t code = cla::delta_chunk_gradients(*call, stream);
  if (code != cla::NOT_IN_CHUNKS) return code;
  return cla::by_rows(call->of.v_dim, [&](auto rows) {
    constexpr int ROWS = decltype(rows)::value;
    return call->of.low_rank ? cla::launch_delta_gradients<ROWS, true>(*call, stream)
                             : cla::launch_delta_gradients<ROWS, false>(*call, stream);
  });
}
