// The gradients of the delta rule in matrix form where a decay has a number for each channel of a key. A and B are those of
// delta_chunk_gradients.cuh without decays.
#pragma once
#include "delta_chunk_gradients_faded.cuh"

namespace cla {

template <int R> struct DecayedGradientsLayout {
  using Base = DeltaChunkGradients<R, 128>;
  static constexpr int BLOCKS = CHUNK / 16, KEY = Base::KEY;
  // Where values were read, when all are: decays, and faded keys in two parts. Later, in place of the state: faded q and k, for
  // which the gradient behind makes room, and then what the gate's gradient is summed up from.
  static constexpr int DECAYS = Base::U, KEYS = Base::GRAD_OUT, KEYS_REST = Base::Q;
  static constexpr int QUERIES = Base::STATE, LATER_KEYS = Base::STATE + 2 * KEY, TERMS = Base::STATE;
  static constexpr int WHOLE = Base::SHARED, FIRST = WHOLE + 4 * BLOCKS * R, BEHIND = FIRST + 4 * BLOCKS * R;
  static constexpr int SHARED = BEHIND + 4 * R;
  static_assert(4 * CHUNK * R <= 2 * Base::VALUE && 4 * KEY <= 2 * Base::STATE_PART, "decays and keys have room");
  static_assert(4 * CHUNK * (R + 8) <= 2 * Base::STATE_PART, "terms have room");
};

template <int R, int DTYPE>
struct DeltaChunkGradientsDecayed : DeltaChunkGradientsFaded<R, 128, DTYPE, DecayedGradientsLayout<R>> {
  using Base = DeltaChunkGradientsFaded<R, 128, DTYPE, DecayedGradientsLayout<R>>;
  using At = DecayedGradientsLayout<R>;
  using Base::c, Base::at, Base::tile, Base::numbers, Base::each, Base::each_with_key, Base::has_next, Base::add_own;
  using Base::store, Base::v_steps, Base::TILES, Base::A, Base::B, Base::K, Base::Q, Base::BETA, Base::OWN;
  using Faded = typename Base::Faded;
  static constexpr int SHARED = At::SHARED;

  CLA_DEVICE DeltaChunkGradientsDecayed(const cla_delta_gradient &c, const SegmentOf &of, int64_t index, int head)
      : Base(c, of, index, head) {}

  CLA_DEVICE void run() const {
    this->load();
    this->find_scores([](int, int) { return 1.f; });
    // Of what is read by q and by k, and of what is written; the terms of the gate's gradient.
    float reads[2][TILES][4], writes[1][TILES][4], first[1][TILES][4], terms[TILES][4];
    this->multiply_reads(reads[0], reads[1], v_steps, [&](int step) { return this->state_at(step); });
    each(reads[0], [&](float &x, int, int) { x *= c.of.scale; });
    each(reads[1], [&](float &x, int t, int) { x *= -numbers(BETA)[t]; });
    barrier();
    this->load_decays();
    barrier();
    this->multiply_decays();
    barrier();
    const Faded keys[1] = {{tile(At::KEYS), tile(At::KEYS_REST)}};
    this->fade_earlier(keys[0], K);
    barrier();
    this->add_earlier(reads, {{A}, {B}}, keys);
    this->add_own_earlier(reads, {{A}, {B}}, {K});
    barrier();
    this->fetch_key(Q, c.of.q);
    this->load_behind();
    copies_wait<0>();
    barrier();
    each_with_key(reads[0], Q, [&](int j, int e, float x) { terms[j][e] = x; });
    each_with_key(reads[1], K, [&](int j, int e, float x) { terms[j][e] += x; });
    add_own(reads[0], numbers(OWN), K);
    store(c.dq, reads[0], at);
    this->multiply_writes(writes[0]);
    Base::copy(first, writes);
    barrier();
    const Faded later[2] = {{tile(At::QUERIES), tile(At::QUERIES + At::KEY)},
                            {tile(At::LATER_KEYS), tile(At::LATER_KEYS + At::KEY)}};
    this->fade_later(later[0], Q);
    this->fade_later(later[1], K);
    barrier();
    this->add_later(writes, first, {{A, B}}, later);
    this->add_own_later(writes, first, {{A, B}}, {Q, K});
    // What the last token wrote is not in what the sums begin with.
    each_with_key(writes[0], K, [&](int j, int e, float x) { terms[j][e] -= has_next(e) ? x : 0.f; });
    Base::add(writes[0], reads[1]);
    add_own(writes[0], numbers(OWN), Q);
    store(c.dk, writes[0], at);
    this->store_beta();
    this->finish_gate(terms, first, {K});
  }
};

}  // namespace cla
