// Attention of frames to the few before them: parts that its kernels share. Eight SIMD groups of 32 threads; a SIMD group
// takes whole queries (or keys), a lane every 32nd of their D values, and lane j what belongs to distance j.

// Frames first ... first + count - 1 of one head as rows of D values, zeros outside of the clip.
template <typename T, uint D, typename Tile, typename Source>
inline void load_frames(Tile tile, Source source, uint base, uint stride, int first, uint count, int frames, uint lid) {
  for (uint i = lid; i < count * D; i += 256) {
    const int frame = first + int(i / D);
    T value = static_cast<T>(0.0f);
    if (frame >= 0 && frame < frames) {
      value = source[base + uint(frame) * stride + i % D];
    }
    tile[i] = value;
  }
}

// A lane's values of one frame, zeros outside of the clip.
template <uint D, uint VALUES, typename Lane, typename Source>
inline void load_lane(Lane values, Source source, uint base, uint stride, int frame, int frames, uint lane) {
  for (uint v = 0; v < VALUES; ++v) {
    const uint d = lane + 32 * v;
    values[v] = 0.0f;
    if (d < D && frame < frames) {
      values[v] = static_cast<float>(source[base + uint(frame) * stride + d]);
    }
  }
}

// log(1 + e^x); the series keeps what the sum would round away.
inline float softplus(float x) {
  const float small = metal::exp(-metal::abs(x));
  const float series = small * (1.0f - small * (0.5f - small * (0.33333333f - 0.25f * small)));
  return metal::max(x, 0.0f) + (small < 0.01f ? series : metal::log(1.0f + small));
}

// tanh; beyond 15 it is 1 in float32, and the bound keeps fast forms of it away from infinities.
inline float bounded_tanh(float x) { return metal::tanh(metal::clamp(x, -15.0f, 15.0f)); }

// Its slope, without the difference of 1 and almost 1.
inline float tanh_slope(float x) {
  const float small = metal::exp(-2.0f * metal::abs(x));
  return 4.0f * small / ((1.0f + small) * (1.0f + small));
}

// Whether a frame attends to a key.
template <bool MASKED, typename Valid>
inline bool attends(Valid valid, uint row, int frame, int key, int frames) {
  bool seen = frame < frames && key >= 0;
  if (MASKED && seen) {
    seen = valid[row + uint(key)];
  }
  return seen;
}

// Whether a frame has no key among its last WINDOW that it may attend to.
template <uint WINDOW, typename Valid>
inline bool sees_nothing(Valid valid, uint row, int frame, int frames) {
  bool none = frame < frames;
  for (int key = metal::max(frame - int(WINDOW) + 1, 0); key <= frame && none; ++key) {
    none = !valid[row + uint(key)];
  }
  return none;
}
