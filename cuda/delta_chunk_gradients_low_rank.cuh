// The gradients of the low-rank family in matrix form, where keys and values have up to 64 channels, as those of RWKV-7 do. What
// the token after reads, a_{t+1}, belongs to step t here: nothing fades between. With U what b wrote, dU the gradient of what a
// read, r_t = a_{t+1} and dR_t = dU_{t+1}, scores
//
//     QV = s dO V^T      QU = s dO U^T      RV = dR V^T      RU = dR U^T        for s < t
//
// and products that fade as in delta_chunk_gradients_faded.cuh,
//
//     dQ = s from dO S^T + QV K + QU B        dK = left V E^T + QV^T Q + RV^T R
//     dR =   from dR S^T + RV K + RU B        dB = left U E^T + QU^T Q + RU^T R
//
// each without a step's term with itself, of the diagonals of the scores. da_{t+1} = dR_t; that of a sequence's first token is
// what it reads of the initial state.
#pragma once
#include "delta_chunk_gradients_faded.cuh"

namespace cla {

template <int R> struct LowRankGradientsLayout {
  // do, U and dU with the state are where the delta rules have do, M and U.
  using Base = DeltaChunkGradients<R, R>;
  static constexpr int KEY = Base::KEY, BLOCKS = CHUNK / 16, PAIR = 2 * SUBTILE;
  static constexpr int VALUES = Base::A, QV = VALUES + Base::VALUE, QU = QV + PAIR, RV = QU + PAIR, RU = RV + PAIR;
  static constexpr int K = RU + PAIR, B = K + KEY, Q = B + KEY, A = Q + KEY;
  // Faded k and b, then q and a, in two parts each, and at last the terms of the gate's gradient.
  static constexpr int DECAYS = A + KEY, FADED = DECAYS + 4 * CHUNK * R, TERMS = FADED;
  static constexpr int OWN = FADED + 4 * KEY, WHOLE = OWN + 4 * 4 * CHUNK, FIRST = WHOLE + 4 * BLOCKS * R;
  static constexpr int BEHIND = FIRST + 4 * BLOCKS * R, SHARED = BEHIND + 4 * R;
  static_assert(4 * CHUNK * (R + 8) <= 4 * KEY, "terms have room");
};

template <int R, int DTYPE>
struct DeltaChunkGradientsLowRank : DeltaChunkGradientsFaded<R, R, DTYPE, LowRankGradientsLayout<R>> {
  using Base = DeltaChunkGradientsFaded<R, R, DTYPE, LowRankGradientsLayout<R>>;
  using At = LowRankGradientsLayout<R>;
  using Base::c, Base::tid, Base::rows, Base::part, Base::v_steps, Base::at, Base::tile, Base::floats, Base::rows_of;
  using Base::each, Base::each_with_key, Base::has_next, Base::zero;
  using Base::COLUMNS, Base::INPUT, Base::GRAD_OUT, Base::M, Base::U, Base::VALUE, Base::TILES, Base::THREADS;
  using Faded = typename Base::Faded;
  static constexpr int SHARED = At::SHARED;
  enum Own { QV, QU, RV, RU, SCORES };

  SegmentSteps after;  // the same segment, a step on

  CLA_DEVICE DeltaChunkGradientsLowRank(const cla_delta_gradient &c, const SegmentOf &of, int64_t index, int head)
      : Base(c, of, index, head), after(at) {
    const int64_t left = at.steps.start + at.steps.count - ++after.first;
    after.count = left < CHUNK ? (int)left : CHUNK;
  }

  CLA_DEVICE float *own(int which) const { return floats(At::OWN) + which * CHUNK; }
  CLA_DEVICE static int scores(int which) { return At::QV + which * At::PAIR; }

  CLA_DEVICE void load() const {
    TileRows<R, THREADS>::fetch(tile(GRAD_OUT), rows_of(c.grad_out), at, c.of.v_dim, tid);
    TileRows<R, THREADS>::fetch(tile(At::VALUES), rows_of(c.v), at, c.of.v_dim, tid);
    TileRows<R, THREADS>::fetch(tile(At::K), rows_of(c.of.k), at, c.of.k_dim, tid);
    TileRows<R, THREADS>::fetch(tile(At::B), rows_of(c.of.b), at, c.of.k_dim, tid);
    TileRows<R, THREADS>::fetch(tile(At::Q), rows_of(c.of.q), at, c.of.k_dim, tid);
    TileRows<R, THREADS>::fetch(tile(At::A), rows_of(c.of.a), after, c.of.k_dim, tid);
    copies_commit();
    this->split_steps(M, c.written, at);
    this->split_steps(U, c.of_written, after);
    this->template split_state<false>(c.starts, [](int, float) {});
    this->load_decays();
    copies_wait<0>();
    barrier();
  }

