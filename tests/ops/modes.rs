//! Every mode against the reference, forward and backward, over scales, lengths and gates.

use crate::case::{Case, Gates, LENGTHS, Op, SCALES};
use crate::compare::close;
use crate::run::{Graph, MODES};
use candle_core::{DType, Result};
use candle_linear_attn::{
    Options, chunk_linear_attn, fused_chunk_linear_attn, fused_recurrent_linear_attn, linear_attn,
};

fn every_scale_and_length(op: Op) {
    for scale in SCALES {
        for t in LENGTHS {
            Case { op, t, scale, k: 16, v: 8, seed: t as u64, ..Case::default() }
                .check_modes(Graph::ALL)
                .unwrap();
        }
    }
}

#[test]
fn linear_attn_agrees_for_every_scale_and_length() {
    every_scale_and_length(Op::LinearAttn);
}

#[test]
fn retention_agrees_for_every_scale_and_length() {
    every_scale_and_length(Op::Retention);
}

#[test]
fn simple_gla_agrees_for_every_scale_and_length() {
    every_scale_and_length(Op::SimpleGla);
}

#[test]
fn gla_agrees_for_every_scale_and_length() {
    every_scale_and_length(Op::Gla);
}

#[test]
fn delta_rule_agrees_for_every_scale_and_length() {
    every_scale_and_length(Op::DeltaRule);
}

#[test]
fn gated_delta_rule_agrees_for_every_scale_and_length() {
    every_scale_and_length(Op::GatedDeltaRule);
}

#[test]
fn kda_agrees_for_every_scale_and_length() {
    every_scale_and_length(Op::Kda);
}

#[test]
fn rwkv7_agrees_for_every_scale_and_length() {
    every_scale_and_length(Op::Rwkv7);
}

/// FLA issue 47: the fused chunk backward applied the scale to dk but not to the part of dv that comes from other
/// chunks. dv was wrong as soon as the scale was not 1 and there was a second chunk; every forward test passed.
#[test]
fn issue_47_dv_beyond_one_chunk_with_scale_not_one() {
    for op in Op::ALL {
        for scale in [None, Some(-1.0), Some(-0.37), Some(0.5), Some(3.0)] {
            let case = Case { op, scale, t: 200, initial_state: false, ..Case::default() };
            let inputs = case.inputs().unwrap();
            let loss = [true, false, false];
            let want = case.expected(&inputs, loss).unwrap();
            for mode in MODES {
                let label = format!("{op:?} {mode:?} scale {scale:?}: dv");
                let graph = Graph { loss, ..Graph::ALL };
                let got = case.run(mode, &inputs, graph).unwrap();
                let dv = got.grads[2].as_ref().unwrap();
                close(dv, &want.grads[2], DType::F32, 2e-5, &label).unwrap();
                // The part from other chunks by itself: the first chunk's dv, with the cotangent only on later ones.
                let mut later = inputs.clone();
                let d_out = later.cotangents[0].take().unwrap();
                let masked = masked_before(&d_out, 64).unwrap();
                later.cotangents[0] = Some(masked);
                let want = case.expected(&later, loss).unwrap();
                let got = case.run(mode, &later, graph).unwrap();
                let dv = got.grads[2].as_ref().unwrap().narrow(1, 0, 64).unwrap();
                let rows = 64 * case.hv() * case.v;
                close(&dv, &want.grads[2][..rows], DType::F32, 2e-5, &label).unwrap();
            }
        }
    }
}

/// `x` with zeros for the first `t` tokens.
fn masked_before(x: &candle_core::Tensor, t: usize) -> Result<candle_core::Tensor> {
    let len = x.dim(1)?;
    let head = x.narrow(1, 0, t)?.zeros_like()?;
    candle_core::Tensor::cat(&[&head, &x.narrow(1, t, len - t)?], 1)
}

#[test]
fn gates_of_every_strength() {
    let gates = [Gates::Strong, Gates::AllStrong, Gates::Forgets, Gates::Huge, Gates::Zero, Gates::Positive];
    for op in Op::GATED {
        for gates in gates {
            for t in [1, 33, 64, 150] {
                Case { op, t, gates, ..Case::default() }.check_modes(Graph::ALL).unwrap();
            }
        }
    }
}

