// Gradient of depthwise_conv's x for the cotangent of its result: each input gathers from the outputs that saw it.
// Inputs: cotangent [n, rows, columns, channels]; weight [channels, K, K, 1]; size int [2]: height and width of x.
// Output: d_x [n, height, width, channels] of T. Template as the forward's; OUTS a multiple of STRIDE.
// Grid as the forward's, over the inputs. Replaces, with a stride of 2, a product with K * K times unfolded cotangents.
const uint lane = thread_index_in_simdgroup;
const uint height = uint(size[0]);
const uint width = uint(size[1]);
const uint channels = uint(cotangent_shape[3]);
const uint rows = uint(cotangent_shape[1]);
const uint columns = uint(cotangent_shape[2]);
const uint strips = (height + STRIP - 1) / STRIP;
const uint channel = threadgroup_position_in_grid.x * 32 + lane;
const uint left = (threadgroup_position_in_grid.y * SIMDS + simdgroup_index_in_threadgroup) * OUTS;
const uint image = threadgroup_position_in_grid.z / strips;
const uint top = threadgroup_position_in_grid.z % strips * STRIP;
const uint stop = metal::min(top + STRIP, height);
if (channel < channels && left < width) {
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
      const int at = int(y) + TOP - ky;
      if (at >= 0 && at % STRIDE == 0 && at / STRIDE < int(rows)) {
        const uint base = (image * rows + uint(at / STRIDE)) * columns;
#pragma unroll
        for (int u = -((K - 1 - LEFT) / STRIDE); u <= (OUTS - 1 + LEFT) / STRIDE; ++u) {
          const int column = int(left) / STRIDE + u;
          float pull = 0.0f;
          if (column >= 0 && column < int(columns)) {
            pull = static_cast<float>(cotangent[(base + uint(column)) * channels + channel]);
          }
#pragma unroll
          for (int o = 0; o < OUTS; ++o) {
            const int kx = o + LEFT - STRIDE * u;
            if (kx >= 0 && kx < K) {
              sums[o] = metal::fma(w[ky * K + kx], pull, sums[o]);
            }
          }
        }
      }
    }
    for (uint o = 0; o < OUTS; ++o) {
      if (left + o < width) {
        d_x[((image * height + y) * width + left + o) * channels + channel] = static_cast<T>(sums[o]);
      }
    }
  }
}
