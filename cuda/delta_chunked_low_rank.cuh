// The chunked sweep of the low-rank family: see PreparedLowRank in delta_chunk.cuh for the equations.
//
// What is prepared of a segment is too much for two stages. What is read of the state and with it comes while the segment before
// is written, the rest while the state is read.
#pragma once
#include "delta_chunk_sweep.cuh"

namespace cla {

template <int R, int DTYPE_> struct LowRankLayout {
  static constexpr int DTYPE = DTYPE_;
  using Keys = PreparedLowRank<R>;
  static constexpr int COLUMNS = 64, THREADS = 128;
  // In the order in which they come, the values of two segments.
  static constexpr int VALUES = 0, L = 2 * SUBTILE, R1 = L + 2 * SUBTILE, R2 = R1 + Keys::EACH;
  static constexpr int PREPARED = R2 + Keys::EACH, N = PREPARED + Prepared::BYTES, X1 = N + 2 * SUBTILE;
  static constexpr int X2 = X1 + Keys::EACH, OUT = X2 + Keys::EACH, SHARED = OUT + SUBTILE;
};

template <int R, int DTYPE, bool REVERSE> struct LowRankChunked : DeltaChunkSweep<R, 1, REVERSE, 128, false, DTYPE> {
  using Base = DeltaChunkSweep<R, 1, REVERSE, 128, false, DTYPE>;
  using At = LowRankLayout<R, DTYPE>;
  using Keys = PreparedLowRank<R>;
  using Base::s, Base::shared, Base::pair, Base::segments, Base::begin, Base::end, Base::state, Base::columns, Base::count_at;
  using Base::of_columns, Base::prepared_index, Base::zero, Base::add_by_triangle, Base::COLUMNS, Base::STEPS, Base::WGMMA;
  template <int N> using Operand = typename Base::template Operand<N>;
  using Pieces = typename Base::template Pieces<COLUMNS>;

  CLA_DEVICE LowRankChunked(const cla_delta_sweep &s) : Base(s) {}

  CLA_DEVICE Tile tile(int at) const { return {shared + at}; }
  CLA_DEVICE Tile values(int i) const { return tile(At::VALUES + (i & 1) * SUBTILE); }
  CLA_DEVICE const unsigned char *prepared(int i) const {
    return s.prepared + prepared_index(i) * (Prepared::BYTES + Keys::BYTES);
  }

  // ---- loading ----

  struct Moved {
    Pieces value, out;
    bool in_pieces;

    CLA_DEVICE Moved(const LowRankChunked &sweep)
        : Moved(sweep, sweep.of_values(), sweep.of_columns(sweep.s.out)) {}
    CLA_DEVICE Moved(const LowRankChunked &sweep, const Rows &value, const Rows &out)
        : value(sweep, value, value.data ? sweep.columns() : 0), out(sweep, out, sweep.columns()) {
      auto whole = [&](const Rows &x) { return !x.data || x.in_pieces(sweep.columns()); };
      in_pieces = whole(value) && whole(out);
    }
  };
  CLA_DEVICE void fetch_read(Moved &of, int i) const {
    if (i < end) {
      if (of.in_pieces) of.value.fetch(values(i), count_at(i));
      else Base::fetch_values_apart(s, values(i), i);
      const unsigned char *from = prepared(i) + Prepared::BYTES;
      this->template copy_triangles<2 * SUBTILE>(shared + At::L, from + Keys::L);
      this->template copy<2 * Keys::EACH>(shared + At::R1, from + Keys::R1);
    }
    copies_commit();
  }
  CLA_DEVICE void fetch_rest(int i) const {
    const unsigned char *from = prepared(i), *more = from + Prepared::BYTES;
    constexpr int FACTORS = Prepared::FACTORS;
    this->template copy_triangles<FACTORS>(shared + At::PREPARED, from);
    this->template copy<Prepared::BYTES - FACTORS>(shared + At::PREPARED + FACTORS, from + FACTORS);
    this->template copy_triangles<2 * SUBTILE>(shared + At::N, more + Keys::N);
    this->template copy<2 * Keys::EACH>(shared + At::X1, more + Keys::X1);
    copies_commit();
  }
  CLA_DEVICE void clear() const {
    this->template clear_unused<2 * SUBTILE>(shared + At::L);
    this->template clear_unused<Prepared::FACTORS>(shared + At::PREPARED);
    this->template clear_unused<2 * SUBTILE>(shared + At::N);
  }
  // All threads, when what was on its way has come.
  CLA_DEVICE static void meet() {
    copies_wait<0>();
    shared_fence();
    barrier();
  }
  CLA_DEVICE void flush(Moved &of, int i) const {
    if (!s.out.data) return;
    if (of.in_pieces) of.out.store(tile(At::OUT), count_at(i));
    else Base::flush_apart(s, tile(At::OUT), i);
  }

  // ---- one segment ----

  // V as an operand: bf16 where it lies, f16 in registers, in two parts.
  static constexpr bool BF16 = DTYPE == CLA_BF16;
  using Values = std::conditional_t<BF16, Tile, Operand<STEPS>>;
  CLA_DEVICE void load(Values &v, int i) const {
    if constexpr (BF16) v = values(i);
    else this->load_values(v, values(i));
  }
  // acc += V^T m^T for a triangle in two parts.
  CLA_DEVICE static void add_values_by_triangle(float (&acc)[8][4], const Values &v, Tile m) {
    if constexpr (BF16) {
      add_columns_by_rows<WGMMA>(acc, v, m);
      add_columns_by_rows<WGMMA>(acc, v, {m.base + SUBTILE});
    } else {
      add_by_triangle(acc, v, m);
    }
  }
  // X += V^T x1, a key in two parts.
  CLA_DEVICE void add_values_to_state(const Values &v, Tile x1) {
    if constexpr (BF16) {
      add_columns_by_columns<WGMMA, R>(state, v, x1);
      add_columns_by_columns<WGMMA, R>(state, v, {x1.base + Base::KEY});
    } else {
      Base::template add_to_state<true>(v, x1);
    }
  }
  // Moves what belongs to a step, of all that is accumulated.
  CLA_DEVICE void move_step(float (&to)[8][4], float (&from)[8][4], int step) const {
    CLA_UNROLL
    for (int j = 0; j < 8; j++) {
      CLA_UNROLL
      for (int e = 0; e < 4; e++) {
        if (8 * j + pair + (e & 1) == step) to[j][e] = from[j][e], from[j][e] = 0.f;
      }
    }
  }

  CLA_DEVICE void solve(Moved &moved, int i) {
    float acc[8][4], result[8][4];
    zero(acc);
    zero(result);
    {
      Values v;
      load(v, i);
      products_fence<WGMMA>();
      add_values_by_triangle(acc, v, tile(At::L));
      products_commit<WGMMA>();
      // Of both, values and the state, registers are too few.
      if (!BF16) products_wait<WGMMA, 0>();
      Operand<R / 16> x;
      x.pack(state);
      products_fence<WGMMA>();
      Base::template add_by_rows<true>(acc, x, tile(At::R1));
      Base::template add_by_rows<true>(result, x, tile(At::R2));
      products_commit<WGMMA>();
      products_wait<WGMMA, 0>();
    }
    meet();
    fetch_read(moved, i + 1);
    Operand<STEPS> a;
    a.pack(acc);
    zero(acc);
    products_fence<WGMMA>();
    add_by_triangle(acc, a, tile(At::PREPARED + Prepared::T));
    products_commit<WGMMA>();
    this->template fade_state<true>((const float *)(shared + At::PREPARED + Prepared::FACTORS) + Prepared::WHOLE_BY_CHANNEL);
    products_wait<WGMMA, 0>();
    if (s.inner.data) this->store_inner(i, acc);
    // In reverse an anchor is without what the first token of the segment writes here, the last step.
    const bool keeps = REVERSE && s.anchors.data && i + 1 < segments;
    float last[8][4];
    zero(last);
    if (keeps) move_step(last, acc, count_at(i) - 1);
    a.pack(acc);
    Values v;
    load(v, i);
    products_fence<WGMMA>();
    add_values_to_state(v, tile(At::X1));
    Base::template add_to_state<true>(a, tile(At::X2));
    add_by_triangle(result, a, tile(At::PREPARED + Prepared::P));
    add_values_by_triangle(result, v, tile(At::N));
    products_commit<WGMMA>();
    products_wait<WGMMA, 0>();
    if (keeps) {
      this->keep(i + 1);
      a.pack(last);
      products_fence<WGMMA>();
      Base::template add_to_state<true>(a, tile(At::X2));
      products_commit<WGMMA>();
      products_wait<WGMMA, 0>();
    }
    if (s.out.data) this->wait_with(tile(At::OUT), result, REVERSE ? 1.f : s.of.scale);
  }

  CLA_DEVICE void run() {
    Moved moved(*this);
    clear();
    fetch_read(moved, begin);
    this->load_state();
    if (REVERSE && begin == 0 && end > 0) this->keep(0);
    CLA_NO_UNROLL
    for (int i = begin; i < end; i++) {
      meet();
      fetch_rest(i);
      if (i > begin) flush(moved, i - 1);
      if (!REVERSE) this->keep(i);
      solve(moved, i);
    }
    barrier();
    if (begin < end) flush(moved, end - 1);
    this->store_last();
  }
};

template <class At, int R, bool REVERSE> CLA_KERNEL(128, 1) void low_rank_chunked_kernel(const CLA_CONSTANT cla_delta_sweep s) {
  LowRankChunked<R, At::DTYPE, REVERSE>(s).run();
}

template <class At, int R, bool REVERSE> int32_t launch_low_rank_chunked(const cla_delta_sweep &s, void *stream) {
  return launch(low_rank_chunked_kernel<At, R, REVERSE>, LowRankChunked<R, At::DTYPE, REVERSE>::grid(s), At::THREADS, At::SHARED,
                stream, s);
}

template <int R, int DTYPE> int32_t launch_delta_chunked(LowRankLayout<R, DTYPE>, const cla_delta_sweep &s, void *stream) {
  using At = LowRankLayout<R, DTYPE>;
  return s.reverse ? launch_low_rank_chunked<At, R, true>(s, stream) : launch_low_rank_chunked<At, R, false>(s, stream);
}

}  // namespace cla
