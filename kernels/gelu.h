// gelu with the tanh approximation, and its slope, in float32. Beyond 15 the tanh is 1 in float32; the bound keeps
// fast forms of it away from infinities.

inline float gelu_tanh_part(float x) {
  return metal::tanh(metal::clamp(0.7978845608f * (x + 0.044715f * (x * x * x)), -15.0f, 15.0f));
}

inline float gelu_value(float x, float part) { return 0.5f * x * (1.0f + part); }

inline float gelu_slope(float x, float part) {
  return 0.5f * (1.0f + part) +
         0.5f * x * (1.0f - part * part) * (0.7978845608f * (1.0f + 0.134145f * (x * x)));
}
