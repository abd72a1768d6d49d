//! The reference's backward against central differences of its forward.

use crate::case::{Case, Gates, Op};
use crate::reference::{Decay, Outputs, Problem, Update};

fn objective(problem: &Problem, d: &Outputs) -> f64 {
    let o = problem.forward();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(&o.out, &d.out) + dot(&o.kv, &d.kv) + dot(&o.z, &d.z)
}

fn log_decay(problem: &mut Problem) -> &mut [f64] {
    match &mut problem.decay {
        Decay::None => &mut [],
        Decay::PerHead(g) | Decay::PerToken(g) | Decay::PerChannel(g) => g,
    }
}

fn beta(problem: &mut Problem) -> &mut [f64] {
    if let Update::Delta { beta } = &mut problem.update { beta } else { &mut [] }
}

fn low(problem: &mut Problem) -> &mut [f64] {
    if let Update::LowRank { a, .. } = &mut problem.update { a } else { &mut [] }
}

fn rank(problem: &mut Problem) -> &mut [f64] {
    if let Update::LowRank { b, .. } = &mut problem.update { b } else { &mut [] }
}

/// Every element of every input.
fn check(case: &Case) {
    let inputs = case.inputs().unwrap();
    let problem = case.problem(&inputs).unwrap();
    let d = |i: usize| match &inputs.cotangents[i] {
        Some(d) => crate::compare::values(d).unwrap(),
        None => vec![0.0; case.n_states() * case.hv() * case.k],
    };
    let d = Outputs { out: d(0), kv: d(1), z: d(2) };
    let grads = problem.backward(&d);
    type Pick = fn(&mut Problem) -> &mut [f64];
    let inputs: [(&str, Pick, &[f64]); 9] = [
        ("q", |p| &mut p.q, &grads.q),
        ("k", |p| &mut p.k, &grads.k),
        ("v", |p| &mut p.v, &grads.v),
        ("log decay", log_decay, &grads.log_decay),
        ("kv", |p| p.kv.as_mut().unwrap(), &grads.kv),
        ("z", |p| p.z.as_mut().map_or(&mut [], |z| z), &grads.z),
        ("beta", beta, &grads.beta),
        ("a", low, &grads.a),
        ("b", rank, &grads.b),
    ];
    let step = 1e-5;
    let at = |pick: Pick, i: usize, by: f64| {
        let mut moved = problem.clone();
        pick(&mut moved)[i] += by;
        objective(&moved, &d)
    };
    for (name, pick, analytic) in inputs {
        for (i, &analytic) in analytic.iter().enumerate() {
            // Inputs that are not there have a gradient too, but cannot be moved.
            if i >= pick(&mut problem.clone()).len() {
                break;
            }
            let numeric = (at(pick, i, step) - at(pick, i, -step)) / (2.0 * step);
            assert!(
                (numeric - analytic).abs() <= 1e-7 * (1.0 + numeric.abs()),
                "{name}[{i}] of {case:?}: {numeric} by differences, {analytic} by the backward"
            );
        }
    }
}

fn small(op: Op) -> Case {
    Case { op, b: 2, t: 5, h: 2, group: 2, k: 3, v: 2, scale: Some(-0.37), ..Case::default() }
}

#[test]
fn backward_of_every_operator() {
    for op in Op::ALL {
        check(&small(op));
    }
}

#[test]
fn backward_with_positive_gates() {
    for op in Op::GATED {
        let gates = Gates::Positive;
        check(&Case { gates, ..small(op) });
    }
}

#[test]
fn backward_with_normalization() {
    for scale in [None, Some(-0.37), Some(3.0)] {
        let normalize = true;
        check(&Case { scale, normalize, ..small(Op::LinearAttn) });
    }
}

#[test]
fn backward_of_packed_sequences() {
    for op in Op::ALL {
        check(&Case { b: 1, t: 6, cu_seqlens: Some(vec![0, 2, 2, 5, 6]), ..small(op) });
    }
}
