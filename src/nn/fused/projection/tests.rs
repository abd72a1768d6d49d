use super::*;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use half::{bf16, f16};
use rand::{Rng, SeedableRng, rngs::StdRng};

fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1f32..1.)).collect()
}

/// Gives a matrix to whoever asks for it.
type Give = Box<dyn Fn(&mut dyn FnMut(Stored)) + Sync>;

/// A matrix in a format, and what its elements are.
struct Weights {
    name: &'static str,
    stored: Give,
    exact: Vec<f32>,
}

fn weights(n: usize, k: usize) -> Vec<Weights> {
    let w = random(n * k, 5);
    let narrow: Vec<bf16> = w.iter().map(|x| bf16::from_f32(*x)).collect();
    let half: Vec<f16> = w.iter().map(|x| f16::from_f32(*x)).collect();
    let mut all = vec![
        Weights {
            name: "bf16",
            exact: narrow.iter().map(|x| x.to_f32()).collect(),
            stored: Box::new(move |f| f(Stored::BF16(&narrow))),
        },
        Weights {
            name: "f16",
            exact: half.iter().map(|x| x.to_f32()).collect(),
            stored: Box::new(move |f| f(Stored::F16(&half))),
        },
    ];
    for (name, format) in [("q8_0", GgmlDType::Q8_0), ("q4_k", GgmlDType::Q4K)] {
        if k > 0 && k.is_multiple_of(format.block_size()) && n > 0 {
            // Some scales so small that they are subnormal in f16.
            let scaled =
                w.iter().enumerate().map(|(i, x)| if i / k % 3 == 1 { x * 1e-3 } else { *x }).collect();
            let tensor = Tensor::from_vec(scaled, (n, k), &Device::Cpu).unwrap();
            let tensor = QTensor::quantize(&tensor, format).unwrap();
            let exact = tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let stored = move |f: &mut dyn FnMut(Stored)| {
                let data = tensor.data().unwrap();
                match format {
                    GgmlDType::Q8_0 => f(Stored::Q8_0(data.as_chunks().0)),
                    _ => f(Stored::Q4K(data.as_chunks().0)),
                }
            };
            all.push(Weights { name, exact, stored: Box::new(stored) });
        }
    }
    all.push(Weights { name: "f32", exact: w.clone(), stored: Box::new(move |f| f(Stored::F32(&w))) });
    all
}

fn product(x: &[f32], rows: usize, weights: &Weights, outputs: usize) -> Vec<f32> {
    let mut y = vec![];
    (weights.stored)(&mut |stored| y = project(x, rows, stored, outputs));
    y
}

/// By every way there is: weights in bf16 have one of their own where the machine has AMX.
fn products(x: &[f32], rows: usize, weights: &Weights, outputs: usize) -> Vec<Vec<f32>> {
    let mut ways = vec![product(x, rows, weights, outputs)];
    (weights.stored)(&mut |stored| match stored {
        Stored::BF16(w) if rows * outputs > 0 => ways.push(project_as(x, rows, w, outputs)),
        _ => {}
    });
    ways
}

#[test]
fn is_the_sum_of_products_for_any_sizes_and_formats() {
    for k in [0, 1, 31, 32, 33, 64, 100, 256, 512, 2048, 2080, 2304] {
        for n in [0, 1, 5, 8, 13, 17, 39] {
            for weights in weights(n, k) {
                for rows in [0, 1, 2, 3, 4, 5, 9, 16, 17, 33, 40] {
                    let x = random(rows * k, 6);
                    let ways = products(&x, rows, &weights, n);
                    for i in 0..rows * n {
                        let (x, w) = (&x[i / n * k..][..k], &weights.exact[i % n * k..][..k]);
                        let exact: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                        for y in &ways {
                            let error = (f64::from(y[i]) - exact).abs();
                            assert!(
                                error <= 1e-5 * (k as f64).sqrt(),
                                "{} {rows} {n} {k}: {error:e}",
                                weights.name
                            );
                        }
                    }
                    assert!(ways.iter().all(|y| y.len() == rows * n));
                }
            }
        }
    }
}

/// Infinities, numbers that are none, and those too large for bf16 give what they give in f32, and nothing else changes.
#[test]
fn special_numbers_are_what_they_are_in_f32() {
    const SPECIAL: [f32; 6] = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, 1e38];
    let (rows, n, k) = (35, 37, 70);
    let x = random(rows * k, 8);
    let mut w: Vec<bf16> = random(n * k, 9).into_iter().map(bf16::from_f32).collect();
    let plain = project(&x, rows, Stored::BF16(&w), n);
    for (output, special) in [(3, bf16::INFINITY), (20, bf16::NAN), (36, bf16::MAX)] {
        w[output * k + 5 * output % k] = special;
    }
    let mut with_specials = x;
    for (i, special) in SPECIAL.into_iter().enumerate() {
        with_specials[6 * i * k + 11 * i] = special;
    }
    let found = project(&with_specials, rows, Stored::BF16(&w), n);
    let expected = project_as(&with_specials, rows, w.as_slice(), n);
    for i in 0..rows * n {
        let (row, output, found, expected) = (i / n, i % n, found[i], expected[i]);
        let touched = row.is_multiple_of(6) || [3, 20, 36].contains(&output);
        let same = found == expected || (found.is_nan() && expected.is_nan());
        let close = (found - expected).abs() <= 1e-4 * expected.abs();
        assert!(same || (touched && close) || found == plain[i], "{row}, {output}: {found} for {expected}");
    }
}

/// They may count as zeros.
#[test]
fn subnormal_numbers_do_no_harm() {
    let tiny = [f32::from_bits(1), -f32::MIN_POSITIVE / 2., 0., -0.];
    let x: Vec<f32> = tiny.into_iter().cycle().take(64).collect();
    let y = project(&x, 1, Stored::BF16(&[bf16::ONE; 64]), 1);
    assert!(y[0].abs() <= 64. * f32::MIN_POSITIVE);
}

/// In any company, on any number of threads.
#[test]
fn rows_together_are_rows_alone_to_the_bit() {
    let (rows, n, k) = (2 * ROWS + 7, 3 * BLOCK + 5, 2304);
    for weights in weights(n, k) {
        let x = random(rows * k, 7);
        let on = |threads: usize, from: usize, to: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| product(&x[from * k..to * k], to - from, &weights, n))
        };
        let all = on(1, 0, rows);
        for (from, to) in [(0, 1), (5, 7), (17, 20), (40, 44), (90, 99), (3, 150), (0, rows)] {
            let some = on(3, from, to);
            assert!(some == all[from * n..to * n], "{} rows {from} to {to}", weights.name);
        }
    }
}

#[test]
fn every_f16_is_what_it_is() {
    let all: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    let same = |x: f32, y: f16| (x.is_nan() && y.is_nan()) || x.to_bits() == y.to_f32().to_bits();
    assert!(all.iter().all(|x| same(lanes::from_f16(*x), *x)));
    // The smallest numbers, times 1 and summed up with zeros, come out as they are.
    for x in all.iter().filter(|x| x.is_finite()).step_by(97) {
        let mut row = vec![f16::ZERO; 32];
        row[3] = *x;
        let mut input = vec![0.; 32];
        input[3] = 1.;
        assert_eq!(project(&input, 1, Stored::F16(&row), 1), [x.to_f32()]);
    }
}