  // All scores of the warp's rows and its part of the columns, and what is on their diagonals.
  CLA_DEVICE void find_scores() const {
    const int first = part * COLUMNS;
    float x[SCORES][COLUMNS / 8][4];
    CLA_UNROLL
    for (int i = 0; i < SCORES; i++) zero(x[i]);
    CLA_NO_UNROLL
    for (int step = 0; step < this->steps_of_scores(); step++) {
      uint32_t out[INPUT][4], read[4], read_rest[4];
      load_a(out[0], tile(GRAD_OUT), rows, 16 * step);
      this->split_input(out);
      load_a(read, tile(U), rows, 16 * step);
      load_a(read_rest, tile(U, 1, VALUE), rows, 16 * step);
      CLA_UNROLL
      for (int j = 0; j < COLUMNS / 8; j += 2) {
        uint32_t v[INPUT][4], u[4], u_rest[4];
        load_b(v[0], tile(At::VALUES), first + 8 * j, 16 * step);
        this->split_input(v);
        load_b(u, tile(M), first + 8 * j, 16 * step);
        load_b(u_rest, tile(M, 1, VALUE), first + 8 * j, 16 * step);
        mma16(x[QV][j], x[QV][j + 1], out[0], v[0]);
        mma16(x[QU][j], x[QU][j + 1], out[0], u);
        mma16(x[QU][j], x[QU][j + 1], out[0], u_rest);
        mma16(x[RV][j], x[RV][j + 1], read, v[0]);
        mma16(x[RV][j], x[RV][j + 1], read_rest, v[0]);
        if constexpr (INPUT == 2) {
          mma16(x[QV][j], x[QV][j + 1], out[0], v[1]);
          mma16(x[QV][j], x[QV][j + 1], out[1], v[0]);
          mma16(x[QU][j], x[QU][j + 1], out[1], u);
          mma16(x[RV][j], x[RV][j + 1], read, v[1]);
        }
        mma16(x[RU][j], x[RU][j + 1], read, u);
        mma16(x[RU][j], x[RU][j + 1], read, u_rest);
        mma16(x[RU][j], x[RU][j + 1], read_rest, u);
      }
    }
    CLA_UNROLL
    for (int i = 0; i < SCORES; i++) {
      const float factor = i == QV || i == QU ? c.of.scale : 1.f;
      each(x[i], [&](float &x, int t, int column) {
        const int s = first + column;
        x *= factor;
        if (s == t) own(i)[t] = x;
        if (s >= t) x = 0.f;
      });
      this->store_scores(scores(i), x[i]);
    }
  }

  // acc, with what steps read of what they write by two keys, to the rows of `steps`.
  CLA_DEVICE void store_with_own(const cla_tensor &tensor, float (&acc)[TILES][4], const SegmentSteps &steps, int own_x, int key_x,
                                 int own_y, int key_y) const {
    this->add_own(acc, own(own_x), key_x);
    this->add_own(acc, own(own_y), key_y);
    this->store(tensor, acc, steps);
  }
  // By the thread of a channel, for the first token of a sequence.
  CLA_DEVICE void store_first_read() const {
    if (!c.da.data || at.first != at.steps.start || tid >= c.of.k_dim) return;
    const Rows read = rows_of(c.of_written);
    const float *state = c.starts.data + ((this->segment * c.of.heads + this->head) * c.state_rows + tid) * (int64_t)c.state_columns;
    float sum = 0.f;
    for (int v = 0; v < c.of.v_dim; v++) sum += state[v] * read.load(at.first, v);
    rows_of(c.da).store(at.first, tid, sum);
  }

  CLA_DEVICE void run() const {
    load();
    find_scores();
    this->multiply_decays();
    barrier();
    // By q and a; of k and b; the terms of the gate's gradient.
    float reads[2][TILES][4], writes[2][TILES][4], first[2][TILES][4], terms[TILES][4];
    const Faded faded[2] = {{tile(At::FADED), tile(At::FADED, 1, At::KEY)},
                            {tile(At::FADED, 2, At::KEY), tile(At::FADED, 3, At::KEY)}};
    this->multiply_reads(reads[0], reads[1], v_steps, [&](int step) { return this->state_at(step); });
    each(reads[0], [&](float &x, int, int) { x *= c.of.scale; });
    this->fade_earlier(faded[0], At::K);
    this->fade_earlier(faded[1], At::B);
    barrier();
    this->add_earlier(reads, {{At::QV, At::QU}, {At::RV, At::RU}}, faded);
    this->add_own_earlier(reads, {{At::QV, At::QU}, {At::RV, At::RU}}, {At::K, At::B});
    each_with_key(reads[0], At::Q, [&](int j, int e, float x) { terms[j][e] = x; });
    each_with_key(reads[1], At::A, [&](int j, int e, float x) { terms[j][e] += x; });
    store_with_own(c.dq, reads[0], at, QV, At::K, QU, At::B);
    store_with_own(c.da, reads[1], after, RV, At::K, RU, At::B);
    store_first_read();
    barrier();
    this->load_behind();
    this->fade_later(faded[0], At::Q);
    this->fade_later(faded[1], At::A);
    barrier();
    zero(writes[0]);
    zero(writes[1]);
    CLA_NO_UNROLL
    for (int step = 0; step < v_steps; step++) {
      uint32_t v[INPUT][4], u[4], u_rest[4];
      load_a(v[0], tile(At::VALUES), rows, 16 * step);
      this->split_input(v);
      load_a(u, tile(M), rows, 16 * step);
      load_a(u_rest, tile(M, 1, VALUE), rows, 16 * step);
      Base::multiply_two(writes[0], v, writes[1], u, u_rest, this->state_at(step));
    }
    Base::copy(first, writes);
    this->add_later(writes, first, {{At::QV, At::RV}, {At::QU, At::RU}}, faded);
    this->add_own_later(writes, first, {{At::QV, At::RV}, {At::QU, At::RU}}, {At::Q, At::A});
    // What the last token wrote is not in what the sums begin with.
    each_with_key(writes[0], At::K, [&](int j, int e, float x) { terms[j][e] -= has_next(e) ? x : 0.f; });
    each_with_key(writes[1], At::B, [&](int j, int e, float x) { terms[j][e] -= has_next(e) ? x : 0.f; });
    store_with_own(c.dk, writes[0], at, QV, At::Q, RV, At::A);
    store_with_own(c.db, writes[1], at, QU, At::Q, RU, At::A);
    this->finish_gate(terms, first, {At::K, At::B});
  }
};

}  // namespace cla
