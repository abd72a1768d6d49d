// Everything that a kernel asks of the machine, in one place: on a GPU these are instructions, on the host
// (`host/platform.h`) a stand-in with the same meaning, so that tests can run the kernels where there is no GPU.
#pragma once
#include "cla.h"

#ifdef CLA_HOST
#include "host/platform.h"
#else

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CLA_DEVICE __device__ __forceinline__
#define CLA_ANYWHERE __host__ __device__ __forceinline__  // on the side of the launch too
#define CLA_COLD __device__ __noinline__
#define CLA_CONSTANT __grid_constant__  // a parameter that can be referred to without a copy of it
#define CLA_KERNEL(threads, blocks_per_sm) __global__ __launch_bounds__(threads, blocks_per_sm)
#define CLA_UNROLL _Pragma("unroll")
#define CLA_NO_UNROLL _Pragma("unroll 1")
#define CLA_UNROLL_TWICE _Pragma("unroll 2")
#define CLA_UNROLL_EIGHT _Pragma("unroll 8")

namespace cla {

CLA_DEVICE unsigned thread_index() { return threadIdx.x; }
CLA_DEVICE unsigned block_x() { return blockIdx.x; }
CLA_DEVICE unsigned block_y() { return blockIdx.y; }
CLA_DEVICE unsigned grid_x() { return gridDim.x; }
CLA_DEVICE unsigned grid_y() { return gridDim.y; }

extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
CLA_DEVICE unsigned char *shared_memory() { return dynamic_shared_memory; }

CLA_DEVICE void barrier() { __syncthreads(); }
// What lanes of a warp wrote to memory before it, they all see after it.
CLA_DEVICE void warp_barrier() { __syncwarp(); }
// A barrier for threads that come to it from different places; `which` is what they have in common.
CLA_DEVICE void meet(int which) { asm volatile("bar.sync 0;" ::: "memory"); }
template <class T> CLA_DEVICE T shuffle_xor(T x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
template <class T> CLA_DEVICE T shuffle_up(T x, int delta) { return __shfl_up_sync(0xffffffffu, x, delta); }
template <class T> CLA_DEVICE T shuffle(T x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
CLA_DEVICE int atomic_min(int *p, int x) { return atomicMin(p, x); }
CLA_DEVICE float atomic_add(float *p, float x) { return atomicAdd(p, x); }

// The same number, which the compiler takes for another: what is computed from it stays where it is written, instead of
// going into registers before the loop around it.
CLA_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

CLA_DEVICE float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

CLA_DEVICE uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory; zeros if not `valid`.
CLA_DEVICE void copy16_async(void *shared, const void *global, bool valid) {
  int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}
// The same with 8 bytes.
CLA_DEVICE void copy8_async(void *shared, const void *global, bool valid) {
  int bytes = valid ? 8 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
CLA_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> CLA_DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Whether the machine copies whole sub-tiles (products.cuh) by itself: all that this is compiled for must.
constexpr int ARCHITECTURES[] = {__CUDA_ARCH_LIST__};
constexpr bool all_from(int least) {
  for (int architecture : ARCHITECTURES) {
    if (architecture < least) return false;
  }
  return true;
}
constexpr bool HAS_SUBTILE_COPIES = all_from(900);

// A tensor [sequences, tokens, heads, columns] of bf16 or f32 as something to copy sub-tiles from and to; a parameter of the
// kernel. What lies outside of the tensor is read as zeros and not written.
struct SubtileMap {
  CUtensorMap map;
};
// Sizes in the order columns, tokens, heads, sequences; strides in bytes, of a column's own size for the first. False if the
// machine cannot: it takes addresses and strides that are multiples of 16, and strides below 2^40.
inline bool describe_subtiles(SubtileMap &map, void *data, const int64_t (&sizes)[4], const int64_t (&strides)[4]) {
  static const auto encode = [] {
    void *found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return (decltype(&cuTensorMapEncodeTiled))found;
  }();
  cuuint64_t size[4], stride[3];
  for (int i = 0; i < 4; i++) {
    if (sizes[i] < 1 || sizes[i] > INT32_MAX || strides[i] < 0) return false;
    size[i] = (cuuint64_t)sizes[i];
    // Nothing takes a step along a dimension of size 1; its stride may be any.
    if (i > 0) stride[i - 1] = sizes[i] == 1 ? 16 : (cuuint64_t)strides[i];
  }
  const cuuint32_t box[4] = {(cuuint32_t)(128 / strides[0]), 64, 1, 1}, each[4] = {1, 1, 1, 1};
  const auto type = strides[0] == 4 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return encode && encode(&map.map, type, 4, data, size, stride, box, each, CU_TENSOR_MAP_INTERLEAVE_NONE,
                          CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                          CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// Counts bytes that sub-tiles bring to shared memory, time after time. One thread prepares it, before a barrier(); for each
// time one thread says how many bytes are expected, and asks for the copies.
struct CopyCount {
  uint64_t bits;
};
CLA_DEVICE void prepare_count(CopyCount *count) {
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(count)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
CLA_DEVICE void expect_bytes(CopyCount *count, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(count)), "r"(bytes) : "memory");
}
// Until all bytes of the `time`-th time, from 0, have come; not after the time that follows it has been asked for.
CLA_DEVICE void wait_for_bytes(CopyCount *count, int time) {
  asm volatile(
      "{\n.reg .pred landed;\nagain:\nmbarrier.try_wait.parity.shared.b64 landed, [%0], %1;\n@!landed bra again;\n}" ::"r"(
          shared_address(count)),
      "r"(time & 1)
      : "memory");
}
// The sub-tile whose first column and token these are, which may lie outside.
CLA_DEVICE void copy_subtile(void *to, const SubtileMap &map, int column, int64_t token, int head, int64_t sequence,
                             CopyCount *count) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          shared_address(to)),
      "l"(&map.map), "r"(column), "r"((int)token), "r"(head), "r"((int)sequence), "r"(shared_address(count))
      : "memory");
}
// From shared memory, where whoever wrote it has made it visible by shared_fence and a barrier. It may be written again once
// the same thread has waited for what it stores.
CLA_DEVICE void store_subtile(const SubtileMap &map, int column, int64_t token, int head, int64_t sequence, const void *from) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map.map),
               "r"(column), "r"((int)token), "r"(head), "r"((int)sequence), "r"(shared_address(from))
               : "memory");
}
CLA_DEVICE void wait_for_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Four 8x8 matrices of 16-bit numbers; lane l has the address of row l % 8 of matrix l / 8.
CLA_DEVICE void load_matrices(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
CLA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// c += a b for a 16x16 by 16x8 product of bf16.
CLA_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same of f16.
CLA_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

CLA_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
CLA_DEVICE float low_bf16(uint32_t x) { return __uint_as_float(x << 16); }
CLA_DEVICE float high_bf16(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }
CLA_DEVICE uint16_t to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
CLA_DEVICE float from_bf16(uint16_t x) { return __uint_as_float((uint32_t)x << 16); }
CLA_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
CLA_DEVICE uint16_t to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
CLA_DEVICE float from_f16(uint16_t x) { return __half2float(__ushort_as_half(x)); }

// 0 for what is below 2^-126.
CLA_DEVICE float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
CLA_DEVICE float exp_fast(float x) { return exp2_fast(x * 1.4426950408889634f); }
// NaN if one of them is.
CLA_DEVICE float larger(float x, float y) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  return r;
}
// Of a number that is not 0.
CLA_DEVICE int highest_bit(unsigned x) { return 31 - __clz((int)x); }
// To the last bit or two; 0 from 2^126 on.
CLA_DEVICE float reciprocal_fast(float x) { return __fdividef(1.f, x); }

struct alignas(16) Vec4 {
  uint32_t x, y, z, w;
};
CLA_DEVICE Vec4 load16(const void *p) {
  uint4 v = *(const uint4 *)p;
  return {v.x, v.y, v.z, v.w};
}
CLA_DEVICE void store16(void *p, Vec4 v) { *(uint4 *)p = make_uint4(v.x, v.y, v.z, v.w); }
CLA_DEVICE void store16_streaming(void *p, Vec4 v) { __stcs((uint4 *)p, make_uint4(v.x, v.y, v.z, v.w)); }

struct Dims {
  int64_t x, y;
};
template <class Kernel, class... Args>
int32_t launch(Kernel kernel, Dims grid, int threads, int64_t shared_bytes, void *stream, Args... args) {
  if (grid.x <= 0 || grid.y <= 0) return 0;
  if (grid.x > INT32_MAX || grid.y > 65535) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 * 1024) {
    cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (e != cudaSuccess) return e;
  }
  kernel<<<dim3((unsigned)grid.x, (unsigned)grid.y), threads, shared_bytes, (cudaStream_t)stream>>>(args...);
  return cudaGetLastError();
}

}  // namespace cla
#endif
