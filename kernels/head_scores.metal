// One chunk of logits in a running softmax: highest score and where, the target's score, the sum of the others'
// exponentials; and each exponential times the softcap's slope, whose product with the head's rows is the gradient.
// Inputs: scores [rows, columns] before scale and cap; wanted int [rows], the target's column, anything else where it is
//   not in this chunk; start int [1], the chunk's first column; top, target, others float [rows] and index int [rows],
//   the running values; constants float [2]: scale, reach.
// Outputs: new_top, new_target, new_others float [rows], new_index int [rows]; keep float [rows], by what sums made
//   with the old reference are multiplied; pulls [rows, columns] of G, 0 at the target ([1], not written, unless GRADIENT).
// Template: G, THREADS, CAPPED, FIXED (exponents are measured from 0, not from the highest), GRADIENT.
// Grid: a group of THREADS for each row.
// Replaces some fifteen passes: the scores are read once (twice unless FIXED), the pulls written once.
threadgroup float tops[32];
threadgroup float places[32];
threadgroup float sums[32];
const uint row = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint columns = uint(scores_shape[1]);
const uint base = row * columns;
const float scale = constants[0];
const float reach = constants[1];
const int own = wanted[row];
float best = -3.0e38f;
uint place = 0;
float sum = 0.0f;
for (uint column = lid; column < columns; column += THREADS) {
  const float score = static_cast<float>(scores[base + column]) * scale;
  if (score > best) {
    best = score;
    place = column;
  }
  if (FIXED) {
    const float part = capped_part(score);
    const float mass = int(column) == own ? 0.0f : power_of_two(-reach * part);
    sum += mass;
    if (GRADIENT) {
      pulls[base + column] = static_cast<G>(mass * (part - part * part));
    }
  }
}
const float highest = group_max(best, tops, lane, simd, THREADS / 32);
const float earliest =
    -group_max(best == highest ? -float(place) : -3.0e38f, places, lane, simd, THREADS / 32);
const float before = top[row];
const float now = metal::max(before, highest);
float kept = 1.0f;
if (!FIXED) {
  const float reference = exponent_of(now, CAPPED, reach);
  kept = before < -3.0e38f ? 0.0f : power_of_two(exponent_of(before, CAPPED, reach) - reference);
  for (uint column = lid; column < columns; column += THREADS) {
    const float score = static_cast<float>(scores[base + column]) * scale;
    const float mass = int(column) == own ? 0.0f : power_of_two(exponent_of(score, CAPPED, reach) - reference);
    sum += mass;
    if (GRADIENT) {
      const float part = capped_part(score);
      pulls[base + column] = static_cast<G>(CAPPED ? mass * (part - part * part) : mass);
    }
  }
}
sum = group_sum(sum, sums, lane, simd, THREADS / 32);
if (lid == 0) {
  new_top[row] = now;
  new_index[row] = highest > before ? int(earliest) + start[0] : index[row];
  new_target[row] = own >= 0 && own < int(columns) ? static_cast<float>(scores[base + uint(own)]) * scale : target[row];
  new_others[row] = others[row] * kept + sum;
  keep[row] = kept;
}
