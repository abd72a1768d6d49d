//! Backward passes over one graph that run inside one another, on one thread: what a thread does that waits in one pass
//! and is given a task with another.

use crate::case::{Case, Inputs, Op, Vars};
use crate::compare::{inner, loss};
use crate::graph::check_grads;
use crate::run::MODES;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, Var};
use candle_linear_attn::{Mode, Output, State};
use std::sync::{Arc, Mutex};

/// The identity. The first backward to come to it runs another one, from its start to its end, before it goes on.
#[derive(Clone)]
struct Interrupt(Arc<Mutex<Option<Job>>>);

type Job = Box<dyn FnOnce() + Send>;

impl CustomOp1 for Interrupt {
    fn name(&self) -> &'static str {
        "interrupt"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        assert!(layout.is_contiguous() && layout.start_offset() == 0);
        Ok((x.clone(), layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let job = self.0.lock().unwrap().take();
        if let Some(job) = job {
            job();
        }
        Ok(Some(grad.clone()))
    }
}

/// An operator whose inputs and outputs all go through interrupts.
struct Forward {
    vars: Vars,
    outputs: [Option<Tensor>; 3],
    /// Those of the inputs, then those of the outputs.
    interrupts: Vec<Interrupt>,
}

fn forward(case: &Case, inputs: &Inputs, mode: Mode) -> Result<Forward> {
    let vars = inputs.args.clone().map(|x| x.map(|x| Var::from_tensor(&x).unwrap()));
    let mut interrupts = Vec::new();
    let mut through = |x: &Tensor| {
        let interrupt = Interrupt(Arc::default());
        interrupts.push(interrupt.clone());
        x.apply_op1(interrupt).unwrap()
    };
    let args = vars.clone().map(|v| v.map(|v| through(&v)));
    let opts = case.options(mode, &args).with_final_state(true);
    let Output { out, state } = case.call(&args, &opts)?;
    let State { kv, z } = state.expect("the final state was asked for");
    let outputs = [Some(out), Some(kv), z].map(|x| x.map(|x| through(&x)));
    Ok(Forward { vars, outputs, interrupts })
}

#[test]
fn a_backward_within_a_backward_disturbs_neither() {
    let losses = [[true; 3], [true, false, false], [false, true, false]];
    for op in Op::ALL {
        for normalize in [false, op == Op::LinearAttn] {
            let case = Case { op, normalize, t: 5, k: 4, v: 3, group: 2, ..Case::default() };
            let inputs = case.inputs().unwrap();
            let want = losses.map(|wanted| case.expected(&inputs, wanted).unwrap());
            let Forward { vars, outputs, interrupts } = forward(&case, &inputs, MODES[0]).unwrap();
            // The order in which a pass comes to the outputs is that in which the loss adds them up.
            let reversed = |wanted: [bool; 3]| {
                let terms: Vec<Tensor> = (0..3)
                    .rev()
                    .filter(|&i| wanted[i])
                    .filter_map(|i| {
                        Some(inner(outputs[i].as_ref()?, inputs.cotangents[i].as_ref()?).unwrap())
                    })
                    .collect();
                Tensor::stack(&terms, 0).unwrap().sum_all().unwrap()
            };
            for (outer, outer_want) in losses.iter().zip(&want) {
                for (nested, nested_want) in losses.iter().zip(&want) {
                    for (at, interrupt) in interrupts.iter().enumerate() {
                        let forwards = loss(&outputs, &inputs.cotangents, *outer).unwrap().unwrap();
                        for outer_loss in [forwards, reversed(*outer)] {
                            let label = format!("{case:?}: {nested:?} within {outer:?} at {at}");
                            let nested_loss = loss(&outputs, &inputs.cotangents, *nested).unwrap().unwrap();
                            let (vars_within, want_within) = (vars.clone(), nested_want.clone());
                            let label_within = format!("{label}, the one within");
                            let job: Job = Box::new(move || {
                                let store = nested_loss.backward().unwrap();
                                check_grads(&vars_within, &store, &want_within, &label_within);
                            });
                            *interrupt.0.lock().unwrap() = Some(job);
                            check_grads(&vars, &outer_loss.backward().unwrap(), outer_want, &label);
                            *interrupt.0.lock().unwrap() = None;
                        }
                    }
                }
            }
        }
    }
}
