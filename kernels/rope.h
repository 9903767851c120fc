// Heads whose two halves turn with x and with y: within a half of D / 2 values, value i pairs with value i + D / 4.
// A SIMD group has a head; a lane has every 32nd of its D / 2 pairs.

// The first value of a pair; the second lies D / 4 behind it.
template <uint D>
inline uint pair_start(uint pair) {
  return pair / (D / 4) * (D / 2) + pair % (D / 4);
}

template <uint D, uint PAIRS, typename Source>
inline void load_pairs(Source source, uint base, uint lane, bool wanted, thread float (&a)[PAIRS],
                       thread float (&b)[PAIRS]) {
  for (uint j = 0; j < PAIRS; ++j) {
    const uint pair = lane + 32 * j;
    a[j] = 0.0f;
    b[j] = 0.0f;
    if (wanted && pair < D / 2) {
      a[j] = static_cast<float>(source[base + pair_start<D>(pair)]);
      b[j] = static_cast<float>(source[base + pair_start<D>(pair) + D / 4]);
    }
  }
}

template <typename T, uint D, uint PAIRS, typename Target>
inline void store_pairs(Target target, uint base, uint lane, bool wanted, const thread float (&a)[PAIRS],
                        const thread float (&b)[PAIRS]) {
  for (uint j = 0; j < PAIRS; ++j) {
    const uint pair = lane + 32 * j;
    if (wanted && pair < D / 2) {
      target[base + pair_start<D>(pair)] = static_cast<T>(a[j]);
      target[base + pair_start<D>(pair) + D / 4] = static_cast<T>(b[j]);
    }
  }
}

// Turns pairs by the angles of a row of cosines and sines [D / 2]; `way` -1 turns them back.
template <uint D, uint PAIRS, typename Table>
inline void turn_pairs(Table cosines, Table sines, uint base, uint lane, bool wanted, float way,
                       thread float (&a)[PAIRS], thread float (&b)[PAIRS]) {
  for (uint j = 0; j < PAIRS; ++j) {
    const uint pair = lane + 32 * j;
    if (wanted && pair < D / 2) {
      const float c = static_cast<float>(cosines[base + pair]);
      const float s = static_cast<float>(sines[base + pair]) * way;
      const float first = a[j] * c - b[j] * s;
      b[j] = b[j] * c + a[j] * s;
      a[j] = first;
    }
  }
}

template <uint PAIRS>
inline float pairs_dot(const thread float (&a)[PAIRS], const thread float (&b)[PAIRS], const thread float (&c)[PAIRS],
                       const thread float (&d)[PAIRS]) {
  float sum = 0.0f;
  for (uint j = 0; j < PAIRS; ++j) {
    sum += a[j] * c[j] + b[j] * d[j];
  }
  return simd_sum(sum);
}

// Pairs times a factor and the weight of their values.
template <uint D, uint PAIRS, typename Weight>
inline void weigh_pairs(Weight weight, float factor, uint lane, thread float (&a)[PAIRS], thread float (&b)[PAIRS]) {
  for (uint j = 0; j < PAIRS; ++j) {
    const uint pair = lane + 32 * j;
    if (pair < D / 2) {
      a[j] *= factor * static_cast<float>(weight[pair_start<D>(pair)]);
      b[j] *= factor * static_cast<float>(weight[pair_start<D>(pair) + D / 4]);
    }
  }
}
