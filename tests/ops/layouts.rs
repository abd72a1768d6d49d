//! Inputs that are views. Gradients arrive at the tensor behind the view.

use crate::case::{ARGS, Case, Gates, Inputs, Op};
use crate::compare::{close, inner};
use crate::layout::{ALL, Layout, check_on};
use crate::run::MODES;
use candle_core::{DType, Device, Tensor, Var};

fn check(case: &Case, layout: Layout, chosen: &[usize]) {
    check_on(&Device::Cpu, case, layout, chosen, [1e-5, 2e-5]);
}

fn case(op: Op) -> Case {
    Case { op, b: 2, t: 67, h: 2, group: 2, k: 9, v: 12, gates: Gates::Mild, ..Case::default() }
}

#[test]
fn every_input_in_every_layout() {
    for op in Op::ALL {
        for layout in ALL {
            check(&case(op), layout, &[0, 1, 2, 3, 4, 5, 6, 7, 8]);
        }
    }
}

#[test]
fn one_input_in_every_layout() {
    for layout in ALL {
        for only in 0..ARGS.len() {
            let op = match only {
                3 => Op::Gla,
                6 => Op::Kda,
                7 | 8 => Op::Rwkv7,
                _ => Op::LinearAttn,
            };
            let normalize = op == Op::LinearAttn && only == 5;
            check(&Case { normalize, ..case(op) }, layout, &[only]);
        }
        for op in [Op::Retention, Op::SimpleGla] {
            check(&case(op), layout, &[3]);
        }
    }
}

#[test]
fn packed_sequences_in_every_layout() {
    for layout in ALL {
        let case = Case { b: 1, cu_seqlens: Some(vec![0, 0, 1, 50, 67]), ..case(Op::SimpleGla) };
        check(&case, layout, &[0, 1, 2, 3, 4]);
        for op in [Op::GatedDeltaRule, Op::Rwkv7] {
            check(&Case { op, ..case.clone() }, layout, &[0, 1, 2, 3, 4, 6, 7, 8]);
        }
    }
}

/// The cotangents of o and of the state reach the operator as views too.
#[test]
fn cotangents_in_every_layout() {
    for op in Op::ALL {
        let case = case(op);
        let inputs = case.inputs().unwrap();
        let want = case.expected(&inputs, [true; 3]).unwrap();
        let opposite = |x: &Tensor, d: &Option<Tensor>| {
            let turn = |x: &Tensor| x.permute((3, 1, 0, 2)).unwrap();
            inner(&turn(x), &turn(d.as_ref().unwrap())).unwrap()
        };
        for mode in MODES {
            let vars = inputs.args.clone().map(|x| x.map(|x| Var::from_tensor(&x).unwrap()));
            let args = vars.clone().map(|v| v.map(|v| v.as_tensor().clone()));
            let opts = case.options(mode, &args).with_final_state(true);
            let result = case.call(&args, &opts).unwrap();
            let loss = (opposite(&result.out, &inputs.cotangents[0])
                + opposite(&result.state.unwrap().kv, &inputs.cotangents[1]))
            .unwrap();
            let store = loss.backward().unwrap();
            for (i, var) in vars.iter().enumerate() {
                if let Some(var) = var {
                    let label = format!("{op:?} {mode:?}: gradient of {}", ARGS[i]);
                    close(store.get(var).unwrap(), &want.grads[i], DType::F32, 2e-5, &label).unwrap();
                }
            }
        }
    }
}

/// `sum_all` sends one number, repeated with stride zero.
#[test]
fn cotangent_of_a_plain_sum() {
    for op in Op::ALL {
        let case = case(op);
        let mut inputs: Inputs = case.inputs().unwrap();
        inputs.cotangents[0] = Some(inputs.cotangents[0].take().unwrap().ones_like().unwrap());
        let want = case.expected(&inputs, [true, false, false]).unwrap();
        for mode in MODES {
            let var = Var::from_tensor(inputs.args[2].as_ref().unwrap()).unwrap();
            let mut args = inputs.args.clone();
            args[2] = Some(var.as_tensor().clone());
            let out = case.call(&args, &case.options(mode, &args)).unwrap().out;
            let store = out.sum_all().unwrap().backward().unwrap();
            let dv = store.get(&var).unwrap();
            close(dv, &want.grads[2], DType::F32, 2e-5, &format!("{op:?} {mode:?}")).unwrap();
        }
    }
}
