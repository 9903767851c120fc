// AltUp's prediction: each of STREAMS residual streams plus a mix of all, one pass.
// Inputs: first [tokens, width]; others [STREAMS - 1, tokens, width]; mix [tokens, STREAMS, STREAMS], what stream i
//   (last axis) adds to stream j.
// Outputs: active, rest, shaped as first and others, of T. Template: T, STREAMS, THREADS, VALUES (a thread's, THREADS *
//   VALUES >= width). Grid: a group of THREADS for each token.
// Replaces two transposed copies, a batched product of 4 x 4 matrices and a sum: 2 streams moved for each, not 7.
const uint token = threadgroup_position_in_grid.x;
const uint lid = thread_position_in_threadgroup.x;
const uint width = uint(first_shape[1]);
const uint plane = uint(first_shape[0]) * width;
float mixed[STREAMS * STREAMS];
for (uint k = 0; k < STREAMS * STREAMS; ++k) {
  mixed[k] = static_cast<float>(mix[token * (STREAMS * STREAMS) + k]);
}
for (uint v = 0; v < VALUES; ++v) {
  const uint column = lid + v * THREADS;
  if (column < width) {
    const uint at = token * width + column;
    float streams[STREAMS];
    streams[0] = static_cast<float>(first[at]);
    for (uint i = 1; i < STREAMS; ++i) {
      streams[i] = static_cast<float>(others[(i - 1) * plane + at]);
    }
    for (uint j = 0; j < STREAMS; ++j) {
      float sum = streams[j];
      for (uint i = 0; i < STREAMS; ++i) {
        sum += mixed[j * STREAMS + i] * streams[i];
      }
      if (j == 0) {
        active[at] = static_cast<T>(sum);
      } else {
        rest[(j - 1) * plane + at] = static_cast<T>(sum);
      }
    }
  }
}
