// Answers the Makefile's question: is there a GPU that runs what this nvcc compiles? Prints its architecture, "90a" for an H200.
#include <cstdio>
__global__ void touch(int* p) { *p = 7; }
int main() {
    int* p;
    int v = 0;
    cudaDeviceProp d;
    if (cudaGetDeviceProperties(&d, 0) != cudaSuccess || cudaMalloc(&p, 4) != cudaSuccess) return 1;
    touch<<<1, 1>>>(p);
    if (cudaMemcpy(&v, p, 4, cudaMemcpyDeviceToHost) != cudaSuccess || v != 7) return 1;
    printf("%d%d%s\n", d.major, d.minor, d.major >= 9 ? "a" : "");
}
