//! Narrow numbers into a vector of f32, for which [`Simd`] has no operations: the machine's own where it is an x86 with
//! AVX2 or AVX-512, loops elsewhere.

use half::{bf16, f16};
use pulp::Simd;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Defines a function that widens vector `i` of some elements.
///
/// With AVX2 a vector is made of 16 bytes, those of the whole vector or of it and its neighbour, by one shuffle: the
/// instructions that widen take twice as long.
macro_rules! widening {
    ($(#[$doc:meta])* $name:ident($from:ty) { 16 => |$x:ident| $avx512:expr, 8 => |$y:ident, $i:ident| $avx2:expr, _ => $one:expr }) => {
        $(#[$doc])*
        #[inline(always)]
        pub(super) fn $name<S: Simd, const LEN: usize>(simd: S, from: &[$from; LEN], i: usize) -> S::f32s {
            const { assert!((LEN * size_of::<$from>()).is_multiple_of(16) && LEN.is_multiple_of(16)) };
            let vector = &from[i * S::F32_LANES..][..S::F32_LANES];
            #[cfg(target_arch = "x86_64")]
            {
                // SAFETY: vectors of 16 lanes mean AVX-512 here and of 8 lanes AVX2, the elements are whole groups of 16 of
                // which one is read, and the types are vectors of as many f32.
                unsafe {
                    if S::F32_LANES == 16 {
                        let $x = vector.as_ptr().cast();
                        return std::mem::transmute_copy::<__m512, _>(&$avx512);
                    }
                    if S::F32_LANES == 8 {
                        let ($y, $i) = (from.as_ptr(), i);
                        return std::mem::transmute_copy::<__m256, _>(&$avx2);
                    }
                }
            }
            let mut lanes = [simd.splat_f32s(0.)];
            for (y, x) in pulp::bytemuck::cast_slice_mut::<_, f32>(&mut lanes).iter_mut().zip(vector) {
                *y = $one(*x);
            }
            lanes[0]
        }
    };
}

widening!(bf16s(bf16) {
    16 => |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x)))),
    8 => |y, i| _mm256_castsi256_ps(spread(twice(y.add(8 * i).cast()), &UPPER_HALVES)),
    _ => bf16::to_f32
});

widening!(
    /// AVX2 alone does not promise the instruction for f16, though every machine with it has it.
    f16s(f16) {
    16 => |x| _mm512_cvtph_ps(_mm256_loadu_si256(x)),
    8 => |y, i| f16s_avx2(y.add(8 * i).cast()),
    _ => f16::to_f32
});

widening!(
    /// Signed bytes, times [`i8_unit`].
    i8s(u8) {
    16 => |x| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x))),
    8 => |y, i| _mm256_cvtepi32_ps(spread(twice(y.add(i / 2 * 16).cast()), &HIGHEST[i % 2])),
    _ => |x| f32::from(x as i8)
});

/// What the sign of a byte is right at the top of 32 bits for.
#[inline(always)]
pub(super) fn i8_unit<S: Simd>() -> f32 {
    if cfg!(target_arch = "x86_64") && S::F32_LANES == 8 { (1 << 24) as f32 } else { 1. }
}

widening!(
    /// Bytes.
    u8s(u8) {
    16 => |x| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(x))),
    8 => |y, i| _mm256_cvtepi32_ps(spread(twice(y.add(i / 2 * 16).cast()), &LOWEST[i % 2])),
    _ => f32::from
});

widening!(
    /// The low four bits of bytes.
    low_bits(u8) {
    16 => |x| _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_cvtepu8_epi32(_mm_loadu_si128(x)), _mm512_set1_epi32(15))),
    8 => |y, i| {
        let bits = _mm256_and_si256(twice(y.add(i / 2 * 16).cast()), _mm256_set1_epi8(15));
        _mm256_cvtepi32_ps(spread(bits, &LOWEST[i % 2]))
    },
    _ => |x| f32::from(x & 15)
});

