// Of each frame the sum of g and of g * (x - mean), g the gradient before the norm's factor: cotangent * weight where the
// result was positive, one pass.
// Inputs: x, cotangent [frames, width]; weight [channels]; means float [frames].
// Outputs: pulls, leans float [frames]. Template: THREADS, VALUES. Grid: a group of THREADS for each frame.
threadgroup float first[32];
threadgroup float second[32];
const uint frame = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint width = uint(x_shape[1]);
const uint channels = uint(weight_shape[0]);
const float mean = means[frame];
float pull = 0.0f;
float lean = 0.0f;
for (uint j = 0; j < VALUES; ++j) {
  const uint i = lid + j * THREADS;
  if (i < width) {
    const float w = static_cast<float>(weight[i % channels]);
    const float away = static_cast<float>(x[frame * width + i]) - mean;
    const float g = away * w > 0.0f ? static_cast<float>(cotangent[frame * width + i]) * w : 0.0f;
    pull += g;
    lean += g * away;
  }
}
pull = group_sum(pull, first, lane, simd, THREADS / 32);
lean = group_sum(lean, second, lane, simd, THREADS / 32);
if (lid == 0) {
  pulls[frame] = pull;
  leans[frame] = lean;
}
