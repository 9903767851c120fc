// Each frame attends to itself and the WINDOW - 1 before it: score of distance j
//   cap * tanh(q_t * scale . (key_factor * k_(t - j) + relative_j) / cap), scale = query_factor * softplus(per_dim_scale).
// A frame without a valid key averages the 2 * BLOCK frames of the block before its own and of its own.
// Inputs: q, k, v [B, F, H, D]; relative [WINDOW, H, D], distance WINDOW - 1 first; per_dim_scale [D]; valid bool [B, F]
//   (any array unless MASKED); constants float [3]: cap, query_factor, key_factor.
// Output: out [B, F, H, D] of T. Template: T, D, WINDOW, BLOCK, ROWS (a multiple of 8), MASKED.
// Grid: groups of 256 threads; blocks of ROWS frames in x, heads in y, clips in z.
// Replaces padding to blocks, the products of 2 * BLOCK keys each, the relative shift and some twenty passes.
threadgroup T tile[(ROWS + WINDOW - 1) * D];
constexpr uint VALUES = (D + 31) / 32;
constexpr uint EACH = ROWS / 8;
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint mine = simdgroup_index_in_threadgroup * EACH;
const uint head = threadgroup_position_in_grid.y;
const uint batch = threadgroup_position_in_grid.z;
const int first = int(threadgroup_position_in_grid.x * ROWS);
const int frames = int(q_shape[1]);
const uint heads = uint(q_shape[2]);
const uint stride = heads * D;
const uint base = batch * uint(frames) * stride + head * D;
const uint row = batch * uint(frames);
const float cap = constants[0];
const float key_factor = constants[2];
float queries[EACH][VALUES];
for (uint i = 0; i < EACH; ++i) {
  load_lane<D, VALUES>(queries[i], q, base, stride, first + int(mine + i), frames, lane);
}
for (uint x = 0; x < VALUES; ++x) {
  const uint d = lane + 32 * x;
  const float scale = d < D ? constants[1] * softplus(static_cast<float>(per_dim_scale[d])) : 0.0f;
  for (uint i = 0; i < EACH; ++i) {
    queries[i][x] *= scale;
  }
}
load_frames<T, D>(tile, k, base, stride, first - int(WINDOW - 1), ROWS + WINDOW - 1, frames, lid);
threadgroup_barrier(mem_flags::mem_threadgroup);
float weights[EACH];
for (uint i = 0; i < EACH; ++i) {
  weights[i] = 0.0f;
}
for (uint j = 0; j < WINDOW; ++j) {
  float added[VALUES];
  load_lane<D, VALUES>(added, relative, (WINDOW - 1 - j) * stride + head * D, 0, 0, 1, lane);
  for (uint i = 0; i < EACH; ++i) {
    const uint at = (mine + i + WINDOW - 1 - j) * D;
    float sum = 0.0f;
    for (uint x = 0; x < VALUES; ++x) {
      const float key = static_cast<float>(tile[at + metal::min(lane + 32 * x, uint(D - 1))]);
      sum = metal::fma(queries[i][x], metal::fma(key_factor, key, added[x]), sum);
    }
    sum = simd_sum(sum);
    weights[i] = lane == j ? sum : weights[i];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
load_frames<T, D>(tile, v, base, stride, first - int(WINDOW - 1), ROWS + WINDOW - 1, frames, lid);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = 0; i < EACH; ++i) {
  const int frame = first + int(mine + i);
  const bool seen = lane < WINDOW && attends<MASKED>(valid, row, frame, frame - int(lane), frames);
  const float score = cap * bounded_tanh(weights[i] / cap);
  const float most = simd_max(seen ? score : -3e38f);
  const float part = seen ? metal::exp(score - most) : 0.0f;
  const float total = simd_sum(part);
  const float weight = total > 0.0f ? part / total : 0.0f;
  float made[VALUES];
  for (uint x = 0; x < VALUES; ++x) {
    made[x] = 0.0f;
  }
  for (uint j = 0; j < WINDOW; ++j) {
    const float share = simd_broadcast(weight, j);
    const uint at = (mine + i + WINDOW - 1 - j) * D;
    for (uint x = 0; x < VALUES; ++x) {
      made[x] = metal::fma(share, static_cast<float>(tile[at + metal::min(lane + 32 * x, uint(D - 1))]), made[x]);
    }
  }
  if (MASKED && total == 0.0f && frame < frames) {
    const int start = frame / int(BLOCK) * int(BLOCK) - int(BLOCK);
    for (int other = metal::max(start, 0); other < metal::min(start + int(2 * BLOCK), frames); ++other) {
      float value[VALUES];
      load_lane<D, VALUES>(value, v, base, stride, other, frames, lane);
      for (uint x = 0; x < VALUES; ++x) {
        made[x] += value[x] / float(2 * BLOCK);
      }
    }
  }
  for (uint x = 0; x < VALUES; ++x) {
    const uint d = lane + 32 * x;
    if (d < D && frame < frames) {
      out[base + uint(frame) * stride + d] = static_cast<T>(made[x]);
    }
  }
}
