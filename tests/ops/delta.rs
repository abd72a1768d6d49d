//! What is particular to the delta families: keys of any length, beta up to 2, and errors that do not add up.

use crate::case::{BETA, Case, Gates, Op};
use crate::run::{Graph, MODES};
use candle_core::Tensor;

const DELTA: [Op; 3] = [Op::DeltaRule, Op::GatedDeltaRule, Op::Kda];
const FAMILIES: [Op; 4] = [Op::DeltaRule, Op::GatedDeltaRule, Op::Kda, Op::Rwkv7];

/// Runs every mode with some of the arguments replaced.
fn check_with(case: &Case, change: impl Fn(usize, &Tensor) -> Tensor) {
    let mut inputs = case.inputs().unwrap();
    for (i, x) in inputs.args.iter_mut().enumerate() {
        *x = x.as_ref().map(|x| change(i, x));
    }
    let want = case.expected(&inputs, [true; 3]).unwrap();
    for mode in MODES {
        let got = case.run(mode, &inputs, Graph::ALL).unwrap();
        case.check(&got, &want, Graph::ALL, &format!("{mode:?} of {case:?}")).unwrap();
    }
}

/// Each token reflects the state: nothing that it erases is lost, all of it comes back with the opposite sign.
#[test]
fn beta_of_2_with_keys_of_length_1() {
    for op in DELTA {
        for gates in [Gates::Mild, Gates::Zero] {
            for (k, v) in [(16, 24), (64, 8)] {
                let case = Case { op, gates, k, v, t: 300, ..Case::default() };
                check_with(&case, |i, x| match i {
                    1 => {
                        let norm = x.sqr().and_then(|x| x.sum_keepdim(3)).and_then(|x| x.sqrt()).unwrap();
                        x.broadcast_div(&norm).unwrap()
                    }
                    BETA => x.affine(0.0, 2.0).unwrap(),
                    _ => x.clone(),
                });
            }
        }
    }
}

/// Keys that were not divided by their norm: `beta |k|^2` is up to 8, and every token multiplies a part of the state by as
/// much as -7.
#[test]
fn keys_that_are_longer_than_1() {
    for op in DELTA {
        let case = Case { op, k: 24, v: 16, t: 40, ..Case::default() };
        check_with(&case, |i, x| if i == 1 { x.affine(2.0, 0.0).unwrap() } else { x.clone() });
    }
}

/// A beta of 0 leaves the state alone, but has a gradient.
#[test]
fn beta_of_0() {
    for op in DELTA {
        let case = Case { op, t: 100, group: 2, ..Case::default() };
        check_with(&case, |i, x| if i == BETA { x.zeros_like().unwrap() } else { x.clone() });
    }
}

/// The same key again and again: what the tokens of a chunk write depends on each other as strongly as can be.
#[test]
fn one_key_for_all_tokens() {
    for op in DELTA {
        let case = Case { op, t: 130, k: 32, v: 16, ..Case::default() };
        check_with(&case, |i, x| match i {
            1 => x.narrow(1, 0, 1).and_then(|first| first.broadcast_as(x.shape())).unwrap(),
            _ => x.clone(),
        });
    }
}

#[test]
fn error_does_not_grow_with_the_length_whatever_the_sizes() {
    for op in FAMILIES {
        for (gates, k, v) in [(Gates::Mild, 32, 48), (Gates::Zero, 48, 16), (Gates::Strong, 16, 32)] {
            Case { op, gates, k, v, t: 8192, h: 1, ..Case::default() }.check_modes(Graph::ALL).unwrap();
        }
    }
}
