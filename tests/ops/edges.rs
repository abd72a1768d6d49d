//! The ends of the range: no tokens, no batch, no heads, one channel, gates of -inf throughout, long sequences.

use crate::case::{Case, Gates, Op};
use crate::compare::{close, values};
use crate::run::{Graph, MODES};
use candle_core::{DType, Device, Tensor};

const DTYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn empty_cases(op: Op, normalize: bool) -> Vec<Case> {
    let case = Case { op, normalize, k: 5, v: 3, group: 2, ..Case::default() };
    vec![
        Case { b: 2, t: 0, ..case.clone() },
        Case { b: 0, t: 5, ..case.clone() },
        Case { b: 0, t: 0, ..case.clone() },
        Case { t: 0, cu_seqlens: Some(vec![0, 0, 0]), ..case },
    ]
}

#[test]
fn empty_problems_pass_the_state_through() {
    for op in Op::ALL {
        for normalize in [false, op == Op::LinearAttn] {
            for mut case in empty_cases(op, normalize) {
                for dtype in DTYPES {
                    [case.dtype, case.gate_dtype] = [dtype; 2];
                    let inputs = case.inputs().unwrap();
                    for mode in MODES {
                        let label = format!("{mode:?} of {case:?}");
                        let opts = case.options(mode, &inputs.args).with_final_state(true);
                        let got = case.call(&inputs.args, &opts).expect(&label);
                        let shape = [case.b, case.t, case.hv(), case.v];
                        assert_eq!(got.out.dims(), shape, "{label}");
                        assert_eq!(got.out.dtype(), dtype, "{label}");
                        let state = got.state.unwrap();
                        let kept = [(Some(&state.kv), 4), (state.z.as_ref(), 5)];
                        for (x, i) in kept {
                            let want = inputs.args[i].as_ref();
                            assert_eq!(x.map(|x| x.dims()), want.map(|x| x.dims()), "{label}");
                            let [x, want] = [x, want].map(|x| x.map(|x| values(x).unwrap()));
                            assert_eq!(x, want, "{label}");
                        }
                    }
                    if case.n_states() > 0 {
                        // Candle cannot sum an empty o, so the loss sees the states alone.
                        let loss = [false, true, true];
                        case.check_modes(Graph { loss, ..Graph::ALL }).unwrap();
                    }
                }
            }
        }
    }
}

#[test]
fn no_tokens_and_no_initial_state_give_a_state_of_zeros() {
    for op in Op::ALL {
        for normalize in [false, op == Op::LinearAttn] {
            let case = Case { op, normalize, b: 2, t: 0, initial_state: false, ..Case::default() };
            let inputs = case.inputs().unwrap();
            for mode in MODES {
                let opts = case.options(mode, &inputs.args).with_final_state(true);
                let state = case.call(&inputs.args, &opts).unwrap().state.unwrap();
                assert_eq!(state.kv.dims(), [2, 2, 16, 16]);
                assert!(values(&state.kv).unwrap().iter().all(|&x| x == 0.0));
                assert_eq!(state.z.is_some(), normalize);
                if let Some(z) = state.z {
                    assert_eq!(z.dims(), [2, 2, 16]);
                    assert!(values(&z).unwrap().iter().all(|&x| x == 0.0));
                }
            }
        }
    }
}

/// Whatever a dimension of zero means to an operator, it is a result or an error, never a panic.
#[test]
fn dimensions_of_zero_do_not_panic() {
    for op in Op::ALL {
        for (h, group, k, v) in [(0, 1, 4, 4), (2, 0, 4, 4), (2, 1, 0, 4), (2, 1, 4, 0), (0, 0, 0, 0)] {
            for cu_seqlens in [None, Some(vec![0u32, 3])] {
                let case = Case { op, h, group, k, v, t: 3, cu_seqlens, ..Case::default() };
                let inputs = case.inputs().unwrap();
                for mode in MODES {
                    let opts = case.options(mode, &inputs.args).with_final_state(true);
                    if let Ok(got) = case.call(&inputs.args, &opts) {
                        assert_eq!(got.out.dims(), [1, 3, h * group, v], "{case:?}");
                    }
                }
            }
        }
    }
}

