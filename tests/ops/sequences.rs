//! What time means: splitting, decoding, packing, causality; and what it does not touch: heads, batch entries, v's scale.

use crate::case::{ARGS, Args, BETA, Case, GATE, Inputs, Op};
use crate::compare::{Expected, close, inner, relative_error, values};
use crate::run::{Graph, MODES, Outcome};
use candle_core::{DType, Result, Tensor, Var};
use candle_linear_attn::{Mode, State};
use proptest::prelude::*;
use proptest::sample::select;

/// The arguments for tokens `from..from + len`: everything with a time dimension is cut.
fn cut(case: &Case, args: &Args, from: usize, len: usize) -> Args {
    std::array::from_fn(|i| {
        let timeless = matches!(i, 4 | 5) || (i == GATE && case.op == Op::Retention);
        let cut = |x: &Tensor| x.narrow(1, from, len).unwrap();
        match timeless {
            true => args[i].clone(),
            false => args[i].as_ref().map(cut),
        }
    })
}

/// Runs the pieces one after the other, each in its own mode, state carried, and differentiates through all of it.
fn run_in_pieces(case: &Case, inputs: &Inputs, pieces: &[(usize, Mode)]) -> Result<Outcome> {
    let vars = inputs.args.clone().map(|arg| arg.map(|x| Var::from_tensor(&x).unwrap()));
    let args = vars.clone().map(|v| v.map(|v| v.as_tensor().clone()));
    let mut carried = [args[4].clone(), args[5].clone()];
    let (mut outs, mut from) = (Vec::new(), 0);
    for &(len, mode) in pieces {
        let mut piece = cut(case, &args, from, len);
        [piece[4], piece[5]] = carried;
        let opts = case.options(mode, &piece).with_final_state(true);
        let result = case.call(&piece, &opts)?;
        outs.push(result.out);
        let State { kv, z } = result.state.expect("the final state was asked for");
        carried = [Some(kv), z];
        from += len;
    }
    let outputs = [Some(Tensor::cat(&outs, 1)?), carried[0].clone(), carried[1].clone()];
    let loss = crate::compare::loss(&outputs, &inputs.cotangents, [true; 3])?;
    let store = loss.expect("o is always there").backward()?;
    let grads = vars.map(|v| v.and_then(|v| store.get(v.as_tensor()).cloned()));
    Ok(Outcome { outputs, grads })
}

fn expected(case: &Case, inputs: &Inputs) -> Expected {
    let mut want = case.expected(inputs, [true; 3]).unwrap();
    for i in 0..ARGS.len() {
        if inputs.args[i].is_none() {
            want.grads[i].clear();
        }
    }
    want
}

proptest! {
    #![proptest_config(crate::properties::config(32))]

    #[test]
    fn splitting_anywhere_and_carrying_the_state_changes_nothing(
        op in select(Op::ALL.to_vec()),
        normalize: bool,
        initial_state: bool,
        t in 1..200usize,
        at in 0.0..=1.0f64,
        modes in (select(MODES.to_vec()), select(MODES.to_vec())),
        seed: u64,
    ) {
        let normalize = normalize && op == Op::LinearAttn;
        let case = Case { op, t, normalize, initial_state, seed, k: 12, v: 20, group: 2, ..Case::default() };
        let inputs = case.inputs().unwrap();
        let at = (at * t as f64).round() as usize;
        let pieces = [(at, modes.0), (t - at, modes.1)];
        run_in_pieces(&case, &inputs, &pieces)
            .and_then(|got| {
                let label = format!("{op:?} split at {at} of {t}, {modes:?}");
                case.check(&got, &expected(&case, &inputs), Graph::ALL, &label)
            })
            .map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}

#[test]
fn prefill_then_one_token_at_a_time() {
    for op in Op::ALL {
        for mode in MODES {
            for normalize in [false, op == Op::LinearAttn] {
                let case = Case { op, normalize, t: 90, ..Case::default() };
                let inputs = case.inputs().unwrap();
                let mut pieces = vec![(65, Mode::Chunk)];
                pieces.extend([(1, mode); 25]);
                let got = run_in_pieces(&case, &inputs, &pieces).unwrap();
                let label = format!("{op:?} decoded in {mode:?}");
                case.check(&got, &expected(&case, &inputs), Graph::ALL, &label).unwrap();
            }
        }
    }
}

/// `x` with the numbers of token `t` replaced.
fn with_token(x: &Tensor, t: usize, by: f64) -> Tensor {
    let len = x.dim(1).unwrap();
    let token = x.narrow(1, t, 1).unwrap().affine(0.0, by).unwrap();
    let (head, tail) = (x.narrow(1, 0, t).unwrap(), x.narrow(1, t + 1, len - t - 1).unwrap());
    Tensor::cat(&[&head, &token, &tail], 1).unwrap()
}

/// Changes token `t` of the arguments `which` and expects every output before it unchanged to the bit.
fn check_causality(case: &Case, which: &[usize], tokens: &[usize], by: f64) {
    let inputs = case.inputs().unwrap();
    for mode in MODES {
        let opts = case.options(mode, &inputs.args);
        let base = case.call(&inputs.args, &opts).unwrap().out;
        for &t in tokens {
            let mut changed = inputs.args.clone();
            for &i in which {
                changed[i] = changed[i].as_ref().map(|x| with_token(x, t, by));
            }
            let out = case.call(&changed, &opts).unwrap().out;
            let [before, after] = [&base, &out].map(|x| bits(&x.narrow(1, 0, t).unwrap()));
            let Case { op, dtype, .. } = case;
            let label = format!("{op:?} {dtype:?} {mode:?}: arguments {which:?} at {t} set to {by}");
            assert!(before == after, "{label}: o before differs");
        }
    }
}

fn bits(x: &Tensor) -> Vec<u64> {
    values(x).unwrap().iter().map(|x| x.to_bits()).collect()
}

fn causal_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for op in Op::ALL {
        for dtype in [DType::F32, DType::BF16] {
            for normalize in [false, op == Op::LinearAttn] {
                cases.push(Case { op, dtype, normalize, t: 140, k: 19, v: 21, ..Case::default() });
            }
        }
    }
    cases
}

