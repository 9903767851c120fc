// Gradient of depthwise_conv's weight, summed over a group's outputs; the caller adds up the groups' sums.
// Inputs: x [n, height, width, channels]; cotangent [n, rows, columns, channels].
// Output: partials float [strips of all pictures, blocks of columns, channels, K * K].
// Template and grid as the forward's. Replaces a convolution of transposed arrays whose kernel is the cotangent, a group
// for each channel.
threadgroup float shared[SIMDS * 32 * K * K];
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint lid = thread_position_in_threadgroup.x;
const uint height = uint(x_shape[1]);
const uint width = uint(x_shape[2]);
const uint channels = uint(x_shape[3]);
const uint rows = uint(cotangent_shape[1]);
const uint columns = uint(cotangent_shape[2]);
const uint strips = (rows + STRIP - 1) / STRIP;
const uint first = threadgroup_position_in_grid.x * 32;
const uint channel = first + lane;
const uint left = (threadgroup_position_in_grid.y * SIMDS + simd) * OUTS;
const uint image = threadgroup_position_in_grid.z / strips;
const uint top = threadgroup_position_in_grid.z % strips * STRIP;
const uint stop = metal::min(top + STRIP, rows);
float w[K * K];
for (uint i = 0; i < K * K; ++i) {
  w[i] = 0.0f;
}
if (channel < channels && left < columns) {
  for (uint y = top; y < stop; ++y) {
    float pulls[OUTS];
    for (uint o = 0; o < OUTS; ++o) {
      pulls[o] = 0.0f;
      if (left + o < columns) {
        pulls[o] = static_cast<float>(cotangent[((image * rows + y) * columns + left + o) * channels + channel]);
      }
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
              w[ky * K + kx] = metal::fma(pulls[o], value, w[ky * K + kx]);
            }
          }
        }
      }
    }
  }
}
for (uint i = 0; i < K * K; ++i) {
  shared[(simd * K * K + i) * 32 + lane] = w[i];
}
threadgroup_barrier(mem_flags::mem_threadgroup);
const uint block = threadgroup_position_in_grid.z * ((columns + SIMDS * OUTS - 1) / (SIMDS * OUTS)) +
                   threadgroup_position_in_grid.y;
for (uint i = lid; i < 32 * K * K; i += 32 * SIMDS) {
  const uint owner = i / (K * K);
  if (first + owner < channels) {
    float sum = 0.0f;
    for (uint other = 0; other < SIMDS; ++other) {
      sum += shared[(other * K * K + i % (K * K)) * 32 + owner];
    }
    partials[(block * channels + first) * K * K + i] = sum;
  }
}