widening!(
    /// The high four bits of bytes.
    high_bits(u8) {
    16 => |x| _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(_mm512_cvtepu8_epi32(_mm_loadu_si128(x)))),
    8 => |y, i| {
        let bits = _mm256_srli_epi16::<4>(twice(y.add(i / 2 * 16).cast()));
        _mm256_cvtepi32_ps(spread(_mm256_and_si256(bits, _mm256_set1_epi8(15)), &LOWEST[i % 2]))
    },
    _ => |x| f32::from(x >> 4)
});

/// Exact, subnormals, infinities and NaN too; no operation meets a subnormal f32, which would take a hundred cycles.
#[inline(always)]
pub(super) fn from_f16(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let (magnitude, sign) = ((bits & 0x7fff) << 13, (bits & 0x8000) << 16);
    let shifted = magnitude + ((127 - 15) << 23);
    let value = match bits >> 10 & 31 {
        0 => (f32::from_bits(shifted + (1 << 23)) - f32::from_bits((127 - 14) << 23)).to_bits(),
        31 => magnitude | 0x7f80_0000,
        _ => shifted,
    };
    f32::from_bits(value | sign)
}

/// Which bytes of 16 eight numbers of 32 bits are made of, -1 for none.
#[cfg(target_arch = "x86_64")]
type Order = [i8; 32];

/// Bytes in the lowest bits: the first eight of the 16, or the last.
#[cfg(target_arch = "x86_64")]
const LOWEST: [Order; 2] = [order(1, 0, 0), order(1, 0, 8)];
/// In the highest.
#[cfg(target_arch = "x86_64")]
const HIGHEST: [Order; 2] = [order(1, 3, 0), order(1, 3, 8)];
/// Numbers of 16 bits in the upper half.
#[cfg(target_arch = "x86_64")]
const UPPER_HALVES: Order = order(2, 2, 0);

/// Of so many bytes each, from byte `first` on, moved up by `up` bytes.
#[cfg(target_arch = "x86_64")]
const fn order(width: usize, up: usize, first: usize) -> Order {
    let mut order = [-1; 32];
    let mut i = 0;
    while i < 8 * width {
        order[i / width * 4 + up + i % width] = (first + i) as i8;
        i += 1;
    }
    order
}

/// # Safety
/// AVX2.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn spread(twice: __m256i, order: &'static Order) -> __m256i {
    // SAFETY: what the caller promises.
    unsafe { _mm256_shuffle_epi8(twice, _mm256_loadu_si256(order.as_ptr().cast())) }
}

/// 16 bytes, in both halves.
///
/// # Safety
/// AVX2, and 16 bytes at `from`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn twice(from: *const __m128i) -> __m256i {
    // SAFETY: what the caller promises.
    unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(from)) }
}

/// # Safety
/// AVX2, and eight elements at `x`.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn f16s_avx2(x: *const __m128i) -> __m256 {
    // SAFETY: what the caller promises.
    unsafe {
        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(x));
        let sign = _mm256_slli_epi32::<16>(_mm256_and_si256(bits, _mm256_set1_epi32(0x8000)));
        let magnitude = _mm256_slli_epi32::<13>(_mm256_and_si256(bits, _mm256_set1_epi32(0x7fff)));
        let shifted = _mm256_add_epi32(magnitude, _mm256_set1_epi32((127 - 15) << 23));
        // As in `from_f16`.
        let smallest = _mm256_set1_ps(f32::from_bits((127 - 14) << 23));
        let raised = _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(1 << 23)));
        let small = _mm256_castps_si256(_mm256_sub_ps(raised, smallest));
        let is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(1 << 23), magnitude);
        let special = _mm256_or_si256(magnitude, _mm256_set1_epi32(0x7f80_0000));
        let is_special = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32((31 << 23) - 1));
        let value = _mm256_blendv_epi8(_mm256_blendv_epi8(shifted, small, is_small), special, is_special);
        _mm256_castsi256_ps(_mm256_or_si256(value, sign))
    }
}