/// The arguments that have tokens.
fn with_tokens(case: &Case) -> Vec<usize> {
    let gate = Op::GATED.contains(&case.op) && case.op != Op::Retention;
    let beta = matches!(case.op, Op::DeltaRule | Op::GatedDeltaRule | Op::Kda);
    let rest = if case.op == Op::Rwkv7 { BETA + 1..ARGS.len() } else { 0..0 };
    (0..=2).chain(gate.then_some(GATE)).chain(beta.then_some(BETA)).chain(rest).collect()
}

const TOKENS: [usize; 9] = [1, 15, 16, 40, 63, 64, 100, 128, 139];

/// Not by so much as a rounding.
#[test]
fn no_output_depends_on_a_later_token() {
    for case in causal_cases() {
        for by in [0.0, -0.75, 30.0] {
            check_causality(&case, &with_tokens(&case), &TOKENS, by);
        }
    }
}

/// A later gate of -inf is as legal as any.
#[test]
fn no_output_depends_on_a_later_token_that_forgets() {
    for case in causal_cases() {
        if with_tokens(&case).contains(&GATE) {
            check_causality(&case, &[GATE], &TOKENS, f64::NEG_INFINITY);
        }
    }
}

/// Not even as 0 * NaN under a mask.
#[test]
fn no_output_depends_on_a_later_token_that_is_not_finite() {
    for case in causal_cases() {
        for argument in with_tokens(&case) {
            for by in [f64::INFINITY, f64::NAN] {
                check_causality(&case, &[argument], &TOKENS, by);
            }
        }
    }
}

#[test]
fn linear_in_v_and_the_initial_state() {
    for op in Op::ALL {
        for normalize in [false, op == Op::LinearAttn] {
            let case = Case { op, normalize, t: 100, ..Case::default() };
            let inputs = case.inputs().unwrap();
            // Same q, k, gates and z: only v and the initial kv differ.
            let other = Case { seed: 1, ..case.clone() }.inputs().unwrap();
            let [mut second, mut mixed] = [inputs.args.clone(), inputs.args.clone()];
            for i in [2, 4] {
                let (a, b) = (inputs.args[i].as_ref().unwrap(), other.args[i].as_ref().unwrap());
                second[i] = Some(b.clone());
                mixed[i] = Some((a.affine(2.0, 0.0).unwrap() - b.affine(0.5, 0.0).unwrap()).unwrap());
            }
            for mode in MODES {
                let out = |args: &Args| {
                    let result = case.call(args, &case.options(mode, args)).unwrap();
                    values(&result.out).unwrap()
                };
                let (a, b, m) = (out(&inputs.args), out(&second), out(&mixed));
                let want: Vec<f64> = a.iter().zip(&b).map(|(a, b)| 2.0 * a - 0.5 * b).collect();
                let error = relative_error(&m, &want);
                assert!(error <= 1e-5, "{op:?} {mode:?}: {error:e}");
            }
        }
    }
}

