// Where the states of segments lie that a delta sweep leaves (see delta.h).
#pragma once
#include "delta.h"
#include "elements.cuh"

namespace cla {

// The segment `at` of all, as one of a sequence.
struct SegmentOf {
  int64_t sequence, segment;

  CLA_DEVICE SegmentOf(const cla_delta_states &s, int32_t sequences, int64_t at) {
    if (const uint32_t *first = s.cu_segments) {
      sequence = run_of(first, sequences, at);
      segment = at - first[sequence];
    } else {
      sequence = at / s.each, segment = at % s.each;
    }
  }
};
CLA_DEVICE int64_t segment_index(const cla_delta_states &s, int64_t sequence, int64_t at) {
  return (s.cu_segments ? s.cu_segments[sequence] : sequence * s.each) + at;
}

// The state of segment `at` (of its sequence), for one head.
CLA_DEVICE float *anchor_of(const cla_delta_states &s, int64_t sequence, int64_t at, int head, int heads, int64_t size) {
  return s.data + (segment_index(s, sequence, at) * heads + head) * size;
}

}  // namespace cla
