// Gradients of q, k and v for the cotangent of banded_attention's result, one launch: the scores are computed again, and
// a group takes the queries that see its ROWS keys, so that nothing is added up across groups.
// Inputs: as the forward's, and cotangent [B, F, H, D].
// Outputs: d_q, d_k, d_v [B, F, H, D] of T. Template: as the forward's, but ROWS + WINDOW - 1 is a multiple of 8.
// Grid: groups of 256 threads; blocks of ROWS frames in x, heads in y, clips in z.
constexpr uint QUERIES = ROWS + WINDOW - 1;
threadgroup T tile[(ROWS + 2 * (WINDOW - 1)) * D];
threadgroup float shares[(ROWS + WINDOW - 1) * WINDOW];
threadgroup float pulls[(ROWS + WINDOW - 1) * WINDOW];
constexpr uint KEYS = ROWS + 2 * (WINDOW - 1);
constexpr uint VALUES = (D + 31) / 32;
constexpr uint EACH = QUERIES / 8;
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint mine = simd * EACH;
const uint head = threadgroup_position_in_grid.y;
const uint batch = threadgroup_position_in_grid.z;
const int first = int(threadgroup_position_in_grid.x * ROWS);
const int frames = int(q_shape[1]);
const uint stride = uint(q_shape[2]) * D;
const uint base = batch * uint(frames) * stride + head * D;
const uint row = batch * uint(frames);
const float cap = constants[0];
const float key_factor = constants[2];
float scale[VALUES];
for (uint x = 0; x < VALUES; ++x) {
  const uint d = lane + 32 * x;
  scale[x] = d < D ? constants[1] * softplus(static_cast<float>(per_dim_scale[d])) : 0.0f;
}
float given[EACH][VALUES];
float queries[EACH][VALUES];
float along[EACH];
float scores[EACH];
for (uint i = 0; i < EACH; ++i) {
  load_lane<D, VALUES>(given[i], cotangent, base, stride, first + int(mine + i), frames, lane);
  load_lane<D, VALUES>(queries[i], q, base, stride, first + int(mine + i), frames, lane);
  along[i] = 0.0f;
  scores[i] = 0.0f;
}
load_frames<T, D>(tile, v, base, stride, first - int(WINDOW - 1), KEYS, frames, lid);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint j = 0; j < WINDOW; ++j) {
  for (uint i = 0; i < EACH; ++i) {
    const uint at = (mine + i + WINDOW - 1 - j) * D;
    float sum = 0.0f;
    for (uint x = 0; x < VALUES; ++x) {
      sum = metal::fma(given[i][x], static_cast<float>(tile[at + metal::min(lane + 32 * x, uint(D - 1))]), sum);
    }
    sum = simd_sum(sum);
    along[i] = lane == j ? sum : along[i];
  }
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
      sum = metal::fma(queries[i][x] * scale[x], metal::fma(key_factor, key, added[x]), sum);
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
  const float part = seen ? metal::exp(cap * bent - most) : 0.0f;
  const float total = simd_sum(part);
  const float share = total > 0.0f ? part / total : 0.0f;
  const float mean = simd_sum(share * along[i]);
  scores[i] = share * (along[i] - mean) * tanh_slope(scores[i] / cap);
  if (lane < WINDOW) {
    shares[(mine + i) * WINDOW + lane] = share;
    pulls[(mine + i) * WINDOW + lane] = scores[i];
  }
}
float made[EACH][VALUES];
for (uint i = 0; i < EACH; ++i) {
  for (uint x = 0; x < VALUES; ++x) {
    made[i][x] = 0.0f;
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
      made[i][x] = metal::fma(pull, metal::fma(key_factor, key, added[x]), made[i][x]);
    }
  }
}
for (uint i = 0; i < EACH; ++i) {
  const int frame = first + int(mine + i);
  for (uint x = 0; x < VALUES; ++x) {
    const uint d = lane + 32 * x;
    if (d < D && mine + i < ROWS && frame < frames) {
      d_q[base + uint(frame) * stride + d] = static_cast<T>(made[i][x] * scale[x]);
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = 0; i < EACH; ++i) {
  for (uint x = 0; x < VALUES; ++x) {
    const uint d = lane + 32 * x;
    if (d < D) {
      tile[(mine + i) * D + d] = static_cast<T>(queries[i][x]);
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint n = simd; n < ROWS; n += 8) {
  const int key = first + int(n);
  for (uint x = 0; x < VALUES; ++x) {
    const uint d = lane + 32 * x;
    float sum = 0.0f;
    for (uint j = 0; j < WINDOW; ++j) {
      sum = metal::fma(pulls[(n + j) * WINDOW + j], static_cast<float>(tile[(n + j) * D + metal::min(d, uint(D - 1))]), sum);
    }
    if (d < D && key < frames) {
      d_k[base + uint(key) * stride + d] = static_cast<T>(sum * key_factor * scale[x]);
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = 0; i < EACH; ++i) {
  for (uint x = 0; x < VALUES; ++x) {
    const uint d = lane + 32 * x;
    if (d < D) {
      tile[(mine + i) * D + d] = static_cast<T>(given[i][x]);
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint n = simd; n < ROWS; n += 8) {
  const int key = first + int(n);
  float sums[VALUES];
  for (uint x = 0; x < VALUES; ++x) {
    sums[x] = 0.0f;
    for (uint j = 0; j < WINDOW; ++j) {
      const uint at = (n + j) * D + metal::min(lane + 32 * x, uint(D - 1));
      sums[x] = metal::fma(shares[(n + j) * WINDOW + j], static_cast<float>(tile[at]), sums[x]);
    }
  }
  if (MASKED && key < frames) {
    // Frames of its block and of the next one that average their context because they see nothing.
    const int start = key / int(BLOCK) * int(BLOCK);
    for (int other = start; other < metal::min(start + int(2 * BLOCK), frames); ++other) {
      if (sees_nothing<WINDOW>(valid, row, other, frames)) {
        float value[VALUES];
        load_lane<D, VALUES>(value, cotangent, base, stride, other, frames, lane);
        for (uint x = 0; x < VALUES; ++x) {
          sums[x] += value[x] / float(2 * BLOCK);
        }
      }
    }
  }
  for (uint x = 0; x < VALUES; ++x) {
    const uint d = lane + 32 * x;
    if (d < D && key < frames) {
      d_v[base + uint(key) * stride + d] = static_cast<T>(sums[x]);
    }
  }
}
