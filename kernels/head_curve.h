// A logit's exponential under the softcap. Scores are logits times 2 / (cap * ln 2), or 1 / ln 2 without a cap, so that
// both exponentials are powers of two: with s = 1 / (1 + 2^score), log2 of e^(capped logit - cap) is -reach * s.

inline float power_of_two(float x) { return metal::exp(x * 0.69314718056f); }

inline float capped_part(float score) { return 1.0f / (1.0f + power_of_two(score)); }

inline float exponent_of(float score, bool capped, float reach) {
  return capped ? -reach * capped_part(score) : score;
}
