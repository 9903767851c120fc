// Mean and (variance + eps)^(-1/2) of all values of a clip up to each frame, the variance's differences each from the mean
// at its own time.
// Inputs: sums, squares float [clips, frames], of each frame around its own mean; constants float [2]: eps, values of a
//   frame. Outputs: means, inverses float [clips, frames]. Grid: a SIMD group for each clip.
const uint clip = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup;
const uint frames = uint(sums_shape[1]);
const float width = constants[1];
float total = 0.0f;
float spread = 0.0f;
for (uint start = 0; start < frames; start += 32) {
  const uint frame = start + lane;
  const uint at = clip * frames + frame;
  const float own = frame < frames ? sums[at] : 0.0f;
  const float heard = total + sum_so_far(own, lane);
  const float count = float(frame + 1) * width;
  const float mean = heard / count;
  const float away = own / width - mean;
  const float square = frame < frames ? squares[at] + width * away * away : 0.0f;
  const float squared = spread + sum_so_far(square, lane);
  if (frame < frames) {
    means[at] = mean;
    inverses[at] = metal::rsqrt(squared / count + constants[0]);
  }
  total = simd_broadcast(heard, ushort(31));
  spread = simd_broadcast(squared, ushort(31));
}
