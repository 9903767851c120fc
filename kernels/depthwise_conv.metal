// Depthwise convolution of channels-last pictures with "same" padding, which is never in memory.
// Inputs: x [n, height, width, channels]; weight [channels, K, K, 1]. Output: out [n, ceil(height / STRIDE),
//   ceil(width / STRIDE), channels] of T.
// Template: T, K, STRIDE (1 or 2), TOP and LEFT (zeros before an axis), OUTS (a thread's outputs side by side), SIMDS,
//   STRIP (rows of a group).
// Grid: groups of 32 * SIMDS threads: 32 channels in x, SIMDS * OUTS columns in y, strips of rows of all pictures in z.
// A group of 32 x 32 outputs reads up to 36 x 36 inputs. Replaces a padded copy and a convolution: 2 values moved for
// each, not 4.
const uint lane = thread_index_in_simdgroup;
const uint height = uint(x_shape[1]);
const uint width = uint(x_shape[2]);
const uint channels = uint(x_shape[3]);
const uint rows = (height + STRIDE - 1) / STRIDE;
const uint columns = (width + STRIDE - 1) / STRIDE;
const uint strips = (rows + STRIP - 1) / STRIP;
const uint channel = threadgroup_position_in_grid.x * 32 + lane;
const uint left = (threadgroup_position_in_grid.y * SIMDS + simdgroup_index_in_threadgroup) * OUTS;
const uint image = threadgroup_position_in_grid.z / strips;
const uint top = threadgroup_position_in_grid.z % strips * STRIP;
const uint stop = metal::min(top + STRIP, rows);
if (channel < channels && left < columns) {
  float w[K * K];
  for (uint i = 0; i < K * K; ++i) {
    w[i] = static_cast<float>(weight[channel * K * K + i]);
  }
  for (uint y = top; y < stop; ++y) {
    float sums[OUTS];
    for (uint o = 0; o < OUTS; ++o) {
      sums[o] = 0.0f;
    }
#pragma unroll
    for (int ky = 0; ky < K; ++ky) {
      const int row = int(y) * STRIDE + ky - TOP;
      if (row >= 0 && row < int(height)) {
        const uint base = (image * height + uint(row)) * width;
#pragma unroll
        for (int u = 0; u < STRIDE * (OUTS - 1) + K; ++u) {
          const int column = int(left) * STRIDE + u - LEFT;
          float value = 0.0f;
          if (column >= 0 && column < int(width)) {
            value = static_cast<float>(x[(base + uint(column)) * channels + channel]);
          }
#pragma unroll
          for (int o = 0; o < OUTS; ++o) {
            const int kx = u - STRIDE * o;
            if (kx >= 0 && kx < K) {
              sums[o] = metal::fma(w[ky * K + kx], value, sums[o]);
            }
          }
        }
      }
    }
    for (uint o = 0; o < OUTS; ++o) {
      if (left + o < columns) {
        out[((image * rows + y) * columns + left + o) * channels + channel] = static_cast<T>(sums[o]);
      }
    }
  }
}
