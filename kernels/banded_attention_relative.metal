// Gradients of the relative keys and of the queries' scale for the cotangent of banded_attention's result, summed over
// TILES blocks of ROWS frames of a clip; what called adds up the groups' sums.
// Inputs: as the backward's. Outputs: d_relative float [parts, WINDOW, H, D]; d_scale float [parts, H, D], of the scale
//   and not of per_dim_scale; parts = clips * groups of a clip.
// Template: as the forward's, and TILES. Grid: groups of 256 threads; groups of a clip in x, heads in y, clips in z.
threadgroup T tile[(ROWS + WINDOW - 1) * D];
threadgroup float pulls[ROWS * WINDOW];
threadgroup float sums[8 * D];
constexpr uint KEYS = ROWS + WINDOW - 1;
constexpr uint VALUES = (D + 31) / 32;
constexpr uint EACH = ROWS / 8;
constexpr uint PAIRS = (WINDOW * D + 255) / 256;
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint mine = simd * EACH;
const uint head = threadgroup_position_in_grid.y;
const uint batch = threadgroup_position_in_grid.z;
const int frames = int(q_shape[1]);
const uint heads = uint(q_shape[2]);
const uint stride = heads * D;
const uint base = batch * uint(frames) * stride + head * D;
const uint row = batch * uint(frames);
const uint parts = (uint(frames) + ROWS * TILES - 1) / (ROWS * TILES);
const uint part = batch * parts + threadgroup_position_in_grid.x;
const float cap = constants[0];
const float key_factor = constants[2];
float scale[VALUES];
float of_scale[VALUES];
float of_relative[PAIRS];
for (uint x = 0; x < VALUES; ++x) {
  const uint d = lane + 32 * x;
  scale[x] = d < D ? constants[1] * softplus(static_cast<float>(per_dim_scale[d])) : 0.0f;
  of_scale[x] = 0.0f;
}
for (uint p = 0; p < PAIRS; ++p) {
  of_relative[p] = 0.0f;
}
for (uint n = 0; n < TILES; ++n) {
  const int first = int((threadgroup_position_in_grid.x * TILES + n) * ROWS);
  float values[EACH][VALUES];
  float along[EACH];
  float scores[EACH];
  for (uint i = 0; i < EACH; ++i) {
    load_lane<D, VALUES>(values[i], cotangent, base, stride, first + int(mine + i), frames, lane);
    along[i] = 0.0f;
    scores[i] = 0.0f;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_frames<T, D>(tile, v, base, stride, first - int(WINDOW - 1), KEYS, frames, lid);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = 0; j < WINDOW; ++j) {
    for (uint i = 0; i < EACH; ++i) {
      const uint at = (mine + i + WINDOW - 1 - j) * D;
      float sum = 0.0f;
      for (uint x = 0; x < VALUES; ++x) {
        sum = metal::fma(values[i][x], static_cast<float>(tile[at + metal::min(lane + 32 * x, uint(D - 1))]), sum);
      }
      sum = simd_sum(sum);
      along[i] = lane == j ? sum : along[i];
    }
  }
  for (uint i = 0; i < EACH; ++i) {
    load_lane<D, VALUES>(values[i], q, base, stride, first + int(mine + i), frames, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_frames<T, D>(tile, k, base, stride, first - int(WINDOW - 1), KEYS, frames, lid);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = 0; j < WINDOW; ++j) {
    float added[VALUES];
    load_lane<D, VALUES>(added, relative, (WINDOW - 1 - j) * stride + head * D, 0, 0, 1, lane);
    for (uint i = 0; i < EACH; ++i) {
      const uint at = (mine + i + WINDOW - 1 - j) * D;
      float sum = 0.0f;
      for (uint x = 0; x < VALUES; ++x) {
        const float key = static_cast<float>(tile[at + metal::min(lane + 32 * x, uint(D - 1))]);
        sum = metal::fma(values[i][x] * scale[x], metal::fma(key_factor, key, added[x]), sum);
      }
      sum = simd_sum(sum);
      scores[i] = lane == j ? sum : scores[i];
    }
  }
  for (uint i = 0; i < EACH; ++i) {
    const int frame = first + int(mine + i);
    const bool seen = lane < WINDOW && attends<MASKED>(valid, row, frame, frame - int(lane), frames);
    const float bent = bounded_tanh(scores[i] / cap);
    const float most = simd_max(seen ? cap * bent : -3e38f);
    const float weight = seen ? metal::exp(cap * bent - most) : 0.0f;
    const float total = simd_sum(weight);
    const float share = total > 0.0f ? weight / total : 0.0f;
    const float mean = simd_sum(share * along[i]);
    scores[i] = share * (along[i] - mean) * tanh_slope(scores[i] / cap);
    if (lane < WINDOW) {
      pulls[(mine + i) * WINDOW + lane] = scores[i];
    }
  }
  for (uint j = 0; j < WINDOW; ++j) {
    float added[VALUES];
    load_lane<D, VALUES>(added, relative, (WINDOW - 1 - j) * stride + head * D, 0, 0, 1, lane);
    for (uint i = 0; i < EACH; ++i) {
      const float pull = simd_broadcast(scores[i], j);
      const uint at = (mine + i + WINDOW - 1 - j) * D;
      for (uint x = 0; x < VALUES; ++x) {
        const float key = static_cast<float>(tile[at + metal::min(lane + 32 * x, uint(D - 1))]);
        of_scale[x] = metal::fma(pull * values[i][x], metal::fma(key_factor, key, added[x]), of_scale[x]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = 0; i < EACH; ++i) {
    for (uint x = 0; x < VALUES; ++x) {
      const uint d = lane + 32 * x;
      if (d < D) {
        tile[(mine + i) * D + d] = static_cast<T>(values[i][x]);
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint p = 0; p < PAIRS; ++p) {
    const uint pair = metal::min(lid + 256 * p, uint(WINDOW * D - 1));
    for (uint i = 0; i < ROWS; ++i) {
      const float value = static_cast<float>(tile[i * D + pair % D]);
      of_relative[p] = metal::fma(pulls[i * WINDOW + pair / D], value, of_relative[p]);
    }
  }
}
for (uint x = 0; x < VALUES; ++x) {
  const uint d = lane + 32 * x;
  if (d < D) {
    sums[simd * D + d] = of_scale[x];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint d = lid; d < D; d += 256) {
  float sum = 0.0f;
  for (uint i = 0; i < 8; ++i) {
    sum += sums[i * D + d];
  }
  d_scale[(part * heads + head) * D + d] = sum;
}
for (uint p = 0; p < PAIRS; ++p) {
  const uint pair = lid + 256 * p;
  if (pair < WINDOW * D) {
    const uint d = pair % D;
    const float factor = constants[1] * softplus(static_cast<float>(per_dim_scale[d]));
    d_relative[((part * WINDOW + WINDOW - 1 - pair / D) * heads + head) * D + d] = of_relative[p] * factor;
  }
}
