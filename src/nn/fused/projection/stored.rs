//! Weights in the formats they are stored in, read as vectors of f32.

use super::lanes::{bf16s, f16s, from_f16, high_bits, i8s, low_bits, splat_f16};
use half::{bf16, f16};
use pulp::Simd;

/// The elements of a matrix, row after row. Rows of quantized blocks are whole blocks.
#[derive(Clone, Copy)]
pub(in crate::nn) enum Stored<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    BF16(&'a [bf16]),
    Q8_0(&'a [Q8_0]),
    Q4K(&'a [Q4K]),
}

impl Stored<'_> {
    /// How many elements there are.
    pub fn len(self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::BF16(x) => x.len(),
            Self::Q8_0(x) => x.len() * Q8_0::LEN,
            Self::Q4K(x) => x.len() * Q4K::LEN,
        }
    }
}

/// A block of 32 elements: a scale in f16, then a signed byte for each.
pub(in crate::nn) type Q8_0 = [u8; 34];
/// A block of 256 elements: a scale and a step of minima in f16, eight pairs of a scale and a minimum of six bits, then
/// four bits for each element.
pub(in crate::nn) type Q4K = [u8; 144];

/// The elements of a block.
pub(in crate::nn) trait Block {
    const LEN: usize;
}

impl Block for Q8_0 {
    const LEN: usize = 32;
}

impl Block for Q4K {
    const LEN: usize = 256;
}

/// Weights that are read a group at a time. Groups are whole vectors on every machine.
pub(super) trait Format: Copy + Sync {
    /// Elements of a group.
    const GROUP: usize;

    /// The vectors of the group that begins with element `at`, one after the other.
    fn group<S: Simd>(self, simd: S, at: usize, each: impl FnMut(usize, S::f32s));

    /// The elements from `at` on, of rows that are not whole groups.
    fn tail(self, _at: usize, _into: &mut [f32]) {}
}

/// Groups of formats without blocks.
const PLAIN: usize = 32;

impl Format for &[f32] {
    const GROUP: usize = PLAIN;

    #[inline(always)]
    fn group<S: Simd>(self, _: S, at: usize, mut each: impl FnMut(usize, S::f32s)) {
        let vectors = S::as_simd_f32s(&self[at..][..PLAIN]).0;
        for (i, vector) in vectors.iter().enumerate() {
            each(i, *vector);
        }
    }

    fn tail(self, at: usize, into: &mut [f32]) {
        into.copy_from_slice(&self[at..][..into.len()]);
    }
}

impl Format for &[f16] {
    const GROUP: usize = PLAIN;

    #[inline(always)]
    fn group<S: Simd>(self, simd: S, at: usize, mut each: impl FnMut(usize, S::f32s)) {
        let group = &self[at..][..PLAIN];
        for i in 0..PLAIN / S::F32_LANES {
            each(i, f16s(simd, &group[i * S::F32_LANES..]));
        }
    }

    fn tail(self, at: usize, into: &mut [f32]) {
        into.iter_mut().zip(&self[at..]).for_each(|(y, x)| *y = x.to_f32());
    }
}

impl Format for &[bf16] {
    const GROUP: usize = PLAIN;

    #[inline(always)]
    fn group<S: Simd>(self, simd: S, at: usize, mut each: impl FnMut(usize, S::f32s)) {
        let group = &self[at..][..PLAIN];
        for i in 0..PLAIN / S::F32_LANES {
            each(i, bf16s(simd, &group[i * S::F32_LANES..]));
        }
    }

    fn tail(self, at: usize, into: &mut [f32]) {
        into.iter_mut().zip(&self[at..]).for_each(|(y, x)| *y = x.to_f32());
    }
}

impl Format for &[Q8_0] {
    const GROUP: usize = Q8_0::LEN;

    #[inline(always)]
    fn group<S: Simd>(self, simd: S, at: usize, mut each: impl FnMut(usize, S::f32s)) {
        let block = &self[at / Q8_0::LEN];
        let scale = splat_f16(simd, half_at(block, 0));
        for i in 0..Self::GROUP / S::F32_LANES {
            each(i, simd.mul_f32s(scale, i8s(simd, &block[2 + i * S::F32_LANES..])));
        }
    }
}

impl Format for &[Q4K] {
    const GROUP: usize = Q4K::LEN;

    /// Two of eight parts of 32 elements share 32 bytes: the first has the low four bits, the second the high ones.
    #[inline(always)]
    fn group<S: Simd>(self, simd: S, at: usize, mut each: impl FnMut(usize, S::f32s)) {
        let block = &self[at / Q4K::LEN];
        let (scale, step) = (from_f16(half_at(block, 0)), from_f16(half_at(block, 2)));
        let (scales, mins) = scales_and_mins(&block[4..16]);
        let (scales, mins) = (scales.map(|s| scale * f32::from(s)), mins.map(|m| -step * f32::from(m)));
        let vectors = 32 / S::F32_LANES;
        for part in 0..8 {
            let (s, m) = (simd.splat_f32s(scales[part]), simd.splat_f32s(mins[part]));
            let bytes = &block[16 + part / 2 * 32..][..32];
            for i in 0..vectors {
                let bytes = &bytes[i * S::F32_LANES..];
                let x = if part % 2 == 0 { low_bits(simd, bytes) } else { high_bits(simd, bytes) };
                each(part * vectors + i, simd.mul_add_e_f32s(s, x, m));
            }
        }
    }
}

#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// The six-bit numbers of all parts: the first four lie in bytes of their own, whose two high bits belong to the others.
#[inline(always)]
fn scales_and_mins(packed: &[u8]) -> ([u8; 8], [u8; 8]) {
    let four = |i: usize| u32::from_le_bytes([packed[i], packed[i + 1], packed[i + 2], packed[i + 3]]);
    let (scales, mins, low) = (four(0), four(4), four(8));
    let all = |first: u32, low: u32| {
        let first_four = first & 0x3f3f_3f3f;
        let others = (low & 0x0f0f_0f0f) | (first >> 6 & 0x0303_0303) << 4;
        (u64::from(first_four) | u64::from(others) << 32).to_le_bytes()
    };
    (all(scales, low), all(mins, low >> 4))
}
