//! The normalised form: `o_t / (scale * q_t . z_t + 1e-10)`.

use crate::case::{Case, LENGTHS, SCALES};
use crate::compare::{close, values};
use crate::run::{Graph, MODES};
use candle_core::{DType, Device, Tensor, Var};
use candle_linear_attn::{Options, linear_attn};

fn case() -> Case {
    Case { normalize: true, ..Case::default() }
}

#[test]
fn agrees_for_every_scale_and_length() {
    for scale in SCALES {
        for t in LENGTHS {
            for initial_state in [true, false] {
                // The first token's o is its v, whatever q and k are: their gradients are nothing but rounding.
                if t == 1 && !initial_state {
                    continue;
                }
                Case { t, scale, initial_state, k: 7, group: 2, ..case() }.check_modes(Graph::ALL).unwrap();
            }
        }
    }
}

/// With v = 1 the output is 1 whatever q and k are: their gradients through numerator and denominator must cancel.
#[test]
fn gradient_goes_through_the_denominator() {
    let case = Case { t: 130, ..case() };
    let mut inputs = case.inputs().unwrap();
    inputs.args[2] = Some(inputs.args[2].take().unwrap().ones_like().unwrap());
    inputs.args[4] = None;
    inputs.args[5] = None;
    for mode in MODES {
        let graph = Graph { loss: [true, false, false], ..Graph::ALL };
        let got = case.run(mode, &inputs, graph).unwrap();
        let ones = vec![1.0; case.t * case.hv() * case.v];
        let label = format!("{mode:?}: o of constant values");
        close(got.outputs[0].as_ref().unwrap(), &ones, DType::F32, 1e-5, &label).unwrap();
        for (i, name) in [(0, "dq"), (1, "dk")] {
            let grad = values(got.grads[i].as_ref().unwrap()).unwrap();
            let largest = grad.iter().fold(0.0f64, |m, x| m.max(x.abs()));
            assert!(largest < 1e-5, "{mode:?}: {name} should vanish, is {largest:e}");
        }
    }
}

/// In bf16 a running sum of ones stops at 256 or 512: 512 + 1 rounds to 512.
#[test]
fn sum_of_keys_does_not_stall() {
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        let ones = |t| {
            let x = Tensor::ones((1, t, 1, 1), DType::F32, &Device::Cpu)?;
            x.to_dtype(dtype)
        };
        let (x, first) = (ones(4097).unwrap(), ones(1).unwrap());
        // v is one at the first token only, so that o is 1 / t.
        let rest = x.narrow(1, 1, 4096).unwrap().zeros_like().unwrap();
        let v = Tensor::cat(&[&first, &rest], 1).unwrap();
        for mode in MODES {
            let opts = Options::default().with_mode(mode).with_normalize(true).with_final_state(true);
            let got = linear_attn(&x, &x, &v, &opts).unwrap();
            let label = format!("{dtype:?} {mode:?}");
            let z = got.state.unwrap().z.expect("normalised: z is part of the state");
            assert_eq!(z.dims(), [1, 1, 1]);
            close(&z, &[4097.0], DType::F32, 0.0, &label).unwrap();
            let want: Vec<f64> = (1..=4097).map(|t| 1.0 / t as f64).collect();
            let limit = match dtype {
                DType::BF16 => 2.5e-3,
                DType::F16 => 5e-4,
                _ => 1e-5,
            };
            close(&got.out, &want, dtype, limit, &label).unwrap();
        }
    }
}

/// 1e-10 is zero in f16. Where the denominator is nothing else, 0 / 1e-10 must be 0 and not NaN; where it is of the same
/// size, it must count.
#[test]
fn eps_is_applied_in_f32() {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let tensor = |data: &[f32]| {
            Tensor::from_slice(data, (1, data.len(), 1, 1), &Device::Cpu)
                .and_then(|x| x.to_dtype(dtype))
                .unwrap()
        };
        // scale * q . z is 0 for the first token, 1.8e-10 for the second, 2.7e-10 for the third.
        let tiny = 2f32.powi(-20);
        let q = tensor(&[0.0, tiny, tiny]);
        let k = tensor(&[tiny, tiny, tiny]);
        let v = tensor(&[1.0, 1.0, 3.0]);
        for mode in MODES {
            let opts = Options::default().with_mode(mode).with_scale(100.0).with_normalize(true);
            let out = linear_attn(&q, &k, &v, &opts).unwrap().out;
            let t = f64::from(tiny) * f64::from(tiny) * 100.0;
            let want = [0.0, 2.0 * t / (2.0 * t + 1e-10), 5.0 * t / (3.0 * t + 1e-10)];
            let limit = match dtype {
                DType::BF16 => 4e-3,
                DType::F16 => 5e-4,
                _ => 1e-5,
            };
            close(&out, &want, dtype, limit, &format!("{dtype:?} {mode:?}")).unwrap();
        }
    }
}

#[test]
fn a_first_token_gives_its_value() {
    let case = Case { t: 1, initial_state: false, ..case() };
    let inputs = case.inputs().unwrap();
    let want = values(inputs.args[2].as_ref().unwrap()).unwrap();
    for mode in MODES {
        let got = case.run(mode, &inputs, Graph::ALL).unwrap();
        let out = got.outputs[0].as_ref().unwrap();
        close(out, &want, DType::F32, 1e-5, &format!("{mode:?}")).unwrap();
        let dq = values(got.grads[0].as_ref().unwrap()).unwrap();
        assert!(dq.iter().all(|x| x.abs() < 1e-5), "{mode:?}: {dq:?}");
    }
}

/// A query of zeros gives a zero output and finite gradients.
#[test]
fn zero_queries_and_keys_are_not_nan() {
    let zeros = Tensor::zeros((1, 70, 1, 4), DType::F32, &Device::Cpu).unwrap();
    let ones = zeros.ones_like().unwrap();
    for (q, k) in [(&zeros, &ones), (&ones, &zeros), (&zeros, &zeros)] {
        for mode in MODES {
            let vars = [q, k, &ones].map(|x| Var::from_tensor(x).unwrap());
            let opts = Options::default().with_mode(mode).with_normalize(true);
            let out = linear_attn(&vars[0], &vars[1], &vars[2], &opts).unwrap().out;
            let grads = out.sum_all().unwrap().backward().unwrap();
            assert!(values(&out).unwrap().iter().all(|&x| x == 0.0), "{mode:?}");
            for var in &vars {
                let grad = values(grads.get(var).unwrap()).unwrap();
                assert!(grad.iter().all(|x| x.is_finite()), "{mode:?}");
            }
        }
    }
}
