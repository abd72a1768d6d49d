//! The exponential, in a form that compilers turn into vector code.

/// Replaces every element by its exponential, to 1.5 ulp. Results under the normal range are 0.
#[inline(always)]
pub(super) fn exp_in_place(x: &mut [f32]) {
    for x in x {
        *x = exp(*x);
    }
}

/// To 1.5 ulp; results under the normal range are 0.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // e^x = 2^n e^r with n the nearest integer to x / ln 2. Adding and subtracting 1.5 * 2^23 rounds, and leaves n in the
    // low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts: the first has trailing zeros, so that n times it is exact.
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let p = p * r * r + r + 1.0;
    // 2^n in two factors, since 2^128 is not a number.
    let n = (shifted.to_bits() as i32) << 9 >> 9;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) as u32) << 23);
    let y = p * power(half) * power(n.wrapping_sub(half));
    if x < -87.3 {
        0.0
    } else if x > 88.8 {
        f32::INFINITY
    } else {
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_f64() {
        for i in -8720..8870 {
            let x = i as f32 * 0.01 + 0.003;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 1.5e-7 || exact > f64::from(f32::MAX), "exp({x}) is off by {error:e}");
        }
    }

    #[test]
    fn edges_are_exact() {
        for (x, y) in [(0.0, 1.0), (f32::NEG_INFINITY, 0.0), (-1e4, 0.0), (f32::INFINITY, f32::INFINITY)] {
            assert_eq!(exp(x), y, "exp({x})");
        }
        assert!(exp(f32::NAN).is_nan());
    }
}
