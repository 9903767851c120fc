// out = silu(norm(limited(conv(value * sigmoid(gate)))) * weight): gated linear unit, causal depthwise convolution along
// frames, norm over channels and silu, one pass.
// Inputs: x [B, F, 2 C], values then gates; taps [C, KERNEL], the last for the frame itself; weight [C];
//   constants float [2]: eps, limit.
// Outputs: out [B, F, C] of T; inverses float [B, F], the factors of the frames' norms.
// Template: T, KERNEL, THREADS, VALUES (a thread's, THREADS * VALUES >= C), ROWS.
// Grid: groups of THREADS; blocks of ROWS frames in x, clips in y.
// Replaces gating, padding, KERNEL shifted products, norm and silu: 3 values moved for each (and 2 (KERNEL - 1) / ROWS).
threadgroup float partial[64];
const uint lid = thread_position_in_threadgroup.x;
const uint batch = threadgroup_position_in_grid.y;
const uint frames = uint(x_shape[1]);
const uint channels = uint(x_shape[2]) / 2;
const uint first = threadgroup_position_in_grid.x * ROWS;
const uint steps = metal::min(uint(ROWS), frames - first) + KERNEL - 1;
float tap[VALUES * KERNEL];
float values[VALUES * KERNEL];
float gates[VALUES * KERNEL];
load_taps<KERNEL, THREADS, VALUES>(tap, taps, channels, lid);
for (uint i = 0; i < VALUES * KERNEL; ++i) {
  values[i] = 0.0f;
  gates[i] = 0.0f;
}
for (uint step = 0; step < steps; ++step) {
  const uint ahead = first + step;
  const bool inside = ahead >= KERNEL - 1;
  const uint row = batch * frames + (inside ? ahead - (KERNEL - 1) : 0);
  next_frame<KERNEL, THREADS, VALUES>(values, gates, x, row * 2 * channels, channels, inside, lid);
  if (step >= KERNEL - 1) {
    float made[VALUES];
    float squares = 0.0f;
    for (uint v = 0; v < VALUES; ++v) {
      made[v] = metal::clamp(convolved<KERNEL>(tap, values, gates, v), -constants[1], constants[1]);
      squares += made[v] * made[v];
    }
    squares = group_sum(squares, partial + 32 * (step % 2), thread_index_in_simdgroup,
                        simdgroup_index_in_threadgroup, THREADS / 32);
    const float inverse = metal::rsqrt(squares / float(channels) + constants[0]);
    for (uint v = 0; v < VALUES; ++v) {
      const uint c = lid + v * THREADS;
      if (c < channels) {
        const float y = made[v] * inverse * static_cast<float>(weight[c]);
        out[row * channels + c] = static_cast<T>(y * sigmoid(y));
      }
    }
    if (lid == 0) {
      inverses[row] = inverse;
    }
  }
}
