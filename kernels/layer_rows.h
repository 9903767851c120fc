// A row of layer norm that one SIMD group holds, every 32nd value a lane. Every lane takes part.

// Loads the row's differences from its mean (0 beyond the row, and where it is not `kept`); gives (variance + eps)^(-1/2).
template <uint VALUES, typename Lane, typename Source>
inline float centred_row(Lane values, Source source, uint base, uint width, bool kept, float eps, uint lane) {
  float sum = 0.0f;
  for (uint v = 0; v < VALUES; ++v) {
    const uint i = lane + 32 * v;
    values[v] = 0.0f;
    if (kept && i < width) {
      values[v] = static_cast<float>(source[base + i]);
    }
    sum += values[v];
  }
  const float mean = simd_sum(sum) / float(width);
  float square = 0.0f;
  for (uint v = 0; v < VALUES; ++v) {
    values[v] = lane + 32 * v < width ? values[v] - mean : 0.0f;
    square += values[v] * values[v];
  }
  return metal::rsqrt(simd_sum(square) / float(width) + eps);
}
