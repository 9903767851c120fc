// Gradient of x for the cotangent of glu_conv's result, one pass: a block of ROWS frames reads KERNEL - 1 more on each
// side and computes the convolution again.
// Inputs: x, taps, weight, constants as the forward's; cotangent [B, F, C]; inverses float [B, F] from the forward.
// Output: d_x [B, F, 2 C] of T. Template and grid as the forward's.
threadgroup float partial[64];
const uint lid = thread_position_in_threadgroup.x;
const uint batch = threadgroup_position_in_grid.y;
const uint frames = uint(x_shape[1]);
const uint channels = uint(x_shape[2]) / 2;
const uint first = threadgroup_position_in_grid.x * ROWS;
const uint steps = metal::min(uint(ROWS), frames - first) + 2 * (KERNEL - 1);
float tap[VALUES * KERNEL];
float values[VALUES * KERNEL];
float gates[VALUES * KERNEL];
float pulls[VALUES * KERNEL];
load_taps<KERNEL, THREADS, VALUES>(tap, taps, channels, lid);
for (uint i = 0; i < VALUES * KERNEL; ++i) {
  values[i] = 0.0f;
  gates[i] = 0.0f;
  pulls[i] = 0.0f;
}
for (uint step = 0; step < steps; ++step) {
  const uint ahead = first + step;
  const bool inside = ahead >= KERNEL - 1 && ahead - (KERNEL - 1) < frames;
  const uint row = batch * frames + (inside ? ahead - (KERNEL - 1) : 0);
  next_frame<KERNEL, THREADS, VALUES>(values, gates, x, row * 2 * channels, channels, inside, lid);
  if (step >= KERNEL - 1) {
    const float inverse = inside ? inverses[row] : 0.0f;
    float made[VALUES];
    float pull[VALUES];
    float dot = 0.0f;
    for (uint v = 0; v < VALUES; ++v) {
      const uint c = lid + v * THREADS;
      made[v] = convolved<KERNEL>(tap, values, gates, v);
      pull[v] = 0.0f;
      if (inside && c < channels) {
        const float w = static_cast<float>(weight[c]);
        const float y = metal::clamp(made[v], -constants[1], constants[1]);
        pull[v] = static_cast<float>(cotangent[row * channels + c]) * silu_slope(y * inverse * w) * w;
        dot += pull[v] * y;
      }
    }
    dot = group_sum(dot, partial + 32 * (step % 2), thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
                    THREADS / 32);
    const float along = dot * inverse * inverse / float(channels);
    for (uint v = 0; v < VALUES; ++v) {
      for (uint i = 0; i + 1 < KERNEL; ++i) {
        pulls[v * KERNEL + i] = pulls[v * KERNEL + i + 1];
      }
      const bool within = made[v] >= -constants[1] && made[v] <= constants[1];
      pulls[v * KERNEL + KERNEL - 1] = within ? inverse * (pull[v] - made[v] * along) : 0.0f;
    }
  }
  if (step >= 2 * (KERNEL - 1)) {
    // The windows' first frame has all its pulls.
    const uint done = (batch * frames + ahead - 2 * (KERNEL - 1)) * 2 * channels;
    for (uint v = 0; v < VALUES; ++v) {
      const uint c = lid + v * THREADS;
      float sum = 0.0f;
      for (uint i = 0; i < KERNEL; ++i) {
        sum = metal::fma(tap[v * KERNEL + i], pulls[v * KERNEL + KERNEL - 1 - i], sum);
      }
      if (c < channels) {
        const float gate = gates[v * KERNEL];
        d_x[done + c] = static_cast<T>(sum * gate);
        d_x[done + channels + c] = static_cast<T>(sum * values[v * KERNEL] * gate * (1.0f - gate));
      }
    }
  }
}
