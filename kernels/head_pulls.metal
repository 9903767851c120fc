// The gradient of a chunk's logits before scale, where the head trains: exponential, slope and row factor, one pass.
// Inputs: scores [rows, columns] before scale and cap; wanted int [rows], the target's column in this chunk or anything
//   else; measured, own, factor float [rows]: what exponents are measured from, what stands at the target, what
//   multiplies a row; constants float [2]: scale, reach.
// Output: pulls [rows, columns] of G. Template: G, THREADS, VALUES (a thread's), CAPPED.
// Grid: groups of THREADS for every THREADS * VALUES columns in x, rows in y.
const uint row = threadgroup_position_in_grid.y;
const uint columns = uint(scores_shape[1]);
const uint first = threadgroup_position_in_grid.x * (THREADS * VALUES) + thread_position_in_threadgroup.x;
for (uint j = 0; j < VALUES; ++j) {
  const uint column = first + j * THREADS;
  if (column < columns) {
    const uint at = row * columns + column;
    const float score = static_cast<float>(scores[at]) * constants[0];
    float mass = own[row];
    if (int(column) != wanted[row]) {
      mass = power_of_two(exponent_of(score, CAPPED, constants[1]) - measured[row]);
    }
    if (CAPPED) {
      const float part = capped_part(score);
      mass *= part - part * part;
    }
    pulls[at] = static_cast<G>(mass * factor[row]);
  }
}
