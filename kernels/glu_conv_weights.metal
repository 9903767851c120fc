// Gradients of the taps and of the norm's weight, summed over blocks of ROWS frames; what called adds up the blocks.
// Inputs: as the backward's. Output: partials float [blocks, KERNEL + 1, C], the last row the weight's; blocks in the
//   order of clips, then frames.
// Template and grid as the forward's.
threadgroup float partial[64];
const uint lid = thread_position_in_threadgroup.x;
const uint batch = threadgroup_position_in_grid.y;
const uint frames = uint(x_shape[1]);
const uint channels = uint(x_shape[2]) / 2;
const uint first = threadgroup_position_in_grid.x * ROWS;
const uint steps = metal::min(uint(ROWS), frames - first) + KERNEL - 1;
const uint block = batch * ((frames + ROWS - 1) / ROWS) + threadgroup_position_in_grid.x;
float tap[VALUES * KERNEL];
float values[VALUES * KERNEL];
float gates[VALUES * KERNEL];
float of_taps[VALUES * KERNEL];
float of_weight[VALUES];
load_taps<KERNEL, THREADS, VALUES>(tap, taps, channels, lid);
for (uint i = 0; i < VALUES * KERNEL; ++i) {
  values[i] = 0.0f;
  gates[i] = 0.0f;
  of_taps[i] = 0.0f;
}
for (uint v = 0; v < VALUES; ++v) {
  of_weight[v] = 0.0f;
}
for (uint step = 0; step < steps; ++step) {
  const uint ahead = first + step;
  const bool inside = ahead >= KERNEL - 1;
  const uint row = batch * frames + (inside ? ahead - (KERNEL - 1) : 0);
  next_frame<KERNEL, THREADS, VALUES>(values, gates, x, row * 2 * channels, channels, inside, lid);
  if (step >= KERNEL - 1) {
    const float inverse = inverses[row];
    float made[VALUES];
    float pull[VALUES];
    float dot = 0.0f;
    for (uint v = 0; v < VALUES; ++v) {
      const uint c = lid + v * THREADS;
      made[v] = convolved<KERNEL>(tap, values, gates, v);
      pull[v] = 0.0f;
      if (c < channels) {
        const float w = static_cast<float>(weight[c]);
        const float y = metal::clamp(made[v], -constants[1], constants[1]);
        pull[v] = static_cast<float>(cotangent[row * channels + c]) * silu_slope(y * inverse * w);
        of_weight[v] += pull[v] * y * inverse;
        pull[v] *= w;
        dot += pull[v] * y;
      }
    }
    dot = group_sum(dot, partial + 32 * (step % 2), thread_index_in_simdgroup, simdgroup_index_in_threadgroup,
                    THREADS / 32);
    const float along = dot * inverse * inverse / float(channels);
    for (uint v = 0; v < VALUES; ++v) {
      const bool within = made[v] >= -constants[1] && made[v] <= constants[1];
      const float moved = within ? inverse * (pull[v] - made[v] * along) : 0.0f;
      for (uint i = 0; i < KERNEL; ++i) {
        const uint at = v * KERNEL + i;
        of_taps[at] = metal::fma(moved, values[at] * gates[at], of_taps[at]);
      }
    }
  }
}
for (uint v = 0; v < VALUES; ++v) {
  const uint c = lid + v * THREADS;
  if (c < channels) {
    for (uint i = 0; i < KERNEL; ++i) {
      partials[(block * (KERNEL + 1) + i) * channels + c] = of_taps[v * KERNEL + i];
    }
    partials[(block * (KERNEL + 1) + KERNEL) * channels + c] = of_weight[v];
  }
}