/// Each token forgets everything before it: o is `scale * (q . k) v`, and nothing reaches the initial state.
#[test]
fn gates_of_minus_infinity_everywhere() {
    for op in Op::GATED {
        for dtype in DTYPES {
            let case = Case { op, dtype, gate_dtype: dtype, t: 130, ..Case::default() };
            let mut inputs = case.inputs().unwrap();
            let gate = inputs.args[3].take().unwrap();
            let forget = Tensor::full(f32::NEG_INFINITY, gate.shape(), &Device::Cpu).unwrap();
            inputs.args[3] = Some(forget.to_dtype(dtype).unwrap());
            let want = case.expected(&inputs, [true; 3]).unwrap();
            for mode in MODES {
                let label = format!("{op:?} {dtype:?} {mode:?}");
                let got = case.run(mode, &inputs, Graph::ALL).unwrap();
                case.check(&got, &want, Graph::ALL, &label).unwrap();
            }
        }
    }
}

#[test]
fn one_channel_each_way_for_many_tokens() {
    for op in Op::ALL {
        Case { op, t: 20_000, h: 1, k: 1, v: 1, ..Case::default() }.check_modes(Graph::ALL).unwrap();
    }
}

#[test]
fn heads_larger_than_256() {
    for op in Op::ALL {
        for (k, v) in [(300, 20), (20, 513), (384, 512)] {
            Case { op, t: 70, h: 1, k, v, ..Case::default() }.check_modes(Graph::ALL).unwrap();
        }
    }
}

/// More lanes than any split over threads expects, each of them short.
#[test]
fn many_short_lanes() {
    for op in Op::ALL {
        Case { op, b: 37, t: 2, h: 5, group: 3, k: 4, v: 6, ..Case::default() }
            .check_modes(Graph::ALL)
            .unwrap();
    }
}

#[test]
fn many_packed_sequences() {
    let ends: Vec<u32> = (0..=300u32).map(|n| n / 2 + n / 7).collect();
    for op in Op::ALL {
        let t = ends[ends.len() - 1] as usize;
        Case { op, t, cu_seqlens: Some(ends.clone()), k: 6, v: 5, gates: Gates::Forgets, ..Case::default() }
            .check_modes(Graph::ALL)
            .unwrap();
    }
}

/// A NaN in the input is a NaN in the output, not a number that looks like a result.
#[test]
fn nan_is_not_hidden() {
    for op in Op::ALL {
        let case = Case { op, t: 70, ..Case::default() };
        for i in 0..3 {
            let mut inputs = case.inputs().unwrap();
            let nan = inputs.args[i].take().unwrap().affine(0.0, f64::NAN).unwrap();
            inputs.args[i] = Some(nan);
            for mode in MODES {
                let opts = case.options(mode, &inputs.args);
                let out = case.call(&inputs.args, &opts).unwrap().out;
                let clean = values(&out).unwrap().iter().any(|x| !x.is_nan());
                assert!(!clean, "{op:?} {mode:?}: argument {i} is NaN throughout, o is not");
            }
        }
    }
}

/// Rows of one weight-sized problem do not disturb the next: the same call twice is the same to the bit.
#[test]
fn calls_are_reproducible() {
    for op in Op::ALL {
        let case = Case { op, t: 200, h: 4, k: 64, v: 48, ..Case::default() };
        let inputs = case.inputs().unwrap();
        for mode in MODES {
            let first = case.run(mode, &inputs, Graph::ALL).unwrap();
            for _ in 0..3 {
                let again = case.run(mode, &inputs, Graph::ALL).unwrap();
                let pairs =
                    (first.outputs.iter().zip(&again.outputs)).chain(first.grads.iter().zip(&again.grads));
                for (a, b) in pairs {
                    if let (Some(a), Some(b)) = (a, b) {
                        let exact = values(a).unwrap();
                        close(b, &exact, a.dtype(), 0.0, &format!("{op:?} {mode:?}")).unwrap();
                    }
                }
            }
        }
    }
}