/// Heads and batch entries do not see each other: permuted inputs give permuted outputs.
#[test]
fn heads_and_batch_entries_are_independent() {
    for op in Op::ALL {
        let case = Case { op, b: 3, h: 3, t: 70, ..Case::default() };
        let inputs = case.inputs().unwrap();
        for (batch_dim, order) in [(false, [2u32, 0, 1]), (true, [1, 2, 0])] {
            let order = Tensor::new(&order, &candle_core::Device::Cpu).unwrap();
            let permuted: Args = std::array::from_fn(|i| {
                let x = inputs.args[i].as_ref()?;
                let retention_gate = i == GATE && op == Op::Retention;
                let dim = match (batch_dim, i) {
                    (true, _) if retention_gate => return Some(x.clone()),
                    (true, _) => 0,
                    (false, _) if retention_gate => 0,
                    (false, 4 | 5) => 1,
                    (false, _) => 2,
                };
                Some(x.index_select(&order, dim).unwrap())
            });
            for mode in MODES {
                let out = |args: &Args| case.call(args, &case.options(mode, args)).unwrap().out;
                let dim = if batch_dim { 0 } else { 2 };
                let want = out(&inputs.args).index_select(&order, dim).unwrap();
                let label = format!("{op:?} {mode:?} batch: {batch_dim}");
                close(&out(&permuted), &values(&want).unwrap(), DType::F32, 1e-6, &label).unwrap();
            }
        }
    }
}

/// Packed sequences against the same sequences one call each: outputs, states and gradients.
#[test]
fn packed_sequences_equal_one_by_one() {
    let lengths = [0usize, 1, 70, 0, 64, 3, 1, 0];
    let ends: Vec<u32> = (0..=lengths.len()).map(|n| lengths[..n].iter().sum::<usize>() as u32).collect();
    for op in Op::ALL {
        for normalize in [false, op == Op::LinearAttn] {
            let case = Case {
                op,
                normalize,
                t: lengths.iter().sum(),
                cu_seqlens: Some(ends.clone()),
                group: 2,
                ..Case::default()
            };
            let inputs = case.inputs().unwrap();
            for mode in MODES {
                let packed = case.run(mode, &inputs, Graph::ALL).unwrap();
                let single = one_by_one(&case, &inputs, mode, &lengths).unwrap();
                let compare = |name: &str, x: &Option<Tensor>, want: &Option<Tensor>| {
                    if let (Some(x), Some(want)) = (x, want) {
                        let label = format!("{op:?} {mode:?} {name}");
                        close(x, &values(want).unwrap(), DType::F32, 1e-5, &label).unwrap();
                    }
                };
                for i in 0..3 {
                    compare("output", &packed.outputs[i], &single.outputs[i]);
                }
                for i in 0..ARGS.len() {
                    assert_eq!(packed.grads[i].is_some(), single.grads[i].is_some());
                    compare("gradient", &packed.grads[i], &single.grads[i]);
                }
            }
        }
    }
}

fn one_by_one(case: &Case, inputs: &Inputs, mode: Mode, lengths: &[usize]) -> Result<Outcome> {
    let vars = inputs.args.clone().map(|arg| arg.map(|x| Var::from_tensor(&x).unwrap()));
    let args = vars.clone().map(|v| v.map(|v| v.as_tensor().clone()));
    let alone = Case { cu_seqlens: None, ..case.clone() };
    let (mut outs, mut kvs, mut zs, mut from) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (n, &len) in lengths.iter().enumerate() {
        let mut piece = cut(case, &args, from, len);
        for state in piece[4..BETA].iter_mut().flatten() {
            *state = state.narrow(0, n, 1)?;
        }
        let opts = alone.options(mode, &piece).with_final_state(true);
        let result = alone.call(&piece, &opts)?;
        outs.push(result.out);
        let State { kv, z } = result.state.expect("the final state was asked for");
        kvs.push(kv);
        zs.extend(z);
        from += len;
    }
    let outputs = [
        Some(Tensor::cat(&outs, 1)?),
        Some(Tensor::cat(&kvs, 0)?),
        (!zs.is_empty()).then(|| Tensor::cat(&zs, 0)).transpose()?,
    ];
    let mut total = Tensor::zeros((), DType::F32, &candle_core::Device::Cpu)?;
    for (x, d) in outputs.iter().zip(&inputs.cotangents) {
        if let (Some(x), Some(d)) = (x, d) {
            total = (total + inner(x, d)?)?;
        }
    }
    let store = total.backward()?;
    let grads = vars.map(|v| v.and_then(|v| store.get(v.as_tensor()).cloned()));
    Ok(Outcome { outputs, grads })
}
