// What the means and variances of later frames ask of a frame's values: its squares' gradient and its sum's, sums from the
// end of the clip.
// Inputs: sums, means, inverses, pulls, leans float [clips, frames]; constants float [2]: eps, values of a frame.
// Outputs: d_squares, d_sums float [clips, frames]. Grid: a SIMD group for each clip.
const uint clip = threadgroup_position_in_grid.x;
const uint lane = thread_index_in_simdgroup;
const uint frames = uint(sums_shape[1]);
const float width = constants[1];
float later_squares = 0.0f;
float later_sums = 0.0f;
for (uint start = 0; start < frames; start += 32) {
  const uint back = start + lane;
  const bool inside = back < frames;
  const uint frame = inside ? frames - 1 - back : 0;
  const uint at = clip * frames + frame;
  const float count = float(frame + 1) * width;
  float inverse = 0.0f;
  float mine = 0.0f;
  if (inside) {
    inverse = inverses[at];
    mine = -0.5f * inverse * inverse * inverse * leans[at] / count;
  }
  const float of_squares = later_squares + sum_so_far(mine, lane);
  float of_mean = 0.0f;
  if (inside) {
    of_mean = -(pulls[at] * inverse + 2.0f * of_squares * (sums[at] - width * means[at])) / count;
  }
  const float of_sums = later_sums + sum_so_far(of_mean, lane);
  if (inside) {
    d_squares[at] = of_squares;
    d_sums[at] = of_sums;
  }
  later_squares = simd_broadcast(of_squares, ushort(31));
  later_sums = simd_broadcast(of_sums, ushort(31));
}