/// Decay that later gates undo: exponents relative to some other token are far above zero or far below.
#[test]
fn gates_that_swing_between_decay_and_growth() {
    for op in [Op::SimpleGla, Op::Gla] {
        let case = Case { op, t: 150, ..Case::default() };
        let mut inputs = case.inputs().unwrap();
        let gate = inputs.args[3].take().unwrap();
        let per_token = gate.elem_count() / case.t;
        // Phases differ from channel to channel, so no single anchor suits all of them.
        let swing: Vec<f32> = (0..gate.elem_count())
            .map(|i| match (i / per_token + i % per_token) % 4 {
                0 => -30.0,
                1 => -5.0,
                2 => 29.0,
                _ => 5.5,
            })
            .collect();
        let shape = gate.shape().clone();
        inputs.args[3] = Some(candle_core::Tensor::from_vec(swing, shape, gate.device()).unwrap());
        let want = case.expected(&inputs, Graph::ALL.loss).unwrap();
        for mode in MODES {
            let got = case.run(mode, &inputs, Graph::ALL).unwrap();
            let label = format!("{op:?} {mode:?} swinging gates");
            case.check(&got, &want, Graph::ALL, &label).unwrap();
        }
    }
}

/// A state of up to e^72 is a number like any other in f32, wherever in a chunk the growth begins and ends.
#[test]
fn gates_that_grow_and_decay_by_72_orders_of_e() {
    for op in [Op::SimpleGla, Op::Gla] {
        for start in [0, 20, 63, 64] {
            let case = Case { op, t: 200, ..Case::default() };
            let mut inputs = case.inputs().unwrap();
            let gate = inputs.args[3].take().unwrap();
            let per_token = gate.elem_count() / case.t;
            let growth = |t: usize| match t.checked_sub(start) {
                Some(0..60) => 1.2,
                Some(60..120) => -1.2,
                _ => -0.1,
            };
            let data: Vec<f32> = (0..gate.elem_count()).map(|i| growth(i / per_token)).collect();
            let gate = candle_core::Tensor::from_vec(data, gate.shape(), gate.device());
            inputs.args[3] = Some(gate.unwrap());
            let want = case.expected(&inputs, Graph::ALL.loss).unwrap();
            for mode in MODES {
                let got = case.run(mode, &inputs, Graph::ALL).unwrap();
                let label = format!("{op:?} {mode:?} growth from {start}");
                case.check(&got, &want, Graph::ALL, &label).unwrap();
            }
        }
    }
}

#[test]
fn named_wrappers_are_the_modes() {
    let case = Case { t: 100, group: 2, scale: Some(-0.37), ..Case::default() };
    let inputs = case.inputs().unwrap();
    let want = case.expected(&inputs, Graph::NONE.loss).unwrap();
    let [Some(q), Some(k), Some(v), ..] = &inputs.args else { unreachable!() };
    type Wrapper = fn(
        &candle_core::Tensor,
        &candle_core::Tensor,
        &candle_core::Tensor,
        &Options,
    ) -> Result<candle_linear_attn::Output>;
    let wrappers: [(Wrapper, usize); 3] =
        [(fused_recurrent_linear_attn, 1), (chunk_linear_attn, 2), (fused_chunk_linear_attn, 3)];
    for (wrapper, mode) in wrappers {
        // Whatever mode the options name, the wrapper's own counts.
        for given in MODES {
            let opts = case.options(given, &inputs.args).with_final_state(true);
            let named = wrapper(q, k, v, &opts).unwrap();
            let plain = linear_attn(q, k, v, &opts.with_mode(MODES[mode])).unwrap();
            let label = format!("the wrapper of {:?}", MODES[mode]);
            let exact = crate::compare::values(&plain.out).unwrap();
            close(&named.out, &exact, DType::F32, 0.0, &label).unwrap();
            close(&named.out, &want.outputs[0], DType::F32, 1e-5, &label).unwrap();
            let kv = named.state.unwrap().kv;
            close(&kv, &want.outputs[1], DType::F32, 1e-5, &label).unwrap();
        }
    }
}

#[test]
fn error_does_not_grow_with_the_length() {
    for op in Op::ALL {
        for normalize in [false, op == Op::LinearAttn] {
            Case { op, normalize, t: 4096, h: 1, ..Case::default() }.check_modes(Graph::ALL).unwrap();
        }
    }
}
