// Parts of the gated causal convolution's kernels: a group of threads goes through frames, a thread keeps the last
// frames of its channels (every THREADS-th) in registers.

inline float sigmoid(float x) { return 1.0f / (1.0f + metal::exp(-x)); }

inline float silu_slope(float x) {
  const float part = sigmoid(x);
  return part * (1.0f + x * (1.0f - part));
}

// Taps [C, KERNEL] of a thread's channels, zeros beyond the last.
template <uint KERNEL, uint THREADS, uint VALUES, typename Taps, typename Source>
inline void load_taps(Taps taps, Source source, uint channels, uint lid) {
  for (uint v = 0; v < VALUES; ++v) {
    const uint c = lid + v * THREADS;
    for (uint i = 0; i < KERNEL; ++i) {
      taps[v * KERNEL + i] = 0.0f;
      if (c < channels) {
        taps[v * KERNEL + i] = static_cast<float>(source[c * KERNEL + i]);
      }
    }
  }
}

// Moves the window on by one frame: its values and the sigmoids of their gates, zeros outside of the clip.
template <uint KERNEL, uint THREADS, uint VALUES, typename Window, typename Source>
inline void next_frame(Window values, Window gates, Source source, uint base, uint channels, bool inside, uint lid) {
  for (uint v = 0; v < VALUES; ++v) {
    const uint c = lid + v * THREADS;
    const uint at = v * KERNEL;
    for (uint i = 0; i + 1 < KERNEL; ++i) {
      values[at + i] = values[at + i + 1];
      gates[at + i] = gates[at + i + 1];
    }
    values[at + KERNEL - 1] = 0.0f;
    gates[at + KERNEL - 1] = 0.0f;
    if (inside && c < channels) {
      values[at + KERNEL - 1] = static_cast<float>(source[base + c]);
      gates[at + KERNEL - 1] = sigmoid(static_cast<float>(source[base + channels + c]));
    }
  }
}

// The convolution at the window's last frame.
template <uint KERNEL, typename Window>
inline float convolved(Window taps, Window values, Window gates, uint v) {
  float sum = 0.0f;
  for (uint i = 0; i < KERNEL; ++i) {
    sum = metal::fma(taps[v * KERNEL + i], values[v * KERNEL + i] * gates[v * KERNEL + i], sum);
  }
  return sum;
}
