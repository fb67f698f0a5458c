/* SPDX-License-Identifier: Apache-2.0 */
/* A kernel from C, on the CPU: rmsnorm SET. Link with flashinfer_c. */
#include <flashinfer/flashinfer.h>
#include <stdio.h>

int main(int argc, char** argv) {
  float x[2][64], weight[64], out[2][64];
  const int64_t rows[] = {2, 64}, row[] = {64};
  flashinfer_kernels* kernels;
  if (argc != 2 || flashinfer_kernels_open(argv[1], FLASHINFER_CPU, &kernels) != FLASHINFER_OK) {
    fprintf(stderr, "usage: rmsnorm SET; %s\n", flashinfer_last_error());
    return 1;
  }
  for (int i = 0; i < 64; ++i) {
    x[0][i] = (float)(i + 1);
    x[1][i] = -3.f;
    weight[i] = 2.f;
  }
  const flashinfer_tensor input = flashinfer_tensor_of(x, FLASHINFER_FP32, 2, rows);
  const flashinfer_tensor scale = flashinfer_tensor_of(weight, FLASHINFER_FP32, 1, row);
  const flashinfer_tensor output = flashinfer_tensor_of(out, FLASHINFER_FP32, 2, rows);
  const int status = flashinfer_rmsnorm(kernels, &input, &scale, &output, 1e-6f, 0, NULL);
  if (status == FLASHINFER_OK)
    printf("%.4f %.4f %.4f\n", out[0][0], out[0][63], out[1][0]);
  else
    fprintf(stderr, "%s\n", flashinfer_last_error());
  flashinfer_kernels_close(kernels);
  return status;
}
